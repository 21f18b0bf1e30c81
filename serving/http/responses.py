"""OpenAI's API on the wire: the bodies of answers, of their chunks and of their log-probabilities."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from serving.engines.base import RequestStats
from serving.http.detokenizer import Speller
from serving.http.transcript import Piece, Token

FinishReason = Literal["stop", "length"]

_LEAST_LOGPROB = -9999.0
"""OpenAI's word for a token that is very unlikely; JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one choice cost."""

    tokens: int
    figures: RequestStats


@dataclass(frozen=True, slots=True)
class Tally:
    """What a request cost, all choices together."""

    prompt_tokens: int
    """Each prompt once, however many choices it has."""
    costs: tuple[Cost, ...]

    def so_far(self) -> dict[str, Any]:
        """OpenAI's ``usage`` while the answer is in the making."""
        answered = sum(cost.tokens for cost in self.costs)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self.prompt_tokens + answered,
        }

    def body(self) -> dict[str, Any]:
        """OpenAI's ``usage``, and how the answer was decoded."""
        drafted = sum(cost.figures.draft_tokens for cost in self.costs)
        accepted = sum(cost.figures.accepted_tokens for cost in self.costs)
        usage = self.so_far() | {
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
        }
        aurora = {
            "verify_steps": sum(cost.figures.verify_steps for cost in self.costs),
            "drafted": drafted,
            "accepted": accepted,
            "speculators": list(dict.fromkeys(v for cost in self.costs for v in cost.figures.speculators)),
        }
        return {"usage": usage, "aurora": aurora}


@dataclass(frozen=True, slots=True)
class Answer(ABC):
    """Builds the bodies of the answer to one request."""

    id: str
    model: str
    speller: Speller
    logprobs: bool
    """Whether the client asked for log-probabilities."""
    created: int = field(default_factory=lambda: int(time.time()))

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def whole(self, choices: Sequence[tuple[Piece, FinishReason]], tally: Tally) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        told = [self.choice(i, piece, finish) for i, (piece, finish) in enumerate(choices)]
        return self._body(self.kind, told) | tally.body()

    def usage(self, tally: Tally) -> dict[str, Any]:
        """The streamed chunk that carries usage."""
        return self._body(self.chunk_kind, []) | tally.body()

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The first streamed chunk of a choice, if it has one before its text."""

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One streamed chunk of a choice."""

    @abstractmethod
    def ending(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """The last streamed chunk of a choice."""

    @abstractmethod
    def choice(self, index: int, piece: Piece, finish: FinishReason) -> dict[str, Any]:
        """A whole choice."""

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class ChatAnswer(Answer):
    """Answers of ``POST /v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """The role."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The next words."""
        return self._delta(index, {"content": piece.text}, piece.tokens)

    def ending(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """The reason of the end."""
        return self._delta(index, {}, finish=finish)

    def choice(self, index: int, piece: Piece, finish: FinishReason) -> dict[str, Any]:
        """A message."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        logprobs = self._told(piece.tokens) if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _delta(
        self, index: int, delta: dict[str, str], tokens: Sequence[Token] = (), finish: FinishReason | None = None
    ) -> dict[str, Any]:
        logprobs = self._told(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._body(self.chunk_kind, [choice])

    def _told(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            self._scored(token.id, token.score.logprob)
            | {"top_logprobs": [self._scored(other, logprob) for other, logprob in token.score.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.speller.spell(token)
        text = _escaped(spelled.bytes or b"") if spelled.text is None else spelled.text
        raw = None if spelled.bytes is None else list(spelled.bytes)
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": raw}


class CompletionAnswer(Answer):
    """Answers of ``POST /v1/completions``."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def opening(self, index: int) -> None:
        """Text completions begin with their text."""

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The next words."""
        return self._body(self.chunk_kind, [self._choice(index, piece.text, piece.tokens, logprobs=bool(piece.tokens))])

    def ending(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """The reason of the end."""
        return self._body(self.chunk_kind, [self._choice(index, "", (), finish)])

    def choice(self, index: int, piece: Piece, finish: FinishReason) -> dict[str, Any]:
        """A text."""
        return self._choice(index, piece.text, piece.tokens, finish, logprobs=self.logprobs)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[Token],
        finish: FinishReason | None = None,
        *,
        logprobs: bool = False,
    ) -> dict[str, Any]:
        told = self._told(tokens) if logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def _told(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [max(token.score.logprob, _LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _alternatives(self, token: Token) -> dict[str, float]:
        """By their names, the likelier one first where two have the same; the token itself is always among them."""
        named: dict[str, float] = {}
        for other, logprob in (*token.score.top, (token.id, token.score.logprob)):
            named.setdefault(self._name(other), max(logprob, _LEAST_LOGPROB))
        return named

    def _name(self, token: int) -> str:
        spelled = self.speller.spell(token)
        return f"bytes:{_escaped(spelled.bytes or b'')}" if spelled.text is None else spelled.text


def _escaped(raw: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in raw)
