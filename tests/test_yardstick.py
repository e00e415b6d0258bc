"""The criterion of the last chapters: a paired test by hand, and each of the three words."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.evaluation import Accuracy
from defenses.yardstick import judge, paired


def right(count: int, n: int = 200, images: str = "same", first: int = 0) -> Accuracy:
    at = torch.arange(n)
    return Accuracy((at >= first) & (at < first + count), images)


def test_paired_is_the_sign_test_on_the_images_that_differ() -> None:
    a = Accuracy(torch.tensor([True] * 8 + [False] * 2), "same")
    b = Accuracy(torch.tensor([False] * 7 + [True] * 2 + [False]), "same")  # 7 and 1 differ
    tail = sum(math.comb(8, k) for k in (0, 1)) / 2**8
    assert paired(a, b) == paired(b, a) == pytest.approx(2 * tail)
    assert paired(a, a) == 1.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired_is_a_probability_and_forgets_the_images_that_agree(pairs: list) -> None:
    a, b = (Accuracy(torch.tensor(of), "same") for of in zip(*pairs, strict=True))
    p = paired(a, b)
    assert 0 < p <= 1
    more = [*pairs, (True, True), (False, False)]
    assert p == paired(*(Accuracy(torch.tensor(of), "same") for of in zip(*more, strict=True)))


@pytest.mark.parametrize("images", ["other", ""])
def test_other_or_unknown_images_are_not_compared(images: str) -> None:
    with pytest.raises(ValueError, match="same images"):
        paired(right(10, images=images), right(10, images="same" if images else ""))
    with pytest.raises(ValueError, match="same images"):
        paired(right(10, n=100), right(10))


def test_the_three_words() -> None:
    twin = {0: right(20), 1: right(20)}
    assert judge({0: right(180), 1: right(180)}, twin, claimed=94.9).word == "holds"
    assert judge({0: right(180), 1: right(180)}, twin, claimed=95.1).word == "helps"
    assert judge({0: right(180), 1: right(180)}, twin).word == "helps"
    found = judge({0: right(29), 1: right(29)}, twin, claimed=10)  # 4.5 points more
    assert found.word == "does not hold" and (found.left, found.twin) == pytest.approx((14.5, 10))
    # as much as is claimed, and no more than the twin
    assert judge(twin, twin, claimed=10).word == "does not hold"


def test_every_seed_must_say_so_and_many_comparisons_ask_for_more() -> None:
    twin = {0: right(20), 1: right(20)}
    assert judge({0: right(180), 1: right(20)}, twin).word == "does not hold"
    assert judge({0: right(180), 1: right(1)}, twin).word == "does not hold"  # worse, and surely
    few = {0: right(30)}  # ten images differ: p = 2 / 1024
    assert judge(few, {0: right(20)}).word == "helps"
    assert judge(few, {0: right(20)}, comparisons=10).word == "does not hold"


def test_every_seed_needs_its_twin() -> None:
    found = judge({0: right(180)}, {0: right(20), 1: right(190)})
    assert found.word == "helps" and found.twin == pytest.approx(10)
    found = judge({0: right(180), 1: right(10)}, {0: right(20)})  # no twin at 1 yet
    assert found.word == "helps" and found.left == pytest.approx(90)
    with pytest.raises(ValueError, match=r"seeds \[0\] and \[1\]"):
        judge({0: right(20)}, {1: right(20)})
    with pytest.raises(ValueError, match="one at least"):
        judge({}, {})
