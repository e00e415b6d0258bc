r"""A network around one image: the logits, and the Jacobian as a product of its layers.

Convolutions, linear layers, ReLU, max pooling and dropout are linear as long as no unit switches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.models import Center

Pull = Callable[[Tensor], Tensor]


def linearize(model: nn.Module, x: Tensor) -> tuple[Tensor, Pull]:
    r"""z(x), and the map that takes cotangents u to the products :math:`u^\top J(x)` (Eq. 4).

    A network of convolutions, linear layers, ReLU, pooling and dropout is linear around almost
    every x: J is a product of its weights and of masks. The map multiplies by them from the left,
    all cotangents at once, in operations whose *first* derivative is all that a penalty needs; so
    it is faster than differentiating twice, and ``torch.compile`` takes it. Any other model is
    differentiated by autograd, twice.

    Parameters
    ----------
    model : Module
        In its present mode: under dropout, J is that of the thinned network whose logits these are.
    x : Tensor, (N, C, H, W)

    Returns
    -------
    logits : Tensor, (N, K)
    pull : callable
        From (m, N, K) to (m, N, C, H, W), differentiable with respect to the weights.
    """
    layers = list(_flat(model))
    if all(type(layer) in _RULES and _supported(layer) for layer in layers):
        for i, (first, second) in enumerate(itertools.pairwise(layers)):
            if type(first) is nn.ReLU and type(second) is nn.MaxPool2d:  # they commute
                layers[i : i + 2] = second, first  # the smaller map is the cheaper to mask
        pulls = []
        for layer in layers:
            x, pull = _RULES[type(layer)](layer, x)
            pulls.append(pull)

        def product(u: Tensor) -> Tensor:
            count, u = len(u), u.flatten(0, 1)
            for pull in reversed(pulls):
                u = pull(u)
            return u.unflatten(0, (count, -1))

        return x, product

    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = model(x.clone())  # it may write in what it is given

    def rows(u: Tensor) -> Tensor:
        again = torch.is_grad_enabled()
        options = {"retain_graph": True, "create_graph": again}
        return torch.stack([torch.autograd.grad(z, x, v.to(z.dtype), **options)[0] for v in u])

    return z, rows


def _flat(model: nn.Module) -> Iterator[nn.Module]:
    if type(model) is nn.Sequential:
        for layer in model:
            yield from _flat(layer)
    else:
        yield model


# Each rule runs a layer and returns its output and the map from (m·N, outputs) to (m·N, inputs).


def _linear(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Pull]:
    return layer(x), lambda u: u @ layer.weight.to(u.dtype)


def _convolution(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Pull]:
    a, s = layer(x), layer.stride
    span = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    p = [int(padding) for padding in layer.padding]
    rest = [(x.shape[i + 2] + 2 * p[i] - span[i]) % s[i] for i in (0, 1)]  # never looked at

    def pull(u: Tensor) -> Tensor:
        w = layer.weight.to(u.dtype)
        return F.conv_transpose2d(u, w, None, s, p, rest, layer.groups, layer.dilation)

    return a, pull


def _relu(layer: nn.ReLU, x: Tensor) -> tuple[Tensor, Pull]:
    a = x.relu()
    return a, _mask(a > 0, a)


def _dropout(layer: nn.Dropout, x: Tensor) -> tuple[Tensor, Pull]:
    kept = F.dropout(torch.ones_like(x), layer.p, layer.training)
    return x * kept, _mask(kept, x)


def _max_pool(layer: nn.MaxPool2d, x: Tensor) -> tuple[Tensor, Pull]:
    k = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * 2
    a, index = F.max_pool2d(x, k, return_indices=True)
    ones = torch.ones_like(a, memory_format=torch.contiguous_format)
    masked = _mask(F.max_unpool2d(ones, index.contiguous(), k, output_size=x.shape[-2:]), x)

    def pull(u: Tensor) -> Tensor:
        u = F.interpolate(u, scale_factor=tuple(map(float, k)), mode="nearest")
        right, bottom = x.shape[-1] - u.shape[-1], x.shape[-2] - u.shape[-2]
        return masked(F.pad(u, (0, right, 0, bottom)) if right or bottom else u)

    return a, pull


def _flatten(layer: nn.Flatten, x: Tensor) -> tuple[Tensor, Pull]:
    def pull(u: Tensor) -> Tensor:
        u = u.reshape(-1, *x.shape[1:])
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            u = u.contiguous(memory_format=torch.channels_last)
        return u

    return layer(x), pull


def _unchanged(layer: nn.Module, x: Tensor) -> tuple[Tensor, Pull]:
    return layer(x), lambda u: u


def _mask(mask: Tensor, like: Tensor) -> Pull:
    """u ↦ u·mask, the mask in the type and the memory layout of the activations."""
    mask = torch.empty_like(like).copy_(mask.detach())
    return lambda u: (u.unflatten(0, (-1, len(mask))) * mask.to(u.dtype)).flatten(0, 1)


_RULES: dict[type[nn.Module], Callable[[Any, Tensor], tuple[Tensor, Pull]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ReLU: _relu,
    nn.Dropout: _dropout,
    nn.MaxPool2d: _max_pool,
    nn.Flatten: _flatten,
    nn.Identity: _unchanged,
    Center: _unchanged,
}


def _supported(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.MaxPool2d):
        plain = (layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
        return plain == (layer.kernel_size, 0, 1, False)
    return True
