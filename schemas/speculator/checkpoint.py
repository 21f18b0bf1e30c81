"""The checkpoint contract of a speculator version: names, shapes, types, line and manifest.

Some serving engines load a wrong export without an error and then accept no draft token. Both ends are therefore
strict: every tensor is checked by name, shape and type when it is written and when it is read; files are checked
against the SHA-256 in the manifest; only safetensors and JSON are opened; and parameters are filled with NaN before
loading, so that a missing tensor is detected. The manifest lists the files that count. Those that MLflow reads, and
those that a model hub adds, are ignored.

An EAGLE-3.1 checkpoint sets ``fc_norm`` and ``norm_output`` in ``config.json`` and has a tensor ``fc_norm.i.weight``
for each captured layer. SGLang from 0.5.21 and vLLM from 0.22.0 on read both keys and these names (their
``llama_eagle3.py``), as does the EAGLE-3 model of speculators 0.9.0. The converter of speculators 0.9.0 keeps the keys
but loses the tensors. Layers are numbered as SGLang numbers them; vLLM and speculators count one more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from schemas.speculator import rotary
from schemas.speculator.network import DraftShape, EagleDraft, Variant

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
CARD, MLMODEL, REQUIREMENTS, PYTHON_ENVIRONMENT = "README.md", "MLmodel", "requirements.txt", "python_env.yaml"
INPUT_EXAMPLE = "input_example.json"
"""Files that make a version an MLflow model; nodes read none of them."""
ARCHITECTURE = "LlamaForCausalLMEagle3"
DTYPE = torch.bfloat16
"""Type of a version's weights."""
_TARGET_DIGITS = 12
"""Digits of the target's fingerprint with which the name of a line begins."""
_SHAPE = TypeAdapter(DraftShape)
_NO_NUMBERS = ("capture_layers", "variant", "rope_scaling", "norm_before_residual")
_NUMBERS = [name for name in DraftShape.__dataclass_fields__ if name not in _NO_NUMBERS]
_NOT_LISTED = {
    *(CARD, MLMODEL, REQUIREMENTS, PYTHON_ENVIRONMENT, INPUT_EXAMPLE),
    *("LICENSE", ".gitattributes", ".cache", "registered_model_meta"),
}
"""Files that a manifest does not list: registries, model hubs and people add and change them; no node reads them."""


class CheckpointError(ValueError):
    """A checkpoint that must not be served; the message names the file or tensor and the reason."""


class Manifest(BaseModel):
    """Line and target of a version, and the hash of each of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = "aurora.speculator/1"
    line: str
    target: str
    sha256: dict[str, str]


def read_tensor(folder: Path, name: str) -> Tensor:
    """Return one tensor of a model in Hugging Face format, from the shard that contains it.

    Raises:
        CheckpointError: no shard contains it, or a shard is not readable.
    """
    for shard in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    found: Tensor = file.get_tensor(name)
                    return found
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{shard}: not readable as safetensors: {error}") from error
    raise CheckpointError(f"{folder}: no tensor {name} in its safetensors files")


MIN_LAYERS = 7
"""Layers of the smallest target: the captured ones differ."""


def default_capture_layers(layers: int) -> tuple[int, ...]:
    """Return a low, a middle and a high layer, numbered by their outputs as in SGLang's configuration."""
    return (1, layers // 2 - 1, layers - 4)


def shape_for_target(
    config: Mapping[str, Any],
    draft_vocab_size: int,
    *,
    variant: Variant = "eagle3",
    intermediate_size: int = 0,
    num_key_value_heads: int = 0,
) -> DraftShape:
    """Return the draft's shape for a target: heads, sizes and positions are the target's.

    Args:
        config: The target's ``config.json``.
        draft_vocab_size: D; at most the size of the target's vocabulary.
        variant: EAGLE-3 or 3.1.
        intermediate_size: Width of the draft's MLP; 0 uses the target's.
        num_key_value_heads: Key and value heads of the draft; 0 uses the target's number.

    Raises:
        CheckpointError: the configuration lacks a size, the target has fewer than ``MIN_LAYERS`` layers, the heads do
            not divide evenly, or the draft network does not support the rotary scaling.
    """
    needed = ("num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings")
    if missing := [key for key in (*needed, "intermediate_size", "rms_norm_eps") if config.get(key) is None]:
        raise CheckpointError(f"the target's {CONFIG} lacks {', '.join(missing)}, which the draft's shape needs")
    if config["num_hidden_layers"] < MIN_LAYERS:
        raise CheckpointError(
            f"the target has {config['num_hidden_layers']} layers; the draft reads three of at least {MIN_LAYERS}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        scaling = rotary.parse_scaling(config)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if heads % (kv_heads := config.get("num_key_value_heads") or heads):
        raise CheckpointError(f"the target's {kv_heads} key and value heads do not divide its {heads} attention heads")
    if num_key_value_heads and heads % num_key_value_heads:
        raise CheckpointError(
            f"speculator.num_key_value_heads {num_key_value_heads} does not divide the target's {heads} attention heads"
        )
    return DraftShape(
        hidden_size=hidden,
        intermediate_size=intermediate_size or config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=num_key_value_heads or kv_heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        draft_vocab_size=min(draft_vocab_size, config["vocab_size"]),
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        max_position_embeddings=config["max_position_embeddings"],
        capture_layers=default_capture_layers(config["num_hidden_layers"]),
        variant=variant,
        rope_scaling=scaling,
    )


def line_name(target: str, shape: DraftShape, d2t: Tensor) -> str:
    """Return the name of the speculator line, derived from target, capture layers, draft shape and d2t table.

    Args:
        target: Fingerprint of the target.
        shape: Shape of every draft of the line.
        d2t: Of the day-0 draft. Versions may draft from other tokens, as many.
    """
    digest = hashlib.sha256(json.dumps(to_config(shape), sort_keys=True).encode())
    digest.update(d2t.cpu().contiguous().numpy().tobytes())
    return f"{target[:_TARGET_DIGITS]}-{digest.hexdigest()[:12]}"


def round_weights(draft: EagleDraft) -> EagleDraft:
    """Return a float32 copy of a draft, on its device, with the weights of the version that it becomes."""
    rounded = EagleDraft(draft.shape).to(draft.fc.weight.device)
    rounded.load_state_dict(
        {name: value.to(DTYPE) if value.is_floating_point() else value for name, value in draft.state_dict().items()}
    )
    return rounded


def write_checkpoint(
    draft: EagleDraft, folder: Path, target: str, dtype: torch.dtype = DTYPE, *, line: str | None = None
) -> Manifest:
    """Write a version to an empty or new folder, and read it back to verify that it loads.

    Args:
        draft: The version.
        folder: Where its files are written.
        target: Fingerprint of the target.
        dtype: Type of the weights.
        line: Its line; None for the line whose day-0 draft has the same draft vocabulary.

    Raises:
        CheckpointError: the draft contains a value that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.detach().to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in draft.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(to_config(draft.shape), indent=1) + "\n")
    manifest = Manifest(
        line=line or line_name(target, draft.shape, draft.d2t),
        target=target,
        sha256={name: hash_file(folder / name) for name in (CONFIG, WEIGHTS)},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    read_checkpoint(folder, manifest.line)
    return manifest


def read_checkpoint(folder: Path, line: str) -> EagleDraft:
    """Return the draft in float32, after all checks that do not run it.

    Raises:
        CheckpointError: a file is altered or unknown, the line differs, or a tensor has a wrong name, shape, type or
        value.
    """
    manifest = read_manifest(folder)
    if manifest.line != line:
        raise CheckpointError(f"{folder}: speculator line {manifest.line}, expected line {line}")
    if not line.startswith(f"{manifest.target[:_TARGET_DIGITS]}-"):
        raise CheckpointError(f"{folder}: line {line} is of another target than the manifest's {manifest.target}")
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in {CONFIG, WEIGHTS, MANIFEST, *_NOT_LISTED})
    if foreign:
        raise CheckpointError(f"{folder}: unknown files: {', '.join(foreign)}")
    for name in (CONFIG, WEIGHTS):
        _check_hash(folder / name, manifest.sha256.get(name))
    shape = read_shape(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: not safetensors: {error}") from error
    return build_draft(shape, tensors)


def build_draft(shape: DraftShape, tensors: Mapping[str, Tensor]) -> EagleDraft:
    """Return the draft in float32 with the tensors of a version.

    Raises:
        CheckpointError: a tensor has a wrong name, shape, type or value.
    """
    _check_tensors(tensors, shape)
    draft = EagleDraft(shape)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.fill_(torch.nan)
    draft.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})
    _check_values(draft)
    return draft


def read_shape(folder: Path) -> DraftShape:
    """Return the shape of a version's draft.

    Raises:
        CheckpointError: the configuration is missing or invalid.
    """
    return _from_config(_read_json(folder / CONFIG))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a version; ``read_checkpoint`` checks its hashes.

    Raises:
        CheckpointError: the manifest is missing or invalid.
    """
    try:
        return Manifest.model_validate(_read_json(folder / MANIFEST))
    except ValidationError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error.errors()[0]['msg']}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


def _check_hash(path: Path, expected: str | None) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: missing")
    found = hash_file(path)
    if found != expected:
        raise CheckpointError(f"{path}: SHA-256 {found[:16]}… is not the manifest's {str(expected)[:16]}…")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_tensors(tensors: Mapping[str, Tensor], shape: DraftShape) -> None:
    with torch.device("meta"):  # the sizes come from a file: allocate nothing before the tensors confirm them
        expected = EagleDraft(shape).state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"missing tensors: {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"unknown tensors: {', '.join(unknown)}")
    for name, value in tensors.items():
        reference = expected[name]
        if value.shape != reference.shape:
            raise CheckpointError(f"{name}: shape {list(value.shape)}, expected {list(reference.shape)}")
        if value.is_floating_point() != reference.is_floating_point():
            raise CheckpointError(f"{name}: type {value.dtype}, expected a type like {reference.dtype}")
        if not value.is_floating_point() and value.dtype != reference.dtype:
            raise CheckpointError(f"{name}: type {value.dtype}, expected {reference.dtype}")


def _check_values(draft: EagleDraft) -> None:
    for name, parameter in draft.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{name}: values are not finite")
    kept = torch.arange(draft.shape.draft_vocab_size) + draft.d2t
    ascending = bool((kept[1:] > kept[:-1]).all())
    if not ascending or int(kept[0]) < 0 or int(kept[-1]) >= draft.shape.vocab_size:
        raise CheckpointError("d2t: the target token ids must be ascending and inside the vocabulary")
    if not torch.equal(draft.t2d.nonzero().flatten(), kept):
        raise CheckpointError("t2d: the mask and d2t contain different tokens")


def to_config(shape: DraftShape) -> dict[str, Any]:
    """Return the content of a version's ``config.json``."""
    # The line is a hash of this dictionary: an optional key is present only in drafts that need it.
    scaled = rotary.to_config(shape.rope_scaling) if shape.rope_scaling else {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {**(scaled or {"rope_type": "default"}), "rope_theta": shape.rope_theta},
        "max_position_embeddings": shape.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(shape.capture_layers),
        },
        **({"rope_scaling": scaled} if scaled else {}),
        **({"fc_norm": True, "norm_output": True} if shape.is_normed else {}),
        **({"norm_before_residual": True} if shape.norm_before_residual else {}),
    }


def _from_config(config: Mapping[str, Any]) -> DraftShape:
    try:
        values = {name: config[name] for name in _NUMBERS}
        layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        variant: Variant = "eagle3.1" if config.get("fc_norm") else "eagle3"
        given = {**values, "capture_layers": layers, "variant": variant}
        given["norm_before_residual"] = config.get("norm_before_residual", False)
        shape = replace(_SHAPE.validate_json(json.dumps(given), strict=True), rope_scaling=rotary.parse_scaling(config))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG}: key missing or malformed: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{CONFIG}: {first['loc'][0]}: {first['msg']}") from error
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error
    if not 0 < min(values.values()) <= max(values.values()) < 2**31:
        raise CheckpointError(f"{CONFIG}: a number is not positive, or too large")
    if dict(config) != to_config(shape):
        different = sorted(
            k for k in config.keys() | to_config(shape).keys() if config.get(k) != to_config(shape).get(k)
        )
        raise CheckpointError(f"{CONFIG}: unexpected values for {', '.join(different)}")
    return shape
