"""Variants of the settings that learn from one past, each in its time order, and what came of them.

An experiment is a folder: ``experiment.json`` says which past and which variants, and is never written again; below it
each variant keeps its newest checkpoint and, at its end, what it has learned as the checkpoint ``draft`` of a version,
and ``result.json``. So an experiment that was cut short goes on
where its variants stood, with the numbers that it would have had, and one that is done is only read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from pipeline.delta import DeltaLog
from schemas.device import device_of
from schemas.errors import UserError
from schemas.settings import DAY_0, Settings
from schemas.speculator import checkpoint
from trainer.data.target import FrozenTarget, Target, read_target
from trainer.replay.drafts import drafts
from trainer.replay.prequential import Asked, Course, Point, Standing
from trainer.replay.stream import Span, windows

_PLAN, _RESULT, _STATE, _TENSORS, _CHECKPOINT = (
    *("experiment.json", "result.json", "state.json", "state.safetensors"),
    "checkpoint",
)
DRAFT = "draft"
"""Folder of the draft that a variant came to: `aurora replay score` takes it as a version."""
_BESIDE_LEARNING = (
    *("host", "port", "checkpoint_dir", "poll_interval", "num_threads", "catch_up_steps"),
    *("registration_interval", "checkpoint_interval", "metrics_interval"),
)
"""Settings of the trainer that change no number here."""


class Plan(BaseModel):
    """What an experiment is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    span: Span
    lookahead: int
    variants: dict[str, str]
    """Digest of the settings of each, by its name."""


class Result(BaseModel):
    """What a variant came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    points: tuple[Point, ...]
    losses: tuple[float, ...]
    trained_tokens: int
    training_s: float
    scoring_s: float
    counts: dict[str, int]
    """Rows and branches of the span by what became of them."""


@dataclass(frozen=True, slots=True)
class Task:
    """One variant, with all that a process needs to run it."""

    folder: Path
    plan: Plan
    variant: str
    settings: Settings


def digest(settings: Settings) -> str:
    """Names what a variant's numbers depend on."""
    train = {name: value for name, value in settings.train.model_dump().items() if name not in _BESIDE_LEARNING}
    depends_on = {"train": train, "speculator": settings.speculator.model_dump()}
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def begin(folder: Path, plan: Plan) -> None:
    """Write down what the experiment is, or find that it is the same.

    Raises:
        UserError: the folder holds another one of that name.
    """
    file = folder / _PLAN
    if file.exists():
        if Plan.model_validate_json(file.read_text()) != plan:
            raise UserError(
                f"{folder}: an experiment {plan.name} of another past or other settings; take another --name"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, plan.model_dump_json(indent=1))


def known(folder: Path) -> Plan | None:
    """The experiment in a folder, if one was begun there."""
    file = folder / _PLAN
    return Plan.model_validate_json(file.read_text()) if file.exists() else None


def result(task: Task) -> Result | None:
    """What a variant came to; None while it is not done."""
    file = task.folder / task.variant / _RESULT
    return Result.model_validate_json(file.read_text()) if file.exists() else None


def learn(task: Task) -> Result:
    """Run a variant to the end of the past, from its checkpoint where there is one.

    Raises:
        TableError: the tables cannot be read.
        UserError: the past holds no window of that target and line.
    """
    if (done := result(task)) is not None:
        return done
    folder, settings = task.folder / task.variant, task.settings
    torch.set_num_threads(settings.train.num_threads)
    torch.manual_seed(settings.train.seed)
    device = device_of(settings.train.device, "train.device")
    target, counts = read_target(settings).on(device), Counter[str]()
    course, stream = _course(task, target), _stream(task, target, counts)
    _restore(folder, course, stream)
    saved = time.monotonic()
    while batch := list(islice(stream, course.batch)):
        course.take(batch)
        if time.monotonic() - saved >= settings.train.checkpoint_interval:
            _save(folder, course)
            saved = time.monotonic()
    standing = course.standing()
    if not standing.seen:
        told = dict(counts) or "nothing is there"
        raise UserError(
            f"no window to learn from between those versions for line {task.plan.span.line}: {told}; --line?"
        )
    told = standing.model_dump(include=set(Result.model_fields))
    found = Result(variant=task.variant, counts=dict(counts), **told)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(course.weights(), folder / DRAFT, target.fingerprint)
    _write(folder / _RESULT, found.model_dump_json())
    shutil.rmtree(folder / _CHECKPOINT, ignore_errors=True)
    return found


def _course(task: Task, target: Target) -> Course:
    """Begins at day 0, as a champion may have learned from that very past; or at the version that is named."""
    train = task.settings.train
    start = DAY_0 if train.warm_start in ("alias", DAY_0) else train.warm_start
    (begun,) = drafts(task.settings, target, [start])
    return Course(begun.draft, target.embeddings_VH, train, seed=train.seed, lookahead=task.plan.lookahead)


def _stream(task: Task, target: Target, counts: Counter[str]) -> Iterator[Asked]:
    settings = task.settings
    states = FrozenTarget(Path(settings.target.path), target.day_0.shape.capture_layers).states
    return windows(DeltaLog(settings.tables), task.plan.span, settings.train.max_sample_tokens, states, counts)


def _restore(folder: Path, course: Course, stream: Iterator[Asked]) -> None:
    newest = folder / _CHECKPOINT
    # Of a checkpoint that took the place of another, the one before is there until the new one has the name.
    if not newest.exists() and (old := folder / f"{_CHECKPOINT}.old").exists():
        old.rename(newest)
    if newest.exists():
        standing = Standing.model_validate_json((newest / _STATE).read_text())
        course.restore(standing, load_file(newest / _TENSORS), stream)


def _save(folder: Path, course: Course) -> None:
    """Write a checkpoint beside its place, and put it there: one that has its name is whole."""
    final, old, unfinished = (folder / f"{_CHECKPOINT}{ending}" for ending in ("", ".old", ".part"))
    for left in (unfinished, old):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = {name: value.detach().contiguous() for name, value in course.tensors().items()}
    save_file(tensors, unfinished / _TENSORS)
    (unfinished / _STATE).write_text(course.standing().model_dump_json())
    if final.exists():
        final.rename(old)
    unfinished.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _write(file: Path, text: str) -> None:
    unfinished = file.with_suffix(".part")
    unfinished.write_text(text + "\n")
    unfinished.replace(file)
