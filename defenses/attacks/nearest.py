"""What the minimum-norm attacks share: the nearest iterate that fools, and a look nearer by."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .contract import Forward, attacking, check_count
from .losses import LOSSES, fools
from .norms import lp, per_image

LAST_LOOKS = 10  # our choice: a bisection to 0.1% of the way, for the cost of five steps


def nearest(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    norm: str,
    steps: int,
    search: Callable[["Search", int], None],
) -> Tensor:
    """Images that fool, as near to `x` in `norm` as `search` finds them and the last looks bring.

    An image that nothing fooled, or that needs no attack, comes back unchanged. Autocast is off: a
    rounded boundary would be another one.
    """
    check_count("steps", steps)
    with attacking(model, x, y, target, exact=True) as logits_of:
        x_adv = x.detach().clone()
        rows = (~fools(logits_of.exact(x_adv), y, target)).nonzero().squeeze(1)
        if len(rows):
            goal = None if target is None else target[rows]
            found = Search(logits_of, x_adv[rows], y[rows], goal, norm)
            search(found, steps)
            found.look_nearer()
            x_adv[rows] = found.x_best
        return x_adv


@dataclass(eq=False)
class Search:
    """The images that a search starts from, and the nearest that fooled; `distance` (N,) or inf."""

    logits_of: Forward
    x: Tensor
    y: Tensor
    target: Tensor | None
    norm: str
    x_best: Tensor = field(init=False)
    distance: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x_best, self.distance = self.x, self.x.new_full((len(self.x),), torch.inf)

    def look(self, x_t: Tensor, loss: str = "margin") -> tuple[Tensor, Tensor, Tensor]:
        """The loss (N,), which is > 0 where an image fools, its gradient, and which fool."""
        x_t = x_t.detach().requires_grad_()
        logits = self.logits_of(x_t)
        if self.target is None:
            value = LOSSES[loss](logits, self.y)
        else:
            value = -LOSSES[loss](logits, self.target)
        value = value.clamp(min=torch.finfo(value.dtype).min)  # where every other is masked
        gradient = self.logits_of.gradient(value, x_t)
        return value.detach().to(self.x), gradient, self._note(x_t.detach(), logits.detach())

    def _note(self, x_t: Tensor, logits: Tensor) -> Tensor:
        fooled, distance = fools(logits, self.y, self.target), lp(x_t - self.x, self.norm)
        nearer = fooled & (distance < self.distance)
        self.x_best = torch.where(per_image(nearer), x_t, self.x_best)
        self.distance = torch.where(nearer, distance, self.distance)
        return fooled

    def look_nearer(self) -> None:
        """Bisect the segment from `x` to the nearest; in L0, undo the smallest of its changes."""
        if self.norm == "l0":
            return self._undo()
        delta = self.x_best - self.x
        low, high = torch.zeros_like(self.distance), torch.ones_like(self.distance)
        for _ in range(LAST_LOOKS):
            part = (low + high) / 2
            x_t = (self.x + per_image(part) * delta).clamp(0, 1)
            fooled = self._note(x_t, self.logits_of.exact(x_t))
            low, high = torch.where(fooled, low, part), torch.where(fooled, part, high)

    def _undo(self) -> None:
        """Half of them, a quarter, … and at last one at a time: what is not needed stays undone."""
        changes = (self.x_best - self.x).abs().flatten(1)
        rank = torch.where(changes > 0, changes, torch.inf).argsort(dim=1).argsort(dim=1)
        place, count = torch.zeros_like(self.y), lp(changes, "l0").long()
        for look in range(1, LAST_LOOKS + 1):
            block = (count >> look).clamp(min=1)
            tried = (rank >= place[:, None]) & (rank < (place + block)[:, None])
            x_t = torch.where(tried.view_as(self.x), self.x, self.x_best)
            fooled = self._note(x_t, self.logits_of.exact(x_t))
            place = torch.where(fooled | (block == 1), place + block, place)


def annealed(first: float, last: float, t: int, steps: int) -> float:
    """From `first` to almost `last`, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * t / steps)) / 2
