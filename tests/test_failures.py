"""How an attack fails: each sign fires on a network that was built to have the fault."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from defenses import fit
from defenses.adversarial import adversarial
from defenses.attacks import pgd
from defenses.data import ImageData, load_data
from defenses.diagnostics import attack_failures, masking_flags
from defenses.training import cross_entropy

BUDGET = {"eps": 0.3, "step_size": 0.03, "steps": 40}


class Brightness(nn.Module):
    """Two classes by a number that `says` makes of the mean pixel; its gradient is the mean's."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        lead = mean + (self.says(mean) - mean).detach()
        return torch.stack([-lead, lead], dim=1)

    def says(self, mean: Tensor) -> Tensor:
        return mean - 0.5


class Draws(Brightness):
    def says(self, mean: Tensor) -> Tensor:
        return mean - 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(len(x), 1)


class Window(Brightness):
    """The answer is wrong between 0.5 and 0.6 only: the climb passes through and goes on."""

    def says(self, mean: Tensor) -> Tensor:
        return torch.where((mean > 0.5) & (mean < 0.6), 0.1, -0.1)


class Far(Brightness):
    def says(self, mean: Tensor) -> Tensor:
        return mean - 2.0


def dark(n: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.full((n, 1, 4, 4), 0.4) + 0.01 * torch.rand(n, 1, 4, 4)
    return x, torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize(
    ("model", "budget", "expected"),
    [
        (Brightness(), BUDGET, (0, 0, 0)),
        (Draws(), BUDGET, (1, 0, 0)),
        (Window(), BUDGET, (0, 1, 0)),
        (Far(), BUDGET, (0, 0, 0)),  # withstands, and the climb has ended
        (Far(), BUDGET | {"step_size": 0.001}, (0, 0, 1)),
        (Far(), BUDGET | {"step_size": 0.02, "steps": 3}, (0, 0, 1)),
    ],
    ids=["none", "draws", "window", "far", "short steps", "few steps"],
)
def test_a_fault_raises_its_sign_and_no_other(
    model: nn.Module, budget: dict, expected: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    found = attack_failures(model, dark(), **budget, batch_size=7)
    assert [share.value for share in found.values()] == [*expected]
    flags = masking_flags(failures=found)
    assert [flag.raised for flag in flags] == [bool(each) for each in expected]
    assert "RAISED: the attack itself failed" in repr(flags) or not any(expected)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


@pytest.mark.parametrize("trained", ["clean", "on PGD"])
def test_a_network_without_a_fault_raises_none(trained: str, digits: ImageData) -> None:
    torch.manual_seed(0)
    width = digits.train_images[0].numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10))
    attack = partial(pgd, eps=0.1, step_size=0.05, steps=3, early_stop=False)
    loss = cross_entropy if trained == "clean" else adversarial(attack, share=1.0)
    fit(model, digits, epochs=5, loss=loss, progress=False)
    some = digits.test[0][:100], digits.test[1][:100]
    found = attack_failures(model, some, eps=0.1, step_size=0.01, steps=60)
    assert not [flag for flag in masking_flags(failures=found) if flag.raised], found
