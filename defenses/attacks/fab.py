"""FAB: walk along the decision boundary toward the image (Croce & Hein, 2020b, Alg. 1).

Like DeepFool, each step goes to the linearized boundary; unlike DeepFool it is exact inside the
box [0, 1], it is drawn back toward the original image, and it goes on after the first success.
"""

import torch
from torch import Tensor, nn

from ..progress import track
from .apgd import Progress
from .contract import Forward, attacking, check_count
from .losses import LEAD, fools, lead, masked, runners_up
from .norms import check_norm, per_image, size

ALPHA_MAX = 0.1  # the strongest pull toward the original image
ETA = 1.05  # overshoot beyond the linearized boundary
BETA = 0.9  # after a success, this share of the way is left


def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    steps: int = 100,
    targets: int = 9,
    eps: float | None = None,
) -> Tensor:
    """FAB-T, the fast adaptive boundary attack, of minimal size in L∞ or L2.

    Croce & Hein (2020, "Minimally distorted adversarial examples"), toward one class at a time
    and from the image itself, as in AutoAttack. Autocast is off: a rounded boundary would be
    another one.

    Parameters
    ----------
    model, x, y
        As in `defenses.attacks.pgd`.
    norm : str
        ``"linf"`` or ``"l2"``: what is made small.
    steps : int
        Steps toward each class.
    targets : int
        Classes to walk to: those with the highest logits at `x`, other than `y`.
    eps : float, optional
        A radius that suffices: an image leaves as soon as it is fooled within it, and one that is
        fooled only farther away comes back unchanged.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1]: misclassified, the nearest that was found, or unchanged, where
        `x` was misclassified before or could not be fooled.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    check_norm(norm)
    check_count("steps", steps)
    check_count("targets", targets)
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a radius >= 0 or None")
    with attacking(model, x, y, exact=True) as logits_of:
        x, y = x.detach().clone(), y.clone()
        logits = logits_of.exact(x)
        state = Progress.of(x, fools(logits, y))
        for target in track(runners_up(logits, y, targets).unbind(dim=1), targets):
            walk(logits_of, x, y, target, norm, steps, eps, state)
        enough = state.height >= (-torch.inf if eps is None else -eps)
        return torch.where(per_image(enough), state.x_adv, x)


def walk(
    logits_of: Forward,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    norm: str,
    steps: int,
    eps: float | None,
    state: Progress,
) -> None:
    """Alg. 1 toward one class; `state.height` is minus the distance of the nearest success."""
    rows = (state.height < (torch.inf if eps is None else -eps)).nonzero().squeeze(1)
    x_i = x[rows]
    for _ in track(range(steps), steps):
        if not len(rows):
            return
        x_0, label = x[rows], y[rows]
        logits = logits_of(x_i.requires_grad_())
        f = lead(logits, label, target[rows])
        largest = logits.detach().abs().masked_fill(masked(logits), 0).amax(dim=1)
        f = f - 2 * LEAD * torch.finfo(f.dtype).eps * largest  # beyond
        w = logits_of.gradient(f, x_i)
        state.spent[rows] += 1
        x_i, f = x_i.detach(), f.detach().to(x)
        from_x_i = to_hyperplane(x_i, w, -f, norm)
        from_x_0 = to_hyperplane(x_0, w, (w * (x_i - x_0)).flatten(1).sum(dim=1) - f, norm)
        near, far = size(from_x_i, norm), size(from_x_0, norm)
        alpha = per_image((near / (near + far).clamp(min=1e-12)).clamp(max=ALPHA_MAX))
        x_i = (1 - alpha) * (x_i + ETA * from_x_i) + alpha * (x_0 + ETA * from_x_0)
        x_i = x_i.clamp(0, 1)

        fooled = fools(logits_of.exact(x_i), label)
        distance = size(x_i - x_0, norm)
        nearer = fooled & (-distance > state.height[rows])
        state.x_adv[rows] = torch.where(per_image(nearer), x_i, state.x_adv[rows])
        state.height[rows] = torch.where(nearer, -distance, state.height[rows])
        x_i = torch.where(per_image(fooled), x_0 + BETA * (x_i - x_0), x_i)
        if eps is not None:
            left = (state.height[rows] < -eps).nonzero().squeeze(1)
            rows, x_i = rows[left], x_i[left]


def to_hyperplane(x: Tensor, w: Tensor, c: Tensor, norm: str) -> Tensor:
    """The smallest d, in L∞ or L2, with w·d = c and x + d in [0, 1]; where none reaches, the end.

    Every pixel moves at its speed s_i (1 in L∞, |w_i| in L2) until it meets 0 or 1 at the time
    t_i = room_i / s_i. So w·d = Σ |w_i|·min(t·s_i, room_i) grows with t along straight pieces that
    end at the t_i: sort these, find the piece on which c lies, and solve for t.
    """
    shape, x, w = x.shape, x.flatten(1), w.flatten(1)
    # By a power of two, which rounds nothing: the squares of large weights would be infinite.
    halvings = -torch.frexp(w.abs().amax(dim=1)).exponent.clamp(-100, 100)
    w, c = torch.ldexp(w, halvings[:, None]), torch.ldexp(c, halvings)
    pull = w.abs()
    speed = (pull > 0).to(x) if norm == "linf" else pull
    direction = w.sign() * c.sign()[:, None]
    room = torch.where(direction > 0, 1 - x, x)
    t_i, order = torch.where(pull > 0, room / speed, torch.inf).sort(dim=1)
    slope = (pull * speed).gather(1, order).flip(1).cumsum(dim=1).flip(1)
    ended = (pull * room).gather(1, order).cumsum(dim=1)  # what the pixels at their end contribute
    ended = torch.cat([torch.zeros_like(ended[:, :1]), ended], dim=1)
    short = ended[:, :-1] + t_i * slope < c.abs()[:, None]  # NaN, ∞·0, is not
    piece = short.sum(dim=1, keepdim=True)
    slope = torch.cat([slope, torch.zeros_like(slope[:, :1])], dim=1).gather(1, piece)
    t = (c.abs()[:, None] - ended.gather(1, piece)) / slope
    t = t.nan_to_num(nan=0.0, posinf=torch.finfo(t.dtype).max).clamp(min=0)
    return (direction * torch.minimum(t * speed, room)).view(shape)
