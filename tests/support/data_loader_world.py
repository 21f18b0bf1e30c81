"""Tables with records committed as by the stream, and data loaders that read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from recorded import LINE, TARGET, WIDTH, conversation, record_of, tables_of

from pipeline.delta import DeltaLog
from schemas.batches import TABLES
from schemas.settings import Tables, Train
from trainer.data.data_loader import DataLoader, DataLoaderState
from trainer.data.held_out import is_held_out
from trainer.data.samples import Sample

RATIO = 0.25


def requests(n: int, *, held_out: bool = False) -> list[str]:
    """Return request ids, held out or not."""
    ids = (f"request-{i}" for i in range(10_000))
    return [i for i in ids if is_held_out(i, RATIO) is held_out][:n]


class MemoryLog:
    """The part of the Delta log that a data loader reads, in memory, for tests of many commits."""

    def __init__(self) -> None:
        self._commits: dict[str, list[pa.Table]] = defaultdict(list)
        self.committed_at = datetime.now(UTC)
        """Time of every commit."""
        self.read: list[tuple[str, int, int]] = []

    def append(self, name: str, rows: pa.Table) -> None:
        self._commits[name].append(rows)

    def version(self, name: str) -> int:
        return len(self._commits[name])

    def commit_time(self, name: str, version: int) -> datetime:
        assert 0 < version <= self.version(name)
        return self.committed_at

    def oldest_readable(self, name: str) -> int:
        return 0

    def read_added(
        self,
        name: str,
        after_version: int,
        up_to_version: int,
        columns: Sequence[str] | None = None,
        line: str | None = None,
    ) -> pa.Table:
        self.read.append((name, after_version, up_to_version))
        rows = pa.concat_tables([TABLES[name].empty_table(), *self._commits[name][after_version:up_to_version]])
        return (rows if line is None else rows.filter(pc.field("line") == line)).select(columns or TABLES[name].names)


class World:
    """Tables with synthetic requests; commits ``rejected`` before ``accepted``."""

    def __init__(self, tables: DeltaLog | MemoryLog) -> None:
        self.tables = tables
        self.offset = 0
        self.recomputed: list[int] = []

    @classmethod
    def on_disk(cls, folder: Path) -> World:
        tables = DeltaLog(Tables(uri=str(folder)))
        tables.create()
        return cls(tables)

    def commit(self, ids: Sequence[str], *, names: Sequence[str] = ("rejected", "accepted"), **lineage: str) -> None:
        """Commit requests in one commit, of our line unless ``lineage`` overrides it."""
        records = []
        for request in ids:
            tokens = [(self.offset * 3 + i) % 19 for i in range(11)]
            records.append(record_of(request, conversation(tokens, 4), self.offset, **lineage))  # type: ignore[arg-type]
            self.offset += 1
        self._append(tables_of(*records), names)

    def commit_as(
        self,
        ids: Iterable[str],
        *,
        label: str | None = None,
        speculator: str = "1",
        draft_sources: list[int] | None = None,
    ) -> None:
        """Commit requests one by one, with a label, a speculator version, and the sources of each draft."""
        for request in ids:
            record = record_of(request, conversation([(self.offset + i) % 19 for i in range(11)], 4), self.offset)
            self.offset += 1
            rows = tables_of(record)
            values = {"label": label, "speculator": speculator, "draft_sources": draft_sources}
            self._append({name: with_values(rows[name], **values) for name in rows})

    def commit_bare(self, request: str, first_verify_step: int, *, before: bool = True) -> None:
        """Commit a chunk without features, from the given verify step on."""
        verify_steps = conversation([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], 4)
        known = [token for r in verify_steps[:first_verify_step] for token in r.tokens] if before else []
        rows = tables_of(
            record_of(request, verify_steps[first_verify_step:], self.offset, features="recompute", before=known)
        )
        self.offset += 1
        self._append(rows)

    def data_loader(self, **settings: object) -> DataLoader:
        defaults = {"batch_size": 4, "replay_batch_size": 2, "held_out_ratio": RATIO}
        return DataLoader(self.tables, Train.model_validate(defaults | settings), TARGET, LINE, self.compute_states)

    def compute_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return states that encode each token and its position."""
        self.recomputed.append(len(tokens))
        return (tokens + 100 * torch.arange(len(tokens)))[:, None].expand(-1, WIDTH).bfloat16()

    def _append(self, rows: dict[str, pa.Table], names: Sequence[str] = ("rejected", "accepted")) -> None:
        for name in names:
            self.tables.append(name, rows[name])


def names(samples: Sequence[Sample]) -> list[str]:
    return [sample.request for sample in samples]


def drain(loader: DataLoader) -> list[list[str]]:
    """Return the request ids of all steps until no batch is left."""
    steps = []
    while True:
        loader.poll()
        if not (samples := loader.next_samples()):
            return steps
        steps.append(names(samples))


def as_json(loader: DataLoader) -> DataLoaderState:
    """Return the position of a data loader after a round trip through JSON."""
    return DataLoaderState.model_validate_json(loader.snapshot().state().model_dump_json())


def with_values(rows: pa.Table, **values: object) -> pa.Table:
    """Return rows whose columns, where they exist, hold the given values."""
    for column, value in values.items():
        if (at := rows.schema.get_field_index(column)) >= 0:
            field = rows.schema.field(at)
            rows = rows.set_column(at, field, pa.array([value] * rows.num_rows, field.type))
    return rows
