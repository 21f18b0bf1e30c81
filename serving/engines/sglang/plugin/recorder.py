"""The plugin's own thread: turns what steps gave into verify steps, and hands them to the publisher.

With the overlap scheduler SGLang starts a step before it has looked at what the one before gave, so a request may be
decoded a little beyond its end. A verify step is handed over only when the server has committed its tokens; what
lies beyond
the end is cut.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import structlog
from torch import Tensor

from schemas.errors import UserError
from schemas.speculator.checkpoint import CheckpointError
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Request
from serving.engines.sglang.plugin.cost import CostGate
from serving.engines.sglang.plugin.metrics import Figures
from serving.engines.sglang.plugin.transfer import Pending, microseconds
from serving.engines.sglang.plugin.verify_steps import Read, Times, Verified, prompt_verify_step, verify_step, within
from serving.traces.chunks import Origin
from serving.traces.publisher import TracePublisher

log = structlog.get_logger()

MOST_STEPS = 64
"""Steps that wait here at most; what comes on top is lost and counted."""
_TELL_S = 1.0
_LOG_S = 60.0
_CLOSE_S = 2.0


@dataclass(slots=True, eq=False)
class Traced:
    """A request that is recorded."""

    request: Request
    verify_steps: int = 0
    """Verify steps so far; counted by the hooks."""
    stopped: bool = False
    """Nothing more of it is recorded; set by the hooks."""
    waiting: deque[VerifyStep] = field(default_factory=deque)
    """Not known to be committed; touched by this thread alone."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt that a step has read."""

    traced: Traced
    position: int
    tokens: tuple[int, ...]
    is_end: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """A verify step of one request."""

    traced: Traced
    number: int
    committed: int
    """Tokens of the request that the server had committed before the step."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step gave to the recorded requests, in the order of its rows."""

    members: tuple[Piece | Turn, ...]
    pending: Pending
    speculator: str
    stamps: tuple[Any, Any, Any]
    """Begin, drafted, verified."""
    time_us: int
    width: int
    """F; for where features do not travel."""


@dataclass(frozen=True, slots=True)
class End:
    """A request is over."""

    traced: Traced
    total: int
    """Tokens of prompt and answer."""
    finish: Finish


class Recorder:
    """Takes steps from the scheduler's thread; never blocks it.

    Args:
        publisher: Not started yet.
        origin: Says where the verify steps come from; may take long.
        gate: Pays for this thread's time.
        figures: Counters.
    """

    def __init__(
        self, publisher: TracePublisher, origin: Callable[[], Origin], gate: CostGate, figures: Figures
    ) -> None:
        self._publisher, self._origin, self._gate, self._figures = publisher, origin, gate, figures
        self._inbox: SimpleQueue[Step | End | None] = SimpleQueue()
        self.refused = False
        """Nothing is recorded: the server's models are not those of a version."""
        self._thread = threading.Thread(target=self._run, name="aurora-recorder", daemon=True)
        self._thread.start()

    def wants(self, request: str) -> bool:
        """Whether a request belongs to the traced share; to be asked once."""
        return not self.refused and self._publisher.wants(request)

    def full(self) -> bool:
        """Whether as many steps wait as may."""
        return self._inbox.qsize() >= MOST_STEPS

    def put(self, item: Step | End) -> None:
        """Leave something to do."""
        if not self.refused:
            self._inbox.put(item)

    def close(self) -> None:
        """Publish what is there, within two seconds."""
        self._inbox.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        if not self._begin():
            return
        logged = told = time.monotonic()
        while True:
            item = self._inbox.get()
            if item is None:
                break
            began = time.thread_time()
            try:
                self._take(item)
            except Exception:
                # Whatever one step was like, the next ones are to be recorded.
                log.exception("aurora_step_malformed")
                self._figures.verify_steps_lost.labels("malformed").inc(
                    len(item.members) if isinstance(item, Step) else 1
                )
            self._gate.pay(time.thread_time() - began)
            if (now := time.monotonic()) - told >= _TELL_S:
                told = now
                self._tell()
            if now - logged >= _LOG_S:
                logged = now
                self._log("aurora_traces")
        self._publisher.close(_CLOSE_S / 2)
        self._tell()
        self._log("aurora_traces_closed")

    def _begin(self) -> bool:
        """Name the origin, while steps wait in their queue; without one, give up for good."""
        why = ""
        try:
            origin = self._origin()
        except (CheckpointError, UserError, OSError) as error:
            why = str(error)
        if why:
            self.refused = True
            log.error("aurora_not_recording", why=why)
            while not self._inbox.empty():  # what waits holds pinned memory
                self._inbox.get()
            return False
        self._publisher.start(origin)
        log.info("aurora_recording", target=origin.target, line=origin.line)
        return True

    def _take(self, item: Step | End) -> None:
        if isinstance(item, End):
            traced = item.traced
            self._publisher.record(traced.request, within(traced.waiting, item.total), item.finish)
            traced.waiting.clear()
            return
        found = {name: _array(tensor) for name, tensor in item.pending.wait().items()}
        begin, drafted, verified = item.stamps
        times = Times(microseconds(begin, drafted), microseconds(drafted, verified), item.time_us)
        at = 0
        for row, member in enumerate(item.members):
            if isinstance(member, Turn):
                self._confirm(member)
                r = verify_step(_verified(found, row, item.width), member.number, item.speculator, times)
            else:
                length = len(member.tokens)
                r = prompt_verify_step(_read(found, row, slice(at, at + length), member, item.width), times)
                at += length
            member.traced.waiting.append(r)

    def _confirm(self, turn: Turn) -> None:
        """Hand over the verify steps of which the server has committed every token, the bonus too."""
        waiting, ready = turn.traced.waiting, []
        while waiting and waiting[0].position + len(waiting[0].tokens) < turn.committed:
            ready.append(waiting.popleft())
        if ready:
            self._publisher.record(turn.traced.request, tuple(ready), None)

    def _tell(self) -> None:
        self._figures.tell(self._publisher.counts())
        self._figures.breaker_open.set(int(self._publisher.breaker != "closed"))
        self._figures.spent.set(self._gate.spent)
        self._figures.share.set(self._gate.share)

    def _log(self, event: str) -> None:
        counts = self._publisher.counts()
        log.info(
            event,
            captured=counts.captured,
            published=counts.published,
            shed=counts.shed,
            sampled_out=counts.sampled_out,
            breaker=self._publisher.breaker,
            cost=round(self._gate.spent, 4),
            share=round(self._gate.share, 3),
        )


def _array(tensor: Tensor) -> Any:
    found = tensor.numpy()
    return found.view(np.uint16) if found.dtype == np.int16 else found


def _verified(found: Mapping[str, Any], row: int, width: int) -> Verified:
    features = found["features"][row] if "features" in found else np.empty((0, width), np.uint16)
    return Verified(
        position=int(found["position"][row]),
        drafted=found["drafted"][row],
        first_child=found["first_child"][row],
        next_sibling=found["next_sibling"][row],
        accepted=found["accepted"][row][: int(found["count"][row])].tolist(),
        said=found["said"][row],
        features=features,
        top_ids=found["top_ids"][row],
        top_logprobs=found["top_logprobs"][row],
    )


def _read(found: Mapping[str, Any], row: int, span: slice, piece: Piece, width: int) -> Read:
    return Read(
        position=piece.position,
        tokens=piece.tokens,
        features=found["features"][span] if "features" in found else np.empty((0, width), np.uint16),
        chosen=int(found["said"][row]) if piece.is_end else None,
        top_ids=found["top_ids"][row],
        top_logprobs=found["top_logprobs"][row],
    )
