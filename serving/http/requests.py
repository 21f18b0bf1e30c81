"""OpenAI's API on the wire: what a request may say, and the shape of errors.

``top_k``, ``stop_token_ids``, ``ignore_eos`` and ``stream_options.continuous_usage_stats`` are extensions, named as
vLLM names them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Parameters without a bearing on the answer."""

_ALWAYS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}

MOST_ALTERNATIVES = 20
"""Alternatives with log-probabilities for each token, at most."""


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, kind: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(message: str, param: str | None, code: str = "invalid_value", status: int = 400) -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(status, message, kind="invalid_request_error", code=code, param=param)


def unavailable(message: str, code: str = "engine_unavailable") -> ApiError:
    """The node cannot answer now."""
    return ApiError(503, message, kind="server_error", code=code)


def _as_text(content: Any) -> Any:
    """OpenAI allows a list of parts where text is meant; only text parts are supported."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("unsupported_value", "only parts of type 'text' are supported")
        texts.append(part["text"])
    return "".join(texts)


def _as_prompts(prompt: Any) -> list[str | list[int]]:
    """One text, several, the token ids of one, or those of several: always as a list of prompts."""
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) or _are_ids(p) for p in prompt):
        return prompt
    message = "expected a text, a list of texts, a list of token ids, or a list of such lists; none may be empty"
    raise PydanticCustomError("unsupported_value", message)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


class Message(BaseModel):
    """One turn of the conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates take it; they know no developer."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Every chunk carries the usage so far."""
    include_obfuscation: bool = False


class Sampling(BaseModel):
    """What both kinds of request may say; null stands for the default, as OpenAI has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    neutral: ClassVar[dict[str, tuple[Any, ...]]]
    """Parameters that are known but not supported, with the values that ask for nothing."""

    model: str
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    """0 and -1 draw from all tokens."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=4)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in cls.neutral.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise PydanticCustomError("unsupported", "{param} is not supported", {"param": name})
        stop = body.get("stop")
        given = {k: v for k, v in body.items() if v is not None and k not in IGNORED and k not in cls.neutral}
        return given | ({"stop": [stop]} if isinstance(stop, str) else {})

    @property
    def answer_limit(self) -> int | None:
        """Longest answer that the client wants, in tokens; None for all the room there is."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """Alternatives to report for every token; None for no log-probabilities at all."""
        raise NotImplementedError

    def choice_seed(self, number: int) -> int | None:
        """Seed of a prompt's choice: one more for each, so that every choice can be had again alone."""
        return None if self.seed is None else (self.seed + number + 2**63) % 2**64 - 2**63


class ChatRequest(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    neutral = _ALWAYS | {
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
    top_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)

    @model_validator(mode="after")
    def _asked_for(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("needs", "needs logprobs to be true", {"param": "top_logprobs"})
        return self

    @property
    def answer_limit(self) -> int | None:
        """``max_completion_tokens``, or by its older name ``max_tokens``."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """``top_logprobs`` with ``logprobs``."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Sampling):
    """The body of ``POST /v1/completions``."""

    neutral = _ALWAYS | {"echo": (False,), "suffix": ("",)}

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    best_of: int | None = None

    @model_validator(mode="after")
    def _all_are_shown(self) -> CompletionRequest:
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


def explain(error: Any) -> ApiError:
    """The first of pydantic's complaints about a body, in OpenAI's shape."""
    param = error.get("ctx", {}).get("param") or ".".join(str(part) for part in error["loc"] if part != "body")
    match error["type"]:
        case "extra_forbidden":
            return invalid(f"Unrecognized request argument: {param}", param, "unknown_parameter")
        case "unsupported":
            return invalid(f"{param}: this value is not supported by this server", param, "unsupported_parameter")
        case "missing":
            return invalid(f"Missing required parameter: {param}", param, "missing_required_parameter")
        case "json_invalid":
            return invalid("The body is not valid JSON", None, "invalid_json")
        case _:
            return invalid(f"{param}: {error['msg']}", param or None)
