"""What the sources claim, and what the stored rows say about it: `chapters/paper/claims.toml`."""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .prose import Prose
from .results import KEY, chapters_folder, printed, row_at
from .yardstick import MARGIN, difference, over_seeds

ALIKE = 1.0  # percentage points within which two accuracies count as one
ANSWERS = ["as measured there", "attacked harder"]
WORDS = {True: "✓ yes", False: "✗ **no**", None: "? open"}
NUMBER = re.compile(r"\d+(\.\d+)?")
TEST = re.compile(r"(.+?) (>=|>|<|~) (?:([\d.]+) )?([\w.]+)")


@dataclass(frozen=True)
class Claim:
    """One claim of a source, the rows that answer it, and the tests that they have to pass.

    `at` gives rows a name, ``"table / row / column"`` or ``"… / metric"``, with ``"paper: "`` for
    what the paper prints and another chapter's name for what that one measured. A test of
    `reproduced`, the source's own comparison, or of `holds`, what the source did not run, is
    ``"a > b"``, ``"a < b"``, ``"a >= b"`` (at most `MARGIN` below) or ``"a ~ b"`` (within
    `ALIKE`), each at 99%, divided by the tests of its list; a number may stand for `b`, or before
    it as its factor. In `evidence`, ``{a}`` is a number, ``{a.n}`` of how many images, and
    ``{a.seeds}`` of which seeds.
    """

    chapter: str
    quote: str
    where: str
    anchor: str
    at: Mapping[str, str]
    evidence: str
    reproduced: Sequence[str] = ()
    holds: Sequence[str] = ()

    @cached_property
    def rows(self) -> dict[str, Any]:
        return {name: _row(self.chapter, place) for name, place in self.at.items()}

    def answer(self, tests: Sequence[str]) -> bool | None:
        """Whether all tests are passed; None where some are not decided, and none is failed."""
        answers = [self._passed(test, len(tests)) for test in tests]
        return False if False in answers else None if None in answers else True

    def _passed(self, test: str, among: int) -> bool | None:
        if not (parts := TEST.fullmatch(test)):
            raise ValueError(f"{self.quote!r}: cannot read the test {test!r}")
        left, sign, factor, right = parts.groups()
        a, b = self.rows.get(left), self.rows.get(right)
        if b is None and NUMBER.fullmatch(right):
            b = float(right)
        if a is None or b is None:
            known = ", ".join(self.rows)
            raise ValueError(f"{self.quote!r}: {test!r} names no row; expected two of {known}")
        same = hasattr(b, "seed")  # a number, or what a source prints, has other images
        low, high = difference(a, b, factor=float(factor or 1), among=among, same=same)
        if sign == ">=":
            return _decided(low > -MARGIN, high < -MARGIN)
        if sign == "~":
            return _decided(low > -ALIKE and high < ALIKE, high < -ALIKE or low > ALIKE)
        return _decided(low > 0, high < 0) if sign == ">" else _decided(high < 0, low > 0)

    def _compared(self) -> dict[str, Any]:
        """The rows, those of a test over the seeds that both have."""
        rows, tests = dict(self.rows), [*self.reproduced, *self.holds]
        for test in tests * len(tests):  # one that loses a seed may be in another test
            each = {
                n: {*rows[n].seed.split()} for n in test.split() if hasattr(rows.get(n), "seed")
            }
            for name, seeds in each.items():
                if seeds != (common := set.intersection(*each.values())):
                    rows[name] = over_seeds(rows[name], common)
        return rows

    def sentence(self) -> str:
        """The evidence, with its numbers and how they were measured."""
        rows = self._compared()
        texts = {name: Number(row, self.at[name]) for name, row in rows.items()}
        ours = [row for row in rows.values() if hasattr(row, "seed")]
        if not ours:
            raise ValueError(f"{self.quote!r}: no row of `at` was measured")
        n = sorted({int(row.n) for row in ours if row.n > 1 and row.metric != "ratio"})
        how = f"n = {n[0]:,}" + (f" to {n[-1]:,}" if len(n) > 1 else "") + "; " if n else ""
        protocols = ", ".join(dict.fromkeys(f"{row.protocol} on {row.dataset}" for row in ours))
        how += f"{_seeds(*ours)}; {protocols}"
        return f"{self.evidence.format_map(texts)} ({how})"


def claims(chapter: str, folder: str | Path | None = None) -> list[Claim]:
    """The claims of one source, in the order of the file."""
    file = chapters_folder(chapter, folder) / "paper" / "claims.toml"
    found = tomllib.loads(file.read_text(encoding="utf-8")).get(chapter, [])
    return [Claim(chapter, **each) for each in found]


def table(chapter: str, notebook: str = "", first: int | None = None) -> Prose:
    """The claims of one source, each with both answers and its evidence, as a Markdown table.

    `notebook` is the path of the chapter from the page that shows the table; "": it is that page.
    With `first` only as many claims; the first of a source is its main one.
    """
    rows = [
        [_quoted(each), *_answers(each), f"{each.sentence()} [→]({notebook}#{each.anchor})"]
        for each in claims(chapter)[:first]
    ]
    return _markdown(["claim", *ANSWERS, "what our rows say"], rows)


def answer(folder: str | Path) -> Prose:
    """The main claim of each source, with both answers: the front page's table."""
    rows = []
    for notebook in _sources(folder):
        title = re.search("^# (.+)", notebook.with_suffix(".md").read_text("utf-8"), re.M)
        head, link = claims(notebook.stem, folder)[0], f"../chapters/{notebook.name}"
        rows.append(
            [f"[{title[1] if title else notebook.stem}]({link})", _quoted(head), *_answers(head)]
        )
    return _markdown(["source", "its main claim", *ANSWERS], rows)


def _sources(folder: str | Path) -> list[Path]:
    text = Path(folder, "paper", "claims.toml").read_text(encoding="utf-8")
    return [Path(folder, f"{chapter}.ipynb") for chapter in tomllib.loads(text)]


def _quoted(each: Claim) -> str:
    return f"“{each.quote}” ({each.where})"


def _answers(each: Claim) -> list[str]:
    return [WORDS[each.answer(tests)] if tests else "–" for tests in (each.reproduced, each.holds)]


def _markdown(heads: list[str], rows: list[list[str]]) -> Prose:
    lines = [heads, ["---"] * len(heads), *rows]
    texts = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return Prose("\n".join(f"| {text} |" for text in texts))


def _row(chapter: str, place: str) -> Any:
    source, _, rest = place.rpartition(": ")
    parts = rest.split(" / ")
    key = [*parts, *["accuracy"] * (4 - len(parts))]
    if source != "paper":
        row = row_at(source or chapter, *key)
        without = math.isnan(row.ci_low)  # what has no interval is taken as it is
        return row.where(~row.index.isin(["ci_low", "ci_high"]), row.value) if without else row
    frame = printed(chapter)
    found = frame[(frame[KEY] == key).all(axis=1)]
    if len(found) != 1:
        raise ValueError(f"{chapter} prints {len(found)} rows at {place!r}, expected one")
    row = SimpleNamespace(**found.iloc[0].to_dict())
    row.ci_low = row.ci_high = row.value
    return row


def _decided(yes: bool, no: bool) -> bool | None:
    return True if yes else False if no else None


class Number(str):
    """A row's value as a sentence says it, and what stands behind it."""

    n: str
    seeds: str

    def __new__(cls, row: Any, place: str) -> "Number":
        if place.startswith("paper: "):
            return super().__new__(cls, row.printed + "%" * (row.metric == "accuracy"))
        share = row.metric in ("accuracy", "share")
        said = super().__new__(cls, f"{row.value:.1f}%" if share else f"{row.value:.3g}")
        said.n, said.seeds = f"{int(row.n):,}", _seeds(row)
        return said


def _seeds(*rows: Any) -> str:
    """The seeds that all rows have, and those that some have."""
    each = [{*str(row.seed).split()} for row in rows]
    of_some = sorted(set.union(*each))
    of_all = sorted(set.intersection(*each)) or of_some
    text = f"seed{'s' * (len(of_all) > 1)} {', '.join(of_all)}"
    rest = [seed for seed in of_some if seed not in of_all]
    return f"{text}, of some also {', '.join(rest)}" if rest else text
