"""What all tests share: steady threads, fair shares of work, what a machine lacks."""

import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from defenses.data import batches, load_data, to_float
from tests.measurements import CHAPTER, PAPER

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is no failure
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several xdist workers: one thread each
        torch.set_num_threads(1)


def share(nodeid: str) -> str:
    """What one worker takes on: the tests of a file, or the run of one notebook."""
    return nodeid if "::test_outputs_repeat[" in nodeid else nodeid.split("::")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # the longest first, so that no worker ends alone
        items.sort(key=lambda item: share(item.nodeid) != item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let `--dist loadscope` hand out shares; xdist's own groups are lost on pytest 9.1 and up."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share(nodeid)

    config.option.loadscopereorder = False
    return Shares(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a folder with the paper's numbers and nothing measured."""
    (tmp_path / "paper").mkdir()
    shutil.copy(PAPER / f"{CHAPTER}.csv", tmp_path / "paper")
    return tmp_path


@pytest.fixture(scope="session")
def victim() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network with the first 100 test images that it classifies correctly."""
    data = load_data("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(800, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        order = torch.Generator().manual_seed(0)
        for _ in range(8):
            for x, y in batches(*data.train, 64, order):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    model.eval()
    x, y = to_float(data.test[0]).contiguous(), data.test[1]
    right = (model(x).argmax(dim=1) == y).nonzero().squeeze(1)[:100]
    assert len(right) == 100
    return model, x[right], y[right]
