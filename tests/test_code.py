"""The digest of the code behind a number changes with that code, and with nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from defenses import code

MODULE = '''
"""A module."""
from . import plots
from .other import again, helper
from .progress import one_bar, say, track
RATE = 0.1

def attack(x):
    """Docstring."""
    return helper(x) * RATE

def late(x):
    from .other import inner
    return plots.show() * inner(x)

def unused(x):
    return -x

class Net:
    def forward(self, x):
        return attack(x)
'''
OTHER = """
def helper(x):
    return x + 1

def again(x):
    return x + 3

def inner(x):
    return x + 5

def stranger():
    return 0
"""
CELLS = [
    ("from defenses import idea\nfrom defenses.idea import Net", []),
    ("steps: int = 3  # how many", ["parameters"]),
    ("table = {'a': 1}\nother_table = {'a': 1}", []),
    ("def measured():\n    return idea.attack(table['a'])", []),
    ("note = measured() * idea.again(steps) + idea.late(2)", []),
    ("beside = Net()", []),
    ("print('shown')", ["nbval-check-output"]),
]


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "idea.py").write_text(MODULE)
    (tmp_path / "other.py").write_text(OTHER)
    (tmp_path / "plots.py").write_text("def show():\n    return 1\n")
    (tmp_path / "progress.py").write_text("def track(items):\n    return items\n")
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    write(tmp_path, CELLS)
    yield tmp_path
    code._module.cache_clear()
    code._digest.cache_clear()


def write(book: Path, cells: list[tuple[str, list[str]]]) -> None:
    content = [
        {"cell_type": "code", "source": [source], "metadata": {"tags": tags}}
        for source, tags in cells
    ]
    (book / "a.ipynb").write_text(json.dumps({"cells": content}))


def digest(book: Path, cell: int | None = 4) -> str:
    code._module.cache_clear()
    code._digest.cache_clear()
    return code.digest(book / "a.ipynb", cell)


def changed(book: Path, old: str, new: str) -> str:
    """The digest behind cell 4 after a change in whichever file has `old`."""
    for file in book.iterdir():
        text = file.read_text()
        if old in text:
            file.write_text(text.replace(old, new))
    return digest(book)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.1", "RATE = 0.2"),
        ("helper(x) * RATE", "helper(x) / RATE"),
        ("return x + 1", "return x + 2"),
        ("return x + 3", "return x + 4"),  # it is asked for where it is only imported
        ("return x + 5", "return x + 6"),  # a function imports it
        ("table = {'a': 1}\\nother", "table = {'a': 2}\\nother"),
        ("def attack(x):", "@helper\ndef attack(x):"),
        ("return helper(x) * RATE", "print(RATE)\n    return helper(x) * RATE"),
        ("idea.attack(table", "idea.attack(1 + table"),
        ("note = measured()", "note = -measured()"),
    ],
)
def test_it_changes_with_what_the_number_depends_on(book: Path, old: str, new: str) -> None:
    before = digest(book)
    assert changed(book, old, new) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Docstring.", "Another."),
        ("A module.", "Another."),
        ("return -x", "return +x"),
        ("return 0", "return 1"),
        ("return attack(x)", "return -attack(x)"),
        ("other_table = {'a': 1}", "other_table = {'a': 2}"),
        ("beside = Net()", "beside = -Net()"),
        ("steps: int = 3", "steps: int = 4"),
        ("print('shown')", "print('told')"),
        ("def show():", "def show(more=1):"),
        ("def helper(x):", "# a comment\ndef helper(x):"),
        ("def attack(x):", "@one_bar\ndef attack(x):"),
        ("return helper(x) * RATE", "say(RATE)\n    return helper(x) * RATE"),
        ("return helper(x) * RATE", "return track(helper(x), 2 * unused(x)) * RATE"),
        ("def track(items):", "def track(items, more):"),
    ],
)
def test_it_does_not_change_with_anything_else(book: Path, old: str, new: str) -> None:
    before = digest(book)
    assert changed(book, old, new) == before


def test_that_of_the_whole_chapter_holds_all_cells(book: Path) -> None:
    before = digest(book, None)
    changed(book, "return attack(x)", "return -attack(x)")
    assert digest(book, None) != before


def test_what_is_changed_in_place_counts(book: Path) -> None:
    before = digest(book)
    write(book, [*CELLS[:3], ("table['b'] = 2", []), *CELLS[3:]])
    assert digest(book, 5) != before


def test_what_a_loop_adds_to_counts(book: Path) -> None:
    cells = [*CELLS, ("for key in 'bc':\n    table |= {key: 2}", [])]
    write(book, cells)
    before = digest(book, 7)
    cells[2] = ("table = {'a': 3}", [])
    write(book, cells)
    assert digest(book, 7) != before


def test_a_module_asked_by_getattr_counts_whole(book: Path) -> None:
    cells = [*CELLS[:4], ("note = getattr(idea, 'att' + 'ack')", []), *CELLS[5:]]
    write(book, cells)
    before = digest(book)
    assert changed(book, "return -x", "return +x") != before


def test_it_follows_the_real_chapters_into_the_real_module() -> None:
    chapters = Path(code.__file__).parents[1] / "chapters"
    for notebook in sorted(chapters.glob("*.ipynb")):
        cells = code.measuring(notebook)
        found = {code.digest(notebook, cell.index) for cell in cells}
        assert len(found) > len(cells) // 2, notebook.stem
        assert {"parameters"} in [cell.tags for cell in cells], notebook.stem
