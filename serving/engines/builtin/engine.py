"""The built-in engine: a thread that runs verify steps, and a mailbox for requests, cancellations and swaps."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from schemas.answers import Answer
from schemas.device import select_device
from schemas.settings import Settings, SettingsError
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.day_0_draft import SpeculatorLine, read_config, read_line
from schemas.speculator.draft_context import count_skipped
from schemas.speculator.network import EagleDraft
from schemas.trace.record import DraftSource
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.base import (
    AnswerSink,
    EngineFullError,
    EngineHealth,
    Finish,
    Output,
    Request,
    SwapResult,
    TraceSink,
)
from serving.engines.builtin.calibration import calibrate
from serving.engines.builtin.decoder import check_architecture
from serving.engines.builtin.eagle_drafter import EagleDrafter
from serving.engines.builtin.hybrid_drafter import HybridDrafter
from serving.engines.builtin.logits_processors import create_processors
from serving.engines.builtin.packed_draft import PackedDraft
from serving.engines.builtin.prefix_cache import PrefixCache
from serving.engines.builtin.scheduler import Scheduler
from serving.engines.builtin.sequence import Sequence
from serving.engines.builtin.suffix_drafter import SuffixDrafter
from serving.engines.builtin.target import Target
from serving.engines.builtin.verify import StepResult, Verifier
from serving.planner.planner import Planner

log = structlog.get_logger()

_LEARN_TOKENS = 128
"""Tokens of other nodes' answers that are added to the corpus between two verify steps; they take 0.2 ms."""
_IDLE_S = 60
"""Interval at which an engine without work looks whether answers are to be forgotten."""


class BuiltinEngine:
    """Implements ``serving.engines.base.Engine`` on PyTorch.

    Only the engine thread touches the models, the KV caches and running sequences. Other threads leave requests,
    cancellations and swaps in the mailbox, which the engine thread empties between two verify steps. The mailbox's lock
    also guards the scheduler's waiting queue.
    """

    def __init__(self, settings: Settings, sink: TraceSink | None = None, answers: AnswerSink | None = None) -> None:
        serve = settings.serve
        torch.set_num_threads(serve.num_threads)
        line, self._target = _load_target(settings)
        self.target, self.line, self.weight_dtype = line.target, line.name, self._target.weight_dtype
        self.vocabulary, self.eos_ids = self._target.shape.vocab_size, self._target.eos_ids
        self.max_tokens = serve.max_model_len
        self._context_tokens = settings.train.context_tokens
        scope = "request" if serve.drafter == "eagle" else serve.suffix_scope
        self.corpus = ScopedCorpus(scope, serve.suffix_corpus_bytes, settings.kafka.retention)
        speculator = None if serve.drafter == "suffix" else _create_speculator(settings, line, self._target)
        latency = calibrate(self._target, speculator, serve.max_num_seqs)
        self._planner = Planner(
            latency,
            serve.num_speculative_tokens,
            adaptive=serve.adaptive_drafting,
            max_prefill_stall=serve.max_prefill_stall,
        )
        self._drafter = HybridDrafter(
            self._planner,
            speculator,
            None if serve.drafter == "eagle" else SuffixDrafter(self.corpus),
            max_suffix_depth=serve.draft_tree_nodes if serve.adaptive_drafting else serve.num_speculative_tokens,
            max_nodes=serve.draft_tree_nodes,
        )
        self._scheduler = Scheduler(serve.max_num_seqs, serve.max_waiting_requests, self._planner)
        self.prefix_cache = PrefixCache(
            self._target.cache, self._target.shape.feature_width, serve.prefix_cache_bytes, serve.prefix_scope
        )
        self._verifier = Verifier(
            self._target,
            self._drafter,
            self._scheduler,
            self.prefix_cache,
            settings.traces.top_k,
            self._contain_drafter,
        )
        self._may_speculate = self._speculating = serve.speculate
        self._sink, self._answers = sink, answers

        self._mail = threading.Condition()
        self._cancelled: set[str] = set()
        self._swaps: deque[tuple[PackedDraft, str, Future[SwapResult]]] = deque()
        self._stopping = False

        self._verify_steps = self._output_tokens = self._draft_tokens = self._accepted_tokens = 0
        self._suffix_draft_tokens = self._suffix_accepted_tokens = self._drafter_failures = 0
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start to run verify steps."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; running and waiting requests finish with ``cancelled``."""
        with self._mail:
            self._stopping = True
            self._mail.notify()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self._close()

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queue a request.

        Raises:
            ValueError: the prompt is empty, leaves no room for an output token, or has a token that is not in the
                target's vocabulary.
            EngineFullError: ``serve.max_waiting_requests`` requests wait already, or the engine has stopped.
        """
        if not 0 < len(request.prompt) < self.max_tokens:
            raise ValueError(f"a prompt has 1 to {self.max_tokens - 1} tokens, this one {len(request.prompt)}")
        for token in (min(request.prompt), max(request.prompt)):
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"the target's vocabulary has {self.vocabulary} tokens, not the prompt's id {token}")
        request = replace(request, speculate=request.speculate and self._may_speculate)
        max_len = min(len(request.prompt) + request.max_tokens, self.max_tokens)
        grammar = request.grammar.create_matcher() if request.grammar else None
        seq = Sequence(
            request,
            on_output,
            max_len,
            secrets.randbits(64) if request.seed is None else request.seed,
            list(request.prompt),
            processors=create_processors(request, self.eos_ids, grammar),
            grammar=grammar,
            keeps_features=self._drafter.speculator is not None,
            root=self.prefix_cache.choose_root(request),
            num_draft_skipped_tokens=count_skipped(len(request.prompt), self._context_tokens),
        )
        with self._mail:
            self._check_open()
            self._scheduler.add(seq)
            self._mail.notify()

    def cancel(self, request_id: str) -> None:
        """End a request before its next verify step. Ignore unknown ids: their requests have ended."""
        with self._mail:
            self._cancelled.add(request_id)
            self._mail.notify()

    def check(self, draft: EagleDraft) -> None:
        """Run a smoke draft with the given weights on the caller's thread.

        Raises:
            CheckpointError: the weights have another shape, or produce values that are not finite; or the drafter has
                no weights.
        """
        self._require_speculator().check(draft)

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        """Swap in checked weights between two verify steps; block until done.

        Raises:
            CheckpointError: the weights have another shape, or the drafter has no weights.
            EngineFullError: the engine has stopped, or stops before the swap.
        """
        packed = self._require_speculator().pack(draft)
        done: Future[SwapResult] = Future()
        with self._mail:
            self._check_open()
            self._swaps.append((packed, version, done))
            self._mail.notify()
        return done.result()

    def speculate(self, *, on: bool) -> None:
        """Turn speculation on or off from the next verify step on; an engine started without it stays without."""
        self._speculating = on and self._may_speculate

    def learn(self, answers: Iterable[Answer]) -> None:
        """Add answers of other nodes to the corpus, some between each two verify steps."""
        self.corpus.offer((answer.label, answer.tokens) for answer in answers)
        with self._mail:
            self._mail.notify()

    def health(self) -> EngineHealth:
        """Return counters and state."""
        speculator = self._drafter.speculator
        return EngineHealth(
            alive=self._thread.is_alive() and self._error is None,
            speculator=speculator.version if speculator and self._may_speculate else "",
            speculating=self._speculating,
            draft_depth=self._planner.depth if self._speculating else 0,
            expected_tokens_per_second=self._planner.throughput,
            requests_running=len(self._scheduler.running),
            requests_waiting=len(self._scheduler.waiting),
            verify_steps=self._verify_steps,
            draft_tokens=self._draft_tokens,
            accepted_tokens=self._accepted_tokens,
            suffix_draft_tokens=self._suffix_draft_tokens,
            suffix_accepted_tokens=self._suffix_accepted_tokens,
            drafter_failures=self._drafter_failures,
            output_tokens=self._output_tokens,
            speedup=self._planner.speedup.ratio if self._speculating else 1.0,
            decoding_s=self._planner.speedup.decoding_s,
            undrafted_s=self._planner.speedup.undrafted_s,
            error=self._error,
        )

    def _require_speculator(self) -> EagleDrafter:
        if self._drafter.speculator is None:
            raise CheckpointError("this node drafts without a speculator (serve.drafter)")
        return self._drafter.speculator

    def _check_open(self) -> None:
        if self._stopping or self._error:
            raise EngineFullError(self._error or "the engine is stopping")

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._empty_mailbox():
                    with self._contain_drafter():
                        self.corpus.update(_LEARN_TOKENS)
                    if self._scheduler.running:
                        self._run_step()
        except BaseException as error:
            # A failed forward of the target leaves the KV caches undefined, so no request can continue: every request
            # gets the error, the node exits, and its supervisor restarts it.
            log.exception("engine_failed")
            self._error = f"{type(error).__name__}: {error}"
        finally:
            self._close()

    def _run_step(self) -> None:
        for result in self._verifier.load_prefixes():
            self._deliver(result)
        for result in self._verifier.run_step(speculate=self._speculating):
            self._deliver(result)
        for seq in [seq for seq in self._scheduler.running if seq.error is not None]:
            self._target.cache.clear(seq.slot)
            with self.prefix_cache.contain():
                self.prefix_cache.forget(seq)
            self._end(seq, "error")

    @contextmanager
    def _contain_drafter(self) -> Iterator[None]:
        """Turn speculation off if the block fails: the output needs no drafts.

        A draft that failed half way leaves the draft's cache undefined, so running sequences draft no more, also if the
        operator turns speculation on again.
        """
        try:
            yield
        except Exception:
            log.exception("drafter_failed")
            self._drafter_failures += 1
            self._speculating = False
            for seq in self._scheduler.running:
                seq.stop_drafting()
            if self._drafter.speculator is not None:
                self._drafter.speculator.clear_cache()

    def _empty_mailbox(self) -> bool:
        """Wait for work, then process cancellations, swaps and new requests; return False to stop."""
        scheduler = self._scheduler
        with self._mail:
            while not (self._stopping or self._swaps or scheduler.running or scheduler.waiting or self.corpus.is_due):
                self._cancelled.clear()
                self._mail.wait(_IDLE_S)
            if self._stopping:
                return False
            cancelled, self._cancelled = self._cancelled, set()
            cancelled_waiting = scheduler.cancel_waiting(cancelled)
            swaps, self._swaps = self._swaps, deque()
        for seq in cancelled_waiting:
            self._send_last(seq, Output((), finish="cancelled", stats=seq.stats))
        for seq in [seq for seq in scheduler.running if seq.request.id in cancelled]:
            if seq.is_prefilling:
                # Only the logits at its end show whether the values of a prompt are finite.
                self._target.cache.clear(seq.slot, slice(seq.num_cached_tokens))
            self._end(seq, "cancelled")
        for packed, version, done in swaps:
            with self._contain_drafter():
                self._swap(packed, version, done)
        with self._mail:
            scheduler.admit()
        return True

    def _swap(self, packed: PackedDraft, version: str, done: Future[SwapResult]) -> None:
        """Swap the draft's weights; the waiting caller gets the result or the error."""
        started = time.perf_counter()
        try:
            self._require_speculator().swap(packed, version)
            self._planner.start_version()
        except Exception as error:
            done.set_exception(error)
            raise
        pause_ms = (time.perf_counter() - started) * 1e3
        done.set_result(SwapResult(version, len(self._scheduler.running), pause_ms))

    def _deliver(self, result: StepResult) -> None:
        """Count the step, trace it, and hand the output to the request's callback."""
        seq = result.sequence
        self._output_tokens += len(result.output)
        self._verify_steps += not result.is_prefill
        sources = [node.source for node in result.tree.nodes]
        self._draft_tokens += len(sources)
        self._suffix_draft_tokens += sources.count(DraftSource.SUFFIX)
        self._accepted_tokens += len(result.accepted)
        self._suffix_accepted_tokens += sum(sources[node] == DraftSource.SUFFIX for node in result.accepted)
        with seq.contain():
            if self._sink is not None and result.trace is not None:
                self._sink.record(seq.request, (result.trace,), seq.finish)
            if seq.finish is None and (result.output or result.prompt_logprobs):
                seq.on_output(Output(result.output, result.logprobs, result.prompt_logprobs))
        if seq.finish is not None and seq.error is None:
            self._complete(seq, result)

    def _complete(self, seq: Sequence, result: StepResult) -> None:
        """Send the last output, and learn from the answer."""
        self._scheduler.release(seq)
        last = Output(result.output, result.logprobs, result.prompt_logprobs, seq.finish, stats=seq.stats)
        self._send_last(seq, last)
        with self._contain_drafter():
            self._drafter.finish(seq)
        if self._answers is not None:
            with seq.contain():
                self._answers.publish(seq.request, seq.output)

    def _end(self, seq: Sequence, finish: Finish) -> None:
        """End a running sequence between two verify steps."""
        self._scheduler.release(seq)
        if self._sink is not None and seq.request.trace:
            with seq.contain():
                self._sink.record(seq.request, (), finish)
        self._send_last(seq, Output((), finish=finish, error=self._error or seq.error, stats=seq.stats))

    def _send_last(self, seq: Sequence, output: Output) -> None:
        """Send the output of a sequence that has left the engine."""
        with seq.contain():
            seq.on_output(output)

    def _close(self) -> None:
        """End all requests and swaps, so that no caller waits for a stopped thread."""
        with self._mail:
            waiting = list(self._scheduler.waiting)
            self._scheduler.waiting.clear()
            swaps, self._swaps = self._swaps, deque()
            self._stopping = True
        finish: Finish = "error" if self._error else "cancelled"
        for seq in list(self._scheduler.running):
            self._end(seq, finish)
        for seq in waiting:
            self._send_last(seq, Output((), finish=finish, error=self._error, stats=seq.stats))
        for _, version, done in swaps:
            done.set_exception(EngineFullError(f"version {version} was not swapped in: the engine has stopped"))


def _load_target(settings: Settings) -> tuple[SpeculatorLine, Target]:
    serve, folder = settings.serve, Path(settings.target.path)
    try:
        check_architecture(read_config(folder))
        line = read_line(settings.target, settings.speculator)
        target = Target(
            folder,
            line.day_0_draft.shape,
            serve.max_num_seqs,
            serve.max_model_len,
            draft_nodes=max(serve.draft_tree_nodes, serve.num_speculative_tokens),
            weight_dtype=serve.weight_dtype,
            device=select_device(serve.device, "serve.device"),
        )
    except CheckpointError as error:
        raise SettingsError(f"target.path {settings.target.path}: {error}") from error
    return line, target


def _create_speculator(settings: Settings, line: SpeculatorLine, target: Target) -> EagleDrafter:
    serve = settings.serve
    return EagleDrafter(
        line.day_0_draft,
        settings.speculator.day_0,
        target.embeddings_VH,
        serve.max_num_seqs,
        serve.max_model_len + serve.num_speculative_tokens + 1,
        width=serve.draft_tree_width,
        depth=serve.num_speculative_tokens,
    )
