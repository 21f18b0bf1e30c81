"""One verify step over all running requests: draft, verify, commit.

Requests that still read their prompt take part with a piece of it, so that a long prompt does not hold up the others.
The batch has no padding: each request brings its own number of tokens and commits its own number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemas.draft_tree import depths, is_chain, visible
from schemas.speculator.acceptance import SampledRows, Verdict, accept_greedy, accept_sampled
from schemas.trace.record import ROOT, U16, VerifyStep
from serving.engines.base import Finish, Output, Request, RequestStats, TokenLogprobs
from serving.engines.builtin.drafter import Committed, Drafter, Proposal
from serving.engines.builtin.kernels import likeliest
from serving.engines.builtin.kv_cache import Branching, RaggedBatch, Segment
from serving.engines.builtin.target import Target
from serving.planner import Timing, Trial, Utility

PREFILL_TOKENS = 128
"""Prompt tokens that one verify step reads at most, over all requests."""

_NOTHING = Proposal()


@dataclass(frozen=True, slots=True)
class Models:
    """What decodes: the same for every verify step but for the version."""

    target: Target
    drafter: Drafter
    utility: Utility
    top_k: int
    """Target tokens to record per position."""
    limit: int
    """Longest request, prompt and answer together."""
    prefill_stall_s: float
    """How much longer a verify step may take for prompts that it reads, over all requests, while some decode."""


@dataclass(slots=True)
class Running:
    """A request in a slot. ``tokens`` is the prompt and the answer; the last one is not yet consumed by the target."""

    request: Request
    on_output: Callable[[Output], None]
    slot: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    consumed: int = 0
    """Tokens that are committed in the target's cache."""
    drafted_rows: int = 0
    """Rows that are committed in the draft's cache."""
    unseen: list[Tensor] = field(default_factory=list)
    """Features [.., F] of committed tokens that the draft has not seen."""
    verify_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    speculators: list[str] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.consumed < len(self.request.prompt)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.request.temperature <= 0

    @property
    def stats(self) -> RequestStats:
        """How the request was decoded so far."""
        return RequestStats(self.verify_steps, self.drafted, self.accepted, tuple(self.speculators))

    def room(self, limit: int) -> int:
        """Tokens that the answer can still take."""
        answered = len(self.tokens) - len(self.request.prompt)
        return min(self.request.max_tokens - answered, limit - len(self.tokens))


class Step(NamedTuple):
    """What one request feeds to the target in this verify step."""

    running: Running
    tokens: list[int]
    proposal: Proposal

    @property
    def decides(self) -> bool:
        """Whether the target's choice is wanted: not while the prompt goes on."""
        r = self.running
        return not r.prefilling or r.consumed + len(self.tokens) == len(r.request.prompt)


class Drafting(NamedTuple):
    """What became of the draft in one verify step."""

    drafted: int
    accepted: int


class Decided(NamedTuple):
    """What one request got from a verify step."""

    running: Running
    output: tuple[int, ...]
    scores: tuple[TokenLogprobs, ...]
    verify_step: Drafting | None
    """None for a prefill."""
    trace: VerifyStep | None
    """None where the request may not be traced."""


class _Judged(NamedTuple):
    """The target's decision for one step. Rows: the root, then each drafted node; none while the prompt goes on."""

    step: Step
    features_TF: Tensor
    verdict: Verdict | None
    logits_mV: Tensor
    top_ids_mk: Tensor
    top_logprobs_mk: Tensor


@dataclass(frozen=True, slots=True)
class _Clock:
    """When the parts of a verify step ended; microseconds."""

    draft_us: int
    verify_us: int
    now_us: int


def run_verify_step(active: Sequence[Running], models: Models, version: str, *, speculate: bool) -> list[Decided]:
    """Draft, verify and commit once for every active request.

    Args:
        active: Requests with a slot; those that end here get their ``finish``.
        models: What decodes.
        version: Speculator version that drafts.
        speculate: Whether to draft at all.
    """
    started = time.perf_counter()
    proposals, drafts = _propose(active, models) if speculate else ({}, [])
    steps = _plan(active, proposals, models)
    drafted = time.perf_counter()
    batch = RaggedBatch([_segment(step) for step in steps], models.target.device)
    judged = _judge(steps, batch, models)
    verified = time.perf_counter()
    clock = _Clock(int((drafted - started) * 1e6), int((verified - drafted) * 1e6), time.time_ns() // 1000)
    reading = any(step.running.prefilling for step in steps)
    decided = [_commit(j, models, version, clock) for j in judged]
    if speculate:
        trials = [trial for j in judged for trial in _trials(j)]
        # A row's price is all that it adds to a verify step: on a GPU its tokens cost the processor more than its
        # pass does.
        verify = None if reading else Timing(len(batch.slots_T), time.perf_counter() - drafted)
        models.utility.observe(trials, verify, drafts, sum(len(step.proposal.nodes) for step in steps))
    return decided


def _propose(active: Sequence[Running], models: Models) -> tuple[dict[int, Proposal], list[Timing]]:
    """Drafts by slot for the requests that speculate and have room for one, and what the steps took."""
    eager = [r for r in active if r.request.speculate and not r.prefilling and r.room(models.limit) > 1]
    plan = models.utility.plan([r.greedy for r in eager])
    if plan.requests is not None:
        eager = sorted(eager, key=lambda r: len(r.tokens) - r.drafted_rows)[: plan.requests]
    if not eager or not plan.depth:
        return {}, []
    committed = [
        Committed(
            slot=r.slot,
            start=r.drafted_rows,
            features_TF=torch.cat(r.unseen),
            next_tokens=r.tokens[r.drafted_rows + 1 :],
            request=r.request,
            generator=r.generator,
            room=r.room(models.limit) - 1,
        )
        for r in eager
    ]
    proposals, timings = models.drafter.propose(committed, plan, models.utility.acceptance)
    for r in eager:
        r.unseen, r.drafted_rows = [], r.consumed
    return {r.slot: proposal for r, proposal in zip(eager, proposals, strict=True)}, timings


def _plan(active: Sequence[Running], proposals: dict[int, Proposal], models: Models) -> list[Step]:
    """Root and draft for those that decode; a piece of the prompt, within the verify step's budget, for those that
    read.
    """
    decoding = sum(1 + len(proposals.get(r.slot, _NOTHING).nodes) for r in active if not r.prefilling)
    steps, budget = [], PREFILL_TOKENS
    if decoding:
        budget = models.utility.rows_within(models.prefill_stall_s, beside=decoding, most=PREFILL_TOKENS)
    for r in active:
        if not r.prefilling:
            proposal = proposals.get(r.slot, _NOTHING)
            steps.append(Step(r, [r.tokens[-1], *proposal.tokens], proposal))
        elif budget:
            piece = list(r.request.prompt[r.consumed : r.consumed + budget])
            budget -= len(piece)
            steps.append(Step(r, piece, _NOTHING))
    return steps


def _segment(step: Step) -> Segment:
    """Where a step's tokens go in the target's cache; of a tree, each sees the root and its own ancestors."""
    start, length, parents = step.running.consumed, len(step.tokens), step.proposal.parents
    if is_chain(parents):
        return Segment(step.running.slot, start, length)
    sees = np.zeros((length, length), np.bool_)
    sees[:, 0] = True
    sees[1:, 1:] = visible(parents)
    positions = (start, *(start + depth for depth in depths(parents)))
    return Segment(step.running.slot, start, length, Branching(start, sees, positions))


def _judge(steps: Sequence[Step], batch: RaggedBatch, models: Models) -> list[_Judged]:
    """Run the target and apply the acceptance rule to every step. Only rows that decide something are scored."""
    tokens_T = torch.tensor([token for s in steps for token in s.tokens], device=models.target.device)
    consumed = models.target.consume(tokens_T, batch)
    ends = [end + 1 for end in batch.last_rows]
    firsts = [end - (1 if s.running.prefilling else len(s.tokens)) for s, end in zip(steps, ends, strict=True)]
    spans = [range(first, end) if s.decides else range(0) for s, first, end in zip(steps, firsts, ends, strict=True)]
    logits_RV = models.target.logits(consumed.last_TH[[row for span in spans for row in span]])
    recorded = any(s.running.request.trace or s.running.request.logprobs is not None for s in steps)
    k = max([models.top_k, *(s.running.request.logprobs or 0 for s in steps)]) if recorded else 1
    top = likeliest(logits_RV, k)
    # The normaliser takes as long as all else here; where nobody asks for probabilities it is left out.
    top_logprobs_Rk = top.scores_Rk - logits_RV.logsumexp(dim=-1, keepdim=True) if recorded else top.scores_Rk
    ids_Rk, top_logprobs_Rk = top.ids_Rk.cpu(), top_logprobs_Rk.cpu()
    judged, row = [], 0
    for step, end, span in zip(steps, ends, spans, strict=True):
        rows = slice(row, row + len(span))
        row += len(span)
        logits_mV, top_ids_mk = logits_RV[rows], ids_Rk[rows]
        features_TF = consumed.features_TF[end - len(step.tokens) : end]
        verdict = _verdict(step, logits_mV, top_ids_mk) if len(span) else None
        judged.append(_Judged(step, features_TF, verdict, logits_mV, top_ids_mk, top_logprobs_Rk[rows]))
    return judged


def _verdict(step: Step, logits_mV: Tensor, top_ids_mk: Tensor) -> Verdict:
    request, proposal = step.running.request, step.proposal
    if step.running.greedy:
        return accept_greedy(proposal.tokens, proposal.parents, top_ids_mk[:, 0].tolist())
    target_probs_mV = SampledRows(logits_mV, request.temperature, request.top_p, request.top_k)
    return accept_sampled(proposal.tokens, proposal.parents, target_probs_mV, step.running.generator, proposal.probs_mV)


def _trials(judged: _Judged) -> Iterator[Trial]:
    """What the target said of the tokens drafted after the root and after each accepted token.

    A greedy target has also judged the tokens that were left out: it is known which one it would have taken.
    """
    if judged.verdict is None:
        return
    proposal, greedy = judged.step.proposal, judged.step.running.greedy
    candidates = [*proposal.nodes, *(proposal.left_out if greedy else ())]
    said = [*(proposal.nodes[node].token for node in judged.verdict.path), judged.verdict.bonus]
    for depth, (parent, token) in enumerate(zip((ROOT, *judged.verdict.path), said, strict=True), start=1):
        siblings = [node for node in candidates if node.parent == parent]
        if siblings:
            taken = next((i for i, node in enumerate(siblings) if node.token == token), None)
            yield Trial(depth, tuple(math.exp(node.logprob) for node in siblings), taken, greedy)


def _commit(judged: _Judged, models: Models, version: str, clock: _Clock) -> Decided:
    """Move the request forward by what was decided, and write the verify step down."""
    step, verdict = judged.step, judged.verdict
    r, proposal, position, prefilling = step.running, step.proposal, step.running.consumed, step.running.prefilling
    output: list[int] = []
    if verdict is not None:
        said = [*(proposal.nodes[node].token for node in verdict.path), verdict.bonus]
        output, r.finish = _end(said, r, models)
    path = verdict.path[: max(len(output) - 1, 0)] if verdict else ()
    rows = list(range(len(step.tokens))) if prefilling else [0, *(1 + node for node in path)]
    features_TF = judged.features_TF[rows]
    models.target.cache.keep(r.slot, position + 1, path)
    if not prefilling:
        r.verify_steps += 1
        r.drafted += len(proposal.nodes)
        r.accepted += len(path)
    if proposal.nodes and version not in r.speculators:
        r.speculators.append(version)
    r.consumed += len(rows)
    r.tokens += output
    if r.request.speculate:
        r.unseen.append(features_TF)
    trace = None
    if r.request.trace:
        trace = VerifyStep(
            verify_step=0 if prefilling else r.verify_steps,
            position=position,
            tokens=tuple(step.tokens[row] for row in rows),
            features=_bf16(features_TF),
            draft_tokens=tuple(proposal.tokens),
            draft_parents=tuple(proposal.parents),
            draft_logprobs=tuple(node.logprob for node in proposal.nodes),
            accepted=path,
            bonus=output[-1] if output else None,
            top_ids=judged.top_ids_mk[:, : models.top_k].to(torch.int32).numpy(),
            top_logprobs=judged.top_logprobs_mk[:, : models.top_k].numpy(),
            speculator=version if proposal.nodes else "",
            draft_us=clock.draft_us if proposal.nodes else 0,
            verify_us=clock.verify_us,
            time_us=clock.now_us,
        )
    drafting = None if prefilling else Drafting(len(proposal.nodes), len(path))
    return Decided(r, tuple(output), _scores(judged, path, output), drafting, trace)


def _end(said: list[int], r: Running, models: Models) -> tuple[list[int], Finish | None]:
    """Cut what was decided at the end of the answer, so that a request's last token is the bonus of its last verify
    step.
    """
    room, request = r.room(models.limit), r.request
    for i, token in enumerate(said[:room]):
        if token in request.stop_ids or (token in models.target.eos_ids and not request.ignore_eos):
            return said[: i + 1], "stop"
    if len(said) >= room:
        return said[:room], "length"
    return said, None


def _scores(judged: _Judged, path: Sequence[int], output: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of the answered tokens, each at the row that decided it: the root's, then those of the path."""
    wanted = judged.step.running.request.logprobs
    if wanted is None:
        return ()
    scores = []
    for row, token in zip((0, *(1 + node for node in path)), output, strict=True):
        logits_V = judged.logits_mV[row]
        own = float(logits_V[token] - logits_V.logsumexp(dim=-1))
        ids, logprobs = judged.top_ids_mk[row, :wanted].tolist(), judged.top_logprobs_mk[row, :wanted].tolist()
        scores.append(TokenLogprobs(own, tuple(zip(ids, logprobs, strict=True))))
    return tuple(scores)


def _bf16(features_TF: Tensor) -> U16:
    bits: U16 = features_TF.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
    return bits
