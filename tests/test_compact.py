"""Compact layers against the equation written out: unfold, normalize, multiply."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

from defenses.compact import CompactConv2d, CompactLinear, patch_norm

GEOMETRIES = [  # kernel, stride, padding
    (3, 1, 0),
    (3, 1, 1),
    (3, 2, 1),
    (2, 3, 0),  # the stride skips pixels
    (3, 1, 2),  # padded by more than half the kernel
    ((2, 3), (2, 1), (0, 2)),
    (1, 2, 3),  # patches that lie in the padding altogether
]


def literally(layer: CompactConv2d, x: Tensor) -> Tensor:
    """Eq. 6 as it is printed: every patch is copied out, normalized and multiplied."""
    patches = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)  # type: ignore[arg-type]
    patches = layer.alpha * patches / (patches.norm(dim=1, keepdim=True) + layer.delta)
    y = layer.weight.flatten(1) @ patches
    if layer.bias is not None:
        y = y + layer.bias[:, None]
    width = F.conv2d(x, layer.weight, None, layer.stride, layer.padding).shape[-1]
    return y.unflatten(-1, (-1, width))


def images(*shape: int, seed: int = 0, blank: bool = False) -> Tensor:
    """Draw float64 images; with `blank`, the upper half of each is zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if blank:
        x[..., : shape[-2] // 2 + 1, :] = 0
    return x


def convolution(*arguments: Any, seed: int = 0, **options: Any) -> CompactConv2d:
    torch.manual_seed(seed)
    layer = CompactConv2d(*arguments, **options).double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients of an arbitrary, fixed weighting of y."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [*grad((weights * y).sum(), inputs)]


# Eq. 6


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    return {
        "kernel_size": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": tuple(draw(st.integers(0, size)) for size in kernel),
        "in_channels": draw(st.integers(1, 5)),
        "out_channels": draw(st.integers(1, 5)),
        "bias": draw(st.booleans()),
    }


@settings(max_examples=150, deadline=None)
@given(geometries(), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_convolution_and_gradients_equal_the_equation_written_out(
    geometry: dict[str, Any], height: int, width: int, blank: bool, seed: int
) -> None:
    layer = convolution(**geometry, seed=seed)
    x = images(2, geometry["in_channels"], height, width, seed=seed, blank=blank).requires_grad_()
    (kh, kw), (ph, pw) = geometry["kernel_size"], geometry["padding"]
    if height + 2 * ph < kh or width + 2 * pw < kw:
        with pytest.raises(ValueError, match=r"no patch of .* fits into images of"):
            layer(x)
        return
    inputs = [x, *layer.parameters()]
    torch.testing.assert_close(layer(x), literally(layer, x))
    ours, theirs = (gradients(y, inputs) for y in (layer(x), literally(layer, x)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
def test_patch_norm_is_the_norm_of_each_unfolded_patch(
    kernel: Any, stride: Any, padding: Any
) -> None:
    x = images(2, 3, 8, 7, blank=True)
    r = patch_norm(x, kernel, stride, padding)
    expected = F.unfold(x, kernel, padding=padding, stride=stride).norm(dim=1)
    torch.testing.assert_close(r.flatten(1), expected)
    assert r.shape[1] == 1


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
def test_first_and_second_derivatives_are_right(kernel: Any, stride: Any, padding: Any) -> None:
    x = images(1, 2, 5, 6).requires_grad_()
    layer = convolution(2, 2, kernel, stride, padding)
    parameters = [*layer.parameters()]

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        names = dict(zip(dict(layer.named_parameters()), values, strict=True))
        return torch.func.functional_call(layer, names, x)

    if math.prod(kernel if isinstance(kernel, tuple) else (kernel,)) == 1:  # blank patches: below
        x, stride, padding = x + 3, 1, 0
    assert gradcheck(apply, (x, *parameters))
    assert gradgradcheck(apply, (x, *parameters))


def test_the_linear_layer_is_the_equation_with_the_input_as_patch() -> None:
    torch.manual_seed(0)
    layer = CompactLinear(6, 4, alpha=4.0).double()
    x = images(5, 6).requires_grad_()
    expected = 4 * x / (x.norm(dim=1, keepdim=True) + 0.01) @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert gradcheck(layer, x) and gradgradcheck(layer, x)
    torch.testing.assert_close(layer(x[:, None])[:, 0], expected)  # more dimensions, as nn.Linear


# What the normalization is for


@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0, 1e4])
def test_without_delta_the_scale_of_an_image_does_not_matter(factor: float) -> None:
    layer, x = convolution(3, 4, 3, padding=1, delta=1e-12), images(2, 3, 6, 6)
    torch.testing.assert_close(layer(factor * x), layer(x))


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_an_output_lies_within_alpha_times_the_largest_singular_value(factor: float) -> None:
    layer = convolution(3, 5, 3, alpha=2.5)
    assert layer.bias is not None
    y = layer(factor * images(4, 3, 9, 9)) - layer.bias[:, None, None]
    bound = 2.5 * torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    assert y.norm(dim=1).max() <= bound
    direction = torch.linalg.svd(layer.weight.flatten(1)).Vh[0].view(1, 3, 3, 3)
    reached = (layer(1e9 * direction) - layer.bias[:, None, None]).norm()
    torch.testing.assert_close(reached, bound)  # so no smaller bound would do


def test_the_l2_softmax_head_is_eq_1() -> None:
    torch.manual_seed(0)
    head = CompactLinear(8, 3, alpha=16.0, delta=1e-12, learn_alpha=False).double()
    features, y = images(5, 8), torch.tensor([0, 1, 2, 0, 1])
    exponents = 16 * features / features.norm(dim=1, keepdim=True) @ head.weight.T + head.bias
    chosen = exponents[torch.arange(5), y].exp() / exponents.exp().sum(dim=1)
    torch.testing.assert_close(F.cross_entropy(head(features), y), -chosen.log().mean())
    assert not head.alpha.requires_grad


# Blank patches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_blank_image_gives_the_bias_and_finite_gradients(dtype: torch.dtype) -> None:
    layer = convolution(2, 3, 3, padding=1).to(dtype)
    x = torch.zeros(2, 2, 5, 5, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert layer.bias is not None
    torch.testing.assert_close(y, layer.bias[:, None, None].expand_as(y))
    for derivative in gradients(y, [x, *layer.parameters()]):
        assert derivative.isfinite().all()


def test_the_gradient_at_a_blank_patch_is_its_limit() -> None:
    layer = convolution(2, 3, 3, padding=1)
    blank = torch.zeros(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    # y = alpha W x / (|x| + delta) tends to (alpha / delta) W x
    limit = layer.alpha / layer.delta * F.conv2d(blank, layer.weight, padding=1)
    (ours,), (expected,) = gradients(layer(blank), [blank]), gradients(limit, [blank])
    torch.testing.assert_close(ours, expected)
    near = (1e-9 * images(1, 2, 5, 5)).requires_grad_()
    torch.testing.assert_close(gradients(layer(near), [near])[0], ours, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_finite_at_blank_patches() -> None:
    for layer, shape in (
        (convolution(2, 3, 3, padding=1), (1, 2, 5, 5)),
        (CompactLinear(4, 3).double(), (2, 4)),
    ):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        (first,) = grad(layer(x).square().sum(), x, create_graph=True)
        assert all(g.isfinite().all() for g in grad(first.sum(), [x, *layer.parameters()]))


# As a layer among others


def test_exactly_alpha_is_added_to_the_plain_layers_parameters() -> None:
    for compact, plain in (
        (CompactConv2d(2, 3, 3), nn.Conv2d(2, 3, 3)),
        (CompactConv2d(2, 3, 3, bias=False), nn.Conv2d(2, 3, 3, bias=False)),
        (CompactLinear(2, 3, learn_alpha=False), nn.Linear(2, 3)),
    ):
        shapes = {name: value.shape for name, value in plain.state_dict().items()}
        assert {n: v.shape for n, v in compact.state_dict().items()} == shapes | {"alpha": ()}
        assert isinstance(compact, type(plain))
    assert CompactConv2d(2, 3, 3).alpha.requires_grad
    assert CompactConv2d(2, 3, 3, alpha=1).alpha.dtype == torch.float32


@pytest.mark.parametrize("delta", [0.0, -0.01, math.nan])
def test_a_delta_that_does_not_protect_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=rf"delta must be positive.*{delta}"):
        CompactConv2d(1, 1, 3, delta=delta)
    with pytest.raises(ValueError, match="delta must be positive"):
        CompactLinear(1, 1, delta=delta)


def test_bfloat16_stays_close_to_float32() -> None:
    layer = convolution(16, 32, 3, padding=1).float()
    x = images(4, 16, 12, 12).float().abs().requires_grad_()
    inputs = [x, *layer.parameters()]
    exact, expected = layer(x), gradients(layer(x), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)
    for ours, theirs in zip(gradients(rounded.float(), inputs), expected, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_norms_are_summed_in_float32() -> None:
    ones = torch.ones(1, 1, 20, 20, dtype=torch.bfloat16)
    assert patch_norm(ones, 20).item() == 20  # bfloat16 stops counting at 256
    assert patch_norm(ones.double(), 3).dtype == torch.float64


def test_channels_last_stays_channels_last() -> None:
    layer = CompactConv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            y = layer(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        (slope,) = grad(y.float().square().sum(), x)
        assert slope.is_contiguous(memory_format=torch.channels_last)


def test_jacobians_by_transforms_equal_a_loop_over_classes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        CompactConv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), CompactLinear(12, 4)
    ).double()
    x = images(3, 1, 5, 5).requires_grad_()
    logits = model(x)
    looped = torch.stack([grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in range(4)])
    chosen = torch.eye(4, dtype=x.dtype)[:, None].expand(4, 3, 4)
    (batched,) = grad(logits, x, chosen, is_grads_batched=True)
    torch.testing.assert_close(batched, looped)

    def one(image: Tensor) -> Tensor:
        return model(image[None])[0]

    by_image = torch.func.vmap(torch.func.jacrev(one))(x.detach())
    torch.testing.assert_close(by_image.transpose(0, 1), looped)


def test_an_attack_through_frozen_weights_still_gets_its_gradient() -> None:
    layer = convolution(1, 2, 3).requires_grad_(False)
    x = images(1, 1, 4, 4).requires_grad_()
    assert grad(layer(x).sum(), x)[0].abs().sum() > 0


def test_a_single_image_is_taken_as_by_the_plain_layer() -> None:
    layer, x = convolution(2, 3, 3), images(1, 2, 6, 6)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
