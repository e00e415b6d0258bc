"""What the notebooks cost is counted, and held below a bound by `test_outputs_repeat`."""

from pathlib import Path

import nbformat
import pytest

from book import execute
from tests import budget
from tests.test_notebooks import NOTEBOOKS, repeats

NETWORK = """
import torch
from torch import nn

x = torch.rand(16, 1, 28, 28)
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5408, 10))
"""
USES = """
net(x).sum().backward()  # forward, and backward as twice that
with torch.no_grad():
    net(x)
"""
FORWARD = 2 * 16 * (26 * 26 * 8 * 9 + 5408 * 10)


def test_every_notebook_has_a_budget() -> None:
    assert budget.GFLOP.keys() == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
def test_a_kernel_counts_its_layers(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (NETWORK, USES)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "network.ipynb")
    execute.main([tmp_path / "network.ipynb"])
    repeats(tmp_path / "network.ipynb", **budget.counting(tmp_path / "count"))
    assert budget.counted(tmp_path / "count") == 4 * FORWARD


def test_a_run_beyond_its_budget_is_caught() -> None:
    for name, bound in budget.GFLOP.items():
        budget.keeps_its_budget(name, int(1e9 * bound))
        with pytest.raises(AssertionError, match=f"{name}: .* the budget is"):
            budget.keeps_its_budget(name, int(1.01e9 * bound) + 1)
