"""Every attack that the package offers, with a budget that a test can afford."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses import attacks

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

NO_ATTACK = {"autoattack_report", "bpda", "eot", "train_substitute"}
BUDGET: dict[str, Any] = {"eps": 0.3, "step_size": 0.1, "steps": 5, "queries": 20, "seed": 0}
BUDGET |= {"binary_search_steps": 2, "c": 1.0, "gamma": 0.3}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "pgd": [{"early_stop": False}, {"loss": "dlr"}, {"restarts": 2}],
    "apgd": [{"norm": "l2"}, {"norm": "l1"}],
    "fab": [{"norm": "l2"}],
    "fmn": [{"norm": "l2"}, {"norm": "l1"}],
    "square": [{"norm": "l2"}],
    "jsma": [{"output": "logits"}, {"target": "next"}, {"pixels_per_step": 1}],
    "carlini_wagner": [{"target": "second"}],
    "autoattack": [{"version": "rand"}],
}


def _made() -> dict[str, Attack]:
    made: dict[str, Attack] = {}
    for name in attacks.__all__:
        if name in NO_ATTACK:
            continue
        attack = getattr(attacks, name)
        taken = inspect.signature(
            attacks.autoattack_report if name == "autoattack" else attack
        ).parameters
        budget = {option: value for option, value in BUDGET.items() if option in taken}
        for variant in [{}, *VARIANTS.get(name, [])]:
            words = " ".join([name, *map(str, variant.values())])
            made[words] = partial(attack, **budget | variant)
    return made


EVERY = _made()
every_attack = pytest.mark.parametrize("attack", EVERY.values(), ids=EVERY.keys())


def shorten_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = {"STEPS": 4, "TARGETS": 3, "SAMPLES": 3, "QUERIES": 10}
    for name, number in shorter.items():
        monkeypatch.setattr(sys.modules["defenses.attacks.autoattack"], name, number)


def like(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def drawn(n: int, channels: int = 3, size: int = 8, dtype: Any = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    return torch.rand(n, channels, size, size, generator=draw, dtype=torch.float64).to(dtype)
