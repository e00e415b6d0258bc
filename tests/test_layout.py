"""Models of any memory format and dtype are trained, attacked, measured, and left as they are."""

import copy
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from defenses import ImageData, attacks, boundary, diagnostics, evaluate, fit
from defenses.adversarial import (
    adversarial,
    adversarial_logit_pairing,
    clean_logit_pairing,
    logit_squeezing,
    trades,
)
from defenses.attacks.contract import attacking
from defenses.batchout import mixup
from defenses.data import crop_and_flip, to_float
from defenses.evaluation import perturbations, transfer_matrix
from defenses.jacobian import input_gradient_penalty, jacobian_penalty
from defenses.layout import Taken, taken_by
from defenses.prototype import Prototypes, confusion, prototype_conformity
from defenses.training import cross_entropy, label_smoothing, step_seconds
from tests.every_attack import Attack, drawn, every_attack, like, shorten_autoattack

LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
PGD: dict[str, Any] = {"eps": 0.1, "step_size": 0.05, "steps": 3}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_autoattack(monkeypatch)


class Viewed(nn.Module):
    """A network that flattens its maps with ``view``, as many do."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 8, 3, stride=2)
        self.linear = nn.Linear(8 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).tanh()
        return self.linear(x.view(x.size(0), -1))


class Flattened(Viewed):
    """The same with `flatten`, which takes either format."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convolution(x).tanh().flatten(1))


class ByMemory(Viewed):
    """Reads its maps as they lie in memory: wrong in channels_last, and without an error."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.convolution(x).tanh()
        return self.linear(maps.as_strided((len(x), 72), (72, 1)))


class Strict(Viewed):
    """Says, by an error of its own, that it wants contiguous images."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous() or x.stride(1) == 1:
            raise NotImplementedError("contiguous images, please")
        return self.linear(self.convolution(x).tanh().flatten(1))


class Last(Viewed):
    """A network that needs channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.convolution(x).tanh()
        return self.linear(maps.permute(0, 2, 3, 1).view(len(x), -1))


FOREIGN = {"view": Viewed, "memory": ByMemory, "strict": Strict}


def made(kind: Callable[..., nn.Module], *args: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args).eval()


def plain(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 3 * 3, 5)
    )


def split(model: nn.Module, n: int = 20, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Bytes, as data sets hold them, and the model's own labels."""
    x = (255 * drawn(n, channels)).round().byte()
    with torch.no_grad():
        weights = next(model.parameters())
        return x, model(x.to(weights.dtype) / 255).argmax(dim=1)


def data(model: nn.Module, n: int = 20, channels: int = 3) -> ImageData:
    x, y = split(model, n, channels)
    return ImageData("random", x, y, x, y, tuple("abcde"))


# Memory format


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_measured_is_what_the_model_says_of_contiguous_images(
    kind: str, channels: int
) -> None:
    model = made(FOREIGN[kind], channels)
    x, y = split(model, channels=channels)
    y[:5] = (y[:5] + 1) % 5
    right = torch.arange(20) >= 5
    attack: Attack = partial(attacks.pgd, **PGD, seed=0)
    with torch.no_grad():
        lost = model(attack(model, x / 255, y)).argmax(dim=1) == y
    assert torch.equal(evaluate(model, (x, y)).correct, right)
    assert torch.equal(evaluate(model, (x, y), attack).correct, lost)
    found = perturbations(model, (x, y), attack)
    assert torch.equal(found.clean_correct, right) and torch.equal(found.fooled, ~lost)
    matrix = transfer_matrix({"a": model, "b": made(plain, channels)}, (x, y), attack)
    assert torch.equal(matrix["a", "a"].correct, lost)
    assert diagnostics.loudness(model, (x, y))[0].n == 20
    assert diagnostics.zero_gradient_share(model, (x, y)).images == 0
    if kind != "strict":  # which `boundary` looks at in several ways
        assert torch.equal(boundary.measure(model, (x, y)).correct, right)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [None, crop_and_flip], ids=["plain", "crop and flip"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_model_that_wants_contiguous_images_is_trained_on_them(
    kind: str, augment: Any, channels: int
) -> None:
    """To the weights of the same network with a `flatten`, from which it differs by rounding."""
    model, other = made(FOREIGN[kind], channels), made(Flattened, channels)
    for one in (model, other):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        how: dict[str, Any] = {"optimizer": optimizer, "augment": augment, "batch_size": 8}
        fit(one, data(made(Viewed, channels), channels=channels), epochs=2, progress=False, **how)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)


LOSSES: dict[str, Any] = {
    "cross-entropy": cross_entropy,
    "adversarial": adversarial(partial(attacks.pgd, **PGD)),
    "trades": trades(partial(attacks.pgd, **PGD, early_stop=False)),
    "pairing": adversarial_logit_pairing(partial(attacks.fgsm, eps=0.1)),
    "jacobian": jacobian_penalty(0.1),
    "input gradient": input_gradient_penalty(0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_every_objective_trains_a_model_with_a_view(loss: Any) -> None:
    model = made(Viewed)
    (entry,) = fit(model, data(model), epochs=1, loss=loss, batch_size=8, progress=False)
    assert entry["loss"] < 10
    assert step_seconds({"one": model}, drawn(4), torch.arange(4), repeats=1)["one"] > 0


def test_a_model_that_needs_channels_last_gets_it() -> None:
    model = made(Last)
    x = (255 * drawn(20)).round().byte()
    y = made(Viewed)(x / 255).argmax(dim=1)
    assert evaluate(model, (x, y)).n == 20
    fit(model, ImageData("random", x, y, x, y, tuple("abcde")), epochs=1, progress=False)


def viewing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An attack as many write it: a step along the gradient, whose length a view measures."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    length = gradient.view(len(x), -1).norm(dim=1)
    return (
        (x + 0.5 * gradient / length[:, None, None, None]).view(len(x), -1).view_as(x).clamp(0, 1)
    )


@pytest.mark.parametrize("kind", [plain, Viewed])
def test_an_attack_a_loss_and_an_augmentation_may_look_at_images_by_a_view(kind: Any) -> None:
    model = made(kind)
    both = data(model)
    lost = model(viewing(model, both.test_images / 255, both.test_labels)).argmax(1)
    for _ in range(2):  # before and after a training that changes nothing
        accuracy = evaluate(model, both.test, viewing)
        assert torch.equal(accuracy.correct, lost == both.test_labels)
        assert perturbations(model, both.test, viewing).l2.max() < 0.51

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(model, x, y) + 0 * x.view(len(x), -1).mean()

        def augment(x: Tensor, generator: torch.Generator) -> Tensor:
            return x.view(len(x), -1).view(len(x), 3, 8, 8)

        how: dict[str, Any] = {"loss": loss, "augment": augment, "progress": False}
        fit(model, both, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), **how)


@pytest.mark.parametrize("inputs", LAYOUTS, ids=str)
@every_attack
def test_every_attack_keeps_the_form_of_the_images(attack: Attack, inputs: Any) -> None:
    """Of a network of PyTorch's own layers, in either format; of one with a view, where it can."""
    x = drawn(6).contiguous(memory_format=inputs)
    for kind in (plain, Viewed)[: 1 if inputs == torch.channels_last else 2]:
        model = made(kind)
        with torch.no_grad():
            y = model(x).argmax(dim=1)
        before = {name: like(value) for name, value in model.state_dict().items()}
        assert like(attack(model, x, y)) == like(x)
        assert {name: like(value) for name, value in model.state_dict().items()} == before


@every_layout
def test_training_leaves_the_format_of_weights_gradients_and_momentum(layout: Any) -> None:
    model = made(plain).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = split(model)
    both = ImageData("random", x, y, x, y, tuple("abcde"))
    before = {name: like(value) for name, value in model.named_parameters()}
    weights = {name: id(value) for name, value in model.named_parameters()}
    for loss in (cross_entropy, adversarial(partial(attacks.fgsm, eps=0.1))):
        fit(model, both, epochs=2, optimizer=optimizer, loss=loss, progress=False)
    evaluate(model, both.test, partial(attacks.fgsm, eps=0.1))
    for name, weight in model.named_parameters():
        held: list[Any] = [weight, weight.grad, optimizer.state[weight]["momentum_buffer"]]
        assert [like(tensor) for tensor in held] == 3 * [before[name]], name
        assert id(weight) == weights[name]
    if layout == torch.contiguous_format:
        nn.utils.parameters_to_vector(model.parameters())  # by a view of each


def test_the_format_comes_back_after_a_failure() -> None:
    model = made(plain)
    before = {name: like(value) for name, value in model.state_dict().items()}

    def fails(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(model, data(model), epochs=1, loss=fails, progress=False)
    with pytest.raises(ArithmeticError):
        attacks.fgsm(model, drawn(2), torch.zeros(2, dtype=torch.int64), eps=0.1, loss=fails)
    assert {name: like(value) for name, value in model.state_dict().items()} == before


def test_layers_of_pytorch_and_of_this_package_are_shown_channels_last_unasked() -> None:
    """So a network of the book costs no pass more."""
    shown = []

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            shown.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x)

    model = Watched(*plain())
    Watched.__module__ = "torch.nn.modules.container"
    x, y = split(model)
    shown.clear()
    evaluate(model, (x, y))
    assert shown == [(20, True)]
    Watched.__module__ = __name__
    evaluate(model, (x, y))
    assert shown[1:] == [(2, True), (2, False), (20, True)]


class Random(Viewed):
    """Draws in eval mode, counts its batches in a buffer, and flattens by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x) + 0.1 * torch.rand(x.shape))


def test_to_ask_a_model_leaves_no_trace() -> None:
    model = made(Random).train()
    model.linear.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert taken_by(model, drawn(4)).memory_format == torch.contiguous_format
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.linear.parameters()] == [False, True]  # type: ignore[union-attr]


def test_a_compiled_model_is_asked_through_its_original() -> None:
    graphs: list[Any] = []

    def compiles(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(made(Viewed), backend=compiles)
    assert taken_by(compiled, drawn(4)).memory_format == torch.contiguous_format
    assert not graphs


# Float64


class NoFloat64(TorchDispatchMode):
    """A device on which no tensor is float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            raise TypeError(f"{func}: this device has no float64")
        return out


@pytest.mark.parametrize("kind", [plain, Viewed])
def test_a_float64_model_is_measured_in_float64_on_images_of_any_dtype(kind: Any) -> None:
    model, seen = made(kind).double(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    x, y = split(model)
    for images in (x, x / 255, x.double() / 255):
        attack = partial(attacks.pgd, **PGD, seed=0)
        assert evaluate(model, (images, y)).value == 1
        found = perturbations(model, (images, y), attack)
        assert float((found.linf - 0.1).clamp(min=0).max()) < 1e-12  # in float32 1e-9 and more
        boundary.measure(model, (images, y))
        diagnostics.loudness(model, (images, y))
    assert set(seen) == {torch.float64}


def test_float64_images_stay_what_they_are_for_a_model_without_weights() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            s = x.mean(dim=(1, 2, 3)) - 0.5
            return torch.stack([-s, s], dim=1)

    seen: list[torch.dtype] = []
    x = drawn(4, dtype=torch.float64)
    y = Mean()(x).argmax(dim=1)
    assert evaluate(Mean(), (x, y)).value == 1 and set(seen) == {torch.float64}
    seen.clear()
    assert evaluate(Mean(), (x.float(), y)).value == 1 and set(seen) == {torch.float32}


def test_float64_images_are_rounded_for_a_model_in_float32_as_it_wants_them() -> None:
    model = made(plain)
    x, y = split(model)
    assert evaluate(model, (x.double() / 255, y)).value == 1


def test_a_transfer_between_dtypes_shows_each_model_what_it_takes() -> None:
    one, other = made(plain), made(plain).double()
    matrix = transfer_matrix(
        {"one": one, "other": other}, split(one), partial(attacks.fgsm, eps=0.05)
    )
    assert torch.equal(matrix["one", "one"].correct, matrix["other", "one"].correct)


OBJECTIVES: dict[str, Any] = {
    **LOSSES,
    "smoothing": label_smoothing(0.1),
    "clean pairing": clean_logit_pairing(),
    "squeezing": logit_squeezing(),
    "mixup": mixup(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_taken_in_float64_for_a_float64_model(name: str) -> None:
    model = made(plain).double()
    x, y = split(model, 8)
    torch.manual_seed(0)
    value = OBJECTIVES[name](model, x.double() / 255, y)
    assert value.dtype == torch.float64
    fit(model, data(model), epochs=1, loss=OBJECTIVES[name], progress=False)
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_prototypes_and_expectations_keep_float64() -> None:
    network = nn.Sequential()
    network.add_module("flatten", nn.Flatten())
    network.add_module("linear", nn.Linear(192, 5))
    model = Prototypes(network, {"linear": (nn.Identity(), 5)}, num_classes=5).double()
    x, y = drawn(4, dtype=torch.float64), torch.arange(4)
    assert prototype_conformity()(model, x, y).dtype == torch.float64
    assert confusion(model, x, y).dtype == torch.float64
    assert attacks.expectation.Expectation(model, 2)(x).dtype == torch.float64  # type: ignore[attr-defined]


def test_training_in_float64_is_as_exact_as_float64() -> None:
    """One epoch, written out."""
    model = made(plain).double()
    other, both = copy.deepcopy(model), data(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.clone(), y.clone()))
        return cross_entropy(model, x, y)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (entry,) = fit(
        model, both, epochs=1, loss=noted, optimizer=optimizer, batch_size=8, progress=False
    )
    losses = []
    for x, y in seen:
        loss = F.cross_entropy(other(x), y)
        other.zero_grad()
        loss.backward()
        losses.append(loss.item() * len(x))
        with torch.no_grad():
            for weight in other.parameters():
                weight.sub_(weight.grad, alpha=0.1)  # type: ignore[arg-type]
    assert abs(entry["loss"] - sum(losses) / 20) < 1e-12
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_an_augmentation_of_another_dtype_is_refused() -> None:
    model = made(plain)
    with pytest.raises(ValueError, match=r"augment returned torch\.uint8, expected torch\.float32"):
        fit(model, data(model), epochs=1, augment=lambda x, g: (255 * x).byte(), progress=False)


def test_a_device_without_float64_measures_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's: what DeepFool, JSMA, distances and boundaries ask for in float64 is not there."""
    model = made(plain)
    x, y = split(model)
    exact = boundary.measure(model, (x, y)), perturbations(model, (x, y), attacks.deepfool)
    for name in ("attacks.deepfool", "attacks.saliency", "boundary"):
        module = sys.modules[f"defenses.{name}"]
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    for attack in (
        attacks.deepfool,
        partial(attacks.jsma, gamma=0.2),
        partial(attacks.jsma, gamma=0.2, pixels_per_step=1),
        partial(attacks.fab, steps=3),
        partial(attacks.carlini_wagner, steps=5, binary_search_steps=1),
    ):
        with NoFloat64():
            attack(model, to_float(x), y)
    found = boundary.measure(model, (x, y)), perturbations(model, (x, y), attacks.deepfool)
    for one, other in zip(exact, found, strict=True):
        for name, value in vars(one).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                assert getattr(other, name).dtype == torch.float64
                torch.testing.assert_close(getattr(other, name), value, rtol=1e-3, atol=1e-4)


# The last batch


def normalized(dimensions: int = 1, eps: float = 1e-5) -> nn.Module:
    norm = nn.BatchNorm1d(8 * 3 * 3) if dimensions == 1 else nn.BatchNorm2d(8)
    layers = [*plain()]
    layers[2:2] = [norm] if dimensions == 2 else []
    layers[3:3] = [norm] if dimensions == 1 else []
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("n", "batch_size", "better"), [(17, 16, 15), (17, 8, 7), (9, 2, 3), (3, 1, 3), (1, 8, None)]
)
def test_batch_normalization_of_a_single_image_is_refused_before_the_first_step(
    n: int, batch_size: int, better: int | None
) -> None:
    model = made(normalized)
    both, before, steps = data(model, n), copy.deepcopy(model.state_dict()), []

    def noted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if len(x) > 1:
            steps.append(len(x))
        return cross_entropy(model, x, y)

    advice = f"batch_size={better}" if better else "more images"
    message = f"one image \\({n} images, batch_size={batch_size}\\).*take {advice}"
    with pytest.raises(ValueError, match=message):
        fit(model, both, epochs=1, loss=noted, batch_size=batch_size, progress=False)
    assert not steps
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    if better:
        fit(model, both, epochs=1, batch_size=better, progress=False)


def test_a_single_image_with_maps_is_enough_for_batch_normalization() -> None:
    model = made(normalized, 2)
    fit(model, data(model, 17), epochs=1, batch_size=16, progress=False)
    assert model.get_buffer("2.num_batches_tracked") == 2


def test_a_loss_that_shows_the_image_beside_another_trains_on_a_single_one() -> None:
    """TRADES shows the model the image and its twin as one batch."""
    model = made(normalized)
    loss = trades(partial(attacks.pgd, **PGD, early_stop=False))
    fit(model, data(model, 17), epochs=1, loss=loss, batch_size=16, progress=False)
    assert model.get_buffer("3.num_batches_tracked") == 2


def test_a_substitute_with_batch_normalization_is_checked_as_well() -> None:
    x = drawn(9)
    with pytest.raises(ValueError, match="one image"):
        attacks.train_substitute(
            lambda x: torch.zeros(len(x), dtype=torch.int64),
            x,
            substitute=made(normalized),
            rounds=1,
            batch_size=8,
        )


# No image


def test_an_empty_split_is_refused_by_name() -> None:
    model = made(plain)
    empty = torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    for measure in (
        lambda: evaluate(model, empty),
        lambda: evaluate(model, empty, partial(attacks.fgsm, eps=0.1)),
        lambda: perturbations(model, empty, attacks.deepfool),
        lambda: transfer_matrix({"a": model}, empty, partial(attacks.fgsm, eps=0.1)),
        lambda: boundary.measure(model, empty),
        lambda: diagnostics.loudness(model, empty),
        lambda: diagnostics.zero_gradient_share(model, empty),
    ):
        with pytest.raises(ValueError, match="there are no images to measure on"):
            measure()
    both = dataclasses.replace(data(model), train_images=empty[0], train_labels=empty[1])
    with pytest.raises(ValueError, match="there are no images to train on"):
        fit(model, both, epochs=1, progress=False)


def test_the_form_of_a_batch_is_what_is_asked_for() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.float64):
            found = to_float(x, dtype, layout)
            assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
            assert torch.equal(found, x.to(dtype) / 255)
    one = to_float(torch.zeros(2, 1, 4, 4), memory_format=torch.channels_last)
    taken = Taken(torch.device("cpu"), torch.float32, torch.contiguous_format)
    assert taken.of(one).stride() == (16, 16, 4, 1)  # which PyTorch's `contiguous` leaves as it is


@every_layout
def test_inside_an_attack_a_plain_model_is_channels_last_and_afterwards_as_it_was(
    layout: Any,
) -> None:
    model = made(plain).to(memory_format=layout)  # type: ignore[call-overload]
    weight = model[0].weight  # type: ignore[index]
    held = weight.data_ptr()
    with attacking(model, drawn(2)):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.data_ptr() == held and weight.is_contiguous(memory_format=layout)


@every_attack
def test_no_attack_shows_a_model_no_image(attack: Attack) -> None:
    """A model with a view cannot flatten none: where none is given, or all have fallen."""
    model, x = made(Viewed), drawn(4)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    assert attack(model, x[:0], y[:0]).shape == (0, 3, 8, 8)
    wrong = attack(model, x, (y + 1) % 5)
    assert wrong.shape == x.shape
