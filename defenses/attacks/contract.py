"""What every attack shares: checked input, a model held still, logits in full precision.

The faults that this file guards against are those that users of other libraries reported: a model
left in train mode, NaN logits counted as robustness, a range other than [0, 1].
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

Logits = Callable[[Tensor], Tensor]


@contextmanager
def attacking(
    model: nn.Module, x: Tensor, y: Tensor | None = None, target: Tensor | None = None
) -> Iterator[Logits]:
    """Check the input, hold the model still, and hand out its checked forward pass.

    Inside, every submodule is in eval mode, no parameter requires a gradient, autograd is on, and
    inference mode and autocast are off. On exit, also after an exception, each submodule's mode
    and each parameter's ``requires_grad`` and ``grad`` are what they were.

    Parameters
    ----------
    model : nn.Module
        Maps images (N, C, H, W) in [0, 1] to logits (N, K); normalizes inside.
    x : Tensor
        Images (N, C, H, W), float32 or float64, in [0, 1].
    y, target : Tensor, optional
        Labels int64 (N,), on the device of `x`; `target` differs from `y` everywhere.

    Yields
    ------
    Callable[[Tensor], Tensor]
        Maps images to logits (N, K) in float32 (float64 where the model computes in it).

    Raises
    ------
    ValueError
        Where an argument breaks the above; from the forward pass, where the logits have the wrong
        shape, hold NaN, or have too few classes for the labels.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module, whose mode can be set "
            "and restored: wrap the function in one"
        )
    _check_images(x)
    num_labels = 1 + max(_check_labels(x, "y", y), _check_labels(x, "target", target))
    if y is not None and target is not None and bool((y == target).any()):
        raise ValueError("target equals the label of some image: aim at another class")

    def logits_of(images: Tensor) -> Tensor:
        return _checked_logits(model(images), len(images), num_labels)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        stack.enter_context(_held_still(model))
        yield logits_of


def _check_images(x: Tensor) -> None:
    """Raise a ValueError unless `x` is float32 or float64 (N, C, H, W) in [0, 1]."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"images are {found}, expected a float32 or float64 tensor in [0, 1]: "
            "convert uint8 images with x.float() / 255"
        )
    if x.ndim != 4:
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (N, C, H, W)")
    if x.numel():
        low, high = (bound.item() for bound in x.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images range from {low:g} to {high:g}, expected [0, 1]: "
                "attack pixels, and let the model normalize inside its forward pass"
            )


def check_count(name: str, count: int) -> None:
    """Raise a ValueError unless `count` is an integer >= 1."""
    if count != int(count) or count < 1:
        raise ValueError(f"{name} is {count}, expected an integer >= 1")


def generator_for(
    x: Tensor, seed: int | None, generator: torch.Generator | None
) -> torch.Generator | None:
    """The generator to draw with: `generator`, or a new one for `seed`, or None (torch's own)."""
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("both seed and generator were given: give one")
    return torch.Generator(x.device).manual_seed(seed)


def input_gradient(value: Tensor, x: Tensor, *, keep_graph: bool = False) -> Tensor:
    """∇ₓ of the sum of `value` (N,), so of each image's own value; a ValueError where it is NaN."""
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(
            value.sum(), x, retain_graph=keep_graph, allow_unused=True
        )
    if gradient is None:
        raise ValueError(
            "the logits do not depend on the images through anything differentiable: "
            "remove detach(), no_grad() and rounding from the model's forward pass"
        )
    if bool(gradient.isnan().any()):
        images = int(gradient.isnan().flatten(1).any(dim=1).sum())
        raise ValueError(
            f"the gradient is NaN for {images} of {len(x)} images, which would count as robust: "
            "look for sqrt, norm or division at zero in the model"
        )
    return gradient


def relative_norm(x_adv: Tensor, x: Tensor) -> Tensor:
    """‖η‖₂ / ‖x‖₂ an image, the left side of Eq. 8 in Ranjan et al. (2018); shape (N,)."""
    eta, size = (x_adv - x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1)
    return eta / size.clamp(min=torch.finfo(x.dtype).tiny)


def _check_labels(x: Tensor, name: str, labels: Tensor | None) -> int:
    if labels is None:
        return -1
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name} is {found}, expected a tensor of int64 class numbers")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}, expected ({len(x)},): one label an image"
        )
    if labels.device != x.device:
        raise ValueError(f"{name} is on {labels.device}, the images on {x.device}: move one")
    if not len(labels):
        return -1
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0:
        raise ValueError(f"{name} holds {low}, expected class numbers from 0 on")
    return high


def _checked_logits(logits: Tensor, num_images: int, num_labels: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != num_images:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returned {found}, expected logits of shape ({num_images}, K)")
    num_classes = logits.shape[1]
    if num_classes < max(2, num_labels):
        raise ValueError(
            f"the model has {num_classes} classes, expected at least {max(2, num_labels)}"
            f"{f' for labels up to {num_labels - 1}' if num_labels > 2 else ''}"
        )
    if bool(logits.isnan().any()):
        images = int(logits.isnan().any(dim=1).sum())
        raise ValueError(
            f"the model returned NaN logits for {images} of {num_images} images, "
            "which would count as robust: repair the model first"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def _held_still(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
