"""JSMA against its algorithm written out, the pair search against all pairs, and the peers."""

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from defenses.attacks import saliency
from defenses.attacks.saliency import jsma, most_salient_pair
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

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"gamma": 0.3},
    "logits": {"gamma": 0.3, "output": "logits"},
    "one pixel": {"steps": 20, "pixels_per_step": 1, "theta": 0.4},
    "one pixel once": {"steps": 20, "pixels_per_step": 1, "theta": 0.4, "revisit": False},
    "lower": {"gamma": 0.3, "theta": -0.6, "output": "logits"},
    "lower once": {"gamma": 0.3, "theta": -0.6, "output": "logits", "revisit": False},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


# The pair search


def all_pairs(u: Tensor, v: Tensor) -> tuple[float, set[tuple[int, ...]]]:
    """Alg. 3 to the letter: the highest −α·β, and the pairs that have it."""
    highest, found = 0.0, set[tuple[int, ...]]()
    for p, q in combinations(range(len(u)), 2):
        alpha, beta = float(u[p] + u[q]), -float(v[p] + v[q])
        if alpha > 0 and beta < 0 and -alpha * beta >= highest:
            found = found if -alpha * beta == highest else set()
            highest = -alpha * beta
            found.add((p, q))
    return highest, found


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_pair_is_the_best_of_all_pairs(data: st.DataObject) -> None:
    """Also with ties, equal values, no positive sum, and pixels outside of the domain."""
    n, num_images = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 4))
    whole = data.draw(st.sampled_from([1, 3, 1000]))
    value = st.one_of(st.integers(-whole, whole).map(float), st.just(-torch.inf))
    draw = st.lists(
        st.lists(value, min_size=n, max_size=n), min_size=num_images, max_size=num_images
    )
    u, v = (torch.tensor(data.draw(draw), dtype=torch.float32) for _ in range(2))
    outside = u.isinf() | v.isinf()
    u, v = u.masked_fill(outside, -torch.inf), v.masked_fill(outside, -torch.inf)
    pairs, salient = most_salient_pair(u, v)
    for i in range(num_images):
        _, best = all_pairs(u[i], v[i])
        assert bool(salient[i]) == bool(best)
        if best:
            assert tuple(sorted(pairs[i].tolist())) in best
        alone, _ = most_salient_pair(u[i : i + 1], v[i : i + 1])
        assert not best or torch.equal(alone[0], pairs[i])


def test_few_pixels_are_needed_and_tiny_slopes_do_not_vanish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    u, v = (1e-30 * torch.randn(20, 3072, generator=draw) for _ in range(2))
    pairs, salient = most_salient_pair(u, v)
    assert salient.all()
    alpha, beta = (s.double()[:, :, None] + s.double()[:, None, :] for s in (u[:2], v[:2]))
    literal = torch.where((alpha > 0) & (beta > 0), alpha * beta, 0)
    literal.diagonal(dim1=1, dim2=2).zero_()
    p, q = pairs[:2].unbind(dim=1)
    assert torch.equal(literal[[0, 1], p, q], literal.flatten(1).amax(dim=1))
    monkeypatch.setattr(saliency, "PAIRS", 1)  # an image at a time
    assert torch.equal(most_salient_pair(u, v)[0], pairs)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made inside."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.size = max(self.size, made.numel() * made.element_size())
        return made


def test_the_memory_of_the_search_is_bounded_in_the_worst_case() -> None:
    """Where u falls as v rises every pixel is needed: one table of one image's pairs at a time."""
    u = torch.linspace(2, 1, 3072).expand(3, -1)
    with Largest() as largest:
        pairs, salient = most_salient_pair(u, 3 - u)
    assert largest.size == 3072**2 * 8  # 75 MB, of which a few are alive at once
    assert salient.all() and (pairs == pairs[0]).all()


def test_the_pairs_of_a_photograph_are_compared_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that needs more than `PAIRS_OF_ONE` gets the same pair, a strip at a time."""
    u = torch.linspace(2, 1, 3072).expand(3, -1)
    draw = torch.Generator().manual_seed(0)
    random = [torch.randn(20, 500, generator=draw) for _ in range(2)]
    expected = [most_salient_pair(u, 3 - u), most_salient_pair(*random)]
    for bound in (2**16, 1):
        monkeypatch.setattr(saliency, "PAIRS_OF_ONE", bound)
        found = [most_salient_pair(u, 3 - u) if bound > 1 else expected[0]]
        found.append(most_salient_pair(*random))
        for (pairs, salient), (pairs_0, salient_0) in zip(found, expected, strict=True):
            assert torch.equal(pairs, pairs_0) and torch.equal(salient, salient_0)
    monkeypatch.setattr(saliency, "PAIRS_OF_ONE", 2**16)
    with Largest() as largest:
        most_salient_pair(u, 3 - u)
    assert largest.size <= max(2**16 * 8, 2 * u.numel() * 8)


# The attack


def papernot(
    model: nn.Module,
    x: Tensor,
    t: int,
    away_from: int | None = None,
    *,
    theta: float = 1.0,
    gamma: float = 0.1,
    steps: int | None = None,
    pixels_per_step: int = 2,
    output: str = "softmax",
    revisit: bool = True,
) -> tuple[Tensor, int] | None:
    """Alg. 2 for one image, with the whole Jacobian and every pixel or pair: where, and the step.

    Done at its target or, where a label is given, anywhere away from it; None if it fails.
    """

    def f(x: Tensor) -> Tensor:
        logits = model(x[None])[0]
        return logits.softmax(dim=0) if output == "softmax" else logits

    n, x = x.numel(), x.clone()
    used = torch.zeros(n, dtype=torch.bool)
    for step in range(1 + (steps or int(gamma * n / pixels_per_step))):
        label = int(f(x).argmax())
        if label == t if away_from is None else label != away_from:
            return x, step
        jacobian = torch.autograd.functional.jacobian(f, x).flatten(1)
        room = 1 - x.flatten() if theta > 0 else x.flatten()
        domain = [i for i in range(n) if room[i] >= 0.01 * abs(theta) and not used[i]]
        sign = 1 if theta > 0 else -1
        highest, chosen = 0.0, []
        for pixels in combinations(domain, pixels_per_step):
            alpha = sign * float(jacobian[t, pixels].sum())
            beta = sign * float(jacobian[:, pixels].sum()) - alpha
            if alpha > 0 and beta < 0 and -alpha * beta > highest:
                highest, chosen = -alpha * beta, list(pixels)
        if not chosen:
            return None
        x.view(-1)[chosen] = (x.view(-1)[chosen] + theta).clamp(0, 1)
        used[chosen] = not revisit
    return None


def small(seed: int = 0) -> nn.Module:
    """A smooth network of 12 pixels and 3 classes."""
    draw = torch.Generator().manual_seed(seed)
    w, r = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((12, 9), (9, 3)))
    return Written(lambda x: 3 * torch.tanh(x.flatten(1) @ w) @ r)


@every_kind
def test_it_is_algorithm_2_with_the_whole_jacobian(options: dict[str, Any]) -> None:
    model, x = small(), images(12, channels=3, size=2)
    x[0, 0], x[1, 1] = 0.0, 1.0
    y = predicted(model, x)
    x_adv = jsma(model, x, y, target="next", **options)
    untargeted = jsma(model, x, y, **options)
    for i in range(12):
        label = int(y[i])
        alone = papernot(model, x[i], (label + 1) % 3, **options)
        torch.testing.assert_close(x_adv[i], x[i] if alone is None else alone[0])
        both = [papernot(model, x[i], (label + k) % 3, label, **options) for k in (1, 2)]
        best = min(
            (way for way in both if way is not None),
            key=lambda way: (way[1], float((way[0] - x[i]).norm())),
            default=(x[i], 0),
        )
        torch.testing.assert_close(untargeted[i], best[0])
    for found in (x_adv, untargeted):
        assert (found != x).flatten(1).any(dim=1).sum() >= 3


def test_without_a_target_the_fewest_steps_win_and_then_the_smallest_l2() -> None:
    """Class 1 takes one pair and so does class 2, whose pixels have less room; class 3 two."""

    def formula(x: Tensor) -> Tensor:
        a, b, c, d = x[:, 0, 0].unbind(dim=1)
        e = x[:, 0, 1, :].sum(dim=1)
        return torch.stack([1.5 + 0 * a, a + b + 0 * c, c + d + 0.3, e - 0.5], dim=1)

    x = torch.zeros(2, 1, 2, 4, dtype=torch.float64)
    x[0, 0, 0, 2:] = 0.5  # class 2 is nearer
    x[1, 0, 0, :2] = 0.5  # class 1 is nearer
    x_adv = jsma(Written(formula), x, labels(2), gamma=1)
    assert predicted(Written(formula), x_adv).tolist() == [2, 1]
    assert ((x_adv != x).flatten(1).sum(dim=1) == 2).all()
    only = jsma(Written(formula), x, labels(2), gamma=1, target=labels(2) + 3)
    assert ((only != x).flatten(1).sum(dim=1) == 4).all()


def test_the_softmax_map_survives_a_softmax_that_rounds_to_zero() -> None:
    """Distillation hid from JSMA in probabilities of exactly 0: log F_t has the same order."""
    model, x = Linear(64, 5, scale=0.3), images(20)
    steep = Written(lambda x: 1e4 * model(x))
    y = predicted(model, x)
    assert (steep(x).float().softmax(dim=1) == 0).any()
    assert (predicted(steep, jsma(steep, x, y, gamma=0.5)) != y).all()


@every_kind
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_returned(options: dict[str, Any], device: str) -> None:
    model, x = net(3).float().to(device), images(30, channels=3).float()
    x[:, :, :2], x[:, :, 2:4] = 0, 1
    x = x.to(device)
    y, before = predicted(model, x), x.clone()
    x_adv = jsma(model, x, y, **options)
    fooled, changed = predicted(model, x_adv) != y, (x_adv != x).flatten(1).sum(dim=1)
    assert x_adv.dtype == x.dtype and x_adv.device == x.device and not x_adv.requires_grad
    assert torch.equal(x, before) and x_adv.min() >= 0 and x_adv.max() <= 1
    assert fooled.any()
    assert torch.equal(changed > 0, fooled)  # failures come back unchanged
    assert changed.max() <= options.get("gamma", 1) * 192
    assert changed.max() <= 2 * options.get("steps", 1000)
    up = options.get("theta", 1) > 0
    assert ((x_adv >= x) if up else (x_adv <= x)).all()
    wrong = torch.where(torch.arange(30, device=device) % 2 == 0, (y + 1) % 5, y)
    mixed = jsma(model, x, wrong, **options)
    assert torch.equal(mixed[::2], x[::2])
    torch.testing.assert_close(mixed[1::2], x_adv[1::2])


@every_kind
@settings(max_examples=5, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3), chunk=st.sampled_from([1, 7, 99]))
def test_an_image_does_not_depend_on_its_batch(
    options: dict[str, Any], sizes: list[int], chunk: int
) -> None:
    model, x = net(), images(sum(sizes))
    y = predicted(model, x)
    whole = jsma(model, x, y, **options)
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    split = [jsma(model, *part, chunk=chunk, **options) for part in parts]
    torch.testing.assert_close(torch.cat(split), whole, rtol=0, atol=1e-5)


def test_a_chunk_bounds_what_passes_through_the_model_and_the_finished_leave() -> None:
    model, x, sizes = net(), images(40), []
    y = predicted(model, x)
    model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    jsma(model, x, y, chunk=12)
    assert max(sizes) == 12
    sizes.clear()
    jsma(model, x, y, target="next", gamma=0.5, chunk=40)
    assert sizes[0] == 40 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 20


@pytest.mark.parametrize("num_classes", [2, 10, 100])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
@pytest.mark.parametrize("options", [{}, {"target": "next"}, {"output": "logits"}], ids=str)
def test_no_more_than_a_chunk_passes_at_once_and_it_changes_nothing(
    options: dict[str, Any], chunk: int, num_classes: int
) -> None:
    model, x, sizes = Linear(64, num_classes, scale=0.2), images(6), []
    y = predicted(model, x)
    whole = jsma(model, x, y, gamma=0.3, chunk=10_000, **options)
    hook = model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    found = jsma(model, x, y, gamma=0.3, chunk=chunk, **options)
    hook.remove()
    assert max(sizes) <= chunk
    assert torch.equal(found, whole)
    assert "target" in options or (predicted(model, found) != y).any()


def test_in_parts_the_fewest_steps_win_and_then_the_smallest_l2() -> None:
    """Also where the best target is in the last part, and where the first part fools at all."""
    model, x = Linear(64, 40, scale=0.2), images(12)
    y = predicted(model, x)
    whole = jsma(model, x, y, gamma=0.5, theta=0.1)
    for chunk in (1, 5, 38):
        assert torch.equal(jsma(model, x, y, gamma=0.5, theta=0.1, chunk=chunk), whole)
    steps = ((whole - x).abs() > 1e-6).flatten(1).sum(dim=1)
    assert len(steps.unique()) > 2  # they do not all take as many


@pytest.mark.parametrize("num_classes", [2, 3, 1000])
def test_any_number_of_classes(num_classes: int) -> None:
    model, x = Linear(64, num_classes, scale=0.2).float(), images(3).float()
    y = predicted(model, x)
    assert (predicted(model, jsma(model, x, y, gamma=1)) != y).any()
    nxt = jsma(model, x, y, gamma=1, target="next")
    given_ = jsma(model, x, y, gamma=1, target=(y + 1) % num_classes)
    assert torch.equal(nxt, given_)


@every_kind
def test_the_edges(options: dict[str, Any]) -> None:
    """No image, a flat model, a fortress, logits far below zero, another memory format."""
    model, x = net(), images(10)
    y = predicted(model, x)
    x_adv = jsma(model, x, y, **options)
    assert jsma(model, x[:0], y[:0], **options).shape == (0, 1, 8, 8)
    flat = Written(lambda x: 0 * x.sum((1, 2, 3))[:, None] + torch.tensor([1.0, 0.0]).double())
    assert torch.equal(jsma(flat, x, labels(10), **options), x)
    assert torch.equal(jsma(hard_to_fool(Linear(64, 5)), x, labels(10), **options), x)
    below = Written(lambda x: model(x) - 1000)
    torch.testing.assert_close(jsma(below, x, y, **options), x_adv)
    with torch.inference_mode():
        again = jsma(model, x.clone().to(memory_format=torch.channels_last), y.clone(), **options)
    assert torch.equal(again, x_adv)


def test_the_model_is_left_as_it_was() -> None:
    model, x = net().train(), images(6)
    model.body[0].weight.requires_grad_(False)
    state, requires_grad = (
        copy.deepcopy(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
    )
    jsma(model, x, predicted(model, x))
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("output", ["softmax", "logits"])
def test_under_autocast_what_counts_as_fooled_fools_in_full_precision(output: str) -> None:
    model, x, dtypes = net(num_classes=10).float(), images(40).float(), set()
    y = predicted(model, x)
    exactly = jsma(model, x, y, output=output)
    model.body[-1].register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = jsma(model, x, y, output=output)
    assert torch.bfloat16 in dtypes
    changed = (x_adv != x).flatten(1).any(dim=1)
    assert torch.equal(predicted(model, x_adv) != y, changed)
    assert changed.sum() >= 0.9 * (exactly != x).flatten(1).any(dim=1).sum()


def test_under_autocast_the_last_step_is_judged_in_full_precision() -> None:
    """The rounded passes never see that two raised pixels suffice."""

    def formula(x: Tensor) -> Tensor:
        hidden = 9.0 * torch.is_autocast_enabled("cpu")
        return torch.stack([1.5 + hidden + 0 * x[:, 0, 0, 0], x.sum((1, 2, 3))], dim=1)

    x = torch.zeros(3, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = jsma(Written(formula), x, labels(3), steps=1)
    assert (predicted(Written(formula), x_adv) == 1).all()


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "theta": ({"theta": 0}, "theta is 0.*> 0 to raise"),
    "nan theta": ({"theta": torch.nan}, "theta is nan"),
    "gamma": ({"gamma": 1.1}, r"gamma is 1\.1"),
    "no step": ({"gamma": 0.02}, r"gamma is 0\.02.*2 of the 64 pixels"),
    "pixels": ({"pixels_per_step": 3}, "pixels_per_step is 3, expected 1 or 2"),
    "steps": ({"steps": 0}, "steps is 0"),
    "output": ({"output": "logit"}, "'logit'.*'logits'"),
    "target": ({"target": "best"}, "'best'.*'next'"),
    "target y": ({"target": torch.zeros(2, dtype=torch.int64)}, "another class"),
    "target K": ({"target": torch.full((2,), 5)}, "5 classes"),
    "chunk": ({"chunk": 0}, "chunk is 0"),
}


@pytest.mark.parametrize(("options", "message"), CALLS.values(), ids=CALLS.keys())
def test_bad_options_get_an_error_that_helps(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jsma(net(), images(2), labels(2), **options)


def test_a_pair_needs_two_pixels() -> None:
    with pytest.raises(ValueError, match="more than the 1 of an image"):
        jsma(Linear(1, 2), images(2, size=1), labels(2), steps=1)


# The peers, on a small network trained on the digits


@pytest.fixture
def digits(victim: Any) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = victim
    return model, x[:60], y[:60]


def pixels_changed(x_adv: Tensor, x: Tensor) -> Tensor:
    return ((x_adv - x).abs() > 1e-6).flatten(1).sum(dim=1).float()


@pytest.mark.peers
def test_torchattacks_finds_the_same_images_one_by_one(digits: Any) -> None:
    """The same map, pixels and order; theirs takes ⌈Υn/2⌉ pairs, and keeps its failures."""
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = (digits[0], *(s[:8] for s in digits[1:]))
    theirs = torchattacks.JSMA(model, theta=1.0, gamma=0.06)(x.clone(), y)
    ours = jsma(model, x, y, target="next", steps=24, output="logits")
    reached, theirs_reached = (predicted(model, s) == (y + 1) % 10 for s in (ours, theirs))
    assert torch.equal(reached, theirs_reached) and 0 < reached.sum() < 8
    assert torch.equal(ours[reached], theirs[reached])


@pytest.mark.peers
def test_it_reaches_no_fewer_targets_than_art_with_no_more_pixels(digits: Any) -> None:
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    model, x, y = digits
    t, gamma = (y + 1) % 10, 0.06
    classifier = estimators.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = evasion.SaliencyMapMethod(
        classifier, theta=1.0, gamma=gamma, batch_size=len(x), verbose=False
    )
    theirs = torch.from_numpy(attack.generate(x.numpy(), nn.functional.one_hot(t, 10).numpy()))
    ours = jsma(model, x, y, target="next", gamma=gamma)
    reached, theirs_reached = (predicted(model, s) == t for s in (ours, theirs))
    assert theirs_reached.sum() >= 10
    assert reached.sum() >= theirs_reached.sum()
    both = reached & theirs_reached
    assert pixels_changed(ours, x)[both].mean() <= pixels_changed(theirs, x)[both].mean()
