"""A promoter with real tables, and a registry of one line, a topic and a clock in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pyarrow as pa

from pipeline.delta import DeltaLog, TableError
from schemas.events import QUARANTINED_TAG, Alias, AliasMoved, AuditState
from schemas.settings import Tables, load
from trainer.release.audit import BrokerError, KafkaEvents
from trainer.release.gate import HELD_OUT_TAG, HeldOutComparison
from trainer.release.promoter import Promoter
from trainer.release.registry import Line, SpeculatorRegistry, Version

LINE = "target-draft"


def figures(
    accepted_per_step: float, champion: str, champion_accepted_per_step: float, samples: int = 20
) -> dict[str, str]:
    """Return the tag of a version whose gain is known exactly."""
    gain = accepted_per_step - champion_accepted_per_step
    held_out = HeldOutComparison(
        accepted_per_step=accepted_per_step,
        champion=champion,
        champion_accepted_per_step=champion_accepted_per_step,
        gain_low=gain,
        gain_high=gain,
        samples=samples,
        prompts=samples,
    )
    return {HELD_OUT_TAG: held_out.model_dump_json()}


class MemoryRegistry:
    """One line; ``breaks`` is called before each alias move, and ``deletes`` before each deletion."""

    def __init__(self) -> None:
        self.named: dict[str, str] = {}
        self.registered: dict[str, dict[str, str]] = {}
        self.audited: AuditState | None = None
        self.breaks: Callable[[Alias], None] = lambda _: None
        self.deletes: Callable[[str], None] = lambda _: None

    def lines(self) -> list[Line]:
        return [Line(LINE, dict(self.named), self.audited)] if self.registered else []

    def aliases(self, line: str) -> dict[str, str]:
        return dict(self.named)

    def tags(self, line: str, version: str) -> dict[str, str]:
        return self.registered[version]

    def set_alias(self, line: str, alias: Alias, version: str) -> None:
        self.breaks(alias)
        self.named[alias] = version

    def versions(self, line: str) -> list[Version]:
        return [Version(number, datetime.now(UTC), tags, "", "") for number, tags in self.registered.items()]

    def version(self, line: str, number: str) -> Version | None:
        return next((version for version in self.versions(line) if version.number == number), None)

    def delete(self, line: str, version: str) -> None:
        self.deletes(version)
        del self.registered[version]

    def quarantine(self, line: str, number: str, why: str) -> None:
        self.registered[number][QUARANTINED_TAG] = why

    def delete_alias(self, line: str, alias: Alias) -> None:
        self.breaks(alias)
        self.named.pop(alias, None)

    def write_audit_state(self, line: str, audited: AuditState) -> None:
        self.audited = audited

    def register(self, version: str, tags: dict[str, str]) -> None:
        self.registered[version] = tags
        self.named["candidate"] = version


class MemoryTopic:
    def __init__(self) -> None:
        self.kept: dict[str, AliasMoved] = {}
        self.down = False

    def send(self, key: str, value: bytes) -> None:
        if self.down:
            raise BrokerError("kafka.bootstrap_servers: no answer")
        self.kept[key] = AliasMoved.model_validate_json(value)


class FailingLog(DeltaLog):
    down = False

    def append_after(self, name: str, version: int, rows: pa.Table) -> bool:
        if self.down:
            raise TableError(f"table {name}: gone")
        return super().append_after(name, version, rows)


class World:
    def __init__(self, folder: Path, **flags: object) -> None:
        self.settings = load(environ={}, flags=flags)
        self.registry = MemoryRegistry()
        self.topic = MemoryTopic()
        self.tables = FailingLog(Tables(uri=str(folder)))
        self.clock_offset = 0.0
        """Seconds by which the promoter's clock is ahead of the recorded times."""
        self.promoter = self.restart()

    def restart(self) -> Promoter:
        self.promoter = Promoter(
            self.settings,
            cast(SpeculatorRegistry, self.registry),
            self.tables,
            cast(KafkaEvents, self.topic),
            lambda: time.time() + self.clock_offset,
        )
        return self.promoter

    def rows(self) -> list[tuple[str, str | None, str | None, str]]:
        rows = self.tables.read_in_order("promotions").to_pylist()
        return [(r["alias"], r["from_version"], r["to_version"], r["actor"]) for r in rows]
