"""From a request's rounds to chunks that fit into one Kafka message; nothing here does I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace

from schemas.trace import Chunk, Envelope, Round
from serving.engine import Finish, Request

FRAME_BYTES = 8192
"""Upper bound of what a chunk weighs beside its rows: Arrow metadata, buffer padding, envelope, key and headers."""

_ROW_BYTES = 160


@dataclass(frozen=True, slots=True)
class Origin:
    """Where rounds come from; the same for every chunk of a node."""

    node: str
    target: str
    line: str


def row_bytes(r: Round) -> int:
    """Upper bound of what a row adds to an encoded chunk, as if nothing in it could be compressed."""
    ids = 4 * len(r.tokens) + 10 * len(r.draft_tokens) + 2 * len(r.accepted)
    numbers = r.features.nbytes + r.top_ids.nbytes + r.top_logprobs.nbytes
    return numbers + ids + len(r.speculator.encode()) + _ROW_BYTES


def cut(r: Round, budget: int) -> tuple[Round, ...]:
    """The rows of a prefill, none above ``budget`` bytes where tokens can be parted; only the last has a bonus.

    A row with a draft is one decision of the verifier and stays whole. The times stand on the last row, so that they
    add up.
    """
    if row_bytes(r) <= budget or r.draft_tokens:
        return (r,)
    whole, n = row_bytes(r), len(r.tokens)
    fixed = whole - r.features.nbytes - 4 * n
    step = max(1, (budget - fixed) * n // (whole - fixed))
    starts = range(0, n, step)
    return tuple(_part(r, start, min(start + step, n)) for start in starts)


def _part(r: Round, start: int, end: int) -> Round:
    part = replace(r, position=r.position + start, tokens=r.tokens[start:end], features=r.features[start:end])
    if end == len(r.tokens):
        return part
    return replace(part, bonus=None, top_ids=r.top_ids[:0], top_logprobs=r.top_logprobs[:0], draft_us=0, verify_us=0)


class Assembly:
    """One request's rounds on their way into chunks.

    A chunk holds consecutive rounds. Where rounds are missing (they were shed) the chunk ends and a number is left out,
    so that a reader sees the gap. The newest rounds are kept back until the next ones or the end come: the last chunk
    of a request is never empty.
    """

    def __init__(self, request: Request, origin: Origin, budget: int) -> None:
        self._request = request
        self._origin = origin
        self._budget = budget
        self._rounds: list[Round] = []
        self._bytes = 0
        self._number = 0
        self._position = 0

    def add(self, r: Round) -> Chunk | None:
        """Take the next round, and give the chunk that ends before it, if one does."""
        gap, weight = r.position != self._position, row_bytes(r)
        full = self._take() if gap or self._bytes + weight > self._budget else None
        self._number += gap
        self._rounds.append(r)
        self._bytes += weight
        self._position = r.position + len(r.tokens)
        return full

    def end(self, finish: Finish | None) -> Chunk | None:
        """The rounds that are left, as the request's last chunk where ``finish`` is given; None if none was taken."""
        return self._take(finish)

    def _take(self, finish: Finish | None = None) -> Chunk | None:
        if not self._rounds:
            return None
        chunk = Chunk(self._envelope(finish), tuple(self._rounds))
        self._rounds.clear()
        self._bytes = 0
        self._number += 1
        return chunk

    def _envelope(self, finish: Finish | None) -> Envelope:
        first, request = self._rounds[0], self._request
        return Envelope(
            request=request.id,
            chunk=self._number,
            last=finish is not None,
            node=self._origin.node,
            target=self._origin.target,
            line=self._origin.line,
            features="inline",
            feature_width=first.features.shape[1],
            top_k=first.top_ids.shape[1],
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            label=request.label,
            finish=finish,
        )
