"""Files that a killed process leaves whole: what long trainings and long attacks go on from."""

import glob
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

REMEDY = "delete it to start anew, or name another"
SAID = 5  # differences that are spelled out


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
