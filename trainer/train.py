"""The training process: poll the tables, take a step, write a checkpoint, compare, register."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import structlog
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge

from pipeline.table import DeltaLog, TableError
from schemas import logs
from schemas.settings import Settings
from schemas.speculator.checkpoint import CheckpointError
from schemas.status import TrainStatus
from trainer.candidates import Candidates
from trainer.checkpoints import Checkpoints, TrainState
from trainer.feed import Feed, FeedError
from trainer.learner import Learner
from trainer.losses import Loss
from trainer.registry import RegistryError, SpeculatorRegistry
from trainer.status import Failures, StatusServer, stop_on_signals
from trainer.target import FrozenTarget, Target, read_target
from trainer.windows import collate

log = structlog.get_logger()

ANNOUNCE_EVERY_S = 300.0
"""A row in the table of cursors each; a reader's lease is hours."""


def run(settings: Settings) -> None:
    """Train until SIGTERM or SIGINT; then finish the step and write a checkpoint.

    Raises:
        SettingsError: the address of the status page is taken.
        CheckpointError: the target cannot be read.
    """
    logs.configure("train")
    stopping = stop_on_signals()
    torch.set_num_threads(settings.train.threads)
    trainer = Trainer(settings, read_target(settings), stopping)
    train = settings.train
    with StatusServer("train", train.host, train.port, trainer.status, trainer.metrics):
        trainer.run()


class Trainer:
    """One draft in training, and everything that it is connected to."""

    def __init__(self, settings: Settings, target: Target, stopping: threading.Event) -> None:
        train = settings.train
        self.metrics = CollectorRegistry()
        self._settings = train
        self._stopping = stopping
        self._failures = Failures("train", self.metrics)
        self._counts = _Counts(self.metrics)
        states = FrozenTarget(Path(settings.target.path), target.day_0.shape.capture_layers).states
        self._tables = DeltaLog(settings.tables)
        self._feed = Feed(self._tables, train, target.fingerprint, target.line, states)
        self._candidates = Candidates(settings, target, SpeculatorRegistry(settings.registry))
        self._checkpoints = Checkpoints(Path(train.dir), target.line)
        self._line = target.line
        self._reader = f"trainer {target.line} {socket.gethostname()}:{Path(train.dir).resolve()}"
        self._learner = Learner(target.new_draft(), target.embeddings_VH, train)
        self._parent = self._candidates.day_0
        self._tokens_seen = 0
        self._loss: Loss | None = None
        self._accept_length: float | None = None
        self._registered: tuple[str, ...] = ()
        self._checkpointed_step = 0
        self._needs: dict[str, int] | None = None
        self._offered_step = 0

    def run(self) -> None:
        """Train until told to stop."""
        self._begin()
        announce_at = time.monotonic()
        checkpoint_at = time.monotonic() + self._settings.checkpoint_every_s
        offer_at = time.monotonic() + self._settings.register_every_s
        while not self._stopping.is_set():
            with self._failures.survive("tables", TableError, FeedError):
                self._feed.poll()
            if not self._learn():
                self._stopping.wait(self._settings.poll_s)
            if time.monotonic() >= offer_at:
                self._offer()
                offer_at = time.monotonic() + self._settings.register_every_s
            if time.monotonic() >= checkpoint_at:
                self._checkpoint()
                checkpoint_at = time.monotonic() + self._settings.checkpoint_every_s
            if time.monotonic() >= announce_at:
                self._announce()
                announce_at = time.monotonic() + ANNOUNCE_EVERY_S
        self._checkpoint()
        log.info("stopped", step=self._learner.steps)

    def status(self) -> TrainStatus:
        """Where training stands; called from other threads."""
        loss = self._loss
        return TrainStatus(
            step=self._learner.steps,
            loss=float(loss.total.detach()) if loss else None,
            loss_accepted=loss.accepted if loss else None,
            loss_rejected=loss.rejected if loss else None,
            tokens_seen=self._tokens_seen,
            table_version=self._feed.table_version,
            cursor=self._feed.cursor,
            accept_length=self._accept_length,
            registered=list(self._registered),
            error=self._failures.summary,
        )

    def _begin(self) -> None:
        """Go on from the newest own checkpoint, else from the champion; waits for what cannot be reached."""
        begun = False
        while not begun and not self._stopping.is_set():
            with self._failures.survive("start", TableError, RegistryError, CheckpointError):
                found = self._checkpoints.newest()
                if found:
                    state, tensors = found
                    self._feed.restore(state.feed)
                    self._learner.restore(tensors, state.step)
                    self._parent, self._tokens_seen = state.parent, state.tokens_seen
                    self._checkpointed_step, self._needs = state.step, state.feed.needs
                else:
                    self._parent, champion = self._candidates.champion()
                    self._learner.draft.load_state_dict(champion.state_dict())
                begun = True
            if not begun:
                self._stopping.wait(self._settings.poll_s)
        log.info("training", step=self._learner.steps, parent=self._parent, cursor=self._feed.cursor)

    def _learn(self) -> bool:
        """Take a step if windows are there for one."""
        windows = self._feed.next()
        if not windows:
            return False
        batch = collate(windows)
        self._loss = loss = self._learner.step(batch)
        self._tokens_seen += batch.consumed
        self._counts.step(loss, batch.consumed, self._feed)
        return True

    def _offer(self) -> None:
        """Compare the weights on the held-back slice, and register them if they are better."""
        windows = self._feed.held_back
        if not windows or self._learner.steps == self._offered_step:
            return
        draft = self._learner.draft
        self._accept_length = score = self._candidates.score(draft, windows)
        self._counts.accept_length.set(score)
        log.info("compared", step=self._learner.steps, accept_length=round(score, 4), windows=len(windows))
        tags = {"parent": self._parent, "tables": json.dumps(self._feed.tables_read)}
        metrics = {"step": float(self._learner.steps), "tokens_seen": float(self._tokens_seen)}
        if self._loss:
            metrics |= {"loss_accepted": self._loss.accepted, "loss_rejected": self._loss.rejected}
        with self._failures.survive("registry", RegistryError, CheckpointError):
            version = self._candidates.offer(draft, score, windows, tags, metrics)
            self._offered_step = self._learner.steps
            if version is not None:
                self._parent = version
                self._registered = (*self._registered, version)
                self._counts.registered.inc()

    def _checkpoint(self) -> None:
        if self._learner.steps == self._checkpointed_step:
            return
        state = TrainState(
            line=self._line,
            step=self._learner.steps,
            tokens_seen=self._tokens_seen,
            parent=self._parent,
            feed=self._feed.state(),
        )
        with self._failures.survive("checkpoint", OSError):
            self._checkpoints.write(state, self._learner.tensors())
            self._checkpointed_step, self._needs = state.step, state.feed.needs

    def _announce(self) -> None:
        """Say what a restart would read again, so that it stays; also while nothing new comes."""
        with self._failures.survive("cursors", TableError):
            self._tables.announce(self._reader, self._needs or self._feed.state().needs)


class _Counts:
    """What the trainer counts for Prometheus."""

    def __init__(self, metrics: CollectorRegistry) -> None:
        self.accept_length = Gauge(
            "aurora_train_accept_length", "Simulated on the held-back slice, bonus excluded.", registry=metrics
        )
        self.registered = Counter("aurora_train_registered", "Versions registered.", registry=metrics)
        self._steps = Counter("aurora_train_steps", "Optimizer steps.", registry=metrics)
        self._tokens = Counter("aurora_train_tokens", "Tokens passed over, replay included.", registry=metrics)
        self._loss = Gauge("aurora_train_loss", "Loss of the last step, by term.", ["term"], registry=metrics)
        self._cursor = Gauge("aurora_train_cursor", "Version of accepted that was read last.", registry=metrics)
        self._version = Gauge("aurora_train_table_version", "Newest version of accepted.", registry=metrics)
        self._rows = Gauge("aurora_train_rows", "Rows and branches by what became of them.", ["kind"], registry=metrics)

    def step(self, loss: Loss, tokens: int, feed: Feed) -> None:
        """Count a step."""
        self._steps.inc()
        self._tokens.inc(tokens)
        self._loss.labels("accepted").set(loss.accepted)
        self._loss.labels("rejected").set(loss.rejected)
        self._cursor.set(feed.cursor)
        self._version.set(feed.table_version)
        for kind, count in feed.counts.items():
            self._rows.labels(kind).set(count)
