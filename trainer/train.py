"""The training process: poll the tables, train a step, write checkpoints, evaluate, register or roll back."""

from __future__ import annotations

import copy
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import structlog
import torch
from prometheus_client import CollectorRegistry

from pipeline.delta import DeltaLog, TableError
from schemas.build_info import code_revision
from schemas.device import select_device
from schemas.settings import Settings
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from schemas.status import TrainStatus
from schemas.telemetry import logs, spans
from schemas.telemetry.metrics import register_process_metrics
from trainer.data.batch import StepBatch, build_step_batch
from trainer.data.data_loader import DataLoader, DataLoaderError, Prefetcher
from trainer.data.feature_files import spill_folder
from trainer.data.samples import Sample
from trainer.data.self_generation import SelfGeneration, stream_samples
from trainer.data.target import FrozenTarget, Target, read_target
from trainer.loop.checkpoints import Checkpoints, TrainState
from trainer.loop.distributed import DistributedLearner, Ranks, follow_rank_0, join_ranks
from trainer.loop.divergence_guard import LOSSES_KEPT, MAX_SKIPPED, HeldOutScore, Judgement, is_loss_rising, judge_state
from trainer.loop.lag_events import LagEvents
from trainer.loop.learner import Learner, load_draft, resolve_dtype
from trainer.loop.metrics import StepFigures, Throughput, TrainMetrics
from trainer.loop.mlflow_curves import MlflowCurves
from trainer.loop.vocabulary_change import VocabularyChange
from trainer.loop.warm_start import load_initial_draft
from trainer.release.evaluation import Evaluation, HeldOutEvaluator
from trainer.release.registration import (
    LINEAGE_TAG,
    PASSED_TAG,
    SELF_GENERATED_TAG,
    Registrar,
    SelfGeneratedData,
    TrainingLineage,
    resume_registration,
)
from trainer.release.registration_queue import RegistrationQueue, TrainingSnapshot
from trainer.release.registry import RegistryError, SpeculatorRegistry
from trainer.status import ErrorTracker, StatusServer, stop_on_signals

log = structlog.get_logger()

PARTS = ("start", "tables", "cursors", "vocabulary", "registry", "registration", "curves", "checkpoint")
"""Whose errors are counted."""
LEASE_RENEWAL_INTERVAL_S = 300.0
"""Each renewal writes a row; a lease lasts hours."""
REGISTRATION_TIMEOUT_S = 15.0
"""How long a stopping trainer waits for a registration: half of what containers get to stop."""
SELF_GENERATION_TIMEOUT_S = 5.0
"""How long a stopping trainer waits for a forward of the generating target."""


def run(settings: Settings) -> None:
    """Train until SIGTERM or SIGINT; then finish the step and write a checkpoint.

    Under ``torchrun``, every process but the first follows the first one.

    Raises:
        SettingsError: the address of the status page is in use, or ``train.warm_start`` names no draft of the line.
        CheckpointError: the target cannot be read.
    """
    logs.configure("train")
    spans.configure("train", settings.telemetry)
    stopping = stop_on_signals()
    settings = resolve_dtype(settings)
    train = settings.train
    torch.set_num_threads(train.num_threads)
    device = select_device(train.device, "train.device")
    with join_ranks(device) as ranks:
        target = read_target(settings).to(device)
        if ranks.rank:
            follow_rank_0(Learner(target.new_draft(), target.embeddings_VH, train, ranks))
            return
        trainer = Trainer(settings, target, stopping, ranks)
        with StatusServer("train", train.host, train.port, trainer.status, trainer.metrics_registry):
            trainer.run()
    spans.close()


class Trainer:
    """The training of one speculator line."""

    def __init__(
        self, settings: Settings, target: Target, stopping: threading.Event, ranks: Ranks | None = None
    ) -> None:
        train, ranks = settings.train, ranks or Ranks()
        self.metrics_registry = CollectorRegistry()
        register_process_metrics(self.metrics_registry)
        self._settings = train
        self._stopping = stopping
        self._errors = ErrorTracker("train", PARTS, self.metrics_registry)
        self._metrics = TrainMetrics(self.metrics_registry)
        self._tables = DeltaLog(settings.tables)
        self._learner = Learner(target.new_draft(), target.embeddings_VH, train, ranks)
        self._learners = DistributedLearner(self._learner, ranks)
        self._vocabulary = VocabularyChange(settings, self._learners, self._metrics)
        frozen = FrozenTarget(
            Path(settings.target.path), target.day_0.shape.capture_layers, target.embeddings_VH.device
        )
        self._loader = DataLoader(
            self._tables,
            train,
            target.fingerprint,
            target.line,
            frozen.compute_states,
            shares_files=self._learners.share_folder(spill_folder(train, target.line)),
        )
        self._collate = partial(build_step_batch, ranks=ranks.size, parts=train.gradient_accumulation_steps)
        self._prefetcher = Prefetcher(self._loader, self._collate)
        source = partial(stream_samples, settings, target.day_0.shape.capture_layers, target.embeddings_VH.device)
        self._self_generation = SelfGeneration(train, source)
        self._rows_read = 0
        registry = SpeculatorRegistry(settings.registry)
        self._evaluator = HeldOutEvaluator(settings, target, registry)
        self._lineage = TrainingLineage()
        # It runs on its own thread, but shares the scores of the champion: beside training, scoring takes ten times as
        # long there.
        registrar = Registrar(settings, target, SpeculatorRegistry(settings.registry), self._evaluator)
        self._registrations = RegistrationQueue(registrar, target.line, self._lineage, self._errors, self._metrics)
        self._load_initial_draft = partial(load_initial_draft, settings, target, registry)
        self._resume_registration = partial(resume_registration, registry, target.line)
        self._checkpoints = Checkpoints(Path(train.checkpoint_dir) / target.line, TrainState)
        self._reader = f"trainer {target.line} {socket.gethostname()}:{Path(train.checkpoint_dir).resolve()}"
        self._curves = MlflowCurves(
            SpeculatorRegistry(settings.registry),
            self._errors,
            target.line,
            train.metrics_interval,
            {"mlflow.runName": f"trainer {socket.gethostname()}", "line": target.line, "code": code_revision()},
            {**train.model_dump(), "ranks": ranks.size},
        )
        self._lag_events = LagEvents(settings.kafka, target.line, self._metrics.lag_events_dropped)
        self._throughput = Throughput()
        # A day-0 draft from a folder is trained.
        self._untrained = None if settings.speculator.day_0_folder else settings.speculator.day_0
        self._warm_started = False
        self._tokens_seen = self._self_generated_tokens = 0
        self._figures: StepFigures | None = None
        self._score: HeldOutScore | None = None
        self._evaluations_since_registration = 0
        self._metrics.evaluations_since_registration.set_function(lambda: self._evaluations_since_registration)
        self._written: TrainState | None = None
        self._evaluated_step = 0
        self._good: TrainState | None = None
        self._losses: deque[float] = deque(maxlen=LOSSES_KEPT)
        self._skipped = self._rollbacks = 0
        self._rollback_reason: str | None = None

    def run(self) -> None:
        """Train until the stop event is set."""
        self._curves.start()
        self._start()
        renew_at = time.monotonic()
        checkpoint_at = time.monotonic() + self._settings.checkpoint_interval
        evaluate_at = time.monotonic() + self._settings.registration_interval
        while not self._stopping.is_set():
            batch = None
            with self._errors.catch("tables", TableError, DataLoaderError):
                batch = self._prefetcher.next_batch()
            self._metrics.update_data_loader(self._loader)
            self._lag_events.update(self._loader.lag_s, self._loader.share)
            if batch or self._loader.counts["rows"] != self._rows_read:
                self._rows_read = self._loader.counts["rows"]
                self._self_generation.see_traffic()
            if batch:
                self._train_step(batch)
            elif generated := self._self_generation.next_samples(lambda: self._prefetcher.replayed):
                self._train_step(self._collate(generated), is_generated=True)
            else:
                self._learners.keep_alive()
                self._stopping.wait(self._settings.poll_interval)
            self._metrics.update_self_generation(self._self_generation.counts)
            if self._registrations.poll():
                self._evaluations_since_registration = 0
            self._take_written()
            if time.monotonic() >= evaluate_at or self._is_loss_rising():
                with self._errors.catch("vocabulary", CheckpointError):
                    self._update_vocabulary()
                self._evaluate()
                evaluate_at = time.monotonic() + self._settings.registration_interval
            if time.monotonic() >= checkpoint_at and self._checkpoints.writing is None:
                self._checkpoint()
                checkpoint_at = time.monotonic() + self._settings.checkpoint_interval
            if time.monotonic() >= renew_at:
                self._renew_lease()
                renew_at = time.monotonic() + LEASE_RENEWAL_INTERVAL_S
        self._self_generation.close(SELF_GENERATION_TIMEOUT_S)
        self._checkpoint()
        self._registrations.close(REGISTRATION_TIMEOUT_S)
        self._take_written(wait=True)
        self._learners.close()
        self._prefetcher.close()
        self._lag_events.close()
        self._curves.close()
        log.info("training_stopped", step=self._learner.steps)

    def status(self) -> TrainStatus:
        """Return the status; called from other threads."""
        figures, score = self._figures, self._score
        loss = figures.loss if figures else None
        return TrainStatus(
            step=self._learner.steps,
            loss=float(loss.total) if loss else None,
            loss_accepted=loss.accepted if loss else None,
            loss_rejected=loss.rejected if loss else None,
            loss_by_ttt_step=list(loss.accepted_K) if loss else [],
            learning_rate=figures.learning_rate if figures else None,
            gradient_norm=figures.gradient_norm if figures else None,
            tokens_per_second=figures.tokens_per_s if figures else None,
            newest_sample_age_s=figures.newest_age_s if figures else None,
            tokens_seen=self._tokens_seen,
            table_version_latest=self._loader.table_version,
            table_version_read=self._loader.cursor,
            acceptance_length=1 + score.accepted_per_step if score else None,
            draft_vocab_coverage=self._vocabulary.coverage,
            registered=list(self._registrations.registered),
            evaluations_since_registration=self._evaluations_since_registration,
            steps_skipped=self._skipped,
            rollbacks=self._rollbacks,
            last_rollback=self._rollback_reason,
            mlflow_run=self._curves.run,
            error=self._errors.summary,
        )

    def _start(self) -> None:
        """Resume from the newest checkpoint, else start as the settings say; retry until everything is reachable."""
        started, paused_s = False, 0.0
        while not started and not self._stopping.is_set():
            with self._errors.catch("start", TableError, RegistryError, CheckpointError, OSError):
                found = self._checkpoints.read_newest()
                if found:
                    state, folder = found
                    self._prefetcher.restore(state.data_loader)
                    self._tokens_seen, self._warm_started = state.tokens_seen, state.warm_started
                    self._self_generated_tokens, paused_s = state.self_generated_tokens, state.paused_s
                    self._learners.call(Learner.load, folder, state.step)
                    self._lineage.start(self._find_parent(state))
                    self._written = state
                    good = self._checkpoints.read_good()
                    self._good = good[0] if good else None
                else:
                    parent, draft = self._load_initial_draft()
                    self._lineage.start(parent)
                    self._learners.call(Learner.load_weights, draft.state_dict())
                    self._warm_started = parent != self._untrained
                started = True
            if not started:
                self._learners.keep_alive()
                self._stopping.wait(self._settings.poll_interval)
        if self._warm_started:
            self._learners.call(Learner.use_warm_start_rate)
        self._self_generation.restore(paused_s, has_traffic=self._warm_started or self._tokens_seen > 0)
        if started and self._good is None:
            self._checkpoint(good=True)
        log.info("training_started", step=self._learner.steps, parent=self._lineage.parent, cursor=self._loader.cursor)

    def _find_parent(self, state: TrainState) -> str:
        """Return the parent of a checkpoint's weights, which may have been registered after the checkpoint."""
        parent = None
        with self._errors.catch("registry", RegistryError):
            parent = self._resume_registration(state.lineage, state.step)
        return parent or state.parent

    def _train_step(self, batch: StepBatch, *, is_generated: bool = False) -> None:
        learning_rate, counted = self._learner.learning_rate, (self._learner.steps, self._learner.skipped)
        loss = self._learners.step(batch)
        if (self._learner.steps, self._learner.skipped) == counted:
            self._metrics.steps_without_loss.inc()
            return
        if is_generated:
            self._self_generated_tokens += batch.tokens
            self._metrics.self_generated_tokens.inc(batch.tokens)
        else:
            self._tokens_seen += batch.tokens
        self._figures = StepFigures(
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=self._learner.gradient_norm,
            tokens_per_s=self._throughput.add(batch.tokens),
            lag=max(0, self._loader.table_version - self._loader.cursor),
            newest=batch.newest,
            time=time.time(),
        )
        self._metrics.update_step(self._figures, batch.tokens)
        self._curves.add(self._learner.steps, self._figures.curves)
        if not self._learner.skipped:
            self._lineage.add(self._learner.steps, () if is_generated else batch.requests)
            self._losses.append(float(loss.total))
            return
        self._skipped += 1
        self._metrics.steps_skipped.inc()
        log.warning("step_skipped", step=self._learner.steps, loss=float(loss.total), reason="not finite")
        if self._settings.divergence_threshold and self._learner.skipped >= MAX_SKIPPED:
            self._roll_back(f"{MAX_SKIPPED} steps in a row were not finite")

    def _is_loss_rising(self) -> bool:
        """Return whether the loss rises so much that the draft must be evaluated now."""
        if not self._settings.divergence_threshold or not is_loss_rising(list(self._losses)):
            return False
        log.info("loss_rise_detected", step=self._learner.steps)
        self._losses.clear()
        return True

    def _update_vocabulary(self) -> None:
        """Change the draft vocabulary if the traffic calls for it, or self-generated data before any traffic."""
        if any(counts := self._prefetcher.token_counts):
            self._vocabulary.update(counts)
        else:
            self._vocabulary.update(self._self_generation.token_counts, is_generated=True)

    def _evaluate(self) -> None:
        """Score the draft on the held-out set; then submit it for registration, or roll back if it diverged."""
        samples = self._prefetcher.held_out or self._self_generation.held_out
        if not samples or self._learner.steps == self._evaluated_step:
            return
        draft = self._learners.call(Learner.export_draft)
        evaluation = self._evaluator.evaluate(draft, samples)
        self._score = score = evaluation.score
        self._metrics.update_score(score)
        curves = {"acceptance_length": 1 + score.accepted_per_step, "held_out_loss": score.loss or 0.0}
        self._curves.add(self._learner.steps, curves)
        log.info("draft_evaluated", step=self._learner.steps, samples=len(samples), **score.model_dump())
        self._evaluations_since_registration += 1
        judgement = self._judge(score, samples)
        if judgement.divergence:
            self._roll_back(judgement.divergence)
            return
        self._submit(draft, evaluation)
        if judgement.good:
            self._checkpoint(good=True)

    def _judge(self, score: HeldOutScore, samples: Mapping[Sample, float]) -> Judgement:
        if not self._settings.divergence_threshold:
            return Judgement(None, good=False)
        champion = None
        with self._errors.catch("registry", RegistryError, CheckpointError):
            champion = self._evaluator.score_champion(samples)

        def score_last_good() -> HeldOutScore | None:
            found = self._checkpoints.read_good()
            if found is None:
                return None
            return self._evaluator.evaluate(load_draft(found[1], self._learner.shape), samples).score

        return judge_state(score, champion, score_last_good, self._settings.divergence_threshold)

    def _roll_back(self, reason: str) -> None:
        """Restore the last good checkpoint; the data loader keeps its position."""
        self._take_written(wait=True)
        found = self._checkpoints.read_good()
        if found is None:
            log.error(
                "rollback_failed", reason=reason, folder=self._settings.checkpoint_dir, error="no good checkpoint"
            )
            return
        state, folder = found
        log.error("training_rolled_back", reason=reason, from_step=self._learner.steps, to_step=state.step)
        self._learners.call(Learner.load, folder, state.step)
        with self._errors.catch("checkpoint", OSError):
            self._checkpoints.remove_after(state.step)
        self._written, self._evaluated_step = state, state.step
        self._losses.clear()
        self._lineage.roll_back(state.step, state.parent)
        self._registrations.drop_rolled_back()
        self._rollbacks += 1
        self._rollback_reason = reason
        self._metrics.divergence_rollbacks.inc()

    def _submit(self, draft: EagleDraft, evaluation: Evaluation) -> None:
        """Submit a snapshot of the training for registration; training continues meanwhile."""
        step = self._evaluated_step = self._learner.steps
        tags = {
            "tables": json.dumps(self._prefetcher.tables_read),
            LINEAGE_TAG: self._lineage.id,
            PASSED_TAG: str(self._prefetcher.completed_version),
        }
        if self._self_generated_tokens:
            data = SelfGeneratedData(tokens=self._self_generated_tokens, held_out=bool(self._self_generation.held_out))
            tags[SELF_GENERATED_TAG] = data.model_dump_json()
        if self._curves.run:
            tags["curves"] = self._curves.run
        metrics = {"step": float(step), "tokens_seen": float(self._tokens_seen)}
        if self._vocabulary.coverage is not None:
            metrics["draft_vocab_coverage"] = self._vocabulary.coverage
        if self._figures:
            loss = self._figures.loss
            metrics |= {"loss_accepted": loss.accepted, "loss_rejected": loss.rejected}
        # Without an average the draft is the one in training.
        draft = copy.deepcopy(draft) if draft is self._learner.draft else draft
        mark = self._lineage.mark(step)
        self._registrations.submit(TrainingSnapshot(step, mark, draft, evaluation, tags, metrics))

    def _checkpoint(self, *, good: bool = False) -> None:
        """Begin to write a checkpoint, unless the step has one already; then it may still become the good one."""
        step = self._learner.steps
        self._take_written(wait=True)
        with self._errors.catch("checkpoint", OSError):
            # A training that has not started has nothing to resume.
            if (step or good) and (self._written is None or self._written.step != step):
                state = TrainState(
                    step=step,
                    tokens_seen=self._tokens_seen,
                    self_generated_tokens=self._self_generated_tokens,
                    paused_s=self._self_generation.paused_s,
                    parent=self._lineage.parent,
                    lineage=self._lineage.id,
                    warm_started=self._warm_started,
                    data_loader=self._prefetcher.state(),
                )
                self._checkpoints.write(state, lambda folder: self._learners.call(Learner.save, folder), good=good)
                self._good = state if good else self._good
            elif good and (self._good is None or self._good.step != step):
                self._checkpoints.mark_good(step)
                self._good = self._written

    def _take_written(self, *, wait: bool = False) -> None:
        """Take note of a checkpoint whose writing has ended, and of a parent that was registered meanwhile."""
        writing = self._checkpoints.writing
        if writing and (wait or writing.done()):
            with self._errors.catch("checkpoint", OSError):
                self._written = self._checkpoints.take_written()
        written = self._written
        if written and written.parent != (parent := self._lineage.parent_at(written.step)):
            self._written = written.model_copy(update={"parent": parent})
            with self._errors.catch("checkpoint", OSError):
                self._checkpoints.update(self._written)

    def _renew_lease(self) -> None:
        """Keep the versions that a restart would read again, even while nothing new arrives."""
        with self._errors.catch("cursors", TableError):
            kept = self._written.data_loader if self._written else self._prefetcher.state()
            self._tables.save_cursor(self._reader, kept.versions_needed)
