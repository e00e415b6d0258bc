"""PDPGD, in L1: the size is made small by its proximal operator, its price by the dual problem.

Matyasko & Chau (2021), "PDPGD: Primal-dual proximal gradient descent adversarial attack", Alg. 2.
"""

import math

import torch
from torch import Tensor, nn

from ..progress import track
from .nearest import Search, nearest
from .norms import per_image

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's own
RATIO = 0.01  # λ_0/λ_1, what a unit of ‖δ‖₁ costs beside one of the loss, at the start
SMALLEST_RATIO = 1e-6
DUAL_RATE, AVERAGED = 0.1, 0.9  # of λ; the rate falls to a tenth

# Our choice: no pixel shrinks by more than five times the least of its image. In Adam's metric one
# with almost no slope would shrink at once to nothing: on an adversarially trained MNIST network
# seven of 100 images were then not fooled in 200 steps, and the median of the rest was five times
# as far. (Five iterations toward it, as adv-lib takes, end about there, too.)
LARGEST = 5.0


def pdpgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 500,
    learning_rate: float = 0.1,
    target: Tensor | None = None,
) -> Tensor:
    """Primal-dual proximal gradient descent: min over δ, max over λ of λ_0 ‖δ‖₁ + λ_1 softplus(f).

    f = z_y − max_{j≠y} z_j, and λ_0 + λ_1 = 1. Each step is Adam's for the softplus, then the
    proximal operator of ‖δ‖₁ in Adam's own metric, inside the box: both are sums over pixels, so it
    shrinks each pixel in closed form, up to `LARGEST`, where the authors iterate.

    Parameters
    ----------
    model, x, y, target
        As in `defenses.attacks.ddn`.
    steps : int
        Gradient steps.
    learning_rate : float
        Adam's in the first step, in units of pixels; the last one's is a hundredth of it.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1]: the nearest in L1 that fools, or unchanged, where `x` was
        misclassified (or at its target) before or could not be fooled.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}, expected > 0")

    def search(found: Search, steps: int) -> None:
        _search(found, steps, learning_rate)

    return nearest(model, x, y, target, "l1", steps, search)


def _search(search: Search, steps: int, learning_rate: float) -> None:
    x, x_t = search.x, search.x
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    log_ratio = torch.full_like(search.distance, math.log(RATIO))  # ln λ_0/λ_1
    share = log_ratio.sigmoid()  # λ_0, averaged
    for k in track(range(steps), steps):
        lead, slope, fooled = search.look(x_t)
        gradient = -per_image(torch.sigmoid(-lead)) * slope  # of softplus(−lead)
        m, v = m.lerp(gradient, 1 - BETA_1), v.lerp(gradient.square(), 1 - BETA_2)
        metric = (v / (1 - BETA_2 ** (k + 1))).sqrt() + EPSILON
        eta = learning_rate * 0.01 ** (k / steps) / metric
        delta = x_t - x - eta * m / (1 - BETA_1 ** (k + 1))
        slowest = per_image(eta.flatten(1).amin(dim=1))
        shrink = torch.minimum(eta, LARGEST * slowest) * per_image(share / (1 - share))
        x_t = (x + delta.sign() * (delta.abs() - shrink).clamp(min=0)).clamp(0, 1)
        rate = DUAL_RATE * (1 - 0.9 * k / steps)
        log_ratio = log_ratio + torch.where(fooled, rate, -rate)
        log_ratio = log_ratio.clamp(math.log(SMALLEST_RATIO), -math.log(SMALLEST_RATIO))
        share = share.lerp(log_ratio.sigmoid(), 1 - AVERAGED)
