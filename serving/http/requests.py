"""Requests of OpenAI's API: the fields of their bodies, and the limit of their size.

``top_k``, ``stop_token_ids``, ``ignore_eos`` and ``stream_options.continuous_usage_stats`` are extensions, named as in
vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from serving.http.errors import Reject, invalid_request

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Parameters without effect on the answer."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}

MAX_TOP_LOGPROBS = 20
"""Alternatives with log-probabilities for each token, at most."""


def _as_text(content: Any) -> Any:
    """Join a list of parts, which OpenAI allows in place of a text; only text parts are supported."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("unsupported_value", "only parts of type 'text' are supported")
        texts.append(part["text"])
    return "".join(texts)


def _as_prompts(prompt: Any) -> list[str | list[int]]:
    """Return a list of prompts for one text, several texts, the token ids of one prompt, or those of several."""
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) or _are_ids(p) for p in prompt):
        return prompt
    message = "expected a text, a list of texts, a list of token ids, or a list of such lists; none may be empty"
    raise PydanticCustomError("unsupported_value", message)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


class Message(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Return the message for a chat template; templates have no developer role."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Every chunk carries the usage so far."""
    include_obfuscation: bool = False


class CompletionBody(BaseModel):
    """Fields of both kinds of request; null stands for the default, as in OpenAI's API."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]]
    """Known but unsupported parameters, with the values that have no effect."""

    model: str
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    """0 and -1 sample from all tokens."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=4)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in cls.unsupported.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise PydanticCustomError("unsupported", "{param} is not supported", {"param": name})
        stop = body.get("stop")
        used = {k: v for k, v in body.items() if v is not None and k not in IGNORED and k not in cls.unsupported}
        return used | ({"stop": [stop]} if isinstance(stop, str) else {})

    @property
    def answer_limit(self) -> int | None:
        """Maximum length of the answer in tokens; None for the node's maximum."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """Alternatives to report for every token; None for no log-probabilities at all."""
        raise NotImplementedError

    def choice_seed(self, number: int) -> int | None:
        """Return the seed of a choice: ``seed`` plus its number, so that each choice can be reproduced alone."""
        return None if self.seed is None else (self.seed + number + 2**63) % 2**64 - 2**63


class ChatRequest(CompletionBody):
    """The body of ``POST /v1/chat/completions``."""

    unsupported = _UNSUPPORTED | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("needs", "needs logprobs to be true", {"param": "top_logprobs"})
        return self

    @property
    def answer_limit(self) -> int | None:
        """``max_completion_tokens``, or OpenAI's older ``max_tokens``."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """``top_logprobs`` with ``logprobs``."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(CompletionBody):
    """The body of ``POST /v1/completions``."""

    unsupported = _UNSUPPORTED | {"echo": (False,), "suffix": ("",)}

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise PydanticCustomError("unsupported", "another best_of than n", {"param": "best_of"})
        return self

    @property
    def answer_limit(self) -> int | None:
        """``max_tokens``."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """``logprobs``."""
        return self.logprobs


class BodyLimit:
    """Middleware that rejects bodies above a limit, whatever length their headers declare."""

    def __init__(self, app: ASGIApp, *, limit: int, reject: Reject) -> None:
        self._app = app
        self._limit = limit
        self._reject = reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with 413."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        is_too_large = declared.isdecimal() and int(declared) > self._limit
        body = None if is_too_large else await self._read(receive)
        if body is None:
            message = f"The body is larger than {self._limit} bytes (serve.max_body_bytes)"
            response = self._reject(invalid_request(message, None, "request_too_large", status=413))
            # The rest of the body may still arrive; it is not read.
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> list[AsgiMessage] | None:
        """Return the messages of the body; None as soon as it is too large. A client's disconnect ends it early."""
        messages: list[AsgiMessage] = []
        size = 0
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._limit:
                return None
        return messages


def _replay(messages: list[AsgiMessage], receive: Receive) -> Receive:
    """Return a receiver of the messages that were read, and then of the next ones."""
    remaining = iter(messages)

    async def replay() -> AsgiMessage:
        message = next(remaining, None)
        return await receive() if message is None else message

    return replay
