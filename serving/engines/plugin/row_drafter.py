"""The suffix drafter of a server that verifies one chain of the same number of draft tokens for all requests of a step.

The thread that runs the server's steps calls it: with the output tokens of a step, then with the requests for which the
speculator has drafted. It returns the chains that take the place of the speculator's tokens.

Letters: B requests of the batch, n draft tokens of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from schemas.suffix_corpus import MAX_MATCH, SequenceHistory, choose_longest
from schemas.trace.record import DraftSource
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.plugin.capture import PendingTensors
from serving.planner.row_planner import NO_CHAIN, RowPlanner, SuffixChain, token_sources

_LEARN_TOKENS = 128
"""Tokens of answers that are added to the corpus at a time; they take 0.2 ms."""
_MAX_TIME_RATIO = 0.05
"""Share of a step's time that looking for matches and adding answers may take."""
_MIN_TIME_S = 0.001
_STEP_RATE = 0.1
_IDLE_S = 1.0
"""A longer time between two drafts counts as idle."""


@dataclass(frozen=True, slots=True, eq=False)
class RowDraft:
    """What was drafted for one row."""

    chain: SuffixChain
    """Of the suffix drafter."""
    is_preferred: bool
    """Whether it took the place of the speculator's first tokens."""
    speculator: PendingTensors
    """``tokens``: [B, n] chains of the speculator."""
    row: int

    def speculator_tokens(self) -> list[int]:
        """Return the [n] tokens of the speculator."""
        found: list[int] = self.speculator.wait()["tokens"][self.row].tolist()
        return found

    def sources(self) -> tuple[int, ...]:
        """Return the ``DraftSource`` of the row's tokens, without those at the end that no drafter proposed there."""
        speculator, suffix = self.speculator_tokens(), self.chain.tokens
        row = [*suffix, *speculator[len(suffix) :]] if self.is_preferred else speculator
        return token_sources(row, speculator, suffix)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request in the server's batch."""

    tokens: list[int]
    label: str | None
    greedy: bool
    history: SequenceHistory = field(default_factory=SequenceHistory)


@dataclass(slots=True)
class RowCounts:
    """Counts since the start."""

    rows: int = 0
    """Rows in which a suffix chain took the place of the speculator's tokens."""
    draft_tokens: int = 0
    """Verified draft tokens that only the suffix drafter proposed."""
    accepted_tokens: int = 0
    """Accepted ones of them."""
    rows_without_lookup: int = 0
    """Rows for which no match was looked up: earlier ones took the time."""


class RowDrafter:
    """Drafts rows.

    Args:
        corpus: Earlier answers.
        depth: Maximum of n.
        vocabulary: Size of the target's vocabulary.
        clock: Monotonic seconds.
    """

    def __init__(
        self, corpus: ScopedCorpus, depth: int, vocabulary: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._corpus, self._clock = corpus, clock
        self._planner = RowPlanner(depth, vocabulary)
        self._sequences: dict[str, _Sequence] = {}
        self._version: str | None = None
        self._first = 0
        """Row at which the lookups of the next step begin."""
        self._last_draft = -_IDLE_S
        self._step_s = 0.0
        self.counts = RowCounts()

    def begin(self, name: str, prompt: Sequence[int], label: str | None, *, greedy: bool) -> None:
        """Follow a request from its prompt on."""
        self._sequences[name] = _Sequence(list(prompt), label, greedy)

    def restart(self, name: str, tokens: Sequence[int]) -> None:
        """Replace the tokens of a request."""
        if sequence := self._sequences.get(name):
            sequence.tokens, sequence.history = list(tokens), SequenceHistory()

    def end(self, name: str) -> None:
        """Forget a request."""
        self._sequences.pop(name, None)

    def observe(self, outputs: Mapping[str, Sequence[int]], drafts: Mapping[str, RowDraft]) -> None:
        """Take the output of a step, and learn from its drafts.

        Args:
            outputs: Accepted tokens and bonus token by request.
            drafts: Verified drafts by request.
        """
        for name, output in outputs.items():
            sequence = self._sequences.get(name)
            if sequence is None:
                continue
            sequence.tokens += output
            if draft := drafts.get(name):
                tokens, weight = draft.speculator_tokens(), len(drafts) ** -0.5
                self._planner.observe(draft.chain, tokens, output, greedy=sequence.greedy, weight=weight)
                sources = draft.sources()
                self.counts.draft_tokens += sources.count(DraftSource.SUFFIX)
                self.counts.accepted_tokens += sources[: len(output) - 1].count(DraftSource.SUFFIX)

    def draft(self, names: Sequence[str | None], speculator: PendingTensors, version: str) -> dict[str, RowDraft]:
        """Return the drafts of a batch.

        Args:
            names: Request of each row; None where its prompt is not read to the end.
            speculator: ``tokens``: [B, n] chains of the speculator, which may be on their way to the host.
            version: Of the speculator.
        """
        if version != self._version:
            self._version = version
            self._planner.start_version()
        deadline, depth = self._deadline(), speculator.tensors["tokens"].shape[1]
        rows = {row: self._sequences[name] for row, name in enumerate(names) if name and name in self._sequences}
        chains = self._look_up(rows, depth, deadline)
        self._add_answers(deadline)
        drafts = {}
        for row, sequence in rows.items():
            chain = chains.get(row, NO_CHAIN)
            is_preferred = bool(chain.tokens) and self._planner.prefers(chain, depth, greedy=sequence.greedy)
            self.counts.rows += is_preferred
            drafts[names[row] or ""] = RowDraft(chain, is_preferred, speculator, row)
        return drafts

    def _deadline(self) -> float:
        """Return the end of this step's share for the suffix drafter, by the clock."""
        now = self._clock()
        if now - self._last_draft < _IDLE_S:
            self._step_s += _STEP_RATE * (now - self._last_draft - self._step_s)
        self._last_draft = now
        return now + max(_MAX_TIME_RATIO * self._step_s, _MIN_TIME_S)

    def _add_answers(self, deadline: float) -> None:
        """Add some answers that wait to the corpus, and more while there is time."""
        while self._corpus.is_due:
            self._corpus.update(_LEARN_TOKENS)
            if self._clock() > deadline:
                return

    def _look_up(self, rows: Mapping[int, _Sequence], depth: int, deadline: float) -> dict[int, SuffixChain]:
        """Return the chains of as many rows as there is time for; the others are first in the next step."""
        chains = {}
        for row in sorted(rows, key=lambda row: (row < self._first, row)):
            if self._clock() > deadline:
                self._first = row
                break
            chains[row] = self._chain(rows[row], depth)
        self.counts.rows_without_lookup += len(rows) - len(chains)
        return chains

    def _chain(self, sequence: _Sequence, depth: int) -> SuffixChain:
        own = sequence.history.find(sequence.tokens, depth)
        match = choose_longest(own, self._corpus.find(sequence.label, sequence.tokens[-MAX_MATCH:], depth))
        return self._planner.chain(match, greedy=sequence.greedy)
