"""From token ids to the text that a client sees, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

_INCOMPLETE = "\ufffd"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that serving uses."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, return_dict: bool
    ) -> Any:
        """Token ids of a conversation."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any:
        """Text of token ids."""


class Detokenizer:
    """Text of a growing answer; never gives a part of a character.

    A tokenizer's text for an id depends on its neighbours, so every step decodes the ids since the last clean cut
    twice, without and with the new ones, and gives the difference. Special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._cut = 0
        self._given = 0

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
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
