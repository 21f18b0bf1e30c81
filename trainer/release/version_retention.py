"""Which versions of a line may be deleted: a pure function of what is registered, named and served."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trainer.release.registry import Version


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
