"""Events about speculator versions, as JSON on two topics.

``aurora.speculators.v1``   moves of aliases: compacted, key ``line/alias``.
``aurora.drift.v1``         changes of how often a version is accepted: expiring, key ``line/speculator``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

Alias = Literal["candidate", "canary", "champion", "previous"]


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


class Accepted(BaseModel):
    """How much of what a version drafted was accepted: means over requests, each counted once whatever its length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: PositiveInt
    acceptance: float
    """Share of the rounds with a draft in which the target took the draft's first choice for the next token."""
    accept_length: float
    """Drafted tokens that the target kept in a round."""
    drafted: float
    """Tokens drafted in a round; the accept length moves with it, the acceptance does not."""


class DriftEvent(BaseModel):
    """A version is accepted more or less often than before, by the traffic of one label in one partition.

    Sent at least once: a repetition is equal in every field, ``id`` included. Requests are spread over the partitions
    by their ids, so a change of all traffic is told by each partition for itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Function of line, version, label and the record at which the change was noticed."""
    time: datetime
    """When that record's last round was committed, by the clock of its node."""
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
