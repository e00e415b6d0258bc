r"""Penalties on the network's Jacobian J = ∂z/∂x, and the distances that it bounds.

Jakubovitz & Giryes (2018), whose equations are cited by number; the projections are Hoffman,
Roberts & Yaida's (2019), the input gradient is Ross & Doshi-Velez' (2018). x is an image in
[0, 1], z(x) the K logits, J(x) the K × D matrix of Eq. 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.contract import attacking
from defenses.evaluation import on_device_of
from defenses.models import Center
from defenses.training import Loss, cross_entropy

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
        z = model(x)

    def rows(u: Tensor) -> Tensor:
        again = torch.is_grad_enabled()
        options = {"retain_graph": True, "create_graph": again}
        return torch.stack([torch.autograd.grad(z, x, v.to(z.dtype), **options)[0] for v in u])

    return z, rows


def squared_norm(
    z: Tensor,
    pull: Pull,
    projections: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r""":math:`\lVert J(x_i) \rVert_F^2` of Eq. 5, (N,) in float32 or wider, or an estimate of it.

    With `projections` n the estimate is :math:`\frac{K}{n} \sum_{j=1}^n \lVert v_j^\top J \rVert^2`
    with orthogonal random unit vectors v, drawn anew for every image: unbiased, and exact at n = K
    (Hoffman et al., 2019, Eq. 9, whose vectors are independent).

    Parameters
    ----------
    z, pull
        As `linearize` returns them.
    projections : int, optional
        1 to K; without it, all K rows are summed.
    generator : Generator, optional
        For the draws, in place of torch's own.

    Raises
    ------
    ValueError
        For a number of projections outside 1..K.
    """
    n, classes = z.shape
    if projections is None:
        u = torch.eye(classes, dtype=z.dtype, device=z.device)[:, None].expand(-1, n, -1)
        return _squares(pull(u))
    if not 1 <= projections <= classes:
        raise ValueError(f"projections is {projections}, expected 1 to K = {classes}, or None")
    draw = torch.randn(n, classes, projections, device=z.device, generator=generator)
    v = F.normalize(draw, dim=1) if projections == 1 else torch.linalg.qr(draw).Q
    return classes / projections * _squares(pull(v.permute(2, 0, 1).to(z.dtype)))


def jacobian_penalty(
    weight: float = 0.1,
    *,
    form: str = "root mean",
    images: int | None = None,
    projections: int | None = None,
    layer: str = "logits",
    loss: Loss = cross_entropy,
) -> Loss:
    r"""Cross-entropy and λ times a norm of the Jacobian (Eq. 6), in three forms.

    With mean cross-entropy, and sums over the N images of the batch:

    - ``"root sum"``: :math:`\frac{\lambda}{N} \sqrt{\sum_i \lVert J(x_i) \rVert_F^2}`, which is
      Eq. 6 as printed, divided by N: it *sums* the cross-entropy.
    - ``"root mean"``: :math:`\lambda \sqrt{\frac{1}{N} \sum_i \lVert J(x_i) \rVert_F^2}`, whose
      strength does not depend on N. With ``images=1`` it is :math:`\lambda\lVert J(x_1)\rVert_F`,
      the authors' code.
    - ``"mean square"``: :math:`\frac{\lambda}{2N} \sum_i \lVert J(x_i) \rVert_F^2`, the form of
      Hoffman et al. (2019), Eq. 5.

    Parameters
    ----------
    weight : float, at least 0
        λ. 0.1 for MNIST and 0.5 for CIFAR-10 in the paper.
    form : str
        ``"root sum"``, ``"root mean"`` or ``"mean square"``.
    images : int, optional
        The sum runs over the first so many images of the batch, N being their number: a random
        sample, since `fit` shuffles. Without it, over all.
    projections : int, optional
        As in `squared_norm`: an unbiased estimate of the sum from so many rows instead of K.
    layer : str
        ``"logits"``, or ``"features"``: the Jacobian of the input of the model's last layer,
        :math:`J^{(L-1)}` of Appendix A; for an ``nn.Sequential`` that ends in ``nn.Linear``.
    loss : callable (model, x, y) -> scalar
        In place of cross-entropy. It may call its model on x only, and gets the logits at hand; to
        train on an attack's images as well, put this into `defenses.adversarial.adversarial`.

    Raises
    ------
    ValueError
        For a weight below 0, an unknown form or layer, or fewer than one image.
    """
    if not weight >= 0:
        raise ValueError(f"weight is {weight}, expected λ >= 0")
    if form not in ("root sum", "root mean", "mean square"):
        raise ValueError(f"form is {form!r}, expected 'root sum', 'root mean' or 'mean square'")
    if layer not in ("logits", "features"):
        raise ValueError(f"layer is {layer!r}, expected 'logits' or 'features'")
    if images is not None and images < 1:
        raise ValueError(f"images is {images}, expected at least 1, or None for the whole batch")

    def penalized(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        count = len(x) if images is None else min(images, len(x))
        body, head = (model, nn.Identity()) if layer == "logits" else _split(model)
        a, pull = linearize(body, x[:count])
        if count < len(x):
            a = torch.cat([a, body(x[count:])])
        z = head(a)
        total = squared_norm(a[:count], pull, projections).sum()
        if form == "mean square":
            penalty = total / (2 * count)
        else:
            penalty = _sqrt(total / count)
            if form == "root sum":
                penalty = penalty / math.sqrt(count)
        return loss(_stand_in(z), x, y) + weight * penalty

    return penalized


def input_gradient_penalty(weight: float = 1.0, *, loss: Loss = cross_entropy) -> Loss:
    r"""Mean cross-entropy and :math:`\frac{\lambda}{N} \sum_i \lVert\nabla_x L(x_i)\rVert_2^2`.

    Eq. 8 divided by N, after Ross & Doshi-Velez (2018), Eq. 5; the code of the latter penalizes
    half the squared gradient of the *mean* loss, which is a weight of λ/2N here.

    Parameters
    ----------
    weight : float, at least 0
        λ.
    loss : callable (model, x, y) -> scalar
        L, a mean over the images.

    Raises
    ------
    ValueError
        For a weight below 0.
    """
    if not weight >= 0:
        raise ValueError(f"weight is {weight}, expected λ >= 0")

    def penalized(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = loss(model, x, y)
        g = torch.autograd.grad(value, x, create_graph=True)[0]
        return value + weight * len(x) * _squares(g[None]).sum()  # g_i is the mean's, 1/N of L's

    return penalized


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


def boundary(
    model: nn.Module, data_split: tuple[Tensor, Tensor], *, batch_size: int = 100
) -> Boundary:
    """Measure `Boundary` in eval mode and full precision; arguments as in `evaluate`."""
    rows = []
    for x, y in on_device_of(model, data_split, batch_size):
        with attacking(model, x, y, exact=True), torch.no_grad():
            z, pull = linearize(model, x)
            u = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            J = pull(u[:, None].expand(-1, len(x), -1)).flatten(2).transpose(0, 1)
        rows.append((*_at(x.flatten(1).double(), y, z.double(), J.double()), z.argmax(1) == y))
    return Boundary(*(torch.cat(column).cpu() for column in zip(*rows, strict=True)))


def _at(x: Tensor, y: Tensor, z: Tensor, J: Tensor) -> tuple[Tensor, ...]:
    i = torch.arange(len(x), device=x.device)
    gaps = (z - z[i, y, None]).abs().scatter(1, y[:, None], torch.inf)
    slopes = (J - J[i, y, None]).norm(dim=2)
    first_order, k = (gaps / slopes).min(dim=1)  # Eq. 16
    norm, margin = J.norm(dim=(1, 2)), gaps.amin(dim=1)
    lower = margin / (math.sqrt(2) * norm)  # Eq. 17
    along = (J @ x[:, :, None]).squeeze(2).square()  # (J_k x)²
    curvature = along[i, y] - along[i, k]  # Eq. 25
    ceiling = norm.square() * x.square().sum(dim=1)  # Eq. 27
    return norm, margin, first_order, lower, curvature, ceiling


def _squares(products: Tensor) -> Tensor:
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    return products.square().flatten(2).sum(dim=(0, 2))


def _sqrt(total: Tensor) -> Tensor:
    return total.clamp(min=torch.finfo(total.dtype).tiny).sqrt()  # a slope of 0 at 0, not inf


def _stand_in(z: Tensor) -> nn.Module:
    return cast(nn.Module, lambda x: z)


def _split(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    if not isinstance(model, nn.Sequential) or not isinstance(model[-1], nn.Linear):
        raise ValueError("layer='features' wants an nn.Sequential whose last layer is nn.Linear")
    return model[:-1], model[-1]


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
        u = u.unflatten(1, x.shape[1:])
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            u = u.contiguous(memory_format=torch.channels_last)
        return u

    return layer(x), pull


def _unchanged(layer: nn.Module, x: Tensor) -> tuple[Tensor, Pull]:
    return layer(x), lambda u: u


def _mask(mask: Tensor, like: Tensor) -> Pull:
    """u ↦ u·mask, the mask in the type and the memory layout of the activations."""
    mask = torch.empty_like(like).copy_(mask.detach()).detach()
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
