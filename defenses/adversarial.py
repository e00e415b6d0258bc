"""Adversarial training as an objective (Goodfellow et al., 2015), and what has been added to it.

An objective is a callable (model, x, y) -> scalar, and takes another one where it can, so that they
compose. The attack runs against the model in eval mode and leaves no trace in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.contract import at_least_float32, attacking, crafted, refuse_if
from defenses.attacks.gradient import bim, fgsm, mim, pgd
from defenses.attacks.losses import masked
from defenses.training import Loss, cross_entropy

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

AT_THE_IMAGE = (
    "the attack of TRADES starts at the images, where the divergence has no gradient to climb: "
    "give it a random start and a radius above 0"
)


def adversarial(attack: Attack, share: float = 0.5, loss: Loss = cross_entropy) -> Loss:
    r"""The mix :math:`(1 - s)\,L(x, y) + s\,L(x_{adv}, y)` of Goodfellow et al. (2015), Section 6.

    Parameters
    ----------
    attack : callable (model, x, y) -> x_adv
        Crafts the images anew for every batch, against the model as it then is, in eval mode.
    share : float in (0, 1]
        The weight s of the adversarial images: 0.5 in the paper, 1 trains on nothing else.
    loss : callable (model, x, y) -> scalar
        The objective on either kind of image.

    Raises
    ------
    ValueError
        If share lies elsewhere.

    Examples
    --------
    >>> from functools import partial
    >>> import defenses
    >>> attack = partial(pgd, eps=0.2, step_size=0.1, steps=3, early_stop=False)
    >>> data, model = defenses.load_data("digits"), defenses.models.mnist_fast()
    >>> loss = adversarial(attack, share=1)
    >>> history = defenses.fit(model, data, epochs=1, loss=loss, progress=False)
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")

    def mixture(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hard = loss(model, crafted(attack, model, x, y), y)
        return hard if share == 1 else (1 - share) * loss(model, x, y) + share * hard

    return mixture


def mixed_batch(attack: Attack, share: float = 0.5, loss: Loss = cross_entropy) -> Loss:
    """The objective on a batch of which a share is attacked (Jakubovitz & Giryes, 2018, App. C).

    The last ⌊s·N⌋ images of the batch, which `fit` has shuffled, are replaced by what the attack
    makes of them; the others come first. All of them pass through the model as one batch.

    Parameters
    ----------
    attack, share
        As in `adversarial`; a share of 0 attacks nothing.
    loss : callable (model, x, y) -> scalar
        The objective on the whole batch.

    Raises
    ------
    ValueError
        If share lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")

    def mixture(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if count := int(share * len(x) + 1e-9):
            hard = crafted(attack, model, x[-count:], y[-count:])
            x = torch.cat([x[:-count], hard])
        return loss(model, x, y)

    return mixture


def drawn_radius(attack: Callable[..., Tensor], low: float, high: float) -> Callable[..., Tensor]:
    """The attack with ε ~ U[low, high], drawn anew for each batch (Mustafa et al., 2019, Sec. 5.1).

    Parameters
    ----------
    attack : callable (model, x, y, eps=ε) -> x_adv
        What else it takes by name is passed on.
    low, high : float
        In units of pixels. The draw comes from torch's own generator, which `fit` seeds.

    Raises
    ------
    ValueError
        Unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"expected 0 <= low <= high, got {low} and {high}")

    @wraps(attack)
    def drawn(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        eps = low + (high - low) * float(torch.rand(()))
        return attack(model, x, y, eps=eps, **options)

    return drawn


def divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """KL(softmax(z) ‖ softmax(z_adv)) of each image, in float32 or wider; (N, K) twice to (N,).

    A class that the model masks has probability 0 in both, and adds nothing.
    """
    log_p, log_q = (at_least_float32(z).log_softmax(dim=1) for z in (logits, logits_adv))
    hidden = masked(log_p)
    log_p, log_q = (log.masked_fill(hidden, 0) for log in (log_p, log_q))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def trades(attack: Callable[..., Tensor], beta: float = 6.0) -> Loss:
    r"""TRADES: :math:`CE(f(x), y) + \beta \max_{x'} KL(p(x) \,\|\, p(x'))` (Zhang et al., 2019).

    Their Eq. 5 with the KL divergence, β being their 1/λ. The attack sees no label: it climbs
    `divergence` from the prediction on the clean image. That is zero, with a zero gradient, at the
    image itself, so the attack must start elsewhere.

    Parameters
    ----------
    attack : callable (model, x, y, loss=per-image loss) -> x_adv
        All images take all steps, as in ``partial(pgd, eps=0.3, step_size=0.01, steps=40,
        early_stop=False)``.
    beta : float >= 0

    Raises
    ------
    ValueError
        If beta is negative; from the objective, if the attack stops early, or if it starts at the
        images: FGSM, BIM, MIM, PGD without a random start, and any other that never leaves them.

    Examples
    --------
    >>> from functools import partial
    >>> import torch, defenses
    >>> attack = partial(pgd, eps=0.2, step_size=0.1, steps=3, early_stop=False)
    >>> data, model = defenses.load_data("digits"), defenses.models.mnist_fast()
    >>> adam = torch.optim.Adam(model.parameters(), 2e-3)
    >>> options = {"loss": trades(attack, beta=3), "optimizer": adam, "progress": False}
    >>> history = defenses.fit(model, data, epochs=1, **options)
    """
    _check_weight("beta", beta)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if _starts_at_the_image(attack):
            raise ValueError(AT_THE_IMAGE)
        with attacking(model, x, y) as logits_of, torch.no_grad():
            held = logits_of(x)
        clean, stays = x, []

        def apart(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            if len(x) != len(held):
                raise ValueError("the attack drops images on its way: give it early_stop=False")
            if x.requires_grad:
                stays.append((x == clean).all())
            return divergence(held, model(x))

        x_adv = crafted(attack, model, x, y, loss=apart)
        if stays:
            refuse_if(torch.stack(stays).all(), AT_THE_IMAGE)
        z, z_adv = at_least_float32(model(torch.cat([x, x_adv]))).chunk(2)
        return F.cross_entropy(z, y) + beta * divergence(z, z_adv).mean()

    return objective


def _starts_at_the_image(attack: Callable[..., Tensor]) -> bool:
    options: dict[str, Any] = {}
    while inner := getattr(attack, "func", None) or getattr(attack, "__wrapped__", None):
        options = getattr(attack, "keywords", {}) | options
        attack = inner
    return attack in (fgsm, bim, mim) or (attack is pgd and not options.get("random_start", True))


def adversarial_logit_pairing(attack: Attack, weight: float = 0.5, share: float = 0.5) -> Loss:
    r"""ALP: the `adversarial` mixture :math:`+\ \lambda\,\mathrm{mean}\,(z - z_{adv})^2`.

    Kannan et al. (2018), Sec. 3.2; clean and adversarial images pass as one batch.

    Parameters
    ----------
    attack
        As in `adversarial`.
    weight : float >= 0
        λ. The mean runs over images and classes, as in the authors' code.
    share : float in [0, 1]
        The weight of the adversarial images in the cross-entropy: 0.5 in the paper; 0 is the
        "plain + ALP" and 1 the "100% AT + ALP" of Mosbach et al. (2018).

    Raises
    ------
    ValueError
        If weight is negative or share lies elsewhere.
    """
    _check_weight("weight", weight)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = crafted(attack, model, x, y)
        z, z_adv = at_least_float32(model(torch.cat([x, x_adv]))).chunk(2)
        mixture = (1 - share) * F.cross_entropy(z, y) + share * F.cross_entropy(z_adv, y)
        return mixture + weight * F.mse_loss(z, z_adv)

    return objective


def clean_logit_pairing(weight: float = 0.5) -> Loss:
    r"""CLP: cross-entropy :math:`+\ \lambda\,\mathrm{mean}\,(z_i - z_{i+N/2})^2`.

    Kannan et al. (2018), Sec. 3.3. Pairs the logits of the first half of the batch, which `fit` has
    shuffled, with those of the second, whatever the labels; the last of an odd batch has no pair.
    It belongs with images under Gaussian noise: :func:`defenses.data.gaussian_noise` is an
    augmentation for `fit`.

    Raises
    ------
    ValueError
        If weight is negative.
    """
    _check_weight("weight", weight)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z, half = at_least_float32(model(x)), len(x) // 2
        pairs = F.mse_loss(z[:half], z[half : 2 * half]) if half else 0.0
        return F.cross_entropy(z, y) + weight * pairs

    return objective


def logit_squeezing(weight: float = 0.5) -> Loss:
    r"""LSQ: cross-entropy :math:`+\ \lambda\,\mathrm{mean}\,\lVert z \rVert_2`.

    Kannan et al. (2018), Sec. 3.3. The length, not its square, as in the code of Mosbach et al.
    (2018). Used under Gaussian noise, like `clean_logit_pairing`.

    Raises
    ------
    ValueError
        If weight is negative.
    """
    _check_weight("weight", weight)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = at_least_float32(model(x))
        return F.cross_entropy(z, y) + weight * z.norm(dim=1).mean()

    return objective


def collapsed(
    history: Sequence[Mapping[str, float]], probe: str = "pgd", drop: float = 0.2
) -> int | None:
    """The first epoch whose `probe` fell by more than `drop` below that of the epoch before.

    So Wong et al. (2020), App. D, detect catastrophic overfitting: training against one step, all
    of a sudden only that one step is withstood. `history` is what `fit` returns; None if none fell.
    """
    for before, after in pairwise(history):
        if after[probe] < before[probe] - drop - 1e-9:  # for rounding
            return int(after["epoch"])
    return None


def _check_weight(name: str, weight: float) -> None:
    if not weight >= 0:
        raise ValueError(f"{name} must be at least 0, got {weight}")
