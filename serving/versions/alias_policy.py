"""Alias policy: which versions a node follows after an answer of the registry. Pure functions.

The registry may give stale answers: from a replica that lags, a cache, or a proxy. An alias alone therefore cannot
distinguish a rollback from a stale answer. The audit state of the line (``AuditState``) can: the promoter writes it
after it has recorded an alias move, and its ``moves`` only grow.

- An answer with fewer ``moves`` than an earlier one, or with no audit state after one was seen, is stale. It changes
  nothing.
- A version higher than all versions followed so far is followed as soon as an alias names it.
- A lower version is followed when an audit state with more ``moves`` than the last one applied names it for that
  alias.
- Where alias and audit state differ in the first answer with more ``moves``, the audit state decides, unless it would
  be a step back: the registry reads the two one after the other, so they can belong to different moments. The alias
  decides again with the next answer.
- A higher version that was followed, and rolled back before the promoter recorded it, leaves no audit state. The node
  stops following it after ``MAX_DISAGREEMENTS`` answers in a row in which alias and audit state agree on another one.

On a line without an audit state (no promoter runs for it) a node follows an alias wherever it points, and so it does
with an alias that the promoter does not record. A node that starts has followed nothing: it begins with the version
that the audit state names, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import ValidationError

from schemas.events import ALIASES, AUDITED_TAG, AuditState
from schemas.hash_sampling import hash_ratio

CHAMPION, CANARY, PREVIOUS = "champion", "canary", "previous"
MAX_DISAGREEMENTS = 30


@dataclass(frozen=True, slots=True)
class RegistryAnswer:
    """The aliases of a line in one answer of the registry."""

    aliases: Mapping[str, str]
    """The version that each alias names."""
    audit: AuditState | None = None
    unreadable: str | None = None
    """Why the audit state cannot be read, if the line has such a one."""


@dataclass(frozen=True, slots=True)
class FollowedAlias:
    """The version that a node follows for one alias."""

    version: str | None = None
    """None where the alias names no version that may be followed."""
    highest: int = 0
    """Any other version up to this one needs an audit state."""
    moves: int = 0
    """Of the last audit state applied."""
    disagreements: int = 0
    """Answers in a row in which alias and audit state agreed on another version."""


@dataclass(frozen=True, slots=True)
class FollowedAliases:
    """All that a node remembers of the registry's answers."""

    main: FollowedAlias = FollowedAlias()
    """Of ``serve.alias``."""
    canary: FollowedAlias = FollowedAlias()
    anchor: FollowedAlias = FollowedAlias()
    """Of ``previous``, which names the anchor of a post-promotion watch while it names another version than the
    champion."""
    moves: int = 0
    """The highest number seen."""


def parse_answer(aliases: Mapping[str, str], tag: str | None) -> RegistryAnswer:
    """Return an answer with its audit state parsed; a tag that is no audit state is reported in ``unreadable``."""
    if tag is None:
        return RegistryAnswer(aliases)
    try:
        audit = AuditState.model_validate_json(tag)
    except ValidationError as error:
        return RegistryAnswer(aliases, unreadable=f"tag {AUDITED_TAG}: {error.errors()[0]['msg']}")
    if not all(version.isdecimal() for version in audit.aliases.values()):
        return RegistryAnswer(aliases, unreadable=f"tag {AUDITED_TAG}: versions are numbers")
    return RegistryAnswer(aliases, audit)


def apply_answer(
    followed: FollowedAliases, answer: RegistryAnswer, alias: str, *, canary: bool, anchor: bool
) -> FollowedAliases | None:
    """Return what a node follows after an answer; None if the answer is stale.

    Args:
        followed: State before the answer.
        answer: Aliases and audit state.
        alias: Alias that the node follows.
        canary: Whether the node also follows ``canary``.
        anchor: Whether the node also follows ``previous``.
    """
    moves = answer.audit.moves if answer.audit else 0
    if moves < followed.moves:
        return None
    return FollowedAliases(
        follow_alias(followed.main, answer, alias),
        follow_alias(followed.canary, answer, CANARY) if canary else FollowedAlias(),
        follow_alias(followed.anchor, answer, PREVIOUS) if anchor else FollowedAlias(),
        moves,
    )


def follow_alias(followed: FollowedAlias, answer: RegistryAnswer, alias: str) -> FollowedAlias:
    """Return the state of one alias after an answer that is not stale."""
    version, audit = answer.aliases.get(alias), answer.audit
    if audit is None or alias not in ALIASES:
        return replace(followed, version=version, highest=followed.highest if version is None else int(version))
    if version is None:
        return replace(followed, version=None, moves=audit.moves, disagreements=0)
    audited = next((recorded for name, recorded in audit.aliases.items() if name == alias), None)
    if audit.moves > followed.moves:
        return _apply_audit(followed, version, audited, audit.moves)
    disagreements = followed.disagreements + 1 if followed.version != version == audited else 0
    if int(version) > followed.highest or disagreements == MAX_DISAGREEMENTS:
        return FollowedAlias(version, int(version), followed.moves)
    return replace(followed, disagreements=disagreements)


def explain_unfollowed(followed: FollowedAlias, answer: RegistryAnswer, alias: str) -> str | None:
    """Return why the node does not follow the version that an alias names; None if it follows it."""
    version = answer.aliases.get(alias)
    if version is None or version == followed.version:
        return None
    return f"{alias} names version {version}: not newer than {followed.version or 'none'}, and no audit state names it"


def is_canary_slice(node: str, number: int, share: float) -> bool:
    """Return whether a node serves the canary in a time slice: true with probability ``share``, deterministic."""
    return hash_ratio(f"{node}/{number}") < share


def is_anchor_slice(node: str, number: int, share: float) -> bool:
    """Return whether a node serves the anchor in a time slice, if that is no slice of a canary.

    The same draw decides as for the canary, from its other end: a slice is one of the canary or of the anchor.
    """
    return hash_ratio(f"{node}/{number}") >= 1 - share


def slice_number(time_s: float, slice_s: float) -> int:
    """Return the number of the time slice that contains ``time_s``; equal on all nodes whose clocks agree."""
    return math.floor(time_s / slice_s)


def _apply_audit(followed: FollowedAlias, version: str, audited: str | None, moves: int) -> FollowedAlias:
    """Return the state after the first answer with this number of moves."""
    is_up = version == followed.version or int(version) > followed.highest
    if is_up and version != audited and int(audited or 0) < followed.highest:
        # A step up that is not recorded yet, or an answer torn between two moments. The version stays until alias and
        # audit state agree.
        return FollowedAlias(version, int(version), followed.moves)
    return FollowedAlias(audited, followed.highest if audited is None else int(audited), moves)
