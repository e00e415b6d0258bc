"""What a chapter asks of a reader, in minutes, and of a machine, in time and memory."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from defenses import words
from defenses.results import KIND, PROTOCOLS, chapters_folder, rows_of
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
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    html = f'<div class="side-by-side"><p>{escape(reader)}</p><table class="table">'
    html += "<caption>What a run takes · one seed, all networks</caption><thead><tr>"
    html += f"{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    return Table(html, "\n".join([reader, *(" | ".join(row) for row in (head, *rows))]))


def runs(chapter: str) -> Iterator[tuple[str, ...]]:
    """What a run at each protocol takes: one seed, all networks; "–" is not measured."""
    numbers = {"value": float, "seconds": float}
    stored, costs = (rows_of(name).astype(numbers) for name in (chapter, "performance"))
    costs = costs[costs["table"].str.startswith("chapter ") & costs["row"].eq(chapter)]
    tflop = costs[costs["metric"] == "TFLOP"].set_index("protocol")["value"]
    for protocol in reversed(PROTOCOLS):
        found = []
        for dataset, rows in stored[stored["protocol"] == protocol].groupby("dataset"):
            seeds = rows["seed"].str.count(" ") + 1
            one = rows.assign(seconds=rows["seconds"] / seeds).groupby(KIND)["seconds"].mean().sum()
            found.append((dataset, duration(one), "–", "; ".join(dict.fromkeys(rows["device"]))))
        for _, rows in costs[costs["protocol"] == protocol].groupby("table"):
            once = rows.set_index("metric")
            if "seconds" in once.index:
                dataset, device = once.loc["seconds", ["dataset", "device"]]
                seconds, gib = (once.loc[name, "value"] for name in ("seconds", "GiB"))
                time = f"{duration(seconds)} of processor time"
                found.append((dataset, time, f"{gib:.1f} GiB", device))
        if not found and {"short", protocol} <= {*tflop.index}:
            times = tflop[protocol] / tflop["short"]
            said = f"{times:,.0f} times the" if times > 1.5 else "about the"
            said = f"not run; by its operations, {said} training of short"
            found.append(("mnist", said, "–", "–"))
        for dataset, *cells in found or [("–", "not run", "–", "–")]:
            yield protocol, words.DATA.get(dataset, dataset), *cells


def duration(seconds: float) -> str:
    """`50 s`, `5 min`, `1 h 20 min`: rounded to what it can be relied on."""
    if seconds < 95:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    hours, rest = divmod(5 * round(seconds / 300), 60)
    return f"{hours} h" + (f" {rest} min" if rest else "")
