"""Carlini & Wagner in L2: the smallest perturbation that fools, by gradient descent.

Carlini & Wagner (2017), Sec. V and VI A, with their numbers of equations and objectives; the
second-most-likely target is that of Ranjan et al. (2018), Sec. 7.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..progress import track
from .contract import Forward, attacking, check_count
from .losses import fools, margin, runners_up
from .norms import per_image

# Our choice, the paper's is almost 1: s in x = 1/2 + tanh(s·w)/2s. Where s is 1, pixels at 0 and 1
# lie where tanh is flat and hardly move. On 200 MNIST images (c = 10, 200 steps of 0.01) 0.9
# fooled all where 0.999999 fooled 95%, at 70% of the distance; it cost 1% on 30 CIFAR images.
SHRINK = 0.9

# Our choice: the share of the steps after which an image leaves whose loss did not fall by 0.01%.
# The authors' code asks the whole batch after a tenth, which is too soon for a single image: it
# overshoots the boundary and comes back; on the same images 0.1 left the distance 23% longer.
PATIENCE = 0.3

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's own
LARGEST = 1e18  # what Adam can square in float32; beyond, its step has the learning rate's length
LOOKS_AT_SEGMENT = 10  # our choice: to 0.2% of the distance


def carlini_wagner(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    c: float = 1e-2,
    binary_search_steps: int = 9,
    steps: int = 1000,
    learning_rate: float = 1e-2,
    kappa: float = 0.0,
    target: Tensor | str | None = None,
) -> Tensor:
    """C&W, L2: minimize ‖δ‖₂² + c·f(x + δ) with Adam, f = max(max_{j≠t} Z_j − Z_t, −κ).

    Without a target, f = max(Z_y − max_{j≠y} Z_j, −κ). Of all iterates of all search steps, the
    nearest that fools is kept and pulled back along the segment to `x` as far as it still fools:
    a bisection of ten forward passes which only shortens δ, by about 2% on MNIST. It is judged in
    full precision. An image that no iterate fooled, or that was misclassified (or at its target)
    from the start, comes back unchanged.

    Under the caller's autocast the descent is rounded, the judgment is not: where the two
    disagree for an image, its descent is repeated in full precision.

    Parameters
    ----------
    model, x, y
        As in `defenses.attacks.fgsm`.
    c : float
        Weight of f against the squared distance; where the search starts.
    binary_search_steps : int
        Values of c an image: ten times the last one until one fools, then halfway between the
        largest that did not and the smallest that did. 1 keeps `c` fixed.
    steps : int
        Iterates for each c, at most.
    learning_rate : float
        Adam's, in units of the tanh variable w: the step of a mid-gray pixel is half of it.
    kappa : float
        κ, the confidence: the lead in logits that the returned image has.
    target : Tensor or str, optional
        Labels (N,) to move to, or ``"second"``: the class other than `y` with the highest logit
        at `x`. Without it the attack moves away from `y`.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1].

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    check_count("binary_search_steps", binary_search_steps)
    check_count("steps", steps)
    for name, value in {"c": c, "learning_rate": learning_rate}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}, expected a finite number > 0")
    if not 0 <= kappa < float("inf"):
        raise ValueError(f"kappa is {kappa}, expected a finite number >= 0, in units of logits")
    if isinstance(target, str) and target != "second":
        raise ValueError(f"target is {target!r}, expected a tensor of labels, 'second' or None")
    goal = None if isinstance(target, str) else target
    with attacking(model, x, y, goal) as logits_of:
        x_adv = x.detach().clone()
        if not len(x):
            return x_adv
        logits = logits_of.exact(x_adv)
        if isinstance(target, str):
            goal = runners_up(logits, y, 1).squeeze(1)
        rows = (~fools(logits, y, goal)).nonzero().squeeze(1)
        label, sign = (y[rows], 1.0) if goal is None else (goal[rows], -1.0)
        search = _Search(logits_of, x_adv[rows], label, sign, kappa, steps, learning_rate)

        best = x_adv.new_full((len(rows),), torch.inf)
        c_i, lower, upper = torch.full_like(best, c), torch.zeros_like(best), best
        for _ in track(range(binary_search_steps), binary_search_steps):
            x_c, distance = search.nearest(torch.arange(len(rows), device=x.device), c_i)
            nearer = distance < best
            x_adv[rows] = torch.where(per_image(nearer), x_c, x_adv[rows])
            best = torch.minimum(distance, best)
            fooled = distance.isfinite()
            lower, upper = torch.where(fooled, lower, c_i), torch.where(fooled, c_i, upper)
            c_i = torch.where(upper.isfinite(), (lower + upper) / 2, 10 * c_i).clamp(max=1e10)
        return x_adv


@dataclass(frozen=True)
class _Search:
    logits_of: Forward
    x: Tensor
    label: Tensor  # y or, where sign is −1, the target
    sign: float
    kappa: float
    steps: int
    learning_rate: float

    def nearest(self, rows: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest fooling images that the weights `c` lead to, and ‖δ‖₂: inf where none."""
        found, reached = self._descend(rows, c)
        x_c, distance = self._pulled_back(rows, found)
        if self.logits_of.rounded:
            again = (reached & distance.isinf()).nonzero().squeeze(1)
            if len(again):
                with torch.autocast(self.x.device.type, enabled=False):
                    found, _ = self._descend(rows[again], c[again])
                x_c[again], distance[again] = self._pulled_back(rows[again], found)
        return x_c, distance

    def _descend(self, rows: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest iterates that reached f = −κ, where one did, and whether."""
        x, place = self.x[rows], torch.arange(len(rows), device=rows.device)
        found, reached = x.clone(), torch.zeros_like(rows, dtype=torch.bool)
        w, w_max = (torch.atanh(SHRINK * s) / SHRINK for s in (2 * x - 1, torch.ones_like(x[:1])))
        m, v, x_best, at = torch.zeros_like(w), torch.zeros_like(w), x, reached
        best = lowest = c.new_full((len(c),), torch.inf)
        since = torch.zeros_like(rows)
        for t in track(range(1, self.steps + 1), self.steps):
            if not len(rows):
                break
            tanh = (SHRINK * w).tanh()
            x_t = (0.5 + tanh / (2 * SHRINK)).clamp(0, 1)
            f, slope, at = self._f(x_t, rows, at)
            squared = (x_t - x).square().sum(dim=(1, 2, 3))
            nearer = at & (squared < best)
            best = torch.where(nearer, squared, best)
            x_best = torch.where(per_image(nearer), x_t, x_best)

            gradient = (2 * (x_t - x) + per_image(c) * slope) * (1 - tanh.square()) / 2
            gradient = gradient.clamp(-LARGEST, LARGEST)
            m, v = m.lerp(gradient, 1 - BETA_1), v.lerp(gradient.square(), 1 - BETA_2)
            m_hat, v_hat = m / (1 - BETA_1**t), v / (1 - BETA_2**t)
            w = w - self.learning_rate * m_hat / (v_hat.sqrt() + EPSILON)
            w = w.clamp(-w_max, w_max)  # beyond, the pixel would leave [0, 1]

            loss = squared + c * (f + self.kappa)
            since = torch.where(loss < lowest * (1 - 1e-4), 0, since + 1)
            lowest = torch.minimum(loss, lowest)
            if t % 10 == 0 or t == self.steps:  # a GPU would wait for the host at each
                found[place], reached[place] = x_best, best.isfinite()
                stay = (since < max(10, PATIENCE * self.steps)).nonzero().squeeze(1)
                place, rows, x, c, w, m, v, x_best, best, at, since, lowest = (
                    s[stay] for s in (place, rows, x, c, w, m, v, x_best, best, at, since, lowest)
                )
        return found, reached

    def _f(self, x_t: Tensor, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f and ∇f at `x_t`, and where f = −κ: there ∇f = 0, and needs no backward pass.

        Images `at` which that was so one step ago are looked at first, and differentiated only
        if it is no longer so. A GPU would wait for the host; it differentiates all.
        """
        at, off = at.clone(), torch.arange(len(rows), device=rows.device)
        if x_t.device.type == "cpu":
            on = at.nonzero().squeeze(1)
            if len(on):
                with torch.no_grad():
                    at[on] = self._reaches(self.logits_of(x_t[on]), rows[on])
            off = (~at).nonzero().squeeze(1)
        f, slope = torch.full_like(rows, -self.kappa, dtype=x_t.dtype), torch.zeros_like(x_t)
        if len(off):
            x_off = x_t[off].detach().requires_grad_()
            logits = self.logits_of(x_off)
            at[off] = self._reaches(logits.detach(), rows[off])
            lead = self.sign * margin(logits, self.label[rows[off]])
            f_off = torch.where(at[off], -self.kappa, -lead)  # at a tie, too, ∇f leads on
            slope[off] = self.logits_of.gradient(f_off, x_off).nan_to_num(nan=0.0)
            f[off] = f_off.detach().to(f)
        return f, slope, at

    def _reaches(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Whether the images still fool after κ was taken from their lead."""
        label = self.label[rows]
        kappa = logits.new_full((len(rows), 1), self.sign * self.kappa)
        logits = logits.scatter_add(1, label[:, None], kappa)
        return fools(logits, label, None if self.sign > 0 else label)

    def _pulled_back(self, rows: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Images on the segments x + τ·(found − x), as near to x as bisection finds that fool.

        What fooled only in rounded passes may need τ > 1.
        """
        x = self.x[rows]
        delta, tau = found - x, torch.ones_like(x[:, 0, 0, 0])
        low, high = torch.zeros_like(tau), torch.full_like(tau, torch.inf)
        x_c = x.clone()
        for _ in range(LOOKS_AT_SEGMENT):
            x_tau = (x + per_image(tau) * delta).clamp(0, 1)
            reached = self._reaches(self.logits_of.exact(x_tau), rows)
            x_c = torch.where(per_image(reached), x_tau, x_c)
            low, high = torch.where(reached, low, tau), torch.where(reached, tau, high)
            tau = torch.where(high.isfinite(), (low + high) / 2, 1.02 * tau)
        distance = (x_c - x).flatten(1).norm(dim=1)
        return x_c, torch.where(high.isfinite(), distance, torch.inf)
