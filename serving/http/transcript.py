"""What a client is told of an answer: its text, and with each piece of it the tokens that the piece is made of.

A token is told once the text that it gives is shown, and never when a stop string has cut that text away. Tokens that
give no text of their own (a part of a character, a special token) are told with the next text or with the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serving.engines.base import TokenLogprobs
from serving.http.detokenizer import Detokenizer, StopScanner


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer with its log-probabilities."""

    id: int
    offset: int
    """Characters of the answer before the token's text."""
    score: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of an answer; without log-probabilities there are no tokens in it."""

    text: str = ""
    tokens: tuple[Token, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces as one."""
    return Piece("".join(p.text for p in pieces), tuple(token for p in pieces for token in p.tokens))


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens that together give the characters from ``start`` to ``end``."""

    tokens: tuple[Token, ...]
    start: int
    end: int


class Transcript:
    """Turns an answer's tokens into pieces, up to the first stop string."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops)
        self._singly = bool(stops)
        self._open: list[Token] = []
        self._unshown: deque[_Span] = deque()
        self._read = self._shown = 0
        self.count = 0
        """Tokens of the answer, up to the one that completes a stop string."""

    @property
    def stopped(self) -> bool:
        """True after a stop string."""
        return self._scanner.stopped

    def feed(self, tokens: Sequence[int], scores: Sequence[TokenLogprobs] = ()) -> Piece:
        """What can be shown after the next tokens; ``scores`` are theirs, or empty.

        Tokens are read one by one where it matters which of them gave which text.
        """
        pieces = []
        for step, scored in self._steps(tokens, scores):
            if self.stopped:
                break
            self.count += len(step)
            self._open += [Token(token, self._read, score) for token, score in zip(step, scored, strict=False)]
            pieces.append(self._show(self._detokenizer.feed(step)))
        return joined(pieces)

    def finish(self) -> Piece:
        """What is left when no more tokens come."""
        if self.stopped:
            return Piece()
        piece = self._show(self._detokenizer.finish())
        if self.stopped:
            return piece
        rest = self._scanner.finish()
        self._shown += len(rest)
        tokens = [token for span in self._unshown for token in span.tokens] + self._open
        return joined([piece, Piece(rest, tuple(tokens))])

    def _steps(
        self, tokens: Sequence[int], scores: Sequence[TokenLogprobs]
    ) -> Iterator[tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]]:
        if scores:
            return (((token,), (score,)) for token, score in zip(tokens, scores, strict=True))
        if self._singly:
            return (((token,), ()) for token in tokens)
        return iter([(tuple(tokens), ())])

    def _show(self, text: str) -> Piece:
        if not text:
            return Piece()
        self._unshown.append(_Span(tuple(self._open), self._read, self._read + len(text)))
        self._open, self._read = [], self._read + len(text)
        shown = self._scanner.feed(text)
        self._shown += len(shown)
        return Piece(shown, self._told())

    def _told(self) -> tuple[Token, ...]:
        """Tokens whose text is shown; with a stop string, also those that are cut in the middle."""
        told: list[Token] = []
        while self._unshown and (
            self._unshown[0].end <= self._shown or (self.stopped and self._unshown[0].start < self._shown)
        ):
            told += self._unshown.popleft().tokens
        return tuple(told)
