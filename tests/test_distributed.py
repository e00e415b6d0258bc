"""Two processes give what one gives; this file is also what `torchrun` starts in them."""

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from defenses import attacks, distributed, resume
from defenses.adversarial import adversarial, adversarial_logit_pairing
from defenses.data import ImageData, crop_and_flip, load_data
from defenses.evaluation import distances, evaluate, perturbations, transfer_matrix
from defenses.jacobian import input_gradient_penalty, jacobian_penalty
from defenses.prototype import Prototypes, prototype_conformity
from defenses.run import Run, read_rows
from defenses.training import cross_entropy, fit, label_smoothing
from tests.test_stored import folder_of_images, small_blocks

FGSM = functools.partial(attacks.fgsm, eps=0.1)
ROOT = Path(__file__).parent.parent
LOSSES = {
    "cross-entropy": cross_entropy,
    "soft labels": label_smoothing(0.1),
    "adversarial": adversarial(FGSM),
    "ALP": adversarial_logit_pairing(FGSM),
    "Jacobian": jacobian_penalty(0.01, form="mean square"),
    "input gradient": input_gradient_penalty(0.1),
    "prototypes": prototype_conformity(0.1),
}


def digits(count: int) -> ImageData:
    data = load_data("digits")
    return dataclasses.replace(
        data, train_images=data.train_images[:count], train_labels=data.train_labels[:count]
    )


def network(norm: bool = True, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 16),
            nn.BatchNorm1d(16) if norm else nn.Identity(),
            nn.Linear(16, 10),
        )


def trained(name: str, norm: bool = True, **how: Any) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train in float64, so that nothing but the order of sums is left to differ: 101 images, the
    last batch of 5."""
    model: nn.Module = network(norm)
    if name == "prototypes":
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = Prototypes(network(norm), {"4": (nn.Identity(), 16)})
    model.double()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = ReduceLROnPlateau(optimizer, patience=0)
    how = {"epochs": 2, "batch_size": 32, "augment": crop_and_flip, "progress": False, **how}
    how |= {"optimizer": optimizer, "schedule": schedule, "loss": LOSSES[name]}
    return model, fit(model, digits(101), **how)


def everything(folder: Path) -> dict[str, Any]:
    """All that must be the same in one process and in several."""
    found: dict[str, Any] = {}
    for name in LOSSES:
        model, history = trained(name, norm=name not in ("Jacobian", "input gradient"))
        found[f"fit {name}"] = [model.state_dict(), [row["loss"] for row in history]]
    again = fit(model, digits(101), epochs=1, loss=LOSSES[name], batch_size=32, progress=False)
    found["fit once more"] = [model.state_dict(), [row["loss"] for row in again]]

    small_blocks()
    data = load_data(f"imagefolder:{folder / 'images'}", resident=False, size=16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    history = fit(model.double(), data, epochs=2, batch_size=6, progress=False)
    found["fit stored"] = [model.state_dict(), [row["loss"] for row in history]]
    found["evaluate stored"] = evaluate(model, data.test, batch_size=2).correct

    one, other, split = network(seed=0).eval(), network(seed=1).eval(), digits(1).test
    pgd = functools.partial(attacks.pgd, eps=0.1, step_size=0.05, steps=2, seed=0)
    found["evaluate"] = [evaluate(one, split, a, batch_size=50).correct for a in (None, pgd)]
    grid = transfer_matrix({"one": one, "other": other}, split, pgd, batch_size=200)
    found["transfer"] = {key: value.correct for key, value in grid.items()}
    few = split[0][:3], split[1][:3]
    found["perturbations"] = dataclasses.astuple(perturbations(one, few, FGSM, batch_size=3))[:-1]
    found["distances"] = distances(one, few, FGSM, batch_size=1)
    for _ in range(2):  # the second time, nothing is measured again
        noted(folder)
    found["draws"] = drawn()
    return found


def noted(folder: Path) -> None:
    run = Run("attacks", results=str(folder / "runs"))
    rank, world = distributed.processes()

    def measured() -> Any:
        (folder / f"{rank} of {world}.measured").open("a").write("once")
        return evaluate(network().eval(), digits(1).test, batch_size=100)

    run.note("table", f"of {world}", "column", measured)


def drawn() -> list[Tensor]:
    """What dropout lets through in the first process, and in the second."""
    masks = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        masks.append(nn.functional.dropout(torch.ones(64)))
        return cross_entropy(model, x, y)

    fit(network(), digits(32), epochs=1, batch_size=32, loss=loss, progress=False)
    return distributed.in_turn(masks)


Found = tuple[Path, dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A folder, what two processes find, and what one finds."""
    folder = tmp_path_factory.mktemp("two")
    folder_of_images(folder / "images", train=9, test=4)
    assert launched("everything", folder) == 0
    return folder, torch.load(folder / "made.pt", weights_only=False), everything(folder)


def launched(what: str, folder: Path) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.test_distributed", what, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [*LOSSES, "once more", "stored"])
def test_two_processes_train_to_the_weights_of_one(results: Found, name: str) -> None:
    _, two, one = results
    same(two[f"fit {name}"], one[f"fit {name}"])


def test_they_measure_the_same_image_by_image(results: Found) -> None:
    _, two, one = results
    for name in ("evaluate", "evaluate stored", "transfer", "perturbations", "distances"):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=0)
    assert any(0 < c.sum() < len(c) for c in one["evaluate"])


def test_each_process_draws_for_itself(results: Found) -> None:
    _, two, one = results
    first, second = two["draws"]
    assert not torch.equal(first, second)
    assert torch.equal(first, one["draws"][0])  # one process draws what it always did


def test_a_run_of_two_processes_notes_each_row_once(results: Found) -> None:
    folder = results[0]
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        assert (folder / f"{rank} of {world}.measured").read_text() == "once"
    (file,) = (folder / "runs" / "rows" / "attacks").iterdir()
    two, one = read_rows(file)
    assert two["device"] == f"{one['device']} × 2"
    assert two["outcome"] == one["outcome"]


def killed(folder: Path) -> Any:
    """Train; only the first process may write. The second dies after the third epoch, the first
    time."""
    second, file = distributed.processes()[0] > 0, folder / "net.pt"
    again, epochs = file.exists(), 0

    def kill(_: nn.Module) -> dict[str, float]:
        nonlocal epochs
        epochs += 1
        if epochs == 3 and second and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    if second:
        resume.save = _refused  # type: ignore[assignment]
    model, history = trained("adversarial", epochs=4, checkpoint=file, probe=kill)
    return model.state_dict(), history


def _refused(*_: Any) -> None:
    raise AssertionError("the second process wrote a checkpoint")


def test_a_killed_training_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    assert launched("killed", tmp_path) != 0
    assert torch.load(tmp_path / "net.pt")["history"][-1]["epoch"] in (2, 3)
    shutil.copy(tmp_path / "net.pt", tmp_path / "killed.pt")
    assert launched("killed", tmp_path) == 0
    whole, past = trained("adversarial", epochs=4)
    state, history = torch.load(tmp_path / "made.pt", weights_only=False)
    same(state, whole.state_dict())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    model, history = trained("adversarial", epochs=4, checkpoint=tmp_path / "killed.pt")
    same(model.state_dict(), whole.state_dict())
    same([row["loss"] for row in history], [row["loss"] for row in past])


def test_too_small_a_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: (0, 4))
    distributed.check_shares(100, 32)
    with pytest.raises(ValueError, match="a batch of 3 images cannot be divided among 4 processes"):
        distributed.check_shares(99, 32)


def test_a_unit_that_asks_for_gpus_is_started_by_torchrun(tmp_path: Path) -> None:
    from book import campaign  # which the processes above need not import

    unit = campaign.Unit("attacks", "digits", "quick", 0, "standard")
    words = ["results", "--gpus", "2", f"--results={tmp_path}"]
    command = campaign._command(unit, campaign.arguments(words))
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[5:8] == ["-m", "book.campaign", "unit"]
    alone = campaign._command(unit, campaign.arguments(["results", f"--results={tmp_path}"]))
    assert alone[1:4] == ["-m", "book.campaign", "unit"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start()
    made = {"everything": everything, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
    if distributed.processes()[0] == 0:
        torch.save(made, Path(sys.argv[2], "made.pt"))
