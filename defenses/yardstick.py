"""One criterion for every defense: what is left of it, against what is claimed and its twin."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from scipy.special import bdtr, ndtri, stdtrit

from . import outcomes
from .evaluation import Accuracy
from .results import KEY, row_at

MARGIN = 5.0  # percentage points: what counts as a difference that matters
SAME = ("n", "images", "protocol", "dataset")  # what makes two rows comparable
Place: TypeAlias = tuple[str, ...]  # table, row, column, and the metric where it is no accuracy
LEVEL = 0.01  # of the paired test, before it is divided by the number of comparisons


@dataclass(frozen=True)
class Judgment:
    """What `judge` says: the word, and the numbers that it rests on, in percent.

    ``left`` and ``twin`` are means over the seeds, ``p`` is the largest over the seeds.
    """

    word: str
    left: float
    twin: float
    claimed: float | None
    p: float

    def __str__(self) -> str:
        return self.word


def paired(a: Accuracy, b: Accuracy) -> float:
    """The two-sided p of the exact test of McNemar (1947): are `a` and `b` equally often right?

    Only the images on which the two differ count; were the networks equally good, either would be
    the right one with probability 1/2.

    Raises
    ------
    ValueError
        The two are not of the same images.
    """
    if a.n != b.n or a.images != b.images or not a.images:
        raise ValueError(
            f"a paired test needs the same images: got {a.n} of {a.images or 'unknown'} and "
            f"{b.n} of {b.images or 'unknown'}"
        )
    only_a = int((a.correct & ~b.correct).sum())
    only_b = int((b.correct & ~a.correct).sum())
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def difference(
    a: Any, b: Any, *, factor: float = 1.0, among: int = 1, same: bool = True
) -> tuple[float, float]:
    """The interval of ``a - factor * b`` at 99%, for one of `among` comparisons (Bonferroni).

    `a` and `b` are rows, as `results.row_at` returns them: a value with its 95% interval, which is
    widened as that of a normal error or, over several seeds, as Welch's; with ``same=False`` `b`
    may be a number. Where their seeds differ, the rows of those seeds count that both have (older
    means, which cannot be parted, count as they are). Where it is stored which images were right,
    the two errors go together as they do on these images (Newcombe, 1998, method 10), and nothing
    is decided that the exact paired test does not decide; of several seeds, the interval holds that
    of each. Elsewhere the errors are taken for independent, which is on the safe side, but for a
    row at 0%.

    Raises
    ------
    ValueError
        `same` is asked, and the two differ in n, images, protocol or data set, or have no seed in
        common. (Older rows do not name their images; for those the same n has to do.)
    """
    each: list[tuple[float, float]] = []
    if isinstance(b, int | float):
        b = SimpleNamespace(value=float(b), ci_low=float(b), ci_high=float(b))
    if same:
        a, b = _alike(a, b)
        each = [_of_pair(*pair, factor, among) for pair in _pairs(a, b)]
    elif not hasattr(b, "seed") and hasattr(a, "chapter"):
        kept = outcomes.of_row(a)
        if kept.keys() >= {*a.seed.split()}:
            each = [_interval(_row(of), b, factor, among, 0.0) for of in kept.values()]
    each = each or [_interval(a, b, factor, among, 0.0)]
    return min(low for low, _ in each), max(high for _, high in each)


def above(chapter: str, high: Place, low: Place, among: int = 1, data: str = "") -> bool:
    """Whether one stored number is larger than another, for one of `among` comparisons.

    `high` and `low` are places, (table, row, column) or with a metric; columns begin with `data`.
    What `difference` refuses is refused.
    """
    rows = [
        row_at(chapter, table, row, f"{data} {column}".strip(), *metric)
        for table, row, column, *metric in (high, low)
    ]
    return difference(*rows, among=among)[0] > 0


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """The two rows, of the same seeds."""
    common = set(a.seed.split()) & set(b.seed.split())
    if not common:
        raise ValueError(f"two rows that cannot be compared: seed {a.seed} and {b.seed}")
    if a.seed != b.seed:
        a, b = over_seeds(a, common), over_seeds(b, common)
    differ = [name for name in SAME if getattr(a, name) != getattr(b, name)]
    if "images" in differ and not (a.images and b.images):
        differ.remove("images")
    if differ:
        what = ", ".join(f"{name} {getattr(a, name)} and {getattr(b, name)}" for name in differ)
        raise ValueError(f"two rows that cannot be compared: {what}")
    return a, b


def over_seeds(row: Any, seeds: set[str]) -> Any:
    """The row of some of its seeds; an older mean, which cannot be parted, as it is."""
    try:
        return row_at(row.chapter, *(row[name] for name in KEY), seeds=sorted(seeds))
    except ValueError:
        return row


def _pairs(a: Any, b: Any) -> list[tuple[Accuracy, Accuracy]]:
    """Which images were right, by seed; none where that is not stored of them all."""
    if not a.images or (a.images, a.seed) != (b.images, b.seed):
        return []
    one, other = outcomes.of_row(a), outcomes.of_row(b)
    seeds = a.seed.split()
    whole = one.keys() & other.keys() >= {*seeds}
    return [(one[seed], other[seed]) for seed in seeds] if whole else []


def _of_pair(x: Accuracy, y: Accuracy, factor: float, among: int) -> tuple[float, float]:
    low, high = _interval(_row(x), _row(y), factor, among, _together(x, y))
    if factor == 1 and paired(x, y) >= LEVEL / among:
        low, high = min(low, 0.0), max(high, 0.0)
    return low, high


def _row(of: Accuracy) -> Any:
    return SimpleNamespace(value=of.percent, ci_low=100 * of.ci[0], ci_high=100 * of.ci[1])


def _together(x: Accuracy, y: Accuracy) -> float:
    """The correlation of two outcomes, nearer to 0 where it is positive (Newcombe, 1998)."""
    a, b = x.correct.double(), y.correct.double()
    covariance = float(x.n * (a @ b) - a.sum() * b.sum())
    spread = math.sqrt(float(a.sum() * (x.n - a.sum()) * b.sum() * (x.n - b.sum())))
    if covariance > 0:
        covariance = max(covariance - x.n / 2, 0.0)
    return covariance / spread if spread else 0.0


def _interval(a: Any, b: Any, factor: float, among: int, together: float) -> tuple[float, float]:
    of_a, of_b = (len(str(getattr(row, "seed", "0")).split()) - 1 or math.inf for row in (a, b))

    def reach(x: float, y: float) -> float:
        freedom = _freedom(x / _quantile(0.975, of_a), of_a, y / _quantile(0.975, of_b), of_b)
        x, y = x * _widening(freedom, of_a, among), y * _widening(freedom, of_b, among)
        return math.sqrt(max(0.0, x * x + y * y - 2 * together * x * y))

    middle = a.value - factor * b.value
    down = reach(a.value - a.ci_low, factor * (b.ci_high - b.value))
    up = reach(a.ci_high - a.value, factor * (b.value - b.ci_low))
    return middle - down, middle + up


def _freedom(x: float, of_x: float, y: float, of_y: float) -> float:
    """Degrees of freedom of the difference of two means with standard errors x and y (Welch)."""
    spread = x**4 / of_x + y**4 / of_y
    return (x * x + y * y) ** 2 / spread if spread else math.inf


def _widening(freedom: float, own: float, among: int) -> float:
    """From a 95% interval of `own` degrees of freedom to 99%, for one of `among`."""
    level = 1 - LEVEL / 2 / among
    draw = ndtri(level) / ndtri(0.975)  # over seeds, an interval may still be that of the images
    return float(max(draw, _quantile(level, freedom) / _quantile(0.975, own)))


def _quantile(level: float, freedom: float) -> float:
    return float(ndtri(level) if math.isinf(freedom) else stdtrit(freedom, level))


def judge(
    left: Mapping[int, Accuracy],
    twin: Mapping[int, Accuracy],
    claimed: float | None = None,
    comparisons: int = 1,
) -> Judgment:
    """Whether a defense holds, helps, or does not hold, at one size.

    - *holds*: the worst case leaves what is claimed, within `MARGIN`, and the defense helps;
    - *helps*: it leaves at least `MARGIN` more than its undefended twin, and in every seed the
      paired test says so at `LEVEL`, divided by the number of comparisons (Bonferroni);
    - *does not hold*: neither.

    Parameters
    ----------
    left, twin : mapping from a seed to Accuracy
        What the worst case of all attacks leaves of the defense, and of its twin on the same
        images; the seeds that both have are judged.
    claimed : float, optional
        In percent. Without a claim a defense can help, and no more.
    comparisons : int
        How many defenses are judged together.

    Raises
    ------
    ValueError
        They have no seed in common, or differ in images.
    """
    if not (seeds := sorted(left.keys() & twin.keys())):
        raise ValueError(
            f"seeds {sorted(left)} and {sorted(twin)}: expected one at least, with its twin"
        )
    p = max(paired(left[seed], twin[seed]) for seed in seeds)
    ours, theirs = (
        float(torch.tensor([of[seed].percent for seed in seeds], dtype=torch.float64).mean())
        for of in (left, twin)
    )
    more = all(left[seed].percent > twin[seed].percent for seed in seeds)
    word = "does not hold"
    if more and ours - theirs >= MARGIN and p < LEVEL / comparisons:
        word = "helps"
        if claimed is not None and ours >= claimed - MARGIN:
            word = "holds"
    return Judgment(word, ours, theirs, claimed, p)
