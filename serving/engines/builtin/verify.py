"""One verify step over all running sequences: draft, forward, accept, commit.

The forward has no padding: each sequence feeds and commits its own number of tokens, and sequences in prefill feed a
piece of their prompt.

Shape suffixes: T tokens of the forward, R rows of the forward with logits, m rows of one sequence with logits (the root
and its draft nodes), F features, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemas.draft_tree import attention_mask, depths, is_chain
from schemas.speculator.acceptance import Verdict, accept, sampling_probs
from schemas.trace.record import ROOT, U16, VerifyStep
from serving.engines.base import TokenLogprobs
from serving.engines.builtin.drafter import EMPTY_TREE, DraftTree
from serving.engines.builtin.eagle_drafter import EagleDrafter
from serving.engines.builtin.hybrid_drafter import NO_DRAFTS, Drafts, HybridDrafter
from serving.engines.builtin.kernels import topk
from serving.engines.builtin.kv_cache import RaggedBatch, Segment, TreeLayout
from serving.engines.builtin.logits_processors import process
from serving.engines.builtin.noise import choose_token
from serving.engines.builtin.prefix_cache import PrefixCache
from serving.engines.builtin.prompt_logprobs import score_tokens
from serving.engines.builtin.scheduler import ScheduledSequence, Scheduler
from serving.engines.builtin.sequence import Sequence
from serving.engines.builtin.target import Target
from serving.planner.latency_model import ForwardTiming


class StepResult(NamedTuple):
    """The outcome of a verify step for one sequence."""

    sequence: Sequence
    output: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    is_prefill: bool
    tree: DraftTree
    """Draft tokens that the target verified."""
    accepted: tuple[int, ...]
    """Accepted nodes."""
    trace: VerifyStep | None
    """None if the request may not be traced."""


class _TargetRows(NamedTuple):
    """The target's output for one sequence. It has no logits before the prompt's end."""

    features_TF: Tensor
    prompt_logprobs: tuple[TokenLogprobs, ...]
    logits_mV: Tensor
    top_ids_mk: Tensor
    top_logprobs_mk: Tensor


@dataclass(frozen=True, slots=True)
class _Choices:
    """The target's choices for a sequence, made as the acceptance rule reads them."""

    scheduled: ScheduledSequence
    logits_mV: Tensor

    def __getitem__(self, row: int) -> int:
        """Return the token that the target chooses after a row."""
        seq, _, tree = self.scheduled
        request, path = seq.request, tree.path_to(row - 1)
        logits_V = self.logits_mV[row].cpu()
        if seq.processors:
            logits_V = process(seq.processors, logits_V, [*seq.output, *path])
        if seq.is_greedy:
            return int(logits_V.argmax())
        # On the CPU, so that a seed gives the same noise on every device.
        probs_V = sampling_probs(logits_V[None], request.temperature, request.top_p, request.top_k, request.min_p)[0]
        return choose_token(probs_V, seq.seed, len(seq.tokens) + len(path))


class _StepTimes(NamedTuple):
    """Durations of a verify step, and when it ended (Unix time); microseconds."""

    draft_us: int
    verify_us: int
    end_us: int


@dataclass(frozen=True, slots=True)
class Verifier:
    """Runs verify steps. Not thread-safe."""

    target: Target
    drafter: HybridDrafter
    scheduler: Scheduler
    prefix_cache: PrefixCache
    trace_top_k: int
    """Number of the target's likeliest tokens to trace per row."""
    contain_drafter: Callable[[], AbstractContextManager[None]]
    """Handles a failure of the drafter; the verify step continues without drafts."""

    def run_step(self, *, speculate: bool) -> list[StepResult]:
        """Run one verify step; set ``finish`` on the sequences that end, and ``error`` on those that fail.

        Returns:
            The outcome for each sequence that took part and did not fail.
        """
        started = time.perf_counter()
        active = self.drafter.speculator if speculate else None
        drafts = self._draft() if speculate else NO_DRAFTS
        # Sequences with equally many rows attend together if they lie side by side.
        scheduled = self.scheduler.schedule(drafts.trees, sum(drafts.plan.catch_up.values()))
        scheduled.sort(key=lambda s: (len(s.tokens), s.sequence.slot))
        drafted = time.perf_counter()
        batch = RaggedBatch([_segment(s) for s in scheduled], self.target.device)
        rows = self._forward(scheduled, batch)
        verdicts = [_accept(s, r) if s.logit_rows else None for s, r in zip(scheduled, rows, strict=True)]
        verified = time.perf_counter()
        times = _StepTimes(int((drafted - started) * 1e6), int((verified - drafted) * 1e6), time.time_ns() // 1000)
        reads_prompt = any(s.sequence.is_prefilling for s in scheduled)
        results = []
        for s, r, v in zip(scheduled, rows, verdicts, strict=True):
            with s.sequence.contain():
                if s.sequence.error is None:
                    results.append(self._commit(s, r, v, times, active))
        with self.prefix_cache.contain():
            for result in results:
                self.prefix_cache.store(result.sequence)
        if speculate and len(results) == len(scheduled):
            outputs = {
                s.sequence.slot: [*(s.tree.nodes[node].token for node in v.path), v.bonus]
                for s, v in zip(scheduled, verdicts, strict=True)
                if v is not None
            }
            # A row costs more than its share of the forward: on a GPU its tokens cost the host more than the forward.
            timing = ForwardTiming(len(scheduled), len(batch.slots_T), time.perf_counter() - drafted)
            with self.contain_drafter():
                self.drafter.observe(drafts, outputs, None if reads_prompt else timing, drafted - started)
        return results

    def load_prefixes(self) -> list[StepResult]:
        """Take prompt tokens from the prefix cache where it has them; return the outcome for these sequences."""
        results = []
        for seq in self.scheduler.running:
            position = seq.num_cached_tokens
            with self.prefix_cache.contain():
                features_TF = self.prefix_cache.load(seq)
                if features_TF is not None:
                    trace = self._trace_prefix(seq, position, features_TF) if seq.request.trace else None
                    results.append(
                        StepResult(seq, (), (), (), is_prefill=True, tree=EMPTY_TREE, accepted=(), trace=trace)
                    )
        return results

    def _trace_prefix(self, seq: Sequence, position: int, features_TF: Tensor) -> VerifyStep:
        """Return the trace record of tokens from the prefix cache: a part of a prompt that took no time."""
        top_k = min(self.trace_top_k, self.target.shape.vocab_size)
        return VerifyStep(
            verify_step=0,
            position=position,
            tokens=seq.request.prompt[position : position + len(features_TF)],
            features=_to_bf16(features_TF),
            draft_tokens=(),
            draft_parents=(),
            draft_logprobs=(),
            accepted=(),
            bonus=None,
            top_ids=np.empty((0, top_k), np.int32),
            top_logprobs=np.empty((0, top_k), np.float32),
            speculator="",
            draft_us=0,
            verify_us=0,
            time_us=time.time_ns() // 1000,
        )

    def _draft(self) -> Drafts:
        sequences = self.scheduler.schedule_drafts()
        drafts = NO_DRAFTS
        if sequences:
            with self.contain_drafter():
                drafts = self.drafter.draft(sequences, len(self.scheduler.decoding))
        return drafts

    def _forward(self, scheduled: list[ScheduledSequence], batch: RaggedBatch) -> list[_TargetRows]:
        """Run the target over all scheduled tokens; compute logits only for the rows that choose a token."""
        tokens_T = torch.tensor([token for s in scheduled for token in s.tokens], device=self.target.device)
        hidden = self.target.forward(tokens_T, batch)
        spans = [range(last + 1 - s.logit_rows, last + 1) for s, last in zip(scheduled, batch.last_rows, strict=True)]
        logits_RV = self.target.logits(hidden.last_TH[[row for span in spans for row in span]])
        requests = [s.sequence.request for s in scheduled]
        needs_logprobs = any(r.trace or r.logprobs is not None for r in requests)
        best = max([self.trace_top_k, *(r.logprobs or 0 for r in requests)]) if needs_logprobs else 1
        top = topk(logits_RV, min(best, logits_RV.shape[-1]))
        # The normalizer takes as long as everything else here, so it is computed only if log-probabilities are needed.
        top_logprobs_Rk = top.scores_Rk - logits_RV.logsumexp(dim=-1, keepdim=True) if needs_logprobs else top.scores_Rk
        lengths = [len(s.tokens) for s in scheduled]
        features = hidden.features_TF.split_with_sizes(lengths)
        scored = map(self._score_prompt, scheduled, hidden.last_TH.split_with_sizes(lengths))
        with_logits = (
            rows_R.split_with_sizes([s.logit_rows for s in scheduled])
            for rows_R in (logits_RV, top.ids_Rk.cpu(), top_logprobs_Rk.cpu())
        )
        return [_TargetRows(*rows) for rows in zip(features, scored, *with_logits, strict=True)]

    def _score_prompt(self, scheduled: ScheduledSequence, last_TH: Tensor) -> tuple[TokenLogprobs, ...]:
        """Return the log-probabilities of the prompt's tokens behind the ones that were fed, if they are wanted."""
        seq = scheduled.sequence
        if seq.request.prompt_logprobs is None or not seq.is_prefilling:
            return ()
        start = seq.num_cached_tokens + 1
        following = seq.request.prompt[start : start + len(last_TH)]
        with seq.contain():
            return score_tokens(self.target.logits, last_TH[: len(following)], following, seq.request.prompt_logprobs)
        return ()

    def _commit(
        self,
        scheduled: ScheduledSequence,
        rows: _TargetRows,
        verdict: Verdict | None,
        times: _StepTimes,
        active: EagleDrafter | None,
    ) -> StepResult:
        """Advance the sequence by the accepted tokens and the bonus token, and write the trace record.

        A verify step without draft tokens names the active version, which might have drafted.
        """
        seq, tokens, tree = scheduled
        is_prefill, position = seq.is_prefilling, seq.num_cached_tokens
        output: list[int] = []
        if verdict is not None:
            decided = [*(tree.nodes[node].token for node in verdict.path), verdict.bonus]
            output, seq.finish = seq.truncate(decided, self.target.eos_ids)
        accepted = verdict.path[: max(len(output) - 1, 0)] if verdict else ()
        deciding = [0, *(1 + node for node in accepted)]
        kept = list(range(len(tokens))) if is_prefill else deciding
        features_TF = rows.features_TF[kept]
        self.target.cache.keep_path(seq.slot, position + 1, accepted)
        seq.commit(features_TF, output, len(tree.nodes), [tree.nodes[node].source for node in accepted])
        if tree.version and tree.version not in seq.speculators:
            seq.speculators.append(tree.version)
        trace = None
        if seq.request.trace:
            undrafted = not tree.nodes and not is_prefill and seq.request.speculate
            version = active.version if active and undrafted else tree.version
            trace = VerifyStep(
                verify_step=0 if is_prefill else seq.verify_steps,
                position=position,
                tokens=tuple(tokens[row] for row in kept),
                features=_to_bf16(features_TF),
                draft_tokens=tuple(tree.tokens),
                draft_parents=tuple(tree.parents),
                draft_logprobs=tuple(node.logprob for node in tree.nodes),
                accepted=accepted,
                bonus=output[-1] if output else None,
                top_ids=rows.top_ids_mk[:, : self.trace_top_k].to(torch.int32).numpy(),
                top_logprobs=rows.top_logprobs_mk[:, : self.trace_top_k].numpy(),
                speculator=version,
                draft_us=times.draft_us if tree.nodes else 0,
                verify_us=times.verify_us,
                time_us=times.end_us,
                draft_sources=tuple(int(node.source) for node in tree.nodes) if tree.needs_sources else None,
                active_since_us=active.active_since_us if active and version else None,
            )
        logprobs = _output_logprobs(seq.request.logprobs, rows, deciding, output)
        return StepResult(seq, tuple(output), logprobs, rows.prompt_logprobs, is_prefill, tree, accepted, trace)


def _segment(scheduled: ScheduledSequence) -> Segment:
    """Place a sequence's tokens in the target's KV cache; a tree's node sees the root and its own ancestors."""
    start, length, parents = scheduled.sequence.num_cached_tokens, len(scheduled.tokens), scheduled.tree.parents
    if is_chain(parents):
        return Segment(scheduled.sequence.slot, start, length)
    sees = np.zeros((length, length), np.bool_)
    sees[:, 0] = True
    sees[1:, 1:] = attention_mask(parents)
    positions = (start, *(start + depth for depth in depths(parents)))
    return Segment(scheduled.sequence.slot, start, length, TreeLayout(start, sees, positions))


def _accept(scheduled: ScheduledSequence, rows: _TargetRows) -> Verdict | None:
    """Apply the acceptance rule to a sequence's draft tree; return None if the sequence fails."""
    with scheduled.sequence.contain():
        verdict = _decide(scheduled, rows)
        best_m = rows.top_logprobs_mk[:, 0].tolist()
        if not all(math.isfinite(best_m[1 + node]) for node in (ROOT, *verdict.path)):
            raise FloatingPointError("the target's logits are not finite")
        return verdict
    return None


def _decide(scheduled: ScheduledSequence, rows: _TargetRows) -> Verdict:
    seq, _, tree = scheduled
    if seq.is_greedy and not seq.processors:
        return accept(tree.tokens, tree.parents, rows.top_ids_mk[:, 0].tolist())
    return accept(tree.tokens, tree.parents, _Choices(scheduled, rows.logits_mV))


def _output_logprobs(
    alternatives: int | None, rows: _TargetRows, deciding: list[int], output: list[int]
) -> tuple[TokenLogprobs, ...]:
    """Return the log-probabilities of the output tokens, each at the row that decided it."""
    if alternatives is None or not output:
        return ()
    found = []
    for row, token in zip(deciding, output, strict=True):
        logits_V = rows.logits_mV[row]
        logprob = float(logits_V[token] - logits_V.logsumexp(dim=-1))
        ids, logprobs = rows.top_ids_mk[row, :alternatives].tolist(), rows.top_logprobs_mk[row, :alternatives].tolist()
        found.append(TokenLogprobs(logprob, tuple(zip(ids, logprobs, strict=True))))
    return tuple(found)


def _to_bf16(features_TF: Tensor) -> U16:
    bits: U16 = features_TF.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
    return bits
