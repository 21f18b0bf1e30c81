"""Folders with an EAGLE-3 draft of other projects: read one as a draft, and write a version as one.

``schemas.speculator.layouts`` maps names and conventions. Only safetensors and JSON are opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from schemas.speculator.checkpoint import CONFIG, DTYPE, WEIGHTS, CheckpointError, build_draft, read_tensor
from schemas.speculator.layouts import (
    HEAD,
    Layout,
    ReadDraft,
    StoredDraft,
    Verifier,
    from_layout,
    to_layout,
)
from schemas.speculator.network import EagleDraft

TARGET_EMBEDDINGS, TARGET_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_EMBEDDING_TOLERANCE = 0.01
"""Relative difference up to which embeddings are the target's, rounded to another type."""


@dataclass(frozen=True, slots=True, eq=False)
class FolderDraft:
    """A draft from a folder."""

    draft: EagleDraft
    """In float32."""
    layout: Layout


def read_draft_folder(
    folder: Path, target_folder: Path, target: Mapping[str, Any], layout: Layout | None = None
) -> FolderDraft:
    """Read a draft that another project has written, and check that it fits the target.

    Other files in the folder are ignored.

    Args:
        folder: With ``config.json`` and safetensors.
        target_folder: The target, for embeddings and output layer.
        target: The target's ``config.json``.
        layout: The project; None derives it.

    Raises:
        CheckpointError: the folder holds no such draft, the draft network does not support it, or it does not fit the
            target. The message names the folder.
    """
    try:
        config = _read_config(folder)
        found = from_layout(StoredDraft(config, _read_tensors(folder)), target, layout)
        _check_embeddings(found, target_folder)
        tensors = dict(found.tensors)
        if HEAD not in tensors and not config.get("draft_vocab_size"):
            tied = bool(target.get("tie_word_embeddings"))
            tensors[HEAD] = read_tensor(target_folder, TARGET_EMBEDDINGS if tied else TARGET_OUTPUT)
        return FolderDraft(build_draft(found.shape, tensors), found.layout)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: key missing or malformed: {error}") from error


def write_draft_folder(draft: EagleDraft, folder: Path, layout: Layout, verifier: Verifier) -> None:
    """Write a draft to a new folder as a project loads it.

    Raises:
        CheckpointError: the project cannot compute this draft.
        OSError: the folder cannot be written.
    """
    stored = to_layout(draft.shape, draft.state_dict(), layout, verifier)
    tensors = {
        name: (value.to(DTYPE) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in stored.tensors.items()
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(stored.config, indent=1) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise CheckpointError(f"no readable {CONFIG}: a draft's folder has {CONFIG} and safetensors") from error
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{CONFIG}: a {type(config).__name__}, not an object")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
        found = f"; {', '.join(pickles)} may hold code: convert it to safetensors first" if pickles else ""
        raise CheckpointError(f"no safetensors file{found}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        try:
            tensors |= load_file(shard)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{shard.name}: not readable as safetensors: {error}") from error
    return tensors


def _check_embeddings(found: ReadDraft, target_folder: Path) -> None:
    """Check that a draft with its own embeddings has the target's: a version shares those of the target."""
    if found.embeddings_VH is None:
        return
    own_VH, expected_VH = found.embeddings_VH.float(), read_tensor(target_folder, TARGET_EMBEDDINGS).float()
    if own_VH.shape != expected_VH.shape or torch.dist(own_VH, expected_VH) > (
        _EMBEDDING_TOLERANCE * expected_VH.norm()
    ):
        raise CheckpointError("the draft has token embeddings of its own; a version shares those of the target")
