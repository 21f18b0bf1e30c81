"""Recent answers as a flat ring of tokens, in which the longest match of a sequence's end is found.

An *occurrence* of the last n tokens of a sequence is a place where the same n tokens were written before. The tokens
after it are a *continuation*: a proposal for the sequence's next tokens. SuffixDecoding (Oliaro et al., arXiv
2411.04975) finds occurrences in suffix trees. Here two arrays per match length suffice: ``newest`` holds the end of the
newest occurrence by hash of the n tokens, and ``previous`` links each end to the one before with the same hash. A
lookup follows at most ``MAX_LINKS`` links, whatever the size of the corpus.

Each answer has an owner, a number that ``insert`` and ``find`` name: a lookup finds answers of its owner alone. The
owner is part of the hash, and a lookup compares it like the tokens.

Nothing is removed from the arrays. Old answers are overwritten, and a lookup compares the tokens themselves, so a link
to an overwritten place or a collision of hashes gives no wrong occurrence.

The tokens of a running sequence are in ``SequenceHistory``, which the next sequence in its slot replaces.

This module needs no torch. T: number of tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]

MIN_MATCH, MAX_MATCH = 2, 8
"""Numbers of tokens that a match may have."""
MAX_LINKS = 16
"""Links that a lookup follows for one match length: the maximum number of occurrences."""
MAX_PAIRS = 128
"""Occurrences of a sequence's last two tokens in itself that are compared, the newest ones."""
END = -1
"""Entry of the ring after each answer. It equals no token."""
BYTES_PER_TOKEN = 4 * (2 + 2 * (MAX_MATCH - MIN_MATCH + 1))
"""One token, its owner, and one entry of ``newest`` and of ``previous`` per match length."""

_NONE = -1
_FACTOR = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_FACTORS = [pow(_FACTOR, power, 1 << 64) for power in range(1, MAX_MATCH + 1)]
"""Factor of the last token of a match, of the one before it, .."""
_HIGH = 32
"""First bit of a hash that is used: lower bits depend on the lower bits of the tokens alone."""


class Match(NamedTuple):
    """The longest match of a sequence's end, and what followed it."""

    length: int
    continuations: list[list[int]]
    """Tokens after each occurrence, newest occurrence first; ``END`` where an answer ended."""


NO_MATCH = Match(0, [])


class SuffixCorpus:
    """The newest answers, in a fixed number of bytes. Not thread-safe.

    Args:
        max_bytes: Bound of ``nbytes``; room for an answer of two tokens at least.

    Raises:
        ValueError: the bound is too small.
    """

    def __init__(self, max_bytes: int) -> None:
        self._capacity = max_bytes // BYTES_PER_TOKEN
        if self._capacity <= MIN_MATCH:
            raise ValueError(f"a corpus needs {(MIN_MATCH + 1) * BYTES_PER_TOKEN} bytes, not {max_bytes}")
        lengths = MAX_MATCH - MIN_MATCH + 1
        self._tokens = np.full(self._capacity, END, np.int32)
        self._owners = np.zeros(self._capacity, np.int32)
        self._newest = np.full((lengths, self._capacity), _NONE, np.int32)
        self._previous = np.full((lengths, self._capacity), _NONE, np.int32)
        self._next = 0
        """Where the next answer begins."""
        self._written = self._forgotten = 0
        """Entries written and forgotten so far; entry n lies at n modulo the capacity."""
        # Python reads a memoryview several times as fast as a small part of an array.
        self._view = self._tokens.data
        self._bytes = self._view.cast("B")
        self._owners_view = self._owners.data
        self._links = [(n.data, p.data) for n, p in zip(self._newest, self._previous, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the corpus, whatever it holds."""
        return self._tokens.nbytes + self._owners.nbytes + self._newest.nbytes + self._previous.nbytes

    @property
    def capacity(self) -> int:
        """Number of tokens for which there is room, the entry after each answer included."""
        return self._capacity

    @property
    def num_tokens(self) -> int:
        """Number of tokens that it holds."""
        return int(np.count_nonzero(self._tokens != END))

    @property
    def written(self) -> int:
        """Entries written so far, those overwritten since included: a point in time for ``forget``."""
        return self._written

    def forget(self, before: int) -> None:
        """Remove the answers that were inserted while ``written`` was below ``before``."""
        first = max(self._forgotten, self._written - self._capacity)
        self._forgotten = max(before, self._forgotten)
        if first < before:
            self._tokens[np.arange(first, before) % self._capacity] = END

    def insert(self, tokens: Sequence[int], owner: int = 0) -> None:
        """Add an answer; overwrite the oldest ones. Of an answer larger than the corpus the end is kept.

        An answer lies in one piece: if it does not fit before the end of the ring, it begins at the start.

        Args:
            tokens: The answer.
            owner: A number of 31 bits.
        """
        answer = np.array(tokens[-(self._capacity - 1) :], np.int32)
        if self._next + len(answer) >= self._capacity:
            self._tokens[self._next :] = END
            self._written += self._capacity - self._next
            self._next = 0
        first = self._next
        self._next += len(answer) + 1
        self._written += len(answer) + 1
        self._tokens[first : self._next - 1] = answer
        self._tokens[self._next - 1] = END
        self._owners[first : self._next] = owner
        for (newest, previous), (length, buckets) in zip(self._links, self._hash_matches(answer, owner), strict=True):
            for end, bucket in enumerate(buckets, start=first + length - 1):
                previous[end] = newest[bucket]
                newest[bucket] = end

    def find(self, tokens: Sequence[int], depth: int, owner: int = 0) -> Match:
        """Return the longest match of the end of ``tokens`` in the owner's answers.

        Continuations have up to ``depth`` tokens.
        """
        wanted = array("i", tokens[-MAX_MATCH:]).tobytes()
        for length, bucket in reversed(self._hash_ends(tokens[-MAX_MATCH:], owner)):
            ends = self._follow_links(length, bucket, wanted[-4 * length :], owner)
            if ends:
                return Match(length, [self._read_continuation(end, depth) for end in ends])
        return NO_MATCH

    def _follow_links(self, length: int, bucket: int, wanted: bytes, owner: int) -> list[int]:
        """Return the ends of the occurrences of ``wanted`` in the owner's answers, newest first."""
        newest, previous = self._links[length - MIN_MATCH]
        ends, end, age = [], newest[bucket], -1
        for _ in range(MAX_LINKS):
            younger, age = age, (self._next - 1 - end) % self._capacity
            # A link that does not lead to an older entry belongs to tokens that are overwritten.
            if end == _NONE or age <= younger:
                break
            # All tokens between two entries ``END`` have one owner, and ``wanted`` has no ``END``.
            if self._owners_view[end] == owner and self._bytes[4 * (end + 1 - length) : 4 * (end + 1)] == wanted:
                ends.append(end)
            end = previous[end]
        return ends

    def _read_continuation(self, end: int, depth: int) -> list[int]:
        following = self._view[end + 1 : end + 1 + depth].tolist()
        return following[: following.index(END) + 1] if END in following else following

    def _hash_ends(self, tokens: Sequence[int], owner: int) -> list[tuple[int, int]]:
        """Return each match length and the bucket of the last tokens of that number."""
        hashed, found = owner << _HIGH, []
        for length, (token, factor) in enumerate(zip(reversed(tokens), _FACTORS, strict=False), start=1):
            hashed = (hashed + token * factor) & _MASK
            if length >= MIN_MATCH:
                found.append((length, (hashed >> _HIGH) % self._capacity))
        return found

    def _hash_matches(self, answer_T: I32, owner: int) -> Iterator[tuple[int, list[int]]]:
        """Yield each match length and the buckets of all runs of that many tokens, as ``_hash_ends`` does."""
        wide_T = answer_T.astype(np.uint64)
        hashed = np.full(len(answer_T) + 1, owner << _HIGH, np.uint64)
        for length, factor in enumerate(_FACTORS, start=1):
            hashed = hashed[1:] + wide_T[: max(len(answer_T) + 1 - length, 0)] * np.uint64(factor)
            if length >= MIN_MATCH:
                yield length, ((hashed >> np.uint64(_HIGH)) % np.uint64(self._capacity)).tolist()


class SequenceHistory:
    """Where the pairs of tokens of one sequence occur, while it grows."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """Position of the second token by pair, oldest first."""
        self._next = 1
        """First position that is not in ``_ends``."""

    def find(self, tokens: list[int], depth: int) -> Match:
        """Return the longest earlier match of the end of the sequence in itself, as ``SuffixCorpus.find`` does.

        A continuation may be shorter than ``depth`` where the sequence ends.

        Args:
            tokens: The sequence: those of the previous call, and those added since.
            depth: Maximum number of tokens of a continuation.
        """
        last = len(tokens) - 1
        for end in range(self._next, last):
            self._ends.setdefault((tokens[end - 1], tokens[end]), []).append(end)
        self._next = max(last, 1)
        length, ends = MIN_MATCH, self._ends.get(tuple(tokens[-MIN_MATCH:]), [])[-MAX_PAIRS:]
        if not ends:
            return NO_MATCH
        while length < MAX_MATCH:
            longer = [end for end in ends if end >= length and tokens[end - length] == tokens[last - length]]
            if not longer:
                break
            length, ends = length + 1, longer
        return Match(length, [tokens[end + 1 : end + 1 + depth] for end in reversed(ends[-MAX_LINKS:])])


def choose_longest(first: Match, second: Match) -> Match:
    """Return the longer match; of two with the same length the continuations of both, those of ``first`` as newer."""
    if first.length == second.length:
        return Match(first.length, first.continuations + second.continuations)
    return max(first, second, key=lambda match: match.length)


def likeliest_chain(continuations: Iterable[Sequence[int]]) -> Iterator[tuple[int, float]]:
    """Yield the tokens of the most frequent continuation, each with the estimated probability that it follows.

    At each depth, the token that most continuations have is chosen; of equally frequent ones the newest. Only
    continuations that agree with the tokens chosen so far count. Of n of them, k with the chosen token give a
    probability of k / (n + 1): the target may also choose a token that followed no occurrence.

    Args:
        continuations: As in ``Match``. Those that have no token at a depth, other than ``END``, do not count there.
    """
    agreeing, depth = list(continuations), 0
    while agreeing := [tokens for tokens in agreeing if len(tokens) > depth]:
        counts: dict[int, int] = {}  # several times as fast as a Counter
        for tokens in agreeing:
            counts[tokens[depth]] = counts.get(tokens[depth], 0) + 1
        token = max(counts, key=counts.__getitem__)
        if token == END:
            return
        yield token, counts[token] / (len(agreeing) + 1)
        agreeing = [tokens for tokens in agreeing if tokens[depth] == token]
        depth += 1
