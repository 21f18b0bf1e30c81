"""``aurora bench speculator``: train a speculator on recorded traces of one domain, and cache it for the benchmarks.

The traces go through the code of the stream and of the trainer. Only the order of the samples and the end of training
differ from the trainer, which learns from endless traffic: here the samples are repeated in random order until the time
is over, and the learning rate falls in the last part of it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch

from ops.bench import recording
from ops.bench.harness import Say
from schemas.build_info import code_revision
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from trainer.data.batch import collate
from trainer.data.samples import Sample, split_sample
from trainer.data.target import Target, read_target
from trainer.loop.learner import Learner
from trainer.objective.simulated_acceptance import simulate_acceptance

SCHEDULE = ((0.55, 1.0), (0.25, 0.3), (0.2, 0.1))
"""Shares of the training time, and the factor of the learning rate in each."""
HELD_OUT_REQUESTS = 24
"""Recorded requests that are not trained on; the acceptance is simulated on them."""

_REPORT_S = 60.0


@dataclass(frozen=True, slots=True)
class SpeculatorOptions:
    """What to train, on what, and for how long."""

    name: str
    domain: str
    requests: int
    max_tokens: int
    """Longest recorded output."""
    minutes: float
    """Training time, without the recording."""
    steps: int
    """K of the training-time test."""


@dataclass(frozen=True, slots=True)
class TrainedSpeculator:
    """A cached speculator; kept as JSON beside its folder."""

    name: str
    folder: str
    line: str
    domain: str
    requests: int
    tokens: int
    """Of the samples trained on, prompts included."""
    steps: int
    epochs: float
    minutes: float
    lookahead: int
    accepted_per_step: float
    """Simulated on the held-out requests for chains of ``lookahead`` tokens; bonus token excluded."""
    code: str


def cache_folder(settings: Settings, name: str) -> Path:
    """Return the folder in which the speculator of that name is cached."""
    return Path(settings.stack.data_dir) / "bench" / "speculators" / name


def load_speculator(settings: Settings, name: str, line: str) -> EagleDraft:
    """Load the cached speculator of that name, or the checkpoint in the folder of that name.

    Raises:
        UserError: there is none.
        CheckpointError: it is not one for this target.
    """
    folder = cache_folder(settings, name)
    for candidate in (folder, Path(name)):
        if (candidate / checkpoint.MANIFEST).exists():
            return checkpoint.read_checkpoint(candidate, line)
    raise UserError(f"no speculator {name!r} in {folder.parent}; `aurora bench speculator` trains one")


def run(settings: Settings, options: SpeculatorOptions, say: Say) -> TrainedSpeculator:
    """Record what is missing, train, and cache the result."""
    if options.requests <= HELD_OUT_REQUESTS:
        raise UserError(f"--requests {options.requests}: {HELD_OUT_REQUESTS} of them are held out, so more are needed")
    folder = recording.recordings_folder(settings, options.domain)
    ids = recording.record_domain(settings, options.domain, options.requests, options.max_tokens, say)
    torch.set_num_threads(settings.train.num_threads)
    target = read_target(settings)
    samples = [recording.read_recorded_sample(folder, request_id, target.fingerprint) for request_id in ids]
    held_out, training = samples[:HELD_OUT_REQUESTS], samples[HELD_OUT_REQUESTS:]
    tokens = sum(map(len, training))
    say(f"training on {len(training)} requests, {tokens} tokens, for {options.minutes:g} minutes")
    return OfflineTraining(settings, options, target, training, held_out, say).run()


class OfflineTraining:
    """The training of one draft, from day 0 to the cache."""

    def __init__(
        self,
        settings: Settings,
        options: SpeculatorOptions,
        target: Target,
        training: Sequence[Sample],
        held_out: Sequence[Sample],
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._train = settings.train.model_copy(update={"ttt_steps": options.steps})
        self._folder = cache_folder(settings, options.name)
        self._options, self._target, self._say, self._clock = options, target, say, clock
        limits = self._train.max_sample_tokens, self._train.context_tokens
        self._samples = [part for sample in training for part in split_sample(sample, *limits)]
        self._held_out = held_out
        self._tokens = sum(map(len, training))
        self._trained_tokens = 0

    def run(self) -> TrainedSpeculator:
        """Train until the time is over; the cache is renewed every minute."""
        learner = Learner(self._target.new_draft(), self._target.embeddings_VH, self._train)
        batches = self._batches()
        started = report_at = self._clock()
        trained = self._cache(learner, 0.0)
        shares, factors = zip(*SCHEDULE, strict=True)
        for until, factor in zip(accumulate(shares), factors, strict=True):
            learner = self._at_rate(learner, factor)
            while (now := self._clock()) < started + until * self._options.minutes * 60:
                batch = next(batches)
                loss = learner.step(collate(batch))
                self._trained_tokens += sum(map(len, batch))
                if now > report_at + _REPORT_S:
                    trained, report_at = self._cache(learner, now - started), now
                    self._say(
                        f"{trained.minutes:.1f} min, step {trained.steps}, epoch {trained.epochs:.1f}: loss "
                        f"{loss.accepted:.3f}, {trained.accepted_per_step:.3f} of {trained.lookahead} draft tokens "
                        "accepted per step"
                    )
        return self._cache(learner, self._clock() - started)

    def _at_rate(self, learner: Learner, factor: float) -> Learner:
        """Return a learner in the same state with another learning rate."""
        train = self._train.model_copy(update={"learning_rate": self._train.learning_rate * factor})
        changed = Learner(learner.draft, self._target.embeddings_VH, train)
        changed.restore(learner.state_tensors(), learner.steps)
        return changed

    def _batches(self) -> Iterator[list[Sample]]:
        """Yield the batches of shuffled epochs."""
        order, size = random.Random(self._train.seed), self._train.batch_size  # noqa: S311
        while True:
            samples = order.sample(self._samples, len(self._samples))
            yield from (samples[i : i + size] for i in range(0, len(samples), size))

    def _cache(self, learner: Learner, seconds: float) -> TrainedSpeculator:
        """Write the weights into the cache, check them by reading them back, and measure their acceptance."""
        scratch = self._folder.with_name(f".{self._folder.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        manifest = checkpoint.write_checkpoint(learner.draft, scratch, self._target.fingerprint)
        draft, options = checkpoint.read_checkpoint(scratch, self._target.line), self._options
        acceptance = simulate_acceptance(draft, self._target.embeddings_VH, self._held_out, options.steps)
        trained = TrainedSpeculator(
            name=options.name,
            folder=str(self._folder),
            line=manifest.line,
            domain=options.domain,
            requests=options.requests,
            tokens=self._tokens,
            steps=learner.steps,
            epochs=round(self._trained_tokens / self._tokens, 2),
            minutes=round(seconds / 60, 2),
            lookahead=options.steps,
            accepted_per_step=acceptance.accepted_per_step,
            code=code_revision(),
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        scratch.rename(self._folder)
        self._folder.with_name(f"{self._folder.name}.json").write_text(json.dumps(asdict(trained), indent=1) + "\n")
        return trained
