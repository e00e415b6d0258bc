"""How far a long computation is: one bar with the time that is left.

The outermost call of a function under `one_bar` opens the bar; every loop under `track` inside it,
however deep, moves it, each by its share. It is drawn on stderr, on a terminal or in a notebook at
which somebody looks, once two seconds have passed, and is gone in the end. Nothing here changes a
number or asks a GPU anything, so the digest of the code behind a number leaves it out.
"""

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from tqdm.std import tqdm as StandardBar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

PATIENCE, INTERVAL = 2.0, 0.5  # seconds: until the bar is there, and between two looks at it
FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"


class Line(StandardBar):
    monitor_interval = 0  # no thread of its own


class Bar:
    """A bar from 0 to 1, and the part of it that is under way."""

    def __init__(self, name: str, shown: bool = True) -> None:
        self.name, self.part = name, (0.0, 1.0)
        self.began = time.monotonic()
        self.next = self.began + PATIENCE if shown else float("inf")
        self.line: Line | None = None

    def over(self, items: Iterable[T], parts: int | Sequence[float]) -> Iterator[T]:
        """`items`, of which each takes its share of the part that is under way now."""
        low, high = self.part
        each = itertools.repeat(1, parts) if isinstance(parts, int) else parts
        whole, at = float(parts if isinstance(parts, int) else sum(parts)) or 1.0, low
        weights = itertools.chain(each, itertools.repeat(0))  # should there be more items
        try:
            for item, weight in zip(items, weights, strict=False):
                self.part = at, at + (high - low) * weight / whole
                yield item
                at = self.part[1]
                self.move(at)
        finally:
            self.part = low, high

    def move(self, at: float) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + INTERVAL
        if self.line is None:
            how = {"file": sys.stderr, "leave": False, "bar_format": FORMAT, "smoothing": 0}
            self.line = Line(desc=self.name, total=1.0, **how)
            self.line.start_t -= now - self.began
        self.line.n = min(at, 1.0)
        self.line.set_description(self.name)  # draws it

    def close(self) -> None:
        if self.line is not None:
            self.line.close()


_OPEN: ContextVar[Bar | None] = ContextVar("_OPEN", default=None)


def watched() -> bool:
    """Whether somebody looks on: at a terminal, or at a notebook in Jupyter, VS Code or Colab.

    A notebook that is run for what it stores, by papermill or nbconvert, has nobody; and of several
    processes that work on one thing, the first draws for all.
    """
    if os.environ.get("RANK", "0") != "0":
        return False
    if "ipykernel" not in sys.modules:
        return sys.stderr is not None and sys.stderr.isatty()
    in_editor = hasattr(sys.modules["__main__"], "__vsc_ipynb_file__")
    return "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules or in_editor


def one_bar(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with a bar of its own where none is open; with ``progress=False``, with none."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if (open_ := _OPEN.get()) is not None:
            name = open_.name
            try:
                return function(*args, **kwargs)
            finally:
                open_.name = name
        bar = Bar(function.__name__, bool(kwargs.get("progress", True)) and watched())
        token = _OPEN.set(bar)
        try:
            return function(*args, **kwargs)
        finally:
            _OPEN.reset(token)
            bar.close()

    return call


def track(items: Iterable[T], parts: int | Sequence[float]) -> Iterable[T]:
    """`items`, as many as `parts` says, or each with its weight there, as steps of the open bar."""
    bar = _OPEN.get()
    return items if bar is None else bar.over(items, parts)


def say(what: Any) -> None:
    """What the bar stands beside from now on: a text, or a function by its name."""
    if (bar := _OPEN.get()) is not None:
        what = getattr(what, "func", what)  # of a partial
        bar.name = what if isinstance(what, str) else getattr(what, "__name__", bar.name)


def tqdm(items: Iterable[T], name: str, *, total: int, **_: Any) -> Iterable[T]:
    """In place of tqdm's own: `items` are a part of the bar that is open."""
    say(name)
    return track(items, total)
