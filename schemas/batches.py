"""Schemas of the Delta tables, which the stream worker writes and trainer, promoter and people read.

bf16 numbers are stored as binary, because Delta has no 16-bit float. Shapes: F = feature width (3H), k = teacher width.

Training rows of one chunk, for the request of ``schemas.trace.record`` (prompt ``a b c``, output ``D E F G``)::

    accepted   tokens     a  b  c  D  E  F      the committed tokens of the chunk, with one feature row each
               loss_mask  .  .  x  x  x  x      x: the teacher after this token is known (never inside the prompt)
               next_token G                     the bonus token of the last step: chosen, not yet consumed
    rejected   root D, branch E X               accepted_prefix 1: E was accepted, X was not
               root F, branch Y Z               accepted_prefix 0

A row never extends beyond its chunk. It therefore depends on one Kafka record only, and redelivery rebuilds it byte for
byte. The trainer joins the rows of a request (``trainer.data.table_reader``).

The trainer recomputes the features of an ``accepted`` row without ``features`` by running the target over its tokens.
Such a row starts at position 0, with a mask that is false up to its chunk. If it starts later, the preceding tokens are
lost and its features cannot be recomputed.
"""

from __future__ import annotations

import pyarrow as pa

_TIME = pa.timestamp("us", tz="UTC")
_IDS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_SOURCES = pa.list_(pa.int8())
"""``schemas.trace.record.DraftSource`` of draft tokens."""
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
"""Columns of every row: its Kafka record, its request, and the version that served it (the last one of the chunk).

``topic`` is the topic's name, with ``@2`` for its second log: after it was deleted and created anew, its offsets began
again. ``time`` is the node's time. ``day`` is the UTC day of the Kafka record's timestamp, so a node's clock cannot
move a row to another partition.
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
        pa.field("last_chunk", pa.bool_()),
        pa.field("temperature", pa.float32()),
        pa.field("top_p", pa.float32()),
        pa.field("sampling_top_k", pa.int32()),
        pa.field("prompt_key", pa.string()),
    ]
)
"""One chunk of committed tokens per row. ``features`` is bf16 [n, F], or empty; ``teacher_*`` are [masked tokens, k],
in order, before temperature. Temperature 0 is greedy. ``last_chunk`` and the sampling parameters are null in rows of
older stream workers, ``prompt_key`` in rows of older nodes."""

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
        pa.field("draft_sources", _SOURCES),
    ]
)
"""One rejected branch per row, from the root's child to the leaf.

``context`` ends with the root. ``teacher_*`` are [len(branch), k]: the target's distribution after each branch token.
The features before the root are in the ``accepted`` row of the same Kafka record; storing even the last token's
features here would double the size of the tables. ``draft_logprobs`` are NaN if the node does not know them.
``draft_sources`` is null if the version proposed all draft tokens of the verify step.
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
        pa.field("draft_sources", _SOURCES),
        pa.field("start_time", _TIME),
        pa.field("active_since", _TIME),
    ]
)
"""One verify step per row, without features. ``speculator`` and ``time`` are the step's own. A step without draft
tokens names the active version, and one whose draft tokens are all of other sources names none. ``draft_sources`` is
null if ``speculator`` proposed all draft tokens. ``start_time`` and ``active_since`` are null in rows of older nodes:
the time of the request's first row, and the time at which the node swapped ``speculator`` in."""

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
"""One dead letter per row: a record that could not be used, byte for byte. ``rows`` is the number that its header
announces; null if unreadable. ``size`` is the size of its value in bytes, so that a list need not read the values."""

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
"""One alias move per row; ``figures`` is JSON."""

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
"""Intended alias moves: a row ``intended`` before the first alias is moved, and a row ``done`` or ``abandoned`` after
the last. ``intent`` is JSON of ``schemas.events.AliasIntent``, ``note`` says why the move was abandoned."""

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
"""One replayed dead letter per row: its source record, and the record that it was published as."""

CURSORS = pa.schema(
    [
        pa.field("time", _TIME, nullable=False),
        pa.field("day", pa.date32(), nullable=False),
        pa.field("reader", pa.string(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
    ]
)
"""Progress of a reader in one table: it still needs the rows added after ``version``. The newest row counts."""

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
"""Retention holds: versions of a table that an experiment needs. The rows that they added, and the table states from
the first of them on, are kept until the hold is released. The newest row of an experiment and a table counts."""

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
"""Partition columns. A reader of one line opens no files of another, and retention deletes whole days without rewriting
files."""


def day_of(time_us: int) -> int:
    """Return the UTC day of a Unix time in microseconds, as days since 1970-01-01: the value of a ``day`` column.

    The day is clamped to the years 1970 to 9999, the range of partition folders.
    """
    return min(max(time_us // _DAY_US, 0), _LAST_DAY)
