"""Long requests: whether the trainer scores a draft on a request of thousands of tokens as a node serves it.

A long request is a conversation: recorded requests of one domain in a row, and one more prompt, which the target
answers. The first half of the requests is served without a draft, and a draft learns from it and from the recorded
traffic. The other half is served with that draft. Its traces travel in chunks of the size of a Kafka message, are
joined and split as in the trainer, and are scored as held-out requests.

Node and gate are compared from the same starts: for each verify step of the node, what the node accepted, and what the
gate's simulation accepts from there. The walk of the gate, which finds its own starts, is reported beside it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from ops.bench import recording
from ops.bench.harness import Figure, Goal, Say
from ops.bench.learning.recorded_traffic import RecordedTraffic
from ops.bench.learning.variants import PLAN, LearningTrial, trial_settings
from ops.replay.trace_import import as_record
from pipeline.batches import build
from schemas.settings import Settings
from schemas.speculator.checkpoint import round_weights
from schemas.speculator.network import EagleDraft
from schemas.trace.record import VerifyStep, encode
from serving.engines.base import Request
from serving.traces.chunks import FRAME_BYTES, ChunkBuilder, ChunkSize, FeatureTransport, Origin, split_prefill
from trainer.data.batch import collate
from trainer.data.samples import Sample, join_samples, read_sample, split_sample
from trainer.data.target import Target, read_target
from trainer.loop.learner import Learner
from trainer.objective.simulated_acceptance import (
    SampleChains,
    SimulatedAcceptance,
    simulate_each,
    sum_acceptance,
    walk_requests,
)
from trainer.release.gate import estimate_gain

NAME = "long_requests_live_off_gate"
TOLERANCE = 0.02
"""Largest relative difference between the live score of a draft and the gate's."""
_ERROR = 0.025
"""Probability that the true difference is below its interval, and that it is above."""
_NEW_PER_STEP = 4


@dataclass(frozen=True, slots=True)
class LongRequestPlan:
    """How many long requests, and how long."""

    requests: int
    shortest: int = 1_000
    """Tokens of the shortest prompt."""
    longest: int = 4_000
    """Tokens of the longest request."""
    max_tokens: int = 256
    """Longest answer."""
    epochs: int = 3
    """Passes over the traffic that the draft learns from."""

    def within(self, context: int) -> LongRequestPlan:
        """Return the plan for a target with this context."""
        longest = min(self.longest, context)
        shortest, max_tokens = min(self.shortest, longest // 4), min(self.max_tokens, longest // 8)
        return replace(self, shortest=shortest, longest=longest, max_tokens=max_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class ServedRequest:
    """The verify steps of a request, and its sample as the trainer joins it."""

    verify_steps: tuple[VerifyStep, ...]
    sample: Sample
    chunks: int


def plan_requests(traffic: RecordedTraffic, plan: LongRequestPlan) -> list[Request]:
    """Return long requests whose lengths are spread evenly, in a fixed order that mixes lengths and domains."""
    by_domain = {
        domain: [sample for sample in traffic.requests if sample.label == domain]
        for domain in dict.fromkeys(sample.label for sample in traffic.requests)
    }
    turns = {domain: cycle(samples) for domain, samples in by_domain.items()}
    step = (plan.longest - plan.max_tokens - plan.shortest) / max(plan.requests - 1, 1)
    lengths = [round(plan.shortest + step * number) for number in range(plan.requests)]
    random.Random(0).shuffle(lengths)  # noqa: S311
    requests = []
    for number, (length, domain) in enumerate(zip(lengths, cycle(turns), strict=False)):
        prompt = _join_turns(turns[domain], length)
        requests.append(Request(f"long-{number:03}", prompt, plan.max_tokens, label=domain))
    return requests


def _join_turns(turns: Iterator[Sample], length: int) -> tuple[int, ...]:
    """Return whole requests, and the last ``length`` tokens of them and of one more prompt."""
    tokens: list[int] = []
    for sample in turns:
        prompt = sample.tokens[: int(sample.known.nonzero()[0]) + 1].tolist()
        if len(tokens) + len(prompt) >= length:
            return tuple([*tokens, *prompt][-length:])
        tokens += sample.committed_tokens()
    raise AssertionError("the turns repeat for ever")


def measure(settings: Settings, traffic: RecordedTraffic, plan: LongRequestPlan, say: Say) -> Figure:
    """Serve and score the long requests; return by how much the live score of the draft differs from the gate's."""
    base = trial_settings(settings, LearningTrial(PLAN[0], "mixed", 0))
    settings = settings.model_copy(update={"train": base.train, "speculator": base.speculator})
    target = read_target(settings)
    plan = plan.within(target.day_0.shape.max_position_embeddings)
    requests = plan_requests(traffic, plan)
    half = len(requests) // 2
    say(f"serving {half} requests of {plan.shortest} to {plan.longest} tokens without a draft")
    learned_from = [served.sample for served in serve_requests(settings, requests[:half], None)]
    say("training on them and on the recorded traffic")
    draft = _train(settings, target, [*traffic.requests, *learned_from], plan.epochs)
    say(f"serving {len(requests) - half} requests with the trained draft")
    served = list(serve_requests(settings, requests[half:], draft))
    return compare(settings, target, draft, served)


def compare(settings: Settings, target: Target, draft: EagleDraft, served: Sequence[ServedRequest]) -> Figure:
    """Return the relative difference between the live and the simulated accepted tokens of the same verify steps."""
    lookahead = settings.serve.num_speculative_tokens
    parts = [_split(settings, one.sample) for one in served]
    simulated = iter(simulate_each(draft, target.embeddings_VH, [part for own in parts for part in own], lookahead))
    chains = [[next(simulated) for _ in own] for own in parts]
    counted = [find_whole_steps(one, lookahead) for one in served]
    lives = [SimulatedAcceptance(sum(accepted.values()), len(accepted)) for accepted in counted]
    gates = [_sum_at(own, accepted) for own, accepted in zip(chains, counted, strict=True)]
    live, gate = sum_acceptance(lives), sum_acceptance(gates)
    walk = sum_acceptance(
        walked for own, found in zip(parts, chains, strict=True) for walked in walk_requests(own, found)
    )
    detail: dict[str, Any] = {
        "live_accepted_per_step": round(live.accepted_per_step, 4),
        "gate_accepted_per_step": round(gate.accepted_per_step, 4),
        "verify_steps": live.verify_steps,
        "walk_accepted_per_step": round(walk.accepted_per_step, 4),
        "walk_verify_steps": round(walk.verify_steps, 1),
        "tokens": [min(one.sample.committed for one in served), max(one.sample.committed for one in served)],
        "chunks": [min(one.chunks for one in served), max(one.chunks for one in served)],
    }
    if not gate.tokens:
        return Figure(NAME, None, detail={**detail, "why": "the gate's simulation accepts no token"})
    has_steps_P = np.array([own.verify_steps > 0 for own in lives])
    if bounds := estimate_gain(np.array(lives)[has_steps_P], np.array(gates)[has_steps_P], _ERROR):
        detail["live_off_gate_95"] = [round(bound / gate.accepted_per_step, 4) for bound in (bounds.low, bounds.high)]
    difference = abs(live.accepted_per_step / gate.accepted_per_step - 1)
    return Figure(NAME, difference, goal=Goal(TOLERANCE, at_least=False), detail=detail)


def find_whole_steps(served: ServedRequest, lookahead: int) -> dict[int, int]:
    """Return the accepted tokens, by position of the root, of the steps that drafted as far as the request had room.

    The others began before the draft had read the prompt.
    """
    last = served.sample.committed - 1
    return {
        step.position: len(step.accepted)
        for step in served.verify_steps
        if step.verify_step and len(step.draft_tokens) >= min(lookahead, last - 1 - step.position)
    }


def _sum_at(chains: Sequence[SampleChains], positions: Collection[int]) -> SimulatedAcceptance:
    """Return the accepted tokens of the chains of a request from these roots, each of which is a verify step."""
    accepted = {
        int(position): float(tokens)
        for part in chains
        for position, tokens in zip(part.position_R, part.accepted_R, strict=True)
    }
    return SimulatedAcceptance(sum(accepted[position] for position in positions), len(positions))


def serve_requests(
    settings: Settings, requests: Sequence[Request], draft: EagleDraft | None
) -> Iterator[ServedRequest]:
    """Serve the requests, with chains of the draft in every verify step; yield each when it has ended."""
    serve = {
        "speculate": draft is not None,
        "drafter": "eagle",
        "draft_tree_width": 1,
        "adaptive_drafting": False,
        "prefix_cache_bytes": 0,
        "max_model_len": max(len(request.prompt) + request.max_tokens for request in requests),
    }
    with recording.recording_engine(settings, len(requests), **serve) as (engine, recorder):
        if draft is not None:
            engine.swap(draft, "long")
        for request, verify_steps, _finish in recording.run_requests(engine, recorder, requests):
            yield _join_chunks(settings, request, verify_steps, Origin("bench", engine.target, engine.line))


def _join_chunks(
    settings: Settings, request: Request, verify_steps: tuple[VerifyStep, ...], origin: Origin
) -> ServedRequest:
    """Send the verify steps through the code of the publisher, the stream and the trainer."""
    transport = FeatureTransport("inline", ChunkSize(settings.kafka.max_message_bytes - FRAME_BYTES))
    builder = ChunkBuilder(request, origin, transport)
    rows = [part for step in verify_steps for part in split_prefill(step, transport)]
    chunks = [*filter(None, map(builder.add, rows)), builder.end("length")]
    records = [as_record(request.id, encode(chunk), number) for number, chunk in enumerate(chunks) if chunk is not None]
    accepted = build(records, settings.stream.context_tokens).rows["accepted"].to_pylist()
    sample = join_samples([read_sample(row, []) for row in accepted])
    return ServedRequest(verify_steps, sample, len(records))


def _split(settings: Settings, sample: Sample) -> list[Sample]:
    return split_sample(sample, settings.train.max_sample_tokens, settings.train.context_tokens)


def _train(settings: Settings, target: Target, samples: Sequence[Sample], epochs: int) -> EagleDraft:
    """Return the version that the draft of day 0 becomes after so many passes over the samples."""
    learner = Learner(target.new_draft(), target.embeddings_VH, settings.train)
    parts = [part for sample in samples for part in _split(settings, sample)]
    order = random.Random(0)  # noqa: S311
    for _ in range(epochs):
        order.shuffle(parts)
        for start in range(0, len(parts), _NEW_PER_STEP):
            learner.step(collate(parts[start : start + _NEW_PER_STEP]))
    return round_weights(learner.export_draft())
