"""DDN, in L2: the direction follows the gradient, the norm is another matter.

Rony et al. (2019), "Decoupling direction and norm for efficient gradient-based L2 adversarial
attacks and defenses", Alg. 1.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..progress import track
from .nearest import Search, annealed, nearest
from .norms import lp, per_image, steepest


def ddn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    target: Tensor | None = None,
) -> Tensor:
    """Decoupled direction and norm: δ_{k+1} = ε_{k+1} · (δ_k + α g)/‖δ_k + α g‖₂, clipped.

    g is the unit gradient of the cross-entropy, and ε_{k+1} is (1 − γ) ε_k if x + δ_k fools the
    model, (1 + γ) ε_k if not. α falls from 1 to 0.01 along a cosine, as there; pixels are not
    rounded to 256 levels.

    Parameters
    ----------
    model, x, y
        As in `defenses.attacks.pgd`.
    steps : int
        Gradient steps.
    gamma : float
        γ, in (0, 1): by how much the norm shrinks or grows in a step.
    target : Tensor, optional
        Labels (N,) to move to; without them the attack moves away from `y`.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1]: the nearest in L2 that fools, or unchanged, where `x` was
        misclassified (or at its target) before or could not be fooled.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma is {gamma}, expected a number between 0 and 1")
    return nearest(model, x, y, target, "l2", steps, partial(_search, gamma=gamma))


def _search(search: Search, steps: int, gamma: float) -> None:
    x, x_t = search.x, search.x
    eps = torch.ones_like(search.distance)
    farthest = lp(torch.maximum(x, 1 - x), "l2")
    for k in track(range(steps), steps):
        _, gradient, fooled = search.look(x_t, "ce")
        delta = x_t - x + annealed(1.0, 0.01, k, steps) * steepest(gradient, "l2")
        eps = torch.minimum(torch.where(fooled, 1 - gamma, 1 + gamma) * eps, farthest)
        x_t = (x + per_image(eps) * steepest(delta, "l2")).clamp(0, 1)
