"""APGD in L1: the projection, the steps and the end point, each against its closed form."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from defenses.attacks import apgd, autoattack, fab, square
from defenses.attacks.fmn import onto_ball
from defenses.attacks.norms import lp, project_l1, random_point, sparse_step
from tests.test_peers import adv_lib_attack, foolbox_attack, left

RADII = [0.0, 1e-3, 0.3, 2.0, 12.0, 1e4]


def images(n: int, size: int = 6, seed: int = 0, dtype: Any = torch.float64) -> Tensor:
    """In float64, or rounded to `dtype`; two pixels of five are 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    x = 1.6 * torch.rand(n, 1, size, size, generator=draw, dtype=torch.float64) - 0.3
    return x.clamp(0, 1).to(dtype)


def noise(x: Tensor, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(x.shape, generator=draw, dtype=x.dtype)


def by_bisection(u: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest point of ball and box to each `u`: the λ of Prop. 2.1 is halved in on."""

    def moved(shrinkage: Tensor) -> Tensor:
        delta = (u - x).sign() * ((u - x).abs() - shrinkage[:, None, None, None]).clamp(min=0)
        return (x + delta).clamp(0, 1)

    low, high = torch.zeros(len(x)).double(), lp(u - x, "linf").double()
    for _ in range(100):
        middle = (low + high) / 2
        outside = lp(moved(middle) - x, "l1") > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return torch.where((lp(moved(0 * low) - x, "l1") > eps)[:, None, None, None], moved(high), u)


def farthest_along(w: Tensor, x: Tensor, eps: float) -> Tensor:
    """The greatest w·δ with ‖δ‖₁ ≤ ε and x + δ in [0, 1]: the steepest pixels go first; (N,)."""
    slope, room = (s.flatten(1) for s in (w.abs().expand_as(x), torch.where(w > 0, 1 - x, x)))
    slope, order = slope.sort(dim=1, descending=True)
    room = room.gather(1, order)
    before = room.cumsum(dim=1) - room
    return (slope * torch.minimum(room, (eps - before).clamp(min=0))).sum(dim=1)


# The projection


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4),
    size=st.integers(1, 6),
    eps=st.sampled_from(RADII),
    scale=st.sampled_from([1e-3, 0.3, 3.0]),
    seed=st.integers(0, 999),
)
def test_the_projection_is_the_nearest_point_of_ball_and_box(
    n: int, size: int, eps: float, scale: float, seed: int
) -> None:
    x = images(n, size, seed)
    u = x + scale * noise(x, seed)
    z = project_l1(u, x, eps)
    assert z.min() >= 0 and z.max() <= 1 and lp(z - x, "l1").max() <= eps + 1e-12
    torch.testing.assert_close(z, by_bisection(u, x, eps).clamp(0, 1), rtol=0, atol=1e-10)
    away = u - z  # a normal there: no point of ball and box lies beyond
    assert (farthest_along(away, x, eps) - (away * (z - x)).flatten(1).sum(dim=1)).max() < 1e-9
    torch.testing.assert_close(project_l1(z, x, eps), z, rtol=0, atol=1e-12)
    single = project_l1(u.float(), x.float(), eps).double()
    torch.testing.assert_close(single, z, rtol=0, atol=3e-6)


def test_far_from_the_ends_of_the_box_it_is_the_projection_on_the_ball() -> None:
    x = torch.full((3, 1, 5, 5), 0.5).double()
    delta = 0.15 * noise(x, 0)
    eps = float(lp(delta, "l1").min()) / 2
    z = project_l1(x + delta, x, eps)
    torch.testing.assert_close(z - x, onto_ball(delta, torch.full((3,), eps).double(), "l1"))
    assert ((z - x) != 0).any() and ((z - x) == 0).any()


def test_pixels_at_one_breakpoint_and_without_room_do_no_harm() -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 0.5]).view(1, 1, 2, 2)
    u = torch.tensor([-0.5, 0.5, 1.5, 1.0]).view(1, 1, 2, 2)  # |δ| = 0.5, and two have no room
    expected = torch.tensor([0.0, 0.1, 1.0, 0.6]).view(1, 1, 2, 2)
    torch.testing.assert_close(project_l1(u, x, 0.2), expected)
    assert project_l1(u, x, 0.0).equal(x)


# The step and the start


def test_a_step_goes_to_the_steepest_pixels_alike() -> None:
    gradient = torch.tensor([[3.0, -4, 0, 1], [2, 2, -2, 1], [0, 0, 0, 5], [9, -8, 7, -6]])
    x = torch.tensor([[0.0, 1, 0, 0], [0.5, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
    pixels = torch.tensor([2, 1, 3, 2])
    step = sparse_step(gradient.view(4, 1, 2, 2), x.view(4, 1, 2, 2), pixels).flatten(1)
    third = 1 / 3  # of equally steep pixels all go; in the last image two are at that end
    expected = [[0.5, -0.5, 0, 0], [third, third, -third, 0], [0, 0, 0, 1], [0, 0, 0.5, -0.5]]
    torch.testing.assert_close(step, torch.tensor(expected))
    flat = torch.zeros(2, 1, 2, 2)
    assert sparse_step(flat, flat, torch.tensor([1, 4])).eq(0).all()


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.3, 2.0])
def test_a_start_is_in_the_box_and_on_the_sphere(eps: float) -> None:
    x = images(20, dtype=torch.float32)
    start = random_point(x, eps, "l1", torch.Generator().manual_seed(0))
    assert start.min() >= 0 and start.max() <= 1
    torch.testing.assert_close(lp(start - x, "l1"), torch.full((20,), eps), rtol=1e-5, atol=1e-6)
    assert eps == 0 or ((start - x) != 0).flatten(1).sum(dim=1).unique().numel() > 1


# The attack


class Two(nn.Module):
    """Logits w·x and 0, with a lead of class 0 that no image leaves."""

    def __init__(self, w: Tensor, lead: float) -> None:
        super().__init__()
        self.w, self.lead = w, lead

    def forward(self, x: Tensor) -> Tensor:
        rise = (self.w * x).flatten(1).sum(dim=1)
        return torch.stack([torch.full_like(rise, self.lead), rise], dim=1)


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("eps", [0.3, 2.0, 12.0])
def test_on_a_linear_model_it_ends_near_the_optimum_in_the_box(eps: float, size: int) -> None:
    """Near: a step is shared evenly, and is never shorter than ε/10."""
    x = images(20, size)
    w = noise(x[:1], 0)
    y = torch.zeros(20, dtype=torch.int64)
    x_adv = apgd(Two(w, 1e4), x, y, eps=eps, norm="l1", seed=0)
    gain, best = (w * (x_adv - x)).flatten(1).sum(dim=1), farthest_along(w, x, eps)
    assert lp(x_adv - x, "l1").max() <= eps * (1 + 1e-12)
    assert (gain <= best * (1 + 1e-12)).all()
    assert (gain >= 0.98 * best).all()
    moved, ended = x_adv != x, (x_adv == 0) | (x_adv == 1)
    assert eps < 1 or (moved & ended).flatten(1).any(dim=1).all()  # the box is active


def test_its_path_is_that_of_algorithm_1() -> None:
    """Replayed: k and η at every checkpoint, and from where each step goes."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 1)]
    height, x, eps, steps = nn.Sequential(*layers).double(), images(1), 2.0, 100
    path: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        path.append(x.detach())
        return height(x).squeeze(1)

    y = torch.zeros(1, dtype=torch.int64)
    apgd(Two(0 * x, 1.0), x, y, eps=eps, norm="l1", steps=steps, loss=loss, seed=0)
    assert len(path) == steps + 1
    values = [height(x_t).item() for x_t in path]
    k, eta, least_eta, resets, shrinks, repeats = 0.2 * 36, eps, eps, 0, 0, 0
    for i in range(steps):
        x_t = path[i]
        if i and i % 4 == 0:
            best = path[max(range(i + 1), key=values.__getitem__)]
            better = i == 4 or max(values[: i + 1]) > max(values[: i - 3])
            old, k = k, max((float((best != x).sum()) if better else k) / 1.5, 1)
            repeats += not better
            if k < 0.95 * old:
                x_t, eta, resets = best, eps, resets + 1
            else:
                eta, shrinks = max(eta / 1.5, eps / 10), shrinks + 1
                least_eta = min(least_eta, eta)
        x_t = x_t.clone().requires_grad_()
        (g,) = torch.autograd.grad(height(x_t), x_t)
        g = g * torch.where(g > 0, x_t < 1, x_t > 0)
        least = g.abs().flatten().topk(math.ceil(k)).values[-1]
        step = g.sign() * (g.abs() >= least)
        u = x_t.detach() + eta * step / step.abs().sum()
        torch.testing.assert_close(path[i + 1], by_bisection(u, x, eps).clamp(0, 1))
    assert resets > 1 and 1 < repeats < steps // 4 - 2
    assert least_eta == pytest.approx(eps / 10) and shrinks > 6


@settings(max_examples=30, deadline=None)
@given(
    eps=st.sampled_from(RADII),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lead=st.sampled_from([0.5, 1e3]),
    seed=st.integers(0, 99),
)
def test_nothing_leaves_the_ball_or_the_range(
    eps: float, dtype: torch.dtype, lead: float, seed: int
) -> None:
    x = images(4, 6, seed, dtype)
    y = torch.zeros(4, dtype=torch.int64)
    attack = partial(apgd, eps=eps, norm="l1", steps=30, restarts=2, seed=seed)
    x_adv = attack(Two(noise(x[:1], seed), lead), x, y)
    assert x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    assert lp(x_adv.double() - x.double(), "l1").max() <= eps * (1 + 1e-5) + 1e-7 * 36**0.5
    assert eps > 0 or x_adv.equal(x)


def test_a_norm_that_an_attack_lacks_is_refused_with_those_that_it_has() -> None:
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="norm is 'L1', expected 'linf', 'l2' or 'l1'"):
        apgd(Two(x[:1], 0.0), x, y, eps=1.0, norm="L1")
    for attack in (partial(autoattack, eps=1.0), partial(square, eps=1.0), fab):
        with pytest.raises(ValueError, match="norm is 'l1', expected 'linf' or 'l2'"):
            attack(Two(x[:1], 0.0), x, y, norm="l1")


# Its peers


@pytest.mark.peers
@pytest.mark.parametrize("eps", [8.0, 12.0])
@pytest.mark.parametrize("peer", ["adv-lib", "foolbox"])
def test_it_leaves_no_more_accuracy(peer: str, eps: float, victim: Any) -> None:
    model, x, y = victim
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attack = {
            "adv-lib": lambda: adv_lib_attack(
                "apgd", eps=eps, norm=1, n_iter=50, loss_function="ce"
            ),
            "foolbox": lambda: foolbox_attack("SparseL1DescentAttack", eps=eps, steps=50),
        }[peer]()
        theirs = left(model, attack(model, x, y), y)
    assert 0.05 < theirs < 0.95, "a radius at which nothing can be seen"
    x_adv = apgd(model, x, y, eps=eps, norm="l1", steps=50, seed=0)
    assert left(model, x_adv, y) <= theirs
    assert lp(x_adv - x, "l1").max() <= eps * (1 + 1e-5)
