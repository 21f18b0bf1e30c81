"""What is served where, and how far each stage lags behind the one before."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape
from rich.table import Table

from ops.cli.drift import words
from schemas.settings import Settings
from schemas.status import ComparisonStatus, PromoterStatus, ServeStatus, StreamStatus, TrainStatus

COUNTED = ("traces", "accepted", "rejected", "dead_letters")
_Status = TypeVar("_Status", bound=BaseModel)


class Overview(BaseModel):
    """All processes at one moment; None where one does not answer, with the reason in ``silent``."""

    model_config = ConfigDict(frozen=True)

    serve: ServeStatus | None = None
    stream: StreamStatus | None = None
    train: TrainStatus | None = None
    promoter: PromoterStatus | None = None
    parts: dict[str, str] = {}
    """What the supervisor says of each process, when the stack runs under one."""
    rows: dict[str, int] = {}
    """Rows of each Delta table; empty when they cannot be read."""
    silent: dict[str, str] = {}

    @property
    def nothing_runs(self) -> bool:
        """True when no process answers."""
        return not any((self.serve, self.stream, self.train, self.promoter))

    @property
    def trace_lag(self) -> int | None:
        """Kafka records that the table still wants."""
        if self.stream is None or not self.stream.partitions:
            return None
        return sum(p.lag for p in self.stream.partitions)

    @property
    def table_lag(self) -> int | None:
        """Commits of ``accepted`` that the trainer has yet to read."""
        return None if self.train is None else max(0, self.train.table_version_latest - self.train.table_version_read)


@dataclass(frozen=True)
class _Answer:
    text: str
    error: str


class Gatherer:
    """Asks the processes of one stack how they are; keeps its connections."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = httpx.Client(timeout=2)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="status")

    def gather(self, *, parts: Mapping[str, str] | None = None, count_rows: bool = False) -> Overview:
        """Ask all four at once; ``count_rows`` also opens the tables."""
        names = ("serve", "stream", "train", "promoter")
        texts = dict(zip(names, self._pool.map(self._ask, names), strict=True))
        silent = {name: answer.error for name, answer in texts.items() if answer.error}
        return Overview(
            serve=_parsed(ServeStatus, "serve", texts["serve"], silent),
            stream=_parsed(StreamStatus, "stream", texts["stream"], silent),
            train=_parsed(TrainStatus, "train", texts["train"], silent),
            promoter=_parsed(PromoterStatus, "promoter", texts["promoter"], silent),
            parts=dict(parts or {}),
            rows=_row_counts(self._settings, silent) if count_rows else {},
            silent=silent,
        )

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()
        self._pool.shutdown()

    def _ask(self, name: str) -> _Answer:
        address = getattr(self._settings, name)
        try:
            answer = self._client.get(f"http://{address.host}:{address.port}/status")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            return _Answer("", f"no status from {address.host}:{address.port} ({name}.port): {error}")
        return _Answer(answer.text, "")


def _parsed(model: type[_Status], name: str, answer: _Answer, silent: dict[str, str]) -> _Status | None:
    if answer.error:
        return None
    try:
        return model.model_validate_json(answer.text)
    except ValidationError:
        silent[name] = f"something else than aurora {name} answers there (set {name}.port)"
        return None


def _row_counts(settings: Settings, silent: dict[str, str]) -> dict[str, int]:
    from pipeline.delta import DeltaLog, TableError

    if "://" not in settings.tables.uri and not Path(settings.tables.uri).exists():
        return {}
    try:
        log = DeltaLog(settings.tables)
        return {name: log.row_count(name) for name in COUNTED}
    except TableError as error:
        silent["tables"] = str(error)
        return {}


def as_table(overview: Overview) -> Table:
    """A table for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("process", "state", "what it does", "behind by"):
        table.add_column(column, overflow="fold")
    for name, (doing, behind) in _lines(overview).items():
        state = overview.parts.get(name, "silent" if name in overview.silent else "answers")
        table.add_row(name, state, overview.silent.get(name, doing), behind)
    if overview.rows:
        counts = ", ".join(f"{name} {count:,}" for name, count in overview.rows.items())
        table.add_row("tables", "", counts, "")
    if overview.stream and overview.stream.drift.newest:
        told = overview.stream.drift.newest[-1]
        table.add_row("drift", "", escape(f"{words(told)}; `aurora drift` shows all"), "")
    return table


def _lines(overview: Overview) -> dict[str, tuple[str, str]]:
    serve, stream, train, promoter = overview.serve, overview.stream, overview.train, overview.promoter
    lines = dict.fromkeys(overview.parts, ("", "")) | {
        "serve": ("", ""),
        "stream": ("", ""),
        "train": ("", ""),
        "promoter": ("", ""),
    }
    if serve:
        role = f" ({serve.role})" if serve.role in ("pinned", "canary") else ""
        doing = (
            f"version {serve.speculator or 'none'}{role}, {_drafting(serve)}, {serve.requests_finished:,} answered, "
        )
        doing += f"{serve.requests_failed} failed"
        shed = f", {serve.rows_dropped:,} shed" if serve.rows_dropped else ""
        lines["serve"] = (doing + _trouble(serve.registry_error), f"{serve.rows_pending:,} rows to publish{shed}")
    if stream:
        doing = f"{stream.rows_written:,} rows in {stream.commits:,} commits{_dead(stream)}"
        lost = f", {stream.records_lost} records lost" if stream.records_lost else ""
        trouble = "; ".join(dict.fromkeys([*stream.not_live, *stream.not_ready]))
        lines["stream"] = (doing + lost + _trouble(trouble), f"{overview.trace_lag or 0:,} records")
    if train:
        loss = "none yet" if train.loss is None else f"{train.loss:.3f}"
        doing = f"step {train.step:,}, loss {loss}, {len(train.registered)} versions registered"
        if train.rollbacks:
            doing += f", went back {train.rollbacks} times ({train.last_rollback})"
        lines["train"] = (doing + _trouble(train.error), f"{overview.table_lag or 0:,} commits")
    if promoter:
        lines["promoter"] = (_promoting(promoter) + _trouble(promoter.error), "")
    return lines


def _drafting(serve: ServeStatus) -> str:
    if not serve.speculating:
        return "speculation off"
    return f"drafting {serve.draft_depth}" if serve.draft_depth else "drafting does not pay"


def _promoting(promoter: PromoterStatus) -> str:
    doing = f"champion {promoter.champion or 'none'}, candidate {promoter.candidate or 'none'}"
    doing += "".join(f"; {_describe_comparison(one)}" for one in promoter.comparisons)
    if promoter.cooldown_until is not None:
        doing += (
            f"; promotes nothing before {datetime.fromtimestamp(promoter.cooldown_until, UTC).astimezone():%H:%M:%S}"
        )
    return escape(doing + (f"; rolled back: {promoter.last_rollback}" if promoter.last_rollback else ""))


def _describe_comparison(comparison: ComparisonStatus) -> str:
    """Return a canary analysis or a post-promotion watch as text."""
    name = "canary" if comparison.kind == "canary" else "watch of"
    versions = f"{comparison.version} against {comparison.baseline}"
    requests = f"{comparison.requests:,} and {comparison.baseline_requests:,} requests"
    figures = [
        f"{one.figure} {one.difference:+.1%} ({one.low:+.1%} .. {one.high:+.1%})"
        for one in comparison.figures
        if one.label is None
    ]
    until = datetime.fromtimestamp(comparison.end_time, UTC).astimezone()
    return ", ".join([f"{name} {versions}", requests, *figures, f"until {until:%H:%M:%S} at most"])


def _dead(stream: StreamStatus) -> str:
    if not stream.dead_letters:
        return ""
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in sorted(stream.dead_letters.items()))
    return f", {sum(stream.dead_letters.values()):,} dead letters ({reasons})"


def _trouble(error: str | None) -> str:
    return f"; {error}" if error else ""
