"""The memory of an attack is that of a batch, however many images there are."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.benchmarks.memory import ATTACKS
from tests.benchmarks.turns import DEVICE, ROOT, kept

FEW, MANY = 1_000, 10_000
MIB = 2**20
# Half of what one float32 copy of the other images would take; an allocator's holes take less.
SLACK = (MANY - FEW) * 3 * 32 * 32 * 4 / MIB / 2


def growth(name: str, images: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.memory", name, str(images)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return int(run.stdout) / MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.skipif(DEVICE != "cpu", reason="the peak of a process is that of the processor")
@pytest.mark.parametrize("name", ATTACKS)
def test_ten_times_the_images_need_no_more_memory(
    name: str, note: Callable[[list[dict[str, Any]]], None]
) -> None:
    few, many = growth(name, FEW), growth(name, MANY)
    how: dict[str, Any] = {"protocol": "quick", "dataset": "random 3×32×32", "seconds": 0}
    rows = {f"{FEW:,} images": (few, FEW), f"{MANY:,} images": (many, MANY)}
    note([kept("memory", name, row, "MiB", mib, n=n, **how) for row, (mib, n) in rows.items()])
    assert many <= few + SLACK
    assert many <= 1024
