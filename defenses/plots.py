"""The figures that more than one chapter draws. Each returns a figure for the cell's last line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's palette: told apart by color-blind readers, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def panels(
    rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 2.6, **options
) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows`` × ``columns`` panels, in inches: (figure, array of axes).

    The figure is closed at once, so that a notebook shows it once: where a cell ends with it.
    """
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, rows * height),
        dpi=120,
        layout="constrained",
        squeeze=False,
        **options,
    )
    plt.close(figure)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves(
    axis: Axes,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    **style,
) -> None:
    """Draw named lines (x, y), each in the color of its place, with a legend."""
    for color, (name, (x, y)) in zip(COLORS, lines.items(), strict=False):
        axis.plot(x, y, label=name, color=color, **({"marker": "o", "markersize": 3} | style))
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)


def strip(images: Mapping[str, Tensor], titles: Sequence[str] = (), size: float = 0.95) -> Figure:
    """Rows of images (N, C, H, W) in [0, 1], each row with its name, each column with a title."""
    count = max(len(row) for row in images.values())
    figure, axes = panels(len(images), count, width=size * count + 0.8, height=size)
    for line, (name, row) in zip(axes, images.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, row, strict=False):
            picture = image.detach().cpu().permute(1, 2, 0).squeeze(-1)
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].text(
            -0.15, 0.5, name, ha="right", va="center", transform=line[0].transAxes, fontsize=9
        )
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    return figure


def scatter(axis: Axes, points: Tensor, labels: Tensor, names: Iterable[str] = ()) -> None:
    """Points (N, 2) in the colors of their labels, with equal scales and no ticks."""
    palette = plt.get_cmap("tab10")
    points, labels = points.detach().cpu(), labels.cpu()
    for number, label in enumerate(labels.unique().tolist()):
        chosen = points[labels == label]
        axis.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=4,
            linewidths=0,
            alpha=0.7,
            color=palette(label % 10 if not names else number),
            label=str(label),
        )
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(xticks=[], yticks=[])


def dumbbells(
    axis: Axes, rows: Sequence[str], points: Mapping[str, Sequence[float]], *, xlabel: str = ""
) -> None:
    """For each row a line between its values, one named point for each entry of ``points``."""
    places = np.arange(len(rows))[::-1]
    values = np.array([*points.values()])
    axis.hlines(places, values.min(axis=0), values.max(axis=0), color="#BBBBBB", linewidth=2)
    for color, (name, x) in zip(COLORS, points.items(), strict=False):
        axis.scatter(x, places, label=name, color=color, s=36, zorder=3)
    axis.set_yticks(places, rows)
    axis.set(xlabel=xlabel, xlim=(-3, 103))
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3)
