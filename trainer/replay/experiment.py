"""Experiments: variants of the settings learn from the same logged traffic, each in its time order.

An experiment is a folder. ``experiment.json`` holds the plan and is never rewritten. Below it, each variant keeps its
newest checkpoints and, when it is complete, the trained draft as a version's checkpoint in ``draft`` and
``result.json``. An interrupted experiment therefore resumes with the same numbers, and a completed one is only read.
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

from pipeline.delta import DeltaLog
from schemas.atomic_file import atomic_write
from schemas.device import select_device
from schemas.errors import UserError
from schemas.settings import DAY_0, Settings, Train
from schemas.speculator import checkpoint
from trainer.data.samples import ComputeStates, Sample, recompute_features
from trainer.data.table_reader import VERSIONS_PER_READ, TableReader
from trainer.data.target import FrozenTarget, Target, read_target
from trainer.loop.checkpoints import Checkpoints
from trainer.replay.named_drafts import load_drafts
from trainer.replay.prequential import BatchScore, PrequentialRun, RunState

_PLAN, _RESULT, _CHECKPOINTS = "experiment.json", "result.json", "checkpoints"
DRAFT = "draft"
"""Folder of a variant's trained draft; `aurora replay evaluate` accepts it as a version."""
_IRRELEVANT_SETTINGS = (
    *("host", "port", "checkpoint_dir", "poll_interval", "num_threads", "catch_up_steps"),
    *("registration_interval", "checkpoint_interval", "metrics_interval", "max_lag"),
    *("replay_buffer_bytes", "replay_memory_bytes", "spill_dir", "self_generation", "self_generation_idle"),
    *("self_generation_share", "self_generation_target_bytes"),
)
"""Settings of the trainer that change no number of an experiment."""


class TableSpan(BaseModel):
    """Which versions of the tables are read, and the rows of which target and line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted: tuple[int, int]
    """Rows that were committed after the first version, up to the second one."""
    rejected: tuple[int, int]
    """The same; wide enough to hold the branches of all samples."""
    target: str
    line: str
    """Line of the nodes that wrote the rows. A draft of another line can learn from them if it reads the same
    features."""

    @property
    def versions(self) -> dict[str, tuple[int, int]]:
        """The versions by table."""
        return {"accepted": self.accepted, "rejected": self.rejected}


class ExperimentPlan(BaseModel):
    """The definition of an experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    span: TableSpan
    lookahead: int
    variants: dict[str, str]
    """Digest of the settings of each variant, by its name."""


class VariantResult(BaseModel):
    """The result of a variant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    scores: tuple[BatchScore, ...]
    losses: tuple[float, ...]
    trained_tokens: int
    training_s: float
    scoring_s: float
    counts: dict[str, int]
    """Rows, samples and branches of the span by kind."""


@dataclass(frozen=True, slots=True)
class VariantTask:
    """One variant, with everything that a process needs to run it."""

    folder: Path
    plan: ExperimentPlan
    variant: str
    settings: Settings


def digest_settings(settings: Settings) -> str:
    """Return a digest of the settings that change a variant's numbers."""
    train = {name: value for name, value in settings.train.model_dump().items() if name not in _IRRELEVANT_SETTINGS}
    relevant = {"train": train, "speculator": settings.speculator.model_dump()}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def write_plan(folder: Path, plan: ExperimentPlan) -> None:
    """Write the plan of an experiment, or check that the folder holds the same one.

    Raises:
        UserError: the folder holds another experiment with that name.
    """
    existing = read_plan(folder)
    if existing is None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / _PLAN, plan.model_dump_json(indent=1) + "\n")
    elif existing != plan:
        raise UserError(f"{folder}: experiment {plan.name} has other table versions or settings; choose another --name")


def read_plan(folder: Path) -> ExperimentPlan | None:
    """Return the plan of the experiment in a folder; None if there is none."""
    file = folder / _PLAN
    return ExperimentPlan.model_validate_json(file.read_text()) if file.exists() else None


def read_result(task: VariantTask) -> VariantResult | None:
    """Return the result of a variant; None while it is not complete."""
    file = task.folder / task.variant / _RESULT
    return VariantResult.model_validate_json(file.read_text()) if file.exists() else None


def run_variant(task: VariantTask) -> VariantResult:
    """Run a variant to the end of its span, from its checkpoint if there is one.

    Raises:
        TableError: the tables cannot be read.
        UserError: the span holds no sample of that target and line.
    """
    if (complete := read_result(task)) is not None:
        return complete
    folder, settings = task.folder / task.variant, task.settings
    torch.set_num_threads(settings.train.num_threads)
    torch.manual_seed(settings.train.seed)
    device = select_device(settings.train.device, "train.device")
    target, counts = read_target(settings).to(device), Counter[str]()
    run, stream = _start_run(task, target), _open_stream(task, target, counts)
    checkpoints = Checkpoints(folder / _CHECKPOINTS, RunState)
    if newest := checkpoints.read_newest():
        run.restore(*newest, stream)
    saved = time.monotonic()
    while batch := list(islice(stream, run.new_per_step)):
        run.train(batch)
        if time.monotonic() - saved >= settings.train.checkpoint_interval:
            checkpoints.write(run.state(), run.save)
            saved = time.monotonic()
    checkpoints.take_written()
    state = run.state()
    if not state.seen:
        raise UserError(
            f"no sample of line {task.plan.span.line} between those versions: {dict(counts) or 'no rows'}; see --line"
        )
    figures = state.model_dump(include=set(VariantResult.model_fields))
    result = VariantResult(variant=task.variant, counts=dict(counts), **figures)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_checkpoint(run.export_draft(), folder / DRAFT, target.fingerprint, line=target.line)
    atomic_write(folder / _RESULT, result.model_dump_json() + "\n")
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    return result


def read_samples(
    tables: DeltaLog, span: TableSpan, settings: Train, compute_states: ComputeStates, counts: Counter[str]
) -> Iterator[Sample]:
    """Yield the samples of a span in the order of their commits, a few commits in memory at a time.

    Args:
        tables: The tables to read.
        span: Versions and rows to read.
        settings: Bounds of samples and of open requests.
        compute_states: Computes missing features.
        counts: Counts rows, samples and branches by kind.

    Raises:
        TableError: the tables cannot be read.
    """
    # Without a clock: how fast a variant trains does not decide how chunks are joined.
    reader = TableReader(tables, span.target, span.line, settings, counts, clock=lambda: 0.0)
    reader.seek(span.accepted[0], span.rejected[0], ())
    while reader.cursor < span.accepted[1]:
        up_to = min(span.accepted[1], reader.cursor + VERSIONS_PER_READ)
        entries = [*reader.read(up_to, span.rejected[1]), *reader.take_overdue()]
        for entry in entries + (reader.take_open() if up_to == span.accepted[1] else []):
            has_features = entry.sample.has_features
            yield entry.sample if has_features else recompute_features(entry.sample, compute_states)


def _start_run(task: VariantTask, target: Target) -> PrequentialRun:
    """Start at day 0, because a champion may have learned from that very traffic, or at a version that is named."""
    train = task.settings.train
    start = DAY_0 if train.warm_start in ("alias", DAY_0) else train.warm_start
    (named,) = load_drafts(task.settings, target, [start])
    run = PrequentialRun(named.draft, target.embeddings_VH, train, seed=train.seed, lookahead=task.plan.lookahead)
    if named.version != task.settings.speculator.day_0:
        run.use_warm_start_rate()
    return run


def _open_stream(task: VariantTask, target: Target, counts: Counter[str]) -> Iterator[Sample]:
    settings = task.settings
    frozen = FrozenTarget(Path(settings.target.path), target.day_0.shape.capture_layers, target.embeddings_VH.device)
    return read_samples(DeltaLog(settings.tables), task.plan.span, settings.train, frozen.compute_states, counts)
