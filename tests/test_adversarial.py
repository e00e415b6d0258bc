"""Adversarial training: the mixtures of the papers, by an attack that leaves no trace."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.adversarial import adversarial, mixed_batch
from defenses.attacks import fgsm, pgd
from defenses.data import load_data
from defenses.evaluation import evaluate
from defenses.models import mnist_compact
from defenses.training import cross_entropy, fit, label_smoothing


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    images, labels = load_data("digits").train
    return images[:16] / 255, labels[:16]


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def darken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * x


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_objective_is_the_papers_mixture(share: float, batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = linear(), batch
    mixed = adversarial(darken, share)(model, x, y)
    clean, hard = F.cross_entropy(model(x), y), F.cross_entropy(model(0.5 * x), y)
    torch.testing.assert_close(mixed, (1 - share) * clean + share * hard)
    ours = torch.autograd.grad(mixed, [*model.parameters()])
    expected = torch.autograd.grad((1 - share) * clean + share * hard, [*model.parameters()])
    torch.testing.assert_close(ours, expected)


def test_half_is_the_share_of_the_paper_and_objectives_compose(
    batch: tuple[Tensor, Tensor],
) -> None:
    model, (x, y), smooth = linear(), batch, label_smoothing(0.1)
    mixed = adversarial(darken, loss=smooth)(model, x, y)
    torch.testing.assert_close(mixed, (smooth(model, x, y) + smooth(model, 0.5 * x, y)) / 2)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got"):
        adversarial(darken, share)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_attack_leaves_no_trace_in_the_model(
    autocast: bool, batch: tuple[Tensor, Tensor]
) -> None:
    """All is as after a pass over the two batches alone, and the attack sees no dropout."""
    torch.manual_seed(0)
    model, (x, y) = mnist_compact(norm="batch").train(), batch
    model.get_submodule("pool2").eval()  # a mode of its own
    twin, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    attack = functools.partial(pgd, eps=0.2, step_size=0.1, steps=2, random_start=False)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x_adv = attack(copy.deepcopy(model).eval(), x, y)
        torch.manual_seed(1)
        attacked = adversarial(attack)(model, x, y)
        torch.manual_seed(1)
        hard = cross_entropy(twin, x_adv, y)
        expected = 0.5 * cross_entropy(twin, x, y) + 0.5 * hard
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.testing.assert_close(attacked, expected)
    state = twin.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.get_buffer("norm_conv1.num_batches_tracked") == 2


def test_training_against_an_attack_helps_against_it() -> None:
    data = load_data("digits")
    attack = functools.partial(fgsm, eps=0.1)
    left = []
    for loss in (cross_entropy, adversarial(attack)):
        model = linear()
        fit(model, data, epochs=8, loss=loss, progress=False)
        left.append(evaluate(model, data.test, attack=attack).value)
    plain, trained = left
    assert trained > plain + 0.05


# A share of the batch


@pytest.mark.parametrize(
    ("share", "n", "count"),
    [
        (0.0, 16, 0),
        (1.0, 16, 16),
        (0.5, 7, 3),
        (0.1, 9, 0),
        (0.3, 10, 3),
        (0.29, 100, 29),  # 28.999… in floating point
        (0.57, 100, 57),
        (0.7, 10, 7),  # 7.000…1
        (0.1, 500, 50),
    ],
)
def test_the_last_images_of_the_batch_are_attacked(share: float, n: int, count: int) -> None:
    x, y = torch.rand(n, 1, 2, 2), torch.arange(n)
    attacked, trained_on = [], []

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attacked.append((x.clone(), y))
        return darken(model, x, y)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        trained_on.append((x, y))
        return x.sum()

    before = x.clone()
    mixed_batch(attack, share, loss)(nn.Flatten(), x, y)
    ((images, labels),) = trained_on  # all of them at once
    assert torch.equal(labels, y)
    assert torch.equal(images[: n - count], x[: n - count])
    assert torch.equal(images[n - count :], 0.5 * x[n - count :])
    assert torch.equal(x, before)
    assert len(attacked) == (count > 0)
    for given, labels in attacked:
        assert torch.equal(given, x[n - count :]) and torch.equal(labels, y[n - count :])


def test_a_mixed_batch_is_one_batch_to_the_model(batch: tuple[Tensor, Tensor]) -> None:
    """Batch statistics are those of clean and attacked images together; dropout is drawn once."""
    torch.manual_seed(0)
    model, (x, y) = mnist_compact(norm="batch").train(), batch
    twin = copy.deepcopy(model)
    attack = functools.partial(fgsm, eps=0.1)
    together = torch.cat([x[:12], attack(copy.deepcopy(model), x[12:], y[12:])])
    torch.manual_seed(1)
    ours = mixed_batch(attack, 0.25)(model, x, y)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, cross_entropy(twin, together, y))
    state = twin.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.get_buffer("norm_conv1.num_batches_tracked") == 1


def test_half_the_batch_is_attacked_by_default_and_objectives_compose(
    batch: tuple[Tensor, Tensor],
) -> None:
    model, (x, y), smooth = linear(), batch, label_smoothing(0.1)
    together = torch.cat([x[:8], 0.5 * x[8:]])
    mixed = mixed_batch(darken, loss=smooth)(model, x, y)
    torch.testing.assert_close(mixed, smooth(model, together, y))


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan])
def test_a_share_of_the_batch_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got"):
        mixed_batch(darken, share)
