r"""Feature denoising (Xie et al., 2019): each feature becomes a weighted mean of features.

Every operation maps x (N, C, H, W) to :math:`y_i = \frac{1}{\mathcal{C}(x)} \sum_j f(x_i, x_j)\,
x_j` of the same shape (Sec. 4), where j runs over all places of the map, or over a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operation = Callable[[Tensor], Tensor]


FEW_PLACES = 256  # up to here a CPU is three times as fast with the weights written out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each place's mean of v (N, P, C) by the weights softmax(q kᵀ/√d); q and k are (N, P, d ≤ C).

    Beyond `FEW_PLACES`, and on a GPU, PyTorch's fused kernel never holds the P × P weights. It
    wants q and k as wide as v, and zeros change no product.
    """
    places, d = q.shape[1:]
    if q.device.type == "cpu" and places <= FEW_PLACES:
        f = torch.bmm(q * d**-0.5, k.mT)
        return torch.bmm(f.softmax(dim=2, dtype=f.dtype), v.to(f.dtype))
    q, k = (F.pad(h, (0, v.shape[2] - d)).to(v.dtype) for h in (q, k))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=d**-0.5)[:, 0]


class NonLocal(nn.Module):
    r"""Non-local means with the softmax weights :math:`f = e^{\theta(x_i)^\top\phi(x_j)/\sqrt d}`.

    θ and φ are 1×1 convolutions to half of the channels, which start from N(0, 0.01²) as in the
    authors' code; not ``embedded`` they are the identity.
    """

    def __init__(self, channels: int, embedded: bool = True) -> None:
        super().__init__()
        self.theta: nn.Module = nn.Identity()
        self.phi: nn.Module = nn.Identity()
        if embedded:
            self.theta, self.phi = (
                nn.Conv2d(channels, channels // 2, 1, bias=False) for _ in range(2)
            )
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (u.flatten(2).mT for u in (self.theta(x), self.phi(x), x))
        return attention(q, k, v).view(n, h, w, c).permute(0, 3, 1, 2)


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

    Examples
    --------
    >>> import torch
    >>> Denoise(16, mean)(torch.rand(2, 16, 7, 7)).shape
    torch.Size([2, 16, 7, 7])
    """

    def __init__(self, channels: int, operation: Operation | nn.Module) -> None:
        super().__init__()
        self.operation = operation
        self.convolution = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.convolution(self.operation(x)))
