"""Recorded requests as they came in: their prompts, settings and times, from the table ``traces`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.delta import DeltaLog

_VERIFY_STEP_0 = (
    "SELECT request, label, temperature, top_p, sampling_top_k, seed, time, verify_us, position, tokens "
    "FROM traces WHERE verify_step = 0 ORDER BY request, position"
)
_LENGTHS = (
    "SELECT request, CAST(max(position + array_length(tokens)) + 1 AS BIGINT) AS tokens FROM traces GROUP BY request"
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the past, to be sent again."""

    request: str
    at: float
    """Unix time at which its first verify step began: how long it had waited for that is not recorded."""
    label: str | None
    prompt: tuple[int, ...]
    answer_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None

    def body(self, model: str) -> dict[str, Any]:
        """What ``POST /v1/completions`` takes: an answer of the recorded length, streamed."""
        told: dict[str, Any] = {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.answer_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return told | ({} if self.seed is None else {"seed": self.seed})


def arrivals(
    log: DeltaLog, begin: datetime | None = None, end: datetime | None = None, label: str | None = None
) -> list[Arrival]:
    """The requests that began in a span, in the order of their arrival; those whose prompt is not whole are left out.

    Raises:
        TableError: the table cannot be read.
    """
    lengths = {row["request"]: row["tokens"] for batch in log.query(_LENGTHS) for row in batch.to_pylist()}
    rows: dict[str, list[dict[str, Any]]] = {}
    for batch in log.query(_VERIFY_STEP_0):
        for row in batch.to_pylist():
            rows.setdefault(row["request"], []).append(row)
    found = [one for name, parts in rows.items() if (one := _arrival(parts, lengths[name])) is not None]
    return sorted(
        (
            one
            for one in found
            if (begin is None or one.at >= begin.timestamp())
            and (end is None or one.at < end.timestamp())
            and label in (None, one.label)
        ),
        key=lambda one: (one.at, one.request),
    )


def _arrival(parts: list[dict[str, Any]], tokens: int) -> Arrival | None:
    prompt: list[int] = []
    for part in parts:
        if part["position"] != len(prompt):
            return None
        prompt += part["tokens"]
    first = parts[0]
    if tokens <= len(prompt):
        return None
    return Arrival(
        request=first["request"],
        at=_unix(first) - first["verify_us"] / 1e6,
        label=first["label"],
        prompt=tuple(prompt),
        answer_tokens=tokens - len(prompt),
        temperature=round(first["temperature"], 6),
        top_p=round(first["top_p"], 6),
        top_k=first["sampling_top_k"],
        seed=first["seed"],
    )


def _unix(row: Mapping[str, Any]) -> float:
    committed: datetime = row["time"]
    return (committed if committed.tzinfo else committed.replace(tzinfo=UTC)).timestamp()
