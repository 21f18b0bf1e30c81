"""The card of a version: what it is and how it came about, in Markdown, for people in front of the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template

from schemas.settings import Settings
from schemas.speculator.network import DraftShape
from trainer.release.gate import HeldOut

_CARD = Path(__file__).with_name("card.md")
SETTINGS_TAG = "settings"
"""Tag of a version with what shaped it, as JSON: its sections of the settings as they were."""
PASSED_TAG = "passed"
"""Tag of a version with the version of ``accepted`` up to which every window had its turn before it was registered."""
_BESIDE = (
    "host",
    "port",
    "checkpoint_dir",
    "poll_interval",
    "num_threads",
    "checkpoint_interval",
    "metrics_interval",
    "registration_interval",
)
"""Settings of the trainer that say where and how often, not what is learned."""


def shaping(settings: Settings) -> str:
    """The settings that a version depends on, as JSON with sorted keys."""
    sections = {
        "speculator": settings.speculator.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json", exclude=set(_BESIDE)),
        "context_tokens": settings.stream.context_tokens,
    }
    return json.dumps(sections, sort_keys=True, separators=(",", ":"))


def card(settings: Settings, shape: DraftShape, tags: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    """The card, from what the version is registered with.

    Args:
        settings: Of the trainer.
        shape: Of the draft.
        tags: With line, target, parent, tables, code and held_out.
        metrics: Figures of the training.
    """
    held = HeldOut.of(tags)
    tables = json.loads(tags.get("tables", "{}"))
    facts = {
        "name": settings.target.served_model_name,
        "folder": Path(settings.target.path).name,
        "line": tags["line"],
        "target": tags["target"],
        "code": tags["code"],
        "parent": tags.get("parent", "none"),
        "tables": ", ".join(f"`{name}` up to version {version}" for name, version in tables.items()) or "none",
        "variant": shape.variant,
        "hidden": shape.hidden_size,
        "mlp": shape.intermediate_size,
        "draft_vocab_size": f"{shape.draft_vocab_size:,}",
        "vocabulary": f"{shape.vocab_size:,}",
        "windows": held.windows,
        "accepted_per_step": f"{held.accepted_per_step:.3f}",
        "champion": held.champion,
        "champion_accepted_per_step": f"{held.champion_accepted_per_step:.3f}",
        "figures": "\n".join(f"| {name} | {value:,.4g} |" for name, value in sorted(metrics.items())),
    }
    return Template(_CARD.read_text()).substitute(facts)
