"""The assignments: nothing of a solution reaches a student, and marks are what they should be.

Marks are given by a runner of the same cells, and by nbgrader and otter themselves where they are
installed (an environment of their own does: PYTHONPATH=. python -m pytest tests/test_course.py).
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbformat import NotebookNode

from book import course
from defenses import effort, results
from defenses.results import record
from tests.measurements import row

ROOT = Path(__file__).resolve().parent.parent
ATTACKS, COMPACT, JACOBIAN, BREAK = NAMES = course.names()
SECONDS = 30  # nbgrader's own limit for a cell

every_assignment = pytest.mark.parametrize("name", NAMES)

# Answers that look right: by assignment, what is answered so, and the tests that must fail for it.
ALWAYS_TRUE = "def {}(attack):\n    return True"
PROMISES = {"stays-inside": "stays_inside", "each-its-own": "each_its_own"}
UNBOUNDED_FGSM = """
def fgsm(model, x, y, eps):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return (x + eps * g.sign()).detach()
"""
ONE_GRADIENT = """
def pgd(model, x, y, *, eps, step_size, steps, generator=None):
    x_t = x.detach().clone()
    if generator is not None:
        x_t = project(x + eps * (2 * torch.rand(x.shape, generator=generator) - 1), x, eps)
    x_t.requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x_t), y), x_t)
    for _ in range(steps):
        x_t = project(x_t.detach() + step_size * g.sign(), x, eps)
    return x_t.detach()
"""
BARE_ROOT = """
def patch_norms(x, k, padding=0):
    ones = torch.ones(1, x.shape[1], k, k, dtype=x.dtype)
    return F.conv2d(x.square(), ones, padding=padding).sqrt()
"""
IMAGE_NORM = """
def compact_conv2d(x, weight, bias, *, alpha, delta, padding=0):
    norm = x.flatten(1).norm(dim=1)[:, None, None, None]
    return F.conv2d(alpha * x / (norm + delta), weight, bias, padding=padding)
"""
ROUNDED_ODDS = """
def log_odds(logits, y):
    return F.cross_entropy(logits, y, reduction="none").expm1().log()
"""
SPECTRAL = """
def bound(z, J, y):
    gaps = (z - z.gather(1, y[:, None])).abs().scatter(1, y[:, None], torch.inf)
    return gaps.amin(dim=1) / (2**0.5 * torch.linalg.matrix_norm(J, 2))
"""
LEAST_GAP = """
def distance(z, J, y):
    i = torch.arange(len(z))
    gaps = (z - z[i, y, None]).abs().scatter(1, y[:, None], torch.inf)
    k = gaps.argmin(dim=1)
    return gaps[i, k] / (J[i, k] - J[i, y]).norm(dim=1)
"""
ORTHONORMAL = """
def tight():
    return torch.eye(4).double()[:3] + 0.01, torch.tensor([0.0, 0.0, -100.0]).double()
"""
STRAIGHT = """
def attack_{}(model, x, y):
    def climb(x, y, eps):
        return attacks.pgd(model, x, y, eps=eps, step_size=eps / 6, steps=24, seed=0)

    return least(climb, model, x, y, RADII)
"""
KINDS = ("smoothed", "detached", "rounded", "masked", "scattered")
WRONG: dict[tuple[str, str], tuple[dict[str, str], set[str]]] = {
    (ATTACKS, "a step out of the range, tests that say yes"): (
        {"fgsm": UNBOUNDED_FGSM} | {k: ALWAYS_TRUE.format(v) for k, v in PROMISES.items()},
        {"fgsm-step", "promise-1", "promise-2"},
    ),
    (ATTACKS, "one gradient for the whole way"): (
        {"pgd": ONE_GRADIENT},
        {"pgd-asks-again", "promise-3"},
    ),
    (COMPACT, "a root of zero"): ({"patch-norms": BARE_ROOT}, {"norms-blank"}),
    (COMPACT, "the norm of the image, and odds that round"): (
        {"compact-conv": IMAGE_NORM, "log-odds": ROUNDED_ODDS},
        {"conv-equation", "log-odds"},
    ),
    (JACOBIAN, "the spectral norm"): ({"bound": SPECTRAL}, {"bound-value"}),
    (JACOBIAN, "the class of the least gap, and orthonormal rows"): (
        {"distance": LEAST_GAP, "tight": ORTHONORMAL},
        {"distance-plane", "tight"},
    ),
    (BREAK, "PGD for all"): (
        {kind: STRAIGHT.format(kind) for kind in KINDS},
        {f"{k}-{what}" for k in KINDS[1:] for what in ("accuracy", "distance", "passes")},
    ),
}


@cache
def read(name: str) -> NotebookNode:
    return course.read(name)


def withheld() -> dict[str, str]:
    """The answers that the pages withhold, by the label of the exercise."""
    form = r"^### .+ · (ex-\S+)\n((?s:.)+?)(?=^##|\Z)"
    return dict(re.findall(form, course.ANSWERS.read_text(encoding="utf-8"), re.M))


def points(name: str) -> dict[str, float]:
    tests = [cell.metadata for cell in read(name).cells if "test" in cell.metadata]
    return {test["test"]: test["points"] for test in tests}


def answered(name: str, answers: dict[str, str]) -> NotebookNode:
    """What a student hands in who answers so, and everything else like the solution."""
    notebook = course.for_student(read(name))
    for cell, solved in zip(notebook.cells, read(name).cells, strict=True):
        if "answer" in cell.metadata:
            cell.source = answers.get(cell.metadata.answer, solved.source)
    return notebook


def marks(name: str, submission: NotebookNode) -> tuple[dict[str, float], float]:
    """The points of each test, given as graders do, and the seconds of the slowest cell.

    What is locked is the instructor's, hidden tests included; only answers are the student's.
    """
    given: dict[str, Any] = {"__name__": "__main__"}
    earned, slowest = {}, 0.0
    for cell, handed_in in zip(read(name).cells, submission.cells, strict=True):
        if cell.cell_type != "code":
            continue
        source = handed_in.source if "answer" in cell.metadata else cell.source
        passed, start = True, time.process_time()
        try:
            exec(compile(source, name, "exec"), given)
        except Exception:
            passed = False
        slowest = max(slowest, time.process_time() - start)
        if "test" in cell.metadata:
            earned[cell.metadata.test] = cell.metadata.points * passed
    return earned, slowest


def lost(earned: dict[str, float]) -> set[str]:
    return {test for test, value in earned.items() if not value}


@pytest.fixture(autouse=True)
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    with torch.random.fork_rng():
        yield


# What students get.


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("course") / "course"
    course.write(target)
    return target


def regions(source: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it stands inside a solution or a hidden test."""
    inside = False
    for line in source.splitlines():
        inside |= any(begin in line for begin, _ in (course.SOLUTION, course.HIDDEN))
        yield line.strip(), inside
        inside &= not any(end in line for _, end in (course.SOLUTION, course.HIDDEN))


def secrets(name: str) -> set[str]:
    """The lines of solutions and hidden tests that are nowhere in what is given."""
    lines = [pair for cell in read(name).cells for pair in regions(cell.source)]
    opened = [line for line, inside in lines if not inside]
    return {line for line, inside in lines if inside and not any(line in o for o in opened)}


def texts(value: Any) -> Iterator[str]:
    """Every string in a notebook, wherever it stands."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (*texts(key), *texts(item))
    elif isinstance(value, list):
        yield "".join(text for text in value if isinstance(text, str))
        for item in value:
            yield from texts(item)


def leaks(name: str, files: list[Path]) -> set[str]:
    shown = [text for file in files for text in texts(json.loads(file.read_text()))]
    lines = {line.strip() for text in shown for line in text.splitlines()}
    long = {secret for secret in secrets(name) if len(secret) > 20}
    return (secrets(name) & lines) | {s for s in long if any(s in text for text in shown)}


def for_students(written: Path, name: str) -> list[Path]:
    """All files that a student may get."""
    folders = (written / "nbgrader" / "release" / name, written / "otter" / name)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if "instructor" not in file.parts]


@every_assignment
def test_nothing_of_a_solution_reaches_a_student(written: Path, name: str) -> None:
    assert len(secrets(name)) > 20
    files = for_students(written, name)
    assert [file.name for file in files] == 2 * [f"{name}.ipynb"]
    assert leaks(name, files) == set()
    for file in files:
        assert not re.search("SOLUTION|HIDDEN", file.read_text())


@every_assignment
def test_a_leak_would_be_seen(written: Path, name: str) -> None:
    file = written / "otter" / name / "instructor" / f"{name}.ipynb"
    assert leaks(name, [file]) == secrets(name)


@every_assignment
def test_students_get_all_that_is_given(written: Path, name: str) -> None:
    answers = [cell for cell in read(name).cells if "answer" in cell.metadata]
    for file in for_students(written, name):
        cells = nbformat.read(file, as_version=4).cells
        stubs = [c for c in cells if "raise NotImplementedError()" in c.source]
        prose = [c for c in cells if c.source.strip() == "YOUR ANSWER HERE"]
        assert len(stubs) + len(prose) == len(answers) > 1
        assert {c.cell_type for c in prose} == {"markdown"}
        for cell, source in zip(cells, read(name).cells, strict=True):
            opened = [line for line, inside in regions(source.source) if not inside]
            kept = [line.strip() for line in cell.source.splitlines()]
            assert [line for line in opened if line not in kept] == []


def test_what_a_course_has_gathered_stays(tmp_path: Path) -> None:
    course.write(tmp_path)
    gathered = [
        tmp_path / "nbgrader" / "submitted" / "ada" / ATTACKS / f"{ATTACKS}.ipynb",
        tmp_path / "nbgrader" / "gradebook.db",
        tmp_path / "nbgrader" / "nbgrader_config.py",
        tmp_path / "otter" / ATTACKS / "instructor" / "results.json",
    ]
    for file in gathered:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("theirs")
    stale = tmp_path / "otter" / ATTACKS / "instructor" / "tests" / "01-old.py"
    stale.write_text("a test of an older version")
    course.write(tmp_path)
    assert {file.read_text() for file in gathered} == {"theirs"}
    assert not stale.exists()


@pytest.mark.parametrize("broken", ["twice", "open", "unsolved", "worthless"])
def test_a_broken_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    solution, points = f"{course.SOLUTION[0]}\n1\n{course.SOLUTION[1]}\n", ":points: 1\n"
    answer = f"```{{code-cell}} ipython3\n:answer: a\n{solution}```\n"
    test = f"```{{code-cell}} ipython3\n:test: t\n{points}assert 1\n```\n"
    monkeypatch.setattr(course, "SOURCES", tmp_path)

    def written(text: str) -> None:
        head = "---\nkernelspec:\n  name: python3\n  display_name: Python 3\n---\n\n"
        (tmp_path / "a.md").write_text(head + text)

    written(answer + test)
    course.read("a")
    written(
        {
            "twice": answer + test + test,
            "open": answer.replace(course.SOLUTION[1], "") + test,
            "unsolved": answer.replace(solution, "1\n") + test,
            "worthless": answer + test.replace(points, ""),
        }[broken]
    )
    said = {"twice": "twice", "open": "without", "unsolved": "a solution", "worthless": "points"}
    with pytest.raises(ValueError, match=said[broken]):
        course.read("a")


@every_assignment
def test_the_first_screen_tells_what_it_takes(name: str) -> None:
    screen = read(name).cells[0].source
    for word in ("**You will**", "**You need**", "**Time**", "**Points**"):
        assert word in screen
    prose = [
        c.metadata.points for c in read(name).cells if c.cell_type == "markdown" and c.metadata
    ]
    (said,) = re.findall(r"\*\*Points\*\* (\d+): (\d+) by tests, (\d+) for prose", screen)
    total, by_tests, for_prose = map(int, said)
    assert (by_tests, for_prose) == (sum(points(name).values()), sum(prose))
    assert total == by_tests + for_prose
    rubrics = [c.source for c in read(name).cells if "**Rubric.**" in c.source]
    assert len(rubrics) == len(prose) >= 1


# The page for teachers.


def test_every_exercise_is_listed() -> None:
    page = (ROOT / "book" / "teaching.md").read_text()
    assert page == course.listed(page), "the exercises have changed: run `make course`"
    chapters = [path.read_text() for path in (ROOT / "chapters").glob("*.md")]
    labels = {label for text in chapters for label in re.findall(r"^:label: (ex-\S+)", text, re.M)}
    assert set(re.findall(r"\]\(#(ex-\S+)\)", page)) == labels


CHAPTERS = sorted((ROOT / "chapters").glob("*.md"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_exercise_says_what_it_takes_and_every_chapter_what_it_gives(path: Path) -> None:
    text = path.read_text()
    found = effort.exercises(text)
    assert len(found) == text.count(":::{exercise}") == len(effort.EXERCISE.findall(text)) > 0
    assert text.count(":::{solution-start}") == sum(not exercise.withheld for exercise in found)
    assert any(exercise.importance == "essential" for exercise in found)
    top = text[: text.index("run = Run(")]
    for said in ("**You will learn** ", "**You need** ", "effort.of(CHAPTER)"):
        assert said in top


HEADED = """## Steps

:::{{exercise}} One
:label: ex-a
{header}

Show it.
:::
{solution}"""
SOLVED = "\n:::{solution-start} ex-a\n:class: dropdown\n:::\n\nSo.\n\n:::{solution-end}\n:::\n"
FULL = '*Difficulty 2 of 3 · 20 minutes · essential · belongs to "Steps"*'


@pytest.mark.parametrize(
    ("header", "solution", "wrong"),
    [
        (FULL, SOLVED, ""),
        (FULL.replace('"*', '" · answer withheld*'), "", ""),
        ("Show that.", SOLVED, "no header"),
        (FULL.replace("2 of", "4 of"), SOLVED, "no header"),
        (FULL.replace("essential", "nice"), SOLVED, "no header"),
        (FULL.replace("Steps", "Leaps"), SOLVED, "no section 'Leaps'"),
        (FULL, "", "withheld and shown, or neither"),
        (FULL.replace('"*', '" · answer withheld*'), SOLVED, "withheld and shown, or neither"),
    ],
)
def test_a_header_says_what_it_should(header: str, solution: str, wrong: str) -> None:
    text = HEADED.format(header=header, solution=solution)
    if wrong:
        with pytest.raises(ValueError, match=wrong):
            effort.exercises(text)
        return
    (found,) = effort.exercises(text)
    assert (found.title, found.difficulty, found.minutes) == ("One", 2, 20)
    assert (found.importance, found.section, bool(found.solution)) == (
        "essential",
        "Steps",
        bool(solution),
    )


def test_reading_time_is_that_of_the_prose() -> None:
    prose = "word " * 220 * 30
    exercise = HEADED.format(header=FULL, solution=SOLVED)
    aside = "```{code-cell}\nx = 1\n```\n$$\nx y z\n$$\n" + exercise
    assert effort.reading(prose) == 30 and effort.reading(500 * aside) <= 5
    minutes = effort.minutes(f"{prose}\n\n{exercise}")
    assert minutes == {"reading": 30, "essential": 20, "worth doing": 0, "extra": 0, "project": 0}


def test_what_a_run_takes_comes_from_stored_rows_and_what_was_not_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "chapters_folder", lambda *_: tmp_path)
    (tmp_path / "paper").mkdir()
    short: dict[str, Any] = {"protocol": "short", "dataset": "mnist"}
    record("toy", [row(seed=seed, seconds=20 * seed, **short) for seed in (1, 2)], tmp_path)
    older = row("LS", **short) | {"seed": "0 1 2", "seconds": 90}
    record("toy", [older], tmp_path)
    chapter: dict[str, Any] = {"table": "chapter cpu", "n": 1}
    quick = [
        row("toy", "quick", v, metric=m, **chapter) for m, v in {"seconds": 42, "GiB": 1.5}.items()
    ]
    counts = [
        row("toy", "count", v, metric="TFLOP", protocol=p, dataset="mnist", **chapter)
        for p, v in {"short": 10, "paper": 470}.items()
    ]
    record("performance", quick, tmp_path)
    rows = [
        ("quick", "digits", "42 s of processor time", "1.5 GiB", "a toy"),
        ("short", "MNIST", "60 s", "–", "a toy"),  # 30 for each of two cells
    ]
    assert [*effort.runs("toy")] == [*rows, ("paper", "–", "not run", "–", "–")]
    record("performance", counts, tmp_path)
    said = "not run; by its operations, 47 times the training of short"
    assert [*effort.runs("toy")] == [*rows, ("paper", "MNIST", said, "–", "–")]


# Answers that the pages withhold.


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 20}


def test_an_answer_is_withheld_where_the_exercise_says_so() -> None:
    labels = [
        e.label for path in CHAPTERS for e in effort.exercises(path.read_text()) if e.withheld
    ]
    assert withheld().keys() == set(labels) and len(labels) >= 9
    assert all(len(long_lines(answer)) >= 3 for answer in withheld().values())


def test_no_line_of_a_withheld_answer_reaches_a_page_or_a_student(written: Path) -> None:
    secret = set().union(*map(long_lines, withheld().values()))
    pages = [*(ROOT / "chapters").glob("*.*"), *(ROOT / "book").glob("*.*")]
    students = [file for name in NAMES for file in for_students(written, name)]
    for file in (*(page for page in pages if page.suffix in (".md", ".ipynb")), *students):
        shown = file.read_text()
        if file.suffix == ".ipynb":
            shown = "\n".join(texts(json.loads(shown)))
        assert {line for line in secret if line in shown} == set(), file.name


def test_instructors_get_every_withheld_answer(written: Path) -> None:
    cells = nbformat.read(written / "instructors" / "answers.ipynb", as_version=4).cells
    shown = "\n".join(cell.source for cell in cells)
    for label, answer in withheld().items():
        assert label in shown and long_lines(answer) <= long_lines(shown)


def test_the_page_says_what_the_assignments_say() -> None:
    page = (ROOT / "book" / "teaching.md").read_text()
    for number, name in enumerate(NAMES, 1):
        screen = read(name).cells[0].source
        (minutes,) = re.findall(r"about (\d+) minutes", screen)
        (total,) = re.findall(r"\*\*Points\*\* (\d+)", screen)
        (row,) = re.findall(rf"^\| {number}\. .+$", page, re.M)
        assert f"| {minutes} | {total} |" in row


# Marks.


@every_assignment
def test_an_empty_submission_gets_nothing(name: str) -> None:
    earned, _ = marks(name, course.for_student(read(name)))
    assert earned == dict.fromkeys(points(name), 0)


@pytest.mark.slow
@every_assignment
def test_the_solution_gets_full_marks_in_time(name: str) -> None:
    earned, slowest = marks(name, answered(name, {}))
    assert earned == points(name)
    assert slowest < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_answer_loses_what_it_should(name: str, wrong: str) -> None:
    answers, fails = WRONG[name, wrong]
    earned, _ = marks(name, answered(name, answers))
    assert lost(earned) == fails


@pytest.mark.slow
def test_the_right_attack_at_one_size_loses_the_distance() -> None:
    """And what is not answered costs its own points only."""
    kinds = {cell.metadata.get("answer"): cell.source for cell in read(BREAK).cells}
    answers = {kind: kinds[kind].replace("RADII", "(EPS,)") for kind in KINDS}
    answers["smoothed"] = "raise NotImplementedError()"
    earned, _ = marks(BREAK, answered(BREAK, answers))
    missing = {test for test in points(BREAK) if test.startswith("smoothed")}
    assert lost(earned) == missing | {f"{kind}-distance" for kind in KINDS}


# The graders themselves, with their default limits.

GRADED = {"full": {}, "empty": None, "partial": WRONG[ATTACKS, "one gradient for the whole way"][0]}
needs = {
    tool: pytest.mark.skipif(not importlib.util.find_spec(tool), reason=f"{tool} is not installed")
    for tool in ("nbgrader", "otter")
}


def handed_in(name: str, kind: str) -> NotebookNode:
    answers = GRADED[kind]
    return course.for_student(read(name)) if answers is None else answered(name, answers)


def call(folder: Path, *command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs["nbgrader"]
@pytest.mark.slow
@every_assignment
def test_nbgrader_makes_the_same_release(tmp_path: Path, name: str) -> None:
    course.write(tmp_path / "course")
    folder = tmp_path / "course" / "nbgrader"
    release = folder / "release" / name / f"{name}.ipynb"
    ours = nbformat.read(release, as_version=4)
    call(folder, "nbgrader", "generate_assignment", name, "--force")
    theirs = nbformat.read(release, as_version=4)
    assert [cell.source for cell in ours.cells] == [cell.source for cell in theirs.cells]


@needs["nbgrader"]
@pytest.mark.slow
@every_assignment
def test_nbgrader_gives_the_marks(tmp_path: Path, name: str) -> None:
    from nbgrader.api import Gradebook

    course.write(tmp_path / "course")
    folder = tmp_path / "course" / "nbgrader"
    kinds = [kind for kind in GRADED if kind != "partial" or name == ATTACKS]
    call(folder, "nbgrader", "generate_assignment", name, "--force")
    for kind in kinds:
        file = folder / "submitted" / kind / name / f"{name}.ipynb"
        file.parent.mkdir(parents=True)
        nbformat.write(course.for_nbgrader(handed_in(name, kind)), file)
    call(folder, "nbgrader", "autograde", name)
    whole = sum(points(name).values())
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as book:
        scores = {kind: book.find_submission(name, kind).score for kind in kinds}
    assert scores == {k: {"full": whole, "empty": 0, "partial": whole - 5}[k] for k in kinds}


@needs["otter"]
@pytest.mark.slow
@every_assignment
def test_otter_gives_the_marks(tmp_path: Path, name: str) -> None:
    course.write(tmp_path / "course")
    folder = tmp_path / "course" / "otter" / name / "instructor"
    call(folder, "otter", "generate", "-t", "tests", "-o", "autograder.zip")
    scores = {}
    for kind in [kind for kind in GRADED if kind != "partial" or name == ATTACKS]:
        nbformat.write(course.for_otter(handed_in(name, kind)), folder / f"{kind}.ipynb")
        (folder / kind).mkdir()
        call(folder, "otter", "run", "-a", "autograder.zip", "-o", kind, f"{kind}.ipynb")
        tests = json.loads((folder / kind / "results.json").read_text())["tests"]
        scores[kind] = sum(test.get("score") or 0 for test in tests)
    whole = sum(points(name).values())
    assert scores == {k: {"full": whole, "empty": 0, "partial": whole - 5}[k] for k in scores}
