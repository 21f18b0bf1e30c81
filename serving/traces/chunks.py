"""From a request's verify steps to chunks that fit into one Kafka message; nothing here does I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from schemas.trace.record import Chunk, Envelope, Features, VerifyStep
from serving.engines.base import Finish, Request

FRAME_BYTES = 8192
"""Upper bound of what a chunk weighs beside its rows: Arrow metadata, buffer padding, envelope, key and headers."""

_ROW_BYTES = 160
_TOKEN_BEFORE_BYTES = 11
"""Upper bound of what a token in ``Envelope.before`` weighs."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where verify steps come from; the same for every chunk of a node."""

    node: str
    target: str
    line: str
    vocabulary: int | None = None
    """Size of the target's vocabulary; None where it is not known."""


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes in a message, and in the file of features beside it."""

    message: int
    file: int = 0

    def __add__(self, other: Space) -> Space:
        return Space(self.message + other.message, self.file + other.file)

    def holds(self, other: Space) -> bool:
        """Whether the other fits into this."""
        return other.message <= self.message and other.file <= self.file


@dataclass(frozen=True, slots=True)
class Way:
    """How features travel, and the space that the rows of a chunk have."""

    features: Features
    limit: Space

    def space(self, r: VerifyStep) -> Space:
        """What a row takes."""
        if self.features != "claim-check":
            return Space(row_bytes(r))
        return Space(row_bytes(r) - r.features.nbytes, r.features.nbytes)


def row_bytes(r: VerifyStep) -> int:
    """Upper bound of what a row adds to an encoded chunk, as if nothing in it could be compressed."""
    ids = 4 * len(r.tokens) + 10 * len(r.draft_tokens) + 2 * len(r.accepted)
    numbers = r.features.nbytes + r.top_ids.nbytes + r.top_logprobs.nbytes
    return numbers + ids + len(r.speculator.encode()) + _ROW_BYTES


def chunk_bytes(chunk: Chunk) -> int:
    """Upper bound of what a chunk weighs, file of features included."""
    return FRAME_BYTES + sum(map(row_bytes, chunk.verify_steps)) + _TOKEN_BEFORE_BYTES * len(chunk.envelope.before)


def without_features(r: VerifyStep) -> VerifyStep:
    """The verify step with none of its features; what held them can be freed."""
    return replace(r, features=np.empty((0, r.features.shape[1]), np.uint16)) if len(r.features) else r


def cut(r: VerifyStep, way: Way) -> tuple[VerifyStep, ...]:
    """The rows of a prefill, none larger than a chunk where tokens can be parted; only the last has a bonus.

    A row with a draft is one decision of the verifier and stays whole. The times stand on the last row, so that they
    add up.
    """
    if way.limit.holds(way.space(r)) or r.draft_tokens:
        return (r,)
    n = len(r.tokens)
    fixed, whole = way.space(_part(r, 0, 0, is_end=True)), way.space(r)
    steps = [
        (limit - least) * n // (most - least)
        for limit, least, most in (
            (way.limit.message, fixed.message, whole.message),
            (way.limit.file, fixed.file, whole.file),
        )
        if most > least
    ]
    step = max(1, min(steps))
    return tuple(_part(r, at, min(at + step, n), is_end=at + step >= n) for at in range(0, n, step))


def _part(r: VerifyStep, start: int, end: int, *, is_end: bool) -> VerifyStep:
    part = replace(r, position=r.position + start, tokens=r.tokens[start:end], features=r.features[start:end])
    if is_end:
        return part
    return replace(part, bonus=None, top_ids=r.top_ids[:0], top_logprobs=r.top_logprobs[:0], draft_us=0, verify_us=0)


class Assembly:
    """One request's verify steps on their way into chunks.

    A chunk holds consecutive verify steps. Where verify steps are missing (they were shed) the chunk ends and a
    number is left out,
    so that a reader sees the gap. The newest verify steps are kept back until the next ones or the end come: the
    last chunk
    of a request is never empty.
    """

    def __init__(self, request: Request, origin: Origin, way: Way) -> None:
        self._request = request
        self._origin = origin
        self._way = way
        self._verify_steps: list[VerifyStep] = []
        self._taken = Space(0)
        self._number = 0
        self._position = 0
        self._known: list[int] | None = [] if way.features == "recompute" else None
        """Tokens up to ``_position``, as long as none was missed."""
        self._before: tuple[int, ...] = ()

    def add(self, r: VerifyStep) -> Chunk | None:
        """Take the next verify step, and give the chunk that ends before it, if one does."""
        gap, space = r.position != self._position, self._way.space(r)
        full = self._take() if gap or not self._way.limit.holds(self._taken + space) else None
        self._number += gap
        if gap and self._known is not None:
            # The answer's tokens were in the verify steps that are missing, the prompt's are known.
            prompt = self._request.prompt
            self._known = list(prompt[: r.position]) if r.position <= len(prompt) else None
        if not self._verify_steps:
            self._begin()
        self._verify_steps.append(r)
        self._taken += space
        self._position = r.position + len(r.tokens)
        if self._known is not None:
            self._known += r.tokens
        return full

    def end(self, finish: Finish | None) -> Chunk | None:
        """The verify steps that are left, as the request's last chunk where ``finish`` is given; None if none was
        taken.
        """
        return self._take(finish)

    def _begin(self) -> None:
        """Reserve the space for the tokens before; where they would take most of a chunk, they are left out."""
        before = tuple(self._known or ())
        space = Space(_TOKEN_BEFORE_BYTES * len(before))
        self._before, self._taken = ((), Space(0)) if 2 * space.message > self._way.limit.message else (before, space)

    def _take(self, finish: Finish | None = None) -> Chunk | None:
        if not self._verify_steps:
            return None
        chunk = Chunk(self._envelope(finish), tuple(self._verify_steps))
        self._verify_steps.clear()
        self._taken = Space(0)
        self._number += 1
        return chunk

    def _envelope(self, finish: Finish | None) -> Envelope:
        first, request = self._verify_steps[0], self._request
        return Envelope(
            request=request.id,
            chunk=self._number,
            last=finish is not None,
            node=self._origin.node,
            target=self._origin.target,
            line=self._origin.line,
            features=self._way.features,
            feature_width=first.features.shape[1],
            top_k=first.top_ids.shape[1],
            temperature=request.temperature,
            top_p=request.top_p,
            sampling_top_k=request.top_k,
            seed=request.seed,
            label=request.label,
            finish=finish,
            before=self._before,
            vocabulary=self._origin.vocabulary,
        )
