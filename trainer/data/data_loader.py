"""The data loader: read samples, hold requests out, choose the samples of each step, and prefetch its batch.

Versions are compared on the held-out set (``trainer.data.held_out``). The other samples are trained on in the order of
their time, mixed with earlier ones from the replay buffer, for ``train.max_epochs`` at most: a trainer without new
traffic stops instead of overfitting to a few requests. While enough samples wait, the tables are not read: a slow
trainer holds no more than one read of ``VERSIONS_PER_READ`` commits beside its replay buffer, and skips nothing until
it is ``train.max_lag`` behind. The more samples wait, the fewer are replayed, and none while more than one read is
unread: a new sample teaches more than another epoch.

A sample without features gets them from the frozen target when it is first used, and keeps them. Memory holds the
replay buffer up to ``train.replay_memory_bytes``; further features are in files (``feature_files``).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict

from pipeline.delta import LOG_DAYS, DeltaLog
from schemas.settings import Train
from trainer.data.draft_vocabulary import Halves, TokenCounts
from trainer.data.feature_files import FeatureFileError, FeatureFiles, load_features, spill_folder
from trainer.data.held_out import HeldOutSet
from trainer.data.lag import next_share, select_requests
from trainer.data.replay_buffer import ReplayBuffer, compute_log_weights, draw_indices, staleness_weight
from trainer.data.samples import ComputeStates, Sample, mark_suffix_predictions, recompute_features
from trainer.data.table_reader import (
    VERSIONS_PER_READ,
    ChunksKey,
    PartitionKey,
    RecordKey,
    SampleKey,
    TableEntry,
    TableReader,
)

log = structlog.get_logger()

LOSSES = ("samples_skipped", "branches_skipped", "samples_unstored", "samples_unreadable", "samples_deleted")
"""Kinds of ``DataLoader.counts`` that are lost to training: beyond the maximum lag, because a file could not be written
or read, and because they were deleted from the tables."""
BALANCED_STEPS = 4
"""Steps' worth of waiting samples among which labels are balanced; no sample is advanced by more than that."""

RandomState = tuple[int, tuple[int, ...], float | None]

BatchT = TypeVar("BatchT")
T = TypeVar("T")


class DataLoaderError(RuntimeError):
    """The tables are not the ones that the cursor belongs to."""


class DataLoaderState(BaseModel):
    """A data loader's position; with the tables it yields the same samples in the same order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cursor: int
    rejected_cursor: int
    reread_after: int
    reread_rejected_after: int
    reached: list[RecordKey]
    waiting: list[SampleKey]
    replay_buffer: list[tuple[SampleKey, int]]
    """With the epochs of each."""
    held_out: list[SampleKey]
    left_held_out: list[str]
    """Keys of the prompts that left the held-out set."""
    recent_labels: list[str | None]
    """Of the newest samples of all traffic."""
    open_requests: list[ChunksKey]
    """Chunks of requests whose last chunk is not read yet."""
    newest_drafted_by: int = 0
    """Newest speculator version among the samples read."""
    token_counts: tuple[dict[int, int], dict[int, int]] = ({}, {})
    """Of the output tokens of the samples returned, by half of the requests."""
    random: RandomState

    @property
    def versions_needed(self) -> dict[str, int]:
        """By table, the version after which all rows are needed to restore this state."""
        return {"accepted": self.reread_after, "rejected": self.reread_rejected_after}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A data loader's position, cheap to take; ``state`` converts it to be written."""

    cursor: int
    rejected_cursor: int
    pending_after: int
    reached: Mapping[PartitionKey, int]
    waiting: tuple[TableEntry, ...]
    replay_buffer: tuple[tuple[TableEntry, int], ...]
    held_out: tuple[TableEntry, ...]
    left_held_out: tuple[str, ...]
    recent_labels: tuple[str | None, ...]
    open_requests: tuple[tuple[ChunksKey, tuple[int, int]], ...]
    newest_drafted_by: int
    token_counts: tuple[dict[int, int], dict[int, int]]
    random: RandomState

    @property
    def completed_version(self) -> int:
        """Version of ``accepted`` up to which every sample was handed out, or belongs to a prompt that was held out."""
        left = set(self.left_held_out)
        unread = [after[0] for _, after in self.open_requests]
        waiting = [entry.after[0] for entry in self.waiting if entry.sample.prompt_key not in left]
        return min([self.cursor, *unread, *waiting])

    def state(self) -> DataLoaderState:
        """Return the position, ready to be written."""
        entries = [*self.waiting, *(entry for entry, _ in self.replay_buffer), *self.held_out]
        after = [*(entry.after for entry in entries), *(after for _, after in self.open_requests)]
        return DataLoaderState(
            cursor=self.cursor,
            rejected_cursor=self.rejected_cursor,
            reread_after=min([self.cursor, *(accepted for accepted, _ in after)]),
            reread_rejected_after=min([self.pending_after, *(rejected for _, rejected in after)]),
            reached=[(*source, offset) for source, offset in self.reached.items()],
            waiting=[e.key for e in self.waiting],
            replay_buffer=[(e.key, epochs) for e, epochs in self.replay_buffer],
            held_out=[e.key for e in self.held_out],
            left_held_out=list(self.left_held_out),
            recent_labels=list(self.recent_labels),
            open_requests=[key for key, _ in self.open_requests],
            newest_drafted_by=self.newest_drafted_by,
            token_counts=self.token_counts,
            random=self.random,
        )


class DataLoader:
    """Samples of one line and target, for training and for evaluation."""

    def __init__(
        self,
        tables: DeltaLog,
        settings: Train,
        target: str,
        line: str,
        compute_states: ComputeStates,
        *,
        shares_files: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start at the beginning of the tables.

        Args:
            tables: The tables to read.
            settings: Bounds, seed and folders.
            target: Fingerprint of the target.
            line: Speculator line.
            compute_states: Recomputes features.
            shares_files: Whether the samples of a step are returned with files in place of features, for all ranks.
            clock: Unix time in seconds.
        """
        self.counts: Counter[str] = Counter(dict.fromkeys(LOSSES, 0))
        """Rows, samples and branches by kind; copy it to read it from another thread."""
        self.table_version = 0
        """Newest version of ``accepted`` at the last poll."""
        self.lag_s = 0.0
        """Age of the oldest unread commit in seconds; 0 while less than one read is unread."""
        self.share = 1.0
        """Share of the requests that is trained on."""
        self.replay_bytes = {"memory": 0, "disk": 0}
        """Bytes of the replay buffer's tensors after the last step."""
        self._tables = tables
        self._reader = TableReader(tables, target, line, settings, self.counts)
        self._compute_states = compute_states
        self._settings = settings
        self._random = random.Random(settings.seed)  # noqa: S311
        self._token_counts = TokenCounts()
        self._waiting: deque[TableEntry] = deque()
        self._clock = clock
        self._shares_files = shares_files
        # While the ranks train on one step, the next one is prefetched.
        self._files = FeatureFiles(spill_folder(settings, line), kept_steps=2 if shares_files else 0)
        self._replay_buffer: ReplayBuffer[TableEntry] = ReplayBuffer(settings, self._random, self._files)
        self._held_out = HeldOutSet(
            settings.held_out_ratio, settings.held_out_samples, settings.held_out_bytes, self.counts
        )

    @property
    def cursor(self) -> int:
        """Version of ``accepted`` up to which rows were read."""
        return self._reader.cursor

    @property
    def waiting(self) -> int:
        """Number of new samples that were read and not trained on yet."""
        return len(self._waiting)

    @property
    def held_out(self) -> dict[Sample, float]:
        """The samples of the held-out set, each with its weight."""
        weights = self._held_out.weights
        return {self._with_features(entry): weights[entry.sample.label] for entry in self._held_out}

    @property
    def tables_read(self) -> dict[str, int]:
        """Version of each table up to which rows were read."""
        return {"accepted": self._reader.cursor, "rejected": self._reader.rejected_cursor}

    @property
    def replayed(self) -> list[Sample]:
        """The samples of the replay buffer, perhaps without features."""
        return [entry.sample for entry in self._replay_buffer]

    def poll(self) -> None:
        """Read the next commits, unless enough samples wait to be trained on.

        Raises:
            TableError: the tables cannot be read; nothing was consumed, and the next poll tries again.
            DataLoaderError: the table is older than the cursor.
        """
        self.table_version = self._tables.version("accepted")
        if self.table_version < self.cursor:
            raise DataLoaderError(
                f"table accepted ends at version {self.table_version}, but was read up to {self.cursor}: "
                "tables.uri points to different tables; set another train.checkpoint_dir to start from the beginning"
            )
        if len(self._waiting) >= self._settings.batch_size:
            return
        up_to = min(self.table_version, self.cursor + VERSIONS_PER_READ)
        if up_to > self.cursor:
            self._measure_lag()
            self._add(self._reader.read(up_to, self._tables.version("rejected")))
        self._add(self._reader.take_overdue())

    def next_samples(self) -> list[Sample]:
        """Return the samples of the next step; none while new and replayable samples do not fill a batch."""
        size, drawable = self._settings.batch_size, self._replay_buffer.drawable
        if len(self._waiting) + drawable < size:
            return []
        number = self._number_of_new(drawable)
        replayed = self._replay_buffer.draw(size - number)
        new = self._take_new(number)
        for entry in new:
            entry.epochs += 1
            self._replay_buffer.add(entry)
            self._token_counts.add(entry.sample.request, entry.sample.own_output())
        self.counts["samples_new"] += len(new)
        self.counts["samples_replayed"] += len(replayed)
        samples = [sample for entry in new + replayed if (sample := self._prepare(entry))]
        self._limit_replay_buffer()
        return samples

    def snapshot(self) -> Snapshot:
        """Return the current position."""
        return Snapshot(
            cursor=self._reader.cursor,
            rejected_cursor=self._reader.rejected_cursor,
            pending_after=self._reader.pending_after,
            reached=dict(self._reader.reached),
            waiting=tuple(self._waiting),
            replay_buffer=tuple((entry, entry.epochs) for entry in self._replay_buffer),
            held_out=tuple(self._held_out),
            left_held_out=self._held_out.left,
            recent_labels=self._held_out.recent_labels,
            open_requests=self._reader.open_requests,
            newest_drafted_by=self._reader.newest_drafted_by,
            token_counts=self._token_counts.halves,
            random=self._random.getstate(),
        )

    def restore(self, state: DataLoaderState) -> None:
        """Move to a position in the same tables by reading its samples again.

        Raises:
            TableError: the tables cannot be read.
        """
        self._replay_buffer.clear()
        self._files.clear()
        self._reader.seek(state.reread_after, state.reread_rejected_after, state.reached)
        epochs = dict(state.replay_buffer)
        needed = {*state.waiting, *epochs, *state.held_out}
        returned = dict.fromkeys(key[:4] for key in needed)
        entries: dict[SampleKey, TableEntry] = {}
        replay_bytes = 0
        for entry in self._reader.reread(state.cursor, state.rejected_cursor, returned, state.open_requests):
            if entry.key in epochs:
                entry.epochs = epochs[entry.key]
                replay_bytes += entry.sample.feature_bytes
                if replay_bytes > self._settings.replay_memory_bytes:
                    entry.sample = self._files.store(entry.sample)
            if entry.key in needed:
                entries[entry.key] = entry

        def find(part: str, keys: Iterable[SampleKey]) -> list[TableEntry]:
            found = [entries.get(key) for key in keys]
            if missing := found.count(None):
                self.counts["samples_deleted"] += missing
                log.warning("samples_deleted", part=part, missing=missing, total=len(found))
            return [entry for entry in found if entry is not None]

        self._waiting = deque(find("waiting", state.waiting))
        for entry in find("replay_buffer", epochs):
            self._replay_buffer.add(entry)
        self._limit_replay_buffer()
        self._held_out.restore(find("held_out", state.held_out), state.left_held_out, state.recent_labels)
        self._reader.newest_drafted_by = state.newest_drafted_by
        self._token_counts = TokenCounts(state.token_counts)
        self._random.setstate(state.random)

    def close(self) -> None:
        """Delete the files of the replay buffer."""
        self._files.clear()

    def _measure_lag(self) -> None:
        """Measure the lag before a read, and adapt the share of the requests to it."""
        lag = 0.0
        # With less to read, the trainer keeps up.
        if self._settings.max_lag and self.table_version - self.cursor > VERSIONS_PER_READ:
            committed_at = self._tables.commit_time("accepted", self.cursor + 1)
            oldest = self._clock() - LOG_DAYS * 86_400
            lag = max(0.0, self._clock() - (committed_at.timestamp() if committed_at else oldest))
        share = next_share(self.share, lag, self.lag_s, self._settings.max_lag)
        if share != self.share:
            log.warning("lag_share_changed", lag_s=round(lag, 1), share=share, setting="train.max_lag")
        self.lag_s, self.share = lag, share

    def _add(self, entries: Sequence[TableEntry]) -> None:
        trained = [entry for one in entries for entry in self._held_out.add(one)]
        branches: Counter[str] = Counter()
        for entry in trained:
            branches[entry.sample.request] += len(entry.sample.branches)
        kept = select_requests(branches, self.share)
        for entry in trained:
            if entry.sample.request in kept:
                self._waiting.append(entry)
            else:
                self.counts["samples_skipped"] += 1
                self.counts["branches_skipped"] += len(entry.sample.branches)

    def _number_of_new(self, drawable: int) -> int:
        """Return how many new samples the next step takes: the rest after replay, or as many as catching up needs."""
        size, catch_up = self._settings.batch_size, self._settings.catch_up_steps
        number = size - min(self._settings.replay_batch_size, drawable)
        if catch_up:
            flooded = self.table_version - self.cursor > VERSIONS_PER_READ
            number = size if flooded else max(number, math.ceil(len(self._waiting) / catch_up))
        return min(number, size, len(self._waiting))

    def _take_new(self, number: int) -> list[TableEntry]:
        """Remove new samples in the order of their time: the oldest, and a label-balanced draw from the next ones."""
        if not self._settings.label_balance:
            return [self._waiting.popleft() for _ in range(number)]
        reach = BALANCED_STEPS * self._settings.batch_size
        near = [self._waiting.popleft() for _ in range(min(len(self._waiting), reach))]
        labels = [entry.sample.label for entry in near]
        log_weights = compute_log_weights([0] * len(near), labels, balance=self._settings.label_balance)
        taken = {0, *(1 + i for i in draw_indices(self._random, log_weights[1:], number - 1))} if number else set()
        self._waiting.extendleft(reversed([entry for i, entry in enumerate(near) if i not in taken]))
        return [near[i] for i in sorted(taken)]

    def _prepare(self, entry: TableEntry) -> Sample | None:
        """Return a sample with features, its branches weighted by their staleness; None if its file is unreadable."""
        if self._settings.suffix_predicted_weight != 1 and entry.sample.suffix_predicted is None:
            entry.sample = mark_suffix_predictions(entry.sample)
        sample = self._read_features(entry)
        if sample is None:
            return None
        behind = self._reader.newest_drafted_by - entry.drafted_by
        weight = staleness_weight(behind, self._settings.staleness_half_life)
        if weight == 1:
            return sample
        self.counts["branches_stale"] += sum(branch.by_speculator for branch in sample.branches)
        branches = (replace(branch, weight=weight) if branch.by_speculator else branch for branch in sample.branches)
        return replace(sample, branches=tuple(branches))

    def _read_features(self, entry: TableEntry) -> Sample | None:
        """Return a sample with features, or with the file that every rank can read; None if the file is unreadable."""
        if self._shares_files:
            entry.sample = self._files.store(entry.sample if entry.sample.stored else self._with_features(entry))
            return entry.sample
        try:
            return load_features(entry.sample) if entry.sample.stored else self._with_features(entry)
        except FeatureFileError as error:
            log.warning("features_unreadable", error=str(error))
            self.counts["samples_unreadable"] += 1
            entry.epochs = self._settings.max_epochs
            return None

    def _with_features(self, entry: TableEntry) -> Sample:
        if not entry.sample.has_features:
            entry.sample = recompute_features(entry.sample, self._compute_states)
            self.counts["samples_recomputed"] += 1
        return entry.sample

    def _limit_replay_buffer(self) -> None:
        self.counts["samples_unstored"] += self._replay_buffer.limit_bytes()
        self._files.end_step()
        self.replay_bytes = {"memory": self._replay_buffer.memory_bytes, "disk": self._replay_buffer.file_bytes}


class Prefetcher(Generic[BatchT]):
    """Run a data loader one step ahead on one thread: read tables, recompute features, collate.

    Only that thread uses the data loader, one call after the other, so samples keep the data loader's order. It
    prefetches one step and no more, which bounds memory. ``state`` is the position before the prefetched step: a
    restart chooses that step again, and each sample is trained on as often as without a restart. The methods are
    called from one thread. Others may read the data loader's counters, but nothing else.
    """

    def __init__(self, loader: DataLoader, collate: Callable[[list[Sample]], BatchT]) -> None:
        """Take ownership of the data loader.

        Args:
            loader: From now on, others may only read its counters.
            collate: Converts the samples of a step to its batch.
        """
        self._loader = loader
        self._collate = collate
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data-loader")
        self._prefetched: Future[BatchT | None] | None = None
        self._chosen_at: Snapshot | None = None

    @property
    def held_out(self) -> dict[Sample, float]:
        """The samples of the held-out set, each with its weight."""
        return self._call(lambda: self._loader.held_out)

    @property
    def replayed(self) -> list[Sample]:
        """The samples of the replay buffer, perhaps without features."""
        return self._call(lambda: self._loader.replayed)

    @property
    def tables_read(self) -> dict[str, int]:
        """Version of each table up to which rows were read, for the prefetched step too."""
        return self._call(lambda: self._loader.tables_read)

    @property
    def completed_version(self) -> int:
        """Version of ``accepted`` up to which every sample was returned, or belongs to a prompt that was held out."""
        return self._snapshot().completed_version

    @property
    def token_counts(self) -> Halves:
        """Counts of the output tokens of the samples returned, by half of the requests; older tokens count less."""
        return self._snapshot().token_counts

    def next_batch(self) -> BatchT | None:
        """Return the batch of the next step; None while there is nothing to train on.

        Raises:
            TableError: the tables cannot be read; nothing was consumed, and the next call tries again.
            DataLoaderError: the tables are not the ones that the data loader started with.
        """
        was_prefetched = self._prefetched is not None
        batch = self._take()
        if batch is None and was_prefetched:
            # Samples may have arrived since the last step started.
            batch = self._take()
        if batch is not None:
            self._prefetched = self._thread.submit(self._prepare)
        return batch

    def state(self) -> DataLoaderState:
        """Return the position before everything that ``next_batch`` has not returned yet."""
        return self._snapshot().state()

    def restore(self, state: DataLoaderState) -> None:
        """Move to a position in the same tables.

        Raises:
            TableError: the tables cannot be read.
        """
        self._prefetched = None
        self._call(lambda: self._loader.restore(state))

    def close(self) -> None:
        """Stop the thread after its current work, and close the data loader."""
        self._thread.shutdown(cancel_futures=True)
        self._loader.close()

    def _take(self) -> BatchT | None:
        prefetched, self._prefetched = self._prefetched or self._thread.submit(self._prepare), None
        return prefetched.result()

    def _prepare(self) -> BatchT | None:
        self._chosen_at = None
        self._loader.poll()
        self._chosen_at = self._loader.snapshot()
        samples = self._loader.next_samples()
        return self._collate(samples) if samples else None

    def _snapshot(self) -> Snapshot:
        if self._prefetched is None:
            return self._call(self._loader.snapshot)
        self._prefetched.exception()
        return self._chosen_at or self._call(self._loader.snapshot)

    def _call(self, function: Callable[[], T]) -> T:
        return self._thread.submit(function).result()
