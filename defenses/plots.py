"""The figures that more than one chapter draws. Each returns a figure for the cell's last line."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor, nn

from .models import activations

# Okabe and Ito's palette: told apart by color-blind readers, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

# Through the whole book a defense has one color, whatever its chapter calls it; none is black.
DEFENSES = {
    "#000000": ("none", "plain", "SM", "Softmax", "Baseline", "No defense", "Standard"),
    "#0072B2": ("compact", "CCN"),
    "#56B4E9": ("compact, soft labels", "CCN+LS"),
    "#D55E00": ("BatchOut",),
    "#CC79A7": ("prototypes", "Ours"),
    "#E69F00": ("Jacobian", "Jacobian regularization"),
    "#009E73": ("trained", "PGD", "Adversarially trained", "Adversarial Training"),
}
COLOR_OF = {name: color for color, names in DEFENSES.items() for name in names}

# Read at the width of a phone, a figure of 5.6 inches shows these at 9 pixels or more.
FONT: Any = {"font.size": 11, "axes.titlesize": 11, "legend.fontsize": 10, "lines.linewidth": 1.8}


def panels(
    rows: int = 1, columns: int = 1, width: float = 5.6, height: float = 2.6, **options
) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows`` × ``columns`` panels, in inches: (figure, array of axes).

    The figure is closed at once, so that a notebook shows it once: where a cell ends with it.
    """
    with plt.rc_context(FONT):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width, rows * height),
            dpi=200,
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
    lines: Mapping[str, tuple[Any, Any]],
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    paper: Mapping[str, Any] | None = None,
    **style: Any,
) -> None:
    """Draw named lines (x, y), a defense in its own color, others in one that is free.

    ``paper`` holds the y that a paper prints for some of them: open circles in the same color.
    """
    taken = {COLOR_OF.get(name) for name in lines}
    free = itertools.cycle([color for color in COLORS if color not in taken] or COLORS)
    for name, (x, y) in lines.items():
        color = COLOR_OF.get(name) or next(free)
        axis.plot(x, y, label=name, color=color, **{"marker": "o", "markersize": 3, **style})
        if paper and name in paper:
            axis.plot(x, paper[name], "o--", color=color, markerfacecolor="none", linewidth=0.7)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)


def points(axis: Axes, places: Mapping[str, tuple[float, float]], *, xlabel: str = "") -> None:
    """One mark a name at (x, y), each of another shape, a defense in its own color."""
    for mark, (name, (x, y)) in zip(itertools.cycle("oD^vs<>PX*hdp8H"), places.items()):
        style: Any = {"color": COLOR_OF.get(name, COLORS[-1]), "label": name, "clip_on": False}
        axis.plot(x, y, mark, **style)
    axis.set(xlabel=xlabel)


def heat_map(axis: Axes, table: pd.DataFrame, *, title: str = "") -> None:
    """Percentages in color, from 0 dark to 100 bright, each written into its place."""
    axis.imshow(table, cmap="viridis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        color = "black" if value > 60 else "white"
        axis.text(column, row, f"{value:.0f}", color=color, size=4, ha="center", va="center")
    axis.set_xticks(range(table.shape[1]), [*table.columns], rotation=90, fontsize=7)
    axis.set_yticks(range(table.shape[0]), [*table.index], fontsize=7)
    axis.set_title(title)


def legend(figure: Figure) -> None:
    """What the lines of all panels are called, once, above them and off every curve."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    columns = int(13 * figure.get_figwidth() / (4 + max(map(len, found))))  # 13 letters an inch
    columns = max(1, min(columns, len(found)))
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(found) // columns))
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside upper center",
        ncols=columns,
        fontsize=FONT["legend.fontsize"],
        frameon=False,
        columnspacing=1.2,
        handlelength=1.2,
    )


def strip(
    images: Mapping[str, Tensor],
    titles: Sequence[str] = (),
    size: float = 0.6,
    answers: Mapping[str, Sequence[tuple[str, bool]]] | None = None,
) -> Figure:
    """Rows of images (N, C, H, W) in [0, 1], each row with its name, each column with a title.

    ``answers`` are written above the images of a row, in red where they are wrong (False).
    """
    count = max(len(row) for row in images.values())
    height = size + 0.18 * (answers is not None)
    figure, axes = panels(len(images), count, width=size * count + 0.8, height=height)
    for line, (name, row) in zip(axes, images.items(), strict=True):
        for axis, (said, right) in zip(line, (answers or {}).get(name, ()), strict=False):
            axis.set_title(said, fontsize=10, pad=2, color="#000000" if right else "#D00000")
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, row, strict=False):
            picture = image.detach().cpu().permute(1, 2, 0).squeeze(-1)
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].text(
            -0.15, 0.5, name, ha="right", va="center", transform=line[0].transAxes, fontsize=10
        )
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=10)
    return figure


def twin_maps(
    seen: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], shown: Sequence[str]
) -> Figure:
    """Feature maps of an image above those of its adversarial twin, for each of the models.

    ``seen`` holds, by the model's name, the maps (1, C, H, W) of both, by title; ``shown`` are the
    titles. Of the C maps the one is drawn that is brightest for the image, on one scale for both;
    a title that begins with "block" shows the same one as the title before it, and an "image" of
    three channels is drawn in its colors.
    """
    figure, axes = panels(2, len(seen) * len(shown), height=1.15)
    for start, (name, pair) in enumerate(seen.items()):
        best = 0
        for column, title in enumerate(shown, start * len(shown)):
            if not title.startswith("block"):
                best = int(pair[0][title].mean((0, 2, 3)).argmax())
            maps = [maps[title][0, best].cpu().numpy() for maps in pair]
            if title == "image" and len(pair[0][title][0]) == 3:
                maps = [maps[title][0].permute(1, 2, 0).cpu().numpy() for maps in pair]
            scale = {"vmin": min(float(m.min()) for m in maps)}
            scale["vmax"] = max(float(m.max()) for m in maps)
            for axis, picture in zip(axes[:, column], maps, strict=True):
                axis.imshow(picture, cmap="magma", **scale)
                axis.axis("off")
            axes[0, column].set_title(title, fontsize=8)
        middle = len(shown) // 2
        axes[0, start * len(shown) + middle].set_title(f"{name}\n{shown[middle]}", fontsize=8)
    return figure


def scatter(axis: Axes, points: Tensor, labels: Tensor) -> None:
    """Points (N, 2) in the colors of their labels, with equal scales and no ticks."""
    points, labels = points.detach().cpu(), labels.cpu()
    classes = labels.unique().tolist()
    palette = COLORS if len(classes) <= len(COLORS) else plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for color, label in zip(itertools.cycle(palette), classes, strict=False):
        x, y = points[labels == label].T
        axis.scatter(x, y, s=4, linewidths=0, alpha=0.7, color=color, label=label)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(xticks=[], yticks=[])


def tsne_grid(
    models: Mapping[str, nn.Sequential], x: Mapping[str, Tensor], y: Tensor, layers: Sequence[str]
) -> Figure:
    """t-SNE (van der Maaten & Hinton, 2008) of each model's activations behind each layer.

    ``x`` holds one batch of images (N, C, H, W) a model, ``y`` their labels.
    """
    figure, axes = panels(len(models), len(layers), height=2.2)
    for line, (name, model) in zip(axes, models.items(), strict=True):
        for axis, layer in zip(line, layers, strict=True):
            seen = activations(model, x[name], layer).flatten(1).float().cpu().numpy()
            perplexity = min(30, len(seen) / 4)
            points = TSNE(perplexity=perplexity, random_state=0).fit_transform(seen)
            scatter(axis, torch.from_numpy(points), y)
            axis.set_title(f"{name}, {layer}", fontsize=10)
    return figure


def spectra(models: Mapping[str, nn.Module], layers: Sequence[str], most: int = 50) -> Figure:
    """The largest singular values of each layer's weight, (outputs, all inputs), by rank."""
    figure, axes = panels(-(-len(layers) // 3), 3, height=2.0)
    for axis, layer in zip(axes.flat, layers, strict=False):
        lines = {}
        for name, model in models.items():
            weight = model.get_parameter(f"{layer}.weight").detach().flatten(1).float().cpu()
            values = torch.linalg.svdvals(weight)[:most]
            lines[name] = (range(1, len(values) + 1), values / values[0])
        curves(axis, lines, title=layer, markersize=0)
    for axis in axes.flat[len(layers) :]:
        axis.axis("off")
    legend(figure)
    figure.supxlabel("singular value, by rank", fontsize=10)
    figure.supylabel("size, relative to the first", fontsize=10)
    return figure
