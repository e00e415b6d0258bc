"""A run of a chapter: its parameters, what it notes, and how it goes on from what it has kept."""

import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import papermill
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn

from defenses import attacks, outcomes
from defenses import run as runs
from defenses.checkpoint import save
from defenses.evaluation import Accuracy, Robustness, Share, evaluate, median_size
from defenses.results import COLUMNS
from defenses.run import OnDemand, Run, _file_name, read_rows
from tests.measurements import CHAPTER

RIGHT = Accuracy(torch.tensor([True, True, True, False]), "0a1b2c3d")
PLACE = ("table1", "SM", "mnist fgsm 0.3")


def a_run(folder: Path | str = "", **changed: Any) -> Run:
    how: dict[str, Any] = {"device": "cpu", "seed": 3, "results": str(folder)} | changed
    return Run(CHAPTER, **how)


# Its parameters


def test_what_is_not_given_is_filled_in() -> None:
    run = Run(CHAPTER)
    assert (run.protocol, run.dataset, run.full) == ("quick", "digits", False)
    assert run.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (Run(CHAPTER, "short").dataset, Run(CHAPTER, "short").full) == ("mnist", True)
    assert Run(CHAPTER, dataset="imagefolder:cats").dataset == "imagefolder:cats"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"protocol": "long"}, "one of paper, short, quick"),
        ({"protocol": 3}, "must be text"),
        ({"dataset": "mnits"}, "one of digits, mnist"),
        ({"dataset": "imagefolder:"}, "one of digits"),
        ({"device": "gpu"}, "expected cpu, cuda"),
        ({"device": "cuda:99"}, "is not there.*take cpu"),
        ({"seed": 7.5}, "whole number"),
        ({"seed": "7"}, "papermill's -r gives text"),
        ({"seed": True}, "whole number"),
        ({"results": False}, "must be text"),
        ({"results": "/proc/nothing"}, "cannot be made"),
        ({"only": None}, "must be text"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(CHAPTER, **wrong)


PARAMETERS = """protocol: str = "quick"  # how much
seed: int = 0  # of all
results: str = ""  # where"""


@pytest.mark.parametrize(("given", "unknown"), [("seed", ""), ("protcol", "protcol")])
def test_a_name_that_papermill_was_given_and_no_parameter_has_is_refused(
    given: str, unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = ["", "import torch", PARAMETERS, f"# Parameters\n{given} = 7\n", "run = Run(...)"]
    monkeypatch.setattr(sys.modules["__main__"], "In", cells, raising=False)
    if not unknown:
        Run(CHAPTER)
        return
    with pytest.raises(ValueError, match=r"no parameter is called protcol: .* protocol, results"):
        Run(CHAPTER)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"protcol": "short"}, {"seed": "seven"}, {"device": "gpu"}])
def test_papermill_stops_before_any_work(given: dict[str, Any], tmp_path: Path) -> None:
    """As a reader calls it: an unknown name is not merely said in passing."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    call = f"from defenses.run import Run\nRun({CHAPTER!r}, protocol, '', device, seed, results)"
    sources = {PARAMETERS + '\ndevice: str = ""  # where': ["parameters"], call: [], "1 / 0": []}
    cells = [nbformat.v4.new_code_cell(s, metadata={"tags": t}) for s, t in sources.items()]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "a.ipynb")
    expected = {"protcol": "no parameter is called", "seed": "whole", "device": "expected cpu"}
    with pytest.raises(papermill.PapermillExecutionError, match=expected[next(iter(given))]):
        papermill.execute_notebook(tmp_path / "a.ipynb", None, given, progress_bar=False)
    papermill.execute_notebook(tmp_path / "a.ipynb", None, {"seed": 3}, prepare_only=True)


def test_on_colab_a_run_keeps_to_a_drive_that_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "DRIVE", tmp_path)
    assert Run(CHAPTER).results == ""  # elsewhere a folder of that name is just a folder
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    run = Run(CHAPTER)
    assert run.results == str(tmp_path / "does-it-hold") and run.own
    assert Run(CHAPTER, results=str(tmp_path / "mine")).results == str(tmp_path / "mine")
    monkeypatch.setattr(runs, "DRIVE", tmp_path / "not mounted")
    assert Run(CHAPTER).results == "" and not (tmp_path / "not mounted").exists()


def test_only_one_network_is_worked_on_and_all_are_known() -> None:
    run = a_run(only="CCN")
    assert run.networks(["SM", "CCN"]) == ["CCN"] and run.networks(["LS"]) == []
    assert not run.takes("transfer") and run.takes("CCN")
    assert run.known == ["SM", "CCN", "LS", "transfer"]
    assert a_run().networks(("SM", "CCN")) == ["SM", "CCN"] and a_run().takes("transfer")


def test_networks_are_made_when_first_asked_for() -> None:
    made: list[str] = []

    def train(name: str) -> str:
        made.append(name)
        return name.lower()

    trained = OnDemand(train)
    assert not made and trained["SM"] == "sm" and trained["SM"] == "sm" and made == ["SM"]


# What it notes


def test_a_run_notes_percentages_and_ratios_with_their_intervals(tmp_path: Path) -> None:
    run = a_run()
    assert run.note(*PLACE, RIGHT) is RIGHT
    run.note("table3", "SM", "mnist deepfool", Robustness(0.2, (0.1, 0.3), 9, 1), "robustness")
    first, second = run.rows
    assert list(first) == COLUMNS
    assert (first["value"], first["n"], first["metric"]) == (75.0, 4, "accuracy")
    assert (first["ci_low"], first["ci_high"]) == pytest.approx([100 * b for b in RIGHT.ci])
    assert (first["images"], first["seed"]) == ("0a1b2c3d", "3")
    assert (second["value"], second["ci_low"], second["n"]) == (0.2, 0.1, 9)
    assert not [*tmp_path.iterdir()]


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def measured() -> Accuracy:
        asked.append("")
        return RIGHT

    for _ in range(3):
        found = a_run(tmp_path).note(*PLACE, measured)
        assert torch.equal(found.correct, RIGHT.correct) and found.images == RIGHT.images
    assert len(asked) == 1
    for other in ({"seed": 4}, {"protocol": "short"}, {"only": "SM"}, {"dataset": "mnist"}):
        a_run(tmp_path, **other).note(*PLACE, measured)
    assert len(asked) == 5
    a_run(tmp_path).note("table1", "SM", "mnist fgsm 0.4", measured)
    assert len(asked) == 6


# What a kill costs


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()


X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = linear()(X).argmax(dim=1)


class Killed(Exception):
    """In place of a signal, which would end the tests."""


def stages(monkeypatch: pytest.MonkeyPatch, kill_before: int) -> list[str]:
    """The parts of AutoAttack as they are run; before one of them, all is over."""
    done: list[str] = []
    module: Any = sys.modules["defenses.attacks.autoattack"]  # not the function of that name
    attack = module._attack

    def noted(name: str, *rest: Any) -> Any:
        if len(done) == kill_before:
            raise Killed
        done.append(name)
        return attack(name, *rest)

    monkeypatch.setattr(module, "_attack", noted)
    return done


def test_a_killed_autoattack_goes_on_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for budget, few in {"STEPS": 5, "QUERIES": 50}.items():
        monkeypatch.setattr(sys.modules["defenses.attacks.autoattack"], budget, few)
    model, whole = linear(), partial(attacks.autoattack, eps=0.02)
    measured = partial(evaluate, model, (X, Y), whole, batch_size=3)
    at_once = measured()
    with monkeypatch.context() as killed:
        done = stages(killed, kill_before=7)
        with pytest.raises(Killed):
            a_run(tmp_path).note(*PLACE, measured)
    assert len(done) == 7 and not a_run(tmp_path)._stored
    with monkeypatch.context() as again:
        done = stages(again, kill_before=4)
        found = a_run(tmp_path).note(*PLACE, measured)
    assert done == ["apgd-t", "fab-t", "square"]  # of the second batch
    assert torch.equal(found.correct, at_once.correct)


def test_files_of_an_attack_that_is_over_make_room_for_the_next(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for e in (0.01, 0.02):
        whole = partial(attacks.autoattack, eps=e, version="rand")
        run.note("t", "SM", str(e), partial(evaluate, linear(), (X, Y), whole, batch_size=3))
        assert len([*tmp_path.rglob("autoattack_report-*.pt")]) == 2  # one a batch, of this size
    run.note("t", "SM", "clean", partial(evaluate, linear(), (X, Y)))
    assert len([*tmp_path.rglob("autoattack_report-*.pt")]) == 2
    evaluate(linear(), (X, Y), whole)  # by itself it keeps nothing
    assert len([*tmp_path.rglob("autoattack_report-*.pt")]) == 2


class Counted(nn.Module):
    """As the chapters count passes: to go on from a file would leave some out."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.passes = linear(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += len(x)
        return self.model(x)


def test_passes_that_are_counted_are_all_counted(tmp_path: Path) -> None:
    passes: list[int] = []
    for _ in range(2):
        counted, run = Counted().eval(), a_run(tmp_path / str(len(passes)))
        whole = partial(attacks.autoattack, eps=0.02, version="rand")
        for table in ("one", "two"):  # in a second row of the same run
            run.note(table, *PLACE[1:], partial(evaluate, counted, (X, Y), whole))
        passes.append(counted.passes)
    assert passes[0] == passes[1] > 100 and not [*tmp_path.rglob("*.pt")]


def trained_for(file: Path, *seconds: float) -> None:
    save(file, {"run": {}, "history": [{"epoch": 1, "seconds": s} for s in seconds]})


def test_the_seconds_of_a_training_survive_its_resumption(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    file = run.checkpoint("SM")
    assert file is not None
    trained_for(file, 100.0)  # in an earlier process, which no row has noted
    run = a_run(tmp_path)
    assert run.checkpoint("SM") == file
    trained_for(file, 100.0, 50.0)
    run._last -= 50  # which have passed meanwhile
    run.note("t", "SM", "a", lambda: RIGHT)
    run.note("t", "SM", "b", lambda: RIGHT)
    first, second = (row["seconds"] for row in run.rows)
    assert first == pytest.approx(150, abs=5) and 0 <= second < 5
    again = a_run(tmp_path)
    again.checkpoint("SM")
    again.note("t", "SM", "a", lambda: pytest.fail("measured again"))
    again.note("t", "SM", "c", lambda: RIGHT)  # one more row: the training is in the first
    kept, added = (row["seconds"] for row in again.rows)
    assert kept == first and added < 5


def test_a_row_that_is_there_swallows_no_training(tmp_path: Path) -> None:
    a_run(tmp_path).note("t", "SM", "a", lambda: RIGHT)
    run = a_run(tmp_path)
    file = run.checkpoint("LS")
    assert file is not None
    trained_for(file, 70.0)
    run._last -= 70
    run.note("t", "SM", "a", lambda: pytest.fail("measured again"))
    run.note("t", "LS", "a", lambda: RIGHT)
    assert run.rows[1]["seconds"] == pytest.approx(70, abs=5)


def test_a_network_that_is_only_borrowed_is_paid_for_by_its_own_unit(tmp_path: Path) -> None:
    run = a_run(tmp_path, only="transfer")
    run.networks(["SM"])
    file = run.checkpoint("SM")
    assert file is not None
    trained_for(file, 100.0)  # elsewhere, before
    run.note("t", "SM", "a", lambda: RIGHT)
    assert run.rows[0]["seconds"] < 5


def test_rows_of_other_code_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(tmp_path).note(*PLACE, lambda: RIGHT)
    monkeypatch.setattr("defenses.code.digest", lambda *place: "changed")
    run = a_run(tmp_path)
    run.note(*PLACE, lambda: Accuracy(~RIGHT.correct))
    assert run.rows[0]["value"] == 25 and run.rows[0]["code"] == "changed"
    assert [row["value"] for row in read_rows(run.file)] == [75, 25]


def test_a_line_that_a_kill_has_cut_off_costs_that_line_only(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for column in ("a", "b"):
        run.note("t", "SM", column, lambda: RIGHT)
    whole = run.file.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole), 37):
        run.file.write_bytes(whole[:cut])
        again = a_run(tmp_path)
        again.note("t", "SM", "a", lambda: pytest.fail("measured again"))
        again.note("t", "SM", "b", lambda: RIGHT)
        rows = read_rows(run.file)
        assert [row["column"] for row in rows] == ["a", "b"]
        assert all(outcomes.from_json(row["outcome"]).value == 0.75 for row in rows)


def test_pictures_and_checkpoints_lie_apart_by_what_they_are_of(tmp_path: Path) -> None:
    runs = [a_run(tmp_path), a_run(tmp_path, seed=4), a_run(tmp_path, protocol="short")]
    files = [run.checkpoint("CCN+LS") for run in runs] + [runs[0].checkpoint("CCN LS")]
    assert len({*files}) == 4 and a_run().checkpoint("SM") is None
    figure = Figure()
    assert runs[0].draw("1", lambda: figure) is figure and a_run().keep("1", figure) is figure
    assert a_run(tmp_path, only="SM").draw("2", lambda: figure) is None
    (kept,) = tmp_path.rglob("*.png")
    assert kept.name == f"{CHAPTER}-1.png" and kept.stat().st_size > 0


@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=2, unique=True))
def test_two_names_are_two_files(names: list[str]) -> None:
    first, second = map(_file_name, names)
    assert first != second and not set(first) & set('/\\:*?"<>|')


# What happened to each image


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_right_and_wrong_come_back_image_by_image(right: list[bool]) -> None:
    packed = json.loads(json.dumps(outcomes.to_json(Accuracy(torch.tensor(right), "ab"))))
    found = outcomes.from_json(packed)
    assert isinstance(found, Accuracy)
    assert found.correct.tolist() == right and found.images == "ab"


def test_distances_come_back_as_halves_and_bare_numbers_as_they_were() -> None:
    sizes = torch.tensor([0.5, torch.inf, torch.nan, 1 / 3], dtype=torch.float64)
    found = outcomes.from_json(outcomes.to_json(Robustness(0.4, (0.3, 0.5), 2, 1, sizes, "cd")))
    assert isinstance(found, Robustness) and found.sizes is not None
    assert (found.value, found.ci, found.n, found.unfooled) == (0.4, (0.3, 0.5), 2, 1)
    assert found.sizes.tolist()[:2] == [0.5, torch.inf] and found.sizes[2].isnan()
    assert found.sizes[3] == pytest.approx(1 / 3, rel=1e-3)
    assert outcomes.from_json(outcomes.to_json(Share(0.25, 8))) == Share(0.25, 8)


def test_distances_are_read_by_row_and_only_of_the_same_images(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    run, file = a_run(tmp_path), tmp_path / "results" / f"{CHAPTER}.npz"
    for name, far in {"DDN": [1.0, 2.0, 4.0], "FMN": [3.0, 1.0, torch.inf]}.items():
        run.note("near", name, "l2", median_size(torch.tensor(far)), "median")
    run.note("near", "DDN", "l1", median_size(torch.ones(2)), "median")
    run.note("near", "FMN", "l1", median_size(torch.ones(3)), "median")
    outcomes.store(file, read_rows(run.file))
    where: Any = {"protocol": "quick", "dataset": "digits", "seed": 3, "folder": tmp_path}
    found = outcomes.sizes(CHAPTER, "near", "l2", "median", **where)
    assert {name: far.tolist() for name, far in found.items()} == {
        "DDN": [1, 2, 4],
        "FMN": [3, 1, torch.inf],
    }
    for column in ("l1", "l0"):
        with pytest.raises(ValueError, match=f"near / {column} .*: no distances of the same"):
            outcomes.sizes(CHAPTER, "near", column, "median", **where)


def test_the_outcomes_of_a_chapter_are_one_file_without_pickle(tmp_path: Path) -> None:
    run, file = a_run(tmp_path), tmp_path / "a.npz"
    run.note(*PLACE, lambda: RIGHT)
    run.note("t", "SM", "far", Robustness(1.0, (1.0, 1.0), 1, 0, torch.ones(3)), "mean distance")
    run.note("t", "SM", "bare", Share(0.5, 4))
    outcomes.store(file, read_rows(run.file))
    outcomes.store(file, read_rows(run.file)[:1])  # a second time: it replaces
    found = outcomes.load(file)
    key = (*PLACE, "accuracy", "quick", "digits", "3")
    assert len(found) == 2 and found[key].tolist() == RIGHT.correct.tolist()
    bare = read_rows(run.file)[0] | {"outcome": outcomes.to_json(Share(0.5, 4))}
    outcomes.store(file, [bare])  # of the new row nobody knows which images were right
    assert [*outcomes.load(file)] == [("t", "SM", "far", "mean distance", "quick", "digits", "3")]
    alone = tmp_path / "b.npz"
    outcomes.store(alone, read_rows(run.file)[:1])
    outcomes.store(alone, [bare])  # nor of its only row
    assert outcomes.load(alone) == {} and not alone.exists()
    assert found["t", "SM", "far", "mean distance", "quick", "digits", "3"].tolist() == [1, 1, 1]
    with np.load(file, allow_pickle=False) as content:
        assert set(content) == {"names", "lengths", "is_bits", "bits", "sizes"}
    assert outcomes.load(tmp_path / "nothing.npz") == {}
