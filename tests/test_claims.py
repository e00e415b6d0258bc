"""The claims of the sources: the tests behind each answer, and the book's own file of them."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import arange

from book.execute import picture
from defenses import claims, outcomes, results
from defenses.evaluation import Accuracy
from defenses.results import measure, record
from defenses.yardstick import LEVEL, above, difference, paired

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path.stem for path in claims._sources(ROOT / "chapters")]
ALL = [each for chapter in SOURCES for each in claims.claims(chapter)]
RIGHT = {"a": 900, "same": 899, "b": 700, "near": 872, "none": 0}


def accuracy(right: int, n: int) -> Accuracy:
    return Accuracy(arange(n) < right, images="i")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of chapters with one source, whose rows are `RIGHT` of 1,000 images."""
    (tmp_path / "paper").mkdir()
    heads = "table,row,column,metric,value,dataset,note\n"
    (tmp_path / "paper" / "toy.csv").write_text(heads + "t,a,x,accuracy,94.5,mnist,\n")
    how: dict[str, Any] = {"protocol": "short", "dataset": "mnist", "device": "cpu", "seed": 0}
    rows = []
    for name, count in RIGHT.items():
        kept = accuracy(count, 1000)
        ci = (100 * kept.ci[0], 100 * kept.ci[1])
        place = ("t", name, "x", "accuracy")
        rows.append(measure(*place, kept.percent, n=1000, ci=ci, seconds=1.0, images="i", **how))
    rows.append(measure("t", "few", "x", "accuracy", 50.0, n=10, ci=(20, 80), seconds=1.0, **how))
    rows.append(measure("t", "time", "x", "ratio", 1.5, n=1, seconds=1.0, **how))
    record("toy", rows, tmp_path)
    for module in (results, claims, outcomes):
        monkeypatch.setattr(module, "chapters_folder", lambda *_: tmp_path)
    return tmp_path


def claim(*tests: str, **at: str) -> claims.Claim:
    names = {name: f"t / {name} / x" for name in [*RIGHT, "few"]}
    names |= {"time": "t / time / x / ratio", "printed": "paper: t / a / x"}
    return claims.Claim("toy", "quote", "here", "there", names | at, "{a} of {printed}", tests)


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        (["a > b"], True),
        (["b > a"], False),
        (["b < a"], True),
        (["a > same"], None),
        (["a < same"], None),
        (["a > 50"], True),
        (["a > 90"], None),
        (["a < 50"], False),
        (["a ~ b"], False),
        (["a ~ a"], None),  # a thousand images do not decide about one point
        (["none ~ none"], True),
        (["a >= b"], True),
        (["a >= printed"], None),  # 4.5 points below what is printed, of a thousand images
        (["b >= printed"], False),
        (["time < 1.05"], False),
        (["time > 1.05"], True),
        (["a > 2 b"], False),
        (["a > 1.2 b"], True),
        (["a > b", "a > same"], None),
        (["a > b", "b > a", "a > same"], False),
        (["a > near"], None),
    ],
)
def test_an_answer_is_what_its_tests_say(
    tests: list[str], expected: bool | None, shelf: Path
) -> None:
    assert claim(*tests).answer(tests) is expected


def test_a_stored_number_is_above_another_or_not(shelf: Path) -> None:
    places = {name: ("t", name, "x") for name in RIGHT}
    assert above("toy", places["a"], places["b"]) and not above("toy", places["b"], places["a"])
    assert not above("toy", places["a"], places["same"])
    assert above("toy", places["a"], (*places["b"], "accuracy"), among=1000)
    record("toy", [row | {"column": f"mnist {row['column']}"} for row in _rows(shelf)], shelf)
    assert above("toy", places["a"], places["b"], data="mnist")
    with pytest.raises(ValueError, match="cannot be compared: n 1000"):
        above("toy", places["a"], ("t", "few", "x"))


def _rows(shelf: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in results.rows_of("toy", shelf).to_dict("records")]


def test_more_tests_ask_for_more(shelf: Path) -> None:
    names = [name for name in RIGHT if name != "near"]
    assert difference(*(claim().rows[name] for name in ("a", "near")))[0] < 0
    low, high = difference(*(claim().rows[name] for name in ("a", "b")), among=len(names))
    once = difference(*(claim().rows[name] for name in ("a", "b")))
    assert low < once[0] < once[1] < high


def test_three_seeds_are_widened_as_students_t() -> None:
    """Seeds 90, 91, 92: the 99% interval of their mean is 91 ± t(0.995, 2)/√3."""
    low, high = stats.t.interval(0.95, 2, loc=91, scale=1 / 3**0.5)
    row = SimpleNamespace(value=91.0, ci_low=low, ci_high=high, seed="0 1 2")
    sure = SimpleNamespace(value=0.0, ci_low=0.0, ci_high=0.0)
    expected = stats.t.interval(0.99, 2, loc=91, scale=1 / 3**0.5)
    assert difference(row, sure, same=False) == pytest.approx(expected)
    halved = stats.t.interval(0.995, 2, loc=91, scale=1 / 3**0.5)
    assert difference(row, sure, same=False, among=2) == pytest.approx(halved)


def test_what_cannot_be_compared_or_read_is_refused(shelf: Path) -> None:
    for test in ("a > few", "a >= few"):
        with pytest.raises(ValueError, match="cannot be compared: n 1000"):
            claim().answer([test])
    with pytest.raises(ValueError, match=r"cannot read the test 'a = b'"):
        claim().answer(["a = b"])
    with pytest.raises(ValueError, match="nobody has measured toy / t / nobody / x"):
        claim(nobody="t / nobody / x").answer(["nobody > 5"])
    claim().answer(["few >= printed"])  # a height may be asked of other images
    for test in ("aa > b", "a > bb"):
        with pytest.raises(ValueError, match=rf"'{test}' names no row; expected two of a, same"):
            claim().answer([test])
    with pytest.raises(ValueError, match="no row of `at` was measured"):
        claims.Claim("toy", "q", "here", "there", {"c": "paper: t / a / x"}, "{c}").sentence()


def test_a_number_may_stand_for_a_row() -> None:
    row = SimpleNamespace(value=91.0, ci_low=90.0, ci_high=92.0)
    low, high = difference(row, 90, same=False)
    assert 1 - low == pytest.approx(high - 1) and low < 0 < 2 < high


def kept(folder: Path, name: str, seed: int, right: Accuracy) -> None:
    """Put a measurement with what happened to each image on the shelf."""
    place = ("t", name, "x", "accuracy")
    how: dict[str, Any] = {"protocol": "short", "dataset": "mnist", "device": "cpu", "seconds": 1.0}
    how |= {"ci": tuple(100 * end for end in right.ci), "n": right.n, "images": right.images}
    row = measure(*place, right.percent, seed=seed, **how)
    record("toy", [row], folder)
    file = folder / "results" / "toy.npz"
    outcomes.store(file, [row | {"outcome": outcomes.to_json(right)}])


def test_images_that_are_stored_decide_more_than_two_intervals(shelf: Path) -> None:
    """872 of a thousand and 900, none of them lost: the intervals touch, the paired test does not
    doubt it; nor does it where the same 28 points come of 136 images gained and 108 lost."""
    assert claim("a > near").answer(["a > near"]) is None
    kept(shelf, "near", 0, accuracy(872, 1000))
    assert claim("a > near").answer(["a > near"]) is None  # of one row alone
    kept(shelf, "a", 0, accuracy(900, 1000))
    assert claim("a > near").answer(["a > near"]) is True
    low, high = difference(*(claim().rows[name] for name in ("a", "near")))
    assert 0 < low < 2.8 < high < 5
    kept(shelf, "a", 0, Accuracy((arange(1000) < 764) | (arange(1000) >= 864), images="i"))
    assert claim("a > near").answer(["a > near"]) is None


def test_the_exact_test_has_the_last_word(shelf: Path) -> None:
    """Seven images gained of ten, none lost: p = 2/128, whatever an interval says."""
    few = Accuracy(arange(10) < 9, images="j"), Accuracy(arange(10) < 2, images="j")
    assert paired(*few) > LEVEL
    for name, right in zip("ab", few, strict=True):
        kept(shelf, name, 0, right)
    low, high = difference(*(claim().rows[name] for name in "ab"))
    assert low <= 0 < high


def test_seeds_may_arrive_one_network_at_a_time(shelf: Path) -> None:
    """A second seed of one network is not compared with the first of the other."""
    for name, count in (("a", 900), ("near", 872)):
        kept(shelf, name, 0, accuracy(count, 1000))
    before = difference(*(claim().rows[name] for name in ("a", "near")))
    kept(shelf, "a", 1, accuracy(860, 1000))
    a, near = (claim().rows[name] for name in ("a", "near"))
    assert a.value == 88 and a.seed == "0 1" and difference(a, near) == before
    assert (
        claim().sentence()
        == "88.0% of 94.5% (n = 10 to 1,000; seed 0, of some also 1; short on mnist)"
    )
    said = claim("a > near").sentence()  # what a test compares is of the seeds that both have
    assert said.startswith("90.0% of 94.5%")
    kept(shelf, "b", 1, accuracy(500, 1000))
    chained = claims.Claim("toy", "q", "", "", claim().at, "{b}", ["a > b", "a > near"])
    assert chained.sentence().startswith("70.0%")  # not the mean over a seed that a has lost
    kept(shelf, "near", 1, accuracy(872, 1000))  # better than the other: no more in every seed
    low, high = difference(*(claim().rows[name] for name in ("a", "near")))
    assert low < 0 < high == before[1]


def test_a_second_seed_near_the_first_does_not_open_what_was_decided(shelf: Path) -> None:
    """Against a number, too, every seed is asked; Student's of two seeds would decide nothing."""
    for seed, count in enumerate((970, 960)):
        kept(shelf, "a", seed, accuracy(count, 1000))
    assert claim().answer(["a > 90"]) is True and claim().answer(["a >= printed"]) is True
    kept(shelf, "a", 2, accuracy(900, 1000))
    assert claim().answer(["a > 90"]) is None


def test_without_images_a_common_seed_is_compared_by_intervals(shelf: Path) -> None:
    how: dict[str, Any] = {"protocol": "short", "dataset": "mnist", "device": "cpu", "seconds": 1.0}
    row = measure("t", "a", "x", "accuracy", 50, n=1000, ci=(47, 53), seed=1, images="i", **how)
    record("toy", [row], shelf)
    assert claim("a > b").answer(["a > b"]) is True  # 90.0 at seed 0, not the mean of 70.0
    rows = results.row_at("toy", "t", "a", "x", seeds=["1"]), claim().rows["b"]
    with pytest.raises(ValueError, match="cannot be compared: seed 1 and 0"):
        difference(*rows)


def test_the_evidence_names_its_numbers_and_how_they_were_measured(shelf: Path) -> None:
    assert claim().sentence() == "90.0% of 94.5% (n = 10 to 1,000; seed 0; short on mnist)"


@given(st.integers(1, 199), st.integers(1, 199))  # at 0 Wilson's interval is a little short
def test_a_decided_difference_is_one_also_by_the_exact_paired_test(ours: int, theirs: int) -> None:
    """The unpaired interval is on the safe side where no image speaks against it."""
    right = [accuracy(k, 200) for k in (ours, theirs)]
    rows = [
        SimpleNamespace(value=r.percent, ci_low=100 * r.ci[0], ci_high=100 * r.ci[1]) for r in right
    ]
    low, high = difference(*rows, same=False)
    if low > 0 or high < 0:
        assert paired(*right) < LEVEL


# The book's own file.


@pytest.mark.parametrize("each", ALL, ids=lambda each: f"{each.chapter}: {each.quote[:30]}")
def test_every_claim_is_answered_from_stored_rows(each: claims.Claim) -> None:
    assert each.reproduced or each.holds
    for tests in (each.reproduced, each.holds):
        assert each.answer(tests) in claims.WORDS if tests else True
    asked = set(re.findall(r"[a-z]\w*", " ".join([*each.reproduced, *each.holds])))
    shown = set(re.findall(r"\{(\w+)", each.evidence))
    assert asked <= shown == each.at.keys(), "what decides is shown, and nothing else is named"
    numbers = re.sub(r"\{[\w.]+\}|Eq\. \d+", "", each.evidence)
    typed = re.search(r"\d%|\d+ images|of \d{2,}|of \d,\d|seeds? \d", numbers)
    assert not typed, f"a number is typed into the evidence: {typed}"


def test_the_front_page_has_the_main_claim_of_every_source() -> None:
    lines = claims.answer(ROOT / "chapters").splitlines()
    assert len(lines) == 2 + len(SOURCES) == 7
    for chapter, line in zip(SOURCES, lines[2:], strict=True):
        head = claims.claims(chapter)[0]
        assert f"../chapters/{chapter}.ipynb" in line and head.quote in line
        assert line.count(" | ") == 3 and claims.WORDS[head.answer(head.holds)] in line


def test_the_picture_of_the_front_page_is_the_one_that_what_holds_drew() -> None:
    notebook = nbformat.read(ROOT / "book" / "verdicts.ipynb", as_version=4)
    assert (ROOT / "book" / "static" / "hook.png").read_bytes() == picture(notebook, "hook")
