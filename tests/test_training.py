"""The training loop: deterministic, resumable after a kill, and careful with its checkpoints."""

import copy
import dataclasses
import errno
import functools
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR

from defenses import training
from defenses.checkpoint import load, save
from defenses.data import ImageData, crop_and_flip, load_data
from defenses.models import mnist_compact
from defenses.training import cross_entropy, fit, label_smoothing, step_seconds

EPOCHS = 4
TORN = signal.SIGKILL


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def digits(n: int = 200) -> ImageData:
    data = load_data("digits")
    return dataclasses.replace(
        data, train_images=data.train_images[:n], train_labels=data.train_labels[:n]
    )


def network(num_classes: int = 10, seed: int = 0) -> nn.Sequential:
    """Return a small network with batch statistics and dropout; leave the global seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(256, num_classes),
        )


def train(checkpoint: Path | None, **changed: Any) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train with everything that has a state: momentum, a schedule, dropout, augmentation."""
    torch.manual_seed(5)
    model = mnist_compact(compact="conv1", norm="batch", width=20)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    how: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 64, "augment": crop_and_flip} | changed
    schedule = MultiStepLR(optimizer, [1, 3], 0.5)
    history = fit(
        model, digits(), optimizer=optimizer, schedule=schedule, checkpoint=checkpoint, **how
    )
    return model, history


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, state[name]), name


def stop_after(
    batches: int, stop: Callable[[], Any]
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return `crop_and_flip` that stops the run before a batch is trained on."""
    left = iter(range(batches))

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        if next(left, None) is None:
            stop()
        return crop_and_flip(x, generator)

    return augment


if __name__ == "__main__":  # the process that is killed, with no chance to tidy up
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), augment=stop_after(10, lambda: os.kill(os.getpid(), TORN)))


# Objectives


def test_label_smoothing_is_cross_entropy_with_the_papers_soft_labels() -> None:
    model, x, y = network().eval(), torch.rand(6, 1, 28, 28), torch.arange(6)
    soft = torch.full((6, 10), 1 / 90).scatter(1, y[:, None], 0.9)
    expected = -(soft * F.log_softmax(model(x), dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(label_smoothing(0.1)(model, x, y), expected)
    torch.testing.assert_close(label_smoothing(0)(model, x, y), cross_entropy(model, x, y))


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_label_smoothing_knows_the_number_of_classes(classes: int) -> None:
    model, x, y = network(classes).eval(), torch.rand(2, 1, 28, 28), torch.tensor([0, classes - 1])
    soft = torch.full((2, classes), 0.2 / (classes - 1)).scatter(1, y[:, None], 0.8)
    expected = -(soft * F.log_softmax(model(x), dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(label_smoothing(0.2)(model, x, y), expected)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must lie in"):
        label_smoothing(share)


def test_a_share_that_leaves_the_true_class_behind_is_refused() -> None:
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"share 0\.6 .* of 2 classes"):
        label_smoothing(0.6)(network(2), x, y)


def test_the_loss_is_taken_in_float32() -> None:
    model, x, y = network().eval(), torch.rand(4, 1, 28, 28), torch.arange(4)
    for loss in (cross_entropy, label_smoothing(0.1)):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
            assert loss(model, x, y).dtype == torch.float32


# Training


def test_training_learns_and_ends_in_eval_mode() -> None:
    model = network()
    history = fit(model, digits(600), epochs=10, batch_size=64)
    assert [entry["epoch"] for entry in history] == [*range(1, 11)]
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert all(entry.keys() == {"epoch", "loss", "seconds"} for entry in history)
    assert not any(module.training for module in model.modules())
    images, labels = digits(600).test
    with torch.no_grad():
        assert (model(images / 255).argmax(1) == labels).float().mean() > 0.8


def test_the_loss_of_an_epoch_is_the_mean_over_images() -> None:
    """With a rate of zero the weights stay, so batches of any size must give the same mean."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    images, labels = digits().train
    expected = F.cross_entropy(model(images.double() / 255), labels).item()

    def exactly(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.cross_entropy(model(x.double()), y)

    for size in (1, 64, 200, 10_000):  # 64 leaves a last batch of 8
        optimizer = SGD(model.parameters(), lr=0.0)
        (entry,) = fit(
            model, digits(), epochs=1, loss=exactly, batch_size=size, optimizer=optimizer
        )
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("around", [True, False])
def test_an_autocast_around_the_training_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, around: bool
) -> None:
    """Its cache would hold the rounded weights of the first step to the end."""
    rounding = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(training, "rounded", lambda device: rounding)
    models, x = [network(), network()], torch.rand(4, 1, 28, 28)
    models[1].load_state_dict(models[0].state_dict())
    histories = [fit(models[0], digits(), epochs=3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        with torch.autocast("cpu", torch.bfloat16):
            models[1].eval()(x)  # which fills the cache
        histories.append(fit(models[1], digits(), epochs=3))
        with torch.autocast("cpu", torch.bfloat16):
            logits = models[1](x)
    assert_same_weights(*models)
    first, second = ([entry["loss"] for entry in history] for history in histories)
    assert first == second
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits, models[0](x))


def test_a_seed_fixes_the_weights_bit_for_bit_whatever_the_global_seed() -> None:
    models = []
    for global_seed, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(global_seed)
        model = network()
        fit(model, digits(), epochs=2, seed=seed, augment=crop_and_flip)
        models.append(model)
    assert_same_weights(models[0], models[1])
    assert not torch.equal(*(models[i].get_parameter("0.weight") for i in (0, 2)))


def test_the_global_random_state_is_left_untouched() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    fit(network(), digits(), epochs=1, augment=crop_and_flip)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    data, seen = digits(150), []

    def note(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(x.clone())
        return cross_entropy(model, x, y)

    fit(network(), data, epochs=2, loss=note, batch_size=64)
    assert [len(x) for x in seen] == [64, 64, 22] * 2
    first, second = (torch.cat(seen[i : i + 3]).flatten(1) for i in (0, 3))
    assert not torch.equal(first, second)
    for epoch in (first, second):
        pixels = (epoch * 255).round().to(torch.uint8)
        assert sorted(map(bytes, pixels.numpy())) == sorted(
            map(bytes, data.train_images.flatten(1).numpy())
        )


def test_cudnn_stays_on_and_deterministic_while_training() -> None:
    flags = []

    def note(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        flags.append((torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic))
        return cross_entropy(model, x, y)

    before = torch.backends.cudnn.deterministic
    fit(network(), digits(64), epochs=1, loss=note, batch_size=64)
    assert flags == [(True, True)]
    assert torch.backends.cudnn.deterministic == before


def test_networks_with_unusual_class_counts_train() -> None:
    for classes in (2, 1000):
        data = dataclasses.replace(digits(), train_labels=digits().train_labels % 2)
        (entry,) = fit(network(classes), data, epochs=1)
        assert math.isfinite(entry["loss"])


def test_the_schedule_steps_once_an_epoch() -> None:
    model, rates = network(), []
    optimizer = SGD(model.parameters(), lr=1e-3)

    def note(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rates.append(optimizer.param_groups[0]["lr"])
        return cross_entropy(model, x, y)

    schedule = MultiStepLR(optimizer, [1, 2], 0.1)
    fit(model, digits(), epochs=3, optimizer=optimizer, schedule=schedule, loss=note)
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"epochs": 1, "batch_size": 0}], ids=str)
def test_no_epochs_and_empty_batches_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected an integer >= 1"):
        fit(network(), digits(), **wrong)  # type: ignore[arg-type]


def test_parts_that_do_not_belong_together_are_refused() -> None:
    model = network()
    mine, other = (SGD(m.parameters(), lr=0.1) for m in (model, network()))
    with pytest.raises(ValueError, match="optimizer is of another model"):
        fit(model, digits(), epochs=1, optimizer=other)
    for optimizer in (mine, None):
        with pytest.raises(ValueError, match="schedule is of another optimizer"):
            fit(model, digits(), epochs=1, optimizer=optimizer, schedule=MultiStepLR(other, [1]))


# Checkpoints


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    whole, losses = train(None)
    checkpoint = tmp_path / "new folder" / "run.pt"
    killed = subprocess.run([sys.executable, __file__, str(checkpoint)], capture_output=True)
    assert killed.returncode == -TORN, killed.stderr.decode()
    assert len(torch.load(checkpoint)["history"]) == 2  # in the third epoch, at its third batch
    resumed, history = train(checkpoint)
    assert_same_weights(whole, resumed)
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in losses]
    assert not resumed.training


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [4, 5, 15])  # batches; four make an epoch
def test_an_interrupted_run_goes_on_from_its_last_epoch(tmp_path: Path, after: int) -> None:
    whole, _ = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.pt", augment=stop_after(after, interrupt))
    resumed, history = train(tmp_path / "run.pt")
    assert_same_weights(whole, resumed)
    assert len(history) == EPOCHS


def test_a_finished_run_is_read_back_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    first, history = train(tmp_path / "run.pt", epochs=2)
    content = (tmp_path / "run.pt").read_bytes()
    again, same = train(tmp_path / "run.pt", epochs=2, augment=stop_after(0, interrupt))
    assert_same_weights(first, again)
    assert same == history and not again.training
    assert (tmp_path / "run.pt").read_bytes() == content
    longer, _ = train(tmp_path / "run.pt")
    assert_same_weights(longer, train(None)[0])
    with pytest.raises(ValueError, match="4 epochs are done, 1 asked for"):
        train(tmp_path / "run.pt", epochs=1)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run.pt", epochs=1)
    content = (tmp_path / "run.pt").read_bytes()

    def fill(_: object, file: Any) -> None:
        file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(OSError, match="no space left"):
            train(tmp_path / "run.pt", epochs=2)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    assert (tmp_path / "run.pt").read_bytes() == content


def test_the_part_of_a_run_killed_while_writing_is_ignored_and_cleared(tmp_path: Path) -> None:
    part, other = tmp_path / "run.pt.999999.partial", tmp_path / "other.pt.999999.partial"
    part.write_bytes(b"PK half a checkpoint")
    other.write_bytes(b"of another run")
    model, _ = train(tmp_path / "run.pt")
    assert_same_weights(model, train(None)[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, "run.pt"]


class Bomb:
    """Creates a file when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_damaged_and_foreign_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    path, target = tmp_path / "run.pt", tmp_path / "executed"
    train(path, epochs=1)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x40  # in the midst of a weight
    torch.save(network().state_dict(), path)
    weights_alone = path.read_bytes()
    torch.save({"run": {}, "history": [], "states": Bomb(target)}, path)
    bomb = path.read_bytes()
    for content in (
        b"",
        b"not a checkpoint",
        whole[: len(whole) // 2],
        whole[:-1],
        bytes(flipped),
        weights_alone,
        bomb,
        pickle.dumps(Bomb(target)),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.pt is not a readable checkpoint; delete it"):
            train(path, epochs=1)
        assert path.read_bytes() == content  # the reader decides
    assert not target.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "another run.*seed was 0, is 1"),
        ({"batch_size": 32}, "another run.*batch_size was 64, is 32"),
        ({"loss": label_smoothing(0.1)}, "another run.*loss was cross_entropy, is label_smoothing"),
    ],
    ids=["seed", "batch size", "loss"],
)
def test_another_runs_checkpoint_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    train(tmp_path / "run.pt", epochs=1)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run.pt", **changed)


def test_other_data_are_refused(tmp_path: Path) -> None:
    fit(network(), digits(), epochs=1, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"another run.*images was 200, is 100"):
        fit(network(), digits(100), epochs=1, checkpoint=tmp_path / "run.pt")


def test_what_belongs_to_another_model_or_optimizer_changes_nothing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    fit(network(), digits(), epochs=1, checkpoint=checkpoint)
    deeper = nn.Sequential(*network(), nn.Linear(10, 10))
    for other in (network(num_classes=12), deeper):
        before = copy.deepcopy(other)
        with pytest.raises(ValueError, match=r"run\.pt was written for another model"):
            fit(other, digits(), epochs=1, checkpoint=checkpoint)
        assert_same_weights(other, before)

    model = network(seed=1)
    weights = [*model.parameters()]
    slower = SGD(weights, lr=0.01, momentum=0.9, weight_decay=5e-4)
    grouped = SGD([{"params": [w]} for w in weights], lr=0.1, momentum=0.9, weight_decay=5e-4)
    like = SGD(weights, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for optimizer, schedule, message in (
        (slower, None, "lr was 0.1, is 0.01"),
        (Adam(weights), None, "optimizer was SGD, is Adam"),
        (grouped, None, "another model or optimizer"),
        (like, MultiStepLR(like, [1]), "another model or optimizer.*schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(
                model,
                digits(),
                epochs=2,
                optimizer=optimizer,
                schedule=schedule,
                checkpoint=checkpoint,
            )
        assert_same_weights(model, network(seed=1))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"

    def scaled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model, x, y) * next(factors)

    factors = itertools.repeat(1.0)
    fit(network(), digits(), epochs=1, loss=scaled, checkpoint=checkpoint)
    content = checkpoint.read_bytes()
    for bad in (math.nan, math.inf):
        factors = itertools.repeat(bad)
        with pytest.raises(FloatingPointError, match=r"epoch 2.*lower the learning rate"):
            fit(network(), digits(), epochs=3, loss=scaled, checkpoint=checkpoint)
        assert checkpoint.read_bytes() == content


def test_steps_are_timed_in_turns_each_with_its_own_loss() -> None:
    turns = []

    def slow(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        turns.append(model)
        time.sleep(0.02)
        return cross_entropy(model, x, y)

    models = {"fast": network(), "slow": network(), "slower": network()}
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    losses = {"slow": slow, "slower": lambda m, x, y: slow(m, x, y) + slow(m, x, y)}
    seconds = step_seconds(models, x, y, losses=losses, repeats=3)
    assert turns == [models["slow"], models["slower"], models["slower"]] * 6
    assert seconds["fast"] < seconds["slow"] < seconds["slower"]
    assert seconds["slower"] >= 0.04


def test_a_checkpoint_that_says_less_of_its_run_is_of_another(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    save(file, {"run": {"seed": 0}, "done": 1})
    assert load(file, {"seed": 0}, ["done"]) == [1]
    with pytest.raises(ValueError, match=r"another run \(eps was None, is 0\.3\)"):
        load(file, {"seed": 0, "eps": 0.3}, ["done"])


# Looking on


def test_a_probe_looks_after_each_epoch_at_the_model_in_eval_mode(tmp_path: Path) -> None:
    seen = []

    def probe(model: nn.Module) -> dict[str, float]:
        seen.append(any(module.training for module in model.modules()))
        return {"found": float(len(seen))}

    _, history = train(tmp_path / "c.pt", probe=probe)
    assert [row["found"] for row in history] == [1.0, 2.0, 3.0, 4.0] and seen == [False] * EPOCHS
    _, again = train(tmp_path / "c.pt", probe=probe)  # read back, with nothing left to look at
    assert again == history and len(seen) == EPOCHS


def test_what_a_probe_draws_changes_no_weight() -> None:
    def probe(model: nn.Module) -> dict[str, float]:
        model(torch.rand(3, 1, 28, 28))
        return {"drawn": float(torch.rand(()))}

    model, _ = train(None, probe=probe)
    assert_same_weights(model, train(None)[0])


def test_a_probe_that_raises_ends_training_at_the_epoch_before(tmp_path: Path) -> None:
    looks = []

    def probe(model: nn.Module) -> dict[str, float]:
        looks.append(model)
        if len(looks) == 3:
            raise ArithmeticError("it collapsed")
        return {}

    with pytest.raises(ArithmeticError, match="collapsed"):
        train(tmp_path / "c.pt", probe=probe)
    _, history = train(tmp_path / "c.pt", epochs=2)
    assert [row["epoch"] for row in history] == [1, 2]
    model, _ = train(tmp_path / "c.pt")
    assert_same_weights(model, train(None)[0])


def test_what_a_probe_finds_is_kept_and_its_seconds_are_not_those_of_training(
    tmp_path: Path,
) -> None:
    def probe(model: nn.Module) -> dict[str, float]:
        time.sleep(0.3)
        return {"found": 0.5}

    start = time.perf_counter()
    _, history = train(tmp_path / "c.pt", epochs=1, probe=probe)
    (row,) = torch.load(tmp_path / "c.pt")["history"]
    assert row == history[0] and [*row] == ["epoch", "loss", "seconds", "found"]
    assert row["found"] == 0.5
    assert row["seconds"] <= time.perf_counter() - start - 0.3


def test_what_was_found_before_an_interruption_is_not_looked_for_again(tmp_path: Path) -> None:
    looks: list[nn.Module] = []

    def probe(model: nn.Module) -> dict[str, float]:
        looks.append(model)
        return {"found": float(len(looks))}

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "c.pt", probe=probe, augment=stop_after(10, interrupt))
    model, history = train(tmp_path / "c.pt", probe=probe)
    assert [row["found"] for row in history] == [1.0, 2.0, 3.0, 4.0] and len(looks) == EPOCHS
    assert_same_weights(model, train(None)[0])


def test_a_probe_may_not_speak_for_training() -> None:
    with pytest.raises(ValueError, match=r"found \['epoch', 'loss'\], which training itself keeps"):
        train(None, probe=lambda model: {"loss": -1.0, "epoch": 7.0, "own": 1.0})
