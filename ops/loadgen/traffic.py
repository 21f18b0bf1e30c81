"""Load for a serving node: prompts through the OpenAI API, streamed, at constant concurrency."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx

from ops.demo.record import Answered

_TIMEOUT = httpx.Timeout(120, connect=10)
_ERROR_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message and the domain it belongs to."""

    domain: str
    text: str


def changing(first: Iterable[Prompt], second: Iterable[Prompt], switch: Callable[[], bool]) -> Iterator[Prompt]:
    """Prompts of the first domain until ``switch`` says so, then of the second; each goes verify step when it is
    used up.
    """
    one, two = cycle(first), cycle(second)
    while True:
        yield next(two if switch() else one)


@dataclass
class Load:
    """Requests sent from a thread of their own, so many at a time, until the prompts end or ``stop`` is called."""

    url: str
    model: str
    prompts: Iterator[Prompt]
    concurrency: int
    max_tokens: int
    speculate: bool = True
    trace: bool = True
    done: list[Answered] = field(default_factory=list)
    """Answers in the order in which they ended; the thread only ever appends."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _sending: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin no further request; those that run go on until their answers have come."""
        self._stopping.set()

    def wait(self) -> None:
        """Block until the last answer has come."""
        if self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """Hang up on the requests that run: they end as neither answered nor failed."""
        self.stop()
        if self._loop and self._sending and self.running:
            with suppress(RuntimeError):  # the loop was closed in this moment: the last answer has come
                self._loop.call_soon_threadsafe(self._sending.cancel)
        self.wait()

    @property
    def running(self) -> bool:
        """True until the last answer has come."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._send_all())

    async def _send_all(self) -> None:
        self._loop, self._sending = asyncio.get_running_loop(), asyncio.current_task()
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        async with httpx.AsyncClient(base_url=self.url, timeout=_TIMEOUT, limits=limits) as client:
            await asyncio.gather(*(self._send_some(client) for _ in range(self.concurrency)))

    async def _send_some(self, client: httpx.AsyncClient) -> None:
        while not self._stopping.is_set() and (prompt := next(self.prompts, None)) is not None:
            answered = await self._send(client, prompt)
            self.done.append(answered)
            if answered.error is not None:
                await asyncio.sleep(_ERROR_PAUSE_S)

    async def _send(self, client: httpx.AsyncClient, prompt: Prompt) -> Answered:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked = {"x-aurora-speculate": self.speculate, "x-aurora-trace": self.trace}
        headers = {"x-aurora-label": prompt.domain} | {name: "off" for name, on in asked.items() if not on}
        started = time.time()
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                if answer.is_error:
                    told = (await answer.aread()).decode(errors="replace")
                    return _failed(prompt, started, f"{answer.status_code}: {told[:200]}")
                events = [event async for line in answer.aiter_lines() if (event := parse_event(line)) is not None]
        except httpx.HTTPError as error:
            return _failed(prompt, started, f"{type(error).__name__}: {error}")
        return read_answer(prompt, started, time.time(), events)


def parse_event(line: str) -> dict[str, Any] | None:
    """The JSON of one server-sent event; None for blank lines and the end mark."""
    data = line.removeprefix("data: ").strip()
    if not line.startswith("data: ") or data == "[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    return event


def read_answer(prompt: Prompt, started: float, ended: float, events: list[dict[str, Any]]) -> Answered:
    """A streamed answer put together; one without usage was cut short and counts as failed."""
    if broken := next((event["error"] for event in events if "error" in event), None):
        return _failed(prompt, started, str(broken.get("message", broken)))
    last = events[-1] if events else {}
    if "usage" not in last or "aurora" not in last:
        return _failed(prompt, started, "the stream ended before the chunk with usage")
    usage, figures = last["usage"], last["aurora"]
    return Answered(
        id=last["id"],
        domain=prompt.domain,
        started=started,
        ended=ended,
        prompt=prompt.text,
        text="".join(c["delta"].get("content") or "" for event in events for c in event["choices"]),
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        verify_steps=figures["verify_steps"],
        drafted=figures["drafted"],
        accepted=figures["accepted"],
        speculators=tuple(figures["speculators"]),
    )


def _failed(prompt: Prompt, started: float, why: str) -> Answered:
    return Answered("", prompt.domain, started, time.time(), prompt.text, error=why)
