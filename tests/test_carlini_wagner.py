"""Carlini & Wagner on models whose answer is known in closed form, and beside the peers."""

import copy
import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from defenses.attacks.carlini_wagner import carlini_wagner
from defenses.attacks.contract import Forward
from defenses.attacks.losses import margin
from defenses.evaluation import NORMAL_975
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

SHORT: dict[str, Any] = {"c": 1.0, "binary_search_steps": 2, "steps": 30, "learning_rate": 0.02}
FIXED: dict[str, Any] = {"c": 10.0, "binary_search_steps": 1, "steps": 40, "learning_rate": 0.01}
short: Callable[..., Tensor] = partial(carlini_wagner, **SHORT)
VARIANTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "searched": short,
    "fixed": partial(carlini_wagner, **FIXED),
    "confident": partial(carlini_wagner, **{**SHORT, "kappa": 2.0}),
    "second": partial(carlini_wagner, **{**SHORT, "target": "second"}),
}
every_variant = pytest.mark.parametrize("attack", VARIANTS.values(), ids=VARIANTS.keys())


def two_classes(num_inputs: int = 64, seed: int = 0) -> Linear:
    """A boundary that passes near mid-gray, so that no pixel's limit is in the way."""
    model = Linear(num_inputs, 2, seed=seed)
    with torch.no_grad():
        gray = torch.full((1, num_inputs), 0.5, dtype=torch.float64)
        model.layer.bias.add_(torch.tensor([0.3, -0.3]) - model(gray)[0])
    return model


def l2(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).norm(dim=1)


# The closed form


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kappa", [0.0, 1.5])
def test_the_search_ends_at_the_distance_to_a_linear_boundary(kappa: float, device: str) -> None:
    """(|w·x + b| + κ)/‖w‖, within 2%, and never nearer."""
    model, x = two_classes().to(device), images(20, low=0.4, high=0.6).to(device)
    y = predicted(model, x)
    w = (model.layer.weight[0] - model.layer.weight[1]).detach()
    lead = -margin(model(x), y).detach()
    x_adv = carlini_wagner(
        model, x, y, binary_search_steps=6, steps=150, learning_rate=5e-3, kappa=kappa
    )
    ratio = l2(x_adv, x) / ((lead + kappa) / w.norm())
    assert (predicted(model, x_adv) != y).all()
    assert (margin(model(x_adv), y) >= kappa).all()
    assert ratio.min() >= 1 and ratio.mean() < 1.01 and ratio.max() < 1.02


def test_a_targeted_search_ends_nearest_the_target() -> None:
    """Three linear classes with orthogonal weights: the shortest way is known for each target."""
    model = Linear(64, 3)
    with torch.no_grad():
        w = torch.linalg.qr(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))[0]
        model.layer.weight.copy_(w.T)
        model.layer.bias.copy_(torch.tensor([0.2, -0.6, -0.7]) - w.T.sum(dim=1) / 2)
    x = torch.full((2, 1, 8, 8), 0.5, dtype=torch.float64)
    y, target = labels(2), torch.tensor([1, 2])
    x_adv = carlini_wagner(
        model,
        x,
        y,
        binary_search_steps=6,
        steps=200,
        learning_rate=5e-3,
        kappa=0.5,
        target=target,
    )
    gaps = torch.tensor([0.8, 0.9], dtype=torch.float64) + 0.5
    ratio = l2(x_adv, x) / (gaps / 2**0.5)  # ‖w_0 − w_t‖ = √2; the third class stays behind
    assert torch.equal(predicted(model, x_adv), target)
    assert ratio.min() >= 1 and ratio.max() < 1.02


def test_f_is_the_papers_and_its_gradient_is_zero_exactly_where_it_is_minus_kappa() -> None:
    """f₆ written out; the images that need no backward pass get the gradient that one gives."""
    module = importlib.import_module(carlini_wagner.__module__)
    model, x, kappa = Linear(64, 5, scale=0.3), images(30), 0.4
    y = (predicted(model, x) + torch.arange(30) % 2) % 5
    reference = x.clone().requires_grad_()
    z = model(reference)
    others = torch.stack([torch.cat([row[:i], row[i + 1 :]]).max() for row, i in zip(z, y)])  # noqa: B905
    own = z[torch.arange(30), y]
    for sign, value in ((1.0, own - others), (-1.0, others - own)):
        f = value.clamp(min=-kappa)
        (expected,) = torch.autograd.grad(f.sum(), reference, retain_graph=True)
        with module.attacking(model, x, y) as logits_of:
            search = module._Search(logits_of, x, y, sign, kappa, 1, 0.1)
            for at in (f == 7, f == -kappa, f != -kappa):  # remembered as off, rightly, wrongly
                found, slope, now = search._f(x, torch.arange(30), at)
                torch.testing.assert_close(found, f.detach())
                torch.testing.assert_close(slope, expected)
                assert torch.equal(now, f == -kappa)
        assert 3 < now.sum() < 27


# What is returned


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
    num_classes=st.sampled_from([2, 3, 10, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    target=st.sampled_from([None, "second"]),
    seed=st.integers(0, 99),
)
def test_the_result_fools_or_is_the_image_itself(
    n: int, channels: int, num_classes: int, dtype: torch.dtype, target: str | None, seed: int
) -> None:
    model = Linear(channels * 16, num_classes, seed=seed).to(dtype)
    x = images(n, channels, 4, low=-0.5, high=1.5, seed=seed).clamp(0, 1).to(dtype)
    y, before = predicted(model, x), x.clone()
    x_adv = carlini_wagner(model, x, y, **SHORT, target=target)
    assert x_adv.dtype == dtype and x_adv.shape == x.shape and x_adv.device == x.device
    assert torch.equal(x, before) and not x_adv.requires_grad
    if n:
        assert x_adv.min() >= 0 and x_adv.max() <= 1
    unchanged = (x_adv == x).flatten(1).all(dim=1)
    second = model(x).topk(2, dim=1).indices[:, 1]
    aimed = predicted(model, x_adv) == second if target else predicted(model, x_adv) != y
    assert (aimed | unchanged).all() and not (aimed & unchanged).any()


@every_variant
def test_an_image_does_not_depend_on_its_batch(attack: Callable[..., Tensor]) -> None:
    """foolbox, torchattacks and adv-lib stop early for the whole batch, or not at all."""
    model, x = net(), images(8)
    y = predicted(model, x)
    whole = attack(model, x, y)
    for size in (1, 3):
        parts = [attack(model, *part) for part in zip(x.split(size), y.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
    others = torch.cat([x[:4], images(4, seed=1)])
    wrong = torch.cat([y[:4], (y[4:] + 1) % 5])
    torch.testing.assert_close(attack(model, others, wrong)[:4], whole[:4], rtol=0, atol=1e-5)


@every_variant
def test_what_cannot_or_need_not_be_fooled_comes_back_unchanged(
    attack: Callable[..., Tensor],
) -> None:
    """foolbox returns black images where it fails."""
    model, x = net(), images(8)
    wrong = model(x).topk(2, dim=1).indices[:, 1] if attack is not VARIANTS["second"] else None
    y = predicted(model, x) if wrong is None else wrong
    if wrong is None:
        y = (y + 1) % 5  # the second class is the predicted one: it is there already
    assert torch.equal(attack(model, x, y), x)
    fortress = hard_to_fool(Linear(64, 5))
    assert torch.equal(attack(fortress, x, labels(8)), x)
    there = labels(8) + predicted(model, x)
    assert torch.equal(short(model, x, (there + 1) % 5, target=there), x)


def test_second_is_the_runner_up() -> None:
    model, x = net(), images(10)
    y, second = model(x).topk(2, dim=1).indices.unbind(dim=1)
    x_adv = short(model, x, y, target="second")
    assert torch.equal(x_adv, short(model, x, y, target=second))
    assert (predicted(model, x_adv) == second).all()


def test_a_confident_image_leads_by_kappa_and_lies_farther() -> None:
    model, x = net(), images(10)
    y = predicted(model, x)
    plain, confident = (short(model, x, y, c=10.0, steps=80, kappa=kappa) for kappa in (0.0, 2.0))
    assert (margin(model(confident), y) >= 2 - 1e-9).all()
    assert (margin(model(plain), y) < 0.5).all()
    assert (l2(confident, x) > l2(plain, x)).all()


def test_the_search_multiplies_c_by_ten_and_then_bisects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module(carlini_wagner.__module__)
    nearest, tried = module._Search.nearest, []

    def watched(self: Any, rows: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x_c, distance = nearest(self, rows, c)
        tried.append((c.tolist(), distance.isfinite().tolist()))
        return x_c, distance

    monkeypatch.setattr(module._Search, "nearest", watched)
    model, x = two_classes(), images(6, low=0.4, high=0.6)
    carlini_wagner(model, x, predicted(model, x), c=1e-3, binary_search_steps=7, steps=60)
    lows = []
    for image in range(6):
        c, low, high = 1e-3, 0.0, float("inf")
        for tried_c, fooled in tried:
            assert tried_c[image] == pytest.approx(c)
            low, high = (low, c) if fooled[image] else (c, high)
            c = 10 * c if high == float("inf") else (low + high) / 2
        assert low < high < 1
        lows.append(low)
    assert max(lows) > 0


def test_the_nearest_of_all_searches_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later c that ends farther away, or fails, does not replace the better image."""
    model, x = net(), images(10)
    y = predicted(model, x)
    distances = [
        l2(carlini_wagner(model, x, y, c=0.1, binary_search_steps=n, steps=30), x)
        for n in (3, 4, 5)
    ]
    far = [torch.where(d > 0, d, torch.inf) for d in distances]
    assert (far[1] <= far[0]).all() and (far[2] <= far[1]).all() and (far[2] < far[0]).any()


def test_the_segment_to_the_image_only_shortens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), images(20)
    y = predicted(model, x)
    pulled = carlini_wagner(model, x, y, **FIXED)
    module = importlib.import_module(carlini_wagner.__module__)
    monkeypatch.setattr(module, "LOOKS_AT_SEGMENT", 1)
    iterate = carlini_wagner(model, x, y, **FIXED)
    fooled = predicted(model, iterate) != y
    assert torch.equal(predicted(model, pulled) != y, fooled) and fooled.sum() > 10
    tau = l2(pulled, x)[fooled] / l2(iterate, x)[fooled]
    assert (tau <= 1).all() and tau.mean() < 1
    nearer = x + 0.995 * (pulled - x)
    assert (predicted(model, nearer)[fooled] == y[fooled]).float().mean() > 0.9


def test_an_image_leaves_once_its_loss_stands_still() -> None:
    model, x, sizes = net(), images(20), []
    model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    carlini_wagner(model, x, predicted(model, x), c=1e-6, binary_search_steps=1, steps=500)
    assert len(sizes) < 400 and sum(sizes) < 0.8 * 500 * 20


def test_only_images_off_their_goal_are_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, sizes = net(), images(20), []
    gradient = Forward.gradient

    def counted(self: Forward, value: Tensor, x: Tensor, **options: Any) -> Tensor:
        sizes.append(len(x))
        return gradient(self, value, x, **options)

    monkeypatch.setattr(Forward, "gradient", counted)
    carlini_wagner(model, x, predicted(model, x), **FIXED)
    assert sizes[0] == 20 and sum(sizes) < 0.6 * 40 * 20


# The edges


def test_pixels_at_exactly_0_and_1_move() -> None:
    """Without a shrunk atanh, w is infinite there: torchattacks freezes MNIST's background."""
    model = two_classes()
    x = images(6).round()
    y = predicted(model, x)
    x_adv = carlini_wagner(model, x, y, **{**FIXED, "steps": 100, "learning_rate": 0.05})
    inwards = (model.layer.weight[1] - model.layer.weight[0]).view(1, 8, 8) * (0.5 - x) > 0
    wanted = torch.where(y.view(-1, 1, 1, 1) == 0, inwards, ~inwards)
    assert ((x_adv != x) & wanted).sum() > 0.9 * wanted.sum()
    assert (predicted(model, x_adv) != y).all()


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_the_sign_of_the_logits_does_not_matter(shift: float) -> None:
    """torchattacks masks by multiplication: all-negative logits give it margin 0."""
    model, x = net(), images(6)
    y = predicted(model, x)
    shifted = Written(lambda x: model(x) + shift)
    variants: list[dict[str, Any]] = [{}, {"target": "second"}]
    for options in variants:
        x_adv = carlini_wagner(shifted, x, y, **FIXED, **options)
        torch.testing.assert_close(x_adv, carlini_wagner(model, x, y, **FIXED, **options))


@every_variant
def test_a_gradient_of_zero_everywhere_gives_no_nan(attack: Callable[..., Tensor]) -> None:
    model = Written(lambda x: 0 * x.sum((1, 2, 3))[:, None] + torch.arange(3.0).flip(0))
    assert torch.equal(attack(model, images(4), labels(4)), images(4))


def test_a_tie_is_left() -> None:
    """f is 0 at a tie, and so is the gradient of max(f, 0): the way on is not there."""
    model = Written(lambda x: torch.stack([0 * x.sum((1, 2, 3)), x.sum((1, 2, 3)) - 8], dim=1))
    x = torch.full((2, 1, 4, 4), 0.5)
    assert (predicted(model, short(model, x, labels(2))) == 1).all()


@pytest.mark.parametrize("scale", [1e10, 1e18, 1e30, 1e36])
def test_huge_logits_are_attacked_and_the_model_is_not_blamed(scale: float) -> None:
    """Squared gradients of 1e60 made Adam's own NaN, which were then called the model's."""
    model, x = Linear(64, 5).float(), images(10).float()
    y = predicted(model, x)
    huge = Written(lambda x: scale * model(x))
    options: dict[str, Any] = {"binary_search_steps": 3, "steps": 100}
    found = carlini_wagner(huge, x, y, **options)
    assert (predicted(model, found) != y).all()
    near = (carlini_wagner(model, x, y, c=1.0, **options) - x).flatten(1).norm(dim=1)
    assert ((found - x).flatten(1).norm(dim=1) < 2 * near + 0.1).all()


@every_variant
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_is_left_as_it_was(attack: Callable[..., Tensor], fails: bool) -> None:
    model = net().train()
    model.body[1].eval()
    model.body[0].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    requires_grad = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())

    def watch(module: nn.Module, *_: object) -> None:
        assert not any(m.training for m in model.modules())
        if fails:
            raise RuntimeError("broken model")

    hook = model.register_forward_hook(watch)
    if fails:
        with pytest.raises(RuntimeError, match="broken model"):
            attack(model, images(3), labels(3))
    else:
        attack(model, images(3), labels(3))
    hook.remove()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[name]) for name, v in model.state_dict().items())


def test_nan_raises() -> None:
    model = Written(lambda x: torch.where(x.sum((1, 2, 3))[:, None] > 55, torch.nan, net()(x)))
    x = images(5)
    x[2] = 0.99
    with pytest.raises(ValueError, match="NaN logits for 1 of"):
        short(model, x, labels(5))
    linear = Linear(64, 5)
    dark = Written(lambda x: linear(x) + ((x > 0.2) * x).square().sum((1, 2, 3)).sqrt()[:, None])
    x[1] = 0
    with pytest.raises(ValueError, match="gradient is NaN for 1 of"):
        short(dark, x[:2], predicted(dark, x[:2]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "c": ({"c": 0.0}, "c is 0.0, expected a finite number > 0"),
    "c nan": ({"c": float("nan")}, "c is nan"),
    "rate": ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    "kappa": ({"kappa": -1.0}, "kappa is -1.0.*>= 0"),
    "steps": ({"steps": 0}, "steps is 0"),
    "search": ({"binary_search_steps": 0}, "binary_search_steps is 0"),
    "target": ({"target": "third"}, "'third'.*'second'"),
    "target y": ({"target": labels(2)}, "target equals"),
    "target K": ({"target": labels(2) + 5}, "5 classes"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options_get_an_error_that_helps(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short(net(), images(2), labels(2), **options)


def test_a_model_that_cannot_be_differentiated_says_so() -> None:
    model = net()
    with pytest.raises(ValueError, match="differentiable"):
        short(Written(lambda x: model(x.detach())), images(2), predicted(model, images(2)))


# Autocast: rounded descent, exact judgment


def test_under_autocast_what_is_returned_fools_exactly() -> None:
    model, x, dtypes = net(num_classes=10).float(), images(30).float(), set()
    y = predicted(model, x)
    exact = carlini_wagner(model, x, y, **FIXED)
    model.body[-1].register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = carlini_wagner(model, x, y, **FIXED)
    assert torch.bfloat16 in dtypes
    changed = (x_adv != x).flatten(1).any(dim=1)
    assert torch.equal(predicted(model, x_adv) != y, changed)
    assert changed.sum() >= (predicted(model, exact) != y).sum() - 1
    assert l2(x_adv, x).mean() < 1.05 * l2(exact, x).mean()


def test_a_descent_that_rounding_ended_is_repeated_exactly() -> None:
    """The model errs everywhere in low precision: no rounded iterate has a reason to move."""
    layer = nn.Linear(16, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0], [0.9]]).repeat(1, 16))

    def formula(x: Tensor) -> Tensor:
        lead = 5.0 * torch.is_autocast_enabled("cpu")
        return layer(x.flatten(1)) + torch.tensor([0.0, 1.2 + lead])

    model, x = Written(formula), torch.full((3, 1, 4, 4), 0.9)
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = short(model, x, labels(3))
    assert (predicted(model, x_adv) == 1).all()
    torch.testing.assert_close(x_adv, short(model, x, labels(3)))


# Beside the peers, at equal budgets

BUDGET: dict[str, Any] = {"c": 10.0, "binary_search_steps": 1, "steps": 60, "learning_rate": 0.01}


def foolbox_cw(model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=1, steps=BUDGET["steps"], stepsize=0.01, initial_const=10
    )
    goal = y if target is None else foolbox.criteria.TargetedMisclassification(target)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, goal, epsilons=None)[1]


def torchattacks_cw(model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    attack = pytest.importorskip("torchattacks").CW(model, c=10, steps=BUDGET["steps"], lr=0.01)
    if target is not None:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack(x, y if target is None else target)


def adv_lib_cw(model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    if "visdom" not in sys.modules:  # adv-lib imports it for plots; it does not build everywhere
        stub: Any = ModuleType("visdom")
        stub.Visdom = object
        sys.modules["visdom"] = stub
    return pytest.importorskip("adv_lib.attacks").carlini_wagner_l2(
        model,
        x,
        y if target is None else target,
        targeted=target is not None,
        learning_rate=0.01,
        initial_const=10.0,
        binary_search_steps=1,
        max_iterations=BUDGET["steps"],
    )


PEERS = {"foolbox": foolbox_cw, "torchattacks": torchattacks_cw, "adv-lib": adv_lib_cw}


@pytest.mark.peers
@pytest.mark.parametrize("second", [False, True], ids=["untargeted", "second"])
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS.keys())
def test_no_peer_fools_more_or_from_nearer(
    peer: Callable[..., Tensor], second: bool, victim: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """Mean L2 over the images that both fool, within the 95% noise of the paired difference."""
    model, x, y = victim[0], victim[1][:30], victim[2][:30]
    target = model(x).topk(2, dim=1).indices[:, 1] if second else None
    ours = carlini_wagner(model, x, y, **BUDGET, target="second" if second else None)
    theirs = peer(model, x, y, target)

    def fooled(x_adv: Tensor) -> Tensor:
        label = predicted(model, x_adv)
        return label != y if target is None else label == target

    assert fooled(ours).sum() >= fooled(theirs).sum() > 5
    both = fooled(ours) & fooled(theirs)
    difference = (l2(ours, x) - l2(theirs, x))[both].double()
    assert difference.mean() <= NORMAL_975 * difference.std() / len(difference) ** 0.5 + 1e-4


@pytest.mark.peers
def test_torchattacks_freezes_black_pixels_and_negative_logits_where_ours_does_not(
    victim: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, y = victim[0], victim[1][:30], victim[2][:30]
    ours, theirs = (
        attack(model, x, y)
        for attack in (partial(carlini_wagner, **BUDGET), partial(torchattacks_cw, target=None))
    )
    assert ((theirs - x)[x == 0].abs() > 1e-4).float().mean() < 0.01
    assert ((ours - x)[x == 0].abs() > 1e-4).float().mean() > 0.1
    negative = Written(lambda x: model(x) - 1000)
    assert (predicted(model, torchattacks_cw(negative, x, y, None)) == y).all()
    assert (predicted(model, carlini_wagner(negative, x, y, **BUDGET)) != y).float().mean() > 0.5


@pytest.mark.peers
def test_foolbox_returns_black_images_where_ours_returns_the_image() -> None:
    fortress = hard_to_fool(Linear(64, 3)).float().eval()
    x = images(3).float()
    assert torch.equal(carlini_wagner(fortress, x, labels(3), **BUDGET), x)
    assert (foolbox_cw(fortress, x, labels(3), None) == 0).all()
