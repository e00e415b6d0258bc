"""Prototype conformity (Mustafa et al., 2019): features near their prototype, far from others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.contract import at_least_float32
from defenses.training import Loss

AWAY = 1e-4  # what the released code multiplies the contrastive term by


def conformity(f: Tensor, y: Tensor, w: Tensor) -> Tensor:
    r"""Eq. 5 for each image: near to one's own prototype, far from the others, and they apart.

    :math:`\lVert f - w_y \rVert - \frac{1}{k-1} \sum_{j \ne y} (\lVert f - w_j \rVert +
    \lVert w_y - w_j \rVert)`; features f (N, d), labels y (N,), prototypes w (k, d) to (N,).
    """
    to_prototypes, between = distances(f, w), distances(w, w)
    own = to_prototypes.gather(1, y[:, None]).squeeze(1)
    others = to_prototypes.sum(1) - own + between.sum(1)[y]
    return own - others / (len(w) - 1)


def released_conformity(f: Tensor, y: Tensor, w: Tensor, v: Tensor, away: float = AWAY) -> Tensor:
    r"""What the authors' code computes instead of Eq. 5, for each image.

    :math:`\lVert f - w_y \rVert^2 - \frac{\alpha}{k-1} \sum_{j \ne y} \lVert f - v_j \rVert^2`:
    squares, prototypes v (k, d) of their own for the contrast, and none between prototypes.
    """
    contrast = distances(f, v).square()
    others = contrast.sum(1) - contrast.gather(1, y[:, None]).squeeze(1)
    return (at_least_float32(f) - w[y]).square().sum(1) - away * others / (len(v) - 1)


def distances(f: Tensor, w: Tensor) -> Tensor:
    """‖f_i − w_j‖, (N, d) and (k, d) to (N, k), in float32 or wider; its derivative at 0 is 0."""
    with torch.autocast(f.device.type, enabled=False):
        exact = "donot_use_mm_for_euclid_dist"  # the other way loses small distances to rounding
        return torch.cdist(at_least_float32(f), at_least_float32(w), compute_mode=exact)


class Prototypes(nn.Module):
    """A network whose features at some layers have a trainable prototype for each class (Fig. 2).

    It maps images to the network's logits; the prototypes serve the loss alone. They are
    parameters, so that an optimizer updates them and a checkpoint holds them.

    Parameters
    ----------
    network : Sequential
        Its children have names.
    taps : mapping from a child's name to (branch, width)
        The branch G maps what that child returns to features (N, width), Eq. 9.
    released : bool
        Give each tap a second set of prototypes, and take `released_conformity` for Eq. 5.

    Raises
    ------
    ValueError
        If the network has no child of some name.

    Examples
    --------
    >>> from torch import nn
    >>> import defenses
    >>> network = defenses.models.mnist_six(narrow=8)
    >>> model = Prototypes(network, {"layer5": (nn.Identity(), 64)})
    >>> sorted(name for name, _ in model.named_parameters() if name.startswith("w"))
    ['w.layer5']
    >>> loss = prototype_conformity(0.1)  # for `defenses.fit`
    """

    def __init__(
        self,
        network: nn.Sequential,
        taps: Mapping[str, tuple[nn.Module, int]],
        num_classes: int = 10,
        released: bool = False,
    ) -> None:
        super().__init__()
        names = [name for name, _ in network.named_children()]
        if unknown := taps.keys() - set(names):
            raise ValueError(f"no layer {sorted(unknown)} to tap; the layers are {names}")
        widths = {name: width for name, (_, width) in taps.items()}
        self.network, self.released = network, released
        self.branches = nn.ModuleDict({name: branch for name, (branch, _) in taps.items()})
        self.w = nn.ParameterDict({n: torch.randn(num_classes, d) for n, d in widths.items()})
        self.v = nn.ParameterDict(
            {n: torch.randn(num_classes, d) for n, d in widths.items() if released}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def tapped(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits (N, K), and the features (N, width) of each tap by its name."""
        features = {}
        for name, layer in self.network.named_children():
            x = layer(x)
            if name in self.branches:
                features[name] = self.branches[name](x)
        return x, features

    def features(self, x: Tensor, tap: str) -> Tensor:
        """The features (N, width) of one tap."""
        return self.tapped(x)[1][tap]

    def conformity(self, tap: str, f: Tensor, y: Tensor) -> Tensor:
        """Eq. 5, or the released code's, for the features f (N, width) of a tap; (N,)."""
        if self.released:
            return released_conformity(f, y, self.w[tap], self.v[tap])
        return conformity(f, y, self.w[tap])

    def groups(self, rate: float, w: float = 0.5, v: float = 1.0) -> list[dict]:
        """Groups for `torch.optim.SGD`: all weights at ``rate``, the prototypes at their own.

        The prototypes move without momentum and weight decay, at the rates of the authors' code,
        which divides their gradient by the term's weight and takes 0.5 and 1e-4.
        """
        still = {"momentum": 0.0, "weight_decay": 0.0}
        weights = [*self.network.parameters(), *self.branches.parameters()]
        groups: list[dict] = [{"params": weights, "lr": rate}]
        for prototypes, own in ((self.w, w), (self.v, v)):
            if params := list(prototypes.parameters()):
                groups.append({"params": params, "lr": own, **still})
        return groups


def joint(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    """Eq. 7 for each image: cross-entropy plus ``weight`` times the conformity of every tap; (N,).

    The objective of training, Algorithm 1, line 6, and of the adaptive attack of Table 3. The model
    is a `Prototypes`.
    """
    model = cast(Prototypes, model)
    logits, features = model.tapped(x)
    value = F.cross_entropy(at_least_float32(logits), y, reduction="none")
    for tap, f in features.items():
        value = value + weight * model.conformity(tap, f, y)
    return value


def prototype_conformity(weight: float = 1.0) -> Loss:
    """The mean of `joint` over a batch; the paper takes the sum, which fits no learning rate."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return joint(model, x, y, weight).mean()

    return loss


def confusion(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How much nearer another prototype is than one's own, summed over the taps; (N,).

    Climbed by an attack that aims at the features and knows the prototypes.
    """
    model = cast(Prototypes, model)
    value = x.new_zeros(len(x))
    for tap, f in model.tapped(x)[1].items():
        far = distances(f, model.w[tap])
        own, others = far.gather(1, y[:, None]), far.scatter(1, y[:, None], torch.inf)
        value = value + own.squeeze(1) - others.amin(1)
    return value


class NearestPrototype(nn.Module):
    """The classifier of Eq. 6: its logits are the negative distances to a tap's prototypes."""

    def __init__(self, model: Prototypes, tap: str) -> None:
        super().__init__()
        self.model, self.tap = model, tap

    def forward(self, x: Tensor) -> Tensor:
        return -distances(self.model.features(x, self.tap), self.model.w[self.tap])
