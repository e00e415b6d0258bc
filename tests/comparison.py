"""What nbval leaves out of a comparison: stderr is no result, and drawings differ by machine."""

import pytest


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "image/svg+xml")
