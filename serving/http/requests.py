"""Requests of OpenAI's API: the fields of their bodies, and the limit of their size.

``top_k``, ``min_p``, ``repetition_penalty``, ``allowed_token_ids``, ``min_tokens``, ``stop_token_ids``, ``ignore_eos``,
``cache_salt``, ``chat_template_kwargs`` and ``stream_options.continuous_usage_stats`` are extensions, named as in vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from schemas.hash_sampling import prompt_key
from schemas.speculator.acceptance import MIN_TEMPERATURE
from serving.http.api_object import ApiObject, check_texts
from serving.http.errors import Reject, invalid_request
from serving.http.messages import Message
from serving.http.structured_outputs import (
    Constraint,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Texts,
    list_constraints,
)
from serving.http.tools import Tool, ToolChoice

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
    "guided_whitespace_pattern": (),
}
"""Of OpenAI's API and vLLM's extensions, with the values that change nothing."""

MAX_TOP_LOGPROBS = 20
"""Alternatives with log-probabilities for each token, at most."""

MAX_STOPS = 64
"""Stop strings, at most. OpenAI allows 4, vLLM any number; evaluation harnesses send about ten."""


_TokenId = Annotated[int, Field(ge=0)]


def _as_greedy(temperature: float) -> float:
    return temperature if temperature >= MIN_TEMPERATURE else 0.0


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _as_number(logprobs: Any) -> Any:
    """Return None for false: a text completion names the number of alternatives, a chat only whether it wants them."""
    return None if logprobs is False else logprobs


def _without_nulls(value: Any) -> Any:
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


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


class StreamOptions(ApiObject):
    """Options of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Every chunk carries the usage so far."""
    include_obfuscation: bool = False


class CompletionBody(ApiObject):
    """Fields of both kinds of request."""

    ignored = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "guided_decoding_backend",
        }
    )

    model: str
    n: int = Field(1, ge=1)
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_as_greedy)] = 1.0
    """Below 1e-6 decoding is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    """0 and -1 sample from all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    logit_bias: Annotated[dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_without_nulls)] = (
        Field(default={})
    )
    allowed_token_ids: list[_TokenId] | None = Field(None, min_length=1)
    min_tokens: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        default=[], max_length=MAX_STOPS
    )
    stop_token_ids: list[_TokenId] = Field(default=[])
    ignore_eos: bool = False
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    """Separates the request's cached prefixes from those of requests with another one."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, body: Any) -> Any:
        check_texts(body)
        return body

    @model_validator(mode="after")
    def _check_min_tokens(self) -> Self:
        if self.answer_limit is not None and self.min_tokens > self.answer_limit:
            message = f"more than the {self.answer_limit} tokens that the answer may have"
            raise PydanticCustomError("unsupported_value", message, {"param": "min_tokens"})
        return self

    @model_validator(mode="after")
    def _check_constraints(self) -> Self:
        if len(constraints := self._list_constraints()) > 1:
            message = f"cannot be combined with {constraints[0].param}"
            raise PydanticCustomError("unsupported_value", message, {"param": constraints[1].param})
        if constraints and self.allowed_token_ids is not None:
            # The two could exclude every token.
            message = f"cannot be combined with {constraints[0].param}"
            raise PydanticCustomError("unsupported_value", message, {"param": "allowed_token_ids"})
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What the text of the answer must match."""
        return next(iter(self._list_constraints()), None)

    def _list_constraints(self) -> list[Constraint]:
        guided = StructuredOutputs.model_construct(
            json_schema=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        return list_constraints(self.response_format, self.structured_outputs, guided)

    @property
    def answer_limit(self) -> int | None:
        """Maximum length of the answer in tokens; None for the node's maximum."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """Alternatives to report for every token; None for no log-probabilities at all."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def prompt_key(self) -> str | None:
        """Hash of the first user message; None without messages."""
        return None

    def choice_seed(self, number: int) -> int | None:
        """Return the seed of a choice: ``seed`` plus its number, so that each choice can be reproduced alone."""
        return None if self.seed is None else (self.seed + number + 2**63) % 2**64 - 2**63


class ChatRequest(CompletionBody):
    """The body of ``POST /v1/chat/completions``."""

    unsupported = _UNSUPPORTED | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "add_generation_prompt": (True,),
        "echo": (False,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "chat_template": (),
        "documents": ([],),
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Variables for the target's chat template, such as ``enable_thinking``."""
    tools: list[Tool] = Field(default=[])
    tool_choice: ToolChoice | None = None
    """``auto`` unless given."""
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("needs", "needs logprobs to be true", {"param": "top_logprobs"})
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise PydanticCustomError("unsupported_value", "two functions have the same name", {"param": "tools"})
        choice = self.tool_choice
        if choice is None or choice.type in ("none", "auto"):
            return self
        if not names:
            raise PydanticCustomError("needs", "needs tools", {"param": "tool_choice"})
        if choice.function is not None and choice.function.name not in names:
            raise PydanticCustomError("unsupported_value", "is no function of tools", {"param": "tool_choice"})
        if self.allowed_token_ids is not None:
            message = "cannot be combined with a call that tool_choice requires"
            raise PydanticCustomError("unsupported_value", message, {"param": "allowed_token_ids"})
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        choice = self.tool_choice
        if choice is not None and choice.type == "none":
            return []
        if choice is not None and choice.function is not None:
            return [tool for tool in self.tools if tool.function.name == choice.function.name]
        return self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice is not None and self.tool_choice.type in ("required", "function")

    @property
    def answer_limit(self) -> int | None:
        """``max_completion_tokens``, or OpenAI's older ``max_tokens``."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompt_key(self) -> str | None:
        """The same for all turns of a conversation, whatever its system prompt; None without a user message."""
        first = next((message for message in self.messages if message.role == "user"), None)
        return None if first is None else prompt_key(first.for_template()["content"])

    @property
    def alternatives(self) -> int | None:
        """``top_logprobs`` with ``logprobs``."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(CompletionBody):
    """The body of ``POST /v1/completions``."""

    unsupported = _UNSUPPORTED | {"suffix": ("",), "add_special_tokens": (True,)}

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    max_tokens: int = Field(16, ge=0)
    """0 with ``echo`` is the way to get the log-probabilities of a prompt."""
    echo: bool = False
    """Whether the text and the log-probabilities begin with those of the prompt."""
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS), BeforeValidator(_as_number)] = None
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

    @property
    def prompt_alternatives(self) -> int | None:
        """``logprobs`` with ``echo``."""
        return self.logprobs if self.echo else None


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
