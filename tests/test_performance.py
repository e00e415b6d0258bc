"""The page of benchmarks says what its store says, and no more; what goes there is judged right."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor, nn

from defenses.results import record
from tests.benchmarks.turns import Contest, Standing, Victim

ROOT = Path(__file__).resolve().parent.parent


def standing(seconds: float, size: list[float], passes: float = 1.0) -> Standing:
    """An attack that fooled an image where it moved it."""
    return Standing([seconds], passes, torch.tensor(size) > 0, torch.tensor(size))


def contest(**theirs: Any) -> Contest:
    attacks = {name: same for name in theirs}
    return Contest("C&W", {"ours": same}, attacks, at_most=0.5, gradients=200, distance="l2")


def same(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x


X, Y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
VICTIM = Victim("undefended", nn.Sequential(nn.Flatten()), X, Y, 0.3, "mnist", "short")


# Equal strength


def test_size_is_compared_where_both_fooled() -> None:
    ours, theirs = standing(1, [1.0, 2.0, 9.0, 0.0]), standing(1, [2.0, 4.0, 0.0, 5.0])
    assert ours.beside(theirs) == pytest.approx(0.5)
    assert ours.mean_size == pytest.approx(4.0)
    assert ours.left == pytest.approx(0.25)


def test_an_attack_is_weaker_if_it_leaves_more_or_moves_farther() -> None:
    ours = standing(1, [1.0] * 100)
    assert ours.no_weaker_than(standing(1, [0.995] * 100), minimal=True)
    assert not ours.no_weaker_than(standing(1, [0.98] * 100), minimal=True)
    assert ours.no_weaker_than(standing(1, [0.98] * 100), minimal=False)
    assert standing(1, [1.0] * 97 + [0.0] * 3).no_weaker_than(ours, minimal=True)  # noise
    assert not standing(1, [1.0] * 95 + [0.0] * 5).no_weaker_than(ours, minimal=True)


def test_the_ratio_is_to_the_fastest_peer_as_it_comes() -> None:
    table = {"ours": standing(1, [1.0]), "A": standing(4, [1.0]), "A, bf16": standing(1, [1.0])}
    table |= {"B": standing(3, [0.0])}
    game = contest(**{name: None for name in table if name != "ours"})
    assert game.ratio(table) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("ours", "message"), [((3, [1.0] * 4), "at most 0.5"), ((1, [1.0, 0.0] * 2), "weaker")]
)
def test_too_slow_or_too_weak_fails(ours: tuple[float, list[float]], message: str) -> None:
    seconds, size = ours
    table = {"ours": standing(seconds, size * 25), "A": standing(4, [1.0] * 100)}
    with pytest.raises(AssertionError, match=message):
        contest(A=None).check(table)


def test_passes_are_counted_in_images_and_the_judgment_is_the_labels() -> None:
    """Two looks at four images, one at a half of them; three of four are then not class 0."""

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model(x), model.get_submodule("0")(x), model(x[:2])  # ART calls the layers itself
        return torch.eye(4).view(4, 1, 2, 2)

    found = Standing()
    contest()._time(attack, VICTIM, found)
    assert found.passes == 2.5
    assert found.fooled.tolist() == [False, True, True, True]
    torch.testing.assert_close(found.size, (torch.eye(4) - X.flatten(1)).norm(dim=1))


# The page


def page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's code defines, where `folder` holds the store."""
    (folder / "book").mkdir()
    (folder / "chapters" / "paper").mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder / "book")
    names: dict[str, Any] = {}
    for cell in nbformat.read(ROOT / "book" / "performance.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    return names


def test_page_says_that_nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = page(tmp_path, monkeypatch)
    assert names["found"] is names["NOTHING"]
    assert "make bench" in names["NOTHING"]


@pytest.mark.parametrize(
    ("seconds", "size", "verdict"),
    [(1.0, 1.0, "met"), (3.0, 1.0, "missed"), (1.0, 1.1, "weaker than a peer")],
)
def test_page_tells_met_from_missed_and_from_weaker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, size: float, verdict: str
) -> None:
    table = {"limit": Standing([0.5]), "limit, bf16": Standing([0.2])}
    table |= {"A": standing(4, [1.0] * 4), "ours": standing(seconds, [size] * 4)}
    record("performance", contest(A=None).rows(table, VICTIM), folder=tmp_path / "chapters")
    verdicts = page(tmp_path, monkeypatch)["verdicts"]
    row = verdicts.loc[("cpu" if not torch.cuda.is_available() else "cuda", "C&W, undefended")]
    assert row["verdict"] == verdict
    assert row["fastest peer"] == "A"
    assert row["limit"] == 0.5


def test_page_leaves_out_a_peer_of_an_older_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"limit": Standing([0.5]), "limit, bf16": Standing([0.2])}
    table |= {"A": standing(4, [1.0] * 4), "ours": standing(1, [1.0] * 4)}
    old = contest(A=None, B=None).rows(table | {"B": standing(0.1, [1.0] * 4)}, VICTIM)
    old = [row | {"date": "2020-01-01"} for row in old]
    record("performance", old, folder=tmp_path / "chapters")
    record("performance", contest(A=None).rows(table, VICTIM), folder=tmp_path / "chapters")
    (row,) = page(tmp_path, monkeypatch)["verdicts"].to_dict("records")
    assert (row["fastest peer"], row["verdict"]) == ("A", "met")
