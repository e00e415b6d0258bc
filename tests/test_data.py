"""Data sets in each real format, written small, and the batches drawn from them."""

import hashlib
import os
import pickle
import struct
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from torchvision.datasets import ImageFolder

from defenses import data as data_module
from defenses.data import batches, crop_and_flip, digest, gaussian_noise, load_data, to_float

RNG = np.random.default_rng(0)
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def random_bytes(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_idx(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    file.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, folder: str = "MNIST") -> dict[str, np.ndarray]:
    arrays = {}
    for part, n in (("train", 12), ("t10k", 7)):
        arrays[f"{part}-images-idx3-ubyte"] = random_bytes(n, 28, 28)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(n) % 10
    for name, array in arrays.items():
        write_idx(root / folder / "raw" / name, array)
    return arrays


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write pickle batches of 5 images and let torchvision know their MD5 sums."""
    source, classes = (datasets.CIFAR10, 10) if name == "cifar10" else (datasets.CIFAR100, 100)
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    content: dict[str, Any] = {
        file: {"data": random_bytes(5, 3072), key: RNG.integers(0, classes, 5).tolist()}
        for file, _ in [*source.train_list, *source.test_list]
    }
    content[source.meta["filename"]] = {source.meta["key"]: [f"c{i}" for i in range(classes)]}
    for file, entry in content.items():
        (folder / file).write_bytes(pickle.dumps(entry))
    for part in ("train_list", "test_list"):
        sums = [[file, md5(folder / file)] for file, _ in getattr(source, part)]
        monkeypatch.setattr(source, part, sums)
    meta_file = folder / source.meta["filename"]
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5(meta_file)})
    return content


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    from scipy.io import savemat

    images, split_list = {}, dict(datasets.SVHN.split_list)
    for split in ("train", "test"):
        url, name, _ = split_list[split]
        images[split] = random_bytes(32, 32, 3, 10)
        savemat(root / name, {"X": images[split], "y": np.arange(1, 11)[:, None]})
        split_list[split] = [url, name, md5(root / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return images


def write_folder(
    folder: Path, classes: int = 2, size: tuple[int, int] = (6, 5), mode: str = "RGB", n: int = 3
) -> dict[str, list[np.ndarray]]:
    """Write n PNG images a class and split; return them in the order in which they are loaded."""
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for split in images:
        for c in range(classes):
            (folder / split / f"class{c:04}").mkdir(parents=True)
            for i in range(n):
                pixels = random_bytes(*size, 3) if mode == "RGB" else random_bytes(*size)
                Image.fromarray(pixels).save(folder / split / f"class{c:04}" / f"{i}.png")
                images[split].append(pixels)
    return images


def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise OSError("the network is down")

    for source in (datasets.MNIST, datasets.CIFAR10, datasets.SVHN):
        monkeypatch.setattr(source, "download", fail)


def flip_a_byte(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)


class Boom:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


# The formats


def test_digits_are_scikit_learns_images_enlarged_and_split_by_label() -> None:
    from sklearn.datasets import load_digits

    data, digits = load_data("digits"), load_digits()
    assert data.train_images.shape == (1437, 1, 28, 28) and data.test_images.shape == (
        360,
        1,
        28,
        28,
    )
    images = torch.cat([data.train_images, data.test_images])[:, 0]
    inside, small = images[:, 2:-2, 2:-2], images[:, 3:-2:3, 3:-2:3]
    assert images.sum() == inside.sum()  # the padding is black
    assert torch.equal(inside, small.repeat_interleave(3, 1).repeat_interleave(3, 2))
    labels = torch.cat([data.train_labels, data.test_labels])
    got = {
        (int(y), tuple((x.double() / 255 * 16).round().int().flatten().tolist()))
        for x, y in zip(small, labels, strict=True)
    }
    expected = {
        (int(y), tuple(int(v) for v in x)) for x, y in zip(digits.data, digits.target, strict=True)
    }
    assert got == expected  # no image lost, none in both parts
    share = data.test_labels.bincount() / labels.bincount()
    assert ((share - 0.2).abs() < 0.01).all()
    assert torch.equal(load_data("digits").test_images, data.test_images)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files(tmp_path: Path, name: str, folder: str) -> None:
    arrays = write_mnist(tmp_path, folder)
    data = load_data(name, tmp_path)
    assert data.name == name and len(data.classes) == 10
    for part, images, labels in (("train", *data.train), ("t10k", *data.test)):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        np.testing.assert_array_equal(images[:, 0], arrays[f"{part}-images-idx3-ubyte"])
        np.testing.assert_array_equal(labels, arrays[f"{part}-labels-idx1-ubyte"])


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int
) -> None:
    content = write_cifar(tmp_path, name, monkeypatch)
    data = load_data(name, tmp_path)
    files = [file for file in content if "meta" not in file]
    key = "labels" if classes == 10 else "fine_labels"
    assert data.classes == tuple(f"c{i}" for i in range(classes))
    for (images, labels), part in ((data.train, files[:-1]), (data.test, files[-1:])):
        expected = np.concatenate([content[file]["data"] for file in part]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(images, expected)
        assert labels.tolist() == [y for file in part for y in content[file][key]]
        assert images.is_contiguous() and labels.dtype == torch.int64


def test_svhn_mat_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_svhn(tmp_path, monkeypatch)
    data = load_data("svhn", tmp_path)
    for split, (images, labels) in (("train", data.train), ("test", data.test)):
        np.testing.assert_array_equal(images, arrays[split].transpose(3, 2, 0, 1))
        assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
        assert images.is_contiguous()


@pytest.mark.parametrize("classes, n", [(2, 3), (1000, 1)])
def test_image_folder_in_color(tmp_path: Path, classes: int, n: int) -> None:
    written = write_folder(tmp_path / "toy", classes, size=(3, 4), n=n)
    data = load_data("imagefolder:toy", tmp_path)
    assert data.name == "toy" and len(data.classes) == classes
    for split, (images, labels) in (("train", data.train), ("test", data.test)):
        np.testing.assert_array_equal(images, np.stack(written[split]).transpose(0, 3, 1, 2))
        assert labels.tolist() == [c for c in range(classes) for _ in range(n)]


def test_image_folder_in_grey_has_one_channel(tmp_path: Path) -> None:
    written = write_folder(tmp_path / "toy", mode="L")
    data = load_data(f"imagefolder:{tmp_path / 'toy'}")
    np.testing.assert_array_equal(data.train_images[:, 0], np.stack(written["train"]))
    assert data.train_images.shape == (6, 1, 6, 5)


HIDDEN = (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir")


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("place", ["train", "test", "train/class0000", "test/class0001/more"])
def test_hidden_folders_are_no_classes_and_their_pictures_no_images(
    tmp_path: Path, place: str, hidden: str
) -> None:
    written = write_folder(tmp_path / "toy")
    for folder in (hidden, f"{hidden}/class0000"):
        (tmp_path / "toy" / place / folder).mkdir(parents=True)
        for name in ("0.png", "z.jpg"):
            Image.fromarray(random_bytes(6, 5, 3)).save(tmp_path / "toy" / place / folder / name)
    data = load_data("imagefolder:toy", tmp_path)
    assert data.classes == ("class0000", "class0001")
    for split, (images, labels) in (("train", data.train), ("test", data.test)):
        np.testing.assert_array_equal(images, np.stack(written[split]).transpose(0, 3, 1, 2))
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    """Such as those that macOS writes beside each picture on a disk of another system."""
    written = write_folder(tmp_path / "toy")
    for name in ("._0.png", ".hidden.jpg"):
        (tmp_path / "toy" / "train" / "class0000" / name).write_bytes(b"no picture")
    (tmp_path / "toy" / "train" / ".DS_Store").write_bytes(b"")
    images = load_data("imagefolder:toy", tmp_path).train_images
    np.testing.assert_array_equal(images, np.stack(written["train"]).transpose(0, 3, 1, 2))


def test_pictures_in_folders_below_a_class_come_in_the_order_of_their_paths(
    tmp_path: Path,
) -> None:
    """As torchvision lists them, by whose order a set that was decoded before is known."""
    write_folder(tmp_path / "toy")
    for place in ("a", "a-b", "a/x", "B"):
        (tmp_path / "toy/train/class0000" / place).mkdir(exist_ok=True)
        Image.fromarray(random_bytes(6, 5, 3)).save(
            tmp_path / "toy/train/class0000" / place / "1.png"
        )
    data = load_data("imagefolder:toy", tmp_path)
    listed = ImageFolder(tmp_path / "toy" / "train").samples
    assert [label for _, label in listed] == data.train_labels.tolist()
    for (file, _), image in zip(listed, data.train_images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)).transpose(2, 0, 1), image)


def test_a_class_without_an_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "toy")
    for split in ("train", "test"):
        (tmp_path / "toy" / split / "nothing" / ".ipynb_checkpoints").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"train.nothing holds no image.*each one is a class"
    ):
        load_data("imagefolder:toy", tmp_path)


def test_a_grey_image_among_color_ones_gets_three_channels(tmp_path: Path) -> None:
    write_folder(tmp_path)
    grey = random_bytes(6, 5)
    Image.fromarray(grey).save(tmp_path / "train" / "class0000" / "0.png")
    data = load_data(f"imagefolder:{tmp_path}")
    np.testing.assert_array_equal(data.train_images[0], np.stack([grey] * 3))


def test_jpeg_is_decoded_as_pillow_does_and_the_short_name_finds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10-jpeg"
    write_folder(folder, size=(32, 32), n=1)
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    for name in ("train/class0000/a.jpg", "test/class0001/a.JPEG"):
        Image.fromarray(smooth).save(folder / name, format="jpeg")
    data = load_data("cifar10-jpeg", tmp_path)
    with Image.open(folder / "train/class0000/a.jpg") as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(data.train_images[1], expected)
    assert data.name == "cifar10-jpeg" and len(data.test_labels) == 3


@pytest.mark.skipif("DEFENSES_DATA" not in os.environ, reason="DEFENSES_DATA names no data")
def test_real_mnist_is_the_original() -> None:
    raw = Path(os.environ["DEFENSES_DATA"]) / "MNIST" / "raw"
    if not raw.is_dir():
        pytest.skip(f"{raw} is not there")
    assert {name: md5(raw / name) for name in MNIST_MD5} == MNIST_MD5
    data = load_data("mnist")
    assert data.train_images.shape == (60000, 1, 28, 28) and len(data.test_labels) == 10000
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]


# What is missing or corrupted


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'minst'.*digits, mnist, fashion-mnist.*imagefolder:PATH"
    ):
        load_data("minst")
    with pytest.raises(ValueError, match="imagefolder:PATH"):
        load_data("imagefolder:")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_a_failed_download_names_data_set_folder_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    no_download(monkeypatch)
    with pytest.raises(FileNotFoundError, match=f"'{name}'.*{tmp_path}.*network.*DEFENSES_DATA"):
        load_data(name, tmp_path)


def test_missing_files_are_downloaded_and_present_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(self: Any) -> None:
        asked.append(self)
        write_mnist(Path(self.root))

    monkeypatch.setattr(datasets.MNIST, "download", download)
    first = load_data("mnist", tmp_path)
    assert asked and len(first.train_labels) == 12
    asked.clear()
    load_data("mnist", tmp_path)
    assert not asked


@pytest.mark.parametrize("name", list(MNIST_MD5))
@pytest.mark.parametrize("damage", ["truncated", "too long", "magic", "empty", "dimensions"])
def test_a_damaged_idx_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / name
    content = file.read_bytes()
    changed = {
        "truncated": content[:-1],
        "too long": content + b"\0",
        "magic": b"\x12\x34\x56\x78" + content[4:],
        "empty": b"",
        "dimensions": struct.pack(">III", 0x802, 1, len(content)) + content,
    }
    file.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=f"{name} is corrupted.*Delete it"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize("labels", [np.arange(11) % 10, np.full(12, 10)], ids=["too few", "range"])
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", labels)
    with pytest.raises(ValueError, match="do not fit together"):
        load_data("mnist", tmp_path)


def test_a_damaged_cifar_batch_is_named_and_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    file, proof = tmp_path / "cifar-10-batches-py" / "data_batch_3", tmp_path / "unpickled"
    file.write_bytes(pickle.dumps(Boom(proof)))
    with pytest.raises(ValueError, match=r"data_batch_3 is corrupted.*MD5.*Delete it"):
        load_data("cifar10", tmp_path)
    assert not proof.exists()
    pickle.loads(file.read_bytes())
    assert proof.exists()  # so the file would have done harm


def test_a_damaged_svhn_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    flip_a_byte(tmp_path / "test_32x32.mat", 200)
    with pytest.raises(ValueError, match=r"test_32x32\.mat is corrupted.*Delete it"):
        load_data("svhn", tmp_path)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    file = tmp_path / "test" / "class0001" / "cut.jpg"
    Image.fromarray(random_bytes(6, 5, 3)).save(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be decoded.*Replace"):
        load_data(f"imagefolder:{tmp_path}")


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.fromarray(random_bytes(7, 5, 3)).save(tmp_path / "test" / "class0000" / "tall.png")
    with pytest.raises(ValueError, match=r"tall\.png is 7×5.*6×5"):
        load_data(f"imagefolder:{tmp_path}")


def test_an_image_of_16_bits_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    deep = Image.fromarray(np.full((6, 5), 40000, dtype=np.uint16))
    deep.save(tmp_path / "train" / "class0000" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        load_data(f"imagefolder:{tmp_path}")


def test_differing_classes_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "test" / "class0001").rename(tmp_path / "test" / "other")
    with pytest.raises(ValueError, match=r"same classes.*'class0001', 'other'"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_folder_without_the_layout_says_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train is not there.*CLASS.*DEFENSES_DATA"):
        load_data("imagefolder:nowhere", tmp_path)


def test_the_root_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path)
    no_download(monkeypatch)
    monkeypatch.setenv("DEFENSES_DATA", str(tmp_path))
    assert len(load_data("mnist").train_labels) == 12
    with pytest.raises(FileNotFoundError):
        load_data("mnist", tmp_path / "elsewhere")  # the argument goes before the environment


# Decoded once


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the files that are decoded from now on."""
    files: list[str] = []
    decode = data_module._decode_one

    def note(file: Path) -> torch.Tensor:
        files.append(file.name)
        return decode(file)

    monkeypatch.setattr(data_module, "_decode_one", note)
    return files


def test_images_are_decoded_once_and_again_when_a_file_changes(
    tmp_path: Path, decoded: list[str]
) -> None:
    write_folder(tmp_path)
    first = load_data(f"imagefolder:{tmp_path}")
    assert len(decoded) == 12
    second = load_data(f"imagefolder:{tmp_path}")
    assert len(decoded) == 12 and second.classes == first.classes and second.name == first.name
    for a, b in zip(first.train + first.test, second.train + second.test, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    new = random_bytes(6, 5, 3)
    Image.fromarray(new).save(tmp_path / "train" / "class0000" / "0.png")
    third = load_data(f"imagefolder:{tmp_path}")
    assert len(decoded) == 24
    np.testing.assert_array_equal(third.train_images[0], new.transpose(2, 0, 1))


def test_an_image_moved_to_another_class_is_noticed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    before = load_data(f"imagefolder:{tmp_path}")
    last = tmp_path / "train" / "class0000" / "2.png"
    last.rename(tmp_path / "train" / "class0001" / "-.png")  # the first: sizes and dates stay put
    after = load_data(f"imagefolder:{tmp_path}")
    assert before.train_labels.sum() == 3 and after.train_labels.sum() == 4


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated", "flipped", "foreign pickle"])
def test_a_corrupted_cache_is_rebuilt_with_a_warning(
    tmp_path: Path, decoded: list[str], damage: str
) -> None:
    folder, proof = tmp_path / "toy", tmp_path / "unpickled"
    write_folder(folder, size=(64, 64))
    first = load_data("imagefolder:toy", tmp_path)
    kept = folder / "toy.uint8.pt"
    if damage == "flipped":
        flip_a_byte(kept, kept.stat().st_size // 2)
    elif damage == "foreign pickle":
        torch.save({"fingerprint": Boom(proof)}, kept)
    else:
        content = {"garbage": b"no cache", "empty": b"", "truncated": kept.read_bytes()[:-100]}
        kept.write_bytes(content[damage])
    with pytest.warns(UserWarning, match=r"toy\.uint8\.pt is corrupted and is rebuilt"):
        again = load_data("imagefolder:toy", tmp_path)
    assert len(decoded) == 24 and not proof.exists()
    assert torch.equal(again.train_images, first.train_images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data("imagefolder:toy", tmp_path)
    assert len(decoded) == 24 and [f.name for f in folder.iterdir() if f.is_file()] == [kept.name]


def test_a_read_only_folder_only_costs_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(data_module.os, "replace", refuse)
    write_folder(tmp_path)
    for _ in range(2):
        assert len(load_data(f"imagefolder:{tmp_path}").train_labels) == 6
    assert len(decoded) == 24 and not [f for f in tmp_path.iterdir() if f.is_file()]


def test_cifar_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    first = load_data("cifar10", tmp_path)
    monkeypatch.setattr(data_module, "check_integrity", lambda *_: pytest.fail("read again"))
    assert torch.equal(load_data("cifar10", tmp_path).train_images, first.train_images)


# Batches


def test_image_data_moves_whole_and_prints_in_a_line() -> None:
    data = load_data("digits")
    moved = data.to("meta")
    assert {t.device.type for t in moved.train + moved.test} == {"meta"}
    assert load_data("digits", device="meta").test_labels.device.type == "meta"
    assert repr(data) == (
        "ImageData(digits: 1,437 training and 360 test images of 1×28×28, 10 classes, on cpu)"
    )


def test_to_float_maps_bytes_onto_the_unit_interval() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8)
    x = to_float(images)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, images.float() / 255) and x.max() == 1
    assert images[0, 3, 7, 7] == 255  # the source is left alone
    assert torch.equal(to_float(x.double()), x)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 4, 4, dtype=torch.int64),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
        torch.full((2, 1, 4, 4), 1.01),
        torch.full((2, 1, 4, 4), -0.01),
        torch.full((2, 1, 4, 4), float("nan")),
    ],
    ids=["int64", "3 dimensions", "above 1", "below 0", "nan"],
)
def test_to_float_refuses_what_is_no_image(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected images|must lie in"):
        to_float(images)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(0, 40), batch_size=st.integers(1, 50), seed=st.none() | st.integers(0, 2**32))
def test_batches_hold_every_image_once_with_its_label(
    n: int, batch_size: int, seed: int | None
) -> None:
    labels = torch.arange(n)
    images = labels.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2)

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return list(batches(images, labels, batch_size, generator))

    got = run()
    sizes = [len(y) for _, y in got]
    assert sizes == [batch_size] * (n // batch_size) + ([n % batch_size] if n % batch_size else [])
    seen = torch.cat([y for _, y in got]) if got else labels
    assert torch.equal(seen.sort().values, labels)
    assert seed is not None or torch.equal(seen, labels)
    for (x, y), (x_again, y_again) in zip(got, run(), strict=True):
        assert torch.equal(x[:, 0, 0, 0], y.float() / 255)
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


def test_a_generator_gives_each_epoch_its_own_order() -> None:
    images, labels = torch.zeros(100, 1, 1, 1, dtype=torch.uint8), torch.arange(100)
    generator = torch.Generator().manual_seed(0)
    first, second = (next(batches(images, labels, 100, generator))[1] for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first, labels)


def test_batches_refuse_labels_that_do_not_fit() -> None:
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got 3 and 2"):
        batches(images, torch.arange(2), 2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(images, torch.arange(3), 0)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 6),
    size=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_crop_and_flip_returns_windows(
    n: int, size: tuple[int, int, int], padding: int, seed: int
) -> None:
    c, h, w = size
    x = torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed))
    got = crop_and_flip(x, torch.Generator().manual_seed(seed), padding)
    assert got.shape == x.shape and got.dtype == x.dtype
    windows = F.pad(x, (padding,) * 4).unfold(2, h, 1).unfold(3, w, 1)
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    windows = torch.cat([windows, windows.flip(-1)], dim=1)
    assert (windows == got[:, None]).flatten(2).all(2).any(1).all()
    assert torch.equal(got, crop_and_flip(x, torch.Generator().manual_seed(seed), padding))


def test_crop_and_flip_reaches_every_window_and_draws_for_each_image() -> None:
    x = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(5000, 1, 3, 3)
    got = crop_and_flip(x, torch.Generator().manual_seed(0), padding=1).flatten(1)
    kinds, counts = got.unique(dim=0, return_counts=True)
    assert len(kinds) == 2 * 3 * 3
    assert counts.min() > 200 and counts.max() < 360  # 278 expected, standard deviation 16
    assert len(crop_and_flip(x, torch.Generator(), padding=0).unique(dim=0)) == 2
    with pytest.raises(ValueError, match="padding must not be negative"):
        crop_and_flip(x, torch.Generator(), padding=-1)


@given(st.integers(0, 2**32 - 1), st.floats(0, 2))
def test_noise_stays_in_range_and_repeats(seed: int, sigma: float) -> None:
    x = torch.rand(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    noisy = gaussian_noise(x, torch.Generator().manual_seed(seed), sigma)
    again = gaussian_noise(x, torch.Generator().manual_seed(seed), sigma)
    assert torch.equal(noisy, again) and torch.equal(x, before)
    assert noisy.min() >= 0 and noisy.max() <= 1 and noisy.dtype == x.dtype
    assert noisy.is_contiguous(memory_format=torch.channels_last)
    if sigma == 0:
        assert torch.equal(noisy, x)


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    gray = torch.full((20, 1, 50, 50), 0.5)
    noise = gaussian_noise(gray, torch.Generator().manual_seed(0), 0.1) - gray
    assert len(noise.flatten(1).unique(dim=0)) == 20  # each image has its own
    assert noise.mean().abs() < 2e-3 and noise.std() == pytest.approx(0.1, rel=0.02)
    cut = gaussian_noise(gray, torch.Generator().manual_seed(0))  # 0.5: a third is cut off
    assert ((cut == 0) | (cut == 1)).float().mean() == pytest.approx(0.3173, abs=0.01)


@pytest.mark.parametrize("sigma", [-0.1, float("nan")])
def test_noise_of_negative_size_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must not be negative"):
        gaussian_noise(torch.zeros(1, 1, 2, 2), torch.Generator(), sigma)


def test_a_digest_reads_the_images_where_they_lie() -> None:
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    tracemalloc.start()
    name = digest([images])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.numel() / 10
    assert name == digest([images.to(memory_format=torch.channels_last)])
    assert name != digest([images + 1])
