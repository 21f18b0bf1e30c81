"""The training process: poll the tables, take a step, write a checkpoint, compare, register, or go back."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import structlog
import torch
from prometheus_client import CollectorRegistry

from pipeline.delta import DeltaLog, TableError
from schemas.build_info import code_revision
from schemas.device import device_of
from schemas.settings import Settings
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from schemas.status import TrainStatus
from schemas.telemetry import logs, spans
from schemas.telemetry.metrics import register_process_metrics
from trainer.data.feed import Feed, FeedError
from trainer.data.prefetch import Ahead
from trainer.data.samples import Window
from trainer.data.target import FrozenTarget, Target, read_target
from trainer.loop.checkpoints import Checkpoints, TrainState
from trainer.loop.distributed import Alone, Together, joined
from trainer.loop.divergence_guard import KEPT, UNFIT, Health, fallen, rising
from trainer.loop.learner import Learner, settled, weights_of
from trainer.loop.mlflow_curves import Curves
from trainer.loop.progress import Gauges, Pace, Progress
from trainer.loop.replicas import Team, Work, follow, work_of
from trainer.loop.warm_start import load_initial_draft
from trainer.release.evaluation import Evaluation, HeldOutEvaluator
from trainer.release.registration import PASSED_TAG, Registrar, TrainingLineage
from trainer.release.registry import RegistryError, SpeculatorRegistry
from trainer.status import ErrorTracker, StatusServer, stop_on_signals

log = structlog.get_logger()

ANNOUNCE_EVERY_S = 300.0
"""A row in the table of cursors each; a reader's lease is hours."""


def run(settings: Settings) -> None:
    """Train until SIGTERM or SIGINT; then finish the step and write a checkpoint.

    One of several processes that ``torchrun`` started does what the first of them says.

    Raises:
        SettingsError: the address of the status page is taken, or ``train.warm_start`` names no draft of the line.
        CheckpointError: the target cannot be read.
    """
    logs.configure("train")
    spans.configure("train", settings.telemetry)
    stopping = stop_on_signals()
    settings = settled(settings)
    train = settings.train
    torch.set_num_threads(train.num_threads)
    device = device_of(train.device, "train.device")
    with joined(device) as ranks:
        target = read_target(settings).on(device)
        if isinstance(ranks, Together) and ranks.rank:
            follow(Learner(target.new_draft(), target.embeddings_VH, train, ranks), ranks)
            return
        trainer = Trainer(settings, target, stopping, ranks)
        with StatusServer("train", train.host, train.port, trainer.status, trainer.metrics):
            trainer.run()
    spans.close()


class Trainer:
    """One draft in training, and everything that it is connected to."""

    def __init__(
        self, settings: Settings, target: Target, stopping: threading.Event, ranks: Alone | Together | None = None
    ) -> None:
        train, ranks = settings.train, ranks or Alone()
        self.metrics = CollectorRegistry()
        register_process_metrics(self.metrics)
        self._settings = train
        self._stopping = stopping
        self._errors = ErrorTracker("train", self.metrics)
        self._gauges = Gauges(self.metrics)
        states = FrozenTarget(Path(settings.target.path), target.day_0.shape.capture_layers).states
        self._tables = DeltaLog(settings.tables)
        feed = Feed(self._tables, train, target.fingerprint, target.line, states)
        self._feed = Ahead(feed, lambda windows: work_of(windows, ranks.size, train.gradient_accumulation_steps))
        registry = SpeculatorRegistry(settings.registry)
        self._evaluator = HeldOutEvaluator(settings, target, registry)
        self._registrar = Registrar(settings, target, registry, self._evaluator)
        self._load_initial_draft = partial(load_initial_draft, settings, target, registry)
        self._checkpoints = Checkpoints(Path(train.checkpoint_dir), target.line)
        self._line = target.line
        self._reader = f"trainer {target.line} {socket.gethostname()}:{Path(train.checkpoint_dir).resolve()}"
        self._learner = Learner(target.new_draft(), target.embeddings_VH, train, ranks)
        self._team = Team(self._learner, ranks)
        self._curves = Curves(
            SpeculatorRegistry(settings.registry),
            self._errors,
            target.line,
            train.metrics_interval,
            {"mlflow.runName": f"trainer {socket.gethostname()}", "line": target.line, "code": code_revision()},
            {**train.model_dump(), "ranks": ranks.size},
        )
        self._pace = Pace()
        self._parent = settings.speculator.day_0
        self._tokens_seen = 0
        self._progress: Progress | None = None
        self._health: Health | None = None
        self._registered: tuple[str, ...] = ()
        self._lineage = TrainingLineage()
        self._checkpointed_step = 0
        self._needs: dict[str, int] | None = None
        self._offered_step = 0
        self._good: TrainState | None = None
        self._losses: deque[float] = deque(maxlen=KEPT)
        self._unfit = self._rollbacks = 0
        self._went_back: str | None = None

    def run(self) -> None:
        """Train until told to stop."""
        self._curves.start()
        self._begin()
        announce_at = time.monotonic()
        checkpoint_at = time.monotonic() + self._settings.checkpoint_interval
        compare_at = time.monotonic() + self._settings.registration_interval
        while not self._stopping.is_set():
            work = None
            with self._errors.catch("tables", TableError, FeedError):
                work = self._feed.next()
            self._gauges.feed(self._feed.cursor, self._feed.table_version, self._feed.waiting, self._feed.counts)
            if work:
                self._learn(work)
            else:
                self._team.rest()
                self._stopping.wait(self._settings.poll_interval)
            if time.monotonic() >= compare_at or self._is_worth_a_look():
                self._compare()
                compare_at = time.monotonic() + self._settings.registration_interval
            if time.monotonic() >= checkpoint_at:
                self._checkpoint()
                checkpoint_at = time.monotonic() + self._settings.checkpoint_interval
            if time.monotonic() >= announce_at:
                self._announce()
                announce_at = time.monotonic() + ANNOUNCE_EVERY_S
        self._checkpoint()
        self._team.close()
        self._feed.close()
        self._curves.close()
        log.info("stopped", step=self._learner.steps)

    def status(self) -> TrainStatus:
        """Where training stands; called from other threads."""
        progress, health = self._progress, self._health
        loss = progress.loss if progress else None
        return TrainStatus(
            step=self._learner.steps,
            loss=float(loss.total) if loss else None,
            loss_accepted=loss.accepted if loss else None,
            loss_rejected=loss.rejected if loss else None,
            loss_by_ttt_step=list(loss.accepted_K) if loss else [],
            learning_rate=progress.learning_rate if progress else None,
            gradient_norm=progress.gradient_norm if progress else None,
            tokens_per_second=progress.tokens_per_s if progress else None,
            newest_sample_age_s=progress.age_s if progress else None,
            tokens_seen=self._tokens_seen,
            table_version_latest=self._feed.table_version,
            table_version_read=self._feed.cursor,
            acceptance_length=1 + health.accepted_per_step if health else None,
            registered=list(self._registered),
            steps_skipped=self._unfit,
            rollbacks=self._rollbacks,
            last_rollback=self._went_back,
            mlflow_run=self._curves.run,
            error=self._errors.summary,
        )

    def _begin(self) -> None:
        """Go on from the newest own checkpoint, else as the settings say; waits for what cannot be reached."""
        begun = False
        while not begun and not self._stopping.is_set():
            with self._errors.catch("start", TableError, RegistryError, CheckpointError):
                found = self._checkpoints.newest()
                if found:
                    state, tensors = found
                    self._feed.restore(state.feed)
                    self._team.restore(tensors, state.step)
                    self._parent, self._tokens_seen = state.parent, state.tokens_seen
                    self._checkpointed_step, self._needs = state.step, state.feed.needs
                    good = self._checkpoints.good()
                    self._good = good[0] if good else None
                else:
                    self._parent, draft = self._load_initial_draft()
                    self._team.adopt(draft.state_dict())
                begun = True
            if not begun:
                self._team.rest()
                self._stopping.wait(self._settings.poll_interval)
        if begun and self._good is None:
            self._checkpoint(good=True)
        log.info("training", step=self._learner.steps, parent=self._parent, cursor=self._feed.cursor)

    def _learn(self, work: Work) -> None:
        """Take a step."""
        rate = self._learner.learning_rate
        loss = self._team.step(work)
        self._tokens_seen += work.consumed
        self._progress = progress = Progress(
            loss=loss,
            learning_rate=rate,
            gradient_norm=self._learner.gradient_norm,
            tokens_per_s=self._pace.add(work.consumed),
            lag=max(0, self._feed.table_version - self._feed.cursor),
            age_s=time.time() - work.newest if work.newest else None,
        )
        self._gauges.step(progress, work.consumed)
        self._curves.add(self._learner.steps, progress.curves)
        if not self._learner.unfit:
            self._lineage.add(self._learner.steps, work.requests)
            self._losses.append(float(loss.total))
            return
        self._unfit += 1
        self._gauges.unfit.inc()
        log.warning("step_not_taken", step=self._learner.steps, loss=float(loss.total), why="not finite")
        if self._settings.divergence_threshold and self._learner.unfit >= UNFIT:
            self._go_back(f"{UNFIT} steps in a row were not finite")

    def _is_worth_a_look(self) -> bool:
        """Whether the losses rise so much that the next comparison should not be waited for."""
        if not self._settings.divergence_threshold or not rising(list(self._losses)):
            return False
        log.info("losses_rise", step=self._learner.steps)
        self._losses.clear()
        return True

    def _compare(self) -> None:
        """Score the weights on the held-out set; then register them if they are better, or go back."""
        windows = self._feed.held_out
        if not windows or self._learner.steps == self._offered_step:
            return
        draft = self._team.weights()
        evaluation = self._evaluator.evaluate(draft, windows)
        self._health = now = evaluation.health
        self._gauges.compared(now)
        self._curves.add(
            self._learner.steps, {"accepted_per_step": now.accepted_per_step, "held_out_loss": now.loss or 0.0}
        )
        log.info("compared", step=self._learner.steps, windows=len(windows), **now.model_dump())
        if self._settings.divergence_threshold:
            if why := self._fallen(now, windows):
                self._go_back(why)
                return
            self._offer(draft, evaluation)
            self._checkpoint(good=True)
        else:
            self._offer(draft, evaluation)

    def _fallen(self, now: Health, windows: Sequence[Window]) -> str | None:
        """Why the weights are much worse than the last good state; None where they are not."""
        share, good = self._settings.divergence_threshold, self._good
        if good is None or (good.health and not fallen(now, good.health, share)):
            return None
        found = self._checkpoints.good()
        if found is None:
            return None
        then = self._evaluator.evaluate(weights_of(found[1], self._learner.shape), windows)
        return fallen(now, then.health, share)

    def _go_back(self, why: str) -> None:
        """Take the last good state; the feed goes on from where it is."""
        found = self._checkpoints.good()
        if found is None:
            log.error("nowhere_to_go_back", why=why, folder=self._settings.checkpoint_dir)
            return
        state, tensors = found
        log.error("went_back", why=why, from_step=self._learner.steps, to_step=state.step)
        self._team.restore(tensors, state.step)
        with self._errors.catch("checkpoint", OSError):
            self._checkpoints.remove_after(state.step)
        self._parent, self._needs = state.parent, state.feed.needs
        self._checkpointed_step = self._offered_step = state.step
        self._losses.clear()
        self._lineage.roll_back(state.step)
        self._rollbacks += 1
        self._went_back = why
        self._gauges.rollbacks.inc()

    def _offer(self, draft: EagleDraft, evaluation: Evaluation) -> None:
        """Register the weights if they are better than what was registered last."""
        tags = {
            "parent": self._parent,
            "tables": json.dumps(self._feed.tables_read),
            PASSED_TAG: str(self._feed.passed),
        }
        if self._curves.run:
            tags["curves"] = self._curves.run
        metrics = {"step": float(self._learner.steps), "tokens_seen": float(self._tokens_seen)}
        if self._progress:
            loss = self._progress.loss
            metrics |= {"loss_accepted": loss.accepted, "loss_rejected": loss.rejected}
        with self._errors.catch("registry", RegistryError, CheckpointError):
            version = self._registrar.register_if_better(draft, evaluation, tags, metrics)
            self._offered_step = self._learner.steps
            if version is not None:
                self._parent = version
                self._registered = (*self._registered, version)
                self._gauges.registered.inc()
                for span in self._lineage.close_version(self._line, version, self._learner.steps):
                    spans.record(span)

    def _checkpoint(self, *, good: bool = False) -> None:
        """Write where training stands, unless that is written already."""
        step = self._learner.steps
        if step == self._checkpointed_step and not (good and (self._good is None or self._good.step != step)):
            return
        state = TrainState(
            line=self._line,
            step=step,
            tokens_seen=self._tokens_seen,
            parent=self._parent,
            feed=self._feed.state(),
            good=good,
            health=self._health if good else None,
        )
        with self._errors.catch("checkpoint", OSError):
            self._checkpoints.write(state, self._team.tensors())
            self._checkpointed_step, self._needs = state.step, state.feed.needs
            if good:
                self._good = state

    def _announce(self) -> None:
        """Say what a restart would read again, so that it stays; also while nothing new comes."""
        with self._errors.catch("cursors", TableError):
            self._tables.save_cursor(self._reader, self._needs or self._feed.state().needs)
