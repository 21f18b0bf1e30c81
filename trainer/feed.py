"""What the trainer learns from next: a cursor over the tables, a held-back slice, and a ring of windows to replay.

Requests are split by a hash of their id: a held-back share is never trained on, and the newest of its windows are what
versions are compared on. Windows are trained on in the order of their time, mixed with earlier ones; a window is passed
over ``train.max_passes`` times at most, so a trainer without new traffic stops instead of learning a few requests by
heart. While windows wait, the table is not read: a slow trainer lags, it drops nothing.

Branches are joined to their window by the Kafka record that both came from. ``rejected`` is committed before
``accepted``, so reading it up to its newest version after the windows finds every branch of theirs; rows of records
whose windows are not committed yet are kept for the next read.

Maintenance deletes what nobody has asked for in a long time. A feed that comes so late passes over what is gone, and
counts it.

A window whose features did not travel gets them from the frozen target when it is first used, and keeps them.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import pyarrow as pa
import structlog
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.table import GoneError
from schemas.settings import Train
from trainer.rows import ACCEPTED_COLUMNS, REJECTED_COLUMNS, Row, has_beginning, has_root, is_likely, window_of
from trainer.windows import Window, cut

log = structlog.get_logger()

VERSIONS_PER_READ = 8
"""Commits read at once: bounds memory while a trainer catches up."""

Key = tuple[str, int, int, int]
"""Topic, partition, offset and number of the piece: names a window for good."""
States = Callable[[Tensor], Tensor]
"""Gives the target's captured states [n, F] in bf16 after each of the first n tokens of a request."""
_Record = tuple[str, int, int]
_Source = tuple[str, int]


class FeedError(RuntimeError):
    """The tables are not those that the cursor came from."""


class Tables(Protocol):
    """The reading half of the Delta log."""

    def version(self, name: str) -> int:
        """Newest version of a table."""

    def read_added(
        self, name: str, after_version: int, up_to_version: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows appended by the versions after one and up to another.

        Raises:
            GoneError: some of them can no longer be read.
        """

    def oldest(self, name: str) -> int:
        """The version after which all rows that were appended can be read."""


class FeedState(BaseModel):
    """Where a feed stands; with the tables it gives back the same windows in the same order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cursor: int
    rejected_cursor: int
    reread_after: int
    reread_rejected_after: int
    reached: list[_Record]
    fresh: list[Key]
    history: list[tuple[Key, int]]
    """With the passes made over each."""
    held_back: list[Key]
    random: tuple[int, tuple[int, ...], float | None]

    @property
    def needs(self) -> dict[str, int]:
        """By table, the version whose successors it takes to restore this."""
        return {"accepted": self.reread_after, "rejected": self.reread_rejected_after}


@dataclass(slots=True)
class _Entry:
    key: Key
    window: Window
    after: tuple[int, int]
    """Versions of ``accepted`` and ``rejected`` behind which all its rows lie."""
    passes: int = 0


class Feed:
    """Windows of one line and target, for training and for comparison."""

    def __init__(self, tables: Tables, settings: Train, target: str, line: str, states: States) -> None:
        self._tables = tables
        self._states = states
        self._settings = settings
        self._ours = {"target": target, "line": line}
        self._random = random.Random(settings.seed)  # noqa: S311
        self._fresh: deque[_Entry] = deque()
        self._history: deque[_Entry] = deque(maxlen=settings.history_windows)
        self._held_back: deque[_Entry] = deque(maxlen=settings.held_back_windows)
        self._waiting: list[Row] = []
        self._waiting_after = 0
        self._reached: dict[_Source, int] = {}
        self._rejected_cursor = 0
        self.cursor = 0
        self.table_version = 0
        self.counts: Counter[str] = Counter()
        """Rows and branches by what became of them."""

    @property
    def held_back(self) -> list[Window]:
        """The newest windows of requests that are not trained on, oldest first."""
        return [self._complete(entry) for entry in self._held_back]

    @property
    def tables_read(self) -> dict[str, int]:
        """Version of each table up to which rows were read."""
        return {"accepted": self.cursor, "rejected": self._rejected_cursor}

    def poll(self) -> None:
        """Read the next commits, unless enough windows wait to be trained on.

        Raises:
            TableError: the tables cannot be read; nothing was taken, and the next poll tries again.
            FeedError: the table is older than what was read from it.
        """
        self.table_version = self._tables.version("accepted")
        if self.table_version < self.cursor:
            raise FeedError(
                f"table accepted ends at version {self.table_version}, but was read up to {self.cursor}: "
                "tables.uri holds other tables than before; set another train.dir to begin anew"
            )
        if len(self._fresh) >= self._settings.windows_per_step:
            return
        up_to = min(self.table_version, self.cursor + VERSIONS_PER_READ)
        if up_to > self.cursor:
            for entry in self._read(up_to, self._tables.version("rejected")):
                (self._held_back if self._is_held_back(entry.window) else self._fresh).append(entry)

    def next(self) -> list[Window]:
        """Windows of the next step; empty while new ones and those that may be passed over again do not fill it."""
        size, replay = self._settings.windows_per_step, self._settings.replay_per_step
        rested = [entry for entry in self._history if entry.passes < self._settings.max_passes]
        if len(self._fresh) + len(rested) < size:
            return []
        new = min(len(self._fresh), max(size - min(replay, len(rested)), 1))
        replayed = self._random.sample(rested, size - new)
        fresh = [self._fresh.popleft() for _ in range(new)]
        self._history.extend(fresh)
        for entry in (chosen := fresh + replayed):
            entry.passes += 1
        return [self._complete(entry) for entry in chosen]

    def state(self) -> FeedState:
        """Where the feed stands now."""
        entries = [*self._fresh, *self._history, *self._held_back]
        version, internal, gauss = self._random.getstate()
        return FeedState(
            cursor=self.cursor,
            rejected_cursor=self._rejected_cursor,
            reread_after=min([self.cursor, *(e.after[0] for e in entries)]),
            reread_rejected_after=min([self._waiting_from, *(e.after[1] for e in entries)]),
            reached=[(*source, offset) for source, offset in self._reached.items()],
            fresh=[e.key for e in self._fresh],
            history=[(e.key, e.passes) for e in self._history],
            held_back=[e.key for e in self._held_back],
            random=(version, internal, gauss),
        )

    def restore(self, state: FeedState) -> None:
        """Stand where a feed of the same tables stood, by reading its windows again.

        Raises:
            TableError: the tables cannot be read.
        """
        self.cursor, self._rejected_cursor, self._waiting = state.reread_after, state.reread_rejected_after, []
        self._reached = {(topic, partition): offset for topic, partition, offset in state.reached}
        found = {entry.key: entry for entry in self._read(state.cursor, state.rejected_cursor)}
        passes = dict(state.history)
        for name, keys in (("_fresh", state.fresh), ("_history", passes), ("_held_back", state.held_back)):
            kept: deque[_Entry] = getattr(self, name)
            kept.clear()
            kept.extend(found[key] for key in keys if key in found)
            if len(kept) < len(keys):
                self.counts["gone"] += len(keys) - len(kept)
                log.warning("windows_gone", part=name.strip("_"), wanted=len(keys), found=len(kept))
        for entry in self._history:
            entry.passes = passes[entry.key]
        self._random.setstate(state.random)

    @property
    def _waiting_from(self) -> int:
        return self._waiting_after if self._waiting else self._rejected_cursor

    def _read(self, up_to: int, rejected_up_to: int) -> Iterator[_Entry]:
        """Windows of the accepted rows after the cursor that are still there; moves both cursors."""
        try:
            return self._read_whole(up_to, rejected_up_to)
        except GoneError as error:
            log.warning("versions_gone", why=str(error))
        oldest, oldest_rejected = self._tables.oldest("accepted"), self._tables.oldest("rejected")
        self.counts["versions_gone"] += max(0, oldest - self.cursor)
        self.cursor, self._rejected_cursor = max(self.cursor, oldest), max(self._rejected_cursor, oldest_rejected)
        return self._read_whole(max(up_to, self.cursor), max(rejected_up_to, self._rejected_cursor))

    def _read_whole(self, up_to: int, rejected_up_to: int) -> Iterator[_Entry]:
        """Windows of the accepted rows after the cursor, with their branches; moves both cursors."""
        accepted = self._tables.read_added("accepted", self.cursor, up_to, ACCEPTED_COLUMNS).to_pylist()
        added = self._tables.read_added("rejected", self._rejected_cursor, rejected_up_to, REJECTED_COLUMNS).to_pylist()
        # Within a commit the tables keep no order.
        accepted.sort(key=lambda row: (row["time"], _record(row)))
        added.sort(key=lambda row: (_record(row), row["root_position"], row["branch"]))
        after = (self.cursor, self._waiting_from)
        self._waiting_after = self._waiting_from
        self.cursor, self._rejected_cursor = up_to, rejected_up_to
        branches = self._claim(accepted, [*self._waiting, *added])
        return self._entries(accepted, branches, after)

    def _claim(self, accepted: Iterable[Row], rejected: Iterable[Row]) -> dict[_Record, list[Row]]:
        """Rejected rows by record; those of records that are still to come wait."""
        for topic, partition, offset in map(_record, accepted):
            self._reached[topic, partition] = max(self._reached.get((topic, partition), -1), offset)
        claimed: dict[_Record, list[Row]] = {}
        self._waiting = []
        for row in rejected:
            if not self._is_ours(row):
                continue
            topic, partition, offset = record = _record(row)
            if offset > self._reached.get((topic, partition), -1):
                self._waiting.append(row)
            else:
                claimed.setdefault(record, []).append(row)
        return claimed

    def _entries(
        self, accepted: Iterable[Row], branches: dict[_Record, list[Row]], after: tuple[int, int]
    ) -> Iterator[_Entry]:
        for row in accepted:
            if not self._is_ours(row):
                self.counts["foreign_windows"] += 1
                continue
            self.counts["windows"] += 1
            if not has_beginning(row):
                self.counts["windows_without_beginning"] += 1
                continue
            learnable = [r for r in branches.get(_record(row), []) if self._is_learnable(r, row)]
            pieces = cut(window_of(row, learnable), self._settings.max_window_tokens)
            self.counts["pieces"] += len(pieces)
            self.counts["branches"] += sum(len(piece.branches) for piece in pieces)
            for i, piece in enumerate(pieces):
                yield _Entry((*_record(row), i), piece, after)

    def _complete(self, entry: _Entry) -> Window:
        """The window of an entry, with features."""
        window = entry.window
        if len(window.features) < len(window):
            states = self._states(torch.cat([window.before, window.tokens]))
            entry.window = window = replace(window, features=states[len(window.before) :])
            self.counts["pieces_recomputed"] += 1
        return window

    def _is_ours(self, row: Row) -> bool:
        return all(row[column] == value for column, value in self._ours.items())

    def _is_learnable(self, rejected: Row, accepted: Row) -> bool:
        if not has_root(rejected, accepted):
            self.counts["branches_without_root"] += 1
            return False
        if not is_likely(rejected, self._settings.rejected_min_prob):
            self.counts["branches_unlikely"] += 1
            return False
        return True

    def _is_held_back(self, window: Window) -> bool:
        return held_back(window.request, self._settings.held_back_share)


def held_back(request: str, share: float) -> bool:
    """Whether a request is among the share that is never trained on; the same for every trainer and at all times."""
    digest = hashlib.blake2b(request.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _record(row: Row) -> _Record:
    return row["topic"], row["partition"], row["offset"]
