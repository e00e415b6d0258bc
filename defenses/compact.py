"""Compact convolution and the L2-softmax head (Ranjan et al., 2017: Eqs. 1 and 6, Fig. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair


class CompactConv2d(nn.Conv2d):
    r"""Convolution of L2-normalized, rescaled patches (Eq. 6).

    .. math:: \tilde y(n) = W^\top \frac{\alpha\, x_{n,k}}{\|x_{n,k}\|_2 + \delta} + b

    As in Fig. 4, the normalization is moved behind the convolution: convolve, then divide each
    position by its patch's norm. No patch is ever copied out.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, bias
        As for :class:`torch.nn.Conv2d` (zero padding, no groups, no dilation).
    alpha : float
        The scale at the start of training. The paper does not say it; of 1, 4, 16, 1 comes nearest.
    delta : float
        Keeps a blank patch from dividing by zero; 0.01 in the paper (Sec. 4). Must be positive.
    learn_alpha : bool
        Whether the scale is learned, one scalar a layer, as in the paper.

    Shape
    -----
    (N, in_channels, H, W) to (N, out_channels, H', W').

    Examples
    --------
    It does not see contrast, but for the constant `delta`:

    >>> import torch
    >>> layer = CompactConv2d(1, 8, 3, delta=1e-6)
    >>> x = torch.rand(2, 1, 9, 9)
    >>> torch.allclose(layer(x), layer(x / 10), atol=1e-3)
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        *,
        alpha: float = 1.0,
        delta: float = 0.01,
        learn_alpha: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.alpha, self.delta = _scale(alpha, learn_alpha), _positive(delta)

    def forward(self, x: Tensor) -> Tensor:
        norm = patch_norm(x, self.kernel_size, self.stride, self.padding)  # type: ignore[arg-type]
        scale = self.alpha / (norm + self.delta)
        y = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return _scale_and_shift(y, scale, None if self.bias is None else self.bias[:, None, None])


class CompactLinear(nn.Linear):
    r"""Linear layer on L2-normalized, rescaled features: Eq. 6 where the patch is the whole input.

    As a network's last layer, with ``delta`` tending to 0, it is the L2-softmax head of Eq. 1:
    logits :math:`W_j^\top (\alpha x / \|x\|_2) + b_j`.

    Shape: (N, in_features) to (N, out_features). Parameters as for :class:`CompactConv2d`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        alpha: float = 1.0,
        delta: float = 0.01,
        learn_alpha: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.alpha, self.delta = _scale(alpha, learn_alpha), _positive(delta)

    def forward(self, x: Tensor) -> Tensor:
        norm = patch_norm(x[..., None, None], 1)[..., 0, 0]  # every feature a channel
        scale = self.alpha / (norm + self.delta)
        return _scale_and_shift(F.linear(x, self.weight), scale, self.bias)


def patch_norm(
    x: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
) -> Tensor:
    r"""The L2 norm of every patch that a convolution sees: the second branch of Fig. 4.

    Parameters
    ----------
    x : Tensor, (N, C, H, W)
    kernel_size, stride, padding : int or pair
        Those of the convolution.

    Returns
    -------
    Tensor, (N, 1, H', W'), in float32 or x's wider type. Both derivatives at a blank patch are 0.

    Raises
    ------
    ValueError
        If a patch is larger than the padded image.
    """
    k, s, p = _pair(kernel_size), _pair(stride), _pair(padding)
    size = x.shape[-2:]
    if size[0] + 2 * p[0] < k[0] or size[1] + 2 * p[1] < k[1]:
        raise ValueError(
            f"no patch of {k} fits into images of {tuple(size)} padded by {p}: "
            "give larger images or a smaller kernel"
        )
    return _PatchNorm.apply(x, k, s, p)


class _PatchNorm(torch.autograd.Function):
    r"""Keeps x and the norms r for the backward pass; autograd would keep every square.

    With :math:`r_n^2 = \sum_{i \in n} x_i^2`:
    :math:`\partial L / \partial x_i = x_i \sum_{n \ni i} g_n / r_n`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel_size, stride, padding) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=-3, keepdim=True).to(dtype).square()
        ph, pw = padding
        return _window_sums(F.pad(squares, (pw, pw, ph, ph)), kernel_size, stride).sqrt()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, *ctx.geometry = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx, g):
        x, r = ctx.saved_tensors
        g = g / torch.where(r == 0, torch.inf, r)  # nothing flows to a blank patch
        g = _window_sums_adjoint(g, x.shape[-2:], *ctx.geometry)
        return x * g.to(x.dtype), None, None, None


# On a CPU every operation waits for all its threads: hence few of them, and additions of views.


def _window_sums(s: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    for axis in (-1, -2):
        first, *others = s.unfold(axis, size[axis], stride[axis]).unbind(-1)
        s = sum(others, start=first)
    return s


def _window_sums_adjoint(g: Tensor, shape, size, stride, padding) -> Tensor:
    (h, w), (kh, kw), (sh, sw), (ph, pw) = shape, size, stride, padding
    if stride != (1, 1):  # put back the positions that the stride skipped
        spread = F.pad(g[..., None, :, None], (0, sw - 1, 0, 0, 0, sh - 1))
        g = spread.reshape(*g.shape[:-2], g.shape[-2] * sh, g.shape[-1] * sw)
    right, below = w + pw - g.shape[-1], h + ph - g.shape[-2]
    return _window_sums(F.pad(g, (kw - 1 - pw, right, kh - 1 - ph, below)), size, (1, 1))


def _scale_and_shift(y: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    scale = scale.to(y.dtype)
    return y * scale if shift is None else _ScaleAndShift.apply(y, scale, shift.to(y.dtype))


class _ScaleAndShift(torch.autograd.Function):
    """``addcmul`` without its factor, by which autograd would multiply the maps once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift, y, scale)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        y, scale, shift = ctx.saved_tensors
        to_scale = (g * y).sum_to_size(scale.shape)
        return g * scale, to_scale, g.sum_to_size(shift.shape)


def _scale(alpha: float, learn: bool) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(alpha)), requires_grad=learn)


def _positive(delta: float) -> float:
    if not delta > 0:
        raise ValueError(f"delta must be positive, or a blank patch divides by zero; got {delta}")
    return delta
