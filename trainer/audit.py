"""The record of alias moves: one row in the table ``promotions`` and one event on the compacted topic for each.

The registry's aliases are the truth, and the record follows it. Each pass compares every alias with its last row, and
writes what is missing: a move by the promoter itself, one by the trainer or a person, and one whose row was lost in a
crash alike. An event is kept until the broker has it, and the last one of each alias is sent again at start: the topic
is compacted, so a repetition changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, get_args

import pyarrow as pa
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from schemas.batches import PROMOTIONS
from schemas.events import Alias, AliasMoved
from schemas.settings import Kafka, SettingsError

_TABLE = "promotions"
_TIMEOUT_S = 5.0
ALIASES: tuple[Alias, ...] = get_args(Alias)


class BrokerError(RuntimeError):
    """The broker did not take an event; it is kept, and the next pass tries again."""


class Tables(Protocol):
    """The part of the Delta log that is used here."""

    def read_in_order(self, name: str) -> pa.Table:
        """All rows of a table, in the order of their commits."""

    def append(self, name: str, rows: pa.Table) -> None:
        """Add rows."""


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


class Audit:
    """What was recorded of each alias, and what is still to be sent."""

    def __init__(self, tables: Tables, events: Events) -> None:
        self._tables = tables
        self._events = events
        self._rows: list[AliasMoved] | None = None
        self._unsent: dict[str, AliasMoved] = {}

    def missing(self, line: str, aliases: Mapping[str, str]) -> list[Move]:
        """Moves of a line's aliases that have no row.

        Raises:
            TableError: the table cannot be read.
        """
        moves = []
        for alias in ALIASES:
            row = self.last(line, alias)
            recorded, named = row.to_version if row else None, aliases.get(alias)
            if recorded != named:
                moves.append(Move(line, alias, recorded, named))
        return moves

    def last(self, line: str, alias: Alias) -> AliasMoved | None:
        """The newest recorded move of an alias.

        Raises:
            TableError: the table cannot be read.
        """
        key = f"{line}/{alias}"
        return next((row for row in reversed(self._recorded()) if row.key == key), None)

    def had(self, line: str, alias: Alias, version: str | None) -> bool:
        """Whether an alias has ever named a version.

        Raises:
            TableError: the table cannot be read.
        """
        return any(row.key == f"{line}/{alias}" and row.to_version == version for row in self._recorded())

    def record(self, moved: AliasMoved) -> None:
        """Write the row of a move; its event follows with ``send``.

        Raises:
            TableError: the table cannot be written.
        """
        row = moved.model_dump(exclude={"figures"}) | {"figures": json.dumps(moved.figures)}
        # After a failure nobody knows whether the row was kept: the next pass reads the table again.
        rows, self._rows = self._recorded(), None
        self._tables.append(_TABLE, pa.Table.from_pylist([row], schema=PROMOTIONS))
        self._rows = [*rows, moved]
        self._unsent[moved.key] = moved

    def send(self) -> None:
        """Send the events that the broker does not have yet.

        Raises:
            BrokerError: it did not take them.
        """
        for key, moved in list(self._unsent.items()):
            self._events.send(key, moved.model_dump_json().encode())
            del self._unsent[key]

    def _recorded(self) -> list[AliasMoved]:
        if self._rows is None:
            rows = self._tables.read_in_order(_TABLE).to_pylist()
            self._rows = [AliasMoved.model_validate({**row, "figures": json.loads(row["figures"])}) for row in rows]
            self._unsent = {**{row.key: row for row in self._rows}, **self._unsent}
        return self._rows


class KafkaEvents:
    """The compacted topic of alias moves."""

    def __init__(self, settings: Kafka) -> None:
        """Make the clients; nothing is connected yet.

        Raises:
            SettingsError: an option that the Kafka client does not know.
        """
        options: dict[str, Any] = {
            "bootstrap.servers": settings.bootstrap,
            **settings.client,
            "logger": logging.getLogger("librdkafka"),
        }
        self._topic = NewTopic(
            settings.speculators_topic,
            num_partitions=1,
            replication_factor=settings.replication,
            config={"cleanup.policy": "compact"},
        )
        try:
            self._admin = AdminClient(options)
            timeout = {"message.timeout.ms": int(_TIMEOUT_S * 1000)}
            self._producer = Producer({**options, **timeout, "enable.idempotence": True})
        except (KafkaException, ValueError) as error:
            raise SettingsError(f"kafka.bootstrap or kafka.client: {error}") from error
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
            raise BrokerError(f"kafka.bootstrap, topic {self._topic.topic}: {error}") from error
        if failed or unfinished:
            raise BrokerError(f"kafka.bootstrap, topic {self._topic.topic}: {failed or 'no answer'}")

    def _make_topic(self) -> None:
        """The topic must be compacted before its first event: a broker that makes topics itself would not do that."""
        if self._topic_exists:
            return
        if self._topic.topic not in self._admin.list_topics(timeout=_TIMEOUT_S).topics:
            self._admin.create_topics([self._topic], request_timeout=_TIMEOUT_S)[self._topic.topic].result(_TIMEOUT_S)
        self._topic_exists = True
