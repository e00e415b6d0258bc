"""σ-zero, in L0: few pixels, counted by a sum that has a gradient.

Cinà et al. (2025), "σ-zero: Gradient-based optimization of ℓ0-norm adversarial examples", Alg. 1.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..progress import track
from .nearest import Search, annealed, nearest
from .norms import lp, per_image

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's own


def sigma_zero(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 1000,
    learning_rate: float = 1.0,
    sigma: float = 1e-3,
    threshold: float = 0.3,
    adjust: float = 0.01,
    target: Tensor | None = None,
) -> Tensor:
    """σ-zero: minimize max(f, 0) + (1/d) Σ_i δ_i²/(δ_i² + σ), f = z_y − max_{j≠y} z_j, with Adam.

    The gradient is scaled to ‖·‖∞ = 1. After each step, changes below the threshold τ are undone;
    τ rises where the iterate fools and falls where it does not.

    Parameters
    ----------
    model, x, y, target
        As in `defenses.attacks.ddn`.
    steps : int
        Gradient steps.
    learning_rate : float
        η of the first step, in units of pixels; it falls to a tenth along a cosine.
    sigma : float
        σ: the smaller, the closer the sum is to a count.
    threshold, adjust : float
        τ at the start, and by which share of η it moves in a step.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1], with the fewest values changed that fool (a value is one channel
        of one pixel), or unchanged, where `x` was misclassified (or at its target) before or could
        not be fooled.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    given = {"learning_rate": learning_rate, "sigma": sigma, "threshold": threshold}
    for name, value in {**given, "adjust": adjust}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}, expected a finite number > 0")
    search = partial(_search, eta_0=learning_rate, sigma=sigma, tau_0=threshold, adjust=adjust)
    return nearest(model, x, y, target, "l0", steps, search)


def _search(
    search: Search, steps: int, eta_0: float, sigma: float, tau_0: float, adjust: float
) -> None:
    x, x_t = search.x, search.x
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    tau = torch.full_like(search.distance, tau_0)
    for k in track(range(steps), steps):
        lead, slope, fooled = search.look(x_t)
        delta = x_t - x
        count = 2 * sigma * delta / (delta.square() + sigma).square() / x[0].numel()
        gradient = count - per_image((lead < 0).to(x)) * slope
        gradient = gradient / per_image(lp(gradient, "linf")).clamp(min=1e-12)
        m, v = m.lerp(gradient, 1 - BETA_1), v.lerp(gradient.square(), 1 - BETA_2)
        m_hat, v_hat = m / (1 - BETA_1 ** (k + 1)), v / (1 - BETA_2 ** (k + 1))
        eta = annealed(eta_0, eta_0 / 10, k, steps)
        delta = (x + delta - eta * m_hat / (v_hat.sqrt() + EPSILON)).clamp(0, 1) - x
        tau = (tau + torch.where(fooled, adjust * eta, -adjust * eta)).clamp(0, 1)
        x_t = torch.where(delta.abs() < per_image(tau), x, x + delta).clamp(0, 1)
