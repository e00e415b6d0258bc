"""The first code cell of every notebook finds the book, fetches it, or says what is missing.

The paths of a reader: Colab, where the notebook is alone; a clone whose kernel knows nothing of it;
a machine without git, without a network, with half a clone, without PyTorch.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jupytext
import pytest

from book import address, colab
from tests.test_notebooks import NOTEBOOKS, QUICKEST, code_cells, read

ROOT = Path(__file__).resolve().parent.parent
(CELL,) = code_cells(read(NOTEBOOKS[0]), "setup")
URL = f"https://github.com/{address.slug(ROOT)}"
CLONE = URL.rpartition("/")[2]


def test_every_notebook_has_the_same() -> None:
    for path in NOTEBOOKS:
        (cell,) = code_cells(read(path), "setup")
        assert ast.dump(ast.parse(cell.source)) == ast.dump(ast.parse(CELL.source)), path.stem


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A clone of the book that stands for GitHub's, of the size of a test."""
    root = tmp_path / "remote"
    (root / "defenses").mkdir(parents=True)
    (root / "chapters" / "colab").mkdir(parents=True)
    (root / "defenses" / "__init__.py").write_text("")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "book")
    return root


def run(
    folder: Path, remote: Path | None = None, source: str = CELL.source, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the cell in `folder` with the bare Python, in which no package is installed."""
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"} | environment
    environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": URL}
    environment["GIT_CONFIG_KEY_0"] = f"url.{(remote or folder / 'nowhere').as_uri()}.insteadOf"
    command = [sys.executable, "-S", "-c", source]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_notebook_alone_fetches_the_book_once(remote: Path, tmp_path: Path) -> None:
    alone = tmp_path / "content"
    alone.mkdir()
    said = f"The code comes from {Path(CLONE, 'defenses')}.\n"
    assert run(alone, remote).stdout == said
    assert [path.name for path in alone.iterdir()] == [CLONE]
    assert run(alone, PATH="").stdout == said


@pytest.mark.parametrize("place", ["chapters", "chapters/colab"])
def test_in_a_clone_it_takes_the_clone(remote: Path, place: str) -> None:
    before = sorted(remote.rglob("*"))
    up = "/".join([".."] * (place.count("/") + 1))
    assert run(remote / place).stdout == f"The code comes from {Path(up, 'defenses')}.\n"
    assert sorted(remote.rglob("*")) == before


def test_an_installed_package_will_do(remote: Path, tmp_path: Path) -> None:
    alone = tmp_path / "content"
    alone.mkdir()
    done = run(alone, PYTHONPATH=str(remote))
    assert done.stdout == f"The code comes from {remote / 'defenses' / '__init__.py'}.\n"
    assert not [*alone.iterdir()]


def test_each_failure_names_its_remedy(remote: Path, tmp_path: Path) -> None:
    alone = tmp_path / "content"
    alone.mkdir()
    assert run(alone, remote, PATH="").stderr == (
        "There is no git here: install it, and run this again.\n"
    )
    assert run(alone).stderr.endswith(f"{URL} cannot be reached: is there a network?\n")
    (alone / CLONE).mkdir()
    assert run(alone, remote).stderr == f"{CLONE} is there, but not the whole book: delete it.\n"
    (remote / "defenses" / "__init__.py").write_text("import torch")
    lacks = "There is no torch here: %pip install "
    assert run(remote / "chapters").stderr == f"{lacks}./..\n"
    assert run(alone, PYTHONPATH=str(remote)).stderr == f"{lacks}git+{URL}\n"


@pytest.mark.slow
def test_what_colab_opens_runs_to_its_end_alone_in_a_folder(tmp_path: Path) -> None:
    """With the packages that are here, but not the book, which it fetches."""
    remote = tmp_path / "remote"
    for name in ("defenses", "chapters"):
        copied = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, remote / name, ignore=copied)
    git(remote, "init")
    git(remote, "add", ".")
    git(remote, "commit", "-m", "book")
    alone = tmp_path / "content"
    alone.mkdir()
    script = jupytext.writes(read(ROOT / colab.FOLDER / f"{QUICKEST}.ipynb"), fmt="py:percent")
    packages = sysconfig.get_path("purelib")
    done = run(alone, remote, script, PYTHONPATH=packages, MPLBACKEND="Agg", HOME=str(alone))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"The code comes from {Path(CLONE, 'defenses')}." in done.stdout
