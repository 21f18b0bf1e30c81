"""A span of the tables as the trainer would have met it: windows in the order of their commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict

from trainer.data.samples import Window
from trainer.data.table_reader import VERSIONS_PER_READ, Reader, Tables
from trainer.replay.past_requests import States
from trainer.replay.prequential import Asked

UNLABELLED = "(none)"


class Span(BaseModel):
    """What is read of the tables, and whose rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted: tuple[int, int]
    """The version behind which, and the one up to which."""
    rejected: tuple[int, int]
    """The same; wide enough to hold the branches of all windows."""
    target: str
    line: str
    """Of the nodes that wrote them. A draft of another line learns from them too, if it reads the same features."""

    @property
    def versions(self) -> dict[str, tuple[int, int]]:
        """By table."""
        return {"accepted": self.accepted, "rejected": self.rejected}


def windows(tables: Tables, span: Span, longest: int, states: States, counts: Counter[str]) -> Iterator[Asked]:
    """The windows of a span, cut to ``longest`` tokens; a few commits are in memory at a time.

    Args:
        tables: Where the rows are.
        span: What to read.
        longest: Tokens of a window.
        states: Gives the features that did not travel.
        counts: Rows and branches by what became of them.

    Raises:
        TableError: the tables cannot be read.
    """
    reader = Reader(tables, span.target, span.line, longest, counts)
    reader.stand(span.accepted[0], span.rejected[0], ())
    while reader.cursor < span.accepted[1]:
        up_to = min(span.accepted[1], reader.cursor + VERSIONS_PER_READ)
        for entry in reader.read(up_to, span.rejected[1]):
            yield Asked(entry.label or UNLABELLED, _complete(entry.window, states))


def _complete(window: Window, states: States) -> Window:
    if len(window.features) == len(window):
        return window
    given = states(torch.cat([window.before, window.tokens]))
    return replace(window, features=given[len(window.before) :])
