"""The node's HTTP API: OpenAI's chat and text completions, with what Aurora adds to them.

Request headers: ``x-aurora-label`` (traffic label in the traces), ``x-aurora-trace: off`` (nothing of this request is
published), ``x-aurora-speculate: off``, ``traceparent`` (the client's span: the request is one of the same trace, and
the answer's id says so). Response header: ``x-aurora-speculator``, the version that drafts when the
request begins; empty where none does. The answer's ``aurora`` key says how it was decoded.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import fastapi
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from schemas.settings import Serve
from schemas.telemetry import trace_context
from serving.engines.base import Engine, Request
from serving.http.body_limit import BodyLimit
from serving.http.detokenizer import Detokenizer, Speller, Tokenizer
from serving.http.drain import Drain, Draining
from serving.http.generation import Choice, Generation, RequestFigures
from serving.http.request_spans import Trail, teller
from serving.http.requests import ApiError, ChatRequest, CompletionRequest, Sampling, StreamOptions, explain, invalid
from serving.http.responses import Answer, ChatAnswer, CompletionAnswer, FinishReason, Tally
from serving.http.transcript import Piece, Transcript, joined

_LABEL_LIMIT = 256
_CLIENT_GONE = 499
_SERVER_ERRORS = 500
_PATH_ERRORS = {404: "unknown_url", 405: "method_not_allowed"}
_ERROR_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}
_CONTEXT = 6
"""Tokens of a text completion's prompt that its first word is decoded with: the space before it may depend on them."""

_T = TypeVar("_T")


class Completions:
    """Answers chat and text completions with an engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model: str,
        figures: RequestFigures,
        most_choices: int,
        traced: Callable[[str], bool],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._speller = Speller(tokenizer)
        self._model = model
        self._figures = figures
        self._most_choices = most_choices
        self._traced = traced

    async def chat(self, body: ChatRequest, http: fastapi.Request) -> Response:
        """``POST /v1/chat/completions``.

        Raises:
            ApiError: the request cannot be answered.
        """
        self.check_model(body.model)
        # A long prompt takes a while; the event loop has other answers to send.
        prompt = await asyncio.to_thread(self._of_messages, body)
        self._check_size(body, [prompt], "messages")
        trail = _trail(http)
        answer = ChatAnswer(trail.context.to_request_id("chatcmpl"), self._model, self._speller, body.logprobs)
        requests = self._requests(body, [prompt], answer.id, http)
        detokenizers = [Detokenizer(self._tokenizer) for _ in requests]
        return await self._respond(body, requests, detokenizers, answer, trail, http)

    async def complete(self, body: CompletionRequest, http: fastapi.Request) -> Response:
        """``POST /v1/completions``.

        Raises:
            ApiError: the request cannot be answered.
        """
        self.check_model(body.model)
        prompts = await asyncio.to_thread(lambda: [self._of_prompt(prompt) for prompt in body.prompt])
        self._check_size(body, prompts, "prompt")
        trail = _trail(http)
        answer_id = trail.context.to_request_id("cmpl")
        answer = CompletionAnswer(answer_id, self._model, self._speller, body.logprobs is not None)
        requests = self._requests(body, prompts, answer.id, http)
        detokenizers = [Detokenizer(self._tokenizer, request.prompt[-_CONTEXT:]) for request in requests]
        return await self._respond(body, requests, detokenizers, answer, trail, http)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served here.

        Raises:
            ApiError: another name than that of the target.
        """
        if name != self._model:
            message = f"The model {name!r} does not exist; this node serves {self._model!r}"
            raise invalid(message, "model", "model_not_found", status=404)

    def models(self) -> list[dict[str, Any]]:
        """``GET /v1/models``."""
        return [{"id": self._model, "object": "model", "created": 0, "owned_by": "aurora"}]

    async def _respond(
        self,
        body: Sampling,
        requests: Sequence[Request],
        detokenizers: Sequence[Detokenizer],
        answer: Answer,
        trail: Trail,
        http: fastapi.Request,
    ) -> Response:
        choices = [
            Choice(i, request, Transcript(detokenizer, body.stop))
            for i, (request, detokenizer) in enumerate(zip(requests, detokenizers, strict=True))
        ]
        generation = Generation(self._engine, choices, self._figures, teller(trail, answer.id, self._model))
        # Prompts come once for each of their choices.
        prompt_tokens = sum(len(request.prompt) for request in requests[:: body.n])
        headers = {"x-aurora-speculator": self._drafting(requests[0])}
        generation.submit()
        if body.stream:
            events = _events(generation, answer, prompt_tokens, body.stream_options)
            return _EventStream(generation, events, headers)
        try:
            pieces = await _unless_gone(http, _collect(generation))
        finally:
            generation.abandon()
        if pieces is None:
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(answer.whole(pieces, _tally(generation, prompt_tokens)), headers=headers)

    def _requests(
        self, body: Sampling, prompts: Sequence[tuple[int, ...]], answer_id: str, http: fastapi.Request
    ) -> list[Request]:
        """One for each choice, those of a prompt one after the other; a single one has the answer's own id."""
        label, longest = _label(http), self._engine.max_tokens
        may_trace, speculate = _switch(http, "x-aurora-trace"), _switch(http, "x-aurora-speculate")
        several = len(prompts) * body.n > 1
        return [
            Request(
                id=(request_id := f"{answer_id}-{i * body.n + j}" if several else answer_id),
                prompt=prompt,
                max_tokens=min(body.answer_limit or longest, longest - len(prompt)),
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(body.top_k, 0),
                seed=body.choice_seed(j),
                stop_ids=frozenset(body.stop_token_ids),
                ignore_eos=body.ignore_eos,
                logprobs=body.alternatives,
                label=label,
                trace=may_trace and self._traced(request_id),
                speculate=speculate,
            )
            for i, prompt in enumerate(prompts)
            for j in range(body.n)
        ]

    def _drafting(self, request: Request) -> str:
        health = self._engine.health()
        return health.speculator if request.speculate and health.speculating else ""

    def _check_size(self, body: Sampling, prompts: Sequence[Sequence[int]], param: str) -> None:
        if len(prompts) * body.n > self._most_choices:
            message = f"This node gives at most {self._most_choices} choices to a request (serve.max_choices)"
            raise invalid(f"{message}; {len(prompts)} prompts times n={body.n} are more", "n")
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self._engine.max_tokens:
            message = (
                f"This node's longest request is {self._engine.max_tokens} tokens, prompt and answer together "
                f"(serve.max_model_len); {param} has {longest}"
            )
            raise invalid(message, param, "context_length_exceeded")

    def _of_messages(self, body: ChatRequest) -> tuple[int, ...]:
        turns = [message.for_template() for message in body.messages]
        try:
            ids = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise invalid(f"The chat template refuses these messages: {error}", "messages") from error
        return tuple(ids)

    def _of_prompt(self, prompt: str | list[int]) -> tuple[int, ...]:
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise invalid("prompt: a prompt without a token has nothing to go on from", "prompt")
        if max(ids) >= len(self._tokenizer):
            raise invalid(f"prompt: {max(ids)} is no token id; there are {len(self._tokenizer)}", "prompt")
        return tuple(ids)


def create(
    engine: Engine,
    tokenizer: Tokenizer,
    model: str,
    figures: RequestFigures,
    drain: Drain,
    limits: Serve,
    traced: Callable[[str], bool],
) -> FastAPI:
    """The application, without the operator's endpoints; ``traced`` says by its id whether a request is traced."""
    completions = Completions(engine, tokenizer, model, figures, limits.max_choices, traced)
    app = FastAPI(title="Aurora Stream", docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: fastapi.Request) -> Response:
        return await completions.chat(body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: fastapi.Request) -> Response:
        return await completions.complete(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": completions.models()}

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> dict[str, Any]:
        completions.check_model(name)
        return completions.models()[0]

    def refuse(error: ApiError) -> Response:
        figures.ended("refused")
        return told(error)

    app.add_middleware(BodyLimit, limit=limits.max_body_bytes, refuse=refuse)
    app.add_middleware(Draining, drain=drain, refuse=refuse)
    explain_errors(app, lambda: figures.ended("refused"))
    return app


def explain_errors(app: FastAPI, refused: Callable[[], None]) -> None:
    """Give every error OpenAI's shape; ``refused`` is called for each request to the API that is refused."""

    def count(request: fastapi.Request, status: int) -> None:
        if request.method == "POST" and request.url.path.startswith("/v1/") and status < _SERVER_ERRORS:
            refused()

    @app.exception_handler(ApiError)
    async def refuse(request: fastapi.Request, error: ApiError) -> JSONResponse:
        count(request, error.status)
        return told(error)

    @app.exception_handler(RequestValidationError)
    async def explain_body(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        explained = explain(error.errors()[0])
        count(request, explained.status)
        return told(explained)

    @app.exception_handler(HTTPException)
    async def explain_path(_request: fastapi.Request, error: HTTPException) -> JSONResponse:
        return told(
            invalid(error.detail, None, _PATH_ERRORS.get(error.status_code, "invalid_request"), error.status_code)
        )

    @app.exception_handler(Exception)
    async def admit(_request: fastapi.Request, _error: Exception) -> JSONResponse:
        # Starlette raises it again behind the answer, so that the server logs it.
        return told(ApiError(500, "The node failed; its log says why", kind="server_error", code="internal_error"))


class _EventStream(StreamingResponse):
    """Server-sent events of one answer; whatever ends the response, the engine is told."""

    def __init__(self, generation: Generation, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache", **headers})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abandon()


async def _events(
    generation: Generation, answer: Answer, prompt_tokens: int, options: StreamOptions
) -> AsyncIterator[str]:
    def chunk(body: dict[str, Any]) -> str:
        running = options.include_usage and options.continuous_usage_stats
        return _event(body | ({"usage": _tally(generation, prompt_tokens).so_far()} if running else {}))

    for choice in generation.choices:
        if opening := answer.opening(choice.index):
            yield chunk(opening)
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for choice, piece in pieces:
                if piece:
                    yield chunk(answer.chunk(choice.index, piece))
                if choice.finish is not None:
                    yield chunk(answer.ending(choice.index, choice.finish))
    except ApiError as error:
        yield _event(error.body)
        return
    if options.include_usage:
        yield _event(answer.usage(_tally(generation, prompt_tokens)))
    yield "data: [DONE]\n\n"


async def _collect(generation: Generation) -> list[tuple[Piece, FinishReason]]:
    """The choices in their order, whole."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    ended: dict[int, FinishReason] = {}
    async for choice, piece in generation.pieces():
        pieces[choice.index].append(piece)
        if choice.finish is not None:
            ended[choice.index] = choice.finish
    return [(joined(pieces[index]), finish) for index, finish in sorted(ended.items())]


def _tally(generation: Generation, prompt_tokens: int) -> Tally:
    return Tally(prompt_tokens, tuple(choice.cost for choice in generation.choices))


async def _unless_gone(http: fastapi.Request, work: Coroutine[None, None, _T]) -> _T | None:
    """What ``work`` gives; None if the client goes away first."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(http: fastapi.Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _trail(http: fastapi.Request) -> Trail:
    """The span of a request, in the trace of its client where that sent one."""
    parent = trace_context.parse_traceparent(http.headers.get(trace_context.TRACEPARENT))
    return Trail(parent.child() if parent else trace_context.new_trace(), parent)


def _label(http: fastapi.Request) -> str | None:
    raw = http.headers.get("x-aurora-label")
    if raw is None:
        return None
    label = raw.encode("latin-1").decode("utf-8", errors="replace")
    if len(label) > _LABEL_LIMIT:
        raise invalid(f"x-aurora-label: longer than {_LABEL_LIMIT} characters", "x-aurora-label")
    return label


def _switch(http: fastapi.Request, header: str) -> bool:
    value = http.headers.get(header, "on").lower()
    if value not in ("on", "off"):
        raise invalid(f"{header}: expected 'on' or 'off', found {value!r}", header)
    return value == "on"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def told(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, status_code=error.status, headers=_ERROR_HEADERS.get(error.status))
