"""APGD: projected gradient ascent that sets its own step size (Croce & Hein, 2020, Alg. 1).

The step starts at twice the radius and is halved when the loss no longer rises; the ascent then
goes on from the best point so far. There is nothing to tune but the number of steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import Forward, attacking, check_count, generator_for
from .losses import Objective, PerImageLoss, fooled_at, fools, objective
from .norms import check_ball, per_image, project, random_point, steepest

MOMENTUM = 0.75  # α of Eq. 1
RISING = 0.75  # ρ: the share of steps that must raise the loss, or the step is halved


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
    """Auto-PGD in the L∞ or L2 ball (Croce & Hein, 2020, Alg. 1).

    Every iterate is judged, and the first that fools the model is kept, as in `pgd`.

    Parameters
    ----------
    model, x, y, loss, target, seed, generator
        As in `defenses.attacks.pgd`.
    eps : float
        Radius of the ball, in units of pixels in [0, 1].
    norm : str
        ``"linf"`` or ``"l2"``.
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
    check_ball(eps, norm)
    check_count("steps", steps)
    check_count("restarts", restarts)
    draw = generator_for(x, seed, generator)
    with attacking(model, x, y, target) as logits_of:
        x, y = x.detach().clone(), y.clone()
        target = None if target is None else target.clone()
        climb = objective(model, logits_of, loss)
        state = Progress.of(x, fools(logits_of.exact(x), y, target))
        for _ in range(restarts):
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
    """w_j = ⌈p_j N⌉ with p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j − p_{j−1} − .03, .06)."""
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

    `target` steers the loss; `goal` is what counts as success: None for any wrong class.
    """
    rows = (~state.fooled).nonzero().squeeze(1)
    halve_at = checkpoints(steps)
    x_t = x_old = x_max = start[rows]
    g = g_max = torch.zeros_like(x_t)
    f_max = f_checked = state.height.new_full(rows.shape, -torch.inf)
    f, eta = torch.full_like(f_max, torch.inf), torch.full_like(f_max, 2 * eps)
    rises, halved = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    for k in range(steps + 1):
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

        if k in halve_at:
            since = k - max((w for w in halve_at if w < k), default=0)
            stuck = (rises < RISING * since) | (~halved & (f_checked >= f_max))
            eta = torch.where(stuck, eta / 2, eta)
            x_t, g = (
                torch.where(per_image(stuck), best, now) for best, now in ((x_max, x_t), (g_max, g))
            )
            rises, halved, f_checked = torch.zeros_like(rises), stuck, f_max
        left = (~fooled).nonzero().squeeze(1)
        if len(left) < len(rows):
            x_t, x_old, x_max, g, g_max = (s[left] for s in (x_t, x_old, x_max, g, g_max))
            f, f_max, f_checked, eta = (s[left] for s in (f, f_max, f_checked, eta))
            rows, rises, halved = rows[left], rises[left], halved[left]
        x_0 = x[rows]
        z = project(x_t + per_image(eta) * steepest(g, norm), x_0, eps, norm)
        a = MOMENTUM if k else 1.0
        x_next = project(x_t + a * (z - x_t) + (1 - a) * (x_t - x_old), x_0, eps, norm)
        x_old, x_t = x_t, x_next
