"""The promoter process: promote better candidates, roll back worse versions, and record every alias move.

It handles all lines of the registry, so it needs neither a target nor torch. It has no state that could be lost: each
poll derives the next action (``trainer.release.promotion_policy``) from the aliases, the candidate's tags, the recorded
moves and the traces. If another process left a move unfinished, the poll finishes it first
(``trainer.release.alias_moves``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic import ValidationError

from pipeline.delta import DeltaLog, TableError
from schemas.events import QUARANTINED_TAG, AliasChange
from schemas.settings import Settings
from schemas.status import ComparedStatus, ComparisonStatus, PromoterStatus
from schemas.telemetry import logs, spans
from schemas.telemetry.metrics import counter_by, register_process_metrics
from trainer.release import promotion_policy
from trainer.release.alias_moves import (
    AliasMover,
    MoveError,
    new_intent,
    plan_anchor,
    plan_canary,
    plan_promotion,
    plan_rollback,
)
from trainer.release.audit import AuditLog, BrokerError, KafkaEvents
from trainer.release.gate import HeldOutComparison, judge_candidate
from trainer.release.live_figures import LiveFigures
from trainer.release.promotion_policy import (
    CanaryAnalysis,
    LineState,
    LiveComparisons,
    NextAction,
    PostPromotionWatch,
)
from trainer.release.registry import Line, RegistryError, SpeculatorRegistry
from trainer.release.sequential_test import Comparison, Criteria, compare
from trainer.release.version_retention import VersionPruner
from trainer.status import ErrorTracker, Pages, StatusServer, stop_on_signals

log = structlog.get_logger()

PARTS = ("registry", "tables", "moves", "broker", "pruning")
"""Whose errors are counted."""
_ALIASES = ("candidate", "canary", "champion", "previous")


def run(settings: Settings, pages: Pages | None = None) -> None:
    """Promote versions until SIGTERM or SIGINT.

    Args:
        settings: All settings.
        pages: Pages to serve beside the status.

    Raises:
        SettingsError: the address of the status page is in use, or a Kafka option is unknown.
    """
    logs.configure("promoter")
    spans.configure("promoter", settings.telemetry)
    stopping = stop_on_signals()
    registry, tables = SpeculatorRegistry(settings.registry), DeltaLog(settings.tables)
    promoter = Promoter(settings, registry, tables, KafkaEvents(settings.kafka))
    at = settings.promoter
    with StatusServer("promoter", at.host, at.port, promoter.status, promoter.metrics, pages):
        promoter.run(stopping)
    spans.close()


class Promoter:
    """Moves ``canary``, ``champion`` and ``previous``, and records the moves of all aliases."""

    def __init__(
        self,
        settings: Settings,
        registry: SpeculatorRegistry,
        tables: DeltaLog,
        events: KafkaEvents,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics = CollectorRegistry()
        register_process_metrics(self.metrics)
        self._settings = settings.promoter
        self._canary = settings.canary
        self._registry = registry
        self._audit = AuditLog(tables, registry, events)
        self._mover = AliasMover(tables, registry)
        self._live_figures = LiveFigures(tables, settings.canary)
        self._pruner = VersionPruner(settings.promoter, registry, tables, clock)
        self._clock = clock
        self._errors = ErrorTracker("promoter", PARTS, self.metrics)
        self._metrics = PromoterMetrics(self.metrics)
        self._alias_moves = 0
        self._line: Line | None = None
        self._actions: dict[str, NextAction] = {}
        self._live = LiveComparisons()
        self._cooldown_until: float | None = None
        self._last_rollback: str | None = None

    def run(self, stopping: threading.Event) -> None:
        """Poll until ``stopping`` is set."""
        while not stopping.is_set():
            self.poll()
            stopping.wait(self._settings.poll_interval)

    def poll(self) -> None:
        """Handle every line once: finish an open move, record moves, take the next action, and delete old versions."""
        with self._errors.catch("registry", RegistryError):
            lines = self._registry.lines()
            self._metrics.clear_comparisons()
            for line in lines:
                with self._errors.catch("tables", TableError), self._errors.catch("moves", MoveError):
                    self._poll_line(line)
            for line in filter(lambda line: self._pruner.is_due(line.name), lines):
                # Whatever an artifact store raises, promotion continues.
                with self._errors.catch("pruning", Exception):
                    self._prune(line.name)
        with self._errors.catch("broker", BrokerError):
            self._audit.send_events()

    def _poll_line(self, line: Line) -> None:
        if self._mover.finish_open(line.name):
            line = replace(line, aliases=self._registry.aliases(line.name))
        self._record_moves(line)
        state, now = self._read_state(line), self._clock()
        self._live = self._compare_versions(line.name, state, now)
        self._cooldown_until = promotion_policy.find_cooldown_end(state.intents, now, self._settings)
        self._last_rollback = promotion_policy.find_last_rollback(state.intents)
        self._metrics.show_line(line.name, self._live, self._cooldown_until)
        action = promotion_policy.choose_action(state, self._live, now, self._canary, self._settings)
        self._log_action(line.name, action)
        if action.kind == "wait":
            return
        try:
            self._take_action(line, action)
            self._last_rollback = promotion_policy.find_last_rollback(self._mover.intents(line.name))
        finally:
            # Also after an incomplete move: the record follows the registry's aliases.
            self._record_moves(replace(line, aliases=self._registry.aliases(line.name)))

    def status(self) -> PromoterStatus:
        """Return the line that changed last and the last decision on it; called from other threads."""
        aliases = self._line.aliases if self._line else {}
        action, live = self._actions.get(self._line.name) if self._line else None, self._live
        return PromoterStatus(
            champion=aliases.get("champion"),
            candidate=aliases.get("candidate"),
            previous=aliases.get("previous"),
            canary=aliases.get("canary"),
            alias_moves=self._alias_moves,
            verdict=action.why if action else None,
            comparisons=[_comparison_status(*one) for one in (live.canary, live.watch) if one is not None],
            last_rollback=self._last_rollback,
            cooldown_until=self._cooldown_until,
            error=self._errors.summary,
        )

    def _read_state(self, line: Line) -> LineState:
        candidate, champion = line.aliases.get("candidate"), line.aliases.get("champion")
        tags = {version: self._registry.tags(line.name, version) for version in set(line.aliases.values())}
        return LineState(
            line.aliases,
            self._audit.moves(line.name),
            self._mover.intents(line.name),
            {version for version, of_version in tags.items() if QUARANTINED_TAG in of_version},
            judge_candidate(candidate, champion, tags.get(candidate or "", {}), self._settings),
        )

    def _compare_versions(self, line: str, state: LineState, now: float) -> LiveComparisons:
        """Compare versions on live traffic if a canary analysis or a watch runs."""
        canary = promotion_policy.find_canary_analysis(state, self._settings) if self._canary.share else None
        watch = promotion_policy.find_watch(state, self._settings) if self._canary.anchor_share else None
        if watch is not None and now >= watch.until:
            watch = None
        if canary is None and watch is None:
            self._live_figures.forget(line)
            return LiveComparisons()
        since = min(one.since for one in (canary, watch) if one is not None)

        def compare_live(one: CanaryAnalysis | PostPromotionWatch, criteria: Criteria) -> Comparison:
            return compare(*self._live_figures.read_traffic(line, *one.sides, since), criteria)

        return LiveComparisons(
            None
            if canary is None
            else (canary, compare_live(canary, promotion_policy.canary_criteria(self._settings))),
            None if watch is None else (watch, compare_live(watch, promotion_policy.watch_criteria(self._settings))),
        )

    def _log_action(self, line: str, action: NextAction) -> None:
        """Log a decision that differs from the last; changed figures of a canary analysis are only in the status."""
        before, self._actions[line] = self._actions.get(line), action
        changed = before is None or (before.kind, before.version) != (action.kind, action.version)
        if changed or (self._live.canary is None and before is not None and before.why != action.why):
            log.info("action_chosen", line=line, action=action.kind, version=action.version, why=action.why)

    def _take_action(self, line: Line, action: NextAction) -> None:
        """Quarantine and move aliases; the quarantine comes first, so that no restart promotes the version again."""
        assert action.version is not None, "every action but waiting has a version"
        if action.quarantine:
            self._registry.quarantine(line.name, action.version, action.why)
            alias = "champion" if action.kind == "rollback" else "canary"
            log.warning(
                "version_rolled_back",
                line=line.name,
                alias=alias,
                version=action.version,
                why=action.why,
                figures=dict(action.figures),
            )
            self._metrics.rollbacks.labels(alias).inc()
        changes = self._plan_changes(line, action)
        figures = dict(action.figures) or self._held_out_figures(line.name, action.version)
        self._mover.move(
            new_intent(line.name, action.kind, changes, actor=promotion_policy.ACTOR, why=action.why, figures=figures)
        )

    def _plan_changes(self, line: Line, action: NextAction) -> list[AliasChange]:
        match action.kind:
            case "promote":
                return plan_promotion(line.aliases, action.version or "", watched=self._canary.anchor_share > 0)
            case "start_canary":
                return plan_canary(line.aliases, action.version)
            case "end_canary":
                return plan_canary(line.aliases, None)
            case "end_watch":
                return plan_anchor(line.aliases)
            case _:
                return plan_rollback(line.aliases, line.aliases["previous"])

    def _record_moves(self, line: Line) -> None:
        """Write the missing rows of a line."""
        self._line = line
        for move in self._audit.record(line, self._mover.intents(line.name)):
            self._metrics.alias_moves.labels(move.alias).inc()
            self._alias_moves += 1

    def _prune(self, line: str) -> None:
        for version in self._pruner.prune(line, self._audit.moves(line)):
            self._metrics.versions_pruned.inc()
            log.info("version_pruned", line=line, version=version)

    def _held_out_figures(self, line: str, version: str) -> dict[str, float]:
        with suppress(ValidationError):
            return HeldOutComparison.from_tags(self._registry.tags(line, version)).figures
        return {}


class PromoterMetrics:
    """Prometheus metrics of the promoter."""

    def __init__(self, metrics: CollectorRegistry) -> None:
        self.alias_moves = counter_by(
            "aurora_promoter_alias_moves", "Recorded alias moves, by alias.", "alias", _ALIASES, metrics
        )
        self.rollbacks = counter_by(
            "aurora_promoter_rollbacks",
            "Versions that the promoter rolled back, by the alias that they had.",
            "alias",
            ("canary", "champion"),
            metrics,
        )
        self.versions_pruned = Counter(
            "aurora_promoter_versions_pruned", "Versions deleted by promoter.keep_versions.", registry=metrics
        )
        self._difference = Gauge(
            "aurora_promoter_canary_difference_ratio",
            "Relative difference by which a canary is better than the champion, or a watch's versions than the anchor.",
            ["line", "kind", "figure"],
            registry=metrics,
        )
        self._cooldown_until = Gauge(
            "aurora_promoter_cooldown_until_timestamp_seconds",
            "Unix time until which nothing is promoted after rollbacks; 0 without a cooldown.",
            ["line"],
            registry=metrics,
        )

    def clear_comparisons(self) -> None:
        """Remove the series of comparisons that have ended."""
        self._difference.clear()

    def show_line(self, line: str, live: LiveComparisons, cooldown_until: float | None) -> None:
        """Set the series of a line."""
        self._cooldown_until.labels(line).set(cooldown_until or 0.0)
        for kind, one in (("canary", live.canary), ("watch", live.watch)):
            for estimate in one[1].overall if one else ():
                self._difference.labels(line, kind, estimate.figure).set(estimate.difference)


def _comparison_status(one: CanaryAnalysis | PostPromotionWatch, comparison: Comparison) -> ComparisonStatus:
    return ComparisonStatus(
        kind="canary" if isinstance(one, CanaryAnalysis) else "watch",
        version=one.version,
        baseline=one.baseline,
        start_time=one.since,
        end_time=one.until,
        requests=comparison.new_requests,
        baseline_requests=comparison.old_requests,
        figures=[
            ComparedStatus(
                figure=estimate.figure,
                label=estimate.label,
                new=estimate.new,
                before=estimate.old,
                difference=estimate.difference,
                low=estimate.low,
                high=estimate.high,
            )
            for estimate in (*comparison.overall, *comparison.labels)
        ],
    )
