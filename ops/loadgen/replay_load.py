"""Recorded requests sent again to a node: at the times at which they came, faster or slower, or as fast as it goes.

With times the load is open: a request is sent when it is due, whatever became of those before, as it is with real
clients. How late the generator itself was is a figure of its own: a late one has not loaded the node as it says.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from ops.bench.harness import percentile
from ops.loadgen.arrivals import Arrival
from ops.loadgen.traffic import parse_event
from schemas.errors import UserError

TELL_EVERY_S = 5.0
SHARES = (0.5, 0.9, 0.99)
_TIMEOUT = httpx.Timeout(600, connect=10)
_TOLD_CHARACTERS = 120

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to send."""

    url: str
    speed: float | None = 1.0
    """Times the recorded pace; None sends the next one as soon as there is a place."""
    at_once: int = 32
    """Places, where no pace is kept."""
    trace: bool = False
    """Whether the node may trace what is sent."""


@dataclass(slots=True)
class Sent:
    """What became of one request. Times are seconds of a monotonic clock."""

    due: float | None
    begun: float
    pieces: list[float] = field(default_factory=list)
    """When each piece of text came."""
    ended: float = 0.0
    tokens: int = 0
    error: str | None = None


@dataclass(slots=True)
class Outcome:
    """Everything that was sent."""

    wanted: int
    sent: list[Sent] = field(default_factory=list)
    seconds: float = 0.0
    cut_short: bool = False

    @property
    def answered(self) -> list[Sent]:
        """Requests with a whole answer."""
        return [one for one in self.sent if one.ended and one.error is None]

    @property
    def failures(self) -> Counter[str]:
        """Reasons, with how often."""
        return Counter(one.error for one in self.sent if one.error is not None)

    def summary(self) -> dict[str, Any]:
        """As JSON. Milliseconds; None where nothing was measured."""
        answered = self.answered
        first = [one.pieces[0] - one.begun for one in answered if one.pieces]
        between = [b - a for one in answered for a, b in pairwise(one.pieces)]
        late = [one.begun - one.due for one in self.sent if one.due is not None]
        tokens = sum(one.tokens for one in answered)
        return {
            "requests": self.wanted,
            "sent": len(self.sent),
            "answered": len(answered),
            "failed": sum(self.failures.values()),
            "failures": dict(self.failures.most_common()),
            "seconds": round(self.seconds, 3),
            "output_tokens": tokens,
            "output_tokens_per_s": round(tokens / self.seconds, 2) if self.seconds else None,
            "ttft_ms": _percentiles(first),
            "itl_ms": _percentiles(between),
            "late_ms": _percentiles(late),
            "cut_short": self.cut_short,
        }


def send(plan: Plan, arrivals: Sequence[Arrival], say: Say) -> Outcome:
    """Send everything, and wait for the answers; Ctrl-C hangs up on what runs, and gives what there is.

    Raises:
        UserError: no node answers at that address.
    """
    return asyncio.run(_send(plan, arrivals, say))


async def _send(plan: Plan, arrivals: Sequence[Arrival], say: Say) -> Outcome:
    outcome = Outcome(len(arrivals))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=plan.url, timeout=_TIMEOUT, limits=limits) as client:
        model = await _model(client, plan.url)
        started = time.monotonic()
        telling = asyncio.create_task(_tell(outcome, started, say))
        try:
            await (_at_once if plan.speed is None else _paced)(plan, arrivals, client, model, outcome)
        except asyncio.CancelledError:
            outcome.cut_short = True
        finally:
            outcome.seconds = time.monotonic() - started
            telling.cancel()
    return outcome


async def _paced(
    plan: Plan, arrivals: Sequence[Arrival], client: httpx.AsyncClient, model: str, outcome: Outcome
) -> None:
    assert plan.speed is not None
    begin = time.monotonic()
    async with asyncio.TaskGroup() as running:
        for arrival in arrivals:
            due = begin + (arrival.at - arrivals[0].at) / plan.speed
            await asyncio.sleep(max(due - time.monotonic(), 0))
            running.create_task(_ask(plan, arrival, client, model, outcome, due))


async def _at_once(
    plan: Plan, arrivals: Sequence[Arrival], client: httpx.AsyncClient, model: str, outcome: Outcome
) -> None:
    waiting = iter(arrivals)

    async def some() -> None:
        for arrival in waiting:
            await _ask(plan, arrival, client, model, outcome, None)

    async with asyncio.TaskGroup() as running:
        for _ in range(plan.at_once):
            running.create_task(some())


async def _ask(
    plan: Plan, arrival: Arrival, client: httpx.AsyncClient, model: str, outcome: Outcome, due: float | None
) -> None:
    outcome.sent.append(one := Sent(due, time.monotonic()))
    headers = {b"x-aurora-trace": b"on" if plan.trace else b"off"}
    if arrival.label is not None:
        headers[b"x-aurora-label"] = arrival.label.encode()
    with _failures_of(one):
        async with client.stream("POST", "/v1/completions", json=arrival.body(model), headers=headers) as answer:
            if answer.is_error:
                one.error = f"{answer.status_code}: {_message(await answer.aread())}"
                return
            async for line in answer.aiter_lines():
                if (event := parse_event(line)) is not None:
                    _take(one, event)
        if not one.tokens and one.error is None:
            one.error = "the stream ended before the chunk with usage"
    one.ended = time.monotonic()


@contextmanager
def _failures_of(one: Sent) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        one.error = f"{type(error).__name__}: {error}"[:_TOLD_CHARACTERS]


def _take(one: Sent, event: dict[str, Any]) -> None:
    if "error" in event:
        one.error = str(event["error"].get("message", event["error"]))[:_TOLD_CHARACTERS]
    elif event.get("usage"):
        one.tokens = event["usage"]["completion_tokens"]
    elif any(choice.get("text") for choice in event["choices"]):
        one.pieces.append(time.monotonic())


def _message(body: bytes) -> str:
    """What an error's body says, in OpenAI's shape or not."""
    try:
        return str(json.loads(body)["error"]["message"])[:_TOLD_CHARACTERS]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:_TOLD_CHARACTERS]


async def _model(client: httpx.AsyncClient, url: str) -> str:
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise UserError(f"--url {url}: no node that serves a model: {error}") from error


async def _tell(outcome: Outcome, started: float, say: Say) -> None:
    while True:
        await asyncio.sleep(TELL_EVERY_S)
        tokens, failed = sum(one.tokens for one in outcome.answered), sum(outcome.failures.values())
        answered = len(outcome.answered)
        say(
            f"{len(outcome.sent)} of {outcome.wanted} sent, {answered} answered, {failed} failed, "
            f"{len(outcome.sent) - answered - failed} run; {tokens / (time.monotonic() - started):.1f} tokens/s"
        )


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {f"p{share * 100:g}": round(1000 * percentile(seconds, share), 2) for share in SHARES} | {
        "most": round(1000 * max(seconds), 2)
    }
