"""The notebooks that Colab, JupyterLab, VS Code and GitHub open say there what the pages say."""

import functools
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from book import colab, needed
from book.build import notebooks
from tests import test_notebooks
from tests.test_notebooks import code_cells, is_plain_python

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / colab.FOLDER
SOURCES = notebooks(ROOT)
MADE = sorted(FOLDER.glob("*.ipynb"))
CHAPTERS = [path for path in SOURCES if path.parent.name == "chapters"]

every_one = pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


@functools.cache
def read(path: Path) -> NotebookNode:
    return test_notebooks.read(path)


@functools.cache
def book() -> colab.Book:
    return colab.Book(ROOT)


def texts(notebook: NotebookNode) -> str:
    """Everything that is read as Markdown, code and formulas left out."""
    found = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for cell in code_cells(notebook):
        found += [out.data.get("text/markdown", "") for out in cell.outputs if "data" in out]
    plain = re.sub(
        r"^```.*?^```$|\$\$.*?\$\$|\$[^$\n]+\$", " ", "\n".join(found), flags=re.M | re.S
    )
    return re.sub(r"`[^`\n]+`", lambda code: code[0] if "{" in code[0] else " ", plain)


# What is committed.


def test_they_are_made_from_what_is_committed() -> None:
    made = colab.made(ROOT)
    assert {path.name for path in MADE} == {*made}
    stale = [p.name for p in MADE if p.read_text(encoding="utf-8") != made[p.name]]
    assert stale == [], "run `make sync`"


@every_one
def test_nothing_of_myst_is_left(path: Path) -> None:
    left = re.findall(
        r"\{[a-z:]+\}`.*?`|^:::.*|^```\{.*|^\([\w-]+\)=$|^:\w+: .*", texts(read(path))
    )
    assert left == []


@every_one
def test_every_link_leads_somewhere(path: Path) -> None:
    notebook = read(path)
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", texts(notebook))
    assert links
    for link in links:
        file, _, place = link.partition("#")
        target = (FOLDER / (file or path.name)).resolve()
        assert target.exists(), link
        if place and target.suffix == ".ipynb":
            _, _, cell = place.partition("scrollTo=")  # what Colab scrolls to ...
            (found,) = (c for c in read(target).cells if c.id == cell)
            assert found.source.startswith(f'<a id="{place}"></a>'), link  # ... and everyone else


@every_source
def test_the_code_is_that_of_the_page_but_for_solutions(path: Path) -> None:
    kept = [part.cell for part in book().parts[path.stem] if part.cell and not part.solves]
    cells = code_cells(read(FOLDER / path.name))
    for cell, original in zip(cells, kept, strict=True):
        assert re.sub(r"^# @title .+\n", "", cell.source) == original.source
        assert cell.execution_count == original.execution_count
        assert len(cell.outputs) == len(original.outputs)


@every_source
def test_plumbing_is_folded_in_jupyter_and_in_colab(path: Path) -> None:
    for cell in code_cells(read(FOLDER / path.name)):
        folded = bool(colab.FOLDED & {*cell.metadata.get("tags", [])})
        assert folded == cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert folded == (cell.metadata.get("cellView") == "form")
        assert folded == ("transient" in cell.metadata)
        assert folded == cell.source.startswith("# @title ")


@every_chapter
def test_no_solution_stands_under_its_exercise(path: Path) -> None:
    alone, solved = read(FOLDER / path.name), read(FOLDER / f"{path.stem}-solutions.ipynb")
    answers = [part for part in book().parts[path.stem] if part.solves]
    said = "\n".join(cell.source for cell in alone.cells)
    lines = [
        line
        for part in answers
        for line in (part.cell or {"source": part.text})["source"].splitlines()
    ]
    long = {line for line in lines if len(line) > 40}
    assert len(long) > 3
    assert [line for line in long if line in said] == []
    named = re.compile(r"\*\*Exercise .+?\.\*\*")
    assert {*named.findall(said)} >= {*named.findall(texts(solved))}
    assert said.count("[Solution](") == texts(solved).count("**Solution.**") > 3


@every_one
def test_each_is_a_whole_script(path: Path) -> None:
    notebook = read(path)
    is_plain_python(notebook)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.jupytext.formats == "ipynb"  # and not paired like the others


def test_stored_figures_are_shown_by_cells() -> None:
    stored = {path.stem for path in (ROOT / "chapters" / "results" / "figures").glob("*.png")}
    shown = set()
    for path in CHAPTERS:
        for cell in code_cells(read(FOLDER / path.name)):
            if name := re.search(r'^Picture\(CHAPTER, "(.+)"\)', cell.source, re.M):
                (output,) = cell.outputs
                assert "image/png" in output.data
                assert output.metadata["image/png"]["alt"]
                assert 300 < output.metadata["image/png"]["width"] <= colab.WIDTH
                shown.add(f"{path.stem}-{name[1]}")
    assert shown == stored


# What it makes of MyST.

CHAPTER = """# One

As {cite:t}`madry2018` show {cite}`goodfellow2015,wilson1927`,
see {prf:ref}`prop-one` and [two](two.ipynb).

:::{prf:proposition} Small
:label: prop-one
For every $x$.
:::

:::{prf:proof}
$$
x = x
$$
:::

:::{admonition} More
:class: dropdown
Text.
:::

## Exercises

:::{exercise} Show it
:label: ex-one
Do.
:::

:::{solution-start} ex-one
:class: dropdown
:::
The answer is three.
:::{solution-end}
:::
"""


def little(root: Path, text: str, *code: NotebookNode) -> colab.Book:
    """A book of two chapters, of which the first says `text`."""
    for folder in ("book", "chapters"):
        (root / folder).mkdir(exist_ok=True)
    (root / "_config.yml").write_text("repository:\n  url: https://github.com/me/home\n")
    files = "".join(f"  - file: chapters/{name}.ipynb\n" for name in ("one", "two"))
    (root / "_toc.yml").write_text(f"root: book/intro\nparts:\n- caption: A\n  chapters:\n{files}")
    (root / "book" / "references.bib").write_text((ROOT / "book" / "references.bib").read_text())
    (root / "book" / "notation.md").write_text("# Notation\n\n(here)=\nText.\n")
    for name, source in (("one", text), ("two", "# Two\n\n## Far away\n")):
        cells = [nbformat.v4.new_markdown_cell(source), *(code if name == "one" else ())]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, root / "chapters" / f"{name}.ipynb")
    return colab.Book(root)


def said(book: colab.Book) -> str:
    return "\n".join(cell.source for cell in book.readable("one").cells)


@pytest.mark.parametrize(
    "expected",
    [
        "As [Madry et al. (2018)](https://arxiv.org/abs/1706.06083) show",
        "([Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572); "
        "[Wilson, 1927](#scrollTo=references))",
        "see [Proposition 1.1](#scrollTo=prop-one) and [two](two.ipynb).",
        '<a id="scrollTo=prop-one"></a>\n\n**Proposition 1.1 (Small).** For every $x$.',
        "*Proof.*\n\n$$\nx = x\n$$\n\n∎",
        "<details><summary>More</summary>\n\nText.\n\n</details>",
        "**Exercise 1.1 (Show it).** Do.\n\n"
        "[Solution](one-solutions.ipynb#scrollTo=solution-ex-one)",
        '<a id="scrollTo=references"></a>\n\n## References\n\n- Ian J. Goodfellow',
    ],
)
def test_each_construct_becomes_plain_markdown(tmp_path: Path, expected: str) -> None:
    assert expected in said(little(tmp_path, CHAPTER))


def test_the_solution_stands_in_a_notebook_of_its_own(tmp_path: Path) -> None:
    withheld = ":::{exercise} Think\n:label: ex-open\nWhy?\n:::\n"
    book = little(tmp_path, CHAPTER + withheld)
    assert "three" not in said(book)
    assert "**Exercise 1.2 (Think).** Why?" in said(book)
    assert said(book).count("[Solution]") == 1
    solved = book.solutions("one")
    assert solved is not None and book.solutions("two") is None
    assert "The answer is three." in "\n".join(cell.source for cell in solved.cells)


@pytest.mark.parametrize(
    ("link", "place"),
    [
        ("[a](../book/notation.md)", "[a](../../book/notation.md)"),
        ("[a](#here)", "[a](../../book/notation.md#here)"),
        ("[](../book/notation.md)", "[Notation](../../book/notation.md)"),
        ("[a](two.ipynb#far-away)", "[a](two.ipynb#scrollTo=far-away)"),
        ("`{cite}` $[a](b)$ `[a](b)`", "`{cite}` $[a](b)$ `[a](b)`"),
        ("```python\nx[0](1)\n```", "```python\nx[0](1)\n```"),
        ("[a](https://example.org)", "[a](https://example.org)"),
    ],
)
def test_links_lead_from_where_the_notebook_is(tmp_path: Path, link: str, place: str) -> None:
    assert place in said(little(tmp_path, f"# One\n\n{link}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a](#nowhere)", "nothing is called #nowhere"),
        ("[a](two.ipynb#nowhere)", "nothing is called two.ipynb#nowhere"),
        ("[a](../book/no.md)", "no file"),
        ("{prf:ref}`nowhere`", "nothing is called"),
        ("{doc}`two`", "no plain text for the role"),
        (":::{tab-set}\ntext\n:::", "no plain text for the directive tab-set"),
        (":::{exercise}\ntext\n", "no end"),
        ("```{figure} a.png\n```", "three colons"),
        ("::::{note}\ntext\n::::", "three colons"),
        (":::{note}\n:::{warning}\ntext\n:::\n:::", "three colons"),
    ],
)
def test_what_cannot_be_said_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        said(little(tmp_path, f"# One\n\n{text}\n"))


def test_outputs_are_resolved_and_captions_stand_below(tmp_path: Path) -> None:
    output = nbformat.v4.new_output("display_data", {"text/markdown": "{cite}`madry2018`"})
    cell = nbformat.v4.new_code_cell("x", outputs=[output], metadata={"tags": ["hide-cell"]})
    cell.metadata.mystnb = {"figure": {"caption": "What\n  it shows."}}
    _, code, caption, *_ = little(tmp_path, "# One", cell).readable("one").cells
    assert code.source == "# @title Fig. 1.1\nx"
    assert code.metadata.jupyter == {"source_hidden": True, "outputs_hidden": True}
    assert "Madry" in code.outputs[0].data["text/markdown"]
    assert caption.source == "**Fig. 1.1.** What it shows."


def test_what_is_no_longer_made_is_deleted(tmp_path: Path) -> None:
    little(tmp_path, CHAPTER)
    assert len(colab.write(tmp_path)) == 3
    assert colab.write(tmp_path) == []
    little(tmp_path, "# One")
    assert [path.name for path in colab.write(tmp_path)] == ["one.ipynb"]
    assert {p.name for p in (tmp_path / colab.FOLDER).iterdir()} == {"one.ipynb", "two.ipynb"}


# What code needs of the code before it.


@pytest.mark.parametrize(
    ("before", "code", "expected"),
    [
        (["a = 1", "b = 2"], "a", ["a = 1"]),
        (["a = 1", "b = a"], "b", ["a = 1", "b = a"]),
        (["a = 1", "a = 2"], "a", ["a = 2"]),
        (["a = 1", "a += 1"], "a", ["a = 1", "a += 1"]),
        (["a = 1", "a = a + 1"], "a", ["a = 1", "a = a + 1"]),
        (["a = 1", "if b:\n    a = 2", "b = 0"], "a", ["a = 1", "if b:\n    a = 2"]),
        (["a = {}", "a['k'] = 1", "a.b()"], "a", ["a = {}", "a['k'] = 1"]),
        (["a = []", "a.append(1)"], "a", ["a = []", "a.append(1)"]),
        (["import a", "from c import b"], "a.d", ["import a"]),
        (["def f():\n    return g", "g = 1"], "f()", ["def f():\n    return g", "g = 1"]),
        (["a = 1"], "a = 2\na", []),
        (["a = 1"], "[a for a in (2,)]", []),
        (["a = 1"], "for a in (2,):\n    a", []),
        (["a = 1"], "def f(a):\n    return a", []),
    ],
)
def test_only_what_is_needed_is_kept(before: list[str], code: str, expected: list[str]) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in before]
    kept = needed.needed(cells, [nbformat.v4.new_code_cell(code)])
    assert "\n\n".join(cell.source for cell in kept) == "\n\n".join(expected)


def test_set_up_and_parameters_are_always_kept() -> None:
    cells = [
        nbformat.v4.new_code_cell(source) for source in ("s = 1", "a = 1", "protocol: str = ''")
    ]
    cells[0].metadata.tags, cells[2].metadata.tags = ["setup"], ["parameters"]
    kept = needed.needed(cells, [nbformat.v4.new_code_cell("a")])
    assert [cell.source for cell in kept] == ["s = 1", "a = 1", "protocol: str = ''"]
    assert [cell.metadata.tags for cell in kept] == [["hide-input"], ["hide-input"], ["parameters"]]


def test_a_link_without_words_to_a_chapter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\[\]\(batchout.ipynb\): a link without words"):
        book().title("batchout.ipynb")
