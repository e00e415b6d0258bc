"""Square Attack: random search over squares, by the model's scores alone; no gradient is asked for.

Andriushchenko et al. (2020), Alg. 1 to 3. The attack by labels alone is in `substitute`.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..progress import track
from .contract import attacking, check_count, generator_for
from .losses import fooled_at, fools, margin
from .norms import check_ball, per_image

# Of every 10,000 queries, where p is halved: the authors' code, which halves at 500, too.
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

Draw = Callable[..., Tensor]  # (high, *shape) -> integers in [0, high), of shape (N, *shape)


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    queries: int = 5000,
    p_init: float = 0.8,
    schedule: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Square Attack, untargeted: random search over squares, by nothing but the model's scores.

    Andriushchenko et al. (2020), Alg. 1 with Alg. 2 (L∞) or Alg. 3 (L2). A proposal stays where
    it raises the margin. The image leaves the batch as soon as it fools the model. In L∞ a square
    that would change nothing gets the other sign, so that no query is spent on it.

    Parameters
    ----------
    model, x, y
        As in `defenses.attacks.fgsm`; the model need not be differentiable.
    eps : float
        Radius of the ball, in units of pixels in [0, 1].
    norm : str
        ``"linf"`` or ``"l2"``.
    queries : int
        Perturbed images that the model may see for each image, the first guess among them.
    p_init : float
        p, the share of the pixels in the first squares, in (0, 1].
    schedule : int, optional
        Queries over which p falls to p_init/512; without it `queries`, as in the paper.
        AutoAttack asks 5,000 queries on the schedule of 10,000.
    seed, generator : int or torch.Generator, optional
        Where signs and places are drawn from. Each query draws for the whole batch, so what an
        image gets depends on its place in the batch, and on nothing that happened to the others.

    Returns
    -------
    Tensor
        Images like `x`, at most `eps` away from it, in [0, 1]: fooling; or unchanged, where `x`
        was misclassified before; or the one with the best margin that was seen.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    draw = generator_for(x, seed, generator)
    return square_search(model, x, y, eps, norm, queries, p_init, schedule, draw)[0]


def square_search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    queries: int,
    p_init: float,
    schedule: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """`square`, and the queries that each image took, int64 (N,): 0 where none was needed."""
    check_count("queries", queries)
    check_count("schedule", schedule or queries)
    check_ball(eps, norm)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init is {p_init}, expected a share of the pixels in (0, 1]")
    guess, propose = SEARCHES[norm]
    with attacking(model, x, y) as logits_of, torch.no_grad():
        x_adv, used = x.detach().clone(), torch.zeros_like(y)
        rows = (~fools(logits_of.exact(x_adv), y)).nonzero().squeeze(1)
        x, y, x_best = x_adv[rows], y[rows], x_adv[rows]
        best = x.new_full((len(x),), -torch.inf)
        for query in track(range(1, queries + 1), queries):
            if not len(rows):
                break
            draw = partial(_draw, x_adv, generator, rows)
            if query == 1:
                x_new = guess(x, eps, draw)
            else:
                done = int((query - 2) / (schedule or queries) * 10_000)
                p = p_init / 2 ** bisect_left(HALVED_AT, done)
                x_new = propose(x, x_best, eps, p, draw)
            logits = logits_of(x_new)
            value, fooled = margin(logits, y).to(best), fooled_at(logits_of, x_new, logits, y)
            higher = fooled | (value > best)
            x_best = torch.where(per_image(higher), x_new, x_best)
            best = torch.where(higher, value, best)
            used[rows] = query
            left = (~fooled).nonzero().squeeze(1)
            if len(left) < len(rows):
                x_adv[rows] = x_best
                rows, x, y, x_best, best = (s[left] for s in (rows, x, y, x_best, best))
        x_adv[rows] = x_best
    return x_adv, used


def _stripes(x: Tensor, eps: float, draw: Draw) -> Tensor:
    up = draw(2, x.shape[1], 1, x.shape[3]).bool()
    return torch.where(up, (x + eps).clamp(max=1), (x - eps).clamp(min=0))


def _other_square(x: Tensor, x_best: Tensor, eps: float, p: float, draw: Draw) -> Tensor:
    """Alg. 2: a square moves by ±2ε and is projected, so each pixel of it is at x ± ε, clipped."""
    window = _window(x, max(round(math.sqrt(p * x[0, 0].numel())), 1), draw)
    lower, upper = (x[window] - eps).clamp(min=0), (x[window] + eps).clamp(max=1)
    up = draw(2, x.shape[1], 1, 1).bool()
    same = torch.where(up, upper, lower) == x_best[window]
    up ^= per_image(same.flatten(1).all(dim=1))
    return x_best.index_put(window, torch.where(up, upper, lower))


def _bumps(x: Tensor, eps: float, draw: Draw) -> Tensor:
    """The first guess in L2: a grid of η, five by five where the image is a multiple of five."""
    n, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    grid = (height // side, width // side, 1, 1)
    bumps = _eta(side, x.dtype, x.device)
    bumps = torch.where(draw(2, 1, *grid).bool(), bumps, bumps.T) * (
        2 * draw(2, channels, *grid) - 1
    )
    delta = bumps.transpose(3, 4).reshape(n, channels, grid[0] * side, grid[1] * side)
    above, before = (height - delta.shape[2]) // 2, (width - delta.shape[3]) // 2
    below, behind = height - delta.shape[2] - above, width - delta.shape[3] - before
    delta = F.pad(delta, (before, behind, above, below))
    return (x + eps * _unit(delta, (1, 2, 3))).clamp(0, 1)


def _moved_mass(x: Tensor, x_best: Tensor, eps: float, p: float, draw: Draw) -> Tensor:
    """Alg. 3: window W1 gets a bump of η and all of ε that W1, W2 and clipping leave free."""
    channels, nu = x.shape[1], x_best - x
    side = max(round(math.sqrt(p * x[0, 0].numel())), 3) // 2 * 2 + 1
    unused = (eps**2 - nu.square().sum(dim=(1, 2, 3), keepdim=True)).clamp(min=0)
    W1, W2 = _window(x, side, draw), _window(x, side, draw)
    nu_1 = nu[W1]
    nu[W1] = 0
    free = nu_1.square().sum(dim=(2, 3), keepdim=True) + nu[W2].square().sum((2, 3), keepdim=True)
    nu[W2] = 0
    eta = _eta(nu_1.shape[2], x.dtype, x.device)
    eta = torch.where(draw(2, 1, 1, 1).bool(), eta, eta.T) * (2 * draw(2, channels, 1, 1) - 1)
    nu[W1] = _unit(eta + _unit(nu_1, (2, 3)), (2, 3)) * (free + unused / channels).sqrt()
    return (x + eps * _unit(nu, (1, 2, 3))).clamp(0, 1)  # ‖ν‖ = ε but for rounding


SEARCHES = {"linf": (_stripes, _other_square), "l2": (_bumps, _moved_mass)}


def _draw(
    x: Tensor, generator: torch.Generator | None, rows: Tensor, high: int, *shape: int
) -> Tensor:
    return torch.randint(high, (len(x), *shape), generator=generator, device=x.device)[rows]


def _window(x: Tensor, side: int, draw: Draw) -> tuple[Tensor, ...]:
    """Indices of one square window an image, the same in its channels: (N, C, side, side)."""
    n, channels, height, width = x.shape
    side = min(side, height, width)
    n_, c_, s_ = (torch.arange(k, device=x.device) for k in (n, channels, side))
    top, left = draw(height - side + 1, 1), draw(width - side + 1, 1)
    rows, columns = (top + s_)[:, None, :, None], (left + s_)[:, None, None, :]
    return per_image(n_), c_[:, None, None], rows, columns


@cache
def _eta(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """η of Eq. 2: two bumps of opposite sign, one above the other; ‖η‖₂ = 1."""
    half = side // 2
    eta = torch.cat([_bump(half, side), -_bump(side - half, side)])
    return (eta / eta.norm()).to(dtype).to(device)  # not every device has float64


def _bump(height: int, width: int) -> Tensor:
    """Σ 1/(k+1)² over the k from a pixel's distance to the middle on; ‖·‖₂ = 1."""
    rows, columns = ((torch.arange(k) - k // 2).abs() for k in (height, width))
    terms = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -2
    bump = terms.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], columns)]
    return bump / bump.norm()


def _unit(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    norm = values.square().sum(dim=dim, keepdim=True).sqrt()
    return values / norm.clamp(min=torch.finfo(norm.dtype).tiny)
