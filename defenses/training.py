"""The one training loop: deterministic, in bfloat16 where the hardware has it, and resumable."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from defenses import distributed
from defenses.attacks.contract import (
    asked_later,
    at_least_float32,
    check_count,
    check_model,
    check_whole,
)
from defenses.data import ImageData, batches, digest
from defenses.layout import check_last_batch, forget_rounded, own, shown, taken_by
from defenses.progress import one_bar, tqdm, track
from defenses.resume import Resumable
from defenses.stored import Stored

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
_COUNTS: ContextVar[list[int] | None] = ContextVar("_COUNTS", default=None)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in float32, or in float64 where the model computes in it."""
    return F.cross_entropy(at_least_float32(model(x)), y)


def label_smoothing(share: float = 0.1) -> Loss:
    """Cross-entropy with soft labels: 1 − share for the true class, share/(K−1) for each other.

    With share 0.1 and ten classes these are the {1/90, 0.9} of Warde-Farley & Goodfellow (2016).
    PyTorch's own ``label_smoothing`` spreads its share over all K classes, the true one too;
    hence the factor K/(K−1).

    Examples
    --------
    >>> import torch, defenses
    >>> data, model = defenses.load_data("digits"), defenses.models.mnist_fast()
    >>> history = fit(model, data, epochs=1, loss=label_smoothing(0.1), progress=False)
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = at_least_float32(model(x))
        classes = logits.shape[1]
        if share * classes > classes - 1:
            raise ValueError(f"share {share} would prefer the wrong ones of {classes} classes")
        return F.cross_entropy(logits, y, label_smoothing=share * classes / (classes - 1))

    return loss


@one_bar
def fit(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: int,
    loss: Loss = cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    batch_size: int = 128,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    probe: Callable[[nn.Module], Mapping[str, float]] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``data.train`` and leave it in eval mode.

    In several processes (`defenses.distributed`) each takes its share of every batch, and all end
    with the weights of one process alone, up to rounding, as far as nothing is drawn and the loss
    is a mean over images. What the loss and the model draw, each process draws for itself.

    Parameters
    ----------
    model : Module
        Maps images (N, C, H, W) in [0, 1] to logits (N, K). Moved to the data's device. Its dtype,
        float64 too, and its memory format are afterwards what they were; meanwhile it is in
        channels_last where it allows that.
    loss : callable (model, x, y) -> scalar
        The objective; a defense that changes the objective is such a function. Unless it is one of
        this package it gets contiguous images, and so does an augmentation.
    optimizer : Optimizer, optional
        SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4 by default.
    schedule : LRScheduler, optional
        Stepped once an epoch; ``ReduceLROnPlateau`` is given the epoch's mean loss.
    augment : callable (x, generator) -> x, optional
        Applied to each batch, e.g. :func:`defenses.data.crop_and_flip`.
    probe : callable (model) -> {name: number}, optional
        Looks at the model, in eval mode, after each epoch; what it finds joins the history, and
        what it draws changes nothing. If it raises, training ends there, and the checkpoint is
        that of the epoch before.
    seed : int
        Fixes the order of the images, the augmentation and dropout. The weights at the start are
        the model's own.
    batch_size : int
        Images a step, over all processes.
    checkpoint : path, optional
        Written after each epoch, atomically, by the first process. If it is there, training goes on
        from it and ends with the same weights, bit for bit, as a run that was never stopped; more
        epochs may be asked for, and another number of processes, but for rounding. It must come
        from the same images, labels, loss, augmentation, batch size, seed and layers, and from the
        same optimizer and schedule: all their options, as they were before the first step or after
        the last, and each parameter's group. Loss and augmentation are known by their names and
        values, those that are not of this package by their code, too. What they learn or count is
        not in the file.
    progress : bool
        One bar for all epochs, with the time that is left, where somebody looks on.

    Returns
    -------
    list of dict
        One an epoch: ``epoch``, ``loss`` (mean over the images), ``seconds`` (without the probe),
        and what ``probe`` found.

    Raises
    ------
    ValueError
        If there are no images; if the checkpoint is unreadable, of another run (what differs is
        named) or could not hold all that is trained; if the optimizer is of another model, or the
        schedule of another optimizer; if the last batch would be a single image, which the model's
        batch normalization does not take; if the last batch has fewer images than there are
        processes. All before the first step.
    FloatingPointError
        If the loss of an epoch is not finite.

    Examples
    --------
    >>> import torch, defenses
    >>> data = defenses.load_data("digits")
    >>> model = defenses.models.mnist_fast()
    >>> adam = torch.optim.Adam(model.parameters(), 2e-3)
    >>> history = fit(model, data, epochs=2, optimizer=adam, progress=False)
    >>> history[1]["loss"] < history[0]["loss"]
    True
    """
    check_model(model)
    if not isinstance(data, ImageData):
        raise ValueError(
            f"data is {type(data).__name__}, expected what `load_data` returns: of tensors of your "
            "own, ImageData(name, train_images, train_labels, test_images, test_labels, classes)"
        )
    if isinstance(loss, nn.modules.loss._Loss) or not callable(loss):
        raise ValueError(
            f"loss is {loss!r}, expected a function (model, x, y) -> scalar, such as "
            "lambda model, x, y: torch.nn.functional.cross_entropy(model(x), y)"
        )
    if isinstance(optimizer, type):
        raise ValueError(f"optimizer is a class: give {optimizer.__name__}(model.parameters(), …)")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_whole("seed", seed)
    images, labels = data.train
    if not len(images):
        raise ValueError("there are no images to train on: the training data are empty")
    device = images.device
    taken = taken_by(model.to(device), images)
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    weights = {id(weight) for weight in model.parameters()}
    if not any(id(weight) in weights for g in optimizer.param_groups for weight in g["params"]):
        raise ValueError("the optimizer is of another model: make it from model.parameters()")
    if schedule is not None and schedule.optimizer is not optimizer:
        raise ValueError("the schedule is of another optimizer: give optimizer=schedule.optimizer")
    if (counts := _COUNTS.get()) is not None:
        x, y = next(batches(images, labels, batch_size, **taken.form))
        flops = _step_flops(model, loss, optimizer, x, y)
        counts.append(epochs * (flops * len(images) // len(x)))
        return []

    (rank, world), stored = distributed.processes(), isinstance(images, Stored)
    contiguous = not own(loss)

    def seen(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Each epoch draws from its own seed, so that resuming needs no generator's state.
        torch.manual_seed(1_000_003 * seed + epoch + 500_009 * rank)
        generator = torch.Generator(device).manual_seed(1_000_003 * seed + epoch)
        share = (rank, world) if stored else (0, 1)  # what is in memory is divided when augmented
        for x, y in batches(images, labels, batch_size, generator, share, **taken.form):
            if augment is not None:
                x = taken.of(_augmented(augment, x, generator))
            yield x.contiguous() if contiguous else x, y

    cuda = [device] if device.type == "cuda" else []
    deterministic = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with torch.random.fork_rng(cuda), deterministic, shown(model, optimizer, taken):
        file, history = None, []
        distributed.check_shares(len(images), batch_size)
        if checkpoint is not None:
            distributed.of_first(lambda: None)  # waits: it may be writing this file
            run = {"data": data.name, "images": len(images), "pixels": digest([images])}
            run |= {"labels": digest([labels]), "batch_size": batch_size, "seed": seed}
            file = Resumable.of(checkpoint, run, model, optimizer, schedule, loss, augment)
            history = file.resume(epochs, lambda: next(seen(0))[0])
            if distributed.of_first(lambda: len(history)) != len(history):
                raise ValueError(f"{checkpoint} must lie where all processes find it")
        if len(history) < epochs:
            one = next(batches(images[:1], labels[:1], 1, **taken.form))
            check_last_batch(model, *one, len(images), batch_size, loss)
            loss = distributed.shared(model, loss)
        for epoch in track(range(len(history), epochs), epochs - len(history)):
            start, total = time.perf_counter(), torch.zeros((), device=device, dtype=taken.dtype)
            model.train()
            bar = {"total": -(-len(images) // batch_size), "leave": False, "disable": not progress}
            name = f"epoch {epoch + 1}/{epochs}"
            with asked_later():
                for x, y in tqdm(seen(epoch), name, mininterval=0.5, **bar):
                    if file is not None:
                        file.note_first(x)
                    if world > 1 and not stored:
                        x, y = x[rank::world], y[rank::world]
                    total += _step(model, loss, optimizer, x, y) * len(x)
            mean = distributed.total(total).item() / len(images)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss became {mean} in epoch {epoch + 1}: lower the learning rate"
                )
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(mean)
            elif schedule is not None:
                schedule.step()
            seconds = time.perf_counter() - start
            history.append({"epoch": epoch + 1, "loss": mean, "seconds": seconds})
            if probe is not None:
                found = dict(probe(model.eval()))
                if clash := sorted(found.keys() & history[-1].keys()):
                    raise ValueError(f"the probe found {clash}, which training itself keeps")
                history[-1] |= found
            if file is not None and rank == 0:
                file.save(history)
    model.eval()
    return history


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Where `fit` trains nothing, but adds to a list what it would cost, from one step of it.

    Floating-point operations of matrix products and convolutions; a multiplication and an addition
    are two. The counted step changes the weights: the networks are good for nothing else.
    """
    token = _COUNTS.set([])
    try:
        yield _COUNTS.get()  # type: ignore[misc]
    finally:
        _COUNTS.reset(token)


def _step_flops(
    model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> int:
    with Flops() as counted:
        _step(model.train(), loss, optimizer, x, y)
    model.eval()
    return counted.total


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions inside, forward and
    backward, by PyTorch's own formulas: its ``FlopCounterMode`` without the modules' names, which
    fail where an attack asks for gradients inside a training step."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def step_seconds(
    models: Mapping[str, nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    losses: Mapping[str, Loss] | None = None,
    repeats: int = 20,
) -> dict[str, float]:
    """Median seconds of a training step of each model on one batch, measured in turns.

    In turns, so that the ratios hold on a machine that others use too. The models are trained on.
    ``losses`` gives the objective of those that have one other than cross-entropy.
    """
    steps, images = {}, {}
    for name, model in models.items():
        images[name] = taken_by(model.to(x.device), x).of(x)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
        steps[name] = (model, (losses or {}).get(name, cross_entropy), optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(3 + repeats):  # three to warm up
        for name, step in steps.items():
            batch = images[name].clone(), y.clone()
            start = time.perf_counter()
            _step(*step, *batch).item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[3:]) for name, times in seconds.items()}


def _step(
    model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Tensor:
    with rounded(x.device):
        value = loss(model, x, y)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    forget_rounded()
    return value.detach()


def rounded(device: torch.device | str) -> torch.autocast:
    """Autocast to bfloat16 where `device` computes in it itself; elsewhere it changes nothing."""
    device = torch.device(device)
    pays = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=pays)


def _augmented(
    augment: Callable[[Tensor, torch.Generator], Tensor],
    x: Tensor,
    generator: torch.Generator,
) -> Tensor:
    augmented = augment(x if own(augment) else x.contiguous(), generator)
    if augmented.dtype != x.dtype:
        raise ValueError(f"augment returned {augmented.dtype}, expected {x.dtype}, as it was given")
    return augmented
