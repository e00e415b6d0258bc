"""What the three systems have in common: no fcntl on Windows, consoles of an older code page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    environment = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True
    )


WITHOUT = "import sys; sys.modules['fcntl'] = None\n"


def test_the_tools_work_without_fcntl(tmp_path: Path) -> None:
    """Windows has none: what is imported by every command must do without."""
    store = (ROOT / "chapters" / "paper").as_posix()
    code = f"""
import pathlib, shutil
import book.build, book.execute, defenses.results
from tests.measurements import CHAPTER, row
folder = pathlib.Path({str(tmp_path)!r})
(folder / "paper").mkdir()
shutil.copy(f"{store}/{{CHAPTER}}.csv", folder / "paper")
defenses.results.record(CHAPTER, [row()], folder)
with book.build.locked(folder / ".lock"):
    print("inside", defenses.results.fcntl, book.build.fcntl)
"""
    done = python(WITHOUT + code)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split() == [b"inside", b"None", b"None"]


def test_on_windows_the_second_build_waits_for_the_first(tmp_path: Path) -> None:
    """`msvcrt.locking` gives up after ten seconds with an OSError: it is asked again."""
    code = f"""
import types
calls = []
def locking(file, mode, size):
    calls.append((mode, size))
    if len(calls) < 3:
        raise OSError("resource deadlock avoided")
import pathlib, book.build
book.build.msvcrt = types.SimpleNamespace(locking=locking, LK_LOCK=1)
with book.build.locked(pathlib.Path({str(tmp_path)!r}) / ".lock"):
    print(calls)
"""
    done = python(WITHOUT + code)
    assert done.stdout.decode().strip() == "[(1, 1), (1, 1), (1, 1)]", done.stderr.decode()


def test_elsewhere_the_second_build_waits_for_the_first(tmp_path: Path) -> None:
    code = f"""
import pathlib, time, book.build
with book.build.locked(pathlib.Path({str(tmp_path)!r}) / ".lock"):
    print(time.time(), flush=True); time.sleep(0.5); print(time.time(), flush=True)
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    spans = sorted([float(t) for t in one.communicate()[0].split()] for one in both)
    assert spans[0][1] <= spans[1][0]


@pytest.mark.parametrize(
    ("encoding", "shown"), [("cp1252", "ok: ? = ½ holds"), ("utf-8", "✓ ε = ½ holds")]
)
def test_a_claim_prints_on_any_console(encoding: str, shown: str) -> None:
    code = "from defenses.results import claim; claim('ε = ½ holds', True)"
    done = python(code, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert done.stdout.decode(encoding).strip() == shown


def test_the_table_of_contents_is_read_in_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    text = "root: book/intro\nparts:\n- caption: Verteidigungen – für alle\n"
    text += "  chapters:\n  - file: chapters/größe.ipynb\n"
    (tmp_path / "_toc.yml").write_text(text, encoding="utf-8")
    code = f"""
from pathlib import Path
from book.build import notebooks
print(notebooks(Path({str(tmp_path)!r})) == [Path("chapters/gr\\u00f6\\u00dfe.ipynb")])
"""
    done = python(
        code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="utf-8"
    )
    assert done.stdout.strip() == b"True", done.stderr.decode()


def test_what_runs_elsewhere_names_what_is_here() -> None:
    """The weekly workflow and the CI script: their shell parses, their files and extras exist."""
    weekly = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text("utf-8"))
    steps = [step for job in weekly["jobs"].values() for step in job["steps"]]
    scripts = [step["run"] for step in steps if "run" in step]
    scripts.append((ROOT / ".ci" / "run").read_text("utf-8"))
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "$PWD/chapters/colab:" in "".join(scripts)
    assert any((ROOT / "chapters" / "colab").glob("*.ipynb"))
    assert sum("'.[test]'" in script for script in scripts) == 1
    assert "\ntest = [" in (ROOT / "pyproject.toml").read_text("utf-8")
