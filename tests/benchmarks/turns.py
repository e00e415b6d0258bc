"""Ours and theirs in turns, on the same images: seconds, strength, forward passes, and the limit.

A turn runs everybody once, so that a busy machine slows all alike; what counts is the median over
the turns. Everybody attacks the same network, in fp32 and with channels_last weights.
"""

import copy
import dataclasses
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defenses.adversarial import adversarial
from defenses.attacks import pgd
from defenses.attacks.losses import cross_entropy
from defenses.data import load_data, to_float
from defenses.evaluation import wilson
from defenses.models import mnist_compact
from defenses.results import measure
from defenses.training import fit

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIBRARIES = ["foolbox", "torchattacks", "adversarial-robustness-toolbox", "adv-lib"]
WITHIN = 0.01  # as strong: at most 1% farther away, and no more left than the interval allows
Attacked = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Victim:
    """A network, the images that it is attacked on, and where both come from."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    dataset: str
    protocol: str


def victim(name: str) -> Victim:
    """The network of the papers' MNIST tables, trained on the spot."""
    data = load_data("mnist" if "DEFENSES_DATA" in os.environ else "digits", device=DEVICE)
    eps = 0.3 if data.name == "mnist" else 0.1
    torch.manual_seed(0)
    model = mnist_compact(10).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    fit(model, data, epochs=1 if data.name == "mnist" else 20, optimizer=adam, progress=False)
    if name == "adversarially trained":
        few: dict[str, Any] = {"train_images": data.train_images[:20_000]}
        few |= {"train_labels": data.train_labels[:20_000]}
        some = dataclasses.replace(data, **few)
        for radius in (eps / 2, eps):  # at once at ε, it would say the same of every image
            hard = partial(pgd, eps=radius, step_size=radius / 4, steps=7, early_stop=False)
            loss = adversarial(hard, share=1)
            epochs = 2 if data.name == "mnist" else 5
            fit(model, some, epochs=epochs, loss=loss, optimizer=adam, progress=False)
    x, y = to_float(data.test[0][:200]).contiguous(), data.test[1][:200]
    return Victim(name, model.eval(), x, y, eps, data.name, "quick")


@dataclass
class Standing:
    """What one attack took and did; `size` holds ‖η‖₂ or the pixels changed, an image."""

    seconds: list[float] = field(default_factory=list)
    passes: float = 0.0
    fooled: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    size: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the fastest and of the slowest turn."""
        return min(self.seconds), max(self.seconds)

    @property
    def left(self) -> float:
        """The share of images that hold, in [0, 1]."""
        return 1 - float(self.fooled.float().mean())

    @property
    def mean_size(self) -> float:
        """Over the images that it fooled by moving them; NaN where there are none."""
        return float(self.size[self.fooled & (self.size > 0)].mean())

    def beside(self, other: "Standing") -> float:
        """Our mean size over the other's, on the images that both fooled by moving them."""
        both = self.fooled & other.fooled & (self.size > 0) & (other.size > 0)
        return float(self.size[both].mean() / other.size[both].mean())

    def no_weaker_than(self, other: "Standing", *, minimal: bool) -> bool:
        """Whether as many images fell and, for a minimal-norm attack, to changes as small."""
        farther = minimal and self.beside(other) > 1 + WITHIN
        n = len(other.fooled)
        return self.left <= wilson(n - int(other.fooled.sum()), n)[1] + 1e-6 and not farther


@dataclass(frozen=True)
class Contest:
    """Who takes turns at one victim, and what the budget of the attack allows.

    `gradients` and `queries` are the forward passes of the whole budget, with and without a
    gradient. `distance` is "l2" or "pixels", or "" where the attack has a ball to stay in. With
    `target` an image falls where the model says the target. `slow` ones run in one turn only.
    Ours in `smaller` have less than the whole budget: where they are weaker they do not count.
    """

    name: str
    ours: Mapping[str, Attacked]
    theirs: Mapping[str, Attacked]
    at_most: float
    gradients: int
    queries: int = 0
    distance: str = ""
    target: Tensor | None = None
    slow: Sequence[str] = ()
    smaller: Sequence[str] = ()
    turns: int = 3

    def play(self, benchmark: Any, victim: Victim) -> dict[str, Standing]:
        """Let everybody take turns; the first of ours is the one that is benchmarked."""
        table = {name: Standing() for name in ["limit", "limit, bf16", *self.theirs, *self.ours]}
        first, *others = self.ours

        def run(name: str) -> None:
            attack = self.ours.get(name) or self.theirs[name]
            self._time(attack, victim, table[name])

        def run_others() -> None:
            for name in ("limit", "limit, bf16"):
                table[name].seconds.append(self._budget(victim, name.endswith("bf16")))
            for name in [*self.theirs, *others]:
                if not (name in self.slow and table[name].seconds):
                    run(name)

        benchmark.pedantic(run, args=(first,), setup=run_others, rounds=self.turns, iterations=1)
        benchmark.extra_info["ratio"] = self.ratio(table)
        return table

    def ratio(self, table: Mapping[str, Standing], ours: Sequence[str] = ()) -> float:
        """Our seconds over those of the fastest peer as it comes, however weak that one is."""
        theirs = [table[name].median for name in self.theirs if not name.endswith("bf16")]
        return min(table[name].median for name in ours or self.ours) / min(theirs)

    def rows(self, table: Mapping[str, Standing], victim: Victim) -> list[dict[str, Any]]:
        """What the store keeps of it: a row of `defenses.results` for each number."""
        first, rows = next(iter(self.ours)), []
        how: dict[str, Any] = {"n": len(victim.x), "dataset": victim.dataset}
        how |= {"protocol": victim.protocol}
        for name, standing in table.items():
            numbers = {"seconds": standing.median}
            if not name.startswith("limit"):
                numbers |= {"left": 100 * standing.left, "passes": standing.passes}
                if self.distance:
                    numbers[self.distance] = standing.mean_size
                    numbers["beside ours"] = standing.beside(table[first])
            if name == first:
                numbers["at most"] = self.at_most
            for metric, number in numbers.items():
                how["ci"] = standing.span if metric == "seconds" else None
                if math.isfinite(number):
                    where = ("speed", f"{self.name}, {victim.name}", name, metric, number)
                    rows.append(kept(*where, seconds=sum(standing.seconds), **how))
        return rows

    def check(self, table: Mapping[str, Standing]) -> None:
        """Raise an AssertionError unless ours is as strong as everybody, and fast enough."""
        counted = []
        for ours in self.ours:
            stronger = [
                theirs
                for theirs in self.theirs
                if not table[ours].no_weaker_than(table[theirs], minimal=bool(self.distance))
            ]
            assert ours in self.smaller or not stronger, f"{ours} is weaker than {stronger[0]}"
            counted += [] if stronger else [ours]
        ratio = self.ratio(table, counted)
        assert ratio <= self.at_most, f"{ratio:.2f} of the fastest peer, at most {self.at_most}"

    def _time(self, attack: Attacked, victim: Victim, standing: Standing) -> None:
        seen: list[int] = []
        first = next(victim.model.children())  # ART calls the layers, not the model
        hook = first.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        start = now()
        x_adv = attack(victim.model, victim.x, victim.y)
        standing.seconds.append(now() - start)
        hook.remove()
        low, high = x_adv.aminmax()
        assert low >= -1e-6 and high <= 1 + 1e-6, "it left [0, 1], where any attack is stronger"
        standing.passes = sum(seen) / len(victim.x)
        eta = (x_adv - victim.x).flatten(1)
        standing.size = eta.norm(dim=1) if self.distance != "pixels" else (eta != 0).sum(1).float()
        with torch.no_grad():
            says = victim.model(x_adv).argmax(dim=1)
        standing.fooled = says != victim.y if self.target is None else says == self.target

    def _budget(self, victim: Victim, bf16: bool) -> float:
        """Seconds of every pass of the budget, with the whole batch and nothing else."""
        model = copy.deepcopy(victim.model).requires_grad_(False)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            forward = [one_pass(model, victim.x, victim.y, False) for _ in range(6)]
            both = [one_pass(model, victim.x, victim.y, True) for _ in range(6)]
        total = self.gradients * statistics.median(both[1:])
        return total + self.queries * statistics.median(forward[1:])


def one_pass(model: nn.Module, x: Tensor, y: Tensor, gradient: bool) -> float:
    """Seconds of a forward pass, and of the gradient with respect to the images."""
    start = now()
    with torch.set_grad_enabled(gradient):
        x = x.detach().requires_grad_(gradient)
        loss = cross_entropy(model(x).float(), y).sum()
        if gradient:
            torch.autograd.grad(loss, x)
    return now() - start


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rounded(attack: Attacked) -> Attacked:
    """The attack under bfloat16 autocast: ours judge success in full precision all the same."""

    def attacked(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return attack(model, x, y).float()

    return attacked


def kept(
    table: str, column: str, row: str, metric: str, value: float, **how: Any
) -> dict[str, Any]:
    """A row of the store: on which hardware, with how many threads and which libraries."""
    threads = torch.get_num_threads()
    device = f"{hardware()}, {threads} thread{'s' * (threads > 1)}" if DEVICE == "cpu" else DEVICE
    how = {"seed": 0, "device": device, **how}
    number = measure(f"{table} {DEVICE}", row, column, metric, value, **how)
    return number | {"versions": "; ".join([number["versions"], *versions()])}


@functools.cache
def hardware() -> str:
    """The name of the processor, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


@functools.cache
def versions() -> list[str]:
    found = {distribution.name: distribution.version for distribution in distributions()}
    return [f"{name} {found[name]}" for name in LIBRARIES if name in found]
