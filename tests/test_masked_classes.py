"""A class that a model masks, with a logit of −inf, is never aimed at, and nobody is blamed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses import attacks, boundary, evaluate
from defenses.adversarial import divergence, trades
from defenses.attacks import jsma
from defenses.attacks.autoattack import autoattack_report
from defenses.attacks.contract import Forward
from defenses.attacks.fab import fab
from defenses.attacks.losses import (
    LOSSES,
    dlr,
    dlr_targeted,
    lead,
    margin,
    masked,
    runners_up,
    unmasked,
)
from tests.every_attack import EVERY, Attack, drawn, every_attack, shorten_autoattack

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_autoattack(monkeypatch)


class Masked(nn.Module):
    """A linear network of ten classes that says only some of them."""

    def __init__(self, open_: list[int], value: float = -torch.inf, how: str = "fill") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(192, 10)
        self.open, self.value, self.how = open_, value, how

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x.flatten(1))
        if self.how == "only":  # the same network without the other classes
            return z[:, self.open]
        closed = torch.ones(10, dtype=torch.bool)
        closed[self.open] = False
        if self.how == "add":
            return z + torch.zeros(10).masked_fill(closed, self.value)
        return z.masked_fill(closed, self.value)


def given(open_: list[int], n: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = Masked(open_).eval(), drawn(n)
    with torch.no_grad():
        return model, x, model(x).argmax(dim=1)


# With these the targeted attacks have the same order of classes with and without the others.
FIRST = {"seven": [*range(7)], "three": [0, 1, 2], "two": [0, 1], "one": [0]}


@pytest.mark.parametrize("how", ["fill", "add", "lowest"])
@pytest.mark.parametrize("name", ["seven", "three", "two"])
@every_attack
def test_every_attack_finds_what_it_finds_without_the_masked_classes(
    attack: Attack, name: str, how: str
) -> None:
    open_ = FIRST[name]
    model, x, y = given(open_)
    if how == "lowest":
        model = Masked(open_, LOWEST).eval()
    if how == "add":
        model = Masked(open_, how="add").eval()
    found = attack(model, x, y)
    assert found.isfinite().all()
    with torch.no_grad():
        z = model(found)
        assert not masked(z.gather(1, z.argmax(1, keepdim=True))).any()
    few = Masked(open_, how="only").eval()
    dlr_needs_more = len(open_) < 3 and "dlr" in str(attack)
    if not dlr_needs_more:
        torch.testing.assert_close(found, attack(few, x, y), rtol=0, atol=1e-4)


@every_attack
def test_where_every_other_class_is_masked_nothing_fools(attack: Attack) -> None:
    model, x, y = given(FIRST["one"])
    found = attack(model, x, y)
    assert found.isfinite().all()
    assert evaluate(model, (x, y), attack).value == 1


class Each(nn.Module):
    """Masks other classes for each image: those below its own fourth logit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Masked([], how="fill").layer

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x.flatten(1))
        least = 2 + (x.mean(dim=(1, 2, 3)) > 0.5).long()
        place = z.argsort(dim=1, descending=True).argsort(dim=1)
        return z.masked_fill(place > least[:, None], -torch.inf)


@every_attack
def test_a_mask_may_differ_from_image_to_image_and_no_image_depends_on_another(
    attack: Attack,
) -> None:
    model, x = Each().eval(), drawn(8)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    found = attack(model, x, y)
    assert found.isfinite().all()
    if any(name in str(attack) for name in ("random_start", "autoattack", "square")):
        return  # draws depend on the place in the batch
    if "pgd" not in str(attack) and "apgd" not in str(attack):
        alone = [attack(model, x[i : i + 1], y[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(torch.cat(alone), found[:3], rtol=0, atol=1e-4)


def test_autoattack_breaks_what_it_breaks_without_them_by_the_same_attacks() -> None:
    model, x, y = given(FIRST["seven"], 20)
    for eps in (0.002, 0.01):
        whole = autoattack_report(model, x, y, eps=eps)
        few = autoattack_report(Masked(FIRST["seven"], how="only").eval(), x, y, eps=eps)
        assert whole.broken_by == few.broken_by and "apgd-ce" in whole.broken_by
        assert torch.equal(whole.gradients, few.gradients)


def test_targets_are_the_open_classes_in_order() -> None:
    inf = torch.inf
    z = torch.tensor([[3.0, 2.0, -inf, 1.0], [3.0, -inf, -inf, -inf], [1.0, 2.0, 3.0, 4.0]])
    y = torch.tensor([0, 0, 3])
    assert runners_up(z, y, 3)[[0, 2]].tolist() == [[1, 3, 1], [2, 1, 0]]
    assert runners_up(z[:2], y[:2], 3)[0].tolist() == [1, 3]
    assert unmasked(z[:1], torch.tensor([[2, 3, 1]])).tolist() == [[3, 1]]
    assert unmasked(z[2:], torch.tensor([[2, 0, 1]])).tolist() == [[2, 0, 1]]


def test_the_losses_are_finite_and_their_gradients_too() -> None:
    for count in range(1, 10):
        z = torch.randn(4, 10, generator=torch.Generator().manual_seed(count))
        z = z.masked_fill(torch.arange(10) >= count, -torch.inf)
        y = torch.zeros(4, dtype=torch.int64)
        losses: dict[str, Callable[[Tensor], Tensor]] = {
            name: partial(loss, y=y) for name, loss in LOSSES.items()
        }
        if count > 1:
            losses["dlr to a target"] = partial(dlr_targeted, y=y, target=y + 1)
        for name, loss in losses.items():
            leaf = z.clone().requires_grad_()
            value = loss(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            assert not value.isnan().any() and not gradient.isnan().any(), (name, count)
            assert count == 1 or value.isfinite().all(), (name, count)


def test_dlr_of_few_classes_is_the_margin() -> None:
    z = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf], [3.0, 1.0, 0.0, -torch.inf]])
    y, target = torch.tensor([0, 0]), torch.tensor([1, 1])
    torch.testing.assert_close(dlr(z, y), torch.tensor([-2.0, -2 / 3]))
    torch.testing.assert_close(margin(z, y), torch.tensor([-2.0, -2.0]))
    torch.testing.assert_close(dlr_targeted(z, y, target), lead(z, y, target))


@pytest.mark.parametrize("value", [-torch.inf, LOWEST])
def test_deepfool_spends_no_gradient_on_them(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step looks at every open class but the image's own, and at no other."""
    asked: list[int] = []
    gradient = Forward.gradient

    def counted(self: Forward, value: Tensor, x: Tensor, **how: bool) -> Tensor:
        asked.append(len(x))
        return gradient(self, value, x, **how)

    monkeypatch.setattr(Forward, "gradient", counted)
    for name, open_ in {**FIRST, "all": [*range(10)]}.items():
        asked.clear()
        _, x, y = given(open_)
        attacks.deepfool(Masked(open_, value).eval(), x, y, steps=1)
        assert asked == [len(x)] * (len(open_) - 1), name


def test_jsma_passes_over_them_and_pays_for_none() -> None:
    model, x, y = given(FIRST["three"])
    sizes: list[int] = []
    model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    jsma(model, x, y, gamma=0.05)
    assert max(sizes) == 16  # two targets for each of eight images
    model, x, y = given([0, 3, 9])
    following = torch.tensor([{0: 3, 3: 9, 9: 0}[int(label)] for label in y])
    nxt, to = (jsma(model, x, y, gamma=0.3, target=t) for t in ("next", following))  # type: ignore[arg-type]
    assert torch.equal(nxt, to) and not torch.equal(nxt, x)


def test_a_target_that_is_masked_is_never_reached() -> None:
    model, x, y = given(FIRST["seven"])
    target = torch.full_like(y, 8)
    options: dict[str, Any] = {"eps": 0.1, "step_size": 0.05, "steps": 3, "target": target}
    for found in (
        attacks.pgd(model, x, y, **options, seed=0),
        attacks.carlini_wagner(model, x, y, steps=5, binary_search_steps=2, target=target),
        jsma(model, x, y, gamma=0.1, target=target),
    ):
        assert found.isfinite().all()
        with torch.no_grad():
            assert (model(found).argmax(dim=1) < 7).all()


def test_fab_reaches_the_nearest_open_boundary() -> None:
    """On a linear model in L2, the projection; a masked logit once pushed it out of reach."""
    model, x, y = given(FIRST["seven"])
    x = 0.4 + 0.2 * x
    with torch.no_grad():
        y = model(x).argmax(dim=1)
        z = model(x)
        w = model.get_parameter("layer.weight")
        gaps = (z.gather(1, y[:, None]) - z)[:, :7]
        slopes = (w[y][:, None] - w[None, :7]).norm(dim=2)
        nearest = (gaps / slopes).scatter(1, y[:, None], torch.inf).amin(dim=1)
    for value in (-torch.inf, LOWEST):
        found = fab(Masked(FIRST["seven"], value).eval(), x, y, norm="l2", steps=20)
        torch.testing.assert_close((found - x).flatten(1).norm(dim=1), nearest, rtol=0.02, atol=0)


def test_objectives_and_boundaries_count_them_as_never_said() -> None:
    model, x, y = given(FIRST["seven"])
    few = Masked(FIRST["seven"], how="only").eval()
    with torch.no_grad():
        far = x.flip(0)
        torch.testing.assert_close(divergence(model(x), model(far)), divergence(few(x), few(far)))
    attack = partial(attacks.pgd, eps=0.1, step_size=0.05, steps=2, seed=0, early_stop=False)
    values = [trades(attack)(m, x, y) for m in (model, few)]
    torch.testing.assert_close(*values)
    one, other = (boundary.measure(m, (x, y)) for m in (model, few))
    for name in ("margin", "first_order"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert EVERY  # the table of attacks is not empty
