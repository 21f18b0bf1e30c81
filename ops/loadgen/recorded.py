"""Recorded requests with their prompts, settings and arrival times, read from the table ``traces`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ops.loadgen.load import Request, completion_request
from pipeline.delta import DeltaLog

_PROMPTS = (
    "SELECT request, label, temperature, top_p, sampling_top_k, seed, time, verify_us, position, tokens "
    "FROM traces WHERE verify_step = 0 ORDER BY request, position"
)
_LENGTHS = (
    "SELECT request, CAST(max(position + array_length(tokens)) + 1 AS BIGINT) AS tokens FROM traces GROUP BY request"
)


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A traced request that can be sent again."""

    id: str
    arrival: float
    """Unix time at which its first verify step started. Queueing before that step is not recorded."""
    label: str | None
    prompt: tuple[int, ...]
    output_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None

    def to_request(self, model: str, *, trace: bool, due_s: float = 0.0) -> Request:
        """Return a completion request that generates as many tokens as the recorded one."""
        body: dict[str, Any] = {
            "prompt": list(self.prompt),
            "max_tokens": self.output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "ignore_eos": True,
            **({} if self.seed is None else {"seed": self.seed}),
        }
        return completion_request(model, body, label=self.label, trace=trace, due_s=due_s)


def read_recorded(
    log: DeltaLog, begin: datetime | None = None, end: datetime | None = None, label: str | None = None
) -> list[RecordedRequest]:
    """Return the requests that arrived in a span, in order of arrival; skip requests with an incomplete prompt.

    Raises:
        TableError: the table cannot be read.
    """
    lengths = {row["request"]: row["tokens"] for batch in log.query(_LENGTHS) for row in batch.to_pylist()}
    chunks: dict[str, list[dict[str, Any]]] = {}
    for batch in log.query(_PROMPTS):
        for row in batch.to_pylist():
            chunks.setdefault(row["request"], []).append(row)
    complete = (_join_chunks(rows, lengths[name]) for name, rows in chunks.items())
    return sorted(
        (
            request
            for request in complete
            if request is not None
            and (begin is None or request.arrival >= begin.timestamp())
            and (end is None or request.arrival < end.timestamp())
            and label in (None, request.label)
        ),
        key=lambda request: (request.arrival, request.id),
    )


def schedule_requests(recorded: Sequence[RecordedRequest], model: str, *, speed: float, trace: bool) -> list[Request]:
    """Return the requests of an open load that keeps the recorded arrival times, divided by ``speed``."""
    return [one.to_request(model, trace=trace, due_s=(one.arrival - recorded[0].arrival) / speed) for one in recorded]


def _join_chunks(chunks: list[dict[str, Any]], tokens: int) -> RecordedRequest | None:
    prompt: list[int] = []
    for chunk in chunks:
        if chunk["position"] != len(prompt):
            return None
        prompt += chunk["tokens"]
    first = chunks[0]
    if tokens <= len(prompt):
        return None
    committed: datetime = first["time"]
    return RecordedRequest(
        id=first["request"],
        arrival=committed.replace(tzinfo=committed.tzinfo or UTC).timestamp() - first["verify_us"] / 1e6,
        label=first["label"],
        prompt=tuple(prompt),
        output_tokens=tokens - len(prompt),
        temperature=round(first["temperature"], 6),
        top_p=round(first["top_p"], 6),
        top_k=first["sampling_top_k"],
        seed=first["seed"],
    )
