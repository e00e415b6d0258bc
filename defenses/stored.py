"""Image folders that are larger than the memory: decoded once into files, read block by block.

PyTorch writes the files and maps them into memory, torchvision's transforms cut the images, and a
`DataLoader` has worker processes do either. WebDataset, LitData and DALI would decode every image
in every epoch; ffcv, which does not, has had no release since 2023.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from defenses.checkpoint import save

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BLOCK = 256  # images in a file
WINDOW = 8  # files whose images are shuffled together
CPU = torch.device("cpu")
Cut = Callable[[Tensor], Tensor]
Part = Tensor | slice


@dataclass(frozen=True, eq=False)
class Stored:
    """Images in files, which stand for a uint8 tensor (count, 3, size, size) on `device`.

    An index reads the middle of each image into such a tensor. `defenses.data.batches` with a
    generator cuts each image anew at random, which depends on the draw and on the image, not on
    the batch, the workers or the other images.

    Attributes
    ----------
    files : tuple of path
        Each with `BLOCK` images, the last perhaps with fewer, in an order drawn once.
    identity : str
        Of the images' names and sizes: what `defenses.data.digest` takes for their pixels.
    crop, middle : callable
        From an image as it is stored, uint8 (3, H, W), to (3, size, size); ``crop`` may draw from
        torch's own generator. Others can be put in by `dataclasses.replace`.
    workers : int
        Processes that read ahead of the device; 0 reads in this one.
    """

    files: tuple[Path, ...]
    count: int
    size: int
    identity: str
    crop: Cut
    middle: Cut
    workers: int
    device: torch.device = CPU
    dtype = torch.uint8
    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, 3, self.size, self.size))

    def __len__(self) -> int:
        return self.count

    def to(self, device: torch.device | str) -> Stored:
        """The same images, whose batches arrive on `device`."""
        return replace(self, device=torch.device(device))

    def __getitem__(self, part: Any) -> Tensor:
        part = part.cpu() if isinstance(part, Tensor) else part
        chosen = torch.arange(self.count)[part]
        images = self.cut(chosen.reshape(-1), None)
        return images.view(*chosen.shape, *self.shape[1:]).to(self.device)

    def order(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """A permutation that mixes `WINDOW` files at a time, and a seed for the cuts."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        own = torch.Generator().manual_seed(seed)
        blocks = torch.arange(self.count).split(BLOCK)
        order = []
        for window in torch.randperm(len(blocks), generator=own).split(WINDOW):
            near = torch.cat([blocks[block] for block in window.tolist()])
            order.append(near[torch.randperm(len(near), generator=own)])
        return torch.cat(order), seed

    def read(self, parts: Sequence[Part], seed: int | None = None) -> Iterator[Tensor]:
        """The images of each part on the device; workers prepare the next ones meanwhile."""
        reader = DataLoader(
            _Parts(self, parts, seed),
            batch_size=None,
            num_workers=min(self.workers, len(parts)),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # not torch's own, of which a model's draws depend
        )
        return (images.to(self.device, non_blocking=True) for images in reader)

    def cut(self, chosen: Tensor, seed: int | None) -> Tensor:
        """Images (n, 3, size, size) on the CPU, cut at random where there is a seed."""
        images = torch.empty(len(chosen), *self.shape[1:], dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):
            for place, index in enumerate(chosen.tolist()):
                pixels, shapes, ends = _mapped(self.files[index // BLOCK])
                (h, w), end = shapes[index % BLOCK], ends[index % BLOCK]
                image = pixels[end - 3 * h * w : end].view(h, w, 3).permute(2, 0, 1)
                if seed is None:
                    images[place] = self.middle(image)
                else:  # the engine takes 32 bits; the factor keeps seeds apart
                    own = (seed * 2_654_435_761 + index) % 2**32
                    torch.random.default_generator.manual_seed(own)
                    images[place] = self.crop(image)
        return images


def store(
    files: Sequence[Path], folder: Path, split: str, size: int, decode: Callable[[Path], Tensor]
) -> tuple[Stored, Tensor]:
    """Decode `files` into `folder`, as far as that is not done; the order in which they are there.

    The shorter side of an image becomes 8/7 of `size`, as 256 is of 224: the usual middle for
    testing is cut from that, and so is every crop to train on. Each file of images is written under
    another name and renamed when it is whole, so what a kill or a full disk leaves is gone on from.
    Its name holds the names, sizes and dates of its images: what changes is decoded again.

    Raises
    ------
    ValueError
        If an image cannot be decoded; it is named.
    OSError
        If the folder cannot be written to.
    """
    from torchvision.transforms import v2  # takes a second to import

    side = round(size * 8 / 7)
    folder = folder.with_name(f"{folder.name}.{side}.blocks")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    blocks, names = {}, ""
    for place, chosen in enumerate(order.split(BLOCK)):
        images = [files[i] for i in chosen.tolist()]
        stats = [(f"{file.parent.name}/{file.name}", file.stat()) for file in images]
        dated = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats)
        names += "".join(f"{name} {stat.st_size}\n" for name, stat in stats)
        mark = hashlib.sha256(dated.encode()).hexdigest()[:12]
        blocks[folder / f"{split}-{place:06d}-{mark}.pt"] = images
    workers = _processors()
    if not all(block.is_file() for block in blocks):
        with _alone(folder):
            for partial in folder.glob(f"{split}-*.partial"):
                partial.unlink()  # left by a kill
            missing = [(block, images) for block, images in blocks.items() if not block.is_file()]
            work = _Blocks(missing, v2.Resize(side, antialias=True), decode)
            done = DataLoader(work, batch_size=None, num_workers=min(workers, len(missing)))
            count = sum(len(images) for _, images in missing)
            with tqdm(None, folder.name, count, unit=" images", disable=not missing) as bar:
                for (_, images), error in zip(missing, done, strict=True):
                    if error is not None:
                        raise error
                    bar.update(len(images))
            for old in set(folder.glob(f"{split}-*.pt")) - blocks.keys():
                old.unlink()
    crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    identity = f"{side} {zlib.crc32(names.encode()):08x}"
    cuts = crop, v2.CenterCrop(size), workers
    return Stored(tuple(blocks), len(files), size, identity, *cuts), order


@dataclass
class _Parts(Dataset[Tensor]):
    images: Stored
    parts: Sequence[Part]
    seed: int | None

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> Tensor:
        part = self.parts[k]
        chosen = torch.arange(self.images.count)[part] if isinstance(part, slice) else part
        return self.images.cut(chosen, self.seed)


@dataclass
class _Blocks(Dataset[Exception | None]):
    missing: list[tuple[Path, list[Path]]]
    resize: Cut
    decode: Callable[[Path], Tensor]

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, k: int) -> Exception | None:
        block, files = self.missing[k]
        try:
            images = [self.resize(self.decode(file)).permute(1, 2, 0) for file in files]
            shapes = torch.tensor([image.shape[:2] for image in images])
            save(block, {"pixels": torch.cat([i.reshape(-1) for i in images]), "shapes": shapes})
        except ValueError as error:
            return error
        except (OSError, RuntimeError) as error:  # a full disk is either to PyTorch
            return OSError(f"{block.parent} cannot be written to ({error}): name another cache=")
        return None


@functools.lru_cache(maxsize=WINDOW)
def _mapped(file: Path) -> tuple[Tensor, list[list[int]], list[int]]:
    """The pixels of a file, which stay on the disk until they are looked at; shapes; ends."""
    content = torch.load(file, mmap=True, weights_only=True)
    shapes = content["shapes"]
    return content["pixels"], shapes.tolist(), (3 * shapes.prod(1)).cumsum(0).tolist()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with its process
        yield


def _processors() -> int:
    """Those that a process of `torchrun`, or this one alone, may take for its workers."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return max(1, len(allowed(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
