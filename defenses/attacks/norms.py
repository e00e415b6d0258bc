"""The balls of the attacks, L∞, L2 and L1: sizes, steepest steps, projections, random points."""

from collections.abc import Collection

import torch
from torch import Tensor

from .contract import widest

NORMS = ("linf", "l2")
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1, "l0": 0}


def check_ball(eps: float, norm: str, norms: Collection[str] = NORMS) -> None:
    """Raise a ValueError unless `eps` is a radius of the ball of this `norm`, one of `norms`.

    In L∞ that is at most 1: all of [0, 1]. What is larger was meant in units of 1/255.
    """
    check_norm(norm, norms)
    if isinstance(eps, str) or eps is None or not eps >= 0:
        raise ValueError(f"eps is {eps!r}, expected a radius >= 0 in units of pixels in [0, 1]")
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"eps is {eps}, expected at most 1: pixels are in [0, 1], where {eps} of 255 gray "
            f"levels are eps={eps}/255"
        )


def check_norm(norm: str, norms: Collection[str] = NORMS) -> None:
    """Raise a ValueError unless `norm` is one of `norms`."""
    if norm not in norms:
        *others, last = map(repr, norms)
        raise ValueError(f"norm is {norm!r}, expected {', '.join(others)} or {last}")


def per_image(values: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, 1), to multiply images with."""
    return values[:, None, None, None]


def size(delta: Tensor, norm: str) -> Tensor:
    """‖δ‖ of each image; shape (N,)."""
    if norm == "linf":
        return delta.abs().flatten(1).amax(dim=1)
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def lp(delta: Tensor, norm: str) -> Tensor:
    """`size` in any norm of `ORDER`: L∞, L2, L1, or L0, which counts; shape (N,)."""
    return torch.linalg.vector_norm(delta.flatten(1), ORDER[norm], dim=1)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The step of size 1 along which a linear function grows most; zero for a gradient of zero."""
    if norm == "linf":
        return gradient.sign()
    largest = per_image(size(gradient, "linf")).clamp(min=torch.finfo(gradient.dtype).tiny)
    scaled = gradient / largest  # the squares of tiny gradients would be zero
    return scaled / per_image(size(scaled, "l2")).clamp(min=torch.finfo(gradient.dtype).tiny)


def sparse_step(gradient: Tensor, x: Tensor, pixels: Tensor) -> Tensor:
    """A step of size 1 in L1, shared evenly by the `pixels` (N,), at least 1, of steepest slope.

    Pixels stay that have no slope, or are at that end of [0, 1]; of equally steep ones all go.
    """
    gradient = gradient.masked_fill((gradient < 0) & (x <= 0) | (gradient > 0) & (x >= 1), 0)
    steepness = gradient.abs().flatten(1).sort(dim=1, descending=True).values
    least = steepness.gather(1, pixels[:, None] - 1)[:, :, None, None]
    step = gradient.sign() * (gradient.abs() >= least)
    return step / per_image(lp(step, "l1")).clamp(min=1)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """Into the ball of radius ε around `x`, then into [0, 1], which leaves it in the ball."""
    if norm == "linf":
        return x_adv.clamp((x - eps).clamp(min=0), (x + eps).clamp(max=1))
    delta = x_adv - x
    length = per_image(size(delta, "l2")).clamp(min=torch.finfo(x.dtype).tiny)
    return (x + delta * (eps / length).clamp(max=1)).clamp(0, 1)


def project_l1(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest point of the L1 ball and of [0, 1] (Croce & Hein, 2021, Prop. 2.1).

    It is x + sign(δ) (|δ| − λ)₊, clipped. As λ falls, pixel i moves from λ = |δ_i| on, until at
    |δ_i| − r_i it is at the end of its room r_i. Between these 2d points the sum of all moves is
    linear; sorted, they show where it is ε.
    """
    delta = x_adv - x
    full, room = (s.flatten(1) for s in (delta.abs(), torch.where(delta > 0, 1 - x, x)))
    points, order = torch.cat([full, full - room], dim=1).sort(dim=1, descending=True)
    moving = torch.where(order < full.shape[1], 1, -1).cumsum(dim=1)
    moved = (moving[:, :-1] * -points.diff(dim=1)).cumsum(dim=1, dtype=widest(x.device))
    moved = torch.cat([torch.zeros_like(moved[:, :1]), moved], dim=1)
    last = (moved <= eps).sum(dim=1, keepdim=True) - 1
    point, moving, moved = (s.gather(1, last).squeeze(1) for s in (points, moving, moved))
    shrinkage = (point - (eps - moved) / moving.clamp(min=1)).clamp(min=0).to(x)
    shrunk = delta.abs() - per_image(shrinkage)
    shrunk = torch.where(shrunk > torch.finfo(x.dtype).eps, shrunk, 0)  # rounding moves none
    return (x + delta.sign() * shrunk).clamp(0, 1)


def random_point(x: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A start for each image: uniform in the L∞ ball, or on the L2 sphere, then into [0, 1].

    In L1, the nearest point of the ball and [0, 1] to x plus Gaussian noise of deviation 1.
    """
    draw = torch.rand if norm == "linf" else torch.randn
    delta = draw(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    if norm == "l1":
        return project_l1(x + delta, x, eps)
    delta = 2 * delta - 1 if norm == "linf" else steepest(delta, "l2")
    return project(x + eps * delta, x, eps, norm)
