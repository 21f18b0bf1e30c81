"""Rows of the Delta tables: what the stream processor writes, and the trainer, the promoter and people read.

bf16 numbers are stored as binary (Delta has no 16-bit float). Shapes: F = feature width (3H), k = teacher width.

How one chunk becomes training rows, for the request of ``schemas.trace.record`` (prompt ``a b c``, answer ``D E F
G``)::

    accepted   tokens     a  b  c  D  E  F      the committed tokens of the chunk, with one feature row each
               loss_mask  .  .  x  x  x  x      the teacher after consuming the token is known (never inside the prompt)
               next_token G                     the bonus of the last verify step: chosen, not yet consumed
    rejected   root D, branch E X               accepted_prefix 1: E was right, X was not
               root F, branch Y Z               accepted_prefix 0

A window never reaches beyond its chunk, so that a row depends on one Kafka record alone and re-delivery rebuilds it
byte for byte. The price is the one training row that spans two chunks of a long request.

A window without ``features`` is to be recomputed: the trainer runs the target over its tokens. It begins with the
request, at position 0 and with a mask that is false up to its chunk; one that begins later lost the tokens before, and
its features can be known no more.
"""

from __future__ import annotations

import pyarrow as pa

_TIME = pa.timestamp("us", tz="UTC")
_IDS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_DAY_US = 86_400_000_000
_LAST_DAY = 2_932_896

LINEAGE = [
    pa.field("topic", pa.string(), nullable=False),
    pa.field("partition", pa.int32(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("request", pa.string(), nullable=False),
    pa.field("chunk", pa.int32(), nullable=False),
    pa.field("node", pa.string(), nullable=False),
    pa.field("target", pa.string(), nullable=False),
    pa.field("line", pa.string(), nullable=False),
    pa.field("label", pa.string()),
    pa.field("speculator", pa.string(), nullable=False),
    pa.field("time", _TIME, nullable=False),
    pa.field("day", pa.date32(), nullable=False),
]
"""Columns that every row carries: where it came from, and which version was drafting (the last one of the chunk).

``time`` is the node's, ``day`` the UTC day of the Kafka record's time: the clock of a node moves no row.
"""

ACCEPTED = pa.schema(
    [
        *LINEAGE,
        pa.field("position", pa.int32(), nullable=False),
        pa.field("tokens", _IDS, nullable=False),
        pa.field("next_token", pa.int32()),
        pa.field("features", pa.binary(), nullable=False),
        pa.field("feature_width", pa.int32(), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("top_k", pa.int32(), nullable=False),
        pa.field("teacher_ids", _IDS, nullable=False),
        pa.field("teacher_logprobs", _FLOATS, nullable=False),
    ]
)
"""One window of committed tokens a row. ``features`` is bf16 [n, F], or empty; ``teacher_*`` are [masked tokens, k], in
order."""

REJECTED = pa.schema(
    [
        *LINEAGE,
        pa.field("verify_step", pa.int32(), nullable=False),
        pa.field("root_position", pa.int32(), nullable=False),
        pa.field("context", _IDS, nullable=False),
        pa.field("branch", _IDS, nullable=False),
        pa.field("accepted_prefix", pa.int32(), nullable=False),
        pa.field("draft_logprobs", _FLOATS, nullable=False),
        pa.field("top_k", pa.int32(), nullable=False),
        pa.field("teacher_ids", _IDS, nullable=False),
        pa.field("teacher_logprobs", _FLOATS, nullable=False),
    ]
)
"""One rejected branch a row, from the root's child to the leaf.

``context`` ends with the root. ``teacher_*`` are [len(branch), k]: the target after consuming each branch token. What
the draft saw before the root are the features of the window in ``accepted`` that came in the same record; kept here as
well, those of the last token alone would double the size of the tables. ``draft_logprobs`` are NaN where the node did
not know them.
"""

TRACES = pa.schema(
    [
        *LINEAGE,
        pa.field("last_chunk", pa.bool_(), nullable=False),
        pa.field("finish", pa.string()),
        pa.field("temperature", pa.float32(), nullable=False),
        pa.field("top_p", pa.float32(), nullable=False),
        pa.field("sampling_top_k", pa.int32(), nullable=False),
        pa.field("seed", pa.int64()),
        pa.field("verify_step", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("tokens", _IDS, nullable=False),
        pa.field("draft_tokens", _IDS, nullable=False),
        pa.field("draft_parents", pa.list_(pa.int16()), nullable=False),
        pa.field("draft_logprobs", _FLOATS, nullable=False),
        pa.field("accepted", pa.list_(pa.int16()), nullable=False),
        pa.field("bonus", pa.int32()),
        pa.field("top_k", pa.int32(), nullable=False),
        pa.field("top_ids", _IDS, nullable=False),
        pa.field("top_logprobs", _FLOATS, nullable=False),
        pa.field("draft_us", pa.int32(), nullable=False),
        pa.field("verify_us", pa.int32(), nullable=False),
    ]
)
"""One verify step a row, without features. Here ``speculator`` and ``time`` are those of the verify step."""

DEAD_LETTERS = pa.schema(
    [
        pa.field("topic", pa.string(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("time", _TIME, nullable=False),
        pa.field("day", pa.date32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("rows", pa.int32()),
        pa.field("size", pa.int64()),
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("headers", pa.list_(pa.struct([pa.field("name", pa.string()), pa.field("value", pa.binary())]))),
    ]
)
"""One record that could not be used, byte for byte. ``rows`` is what its header claims; null where unreadable. ``size``
is the bytes of its value, so that a list need not read them."""

PROMOTIONS = pa.schema(
    [
        pa.field("time", _TIME, nullable=False),
        pa.field("line", pa.string(), nullable=False),
        pa.field("alias", pa.string(), nullable=False),
        pa.field("from_version", pa.string()),
        pa.field("to_version", pa.string()),
        pa.field("actor", pa.string(), nullable=False),
        pa.field("why", pa.string(), nullable=False),
        pa.field("figures", pa.string(), nullable=False),
    ]
)
"""One alias move a row; ``figures`` is JSON."""

INTENTS = pa.schema(
    [
        pa.field("time", _TIME, nullable=False),
        pa.field("line", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("intent", pa.string(), nullable=False),
        pa.field("note", pa.string()),
    ]
)
"""Moves of aliases as they are wanted: a row ``intended`` before the first alias is moved, and one ``done`` or
``abandoned`` behind it. ``intent`` is JSON of ``schemas.events.Intent``, ``note`` says why it was abandoned."""

REPLAYS = pa.schema(
    [
        pa.field("time", _TIME, nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("new_topic", pa.string(), nullable=False),
        pa.field("new_partition", pa.int32(), nullable=False),
        pa.field("new_offset", pa.int64(), nullable=False),
    ]
)
"""One dead letter that was published again a row: which one, and the record that it became."""

CURSORS = pa.schema(
    [
        pa.field("time", _TIME, nullable=False),
        pa.field("day", pa.date32(), nullable=False),
        pa.field("reader", pa.string(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
    ]
)
"""How far a reader has read one table: it needs the rows that later versions added. Its newest row counts."""

HOLDS = pa.schema(
    [
        pa.field("time", _TIME, nullable=False),
        pa.field("experiment", pa.string(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("after_version", pa.int64(), nullable=False),
        pa.field("up_to_version", pa.int64(), nullable=False),
        pa.field("released", pa.bool_(), nullable=False),
    ]
)
"""Versions of a table that an experiment was named on: what they added, and the states from the first one on, stay
until it is released, however long that is. The newest row of an experiment and a table counts."""

TABLES = {
    "accepted": ACCEPTED,
    "rejected": REJECTED,
    "traces": TRACES,
    "dead_letters": DEAD_LETTERS,
    "promotions": PROMOTIONS,
    "intents": INTENTS,
    "replays": REPLAYS,
    "cursors": CURSORS,
    "holds": HOLDS,
}

PARTITIONED_BY = {
    "accepted": ("line", "day"),
    "rejected": ("line", "day"),
    "traces": ("line", "day"),
    "dead_letters": ("day",),
    "promotions": (),
    "intents": (),
    "replays": (),
    "cursors": ("day",),
    "holds": (),
}
"""Columns by whose values the files of a table lie apart: a reader of one line opens no other's, and retention deletes
whole days without rewriting any."""


def day_of(time_us: int) -> int:
    """UTC day of a Unix time in microseconds, as days since 1970-01-01: a value for a ``day`` column.

    A time outside the years 1970 to 9999, which a folder for its day could not name, counts as the nearest one inside.
    """
    return min(max(time_us // _DAY_US, 0), _LAST_DAY)
