"""The minimum-norm attacks reach the optimum where it is known, and the score says so."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.attacks import ddn, fmn, pdpgd, sigma_zero
from defenses.attacks.fmn import onto_ball
from defenses.attacks.norms import lp
from defenses.evaluation import distances, optimality, queries

ATTACKS: dict[str, tuple[str, Callable[..., Tensor], int]] = {
    "DDN": ("l2", ddn, 100),
    "FMN, L2": ("l2", partial(fmn, norm="l2"), 100),
    "FMN, L∞": ("linf", partial(fmn, norm="linf"), 100),
    "FMN, L1": ("l1", partial(fmn, norm="l1"), 100),
    "PDPGD": ("l1", pdpgd, 1000),
    "σ-zero": ("l0", sigma_zero, 500),
}
each = pytest.mark.parametrize(("norm", "attack", "steps"), ATTACKS.values(), ids=ATTACKS.keys())


def linear(seed: int, classes: int = 2, n: int = 8) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Weights of very different sizes, and images of which a third of the pixels is 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(64, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, 64, generator=draw))
        layer.weight.mul_(2 * torch.rand(64, generator=draw).square())
        layer.bias.copy_(0.1 * torch.randn(classes, generator=draw))
    model = nn.Sequential(nn.Flatten(), layer).requires_grad_(False)
    x = (1.6 * torch.rand(n, 1, 8, 8, generator=draw) - 0.3).clamp(0, 1)
    return model, x, model(x).argmax(dim=1)


def nearest_in_box(x: Tensor, w: Tensor, c: Tensor, norm: str) -> Tensor:
    """The smallest ‖d‖ with w·d >= c and x + d in [0, 1], in float64; shapes (D,), (D,), ()."""
    pull = w.abs()
    room = torch.where(w > 0, 1 - x, x)
    if norm in ("l0", "l1"):  # a knapsack: the pixels that give most come first
        order = (pull * room if norm == "l0" else pull).argsort(descending=True)
        ended = (pull * room)[order].cumsum(0)
        k = int((ended < c).sum())
        if norm == "l0":
            return torch.tensor(k + 1.0)
        missing = c - (ended[k - 1] if k else 0)
        return room[order][:k].sum() + missing / pull[order][k]
    speed = torch.ones_like(w) if norm == "linf" else pull  # water: up to time t, or the box
    low, high = torch.zeros(()).double(), torch.tensor(1e6).double()
    for _ in range(100):
        t = (low + high) / 2
        enough = (pull * torch.minimum(t * speed, room)).sum() >= c
        low, high = (low, t) if enough else (t, high)
    return torch.linalg.vector_norm(
        torch.minimum(high * speed, room), {"linf": torch.inf}.get(norm, 2)
    )


def optima(model: nn.Sequential, x: Tensor, y: Tensor, norm: str, to: Tensor) -> Tensor:
    """The distance of each image to the region where class `to` beats its own."""
    layer: Any = model[1]
    w, b = layer.weight.double(), layer.bias.double()
    found = []
    for image, own, other in zip(x.double().flatten(1), y, to, strict=True):
        gap = w[other] - w[own]
        found.append(nearest_in_box(image, gap, -(gap @ image) - b[other] + b[own], norm))
    return torch.stack(found)


@pytest.mark.parametrize("seed", range(3))
@each
def test_on_a_linear_model_in_a_box_it_is_the_optimum(
    norm: str, attack: Callable[..., Tensor], steps: int, seed: int
) -> None:
    model, x, y = linear(seed)
    x_adv = attack(model, x, y, steps=steps)
    assert (model(x_adv).argmax(dim=1) != y).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    ratio = lp(x_adv - x, norm).double() / optima(model, x, y, norm, 1 - y)
    assert (ratio > 1 - 1e-5).all()
    assert (ratio <= 1.02).all()
    if norm != "l0":
        moved, ended = x_adv != x, (x_adv == 0) | (x_adv == 1)
        assert (moved & ended).any()  # the box is active


@each
def test_with_a_target_it_is_the_optimum_towards_it(
    norm: str, attack: Callable[..., Tensor], steps: int
) -> None:
    """Of three classes the others must not come between, so the target is the nearer one."""
    model, x, y = linear(4, classes=3)
    others = torch.stack([(y + 1) % 3, (y + 2) % 3])
    distances = torch.stack([optima(model, x, y, norm, to) for to in others])
    target = others.gather(0, distances.argmin(dim=0)[None])[0]
    x_adv = attack(model, x, y, steps=steps, target=target)
    assert (model(x_adv).argmax(dim=1) == target).all()
    ratio = lp(x_adv - x, norm).double() / distances.amin(dim=0)
    assert (ratio > 1 - 1e-5).all() and ratio.median() <= 1.02


@each
def test_what_needs_no_attack_or_allows_none_comes_back_unchanged(
    norm: str, attack: Callable[..., Tensor], steps: int
) -> None:
    model, x, y = linear(0)
    wrong = attack(model, x, 1 - y, steps=5)
    assert wrong.equal(x)
    far: Any = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    far[1].bias[:] = torch.tensor([100.0, -100.0])
    assert attack(far, x, torch.zeros_like(y), steps=5).equal(x)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_point_of_the_ball_is_the_nearest(norm: str) -> None:
    delta = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    eps = lp(delta, norm) * torch.tensor([0.1, 0.5, 0.9, 1.5])
    found = onto_ball(delta, eps, norm)
    torch.testing.assert_close(lp(found, norm), eps)
    toward = (delta - found).flatten(1)[:3]  # the normal: no point of the ball lies beyond
    for other in (delta.sign(), delta, torch.randn_like(delta)):
        point = (other / lp(other, norm)[:, None, None, None]).flatten(1)[:3] * eps[:3, None]
        assert (toward * (point - found.flatten(1)[:3])).sum(dim=1).max() < 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(ddn, gamma=1.0), "gamma is 1"),
        (partial(ddn, steps=0), "steps is 0"),
        (partial(fmn, norm="l0"), "norm is 'l0'"),
        (partial(fmn, gamma=0.0), "gamma is 0"),
        (partial(fmn, step_size=0.0), "step_size is 0"),
        (partial(pdpgd, learning_rate=-1.0), "learning_rate is -1"),
        (partial(sigma_zero, sigma=0.0), "sigma is 0"),
        (partial(sigma_zero, threshold=float("nan")), "threshold is nan"),
    ],
)
def test_options_out_of_range_are_refused(call: Callable[..., Any], message: str) -> None:
    model, x, y = linear(0)
    with pytest.raises(ValueError, match=message):
        call(model, x, y)


def test_optimality_is_the_share_of_the_area_that_could_be_taken() -> None:
    """By hand: four images, one wrong from the start; the best go 1, 2 and 4 far."""
    best = torch.tensor([0.0, 1.0, 2.0, 4.0]).double()
    assert optimality(best, best) == 1
    assert optimality(torch.tensor([0.0, torch.inf, torch.inf, torch.inf]).double(), best) == 0
    # Areas up to 4: of the best 7/4, of nothing fooled 3, of these (2 + 2 + 4)/4.
    found = torch.tensor([0.0, 2.0, 2.0, 9.0]).double()
    assert optimality(found, best) == pytest.approx(1 - (2 - 7 / 4) / (3 - 7 / 4))
    curve = torch.linspace(0, 4, 40_001).double()
    areas = [
        torch.trapezoid((sizes[:, None] > curve).double().mean(dim=0), curve)
        for sizes in (found, best)
    ]
    by_area = 1 - (areas[0] - areas[1]) / (3 - areas[1])
    assert optimality(found, best) == pytest.approx(float(by_area), abs=1e-3)
    held = torch.tensor([0.0, 1.0, 2.0, torch.inf]).double()
    assert optimality(held, held) == 1


@pytest.mark.parametrize("best", [[0.5, 2.0], [0.0, 0.0], [0.0, torch.inf]])
def test_optimality_needs_a_best_that_is_best(best: list[float]) -> None:
    found = torch.tensor([0.0, torch.inf])
    with pytest.raises(ValueError, match=r"its best|do not differ"):
        optimality(found, torch.tensor(best))


def test_distances_are_zero_where_wrong_and_infinite_where_right_to_the_end() -> None:
    model, x, y = linear(0)
    y = torch.cat([1 - y[:2], y[2:]])
    images = (255 * x).round().byte()
    x = images / 255
    found = distances(model, (images, y), partial(ddn, steps=50))
    assert found[:2].tolist() == [0, 0] and (found[2:] > 0).all() and found.isfinite().all()
    expected = optima(model, x[2:], y[2:], "l2", 1 - y[2:])
    torch.testing.assert_close(found[2:], expected, rtol=0.02, atol=0)
    held = distances(model, (images, y), lambda model, x, y: x, "l1")
    assert held[:2].tolist() == [0, 0] and held[2:].isinf().all()


def test_queries_count_the_images_that_pass_forward_and_back() -> None:
    model, x, y = linear(0)
    with queries(model) as count:
        ddn(model, x, y, steps=7)
    # The first look, seven steps, ten last looks; only the steps go back.
    assert (count.forward, count.backward) == (18 * len(x), 7 * len(x))
    with queries(model) as count:
        model(x)
    assert (count.forward, count.backward) == (len(x), 0)
    ddn(model, x, y, steps=1)
    assert count.forward == len(x)  # outside nothing is counted
