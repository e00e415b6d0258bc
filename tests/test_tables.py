"""Our numbers beside the paper's, as a reader sees them."""

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from defenses.results import record
from defenses.tables import side_by_side
from tests.measurements import CHAPTER, row


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


def test_an_empty_table_shows_the_papers_numbers_and_a_dash(store: Path) -> None:
    head, body, text = parsed(side_by_side(CHAPTER, "table13", folder=store).html)
    assert head == [["", "mnist fgsm"], ["", "0", "0.3"]]
    assert list(body) == ["None", "conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3"]
    assert body["fc3"] == ["– (99.48)", "– (60.32)"]
    assert "Table 13: 0 of 16 cells measured" in text


def test_a_table_of_our_own_keeps_the_papers_order_of_rows(store: Path) -> None:
    names = ["CCN+LS", "SM", "ours", "CCN"]
    rows = [row(name, column, table="ours") for name in names for column in ("mnist b", "mnist a")]
    head, body, text = parsed(side_by_side(CHAPTER, "ours", measured=rows, folder=store).html)
    assert list(body) == ["SM", "CCN", "CCN+LS", "ours"]
    assert head[1] == ["", "a", "b"]
    assert "the paper has no such table" in text


def test_a_table_says_how_its_numbers_were_measured(store: Path) -> None:
    rows = [
        row("SM", value=31.0, ci=(28.1, 34.2), protocol="short", dataset="mnist") | {"seed": "0 1"},
        row("CCN", value=80.0, seed=2, n=10_000, protocol="short", dataset="mnist"),
    ]
    table = side_by_side(CHAPTER, "table1", columns="mnist", measured=rows, folder=store)
    head, body, text = parsed(table._repr_html_())
    assert head == [["", "mnist fgsm"], ["", "0", "0.1", "0.2", "0.3", "0.4"]]
    assert body["SM"][3] == "31.00 28.10–34.20 (31.76)"
    assert body["CCN"][3] == "80.00 (81.38)"
    assert "2 of 30 cells measured" in text and "95% interval" in text
    assert "protocol short on mnist; n = 360 to 10,000; seeds 0, 1, 2; a toy; 3 s in all" in text
    assert "not mnist" not in text and "<sup>" not in table.html
    assert "31.0" in repr(table) and "protocol short on mnist" in repr(table)


def test_a_stand_in_is_never_passed_off_as_the_papers_data_set(store: Path) -> None:
    record(CHAPTER, [row("SM"), row("LS", "cifar10 fgsm 0", dataset="cifar10-jpeg")], store)
    table = side_by_side(CHAPTER, "table1", rows=["SM"], columns="mnist", folder=store)
    assert "protocol quick on digits, not mnist" in table.html
    assert "protocol quick on digits, not mnist" in table.text
    both = side_by_side(CHAPTER, "table1", folder=store).text
    assert "on cifar10-jpeg, not cifar10" in both


def test_numbers_of_several_kinds_each_carry_a_mark(store: Path) -> None:
    rows = [
        row("SM", value=10.0),
        row("SM", "mnist fgsm 0", 98.0, protocol="short", dataset="mnist"),
        row("CCN", value=20.0, protocol="short", dataset="mnist"),
    ]
    table = side_by_side(CHAPTER, "table1", columns="mnist", measured=rows, folder=store)
    legend = dict(
        line.split(": ", 1) for line in table.text.splitlines() if re.match("[a-z]: ", line)
    )
    marks = {text.split(";")[0]: mark for mark, text in legend.items()}
    quick, short = marks["protocol quick on digits, not mnist"], marks["protocol short on mnist"]
    _, body, _ = parsed(table.html)
    assert body["SM"][3] == f"10.00 {quick} (31.76)"
    assert body["SM"][0] == f"98.00 {short} (99.50)"
    assert body["CCN"][3] == f"20.00 {short} (81.38)"
    assert f"10.00{quick} (31.76)" in table.text


def test_rows_and_columns_are_chosen_and_ordered(store: Path) -> None:
    choice = {"rows": ["CCN", "SM"], "columns": ["mnist fgsm 0.3", "cifar10 fgsm 8/255"]}
    table = side_by_side(CHAPTER, "table1", **choice, folder=store)
    head, body, text = parsed(table.html)
    assert head == [["", "mnist fgsm", "cifar10 fgsm"], ["", "0.3", "8/255"]]
    assert body == {"CCN": ["– (81.38)", "– (69.65)"], "SM": ["– (31.76)", "– (14.30)"]}
    assert "0 of 4 cells" in text
    for wrong in ({"rows": ["nobody"]}, {"columns": ["mnist"]}, {"columns": "svhn"}):
        with pytest.raises(ValueError, match=r"no (row|column) .*: expected one of"):
            side_by_side(CHAPTER, "table1", **wrong, folder=store)
    with pytest.raises(ValueError, match=r"no table 'table10': expected one of table1, table2"):
        side_by_side(CHAPTER, "table10", folder=store)


def test_other_metrics_stand_under_their_attack_with_the_papers_decimals(store: Path) -> None:
    rows = [
        row("SM", "mnist c&w", 1.23456, metric="mean distance", table="table11", dataset="mnist"),
        row("SM", "mnist deepfool", 0.2, metric="robustness", table="table3", dataset="mnist"),
    ]
    table = side_by_side(CHAPTER, "table11", measured=rows, folder=store)
    head, body, _ = parsed(table.html)
    assert head == [["", "mnist c&w"], ["", "mean distance", "success probability"]]
    assert body["SM"] == ["1.235 (1.393)", "– (100)"]
    assert "c&amp;w" in table.html
    _, body, _ = parsed(side_by_side(CHAPTER, "table3", measured=rows, folder=store).html)
    assert body["SM"] == ["0.200 (0.225)", "– (0.014)"]


def test_what_the_paper_does_not_have_is_shown_without_its_number(store: Path) -> None:
    rows = [
        row("CCN", "mnist pgd 0.3", 4.0, table="stronger"),
        row("CCN", "mnist pgd 0.3", 4.0),
        row("PGD-trained", value=90.0),
    ]
    alone = side_by_side(CHAPTER, "stronger", measured=rows, folder=store)
    assert parsed(alone.html)[1] == {"CCN": ["4.00"]} and "no such table" in alone.text
    _, body, text = parsed(
        side_by_side(CHAPTER, "table1", columns="mnist", measured=rows, folder=store).html
    )
    assert body["CCN"][3:] == ["– (81.38)", "– (60.65)", "4.00"]
    assert body["PGD-trained"] == ["", "", "", "90.00", "", ""]
    assert "0 of 30 cells measured" in text


def test_a_table_scrolls_by_itself_and_brings_no_colors(store: Path) -> None:
    html = side_by_side(CHAPTER, "table1", folder=store).html
    soup = BeautifulSoup(html, "html.parser")
    assert {tag["style"] for tag in soup.find_all(style=True)} == {"overflow-x:auto"}
    assert len(soup.select(".side-by-side-scroll table.table")) == 1
    assert "color" not in html
