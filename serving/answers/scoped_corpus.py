"""The corpus of a node, by scope: from whose answers a request is drafted.

``request``  The corpus is empty: a request is drafted from its own tokens alone.
``label``    Answers to requests with the same label. A request without a label has its own tokens alone.
``node``     Answers of this node.
``fleet``    Answers of all nodes.

All answers belong to the node's line: the consumer of the answers topic drops those of other lines. An answer is
forgotten when newer ones need its place, or ``retention`` seconds after it was inserted.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.settings.sections import SuffixScope
from schemas.suffix_corpus import NO_MATCH, Match, SuffixCorpus

I32 = npt.NDArray[np.int32]

_EVERYONE = 0
"""Owner of all answers where labels do not separate them."""
_OWNER_MASK = (1 << 31) - 1
_MARKS = 64
"""Points in time at which answers are forgotten, per ``retention``."""
_QUEUED_BYTES = 256
"""Upper bound of the size of a waiting answer without its tokens."""
_QUEUE_SHARE = 8
"""The answers that wait may have this part of the corpus's bytes."""


class ScopedCorpus:
    """A ``SuffixCorpus`` in which a request finds only answers of its scope.

    The thread that drafts calls all methods but ``offer``, which hands it answers of other nodes and of an earlier
    process of this node.

    Args:
        scope: Whose answers a request is drafted from.
        max_bytes: Bound of ``nbytes``, over all labels; the oldest answers are overwritten, whatever their labels.
        retention: Seconds for which an answer is kept, within a 64th.
        clock: Monotonic seconds.

    Raises:
        ValueError: the bound is too small.
    """

    def __init__(
        self, scope: SuffixScope, max_bytes: int, retention: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._scope, self._key = scope, secrets.token_bytes(16)
        self._max_queue_bytes = max_bytes // _QUEUE_SHARE
        self._corpus = SuffixCorpus(max_bytes - self._max_queue_bytes) if scope != "request" else None
        self._retention, self._clock = retention, clock
        self._marks: deque[tuple[float, int]] = deque()
        """Times with the corpus's ``written`` at the time, oldest first."""
        self._last_mark = (-math.inf, 0)
        self._lock = threading.Lock()
        self._queue: deque[tuple[int, I32]] = deque()
        """Owners and answers that wait, oldest first."""
        self._queue_bytes = self._overflowed = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the corpus and of the answers that wait."""
        return self._corpus.nbytes + self._queue_bytes if self._corpus else 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the corpus; callable from any thread."""
        return self._corpus.num_tokens if self._corpus else 0

    @property
    def overflowed(self) -> int:
        """Answers that waited and were dropped before there was time to insert them."""
        return self._overflowed

    def find(self, label: str | None, tokens: Sequence[int], depth: int) -> Match:
        """Return the longest match of the end of ``tokens`` in the answers that a request with this label may use.

        Args:
            label: Label of the request.
            tokens: The sequence, or its last ``MAX_MATCH`` tokens.
            depth: Maximum number of tokens of a continuation.
        """
        owner = self._choose_owner(label)
        if self._corpus is None or owner is None:
            return NO_MATCH
        return self._corpus.find(tokens, depth, owner)

    def insert(self, label: str | None, tokens: Sequence[int]) -> None:
        """Add the answer to a request with this label, if the scope shares it.

        Args:
            label: Label of the request.
            tokens: The last ``MAX_MATCH`` tokens of the prompt, and the answer.
        """
        owner = self._choose_owner(label)
        if self._corpus is not None and owner is not None:
            self._corpus.insert(tokens, owner)

    def offer(self, answers: Iterable[tuple[str | None, I32]]) -> None:
        """Let answers wait for ``update``, with their labels; of too many the oldest ones are dropped. Thread-safe."""
        with self._lock:
            for label, tokens in answers:
                owner = self._choose_owner(label)
                if owner is not None:
                    self._queue.append((owner, tokens))
                    self._queue_bytes += _queued_bytes(tokens)
            while self._queue_bytes > self._max_queue_bytes:
                _, dropped = self._queue.popleft()
                self._queue_bytes -= _queued_bytes(dropped)
                self._overflowed += 1

    @property
    def is_due(self) -> bool:
        """Whether ``update`` has something to do."""
        now = self._clock()
        return bool(self._queue) or self._is_expired(now) or self._is_mark_due(now)

    def update(self, max_tokens: int) -> None:
        """Insert answers that wait, and forget those whose retention has ended.

        Args:
            max_tokens: Number of tokens after which the rest waits for the next call; an answer is inserted whole.
        """
        if self._corpus is None:
            return
        now = self._clock()
        while self._is_expired(now):
            _, written = self._marks.popleft()
            self._corpus.forget(written)
        if self._is_mark_due(now):
            self._last_mark = (now, self._corpus.written)
            self._marks.append(self._last_mark)
        while self._queue and max_tokens > 0:
            with self._lock:
                owner, tokens = self._queue.popleft()
                self._queue_bytes -= _queued_bytes(tokens)
            self._corpus.insert(tokens, owner)  # type: ignore[arg-type]  # an array is a sequence in all but name
            max_tokens -= len(tokens)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        yield GaugeMetricFamily("aurora_serve_corpus_tokens", "Tokens in the corpus.", value=self.num_tokens)
        yield GaugeMetricFamily("aurora_serve_corpus_bytes", "Bytes of the corpus.", value=self.nbytes)
        yield CounterMetricFamily(
            "aurora_serve_corpus_overflowed",
            "Answers read from the answers topic and dropped before the engine had time to insert them.",
            value=self._overflowed,
        )

    def _choose_owner(self, label: str | None) -> int | None:
        """Return the owner of answers with this label in the corpus; None if they are not shared.

        The key of the hash is random, so a client cannot choose a label with the owner of another one.
        """
        match self._scope:
            case "request":
                return None
            case "label":
                if label is None:
                    return None
                hashed = blake2b(label.encode(errors="surrogatepass"), digest_size=4, key=self._key)
                return int.from_bytes(hashed.digest()) & _OWNER_MASK
            case "node" | "fleet":
                return _EVERYONE

    def _is_expired(self, now: float) -> bool:
        return bool(self._marks) and self._marks[0][0] <= now - self._retention

    def _is_mark_due(self, now: float) -> bool:
        """Return whether answers were inserted since the last mark, and that one is old enough."""
        time_of_last, written = self._last_mark
        is_old = now - time_of_last >= self._retention / _MARKS
        return is_old and self._corpus is not None and self._corpus.written > written


def _queued_bytes(tokens: I32) -> int:
    return _QUEUED_BYTES + tokens.nbytes
