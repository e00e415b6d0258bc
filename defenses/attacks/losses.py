"""What a gradient attack climbs: cross-entropy, margin, DLR (Croce & Hein, 2020), or any callable.

Each loss maps logits (N, K) and labels (N,) to one value an image (N,), larger where the model
errs more. None of them multiplies logits by a mask, so their sign does not matter.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Forward

LEAD = 64  # units in the last place by which a wrong class must lead; see `fools`

PerImageLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Objective = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(z)_y as every library computes it.

    In float32 its gradient is rounded from a logit gap of about 14 on, and exactly 0 from about
    104 on: what looks like robustness there is rounding. See `log_odds`.
    """
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy without its saturation: m = logsumexp_{j≠y} z_j − z_y.

    Cross-entropy is softplus(m), and ∇CE = σ(m)·∇m with σ(m) > 0 a number for each image: the
    same order, the same direction and the same signs, with nothing that could round to zero.
    """
    # Not −inf: where the model masks every other class, that would be a gradient of NaN.
    others = logits.scatter(1, y[:, None], torch.finfo(logits.dtype).min)
    return others.logsumexp(dim=1) - _at(logits, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j≠y} z_j − z_y: positive exactly where the image is misclassified."""
    return _others(logits, y).amax(dim=1) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over z_π1 − z_π3 (Croce & Hein, 2020, Eq. 6).

    Where an image has fewer than 3 classes that are not `masked`, its margin.

    Raises
    ------
    ValueError
        With fewer than 3 classes: there is no third logit.
    """
    top = _top(logits, 3)
    return margin(logits, y) / _spread(logits, y, top, top[:, 0] - top[:, 2])


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t − z_y) / (z_π1 − (z_π3 + z_π4)/2) (Croce & Hein, 2020, Eq. 7).

    Where an image has fewer than 4 classes that are not `masked`, z_t − z_y.

    Raises
    ------
    ValueError
        With fewer than 4 classes: there is no fourth logit.
    """
    top = _top(logits, 4)
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return lead(logits, y, target) / _spread(logits, y, top, spread)


def fools(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Whether each image is misclassified or, with a target, classified as that; bool (N,).

    The deciding logits must differ by more than `LEAD` units in the last place, because the same
    image in a batch of another size gets logits that differ by a few: what an attack counts as
    fooling must still fool when it is judged elsewhere.
    """
    label = y if target is None else target
    others, own = _others(logits, label).amax(dim=1), _at(logits, label)
    ahead, behind = (others, own) if target is None else (own, others)
    return ahead - behind > LEAD * torch.finfo(logits.dtype).eps * ahead.abs()


@torch.no_grad()
def fooled_at(
    logits_of: Forward, x: Tensor, logits: Tensor, y: Tensor, target: Tensor | None = None
) -> Tensor:
    """`fools` at images `x` with these `logits`; under autocast a yes is asked for again, exactly.

    A no is taken as it is: an iterate that rounding hides is found by the next one, and the last
    one is worth an exact pass of its own.
    """
    fooled = fools(logits.detach(), y, target)
    if logits_of.rounded:
        rows = fooled.nonzero().squeeze(1)
        if len(rows):
            goal = None if target is None else target[rows]
            fooled[rows] = fools(logits_of.exact(x[rows]), y[rows], goal)
    return fooled


def lead(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t − z_y: positive where the target is ahead."""
    return _at(logits, target) - _at(logits, y)


def runners_up(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The `count` highest classes other than `y`, or all of them, the highest first; (N, ≤ K−1).

    None of them is masked: see `unmasked`.
    """
    others = _others(logits, y)
    return unmasked(others, others.topk(min(count, logits.shape[1] - 1), dim=1).indices)


def unmasked(logits: Tensor, classes: Tensor) -> Tensor:
    """`classes` (N, T) without those that are `masked`, in their order; (N, ≤ T).

    An image with fewer than another one gets its first again; one that has none, any: nothing fools
    there.
    """
    hidden = masked(logits.gather(1, classes))
    counts = (~hidden).sum(dim=1)
    classes = classes.gather(1, hidden.byte().argsort(dim=1, stable=True))
    classes = classes[:, : max([1, *counts.tolist()])]
    place = torch.arange(classes.shape[1], device=classes.device)
    return torch.where(place < counts[:, None], classes, classes[:, :1])


def masked(logits: Tensor) -> Tensor:
    """Where a logit is −inf, or the lowest number: so models mask classes that they never say."""
    return logits <= torch.finfo(logits.dtype).min


LOSSES = {"ce": log_odds, "ce_textbook": cross_entropy, "margin": margin, "dlr": dlr}


def objective(
    model: nn.Module, logits_of: Forward, loss: str | PerImageLoss, *, judged: bool = True
) -> Objective:
    """What an attack climbs: ``(x, y, target) -> (value (N,), logits (N, K))``.

    Without a target the loss of `y` is climbed; with one, the loss of the target is descended.

    Parameters
    ----------
    loss : str or callable
        ``"ce"`` (`log_odds`), ``"ce_textbook"`` (`cross_entropy`), ``"margin"``, ``"dlr"``, or
        ``(model, x, y) -> loss (N,)``, the hook for adaptive attacks; success is then judged on a
        forward pass of its own.
    judged : bool
        False spares a callable loss that pass: the logits are then an empty tensor.
    """
    if isinstance(loss, nn.modules.loss._Loss):
        raise ValueError(
            f"loss is {loss}, expected a name or a callable (model, x, y) -> loss of shape (N,): "
            'for cross-entropy say "ce"'
        )
    if callable(loss):
        return partial(_of_callable, model, logits_of, loss, judged)
    if loss not in LOSSES:
        raise ValueError(
            f"loss is {loss!r}, expected one of {', '.join(LOSSES)}, "
            "or a callable (model, x, y) -> loss of shape (N,)"
        )
    return partial(_of_logits, logits_of, loss)


def _of_logits(
    logits_of: Forward, loss: str, x: Tensor, y: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = logits_of(x)
    if target is None:
        return LOSSES[loss](logits, y), logits
    if loss == "dlr":
        return dlr_targeted(logits, y, target), logits
    return -LOSSES[loss](logits, target), logits


def _of_callable(
    model: nn.Module,
    logits_of: Forward,
    loss: PerImageLoss,
    judged: bool,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # As in `Forward`, what the loss does to its images and labels in place stays there.
    label = y.clone() if target is None else target.clone()
    value = loss(model, x.clone(), label) if target is None else -loss(model, x.clone(), label)
    if value.shape != y.shape:
        raise ValueError(
            f"the loss has shape {tuple(value.shape)}, expected {tuple(y.shape)}: one value an "
            "image, not their mean"
        )
    with torch.no_grad():
        return value, logits_of(x) if judged else value.new_empty(0)


def _spread(logits: Tensor, y: Tensor, top: Tensor, spread: Tensor) -> Tensor:
    """`spread`, or 1 where it or the numerator is infinite."""
    infinite = masked(top[:, -1]) | masked(_at(logits, y))
    return torch.where(infinite, 1, spread.clamp(min=1e-12))


def _at(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf)


def _top(logits: Tensor, count: int) -> Tensor:
    if logits.shape[1] < count:
        raise ValueError(
            f"DLR needs at least {count} classes here, the model has {logits.shape[1]}: "
            'use loss="margin"'
        )
    return logits.topk(count, dim=1).values
