"""The two balls of the attacks, L∞ and L2: sizes, steepest steps, projections, random points."""

import torch
from torch import Tensor

NORMS = ("linf", "l2")
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1, "l0": 0}


def check_ball(eps: float, norm: str) -> None:
    """Raise a ValueError unless `eps` is a radius of the ball of this `norm`, one of `NORMS`.

    In L∞ that is at most 1: all of [0, 1]. What is larger was meant in units of 1/255.
    """
    check_norm(norm)
    if isinstance(eps, str) or eps is None or not eps >= 0:
        raise ValueError(f"eps is {eps!r}, expected a radius >= 0 in units of pixels in [0, 1]")
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"eps is {eps}, expected at most 1: pixels are in [0, 1], where {eps} of 255 gray "
            f"levels are eps={eps}/255"
        )


def check_norm(norm: str) -> None:
    """Raise a ValueError unless `norm` is one of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected 'linf' or 'l2'")


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


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """Into the ball of radius ε around `x`, then into [0, 1], which leaves it in the ball."""
    if norm == "linf":
        return x_adv.clamp((x - eps).clamp(min=0), (x + eps).clamp(max=1))
    delta = x_adv - x
    length = per_image(size(delta, "l2")).clamp(min=torch.finfo(x.dtype).tiny)
    return (x + delta * (eps / length).clamp(max=1)).clamp(0, 1)


def random_point(x: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A start for each image: uniform in the L∞ ball, or on the L2 sphere, then into [0, 1]."""
    draw = torch.rand if norm == "linf" else torch.randn
    delta = draw(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    delta = 2 * delta - 1 if norm == "linf" else steepest(delta, "l2")
    return project(x + eps * delta, x, eps, norm)
