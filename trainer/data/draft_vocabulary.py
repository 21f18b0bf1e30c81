"""The draft vocabulary that the traffic calls for: counts of output tokens, and the ids that they choose.

A token outside the draft vocabulary is never drafted. On the tokens that chose it every vocabulary looks good, so the
counts are kept in two halves of the requests: what a vocabulary will cover is estimated by a choice on one half,
measured on the other. The counts age as TinyLFU's do (Einziger et al., arXiv 1512.00727, section 3.3): all of them are
halved when ``MAX_COUNTED`` tokens are counted, so older traffic weighs less and memory is bounded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from schemas.hash_sampling import hash_ratio

Counts = Mapping[int, int]
"""Token id -> count in the outputs."""
Halves = tuple[Counts, Counts]
"""Counts of two halves of the requests."""

MAX_COUNTED = 1_000_000
"""Counted tokens at which all counts are halved."""
MIN_GAIN = 0.02
"""Share of the output tokens by which a vocabulary must cover more than the one that it replaces."""


class TokenCounts:
    """Counts of the output tokens of the traffic, by half of the requests."""

    def __init__(self, halves: Halves = ({}, {})) -> None:
        self._halves = Counter(halves[0]), Counter(halves[1])
        self.tokens = sum(half.total() for half in self._halves)
        """Counted tokens."""

    @property
    def halves(self) -> tuple[dict[int, int], dict[int, int]]:
        """A copy of the counts."""
        return dict(self._halves[0]), dict(self._halves[1])

    def add(self, request: str, tokens: Collection[int]) -> None:
        """Count output tokens of a request; all parts of a request count in the same half."""
        self._halves[hash_ratio(request, "aurora-vocab") < 0.5].update(tokens)
        self.tokens += len(tokens)
        if self.tokens >= MAX_COUNTED:
            one, other = (Counter({token: n // 2 for token, n in half.items() if n > 1}) for half in self._halves)
            self._halves, self.tokens = (one, other), one.total() + other.total()


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares of output tokens within a draft vocabulary. A token outside of it is always rejected."""

    tokens: int
    """Output tokens counted."""
    chosen: float
    unseen: float
    """Share in one half of the requests with a vocabulary chosen on the other half: the estimate for new traffic."""
    lowest: float
    """Share with as many of the lowest ids, the vocabulary of day 0."""


@dataclass(frozen=True, slots=True)
class VocabularyProposal:
    """A draft vocabulary that covers clearly more of the traffic than the current one."""

    ids: tuple[int, ...]
    coverage: float
    """The estimate for new traffic."""


def propose_vocabulary(
    halves: Halves,
    current: Collection[int],
    kept: Collection[int],
    total: int,
    *,
    min_coverage: float,
    min_tokens: int,
) -> VocabularyProposal | None:
    """Return another vocabulary of the same size; None while the current one is good enough.

    It is, unless it covers less than ``min_coverage`` of at least ``min_tokens``, and another one is estimated to cover
    at least ``MIN_GAIN`` more. So a vocabulary stays where none is much better, and is not replaced by chance: its own
    coverage is measured on the tokens that chose it, that of its successor on others.

    Args:
        halves: Counts of the traffic.
        current: Ids of the draft vocabulary; among equally frequent tokens they stay.
        kept: Ids that every vocabulary includes; more of them than ``current`` has leave no choice.
        total: Vocabulary size of the target.
        min_coverage: Share of the output tokens below which a vocabulary is replaced; 0 keeps every one.
        min_tokens: Output tokens to count before.
    """
    counts, size = sum_halves(halves), len(current)
    if sum(counts.values()) < max(min_tokens, 1) or len(kept) > size:
        return None
    covered = share_covered(counts, current)
    if covered >= min_coverage:
        return None
    estimate = _cross_coverage(halves, kept, size, total, current)
    if estimate < covered + MIN_GAIN:
        return None
    return VocabularyProposal(tuple(choose_ids(counts, kept, size, total, current)), estimate)


def choose_ids(
    counts: Counts, kept: Collection[int], size: int, total: int, current: Collection[int] = ()
) -> list[int]:
    """Return the ids in ascending order: those of ``kept``, then the most frequent ones.

    Among equally frequent tokens, those of ``current`` come first, then the lowest.

    Args:
        counts: Token counts.
        kept: Ids that are always included.
        size: Number of ids.
        total: Vocabulary size of the target.
        current: Ids to prefer.

    Raises:
        UserError: ``kept`` has more than ``size`` ids.
    """
    size = min(size, total)
    if len(kept) > size:
        raise UserError(
            f"the target has {len(kept)} special tokens, so --size must be at least {len(kept)}, not {size}"
        )
    preferred = set(current)
    counted = [token for token, n in counts.items() if n > 0 and token < total]
    counted.sort(key=lambda token: (-counts[token], token not in preferred, token))
    ranked = dict.fromkeys(chain(kept, counted, sorted(preferred), range(total)))
    return sorted(islice(ranked, size))


def coverage(halves: Halves, kept: Collection[int], ids: Collection[int], total: int) -> Coverage:
    """Return the coverage of the ids, of the lowest ids, and of a choice on other requests."""
    counts, size = sum_halves(halves), len(ids)
    return Coverage(
        sum(counts.values()),
        share_covered(counts, ids),
        _cross_coverage(halves, kept, size, total),
        share_covered(counts, range(size)),
    )


def share_covered(counts: Counts, ids: Collection[int]) -> float:
    """Return the share of the counted tokens that are among the ids; 1 where none was counted."""
    tokens = sum(counts.values())
    return _covered(counts, ids) / tokens if tokens else 1.0


def sum_halves(halves: Halves) -> dict[int, int]:
    """Return the counts of all requests."""
    one, other = halves
    return {token: one.get(token, 0) + other.get(token, 0) for token in one.keys() | other.keys()}


def special_ids(folder: Path, total: int) -> list[int]:
    """Return the special tokens of the tokenizer and the end-of-sequence tokens of the target in a folder."""
    found: set[int] = set()
    tokenizer = _read(folder / "tokenizer.json").get("added_tokens") or []
    found.update(token["id"] for token in tokenizer if token.get("special"))
    added = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found.update(int(token) for token, described in added.items() if described.get("special"))
    for name in ("config.json", "generation_config.json"):
        ends = _read(folder / name).get("eos_token_id")
        found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return sorted(token for token in found if token < total)


def _cross_coverage(
    halves: Halves, kept: Collection[int], size: int, total: int, current: Collection[int] = ()
) -> float:
    """Return the share covered of each half by a choice on the other one, over both."""
    tokens = sum(sum(half.values()) for half in halves)
    covered = sum(
        _covered(seen, choose_ids(other, kept, size, total, current)) for seen, other in (halves, halves[::-1])
    )
    return covered / tokens


def _covered(counts: Counts, ids: Collection[int]) -> int:
    return sum(counts.get(token, 0) for token in ids)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
