"""What a node makes of the registry's answers: which versions it follows, and whose turn it is. All of it pure.

A registry may answer with what was true a while ago: from a replica that lags, a cache, or a proxy. So an alias alone
cannot tell a rollback from an old answer. What tells them apart is the ``AuditState`` of the line: the promoter
writes it after it has recorded a move, and its ``moves`` only grow.

- An answer with fewer ``moves`` than one heard before, or with none any more, is old: nothing is made of it.
- A higher version than those followed so far is followed as soon as an alias names it.
- A lower one is followed when an audit with more ``moves`` than the one acted on last names it for that alias.
- Where alias and audit differ in the first answer with more ``moves``, the audit's word is taken, unless it would be a
  step back: the registry reads the two one after the other, so that they can be of two moments. The alias has its say
  again with the next answer.
- A higher version that was followed and taken back before anybody recorded it leaves no audit. It is given up after
  ``CONVINCED`` answers in a row in which alias and audit agree on another one.

On a line without an audit, which no promoter looks after, an alias is followed wherever it points; so is an alias that
the promoter does not record. A node that starts has followed nothing: it begins with what the audit names, where there
is one, and goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from schemas.events import ALIASES, AuditState
from schemas.hash_sampling import fixed_chance

CHAMPION, CANARY = "champion", "canary"
CONVINCED = 30


@dataclass(frozen=True, slots=True)
class Named:
    """What the registry says of a line in one answer."""

    aliases: Mapping[str, str]
    """The version that each alias names."""
    audited: AuditState | None = None
    unreadable: str | None = None
    """Why the line's tag is no audit, where it has one that cannot be read."""


@dataclass(frozen=True, slots=True)
class Trail:
    """How an alias has been followed."""

    version: str | None = None
    """What it stands for; None where it names nothing that may be followed."""
    bar: int = 0
    """Another version up to this one needs an audit."""
    moves: int = 0
    """Of the audit that was acted on last."""
    against: int = 0
    """Answers in a row in which alias and audit agreed on another version."""


@dataclass(frozen=True, slots=True)
class Following:
    """All that a node remembers of the registry's answers."""

    main: Trail = Trail()
    """Of ``serve.alias``."""
    canary: Trail = Trail()
    moves: int = 0
    """The most that were heard of."""


def hear(following: Following, named: Named, alias: str, *, canary: bool) -> Following | None:
    """What is to be followed after an answer; None where the answer is old.

    Args:
        following: What was heard before.
        named: The answer.
        alias: The one that the node follows.
        canary: Whether it also follows ``canary``.
    """
    moves = named.audited.moves if named.audited else 0
    if moves < following.moves:
        return None
    return Following(
        follow(following.main, named, alias),
        follow(following.canary, named, CANARY) if canary else Trail(),
        moves,
    )


def follow(trail: Trail, named: Named, alias: str) -> Trail:
    """The trail of an alias after an answer that is not old."""
    version, audit = named.aliases.get(alias), named.audited
    if audit is None or alias not in ALIASES:
        return replace(trail, version=version, bar=trail.bar if version is None else int(version))
    if version is None:
        return replace(trail, version=None, moves=audit.moves, against=0)
    audited = next((recorded for name, recorded in audit.aliases.items() if name == alias), None)
    if audit.moves > trail.moves:
        return _obeyed(trail, version, audited, audit.moves)
    against = trail.against + 1 if trail.version != version == audited else 0
    if int(version) > trail.bar or against == CONVINCED:
        return Trail(version, int(version), trail.moves)
    return replace(trail, against=against)


def held(trail: Trail, named: Named, alias: str) -> str | None:
    """Why the version that an alias names is not followed, if it is not."""
    version = named.aliases.get(alias)
    if version is None or version == trail.version:
        return None
    return f"{alias} names version {version}: no step up from {trail.version or 'none'}, and no audit of it was seen"


def serves_canary(node: str, slice_number: int, share: float) -> bool:
    """Whether it is the canary's turn on a node: chance with the probability ``share``, the same at every asking."""
    return fixed_chance(f"{node}/{slice_number}") < share


def slice_at(time_s: float, slice_s: float) -> int:
    """The number of the slice that a time is in; slices are the same on all nodes whose clocks agree."""
    return math.floor(time_s / slice_s)


def _obeyed(trail: Trail, version: str, audited: str | None, moves: int) -> Trail:
    """After the first answer with so many moves."""
    up = version == trail.version or int(version) > trail.bar
    if up and version != audited and int(audited or 0) < trail.bar:
        # A step up that is not recorded yet, or half an answer of before: it stands until alias and audit agree.
        return Trail(version, int(version), trail.moves)
    return Trail(audited, trail.bar if audited is None else int(audited), moves)
