"""The one training loop: deterministic, in bfloat16 where the hardware has it, and resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from defenses.data import ImageData, batches

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in float32."""
    return F.cross_entropy(model(x).float(), y)


def label_smoothing(share: float = 0.1) -> Loss:
    """Cross-entropy with soft labels: 1 − share for the true class, share/(K−1) for each other.

    With share 0.1 and ten classes these are the {1/90, 0.9} of Warde-Farley & Goodfellow (2016).
    PyTorch's own ``label_smoothing`` spreads its share over all K classes, the true one too;
    hence the factor K/(K−1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x).float()
        classes = logits.shape[1]
        return F.cross_entropy(logits, y, label_smoothing=share * classes / (classes - 1))

    return loss


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
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``data.train`` and leave it in eval mode.

    Parameters
    ----------
    model : Module
        Maps images (N, C, H, W) in [0, 1] to logits (N, K). Moved to the data's device.
    loss : callable (model, x, y) -> scalar
        The objective; a defense that changes the objective is such a function.
    optimizer : Optimizer, optional
        SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4 by default.
    schedule : LRScheduler, optional
        Stepped once an epoch.
    augment : callable (x, generator) -> x, optional
        Applied to each batch, e.g. :func:`defenses.data.crop_and_flip`.
    seed : int
        Fixes the order of the images, the augmentation and dropout. The weights at the start are
        the model's own.
    checkpoint : path, optional
        Written after each epoch, atomically. If it is there, training goes on from it and ends
        with the same weights, bit for bit, as a run that was never stopped.

    Returns
    -------
    list of dict
        One an epoch: ``epoch``, ``loss`` (mean over the images), ``seconds``.

    Raises
    ------
    ValueError
        If the checkpoint belongs to another run.
    FloatingPointError
        If the loss of an epoch is not finite.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1; got {epochs}, {batch_size}")
    images, labels = data.train
    device = images.device
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    run = {"data": data.name, "images": len(images), "batch_size": batch_size, "seed": seed}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = _resume(checkpoint, run, parts, epochs) if checkpoint is not None else []

    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.backends.cudnn.flags(deterministic=True):
        for epoch in range(len(history), epochs):
            start, total = time.perf_counter(), torch.zeros((), device=device)
            # Each epoch draws from its own seed, so that resuming needs no generator's state.
            torch.manual_seed(1_000_003 * seed + epoch)
            generator = torch.Generator(device).manual_seed(1_000_003 * seed + epoch)
            model.train()
            steps = batches(images, labels, batch_size, generator)
            bar = {"total": -(-len(images) // batch_size), "leave": False, "disable": not progress}
            for x, y in tqdm(steps, f"epoch {epoch + 1}/{epochs}", mininterval=0.5, **bar):
                if augment is not None:
                    x = augment(x, generator)
                with torch.autocast(device.type, torch.bfloat16, enabled=_has_bfloat16(device)):
                    value = loss(model, x, y)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.detach() * len(x)
            if schedule is not None:
                schedule.step()
            mean = total.item() / len(images)
            if mean != mean or mean in (float("inf"), float("-inf")):
                raise FloatingPointError(
                    f"the loss became {mean} in epoch {epoch + 1}: lower the learning rate"
                )
            seconds = time.perf_counter() - start
            history.append({"epoch": epoch + 1, "loss": mean, "seconds": seconds})
            if checkpoint is not None:
                _save(checkpoint, run, parts, history)
    model.eval()
    return history


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _save(path: str | Path, run: dict, parts: dict, history: list) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        torch.save({"run": run, "history": history, "states": states}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _resume(path: str | Path, run: dict, parts: dict, epochs: int) -> list:
    path = Path(path)
    if not path.exists():
        return []
    remedy = "delete it to start anew, or name another"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        stored, history, states = saved["run"], saved["history"], saved["states"]
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint; {remedy}") from error
    if stored != run or len(history) > epochs:
        raise ValueError(
            f"{path} belongs to another run ({stored}, {len(history)} epochs; "
            f"asked for {run}, {epochs} epochs); {remedy}"
        )
    try:
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(states[name])
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} was written for another model or optimizer; {remedy}: {error}"
        ) from error
    return history
