"""The held-out set: which samples versions are compared on, and when they are trained on after all.

A hash of the prompt key draws the prompts. A prompt enters the set with its newest samples and leaves it with all of
them; they are trained on from then on, and so are later requests with the prompt. So no prompt is in the set and in the
training data at once.

The set is stratified by label. When it is full, the label with the most prompts gives way: the one of them that was
seen longest ago leaves. (Among the queues of a shared buffer this is "longest queue drop": Wei, Coyle and Hsiao, "An
optimal buffer management policy for high-performance packet switching", 1991.) So a frequent label does not push out a
rare one: a label with fewer prompts than the others loses none. A label that traffic does not contain any more leaves
with time: a prompt stays while ``MAX_AGE`` times as many samples are drawn as the set can hold.

The set depends on the order of the samples alone, not on the progress of the training.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from schemas.hash_sampling import hash_ratio
from trainer.data.table_reader import TableEntry

MAX_AGE = 4
"""Times the set's capacity: drawn samples after which a prompt leaves that does not return."""
PROMPTS_REMEMBERED = 1 << 16
"""Prompts that left the set and are not held out again; far more than a replay buffer has samples."""


def is_held_out(prompt_key: str, ratio: float) -> bool:
    """Return whether a prompt is drawn for the held-out set; the same for every trainer at all times.

    Args:
        prompt_key: As in the table ``accepted``; the request's id where that is null.
        ratio: Share of the prompts that are drawn.
    """
    return hash_ratio(prompt_key) < ratio


@dataclass(slots=True)
class _Prompt:
    """A prompt in the set."""

    samples: deque[TableEntry] = field(default_factory=deque)
    """The newest ones, oldest first."""
    seen: int = 0
    """Number of drawn samples when the newest of them was added."""

    @property
    def label(self) -> str | None:
        return self.samples[-1].sample.label


class HeldOutSet:
    """Samples of the newest prompts of each label that were drawn.

    Iterating yields the samples, those of the prompt that was seen longest ago first.
    """

    def __init__(self, ratio: float, capacity: int, counts: Counter[str]) -> None:
        """Start empty.

        Args:
            ratio: Share of the prompts that are drawn.
            capacity: Maximum number of samples.
            counts: Counts the samples that leave to be trained on, and those that are skipped.
        """
        self._ratio = ratio
        self._capacity = capacity
        self._samples_per_prompt = max(1, capacity // 8)
        self._counts = counts
        self._drawn = 0
        self._prompts: dict[str, _Prompt] = {}
        """By prompt key, the one that was seen longest ago first."""
        self._left: dict[str, None] = {}
        """Keys of the prompts that left, the one that was seen longest ago first."""
        counts.update({"samples_left_held_out": 0, "samples_skipped_held_out": 0})

    def __iter__(self) -> Iterator[TableEntry]:
        return (entry for prompt in self._prompts.values() for entry in prompt.samples)

    @property
    def ages(self) -> tuple[tuple[TableEntry, int], ...]:
        """The samples, each with the number of samples that were drawn since its prompt was seen."""
        return tuple((entry, self._drawn - one.seen) for one in self._prompts.values() for entry in one.samples)

    @property
    def left(self) -> tuple[str, ...]:
        """Keys of the prompts that left, the one that was seen longest ago first."""
        return tuple(self._left)

    def add(self, entry: TableEntry) -> list[TableEntry]:
        """Hold a sample out if its prompt is drawn; return the samples that are trained on from now on.

        A prompt holds an eighth of the set at most: its oldest sample is skipped then, and never trained on.
        """
        key = entry.sample.prompt_key
        if not is_held_out(key, self._ratio):
            return [entry]
        if key in self._left:
            self._remember(key)
            return [entry]
        prompt = self._prompts.pop(key, None) or _Prompt()
        self._drawn += 1
        self._prompts[key] = prompt
        prompt.seen = self._drawn
        prompt.samples.append(entry)
        if len(prompt.samples) > self._samples_per_prompt:
            prompt.samples.popleft()
            self._counts["samples_skipped_held_out"] += 1
        leaving: list[TableEntry] = []
        while (next_key := self._find_next()) is not None:
            leaving += self._release(next_key)
        return leaving

    def restore(self, ages: Iterable[tuple[TableEntry, int]], left: Iterable[str]) -> None:
        """Restore the set that had these ``ages`` and these prompts that ``left``."""
        self._drawn = 0
        self._prompts.clear()
        for entry, age in ages:
            prompt = self._prompts.setdefault(entry.sample.prompt_key, _Prompt(seen=-age))
            prompt.samples.append(entry)
        self._left = dict.fromkeys(left)

    def _find_next(self) -> str | None:
        """Return the key of the prompt that leaves next; None if all stay."""
        oldest = next(iter(self._prompts), None)
        if oldest is None or self._drawn - self._prompts[oldest].seen > MAX_AGE * self._capacity:
            return oldest
        if sum(len(prompt.samples) for prompt in self._prompts.values()) <= self._capacity:
            return None
        by_label = Counter(prompt.label for prompt in self._prompts.values())
        most = max(by_label.values())
        return next(key for key, prompt in self._prompts.items() if by_label[prompt.label] == most)

    def _release(self, key: str) -> Iterable[TableEntry]:
        samples = self._prompts.pop(key).samples
        self._counts["samples_left_held_out"] += len(samples)
        self._remember(key)
        return samples

    def _remember(self, key: str) -> None:
        self._left.pop(key, None)
        self._left[key] = None
        if len(self._left) > PROMPTS_REMEMBERED:
            del self._left[next(iter(self._left))]
