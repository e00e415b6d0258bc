"""What a chapter shows besides tables: our own source, sentences with numbers, stored figures."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from defenses.results import chapters_folder


class Prose(str):
    """Markdown that a notebook renders and a plain script prints as it is."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


@dataclass
class Picture:
    """A stored figure: `results/figures/CHAPTER-NAME.png`, as `Run.keep` wrote it."""

    chapter: str
    name: str

    def _repr_png_(self) -> bytes:
        figures = chapters_folder(self.chapter) / "results" / "figures"
        return (figures / f"{self.chapter}-{self.name}.png").read_bytes()


def source(*functions: Callable) -> Prose:
    """The code of ``functions`` as it runs, without docstrings, to stand beside its equation."""
    return Prose("```python\n" + "\n\n".join(map(_without_docstring, functions)) + "\n```")


def _without_docstring(function: Callable) -> str:
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    body = ast.parse("\n".join(lines)).body[0].body  # type: ignore[attr-defined]
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines).strip()
