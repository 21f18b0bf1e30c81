"""The processes that train one draft together, started by ``torchrun``; alone, one that needs none of this.

Rank 0 reads the tables, writes checkpoints, registers and answers; the others take their share of every step's
windows. What a step's means are divided by is summed over all of them, so the loss and the gradient are those of one
process. Processors talk over gloo, GPUs over NCCL.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["ddp", "fsdp2"]


class Ranks(Protocol):
    """This process among those that train together."""

    rank: int
    size: int

    def wrap(self, module: nn.Module, parallel: Parallel) -> nn.Module:
        """The module whose gradients are means over all ranks."""

    def gradients(self, module: nn.Module, *, last: bool) -> Any:
        """A context for a pass over a part of a step; gradients are exchanged with the last one."""

    def total(self, own: Tensor) -> Tensor:
        """The sum over all ranks."""


class Alone:
    """The only process."""

    rank, size = 0, 1

    def wrap(self, module: nn.Module, parallel: Parallel) -> nn.Module:  # noqa: ARG002 - it stays in one piece
        """The module itself."""
        return module

    def gradients(self, module: nn.Module, *, last: bool) -> Any:  # noqa: ARG002 - nothing to exchange
        """No context."""
        return nullcontext()

    def total(self, own: Tensor) -> Tensor:
        """What there is."""
        return own


class Together:
    """One of several processes."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def wrap(self, module: nn.Module, parallel: Parallel) -> nn.Module:
        """The module as ``train.parallel`` says: whole in every process, or in shares."""
        if parallel == "ddp":
            return DistributedDataParallel(module, broadcast_buffers=False)
        fully_shard(module, mesh=init_device_mesh(self._device.type, (self.size,)))
        return module

    def gradients(self, module: nn.Module, *, last: bool) -> Any:
        """A context in which the backward pass exchanges gradients only if it is the step's last one."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else cast(DistributedDataParallel, module).no_sync()

    def total(self, own: Tensor) -> Tensor:
        """The sum over all ranks."""
        summed = own.detach().clone()
        dist.all_reduce(summed)
        return summed

    def tell(self, order: object) -> None:
        """Rank 0: give every other rank an order."""
        dist.broadcast_object_list([order])

    def told(self) -> Any:
        """The others: wait for the next order of rank 0."""
        order: list[Any] = [None]
        dist.broadcast_object_list(order)
        return order[0]


@contextmanager
def joined(device: torch.device) -> Iterator[Alone | Together]:
    """This process among those that ``torchrun`` started with it, or alone where it did not.

    One of several ends with the context.

    Args:
        device: Where this process computes.
    """
    if not dist.is_torchelastic_launched():
        yield Alone()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Orders are told over gloo in any case, gradients where they are.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    code = 1
    try:
        yield Together(device)
        dist.barrier()
        code = 0
    except Exception:  # noqa: BLE001 - whatever it is, it ends this process, and torchrun ends the others
        traceback.print_exc()
    finally:
        # Taking gloo's group apart waits for threads that may wait for the interpreter's lock, which is held meanwhile.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may lie in shares, put together; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(shared: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a whole tensor that lies where and as another one does."""
    if isinstance(shared, DTensor):
        return distribute_tensor(
            tensor.to(shared.device, copy=True), shared.device_mesh, shared.placements, src_data_rank=None
        )
    return tensor.to(shared.device, copy=True)
