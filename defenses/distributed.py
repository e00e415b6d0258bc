"""One training or evaluation in several processes, a GPU each: what `torchrun` starts.

Inert until `start` is called, as a chapter's `Run` does. Then `fit` and `evaluate` are collective:
every process calls them with the same arguments and gets the same result.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as FusedBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
LONGEST = timedelta(hours=12)  # our choice: one process may be at work on its own for so long
_started = False


def start() -> None:
    """Join the processes that `torchrun` has started, each on a GPU of its own where there are any.

    Without `torchrun` it does nothing; a process group that is there already is taken as it is.

    Raises
    ------
    ValueError
        If this machine has GPUs, but fewer than processes.
    """
    global _started
    if not dist.is_available() or _started:
        return
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend, local = "gloo", int(os.environ["LOCAL_RANK"])
        if count := torch.cuda.device_count():
            if local >= count:
                raise ValueError(f"{count} GPUs: take torchrun --nproc-per-node={count} or fewer")
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=LONGEST)
        atexit.register(dist.destroy_process_group)
    _started = dist.is_initialized()


def processes() -> tuple[int, int]:
    """The number of this process, and of how many; (0, 1) where there is one alone."""
    return (dist.get_rank(), dist.get_world_size()) if _started else (0, 1)


def of_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, for all; only there it is called."""
    if processes()[1] == 1:
        return make()
    made: list[Any] = [make() if processes()[0] == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def in_turn(rows: list[T]) -> list[T]:
    """The rows of all processes where each has every so many-th, in their order; tensors on the
    CPU. Alone, the rows themselves."""
    world = processes()[1]
    if world == 1:
        return rows
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, tree_map_only(Tensor, Tensor.cpu, rows))
    return [parts[k % world][k // world] for k in range(sum(map(len, parts)))]


def total(value: Tensor) -> Tensor:
    """The sum of `value` over the processes; it can be differentiated, in all of them at once."""
    return cast(Tensor, _Total.apply(value)) if processes()[1] > 1 else value


def check_shares(count: int, batch_size: int) -> None:
    """Raise a ValueError where one of the batches of `count` images has none for some process."""
    world = processes()[1]
    if (smallest := count % batch_size or batch_size) < world:
        raise ValueError(
            f"a batch of {smallest} images cannot be divided among {world} processes ({count} "
            f"images, batch_size={batch_size}): take another batch size, or fewer processes"
        )


def shared(model: nn.Module, loss: Loss) -> Loss:
    """`loss` for a process that sees a share of each batch; alone, the loss itself.

    Its value is that of the share. Its gradient is that of the whole batch, if the loss is a mean
    over images: PyTorch's `DistributedDataParallel` averages over the processes, and each counts
    by its number of images. It wraps the objective, not the model, so that a loss may look into the
    model and attack it. Batch normalization sees the whole batch, also on a CPU.
    """
    world = processes()[1]
    if world == 1:
        return loss
    objective = DistributedDataParallel(_Objective(model, loss), find_unused_parameters=True)

    def of_share(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with _BatchNorms():
            value = objective(x, y)
        count = total(torch.tensor(len(x), device=x.device))
        value.register_hook(lambda gradient: gradient * (world * len(x)) / count)
        return value

    return of_share


class _Objective(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model, x, y)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Total.apply(gradient)


class _BatchNorms(TorchFunctionMode):
    """Inside, batch normalization that trains takes mean and variance over all processes.

    PyTorch's own is fused and for GPUs alone; on a CPU it is written out.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.batch_norm or not (kwargs or {}).get("training"):
            return func(*args, **(kwargs or {}))
        return _normalized(*args, **kwargs)


def _normalized(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if x.is_cuda:
        running = running_mean, running_var, eps, momentum
        return FusedBatchNorm.apply(x, weight, bias, *running, dist.group.WORLD, processes()[1])
    places, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    *sums, count = total(
        torch.cat([wide.sum(places), wide.new_tensor([x.numel() / x.shape[1]])])
    ).split([x.shape[1], 1])
    mean = sums[0] / count
    centered = wide - mean.view(shape)
    var = total(centered.square().sum(places)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var), momentum)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    y = centered * scale.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)
