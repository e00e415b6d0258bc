"""What every attack shares: checked input, a model held still, logits in full precision.

The faults that this file guards against are those that users of other libraries reported: a model
left in train mode, NaN logits counted as robustness, a range other than [0, 1].
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FEWEST = 4  # classes of no image: as many as any loss needs


@dataclass(eq=False)
class Forward:
    """The checked forward pass that `attacking` hands out: images to logits (N, K).

    The model is shown a copy, so what it does to the images in place stays there; of no image it is
    not asked, since many cannot flatten none.
    Called, it runs under the caller's autocast: the pass to differentiate. `exact` runs in full
    precision whatever the caller asked for: the pass to judge by. Without autocast they are the
    same, and ``rounded`` is False. Both return float32, or float64 where the model computes in it.
    """

    model: nn.Module
    num_labels: int
    device: torch.device
    rounded: bool
    nan_logits: Tensor
    nan_gradients: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        if not len(images):
            return images.sum(dim=(1, 2, 3))[:, None].expand(-1, max(FEWEST, self.num_labels))
        logits = _checked_logits(self.model(images.clone()), len(images), self.num_labels)
        _note_most(self.nan_logits, logits)
        return logits

    @torch.no_grad()
    def exact(self, images: Tensor) -> Tensor:
        """Logits in full precision; autograd keeps nothing of it."""
        with torch.autocast(self.device.type, enabled=False):
            return self(images)

    def gradient(self, value: Tensor, x: Tensor, *, keep_graph: bool = False) -> Tensor:
        """∇ₓ of the sum of `value` (N,), so of each image's own value."""
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
        _note_most(self.nan_gradients, gradient)
        return gradient.nan_to_num(nan=0.0)  # so that NaN logits are the model's own


@dataclass(eq=False)
class _Later:
    """What `asked_later` gathers: of each attack, what `_facts` says and the images with NaN; and
    what `refuse_if` is to say."""

    facts: list[Tensor] = field(default_factory=list)
    refusals: dict[str, Tensor] = field(default_factory=dict)


_LATER: ContextVar[_Later | None] = ContextVar("_LATER", default=None)


@contextmanager
def asked_later() -> Iterator[None]:
    """Inside, what attacks must ask a GPU is kept there and asked at the end, all at once.

    To ask makes the host wait for all that it has sent to the GPU; so `fit` asks once an epoch
    and not at every step. On a CPU nothing changes.

    Raises
    ------
    ValueError
        On exit, where `attacking` or `refuse_if` would have raised one.
    """
    later = _Later()
    token = _LATER.set(later)
    try:
        yield
    finally:
        _LATER.reset(token)
    if later.facts:
        worst = torch.stack(later.facts).amax(dim=0)
        flags = [flag.to(worst)[None] for flag in later.refusals.values()]
        answers = torch.cat([*flags, worst]).tolist()
        for message in later.refusals:
            if answers.pop(0):
                raise ValueError(message)
        *facts, logits, gradients = answers
        _raise_if_wrong(facts)
        _raise_if_nan(logits, gradients)


def refuse_if(flag: Tensor, message: str) -> None:
    """Raise a ValueError where `flag` () is true; on a GPU, inside `asked_later`, at its end."""
    later = None if flag.device.type == "cpu" else _LATER.get()
    if later is not None and later.facts:  # which are asked for in any case
        later.refusals[message] = flag | later.refusals.get(message, flag)
    elif flag:
        raise ValueError(message)


@contextmanager
def attacking(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    target: Tensor | None = None,
    *,
    exact: bool = False,
) -> Iterator[Forward]:
    """Check the input, hold the model still, and hand out its checked forward pass.

    Inside, every submodule is in eval mode, no parameter requires a gradient, autograd is on and
    inference mode off. On exit, also after an exception, each submodule's mode and each
    parameter's ``requires_grad`` and ``grad`` are what they were. Autocast stays as the caller
    has it: under ``torch.autocast(device, torch.bfloat16)`` gradients are rounded and fast, and
    success is still judged in full precision.

    Parameters
    ----------
    model : nn.Module
        Maps images (N, C, H, W) in [0, 1] to logits (N, K); normalizes inside.
    x : Tensor
        Images (N, C, H, W), float32 or float64, in [0, 1].
    y, target : Tensor, optional
        Labels int64 (N,), on the device of `x`; `target` differs from `y` everywhere.
    exact : bool
        True switches autocast off, for an attack that follows a boundary closely.

    Yields
    ------
    Forward
        Maps images to logits (N, K).

    Raises
    ------
    ValueError
        Where an argument breaks the above; from the forward pass, where the logits have the wrong
        shape or too few classes for the labels; on exit, where a logit or a gradient was NaN.
    """
    check_model(model)
    _check_form(x, y, target)
    facts, num_labels = _facts(x, y, target), 0
    later = None if x.device.type == "cpu" else _LATER.get()
    if later is None:
        num_labels = 1 + _raise_if_wrong(facts.tolist())

    with ExitStack() as stack:
        if exact:
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(held_still(model))
        nan = torch.zeros(2, dtype=torch.int64, device=x.device)
        rounded = torch.is_autocast_enabled(x.device.type)
        try:
            yield Forward(model, num_labels, x.device, rounded, *nan.unbind())
        finally:
            if later is None:
                _raise_if_nan(*nan.tolist())
            else:
                later.facts.append(torch.cat([facts, nan.to(facts)]))


def check_model(model: nn.Module) -> None:
    """Raise a ValueError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module, whose mode can be set "
            "and restored: wrap the function in one"
        )


def crafted(
    attack: Callable[..., Tensor], model: nn.Module, x: Tensor, y: Tensor, **options
) -> Tensor:
    """What `attack` makes of copies of `x` and `y`, which stay as they are; in the format of `x`.

    The copies are contiguous: an attack may look at them by a ``view``.

    Raises
    ------
    ValueError
        Unless it is a tensor like `x`: of its shape and dtype, on its device.
    """
    if not callable(attack):
        raise ValueError(
            f"attack is {attack!r}, expected a function (model, x, y) -> x_adv, such as "
            "functools.partial(attacks.pgd, eps=0.3, step_size=0.01, steps=40)"
        )
    x_adv = attack(model, x.clone(memory_format=torch.contiguous_format), y.clone(), **options)
    if not isinstance(x_adv, Tensor):
        raise ValueError(f"the attack returned a {type(x_adv).__name__}, expected a tensor like x")
    for what in ("shape", "dtype", "device"):
        found, expected = (getattr(images, what) for images in (x_adv, x))
        if found != expected:
            found, expected = (tuple(v) if what == "shape" else v for v in (found, expected))
            raise ValueError(f"the attack returned {what} {found}, expected {expected}")
    return x_adv if x_adv.stride() == x.stride() else torch.empty_like(x).copy_(x_adv)


def _check_form(x: Tensor, y: Tensor | None, target: Tensor | None) -> None:
    """Raise a ValueError for what can be seen without a look at the values."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        found, remedy = type(x).__name__, "torch.as_tensor(x) makes one"
        if isinstance(x, Tensor):
            found, remedy = str(x.dtype), "convert uint8 images with x.float() / 255"
        raise ValueError(
            f"images are {found}, expected a float32 or float64 tensor in [0, 1]: {remedy}"
        )
    if x.ndim != 4:
        remedy = ": one image is x[None]" if x.ndim == 3 else ""
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (N, C, H, W){remedy}")
    for name, labels in (("y", y), ("target", target)):
        if labels is None:
            continue
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            found = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"{name} is {found}, expected a tensor of int64 class numbers: "
                f"torch.as_tensor({name}, dtype=torch.int64) makes one"
            )
        if labels.shape != x.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(labels.shape)}, expected ({len(x)},): one label an image"
            )
        if labels.device != x.device:
            raise ValueError(f"{name} is on {labels.device}, the images on {x.device}: move one")


def _facts(x: Tensor, y: Tensor | None, target: Tensor | None) -> Tensor:
    """−min and max of images, labels and targets, and whether a target is the label; (7,).

    Of several attacks, the worst is the largest.
    """
    facts = x.new_zeros(7)
    for i, values in enumerate((x, y, target)):
        if values is not None and values.numel():
            low, high = values.detach().aminmax()
            facts[2 * i], facts[2 * i + 1] = -low, high
    if y is not None and target is not None:
        facts[6] = (y == target).any()
    return facts


def _raise_if_wrong(facts: list[float]) -> int:
    """Raise a ValueError unless `_facts` are right; return the highest label."""
    low, high = 0 - facts[0], facts[1]
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images range from {low:g} to {high:g}, expected [0, 1]: "
            "attack pixels, and let the model normalize inside its forward pass"
        )
    for name, lowest in (("y", -facts[2]), ("target", -facts[4])):
        if lowest < 0:
            raise ValueError(f"{name} holds {lowest:.0f}, expected class numbers from 0 on")
    if facts[6]:
        raise ValueError("target equals the label of some image: aim at another class")
    return int(max(facts[3], facts[5]))


def _raise_if_nan(logits: float, gradients: float) -> None:
    if logits:
        raise ValueError(
            f"the model returned NaN logits for {logits:.0f} of the images shown, which would "
            "count as robust: repair the model first"
        )
    if gradients:
        raise ValueError(
            f"the gradient is NaN for {gradients:.0f} of the images shown, which would count as "
            "robust: look for sqrt, norm or division at zero in the model"
        )


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or in float64 where they are: to take a loss of, or a distance.

    Raises
    ------
    ValueError
        Unless they are a tensor, which the outputs of some models are not.
    """
    if not isinstance(values, Tensor):
        raise ValueError(
            f"the model returned {type(values).__name__}, expected logits of shape (N, K): "
            "wrap it in a module that returns them alone"
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def widest(device: torch.device) -> torch.dtype:
    """The widest floating type of `device`: float64, but float32 on Apple's, which has no wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_whole(name: str, value: int) -> None:
    """Raise a ValueError unless `value` is an integer, of Python's or of numpy's."""
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None


def check_count(name: str, count: int) -> None:
    """Raise a ValueError unless `count` is an integer >= 1."""
    check_whole(name, count)
    if count < 1:
        raise ValueError(f"{name} is {count}, expected an integer >= 1")


def generator_for(
    x: Tensor, seed: int | None, generator: torch.Generator | None
) -> torch.Generator | None:
    """The generator to draw with: `generator`, or a new one for `seed`, or None (torch's own).

    Raises
    ------
    ValueError
        If both are given, or one is of another type.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ValueError(f"generator is {generator!r}, expected a torch.Generator: or give a seed")
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("both seed and generator were given: give one")
    check_whole("seed", seed)
    return torch.Generator(x.device).manual_seed(int(seed))


def relative_norm(x_adv: Tensor, x: Tensor) -> Tensor:
    """‖η‖₂ / ‖x‖₂ an image, the left side of Eq. 8 in Ranjan et al. (2018); shape (N,)."""
    eta, size = (x_adv - x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1)
    return eta / size.clamp(min=torch.finfo(x.dtype).tiny)


def _checked_logits(logits: Tensor, num_images: int, num_labels: int) -> Tensor:
    logits = at_least_float32(logits)
    if logits.ndim != 2 or len(logits) != num_images:
        raise ValueError(
            f"the model returned {tuple(logits.shape)}, expected logits of shape ({num_images}, K)"
        )
    num_classes = logits.shape[1]
    if num_classes < max(2, num_labels):
        raise ValueError(
            f"the model has {num_classes} classes, expected at least {max(2, num_labels)}"
            f"{f' for labels up to {num_labels - 1}' if num_labels > 2 else ''}"
        )
    return logits


def _note_most(most: Tensor, values: Tensor) -> None:
    torch.maximum(most, values.detach().isnan().flatten(1).any(dim=1).sum(), out=most)


@contextmanager
def held_still(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and its parameters without gradients; on exit all is as it was.

    Inside, the weights of convolutions are in channels_last, if that changes nothing for the model.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    faster: dict[str, Any] = {"memory_format": torch.channels_last}
    slow = [
        (parameter, parameter.data)
        for parameter, _, _ in parameters * indifferent(model)
        if type(parameter) is nn.Parameter
        and parameter.ndim == 4
        and not parameter.is_contiguous(**faster)
    ]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        for parameter, data in slow:
            parameter.data = data.contiguous(**faster)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, data in slow:
            parameter.data = data
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def indifferent(model: nn.Module) -> bool:
    """Whether it computes the same in every memory format, being made of layers that do."""
    return all(type(m).__module__.startswith(("torch.nn.", "defenses.")) for m in model.modules())
