"""BatchOut (Subramanya et al., 2018): features moved toward those of other images of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.contract import at_least_float32
from defenses.training import Loss

Direction = Callable[[Tensor, int], Tensor]

# Sec. 8.1: η behind each layer. MNIST takes it as it is, CIFAR-10 draws it from U[0, η].
MNIST_ETA = {"C1": 0.05, "C2": 0.1, "F1": 0.1}
CIFAR_ETA = {"C1": 0.1, "C2": 0.1, "C3": 0.1, "C4": 0.1, "C5": 0.15, "F1": 0.15, "F2": 0.15}


def to_partners(x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """d = X_r − X of Algorithm 1 for the first ``count`` samples of a batch.

    Partners are drawn from the whole batch (N, …), with replacement; a sample may draw itself.
    """
    R = torch.randint(len(x), (count,), device=x.device, generator=generator)
    return _rows(x, R).sub_(x[:count])


def to_noise(x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    r"""The control of Eq. 5, :math:`\lVert x \rVert_2\, n / \lVert n \rVert_2`, n ~ N(0, I).

    Of each sample's own length, whatever was drawn, for the first ``count`` samples.
    """
    x = x[:count]
    n = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    lengths = [v.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1)) for v in (x, n)]
    return n * (lengths[0] / lengths[1])


class _AsConstant(torch.autograd.Function):
    """x_star; the gradient goes to x as it is, because x_star − x counts as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_star: Tensor) -> Tensor:
        return x_star.detach()  # an input returned as it is could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class BatchOut(nn.Module):
    r"""Algorithm 1 as a layer, to stand between a layer and its activation.

    In training mode the first ⌊k·N⌋ samples of a batch become :math:`x + \eta\,(x_r - x)`, Eq. 2;
    the others, and every sample in eval mode, pass as they are. Draws come from torch's own
    generator, which `fit` seeds.

    Parameters
    ----------
    eta : float in [0, 1]
        η, or with ``draw`` the end N of the interval U[0, N] from which it is drawn.
    k : float in [0, 1]
        The share of the batch that is moved.
    draw : {None, "sample", "batch"}
        How often η is drawn: never (as for MNIST), for each sample, or for each batch. The paper
        does not say which of the two it does for CIFAR-10.
    direction : callable (x, count) -> d
        `to_partners`, or `to_noise`.
    stop_gradient : bool
        Sec. 6.1: η·d counts as a constant, and the layer's derivative is the identity.

    Raises
    ------
    ValueError
        For eta or k outside [0, 1] or another ``draw``.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), BatchOut(), torch.nn.ReLU())
    >>> model.train()(torch.rand(6, 8)).shape
    torch.Size([6, 4])

    In eval mode it does nothing:

    >>> x = torch.rand(6, 4)
    >>> torch.equal(BatchOut().eval()(x), x)
    True
    """

    def __init__(
        self,
        eta: float = 0.1,
        k: float = 0.5,
        *,
        draw: str | None = None,
        direction: Direction = to_partners,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        if not (0 <= eta <= 1 and 0 <= k <= 1):
            raise ValueError(f"eta and k must lie in [0, 1]; got {eta} and {k}")
        if draw not in (None, "sample", "batch"):
            raise ValueError(f'draw must be None, "sample" or "batch"; got {draw!r}')
        self.eta, self.k, self.draw = eta, k, draw
        self.direction, self.stop_gradient = direction, stop_gradient

    def extra_repr(self) -> str:
        how = f", draw={self.draw!r}" if self.draw else ""
        direction = getattr(self.direction, "__name__", type(self.direction).__name__)
        return f"{self.eta:g}, k={self.k:g}{how}, direction={direction}"

    def forward(self, x: Tensor) -> Tensor:
        count = int(self.k * len(x) + 1e-9)  # 0.7 · 10 is 7
        if not (self.training and self.eta and count):
            return x
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stop_gradient):
            d = self.direction(x, count)
            if self.draw is None:
                moved = torch.add(x[:count], d, alpha=self.eta)
            else:
                moved = torch.addcmul(x[:count], d, self._drawn(x, count))
            x_star = torch.cat([moved, x[count:]])
        return _AsConstant.apply(x, x_star) if self.stop_gradient else x_star

    def _drawn(self, x: Tensor, count: int) -> Tensor:
        shape = (count if self.draw == "sample" else 1, *[1] * (x.ndim - 1))
        return self.eta * torch.rand(shape, device=x.device, dtype=x.dtype)


def mixup(alpha: float = 2.0, layers: Sequence[int] = (0,)) -> Loss:
    r"""Mixup and manifold mixup: features *and labels* are mixed, for the whole batch.

    :math:`\lambda\,\ell(f(\tilde h), y) + (1-\lambda)\,\ell(f(\tilde h), y_r)` with
    :math:`\tilde h = \lambda h + (1-\lambda) h_r` and one λ ~ Beta(α, α) for each batch.

    Parameters
    ----------
    alpha : float above 0
        2 in Verma et al. (2019).
    layers : ints
        In front of which modules of a sequential model h may be taken; one of them is drawn for
        each batch. ``(0,)`` mixes images (Zhang et al., 2018).

    Raises
    ------
    ValueError
        For another alpha, or without a layer.
    """
    if not (alpha > 0 and len(layers)):
        raise ValueError(f"expected alpha > 0 and a layer at least; got {alpha} and {layers}")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(model, nn.Sequential):
            raise TypeError(f"mixup cuts a Sequential in two; got {type(model).__name__}")
        layer = layers[int(torch.randint(len(layers), ()))]
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        R = torch.randperm(len(x), device=x.device)
        h = model[:layer](x)
        z = at_least_float32(model[layer:](share * h + (1 - share) * h[R]))
        return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[R])

    return loss


def _rows(x: Tensor, R: Tensor) -> Tensor:
    """x[R]; on a CPU ten times as fast, because it copies whole rows also in channels_last."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(1, -1).index_select(0, R).movedim(-1, 1)
    return x.index_select(0, R)
