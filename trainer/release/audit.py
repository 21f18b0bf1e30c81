"""Record alias moves: one row in the table ``promotions`` and one event on the compacted topic for each.

The registry's aliases are the truth, and the record follows them. Each poll compares every alias with its last row and
writes the missing rows, also for moves by the trainer, by a person, and by a process that crashed before it wrote its
row. An event is kept until the broker acknowledges it. After a restart the last event of each alias is sent again: the
topic is compacted, so a duplicate changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from pydantic import ValidationError

from pipeline.delta import DeltaLog
from schemas.batches import TABLES
from schemas.events import ALIASES, Alias, AliasChange, AliasIntent, AliasMoved, AuditState
from schemas.settings import Kafka, SettingsError
from trainer.release.gate import HeldOutComparison
from trainer.release.registry import Line, SpeculatorRegistry

UNKNOWN_ACTOR = "unknown"
"""Actor of a move that no intent explains."""
_TIMEOUT_S = 5.0


class BrokerError(RuntimeError):
    """The broker did not acknowledge an event; the event is kept and sent again in the next poll."""


class Ledger:
    """Ordered rows of a small Delta table to which several processes append.

    A row is appended only after the rows that its writer has read. Of two processes that decide at the same time, one
    has to read again: the order of the rows is the order of the decisions, and each decision was made with knowledge of
    all earlier ones.
    """

    def __init__(self, tables: DeltaLog, name: str) -> None:
        self._tables = tables
        self._name = name
        self._rows: list[dict[str, Any]] = []
        self._version = 0

    def read(self) -> Sequence[Mapping[str, Any]]:
        """Return all rows, oldest first; fetch only new ones.

        Raises:
            TableError: the table cannot be read.
        """
        newest = self._tables.version(self._name)
        if newest != self._version:
            self._rows += self._tables.read_added(self._name, self._version, newest).to_pylist()
            self._version = newest
        return self._rows

    def append(self, row: Mapping[str, Any]) -> bool:
        """Append a row after the rows read last; return False, and append nothing, if other rows came in between.

        Raises:
            TableError: the table did not accept the row, or its answer was lost; ``read`` shows which.
        """
        added = pa.Table.from_pylist([row], schema=TABLES[self._name])
        return self._tables.append_after(self._name, self._version, added)


def read_moves(tables: DeltaLog) -> list[AliasMoved]:
    """Return the recorded moves of all lines, oldest first. Raises ``TableError``."""
    return _parse_rows(Ledger(tables, "promotions").read())


class AuditLog:
    """Recorded moves of every alias, and the events that the broker has not acknowledged yet.

    Methods raise ``TableError`` if the table does not answer; ``send_events`` raises ``BrokerError`` only.
    """

    def __init__(self, tables: DeltaLog, registry: SpeculatorRegistry, events: KafkaEvents) -> None:
        self._ledger = Ledger(tables, "promotions")
        self._registry = registry
        self._events = events
        self._moves: list[AliasMoved] = []
        self._unsent: dict[str, AliasMoved] | None = None

    def moves(self, line: str) -> list[AliasMoved]:
        """Return the recorded moves of a line, oldest first."""
        return [move for move in self._read() if move.line == line]

    def record(self, line: Line, intents: Sequence[tuple[AliasIntent, str]]) -> list[AliasMoved]:
        """Write the missing rows of a line and its ``AuditState`` tag; return the moves written.

        Args:
            line: With the aliases as the registry has them.
            intents: Of the line, oldest first; read after the aliases, so that they explain every move.

        Raises:
            TableError: the table does not answer.
            RegistryError: the registry does not answer.
        """
        written = list(self._write_missing(line, intents))
        moves = self.moves(line.name)
        if moves and (line.audited is None or line.audited.moves < len(moves)):
            self._registry.write_audit_state(line.name, AuditState(moves=len(moves), aliases=_last_aliases(moves)))
        return written

    def send_events(self) -> None:
        """Send the events that the broker has not acknowledged.

        Raises:
            BrokerError: the broker did not acknowledge one.
        """
        unsent = self._unsent or {}
        for key, move in list(unsent.items()):
            self._events.send(key, move.model_dump_json().encode())
            del unsent[key]

    def _write_missing(self, line: Line, intents: Sequence[tuple[AliasIntent, str]]) -> Iterator[AliasMoved]:
        recorded = _last_aliases(self.moves(line.name))
        for alias in ALIASES:
            change = AliasChange(alias=alias, from_version=recorded.get(alias), to_version=line.aliases.get(alias))
            if change.from_version == change.to_version:
                continue
            move = self._explain(line.name, change, intents)
            if not self._append(move):
                return  # another process records this line; the next poll looks again
            yield move

    def _append(self, move: AliasMoved) -> bool:
        if not self._ledger.append(move.model_dump(exclude={"figures"}) | {"figures": json.dumps(move.figures)}):
            return False
        assert self._unsent is not None, "the rows were read before"
        self._unsent[move.key] = move
        return True

    def _explain(self, line: str, change: AliasChange, intents: Sequence[tuple[AliasIntent, str]]) -> AliasMoved:
        """Return the move with its actor and reason: from its intent, else from the tags of a candidate."""
        recorded = [move.time for move in self.moves(line) if move.alias == change.alias]
        for intent, _ in reversed(intents):
            # An intent older than the last recorded move of the alias explains that move, not this one.
            if change in intent.changes and (not recorded or intent.time >= recorded[-1]):
                return _move_of(line, change, intent.actor, f"{intent.action}: {intent.why}", intent.figures)
        if change.alias == "candidate" and change.to_version is not None:
            with suppress(ValidationError):
                figures = HeldOutComparison.from_tags(self._registry.tags(line, change.to_version)).figures
                why = "registered with a higher acceptance length on the held-out set"
                return _move_of(line, change, "trainer", why, figures)
        return _move_of(line, change, UNKNOWN_ACTOR, "moved or removed by hand in the registry", {})

    def _read(self) -> list[AliasMoved]:
        self._moves += _parse_rows(self._ledger.read()[len(self._moves) :])
        if self._unsent is None:
            self._unsent = {move.key: move for move in self._moves}
        return self._moves


class KafkaEvents:
    """Producer for the compacted topic of alias moves."""

    def __init__(self, settings: Kafka) -> None:
        """Create the clients without connecting.

        Raises:
            SettingsError: the Kafka client does not know an option.
        """
        options: dict[str, Any] = {
            "bootstrap.servers": settings.bootstrap_servers,
            **settings.client_options,
            "logger": logging.getLogger("librdkafka"),
        }
        self._topic = NewTopic(
            settings.speculators_topic,
            num_partitions=1,
            replication_factor=settings.replication_factor,
            config={"cleanup.policy": "compact"},
        )
        try:
            self._admin = AdminClient(options)
            timeout = {"message.timeout.ms": int(_TIMEOUT_S * 1000)}
            self._producer = Producer({**options, **timeout, "enable.idempotence": True})
        except (KafkaException, ValueError) as error:
            raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error
        self._topic_exists = False

    def send(self, key: str, value: bytes) -> None:
        """Send one event and wait until the broker acknowledges it.

        Raises:
            BrokerError: the broker did not answer, or rejected the event.
        """
        try:
            self._create_topic()
            failed: list[str] = []
            self._producer.produce(
                self._topic.topic,
                key=key,
                value=value,
                on_delivery=lambda error, _: failed.append(str(error)) if error else None,
            )
            unfinished = self._producer.flush(_TIMEOUT_S * 2)
        except (KafkaException, BufferError) as error:
            raise BrokerError(f"kafka.bootstrap_servers, topic {self._topic.topic}: {error}") from error
        if failed or unfinished:
            raise BrokerError(f"kafka.bootstrap_servers, topic {self._topic.topic}: {failed or 'no answer'}")

    def _create_topic(self) -> None:
        """Create the topic before its first event: a broker that creates topics by itself would not compact it."""
        if self._topic_exists:
            return
        if self._topic.topic not in self._admin.list_topics(timeout=_TIMEOUT_S).topics:
            self._admin.create_topics([self._topic], request_timeout=_TIMEOUT_S)[self._topic.topic].result(_TIMEOUT_S)
        self._topic_exists = True


def _move_of(line: str, change: AliasChange, actor: str, why: str, figures: Mapping[str, float]) -> AliasMoved:
    return AliasMoved(
        time=datetime.now(UTC), line=line, actor=actor, why=why, figures=dict(figures), **change.model_dump()
    )


def _parse_rows(rows: Iterable[Mapping[str, Any]]) -> list[AliasMoved]:
    return [AliasMoved.model_validate({**row, "figures": json.loads(row["figures"])}) for row in rows]


def _last_aliases(moves: Iterable[AliasMoved]) -> dict[Alias, str]:
    """Return the version of each alias after these moves, without aliases that were removed."""
    last = {move.alias: move.to_version for move in moves}
    return {alias: version for alias, version in last.items() if version is not None}
