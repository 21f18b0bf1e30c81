"""Recorder: turns captured steps into verify steps on its own thread, and hands them to the trace publisher.

A server may start a step before it has read the result of the one before, so a request may be decoded a little beyond
its end. A verify step is published only when the server has committed its tokens; tokens beyond the end are cut. Where
the server does not report the end to the process that runs the steps, the recorder finds it in the output.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import structlog
from torch import Tensor

from schemas.errors import UserError
from schemas.speculator.checkpoint import CheckpointError, read_manifest, read_shape
from schemas.speculator.target_fingerprint import target_fingerprint
from schemas.trace.record import VerifyStep
from serving.answers.answer_publisher import AnswerPublisher
from serving.answers.shared_corpus import SharedCorpus
from serving.engines.base import Finish, Request
from serving.engines.plugin.capture import PendingTensors, elapsed_us
from serving.engines.plugin.metrics import CaptureLimit, PluginMetrics, SuffixMetrics
from serving.engines.plugin.row_drafter import RowDraft
from serving.engines.plugin.verify_steps import (
    ActiveSpeculator,
    OutputLimit,
    PrefillOutput,
    StepTimes,
    VerifyOutput,
    build_prefill,
    build_verify_step,
    cut_at_end,
    find_end,
    new_tokens,
)
from serving.traces.chunks import Origin
from serving.traces.publisher import TracePublisher

log = structlog.get_logger()

MAX_QUEUED_STEPS = 64
"""Steps that may wait here; further ones are dropped and counted."""
_METRICS_INTERVAL_S = 1.0
_LOG_INTERVAL_S = 60.0
_CLOSE_S = 2.0

Duration = tuple[Any, Any]
"""Two stamps of ``HostTransfer``."""


@dataclass(slots=True, eq=False)
class RecordedRequest:
    """A request that is recorded."""

    request: Request
    verify_steps: int = 0
    """Verify steps so far; counted by the hooks."""
    is_stopped: bool = False
    """No further step is recorded; set by the hooks."""
    uncommitted: deque[VerifyStep] = field(default_factory=deque)
    """Verify steps that the server may not have committed; used by the recorder's thread only."""
    limit: OutputLimit | None = None
    """What ends the request; None if the server reports the end. The recorder then fills the next two fields."""
    output: list[int] = field(default_factory=list)
    end: tuple[int, Finish] | None = None
    """Tokens of prompt and answer together, and why the request ended."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A part of a prompt in a prefill."""

    recorded: RecordedRequest
    position: int
    tokens: tuple[int, ...]
    is_end: bool


@dataclass(frozen=True, slots=True)
class VerifiedRequest:
    """A request in a verify step."""

    recorded: RecordedRequest
    number: int
    speculator: ActiveSpeculator
    """The version that drafted."""
    committed: int | None
    """Tokens of the request that the server had committed before the step; None: the root and all before it."""
    draft: RowDraft | None = None
    """What was drafted; None where the speculator alone drafts."""


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """Captured tensors of one step, and its recorded requests in the order of its rows."""

    members: tuple[PromptPart | VerifiedRequest, ...]
    pending: PendingTensors
    drafting: Duration
    verification: Duration
    time_us: int
    width: int
    """F; also where features are not published."""


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """The end of a request."""

    recorded: RecordedRequest
    output: tuple[int, ...] | None
    """The complete answer; None for a request with a limit."""
    finish: Finish
    """Why it ended. For a request with a limit: if its output does not show that."""


@dataclass(frozen=True, slots=True)
class ReportedCorpus:
    """A corpus with its metrics."""

    shared: SharedCorpus
    metrics: SuffixMetrics


class Recorder:
    """Takes steps from the thread that runs them; never blocks it.

    Args:
        publisher: Not started yet.
        read_origin: Returns the origin of the traces; may take long.
        limit: Counts the time of this thread.
        metrics: Counters.
        answers: Publishes the answers, with the same origin; None where no node drafts from them.
        corpus: Gets the answers, too; None where the server does not draft from them.
    """

    def __init__(
        self,
        publisher: TracePublisher,
        read_origin: Callable[[], Origin],
        limit: CaptureLimit,
        metrics: PluginMetrics,
        answers: AnswerPublisher | None = None,
        corpus: ReportedCorpus | None = None,
    ) -> None:
        self._answers, self._corpus = answers, corpus
        self._publisher, self._read_origin, self._limit, self._metrics = publisher, read_origin, limit, metrics
        self._queue: SimpleQueue[CapturedStep | RequestEnd | None] = SimpleQueue()
        self.is_disabled = False
        """Nothing is recorded: the server's models do not belong to a version."""
        self._thread = threading.Thread(target=self._run, name="aurora-recorder", daemon=True)
        self._thread.start()

    def sample(self, request: str) -> bool:
        """Return whether a request is in the sample. Call it once per request."""
        return not self.is_disabled and self._publisher.sample(request)

    def is_full(self) -> bool:
        """Return whether the queue is full."""
        return self._queue.qsize() >= MAX_QUEUED_STEPS

    def put(self, item: CapturedStep | RequestEnd) -> None:
        """Queue a step or an end."""
        if not self.is_disabled:
            self._queue.put(item)

    def close(self) -> None:
        """Publish the queued steps, within two seconds."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        if not self._start_publisher():
            return
        logged = exported = time.monotonic()
        while True:
            item = self._queue.get()
            if item is None:
                break
            start = time.thread_time()
            try:
                self._process(item)
            except Exception:
                # A malformed step must not end the recording of the next ones.
                log.exception("aurora_step_malformed")
                count = len(item.members) if isinstance(item, CapturedStep) else 1
                self._metrics.steps_dropped.labels("malformed").inc(count)
            self._limit.add_cost(time.thread_time() - start)
            if (now := time.monotonic()) - exported >= _METRICS_INTERVAL_S:
                exported = now
                self._export()
            if now - logged >= _LOG_INTERVAL_S:
                logged = now
                self._log("aurora_traces_counted")
        self._publisher.close(_CLOSE_S / 2)
        if self._answers is not None:
            self._answers.close(_CLOSE_S / 4)
        if self._corpus is not None:
            self._corpus.shared.stop()
        self._export()
        self._log("aurora_traces_closed")

    def _start_publisher(self) -> bool:
        """Read the origin, while steps wait in the queue; without one, disable the recording."""
        try:
            origin = self._read_origin()
        except (CheckpointError, UserError, OSError) as error:
            why = str(error)
        else:
            self._publisher.start(origin)
            if self._answers is not None:
                self._answers.start(origin.node, origin.line)
            if self._corpus is not None:
                self._corpus.shared.start(origin.line)
            log.info("aurora_recording_started", target=origin.target, line=origin.line)
            return True
        self.is_disabled = True
        log.error("aurora_recording_disabled", why=why)
        while not self._queue.empty():  # queued steps hold pinned memory
            self._queue.get()
        return False

    def _process(self, item: CapturedStep | RequestEnd) -> None:
        if isinstance(item, RequestEnd):
            self._publish_end(item)
            return
        arrays = {name: _to_array(tensor) for name, tensor in item.pending.wait().items()}
        times = StepTimes(elapsed_us(*item.drafting), elapsed_us(*item.verification), item.time_us)
        at = 0
        for row, member in enumerate(item.members):
            if isinstance(member, VerifiedRequest):
                output = _verify_output(arrays, row, item.width)
                committed = output.position + 1 if member.committed is None else member.committed
                self._publish_committed(member.recorded, committed)
                sources = member.draft.sources() if member.draft else None
                step = build_verify_step(output, member.number, member.speculator, times, sources)
            else:
                length = len(member.tokens)
                step = build_prefill(_prefill_output(arrays, row, slice(at, at + length), member, item.width), times)
                at += length
            _append(member.recorded, step)

    def _publish_end(self, item: RequestEnd) -> None:
        recorded = item.recorded
        verify_steps, output, finish = tuple(recorded.uncommitted), item.output, item.finish
        if output is not None:
            verify_steps = cut_at_end(verify_steps, len(recorded.request.prompt) + len(output))
        elif recorded.end is not None:
            total, finish = recorded.end
            verify_steps = cut_at_end(verify_steps, total)
            length = total - len(recorded.request.prompt)
            if length <= len(recorded.output):  # no step of the answer was dropped
                output = tuple(recorded.output[:length])
        self._publisher.record(recorded.request, verify_steps, finish)
        recorded.uncommitted.clear()
        if output is None or finish not in ("stop", "length"):
            return
        if self._answers is not None:
            self._answers.publish(recorded.request, output)
        if self._corpus is not None:
            self._corpus.shared.add(recorded.request, output)

    def _publish_committed(self, recorded: RecordedRequest, committed: int) -> None:
        """Publish the verify steps whose tokens, the bonus token included, are among the first ``committed`` ones."""
        uncommitted, ready = recorded.uncommitted, []
        while recorded.end is None and uncommitted and uncommitted[0].position + len(uncommitted[0].tokens) < committed:
            ready.append(uncommitted.popleft())
        if ready:
            self._publisher.record(recorded.request, tuple(ready), None)

    def _export(self) -> None:
        self._metrics.update(self._publisher.counts(), self._answers.counts() if self._answers else None)
        if self._corpus is not None:
            self._corpus.metrics.update_corpus(self._corpus.shared)
        self._metrics.circuit_breaker_open.set(int(self._publisher.circuit_breaker != "closed"))
        self._metrics.time_ratio.set(self._limit.time_ratio)
        self._metrics.request_ratio.set(self._limit.request_ratio)

    def _log(self, event: str) -> None:
        counts = self._publisher.counts()
        log.info(
            event,
            captured=counts.captured,
            published=counts.published,
            dropped=counts.dropped,
            unsampled=counts.unsampled,
            circuit_breaker=self._publisher.circuit_breaker,
            time_ratio=round(self._limit.time_ratio, 4),
            request_ratio=round(self._limit.request_ratio, 3),
        )


def read_origin(node: str, model: str, draft: str, width: int, fingerprint_cache: str = "") -> Origin:
    """Return the origin of this server's traces, with target and line named as in the built-in engine.

    Args:
        node: Name of the node.
        model: The server's target: a folder, or a name on the hub.
        draft: The draft that it started with, likewise.
        width: F: values of a token's captured hidden states.
        fingerprint_cache: File with the hashes of the target's files; empty reads the whole target.

    Raises:
        CheckpointError: the draft is no version of Aurora, or belongs to another target.
    """
    folder = model_folder(draft)
    manifest, shape = read_manifest(folder), read_shape(folder)
    if width != 3 * shape.hidden_size:
        raise CheckpointError(f"{folder}: needs {3 * shape.hidden_size} values per token, the server has {width}")
    target = target_fingerprint(model_folder(model), fingerprint_cache)
    if manifest.target != target:
        raise CheckpointError(f"{folder}: is a draft for target {manifest.target}, the server runs {target}")
    return Origin(node, target, manifest.line, shape.vocab_size)


def model_folder(path: str) -> Path:
    """Return a folder, or the cached folder of a name on the Hugging Face hub: the server has loaded it from there."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{path}: neither a folder nor in the hub's cache") from error


def _append(recorded: RecordedRequest, step: VerifyStep) -> None:
    """Add a verify step, unless the request has ended before it."""
    if recorded.end is not None:
        return
    recorded.uncommitted.append(step)
    if recorded.limit is not None:
        recorded.output += new_tokens(step)
        recorded.end = find_end(step, recorded.limit)


def _to_array(tensor: Tensor) -> Any:
    found = tensor.numpy()
    return found.view(np.uint16) if found.dtype == np.int16 else found


def _verify_output(arrays: Mapping[str, Any], row: int, width: int) -> VerifyOutput:
    return VerifyOutput(
        position=int(arrays["position"][row]),
        draft_tokens=arrays["draft_tokens"][row],
        first_child=arrays["first_child"][row],
        next_sibling=arrays["next_sibling"][row],
        accepted=arrays["accepted"][row][: int(arrays["count"][row])].tolist(),
        chosen=arrays["chosen"][row],
        features=arrays["features"][row] if "features" in arrays else np.empty((0, width), np.uint16),
        top_ids=arrays["top_ids"][row],
        top_logprobs=arrays["top_logprobs"][row],
    )


def _prefill_output(arrays: Mapping[str, Any], row: int, span: slice, part: PromptPart, width: int) -> PrefillOutput:
    return PrefillOutput(
        position=part.position,
        tokens=part.tokens,
        features=arrays["features"][span] if "features" in arrays else np.empty((0, width), np.uint16),
        chosen=int(arrays["chosen"][row]) if part.is_end else None,
        top_ids=arrays["top_ids"][row],
        top_logprobs=arrays["top_logprobs"][row],
    )
