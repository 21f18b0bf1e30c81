"""How far each partition of a worker has come, and for how long its records have waited without one arriving."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.offsets import Source
from schemas.status import PartitionStatus


@dataclass(slots=True)
class _Partition:
    wanted: int | None = None
    end: int = 0
    odd: bool = False
    """The log does not begin, or end, where the tables say that it should."""
    quiet_since: float = 0.0
    asked_at: float = 0.0


class Progress:
    """The assigned partitions. To be used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._partitions: dict[Source, _Partition] = {}
        self._held: Counter[Source] = Counter()

    def assign(self, sources: Iterable[Source]) -> None:
        """Begin anew with these partitions; what is held stays held."""
        self._partitions = {source: _Partition(quiet_since=self._clock()) for source in sources}

    def arrived(self, source: Source) -> None:
        """A record of the partition was read and is held."""
        self._held[source] += 1

    def done_with(self, source: Source) -> None:
        """A held record was taken or left out."""
        self._held[source] -= 1
        self._heard(source)

    def wants(self, source: Source, offset: int) -> None:
        """The tables want this offset next."""
        if source in self._partitions:
            self._partitions[source].wanted = offset

    def reaches(self, source: Source, start: int, end: int) -> None:
        """The broker holds the records from ``start`` up to ``end``."""
        if source in self._partitions:
            p = self._partitions[source]
            p.end, p.odd = end, p.wanted is not None and not start <= p.wanted <= end

    def excuse(self) -> None:
        """No record could arrive: nothing was read, or nobody could answer."""
        for source in self._partitions:
            self._heard(source)

    def waiting_s(self, source: Source) -> float:
        """For how long records of a partition have waited on the broker while none was held."""
        partition = self._partitions[source]
        if self._held[source] or partition.wanted is None or partition.wanted >= partition.end:
            self._heard(source)
        return self._clock() - partition.quiet_since

    def asked(self, source: Source) -> None:
        """The consumer was asked for the wanted record."""
        if source in self._partitions:
            self._partitions[source].asked_at = self._clock()

    def overdue(self, after_s: float) -> list[Source]:
        """Partitions whose records have waited for so long, also since they were asked for."""
        now = self._clock()
        return [s for s, p in self._partitions.items() if min(self.waiting_s(s), now - p.asked_at) > after_s]

    def unsettled(self) -> list[Source]:
        """Partitions of which nobody has compared yet what the tables want with what the log has."""
        return [source for source, partition in self._partitions.items() if partition.wanted is None or partition.odd]

    def unknown(self) -> list[Source]:
        """Partitions of which the tables have yet to say where they stand."""
        return [source for source, partition in self._partitions.items() if partition.wanted is None]

    def sources(self) -> list[Source]:
        """The assigned partitions."""
        return sorted(self._partitions)

    def statuses(self) -> list[PartitionStatus]:
        """Where each partition stands, as far as it is known."""
        return [
            PartitionStatus(
                partition=source.partition,
                next_offset=partition.wanted,
                end_offset=max(partition.end, partition.wanted),
                lag=max(partition.end - partition.wanted, 0),
                stalled_s=round(self.waiting_s(source), 1),
            )
            for source, partition in sorted(self._partitions.items())
            if partition.wanted is not None
        ]

    def _heard(self, source: Source) -> None:
        if source in self._partitions:
            self._partitions[source].quiet_since = self._clock()
