"""The trained networks that come with the book, for the module and for the page that attacks them.

    python -m book.zoo --results FOLDER    writes `defenses/weights` from a campaign's checkpoints

What the folder does not hold yet is trained, and kept there. `make book` makes the script that the
page "Attack it yourself" loads: the same weights as text, because a page opened from a disk may
load a script and nothing else.
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from defenses import evaluate, models, zoo
from defenses.batchout import BatchOut
from defenses.compact import CompactConv2d, CompactLinear
from defenses.data import to_float
from defenses.prototype import Prototypes
from defenses.results import best, rows_of

CHAPTER, DATA, PROTOCOL, SEED = "reevaluation", "mnist", "short", 0
COLUMNS = {"clean": "leaderboard", "worst 0.1": "third", "worst 0.3": "leaderboard"}  # their tables


def export(results: Path, data_root: str = "") -> None:
    """Write the file of every network, and that of the images.

    Raises
    ------
    RuntimeError
        Rounding changed what a network says of more than one image in two hundred.
    """
    from book import campaign  # it brings Matplotlib, which the pages do without

    notebook = campaign.CHAPTERS / f"{CHAPTER}.ipynb"
    parameters = {"protocol": PROTOCOL, "dataset": DATA, "seed": SEED, "only": "(none)"}
    parameters |= {"results": str(results.resolve()), "data_root": data_root, "device": "cpu"}
    names = campaign.execute(notebook, parameters)
    images, labels = names["shared"]
    x, right = to_float(images), torch.ones(len(labels), dtype=torch.bool)
    zoo.FOLDER.mkdir(exist_ok=True)
    for name in zoo.NAMES[DATA]:
        trained, file = names["trained"][name].eval(), zoo.path(name, DATA)
        np.savez_compressed(file, **zoo.rounded(in_a_row(trained).state_dict()))  # type: ignore[arg-type]
        loaded = models.pretrained(name, DATA)
        before, after = (model(x).detach().argmax(1) for model in (trained, loaded))
        if (changed := int((before != after).sum())) > len(labels) / 200:
            raise RuntimeError(f"{name}: rounding changed {changed} of {len(labels)} answers")
        right &= after == labels
        accuracy = evaluate(loaded, (images, labels))
        size = file.stat().st_size / 1000
        print(f"{name:22}{size:4.0f} kB  {accuracy.percent:.1f}% clean, {changed} answers changed")
    first = [int((right & (labels == digit)).nonzero()[0, 0]) for digit in labels.unique()]
    np.savez_compressed(
        zoo.path("images", DATA), images=images[first].numpy(), labels=labels[first].numpy()
    )


def in_a_row(model: nn.Module) -> nn.Sequential:
    """The layers that images meet once the network is trained, one behind the other."""
    model = model.network if isinstance(model, Prototypes) else model
    aside = nn.Sequential | BatchOut  # BatchOut mixes while it trains, and is the identity here
    return nn.Sequential(*[layer for layer in model.modules() if not isinstance(layer, aside)])


def stored(folder: Path | None = None) -> pd.DataFrame:
    """The stored accuracies in percent of each network; NaN where nobody has measured it.

    They are of the networks as they were trained, before their weights were rounded, and of their
    seed.
    """
    rows = rows_of(CHAPTER, folder)
    rows = rows[rows["seed"].eq(str(SEED))]
    cells = best(CHAPTER, rows, dataset=DATA, protocol=PROTOCOL, folder=folder)
    cells = cells[cells["table"].eq(cells["column"].map(COLUMNS))]
    table = cells.pivot(index="row", columns="column", values="value")
    return table.reindex(index=zoo.NAMES[DATA], columns=list(COLUMNS))


def script(folder: Path | None = None) -> str:
    """JavaScript that defines `ZOO`: the networks, layer by layer, and the images to attack."""
    accuracies = stored(folder)
    networks = {
        name: {
            "accuracies": {c: v for c, v in accuracies.loc[name].items() if not pd.isna(v)},
            "layers": layers(name),
        }
        for name in zoo.NAMES[DATA]
    }
    images = [
        {"label": int(label), "pixels": _text(image)["data"]}
        for image, label in zip(*(part.numpy() for part in zoo.images(DATA)), strict=True)
    ]
    return f"globalThis.ZOO = {json.dumps({'networks': networks, 'images': images})};\n"


def layers(name: str) -> list[dict[str, Any]]:
    """The layers of a network, each with its `kind`, its settings and its weights as text."""
    packed, found = zoo.arrays(zoo.path(name, DATA)), []
    for at, layer in enumerate(models.pretrained(name, DATA)):
        if isinstance(layer, nn.Flatten):
            continue  # the page's activations are flat
        compact = isinstance(layer, CompactConv2d | CompactLinear)
        linear = isinstance(layer, nn.Conv2d | nn.Linear)
        kind = "compact" if compact else "linear" if linear else type(layer).__name__.lower()
        entry: dict[str, Any] = {"kind": kind}
        if linear:
            entry |= {"stride": 1, "padding": 0}
        if isinstance(layer, nn.Conv2d):
            entry |= {"stride": layer.stride[0], "padding": layer.padding[0]}
        if compact:
            entry |= {"delta": layer.delta}
        own = f"{at}."
        weights = {key.removeprefix(own): a for key, a in packed.items() if key.startswith(own)}
        found.append(entry | {key: _text(array) for key, array in weights.items()})
    return found


def _text(array: np.ndarray) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"))
    data = base64.b64encode(little.tobytes()).decode()
    return {"type": str(array.dtype), "shape": list(array.shape), "data": data}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("runs"), help="a campaign's folder")
    parser.add_argument("--data-root", default="", help="where the data are")
    options = parser.parse_args()
    export(options.results, options.data_root)
