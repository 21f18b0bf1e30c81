"""OpenAI's chat completions on the wire: what a request may say, and the shape of answers, chunks and errors."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serving.engine import Figures

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Parameters without a bearing on the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Parameters that are known but not supported, with the values that ask for nothing."""

FinishReason = Literal["stop", "length"]


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, kind: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(message: str, param: str | None, code: str = "invalid_value", status: int = 400) -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(status, message, kind="invalid_request_error", code=code, param=param)


def unavailable(message: str) -> ApiError:
    """The engine cannot answer now."""
    return ApiError(503, message, kind="server_error", code="engine_unavailable")


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
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``; null stands for the default, as OpenAI has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=4)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in NEUTRAL.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise PydanticCustomError("unsupported", "{param} is not supported", {"param": name})
        stop = body.get("stop")
        given = {k: v for k, v in body.items() if v is not None and k not in IGNORED and k not in NEUTRAL}
        return given | ({"stop": [stop]} if isinstance(stop, str) else {})

    @property
    def answer_limit(self) -> int | None:
        """Longest answer that the client wants, in tokens."""
        return self.max_completion_tokens or self.max_tokens


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


@dataclass(slots=True)
class Tally:
    """What an answer cost, known when it has ended."""

    prompt_tokens: int
    completion_tokens: int = 0
    figures: Figures | None = None

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        figures = self.figures or Figures(0, 0, 0, ())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens_details": {
                "accepted_prediction_tokens": figures.accepted,
                "rejected_prediction_tokens": figures.drafted - figures.accepted,
            },
        }

    def aurora(self) -> dict[str, Any]:
        """How the answer was decoded."""
        figures = self.figures or Figures(0, 0, 0, ())
        return {
            "rounds": figures.rounds,
            "drafted": figures.drafted,
            "accepted": figures.accepted,
            "speculators": list(figures.speculators),
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """Builds the bodies of one answer."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: FinishReason, tally: Tally) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._body("chat.completion", [choice]) | {"usage": tally.usage(), "aurora": tally.aurora()}

    def delta(self, delta: dict[str, str], finish: FinishReason | None = None) -> dict[str, Any]:
        """One streamed chunk."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._body("chat.completion.chunk", [choice])

    def usage(self, tally: Tally) -> dict[str, Any]:
        """The streamed chunk that carries usage."""
        return self._body("chat.completion.chunk", []) | {"usage": tally.usage(), "aurora": tally.aurora()}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
