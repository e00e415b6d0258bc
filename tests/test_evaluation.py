"""Accuracies, distances, transfer and the signs of masking, on models whose answer is known."""

import dataclasses
import math
from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from defenses.attacks import deepfool, fgsm, pgd
from defenses.attacks.contract import relative_norm
from defenses.denoising import Denoise
from defenses.diagnostics import (
    ZeroGradients,
    feature_noise,
    loss_surface,
    loudness,
    masking_flags,
    zero_gradient_share,
)
from defenses.evaluation import (
    Accuracy,
    Perturbations,
    Share,
    accuracy_within,
    epsilon_curve,
    evaluate,
    mean_distance,
    median_size,
    perturbations,
    robustness,
    success,
    transfer_matrix,
    wilson,
    worst_case,
)


class Brightness(nn.Module):
    """Class 1 where the mean pixel exceeds the threshold: the robust radius is in plain sight."""

    def __init__(self, threshold: float = 0.5, slope: float = 1.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: Tensor) -> Tensor:
        s = self.slope * (x.mean(dim=(1, 2, 3)) - self.threshold)
        return torch.stack([-s, s], dim=1)


def gray(levels: list[float]) -> tuple[Tensor, Tensor]:
    """Uniform images of the given levels, labeled by whether they exceed a half."""
    level = torch.tensor(levels)
    return level.view(-1, 1, 1, 1).repeat(1, 1, 4, 4), (level > 0.5).long()


def accuracy(correct: int, n: int) -> Accuracy:
    return Accuracy(torch.arange(n) < correct)


# Intervals


def test_wilson_is_the_published_interval() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe, 1998, Table I)."""
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert wilson(20, 20)[1] == 1.0


@given(n=st.integers(1, 100_000), share=st.floats(0, 1))
def test_wilson_solves_its_equation_and_stays_in_range(n: int, share: float) -> None:
    """Both bounds p₀ satisfy |p − p₀| = z·√(p₀(1 − p₀)/n)."""
    k = round(share * n)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for bound in (low, high):
        distance = 1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
        assert abs(k / n - bound) == pytest.approx(distance, abs=1e-7)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(k, n)


def test_an_accuracy_reads_like_a_table() -> None:
    a = accuracy(8138, 10_000)
    assert repr(a) == "81.4% (80.6–82.1, n=10,000)"
    assert (a.value, a.percent, a.n, float(a)) == (0.8138, pytest.approx(81.38), 10_000, 0.8138)
    assert a.ci == wilson(8138, 10_000)
    with pytest.raises(ValueError, match="bool"):
        Accuracy(torch.zeros(3))


# Accuracy under attack


def test_evaluate_counts_image_by_image() -> None:
    model, split = Brightness(), gray([0.1, 0.4, 0.45, 0.55, 0.6, 0.9])
    assert evaluate(model, split).correct.tolist() == 6 * [True]
    attacked = evaluate(model, split, partial(fgsm, eps=0.07), batch_size=4)
    assert attacked.correct.tolist() == [True, True, False, False, True, True]
    wrong = evaluate(model, (split[0], 1 - split[1]))
    assert wrong.value == 0


def test_evaluate_takes_bytes_and_any_batch_size() -> None:
    model, (x, y) = Brightness(), gray([i / 255 for i in range(0, 255, 5)])
    bytes_ = (255 * x).round().to(torch.uint8)
    attack = partial(fgsm, eps=0.1)
    expected = evaluate(model, (x, y), attack).correct
    for batch_size in (1, 7, 51, 500):
        found = evaluate(model, (bytes_, y), attack, batch_size=batch_size).correct
        assert torch.equal(found, expected)
    assert found.device.type == "cpu" and found.dtype == torch.bool


def test_evaluate_judges_in_eval_mode_and_restores_the_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.99), nn.BatchNorm2d(1), Brightness(0.0)).train()
    model[1].eval()
    images, _ = gray([0.2, 0.3, 0.7, 0.8])
    assert evaluate(model, (images, torch.ones(4, dtype=torch.int64))).value == 1
    assert model[0].training and not model[1].training
    assert model[1].num_batches_tracked == 0


def test_evaluate_judges_in_full_precision() -> None:
    """bf16 rounds logits that differ by a thousandth to a tie."""
    layer = nn.Linear(16, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [1.001]]).repeat(1, 16))
    model = nn.Sequential(nn.Flatten(), layer)
    images, _ = gray([0.5, 0.6, 0.7])
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(model, (images, torch.ones(3, dtype=torch.int64))).value == 1


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda model, x, y: x + 1, r"\[0, 1\]"),
        (lambda model, x, y: x * torch.nan, r"\[0, 1\]"),
        (lambda model, x, y: x[:1], r"returned shape \(1, 1, 4, 4\), expected \(2, 1, 4, 4\)"),
    ],
)
def test_what_an_attack_returns_is_checked(attack, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Brightness(), gray([0.2, 0.8]), attack)


def test_nan_logits_are_not_counted() -> None:
    with pytest.raises(ValueError, match="NaN logits"):
        evaluate(Brightness(slope=math.nan), gray([0.2, 0.8]))


def test_an_epsilon_curve_falls_where_the_radii_say() -> None:
    split = gray([0.05, 0.25, 0.45, 0.55, 0.75, 0.95])
    curve = epsilon_curve(Brightness(), split, fgsm, [0.0, 0.1, 0.3, 0.5])
    assert {e: a.value for e, a in curve.items()} == {0.0: 1, 0.1: 4 / 6, 0.3: 2 / 6, 0.5: 0}


# Distances


def test_distances_are_those_to_the_boundary() -> None:
    """Images 0.45 and 0.75 of 16 pixels: DeepFool moves every pixel by 1.02·|level − 0.5|."""
    images, labels = gray([0.45, 0.75, 0.25])
    labels[2] = 1  # misclassified from the start
    found = perturbations(Brightness(), (images, labels), deepfool)
    torch.testing.assert_close(found.linf, torch.tensor([0.051, 0.255, 0.0]).double())
    torch.testing.assert_close(found.l2, 4 * found.linf)
    torch.testing.assert_close(
        found.relative, found.linf / torch.tensor([0.45, 0.75, 0.25]).double()
    )
    assert found.clean_correct.tolist() == [True, True, False]
    assert found.fooled.tolist() == [True, True, True]


def test_one_run_of_deepfool_answers_for_every_residue_ratio() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 4))
    images = torch.rand(60, 1, 4, 4)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[:5] = (labels[:5] + 1) % 4
    found = perturbations(model, (images, labels), deepfool)
    accuracies = []
    for d in (0.0, 0.05, 0.1, 0.2, 0.5):
        separate = evaluate(model, (images, labels), partial(deepfool, max_residue_ratio=d))
        assert torch.equal(accuracy_within(found, d).correct, separate.correct)
        accuracies.append(separate.value)
    assert accuracies[0] == 55 / 60
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < 0.5


def test_robustness_is_equation_9() -> None:
    ratios = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.0], dtype=torch.float64)
    found = Perturbations(
        l2=ratios,
        linf=ratios,
        relative=ratios,
        l0=ratios,
        clean_correct=torch.tensor([False, True, True, True, True]),
        fooled=torch.tensor([True, True, True, True, False]),
    )
    rho = robustness(found)
    assert rho.value == pytest.approx(0.15)  # the misclassified image counts as 0
    assert (rho.n, rho.unfooled) == (4, 1)  # the unfooled one is left out, and said
    half = 1.96 * math.sqrt(0.05 / 3) / 2  # sample deviation of 0, .1, .2, .3
    assert rho.ci == (pytest.approx(0.15 - half, abs=1e-4), pytest.approx(0.15 + half, abs=1e-4))
    assert repr(rho) == "0.150 (0.023–0.277, n=4, 1 unfooled)"
    with pytest.raises(ValueError, match="none of 5 images was fooled"):
        robustness(dataclasses.replace(found, fooled=torch.zeros(5, dtype=torch.bool)))
    assert success(found).correct.tolist() == [True, True, True, False]  # of those it had right
    assert mean_distance(found).value == pytest.approx(0.2)  # the misclassified image is left out
    assert (mean_distance(found, "l0").n, mean_distance(found).unfooled) == (3, 1)


def test_perturbations_count_the_inputs_that_differ() -> None:
    def three(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x.clone()
        x_adv[:, 0, 0, :3] = 0
        return x_adv

    found = perturbations(Brightness(), gray([0.4, 0.8]), three)
    assert found.l0.tolist() == [3, 3]
    assert found.linf.tolist() == pytest.approx([0.4, 0.8])


def test_robustness_of_a_plain_threshold() -> None:
    rho = robustness(perturbations(Brightness(), gray([0.4, 0.8]), deepfool))
    assert rho.value == pytest.approx(1.02 * (0.1 / 0.4 + 0.3 / 0.8) / 2, rel=1e-5)


def test_the_median_of_distances_and_its_interval() -> None:
    found = median_size(torch.tensor([5.0, 1.0, torch.inf, 2.0, 3.0, 9.0, 4.0]), "ab")
    assert (found.value, found.ci, found.n, found.unfooled) == (4.0, (1.0, math.inf), 7, 1)
    assert found.images == "ab" and found.sizes is not None and len(found.sizes) == 7
    assert median_size(torch.tensor([3.0, 1.0, 2.0, 10.0])).value == 2.5
    assert median_size(torch.arange(5.0)).ci == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="no images to take the median of"):
        median_size(torch.tensor([]))


@given(st.integers(6, 400))
def test_the_interval_of_a_median_is_the_narrowest_with_ninety_five_percent(n: int) -> None:
    low, high = (round(end) for end in median_size(torch.arange(n)).ci)  # order statistics
    heads = [math.comb(n, k) / 2**n for k in range(n + 1)]
    assert low == n - 1 - high
    assert sum(heads[low + 1 : high + 1]) >= 0.95 > sum(heads[low + 2 : high])


# Transfer and the worst case


def test_a_transfer_matrix_crafts_once_a_source() -> None:
    """Images moved over one model's threshold stay short of the other's."""
    models = {"at .5": Brightness(0.5), "at .6": Brightness(0.6)}
    images, labels = gray([0.45, 0.45, 0.3])
    crafted: list[nn.Module] = []

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        crafted.append(model)
        return deepfool(model, x, y)

    matrix = transfer_matrix(models, (images, labels), attack)
    assert crafted == list(models.values())
    assert {key: a.value for key, a in matrix.items()} == {
        ("at .5", "at .5"): 0,
        ("at .6", "at .5"): 1,
        ("at .5", "at .6"): 0,
        ("at .6", "at .6"): 0,
    }


def test_the_diagonal_of_the_transfer_matrix_is_the_white_box() -> None:
    models = {str(t): Brightness(t) for t in (0.4, 0.5)}
    split, attack = gray([0.1 * i for i in range(10)]), partial(fgsm, eps=0.12)
    matrix = transfer_matrix(models, split, attack, batch_size=3)
    for name, model in models.items():
        assert torch.equal(matrix[name, name].correct, evaluate(model, split, attack).correct)


def test_the_worst_case_is_taken_image_by_image() -> None:
    a, b = Accuracy(torch.tensor([True, True, False])), Accuracy(torch.tensor([True, False, True]))
    assert worst_case([a, b]).correct.tolist() == [True, False, False]
    assert worst_case(iter([a])).correct.tolist() == a.correct.tolist()
    for unequal in ([], [a, accuracy(1, 2)]):
        with pytest.raises(ValueError, match="same images"):
            worst_case(unequal)


# Signs of masking


def test_loudness_is_the_lead_and_the_share_that_float32_is_certain_of() -> None:
    leads = torch.tensor([1.0, 16.0, 18.0, 18.0])
    logits = torch.stack([leads, torch.zeros(4)], dim=1)
    wrong = torch.tensor([0, 0, 0, 1])  # the last is certain of the wrong class

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits[(3 * x[:, 0, 0, 0]).round().long()]

    lead, certain = loudness(Fixed(), (torch.linspace(0, 1, 4).view(4, 1, 1, 1), wrong))
    assert lead.value == pytest.approx(53 / 4)
    assert certain.correct.tolist() == [False, False, True, False]


def test_zero_gradients_are_counted_exactly() -> None:
    """Half of the images saturate cross-entropy in float32; none of them saturates the margin."""
    model, split = Brightness(slope=1000.0), gray([0.1, 0.49999, 0.50001, 0.9])
    share = zero_gradient_share(model, split)
    assert (share.images, share.pixels, share.n) == (0.5, 0.5, 4)
    for loss in ("ce", "margin"):
        assert zero_gradient_share(model, split, loss, batch_size=3).images == 0


def test_zero_pixels_are_counted_beside_zero_images() -> None:
    class LeftHalf(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :, :, :2])

    share = zero_gradient_share(LeftHalf(), gray([0.4, 0.6]))
    assert (share.images, share.pixels) == (0, 0.5)


def test_a_masked_defense_raises_the_flags_and_an_open_one_none() -> None:
    """Logits scaled by 10⁴ hide the gradient of cross-entropy and nothing else."""

    class Saturated(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e4

    split = gray([i / 40 for i in range(41) if i != 20])
    twin = transfer_matrix(
        {"defended": Saturated(), "plain": Brightness()}, split, partial(fgsm, eps=0.2)
    )["defended", "plain"]
    raised = {}
    for name, model in (("saturated", Saturated()), ("plain", Brightness())):
        run = partial(pgd, random_start=False, step_size=0.1, steps=10)
        flags = masking_flags(
            fgsm=evaluate(model, split, partial(fgsm, eps=0.2)),
            pgd=evaluate(model, split, partial(run, eps=0.2, loss="ce_textbook")),
            margin=evaluate(model, split, partial(run, eps=0.2, loss="margin")),
            transfer=twin,
            at_half=evaluate(model, split, partial(run, eps=0.5, loss="ce_textbook")),
            zero_gradients=zero_gradient_share(model, split),
        )
        raised[name] = [flag.sign for flag in flags if flag.raised]
    assert raised["plain"] == []
    assert raised["saturated"] == [
        "one step is stronger than many",
        "the margin loss is stronger than cross-entropy",
        "accuracy at ε = 0.5 is above chance",
        "the input gradient of whole images is exactly zero",
    ]


def test_each_flag_compares_its_two_numbers() -> None:
    low, high = accuracy(300, 1000), accuracy(500, 1000)
    near = accuracy(310, 1000)
    cases: list[tuple[dict[str, Any], tuple[float, float]]] = [
        ({"fgsm": low, "pgd": high}, (0.3, 0.5)),
        ({"margin": low, "pgd": high}, (0.3, 0.5)),
        ({"transfer": low, "pgd": high}, (0.3, 0.5)),
        ({"black_box": low, "margin": high}, (0.3, 0.5)),
        ({"at_half": low, "chance": 0.1}, (0.3, 0.1)),
        ({"zero_gradients": ZeroGradients(0.2, 0.3, 10)}, (0.2, 0.01)),
        ({"zero_gradients": Share(0.2, 10)}, (0.2, 0.01)),  # as a run reads it back
    ]
    for measured, numbers in cases:
        (flag,) = masking_flags(**measured)
        assert flag.raised and (flag.found, flag.compared_with) == numbers
        assert repr(flag).startswith("RAISED")
    calm: list[dict[str, Any]] = [
        {"fgsm": high, "pgd": low},
        {"fgsm": low, "pgd": near},  # within the noise
        {"transfer": near, "pgd": high, "margin": low},  # the strongest white-box counts
        {"at_half": accuracy(110, 1000), "chance": 0.1},
        {"zero_gradients": ZeroGradients(0.0, 0.3, 10)},
    ]
    for measured in calm:
        assert not any(
            flag.raised for flag in masking_flags(**measured) if "margin" not in flag.sign
        )
    assert masking_flags(fgsm=low) == []


# Features, and the surface of the loss


def layered() -> nn.Sequential:
    torch.manual_seed(0)
    layers = {"flat": nn.Flatten(), "one": nn.Linear(4, 3, bias=False)}
    layers |= {"drop": nn.Dropout(), "two": nn.Linear(3, 2, bias=False)}
    return nn.Sequential(OrderedDict(layers)).double()


def test_the_noise_behind_a_layer_is_relative_to_the_features() -> None:
    model, (x, x_adv) = layered().train(), torch.rand(2, 5, 1, 2, 2).double()
    one = model.get_parameter("one.weight")
    noise = feature_noise(model, x, x_adv)
    assert [*noise] == ["flat", "one", "drop", "two"] and model.training
    flat, moved = x.flatten(1), (x_adv - x).flatten(1)
    torch.testing.assert_close(noise["flat"], moved.norm(dim=1) / flat.norm(dim=1))
    expected = (moved @ one.T).norm(dim=1) / (flat @ one.T).norm(dim=1)
    torch.testing.assert_close(noise["one"], expected)
    assert torch.equal(noise["drop"], noise["one"])  # in eval mode
    before = noise["two"]
    one.data *= 3
    torch.testing.assert_close(feature_noise(model, x, x_adv)["two"], before)
    assert not any(behind.any() for behind in feature_noise(model, x, x).values())


def test_the_noise_behind_a_blocks_operation_is_looked_at_alone() -> None:
    block = Denoise(2, lambda maps: maps.mean((2, 3), keepdim=True).expand_as(maps)).eval()
    nn.init.ones_(block.norm.weight)
    x = torch.rand(3, 2, 4, 4) / 4 + 0.25
    x_adv = x.clone()
    x_adv[:, :, ::2] += 0.1  # the mean sees the half of it
    noise = feature_noise(nn.Sequential(OrderedDict(block=block)), x, x_adv)
    assert [*noise] == ["block.operation", "block"]
    means = x.mean((2, 3))
    torch.testing.assert_close(noise["block.operation"], 0.05 * 2**0.5 / means.norm(dim=1))
    behind = relative_norm(block(x_adv), block(x))
    torch.testing.assert_close(noise["block"], behind)


def test_the_surface_is_the_loss_over_two_directions() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().train()
    x, y = torch.full((1, 1, 2, 2), 0.5).double(), torch.tensor([1])
    u, v = torch.randn(2, 1, 1, 2, 2).double()
    seen = loss_surface(model, x, y, (u, v), radius=0.05, points=5)
    assert seen.shape == (5, 5) and model.training and not seen.requires_grad
    for i, a in enumerate((-0.05, -0.025, 0, 0.025, 0.05)):
        for j, b in enumerate((-0.05, -0.025, 0, 0.025, 0.05)):
            torch.testing.assert_close(seen[i, j], F.cross_entropy(model(x + a * u + b * v), y))
    leads = loss_surface(model, x, y, (u, v), radius=0.05, loss="margin")
    assert leads.shape == (41, 41)
    z = model(x)[0]
    torch.testing.assert_close(leads[20, 20], torch.maximum(z[0], z[2]) - z[1])
    far = loss_surface(model, x, y, (100 * u.sign(), 0 * v), radius=1.0, points=3)
    torch.testing.assert_close(far[2], F.cross_entropy(model(u.sign().clamp(min=0)), y).expand(3))
