"""How often the host asks the device: a step of each attack and objective, and a call besides.

Counted on a simulated accelerator, since a number of questions is the same on every machine.
"""

from typing import Any

import pytest

from tests import accelerator
from tests.benchmarks.test_training_speed import Note
from tests.benchmarks.turns import kept
from tests.test_accelerator import AT_MOST, BATCH, DEVICE, DROPS, costs


@pytest.mark.skipif(
    DEVICE != accelerator.NAME or not accelerator.AVAILABLE,
    reason="only the simulated device counts",
)
def test_a_step_asks_the_host_as_little_as_it_can(note: Note) -> None:
    with accelerator.simulated():
        found = costs()
    how: dict[str, Any] = {"protocol": "quick", "dataset": "random", "n": BATCH, "seconds": 0}
    how |= {"device": "simulated"}
    for name, (step, call) in found.items():
        column = "training" if name.startswith("training: ") else "attacks"
        row = name.removeprefix("training: ")
        numbers = {"a step": step, "a call": call}
        note([kept("synchronizations", column, row, k, v, **how) for k, v in numbers.items()])
    for name, (step, _) in found.items():
        at_most = 0 if name.startswith("training: ") else AT_MOST.get(name, 1)
        assert step <= at_most or name == f"training: {DROPS}", name
