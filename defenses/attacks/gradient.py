"""Attacks that climb the loss inside an L∞ ball of radius ε: FGSM, BIM, MIM and PGD.

All four are one loop, x_{t+1} = clip(x_t + step_size · sign(g_t)), with other starts, steps and
directions. sign(0) = 0: a pixel whose gradient is exactly zero stays where it is in that step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..progress import track
from .contract import Forward, attacking, check_count, generator_for
from .cycle import Cycles
from .losses import Objective, PerImageLoss, fooled_at, fools, objective
from .norms import check_ball, per_image, random_point


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    loss: str | PerImageLoss = "ce",
    target: Tensor | None = None,
) -> Tensor:
    """Fast gradient sign method: x + ε·sign(∇ₓ loss), clipped to [0, 1].

    Goodfellow et al. (2015); Eq. 7 of Ranjan et al. (2018). Every image takes the step, fooled or
    not, so this is also the attack to train on and to transfer.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits (N, K); normalizes inside.
    x : Tensor
        Images (N, C, H, W), float32 or float64, in [0, 1].
    y : Tensor
        Labels int64 (N,).
    eps : float
        Radius of the L∞ ball, in units of pixels in [0, 1].
    loss : str or callable
        ``"ce"``, ``"ce_textbook"``, ``"margin"``, ``"dlr"``, or ``(model, x, y) -> (N,)``; see
        `defenses.attacks.losses`.
    target : Tensor, optional
        Labels (N,) to move toward; without it the attack moves away from `y`.

    Returns
    -------
    Tensor
        Images like `x`, at most `eps` away from it in every pixel, in [0, 1].

    Raises
    ------
    ValueError
        For images, labels, a budget or a model that break the above, each with the remedy.

    Examples
    --------
    On a linear network one step ends in the best corner of the box.

    >>> import torch
    >>> layer = torch.nn.Linear(4, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, -1, 1, -1], [-1.0, 1, -1, 1]])
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), layer)
    >>> x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    >>> fgsm(model, x, y, eps=0.25)
    tensor([[[[0.2500, 0.7500],
              [0.2500, 0.7500]]]])
    """
    return _attack(model, x, y, target, loss, eps, step_size=eps, steps=1, early_stop=False)


def bim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    loss: str | PerImageLoss = "ce",
    target: Tensor | None = None,
    early_stop: bool = True,
) -> Tensor:
    """Basic iterative method (Kurakin et al., 2017): `pgd` that starts at the image itself.

    Parameters, result and errors are those of `pgd`.
    """
    return _attack(model, x, y, target, loss, eps, step_size, steps, early_stop=early_stop)


def mim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    decay: float = 1.0,
    loss: str | PerImageLoss = "ce",
    target: Tensor | None = None,
    early_stop: bool = True,
) -> Tensor:
    """Momentum iterative method (Dong et al., 2018, Alg. 1): `bim` along the sign of g_t.

    g_t = decay · g_{t−1} + ∇/‖∇‖₁ (their Eq. 6). A gradient that is exactly zero adds nothing, so
    the momentum carries the image on. Parameters, result and errors are those of `pgd`.
    """
    if not decay >= 0:
        raise ValueError(f"decay is {decay}, expected >= 0")
    return _attack(model, x, y, target, loss, eps, step_size, steps, decay, early_stop=early_stop)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    random_start: bool = True,
    restarts: int = 1,
    loss: str | PerImageLoss = "ce",
    target: Tensor | None = None,
    early_stop: bool = True,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent in the L∞ ball (Madry et al., 2018).

    Every iterate is judged: the first that fools the model is kept, and its image leaves the
    batch. An image that no iterate of any restart fooled comes back at its highest loss; one that
    needs no attack (misclassified, or at its target, from the start) comes back unchanged.

    A restart ends for an image whose iterate is, bit for bit, one of before: all that would follow
    has been judged (`defenses.attacks.cycle`). Not so under autocast, with a model that draws, or
    with a loss of one's own, which may change with the step.

    Parameters
    ----------
    model, x, y, eps, loss, target
        As in `fgsm`. With `target`, success means that the model says the target.
    step_size : float
        Length of a step in every pixel, in units of pixels in [0, 1].
    steps : int
        Gradient steps a restart, at least 1.
    norm : str
        ``"linf"``. In the L2 ball, `apgd` climbs, and chooses its own steps.
    random_start : bool
        Start at a uniform draw from the ball, clipped to [0, 1], instead of at the image.
    restarts : int
        Starts an image; only images that are not fooled yet start again.
    early_stop : bool
        False runs the textbook loop, for adversarial training and transfer: every image takes all
        steps, nothing is judged, the last iterate is returned.
    seed, generator : int or torch.Generator, optional
        Where the starts are drawn from. Each restart draws for the whole batch, so an image's
        start depends on its place in the batch, and on nothing that happened to the others.

    Returns
    -------
    Tensor
        Images like `x`, at most `eps` away from it in every pixel, in [0, 1].

    Raises
    ------
    ValueError
        For images, labels, a budget or a model that break the above, each with the remedy.

    Examples
    --------
    >>> from functools import partial
    >>> import defenses
    >>> data = defenses.load_data("digits")
    >>> model = defenses.models.mnist_fast()
    >>> history = defenses.fit(model, data, epochs=2, progress=False)
    >>> x, y = data.test_images[:50] / 255, data.test_labels[:50]
    >>> x_adv = pgd(model, x, y, eps=0.3, step_size=0.03, steps=20, seed=0)
    >>> bool(((x_adv - x).abs() <= 0.3 + 1e-6).all())
    True

    As a function of three arguments, for `evaluate`, or to train on:

    >>> attack = partial(pgd, eps=0.3, step_size=0.03, steps=20, seed=0)
    >>> accuracy = defenses.evaluate(model, (x, y), attack)
    >>> accuracy.value < defenses.evaluate(model, (x, y)).value
    True
    """
    if norm != "linf":
        raise ValueError(f"norm is {norm!r}, expected 'linf': in the L2 ball take apgd(norm='l2')")
    draw = None
    if random_start:
        draw = partial(random_point, norm="linf", generator=generator_for(x, seed, generator))
    return _attack(
        model, x, y, target, loss, eps, step_size, steps, 0.0, draw, restarts, early_stop
    )


def _attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    loss: str | PerImageLoss,
    eps: float,
    step_size: float,
    steps: int,
    decay: float = 0.0,
    draw: Callable[[Tensor, float], Tensor] | None = None,
    restarts: int = 1,
    early_stop: bool = True,
) -> Tensor:
    check_count("steps", steps)
    check_count("restarts", restarts)
    check_ball(eps, "linf")
    if not (step_size > 0 or step_size == eps == 0):
        raise ValueError(f"step_size is {step_size}, expected > 0")
    if restarts > 1 and not (draw and early_stop):
        raise ValueError(
            f"restarts is {restarts}: more than one needs random_start=True and early_stop=True, "
            "without which each would do the same"
        )
    with attacking(model, x, y, target) as logits_of:
        x, y = x.detach().clone(), y.clone()
        target = None if target is None else target.clone()
        lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        climb = objective(model, logits_of, loss, judged=early_stop)
        repeats = isinstance(loss, str) and not decay and not logits_of.rounded
        ascent = _Ascent(logits_of, climb, y, target, lower, upper, step_size, decay, repeats)
        starts = (draw(x, eps) if draw else x for _ in range(restarts))
        if not early_stop:
            return ascent.last_iterate(next(starts), steps)
        x_adv = x.clone()
        height = x.new_full((len(x),), -torch.inf)  # of the loss at x_adv; inf once it fools
        if draw and len(x):
            height[fools(logits_of.exact(x), y, target)] = torch.inf
        for start in track(starts, restarts):
            ascent.first_fooling(start, steps, x_adv, height)
        return x_adv


@dataclass(frozen=True)
class _Ascent:
    logits_of: Forward
    climb: Objective
    y: Tensor
    target: Tensor | None
    lower: Tensor
    upper: Tensor
    step_size: float
    decay: float
    repeats: bool  # whether an equal iterate has an equal successor

    def last_iterate(self, x_t: Tensor, steps: int) -> Tensor:
        every, g = torch.arange(len(x_t), device=x_t.device), torch.zeros_like(x_t)
        for _ in track(range(steps), steps):
            x_t = x_t.detach().requires_grad_()
            value, _ = self.climb(x_t, self.y, self.target)
            x_t, g = self._step(x_t.detach(), self.logits_of.gradient(value, x_t), g, every)
        return x_t

    def first_fooling(self, x_t: Tensor, steps: int, x_adv: Tensor, height: Tensor) -> None:
        rows = (height < torch.inf).nonzero().squeeze(1)
        x_t, g = x_t[rows], torch.zeros_like(x_t[rows])
        cycles = Cycles(self.logits_of.model, x_t.device, self.repeats)
        for t in track(range(steps + 1), steps + 1):
            if not len(rows):
                return
            value, fooled = self._look(x_t.requires_grad_(t < steps), rows, last=t == steps)
            reached = torch.where(fooled, torch.inf, value.detach().to(height))
            higher = per_image(reached > height[rows])
            x_adv[rows] = torch.where(higher, x_t.detach(), x_adv[rows])
            height[rows] = torch.maximum(reached, height[rows])
            if t < steps:
                gradient = self.logits_of.gradient(value, x_t)
                left = cycles.left(x_t, value, fooled)
                rows = rows[left]
                x_t, g = self._step(x_t.detach()[left], gradient[left], g[left], rows)

    def _look(self, x_t: Tensor, rows: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        y, target = self.y[rows], None if self.target is None else self.target[rows]
        value, logits = self.climb(x_t, y, target)
        if last and self.logits_of.rounded:
            logits = self.logits_of.exact(x_t)
        return value, fooled_at(self.logits_of, x_t, logits, y, target)

    def _step(
        self, x_t: Tensor, gradient: Tensor, g: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        g = gradient if self.decay == 0 else self.decay * g + _unit_l1(gradient)
        x_next = x_t + self.step_size * g.sign()
        return x_next.clamp(self.lower[rows], self.upper[rows]), g


def _unit_l1(gradient: Tensor) -> Tensor:
    norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
    return gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
