r"""Feature denoising (Xie et al., 2019): each feature becomes a weighted mean of features.

Every operation maps x (N, C, H, W) to :math:`y_i = \frac{1}{\mathcal{C}(x)} \sum_j f(x_i, x_j)\,
x_j` of the same shape (Eq. 3), where j runs over all places of the map, or over a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operation = Callable[[Tensor], Tensor]


class NonLocal(nn.Module):
    r"""Non-local means with the softmax weights :math:`f = e^{\theta(x_i)^\top\phi(x_j)/\sqrt d}`.

    θ and φ are 1×1 convolutions to half of the channels, which start from N(0, 0.01²) as in the
    authors' code; not ``embedded`` they are the identity. The HW × HW weights are never held where
    PyTorch has a fused kernel.
    """

    def __init__(self, channels: int, embedded: bool = True) -> None:
        super().__init__()
        self.theta = (
            nn.Conv2d(channels, channels // 2, 1, bias=False) if embedded else nn.Identity()
        )
        self.phi = nn.Conv2d(channels, channels // 2, 1, bias=False) if embedded else nn.Identity()
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.flatten(2).transpose(1, 2) for h in (self.theta(x), self.phi(x), x))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return y[:, 0].transpose(1, 2).reshape(x.shape)


def dot_product(x: Tensor) -> Tensor:
    """Non-local means with f = xᵢᵀxⱼ and 𝒞 = HW, by the C × C matrix Σ xⱼxⱼᵀ."""
    X = x.flatten(2)
    return (X @ X.transpose(1, 2) / X.shape[2] @ X).reshape(x.shape)


def bilateral(x: Tensor, size: int = 3, gaussian: bool = True) -> Tensor:
    """The same weights as in the non-local means, over a size × size window inside the map."""
    n, c, h, w = x.shape
    window = F.unfold(x, size, padding=size // 2).view(n, c, size**2, h, w)
    inside = F.unfold(x.new_ones(1, 1, h, w), size, padding=size // 2).view(size**2, h, w) > 0
    f = (x[:, :, None] * window).sum(dim=1)
    if gaussian:
        weights = (f / math.sqrt(c)).masked_fill(~inside, -torch.inf).softmax(dim=1)
    else:
        weights = f / inside.sum(dim=0)
    return (weights[:, None] * window).sum(dim=2)


def mean(x: Tensor, size: int = 3) -> Tensor:
    """The mean over a size × size window inside the map."""
    return F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)


def median(x: Tensor, size: int = 3) -> Tensor:
    """The median over a size × size window, the map continued by its border; channel by channel."""
    n, c, h, w = x.shape
    window = F.unfold(F.pad(x, [size // 2] * 4, mode="replicate"), size)
    return window.view(n, c, size**2, h, w).median(dim=2).values


class Denoise(nn.Module):
    """The block of Fig. 4: x + BN(1×1 convolution(operation(x))).

    The scale of the batch normalization starts at zero, so that a new block is the identity.
    """

    def __init__(self, channels: int, operation: Operation | nn.Module) -> None:
        super().__init__()
        self.operation = operation
        self.convolution = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.convolution(self.operation(x)))
