"""HTTP API of a node: OpenAI's chat and text completions, with Aurora's extensions.

Request headers: ``x-aurora-label`` (traffic label in the traces), ``x-aurora-trace: off`` (no trace of this request is
published), ``x-aurora-speculate: off``, ``traceparent`` (the client's span: the request joins its trace, and the id of
the answer contains it). Response header: ``x-aurora-speculator``, the version that drafts when the request starts;
empty without one. The answer's ``aurora`` field says how it was decoded.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

import fastapi
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.types import Receive, Scope, Send

from schemas.settings import Serve
from schemas.telemetry import trace_context
from serving.engines.base import Engine, Request
from serving.engines.builtin.grammar import Grammar, GrammarCompiler
from serving.engines.builtin.grammar_check import GrammarError
from serving.http import errors
from serving.http.detokenizer import AnswerText, Detokenizer, TextDelta, Tokenizer, TokenSpeller, join_deltas
from serving.http.echo import Echo, EchoedPrompt
from serving.http.errors import ApiError, invalid_request
from serving.http.generation import Choice, Generation, RequestMetrics, RequestTrace
from serving.http.requests import BodyLimit, ChatRequest, CompletionBody, CompletionRequest, StreamOptions
from serving.http.responses import (
    AnswerBuilder,
    ChatAnswerBuilder,
    CompletionAnswerBuilder,
    FinishReason,
    RequestUsage,
)
from serving.http.server import ApiKeyMiddleware, Drain, DrainMiddleware
from serving.http.structured_outputs import join_grammars
from serving.http.tokens import TokenFile
from serving.http.tools import calls_grammar, choose_format

_MAX_LABEL = 256
_CLIENT_CLOSED_REQUEST = 499
_CONTEXT = 6
"""Tokens of a text completion's prompt that its first word is decoded with: the space before it may depend on them."""

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)
"""What a chat template can raise over the content of a request."""
_LINE_BREAKS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\u0085\u2028\u2029"})
"""Valid in JSON, but many clients split the lines of a stream at them."""

_T = TypeVar("_T")


class Completions:
    """Answers chat and text completions with an engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model: str,
        metrics: RequestMetrics,
        serve: Serve,
        is_traced: Callable[[str], bool],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._speller = TokenSpeller(tokenizer)
        self._model = model
        self._metrics = metrics
        self._max_choices = serve.max_choices
        self._is_traced = is_traced
        # The tokenizer's end token of a fine-tuned target may differ from that of its config.
        self._eos_ids = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
        self._tool_calls = choose_format(tokenizer.chat_template, serve.tool_call_parser)
        self._grammars = GrammarCompiler(tokenizer, engine.vocabulary, self._eos_ids | engine.eos_ids)
        self._compiling = ThreadPoolExecutor(1, "grammars")
        """One grammar is compiled at a time."""
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
        """Names of variables that a request cannot set."""

    async def chat(self, body: ChatRequest, http: fastapi.Request) -> Response:
        """``POST /v1/chat/completions``.

        Raises:
            ApiError: the request cannot be answered.
        """
        self._check_body(body)
        # A long prompt takes a while to tokenize; the event loop serves other requests meanwhile.
        prompt = await asyncio.to_thread(self._tokenize_messages, body)
        self._check_size(body, [prompt], "messages")
        grammar = await self._compile(body, body)
        trace = _request_trace(http)
        answer_id = trace.context.to_request_id("chatcmpl")
        builder = ChatAnswerBuilder(answer_id, self._model, self._speller, body.logprobs)
        requests = self._requests(body, [prompt], answer_id, http, grammar)
        choices = [self._chat_choice(i, request, body) for i, request in enumerate(requests)]
        return await self._respond(body, choices, builder, trace, http)

    async def complete(self, body: CompletionRequest, http: fastapi.Request) -> Response:
        """``POST /v1/completions``.

        Raises:
            ApiError: the request cannot be answered.
        """
        self._check_body(body)
        prompts = await asyncio.to_thread(lambda: [self._tokenize_prompt(prompt) for prompt in body.prompt])
        self._check_size(body, prompts, "prompt")
        grammar = await self._compile(body)
        trace = _request_trace(http)
        answer_id = trace.context.to_request_id("cmpl")
        builder = CompletionAnswerBuilder(answer_id, self._model, self._speller, body.logprobs is not None)
        requests = self._requests(body, prompts, answer_id, http, grammar)
        echoed = await asyncio.to_thread(self._read_echo, body, prompts)
        choices = []
        for i, request in enumerate(requests):
            detokenizer = Detokenizer(self._tokenizer, request.prompt[-_CONTEXT:])
            echo = Echo(echoed[i // body.n], logprobs=builder.logprobs) if echoed else None
            choices.append(Choice(i, request, AnswerText(detokenizer, body.stop, body.min_tokens), echo))
        return await self._respond(body, choices, builder, trace, http)

    def _chat_choice(self, index: int, request: Request, body: ChatRequest) -> Choice:
        answer = AnswerText(Detokenizer(self._tokenizer), body.stop, body.min_tokens)
        choice = Choice(index, request, answer)
        if self._tool_calls is not None and body.callable_tools:
            choice.calls = self._tool_calls.parser(body.parallel_tool_calls)
            choice.finishes_with_calls = body.tool_choice is None or body.tool_choice.function is None
        return choice

    async def _compile(self, body: CompletionBody, chat: ChatRequest | None = None) -> Grammar | None:
        """Return the grammar of an answer; None if any text is one.

        Raises:
            ApiError: it cannot be compiled; the error names the parameter that asks for it.
        """
        answer, calls = body.constraint, []
        if chat is not None and self._tool_calls is not None and chat.callable_tools:
            if chat.must_call:
                answer = None
            if chat.must_call or answer is not None:
                calls = calls_grammar(chat.callable_tools, self._tool_calls, parallel=chat.parallel_tool_calls)
        if answer is None and not calls:
            return None
        text = join_grammars(answer, calls)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, self._grammars.compile, text)
        except GrammarError as error:
            param = "tools" if answer is None else answer.param
            raise invalid_request(f"{param}: the grammar was rejected: {error}", param) from error

    def check_model(self, name: str) -> None:
        """Reject a model that this node does not serve.

        Raises:
            ApiError: the name is not the target's.
        """
        if name != self._model:
            message = f"The model {name!r} does not exist; this node serves {self._model!r}"
            raise invalid_request(message, "model", "model_not_found", status=404)

    def models(self) -> list[dict[str, Any]]:
        """``GET /v1/models``; vLLM's benchmark needs ``root``."""
        return [{"id": self._model, "object": "model", "created": 0, "owned_by": "aurora", "root": self._model}]

    async def _respond(
        self,
        body: CompletionBody,
        choices: Sequence[Choice],
        builder: AnswerBuilder,
        trace: RequestTrace,
        http: fastapi.Request,
    ) -> Response:
        generation = Generation(self._engine, builder, choices, self._metrics, trace)
        # Each prompt is repeated for its choices.
        prompt_tokens = sum(len(choice.request.prompt) for choice in choices[:: body.n])
        headers = {"x-aurora-speculator": self._speculator(choices[0].request)}
        generation.submit()
        if body.stream:
            events = _events(generation, builder, prompt_tokens, body.stream_options)
            return _EventStream(generation, events, headers)
        try:
            answers = await _unless_disconnected(http, _collect(generation))
        finally:
            generation.close()
        if answers is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return JSONResponse(builder.response(answers, _usage(generation, prompt_tokens)), headers=headers)

    def _requests(
        self,
        body: CompletionBody,
        prompts: Sequence[tuple[int, ...]],
        answer_id: str,
        http: fastapi.Request,
        grammar: Grammar | None,
    ) -> list[Request]:
        """Return one request per choice, prompt by prompt; a single choice has the answer's own id."""
        label, longest = _label(http), self._engine.max_tokens
        may_trace, speculate = _is_on(http, "x-aurora-trace"), _is_on(http, "x-aurora-speculate")
        several, key = len(prompts) * body.n > 1, body.prompt_key
        limit = longest if body.answer_limit is None else body.answer_limit
        return [
            Request(
                id=(request_id := f"{answer_id}-{i * body.n + j}" if several else answer_id),
                prompt=prompt,
                max_tokens=min(limit, longest - len(prompt)),
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(body.top_k, 0),
                min_p=body.min_p,
                seed=body.choice_seed(j),
                frequency_penalty=body.frequency_penalty,
                presence_penalty=body.presence_penalty,
                repetition_penalty=body.repetition_penalty,
                logit_bias=body.logit_bias,
                allowed_token_ids=None if body.allowed_token_ids is None else frozenset(body.allowed_token_ids),
                min_tokens=body.min_tokens,
                stop_ids=frozenset(body.stop_token_ids) | (frozenset() if body.ignore_eos else self._eos_ids),
                ignore_eos=body.ignore_eos,
                grammar=grammar,
                logprobs=body.alternatives,
                prompt_logprobs=body.prompt_alternatives,
                label=label,
                prompt_key=key,
                cache_salt=body.cache_salt,
                group=answer_id if several else None,
                # Without output there is nothing to learn from.
                trace=may_trace and limit > 0 and self._is_traced(request_id),
                speculate=speculate,
            )
            for i, prompt in enumerate(prompts)
            for j in range(body.n)
        ]

    def _speculator(self, request: Request) -> str:
        health = self._engine.health()
        return health.speculator if request.speculate and health.speculating else ""

    def _check_body(self, body: CompletionBody) -> None:
        self.check_model(body.model)
        for param in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            if ids := getattr(body, param):
                self._check_ids(list(ids), param)

    def _check_size(self, body: CompletionBody, prompts: Sequence[Sequence[int]], param: str) -> None:
        if len(prompts) * body.n > self._max_choices:
            message = f"This node gives at most {self._max_choices} choices to a request (serve.max_choices)"
            raise invalid_request(f"{message}; {len(prompts)} prompts times n={body.n} are more", "n")
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self._engine.max_tokens:
            message = (
                f"This node's longest request is {self._engine.max_tokens} tokens, prompt and answer together "
                f"(serve.max_model_len); {param} has {longest}"
            )
            raise invalid_request(message, param, "context_length_exceeded")

    def _tokenize_messages(self, body: ChatRequest) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise invalid_request("The target has no chat template; use /v1/completions", "messages")
        variables = body.chat_template_kwargs
        if reserved := sorted(self._reserved & variables.keys()):
            param = f"chat_template_kwargs.{reserved[0]}"
            raise invalid_request(f"{param}: the server sets this variable", param)
        messages = [message.for_template() for message in body.messages]
        tools = body.tools if body.callable_tools else []
        if tools and self._tool_calls is None:
            message = (
                "The target's chat template takes no tools, or calls them in a format that this server does not know "
                "(serve.tool_call_parser)"
            )
            raise invalid_request(message, "tools", "unsupported_parameter")
        if tools:
            variables = {**variables, "tools": [tool.for_template() for tool in tools]}
        try:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **variables
            )
        except _TEMPLATE_ERRORS as error:
            raise invalid_request(f"The chat template rejects these messages: {error}", "messages") from error
        return self._check_ids(ids, "messages")

    def _tokenize_prompt(self, prompt: str | list[int]) -> tuple[int, ...]:
        return self._check_ids(self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, "prompt")

    def _read_echo(self, body: CompletionRequest, prompts: Sequence[tuple[int, ...]]) -> list[EchoedPrompt]:
        pairs = zip(body.prompt, prompts, strict=True) if body.echo else ()
        return [EchoedPrompt.read(self._tokenizer, prompt, ids) for prompt, ids in pairs]

    def _check_ids(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Return token ids that the target has embeddings for; a tokenizer can have more tokens than its target."""
        vocabulary = self._engine.vocabulary
        if not ids:
            raise invalid_request(f"{param}: a prompt needs at least one token", param)
        if max(ids) >= vocabulary:
            raise invalid_request(f"{param}: {max(ids)} is no token of the target, which has {vocabulary}", param)
        return tuple(ids)


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    model: str,
    metrics: RequestMetrics,
    drain: Drain,
    serve: Serve,
    is_traced: Callable[[str], bool],
) -> FastAPI:
    """Return the application without the operator's endpoints; ``is_traced`` decides by the request's id.

    Raises:
        SettingsError: ``serve.api_keys_file`` cannot be read.
    """
    completions = Completions(engine, tokenizer, model, metrics, serve, is_traced)
    app = FastAPI(title="Aurora Stream", docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: fastapi.Request) -> Response:
        """Answer a chat."""
        return await completions.chat(body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: fastapi.Request) -> Response:
        """Complete one or several prompts."""
        return await completions.complete(body, request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": completions.models()}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """Describe the served model."""
        completions.check_model(name)
        return completions.models()[0]

    def reject(error: ApiError) -> Response:
        metrics.count("rejected")
        return error.response()

    app.add_middleware(BodyLimit, limit=serve.max_body_bytes, reject=reject)
    if serve.api_keys_file:
        keys = TokenFile("serve.api_keys_file", serve.api_keys_file)
        app.add_middleware(ApiKeyMiddleware, keys=keys, reject=reject)
    app.add_middleware(DrainMiddleware, drain=drain, reject=reject)
    errors.install_handlers(app, lambda: metrics.count("rejected"))
    return app


class _EventStream(StreamingResponse):
    """Server-sent events of one answer; closes the generation however the response ends."""

    def __init__(self, generation: Generation, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache", **headers})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(
    generation: Generation, builder: AnswerBuilder, prompt_tokens: int, options: StreamOptions
) -> AsyncIterator[str]:
    def chunk(body: dict[str, Any]) -> str:
        with_usage = options.include_usage and options.continuous_usage_stats
        return _event(body | ({"usage": _usage(generation, prompt_tokens).usage()} if with_usage else {}))

    for choice in generation.choices:
        if first := builder.first_chunk(choice.index):
            yield chunk(first)
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for choice, delta in deltas:
                if delta:
                    yield chunk(builder.delta_chunk(choice.index, delta))
                if choice.finish is not None:
                    yield chunk(builder.finish_chunk(choice.index, choice.finish))
    except ApiError as error:
        yield _event(error.body)
        return
    if options.include_usage:
        yield _event(builder.usage_chunk(_usage(generation, prompt_tokens)))
    yield "data: [DONE]\n\n"


async def _collect(generation: Generation) -> list[tuple[TextDelta, FinishReason]]:
    """Return the complete choices in their order."""
    deltas: dict[int, list[TextDelta]] = defaultdict(list)
    finished: dict[int, FinishReason] = {}
    async for choice, delta in generation.deltas():
        deltas[choice.index].append(delta)
        if choice.finish is not None:
            finished[choice.index] = choice.finish
    return [(join_deltas(deltas[index]), finish) for index, finish in sorted(finished.items())]


def _usage(generation: Generation, prompt_tokens: int) -> RequestUsage:
    # The choices of a prompt share its cached tokens. They count once: the tokens that the target read for no choice.
    cached: dict[tuple[int, ...], int] = {}
    for choice in generation.choices:
        prompt, tokens = choice.request.prompt, choice.stats.cached_tokens
        cached[prompt] = min(cached.get(prompt, tokens), tokens)
    return RequestUsage(prompt_tokens, tuple(choice.usage for choice in generation.choices), sum(cached.values()))


async def _unless_disconnected(http: fastapi.Request, work: Coroutine[None, None, _T]) -> _T | None:
    """Return the result of ``work``; None if the client disconnects first."""
    task, disconnected = asyncio.create_task(work), asyncio.create_task(_wait_disconnected(http))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        disconnected.cancel()


async def _wait_disconnected(http: fastapi.Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _request_trace(http: fastapi.Request) -> RequestTrace:
    """Return the trace context of a request, in the trace of its client if the client sent one."""
    parent = trace_context.parse_traceparent(http.headers.get(trace_context.TRACEPARENT))
    return RequestTrace(parent.child() if parent else trace_context.new_trace(), parent)


def _label(http: fastapi.Request) -> str | None:
    raw = http.headers.get("x-aurora-label")
    if raw is None:
        return None
    label = raw.encode("latin-1").decode("utf-8", errors="replace")
    if len(label) > _MAX_LABEL:
        raise invalid_request(f"x-aurora-label: longer than {_MAX_LABEL} characters", "x-aurora-label")
    return label


def _is_on(http: fastapi.Request, header: str) -> bool:
    value = http.headers.get(header, "on").lower()
    if value not in ("on", "off"):
        raise invalid_request(f"{header}: expected 'on' or 'off', found {value!r}", header)
    return value == "on"


def _event(body: dict[str, Any]) -> str:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_BREAKS)}\n\n"
