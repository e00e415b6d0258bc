"""What the benchmarks measured: printed at the end and, with ``--record``, kept for the book."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest

from defenses.results import record
from tests.benchmarks.turns import ROOT

NOTED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write what was measured to chapters/results/performance.csv"
    parser.addoption("--record", action="store_true", help=text)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[Sequence[dict[str, Any]]], None]:
    """Return a function that notes rows: at once, so that a later failure loses none of them."""

    def noted(rows: Sequence[dict[str, Any]]) -> None:
        request.config.stash.setdefault(NOTED, []).extend(rows)
        if request.config.getoption("--record"):
            record("performance", rows, folder=ROOT / "chapters")

    return noted


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = pd.DataFrame(config.stash.get(NOTED, []))
    for table in rows["table"].unique() if len(rows) else ():
        cells = rows[rows["table"] == table]
        for (column, device), group in cells.groupby(["column", "device"], sort=False):
            wide = group.pivot(index="row", columns="metric", values="value")
            wide = wide.reindex(index=group["row"].unique(), columns=group["metric"].unique())
            terminalreporter.write_line(f"\n{table}: {column}; {device}")
            terminalreporter.write_line(
                wide.rename_axis(index=None, columns=None).to_string(
                    float_format="{:.3f}".format, na_rep=""
                )
            )
