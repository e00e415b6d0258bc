"""Print by how many bytes the peak grew while one attack ran over CIFAR-sized images.

``python -m tests.benchmarks.memory ATTACK IMAGES``: a process of its own for each measurement,
because a process's peak never falls.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defenses import attacks
from defenses.evaluation import evaluate

BATCH = 100
ATTACKS: dict[str, dict[str, Any]] = {
    "pgd": {"eps": 8 / 255, "step_size": 2 / 255, "steps": 3, "early_stop": False},
    "deepfool": {"steps": 2},
    "carlini_wagner": {"binary_search_steps": 1, "steps": 3},
    "jsma": {"theta": 1.0, "gamma": 0.002, "target": "next"},
    "square": {"eps": 8 / 255, "queries": 5},
}


def resident(name: str) -> int:
    """VmRSS, the memory held now, or VmHWM, the most so far, in bytes.

    Not `getrusage`: what that calls the peak is inherited from whoever started the process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def network() -> nn.Module:
    """Small, so that what grows is the attack's."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, stride=4)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))


def growth(name: str, images: int) -> int:
    """Bytes by which `evaluate` of this attack raised the peak, the images themselves left out."""
    x = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
    model = network()
    with torch.no_grad():  # labels that every image starts with
        y = torch.cat([model(part / 255).argmax(dim=1) for part in x.split(BATCH)])
    attack = partial(getattr(attacks, name), **ATTACKS[name])
    before = resident("VmRSS")
    evaluate(model, (x, y), attack, batch_size=BATCH)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(growth(sys.argv[1], int(sys.argv[2])))
