"""The networks and the training of the sources for ImageNet, and what a full run would take.

Nobody here has run one: `step_cost` counts what a step takes, from the network itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, RMSprop
from torch.optim.lr_scheduler import MultiStepLR, StepLR
from torchvision.models import resnet

from defenses.adversarial import adversarial, adversarial_logit_pairing
from defenses.attacks.contract import attacking, generator_for, held_still
from defenses.attacks.gradient import pgd
from defenses.models import Center, compact_network
from defenses.training import Flops, Loss, cross_entropy, label_smoothing, step_seconds

Attack = Callable[..., Tensor]

ONE_GPU = 1e14  # operations a second: our guess for a GPU of today, in bfloat16
IMAGES = 1_281_167  # of the training set of ILSVRC 2012
VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
GRAY_LEVELS: dict[str, Any] = {"eps": 16 / 255, "early_stop": False}  # Xie's and Kannan's ball
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def vgg11_compact(num_classes: int = 1000, size: int = 224, **variant: Any) -> nn.Sequential:
    """The "off-the-shelf VGG11" of Ranjan et al. (2017), Table 5, after which the text stops.

    (N, 3, size, size) to (N, num_classes); size 224 in the paper, at least 32. ``variant`` is that
    of :func:`defenses.models.compact_network`. Dropout follows both hidden linear layers, as in
    Simonyan & Zisserman (2015).
    """
    variant = {"channels": 3, "size": size, "padding": 1, "width": 4096, "dropout": 0.5} | variant
    model = compact_network(VGG11, num_classes, **variant)
    layers = OrderedDict(model.named_children())
    last = layers.pop("fc3")
    return nn.Sequential(layers | {"dropout2": nn.Dropout(variant["dropout"]), "fc3": last})


def resnet_denoising(
    depth: int = 152,
    num_classes: int = 1000,
    denoise: Callable[[int], nn.Module] | None = None,
    width: int = 64,
) -> nn.Sequential:
    """torchvision's ResNet with the blocks of Xie et al. (2019), Sec. 6.1, behind res2 to res5.

    (N, 3, H, W) to (N, num_classes), H and W of 224 in the paper. ``denoise``, given the number of
    channels, makes a block, such as ``lambda c: Denoise(c, NonLocal(c))``; without it there is
    none. As in the authors' code, the last normalization of each residual branch starts at zero and
    the last layer from N(0, 0.01²). Their pixels are 2x − 1; here they are x − 0.5, and the first
    normalization takes the factor away again.

    Parameters
    ----------
    depth : 50, 101 or 152
    width : int
        Of the bottlenecks: 64 in the paper, less for a quick look.
    """
    kind = {"width_per_group": width, "num_classes": num_classes, "zero_init_residual": True}
    layers = dict(resnet.ResNet(resnet.Bottleneck, list(DEPTHS[depth]), **kind).named_children())
    nn.init.normal_(cast(Tensor, layers["fc"].weight), std=0.01)
    named: OrderedDict[str, nn.Module] = OrderedDict(center=Center())
    for name, layer in layers.items():
        if name == "fc":
            named["flatten"] = nn.Flatten()
        stage = name.startswith("layer") and int(name[-1])
        named[f"res{stage + 1}" if stage else name] = layer
        if stage and denoise is not None:
            named[f"denoise{stage + 1}"] = denoise(256 * 2 ** (stage - 1))
    return nn.Sequential(named)


def at_random(attack: Attack, clean: float = 0.2, seed: int | None = None) -> Attack:
    """`attack` with a class drawn for each image as its target (Xie et al., 2019, Sec. 5).

    A share ``clean`` of the batches starts at the images and the others at a random point: 0.2 in
    training, 0 in tests. Without a seed, draws come from torch's own generator, which `fit` seeds.
    """

    def aimed(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        with attacking(model, x, y) as logits_of:
            classes = logits_of.exact(x[:1]).shape[1]
        draw = generator_for(x, seed, None)
        offset = torch.randint(1, classes, y.shape, device=y.device, generator=draw)
        options |= {"random_start": float(torch.rand(())) >= clean, "seed": seed}
        return attack(model, x, y, target=(y + offset) % classes, **options)

    return aimed


def at_least_likely(attack: Attack) -> Attack:
    """`attack` with the least likely wrong class as its target, as the code of ALP has it."""

    def aimed(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        with attacking(model, x, y) as logits_of:
            z = logits_of.exact(x).scatter(1, y[:, None], torch.inf)
        return attack(model, x, y, target=z.argmin(dim=1), **options)

    return aimed


# How they are trained: the arguments of `defenses.training.fit`, but for data, seed and checkpoint.


def like_vgg(model: nn.Module, loss: Loss = cross_entropy) -> dict[str, Any]:
    """As Simonyan & Zisserman (2015) trained VGG: Ranjan et al. (2017) do not say how they did."""
    optimizer = SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    options = {"optimizer": optimizer, "schedule": MultiStepLR(optimizer, [37, 55])}
    return options | {"epochs": 74, "batch_size": 256, "loss": loss}


def like_xie(model: nn.Sequential) -> dict[str, Any]:
    """Xie et al. (2019), Sec. 5: nothing but images that 30 steps of PGD aim at a random class.

    Label smoothing of 0.1 over all classes, so 0.1·(K−1)/K over the wrong ones. The rate is theirs
    for a batch of 256; they took 4,096, sixteen times the rate, and five epochs to get there.
    """
    attack = at_random(partial(pgd, steps=30, step_size=1 / 255, **GRAY_LEVELS))
    classes = cast(nn.Linear, model[-1]).out_features
    loss = adversarial(attack, 1.0, label_smoothing(0.1 * (classes - 1) / classes))
    optimizer = SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
    options = {"optimizer": optimizer, "schedule": MultiStepLR(optimizer, [35, 70, 95])}
    return options | {"epochs": 110, "batch_size": 256, "loss": loss}


def like_kannan(model: nn.Module) -> dict[str, Any]:
    """ALP at 64 pixels (Kannan et al., 2018), by their code but for averaged weights and soft
    labels; 100 epochs are our choice, for they do not say how many."""
    attack = at_least_likely(partial(pgd, steps=10, step_size=2 / 255, **GRAY_LEVELS))
    optimizer = RMSprop(model.parameters(), 0.045, 0.9, 1.0, 1e-4, 0.9)
    options = {"optimizer": optimizer, "schedule": StepLR(optimizer, 2, 0.94)}
    loss = adversarial_logit_pairing(attack, weight=0.5)
    return options | {"epochs": 100, "batch_size": 256, "loss": loss}


def tests(size: int, seed: int = 0) -> dict[str, Attack | None]:
    """The columns of the book's table and what they are measured by: of ALP where ``size`` is 64,
    else of Xie et al., whose ten steps are longer."""
    if size == 64:
        nearest = at_least_likely(partial(pgd, steps=10, step_size=2 / 255, **GRAY_LEVELS))
        return {"imagenet64 clean": None, "imagenet64 pgd 16/255": nearest}
    found: dict[str, Attack | None] = {"imagenet clean": None}
    for steps, pace in ((10, 1.6), (100, 1.0), (1000, 1.0)):
        climb = partial(pgd, steps=steps, step_size=pace / 255, **GRAY_LEVELS)
        found[f"imagenet pgd-{steps} 16/255"] = at_random(climb, clean=0, seed=seed)
    return found


@dataclass(frozen=True)
class Cost:
    """What a training step takes, for one image: operations, and bytes that wait for the backward
    pass; and, however many images, the bytes of weights, their gradients and momentum."""

    flops: float
    image_bytes: float
    weight_bytes: int

    def hours(self, epochs: float, rate: float) -> float:
        """Hours on ImageNet of a device that sustains ``rate`` operations a second."""
        return epochs * IMAGES * self.flops / rate / 3600

    def bill(self, epochs: int, rate: float, device: str) -> str:
        """All of it in words, for ``rate`` as it was measured on ``device`` and for `ONE_GPU`."""
        a_step = f"{self.flops / 1e9:,.0f} GFLOP and {self.image_bytes / 1e6:,.0f} MB an image"
        here, there = self.hours(epochs, rate), self.hours(epochs, ONE_GPU)
        return (
            f"a step: {a_step}, {self.weight_bytes / 1e9:.1f} GB for the weights\n"
            f"{epochs} epochs: {here:,.0f} hours of {device}, where a step ran at "
            f"{rate / 1e12:.2f} TFLOP/s\nat {ONE_GPU / 1e12:.0f} TFLOP/s: {there:,.0f} "
            f"GPU-hours, at {ONE_GPU / self.flops:,.0f} images a second"
        )


def step_cost(make: Callable[[int], nn.Module], size: int = 224, steps: int = 0) -> Cost:
    """The cost of a step of training ``make(size)``, each image attacked by ``steps`` steps.

    Of matrix products and convolutions, by PyTorch's formulas, a multiplication and an addition
    being two operations; in float32. The model is made on the device "meta", where tensors have no
    content: nothing is computed and nothing allocated.
    """
    with torch.device("meta"):
        model, x, y = make(size), torch.empty(2, 3, size, size), torch.zeros(2, dtype=torch.int64)
    held: dict[int, torch.UntypedStorage] = {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with Flops() as training:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            value = cross_entropy(model.train(), x, y)
        value.backward()
    with held_still(model), Flops() as climbing:
        x.requires_grad_()
        torch.autograd.grad(cross_entropy(model, x, y), x)
    for weight in model.parameters():
        held.pop(weight.untyped_storage()._cdata, None)
    kept = sum(storage.nbytes() for storage in held.values())
    flops = (training.total + steps * climbing.total) / len(x)
    return Cost(flops, kept / len(x), 3 * sum(weight.nbytes for weight in model.parameters()))


def sustained(make: Callable[[int], nn.Module], device: str) -> float:
    """Operations a second of a training step of ``make(size)``, measured: on a GPU 64 images of
    224 pixels a side; elsewhere two of 64, for what takes hours there is not to be waited for."""
    size, count = (224, 64) if torch.device(device).type == "cuda" else (64, 2)
    x, y = torch.rand(count, 3, size, size, device=device), torch.arange(count, device=device)
    seconds = step_seconds({"": make(size)}, x, y, repeats=3)[""]
    return count * step_cost(make, size).flops / seconds
