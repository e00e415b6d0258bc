"""The device path, without a GPU: all that takes tensors runs on a simulated accelerator.

Where there is a GPU, the same runs there. `costs` counts what the host asks the device for: a step
of training asks nothing, and a step of an attack at most once.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils._pytree import tree_leaves

from defenses import attacks, boundary, diagnostics, evaluate, evaluation, fit, models, training
from defenses.adversarial import (
    adversarial,
    adversarial_logit_pairing,
    clean_logit_pairing,
    drawn_radius,
    logit_squeezing,
    mixed_batch,
    trades,
)
from defenses.attacks.losses import margin
from defenses.batchout import BatchOut, mixup, to_noise
from defenses.compact import CompactConv2d, CompactLinear
from defenses.data import ImageData, crop_and_flip, gaussian_noise
from defenses.denoising import Denoise, NonLocal, bilateral, dot_product, mean, median
from defenses.jacobian import input_gradient_penalty, jacobian_penalty
from defenses.prototype import (
    NearestPrototype,
    Prototypes,
    confusion,
    joint,
    prototype_conformity,
)
from defenses.training import Loss, cross_entropy, label_smoothing
from tests import accelerator

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else accelerator.NAME
SIZE, CLASSES, BATCH = 12, 5, 8

pytestmark = pytest.mark.skipif(
    DEVICE == accelerator.NAME and not accelerator.AVAILABLE,
    reason="this PyTorch can simulate no device",
)
counted = pytest.mark.skipif(DEVICE == "cuda", reason="only the simulated device counts")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device exists, both compute in float32, and AutoAttack is a short one."""
    monkeypatch.setattr(training, "rounded", lambda device: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    shorter = {"STEPS": 4, "TARGETS": 2, "SAMPLES": 2, "QUERIES": 10}
    for name, number in shorter.items():
        monkeypatch.setattr(sys.modules["defenses.attacks.autoattack"], name, number)
    with ExitStack() as stack:
        if DEVICE == accelerator.NAME:
            stack.enter_context(accelerator.simulated())
        yield


def network(*head: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, *(head or [nn.Dropout(0.2), nn.Linear(16, CLASSES)]))


def images(count: int = BATCH) -> tuple[Tensor, Tensor]:
    """Images, and the labels that the network gives to all but the first of them."""
    x = torch.randint(256, (count, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    x = x / 255
    with torch.no_grad():
        y = network().eval()(x).argmax(dim=1)
    y[0] = (y[0] + 1) % CLASSES
    return x, y


def data(count: int = 2 * BATCH) -> ImageData:
    x, y = images(count)
    split = (255 * x).round().byte(), y
    return ImageData("random", *split, *split, classes=tuple("abcde"))


def agree(found: Any, expected: Any) -> None:
    """Of the same form and, where the device draws the CPU's numbers, the same to rounding."""
    leaves, others = tree_leaves(found), tree_leaves(expected)
    assert len(leaves) == len(others)
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            leaf, other = leaf.detach().cpu(), other.detach()
            assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
            assert leaf.isnan().sum() == other.isnan().sum()
        if DEVICE == accelerator.NAME:
            torch.testing.assert_close(leaf, other, rtol=1e-4, atol=1e-5, equal_nan=True)


# Attacks

FAR: dict[str, Any] = {"eps": 0.3, "step_size": 0.05, "steps": 4}


def misses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loss of one's own."""
    return margin(model(x), y)


ATTACKS: dict[str, Attack] = {
    "FGSM": partial(attacks.fgsm, eps=0.1),
    "FGSM, targeted": lambda model, x, y: attacks.fgsm(
        model, x, y, eps=0.1, target=(y + 1) % CLASSES
    ),
    "BIM": partial(attacks.bim, **FAR),
    "MIM": partial(attacks.mim, **FAR),
    "PGD": partial(attacks.pgd, **FAR, seed=0, restarts=2),
    "PGD, all steps": partial(attacks.pgd, **FAR, seed=0, early_stop=False),
    "PGD, DLR": partial(attacks.pgd, **FAR, random_start=False, loss="dlr"),
    "PGD, a loss of one's own": partial(attacks.pgd, **FAR, random_start=False, loss=misses),
    "APGD": partial(attacks.apgd, eps=0.1, steps=8, seed=0),
    "APGD, L2": partial(attacks.apgd, eps=0.5, norm="l2", steps=8, seed=0),
    "APGD, L1": partial(attacks.apgd, eps=2.0, norm="l1", steps=8, seed=0),
    "FAB": partial(attacks.fab, steps=4, targets=2),
    "FAB, L2": partial(attacks.fab, norm="l2", steps=4, targets=2, eps=1.0),
    "DDN": partial(attacks.ddn, steps=8),
    "FMN": partial(attacks.fmn, steps=8),
    "FMN, L2": partial(attacks.fmn, norm="l2", steps=8),
    "FMN, L1": partial(attacks.fmn, norm="l1", steps=8),
    "PDPGD": partial(attacks.pdpgd, steps=8),
    "σ-zero": partial(attacks.sigma_zero, steps=8),
    "Square": partial(attacks.square, eps=0.1, queries=20, seed=0),
    "Square, L2": partial(attacks.square, eps=1.0, norm="l2", queries=20, seed=0),
    "C&W": partial(attacks.carlini_wagner, c=1.0, binary_search_steps=3, steps=20),
    "C&W, second": partial(
        attacks.carlini_wagner, c=1.0, binary_search_steps=2, steps=20, target="second"
    ),
    "DeepFool": partial(attacks.deepfool, steps=5),
    "DeepFool, within d": partial(attacks.deepfool, steps=5, max_residue_ratio=0.05),
    "JSMA": partial(attacks.jsma, theta=0.3, steps=4, target="next"),
    "JSMA, any class": partial(attacks.jsma, theta=0.3, steps=4),
    "JSMA, single pixels": partial(
        attacks.jsma, theta=-1.0, steps=25, pixels_per_step=1, output="logits", revisit=False
    ),
    "AutoAttack": partial(attacks.autoattack, eps=0.05),
    "AutoAttack, L2": partial(attacks.autoattack, eps=0.5, norm="l2"),
    "AutoAttack, rand": partial(attacks.autoattack, eps=0.05, version="rand"),
    "EOT of PGD": partial(attacks.eot(attacks.pgd, 2), **FAR, seed=0),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_finds_on_the_device_what_it_finds_on_the_cpu(name: str) -> None:
    model, (x, y) = network(), images()
    expected = ATTACKS[name](model, x, y)
    assert not expected.equal(x)
    found = ATTACKS[name](model.to(DEVICE), x.to(DEVICE), y.to(DEVICE))
    assert found.device.type == DEVICE
    agree(found, expected)


@pytest.mark.parametrize("name", ["PGD", "APGD", "FAB", "Square", "C&W", "DeepFool", "JSMA"])
def test_an_attack_runs_on_the_device_under_autocast(name: str) -> None:
    model, (x, y) = network().to(DEVICE), images()
    with torch.autocast(DEVICE, torch.bfloat16):
        x_adv = ATTACKS[name](model, x.to(DEVICE), y.to(DEVICE))
    assert x_adv.device.type == DEVICE
    assert not x_adv.cpu().equal(x)


def test_an_autoattack_on_the_device_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model, (x, y) = network(), images()
    report = partial(attacks.autoattack_report, eps=0.05, batch_size=BATCH // 2)
    expected = report(model, x, y)
    model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
    for _ in range(2):
        found = report(model, x, y, checkpoint=tmp_path / "attack.pt")
        assert found.x_adv.device.type == DEVICE
        assert found.broken_by == expected.broken_by or DEVICE == "cuda"
        agree(found.x_adv, expected.x_adv)


def test_a_substitute_is_trained_on_the_device() -> None:
    oracle, (x, _) = network(), images()
    how: dict[str, Any] = {"substitute": network(nn.Linear(16, CLASSES)), "rounds": 2, "epochs": 2}
    expected = attacks.train_substitute(oracle, x, **how)
    how["substitute"] = how["substitute"].to(DEVICE)
    found = attacks.train_substitute(oracle.to(DEVICE), x.to(DEVICE), **how)
    agree(found.state_dict(), expected.state_dict())


# Objectives


def with_batchout(**options: Any) -> Callable[[], nn.Module]:
    return lambda: network(BatchOut(**options), nn.Linear(16, CLASSES))


def with_denoising(operation: Callable[[], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3, stride=2), Denoise(4, operation()), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(100, CLASSES))

    return make


def compact() -> nn.Module:
    torch.manual_seed(0)
    layers = [CompactConv2d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, CompactLinear(16, CLASSES))


def smooth() -> nn.Module:
    """A network that is no product of matrices, so that its Jacobian is autograd's."""
    return network(nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, CLASSES))


def with_prototypes(released: bool = False) -> Prototypes:
    branch = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    taps: dict[str, tuple[nn.Module, int]] = {"1": (branch, 4), "3": (nn.Identity(), 16)}
    return Prototypes(network(), taps, CLASSES, released)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained, on what, and the options of `fit`."""

    loss: Loss = cross_entropy
    model: Callable[[], nn.Module] = network
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


PGD = partial(attacks.pgd, eps=0.3, step_size=0.1, steps=3, early_stop=False)
CRAFTED = partial(attacks.deepfool, candidates=4, steps=3)
NOISY = {"augment": gaussian_noise}

OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": Objective(),
    "cropped and flipped": Objective(options={"augment": crop_and_flip}),
    "label smoothing": Objective(label_smoothing(0.1)),
    "compact": Objective(model=compact),
    "compact, smoothed": Objective(label_smoothing(0.1), compact),
    "FGSM": Objective(adversarial(partial(attacks.fgsm, eps=0.3))),
    "FGSM, smoothed": Objective(
        adversarial(partial(attacks.fgsm, eps=0.3), loss=label_smoothing(0.1)), compact
    ),
    "FGSM, half of the batch": Objective(mixed_batch(partial(attacks.fgsm, eps=0.3), 0.5)),
    "PGD": Objective(adversarial(PGD, share=1)),
    "PGD, drawn radius": Objective(adversarial(drawn_radius(PGD, 0.0, 0.3), share=1)),
    "TRADES": Objective(trades(drawn_radius(PGD, 0.3, 0.3))),
    "ALP": Objective(adversarial_logit_pairing(PGD)),
    "plain + ALP": Objective(adversarial_logit_pairing(PGD, share=0.0)),
    "CLP": Objective(clean_logit_pairing(), options=NOISY),
    "LSQ": Objective(logit_squeezing(0.1), options=NOISY),
    "DeepFool, a fifth of the batch": Objective(mixed_batch(CRAFTED, 0.2)),
    "input gradient": Objective(input_gradient_penalty()),
    "Jacobian": Objective(jacobian_penalty(0.1)),
    "Jacobian, as printed": Objective(jacobian_penalty(0.1, form="root sum")),
    "Jacobian, few images": Objective(jacobian_penalty(0.1, images=3)),
    "Jacobian, one projection": Objective(
        jacobian_penalty(0.03, form="mean square", projections=1)
    ),
    "Jacobian, of the features": Objective(
        jacobian_penalty(0.1, layer="features", projections=4, images=5)
    ),
    "Jacobian, by autograd": Objective(jacobian_penalty(0.1), smooth),
    "Jacobian, on FGSM": Objective(
        mixed_batch(partial(attacks.fgsm, eps=0.3), 0.2, jacobian_penalty(0.1))
    ),
    "BatchOut": Objective(model=with_batchout()),
    "BatchOut, η drawn": Objective(model=with_batchout(draw="sample")),
    "BatchOut, η drawn once": Objective(model=with_batchout(draw="batch")),
    "BatchOut, noise": Objective(model=with_batchout(direction=to_noise)),
    "BatchOut, gradient not stopped": Objective(model=with_batchout(stop_gradient=False)),
    "mixup": Objective(mixup()),
    "manifold mixup": Objective(mixup(layers=(0, 1, 4))),
    "prototypes": Objective(prototype_conformity(0.1), with_prototypes),
    "prototypes, released": Objective(
        prototype_conformity(0.03), partial(with_prototypes, released=True)
    ),
    "prototypes, PGD": Objective(
        adversarial(partial(PGD, loss=joint), loss=prototype_conformity(0.1)), with_prototypes
    ),
    "denoising": Objective(adversarial(PGD, share=1), with_denoising(partial(NonLocal, 4))),
    "denoising, not embedded": Objective(
        model=with_denoising(partial(NonLocal, 4, embedded=False))
    ),
    "denoising, dot product": Objective(model=with_denoising(lambda: dot_product)),
    "denoising, bilateral": Objective(model=with_denoising(lambda: bilateral)),
    "denoising, mean": Objective(model=with_denoising(lambda: mean)),
    "denoising, median": Objective(model=with_denoising(lambda: median)),
}


def trained(
    objective: Objective, data: ImageData, epochs: int = 1, **options: Any
) -> tuple[nn.Module, list[dict[str, float]]]:
    model = objective.model().to(data.train_images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    options |= {"schedule": MultiStepLR(optimizer, [1]), "optimizer": optimizer}
    options |= {"batch_size": BATCH, "progress": False, **objective.options}
    return model, fit(model, data, epochs=epochs, loss=objective.loss, **options)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_on_the_device_ends_with_the_cpus_weights(name: str) -> None:
    objective = OBJECTIVES[name]
    expected, history = trained(objective, data())
    found, past = trained(objective, data().to(DEVICE))
    agree(found.state_dict(), expected.state_dict())
    agree([row["loss"] for row in past], [row["loss"] for row in history])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_on_the_device_goes_on_from_a_checkpoint(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer]
) -> None:
    def train(epochs: int, file: Path | None) -> tuple[nn.Module, list[dict[str, float]]]:
        model = network().to(DEVICE)
        steps = optimizer(model.parameters(), lr=0.01)  # type: ignore[call-arg]
        options: dict[str, Any] = {"optimizer": steps, "batch_size": BATCH, "progress": False}

        def probe(model: nn.Module) -> dict[str, float]:
            return {"accuracy": float(evaluate(model, data().to(DEVICE).test))}

        return model, fit(
            model, data().to(DEVICE), epochs=epochs, probe=probe, checkpoint=file, **options
        )

    whole, _ = train(2, None)
    train(1, tmp_path / "run.pt")
    resumed, history = train(2, tmp_path / "run.pt")
    assert [row["epoch"] for row in history] == [1, 2]
    for weight, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert weight.device.type == DEVICE
        assert weight.detach().cpu().equal(other.detach().cpu())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "mnist_compact": (partial(models.mnist_compact, compact="all", norm="lrn"), (1, 28, 28)),
    "mnist_tutorial": (partial(models.mnist_tutorial, fixed_head=True), (1, 28, 28)),
    "mnist_fast": (models.mnist_fast, (1, 28, 28)),
    "mnist_batchout": (models.mnist_batchout, (1, 28, 28)),
    "mnist_six": (models.mnist_six, (1, 28, 28)),
    "lenet": (models.lenet, (1, 28, 28)),
    "cifar_four_sets": (partial(models.cifar_four_sets, widths=(4, 8, 8, 8)), (3, 32, 32)),
    "cifar_batchout": (models.cifar_batchout, (3, 32, 32)),
    "resnet110": (partial(models.resnet110, blocks=1), (3, 32, 32)),
    "resnet_denoising": (
        partial(models.resnet_denoising, blocks=1, denoise=lambda c: Denoise(c, NonLocal(c))),
        (3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_the_chapters_takes_a_step_on_the_device(name: str) -> None:
    make, shape = NETWORKS[name]
    gradients = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = make().to(device)
        x, y = torch.rand(2, *shape).to(device), torch.arange(2, device=device)
        cross_entropy(model.train(), x, y).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    agree(gradients[1], gradients[0])


# What looks at a model

MEASURES: dict[str, Callable[[nn.Sequential, Tensor, Tensor], Any]] = {
    "evaluate": lambda model, x, y: evaluate(model, (x, y), ATTACKS["FGSM"]).correct,
    "epsilon_curve": lambda model, x, y: [
        accuracy.correct
        for accuracy in evaluation.epsilon_curve(model, (x, y), attacks.fgsm, [0.0, 0.1]).values()
    ],
    "transfer_matrix": lambda model, x, y: [
        accuracy.correct
        for accuracy in evaluation.transfer_matrix(
            {"a": model, "b": compact().to(x.device)}, (x, y), ATTACKS["FGSM"]
        ).values()
    ],
    "perturbations": lambda model, x, y: fields(
        evaluation.perturbations(model, (x, y), ATTACKS["DeepFool"])
    ),
    "boundary": lambda model, x, y: fields(boundary.measure(model, (x, y))),
    "boundary, by autograd": lambda model, x, y: fields(
        boundary.measure(smooth().to(x.device), (x, y))
    ),
    "zero_gradient_share": lambda model, x, y: fields(
        diagnostics.zero_gradient_share(model, (x, y))
    ),
    "loudness": lambda model, x, y: [
        outcome.value for outcome in diagnostics.loudness(model, (x, y))
    ],
    "layer_slopes": lambda model, x, y: diagnostics.layer_slopes(model.eval(), x),
    "reach": lambda model, x, y: diagnostics.reach(
        lambda model, x: model(x), model.eval(), x, y, eps=0.1, steps=3
    ),
    "feature_noise": lambda model, x, y: diagnostics.feature_noise(model, x, x.flip(3)),
    "loss_surface": lambda model, x, y: diagnostics.loss_surface(
        model, x[:1], y[:1], (torch.ones_like(x[:1]), -x[:1]), radius=0.1, points=3
    ),
    "activations": lambda model, x, y: models.activations(model.eval(), x, "1"),
    "step_seconds": lambda model, x, y: len(training.step_seconds({"a": model}, x, y, repeats=1)),
    "confusion": lambda model, x, y: confusion(with_prototypes().to(x.device), x, y),
    "nearest prototype": lambda model, x, y: NearestPrototype(
        with_prototypes().to(x.device).eval(), "3"
    )(x),
}


def fields(outcome: Any) -> list[Any]:
    values = (getattr(outcome, field.name) for field in dataclasses.fields(outcome))
    return [value for value in values if not isinstance(value, str)]


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_says_on_the_device_what_it_says_on_the_cpu(name: str) -> None:
    x, y = images()
    expected = MEASURES[name](network(), x, y)
    agree(MEASURES[name](network().to(DEVICE), x.to(DEVICE), y.to(DEVICE)), expected)


# What the host asks


class Firm(nn.Module):
    """A network that calls everything class 0, by a lead that no attack takes from it."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.passes = network(nn.Linear(16, CLASSES)), 0
        self.register_buffer("lead", 50.0 * torch.eye(CLASSES)[0])

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.network(x) + self.lead


def stepping(attack: Callable[..., Tensor], name: str = "steps", **options: Any) -> Any:
    return lambda steps: partial(attack, **{name: steps}, **options)


SHORT: dict[str, Any] = {"eps": 0.3, "step_size": 0.001}
STEPPING: dict[str, Callable[[int], Attack]] = {
    "BIM": stepping(attacks.bim, **SHORT),
    "MIM": stepping(attacks.mim, **SHORT),
    "PGD": stepping(attacks.pgd, **SHORT, seed=0),
    "PGD, all steps": stepping(attacks.pgd, **SHORT, seed=0, early_stop=False),
    "APGD": stepping(attacks.apgd, eps=0.3, seed=0),
    "APGD, L2": stepping(attacks.apgd, eps=2.0, norm="l2", seed=0),
    "APGD, L1": stepping(attacks.apgd, eps=5.0, norm="l1", seed=0),
    "FAB": stepping(attacks.fab, targets=1),
    "FAB, within ε": stepping(attacks.fab, targets=1, eps=0.1),
    "DDN": stepping(attacks.ddn),
    "FMN": stepping(attacks.fmn),
    "FMN, L2": stepping(attacks.fmn, norm="l2"),
    "FMN, L1": stepping(attacks.fmn, norm="l1"),
    "PDPGD": stepping(attacks.pdpgd),
    "σ-zero": stepping(attacks.sigma_zero),
    "Square": stepping(attacks.square, "queries", eps=0.3, seed=0),
    "Square, L2": stepping(attacks.square, "queries", eps=2.0, norm="l2", seed=0),
    "C&W": stepping(attacks.carlini_wagner, c=1.0, binary_search_steps=1),
    "DeepFool": stepping(attacks.deepfool, overshoot=0.0),
    "JSMA": stepping(attacks.jsma, theta=0.05, target="next"),
    "JSMA, single pixels": stepping(attacks.jsma, theta=0.05, pixels_per_step=1),
}
STEPS = 10


def questions(run: Callable[[], object]) -> Counter[str]:
    """What the host asks the simulated device for while this runs."""
    with accelerator.simulated() as counter:
        run()
    return counter.count


def of_attack(make: Callable[[int], Attack]) -> tuple[float, float]:
    """What the host asks in a step, and once in a call; both without an image that falls."""
    asked, passes = [], []
    for steps in (STEPS, 2 * STEPS):
        model, (x, _) = Firm().to(accelerator.NAME), images()
        given = model, x.to(accelerator.NAME), torch.zeros(len(x), dtype=torch.int64)
        given = *given[:2], given[2].to(accelerator.NAME)
        asked.append(questions(partial(make(steps), *given)).total())
        passes.append(model.passes)
    assert passes[1] >= passes[0] + STEPS, "it did not take its steps"
    step = (asked[1] - asked[0]) / STEPS
    return step, asked[0] - STEPS * step


def of_objective(objective: Objective) -> tuple[float, float]:
    """What the host asks in a step of `fit`, and once in an epoch."""
    asked = []
    for steps in (2, 4):
        on_device, options = data(steps * BATCH).to(accelerator.NAME), objective.options
        model = objective.model().to(accelerator.NAME)
        run = partial(fit, model, on_device, epochs=1, loss=objective.loss, batch_size=BATCH)
        run(progress=False, **options)  # what is made once and kept
        asked.append(questions(partial(run, progress=False, **options)).total())
    step = (asked[1] - asked[0]) / 2
    return step, asked[0] - 2 * step


def costs() -> dict[str, tuple[float, float]]:
    """Of each attack and objective: questions a step, and questions a call or an epoch besides."""
    rows = {name: of_attack(make) for name, make in STEPPING.items()}
    return rows | {f"training: {name}": of_objective(one) for name, one in OBJECTIVES.items()}


# What a step may ask; once, unless said otherwise.
AT_MOST = {"DeepFool": 2, "JSMA": 3, "PGD, all steps": 0}
AT_MOST |= dict.fromkeys(["DDN", "FMN", "FMN, L2", "FMN, L1", "PDPGD", "σ-zero"], 0)
# An attack that drops images on its way asks in every step of training that it serves.
DROPS = "DeepFool, a fifth of the batch"


@counted
@pytest.mark.parametrize("name", STEPPING)
def test_a_step_of_an_attack_asks_the_host_at_most_once(name: str) -> None:
    step, call = of_attack(STEPPING[name])
    assert step <= AT_MOST.get(name, 1)
    assert call <= 12


@counted
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != DROPS])
def test_a_step_of_training_asks_the_host_nothing(name: str) -> None:
    step, epoch = of_objective(OBJECTIVES[name])
    assert step == 0
    assert epoch <= 2


def nan_at_all(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return attacks.fgsm(model, x * torch.nan, y, eps=0.1)


@pytest.mark.parametrize("wrong", [nan_at_all, lambda m, x, y: attacks.fgsm(m, x + 1, y, eps=0.1)])
def test_what_is_asked_once_an_epoch_is_still_raised(wrong: Attack) -> None:
    with pytest.raises(ValueError, match="images range from"):
        trained(Objective(adversarial(wrong, share=1)), data().to(DEVICE))


@counted
def test_the_simulator_refuses_a_cpu_tensor_and_counts_only_its_own() -> None:
    x, y = torch.rand(3), torch.rand(3).to(accelerator.NAME)
    with pytest.raises(RuntimeError, match="on sim and on cpu"):
        x + y
    assert questions(lambda: (x.sum().item(), y + 1, x[x > 0.5], torch.rand(2, device="sim"))) == {}
    asked = questions(lambda: (y.sum().item(), y[y > 0.5], y.nonzero(), y.cpu(), bool(y.any())))
    assert asked == {"_local_scalar_dense": 2, "mask": 1, "nonzero": 1, "copy": 1}
