"""The node's HTTP API: OpenAI's chat completions, with what Aurora adds to it.

Request headers: ``x-aurora-label`` (traffic label in the traces), ``x-aurora-trace: off`` (nothing of this request is
published), ``x-aurora-speculate: off``. Response header: ``x-aurora-speculator``, the version that serves when the
request begins. The answer's ``aurora`` key says how it was decoded.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import fastapi
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serving.engine import Engine, Request
from serving.generation import Generation, RequestFigures
from serving.openai import Answer, ApiError, ChatRequest, explain, invalid
from serving.text import Detokenizer, StopScanner, Tokenizer

_LABEL_LIMIT = 256
_CLIENT_GONE = 499


class Chat:
    """Answers chat completions with an engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str, figures: RequestFigures) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model
        self._figures = figures

    async def complete(self, body: ChatRequest, http: fastapi.Request) -> Response:
        """``POST /v1/chat/completions``.

        Raises:
            ApiError: the request cannot be answered.
        """
        self.check_model(body.model)
        request = await self._request(body, http)
        generation = Generation(
            self._engine, request, Detokenizer(self._tokenizer), StopScanner(body.stop), self._figures
        )
        headers = {"x-aurora-speculator": self._engine.health().speculator if request.speculate else ""}
        answer = Answer(request.id, self._model)
        generation.submit()
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(generation, _events(generation, answer, usage=usage), headers)
        try:
            text = await _unless_gone(http, _collect(generation))
        finally:
            generation.abandon()
        if text is None:
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(answer.whole(text, generation.finish, generation.tally), headers=headers)

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

    async def _request(self, body: ChatRequest, http: fastapi.Request) -> Request:
        # A long prompt takes a while; the event loop has other answers to send.
        prompt = await asyncio.to_thread(self._prompt, body)
        room = self._engine.max_tokens - len(prompt)
        if room < 1:
            message = (
                f"This node's longest request is {self._engine.max_tokens} tokens, prompt and answer together "
                f"(serve.max_tokens); the messages have {len(prompt)}"
            )
            raise invalid(message, "messages", "context_length_exceeded")
        return Request(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            prompt=prompt,
            max_tokens=min(body.answer_limit or room, room),
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            label=_label(http),
            trace=_switch(http, "x-aurora-trace"),
            speculate=_switch(http, "x-aurora-speculate"),
        )

    def _prompt(self, body: ChatRequest) -> tuple[int, ...]:
        turns = [message.for_template() for message in body.messages]
        try:
            ids = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise invalid(f"The chat template refuses these messages: {error}", "messages") from error
        return tuple(ids)


def create(engine: Engine, tokenizer: Tokenizer, model: str, figures: RequestFigures) -> FastAPI:
    """The application, without the operator's endpoints."""
    chat = Chat(engine, tokenizer, model, figures)
    app = FastAPI(title="Aurora Stream", docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: fastapi.Request) -> Response:
        try:
            return await chat.complete(body, request)
        except ApiError as error:
            if error.status < fastapi.status.HTTP_500_INTERNAL_SERVER_ERROR:
                figures.ended("refused")
            raise

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": chat.models()}

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> dict[str, Any]:
        chat.check_model(name)
        return chat.models()[0]

    @app.exception_handler(ApiError)
    async def refuse(_request: fastapi.Request, error: ApiError) -> JSONResponse:
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def explain_body(_request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        figures.ended("refused")
        return _error(explain(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def explain_path(_request: fastapi.Request, error: HTTPException) -> JSONResponse:
        return _error(invalid(error.detail, None, "unknown_url", status=error.status_code))

    return app


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


async def _events(generation: Generation, answer: Answer, *, usage: bool) -> AsyncIterator[str]:
    yield _event(answer.delta({"role": "assistant", "content": ""}))
    try:
        async with aclosing(generation.texts()) as texts:
            async for text in texts:
                yield _event(answer.delta({"content": text}))
    except ApiError as error:
        yield _event(error.body)
        return
    yield _event(answer.delta({}, generation.finish))
    if usage:
        yield _event(answer.usage(generation.tally))
    yield "data: [DONE]\n\n"


async def _collect(generation: Generation) -> str:
    return "".join([text async for text in generation.texts()])


async def _unless_gone(http: fastapi.Request, work: Coroutine[None, None, str]) -> str | None:
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


def _error(error: ApiError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == fastapi.status.HTTP_429_TOO_MANY_REQUESTS else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)
