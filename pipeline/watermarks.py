"""Where the partitions of the traces topic begin and end on the broker.

Asked through a client of its own: while a broker is away, what Faust's consumer is asked waits in the same queue as
what it reads, and delays it when the broker is back.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ListOffsetsResultInfo,
    OffsetSpec,
)

from pipeline.kafka_admin import Refusals, client
from pipeline.offsets import Source
from schemas.settings import Kafka

TIMEOUT_S = 10.0


class BrokerAwayError(RuntimeError):
    """The broker does not answer; the message names the setting that says where it is."""


class Watermarks:
    """Asks the broker; blocks while it does. Thread-safe."""

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._refusals = Refusals()
        self._admin = self._connected()

    def bounds(self, sources: Iterable[Source]) -> dict[Source, tuple[int, int]]:
        """For each partition the offset of its oldest record, and the one after its newest.

        Raises:
            BrokerAwayError: one of them was not told.
        """
        asked = {source: TopicPartition(source.topic, source.partition) for source in sources}
        if not asked:
            return {}
        self._refusals.last = None
        admin = self._admin
        starts, ends = (
            admin.list_offsets(dict.fromkeys(asked.values(), spec), request_timeout=TIMEOUT_S)
            for spec in (OffsetSpec.earliest(), OffsetSpec.latest())  # type: ignore[no-untyped-call]
        )
        try:
            return {source: (_offset(starts[tp]), _offset(ends[tp])) for source, tp in asked.items()}
        except KafkaException as error:
            admin.poll(0)
            # A client goes on with what it knew of the leaders before they were away, and is refused for that.
            self._admin = self._connected()
            why = f"{self._refusals.last} (kafka.client_options)" if self._refusals.last else error.args[0].str()
            raise BrokerAwayError(
                f"broker at {self._settings.bootstrap_servers} (kafka.bootstrap_servers): {why}"
            ) from error

    def _connected(self) -> AdminClient:
        return AdminClient(client(self._settings, error_cb=self._refusals))


def _offset(answer: Future[ListOffsetsResultInfo]) -> int:
    offset = answer.result().offset
    if offset < 0:
        # What librdkafka says, without an error, of a partition whose leader has died.
        raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
    return offset
