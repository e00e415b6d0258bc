"""The denoising blocks of Xie et al. (2019), against literal sums and SciPy."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from defenses import denoising
from defenses.denoising import (
    FEW_PLACES,
    Denoise,
    NonLocal,
    attention,
    bilateral,
    dot_product,
    mean,
    median,
)

C, H, W = 4, 5, 6


def features(n: int = 2) -> Tensor:
    return torch.randn(n, C, H, W, dtype=torch.float64, generator=torch.manual_seed(0))


def embedded() -> NonLocal:
    torch.manual_seed(1)
    module = NonLocal(C).double()
    for weight in module.parameters():
        nn.init.normal_(weight)  # N(0, 0.01²) would leave the weights nearly equal
    return module


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "non-local": NonLocal(C, embedded=False),
    "embedded": embedded(),
    "dot product": dot_product,
    "bilateral": bilateral,
    "bilateral, dot product": lambda x: bilateral(x, gaussian=False),
    "mean": mean,
    "median": median,
}
every = pytest.mark.parametrize("name", OPERATIONS)


def weighted(weights: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("nij,ncj->nci", weights, x.flatten(2)).view_as(x)


def test_non_local_means_are_softmax_weights_over_all_places() -> None:
    x = features()
    f = torch.einsum("nci,ncj->nij", x.flatten(2), x.flatten(2)) / C**0.5
    torch.testing.assert_close(OPERATIONS["non-local"](x), weighted(f.softmax(dim=2), x))
    module = embedded()
    q, k = module.theta(x).flatten(2), module.phi(x).flatten(2)
    f = torch.einsum("nci,ncj->nij", q, k) / (C // 2) ** 0.5
    torch.testing.assert_close(module(x), weighted(f.softmax(dim=2), x))


def test_dot_products_are_divided_by_the_number_of_places() -> None:
    x = features()
    f = torch.einsum("nci,ncj->nij", x.flatten(2), x.flatten(2)) / (H * W)
    torch.testing.assert_close(dot_product(x), weighted(f, x))


@pytest.mark.parametrize("gaussian", [True, False])
def test_bilateral_weights_run_over_the_window_inside_the_map(gaussian: bool) -> None:
    x = features()
    expected = torch.empty_like(x)
    for r in range(H):
        for s in range(W):
            window = x[:, :, max(r - 1, 0) : r + 2, max(s - 1, 0) : s + 2].flatten(2)
            f = torch.einsum("nc,ncj->nj", x[:, :, r, s], window)
            weights = (f / C**0.5).softmax(dim=1) if gaussian else f / window.shape[2]
            expected[:, :, r, s] = torch.einsum("nj,ncj->nc", weights, window)
    torch.testing.assert_close(bilateral(x, gaussian=gaussian), expected)


@pytest.mark.parametrize("size", [3, 5])
def test_median_and_mean_are_those_of_scipy(size: int) -> None:
    x = features()
    shape = (1, 1, size, size)
    middle = scipy.ndimage.median_filter(x.numpy(), size=shape, mode="nearest")
    np.testing.assert_allclose(median(x, size), middle)
    total, count = (
        scipy.ndimage.uniform_filter(v, size=shape, mode="constant")
        for v in (x.numpy(), np.ones(x.shape))
    )
    np.testing.assert_allclose(mean(x, size), total / count)


@every
def test_turning_the_map_turns_the_result(name: str) -> None:
    x, operation = features(), OPERATIONS[name]
    for turn in (lambda v: v.rot90(1, (2, 3)), lambda v: v.flip(3)):
        torch.testing.assert_close(operation(turn(x)), turn(operation(x)))


@pytest.mark.parametrize("name", ["non-local", "embedded", "dot product"])
def test_non_local_operations_know_no_places(name: str) -> None:
    x, shuffled = features(), torch.randperm(H * W)
    mixed = x.flatten(2)[:, :, shuffled].view_as(x)
    expected = OPERATIONS[name](x).flatten(2)[:, :, shuffled].view_as(x)
    torch.testing.assert_close(OPERATIONS[name](mixed), expected)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if "dot product" not in n])
def test_a_constant_map_stays_as_it_is(name: str) -> None:
    """Weights that sum to 1; those of the dot product do not."""
    x = torch.full((1, C, H, W), 0.7, dtype=torch.float64)
    torch.testing.assert_close(OPERATIONS[name](x), x)


@every
def test_a_new_block_is_the_identity_and_learns(name: str) -> None:
    x, operation = features(), OPERATIONS[name]
    block = Denoise(C, operation).double().train()
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.norm.weight.grad is not None and block.norm.weight.grad.any()
    block.norm.weight.data.fill_(1.0)
    assert not torch.allclose(block(x), x)


@every
def test_what_a_block_adds_is_normalized(name: str) -> None:
    x, block = features(), Denoise(C, OPERATIONS[name]).double().train()
    nn.init.ones_(block.norm.weight)
    added = (block(x) - x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(added.mean(dim=1), torch.zeros(C).double())
    spread = added.std(dim=1, correction=0)
    torch.testing.assert_close(spread, torch.ones(C).double(), atol=0.01, rtol=0)


@every
def test_no_images_are_no_trouble(name: str) -> None:
    """As when an attack has fooled all of them."""
    assert OPERATIONS[name](features()[:0]).shape == (0, C, H, W)


@every
def test_an_image_does_not_see_the_others(name: str) -> None:
    x = features(3)
    torch.testing.assert_close(OPERATIONS[name](x)[1:2], OPERATIONS[name](x[1:2]))


@every
def test_bfloat16_and_channels_last(name: str) -> None:
    x = features().float().contiguous(memory_format=torch.channels_last)
    block = Denoise(C, copy.deepcopy(OPERATIONS[name])).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.shape == x.shape and y.isfinite().all()


# Attention


def of_attention(places: int, d: int = 3, c: int = 4) -> list[Tensor]:
    g = torch.manual_seed(0)
    shapes = [(2, places, d), (2, places, d), (2, places, c)]
    return [torch.randn(*s, dtype=torch.float64, generator=g).requires_grad_() for s in shapes]


@pytest.mark.parametrize("few", [0, 256], ids=["fused", "written out"])
@pytest.mark.parametrize("d", [3, 4])
def test_both_ways_of_attention_are_the_literal_sum(
    few: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising, "FEW_PLACES", few)
    q, k, v = tensors = of_attention(9, d)
    weights = (torch.einsum("nid,njd->nij", q, k) / d**0.5).softmax(dim=2)
    expected = torch.einsum("nij,njc->nic", weights, v)
    ours = attention(q, k, v)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), tensors, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), tensors),
    )


@pytest.mark.parametrize("few", [0, 256], ids=["fused", "written out"])
def test_attention_is_rounded_to_bfloat16_under_autocast_and_no_further(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """θ and φ come in bfloat16 there, and the features as they are."""
    monkeypatch.setattr(denoising, "FEW_PLACES", few)
    x, module = features().float(), embedded().float()
    with torch.autocast("cpu", torch.bfloat16):
        ours = module(x)
    torch.testing.assert_close(ours.float(), module(x), atol=0.06, rtol=0.02)


def test_theta_and_phi_start_from_a_deviation_of_a_hundredth() -> None:
    torch.manual_seed(0)
    theta, phi = NonLocal(64).parameters()
    for weight in (theta, phi):
        assert weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert weight.mean().abs() < 1e-3
    assert not torch.equal(theta, phi)


class Largest(TorchDispatchMode):
    """Note the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.size = max(self.size, value.numel())
        return out


@pytest.mark.parametrize(("places", "held"), [(FEW_PLACES, True), (FEW_PLACES + 1, False)])
def test_many_places_are_never_paired_in_memory(places: int, held: bool) -> None:
    tensors = [t.detach().float().requires_grad_() for t in of_attention(places)]
    with Largest() as largest:
        torch.autograd.grad(attention(*tensors).square().sum(), tensors)
    assert (largest.size >= 2 * places**2) == held


def test_the_gradients_of_non_local_means_are_those_of_finite_differences() -> None:
    x = features(1)[:, :, :3, :3].requires_grad_()
    assert torch.autograd.gradcheck(embedded(), (x,))
