"""The architectures of the papers' tables. Images in [0, 1] go in, logits come out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import zoo
from defenses.compact import CompactConv2d, CompactLinear

# Ranjan et al. (2017), Table 10: output channels of each convolution, and where a 2x2 pool stands.
COMPACT_MNIST = (32, 32, "pool", 64, 64, "pool")
COMPACT_CIFAR = (64, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


class Center(nn.Module):
    """Subtract 0.5: the papers' preprocessing, kept inside the model so that attacks see pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


class BReLU(nn.Hardtanh):
    """Bounded ReLU of Zantedeschi et al. (2017): activations clipped to [0, bound]."""

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__(0.0, bound)


def local_response_norm() -> nn.Module:
    """Krizhevsky et al. (2012), Sec. 3.3: k=2, n=5, alpha=1e-4, beta=0.75 (Eq. 10).

    PyTorch divides alpha by n, which Eq. 10 does not: hence 5e-4.
    """
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


def mnist_compact(num_classes: int = 10, **variant) -> nn.Sequential:
    """The MNIST network of Ranjan et al. (2017), Table 10: four 3x3 convolutions, unpadded.

    (N, 1, 28, 28) to (N, num_classes). ``variant`` is that of :func:`compact_network`.
    """
    variant = {"channels": 1, "size": 28, "padding": 0, "width": 200, "dropout": 0.5} | variant
    return compact_network(COMPACT_MNIST, num_classes, **variant)


def cifar_compact(num_classes: int = 10, **variant) -> nn.Sequential:
    """The VGG11 of Ranjan et al. (2017), Table 10: eight 3x3 convolutions, padded by one.

    (N, 3, 32, 32) to (N, num_classes). As printed, no pool follows the first convolution, unlike
    in the usual VGG11; so 2x2 maps remain before the linear layers.
    """
    variant = {"channels": 3, "size": 32, "padding": 1, "width": 512, "dropout": 0.5} | variant
    return compact_network(COMPACT_CIFAR, num_classes, **variant)


def compact_network(
    plan: tuple[int | str, ...],
    num_classes: int,
    *,
    channels: int,
    size: int,
    padding: int,
    width: int,
    dropout: float,
    narrow: int = 1,
    features: int | None = None,
    compact: str | Collection[str] = (),
    activation: type[nn.Module] = nn.ReLU,
    norm: str | None = None,
    alpha: float = 1.0,
    learn_alpha: bool = True,
) -> nn.Sequential:
    """Every network of Tables 1, 9 and 13 of Ranjan et al. (2017).

    Parameters
    ----------
    plan : tuple
        Output channels of each 3x3 convolution, and ``"pool"``.
    channels, size : int
        Of the square images.
    padding, width, dropout
        Of the convolutions; of the hidden linear layers; after the first of them.
    narrow : int
        What channels and hidden units are divided by: 1 for the paper's, more for a quick look.
    features : int, optional
        Width of ``fc2``, the last hidden layer, in place of ``width``: 2 for Fig. 2. No activation
        follows it then, so that the features fill the plane.
    compact : "all", or one or several of conv1, conv2, …, fc1, fc2, fc3
        Layers that are compact. ``"all"`` is CCN; ``"fc3"`` is L2SM (Sec. 8.1).
    activation : type
        :class:`torch.nn.ReLU`, or :class:`BReLU`.
    norm : {None, "batch", "lrn"}
        Table 9. Batch normalization before the activation of every hidden layer; local response
        normalization after that of every convolution.
    alpha, learn_alpha
        Of the compact layers. The paper does not say where alpha starts; of 1, 4 and 16, 1
        comes nearest to its Table 1.

    Raises
    ------
    ValueError
        If a layer or norm is unknown, or the images are too small for the plan.
    """
    names = [f"conv{i + 1}" for i in range(sum(c != "pool" for c in plan))] + ["fc1", "fc2", "fc3"]
    if isinstance(compact, str) and compact != "all":
        compact = [compact]
    compact = set(names if compact == "all" else compact)
    if unknown := compact - set(names):
        raise ValueError(f"no layer {sorted(unknown)} to make compact; the layers are {names}")
    if norm not in (None, "batch", "lrn"):
        raise ValueError(f'norm must be None, "batch" or "lrn"; got {norm!r}')
    scale: dict[str, Any] = {"alpha": alpha, "learn_alpha": learn_alpha}

    def convolution(name: str, inputs: int, outputs: int) -> nn.Module:
        if name in compact:
            return CompactConv2d(inputs, outputs, 3, padding=padding, **scale)
        return nn.Conv2d(inputs, outputs, 3, padding=padding)

    def linear(name: str, inputs: int, outputs: int) -> nn.Module:
        if name in compact:
            return CompactLinear(inputs, outputs, **scale)
        return nn.Linear(inputs, outputs)

    layers: OrderedDict[str, nn.Module] = OrderedDict(center=Center())
    plan = tuple(c if isinstance(c, str) else c // narrow for c in plan)
    width //= narrow
    for step, outputs in enumerate(plan):
        if isinstance(outputs, str):
            layers[f"pool{step}"] = nn.MaxPool2d(2)
            size //= 2
            continue
        name = names.pop(0)
        layers[name] = convolution(name, channels, outputs)
        if norm == "batch":
            layers[f"norm_{name}"] = nn.BatchNorm2d(outputs)
        layers[f"act_{name}"] = activation()
        if norm == "lrn":
            layers[f"norm_{name}"] = local_response_norm()
        channels, size = outputs, size + 2 * padding - 2

    if size < 1:
        raise ValueError(f"the images are too small for {plan}: nothing is left to flatten")
    layers["flatten"] = nn.Flatten()
    inputs = channels * size * size
    for name, outputs in (("fc1", width), ("fc2", features or width)):
        layers[name] = linear(name, inputs, outputs)
        if norm == "batch":
            layers[f"norm_{name}"] = nn.BatchNorm1d(outputs)
        if name == "fc1" or features is None:
            layers[f"act_{name}"] = activation()
        inputs = outputs
        if name == "fc1":
            layers["dropout"] = nn.Dropout(dropout)
    layers["fc3"] = linear("fc3", inputs, num_classes)
    return he_initialized(nn.Sequential(layers))


def mnist_tutorial(
    num_classes: int = 10,
    dropout: float = 0.5,
    fixed_head: bool = False,
    behind: Mapping[str, nn.Module] | None = None,
    narrow: int = 1,
) -> nn.Sequential:
    """The MNIST network of Jakubovitz & Giryes (2018), from TensorFlow's first tutorial.

    (N, 1, 28, 28) to (N, num_classes). Weights start as the tutorial's: a normal distribution of
    deviation 0.1 cut off at 0.2, and biases of 0.1. With ``fixed_head`` the last layer's weights
    are orthonormal and not trained (Appendix A). Without dropout it is the network of Madry et al.
    (2018). ``behind`` places modules, such as :class:`defenses.denoising.Denoise`, behind the pools
    of 32 and 64 maps, ``"pool1"`` and ``"pool2"``. ``narrow`` is what channels and hidden units are
    divided by: 1 for the paper's, more for a quick look.
    """
    maps, more, hidden = 32 // narrow, 64 // narrow, 1024 // narrow
    layers: list[nn.Module | str] = [nn.Conv2d(1, maps, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(2), "pool1", nn.Conv2d(maps, more, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(2), "pool2", nn.Flatten(), nn.Linear(7 * 7 * more, hidden), nn.ReLU()]
    model = _with_places([*layers, nn.Dropout(dropout), nn.Linear(hidden, num_classes)], behind)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
            nn.init.constant_(cast(Tensor, layer.bias), 0.1)
    return with_fixed_head(model) if fixed_head else model


def mnist_fast(
    num_classes: int = 10, behind: Mapping[str, nn.Module] | None = None
) -> nn.Sequential:
    """The MNIST network of Wong et al. (2020): two strided convolutions and 100 hidden units.

    (N, 1, 28, 28) to (N, num_classes), in a twentieth of the multiplications of
    :func:`mnist_tutorial`. ``behind`` places modules behind the activations of 16 and 32 maps,
    ``"conv1"`` (14×14) and ``"conv2"`` (7×7).
    """
    layers: list[nn.Module | str] = [nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), "conv1"]
    layers += [nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(), "conv2", nn.Flatten()]
    layers += [nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, num_classes)]
    model = _with_places(layers, behind)
    he_initialized(nn.Sequential(*[m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]))
    return model


def cifar_four_sets(
    num_classes: int = 10,
    widths: tuple[int, ...] = (64, 128, 256, 512),
    dropout: float = 0.25,
    fixed_head: bool = False,
    narrow: int = 1,
) -> nn.Sequential:
    """The CIFAR-10 network of Jakubovitz & Giryes (2018), Section 4: four sets of two layers.

    (N, 3, 32, 32) to (N, num_classes). A pool and dropout follow each set, two linear layers the
    last. The paper gives no widths and no kernel sizes; ours are the usual ones. ``narrow`` is what
    channels and hidden units are divided by: 1 for the full width, more for a quick look.
    """
    layers: list[nn.Module] = [Center()]
    channels, hidden = 3, 512 // narrow
    for width in (full // narrow for full in widths):
        for inputs in (channels, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        channels = width
    layers += [nn.Flatten(), nn.Linear(4 * channels, hidden), nn.ReLU()]
    layers += [nn.Linear(hidden, num_classes)]
    model = he_initialized(nn.Sequential(*layers))
    return with_fixed_head(model) if fixed_head else model


def with_fixed_head(model: nn.Sequential) -> nn.Sequential:
    """The model, its last layer's weights made orthonormal and no longer trained (Appendix A)."""
    head = cast(nn.Linear, model[-1])
    nn.init.orthogonal_(head.weight)
    head.weight.requires_grad_(False)
    return model


def mnist_batchout(
    num_classes: int = 10, behind: Mapping[str, nn.Module] | None = None, narrow: int = 1
) -> nn.Sequential:
    """The MNIST network of Subramanya et al. (2018), Section 8.1, that of Lasagne's example.

    (N, 1, 28, 28) to (N, num_classes). ``behind`` places modules, such as
    :class:`defenses.batchout.BatchOut`, between the layers C1, C2, F1 and their activations.
    ``narrow`` divides channels and hidden units: 1 for the paper's, more for a quick look.
    """
    channels, hidden = 32 // narrow, 256 // narrow
    layers: list[nn.Module | str] = [nn.Conv2d(1, channels, 5), "C1", nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(channels, channels, 5), "C2", nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(16 * channels, hidden), "F1", nn.ReLU()]
    layers += [nn.Dropout(0.5), nn.Linear(hidden, num_classes)]
    return _batchout_network(layers, behind)


def cifar_batchout(
    num_classes: int = 10, behind: Mapping[str, nn.Module] | None = None, narrow: int = 1
) -> nn.Sequential:
    """The CIFAR-10 network of Subramanya et al. (2018), Section 8.1: five padded convolutions.

    (N, 3, 32, 32) to (N, num_classes). ``behind`` and ``narrow``: as for :func:`mnist_batchout`,
    with the places C1 to C5, F1, F2.
    """
    layers: list[nn.Module | str] = []
    channels, hidden = (3, 32 // narrow, *4 * [64 // narrow]), 512 // narrow
    for i, (inputs, outputs) in enumerate(pairwise(channels), 1):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), f"C{i}", nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (2, 5) else []
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * channels[-1], hidden), "F1", nn.ReLU()]
    layers += [nn.Linear(hidden, hidden), "F2", nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.Linear(hidden, num_classes)]
    return _batchout_network(layers, behind)


def _batchout_network(
    layers: Sequence[nn.Module | str], behind: Mapping[str, nn.Module] | None
) -> nn.Sequential:
    model = _with_places(layers, behind)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)  # Lasagne's default
            nn.init.zeros_(cast(Tensor, layer.bias))
    return model


def _with_places(
    layers: Sequence[nn.Module | str], behind: Mapping[str, nn.Module] | None
) -> nn.Sequential:
    """The layers in a row; a name among them is a place, which a module of that name may take."""
    behind, places = dict(behind or {}), [name for name in layers if isinstance(name, str)]
    if unknown := behind.keys() - set(places):
        raise ValueError(f"no layer {sorted(unknown)}; expected some of {places}")
    modules = [behind.get(m) if isinstance(m, str) else m for m in layers]
    return nn.Sequential(*[module for module in modules if module is not None])


class PReLU(nn.PReLU):
    """max(x, 0) + a·min(x, 0) with a trainable a for each channel, as `torch.nn.PReLU`.

    Written as a step of share a from relu(x) toward x, it takes a third of the time in bfloat16
    on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        a = self.weight.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        return x.relu().lerp(x, a)


def mnist_six(num_classes: int = 10, width: int = 64, narrow: int = 1) -> nn.Sequential:
    """The "6-Conv Model" of Mustafa et al. (2019), Table 1, which is that of Wen et al. (2016).

    (N, 1, 28, 28) to (N, num_classes). Its children are the table's layers, ``layer1`` to
    ``layer6``. As in the authors' network for CIFAR-10, nothing stands between the last two.
    ``width`` is that of ``layer5``: 2 for Fig. 1. ``narrow`` is what all channels and the other
    hidden units are divided by: 1 for the paper's, more for a quick look.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(center=Center())
    channels, hidden = 1, 512 // narrow
    for i, outputs in enumerate((32 // narrow, 64 // narrow, 128 // narrow), 1):
        pair = [nn.Conv2d(channels, outputs, 5, padding=2), PReLU(outputs)]
        pair += [nn.Conv2d(outputs, outputs, 5, padding=2), PReLU(outputs), nn.MaxPool2d(2)]
        layers[f"layer{i}"] = nn.Sequential(*pair)
        channels = outputs
    layers |= {"flatten": nn.Flatten(), "layer4": nn.Linear(9 * channels, hidden)}
    layers |= {"act": PReLU(hidden)}
    layers |= {"layer5": nn.Linear(hidden, width), "layer6": nn.Linear(width, num_classes)}
    return he_initialized(nn.Sequential(layers), slope=0.25)


def resnet110(num_classes: int = 10, channels: int = 3, blocks: int = 12) -> nn.Sequential:
    """The "ResNet-110" of Mustafa et al. (2019), Table 1: three stages of bottlenecks.

    (N, channels, 32, 32) to (N, num_classes), children ``layer1`` to ``layer6``. The 12 blocks a
    stage of the table make 110 layers, without ``layer5``; the authors' code has 18, which is 164.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(center=Center())
    layers["layer1"] = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    )
    for i, (inputs, width) in enumerate(((16, 16), (64, 32), (128, 64)), 2):
        layers[f"layer{i}"] = _stage(inputs, width, blocks, stride=1 if i == 2 else 2)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers |= {"layer5": nn.Linear(256, 1024), "layer6": nn.Linear(1024, num_classes)}
    return he_initialized(nn.Sequential(layers))


def resnet_denoising(
    num_classes: int = 10,
    channels: int = 3,
    widths: Sequence[int] = (16, 32, 64, 128),
    blocks: int = 3,
    denoise: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """A residual network for small images in the manner of Xie et al. (2019), Section 5.

    (N, channels, H, W), H and W at least 8, to (N, num_classes). Four stages ``res2`` to ``res5``
    of bottlenecks, the last three at half the resolution of the one before. ``denoise``, given the
    number of channels, makes the block that stands behind each stage. Widths and depth are ours:
    the paper's networks are for ImageNet.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(center=Center())
    layers["conv1"] = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
    layers |= {"norm1": nn.BatchNorm2d(widths[0]), "relu1": nn.ReLU()}
    inputs = widths[0]
    for i, width in enumerate(widths, 2):
        layers[f"res{i}"] = _stage(inputs, width, blocks, stride=1 if i == 2 else 2)
        inputs = 4 * width
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    model = he_initialized(nn.Sequential(layers | {"fc": nn.Linear(inputs, num_classes)}))
    if denoise is None:
        return model
    layers = OrderedDict()
    for name, layer in model.named_children():  # after the draw, which blocks make for themselves
        layers[name] = layer
        if name.startswith("res"):
            layers[f"denoise{name[3:]}"] = denoise(4 * widths[int(name[3:]) - 2])
    return nn.Sequential(layers)


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first, more = Bottleneck(inputs, width, stride), range(blocks - 1)
    return nn.Sequential(first, *[Bottleneck(4 * width, width) for _ in more])


class Bottleneck(nn.Module):
    """relu(x + F(x)), F of three convolutions: 1x1, 3x3 and 1x1 (He et al., 2016, Fig. 5)."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, size, by in ((inputs, width, 1, 1), (width, width, 3, stride)):
            layers += [nn.Conv2d(i, o, size, by, size // 2, bias=False), nn.BatchNorm2d(o)]
            layers += [nn.ReLU()]
        layers += [nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)]
        self.residual, self.shortcut = nn.Sequential(*layers), nn.Sequential()
        if inputs != 4 * width or stride != 1:
            projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.residual(x)).relu()


def vgg19(num_classes: int = 10, channels: int = 3) -> nn.Sequential:
    """VGG-19 (Simonyan & Zisserman, 2015) for small images, with batch normalization.

    (N, channels, H, W), H and W of 28 to 32, to (N, num_classes): a gray frame fills up 32 pixels,
    and one linear layer follows the sixteen convolutions.
    """
    layers: list[nn.Module] = [Center(), PadTo(32)]
    for outputs, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU()]
            channels = outputs
        layers += [nn.MaxPool2d(2)]
    return he_initialized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, num_classes)))


class PadTo(nn.Module):
    """Zeros around images (N, C, H, W) up to `size` pixels a side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        down, right = self.size - x.shape[2], self.size - x.shape[3]
        return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))


def lenet(num_classes: int = 10) -> nn.Sequential:
    """LeNet-5 (LeCun et al., 1998), (N, 1, 28, 28) to (N, num_classes): the usual substitute.

    Today's reading: ReLU and max pooling, no Gaussian output layer.
    """
    return he_initialized(
        nn.Sequential(
            Center(),
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )
    )


def he_initialized(model: nn.Sequential, slope: float = 0.0) -> nn.Sequential:
    """Draw every weight from N(0, 2/(1 + slope²)/fan-in), every bias 0 (He et al., 2015).

    ``slope`` is that of the activation below 0.

    The papers do not say how they start. At their learning rate of 0.1 PyTorch's own, smaller
    start left the plain network at chance level for many epochs.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, slope)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def pretrained(name: str, data: str = "mnist") -> nn.Sequential:
    """A trained network of the book's zoo, on the CPU and in eval mode: nothing to wait for.

    (N, 1, 28, 28) to (N, 10). They are the networks of the chapter "One yardstick", each
    :func:`mnist_fast` with one defense, without what served its training alone.

    Parameters
    ----------
    name : str
        The defense, named as the rows of that chapter: ``"none"``, ``"compact, soft labels"``,
        ``"BatchOut"``, ``"prototypes"``, ``"Jacobian"``, ``"input gradient"``,
        ``"one random step"`` or ``"PGD"``.
    data : str
        What it was trained on: ``"mnist"``.

    Raises
    ------
    ValueError
        There is no such network (the message names those there are), or its file is damaged.
    """
    weights = zoo.weights(name, data)
    with torch.device("meta"):  # nothing is drawn, and nothing allocated twice
        model = mnist_fast() if "0.weight" in weights else _mnist_fast_compact()
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _mnist_fast_compact() -> nn.Sequential:
    first, second = (CompactConv2d(i, o, 4, stride=2, padding=1) for i, o in ((1, 16), (16, 32)))
    hidden, last = CompactLinear(1568, 100), CompactLinear(100, 10)
    layers = [Center(), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), hidden, nn.ReLU(), last]
    return nn.Sequential(*layers)


@torch.no_grad()
def activations(model: nn.Sequential, x: Tensor, layer: str) -> Tensor:
    """The activations (N, …) behind ``layer`` of a sequential model, in its present mode."""
    x = x.clone()
    for name, module in model.named_children():
        x = module(x)
        if name == layer:
            return x
    raise ValueError(f"no layer {layer!r}; the layers are {[n for n, _ in model.named_children()]}")
