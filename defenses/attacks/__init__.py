"""The attacks, one file a family; each is a pure function ``attack(model, x, y, *, …) -> x_adv``.

Images are float32 or float64 (N, C, H, W) in [0, 1], labels int64 (N,); the model maps images to
logits and normalizes inside. What all attacks promise stands in `defenses.attacks.contract`.
"""

from .apgd import apgd
from .autoattack import autoattack, autoattack_report
from .blackbox import square
from .carlini_wagner import carlini_wagner
from .ddn import ddn
from .deepfool import deepfool
from .expectation import bpda, eot
from .fab import fab
from .fmn import fmn
from .gradient import bim, fgsm, mim, pgd
from .pdpgd import pdpgd
from .saliency import jsma
from .sigma_zero import sigma_zero
from .substitute import train_substitute

__all__ = [
    "apgd",
    "autoattack",
    "autoattack_report",
    "bim",
    "bpda",
    "carlini_wagner",
    "ddn",
    "deepfool",
    "eot",
    "fab",
    "fgsm",
    "fmn",
    "jsma",
    "mim",
    "pdpgd",
    "pgd",
    "sigma_zero",
    "square",
    "train_substitute",
]
