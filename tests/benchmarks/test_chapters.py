"""What it takes to run a chapter: each says so at its top, from the rows that are noted here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.benchmarks.turns import DEVICE, ROOT, kept

CHAPTERS = sorted(path.stem for path in (ROOT / "chapters").glob("*.ipynb"))
MOST = {"seconds": 120, "GiB": 4}  # a minute on two cores that have nothing else to do

every_chapter = pytest.mark.parametrize("name", CHAPTERS)
Note = Callable[[list[dict[str, Any]]], None]


def costs(*words: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.chapter", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.skipif(DEVICE != "cpu", reason="the peak of a process is that of the processor")
@every_chapter
def test_a_quick_run_takes_a_minute_and_fits_a_small_machine(name: str, note: Note) -> None:
    found = costs(name)
    seconds, gib = found["seconds"], found["bytes"] / 2**30
    how: dict[str, Any] = {"protocol": "quick", "dataset": "digits", "n": 1, "seconds": seconds}
    numbers = {"seconds": seconds, "GiB": gib}
    note([kept("chapter", "quick", name, what, value, **how) for what, value in numbers.items()])
    assert seconds <= MOST["seconds"] and gib <= MOST["GiB"]


@pytest.mark.skipif("DEFENSES_DATA" not in os.environ, reason="a step is counted on real MNIST")
@every_chapter
def test_what_the_paper_asks_for_is_counted(name: str, note: Note) -> None:
    how: dict[str, Any] = {"dataset": "mnist", "n": 1, "seconds": 0}
    tflop = {p: costs(name, p)["operations"] / 1e12 for p in ("short", "paper")}
    note([kept("chapter", p, name, "TFLOP", tflop[p], protocol=p, **how) for p in tflop])
    assert tflop["paper"] >= tflop["short"] > 0
