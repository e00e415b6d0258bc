"""The campaign: units of a chapter that are planned, run, killed, run again and merged."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from book import campaign
from defenses import code, outcomes
from defenses.results import KEY
from defenses.run import Run, read_rows

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = "toy"
SOURCES = [
    (
        "import torch\n"
        "from defenses import attacks, models, training\n"
        "from defenses.data import load_data\n"
        "from defenses.evaluation import evaluate, transfer_matrix\n"
        "from defenses.run import OnDemand, Run",
        [],
    ),
    (
        "protocol: str = 'quick'  # how much\ndataset: str = ''  # which\n"
        "device: str = ''  # where\ndata_root: str = ''  # a folder\nseed: int = 0  # of all\n"
        "results: str = ''  # a folder\nonly: str = ''  # one",
        ["parameters"],
    ),
    (
        "run = Run('toy', protocol, dataset, device, seed, results, only)\n"
        "data = load_data(run.dataset)\nfew = (data.test_images[:40], data.test_labels[:40])",
        [],
    ),
    (
        "def train(name):\n"
        "    torch.manual_seed(seed)\n"
        "    model = models.mnist_compact(narrow=8, compact={'SM': [], 'L2SM': 'fc3'}[name])\n"
        "    how = {'checkpoint': run.checkpoint(name), 'seed': seed, 'progress': False}\n"
        "    training.fit(model, data, epochs=4, **how)\n"
        "    return model\n\n\n"
        "trained = OnDemand(train)",
        [],
    ),
    (
        "for name in run.networks(['SM', 'L2SM']):\n"
        "    run.note('table1', name, 'mnist fgsm 0', lambda n=name: evaluate(trained[n], few))\n"
        "    for e in (0.1, 0.2, 0.3):\n"
        "        def under(n=name, e=e):\n"
        "            attack = lambda *to: attacks.pgd(*to, eps=e, step_size=e/5, steps=9, seed=0)\n"
        "            return evaluate(trained[n], few, attack)\n"
        "        run.note('table1', name, f'mnist fgsm {e}', under)",
        [],
    ),
    (
        "if run.takes('transfer'):\n"
        "    both = {n: trained[n] for n in ('SM', 'L2SM')}\n"
        "    step = lambda *to: attacks.fgsm(*to, eps=0.1)\n"
        "    for (a, b), found in transfer_matrix(both, few, step).items():\n"
        "        run.note('table7', a, f'mnist crafted on {b}', found)",
        [],
    ),
    ("raise RuntimeError('a cell that only shows')", ["nbval-check-output"]),
    ('Picture(CHAPTER, "1")\nPicture(CHAPTER, "1-cifar10")', ["remove-input"]),
]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A little chapter with its paper's numbers; the campaign works on it and on nothing else."""
    chapters = tmp_path / "chapters"
    (chapters / "paper").mkdir(parents=True)
    (chapters / "results").mkdir()
    paper = (ROOT / "chapters" / "paper" / "compact_convolution.csv").read_text()
    (chapters / "paper" / f"{CHAPTER}.csv").write_text(paper)
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in SOURCES]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), chapters / f"{CHAPTER}.ipynb")
    monkeypatch.setattr(campaign, "CHAPTERS", chapters)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    yield tmp_path


def unit(name: str, seed: int = 0) -> campaign.Unit:
    return campaign.Unit(CHAPTER, "digits", "quick", seed, name)


def numbers(file: Path) -> list[Any]:
    """What a run has measured, without what differs from one day to the next."""
    loose = ("seconds", "trained", "date", "commit", "device")
    rows = {tuple(row[k] for k in KEY): row for row in read_rows(file)}
    return [{k: v for k, v in row.items() if k not in loose} for row in rows.values()]


def test_a_plan_names_the_units_with_their_cost_and_trains_nothing(toy: Path) -> None:
    todo = campaign.plan([CHAPTER], toy / "runs", dataset="", protocol="quick", seeds=[0, 1])
    assert [(u.only, u.seed) for u in todo["unit"]][:2] == [("SM", 0), ("SM", 1)]
    assert {u.only for u in todo["unit"]} == {"SM", "L2SM", "transfer"}
    assert (todo["unit"].iloc[-1]).only == "transfer"  # it needs the others
    # 4 epochs of 1,437 images; a step is three times a forward pass of at least 0.2 MFLOP
    flops = dict(zip([u.only for u in todo["unit"]], todo["flops"], strict=True))
    assert flops["SM"] > 4 * 1437 * 3 * 2e5 and flops["transfer"] == 0
    assert not [*toy.rglob("*.pt"), *toy.rglob("*.jsonl"), *toy.rglob("*.done")]


def test_a_unit_that_is_done_is_not_done_again(toy: Path) -> None:
    results = toy / "runs"
    campaign.do(unit("SM"), results)
    file = unit("SM").run(results).file
    before, stamp = file.read_bytes(), file.stat().st_mtime_ns
    assert unit("SM").is_done(results) and not unit("L2SM").is_done(results)
    assert [row["row"] for row in numbers(file)] == ["SM"] * 4
    shutil.rmtree(results / "checkpoints")  # nothing needs the network any more
    campaign.do(unit("SM"), results)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, stamp)
    assert not (results / "checkpoints").exists()
    todo = campaign.plan([CHAPTER], results, dataset="", protocol="quick", seeds=[0])
    assert {u.only for u in todo["unit"]} == {"L2SM", "transfer"}


@pytest.mark.parametrize(("changed", "files"), [(4, 1), (3, 2)])
def test_what_other_code_has_trained_is_trained_again(
    changed: int, files: int, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of cell 3, which trains; that of cell 4, which measures, leaves the network."""
    results, digest = toy / "runs", code.digest
    campaign.do(unit("SM"), results)
    rows = len((unit("SM").run(results).file).read_text().splitlines())

    def other(file: Path, cell: int | None = None) -> str:
        return digest(file, cell) + "other" * (cell in (changed, 4))

    monkeypatch.setattr(code, "digest", other)
    campaign.do(unit("SM"), results)
    assert len([*results.rglob("*.pt")]) == files
    assert len((unit("SM").run(results).file).read_text().splitlines()) == 2 * rows


CHILD = """
import sys
from pathlib import Path
from book import campaign
campaign.CHAPTERS = Path(sys.argv[1])
campaign.do(campaign.Unit("toy", "digits", "quick", 0, sys.argv[2]), Path(sys.argv[3]))
"""


def child(toy: Path, results: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(toy / "chapters"), "L2SM", str(results)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_rows(toy: Path) -> None:
    whole = toy / "whole"
    start = time.monotonic()
    assert child(toy, whole).wait() == 0
    took = time.monotonic() - start
    results, draw = toy / "killed", random.Random(0)
    for _ in range(5):
        process = child(toy, results)
        time.sleep(draw.uniform(0.3, 1.0) * took)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert child(toy, results).wait() == 0
    file = unit("L2SM").run(whole).file.relative_to(whole)
    assert numbers(whole / file) == numbers(results / file) and len(numbers(whole / file)) == 4
    assert unit("L2SM").is_done(results)
    lines = (results / file).read_text().splitlines()
    assert len(lines) <= 4 + 5  # at most the row under way, once a kill


WAITS = """
import sys, time
from book import campaign
campaign.end_with(int(sys.argv[1]))
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process cannot be asked for")
def test_a_unit_ends_with_the_campaign_that_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    command = [sys.executable, "-c", WAITS, str(parent.pid)]
    unit = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert unit.stdout is not None and unit.stdout.readline() == b"begun\n"
        assert unit.poll() is None
        parent.kill()
        parent.wait()
        assert unit.wait(20) == 1
    finally:
        unit.kill()


def test_units_of_this_machine_and_only_those_follow_their_campaign() -> None:
    here, there = campaign.arguments(["results"]), campaign.arguments(["results"])
    there.executor = "slurm"
    assert f"--parent={os.getpid()}" in campaign._command(unit("SM"), here)
    assert not any("parent" in word for word in campaign._command(unit("SM"), there))


def test_merging_keeps_clean_rows_and_what_happened_to_each_image(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = toy / "runs"
    campaign.do(unit("SM"), results)
    file = unit("SM").run(results).file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for place, row in enumerate(rows):
        row |= {"protocol": "short", "commit": "abc1234" + "-dirty" * (place == 0)}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert campaign.merge(results, [CHAPTER]) == {CHAPTER: 3}
    stored = campaign.pd.read_csv(toy / "chapters" / "results" / f"{CHAPTER}.csv", dtype=str)
    assert sorted(stored["column"]) == [f"mnist fgsm {e}" for e in (0.1, 0.2, 0.3)]
    images = outcomes.load(toy / "chapters" / "results" / f"{CHAPTER}.npz")
    for row in stored.to_dict("records"):
        right = images[tuple(row[name] for name in outcomes.IDENTITY)]
        assert 100 * right.mean() == pytest.approx(float(row["value"])) and len(right) == 40
    at = (CHAPTER, "table1", "SM", "mnist fgsm 0.1")
    where: dict[str, Any] = {"dataset": "digits", "folder": toy / "chapters"}
    (seed, found), *more = outcomes.stored(*at, **where).items()
    assert (seed, found.n, more) == (0, 40, []) and found.images == stored["images"][0]
    assert found.percent == pytest.approx(float(stored.set_index("column")["value"][at[-1]]))
    with pytest.raises(ValueError, match="no image by image outcome"):
        outcomes.stored(*at, protocol="paper", **where)
    frame = campaign.status([CHAPTER]).set_index("table")
    assert frame.loc[
        "table1", ["cells", "filled", "seeds", "rows", "changed", "dirty"]
    ].tolist() == [60, 3, 1, 3, 0, 0]
    assert frame.loc["table2", "filled"] == 0
    monkeypatch.setattr(code, "digest", lambda *place: "other")
    assert campaign.status([CHAPTER]).set_index("table").loc["table1", "changed"] == 3
    assert campaign.merge(results, [CHAPTER]) == {CHAPTER: 0}
    file = toy / "chapters" / "results" / f"{CHAPTER}.csv"
    stored.assign(date="2020-01-01").to_csv(file, index=False)  # of changed code, but newer
    assert campaign.merge(results, [CHAPTER]) == {CHAPTER: 3}


def test_no_quick_run_replaces_a_picture_of_mnist(toy: Path) -> None:
    """Pictures are carried over from `short` and `paper`, the better one last."""
    stored = toy / "chapters" / "results" / "figures"
    stored.mkdir()
    (stored / f"{CHAPTER}-1.png").write_text("stored")
    results = toy / "runs"

    def merged(**how: Any) -> str:
        run = Run(CHAPTER, device="cpu", results=str(results), **how)
        folder = results / "figures" / run._of
        folder.mkdir(parents=True)
        (folder / f"{CHAPTER}-1.png").write_text(run._of)
        campaign.merge(results, [CHAPTER])
        return (stored / f"{CHAPTER}-1.png").read_text()

    assert merged(protocol="quick") == "stored"
    assert merged(protocol="quick", dataset="mnist") == "stored"
    assert merged(protocol="short", dataset="digits") == "stored"
    assert merged(protocol="short", seed=1) == "stored"
    assert merged(protocol="paper") == "mnist-paper-0"
    assert merged(protocol="short") == "mnist-paper-0"
    assert [file.name for file in stored.iterdir()] == [f"{CHAPTER}-1.png"]
    assert merged(protocol="short", dataset="cifar10") == "mnist-paper-0"
    assert merged(protocol="short", dataset="fashion-mnist") == "mnist-paper-0"  # is not shown
    assert sorted(f.name for f in stored.iterdir()) == [
        f"{CHAPTER}-1-cifar10.png",
        f"{CHAPTER}-1.png",
    ]
    assert (stored / f"{CHAPTER}-1-cifar10.png").read_text() == "cifar10-short-0"


def test_changed_code_records_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "commit", lambda: "abc1234-dirty")
    with pytest.raises(SystemExit, match="commit it first"):
        campaign.main(["unit", "SM", "--protocol", "quick", "--results", str(toy / "runs")])
    assert not (toy / "runs").exists()


def test_a_notebook_edited_behind_the_commit_records_nothing(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`commit` leaves notebooks out, whose outputs change; a changed cell is changed code."""
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init"], ["add", "."], ["commit", "-m", "toy"]):
        subprocess.run(["git", *who, *words], cwd=toy, check=True, capture_output=True)
    monkeypatch.setattr(campaign, "commit", lambda: "abc1234")
    notebook = toy / "chapters" / f"{CHAPTER}.ipynb"
    content = nbformat.read(notebook, as_version=4)
    content.cells[0].outputs = [nbformat.v4.new_output("stream", text="run anew")]
    nbformat.write(content, notebook)
    assert campaign.dirty([CHAPTER]) == ""
    content.cells[3].source = content.cells[3].source.replace("epochs=4", "epochs=5")
    nbformat.write(content, notebook)
    assert "commit it first" in campaign.dirty([CHAPTER])


def test_of_two_files_the_row_of_the_code_as_it_is_is_kept(toy: Path) -> None:
    results = toy / "runs"
    campaign.do(unit("SM"), results)
    file = unit("SM").run(results).file
    row = read_rows(file)[0] | {"protocol": "short", "commit": "abc1234"}
    old = row | {"code": "other", "value": 0.0, "date": "2020-01-01"}
    old |= {"ci_low": 0.0, "ci_high": 0.0}
    file.write_text(json.dumps(row) + "\n")
    file.with_name("z.jsonl").write_text(json.dumps(old) + "\n")  # the last by its name
    for _ in range(2):
        campaign.merge(results, [CHAPTER])
        (stored,) = campaign.rows_of(CHAPTER, toy / "chapters")["value"]
        assert float(stored) == pytest.approx(row["value"]) and row["value"] > 0


def test_a_chapter_without_a_row_has_a_status(toy: Path) -> None:
    frame = campaign.status([CHAPTER])
    assert len(frame) > 5 and frame["filled"].sum() == 0


def test_an_unknown_parameter_is_an_error(toy: Path) -> None:
    with pytest.raises(ValueError, match=r"no parameter \['epochs'\]"):
        campaign.execute(toy / "chapters" / f"{CHAPTER}.ipynb", {"epochs": 3})


def test_an_unknown_network_is_an_error_and_not_done(toy: Path) -> None:
    with pytest.raises(ValueError, match=r"toy has no 'sm', .*\['SM', 'L2SM', 'transfer'\]"):
        campaign.do(unit("sm"), toy / "runs")
    assert not [*(toy / "runs").rglob("*.*")]


def test_two_units_take_two_gpus_and_a_dead_one_gives_its_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    hold = "import sys; sys.path.insert(0, {root!r}); import tempfile; import torch\n"
    hold += "tempfile.gettempdir = lambda: {folder!r}; torch.cuda.device_count = lambda: 2\n"
    hold += "from book.campaign import free_gpu\n"
    hold += "with free_gpu() as one: print(one, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold.format(root=str(ROOT), folder=str(tmp_path))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with campaign.free_gpu() as first, subprocess.Popen(command, **pipes) as other:
        assert first == "cuda:0" and other.stdout
        assert other.stdout.readline() == "cuda:1\n"
        other.kill()  # it cannot tidy up
        other.wait()
        with campaign.free_gpu() as second:
            assert second == "cuda:1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with campaign.free_gpu() as none:
        assert none == ""


def test_what_needs_several_networks_waits_for_those_of_its_own_kind() -> None:
    feeds = [unit("SM"), unit("L2SM")]
    assert all(one.feeds(unit("transfer")) for one in feeds)
    assert not unit("transfer").feeds(unit("transfer"))
    assert not unit("SM", seed=1).feeds(unit("transfer"))


def test_two_that_need_several_networks_do_not_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = [unit("SM"), unit("transfer"), unit("figures")]
    plan = pd.DataFrame({"unit": todo, "flops": [1, 0, 0]})
    planned: list[list[str]] = []

    def within(command: list[str], options: Any, elapsed: float) -> None:
        (file,) = tmp_path.glob("plan-*.json")
        planned.extend(job["after"] for job in json.loads(file.read_text()))

    monkeypatch.setattr(campaign, "_within", within)
    campaign.by_snakemake(plan, campaign.arguments(["results", f"--results={tmp_path}"]))
    first = [str(unit("SM").done(tmp_path))]
    assert planned == [[], first, first]


@pytest.mark.parametrize("installed", [True, False])
def test_an_engine_that_cannot_run_is_said_and_not_replaced(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(campaign, "find_spec", lambda name: installed or None)
    with pytest.raises(SystemExit):
        campaign.main(["results", "--executor", "slurm", *["--loop"] * installed])
    assert "--executor is Snakemake's" in capsys.readouterr().err


def test_relative_folders_are_those_of_the_shell() -> None:
    options = campaign.arguments(["results", "--data-root", "data", "--results", "here"])
    assert (options.data_root, options.results) == (
        str(Path("data").resolve()),
        Path("here").resolve(),
    )
    assert campaign.arguments(["results", "--data-root", ""]).data_root == ""
