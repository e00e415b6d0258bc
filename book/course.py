"""Write the assignments for two graders: what `make course` does.

One source an assignment, `book/assignments/NAME.md`. A cell with ``answer: ID`` is the student's
to fill in; what stands between the marks of a solution is taken out. A cell with ``test: ID`` gives
its ``points``; what stands between the marks of hidden tests is for the grader alone. An answer in
prose has points of its own and is read by a person. All other code is given, and locked.

    _build/course/nbgrader/source/NAME/    the instructor's notebook
                           release/NAME/   the student's, as `nbgrader generate_assignment` makes it
    _build/course/otter/NAME/              the student's, one file, for Colab
                        NAME/instructor/   the solution, and what `otter generate` takes
                  instructors/             the answers to exercises that the pages withhold
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from book import address
from book.build import ROOT, notebooks
from defenses import effort

SOURCES = ROOT / "book" / "assignments"
ANSWERS = SOURCES / "instructors" / "answers.md"  # those that the pages withhold
SOLUTION = ("### BEGIN SOLUTION", "### END SOLUTION")
HIDDEN = ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
# nbgrader's own words for what is missing.
CODE_STUB, TEXT_STUB = ("# YOUR CODE HERE", "raise NotImplementedError()"), ("YOUR ANSWER HERE",)

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
NBGRADER_CONFIG = """c = get_config()
c.CourseDirectory.course_id = "does-it-hold"
"""
# PyTorch's own index has builds without CUDA, which a grading machine has no use for.
REQUIREMENTS = """--extra-index-url https://download.pytorch.org/whl/cpu
defenses @ git+https://github.com/{slug}
"""
OTTER_TEST = """from otter.test_files import test_case

OK_FORMAT = False
name = {name!r}

PUBLIC = "\\n".join([
{public}
])
WHOLE = "\\n".join([
{whole}
])


@test_case(points=0, hidden=False)
def public(env):
    exec(PUBLIC, env)


@test_case(points={points!r}, hidden=True)
def whole(env):
    exec(WHOLE, env)
"""


def names() -> list[str]:
    """The assignments, in the order of the book."""
    return [path.stem for path in sorted(SOURCES.glob("*.md"))]


def read(name: str) -> NotebookNode:
    """The assignment `name` with its solutions and hidden tests, and the book's set-up cell first.

    Raises
    ------
    ValueError
        Where an id is taken twice, a test is worth nothing, an answer has no solution, or a mark
        has no partner.
    """
    notebook = jupytext.read(SOURCES / f"{name}.md")
    ids = [id_ for cell in notebook.cells if (id_ := _id(cell))]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name}: an id is taken twice among {ids}")
    for cell in notebook.cells:
        where = f"{name}, {_id(cell) or repr(cell.source[:40])}"
        for begin, end in (SOLUTION, HIDDEN):
            if cell.source.count(begin) != cell.source.count(end):
                raise ValueError(f"{where}: {begin!r} without {end!r}, or the other way round")
        if "answer" in cell.metadata and SOLUTION[0] not in cell.source:
            raise ValueError(f"{where}: an answer needs a solution")
        if "test" in cell.metadata and not cell.metadata.get("points", 0) > 0:
            raise ValueError(f"{where}: a test needs points")
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first, _setup())
    return notebook


def for_student(notebook: NotebookNode) -> NotebookNode:
    """A copy without solutions and hidden tests."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        stub = CODE_STUB if cell.cell_type == "code" else TEXT_STUB
        cell.source = _without(_without(cell.source, SOLUTION, stub), HIDDEN, ())
    return notebook


def for_nbgrader(notebook: NotebookNode) -> NotebookNode:
    """A copy with nbgrader's metadata (schema 3) in place of ours."""
    notebook = _clean(notebook)
    for i, cell in enumerate(notebook.cells):
        ours = cell.metadata
        graded = "points" in ours
        role = {
            "grade": graded,
            "solution": "answer" in ours,
            "locked": "answer" not in ours,
            "grade_id": _id(cell) or f"given-{i}",
            "schema_version": 3,
            "task": False,
        }
        if graded:
            role["points"] = ours.points
        prose = cell.cell_type == "markdown" and not graded
        cell.metadata = NotebookNode({} if prose else {"nbgrader": role})
    return notebook


def for_otter(notebook: NotebookNode) -> NotebookNode:
    """A copy without metadata: otter's tests stand in files of their own."""
    notebook = _clean(notebook)
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
    return notebook


def otter_tests(notebook: NotebookNode) -> dict[str, str]:
    """otter's test files (exception-based format), by name.

    As in nbgrader, the points are for a cell's visible and hidden tests together; the visible ones
    stand there once more, worth nothing, for Gradescope to show. The files are numbered
    because otter runs them by name, and a test may use what an earlier one defines.
    """
    files: dict[str, str] = {}
    for cell in notebook.cells:
        if "test" in cell.metadata:
            name = f"{len(files) + 1:02}-{cell.metadata.test}"
            public, whole = (
                "\n".join(f"    {line!r}," for line in source.splitlines())
                for source in (_without(cell.source, HIDDEN, ()), cell.source)
            )
            points = cell.metadata.points
            text = OTTER_TEST.format(name=name, public=public, whole=whole, points=points)
            files[f"{name}.py"] = text
    return files


def write(target: Path) -> None:
    """Write every assignment for both graders into the folder `target`.

    What else lies there stays: submissions, marks, a configuration of one's own.
    """
    (target / "nbgrader").mkdir(parents=True, exist_ok=True)
    config = target / "nbgrader" / "nbgrader_config.py"
    if not config.exists():
        config.write_text(NBGRADER_CONFIG)
    for name in names():
        notebook, file = read(name), f"{name}.ipynb"
        student, otter = for_student(notebook), target / "otter" / name
        instructor = otter / "instructor"
        for path, content in (
            (target / "nbgrader" / "source" / name / file, for_nbgrader(notebook)),
            (target / "nbgrader" / "release" / name / file, for_nbgrader(student)),
            (otter / file, for_otter(student)),
            (instructor / file, for_otter(notebook)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(content, path)
        shutil.rmtree(instructor / "tests", ignore_errors=True)
        (instructor / "tests").mkdir()
        for test, code in otter_tests(notebook).items():
            (instructor / "tests" / test).write_text(code, encoding="utf-8")
        requirements = REQUIREMENTS.format(slug=address.slug(ROOT))
        (instructor / "requirements.txt").write_text(requirements)
        (instructor / "otter_config.json").write_text(json.dumps({"lang": "python"}))
    (target / "instructors").mkdir(exist_ok=True)
    answers = target / "instructors" / "answers.ipynb"
    nbformat.write(_clean(jupytext.read(ANSWERS)), answers)


def exercises() -> str:
    """Tables in MyST: the minutes of all chapters, and of each its exercises with their headers."""
    times = [_row("chapter", "reading", "essential", "worth doing", "extra", "without projects")]
    tables, total = list[str](), dict.fromkeys(("reading", *effort.IMPORTANCE), 0)
    for path in notebooks(ROOT):
        text = (ROOT / path).with_suffix(".md").read_text(encoding="utf-8")
        if not (found := effort.exercises(text)):
            continue
        chapter, minutes = re.findall(r"^# (.+)", text, re.M)[0], effort.minutes(text)
        times.append(_times(chapter, minutes))
        total = {kind: total[kind] + minutes[kind] for kind in total}
        rows = [_row(chapter, "belongs to", "difficulty", "minutes", "do it", "answer")]
        for e in found:
            how = "with code" if "{code-cell}" in e.solution else "on paper"
            how = "withheld" if e.withheld else how
            exercise = f"[{e.title}](#{e.label})"
            rows.append(_row(exercise, e.section, e.difficulty, e.minutes, e.importance, how))
        tables.append(_table(rows))
    return "\n\n".join([_table([*times, _times("all", total)]), *tables])


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(rows: list[str]) -> str:
    return "\n".join([rows[0], "|---" * (rows[0].count("|") - 1) + "|", *rows[1:]])


def _times(chapter: str, minutes: Mapping[str, int]) -> str:
    shown = [minutes[kind] for kind in ("reading", "essential", "worth doing", "extra")]
    return _row(chapter, *shown, sum(shown))


def listed(page: str) -> str:
    """The text of the page `book/teaching.md` with the exercises as they are now."""
    begin, end = "<!-- exercises: written by `make course` -->", "<!-- end of exercises -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{exercises()}\n\n{end}{rest.split(end)[1]}"


def _id(cell: NotebookNode) -> str:
    """What nbgrader knows a cell by, "" where it is neither an answer nor a test."""
    kinds = [kind for kind in ("answer", "test") if kind in cell.metadata]
    return "-".join([*kinds, *(cell.metadata[kind] for kind in kinds)])


def _setup() -> NotebookNode:
    """The cell by which every chapter finds or fetches the book."""
    chapter = jupytext.read(ROOT / "chapters" / "attacks.md")
    cell = next(cell for cell in chapter.cells if "setup" in cell.metadata.get("tags", []))
    return nbformat.v4.new_code_cell(cell.source)


def _clean(notebook: NotebookNode) -> NotebookNode:
    """A copy with a kernel and, like the book's notebooks, with ids that do not change."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def _without(source: str, marks: tuple[str, str], stub: tuple[str, ...]) -> str:
    """`source` with `stub` in place of what stands between the marks."""
    lines, inside = [], False
    for line in source.splitlines():
        if marks[0] in line:
            inside = True
            margin = line[: len(line) - len(line.lstrip())]
            lines += [margin + text for text in stub]
        if not inside:
            lines.append(line)
        inside = inside and marks[1] not in line
    return "\n".join(lines)


def main() -> None:
    target = ROOT / "_build" / "course"
    write(target)
    page = ROOT / "book" / "teaching.md"
    page.write_text(listed(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{', '.join(names())}: for students and instructors in {target}")


if __name__ == "__main__":
    main()
