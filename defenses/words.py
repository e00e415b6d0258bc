"""What the store's short keys are called where a reader meets them."""

import re
from fractions import Fraction

DATA = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "imagenet": "ImageNet",
    "imagenet64": "ImageNet, 64 pixels",
}

METRICS = {
    "accuracy": "accuracy, %",
    "share": "share, %",
    "fooled": "fooled, %",
    "success probability": "success, %",
    "zero gradients": "images without a gradient, %",
    "robustness": "relative distance ρ",
    "l2": "L₂",
    "l0": "pixels changed",
}


def is_percent(metric: str) -> bool:
    """Whether a metric is a share of something, and so between 0 and 100."""
    return METRICS.get(metric, "").endswith("%")


# Tables that are not the paper's; one without an entry is called as its key is.
TITLES = {
    "adaptive": "Attacks on the joint loss",
    "alpha": "Where α starts",
    "autoattack": "AutoAttack",
    "ball": "Attacks in L₂ balls",
    "blocks": "What stands in the block",
    "bounded": "Attacks inside one box",
    "boundary": "Norm, margin and first-order distance",
    "broken by": "What broke the images first",
    "cifar": "Adversarial training",
    "costs": "What training costs",
    "deepfool": "DeepFool with more steps",
    "distance": "Distances that attacks find",
    "exact": "FGSM along the rounded and the exact gradient",
    "fading": "Faded images",
    "gray": "Every image turned to the same gray",
    "imagenet": "Others' networks",
    "in front": "Preprocessing in front of the network",
    "lambda": "Two penalties at several λ",
    "layers": "Which layers are tapped",
    "leaderboard": "All defenses on one network",
    "least": "Attacks that look for the least change",
    "longer": "More steps and starts",
    "losses": "One attack, several losses",
    "loudness": "How loud a network is, and what FGSM leaves",
    "margins": "Norm, margin and distances",
    "masking": "Signs of masking",
    "mnist": "Adversarial training",
    "nearer": "How near attacks come, in four norms",
    "nearest": "Classes read from the nearest prototype",
    "pgd": "PGD",
    "pixels": "Attacks that change few pixels",
    "plane": "Images whose rooms overlap in the plane",
    "readings": "Ways to read the penalty",
    "rooms": "How far apart classes are, and how far attacks reach",
    "scales": "What α becomes in training",
    "search": "Looking for a stronger attack",
    "signs": "Signs of the gradient that survive a step, %",
    "slopes": "Slope of each layer",
    "square": "Square, without gradients",
    "strong": "Stronger attacks",
    "stronger": "Stronger attacks",
    "substitute": "Substitutes on the test images",
    "surgery": "Blocks taken out of trained networks",
    "third": "All defenses at a third of the size",
    "transfer": "Images made on one network, read by another",
    "unseen": "Attacks that nobody trained against",
    "violations": "Distances found, and what first order promises",
}

# Whole columns, without data set and size. In tables of our own they stand in this order.
COLUMNS = {
    "nothing": "nothing",
    "strongest": "strongest",
    "worst": "worst case",
    "all": "all five",
    "autoattack": "AutoAttack",
    "adaptive": "adaptive",
    "pgd-1000x3": "PGD-1000 × 3",
    "pgd-200x3": "PGD-200 × 3",
    "pgd-100x50": "PGD-100 × 50",
    "pgd-100x5": "PGD-100 × 5",
    "margin-100": "PGD-100, margin",
    "pgd-100": "PGD-100",
    "textbook-100": "PGD-100, rounded loss",
    "pgd-40": "PGD-40",
    "pgd-10": "PGD-10",
    "pgd-margin": "PGD, margin",
    "nearest": "DDN, FMN",
    "pgd": "PGD",
    "step": "step",
    "restarts": "restarts",
    "loss margin": "margin",
    "loss ce_textbook": "rounded loss",
    "fgsm-exact": "exact FGSM",
    "exact fgsm": "exact FGSM",
    "fgsm": "FGSM",
    "black_box": "black box",
    "transfer": "transferred",
    "at_half": "at ε = 0.5",
    "zero_gradients": "zero gradients",
    "lead": "lead",
    "probability 1": "probability 1",
    "p = 1": "probability 1",
    "no gradient": "no gradient",
    "l2 2.0, Square": "Square in L₂",
    "turned by 30": "turned by 30°",
    "substitute's own": "own accuracy",
    "after": "after a step of",
    "clean": "clean",
}
SHORT = {
    **{name: name.upper() for name in ("fgsm", "bim", "mim", "pgd", "apgd", "fab", "jsma", "c&w")},
    **{"autoattack": "AutoAttack", "deepfool": "DeepFool", "square": "Square", "ce": "CE"},
    **{"t": "T", "l0": "L₀", "l1": "L₁", "l2": "L₂", "linf": "L∞", "carlini_wagner": "C&W"},
    **{f"layer{number}": f"layer {number}" for number in range(1, 6)},
}

# What the number behind an attack is; ε where nothing else is said.
SIZES = {
    "after": "{}",
    "block": "{}",
    "c&w": "c = {}",
    "deepfool": "steps {}",
    "epoch": "{}",
    "jsma": "θ = {}",
    "l2": "radius {}",
    "maps": "{}",
    "operation": "{}",
    "restarts": "{}",
    "stage": "{}",
    "step": "{}",
    "steps": "{}",
}


def title(table: str) -> str:
    """What a table is called: `Table 2`, `Figure 5a`, `Signs of masking`."""
    paper = re.sub(r"^(table|figure)(\d+\w?)$", lambda m: f"{m[1].title()} {m[2]}", table)
    return TITLES.get(table, paper if paper != table else table.capitalize())


def row(key: str) -> str:
    """A row in words: whom the paper calls "Ours" has a name."""
    return re.sub(r"\bOurs\b", 'Prototypes ("Ours")', key)


def column(key: str) -> tuple[str, str, str]:
    """A column in words: the data set, the attack and its size, each "" where there is none."""
    data, _, rest = key.partition(" ") if key.partition(" ")[0] in DATA else ("", "", key)
    rest = re.sub(r"^eps=(\S+) (.+)", r"\2 \1", rest)
    found = re.fullmatch(r"(.+) (?:(\w)=)?0?(\d[\d.]*(?:/\d+)?)", rest)
    size = ""
    if found and rest not in COLUMNS and not found[1].endswith("Eq."):
        rest, letter, number = found.groups()
        unit = f"{letter} = {{}}" if letter else SIZES.get(rest.split()[-1], "ε = {}")
        levels = 0 if "/" in number else round(255 * float(number))
        if len(number) > 5 and f"{levels / 255:#.3g}" == number:  # 0.0157
            number = f"{levels}/255"
        size = unit.format(number)
    name = COLUMNS.get(rest) or "".join(SHORT.get(part, part) for part in re.split("([ -])", rest))
    return DATA.get(data, data), row(re.sub(r"(\d)x(\d)", r"\1 × \2", name)), size


def rank(key: str) -> tuple[str, int, str, str, float]:
    """Sorts columns of a table of our own: by data set, the strongest attack first, by size."""
    data, name, size = column(key)
    names = [*COLUMNS.values()]
    what, number = re.fullmatch(r"(.*?)([\d.]+(?:/\d+)?)?", size).groups()  # type: ignore[union-attr]
    place = names.index(name) if name in names else len(names)
    return data, place, name, what, float(Fraction(number or 0))
