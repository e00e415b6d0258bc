"""A simulated accelerator, on which what would fail or wait on a GPU fails or is counted.

A tensor on the device "sim" computes on the CPU and refuses to meet a CPU tensor, as a GPU's does;
`Synchronizations` counts how often the host asks for what only the device knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "sim"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

aten = torch.ops.aten
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # it rounds nothing
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# What returns a number to Python, or a tensor whose shape depends on the values.
ASKING = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}


class Sim(Tensor):
    """A tensor on the simulated device; `held` is the CPU tensor that holds its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Sim:
        like: dict[str, Any] = {"dtype": inner.dtype, "layout": inner.layout, "device": NAME}
        like |= {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, **like)  # type: ignore[attr-defined]
        wrapped.held = inner
        return wrapped

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Sim:
        return Sim(inner["held"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Sim({self.held})"

    def tolist(self) -> Any:  # PyTorch refuses it for subclasses
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)


class Generator(torch.Generator):
    """A generator that says it is on "sim" if it was made for it; it draws what the CPU's does."""

    place: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        generator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        generator.place = torch.device(device)
        return generator

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


class Synchronizations(TorchDispatchMode):
    """Inside, tensors can be made on "sim", and `count` holds what the host asked it for."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.count.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if question := asked(func, args, kwargs or {}):
            self.count[question] += 1
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; results are on "sim" where an argument or the named device is.

    Raises
    ------
    RuntimeError
        Where a tensor on "sim" meets one of at least one dimension on the CPU.
    """
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_sim = any(isinstance(tensor, Sim) for tensor in given)
    if on_sim and func.overloadpacket not in COPIES:
        checked = args[:1] + args[2:] if func.overloadpacket in INDEXING else args
        for tensor in tree_leaves((checked, kwargs)):
            if isinstance(tensor, Tensor) and not isinstance(tensor, Sim) and tensor.ndim:
                raise RuntimeError(f"{func} got tensors on {NAME} and on {tensor.device}")
    to = kwargs.get("device")
    if to is not None:
        on_sim, kwargs = is_sim(to), kwargs | {"device": "cpu"}
    own = {id(unwrapped(tensor)): tensor for tensor in given}  # an operation in place returns it
    args, kwargs = tree_map(unwrapped, (args, kwargs))

    def returned(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return own[id(value)] if id(value) in own else Sim(value) if on_sim else value

    return tree_map(returned, func(*args, **kwargs))


def asked(func: Any, args: Any, kwargs: dict[str, Any]) -> str:
    """What the host asks the device for by this call; "" where it need not wait.

    A mask as an index needs its sum, unless a number is written there; a copy from one to the
    other waits in either direction.
    """
    operation = func.overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_sim = [isinstance(tensor, Sim) for tensor in tensors]
    crosses = any(on_sim) and not all(on_sim)
    if operation is aten._to_copy:
        to = kwargs.get("device")
        return "copy" if to is not None and is_sim(to) != on_sim[0] else ""
    if operation is aten.copy_:
        return "copy" if crosses else ""
    if operation in INDEXING and any(on_sim):
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, Sim) for index in indices):
            return "copy of an index"
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        filled = operation is not aten.index and len(indices) == 1 and args[2].ndim == 0
        return "mask" if masked and not filled else ""
    return operation.__name__ if operation in ASKING and any(on_sim) else ""


def is_sim(device: torch.device | str) -> bool:
    return torch.device(device).type == NAME


def unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, Sim) else value


@contextmanager
def simulated() -> Iterator[Synchronizations]:
    """The device "sim" exists inside, and what is yielded counts.

    Gradients are computed in the caller's own thread: PyTorch starts one for each device at the
    first gradient of the process, when this one may not have existed.
    """
    if not hasattr(torch, NAME):
        _register()
    backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    in_one_thread = torch.autograd.set_multithreading_enabled(False)(backward)
    one_thread = mock.patch.object(torch.autograd, "_engine_run_backward", in_one_thread)
    generator = mock.patch.object(torch, "Generator", Generator)
    with one_thread, generator, Synchronizations() as counter:
        yield counter


def _register() -> None:
    class Module(backend_registration._DummyBackendModule):  # type: ignore[name-defined]
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def get_rng_state(self, device: object = None) -> Tensor:  # torch.random.fork_rng asks
            return torch.get_rng_state()

        def set_rng_state(self, state: Tensor, device: object = None) -> None:
            """Nothing: the numbers are the CPU's, which has its state back already."""

    setup: Callable[..., None] = backend_registration._setup_privateuseone_for_python_backend  # type: ignore[attr-defined]
    setup(NAME, backend_module=Module())
    AUTOCAST.fallback(torch.library.fallthrough_kernel)
