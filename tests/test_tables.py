"""Our numbers beside the paper's, as a reader sees them."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from defenses import words
from defenses.results import record
from defenses.run import Run
from defenses.tables import _parts, side_by_side
from tests.measurements import CHAPTER, PAPER, row

FILES = [PAPER.parent / "results" / file.name for file in sorted(PAPER.glob("*.csv"))]


def parsed(html: str) -> tuple[list[list[str]], dict[str, list[str]], str]:
    """Return the header's rows, the cells of each row and all text outside the table."""
    soup = BeautifulSoup(html, "html.parser")
    head = [[th.text for th in tr.select("th")] for tr in soup.select("thead tr")]
    body = {
        tr.select("th")[0].text: [td.get_text(" ") for td in tr.select("td")]
        for tr in soup.select("tbody tr")
    }
    soup.select("table")[0].extract()
    return head, body, soup.get_text(" ")


def caption(html: str) -> str:
    return BeautifulSoup(html, "html.parser").select("caption")[0].text


def test_a_table_with_nothing_measured_is_one_line_that_folds_out(store: Path) -> None:
    html = side_by_side(CHAPTER, "table13", folder=store).html
    head, body, _ = parsed(html)
    assert head == [["FGSM"], ["ε = 0", "ε = 0.3"]]
    assert list(body) == ["None", "conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3"]
    assert body["fc3"] == ["– (99.48)", "– (60.32)"]
    (fold,) = BeautifulSoup(html, "html.parser").select("details:not([open]):has(table)")
    said = "Table 13 · accuracy, % · MNIST: 16 cells printed, none measured yet."
    assert fold.select("summary")[0].text == said
    record(CHAPTER, [row("fc3", table="table13")], store)
    assert "<details" not in side_by_side(CHAPTER, "table13", folder=store).html


def test_the_data_set_and_the_unit_stand_in_the_caption_once(store: Path) -> None:
    record(CHAPTER, [row(dataset="mnist"), row(table="pgd", dataset="mnist")], store)
    html = side_by_side(CHAPTER, "table1", columns="mnist", folder=store).html
    assert caption(html) == "Table 1 · accuracy, % · MNIST"
    assert "MNIST" not in str(parsed(html)[0]) and "mnist" not in html
    assert caption(side_by_side(CHAPTER, "pgd", folder=store).html) == (
        "PGD · accuracy, % · MNIST · ε = 0.3"
    )


def test_every_head_says_what_it_heads(store: Path) -> None:
    rows = [
        row(column="mnist lead", metric="mean", table="masking"),
        row(column="mnist pgd 0.2", table="masking"),
        row(column="mnist pgd 0.1", table="masking"),
    ]
    html = side_by_side(CHAPTER, "masking", measured=rows, folder=store).html
    heads = BeautifulSoup(html, "html.parser").select("th")
    assert [(th.text, th["scope"], th.get("colspan"), th.get("rowspan")) for th in heads] == [
        ("accuracy, %", "colgroup", "2", None),
        ("mean", "col", None, None),
        ("PGD", "colgroup", "2", None),
        ("lead", "col", None, "2"),
        ("ε = 0.1", "col", None, None),
        ("ε = 0.2", "col", None, None),
        ("SM", "row", None, None),
    ]


def test_a_table_of_our_own_has_the_papers_rows_and_the_strongest_attack_first(
    store: Path,
) -> None:
    names = ["CCN+LS", "SM", "ours", "CCN"]
    attacks = ["clean", "fgsm 0.3", "pgd-10 0.3", "autoattack 0.3", "b", "a"]
    rows = [row(name, f"mnist {a}", table="ours") for name in names for a in attacks]
    record(CHAPTER, rows, store)
    head, body, text = parsed(side_by_side(CHAPTER, "ours", folder=store).html)
    assert list(body) == ["SM", "CCN", "CCN+LS", "ours"]
    assert head[0] == ["AutoAttack", "PGD-10", "FGSM", "clean", "a", "b"]
    assert "the paper has no such table" in text


def test_a_live_run_is_named_by_its_data_and_shows_what_it_measured(store: Path) -> None:
    record(CHAPTER, [row(value=40.0, dataset="mnist", protocol="short")], store)
    table = side_by_side(CHAPTER, "table1", measured=[row(value=15.0)], folder=store)
    assert caption(table.html) == "Table 1, this run · accuracy, % · digits · ε = 0.3"
    assert parsed(table.html)[:2] == ([["FGSM"]], {"SM": ["15.0"]})
    assert "31.76" not in table.html and "in parentheses" not in table.html
    same = side_by_side(CHAPTER, "table1", measured=[row(dataset="mnist")], folder=store)
    assert parsed(same.html)[1] == {"SM": ["50.00 (31.76)"]}


def own_run(**how: object) -> Run:
    run = Run(CHAPTER, **({"protocol": "short", "device": "cpu"} | how))  # type: ignore[arg-type]
    kind = {"protocol": run.protocol, "dataset": run.dataset, "seed": 5}
    values = {"SM": 40.0, "CCN": 15.0, "mine": 99.0}
    run.rows += [row(name, value=value, **kind) for name, value in values.items()]  # type: ignore
    run.rows.append(row("SM", table="pgd", **kind))  # type: ignore[arg-type]
    return run


def test_a_run_of_ones_own_stands_below_what_is_stored_where_they_differ(store: Path) -> None:
    stored = [row("SM", value=40.0, dataset="mnist"), row("CCN", value=80.0, dataset="mnist")]
    record(CHAPTER, stored, store)
    table = side_by_side(own_run(), "table1", columns="mnist", folder=store)
    _, body, text = parsed(table.html)
    assert [body[name][3] for name in ("SM", "CCN", "mine")] == [
        "40.00 (31.76)",
        "80.00 (81.38) this run 15.00",
        "– this run 99.00",
    ]
    assert "This run measured 3 of them; where it differs, its number is below." in text
    assert "this run: protocol short on MNIST; n = 360; seed 5" in text
    assert "2 of 30 cells measured" in text and "80.00 (81.38) | 15.00" in table.text
    chosen = side_by_side(own_run(), "table1", ["SM"], "mnist fgsm 0.4", folder=store)
    assert "this run" not in chosen.html.lower()


def test_what_only_the_run_has_measured_is_a_table_of_its_own(store: Path) -> None:
    table = side_by_side(own_run(dataset="digits"), "pgd", folder=store)
    assert parsed(table.html)[1] == {"SM": ["– this run 50.0"]}
    assert "<details" not in table.html and "this run: protocol short on digits" in table.text
    assert "<details" not in side_by_side(own_run(), "table1", folder=store).html


def test_the_pages_show_what_is_stored_and_not_the_run_that_makes_them(
    store: Path, tmp_path: Path
) -> None:
    record(CHAPTER, [row("CCN", value=80.0, dataset="mnist")], store)
    quick = side_by_side(own_run(protocol="quick"), "table1", folder=store)
    assert quick == side_by_side(CHAPTER, "table1", folder=store)
    kept = own_run(protocol="quick", results=str(tmp_path / "mine"))
    assert "this run 15.00" in side_by_side(kept, "table1", folder=store).html
    live = side_by_side(kept, "table1", measured=kept.rows, folder=store)
    assert live == side_by_side(CHAPTER, "table1", measured=kept.rows, folder=store)


def test_a_table_says_how_its_numbers_were_measured(store: Path) -> None:
    rows = [
        row("SM", value=31.0, ci=(28.1, 34.2), protocol="short", dataset="mnist") | {"seed": "0 1"},
        row("CCN", value=80.0, seed=2, n=10_000, protocol="short", dataset="mnist"),
    ]
    record(CHAPTER, rows, store)
    table = side_by_side(CHAPTER, "table1", columns="mnist", folder=store)
    head, body, text = parsed(table._repr_html_())
    assert head == [["FGSM"], ["ε = 0", "ε = 0.1", "ε = 0.2", "ε = 0.3", "ε = 0.4"]]
    assert body["SM"][3] == "31.00 28.1–34.2 (31.76)"
    assert body["CCN"][3] == "80.00 (81.38)"
    assert "2 of 30 cells measured. This book's number first" in text and "95% interval" in text
    assert "protocol short on MNIST; n = 360 to 10,000; seeds 0, 1, 2; a toy; 3 s in all" in text
    assert "not MNIST" not in text and "<sup>" not in table.html
    assert "31.0" in repr(table) and "protocol short on MNIST" in repr(table)


def test_a_stand_in_is_never_passed_off_as_the_papers_data_set(store: Path) -> None:
    record(CHAPTER, [row("SM"), row("LS", "cifar10 fgsm 0", dataset="cifar10-jpeg")], store)
    table = side_by_side(CHAPTER, "table1", rows=["SM"], columns="mnist", folder=store)
    assert caption(table.html) == "Table 1 · accuracy, % · digits"
    assert "protocol quick on digits, not MNIST" in table.html
    assert "protocol quick on digits, not MNIST" in table.text
    both = side_by_side(CHAPTER, "table1", folder=store).text
    assert "on cifar10-jpeg, not CIFAR-10" in both


def test_numbers_of_several_kinds_each_carry_a_mark(store: Path) -> None:
    rows = [
        row("SM", value=10.0),
        row("SM", "mnist fgsm 0", 98.0, protocol="short", dataset="mnist"),
        row("CCN", value=20.0, protocol="short", dataset="mnist"),
    ]
    record(CHAPTER, rows, store)
    table = side_by_side(CHAPTER, "table1", columns="mnist", folder=store)
    legend = dict(
        line.split(": ", 1) for line in table.text.splitlines() if re.match("[a-z]: ", line)
    )
    marks = {text.split(";")[0]: mark for mark, text in legend.items()}
    quick, short = marks["protocol quick on digits, not MNIST"], marks["protocol short on MNIST"]
    _, body, _ = parsed(table.html)
    assert body["SM"][3] == f"10.00 {quick} (31.76)"
    assert body["SM"][0] == f"98.00 {short} (99.50)"
    assert body["CCN"][3] == f"20.00 {short} (81.38)"
    assert f"10.00{quick} (31.76)" in table.text


def test_rows_and_columns_are_chosen_and_ordered(store: Path) -> None:
    choice = {"rows": ["CCN", "SM"], "columns": ["mnist fgsm 0.3", "cifar10 fgsm 8/255"]}
    table = side_by_side(CHAPTER, "table1", **choice, folder=store)
    head, body, text = parsed(table.html)
    assert head == [["MNIST", "CIFAR-10"], ["FGSM", "FGSM"], ["ε = 0.3", "ε = 8/255"]]
    assert body == {"CCN": ["– (81.38)", "– (69.65)"], "SM": ["– (31.76)", "– (14.30)"]}
    assert "4 cells printed" in text
    for wrong in ({"rows": ["nobody"]}, {"columns": ["mnist"]}, {"columns": "svhn"}):
        with pytest.raises(ValueError, match=r"no (row|column) .*: expected one of"):
            side_by_side(CHAPTER, "table1", **wrong, folder=store)
    with pytest.raises(ValueError, match=r"no table 'table10': expected one of table1, table2"):
        side_by_side(CHAPTER, "table10", folder=store)


def test_other_metrics_stand_under_their_attack_with_the_papers_decimals(store: Path) -> None:
    rows = [
        row("SM", "mnist c&w", 1.23456, metric="mean distance", table="table11", dataset="mnist"),
        row("SM", "mnist deepfool", 0.2, metric="robustness", table="table3", dataset="mnist"),
        row("SM", "mnist c&w", 3.14159, metric="mean distance", table="ours", dataset="mnist"),
        row("LS", "mnist c&w", 3611.92, metric="mean distance", table="ours", dataset="mnist"),
        row("CCN", "mnist c&w", 0.00541, metric="mean distance", table="ours", dataset="mnist"),
        row("LS", "mnist c&w", 24.8452, metric="mean distance", table="table11", dataset="mnist"),
    ]
    record(CHAPTER, rows, store)
    table = side_by_side(CHAPTER, "table11", folder=store)
    head, body, _ = parsed(table.html)
    assert head == [["C&W"], ["mean distance", "success, %"]]
    assert body["SM"] == ["1.235 (1.393)", "– (100)"]
    assert body["LS"][0] == "24.85 (1.626)"
    assert "C&amp;W" in table.html
    _, body, _ = parsed(side_by_side(CHAPTER, "table3", folder=store).html)
    assert body["SM"] == ["0.200 (0.225)", "– (0.014)"]
    assert parsed(side_by_side(CHAPTER, "ours", folder=store).html)[1] == {
        "SM": ["3.14"],
        "LS": ["3,612"],
        "CCN": ["0.0054"],
    }


def test_a_small_number_keeps_the_papers_decimals(store: Path) -> None:
    paper = "jacobian_regularization.csv"
    shutil.copy(PAPER / paper, store / "paper" / paper)
    small = row("No defense", "cifar10 deepfool", 0.00541, metric="robustness", table="table3")
    record("jacobian_regularization", [small], store)
    table = side_by_side("jacobian_regularization", "table3", ["No defense"], folder=store)
    assert "0.0054 (0.0121)" in table.text.replace("\n", " ")


def test_what_the_paper_does_not_have_is_shown_without_its_number(store: Path) -> None:
    rows = [
        row("CCN", "mnist pgd 0.3", 4.0, table="stronger"),
        row("CCN", "mnist pgd 0.3", 4.0),
        row("PGD-trained", value=90.0),
    ]
    record(CHAPTER, rows, store)
    alone = side_by_side(CHAPTER, "stronger", folder=store)
    assert parsed(alone.html)[1] == {"CCN": ["4.0"]} and "no such table" in alone.text
    _, body, text = parsed(side_by_side(CHAPTER, "table1", columns="mnist", folder=store).html)
    assert body["CCN"][3:] == ["– (81.38)", "– (60.65)", "4.00"]
    assert body["PGD-trained"] == ["", "", "", "90.00", "", ""]
    assert "0 of 30 cells measured" in text


def test_a_table_scrolls_by_itself_and_brings_no_colors(store: Path) -> None:
    html = side_by_side(CHAPTER, "table1", folder=store).html
    soup = BeautifulSoup(html, "html.parser")
    assert {tag["style"] for tag in soup.find_all(style=True)} == {"overflow-x:auto"}
    assert len(soup.select(".side-by-side-scroll table.table")) == len(soup.select("table"))
    assert "color" not in html


def test_a_table_too_wide_for_a_page_is_stacked(store: Path) -> None:
    soup = BeautifulSoup(side_by_side(CHAPTER, "table1", folder=store).html, "html.parser")
    heads = [[th.text for th in t.select("thead tr:first-child th")] for t in soup.select("table")]
    assert heads == [["MNIST"], ["CIFAR-10"]]
    captions = [tag.text for tag in soup.select("caption")]
    assert captions == ["Table 1 · accuracy, %", "Table 1 · accuracy, % · continued"]
    assert [len(table.select("tbody tr:first-child td")) for table in soup.select("table")] == [
        5,
        5,
    ]
    assert len(soup.select("tbody tr")) == 12


@pytest.mark.parametrize(
    ("heads", "parts"),
    [
        ("aaabbbccc", [6, 3]),
        ("aaabbbcccddd", [6, 6]),
        ("aaaaaaaaaaa", [6, 5]),
        ("abcdefgh", [8]),
        ("aabbbbbbbbbbbb", [2, 7, 5]),
    ],
)
def test_stacks_end_where_a_head_ends(heads: str, parts: list[int]) -> None:
    header = [(head, str(place)) for place, head in enumerate(heads)]
    assert [part.stop - part.start for part in _parts(header)] == parts


# The words.


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("mnist fgsm 0.3", ("MNIST", "FGSM", "ε = 0.3")),
        ("cifar10 exact fgsm 8/255", ("CIFAR-10", "exact FGSM", "ε = 8/255")),
        ("cifar10 pgd 0.0157", ("CIFAR-10", "PGD", "ε = 4/255")),
        ("cifar10 pgd 0.0158", ("CIFAR-10", "PGD", "ε = 0.0158")),
        ("mnist eps=0.3 pgd-margin", ("MNIST", "PGD, margin", "ε = 0.3")),
        ("mnist deepfool d=0.1", ("MNIST", "DeepFool", "d = 0.1")),
        ("mnist black-box c&w 10", ("MNIST", "black-box C&W", "c = 10")),
        ("mnist pgd-100x50 0.3", ("MNIST", "PGD-100 × 50", "ε = 0.3")),
        ("mnist textbook-100 0.1", ("MNIST", "PGD-100, rounded loss", "ε = 0.1")),
        ("mnist l2 1.5", ("MNIST", "L₂", "radius 1.5")),
        ("mnist epoch 08", ("MNIST", "epoch", "8")),
        ("mnist distance of Eq. 16", ("MNIST", "distance of Eq. 16", "")),
        ("mnist crafted on Ours", ("MNIST", 'crafted on Prototypes ("Ours")', "")),
        ("mnist p = 1", ("MNIST", "probability 1", "")),
        ("apgd-ce", ("", "APGD-CE", "")),
    ],
)
def test_a_column_is_said_in_words(key: str, said: tuple[str, str, str]) -> None:
    assert words.column(key) == said


def test_whom_the_paper_calls_ours_has_a_name() -> None:
    assert words.row("Ours + AdvTrain PGD") == 'Prototypes ("Ours") + AdvTrain PGD'
    assert words.row("hours") == "hours"


def test_columns_stand_by_strength_and_then_by_size() -> None:
    sizes = ["2/255", "0.0157", "8/255", "16/255"]
    columns = [f"cifar10 {kind} {size}" for kind in ("autoattack", "pgd") for size in sizes]
    columns += ["mnist c&w 0.1", "mnist c&w 1.0", "mnist c&w 10.0"]
    assert sorted(reversed(columns), key=words.rank) == columns


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_store_key_is_left_over(file: Path) -> None:
    """No underscore and no `100x5` in what a reader sees; no two columns with one head."""
    keys = pd.read_csv(file, dtype=str)[["table", "column", "metric"]].drop_duplicates()
    said = [words.column(key) for key in keys["column"]]
    assert [text for name in said for text in name if re.search(r"_|\dx\d|=\S", text)] == []
    assert not keys.assign(said=said).duplicated(["table", "said", "metric"]).any()
    assert [title for title in map(words.title, keys["table"]) if "_" in title] == []
