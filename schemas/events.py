"""Records about speculator versions: JSON on Kafka topics, in the table ``intents`` and in registry tags.

``aurora.speculators.v1``   alias moves: compacted, key ``line/alias``.
``aurora.drift.v1``         drift of a version's acceptance: deleted after ``kafka.retention``, key ``line/speculator``.
``aurora.lag.v1``           lag of a trainer: deleted after ``kafka.retention``, key ``line``.

The version of a format is in the name of its topic. Within a version, releases add fields with defaults only, and
readers ignore fields that they do not know.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Alias = Literal["candidate", "canary", "champion", "previous"]
ALIASES: tuple[Alias, ...] = get_args(Alias)
AliasAction = Literal["promote", "start_canary", "end_canary", "end_watch", "rollback"]

AUDITED_TAG = "aurora.audited"
"""Tag of a line's registered model that holds an ``AuditState``, as JSON."""
QUARANTINED_TAG = "aurora.quarantined"
"""Tag of a version that must not be promoted again; its value is the reason."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class AliasMoved(_Record):
    """A completed move of one alias."""

    time: datetime
    line: str
    alias: Alias
    from_version: str | None
    to_version: str | None
    actor: str
    """The person or process that moved the alias."""
    why: str
    figures: dict[str, float]
    """Figures behind the decision."""

    @property
    def key(self) -> str:
        """Key on the compacted topic, which keeps the newest move of each alias."""
        return f"{self.line}/{self.alias}"


class AliasChange(_Record):
    """Current and intended version of one alias; None means that the alias names no version."""

    alias: Alias
    from_version: str | None
    to_version: str | None


class AliasIntent(_Record):
    """An intended move of several aliases, written before the first change so that any process can finish it."""

    id: str
    time: datetime
    line: str
    action: AliasAction
    changes: tuple[AliasChange, ...]
    """In the order in which they are made."""
    actor: str
    why: str
    figures: dict[str, float]


class AuditState(_Record):
    """Recorded state of a line's aliases in the table ``promotions``; value of ``AUDITED_TAG``, written after the rows.

    A node returns to an earlier version only if an ``AuditState`` with more moves than the last one it followed names
    that version. A stale registry response therefore cannot undo a promotion.
    """

    moves: PositiveInt
    """Rows of the line in the table; the number never decreases."""
    aliases: dict[Alias, str]
    """Version of each alias, without the aliases that name no version."""


class AcceptanceStats(_Record):
    """Acceptance of a version's own drafts. Figures are means over requests, with equal weight for each request."""

    requests: PositiveInt
    first_token_acceptance: float
    """Ratio of verify steps with an own draft whose first token equals the target's choice."""
    acceptance_length: float
    """1 + accepted tokens per verify step (bonus token included)."""
    draft_tokens: float
    """Draft tokens per verify step. ``acceptance_length`` depends on it, ``first_token_acceptance`` does not."""


class DriftEvent(_Record):
    """A change in the acceptance of a version, on the traffic of one label in one partition.

    Delivered at least once; a repetition equals the original in every field, ``id`` included. Requests are distributed
    over the partitions by their ids, so each partition reports a change of the whole traffic separately.
    """

    id: str
    """Determined by line, version, label and the record at which the change was detected."""
    time: datetime
    """Commit time of that record's last verify step, by its node's clock."""
    line: str
    speculator: str
    label: str | None
    topic: str
    partition: int
    offset: int
    """Offset of the record at which the change was detected."""
    direction: Literal["fall", "rise"]
    """Direction of ``first_token_acceptance``."""
    before: AcceptanceStats
    after: AcceptanceStats
    since: datetime
    """Time of the oldest request of ``after``."""

    @property
    def key(self) -> str:
        """Key on the topic, which keeps the events of one version in order."""
        return f"{self.line}/{self.speculator}"


MIN_SHARE = 1 / 64
"""Smallest share that a lagging trainer reads: one that cannot keep up with it is out of order."""


class TrainerLag(_Record):
    """How far a trainer is behind, and the share of requests that nodes should publish until it has caught up.

    The trainer repeats it while it is behind, and says once that it has caught up: share 1.
    """

    time: datetime
    """By the trainer's clock."""
    line: str
    lag_s: float = Field(ge=0)
    """Age of the oldest commit that the trainer has not read."""
    share: float = Field(ge=MIN_SHARE, le=1)
    """Nodes publish the requests for which ``schemas.hash_sampling.is_in_share`` holds."""
    valid_s: float = Field(gt=0)
    """Time after which a node that hears nothing more publishes all requests again."""

    @property
    def key(self) -> str:
        """Key on the topic, which keeps the events of one line in order."""
        return self.line
