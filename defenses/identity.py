"""What a run is of, in words: equal for what is equal, so that a checkpoint can be held to them."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LONGEST = 300  # letters; of what is longer, the beginning and a checksum


def described(thing: Any, known: Mapping[int, str] | None = None) -> str:
    """`thing` in words, with all the values that it holds.

    A function is its name and, where it cannot be imported by that, its defaults and the values
    of its closure; unless it is PyTorch's or this package's, also its code and the values and
    functions that it reads from its module. Tensors and arrays are checksums; of any other object
    it is the class and its attributes. Nothing is called or drawn from.

    Parameters
    ----------
    known : mapping from id to name, optional
        What only its name stands for, such as the network that is trained.
    """
    text = _words(thing, dict(known or {}))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… #{_crc(text.encode())}"


def layers(model: nn.Module) -> dict[str, str]:
    """The modules of `model` by name: PyTorch's and this package's with their options."""
    own = {id(module): "a layer" for module in model.modules()}
    found = {}
    for name, module in model.named_modules():
        place = type(module).__module__
        options = vars(module) if place.startswith(("torch.nn.", "defenses.")) else {}
        shown = {k: v for k, v in options.items() if k[0] != "_" and k != "training"}
        found[name or "itself"] = f"{type(module).__qualname__}({_named(shown, own)})"
    return found


def weights(model: nn.Module) -> str:
    """A checksum of all parameters and buffers, and of what the modules keep besides."""
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    extra = {name: v for name, v in model.state_dict().items() if name not in parts}
    return _crc(_named(parts | extra, {}).encode())


def _words(thing: Any, known: dict[int, str]) -> str:
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        return repr(thing)
    if isinstance(thing, Tensor):
        return f"tensor {_size(thing)} #{_crc(_bytes(thing))}"
    if isinstance(thing, np.ndarray | np.generic):
        return f"array {thing.dtype} {thing.shape} #{_crc(np.ascontiguousarray(thing).tobytes())}"
    if isinstance(thing, type | types.BuiltinFunctionType):
        return _name(thing)
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    if id(thing) in known:
        return known[id(thing)]
    known[id(thing)] = f"a {type(thing).__name__}"  # where it holds itself
    if isinstance(thing, functools.partial):
        arguments = [*(_words(v, known) for v in thing.args), _named(thing.keywords, known)]
        return f"{_words(thing.func, known)}({', '.join(filter(None, arguments))})"
    if isinstance(thing, types.MethodType):
        return f"{_words(thing.__self__, known)}.{thing.__name__}"
    if isinstance(thing, types.FunctionType):
        return _function(thing, known)
    if isinstance(thing, Mapping):
        items = (f"{_words(k, known)}: {_words(v, known)}" for k, v in thing.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(thing, set | frozenset):
        return "{" + ", ".join(sorted(_words(v, known) for v in thing)) + "}"
    if isinstance(thing, list | tuple):
        return "[" + ", ".join(_words(v, known) for v in thing) + "]"
    if isinstance(thing, nn.Module):
        options = {k: v for k, v in vars(thing).items() if k[0] != "_" and k != "training"}
        inner = _crc("".join(f"{k}{v}" for k, v in layers(thing).items()).encode())
        return f"{_name(type(thing))}({_named(options, known)}) #{inner} #{weights(thing)}"
    if isinstance(thing, torch.Generator):
        return f"Generator #{_crc(_bytes(thing.get_state()))}"
    if type(thing).__module__ == "torch":  # a dtype, a device, a memory format
        return str(thing)
    return f"{_name(type(thing))}({_named(getattr(thing, '__dict__', {}), known)})"


def _function(f: types.FunctionType, known: dict[int, str]) -> str:
    name, module = _name(f), f.__module__ or ""
    if module != "__main__" and _importable(f):
        return name
    values = dict(inspect.signature(f, follow_wrapped=False).parameters)
    held = {k: p.default for k, p in values.items() if p.default is not inspect.Parameter.empty}
    for variable, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        if cell != types.CellType():  # one that is not bound yet is empty
            held[variable] = cell.cell_contents
    if module.startswith(("torch.", "defenses.")):
        return f"{name}({_named(held, known)})"
    read = {k: f.__globals__[k] for k in _globals(f.__code__) if k in f.__globals__}
    read = {k: v for k, v in read.items() if not isinstance(v, types.ModuleType)}
    held |= {k: v if _is_value(v) else type(v) for k, v in read.items()}
    return f"{name}({_named(held, known)}) #{_code(f.__code__)}"


def _is_value(thing: Any) -> bool:
    """Whether a global is a value or a function; others, such as a run that counts, may change."""
    if isinstance(thing, Mapping):
        return all(map(_is_value, thing.values()))
    if isinstance(thing, list | tuple | set | frozenset):
        return all(map(_is_value, thing))
    functions = types.FunctionType | types.BuiltinFunctionType | type | functools.partial
    values = bool | int | float | complex | str | bytes | Tensor | np.ndarray | np.generic
    return thing is None or isinstance(thing, values | functions)


def _importable(thing: Any) -> bool:
    found: Any = sys.modules.get(thing.__module__)
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is thing


def _globals(code: types.CodeType) -> Collection[str]:
    """The globals that a function reads, in the order in which it does."""
    found = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    found += [name for inner in _inner(code) for name in _globals(inner)]
    return dict.fromkeys(found)


def _code(code: types.CodeType) -> str:
    constants = [_words(c, {}) for c in code.co_consts if not isinstance(c, types.CodeType)]
    parts = [code.co_code, repr((constants, code.co_names)).encode()]
    return _crc(b"".join([*parts, *(_code(inner).encode() for inner in _inner(code))]))


def _inner(code: types.CodeType) -> Iterable[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _named(values: Mapping[str, Any], known: dict[int, str]) -> str:
    return ", ".join(f"{name}={_words(value, known)}" for name, value in values.items())


def _name(thing: Any) -> str:
    module = thing.__module__ or ""
    own = module.startswith("defenses.") or module in ("builtins", "__main__")
    return thing.__qualname__ if own else f"{module}.{thing.__qualname__}"


def _size(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _crc(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
