"""PGD ends where an image repeats itself: with what it would have found, and for less."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defenses.attacks import bim, mim, pgd
from defenses.attacks.cycle import Cycles
from defenses.attacks.losses import margin

LONG: dict[str, Any] = {"eps": 0.12, "step_size": 0.012, "steps": 400}


def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(self: Cycles, x_t: Tensor, value: Tensor, fooled: Tensor) -> Tensor:
        return (~fooled).nonzero().squeeze(1)

    monkeypatch.setattr(Cycles, "left", left)


def attacked(attack: Callable[..., Tensor], model: nn.Module, x: Tensor, y: Tensor, **how: Any):
    """What it finds, and how many images it shows to the model."""
    shown: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, given: shown.append(len(given[0])))
    found = attack(model, x, y, **LONG | how)
    hook.remove()
    return found, sum(shown)


@pytest.mark.parametrize(
    "how",
    [
        {"seed": 0},
        {"random_start": False, "loss": "margin"},
        {"seed": 0, "loss": "dlr", "restarts": 2},
        {"random_start": False, "loss": "ce_textbook"},
        {"random_start": False, "target": True},
    ],
    ids=str,
)
def test_an_image_alone_gets_the_same_bits_for_less(
    how: dict[str, Any], victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = victim
    held = model(pgd(model, x, y, **LONG, seed=0)).argmax(dim=1) == y
    x, y = x[held][:4], y[held][:4]
    if "target" in how:
        how = how | {"target": (y[:1] + 3) % 10}
    short = [attacked(pgd, model, x[i : i + 1], y[i : i + 1], **how) for i in range(4)]
    to_the_end(monkeypatch)
    whole = [attacked(pgd, model, x[i : i + 1], y[i : i + 1], **how) for i in range(4)]
    for (found, passes), (expected, all_passes) in zip(short, whole, strict=True):
        assert found.equal(expected)
        assert passes <= all_passes
    assert sum(passes for _, passes in short) < 0.6 * sum(passes for _, passes in whole)


@pytest.mark.parametrize("attack", [pgd, bim])
def test_a_batch_gets_the_same_verdicts_for_less(
    attack: Callable[..., Tensor], victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = victim
    how = {"seed": 0} if attack is pgd else {}
    found, passes = attacked(attack, model, x, y, **how)
    to_the_end(monkeypatch)
    expected, all_passes = attacked(attack, model, x, y, **how)
    verdicts, others = (model(images).argmax(dim=1) == y for images in (found, expected))
    assert verdicts.equal(others) and 3 < verdicts.sum() < 97
    assert passes < 0.6 * all_passes


@pytest.mark.parametrize(("tail", "period"), [(0, 1), (0, 2), (5, 1), (7, 3), (30, 12), (100, 50)])
def test_a_cycle_is_found_after_at_most_three_times_its_tail_or_period(
    tail: int, period: int
) -> None:
    cycles, t = Cycles(nn.Identity(), torch.device("cpu")), 0
    fooled = torch.zeros(2, dtype=torch.bool)
    while True:
        place = t if t < tail else tail + (t - tail) % period
        x_t, value = torch.tensor([place, t]).view(2, 1, 1, 1) / 2**10, torch.tensor([place, t]) / 7
        if cycles.left(x_t, value, fooled).tolist() == [1]:
            break
        t += 1
    assert tail + period <= t <= max(1, 3 * max(tail, period)) + period


class Coin(nn.Module):
    """Says class 0 with certainty and no slope, unless its coin shows the one side in twenty."""

    def __init__(self, toss: Callable[[], float], source: Any = None) -> None:
        super().__init__()
        self.toss, self.source = toss, source

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean(dim=(1, 2, 3))
        return torch.stack([1 + 0 * s, 2.0 * (self.toss() < 0.05) + 0 * s], dim=1)


def coins() -> dict[str, Coin]:
    draw, numbers, other = torch.Generator(), np.random.default_rng(5), random.Random(5)
    draw.manual_seed(5)
    return {
        "torch": Coin(lambda: float(torch.rand(()))),
        "numpy": Coin(lambda: float(np.random.rand())),  # noqa: NPY002
        "random": Coin(lambda: random.random()),
        "its own, torch": Coin(lambda: float(torch.rand((), generator=draw)), source=draw),
        "its own, numpy": Coin(lambda: float(numbers.random()), source=numbers),
        "its own, random": Coin(lambda: other.random(), source=other),
    }


@pytest.mark.parametrize("name", coins())
def test_a_network_that_draws_is_climbed_to_the_end(name: str) -> None:
    """Its iterates repeat, with equal losses, and still the next draw may fool."""
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    model, x, y = coins()[name], torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    pgd(model, x, y, **LONG, random_start=False)
    assert 4 < len(steps) < 400  # the first side in twenty, not the first repeat nor the last step


class Noisy(nn.Module):
    """Noise from a source that nobody can see."""

    def __init__(self, network: nn.Module, sigma: float) -> None:
        super().__init__()
        self.network, self.sigma = network, sigma
        source = torch.Generator().manual_seed(0)
        self.noise: Callable[[Tensor], Tensor] = lambda z: torch.randn(z.shape, generator=source)

    def forward(self, x: Tensor) -> Tensor:
        z = self.network(x)
        return z + self.sigma * self.noise(z)


def certain() -> nn.Module:
    """Class 0 everywhere, without a slope."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([9.0, 3.0]))
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize("sigma", [0.1, 1e-5])
def test_an_iterate_with_another_loss_than_before_is_no_repeat(sigma: float) -> None:
    flat = certain()
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    _, passes = attacked(pgd, Noisy(flat, sigma), x, y, random_start=False)
    assert passes == 3 * 401
    _, passes = attacked(pgd, flat, x, y, random_start=False)
    assert passes == 3 * 2


@pytest.mark.parametrize(("gap", "goes_on"), [(0.0, []), (1e-6, [0]), (1.0, [0])])
def test_a_smaller_batch_may_round_otherwise_and_that_is_no_repeat_yet(
    gap: float, goes_on: list[int]
) -> None:
    cycles, x_t = Cycles(nn.Identity(), torch.device("cpu")), torch.zeros(2, 1, 1, 1)
    value, fooled = torch.ones(2), torch.tensor([False, True])
    assert cycles.left(x_t, value, fooled).tolist() == [0]
    for kept, left in ((gap, goes_on), (gap, [0] if gap == 1 else [])):
        assert cycles.left(x_t[:1], value[:1] + kept, fooled[:1]).tolist() == left
        if not left:
            return


def test_a_loss_of_ones_own_may_change_with_the_step(victim) -> None:
    model, x, y = victim
    calls: list[int] = []

    def turning(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return margin(model(x), y) * (0 if len(calls) < 50 else 1)

    x_adv = pgd(model, x[:20], y[:20], **LONG | {"eps": 0.3}, random_start=False, loss=turning)
    assert (model(x_adv).argmax(dim=1) != y[:20]).all()


def test_momentum_and_rounded_passes_go_on() -> None:
    """An iterate of before says nothing of the momentum, nor of what an exact pass would see."""
    flat = certain()
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    assert attacked(mim, flat, x, y, decay=0.5)[1] == 3 * 401
    assert attacked(mim, flat, x, y, decay=0.0)[1] == 3 * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert attacked(pgd, flat, x, y, random_start=False)[1] == 3 * 402
