"""Signs of gradient masking: that an attack failed does not say that the defense holds.

The signs are those of Athalye, Carlini & Wagner (2018, §3.1), Carlini et al. (2019) and Pintor et
al. (2022).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from .attacks.contract import attacking, relative_norm
from .attacks.gradient import pgd
from .attacks.losses import PerImageLoss, fools, objective
from .attacks.norms import project, random_point
from .evaluation import Accuracy, Robustness, Share, Split, mean_size, on_device_of, wilson


@dataclass(frozen=True)
class ZeroGradients:
    """Shares, in [0, 1], of exact zeros of the input gradient over `n` images.

    ``images``: whose whole gradient is zero, so that no gradient attack moves them; ``pixels``:
    of all pixels of all images.
    """

    images: float
    pixels: float
    n: int

    @property
    def value(self) -> float:
        return self.images

    @property
    def percent(self) -> float:
        return 100 * self.images

    @property
    def ci(self) -> tuple[float, float]:
        """95% Wilson interval of `images`."""
        return wilson(round(self.images * self.n), self.n)


def zero_gradient_share(
    model: nn.Module,
    data_split: Split,
    loss: str | PerImageLoss = "ce_textbook",
    *,
    batch_size: int = 500,
) -> ZeroGradients:
    """How much of ∇ₓ loss is exactly zero.

    The default is cross-entropy as every library computes it, which rounds to zero on confident
    images; ``"ce"`` and ``"margin"`` do not saturate, so what stays zero there is the model's.
    """
    zero_images = zero_pixels = images = pixels = 0
    for x, y in on_device_of(model, data_split, batch_size):
        with attacking(model, x, y) as logits_of:
            x = x.detach().requires_grad_()
            value, _ = objective(model, logits_of, loss)(x, y, None)
            zero = (logits_of.gradient(value, x) == 0).flatten(1)
        zero_images += int(zero.all(dim=1).sum())
        zero_pixels += int(zero.sum())
        images, pixels = images + len(x), pixels + zero.numel()
    return ZeroGradients(zero_images / images, zero_pixels / pixels, images)


def loudness(
    model: nn.Module, data_split: Split, *, batch_size: int = 500
) -> tuple[Robustness, Accuracy]:
    """How sure the model is: the mean lead, and the share of the images with probability 1.

    The lead is that of the largest logit over the second. From about 24·log 2 ≈ 17 on, float32
    stores the probability as exactly 1, and the textbook gradient of cross-entropy has lost what it
    knew of the true class. Both change when the logits are multiplied by a constant, which changes
    nothing else.
    """
    leads, ones = [], []
    for x, y in on_device_of(model, data_split, batch_size):
        with attacking(model, x, y) as logits_of:
            z = logits_of.exact(x)
        best, second = z.topk(2).values.cpu().double().unbind(dim=1)
        leads.append(best - second)
        ones.append(z.float().softmax(dim=1).gather(1, y[:, None])[:, 0] == 1)
    return mean_size(torch.cat(leads)), Accuracy(torch.cat(ones).cpu())


def attack_failures(
    model: nn.Module,
    data_split: Split,
    *,
    eps: float,
    step_size: float,
    steps: int,
    loss: str | PerImageLoss = "ce",
    batch_size: int = 500,
    seed: int = 0,
) -> dict[str, Accuracy]:
    """How a climb went wrong, image by image: three of the indicators of Pintor et al. (2022).

    They belong to an attack with its budget, not to the model alone; what they find is to be mended
    in the attack before its number is believed. The climb is the textbook loop of `pgd`.

    Returns
    -------
    dict of Accuracy
        The share of the images, with `correct` for which. ``two gradients``: asked twice at the
        same point, the model gives another one (it draws: see `attacks.eot`). ``lost success``: an
        iterate fooled the model and the last one does not, so that an attack that returns the last
        one reports robustness. ``still rising``: no iterate fooled it, and the last tenth of the
        steps, at least one, still brought a twentieth or more of the whole rise of the loss: too
        few steps, or too short ones.
    """
    found: list[Tensor] = []
    generator: torch.Generator | None = None
    for x, y in on_device_of(model, data_split, batch_size):
        generator = generator or torch.Generator(x.device).manual_seed(seed)
        with attacking(model, x, y) as logits_of:
            climb = objective(model, logits_of, loss)

            point, losses, fooled = random_point(x, eps, "linf", generator), [], []
            for step in range(steps + 1):
                point = point.detach().requires_grad_()
                value, z = climb(point, y, None)
                gradient = logits_of.gradient(value, point)
                if step == 0:
                    again = logits_of.gradient(climb(point, y, None)[0], point)
                    unstable = relative_norm(again, gradient) > 1e-3
                losses.append(value.detach())
                fooled.append(fools(z, y, None))
                point = project(point + step_size * gradient.sign(), x, eps, "linf")
        late = max(1, steps // 10)
        whole, end = losses[-1] - losses[0], losses[-1] - losses[-1 - late]
        once = torch.stack(fooled).any(dim=0)
        rising = ~once & (whole > 0) & (end >= whole / 20)
        found.append(torch.stack([unstable, once & ~fooled[-1], rising]).cpu())
    names = ("two gradients", "lost success", "still rising")
    return dict(zip(names, map(Accuracy, torch.cat(found, dim=1)), strict=True))


@dataclass(frozen=True)
class Flag:
    """One sign of masking: whether it is raised, and the two numbers (in [0, 1]) it compares."""

    sign: str
    raised: bool
    found: float
    compared_with: float

    def __repr__(self) -> str:
        mark = "RAISED" if self.raised else "clear"
        return (
            f"{mark}: {self.sign} ({100 * self.found:.1f}% against {100 * self.compared_with:.1f}%)"
        )


def masking_flags(
    *,
    fgsm: Accuracy | Share | None = None,
    pgd: Accuracy | Share | None = None,
    margin: Accuracy | Share | None = None,
    transfer: Accuracy | Share | None = None,
    black_box: Accuracy | Share | None = None,
    at_half: Accuracy | Share | None = None,
    chance: float = 0.1,
    zero_gradients: ZeroGradients | None = None,
    failures: Mapping[str, Accuracy] | None = None,
) -> list[Flag]:
    """Which signs of masking the measured accuracies raise; what was not measured is left out.

    An accuracy counts as lower than another only where their 95% intervals are apart.

    Parameters
    ----------
    fgsm, pgd : Accuracy or a mean over seeds
        One step and many steps, white-box, cross-entropy, at one ε.
    margin : Accuracy
        As `pgd`, with the margin loss: lower where cross-entropy had lost its gradient.
    transfer, black_box : Accuracy
        At the same ε, images crafted on an undefended twin, and a score-only attack.
    at_half : Accuracy
        `pgd` at ε = 0.5, where every image can be made one uniform gray.
    chance : float
        Accuracy of guessing, 1/K.
    zero_gradients : ZeroGradients or Share
        From `zero_gradient_share`; raised from 1% of the images on (our choice).
    failures : mapping from a name to Accuracy
        From `attack_failures`; raised where more than 1% of the images have one (our choice).
    """
    white_box = min(
        (a for a in (pgd, margin) if a is not None), key=lambda a: a.value, default=None
    )
    pairs = [
        ("one step is stronger than many", fgsm, pgd),
        ("the margin loss is stronger than cross-entropy", margin, pgd),
        ("transfer is stronger than white-box", transfer, white_box),
        ("black-box is stronger than white-box", black_box, white_box),
    ]
    flags = [
        Flag(sign, weak.ci[1] < strong.ci[0], weak.value, strong.value)
        for sign, weak, strong in pairs
        if weak is not None and strong is not None
    ]
    if at_half is not None:
        sign = "accuracy at ε = 0.5 is above chance"
        flags.append(Flag(sign, at_half.ci[0] > chance, at_half.value, chance))
    if zero_gradients is not None:
        sign = "the input gradient of whole images is exactly zero"
        flags.append(Flag(sign, zero_gradients.value >= 0.01, zero_gradients.value, 0.01))
    for name, share in (failures or {}).items():
        flags.append(
            Flag(f"the attack itself failed: {name}", share.ci[0] > 0.01, share.value, 0.01)
        )
    return flags


def layer_slopes(
    model: nn.Sequential, x: Tensor, *, draws: int = 8, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    r"""How steep each layer is: what a contractive network penalizes (Gu & Rigazio, 2015).

    For the pre-activations h_i of the i-th convolution or linear layer, h_0 being the images:
    :math:`\lVert \partial h_i / \partial h_{i-1} \rVert_F`, and the same relative to the lengths,
    times :math:`\lVert h_{i-1} \rVert / \lVert h_i \rVert`, which does not change when a layer is
    multiplied by a constant. Estimated as the root of the mean of
    :math:`\lVert u^\top J \rVert^2` over ``draws`` vectors u ~ N(0, I).

    Parameters
    ----------
    model : Sequential
        Looked at in eval mode.
    x : Tensor
        Images (N, C, H, W), float, in [0, 1].

    Returns
    -------
    list of (Tensor, Tensor)
        For each layer the two, (N,) each.
    """
    ends = [i + 1 for i, layer in enumerate(model) if isinstance(layer, nn.Conv2d | nn.Linear)]
    generator = torch.Generator(x.device).manual_seed(seed)
    slopes, h, modes = [], x, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start, end in pairwise([0, *ends]):
            h = h.detach().requires_grad_()
            out, squares = model[start:end](h.clone()), torch.zeros(len(x), device=x.device)
            for _ in range(draws):
                u = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
                (row,) = torch.autograd.grad(out, h, u, retain_graph=True)
                squares = squares + row.flatten(1).square().sum(dim=1)
            slope = (squares / draws) ** 0.5
            lengths = [v.detach().flatten(1).norm(dim=1) for v in (h, out)]
            slopes.append((slope, slope * lengths[0] / lengths[1]))
            h = out
    finally:
        for module, mode in modes:
            module.training = mode
    return slopes


def reach(
    features: Callable[[nn.Module, Tensor], Tensor],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 20,
    seed: int = 0,
) -> Tensor:
    r"""How far the features can be driven inside the L∞ ball, from below; (N,).

    :math:`\max_{\lVert\delta\rVert_\infty \le \epsilon} \lVert f(x + \delta) - f(x) \rVert_2` as
    PGD finds it: the λ of Proposition 2 of Mustafa et al. (2019) is at least as large.

    Parameters
    ----------
    features : callable (model, x) -> (N, d)
        Of a model in eval mode, as `fit` leaves it.
    model, x, y, eps, steps, seed
        As for `defenses.attacks.pgd`; a step is 2.5·eps/steps long.
    """
    with torch.no_grad():
        start = features(model, x.clone())

    def distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (features(model, x) - start).norm(dim=1)

    climb = partial(pgd, eps=eps, step_size=2.5 * eps / steps, steps=steps, early_stop=False)
    end = climb(model, x, y, loss=distance, seed=seed)
    with torch.no_grad():
        return distance(model, end.clone(), y)


def feature_noise(model: nn.Sequential, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    r"""How much of a perturbation is left behind each layer, after Xie et al. (2019), Fig. 2.

    :math:`\lVert f(x_{adv}) - f(x) \rVert_2 / \lVert f(x) \rVert_2` of the layer's output, which
    stays as it is when a layer is multiplied by a constant.

    Parameters
    ----------
    model : Sequential
        Looked at in eval mode.
    x, x_adv : Tensor
        Images (N, C, H, W) and their twins, in [0, 1].

    Returns
    -------
    dict of Tensor
        By the layer's name, in order; (N,) each. Of a block with an ``operation`` also what is
        left behind that alone, as ``"NAME.operation"``.
    """
    noise, features, twins = {}, x.clone(), x_adv.clone()
    with attacking(model, x), torch.no_grad():
        for name, layer in model.named_children():
            if (operation := getattr(layer, "operation", None)) is not None:
                pair = operation(twins), operation(features)
                noise[f"{name}.operation"] = relative_norm(*pair)
            features, twins = layer(features), layer(twins)
            noise[name] = relative_norm(twins, features)
    return noise


def loss_surface(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    directions: tuple[Tensor, Tensor],
    *,
    radius: float,
    points: int = 41,
    loss: str = "ce_textbook",
) -> Tensor:
    """The loss at x + a·u + b·v, clipped to [0, 1], around one image.

    So Engstrom et al. (2018), Fig. 1, looked at adversarial logit pairing.

    Parameters
    ----------
    x, y : Tensor
        One image (1, C, H, W) and its label (1,).
    directions : (u, v)
        Like `x`; there, the sign of the gradient and a random sign a pixel.
    radius : float
        a and b run over [-radius, radius], in ``points`` steps.
    loss : str
        As for `defenses.attacks.pgd`.

    Returns
    -------
    Tensor
        (points, points), a along the rows.
    """
    along = torch.linspace(-radius, radius, points, device=x.device)
    rows = []
    with attacking(model, x, y) as logits_of, torch.no_grad():
        climb = objective(model, logits_of, loss)
        steps = along[:, None, None, None]
        for a in along:
            grid = (x + a * directions[0] + steps * directions[1]).clamp(0, 1)
            rows.append(climb(grid, y.expand(points), None)[0])
    return torch.stack(rows)
