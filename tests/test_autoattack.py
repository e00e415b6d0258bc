"""APGD, FAB and AutoAttack: closed forms, records, resuming, and the peers' standard version."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from defenses.attacks import apgd, autoattack, autoattack_report, deepfool, eot, fab, fgsm, pgd
from defenses.attacks.apgd import checkpoints
from defenses.attacks.fab import to_hyperplane
from defenses.attacks.norms import NORMS, project, random_point, size, steepest
from tests.test_attacks import Linear, Written, hard_to_fool, images, net, predicted

both_norms = pytest.mark.parametrize("norm", NORMS)
module = sys.modules[autoattack.__module__]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack with budgets that fit a test."""
    monkeypatch.setattr(module, "STEPS", 8)
    monkeypatch.setattr(module, "QUERIES", 40)


# Geometry


@both_norms
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), size_of_gap=st.floats(0, 4), zeros=st.integers(0, 3))
def test_the_projection_onto_a_hyperplane_in_the_box_is_the_smallest(
    norm: str, seed: int, size_of_gap: float, zeros: int
) -> None:
    """Against a solver, at pixels of exactly 0 and 1 and weights of exactly 0, too."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 2, 4, generator=draw, dtype=torch.float64)
    x.flatten()[:2] = torch.tensor([0.0, 1.0])
    w = torch.randn(1, 1, 2, 4, generator=draw, dtype=torch.float64)
    w.flatten()[3 : 3 + zeros] = 0
    c = torch.tensor([size_of_gap], dtype=torch.float64) * (-1) ** seed
    d = to_hyperplane(x, w, c, norm)
    assert (x + d).min() >= 0 and (x + d).max() <= 1
    W, X = w.flatten(), x.flatten()
    room = torch.where(W * c.sign() > 0, 1 - X, X)
    if (W.abs() * room).sum() < c.abs():
        torch.testing.assert_close((w * d).sum().abs(), (W.abs() * room).sum())
        return
    torch.testing.assert_close((w * d).sum(), c[0], rtol=1e-9, atol=1e-9)
    box = [(-float(v), 1 - float(v)) for v in X]
    if norm == "linf":
        eye, ones = torch.eye(8).numpy(), -torch.ones(8, 1).numpy()
        rows = (
            torch.cat([torch.from_numpy(s * eye) for s in (1, -1)]).numpy(),
            torch.cat([torch.from_numpy(ones)] * 2).numpy(),
        )
        best = linprog(
            [0] * 8 + [1],
            A_ub=torch.cat([torch.from_numpy(r) for r in rows], dim=1).numpy(),
            b_ub=[0] * 16,
            A_eq=[[*W.tolist(), 0]],
            b_eq=c.tolist(),
            bounds=[*box, (0, None)],
        ).fun
    else:
        found = minimize(
            lambda z: (z**2).sum(),
            d.flatten().numpy() * 0,
            bounds=box,
            constraints={"type": "eq", "fun": lambda z: W.numpy() @ z - float(c)},
        )
        best = found.fun**0.5
    assert float(size(d, norm)) <= best * (1 + 1e-5) + 1e-6


@both_norms
@settings(max_examples=20, deadline=None)
@given(eps=st.sampled_from([0.0, 1e-3, 0.3, 2.0]), seed=st.integers(0, 99))
def test_projections_and_starts_stay_in_the_ball(norm: str, eps: float, seed: int) -> None:
    x = images(5, 3, 4, low=-0.2, high=1.2, seed=seed).clamp(0, 1).float()
    draw = torch.Generator().manual_seed(seed)
    for point in (random_point(x, eps, norm, draw), project(x + 3 * (x - 0.4), x, eps, norm)):
        assert point.min() >= 0 and point.max() <= 1
        assert size(point - x, norm).max() <= eps * (1 + 1e-5) + 1e-7


@both_norms
def test_the_steepest_step_has_size_one_however_small_the_gradient(norm: str) -> None:
    gradient = torch.stack(
        [torch.randn(1, 3, 3), 1e-30 * torch.randn(1, 3, 3), torch.zeros(1, 3, 3)]
    )
    torch.testing.assert_close(size(steepest(gradient, norm), norm), torch.tensor([1.0, 1.0, 0.0]))


# APGD


def test_the_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]


@pytest.mark.parametrize(("rises", "halved"), [(16, True), (17, False)])
def test_the_step_is_halved_where_less_than_three_quarters_of_the_steps_rose(
    rises: int, halved: bool
) -> None:
    """Of the 22 steps before the first checkpoint; the loss and its slope follow a script."""
    heights = [0.0] + [-1.0] * (22 - rises) + [float(k) for k in range(1, rises + 1)] + [0.0] * 80
    seen: list[float] = []

    def script(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        k = len(seen)
        seen.append(float(x.detach().mean()))
        slope = 1 if k < 22 else -1  # up to the wall of the ball, then one step back
        return heights[k] + slope * (x - x.detach()).sum(dim=(1, 2, 3))

    constant = Written(lambda x: torch.stack([1 + 0 * x.sum((1, 2, 3)), 0 * x.sum((1, 2, 3))], 1))
    x, y = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    apgd(constant, x, y, eps=0.2, loss=script, seed=0)
    assert seen[21:23] == pytest.approx([0.7, 0.7])
    eta = 0.2 if halved else 0.4  # the momentum takes three quarters of the step
    assert seen[23] == pytest.approx(0.7 - 0.75 * eta)


def test_apgd_in_l2_ends_at_the_point_of_the_sphere_along_w() -> None:
    model, x = hard_to_fool(Linear(64, 2)), images(20, low=0.4, high=0.6)
    w = (model.layer.weight[1] - model.layer.weight[0]).detach().view(1, 1, 8, 8)
    x_adv = apgd(model, x, predicted(model, x), eps=0.3, norm="l2", steps=50, seed=0)
    torch.testing.assert_close(x_adv, (x + 0.3 * w / w.norm()).expand_as(x), atol=1e-4, rtol=0)


def test_apgd_finds_a_peak_that_the_fixed_step_swings_around() -> None:
    """The loss is highest at a mean of 0.3317; APGD halves its step until it is there."""

    def formula(x: Tensor) -> Tensor:
        s = x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(s), -1 - (s - 0.3317) ** 2], dim=1)

    x, y = torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    model = Written(formula)
    ours = apgd(model, x, y, eps=0.2, steps=100, seed=0).mean()
    fixed = pgd(model, x, y, eps=0.2, step_size=0.05, steps=100, random_start=False).mean()
    assert abs(ours - 0.3317) < 0.002 < abs(fixed - 0.3317)


def test_more_restarts_of_apgd_fool_no_fewer() -> None:
    model, x = net(), images(60)
    y = predicted(model, x)
    attack = partial(apgd, model, x, y, eps=0.02, steps=5, seed=1)
    once, often = (predicted(model, attack(restarts=restarts)) != y for restarts in (1, 4))
    assert once.sum() > 0 and (often | ~once).all()


# FAB


@both_norms
@pytest.mark.parametrize("num_classes", [2, 3, 12])
def test_fab_reaches_the_nearest_boundary_of_a_linear_model(norm: str, num_classes: int) -> None:
    model, x = Linear(64, num_classes, scale=0.1), images(8, low=0.4, high=0.6)
    with torch.no_grad():
        model.layer.bias.zero_()
        y, z = predicted(model, x), model(x)
    w = model.layer.weight[None] - model.layer.weight[y][:, None]
    dual = w.abs().sum(dim=2) if norm == "linf" else w.norm(dim=2)
    gaps = (z.gather(1, y[:, None]) - z) / dual
    closest = gaps.scatter(1, y[:, None], torch.inf).amin(dim=1)
    found = fab(model, x, y, norm=norm, steps=15, targets=11)
    assert (predicted(model, found) != y).all()
    distance = size(found - x, norm)
    assert (distance >= closest * (1 - 1e-9)).all()
    assert (distance <= closest * 1.01).all()


@both_norms
def test_fab_within_a_radius_returns_no_more_than_that(norm: str) -> None:
    model, x = net(num_classes=10), images(20)
    y = predicted(model, x)
    free = size(fab(model, x, y, norm=norm, steps=9) - x, norm)
    eps = float(free.median())
    x_adv = fab(model, x, y, norm=norm, steps=9, eps=eps)
    fooled = predicted(model, x_adv) != y
    assert (size(x_adv - x, norm) <= eps).all()
    assert torch.equal(x_adv[~fooled], x[~fooled])
    assert torch.equal(fooled, free <= eps)


@pytest.mark.parametrize("scale", [1e10, 1e20, 1e30, 1e-20, 1e-30])
@pytest.mark.parametrize("norm", NORMS)
def test_fab_is_that_of_the_same_model_whatever_its_logits_are_multiplied_by(
    norm: str, scale: float
) -> None:
    """In L2 the squares of large weights were infinite, and no image moved."""
    model, x = Linear(64, 5).float(), images(10).float()
    y = predicted(model, x)
    attack = partial(fab, norm=norm, steps=10)
    found, expected = attack(Written(lambda x: scale * model(x)), x, y), attack(model, x, y)
    assert (predicted(model, found) != y).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_fab_in_l2_is_as_near_as_deepfool() -> None:
    model, x = net(num_classes=10), images(20)
    y = predicted(model, x)
    near, far = fab(model, x, y, norm="l2", steps=30, targets=3), deepfool(model, x, y)
    assert size(near - x, "l2").mean() <= 1.01 * size(far - x, "l2").mean()


# AutoAttack


@both_norms
@pytest.mark.parametrize("num_classes", [2, 3, 4, 12])
def test_autoattack_works_for_few_classes_and_stays_in_the_ball(
    norm: str, num_classes: int, short: None
) -> None:
    model, x = net(3, num_classes), images(12, 3)
    y = predicted(model, x)
    eps = {"linf": 0.02, "l2": 0.15}[norm]
    found = autoattack_report(model, x, y, eps=eps, norm=norm)
    fooled = predicted(model, found.x_adv) != y
    assert (size(found.x_adv - x, norm) <= eps * (1 + 1e-6)).all()
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert [bool(name) for name in found.broken_by] == fooled.tolist()
    assert torch.equal(found.x_adv[~fooled], x[~fooled])
    assert torch.equal(autoattack(model, x, y, eps=eps, norm=norm), found.x_adv)


def test_the_record_says_what_broke_an_image_and_what_it_took(short: None) -> None:
    """Image 0 is wrong from the start; 1 falls to a gradient; 2 only to Square; 3 to nothing."""

    def formula(x: Tensor) -> Tensor:
        s, hidden = x[:, 0, :, 0].mean(dim=1), (x[:, 0, :, 1].mean(dim=1) > 0.55).double()
        easy = x[:, 0, 0, 3]
        return torch.stack([0 * s, easy * (s - 0.5) + (1 - easy) * (hidden - 0.5)], dim=1)

    x = torch.full((4, 1, 6, 6), 0.5, dtype=torch.float64)
    x[:, 0, 0, 3] = torch.tensor([1.0, 1, 0, 1])
    x[0, 0, :, 0], x[1, 0, :, 0], x[3, 0, :, 0] = 0.9, 0.45, 0.1
    y = torch.zeros(4, dtype=torch.int64)
    found = autoattack_report(Written(formula), x, y, eps=0.1)
    assert found.broken_by == ["clean", "apgd-ce", "square", ""]
    assert found.gradients[0] == 0 and 0 < found.gradients[1] <= 8
    assert found.gradients[2] == found.gradients[3] == 8 * 3  # apgd-ce, apgd-t and fab-t, one rival
    assert found.queries[:2].tolist() == [0, 0] and 0 < found.queries[2] < found.queries[3] == 40
    assert torch.equal(found.x_adv[3], x[3])


def test_autoattack_is_no_weaker_than_its_parts(short: None) -> None:
    model, x = net(num_classes=10), images(60)
    y = predicted(model, x)
    whole = predicted(model, autoattack(model, x, y, eps=0.01, seed=0)) != y
    part = predicted(model, fgsm(model, x, y, eps=0.01)) != y
    assert 0 < whole.sum() < 60 and whole.sum() >= part.sum()


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path, short: None) -> None:
    model, x = net(num_classes=6), images(24)
    y = predicted(model, x)
    options: dict[str, Any] = {"eps": 0.01, "batch_size": 9, "seed": 4}
    whole = autoattack_report(model, x, y, **options)
    file, calls = tmp_path / "deep" / "run.pt", 0

    def stop(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Interrupted

    limit, interruptions = 40, 0
    while True:
        calls = 0
        handle = model.register_forward_pre_hook(stop)
        try:
            found = autoattack_report(model, x, y, checkpoint=file, **options)
            break
        except Interrupted:
            interruptions += 1
            limit += 40
        finally:
            handle.remove()
    assert interruptions > 2
    assert torch.equal(found.x_adv, whole.x_adv)
    assert found.broken_by == whole.broken_by
    assert torch.equal(found.gradients, whole.gradients)
    assert torch.equal(found.queries, whole.queries)
    assert [f.name for f in file.parent.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, short: None) -> None:
    model, x, y, file = net(), images(4), torch.zeros(4, dtype=torch.int64), tmp_path / "run.pt"
    attack = partial(autoattack_report, checkpoint=file)
    attack(model, x, y, eps=0.01)
    with pytest.raises(ValueError, match=r"another run .*eps"):
        attack(model, x, y, eps=0.02)
    with pytest.raises(ValueError, match=r"another run .*inputs"):
        attack(net(seed=1), x, y, eps=0.01)
    whole = file.read_bytes()
    place = len(whole) // 2  # one byte in the middle of a tensor, where torch.load does not look
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"run\.pt is not a readable checkpoint"):
        attack(model, x, y, eps=0.01)
    file.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"run\.pt is not a readable checkpoint"):
        attack(model, x, y, eps=0.01)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (partial(autoattack, eps=-1), "eps is -1"),
        (partial(autoattack, eps=0.1, norm="l1"), "norm is 'l1'"),
        (
            partial(autoattack, eps=0.1, version="plus"),
            "version is 'plus', expected one of standard",
        ),
        (partial(autoattack, eps=0.1, batch_size=0), "batch_size is 0"),
        (partial(apgd, eps=0.1, norm="L2"), "norm is 'L2'"),
        (partial(apgd, eps=0.1, steps=0), "steps is 0"),
        (partial(apgd, eps=0.1, restarts=0), "restarts is 0"),
        (partial(fab, norm="linfty"), "norm is 'linfty'"),
        (partial(fab, targets=0), "targets is 0"),
        (partial(fab, eps=-0.1), "eps is -0.1"),
        (eot(partial(fgsm, eps=0.1), 3), None),
    ],
)
def test_bad_options_say_what_is_wrong(attack: Callable[..., Tensor], message: str | None) -> None:
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    if message is None:
        assert attack(net(), x, y).shape == x.shape
        return
    with pytest.raises(ValueError, match=message):
        attack(net(), x, y)


# Models that draw


class Coin(nn.Module):
    """The class is whether the mean pixel is above 0.5, seen through noise that hides the slope."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        s = 10 * (x.mean(dim=(1, 2, 3)) - 0.5)
        sign = 1 + self.noise * torch.randn_like(s)  # the slope itself is random
        return torch.stack([torch.zeros_like(s), s * sign], dim=1)


def test_expectation_finds_the_slope_that_one_draw_hides() -> None:
    x, y = torch.full((200, 1, 3, 3), 0.4), torch.zeros(200, dtype=torch.int64)
    torch.manual_seed(0)
    once = fgsm(Coin(2.0), x, y, eps=0.2)
    often = eot(fgsm, samples=200)(Coin(2.0), x, y, eps=0.2)
    right = [(x_adv > x).float().mean() for x_adv in (once, often)]
    assert 0.55 < right[0] < 0.8 and right[1] == 1
    with pytest.raises(ValueError, match="samples is 0"):
        eot(fgsm, samples=0)


def test_expectation_of_a_fixed_model_changes_nothing_and_leaves_it_alone() -> None:
    model, x = net().float(), images(6).float()
    y = predicted(model, x)
    model.train()
    attack = partial(pgd, eps=0.1, step_size=0.03, steps=3, seed=0)
    torch.testing.assert_close(eot(attack, 3)(model, x, y), attack(model, x, y))
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_the_rand_version_attacks_the_mean(short: None) -> None:
    x, y = torch.full((20, 1, 3, 3), 0.4), torch.zeros(20, dtype=torch.int64)
    torch.manual_seed(0)
    found = autoattack_report(Coin(1.0), x, y, eps=0.2, version="rand")
    assert set(found.broken_by) <= {"apgd-ce", "apgd-dlr"}
    assert autoattack_report(Coin(1.0), x, y, eps=0.02, version="rand").broken_by == [""] * 20
