"""Files that a killed process leaves whole: what long trainings and long attacks go on from."""

import functools
import glob
import inspect
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from defenses.identity import described, layers, weights

P = ParamSpec("P")
R = TypeVar("R")

REMEDY = "delete it to start anew, or name another"
SAID = 5  # differences that are spelled out
_KEPT: ContextVar[tuple[Path, set[Path]] | None] = ContextVar("_KEPT", default=None)


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` with ``torch.save``: at any moment `path` holds the old or the new, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # there only if the disk is full


def load(path: str | Path, run: dict[str, Any], names: list[str]) -> list[Any] | None:
    """What `save` wrote under `names`, on the CPU, if it is of the same `run`; None without a file.

    Raises
    ------
    ValueError
        If the file is damaged, holds something else, or is of another run.
    """
    path = Path(path)
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        partial.unlink(missing_ok=True)  # left by a run that was killed while it wrote
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        stored, found = dict(saved["run"]), [saved[name] for name in names]
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint; {REMEDY}") from error
    if changed := differences(stored, run):
        raise ValueError(f"{path} belongs to another run ({changed}); {REMEDY}")
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`name was this, is that` for what differs; only the first few of many."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    said = [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names[:SAID]]
    return "; ".join(said + [f"{len(names) - SAID} more differ"] * (len(names) > SAID))


def check_readable(content: Any, what: str) -> None:
    """Raise a ValueError unless `load` would read what `save` writes of `content`."""
    file = io.BytesIO()
    try:
        torch.save(content, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"a checkpoint cannot hold {what}: it takes tensors, numbers, text, and lists and "
            f"dicts of them ({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Inside, attacks under `resumable` keep in `folder` what they go on from after a kill.

    On exit without an exception, those files stay that were used inside; the folder's others go.
    """
    used: set[Path] = set()
    token = _KEPT.set(None if folder is None else (folder, used))
    try:
        yield
    finally:
        _KEPT.reset(token)
    for file in {*folder.glob("*.pt")} - used if folder is not None and used else ():
        file.unlink(missing_ok=True)


def resumable(attack: Callable[P, R]) -> Callable[P, R]:
    """`attack` with a ``checkpoint`` where it is given none and `kept_in` names a folder.

    The file is named by all that the result depends on: images, labels, network and options. An
    attack on a network that may count its passes goes on from nothing: it would count too few.
    """

    @functools.wraps(attack)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        asked = inspect.signature(attack).bind(*args, **kwargs).arguments
        kept, model = _KEPT.get(), asked.pop("model")
        if kept is None or asked.get("checkpoint") is not None or _may_count(model):
            return attack(*args, **kwargs)
        rounded = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
        known = described([asked, layers(model), weights(model), rounded])
        file = kept[0] / f"{attack.__name__}-{zlib.crc32(known.encode()):08x}.pt"
        kept[1].add(file)
        kwargs["checkpoint"] = file
        return attack(*args, **kwargs)

    return call


def _may_count(model: Any) -> bool:
    """Whether it has a hook, or a layer that is neither PyTorch's nor of this package."""
    return not isinstance(model, nn.Module) or any(
        module._forward_hooks or not type(module).__module__.startswith(("torch.nn.", "defenses."))
        for module in model.modules()
    )
