"""The day-0 draft of a line, which nodes and trainer each derive from the same target and settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.settings import SettingsError, Speculator, Target
from schemas.speculator.checkpoint import (
    CheckpointError,
    line_name,
    read_tensor,
    round_weights,
    shape_for_target,
)
from schemas.speculator.draft_folder import TARGET_EMBEDDINGS, TARGET_OUTPUT, read_draft_folder
from schemas.speculator.network import EagleDraft, random_draft
from schemas.speculator.target_fingerprint import target_fingerprint

_RANDOM_FACTOR = 0.3
"""Factor on the random weights of ``fc``, beside the identity that passes the highest captured layer through."""


@dataclass(frozen=True, slots=True, eq=False)
class SpeculatorLine:
    """A speculator line, as determined by target and settings."""

    target: str
    """Fingerprint of the target."""
    name: str
    day_0_draft: EagleDraft


def read_line(target: Target, speculator: Speculator) -> SpeculatorLine:
    """Return the line of a target.

    Raises:
        CheckpointError: the folder has no model, or the draft network does not support the model.
        SettingsError: the file of ``speculator.draft_vocab_file`` is invalid.
    """
    folder = Path(target.path)
    draft = create_day_0_draft(folder, speculator)
    fingerprint = target_fingerprint(folder, target.fingerprint_cache)
    return SpeculatorLine(fingerprint, line_name(fingerprint, draft.shape, draft.d2t), draft)


def create_day_0_draft(folder: Path, speculator: Speculator, kept_D: Tensor | None = None) -> EagleDraft:
    """Return the day-0 draft for the target in ``folder``.

    Args:
        folder: The target.
        speculator: Shape, initial weights and draft vocabulary.
        kept_D: Another draft vocabulary: its target token ids, ascending; None takes that of the settings.

    Raises:
        CheckpointError: the folder has no model, or the draft network does not support the model.
        SettingsError: the file of ``speculator.draft_vocab_file`` is invalid.
    """
    config = read_config(folder)
    shape = shape_for_target(
        config,
        speculator.draft_vocab_size,
        variant=speculator.variant,
        intermediate_size=speculator.intermediate_size,
        num_key_value_heads=speculator.num_key_value_heads,
    )
    if speculator.day_0_folder:
        trained = _read_trained(Path(speculator.day_0_folder), folder, config)
        if kept_D is None:
            return trained
        shape = trained.shape
    elif kept_D is None and speculator.draft_vocab_file:
        kept_D = read_draft_vocabulary(Path(speculator.draft_vocab_file), shape.vocab_size)
    if kept_D is not None:
        shape = replace(shape, draft_vocab_size=len(kept_D))
    draft = random_draft(shape, speculator.seed, kept_D)
    if speculator.init == "head":
        initialize_near_output(draft, read_output_layer(folder, tied=bool(config.get("tie_word_embeddings"))))
    return draft


def _read_trained(folder: Path, target_folder: Path, target: dict[str, Any]) -> EagleDraft:
    try:
        return round_weights(read_draft_folder(folder, target_folder, target).draft)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"speculator.day_0_folder: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the target in ``folder``.

    Raises:
        CheckpointError: the folder has no model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}; set target.path to a model folder") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a {type(config).__name__}, not an object; set target.path to a model folder")
    return config


def read_output_layer(folder: Path, *, tied: bool) -> Tensor:
    """Return the target's output layer [V, H], which equals its embeddings if they are ``tied``.

    Raises:
        CheckpointError: no shard contains it.
    """
    try:
        return read_tensor(folder, TARGET_EMBEDDINGS if tied else TARGET_OUTPUT)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; set speculator.init = 'random' if it has no such tensor") from error


def read_embeddings(folder: Path) -> Tensor:
    """Return the target's token embeddings [V, H].

    Raises:
        CheckpointError: no shard contains them.
    """
    return read_tensor(folder, TARGET_EMBEDDINGS)


def initialize_near_output(draft: EagleDraft, output_VH: Tensor) -> None:
    """Initialize a random draft near the target's output.

    The output layer is the target's, and ``fc`` passes the highest captured layer through, in addition to random
    weights at a fraction of their size. The draft then predicts the target's previous token. It is seldom right, but
    training from there reaches a given acceptance length with less traffic than from random weights.

    Raises:
        CheckpointError: the output layer has another shape.
    """
    hidden = draft.shape.hidden_size
    if output_VH.shape != (draft.shape.vocab_size, hidden) or not output_VH.is_floating_point():
        raise CheckpointError(
            f"the target's output layer is {output_VH.dtype} {list(output_VH.shape)}, expected floating-point "
            f"[{draft.shape.vocab_size}, {hidden}]; set speculator.init = 'random'"
        )
    with torch.no_grad():
        draft.fc.weight.mul_(_RANDOM_FACTOR)[:, -hidden:] += torch.eye(hidden)
        draft.lm_head.weight.copy_(output_VH[draft.t2d])


def read_draft_vocabulary(path: Path, vocab_size: int) -> Tensor:
    """Return the token ids [D] of the draft vocabulary, from a file with a JSON list.

    Args:
        path: The file.
        vocab_size: V: size of the target's vocabulary.

    Raises:
        SettingsError: the file is missing, or is not a list of at least two ascending ids below ``vocab_size``.
    """
    named = f"speculator.draft_vocab_file {path}"
    try:
        ids = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"{named}: no such file; `aurora vocabulary` writes it") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{named}: not readable as JSON: {error}") from error
    if not isinstance(ids, list) or len(ids) < 2 or not all(type(i) is int for i in ids):
        raise SettingsError(f"{named}: must be a list of token ids")
    if wrong := [b for a, b in pairwise(ids) if a >= b]:
        raise SettingsError(f"{named}: ids must be ascending, and {wrong[0]} follows an id that is not below it")
    if not 0 <= ids[0] <= ids[-1] < vocab_size:
        raise SettingsError(f"{named}: ids must be 0 to {vocab_size - 1}, the target's; found {ids[0]} to {ids[-1]}")
    return torch.tensor(ids)
