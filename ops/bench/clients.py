"""Clients of a node as it meets them: streaming, some of them leaving in the middle of their answer."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from ops.bench import prompts
from ops.bench.prompts import SAMPLED
from ops.loadgen.traffic import Prompt, parse_event, read_answer

_TIMEOUT = httpx.Timeout(300, connect=10)
_ERROR_PAUSE_S = 0.5
_SHORTEST, _LONGEST = 8, 96
_LATEST_LEAVE = 24


@dataclass
class Clients:
    """So many clients at a time on a thread of their own, until ``stop`` is called."""

    url: str
    model: str
    concurrency: int
    leaving: float
    """Share of the requests whose client hangs up before the answer is whole."""
    seed: int = 0
    answered: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    """Of whole answers."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to send."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send_all()), name="clients", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin no further request, and wait until the answers to those that run have come."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    async def _send_all(self) -> None:
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        asked = [Prompt(domain, text) for domain in prompts.DOMAINS for text in prompts.read_prompts(domain)]
        random.Random(self.seed).shuffle(asked)  # noqa: S311
        numbers = count()
        async with httpx.AsyncClient(base_url=self.url, timeout=_TIMEOUT, limits=limits) as client:
            workers = (self._send_some(client, asked, numbers) for _ in range(self.concurrency))
            await asyncio.gather(*workers)

    async def _send_some(self, client: httpx.AsyncClient, asked: list[Prompt], numbers: count[int]) -> None:
        while not self._stopping.is_set():
            number = next(numbers)
            try:
                error = await self._send(client, asked[number % len(asked)], number)
            except httpx.HTTPError as failure:
                error = f"{type(failure).__name__}: {failure}"
            if error is not None:
                self.errors.append(error)
                await asyncio.sleep(_ERROR_PAUSE_S)

    async def _send(self, client: httpx.AsyncClient, prompt: Prompt, number: int) -> str | None:
        """Send one request; what went wrong, or None."""
        chance = random.Random(f"{self.seed}/{number}")  # noqa: S311
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": chance.randint(_SHORTEST, _LONGEST),
            "temperature": chance.choice((0.0, SAMPLED)),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        leave_after = chance.randint(1, _LATEST_LEAVE) if chance.random() < self.leaving else None
        events: list[dict[str, Any]] = []
        started = time.time()
        async with client.stream(
            "POST", "/v1/chat/completions", json=body, headers={"x-aurora-label": prompt.domain}
        ) as answer:
            if answer.is_error:
                return f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')[:200]}"
            async for line in answer.aiter_lines():
                if (event := parse_event(line)) is not None:
                    events.append(event)
                if len(events) == leave_after:
                    self.left += 1
                    return None
        whole = read_answer(prompt, started, time.time(), events)
        if whole.error is None:
            self.answered += 1
            self.tokens += whole.output_tokens
        return whole.error
