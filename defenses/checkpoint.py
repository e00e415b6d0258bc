"""Files that a killed process leaves whole: what long trainings and long attacks go on from."""

import glob
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

REMEDY = "delete it to start anew, or name another"


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
    differ = [name for name in stored | run if stored.get(name) != run.get(name)]
    changed = [f"{name} was {stored.get(name)}, is {run.get(name)}" for name in differ]
    if changed:
        raise ValueError(f"{path} belongs to another run ({'; '.join(changed)}); {REMEDY}")
    return found
