"""Register the weights in training as a version if they are better on the held-out set with high probability.

A version carries a card for people, tags to rebuild it, and spans that link it to the requests it was trained on.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from string import Template

import structlog
from pydantic import BaseModel, ConfigDict

from pipeline.delta import table_address
from schemas.build_info import code_revision
from schemas.settings import Settings, Tables
from schemas.speculator import checkpoint
from schemas.speculator.network import DraftShape, EagleDraft
from schemas.telemetry.spans import MAX_LINKS, AttributeValue, Span
from schemas.telemetry.trace_context import request_context, version_context
from trainer.data.target import Target
from trainer.release.evaluation import Evaluation, HeldOutEvaluator, accepted_per_step, compare_labels, compare_prompts
from trainer.release.gate import HELD_OUT_TAG, GainInterval, HeldOutComparison, judge_candidate
from trainer.release.registry import SpeculatorRegistry, TrainingTable
from trainer.release.scoring_model import write_model_files

log = structlog.get_logger()

SETTINGS_TAG = "settings"
"""Tag of a version with the settings that shaped it, as JSON."""
LINEAGE_TAG = "lineage"
"""Tag of a version with ``TrainingLineage.id`` of its weights."""
PASSED_TAG = "passed"
"""Tag of a version with the version of ``accepted`` up to which every sample had been due for training."""
SELF_GENERATED_TAG = "self_generated"
"""Tag of a version that learned from self-generated data: its ``SelfGeneratedData``, as JSON."""
MAX_TRACKED_REQUESTS = 65_536
"""Requests in a training lineage; further ones are only counted."""
MAX_VERSIONS = 8
"""Versions whose requests are kept in case training is rolled back behind them."""
_CARD = Path(__file__).with_name("card.md")
_NOT_SHAPING = (
    "host",
    "port",
    "checkpoint_dir",
    "spill_dir",
    "replay_memory_bytes",
    "poll_interval",
    "num_threads",
    "checkpoint_interval",
    "metrics_interval",
    "registration_interval",
    "self_generation_target_bytes",
)
"""Settings of the trainer that do not affect the weights."""


class SelfGeneratedData(BaseModel):
    """What a version owes to data that the target generated itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    """Trained on since the training started, replayed ones each time."""
    held_out: bool
    """Whether the held-out set was self-generated too, because there was no traffic."""

    def __str__(self) -> str:
        held_out = ", and so is its held-out set" if self.held_out else ""
        return f"{self.tokens:,} tokens that the target generated itself{held_out}"


class Registrar:
    """Registers versions of one line."""

    def __init__(
        self, settings: Settings, target: Target, registry: SpeculatorRegistry, evaluator: HeldOutEvaluator
    ) -> None:
        self._settings = settings
        self._target = target
        self._registry = registry
        self._evaluator = evaluator

    def register_if_better(
        self, draft: EagleDraft, evaluation: Evaluation, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str | None:
        """Register the draft and make it candidate if it is better than the champion and than a waiting candidate.

        It is better if the lower bound of its gain exceeds ``promoter.gate_margin``; over a candidate that the gate may
        still pass, if the bound exceeds 0.

        Args:
            draft: The weights in training.
            evaluation: Of the same weights on the held-out set.
            tags: Origin of the version.
            metrics: Of the training.

        Returns:
            The new version; None if the draft is not better, or the held-out set is too small to decide.

        Raises:
            RegistryError: no answer; the next call tries again.
            CheckpointError: the registry's files differ from the registered ones.
        """
        samples, gate = evaluation.weights, self._settings.promoter
        if len(samples) < gate.gate_min_samples:
            return None
        line = self._target.line
        aliases = self._registry.aliases(line)
        champion, candidate = aliases.get("champion"), aliases.get("candidate")
        self._evaluator.keep_only({champion, candidate})
        gain = self._find_gain(evaluation, champion, gate.gate_margin)
        tags_of_candidate = {} if candidate is None else self._registry.tags(line, candidate)
        waits = judge_candidate(candidate, champion, tags_of_candidate, gate).promote
        if gain is None or (waits and self._find_gain(evaluation, candidate, 0) is None):
            return None
        held_out = self._describe(evaluation, champion, gain)
        metrics = {
            "acceptance_length": 1 + held_out.accepted_per_step,
            "held_out_gain_low": gain.low,
            "held_out_gain_high": gain.high,
            "held_out_prompts": float(gain.prompts),
            **metrics,
        }
        tags = {
            **tags,
            **self._identity,
            "metrics": json.dumps(metrics),
            HELD_OUT_TAG: held_out.model_dump_json(),
            SETTINGS_TAG: dump_shaping_settings(self._settings),
        }
        version = self._write(draft, tags, metrics, render_card(self._settings, draft.shape, tags, metrics))
        self._registry.set_alias(line, "candidate", version)
        log.info("version_registered", line=line, version=version, **held_out.model_dump())
        return version

    def compare(self, evaluation: Evaluation) -> HeldOutComparison | None:
        """Compare a draft with the champion, or day 0; None if the held-out set is empty.

        Raises:
            RegistryError: no answer.
            CheckpointError: the registry's files differ from the registered ones.
        """
        if not evaluation.weights:
            return None
        champion = self._registry.aliases(self._target.line).get("champion")
        of_champion = self._evaluator.evaluate_version(champion, evaluation.weights)
        gain = compare_prompts(evaluation.accepted, of_champion, self._settings.promoter.gate_error)
        return self._describe(evaluation, champion, gain)

    def register_imported(
        self, draft: EagleDraft, held_out: HeldOutComparison | None, tags: Mapping[str, str], card: str
    ) -> tuple[str, bool]:
        """Register a draft that was trained elsewhere, whatever its figures.

        Args:
            draft: The draft.
            held_out: From ``compare``; None if it was not scored.
            tags: Where it comes from.
            card: Description in Markdown.

        Returns:
            The new version, and whether it is candidate: it passes the gate, and no other candidate waits.

        Raises:
            RegistryError: no answer.
        """
        scored = {HELD_OUT_TAG: held_out.model_dump_json()} if held_out else {}
        metrics = {"acceptance_length": 1 + held_out.accepted_per_step} if held_out else {}
        tags = {**tags, **self._identity, "metrics": json.dumps(metrics), **scored}
        version = self._write(draft, tags, metrics, card)
        aliases, gate = self._registry.aliases(self._target.line), self._settings.promoter
        passes = judge_candidate(version, aliases.get("champion"), tags, gate).promote
        is_candidate = passes and "candidate" not in aliases
        if is_candidate:
            self._registry.set_alias(self._target.line, "candidate", version)
        return version, is_candidate

    @property
    def _identity(self) -> dict[str, str]:
        return {"line": self._target.line, "target": self._target.fingerprint, "code": code_revision()}

    def _describe(self, evaluation: Evaluation, champion: str | None, gain: GainInterval | None) -> HeldOutComparison:
        samples, gate = evaluation.weights, self._settings.promoter
        of_champion = self._evaluator.evaluate_version(champion, samples)
        return HeldOutComparison(
            accepted_per_step=evaluation.score.accepted_per_step,
            champion=champion or self._settings.speculator.day_0,
            champion_accepted_per_step=accepted_per_step(of_champion, samples),
            gain_low=gain and gain.low,
            gain_high=gain and gain.high,
            samples=len(samples),
            prompts=gain.prompts if gain else len({sample.prompt_key for sample in samples}),
            labels=tuple(
                compare_labels(evaluation.accepted, of_champion, gate.gate_label_min_samples, gate.gate_error)
            ),
        )

    def _write(self, draft: EagleDraft, tags: Mapping[str, str], metrics: Mapping[str, float], card: str) -> str:
        line = self._target.line
        with tempfile.TemporaryDirectory() as folder:
            manifest = checkpoint.write_checkpoint(draft, Path(folder), self._target.fingerprint, line=line)
            write_model_files(Path(folder), self._settings, manifest, card, self._target.embeddings_VH.device)
            trained_on = find_training_tables(self._settings.tables, tags)
            return self._registry.register(line, Path(folder), tags, metrics, card, trained_on)

    def _find_gain(self, evaluation: Evaluation, version: str | None, margin: float) -> GainInterval | None:
        """Return the gain of a draft over a version, or day 0; None if its lower bound does not exceed the margin."""
        other = self._evaluator.evaluate_version(version, evaluation.weights)
        gain = compare_prompts(evaluation.accepted, other, self._settings.promoter.gate_error)
        is_better = gain is not None and gain.low > margin
        log.info(
            "draft_compared",
            line=self._target.line,
            version=version or self._settings.speculator.day_0,
            is_better=is_better,
            prompts=len({sample.prompt_key for sample in evaluation.accepted}),
            interval=None if gain is None else (round(gain.low, 4), round(gain.high, 4)),
        )
        return gain if is_better else None


def resume_registration(registry: SpeculatorRegistry, line: str, lineage: str, step: int) -> str | None:
    """Complete a registration that ended with its process: name the version, and tell the weights' parent.

    Args:
        registry: Registry of versions.
        line: Speculator line.
        lineage: Of the weights with which training resumes.
        step: Their training step.

    Returns:
        The newest version that these weights descend from; None if none of the lineage does.

    Raises:
        RegistryError: no answer.
    """
    versions = [version for version in registry.versions(line) if version.tags.get(LINEAGE_TAG) == lineage]
    if versions and int(registry.aliases(line).get("candidate", 0)) < int(newest := versions[-1].number):
        registry.set_alias(line, "candidate", newest)
        log.warning("registration_resumed", line=line, version=newest)
    steps = {version.number: json.loads(version.tags["metrics"])["step"] for version in versions}
    return max((number for number in steps if steps[number] <= step), key=int, default=None)


@dataclass(frozen=True, slots=True)
class LineageRecord:
    """What the weights of a step were learned from."""

    mark: int
    step: int
    parent: str
    requests: tuple[str, ...]
    """Requests that training has seen since the parent."""
    untracked: int
    """Requests beyond ``MAX_TRACKED_REQUESTS``, counted once for each training step."""
    since: float
    """Unix time of the parent's weights, or of the start."""
    until: float
    """Unix time of these weights."""


@dataclass(slots=True)
class _Section:
    """Requests seen between two marks, with the training step that saw each first."""

    mark: int
    """The mark at its end."""
    first_steps: dict[str, int] = field(default_factory=dict)
    untracked: int = 0
    step: int = 0
    until: float = 0.0
    version: str = ""
    """The version that the weights at its end became."""

    def add_older(self, older: _Section) -> None:
        self.first_steps |= older.first_steps
        self.untracked += older.untracked


class TrainingLineage:
    """The parent of the weights in training, and the requests that training has seen since.

    A version is registered while training continues. A mark divides the requests that its weights have seen from later
    ones; a request that is seen on both sides counts on both. Kept in memory: after a restart the lineage holds only
    the requests since then.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.id = uuid.uuid4().hex
        """Names one course of the training, from a start or a rollback to the next: the versions of a course descend
        from each other, and its later weights from them."""
        self._clock = clock
        # The first section stands for everything before the start, the last one is not marked yet.
        self._sections = [_Section(mark=-1, until=clock()), _Section(mark=0)]

    @property
    def parent(self) -> str:
        """Version that the weights descend from: the one registered last, or the one that training started with."""
        return self._sections[self._find_parent()].version

    def parent_at(self, step: int) -> str:
        """Return the version that the weights of an earlier step descend from, by what is known."""
        return [section.version for section in self._sections if section.version and section.step <= step][-1]

    def start(self, parent: str) -> None:
        """Set the version that training starts with."""
        self._sections[0].version = parent

    def add(self, step: int, requests: Iterable[str]) -> None:
        """Add the requests of a training step."""
        newest = self._sections[-1]
        tracked = sum(len(section.first_steps) for section in self._sections[self._find_parent() + 1 :])
        for request in requests:
            if request in newest.first_steps:
                continue
            if tracked < MAX_TRACKED_REQUESTS:
                newest.first_steps[request] = step
                tracked += 1
            else:
                newest.untracked += 1

    def mark(self, step: int) -> int:
        """Return a mark for the weights of a step: they have seen the requests that were added up to now."""
        newest = self._sections[-1]
        newest.step, newest.until = step, self._clock()
        self._sections.append(_Section(newest.mark + 1))
        return newest.mark

    def has(self, mark: int) -> bool:
        """Return whether the weights in training descend from those with a mark that was not dropped."""
        return any(section.mark == mark for section in self._sections)

    def read(self, mark: int) -> LineageRecord:
        """Return what the weights with a mark were learned from; the lineage must have the mark."""
        parent = self._find_parent()
        sections = [section for section in self._sections[parent + 1 :] if section.mark <= mark]
        return LineageRecord(
            mark=mark,
            step=sections[-1].step,
            parent=self.parent,
            requests=tuple(dict.fromkeys(request for section in sections for request in section.first_steps)),
            untracked=sum(section.untracked for section in sections),
            since=self._sections[parent].until,
            until=sections[-1].until,
        )

    def register(self, version: str, record: LineageRecord) -> None:
        """Begin a lineage at a version, unless training was rolled back behind its weights."""
        for section in self._sections:
            if section.mark == record.mark:
                section.version = version
        registered = [i for i, section in enumerate(self._sections) if section.version]
        del self._sections[1 : max(1, registered[-min(len(registered), MAX_VERSIONS)])]

    def keep(self, mark: int) -> None:
        """Drop a mark whose weights become no version; their requests count for the next one."""
        for older, newer in pairwise(list(self._sections)):
            if older.mark == mark:
                newer.add_older(older)
                self._sections.remove(older)

    def roll_back(self, step: int, parent: str) -> None:
        """Return to the weights of an earlier step.

        Args:
            step: The earlier step.
            parent: Version that its weights descended from when they were saved.
        """
        self.id = uuid.uuid4().hex
        for section in reversed(self._sections[1:-1]):
            if section.step > step:
                self.keep(section.mark)
        newest = self._sections[-1]
        newest.first_steps = {request: first for request, first in newest.first_steps.items() if first <= step}
        if self._find_parent() == 0:
            self.start(parent)

    def _find_parent(self) -> int:
        return max((i for i, section in enumerate(self._sections) if section.version), default=0)


def trained_on_spans(line: str, version: str, lineage: LineageRecord, end: float) -> Iterator[Span]:
    """Yield the spans of a version that was registered at a Unix time, the parent first."""
    context, start = version_context(line, version), lineage.since
    attributes: dict[str, AttributeValue] = {"line": line, "version": version, "step": lineage.step}
    totals: dict[str, AttributeValue] = {"requests": len(lineage.requests), "untracked": lineage.untracked}
    yield Span("register version", "version_trained", context, start, end, attributes={**attributes, **totals})
    # Several choices of a request share its trace.
    contexts = iter(dict.fromkeys(map(request_context, lineage.requests)))
    while links := tuple(islice(contexts, MAX_LINKS)):
        child = context.child()
        yield Span(
            "train version",
            "requests_trained_on",
            child,
            start,
            end,
            context.span_id,
            "internal",
            links,
            attributes,
        )


def find_training_tables(tables: Tables, tags: Mapping[str, str]) -> list[TrainingTable]:
    """Return the tables that the tag ``tables`` of a version names; an imported version has none."""
    read: dict[str, int] = json.loads(tags.get("tables", "{}"))
    return [TrainingTable(name, table_address(tables.uri, name), version) for name, version in read.items()]


def dump_shaping_settings(settings: Settings) -> str:
    """Return the settings that a version depends on, as JSON with sorted keys."""
    sections = {
        "speculator": settings.speculator.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json", exclude=set(_NOT_SHAPING)),
        "context_tokens": settings.stream.context_tokens,
    }
    return json.dumps(sections, sort_keys=True, separators=(",", ":"))


def render_card(settings: Settings, shape: DraftShape, tags: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    """Return the card of a version: its origin and figures in Markdown, for readers of the registry.

    Args:
        settings: Of the trainer.
        shape: Of the draft.
        tags: With line, target, parent, tables, code and held_out.
        metrics: Of the training.
    """
    held_out = HeldOutComparison.from_tags(tags)
    tables, generated = json.loads(tags.get("tables", "{}")), tags.get(SELF_GENERATED_TAG)
    read = [f"`{name}` up to version {version}" for name, version in tables.items()]
    fields = {
        "name": settings.target.served_model_name,
        "folder": Path(settings.target.path).name,
        "line": tags["line"],
        "target": tags["target"],
        "code": tags["code"],
        "parent": tags.get("parent", "none"),
        "data": ", ".join([*read, *([str(SelfGeneratedData.model_validate_json(generated))] if generated else [])])
        or "none",
        "variant": shape.variant,
        "hidden": shape.hidden_size,
        "mlp": shape.intermediate_size,
        "draft_vocab_size": f"{shape.draft_vocab_size:,}",
        "vocab_size": f"{shape.vocab_size:,}",
        "samples": held_out.samples,
        "acceptance_length": f"{1 + held_out.accepted_per_step:.3f}",
        "champion": held_out.champion,
        "champion_acceptance_length": f"{1 + held_out.champion_accepted_per_step:.3f}",
        "interval": held_out.interval,
        "figures": "\n".join(f"| {name} | {value:,.4g} |" for name, value in sorted(metrics.items())),
    }
    return Template(_CARD.read_text()).substitute(fields)
