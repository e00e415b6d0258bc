r"""What the Jacobian at an image says about its distance to the boundary of its class.

Jakubovitz & Giryes (2018), Sec. 3; J(x) = ∂z/∂x is the K × D Jacobian of the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defenses.attacks.contract import attacking, widest
from defenses.evaluation import on_device_of
from defenses.piecewise import linearize


@dataclass(frozen=True, eq=False)
class Boundary:
    """What the Jacobian at each of n images says about the nearest boundary; (n,), float64, CPU.

    Attributes
    ----------
    norm : Tensor
        ‖J(x)‖_F of the logits.
    margin : Tensor
        The least |z_k* − z_k| over k ≠ k*, the label.
    first_order : Tensor
        d* of Eq. 16, the distance to the nearest boundary if z were linear.
    lower : Tensor
        The lower bound of d* of Eq. 17, ``margin / (√2 norm)``.
    curvature, ceiling : Tensor
        (J_k* x)² − (J_k x)² of Eq. 25 for the class k of `first_order`, and ‖J‖_F²·‖x‖₂² of
        Eq. 27.
    correct : Tensor
        Whether the model is right about the image; elsewhere the true distance is 0.
    """

    norm: Tensor
    margin: Tensor
    first_order: Tensor
    lower: Tensor
    curvature: Tensor
    ceiling: Tensor
    correct: Tensor


def measure(
    model: nn.Module, data_split: tuple[Tensor, Tensor], *, batch_size: int = 100
) -> Boundary:
    """Measure `Boundary` in eval mode and full precision; arguments as in `evaluate`."""
    rows = []
    for x, y in on_device_of(model, data_split, batch_size):
        with attacking(model, x, y, exact=True) as logits_of, torch.no_grad():
            correct = logits_of(x).argmax(dim=1) == y
            z, pull = linearize(model, x)
            u = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            J = pull(u[:, None].expand(-1, len(x), -1)).flatten(2).transpose(0, 1)
        wide = [v.detach().to(widest(x.device)) for v in (x.flatten(1), z, J)]
        rows.append((*_at(y, *wide), correct))
    columns = [torch.cat(column).cpu() for column in zip(*rows, strict=True)]
    return Boundary(*(c if c.dtype == torch.bool else c.double() for c in columns))


def _at(y: Tensor, x: Tensor, z: Tensor, J: Tensor) -> tuple[Tensor, ...]:
    i = torch.arange(len(x), device=x.device)
    gaps = (z - z[i, y, None]).abs().scatter(1, y[:, None], torch.inf)
    slopes = (J - J[i, y, None]).norm(dim=2)
    first_order, k = (gaps / slopes).nan_to_num(0, torch.inf).min(dim=1)  # Eq. 16; 0/0 is a tie
    norm, margin = J.norm(dim=(1, 2)), gaps.amin(dim=1)
    lower = (margin / (math.sqrt(2) * norm)).nan_to_num(0, torch.inf)  # Eq. 17
    along = (J @ x[:, :, None]).squeeze(2).square()  # (J_k x)²
    curvature = along[i, y] - along[i, k]  # Eq. 25
    ceiling = norm.square() * x.square().sum(dim=1)  # Eq. 27
    return norm, margin, first_order, lower, curvature, ceiling
