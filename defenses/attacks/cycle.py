"""Iterates that repeat: an ascent that is where it was before will not find anything new.

With signs and a fixed step there are finitely many points to be at, so the ascent of a network
that answers alike every time ends in a cycle. Brent (1980) finds it by comparing each iterate with
a single one that is kept, replaced whenever the number of the step is a power of two.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
# Our choice: in batches of two sizes, values of one iterate that differ by more were drawn. In
# batches of one size those are that differ at all.
ROUNDING = 1e-3


class Cycles:
    """Drops the images of one ascent that are back at an iterate x_t of before.

    Two equal iterates tell what comes next only if the network answers them alike. It is taken to,
    until there is a sign that it draws: a generator of its own, one of the global ones that has
    moved, or values of one iterate that differ by more than the size of the batch can explain.
    Without ``watching``, only images that are fooled are dropped.
    """

    def __init__(self, model: nn.Module, device: torch.device, watching: bool = True) -> None:
        held = (value for module in model.modules() for value in vars(module).values())
        self.watching = watching and not any(isinstance(value, GENERATORS) for value in held)
        self.x_kept: Tensor
        self.kept: Tensor
        self.t, self.rounding = 0, 0.0
        self.device, self.before = device, _states(device)

    def left(self, x_t: Tensor, value: Tensor, fooled: Tensor) -> Tensor:
        """Which images to go on with: those not fooled (N,) nor back; the host asks once."""
        x_t, value = x_t.detach(), value.detach()
        again = torch.zeros_like(fooled)
        if self.t == 0:
            self.draws = again.any()
        elif self.watching:
            again = (x_t == self.x_kept).flatten(1).all(dim=1)
            gap = (value - self.kept).abs()
            explained = self.rounding * (1 + value.abs())
            self.draws = self.draws | (again & (gap > explained)).any()
            again = again & (gap == 0) & ~self.draws
        if self.t & (self.t - 1) == 0:
            self.x_kept, self.kept, self.rounding = x_t, value, 0.0
        left = (~(fooled | again)).nonzero().squeeze(1)
        if self.watching and len(left) < len(fooled):
            self.watching = self.before == _states(self.device)
            if not self.watching:
                left = (~fooled).nonzero().squeeze(1)
            self.x_kept, self.kept = self.x_kept[left], self.kept[left]
            self.rounding = ROUNDING
        self.t += 1
        return left


def _states(device: torch.device) -> tuple[object, ...]:
    """Where the global generators are that a network or a loss may draw from."""
    on = [torch.get_rng_state()]
    if device.type != "cpu":
        place = () if device.type == "mps" else (device,)
        on.append(torch.get_device_module(device).get_rng_state(*place))
    legacy: Any = np.random.get_state()  # noqa: NPY002
    arrays = [*(state.numpy() for state in on), legacy[1]]
    return *(array.tobytes() for array in arrays), legacy[2], random.getstate()
