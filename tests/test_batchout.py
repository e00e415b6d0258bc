"""BatchOut against Algorithm 1 written out, and against the closed forms of what it draws."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from defenses.batchout import (
    CIFAR_ETA,
    MNIST_ETA,
    BatchOut,
    Direction,
    mixup,
    to_noise,
    to_partners,
)
from defenses.diagnostics import ZeroGradients, layer_slopes
from defenses.evaluation import Accuracy, Robustness, seed_interval
from defenses.models import cifar_batchout, mnist_batchout
from defenses.training import Loss, cross_entropy, fit
from tests.test_attacks import DEVICES, Written
from tests.test_models import kinds, parameters
from tests.test_training import assert_same_weights, digits, interrupt, stop_after

every_device = pytest.mark.parametrize("device", DEVICES)
every_draw = pytest.mark.parametrize("draw", [None, "sample", "batch"])
every_direction = pytest.mark.parametrize("direction", [to_partners, to_noise])
every_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=str
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def features(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Draw float64 features (n, …); no two numbers are alike."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def again(layer: nn.Module, x: Tensor, seed: int = 3) -> Tensor:
    """What the layer returns from a given state of torch's generator."""
    torch.manual_seed(seed)
    return layer(x)


def ones(x: Tensor, count: int) -> Tensor:
    """A direction that lays η open."""
    return torch.ones_like(x[:count])


# Algorithm 1


COUNTS = {  # ⌊k·N⌋, also where k·N is no exact number
    (0.5, 10): 5,
    (0.5, 7): 3,
    (0.7, 10): 7,
    (0.29, 100): 29,
    (0.57, 100): 57,
    (0.99, 100): 99,
    (0.1, 9): 0,
    (0.5, 1): 0,
    (1.0, 1): 1,
    (1.0, 6): 6,
    (0.0, 6): 0,
    (1.0, 0): 0,
}


@every_device
@pytest.mark.parametrize("shape", [(5,), (3, 4), (3, 4, 2)], ids=str)
@pytest.mark.parametrize(("case", "count"), COUNTS.items(), ids=str)
def test_the_layer_is_algorithm_1(
    case: tuple[float, int], count: int, shape: tuple[int, ...], device: str
) -> None:
    (k, N), eta = case, 0.3
    X = features(N, *shape).to(device)
    given, version = X.clone(), X._version
    ours = again(BatchOut(eta, k), X)
    torch.manual_seed(3)
    R = torch.randint(max(N, 1), (count,), device=device)
    for j in range(N):
        if j < count:  # toward what X_r was before anything moved
            torch.testing.assert_close(ours[j], (1 - eta) * given[j] + eta * given[R[j]])
        else:
            assert torch.equal(ours[j], given[j])
    assert torch.equal(X, given) and X._version == version  # the input stays as it is
    assert ours.shape == X.shape and ours.dtype == X.dtype and ours.device == X.device


def test_over_the_partners_the_mean_and_the_covariance_are_in_closed_form() -> None:
    """E[x*] = (1−η)x + ημ; Cov[x*] = η²Σ, Σ biased; what two samples become is independent."""
    N, D, eta, draws = 6, 3, 0.3, 10_000
    X, layer = features(N, D), BatchOut(eta, k=1)
    found = torch.stack([layer(X) for _ in range(draws)])
    mu = X.mean(dim=0)
    Sigma = (X - mu).T @ (X - mu) / N
    off = found - ((1 - eta) * X + eta * mu)
    error = (eta**2 * Sigma.diagonal() / draws).sqrt()
    assert (off.mean(dim=0).abs() <= 4.5 * error).all()
    off = off.flatten(1)
    products = off[:, :, None] * off[:, None]
    expected = torch.block_diag(*N * [eta**2 * Sigma])
    error = products.std(dim=0) / math.sqrt(draws)
    assert ((products.mean(dim=0) - expected).abs() <= 4.5 * error).all()


def test_with_eta_and_k_of_1_every_row_is_one_of_the_batch_with_replacement() -> None:
    X = features(8, 3)
    rows = [again(BatchOut(1.0, k=1.0), X, seed) for seed in range(300)]
    equal = torch.stack([(row[:, None] - X).abs().amax(dim=2) < 1e-12 for row in rows])
    assert (equal.sum(dim=2) == 1).all()
    partner = equal.int().argmax(dim=2)
    assert {tuple(p.unique().tolist()) for p in partner} != {tuple(range(8))}  # no permutation
    seen = F.one_hot(partner, 8).sum(dim=0)  # all N are as likely for each, itself too
    assert ((seen - 300 / 8).abs() <= 4.5 * math.sqrt(300 * 7 / 64)).all()


@every_draw
@every_direction
def test_in_eval_mode_or_with_nothing_to_move_it_is_the_identity(
    draw: str | None, direction: Direction
) -> None:
    x = features(6, 4)
    how: dict[str, Any] = {"draw": draw, "direction": direction}
    layers = [BatchOut(0.5, 1.0, **how).eval(), BatchOut(0.0, 1.0, **how), BatchOut(0.5, 0, **how)]
    state = torch.get_rng_state()
    assert all(torch.equal(layer(x), x) for layer in layers)
    assert torch.equal(torch.get_rng_state(), state)  # and it draws nothing
    assert not torch.equal(BatchOut(0.5, 1.0, **how)(x), x)


def test_a_batch_of_one_has_only_itself_to_move_to() -> None:
    x = features(1, 4)
    assert torch.equal(BatchOut(0.5, 1.0)(x), x)
    assert torch.equal(BatchOut(0.5, 0.5)(x), x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({name: value}, r"eta and k must lie in \[0, 1\]; got")
          for name in ("eta", "k") for value in (-0.1, 1.1, math.nan)),
        ({"draw": "layer"}, "draw must be None, \"sample\" or \"batch\"; got 'layer'"),
        ({"draw": "none"}, "draw must be None"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_none_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchOut(**changed)


def test_the_defaults_are_the_papers_and_a_layer_says_what_it_is() -> None:
    assert repr(BatchOut()) == "BatchOut(0.1, k=0.5, direction=to_partners)"
    layer = BatchOut(0.15, draw="sample", direction=to_noise)
    assert repr(layer) == "BatchOut(0.15, k=0.5, draw='sample', direction=to_noise)"
    assert BatchOut().stop_gradient and not layer.state_dict()


# How η is drawn


@every_device
@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("draw", ["sample", "batch"])
def test_eta_is_drawn_from_0_to_n_for_each_sample_or_for_each_batch(
    draw: str, shape: tuple[int, ...], device: str
) -> None:
    N, draws = 0.4, 2000
    layer = BatchOut(N, 0.5, draw=draw, direction=ones)
    x = torch.zeros(4, *shape, dtype=torch.float64, device=device)
    found = torch.stack([layer(x) for _ in range(draws)]).flatten(2) if shape else None
    if found is None:  # a vector: one feature a sample
        found = torch.stack([layer(x) for _ in range(draws)])[:, :, None]
    assert not found[:, 2:].any()
    assert (found == found[:, :, :1]).all()  # all features of a sample go equally far
    eta = found[:, :2, 0]
    assert (eta[:, 0] == eta[:, 1]).all() == (draw == "batch")
    assert eta.min() >= 0 and eta.max() <= N and eta.max() - eta.min() > 0.98 * N
    assert stats.kstest(eta[:, 0].cpu() / N, "uniform").pvalue > 1e-3
    assert abs(eta[:, 1].mean() - N / 2) <= 4.5 * N / math.sqrt(12 * draws)
    if draw == "sample":
        assert abs(torch.corrcoef(eta.T)[0, 1]) <= 4.5 / math.sqrt(draws)


@pytest.mark.parametrize("draw", ["sample", "batch"])
def test_a_drawn_eta_multiplies_the_direction(draw: str) -> None:
    X, R = features(6, 3), torch.tensor([4, 0, 1, 5])

    def fixed(x: Tensor, count: int) -> Tensor:
        return x[R] - x[:count]

    eta = again(BatchOut(0.4, 0.7, draw=draw, direction=ones), torch.zeros_like(X))[:4]
    ours = again(BatchOut(0.4, 0.7, draw=draw, direction=fixed), X)
    torch.testing.assert_close(ours[:4], X[:4] + eta * (X[R] - X[:4]))


# The stop-gradient of Sec. 6.1


@every_device
@every_draw
@every_direction
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_with_stopped_gradient_the_derivative_is_the_identity_bit_for_bit(
    dtype: torch.dtype, direction: Direction, draw: str | None, device: str
) -> None:
    x = features(6, 3, 2, 2).to(device, dtype).requires_grad_()
    g = features(6, 3, 2, 2, seed=1).to(device, dtype)
    out = BatchOut(0.4, 0.7, draw=draw, direction=direction)(x)
    assert not torch.equal(out, x)
    out.backward(g)
    assert x.grad is not None and torch.equal(x.grad, g)


@every_draw
def test_without_it_the_derivative_is_that_of_the_mixture(draw: str | None) -> None:
    """(1−η)I + ηP for the rows that moved, where row j of P has its 1 at the partner of j."""
    N, count = 6, 4
    X, R = features(N), torch.tensor([4, 0, 2, 5])  # the third is its own partner

    def fixed(x: Tensor, count: int) -> Tensor:
        return x[R] - x[:count]

    eta = 0.4
    if draw is not None:
        spied = BatchOut(eta, 0.7, draw=draw, direction=ones)
        eta = again(spied, torch.zeros_like(X))[:count, None]  # type: ignore[assignment]
    layer = BatchOut(eta if draw is None else 0.4, 0.7, draw=draw, direction=fixed)
    expected = torch.eye(N, dtype=X.dtype)
    expected[:count] = (1 - eta) * expected[:count] + eta * F.one_hot(R, N)
    layer.stop_gradient = False
    torch.testing.assert_close(jacobian(lambda x: again(layer, x), X), expected)
    values = again(layer, X)
    layer.stop_gradient = True
    assert torch.equal(jacobian(lambda x: again(layer, x), X), torch.eye(N, dtype=X.dtype))
    torch.testing.assert_close(again(layer, X), values, rtol=0, atol=0)  # the switch moves nothing


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_layer_stands_between_layers_that_work_in_place(stop_gradient: bool) -> None:
    X, target = features(8, 5), features(8, 4, seed=1)
    first, second = nn.Linear(5, 4).double(), nn.Linear(4, 4).double()
    layer = BatchOut(0.3, 0.5, stop_gradient=stop_gradient)
    model = nn.Sequential(first, nn.ReLU(inplace=True), layer, nn.ReLU(inplace=True), second)
    weights = [*model.parameters()]
    ours = torch.autograd.grad((again(model, X) * target).sum(), weights)
    torch.manual_seed(3)
    R, h = torch.randint(8, (4,)), first(X).relu()
    eta_d = 0.3 * (h[R] - h[:4])
    moved = h[:4] + (eta_d.detach() if stop_gradient else eta_d)
    expected = second(torch.cat([moved, h[4:]]).relu())
    torch.testing.assert_close(ours, torch.autograd.grad((expected * target).sum(), weights))


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_leaf_goes_in_and_stays_what_it_was(stop_gradient: bool) -> None:
    x = features(6, 3).requires_grad_()
    before = x.detach().clone()
    layer = BatchOut(0.3, 1.0, stop_gradient=stop_gradient)
    nn.Sequential(layer, nn.ReLU(inplace=True))(x).sum().backward()
    assert torch.equal(x, before) and x.is_leaf and x.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert torch.is_grad_enabled() and layer(x).requires_grad


# Eq. 5


@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_noise_is_as_long_as_what_it_is_added_to(dtype: torch.dtype, device: str) -> None:
    x = features(7, 4, 3, 3).to(device, dtype)
    x *= 10.0 ** torch.arange(-3, 4).to(x).view(-1, 1, 1, 1)  # each sample has its own length
    rtol = 1e-12 if dtype is torch.float64 else 0.02
    n = to_noise(x, 5)
    assert n.shape == (5, 4, 3, 3) and n.dtype == x.dtype and n.device == x.device
    lengths = [v.double().flatten(1).norm(dim=1) for v in (n, x[:5])]
    torch.testing.assert_close(*lengths, rtol=rtol, atol=0.0)
    x_star = BatchOut(0.25, 0.8, direction=to_noise)(x)
    moved = (x_star.double() - x.double()).flatten(1).norm(dim=1)
    assert not moved[5:].any()
    torch.testing.assert_close(moved[:5], 0.25 * lengths[1], rtol=0.03, atol=0.0)
    assert not to_noise(torch.zeros_like(x), 7).any()  # no NaN for a sample of zeros


def test_its_direction_is_uniform_and_knows_neither_the_sample_nor_the_others() -> None:
    """n/‖n‖ on the sphere: mean 0, covariance I/D."""
    N, D, draws = 3, 4, 10_000
    x = features(N, D)
    d = torch.stack([to_noise(x, N) for _ in range(draws)]) / x.norm(dim=1, keepdim=True)
    flat = d.flatten(1)
    assert (flat.mean(dim=0).abs() <= 4.5 / math.sqrt(D * draws)).all()
    products = flat[:, :, None] * flat[:, None]
    expected = torch.eye(N * D, dtype=x.dtype) / D
    error = products.std(dim=0) / math.sqrt(draws)
    assert ((products.mean(dim=0) - expected).abs() <= 4.5 * error).all()


@every_device
@every_direction
def test_a_generator_repeats_the_directions(direction: Any, device: str) -> None:
    x = features(40, 3).to(device)
    state = torch.get_rng_state()
    ours = [direction(x, 20, torch.Generator(device).manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], ours[2])
    assert torch.equal(torch.get_rng_state(), state)


# channels_last, bfloat16, `fit`


@every_device
@every_layout
@every_draw
def test_a_layout_is_kept_and_changes_no_number(
    draw: str | None, layout: torch.memory_format, device: str
) -> None:
    x = features(6, 4, 5, 3).float().to(device)
    layer = BatchOut(0.3, 0.7, draw=draw)
    expected = again(layer, x)
    found = again(layer, x.contiguous(memory_format=layout))
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=layout)
    part = x[:, ::2, 1:]  # neither
    assert torch.equal(again(layer, part), again(layer, part.contiguous()))


@every_device
@every_draw
@every_direction
def test_under_autocast_features_stay_in_bfloat16(
    direction: Direction, draw: str | None, device: str
) -> None:
    seen: list[Tensor] = []
    layer = BatchOut(0.3, 0.5, draw=draw, direction=direction)
    model = mnist_batchout(behind={"C1": layer, "F1": layer}).to(device)
    layer.register_forward_hook(lambda _, given, out: seen.extend([given[0].detach(), out]))
    x, y = torch.rand(8, 1, 28, 28, device=device), torch.arange(8, device=device)
    with torch.autocast(device, torch.bfloat16):
        value = cross_entropy(model.train(), x, y)
    value.backward()
    assert [v.dtype for v in seen] == 4 * [torch.bfloat16] and value.isfinite()
    for h, h_star in (seen[:2], seen[2:]):
        assert torch.equal(h_star[4:], h[4:]) and not torch.equal(h_star[:4], h[:4])
    assert all(weight.grad.isfinite().all() for weight in model.parameters())  # type: ignore[union-attr]


def test_bfloat16_moves_as_far_as_float64() -> None:
    x = features(50, 20).bfloat16()
    torch.testing.assert_close(
        again(BatchOut(0.3), x).double(), again(BatchOut(0.3), x.double()), rtol=0.01, atol=0.01
    )


HOW: dict[str, tuple[type[BatchOut] | None, dict[str, Any]]] = {
    "none": (None, {}),
    "fixed": (BatchOut, {}),
    "drawn": (BatchOut, {"draw": "sample"}),
    "noise": (BatchOut, {"direction": to_noise}),
}


def trained(
    how: str, checkpoint: Path | None = None, loss: Loss = cross_entropy, **changed: Any
) -> nn.Sequential:
    """Train the paper's network for two epochs of two batches."""
    torch.manual_seed(5)
    make, options = HOW[how]
    eta = {"C1": 0.3, "F1": 0.3}
    model = mnist_batchout(behind={n: make(e, **options) for n, e in eta.items()} if make else {})
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    options = {"epochs": 2, "batch_size": 16, "progress": False} | changed
    fit(model, digits(32), optimizer=adam, checkpoint=checkpoint, loss=loss, **options)
    return model


def differ(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("how", ["fixed", "drawn", "noise"])
def test_a_seed_repeats_a_run_that_is_stopped_or_not(how: str, tmp_path: Path) -> None:
    whole = trained(how)
    trained(how, tmp_path / "run.pt", epochs=1)
    torch.rand(9)  # what was drawn in between does not matter
    assert_same_weights(whole, trained(how, tmp_path / "run.pt"))
    assert differ(whole, trained("none"))  # it has trained with the layer


def test_an_augmented_run_goes_on_from_where_it_was_interrupted(tmp_path: Path) -> None:
    whole = trained("drawn", augment=stop_after(99, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trained("drawn", tmp_path / "run.pt", augment=stop_after(3, interrupt))
    resumed = trained("drawn", tmp_path / "run.pt", augment=stop_after(99, interrupt))
    assert_same_weights(whole, resumed)
    assert differ(whole, trained("drawn", seed=1, augment=stop_after(99, interrupt)))


# Mixup


def sequence() -> nn.Sequential:
    layers = nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4)
    return nn.Sequential(*layers).double()


@every_device
@pytest.mark.parametrize("layers", [(0,), (2,), (4,), (0, 1, 2, 3)], ids=str)
def test_mixup_is_cross_entropy_with_soft_labels_behind_the_mixed_features(
    layers: tuple[int, ...], device: str
) -> None:
    model, x = sequence().to(device), features(7, 1, 4, 4).to(device)
    y, cut, seen = torch.arange(7, device=device) % 4, [], []
    for seed in range(12):
        torch.manual_seed(seed)
        ours = mixup(0.7, layers)(model, x, y)
        torch.manual_seed(seed)
        cut.append(layers[int(torch.randint(len(layers), ()))])
        share = float(torch.distributions.Beta(0.7, 0.7).sample())
        R = torch.randperm(7, device=device)
        h, labels = x, F.one_hot(y, 4).double()
        for i, layer in enumerate(model):
            h = share * h + (1 - share) * h[R] if i == cut[-1] else h
            h = layer(h)
        h = share * h + (1 - share) * h[R] if cut[-1] == len(model) else h
        soft = share * labels + (1 - share) * labels[R]
        expected = -(soft * h.log_softmax(dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        weights = [*model.parameters()]
        for a, b in zip(*(torch.autograd.grad(v, weights) for v in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        seen.append(ours.item())
    assert set(cut) == set(layers) and len(set(seen)) == 12


@pytest.mark.parametrize("alpha", [0.2, 2.0])
def test_one_lambda_for_each_batch_is_of_the_beta_distribution(alpha: float) -> None:
    """Of two images 0 and 1 that change places, 1−λ and λ are left."""
    seen: list[Tensor] = []

    def look(h: Tensor) -> Tensor:
        seen.append(h[:, 0])
        return torch.stack([h[:, 0], -h[:, 0]], dim=1)

    model, x = nn.Sequential(Written(look)), torch.tensor([[0.0], [1.0]]).double()
    for _ in range(1500):
        mixup(alpha)(model, x, torch.tensor([0, 1]))
    pairs = torch.stack(seen)
    torch.testing.assert_close(pairs.sum(dim=1), torch.ones(1500).double())
    swapped = pairs[pairs[:, 0] != 0]  # half of the permutations leave both in place
    assert abs(len(swapped) - 750) <= 4.5 * math.sqrt(1500) / 2
    share = swapped[:, 1].clamp(0, 1)
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(share.mean()) - 0.5) <= 4.5 * math.sqrt(variance / len(share))
    assert float(share.var()) == pytest.approx(variance, rel=0.1)


def test_mixup_takes_its_loss_in_float32_and_repeats_with_a_seed() -> None:
    model, x, y = sequence().float(), torch.rand(6, 1, 4, 4), torch.arange(6) % 4
    with torch.autocast("cpu", torch.bfloat16):
        assert mixup()(model, x, y).dtype == torch.float32
    runs = [trained("none", loss=mixup(layers=(0, 4)), seed=seed) for seed in (0, 0, 1)]
    assert_same_weights(runs[0], runs[1])
    assert differ(runs[0], runs[2]) and differ(runs[0], trained("none"))


def test_mixup_refuses_what_it_cannot_mix() -> None:
    with pytest.raises(TypeError, match="cuts a Sequential in two; got Written"):
        mixup()(Written(lambda x: x), features(2, 3), torch.tensor([0, 1]))
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="expected alpha > 0 and a layer at least; got"):
            mixup(alpha)
    with pytest.raises(ValueError, match="expected alpha > 0 and a layer at least; got"):
        mixup(layers=())


# The networks of Sec. 8.1


Make = Callable[..., nn.Sequential]


def with_all(eta: dict[str, float], **options: Any) -> dict[str, nn.Module]:
    return {name: BatchOut(e, **options) for name, e in eta.items()}


def test_the_mnist_network_is_that_of_the_appendix() -> None:
    torch.manual_seed(0)
    model = mnist_batchout(behind=with_all(MNIST_ETA))
    convolution = [nn.Conv2d, BatchOut, nn.ReLU, nn.MaxPool2d]
    head = [nn.Flatten, nn.Dropout, nn.Linear, BatchOut, nn.ReLU, nn.Dropout, nn.Linear]
    assert kinds(model) == [*convolution, *convolution, *head]
    assert [*parameters(model).values()] == [
        832,  # 32 filters of 1·5·5, and 32 biases
        25_632,
        131_328,  # 28 → 24 → 12 → 8 → 4, so 32·4·4 inputs
        2_570,
    ]
    assert [layer.eta for layer in model if isinstance(layer, BatchOut)] == [0.05, 0.1, 0.1]
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert model[:6](torch.rand(2, 1, 28, 28)).shape == (2, 32, 8, 8)


def test_the_cifar_network_is_that_of_the_appendix() -> None:
    model = cifar_batchout(behind=with_all(CIFAR_ETA, draw="sample"))
    convolution, pool = [nn.Conv2d, BatchOut, nn.ReLU], [nn.MaxPool2d]
    head = [nn.Flatten, nn.Dropout, *2 * [nn.Linear, BatchOut, nn.ReLU], nn.Dropout, nn.Linear]
    assert kinds(model) == [*2 * convolution, *pool, *3 * convolution, *pool, *head]
    assert [*parameters(model).values()] == [
        896,  # 32 filters of 3·3·3, and 32 biases
        18_496,
        *3 * [36_928],
        2_097_664,  # 32 → 16 → 8, so 64·8·8 inputs
        262_656,
        5_130,
    ]
    eta = [layer.eta for layer in model if isinstance(layer, BatchOut)]
    assert eta == [0.1, 0.1, 0.1, 0.1, 0.15, 0.15, 0.15]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("make", "eta", "shape"),
    [(mnist_batchout, MNIST_ETA, (1, 28, 28)), (cifar_batchout, CIFAR_ETA, (3, 32, 32))],
)
def test_modules_stand_where_they_are_put_and_change_no_weight(
    make: Make, eta: dict[str, float], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    plain, x = make(7).eval(), torch.rand(2, *shape)
    assert BatchOut not in kinds(plain) and plain(x).shape == (2, 7)
    assert {layer.p for layer in plain if isinstance(layer, nn.Dropout)} == {0.5}
    weighted = [nn.Conv2d, nn.Linear]
    for place, name in enumerate(eta):
        torch.manual_seed(0)
        model = make(7, {name: BatchOut()}).eval()
        where = kinds(model).index(BatchOut)
        assert sum(kind in weighted for kind in kinds(model)[:where]) == place + 1
        assert kinds(model)[where - 1] in weighted and kinds(model)[where + 1] is nn.ReLU
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"no layer \['C9'\]; expected some of \['C1', .*'F1'"):
        make(behind={"C1": BatchOut(), "C9": BatchOut()})


@pytest.mark.parametrize("make", [mnist_batchout, cifar_batchout])
def test_a_narrow_network_has_all_layers_with_half_of_their_units(make: Make) -> None:
    whole, half = make(7), make(7, narrow=2)
    assert kinds(half) == kinds(whole)
    weights = [
        [w for name, w in net.named_parameters() if "weight" in name] for net in (whole, half)
    ]
    widths = [[len(w) for w in net] for net in weights]
    assert widths[1] == [width // 2 for width in widths[0][:-1]] + [7]
    x = torch.rand(2, 1, 28, 28) if make is mnist_batchout else torch.rand(2, 3, 32, 32)
    assert half(x).shape == (2, 7)


@pytest.mark.parametrize("make", [mnist_batchout, cifar_batchout])
def test_weights_start_as_lasagnes(make: Make) -> None:
    """Glorot's uniform distribution; a convolution's fans count the pixels of its filters."""
    torch.manual_seed(0)
    for layer in make():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            pixels = layer.weight[0, 0].numel()
            fans = pixels * (layer.weight.shape[0] + layer.weight.shape[1])
            bound = math.sqrt(6 / fans)
            assert 0.98 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)
            assert layer.bias is not None and not layer.bias.any()


# Several seeds


def share(correct: int, n: int) -> Accuracy:
    return Accuracy(torch.arange(n) < correct)


def over(outcomes: Sequence[Accuracy | Robustness | ZeroGradients]) -> tuple[float, float]:
    return seed_interval([one.value for one in outcomes], [one.ci for one in outcomes])


def test_the_interval_is_students_where_the_seeds_differ() -> None:
    """.5, .6 and .7: t = 4.302653 for two degrees of freedom, s = .1."""
    found = over([share(k, 1000) for k in (500, 700, 600)])
    half = 4.302652729696142 * 0.1 / math.sqrt(3)
    assert found == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))
    assert found == pytest.approx(stats.t.interval(0.95, 2, 0.6, stats.sem([0.5, 0.6, 0.7])))


def test_it_is_never_narrower_than_the_images_own() -> None:
    assert over([share(30, 50)] * 3) == pytest.approx(share(30, 50).ci)
    two = [share(30, 50), share(31, 50), share(30, 50)]
    lows, highs = zip(*(one.ci for one in two), strict=True)
    assert over(two) == pytest.approx((sum(lows) / 3, sum(highs) / 3))


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6))
def test_either_end_is_that_of_the_wider_interval(counts: list[int]) -> None:
    (low, high), values = over([share(k, 40) for k in counts]), [k / 40 for k in counts]
    mean, error = sum(values) / len(values), stats.sem(values)
    own = [sum(ends) / len(ends) for ends in zip(*(share(k, 40).ci for k in counts), strict=True)]
    student = stats.t.interval(0.95, len(counts) - 1, mean, error) if error else (mean, mean)
    assert low == pytest.approx(min(own[0], student[0]))
    assert high == pytest.approx(max(own[1], student[1]))
    assert low <= mean + 1e-12 and mean - 1e-12 <= high


def test_sizes_have_no_ceiling() -> None:
    sizes = [Robustness(v, (v - 0.01, v + 0.01), 40, u) for v, u in ((0.1, 1), (1.2, 0), (3.8, 3))]
    expected = stats.t.interval(0.95, 2, 1.7, stats.sem([0.1, 1.2, 3.8]))
    assert over(sizes) == pytest.approx(expected) and expected[0] < 0 and expected[1] > 1
    alike = over([Robustness(0.3, (0.2, 0.4), 40, 0), Robustness(0.3, (0.1, 0.6), 40, 0)])
    assert alike == pytest.approx((0.15, 0.5))


def test_any_share_has_one() -> None:
    """t = 12.7 for one degree of freedom, so that the ends lie beyond 0 and 1."""
    low, high = over([ZeroGradients(0.2, 0.9, 50), ZeroGradients(0.4, 0.9, 50)])
    assert (low, high) == pytest.approx((0.3 - 1.2706204736174698, 0.3 + 1.2706204736174698))


@pytest.mark.parametrize("outcomes", [[], [share(3, 7)], [Robustness(0.3, (0.2, 0.4), 40, 0)]])
def test_one_seed_has_no_spread(outcomes: list[Accuracy | Robustness]) -> None:
    with pytest.raises(ValueError, match=f"^{len(outcomes)} seeds?: a spread needs at least two"):
        over(outcomes)


# How steep the layers are


def small() -> nn.Sequential:
    """A network with everything that a mode changes, (N, 1, 6, 6) to (N, 3)."""
    layers = [nn.Conv2d(1, 2, 3), BatchOut(0.5, 1.0), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Dropout(0.5), nn.Linear(8, 5), BatchOut(0.5, 1.0), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def close(found: Tensor, J: Tensor, draws: int) -> bool:
    """Whether squares are within 4.5 errors of ‖J‖²: Var ‖uᵀJ‖² = 2 tr (JJᵀ)² for u ~ N(0, I)."""
    exact, variance = J.square().sum(), 2 * (J @ J.T).square().sum()
    return bool(((found.square() - exact).abs() <= 4.5 * (variance / draws).sqrt()).all())


@every_device
def test_the_slope_of_a_linear_layer_is_its_norm(device: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double().to(device)
    x, W, draws = features(9, 1, 3, 4).to(device), model.get_parameter("1.weight"), 500
    ((slope, relative),) = layer_slopes(model, x, draws=draws)
    assert slope.shape == relative.shape == (9,) and slope.device.type == device
    assert close(slope, W.detach(), draws)
    lengths = x.flatten(1).norm(dim=1) / model(x).norm(dim=1)
    torch.testing.assert_close(relative, (slope * lengths).detach())
    assert not relative.requires_grad


def test_the_slopes_of_a_network_are_those_of_its_jacobians() -> None:
    """From pre-activation to pre-activation: the ReLU and the pool belong to the layer behind."""
    model, x, draws = small().eval(), features(2, 1, 6, 6), 800
    slopes, h = layer_slopes(model, x, draws=draws), x
    assert len(slopes) == 3
    for (slope, relative), (start, end) in zip(slopes, [(0, 1), (1, 7), (7, 10)], strict=True):
        out = model[start:end](h).detach()
        for i in range(len(x)):
            J = jacobian(lambda one, s=start, e=end: model[s:e](one[None])[0], h[i])
            assert close(slope[i], J.reshape(out[0].numel(), -1), draws)
            scale = h[i].norm() / out[i].norm()
            torch.testing.assert_close(relative[i], slope[i] * scale)
        h = out


def test_relative_slopes_do_not_change_when_a_layer_is_scaled() -> None:
    model, x = small(), features(4, 1, 6, 6)
    before = layer_slopes(model, x)
    for weight in model[-1].parameters():
        weight.detach().mul_(7)
    after = layer_slopes(model, x)
    torch.testing.assert_close(after[2], (7 * before[2][0], before[2][1]))
    torch.testing.assert_close(after[:2], before[:2])


def test_a_network_in_training_is_looked_at_in_eval_mode_and_left_as_it_was() -> None:
    model, x = mnist_batchout(behind=with_all(MNIST_ETA)), torch.rand(5, 1, 28, 28)
    before, state = x.clone(), torch.get_rng_state()
    expected = layer_slopes(model.eval(), x)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(layer_slopes(model.train(), x), expected, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.equal(x, before) and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)  # draws of its own
    assert len(expected) == 4 and all((slope > 0).all() for slope, _ in expected)
    assert not torch.equal(layer_slopes(model, x, seed=1)[0][0], expected[0][0])
