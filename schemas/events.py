"""Events about speculator versions, on the compacted topic ``aurora.speculators.v1`` (key: ``line/alias``)."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

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
