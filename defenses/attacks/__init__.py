"""The attacks, one file a family; each is a pure function ``attack(model, x, y, *, …) -> x_adv``.

Images are float32 or float64 (N, C, H, W) in [0, 1], labels int64 (N,); the model maps images to
logits and normalizes inside. What all attacks promise stands in `defenses.attacks.contract`.
"""

from .deepfool import deepfool
from .gradient import bim, fgsm, mim, pgd

__all__ = ["bim", "deepfool", "fgsm", "mim", "pgd"]
