"""Compute what is missing or out of date, best value first: what `make results` does.

The unit of work is one network of one chapter, at one data set, protocol and seed: its training and
all its measurements. A unit runs the chapter's own cells, those that measure, without Jupyter. What
it has trained and measured lies in `runs/`, so that a killed unit goes on where it was; `merge`
carries the finished rows into `chapters/results`.

    python -m book.campaign plan        what there is to do, in order, with its cost
    python -m book.campaign results     do it: by Snakemake where it is installed, else one by one
    python -m book.campaign unit NAME   one unit, as Snakemake calls it
    python -m book.campaign merge       rows of runs/ into the book's store
    python -m book.campaign status      what the store holds, and from which code
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from defenses import code, distributed, outcomes, training, words
from defenses.results import COLUMNS, KEY, KIND, PROTOCOLS, commit, printed, record, rows_of
from defenses.run import Run, read_rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "chapters"
SNAKEFILE = Path(__file__).with_name("campaign.smk")
# glibc keeps what a step frees for the next one: on a CPU a step then takes a sixth less time.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass(frozen=True, order=True)
class Unit:
    """One network (or one measurement of several) of one chapter under one set of conditions."""

    chapter: str
    dataset: str
    protocol: str
    seed: int
    only: str

    def run(self, results: Path, device: str = "") -> Run:
        """The `Run` that the chapter makes for this unit."""
        place = self.chapter, self.protocol, self.dataset, device, self.seed
        return Run(*place, results=str(results), only=self.only)

    @property
    def notebook(self) -> Path:
        return CHAPTERS / f"{self.chapter}.ipynb"

    def done(self, results: Path) -> Path:
        """The file that says that all of this unit's cells have run, and from which code."""
        return self.run(results).file.with_suffix(".done")

    def feeds(self, other: "Unit") -> bool:
        """Whether its network may be one that `other`, which needs several, takes."""
        return replace(self, only=other.only) == other != self

    def is_done(self, results: Path) -> bool:
        file = self.done(results)
        return file.is_file() and file.read_text() == code.digest(self.notebook)


def execute(notebook: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Run the measuring cells of `notebook` as plain Python and return the names that they bind.

    Raises
    ------
    ValueError
        The notebook has no parameter of that name.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    matplotlib.use("Agg")
    with contextlib.chdir(notebook.parent):
        for cell in code.measuring(notebook):
            exec(compile(cell.source, f"<cell {cell.index}>", "exec"), names)
            if "parameters" in cell.tags:
                if unknown := parameters.keys() - names.keys():
                    raise ValueError(f"{notebook.name} has no parameter {sorted(unknown)}")
                names |= parameters
    return names


def do(unit: Unit, results: Path, data_root: str = "") -> None:
    """Train and measure what `unit` lacks, and mark it as done.

    Raises
    ------
    ValueError
        The chapter has no network, and no measurement of several, of that name.
    """
    with free_gpu() as device, contextlib.redirect_stdout(sys.stderr):
        parameters = {"protocol": unit.protocol, "dataset": unit.dataset, "seed": unit.seed}
        parameters |= {"only": unit.only, "results": str(results.resolve()), "device": device}
        names = execute(unit.notebook, parameters | {"data_root": data_root})
    if unit.only and unit.only not in (known := names["run"].known):
        raise ValueError(f"{unit.chapter} has no {unit.only!r}, expected one of {known}")
    if distributed.processes()[0] > 0:
        return
    unit.done(results).parent.mkdir(parents=True, exist_ok=True)
    unit.done(results).write_text(code.digest(unit.notebook))


@contextlib.contextmanager
def free_gpu() -> Iterator[str]:
    """The name of a GPU that no other unit on this machine holds; "" where there is only one, and
    under `torchrun`, which numbers them."""
    import torch

    count = torch.cuda.device_count()
    if count < 2 or fcntl is None or "LOCAL_RANK" in os.environ:
        yield ""
        return
    folder = Path(tempfile.gettempdir(), f"does-it-hold-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        for index in range(count):
            with (folder / str(index)).open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with its process
                except BlockingIOError:
                    continue
                yield f"cuda:{index}"
                return
        time.sleep(1)


def end_with(process: int) -> None:
    """End this process, whatever it is at, soon after the one with that number is gone.

    What a unit has finished is kept; two of it at once would compute the same again.
    """

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(process, 0)  # asks only whether it is there
                time.sleep(0.5)
        os._exit(1)

    if os.name == "posix":  # elsewhere the question would kill it
        threading.Thread(target=watch, daemon=True).start()


# What there is to do


def units(
    chapter: str, dataset: str, protocol: str, seeds: Sequence[int], data_root: str = ""
) -> dict[Unit, int]:
    """The units of a chapter, in its own order, with the operations that each one's training takes.

    The chapter is asked by running it for a network that is none; a step of each tells the cost.
    """
    nothing = {"protocol": protocol, "dataset": dataset, "only": "(none)", "data_root": data_root}
    with training.counted() as counts:
        names = execute(CHAPTERS / f"{chapter}.ipynb", nothing)
        flops = {}
        for name in names["run"].known:
            before = sum(counts)
            with contextlib.suppress(KeyError):  # no network: a measurement of several
                names["trained"][name]
            flops[name] = sum(counts) - before
    dataset = names["run"].dataset
    return {Unit(chapter, dataset, protocol, s, n): flops[n] for s in seeds for n in flops}


def plan(chapters: Sequence[str], results: Path, **how: Any) -> pd.DataFrame:
    """What is to be done, best value first: the paper's cells that a unit fills for its cost."""
    table = []
    for chapter in chapters:
        theirs = printed(chapter, CHAPTERS)
        for unit, flops in units(chapter, **how).items():
            if not unit.is_done(results):
                table.append((unit, int((theirs["row"] == unit.only).sum()), flops))
    frame = pd.DataFrame(table, columns=["unit", "cells", "flops"])
    value = (frame["cells"] + 0.5) / frame["flops"].replace(0, math.inf)  # what needs several: last
    return frame.assign(value=value).sort_values("value", ascending=False, kind="stable")


# Doing it


def dirty(chapters: Sequence[str]) -> str:
    """Why nothing may be recorded now; "" where the code is that of a commit."""
    name = commit()  # which leaves notebooks out: they are executed anew without being edited
    if name and not name.endswith("-dirty") and not any(map(_edited, chapters)):
        return ""
    return (
        "the working tree has changed code: commit it first, so that every number names the code "
        "that made it (or try with --allow-changes: such rows are never merged)"
    )


def _edited(chapter: str) -> bool:
    """Whether the code cells of a chapter's notebook are not those that were committed."""

    def cells(text: str) -> list[str]:
        found = json.loads(text)["cells"]
        return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]

    file = CHAPTERS / f"{chapter}.ipynb"
    command = ["git", "-C", str(CHAPTERS), "show", f"HEAD:./{file.name}"]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8")
    return not shown.returncode and cells(shown.stdout) != cells(file.read_text(encoding="utf-8"))


def one_by_one(todo: pd.DataFrame, options: argparse.Namespace) -> int:
    """Run the units of a plan in turn, each in a process of its own; return how many failed."""
    start, done, failed = time.monotonic(), 0.0, 0
    total = todo["flops"].sum() + len(todo) * 1e9
    for place, (unit, flops) in enumerate(zip(todo["unit"], todo["flops"], strict=True), 1):
        elapsed = time.monotonic() - start
        left = f", about {elapsed / done * (total - done) / 60:.0f} min left" if done else ""
        if options.minutes and elapsed > 60 * options.minutes:
            break
        print(f"[{place}/{len(todo)}] {_title(unit)}{left}", flush=True)
        failed += _within(_command(unit, options), options, elapsed) not in (0, None)
        done += flops + 1e9
    return failed


def by_snakemake(todo: pd.DataFrame, options: argparse.Namespace) -> int:
    """Hand the plan to Snakemake, with the first of it as the most urgent."""
    done = {unit: str(unit.done(options.results)) for unit in todo["unit"]}
    networks = todo["unit"][todo["flops"] > 0]  # the others need them, and not each other
    jobs = [
        {
            "title": _title(unit),
            "done": done[unit],
            "command": _command(unit, options)[1:],
            "after": [] if flops else [done[other] for other in networks if other.feeds(unit)],
        }
        for unit, flops in zip(todo["unit"], todo["flops"], strict=True)
    ]
    listed = options.results / f"plan-{os.getpid()}.json"
    listed.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]
    command += ["--directory", str(ROOT), "--rerun-triggers", "mtime", "--keep-going", "--nolock"]
    threads = 2 * max(1, options.gpus)
    if not options.executor:
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
    config = {"plan": listed.resolve(), "gpus": options.gpus, "threads": threads}
    command += ["--rerun-incomplete", "--config", *(f"{key}={config[key]}" for key in config)]
    if options.executor:
        command += ["--jobs", str(options.jobs), "--executor", options.executor]
    else:
        command += ["--cores", str(options.jobs * threads)]
    command += ["--quiet", "rules", *options.snakemake]
    try:
        return int(_within(command, options, 0) or 0)
    finally:
        listed.unlink(missing_ok=True)


def _command(unit: Unit, options: argparse.Namespace) -> list[str]:
    words = [sys.executable]
    if options.gpus > 1:
        words += ["-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={options.gpus}"]
    words += ["-m", "book.campaign", "unit", unit.only, "--chapters", unit.chapter]
    words += ["--dataset", unit.dataset, "--protocol", unit.protocol, "--seeds", str(unit.seed)]
    words += [f"--results={options.results}", f"--data-root={options.data_root}"]
    words += [] if options.executor else [f"--parent={os.getpid()}"]
    return words + ["--allow-changes"] * options.allow_changes


def _within(command: list[str], options: argparse.Namespace, elapsed: float) -> int | None:
    """Run a command and all that it starts until the minutes are over; None if they were."""
    rest = 60 * options.minutes - elapsed if options.minutes else None
    process = subprocess.Popen(command, cwd=ROOT, env=KEEP | os.environ, start_new_session=True)
    try:
        return process.wait(rest)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        # Whatever it was at goes on from its last step another time. Of its jobs on a cluster,
        # Snakemake takes back those under way when it is interrupted, not when it is terminated.
        os.killpg(process.pid, signal.SIGINT if options.executor else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(reason, KeyboardInterrupt):
            raise
        return None


# What was done


def merge(results: Path, chapters: Sequence[str]) -> dict[str, int]:
    """Carry the rows of `results` into the book's store; count them by chapter.

    Rows from no commit stay where they are, and so do those at `quick`. Those from code that has
    changed since, which `status` counts, take no place of a row that is from the code as it is or
    as new.
    """
    merged = {}
    for chapter in chapters:
        now = digests(chapter)
        stored = {_place(row): row for row in rows_of(chapter, CHAPTERS).to_dict("records")}
        rows: list[dict[str, Any]] = []
        for file in sorted((results / "rows" / chapter).glob("*.jsonl")):
            newest = {tuple(row[name] for name in KEY): row for row in read_rows(file)}
            rows += newest.values()
        rows = [row for row in rows if row["protocol"] != "quick" and _clean(row["commit"])]
        for row in list(rows):
            old = stored.get(_place(row), {"code": "", "date": ""})
            if row["code"] not in now and (old["code"] in now or old["date"] >= row["date"]):
                rows.remove(row)
        rows.sort(key=lambda row: (row["code"] in now, row["date"]))  # of two, the last is kept
        if rows:
            record(chapter, [{name: row[name] for name in COLUMNS} for row in rows], CHAPTERS)
            outcomes.store(CHAPTERS / "results" / f"{chapter}.npz", rows)
        merged[chapter] = len(rows)
        shown = (CHAPTERS / f"{chapter}.ipynb").read_text(encoding="utf-8")
        better_last = itertools.product(words.DATA, ("short", "paper"))
        for dataset, protocol in better_last:
            suffix = "" if dataset == "mnist" else f"-{dataset}"
            folder = results / "figures" / f"{dataset}-{protocol}-0"
            for picture in folder.glob(f"{chapter}-*.png"):
                name = f"{picture.stem}{suffix}"
                if f'Picture(CHAPTER, \\"{name.removeprefix(f"{chapter}-")}\\")' in shown:
                    shutil.copy2(picture, CHAPTERS / "results" / "figures" / f"{name}.png")
    return merged


def digests(chapter: str) -> set[str]:
    """Of the code behind each cell of a chapter that measures, and behind all of them."""
    notebook = CHAPTERS / f"{chapter}.ipynb"
    cells = [cell.index for cell in code.measuring(notebook)]
    return {code.digest(notebook, cell) for cell in [None, *cells]}


def _place(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in (*KIND, "seed"))


def _clean(name: str) -> bool:
    return bool(name) and not name.endswith("-dirty")


def status(chapters: Sequence[str]) -> pd.DataFrame:
    """For each table, data set and protocol: what is stored, from how many seeds, from which code.

    `cells` the paper prints, of which `filled` are stored; `rows` are stored in all, of which
    `changed` come from code that has changed since, `unknown` do not say from which, and `dirty`
    come from no commit.
    """
    found = []
    for chapter in chapters:
        now = digests(chapter)
        theirs = printed(chapter, CHAPTERS)
        theirs = theirs[~theirs["note"].str.startswith("cited")]
        stored = rows_of(chapter, CHAPTERS)
        stored["changed"] = ~stored["code"].isin(now) & stored["code"].ne("")
        stored["unknown"] = stored["code"].eq("")
        stored["dirty"] = ~stored["commit"].map(_clean)
        for (table, dataset, protocol), rows in stored.groupby(["table", "dataset", "protocol"]):
            own = theirs[theirs["table"].eq(table)]
            filled = len(own.merge(rows[KEY].drop_duplicates(), on=KEY))
            seeds = len({seed for text in rows["seed"] for seed in text.split()})
            place = {"chapter": chapter, "table": table, "dataset": dataset, "protocol": protocol}
            counts = {"cells": len(own), "filled": filled, "seeds": seeds, "rows": len(rows)}
            marks = {name: int(rows[name].sum()) for name in ("changed", "unknown", "dirty")}
            found.append(place | counts | marks)
        empty = theirs[~theirs["table"].isin(stored["table"])]
        for table, rows in empty.groupby("table", sort=False):
            found.append({"chapter": chapter, "table": table, "cells": len(rows), "filled": 0})
    frame = pd.DataFrame(found).fillna({"dataset": "", "protocol": ""}).fillna(0)
    return frame.astype({name: int for name in frame.columns[4:]})


def _data() -> str:
    return os.environ.get("DEFENSES_DATA", "")


def _title(unit: Unit) -> str:
    return f"{unit.chapter} {unit.only}: {unit.dataset}, {unit.protocol}, seed {unit.seed}"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])  # type: ignore
    parser.add_argument("verb", choices=["plan", "results", "unit", "merge", "status"])
    parser.add_argument("only", nargs="?", default="", help="the network of a unit")
    known = sorted(file.stem for file in CHAPTERS.glob("*.ipynb"))
    parser.add_argument("--chapters", nargs="*", choices=known, default=known, metavar="NAME")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="short")
    parser.add_argument("--dataset", default="", help="empty: mnist, or digits at quick")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=0, help="stop then; 0: when all is done")
    parser.add_argument("--jobs", type=int, default=1, help="units at a time")
    parser.add_argument("--gpus", type=int, default=0, help="of each unit, a process each")
    parser.add_argument("--executor", default="", help="Snakemake's: slurm, kubernetes, …")
    parser.add_argument("--results", type=Path, default=ROOT / "runs")
    parser.add_argument("--data-root", default=_data())
    parser.add_argument("--loop", action="store_true", help="one by one, without Snakemake")
    parser.add_argument("--parent", type=int, default=0, help="a unit ends with this process")
    parser.add_argument("--allow-changes", action="store_true", help="try code of no commit")
    options, rest = parser.parse_known_args(words)
    if rest and not options.executor:
        parser.error(f"unknown: {' '.join(rest)} (words for Snakemake need --executor)")
    if options.executor and (options.loop or not find_spec("snakemake")):
        parser.error("--executor is Snakemake's: no --loop, and pip install -e '.[sweep]'")
    options.snakemake, options.results = rest, options.results.resolve()
    options.data_root = options.data_root and str(Path(options.data_root).resolve())
    return options


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    how = {name: getattr(options, name) for name in ("dataset", "protocol", "seeds", "data_root")}
    if options.verb == "status":
        print(status(options.chapters).to_string(index=False))
    elif options.verb == "merge":
        print(
            *(f"{name}: {n} rows" for name, n in merge(options.results, options.chapters).items())
        )
    elif options.verb == "plan":
        todo = plan(options.chapters, options.results, **how)
        print(todo.assign(unit=todo["unit"].map(_title)).to_string(index=False))
    elif (reason := dirty(options.chapters)) and not options.allow_changes:
        sys.exit(reason)
    elif options.verb == "unit":
        if options.parent:
            end_with(options.parent)
        dataset = options.dataset or ("digits" if options.protocol == "quick" else "mnist")
        place = options.chapters[0], dataset, options.protocol, options.seeds[0], options.only
        do(Unit(*place), options.results, options.data_root)
    else:
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background ignores the first
            signal.signal(number, signal.default_int_handler)
        options.results.mkdir(parents=True, exist_ok=True)
        todo = plan(options.chapters, options.results, **how)
        for unit in todo["unit"]:
            unit.done(options.results).unlink(missing_ok=True)  # it was from other code
        print(f"{len(todo)} units, {todo['flops'].sum() / 1e12:,.1f} TFLOP of training", flush=True)
        engine: Callable = (
            one_by_one if options.loop or not find_spec("snakemake") else by_snakemake
        )
        failed = engine(todo, options) if len(todo) else 0
        merged = merge(options.results, options.chapters)
        print(f"stored now: {sum(merged.values())} rows of this machine's runs")
        sys.exit(bool(failed))


if __name__ == "__main__":
    main()
