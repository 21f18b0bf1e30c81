"""Recorded traffic of all domains, served with a speculator that learns from it, as in a running stack.

Requests are greedy and drafted with chains, or sampled and drafted with trees. Either way the outputs do not depend on
the draft: one recording serves every order of the stream. Only the rejected branches depend on the draft, and they come
from drafts of growing quality: the traffic is served in segments, the first one with the random draft of day 0. After
each segment a learner trains on its samples once, with as many replayed ones, and its weights serve the next segment.
Every segment holds equally many requests of each domain, so a longer recording begins with the whole of a shorter one.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ops.bench import prompts, recording
from ops.bench.harness import Say
from ops.local.stack import provide_target
from ops.replay.trace_import import INDEX
from schemas.device import select_device
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator.target_fingerprint import target_fingerprint
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.batch import collate
from trainer.data.replay_buffer import ReplayBuffer, ReplayEntry
from trainer.data.samples import Sample, split_sample
from trainer.data.target import read_target
from trainer.loop.learner import Learner

MAX_TOKENS = 96
"""Longest recorded output."""
SEGMENT_PER_DOMAIN = 15
"""Requests of each domain in a segment."""
_NEW_PER_STEP = 4


@dataclass(frozen=True, slots=True)
class TrafficKind:
    """How the requests of a recording are sampled and drafted."""

    folder: str
    temperature: float
    depth: int
    """Draft tokens in sequence of every verify step; branches of any lookahead up to it can be cut from the
    recording."""
    tree_width: int
    """``serve.draft_tree_width``."""


GREEDY = TrafficKind("learning", temperature=0.0, depth=8, tree_width=1)
SAMPLED = TrafficKind("learning-sampled", temperature=prompts.SAMPLED, depth=4, tree_width=3)


@dataclass(frozen=True, slots=True)
class ServedSegment:
    """How a segment was served."""

    segment: int
    version: str
    output_tokens: int
    verify_steps: int
    accepted: int
    seconds: float

    def __str__(self) -> str:
        accepted_per_step = self.accepted / max(self.verify_steps, 1)
        rate = f"{self.output_tokens / self.seconds:.1f} tokens/s"
        return f"{self.output_tokens} tokens by {self.version}, {rate}, {accepted_per_step:.2f} accepted per step"


@dataclass(frozen=True, slots=True, eq=False)
class RecordedTraffic:
    """The recording, or the first part of it."""

    requests: tuple[Sample, ...]
    digest: str
    """Of the target, the requests and their traces."""

    @property
    def tokens(self) -> int:
        """Tokens of all requests, prompts included."""
        return sum(sample.committed for sample in self.requests)


def traffic_folder(settings: Settings, kind: TrafficKind = GREEDY) -> Path:
    """Return the folder of the recording."""
    return recording.recordings_folder(settings, kind.folder)


def plan_segments(settings: Settings, per_domain: int, kind: TrafficKind = GREEDY) -> list[list[Request]]:
    """Return the requests by segment, in the order in which they are sent."""
    tokenizer = prompts.load_tokenizer(Path(settings.target.path))
    by_domain = []
    for domain in prompts.DOMAINS:
        texts = prompts.training_prompts(domain)
        if per_domain > len(texts):
            raise UserError(f"--record {per_domain}: {domain} has {len(texts)} training prompts")
        texts_ids = prompts.tokenize(tokenizer, texts[:per_domain])
        requests = prompts.training_requests(domain, texts_ids, per_domain, MAX_TOKENS)
        by_domain.append([replace(request, temperature=kind.temperature) for request in requests])
    return split_segments(by_domain)


def split_segments(by_domain: Sequence[Sequence[Request]]) -> list[list[Request]]:
    """Split into segments with equally many requests of each domain, in a fixed order within each segment."""
    segments = []
    for number, start in enumerate(range(0, len(by_domain[0]), SEGMENT_PER_DOMAIN)):
        segment = [request for domain in by_domain for request in domain[start : start + SEGMENT_PER_DOMAIN]]
        random.Random(number).shuffle(segment)  # noqa: S311
        segments.append(segment)
    return segments


def record_traffic(settings: Settings, per_domain: int, say: Say, kind: TrafficKind = GREEDY) -> None:
    """Record the traffic; requests that are recorded already are trained on, but not served again."""
    provide_target(settings.target, say)
    folder, segments = traffic_folder(settings, kind), plan_segments(settings, per_domain, kind)
    number = sum(map(len, segments))
    if not recording.find_missing(folder, [request for segment in segments for request in segment]):
        say(f"{number} requests are recorded in {folder} already")
        return
    say(f"recording {number} requests of up to {MAX_TOKENS} tokens into {folder}")
    drafting = {
        "speculate": True,
        "drafter": "eagle",
        "num_speculative_tokens": kind.depth,
        "draft_tree_width": kind.tree_width,
        "adaptive_drafting": False,
    }
    with recording.recording_engine(settings, max(map(len, segments)), **drafting) as (engine, recorder):
        for served in SegmentRecording(settings, engine, recorder, kind).run(segments):
            say(f"segment {served.segment + 1} of {len(segments)}: {served}")


class SegmentRecording:
    """An engine, and the learner whose weights it gets after each segment."""

    def __init__(
        self, settings: Settings, engine: BuiltinEngine, recorder: recording.Recorder, kind: TrafficKind = GREEDY
    ) -> None:
        self._target = read_target(settings).to(select_device(settings.train.device, "train.device"))
        self._engine, self._recorder, self._kind = engine, recorder, kind
        self._folder = traffic_folder(settings, kind)
        self._train = settings.train
        self._learner = Learner(self._target.new_draft(), self._target.embeddings_VH, settings.train)
        generator = random.Random(settings.train.seed)  # noqa: S311
        self._replay_buffer: ReplayBuffer[ReplayEntry] = ReplayBuffer(settings.train, generator)
        self._version = "segment-0"

    def run(self, segments: Sequence[Sequence[Request]]) -> Iterator[ServedSegment]:
        """Serve the missing requests of each segment, and train on all of it; yield the segments that were served."""
        for number, segment in enumerate(segments):
            if missing := recording.find_missing(self._folder, segment):
                yield self._serve(number, missing)
                self._write_index(segments[: number + 1])
            if number + 1 < len(segments):
                self._train_on(segment)
                self._version = f"segment-{number + 1}"

    def _serve(self, number: int, requests: Sequence[Request]) -> ServedSegment:
        self._engine.swap(self._learner.export_draft(), self._version)
        before, started = self._engine.health(), time.monotonic()
        recording.record_requests(self._engine, self._recorder, requests, self._folder)
        after, seconds = self._engine.health(), time.monotonic() - started
        return ServedSegment(
            number,
            self._version,
            after.output_tokens - before.output_tokens,
            after.verify_steps - before.verify_steps,
            after.accepted_tokens - before.accepted_tokens,
            seconds,
        )

    def _train_on(self, segment: Sequence[Request]) -> None:
        fingerprint, train = self._target.fingerprint, self._train
        samples = [recording.read_recorded_sample(self._folder, request.id, fingerprint) for request in segment]
        limits = train.max_sample_tokens, train.context_tokens
        parts = [part for sample in samples for part in split_sample(sample, *limits)]
        for start in range(0, len(parts), _NEW_PER_STEP):
            new = [ReplayEntry(sample=part, epochs=1) for part in parts[start : start + _NEW_PER_STEP]]
            replayed = self._replay_buffer.draw(len(new))
            self._learner.step(collate([entry.sample for entry in new + replayed]))
            for entry in new:
                self._replay_buffer.add(entry)

    def _write_index(self, segments: Sequence[Sequence[Request]]) -> None:
        """Write the order of the recorded requests, for readers of the folder."""
        index = {
            "target": self._target.fingerprint,
            "line": self._target.line,
            "max_tokens": MAX_TOKENS,
            "draft_tokens": self._kind.depth,
            "draft_tree_width": self._kind.tree_width,
            "temperature": self._kind.temperature,
            "segments": [[request.id for request in segment] for segment in segments],
        }
        unfinished = self._folder / f"{INDEX}.part"
        unfinished.write_text(json.dumps(index, indent=1) + "\n")
        unfinished.replace(self._folder / INDEX)


def read_traffic(settings: Settings, tokens: int | None = None, kind: TrafficKind = GREEDY) -> RecordedTraffic:
    """Read the recorded traffic in the order in which it was sent, up to so many tokens or all."""
    folder, target = traffic_folder(settings, kind), settings.target
    fingerprint = target_fingerprint(Path(target.path), target.fingerprint_cache)
    if not (folder / INDEX).exists():
        command = "aurora bench learning --record 200" + (" --sampled" if kind is SAMPLED else "")
        raise UserError(f"no traffic is recorded in {folder}; `{command}` records some")
    digest, requests, so_far = hashlib.sha256(fingerprint.encode()), [], 0
    for name in (name for segment in json.loads((folder / INDEX).read_text())["segments"] for name in segment):
        if tokens is not None and so_far >= tokens:
            break
        sample = replace(recording.read_recorded_sample(folder, name, fingerprint), label=name.rpartition("-")[0])
        digest.update(f"{name} {sample.committed} {len(sample.branches)}\n".encode())
        requests.append(sample)
        so_far += sample.committed
    return RecordedTraffic(tuple(requests), digest.hexdigest()[:16])
