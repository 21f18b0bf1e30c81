"""Several processes that train one draft together, started by ``torchrun``.

Rank 0 reads the tables, writes checkpoints, registers versions and serves the status page; it broadcasts each call on
its learner, and the other ranks make the same call with their share of the samples. Rank 0 sends samples without their
features: each rank reads those of its own share from files, which rank 0 writes. Where the ranks share no folder, the
features are sent. The denominators of the loss are summed over all ranks, so loss and gradient equal those of one
process. CPUs communicate over gloo, GPUs over NCCL.
"""

from __future__ import annotations

import os
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, TypeVarTuple, Unpack, cast

import structlog
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.data.batch import Share, StepBatch, collate_share
from trainer.objective.losses import Loss

if TYPE_CHECKING:
    from trainer.loop.learner import Learner

log = structlog.get_logger()

Parallel = Literal["ddp", "fsdp2"]
Args = TypeVarTuple("Args")
T = TypeVar("T")


class Ranks:
    """The process group of a training without ``torchrun``: this process alone."""

    rank, size = 0, 1
    checkpoint_group: dist.ProcessGroup | None = None
    """For checkpoints, which another thread writes while the ranks train."""

    def wrap(self, module: nn.Module, parallel: Parallel) -> nn.Module:  # noqa: ARG002 - not sharded
        """Return the module whose gradients are averaged over all ranks."""
        return module

    def synchronize(self, module: nn.Module, *, last: bool) -> AbstractContextManager[object]:  # noqa: ARG002
        """Return a context for the backward of a part of a step; only the last part exchanges gradients."""
        return nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return tensor


class TorchrunRanks(Ranks):
    """The ranks that ``torchrun`` started, seen from this process."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self.checkpoint_group = dist.new_group(backend="gloo")

    def wrap(self, module: nn.Module, parallel: Parallel) -> nn.Module:
        """Wrap the module with DDP (whole in every process) or FSDP2 (sharded)."""
        if parallel == "ddp":
            return DistributedDataParallel(module, broadcast_buffers=False)
        fully_shard(module, mesh=init_device_mesh(self._device.type, (self.size,)))
        return module

    def synchronize(self, module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Return a context for the backward of a part of a step; only the last part exchanges gradients."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else cast(DistributedDataParallel, module).no_sync()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        summed = tensor.detach().clone()
        dist.all_reduce(summed)
        return summed


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the process group if ``torchrun`` started this process; such a process exits with the context.

    Args:
        device: Where this process computes.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Calls are broadcast over gloo in any case, gradients on their device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    code = 1
    try:
        yield TorchrunRanks(device)
        dist.barrier()
        code = 0
    except Exception:  # noqa: BLE001 - any error ends this process, and torchrun ends the others
        traceback.print_exc()
    finally:
        # Destroying gloo's group waits for threads that may wait for the interpreter's lock, which it holds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class DistributedLearner:
    """The learners of all ranks as one, driven by rank 0; with one process it calls its learner directly."""

    def __init__(self, learner: Learner, ranks: Ranks) -> None:
        self.learner = learner
        self._distributed = isinstance(ranks, TorchrunRanks)

    def call(self, method: Callable[[Learner, Unpack[Args]], T], *args: *Args) -> T:
        """Call a method of the learner on all ranks, with the same arguments; return the result of rank 0."""
        self._broadcast((method, args))
        return method(self.learner, *args)

    def step(self, batch: StepBatch) -> Loss:
        """Call ``Learner.step`` on all ranks, each with its share of the batch."""
        self._broadcast((_step_on_share, ()))
        if self._distributed:
            dist.scatter_object_list([None], [(), *batch.shares])
        return self.learner.step(*batch.batches)

    def share_folder(self, folder: Path) -> bool:
        """Return whether there are other ranks, and all of them can read the files that rank 0 writes to a folder."""
        if not self._distributed:
            return False
        probe = folder / f"probe-{uuid.uuid4()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            is_shared = self.call(_is_visible_to_all, probe)
            probe.unlink(missing_ok=True)
        except OSError as error:
            log.warning("features_sent_to_ranks", folder=str(folder), setting="train.spill_dir", error=str(error))
            return False
        if not is_shared:
            log.warning("features_sent_to_ranks", folder=str(folder), setting="train.spill_dir", error="not shared")
        return is_shared

    def keep_alive(self) -> None:
        """Prevent gloo's timeout of half an hour while there is nothing to do."""
        self._broadcast((_do_nothing, ()))

    def close(self) -> None:
        """End the other ranks."""
        self._broadcast(None)

    def _broadcast(self, call: tuple[Callable[..., object], tuple[object, ...]] | None) -> None:
        if self._distributed:
            dist.broadcast_object_list([call])


def follow_rank_0(learner: Learner) -> None:
    """Make the calls that rank 0 broadcasts, until it closes."""
    while True:
        received: list[Any] = [None]
        dist.broadcast_object_list(received)
        if received[0] is None:
            return
        method, args = received[0]
        method(learner, *args)


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded; on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def match_layout(sharded: Tensor, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, whole or in that layout, with the device and the sharding of another one."""
    if isinstance(sharded, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(
            tensor.to(sharded.device, copy=True), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    return tensor.to(sharded.device, copy=True)


def _step_on_share(learner: Learner) -> Loss:
    received: list[Share] = [()]
    dist.scatter_object_list(received, None)
    return learner.step(*collate_share(received[0]))


def _is_visible_to_all(learner: Learner, file: Path) -> bool:
    return bool(learner.ranks.sum(torch.tensor(float(file.exists()))) == learner.ranks.size)


def _do_nothing(_: Learner) -> None:
    pass
