"""Whose tokens a server verifies that takes one chain of the same number of draft tokens for all sequences of a step.

The speculator has drafted them already. The chain of the suffix drafter takes the place of its first tokens where more
of it are expected to be accepted, by what was measured of each. The speculator's tokens behind a shorter chain are kept
because the row has a fixed length; they count as proposals only if they follow the tokens before them.

Both drafters are compared with the output in every step, verified or not: the output is the same, or has the same
distribution, whatever was drafted. So nothing is probed. No I/O and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from schemas.suffix_corpus import Match, likeliest_chain
from schemas.trace.record import DraftSource
from serving.planner.acceptance_model import AcceptanceModel, ChainModel, DraftOutcome


@dataclass(frozen=True, slots=True)
class SuffixChain:
    """A chain of the suffix drafter; empty where it found no match."""

    tokens: tuple[int, ...] = ()
    features: tuple[tuple[float, int], ...] = ()
    """Estimated probability and match length of each token."""
    chances: tuple[float, ...] = ()
    """Measured probability that each token and those before it are accepted."""

    @property
    def confidence(self) -> float:
        """Acceptance probability of the first token."""
        return self.chances[0] if self.chances else 0.0


NO_CHAIN = SuffixChain()


class RowPlanner:
    """Decides from measurements.

    Args:
        depth: Maximum number of draft tokens of a row.
        vocabulary: Size of the target's vocabulary. A prompt may have other numbers in it, which must not be verified.
    """

    def __init__(self, depth: int, vocabulary: int) -> None:
        self._depth, self._vocabulary = depth, vocabulary
        self._suffix: Mapping[bool, AcceptanceModel] = {greedy: AcceptanceModel() for greedy in (True, False)}
        self.start_version()

    def start_version(self) -> None:
        """Forget the acceptance of the speculator's drafts."""
        self._speculator: Mapping[bool, ChainModel] = {greedy: ChainModel(self._depth) for greedy in (True, False)}

    def chain(self, match: Match, *, greedy: bool) -> SuffixChain:
        """Return the likeliest continuation of a match."""
        tokens, features, chances, chance = list[int](), [], [], 1.0
        for token, probability in islice(likeliest_chain(match.continuations), self._depth):
            if not 0 <= token < self._vocabulary:
                break
            features.append((probability, match.length + len(tokens)))
            chance *= self._suffix[greedy].estimate(*features[-1])
            tokens.append(token)
            chances.append(chance)
        return SuffixChain(tuple(tokens), tuple(features), tuple(chances))

    def prefers(self, chain: SuffixChain, depth: int, *, greedy: bool) -> bool:
        """Return whether a suffix chain is worth more than the speculator's of ``depth`` tokens."""
        return sum(chain.chances) > self._speculator[greedy].expect(chain.confidence, depth)

    def observe(
        self, chain: SuffixChain, speculator: Sequence[int], output: Sequence[int], *, greedy: bool, weight: float
    ) -> None:
        """Learn from one row.

        Args:
            chain: Of the suffix drafter.
            speculator: The speculator's chain.
            output: Accepted tokens and bonus token.
            greedy: Whether the sequence decodes greedily.
            weight: Outcomes that the speculator's one counts as.
        """
        for token, features, chosen in zip(chain.tokens, chain.features, output, strict=False):
            accepted = 0 if token == chosen else None
            self._suffix[greedy].update(DraftOutcome(DraftSource.SUFFIX, greedy, (features,), accepted))
            if accepted is None:
                break
        self._speculator[greedy].update(chain.confidence, speculator, output, weight)


def token_sources(row: Sequence[int], speculator: Sequence[int], suffix: Sequence[int]) -> tuple[int, ...]:
    """Return the ``DraftSource`` of each token of a row, up to the first one that no drafter proposed at its place.

    A drafter proposed a token if it proposed all tokens before it as well.
    """
    sources = list[int]()
    both = {DraftSource.SPECULATOR: speculator, DraftSource.SUFFIX: suffix}
    for i, token in enumerate(row):
        both = {source: chain for source, chain in both.items() if i < len(chain) and chain[i] == token}
        if not both:
            break
        sources.append(sum(both))
    return tuple(sources)
