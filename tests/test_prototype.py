"""Prototype conformity against Eq. 5 and the released code's loss, written out term by term."""

import math
from collections import OrderedDict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from defenses.adversarial import adversarial, drawn_radius
from defenses.attacks import fgsm, pgd
from defenses.diagnostics import reach
from defenses.evaluation import evaluate
from defenses.models import (
    Bottleneck,
    PadTo,
    PReLU,
    activations,
    he_initialized,
    mnist_six,
    resnet110,
    vgg19,
)
from defenses.prototype import (
    AWAY,
    NearestPrototype,
    Prototypes,
    conformity,
    confusion,
    distances,
    joint,
    prototype_conformity,
    released_conformity,
)
from defenses.training import Loss, cross_entropy, fit
from tests.test_attacks import DEVICES, Linear, images, net
from tests.test_models import kinds, parameters
from tests.test_training import assert_same_weights, digits, interrupt, stop_after

every_device = pytest.mark.parametrize("device", DEVICES)
either_loss = pytest.mark.parametrize("released", [False, True], ids=["Eq. 5", "released"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def drawn(n: int, k: int, d: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Features (n, d), labels (n,) of k classes, and two sets of prototypes (k, d)."""
    generator = torch.Generator().manual_seed(seed)
    f, w, v = (scale * torch.randn(m, d, generator=generator) for m in (n, k, k))
    return f, torch.randint(k, (n,), generator=generator), w, v


def as_printed(f: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Eq. 5, one image and one class at a time, in float64."""
    f, w, values = f.double(), w.double(), []
    for f_i, y_i in zip(f, y.tolist(), strict=True):
        value = (f_i - w[y_i]).norm()
        for j in range(len(w)):
            if j != y_i:
                value = value - ((f_i - w[j]).norm() + (w[y_i] - w[j]).norm()) / (len(w) - 1)
        values.append(value)
    return torch.stack(values)


def as_released(f: Tensor, y: Tensor, w: Tensor, v: Tensor, away: float = AWAY) -> Tensor:
    """What the authors' code computes, one image and one class at a time, in float64."""
    f, w, v, values = f.double(), w.double(), v.double(), []
    for f_i, y_i in zip(f, y.tolist(), strict=True):
        others = [(f_i - v[j]).pow(2).sum() for j in range(len(v)) if j != y_i]
        values.append((f_i - w[y_i]).pow(2).sum() - away * torch.stack(others).mean())
    return torch.stack(values)


def gradients(value: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), of, allow_unused=True, materialize_grads=True)


# Distances


@every_device
def test_distances_are_those_of_float64_also_far_from_the_origin(device: str) -> None:
    f, _, w, _ = drawn(7, 5, 20)
    for offset in (0.0, 1e4, 1e6):
        a, b = (f + offset).to(device), (w + offset).to(device)
        exact = (a.double()[:, None] - b.double()).square().sum(dim=2).sqrt()
        found = distances(a, b)
        assert found.dtype == torch.float32 and found.shape == (7, 5) and found.device == a.device
        torch.testing.assert_close(found, exact.float(), rtol=1e-6, atol=0.0)
    near = 1000 + torch.tensor([[0.0, 0.0], [2.0**-10, 0.0]], device=device)
    assert distances(near, near).tolist() == [[0, 2.0**-10], [2.0**-10, 0]]


@every_device
def test_at_distance_0_the_derivative_is_0_and_no_nan(device: str) -> None:
    w = drawn(1, 4, 3)[2].to(device).requires_grad_()
    f = w.detach()[:2].clone().requires_grad_()
    to_f, to_w = gradients(distances(f, w).diagonal(), f, w)
    assert not to_f.any() and not to_w.any()
    for value in (conformity(f, torch.arange(2, device=device), w), distances(w, w)):
        assert all(g.isfinite().all() for g in (value, *gradients(value, f, w)))


@every_device
@either_loss
def test_rounded_features_are_compared_in_float32(released: bool, device: str) -> None:
    f, y, w, v = (t.to(device) for t in drawn(6, 5, 30))
    loss = partial(released_conformity, v=v) if released else conformity
    f = f.bfloat16().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        far, value = distances(f, w), loss(f, y, w)
        (gradient,) = gradients(value, f)
    assert far.dtype == value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(far, distances(f.float(), w), rtol=0, atol=0)
    torch.testing.assert_close(value, loss(f.float(), y, w), rtol=0, atol=0)


def test_no_images_have_no_distances() -> None:
    f, y, w, v = drawn(0, 4, 3)
    f.requires_grad_()
    for value in (conformity(f, y, w), released_conformity(f, y, w, v)):
        assert value.shape == (0,) and gradients(value, f)[0].shape == (0, 3)


# Eq. 5

SHAPES: dict[str, Any] = {
    "n": st.integers(1, 9),
    "k": st.integers(2, 12),
    "d": st.integers(1, 40),
    "seed": st.integers(0, 99),
    "scale": st.sampled_from([1e-3, 1.0, 100.0]),
}


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_conformity_is_equation_5(n: int, k: int, d: int, seed: int, scale: float) -> None:
    f, y, w, _ = drawn(n, k, d, seed, scale)
    f.requires_grad_(), w.requires_grad_()
    ours, printed = conformity(f, y, w), as_printed(f, y, w)
    assert ours.shape == (n,) and ours.dtype == torch.float32
    within: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5 * scale * math.sqrt(d)}
    torch.testing.assert_close(ours, printed.float(), **within)
    for a, b in zip(gradients(ours, f, w), gradients(printed, f, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_it_is_bounded_by_the_prototypes_and_by_nothing_else(
    n: int, k: int, d: int, seed: int, scale: float
) -> None:
    """−2/(k−1) Σ‖w_y − w_j‖ by the triangle inequality, attained at f = w_y, of degree 1."""
    f, y, w, _ = drawn(n, k, d, seed, scale)
    lowest = -2 / (k - 1) * (w[y][:, None] - w).norm(dim=2).sum(dim=1)
    rounding = 1e-5 * lowest.abs() + 1e-6 * scale
    value = conformity(f, y, w)
    assert (value >= lowest - rounding).all()
    torch.testing.assert_close(conformity(w[y], y, w), lowest, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(
        conformity(4 * f, y, 4 * w), 4 * value, rtol=1e-5, atol=rounding.max()
    )
    shift = 3 * scale * f[:1]
    torch.testing.assert_close(
        conformity(f + shift, y, w + shift), value, rtol=1e-4, atol=1e-4 * scale * math.sqrt(d)
    )


def test_two_classes_and_a_simplex_have_their_closed_forms() -> None:
    w = torch.tensor([[0.0, 0.0], [4.0, 0.0]])  # own at 3, other at 5, apart by 4
    f, y = torch.tensor([[0.0, 3.0], [0.0, 3.0], [4.0, 0.0]]), torch.tensor([0, 1, 1])
    assert conformity(f, y, w).tolist() == [3 - 5 - 4, 5 - 3 - 4, 0 - 4 - 4]
    simplex = 5 * torch.eye(10)  # any two are 5·√2 apart
    y = torch.arange(10)
    torch.testing.assert_close(conformity(simplex, y, simplex), torch.full((10,), -10 * 2**0.5))
    center = simplex.mean(dim=0).expand(10, -1)
    torch.testing.assert_close(conformity(center, y, simplex), torch.full((10,), -5 * 2**0.5))


@either_loss
def test_an_image_has_a_value_and_a_gradient_of_its_own(released: bool) -> None:
    f, y, w, v = drawn(8, 5, 6)
    f.requires_grad_()
    loss = partial(released_conformity, v=v) if released else conformity
    whole = loss(f, y, w)
    (gradient,) = gradients(whole, f)
    for i in range(8):
        alone = loss(f[i : i + 1], y[i : i + 1], w)
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=0)
        torch.testing.assert_close(gradients(alone, f)[0][i], gradient[i], rtol=0, atol=0)


@every_device
def test_descent_has_no_end(device: str) -> None:
    """A run of what the bound says: prototypes leave one another for ever, at a steady rate."""
    f, y, w, _ = (t.to(device) for t in drawn(20, 4, 3))
    f.requires_grad_(), w.requires_grad_()
    descent, seen = SGD([f, w], lr=0.5), []
    for _ in range(200):
        value = conformity(f, y, w).mean()
        descent.zero_grad()
        value.backward()
        descent.step()
        seen.append(value.item())
    assert seen[199] < 1.8 * seen[99] < 0 and distances(w, w).max() > 50


# The released code's loss


@settings(max_examples=40, deadline=None)
@given(**SHAPES, away=st.sampled_from([AWAY, 1e-5, 0.3, 0.0]))
def test_released_conformity_is_what_the_code_computes(
    n: int, k: int, d: int, seed: int, scale: float, away: float
) -> None:
    f, y, w, v = drawn(n, k, d, seed, scale)
    own = [t.requires_grad_() for t in (f, w, v)]
    ours, theirs = released_conformity(f, y, w, v, away), as_released(f, y, w, v, away)
    assert ours.shape == (n,) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5 * scale**2)
    for a, b in zip(gradients(ours, *own), gradients(theirs, *own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * scale)
    if away == AWAY:
        torch.testing.assert_close(released_conformity(f, y, w, v), ours, rtol=0, atol=0)


def test_its_minimum_is_a_little_beyond_ones_own_prototype() -> None:
    """At (w_y − a·mean_{j≠y} v_j)/(1−a); for a < 1 it is bounded where Eq. 5 is not."""
    f, y, w, v = drawn(9, 5, 4)
    others = (v.sum(dim=0) - v[y]) / 4
    for away in (AWAY, 0.4):
        lowest = ((w[y] - away * others) / (1 - away)).requires_grad_()
        value = released_conformity(lowest, y, w, v, away)
        assert gradients(value, lowest)[0].abs().max() < 2e-6
        assert (released_conformity(lowest + f, y, w, v, away) > value).all()
        beyond = (1 - away) * f.square().sum(dim=1)
        torch.testing.assert_close(released_conformity(lowest + f, y, w, v, away) - value, beyond)


def test_each_of_its_terms_has_prototypes_of_its_own() -> None:
    f, y, w, v = drawn(9, 5, 4)
    w.requires_grad_(), v.requires_grad_()
    value = released_conformity(f, y, w, v)
    near, far = gradients((f - w[y]).square().sum(dim=1), w)[0], gradients(value, v)[0]
    torch.testing.assert_close(gradients(value, w)[0], near)
    share = torch.ones(9, 5).scatter(1, y[:, None], 0) / 4  # none of it from one's own class
    torch.testing.assert_close(far, -AWAY * 2 * (share.sum(0)[:, None] * v - share.T @ f))
    assert not gradients(released_conformity(f, y, w, v, away=0.0), v)[0].any()


# A network with prototypes


def places() -> dict[str, tuple[nn.Module, int]]:
    """A branch of every kind: over maps, with weights of its own, and none."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {"norm": (pool, 5), "act": (mean, 4), "fc": (nn.Identity(), 6)}


def network(num_classes: int = 10) -> nn.Sequential:
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(1, 4, 5, stride=3)}
    layers |= {"norm": nn.BatchNorm2d(4), "act": nn.ReLU(), "flatten": nn.Flatten()}
    layers |= {"drop": nn.Dropout(0.3), "fc": nn.Linear(256, 6), "out": nn.Linear(6, num_classes)}
    return nn.Sequential(OrderedDict(layers))


def prototypes(released: bool = False, seed: int = 0, **changed: Any) -> Prototypes:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        how: dict[str, Any] = {"taps": places(), "released": released} | changed
        return Prototypes(network(), **how)


def some(n: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return images(n, size=28).float().to(device), (torch.arange(n) * 7 % 10).to(device)


@every_device
@either_loss
def test_features_are_tapped_on_the_way_to_the_same_logits(released: bool, device: str) -> None:
    model, (x, y) = prototypes(released).to(device).eval(), some(device=device)
    logits, features = model.tapped(x)
    assert torch.equal(logits, model.network(x)) and torch.equal(model(x), logits)
    assert {name: f.shape for name, f in features.items()} == {
        "norm": (6, 5),
        "act": (6, 4),
        "fc": (6, 6),
    }
    for name, f in features.items():
        branch = model.branches[name]
        assert torch.equal(f, branch(activations(model.network, x, name)))
        assert torch.equal(model.features(x, name), f)
        w, v = model.w[name], model.v[name] if released else None
        assert w.shape == (10, f.shape[1]) and w.device.type == device
        expected = as_released(f, y, w, v) if v is not None else as_printed(f, y, w)
        torch.testing.assert_close(model.conformity(name, f, y), expected.float())
    assert not torch.equal(prototypes().train()(x.cpu()), logits.cpu())  # dropout, in train mode


@either_loss
def test_prototypes_are_parameters_and_stored_with_the_weights(released: bool) -> None:
    model, names = prototypes(released), set(places())
    stored = set(model.state_dict())
    kept = {f"{s}.{n}" for s in ("w", "v")[: 1 + released] for n in names}
    network, branches = (f"{s}." for s in ("network", "branches"))
    assert {n for n in stored if not n.startswith((network, branches))} == kept
    assert {"network.norm.running_mean", "branches.norm.2.weight"} <= stored
    assert kept <= {n for n, p in model.named_parameters() if p.requires_grad}
    other = prototypes(released, seed=1)
    assert not torch.equal(other.w["fc"], model.w["fc"])
    other.load_state_dict(model.state_dict())
    assert_same_weights(other, model)
    flat = torch.cat([w.detach().flatten() for w in prototypes(num_classes=2000).w.values()])
    assert abs(flat.mean()) < 4.5 / math.sqrt(len(flat))  # from N(0, 1)
    assert abs(flat.square().mean() - 1) < 4.5 * math.sqrt(2 / len(flat))


def test_a_layer_that_is_none_is_refused() -> None:
    branch = (nn.Identity(), 3)
    with pytest.raises(ValueError, match=r"no layer \['fc9', 'layer'\] to tap; the layers are \["):
        Prototypes(network(), {"fc": branch, "layer": branch, "fc9": branch})


@either_loss
def test_an_optimizer_moves_the_prototypes_at_rates_of_their_own(released: bool) -> None:
    model = prototypes(released)
    groups = model.groups(0.01)
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len([*model.parameters()])
    assert [group["lr"] for group in groups] == [0.01, 0.5, 1.0][: 2 + released]
    assert [g["lr"] for g in model.groups(0.01, w=3.0, v=7.0)] == [0.01, 3.0, 7.0][: 2 + released]
    optimizer = SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    first, *own = optimizer.param_groups
    assert (first["momentum"], first["weight_decay"]) == (0.9, 5e-4)
    assert all((g["momentum"], g["weight_decay"]) == (0, 0) for g in own)
    assert own[0]["params"] == [*model.w.parameters()]
    assert [*own[-1]["params"]] == [*(model.v if released else model.w).parameters()]


def test_two_steps_move_the_prototypes_as_the_code_does() -> None:
    """It divides their gradients by the term's weight: w by 0.5 of a term, v by 1e-4 of one."""
    model, (x, y) = prototypes(released=True).eval(), some(40)
    optimizer = SGD(model.groups(0.01), lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        f, w, v = model.features(x, "fc").detach(), model.w["fc"], model.v["fc"]
        (near,) = gradients((f - w[y]).square().sum(dim=1).mean(), w)
        others = torch.ones(40, 10).scatter(1, y[:, None], 0) / 9
        (far,) = gradients((distances(f, v).square() * others).sum(dim=1).mean(), v)
        expected = (w - 0.5 * near).detach(), (v + 1e-4 * far).detach()
        optimizer.zero_grad()
        prototype_conformity()(model, x, y).backward()
        optimizer.step()
        torch.testing.assert_close((w.detach(), v.detach()), expected, rtol=1e-5, atol=1e-6)


@every_device
@either_loss
def test_the_objective_is_equation_7_for_each_image_and_its_mean(
    released: bool, device: str
) -> None:
    model, (x, y) = prototypes(released).to(device).eval(), some(device=device)
    logits, features = model.tapped(x)
    apart = F.cross_entropy(logits, y, reduction="none")
    near = torch.zeros(6, dtype=torch.float64, device=device)
    for name, f in features.items():
        own = (model.w[name], model.v[name]) if released else (model.w[name],)
        near = near + (as_released if released else as_printed)(f, y, *own)
    for weight in (1.0, 0.03, 0.0):
        value = joint(model, x, y, weight)
        assert value.shape == (6,) and value.dtype == torch.float32
        torch.testing.assert_close(value, (apart + weight * near).float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(prototype_conformity(weight)(model, x, y), value.mean())
    assert torch.equal(prototype_conformity()(model, x, y), joint(model, x, y).mean())
    weights = [*model.parameters()]
    for a in torch.autograd.grad(joint(model, x, y).mean(), weights):
        assert a.isfinite().all() and a.any()  # branches and prototypes learn, too
    with torch.autocast(device, torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert joint(model, x, y).dtype == confusion(model, x, y).dtype == torch.float32


def test_without_taps_it_is_cross_entropy() -> None:
    model, (x, y) = prototypes(taps={}).eval(), some()
    assert len(model.groups(0.1)) == 1 and model.tapped(x)[1] == {}
    weights = [*model.parameters()]
    values = [loss(model, x, y) for loss in (prototype_conformity(), cross_entropy)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(v, weights) for v in values), strict=True):
        torch.testing.assert_close(a, b)
    exact = joint(model.double(), x.double(), y)
    assert exact.shape == (6,) and exact.dtype == torch.float64


# Training, stopped and resumed


def trained(
    checkpoint: Path | None = None,
    released: bool = False,
    start: int = 0,
    loss: Loss | None = None,
    **changed: Any,
) -> Prototypes:
    """Train with everything that has a state; where a checkpoint is there the start is not seen."""
    model = prototypes(released, start)
    optimizer = SGD(model.groups(0.05), lr=0.05, momentum=0.9, weight_decay=5e-4)
    how: dict[str, Any] = {"optimizer": optimizer, "schedule": MultiStepLR(optimizer, [2])}
    how |= {"epochs": 3, "batch_size": 32, "progress": False}
    how |= {"loss": loss or prototype_conformity(0.1), "checkpoint": checkpoint}
    fit(model, digits(64), **(how | changed))
    return model


@either_loss
def test_a_resumed_run_ends_with_the_same_weights_and_prototypes(
    released: bool, tmp_path: Path
) -> None:
    whole, path, sets = trained(released=released), tmp_path / "run.pt", ("w", "v")[: 1 + released]
    trained(path, released, epochs=1)
    torch.rand(9)  # what was drawn in between does not matter
    resumed = trained(path, released, start=1)
    assert_same_weights(whole, resumed)
    for name in sets:
        for tap, own in getattr(whole, name).items():
            assert torch.equal(own, getattr(resumed, name)[tap])
            assert not torch.equal(own, getattr(prototypes(released), name)[tap])  # they move
            assert not torch.equal(own, getattr(trained(released=released, epochs=1), name)[tap])


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_on_attacked_images_goes_on_from_where_it_was_interrupted(
    steps: int, tmp_path: Path
) -> None:
    """Algorithm 1 with a radius for each batch: FGSM, and PGD from random starts."""
    climb = partial(pgd, step_size=0.1, steps=steps, early_stop=False) if steps > 1 else fgsm
    attacked = adversarial(drawn_radius(climb, 0.1, 0.5), loss=prototype_conformity(0.1))
    never = stop_after(99, interrupt)
    whole = trained(loss=attacked, augment=never)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run.pt", loss=attacked, augment=stop_after(3, interrupt))
    resumed = trained(
        tmp_path / "run.pt", start=1, loss=attacked, augment=stop_after(99, interrupt)
    )
    assert_same_weights(whole, resumed)
    plain = trained(augment=stop_after(99, interrupt))
    assert not torch.equal(plain.w["fc"], whole.w["fc"])


def test_a_checkpoint_of_the_other_variant_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run.pt", epochs=1)
    with pytest.raises(ValueError, match=r"run\.pt was written for another model"):
        trained(tmp_path / "run.pt", released=True)


def test_training_brings_prototypes_and_features_of_a_class_together() -> None:
    model, data = prototypes(taps={"fc": places()["fc"]}), digits(400)
    before = evaluate(NearestPrototype(model, "fc"), data.train)
    optimizer = SGD(model.groups(0.05), lr=0.05, momentum=0.9)
    fit(model, data, loss=prototype_conformity(), epochs=8, optimizer=optimizer, batch_size=50)
    after = evaluate(NearestPrototype(model, "fc"), data.train)
    assert before.value < 0.3 and after.value > 0.7
    assert evaluate(model, data.train).value > 0.8


# Attacks that know the prototypes


def tapped_net(released: bool = False) -> Prototypes:
    """A smooth network in float64, in eval mode."""
    layers = OrderedDict(body=net().body[:-1], out=net().body[-1])
    taps: dict[str, tuple[nn.Module, int]] = {
        "body": (nn.Linear(128, 7), 7),
        "out": (nn.Identity(), 5),
    }
    model = Prototypes(nn.Sequential(layers), taps, num_classes=5, released=released)
    return model.double().eval()


@either_loss
@pytest.mark.parametrize("objective", [joint, confusion])
def test_an_attack_on_the_features_climbs_them_inside_the_ball(
    objective: Any, released: bool
) -> None:
    model, x = tapped_net(released), images(12)
    y = model(x).argmax(dim=1)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    attack: Any = partial(pgd, eps=0.1, step_size=0.02, steps=10, loss=objective)
    for how in ({"early_stop": False}, {"seed": 0}):
        x_adv = attack(model, x, y, **how)
        assert (x_adv - x).abs().max() <= 0.1 + 1e-12 and x_adv.dtype == x.dtype
        assert x_adv.min() >= 0 and x_adv.max() <= 1
    climbed = attack(model, x, y, early_stop=False, random_start=False)
    assert (objective(model, climbed, y) > objective(model, x, y)).all()
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    stepped = fgsm(model, x, y, eps=0.01, loss=objective)
    leaf = x.clone().requires_grad_()
    (gradient,) = gradients(objective(model, leaf, y), leaf)
    torch.testing.assert_close(stepped, (x + 0.01 * gradient.sign()).clamp(0, 1))


@pytest.mark.parametrize("objective", [joint, confusion])
def test_what_it_finds_for_an_image_does_not_depend_on_the_others(objective: Any) -> None:
    model, x = tapped_net(), images(10)
    y = model(x).argmax(dim=1)
    for early_stop in (True, False):
        how: dict[str, Any] = {"eps": 0.1, "step_size": 0.02, "steps": 8, "early_stop": early_stop}
        attack: Any = partial(pgd, **how, random_start=False, loss=objective)
        whole = attack(model, x, y)
        parts = torch.cat([attack(model, x[i], y[i]) for i in torch.arange(10).split([1, 2, 7])])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
        assert attack(model, x[:0], y[:0]).shape == (0, 1, 8, 8)


@every_device
def test_confusion_is_how_much_nearer_another_prototype_is(device: str) -> None:
    model, (x, y) = prototypes().to(device).eval(), some(20, device)
    expected = torch.zeros(20)
    for tap, f in model.tapped(x)[1].items():
        for i in range(20):
            far = [(f[i] - w).norm().item() for w in model.w[tap]]
            own = far.pop(int(y[i]))
            expected[i] += own - min(far)
    value = confusion(model, x, y)
    assert value.device.type == device
    torch.testing.assert_close(value.detach().cpu(), expected, rtol=1e-4, atol=1e-5)
    one = prototypes(taps={"fc": places()["fc"]}).to(device).eval()
    wrong = NearestPrototype(one, "fc")(x).argmax(dim=1) != y
    assert torch.equal(confusion(one, x, y) > 0, wrong) and 0 < wrong.sum() < 20


# The nearest prototype


def at_means(w: Tensor) -> NearestPrototype:
    """A classifier by the nearest of these images (k, C, H, W)."""
    size = w[0].numel()
    layers = OrderedDict(flat=nn.Flatten(), out=nn.Linear(size, len(w)))
    model = Prototypes(nn.Sequential(layers), {"flat": (nn.Identity(), size)}, len(w))
    model.w["flat"].data.copy_(w.flatten(1))
    return NearestPrototype(model, "flat").eval()


@every_device
def test_the_nearest_prototype_is_the_class(device: str) -> None:
    model, (x, _) = prototypes().to(device).eval(), some(device=device)
    for tap in places():
        logits, far = (
            NearestPrototype(model, tap)(x),
            distances(model.features(x, tap), model.w[tap]),
        )
        assert torch.equal(logits, -far) and torch.equal(logits.argmax(dim=1), far.argmin(dim=1))


@every_device
def test_prototypes_at_the_means_of_blobs_classify_them(device: str) -> None:
    w, y = images(4, low=0.3, high=0.7), torch.arange(60) % 4
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(60, 1, 8, 8, generator=generator, dtype=w.dtype)
    x = (w[y] + 0.05 * noise).clamp(0, 1).float()
    model = at_means(w).to(device)
    assert evaluate(model, (x.to(device), y.to(device))).value == 1
    assert evaluate(model, (x.to(device), ((y + 1) % 4).to(device))).value == 0


def test_pgd_fools_it_from_the_distance_of_the_plane_between_two_prototypes() -> None:
    """(‖f−w_o‖² − ‖f−w_y‖²) / 2‖w_o−w_y‖₁ in L∞, where no pixel is clipped."""
    w, x = images(2, low=0.4, high=0.6), images(30, low=0.35, high=0.65, seed=3)
    model, y = at_means(w).double(), distances(x.flatten(1), w.flatten(1)).argmin(dim=1)
    own, other = (((x - w[i]) ** 2).flatten(1).sum(dim=1) for i in (y, 1 - y))
    eps = float((other - own).median() / (2 * (w[0] - w[1]).abs().sum()))
    needed = (other - own) / (2 * (w[0] - w[1]).abs().sum())
    assert 0 < eps < 0.3
    attack = partial(pgd, eps=eps, step_size=eps / 8, steps=25, loss="margin", seed=0)
    left = model(attack(model, x, y)).argmax(dim=1) == y
    assert left[needed > 1.001 * eps].all() and not left[needed < 0.97 * eps].any()
    assert evaluate(model.float(), (x, y), attack).value == pytest.approx(left.float().mean())


# What training and Proposition 2 take besides


def test_a_radius_is_drawn_for_each_batch_from_torchs_generator() -> None:
    seen: list[float] = []

    def note(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        assert isinstance(eps, float)
        seen.append(eps)
        return x + eps

    attack, model, x = drawn_radius(note, 0.1, 0.5), nn.Identity(), torch.zeros(2)
    for _ in range(600):
        assert torch.equal(attack(model, x, x), x + seen[-1])
    eps = torch.tensor(seen)
    assert eps.min() >= 0.1 and eps.max() <= 0.5 and eps.max() - eps.min() > 0.39
    assert abs(eps.mean() - 0.3) < 4.5 * 0.4 / math.sqrt(12 * 600) and len(set(seen)) > 590
    assert abs(eps.std() - 0.4 / math.sqrt(12)) < 0.01
    torch.manual_seed(0)
    for i in range(5):
        attack(model, x, x)
        assert seen[-1] == seen[i]
    fixed = drawn_radius(note, 0.2, 0.2)
    fixed(model, x, x)
    assert seen[-1] == 0.2


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.5, 0.1), (math.nan, 1), (0, math.nan)])
def test_an_interval_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= low <= high, got"):
        drawn_radius(fgsm, low, high)


def first(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[:, :1]


@every_device
def test_the_reach_of_a_linear_feature_is_in_closed_form(device: str) -> None:
    """ε‖W‖₁ in the interior; next to the ends of the range the box is smaller."""
    model, x = Linear(16, 3).to(device), images(8, size=4, low=0.3, high=0.7).to(device)
    W, y = model.layer.weight[0].detach(), torch.zeros(8, dtype=torch.int64, device=device)
    for eps in (0.0, 0.01, 0.1):
        found = reach(first, model, x, y, eps=eps)
        assert found.shape == (8,) and found.device.type == device
        torch.testing.assert_close(found, eps * W.abs().sum().expand(8))
    x[:, 0, :2], x[:, 0, 2:3] = 0.0, 0.95
    low, high = ((x + e).clamp(0, 1).flatten(1) - x.flatten(1) for e in (-0.1, 0.1))
    up, down = torch.maximum(W * low, W * high), torch.minimum(W * low, W * high)
    found = reach(first, model, x, y, eps=0.1)
    exact = torch.maximum(up.sum(dim=1), -down.sum(dim=1))
    assert (found <= exact * (1 + 1e-9)).all() and (found >= 0.9 * exact).any()
    assert (found > torch.minimum(up.sum(dim=1), -down.sum(dim=1)) * (1 - 1e-9)).all()


def test_it_is_never_above_the_largest_distance_in_the_box() -> None:
    model, x = Linear(9, 4), images(12, size=3)
    y = torch.zeros(12, dtype=torch.int64)
    corners = torch.tensor([*product((-1.0, 1.0), repeat=9)], dtype=x.dtype).view(-1, 1, 3, 3)
    before = torch.zeros(12, dtype=x.dtype)
    for eps in (0.01, 0.05, 0.1, 0.3):
        ends = (x[:, None] + eps * corners).clamp(0, 1).flatten(0, 1)
        delta = model(ends).view(12, 512, 4) - model(x)[:, None]
        exact = delta.norm(dim=2).amax(dim=1).detach()  # a convex function is largest at a corner
        found = reach(lambda model, x: model(x), model, x, y, eps=eps)
        assert (found <= exact * (1 + 1e-9)).all() and (found / exact).mean() > 0.8  # one start
        assert (found > before).all()  # a larger ball reaches farther
        before = found


def test_reach_looks_at_features_of_prototypes_and_changes_nothing() -> None:
    model, x, y = tapped_net(), images(6), torch.zeros(6, dtype=torch.int64)
    weights = {n: p.clone() for n, p in model.state_dict().items()}

    def features(model: nn.Module, x: Tensor) -> Tensor:
        assert not model.training and isinstance(model, Prototypes)
        return model.features(x, "body")

    found, again, few = (reach(features, model, x, y, eps=0.1, steps=s) for s in (20, 20, 1))
    assert (found > 0).all() and not found.requires_grad
    assert torch.equal(found, again) and (found > few).float().mean() > 0.5
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training


# PReLU


def both(x: Tensor, a: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Value, gradient to x and gradient to a: ours and PyTorch's, under autocast for bfloat16."""
    found = []
    for layer in (PReLU(len(a)), nn.PReLU(len(a))):
        layer = layer.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        layer.weight.data.copy_(a)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        rounded = x.dtype == torch.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=rounded):
            out = layer(leaf)
        found.append((out, *torch.autograd.grad(out, (leaf, layer.weight), g)))
    return found


@every_device
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(8, 6, 5, 5), (16, 6)], ids=str)
def test_our_prelu_is_pytorchs(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str
) -> None:
    x, g = torch.randn(shape), torch.randn(shape)
    x[0] = torch.tensor([-0.0, 0.0, -1e-30, 1e-30, -1e4, 1e4]).view(-1, *[1] * (x.ndim - 2))
    if x.ndim == 4:
        x, g = (t.contiguous(memory_format=layout) for t in (x, g))
    x, g = x.to(device, dtype), g.to(device, dtype)
    ours, theirs = both(x, torch.full((6,), 0.25), g)  # as both start, nothing is rounded apart
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b) and a.stride() == b.stride()
    assert ours[2].dtype == theirs[2].dtype
    torch.testing.assert_close(ours[2], theirs[2])
    slopes = torch.tensor([-0.3, 0.0, 0.1, 0.6, 1.0, 1.7])
    ours, theirs = both(x, slopes, g)
    for a, b in zip(ours, theirs, strict=True):  # one unit in the last place
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_it_starts_and_is_stored_as_pytorchs() -> None:
    assert torch.equal(PReLU(5).weight, nn.PReLU(5).weight)
    assert PReLU(5).state_dict().keys() == nn.PReLU(5).state_dict().keys()
    shared, x = PReLU(), torch.randn(3, 4, 2, 2)  # one a for all channels
    torch.testing.assert_close(shared(x), nn.PReLU()(x), rtol=0, atol=0)


# The networks


LAYERS = [f"layer{i}" for i in range(1, 7)]


def shapes(model: nn.Sequential, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of an image's features behind each of the table's layers."""
    found = []
    for name, layer in model.named_children():
        x = layer(x)
        found += [tuple(x.shape[1:])] if name in LAYERS else []
    return found


def test_the_network_for_mnist_is_that_of_table_1() -> None:
    model = mnist_six().eval()
    assert parameters(model) == {
        "layer1": 832 + 32 + 25_632 + 32,  # 32 filters of 1·5·5 and 32 biases, 32 slopes; of 32·5·5
        "layer2": 51_264 + 64 + 102_464 + 64,
        "layer3": 204_928 + 128 + 409_728 + 128,
        "layer4": 590_336,  # 28 → 14 → 7 → 3, so 128·3·3 inputs
        "act": 512,
        "layer5": 32_832,
        "layer6": 650,
    }
    names = [name for name, _ in model.named_children()]
    assert names == ["center", *LAYERS[:3], "flatten", "layer4", "act", *LAYERS[4:]]
    for i in (1, 2, 3):
        pair = 2 * [nn.Conv2d, PReLU]
        assert kinds(model.get_submodule(f"layer{i}")) == [*pair, nn.MaxPool2d]  # type: ignore[arg-type]
    x = torch.rand(2, 1, 28, 28)
    found = shapes(model, x)
    assert found == [(32, 14, 14), (64, 7, 7), (128, 3, 3), (512,), (64,), (10,)]
    assert mnist_six(7)(x).shape == (2, 7) and shapes(mnist_six(width=2), x)[4:] == [(2,), (10,)]


@pytest.mark.parametrize(("channels", "classes", "blocks"), [(1, 100, 12), (3, 10, 18)])
def test_resnet110_is_that_of_table_1(channels: int, classes: int, blocks: int) -> None:
    """12 blocks a stage make 109 convolutions and a linear layer; 18, as in the code, 163."""
    with torch.device("meta"):  # shapes alone
        model, x = resnet110(classes, channels, blocks).eval(), torch.rand(2, channels, 32, 32)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    by_kernel = [sum(c.kernel_size == (s, s) for c in convolutions) for s in (1, 3)]
    assert len(convolutions) == 1 + 3 * 3 * blocks + 3  # three projections
    assert by_kernel == [3 * 2 * blocks + 3, 1 + 3 * blocks]
    assert all(c.bias is None for c in convolutions)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == len(convolutions)
    widths = [(c.in_channels, c.out_channels) for c in convolutions]
    assert widths[0] == (channels, 16)
    for i, width in enumerate((16, 32, 64), 2):
        stage = model.get_submodule(f"layer{i}")
        assert kinds(stage) == blocks * [Bottleneck]  # type: ignore[arg-type]
        last = [m for m in stage[-1].modules() if isinstance(m, nn.Conv2d)]  # type: ignore[index]
        assert [c.out_channels for c in last] == [width, width, 4 * width]
        strides = [m.stride for m in stage[0].residual if isinstance(m, nn.Conv2d)]  # type: ignore[index]
        assert strides == [(1, 1), (2, 2) if i > 2 else (1, 1), (1, 1)]
    found = shapes(model, x)
    maps = [(16, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert found == [*maps, (1024,), (classes,)]
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [1024, classes]


def test_the_papers_resnet_is_the_default_and_a_small_one_runs() -> None:
    with torch.device("meta"):
        assert len([*resnet110().get_submodule("layer4").children()]) == 12
    logits = resnet110(7, channels=1, blocks=1)(torch.rand(3, 1, 32, 32))
    assert logits.shape == (3, 7) and logits.isfinite().all()
    logits.sum().backward()


@pytest.mark.parametrize(
    ("inputs", "width", "stride"), [(12, 3, 1), (8, 3, 1), (12, 3, 2)], ids=str
)
def test_a_bottleneck_is_that_of_figure_5(inputs: int, width: int, stride: int) -> None:
    block = Bottleneck(inputs, width, stride)
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                t.data.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    x, residual, shortcut = torch.randn(2, inputs, 6, 6), *block.eval().children()

    def normalized(h: Tensor, layers: Any, at: int, stride: int = 1) -> Tensor:
        weight, norm = layers[at].weight, layers[at + 1]
        h = F.conv2d(h, weight, None, stride, weight.shape[2] // 2)
        return F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    h = normalized(x, residual, 0).relu()
    h = normalized(h, residual, 3, stride).relu()
    same = inputs == 4 * width and stride == 1
    straight = x if same else normalized(x, shortcut, 0, stride)
    expected = (straight + normalized(h, residual, 6)).relu()
    assert expected.shape == (2, 4 * width, 6 // stride, 6 // stride)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 28, 10), (3, 32, 100)])
def test_vgg19_has_sixteen_convolutions(channels: int, size: int, classes: int) -> None:
    with torch.device("meta"):
        model, x = vgg19(classes, channels).eval(), torch.rand(2, channels, size, size)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    widths = [*2 * [64], *2 * [128], *4 * [256], *4 * [512], *4 * [512]]
    assert [c.out_channels for c in convolutions] == widths and len(widths) == 16
    assert [c.in_channels for c in convolutions] == [channels, *widths[:-1]]
    assert {c.kernel_size for c in convolutions} == {(3, 3)}
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [classes]
    sizes, h = [], x
    for layer in model:
        h = layer(h)
        if isinstance(layer, nn.MaxPool2d):
            sizes.append(tuple(h.shape[1:]))
    assert sizes == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
    assert h.shape == (2, classes)


def test_images_are_padded_on_all_sides_alike() -> None:
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(PadTo(32)(x), x)
    padded = PadTo(32)(x[:, :, :28, :28])
    assert torch.equal(padded[:, :, 2:30, 2:30], x[:, :, :28, :28]) and padded.shape == x.shape
    assert padded.count_nonzero() == x[:, :, :28, :28].count_nonzero()
    odd = PadTo(32)(x[:, :, :29, :30])  # one more below than above
    assert torch.equal(odd[:, :, 1:30, 1:31], x[:, :, :29, :30]) and odd.shape == x.shape


@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0])
def test_weights_start_for_the_slope_below_0(slope: float) -> None:
    """Deviation √(2/(1+a²)/fan-in), so that a PReLU keeps the mean square of what goes in."""
    layers = nn.Conv2d(8, 400, 5), nn.Linear(200, 400)
    he_initialized(nn.Sequential(*layers), slope)
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx((2 / (1 + slope**2) / 200) ** 0.5, 0.02)
        assert layer.bias is not None and not layer.bias.any()
    x = torch.randn(2000, 200)
    h = F.prelu(layers[1](x), torch.tensor([slope]))
    assert h.square().mean().item() == pytest.approx(1, rel=0.05)
    conv = mnist_six().get_parameter("layer3.2.weight")
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (1 + 1 / 16) / (128 * 25)), rel=0.02)
