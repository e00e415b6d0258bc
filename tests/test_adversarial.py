"""Adversarial training: the mixtures of the papers, by an attack that leaves no trace."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from defenses.adversarial import (
    Attack,
    adversarial,
    adversarial_logit_pairing,
    clean_logit_pairing,
    collapsed,
    divergence,
    drawn_radius,
    logit_squeezing,
    mixed_batch,
    trades,
)
from defenses.attacks import bim, fgsm, mim, pgd
from defenses.attacks.losses import PerImageLoss
from defenses.data import load_data
from defenses.evaluation import evaluate
from defenses.models import mnist_compact
from defenses.training import Loss, cross_entropy, fit, label_smoothing


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


# Predictions and logits in pairs


def darkened(model: nn.Module, x: Tensor, y: Tensor, loss: PerImageLoss) -> Tensor:
    return darken(model, x, y)


def softmax_pair(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.manual_seed(seed)
    z, d = (torch.randn(50, 10, dtype=torch.float64, generator=generator) for _ in range(2))
    return scale * z, d


def test_the_divergence_is_that_of_the_definition() -> None:
    z, d = softmax_pair(0)
    p, q = z.softmax(1), (z + d).softmax(1)
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(divergence(z, z + d).double(), expected, atol=1e-5, rtol=1e-4)
    assert divergence(z, z + d).dtype == torch.float64  # as they are given
    assert divergence(z.half(), (z + d).half()).dtype == torch.float32
    assert torch.equal(divergence(z.bfloat16(), (z + d).bfloat16()).isfinite(), torch.ones(50) > 0)


@hypothesis.given(st.integers(0, 1000), st.floats(-20, 20))
def test_the_divergence_sees_no_common_shift_and_is_never_negative(seed: int, by: float) -> None:
    z, d = softmax_pair(seed)
    assert (divergence(z, z + d) > 0).all()
    assert (divergence(z, z + by).abs() < 1e-4).all()


@hypothesis.given(st.integers(0, 1000), st.floats(0.01, 10))
def test_the_divergence_is_at_most_a_quarter_of_the_squared_distance(seed: int, t: float) -> None:
    z, d = softmax_pair(seed)
    assert (divergence(z, z + t * d) <= t**2 * d.square().sum(1) / 4 + 1e-5).all()


def test_for_small_changes_the_divergence_is_half_a_variance() -> None:
    z, d = softmax_pair(1, scale=1.0)
    p = z.softmax(1)
    variance = (p * d**2).sum(1) - (p * d).sum(1) ** 2
    t = 0.05
    torch.testing.assert_close(
        divergence(z, z + t * d).double() / t**2, variance / 2, atol=5e-3, rtol=0.2
    )


def test_trades_is_cross_entropy_and_the_divergence_of_the_predictions(
    batch: tuple[Tensor, Tensor],
) -> None:
    model, (x, y) = linear(), batch
    z, dark = model(x), model(0.5 * x)
    for beta in (0.0, 2.0):
        expected = F.cross_entropy(z, y) + beta * divergence(z, dark).mean()
        ours = trades(darkened, beta)(model, x, y)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, [*model.parameters()], retain_graph=True),
            torch.autograd.grad(expected, [*model.parameters()], retain_graph=True),
        )


def test_the_attack_of_trades_climbs_away_from_the_prediction_and_needs_no_label(
    batch: tuple[Tensor, Tensor],
) -> None:
    torch.manual_seed(0)
    model, (x, y) = mnist_compact(norm="batch").train(), batch
    seen = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, loss: PerImageLoss) -> Tensor:
        held = copy.deepcopy(model).eval()
        with torch.no_grad():
            z = held(x)
            at_image = loss(held, x, y)
            elsewhere = loss(held, 0.5 * x, (y + 1) % 10)
        seen.append(torch.allclose(elsewhere, divergence(z, held(0.5 * x)), atol=1e-5))
        seen.append(bool((at_image.abs() < 1e-5).all()))
        climbed = pgd(model, x, y, eps=0.2, step_size=0.05, steps=5, early_stop=False, loss=loss)
        with torch.no_grad():
            far, start = loss(held, climbed, y), loss(held, x + 0.2 * torch.rand_like(x), y)
        seen.append(float(far.mean()) > float(start.mean()))
        return climbed

    trades(attack)(model, x, y)
    assert seen == [True] * 3


def test_at_the_image_itself_the_divergence_has_no_gradient(batch: tuple[Tensor, Tensor]) -> None:
    """So an attack of TRADES has to start elsewhere."""
    model, (x, y) = linear(), batch
    steepest = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, loss: PerImageLoss) -> Tensor:
        for start in (x.clone().requires_grad_(), (0.5 * x).requires_grad_()):
            (gradient,) = torch.autograd.grad(loss(model, start, y).sum(), start)
            steepest.append(float(gradient.abs().max()))
        return x

    trades(attack)(model, x, y)
    assert steepest[0] < 1e-6 < 1e-3 < steepest[1]


PAIRED: dict[str, Callable[[Attack], Loss]] = {
    "trades": lambda attack: trades(lambda *a, loss: attack(*a)),
    "alp": adversarial_logit_pairing,
    "plain + alp": functools.partial(adversarial_logit_pairing, share=0.0),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("autocast", [False, True])
def test_pairs_pass_as_one_batch_and_leave_no_trace(
    name: str, autocast: bool, batch: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    model, (x, y) = mnist_compact(norm="batch").train(), batch
    twin, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    attack = functools.partial(pgd, eps=0.2, step_size=0.1, steps=2, random_start=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x_adv = attack(copy.deepcopy(model).eval(), x, y)
        torch.manual_seed(1)
        PAIRED[name](attack)(model, x, y)
        torch.manual_seed(1)
        twin(torch.cat([x, x_adv]))
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    state = twin.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_adversarial_logit_pairing_is_that_of_the_paper(
    share: float, weight: float, batch: tuple[Tensor, Tensor]
) -> None:
    model, (x, y) = linear(), batch
    ours = adversarial_logit_pairing(darken, weight, share)(model, x, y)
    z, dark = model(x), model(0.5 * x)
    expected = (1 - share) * F.cross_entropy(z, y) + share * F.cross_entropy(dark, y)
    expected = expected + weight * (z - dark).square().sum() / (16 * 10)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, [*model.parameters()]),
        torch.autograd.grad(expected, [*model.parameters()]),
    )


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_without_weight_logit_pairing_is_adversarial_training(
    share: float, batch: tuple[Tensor, Tensor]
) -> None:
    """Where no batch statistics tell one batch from two."""
    model, (x, y), attack = linear(), batch, functools.partial(fgsm, eps=0.1)
    torch.testing.assert_close(
        adversarial_logit_pairing(attack, 0.0, share)(model, x, y),
        adversarial(attack, share)(model, x, y),
    )


def test_beta_is_six_and_every_other_weight_a_half_by_default(
    batch: tuple[Tensor, Tensor],
) -> None:
    model, (x, y) = linear(), batch
    for default, said in (
        (trades(darkened), trades(darkened, 6.0)),
        (adversarial_logit_pairing(darken), adversarial_logit_pairing(darken, 0.5, 0.5)),
        (clean_logit_pairing(), clean_logit_pairing(0.5)),
        (logit_squeezing(), logit_squeezing(0.5)),
    ):
        torch.testing.assert_close(default(model, x, y), said(model, x, y))


@pytest.mark.parametrize(("n", "pairs"), [(16, 8), (7, 3), (2, 1)])
def test_clean_pairs_are_the_halves_of_the_batch(
    n: int, pairs: int, batch: tuple[Tensor, Tensor]
) -> None:
    model, x, y = linear(), batch[0][:n], batch[1][:n]
    z = model(x)
    apart = sum((z[i] - z[pairs + i]).square().sum() for i in range(pairs)) / (10 * pairs)
    ours, expected = clean_logit_pairing(0.7)(model, x, y), F.cross_entropy(z, y) + 0.7 * apart
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, [*model.parameters()]),
        torch.autograd.grad(expected, [*model.parameters()]),
    )


def test_over_random_pairs_clean_pairing_is_twice_the_variance_of_the_logits(
    batch: tuple[Tensor, Tensor],
) -> None:
    """The mean over all pairs of different images, and over the K classes."""
    model, (x, y) = linear(), batch
    every, apart = torch.arange(len(x)), []
    for shift in range(1, len(x)):
        order = torch.cat([every, every.roll(shift)])
        paired = clean_logit_pairing(1.0)(model, x[order], y[order])
        apart.append(paired - cross_entropy(model, x, y))
    expected = 2 * model(x).var(dim=0).sum() / 10
    torch.testing.assert_close(torch.stack(apart).mean(), expected)


def test_an_image_alone_has_no_pair(batch: tuple[Tensor, Tensor]) -> None:
    model, x, y = linear(), batch[0][:1], batch[1][:1]
    torch.testing.assert_close(clean_logit_pairing()(model, x, y), cross_entropy(model, x, y))


def test_squeezing_adds_the_mean_length_of_the_logits(batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = linear(), batch
    z = model(x)
    expected = F.cross_entropy(z, y) + 0.3 * z.square().sum(1).sqrt().mean()
    ours = logit_squeezing(0.3)(model, x, y)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, [*model.parameters()]),
        torch.autograd.grad(expected, [*model.parameters()]),
    )
    for weight in model.parameters():
        nn.init.zeros_(weight)
    logit_squeezing()(model, x, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [-0.1, math.nan])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(trades, darken),
        functools.partial(adversarial_logit_pairing, darken),
        clean_logit_pairing,
        logit_squeezing,
    ],
)
def test_a_negative_weight_is_refused(make: Callable[[float], Loss], bad: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0, got"):
        make(bad)


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan])
def test_a_share_of_pairs_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got"):
        adversarial_logit_pairing(darken, share=share)


class Rounded(nn.Module):
    """The logits that a model has in bfloat16, as float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


@pytest.mark.parametrize(
    "loss",
    [
        trades(darkened),
        adversarial_logit_pairing(darken),
        clean_logit_pairing(),
        logit_squeezing(),
    ],
    ids=["trades", "alp", "clp", "lsq"],
)
def test_what_is_added_is_taken_in_float32(loss: Loss, batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = linear(), batch
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        ours = loss(model, x, y)
    torch.testing.assert_close(ours, loss(Rounded(model), x, y))


SMALL = functools.partial(pgd, eps=0.1, step_size=0.05, steps=2, early_stop=False)
ALL: dict[str, Loss] = {
    "trades": trades(SMALL, beta=1.0),
    "alp": adversarial_logit_pairing(SMALL),
    "clp": clean_logit_pairing(0.1),
    "lsq": logit_squeezing(0.1),
    "drawn": trades(drawn_radius(SMALL, 0.0, 0.1)),
    "alp of a share": mixed_batch(functools.partial(fgsm, eps=0.1), 0.5, clean_logit_pairing(0.1)),
}


@pytest.mark.parametrize("name", ALL)
def test_every_objective_trains(name: str) -> None:
    data, model = load_data("digits"), linear()
    history = fit(model, data, epochs=3, loss=ALL[name], progress=False)
    losses = [row["loss"] for row in history]
    assert losses[-1] < losses[0]
    assert evaluate(model, data.test).value > 0.8


def test_a_drawn_radius_passes_on_what_the_attack_takes(batch: tuple[Tensor, Tensor]) -> None:
    taken = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, loss: str) -> Tensor:
        taken.append((eps, loss))
        return x

    model = linear()
    for _ in range(20):
        drawn_radius(attack, 0.1, 0.3)(model, *batch, loss="margin")
    radii = [eps for eps, _ in taken]
    assert {loss for _, loss in taken} == {"margin"}
    assert 0.1 <= min(radii) < max(radii) <= 0.3


# Catastrophic overfitting


def epochs(*found: float, name: str = "pgd") -> list[dict[str, float]]:
    return [{"epoch": i, "loss": 1.0, name: value} for i, value in enumerate(found, 1)]


@pytest.mark.parametrize(
    ("found", "epoch"),
    [
        ((0.1, 0.4, 0.5, 0.45), None),
        ((0.1, 0.4, 0.1, 0.5, 0.0), 3),
        ((0.5, 0.25), 2),
        ((0.5, 0.25, 0.0), 2),
        ((0.5, 0.375, 0.25), None),  # from one epoch to the next
        ((0.75, 0.55), None),
        ((0.5,), None),
        ((), None),
    ],
)
def test_a_collapse_is_a_fall_from_one_epoch_to_the_next(
    found: tuple[float, ...], epoch: int | None
) -> None:
    assert collapsed(epochs(*found), drop=0.21) == epoch
    assert collapsed(epochs(*found, name="other"), "other", 0.21) == epoch


@pytest.mark.parametrize(("fall", "epoch"), [(0.25, None), (0.2501, 2)])
def test_a_fall_by_exactly_drop_is_no_collapse(fall: float, epoch: int | None) -> None:
    assert collapsed(epochs(0.5, 0.5 - fall), drop=0.25) == epoch


def test_a_fifth_is_a_collapse_by_default() -> None:
    assert collapsed(epochs(0.5, 0.31)) is None and collapsed(epochs(0.5, 0.29)) == 2


@pytest.mark.parametrize("start", [n / 100 for n in range(20, 101)])
def test_a_fall_by_just_the_drop_is_no_collapse_wherever_it_begins(start: float) -> None:
    assert collapsed(epochs(start, round(start - 0.2, 2))) is None
    assert collapsed(epochs(start, round(start - 0.21, 2))) == 2


def test_trades_refuses_an_attack_that_drops_images() -> None:
    images, labels = load_data("digits").train
    early = functools.partial(pgd, eps=0.3, step_size=0.1, steps=3)
    with pytest.raises(ValueError, match="early_stop=False"):
        trades(early)(linear(), images[:64] / 255, labels[:64])


AT_THE_IMAGE: dict[str, Any] = {
    "fgsm": functools.partial(fgsm, eps=0.1),
    "bim": functools.partial(bim, eps=0.1, step_size=0.05, steps=3, early_stop=False),
    "mim": functools.partial(mim, eps=0.1, step_size=0.05, steps=3, early_stop=False),
    "pgd": functools.partial(
        pgd, eps=0.1, step_size=0.05, steps=3, early_stop=False, random_start=False
    ),
    "a partial of a partial": functools.partial(
        functools.partial(pgd, random_start=False), eps=0.1, step_size=0.05, steps=3
    ),
    "a drawn radius": drawn_radius(
        functools.partial(bim, step_size=0.05, steps=3, early_stop=False), 0.1, 0.2
    ),
    "one's own": lambda model, x, y, loss: (
        x + 0.1 * torch.autograd.grad(loss(model, x.requires_grad_(), y).sum(), x)[0].sign()
    ),
}


@pytest.mark.parametrize("name", AT_THE_IMAGE)
def test_trades_refuses_an_attack_that_starts_at_the_images(
    name: str, batch: tuple[Tensor, Tensor]
) -> None:
    """There the divergence is 0 and has no gradient: training would be on the clean images."""
    with pytest.raises(ValueError, match=r"starts at the images.*random start"):
        trades(AT_THE_IMAGE[name])(linear(), *batch)


@pytest.mark.parametrize("attack", ["pgd", "drawn"])
def test_trades_takes_one_that_starts_elsewhere(attack: str, batch: tuple[Tensor, Tensor]) -> None:
    options: dict[str, Any] = {"step_size": 0.05, "steps": 3, "early_stop": False}
    climb = functools.partial(pgd, **options, eps=0.1)
    if attack == "drawn":
        climb = drawn_radius(functools.partial(pgd, **options), 0.1, 0.2)  # type: ignore[assignment]
    assert trades(climb)(linear(), *batch).isfinite()
