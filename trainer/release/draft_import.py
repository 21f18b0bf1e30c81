"""Import a trained EAGLE-3 draft of another project: derive its line, and score it on recorded requests.

A draft whose shape is that of the settings' line becomes a version of that line, whatever its draft vocabulary. Any
other one begins a line of its own, which nodes and trainer join with ``speculator.day_0_folder``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

from pipeline.delta import DeltaLog
from schemas.settings import Settings
from schemas.speculator.checkpoint import line_name, round_weights
from schemas.speculator.day_0_draft import read_config
from schemas.speculator.draft_folder import read_draft_folder
from schemas.speculator.layouts import Layout
from schemas.speculator.network import EagleDraft
from trainer.data.held_out import HeldOutSet
from trainer.data.samples import Sample, recompute_features
from trainer.data.table_reader import VERSIONS_PER_READ, TableReader
from trainer.data.target import FrozenTarget, Target, read_target
from trainer.release.gate import HeldOutComparison

IMPORTED_FROM_TAG, IMPORTED_FORMAT_TAG = "imported_from", "imported_format"
"""Tags of a version that was imported: folder or model, and the layout of its files."""
COMMITS_READ = 512
"""Newest commits from which the held-out set is formed; bounds the time of an import beside a long history."""
_CARD = Path(__file__).with_name("imported_card.md")


@dataclass(frozen=True, slots=True, eq=False)
class ImportedDraft:
    """A draft that fits the target, and the line that follows from it."""

    draft: EagleDraft
    """With the weights of the version that it becomes."""
    layout: Layout
    target: Target
    """With the line of the version, and the day-0 draft of that line."""
    rows_line: str
    """Line of the recorded requests whose features the draft reads."""
    of_settings: bool
    """Whether the line is that of the settings: nodes follow it already."""

    @property
    def shape(self) -> dict[str, Any]:
        """The shape, for people and programs."""
        return asdict(self.draft.shape)


def check_draft(settings: Settings, folder: Path, layout: Layout | None) -> ImportedDraft:
    """Read a folder, check that its draft fits the target of the settings, and derive its line.

    Raises:
        CheckpointError: it does not fit, or the folder or the target cannot be read.
        SettingsError: the file of ``speculator.draft_vocab_file`` is invalid.
    """
    own, target_folder = read_target(settings), Path(settings.target.path)
    found = read_draft_folder(folder, target_folder, read_config(target_folder), layout)
    draft = round_weights(found.draft)
    if draft.shape == own.day_0.shape:
        return ImportedDraft(draft, found.layout, own, own.line, of_settings=True)
    line = line_name(own.fingerprint, draft.shape, draft.d2t)
    reads_same = draft.shape.capture_layers == own.day_0.shape.capture_layers
    begun = replace(own, line=line, day_0=draft)
    return ImportedDraft(draft, found.layout, begun, own.line if reads_same else line, of_settings=False)


def read_held_out(tables: DeltaLog, settings: Settings, imported: ImportedDraft) -> dict[Sample, float]:
    """Return the held-out set that the newest commits give, each sample with its weight.

    Raises:
        TableError: the tables cannot be read.
    """
    train, counts = settings.train, Counter[str]()
    newest, branches = tables.version("accepted"), tables.version("rejected")
    reader = TableReader(tables, imported.target.fingerprint, imported.rows_line, train, counts, clock=lambda: 0.0)
    # No branch is scored: those before the newest version are not read.
    reader.seek(max(tables.oldest_readable("accepted"), newest - COMMITS_READ), branches, ())
    held_out = HeldOutSet(train.held_out_ratio, train.held_out_samples, train.held_out_bytes, counts)
    while reader.cursor < newest:
        up_to = min(newest, reader.cursor + VERSIONS_PER_READ)
        entries = [*reader.read(up_to, branches), *reader.take_overdue()]
        for entry in entries + (reader.take_open() if up_to == newest else []):
            held_out.add(entry)
    layers, device = imported.draft.shape.capture_layers, imported.target.embeddings_VH.device
    states = FrozenTarget(Path(settings.target.path), layers, device).compute_states
    weights = held_out.weights
    samples = [entry.sample for entry in held_out]
    return {
        sample if sample.has_features else recompute_features(sample, states): weights[sample.label]
        for sample in samples
    }


def render_imported_card(
    settings: Settings, imported: ImportedDraft, source: str, held_out: HeldOutComparison | None
) -> str:
    """Return the card of an imported version, in Markdown, for readers of the registry."""
    shape = imported.draft.shape
    score = "It was not scored when it was imported."
    if held_out is not None:
        score = (
            f"On {held_out.samples} samples of the held-out set it has a simulated acceptance length of "
            f"**{1 + held_out.accepted_per_step:.3f}** (bonus token included)"
        )
        if imported.of_settings:  # another line begins with the draft itself
            champion = f"{1 + held_out.champion_accepted_per_step:.3f}: {held_out.interval}"
            score += f"; `{held_out.champion}` has {champion}"
        score += "."
    fields = {
        "name": settings.target.served_model_name,
        "folder": Path(settings.target.path).name,
        "line": imported.target.line,
        "target": imported.target.fingerprint,
        "source": source,
        "layout": imported.layout,
        "variant": shape.variant,
        "hidden": shape.hidden_size,
        "mlp": shape.intermediate_size,
        "draft_vocab_size": f"{shape.draft_vocab_size:,}",
        "vocab_size": f"{shape.vocab_size:,}",
        "score": score,
    }
    return Template(_CARD.read_text()).substitute(fields)
