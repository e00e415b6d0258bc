"""What a model takes: images of which dtype, in which memory format, and how few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defenses.attacks.contract import held_still, indifferent
from defenses.data import to_float


@dataclass(frozen=True)
class Taken:
    """The form of the images that a model is shown."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format

    @property
    def form(self) -> dict[str, Any]:
        """What `defenses.data.to_float` and `defenses.data.batches` take."""
        return {"dtype": self.dtype, "memory_format": self.memory_format}

    def of(self, x: Tensor) -> Tensor:
        """Images `x` in this form."""
        return x.to(self.device, **self.form)


def taken_by(model: nn.Module, images: Tensor) -> Taken:
    """The form in which `model` is to be shown such images; nothing of either is changed.

    float64 where the first of the model's weights is, or where it has none and the images are; else
    float32. channels_last, in which convolutions are fast, where the model allows it: of two of the
    images it says the same in either format. A model with a ``view`` of its feature maps says
    nothing at all; a model of layers of PyTorch and of this package is not asked.
    """
    weights = next((p for p in model.parameters() if p.is_floating_point()), None)
    device, dtype = (images if weights is None else weights).device, images.dtype
    if weights is not None:
        dtype = weights.dtype
    dtype = dtype if dtype == torch.float64 else torch.float32
    allowed = indifferent(model) or _says_the_same(model, to_float(images[:2], dtype).to(device))
    return Taken(device, dtype, torch.channels_last if allowed else torch.contiguous_format)


def own(function: Callable[..., Any]) -> bool:
    """Whether it is a function of this package, which takes images in any memory format."""
    return (getattr(function, "__module__", None) or "").startswith("defenses.")


def forget_rounded() -> None:
    """After a step, drop the rounded weights that an autocast around the training keeps.

    Autocast's cache is emptied where the outermost one ends. In one that is around all of it, every
    step would see the weights of the first.
    """
    torch.clear_autocast_cache()


@contextmanager
def shown(model: nn.Module, optimizer: torch.optim.Optimizer, taken: Taken) -> Iterator[None]:
    """The weights of `model` in the memory format of its images, and afterwards in their own."""
    if taken.memory_format == torch.contiguous_format:
        yield
        return
    form: dict[str, Any] = {"memory_format": torch.channels_last}
    changed = [p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous(**form)]
    model.to(**form)
    try:
        yield
    finally:
        own = {id(tensor) for p in changed for tensor in (p, p.grad)}
        model._apply(lambda tensor: tensor.contiguous() if id(tensor) in own else tensor)
        for parameter in changed:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    optimizer.state[parameter][name] = value.contiguous()


@torch.no_grad()
def _says_the_same(model: nn.Module, x: Tensor) -> bool:
    """Whether the logits of `x` in channels_last are, to rounding, those of `x` contiguous.

    Where it fails in both formats it is for another reason, which will be heard in its place.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which would compile both
    said: dict[torch.memory_format, Any] = {}
    exact = torch.autocast(x.device.type, enabled=False)
    for layout in (torch.channels_last, torch.contiguous_format):
        with held_still(model), _draws_undone(x.device), exact:
            try:
                said[layout] = model(x.clone(memory_format=layout))
            except Exception:  # whatever a model may raise
                continue
    if len(said) < 2:
        return torch.contiguous_format not in said
    one, other = said.values()
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape):
        return True  # no logits: the forward pass of an attack will say so
    scale = float(other.abs().nan_to_num(0, 0, 0).amax()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def check_last_batch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    count: int,
    batch_size: int,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    """Raise a ValueError where `count` images in batches leave one that the model cannot train on.

    Batch normalization has no variance to divide by where a batch holds one value a channel. `x`
    and `y` hold one image and its label; the model is left as it is.
    """
    if count % batch_size != 1 and batch_size != 1:
        return
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with _draws_undone(x.device), torch.enable_grad():
            model.train()
            try:
                model(x.clone())
            except ValueError:
                loss(model, x.clone(), y.clone())  # which may show it more than this one image
    except ValueError as error:
        sizes = (*range(batch_size - 1, 1, -1), *range(batch_size + 1, count + 1))
        better = next((f"batch_size={b}" for b in sizes if count % b != 1), "more images")
        raise ValueError(
            f"the last of the batches holds one image ({count} images, batch_size={batch_size}), "
            f"on which batch normalization cannot be trained: take {better} ({error})"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes:
            module.training = training


def _draws_undone(device: torch.device) -> Any:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
