"""Defenses in front of a network, and how an attack gets around them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from defenses.attacks import bpda, eot, pgd
from defenses.preprocessing import JPEG, ResizePad


def linear(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, classes))


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, linear()(x).argmax(1)


def test_a_white_image_is_shrunk_and_lies_anywhere() -> None:
    torch.manual_seed(0)
    layer, places = ResizePad(5), set()
    for _ in range(400):
        y = layer(torch.ones(2, 3, 8, 8))
        assert y.shape == (2, 3, 8, 8) and torch.equal(y[0], y[1])
        rows, columns = y[0, 0].nonzero(as_tuple=True)
        side = int(rows.max() - rows.min()) + 1
        assert side == int(columns.max() - columns.min()) + 1 and y.sum() == 6 * side**2
        places.add((side, int(rows.min()), int(columns.min())))
    assert {side for side, *_ in places} == {5, 6, 7}
    assert len(places) == 16 + 9 + 4  # every place of every size


@pytest.mark.parametrize("shape", [(1, 1, 8, 9), (1, 1, 5, 5)])
def test_images_that_cannot_be_shrunk_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected square images of more than 5"):
        ResizePad(5)(torch.zeros(shape))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_what_is_flat_and_loses_more_at_a_lower_quality(channels: int) -> None:
    gray = torch.full((2, channels, 16, 16), 100 / 255)
    assert torch.allclose(JPEG(90)(gray), gray, atol=1.5 / 255)
    noise = torch.rand(4, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    lost = [(JPEG(quality)(noise) - noise).norm() for quality in (95, 50, 5)]
    assert lost[0] < lost[1] < lost[2]
    assert JPEG(50)(noise.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="quality"):
        JPEG(0)


def test_bpda_gets_the_gradient_of_the_stand_in(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    net = nn.Sequential(nn.Flatten(), dense := nn.Linear(8 * 8, 2))
    model = nn.Sequential(jpeg := JPEG(100), net)

    def slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.requires_grad_()
        (found,) = torch.autograd.grad(model(x).sum(), x)
        return found

    expected = dense.weight.sum(0).reshape(1, 1, 8, 8).expand_as(x)
    assert torch.allclose(bpda(slope, JPEG)(model, x.clone(), y), expected)
    doubled = bpda(slope, JPEG, stand_in=lambda x: 2 * x)(model, x.clone(), y)
    assert torch.allclose(doubled, 2 * expected)
    forward = bpda(lambda model, x, y: model(x), JPEG)(model, x.clone(), y)
    assert torch.allclose(forward, model(x))  # what the network says stays what it is
    assert not jpeg._forward_hooks  # nothing is left behind


def test_without_it_the_gradient_stops(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model = nn.Sequential(JPEG(75), linear())
    with pytest.raises((ValueError, RuntimeError)):
        pgd(model, x, y, eps=0.3, step_size=0.1, steps=3)
    around = bpda(pgd, JPEG)(model, x, y, eps=0.3, step_size=0.1, steps=10)
    assert (model(around).argmax(1) != y).float().mean() > 0.9


def test_a_hook_is_removed_when_the_attack_fails_and_a_layer_has_to_be_there() -> None:
    model = nn.Sequential(jpeg := JPEG(75), linear())

    def fails(*_: object) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        bpda(fails, JPEG)(model, torch.zeros(1, 1, 8, 8), torch.zeros(1))
    assert not jpeg._forward_hooks
    with pytest.raises(ValueError, match="no layer"):
        bpda(pgd, ResizePad)(
            model, torch.zeros(1, 1, 8, 8), torch.zeros(1).long(), eps=0.1, step_size=0.1, steps=1
        )


def test_both_wrappers_work_together() -> None:
    """On layers that draw and have no gradient; the network asks whether an image is bright."""
    bright = nn.Linear(64, 2)
    with torch.no_grad():
        bright.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 64) / 64)
        bright.bias.copy_(torch.tensor([0.3, -0.3]))
    model = nn.Sequential(ResizePad(7), JPEG(90), nn.Flatten(), bright)
    x, y = torch.full((5, 1, 8, 8), 0.6), torch.ones(5, dtype=torch.long)
    both = eot(bpda(partial(pgd, step_size=0.1, steps=10), JPEG), samples=5)
    x_adv = both(model, x, y, eps=0.3)
    assert (x_adv - x).abs().max() <= 0.3 + 1e-6
    for _ in range(20):
        assert (model(x).argmax(1) == 1).all() and (model(x_adv).argmax(1) == 0).all()
