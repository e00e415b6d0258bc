"""What all measurements of one run of a chapter share, and the folder that it goes on from."""

import ast
import contextlib
import itertools
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

from defenses import code, distributed, outcomes
from defenses.checkpoint import kept_in
from defenses.data import NAMES
from defenses.results import COLUMNS, KEY, PROTOCOLS, chapters_folder, measure

T = TypeVar("T")
DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it


@dataclass
class Run:
    """The parameters of a chapter, checked before any work, and what the run has measured.

    Parameters
    ----------
    chapter : str
    protocol : {"quick", "short", "paper"}
    dataset : str
        A name that `load_data` takes; empty: `digits` at `quick`, else `mnist`.
    device : str
        `cpu`, `cuda`, `cuda:1`, …; empty: `cuda` where there is one, else `cpu`.
    seed : int
    results : str
        A folder for what the run measures and trains, made where it is missing. A later run with
        the same folder goes on from it: what is there is neither trained nor measured again. Empty:
        `does-it-hold` on Google Drive, if Colab has mounted it; else nothing is kept.
    only : str
        The one network (or other name given to `networks`) to work on; empty: all.

    Under `torchrun` all processes make the same run, and the first writes what it keeps.

    Raises
    ------
    ValueError
        A parameter is not of its type, names nothing known, or asks for what is not there; or
        papermill was given a name that the chapter's parameters do not have.
    """

    chapter: str
    protocol: str = "quick"
    dataset: str = ""
    device: str = ""
    seed: int = 0
    results: str = ""
    only: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    known: list[str] = field(default_factory=list, repr=False)
    _last: float = field(default_factory=time.perf_counter, repr=False)
    _owed: float = field(default=0.0, repr=False)  # seconds of training that no row has yet
    _begun: dict[Path, float] = field(default_factory=dict, repr=False)
    _trained: dict[str, float] = field(default_factory=dict, repr=False)  # since the row before

    def __post_init__(self) -> None:
        _refuse_unknown(getattr(sys.modules["__main__"], "In", []))
        distributed.start()
        for name in ("protocol", "dataset", "device", "results", "only"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(
                f"seed must be a whole number, got {self.seed!r}; papermill's -r gives text, -p not"
            )
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"unknown protocol {self.protocol!r}: expected one of {', '.join(PROTOCOLS)}"
            )
        self.dataset = self.dataset or ("mnist" if self.full else "digits")
        if self.dataset not in NAMES and not re.match("imagefolder:.", self.dataset):
            raise ValueError(
                f"unknown data set {self.dataset!r}: expected one of {', '.join(NAMES)}"
            )
        self.device = _device(self.device)
        if not self.results and "google.colab" in sys.modules and DRIVE.is_dir():
            self.results = str(DRIVE / "does-it-hold")
        if self.results:
            _writable(Path(self.results))

    @property
    def full(self) -> bool:
        """Whether the run is more than a quick one."""
        return self.protocol != "quick"

    @property
    def own(self) -> bool:
        """Whether it is somebody's own, unlike the quick one that the pages are made with."""
        return self.full or bool(self.results)

    def networks(self, names: Iterable[T]) -> list[T]:
        """Those of `names` that this run is to work on: all, or the one that `only` names."""
        names = list(names)
        self.known += [n for n in map(str, names) if n not in self.known]
        return [name for name in names if not self.only or str(name) == self.only]

    def takes(self, name: str) -> bool:
        """Whether to do what is called `name`: a measurement that needs several networks."""
        return bool(self.networks([name]))

    def checkpoint(self, name: str) -> Path | None:
        """The file that the training called `name` goes on from; None where nothing is kept.

        In a campaign one that other code has trained is put aside, under the digest of that code.
        """
        if not self.results:
            return None
        file = Path(self.results, "checkpoints", self._of, self.chapter, f"{_file_name(name)}.pt")
        if behind := " ".join(
            code.digest(self._notebook, cell) for cell in _cells(until="__missing__")
        ):
            distributed.of_first(lambda: _put_aside(file, behind))
        if self.only in ("", name) or name not in self.known:  # another's training is not ours
            self._begun[file] = _seconds(file)
        return file

    def note(
        self, table: str, row: str, column: str, outcome: Any, metric: str = "accuracy"
    ) -> Any:
        """Note one outcome and return it: something with `n`, `ci` and `percent` or else `value`.

        `defenses.evaluation` makes such outcomes; the interval of a percentage is in [0, 1]. Where
        `outcome` is a function without arguments, it is called only if the folder `results` does
        not hold what it returned before, from the same code; an AutoAttack in it goes on from
        where it was killed. The row's seconds are those since the row before it, and those that a
        training had taken before it was resumed.
        """
        self._settle()
        place, behind = (table, row, column, metric), self._code()
        stored = self._stored.get(place)
        if stored is not None and callable(outcome) and stored["code"] == behind:
            kept = outcomes.from_json(stored["outcome"])
            self.rows.append({name: stored[name] for name in COLUMNS})
            self._last = time.perf_counter()
            return kept
        own = f".attacks{distributed.processes()[0] or ''}"  # each process has images of its own
        with kept_in(self.file.with_suffix(own) if self.results else None):
            return self._measured(place, behind, outcome() if callable(outcome) else outcome)

    def _measured(self, place: tuple[str, str, str, str], behind: str, outcome: Any) -> Any:
        self._settle()
        shown = hasattr(outcome, "percent")
        number, scale = (outcome.percent, 100) if shown else (outcome.value, 1)
        ci = (scale * outcome.ci[0], scale * outcome.ci[1])
        now = time.perf_counter()
        how: dict[str, Any] = {"protocol": self.protocol, "dataset": self.dataset}
        how |= {"device": self.device, "seed": self.seed}
        how |= {"seconds": now - self._last + self._owed}
        how |= {"n": outcome.n, "ci": ci, "code": behind}
        how |= {"images": getattr(outcome, "images", "")}
        self.rows.append(measure(*place, number, **how))
        if (processes := distributed.processes()[1]) > 1:
            self.rows[-1]["device"] += f" × {processes}"
        self._last, self._owed = now, 0.0
        if self.results:
            more = {"outcome": outcomes.to_json(outcome), "trained": self._trained}
            self._append(self.rows[-1] | more)
            self._trained = {}
        return outcome

    def _settle(self) -> None:
        """Owe the seconds of trainings to the next row, also those from before they were resumed.

        A row that is kept and not measured must not swallow them, so the clock forgets them.
        """
        for file, before in self._begun.items():
            seconds, name = _seconds(file), file.stem
            self._owed += seconds - self._paid.get(name, 0.0)
            self._last += seconds - before
            self._paid[name] = self._trained[name] = seconds
        self._begun.clear()

    def keep(self, name: str, figure: Figure) -> Figure:
        """Return `figure`; also write it to `figures/CHAPTER-NAME.png` in the folder `results`."""
        if self.results and distributed.processes()[0] == 0:
            folder = Path(self.results, "figures", self._of)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{self.chapter}-{name}.png")
        return figure

    def draw(self, name: str, make: Callable[[], Figure]) -> Figure | None:
        """Draw and `keep` a figure of several networks: the unit `figures`."""
        return self.keep(name, make()) if self.takes("figures") else None

    @property
    def file(self) -> Path:
        """Where the rows of this run are kept, a line each; its name says what the run is of."""
        parts = [self.dataset, self.protocol, self.seed, self.only or "all"]
        name = "-".join(_file_name(str(part)) for part in parts)
        return Path(self.results, "rows", self.chapter, f"{name}.jsonl")

    @property
    def _of(self) -> str:
        return f"{_file_name(self.dataset)}-{self.protocol}-{self.seed}"

    @cached_property
    def _paid(self) -> dict[str, float]:
        """The seconds of trainings that the seconds of rows hold, by the name of the file."""
        paid: dict[str, float] = {}
        for row in read_rows(self.file):
            paid |= row.get("trained", {})
        return paid

    @cached_property
    def _stored(self) -> dict[tuple[str, ...], dict[str, Any]]:
        rows = distributed.of_first(lambda: read_rows(self.file)) if self.results else []
        return {tuple(row[name] for name in KEY): row for row in rows}

    def _append(self, row: dict[str, Any]) -> None:
        if distributed.processes()[0] > 0:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and not _ends_line(file):
                file.write(b"\n")  # after a line that a kill has cut off
            file.write(json.dumps(row, allow_nan=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _code(self) -> str:
        """The digest of the code behind the running cell; in Jupyter, of the whole chapter."""
        if not self.results:
            return ""
        return code.digest(self._notebook, [None, *_cells()][-1])  # not a function from another

    @property
    def _notebook(self) -> Path:
        return chapters_folder(self.chapter) / f"{self.chapter}.ipynb"


class OnDemand(dict[str, T]):
    """A dict whose entries are made by ``make(name)`` when they are first asked for."""

    def __init__(self, make: Callable[[str], T]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, name: str) -> T:
        self[name] = made = self.make(name)
        return made


def _cells(until: str = "") -> list[int]:
    """The cells of a campaign that are running, the innermost first, inside the function `until`.

    In Jupyter none, since the code of a cell has another name there.
    """
    frame, cells = sys._getframe(1), list[int]()
    while frame is not None and frame.f_code.co_name != until:
        if found := re.fullmatch(r"<cell (\d+)>", frame.f_code.co_filename):
            cells.append(int(found[1]))
        frame = frame.f_back  # type: ignore[assignment]
    return cells


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of one file of a run, without a last line that a kill has cut off."""
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            rows.append(json.loads(line))
    return rows


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _file_name(text: str) -> str:
    """`text` as a name that every file system takes; two texts have two names."""
    safe = re.sub(r"[^\w.+=-]+", "_", text)
    return safe if safe == text else f"{safe}~{zlib.crc32(text.encode()):08x}"


def _put_aside(file: Path, behind: str) -> None:
    note = file.with_suffix(".code")
    if file.is_file() and note.is_file() and (other := note.read_text()) != behind:
        file.replace(file.with_name(f"{file.stem}.{zlib.crc32(other.encode()):08x}.pt"))
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(behind)


def _seconds(file: Path) -> float:
    """How long the training in a checkpoint has taken so far; 0 where `fit` could not read it."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return sum(float(epoch["seconds"]) for epoch in saved["history"])
    except Exception:
        return 0.0


def _refuse_unknown(cells: Sequence[str]) -> None:
    """Raise a ValueError where papermill set a name that the cell before it does not have.

    papermill itself writes its cell, which begins with `# Parameters`, and runs on.
    """
    for before, cell in itertools.pairwise(cells):
        if cell.startswith("# Parameters\n"):
            known, given = _names(before, ast.AnnAssign), _names(cell, ast.Assign)
            if known and given - known:
                unknown, expected = (", ".join(sorted(s)) for s in (given - known, known))
                raise ValueError(f"no parameter is called {unknown}: expected one of {expected}")


def _names(cell: str, kind: type[ast.stmt]) -> set[str]:
    found = [node for s in ast.parse(cell).body if isinstance(s, kind) for node in ast.walk(s)]
    return {n.id for n in found if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _device(name: str) -> str:
    if not name and distributed.processes()[1] > 1 and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device {name!r} is not there: PyTorch sees {count} GPUs; take cpu")
    return name


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder results={str(folder)!r} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder results={str(folder)!r} cannot be written to")
