"""Adversarial training as an objective (Goodfellow et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable

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
