"""The practical black-box attack: train a substitute on an oracle's labels, and attack that.

Papernot et al. (2017), Alg. 1, with the settings of their library's MNIST example.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import check_last_batch
from ..progress import one_bar, track
from .contract import attacking, check_count

Oracle = nn.Module | Callable[[Tensor], Tensor]


@torch.inference_mode(False)
@torch.enable_grad()
@one_bar
def train_substitute(
    oracle: Oracle,
    x: Tensor,
    *,
    substitute: nn.Module,
    rounds: int = 6,
    lambda_: float = 0.1,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> nn.Module:
    """Train a copy of a model that its owner lets be asked for labels, and for nothing else.

    Papernot et al. (2017), Alg. 1. Each round trains on all points so far and doubles them: the
    oracle is asked about x + λ·sign(∂F_y/∂x), clipped to [0, 1], where F are the logits of the
    substitute and y is what the oracle said about x. Images that fool the substitute, such as
    those of `defenses.attacks.fgsm`, are then tried on the oracle. The defaults are those of the
    authors' library, which uses −λ in the first three augmentations.

    Parameters
    ----------
    oracle : nn.Module or callable
        Maps images (n, C, H, W) in [0, 1] to labels int64 (n,). Of an `nn.Module`, which returns
        logits, only the argmax is seen. It is asked once a point, len(x)·2^(rounds − 1) in all.
    x : Tensor
        The images to start from, float32 or float64 (N, C, H, W) in [0, 1]; their labels are the
        oracle's.
    substitute : nn.Module
        The architecture to train; what is given stays as it is, a copy is trained.
    rounds : int
        Times that the substitute is trained; the points double between two of them.
    lambda_ : float
        λ, the size of an augmentation's step, in units of pixels in [0, 1].
    epochs, learning_rate, batch_size
        Of Adam, which starts anew in each round.
    seed : int
        Of the order of the images and of whatever the substitute draws while it is trained.

    Returns
    -------
    nn.Module
        The trained substitute, in eval mode.

    Raises
    ------
    ValueError
        For images, options, labels or a model that break the above, each with the remedy.
    """
    for name, count in (("rounds", rounds), ("epochs", epochs), ("batch_size", batch_size)):
        check_count(name, count)
    for name, size in (("lambda_", lambda_), ("learning_rate", learning_rate)):
        if not size > 0:
            raise ValueError(f"{name} is {size}, expected > 0")
    if not len(x):
        raise ValueError("x holds no images: give the substitute some to start from")
    substitute, x = copy.deepcopy(substitute), x.detach().clone()
    y = _asked(oracle, x, batch_size)
    with attacking(substitute, x, y) as logits_of:
        logits_of.exact(x[:1])  # has it a class for each label?
    for rho in range(rounds):
        check_last_batch(substitute, x[:1], y[:1], len(x) * 2**rho, batch_size, _loss)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for rho in track(range(rounds), [2**rho for rho in range(rounds)]):
            if rho > 0:
                step = lambda_ if rho > 3 else -lambda_
                pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
                x_new = torch.cat([_augmented(substitute, *pair, step) for pair in pairs])
                x, y = torch.cat([x, x_new]), torch.cat([y, _asked(oracle, x_new, batch_size)])
            optimizer = torch.optim.Adam(substitute.train().parameters(), learning_rate)
            for _ in range(epochs):
                for batch in torch.randperm(len(x), device=x.device).split(batch_size):
                    optimizer.zero_grad()
                    _loss(substitute, x[batch], y[batch]).backward()
                    optimizer.step()
    return substitute.eval()


def _loss(substitute: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(substitute(x), y)


def _augmented(substitute: nn.Module, x: Tensor, y: Tensor, step: float) -> Tensor:
    with attacking(substitute, x, y) as logits_of:
        x = x.clone().requires_grad_()
        F_y = logits_of(x).gather(1, y[:, None])
        return (x.detach() + step * logits_of.gradient(F_y, x).sign()).clamp(0, 1)


def _asked(oracle: Oracle, x: Tensor, batch_size: int) -> Tensor:
    labels = []
    for part in x.split(batch_size):
        if isinstance(oracle, nn.Module):
            with attacking(oracle, part) as logits_of:
                y = logits_of.exact(part).argmax(dim=1)
        else:
            y = oracle(part.clone())
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != part.shape[:1]:
            raise ValueError(
                f"the oracle returned {getattr(y, 'dtype', type(y).__name__)} of shape "
                f"{tuple(getattr(y, 'shape', ()))}, expected int64 labels of shape ({len(part)},)"
            )
        labels.append(y.to(x.device))
    return torch.cat(labels)
