"""Self-generated data: the target writes prompts and answers itself, for training while there is no traffic.

Before the first traffic the target writes prompts and answers from its chat template. In each pause of the traffic it
answers past prompts again, sampled: the tables hold the answers that were served already. (TLT, arXiv 2511.16665, also
trains drafts in the time that the target leaves idle.) The samples stay in memory; nothing is published.

All of it happens in periods of ``train.self_generation`` seconds, one before the first traffic and one in each pause. A
period generates on one thread beside the training; its samples, replay buffer and copy of the target end with it.
Traffic ends a period, so a batch of traffic is trained on in the very next step. A restart continues the period, with
other prompts.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import structlog
import torch

from schemas.settings import Settings, Train
from trainer.data.conversations import Opening, draw_openings, find_past_prompts, generate, read_chat_template
from trainer.data.draft_vocabulary import Halves, TokenCounts
from trainer.data.held_out import is_held_out
from trainer.data.replay_buffer import ReplayBuffer, ReplayEntry
from trainer.data.samples import Sample, mark_suffix_predictions, split_sample
from trainer.data.target import GeneratingTarget

log = structlog.get_logger()

CONVERSATIONS = 32
"""Conversations that are generated together."""
PAST_PROMPT_TEMPERATURE = 0.8
MAX_WAITING = 2 * CONVERSATIONS
"""Samples that wait to be trained on, beyond which the generation waits."""
SAMPLES_KEPT = 512
"""Size of the replay buffer of a period."""

SampleSource = Callable[[Sequence[Opening], int], Iterator[list[Sample]]]
"""Returns the samples that are generated from past prompts, or without any from the chat template, with a seed."""


def stream_samples(
    settings: Settings, capture_layers: tuple[int, ...], device: torch.device, past: Sequence[Opening], seed: int
) -> Iterator[list[Sample]]:
    """Load the target and generate without end; yield the samples of the answers that ended, after every forward.

    A target whose files exceed ``train.self_generation_target_bytes`` is not loaded, and yields nothing.

    Args:
        settings: Target, and what samples are cut by.
        capture_layers: Layers whose states are the features.
        device: Where the target runs.
        past: Past prompts to answer; with none, the target writes the prompts too.
        seed: Of all random choices.

    Raises:
        OSError: the target cannot be read.
        ValueError: it has no chat template.
    """
    folder, train = Path(settings.target.path), settings.train
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > train.self_generation_target_bytes:
        log.info("self_generation_skipped", target_bytes=size, setting="train.self_generation_target_bytes")
        return
    template = None if past else read_chat_template(folder)
    target = GeneratingTarget(folder, capture_layers, device)
    chooser = random.Random(seed)  # noqa: S311
    generator = torch.Generator(device).manual_seed(seed)
    log.info("self_generation_started", past_prompts=len(past))
    for number in count():
        if template is None:
            openings = chooser.choices(past, k=CONVERSATIONS)
        else:
            openings = draw_openings(template, CONVERSATIONS, chooser)
        name = f"self-generated-{seed}-{number}"
        for ended in generate(target, openings, settings.traces.top_k, generator, name):
            parts = [
                part for sample in ended for part in split_sample(sample, train.max_sample_tokens, train.context_tokens)
            ]
            yield parts if train.suffix_predicted_weight == 1 else list(map(mark_suffix_predictions, parts))


class SelfGeneration:
    """The samples of the current period. Call the methods from the thread that trains."""

    def __init__(self, settings: Train, source: SampleSource, clock: Callable[[], float] = time.monotonic) -> None:
        """Without traffic so far: the period before it begins.

        Args:
            settings: Bounds in time and share.
            source: Generates samples.
            clock: Monotonic seconds.
        """
        self.counts: Counter[str] = Counter(failures=0, samples=0)
        """Failures, and samples that were generated; copy it to read it from another thread."""
        self._settings, self._source, self._clock = settings, source, clock
        self._paused_at, self._has_traffic = clock(), False
        self._token_counts = TokenCounts()
        self._period: _Period | None = None
        self._periods = 0
        self._held_out: list[Sample] = []

    @property
    def held_out(self) -> dict[Sample, float]:
        """Samples that are not trained on, to compare versions before there is traffic; empty after it. All weigh 1."""
        return dict.fromkeys(self._held_out, 1.0)

    @property
    def token_counts(self) -> Halves:
        """Counts of the output tokens that were returned, by half of the conversations."""
        return self._token_counts.halves

    @property
    def paused_s(self) -> float:
        """Seconds without traffic: since the last of it, or since the start."""
        return self._clock() - self._paused_at

    def restore(self, paused_s: float, *, has_traffic: bool) -> None:
        """Continue the pause that a checkpoint was written in, or begin one with 0 seconds.

        Args:
            paused_s: ``paused_s`` at that time.
            has_traffic: Whether there was traffic, or a draft that has learned from it.
        """
        self._paused_at, self._has_traffic = self._clock() - paused_s, has_traffic

    def see_traffic(self) -> None:
        """End the period: there is traffic."""
        self._has_traffic, self._paused_at = True, self._clock()
        self._held_out = []
        self.close()

    def next_samples(self, read_replayed: Callable[[], Sequence[Sample]]) -> list[Sample]:
        """Return the samples of the next training step; none outside of periods, and until enough are generated.

        Args:
            read_replayed: Returns the samples of traffic in the replay buffer, whose prompts a pause answers again.
        """
        if not is_due(paused_s := self.paused_s, self._settings, has_traffic=self._has_traffic):
            self.close()
            return []
        if self._period is None:
            past = find_past_prompts(read_replayed(), PAST_PROMPT_TEMPERATURE) if self._has_traffic else []
            if self.counts["failures"] or (self._has_traffic and not past):
                return []
            self._periods += 1
            source = self._source(past, self._settings.seed + self._periods + int(paused_s))
            held_out = None if self._has_traffic else self._held_out
            self._period = _Period(self._settings, source, self.counts, self._token_counts, self._clock, held_out)
            self._period.thread.start()
        return self._period.next_samples()

    def close(self, timeout_s: float = 0.0) -> None:
        """End the period, and wait for its thread, which ends after its current forward."""
        if self._period:
            self._period.stopping.set()
            self._period.thread.join(timeout_s)
        self._period = None


def is_due(paused_s: float, settings: Train, *, has_traffic: bool) -> bool:
    """Return whether the target generates data.

    Args:
        paused_s: Seconds since the last traffic, or since the start.
        settings: Durations.
        has_traffic: Whether there was traffic.
    """
    begin = settings.self_generation_idle if has_traffic else 0.0
    return begin <= paused_s < begin + settings.self_generation


def rest_after(busy_s: float, share: float) -> float:
    """Return how long to rest after some seconds of work, to work for a share of the time."""
    return busy_s * (1 / share - 1)


@dataclass(slots=True, eq=False)
class _Period:
    """The samples of one period, and the thread that generates them."""

    settings: Train
    source: Iterator[list[Sample]]
    counts: Counter[str]
    token_counts: TokenCounts
    clock: Callable[[], float]
    held_out: list[Sample] | None
    """Samples that are not trained on; None if all are."""
    waiting: deque[ReplayEntry] = field(default_factory=deque)
    stopping: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread = field(init=False)
    replay_buffer: ReplayBuffer[ReplayEntry] = field(init=False)
    returned_at: float | None = None
    """Time at which samples were returned that are trained on now."""
    rest_until: float = 0.0

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.run, name="self-generation", daemon=True)
        kept = self.settings.model_copy(update={"replay_buffer_size": SAMPLES_KEPT})
        self.replay_buffer = ReplayBuffer(kept, random.Random(self.settings.seed))  # noqa: S311

    def run(self) -> None:
        """Generate until the period ends, for ``train.self_generation_share`` of the time."""
        torch.set_num_threads(self.settings.num_threads)
        try:
            began = self.clock()
            for samples in self.source:
                self._add(samples)
                self.stopping.wait(rest_after(self.clock() - began, self.settings.self_generation_share))
                while len(self.waiting) >= MAX_WAITING and not self.stopping.is_set():
                    self.stopping.wait(0.1)
                if self.stopping.is_set():
                    return
                began = self.clock()
        except Exception as error:  # noqa: BLE001 - training continues without this data, whatever it lacks
            self.counts["failures"] += 1
            log.warning(
                "self_generation_failed", error=f"{type(error).__name__}: {error}", setting="train.self_generation"
            )

    def next_samples(self) -> list[Sample]:
        """Return the samples of the next training step, if there are enough and the training does not rest."""
        now, size = self.clock(), self.settings.batch_size
        if self.returned_at is not None:
            self.rest_until = now + rest_after(now - self.returned_at, self.settings.self_generation_share)
            self.returned_at = None
        drawable = self.replay_buffer.drawable
        if now < self.rest_until or len(self.waiting) + drawable < size:
            return []
        number = max(size - min(self.settings.replay_batch_size, drawable), len(self.waiting) // size)
        new = [self.waiting.popleft() for _ in range(min(number, size, len(self.waiting)))]
        replayed = self.replay_buffer.draw(size - len(new))
        for entry in new:
            entry.epochs += 1
            self.replay_buffer.add(entry)
            self.token_counts.add(entry.sample.request, entry.sample.own_output())
        self.returned_at = now
        return [entry.sample for entry in new + replayed]

    def _add(self, samples: Sequence[Sample]) -> None:
        """Hold samples out while there are too few, and let the others be trained on."""
        self.counts["samples"] += len(samples)
        for sample in samples:
            if self.held_out is None:
                self.waiting.append(ReplayEntry(sample=sample))
            elif (
                is_held_out(sample.prompt_key, self.settings.held_out_ratio)
                and len(self.held_out) < self.settings.held_out_samples
            ):
                self.held_out.append(sample)
            elif sample.prompt_key not in {one.prompt_key for one in self.held_out}:
                self.waiting.append(ReplayEntry(sample=sample))
