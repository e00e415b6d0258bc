"""The trained networks that come with the book: small files, read without pickle.

They are those of the chapter "One yardstick" on MNIST (protocol `short`, seed 0), rounded to a file
of 160 kB each: a matrix of more than `LARGE` weights to one byte a weight and a scale a row, other
matrices to 16 bits. `defenses.models.pretrained` builds the network around the weights.
"""

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "weights"
LARGE = 100_000
NAMES = {
    "mnist": (
        "none",
        "compact, soft labels",
        "BatchOut",
        "prototypes",
        "Jacobian",
        "input gradient",
        "one random step",
        "PGD",
    )
}


def weights(name: str, data: str = "mnist") -> dict[str, Tensor]:
    """The float32 weights of one network, by their names in its state dict.

    Parameters
    ----------
    name : str
        One of ``NAMES[data]``; case, blanks and punctuation do not count.
    data : str
        What the network was trained on.

    Raises
    ------
    ValueError
        The name or the data set is not among those; or the file is damaged.
    FileNotFoundError
        The file is not there.
    """
    file = path(name, data)
    if file == path("images", data):
        raise _unknown(name, data)
    read = {key: torch.from_numpy(array) for key, array in arrays(file).items()}
    return {
        key: value.float() * read.get(f"{key} scale", 1)
        for key, value in read.items()
        if not key.endswith(" scale")
    }


def images(data: str = "mnist") -> tuple[Tensor, Tensor]:
    """One test image of each class: uint8 (10, 1, 28, 28), and their labels, int64 (10,).

    Each is the first of its class, among those that the chapter attacks, that all networks of
    ``NAMES[data]`` read correctly. Errors: as for `weights`.
    """
    read = arrays(path("images", data))
    return torch.from_numpy(read["images"]), torch.from_numpy(read["labels"])


def path(name: str, data: str = "mnist") -> Path:
    """The file of one network, or of the images, whether or not it is there."""
    if data not in NAMES:
        raise ValueError(f"no networks trained on {data!r}: expected one of {', '.join(NAMES)}")
    files = {_plain(known): f"{data}-{_plain(known)}.npz" for known in (*NAMES[data], "images")}
    if _plain(name) not in files:
        raise _unknown(name, data)
    return FOLDER / files[_plain(name)]


def _unknown(name: str, data: str) -> ValueError:
    known = ", ".join(map(repr, NAMES[data]))
    return ValueError(f"no network {name!r} trained on {data}: expected one of {known}")


def rounded(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """What a file holds of a state dict; `weights` undoes it, but for the rounding."""
    packed = {}
    for key, value in state.items():
        array = value.detach().cpu().numpy()
        if array.ndim > 1 and array.size > LARGE:
            scale = np.abs(array).max(axis=1, keepdims=True) / np.float32(127)
            packed[f"{key} scale"] = scale
            array = np.round(array / np.where(scale == 0, 1, scale)).astype(np.int8)
        packed[key] = (
            array.astype(np.float16) if array.ndim > 1 and array.dtype != np.int8 else array
        )
    return packed


def arrays(file: Path) -> dict[str, np.ndarray]:
    """Everything in one file as it was written; the checksum of each part is compared."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is not there: get it anew from the book") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): get it anew from the book") from error


def _plain(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()
