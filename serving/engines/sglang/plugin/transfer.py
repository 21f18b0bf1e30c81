"""From the server's device to this process's memory, without making the server wait.

On a GPU the tensors handed over are copies that the server's own stream has made: its buffers belong to captured graphs
and are written again in the next step. A stream of ours copies them to pinned memory, and an event says when that is
done; whoever reads them waits for the event on a thread of its own. On a CPU there is nothing to wait for.

The part for GPUs has never run in this repository's tests, which have none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pending:
    """Tensors on their way."""

    tensors: Mapping[str, Tensor]
    done: torch.cuda.Event | None

    def wait(self) -> Mapping[str, Tensor]:
        """The tensors, once they are there; the interpreter is free meanwhile."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensors


class Carrier:
    """Brings tensors of one device, a CPU or a GPU, to the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # torch.cuda has no types for its constructors.
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def carry(self, tensors: Mapping[str, Tensor]) -> Pending:
        """Send tensors that nobody writes to any more, made on the current stream."""
        if self._stream is None:
            return Pending(tensors, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            hosted = {name: self._copied(tensor) for name, tensor in tensors.items()}
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return Pending(hosted, done)

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Row numbers as an index on the device."""
        index = torch.tensor(numbers, dtype=torch.int64)
        return index if self._stream is None else index.pin_memory().to(self._device, non_blocking=True)

    def stamp(self) -> Any:
        """This point of the server's work, for ``microseconds``."""
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _copied(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        # Its memory may not be given to others before our stream has read it.
        tensor.record_stream(self._stream)
        return host


def microseconds(start: Any, end: Any) -> int:
    """Time between two stamps that the device has passed."""
    if isinstance(start, float):
        return int((end - start) * 1e6)
    return int(start.elapsed_time(end) * 1e3)
