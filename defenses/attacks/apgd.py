"""APGD: projected gradient ascent that sets its own step size (Croce & Hein, 2020, Alg. 1).

The step starts at twice the radius and is halved when the loss no longer rises; the ascent then
goes on from the best point so far. There is nothing to tune but the number of steps.

In L1 a step moves the few pixels of steepest slope, fewer as the best point so far changes fewer
(Croce & Hein, 2021, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers").
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..progress import track
from .contract import Forward, attacking, check_count, generator_for
from .losses import Objective, PerImageLoss, fooled_at, fools, objective
from .norms import (
    NORMS,
    check_ball,
    per_image,
    project,
    project_l1,
    random_point,
    sparse_step,
    steepest,
)

MOMENTUM = 0.75  # α of Eq. 1
RISING = 0.75  # ρ: the share of steps that must raise the loss, or the step is halved
SHARE = 0.2  # in L1: of the pixels, how many the first steps go to
FEWER = 1.5  # what divides their number, or the step
SPARSER, SHORTEST = 0.95, 0.1  # what of a number is fewer; the last step, in ε


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str | PerImageLoss = "ce",
    target: Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD in the L∞, L2 or L1 ball (Croce & Hein, 2020, Alg. 1; in L1, 2021, Alg. 1).

    Every iterate is judged, and the first that fools the model is kept, as in `pgd`.

    In L1 two things are ours. Of the pixels that a step may go to, those are left out that are
    already at that end of [0, 1]: a step to few of them moved nothing. And where the loss has not
    risen since the last checkpoint, the next step goes to fewer pixels. Without both, some images
    of a linear model ended at 55% of the optimum; with them, all of 320 at 98% or more.
    The price: of a small network, ten steps fool fewer images than the authors' do; 50, as many.

    Parameters
    ----------
    model, x, y, loss, target, seed, generator
        As in `defenses.attacks.pgd`.
    eps : float
        Radius of the ball, in units of pixels in [0, 1].
    norm : str
        ``"linf"``, ``"l2"`` or ``"l1"``.
    steps : int
        Gradient steps a restart.
    restarts : int
        Random starts an image; only images that are not fooled yet start again.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1], at most `eps` away in `norm`: the first that fools, else that
        of the highest loss; unchanged where `x` needs no attack.

    Raises
    ------
    ValueError
        For images, labels, a budget or a model that break the above, each with the remedy.
    """
    check_ball(eps, norm, (*NORMS, "l1"))
    check_count("steps", steps)
    check_count("restarts", restarts)
    draw = generator_for(x, seed, generator)
    with attacking(model, x, y, target) as logits_of:
        x, y = x.detach().clone(), y.clone()
        target = None if target is None else target.clone()
        climb = objective(model, logits_of, loss)
        state = Progress.of(x, fools(logits_of.exact(x), y, target))
        for _ in track(range(restarts), restarts):
            start = random_point(x, eps, norm, draw)
            ascend(logits_of, climb, x, y, target, target, start, eps, norm, steps, state)
        return state.x_adv


@dataclass(frozen=True, eq=False)
class Progress:
    """What an attack has reached, image by image: shapes (N, C, H, W) and three times (N,).

    ``height`` is the loss at ``x_adv``, inf once it fools; ``spent`` counts gradients or queries.
    """

    x_adv: Tensor
    height: Tensor
    spent: Tensor

    @staticmethod
    def of(x: Tensor, fooled: Tensor) -> "Progress":
        height = x.new_full((len(x),), -torch.inf).masked_fill(fooled, torch.inf)
        return Progress(x.clone(), height, torch.zeros_like(fooled, dtype=torch.int64))

    @property
    def fooled(self) -> Tensor:
        return self.height == torch.inf


def checkpoints(steps: int) -> list[int]:
    """w_j = ⌈p_j N⌉ with p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j − p_{j−1} − .03, .06).

    In whole steps, as in the authors' code: the first wait is ⌊.22 N⌋, each next one ⌊.03 N⌋
    shorter, but never below ⌊.06 N⌋, and none of the three below 1. At N = 100 that is the same.
    """
    places, wait = [], max(int(0.22 * steps), 1)
    at, least, shorter = 0, max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    while (at := at + wait) <= steps:
        places.append(at)
        wait = max(wait - shorter, least)
    return places


def ascend(
    logits_of: Forward,
    climb: Objective,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    goal: Tensor | None,
    start: Tensor,
    eps: float,
    norm: str,
    steps: int,
    state: Progress,
) -> None:
    """One run of Alg. 1 on the images that nothing has fooled yet; updates `state`.

    In L1 a step goes to the k pixels of steepest slope, first k = 0.2 d. Every 4% of the steps k
    becomes ‖x_max − x‖₀/1.5, or k/1.5 where x_max is still the same. Where that is sparser, the
    step is ε again, from the best point; else it shrinks by 1.5, to ε/10 at least.

    `target` steers the loss; `goal` is what counts as success: None for any wrong class.
    """
    rows = (~state.fooled).nonzero().squeeze(1)
    sparse, wait = norm == "l1", max(int(0.04 * steps), 1)
    check_at = [*range(wait, steps + 1, wait)] if sparse else checkpoints(steps)
    x_t = x_old = x_max = start[rows]
    g = g_max = torch.zeros_like(x_t)
    f_max = f_checked = state.height.new_full(rows.shape, -torch.inf)
    f, eta = torch.full_like(f_max, torch.inf), torch.full_like(f_max, eps if sparse else 2 * eps)
    pixels = torch.full_like(f_max, SHARE * x.flatten(1).shape[1])  # k
    rises, halved = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    for k in track(range(steps + 1), steps + 1):
        if not len(rows):
            return
        x_t = x_t.detach().requires_grad_(k < steps)
        aim, label = (None if t is None else t[rows] for t in (target, goal))
        value, logits = climb(x_t, y[rows], aim)
        if k == steps and logits_of.rounded:
            logits = logits_of.exact(x_t)
        fooled = fooled_at(logits_of, x_t, logits, y[rows], label)
        if k < steps:
            g = logits_of.gradient(value, x_t)
            state.spent[rows] += 1
        x_t, value = x_t.detach(), value.detach().to(f)

        higher = value > f_max
        x_max, g_max = (
            torch.where(per_image(higher), new, old) for new, old in ((x_t, x_max), (g, g_max))
        )
        rises, f, f_max = rises + (value > f), value, torch.maximum(value, f_max)
        reached = torch.where(fooled, torch.inf, f_max)
        better = reached > state.height[rows]
        best = torch.where(per_image(fooled), x_t, x_max)
        state.x_adv[rows] = torch.where(per_image(better), best, state.x_adv[rows])
        state.height[rows] = torch.maximum(reached, state.height[rows])

        if k in check_at and sparse:
            changed = (x_max != x[rows]).flatten(1).sum(dim=1)
            fewer = torch.where(f_max > f_checked, changed, pixels).clamp(min=FEWER) / FEWER
            stuck, pixels = fewer < SPARSER * pixels, fewer
            eta = (eta / FEWER).clamp(min=SHORTEST * eps).masked_fill(stuck, eps)
        elif k in check_at:
            since = k - max((w for w in check_at if w < k), default=0)
            stuck = (rises < RISING * since) | (~halved & (f_checked >= f_max))
            eta = torch.where(stuck, eta / 2, eta)
        if k in check_at:
            x_t, g = (
                torch.where(per_image(stuck), best, now) for best, now in ((x_max, x_t), (g_max, g))
            )
            rises, halved, f_checked = torch.zeros_like(rises), stuck, f_max
        left = (~fooled).nonzero().squeeze(1)
        if len(left) < len(rows):
            x_t, x_old, x_max, g, g_max = (s[left] for s in (x_t, x_old, x_max, g, g_max))
            f, f_max, f_checked, eta, pixels = (s[left] for s in (f, f_max, f_checked, eta, pixels))
            rows, rises, halved = rows[left], rises[left], halved[left]
        x_0 = x[rows]
        if sparse:  # without momentum
            step = per_image(eta) * sparse_step(g, x_t, pixels.ceil().long())
            x_old, x_t = x_t, project_l1(x_t + step, x_0, eps)
            continue
        z = project(x_t + per_image(eta) * steepest(g, norm), x_0, eps, norm)
        a = MOMENTUM if k else 1.0
        x_next = project(x_t + a * (z - x_t) + (1 - a) * (x_t - x_old), x_0, eps, norm)
        x_old, x_t = x_t, x_next
