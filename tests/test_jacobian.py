"""Penalties on the Jacobian against loops, finite differences and closed forms.

A network of known layers is linearized by hand: whatever is asked of it is asked of the same
network behind a wrapper too, which autograd differentiates.
"""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad

from defenses.adversarial import adversarial, mixed_batch
from defenses.attacks import deepfool, fgsm
from defenses.boundary import measure
from defenses.compact import CompactConv2d, CompactLinear
from defenses.data import crop_and_flip, load_data
from defenses.jacobian import input_gradient_penalty, jacobian_penalty, squared_norm
from defenses.models import Center, cifar_four_sets, mnist_tutorial, with_fixed_head
from defenses.piecewise import linearize
from defenses.training import Loss, cross_entropy, fit, label_smoothing
from tests.test_attacks import DEVICES, Net, Written, predicted
from tests.test_training import assert_same_weights, digits, interrupt, stop_after

FORMS = ["root sum", "root mean", "mean square"]
every_form = pytest.mark.parametrize("form", FORMS)
every_path = pytest.mark.parametrize("wrap", [lambda m: m, Written], ids=["linearized", "autograd"])
every_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=str
)
Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Draw float64 images (n, C, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=generator, dtype=torch.float64)


def jacobian(model: nn.Module, x: Tensor, create_graph: bool = False) -> Tensor:
    """Eq. 4, (N, K, C, H, W), by a loop over the images and the classes."""
    x = x.detach().requires_grad_()
    z = model(x)
    return torch.stack(
        [
            torch.stack(
                [grad(z_k, x, create_graph=create_graph, retain_graph=True)[0][i] for z_k in z_i]
            )
            for i, z_i in enumerate(z)
        ]
    )


def all_rows(z: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
    """J in the order of `jacobian`, out of what `linearize` returns."""
    u = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return pull(u[:, None].expand(-1, len(z), -1)).transpose(0, 1)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters()]


def nothing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loss of 0, which leaves the penalty alone."""
    return 0 * model(x).sum()


def precise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in the precision of the logits: finite differences of float32 are noise."""
    return F.cross_entropy(model(x), y)


def small(num_classes: int = 3, wide: int = 6) -> nn.Sequential:
    """A network of every known kind of layer with 90 weights, (N, 1, 9, 8) to (N, K)."""
    model = nn.Sequential(
        Center(),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 1, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, wide),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(wide, num_classes),
    ).double()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.6)
    return model


def smooth() -> nn.Sequential:
    """A network without kinks that is not linearized, (N, 1, 9, 8) to (N, 3)."""
    layers = nn.Conv2d(1, 2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


# Eq. 4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x).relu()


class Doubled(nn.Sequential):
    """A sequence that is more than its layers in sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def ending(*layers: nn.Module, inputs: int, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))


conv, relu, pool = nn.Conv2d, nn.ReLU, nn.MaxPool2d
KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mnist_tutorial": (mnist_tutorial, (1, 28, 28)),
    "cifar_four_sets": (lambda: cifar_four_sets(widths=(4, 5, 6, 7)), (3, 32, 32)),
    "linear": (lambda: ending(inputs=30), (1, 5, 6)),
    "a vector": (lambda: nn.Sequential(nn.Linear(7, 5), relu(), nn.Linear(5, 3)), (7,)),
    "two classes": (lambda: ending(inputs=30, classes=2), (1, 5, 6)),
    "padding": (lambda: ending(conv(2, 3, 3, padding=2), relu(), inputs=189), (2, 5, 7)),
    "stride": (lambda: ending(conv(2, 3, 3, stride=2), relu(), inputs=27), (2, 8, 8)),
    "stride beyond the kernel": (lambda: ending(conv(2, 3, 2, stride=3), inputs=27), (2, 9, 10)),
    "dilation": (lambda: ending(conv(2, 3, 3, dilation=2), relu(), inputs=60), (2, 8, 9)),
    "groups": (lambda: ending(conv(4, 6, 3, groups=2), relu(), inputs=54), (4, 5, 5)),
    "all of these": (
        lambda: ending(
            conv(4, 6, (3, 2), (2, 3), (1, 2), (1, 2), groups=2, bias=False), relu(), inputs=150
        ),
        (4, 9, 12),
    ),
    "a pool that leaves a rest": (lambda: ending(pool(2), pool(3), inputs=16), (1, 27, 29)),
    "pools that are no squares": (lambda: ending(pool((3, 2)), relu(), inputs=15), (1, 9, 11)),
    "ReLU, then pool": (lambda: ending(conv(1, 2, 3), relu(), pool(2), inputs=18), (1, 9, 9)),
    "pool, then ReLU": (lambda: ending(conv(1, 2, 3), pool(2), relu(), inputs=18), (1, 9, 9)),
    "ReLU twice, pool twice": (
        lambda: ending(conv(1, 2, 3), relu(), relu(), pool(2), pool(2), inputs=8), (1, 11, 11)
    ),
    "flattened in part": (
        lambda: ending(nn.Flatten(2), nn.Linear(30, 5), relu(), inputs=10), (2, 5, 6)
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(Center(), nn.Sequential(conv(1, 2, 3), relu()), pool(2)),
            nn.Sequential(),
            nn.Identity(),
            ending(relu(), inputs=18),
        ),
        (1, 8, 8),
    ),
}  # fmt: skip
OTHER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm": (lambda: ending(conv(1, 2, 3), nn.BatchNorm2d(2), relu(), inputs=72), (1, 8, 8)),
    "Tanh": (lambda: ending(conv(1, 2, 3), nn.Tanh(), inputs=72), (1, 8, 8)),
    "residual": (lambda: ending(Residual(), inputs=32), (2, 4, 4)),
    "a sequence of its own": (lambda: Doubled(nn.Flatten(), nn.Linear(16, 3)), (1, 4, 4)),
    "compact": (
        lambda: nn.Sequential(
            CompactConv2d(1, 2, 3, alpha=4.0), relu(), nn.Flatten(), CompactLinear(8, 3, alpha=4.0)
        ),
        (1, 4, 4),
    ),
    "padded by reflection": (
        lambda: ending(conv(1, 2, 3, padding=1, padding_mode="reflect"), inputs=32), (1, 4, 4)
    ),
    "padded to its size": (lambda: ending(conv(1, 1, 3, padding="same"), inputs=9), (1, 3, 3)),
    "overlapping pools": (lambda: ending(pool(3, stride=2), inputs=9), (1, 7, 7)),
    "padded pools": (lambda: ending(pool(2, padding=1), inputs=9), (1, 4, 5)),
    "pools of distant pixels": (lambda: ending(pool(2, dilation=2), inputs=9), (1, 8, 8)),
    "rounded up": (lambda: ending(pool(2, ceil_mode=True), inputs=9), (1, 5, 5)),
}  # fmt: skip
ALL = KNOWN | OTHER


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_the_rows_are_those_of_a_loop_over_the_classes(name: str, device: str) -> None:
    make, shape = ALL[name]
    model, x = make().double().eval().to(device), images(3, *shape).to(device)
    z, pull = linearize(model, x)
    torch.testing.assert_close(z, model(x))
    expected = jacobian(model, x)
    torch.testing.assert_close(all_rows(z, pull), expected)
    u = images(2, *z.shape, seed=1).to(device)  # any cotangents, each image its own
    torch.testing.assert_close(pull(u), torch.einsum("mnk,nk...->mn...", u, expected))
    assert expected.abs().sum() > 0


def test_the_rows_are_those_of_jacrev() -> None:
    model, x = small().eval(), images(3, 1, 9, 8)

    def one(image: Tensor) -> Tensor:
        return model(image[None])[0]

    by_image = torch.func.vmap(torch.func.jacrev(one))(x)
    torch.testing.assert_close(all_rows(*linearize(model, x)), by_image)


@pytest.mark.parametrize("name", ALL)
def test_the_known_layers_and_no_others_go_without_autograd(name: str) -> None:
    make, shape = ALL[name]
    model = make().double().eval().requires_grad_(False)
    z, _ = linearize(model, images(2, *shape))
    assert z.requires_grad == (name in OTHER)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, int, int]]:
    """Known layers in any order, and the shape of their images."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    shape = tuple(draw(st.tuples(st.integers(1, 2), st.integers(5, 11), st.integers(5, 11))))
    layers: list[nn.Module] = []
    channels, *size = shape
    for kind in draw(st.lists(st.sampled_from("cccrrpppdi"), max_size=7)):
        if kind == "c":
            kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
            padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
            groups = draw(st.sampled_from([1, channels]))
            outputs = groups * draw(st.integers(1, 3))
            span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
            after = [
                (s + 2 * p - b) // t + 1
                for s, p, b, t in zip(size, padding, span, stride, strict=True)
            ]
            if min(after) < 1 or outputs > 9:
                continue
            options: dict[str, Any] = {"dilation": dilation, "groups": groups}
            options |= {"bias": draw(st.booleans())}
            layers.append(nn.Conv2d(channels, outputs, kernel, stride, padding, **options))
            channels, size = outputs, after
        elif kind == "p":
            kernel = draw(pair)
            if all(k <= s for k, s in zip(kernel, size, strict=True)):
                layers.append(nn.MaxPool2d(kernel))
                size = [s // k for s, k in zip(size, kernel, strict=True)]
        else:
            layers.append({"r": nn.ReLU(), "d": nn.Dropout(0.3), "i": Center()}[kind])
    width = draw(st.integers(1, 4))
    head = [nn.Flatten(), nn.Linear(channels * math.prod(size), width), nn.ReLU()]
    model = nn.Sequential(*layers, *head, nn.Linear(width, draw(st.integers(1, 4)))).double()
    return model.train(draw(st.booleans())), shape  # type: ignore[return-value]


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 99), st.data())
def test_any_sequence_of_known_layers_is_linearized_right(seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    model, shape = data.draw(sequences())
    x = images(2, *shape, seed=seed)
    x[1] = data.draw(st.sampled_from([0.0, 0.5, 1.0]))  # ties and kinks: the same choice is made
    torch.manual_seed(seed)
    z, pull = linearize(model, x)
    torch.manual_seed(seed)
    torch.testing.assert_close(z, model(x))
    torch.manual_seed(seed)
    torch.testing.assert_close(all_rows(z, pull), jacobian(model, x))


@every_path
def test_under_dropout_it_is_the_jacobian_of_the_thinned_network(wrap: Wrap) -> None:
    model, x = wrap(small(wide=40)).train(), images(4, 1, 9, 8)
    torch.manual_seed(7)
    z, pull = linearize(model, x)
    J = all_rows(z, pull)
    torch.manual_seed(7)
    torch.testing.assert_close(model(x), z)
    torch.manual_seed(7)
    torch.testing.assert_close(jacobian(model, x), J)
    assert not torch.equal(J, all_rows(*linearize(model, x)))  # other units, another network
    torch.testing.assert_close(all_rows(z, pull), J)  # the same units, however often it is asked


# The gradient of the penalty


def literally(model: nn.Module, x: Tensor, y: Tensor, how: dict[str, Any]) -> Tensor:
    """The docstring's three forms, written out by `jacobian`."""
    body = model[:-1] if how.get("layer") == "features" else model  # type: ignore[index]
    N = min(how.get("images") or len(x), len(x))
    squares = [J_i.square().sum() for J_i in jacobian(body, x[:N], create_graph=True)]
    total = torch.stack(squares).sum()
    penalty = {
        "root sum": total.sqrt() / N,
        "root mean": (total / N).sqrt(),
        "mean square": total / (2 * N),
    }
    return precise(model, x, y) + how["weight"] * penalty[how.get("form", "root mean")]


def differences(
    value: Callable[[], Tensor], weights: list[Tensor], h: float = 1e-6
) -> list[Tensor]:
    """Central differences of a scalar with respect to every number in `weights`."""
    slopes = []
    with torch.no_grad():
        for weight in weights:
            slope, flat = torch.zeros_like(weight), weight.view(-1)
            for i, start in enumerate(flat.tolist()):
                flat[i] = start + h
                above = value()
                flat[i] = start - h
                slope.view(-1)[i] = (above - value()) / (2 * h)
                flat[i] = start
            slopes.append(slope)
    return slopes


CASES: list[dict[str, Any]] = [
    *({"form": form} for form in FORMS),
    *({"form": form, "images": 1} for form in FORMS),
    {"images": 3},
    {"images": 9},  # more than there are
    *({"form": form, "layer": "features"} for form in FORMS),
    {"layer": "features", "images": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@every_path
def test_values_and_gradients_are_those_of_the_equation_written_out(
    wrap: Wrap, case: dict[str, Any]
) -> None:
    model, x, y = small().eval(), images(5, 1, 9, 8), torch.tensor([0, 1, 2, 0, 1])
    model = nn.Sequential(wrap(model[:-1]), model[-1])
    weights, case = weights_of(model), case | {"weight": 0.7}
    ours, theirs = jacobian_penalty(**case, loss=precise)(model, x, y), literally(model, x, y, case)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad(ours, weights), grad(theirs, weights))
    assert ours > precise(model, x, y)


@every_form
@pytest.mark.parametrize(
    "options", [{"images": 2}, {"layer": "features"}, {"projections": 2}], ids=str
)
@pytest.mark.parametrize("make", [small, smooth], ids=["linearized", "autograd"])
def test_gradients_are_those_of_finite_differences(
    make: Callable[[], nn.Sequential], form: str, options: dict[str, Any]
) -> None:
    model, x, y = make().eval(), images(3, 1, 9, 8), torch.tensor([0, 1, 2])
    loss, weights = jacobian_penalty(0.7, form=form, loss=precise, **options), weights_of(model)

    def value() -> Tensor:
        torch.manual_seed(3)  # the same projections each time
        return loss(model, x, y)

    expected = differences(value, weights)
    torch.testing.assert_close(list(grad(value(), weights)), expected, rtol=1e-5, atol=1e-7)


@every_path
def test_a_linear_model_has_the_closed_forms(wrap: Wrap) -> None:
    """J = W at every image."""
    model, x, y = wrap(ending(inputs=20).double()), images(9, 1, 4, 5), torch.arange(9) % 4
    W, *_ = model.parameters()
    norm, λ = W.detach().norm(), 0.3
    closed = {
        "root sum": (λ * norm / 3, λ * W / (3 * norm)),  # √N = 3
        "root mean": (λ * norm, λ * W / norm),
        "mean square": (λ * norm**2 / 2, λ * W),
    }
    for form, (value, slope) in closed.items():
        penalty = jacobian_penalty(λ, form=form, loss=nothing)(model, x, y)
        torch.testing.assert_close(penalty, value)
        torch.testing.assert_close(grad(penalty, W)[0], slope)


def test_the_defaults_are_the_papers() -> None:
    model, (x, y) = small(10).eval(), (images(4, 1, 9, 8), torch.arange(4))
    expected = literally(model, x, y, {"weight": 0.1, "form": "root mean"})
    torch.testing.assert_close(jacobian_penalty()(model, x, y).float(), expected.float())


def test_the_loss_gets_the_logits_at_hand() -> None:
    """One pass serves both terms, also where the penalty looks at some of the images only."""
    model, x, y = small(), images(5, 1, 9, 8), torch.tensor([0, 1, 2, 0, 1])
    passes: list[int] = []
    model[1].register_forward_hook(lambda _, given, __: passes.append(len(given[0])))
    for options, expected in (({}, [5]), ({"images": 2}, [2, 3])):
        passes.clear()
        loss = jacobian_penalty(0.0, loss=label_smoothing(0.1), **options)  # type: ignore[arg-type]
        torch.manual_seed(1)
        value = loss(model.eval(), x, y)
        assert passes == expected
        torch.testing.assert_close(value, label_smoothing(0.1)(model, x, y))


# Projections


def closed_variance(J: Tensor, n: int) -> Tensor:
    r"""2K(K−n) / (n(K−1)(K+2)) · (tr G² − (tr G)²/K) with G = JJᵀ.

    The estimate is K/n·tr(PG), P the projection on a random subspace of n dimensions. Only the
    traceless part of G varies, and the diagonal of P sums to n, so that its entries covary by
    −Var(P₁₁)/(K−1): Var tr(PG) = K/(K−1)·Var(P₁₁)·(tr G² − (tr G)²/K). And P₁₁ is of the Beta
    distribution of n/2 and (K−n)/2: its variance is 2n(K−n) / (K²(K+2)).
    """
    G, K = J @ J.T, len(J)
    spread = G.square().sum() - G.trace() ** 2 / K
    return 2 * K * (K - n) / (n * (K - 1) * (K + 2)) * spread


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_projections_have_the_mean_and_the_variance_of_the_closed_forms(
    n: int, device: str
) -> None:
    model, draws = ending(inputs=12, classes=5).double().to(device), 20_000
    x, J = images(1, 1, 3, 4).to(device).expand(draws, -1, -1, -1), weights_of(model)[0].detach()
    generator = torch.Generator(device).manual_seed(0)
    found = squared_norm(*linearize(model, x), n, generator).detach()
    exact, variance = J.square().sum(), closed_variance(J, n)
    assert (found.mean() - exact).abs() <= 4 * (variance / draws).sqrt()
    squares = (found - exact).square()
    assert (squares.mean() - variance).abs() <= 4 * squares.std() / math.sqrt(draws)


def test_as_many_projections_as_classes_are_exact() -> None:
    model, x = small(7).eval(), images(6, 1, 9, 8)
    exact = jacobian(model, x).flatten(1).square().sum(dim=1)
    z, pull = linearize(model, x)
    torch.testing.assert_close(squared_norm(z, pull), exact)
    torch.testing.assert_close(squared_norm(z, pull, 7), exact, rtol=1e-6, atol=0.0)
    assert closed_variance(jacobian(model, x)[0].flatten(1), 7) == 0


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_vectors_are_orthonormal_and_each_image_has_its_own(n: int) -> None:
    seen: list[Tensor] = []

    def pull(u: Tensor) -> Tensor:
        seen.append(u)
        return u

    z = torch.zeros(50, 5, dtype=torch.float64)
    norm = squared_norm(z, pull, n)
    v = seen[0].transpose(0, 1)
    identity = torch.eye(n, dtype=z.dtype).expand(50, n, n)
    torch.testing.assert_close(v @ v.mT, identity, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(norm, torch.full_like(norm, 5), rtol=1e-6, atol=0.0)
    assert len(v.flatten(1).unique(dim=0)) == 50


def test_a_seed_repeats_the_projections() -> None:
    model, x, y = small().eval(), images(4, 1, 9, 8), torch.tensor([0, 1, 2, 0])
    z, pull = linearize(model, x)
    ours = [squared_norm(z, pull, 1, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], ours[2])
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(jacobian_penalty(projections=2)(model, x, y))
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("n", [-1, 0, 4])
def test_a_number_of_projections_that_is_none_is_refused(n: int) -> None:
    model, x, y = small(), images(2, 1, 9, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=rf"projections is {n}, expected 1 to K = 3, or None"):
        squared_norm(*linearize(model, x), n)
    with pytest.raises(ValueError, match=rf"projections is {n}, expected 1 to K = 3, or None"):
        jacobian_penalty(projections=n)(model, x, y)


# bfloat16, channels_last, compile


def rounded_by(loss: Loss, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The value and its gradients under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, x, y)
    return value, list(grad(value, weights_of(model), allow_unused=True))


def error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a gradient, those that are 0 left out."""
    pairs = zip(ours, exact, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b is not None and b.any())


def steady(layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """A network nowhere near a kink: rounding moves numbers, it flips no unit."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    for name in ("0.bias", "2.bias", "5.bias"):
        bias = model.get_parameter(name)
        bias.detach().copy_(9 * (torch.arange(len(bias)) % 3).sign() - 3)  # −3, 6, 6
    return model.to(memory_format=layout)  # type: ignore[call-overload]


@every_form
@every_path
@every_layout
def test_bfloat16_stays_close_to_float32(
    wrap: Wrap, form: str, layout: torch.memory_format
) -> None:
    model, y = wrap(steady(layout)), torch.arange(6)
    x = images(6, 2, 12, 12).float().contiguous(memory_format=layout)
    cases: list[dict[str, Any]] = [{}, {"images": 2}, {"projections": 10}]
    losses = [jacobian_penalty(2.0, form=form, loss=nothing, **case) for case in cases]
    for loss in [*losses, input_gradient_penalty(0.1)]:
        exact = loss(model, x, y)
        expected = list(grad(exact, weights_of(model), allow_unused=True))
        value, slopes = rounded_by(loss, model, x, y)
        torch.testing.assert_close(value, exact, rtol=0.02, atol=0.0)
        assert error(slopes, expected) <= 0.02
        assert {s.dtype for s in [value, *slopes] if s is not None} == {torch.float32}


@every_layout
def test_rounding_costs_no_more_than_it_costs_autograd(layout: torch.memory_format) -> None:
    """Where rounding flips units, J jumps; by autograd as much as by ours."""
    model = mnist_tutorial().eval().to(memory_format=layout)  # type: ignore[call-overload]
    x, y = images(10, 1, 28, 28).float().contiguous(memory_format=layout), torch.arange(10)
    loss = jacobian_penalty(loss=nothing)
    exact = loss(model, x, y)
    expected = list(grad(exact, weights_of(model)))
    ours, slopes = rounded_by(loss, model, x, y)
    theirs, their_slopes = rounded_by(loss, Written(model), x, y)
    torch.testing.assert_close(torch.stack([ours, theirs]), exact.expand(2), rtol=0.01, atol=0.0)
    assert error(slopes, expected) <= 1.25 * error(their_slopes, expected)


@every_path
def test_channels_last_changes_no_number(wrap: Wrap) -> None:
    model, x, y = wrap(small().eval()), images(4, 1, 9, 8), torch.tensor([0, 1, 2, 0])
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss, results = jacobian_penalty(loss=precise), []
    for m, x_m in ((model, x), (other, x.contiguous(memory_format=torch.channels_last))):
        value = loss(m, x_m, y)
        results.append([value.detach(), *grad(value, weights_of(m))])
    torch.testing.assert_close(*results)


@every_path
@pytest.mark.parametrize("make", [jacobian_penalty, input_gradient_penalty])
def test_it_leaves_nothing_behind(wrap: Wrap, make: Callable[[], Loss]) -> None:
    model, x, y = wrap(small()).train(), images(3, 1, 9, 8), torch.tensor([0, 1, 2])
    before = copy.deepcopy(model.state_dict())
    make()(model, x, y)
    assert x.grad is None and not x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@every_path
def test_without_gradients_it_is_still_a_number(wrap: Wrap) -> None:
    model, x, y = wrap(small().eval()), images(3, 1, 9, 8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        value = jacobian_penalty(loss=precise)(model, x, y)
    torch.testing.assert_close(value, literally(model, x, y, {"weight": 0.1}))


def test_a_compiled_step_has_the_eager_gradient() -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not know this Python or platform")
    model, x = small(10, wide=30).float(), images(8, 1, 9, 8).float()
    y, weights = torch.arange(8), weights_of(model)
    loss = jacobian_penalty(1.0)
    for mode in (False, True):
        model.train(mode)
        step = torch.compile(lambda: loss(model, x, y), backend="aot_eager", fullgraph=True)
        results = []
        for run in (step, lambda: loss(model, x, y)):
            torch.manual_seed(0)
            value = run()
            results.append([value.detach(), *grad(value, weights, allow_unused=True)])
        torch.testing.assert_close(*results)


# Eq. 8


def test_the_input_gradient_of_a_linear_model_is_in_closed_form() -> None:
    """∇ₓL = Wᵀ(p − y), for soft labels q in place of y too."""
    model, x, y = ending(inputs=12).double(), images(6, 1, 3, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    weights = W, _ = weights_of(model)

    def soft(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, label_smoothing=0.2)

    one_hot = F.one_hot(y, 4).double()
    for loss, q in ((precise, one_hot), (soft, 0.8 * one_hot + 0.05)):
        g = (model(x).softmax(dim=1) - q) @ W
        expected = loss(model, x, y) + 3.0 / 6 * g.square().sum()
        ours = input_gradient_penalty(3.0, loss=loss)(model, x, y)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(grad(ours, weights), grad(expected, weights))


def test_the_weight_converts_to_that_of_ross_and_doshi_velez_code() -> None:
    model, x, y = small().eval(), images(5, 1, 9, 8), torch.tensor([0, 1, 2, 0, 1])
    given, λ = x.clone().requires_grad_(), 40.0
    mean = precise(model, given, y)
    g = grad(mean, given, create_graph=True)[0]
    theirs = mean + λ / 2 * g.square().sum()
    torch.testing.assert_close(
        input_gradient_penalty(λ / (2 * 5), loss=precise)(model, x, y), theirs
    )


def test_the_gradient_of_the_input_gradient_is_that_of_finite_differences() -> None:
    model, x, y = smooth(), images(4, 1, 9, 8), torch.tensor([0, 1, 2, 0])
    weights = weights_of(model)
    loss = input_gradient_penalty(5.0, loss=precise)

    def value() -> Tensor:
        with torch.enable_grad():
            return loss(model, x, y)

    expected = differences(value, weights)
    torch.testing.assert_close(list(grad(value(), weights)), expected, rtol=1e-5, atol=1e-7)


# Eq. 16, 17 and 25 to 27


def linear(num_classes: int, seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    """z = Wx + b on 4 × 4 pixels, with b such that the classes meet at grey."""
    torch.manual_seed(seed)
    model = ending(inputs=16, classes=num_classes)
    W, b = (p.detach() for p in model.parameters())
    W.normal_(std=scale)
    b.copy_(-W.sum(dim=1) / 2 + 0.1 * scale * torch.randn(num_classes))
    return model


def near_grey(n: int, seed: int = 0) -> Tensor:
    return (0.4 + 0.2 * images(n, 1, 4, 4, seed=seed)).float()


@every_path
def test_on_a_linear_model_eq_16_is_the_exact_distance(wrap: Wrap) -> None:
    model, x = linear(5), near_grey(40)
    W, b = (p.detach().double() for p in model.parameters())
    y = predicted(model, x)
    found = measure(wrap(model), (x, y))
    flat = x.flatten(1).double()
    z, d, nearest = flat @ W.T + b, torch.empty(40, dtype=torch.float64), []
    for i, k_star in enumerate(y.tolist()):
        others = [k for k in range(5) if k != k_star]
        distance = {k: float((z[i, k_star] - z[i, k]) / (W[k_star] - W[k]).norm()) for k in others}
        nearest.append(min(others, key=distance.__getitem__))
        d[i] = distance[nearest[i]]
        margin = min(float(z[i, k_star] - z[i, k]) for k in others)
        assert float(found.margin[i]) == pytest.approx(margin, abs=1e-5)
    torch.testing.assert_close(found.first_order, d, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm, W.norm().expand(40), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.lower, found.margin / (math.sqrt(2) * W.norm()))
    k, rows, along = torch.tensor(nearest), torch.arange(40), (flat @ W.T).square()
    torch.testing.assert_close(
        found.curvature, along[rows, y] - along[rows, k], rtol=1e-4, atol=1e-5
    )
    ceiling = W.square().sum() * flat.square().sum(dim=1)
    torch.testing.assert_close(found.ceiling, ceiling, rtol=1e-5, atol=0.0)

    r = (W[k] - W[y]) / (W[k] - W[y]).norm(dim=1, keepdim=True) * found.first_order[:, None]
    at = (flat + r) @ W.T + b  # a step of that length ends on the boundary, and in no third class
    torch.testing.assert_close(at[rows, y], at[rows, k], rtol=0.0, atol=1e-5)
    assert (at.amax(dim=1) <= at[rows, y] + 1e-5).all()
    assert not torch.equal(
        found.margin.argsort(), found.first_order.argsort()
    )  # K > 2: they differ


def test_on_a_linear_model_deepfool_goes_as_far_as_eq_16_says() -> None:
    model, x = linear(5, scale=10.0), near_grey(60)
    y = predicted(model, x)
    x_adv = deepfool(model, x, y, overshoot=0.02)
    inside = ((x_adv > 0) & (x_adv < 1)).flatten(1).all(dim=1)  # clipping would bend the way
    r = (x_adv - x).flatten(1).norm(dim=1).double()[inside]
    d = measure(model, (x, y)).first_order[inside]
    assert len(d) > 50
    torch.testing.assert_close(r, 1.02 * d, rtol=1e-3, atol=1e-5)


def network(num_classes: int, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = ending(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), inputs=48, classes=num_classes)
    for p in model.parameters():
        p.detach().mul_(gain)
    return model


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 999), st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_bounds_hold_on_any_network(num_classes: int, seed: int, gain: float) -> None:
    """Eq. 17 bounds Eq. 16, and Eq. 27 bounds Eq. 25, whatever the label is."""
    model, x = network(num_classes, seed, gain), images(8, 1, 4, 4, seed=seed).float()
    y = torch.randint(num_classes, (8,), generator=torch.Generator().manual_seed(seed))
    found = measure(model, (x, y))
    within = 1 + 1e-12
    assert (found.lower <= found.first_order * within).all() and (found.lower >= 0).all()
    assert (found.curvature <= found.ceiling * within).all()
    assert torch.equal(found.correct, predicted(model, x) == y)


def test_eq_17_is_an_equality_for_two_opposite_classes() -> None:
    model = linear(2)
    W = model.get_parameter("1.weight").detach()
    W[1] = -W[0]
    found = measure(model, (near_grey(20), torch.arange(20) % 2))
    torch.testing.assert_close(found.lower, found.first_order, rtol=1e-12, atol=0.0)
    W[1] *= 0.5
    found = measure(model, (near_grey(20), torch.arange(20) % 2))
    assert (found.lower < 0.99 * found.first_order).all()


def test_proposition_4_holds_behind_a_fixed_head() -> None:
    model, x = with_fixed_head(small(wide=20)).float().eval(), images(20, 1, 9, 8).float()
    found = measure(model, (x, predicted(model, x)))
    norm = squared_norm(*linearize(model[:-1], x)).sqrt().double().detach()
    bound = found.margin / (math.sqrt(2) * norm)
    within = 1 + 1e-5
    assert (bound <= found.first_order * within).all()
    assert (found.norm <= norm * within).all()  # ‖WᵀJ‖_F ≤ ‖J‖_F: no factor √K
    assert norm.min() > 0


@every_path
def test_the_batch_size_does_not_matter(wrap: Wrap) -> None:
    model, x = wrap(network(4)), images(7, 1, 4, 4)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    whole = measure(model, (x, y))
    for size in (1, 3, 7):
        parts = measure(model, (x, y), batch_size=size)
        torch.testing.assert_close(vars(parts), vars(whole), rtol=1e-5, atol=1e-6)
    assert {len(column) for column in vars(whole).values()} == {7}
    bytes_ = (255 * x).round().to(torch.uint8)  # as the data sets hold them
    torch.testing.assert_close(
        vars(measure(model, (bytes_, y))), vars(measure(model, (bytes_ / 255, y)))
    )


@every_path
def test_the_numbers_carry_no_graph(wrap: Wrap) -> None:
    found = measure(wrap(network(4)), (images(3, 1, 4, 4), torch.arange(3)))
    for name, column in vars(found).items():
        assert not column.requires_grad, name
        assert column.dtype == (torch.bool if name == "correct" else torch.float64), name


def test_the_model_is_left_as_it_was() -> None:
    model = Net().train()
    model.body[3].eval()  # a mode of its own
    model.body[0].weight.requires_grad_(False)
    model.body[6].weight.grad = torch.ones(5, 128)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    x, y = images(20, 1, 8, 8).float(), torch.arange(20) % 5
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(model, (x, y))
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "body.0.weight"
    ]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["body.6.weight"]
    assert model.body[6].weight.grad.eq(1).all()  # type: ignore[union-attr]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(vars(found), vars(measure(model, (x, y))))  # in full precision


def test_where_nothing_changes_the_distance_is_none_or_infinite() -> None:
    """J = 0: a lead is never lost, and a tie is lost at once."""
    model = linear(3)
    for weight in model.parameters():
        weight.detach().zero_()
    found = measure(model, (near_grey(2), torch.tensor([0, 1])))
    assert found.first_order.tolist() == found.lower.tolist() == [0, 0]
    model.get_parameter("1.bias").detach().copy_(torch.tensor([1.0, 0.0, 0.5]))
    found = measure(model, (near_grey(2), torch.tensor([0, 1])))
    assert found.margin.tolist() == [0.5, 0.5]
    assert found.first_order.tolist() == found.lower.tolist() == [math.inf, math.inf]


def test_what_no_attack_takes_is_refused() -> None:
    model, x = linear(3), near_grey(2)
    with pytest.raises(ValueError, match="the model has 3 classes, expected at least 8"):
        measure(model, (x, torch.tensor([0, 7])))
    model.get_parameter("1.weight").detach().fill_(math.nan)
    with pytest.raises(ValueError, match="NaN logits"):
        measure(model, (x, torch.tensor([0, 1])))


# At the edges


@every_form
@every_path
@pytest.mark.parametrize("options", [{}, {"projections": 1}, {"images": 1}], ids=str)
def test_a_dead_network_has_a_finite_gradient(
    wrap: Wrap, form: str, options: dict[str, Any]
) -> None:
    body = small().eval()
    for name in ("1.bias", "7.bias"):
        body.get_parameter(name).detach().fill_(-100)
    model, x, y = wrap(body), images(3, 1, 9, 8), torch.tensor([0, 1, 2])
    for precision in (torch.float64, torch.float32):
        model, x = model.to(precision), x.to(precision)
        value = jacobian_penalty(1.0, form=form, loss=precise, **options)(model, x, y)
        torch.testing.assert_close(value, precise(model, x, y))
        slopes = grad(value, weights_of(model))
        torch.testing.assert_close(slopes, grad(precise(model, x, y), weights_of(model)))
        assert value.isfinite() and all(slope.isfinite().all() for slope in slopes)


@every_path
@pytest.mark.parametrize("make", [jacobian_penalty, input_gradient_penalty])
def test_a_weight_of_0_is_the_loss_alone(wrap: Wrap, make: Callable[..., Loss]) -> None:
    model, x, y = wrap(small().eval()), images(3, 1, 9, 8), torch.tensor([0, 1, 2])
    value, expected = make(0.0)(model, x, y), cross_entropy(model, x, y)
    torch.testing.assert_close(value, expected)
    weights = weights_of(model)
    torch.testing.assert_close(grad(value, weights), grad(expected, weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"weight is -0\.1, expected λ >= 0"),
        ({"weight": math.nan}, "weight is nan, expected λ >= 0"),
        ({"form": "sum"}, "form is 'sum', expected 'root sum', 'root mean' or 'mean square'"),
        ({"layer": "fc1"}, "layer is 'fc1', expected 'logits' or 'features'"),
        ({"images": 0}, "images is 0, expected at least 1, or None for the whole batch"),
    ],
    ids=str,
)
def test_options_that_are_none_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jacobian_penalty(**options)


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_a_weight_that_is_none_is_refused_by_the_input_gradient(weight: float) -> None:
    with pytest.raises(ValueError, match=f"weight is {weight}, expected λ >= 0"):
        input_gradient_penalty(weight)


@pytest.mark.parametrize("model", [Net(), nn.Sequential(nn.Flatten())], ids=["Net", "headless"])
def test_features_want_a_linear_head(model: nn.Module) -> None:
    loss, message = jacobian_penalty(layer="features"), "an nn.Sequential whose last layer is nn.L"
    with pytest.raises(ValueError, match=message):
        loss(model, images(2, 1, 8, 8).float(), torch.tensor([0, 1]))


# In training


def striding(seed: int = 0) -> nn.Sequential:
    """A network small enough to train in a test."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


ATTACK = functools.partial(fgsm, eps=0.1)


@pytest.mark.parametrize(
    "loss",
    [
        jacobian_penalty(layer="features", projections=2),
        jacobian_penalty(form="mean square", images=1),
        adversarial(ATTACK, loss=jacobian_penalty()),
        mixed_batch(ATTACK, 0.3, loss=jacobian_penalty(loss=label_smoothing())),
        mixed_batch(ATTACK, 0.3, loss=input_gradient_penalty(loss=label_smoothing())),
        adversarial(ATTACK, loss=input_gradient_penalty()),
    ],
    ids=["features", "images", "adversarial", "mixed", "mixed gradient", "adversarial gradient"],
)
def test_penalties_train_alone_and_with_other_objectives(loss: Loss) -> None:
    model = striding()
    before = copy.deepcopy(model.state_dict())
    (epoch,) = fit(model, digits(), epochs=1, loss=loss, progress=False)
    assert math.isfinite(epoch["loss"])
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Dropout and the projections are drawn anew in each epoch, from its own seed."""

    def train(checkpoint: Path | None, augment: Callable[..., Tensor] = crop_and_flip) -> nn.Module:
        model, loss = striding(), jacobian_penalty(projections=1)
        how: dict[str, Any] = {"epochs": 3, "batch_size": 64, "progress": False}
        fit(model, digits(), loss=loss, augment=augment, checkpoint=checkpoint, **how)
        return model

    whole = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.pt", stop_after(6, interrupt))
    assert_same_weights(whole, train(tmp_path / "run.pt"))


def test_a_second_phase_with_the_penalty_moves_the_boundary_away() -> None:
    """What the paper claims: ‖J‖ falls faster than the margin, and d* of Eq. 16 and 17 grow."""
    data, found = load_data("digits"), {}
    how: dict[str, Any] = {"batch_size": 64, "progress": False}
    trained = striding()
    optimizer = torch.optim.Adam(trained.parameters(), 1e-3)
    fit(trained, data, epochs=6, optimizer=optimizer, **how)
    phases: dict[str, Loss] = {"without": cross_entropy, "with": jacobian_penalty(0.1)}
    for name, loss in phases.items():
        model = copy.deepcopy(trained)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        fit(model, data, epochs=4, loss=loss, optimizer=optimizer, **how)
        b = measure(model, data.test)
        found[name] = {"accuracy": b.correct.double().mean(), "norm": b.norm.mean()}
        found[name] |= {"slope": (b.norm / b.margin)[b.correct].median()}
        found[name] |= {"d*": b.first_order[b.correct].mean(), "lower": b.lower[b.correct].mean()}
    ratio = {name: float(found["with"][name] / found["without"][name]) for name in found["with"]}
    assert ratio["norm"] < 0.7 and ratio["slope"] < 0.9
    assert ratio["d*"] > 1.03 and ratio["lower"] > 1.06
    assert ratio["accuracy"] > 0.96
