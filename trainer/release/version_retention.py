"""Which versions of a line may be deleted, a pure function of what is registered, named and served; and their deletion.

The promoter deletes them in its own thread, so that it moves no alias between plan and deletion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline.delta import DeltaLog, escape_sql
from schemas.events import AliasMoved
from schemas.settings import Promoter as PromoterSettings
from trainer.release.registry import SpeculatorRegistry, Version

INTERVAL_S = 600.0
"""Time between two searches for versions of a line to delete."""
MAX_DELETED = 32
"""Versions that one search deletes at most: the promoter decides nothing meanwhile."""


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """Versions to delete, and the versions to keep with the reason."""

    deleted: tuple[str, ...]
    """Oldest first."""
    kept: Mapping[str, str]


def plan_retention(
    versions: Sequence[Version],
    aliases: Mapping[str, str],
    keep: int,
    served: Collection[str],
    anchors: Collection[str],
) -> RetentionPlan:
    """Return which versions of a line to delete.

    The plan keeps the newest versions, those that an alias names, those that a node has served lately, and those to
    which a rollback may return. It keeps the parents of all of these: the lineage of a version begins at its parent.

    Args:
        versions: Of the line, oldest first.
        aliases: Of the line.
        keep: Number of newest versions to keep.
        served: Versions that nodes have served lately.
        anchors: Versions to which a rollback may return.
    """
    numbers = [version.number for version in versions]
    kept = dict.fromkeys(numbers[-keep:] if keep else [], "among the newest")
    kept |= {number: "served by a node" for number in served if number in numbers}
    kept |= {number: "an anchor" for number in anchors if number in numbers}
    for alias, number in sorted(aliases.items()):
        kept[number] = f"is {alias}"
    parents = {one.tags.get("parent", ""): one.number for one in reversed(versions) if one.number in kept}
    kept = {number: f"parent of {child}" for number, child in parents.items() if number in numbers} | kept
    return RetentionPlan(tuple(number for number in numbers if number not in kept), kept)


def find_anchors(moves: Iterable[AliasMoved], line: str) -> set[str]:
    """Return the versions that ``previous`` has named, by the recorded moves: a rollback may return to them."""
    return {move.to_version for move in moves if move.line == line and move.alias == "previous" and move.to_version}


def find_served(tables: DeltaLog, line: str, since: datetime) -> set[str]:
    """Return the versions in the traces of a line since a time.

    Raises:
        TableError: the table cannot be read.
    """
    # The column `day` selects files. It is that of the record's timestamp: a node's clock may be a day off.
    found = tables.query(
        "SELECT DISTINCT speculator FROM traces "  # noqa: S608 - escaped
        f"WHERE line = '{escape_sql(line)}' AND day >= DATE '{since - timedelta(days=1):%Y-%m-%d}' "
        f'AND "time" >= to_timestamp_micros({round(since.timestamp() * 1e6)})'
    )
    return {str(row["speculator"]) for row in found.read_all().to_pylist()}


def delete_versions(registry: SpeculatorRegistry, line: str, numbers: Iterable[str]) -> Iterator[str]:
    """Delete versions and yield each after its deletion; skip those that an alias names by now.

    Raises:
        RegistryError: no answer; another call deletes the rest.
    """
    for number in numbers:
        if number not in registry.aliases(line).values():
            registry.delete(line, number)
            yield number


class VersionPruner:
    """Deletes the versions of lines that have more than ``promoter.keep_versions``, every ``INTERVAL_S``."""

    def __init__(
        self, settings: PromoterSettings, registry: SpeculatorRegistry, tables: DeltaLog, clock: Callable[[], float]
    ) -> None:
        self._settings, self._registry, self._tables, self._clock = settings, registry, tables, clock
        self._due: dict[str, float] = {}

    def is_due(self, line: str) -> bool:
        """Return whether it is time to search for versions of a line to delete."""
        now = self._clock()
        return self._settings.keep_versions > 0 and now >= self._due.get(line, now)

    def prune(self, line: str, moves: Sequence[AliasMoved]) -> Iterator[str]:
        """Delete versions of a line, and yield each after its deletion.

        Args:
            line: Speculator line.
            moves: Recorded moves of the line.

        Raises:
            RegistryError: no answer.
            TableError: the traces cannot be read.
        """
        keep, now = self._settings.keep_versions, self._clock()
        self._due[line] = now + INTERVAL_S
        versions = self._registry.versions(line)
        if len(versions) <= keep:
            return
        served = find_served(self._tables, line, datetime.fromtimestamp(now - self._settings.keep_served, UTC))
        plan = plan_retention(versions, self._registry.aliases(line), keep, served, find_anchors(moves, line))
        yield from delete_versions(self._registry, line, plan.deleted[:MAX_DELETED])
