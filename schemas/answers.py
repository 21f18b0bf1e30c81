"""The answer record: a finished answer as token ids, which nodes exchange so that they draft from each other's answers.

One record is one Kafka message, all numbers little-endian::

    format          1 byte      1
    token width     1 byte      2 if every token is below 65,536, else 4
    prompt tokens   1 byte      how many of the tokens end the prompt, at most 8
    time            8 bytes     Unix time in microseconds at which the answer was finished
    line            2 bytes and text: the length of its UTF-8 form, and the text
    node            2 bytes and text
    request         2 bytes and text
    label           2 bytes and text; the length 65,535, and no text, for a request without a label
    tokens          the rest of the record, a multiple of the token width

A record holds neither text nor hidden states, but the target's tokenizer turns its tokens into the answer's text.

This module needs no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from schemas.settings.sections import SuffixScope

FORMAT = 1
PROMPT_TOKENS = 8
"""Maximum number of prompt tokens before an answer: the longest match that the suffix drafter looks for."""
MAX_TOKENS = 1 << 16
"""Maximum number of tokens of a record; of a longer answer the last ones."""
MAX_TEXT_BYTES = 1024
"""Maximum length of a text, such as a label of 256 characters."""

I32 = npt.NDArray[np.int32]

_HEAD = struct.Struct("<BBBq")
_LENGTH = struct.Struct("<H")
_NO_TEXT = 0xFFFF
_NARROW, _WIDE = 2, 4
_DTYPES = {_NARROW: "<u2", _WIDE: "<i4"}

MAX_RECORD_BYTES = _HEAD.size + 4 * (_LENGTH.size + MAX_TEXT_BYTES) + _WIDE * MAX_TOKENS


class AnswerError(ValueError):
    """An answer that cannot be encoded, or a record that cannot be decoded."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A finished answer."""

    line: str
    """Line of the node. Answers of another line may come from another target."""
    node: str
    request: str
    label: str | None
    time_us: int
    """Unix time in microseconds at which the answer was finished, by its node's clock."""
    prompt_tokens: int
    """Number of ``tokens`` that end the prompt."""
    tokens: I32
    """Last tokens of the prompt, and the answer."""


def is_shared(scope: SuffixScope, label: str | None) -> bool:
    """Return whether any other request may be drafted from an answer with this label."""
    return scope in ("node", "fleet") or (scope == "label" and label is not None)


def cut_answer(prompt: Sequence[int], output: Sequence[int]) -> tuple[int, I32]:
    """Return the number of prompt tokens of a record, and its tokens: the end of the prompt, and the answer."""
    kept = prompt[-PROMPT_TOKENS:]
    tokens = np.array([*kept, *output], np.int32)[-MAX_TOKENS:]
    return max(len(tokens) - len(output), 0), tokens


def encode(answer: Answer) -> bytes:
    """Return the record of an answer.

    Raises:
        AnswerError: a text is too long, or a number is out of range.
    """
    count = len(answer.tokens)
    if not answer.prompt_tokens <= count <= MAX_TOKENS:
        raise AnswerError(f"{answer.prompt_tokens} prompt tokens of {count}; the maximum is {MAX_TOKENS} tokens")
    if not 0 <= answer.prompt_tokens <= PROMPT_TOKENS:
        raise AnswerError(f"{answer.prompt_tokens} prompt tokens; the maximum is {PROMPT_TOKENS}")
    if count and answer.tokens.min() < 0:
        raise AnswerError("a token is negative")
    width = _NARROW if not count or answer.tokens.max() < 1 << 16 else _WIDE
    try:
        head = _HEAD.pack(FORMAT, width, answer.prompt_tokens, answer.time_us)
    except struct.error as error:
        raise AnswerError(f"time {answer.time_us}: {error}") from error
    texts = (_encode_text(text) for text in (answer.line, answer.node, answer.request, answer.label))
    return b"".join([head, *texts, answer.tokens.astype(_DTYPES[width]).tobytes()])


def decode(record: bytes) -> Answer:
    """Return the answer of a record.

    Raises:
        AnswerError: the record has another format, or is damaged.
    """
    try:
        form, width, prompt_tokens, time_us = _HEAD.unpack_from(record)
        if form != FORMAT or width not in _DTYPES:
            raise AnswerError(f"format {form} with tokens of {width} bytes; expected format {FORMAT}")
        position, texts = _HEAD.size, []
        for _ in range(4):
            text, position = _decode_text(record, position)
            texts.append(text)
        tokens = np.frombuffer(record, _DTYPES[width], offset=position).astype(np.int32)
    except (struct.error, ValueError) as error:
        raise AnswerError(f"{len(record)} bytes are no answer: {error}") from error
    line, node, request, label = texts
    if line is None or node is None or request is None:
        raise AnswerError("the record has no line, no node or no request")
    if prompt_tokens > min(len(tokens), PROMPT_TOKENS) or len(tokens) > MAX_TOKENS:
        raise AnswerError(f"{prompt_tokens} prompt tokens of {len(tokens)}")
    if len(tokens) and tokens.min() < 0:
        raise AnswerError("a token is negative")
    return Answer(line, node, request, label, time_us, prompt_tokens, tokens)


def _encode_text(text: str | None) -> bytes:
    if text is None:
        return _LENGTH.pack(_NO_TEXT)
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise AnswerError(f"{text!r}: {error}") from error
    if len(encoded) > MAX_TEXT_BYTES:
        raise AnswerError(f"{text[:40]!r}.. has {len(encoded)} bytes; the maximum is {MAX_TEXT_BYTES}")
    return _LENGTH.pack(len(encoded)) + encoded


def _decode_text(record: bytes, position: int) -> tuple[str | None, int]:
    """Return the text at a position, and the position after it."""
    (length,) = _LENGTH.unpack_from(record, position)
    start = position + _LENGTH.size
    if length == _NO_TEXT:
        return None, start
    end = start + length
    if length > MAX_TEXT_BYTES:
        raise AnswerError(f"a text of {length} bytes at byte {position}")
    return record[start:end].decode(), end
