"""Fetch the status of all processes and show what is served and how far each stage lags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape
from rich.table import Table

from ops.cli.terminal import new_table
from schemas.events import AcceptanceStats, DriftEvent
from schemas.settings import Settings
from schemas.status import ComparisonStatus, PromoterStatus, ServeStatus, StreamStatus, TrainStatus

COUNTED_TABLES = ("traces", "accepted", "rejected", "dead_letters")
NOTABLE_DRAFT_CHANGE = 0.1
"""Relative change of the draft tokens per step from which a drift event mentions it."""
_Status = TypeVar("_Status", bound=BaseModel)


class Overview(BaseModel):
    """Status of all processes at one moment; None for a process that does not answer, with the reason in ``silent``."""

    model_config = ConfigDict(frozen=True)

    serve: ServeStatus | None = None
    stream: StreamStatus | None = None
    train: TrainStatus | None = None
    promoter: PromoterStatus | None = None
    parts: dict[str, str] = {}
    """State of each process in the supervisor, if the stack runs under one."""
    rows: dict[str, int] = {}
    """Rows of each Delta table; empty if the tables cannot be read."""
    silent: dict[str, str] = {}

    @property
    def nothing_runs(self) -> bool:
        """True if no process answers."""
        return not any((self.serve, self.stream, self.train, self.promoter))

    @property
    def trace_lag(self) -> int | None:
        """Kafka records that are not yet in the tables."""
        if self.stream is None or not self.stream.partitions:
            return None
        return sum(p.lag for p in self.stream.partitions)

    @property
    def table_lag(self) -> int | None:
        """Commits of table ``accepted`` that the trainer has not yet read."""
        return None if self.train is None else max(0, self.train.table_version_latest - self.train.table_version_read)


class StatusClient:
    """Client of the status endpoints of one stack; keeps its connections."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = httpx.Client(timeout=2)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="status")

    def fetch(self, *, parts: Mapping[str, str] | None = None, count_rows: bool = False) -> Overview:
        """Fetch all four statuses in parallel; ``count_rows`` also opens the tables."""
        names = ("serve", "stream", "train", "promoter")
        answers = dict(zip(names, self._pool.map(self._get, names), strict=True))
        silent = {name: error for name, (_, error) in answers.items() if error}

        def parse(model: type[_Status], name: str) -> _Status | None:
            try:
                return None if name in silent else model.model_validate_json(answers[name][0])
            except ValidationError:
                silent[name] = f"something else than aurora {name} answers there (set {name}.port)"
                return None

        return Overview(
            serve=parse(ServeStatus, "serve"),
            stream=parse(StreamStatus, "stream"),
            train=parse(TrainStatus, "train"),
            promoter=parse(PromoterStatus, "promoter"),
            parts=dict(parts or {}),
            rows=_count_rows(self._settings, silent) if count_rows else {},
            silent=silent,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._pool.shutdown()

    def _get(self, name: str) -> tuple[str, str]:
        """Return body and error of the status endpoint of a process; one of them is empty."""
        address = getattr(self._settings, name)
        try:
            answer = self._client.get(f"http://{address.host}:{address.port}/status")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            return "", f"no status from {address.host}:{address.port} ({name}.port): {error}"
        return answer.text, ""


def _count_rows(settings: Settings, silent: dict[str, str]) -> dict[str, int]:
    from pipeline.delta import DeltaLog, TableError

    if "://" not in settings.tables.uri and not Path(settings.tables.uri).exists():
        return {}
    try:
        log = DeltaLog(settings.tables)
        return {name: log.row_count(name) for name in COUNTED_TABLES}
    except TableError as error:
        silent["tables"] = str(error)
        return {}


def build_status_table(overview: Overview) -> Table:
    """Return a terminal table with one row for each process."""
    table = new_table("process", "state", "activity", "lag")
    lines = dict.fromkeys(overview.parts, ("", "")) | dict(_describe_processes(overview))
    for name, (activity, lag) in lines.items():
        state = overview.parts.get(name, "silent" if name in overview.silent else "answers")
        table.add_row(name, state, overview.silent.get(name, activity), lag)
    if overview.rows:
        counts = ", ".join(f"{name} {count:,}" for name, count in overview.rows.items())
        table.add_row("tables", "", counts, "")
    if overview.stream and overview.stream.drift.newest:
        newest = describe_drift(overview.stream.drift.newest[-1])
        table.add_row("drift", "", escape(f"{newest}; `aurora drift` shows all"), "")
    return table


def _describe_processes(overview: Overview) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield activity and lag of each process."""
    serve, stream, train, promoter = overview.serve, overview.stream, overview.train, overview.promoter
    yield "serve", ("", "") if serve is None else _describe_node(serve)
    yield "stream", ("", "") if stream is None else (_describe_stream(stream), f"{overview.trace_lag or 0:,} records")
    yield "train", ("", "") if train is None else (_describe_trainer(train), f"{overview.table_lag or 0:,} commits")
    yield "promoter", ("", "") if promoter is None else (_describe_promoter(promoter) + _suffix(promoter.error), "")


def _describe_node(serve: ServeStatus) -> tuple[str, str]:
    role = f" ({serve.role})" if serve.role in ("pinned", "canary", "previous") else ""
    if not serve.speculating:
        drafting = "speculation off"
    else:
        drafting = f"drafting {serve.draft_depth}" if serve.draft_depth else "drafting does not pay off"
    activity = f"version {serve.speculator or 'none'}{role}, {drafting}, "
    activity += "" if serve.acceptance_length is None else f"acceptance length {serve.acceptance_length:.2f}, "
    activity += "" if serve.speedup is None else f"{describe_speedup(serve.speedup, serve.saved_s)}, "
    activity += f"{serve.requests_finished:,} requests finished, {serve.requests_failed} failed"
    dropped = f", {serve.rows_dropped:,} dropped" if serve.rows_dropped else ""
    return activity + _suffix(serve.registry_error), f"{serve.rows_pending:,} rows to publish{dropped}"


def _describe_stream(stream: StreamStatus) -> str:
    activity = f"{stream.rows_written:,} rows in {stream.commits:,} commits"
    if stream.dead_letters:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(stream.dead_letters.items()))
        activity += f", {sum(stream.dead_letters.values()):,} dead letters ({reasons})"
    if stream.records_lost:
        activity += f", {stream.records_lost} records lost to retention"
    return activity + _suffix("; ".join(dict.fromkeys([*stream.not_live, *stream.not_ready])))


def _describe_trainer(train: TrainStatus) -> str:
    loss = "none yet" if train.loss is None else f"{train.loss:.3f}"
    activity = f"step {train.step:,}, loss {loss}, {len(train.registered)} versions registered"
    if train.rollbacks:
        activity += f", rolled back {train.rollbacks} times ({train.last_rollback})"
    return activity + _suffix(train.error)


def _describe_promoter(promoter: PromoterStatus) -> str:
    activity = f"champion {promoter.champion or 'none'}, candidate {promoter.candidate or 'none'}"
    activity += "".join(f"; {_describe_comparison(one)}" for one in promoter.comparisons)
    if promoter.cooldown_until is not None:
        activity += f"; promotes nothing before {_local_time(promoter.cooldown_until)}"
    return escape(activity + (f"; rolled back: {promoter.last_rollback}" if promoter.last_rollback else ""))


def _describe_comparison(comparison: ComparisonStatus) -> str:
    """Describe a canary analysis or a post-promotion watch."""
    figures = [
        f"{one.figure} {one.difference:+.1%} ({one.low:+.1%} .. {one.high:+.1%})"
        for one in comparison.figures
        if one.label is None
    ]
    return ", ".join(
        [
            f"{comparison.kind} {comparison.version} against {comparison.baseline}",
            f"{comparison.requests:,} and {comparison.baseline_requests:,} requests",
            *figures,
            f"until {_local_time(comparison.end_time)} at the latest",
        ]
    )


def describe_speedup(speedup: float, saved_s: float) -> str:
    """Describe what drafts give: the present speed-up, and the seconds of decoding that they have saved."""
    return f"{speedup:.2f}x without drafts, {abs(saved_s):,.0f} s {'saved' if saved_s >= 0 else 'lost'}"


def describe_drift(event: DriftEvent, *, utc: bool = False) -> str:
    """Describe a drift event, in local time or in UTC."""
    before, after = event.before, event.after
    zone = UTC if utc else None
    detected, since = event.time.astimezone(zone), event.since.astimezone(zone)
    at = since.strftime("%H:%M" if since.date() == detected.date() else "%Y-%m-%d %H:%M") + (" UTC" if utc else "")
    label = "" if event.label is None else f" on label {_printable(event.label)}"
    return (
        f"version {_printable(event.speculator)}{label} is accepted "
        f"{'less' if event.direction == 'fall' else 'more'} often since {at}: its first token "
        f"{after.first_token_acceptance:.0%} instead of {before.first_token_acceptance:.0%}, "
        f"acceptance length {after.acceptance_length:.2f} instead of {before.acceptance_length:.2f} "
        f"({after.requests:,} requests since, {before.requests:,} before)"
        f"{_describe_draft_tokens(before, after)}"
    )


def _describe_draft_tokens(before: AcceptanceStats, after: AcceptanceStats) -> str:
    """Mention a changed number of draft tokens, which by itself changes the acceptance length."""
    if abs(after.draft_tokens - before.draft_tokens) < NOTABLE_DRAFT_CHANGE * before.draft_tokens:
        return ""
    return f"; {after.draft_tokens:.1f} draft tokens per step, {before.draft_tokens:.1f} before"


def _printable(text: str) -> str:
    """Escape control characters: clients choose labels."""
    return text if text.isprintable() else ascii(text)


def _local_time(unix: float) -> str:
    return f"{datetime.fromtimestamp(unix, UTC).astimezone():%H:%M:%S}"


def _suffix(error: str | None) -> str:
    return f"; {error}" if error else ""
