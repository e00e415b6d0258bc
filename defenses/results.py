"""The store of measured numbers, and what the paper prints.

A chapter has files below `chapters/`: `results/NAME.csv`, what was measured and how, one row a
seed; `results/NAME.npz`, what happened to each image (`defenses.outcomes`); and `paper/NAME.csv`,
what the paper prints. A number is named by its place in the paper: table, row, column and metric.
Accuracies are in percent. `folder=` is the folder that holds `results/` and `paper/`; by default it
is looked for from the working directory and from the package upwards.
"""

import contextlib
import functools
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch

from defenses import words
from defenses.evaluation import seed_interval

try:
    import fcntl
except ImportError:  # Windows: record from one process at a time
    fcntl = None  # type: ignore[assignment]

KEY = ["table", "row", "column", "metric"]
NUMBERS = ["value", "n", "ci_low", "ci_high", "seconds"]
COLUMNS = [*KEY, "value", "n", "ci_low", "ci_high", "seed", "protocol", "dataset", "device"]
COLUMNS += ["seconds", "versions", "commit", "date", "images", "code"]
KIND = [*KEY, "protocol", "dataset"]  # rows that differ in the seed only are of one kind
PROTOCOLS = ["paper", "short", "quick"]  # the best first
CONFLICT = r"(<{7}|={7}|>{7}|\|{7})"  # what git puts between the sides, on a line without commas

Rows: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]]


def measure(
    table: str,
    row: str,
    column: str,
    metric: str,
    value: float,
    *,
    n: int,
    ci: tuple[float, float] | None = None,
    seed: int,
    protocol: str,
    dataset: str,
    device: str | torch.device,
    seconds: float,
    images: str = "",
    code: str = "",
) -> dict[str, Any]:
    """Return one measurement as a row of the store, with torch's version, the commit and the date.

    Parameters
    ----------
    table, row, column, metric : str
        The paper's own names: `table1`, `CCN+LS`, `mnist fgsm 0.3`, `accuracy`.
    value : float
        An accuracy or a probability in percent; a robustness as a ratio.
    n : int
        The number of images that the value is an average over.
    ci : (low, high), optional
        Its 95% interval, in the value's units.
    seed : int
        Of the training, the order of the images and the attacks' random starts.
    protocol : {"quick", "short", "paper"}
    dataset : str
        The data set that was measured, which need not be the paper's.
    device : str or torch.device
        A torch device is written as the hardware's name, any other text as it is.
    seconds : float
    images : str
        A digest of the images and labels (`data.digest`); "" where it is not known.
    code : str
        A digest of the code that the number depends on (`code.digest`); likewise.

    Raises
    ------
    ValueError
        The protocol is unknown, the value is not finite, or the interval does not hold it.
    """
    low, high = (math.nan, math.nan) if ci is None else map(float, ci)
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if not math.isfinite(value) or low > value + 1e-6 or high < value - 1e-6:  # but for rounding
        raise ValueError(f"expected a finite value within its interval, got {value} and {ci}")
    place = {"table": table, "row": row, "column": column, "metric": metric}
    number = {"value": float(value), "n": int(n), "ci_low": low, "ci_high": high}
    how = {"seed": str(int(seed)), "protocol": protocol, "dataset": dataset}
    where = {"device": _hardware(str(device)), "seconds": round(float(seconds), 3)}
    versions = f"torch {torch.__version__.partition('+')[0]}"
    when = {"versions": versions, "commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    return place | number | how | where | when | {"images": images, "code": code}


def record(chapter: str, rows: Rows, folder: str | Path | None = None) -> None:
    """Merge measurements into `results/CHAPTER.csv`; a later one replaces an earlier one.

    One replaces another when place, protocol, data set and seed agree. A row that is a mean over
    several seeds, as older ones are, goes when as many single seeds are there. The file is replaced
    in one step and under a lock: neither a kill nor a second process loses a row.
    """
    file = chapters_folder(chapter, folder) / "results" / f"{chapter}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = _frame(rows)
    new[NUMBERS] = new[NUMBERS].map(lambda number: "" if math.isnan(number) else f"{number:.10g}")
    with locked(file.parent):
        merged = pd.concat([_read(file, COLUMNS), new])
        merged = merged.drop_duplicates([*KIND, "seed"], keep="last").sort_values([*KIND, "seed"])
        several = merged["seed"].str.count(" ")
        singles = merged.assign(single=several.eq(0)).groupby(KIND)["single"].transform("sum")
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        merged[several.eq(0) | (singles <= several)].to_csv(temporary, index=False)
        os.replace(temporary, file)


def printed(chapter: str, folder: str | Path | None = None) -> pd.DataFrame:
    """Return what the paper prints, in its order: the value as a number and, `printed`, as text."""
    file = chapters_folder(chapter, folder) / "paper" / f"{chapter}.csv"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: expected the numbers that the paper prints")
    return _transcribed(file, version(file)).copy()


def best(
    chapter: str,
    measured: Rows | None = None,
    *,
    dataset: str | None = None,
    protocol: str | None = None,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Return the best measurement of every place: stored, or among `measured` where it is given.

    It is the mean over the seeds that were measured, with `evaluation.seed_interval`; `seed` names
    them, and `seconds` are their sum.

    The paper's data set or a copy of it (`cifar10-jpeg` for `cifar10`) goes before a stand-in such
    as `digits`; then protocol `paper` before `short` before `quick`; then the paper's very data set
    before its copy. The column `own` names the paper's data set, "" where it has no such place.
    With `dataset` or `protocol` only measurements of that data set or protocol count.
    """
    frame = _measured(chapter, measured, folder)
    return _best(frame, printed(chapter, folder), dataset, protocol)


def value(
    chapter: str,
    table: str,
    row: str,
    column: str,
    metric: str = "accuracy",
    *,
    source: str = "measured",
    measured: Rows | None = None,
    data: str = "",
    dataset: str | None = None,
    protocol: str | None = None,
    folder: str | Path | None = None,
) -> float:
    """Return one number: the best measurement or, with `source="paper"`, what the paper prints.

    `data`, the paper's data set, may be named apart from the column, which begins with it.
    `measured`, `dataset`, `protocol` and `folder` are those of `best`. A number that nobody has
    measured, or that the paper does not print, is a ValueError.
    """
    column = f"{data} {column}".strip()
    if source not in ("measured", "paper"):
        raise ValueError(f"unknown source {source!r}: expected 'measured' or 'paper'")
    place = (table, row, column, metric)
    if source == "measured":
        choice: dict[str, Any] = {"dataset": dataset, "protocol": protocol, "folder": folder}
        return float(row_at(chapter, *place, measured=measured, **choice)["value"])
    theirs = _at(printed(chapter, folder), *place)
    if theirs.empty:
        name = " / ".join([chapter, *place])
        raise ValueError(
            f"the paper does not print {name}: printed({chapter!r}) lists what it does"
        )
    return float(theirs["value"].iloc[0])


def row_at(
    chapter: str,
    table: str,
    row: str,
    column: str,
    metric: str = "accuracy",
    *,
    seeds: Sequence[str] = (),
    measured: Rows | None = None,
    dataset: str | None = None,
    protocol: str | None = None,
    folder: str | Path | None = None,
) -> pd.Series:
    """Return one row as `best` has it, with its `chapter`; with `seeds`, the stored one of those.

    A place that nobody has measured is a ValueError.
    """
    place = (table, row, column, metric)
    if seeds:
        found = _at(_frame(rows_of(chapter, folder)), *place)
        found = _of_seeds(found[found["seed"].isin(seeds)])
    else:
        found = _at(_measured(chapter, measured, folder), *place)
    found = _best(found, _at(printed(chapter, folder), *place), dataset, protocol)
    if found.empty:
        choice = {"dataset": dataset, "protocol": protocol, "seeds": [*seeds]}
        asked = {name: chosen for name, chosen in choice.items() if chosen} or ""
        name = " / ".join([chapter, *place])
        raise ValueError(f"nobody has measured {name} {asked}: run the chapter and record it")
    return found.assign(chapter=chapter).iloc[0]


def claim(text: str, ok: Any) -> None:
    """Print `✓ text` where `ok` holds; raise an AssertionError with the text where it does not.

    Where the console has no ✓, as on a Windows of code page 1252, it is `ok`.
    """
    if not bool(ok):
        raise AssertionError(f"does not hold: {text}")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        "✓".encode(encoding)
        mark = "✓"
    except UnicodeEncodeError:
        mark = "ok:"
    print(mark, text.encode(encoding, "replace").decode(encoding))


def coverage(chapter: str, folder: str | Path | None = None) -> pd.DataFrame:
    """Return, table by table, how many of the paper's cells are filled, and how.

    Numbers that the file takes from elsewhere, whose note begins with `cited`, are not counted.

    Columns: `cells` that the paper prints; those whose best measurement is at `paper`, `short` and
    `quick`; those still `empty`; and the `datasets` measured, with their counts.
    """
    filled = best(chapter, folder=folder)[[*KEY, "protocol", "dataset"]]
    theirs = printed(chapter, folder)
    theirs = theirs[~theirs["note"].str.startswith("cited")]
    cells = theirs[KEY].merge(filled, on=KEY, how="left")
    table = cells.groupby("table", sort=False)
    counts = table.size().to_frame("cells")
    for protocol in PROTOCOLS:
        counts[protocol] = table["protocol"].agg(lambda given, p=protocol: int((given == p).sum()))
    counts["empty"] = (counts["cells"] - counts[PROTOCOLS].sum(axis=1)).astype(int)
    counts["datasets"] = table["dataset"].agg(
        lambda names: ", ".join(f"{name} {count}" for name, count in names.value_counts().items())
    )
    return counts


def _measured(chapter: str, measured: Rows | None, folder: str | Path | None) -> pd.DataFrame:
    if measured is not None:
        return _of_seeds(_frame(measured))
    file = chapters_folder(chapter, folder) / "results" / f"{chapter}.csv"
    return _stored(file, version(file))


def _at(frame: pd.DataFrame, *place: str) -> pd.DataFrame:
    for name, wanted in zip(KEY, place, strict=True):
        frame = frame[frame[name] == wanted]
    return frame


def _best(
    frame: pd.DataFrame, theirs: pd.DataFrame, dataset: str | None, protocol: str | None
) -> pd.DataFrame:
    frame = frame[frame["dataset"].eq(dataset or frame["dataset"])]
    frame = frame[frame["protocol"].eq(protocol or frame["protocol"])]
    own = theirs[[*KEY, "dataset"]].rename(columns={"dataset": "own"})
    frame = frame.merge(own, on=KEY, how="left").fillna({"own": ""})

    def order(row: Any) -> tuple[bool, int, bool]:
        stand_in = row.dataset == "digits" or not is_own(row.dataset, row.own)
        return stand_in, PROTOCOLS.index(row.protocol), row.dataset != row.own

    frame = frame.assign(order=[order(row) for row in frame.itertuples()])
    return frame.sort_values("order", kind="stable").drop_duplicates(KEY).drop(columns="order")


def is_own(dataset: str, own: str) -> bool:
    """Whether images are those of the paper or a copy of them, as `cifar10-jpeg` of `cifar10`."""
    return own in ("", dataset) or dataset.startswith(f"{own}-")


def version(file: Path) -> tuple[int, ...]:
    """What differs when a file has been written anew; () where there is none."""
    if not file.is_file():
        return ()
    found = file.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


@functools.lru_cache(maxsize=16)
def _stored(file: Path, _version: tuple[int, ...]) -> pd.DataFrame:
    return _of_seeds(_frame(_read(file, COLUMNS)))


@functools.lru_cache(maxsize=16)
def _transcribed(file: Path, _version: tuple[int, ...]) -> pd.DataFrame:
    frame = _read(file, [*KEY, "value", "dataset", "note"])
    return frame.assign(printed=frame["value"], value=frame["value"].astype(float))


def _of_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a kind: that of its only seed, the mean of several, or an older, larger mean."""
    frame = frame.drop_duplicates([*KIND, "seed"], keep="last")
    alone = ~frame.duplicated(KIND, keep=False)
    means = [_mean(rows) for _, rows in frame[~alone].groupby(KIND, sort=False)]
    return pd.concat([frame[alone], *means], ignore_index=True) if means else frame[alone]


def _mean(rows: pd.DataFrame) -> pd.DataFrame:
    several = rows["seed"].str.count(" ")
    singles = rows[several.eq(0)]
    if len(singles) <= several.max():
        return rows[several.eq(several.max())].tail(1)
    if len(singles) == 1:
        return singles
    mean, one = singles.tail(1).copy(), singles.iloc[-1]
    limits = (0.0, 100.0) if words.is_percent(one["metric"]) else (-math.inf, math.inf)
    intervals = [*zip(singles["ci_low"], singles["ci_high"], strict=True)]
    low, high = seed_interval(singles["value"].tolist(), intervals)
    mean["value"], mean["n"] = statistics.fmean(singles["value"]), round(singles["n"].mean())
    mean["ci_low"], mean["ci_high"] = max(low, limits[0]), min(high, limits[1])
    mean["seconds"], mean["seed"] = singles["seconds"].sum(), " ".join(sorted(singles["seed"]))
    for name in ("device", "versions", "commit", "date", "images", "code"):
        mean[name] = "; ".join(dict.fromkeys(singles[name]))
    return mean


def rows_of(chapter: str, folder: str | Path | None = None) -> pd.DataFrame:
    """The stored rows of a chapter as text, with the columns `COLUMNS`; none where none are stored.

    Raises
    ------
    ValueError
        The file is damaged, or of other columns.
    """
    return _read(chapters_folder(chapter, folder) / "results" / f"{chapter}.csv", COLUMNS)


def chapters_folder(chapter: str, folder: str | Path | None = None) -> Path:
    """The folder that holds the chapters, `results/` and `paper/`: `folder`, or the one found.

    Raises
    ------
    FileNotFoundError
        Neither the working directory nor the package lies in a clone of the book.
    """
    if folder is not None:
        return Path(folder)
    for start in (Path.cwd(), Path(__file__).parent):
        for place in (start, *start.parents):
            for found in (place, place / "chapters"):
                if (found / "paper" / f"{chapter}.csv").is_file():
                    return found
    raise FileNotFoundError(
        f"no paper/{chapter}.csv above {Path.cwd()} or the package: work inside a clone of the "
        "book, or name the folder that holds results/ and paper/ with folder="
    )


def _read(file: Path, columns: list[str]) -> pd.DataFrame:
    if not file.is_file():
        return pd.DataFrame(columns=columns, dtype=str)
    try:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)  # a row may be called None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no table, perhaps after a merge conflict: {error}") from error
    if list(frame.columns) != columns:
        raise ValueError(f"{file} has columns {list(frame.columns)}; expected {columns}")
    if frame[columns[0]].str.match(CONFLICT).any():
        raise ValueError(f"{file} holds a merge conflict: resolve it, and delete the marks of git")
    return frame


def _frame(rows: Rows) -> pd.DataFrame:
    if isinstance(rows, pd.DataFrame):
        frame = rows
    else:
        frame = pd.DataFrame([*rows]) if len(rows) else pd.DataFrame(columns=COLUMNS)
    if missing := [name for name in COLUMNS if name not in frame]:
        raise ValueError(f"rows lack {', '.join(missing)}: make them with measure(...)")
    frame = frame[COLUMNS].copy()
    frame[NUMBERS] = frame[NUMBERS].apply(pd.to_numeric).astype(float)
    return frame


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for whoever is inside with the same `folder`."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # given back when the process ends, however it ends
        yield
    finally:
        os.close(handle)


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    how_many = f"{threads} thread{'s' * (threads > 1)}"
    return f"{processor()}, {how_many}" if device == "cpu" else device


@functools.cache
def processor() -> str:
    """The processor's name and the widest instructions that PyTorch uses on it: `AMD …, AVX2`."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found[1].strip() if found else name
    units = torch.backends.cpu.get_cpu_capability()
    rounded = " with bf16" * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"{name}, {units}{rounded}"


@functools.cache
def commit() -> str:
    """The commit whose code was imported, with `-dirty` where tracked code differs from it.

    What the book itself writes (stored results and figures, executed notebooks, the picture of the
    front page) is no code.
    """
    own = ["chapters/results/*", "*.ipynb", "book/static/hook.png"]
    try:
        name = _git("rev-parse", "--short", "HEAD")
        pathspec = ["--", ":/", *(f":(exclude,top){name}" for name in own)]
        return name + "-dirty" * bool(_git("status", "--porcelain", "-uno", *pathspec))
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
