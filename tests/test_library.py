"""The module as a library: installed elsewhere, documented, and kind to those who guess."""

import doctest
import importlib
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import defenses
from defenses import attacks
from defenses.attacks.autoattack import autoattack_report
from defenses.diagnostics import zero_gradient_share
from defenses.jacobian import jacobian_penalty
from defenses.training import label_smoothing

ROOT = Path(__file__).resolve().parent.parent
DATA = defenses.load_data("digits")
x, y = DATA.test_images[:4] / 255, DATA.test_labels[:4]
labeled: Any = TensorDataset(x, y)

# Untyped: what a type checker would refuse is what is tried here.
evaluate: Any = defenses.evaluate
fit: Any = defenses.fit
autoattack: Any = attacks.autoattack
weak: Any = partial(attacks.pgd, eps=0.1, step_size=0.05, steps=2)


class Fixed(nn.Module):
    """Ten logits, linear in the images, the same for every caller."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(784, 10, generator=draw))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x.flatten(1) @ self.weight)


# Installed.


@pytest.mark.slow
def test_the_installed_package_works_outside_the_clone(tmp_path: Path) -> None:
    """Built as `pip install` from the repository does, from a copy: a build leaves files behind."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "defenses", source / "defenses")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, *build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"defenses-{defenses.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA")))
    for name in ("Repository", "Issues", "Changelog"):
        assert f"Project-URL: {name}, https://github.com/" in metadata.decode()
    assert (tmp_path / "site" / "defenses" / "py.typed").exists()
    code = """
import defenses, torch
print(defenses.__file__)
data, model = defenses.load_data("digits"), defenses.models.mnist_fast()
defenses.fit(model, data, epochs=1, progress=False)
print(defenses.evaluate(model, data.test))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site" / "defenses")) and "n=360" in done.stdout


# Documented.

EXAMPLES: dict[str, tuple[str, ...]] = {
    "data": ("load_data",),
    "training": ("fit", "label_smoothing"),
    "evaluation": ("evaluate",),
    "attacks.gradient": ("fgsm", "pgd"),
    "attacks.autoattack": ("autoattack",),
    "adversarial": ("adversarial", "trades"),
    "jacobian": ("jacobian_penalty",),
    "compact": ("CompactConv2d",),
    "batchout": ("BatchOut",),
    "prototype": ("Prototypes",),
    "denoising": ("Denoise",),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"defenses.{name}")
    found = {test.name.split(".")[-1]: test for test in doctest.DocTestFinder().find(module)}
    with torch.random.fork_rng():
        for function in EXAMPLES[name]:
            assert found[function].examples, f"{function} has no example"
        for test in found.values():
            torch.manual_seed(0)
            assert doctest.DocTestRunner().run(test).failed == 0


def test_help_shows_the_options_of_autoattack() -> None:
    ours, report = map(inspect.signature, (attacks.autoattack, autoattack_report))
    assert ours.parameters == report.parameters
    assert "version: str = 'standard'" in pydoc.render_doc(attacks.autoattack)


def test_every_public_function_is_in_the_reference() -> None:
    page = (ROOT / "book" / "api.md").read_text()
    listed = set(re.findall(r"^\.\. auto(?:function|class):: (?:[\w.]+\.)?(\w+)", page, re.M))
    public = (*attacks.__all__, *(name for name in defenses.__all__ if name[0] != "_"))
    assert set(public) - {"attacks", "models"} - listed == set()
    tabled = set(re.findall(r"^   ~?(?:[\w.]+\.)?(\w+)$", page, re.M))
    assert listed - tabled == {"Report"}, "not in a table above"


def test_the_attacks_that_the_page_recommends_exist() -> None:
    page = (ROOT / "book" / "api.md").read_text()
    table = page.split("## Which attack, when")[1].split("## ")[0]
    names = set(re.findall(r"`(\w+)(?:\(.*?\))?`", table)) - {"early_stop"}
    assert len(names) > 8 and names <= set(attacks.__all__), names - set(attacks.__all__)


# The sharp edges, as the page tells them.


def test_edge_rounding_stops_the_textbook_loss_only() -> None:
    loud = Fixed(lambda z: 1e3 * z)
    y = loud(x).argmax(dim=1)  # right by hundreds
    textbook = attacks.fgsm(loud, x, y, eps=0.1, loss="ce_textbook")
    assert torch.equal(textbook, x) and not torch.equal(attacks.fgsm(loud, x, y, eps=0.1), x)
    assert zero_gradient_share(loud, (x, y)).images == 1


def test_edge_a_flat_gradient_is_no_error_and_a_missing_one_is() -> None:
    flat = nn.Sequential(Rounding(), Fixed())
    assert zero_gradient_share(flat, (x, y), "ce").images == 1
    missing = Fixed(torch.Tensor.detach)
    with pytest.raises(ValueError, match="do not depend on the images"):
        attacks.fgsm(missing, x, y, eps=0.1)


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


def test_edge_modes_are_given_back() -> None:
    model = nn.Sequential(Fixed(), nn.Dropout(0.9)).train()
    assert float(evaluate(model, (x, y))) == float(evaluate(model, (x, y)))
    assert model.training and model[1].training


def test_edge_a_start_belongs_to_a_place_in_the_batch() -> None:
    model = Fixed(lambda z: 0 * z)  # nothing to climb: images stay where they start
    run = partial(weak, model, seed=0, early_stop=False)
    whole, turned = run(x, y), run(x.flip(0), y.flip(0)).flip(0)
    assert torch.equal(run(x, y), whole) and not torch.equal(turned, whole)
    still = partial(weak, Fixed(), random_start=False)
    assert torch.equal(still(x, y), still(x.flip(0), y.flip(0)).flip(0))


def test_edge_misread_images() -> None:
    model = Fixed()
    wrong = (model(x).argmax(dim=1) + 1) % 10
    assert torch.equal(weak(model, x, wrong), x)
    assert not torch.equal(attacks.fgsm(model, x, wrong, eps=0.1), x)


def test_edge_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        evaluate(Fixed(lambda z: z / 0 * 0), (x, y))


# Small things that users do: what they are told.

cut = Fixed()
one_epoch = partial(fit, cut, epochs=1, progress=False)
TOLD: dict[str, tuple[Callable[[], Any], str]] = {
    "a data loader": (lambda: evaluate(cut, DataLoader(labeled)), r"zip\(\*loader\)"),
    "the data": (lambda: evaluate(cut, DATA), r"data\.test"),
    "images alone": (lambda: evaluate(cut, x), r"pair \(images, labels\)"),
    "numpy images": (lambda: evaluate(cut, (x.numpy(), y)), r"torch\.as_tensor\(images\)"),
    "numpy labels": (lambda: evaluate(cut, (x, y.numpy())), r"torch\.as_tensor\(labels\)"),
    "int32": (lambda: evaluate(cut, (x, y.int())), "dtype=torch.int64"),
    "no images": (lambda: evaluate(cut, (x[:0], y[:0])), "the split is empty"),
    "a tuple": (lambda: evaluate(Fixed(lambda z: (z, z)), (x, y)), "returns them alone"),
    "a function": (lambda: evaluate(lambda x: x, (x, y)), "wrap the function"),
    "an attack's name": (lambda: evaluate(cut, (x, y), "pgd"), r"functools\.partial"),
    "half an image": (lambda: evaluate(cut, (x, y), batch_size=2.5), "integer >= 1"),
    "eps in gray levels": (lambda: weak(cut, x, y, eps=8), "eps=8/255"),
    "eps in words": (lambda: weak(cut, x, y, eps="8/255"), "eps is '8/255'"),
    "another ball": (lambda: weak(cut, x, y, norm="l2"), r"apgd\(norm='l2'\)"),
    "numpy to an attack": (lambda: weak(cut, x.numpy(), y), r"torch\.as_tensor\(x\)"),
    "labels in a list": (lambda: weak(cut, x, y.tolist()), r"torch\.as_tensor\(y, dtype"),
    "one image": (lambda: weak(cut, x[0], y[:1]), r"x\[None\]"),
    "logits in a tuple": (lambda: weak(Fixed(lambda z: (z, z)), x, y), "returns them alone"),
    "a seed of 1.0": (lambda: weak(cut, x, y, seed=1.0), "seed is 1.0, expected an integer"),
    "autoattack's seed": (
        lambda: autoattack(cut, x, y, eps=0.1, seed=1.5),
        "seed is 1.5",
    ),
    "a number for a generator": (lambda: weak(cut, x, y, generator=0), "or give a seed"),
    "ten point zero steps": (lambda: weak(cut, x, y, steps=10.0), "steps is 10.0"),
    "a loss of PyTorch": (lambda: weak(cut, x, y, loss=nn.CrossEntropyLoss()), 'say "ce"'),
    "training on a loader": (lambda: one_epoch(DataLoader(labeled)), r"ImageData\(name"),
    "training by name": (lambda: one_epoch(DATA, loss="ce"), r"function \(model, x, y\)"),
    "training on PyTorch's": (lambda: one_epoch(DATA, loss=nn.CrossEntropyLoss()), "lambda"),
    "a class of optimizers": (
        lambda: one_epoch(DATA, optimizer=torch.optim.Adam),
        r"Adam\(model\.parameters\(\)",
    ),
    "one and a half epochs": (lambda: one_epoch(DATA, epochs=1.5), "epochs is 1.5"),
    "a seed in words": (lambda: one_epoch(DATA, seed="1"), "seed is '1'"),
    "a tuple to train": (
        lambda: fit(Fixed(lambda z: (z, z)), DATA, epochs=1, progress=False),
        "returns them alone",
    ),
}


@pytest.mark.parametrize("told", TOLD)
def test_a_guess_is_told_what_to_do(told: str) -> None:
    call, said = TOLD[told]
    with pytest.raises(ValueError, match=said):
        call()


def test_guesses_that_are_right() -> None:
    model = Fixed()
    assert weak(model, x[:0], y[:0]).shape == (0, 1, 28, 28)
    assert torch.equal(weak(model, x, y, seed=np.int64(1)), weak(model, x, y, seed=1))
    accuracy = evaluate(model, [x, y])
    loader = DataLoader(labeled, batch_size=3)
    pair = tuple(torch.cat(part) for part in zip(*loader, strict=True))
    assert evaluate(model, pair).correct.equal(accuracy.correct)
    for loss in (label_smoothing(), jacobian_penalty()):
        assert loss(model, x, y).isfinite()
    assert F.cross_entropy(model(x), y).isfinite()
