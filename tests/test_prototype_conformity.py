"""What `chapters/prototype_conformity` says in words follows from its stored rows.

Asked of the same images, at 99%, for so many questions at once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import pytest

from defenses.results import KEY, best, printed, value
from defenses.yardstick import Place, above

CHAPTER = "prototype_conformity"
TEXT = Path(__file__).parents[1] / "chapters" / f"{CHAPTER}.md"
SOFTMAX, OURS, RELEASED = "Softmax", "Ours", "Released loss"
FGSM, PGD = " + AdvTrain FGSM", " + AdvTrain PGD"
CONTROL, BOTH = SOFTMAX + PGD, OURS + PGD
ALONE = [SOFTMAX, OURS, RELEASED]
SEVEN = [kind + how for kind in (SOFTMAX, OURS) for how in ("", FGSM, PGD)] + [RELEASED]
FIVE = [SOFTMAX, OURS, RELEASED, CONTROL, BOTH]
TAPS = ["layer3", "layer4", "layer5"]

AT_3 = ["fgsm 0.3", "bim 0.3", "mim 0.3", "pgd 0.3"]
TEN_STEPS = [f"{kind} {e}" for kind in ("bim", "mim", "pgd") for e in ("0.1", "0.15")]
AT_1 = ["clean", "fgsm 0.1", "fgsm 0.2", *TEN_STEPS]
WITH_C = ["c&w 0.1", "c&w 1.0", "c&w 10.0"]

STORE = best(CHAPTER, dataset="mnist").set_index(KEY).sort_index()
more: Callable[..., bool] = partial(above, CHAPTER, data="mnist")


def stored(table: str, row: str, column: str, metric: str = "accuracy") -> Any:
    return STORE.loc[(table, row, f"mnist {column}", metric)]


def ours(*place: str) -> float:
    return float(stored(*place)["value"])


def theirs(table: str, row: str, column: str) -> float:
    return value(CHAPTER, table, row, column, source="paper")


def told(left: str, right: str, table: str, columns: Sequence[str]) -> list[str]:
    """The columns in which row `left` is more than `right`, of all these."""
    among = len(columns)
    return [c for c in columns if more((table, left, c), (table, right, c), among)]


def clear(high: Place, low: Place) -> bool:
    """Whether the two intervals part, of images that are not the same ones: made elsewhere."""
    return bool(stored(*high)["ci_low"] > stored(*low)["ci_high"])


def apart(one: Place, two: Place, among: int) -> bool:
    return more(one, two, among) or more(two, one, among)


def within(table: str, row: str, column: str) -> int:
    """-1, 0 or 1: the paper's number lies below, in or above our interval."""
    cell, paper = stored(table, row, column), theirs(table, row, f"mnist {column}")
    return int(paper > cell["ci_high"]) - int(paper < cell["ci_low"])


def test_more_needs_the_same_images_and_a_difference_that_they_can_show() -> None:
    for other in (("table2", OURS, "clean"), ("table2", OURS, "c&w 10")):
        with pytest.raises(ValueError, match="cannot be compared"):
            more(("strong", OURS, "pgd-100 0.1"), other)
    high, low = ("strong", OURS, "pgd-100 0.1"), ("strong", SOFTMAX, "pgd-100 0.1")
    assert more(high, low) and not more(low, high) and not more(high, high)
    near = ("table9", OURS, "pgd 0.1")
    assert ours(*near) > ours(*high) and more(near, high) and not more(near, high, 10**12)


def test_tables_2_and_9() -> None:
    assert told(OURS, SOFTMAX, "table2", AT_3) == AT_3
    assert told(OURS, SOFTMAX, "table9", AT_1) == AT_1[1:]
    assert told(SOFTMAX, OURS, "table9", ["clean"]) == []
    assert told(SOFTMAX, RELEASED, "table9", AT_1[1:]) == AT_1[1:]
    assert told(SOFTMAX, RELEASED, "table2", AT_3) == ["fgsm 0.3"]
    assert told(SOFTMAX, RELEASED, "table9", WITH_C) == []
    for table, columns in (("table2", AT_3), ("table9", AT_1), ("table9", WITH_C)):
        assert told(RELEASED, SOFTMAX, table, columns) == []
    order = [("table2", OURS, f"{kind} 0.3") for kind in ("fgsm", "mim", "bim", "pgd")]
    assert all(more(*two, 3) for two in pairwise(order))


def test_where_our_numbers_are_the_papers() -> None:
    cells = [("table9", column) for column in AT_1[1:]] + [("table2", c) for c in AT_3]
    placed = {c: within(table, OURS, c) for table, c in cells}
    assert {c for c in placed if placed[c] == 0} == {"bim 0.1", "mim 0.1", "bim 0.3"}
    assert {c for c in placed if placed[c] == 1} == {"fgsm 0.1", "pgd 0.3"}
    sent = "black-box fgsm 0.3"
    less = theirs("table2", OURS, f"mnist {sent}") - ours("table2", OURS, sent)
    assert within("table2", OURS, sent) == 1 and less < 5
    assert ours("table2", SOFTMAX, sent) > 3 * theirs("table2", SOFTMAX, f"mnist {sent}")


def test_carlini_and_wagner() -> None:
    assert all(ours("table9", n, "c&w 10.0") == 0 for n in ALONE)
    assert all(ours("table9", n, "c&w 0.1") >= 95 for n in SEVEN)
    assert [within("table9", OURS, c) for c in WITH_C] == [0, 0, 1]
    assert ours("table9", SOFTMAX, "c&w 1.0") == 0 and ours("table9", SOFTMAX, "c&w 0.1") >= 95
    assert [within("table9", SOFTMAX, c) for c in WITH_C[:2]] == [-1, 1]


def test_adversarial_training_beside_it() -> None:
    assert told(CONTROL, OURS, "table2", AT_3) == AT_3
    assert told(CONTROL, OURS, "table9", AT_1) == ["fgsm 0.2", *TEN_STEPS]
    assert told(OURS, CONTROL, "table9", AT_1) == ["clean"]
    assert told(BOTH, CONTROL, "table2", AT_3) == AT_3[:3]
    assert told(BOTH, CONTROL, "table9", AT_1) == told(CONTROL, BOTH, "table9", AT_1) == []
    assert told(BOTH, OURS, "table9", AT_1) == AT_1[1:] and told(OURS, BOTH, "table9", AT_1)
    assert told(BOTH, CONTROL, "table2", ["c&w 10"]) == ["c&w 10"]
    assert told(CONTROL, OURS, "table9", WITH_C) == []
    one, other = OURS + FGSM, SOFTMAX + FGSM
    assert told(one, other, "table2", AT_3) == AT_3[1:]
    assert ours("table2", other, "fgsm 0.3") > 6 * ours("table2", other, "pgd 0.3")


def test_curves() -> None:
    sizes = ["0.05", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5"]
    columns = [f"{kind} {e}" for kind in ("fgsm", "mim", "pgd") for e in sizes]
    assert all(ours("figure4", OURS, c) >= ours("figure4", SOFTMAX, c) for c in columns)
    middle = {c for c in columns if c.split()[1] in sizes[1:5]}
    assert middle <= {*told(OURS, SOFTMAX, "figure4", columns)}
    fgsm, mim, pgd = (ours("figure4", OURS, f"{kind} 0.3") for kind in ("fgsm", "mim", "pgd"))
    assert fgsm > 2 * mim > 10 * pgd
    at_end = {k: [ours("figure4", n, f"{k} 0.5") for n in ALONE] for k in ("fgsm", "mim", "pgd")}
    assert max(at_end["fgsm"]) < 100 / 6 and max(at_end["mim"] + at_end["pgd"]) < 0.5


def test_other_peoples_images() -> None:
    sent = [f"black-box {column}" for column in (*AT_3, "c&w 10")]
    assert told(OURS, SOFTMAX, "table2", sent) == told(SOFTMAX, OURS, "table2", sent) == []
    assert all(told(n, OURS, "table2", sent[:4]) for n in SEVEN if FGSM in n or PGD in n)
    white = [(("table2", OURS, f"black-box {c}"), ("table2", OURS, c)) for c in AT_3]
    assert [clear(*two) for two in white] == [False, True, True, True]
    assert 70 < ours("transfer", OURS, "crafted on VGG-19") < 80
    assert 20 < ours("transfer", OURS, f"crafted on {SOFTMAX}") < 30


def test_losses_of_the_attack() -> None:
    losses = ["textbook", "exact", "margin", "joint", "confusion"]
    at = {
        (name, loss, e): ("losses", name, f"{loss} {e}")
        for name, loss, e in product((OURS, RELEASED, BOTH), losses, ("0.1", "0.15", "0.2"))
    }
    small = [ours(*at[OURS, k, "0.1"]) for k in losses]
    assert max(small) - min(small) < 5
    assert ours("losses", OURS, "all 0.2") < min(ours(*at[OURS, k, "0.2"]) for k in losses)
    both = [(at[n, "textbook", e], at[n, "exact", e]) for n, k, e in at if k == "exact"]
    assert len(both) == 9 and not any(apart(*two, 9) for two in both)

    def joint(name: str, kind: str) -> tuple[Place, Place]:
        return ("table2", name, f"{kind} 0.3"), ("adaptive", name, f"joint {kind} 0.3")

    for kind in ("bim", "mim"):
        assert more(*joint(OURS, kind)[::-1], 3)
    assert more(*joint(OURS, "pgd"), 3)
    assert all(more(*joint(BOTH, kind), 3) for kind in ("fgsm", "bim", "mim"))
    assert not apart(*joint(BOTH, "pgd"), 3)
    frame = printed(CHAPTER)
    third = frame[(frame["table"] == "table3") & (frame["dataset"] == "cifar10")]
    cells = third.set_index(["row", "column"])["value"]
    pairs = [
        (cells[r, c], cells[r, c.replace("joint ", "")]) for r, c in cells.index if "joint" in c
    ]
    assert len(pairs) == 12 and 1.9 < max(abs(a - b) for a, b in pairs) < 2.05


def test_the_other_rule() -> None:
    def two(tap: str, e: str) -> tuple[Place, Place]:
        return ("losses", OURS, f"margin {e}"), ("nearest", OURS, f"{tap} pgd {e}")

    assert not apart(*two("layer5", "0.1"), 6)
    assert all(more(*two(tap, "0.1"), 6) for tap in TAPS[:2])
    assert all(more(*two(tap, "0.2"), 6) for tap in TAPS)
    assert min(TAPS, key=lambda tap: ours(*two(tap, "0.2")[1])) == "layer3"
    assert min(ours("nearest", OURS, f"{tap} clean") for tap in TAPS) > 99


def test_which_layer() -> None:
    early, late = ["None", "Layer 1", "Layer 2", "Layer 3"], ["Layer 4", "Layer 5"]
    pair, three = "Layer 4+5", "Layer 3+4+5"

    def at(column: str, *names: str) -> list[Place]:
        return [("layers", name, column) for name in names]

    def all_more(highs: Sequence[str], lows: Sequence[str], column: str) -> bool:
        among = len(highs) * len(lows)
        return all(more(*at(column, *two), among) for two in product(highs, lows))

    for column in ("clean", "pgd 0.1"):
        assert all_more(["None"], early[1:3], column)
    for column in ("pgd 0.1", "pgd 0.15"):
        assert all_more([*late, pair, three], early, column)
        for two in combinations([*late, pair, three], 2):
            one, other = at(column, *two)
            assert not apart(one, other, 6)
    assert all_more(["Layer 4"], [pair], "pgd 0.2")
    for column in ("fgsm 0.3", "pgd 0.3"):
        assert all_more(["Layer 3"], [*late, pair, three], column)
    paper = [theirs("table7", n, "cifar10 pgd 0.03") for n in (*late, pair, three)]
    assert paper == sorted(paper)
    clean = [theirs("table7", n, "cifar10 clean") for n in ("Layer 1", "Layer 2", "None")]
    assert clean == sorted(clean)


def test_gap_and_reach() -> None:
    def size(name: str, what: str, tap: str, e: float = 0.1) -> Place:
        return "rooms", name, f"{tap} {what} {e}", "mean"

    def against(what: str, tap: str, e: float, name: str = OURS) -> int:
        two = size(name, what, tap, e), size(SOFTMAX, what, tap, e)
        return int(more(*two, 18)) - int(more(*two[::-1], 18))

    def times(what: str, tap: str, e: float = 0.1, name: str = OURS) -> float:
        return ours(*size(name, what, tap, e)) / ours(*size(SOFTMAX, what, tap, e))

    for tap, e in product(TAPS, (0.1, 0.3)):
        assert against("gap", tap, e) == against("reach", tap, e) == 1
        assert 0.7 < times("reach", tap, e) / times("gap", tap, e) < 1.5
    assert times("gap", "layer3") > 10
    assert [against("ratio", tap, 0.1) for tap in TAPS] == [1, 0, 1]
    assert [against("ratio", tap, 0.3) for tap in TAPS] == [1, -1, 0]
    for tap in TAPS:
        ratio = {name: ours(*size(name, "ratio", tap)) for name in FIVE}
        assert ratio[RELEASED] < ratio[SOFTMAX]
        assert (ratio[SOFTMAX] < ratio[OURS]) == (tap != "layer4")
        rest = (size(name, "ratio", tap) for name in FIVE if name != CONTROL)
        assert all(more(size(CONTROL, "ratio", tap), place, 12) for place in rest)
        assert against("gap", tap, 0.1, RELEASED) == against("reach", tap, 0.1, RELEASED) == -1
        assert times("gap", tap, name=RELEASED) < times("reach", tap, name=RELEASED)
        assert times("reach", tap, name=CONTROL) < times("gap", tap, name=CONTROL) < 1
    for tap, e in product(TAPS[1:], (0.1, 0.3)):
        both, control = (ours(*size(n, "ratio", tap, e)) for n in (BOTH, CONTROL))
        assert both < control / 2
    assert against("ratio", "layer5", 0.3, BOTH) == -1
    kept = [ours("strong", name, "pgd-10 0.1") for name in (RELEASED, SOFTMAX, OURS)]
    assert kept == sorted(kept)
    at_last = {n: [ours("rooms", n, f"{tap} apart 0.3") for tap in TAPS] for n in FIVE}
    assert all((max(shares) > 0) == (n == CONTROL) for n, shares in at_last.items())


def test_longer_attacks() -> None:
    def at(column: str, *names: str) -> list[Place]:
        return [("strong", name, column) for name in names]

    assert more(*at("pgd-100 0.1", OURS, SOFTMAX), 2) and more(
        *at("pgd-100 0.1", SOFTMAX, RELEASED)
    )
    assert more(*at("autoattack 0.1", OURS, SOFTMAX))
    assert all(ours("strong", n, f"autoattack {e}") == 0 for n in ALONE for e in (0.2, 0.3))
    by_more = [("strong", OURS, f"{kind} 0.1") for kind in ("pgd-10", "pgd-100", "autoattack")]
    assert all(more(*two, 2) for two in pairwise(by_more))
    assert 55 < ours("strong", OURS, "pgd-10 0.2") < 65
    assert 20 < ours("strong", OURS, "pgd-100 0.2") < 30
    for e in (0.2, 0.3):
        assert all(more(*at(f"autoattack {e}", name, OURS), 4) for name in (CONTROL, BOTH))
    longer = ("pgd-10 long", "pgd-100", "autoattack")
    for kind, e in product(longer, (0.1, 0.2, 0.3)):
        one, two = at(f"{kind} {e}", BOTH, CONTROL)
        by_steps = e == 0.3 and kind != "autoattack"
        assert more(one, two, 9) if by_steps else not apart(one, two, 9)
    assert all(more(("table2", OURS, "fgsm 0.3"), ("table2", OURS, c), 3) for c in AT_3[1:])


def test_signs_of_masking() -> None:
    for name in (SOFTMAX, OURS, RELEASED, BOTH):
        sign = {k: ("masking", name, k) for k in ("pgd", "fgsm", "margin", "transfer")}
        assert not more(sign["pgd"], sign["fgsm"], 14) and not more(sign["pgd"], sign["margin"], 14)
        if name != SOFTMAX:
            assert clear(sign["transfer"], sign["pgd"]) == (name != BOTH)
            assert not clear(sign["pgd"], sign["transfer"])
        assert ours("masking", name, "zero_gradients") == 0
        assert (ours("masking", name, "at_half") > 50) == (name == BOTH)
        square, white = (stored("masking", name, k) for k in ("black_box", "pgd"))
        assert square["ci_high"] > white["ci_low"]
    leads = [("masking", name, "lead", "mean") for name in (SOFTMAX, OURS)]
    assert more(*leads) and ours("masking", OURS, "probability 1") == 0
    pgd, fgsm, margin = (ours("masking", OURS, kind) for kind in ("pgd", "fgsm", "margin"))
    assert pgd <= min(fgsm, margin)


def test_rooms_in_the_plane() -> None:
    shares = {
        (name, e): ours("plane", f"{name}, 2-d", f"overlap {e}", "share")
        for name, e in product((SOFTMAX, OURS), (0.05, 0.1, 0.2, 0.3))
    }
    assert all(0 < shares[OURS, e] <= shares[SOFTMAX, e] for e in (0.05, 0.1, 0.2, 0.3))
    assert 3.5 < shares[SOFTMAX, 0.1] / shares[OURS, 0.1] < 4.5
    assert min(shares[name, e] for name in (SOFTMAX, OURS) for e in (0.2, 0.3)) > 50


def test_the_authors_page() -> None:
    page = {
        k: theirs("cited", "the repository's page", f"cifar10 {k} 8/255") for k in ("fgsm", "pgd")
    }
    paper = {k: theirs("table3", OURS, f"cifar10 {k} 8/255") for k in page}
    assert page["fgsm"] < paper["fgsm"] and page["pgd"] > paper["pgd"]
