"""Attacks on a model that draws, or that has no gradient (Athalye et al., 2018)."""

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
    """An attack on the mean of `samples` draws of the model (Athalye et al., 2018, Section 4).

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


def bpda(
    attack: Callable[..., Tensor],
    layers: type[nn.Module] | tuple[type[nn.Module], ...],
    stand_in: Callable[[Tensor], Tensor] = lambda x: x,
) -> Callable[..., Tensor]:
    """Any attack, with the gradient of `stand_in` where the model has one of `layers`.

    The backward pass differentiable approximation of Athalye et al. (2018), Sec. 4: the forward
    pass stays as it is, and what a layer g stops or falsifies on the way back is replaced by the
    gradient of something smooth that is close to it, often the identity.
    ``bpda(pgd, JPEG)(model, x, y, eps=0.3, …)``; under `eot` for a layer that also draws.

    Raises
    ------
    ValueError
        The model has no such layer.
    """

    def replaced(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        smooth = stand_in(arguments[0])
        return smooth + (output - smooth).detach()

    def attacked(model: nn.Module, *arguments: Tensor, **options) -> Tensor:
        if not (found := [layer for layer in model.modules() if isinstance(layer, layers)]):
            raise ValueError(f"the model has no layer of {layers}")
        hooks = [layer.register_forward_hook(replaced) for layer in found]
        try:
            return attack(model, *arguments, **options)
        finally:
            for hook in hooks:
                hook.remove()

    return partial(attacked)
