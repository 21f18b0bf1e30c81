"""What runs inside the server's own steps. Nothing raised here reaches the server.

A step is ``forward_batch_generation`` of the worker; it either reads prompts or drafts and verifies. The calls::

    STEP ──▶ (SAMPLE ─▶ PREFILL)            prompts: scores, then states and the first token
    STEP ──▶ VERIFY ──▶ JUDGE               drafted ─▶ verified ─▶ accepted
    RELEASE                                 a request gives its memory back: it is over, or will be read again

Both may lie a step apart for one request: with the overlap scheduler RELEASE comes after the next JUDGE.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import structlog
from torch import Tensor

from schemas.settings import Settings
from serving.engines.base import Finish
from serving.engines.sglang.plugin import capture
from serving.engines.sglang.plugin.cost import CostGate
from serving.engines.sglang.plugin.metrics import Figures
from serving.engines.sglang.plugin.recorder import End, Piece, Recorder, Step, Traced, Turn
from serving.engines.sglang.plugin.trace_request import asked_of, request_of
from serving.engines.sglang.plugin.transfer import Carrier
from serving.traces.sampling import is_sampled

log = structlog.get_logger()

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "cancelled"}
Hook = TypeVar("Hook", bound=Callable[..., Any])


def guarded(hook: Hook) -> Hook:
    """Keeps what a hook raises from the server, which would die of it; counts it, and pays for the hook's time."""

    @wraps(hook)
    def run(self: Hooks, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a fault of ours, of any kind, would end the scheduler and every request with it
            self.failed(hook.__name__, error)
            return None
        finally:
            self.paid(time.perf_counter() - began)

    return run  # type: ignore[return-value]


class _Sampled(NamedTuple):
    """Scores as they were before the sampler changed them where they lie."""

    output: Any
    top: capture.Top


class _Judging(NamedTuple):
    """Between a verify step's scores and its decision."""

    rows: Sequence[int]
    rows_R: Tensor | None
    top: capture.Top


class Hooks:
    """The state of one scheduler process.

    Args:
        settings: Of traces and of this plugin.
        recorder: Takes what steps gave.
        carrier: Brings it to the host.
        gate: Says how much may be recorded.
        figures: Counters.
        version: Names the draft that the server has now.
    """

    def __init__(
        self,
        settings: Settings,
        recorder: Recorder,
        carrier: Carrier,
        gate: CostGate,
        figures: Figures,
        version: Callable[[], str],
    ) -> None:
        self._traces = settings.traces
        self._recorder, self._carrier, self._gate, self._figures = recorder, carrier, gate, figures
        self._version = version
        self._open: dict[str, Traced] = {}
        self._known_faults: set[str] = set()
        self._spent = 0.0
        self._began: Any = None
        self._drafted: Any = None
        self._verified: Any = None
        self._sampled: _Sampled | None = None

    def failed(self, hook: str, error: Exception) -> None:
        """Count what a hook raised, and show the first of its kind."""
        self._figures.errors.labels(hook).inc()
        if hook not in self._known_faults:
            self._known_faults.add(hook)
            log.error("aurora_hook_failed", hook=hook, exc_info=error)

    def paid(self, seconds: float) -> None:
        """Time that a hook took from the step."""
        self._spent += seconds
        self._gate.pay(seconds)

    @guarded
    def step(self) -> None:
        """A step begins."""
        self._figures.hooks.observe(self._spent)
        self._spent = 0.0
        self._gate.step(time.monotonic())
        self._sampled = None
        self._began = self._drafted = self._verified = self._carrier.stamp()

    @guarded
    def drafted(self) -> None:
        """Drafting is over, the target verifies."""
        self._drafted = self._carrier.stamp()

    @guarded
    def sampling(self, logits_output: Any) -> None:
        """Scores of prompts' last tokens are there."""
        self._verified = self._carrier.stamp()
        self._sampled = _Sampled(logits_output, capture.likeliest(logits_output.next_token_logits, self._traces.top_k))

    @guarded
    def prefilled(self, result: Any, batch: Any) -> None:
        """Pieces of prompts were read."""
        sampled, self._sampled = self._sampled, None
        if batch.forward_mode.is_idle():
            return
        rows, members, spans = self._pieces(batch)
        if not members:
            return
        if sampled is None or sampled.output is not result.logits_output:
            raise RuntimeError("the scores of these prompts were never seen")
        hidden = result.logits_output.hidden_states
        found = capture.prefilled(
            self._states(hidden), result.next_token_ids, sampled.top, self._carrier.rows(rows), spans
        )
        self._put(members, found, hidden.shape[-1])

    @guarded
    def judging(self, verify_input: Any, batch: Any, logits_output: Any) -> _Judging | None:
        """The target has scored every node; the sampler has not changed the scores yet."""
        if batch.forward_mode.is_idle():
            return None
        self._verified = self._carrier.stamp()
        rows = [i for i, req in enumerate(batch.reqs) if self._goes_on(req)]
        if not rows:
            return None
        rows_R = None if len(rows) == len(batch.reqs) else self._carrier.rows(rows)
        top = capture.nodes_of(verify_input, logits_output.next_token_logits, rows_R, self._traces.top_k)
        return _Judging(rows, rows_R, top)

    @guarded
    def judged(self, judging: _Judging, verify_input: Any, batch: Any, logits_output: Any, result: Any) -> None:
        """It is decided which nodes were accepted."""
        members = []
        for row in judging.rows:
            req = batch.reqs[row]
            traced = self._open[req.rid]
            traced.verify_steps += 1
            members.append(Turn(traced, traced.verify_steps, len(req.origin_input_ids) + len(req.output_ids)))
        hidden = logits_output.hidden_states
        found = capture.verified(verify_input, batch, self._states(hidden), result, judging.rows_R, judging.top)
        self._put(tuple(members), found, hidden.shape[-1])

    @guarded
    def released(self, req: Any) -> None:
        """A request gives its memory back."""
        traced = self._open.get(req.rid)
        if traced is None:
            return
        if not req.finished():
            # It is taken out to be read again from its start: what is known of it stays, nothing is added.
            self._stop(traced, "retracted")
            return
        del self._open[req.rid]
        total = len(req.origin_input_ids) + len(req.output_ids_through_stop)
        finish = _FINISH.get(req.finished_reason.to_json()["type"], "error")
        self._recorder.put(End(traced, total, finish))

    def _put(self, members: tuple[Piece | Turn, ...], found: dict[str, Tensor], width: int) -> None:
        if self._recorder.full():
            self._figures.verify_steps_lost.labels("behind").inc(len(members))
            return
        stamps = (self._began, self._drafted, self._verified)
        pending = self._carrier.carry(found)
        self._recorder.put(Step(members, pending, self._version(), stamps, time.time_ns() // 1000, width))

    def _states(self, hidden: Tensor) -> Tensor | None:
        return None if self._traces.features == "recompute" else hidden

    def _goes_on(self, req: Any) -> bool:
        traced = self._open.get(req.rid)
        return traced is not None and not traced.stopped

    def _pieces(self, batch: Any) -> tuple[list[int], tuple[Piece, ...], list[slice]]:
        """Which rows of a batch of prompts are recorded, and where their tokens lie in it."""
        rows, members, spans, at = [], [], [], 0
        for row, (req, start, length) in enumerate(zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)):
            piece = self._piece(req, start, length)
            if piece is not None:
                rows.append(row)
                members.append(piece)
                spans.append(slice(at, at + length))
            at += length
        return rows, tuple(members), spans

    def _piece(self, req: Any, start: int, length: int) -> Piece | None:
        traced = self._open.get(req.rid) or self._admit(req, start)
        if traced is None or traced.stopped:
            return None
        end, prompt = start + length, traced.request.prompt
        if end > len(prompt):
            self._stop(traced, "mixed")  # a request that answers already, in one batch with prompts
            return None
        return Piece(traced, start, prompt[start:end], end == len(prompt))

    def _admit(self, req: Any, start: int) -> Traced | None:
        """Decide once, at its first piece, whether a request is recorded."""
        asked = asked_of(req)
        if asked.untraced or len(req.output_ids):
            self._figures.untraced.labels(asked.untraced or "retracted").inc()
            return None
        if not self._recorder.wants(req.rid):
            return None
        if not is_sampled(req.rid, self._traces.sample_ratio * self._gate.share):
            self._figures.untraced.labels("cost").inc()
            return None
        self._figures.cached.inc(start)
        self._open[req.rid] = traced = Traced(request_of(req, asked))
        return traced

    def _stop(self, traced: Traced, reason: str) -> None:
        if not traced.stopped:
            traced.stopped = True
            self._figures.untraced.labels(reason).inc()
