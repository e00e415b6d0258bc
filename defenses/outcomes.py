"""What happened to each image, packed: a bit for right or wrong, a float16 for a distance.

In the file of a run an outcome is JSON. In the book's store all those of a chapter are one file,
`results/NAME.npz`, from which worst cases and paired comparisons come without running anything.
"""

import base64
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defenses.evaluation import Accuracy, Robustness, Share
from defenses.results import KEY, chapters_folder, locked, rows_of, version

IDENTITY = [*KEY, "protocol", "dataset", "seed"]  # what names a row of the store
Outcome = Accuracy | Robustness | Share


def to_json(outcome: Any) -> dict[str, Any]:
    """The outcome as JSON: the packed images, or the bare numbers where it has none."""
    if isinstance(outcome, Accuracy):
        packed = np.packbits(outcome.correct.numpy())
        return {"n": outcome.n, "bits": _text(packed), "images": outcome.images}
    if isinstance(outcome, Robustness):
        numbers = {"value": outcome.value, "ci": list(outcome.ci), "n": outcome.n}
        numbers |= {"unfooled": outcome.unfooled, "images": outcome.images}
        if outcome.sizes is not None:
            numbers["sizes"] = _text(outcome.sizes.numpy().astype("<f2"))
        return numbers
    return {"value": float(outcome.value), "n": int(outcome.n)}


def from_json(packed: Mapping[str, Any]) -> Outcome:
    """The outcome that `to_json` packed."""
    if "bits" in packed:
        bits = np.unpackbits(_array(packed["bits"], "u1"), count=packed["n"])
        return Accuracy(torch.from_numpy(bits.astype(bool)), packed["images"])
    if "unfooled" in packed:
        sizes = None
        if "sizes" in packed:
            sizes = torch.from_numpy(_array(packed["sizes"], "<f2").astype("f4"))
        value, n, unfooled = packed["value"], packed["n"], packed["unfooled"]
        return Robustness(value, tuple(packed["ci"]), n, unfooled, sizes, packed["images"])
    return Share(packed["value"], packed["n"])


def store(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the packed outcomes of `rows` of a run to `file`, one for each row of the store.

    A row without one takes away that of the row which it replaces.
    """
    with locked(file.parent):
        _store(file, rows)


def _store(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    kept = {_name(identity): array for identity, array in load(file).items()}
    for row in rows:
        outcome = row["outcome"]
        name = _name(tuple(str(row[column]) for column in IDENTITY))
        if "bits" in outcome:
            kept[name] = np.unpackbits(_array(outcome["bits"], "u1"), count=row["n"]).astype(bool)
        elif "sizes" in outcome:
            kept[name] = _array(outcome["sizes"], "<f2")
        else:
            kept.pop(name, None)
    if not kept:
        file.unlink(missing_ok=True)  # its only outcome is gone
        return
    names = sorted(kept)
    lengths = np.array([len(kept[name]) for name in names], "i4")
    is_bits = np.array([kept[name].dtype == bool for name in names])
    bits = [kept[name] for name, is_bit in zip(names, is_bits, strict=True) if is_bit]
    sizes = [kept[name] for name, is_bit in zip(names, is_bits, strict=True) if not is_bit]
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with partial.open("wb") as handle:
        np.savez_compressed(
            handle,
            names=np.array("\n".join(names).encode()),
            lengths=lengths,
            is_bits=is_bits,
            bits=np.packbits(np.concatenate([*bits, np.zeros(0, bool)])),
            sizes=np.concatenate([*sizes, np.zeros(0, "<f2")]).astype("<f2"),
        )
    os.replace(partial, file)


def load(file: Path) -> dict[tuple[str, ...], np.ndarray]:
    """What happened to each image, by (table, row, column, metric, protocol, dataset, seed).

    Bools say whether an image was right; float16 its distance, infinite where the attack failed and
    NaN where the image does not count. Empty without a file.
    """
    return _loaded(file, version(file)) if file.is_file() else {}


@functools.lru_cache(maxsize=4)
def _loaded(file: Path, _version: tuple[int, ...]) -> dict[tuple[str, ...], np.ndarray]:
    with np.load(file, allow_pickle=False) as content:
        names = content["names"].item().decode().split("\n")
        lengths, is_bits = content["lengths"], content["is_bits"]
        bits = np.unpackbits(content["bits"]).astype(bool)
        sizes = content["sizes"]
    found, at = {}, {True: 0, False: 0}
    for name, length, is_bit in zip(names, lengths.tolist(), is_bits.tolist(), strict=True):
        source = bits if is_bit else sizes
        found[tuple(name.split("\t"))] = source[at[is_bit] : at[is_bit] + length]
        at[is_bit] += length
    return found


def stored(
    chapter: str,
    table: str,
    row: str,
    column: str,
    metric: str = "accuracy",
    *,
    protocol: str = "short",
    dataset: str = "mnist",
    folder: str | Path | None = None,
) -> dict[int, Accuracy]:
    """Which images were right, by seed, as the book's store has it for one place.

    Raises
    ------
    ValueError
        Nobody has measured the place, or only the number was kept.
    """
    place = {"table": table, "row": row, "column": column, "metric": metric}
    place |= {"protocol": protocol, "dataset": dataset}
    rows = rows_of(chapter, folder)
    for name, wanted in place.items():
        rows = rows[rows[name] == wanted]
    kept = load(chapters_folder(chapter, folder) / "results" / f"{chapter}.npz")
    found = {}
    for seed, images in zip(rows["seed"], rows["images"], strict=True):
        correct = kept.get((*place.values(), seed))
        if correct is not None:
            found[int(seed)] = Accuracy(torch.from_numpy(correct.copy()), images)
    if not found:
        raise ValueError(f"{chapter} / {' / '.join(place.values())}: no image by image outcome")
    return found


def sizes(
    chapter: str,
    table: str,
    column: str,
    metric: str,
    *,
    protocol: str = "short",
    dataset: str = "mnist",
    seed: int = 0,
    folder: str | Path | None = None,
) -> dict[str, torch.Tensor]:
    """How far each image had to go, float32 (n,), by row, as the book's store has it.

    Raises
    ------
    ValueError
        Nobody has measured the column, or its rows are not of the same number of images.
    """
    kept = load(chapters_folder(chapter, folder) / "results" / f"{chapter}.npz")
    place = (table, column, metric, protocol, dataset, str(seed))
    found = {
        name: torch.from_numpy(array.astype("f4"))
        for (in_table, name, *rest), array in kept.items()
        if (in_table, *rest) == place and array.dtype != bool
    }
    if len({len(array) for array in found.values()}) != 1:
        raise ValueError(f"{chapter} / {' / '.join(place)}: no distances of the same images")
    return found


def of_row(row: Any, folder: str | Path | None = None) -> dict[str, Accuracy]:
    """Which images were right behind a row of `results.row_at`, of the seeds where that is kept."""
    kept = load(chapters_folder(row.chapter, folder) / "results" / f"{row.chapter}.npz")
    place = tuple(row[name] for name in IDENTITY[:-1])
    found = {seed: kept.get((*place, seed)) for seed in row.seed.split()}
    return {
        seed: Accuracy(torch.from_numpy(right.copy()), row.images)
        for seed, right in found.items()
        if right is not None and right.dtype == bool
    }


def _name(identity: Sequence[str]) -> str:
    return "\t".join(identity)


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
