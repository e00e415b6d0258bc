"""No author's text is lost: not while a notebook runs, nor when its two sides are synced."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
import pytest

from book import execute, pairs

ROOT = Path(__file__).resolve().parent.parent


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def saved_last(path: Path) -> None:
    """As of tomorrow, so that no clock is too coarse."""
    tomorrow = path.stat().st_mtime + 86_400
    os.utime(path, (tomorrow, tomorrow))


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """One side of a pair in step, in a clone where it is committed."""
    root = tmp_path / "clone"
    (root / "chapters").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("Old text."), nbformat.v4.new_code_cell("1")]
    path = root / "chapters" / "k.ipynb"
    nbformat.write(notebook, path)
    jupytext.write(notebook, path.with_suffix(".md"), fmt="md:myst")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "a pair")
    return path.with_suffix(".md")


def sync(text: Path) -> list[str]:
    return pairs.sync([text], text.parent.parent)


def words(text: Path) -> str:
    assert pairs.in_step(text)
    return text.read_text()


@pytest.mark.parametrize("side", [".md", ".ipynb"])
@pytest.mark.parametrize("last", [".md", ".ipynb"])
def test_the_edited_side_wins_whichever_was_saved_last(text: Path, side: str, last: str) -> None:
    edited(text.with_suffix(side), "Old", "New")
    saved_last(text.with_suffix(last))
    assert sync(text) == []
    assert "New text" in words(text)
    edited(text.with_suffix(side), "New", "Newer")  # what is committed is on neither side
    saved_last(text.with_suffix(last))
    assert sync(text) == []
    assert "Newer text" in words(text)


@pytest.mark.parametrize("noted", [False, True])
def test_where_both_sides_were_edited_both_stay(text: Path, noted: bool) -> None:
    if noted:
        edited(text, "Old", "First")
        assert sync(text) == []
    edited(text, "text.", "text of one.")
    edited(text.with_suffix(".ipynb"), "text.", "text of another.")
    (refusal,) = sync(text)
    assert "chapters/k.md and chapters/k.ipynb differ" in refusal
    assert "text of one." in text.read_text()
    assert "text of another." in text.with_suffix(".ipynb").read_text()


def test_the_remedy_that_a_refusal_names_works(text: Path) -> None:
    edited(text, "Old", "One")
    edited(text.with_suffix(".ipynb"), "Old", "Another")
    (refusal,) = sync(text)
    command = refusal.split("`")[1].split()
    subprocess.run(command, cwd=text.parent.parent, check=True, env=with_commands())
    assert sync(text) == []
    assert "One text" in words(text)


def with_commands() -> dict[str, str]:
    return os.environ | {"PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_without_git_or_a_note_nothing_is_known_and_nothing_overwritten(text: Path) -> None:
    shutil.rmtree(text.parent.parent / ".git")
    edited(text, "Old", "New")
    assert len(sync(text)) == 1
    assert "New" in text.read_text() and "Old" in text.with_suffix(".ipynb").read_text()


@pytest.mark.parametrize("side", [".md", ".ipynb"])
def test_a_side_alone_gets_its_other(text: Path, side: str) -> None:
    edited(text.with_suffix(side), "Old", "New")
    text.with_suffix({".md": ".ipynb", ".ipynb": ".md"}[side]).unlink()
    assert sync(text) == []
    assert "New text" in words(text)


def test_one_refusal_keeps_no_other_pair_from_its_turn(text: Path) -> None:
    other = text.with_name("l.md")
    for suffix in (".md", ".ipynb"):
        shutil.copy(text.with_suffix(suffix), other.with_suffix(suffix))
        edited(text.with_suffix(suffix), "Old", suffix)
    git(text.parent.parent, "add", ".")
    git(text.parent.parent, "commit", "-m", "another")
    for suffix in (".md", ".ipynb"):
        edited(text.with_suffix(suffix), "text", suffix)
    edited(other, "Old", "New")
    assert len(pairs.sync([text, other], text.parent.parent)) == 1
    assert "New text" in words(other)


def test_a_pair_that_is_not_there_is_refused_by_name(text: Path) -> None:
    (said,) = sync(text.with_name("nosuch.md"))
    assert "chapters/nosuch.md is not there" in said


def test_damaged_notes_keep_no_pair_from_its_turn(text: Path) -> None:
    assert sync(text) == []
    (text.parent.parent / pairs.NOTES).write_text('{"chapters/k.md": "1')
    edited(text, "Old", "New")
    assert sync(text) == [] and "New text" in words(text.with_suffix(".md"))


def runs(text: Path, source: str) -> list[str]:
    """What `book.execute` refuses of the pair whose only cell is this."""
    for suffix in (".md", ".ipynb"):
        path = text.with_suffix(suffix)
        notebook = jupytext.read(path)
        notebook.cells[1].source = source
        jupytext.write(notebook, path, fmt=pairs.FORMATS[suffix])
    assert sync(text) == []  # as `make execute` does
    return execute.main([text.with_suffix(".ipynb")])


def saved_in_jupyter(root: Path, name: str) -> None:
    """Open `name` in a Jupyter that was started at `root`, change its text, and save."""
    manager = jupytext.TextFileContentsManager(root_dir=str(root))
    model = manager.get(name)
    model["content"]["cells"][0]["source"] = "New text."
    manager.save(model, name)


jupyter = pytest.mark.skipif(not find_spec("jupyter_server"), reason="no JupyterLab: install it")


@jupyter
def test_a_jupyter_that_starts_at_the_root_writes_both_sides(text: Path) -> None:
    saved_in_jupyter(text.parent.parent, "chapters/k.ipynb")
    assert "New text" in words(text)


@jupyter
def test_one_that_starts_below_writes_one_and_the_next_sync_the_other(text: Path) -> None:
    saved_in_jupyter(text.parent, "k.ipynb")
    assert "Old text" in text.read_text()
    assert sync(text) == []
    assert "New text" in words(text)


@jupyter
def test_what_readers_open_is_not_paired(text: Path) -> None:
    folder = text.parent / "colab"
    folder.mkdir()
    shutil.copy(ROOT / "chapters" / "colab" / "attacks-solutions.ipynb", folder)
    saved_in_jupyter(text.parent.parent, "chapters/colab/attacks-solutions.ipynb")
    assert "New text" in (folder / "attacks-solutions.ipynb").read_text()
    assert not [*folder.glob("*.md")]


EDITS = "from pathlib import Path\np = Path('k{}')\np.write_text(p.read_text().replace('Old', 'N'))"


def test_a_text_that_was_edited_while_its_notebook_ran_is_kept(text: Path) -> None:
    (refusal,) = runs(text, EDITS.format(".md"))
    assert "edited while it ran" in refusal
    assert "N text" in text.read_text()
    assert not jupytext.read(text.with_suffix(".ipynb")).cells[1].execution_count
    assert sync(text) == []
    assert "N text" in words(text)


def test_a_notebook_that_was_edited_while_it_ran_is_kept(text: Path) -> None:
    (refusal,) = runs(text, EDITS.format(".ipynb"))
    assert "edited while it ran" in refusal
    assert "N text" in text.with_suffix(".ipynb").read_text()


def test_a_notebook_that_nobody_edits_is_written(text: Path) -> None:
    assert runs(text, "6 * 7") == []
    assert "42" in text.with_suffix(".ipynb").read_text()
    assert {path.name for path in text.parent.iterdir()} == {"k.md", "k.ipynb"}


def test_a_pair_out_of_step_is_not_run(text: Path) -> None:
    edited(text, "Old", "New")
    (refusal,) = execute.main([text.with_suffix(".ipynb")])
    assert "make sync" in refusal
    assert not jupytext.read(text.with_suffix(".ipynb")).cells[1].execution_count
