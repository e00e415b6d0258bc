"""The committed notebooks are what they claim to be: executed, paired, repeatable, readable.

Each rule is a function that raises an AssertionError; each is applied to the real notebooks, and
to a broken copy that it has to catch.
"""

import ast
import os
import re
import shutil
import statistics
import subprocess
import symtable
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest
from jupytext.compare import NotebookDifference, compare_notebooks
from nbformat import NotebookNode

from book import address, build, execute
from tests import budget

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
NOTEBOOKS = CHAPTERS + sorted((ROOT / "book").glob("*.ipynb"))
QUICKEST = "batchout"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def spelled_out(text: str) -> list[str]:
    """Every owner/repository that `text` spells out."""
    return [match["slug"] for match in address.SPELLED_OUT.finditer(text)]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode, tag: str | None = None) -> list[NotebookNode]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", [])]


def code_lines(notebook: NotebookNode) -> list[str]:
    return [line for cell in code_cells(notebook) for line in cell.source.splitlines()]


# The rules.


def is_executed(notebook: NotebookNode) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), (
        f"executed as {counts}, not top to bottom in one go: run `make execute`"
    )


def holds_results_only(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        mimes = {mime for output in cell.outputs for mime in output.get("data", {})}
        assert not kinds & {"error", "stderr"}, f"stores {kinds}: run `make execute`\n{cell.source}"
        assert not any("widget" in mime for mime in mimes), f"stores a widget:\n{cell.source}"


def is_paired(path: Path) -> None:
    text = path.with_suffix(".md")
    assert text.exists(), f"{path.name} has no {text.name}: run `make sync`"
    try:
        compare_notebooks(jupytext.read(text), jupytext.read(path), "md:myst")
    except NotebookDifference as difference:
        raise AssertionError(
            f"{path.name} and {text.name} differ: `make sync`\n{difference}"
        ) from None


def is_plain_python(notebook: NotebookNode) -> None:
    magics = [line for line in code_lines(notebook) if re.match(r"\s*[%!]", line)]
    assert not magics, f"a plain script cannot run {magics}"
    script = jupytext.writes(notebook, fmt="py:percent")
    for source in (*(cell.source for cell in code_cells(notebook)), script):
        try:
            compile(source, "script", "exec")
        except SyntaxError as error:
            raise AssertionError(f"a plain script cannot run {error.text}: {error}") from None
    # Ruff takes `display` and `get_ipython` for known in a notebook, and for undefined in a script.
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--quiet"]
    command += ["--output-format=concise", "--select=F403,F405,F821", "-"]
    run = subprocess.run(command, input=script, capture_output=True, text=True)
    assert run.returncode == 0, f"a plain script cannot run:\n{run.stdout}{run.stderr}"


def has_short_cells(notebook: NotebookNode) -> None:
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    assert max(lengths) <= 30, f"a cell of {max(lengths)} lines; at most 30"
    assert statistics.median(lengths) <= 8, f"median {statistics.median(lengths)} lines; at most 8"


def has_more_prose_than_code(notebook: NotebookNode) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"\$\$.+?\$\$", " ", text, flags=re.DOTALL)
    text = re.sub(r"\$.+?\$|\]\(.+?\)|^:+.*$", " ", text, flags=re.MULTILINE)
    words = len(re.findall(r"[A-Za-z][\w'’-]*", text))
    own = [cell for cell in code_cells(notebook) if "setup" not in cell.metadata.get("tags", [])]
    lines = sum(bool(line.strip()) for cell in own for line in cell.source.splitlines())
    assert words >= 10 * lines, f"{words} words of prose for {lines} lines of code"


def has_one_meaning_a_name(notebook: NotebookNode) -> None:
    """What a sentence or a claim takes from far above was bound there once.

    A name that a later cell has bound again is another thing under the old name: a sentence with
    it is wrong without a word. Near its cell (four cells) a name may be used again.
    """
    bound: dict[str, list[int]] = {}
    for place, cell in enumerate(code_cells(notebook)):
        cell_names = names(cell.source)
        for name in sorted(cell_names.used - cell_names.bound):
            before = bound.get(name, []) if cell_names.used & {"Prose", "claim", "judge"} else []
            assert len(before) < 2 or place - before[-1] < 4, (
                f"code cell {place} speaks of {name!r}, which cells {before} bind: two meanings"
            )
        if "parameters" not in cell.metadata.get("tags", []):
            for name in cell_names.bound:
                bound.setdefault(name, []).append(place)


@dataclass
class Names:
    """The global names that a cell uses, and those that it binds."""

    used: set[str]
    bound: set[str]


def names(source: str) -> Names:
    def used(table: symtable.SymbolTable, top: bool) -> set[str]:
        here = {s for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
        inside = (used(child, False) for child in table.get_children())
        return {s.get_name() for s in here}.union(*inside)

    table = symtable.symtable(source, "cell", "exec")
    given = (s for s in table.get_symbols() if s.is_assigned() or s.is_imported())
    return Names(used(table, True), {s.get_name() for s in given})


def has_typed_parameters(path: Path) -> None:
    cells = code_cells(read(path), "parameters")
    assert len(cells) == 1, f"{len(cells)} cells tagged `parameters`; expected one"
    for line in cells[0].source.splitlines():
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.AnnAssign) and statement.value is not None, (
            f"expected name: type = value, got {line!r}"
        )
        assert re.search(r"  # \w.+", line), f"no comment that says what it does: {line!r}"
        names = {node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)}
        assert not names, f"derived from {names}, which papermill sets only later: {line!r}"
    known = papermill.inspect_notebook(path)
    assert {"protocol", "dataset", "device", "seed", "results", "only"} <= known.keys(), sorted(
        known
    )
    assert known["protocol"]["default"] in ('"quick"', "'quick'"), "the default protocol is quick"


def is_tagged_for_nbval(notebook: NotebookNode) -> None:
    checked = code_cells(notebook, "nbval-check-output")
    ignored = code_cells(notebook, "nbval-ignore-output")
    assert checked, "no cell tagged nbval-check-output: nothing is promised to repeat"
    assert not any(cell in ignored for cell in checked), "a cell with both tags"
    for cell in checked:
        kinds = {mime for output in cell.outputs for mime in output.get("data", {"text": ""})}
        assert any("text" in kind for kind in kinds), f"nothing to compare:\n{cell.source}"
    for cell in ignored:
        assert cell.outputs, f"no output to ignore:\n{cell.source}"


def has_one_address(path: Path) -> None:
    found = spelled_out(path.read_text())
    assert set(found) <= {address.slug(ROOT)}, f"{path.name} spells out {found}: run `make sync`"


def repeats(path: Path, **environment: str) -> None:
    """Run the notebook where it lies, in a kernel of its own; compare with what it stores."""
    command = [sys.executable, "-m", "pytest", "-p", "nbval.plugin", "-p", "tests.comparison"]
    command += ["-p", "no:cacheprovider", "-q", "--color=no", "--rootdir", str(path.parent)]
    command += ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg"]
    alone = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    alone |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment  # none but the two named above
    run = subprocess.run([*command, str(path)], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def runs_as_a_plain_script(path: Path) -> None:
    """Run what the notebook exports to, beside it."""
    script = path.with_suffix(".py")
    jupytext.write(read(path), script, fmt="py:percent")
    run = subprocess.run(
        [sys.executable, script.name],
        cwd=script.parent,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]


# The real notebooks.


def test_there_are_chapters() -> None:
    assert CHAPTERS


@every_notebook
@pytest.mark.parametrize(
    "rule",
    [
        is_executed,
        holds_results_only,
        is_plain_python,
        has_short_cells,
        is_tagged_for_nbval,
    ],
    ids=lambda rule: rule.__name__,
)
def test_form(rule: Callable[[NotebookNode], None], path: Path) -> None:
    rule(read(path))


@every_notebook
def test_pair(path: Path) -> None:
    is_paired(path)


@every_chapter
def test_parameters(path: Path) -> None:
    has_typed_parameters(path)


@every_chapter
def test_prose(path: Path) -> None:
    has_more_prose_than_code(read(path))


@every_chapter
def test_names(path: Path) -> None:
    has_one_meaning_a_name(read(path))


@pytest.mark.parametrize("path", address.texts(ROOT), ids=lambda path: path.name)
def test_address(path: Path) -> None:
    has_one_address(path)


@every_chapter
def test_chapter_spells_the_address_out_for_set_up_and_badge(path: Path) -> None:
    assert len(spelled_out(path.read_text())) >= 2


@pytest.mark.slow
def test_code_cells_have_consistent_types(tmp_path: Path) -> None:
    scripts = [tmp_path / f"{path.stem}.py" for path in NOTEBOOKS]
    # A chapter may give a short name such as `x` a second meaning further down the page. Said in
    # the scripts, not on the command line, it leaves mypy's cache of everything else as it is.
    options = "# mypy: allow-redefinition, local-partial-types\n"
    for path, script in zip(NOTEBOOKS, scripts, strict=True):
        script.write_text(options + jupytext.writes(read(path), fmt="py:percent"))
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the notebooks need around them, free to be written to."""
    for name in ("chapters", "book"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.py"))
    return tmp_path


@pytest.mark.slow
@every_notebook
def test_outputs_repeat(path: Path, clone: Path) -> None:
    repeats(clone / path.relative_to(ROOT), **budget.counting(clone / "count"))
    budget.keeps_its_budget(path.stem, budget.counted(clone / "count"))


# Every notebook's code is read for what a script lacks (`is_plain_python`, and mypy above). To run
# each a second time takes minutes, so the pages of the book do, and of the chapters the quickest.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in NOTEBOOKS if path not in CHAPTERS or path.stem == QUICKEST],
    ids=lambda path: path.stem,
)
def test_runs_as_a_plain_script(path: Path, clone: Path) -> None:
    runs_as_a_plain_script(clone / path.relative_to(ROOT))


# The rules catch what they are there for.


def notebook_of(*cells: NotebookNode) -> NotebookNode:
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Title\n\nProse."), *cells],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )


def code(source: str, *tags: str) -> NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """A notebook that keeps the rules, executed by the same tool as the real ones."""
    folder = tmp_path_factory.mktemp("small")
    noise = "import sys, time\nprint(time.time(), file=sys.stderr)\nprint(6 * 7)"
    unsure = "import random\nprint(random.random())"
    cells = [code(noise, "nbval-check-output"), code(unsure, "nbval-ignore-output")]
    nbformat.write(notebook_of(*cells), folder / "small.ipynb")
    execute.main([folder / "small.ipynb"])
    return read(folder / "small.ipynb")


@pytest.fixture
def copy(small: NotebookNode, tmp_path: Path) -> Path:
    """A pair that each test may break."""
    path = tmp_path / "small.ipynb"
    nbformat.write(small, path)
    jupytext.write(small, path.with_suffix(".md"), fmt="md:myst")
    return path


def test_good_notebook_keeps_every_rule(copy: Path) -> None:
    is_executed(read(copy))
    holds_results_only(read(copy))
    is_plain_python(read(copy))
    has_short_cells(read(copy))
    is_tagged_for_nbval(read(copy))
    is_paired(copy)
    repeats(copy)
    runs_as_a_plain_script(copy)


def test_executing_stores_no_noise_and_changes_nothing_twice(copy: Path) -> None:
    before = copy.read_text()
    nbformat.write(execute.clean(read(copy)), copy)
    assert copy.read_text() == before
    assert "iopub" not in before  # a time stamp


def test_what_is_printed_piece_by_piece_is_stored_in_one() -> None:
    cell = code("print(1)\nprint(2)")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=t) for t in ("1\n", "2\n")]
    (stored,) = code_cells(execute.clean(notebook_of(cell)))
    assert [output.text for output in stored.outputs] == ["1\n2\n"]


def test_nbval_fails_on_a_tampered_output(copy: Path) -> None:
    text = copy.read_text()
    assert text.count('"42\\n"') == 1
    copy.write_text(text.replace('"42\\n"', '"43\\n"'))
    with pytest.raises(AssertionError, match="mismatch"):
        repeats(copy)


def test_stripped_notebook_passes_nbval_but_not_us(copy: Path) -> None:
    stripped = read(copy)
    for cell in code_cells(stripped):
        cell.update(execution_count=None, outputs=[])
    nbformat.write(stripped, copy)
    repeats(copy)  # vacuous: this is why the next line is needed
    with pytest.raises(AssertionError, match="make execute"):
        is_executed(stripped)


def test_one_unexecuted_cell_is_caught(small: NotebookNode) -> None:
    added = nbformat.from_dict({**small, "cells": [*small.cells, code("1 + 1")]})
    with pytest.raises(AssertionError, match="not top to bottom"):
        is_executed(added)


@pytest.mark.parametrize(("old", "new"), [("6 * 7", "6 * 8"), ("Prose.", "Other prose.")])
def test_pair_out_of_step_is_caught(copy: Path, old: str, new: str) -> None:
    text = copy.with_suffix(".md")
    text.write_text(text.read_text().replace(old, new))
    with pytest.raises(AssertionError, match="differ"):
        is_paired(copy)


def test_missing_pair_is_caught(copy: Path) -> None:
    copy.with_suffix(".md").unlink()
    with pytest.raises(AssertionError, match=r"has no small\.md"):
        is_paired(copy)


@pytest.mark.parametrize("name", ["error", "stderr"])
def test_stored_failure_is_caught(small: NotebookNode, name: str) -> None:
    cell = code("1 / 0")
    cell.outputs = [
        nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])
        if name == "error"
        else nbformat.v4.new_output("stream", name="stderr", text="warning")
    ]
    with pytest.raises(AssertionError, match=name):
        holds_results_only(notebook_of(cell))


@pytest.mark.parametrize(
    "line",
    [
        "%matplotlib inline",
        "!pip install torch",
        "    %timeit f()",
        "files = !ls",
        "time = %timeit -o x",
        "x?",
        "%%bash\nls",
        "await x",
        "from __future__ import annotations",
        "display(x)",
        "def show(x):\n    display(x)",
        "display(x)  # noqa: F821",
        "get_ipython().run_line_magic('time', '')",
        "print(Out[1])",
        "print(_)",
        "from IPython.display import *\ndisplay(x)",
    ],
)
def test_what_a_script_cannot_run_is_caught(line: str) -> None:
    is_plain_python(notebook_of(code("x = 1"), code("print(x)")))
    with pytest.raises(AssertionError, match="plain script"):
        is_plain_python(notebook_of(code("x = 1"), code(line)))


@pytest.mark.parametrize(
    "source", ["from IPython.display import display\ndisplay(1)", "exit", "__file__"]
)
def test_what_a_script_can_run_passes(source: str) -> None:
    is_plain_python(notebook_of(code(source)))


def test_script_that_fails_is_caught(copy: Path) -> None:
    notebook = read(copy)
    notebook.cells.append(code("get_ipython()"))
    nbformat.write(notebook, copy)
    with pytest.raises(AssertionError, match="NameError"):
        runs_as_a_plain_script(copy)


def test_long_cells_are_caught() -> None:
    with pytest.raises(AssertionError, match="31 lines"):
        has_short_cells(notebook_of(code("\n".join(["x = 1"] * 31)), code("x"), code("x")))
    with pytest.raises(AssertionError, match="median 9"):
        has_short_cells(notebook_of(code("\n".join(["x = 1"] * 9))))


@pytest.mark.parametrize(
    ("second", "last", "wrong"),
    [
        ("three = (4, 5, 6)", "Prose(f'{three}')", True),
        ("for three in (4,):\n    pass", "Prose(f'{[three for _ in range(2)]}')", True),
        ("def three(): ...", "claim('text', (lambda: three)())", True),
        ("three = (4, 5, 6)", "Prose(f'{[three for three in (1,)]}')", False),
        ("other = (4, 5, 6)", "Prose(f'{three}')", False),
        ("three = (4, 5, 6)", "print(three)", False),
        ("three = (4, 5, 6)", "three = 1\nProse(f'{three}')", False),
    ],
)
def test_a_name_of_two_meanings_is_found(second: str, last: str, wrong: bool) -> None:
    between = [code(f"between = {n}") for n in range(4)]
    cells = notebook_of(code("three = (1, 2, 3)"), code(second), *between, code(last))
    if wrong:
        with pytest.raises(AssertionError, match=r"'three', which cells \[0, 1\] bind"):
            has_one_meaning_a_name(cells)
    else:
        has_one_meaning_a_name(cells)


def test_mathematics_and_directives_are_no_prose() -> None:
    padding = (
        "$$\n"
        + "a b c " * 50
        + "\n$$\n\n:::{exercise}\n:label: "
        + "word " * 50
        + "\n:::\n\nAfter."
    )
    cell = nbformat.v4.new_markdown_cell(padding)
    with pytest.raises(AssertionError, match=r"3 words of prose for 1 lines"):
        has_more_prose_than_code(notebook_of(cell, code("x = 1")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed = 0  # the seed", "name: type = value"),
        ("seed: int = 0", "no comment"),
        ("seed: int = protocol  # the seed", "derived from"),
        ("seed: int = 0  # the seed", "protocol"),
    ],
)
def test_careless_parameters_are_caught(tmp_path: Path, line: str, message: str) -> None:
    nbformat.write(notebook_of(code(line, "parameters")), tmp_path / "a.ipynb")
    with pytest.raises(AssertionError, match=message):
        has_typed_parameters(tmp_path / "a.ipynb")


def test_other_address_is_caught_and_filled_in(tmp_path: Path) -> None:
    (tmp_path / "_config.yml").write_text("repository:\n  url: https://github.com/new/home\n")
    clone = '["git", "clone", "--depth", "1", "https://github.com/old/place", "book"]'
    badge = "https://colab.research.google.com/github/old/place/blob/main/chapters/a.ipynb"
    (tmp_path / "chapters").mkdir()
    nbformat.write(notebook_of(code(f"run({clone})")), tmp_path / "chapters" / "a.ipynb")
    (tmp_path / "b.md").write_text(f"[Colab]({badge})\ngit clone https://github.com/old/place\n")
    (tmp_path / "CITATION.cff").write_text('repository-code: "https://github.com/old/place"\n')
    with pytest.raises(AssertionError, match="make sync"):
        has_one_address(tmp_path / "chapters" / "a.ipynb")
    assert {path.name for path in address.fill_in(tmp_path)} == {"a.ipynb", "b.md", "CITATION.cff"}
    written = "".join(path.read_text() for path in address.texts(tmp_path))
    assert "old/place" not in written
    assert spelled_out(written) == ["new/home"] * 4
    assert address.fill_in(tmp_path) == []


def test_unusable_address_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_config.yml").write_text("repository:\n  url: github.com/me\n")
    with pytest.raises(ValueError, match="OWNER/REPOSITORY"):
        address.slug(tmp_path)


@pytest.mark.parametrize("name", ["results/k.csv", "results/k.npz", "results/figures/k-1.png"])
def test_a_page_is_run_again_where_what_it_shows_has_changed(tmp_path: Path, name: str) -> None:
    file = tmp_path / "chapters" / name
    file.parent.mkdir(parents=True)
    file.write_text("old")
    (tmp_path / "chapters" / "k.ipynb").write_text("{}")
    before = build._fingerprint(tmp_path, Path("chapters", "k.ipynb"))
    assert build._fingerprint(tmp_path, Path("chapters", "k.ipynb")) == before
    file.write_text("new")
    assert build._fingerprint(tmp_path, Path("chapters", "k.ipynb")) != before
