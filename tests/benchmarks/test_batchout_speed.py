"""What a step with BatchOut costs: the paper's network with a layer at every place, and without.

Steps take turns as in `test_training_speed`, in a process of their own that keeps its memory: what
a step pays for fresh pages changes from run to run by more than the layers cost.
"""

import ctypes
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
AT_MOST = 1.05  # missed where a step is short: there a mere copy of the features costs 4% of it
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


def keep_memory() -> None:
    """Let glibc, where it is, keep all that is freed; where it is not, nothing changes."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def costs_of_steps(count: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Each kind's cost as a multiple of a plain step, and the rows of the store."""
    x, y = batch()
    costs: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    with threads(count) as clock:
        print(f"\nA step of {BATCH} images, {DEVICE}, {count} threads, {clock.__name__}")
        for name, what in COSTS.items():  # two at a time: the slow ones would slow what follows
            steps = {kind: partial(trainer(KINDS[kind]), x, y) for kind in ("plain", name)}
            seconds = in_turns(steps, clock, TURNS)
            step = 1000 * statistics.median(seconds[name])
            print(f"{name:>24} {step:7.2f} ms, {ratio(seconds[name], seconds['plain']):5.3f}")
            at_most = AT_MOST if name == "BatchOut" else 0
            rows += beside(f"{what}, beside a plain step", seconds, name, "plain", at_most)
            costs[name] = ratio(seconds[name], seconds["plain"])
    return costs, rows


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_with_batchout_costs_what_a_plain_one_costs(count: int, note: Note) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=keep_memory) as child:
        costs, rows = child.submit(costs_of_steps, count).result()
    note(rows)
    assert costs["BatchOut"] <= AT_MOST
