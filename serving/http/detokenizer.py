"""Detokenizer: turns the token ids of an answer into text deltas, with the tokens and log-probabilities of each."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers.convert_slow_tokenizer import bytes_to_unicode

from serving.engines.base import TokenLogprobs
from serving.http.tool_calls import ToolCall

_INCOMPLETE = "\ufffd"
_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
"""Bytes as byte-level vocabularies write them."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as vocabularies with byte fallback write it."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that serving uses."""

    def __len__(self) -> int:
        """Return the size of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the target expects at its start."""

    chat_template: Any
    """None for a target without one."""
    eos_token_id: Any
    """None for a tokenizer without one."""

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool, return_dict: bool, **variables: Any
    ) -> Any:
        """Return the token ids of a conversation; ``variables`` are the template's."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any:
        """Return the text of token ids."""

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """Return a token as the vocabulary writes it."""


class Detokenizer:
    """Returns the text of a growing answer; never a part of a character.

    The text of a token depends on its neighbors. So every call decodes the ids since the last clean cut twice, without
    and with the new ones, and returns the difference.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        """Begin a text.

        Args:
            tokenizer: Decodes the ids.
            before: Ids that precede the text; their own text is not returned.
            skip_special_tokens: Whether special tokens have no text.
        """
        self._tokenizer, self._skips_special = tokenizer, skip_special_tokens
        self._ids: list[int] = list(before)
        self._cut = 0
        self._decoded = len(self._ids)

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that the new ids complete; empty while a character is incomplete."""
        self._ids.extend(ids)
        return self._advance(final=False)

    def finish(self) -> str:
        """Return the remaining text; an incomplete character becomes U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._cut : self._decoded])
        after = self._decode(self._ids[self._cut :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return ""
        self._cut, self._decoded = self._decoded, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=self._skips_special, clean_up_tokenization_spaces=False
        )
        return text


class StopScanner:
    """Cuts a text at the first stop string; keeps back an end that may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._kept = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return the text that can be shown now; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._kept + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._kept = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._kept = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text that was kept back."""
        kept, self._kept = self._kept, ""
        return kept


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One token of the answer with its log-probabilities."""

    id: int
    offset: int
    """Characters of the answer before the token's text."""
    score: TokenLogprobs | None
    """None for the first token of an echoed prompt, which the target does not predict."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next part of an answer; without log-probabilities it has no tokens."""

    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.calls)


def join_deltas(deltas: Sequence[TextDelta]) -> TextDelta:
    """Return all deltas as one."""
    return TextDelta(
        "".join(d.text for d in deltas),
        tuple(token for d in deltas for token in d.tokens),
        tuple(call for d in deltas for call in d.calls),
    )


@dataclass(frozen=True, slots=True)
class _TokenGroup:
    """Tokens that together give the characters from ``start`` to ``end``."""

    tokens: tuple[ScoredToken, ...]
    start: int
    end: int


class AnswerText:
    """Turns the tokens of an answer into deltas, up to the first stop string.

    A token is reported once its text is shown, and never when a stop string cuts that text away. A token without text
    of its own (a part of a character, a special token) is reported with the next text, or with the end.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int = 0) -> None:
        """Begin an answer; stop strings count in the text after its first ``min_tokens`` tokens."""
        self._detokenizer = detokenizer
        self._min_tokens = min_tokens
        self._scanner = StopScanner(stops)
        self._has_stops = bool(stops)
        self._open: list[ScoredToken] = []
        self._unshown: deque[_TokenGroup] = deque()
        self._read = self._shown = 0
        self.count = 0
        """Tokens of the answer, up to the one that completes a stop string."""

    @property
    def stopped(self) -> bool:
        """True after a stop string."""
        return self._scanner.stopped

    def feed(self, tokens: Sequence[int], scores: Sequence[TokenLogprobs] = ()) -> TextDelta:
        """Return the delta after the next tokens; ``scores`` has one entry per token, or none."""
        deltas = []
        for ids, scored in self._split(tokens, scores):
            if self.stopped:
                break
            self.count += len(ids)
            self._open += [ScoredToken(token, self._read, score) for token, score in zip(ids, scored, strict=False)]
            deltas.append(self._show(self._detokenizer.feed(ids)))
        return join_deltas(deltas)

    def end_with(self, token: int, scores: Sequence[TokenLogprobs] = ()) -> None:
        """Count the token that ended the answer: an end token or a stop token, which has no text."""
        if not self.stopped:
            self.count += 1
            self._open += [ScoredToken(token, self._read, score) for score in scores]

    def finish(self) -> TextDelta:
        """Return the last delta of the answer."""
        if self.stopped:
            return TextDelta()
        delta = self._show(self._detokenizer.finish())
        if self.stopped:
            return delta
        rest = self._scanner.finish()
        self._shown += len(rest)
        tokens = [token for group in self._unshown for token in group.tokens] + self._open
        return join_deltas([delta, TextDelta(rest, tuple(tokens))])

    def _split(
        self, tokens: Sequence[int], scores: Sequence[TokenLogprobs]
    ) -> Iterator[tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]]:
        """Yield tokens one by one where each one's own text matters, else all together."""
        if scores:
            return (((token,), (score,)) for token, score in zip(tokens, scores, strict=True))
        if self._has_stops:
            return (((token,), ()) for token in tokens)
        return iter([(tuple(tokens), ())])

    def _show(self, text: str) -> TextDelta:
        if not text:
            return TextDelta()
        self._unshown.append(_TokenGroup(tuple(self._open), self._read, self._read + len(text)))
        self._open, self._read = [], self._read + len(text)
        shown = self._scanner.feed(text) if self.count > self._min_tokens else text
        self._shown += len(shown)
        return TextDelta(shown, self._take_shown())

    def _take_shown(self) -> tuple[ScoredToken, ...]:
        """Return the tokens whose text is shown; after a stop string also the tokens that it cuts in the middle."""
        tokens: list[ScoredToken] = []
        while self._unshown and (
            self._unshown[0].end <= self._shown or (self.stopped and self._unshown[0].start < self._shown)
        ):
            tokens += self._unshown.popleft().tokens
        return tuple(tokens)


@dataclass(frozen=True, slots=True)
class TokenSpelling:
    """A single token as log-probabilities show it."""

    text: str | None
    """None where the token holds a part of a character."""
    bytes: bytes | None
    """Its share of the answer's UTF-8; None for a special token, which has no text."""


class TokenSpeller:
    """Spells single tokens, and caches them: an answer repeats the same few thousand."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, TokenSpelling] = {}

    def spell(self, token: int) -> TokenSpelling:
        """Return text and bytes of one token."""
        if token not in self._cache:
            self._cache[token] = self._spell(token)
        return self._cache[token]

    def _spell(self, token: int) -> TokenSpelling:
        # Some decoders drop the space before the first word, so a token's text is the part that it adds to another one.
        once, twice = (self._decode([token] * n, special=True) for n in (1, 2))
        text = twice[len(once) :]
        if once and not self._decode([token], special=False):
            return TokenSpelling(text, None)
        if _INCOMPLETE in once:
            raw = _raw_bytes(self._tokenizer.convert_ids_to_tokens(token))
            if raw is not None:
                return TokenSpelling(_as_text(raw), raw)
        return TokenSpelling(text, text.encode())

    def _decode(self, ids: list[int], *, special: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text


def _raw_bytes(piece: str) -> bytes | None:
    """Return the bytes of an entry that is no whole text; None where the vocabulary has no known notation of bytes."""
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    if all(char in _BYTE_OF for char in piece):
        return bytes(_BYTE_OF[char] for char in piece)
    return None


def _as_text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop`` without completing it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
