"""One bar with the time that is left: for whoever looks on, and for nobody else."""

import io
import sys
import types
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
import torch
from torch import Tensor, nn

from defenses import attacks, progress
from defenses.data import ImageData
from defenses.evaluation import evaluate, perturbations
from defenses.progress import Bar, one_bar, say, track
from defenses.training import fit

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0, 1])
DATA = ImageData("random", (255 * X).byte(), Y, (255 * X).byte(), Y, tuple("abcd"))
PGD = partial(attacks.pgd, eps=0.1, step_size=0.05, steps=3, early_stop=False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Somebody looks on, who sees every step at once."""
    screen = Terminal()
    modules = {name: module for name, module in sys.modules.items() if name != "ipykernel"}
    seen_there = types.SimpleNamespace(stderr=screen, modules=modules)  # pytest has sys.stderr
    monkeypatch.setattr(progress, "sys", seen_there)
    monkeypatch.setattr(progress, "PATIENCE", 0)
    monkeypatch.setattr(progress, "INTERVAL", 0)
    return screen


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What the bars stand beside and where they are, step by step."""
    seen: list[tuple[str, float]] = []
    monkeypatch.setattr(Bar, "move", lambda bar, at: seen.append((bar.name, at)))
    return seen


def test_each_loop_moves_the_bar_by_its_share(moves: list[tuple[str, float]]) -> None:
    @one_bar
    def work() -> None:
        for k in track(range(2), [1, 3]):
            say(f"part {k}")
            for _ in track(range(2), 2):
                pass

    work()
    assert moves == [
        ("part 0", 0.125), ("part 0", 0.25), ("part 0", 0.25),
        ("part 1", 0.625), ("part 1", 1.0), ("part 1", 1.0),
    ]  # fmt: skip


def test_a_loop_that_ends_early_leaves_the_next_one_its_place(
    moves: list[tuple[str, float]],
) -> None:
    @one_bar
    def work() -> None:
        for _ in track(range(2), 2):
            for _ in track(range(100), 100):
                break

    work()
    assert [at for _, at in moves] == [0.5, 1.0]


def test_no_item_is_lost_whatever_the_parts_say() -> None:
    assert one_bar(lambda: [*track(range(5), 3)])() == [0, 1, 2, 3, 4]
    assert one_bar(lambda: [*track(range(3), [0, 0])])() == [0, 1, 2]
    items = [1, 2]
    assert track(items, 2) is items  # no bar, no detour


def test_a_training_is_one_bar_from_the_first_epoch_to_the_last(
    moves: list[tuple[str, float]],
) -> None:
    fit(network(), DATA, epochs=2, batch_size=2)
    at = [at for _, at in moves]
    assert at == sorted(at) and at[-1] == 1 and at[:3] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert [*dict.fromkeys(name for name, _ in moves)] == ["epoch 1/2", "epoch 2/2"]


def test_what_a_resumed_training_has_left_is_the_whole_bar(
    moves: list[tuple[str, float]], tmp_path: Path
) -> None:
    for epochs in (1, 3):
        moves.clear()
        fit(network(), DATA, epochs=epochs, batch_size=6, checkpoint=tmp_path / "a.pt")
    assert [at for _, at in moves] == pytest.approx([0.5, 0.5, 1, 1])
    assert moves[0][0] == "epoch 2/3"


def test_an_attack_on_a_split_moves_with_its_steps(moves: list[tuple[str, float]]) -> None:
    evaluate(network(), DATA.test, PGD, batch_size=3)
    at = [at for _, at in moves]
    assert at == sorted(at) and at[-1] == 1 and len({*at}) >= 6
    assert {name for name, _ in moves} == {"pgd"}


def test_autoattack_says_its_stage_and_how_many_images_are_left(
    moves: list[tuple[str, float]],
) -> None:
    evaluate(network(), DATA.test, partial(attacks.autoattack, eps=0.01))
    names = [*dict.fromkeys(name for name, _ in moves)][:5]
    stages = ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [name.split(",")[0] for name in names] == ["AutoAttack"] * 5
    assert [name.split()[1] for name in names] == stages
    assert names[0].endswith("on 6 of 6 images") and "of 6 images" in names[-1]
    at = [at for _, at in moves]
    assert all(b > a - 1e-9 for a, b in pairwise(at)) and at[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    "attack",
    [
        partial(attacks.deepfool, steps=2),
        partial(attacks.carlini_wagner, steps=3, binary_search_steps=2),
        partial(attacks.jsma, theta=1.0, gamma=0.3),
        partial(attacks.fab, steps=2),
        partial(attacks.fmn, steps=2),
        partial(attacks.square, eps=0.1, queries=5, seed=0),
    ],
    ids=lambda attack: attack.func.__name__,
)
def test_the_bar_changes_nothing(
    attack: Any, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = perturbations(network(), DATA.test, attack)
    assert "left" in terminal.getvalue()
    monkeypatch.undo()
    unseen = perturbations(network(), DATA.test, attack)
    for name in ("l2", "linf", "fooled"):
        assert torch.equal(getattr(seen, name), getattr(unseen, name))


def test_there_is_one_line_and_it_is_gone_in_the_end(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    line = progress.Line

    def noted(**how: Any) -> Any:
        made.append(line(**how))
        return made[-1]

    monkeypatch.setattr(progress, "Line", noted)
    how = {"probe": lambda model: {"right": float(evaluate(model, DATA.test, PGD))}}
    fit(network(), DATA, epochs=2, batch_size=2, **how)  # type: ignore[arg-type]
    shown = terminal.getvalue()
    assert len(made) == 1 and "epoch 2/2: 100%" in shown and " left" in shown
    assert "\n" not in shown and shown.rpartition("\r")[0].rpartition("\r")[2].strip() == ""


@pytest.mark.parametrize("how", ["nobody", "not asked for", "soon over"])
def test_nothing_is_drawn(how: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "nobody":
        monkeypatch.setattr(Terminal, "isatty", lambda screen: False)
    if how == "soon over":
        monkeypatch.setattr(progress, "PATIENCE", 60)
    probe = {"probe": lambda model: {"right": float(evaluate(model, DATA.test, PGD))}}
    fit(network(), DATA, epochs=1, progress=how != "not asked for", **probe)  # type: ignore[arg-type]
    assert terminal.getvalue() == ""


def test_after_a_failure_the_next_bar_is_a_new_one(terminal: Terminal) -> None:
    def fails(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(network(), DATA.test, fails)
    assert progress._OPEN.get() is None
    evaluate(network(), DATA.test, PGD)
    assert "pgd: 100%" in terminal.getvalue()


def test_a_notebook_is_watched_where_it_is_open_and_not_where_it_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not progress.watched()  # papermill, nbconvert, nbval
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert progress.watched()
    monkeypatch.delenv("JPY_SESSION_NAME")
    with monkeypatch.context() as vscode:
        vscode.setattr(sys.modules["__main__"], "__vsc_ipynb_file__", "a.ipynb", raising=False)
        assert progress.watched()
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    assert progress.watched()
    monkeypatch.setenv("RANK", "1")  # torchrun's
    assert not progress.watched()


CELL = """
from functools import partial
from itertools import pairwise
import defenses
from defenses import progress
progress.PATIENCE = progress.INTERVAL = 0
data, model = defenses.load_data("digits"), defenses.models.mnist_fast()
defenses.fit(model, data, epochs=1)
attack = partial(defenses.attacks.pgd, eps=0.1, step_size=0.05, steps=2)
print(defenses.evaluate(model, data.test, attack).n)
"""


@pytest.mark.slow
@pytest.mark.parametrize("open_in_jupyter", [False, True])
def test_a_bar_is_drawn_only_for_whoever_looks_and_leaves_nothing_stored(
    open_in_jupyter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if open_in_jupyter:
        monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(CELL)]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}),
        tmp_path / "a.ipynb",
    )
    done = papermill.execute_notebook(tmp_path / "a.ipynb", None, progress_bar=False)
    outputs = {out.get("name"): out.text for out in done.cells[0].outputs}
    assert outputs["stdout"] == "360\n"
    assert ("stderr" in outputs) == open_in_jupyter
    assert outputs.get("stderr", "").strip() == ""  # drawn, and gone in the end
