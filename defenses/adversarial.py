"""Adversarial training as an objective (Goodfellow et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from defenses.training import Loss, cross_entropy

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def adversarial(attack: Attack, share: float = 0.5, loss: Loss = cross_entropy) -> Loss:
    r"""The mixture :math:`(1 - s)\,L(x, y) + s\,L(x_{adv}, y)` of Goodfellow et al. (2015), Sec. 6.

    Parameters
    ----------
    attack : callable (model, x, y) -> x_adv
        Crafts the images anew for every batch, against the model as it then is, in eval mode.
    share : float in (0, 1]
        The weight s of the adversarial images: 0.5 in the paper, 1 trains on nothing else.
    loss : callable (model, x, y) -> scalar
        The objective on either kind of image.

    Raises
    ------
    ValueError
        If share lies elsewhere.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")

    def mixture(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hard = loss(model, attack(model, x, y), y)
        return hard if share == 1 else (1 - share) * loss(model, x, y) + share * hard

    return mixture


def mixed_batch(attack: Attack, share: float = 0.5, loss: Loss = cross_entropy) -> Loss:
    """The objective on a batch of which a share is attacked (Jakubovitz & Giryes, 2018, App. C).

    The last ⌊s·N⌋ images of the batch, which `fit` has shuffled, are replaced by what the attack
    makes of them; the others come first. All of them pass through the model as one batch.

    Parameters
    ----------
    attack, share
        As in `adversarial`; a share of 0 attacks nothing.
    loss : callable (model, x, y) -> scalar
        The objective on the whole batch.

    Raises
    ------
    ValueError
        If share lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")

    def mixture(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if count := int(share * len(x) + 1e-9):
            hard = attack(model, x[-count:], y[-count:])
            x = torch.cat([x[:-count], hard])
        return loss(model, x, y)

    return mixture


def drawn_radius(attack: Callable[..., Tensor], low: float, high: float) -> Attack:
    """The attack with ε ~ U[low, high], drawn anew for each batch (Mustafa et al., 2019, Sec. 5.1).

    Parameters
    ----------
    attack : callable (model, x, y, eps=ε) -> x_adv
    low, high : float
        In units of pixels. The draw comes from torch's own generator, which `fit` seeds.

    Raises
    ------
    ValueError
        Unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"expected 0 <= low <= high, got {low} and {high}")

    def drawn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(model, x, y, eps=low + (high - low) * float(torch.rand(())))

    return drawn
