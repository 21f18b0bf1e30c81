"""The promoting process: makes a better candidate the champion, takes it back if it is none, and keeps the record.

It looks at all lines of the registry, so that it needs neither a target nor torch. Nothing is remembered that could be
lost: each pass derives what to do (``trainer.release.promotion``) from the aliases, the tags of the candidate, the
rows written
so far and the traces. A move that another process began and did not finish is finished first
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
from trainer.release import alias_moves, promotion
from trainer.release.alias_moves import MoveError, Mover
from trainer.release.audit import Audit, BrokerError, KafkaEvents
from trainer.release.gate import HeldOut, judge
from trainer.release.live_figures import LiveFigures
from trainer.release.promotion import Seen, Step, Trial, Watch, Written
from trainer.release.recording import record, rollback_of
from trainer.release.registry import Line, RegistryError, SpeculatorRegistry
from trainer.release.sequential_test import Rule, Standing, compare
from trainer.status import Failures, StatusServer, stop_on_signals

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Promote until SIGTERM or SIGINT.

    Raises:
        SettingsError: the address of the status page is taken, or a Kafka option is unknown.
    """
    logs.configure("promoter")
    spans.configure("promoter", settings.telemetry)
    stopping = stop_on_signals()
    tables, registry = DeltaLog(settings.tables), SpeculatorRegistry(settings.registry)
    audit = Audit(tables, KafkaEvents(settings.kafka))
    live = LiveFigures(tables, settings.canary.slice_duration)
    promoter = Promoter(settings, registry, audit, Mover(tables, registry), live)
    page = settings.promoter
    with StatusServer("promoter", page.host, page.port, promoter.status, promoter.metrics):
        promoter.run(stopping)
    spans.close()


class Promoter:
    """Moves ``canary``, ``champion`` and ``previous``, and records the moves of all aliases."""

    def __init__(
        self,
        settings: Settings,
        registry: SpeculatorRegistry,
        audit: Audit,
        mover: Mover,
        live: LiveFigures,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics = CollectorRegistry()
        self._settings = settings.promoter
        self._share = settings.canary.share
        self._registry = registry
        self._audit = audit
        self._mover = mover
        self._live = live
        self._clock = clock
        self._failures = Failures("promoter", self.metrics)
        self._gauges = _Gauges(self.metrics)
        self._moved = 0
        self._line: Line | None = None
        self._steps: dict[str, Step] = {}
        self._seen = Seen()
        self._cooling: float | None = None
        self._taken_back: str | None = None

    def run(self, stopping: threading.Event) -> None:
        """Poll until told to stop."""
        while not stopping.is_set():
            self.poll()
            stopping.wait(self._settings.poll_interval)

    def poll(self) -> None:
        """Look at every line once: finish what was begun, record what was moved, and decide."""
        with self._failures.survive("registry", RegistryError):
            lines = self._registry.lines()
            self._gauges.forget()
            for line in lines:
                with self._failures.survive("tables", TableError), self._failures.survive("moves", MoveError):
                    self._look_at(line)
        with self._failures.survive("broker", BrokerError):
            self._audit.send()

    def _look_at(self, line: Line) -> None:
        if self._mover.finish(line.name):
            line = replace(line, aliases=self._registry.aliases(line.name))
        self._record(line)
        written, now = self._written(line), self._clock()
        self._seen = self._look(line.name, written, now)
        self._cooling = promotion.cooling_until(written.intents, now, self._settings)
        self._taken_back = promotion.taken_back(written.intents)
        self._gauges.seen(line.name, self._seen, cooling_s=max((self._cooling or now) - now, 0.0))
        step = promotion.next_step(written, self._seen, now, self._share, self._settings)
        self._tell(line.name, step)
        if step.what == "wait":
            return
        try:
            self._make(line, step)
            self._taken_back = promotion.taken_back(self._mover.intents(line.name))
        finally:
            # Also after half a move: what is recorded is what the registry says.
            self._record(replace(line, aliases=self._registry.aliases(line.name)))

    def status(self) -> PromoterStatus:
        """The line that changed last, and what was decided on it; called from other threads."""
        aliases = self._line.aliases if self._line else {}
        step, seen = self._steps.get(self._line.name) if self._line else None, self._seen
        return PromoterStatus(
            champion=aliases.get("champion"),
            candidate=aliases.get("candidate"),
            previous=aliases.get("previous"),
            canary=aliases.get("canary"),
            alias_moves=self._moved,
            verdict=step.why if step else None,
            comparisons=[_status(*one) for one in (seen.trial, seen.watch) if one is not None],
            last_rollback=self._taken_back,
            cooldown_until=self._cooling,
            error=self._failures.summary,
        )

    def _written(self, line: Line) -> Written:
        candidate, champion = line.aliases.get("candidate"), line.aliases.get("champion")
        tags = {version: self._registry.tags(line.name, version) for version in set(line.aliases.values())}
        verdict = judge(candidate, champion, tags.get(candidate or "", {}), self._settings)
        return Written(
            line.aliases,
            self._audit.moves(line.name),
            self._mover.intents(line.name),
            {version for version, of in tags.items() if QUARANTINED_TAG in of},
            verdict,
        )

    def _look(self, line: str, written: Written, now: float) -> Seen:
        """How the versions of a line do on live traffic, where anybody asks."""
        trial = promotion.trial_of(written, self._settings) if self._share else None
        watch = promotion.watch_of(written, now, self._settings)
        if trial is None and watch is None:
            self._live.forget(line)
            return Seen()
        since = min(span.since for one in (trial, watch) if one is not None for span in one.spans)

        def compared(one: Trial | Watch, rule: Rule) -> Standing:
            return compare(*self._live.pair(line, *one.spans, since), rule)

        return Seen(
            None if trial is None else (trial, compared(trial, promotion.trial_rule(self._settings))),
            None if watch is None else (watch, compared(watch, promotion.watch_rule(self._settings))),
        )

    def _tell(self, line: str, step: Step) -> None:
        """Log what is decided when it changes; a trial's figures change all the time, and are in the status."""
        before, self._steps[line] = self._steps.get(line), step
        news = before is None or (before.what, before.version) != (step.what, step.version)
        if news or (self._seen.trial is None and before is not None and before.why != step.why):
            log.info("judged", line=line, what=step.what, version=step.version, why=step.why)

    def _make(self, line: Line, step: Step) -> None:
        """Take a step: the quarantine first, so that after a crash the version is not taken again."""
        assert step.version is not None, "every step but waiting is about a version"
        assert step.what != "wait", "there is nothing to make"
        if step.quarantine:
            self._registry.quarantine(line.name, step.version, step.why)
            self._alert(line.name, step)
        changes = self._changes(line, step)
        figures = dict(step.figures) or self._held_out(line.name, step.version)
        wanted = alias_moves.intent(line.name, step.what, changes, actor=promotion.ACTOR, why=step.why, figures=figures)
        self._mover.move(wanted)

    def _changes(self, line: Line, step: Step) -> list[AliasChange]:
        match step.what:
            case "promote":
                return alias_moves.promotion(line.aliases, step.version or "")
            case "start_canary":
                return alias_moves.trial(line.aliases, step.version)
            case "end_canary":
                return alias_moves.trial(line.aliases, None)
            case _:
                return rollback_of(self._audit, self._registry, line)

    def _alert(self, line: str, step: Step) -> None:
        """Tell that a version is taken back and is in quarantine."""
        alias = "champion" if step.what == "rollback" else "canary"
        log.warning(
            "taken_back", line=line, alias=alias, version=step.version, why=step.why, figures=dict(step.figures)
        )
        self._gauges.taken_back.labels(alias).inc()

    def _record(self, line: Line) -> None:
        """Write the rows that are missing for the aliases of a line, and stamp the line with what is recorded."""
        self._line = line
        for moved in record(self._audit, self._mover, self._registry, line):
            self._gauges.moves.labels(moved.alias).inc()
            self._moved += 1

    def _held_out(self, line: str, version: str) -> dict[str, float]:
        with suppress(ValidationError):
            return HeldOut.of(self._registry.tags(line, version)).figures
        return {}


class _Gauges:
    """What dashboards see."""

    def __init__(self, metrics: CollectorRegistry) -> None:
        self.moves = Counter("aurora_promoter_moves", "Alias moves recorded.", ["alias"], registry=metrics)
        self.taken_back = Counter(
            "aurora_promoter_taken_back",
            "Versions that were taken back automatically, by the alias that they had.",
            ["alias"],
            registry=metrics,
        )
        for alias in ("canary", "champion"):
            self.taken_back.labels(alias)  # the first one counts only where there was a zero before
        self._difference = Gauge(
            "aurora_promoter_difference",
            "Share by which a canary is better than the champion, or a watched champion than the one before.",
            ["line", "kind", "figure"],
            registry=metrics,
        )
        self._cooling = Gauge(
            "aurora_promoter_cooling_seconds",
            "For how long nothing is promoted, because versions were taken back.",
            ["line"],
            registry=metrics,
        )

    def forget(self) -> None:
        """Show nothing of trials that are over."""
        self._difference.clear()

    def seen(self, line: str, seen: Seen, cooling_s: float) -> None:
        """Show how trial and watch stand."""
        self._cooling.labels(line).set(cooling_s)
        for kind, one in (("trial", seen.trial), ("watch", seen.watch)):
            for estimate in one[1].overall if one else ():
                self._difference.labels(line, kind, estimate.figure).set(estimate.difference)


def _status(one: Trial | Watch, standing: Standing) -> ComparisonStatus:
    return ComparisonStatus(
        kind="canary" if isinstance(one, Trial) else "watch",
        version=one.version,
        baseline=one.spans[1].version,
        start_time=one.since,
        end_time=one.until,
        requests=standing.new_requests,
        baseline_requests=standing.old_requests,
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
            for estimate in (*standing.overall, *standing.labels)
        ],
    )
