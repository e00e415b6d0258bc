"""Pictures of which a reader sees one: a slider or a switch on the page chooses.

All are made beforehand and lie in the notebook's output, so a page needs no network for them, and
one without a script shows the first. `book/static/book.js` makes the control.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Literal

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from . import attacks, models, plots, zoo
from .data import to_float


@dataclass(frozen=True, repr=False)
class Frames:
    """Pictures of which one is seen; on a page of the book a slider or a switch chooses it."""

    names: tuple[str, ...]
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"pictures: {', '.join(self.names)}"


def choice(
    pictures: Mapping[str, Figure],
    of: str,
    alt: str,
    caption: str,
    first: str = "",
    kind: Literal["slider", "switch"] = "slider",
    photographs: bool = False,
) -> Frames:
    """One of several pictures of the same width, to be chosen by name; without a script, ``first``.

    Parameters
    ----------
    pictures
        By the name that stands beside the slider or the button.
    of : str
        What is chosen, such as ``ε``.
    alt : str
        What a picture shows, for those who do not see it; ``{}`` stands for its name.
    first : str
        What is seen first; default: the first.
    photographs : bool
        The pictures keep their white ground in the dark.

    Raises
    ------
    ValueError
        If ``first`` is not among the pictures.
    """
    first = first or next(iter(pictures))
    if first not in pictures:
        raise ValueError(f"no picture {first!r}: expected one of {', '.join(pictures)}")
    height = max(figure.get_figheight() for figure in pictures.values())
    html = f'<figure class="frames" data-of="{escape(of)}" data-kind="{kind}">'
    for name, figure in pictures.items():
        figure.set_figheight(height)
        html += f'<img data-frame="{escape(name)}" alt="{escape(alt.format(name))}"'
        html += ' class="dark-light"' * photographs + " hidden" * (name != first)
        html += f' src="data:image/png;base64,{base64.b64encode(_png(figure)).decode()}">'
    html += f'<figcaption><p><span class="caption-text">{escape(caption)}</span></p></figcaption>'
    return Frames(tuple(pictures), f"{html}</figure>")


def _png(figure: Figure, colors: int = 48, dpi: int = 144) -> bytes:
    """A small file: few colors are enough for lines, letters and gray digits."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(colors).save(small, format="png", optimize=True)
    return small.getvalue()


def beside(draw: Callable[[bool], Figure], alt: str, caption: str) -> Frames:
    """A switch: our numbers (``draw(False)``), or the paper's beside them (``draw(True)``)."""
    pictures = {"ours": draw(False), "the paper's beside them": draw(True)}
    return choice(pictures, "Whose numbers", alt, caption, kind="switch")


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "FGSM": attacks.fgsm,
    "FGSM, rounded": partial(attacks.fgsm, loss="ce_textbook"),
    "Auto-PGD": partial(attacks.apgd, steps=30, seed=0),
}


PLAIN_AND_TRAINED: dict[str, tuple[str, str]] = {
    "plain, FGSM": ("none", "FGSM"),
    "plain, Auto-PGD": ("none", "Auto-PGD"),
    "trained, Auto-PGD": ("PGD", "Auto-PGD"),
}


def attacked(
    rows: Mapping[str, tuple[str, str | Callable[..., Tensor]]] = PLAIN_AND_TRAINED,
    sizes: Sequence[float] = (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
) -> Frames:
    """The ten digits of the zoo as growing attacks leave them, and what the networks say.

    ``rows`` holds, by its name, a network of `models.pretrained` and one of `ATTACKS`, or an
    attack that takes ``eps``.
    """
    digits, y = zoo.images()
    x = to_float(digits)

    def seen(eps: float) -> Figure:
        images, answers = {}, {}
        for name, (network, attack) in rows.items():
            model = models.pretrained(network)
            attack = ATTACKS[attack] if isinstance(attack, str) else attack
            images[name] = attack(model, x, y, eps=eps) if eps else x
            with torch.no_grad():
                said = model(images[name]).argmax(dim=1).tolist()
            answers[name] = [(str(k), k == true) for k, true in zip(said, y.tolist(), strict=True)]
        return plots.strip(images, size=0.45, answers=answers)

    alt = f"Ten digits, attacked at ε = {{}}, and the network's answers: {'; '.join(rows)}."
    caption = "Ten digits of MNIST, attacked in a box of size ε, and what a network says to each."
    pictures = {f"{eps:g}": seen(eps) for eps in sizes}
    return choice(pictures, "ε", alt, caption, f"{sizes[len(sizes) // 2]:g}", photographs=True)
