"""Export a version as a folder that another project loads, with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from pydantic import ValidationError

from schemas.settings import Settings
from schemas.speculator.checkpoint import CARD
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Layout, Verifier
from schemas.speculator.network import EagleDraft
from trainer.release.draft_import import IMPORTED_FROM_TAG
from trainer.release.gate import HeldOutComparison
from trainer.release.registry import Version

_TEMPLATE = Path(__file__).with_name("exported_card.md")


def find_ancestors(version: Version, versions: Sequence[Version]) -> list[str]:
    """Return the parents of a version, the nearest first, as far as they are registered, and what the last came from.

    Args:
        version: The version.
        versions: All versions of its line.
    """
    by_number = {one.number: one for one in versions}
    found: list[str] = []
    current: Version | None = version
    while current is not None:
        parent = current.tags.get("parent")
        if parent is None or parent in found:
            source = current.tags.get(IMPORTED_FROM_TAG)
            return [*found, f"imported from {source}"] if source else found
        found.append(parent)
        current = by_number.get(parent)
    return found


def describe_acceptance(tags: Mapping[str, str]) -> str:
    """Return a sentence with the acceptance length of a version on the held-out set."""
    try:
        held_out = HeldOutComparison.from_tags(tags)
    except ValidationError:
        return "It was not scored on a held-out set."
    return (
        f"On {held_out.samples} held-out samples of live traffic it has a simulated acceptance length of "
        f"**{1 + held_out.accepted_per_step:.3f}** (bonus token included)."
    )


def load_command(layout: Layout, folder: str, verifier: Verifier) -> str:
    """Return the command that serves the target with an exported folder."""
    tokens = verifier.draft_tokens
    if layout == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {verifier.path} --speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path {folder} --speculative-num-steps {tokens} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {tokens + 1}"
        )
    if layout == "vllm":
        config = {"method": "eagle3", "model": folder, "num_speculative_tokens": tokens}
        return f"vllm serve {verifier.path} --speculative-config '{json.dumps(config)}'"
    return f"vllm serve {folder}"


def export_version(
    settings: Settings,
    draft: EagleDraft,
    version: Version,
    ancestors: Sequence[str],
    folder: Path,
    layout: Layout,
    verifier: Verifier,
) -> None:
    """Write a version as a project loads it, with a card that says what it is.

    Raises:
        CheckpointError: the project cannot compute this draft.
        OSError: the folder cannot be written.
    """
    write_draft_folder(draft, folder, layout, verifier)
    shape, tags = draft.shape, version.tags
    tables = json.loads(tags.get("tables", "{}"))
    fields = {
        "name": settings.target.served_model_name,
        "target": verifier.path,
        "fingerprint": tags["target"],
        "line": tags["line"],
        "version": version.number,
        "registered": f"{version.registered:%Y-%m-%d}",
        "ancestors": " ← ".join(f"`{one}`" for one in ancestors) or "none",
        "tables": ", ".join(f"`{name}` up to version {at}" for name, at in tables.items()) or "not recorded",
        "code": tags.get("code", "not recorded"),
        "variant": shape.variant,
        "hidden": shape.hidden_size,
        "mlp": shape.intermediate_size,
        "draft_vocab_size": f"{shape.draft_vocab_size:,}",
        "vocab_size": f"{shape.vocab_size:,}",
        "layers": ", ".join(map(str, shape.capture_layers)),
        "layout": layout,
        "acceptance": describe_acceptance(tags),
        "command": load_command(layout, str(folder), verifier),
    }
    (folder / CARD).write_text(Template(_TEMPLATE.read_text()).substitute(fields))
