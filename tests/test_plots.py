"""Figures: one color a defense, letters that a phone can show, legends off the curves."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from defenses import plots

PHONE = 343  # pixels that a page has for a figure there


def drawn(names: list[str]) -> dict[str, str]:
    _, axes = plots.panels()
    plots.curves(axes[0, 0], {name: ([0, 1], [0, 1]) for name in names})
    return {str(line.get_label()): to_hex(line.get_color()).upper() for line in axes[0, 0].lines}


def test_a_defense_has_its_color_in_every_company_and_under_every_name() -> None:
    alone, among = drawn(["CCN"]), drawn(["LS", "compact", "BatchOut", "CCN"])
    assert alone["CCN"] == among["CCN"] == among["compact"] == "#0072B2"
    assert len({name for names in plots.DEFENSES.values() for name in names}) == len(plots.COLOR_OF)


def test_other_lines_get_colors_that_no_defense_has_taken() -> None:
    found = drawn(["one", "PGD", "two", "SM", "three"])
    assert len(set(found.values())) == 5
    many = drawn([str(number) for number in range(10)])
    assert len(set(many.values())) == len(plots.COLORS)


def test_letters_can_be_read_on_a_phone() -> None:
    figure, axes = plots.panels(columns=2)
    axes[0, 0].set(title="title", xlabel="x")
    axis = axes[0, 0]
    texts = [axis.title, axis.xaxis.label, *axis.get_xticklabels()]
    points = min(text.get_fontsize() for text in texts)
    assert points * PHONE / (72 * figure.get_figwidth()) >= 9


@pytest.mark.parametrize(("names", "columns"), [(1, 1), (1, 2), (6, 1), (6, 2)])
def test_a_legend_names_each_line_once_and_lies_on_no_panel(names: int, columns: int) -> None:
    figure, (axes,) = plots.panels(columns=columns)
    lines = {f"a defense by the name of {k}": ([0, 1], [0, 1]) for k in range(names)}
    for axis in axes:
        plots.curves(axis, lines, title="title")
    plots.legend(figure)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*lines]
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_tightbbox()) for axis in axes)
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_points_have_a_shape_each_and_the_color_of_their_defense() -> None:
    _, ((axis,),) = plots.panels()
    plots.points(axis, {"none": (1, 20), "PGD": (6, 90), "soft labels": (1, 2)}, xlabel="cost")
    marks = {line.get_label(): line for line in axis.get_lines()}
    assert [*marks] == ["none", "PGD", "soft labels"]
    assert len({line.get_marker() for line in marks.values()}) == 3
    assert marks["PGD"].get_color() == plots.COLOR_OF["PGD"] != marks["soft labels"].get_color()
    assert [*marks["PGD"].get_xydata()[0]] == [6, 90] and axis.get_xlabel() == "cost"


def test_a_heat_map_says_each_number_in_its_place() -> None:
    _, ((axis,),) = plots.panels()
    table = pd.DataFrame([[1.0, 99.6], [50.0, 0.0]], index=["reads", "too"], columns=["a", "b"])
    plots.heat_map(axis, table, title="ε = 0.1")
    written = {text.get_position(): text.get_text() for text in axis.texts}
    assert written == {(0, 0): "1", (1, 0): "100", (0, 1): "50", (1, 1): "0"}
    names = [
        [tick.get_text() for tick in ticks]
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels())
    ]
    assert names == [["a", "b"], ["reads", "too"]]


def test_the_maps_of_twins_are_the_brightest_and_an_image_keeps_its_colors() -> None:
    image, maps = torch.rand(1, 3, 4, 4), torch.zeros(1, 2, 4, 4)
    maps[0, 1] = 1  # the brighter one of the clean image
    clean = {"image": image, "maps 1": maps, "block 1": maps.flip(1)}
    twin = {"image": 1 - image, "maps 1": 2 * maps, "block 1": maps.flip(1)}
    figure = plots.twin_maps({"PGD": (clean, twin)}, [*clean])
    rows = figure.axes[:3], figure.axes[3:]
    seen = [[np.asarray(axis.images[0].get_array()) for axis in row] for row in rows]
    assert np.allclose(seen[0][0], image[0].permute(1, 2, 0))
    assert np.allclose(seen[1][0], 1 - image[0].permute(1, 2, 0))
    assert [[float(maps.max()) for maps in row[1:]] for row in seen] == [[1, 0], [2, 0]]


def test_spectra_leave_no_empty_axes() -> None:
    layers = {name: torch.nn.Linear(3, 3) for name in "abcd"}
    figure = plots.spectra({"SM": torch.nn.ModuleDict(layers)}, [*layers])
    assert [axis.axison for axis in figure.axes] == [True] * 4 + [False] * 2
    curve = np.asarray(figure.axes[0].lines[0].get_ydata()).tolist()
    assert curve[0] == 1 and len(curve) == 3 and curve == sorted(curve, reverse=True)
