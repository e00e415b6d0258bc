"""The trained networks that come with the book: they load, and are what they are said to be."""

import base64
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from book import zoo as shelf
from defenses import attacks, evaluate, load_data, models, zoo
from defenses.batchout import BatchOut
from defenses.data import to_float
from defenses.prototype import Prototypes
from defenses.results import chapters_folder

NAMES = zoo.NAMES["mnist"]
every_network = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo that a test may break."""
    folder = tmp_path / "weights"
    shutil.copytree(zoo.FOLDER, folder)
    monkeypatch.setattr(zoo, "FOLDER", folder)
    return folder


@every_network
def test_network_reads_the_ten_digits(name: str) -> None:
    model, (images, labels) = models.pretrained(name), zoo.images("mnist")
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert evaluate(model, (images, labels)).percent == 100
    assert labels.tolist() == list(range(10))


def test_loading_draws_nothing_and_gives_each_its_own() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = models.pretrained("PGD"), models.pretrained("PGD")
    assert torch.equal(torch.rand(1), expected)
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).count_nonzero() > 0


def test_case_and_punctuation_of_a_name_do_not_count() -> None:
    assert zoo.path("compact + soft labels") == zoo.path("Compact, soft labels")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("TRADES", "mnist", "'TRADES'.*'compact, soft labels'"),
        ("images", "mnist", "'images'.*'PGD'"),
        ("PGD", "cifar10", "cifar10.*mnist"),
    ],
)
def test_unknown_network_names_those_there_are(name: str, data: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        models.pretrained(name, data)


def test_files_are_those_of_the_names_and_small() -> None:
    files = {zoo.path(name) for name in (*NAMES, "images")}
    assert files == set(zoo.FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 1.5e6


@pytest.mark.parametrize("at", [100, 60_000, -30])
def test_a_changed_byte_is_an_error(copy: Path, at: int) -> None:
    file = zoo.path("PGD")
    content = bytearray(file.read_bytes())
    content[at] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"mnist-pgd.npz is damaged"):
        models.pretrained("PGD")


def test_a_cut_off_or_missing_file_is_an_error(copy: Path) -> None:
    file = zoo.path("PGD")
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"mnist-pgd.npz is damaged"):
        models.pretrained("PGD")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"mnist-pgd.npz is not there"):
        models.pretrained("PGD")


def test_nothing_is_unpickled(copy: Path) -> None:
    np.savez(zoo.path("PGD"), allow_pickle=True, weight=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match="damaged"):
        models.pretrained("PGD")


def test_rounding_is_half_a_step_at_most(copy: Path) -> None:
    torch.manual_seed(0)
    large, small = torch.randn(200, 1000), torch.randn(20, 30)
    large[3] = 0
    state = {"large": large, "small": small, "bias": torch.randn(20)}
    np.savez(zoo.path("none"), **zoo.rounded(state))  # type: ignore[arg-type]
    back = zoo.weights("none")
    step = large.abs().amax(1, keepdim=True) / 127
    assert ((back["large"] - large).abs() <= 0.501 * step).all()
    assert torch.equal(back["small"], small.half().float())
    assert torch.equal(back["bias"], state["bias"])


def test_what_served_training_alone_is_left_out() -> None:
    torch.manual_seed(0)
    layers = [*models.mnist_fast()]
    layers[0] = nn.Sequential(layers[0], BatchOut(0.1))
    model = Prototypes(nn.Sequential(*layers), {"6": (nn.Identity(), 100)}).eval()
    row, x = shelf.in_a_row(model), torch.rand(5, 1, 28, 28)
    assert [type(layer) for layer in row] == [type(layer) for layer in models.mnist_fast()]
    assert torch.equal(row(x), model(x))


def test_script_holds_the_weights_and_the_stored_accuracies() -> None:
    text = shelf.script().removeprefix("globalThis.ZOO = ").rstrip(";\n")
    told, stored = json.loads(text)["networks"], shelf.stored()
    assert list(told) == list(NAMES)
    for name in NAMES:
        assert told[name]["accuracies"] == stored.loc[name].dropna().to_dict()
        packed = zoo.arrays(zoo.path(name))
        parts = [part for layer in told[name]["layers"] for part in layer.values()]
        found = [
            np.frombuffer(base64.b64decode(part["data"]), part["type"]).reshape(part["shape"])
            for part in parts
            if isinstance(part, dict)
        ]
        assert len(found) == len(packed)
        for array in packed.values():
            assert any(np.array_equal(array, other) for other in found)


# With the data.


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The images that the chapter attacks."""
    try:
        data = load_data("mnist")
    except (FileNotFoundError, RuntimeError, OSError):
        pytest.skip("no MNIST")
    return data.test_images[::20], data.test_labels[::20]


@every_network
def test_accuracy_is_the_stored_one(name: str, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Within a point, which is what another training of the same recipe may differ by."""
    file = chapters_folder("reevaluation") / "results" / "reevaluation.csv"
    rows = pd.read_csv(file, dtype={"seed": str})
    rows = rows[rows["protocol"].eq("short") & rows["dataset"].eq("mnist") & rows["seed"].eq("0")]
    rows = rows[rows["row"].eq(name) & rows["column"].eq("clean")]
    if rows.empty:
        pytest.skip("nobody has measured it yet")
    assert abs(evaluate(models.pretrained(name), digits).percent - rows["value"].item()) <= 1


def test_networks_differ_as_the_chapter_says(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    few = digits[0][::5], digits[1][::5]
    many = partial(attacks.pgd, eps=0.3, step_size=0.03, steps=20, seed=0)
    assert evaluate(models.pretrained("PGD"), few, many).percent > 80
    assert evaluate(models.pretrained("compact, soft labels"), few, many).percent < 10


def test_the_ten_digits_are_of_the_test_set(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = zoo.images()
    for image, label in zip(images, labels, strict=True):
        (found,) = (to_float(digits[0]) == to_float(image[None])).flatten(1).all(1).nonzero()
        assert digits[1][found] == label
