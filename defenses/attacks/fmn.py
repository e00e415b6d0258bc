"""FMN: steps along the gradient in a ball whose radius closes in on the boundary.

Pintor, Roli, Brendel & Biggio (2021), "Fast minimum-norm adversarial attacks through adaptive norm
constraints", Alg. 1.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..progress import track
from .nearest import Search, annealed, nearest
from .norms import check_norm, lp, steepest

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
START, FASTEST = 0.05, 4.0  # ours: ε at first, of the farthest corner's; its growth then, in γ
SIGN_STEP = 0.1  # ours: α in L∞, of that in L2


def fmn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    target: Tensor | None = None,
) -> Tensor:
    """Fast minimum norm: δ ← Π_ε(δ + α g/‖g‖₂), clipped, with g the gradient of the loss.

    The radius ε becomes (1 − γ) ε where δ fools, at most the smallest norm so far, and (1 + γ) ε
    where it does not; until one of a descent did, it goes for the linearized boundary,
    ‖δ‖_p + abs(f)/‖g‖_q. α and γ fall along a cosine.

    Four things are ours, since without them half of the images of an adversarially trained network
    were never fooled in 200 steps: the loss is the cross-entropy without its saturation, not the
    margin; in L∞ the step is the sign; in L2 and L1, δ is put on the sphere also from inside; and
    ε begins near by and may not jump. A fifth is that in L∞ and L2 there are two descents, of half
    the steps each: the second begins at `x` again, with ε the smallest norm so far, and climbs the
    margin. On such networks the two end in different places, and which is nearer differs by image.
    In L1 a descent needs all the steps.

    Parameters
    ----------
    model, x, y, target
        As in `defenses.attacks.ddn`.
    norm : str
        ``"linf"``, ``"l2"`` or ``"l1"``: what is made small.
    steps : int
        Gradient steps, of both descents where there are two.
    step_size : float
        α of a descent's first step, in L2, a tenth of that in L∞; its last is a hundredth of it.
    gamma : float
        γ of a descent's first step, in (0, 1); its last is 0.001.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1]: the nearest in `norm` that fools, or unchanged, where `x` was
        misclassified (or at its target) before or could not be fooled.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    check_norm(norm, DUAL)
    if not 0 < gamma < 1:
        raise ValueError(f"gamma is {gamma}, expected a number between 0 and 1")
    if not step_size > 0:
        raise ValueError(f"step_size is {step_size}, expected > 0")
    search = partial(_search, step_size=step_size, gamma=gamma)
    return nearest(model, x, y, target, norm, steps, search)


def _search(search: Search, steps: int, step_size: float, gamma: float) -> None:
    x, norm = search.x, search.norm
    farthest = lp(torch.maximum(x, 1 - x), norm)
    along, step_size = ("linf", SIGN_STEP * step_size) if norm == "linf" else ("l2", step_size)
    half = 0 if norm == "l1" else steps // 2
    descents = {"ce": steps - half, "margin": half}
    for loss, count in track(descents.items(), [*descents.values()]):
        x_t, found = x, torch.zeros_like(farthest, dtype=torch.bool)
        eps = torch.where(search.distance.isfinite(), search.distance, START * farthest)
        for k in track(range(count), count):
            f, gradient, fooled = search.look(x_t, loss)
            gamma_k = annealed(gamma, 1e-3, k, count)
            slope = lp(gradient, DUAL[norm]).clamp(min=torch.finfo(x.dtype).tiny)
            to_boundary = lp(x_t - x, norm) + f.abs() / slope
            least, most = ((1 + growth * gamma_k) * eps for growth in (1, FASTEST))
            found = found | fooled
            outside = torch.where(found, least, to_boundary.clamp(least, most))
            inside = torch.minimum((1 - gamma_k) * eps, search.distance)
            eps = torch.minimum(torch.where(fooled, inside, outside), farthest)
            alpha = annealed(step_size, step_size / 100, k, count)
            delta = onto_ball(x_t - x + alpha * steepest(gradient, along), eps, norm)
            x_t = (x + delta).clamp(0, 1)


def onto_ball(delta: Tensor, eps: Tensor, norm: str) -> Tensor:
    """The nearest point of the ball of radius `eps` (N,); in L2 and L1, of its surface."""
    flat, eps = delta.flatten(1), eps[:, None]
    if norm == "linf":
        return flat.clamp(-eps, eps).view_as(delta)
    length = lp(delta, norm)[:, None].clamp(min=1e-12)  # 0 stays 0
    flat = flat * (eps / length).clamp(min=float(norm == "l1"))
    if norm == "l2":
        return flat.view_as(delta)
    # In L1 all shrink by τ = (Σ_{i ≤ k} |δ|_(i) − ε)/k, with the largest k for which |δ|_(k) > τ.
    highest = flat.abs().sort(dim=1, descending=True).values
    tau = (highest.cumsum(dim=1) - eps) / torch.arange(1, flat.shape[1] + 1, device=flat.device)
    last = (highest > tau).sum(dim=1, keepdim=True).clamp(min=1) - 1
    shrunk = (flat.abs() - tau.gather(1, last).clamp(min=0)).clamp(min=0)
    return (flat.sign() * shrunk).view_as(delta)
