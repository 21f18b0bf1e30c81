"""Responses of OpenAI's API: bodies of answers, of streamed chunks, and of log-probabilities."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from serving.engines.base import RequestStats
from serving.http.detokenizer import ScoredToken, TextDelta, TokenSpeller
from serving.http.tool_calls import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]

_MIN_LOGPROB = -9999.0
"""OpenAI's value for a very unlikely token; JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class ChoiceUsage:
    """Tokens of one choice, and how they were decoded."""

    tokens: int
    stats: RequestStats


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """Tokens of all choices of a request."""

    prompt_tokens: int
    """Each prompt once, however many choices it has."""
    choices: tuple[ChoiceUsage, ...]
    cached_tokens: int = 0
    """Prompt tokens from the prefix cache."""

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's ``usage``; also while the answer is streamed."""
        completion_tokens = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def final_fields(self) -> dict[str, Any]:
        """Return OpenAI's ``usage`` of the whole answer, and ``aurora``: how the answer was decoded."""
        drafted = sum(choice.stats.draft_tokens for choice in self.choices)
        accepted = sum(choice.stats.accepted_tokens for choice in self.choices)
        usage = self.usage() | {
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
        }
        aurora = {
            "verify_steps": sum(choice.stats.verify_steps for choice in self.choices),
            "draft_tokens": drafted,
            "accepted_tokens": accepted,
            "suffix_accepted_tokens": sum(choice.stats.suffix_accepted_tokens for choice in self.choices),
            "speculators": list(dict.fromkeys(v for choice in self.choices for v in choice.stats.speculators)),
        }
        return {"usage": usage, "aurora": aurora}


@dataclass(frozen=True, slots=True)
class AnswerBuilder(ABC):
    """Builds the response bodies of one request."""

    id: str
    model: str
    speller: TokenSpeller
    logprobs: bool
    """Whether the client requested log-probabilities."""
    created: int = field(default_factory=lambda: int(time.time()))

    operation: ClassVar[str]
    """OpenTelemetry's name of the operation."""
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def response(self, choices: Sequence[tuple[TextDelta, FinishReason]], usage: RequestUsage) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        bodies = [self.choice(i, text, finish) for i, (text, finish) in enumerate(choices)]
        return self._body(self.kind, bodies) | usage.final_fields()

    def usage_chunk(self, usage: RequestUsage) -> dict[str, Any]:
        """Return the streamed chunk with the usage."""
        return self._body(self.chunk_kind, []) | usage.final_fields()

    @abstractmethod
    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the streamed chunk before the text of a choice, if there is one."""

    @abstractmethod
    def delta_chunk(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return a streamed chunk with the next text of a choice."""

    @abstractmethod
    def finish_chunk(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """Return the last streamed chunk of a choice, with its finish reason."""

    @abstractmethod
    def choice(self, index: int, text: TextDelta, finish: FinishReason) -> dict[str, Any]:
        """Return a complete choice."""

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class ChatAnswerBuilder(AnswerBuilder):
    """Builds the responses of ``POST /v1/chat/completions``."""

    operation = "chat"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the chunk with the role."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def delta_chunk(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return a chunk with the next text and calls."""
        calls = [{"index": call.index} | _call(call) for call in delta.calls]
        fields: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if delta.text or not calls:
            fields["content"] = delta.text
        return self._delta(index, fields, delta.tokens)

    def finish_chunk(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """Return the chunk with the finish reason."""
        return self._delta(index, {}, finish=finish)

    def choice(self, index: int, text: TextDelta, finish: FinishReason) -> dict[str, Any]:
        """Return a choice with its message."""
        message: dict[str, Any] = {"role": "assistant", "content": text.text, "refusal": None}
        if text.calls:
            message |= {"content": text.text or None, "tool_calls": [_call(call) for call in text.calls]}
        logprobs = self._logprobs(text.tokens) if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _delta(
        self, index: int, delta: dict[str, Any], tokens: Sequence[ScoredToken] = (), finish: FinishReason | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._body(self.chunk_kind, [choice])

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            self._scored(token.id, token.score.logprob)
            | {"top_logprobs": [self._scored(other, logprob) for other, logprob in token.score.top]}
            for token in tokens
            if token.score is not None
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self.speller.spell(token)
        text = _escape(spelling.bytes or b"") if spelling.text is None else spelling.text
        raw = None if spelling.bytes is None else list(spelling.bytes)
        return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": raw}


class CompletionAnswerBuilder(AnswerBuilder):
    """Builds the responses of ``POST /v1/completions``."""

    operation = "text_completion"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def first_chunk(self, index: int) -> None:
        """Return None: text completions start with their text."""

    def delta_chunk(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return a chunk with the next text."""
        return self._body(self.chunk_kind, [self._choice(index, delta.text, delta.tokens, logprobs=bool(delta.tokens))])

    def finish_chunk(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """Return the chunk with the finish reason."""
        return self._body(self.chunk_kind, [self._choice(index, "", (), finish)])

    def choice(self, index: int, text: TextDelta, finish: FinishReason) -> dict[str, Any]:
        """Return a choice with its text."""
        return self._choice(index, text.text, text.tokens, finish, logprobs=self.logprobs)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[ScoredToken],
        finish: FinishReason | None = None,
        *,
        logprobs: bool = False,
    ) -> dict[str, Any]:
        scored = self._logprobs(tokens) if logprobs else None
        return {"index": index, "text": text, "logprobs": scored, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [self._logprob(token) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _logprob(self, token: ScoredToken) -> float | None:
        return None if token.score is None else max(token.score.logprob, _MIN_LOGPROB)

    def _alternatives(self, token: ScoredToken) -> dict[str, float] | None:
        """Return log-probabilities by name, the token's own included; the likelier of two equal names counts."""
        if token.score is None:
            return None
        named: dict[str, float] = {}
        for other, logprob in (*token.score.top, (token.id, token.score.logprob)):
            named.setdefault(self._name(other), max(logprob, _MIN_LOGPROB))
        return named

    def _name(self, token: int) -> str:
        spelling = self.speller.spell(token)
        return f"bytes:{_escape(spelling.bytes or b'')}" if spelling.text is None else spelling.text


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _escape(raw: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in raw)
