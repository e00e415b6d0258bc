"""Pictures of which one is seen: all of them there, one of them shown, each with its own text."""

import base64
import io
from typing import Any

import pytest
from bs4 import BeautifulSoup, Tag
from matplotlib.figure import Figure
from PIL import Image

from defenses import attacks, frames, plots


def drawn(height: float) -> Figure:
    figure, axes = plots.panels()
    plots.curves(axes[0, 0], {"a line": ([0, 1], [0, height])})
    return figure


def pictures(shown: frames.Frames) -> list[Tag]:
    return BeautifulSoup(shown.html, "html.parser").select("figure.frames > img")


def opened(picture: Tag) -> Image.Image:
    kind, _, data = str(picture["src"]).partition("base64,")
    assert kind == "data:image/png;"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_one_picture_is_seen_and_all_are_there() -> None:
    shown = frames.choice(
        {f"{h}": drawn(h) for h in (1, 2, 3)}, "h", "A line up to {}.", "<i>", "2"
    )
    found = pictures(shown)
    assert [p["data-frame"] for p in found] == [*shown.names] == ["1", "2", "3"]
    assert [p.has_attr("hidden") for p in found] == [True, False, True]
    assert [p["alt"] for p in found] == [f"A line up to {h}." for h in (1, 2, 3)]
    assert len({p["src"] for p in found}) == 3
    assert "&lt;i&gt;" in shown.html
    assert repr(shown) == "pictures: 1, 2, 3"


def test_a_picture_is_small_and_still_sharp() -> None:
    (found,) = pictures(frames.choice({"a": drawn(1)}, "h", "{}", "caption"))
    picture = opened(found)
    assert picture.width > 700  # at 36 rem of a page, more than a pixel each
    assert len(str(found["src"])) < 25_000


def test_a_first_picture_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no picture 'c': expected one of a, b"):
        frames.choice({"a": drawn(1), "b": drawn(2)}, "h", "{}", "caption", first="c")


def test_digits_are_read_rightly_before_an_attack_and_wrongly_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def strip(images, *, answers, **how):
        seen.append((images, answers))
        return drawn(1)

    monkeypatch.setattr(plots, "strip", strip)
    rows: dict[str, Any] = {"plain": ("none", "FGSM"), "trained": ("PGD", attacks.fgsm)}
    shown = frames.attacked(rows, sizes=(0, 0.2))
    assert shown.names == ("0", "0.2")
    (clean, before), (moved, after) = seen
    assert [(moved[row] - clean[row]).abs().max().item() for row in rows] == [
        pytest.approx(0.2, abs=1e-6)
    ] * 2
    assert [before[row] for row in rows] == [[(str(k), True) for k in range(10)]] * 2
    assert sum(right for _, right in after["plain"]) < 3
    assert sum(right for _, right in after["trained"]) > 7


def test_a_wrong_answer_is_red() -> None:
    rows = {"a row": frames.to_float(frames.zoo.images()[0][:2])}
    figure = plots.strip(rows, answers={"a row": [("7", True), ("8", False)]})
    titles = [axis.title for axis in figure.axes]
    assert [(t.get_text(), t.get_color()) for t in titles] == [("7", "#000000"), ("8", "#D00000")]
