"""What a step with BatchOut costs: the paper's network with a layer at every place, and without.

Steps take turns as in `test_training_speed`.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.batchout import MNIST_ETA, BatchOut, to_noise
from defenses.models import mnist_batchout
from defenses.training import Loss, cross_entropy, rounded
from tests.benchmarks.test_jacobian_speed import BATCH, batch, beside
from tests.benchmarks.test_training_speed import DEVICE, Note, in_turns, ratio, threads

TURNS = 60  # a step is short
AT_MOST = 1.05
KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "BatchOut": {},
    "η drawn for each sample": {"draw": "sample"},
    "Gaussian noise": {"direction": to_noise},
    "gradient not stopped": {"stop_gradient": False},
}
COSTS = {  # as multiples of a plain step; only the first is bounded
    "BatchOut": "a step with BatchOut behind every layer",
    "η drawn for each sample": "a step with BatchOut, η drawn for each sample",
    "Gaussian noise": "a step with Gaussian noise in place of BatchOut",
    "gradient not stopped": "a step with BatchOut, its gradient not stopped",
}


def trainer(options: dict[str, Any] | None) -> Callable[[Tensor, Tensor], None]:
    """Return a step as `fit` takes it, with such a layer at C1, C2 and F1, or with none."""
    torch.manual_seed(0)
    behind: dict[str, nn.Module] = {}
    if options is not None:
        behind = {name: BatchOut(eta, **options) for name, eta in MNIST_ETA.items()}
    model = mnist_batchout(behind=behind).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)

    return fitting(model, cross_entropy, optimizer)


def fitting(
    model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], None]:
    """Return a step as `fit` takes it."""

    def step(x: Tensor, y: Tensor) -> None:
        with rounded(DEVICE):
            value = loss(model, x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_with_batchout_costs_what_a_plain_one_costs(count: int, note: Note) -> None:
    x, y = batch()
    costs: dict[str, float] = {}
    with threads(count) as clock:
        print(f"\nA step of {BATCH} images, {DEVICE}, {count} threads, {clock.__name__}")
        for name, what in COSTS.items():  # two at a time: the slow ones would slow what follows
            steps = {kind: partial(trainer(KINDS[kind]), x, y) for kind in ("plain", name)}
            seconds = in_turns(steps, clock, TURNS)
            step = 1000 * statistics.median(seconds[name])
            print(f"{name:>24} {step:7.2f} ms, {ratio(seconds[name], seconds['plain']):5.3f}")
            at_most = AT_MOST if name == "BatchOut" else 0
            note(beside(f"{what}, beside a plain step", seconds, name, "plain", at_most))
            costs[name] = ratio(seconds[name], seconds["plain"])
    assert costs["BatchOut"] <= AT_MOST
