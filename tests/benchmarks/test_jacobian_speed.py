"""What a step with the Jacobian's penalty costs: ours beside the loop that the papers' code runs.

Steps take turns as in `test_training_speed`. The peak of the memory is taken in a process of its
own for each objective: ``python -m tests.benchmarks.test_jacobian_speed NAME`` prints it.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from defenses.jacobian import input_gradient_penalty, jacobian_penalty
from defenses.models import mnist_tutorial
from defenses.training import Loss, cross_entropy
from tests.benchmarks.memory import resident
from tests.benchmarks.test_training_speed import DEVICE, Note, in_turns, ratio, rows, threads
from tests.benchmarks.turns import ROOT

BATCH = 100
TURNS = 15
OF_THE_LOOP, OF_THE_NAIVE = 0.6, 1.05
OF_ITS_MEMORY = 1.75  # all rows at once: their maps stand side by side


def looped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Eq. 6 by one backward pass a class, each of which is differentiated again."""
    x = x.detach().requires_grad_()
    z = model(x).float()
    rows = [grad(z[:, k].sum(), x, create_graph=True)[0] for k in range(z.shape[1])]
    total = torch.stack([row.square().sum() for row in rows]).sum()
    return F.cross_entropy(z, y) + 0.1 * (total / len(x)).sqrt()


def projected(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Hoffman et al. (2019), Alg. 1, as facebookresearch/jacobian_regularizer has it."""
    x = x.detach().requires_grad_()
    z = model(x).float()
    v = F.normalize(torch.randn_like(z), dim=1)
    (product,) = grad(z, x, v, create_graph=True)
    return F.cross_entropy(z, y) + 0.01 * z.shape[1] * product.square().sum() / (2 * len(x))


OBJECTIVES: dict[str, Loss] = {
    "plain": cross_entropy,
    "exact": jacobian_penalty(0.1),
    "exact, looped": looped,
    "1 projection": jacobian_penalty(0.01, form="mean square", projections=1),
    "1 projection, naive": projected,
    "1 image": jacobian_penalty(0.1, images=1),  # what the authors' code penalizes
    "input gradient": input_gradient_penalty(1.0),
}
CLASSES = 10
COSTS = {  # as multiples of a plain step
    "exact": f"the exact penalty, K = {CLASSES}",
    "1 projection": "the penalty by one projection",
    "1 image": "the penalty on one image of the batch",
    "input gradient": "the input-gradient penalty",
}


def trainer(loss: Loss, bf16: bool) -> Callable[[Tensor, Tensor], None]:
    """Return a step of the paper's network and optimizer with this objective."""
    torch.manual_seed(0)
    model = mnist_tutorial().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step(x: Tensor, y: Tensor) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            value = loss(model, x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, 1, 28, 28, generator=generator)
    return x.to(DEVICE), torch.randint(CLASSES, (BATCH,), generator=generator).to(DEVICE)


def growth(name: str) -> int:
    """Bytes by which three bfloat16 steps with this objective raised the peak."""
    torch.set_num_threads(1)
    x, y = batch()
    trainer(cross_entropy, bf16=True)(x, y)  # what torch loads at its first step is not ours
    step, before = trainer(OBJECTIVES[name], bf16=True), resident("VmRSS")
    for _ in range(3):
        step(x, y)
    return resident("VmHWM") - before


def beside(
    what: str,
    seconds: Mapping[str, list[float]],
    ours: str,
    theirs: str,
    at_most: float = 0,
    n: int = BATCH,
) -> list[dict[str, Any]]:
    """`rows` of a batch of `n`; without a bound where none is set."""
    kept = [row | {"n": n} for row in rows(what, seconds, ours, theirs, at_most)]
    return [row for row in kept if at_most or row["metric"] != "at most"]


def test_the_loop_computes_the_same() -> None:
    x, y = batch()
    model = mnist_tutorial(dropout=0.0).to(DEVICE)
    torch.testing.assert_close(
        *(OBJECTIVES[name](model, x, y) for name in ("exact", "exact, looped"))
    )


@pytest.mark.parametrize("count", [1, 2])
def test_the_penalty_costs_a_fraction_of_its_loop(count: int, note: Note) -> None:
    x, y = batch()
    with threads(count) as clock:
        for bf16 in (False, True):  # what is kept, and bounded, is the last
            steps = {name: partial(trainer(loss, bf16), x, y) for name, loss in OBJECTIVES.items()}
            seconds = in_turns(steps, clock, TURNS if bf16 else TURNS // 3)
            kind = "bfloat16" if bf16 else "float32"
            print(
                f"\nA step of {BATCH} images, {kind}, {DEVICE}, {count} threads, {clock.__name__}"
            )
            for name, taken in seconds.items():
                step, plain = 1000 * statistics.median(taken), ratio(taken, seconds["plain"])
                loop = ratio(taken, seconds["exact, looped"])
                print(f"{name:>20} {step:7.1f} ms, {plain:5.2f} of plain, {loop:4.2f} of the loop")
        exact = (seconds, "exact", "exact, looped", OF_THE_LOOP)
        one = (seconds, "1 projection", "1 projection, naive", OF_THE_NAIVE)
        note(beside("the exact penalty beside a loop over the classes", *exact))
        note(beside("the penalty by one projection beside the naive one", *one))
        for name, what in COSTS.items():
            note(beside(f"{what}, beside a plain step", seconds, name, "plain"))
    assert ratio(seconds["exact"], seconds["exact, looped"]) <= OF_THE_LOOP
    assert ratio(seconds["1 projection"], seconds["1 projection, naive"]) <= OF_THE_NAIVE


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.skipif(DEVICE != "cpu", reason="the peak of a process is that of the processor")
def test_the_penalty_needs_little_more_memory_than_its_loop(note: Note) -> None:
    def peak(name: str) -> float:
        command = [sys.executable, "-m", "tests.benchmarks.test_jacobian_speed", name]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return int(run.stdout) / 2**20

    peaks = {name: [peak(name) for _ in range(3)] for name in ("exact", "exact, looped")}
    print({name: [round(mib) for mib in found] for name, found in peaks.items()}, "MiB")
    what = "the memory of the exact penalty beside that of the loop"
    with threads(1):
        note(beside(what, peaks, "exact", "exact, looped", OF_ITS_MEMORY))
    assert ratio(peaks["exact"], peaks["exact, looped"]) <= OF_ITS_MEMORY


if __name__ == "__main__":
    print(growth(sys.argv[1]))
