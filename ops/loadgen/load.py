"""Send streamed OpenAI requests to a node and record the responses.

The demo, ``aurora replay load`` and the benchmarks share this module:

    requests = (chat_request(model, prompt, max_tokens=64) for prompt in prompts)
    load = Load(url, requests, concurrency=8)
    load.start()
    load.wait()
    load.responses

``chat_request`` and ``completion_request`` build a ``Request``. Two arrival processes exist. With ``concurrency=N`` the
load is closed: N clients each send their next request when the previous one has ended. With ``concurrency=None`` the
load is open: each request is sent ``Request.due_s`` after the start, whatever the state of the earlier ones, as
independent clients do. A request with ``disconnect_after=N`` closes its connection after N events.
``ops.loadgen.recorded`` reads requests with their arrival times from the table ``traces``; ``ops.loadgen.summary``
computes latency percentiles.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from schemas.errors import UserError
from schemas.settings import Serve
from serving.http.tokens import TokenFile

_CONNECT_TIMEOUT_S = 10.0
_MAX_KEEPALIVE = 64
_ERROR_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message and the domain that it belongs to."""

    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a load."""

    path: str
    body: dict[str, Any]
    headers: dict[bytes, bytes]
    domain: str = ""
    """Traffic label or prompt domain, for the response."""
    prompt: str = ""
    due_s: float = 0.0
    """Seconds from the start of an open load to this request."""
    disconnect_after: int | None = None
    """Events after which the client closes the connection; None reads the whole response."""


@dataclass(frozen=True, slots=True)
class Response:
    """One completed or failed request. Times are Unix seconds."""

    id: str
    domain: str
    started: float
    ended: float
    prompt: str = ""
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    verify_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    suffix_accepted_tokens: int = 0
    """Accepted tokens that the suffix drafter proposed and the speculator did not."""
    speculators: tuple[str, ...] = ()
    error: str | None = None
    text_times: tuple[float, ...] = ()
    """Arrival time of each piece of text."""


def chat_request(
    model: str,
    prompt: Prompt,
    max_tokens: int,
    *,
    temperature: float = 0.0,
    speculate: bool = True,
    trace: bool = True,
    disconnect_after: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Request:
    """Return a chat request for one prompt, labelled with its domain; ``options`` are further fields of its body."""
    body = {
        "messages": [{"role": "user", "content": prompt.text}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        **(options or {}),
    }
    headers = {b"x-aurora-label": prompt.domain.encode()}
    if not speculate:
        headers[b"x-aurora-speculate"] = b"off"
    if not trace:
        headers[b"x-aurora-trace"] = b"off"
    return Request(
        "/v1/chat/completions",
        _streamed(model, body),
        headers,
        prompt.domain,
        prompt.text,
        disconnect_after=disconnect_after,
    )


def completion_request(
    model: str, body: dict[str, Any], *, label: str | None, trace: bool, due_s: float = 0.0
) -> Request:
    """Return a completion request with a body of token ids and sampling settings."""
    headers = {b"x-aurora-trace": b"on" if trace else b"off"}
    if label is not None:
        headers[b"x-aurora-label"] = label.encode()
    return Request("/v1/completions", _streamed(model, body), headers, label or "", due_s=due_s)


def read_api_key(serve: Serve) -> str:
    """Return the first of a node's API keys, empty if it needs none.

    Raises:
        SettingsError: ``serve.api_keys_file`` cannot be read.
    """
    keys = TokenFile("serve.api_keys_file", serve.api_keys_file).read() if serve.api_keys_file else []
    return keys[0].decode("latin-1") if keys else ""


def read_model_name(url: str, api_key: str = "") -> str:
    """Return the name of the first model that a node serves.

    Raises:
        UserError: no node answers at this address.
    """
    try:
        models = f"{url.rstrip('/')}/v1/models"
        answer = httpx.get(models, headers=_authorization(api_key), timeout=_CONNECT_TIMEOUT_S)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise UserError(f"--url {url}: no node that serves a model: {error}") from error


@dataclass
class Load:
    """Requests sent from a background thread until they are exhausted or ``stop`` is called."""

    url: str
    requests: Iterable[Request]
    concurrency: int | None
    """Clients of a closed load; None sends each request when it is due."""
    timeout_s: float = 120.0
    """Longest silence of the node within a response."""
    error_pause_s: float = 0.5
    """Pause of a client after a failed request."""
    api_key: str = field(default="", repr=False)
    """Key of a node that needs one."""
    responses: list[Response] = field(default_factory=list)
    """In the order in which they ended; the thread only appends."""
    sent: int = 0
    disconnected: int = 0
    """Requests that closed their connection early, as ``Request.disconnect_after`` says."""
    lateness_s: list[float] = field(default_factory=list)
    """Delay of each request of an open load behind its due time. A late generator offers less load than intended."""
    seconds: float = 0.0
    """Duration of the load, once it has ended."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event | None = None
    """Set at the end of the thread. ``Thread.join`` would mark a running thread as ended if Ctrl-C interrupts it."""
    _loop: asyncio.AbstractEventLoop | None = None
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start sending."""
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(self._ended,), name="load", daemon=True).start()

    def stop(self) -> None:
        """Send no further request; the running ones continue to their end."""
        self._stopping.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the last response has ended or the timeout has passed; return whether it has ended."""
        return self._ended is None or self._ended.wait(timeout_s)

    def abandon(self) -> None:
        """Close the connections of running requests; these count neither as completed nor as failed."""
        self.stop()
        if self._loop and self._task and self.running:
            with suppress(RuntimeError):  # the loop has just closed: the last response has ended
                self._loop.call_soon_threadsafe(self._task.cancel)
        self.wait()

    @property
    def errors(self) -> list[str]:
        """Errors of the failed requests."""
        return [response.error for response in self.responses if response.error is not None]

    @property
    def running(self) -> bool:
        """True until the last response has ended."""
        return self._ended is not None and not self._ended.is_set()

    def _run(self, ended: threading.Event) -> None:
        started = time.monotonic()
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(self._send_all())
        finally:
            self.seconds = time.monotonic() - started
            ended.set()

    async def _send_all(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        timeout = httpx.Timeout(self.timeout_s, connect=_CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency or _MAX_KEEPALIVE)
        async with (
            httpx.AsyncClient(
                base_url=self.url, headers=_authorization(self.api_key), timeout=timeout, limits=limits
            ) as client,
            asyncio.TaskGroup() as tasks,
        ):
            if self.concurrency is None:
                await self._send_when_due(client, tasks)
            else:
                requests = iter(self.requests)
                for _ in range(self.concurrency):
                    tasks.create_task(self._send_in_turn(client, requests))

    async def _send_in_turn(self, client: httpx.AsyncClient, requests: Iterable[Request]) -> None:
        """Act as one client of a closed load; all clients share the iterator."""
        for request in requests:
            if self._stopping.is_set():
                return
            response = await self._send(client, request)
            if response is not None and response.error is not None:
                await asyncio.sleep(self.error_pause_s)

    async def _send_when_due(self, client: httpx.AsyncClient, tasks: asyncio.TaskGroup) -> None:
        started = time.monotonic()
        for request in self.requests:
            due = started + request.due_s
            await asyncio.sleep(max(due - time.monotonic(), 0))
            if self._stopping.is_set():
                return
            self.lateness_s.append(time.monotonic() - due)
            tasks.create_task(self._send(client, request))

    async def _send(self, client: httpx.AsyncClient, request: Request) -> Response | None:
        """Send one request and append its response; return None after an early disconnect."""
        self.sent += 1
        started = time.time()
        offset = started - time.monotonic()
        events: list[dict[str, Any]] = []
        text_times: list[float] = []
        error = None
        try:
            async with client.stream("POST", request.path, json=request.body, headers=request.headers) as answer:
                if answer.is_error:
                    error = f"{answer.status_code}: {_error_message(await answer.aread())}"
                async for line in answer.aiter_lines():
                    if (event := parse_event(line)) is None:
                        continue
                    events.append(event)
                    if _text(event):
                        text_times.append(offset + time.monotonic())
                    if len(events) == request.disconnect_after:
                        self.disconnected += 1
                        return None
        except (httpx.HTTPError, json.JSONDecodeError) as failure:
            error = f"{type(failure).__name__}: {failure}"[:_ERROR_LENGTH]
        ended = offset + time.monotonic()
        if error is None:
            response = read_response(request, started, ended, events, text_times)
        else:
            response = Response("", request.domain, started, ended, request.prompt, error=error)
        self.responses.append(response)
        return response


def parse_event(line: str) -> dict[str, Any] | None:
    """Parse one server-sent event; return None for blank lines, comments and the end mark."""
    data = line.removeprefix("data: ").strip()
    if not line.startswith("data: ") or data == "[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    return event


def read_response(
    request: Request, started: float, ended: float, events: list[dict[str, Any]], text_times: Iterable[float] = ()
) -> Response:
    """Assemble a response from its events; a stream that carries an error or ends without usage is a failure."""
    failed = Response("", request.domain, started, ended, request.prompt)
    if error := next((event["error"] for event in events if "error" in event), None):
        return replace(failed, error=str(error.get("message", error))[:_ERROR_LENGTH])
    last = next((event for event in reversed(events) if event.get("usage")), None)
    if last is None:
        return replace(failed, error="the stream ended before the chunk with usage")
    usage, figures = last["usage"], last.get("aurora") or {}
    return Response(
        id=last["id"],
        domain=request.domain,
        started=started,
        ended=ended,
        prompt=request.prompt,
        text="".join(map(_text, events)),
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        verify_steps=figures.get("verify_steps", 0),
        draft_tokens=figures.get("draft_tokens", 0),
        accepted_tokens=figures.get("accepted_tokens", 0),
        suffix_accepted_tokens=figures.get("suffix_accepted_tokens", 0),
        speculators=tuple(figures.get("speculators", ())),
        text_times=tuple(text_times),
    )


def _text(event: dict[str, Any]) -> str:
    """Return the text of a chat or a completion chunk."""
    choices = event.get("choices", ())
    return "".join((choice.get("delta") or {}).get("content") or choice.get("text") or "" for choice in choices)


def _error_message(body: bytes) -> str:
    """Return the message of an error response in OpenAI's format, or the body in any other."""
    try:
        return str(json.loads(body)["error"]["message"])[:_ERROR_LENGTH]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:_ERROR_LENGTH]


def _streamed(model: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, **body, "stream": True, "stream_options": {"include_usage": True}}


def _authorization(api_key: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {api_key}".encode("latin-1")} if api_key else {}
