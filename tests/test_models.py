"""The papers' networks: their sizes, their variants, and what they do to an image first."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.compact import CompactConv2d, CompactLinear
from defenses.data import load_data
from defenses.denoising import Denoise, NonLocal
from defenses.models import (
    BReLU,
    Center,
    activations,
    cifar_compact,
    cifar_four_sets,
    local_response_norm,
    mnist_compact,
    mnist_fast,
    mnist_tutorial,
    resnet_denoising,
)
from defenses.training import fit

CONVOLUTIONS = ["conv1", "conv2", "conv3", "conv4"]
LAYERS = [*CONVOLUTIONS, "fc1", "fc2", "fc3"]


def images(n: int = 4, channels: int = 1, size: int = 28) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters of each layer that has some."""
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    return {name: count for name, count in counts.items() if count}


# Table 10


def test_the_mnist_network_is_that_of_table_10() -> None:
    assert parameters(mnist_compact()) == {
        "conv1": 320,  # 32 filters of 1·3·3, and 32 biases
        "conv2": 9_248,
        "conv3": 18_496,
        "conv4": 36_928,
        "fc1": 205_000,  # 28 → 26 → 24 → 12 → 10 → 8 → 4, so 64·4·4 inputs
        "fc2": 40_200,
        "fc3": 2_010,
    }
    names = [name for name, _ in mnist_compact().named_children() if "pool" in name or "c" in name]
    order = [name for name in names if name in LAYERS or "pool" in name]
    assert order == ["conv1", "conv2", "pool2", "conv3", "conv4", "pool5", "fc1", "fc2", "fc3"]


def test_the_cifar_network_is_that_of_table_10() -> None:
    model = cifar_compact()
    assert parameters(model) == {
        "conv1": 1_792,
        "conv2": 73_856,
        "conv3": 295_168,
        "conv4": 590_080,
        "conv5": 1_180_160,
        "conv6": 2_359_808,
        "conv7": 2_359_808,
        "conv8": 2_359_808,
        "fc1": 1_049_088,  # 512·2·2 inputs: no pool follows the first convolution
        "fc2": 262_656,
        "fc3": 5_130,
    }
    last_pool = [name for name, _ in model.named_children() if "pool" in name][-1]
    assert activations(model, images(1, 3, 32), last_pool).shape == (1, 512, 2, 2)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in model) == 4


def test_every_compact_layer_adds_one_parameter() -> None:
    plain = parameters(mnist_compact())
    assert parameters(mnist_compact(compact="all")) == {n: c + 1 for n, c in plain.items()}
    one = parameters(mnist_compact(compact="conv2"))
    assert one == plain | {"conv2": 9_249} == parameters(mnist_compact(compact=["conv2"]))


# The variants of Tables 1, 9 and 13


VARIANTS: list[dict[str, Any]] = [
    {},
    {"compact": "all"},
    *({"compact": name} for name in LAYERS),
    {"activation": BReLU},
    {"norm": "batch"},
    {"norm": "lrn"},
    {"compact": "all", "norm": "batch", "activation": BReLU},
    {"features": 2},
    {"features": 2, "compact": "fc3", "learn_alpha": False, "alpha": 16.0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 1000)])
def test_every_variant_runs_forward_and_backward(
    variant: dict[str, Any], channels: int, classes: int
) -> None:
    model = mnist_compact(classes, channels=channels, **variant)
    logits = model(images(2, channels))
    assert logits.shape == (2, classes) and logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([0, classes - 1])).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("variant", [{}, {"compact": "all", "norm": "batch"}], ids=str)
def test_the_cifar_network_runs_forward_and_backward(variant: dict[str, Any]) -> None:
    logits = cifar_compact(100, **variant)(images(2, 3, 32))
    assert logits.shape == (2, 100)
    logits.sum().backward()


def test_a_variant_has_the_layers_that_it_names() -> None:
    model = mnist_compact(compact=["conv1", "fc2"], alpha=7.0, learn_alpha=False)
    kinds = {name: type(layer) for name, layer in model.named_children() if name in LAYERS}
    assert kinds.pop("conv1") is CompactConv2d and kinds.pop("fc2") is CompactLinear
    assert set(kinds.values()) == {nn.Conv2d, nn.Linear}
    assert model.get_parameter("conv1.alpha") == 7 == model.get_parameter("fc2.alpha")
    assert not model.get_parameter("fc2.alpha").requires_grad

    children = [name for name, _ in mnist_compact(norm="batch").named_children()]
    for name in LAYERS[:-1]:  # normalized, then activated
        start = children.index(name)
        assert children[start : start + 3] == [name, f"norm_{name}", f"act_{name}"]
    children = [name for name, _ in mnist_compact(norm="lrn").named_children()]
    assert [name for name in children if "norm" in name] == [f"norm_{n}" for n in CONVOLUTIONS]
    assert children.index("norm_conv1") == children.index("act_conv1") + 1

    drawn = mnist_compact(features=2)
    features = activations(drawn, images(99), "fc2")
    assert features.shape == (99, 2) and features.min() < 0  # the whole plane
    assert "act_fc2" not in dict(drawn.named_children())
    bounded = [layer for layer in mnist_compact(activation=BReLU) if isinstance(layer, BReLU)]
    assert len(bounded) == 6


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"compact": ["conv1", "conv9"]}, r"no layer \['conv9'\].*conv1.*fc3"),
        ({"compact": "every"}, r"no layer \['every'\]"),
        ({"norm": "layer"}, 'norm must be None, "batch" or "lrn"; got \'layer\''),
        ({"size": 4}, "too small"),
        ({"size": 14}, "too small"),
    ],
    ids=str,
)
def test_a_variant_that_is_not_one_is_refused(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mnist_compact(**variant)


# The networks of Jakubovitz & Giryes (2018)


def kinds(model: nn.Sequential) -> list[type[nn.Module]]:
    return [type(layer) for layer in model]


def test_the_tutorial_network_is_that_of_the_tutorial() -> None:
    model = mnist_tutorial()
    assert [*parameters(model).values()] == [
        832,  # 32 filters of 1·5·5, and 32 biases
        51_264,
        3_212_288,  # 28 → 14 → 7, so 64·7·7 inputs
        10_250,
    ]
    convolution = [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    head = [nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert kinds(model) == [*convolution, *convolution, *head]  # dropout after the first one only
    assert model[-2].p == 0.5
    assert mnist_tutorial(7)(images(2)).shape == (2, 7)


def test_the_tutorial_network_starts_like_the_tutorials() -> None:
    torch.manual_seed(0)
    model = mnist_tutorial()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0.1).all()
        else:
            assert 0.19 < weight.abs().max() <= 0.2, name
            cut_off = 0.8796 * 0.1  # the deviation that is left of a normal one cut off at two
            assert weight.std().item() == pytest.approx(cut_off, rel=0.05), name
            assert abs(weight.mean().item()) < 0.01, name


def test_the_four_sets_are_two_convolutions_a_pool_and_dropout_each() -> None:
    model = cifar_four_sets(7, widths=(4, 5, 6, 7))
    a_set = [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Dropout]
    head = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert kinds(model) == [Center, *4 * a_set, *head]
    assert {layer.p for layer in model if isinstance(layer, nn.Dropout)} == {0.25}  # 0.75 are kept
    widths = [layer.out_channels for layer in model if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 4, 5, 5, 6, 6, 7, 7]
    logits = model(images(2, 3, 32))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    fc1 = model.get_parameter("26.weight")
    assert fc1.std().item() == pytest.approx((2 / fc1.shape[1]) ** 0.5, rel=0.1)


@pytest.mark.parametrize("make", [mnist_tutorial, cifar_four_sets])
def test_a_fixed_head_is_orthonormal_and_stays(make: Any) -> None:
    torch.manual_seed(0)
    small = {"widths": (2, 2, 2, 2)} if make is cifar_four_sets else {}
    model = make(fixed_head=True, **small)
    head = model[-1].weight
    torch.testing.assert_close(head @ head.T, torch.eye(10), rtol=0.0, atol=1e-5)
    fixed = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert fixed == [f"{len(model) - 1}.weight"]
    assert all(weight.requires_grad for weight in make(**small).parameters())


def test_training_leaves_a_fixed_head_alone() -> None:
    """Weight decay too: at its default, `fit` would shrink it."""
    torch.manual_seed(0)
    model, data = mnist_tutorial(fixed_head=True), load_data("digits")
    few = dataclasses.replace(
        data, train_images=data.train_images[:32], train_labels=data.train_labels[:32]
    )
    before = copy.deepcopy(model.state_dict())
    fit(model, few, epochs=1, batch_size=16, progress=False)
    changed = [n for n, weight in model.state_dict().items() if not torch.equal(weight, before[n])]
    assert changed == [name for name in before if name != "10.weight"]


# Parts


def test_local_response_normalization_is_eq_10() -> None:
    a = 20 * torch.randn(2, 9, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    k, n, alpha, beta, channels = 2, 5, 1e-4, 0.75, a.shape[1]
    b = torch.empty_like(a)
    for i in range(channels):
        neighbors = range(max(0, i - n // 2), min(channels - 1, i + n // 2) + 1)
        total = sum((a[:, j] ** 2 for j in neighbors), start=torch.zeros(()))
        b[:, i] = a[:, i] / (k + alpha * total) ** beta
    torch.testing.assert_close(local_response_norm()(a), b)


def test_the_bounded_relu_clips_to_zero_and_one() -> None:
    x = torch.tensor([-1.0, -0.1, 0.0, 0.3, 1.0, 7.0])
    assert BReLU()(x).tolist() == pytest.approx([0, 0, 0, 0.3, 1, 1])
    assert BReLU(2.5)(x).max() == 2.5


def test_images_are_centered_inside() -> None:
    x = images()
    for model in (mnist_compact(), mnist_compact(compact="all")):
        assert torch.equal(activations(model, x, "center"), x - 0.5)


# The start


def test_a_seed_fixes_the_weights_and_compact_layers_start_like_plain_ones() -> None:
    states = []
    for seed, compact in ((0, ()), (0, ()), (1, ()), (0, "all")):
        torch.manual_seed(seed)
        states.append(mnist_compact(compact=compact).state_dict())
    first, again, other, compact_state = states
    for name, weights in first.items():
        assert torch.equal(weights, again[name]) and torch.equal(weights, compact_state[name])
        assert torch.equal(weights, other[name]) == name.endswith("bias")


def test_weights_start_as_the_docstring_says() -> None:
    torch.manual_seed(0)
    model = mnist_compact(compact="all")
    for name in LAYERS[1:]:
        weight = model.get_parameter(f"{name}.weight")
        expected = (2 / weight[0].numel()) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.1), name
        assert not model.get_parameter(f"{name}.bias").any()


def test_activations_stop_behind_a_layer_and_track_no_gradient() -> None:
    model, x = mnist_compact().eval(), images()
    assert activations(model, x, "conv1").shape == (4, 32, 26, 26)
    assert not activations(model, x, "conv1").requires_grad
    assert torch.equal(activations(model, x, "fc3"), model(x))
    assert activations(model, x, "act_conv1").min() == 0 > activations(model, x, "conv1").min()
    with pytest.raises(ValueError, match=r"no layer 'conv9'.*'act_conv1'"):
        activations(model, x, "conv9")


# Networks with places for blocks


class Seen(nn.Module):
    """Pass on, and remember the shape and whether an activation stands before."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape, self.active = tuple(x.shape[1:]), bool((x >= 0).all())
        return x


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (mnist_tutorial, {"pool1": (32, 14, 14), "pool2": (64, 7, 7)}),
        (mnist_fast, {"conv1": (16, 14, 14), "conv2": (32, 7, 7)}),
    ],
)
def test_modules_stand_in_the_places_of_their_names(
    make: Any, places: dict[str, tuple[int, ...]]
) -> None:
    behind = {name: Seen() for name in places}
    torch.manual_seed(0)
    model = make(behind=behind).eval()
    torch.manual_seed(0)
    assert torch.equal(model(images()), make().eval()(images()))
    assert {name: module.shape for name, module in behind.items()} == places
    assert all(module.active for module in behind.values())
    torch.manual_seed(0)
    blocks = {name: Denoise(shape[0], NonLocal(shape[0])) for name, shape in places.items()}
    torch.manual_seed(0)
    denoised = make(behind=blocks).eval()
    torch.testing.assert_close(denoised(images()), model(images()), atol=1e-5, rtol=1e-5)
    started = [module for module in denoised.modules() if isinstance(module, NonLocal)]
    assert all(p.std() < 0.02 for module in started for p in module.parameters())  # left as it is
    with pytest.raises(ValueError, match=r"no layer \['fc9'\]; expected some of"):
        make(behind={"fc9": nn.Identity()})


def test_with_nothing_in_its_places_the_tutorials_network_keeps_the_names_of_its_weights() -> None:
    """Those of the checkpoints that are there."""
    names = [f"{i}.{kind}" for i in (0, 3, 7, 10) for kind in ("weight", "bias")]
    assert [*mnist_tutorial().state_dict()] == [*mnist_tutorial(behind={}).state_dict()] == names


def test_the_tutorials_network_drops_out_only_as_much_as_it_is_told() -> None:
    x = images()
    for dropout, same in ((0.0, True), (0.5, False)):
        model = mnist_tutorial(dropout=dropout).train()
        assert torch.equal(model(x), model(x)) == same


def test_the_fast_network_is_that_of_wong_et_al() -> None:
    model = mnist_fast(7)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert shapes == [(16, 1, 4, 4), (32, 16, 4, 4), (100, 1568), (7, 100)]
    assert model(images()).shape == (4, 7)
    assert starts_as_he_et_al(model)


def starts_as_he_et_al(model: nn.Module) -> bool:
    """Whether the widest layer's weights have deviation √(2/fan-in), and no bias is drawn."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    widest = max((layer.weight for layer in layers), key=Tensor.numel)
    deviation = widest.std().item() * (widest[0].numel() / 2) ** 0.5
    drawn = any(layer.bias.any() for layer in layers if layer.bias is not None)
    return deviation == pytest.approx(1, abs=0.02) and not drawn


def test_the_residual_network_has_four_stages_of_three_bottlenecks() -> None:
    model = resnet_denoising()
    stages = [layer for name, layer in model.named_children() if name.startswith("res")]
    weights = [p for stage in stages for p in stage.parameters() if p.shape[2:] == (3, 3)]
    assert [len(p) for p in weights] == [w for w in (16, 32, 64, 128) for _ in range(3)]
    assert starts_as_he_et_al(model)


@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 10), (1, 28, 3)])
def test_a_block_stands_behind_every_stage_and_is_the_identity(
    channels: int, size: int, classes: int
) -> None:
    how: dict[str, Any] = {"channels": channels, "widths": (2, 4, 6, 8), "blocks": 2}
    widths: list[int] = []

    def block(width: int) -> Denoise:
        widths.append(width)
        return Denoise(width, NonLocal(width))

    torch.manual_seed(0)
    plain = resnet_denoising(classes, **how).eval()
    torch.manual_seed(0)
    denoised = resnet_denoising(classes, **how, denoise=block).eval()
    x = images(2, channels, size)
    assert plain(x).shape == (2, classes)
    torch.testing.assert_close(plain(x), denoised(x))
    assert widths == [8, 16, 24, 32]
    names = [name for name, _ in denoised.named_children() if name[:3] in ("res", "den")]
    assert names == [kind + stage for stage in "2345" for kind in ("res", "denoise")]
    ours = denoised.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())
    assert activations(plain, x, "res5").shape[2:] == (-(-size // 8),) * 2
