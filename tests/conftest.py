"""What all tests share: steady threads, what nbval leaves out, what a machine lacks."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.measurements import CHAPTER, PAPER


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several xdist workers: one thread each
        torch.set_num_threads(1)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """In nbval runs: what goes to stderr is no result, and drawings differ by machine."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "image/svg+xml")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a folder with the paper's numbers and nothing measured."""
    (tmp_path / "paper").mkdir()
    shutil.copy(PAPER / f"{CHAPTER}.csv", tmp_path / "paper")
    return tmp_path
