"""Square on models whose best answer is known, and a substitute that sees nothing but labels."""

import copy
import math
import sys
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from defenses.attacks import fgsm, pgd
from defenses.attacks.blackbox import HALVED_AT, _bump, _eta, _moved_mass, square, square_search
from defenses.attacks.losses import margin
from defenses.attacks.norms import NORMS
from defenses.attacks.substitute import train_substitute
from defenses.data import load_data, to_float
from defenses.evaluation import wilson
from defenses.models import lenet
from tests.test_attacks import (
    DEVICES,
    Linear,
    Written,
    hard_to_fool,
    images,
    labels,
    net,
    predicted,
)
from tests.test_peers import left, torchattacks_attack

every_norm = pytest.mark.parametrize("norm", NORMS)
EPS = {"linf": 0.05, "l2": 0.5}


def counted(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, queries: int = 200, **options: Any
) -> tuple[Tensor, Tensor]:
    how: dict[str, Any] = {"p_init": 0.8, "schedule": None, "eps": EPS[norm]} | options
    how.setdefault("generator", torch.Generator().manual_seed(0))
    return square_search(model, x, y, norm=norm, queries=queries, **how)


# Square against what is known in closed form


@pytest.mark.parametrize("device", DEVICES)
def test_on_a_linear_model_linf_reaches_the_corner(device: str) -> None:
    """max of w·x over the ball and [0, 1] is at clip(x + ε·sign(w)), also at pixels 0 and 1."""
    model, x = hard_to_fool(Linear(16, 2)).to(device), images(20, size=4)
    x[:, :, :1], x[:, :, 1:2] = 0.0, 1.0
    x = x.to(device)
    w = (model.layer.weight[1] - model.layer.weight[0]).view(1, 1, 4, 4)
    y = torch.zeros(20, dtype=torch.int64, device=device)
    x_adv = square(model, x, y, eps=0.1, queries=600, seed=0)
    torch.testing.assert_close(x_adv, (x + 0.1 * w.sign()).clamp(0, 1).detach())


def test_one_channel_needs_few_queries_because_none_changes_nothing() -> None:
    """At squares of one pixel half of all signs would leave the image as it is."""
    seen: list[Tensor] = []
    model, x = hard_to_fool(Linear(64, 2)), images(1, low=0.3, high=0.7)
    model.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    square(model, x, labels(1), eps=0.1, queries=300, seed=0)
    best, value = seen[1], margin(model(seen[1]), labels(1))
    for x_new in seen[2:300]:
        assert not torch.equal(x_new, best)
        if (higher := margin(model(x_new), labels(1))) > value:
            best, value = x_new, higher


def test_l2_goes_most_of_the_way_on_a_linear_model() -> None:
    """max of w·δ over ‖δ‖ <= ε is ε‖w‖: of a smooth w, random bumps find two thirds."""
    model, x = hard_to_fool(Linear(64, 2)), images(10, low=0.45, high=0.55)
    ramp = torch.linspace(-1, 1, 8, dtype=torch.float64).expand(8, 8).flatten()
    with torch.no_grad():
        model.layer.weight.copy_(torch.stack([-ramp, ramp]))
    x_adv = square(model, x, labels(10), eps=0.5, norm="l2", queries=1000, seed=0)
    gain = margin(model(x_adv), labels(10)) - margin(model(x), labels(10))
    share = gain.detach() / (0.5 * 2 * ramp.norm())
    assert share.min() > 0.6 and share.max() <= 1 + 1e-9
    torch.testing.assert_close((x_adv - x).flatten(1).norm(dim=1), torch.full((10,), 0.5).double())


def test_the_first_guess_is_stripes_or_bumps() -> None:
    model, x = hard_to_fool(Linear(300, 2)), images(6, 3, 10, low=0.4, high=0.6)
    stripes = square(model, x, labels(6), eps=0.1, queries=1, seed=0) - x
    torch.testing.assert_close(stripes, stripes[:, :, :1].expand_as(stripes))
    torch.testing.assert_close(stripes.abs(), torch.full_like(x, 0.1))
    delta = square(model, x, labels(6), eps=0.3, norm="l2", queries=1, seed=0) - x
    tile = 0.3 / math.sqrt(3 * 5 * 5) * _eta(2, x.dtype, x.device)
    for i, j in ((0, 0), (4, 8), (8, 2)):
        found = delta[:, :, i : i + 2, j : j + 2]
        signed = torch.stack([tile, -tile, tile.T, -tile.T])
        distance = (found[:, :, None] - signed).abs().amax(dim=(3, 4)).amin(dim=2)
        assert distance.max() < 1e-12


def test_eta_is_equation_2() -> None:
    """Σ_{k=0}^{M} 1/(n+1−k)² with M = n − distance to the middle; the halves have equal mass."""
    h, w = 5, 9  # n is half of the longer side
    n, bump = w // 2, torch.zeros(h, w, dtype=torch.float64)
    for r in range(h):
        for s in range(w):
            reach = n - max(abs(r - h // 2), abs(s - w // 2))
            bump[r, s] = sum(1 / (n + 1 - k) ** 2 for k in range(reach + 1))
    torch.testing.assert_close(_bump(h, w), bump / bump.norm())
    eta = _eta(9, torch.float64, torch.device("cpu"))
    assert (eta[:4] > 0).all() and (eta[4:] < 0).all()
    torch.testing.assert_close(eta.norm() ** 2, 2 * eta[:4].norm() ** 2)


@every_norm
@pytest.mark.parametrize(("schedule", "stretch"), [(None, 1000), (4000, 4000)])
def test_squares_shrink_on_schedule(
    norm: str, schedule: int | None, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side is √(p·H·W) while p is halved; AutoAttack leaves the end of its schedule out."""
    module, sides = sys.modules[square.__module__], []
    window = vars(module)["_window"]

    def recorded(x: Tensor, side: int, draw: Any) -> Any:
        sides.append(side)
        return window(x, side, draw)

    monkeypatch.setattr(module, "_window", recorded)
    model, x = hard_to_fool(Linear(400, 2)), images(1, size=20, low=0.3, high=0.7)
    square(model, x, labels(1), eps=0.1, norm=norm, queries=1000, schedule=schedule, seed=0)
    expected = []
    for i in range(999):
        p = 0.8 / 2 ** sum(int(i / stretch * 10_000) > at for at in HALVED_AT)
        side = round(math.sqrt(p * 400))
        expected += [max(side, 1)] if norm == "linf" else 2 * [max(side + (side % 2 == 0), 3)]
    assert sides == expected


def test_l2_moves_mass_as_in_algorithm_3() -> None:
    """One proposal for three channels and a ball that is not used up, written out."""
    eps, x, g = 0.5, images(40, 3, 12, low=0.4, high=0.6), torch.Generator().manual_seed(0)
    nu = torch.randn(x.shape, generator=g, dtype=torch.float64)
    nu *= 0.7 * eps / nu.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    drawn: list[Tensor] = []

    def draw(high: int, *shape: int) -> Tensor:
        drawn.append(torch.randint(high, (40, *shape), generator=g))
        return drawn[-1]

    x_adv = _moved_mass(x, x + nu, eps, 0.2, draw)
    r_1, s_1, r_2, s_2, turned, signs = drawn
    eta = _eta(5, x.dtype, x.device)  # √(0.2·144) = 5.4
    for i in range(40):
        unused = eps**2 - nu[i].norm() ** 2
        W1, W2 = (
            (slice(int(r[i]), int(r[i]) + 5), slice(int(s[i]), int(s[i]) + 5))
            for r, s in ((r_1, s_1), (r_2, s_2))
        )
        for c in range(3):
            union = torch.zeros(12, 12, dtype=torch.bool)
            union[W1], union[W2] = True, True
            available = (nu[i, c][union].norm() ** 2 + unused / 3).sqrt()
            bump = (2 * signs[i, c] - 1) * (eta if turned[i] else eta.T)
            bump = bump.squeeze() + nu[i, c][W1] / nu[i, c][W1].norm()
            nu[i, c][W2] = 0
            nu[i, c][W1] = bump / bump.norm() * available
    torch.testing.assert_close(x_adv, x + nu)


def test_squares_reach_every_pixel() -> None:
    """The authors' code never draws the last row and column."""
    model, x = hard_to_fool(Linear(36, 2)), images(1, size=6, low=0.3, high=0.7)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    square(model, x, labels(1), eps=0.1, queries=400, p_init=0.01, seed=0)
    moved = (torch.cat(seen[2:]) != torch.cat(seen[1:-1])).any(dim=0)
    assert moved.all()


# What is returned


@every_norm
def test_images_need_not_be_square(norm: str) -> None:
    model, x = hard_to_fool(Linear(3 * 6 * 11, 4)), torch.rand(3, 3, 6, 11).double()
    for images_ in (x, x.transpose(2, 3)):
        x_adv = square(model, images_, labels(3), eps=0.3, norm=norm, queries=50, seed=0)
        assert x_adv.shape == images_.shape


@every_norm
def test_more_queries_leave_no_more_accuracy(norm: str) -> None:
    """On one schedule a longer run goes on where a shorter one stopped."""
    model, x = net(), images(40)
    y = predicted(model, x)
    attack = partial(square, model, x, y, eps=EPS[norm], norm=norm, schedule=300, seed=0)
    runs = [attack(queries=queries) for queries in (1, 5, 20, 100, 300)]
    counts = [int((predicted(model, x_adv) == y).sum()) for x_adv in runs]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    before, after = (margin(model(x_adv), y) for x_adv in (runs[1], runs[3]))
    unfooled = predicted(model, runs[3]) == y
    assert (after >= before)[unfooled].all() and (after > before)[unfooled].any()


@every_norm
def test_the_queries_are_counted(norm: str) -> None:
    """Every image leaves when it fools, and none is shown to the model again."""
    model, x = net(), images(30)
    y = predicted(model, x)
    y[:3] = (y[:3] + 1) % 5
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    x_adv, used = counted(model, x, y, norm)
    hook.remove()
    fooled = predicted(model, x_adv) != y
    assert torch.equal(x_adv[:3], x[:3]) and (used[:3] == 0).all()
    assert (used[~fooled] == 200).all() and (used[3:] > 0).all()
    assert int(used.sum()) == sum(sizes) - 30 and sizes == sorted(sizes, reverse=True)
    assert (used < 200).sum() > 0


@every_norm
def test_an_image_does_not_depend_on_its_neighbours(norm: str) -> None:
    model, x = net(), images(12)
    y = predicted(model, x)
    others = torch.cat([images(6, seed=1), x[6:]])
    wrong = torch.cat([(y[:6] + 1) % 5, y[6:]])  # those before them leave at once
    attack = partial(square, eps=EPS[norm], norm=norm, queries=60, seed=0)
    torch.testing.assert_close(
        attack(model, others, wrong)[6:], attack(model, x, y)[6:], rtol=0, atol=1e-5
    )


@every_norm
def test_a_seed_repeats_and_leaves_the_global_generator_alone(norm: str) -> None:
    model, x = net(), images(8)
    y = predicted(model, x)
    attack = partial(square, model, x, y, eps=EPS[norm] / 10, norm=norm, queries=20)
    state = torch.get_rng_state()
    first = attack(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, attack(seed=5))
    assert torch.equal(first, attack(generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, attack(seed=6))
    with torch.inference_mode():
        assert torch.equal(
            square(model, x, y, eps=EPS[norm] / 10, norm=norm, queries=20, seed=5), first
        )


@every_norm
def test_square_finds_what_no_gradient_shows(norm: str) -> None:
    """A model that rounds and detaches has scores all the same."""
    smooth = net()
    steps = Written(lambda x: (smooth((15 * x.detach()).round() / 15) * 8).round())
    x = images(20)
    y = predicted(steps, x)
    x_adv = square(steps, x, y, eps=2 * EPS[norm], norm=norm, queries=300, seed=0)
    assert (predicted(steps, x_adv) != y).float().mean() > 0.5


@every_norm
def test_an_empty_batch_and_one_without_work(norm: str) -> None:
    model, x = net(), images(5)
    attack = partial(square, model, eps=EPS[norm], norm=norm, queries=5, seed=0)
    assert attack(x[:0], labels(0)).shape == (0, 1, 8, 8)
    assert torch.equal(attack(x, (predicted(model, x) + 1) % 5), x)


@every_norm
def test_the_model_is_left_as_it_was(norm: str) -> None:
    model, x = net().train(), images(4)
    state, seen = copy.deepcopy(model.state_dict()), []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    square(model, x, labels(4), eps=EPS[norm], norm=norm, queries=5, seed=0)
    assert seen and not any(seen) and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@every_norm
def test_under_autocast_what_counts_as_fooled_is_fooled(norm: str) -> None:
    """An image left early only if it fools in full precision; a lead that is rounding is none."""
    model, x = net(num_classes=10).float(), images(60).float()
    y = predicted(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        x_adv, used = counted(model, x, y, norm)
    assert 10 < (used < 200).sum() < 60
    assert (predicted(model, x_adv) != y)[used < 200].all()
    rounded = Written(
        lambda x: model(x) + 100 * torch.is_autocast_enabled("cpu") * (torch.arange(10) == 3)
    )
    with torch.autocast("cpu", torch.bfloat16):
        x_adv, used = counted(rounded, x, y, norm, 10, eps=1e-4)
    assert (used[y != 3] == 10).all()


@every_norm
def test_a_black_box_never_beats_forty_steps_of_pgd(norm: str) -> None:
    model, x = net(), images(60)
    y = predicted(model, x)
    if norm == "linf":
        white = partial(pgd, eps=0.02, step_size=0.002, steps=40, loss="margin", seed=0)
    else:  # the L∞ ball of this radius holds the L2 ball
        white = partial(pgd, eps=0.2, step_size=0.02, steps=40, loss="margin", seed=0)
    x_adv = square(model, x, y, eps=0.02 if norm == "linf" else 0.2, norm=norm, queries=300, seed=0)
    black, white_ = ((predicted(model, found) == y) for found in (x_adv, white(model, x, y)))
    assert 0 < black.sum() < 60 and black.sum() >= white_.sum()


@every_norm
def test_scores_that_never_change_and_scores_below_zero(norm: str) -> None:
    constant = Written(lambda x: (0 * x.sum((1, 2, 3)))[:, None] - torch.arange(1.0, 4.0).double())
    x = images(4)
    assert square(constant, x, labels(4), eps=0.1, norm=norm, queries=20, seed=0).isfinite().all()
    model, y = net(), predicted(net(), x)
    attack = partial(square, x=x, y=y, eps=EPS[norm], norm=norm, queries=30, seed=0)
    torch.testing.assert_close(attack(Written(lambda x: model(x) - 1000)), attack(model))


def test_bad_options_get_an_error_that_helps() -> None:
    call = partial(square, net(), images(2), labels(2), eps=0.1)
    for options, message in (
        ({"eps": -0.1}, "eps is -0.1"),
        ({"norm": "l1"}, "'l1'.*linf"),
        ({"queries": 0}, "queries is 0"),
        ({"schedule": -1}, "schedule is -1"),
        ({"p_init": 0.0}, "p_init is 0.0"),
        ({"seed": 1, "generator": torch.Generator()}, "both seed and"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**cast(Any, options))
    blind = Written(lambda x: net()(x) * torch.where(x.sum((1, 2, 3)) > 0, torch.nan, 1)[:, None])
    with pytest.raises(ValueError, match="NaN logits"):
        square(blind, images(2), labels(2), eps=0.1, queries=3)


@pytest.mark.peers
@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "Linf", 0.15), ("l2", "L2", 2.0)])
def test_square_leaves_no_more_accuracy_than_torchattacks(norm, theirs, eps, victim) -> None:
    """At equal queries and schedule, over two seeds, within the 95% interval of theirs."""
    queries = 100
    model, x, y = victim
    ours, others = [], []
    for seed in range(2):
        x_adv = square(model, x, y, eps=eps, norm=norm, queries=queries, seed=seed)
        ours.append(left(model, x_adv, y))
        peer = torchattacks_attack("Square", norm=theirs, eps=eps, n_queries=queries, seed=seed)
        others.append(left(model, peer(model, x, y), y))
    assert 0.05 < sum(others) / 2 < 0.95
    assert sum(ours) / 2 <= wilson(round(100 * sum(others)), 200)[1]


# The substitute


def ten_points(count: int, seed: int = 0) -> Tensor:
    return images(count, low=0.2, high=0.8, seed=seed)


class Listening:
    """An oracle that says labels, remembers what it was asked, and can say nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.asked = model, cast(list[Tensor], [])

    def __call__(self, x: Tensor) -> Tensor:
        assert not x.requires_grad
        self.asked.append(x)
        return predicted(self.model, x)


def test_the_augmentation_is_its_formula_on_a_linear_substitute() -> None:
    """x + λ·sign(w_y), y the oracle's label, −λ in the first three rounds, inside [0, 1]."""
    oracle, x = Listening(net()), ten_points(10)
    x[0] = 0.01  # λ would lead out of the range
    start = Linear(64, 5, scale=0.1)
    how: dict[str, Any] = {"substitute": start, "epochs": 1, "learning_rate": 1e-12}
    train_substitute(oracle, x, rounds=6, lambda_=0.05, **how)
    assert sum(map(len, oracle.asked)) == 320
    asked = [torch.cat(oracle.asked)[n : 2 * n] for n in (10, 20, 40, 80, 160)]
    points = x
    for rho, x_new in enumerate(asked):
        w_y = start.layer.weight[predicted(oracle.model, points)].view_as(points)
        step = 0.05 * (-1 if rho < 3 else 1)
        expected = (points + step * w_y.sign()).clamp(0, 1).detach()
        torch.testing.assert_close(x_new, expected)
        points = torch.cat([points, x_new])


def test_the_oracle_is_asked_once_a_point() -> None:
    """150 images and five doublings: 4,800 labels, as in the paper."""
    oracle = Listening(Linear(64, 5))
    train_substitute(oracle, ten_points(150), substitute=Linear(64, 5, seed=1), epochs=1)
    assert sum(map(len, oracle.asked)) == 150 * 2**5 == 4800


def test_of_a_network_only_the_argmax_is_seen() -> None:
    oracle, x = net().train(), ten_points(20)
    state = copy.deepcopy(oracle.state_dict())
    train = partial(train_substitute, x=x, rounds=3, epochs=2)
    start = Linear(64, 5)
    of_logits = train(oracle, substitute=start)
    of_labels = train(lambda x: predicted(oracle, x), substitute=start)
    for ours, theirs in zip(of_logits.parameters(), of_labels.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert oracle.training and not of_logits.training
    assert all(torch.equal(value, state[name]) for name, value in oracle.state_dict().items())


def test_what_is_given_stays_and_a_seed_repeats() -> None:
    start, x, state = net(seed=3), ten_points(20), torch.get_rng_state()
    before = copy.deepcopy(start.state_dict())
    train = partial(train_substitute, net(), x, substitute=start, rounds=2, epochs=2)

    def weights(**options: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for p in train(**options).parameters()])

    first = weights(seed=0)
    assert torch.equal(first, weights(seed=0))  # though it has dropout
    assert not torch.equal(first, weights(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(first, weights(seed=0))


def test_the_substitute_trains_in_train_mode_and_is_asked_in_eval_mode() -> None:
    start, modes = net(), cast(list[tuple[bool, bool]], [])
    watch = lambda module, inputs, _: modes.append((module.training, inputs[0].requires_grad))  # noqa: E731
    start.register_forward_hook(watch)
    train_substitute(Linear(64, 5), ten_points(6), substitute=start, rounds=3, epochs=1)
    assert modes.count((True, False)) == 3 and modes.count((False, True)) == 2


def test_images_that_fool_the_substitute_fool_the_oracle_more_than_noise(victim) -> None:
    oracle, x, y = victim
    data = load_data("digits")
    held = to_float(data.train_images[::29]).contiguous()
    torch.manual_seed(0)
    substitute = train_substitute(oracle, held, substitute=lenet(), rounds=4, epochs=10)
    assert (predicted(substitute, x) == predicted(oracle, x)).float().mean() > 0.7
    eps = 0.2
    crafted = fgsm(substitute, x, y, eps=eps)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    shaken = (x + eps * noise.sign()).clamp(0, 1)
    assert left(oracle, crafted, y) < left(oracle, shaken, y) - 0.1
    assert left(substitute, crafted, y) <= left(oracle, crafted, y)


def test_a_bad_substitute_call_gets_an_error_that_helps() -> None:
    for options, message in (
        ({"rounds": 0}, "rounds is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lambda_": 0}, "lambda_ is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"substitute": torch.sin}, "Module"),
        ({"substitute": Linear(64, 2)}, "2 classes"),
        ({"x": ten_points(4) * 255}, r"\[0, 1\]"),
        ({"x": ten_points(4)[:0]}, "no images"),
        ({"oracle": lambda x: net()(x)}, r"float64 of shape \(4, 5\).*int64.*\(4,\)"),
        ({"oracle": lambda x: 3}, "int of shape"),
    ):
        how = {"oracle": net(), "x": ten_points(4), "substitute": Linear(64, 5), "rounds": 1}
        with pytest.raises(ValueError, match=message):
            train_substitute(**cast(Any, how | options))


def test_lenet_is_lenet() -> None:
    """61,706 weights, as LeNet-5 has when every map of C3 sees every map of S2."""
    model = lenet()
    assert sum(p.numel() for p in model.parameters()) == 61_706
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
