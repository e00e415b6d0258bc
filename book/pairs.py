"""Keep NAME.md and NAME.ipynb in step and lose no author's text: what `make sync` does.

Jupytext alone lets the side win that was saved last, and drops what was written into the other.
Here a side wins only if the other still says what both said when they were last in step, which is
noted in `_build`, or what is committed. Where both were edited, nothing is written.
Name sides to sync only these: `python -m book.pairs PATH`.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jupytext

from book.build import ROOT

NOTES = Path("_build", "pairs.json")
FORMATS = {".md": "md:myst", ".ipynb": "ipynb"}


def said(text: str, suffix: str) -> str:
    """A digest of what an author wrote into this side: the cells and their tags, no outputs."""
    cells = jupytext.reads(text, fmt=FORMATS[suffix]).cells
    written = [(c.cell_type, c.source.strip(), c.metadata.get("tags", [])) for c in cells]
    return hashlib.sha256(json.dumps(written).encode()).hexdigest()


def says(path: Path) -> str | None:
    """`said` of a file; None where there is none."""
    return said(path.read_text(encoding="utf-8"), path.suffix) if path.exists() else None


def in_step(path: Path) -> bool:
    """Whether both sides of `path` say the same; a file without another side is in step."""
    sides = [says(path.with_suffix(suffix)) for suffix in FORMATS]
    return None in sides or sides[0] == sides[1]


def newer(path: Path, root: Path, noted: str | None) -> Path:
    """Of two sides out of step, the one that was edited.

    Raises
    ------
    ValueError
        Unless exactly one was, since they were in step (`noted`) or committed.
    """
    sides = [path.with_suffix(suffix) for suffix in FORMATS]
    known = {noted, *(_committed(side, root) for side in sides)} - {None}
    edited = [side for side in sides if says(side) not in known]
    if len(edited) != 1:
        text, notebook = (side.relative_to(root).as_posix() for side in sides)
        raise ValueError(
            f"{text} and {notebook} differ, and each may hold text that the other lacks: nothing "
            f"was written. To keep the first, `jupytext --update --to ipynb {text}`; the second, "
            f"`jupytext --to md:myst {notebook}`"
        )
    return edited[0]


def sync(paths: list[Path], root: Path = ROOT) -> list[str]:
    """Bring each pair into step; return what was refused, one message a pair."""
    notes, refused, noted = root / NOTES, [], {}
    with contextlib.suppress(OSError, ValueError):  # without notes git knows
        noted = json.loads(notes.read_text(encoding="utf-8"))
    for path in sorted({path.resolve().with_suffix(".md") for path in paths}):
        name = path.relative_to(root).as_posix()
        try:
            sides = [side for suffix in FORMATS if (side := path.with_suffix(suffix)).exists()]
            if not sides:
                raise ValueError(f"{name} is not there, nor a notebook of that name")
            if len(sides) == 1 or not in_step(path):
                winner = sides[0] if len(sides) == 1 else newer(path, root, noted.get(name))
                for side in sides:  # jupytext takes the later
                    os.utime(side, (time.time() - 10 * (side != winner),) * 2)
                command = [sys.executable, "-m", "jupytext", "--quiet", "--sync", str(winner)]
                subprocess.run(command, check=True, cwd=root)
            noted[name] = says(path)
        except (ValueError, subprocess.CalledProcessError) as error:
            refused.append(str(error))
    notes.parent.mkdir(exist_ok=True)
    written = notes.with_suffix(".tmp")
    written.write_text(json.dumps(noted, indent=1), encoding="utf-8")
    written.replace(notes)
    return refused


def _committed(side: Path, root: Path) -> str | None:
    command = ["git", "show", f"HEAD:./{side.relative_to(root).as_posix()}"]
    shown = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8")
    return said(shown.stdout, side.suffix) if shown.returncode == 0 else None


def every(root: Path) -> list[Path]:
    """A side of each pair of the book."""
    return [*(root / "chapters").glob("*.md"), *(root / "book").glob("*.ipynb")]


if __name__ == "__main__":
    sys.exit("\n".join(sync([Path(name) for name in sys.argv[1:]] or every(ROOT))) or None)
