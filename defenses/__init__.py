"""Adversarial defenses, attacks on them, and an honest evaluation. The module behind the book."""

from . import attacks, models
from .data import ImageData, load_data
from .evaluation import evaluate
from .training import fit

__version__ = "0.1.0"
__all__ = ["ImageData", "attacks", "evaluate", "fit", "load_data", "models"]
