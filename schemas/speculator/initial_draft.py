"""The draft of day 0: what nodes and trainer begin with, made by each of them from the same target and settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from schemas.settings import SettingsError, Speculator
from schemas.speculator.checkpoint import (
    CheckpointError,
    line_of,
    read_tensor,
    shape_for_target,
    target_fingerprint,
)
from schemas.speculator.network import EagleDraft, random_draft

_EMBEDDINGS, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_MIXED_IN = 0.3
"""Factor on the random weights that take in the captured layers, beside the one that goes through."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A speculator line as target and settings fix it, before anything was learned."""

    target: str
    """Fingerprint of the target."""
    name: str
    day_0: EagleDraft
    """What all processes begin with."""


def read_line(folder: Path, speculator: Speculator) -> Line:
    """The line of the target in ``folder``. Reads all of the target once: its fingerprint is over every byte.

    Raises:
        CheckpointError: no model in the folder, or one that the draft network does not fit.
        SettingsError: the file that ``speculator.draft_vocab_file`` names cannot be used.
    """
    draft = draft_of_day_0(folder, speculator)
    fingerprint = target_fingerprint(folder)
    return Line(fingerprint, line_of(fingerprint, draft.shape, draft.d2t), draft)


def draft_of_day_0(folder: Path, speculator: Speculator) -> EagleDraft:
    """What a draft for the target in ``folder`` begins with. Its shape and vocabulary fix, with the target, the line.

    Raises:
        CheckpointError: no model in the folder, or one that the draft network does not fit.
        SettingsError: the file that ``speculator.draft_vocab_file`` names cannot be used.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}; set target.path to a model folder") from error
    shape = shape_for_target(
        config,
        speculator.draft_vocab_size,
        variant=speculator.variant,
        intermediate_size=speculator.intermediate_size,
        key_value_heads=speculator.num_key_value_heads,
    )
    kept_D = None
    if speculator.draft_vocab_file:
        kept_D = read_vocabulary(Path(speculator.draft_vocab_file), shape.vocab_size)
        shape = replace(shape, draft_vocab_size=len(kept_D))
    draft = random_draft(shape, speculator.seed, kept_D)
    if speculator.init == "head":
        move_to_output(draft, output_of(folder, tied=bool(config.get("tie_word_embeddings"))))
    return draft


def output_of(folder: Path, *, tied: bool) -> Tensor:
    """The target's output layer [V, H], which is its embeddings where they are ``tied``.

    Raises:
        CheckpointError: no shard holds it.
    """
    try:
        return read_tensor(folder, _EMBEDDINGS if tied else _OUTPUT)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; set speculator.init = 'random' if it has none of that name") from error


def token_embeddings(folder: Path) -> Tensor:
    """The target's token embeddings [V, H].

    Raises:
        CheckpointError: no shard holds them.
    """
    return read_tensor(folder, _EMBEDDINGS)


def move_to_output(draft: EagleDraft, output_VH: Tensor) -> None:
    """Let a random draft begin near the target's own output.

    It scores with the target's rows, and the highest captured layer goes through ``fc``, beside the random weights at a
    fraction of their size. What it then says is what the target said a token earlier: seldom right, but learning gets
    from there to a given accepted tokens per step with less traffic than from random weights.

    Raises:
        CheckpointError: that output is of another shape.
    """
    hidden = draft.shape.hidden_size
    if output_VH.shape != (draft.shape.vocab_size, hidden) or not output_VH.is_floating_point():
        raise CheckpointError(
            f"the target's output layer is {output_VH.dtype} {list(output_VH.shape)}, not numbers of "
            f"[{draft.shape.vocab_size}, {hidden}]; set speculator.init = 'random'"
        )
    with torch.no_grad():
        draft.fc.weight.mul_(_MIXED_IN)[:, -hidden:] += torch.eye(hidden)
        draft.lm_head.weight.copy_(output_VH[draft.t2d])


def read_vocabulary(path: Path, vocabulary: int) -> Tensor:
    """Token ids [D] that the draft can propose, from a JSON list of them.

    Args:
        path: The file.
        vocabulary: V: tokens of the target.

    Raises:
        SettingsError: no such file, or something else than at least two ascending ids below ``vocabulary``.
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
        raise SettingsError(f"{named}: ids must be ascending, and {wrong[0]} follows one that is not below it")
    if not 0 <= ids[0] <= ids[-1] < vocabulary:
        raise SettingsError(f"{named}: ids must be 0 to {vocabulary - 1}, the target's; found {ids[0]} to {ids[-1]}")
    return torch.tensor(ids)
