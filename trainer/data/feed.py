"""What the trainer learns from next: new windows of the tables, a held-out set, and a ring of windows to replay.

Requests are split by a hash of their id: a held-out share is never trained on, and the newest of its windows are what
versions are compared on. Windows are trained on in the order of their time, mixed with earlier ones, which
``trainer.data.replay_sampler`` draws by age and label; a window is passed over ``train.max_epochs`` times at most,
so a trainer without
new traffic stops instead of learning a few requests by heart. While windows wait, the table is not read: a slow
trainer drops nothing, and holds no more than a read of ``VERSIONS_PER_READ`` commits beside its history. It replays
less the more windows wait, and nothing while more than a read is left: what is new teaches more than a pass more.

A window whose features did not travel gets them from the frozen target when it is first used, and keeps them.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from schemas.hash_sampling import fixed_chance
from schemas.settings import Train
from trainer.data import replay_sampler
from trainer.data.samples import Window
from trainer.data.table_reader import VERSIONS_PER_READ, Entry, Key, Reader, Record, Source, Tables

log = structlog.get_logger()

REACH = 4
"""Steps' worth of waiting windows among which labels are balanced: no window comes earlier by more than that."""

States = Callable[[Tensor], Tensor]
"""Gives the target's captured states [n, F] in bf16 after each of the first n tokens of a request."""


class FeedError(RuntimeError):
    """The tables are not those that the cursor came from."""


class FeedState(BaseModel):
    """Where a feed stands; with the tables it gives back the same windows in the same order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cursor: int
    rejected_cursor: int
    reread_after: int
    reread_rejected_after: int
    reached: list[Record]
    fresh: list[Key]
    history: list[tuple[Key, int]]
    """With the passes made over each."""
    held_out: list[Key]
    newest_version: int = 0
    """Of those that rows were drafted by."""
    random: tuple[int, tuple[int, ...], float | None]

    @property
    def needs(self) -> dict[str, int]:
        """By table, the version whose successors it takes to restore this."""
        return {"accepted": self.reread_after, "rejected": self.reread_rejected_after}


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a feed stood, taken at no cost; becomes a ``FeedState`` when one is wanted."""

    cursor: int
    rejected_cursor: int
    waiting_after: int
    reached: Mapping[Source, int]
    fresh: tuple[Entry, ...]
    history: tuple[tuple[Entry, int], ...]
    held_out: tuple[Entry, ...]
    newest_version: int
    random: tuple[int, tuple[int, ...], float | None]

    @property
    def passed(self) -> int:
        """Version of ``accepted`` whose windows, and all before, have been given out or held out."""
        return min([self.cursor, *(entry.after[0] for entry in self.fresh)])

    def state(self) -> FeedState:
        """The same, ready to be written."""
        entries = [*self.fresh, *(entry for entry, _ in self.history), *self.held_out]
        return FeedState(
            cursor=self.cursor,
            rejected_cursor=self.rejected_cursor,
            reread_after=min([self.cursor, *(e.after[0] for e in entries)]),
            reread_rejected_after=min([self.waiting_after, *(e.after[1] for e in entries)]),
            reached=[(*source, offset) for source, offset in self.reached.items()],
            fresh=[e.key for e in self.fresh],
            history=[(e.key, passes) for e, passes in self.history],
            held_out=[e.key for e in self.held_out],
            newest_version=self.newest_version,
            random=self.random,
        )


class Feed:
    """Windows of one line and target, for training and for comparison."""

    def __init__(self, tables: Tables, settings: Train, target: str, line: str, states: States) -> None:
        self.counts: Counter[str] = Counter()
        """Rows and branches by what became of them."""
        self._tables = tables
        self._reader = Reader(tables, target, line, settings.max_sample_tokens, self.counts)
        self._states = states
        self._settings = settings
        self._random = random.Random(settings.seed)  # noqa: S311
        self._fresh: deque[Entry] = deque()
        self._history: deque[Entry] = deque(maxlen=settings.replay_buffer_size)
        self._held_out: deque[Entry] = deque(maxlen=settings.held_out_samples)
        self.table_version = 0

    @property
    def cursor(self) -> int:
        """Version of ``accepted`` up to which rows were read."""
        return self._reader.cursor

    @property
    def waiting(self) -> int:
        """New windows that were read and not trained on yet."""
        return len(self._fresh)

    @property
    def held_out(self) -> list[Window]:
        """The newest windows of requests that are not trained on, oldest first."""
        return [self._complete(entry) for entry in self._held_out]

    @property
    def tables_read(self) -> dict[str, int]:
        """Version of each table up to which rows were read."""
        return {"accepted": self._reader.cursor, "rejected": self._reader.rejected_cursor}

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
                "tables.uri holds other tables than before; set another train.checkpoint_dir to begin anew"
            )
        if len(self._fresh) >= self._settings.batch_size:
            return
        up_to = min(self.table_version, self.cursor + VERSIONS_PER_READ)
        if up_to > self.cursor:
            for entry in self._reader.read(up_to, self._tables.version("rejected")):
                (self._held_out if self._is_held_out(entry.window) else self._fresh).append(entry)

    def next(self) -> list[Window]:
        """Windows of the next step; empty while new ones and those that may be passed over again do not fill it."""
        size = self._settings.batch_size
        newest = len(self._history) - 1
        rested = [(newest - i, e) for i, e in enumerate(self._history) if e.passes < self._settings.max_epochs]
        if len(self._fresh) + len(rested) < size:
            return []
        new = self._number_of_new(len(rested))
        replayed = self._draw(rested, size - new)
        fresh = self._take(new)
        self._history.extend(fresh)
        self.counts["pieces_new"] += len(fresh)
        self.counts["pieces_replayed"] += len(replayed)
        for entry in (chosen := fresh + replayed):
            entry.passes += 1
        return [self._weighted(entry) for entry in chosen]

    def mark(self) -> Mark:
        """Where the feed stands now."""
        return Mark(
            cursor=self._reader.cursor,
            rejected_cursor=self._reader.rejected_cursor,
            waiting_after=self._reader.waiting_after,
            reached=dict(self._reader.reached),
            fresh=tuple(self._fresh),
            history=tuple((entry, entry.passes) for entry in self._history),
            held_out=tuple(self._held_out),
            newest_version=self._reader.newest_version,
            random=self._random.getstate(),
        )

    def state(self) -> FeedState:
        """Where the feed stands now, ready to be written."""
        return self.mark().state()

    def restore(self, state: FeedState) -> None:
        """Stand where a feed of the same tables stood, by reading its windows again.

        Raises:
            TableError: the tables cannot be read.
        """
        self._reader.stand(state.reread_after, state.reread_rejected_after, state.reached)
        read = self._reader.read(state.cursor, state.rejected_cursor, all_rejected=True)
        found = {entry.key: entry for entry in read}
        passes = dict(state.history)
        for name, keys in (("_fresh", state.fresh), ("_history", passes), ("_held_out", state.held_out)):
            kept: deque[Entry] = getattr(self, name)
            kept.clear()
            kept.extend(found[key] for key in keys if key in found)
            if len(kept) < len(keys):
                self.counts["gone"] += len(keys) - len(kept)
                log.warning("windows_gone", part=name.strip("_"), wanted=len(keys), found=len(kept))
        for entry in self._history:
            entry.passes = passes[entry.key]
        self._reader.newest_version = state.newest_version
        self._random.setstate(state.random)

    def _number_of_new(self, rested: int) -> int:
        """New windows in the next step: those that replay leaves room for, or as many as it takes to catch up."""
        size, catch_up = self._settings.batch_size, self._settings.catch_up_steps
        number = size - min(self._settings.replay_batch_size, rested)
        if catch_up:
            flooded = self.table_version - self.cursor > VERSIONS_PER_READ
            number = size if flooded else max(number, math.ceil(len(self._fresh) / catch_up))
        return min(number, size, len(self._fresh))

    def _take(self, number: int) -> list[Entry]:
        """New windows in the order of their time: the oldest, and with it what balances labels among the next ones."""
        if not self._settings.label_balance:
            return [self._fresh.popleft() for _ in range(number)]
        near = [self._fresh.popleft() for _ in range(min(len(self._fresh), REACH * self._settings.batch_size))]
        odds = replay_sampler.log_odds(
            [0] * len(near), [entry.label for entry in near], balance=self._settings.label_balance
        )
        taken = {0, *(1 + i for i in replay_sampler.draw(self._random, odds[1:], number - 1))} if number else set()
        self._fresh.extendleft(reversed([entry for i, entry in enumerate(near) if i not in taken]))
        return [near[i] for i in sorted(taken)]

    def _draw(self, rested: Sequence[tuple[int, Entry]], number: int) -> list[Entry]:
        """Windows to replay, of those with their ages."""
        ages, labels = [age for age, _ in rested], [entry.label for _, entry in rested]
        odds = replay_sampler.log_odds(ages, labels, self._settings.replay_half_life, self._settings.label_balance)
        return [rested[i][1] for i in replay_sampler.draw(self._random, odds, number)]

    def _weighted(self, entry: Entry) -> Window:
        """The window of an entry with features, its branches weighed by what has been registered since."""
        window = self._complete(entry)
        weight = replay_sampler.staleness(
            self._reader.newest_version - entry.version, self._settings.staleness_half_life
        )
        if weight == 1:
            return window
        self.counts["branches_stale"] += len(window.branches)
        return replace(window, branches=tuple(replace(branch, weight=weight) for branch in window.branches))

    def _complete(self, entry: Entry) -> Window:
        """The window of an entry, with features."""
        window = entry.window
        if len(window.features) < len(window):
            states = self._states(torch.cat([window.before, window.tokens]))
            entry.window = window = replace(window, features=states[len(window.before) :])
            self.counts["pieces_recomputed"] += 1
        return window

    def _is_held_out(self, window: Window) -> bool:
        return held_out(window.request, self._settings.held_out_ratio)


def held_out(request: str, share: float) -> bool:
    """Whether a request is among the share that is never trained on; the same for every trainer and at all times."""
    return fixed_chance(request) < share
