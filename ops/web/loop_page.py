"""The page of the loop: what each process does, versions with their lineage, drift and dead letters on one screen.

``GET /`` shows, and needs no token. ``GET /move`` has the forms that promote and roll back, and ``POST /move`` carries
them out for a client that sends ``promoter.admin_token``, as the form field ``token`` or as ``Authorization: Bearer``;
never in a URL. There are no cookies, so another site's form cannot act in the name of a person: it does not know the
token. A form also names the champion that its page showed, so one that is sent twice moves nothing twice.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, quote

import structlog

from ops.cli.versions import describe_version
from ops.observe.status import describe_drift
from ops.report.page import format_number, render_page
from ops.web.line_chart import ChartLine, ChartMark, draw_lines
from ops.web.loop_reader import HISTORY_S, STATUS_INTERVAL_S, LoopReader, LoopState, Reading, RegisteredLine
from pipeline.delta import TableError
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.status import ComparisonStatus, ServeStatus
from trainer.release.alias_moves import MoveError
from trainer.release.manual_moves import ManualMove, ManualMoves, registry_failures
from trainer.release.registry import SpeculatorRegistry, Version
from trainer.status import PageAnswer

log = structlog.get_logger()

ACTOR = "web page"
"""Who made a move of the page, in the audit record."""
STALE_S = 60.0
"""Readings of registry and tables that are older are shown with their age."""
_VERSIONS, _MOVES, _EVENTS, _TRAFFIC = 12, 8, 6, 8
_SPANS_S = (600.0, 1200.0, 2400.0, HISTORY_S)
"""Spans of the charts; a quarter of each is a round time."""
_FORM_FIELDS = 12
_FORCE = "despite the gate or a quarantine"
"""Label of the box on the form."""
_TEMPLATES = Path(__file__).parent
_HEADERS = {
    "Cache-Control": "no-store",
    # Templates have one style sheet and no script; nothing is loaded, and no other page may frame this one.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class LoopPage:
    """Serves the page; reads the loop while the context is open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reader = LoopReader(settings)
        self._moving = threading.Lock()

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def get(self, path: str, query: str) -> PageAnswer | None:
        """Return the page, or the forms."""
        asked = _parse(query)
        if path == "/":
            body = render_loop(self._reader.state(), time.time(), asked.get("line"), may_move=self._has_token)
            return _page(HTTPStatus.OK, body, {"Refresh": f"{STATUS_INTERVAL_S:g}"})
        if path == "/move":
            return self._forms(HTTPStatus.OK, asked)
        return None

    def post(self, path: str, headers: Message[str, str], form: bytes) -> PageAnswer | None:
        """Promote or roll back, then lead back to the page."""
        if path != "/move":
            return None
        sent = _parse(form.decode(errors="replace"))
        # Browsers say where a form comes from; other clients do not.
        if headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
            return self._forms(HTTPStatus.FORBIDDEN, sent, "The form is another site's.")
        if not self._has_token:
            why = "This page is read-only: set promoter.admin_token to promote and roll back here."
            return self._forms(HTTPStatus.FORBIDDEN, sent, why)
        if not self._is_authorized(headers.get("Authorization", ""), sent.get("token", "")):
            log.warning("page_token_rejected")
            return self._forms(HTTPStatus.UNAUTHORIZED, sent, "The token is not that of promoter.admin_token.")
        try:
            with self._moving, registry_failures():
                self._move(sent)
        except (UserError, TableError) as error:
            return self._forms(HTTPStatus.CONFLICT, sent, str(error))
        self._reader.refresh()
        # A redirection: reloading the page sends nothing again.
        return _page(HTTPStatus.SEE_OTHER, "", {"Location": f"/?line={quote(sent['line'], safe='')}"})

    @property
    def _has_token(self) -> bool:
        return bool(self._settings.promoter.admin_token.get_secret_value())

    def _is_authorized(self, authorization: str, token: str) -> bool:
        """Return whether one of both is the token; the time does not depend on how they differ."""
        scheme, _, bearer = authorization.partition(" ")
        wanted = self._settings.promoter.admin_token.get_secret_value().encode()
        # Header values arrive as latin-1, fields as UTF-8.
        header = bearer.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        return hmac.compare_digest(header, wanted) | hmac.compare_digest(token.encode(errors="replace"), wanted)

    def _move(self, sent: Mapping[str, str]) -> None:
        registry = SpeculatorRegistry(self._settings.registry)
        moves = ManualMoves(self._settings, registry, override=f'the box "{_FORCE}"')
        line = next((line for line in registry.lines() if line.name == sent.get("line")), None)
        if line is None:
            raise MoveError(f"no line {sent.get('line', '')!r} in the registry")
        moves.finish_open(line)
        if line.aliases.get("champion", "") != sent.get("champion", ""):
            raise MoveError(
                f"champion is version {line.aliases.get('champion', 'none')}, not {sent.get('champion') or 'none'} as "
                "the form says: look at the aliases and decide again"
            )
        made = moves.make(self._plan(moves, registry, RegisteredLine(line, ()), sent))
        if made:
            log.warning("event_not_sent", why=made)

    def _plan(
        self, moves: ManualMoves, registry: SpeculatorRegistry, of: RegisteredLine, sent: Mapping[str, str]
    ) -> ManualMove:
        line, force, why = of.line, sent.get("force") == "on", sent.get("why", "")
        if sent.get("action") == "rollback":
            return moves.plan_rollback(line, force=force, why=why, actor=ACTOR)
        number = sent.get("version", "")
        version = registry.version(line.name, number) if number.isdecimal() else None
        if version is None or sent.get("action") not in {"champion", "canary"}:
            raise MoveError(f"line {line.name} has no version {number!r}")
        to = "champion" if sent["action"] == "champion" else "canary"
        return moves.plan_promotion(line, version, to, force=force, why=why, actor=ACTOR)  # type: ignore[arg-type]

    def _forms(self, status: HTTPStatus, sent: Mapping[str, str], error: str = "") -> PageAnswer:
        """Return the forms, with what was sent but the token."""
        of = find_line(self._reader.state().lines, sent.get("line"))
        values = {
            "line": of.line.name if of else sent.get("line", ""),
            "champion": of.line.aliases.get("champion", "") if of else "",
            "previous": of.line.aliases.get("previous", "") if of else "",
            "versions": [version.number for version in reversed(of.versions)] if of else [],
            "sent": {"version": "", "why": ""} | dict(sent),
            "error": error,
            "may_move": self._has_token,
            "force": _FORCE,
        }
        return _page(status, render_page(_TEMPLATES / "move_page.html", **values), {})


def _page(status: HTTPStatus, body: str, headers: Mapping[str, str]) -> PageAnswer:
    return PageAnswer(status, body.encode(), headers={**_HEADERS, **headers})


def _parse(text: str) -> dict[str, str]:
    """Return the fields of a query or a form; none if they are malformed."""
    with suppress(ValueError):
        return {name: values[-1].strip() for name, values in parse_qs(text, max_num_fields=_FORM_FIELDS).items()}
    return {}


def find_line(lines: Reading[tuple[RegisteredLine, ...]], named: str | None) -> RegisteredLine | None:
    """Return the line with a name, or the one that changed last; None without lines."""
    found = lines.value or ()
    return next((one for one in found if one.line.name == named), found[0] if found else None)


def render_loop(state: LoopState, now: float, named: str | None, *, may_move: bool) -> str:
    """Return the page.

    Args:
        state: What was read last.
        now: Unix time.
        named: Line to show; None for the one that changed last.
        may_move: Whether the page links to the forms.
    """
    of, overview = find_line(state.lines, named), state.overview
    node = overview.serve
    swaps = [ChartMark(swap.time, f"v{swap.version}") for swap in (node.swaps if node else [])]
    samples = state.samples
    age = now - samples[0].time if samples else 0.0
    span = next((span for span in _SPANS_S if span >= age), HISTORY_S)
    rates = [(one.time, one.tokens_per_s) for one in samples]
    undrafted = [(one.time, one.undrafted_tokens_per_s) for one in samples if one.undrafted_tokens_per_s is not None]
    lengths = [(one.time, one.acceptance_length) for one in samples if one.acceptance_length is not None]
    return render_page(
        _TEMPLATES / "loop_page.html",
        line=of.line.name if of else None,
        other_lines=[one.line.name for one in state.lines.value or () if of is None or one.line.name != of.line.name],
        time=_utc(now),
        may_move=may_move,
        figures=_figures(state),
        throughput=draw_lines(
            [ChartLine(undrafted, "--level", dashed=True), ChartLine(rates, "--series")],
            swaps,
            now,
            span,
            "Output tokens per second over time",
        ),
        acceptance=draw_lines([ChartLine(lengths, "--series-3")], swaps, now, span, "Acceptance length over time"),
        processes=list(_processes(state, now)),
        versions=_versions(of, now) if of else [],
        comparisons=[_comparison(one) for one in (overview.promoter.comparisons if overview.promoter else [])],
        promoter=_promoter_lines(state),
        moves=_moves(state, of),
        drift=[describe_drift(event, utc=True) for event in reversed(overview.stream.drift.newest[-_EVENTS:])]
        if overview.stream
        else [],
        traffic=_traffic(state),
        letters=[
            (_utc(one.time.timestamp()), str(one.address), one.reason, "replayed" if one.replays else "")
            for one in state.dead_letters.value or ()
        ],
        letter_counts=sorted(overview.stream.dead_letters.items()) if overview.stream else [],
        stream_answers=overview.stream is not None,
        faults={
            name: _fault(reading, now)
            for name, reading in (
                ("registry", state.lines),
                ("moves", state.moves),
                ("letters", state.dead_letters),
            )
        },
    )


def _figures(state: LoopState) -> list[tuple[str, str]]:
    """Return the headline figures: value and name."""
    node, samples = state.overview.serve, state.samples
    latest = samples[-1] if samples else None
    saved = None if node is None or node.speedup is None else node.saved_s
    return [
        ("-" if node is None or node.speedup is None else f"{node.speedup:.2f}x", "output rate against no drafts"),
        ("-" if saved is None else f"{'-' if saved < 0 else ''}{_duration(abs(saved))}", "decoding time saved"),
        ("-" if latest is None else f"{latest.tokens_per_s:,.0f}", "output tokens/s"),
        (format_number(latest.acceptance_length if latest else None), "acceptance length"),
        ((node and node.speculator) or "-", "version that drafts"),
        ("-" if state.overview.trace_lag is None else f"{state.overview.trace_lag:,}", "records not in the tables"),
    ]


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process on the page."""

    name: str
    state: str
    is_well: bool
    facts: list[tuple[str, str]] = field(default_factory=list)
    """Name and value of its figures."""


def _processes(state: LoopState, now: float) -> Iterator[ProcessRow]:
    overview = state.overview
    node, stream, train, promoter = overview.serve, overview.stream, overview.train, overview.promoter
    if node is None:
        yield _silent("node", "serve", state)
    else:
        yield _node_row(node)
    if stream is None:
        yield _silent("stream worker", "stream", state)
    else:
        problems = list(dict.fromkeys([*stream.not_live, *stream.not_ready]))
        age = "never" if stream.last_commit_time is None else f"{_duration(now - stream.last_commit_time)} ago"
        yield ProcessRow(
            "stream worker",
            "; ".join(problems) or "ready",
            not problems,
            [
                ("rows written", f"{stream.rows_written:,}"),
                ("last commit", age),
                ("lag by partition", ", ".join(f"{p.partition}: {p.lag:,}" for p in stream.partitions) or "-"),
                ("lost to retention", f"{stream.records_lost:,}"),
            ],
        )
    if train is None:
        yield _silent("trainer", "train", state)
    else:
        newest = train.newest_sample_age_s
        yield ProcessRow(
            "trainer",
            train.error or "ready",
            train.error is None,
            [
                ("step", f"{train.step:,}"),
                ("loss", format_number(train.loss, 3)),
                ("acceptance length, held-out", format_number(train.acceptance_length)),
                ("lag, commits", f"{overview.table_lag or 0:,}"),
                ("newest sample", "-" if newest is None else f"{_duration(newest)} old"),
                ("rollbacks", str(train.rollbacks)),
            ],
        )
    if promoter is None:
        yield _silent("promoter", "promoter", state)
    else:
        yield ProcessRow(
            "promoter",
            promoter.error or "ready",
            promoter.error is None,
            [
                ("champion", promoter.champion or "-"),
                ("candidate", promoter.candidate or "-"),
                ("anchor", promoter.previous or "-"),
                ("alias moves", f"{promoter.alias_moves:,}"),
            ],
        )


def _silent(title: str, name: str, state: LoopState) -> ProcessRow:
    return ProcessRow(title, state.overview.silent.get(name, "not read yet"), is_well=False)


def _node_row(node: ServeStatus) -> ProcessRow:
    if not node.engine_up:
        state = "its engine is down"
    elif node.draining:
        state = "drains"
    else:
        state = node.registry_error or "ready"
    depth = str(node.draft_depth) if node.speculating else "speculation is off"
    return ProcessRow(
        f"node {node.node}",
        state,
        state == "ready",
        [
            ("version", f"{node.speculator or 'none'}{f' ({node.role})' if node.role else ''}"),
            ("draft depth", depth),
            ("acceptance length since the start", format_number(node.acceptance_length)),
            ("requests running, waiting", f"{node.requests_running:,}, {node.requests_waiting:,}"),
            ("requests finished, failed", f"{node.requests_finished:,}, {node.requests_failed:,}"),
            ("trace rows published, dropped", f"{node.rows_published:,}, {node.rows_dropped:,}"),
        ],
    )


def _versions(of: RegisteredLine, now: float) -> list[dict[str, Any]]:
    """Return the newest versions for their table, newest first; those with an alias are always in it."""
    named = set(of.line.aliases.values())
    newest = {version.number for version in of.versions[-_VERSIONS:]}
    return [_version_row(version, of, now) for version in reversed(of.versions) if version.number in newest | named]


def _version_row(version: Version, of: RegisteredLine, now: float) -> dict[str, Any]:
    described = describe_version(version, of.line)
    gain = "-" if described["gain_low"] is None else f"{described['gain_low']:+.3f} to {described['gain_high']:+.3f}"
    return {
        "number": version.number,
        "aliases": described["aliases"],
        "parent": described["parent"] or "-",
        "age": f"{_duration(now - version.registered.timestamp())} ago",
        "acceptance_length": format_number(described["acceptance_length"], 3),
        "compared": described["champion"] or "-",
        "gain": gain,
        "quarantined": described["quarantined"],
    }


def _comparison(one: ComparisonStatus) -> dict[str, Any]:
    """Return a canary analysis or a watch for the page, with the figures over all labels and by label."""
    return {
        "title": f"{'Canary analysis' if one.kind == 'canary' else 'Post-promotion watch'} of version {one.version} "
        f"against {one.baseline}",
        "requests": f"{one.requests:,} and {one.baseline_requests:,} requests; ends {_utc(one.end_time)} at the latest",
        "figures": [
            (
                figure.figure,
                figure.label if figure.label is not None else "all labels",
                f"{figure.difference:+.1%}",
                f"{figure.low:+.1%} to {figure.high:+.1%}",
            )
            for figure in one.figures
        ],
    }


def _promoter_lines(state: LoopState) -> list[str]:
    promoter = state.overview.promoter
    if promoter is None:
        return []
    lines = [promoter.verdict] if promoter.verdict else []
    if promoter.cooldown_until is not None:
        lines.append(f"Nothing is promoted before {_utc(promoter.cooldown_until)}.")
    if promoter.last_rollback:
        lines.append(f"Last rollback: {promoter.last_rollback}")
    return lines


def _moves(state: LoopState, of: RegisteredLine | None) -> list[tuple[str, ...]]:
    rows = [row for row in state.moves.value or () if of is None or row["line"] == of.line.name]
    return [
        (
            _utc(row["time"].timestamp()),
            row["alias"],
            row["from_version"] or "-",
            row["to_version"] or "-",
            row["actor"],
            row["why"],
        )
        for row in reversed(rows[-_MOVES:])
    ]


def _traffic(state: LoopState) -> list[tuple[str, ...]]:
    stream = state.overview.stream
    return [
        (
            one.speculator,
            one.label or "no label",
            f"{one.acceptance.requests:,}",
            f"{one.acceptance.first_token_acceptance:.0%}",
            f"{one.acceptance.acceptance_length:.2f}",
        )
        for one in (stream.drift.traffic[:_TRAFFIC] if stream else ())
    ]


def _fault(reading: Reading[Any], now: float) -> str | None:
    """Return why a part is missing or old; None if it is neither."""
    if reading.error is None:
        return "not read yet" if reading.time is None else None
    age = "" if reading.time is None else f"; this is {_duration(now - reading.time)} old"
    return f"{reading.error}{age}"


def _utc(unix: float) -> str:
    return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}" if unit != "min" else f"{seconds / size:.0f} min"
    return f"{max(seconds, 0):.0f} s"
