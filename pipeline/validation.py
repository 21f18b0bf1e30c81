"""What the codec cannot see in a record, and what the tables cannot hold.

The codec refuses what contradicts itself in a single row. Here headers are held against the envelope, verify steps
against
their neighbours, and numbers against what they may be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from schemas.trace import record
from schemas.trace.decoder import Array, Bools, Check, Ints, Lists, Opened, VerifySteps
from schemas.trace.record import INT32_MAX, TraceError

LINE = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""Lines name folders of the tables: an empty name is a null there, and a long one no file system takes."""

TIME_END_US = 253_402_300_800_000_000
"""The year 10000: readers of the tables know no later time."""

_INFINITE = 0xFF00
"""A bf16 number without its sign, moved to the left by one bit, is infinite or not a number from here on."""
_AT_ONCE = 1 << 17
"""Numbers that are looked at together: few enough to stay in the processor's cache."""

Header = Callable[[str], str | None]
"""Text of a header; None where there is none."""


def check_announced(header: Header) -> None:
    """Refuse what its headers say this worker cannot read.

    Raises:
        TraceError: another schema or content.
    """
    schema, content = header("schema"), header("content-type")
    if schema not in record.readable():
        raise TraceError(
            "foreign_schema", f"header schema is {schema!r}, this worker reads {sorted(record.readable())}"
        )
    if content != record.CONTENT_TYPE:
        raise TraceError("foreign_content", f"header content-type is {content!r}, expected {record.CONTENT_TYPE!r}")


def check_envelope(chunk: Opened, header: Header) -> None:
    """Refuse an envelope that its headers contradict, or that no row can hold.

    Headers beside the number of rows may be missing: they announce, the envelope decides.

    Raises:
        TraceError: with the reason.
    """
    envelope, rows = chunk.envelope, chunk.rows.num_rows
    if header("rows") != str(rows):
        raise TraceError("wrong_count", f"header rows is {header('rows')!r}, the chunk has {rows} verify steps")
    for name, found in (("target", envelope.target), ("node", envelope.node)):
        if header(name) not in (None, found):
            raise TraceError("header_mismatch", f"header {name} is {header(name)!r}, the envelope says {found!r}")
    if not LINE.fullmatch(envelope.line):
        raise TraceError("bad_line", f"line is {envelope.line[:200]!r}, expected {LINE.pattern}")
    numbers = ("chunk", "feature_width", "top_k", "sampling_top_k", "vocabulary")
    too_large = [name for name in numbers if (getattr(envelope, name) or 0) > INT32_MAX]
    if envelope.seed is not None and not -(2**63) <= envelope.seed < 2**63:
        too_large.append("seed")
    if chunk.rows.get_total_buffer_size() > INT32_MAX:
        too_large.append("features")
    if too_large:
        raise TraceError("too_large", f"does not fit into its column: {', '.join(too_large)}")
    if not (math.isfinite(envelope.temperature) and math.isfinite(envelope.top_p)):
        raise TraceError("bad_number", f"temperature {envelope.temperature}, top_p {envelope.top_p}")
    if envelope.before and max(envelope.before) >= (envelope.vocabulary or 2**31):
        raise TraceError(
            "bad_token", f"token id {max(envelope.before)} in before, the vocabulary ends at {envelope.vocabulary}"
        )


def unsound(verify_steps: VerifySteps, features: Lists) -> dict[int, TraceError]:
    """Why chunks of well-formed rows cannot be used, by their number; empty where all are sound.

    Args:
        verify steps: Of many chunks.
        features: [rows] the bf16 bit patterns of each row's tokens.
    """
    of_verify_steps = [*_plainly_wrong(verify_steps), *_tokens(verify_steps), *_numbers(verify_steps, features)]
    return verify_steps.first_faults([_order(verify_steps)]) | verify_steps.first_faults(of_verify_steps)


def _plainly_wrong(verify_steps: VerifySteps) -> Iterator[Check]:
    where, drafted = verify_steps.where, verify_steps.draft_tokens.lengths
    yield Check(
        (verify_steps.number < 0) | (verify_steps.position < 0),
        "contradiction",
        lambda row: f"{where(row)} at position {verify_steps.position[row]}",
    )
    yield Check(
        (verify_steps.number == 0) & (drafted > 0),
        "contradiction",
        lambda row: f"{where(row)}: the prompt has no draft, found {drafted[row]} tokens",
    )
    yield Check(
        (verify_steps.time < 0) | (verify_steps.time >= TIME_END_US),
        "bad_number",
        lambda row: f"{where(row)}: time {verify_steps.time[row]} us, expected one before the year 10000",
    )
    yield Check(
        (verify_steps.number > 0) & ~verify_steps.has_bonus,
        "contradiction",
        lambda row: f"{where(row)}: no bonus, although only the inside of a prompt has none",
    )


def _tokens(verify_steps: VerifySteps) -> Iterator[Check]:
    """Token ids that no token has."""
    ends = verify_steps.of_row([envelope.vocabulary or 2**31 for envelope in verify_steps.envelopes])
    lowest = int(ends.min(initial=2**31))

    def outside(ids: Array, end: Ints) -> Bools:
        return (ids < 0) | (ids >= end)

    def check(name: str, bad: Bools, ids: Callable[[int], list[int]]) -> Check:
        def detail(row: int) -> str:
            wrong = next(token for token in ids(row) if not 0 <= token < ends[row])
            return f"{verify_steps.where(row)}: token id {wrong} in {name}, expected 0 to {ends[row] - 1}"

        return Check(bad, "bad_token", detail)

    for name in ("tokens", "draft_tokens", "top_ids"):
        lists: Lists = getattr(verify_steps, name)
        ids = lists.entries
        if len(ids) and (ids.min() < 0 or ids.max() >= lowest):
            yield check(name, lists.any(outside(ids, ends[lists.rows])), lists.of)
    yield check("bonus", outside(verify_steps.bonus, ends), lambda row: [int(verify_steps.bonus[row])])


def _numbers(verify_steps: VerifySteps, features: Lists) -> Iterator[Check]:
    """Numbers that are none. Features are most of a chunk: they are looked at piece by piece."""
    bits = features.entries
    infinite = [
        at + np.flatnonzero(piece >= _INFINITE)
        for at in range(0, len(bits), _AT_ONCE)
        if (piece := bits[at : at + _AT_ONCE] << 1).max() >= _INFINITE
    ]
    if infinite:
        bad = np.zeros(len(bits), np.bool_)
        bad[np.concatenate(infinite)] = True
        yield Check(
            features.any(bad),
            "bad_number",
            lambda row: f"{verify_steps.where(row)}: a feature is infinite or not a number",
        )
    yield Check(
        verify_steps.draft_logprobs.any(np.isinf(verify_steps.draft_logprobs.entries))  # not a number: not known
        | verify_steps.top_logprobs.any(~np.isfinite(verify_steps.top_logprobs.entries)),
        "bad_number",
        lambda row: f"{verify_steps.where(row)}: a log-probability is infinite, or the target's is not a number",
    )


def _order(verify_steps: VerifySteps) -> Check:
    """Verify steps of a chunk follow each other: the token that one chose is the first that the next one consumed."""
    number, n = verify_steps.number, verify_steps.tokens.lengths
    root = verify_steps.tokens.values[verify_steps.tokens.starts]
    in_chunk = verify_steps.chunk[1:] == verify_steps.chunk[:-1]
    same_prompt = (number[:-1] == 0) & (number[1:] == 0) & ~verify_steps.has_bonus[:-1]
    next_verify_step = (
        (number[1:] == number[:-1] + 1) & verify_steps.has_bonus[:-1] & (verify_steps.bonus[:-1] == root[1:])
    )
    joined = verify_steps.position[1:] == verify_steps.position[:-1] + n[:-1]
    bad = np.zeros(len(verify_steps), np.bool_)
    bad[1:] = in_chunk & ~((same_prompt | next_verify_step) & joined)

    def detail(row: int) -> str:
        one = row - 1
        bonus = verify_steps.bonus[one] if verify_steps.has_bonus[one] else None
        return (
            f"verify step {number[row]} at position {verify_steps.position[row]} with root {root[row]} does not follow "
            f"verify step "
            f"{number[one]} at position {verify_steps.position[one]} with {n[one]} tokens and bonus {bonus}"
        )

    return Check(bad, "contradiction", detail)
