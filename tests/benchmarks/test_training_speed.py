"""What a training step costs: compact layers beside plain ones, `fit` beside the barest loop.

Everybody takes turns, so that a busy machine slows all alike; what counts is the median of the
ratios within a turn. With one thread the processor's time is taken, which other work cannot add
to; with more, and on a GPU, the clock on the wall.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.compact import CompactConv2d
from defenses.data import load_data
from defenses.models import mnist_compact
from defenses.training import cross_entropy, fit, rounded
from tests.benchmarks.turns import kept

BATCH = 128
TURNS = 15
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Note = Callable[[list[dict[str, Any]]], None]
AT_MOST = 1.25 if DEVICE == "cuda" else 1.5
with rounded(DEVICE):
    PRECISION = "bfloat16" if torch.is_autocast_enabled(DEVICE) else "float32"


class OnesConvolution(CompactConv2d):
    """The first idea: sum the squares by a convolution with ones, and let autograd do the rest."""

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(self.weight[:1])
        norm = F.conv2d(x.square(), ones, None, self.stride, self.padding).sqrt()
        y = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return y * (self.alpha / (norm + self.delta)) + self.bias[:, None, None]  # type: ignore[index]


class Unfolded(CompactConv2d):
    """Eq. 6 as it is printed: copy every patch out, normalize and multiply."""

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.kernel_size, padding=0, stride=self.stride)
        patches = patches * self.alpha / (patches.norm(dim=1, keepdim=True) + self.delta)
        y = self.weight.flatten(1) @ patches + self.bias[:, None]  # type: ignore[index]
        return y.unflatten(-1, (x.shape[-2] - self.kernel_size[0] + 1, -1))


def network(convolution: type[CompactConv2d] | None) -> nn.Module:
    """Return the MNIST network of Table 10: plain, or compact with this kind of convolution."""
    torch.manual_seed(0)
    model = mnist_compact(compact="all" if convolution else ())
    for layer in model:
        if convolution and isinstance(layer, CompactConv2d):
            layer.__class__ = convolution  # type: ignore[assignment]
    return model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]


def trainer(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Return the barest step: forward as `fit` rounds it, float32 loss, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step(x: Tensor, y: Tensor) -> None:
        with rounded(DEVICE):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@contextmanager
def threads(count: int) -> Iterator[Callable[[], float]]:
    """Set the number of threads; yield the clock that suits it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield time.process_time if count == 1 and DEVICE == "cpu" else time.perf_counter
    finally:
        torch.set_num_threads(before)


def in_turns(
    runs: Mapping[str, Callable[[], object]], clock: Callable[[], float], turns: int
) -> dict[str, list[float]]:
    """Return the seconds of each run in each turn, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def rows(
    what: str, seconds: Mapping[str, list[float]], ours: str, theirs: str, at_most: float
) -> list[dict[str, Any]]:
    """What the store keeps: the ratio, and what it may be."""
    threads = torch.get_num_threads()
    column = f"{threads} thread{'s' * (threads > 1)}"
    how: dict[str, Any] = {"protocol": "quick", "dataset": "digits", "n": BATCH}
    how |= {"seconds": sum(map(sum, seconds.values()))}
    numbers = {"ratio": ratio(seconds[ours], seconds[theirs]), "at most": at_most}
    return [kept("training", column, what, name, value, **how) for name, value in numbers.items()]


@pytest.mark.parametrize("count", [1, 2])
def test_a_compact_step_costs_little_more_than_a_plain_one(count: int, note: Note) -> None:
    x = torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    y = torch.randint(10, (BATCH,), device=DEVICE)
    kinds = {"plain": None, "compact": CompactConv2d, "ones": OnesConvolution, "unfold": Unfolded}
    kinds = dict([*kinds.items()][: 3 + (count == 1)])  # once is enough for the slowest
    runs = {name: partial(trainer(network(kind)), x, y) for name, kind in kinds.items()}
    with threads(count) as clock:
        seconds = in_turns(runs, clock, TURNS)
        note(rows("a compact step beside a plain one", seconds, "compact", "plain", AT_MOST))
    print(f"\nA step of {BATCH} images, {PRECISION}, {DEVICE}, {count} threads, {clock.__name__}")
    for name, taken in seconds.items():
        step = 1000 * statistics.median(taken)
        print(f"{name:>8} {step:7.1f} ms, {ratio(taken, seconds['plain']):4.2f} of plain")
    assert ratio(seconds["compact"], seconds["plain"]) <= AT_MOST
    assert statistics.median(seconds["compact"]) < statistics.median(seconds["ones"])


@pytest.mark.parametrize("count", [1, 2])
def test_fit_keeps_nine_tenths_of_the_barest_loops_throughput(count: int, note: Note) -> None:
    data = load_data("digits")
    data = dataclasses.replace(
        data, train_images=data.train_images[:1280], train_labels=data.train_labels[:1280]
    ).to(DEVICE)
    ours, bare = network(None), network(None)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    step, labels = trainer(bare.train()), data.train_labels
    images = (data.train_images / 255).contiguous(memory_format=torch.channels_last)

    def barest() -> None:
        order = torch.randperm(len(labels), device=DEVICE)
        for i in order.split(BATCH):
            step(images[i], labels[i])

    def fitted() -> None:
        fit(ours, data, epochs=1, loss=cross_entropy, optimizer=optimizer, batch_size=BATCH)

    with threads(count) as clock:
        seconds = in_turns({"fit": fitted, "barest": barest}, clock, TURNS // 2)
        note(rows("an epoch of `fit` beside the barest loop", seconds, "fit", "barest", 1 / 0.9))
    print(f"\nAn epoch of {len(labels)} images, {PRECISION}, {DEVICE}, {count} threads")
    for name, taken in seconds.items():
        rate = len(labels) / statistics.median(taken)
        print(f"{name:>8} {rate:9,.0f} images/s, {ratio(seconds['barest'], taken):4.2f} of barest")
    assert ratio(seconds["barest"], seconds["fit"]) >= 0.9
