"""How a model fares under an attack: accuracies with intervals, distances, transfer, worst case."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from scipy.special import bdtrik, stdtrit
from torch import Tensor, nn

from .attacks.contract import attacking, check_model, crafted, relative_norm
from .attacks.norms import lp
from .data import ImageData, batches, digest
from .distributed import in_turn, processes
from .layout import taken_by
from .progress import one_bar, say, track
from .stored import Stored

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Split = tuple[Tensor, Tensor]

NORMAL_975 = 1.959963984540054  # the 97.5% quantile of the normal distribution


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson, 1927), within [0, 1].

    Raises
    ------
    ValueError
        Unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n}, expected 0 <= successes <= n and n >= 1")
    z, p = NORMAL_975, successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Which images were classified correctly: ``correct``, bool (n,), on the CPU.

    ``images`` is the `digest` of the images and labels; "" where it is not known.
    """

    correct: Tensor
    images: str = ""

    def __post_init__(self) -> None:
        if self.correct.dtype != torch.bool or self.correct.ndim != 1 or not len(self.correct):
            raise ValueError(
                f"correct is {self.correct.dtype} of shape {tuple(self.correct.shape)}, "
                "expected bool of shape (n,) with n >= 1"
            )

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def value(self) -> float:
        """The share of correct images, in [0, 1]."""
        return int(self.correct.sum()) / self.n

    @property
    def percent(self) -> float:
        return 100 * self.value

    @property
    def ci(self) -> tuple[float, float]:
        """95% Wilson interval of `value`, in [0, 1]."""
        return wilson(int(self.correct.sum()), self.n)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        low, high = (100 * bound for bound in self.ci)
        return f"{self.percent:.1f}% ({low:.1f}–{high:.1f}, n={self.n:,})"


@dataclass(frozen=True)
class Share:
    """A share of `n` images of which only the number is known, not which images."""

    value: float
    n: int

    @property
    def percent(self) -> float:
        return 100 * self.value

    @property
    def ci(self) -> tuple[float, float]:
        """95% Wilson interval of `value`, in [0, 1]."""
        return wilson(self.value * self.n, self.n)


@one_bar
def evaluate(
    model: nn.Module, data_split: Split, attack: Attack | None = None, *, batch_size: int = 500
) -> Accuracy:
    """Accuracy of `model`, on the images as they are or on what `attack` makes of them.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits; judged in eval mode, in full precision: float64 where its
        weights are.
    data_split : tuple of Tensor
        Images (n, C, H, W), uint8 or float in [0, 1], and labels int64 (n,): ``data.test``. Model
        and attack get copies of them, channels_last where the model takes them so.
    attack : callable, optional
        ``(model, x, y) -> x_adv``, such as ``functools.partial(pgd, eps=0.3, …)``.
    batch_size : int
        Images attacked at a time; bounds the memory.

    Raises
    ------
    ValueError
        Where there are no images; where the attack returns something else than images of the same
        shape, dtype and device, or leaves [0, 1]; and as every attack does.

    Examples
    --------
    >>> from functools import partial
    >>> import defenses
    >>> data = defenses.load_data("digits")
    >>> model = defenses.models.mnist_fast()
    >>> history = defenses.fit(model, data, epochs=2, progress=False)
    >>> clean = evaluate(model, data.test)
    >>> attacked = evaluate(model, data.test, partial(defenses.attacks.fgsm, eps=0.2))
    >>> attacked.value < clean.value, clean.n
    (True, 360)
    """
    correct = []
    for x, y in on_device_of(model, data_split, batch_size, processes()):
        correct.append(_correct(model, _attacked(attack, model, x, y), y))
    return Accuracy(torch.cat(in_turn(correct)).cpu(), digest(data_split))


def epsilon_curve(
    model: nn.Module,
    data_split: Split,
    attack: Callable[..., Tensor],
    eps: Sequence[float],
    *,
    batch_size: int = 500,
) -> dict[float, Accuracy]:
    """Accuracy for each radius in `eps`, where ``attack(model, x, y, eps=e)`` takes it."""
    return {
        e: evaluate(model, data_split, partial(attack, eps=e), batch_size=batch_size) for e in eps
    }


@one_bar
def transfer_matrix(
    models: Mapping[str, nn.Module], data_split: Split, attack: Attack, *, batch_size: int = 500
) -> dict[tuple[str, str], Accuracy]:
    """Accuracy of every model on the images crafted on every model, keyed (tested, crafted).

    Each source is attacked once. The diagonal is the white-box accuracy.
    """
    correct: dict[tuple[str, str], list[Tensor]] = {
        (tested_on, crafted_on): [] for crafted_on in models for tested_on in models
    }
    taken = {name: taken_by(model, data_split[0]) for name, model in models.items()}
    for crafted_on, source in track(models.items(), len(models)):
        for x, y in on_device_of(source, data_split, batch_size, processes()):
            x_adv = _attacked(attack, source, x, y)
            for tested_on, model in models.items():
                shown, label = taken[tested_on].of(x_adv), y.to(taken[tested_on].device)
                right = _correct(model, shown, label).cpu()
                correct[tested_on, crafted_on].append(right)
    images = digest(data_split)
    return {
        (tested_on, crafted_on): Accuracy(
            torch.cat(in_turn(correct[tested_on, crafted_on])).cpu(), images
        )
        for tested_on in models
        for crafted_on in models
    }


def worst_case(accuracies: Iterable[Accuracy]) -> Accuracy:
    """An image counts as correct where it withstood every attack; all of the same n images."""
    accuracies = list(accuracies)
    correct = [accuracy.correct for accuracy in accuracies]
    images = {accuracy.images for accuracy in accuracies} - {""}
    if not correct or len({len(c) for c in correct}) > 1 or len(images) > 1:
        raise ValueError(
            f"accuracies over {[len(c) for c in correct]} images, expected at least one, "
            "all over the same images in the same order"
        )
    return Accuracy(torch.stack(correct).all(dim=0), "".join(images))


@dataclass(frozen=True, eq=False)
class Perturbations:
    """What an attack did to each of n images; every field is a CPU tensor of shape (n,).

    Attributes
    ----------
    l2, linf, relative : Tensor
        ‖η‖₂, ‖η‖∞ and ‖η‖₂/‖x‖₂ of what the attack returned, float64.
    l0 : Tensor
        The number of inputs, of C·H·W, that differ; float64.
    clean_correct, fooled : Tensor
        Whether the model is right about the image, and wrong about what the attack returned.
    images : str
        The `digest` of the images and labels.
    """

    l2: Tensor
    linf: Tensor
    relative: Tensor
    l0: Tensor
    clean_correct: Tensor
    fooled: Tensor
    images: str = ""


@one_bar
def perturbations(
    model: nn.Module, data_split: Split, attack: Attack, *, batch_size: int = 500
) -> Perturbations:
    """Run `attack` once over `data_split` and measure what it did; arguments as in `evaluate`."""
    rows = []
    for x, y in on_device_of(model, data_split, batch_size, processes()):
        x_adv = _attacked(attack, model, x, y)
        eta = (x_adv - x).flatten(1)
        rows.append(
            (
                eta.norm(dim=1),
                eta.abs().amax(dim=1),
                relative_norm(x_adv, x),
                (eta != 0).sum(dim=1),
                _correct(model, x, y),
                ~_correct(model, x_adv, y),
            )
        )
    columns = zip(*in_turn(rows), strict=True)
    *sizes, clean_correct, fooled = (torch.cat(column).cpu() for column in columns)
    l2, linf, relative, l0 = (size.double() for size in sizes)  # on the CPU: some GPUs have none
    return Perturbations(l2, linf, relative, l0, clean_correct, fooled, digest(data_split))


def accuracy_within(found: Perturbations, max_residue_ratio: float) -> Accuracy:
    """Accuracy against perturbations with ‖η‖₂/‖x‖₂ <= d (Ranjan et al., 2018, Eq. 8, Table 2).

    One run of `perturbations` with DeepFool answers for every d: the path of DeepFool does not
    depend on d, which only decides whether its end counts. An image is lost where the model was
    wrong from the start (η = 0) or where the end of its path lies within d.
    """
    return Accuracy(~(found.fooled & (found.relative <= max_residue_ratio)), found.images)


@dataclass
class Queries:
    """How many images were passed forward through a model, and how many back."""

    forward: int = 0
    backward: int = 0


@contextmanager
def queries(model: nn.Module) -> Iterator[Queries]:
    """Count what `model` is asked inside: by an attack, of this library or another, or a loss."""
    count = Queries()

    def passed(module: nn.Module, inputs: object, logits: Tensor) -> None:
        count.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(passed_back)

    def passed_back(gradient: Tensor) -> None:
        count.backward += len(gradient)

    hook = model.register_forward_hook(passed)
    try:
        yield count
    finally:
        hook.remove()


@one_bar
def distances(
    model: nn.Module,
    data_split: Split,
    attack: Attack,
    norm: str = "l2",
    *,
    batch_size: int = 500,
) -> Tensor:
    """How far `attack` had to go for each image, float64 (n,): 0 where the model was wrong from
    the start, infinite where it is right in the end; `norm` is one of `attacks.norms.ORDER`."""
    rows = []
    for x, y in on_device_of(model, data_split, batch_size, processes()):
        x_adv = _attacked(attack, model, x, y)
        size = lp(x_adv - x, norm).masked_fill(~_correct(model, x, y), 0.0)
        rows.append(size.masked_fill(_correct(model, x_adv, y), torch.inf).cpu().double())
    return torch.cat(in_turn(rows))


def optimality(found: Tensor, best: Tensor) -> float:
    """How close an attack comes to the best known distances, at most 1 (Cinà et al., 2025).

    The robust accuracy as a function of the distance encloses, up to the largest best distance, an
    area; 1 is that of `best`, 0 that of an attack which fools nothing. Their code joins the
    points of the curve by lines; here it is the step function that it is, whose area is a mean.

    Parameters
    ----------
    found, best : Tensor
        `distances` (n,) of the attack, and the least of each image over all that are known.

    Raises
    ------
    ValueError
        Where an image is nearer than its best, or all have the same.
    """
    if found.shape != best.shape or (found < best).any():
        raise ValueError("some image is nearer than its best: take the least over all attacks")
    if not best[best.isfinite()].unique().numel() > 1:
        raise ValueError("the best distances do not differ: there is no curve to compare with")
    farthest = best[best.isfinite()].amax()
    area, least = (sizes.clamp(max=farthest).mean() for sizes in (found, best))
    clean = (best > 0).to(best).mean()
    return float(1 - (area - least) / (clean * farthest - least))


@dataclass(frozen=True)
class Robustness:
    """A mean size with its 95% interval, over `n` images; `unfooled` more are not in the mean.

    ``sizes``, where it is kept, has the size of each image, infinite for those without one and NaN
    for those that do not count.
    """

    value: float
    ci: tuple[float, float]
    n: int
    unfooled: int
    sizes: Tensor | None = field(default=None, repr=False, compare=False)
    images: str = field(default="", repr=False)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        low, high = self.ci
        left = f", {self.unfooled:,} unfooled" if self.unfooled else ""
        return f"{self.value:.3f} ({low:.3f}–{high:.3f}, n={self.n:,}{left})"


def robustness(found: Perturbations) -> Robustness:
    """ρ_adv, the mean of ‖r‖₂/‖x‖₂ (Ranjan et al., 2018, Eq. 9), with a normal 95% interval.

    An image that the model gets wrong from the start needs no perturbation and counts as 0. One
    that the attack could not fool has no r: it stays out of the mean and is counted in
    `unfooled`, so that ρ_adv is a lower bound for what it would be with them.

    Raises
    ------
    ValueError
        Where not one image was fooled.
    """
    return _mean_of(found.relative.masked_fill(~found.fooled, math.inf), found.images)


def in_percent(mean: Robustness) -> Robustness:
    """The same mean, a hundred times as large: some papers print it so."""
    low, high = mean.ci
    return replace(mean, value=100 * mean.value, ci=(100 * low, 100 * high), sizes=None)


def success(found: Perturbations) -> Accuracy:
    """The share of the images that the model had right and the attack fooled, of the former."""
    return Accuracy(found.fooled[found.clean_correct])


def mean_distance(found: Perturbations, measure: str = "l2") -> Robustness:
    """The mean `measure` (``"l2"``, ``"linf"``, ``"l0"``) of what `success` counts as fooled.

    Raises
    ------
    ValueError
        Where not one image was fooled.
    """
    sizes = getattr(found, measure).masked_fill(~found.fooled, math.inf)
    return _mean_of(sizes.masked_fill(~found.clean_correct, math.nan), found.images)


def _mean_of(sizes: Tensor, images: str) -> Robustness:
    mean = mean_size(sizes[sizes.isfinite()], int(sizes.isposinf().sum()))
    return replace(mean, sizes=sizes, images=images)


def mean_size(sizes: Tensor, unfooled: int = 0) -> Robustness:
    """The mean of `sizes` (n,) with a normal 95% interval; `unfooled` more have no size.

    Raises
    ------
    ValueError
        Where there is nothing to average.
    """
    n = len(sizes)
    if not n:
        raise ValueError(f"none of {unfooled} images was fooled: there is no distance to average")
    mean = float(sizes.mean())
    half = NORMAL_975 * float(sizes.std()) / math.sqrt(n) if n > 1 else math.inf
    return Robustness(mean, (mean - half, mean + half), n, unfooled, None if unfooled else sizes)


def median_size(sizes: Tensor, images: str = "") -> Robustness:
    """The median of `sizes` (n,), where infinite ones count as such, with a 95% interval.

    The interval reaches from one order statistic to another, whatever the distribution: as far from
    the middle as a fair coin, thrown n times, may fall. Fewer than six have none that is bounded.
    `images` is their digest.

    Raises
    ------
    ValueError
        Where there is nothing to take the median of.
    """
    n = len(sizes)
    if not n:
        raise ValueError("there are no images to take the median of")
    inner = math.ceil(bdtrik(0.025, n, 0.5))
    ordered = [-math.inf, *sizes.sort().values.tolist(), math.inf]
    ci = ordered[inner], ordered[n + 1 - inner]
    middle = (ordered[(n + 1) // 2] + ordered[n // 2 + 1]) / 2
    return Robustness(middle, ci, n, int(sizes.isposinf().sum()), sizes, images)


def seed_interval(
    values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """95% interval of the mean of the same measurement on networks from several seeds.

    It reaches, at either end, as far as the wider of two: Student's, for the spread over the seeds,
    and the mean of the measurements' own, for the draw of the images, which the networks share.

    Raises
    ------
    ValueError
        With fewer than two values.
    """
    seeds = len(values)
    if seeds < 2:
        raise ValueError(f"{seeds} seed{'s' * (seeds != 1)}: a spread needs at least two")
    mean = statistics.fmean(values)
    half = float(stdtrit(seeds - 1, 0.975)) * statistics.stdev(values) / math.sqrt(seeds)
    lows, highs = zip(*intervals, strict=True)
    return min(mean - half, statistics.fmean(lows)), max(mean + half, statistics.fmean(highs))


def on_device_of(
    model: nn.Module, data_split: Split, batch_size: int, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = _checked(data_split)
    check_model(model)
    if not len(images):
        raise ValueError("there are no images to measure on: the split is empty")
    taken = taken_by(model, images)
    own = batches(images, labels, batch_size, None, share, **taken.form)
    for x, y in track(own, -(-len(images) // batch_size // share[1])):
        yield x.to(taken.device), y.to(taken.device)


def _checked(data_split: Split) -> Split:
    if isinstance(data_split, tuple | list) and len(data_split) == 2:
        for what, values in zip(("images", "labels"), data_split, strict=True):
            if not isinstance(values, Tensor | Stored):
                raise ValueError(
                    f"the {what} are {type(values).__name__}, expected a tensor: "
                    f"torch.as_tensor({what}) makes one"
                )
        return data_split[0], data_split[1]
    found, remedy = type(data_split).__name__, ""
    if isinstance(data_split, ImageData):
        remedy = ": data.test"
    elif isinstance(data_split, Iterable) and not isinstance(data_split, Tensor):
        remedy = ": of a loader, tuple(torch.cat(part) for part in zip(*loader))"
    raise ValueError(f"data_split is {found}, expected a pair (images, labels){remedy}")


def _attacked(attack: Attack | None, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if attack is None:
        return x
    say(attack)
    return crafted(attack, model, x, y).detach()


def _correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with attacking(model, x, y) as logits_of:
        return logits_of.exact(x).argmax(dim=1) == y
