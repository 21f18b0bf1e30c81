"""``aurora bench speculator``: a trained speculator from one command, cached, for every benchmark that needs one.

Recorded traces of one domain go through the stream's and the trainer's own code; only the order of the windows and
the end of training differ from the trainer's, which learns from endless traffic: here the windows are passed over in
random order until the time is up, and the learning rate falls in the last part of it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ops.bench import prompted, recording
from ops.local.stack import provide_target
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.samples import Window, collate, cut
from trainer.data.target import Target, read_target
from trainer.loop.learner import Learner
from trainer.objective.simulated_acceptance import accepted_per_step
from trainer.release.registration import code_revision

Say = Callable[[str], None]

SCHEDULE = ((0.55, 1.0), (0.25, 0.3), (0.2, 0.1))
"""Shares of the training time, and the factor on the learning rate in each."""

VALIDATED = 24
"""Recorded requests that are not trained on: the accepted tokens per step is simulated on them."""

_RECORDING_BATCH = 16
_REPORT_S = 60.0
_TOLD_EVERY = 25


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train, on what, for how long."""

    name: str
    domain: str
    requests: int
    max_tokens: int
    """Longest recorded answer."""
    minutes: float
    """Training time; recording comes before it."""
    steps: int
    """K of the training-time test."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A cached speculator; kept as JSON beside its folder."""

    name: str
    folder: str
    line: str
    domain: str
    requests: int
    tokens: int
    """Tokens of the windows trained on, prompts included."""
    steps: int
    passes: float
    minutes: float
    lookahead: int
    accepted_per_step: float
    """Simulated on recorded requests that were not trained on, for chains of ``lookahead`` tokens; bonus excluded."""
    code: str


def folder_of(settings: Settings, name: str) -> Path:
    """Where a speculator of that name is cached."""
    return Path(settings.stack.data_dir) / "bench" / "speculators" / name


def find(settings: Settings, name: str, line: str) -> EagleDraft:
    """The cached speculator of that name, or the checkpoint in the folder of that name.

    Raises:
        UserError: there is none.
        CheckpointError: it is not one for this target.
    """
    folders = [folder for folder in (folder_of(settings, name), Path(name)) if (folder / checkpoint.MANIFEST).exists()]
    if not folders:
        raise UserError(
            f"no speculator {name!r} in {folder_of(settings, name).parent}; `aurora bench speculator` trains one"
        )
    return checkpoint.read(folders[0], line)


def run(settings: Settings, plan: Plan, say: Say) -> Trained:
    """Record what is missing, train, and cache the result.

    Raises:
        UserError: no target, too few requests, or recordings of another target.
    """
    if plan.requests <= VALIDATED:
        raise UserError(f"--requests {plan.requests}: {VALIDATED} of them are kept back, so more are needed")
    recorded = recordings(settings, plan.domain)
    ids = record(settings, plan.domain, plan.requests, plan.max_tokens, say)
    torch.set_num_threads(settings.train.num_threads)
    target = read_target(settings)
    windows = [recording.read_window(recorded, request_id, target.fingerprint) for request_id in ids]
    kept_back, learned = windows[:VALIDATED], windows[VALIDATED:]
    say(f"training on {len(learned)} requests, {sum(map(len, learned))} tokens, for {plan.minutes:g} minutes")
    return Training(settings, plan, target, learned, kept_back, say).run()


class Training:
    """One draft, from day 0 to the cache."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        target: Target,
        learned: Sequence[Window],
        kept_back: Sequence[Window],
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._train = settings.train.model_copy(update={"ttt_steps": plan.steps})
        self._folder = folder_of(settings, plan.name)
        self._plan, self._target, self._say, self._clock = plan, target, say, clock
        self._pieces = [piece for window in learned for piece in cut(window, self._train.max_sample_tokens)]
        self._kept_back = kept_back
        self._tokens = sum(map(len, learned))
        self._seen = 0

    def run(self) -> Trained:
        """Train until the time is up; the cache holds the state of a minute ago at any time."""
        learner = Learner(self._target.new_draft(), self._target.embeddings_VH, self._train)
        steps = self._shuffled()
        began = report_at = self._clock()
        trained = self._cache(learner, 0.0)
        for until, factor in _until(SCHEDULE, self._plan.minutes * 60):
            learner = self._at_rate(learner, factor)
            while (now := self._clock()) < began + until:
                windows = next(steps)
                loss = learner.step(collate(windows))
                self._seen += sum(map(len, windows))
                if now > report_at + _REPORT_S:
                    trained, report_at = self._cache(learner, now - began), now
                    self._say(
                        f"{trained.minutes:.1f} min, step {trained.steps}, pass {trained.passes:.1f}: loss "
                        f"{loss.accepted:.3f}, "
                        f"accepted tokens per step {trained.accepted_per_step:.3f} of {trained.lookahead}"
                    )
        return self._cache(learner, self._clock() - began)

    def _at_rate(self, learner: Learner, factor: float) -> Learner:
        """The same training, with another learning rate."""
        slower = self._train.model_copy(update={"learning_rate": self._train.learning_rate * factor})
        going_on = Learner(learner.draft, self._target.embeddings_VH, slower)
        going_on.restore(learner.tensors(), learner.steps)
        return going_on

    def _shuffled(self) -> Iterator[list[Window]]:
        """Windows of each step, every one once a pass."""
        order, size = random.Random(self._train.seed), self._train.batch_size  # noqa: S311
        while True:
            pieces = order.sample(self._pieces, len(self._pieces))
            yield from (pieces[i : i + size] for i in range(0, len(pieces), size))

    def _cache(self, learner: Learner, seconds: float) -> Trained:
        """Put the weights as they are into the cache, checked by reading them back, and say how good they are."""
        scratch = self._folder.with_name(f".{self._folder.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        manifest = checkpoint.write(learner.draft, scratch, self._target.fingerprint)
        draft = checkpoint.read(scratch, self._target.line)
        trained = Trained(
            name=self._plan.name,
            folder=str(self._folder),
            line=manifest.line,
            domain=self._plan.domain,
            requests=self._plan.requests,
            tokens=self._tokens,
            steps=learner.steps,
            passes=round(self._seen / self._tokens, 2),
            minutes=round(seconds / 60, 2),
            lookahead=self._plan.steps,
            accepted_per_step=accepted_per_step(
                draft, self._target.embeddings_VH, self._kept_back, self._plan.steps
            ).length,
            code=code_revision(),
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        scratch.rename(self._folder)
        self._folder.with_name(f"{self._folder.name}.json").write_text(json.dumps(asdict(trained), indent=1) + "\n")
        return trained


def recordings(settings: Settings, domain: str) -> Path:
    """Where the traces of a domain are kept."""
    return Path(settings.stack.data_dir) / "bench" / "recorded" / domain


def record(settings: Settings, domain: str, number: int, max_tokens: int, say: Say) -> list[str]:
    """See that so many requests of a domain are recorded; gives their ids.

    Raises:
        UserError: no target, or no such domain.
    """
    provide_target(settings.target, say)
    folder = recordings(settings, domain)
    tokenizer = prompted.tokenizer_of(Path(settings.target.path))
    texts = prompted.tokenize(tokenizer, prompted.learned_from(domain))
    requests = prompted.training_requests(domain, texts, number, max_tokens)
    left = recording.missing(folder, requests)
    if left:
        say(f"recording {len(left)} requests of up to {max_tokens} tokens into {folder}")
        started = time.monotonic()

        def done(number: int) -> None:
            if number % _TOLD_EVERY == 0 or number == len(left):
                say(f"recorded {number} of {len(left)}, {time.monotonic() - started:.0f} s")

        serve = settings.serve.model_copy(
            update={"speculate": False, "max_num_seqs": _RECORDING_BATCH, "max_waiting_requests": len(left)}
        )
        recorder = recording.Recorder()
        engine = BuiltinEngine(settings.model_copy(update={"serve": serve}), recorder)
        engine.start()
        try:
            recording.record(engine, recorder, left, folder, done)
        finally:
            engine.stop()
    return [request.id for request in requests]


def _until(schedule: Sequence[tuple[float, float]], seconds: float) -> Iterator[tuple[float, float]]:
    """When each part of the schedule ends, in seconds from the beginning, and its factor."""
    end = 0.0
    for share, factor in schedule:
        end += share
        yield end * seconds, factor
