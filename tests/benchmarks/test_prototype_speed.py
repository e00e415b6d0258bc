"""What a step with prototypes costs: the paper's network for MNIST with Eq. 5 at three layers.

And what our PReLU costs, beside PyTorch's. Steps take turns as in `test_training_speed`.
"""

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from defenses.models import PReLU, mnist_six
from defenses.prototype import Prototypes, prototype_conformity
from defenses.training import cross_entropy
from tests.benchmarks.test_batchout_speed import fitting
from tests.benchmarks.test_jacobian_speed import beside
from tests.benchmarks.test_training_speed import BATCH, DEVICE, Note, in_turns, ratio, threads

TURNS = 15
AT_MOST, OF_PYTORCHS = 1.15, 0.5
COSTS = {  # as multiples of a plain step; only the first is bounded
    "Eq. 5": "a step with prototypes at three layers, beside a plain step",
    "released": "a step with the released loss at three layers, beside a plain step",
}


def prototypes(released: bool) -> Prototypes:
    """Return the network of Table 1 with the taps of the paper."""
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    taps = {"layer3": (mean, 128), "layer4": (nn.Identity(), 512), "layer5": (nn.Identity(), 64)}
    return Prototypes(mnist_six(), taps, released=released)


def trainer(kind: str) -> Callable[[Tensor, Tensor], None]:
    """Return a step as `fit` takes it, plain or with one of the losses."""
    torch.manual_seed(0)
    plain, rate = kind == "plain", 1e-3
    model = mnist_six() if plain else prototypes(released=kind == "released")
    model.to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    groups = model.groups(rate) if isinstance(model, Prototypes) else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=1e-4)
    loss = cross_entropy if plain else prototype_conformity()

    return fitting(model, loss, optimizer)


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_with_prototypes_costs_little_more_than_a_plain_one(count: int, note: Note) -> None:
    x = torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    y = torch.randint(10, (BATCH,), device=DEVICE)
    with threads(count) as clock:
        steps = {kind: partial(trainer(kind), x, y) for kind in ("plain", *COSTS)}
        seconds = in_turns(steps, clock, TURNS)
        print(f"\nA step of {BATCH} images, {DEVICE}, {count} threads, {clock.__name__}")
        for kind, taken in seconds.items():
            step = 1000 * statistics.median(taken)
            print(f"{kind:>10} {step:7.1f} ms, {ratio(taken, seconds['plain']):5.3f} of plain")
        for kind, what in COSTS.items():
            note(beside(what, seconds, kind, "plain", AT_MOST if kind == "Eq. 5" else 0, BATCH))
    assert ratio(seconds["Eq. 5"], seconds["plain"]) <= AT_MOST


def activation(layer: nn.Module) -> Callable[[], None]:
    """Return a pass forward and back on the bfloat16 maps that the first layer yields."""
    layer = layer.to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, BATCH, 32, 28, 28, generator=generator).to(DEVICE, torch.bfloat16)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    x.requires_grad_()

    def run() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            value = layer(x)
        torch.autograd.grad(value, [x, *layer.parameters()], g)

    return run


@pytest.mark.parametrize("count", [1, 2])
def test_our_prelu_takes_half_the_time_of_pytorchs(count: int, note: Note) -> None:
    with threads(count) as clock:
        runs = {"ours": activation(PReLU(32)), "PyTorch's": activation(nn.PReLU(32))}
        seconds = in_turns(runs, clock, 4 * TURNS)  # a pass is short
        print(f"\nPReLU of {BATCH} × 32 × 28 × 28, bfloat16, {DEVICE}, {count} threads")
        for name, taken in seconds.items():
            print(f"{name:>10} {1000 * statistics.median(taken):7.2f} ms")
        note(
            beside("our PReLU, beside PyTorch's", seconds, "ours", "PyTorch's", OF_PYTORCHS, BATCH)
        )
    assert ratio(seconds["ours"], seconds["PyTorch's"]) <= OF_PYTORCHS
