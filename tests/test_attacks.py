"""The promises of every attack, on models whose answer is known in closed form.

Each test names a fault of another library, or a line of the paper, that it guards.
"""

import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from defenses.attacks import (
    apgd,
    bim,
    carlini_wagner,
    deepfool,
    fab,
    fgsm,
    jsma,
    mim,
    pgd,
    square,
)
from defenses.attacks.contract import Forward
from defenses.attacks.losses import (
    LOSSES,
    cross_entropy,
    dlr,
    dlr_targeted,
    fools,
    log_odds,
    margin,
)
from defenses.attacks.norms import NORMS
from defenses.attacks.norms import size as size_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
FIVE: dict[str, Any] = {"eps": 0.1, "step_size": 0.05, "steps": 5}
IN_BALL: dict[str, Attack] = {
    "fgsm": partial(fgsm, eps=0.1),
    "bim": partial(bim, **FIVE),
    "mim": partial(mim, **FIVE),
    "pgd": partial(pgd, **FIVE, random_start=False),
    "pgd margin": partial(pgd, **FIVE, random_start=False, loss="margin"),
    "pgd last": partial(pgd, **FIVE, random_start=False, early_stop=False),
    "pgd random": partial(pgd, **FIVE, restarts=2, seed=0),
    "pgd random last": partial(pgd, **FIVE, seed=0, early_stop=False),
}
ALL: dict[str, Attack] = {
    **IN_BALL,
    "deepfool": deepfool,
    "fab": partial(fab, steps=5, targets=3),
    "carlini_wagner": partial(carlini_wagner, c=10.0, binary_search_steps=1, steps=20),
    "jsma": partial(jsma, theta=0.5, gamma=0.3),
    "apgd random": partial(apgd, eps=0.1, steps=5, restarts=2, seed=0),
    "apgd l2 random": partial(apgd, eps=0.5, norm="l2", steps=5, loss="margin", seed=0),
    "apgd l1 random": partial(apgd, eps=0.2, norm="l1", steps=5, seed=0),
    "square random": partial(square, eps=0.1, queries=20, seed=0),
}
EXACT = ["deepfool", "fab"]  # autocast is off in these
every_attack = pytest.mark.parametrize("attack", ALL.values(), ids=ALL.keys())


class Net(nn.Module):
    """A small network with everything that must be held still: BatchNorm and dropout."""

    def __init__(self, channels: int = 1, num_classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return 20 * self.body(x - 0.5)


class Written(nn.Module):
    """A model given by the formula of its logits."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def net(channels: int = 1, num_classes: int = 5, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(channels, num_classes).double()
        model(torch.rand(64, channels, 8, 8).double())  # BatchNorm sees some statistics
    model.eval()
    return model


class Linear(nn.Module):
    """Logits W·x + b, drawn from a seed, in float64."""

    def __init__(self, num_inputs: int, num_classes: int, seed: int = 0, scale: float = 1) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.layer = nn.Linear(num_inputs, num_classes, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(scale * torch.randn(num_classes, num_inputs, generator=draw))
            self.layer.bias.copy_(scale * torch.randn(num_classes, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def images(
    n: int, channels: int = 1, size: int = 8, low: float = 0.0, high: float = 1.0, seed: int = 0
) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, size, size, generator=draw, dtype=torch.float64)
    return low + (high - low) * x


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        labels = model.eval()(x).argmax(dim=1)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return labels


def hard_to_fool(model: Linear, lead: float = 1e3) -> Linear:
    """Give class 0 such a lead that no image within reach leaves it."""
    with torch.no_grad():
        model.layer.bias[0] += lead
    return model


# The gradient attacks against their closed forms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", IN_BALL)
def test_two_linear_classes_give_the_corner_of_the_box(name: str, device: str) -> None:
    """max of w·x over the ball and [0, 1] is at clip(x + ε·sign(w)), also at pixels 0 and 1."""
    model = hard_to_fool(Linear(64, 2)).to(device)
    x = images(20)
    x[:, :, :2], x[:, :, 2:4] = 0.0, 1.0
    x = x.to(device)
    w = (model.layer.weight[1] - model.layer.weight[0]).view(1, 1, 8, 8)
    x_adv = IN_BALL[name](model, x, torch.zeros(20, dtype=torch.int64, device=device))
    torch.testing.assert_close(x_adv, (x + 0.1 * w.sign()).clamp(0, 1).detach())


def test_fgsm_is_equation_7_for_many_classes() -> None:
    """x + ε·sign(Σ_j p_j (w_j − w_y)), the gradient of cross-entropy written out."""
    model, x = Linear(64, 7, scale=0.1), images(30, low=0.1, high=0.9)
    y = torch.arange(30) % 7
    w, p = model.layer.weight, model(x).softmax(dim=1)
    gradient = p @ w - w[y]
    x_adv = (x.flatten(1) + 0.1 * gradient.sign()).view_as(x).detach()
    torch.testing.assert_close(fgsm(model, x, y, eps=0.1), x_adv)
    torch.testing.assert_close(fgsm(model, x, y, eps=0.1, loss="ce_textbook"), x_adv)


def test_mim_is_its_equation_6() -> None:
    """Three steps of momentum, written out on a smooth model."""
    model, x, y = net(), images(6), torch.zeros(6, dtype=torch.int64)
    g, x_t = torch.zeros_like(x), x
    for _ in range(3):
        x_t = x_t.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(x_t), y).sum(), x_t)
        g = 0.7 * g + gradient / gradient.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
        x_t = (x_t + 0.04 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    x_adv = mim(model, x, y, eps=0.1, step_size=0.04, steps=3, decay=0.7, early_stop=False)
    torch.testing.assert_close(x_adv, x_t.detach())


def test_momentum_changes_the_path() -> None:
    model, x, y = net(), images(20), torch.zeros(20, dtype=torch.int64)
    budget: dict[str, Any] = {"eps": 0.1, "step_size": 0.04, "steps": 6, "early_stop": False}
    without = bim(model, x, y, **budget)
    assert torch.equal(mim(model, x, y, decay=0.0, **budget), without)
    assert not torch.equal(mim(model, x, y, **budget), without)


def test_accuracy_falls_with_eps_on_a_linear_model() -> None:
    model, x = Linear(64, 10), images(200, low=0.3, high=0.7)
    y = predicted(model, x)
    attack = partial(pgd, steps=10, random_start=False, loss="margin")
    left = [
        int((predicted(model, attack(model, x, y, eps=e, step_size=e / 4)) == y).sum())
        for e in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
    ]
    assert left[0] == 200
    assert left == sorted(left, reverse=True)
    assert left[-1] < 20


@pytest.mark.parametrize("loss", [*LOSSES, lambda model, x, y: margin(model(x), y)])
def test_a_targeted_attack_ends_at_its_target(loss: str) -> None:
    model, x = Linear(64, 6, scale=0.2), images(40)
    y = predicted(model, x)
    target = (y + 1 + torch.arange(40) % 5) % 6
    x_adv = pgd(model, x, y, eps=0.5, step_size=0.05, steps=40, target=target, loss=loss, seed=0)
    assert (predicted(model, x_adv) == target).float().mean() > 0.9
    step = fgsm(model, x, y, eps=0.01, target=target)
    assert (margin(model(step), target) < margin(model(x), target)).all()


# What is returned


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    size=st.integers(1, 9),
    num_classes=st.sampled_from([2, 3, 10, 1000]),
    eps=st.sampled_from([0.0, 1e-3, 8 / 255, 0.3, 1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    name=st.sampled_from(["fgsm", "bim", "mim", "pgd", "apgd", "square"]),
    norm=st.sampled_from(NORMS),
    seed=st.integers(0, 99),
)
def test_nothing_leaves_the_ball_or_the_range(
    n: int,
    channels: int,
    size: int,
    num_classes: int,
    eps: float,
    dtype: torch.dtype,
    name: str,
    norm: str,
    seed: int,
) -> None:
    """On a model that is fooled on the way, and on one that never is."""
    eps = min(eps, 1.0) if norm == "linf" or name in ("fgsm", "bim", "mim", "pgd") else eps
    model = Linear(channels * size**2, num_classes, seed=seed).to(dtype)
    if seed % 2:
        hard_to_fool(model)
    x = images(n, channels, size, low=-0.5, high=1.5, seed=seed).clamp(0, 1).to(dtype)
    y = torch.arange(n) % num_classes
    attack: Attack = {
        "fgsm": partial(fgsm, eps=eps),
        "bim": partial(bim, eps=eps, step_size=eps / 3, steps=4),
        "mim": partial(mim, eps=eps, step_size=eps / 3, steps=4),
        "pgd": partial(pgd, eps=eps, step_size=eps / 3, steps=4, restarts=2, seed=seed),
        "apgd": partial(apgd, eps=eps, norm=norm, steps=6, seed=seed),
        "square": partial(square, eps=eps, norm=norm, queries=30, seed=seed),
    }[name]
    before = x.clone()
    x_adv = attack(model, x, y)
    assert x_adv.dtype == dtype and x_adv.shape == x.shape and x_adv.device == x.device
    assert not x_adv.requires_grad
    assert torch.equal(x, before)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    delta = x_adv.double() - x.double()
    if name in ("apgd", "square") and norm == "l2":
        assert size_of(delta, "l2").max() <= eps * (1 + 1e-5) + 1e-7 * delta[0].numel() ** 0.5
    else:
        assert delta.abs().max() <= eps + 1e-7


@pytest.mark.parametrize("name", [name for name in ALL if "random" not in name])
@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    channels=st.sampled_from([1, 3]),
    num_classes=st.sampled_from([2, 5, 100]),
)
def test_an_image_does_not_depend_on_its_batch(
    name: str, sizes: list[int], channels: int, num_classes: int
) -> None:
    attack = ALL[name]
    model, x = net(channels, num_classes), images(sum(sizes), channels)
    y = predicted(model, x)
    whole = attack(model, x, y)
    parts = [attack(model, *part) for part in zip(x.split(sizes), y.split(sizes), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@every_attack
def test_an_image_does_not_depend_on_its_neighbours(attack: Attack) -> None:
    """Random starts are drawn for every image in every restart, whoever has left the batch."""
    model, x = net(), images(12)
    y = predicted(model, x)
    others = torch.cat([x[:6], images(6, seed=1)])
    wrong = torch.cat([y[:6], (y[6:] + 1) % 5])  # misclassified from the start
    torch.testing.assert_close(
        attack(model, others, wrong)[:6], attack(model, x, y)[:6], rtol=0, atol=1e-5
    )


@every_attack
def test_an_empty_batch_stays_empty(attack: Attack) -> None:
    x = images(3)[:0]
    assert attack(net(), x, torch.zeros(0, dtype=torch.int64)).shape == x.shape


@pytest.mark.parametrize("name", ["bim", "mim", "pgd", "pgd random", "pgd margin"])
def test_what_is_already_misclassified_comes_back_unchanged(name: str) -> None:
    model, x = net(), images(20)
    y = predicted(model, x)
    wrong = torch.arange(20) % 2 == 0
    x_adv = IN_BALL[name](model, x, torch.where(wrong, (y + 1) % 5, y))
    assert torch.equal(x_adv[wrong], x[wrong])
    assert not torch.equal(x_adv[~wrong], x[~wrong])


def window_model(low: float, high: float) -> nn.Module:
    """Class 1 exactly where low < mean pixel < high, class 0 elsewhere."""

    def formula(x: Tensor) -> Tensor:
        s = x.mean(dim=(1, 2, 3))
        inside = torch.minimum(s - low, high - s)
        return torch.stack([torch.zeros_like(s), inside], dim=1)

    return Written(formula)


def upwards(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x.sum(dim=(1, 2, 3))


def test_a_fooling_iterate_on_the_way_is_kept() -> None:
    """The walk passes through a narrow window of class 1 and out of it again."""
    model, x = window_model(0.34, 0.36), torch.full((2, 1, 4, 4), 0.2, dtype=torch.float64)
    x[1] = 0.23  # steps over the window
    y = torch.zeros(2, dtype=torch.int64)
    attack = partial(pgd, eps=0.3, step_size=0.05, steps=6, random_start=False, loss=upwards)
    x_adv = attack(model, x, y)
    assert predicted(model, x_adv).tolist() == [1, 0]
    torch.testing.assert_close(x_adv[0], torch.full_like(x_adv[0], 0.35))
    torch.testing.assert_close(x_adv[1], torch.full_like(x_adv[1], 0.53))
    last = attack(model, x, y, early_stop=False)
    torch.testing.assert_close(last[:, 0, 0, 0], torch.tensor([0.5, 0.53]).double())


def test_the_last_iterate_is_judged_too() -> None:
    model, x = window_model(0.34, 0.36), torch.full((1, 1, 4, 4), 0.2, dtype=torch.float64)
    x_adv = pgd(
        model,
        x,
        torch.zeros(1, dtype=torch.int64),
        eps=0.3,
        step_size=0.05,
        steps=3,
        random_start=False,
        loss=upwards,
    )
    assert predicted(model, x_adv) == 1


def test_an_unfooled_image_comes_back_at_its_highest_loss() -> None:
    """The loss peaks at a mean of 0.33; steps of 0.1 from 0.2 swing around it."""

    def formula(x: Tensor) -> Tensor:
        s = x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(s), -1 - (s - 0.33) ** 2], dim=1)

    x = torch.full((1, 1, 2, 2), 0.2, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.int64)
    for steps in range(1, 9):
        for attack in (bim, mim):
            x_adv = attack(Written(formula), x, y, eps=0.5, step_size=0.1, steps=steps)
            torch.testing.assert_close(x_adv, torch.full_like(x, 0.3))


def test_restarts_are_kept_image_by_image() -> None:
    """More restarts only add fooled images, and those of the first restart stay as they were.

    The model has no slope to follow: only the draw decides.
    """

    def formula(x: Tensor) -> Tensor:
        s = 1e-9 * x.mean(dim=(1, 2, 3)) + (x[:, 0, 0, 0] > 0.58).double() - 0.5
        return torch.stack([torch.zeros_like(s), s], dim=1)

    model, x = Written(formula), torch.full((200, 1, 2, 2), 0.5, dtype=torch.float64)
    y = torch.zeros(200, dtype=torch.int64)
    attack = partial(pgd, eps=0.1, step_size=1e-4, steps=1, seed=3)
    once, many = (attack(model, x, y, restarts=restarts) for restarts in (1, 8))
    fooled_once, fooled = (predicted(model, x_adv) == 1 for x_adv in (once, many))
    assert 5 <= fooled_once.sum() <= 60  # a tenth of the draws
    assert 80 <= fooled.sum() <= 160  # 1 − 0.9⁸ = 57% of them
    assert torch.equal(many[fooled_once], once[fooled_once])


def test_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    model, x = net(), images(8)
    y = predicted(model, x)
    attack = partial(pgd, eps=0.05, step_size=0.01, steps=3)
    state = torch.get_rng_state()
    first = attack(model, x, y, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, attack(model, x, y, seed=5))
    assert torch.equal(first, attack(model, x, y, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, attack(model, x, y, seed=6))
    assert torch.equal(first, attack(model, x.to(memory_format=torch.channels_last), y, seed=5))


# Gradients that vanish, and logits at the edges


@pytest.mark.parametrize("name", ["bim", "mim", "pgd random", "fgsm"])
def test_a_gradient_of_zero_everywhere_gives_no_nan(name: str) -> None:
    model = Written(lambda x: torch.stack([0 * x.sum((1, 2, 3)) + 1, 0 * x.sum((1, 2, 3))], dim=1))
    x = images(4)
    x_adv = IN_BALL[name](model, x, torch.zeros(4, dtype=torch.int64))
    assert x_adv.isfinite().all()
    if name != "pgd random":
        assert torch.equal(x_adv, x)


def test_momentum_carries_an_image_over_a_plateau() -> None:
    """torchattacks' mifgsm divides 0 by 0 there: NaN momentum, and the image freezes."""

    def formula(x: Tensor) -> Tensor:
        s = x.mean(dim=(1, 2, 3))
        rise = (s - 0.15).clamp(max=0) + 10 * (s - 0.45).clamp(min=0) - 0.2
        return torch.stack([torch.zeros_like(s), rise], dim=1)

    x, y = torch.full((2, 1, 3, 3), 0.1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    budget: dict[str, Any] = {"eps": 0.5, "step_size": 0.05, "steps": 10}
    assert (predicted(Written(formula), bim(Written(formula), x, y, **budget)) == 0).all()
    assert (predicted(Written(formula), mim(Written(formula), x, y, **budget)) == 1).all()


def test_cross_entropy_climbs_where_float32_rounds_it_to_zero() -> None:
    """Logit gaps of thousands: the textbook's gradient is exactly 0, that of "ce" is not."""
    model = Linear(64, 5, scale=3e3).float()
    x = images(50, low=0.3, high=0.7).float()
    y = predicted(model, x)
    attack = partial(pgd, eps=0.3, step_size=0.05, steps=10, random_start=False)
    assert (predicted(model, attack(model, x, y)) != y).all()
    confident = -margin(model(x), y) > 200
    frozen = attack(model, x, y, loss="ce_textbook")
    assert confident.any()
    assert torch.equal(frozen[confident], x[confident])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_sign_of_the_logits_does_not_matter(loss: str) -> None:
    """torchattacks masks by multiplication: all-negative logits give it margin 0."""
    model, x = net(), images(10)
    y = predicted(model, x)
    attack = partial(pgd, eps=0.05, step_size=0.02, steps=4, seed=0, loss=loss)
    for shift in (-1000.0, 1000.0):
        shifted = Written(partial(lambda shift, x: model(x) + shift, shift))
        torch.testing.assert_close(attack(shifted, x, y), attack(model, x, y))
    torch.testing.assert_close(
        deepfool(Written(lambda x: model(x) - 1000), x, y), deepfool(model, x, y)
    )


# The losses


def test_the_losses_are_their_formulas() -> None:
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, target = torch.arange(50) % 6, (torch.arange(50) + 2) % 6
    for i in range(50):
        others = [z[i, j] for j in range(6) if j != y[i]]
        ordered = sorted(z[i].tolist(), reverse=True)
        m = max(others) - z[i, y[i]]
        assert margin(z, y)[i] == m
        assert dlr(z, y)[i].item() == pytest.approx(m.item() / (ordered[0] - ordered[2]))
        assert dlr_targeted(z, y, target)[i].item() == pytest.approx(
            (z[i, target[i]] - z[i, y[i]]).item() / (ordered[0] - (ordered[2] + ordered[3]) / 2)
        )
        assert cross_entropy(z, y)[i].item() == pytest.approx(
            math.log(sum(math.exp(v) for v in z[i])) - z[i, y[i]].item()
        )
    torch.testing.assert_close(nn.functional.softplus(log_odds(z, y)), cross_entropy(z, y))


@pytest.mark.parametrize(("classes", "target"), [(2, False), (3, True)])
def test_dlr_with_too_few_classes_says_so(classes: int, target: bool) -> None:
    model, x, y = Linear(64, classes), images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"DLR needs at least \d classes.*has {classes}.*margin"):
        fgsm(model, x, y, eps=0.1, loss="dlr", target=y + 1 if target else None)


def test_a_callable_loss_is_the_hook_for_adaptive_attacks() -> None:
    model, x = net(), images(10)
    y = predicted(model, x)
    attack = partial(pgd, eps=0.05, step_size=0.02, steps=4, seed=0)
    named = attack(model, x, y, loss="margin")
    assert torch.equal(attack(model, x, y, loss=lambda f, x, y: margin(f(x), y)), named)
    with pytest.raises(ValueError, match="one value an image"):
        attack(model, x, y, loss=lambda f, x, y: margin(f(x), y).mean())


class Counted(nn.Module):
    """Count the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.model(x)


def test_where_nothing_is_judged_a_callable_loss_costs_one_pass_a_step() -> None:
    """So that training against it costs what training against a named loss does."""
    model, x = Counted(net()), images(10)
    y = predicted(model, x)
    attack = partial(pgd, eps=0.05, step_size=0.02, steps=4, seed=0, early_stop=False)
    found, passes = {}, {}
    for loss in ("margin", lambda f, x, y: margin(f(x), y)):
        model.passes = 0
        found[loss], passes[loss] = attack(model, x, y, loss=loss), model.passes
    assert [*passes.values()] == [4, 4]
    assert torch.equal(*found.values())


def test_where_iterates_are_judged_a_callable_loss_is_judged_on_a_pass_of_its_own() -> None:
    """By what the model says, however low the loss."""
    model, x = Counted(net()), images(10)
    y = predicted(model, x)
    attack = partial(pgd, eps=0.05, step_size=0.02, steps=4, seed=0)
    found, passes = {}, {}
    for loss in ("margin", lambda f, x, y: margin(f(x), y) - 100):
        model.passes = 0
        found[loss], passes[loss] = attack(model, x, y, loss=loss), model.passes
    assert torch.equal(*found.values())
    once, twice = passes.values()  # but for the image itself, which no loss sees
    assert twice - 1 == 2 * (once - 1)


# The model is held still, and found again as it was


@every_attack
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_is_left_as_it_was(attack: Attack, fails: bool) -> None:
    """Users of torchattacks, foolbox and ART found their model in another mode."""
    model = net().train()
    model.body[1].eval()  # a frozen BatchNorm inside a model in train mode
    model.body[0].weight.requires_grad_(False)
    grad = torch.ones(5, 128, dtype=torch.float64)
    model.body[6].weight.grad = grad
    modes = [m.training for m in model.modules()]
    requires_grad = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    seen = []

    def watch(module: nn.Module, *_: object) -> None:
        seen.append(any(m.training for m in model.modules()))
        seen.append(any(p.requires_grad for p in model.parameters()))
        if fails:
            raise RuntimeError("broken model")

    hook = model.register_forward_hook(watch)
    x = images(4)
    if fails:
        with pytest.raises(RuntimeError, match="broken model"):
            attack(model, x, torch.zeros(4, dtype=torch.int64))
    else:
        attack(model, x, torch.zeros(4, dtype=torch.int64))
    hook.remove()
    assert seen and not any(seen)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert model.body[6].weight.grad is grad and (grad == 1).all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@every_attack
def test_train_mode_and_the_callers_context_change_nothing(attack: Attack) -> None:
    model, x = net(), images(4)
    y = predicted(model, x)
    expected = attack(model, x, y)
    assert torch.equal(attack(model.train(), x, y), expected)
    assert torch.equal(attack(model, x.clone().requires_grad_(), y), expected)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), expected)
    with torch.inference_mode():
        assert torch.equal(attack(model, x.clone(), y.clone()), expected)


@every_attack
def test_a_callers_autocast_rounds_the_gradient_and_never_the_judgement(attack: Attack) -> None:
    """Whatever the rounded passes took for fooled fools in full precision, too."""
    model, x = net(num_classes=10).float(), images(60).float()
    y = predicted(model, x)
    expected, dtypes = attack(model, x, y), set()
    model.body[-1].register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = attack(model, x, y)
    assert (torch.bfloat16 in dtypes) == (attack not in [ALL[name] for name in EXACT])
    fooled, exactly = (predicted(model, images) != y for images in (x_adv, expected))
    assert (fooled == exactly).float().mean() > 0.9


def test_under_autocast_a_success_that_is_rounding_is_none() -> None:
    """The model errs everywhere in low precision, and nowhere within reach in full precision."""
    layer = nn.Linear(16, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0], [0.9]]).repeat(1, 16))

    def formula(x: Tensor) -> Tensor:
        lead = 5.0 * torch.is_autocast_enabled("cpu")
        return layer(x.flatten(1)) + torch.tensor([0.0, lead])

    x, y = torch.full((3, 1, 4, 4), 0.9), torch.zeros(3, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = pgd(Written(formula), x, y, eps=0.5, step_size=0.25, steps=3, random_start=False)
    torch.testing.assert_close(x_adv, x - 0.5)


# Errors say what was wrong and what to do

CALLS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "range": (lambda: fgsm(net(), images(2) * 255, labels(2), eps=0.1), r"\[0, 1\].*normalize"),
    "negative": (lambda: deepfool(net(), images(2) - 0.5, labels(2)), r"\[0, 1\]"),
    "nan image": (lambda: deepfool(net(), images(2) * torch.nan, labels(2)), r"\[0, 1\]"),
    "uint8": (lambda: fgsm(net(), images(2).byte(), labels(2), eps=0.1), r"uint8.*/ 255"),
    "half": (lambda: fgsm(net(), images(2).half(), labels(2), eps=0.1), "float16"),
    "no batch": (lambda: fgsm(net(), images(1)[0], labels(1), eps=0.1), r"\(N, C, H, W\)"),
    "label shape": (lambda: fgsm(net(), images(2), labels(3), eps=0.1), r"\(3,\).*\(2,\)"),
    "one-hot": (lambda: fgsm(net(), images(2), torch.eye(2), eps=0.1), "int64"),
    "label -1": (lambda: fgsm(net(), images(2), labels(2) - 1, eps=0.1), "-1"),
    "label K": (lambda: fgsm(net(), images(2), labels(2) + 5, eps=0.1), "5 classes.*6"),
    "deepfool label K": (lambda: deepfool(net(), images(2), labels(2) + 5), "5 classes.*6"),
    "target K": (lambda: fgsm(net(), images(2), labels(2), eps=0.1, target=labels(2) + 5), "5 c"),
    "target y": (lambda: fgsm(net(), images(2), labels(2), eps=0.1, target=labels(2)), "target"),
    "eps": (lambda: fgsm(net(), images(2), labels(2), eps=-0.1), "eps is -0.1"),
    "steps": (lambda: bim(net(), images(2), labels(2), eps=0.1, step_size=0.1, steps=0), "steps"),
    "step": (lambda: bim(net(), images(2), labels(2), eps=0.1, step_size=0, steps=1), "step_size"),
    "decay": (
        lambda: mim(net(), images(2), labels(2), eps=0.1, step_size=0.1, steps=1, decay=-1),
        "decay is -1",
    ),
    "loss": (lambda: fgsm(net(), images(2), labels(2), eps=0.1, loss="l2"), "'l2'.*margin"),
    "restarts": (lambda: two_restarts(random_start=False), "restarts is 2"),
    "both": (lambda: two_restarts(seed=0, generator=torch.Generator()), "both seed and"),
    "overshoot": (lambda: deepfool(net(), images(2), overshoot=-0.1), "overshoot is -0.1"),
    "candidates": (lambda: deepfool(net(), images(2), candidates=1), "candidates"),
    "ratio": (lambda: deepfool(net(), images(2), max_residue_ratio=-1), "max_residue_ratio is -1"),
    "function": (lambda: fgsm(cast(Any, torch.sin), images(2), labels(2), eps=0.1), "Module"),
    "shape": (lambda: fgsm(Written(lambda x: x), images(2), labels(2), eps=0.1), r"\(2, K\)"),
    "tuple": (lambda: fgsm(Written(lambda x: (x, x)), images(2), labels(2), eps=0.1), "tuple"),  # type: ignore[arg-type, return-value]
    "one class": (lambda: fgsm(Linear(64, 1), images(2), labels(2), eps=0.1), "at least 2"),
    "detached": (
        lambda: fgsm(Written(lambda x: net()(x.detach())), images(2), labels(2), eps=0.1),
        "differentiable",
    ),
}


def labels(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def two_restarts(**options: object) -> Tensor:
    budget: dict[str, Any] = {"eps": 0.1, "step_size": 0.1, "steps": 1, "restarts": 2, **options}
    return pgd(net(), images(2), labels(2), **budget)


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS.keys())
def test_bad_input_gets_an_error_that_helps(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@every_attack
def test_nan_logits_raise(attack: Attack) -> None:
    """NaN compares as "not fooled" and would count as robust."""
    model = Written(lambda x: torch.where(x.sum((1, 2, 3))[:, None] > 55, torch.nan, net()(x)))
    x = images(5)
    x[2] = 0.99
    with pytest.raises(ValueError, match=r"NaN logits for [14] of"):
        attack(model, x, labels(5))


@pytest.mark.parametrize("attack", [ALL[name] for name in ALL if "square" not in name])
def test_a_nan_gradient_raises(attack: Attack) -> None:
    """The norm of a dark image has slope 0/0; sign(NaN) would freeze it."""
    model = Linear(64, 5)
    normalized = Written(
        lambda x: model(x) + ((x > 0.2) * x).square().sum((1, 2, 3)).sqrt()[:, None]
    )
    x = images(3)
    x[1] = 0
    x[0] = 0.5
    with pytest.raises(ValueError, match=r"gradient is NaN for [14] of"):
        attack(normalized, x, predicted(model, x))


# DeepFool


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    num_classes=st.sampled_from([2, 3, 10, 1000]),
    overshoot=st.sampled_from([0.0001, 0.02, 0.5]),
    seed=st.integers(0, 99),
)
def test_deepfool_is_the_projection_on_the_nearest_boundary(
    n: int, channels: int, num_classes: int, overshoot: float, seed: int
) -> None:
    """min_k |f_k|/‖w_k‖ · (1 + overshoot), along −w of that class, for a linear model."""
    num_inputs = channels * 64
    model = Linear(num_inputs, num_classes, seed=seed)
    x = images(n, channels, low=0.49, high=0.51, seed=seed)
    with torch.no_grad():  # every boundary well inside the box
        level = 0.2 * torch.rand(num_classes, dtype=torch.float64)
        model.layer.bias.add_(level - model(torch.full_like(x[:1], 0.5))[0])
    k_0 = predicted(model, x)
    f = model(x) - model(x).gather(1, k_0[:, None])
    w = model.layer.weight - model.layer.weight[k_0][:, None]  # (n, K, D)
    distance = f.abs() / w.norm(dim=2)
    distance[torch.arange(n), k_0] = torch.inf
    shortest, k = distance.min(dim=1)
    expected = w[torch.arange(n), k] / w[torch.arange(n), k].norm(dim=1, keepdim=True)
    expected = expected * (shortest.clamp(min=1e-4) * (1 + overshoot))[:, None]
    x_adv = deepfool(model, x, k_0, overshoot=overshoot, candidates=num_classes)
    torch.testing.assert_close((x_adv - x).flatten(1), expected.detach())
    assert (predicted(model, x_adv) != k_0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_deepfool_returns_fooling_images_inside_the_range(device: str) -> None:
    model, x = net().float().to(device), images(30).round(decimals=1).float().to(device)
    x[:, :, :2], x[:, :, 2:4] = 0, 1
    y = predicted(model, x)
    x_adv = deepfool(model, x, y)
    assert (predicted(model, x_adv) != y).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and x_adv.dtype == torch.float32
    assert torch.equal(deepfool(model, x), x_adv)  # without labels: its own predictions


def test_what_fools_in_one_batch_fools_in_another() -> None:
    """Convolutions round otherwise in other batch sizes: a hair's breadth is not enough."""
    z = torch.tensor([[1.0, 1.0], [1.0, 1 + 2e-7], [1.0, 1.001], [-5.0, -4.99999], [2.0, 1.0]])
    y, target = labels(5), labels(5) + 1
    assert fools(z, y).tolist() == [False, False, True, False, False]
    assert fools(z, y, target).tolist() == [False, False, True, False, False]
    assert fools(torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]]), y[:2]).tolist() == [
        True,
        False,
    ]
    layer = nn.Sequential(nn.Conv2d(1, 32, 3), nn.SiLU(), nn.Flatten(), nn.Linear(1152, 10))
    x = images(200).float()
    y = predicted(layer, x)
    x_adv = deepfool(layer, x, y, overshoot=0.0)
    for size in (1, 7, 200):
        assert (torch.cat([predicted(layer, part) for part in x_adv.split(size)]) != y).all()


def test_deepfool_leaves_alone_what_it_cannot_or_need_not_fool() -> None:
    model, x = net(), images(20)
    y = predicted(model, x)
    wrong = (y + 1) % 5
    assert torch.equal(deepfool(model, x, wrong), x)
    fortress = hard_to_fool(Linear(64, 5))
    assert torch.equal(deepfool(fortress, x, labels(20)), x)
    constant = Written(lambda x: 0 * x.sum((1, 2, 3))[:, None] + torch.arange(3.0).double())
    assert torch.equal(deepfool(constant, x), x)


def test_deepfool_crosses_a_tie_and_survives_tiny_gradients() -> None:
    x = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)

    def logits(slope: float, x: Tensor) -> Tensor:
        s = x.sum(dim=(1, 2, 3))
        return slope * torch.stack([0 * s, s - 8], dim=1)

    for slope in (1.0, 1e-12, 1e-25):
        tie = Written(partial(logits, slope))
        for images_ in (x, x.float()):
            x_adv = deepfool(tie, images_)
            assert (predicted(tie, x_adv) == 1).all(), slope
            assert (x_adv - images_).flatten(1).norm(dim=1).max() < 1e-3


def test_deepfool_considers_the_classes_with_the_highest_logits() -> None:
    """Class 2 is nearer but third by its logit: two candidates do not see it."""
    model = Linear(4, 3)
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[0.0] * 4, [0.1, 0, 0, 0], [0, 10.0, 0, 0]]))
        model.layer.bias.copy_(torch.tensor([0.0, -0.06, -5.5]))
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    assert predicted(model, x) == 0
    assert predicted(model, deepfool(model, x, candidates=3)) == 2
    assert predicted(model, deepfool(model, x, candidates=2)) == 1


def test_deepfool_stops_after_its_steps() -> None:
    model, x = net(), images(40)
    y = predicted(model, x)
    fooled = [(predicted(model, deepfool(model, x, y, steps=n)) != y).sum() for n in (1, 50)]
    assert 0 < fooled[0] < fooled[1] == 40
    calls: list[int] = []
    constant = Written(lambda x: calls.append(len(x)) or net()(0 * x + x))  # type: ignore[func-returns-value]
    deepfool(constant, x, y, steps=3)
    assert sum(calls) <= 40 * (3 + 1)


def test_deepfool_skips_classes_without_changing_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Far classes are not looked at again; looking at all of them finds the same images."""
    model, x = net(num_classes=10), images(60)
    module, gradient = sys.modules[deepfool.__module__], Forward.gradient
    sizes: list[int] = []

    def counted(self: Forward, value: Tensor, x: Tensor, **options: Any) -> Tensor:
        sizes.append(len(x))
        return gradient(self, value, x, **options)

    monkeypatch.setattr(Forward, "gradient", counted)
    lazy, looks = deepfool(model, x), sum(sizes)
    sizes.clear()
    monkeypatch.setattr(module, "LOOK_AGAIN", 1e9)
    torch.testing.assert_close(deepfool(model, x), lazy)
    assert looks < 0.8 * sum(sizes)


def test_deepfool_drops_finished_images() -> None:
    model, x, sizes = net(), images(40), []
    model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    deepfool(model, x)
    assert sizes[0] == 40 and sizes[-1] < 20
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("d", [0.0, 0.02, 0.05, 0.1, 10.0])
def test_max_residue_ratio_is_equation_8(d: float) -> None:
    model, x = net(), images(40)
    y = predicted(model, x)
    free = deepfool(model, x, y)
    ratio = (free - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    limited = deepfool(model, x, y, max_residue_ratio=d)
    assert torch.equal(limited[ratio <= d], free[ratio <= d])
    assert torch.equal(limited[ratio > d], x[ratio > d])


def test_pgd_makes_no_forward_pass_that_it_does_not_need() -> None:
    """One for each iterate, one for the image itself, none for images that have left."""
    sizes: list[int] = []
    model = hard_to_fool(Linear(64, 3))
    model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    x, y = images(10), labels(10)
    y[:4] = 1  # misclassified
    pgd(model, x, y, eps=0.1, step_size=0.02, steps=5, seed=0)
    assert sizes == [10] + 6 * [6]
    sizes.clear()
    bim(model, x, y, eps=0.1, step_size=0.02, steps=5)
    assert sizes == [10] + 5 * [6]
    sizes.clear()
    fgsm(model, x, y, eps=0.1)
    assert sizes == [10]
