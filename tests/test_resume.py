"""A training goes on as it was asked for, or says what is another than it was."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import SWALR

from defenses import ImageData, attacks
from defenses.adversarial import adversarial
from defenses.data import crop_and_flip, gaussian_noise
from defenses.identity import described, layers, weights
from defenses.jacobian import jacobian_penalty
from defenses.training import cross_entropy, fit, label_smoothing
from tests.every_attack import drawn


def network(p: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 5)]
        return nn.Sequential(*parts)


def data(seed: int = 0) -> ImageData:
    x = (255 * drawn(24)).byte()
    y = torch.randint(5, (24,), generator=torch.Generator().manual_seed(seed))
    return ImageData("random", x, y, x, y, tuple("abcde"))


def sgd(parameters: Any, **options: Any) -> SGD:
    return SGD(parameters, **{"lr": 0.1, "momentum": 0.9} | options)


def run(
    file: Path | None,
    epochs: int,
    make: Callable[[Any], Optimizer] = sgd,
    schedule: Callable[[Any], LRScheduler] | None = None,
    model: nn.Module | None = None,
    on: ImageData | None = None,
    **how: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Train; return the rate of each epoch that was run and the weights."""
    model = model or network()
    optimizer, rates = make(model.parameters()), []
    times = schedule(optimizer) if schedule else None
    options: dict[str, Any] = {"batch_size": 12, "loss": cross_entropy} | how

    def probe(model: nn.Module) -> dict[str, float]:
        rates.append(optimizer.param_groups[0]["lr"])
        return {}

    fit(
        model,
        on or data(),
        epochs=epochs,
        optimizer=optimizer,
        schedule=times,
        checkpoint=file,
        probe=probe,
        progress=False,
        **options,
    )
    return [*rates, optimizer.param_groups[0]["lr"]], model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# Schedules

Make = Callable[..., LRScheduler]


def _sequence(optimizer: Any, after: int = 2) -> LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warm, CosineAnnealingLR(optimizer, 6)], [after])


def _chain(optimizer: Any, gamma: float = 0.9) -> LRScheduler:
    parts = [
        lr_scheduler.ConstantLR(optimizer, 0.5, 3),
        lr_scheduler.ExponentialLR(optimizer, gamma),
    ]
    return lr_scheduler.ChainedScheduler(parts)


def _scaled(optimizer: Any, by: float = 0.5) -> LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: by**epoch)


def _multiplied(optimizer: Any, by: float = 0.5) -> LRScheduler:
    return lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: by)


class Falling:
    """A schedule with a value of its own."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, epoch: int) -> float:
        return self.by**epoch


def _object(optimizer: Any, by: float = 0.5) -> LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, Falling(by))


def _cycle(optimizer: Any, **options: Any) -> LRScheduler:
    return lr_scheduler.CyclicLR(optimizer, 0.01, **{"max_lr": 0.1, "step_size_up": 2} | options)


def _own_cycle(optimizer: Any, by: float = 0.5) -> LRScheduler:
    return _cycle(optimizer, scale_fn=lambda x: by**x)


def _warm(optimizer: Any, **options: Any) -> LRScheduler:
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, **{"T_0": 2} | options)


def _plateau(optimizer: Any, **options: Any) -> LRScheduler:
    return lr_scheduler.ReduceLROnPlateau(optimizer, **{"patience": 0, "threshold": 0.9} | options)


# Each schedule of torch with an option, and what it would be otherwise.
SCHEDULES: dict[str, tuple[Make, dict[str, Any], dict[str, Any]]] = {
    "StepLR": (lr_scheduler.StepLR, {"step_size": 2}, {"step_size": 3}),
    "StepLR gamma": (lr_scheduler.StepLR, {"step_size": 2}, {"step_size": 2, "gamma": 0.5}),
    "MultiStepLR": (MultiStepLR, {"milestones": [1, 3]}, {"milestones": [1, 4]}),
    "ConstantLR": (lr_scheduler.ConstantLR, {"factor": 0.5}, {"factor": 0.4}),
    "LinearLR": (lr_scheduler.LinearLR, {"total_iters": 3}, {"total_iters": 4}),
    "ExponentialLR": (lr_scheduler.ExponentialLR, {"gamma": 0.9}, {"gamma": 0.8}),
    "PolynomialLR": (lr_scheduler.PolynomialLR, {"total_iters": 6}, {"total_iters": 7}),
    "CosineAnnealingLR": (CosineAnnealingLR, {"T_max": 6}, {"T_max": 8}),
    "cosine's end": (CosineAnnealingLR, {"T_max": 6}, {"T_max": 6, "eta_min": 0.01}),
    "CosineAnnealingWarmRestarts": (_warm, {}, {"T_mult": 2}),
    "CyclicLR": (_cycle, {}, {"mode": "triangular2"}),
    "CyclicLR of one's own": (_own_cycle, {}, {"by": 0.4}),
    "OneCycleLR": (
        lr_scheduler.OneCycleLR,
        {"max_lr": 0.1, "total_steps": 8},
        {"max_lr": 0.1, "total_steps": 9},
    ),
    "ReduceLROnPlateau": (_plateau, {}, {"factor": 0.5}),
    "SequentialLR": (_sequence, {}, {"after": 3}),
    "ChainedScheduler": (_chain, {}, {"gamma": 0.8}),
    "LambdaLR": (_scaled, {}, {"by": 0.4}),
    "LambdaLR of an object": (_object, {}, {"by": 0.4}),
    "MultiplicativeLR": (_multiplied, {}, {"by": 0.4}),
    "SWALR": (SWALR, {"swa_lr": 0.05}, {"swa_lr": 0.04}),
}


def test_every_schedule_of_torch_is_tried() -> None:
    classes = {
        name
        for name, thing in vars(lr_scheduler).items()
        if isinstance(thing, type) and issubclass(thing, LRScheduler)
    }
    tried = {name.split()[0] for name in SCHEDULES}
    assert classes - {"LRScheduler", "_LRScheduler"} <= tried


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    make, options, _ = SCHEDULES[name]
    schedule = functools.partial(make, **options)
    rates, whole = run(None, 6, schedule=schedule)
    assert len(set(rates)) > 1, "it does nothing"
    run(tmp_path / "a.pt", 3, schedule=schedule)
    resumed, final = run(tmp_path / "a.pt", 6, schedule=schedule)
    assert resumed == rates[3:] and same(final, whole)


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_schedule_is_refused_and_named(name: str, tmp_path: Path) -> None:
    make, options, others = SCHEDULES[name]
    run(tmp_path / "a.pt", 2, schedule=functools.partial(make, **options))
    content = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"a\.pt was written for another.*(schedule|group 0) .*was"
    ):
        run(tmp_path / "a.pt", 4, schedule=functools.partial(make, **others))
    with pytest.raises(ValueError, match=r"schedule was .*, is none"):
        run(tmp_path / "a.pt", 4)
    assert (tmp_path / "a.pt").read_bytes() == content


def test_the_plateau_is_that_of_the_mean_loss(tmp_path: Path) -> None:
    """A constant loss never falls: each epoch but the first divides the rate by ten."""

    def constant(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return 0 * model(x).sum() + 1

    rates, _ = run(None, 3, schedule=_plateau, loss=constant)
    assert rates == pytest.approx([0.1, 0.01, 0.001, 0.001])


def test_the_same_objects_go_on_in_the_same_process(tmp_path: Path) -> None:
    """As where a cell is interrupted and run again: their options are those of the last epoch."""
    _, whole = run(None, 6, schedule=lambda o: MultiStepLR(o, [1, 4]))
    model = network()
    optimizer = sgd(model.parameters())
    schedule = MultiStepLR(optimizer, [1, 4])
    for epochs in (2, 3, 6):
        fit(
            model,
            data(),
            epochs=epochs,
            batch_size=12,
            optimizer=optimizer,
            schedule=schedule,
            checkpoint=tmp_path / "a.pt",
            progress=False,
        )
    assert same(model.state_dict(), whole)
    resumed = run(tmp_path / "a.pt", 6, schedule=lambda o: MultiStepLR(o, [1, 4]))[1]
    assert same(resumed, whole)


# Options, groups, layers


def grouped(first: int, **options: Any) -> Callable[[Any], Optimizer]:
    def make(parameters: Any) -> Optimizer:
        every = [*parameters]
        return sgd([{"params": every[:first], **options}, {"params": every[first:], "lr": 0.01}])

    return make


OTHER_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "nesterov": (sgd, functools.partial(sgd, nesterov=True), "nesterov was False, is True"),
    "dampening": (sgd, functools.partial(sgd, dampening=0.1), "dampening was 0, is 0.1"),
    "weight decay": (sgd, functools.partial(sgd, weight_decay=0.1), "weight_decay was 0, is 0.1"),
    "maximize": (sgd, functools.partial(sgd, maximize=True), "maximize was False, is True"),
    "rate": (sgd, functools.partial(sgd, lr=0.2), "group 0 lr was 0.1, is 0.2"),
    "betas": (Adam, functools.partial(Adam, betas=(0.8, 0.999)), r"betas was \[0.9, 0.999\], is"),
    "eps": (Adam, functools.partial(Adam, eps=1e-6), "eps was 1e-08, is 1e-06"),
    "amsgrad": (Adam, functools.partial(Adam, amsgrad=True), "amsgrad was False, is True"),
    "kind": (Adam, AdamW, "optimizer was Adam, is AdamW"),
    "centered": (RMSprop, functools.partial(RMSprop, centered=True), "centered was False, is True"),
    "members": (grouped(1), grouped(2), "parameter 1.bias was .* in group 1, is .* in group 0"),
    "an option of a group": (grouped(1), grouped(1, lr=0.3), "group 0 lr was 0.1, is 0.3"),
    "number of groups": (sgd, grouped(1), "group 1 lr was None, is 0.01"),
}


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_another_option_is_refused_and_named(name: str, tmp_path: Path) -> None:
    make, other, message = OTHER_OPTIONS[name]
    _, whole = run(None, 3, make)
    run(tmp_path / "a.pt", 1, make)
    with pytest.raises(ValueError, match=f"another model or optimizer.*{message}"):
        run(tmp_path / "a.pt", 2, other)
    assert same(run(tmp_path / "a.pt", 3, make)[1], whole)


def frozen() -> nn.Sequential:
    model = network()
    model[1].bias.requires_grad_(False)
    return model


def with_buffer(size: int) -> nn.Sequential:
    model = network()
    model.register_buffer("kept", torch.zeros(size))
    return model


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (network, frozen, r"parameter 1\.bias was .* group 0, is .* group 0, frozen"),
        (network, lambda: network(0.5), r"layer 3 was Dropout\(p=0\.0.*is Dropout\(p=0\.5"),
        (
            network,
            lambda: nn.Sequential(*network(), nn.Identity()),
            "layer 5 was None, is Identity",
        ),
        (lambda: with_buffer(1), lambda: with_buffer(2), "another model: its buffers differ"),
    ],
    ids=["frozen", "dropout", "layer", "buffer"],
)
def test_another_model_is_refused_and_named(
    one: Any, other: Any, message: str, tmp_path: Path
) -> None:
    run(tmp_path / "a.pt", 1, model=one())
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.pt", 2, model=other())


def test_what_the_file_would_not_hold_is_refused_before_training(tmp_path: Path) -> None:
    """A loss that learns, beside the model."""
    extra = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="trains 1 tensors that are not the model's"):
        run(tmp_path / "a.pt", 1, lambda parameters: sgd([*parameters, extra]))
    assert not (tmp_path / "a.pt").exists()
    run(None, 1, lambda parameters: sgd([*parameters, extra]))


class Counting(nn.Module):
    """Keeps something besides weights: what ``get_extra_state`` is for."""

    def __init__(self, kind: Callable[[int], Any]) -> None:
        super().__init__()
        self.inner, self.kind, self.count = network(), kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return self.inner(x)

    def get_extra_state(self) -> Any:
        return self.kind(self.count)

    def set_extra_state(self, state: Any) -> None:
        self.count = int(state["count"] if isinstance(state, dict) else state)


@pytest.mark.parametrize(
    "kind", [int, torch.tensor, lambda n: {"count": n}], ids=["int", "tensor", "dict"]
)
def test_extra_state_is_kept(kind: Any, tmp_path: Path) -> None:
    whole = Counting(kind)
    run(None, 3, model=whole)
    run(tmp_path / "a.pt", 1, model=Counting(kind))
    resumed = Counting(kind)
    run(tmp_path / "a.pt", 3, model=resumed)
    assert resumed.count == whole.count == 6
    assert same(resumed.inner.state_dict(), whole.inner.state_dict())


def test_extra_state_that_no_file_can_hold_is_refused_before_training(tmp_path: Path) -> None:
    model = Counting(lambda n: Falling(n))
    before = {k: v.clone() for k, v in model.inner.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot hold what get_extra_state .* _extra_state"):
        run(tmp_path / "a.pt", 1, model=model)
    assert same(model.inner.state_dict(), before) and not (tmp_path / "a.pt").exists()


def test_autoattack_goes_on_with_a_model_of_extra_state(tmp_path: Path) -> None:
    model, other = Counting(lambda n: {"count": n}).eval(), Counting(lambda n: {"count": n}).eval()
    x, y = drawn(4), torch.arange(4)
    options: dict[str, Any] = {"eps": 0.01, "version": "rand", "checkpoint": tmp_path / "a.pt"}
    first = attacks.autoattack(model, x, y, **options)
    assert torch.equal(attacks.autoattack(model, x, y, **options), first)
    other.count = 1
    with pytest.raises(ValueError, match=r"another run.*weights was"):
        attacks.autoattack(other, x, y, **options)


def test_autoattack_refuses_another_model_of_the_same_weights(tmp_path: Path) -> None:
    one, other, x, y = network().eval(), network().eval(), drawn(4), torch.arange(4)
    other[2] = nn.ReLU()
    options: dict[str, Any] = {"eps": 0.01, "version": "rand", "checkpoint": tmp_path / "a.pt"}
    attacks.autoattack(one, x, y, **options)
    with pytest.raises(ValueError, match=r"layer 2 was Tanh\(\), is ReLU"):
        attacks.autoattack(other, x, y, **options)


# Data, loss, augmentation


def changed_data(part: str) -> ImageData:
    both = data()
    images, labels = both.train_images.clone(), both.train_labels.clone()
    if part == "pixels":
        images[3, 0, 2, 2] ^= 1
    else:
        labels[3] = (labels[3] + 1) % 5
    return dataclasses.replace(both, train_images=images, train_labels=labels)


@pytest.mark.parametrize("part", ["pixels", "labels"])
def test_other_images_or_labels_of_the_same_name_are_refused(part: str, tmp_path: Path) -> None:
    run(tmp_path / "a.pt", 1)
    with pytest.raises(ValueError, match=rf"another run \({part} was \w+, is \w+\)"):
        run(tmp_path / "a.pt", 2, on=changed_data(part))


WEIGHT = 1.0


def scaled(by: float) -> Any:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return by * cross_entropy(model, x, y)

    return loss


def by_default(by: float) -> Any:
    def loss(model: nn.Module, x: Tensor, y: Tensor, by: float = by) -> Tensor:
        return by * cross_entropy(model, x, y)

    return loss


def by_global(by: float) -> Any:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return WEIGHT * cross_entropy(model, x, y)

    globals()["WEIGHT"] = by
    return loss


class Scaled(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.by * cross_entropy(model, x, y)


class Weighted:
    def __init__(self, by: float) -> None:
        self.weights = torch.full((5,), by)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y, self.weights)

    def method(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self(model, x, y)


def taught(seed: int) -> Any:
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    return lambda m, x, y: nn.functional.mse_loss(m(x), teacher(x).detach())


def _one(eps: float) -> Any:
    return functools.partial(attacks.fgsm, eps=eps)


# One way each in which a loss can hold a value.
VALUES: dict[str, Callable[[float], Any]] = {
    "closure": scaled,
    "default": by_default,
    "global": by_global,
    "partial": lambda by: functools.partial(by_default(1.0), by=by),
    "module": Scaled,
    "object": Weighted,
    "method": lambda by: Weighted(by).method,
    "smoothing": lambda by: label_smoothing(by / 10),
    "penalty": jacobian_penalty,
    "penalty's own loss": lambda by: jacobian_penalty(0.1, loss=scaled(by)),
    "attack": lambda by: adversarial(_one(by / 10)),
    "share": lambda by: adversarial(_one(0.1), share=by / 2),
    "teacher": lambda by: taught(int(by)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_loss_of_other_values_is_refused_and_named(name: str, tmp_path: Path) -> None:
    make = VALUES[name]
    first = make(1.0)
    run(tmp_path / "a.pt", 1, loss=first)
    run(tmp_path / "a.pt", 2, loss=make(1.0))  # made anew, it is the same
    with pytest.raises(ValueError, match=r"another run.*loss was .*, is "):
        run(tmp_path / "a.pt", 3, loss=make(2.0))


def test_a_function_of_another_body_is_another_loss(tmp_path: Path) -> None:
    run(tmp_path / "a.pt", 1, loss=lambda m, x, y: 1.0 * cross_entropy(m, x, y))
    run(tmp_path / "a.pt", 2, loss=lambda m, x, y: 1.0 * cross_entropy(m, x, y))
    for other in (
        lambda m, x, y: 2.0 * cross_entropy(m, x, y),
        lambda m, x, y: 1.0 + cross_entropy(m, x, y),
    ):
        with pytest.raises(ValueError, match=r"another run.*loss was"):
            run(tmp_path / "a.pt", 3, loss=other)


class Counter:
    """What a notebook may hold beside its functions: something that changes while it runs."""

    def __init__(self) -> None:
        self.seen = 0


COUNTER, NETWORKS = Counter(), {"one": network()}


def test_a_loss_that_looks_at_what_changes_in_its_notebook_is_the_same(tmp_path: Path) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        COUNTER.seen += len(NETWORKS) + ("a" in {"a", "b", "c"})
        return cross_entropy(model, x, y)

    run(tmp_path / "a.pt", 1, loss=loss)
    NETWORKS["another"] = network()
    run(tmp_path / "a.pt", 2, loss=loss)
    assert COUNTER.seen


def test_words_are_the_same_in_another_process() -> None:
    """Whatever the order of sets there, and wherever its objects lie."""
    code = """
from functools import partial
from defenses.adversarial import adversarial, mixed_batch
from defenses.attacks import pgd
from defenses.identity import described
N, NAMES = 3, {"red", "green", "blue"}
def half(model, x, y): return x if N in {"a", "b", "c"} else y
class Own:
    def __init__(self): self.names, self.half = NAMES, half
attack = adversarial(partial(pgd, eps=0.1))
print(described([half, attack, mixed_batch(half), Own(), lambda x: x + N]))
"""
    command = [sys.executable, "-c", code]
    said = {
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    (text,) = said
    assert b"half" in text and b" at 0x" not in text


def test_a_loss_that_knows_its_model_is_the_same_however_the_model_starts(tmp_path: Path) -> None:
    for epochs in (1, 2):
        model = network()
        with torch.no_grad():
            model.get_parameter("1.bias").add_(epochs)

        def loss(m: nn.Module, x: Tensor, y: Tensor, own: nn.Module = model) -> Tensor:
            return cross_entropy(m, x, y) + 1e-3 * own.get_parameter("1.bias").square().sum()

        run(tmp_path / "a.pt", epochs, model=model, loss=loss)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, crop_and_flip),
        (crop_and_flip, None),
        (crop_and_flip, functools.partial(crop_and_flip, padding=2)),
        (crop_and_flip, gaussian_noise),
        (
            functools.partial(gaussian_noise, sigma=0.1),
            functools.partial(gaussian_noise, sigma=0.2),
        ),
    ],
    ids=["one is added", "it is dropped", "padding", "kind", "sigma"],
)
def test_another_augmentation_is_refused_and_named(one: Any, other: Any, tmp_path: Path) -> None:
    run(tmp_path / "a.pt", 1, augment=one)
    run(tmp_path / "a.pt", 2, augment=one)
    with pytest.raises(ValueError, match=r"another run.*augment was .*, is "):
        run(tmp_path / "a.pt", 3, augment=other)


def test_another_function_that_makes_the_same_of_the_first_batch_is_the_same_augmentation(
    tmp_path: Path,
) -> None:
    def again(x: Tensor, generator: torch.Generator) -> Tensor:
        return crop_and_flip(x, generator)

    _, whole = run(None, 3, augment=crop_and_flip)
    run(tmp_path / "a.pt", 1, augment=again)
    assert same(run(tmp_path / "a.pt", 3, augment=crop_and_flip)[1], whole)


# Words


def test_equal_things_have_equal_words_and_others_have_not() -> None:
    def held(value: Any) -> Any:
        return lambda: value

    pairs = [(1, 2), (1.0, 1), ("a", "b"), ([1], [2]), ({"a": 1}, {"a": 2}), ({1}, {2})]
    pairs += [(torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.ones(2).double())]
    pairs += [(torch.float32, torch.float64), (math.inf, -math.inf), (SGD, Adam), (None, False)]
    pairs += [(torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))]
    for one, other in pairs:
        for wrap in (lambda v: v, held, functools.partial(functools.partial, print)):
            assert described(wrap(one)) == described(wrap(one))
            assert described(wrap(one)) != described(wrap(other)), (one, other)
    assert described(cross_entropy) == "cross_entropy"
    assert described(label_smoothing(0.1)) == "label_smoothing.<locals>.loss(share=0.1)"


def test_what_holds_itself_or_much_is_described_in_few_words() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert described(ring) == "[1, a list]"
    text = described([*range(10_000)])
    assert len(text) < 400 and text != described([*range(9_999), 0])
    iterator = iter([1, 2])
    described(iterator)
    assert next(iterator) == 1  # nothing is drawn from it


def test_a_model_is_its_layers_its_weights_and_what_it_keeps_besides() -> None:
    model = network(0.25)
    assert layers(model)["3"] == "Dropout(p=0.25, inplace=False)"
    before = weights(model)
    model.register_buffer("hidden", torch.zeros(1), persistent=False)
    with_buffer = weights(model)
    model.get_buffer("hidden").add_(1)
    assert len({before, with_buffer, weights(model)}) == 3
