"""A made-up measurement, for the tests of the store and of the tables."""

from pathlib import Path
from typing import Any

from defenses.results import measure

CHAPTER = "compact_convolution"
PAPER = Path(__file__).parents[1] / "chapters" / "paper"


def row(
    row: str = "SM",
    column: str = "mnist fgsm 0.3",
    value: float = 50.0,
    *,
    table: str = "table1",
    metric: str = "accuracy",
    protocol: str = "quick",
    dataset: str = "digits",
    **changed: Any,
) -> dict[str, Any]:
    how: dict[str, Any] = {"n": 360, "seed": 0, "device": "a toy", "seconds": 1.5} | changed
    return measure(table, row, column, metric, value, protocol=protocol, dataset=dataset, **how)
