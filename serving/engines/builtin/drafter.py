"""The drafter protocol, and the draft trees that a drafter proposes to the target.

Shape suffixes: m nodes of a tree, V vocabulary of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from serving.engines.builtin.sequence import Sequence
from serving.planner import DraftBudget, ForwardTiming


class DraftNode(NamedTuple):
    """A draft token."""

    token: int
    parent: int
    """Index of the node before it, or ``ROOT``."""
    depth: int
    logprob: float
    """Under the distribution it was sampled from; for a token chosen without sampling, the drafter's own estimate."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Draft tokens for the target to verify. Every node follows its parent; a chain is a tree without branches."""

    nodes: tuple[DraftNode, ...] = ()
    probs_mV: Tensor | None = None
    """Distributions the tokens were sampled from, over the target's vocabulary; None if none was sampled."""
    pruned: tuple[DraftNode, ...] = ()
    """Drafted children of ``nodes`` that are not worth verifying."""
    source: str = ""
    """Speculator version that drafted the tokens; empty for the suffix drafter."""

    @property
    def tokens(self) -> list[int]:
        """[m] token ids."""
        return [node.token for node in self.nodes]

    @property
    def parents(self) -> list[int]:
        """[m] parent links."""
        return [node.parent for node in self.nodes]


EMPTY_TREE = DraftTree()


class Drafter(Protocol):
    """Proposes tokens that the target verifies. Any proposal is lossless; a good one is accepted often."""

    def draft(self, sequences: list[Sequence], budget: DraftBudget) -> tuple[list[DraftTree], list[ForwardTiming]]:
        """Draft one tree per sequence; return the trees, and the duration of each draft step.

        Args:
            sequences: Sequences past their prefill with room for two output tokens or more.
            budget: How deep to draft, and which acceptance probability pays for a token.
        """

    def finish(self, sequence: Sequence) -> None:
        """Learn from a sequence whose output is complete."""
