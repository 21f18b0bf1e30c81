"""From token ids to the text that a client sees, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers.convert_slow_tokenizer import bytes_to_unicode

_INCOMPLETE = "\ufffd"
_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
"""Bytes as byte-level vocabularies write them."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as vocabularies with byte fallback write it."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that serving uses."""

    def __len__(self) -> int:
        """Size of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the target wants at its beginning."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, return_dict: bool
    ) -> Any:
        """Token ids of a conversation."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any:
        """Text of token ids."""

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """A token as the vocabulary writes it."""


class Detokenizer:
    """Text of a growing answer; never gives a part of a character.

    A tokenizer's text for an id depends on its neighbours, so every step decodes the ids since the last clean cut
    twice, without and with the new ones, and gives the difference. Special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """``before`` are ids that the answer's text goes on from; their own text is not given."""
        self._tokenizer = tokenizer
        self._ids: list[int] = list(before)
        self._cut = 0
        self._given = len(self._ids)

    def feed(self, ids: Sequence[int]) -> str:
        """The text that the new ids complete; empty while a character is in the making."""
        self._ids.extend(ids)
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left when no more ids come; an unfinished character becomes U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._cut : self._given])
        after = self._decode(self._ids[self._cut :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return ""
        self._cut, self._given = self._given, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopScanner:
    """Cuts a text at the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that can be shown now; after a stop string nothing more."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held out, when no more text comes."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class Spelled:
    """A single token as log-probabilities show it."""

    text: str | None
    """None where the token holds a part of a character."""
    bytes: bytes | None
    """Its share of the answer's UTF-8; None for a special token, which gives no text."""


class Speller:
    """Spells single tokens; remembers them, as the same few thousand come again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, Spelled] = {}

    def spell(self, token: int) -> Spelled:
        """Text and bytes of one token."""
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> Spelled:
        # Some decoders drop the space before the first word, so a token's text is what it adds to another one.
        once, twice = (self._decode([token] * n, special=True) for n in (1, 2))
        text = twice[len(once) :]
        if once and not self._decode([token], special=False):
            return Spelled(text, None)
        if _INCOMPLETE in once:
            raw = _raw_bytes(self._tokenizer.convert_ids_to_tokens(token))
            if raw is not None:
                return Spelled(_as_text(raw), raw)
        return Spelled(text, text.encode())

    def _decode(self, ids: list[int], *, special: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text


def _raw_bytes(piece: str) -> bytes | None:
    """Bytes of a vocabulary's entry that is no whole text; None where the vocabulary writes bytes in no known way."""
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
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
