"""The store of measured numbers, and the transcription of the paper's."""

import math
import multiprocessing
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from defenses import results
from defenses.evaluation import seed_interval
from defenses.results import (
    COLUMNS,
    KEY,
    best,
    claim,
    coverage,
    printed,
    record,
    value,
)
from tests.measurements import CHAPTER, row

# Added up from the paper's text by another program than the one that wrote the file.
ROW_SUMS = {
    "table1": "SM 516.42 LS 661.35 BReLU 550.70 L2SM 732.79 CCN 801.77 CCN+LS 854.87",
    "table2": "SM 206.22 LS 598.82 BReLU 415.43 L2SM 599.26 CCN 737.83 CCN+LS 847.18",
    "table3": "SM 0.239 LS 0.756 BReLU 0.550 L2SM 0.726 CCN 1.028 CCN+LS 1.452",
    "table4": "SM 826.97 LS 810.92 BReLU 828.81 L2SM 829.18 CCN 867.22 CCN+LS 879.20",
    "table5": "SM 160.7225 LS 218.8651 BReLU 175.8763 L2SM 196.2411 CCN 180.3639 CCN+LS 210.3227",
    "table6": "SM 274.18 LS 271.82 BReLU 296.75 L2SM 275.66 CCN 301.37 CCN+LS 313.65",
    "table7": "SM 410.33 LS 414.28 BReLU 425.84 L2SM 420.41 CCN 464.01 CCN+LS 488.01",
    "table8": "SM 334.88 LS 346.72 BReLU 340.05 L2SM 351.80 CCN 367.11 CCN+LS 367.77",
    "table9": "SM 516.42 BN 474.94 LRN 490.11 CCN 801.77 CCN+LS 854.87",
    "table11": "SM 101.393 LS 101.626 BReLU 101.473 L2SM 101.453 CCN 101.449 CCN+LS 98.619",
    "table12": "SM 100.277 LS 100.413 BReLU 99.442 L2SM 94.977 CCN 100.302 CCN+LS 99.551",
    "table13": "None 131.26 conv1 143.88 conv2 141.85 conv3 139.30 conv4 138.58 fc1 143.77 "
    "fc2 158.28 fc3 159.80",
}
COLUMN_SUMS = {
    "table1": "596.98 572.28 488.67 349.95 236.13 545.46 414.24 344.10 296.54 273.55",
    "table2": "577.56 515.57 428.81 358.56 288.97 306.10 273.23 244.18 217.98 193.78",
    "table3": "3.036 1.715",
    "table4": "596.76 585.41 592.58 595.22 567.03 511.50 445.20 424.97 433.71 289.92",
    "table5": "394.82 320.39 195.18 139.46 91.23 1.3116",
    "table6": "593.66 557.98 392.47 189.32",
    "table7": "320.20 393.55 347.31 466.35 536.32 559.15",
    "table8": "194.49 359.89 204.59 405.67 454.61 489.08",
    "table9": "497.29 463.93 332.27 239.68 178.44 455.86 335.62 260.74 202.44 171.84",
    "table11": "9.473 596.54",
    "table12": "2.542 592.42",
    "table13": "796.18 360.54",
}

# Of Jakubovitz & Giryes: cells, sum of the accuracies, of ρ in percent or, in Table 1, of norms.
JACOBIAN_SUMS = {
    "table1": (8, 0, 0.7828),
    "table2": (12, 592.68, 160.50),
    "table3": (12, 532.37, 15.49),
    "table4": (8, 394.55, 113.58),
    "table5": (8, 390.06, 105.05),
    "table6": (8, 394.63, 104.60),
    "table7": (12, 593.46, 125.67),
    "table8": (12, 588.39, 212.59),
}

# Of Subramanya et al.: sums over the cells of an attack (in Figure 4b and 5a, its only one).
BATCHOUT_SUMS = {
    ("figure2", "clean"): "Baseline 99.47 Adversarially_trained 99.31 BatchOut 99.12",
    ("figure2", "fgsm"): "Baseline 157 Adversarially_trained 474 BatchOut 478",
    ("figure2", "deepfool"): "Baseline 123 Adversarially_trained 215 BatchOut 351",
    ("figure3", "clean"): "Baseline 80.22 Adversarially_trained 80.01 BatchOut 80.79",
    ("figure3", "fgsm"): "Baseline 218 Adversarially_trained 304 BatchOut 294",
    ("figure3", "deepfool"): "Baseline 131 Adversarially_trained 183 BatchOut 312",
    ("figure4b", "fgsm"): "C1 75 C2 76 F1 85 C1C2 78 C1F1 93 C2F1 91 all 96",
    ("figure5a", "fgsm"): "k 822",
    ("figure5b", "fgsm"): "BatchOut 479.27 Gaussian_noise 356.30",
}

# Of four papers, parsed from our notes: sums of the rows, with what is cited.
ADVERSARIAL_SUMS = {
    "mnist": {"PGD": 465.53 + 183.2, "CLP": 66.5, "LSQ": 75.6, "Plain + ALP": 184.9},
    "cifar": {"PGD": 278.98, "Simple": 171.4, "Simple + denoising": 174.1},
    "imagenet": {"R152": 195.5, "R152 + denoising": 209.3, "ALP": 83.5},
    "cited": {"R152": 73.58, "R152 + denoising": 79.85, "ALP": 0.6},
}

# Of Mustafa et al., parsed from the text: sums of the rows, and of the columns.
PROTOTYPE_SUMS = {
    "table2 mnist": (
        "192.22 599.83 710.04 730.78",
        "396.96 138.9 100.2 116.2 103.11 94.2 272.1 253.4 263.9 253.5 240.4",
    ),
    "table2 cifar10": (
        "273.71 699.25 782.48 802.89",
        "364.42 239.8 124.5 135.4 127.2 116.41 301.9 289.7 290.7 289.5 278.8",
    ),
    "table2 cifar100": (
        "280.14 564.00 588.51 601.32",
        "281.98 199.1 98.6 104.1 99.22 93.57 238.2 230.1 233.6 231.9 223.6",
    ),
    "table2 fashion-mnist": (
        "262.81 606.02 738.13 747.60",
        "365.16 140.0 99.7 110.4 103.7 96.3 308.8 283.3 285.9 284.1 277.2",
    ),
    "table2 svhn": (
        "319.05 685.66 797.18 813.26",
        "376.35 256.5 139.5 153.0 141.0 131.5 304.3 279.0 285.0 283.7 265.3",
    ),
    "table3 cifar10": (
        "409.27 503.56 520.01",
        "273.62 215.45 218.4 120.19 124.5 123.92 127.2 113.16 116.4",
    ),
    "table3 fashion-mnist": (
        "274.02 422.83 427.10",
        "273.65 127.4 131.3 97.8 99.6 100.3 103.7 93.9 96.3",
    ),
    "table4 cifar100": ("178.0 208.2 324.3 364.6 372.9", "352.1 203.4 157.8 213.5 158.7 209.5 153"),
    "table5 fashion-mnist": ("301.1 337.4", "176.8 164.8 148.9 148.0"),
    "table5 svhn": ("247.2 344.4", "177.3 144.3 136.1 133.9"),
    "table5 cifar10": ("262.6 316.7", "176.7 146.0 129.1 127.5"),
    "table5 cifar100": ("144.4 38.6", "61.6 29.3 27.3 64.8"),
    "table6 cifar10": ("121.65 144.54 212.91 282.15", "157.71 134.76 241.65 227.13"),
    "table7 cifar10": (
        "112.21 98.02 120.92 132.96 142.31 151.69 166.69 185.39",
        "698.47 319.80 91.92",
    ),
    "table8 cifar10": (
        "329.6 389.5 457.9 379.4 604.0 742.4 717.2 822.8 866.7",
        "796.2 533.9 399.7 439.0 289.0 393.9 264.9 715.4 517.5 317.4 392.4 250.2",
    ),
    "table9 mnist": (
        "428.4 620.7 631.4 788.8 903.2 956.8 1014.6 1027.0",
        "793.1 701.6 477.6 623.3 443.8 576.3 391.6 699.7 561.2 213.4 544.4 344.9",
    ),
}
OURS = ["Ours", "Ours + AdvTrain FGSM", "Ours + AdvTrain PGD"]
ATTACKS = ["fgsm", "bim", "mim", "pgd"]


def stored(store: Path) -> pd.DataFrame:
    file = store / "results" / f"{CHAPTER}.csv"
    return pd.read_csv(file, dtype=str, keep_default_na=False)


# What the paper prints


def test_every_table_of_the_paper_is_transcribed() -> None:
    frame = printed(CHAPTER)
    assert list(frame["table"].unique()) == list(ROW_SUMS)
    assert not frame.duplicated(KEY).any()
    for table, cells in frame.groupby("table"):
        sums = {name: group["value"].sum() for name, group in cells.groupby("row")}
        words = ROW_SUMS[str(table)].split()
        expected = dict(zip(words[::2], map(float, words[1::2]), strict=True))
        assert sums == pytest.approx(expected, abs=1e-9), table
        columns = cells.groupby(["column", "metric"], sort=False)["value"].sum().tolist()
        assert columns == pytest.approx([*map(float, COLUMN_SUMS[str(table)].split())], abs=1e-9)
        assert len(cells) == len(sums) * len(columns)


def test_the_tables_of_jacobian_regularization_are_transcribed_and_repeat_each_other() -> None:
    frame = printed("jacobian_regularization")
    assert not frame.duplicated(KEY).any()
    found = {}
    for table, cells in frame.groupby("table", sort=False):
        sums = cells.groupby("metric")["value"].sum()
        second = 100 * sums["robustness"] if "robustness" in sums else sums["mean norm"]
        found[table] = (len(cells), sums.get("accuracy", 0), second)
    assert [*found] == [*JACOBIAN_SUMS]
    for table, expected in JACOBIAN_SUMS.items():
        assert found[table] == pytest.approx(expected, abs=1e-9), table
    cells = frame.set_index(KEY)["printed"]
    for column in (("mnist clean", "accuracy"), ("mnist deepfool", "robustness")):
        for name in frame.loc[frame["table"] == "table4", "row"].unique():
            assert cells["table4", name, *column] == cells["table2", name, *column]
        alone = "Jacobian regularization & no adversarial training"
        assert cells["table8", alone, *column] == cells["table2", alone[:23], *column]
        assert cells["table7", "No defense", *column] == cells["table2", "No defense", *column]


def test_the_figures_of_batchout_are_read_off_and_its_clean_accuracies_printed() -> None:
    frame = printed("batchout")
    frame = frame[frame["table"] != "cited"]
    assert not frame.duplicated(KEY).any() and len(frame) == 93
    attack = frame["column"].str.split().str[1]
    names = frame["row"].str.replace(r" = .*", "", regex=True).str.replace(" ", "_")
    sums = frame.groupby(["table", attack, names])["value"].sum()
    expected = {
        (*place, name): float(total)
        for place, text in BATCHOUT_SUMS.items()
        for name, total in zip(text.split()[::2], text.split()[1::2], strict=True)
    }
    assert sums.to_dict() == pytest.approx(expected, abs=1e-9)
    note = attack.eq("clean").map({True: "printed in Sec", False: "read off the figure"})
    assert all(found.startswith(n) for found, n in zip(frame["note"], note, strict=True))
    assert set(frame["metric"]) == {"accuracy"}
    assert (frame["column"].str.partition(" ")[0] == frame["dataset"]).all()
    depth = [f"deepfool {i}" for i in range(1, 6)]
    for table, dataset, eps in (
        ("figure2", "mnist", [f"0.{i}" for i in range(1, 6)]),
        ("figure3", "cifar10", [f"{i}/255" for i in range(1, 6)]),
    ):
        columns = [f"{dataset} {c}" for c in ["clean", *(f"fgsm {e}" for e in eps), *depth]]
        for name, cells in frame[frame["table"] == table].groupby("row"):
            assert cells["column"].tolist() == columns, name
            assert cells["value"][-5:].is_monotonic_decreasing, name
    shares = frame.loc[frame["table"] == "figure5a", "row"].tolist()
    assert shares == [f"k = {k / 10}" for k in range(1, 11)]


def test_the_tables_of_prototype_conformity_are_transcribed() -> None:
    frame = printed("prototype_conformity")
    frame = frame[frame["table"] != "cited"]
    assert not frame.duplicated(KEY).any() and set(frame["metric"]) == {"accuracy"}
    assert (frame["column"].str.partition(" ")[0] == frame["dataset"]).all()
    found = {}
    for (table, dataset), cells in frame.groupby(["table", "dataset"], sort=False):
        sums = [cells.groupby(by, sort=False)["value"].sum() for by in ("row", "column")]
        found[f"{table} {dataset}"] = sums
    assert [*found] == [*PROTOTYPE_SUMS]
    for name, expected in PROTOTYPE_SUMS.items():
        for sums, text in zip(found[name], expected, strict=True):
            assert sums.tolist() == pytest.approx([*map(float, text.split())], abs=1e-9), name
    by_others = ["AdvTrain", "Yu et al.", "Ross et al.", "Pang et al.", "Madry et al."]
    for name, rows in {
        "table2 mnist": ["Softmax", *OURS],
        "table3 cifar10": OURS,
        "table4 cifar100": ["Softmax", "ADP", *OURS],
        "table5 svhn": ["Song et al.", OURS[2]],
        "table6 cifar10": ["VGG-19", "AdvTrain", "Madry et al.", "Ours"],
        "table8 cifar10": ["Softmax", *by_others, *OURS],
        "table9 mnist": ["Softmax", *by_others[:-1], *OURS],
    }.items():
        assert [*found[name][0].index] == rows
    for name, columns in {
        "table2 svhn": "fgsm 0.03, bim 0.03, c&w 0.1, mim 0.03, pgd 0.03",
        "table2 fashion-mnist": "fgsm 0.3, bim 0.3, c&w 10, mim 0.3, pgd 0.3",
        "table4 cifar100": "bim 0.005, bim 0.01, mim 0.005, mim 0.01, pgd 0.005, pgd 0.01",
        "table5 cifar10": "fgsm 4/255, mim 4/255, pgd 4/255",
        "table7 cifar10": "fgsm 0.03, pgd 0.03",
        "table8 cifar10": "fgsm 0.02, fgsm 0.04, bim 0.01, bim 0.02, mim 0.01, mim 0.02, "
        "c&w 0.001, c&w 0.01, c&w 0.1, pgd 0.01, pgd 0.02",
        "table9 mnist": "fgsm 0.1, fgsm 0.2, bim 0.1, bim 0.15, mim 0.1, mim 0.15, "
        "c&w 0.1, c&w 1.0, c&w 10.0, pgd 0.1, pgd 0.15",
    }.items():
        attacks = columns.split(", ")
        attacks += [f"black-box {c}" for c in attacks] if name.startswith("table2") else []
        dataset = name.split()[1]
        assert [*found[name][1].index] == [f"{dataset} {c}" for c in ["clean", *attacks]]


def test_prototype_conformity_repeats_table_2_but_for_one_cell() -> None:
    """Where the paper prints a number twice both are here; Table 9 has one that differs."""
    cells = printed("prototype_conformity").set_index(KEY)["value"]
    cells.index = cells.index.droplevel("metric")
    for dataset, own, eps in (("cifar10", "8/255", "0.03"), ("fashion-mnist", "0.3", "0.3")):
        for row_name in OURS:
            places = [(f"{dataset} {a} {own}", f"{dataset} {a} {eps}") for a in ATTACKS]
            for third, second in [(f"{dataset} clean",) * 2, *places]:
                assert cells["table3", row_name, third] == cells["table2", row_name, second]
    both = [
        (cells["table9", name, "mnist c&w 10.0"], cells["table2", name, "mnist c&w 10"])
        for name in ("Softmax", *OURS)
    ]
    assert both == [(0.2, 0.2), (29.1, 29.1), (39.7, 40.9), (46.0, 46.0)]
    for table, dataset in (("table4", "cifar100"), ("table8", "cifar10"), ("table9", "mnist")):
        for name in ("Softmax", *OURS):
            clean = f"{dataset} clean"
            rounded = pytest.approx(cells["table2", name, clean], abs=0.05 + 1e-9)
            assert cells[table, name, clean] == rounded
    for row_name, name in (("None", "Softmax"), ("Layer 3+4+5", "Ours")):
        for column in ("clean", "fgsm 0.03", "pgd 0.03"):
            expected = pytest.approx(cells["table2", name, f"cifar10 {column}"], abs=0.05 + 1e-9)
            assert cells["table7", row_name, f"cifar10 {column}"] == expected
    from_vgg = cells["table6", "Ours", "cifar10 crafted on VGG-19"]
    assert from_vgg == cells["table2", OURS[2], "cifar10 black-box pgd 0.03"]


def test_what_is_printed_of_adversarial_training_is_transcribed() -> None:
    frame = printed("adversarial_training")
    assert not frame.duplicated(KEY).any() and set(frame["metric"]) == {"accuracy"}
    assert (frame["column"].str.partition(" ")[0] == frame["dataset"]).all()
    for table, cells in frame.groupby("table"):
        sums = cells.groupby("row")["value"].sum().to_dict()
        assert sums == pytest.approx(ADVERSARIAL_SUMS[str(table)]), table
    again = frame["note"].str.startswith("cited")
    assert set(frame.loc[~again & frame["table"].eq("cited"), "row"]) == set()
    assert (frame.loc[frame["column"].str.contains("autoattack"), "note"].str[:5] == "cited").all()
    for _, cells in frame[frame["table"] != "cited"].groupby(["table", "row", "dataset"]):
        places = ["clean", "fgsm", "pgd-10 ", "pgd-20 ", "pgd-40", "pgd-100 ", "pgd-1000"]
        values = [v for p in places for v in cells.loc[cells["column"].str.contains(p), "value"]]
        assert values == sorted(values, reverse=True)  # more steps leave less


def test_columns_begin_with_their_data_set_and_metrics_are_known() -> None:
    frame = printed(CHAPTER)
    assert (frame["column"].str.partition(" ")[0] == frame["dataset"]).all()
    assert set(frame["metric"]) == {
        "accuracy",
        "robustness",
        "mean distance",
        "success probability",
    }
    assert frame["printed"].str.fullmatch(r"\d+(\.\d+)?").all()
    assert frame.loc[frame["note"].str.contains("BRReLU"), "row"].eq("BReLU").all()


def test_the_paper_repeats_table_1_in_tables_7_8_9_and_13() -> None:
    frame = printed(CHAPTER).set_index(KEY)["printed"]
    first, ninth = frame.loc["table1"], frame.loc["table9"]
    for name in ("SM", "CCN", "CCN+LS"):
        assert ninth.loc[name].to_dict() == first.loc[name].to_dict()
    for table, dataset, eps in (("table7", "mnist", "0.3"), ("table8", "cifar10", "8/255")):
        for name in ("SM", "LS", "BReLU", "L2SM", "CCN", "CCN+LS"):
            crafted_on_itself = frame[table, name, f"{dataset} crafted on {name}", "accuracy"]
            assert crafted_on_itself == first[name, f"{dataset} fgsm {eps}", "accuracy"]
    for layer, name in (("None", "SM"), ("fc3", "L2SM")):
        for eps in ("0", "0.3"):
            place = f"mnist fgsm {eps}", "accuracy"
            assert frame["table13", layer, *place] == first[name, *place]


# Measuring and recording


def test_a_measurement_says_how_it_was_made() -> None:
    got = row(ci=(48.0, 52.0), seed=7, device=torch.device("cpu"), images="0a", code="0b")
    assert list(got) == COLUMNS
    assert (got["seed"], got["ci_low"], got["ci_high"]) == ("7", 48.0, 52.0)
    assert (got["images"], got["code"]) == ("0a", "0b")
    threads = torch.get_num_threads()
    assert got["device"].endswith("1 thread" if threads == 1 else f"{threads} threads")
    assert got["device"].startswith(results.processor()) and len(results.processor()) > 4
    assert re.fullmatch(r"torch \d+\.\d+\.\d+\w*", got["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", got["date"])
    assert math.isnan(row()["ci_low"])
    assert row(value=100.0, ci=(98.9, 99.99999999))["value"] == 100  # a rounding error is none
    assert row(value=0.0, ci=(1e-17, 1.1))["value"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": "long"},
        {"value": math.nan},
        {"value": math.inf},
        {"value": 0.5, "ci": (48, 52)},
        {"value": 50, "ci": (0.48, 0.52)},
    ],
)
def test_a_measurement_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"expected one of paper, short, quick|within its interval"
    ):
        row(**wrong)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_marked_when_code_differs_and_not_when_results_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "defenses" / "results.py"
    stored = tmp_path / "chapters" / "results"
    own = [stored / "a.csv", stored / "a.npz", stored / "figures" / "a-1.png"]
    own += [tmp_path / "chapters" / "a.ipynb", tmp_path / "book" / "static" / "hook.png"]
    monkeypatch.setattr(results, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    find = results.commit.__wrapped__
    for file in (code, *own):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    assert find() == ""  # no repository
    git(tmp_path, "init")
    assert find() == ""  # no commit
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    head = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert find() == head
    for file in own:  # what the book itself writes
        file.write_text("2\n")
    (tmp_path / "notes.txt").write_text("not tracked\n")
    assert find() == head
    code.write_text("2\n")
    assert find() == f"{head}-dirty"


def test_recording_merges_replaces_and_keeps_an_order(store: Path) -> None:
    old, other, none = row(value=10.0), row("CCN", value=1 / 3), row("None", table="table13")
    record(CHAPTER, [old, other, none], store)
    record(CHAPTER, [row(value=20.0, ci=(18, 22))], store)
    frame = stored(store)
    assert list(frame.columns) == COLUMNS
    assert frame["row"].tolist() == ["CCN", "SM", "None"]
    assert frame["value"].tolist() == ["0.3333333333", "20", "50"]
    assert frame["n"].tolist() == ["360"] * 3
    assert frame["ci_low"].tolist() == ["", "18", ""]
    record(CHAPTER, [row(protocol="short", dataset="mnist"), row(dataset="mnist")], store)
    assert len(stored(store)) == 5  # another protocol, another data set: beside the old one
    record(CHAPTER, [row(seed=1)], store)
    assert stored(store)["seed"].tolist().count("1") == 1 and len(stored(store)) == 6


def test_recording_the_same_again_changes_no_byte(store: Path) -> None:
    rows = [row(name, value=v) for name, v in (("SM", 1 / 3), ("CCN", 2e-7), ("LS", 100.0))]
    record(CHAPTER, rows, store)
    file = store / "results" / f"{CHAPTER}.csv"
    before = file.read_bytes()
    record(CHAPTER, rows[::-1], store)
    record(CHAPTER, stored(store), store)
    record(CHAPTER, [], store)
    assert file.read_bytes() == before and b"\r" not in before
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_rows_that_lack_columns_and_foreign_files_are_refused(store: Path) -> None:
    with pytest.raises(ValueError, match=r"lack row, column.*measure"):
        record(CHAPTER, [{"table": "table1"}], store)
    file = store / "results" / f"{CHAPTER}.csv"
    conflict = "\n".join([",".join(COLUMNS), "<<<<<<< HEAD", ",".join("a" * 20), ""])
    for text in ("<<<<<<< HEAD\n", conflict):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{file}"):
            record(CHAPTER, [row()], store)
        assert file.read_text() == text


@pytest.mark.parametrize("at", ["the head", "the first row", "the last row", "a lone mark"])
def test_a_file_with_the_marks_of_a_merge_is_refused_by_name(store: Path, at: str) -> None:
    """A mark has one field, which pandas would take for a row of which the rest is empty."""
    record(CHAPTER, [row("SM"), row("LS")], store)
    file = store / "results" / f"{CHAPTER}.csv"
    head, first, last = file.read_text().splitlines()
    sides = {"ours": f"<<<<<<< HEAD\n{first}", "theirs": f"=======\n{first}\n>>>>>>> other"}
    text = {
        "the head": f"<<<<<<< HEAD\n{head}\n=======\n{head}\n>>>>>>> other\n{first}\n{last}\n",
        "the first row": f"{head}\n{sides['ours']}\n{sides['theirs']}\n{last}\n",
        "the last row": f"{head}\n{last}\n{sides['ours']}\n||||||| base\n{sides['theirs']}\n",
        "a lone mark": f"{head}\n{first}\n{last}\n>>>>>>> other\n",
    }[at]
    file.write_text(text)
    for use in (
        lambda: record(CHAPTER, [row()], store),
        lambda: best(CHAPTER, folder=store),
        lambda: value(CHAPTER, "table1", "SM", "mnist fgsm 0.3", folder=store),
    ):
        with pytest.raises(ValueError, match=f"{file}"):
            use()
    assert file.read_text() == text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"], ids=["empty", "not text"])
def test_a_file_that_is_no_table_is_refused_by_name(store: Path, content: bytes) -> None:
    file = store / "results" / f"{CHAPTER}.csv"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is no table"):
        best(CHAPTER, folder=store)


def record_many(store: Path, names: list[str]) -> None:
    for name in names:
        record(CHAPTER, [row(name)], store)


def test_two_processes_lose_no_row(store: Path) -> None:
    fork = multiprocessing.get_context("fork")
    names = [[f"{p}-{i}" for i in range(8)] for p in range(4)]
    workers = [fork.Process(target=record_many, args=(store, part)) for part in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(stored(store)["row"]) == {name for part in names for name in part}


def test_a_kill_leaves_a_whole_file_and_no_lock(store: Path) -> None:
    record(CHAPTER, [row("first")], store)
    fork, many = multiprocessing.get_context("fork"), [str(i) for i in range(10_000)]
    for i in range(6):
        worker = fork.Process(target=record_many, args=(store, many))
        worker.start()
        time.sleep(0.05 + 0.013 * i)
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        frame = stored(store)
        assert "first" in set(frame["row"]) and (frame["value"] == "50").all()
    record(CHAPTER, [row("last")], store)
    assert {"first", "last"} <= set(stored(store)["row"])


# Choosing


@pytest.mark.parametrize(
    "column, better, worse",
    [
        ("mnist fgsm 0.3", ("paper", "mnist"), ("short", "mnist")),
        ("mnist fgsm 0.3", ("short", "mnist"), ("quick", "mnist")),
        ("mnist fgsm 0.3", ("quick", "mnist"), ("paper", "digits")),
        ("mnist fgsm 0.3", ("quick", "mnist"), ("paper", "fashion-mnist")),
        ("cifar10 fgsm 0", ("short", "cifar10"), ("short", "cifar10-jpeg")),
        ("cifar10 fgsm 0", ("paper", "cifar10-jpeg"), ("short", "cifar10")),
        ("cifar10 fgsm 0", ("short", "cifar10-jpeg"), ("paper", "digits")),
        ("mnist pgd 0.3", ("quick", "mnist"), ("paper", "digits")),
        ("mnist pgd 0.3", ("paper", "digits"), ("short", "digits")),
    ],
)
def test_the_best_measurement_is_taken(
    store: Path, column: str, better: tuple[str, str], worse: tuple[str, str]
) -> None:
    rows = [
        row(column=column, value=v, protocol=protocol, dataset=dataset)
        for v, (protocol, dataset) in ((1.0, better), (2.0, worse))
    ]
    for order in (rows, rows[::-1]):
        assert best(CHAPTER, order, folder=store)["value"].tolist() == [1.0]
    protocol, dataset = worse
    only = best(CHAPTER, rows, protocol=protocol, dataset=dataset, folder=store)
    assert only["value"].tolist() == [2.0]


def test_of_two_of_a_kind_the_later_is_taken(store: Path) -> None:
    rows = [row(value=1.0), row(value=2.0)]
    assert best(CHAPTER, rows, folder=store)["value"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("dataset", "own", "expected"),
    [
        ("cifar10", "cifar10", True),
        ("cifar10-jpeg", "cifar10", True),
        ("cifar100", "cifar10", False),
        ("imagenet64", "imagenet", False),
        ("digits", "", True),
    ],
)
def test_another_data_set_is_no_copy(dataset: str, own: str, expected: bool) -> None:
    assert results.is_own(dataset, own) == expected


def test_where_nothing_is_stored_there_are_no_rows(store: Path) -> None:
    assert len(results.rows_of(CHAPTER, store)) == 0
    record(CHAPTER, [row()], store)
    assert list(results.rows_of(CHAPTER, store)) == COLUMNS
    assert results.rows_of(CHAPTER, store)["seed"].tolist() == ["0"]


def test_what_is_stored_anew_is_read_anew(store: Path) -> None:
    for v in (10.0, 20.0, 30.0):
        record(CHAPTER, [row(value=v)], store)
        assert value(CHAPTER, "table1", "SM", "mnist fgsm 0.3", folder=store) == v
    found = best(CHAPTER, folder=store)
    found["value"] = 0.0  # what a caller does to its frame is its own
    assert best(CHAPTER, folder=store)["value"].tolist() == [30.0]


# Several seeds


def of_seeds(*values: float, **changed: Any) -> list[dict[str, Any]]:
    return [
        row(value=v, ci=(v - 1, v + 1), seed=seed, seconds=1.0, **changed)
        for seed, v in enumerate(values)
    ]


def test_of_several_seeds_the_mean_is_read_with_its_interval(store: Path) -> None:
    rows = of_seeds(50.0, 52.0, 57.0)
    record(CHAPTER, rows, store)
    (got,) = best(CHAPTER, folder=store).to_dict("records")
    low, high = seed_interval([50, 52, 57], [(49, 51), (51, 53), (56, 58)])
    assert got["value"] == pytest.approx(53) and got["seed"] == "0 1 2" and got["seconds"] == 3
    assert (got["ci_low"], got["ci_high"]) == pytest.approx((low, high))
    assert value(CHAPTER, "table1", "SM", "mnist fgsm 0.3", folder=store) == pytest.approx(53)
    record(CHAPTER, of_seeds(20.0), store)  # a newer measurement of seed 0 only
    assert best(CHAPTER, folder=store)["value"].tolist() == pytest.approx([43])


def test_the_mean_of_an_accuracy_stays_within_bounds(store: Path) -> None:
    rows = [row(value=v, ci=(v, v), seed=s) for s, v in enumerate((100.0, 99.0))]
    (got,) = best(CHAPTER, rows, folder=store).to_dict("records")
    assert got["ci_high"] == 100 and got["ci_low"] < 99
    for r in rows:
        r["metric"] = "mean distance"
    assert best(CHAPTER, rows, folder=store)["ci_high"].tolist()[0] > 100


@pytest.mark.parametrize("metric", ["accuracy", "share", "fooled", "success probability"])
def test_the_mean_of_shares_stays_within_bounds(store: Path, metric: str) -> None:
    for values in ((100.0, 99.0), (0.0, 1.0)):
        rows = [row(value=v, ci=(v, v), seed=s, metric=metric) for s, v in enumerate(values)]
        (got,) = best(CHAPTER, rows, folder=store).to_dict("records")
        assert 0 <= got["ci_low"] < min(values) + 1 and max(values) - 1 < got["ci_high"] <= 100


def test_seeds_are_not_mixed_with_other_protocols_or_data(store: Path) -> None:
    rows = of_seeds(10.0, 20.0) + of_seeds(90.0, protocol="short")
    assert best(CHAPTER, rows, folder=store)["value"].tolist() == [90.0]
    assert best(CHAPTER, rows, protocol="quick", folder=store)["value"].tolist() == [15.0]


def test_an_older_mean_over_seeds_stands_until_as_many_single_ones_are_there(store: Path) -> None:
    old = row(value=10.0, ci=(9, 11)) | {"seed": "0 1 2"}
    record(CHAPTER, [old], store)
    record(CHAPTER, of_seeds(50.0, 52.0), store)
    assert best(CHAPTER, folder=store)["value"].tolist() == [10.0]
    assert len(stored(store)) == 3
    record(CHAPTER, of_seeds(50.0, 52.0, 54.0), store)
    assert best(CHAPTER, folder=store)["value"].tolist() == pytest.approx([52.0])
    assert stored(store)["seed"].tolist() == ["0", "1", "2"]


def test_a_value_comes_from_the_store_from_a_run_or_from_the_paper(store: Path) -> None:
    place = (CHAPTER, "table1", "SM", "mnist fgsm 0.3")
    with pytest.raises(ValueError, match=r"nobody has measured.*table1 / SM / mnist fgsm 0\.3"):
        value(*place, folder=store)
    record(CHAPTER, [row(value=12.5)], store)
    assert value(*place, folder=store) == 12.5
    assert value(*place, folder=store, measured=[row(value=3.0)]) == 3.0
    there: Any = {"data": "mnist", "folder": store}
    assert value(*place[:3], "fgsm 0.3", **there) == value(*place, folder=store)
    assert value(*place, folder=store, source="paper") == 31.76
    with pytest.raises(ValueError, match=r"nobody.*'protocol': 'paper'"):
        value(*place, folder=store, protocol="paper")
    with pytest.raises(ValueError, match="the paper does not print"):
        value(CHAPTER, "table1", "SM", "mnist fgsm 9", source="paper", folder=store)
    with pytest.raises(ValueError, match="unknown source"):
        value(*place, folder=store, source="ours")


def test_a_claim_is_printed_or_raises(capsys: pytest.CaptureFixture[str]) -> None:
    claim("two is more than one", torch.tensor(2) > 1)
    assert capsys.readouterr().out == "✓ two is more than one\n"
    with pytest.raises(AssertionError, match="one is more than two"):
        claim("one is more than two", 1 > 2)


def test_the_store_is_found_from_within_a_clone_and_missed_outside(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(CHAPTER, [row()], store)
    inside = store / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert len(best(CHAPTER)) == 1
    monkeypatch.chdir("/")
    assert len(printed(CHAPTER)) == 414  # the package's own clone
    with pytest.raises(FileNotFoundError, match=r"no paper/nothing\.csv.*folder="):
        printed("nothing")


def test_coverage_counts_cells_by_their_best_protocol(store: Path) -> None:
    assert coverage(CHAPTER, store)["empty"].sum() == 414
    record(
        CHAPTER,
        [
            row("SM", dataset="digits"),
            row("SM", dataset="mnist", protocol="short"),
            row("LS", dataset="digits"),
            row("SM", column="mnist pgd 0.3"),  # no cell of the paper
            row("fc3", table="table13", dataset="mnist", protocol="paper"),
        ],
        store,
    )
    frame = coverage(CHAPTER, store)
    columns = ["cells", "paper", "short", "quick", "empty", "datasets"]
    assert list(frame.columns) == columns
    assert sorted(frame.loc["table1", "datasets"].split(", ")) == ["digits 1", "mnist 1"]
    assert frame.loc["table1", columns[:-1]].tolist() == [60, 0, 1, 1, 58]
    assert frame.loc["table13"].tolist() == [16, 1, 0, 0, 15, "mnist 1"]
    assert frame.loc["table2"].tolist() == [60, 0, 0, 0, 60, ""]


def test_what_others_report_is_quoted_and_not_counted() -> None:
    frame = printed("batchout")
    cited = frame[frame["note"].str.startswith("cited")]
    assert set(cited["table"]) == {"cited"} and len(cited) == 8
    assert "cited" not in coverage("batchout").index
    assert value("batchout", "cited", "the paper's network", "mnist pgd 0.3", source="paper") == 5
