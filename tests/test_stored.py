"""Image folders on the disk: written once, whole or not at all, and read like those in memory."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from defenses import attacks, evaluation, stored
from defenses import data as data_module
from defenses.data import ImageData, batches, load_data, to_float
from defenses.training import fit

SIZE, SIDE = 16, 18


def folder_of_images(folder: Path, train: int = 22, test: int = 6) -> Path:
    """Images of two classes, each of another shape."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            file = folder / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shape = rng.integers(10, 50, 2)
            Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(file)
    return folder


def small_blocks() -> None:
    stored.BLOCK, stored.WINDOW = 4, 2


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK", 4)
    monkeypatch.setattr(stored, "WINDOW", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path / "toy")


def loaded(folder: Path, workers: int | None = None, **how: Any) -> ImageData:
    data = load_data(f"imagefolder:{folder}", resident=False, size=SIZE, **how)
    if workers is None:
        return data
    images: Any = data.train_images
    return dataclasses.replace(data, train_images=dataclasses.replace(images, workers=workers))


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.parent.rglob("*.blocks/*") if file.name != "lock")


def by_hand(file: Path) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
    return v2.CenterCrop(SIZE)(v2.Resize(SIDE, antialias=True)(pixels))


def test_each_image_is_there_once_with_its_label(folder: Path) -> None:
    data = loaded(folder)
    expected = {}
    for label, name in enumerate("ab"):
        for file in (folder / "train" / name).iterdir():
            expected[by_hand(file).numpy().tobytes()] = label
    assert data.train_images.shape == (22, 3, SIZE, SIZE)
    pairs = zip(data.train_images[:], data.train_labels, strict=True)
    found = {x.numpy().tobytes(): int(y) for x, y in pairs}
    assert found == expected
    assert data.classes == ("a", "b")
    assert "22 training and 6 test images of 3×16×16" in repr(data)


def test_an_index_gives_what_it_gives_of_a_tensor(folder: Path) -> None:
    images = loaded(folder).train_images
    whole = images[:]
    chosen = torch.tensor([20, 3, 3])
    assert torch.equal(images[chosen], whole[chosen])
    assert torch.equal(images[5], whole[5])
    assert torch.equal(images[-2:], whole[-2:])
    odd = torch.arange(22) % 2 == 1
    assert torch.equal(images[odd], whole[odd])


def test_a_large_folder_stays_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="let load_data cut them, with resident=False"):
        load_data(f"imagefolder:{folder}")
    monkeypatch.setattr(data_module, "LARGE", 1000)
    data = load_data(f"imagefolder:{folder}")
    assert isinstance(data.train_images, stored.Stored)
    assert data.train_images.shape == (22, 3, 224, 224)


def test_a_cache_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(folder, cache=tmp_path / "given")
    monkeypatch.setenv("DEFENSES_CACHE", str(tmp_path / "named"))
    loaded(folder)
    for place in ("given", "named"):
        assert len(list((tmp_path / place / f"toy.{SIDE}.blocks").glob("*.pt"))) == 6 + 2
    assert not list(folder.glob("*.blocks"))


def epoch(data: ImageData, seed: int = 0, batch_size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = batches(*data.train, batch_size, generator)
    x, y = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(y)


def test_an_epoch_is_a_permutation_that_mixes_blocks(folder: Path) -> None:
    images: Any = loaded(folder).train_images
    generator = torch.Generator().manual_seed(0)
    (first, one), (second, other) = images.order(generator), images.order(generator)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(22))
    assert first.tolist() != second.tolist() and one != other
    blocks = (first[:8] // 4).tolist()
    assert len(set(blocks)) == 2 and blocks != sorted(blocks)


def test_a_cut_depends_on_the_draw_and_the_image_alone(folder: Path) -> None:
    alone, ahead = (loaded(folder, workers) for workers in (0, 2))
    torch.manual_seed(3)
    x, y = epoch(alone)
    state = torch.get_rng_state()
    for data, size in ((ahead, 5), (alone, 7)):
        again = epoch(data, batch_size=size)
        assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = epoch(alone, seed=1)
    assert not torch.equal(other.sort(0).values, x.sort(0).values)


def test_a_share_is_cut_like_the_whole(folder: Path) -> None:
    data = loaded(folder, workers=0)
    draws = (torch.Generator().manual_seed(0) for _ in range(3))
    whole, *shares = (
        [x for x, _ in batches(*data.train, 6, draw, share)]
        for draw, share in zip(draws, ((0, 1), (0, 2), (1, 2)), strict=True)
    )
    for x, one, other in zip(whole, *shares, strict=True):
        assert torch.equal(x[0::2], one) and torch.equal(x[1::2], other)


def test_training_and_attacks_take_it_like_a_tensor(folder: Path) -> None:
    data = loaded(folder)
    middle = dataclasses.replace(
        data,
        test_images=data.test_images[:],
        train_images=dataclasses.replace(data.train_images, crop=v2.CenterCrop(SIZE)),  # type: ignore
    )
    attack = partial(attacks.pgd, eps=0.05, step_size=0.02, steps=2, seed=0)
    losses = []
    for one in (data, middle):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        losses += [fit(model, one, epochs=2, batch_size=8, progress=False)[-1]["loss"]]
    assert losses[0] != losses[1]  # one saw random parts
    for made in (None, attack):
        found = [evaluation.evaluate(model, d.test, made, batch_size=4) for d in (data, middle)]
        assert torch.equal(found[0].correct, found[1].correct)
    assert found[0].images != found[1].images


def test_what_is_written_is_written_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loaded(folder)
    monkeypatch.setattr(data_module, "_decode_one", _refused)
    again = loaded(folder)
    assert torch.equal(again.train_images[:], first.train_images[:])


def _refused(file: Path) -> Tensor:
    raise AssertionError(f"{file} is decoded again")


def test_only_what_has_changed_is_decoded_again(folder: Path) -> None:
    before = loaded(folder)
    names, digest = files(folder), evaluation.digest([before.train_images])
    file = folder / "train" / "a" / "0.png"
    Image.new("RGB", (30, 20), "red").save(file)
    after = loaded(folder)
    assert len(set(names) & set(files(folder))) == len(names) - 1 == len(files(folder)) - 1
    assert evaluation.digest([after.train_images]) != digest
    assert (to_float(after.train_images[:])[:, 1] == 0).all(dim=(1, 2)).sum() == 1


def test_a_corrupted_image_is_named_and_can_be_replaced(folder: Path) -> None:
    file = folder / "train" / "b" / "7.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b/7\.png cannot be decoded"):
        loaded(folder)
    file.write_bytes(whole)
    assert len(loaded(folder).train_images[:]) == 22


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*name another cache="):
        loaded(folder)
    assert files(folder) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from defenses import data, stored
from tests.test_stored import loaded, small_blocks

def decode(file, decode=data._decode_one):
    global count
    count += 1
    if count == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(file)

count = 0
small_blocks()
stored._processors = lambda: 0
data._decode_one = decode
loaded(Path(sys.argv[1]))
"""


def test_a_killed_conversion_is_gone_on_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", KILLED, str(folder)]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run(command, cwd=root, env=environment).returncode == -signal.SIGKILL
    done = files(folder)
    assert len(done) == 2
    place = folder / f"toy.{SIDE}.blocks"
    (place / "train-000003-0.pt.1.partial").write_bytes(b"half")
    decoded: list[Path] = []

    def counted(file: Path, decode: Any = data_module._decode_one) -> Tensor:
        decoded.append(file)
        return decode(file)

    monkeypatch.setattr(stored, "_processors", lambda: 0)
    monkeypatch.setattr(data_module, "_decode_one", counted)
    assert len(loaded(folder).train_images[:]) == 22
    assert len(decoded) == len(set(decoded)) == 22 + 6 - 8
    assert set(done) < set(files(folder))
    assert len(files(folder)) == 6 + 2
