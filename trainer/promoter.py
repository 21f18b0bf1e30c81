"""The promoting process: makes a better candidate the champion, and keeps the record of every alias move.

It looks at all lines of the registry, so that it needs neither a target nor torch. Nothing is remembered that could be
lost: each pass derives what to do from the aliases, the tags of the candidate, and the rows written so far.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import structlog
from prometheus_client import CollectorRegistry, Counter
from pydantic import ValidationError

from pipeline.table import DeltaLog, TableError
from schemas import logs
from schemas.events import AliasMoved
from schemas.settings import Settings
from schemas.status import PromoterStatus
from trainer.audit import Audit, BrokerError, KafkaEvents, Move
from trainer.gate import HeldBack, Verdict, judge
from trainer.registry import Line, RegistryError, SpeculatorRegistry
from trainer.status import Failures, StatusServer, stop_on_signals

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Promote until SIGTERM or SIGINT.

    Raises:
        SettingsError: the address of the status page is taken, or a Kafka option is unknown.
    """
    logs.configure("promoter")
    stopping = stop_on_signals()
    audit = Audit(DeltaLog(settings.tables), KafkaEvents(settings.kafka))
    promoter = Promoter(settings, SpeculatorRegistry(settings.registry), audit)
    page = settings.promoter
    with StatusServer("promoter", page.host, page.port, promoter.status, promoter.metrics):
        promoter.run(stopping)


class Promoter:
    """Moves ``champion`` and ``previous``, and records the moves of all aliases."""

    def __init__(self, settings: Settings, registry: SpeculatorRegistry, audit: Audit) -> None:
        self.metrics = CollectorRegistry()
        self._settings = settings.promoter
        self._registry = registry
        self._audit = audit
        self._failures = Failures("promoter", self.metrics)
        self._moves = Counter("aurora_promoter_moves", "Alias moves recorded.", ["alias"], registry=self.metrics)
        self._moved = 0
        self._line: Line | None = None
        self._verdict: Verdict | None = None

    def run(self, stopping: threading.Event) -> None:
        """Poll until told to stop."""
        while not stopping.is_set():
            self.poll()
            stopping.wait(self._settings.poll_s)

    def poll(self) -> None:
        """Decide for every line once, with its record up to date before and after."""
        with self._failures.survive("registry", RegistryError):
            for line in self._registry.lines():
                if self._record(line) and self._decide(line):
                    self._record(Line(line.name, self._registry.aliases(line.name)))
        with self._failures.survive("broker", BrokerError):
            self._audit.send()

    def status(self) -> PromoterStatus:
        """The line that changed last, and what was decided on it; called from other threads."""
        aliases = self._line.aliases if self._line else {}
        return PromoterStatus(
            champion=aliases.get("champion"),
            candidate=aliases.get("candidate"),
            previous=aliases.get("previous"),
            moves=self._moved,
            verdict=self._verdict.why if self._verdict else None,
            error=self._failures.summary,
        )

    def _decide(self, line: Line) -> bool:
        """Move the aliases of a line if its candidate deserves it."""
        candidate, champion = line.aliases.get("candidate"), line.aliases.get("champion")
        verdict = self._judge(line.name, candidate, champion)
        if verdict.promote and self._audit.had(line.name, "champion", candidate):
            # Someone took it back; its figures against the champion of then would promote it again at once.
            verdict = Verdict(promote=False, why=f"version {candidate} was champion and was taken back")
        if verdict != self._verdict:
            log.info("judged", line=line.name, promote=verdict.promote, why=verdict.why)
        self._verdict = verdict
        if not verdict.promote or candidate is None:
            return False
        # In this order a crash in between leaves a champion that is judged again, and a way back.
        if champion is not None:
            self._registry.point(line.name, "previous", champion)
        self._registry.point(line.name, "champion", candidate)
        return True

    def _record(self, line: Line) -> bool:
        """Write the rows that are missing for the aliases of a line; False if the table does not take them."""
        self._line = line
        with self._failures.survive("tables", TableError):
            for move in self._audit.missing(line.name, line.aliases):
                self._audit.record(self._explain(move))
                self._moves.labels(move.alias).inc()
                self._moved += 1
            return True
        return False

    def _explain(self, move: Move) -> AliasMoved:
        """Who made a move and why, as far as tags and rows tell: it may be another's, or from before a crash."""
        actor, why, figures = "unknown", "moved or removed by hand", dict[str, float]()
        if move.to_version is not None and move.alias in ("candidate", "champion"):
            with suppress(ValidationError):
                figures = HeldBack.of(self._registry.tags(move.line, move.to_version)).figures
        if move.alias == "candidate" and figures:
            actor, why = "trainer", "registered with better held-back figures than the version before"
        elif move.alias == "champion":
            verdict = self._judge(move.line, move.to_version, move.from_version)
            if verdict.promote:
                actor, why = "promoter", verdict.why
        elif move.alias == "previous":
            champion = self._audit.last(move.line, "champion")
            if champion and champion.from_version == move.to_version:
                actor, why = champion.actor, f"was champion before version {champion.to_version}"
        return move.explained(actor, why, figures)

    def _judge(self, line: str, candidate: str | None, champion: str | None) -> Verdict:
        tags = self._registry.tags(line, candidate) if candidate is not None else {}
        return judge(candidate, champion, tags, self._settings.margin, self._settings.min_windows)
