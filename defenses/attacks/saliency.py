"""JSMA: change the pixels that the saliency map of the Jacobian puts highest, pair by pair.

Papernot et al. (2016), Alg. 2 and 3. The map needs two sums of the Jacobian's K rows, so one or two
gradients do; and of all n(n − 1)/2 pairs of pixels, only those of a few pixels can be the best one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..progress import track
from .contract import Forward, attacking, check_count, widest
from .losses import fooled_at, fools, masked, unmasked
from .norms import per_image

# Our choice: pairs of pixels compared at once, 8 MiB for each tensor of them; and the most of an
# image that needs more, 128 MiB. A photograph, every pixel of which is needed, would have 10¹⁰.
PAIRS, PAIRS_OF_ONE = 2**20, 2**24

# Our choice: a pixel that can move by less than this share of θ counts as 0 or 1. MNIST is full of
# pixels at 253/255, on which the map would spend the budget; torchattacks leaves them out, too.
SHORTEST_MOVE = 0.01


def jsma(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    theta: float = 1.0,
    gamma: float = 0.1,
    target: Tensor | Literal["next"] | None = None,
    pixels_per_step: int = 2,
    steps: int | None = None,
    revisit: bool = True,
    output: str = "softmax",
    chunk: int = 256,
) -> Tensor:
    """Jacobian-based saliency map attack: few pixels, each changed a lot.

    Each step adds θ to the most salient pair of pixels of every image, clipped to [0, 1]. An image
    leaves the batch as soon as that fools the model, or when no pair is salient.

    Parameters
    ----------
    model, x, y
        As in `defenses.attacks.fgsm`. A pixel is one of the n = C·H·W inputs.
    theta : float
        θ, what is added to a pixel: by the map of Eq. 8 if positive, of Eq. 9 if negative.
    gamma : float
        Υ, the largest share of the pixels to change: at most ⌊Υ·n / pixels_per_step⌋ steps.
    target : Tensor or "next", optional
        Labels (N,) to reach; ``"next"`` is y + 1 mod K. Without it, all K − 1 targets run side by
        side until the image is misclassified: in the fewest steps, of these with the smallest L2.
        A class whose logit at `x` is −inf is not among them, and ``"next"`` passes over it.
    pixels_per_step : int
        2 for the pairs of Alg. 3. 1 for single pixels, as in Jakubovitz & Giryes (2018), Sec. 4.3:
        with ``steps=80`` (MNIST) or 200 (CIFAR-10), and θ what they call ε (presumably).
    steps : int, optional
        Steps at most, in place of `gamma`.
    revisit : bool
        Whether a pixel can be chosen until it is 0 or 1 (Alg. 2), or only once (CleverHans).
    output : str
        F, whose Jacobian it is: ``"softmax"``, as Eq. 8 is written, or ``"logits"``, as CleverHans
        and, by report, the paper's experiments have it: the weaker, it reached 75% of the targets
        "next" instead of 90% on an MNIST network, at twice the cost.
    chunk : int
        Images, or pairs of image and target, that pass through the model at once, at most.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1]: fooling, or unchanged, where `x` fooled before or could not.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    if theta == 0 or not isfinite(theta):
        raise ValueError(f"theta is {theta}, expected > 0 to raise pixels or < 0 to lower them")
    if pixels_per_step not in (1, 2):
        raise ValueError(f"pixels_per_step is {pixels_per_step}, expected 1 or 2")
    if output not in ("softmax", "logits"):
        raise ValueError(f"output is {output!r}, expected 'softmax' or 'logits'")
    if isinstance(target, str) and target != "next":
        raise ValueError(f"target is {target!r}, expected labels (N,), 'next' or None")
    check_count("chunk", chunk)
    with attacking(model, x, y, target if isinstance(target, Tensor) else None) as logits_of:
        steps = _steps(prod(x.shape[1:]), gamma, pixels_per_step, steps)
        search = _Search(logits_of, theta, pixels_per_step, revisit, output)
        x_adv = x.detach().clone()
        for start in track(range(0, len(x), chunk), -(-len(x) // chunk)):
            rows = torch.arange(start, min(start + chunk, len(x)), device=x.device)
            logits = logits_of.exact(x_adv[rows])
            if isinstance(target, Tensor):
                t = target[rows, None]
            else:
                others = torch.arange(1, logits.shape[1], device=x.device)
                t = unmasked(logits, (y[rows, None] + others) % logits.shape[1])
                t = t[:, :1] if target else t
            todo = ~fools(logits, y[rows], None if target is None else t[:, 0])
            todo &= ~masked(logits.gather(1, t[:, :1])).squeeze(1)
            rows, t = rows[todo], t[todo]
            few = max(1, chunk // t.shape[1])
            for i, t_i in zip(rows.split(few), t.split(few), strict=True):
                parts = t_i.split(chunk, dim=1)  # more than one: of a single image
                x_adv[i] = search.first_of(x_adv[i], y[i], parts, steps, target is not None)
        return x_adv


def _steps(n: int, gamma: float, pixels_per_step: int, steps: int | None) -> int:
    if steps is None:
        if not pixels_per_step <= gamma * n <= n:
            raise ValueError(
                f"gamma is {gamma}, expected at most 1, and {pixels_per_step} of the {n} pixels or "
                "more: else there is no step to take"
            )
        return int(gamma * n / pixels_per_step)
    if pixels_per_step > n:
        raise ValueError(f"pixels_per_step is {pixels_per_step}, more than the {n} of an image")
    check_count("steps", steps)
    return steps


@dataclass(frozen=True)
class _Search:
    logits_of: Forward
    theta: float
    pixels_per_step: int
    revisit: bool
    output: str

    def first_of(
        self, x: Tensor, y: Tensor, parts: Sequence[Tensor], steps: int, targeted: bool
    ) -> Tensor:
        """`first_fooling` over all parts of the targets: in the fewest steps, then the nearest."""
        x_adv, step, l2 = self.first_fooling(x, y, parts[0], steps, targeted)
        for t in parts[1:]:
            most = int(min(steps, float(step)))
            other, *how = self.first_fooling(x, y, t, most, targeted)
            if [float(v) for v in how] < [float(step), float(l2)]:
                x_adv, (step, l2) = other, how
        return x_adv

    def first_fooling(
        self, x: Tensor, y: Tensor, t: Tensor, steps: int, targeted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Alg. 2 for every image and each of its T targets `t` (N, T), side by side.

        Returns what fooled first, after how many steps (N,) and at which L2 (N,); inf if nothing.
        """
        x_adv, rows = x.clone(), torch.arange(len(x), device=x.device)
        taken, l2 = x.new_full((2, len(x)), torch.inf)
        x_t = x[:, None].repeat(1, t.shape[1], 1, 1, 1)
        domain = torch.ones_like(x_t.flatten(2), dtype=torch.bool)  # Γ
        for step in track(range(steps + 1), steps + 1):
            if not len(rows):
                break
            last = step == steps
            images = x_t.flatten(0, 1).requires_grad_(not last)
            own, goal = y[:, None].expand_as(t).flatten(), t.flatten()
            judge = self.logits_of.exact if last and self.logits_of.rounded else self.logits_of
            logits = judge(images)
            fooled = fooled_at(self.logits_of, images, logits, own, goal if targeted else None)
            fooled = fooled.view_as(t)
            done = fooled.any(dim=1)
            size = (x_t - x[:, None]).flatten(2).norm(dim=2).masked_fill(~fooled, torch.inf)
            nearest = x_t[torch.arange(len(rows), device=x.device), size.argmin(dim=1)]
            x_adv[rows] = torch.where(per_image(done), nearest, x_adv[rows])
            taken[rows], l2[rows] = torch.where(done, step, torch.inf).to(l2), size.amin(dim=1)
            if last:
                break
            u, v = self._derivatives(images, logits, goal)
            u, v = (s.reshape(domain.shape) for s in (u, v))
            x_t, domain, salient = self._change(x_t, domain, u, v)
            left = (salient.any(dim=1) & ~done).nonzero().squeeze(1)
            rows, x, y, t, x_t, domain = (s[left] for s in (rows, x, y, t, x_t, domain))
        return x_adv, taken, l2

    def _derivatives(self, images: Tensor, logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """∂F_t/∂x and −Σ_{j≠t} ∂F_j/∂x, times the sign of θ."""
        sign = 1 if self.theta > 0 else -1
        if self.output == "softmax":
            # Probabilities sum to 1, so both are ∂F_t, which is F_t·∂log F_t; the factor F_t > 0
            # changes no choice, and may round to 0.
            log_f = logits.log_softmax(dim=1).gather(1, t[:, None])
            u = self.logits_of.gradient(sign * log_f.squeeze(1), images)
            return u, u
        f_t = logits.gather(1, t[:, None]).squeeze(1)
        u = self.logits_of.gradient(sign * f_t, images, keep_graph=True)
        total = logits.masked_fill(masked(logits), 0).sum(dim=1)
        return u, self.logits_of.gradient(sign * (f_t - total), images)

    def _change(
        self, x_t: Tensor, domain: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pixels = x_t.flatten(2)
        room = 1 - pixels if self.theta > 0 else pixels
        domain = domain & (room >= SHORTEST_MOVE * min(1, abs(self.theta)))
        u, v = (s.masked_fill(~domain, -torch.inf).flatten(0, 1) for s in (u, v))
        choose = most_salient_pair if self.pixels_per_step == 2 else most_salient_pixel
        chosen, salient = (s.unflatten(0, domain.shape[:2]) for s in choose(u, v))
        step = self.theta * salient[..., None].to(pixels).expand(chosen.shape)
        pixels = pixels.scatter_add(2, chosen, step).clamp(0, 1)
        if not self.revisit:
            domain = domain.scatter(2, chosen, False)
        return pixels.view_as(x_t), domain, salient


def most_salient_pixel(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The p with the highest u_p·v_p, both positive; result as in `most_salient_pair`."""
    saliency = u.clamp(min=0).to(widest(u.device)) * v.clamp(min=0)
    p = saliency.argmax(dim=1, keepdim=True)
    return p, saliency.gather(1, p).squeeze(1) > 0


def most_salient_pair(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The pair p ≠ q with the highest (u_p + u_q)(v_p + v_q), both sums positive (Alg. 3).

    Found among few: where two other pixels are at least as high as p in u and in v, one of them is
    not q, and in the place of p it lowers neither sum. So of the pixels sorted by u only those are
    needed whose v exceeds the second highest before them (every exchange moves to an earlier
    place, so they end): 9 of 784 in the mean on an MNIST network, at most 42.

    Parameters
    ----------
    u, v : Tensor
        ∂F_t/∂x and −Σ_{j≠t} ∂F_j/∂x (N, n), with n >= 2; −inf outside of the search domain.

    Returns
    -------
    pair : Tensor
        p and q, int64 (N, 2). Of equal pairs always the same, whatever else is in the batch.
    salient : Tensor
        Whether there is such a pair, bool (N,).
    """
    u, order = u.sort(dim=1, descending=True, stable=True)
    v = v.gather(1, order)
    second = torch.minimum(v[:, 1:], v.cummax(dim=1).values[:, :-1]).cummax(dim=1).values
    needed = F.pad(v[:, 2:] > second[:, :-1], (2, 0), value=True)
    row, place = needed.nonzero(as_tuple=True)
    slot = needed.cumsum(dim=1)[row, place] - 1
    width = int(slot.max()) + 1
    u_c, v_c = u.new_full((2, len(u), width), -torch.inf, dtype=widest(u.device))
    u_c[row, slot], v_c[row, slot] = u[row, place].to(u_c), v[row, place].to(v_c)
    pixel = order.new_zeros(u_c.shape).index_put((row, slot), order[row, place])
    best, highest = torch.zeros_like(order[:, 0]), torch.zeros_like(u_c[:, 0])
    strip = min(width, max(1, PAIRS_OF_ONE // width))  # of the first pixels; mostly all
    for rows in torch.arange(len(u), device=u.device).split(max(1, PAIRS // width**2)):
        for first in range(0, width, strip):
            alpha = u_c[rows, first : first + strip, None] + u_c[rows, None, :]
            minus_beta = v_c[rows, first : first + strip, None] + v_c[rows, None, :]
            allowed = (alpha > 0) & (minus_beta > 0)
            saliency = torch.where(allowed, alpha * minus_beta, 0).triu(diagonal=1 + first)
            value, pair = saliency.flatten(1).max(dim=1)
            best[rows] = torch.where(value > highest[rows], first * width + pair, best[rows])
            highest[rows] = torch.maximum(value, highest[rows])
    return pixel.gather(1, torch.stack([best // width, best % width], dim=1)), highest > 0
