r"""Jacobian regularization: penalties on J = ∂z/∂x, the K × D Jacobian of the logits.

Jakubovitz & Giryes (2018), whose equations are cited by number; the projections are Hoffman,
Roberts & Yaida's (2019), the input gradient is Ross & Doshi-Velez' (2018).
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.piecewise import Pull, linearize
from defenses.training import Loss, cross_entropy

# Our choice: rows of J pulled at once. An allocator keeps smaller buffers for the next step.
ROWS = 5


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
        return torch.stack([_squares(pull(part)) for part in u.split(ROWS)]).sum(dim=0)
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
        As in `squared_norm`: an estimate of the sum from so many directions instead of K rows.
        Either estimate is unbiased for ``"mean square"`` only: a root of it is too small on
        average (:math:`\mathbb{E}\sqrt{X} \le \sqrt{\mathbb{E}X}`), so that with few images or
        directions the other two forms penalize less than their λ says.
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

    Examples
    --------
    >>> import torch, defenses
    >>> data, model = defenses.load_data("digits"), defenses.models.mnist_fast()
    >>> adam = torch.optim.Adam(model.parameters(), 2e-3)
    >>> options = {"loss": jacobian_penalty(0.1), "optimizer": adam, "progress": False}
    >>> history = defenses.fit(model, data, epochs=1, **options)
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
        value = loss(model, x.clone(), y)
        g = torch.autograd.grad(value, x, create_graph=True)[0]
        return value + weight * len(x) * _squares(g[None]).sum()  # g_i is the mean's, 1/N of L's

    return penalized


def _squares(products: Tensor) -> Tensor:
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    return products.square().flatten(2).sum(dim=(0, 2))


def _sqrt(total: Tensor) -> Tensor:
    return total.clamp(min=torch.finfo(total.dtype).tiny).sqrt()  # a slope of 0 at 0, not inf


def _stand_in(z: Tensor) -> nn.Module:
    return cast(nn.Module, lambda x: z)


def _split(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    if type(model) is not nn.Sequential or not isinstance(model[-1], nn.Linear):
        raise ValueError("layer='features' wants an nn.Sequential whose last layer is nn.Linear")
    return model[:-1], model[-1]
