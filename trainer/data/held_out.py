"""The held-out set: which samples versions are compared on, and when they are trained on after all.

A hash of the prompt key draws the prompts. A prompt enters the set with its newest samples and leaves it with all of
them; they are trained on from then on, and so are later requests with the prompt. So no prompt is in the set and in the
training data at once.

The set is stratified by label. When it is full, in samples or in bytes, the label with the most prompts gives way: the
one of them that was seen longest ago leaves. (Among the queues of a shared buffer this is "longest queue drop": Wei,
Coyle and Hsiao, "An optimal buffer management policy for high-performance packet switching", 1991.) So a frequent label
does not push out a rare one: a label with fewer prompts than the others loses none.

Versions are compared on present traffic. The weight of a label is therefore its share of the newest samples of all
traffic, ``RECENT`` times the set's capacity (post-stratification: Cochran, "Sampling Techniques", 1977, section 5A.9).
A label that these samples do not contain leaves the set.

The set depends on the order and the sizes of the samples alone, not on the progress of the training.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from schemas.hash_sampling import hash_ratio
from trainer.data.samples import own_tensors
from trainer.data.table_reader import TableEntry

RECENT = 4
"""Times the set's capacity: newest samples, held out or not, that show which share of traffic a label has."""
PROMPTS_REMEMBERED = 1 << 16
"""Prompts that left the set and are not held out again; far more than a replay buffer has samples."""


def is_held_out(prompt_key: str, ratio: float) -> bool:
    """Return whether a prompt is drawn for the held-out set; the same for every trainer at all times.

    Args:
        prompt_key: As in the table ``accepted``; the request's id where that is null.
        ratio: Share of the prompts that are drawn.
    """
    return hash_ratio(prompt_key) < ratio


class HeldOutSet:
    """Samples of the newest prompts of each label that were drawn.

    Iterating yields the samples, those of the prompt that was seen longest ago first.
    """

    def __init__(self, ratio: float, capacity: int, max_bytes: int, counts: Counter[str]) -> None:
        """Start empty.

        Args:
            ratio: Share of the prompts that are drawn.
            capacity: Maximum number of samples.
            max_bytes: Maximum bytes of their tensors, features that are to be recomputed included.
            counts: Counts the samples that leave to be trained on, and those that are skipped.
        """
        self._ratio = ratio
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._samples_per_prompt = max(1, capacity // 8)
        self._counts = counts
        self._prompts: dict[str, deque[TableEntry]] = {}
        """Samples by prompt key, the prompt that was seen longest ago first; its oldest sample first."""
        self._recent: deque[str | None] = deque(maxlen=RECENT * capacity)
        """Labels of the newest samples of all traffic, the oldest one first."""
        self._left: dict[str, None] = {}
        """Keys of the prompts that left, the one that was seen longest ago first."""
        counts.update({"samples_left_held_out": 0, "samples_skipped_held_out": 0})

    def __iter__(self) -> Iterator[TableEntry]:
        return (entry for samples in self._prompts.values() for entry in samples)

    @property
    def bytes(self) -> int:
        """Bytes of the samples' tensors, features that are to be recomputed included."""
        return sum(entry.sample.feature_bytes + entry.sample.other_bytes for entry in self)

    @property
    def weights(self) -> dict[str | None, float]:
        """By label, the share of its samples in recent traffic relative to their share in the set."""
        held, recent = Counter(entry.sample.label for entry in self), Counter(self._recent)
        return {label: recent[label] / recent.total() / (held[label] / held.total()) for label in held}

    @property
    def recent_labels(self) -> tuple[str | None, ...]:
        """Labels of the newest samples of all traffic, the oldest one first."""
        return tuple(self._recent)

    @property
    def left(self) -> tuple[str, ...]:
        """Keys of the prompts that left, the one that was seen longest ago first."""
        return tuple(self._left)

    def add(self, entry: TableEntry) -> list[TableEntry]:
        """Hold a sample out if its prompt is drawn; return the samples that are trained on from now on.

        A prompt holds an eighth of the set at most: its oldest sample is skipped then, and never trained on.
        """
        self._recent.append(entry.sample.label)
        trained = [] if self._hold(entry) else [entry]
        while (key := self._find_next()) is not None:
            trained += self._release(key)
        return trained

    def restore(self, entries: Iterable[TableEntry], left: Iterable[str], recent_labels: Iterable[str | None]) -> None:
        """Restore the set that yielded these entries, had these prompts that ``left``, and these ``recent_labels``."""
        self._prompts.clear()
        for entry in entries:
            self._prompts.setdefault(entry.sample.prompt_key, deque()).append(entry)
        self._left = dict.fromkeys(left)
        self._recent.clear()
        self._recent.extend(recent_labels)

    def _hold(self, entry: TableEntry) -> bool:
        """Add a sample to the set, or return False: it is not drawn, or its prompt left."""
        key = entry.sample.prompt_key
        if not is_held_out(key, self._ratio):
            return False
        if key in self._left:
            self._remember(key)
            return False
        samples = self._prompts[key] = self._prompts.pop(key, deque[TableEntry]())
        entry.sample = own_tensors(entry.sample)
        samples.append(entry)
        if len(samples) > self._samples_per_prompt:
            samples.popleft()
            self._counts["samples_skipped_held_out"] += 1
        return True

    def _find_next(self) -> str | None:
        """Return the key of the prompt that leaves next; None if all stay."""
        labels = {key: samples[-1].sample.label for key, samples in self._prompts.items()}
        by_label = Counter(labels.values())
        leaving = by_label.keys() - set(self._recent)
        if not leaving:
            if sum(map(len, self._prompts.values())) <= self._capacity and self.bytes <= self._max_bytes:
                return None
            most = max(by_label.values())
            leaving = {label for label, prompts in by_label.items() if prompts == most}
        return next(key for key, label in labels.items() if label in leaving)

    def _release(self, key: str) -> Iterable[TableEntry]:
        samples = self._prompts.pop(key)
        self._counts["samples_left_held_out"] += len(samples)
        self._remember(key)
        return samples

    def _remember(self, key: str) -> None:
        self._left.pop(key, None)
        self._left[key] = None
        if len(self._left) > PROMPTS_REMEMBERED:
            del self._left[next(iter(self._left))]
