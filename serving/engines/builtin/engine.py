"""The built-in engine: a thread that runs verify steps, and the small mailbox through which everything reaches it."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from schemas.device import device_of
from schemas.settings import Settings, SettingsError
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.initial_draft import Line, read_line
from schemas.speculator.network import EagleDraft
from serving.engines.base import (
    EngineFullError,
    EngineHealth,
    Finish,
    Output,
    Request,
    RequestStats,
    SwapResult,
    TraceSink,
)
from serving.engines.builtin.calibration import measure
from serving.engines.builtin.drafter import Drafter, pack_draft
from serving.engines.builtin.target import Target
from serving.engines.builtin.verify import Decided, Models, Running, run_verify_step
from serving.planner import Utility

log = structlog.get_logger()

_NO_STATS = RequestStats(0, 0, 0, ())


class BuiltinEngine:
    """Implements ``serving.engines.base.Engine`` on PyTorch.

    The verify step thread alone touches the models and the caches. Other threads leave requests, cancellations and
    swaps in
    a mailbox, which is emptied between two verify steps.
    """

    def __init__(self, settings: Settings, sink: TraceSink | None = None) -> None:
        serve = settings.serve
        torch.set_num_threads(serve.num_threads)
        line, self._target = _load(settings)
        self.target, self.line, self.weights = line.target, line.name, self._target.kind
        self.vocabulary = self._target.shape.vocab_size
        self.max_tokens = serve.max_model_len
        self._drafter = Drafter(
            line.day_0,
            self._target.embeddings_VH,
            serve.max_num_seqs,
            serve.max_model_len + serve.num_speculative_tokens + 1,
            width=serve.draft_tree_width,
            nodes=serve.draft_tree_nodes,
        )
        costs = measure(self._target, self._drafter, serve.max_num_seqs)
        self._utility = Utility(costs, serve.num_speculative_tokens, adaptive=serve.adaptive_drafting)
        self._models = Models(
            self._target,
            self._drafter,
            self._utility,
            settings.traces.top_k,
            serve.max_model_len,
            serve.max_prefill_stall,
        )
        self._version = settings.speculator.day_0
        self._serve, self._sink = serve, sink

        self._mail = threading.Condition()
        self._waiting: deque[tuple[Request, Callable[[Output], None]]] = deque()
        self._cancelled: set[str] = set()
        self._swaps: deque[tuple[EagleDraft, str, Future[SwapResult]]] = deque()
        self._stopping = False

        self._speculating = serve.speculate
        self._active: list[Running] = []
        self._free = list(range(serve.max_num_seqs))
        """A heap: the lowest slot is taken first, so that few requests lie in the first ones."""
        self._verify_steps = self._drafted = self._accepted = self._output_tokens = 0
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="verify_steps", daemon=True)

    def start(self) -> None:
        """Begin to run verify steps."""
        self._thread.start()

    def stop(self) -> None:
        """End the verify steps; running and waiting requests finish with ``cancelled``."""
        with self._mail:
            self._stopping = True
            self._mail.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queue a request.

        Raises:
            EngineFullError: ``serve.max_waiting_requests`` requests wait already, or the engine has stopped.
        """
        if not 0 < len(request.prompt) < self.max_tokens:
            raise ValueError(f"a prompt has 1 to {self.max_tokens - 1} tokens, this one {len(request.prompt)}")
        with self._mail:
            if self._stopping or self._error:
                raise EngineFullError(self._error or "the engine is stopping")
            if len(self._waiting) >= self._serve.max_waiting_requests:
                raise EngineFullError(f"{len(self._waiting)} requests wait already (serve.max_waiting_requests)")
            self._waiting.append((request, on_output))
            self._mail.notify()

    def cancel(self, request_id: str) -> None:
        """End a request before its next verify step; an unknown id has ended already."""
        with self._mail:
            self._cancelled.add(request_id)
            self._mail.notify()

    def check(self, draft: EagleDraft) -> None:
        """Smoke-draft with the given weights on the caller's thread.

        Raises:
            CheckpointError: another shape or vocabulary, or values that are not finite.
        """
        self._drafter.check(draft)

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        """Put checked weights in place between two verify steps; blocks until they are."""
        packed = pack_draft(draft, self._target.device)
        done: Future[SwapResult] = Future()
        with self._mail:
            if self._stopping or self._error:
                raise EngineFullError(self._error or "the engine is stopping")
            self._swaps.append((packed, version, done))
            self._mail.notify()
        return done.result()

    def speculate(self, *, on: bool) -> None:
        """Draft from the next verify step on, or stop it; a node started without speculation stays without."""
        self._speculating = on and self._serve.speculate

    def health(self) -> EngineHealth:
        """Counters and state."""
        forecast = self._utility.forecast
        return EngineHealth(
            alive=self._thread.is_alive() and self._error is None,
            speculator=self._version if self._serve.speculate else "",
            speculating=self._speculating,
            draft_depth=forecast.depth if self._speculating else 0,
            expected_tokens_per_second=forecast.rates,
            requests_running=len(self._active),
            requests_waiting=len(self._waiting),
            verify_steps=self._verify_steps,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
            output_tokens=self._output_tokens,
            error=self._error,
        )

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._collect_mail():
                    self._verify_step()
        except Exception as error:
            # Whatever broke a verify step has left the caches undefined, so nothing narrower can be answered: every
            # request
            # is told, the node turns unhealthy, and its supervisor starts it again.
            log.exception("engine_died")
            self._error = f"{type(error).__name__}: {error}"
        self._close()

    def _collect_mail(self) -> bool:
        """Wait for something to do, take it in, and say whether to go on."""
        with self._mail:
            while not (self._stopping or self._swaps or self._active or self._waiting):
                self._cancelled.clear()
                self._mail.wait()
            if self._stopping:
                return False
            cancelled, self._cancelled = self._cancelled, set()
            gone = [entry for entry in self._waiting if entry[0].id in cancelled]
            self._waiting = deque(entry for entry in self._waiting if entry[0].id not in cancelled)
            arrived = [self._waiting.popleft() for _ in range(min(len(self._free), len(self._waiting)))]
            swaps, self._swaps = self._swaps, deque()
        for _, on_output in gone:
            on_output(Output((), finish="cancelled", stats=_NO_STATS))
        for r in [r for r in self._active if r.request.id in cancelled]:
            self._finish(r, Output((), finish="cancelled", stats=r.stats))
        for draft, version, done in swaps:
            self._take(draft, version, done)
        for request, on_output in arrived:
            self._admit(request, on_output)
        return True

    def _admit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        generator = torch.Generator()
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        request = replace(request, speculate=request.speculate and self._serve.speculate)
        self._active.append(
            Running(request, on_output, heapq.heappop(self._free), generator, tokens=list(request.prompt))
        )

    def _take(self, draft: EagleDraft, version: str, done: Future[SwapResult]) -> None:
        started = time.perf_counter()
        self._drafter.take(draft)
        self._utility.renew()
        self._version = version
        done.set_result(SwapResult(version, len(self._active), (time.perf_counter() - started) * 1e3))

    def _verify_step(self) -> None:
        if not self._active:
            return
        decided = run_verify_step(self._active, self._models, self._version, speculate=self._speculating)
        for result in decided:
            self._deliver(result)

    def _deliver(self, result: Decided) -> None:
        r = result.running
        self._output_tokens += len(result.output)
        if result.verify_step is not None:
            self._verify_steps += 1
            self._drafted += result.verify_step.drafted
            self._accepted += result.verify_step.accepted
        if self._sink is not None and result.trace is not None:
            self._sink.record(r.request, (result.trace,), r.finish)
        if r.finish is not None:
            self._release(r)
            r.on_output(Output(result.output, result.scores, r.finish, stats=r.stats))
        elif result.output:
            r.on_output(Output(result.output, result.scores))

    def _finish(self, r: Running, output: Output) -> None:
        """End a request outside of a verify step."""
        self._release(r)
        if self._sink is not None and r.request.trace:
            self._sink.record(r.request, (), output.finish)
        r.on_output(output)

    def _release(self, r: Running) -> None:
        self._active.remove(r)
        heapq.heappush(self._free, r.slot)

    def _close(self) -> None:
        """Answer everything that is still open, so that no caller waits for a thread that has ended."""
        with self._mail:
            waiting, self._waiting = self._waiting, deque()
            swaps, self._swaps = self._swaps, deque()
            self._stopping = True
        finish: Finish = "error" if self._error else "cancelled"
        for r in list(self._active):
            self._finish(r, Output((), finish=finish, error=self._error, stats=r.stats))
        for _, on_output in waiting:
            on_output(Output((), finish=finish, error=self._error, stats=_NO_STATS))
        for _, version, done in swaps:
            done.set_exception(EngineFullError(f"version {version} was not swapped in: the engine has stopped"))


def _load(settings: Settings) -> tuple[Line, Target]:
    serve, folder = settings.serve, Path(settings.target.path)
    try:
        line = read_line(folder, settings.speculator)
        target = Target(
            folder,
            line.day_0.shape,
            serve.max_num_seqs,
            serve.max_model_len,
            drafted=serve.draft_tree_nodes,
            weights=serve.weight_dtype,
            device=device_of(serve.device, "serve.device"),
        )
    except CheckpointError as error:
        raise SettingsError(f"target.path {settings.target.path}: {error}") from error
    return line, target
