"""Samples to train on again, drawn by age and label; and how much a stale rejected branch counts.

The weight of a sample in the draw is ::

    2 ^ (-age / half_life)  *  count ^ -balance

where age is the number of newer samples in the buffer, and count the number of samples with its label that can be
drawn. At balance 0 labels appear as often as in traffic, at 1 all labels are equally likely; in between, a label with
a share s of the samples appears in proportion to s ^ (1 - balance). Samples without a label form one label. Age counts
at any balance, so a label that traffic no longer contains fades with time.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from schemas.settings import Train
from trainer.data.feature_files import FeatureFiles
from trainer.data.samples import Sample, own_tensors

MIN_STALENESS_WEIGHT = 1 / 16
"""Weight of the stalest branches."""


@dataclass(slots=True, kw_only=True)
class ReplayEntry:
    """A sample, and how many epochs it was trained on."""

    sample: Sample
    epochs: int = 0
    feature_bytes: int = 0
    """In a replay buffer with files: bytes of the features, wherever they are; 0 without further epochs."""
    other_bytes: int = 0
    """The same of all other tensors, which stay in memory."""


EntryT = TypeVar("EntryT", bound=ReplayEntry)


class ReplayBuffer(Generic[EntryT]):
    """The newest samples that were trained on, each for ``train.max_epochs`` at most.

    They are bounded by ``train.replay_buffer_size`` in number, and with files by ``train.replay_buffer_bytes`` in size.
    Which samples are kept depends on their order, sizes and epochs alone: a restart keeps the same.
    """

    def __init__(self, settings: Train, generator: random.Random, files: FeatureFiles | None = None) -> None:
        """Create an empty buffer; with files, call ``limit_bytes`` after changes."""
        self._settings = settings
        self._random = generator
        self._files = files
        self._entries: deque[EntryT] = deque()

    def __iter__(self) -> Iterator[EntryT]:
        """Iterate over the entries, oldest first."""
        return iter(self._entries)

    @property
    def drawable(self) -> int:
        """Number of samples below their maximum of epochs."""
        return len(self._drawable())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(entry.other_bytes + entry.sample.features.nbytes for entry in self._entries)

    @property
    def file_bytes(self) -> int:
        """Bytes of the features in files."""
        return sum(entry.sample.stored.size for entry in self._entries if entry.sample.stored)

    def add(self, entry: EntryT) -> None:
        """Append a sample; the oldest one gives way if the buffer is full."""
        if self._files:
            entry.sample = own_tensors(entry.sample)
            entry.feature_bytes, entry.other_bytes = entry.sample.feature_bytes, entry.sample.other_bytes
        self._entries.append(entry)
        if len(self._entries) > self._settings.replay_buffer_size:
            self._remove_oldest()

    def draw(self, number: int) -> list[EntryT]:
        """Draw samples without replacement, as many as can be drawn, and count an epoch for each."""
        candidates, newest = self._drawable(), len(self._entries) - 1
        log_weights = compute_log_weights(
            [newest - index for index, _ in candidates],
            [entry.sample.label for _, entry in candidates],
            self._settings.replay_half_life,
            self._settings.label_balance,
        )
        drawn = [candidates[i][1] for i in draw_indices(self._random, log_weights, number)]
        for entry in drawn:
            entry.epochs += 1
        return drawn

    def limit_bytes(self) -> int:
        """Remove the oldest samples beyond ``train.replay_buffer_bytes``, then move features to files.

        Only the newest samples keep their features in memory, up to ``train.replay_memory_bytes`` for all tensors.
        Samples without further epochs lose their features. What is already in a file stays there.

        Returns:
            The number of samples that were removed because their features could not be written.
        """
        limit, memory_limit = self._settings.replay_buffer_bytes, self._settings.replay_memory_bytes
        for entry in self._entries:
            if entry.feature_bytes and not self._is_drawable(entry):
                self._release_features(entry)
        others = sum(entry.other_bytes for entry in self._entries)
        total = others + sum(entry.feature_bytes for entry in self._entries)
        while total > limit or others > memory_limit:
            oldest = self._remove_oldest()
            total -= oldest.other_bytes + oldest.feature_bytes
            others -= oldest.other_bytes
        excess, failed = self.memory_bytes - memory_limit, list[EntryT]()
        for entry in self._entries:
            if excess <= 0:
                break
            if entry.sample.has_features:
                excess -= entry.sample.features.nbytes
                if not self._store(entry):
                    excess -= entry.other_bytes
                    failed.append(entry)
        for entry in failed:
            self._entries.remove(entry)
        return len(failed)

    def clear(self) -> None:
        """Remove all samples."""
        while self._entries:
            self._remove_oldest()

    def _drawable(self) -> list[tuple[int, EntryT]]:
        return [(i, entry) for i, entry in enumerate(self._entries) if self._is_drawable(entry)]

    def _is_drawable(self, entry: EntryT) -> bool:
        return entry.epochs < self._settings.max_epochs

    def _store(self, entry: EntryT) -> bool:
        if self._files:
            entry.sample = self._files.store(entry.sample)
        return not entry.sample.has_features

    def _remove_oldest(self) -> EntryT:
        oldest = self._entries.popleft()
        if self._files and oldest.sample.stored:
            self._files.remove(oldest.sample.stored)
        return oldest

    def _release_features(self, entry: EntryT) -> None:
        sample = entry.sample
        if self._files and sample.stored:
            self._files.remove(sample.stored)
        nothing = sample.features.new_empty(0, sample.features.shape[-1])
        entry.sample, entry.feature_bytes = replace(sample, features=nothing, stored=None), 0


def compute_log_weights(
    ages: Sequence[int], labels: Sequence[str | None], half_life: float = 0.0, balance: float = 0.0
) -> list[float]:
    """Return the logarithm of each sample's weight, up to a constant.

    Args:
        ages: Number of newer samples, for each sample.
        labels: Label of each sample.
        half_life: Age at which the weight is half of a new sample's; 0 turns aging off.
        balance: From 0 (labels as in traffic) to 1 (all labels equally likely).
    """
    counts = Counter(labels)
    decay = math.log(2) / half_life if half_life else 0.0
    return [-decay * age - balance * math.log(counts[label]) for age, label in zip(ages, labels, strict=True)]


def draw_indices(generator: random.Random, log_weights: Sequence[float], number: int) -> list[int]:
    """Draw indices without replacement, each in proportion to the weights of the remaining ones.

    An exponential race: the smallest of E_i / w_i, with E_i exponential, is i with probability w_i / sum w, and the
    order of the others equals that of further draws (Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir", 2006). In logarithms no weight underflows.

    Args:
        generator: Draws one number per weight, whatever ``number`` is.
        log_weights: Logarithms of the weights.
        number: Number of indices to draw, at most one per weight.
    """
    arrivals = [math.log(max(generator.expovariate(1.0), sys.float_info.min)) - w for w in log_weights]
    return heapq.nsmallest(number, range(len(arrivals)), key=arrivals.__getitem__)


def staleness_weight(versions_behind: int, half_life: float) -> float:
    """Return the weight in [``MIN_STALENESS_WEIGHT``, 1] of a rejected branch that an older version drafted.

    Only rejected branches go stale. The teacher is the target's distribution after any drafted tokens, so no branch is
    wrong, and accepted samples are what the target generates under any draft. But the draft of that time chose the
    branch: it helps where today's draft would fail in the same way, which becomes rarer with every version. Branches of
    the suffix drafter alone do not depend on a version, so they do not go stale.

    Args:
        versions_behind: Versions between the drafting one and the newest; 0 or less is not stale.
        half_life: Number of versions after which a branch counts half; 0 turns staleness off.
    """
    if not half_life:
        return 1.0
    return max(math.exp2(-max(versions_behind, 0) / half_life), MIN_STALENESS_WEIGHT)


def version_number(speculator: str) -> int:
    """Return the number of a registered version; 0 for the draft of day 0 and for no draft."""
    return int(speculator) if speculator.isdecimal() else 0
