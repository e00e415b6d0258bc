"""What a chapter asks of a reader, in minutes, and of a machine, in time and memory."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import pandas as pd

from defenses import words
from defenses.results import KIND, PROTOCOLS, chapters_folder
from defenses.tables import Table

WORDS_A_MINUTE = 220
IMPORTANCE = ("essential", "worth doing", "extra", "project")
HEADER = re.compile(
    rf"\*Difficulty ([123]) of 3 · (\d+) minutes · ({'|'.join(IMPORTANCE)}) · "
    r'belongs to "(.+)"( · answer withheld)?\*'
)
EXERCISE = re.compile(r"^:::\{exercise\} (.+)\n:label: (\S+)\n(.+)\n((?s:.)+?)^:::$", re.M)
SOLUTION = r"^:::\{{solution-start\}} {}\n(?s:.)+?^:::\{{solution-end\}}\n:::$"


@dataclass(frozen=True)
class Exercise:
    """An exercise of a chapter: what its header says, and its solution, "" where there is none."""

    title: str
    label: str
    difficulty: int
    minutes: int
    importance: str
    section: str
    withheld: bool
    solution: str


def exercises(text: str) -> list[Exercise]:
    """The exercises in a chapter's text.

    Raises
    ------
    ValueError
        A header is missing or says something else than `HEADER`; it names no section of the
        chapter; or an answer that is withheld is there, or one that is not is missing.
    """
    sections, found = {*re.findall(r"^##+ (.+)$", text, re.M)}, []
    for title, label, header, _ in EXERCISE.findall(text):
        if not (said := HEADER.fullmatch(header)):
            raise ValueError(f"{label}: {header!r} is no header; expected {HEADER.pattern}")
        if said[4] not in sections:
            raise ValueError(f"{label}: the chapter has no section {said[4]!r}")
        solution = re.search(SOLUTION.format(re.escape(label)), text, re.M)
        if bool(solution) == bool(said[5]):
            raise ValueError(f"{label}: its answer is withheld and shown, or neither")
        how = int(said[1]), int(said[2]), said[3], said[4], bool(said[5])
        found.append(Exercise(title, label, *how, solution[0] if solution else ""))
    return found


def reading(text: str) -> int:
    """Minutes for a chapter's prose, to the next five: without code, formulas and exercises."""
    for left_out in (
        r"\A---\n(?s:.)+?\n---\n",
        r"^```(?s:.)+?\n```$",
        SOLUTION.format(r"\S+"),
        EXERCISE.pattern,
        r"\$\$(?s:.)+?\$\$|\$.+?\$|\]\(.+?\)|^:.*$|\{[\w:]+\}`.*?`",
    ):
        text = re.sub(left_out, " ", text, flags=re.M)
    return 5 * round(len(re.findall(r"[A-Za-z][\w'’-]*", text)) / WORDS_A_MINUTE / 5)


def minutes(text: str) -> dict[str, int]:
    """Minutes by kind: reading, and the exercises of each importance."""
    kinds = {kind: 0 for kind in IMPORTANCE}
    for exercise in exercises(text):
        kinds[exercise.importance] += exercise.minutes
    return {"reading": reading(text)} | kinds


def of(chapter: str) -> Table:
    """What `chapter` takes to read, to work through, and to run, as far as it is stored."""
    folder = chapters_folder(chapter)
    kinds = minutes((folder / f"{chapter}.md").read_text(encoding="utf-8"))
    reader = f"Reading {duration(60 * kinds['reading'])}; exercises "
    reader += f"{duration(60 * kinds['essential'])} for the essential ones, "
    work = kinds["essential"] + kinds["worth doing"] + kinds["extra"]
    reader += f"{duration(60 * work)} for all but projects."
    rows = [*runs(chapter)]
    head = ("protocol", "data", "time", "memory", "measured on")
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    html = f'<div class="side-by-side"><p>{escape(reader)}</p><table class="table"><thead><tr>'
    html += f"{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    return Table(html, "\n".join([reader, *(" | ".join(row) for row in (head, *rows))]))


def runs(chapter: str) -> Iterator[tuple[str, ...]]:
    """What a run at each protocol takes: one seed, all networks; "–" is not measured."""
    folder = chapters_folder(chapter) / "results"
    read = {"dtype": {"seed": str}, "keep_default_na": False, "na_values": {"seconds": [""]}}
    stored = pd.read_csv(folder / f"{chapter}.csv", **read)
    costs = pd.read_csv(folder / "performance.csv", **read)
    costs = costs[costs["table"].eq("chapter") & costs["row"].eq(chapter)].set_index("metric")
    for protocol in reversed(PROTOCOLS):
        once = costs[costs["column"].str.startswith(protocol)]
        rows = stored[stored["protocol"] == protocol]
        for dataset, group in rows.groupby("dataset"):
            seeds = group["seed"].str.count(" ") + 1
            one = group.assign(seconds=group["seconds"] / seeds).groupby(KIND)["seconds"].mean()
            device = "; ".join(dict.fromkeys(group["device"]))
            yield protocol, words.DATA.get(dataset, dataset), duration(one.sum()), "–", device
        if "seconds" in once.index:
            row = once.loc["seconds"]
            memory = f"{once.loc['MiB', 'value'] / 1024:.1f} GiB" if "MiB" in once.index else "–"
            yield protocol, row["dataset"], duration(row["value"]), memory, row["device"]
        elif rows.empty and "TFLOP" in once.index:
            row = once.loc["TFLOP"]
            data = words.DATA.get(row["dataset"], row["dataset"])
            said = f"not run; its training counts {row['value']:,.0f} TFLOP"
            yield protocol, data, said, "–", "–"
        elif rows.empty:
            yield protocol, "–", "not run", "–", "–"


def duration(seconds: float) -> str:
    """`50 s`, `5 min`, `1 h 20 min`: rounded to what it can be relied on."""
    if seconds < 95:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    hours, rest = divmod(5 * round(seconds / 300), 60)
    return f"{hours} h" + (f" {rest} min" if rest else "")
