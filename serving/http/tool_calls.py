"""Tool calls in an answer's text: their formats, and a parser of streamed text.

A call is reported when it is complete, because an incomplete one may turn out to be plain text.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_BEGIN, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call of a function."""

    name: str
    arguments: str
    """JSON text of an object."""
    index: int
    """Number of the call in its answer."""
    id: str


class Parsed(NamedTuple):
    """What a parser has found: the text around calls, and calls."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass
class ToolCallParser(ABC):
    """Separates calls from the text around them, whatever parts the text arrives in.

    A call that is no JSON object with a name and arguments stays text. White space next to calls belongs to neither.
    """

    parallel: bool = True
    """Whether an answer may have several calls; otherwise further ones are left out, as vLLM does."""
    count: int = field(default=0, init=False)
    """Calls of the answer so far."""
    _unread: str = field(default="", init=False)
    _space: str = field(default="", init=False)
    """White space that is text only if text follows."""
    _is_after_call: bool = field(default=False, init=False)

    def feed(self, text: str, *, final: bool = False) -> Parsed:
        """Return what the next part of an answer completes; the rest with the last one."""
        self._unread += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        for found in self._read(final=final):
            if isinstance(found, str):
                shown.append(self._show(found))
            else:
                self._space, self._is_after_call = "", True
                if self.parallel or not self.count:
                    calls.append(ToolCall(*found, self.count, f"call_{secrets.token_hex(12)}"))
                    self.count += 1
        if final and not self._is_after_call:
            shown.append(self._space)
            self._space = ""
        return Parsed("".join(shown), tuple(calls))

    @abstractmethod
    def _read(self, *, final: bool) -> list[str | tuple[str, str]]:
        """Take complete parts from ``_unread``: texts, and calls as name and arguments."""

    def _show(self, text: str) -> str:
        """Return a text with the white space before it, without that after it."""
        content = text.rstrip()
        if not content:
            self._space += text
            return ""
        space, self._space, self._is_after_call = self._space, text[len(content) :], False
        return space + content


@dataclass
class HermesParser(ToolCallParser):
    """Reads ``<tool_call>{"name": .., "arguments": ..}</tool_call>``, of Hermes, Qwen 2.5 and Qwen 3."""

    def _read(self, *, final: bool) -> list[str | tuple[str, str]]:
        found: list[str | tuple[str, str]] = []
        while True:
            before, begin, rest = self._unread.partition(_BEGIN)
            if not begin:
                kept = 0 if final else _overlap(before, _BEGIN)
                found.append(before[: len(before) - kept])
                self._unread = before[len(before) - kept :]
                return found
            body, end, after = rest.partition(_END)
            found.append(before)
            if not end and not final:
                self._unread = begin + rest
                return found
            try:
                found.append(_as_call(_DECODER.decode(body)))
            except (ValueError, RecursionError):
                found.append(begin + body + end)
            self._unread = after


@dataclass
class LlamaParser(ToolCallParser):
    """Reads answers that begin with calls, ``{"name": .., "parameters": ..}`` separated by semicolons: Llama 3."""

    _is_text: bool = field(default=False, init=False)
    """Whether the rest is text."""

    def _read(self, *, final: bool) -> list[str | tuple[str, str]]:
        found: list[str | tuple[str, str]] = []
        while not self._is_text:
            text = self._unread.lstrip("; \n\t\r" if self.count or found else None)
            if not text.startswith("{"):
                self._is_text = bool(text)
                break
            try:
                value, end = _DECODER.raw_decode(text)
                found.append(_as_call(value))
            except (ValueError, RecursionError):
                if not final:
                    return found
                self._is_text = True
            else:
                self._unread = text[end:]
        if self._is_text or (final and not (self.count or found)):
            found.append(self._unread)
            self._unread = ""
        return found


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def _as_call(value: Any) -> tuple[str, str]:
    """Return name and arguments of a call.

    Raises:
        ValueError: the value is not a call, or half of a surrogate pair is in it.
    """
    fields = value if isinstance(value, dict) else {}
    name, arguments = fields.get("name"), fields.get("arguments", fields.get("parameters"))
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        raise ValueError("a call has a name and an object of arguments")  # noqa: TRY004 - of parsed text
    text = json.dumps(arguments, ensure_ascii=False)
    (name + text).encode()
    return name, text


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
