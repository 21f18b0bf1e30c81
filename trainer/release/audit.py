"""The record of alias moves: one row in the table ``promotions`` and one event on the compacted topic for each.

The registry's aliases are the truth, and the record follows it. Each pass compares every alias with its last row, and
writes what is missing: a move by the promoter itself, one by the trainer or a person, and one whose row was lost in a
crash alike. An event is kept until the broker has it, and the last one of each alias is sent again at start: the topic
is compacted, so a repetition changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from schemas.events import ALIASES, Alias, AliasMoved, AuditState
from schemas.settings import Kafka, SettingsError
from trainer.release.ledger import Ledger, Tables

_TIMEOUT_S = 5.0


class BrokerError(RuntimeError):
    """The broker did not take an event; it is kept, and the next pass tries again."""


class Events(Protocol):
    """Where events go."""

    def send(self, key: str, value: bytes) -> None:
        """Send one and wait until it is kept.

        Raises:
            BrokerError: it may not have been kept.
        """


class Move(NamedTuple):
    """An alias that names another version than its last row says."""

    line: str
    alias: Alias
    from_version: str | None
    to_version: str | None

    def explained(self, actor: str, why: str, figures: Mapping[str, float]) -> AliasMoved:
        """The move as it is recorded, found now."""
        return AliasMoved(time=datetime.now(UTC), actor=actor, why=why, figures=dict(figures), **self._asdict())


def recorded(ledger: Ledger) -> list[AliasMoved]:
    """The moves of all lines in the table ``promotions``, oldest first. Raises ``TableError``."""
    return _parsed(ledger.read())


class Audit:
    """What was recorded of each alias, and what is still to be sent. All raise ``TableError`` but ``send``."""

    def __init__(self, tables: Tables, events: Events) -> None:
        self._ledger = Ledger(tables, "promotions")
        self._events = events
        self._rows: list[AliasMoved] = []
        self._unsent: dict[str, AliasMoved] | None = None

    def moves(self, line: str) -> list[AliasMoved]:
        """Every recorded move of a line, oldest first."""
        return [row for row in self._recorded() if row.line == line]

    def missing(self, line: str, aliases: Mapping[str, str]) -> list[Move]:
        """Moves of a line's aliases that have no row."""
        recorded = self.aliases(line)
        return [
            Move(line, alias, recorded.get(alias), aliases.get(alias))
            for alias in ALIASES
            if recorded.get(alias) != aliases.get(alias)
        ]

    def aliases(self, line: str) -> dict[Alias, str]:
        """The version that each alias names by its last row; without those that name none."""
        return _named(self.moves(line))

    def audited(self, line: str) -> AuditState | None:
        """What nodes are to see of the record; None where a line has no row."""
        moves = self.moves(line)
        return AuditState(moves=len(moves), aliases=_named(moves)) if moves else None

    def last(self, line: str, alias: Alias) -> AliasMoved | None:
        """The newest recorded move of an alias."""
        return next((row for row in reversed(self.moves(line)) if row.alias == alias), None)

    def record(self, moved: AliasMoved) -> bool:
        """Write the row of a move; its event follows with ``send``.

        False where another process has written since the rows were read: look again which moves are missing.
        """
        self._recorded()
        row = moved.model_dump(exclude={"figures"}) | {"figures": json.dumps(moved.figures)}
        if not self._ledger.add(row):
            return False
        assert self._unsent is not None, "rows were read above"
        self._unsent[moved.key] = moved
        return True

    def send(self) -> None:
        """Send the events that the broker does not have yet.

        Raises:
            BrokerError: it did not take them.
        """
        for key, moved in list((self._unsent or {}).items()):
            self._events.send(key, moved.model_dump_json().encode())
            assert self._unsent is not None, "it holds what is sent"
            del self._unsent[key]

    def _recorded(self) -> list[AliasMoved]:
        self._rows += _parsed(self._ledger.read()[len(self._rows) :])
        if self._unsent is None:
            self._unsent = {row.key: row for row in self._rows}
        return self._rows


def _parsed(rows: Iterable[Mapping[str, Any]]) -> list[AliasMoved]:
    return [AliasMoved.model_validate({**row, "figures": json.loads(row["figures"])}) for row in rows]


def _named(moves: Iterable[AliasMoved]) -> dict[Alias, str]:
    """The version that each alias names after these moves; without those that name none."""
    last = {move.alias: move.to_version for move in moves}
    return {alias: version for alias, version in last.items() if version is not None}


class KafkaEvents:
    """The compacted topic of alias moves."""

    def __init__(self, settings: Kafka) -> None:
        """Make the clients; nothing is connected yet.

        Raises:
            SettingsError: an option that the Kafka client does not know.
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
        """Send one event and wait until the broker has it.

        Raises:
            BrokerError: the broker cannot be reached, or refused.
        """
        try:
            self._make_topic()
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

    def _make_topic(self) -> None:
        """The topic must be compacted before its first event: a broker that makes topics itself would not do that."""
        if self._topic_exists:
            return
        if self._topic.topic not in self._admin.list_topics(timeout=_TIMEOUT_S).topics:
            self._admin.create_topics([self._topic], request_timeout=_TIMEOUT_S)[self._topic.topic].result(_TIMEOUT_S)
        self._topic_exists = True
