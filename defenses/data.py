"""Data sets as uint8 tensors that live on the device whole, and the batches drawn from them."""

import contextlib
import hashlib
import numbers
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.datasets.utils import check_integrity

from defenses.stored import Stored, store

TORCHVISION: dict[str, Any] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "svhn": datasets.SVHN,
}
NAMES = ("digits", *TORCHVISION, "cifar10-jpeg", "imagefolder:PATH")
DIGITS = tuple("0123456789")
EXTENSIONS = (".jpg", ".jpeg", ".png")
LARGE = 2**30  # bytes of image files, which decoded are some ten times as many


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A data set, whole: uint8 images (N, C, H, W) and int64 labels (N,), indices into `classes`.

    `train` and `test` are the pairs (images, labels) that `fit` and `evaluate` take.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.train_images, self.train_labels

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.test_images, self.test_labels

    def to(self, device: torch.device | str) -> "ImageData":
        """Return the same data on `device`."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.train_images.shape[1:]))
        return (
            f"ImageData({self.name}: {len(self.train_labels):,} training and "
            f"{len(self.test_labels):,} test images of {shape}, {len(self.classes)} classes, "
            f"on {self.train_images.device})"
        )


def load_data(
    name: str,
    root: str | Path | None = None,
    device: torch.device | str | None = None,
    *,
    resident: bool | None = None,
    size: int = 224,
    cache: str | Path | None = None,
) -> ImageData:
    """Load a data set as uint8 tensors, downloading it where torchvision can and must.

    CIFAR, SVHN and image folders are decoded once and kept as one file, `NAME.uint8.pt`, beside
    the data; it is rebuilt when the data's files change, and not written in a read-only folder.
    An image folder of more than `LARGE` bytes stays on the disk, decoded: its images, of whatever
    shape, are a :class:`defenses.stored.Stored`, which `fit` and `evaluate` take like a tensor.

    Parameters
    ----------
    name : str
        `digits` (scikit-learn's 1,797 images of 8×8, each pixel repeated to 3×3 and padded by 2 to
        1×28×28; of the images sorted by label every fifth is for testing: 1,437 and 360),
        `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn`, or `imagefolder:PATH` for
        `PATH/{train,test}/CLASS/*.jpg|jpeg|png`, where a relative PATH lies below the root and
        hidden files and folders, such as `.ipynb_checkpoints`, do not count;
        `cifar10-jpeg` stands for `imagefolder:cifar10-jpeg`.
    root : path, optional
        The folder of the data sets, laid out as torchvision does. Default: the environment
        variable `DEFENSES_DATA`, else `defenses` beside torch's hub in the user's cache.
    device : torch.device or str, optional
        Where the tensors go; default: the CPU.
    resident : bool, optional
        Whether an image folder is held in memory whole; default: by its size.
    size, cache : int; path, optional
        Of a folder that is not: the height and width to which its images are cut, and where they
        are kept, decoded. Default: the environment variable `DEFENSES_CACHE`, else beside the data.

    Raises
    ------
    ValueError
        The name is unknown; a file is corrupted (it is named); images held in memory differ in
        size; the training and test classes of a folder differ.
    FileNotFoundError
        The data are neither there nor to be had by download.
    OSError
        The decoded images of a folder cannot be written.

    Examples
    --------
    >>> load_data("digits")
    ImageData(digits: 1,437 training and 360 test images of 1×28×28, 10 classes, on cpu)
    """
    folder = _root(root)
    if name == "digits":
        data = _read_digits()
    elif name in TORCHVISION:
        data = _read_torchvision(name, folder)
    elif name == "cifar10-jpeg" or name.removeprefix("imagefolder:") not in ("", name):
        folder /= Path(name.removeprefix("imagefolder:")).expanduser()
        cache = cache or os.environ.get("DEFENSES_CACHE") or folder
        data = _read_imagefolder(folder, resident, size, Path(cache).expanduser())
    else:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(NAMES)}")
    return data if device is None else data.to(device)


def to_float(
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Return a copy of images as floats in [0,1]: uint8 over 255, floats as they are.

    Parameters
    ----------
    images : Tensor, uint8 or floating, (N, C, H, W)
    dtype, memory_format
        Those of the copy.

    Raises
    ------
    ValueError
        The images are neither uint8 nor floating, not 4-dimensional, or leave [0,1].
    """
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "expected images as a uint8 or floating tensor of shape (N, C, H, W), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    x = images.to(dtype, copy=True, memory_format=memory_format)
    if images.dtype == torch.uint8:
        return x.div_(255)
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("floating images must lie in [0,1]; divide values of 0 to 255 by 255")
    return x


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
    **form: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator of (float images in [0,1], labels), the last batch perhaps a smaller one.

    With a `generator` the order is a permutation drawn at the call; without one, the data's own.
    A batch is a copy: what is done to it in place reaches neither images nor labels.

    Parameters
    ----------
    images : Tensor, uint8 or float, (N, C, H, W)
    labels : Tensor, int64, (N,)
    batch_size : int, at least 1
    generator : torch.Generator, optional
        On the images' device, so that shuffling never leaves it; one on the CPU works as well.
    share : (k, n)
        What the k-th of n processes takes: of each batch every n-th image, beginning with the k-th;
        without a generator, every n-th batch.
    form
        The `dtype` and `memory_format` of the batches, as `to_float` takes them.
    """
    if len(images) != len(labels):
        raise ValueError(f"expected a label an image, got {len(images)} and {len(labels)}")
    if not (isinstance(batch_size, numbers.Integral) and batch_size >= 1):
        raise ValueError(f"batch_size is {batch_size!r}, expected an integer >= 1")
    starts, (k, n), seed = range(0, len(images), batch_size), share, None
    stored: Any = images if isinstance(images, Stored) else None
    if generator is None:
        parts: list[Any] = [slice(start, start + batch_size) for start in starts][k::n]
    else:
        if stored is not None:
            order, seed = stored.order(generator)
        else:
            order = torch.randperm(len(images), generator=generator, device=generator.device)
            order = order.to(images.device)
        parts = [order[start : start + batch_size][k::n] for start in starts]
    read = (images[part] for part in parts) if stored is None else stored.read(parts, seed)
    both = zip(read, parts, strict=True)
    return ((to_float(x, **form), labels[part].clone()) for x, part in both)


def digest(tensors: Sequence[Tensor]) -> str:
    """Eight letters that name these images with these labels: what two numbers must share."""
    crc = 0
    for part in tensors:
        if isinstance(part, Stored):
            crc = zlib.crc32(part.identity.encode(), crc)
        else:
            crc = zlib.crc32(part.detach().cpu().contiguous().numpy().data, crc)  # no copy
    return f"{crc:08x}"


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Return a random window of each image, padded with zeros, mirrored with probability 1/2.

    Parameters
    ----------
    x : Tensor, (N, C, H, W)
    generator : torch.Generator
    padding : int, at least 0
        Pixels added on every side before an H×W window is cut.

    Returns
    -------
    Tensor, (N, C, H, W), channels_last, of x's dtype and device
    """
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    N, _, H, W = x.shape

    def draw(high: int) -> Tensor:
        drawn = torch.randint(high, (N, 1), generator=generator, device=generator.device)
        return drawn.to(x.device)

    top, left, flip = draw(2 * padding + 1), draw(2 * padding + 1), draw(2)
    columns = torch.arange(W, device=x.device)
    rows = top + torch.arange(H, device=x.device)
    columns = left + torch.where(flip.bool(), columns.flip(0), columns)
    pixels = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    n = torch.arange(N, device=x.device)[:, None, None]
    return pixels[n, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def gaussian_noise(x: Tensor, generator: torch.Generator, sigma: float = 0.5) -> Tensor:
    """Return images under noise of standard deviation `sigma`, cut off at 0 and 1.

    Parameters
    ----------
    x : Tensor, (N, C, H, W), in [0,1]
    generator : torch.Generator
    sigma : float, at least 0, in units of pixels
    """
    if not sigma >= 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    noise = torch.empty_like(x).normal_(std=sigma, generator=generator)
    return (x + noise).clamp_(0, 1)


def _root(root: str | Path | None) -> Path:
    if root is None:
        root = os.environ.get("DEFENSES_DATA") or Path(torch.hub.get_dir()).parent / "defenses"
    return Path(root).expanduser()


def _read_digits() -> ImageData:
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    images = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    images, labels = F.pad(images, (2, 2, 2, 2)), torch.from_numpy(digits.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[labels.argsort(stable=True)[::5]] = True
    return ImageData("digits", images[~test], labels[~test], images[test], labels[test], DIGITS)


def _read_torchvision(name: str, root: Path) -> ImageData:
    source = TORCHVISION[name]
    splits = ("train", "test") if name == "svhn" else (True, False)
    files = _torchvision_files(name, root)
    missing = [file for file in files if not file.is_file()]
    if missing:
        try:
            for split in splits:
                source(root, split, download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"{name!r} is not in {root} ({missing[0].relative_to(root)} is missing) and could "
                f"not be downloaded: {error}. Put its files there, name another folder with root= "
                "or DEFENSES_DATA, or take 'digits', which needs no download"
            ) from error
    if "mnist" in name:
        classes = DIGITS if name == "mnist" else tuple(source.classes)
        return _image_data(name, [_read_idx(name, file) for file in files], classes)

    def read() -> tuple[list[Tensor], tuple[str, ...]]:
        for file, md5 in files.items():
            if not check_integrity(file, md5):  # so that nothing foreign is unpickled
                raise ValueError(_corrupted(name, file, "its MD5 sum is not the original's"))
        tensors = []
        for part in (source(root, split) for split in splits):
            if name == "svhn":
                tensors += [torch.from_numpy(part.data), torch.from_numpy(part.labels)]
            else:
                tensors += [torch.from_numpy(part.data).permute(0, 3, 1, 2)]
                tensors += [torch.tensor(part.targets)]
        return tensors, DIGITS if name == "svhn" else tuple(part.classes)

    return _image_data(name, *_decoded_once(root / f"{name}.uint8.pt", list(files), read))


def _torchvision_files(name: str, root: Path) -> dict[Path, str | None]:
    source = TORCHVISION[name]
    if "mnist" in name:  # images and labels to train, images and labels to test, in this order
        raw = root / source.__name__ / "raw"
        return {raw / Path(file).stem: None for file, _ in source.resources}
    if name == "svhn":
        return {root / source.split_list[s][1]: source.split_list[s][2] for s in ("train", "test")}
    meta = [(source.meta["filename"], source.meta["md5"])]
    listed = [*source.train_list, *source.test_list, *meta]
    return {root / source.base_folder / file: md5 for file, md5 in listed}


def _read_idx(name: str, file: Path) -> Tensor:
    dimensions = 3 if "images" in file.name else 1
    try:
        tensor = read_sn3_pascalvincent_tensor(str(file))
        if tensor.dtype != torch.uint8 or tensor.ndim != dimensions:
            raise ValueError(f"{tensor.ndim} dimensions of {tensor.dtype}")
    except Exception as error:
        reason = f"it is not a whole IDX file of bytes in {dimensions} dimensions"
        raise ValueError(_corrupted(name, file, reason)) from error
    return tensor[:, None] if dimensions == 3 else tensor


def _corrupted(name: str, file: Path, reason: str) -> str:
    return f"{file} is corrupted: {reason}. Delete it and load {name!r} again to download it anew"


def _read_imagefolder(folder: Path, resident: bool | None, size: int, cache: Path) -> ImageData:
    samples, classes = {}, {}
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(
                f"{folder / split} is not there: expected images as {{train,test}}/CLASS/*.jpg or "
                f"*.png below {folder}; a relative PATH lies below root= or DEFENSES_DATA"
            )
        classes[split], samples[split] = _listed(folder / split)
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise ValueError(f"{folder}: train and test must have the same classes; only one has {odd}")
    files = [file for file, _ in samples["train"] + samples["test"]]
    name = folder.resolve().name
    if resident is None:
        resident = sum(file.stat().st_size for file in files) <= LARGE
    if not resident:

        def stored(split: str) -> tuple[Any, Tensor]:
            paths, labels = zip(*samples[split], strict=True)
            images, order = store(paths, cache / name, split, size, _decode_one)
            return images, torch.tensor(labels)[order]

        return ImageData(name, *stored("train"), *stored("test"), tuple(classes["train"]))

    def read() -> tuple[list[Tensor], tuple[str, ...]]:
        images = _decode(files)
        labels = torch.tensor([label for _, label in samples["train"] + samples["test"]])
        n = len(samples["train"])
        return [images[:n], labels[:n], images[n:], labels[n:]], tuple(classes["train"])

    return _image_data(name, *_decoded_once(folder / f"{name}.uint8.pt", files, read))


def _listed(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The classes below `folder`, and its images with the number of their class, both sorted."""
    found: list[tuple[Path, int]] = []
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not _hidden(d.name))
    for label, name in enumerate(classes):
        images = []
        for place, inner, files in os.walk(folder / name, followlinks=True):
            inner[:] = [d for d in inner if not _hidden(d)]
            shown = [file for file in files if not _hidden(file)]
            images += [(place, file) for file in shown if file.lower().endswith(EXTENSIONS)]
        found += [(Path(*image), label) for image in sorted(images)]
        if not images:
            raise FileNotFoundError(
                f"{folder / name} holds no image: expected {', '.join(EXTENSIONS)}. Add some, or "
                "delete the folder: each one is a class"
            )
    if not classes:
        raise FileNotFoundError(f"{folder} holds no folder: expected one a class")
    return classes, found


def _hidden(name: str) -> bool:
    """Whether a file manager would not show it: editors, systems and servers leave such things."""
    return name.startswith((".", "__MACOSX", "@eaDir"))


def _decode(files: list[Path]) -> Tensor:
    chunks = [files[i : i + 256] for i in range(0, len(files), 256)]  # fewer turns of Python's lock
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda chunk: [_decode_one(file) for file in chunk], chunks)
        decoded = [image for part in parts for image in part]
    for file, image in zip(files, decoded, strict=True):
        if image.shape != decoded[0].shape:
            (_, h, w), (_, H, W) = image.shape, decoded[0].shape
            raise ValueError(
                f"{file} is {h}×{w}, but {files[0]} is {H}×{W}: resize to one size, or let "
                "load_data cut them, with resident=False"
            )
    images = torch.stack(decoded)
    grey = bool((images == images[:, :1]).all())
    return images[:, :1] if grey else images


def _decode_one(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{file} has more than 8 bits a channel: convert it to 8")
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # a damaged PNG is a SyntaxError to Pillow
        raise ValueError(f"{file} cannot be decoded: {error}. Replace or delete it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decoded_once(
    kept: Path, sources: list[Path], read: Callable[[], tuple[list[Tensor], tuple[str, ...]]]
) -> tuple[list[Tensor], tuple[str, ...]]:
    fingerprint = _fingerprint(kept.parent, sources)
    if kept.is_file():
        try:
            stored = torch.load(kept, weights_only=True)
            if stored["fingerprint"] == fingerprint:
                if stored["checksum"] != _checksum(stored["tensors"]):
                    raise ValueError("its checksum is wrong")
                return stored["tensors"], stored["classes"]
        except Exception as error:
            warnings.warn(f"{kept} is corrupted and is rebuilt: {error}", stacklevel=4)
    tensors, classes = read()
    tensors = [tensor.contiguous() for tensor in tensors]
    stored = {"fingerprint": fingerprint, "checksum": _checksum(tensors)}
    _write_atomically(kept, {**stored, "tensors": tensors, "classes": classes})
    return tensors, classes


def _fingerprint(folder: Path, sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in sources:
        stat = file.stat()
        digest.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _checksum(tensors: list[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return checksum


def _write_atomically(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError):  # a read-only folder, a full disk: decode again next time
        with contextlib.suppress(OSError):
            temporary.unlink()


def _image_data(name: str, tensors: Sequence[Tensor], classes: tuple[str, ...]) -> ImageData:
    train_images, train_labels, test_images, test_labels = tensors
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        same_shape = images.shape[1:] == train_images.shape[1:] and len(images) == len(labels) > 0
        if not same_shape or not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(
                f"the files of {name!r} do not fit together: {tuple(images.shape)} images, "
                f"{len(labels)} labels, {len(classes)} classes. Delete them and load it again"
            )
    return ImageData(
        name,
        train_images.contiguous(),
        train_labels.long(),
        test_images.contiguous(),
        test_labels.long(),
        classes,
    )
