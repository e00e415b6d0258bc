"""What a model, a loss or an attack does in place to what it is given stays with it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import ImageData, attacks, boundary, diagnostics, evaluate, fit
from defenses.adversarial import (
    adversarial,
    adversarial_logit_pairing,
    drawn_radius,
    mixed_batch,
    trades,
)
from defenses.attacks.losses import margin
from defenses.data import batches
from defenses.evaluation import perturbations, transfer_matrix
from defenses.jacobian import input_gradient_penalty, jacobian_penalty
from defenses.models import activations
from defenses.training import cross_entropy, step_seconds
from tests.every_attack import Attack, drawn, every_attack, shorten_autoattack

Form = Callable[[nn.Module], nn.Module]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_autoattack(monkeypatch)


class Normalized(nn.Module):
    """The network on (x − 1/2)/(1/2): in place, where `own` says so."""

    def __init__(self, network: nn.Module, own: bool = False) -> None:
        super().__init__()
        self.network, self.own = network, own

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5).div_(0.5) if self.own else x.sub(0.5).div(0.5)
        return self.network(x)


def network(seed: int = 0, channels: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 5),
        ).eval()


def pair(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    return Normalized(network(seed)).eval(), Normalized(network(seed), own=True).eval()


def split(n: int = 12) -> tuple[Tensor, Tensor]:
    x = drawn(n)
    with torch.no_grad():
        return x, pair()[0](x).argmax(dim=1)


@pytest.fixture
def unchanged() -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels that are as they were when the test ends."""
    x, y = split()
    before = x.clone(), y.clone()
    yield x, y
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@every_attack
def test_a_model_that_normalizes_in_place_is_attacked_as_one_that_does_not(
    attack: Attack, unchanged: tuple[Tensor, Tensor]
) -> None:
    kind, greedy = pair()
    found = attack(greedy, *unchanged)
    assert torch.equal(found, attack(kind, *unchanged))
    assert found.min() >= 0 and found.max() <= 1


@every_attack
def test_what_an_in_place_model_makes_of_an_attack_is_measured_as_for_any_other(
    attack: Attack, unchanged: tuple[Tensor, Tensor]
) -> None:
    kind, greedy = pair()
    for measure in (evaluate, perturbations):
        one, other = (vars(measure(model, unchanged, attack)) for model in (kind, greedy))
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else True, name


def test_the_transfer_matrix_of_in_place_models_is_that_of_others(
    unchanged: tuple[Tensor, Tensor],
) -> None:
    attack = partial(attacks.fgsm, eps=0.1)
    found = [transfer_matrix({"a": pair(0)[i], "b": pair(1)[i]}, unchanged, attack) for i in (0, 1)]
    for key, accuracy in found[0].items():
        assert torch.equal(accuracy.correct, found[1][key].correct), key


def test_diagnostics_take_an_in_place_model(unchanged: tuple[Tensor, Tensor]) -> None:
    measures: list[Callable[[nn.Module], Any]] = [
        lambda model: diagnostics.zero_gradient_share(model, unchanged),
        lambda model: diagnostics.loudness(model, unchanged),
        lambda model: boundary.measure(model, unchanged),
        lambda model: diagnostics.reach(lambda m, x: m(x), model, *unchanged, eps=0.1, steps=3),
    ]
    for measure in measures:
        one, other = (str(measure(model)) for model in pair())
        assert one == other


def test_layers_that_work_in_place_are_looked_at_without_a_trace(
    unchanged: tuple[Tensor, Tensor],
) -> None:
    def with_relu(inplace: bool) -> nn.Sequential:
        first = nn.Threshold(0.3, 0.0, inplace)
        return nn.Sequential(first, *network()[:1], nn.ReLU(inplace), *network()[2:])

    x, _ = unchanged
    shifted = (x - 0.5).requires_grad_(False)
    kept = shifted.clone()
    for look in (
        lambda model: [t for both in diagnostics.layer_slopes(model, shifted) for t in both],
        lambda model: [*diagnostics.feature_noise(model, x, x.flip(0)).values()],
        lambda model: [activations(model, shifted, "2")],
    ):
        one, other = (look(with_relu(inplace).eval()) for inplace in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(shifted, kept)


class Noisy(nn.Module):
    """Draws in eval mode, and normalizes in place."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.inner = Normalized(network(), own)

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        return z + 0.1 * torch.randn(z.shape)


def test_each_draw_of_an_expectation_sees_the_image_itself() -> None:
    x, y = split()
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        attack = attacks.eot(partial(attacks.pgd, eps=0.1, step_size=0.05, steps=3, seed=0), 4)
        found.append(attack(Noisy(own).eval(), x, y))
    assert torch.equal(*found)


def greedy_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    value = margin(model(x), y.clone())
    with torch.no_grad():
        x.zero_()
        y.zero_()
    return value


@pytest.mark.parametrize("name", ["fgsm", "bim", "mim", "pgd", "apgd"])
def test_a_loss_may_write_in_the_images_and_labels_that_it_is_given(
    name: str, unchanged: tuple[Tensor, Tensor]
) -> None:
    options: dict[str, Any] = {"eps": 0.1}
    if name != "fgsm":
        options["steps"] = 4
    if name in ("bim", "mim", "pgd"):
        options["step_size"] = 0.05
    if name in ("pgd", "apgd"):
        options["seed"] = 0
    attack, model = getattr(attacks, name), pair()[0]
    expected = attack(model, *unchanged, loss=lambda m, x, y: margin(m(x), y), **options)
    assert torch.equal(attack(model, *unchanged, loss=greedy_loss, **options), expected)


def own_images(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1, **_: Any) -> Tensor:
    """An attack that works in the very tensors that it is given."""
    x.add_(eps).clamp_(0, 1)
    y.zero_()
    return x


def test_an_attack_that_works_in_place_is_measured_against_the_images(
    unchanged: tuple[Tensor, Tensor],
) -> None:
    model, (x, y) = pair()[0], unchanged
    far = (x + 0.1).clamp(0, 1)
    with torch.no_grad():
        right = model(far).argmax(dim=1) == y
    for batch_size in (5, 100):
        found = perturbations(model, unchanged, own_images, batch_size=batch_size)
        torch.testing.assert_close(found.linf.float(), (far - x).abs().flatten(1).amax(1))
        assert torch.equal(found.fooled, ~right) and found.clean_correct.all()
        accuracy = evaluate(model, unchanged, own_images, batch_size=batch_size)
        assert torch.equal(accuracy.correct, right)
    matrix = transfer_matrix({"a": model}, unchanged, own_images)
    assert torch.equal(matrix["a", "a"].correct, right)


def moved(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1, **_: Any) -> Tensor:
    return (x + eps).clamp(0, 1)


OBJECTIVES: dict[str, Callable[[Any], Any]] = {
    "adversarial": adversarial,
    "mixed batch": mixed_batch,
    "pairing": adversarial_logit_pairing,
    "trades": trades,
    "drawn radius": lambda attack: adversarial(drawn_radius(attack, 0.1, 0.1)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_keeps_its_clean_images_from_its_attack(
    name: str, unchanged: tuple[Tensor, Tensor]
) -> None:
    expected = OBJECTIVES[name](moved)(pair()[0], *unchanged)
    assert torch.equal(OBJECTIVES[name](own_images)(pair()[0], *unchanged), expected)


PENALTIES: dict[str, Any] = {
    "jacobian": jacobian_penalty(0.1),
    "projected": jacobian_penalty(0.1, projections=5),
    "input gradient": input_gradient_penalty(0.1),
    "cross-entropy": cross_entropy,
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_takes_a_model_that_works_in_place(name: str) -> None:
    values = []
    for model in pair():
        torch.manual_seed(0)
        value = PENALTIES[name](model, *split())
        values.append([value, *torch.autograd.grad(value, [*model.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_training_an_in_place_model_leaves_the_data_as_they_are() -> None:
    x, y = split(20)
    data = ImageData("random", x, y, x, y, tuple("abcde"))
    before, states = (x.clone(), y.clone()), []
    for model in pair():
        loss = adversarial(partial(attacks.fgsm, eps=0.1))
        fit(model, data, epochs=1, loss=loss, batch_size=8, progress=False)
        step_seconds({"one": model}, x, y, repeats=1)
        evaluate(model, data.test)
        states.append(model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_a_batch_is_a_copy_also_of_floats_in_order() -> None:
    x = drawn(6).contiguous(memory_format=torch.channels_last)
    y, before = torch.arange(6), x.clone()
    for images, labels in batches(x, y, 4):
        images.zero_()
        labels.zero_()
    assert torch.equal(x, before) and torch.equal(y, torch.arange(6))


def test_an_oracle_may_write_in_what_it_is_asked_about() -> None:
    def greedy(x: Tensor) -> Tensor:
        labels = (x.mean(dim=(1, 2, 3)) > 0.5).long()
        x.zero_()
        return labels

    def kind(x: Tensor) -> Tensor:
        return (x.mean(dim=(1, 2, 3)) > 0.5).long()

    x = drawn(8)
    substitutes = [
        attacks.train_substitute(oracle, x, substitute=network(), rounds=2, epochs=1, batch_size=4)
        for oracle in (kind, greedy)
    ]
    states = [s.state_dict() for s in substitutes]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# What an attack returns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x, None), "a tuple"),
        (lambda x: None, "a NoneType"),
        (lambda x: x.numpy(), "a ndarray"),
        (lambda x: x.double(), "dtype torch.float64, expected torch.float32"),
        (lambda x: x.half(), "dtype torch.float16, expected torch.float32"),
        (lambda x: (255 * x).byte(), "dtype torch.uint8, expected torch.float32"),
        (lambda x: x[:1], r"shape \(1, 3, 8, 8\), expected \(12, 3, 8, 8\)"),
        (lambda x: x.to("meta"), "device meta, expected cpu"),
    ],
    ids=["tuple", "none", "numpy", "float64", "float16", "bytes", "shape", "device"],
)
def test_what_an_attack_returns_is_images_like_those_given(
    change: Callable[[Tensor], Any], message: str
) -> None:
    def attack(model: nn.Module, x: Tensor, y: Tensor, **_: Any) -> Any:
        return change(x)

    model, (x, y) = pair()[0], split()
    measures: list[Callable[[], Any]] = [
        lambda: evaluate(model, (x, y), attack),
        lambda: perturbations(model, (x, y), attack),
        lambda: transfer_matrix({"a": model}, (x, y), attack),
        *(lambda make=make: make(attack)(model, x, y) for make in OBJECTIVES.values()),
    ]
    for measure in measures:
        shape = message.replace("12", "(6|12)") if "shape" in message else message
        with pytest.raises(ValueError, match=f"the attack returned {shape}"):
            measure()


def test_trades_is_itself_on_images_that_its_attack_did_not_touch() -> None:
    model, (x, y) = pair()[0], split()
    with torch.no_grad():
        z, far = model(x), model(moved(model, x, y))
        divergence = (z.softmax(1) * (z.log_softmax(1) - far.log_softmax(1))).sum(1).mean()
        expected = F.cross_entropy(z, y) + 6 * divergence
    torch.testing.assert_close(trades(own_images)(model, x, y), expected)
