"""Recorded traffic of all domains, served with a speculator that learns from it, as a running stack would.

Requests are greedy, so what is answered does not depend on the draft: one recording serves every order of the stream.
What does depend on it are the rejected branches, and they come from drafts of growing quality: the traffic is served in
segments, the first one with the random draft of day 0, and after each one a learner takes the segment's windows once,
with as many replayed, and its weights serve the next one. Every segment holds as many requests of each domain, so a
longer recording begins with the whole of a shorter one.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ops import prompts
from ops.bench import prompted, recording, speculator
from ops.bench.recording import INDEX
from ops.local.stack import provide_target
from schemas.device import device_of
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator.checkpoint import target_fingerprint
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.samples import Window, collate, cut
from trainer.data.target import read_target
from trainer.loop.learner import Learner
from trainer.replay.prequential import Asked

Say = Callable[[str], None]

MAX_TOKENS = 96
"""Longest recorded answer."""

SEGMENT_PER_DOMAIN = 15
"""Requests of each domain in a segment."""

DRAFT_TOKENS = 8
"""Drafted in every verify step, so that branches of any lookahead up to it can be cut from the recording."""

_NEW_PER_STEP = 4
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Served:
    """How a segment went."""

    segment: int
    version: str
    output_tokens: int
    verify_steps: int
    accepted: int
    seconds: float

    def __str__(self) -> str:
        rate, length = self.output_tokens / self.seconds, self.accepted / max(self.verify_steps, 1)
        return (
            f"{self.output_tokens} tokens by {self.version}, {rate:.1f} tokens/s, accepted tokens per step {length:.2f}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """What was recorded, or the first part of it."""

    asked: tuple[Asked, ...]
    digest: str
    """Names the target, the requests and their traces."""

    @property
    def tokens(self) -> int:
        """Of all requests."""
        return sum(asked.tokens for asked in self.asked)


def folder_of(settings: Settings) -> Path:
    """Where the traffic is kept."""
    return speculator.recordings(settings, "learning")


def planned(settings: Settings, per_domain: int) -> list[list[Request]]:
    """The requests by segment, in the order in which they are sent.

    Raises:
        UserError: no target, or more requests than a domain has prompts to learn from.
    """
    tokenizer = prompted.tokenizer_of(Path(settings.target.path))
    by_domain = []
    for domain in prompts.DOMAINS:
        texts = prompted.learned_from(domain)
        if per_domain > len(texts):
            raise UserError(f"--per-domain {per_domain}: {domain} has {len(texts)} prompts to learn from")
        texts_ids = prompted.tokenize(tokenizer, texts[:per_domain])
        by_domain.append(prompted.training_requests(domain, texts_ids, per_domain, MAX_TOKENS))
    return interleaved(by_domain)


def interleaved(by_domain: Sequence[Sequence[Request]]) -> list[list[Request]]:
    """Segments with as many requests of each domain, in an order that is fixed for each segment."""
    segments = []
    for number, start in enumerate(range(0, len(by_domain[0]), SEGMENT_PER_DOMAIN)):
        segment = [request for domain in by_domain for request in domain[start : start + SEGMENT_PER_DOMAIN]]
        random.Random(number).shuffle(segment)  # noqa: S311
        segments.append(segment)
    return segments


def record(settings: Settings, per_domain: int, say: Say) -> None:
    """See that the traffic is recorded; what is recorded already is learned from again, and not served again.

    Raises:
        UserError: no target, too few prompts, or recordings of another target.
    """
    provide_target(settings.target, say)
    folder, segments = folder_of(settings), planned(settings, per_domain)
    if not recording.missing(folder, [request for segment in segments for request in segment]):
        say(f"{sum(map(len, segments))} requests are recorded in {folder} already")
        return
    say(f"recording {sum(map(len, segments))} requests of up to {MAX_TOKENS} tokens into {folder}")
    serve = settings.serve.model_copy(
        update={
            "speculate": True,
            "draft_tokens": DRAFT_TOKENS,
            "draft_tree_width": 1,
            "adaptive_drafting": False,
            "max_num_seqs": _BATCH,
            "max_waiting_requests": max(map(len, segments)),
        }
    )
    recorder = recording.Recorder()
    engine = BuiltinEngine(settings.model_copy(update={"serve": serve}), recorder)
    engine.start()
    try:
        for served in Serving(settings, engine, recorder, folder).run(segments):
            say(f"segment {served.segment + 1} of {len(segments)}: {served}")
    finally:
        engine.stop()


class Serving:
    """An engine and the learner that follows it, segment by segment."""

    def __init__(self, settings: Settings, engine: BuiltinEngine, recorder: recording.Recorder, folder: Path) -> None:
        self._target = read_target(settings).on(device_of(settings.train.device, "train.device"))
        self._engine, self._recorder, self._folder = engine, recorder, folder
        self._train = settings.train
        self._learner = Learner(self._target.new_draft(), self._target.embeddings_VH, settings.train)
        self._history: list[Window] = []
        self._order = random.Random(settings.train.seed)  # noqa: S311
        self._version = "segment-0"

    def run(self, segments: Sequence[Sequence[Request]]) -> Iterator[Served]:
        """Serve what is missing of each segment, and learn from all of it; gives how each one that was served went."""
        for number, segment in enumerate(segments):
            missing = recording.missing(self._folder, segment)
            if missing:
                yield self._serve(number, missing)
                self._note(segments[: number + 1])
            if number + 1 < len(segments):
                self._learn(segment)
                self._version = f"segment-{number + 1}"

    def _serve(self, number: int, requests: Sequence[Request]) -> Served:
        self._engine.swap(self._learner.weights(), self._version)
        before, started = self._engine.health(), time.monotonic()
        recording.record(self._engine, self._recorder, requests, self._folder, lambda _number: None)
        after, seconds = self._engine.health(), time.monotonic() - started
        return Served(
            number,
            self._version,
            after.output_tokens - before.output_tokens,
            after.verify_steps - before.verify_steps,
            after.accepted_tokens - before.accepted_tokens,
            seconds,
        )

    def _learn(self, segment: Sequence[Request]) -> None:
        windows = [
            piece
            for request in segment
            for piece in cut(
                recording.read_window(self._folder, request.id, self._target.fingerprint), self._train.max_sample_tokens
            )
        ]
        for start in range(0, len(windows), _NEW_PER_STEP):
            new = windows[start : start + _NEW_PER_STEP]
            replayed = self._order.sample(self._history, min(len(new), len(self._history)))
            self._learner.step(collate([*new, *replayed]))
            self._history += new

    def _note(self, segments: Sequence[Sequence[Request]]) -> None:
        """Write down the order of what is recorded, for readers of the folder."""
        index = {
            "target": self._target.fingerprint,
            "line": self._target.line,
            "max_tokens": MAX_TOKENS,
            "draft_tokens": DRAFT_TOKENS,
            "segments": [[request.id for request in segment] for segment in segments],
        }
        unfinished = self._folder / f"{INDEX}.part"
        unfinished.write_text(json.dumps(index, indent=1) + "\n")
        unfinished.replace(self._folder / INDEX)


def read(settings: Settings, tokens: int | None = None) -> Traffic:
    """The recorded traffic, in the order in which it was sent.

    Args:
        settings: Name the target and where recordings are kept.
        tokens: Stop at the request with which there are so many.

    Raises:
        UserError: nothing is recorded, or from another target.
    """
    folder, fingerprint = folder_of(settings), target_fingerprint(Path(settings.target.path))
    if not (folder / INDEX).exists():
        raise UserError(f"no traffic is recorded in {folder}; `aurora bench learning --record 200` records some")
    digest, read, so_far = hashlib.sha256(fingerprint.encode()), [], 0
    for name in (name for segment in json.loads((folder / INDEX).read_text())["segments"] for name in segment):
        if tokens is not None and so_far >= tokens:
            break
        asked = Asked(name.rpartition("-")[0], recording.read_window(folder, name, fingerprint))
        digest.update(f"{name} {asked.tokens} {len(asked.window.branches)}\n".encode())
        read.append(asked)
        so_far += asked.tokens
    return Traffic(tuple(read), digest.hexdigest()[:16])
