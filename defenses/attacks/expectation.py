"""Expectation over transformation: attacks on a model that draws (Athalye et al., 2018)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .contract import at_least_float32, check_count


class Expectation(nn.Module):
    """The mean logits of `samples` forward passes: a random model, seen from the attacker's side.

    The mean of logits is the geometric mean of the predicted distributions. One pass a sample,
    so that a model that draws once a batch is averaged, too.
    """

    def __init__(self, model: nn.Module, samples: int = 20) -> None:
        super().__init__()
        check_count("samples", samples)
        self.model, self.samples = model, samples

    def forward(self, x: Tensor) -> Tensor:
        samples = [at_least_float32(self.model(x.clone())) for _ in range(self.samples)]
        return torch.stack(samples).mean(dim=0)


def eot(attack: Callable[..., Tensor], samples: int = 20) -> Callable[..., Tensor]:
    """Any attack against the mean of `samples` draws of the model (Athalye et al., 2018, Sec. 4).

    ``eot(pgd)(model, x, y, eps=0.3, …)`` follows the gradient of the mean logits and takes for
    fooled what fools their mean. The model must draw in eval mode: that is how attacks see it.

    Raises
    ------
    ValueError
        Unless `samples` is an integer >= 1.
    """
    check_count("samples", samples)

    def attacked(model: nn.Module, *arguments: Tensor, **options) -> Tensor:
        return attack(Expectation(model, samples), *arguments, **options)

    return partial(attacked)
