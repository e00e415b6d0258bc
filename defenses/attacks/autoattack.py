"""AutoAttack: four attacks with nothing to tune, worst case an image (Croce & Hein, 2020, Sec. 5).

What one attack could not fool, the next one gets: APGD on cross-entropy, APGD on the targeted
difference of logits ratio, FAB-T, and Square, which sees no gradient.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load, resumable, save
from ..data import digest
from ..identity import layers, weights
from ..progress import one_bar, say, track
from .apgd import Progress, ascend
from .blackbox import square_search
from .contract import Forward, attacking, check_count, check_whole
from .expectation import Expectation
from .fab import walk
from .losses import fools, objective, runners_up
from .norms import check_ball, per_image, random_point

# The budgets of the authors' standard version, and of that for models that draw.
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
STEPS, TARGETS, SAMPLES = 100, 9, 20
QUERIES, P_INIT, SCHEDULE = 5_000, 0.8, 10_000  # the schedule is not shortened with the queries
# Passes through the network for each image that resists, in one direction or the other.
COST = {"clean": 1, "apgd-ce": 2 * STEPS, "apgd-dlr": 2 * STEPS, "apgd-t": 2 * STEPS * TARGETS}
COST |= {"fab-t": 3 * STEPS * TARGETS, "square": QUERIES}


@dataclass(frozen=True, eq=False)
class Report:
    """What became of each of N images.

    Attributes
    ----------
    x_adv : Tensor
        (N, C, H, W), in [0, 1]: the first image that fooled the model, or `x` where none did.
    broken_by : list of str
        The attack that fooled it first; ``"clean"`` where `x` was misclassified, ``""`` where the
        image withstood all.
    gradients, queries : Tensor
        int64 (N,), on the CPU: input gradients and Square's forward passes that it took.
    """

    x_adv: Tensor
    broken_by: list[str]
    gradients: Tensor
    queries: Tensor


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    version: str = "standard",
    batch_size: int = 500,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Tensor:
    """AutoAttack: four attacks with nothing to tune, worst case an image (Croce & Hein, 2020).

    Parameters and errors are those of `autoattack_report`, of whose result this is ``x_adv``.

    Returns
    -------
    Tensor
        Images like `x`: the first that fooled the model, or the image itself where none did.

    Examples
    --------
    The logits of `x` differ by 0.8, and a change of ε in every pixel moves that by at most 8ε:

    >>> import torch
    >>> layer = torch.nn.Linear(4, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, -1, 1, -1], [-1.0, 1, -1, 1]])
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), layer)
    >>> x, y = torch.tensor([[[[0.6, 0.4], [0.6, 0.4]]]]), torch.tensor([0])
    >>> for eps in (0.09, 0.11):
    ...     x_adv = autoattack(model, x, y, eps=eps)
    ...     print(eps, model(x_adv).argmax(dim=1) == y)
    0.09 tensor([True])
    0.11 tensor([False])
    """
    return autoattack_report(
        model,
        x,
        y,
        eps=eps,
        norm=norm,
        version=version,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
    ).x_adv


@resumable
@one_bar
def autoattack_report(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    version: str = "standard",
    batch_size: int = 500,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Report:
    """AutoAttack with a record of which attack broke which image, and at what cost.

    Croce & Hein (2020), with the budgets of their standard version: APGD 100 steps, targeted APGD
    and FAB toward the nine highest other classes, Square 5,000 queries. With fewer than four
    classes, which DLR needs, targeted APGD climbs the margin.

    Parameters
    ----------
    model, x, y
        As in `defenses.attacks.pgd`.
    eps : float
        Radius of the ball, in units of pixels in [0, 1].
    norm : str
        ``"linf"`` or ``"l2"``.
    version : str
        ``"standard"``, or ``"rand"`` for a model that draws in eval mode: APGD on cross-entropy and
        on DLR, against the mean logits of 20 passes.
    batch_size : int
        Images attacked at a time; bounds the memory.
    seed : int
        Of all random starts and of Square. Each batch and each attack has its own stream.
    checkpoint : path, optional
        Written after each attack on each batch, atomically. If it is there, the run goes on from
        it; it must come from the same images, model and options.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, and for a checkpoint that
        cannot be read or is of another run, each with the remedy.
    """
    check_ball(eps, norm)
    check_count("batch_size", batch_size)
    check_whole("seed", seed)
    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}, expected one of {', '.join(VERSIONS)}")
    attacks = ("clean", *VERSIONS[version])
    attacked = Expectation(model, SAMPLES) if version == "rand" else model
    with attacking(attacked, x, y) as logits_of:
        x, y = x.detach().clone(), y.clone()
        run = {"eps": eps, "norm": norm, "version": version, "batch_size": batch_size, "seed": seed}
        done = _begin(x, len(attacks))
        if checkpoint is not None:
            run |= {"inputs: images": digest([x]), "inputs: labels": digest([y])}
            run |= {"inputs: weights": weights(model)}
            run |= {f"layer {name}": text for name, text in layers(model).items()}
            done = _resumed(checkpoint, run, done)
        stages = itertools.product(range(0, len(x), batch_size), range(len(attacks)))
        for stage, (first, k) in track(
            enumerate(stages), _costs(attacks, -(-len(x) // batch_size), done["stage"])
        ):
            if stage < done["stage"]:
                continue
            draw = torch.Generator(x.device).manual_seed(1_000_003 * seed + stage)
            left = done["broken_by"][first : first + batch_size] == len(attacks)
            rows = first + left.nonzero().squeeze(1)
            say(f"AutoAttack, {attacks[k]} on {len(rows)} of {len(x)} images")
            found = _attack(attacks[k], logits_of, attacked, x[rows], y[rows], eps, norm, draw)
            done["x_adv"][rows] = torch.where(per_image(found.fooled), found.x_adv, x[rows])
            done["broken_by"][rows] = torch.where(found.fooled, k, len(attacks))
            done["queries" if attacks[k] == "square" else "gradients"][rows] += found.spent
            done["stage"] = stage + 1
            if checkpoint is not None:
                save(checkpoint, {"run": run, "done": done})
    broken_by = [(*attacks, "")[k] for k in done["broken_by"].tolist()]
    return Report(done["x_adv"], broken_by, done["gradients"].cpu(), done["queries"].cpu())


def _attack(
    name: str,
    logits_of: Forward,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    draw: torch.Generator,
) -> Progress:
    logits = logits_of.exact(x)
    found, classes = Progress.of(x, fools(logits, y)), logits.shape[1]
    targets = runners_up(logits, y, TARGETS).unbind(dim=1)
    if name == "square":
        x_best, queries = square_search(model, x, y, eps, norm, QUERIES, P_INIT, SCHEDULE, draw)
        fooled = fools(logits_of.exact(x_best), y)
        found = Progress(x_best, torch.where(fooled, torch.inf, -torch.inf), queries)
    elif name == "fab-t":
        for target in track(targets, TARGETS):
            walk(logits_of, x, y, target, norm, STEPS, eps, found)
        found.height[found.height >= -eps] = torch.inf
    elif name == "apgd-t":
        climb = objective(model, logits_of, "dlr" if classes > 3 else "margin")
        for target in track(targets, TARGETS):
            start = random_point(x, eps, norm, draw)
            ascend(logits_of, climb, x, y, target, None, start, eps, norm, STEPS, found)
    elif name != "clean":
        loss = name.removeprefix("apgd-")
        climb = objective(model, logits_of, loss if classes > 2 else "ce")
        start = random_point(x, eps, norm, draw)
        ascend(logits_of, climb, x, y, None, None, start, eps, norm, STEPS, found)
    return found


def _costs(attacks: tuple[str, ...], num_batches: int, done: int) -> list[int]:
    """Passes for an image of each stage, of which the first are `done`."""
    costs = [COST[name] for name in attacks] * num_batches
    return [0] * done + costs[done:]


def _begin(x: Tensor, unbroken: int) -> dict[str, Any]:
    counts = torch.zeros(3, len(x), dtype=torch.int64, device=x.device)
    broken_by, gradients, queries = counts[0] + unbroken, counts[1], counts[2]
    return {
        "x_adv": x.clone(),
        "broken_by": broken_by,
        "gradients": gradients,
        "queries": queries,
        "stage": 0,
    }


def _resumed(file: str | Path, run: dict[str, Any], begin: dict[str, Any]) -> dict[str, Any]:
    saved = load(file, run, ["done"])
    if saved is None:
        return begin
    device = begin["x_adv"].device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved[0].items()}
