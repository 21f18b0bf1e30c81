"""One round over all running requests: draft, verify, commit.

Requests that still read their prompt take part with a piece of it, so that a long prompt does not hold up the others.
The batch has no padding: each request brings its own number of tokens and commits its own number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemas.speculator.acceptance import Verdict, accept_greedy, accept_sampled, sampling_probs
from schemas.trace import ROOT, U16, Round
from serving.engine import Figures, Finish, Output, Request
from serving.transformers.cache import RaggedBatch, Segment
from serving.transformers.drafter import Committed, Drafter, Proposal
from serving.transformers.target import Consumed, Target

PREFILL_TOKENS = 128
"""Prompt tokens that one round reads at most, over all requests."""

_NOTHING = Proposal([], [], None)


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
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    speculators: list[str] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.consumed < len(self.request.prompt)

    @property
    def figures(self) -> Figures:
        """How the request was decoded so far."""
        return Figures(self.rounds, self.drafted, self.accepted, tuple(self.speculators))


class Step(NamedTuple):
    """What one request feeds to the target in this round."""

    running: Running
    tokens: list[int]
    proposal: Proposal


class Decided(NamedTuple):
    """What one request got from a round."""

    running: Running
    output: tuple[int, ...]
    trace: Round


def run_round(
    active: Sequence[Running],
    target: Target,
    drafter: Drafter,
    *,
    version: str,
    draft_tokens: int,
    top_k: int,
    limit: int,
) -> list[Decided]:
    """Draft, verify and commit once for every active request.

    Args:
        active: Requests with a slot; those that end here get their ``finish``.
        target: The model that decides.
        drafter: The model that proposes.
        version: Speculator version that drafts.
        draft_tokens: Length of the chain.
        top_k: Target tokens to record per position.
        limit: Longest request, prompt and answer together.
    """
    started = time.perf_counter()
    proposals = _propose(active, drafter, draft_tokens, limit)
    steps = _plan(active, proposals)
    drafted = time.perf_counter()
    batch = RaggedBatch([Segment(s.running.slot, s.running.consumed, len(s.tokens)) for s in steps])
    consumed = target.consume(torch.tensor([token for s in steps for token in s.tokens]), batch)
    judged = _judge(steps, consumed, batch, target, top_k)
    verified = time.perf_counter()
    times = (int((drafted - started) * 1e6), int((verified - drafted) * 1e6), time.time_ns() // 1000)
    return [
        _commit(step, features_TF, judgement, version=version, times=times, eos=target.eos_ids, limit=limit)
        for step, features_TF, judgement in judged
    ]


def _propose(active: Sequence[Running], drafter: Drafter, length: int, limit: int) -> dict[int, Proposal]:
    """Chains by slot for the requests that speculate and have room for one."""
    eager = [r for r in active if r.request.speculate and not r.prefilling and len(r.tokens) + length < limit]
    if not eager:
        return {}
    committed = [
        Committed(
            slot=r.slot,
            start=r.drafted_rows,
            features_TF=torch.cat(r.unseen),
            next_tokens=r.tokens[r.drafted_rows + 1 :],
            temperature=r.request.temperature,
            top_p=r.request.top_p,
            generator=r.generator,
        )
        for r in eager
    ]
    proposals = drafter.propose(committed, length)
    for r in eager:
        r.unseen, r.drafted_rows = [], r.consumed
    return {r.slot: proposal for r, proposal in zip(eager, proposals, strict=True)}


def _plan(active: Sequence[Running], proposals: dict[int, Proposal]) -> list[Step]:
    """Root and chain for those that decode; a piece of the prompt, within the round's budget, for those that read."""
    steps, budget = [], PREFILL_TOKENS
    for r in active:
        if not r.prefilling:
            proposal = proposals.get(r.slot, _NOTHING)
            steps.append(Step(r, [r.tokens[-1], *proposal.tokens], proposal))
        elif budget:
            piece = list(r.request.prompt[r.consumed : r.consumed + budget])
            budget -= len(piece)
            steps.append(Step(r, piece, _NOTHING))
    return steps


class _Judgement(NamedTuple):
    """The target's decision for one step; without a verdict where the prompt goes on."""

    verdict: Verdict | None
    top_ids_mk: Tensor
    top_logprobs_mk: Tensor


def _judge(
    steps: Sequence[Step], consumed: Consumed, batch: RaggedBatch, target: Target, top_k: int
) -> list[tuple[Step, Tensor, _Judgement]]:
    """Apply the acceptance rule to every step. Scores are computed only for rows that decide something."""
    ends = [end + 1 for end in batch.last_rows]
    spans = []
    for step, end in zip(steps, ends, strict=True):
        r, first = step.running, end - len(step.tokens)
        if r.prefilling:
            done = r.consumed + len(step.tokens) == len(r.request.prompt)
            spans.append(range(end - 1, end) if done else range(0))
        else:
            spans.append(range(first, end))
    logits_RV = target.logits(consumed.last_TH[[row for span in spans for row in span]])
    top = logits_RV.topk(top_k, dim=-1)
    logprobs_Rk = top.values - logits_RV.logsumexp(dim=-1, keepdim=True)
    judged, row = [], 0
    for step, end, span in zip(steps, ends, spans, strict=True):
        rows = slice(row, row + len(span))
        row += len(span)
        verdict = _verdict(step, logits_RV[rows], top.indices[rows]) if len(span) else None
        features_TF = consumed.features_TF[end - len(step.tokens) : end]
        judged.append((step, features_TF, _Judgement(verdict, top.indices[rows], logprobs_Rk[rows])))
    return judged


def _verdict(step: Step, logits_mV: Tensor, top_ids_mk: Tensor) -> Verdict:
    request, proposal = step.running.request, step.proposal
    if request.temperature <= 0:
        return accept_greedy(proposal.tokens, top_ids_mk[:, 0].tolist())
    target_probs_mV = sampling_probs(logits_mV, request.temperature, request.top_p)
    draft_probs_mV = target_probs_mV[:0] if proposal.probs_mV is None else proposal.probs_mV
    return accept_sampled(proposal.tokens, draft_probs_mV, target_probs_mV, step.running.generator)


def _commit(
    step: Step,
    features_TF: Tensor,
    judgement: _Judgement,
    *,
    version: str,
    times: tuple[int, int, int],
    eos: frozenset[int],
    limit: int,
) -> Decided:
    """Move the request forward by what was decided, and write the round down."""
    r, proposal, position = step.running, step.proposal, step.running.consumed
    output: list[int] = []
    if judgement.verdict is not None:
        accepted, bonus = judgement.verdict
        output, r.finish = _end([*proposal.tokens[:accepted], bonus], r, eos, limit)
    kept = max(len(output) - 1, 0)
    committed = len(step.tokens) if r.prefilling else 1 + kept
    round_number = 0 if r.prefilling else r.rounds + 1
    if not r.prefilling:
        r.rounds += 1
        r.drafted += len(proposal.tokens)
        r.accepted += kept
    if proposal.tokens and version not in r.speculators:
        r.speculators.append(version)
    r.consumed += committed
    r.tokens += output
    if r.request.speculate:
        r.unseen.append(features_TF[:committed])
    draft_us, verify_us, now_us = times
    trace = Round(
        round=round_number,
        position=position,
        tokens=tuple(step.tokens[:committed]),
        features=_bf16(features_TF[:committed]) if r.request.trace else np.empty((0, 0), np.uint16),
        draft_tokens=tuple(proposal.tokens),
        draft_parents=tuple(range(ROOT, len(proposal.tokens) - 1)),
        draft_logprobs=tuple(proposal.logprobs),
        accepted=tuple(range(kept)),
        bonus=output[-1] if output else None,
        top_ids=judgement.top_ids_mk.to(torch.int32).numpy(),
        top_logprobs=judgement.top_logprobs_mk.numpy(),
        speculator=version if proposal.tokens else "",
        draft_us=draft_us if proposal.tokens else 0,
        verify_us=verify_us,
        time_us=now_us,
    )
    return Decided(r, tuple(output), trace)


def _end(decided: list[int], r: Running, eos: frozenset[int], limit: int) -> tuple[list[int], Finish | None]:
    """Cut what was decided at the end of the answer, so that a request's last token is the bonus of its last round."""
    answered = len(r.tokens) - len(r.request.prompt)
    room = min(r.request.max_tokens - answered, limit - len(r.tokens))
    for i, token in enumerate(decided[:room]):
        if token in eos:
            return decided[: i + 1], "stop"
    if len(decided) >= room:
        return decided[:room], "length"
    return decided, None


def _bf16(features_TF: Tensor) -> U16:
    bits: U16 = features_TF.to(torch.bfloat16).view(torch.uint16).numpy()
    return bits
