"""The networks for ImageNet are those of the papers, take a step, and cost what is said."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50, vgg11

from defenses import attacks, imagenet
from defenses.data import ImageData
from defenses.denoising import Denoise, NonLocal
from defenses.evaluation import evaluate
from defenses.training import fit
from tests.measurements import PAPER

CLASSES = 20


def non_local(channels: int) -> nn.Module:
    return Denoise(channels, NonLocal(channels))


def images(size: int, count: int = 4) -> ImageData:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 3, size, size), generator=draw).to(torch.uint8)
    y = torch.arange(count) % CLASSES
    return ImageData("random", x, y, x, y, tuple(map(str, range(CLASSES))))


@pytest.mark.parametrize(
    ("make", "recipe", "size"),
    [
        (partial(imagenet.vgg11_compact, size=32, narrow=8, compact="all"), imagenet.like_vgg, 32),
        (
            partial(imagenet.resnet_denoising, 50, denoise=non_local, width=16),
            imagenet.like_xie,
            64,
        ),
        (partial(imagenet.resnet_denoising, 50, width=16), imagenet.like_kannan, 64),
    ],
    ids=["table 5", "R50 + denoising", "ALP at 64"],
)
def test_each_is_trained_and_attacked(
    make: Callable[..., nn.Sequential],
    recipe: Callable[[nn.Module], dict[str, Any]],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imagenet, "pgd", few_steps)
    torch.manual_seed(0)
    model, data = make(num_classes=CLASSES), images(size)
    how = recipe(model) | {"epochs": 4, "batch_size": 4}
    for group in how["optimizer"].param_groups:
        group["lr"] = 0.02
    history = fit(model, data, progress=False, **how)
    assert history[-1]["loss"] < history[0]["loss"]
    for attack in imagenet.tests(size).values():
        assert evaluate(model, data.test, attack).n == 4


def few_steps(*parts: Any, steps: int, **how: Any) -> Tensor:
    return attacks.pgd(*parts, steps=2, **how)


def test_recipes_follow_the_papers() -> None:
    with torch.device("meta"):
        model = imagenet.resnet_denoising(50)
    xie, kannan, vgg = (
        imagenet.like_xie(model),
        imagenet.like_kannan(model),
        imagenet.like_vgg(model),
    )
    assert xie["optimizer"].defaults["nesterov"]
    assert {*xie["schedule"].milestones} == {35, 70, 95} and xie["epochs"] == 110
    assert kannan["schedule"].gamma == 0.94 and vgg["epochs"] == 74
    names = [name for size in (64, 224) for name in imagenet.tests(size)]
    printed = pd.read_csv(PAPER / "adversarial_training.csv")
    assert {*printed[printed["table"].eq("imagenet")]["column"]} == {*names}


def test_vgg11_is_the_one_off_the_shelf() -> None:
    with torch.device("meta"):
        ours, theirs = imagenet.vgg11_compact(), vgg11()
    kept = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.ReLU, nn.Dropout)

    def described(net: nn.Module) -> list[str]:
        layers = (module for module in net.modules() if isinstance(module, kept))
        return [f"{type(m).__name__} {getattr(m, 'weight', torch.empty(0)).shape}" for m in layers]

    assert described(ours) == described(theirs)


def test_the_compact_one_is_compact_in_every_layer() -> None:
    with torch.device("meta"):
        model = imagenet.vgg11_compact(compact="all")
    plain = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert not plain
    assert sum(type(m).__name__.startswith("Compact") for m in model.modules()) == 11


@pytest.mark.parametrize(("depth", "blocks"), [(50, 16), (152, 50)])
def test_four_blocks_stand_behind_the_four_stages(depth: int, blocks: int) -> None:
    with torch.device("meta"):
        model = imagenet.resnet_denoising(depth, denoise=non_local)
    names = [name for name, _ in model.named_children()]
    for stage, channels in ((2, 256), (3, 512), (4, 1024), (5, 2048)):
        place = names.index(f"res{stage}")
        assert names[place + 1] == f"denoise{stage}"
        assert model.state_dict()[f"denoise{stage}.convolution.weight"].shape[0] == channels
    assert sum(type(m).__name__ == "Bottleneck" for m in model.modules()) == blocks


def test_without_blocks_it_is_torchvisions() -> None:
    torch.manual_seed(0)
    ours = imagenet.resnet_denoising(50).eval()
    theirs = resnet50(zero_init_residual=True).eval()
    weights = zip(ours.state_dict().values(), theirs.state_dict(), strict=True)
    theirs.load_state_dict({name: value for value, name in weights})
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x - 0.5))


def test_new_blocks_change_nothing() -> None:
    torch.manual_seed(0)
    plain = imagenet.resnet_denoising(50, 10, width=16).eval()
    model = imagenet.resnet_denoising(50, 10, non_local, width=16).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("denoise") for name in missing)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


def test_targets_are_wrong_classes() -> None:
    seen: list[tuple[Tensor, bool]] = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, **how: Any) -> Tensor:
        seen.append((how["target"], how.get("random_start", True)))
        return x

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    x, y = torch.rand(64, 3, 2, 2), torch.arange(64) % 5
    torch.manual_seed(0)
    aimed = imagenet.at_random(attack)
    for _ in range(200):
        aimed(model, x, y)
    targets = torch.stack([target for target, _ in seen])
    assert ((targets - y) % 5).unique().tolist() == [1, 2, 3, 4]
    assert 20 <= sum(not start for _, start in seen) <= 60  # a fifth starts at the images
    imagenet.at_random(attack, clean=0, seed=1)(model, x, y)
    imagenet.at_random(attack, clean=0, seed=1)(model, x, y)
    assert torch.equal(seen[-1][0], seen[-2][0]) and seen[-1][1]
    imagenet.at_least_likely(attack)(model, x, y)
    z = model(x).detach()
    chosen = z.gather(1, seen[-1][0][:, None]).squeeze(1)
    assert (seen[-1][0] != y).all()
    assert (chosen == z.scatter(1, y[:, None], torch.inf).amin(1)).all()


def test_a_step_costs_what_is_known_of_resnet_50() -> None:
    def make(size: int) -> nn.Module:
        return imagenet.resnet_denoising(50)

    cost = imagenet.step_cost(make)
    forward = 2 * 4.089e9  # torchvision's documentation gives 4.09 G multiplications
    first = 2 * 64 * 112**2 * 147  # whose gradient to the pixels training does not need
    assert cost.flops == pytest.approx(3 * forward - first, rel=0.01)
    assert cost.weight_bytes == 3 * 4 * 25_557_032
    attacked = imagenet.step_cost(make, steps=30)
    assert attacked.flops == pytest.approx(cost.flops + 30 * 2 * forward, rel=0.01)
    assert imagenet.Cost(1e9, 0, 0).hours(36, 1e12) == pytest.approx(36 * 1_281_167 / 3.6e6)


def test_what_is_kept_for_the_way_back_is_counted() -> None:
    def two(size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * size**2, 2))

    cost = imagenet.step_cost(two, 10)
    pixels, maps = 3 * 100, 8 * 100
    assert 4 * (pixels + maps) <= cost.image_bytes <= 4 * (pixels + maps) + 200
    assert cost.flops == 2 * (2 * 8 * 3 * 100) + 3 * (2 * 800 * 2)
