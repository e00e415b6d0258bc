"""What a step of adversarial training costs, and what the denoising block's attention costs.

An attack of k steps and the step of training that follows are 1 + k passes; the price is set beside
1 + k plain steps of the same network. Steps take turns as in `test_training_speed`.
"""

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.adversarial import adversarial, adversarial_logit_pairing, trades
from defenses.attacks import pgd
from defenses.denoising import Denoise, NonLocal, attention
from defenses.models import mnist_tutorial
from defenses.training import Loss, cross_entropy
from tests.benchmarks.test_batchout_speed import fitting
from tests.benchmarks.test_jacobian_speed import beside
from tests.benchmarks.test_training_speed import BATCH, DEVICE, Note, in_turns, ratio, threads

TURNS, STEPS, AT_MOST = 5, 10, 1.1
PGD = partial(pgd, eps=0.3, step_size=0.075, steps=STEPS, early_stop=False)
LOSSES: dict[str, Loss] = {
    "plain": cross_entropy,
    "PGD": adversarial(PGD, share=1.0),
    "TRADES": trades(PGD),
    "ALP": adversarial_logit_pairing(PGD),
}


def trainer(loss: Loss, denoise: bool) -> Callable[[Tensor, Tensor], None]:
    """Return a step as `fit` takes it."""
    torch.manual_seed(0)
    blocks = {f"pool{i}": Denoise(c, NonLocal(c)) for i, c in ((1, 32), (2, 64)) if denoise}
    model = mnist_tutorial(dropout=0.0, behind=blocks)
    model.to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    return fitting(model, loss, torch.optim.Adam(model.parameters(), 1e-4))


@pytest.mark.parametrize("denoise", [False, True], ids=["", "denoising"])
@pytest.mark.parametrize("count", [1, 2])
def test_adversarial_training_costs_no_more_than_its_passes(
    count: int, denoise: bool, note: Note
) -> None:
    x = torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,), device=DEVICE)
    kinds = {k: v for k, v in LOSSES.items() if k in ("plain", "PGD") or not denoise}
    with threads(count) as clock:
        steps = {name: partial(trainer(loss, denoise), x, y) for name, loss in kinds.items()}
        seconds = in_turns(steps, clock, TURNS)
        seconds["plain"] = [(1 + STEPS) * s for s in seconds["plain"]]
        blocks = ", with denoising" * denoise
        print(f"\n{BATCH} images, {STEPS} steps{blocks}, {DEVICE}, {count} threads")
        for name, taken in seconds.items():
            step = 1000 * statistics.median(taken)
            print(f"{name:>8} {step:8.1f} ms, {ratio(taken, seconds['plain']):5.3f} of the passes")
            if name != "plain":
                what = f"a step of {name}-{STEPS}{blocks}, beside {1 + STEPS} plain steps"
                note(beside(what, seconds, name, "plain", AT_MOST * (name == "PGD"), BATCH))
    assert ratio(seconds["PGD"], seconds["plain"]) <= AT_MOST


def unequal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, as one would call it: q and k narrower than v."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


@pytest.mark.parametrize("count", [1, 2])
def test_our_attention_is_no_slower_than_pytorchs(count: int, note: Note) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(BATCH, 196, width, generator=generator).to(DEVICE, torch.bfloat16)
        for width in (16, 16, 32)
    ]
    q, k, v = (t.requires_grad_() for t in tensors)

    def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            y = attend(q, k, v)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    with threads(count) as clock:
        runs = {"ours": partial(run, attention), "PyTorch's": partial(run, unequal)}
        seconds = in_turns(runs, clock, 3 * TURNS)
        print(f"\nAttention, {BATCH} maps of 14 × 14, bfloat16, {DEVICE}, {count} threads")
        for name, taken in seconds.items():
            print(f"{name:>10} {1000 * statistics.median(taken):7.2f} ms")
        note(beside("our attention, beside PyTorch's", seconds, "ours", "PyTorch's", 1.0, BATCH))
    assert ratio(seconds["ours"], seconds["PyTorch's"]) <= 1.0
