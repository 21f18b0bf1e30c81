"""Events about speculator versions, as JSON on two topics.

``aurora.speculators.v1``   moves of aliases: compacted, key ``line/alias``.
``aurora.drift.v1``         changes of how often a version is accepted: expiring, key ``line/speculator``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt

Alias = Literal["candidate", "canary", "champion", "previous"]
ALIASES: tuple[Alias, ...] = get_args(Alias)


class AliasMoved(BaseModel):
    """Who or what moved an alias, why, from where to where, and on which figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: datetime
    line: str
    alias: Alias
    from_version: str | None
    to_version: str | None
    actor: str
    why: str
    figures: dict[str, float]

    @property
    def key(self) -> str:
        """Key on the compacted topic: the newest move of each alias is kept."""
        return f"{self.line}/{self.alias}"


class Change(BaseModel):
    """An alias as it is and as it has to be; None names no version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: Alias
    from_version: str | None
    to_version: str | None


class Intent(BaseModel):
    """A move of several aliases, written down before it is made: whoever finds it unfinished can finish it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    time: datetime
    line: str
    what: Literal["promote", "try", "end trial", "rollback"]
    changes: tuple[Change, ...]
    """In the order in which they are made."""
    actor: str
    why: str
    figures: dict[str, float]


AUDITED_TAG = "aurora.audited"
"""Tag of a line's registered model that holds an ``Audited``, as JSON."""
QUARANTINED_TAG = "aurora.quarantined"
"""Tag of a version that must not be promoted any more; its value says why."""


class Audited(BaseModel):
    """What the table ``promotions`` says of a line's aliases: the tag ``AUDITED_TAG`` of its registered model.

    Written after the rows. A node goes back to an earlier version only where an ``Audited`` with more moves than the
    one it acted on last names it: an old answer of the registry cannot undo a promotion.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    moves: PositiveInt
    """Rows of the line in the table; they only grow."""
    aliases: dict[Alias, str]
    """The version that each alias names; without those that name none."""


class Accepted(BaseModel):
    """How much of what a version drafted was accepted: means over requests, each counted once whatever its length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: PositiveInt
    acceptance: float
    """Share of the verify steps with a draft in which the target took the draft's first choice for the next token."""
    accepted_per_step: float
    """Drafted tokens that the target kept in a verify step."""
    drafted: float
    """Tokens drafted in a verify step; the accepted tokens per step moves with it, the acceptance does not."""


class DriftEvent(BaseModel):
    """A version is accepted more or less often than before, by the traffic of one label in one partition.

    Sent at least once: a repetition is equal in every field, ``id`` included. Requests are spread over the partitions
    by their ids, so a change of all traffic is told by each partition for itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Function of line, version, label and the record at which the change was noticed."""
    time: datetime
    """When that record's last verify step was committed, by the clock of its node."""
    line: str
    speculator: str
    label: str | None
    topic: str
    partition: int
    offset: int
    """Of the record at which the change was noticed."""
    direction: Literal["fall", "rise"]
    """Of ``acceptance``."""
    before: Accepted
    after: Accepted
    since: datetime
    """Time of the oldest request of ``after``."""

    @property
    def key(self) -> str:
        """Key on the topic: events of one version stay in order."""
        return f"{self.line}/{self.speculator}"
