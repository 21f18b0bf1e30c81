"""How other projects store an EAGLE-3 draft: tensor names, layer numbers and keys, as pure functions both ways.

| | SGLang, SpecForge | vLLM | speculators |
|---|---|---|---|
| layer | ``midlayer.`` | ``midlayer.`` or ``layers.0.`` | ``layers.0.`` |
| captured layer | its output, from 0 | the layers that have run: one more | as vLLM |
| key of the captured layers | in ``eagle_config`` | on the top level | on the top level |
| shape | on the top level | on the top level | ``transformer_layer_config`` |

Read in SGLang 0.5.21 and vLLM 0.32.0 (``llama_eagle3.py`` of both, and vLLM's ``gpu_model_runner.py``), SpecForge 0.2.0
(``llama3_eagle.py``) and speculators 0.9.0 (``models/eagle3``). All four store ``d2t`` as offsets: row i of the head is
target token i + d2t[i].

Shape suffixes as in ``schemas.speculator.network``; V target vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from schemas.speculator import rotary
from schemas.speculator.checkpoint import CONFIG, CheckpointError, default_capture_layers, to_config
from schemas.speculator.network import DraftShape

Layout = Literal["sglang", "vllm", "speculators"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LAYERS = "eagle_aux_hidden_state_layer_ids"
EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"

_OURS, _THEIRS = "midlayer.", "layers.0."
_TABLES = ("d2t", "t2d")
_PREFIX = re.compile(r"^(?:(?:module|model|draft_model)\.)+")
_RENAMED = {
    "draft_id_to_target_id": "d2t",
    "aux_norm_low.weight": "fc_norm.0.weight",
    "aux_norm_mid.weight": "fc_norm.1.weight",
    "aux_norm_high.weight": "fc_norm.2.weight",
}
_OF_THE_TARGET = re.compile(r"verifier_(lm_head|norm)\.weight|.*rotary_emb\.inv_freq")
"""Tensors that a folder may repeat from the target or that follow from the configuration."""
_HEAD_ROWS = 64
"""The servers pad the head to a multiple of so many rows."""
_FUSED = (
    ("self_attn.qkv_proj.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    ("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
)
_FOREIGN_PARTS = (
    (r".*\.bias", "biases"),
    (r"layers\.\d+\..*", "more than one decoder layer"),
    (r".*self_attn\.[qk]_norm\..*", "norms of queries and keys"),
    (r"input_norm\..*", "one norm over all captured layers (norm_before_fc)"),
    (r".*mask_hidden.*", "parallel drafting"),
)
"""Parts of networks that the draft network does not have, by the names of their tensors."""
_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
"""Of transformers' ``LlamaConfig``, which writes no key that has its default."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a folder for speculators also says: which target verifies how many draft tokens."""

    path: str
    """Of the target: a folder, or a name on a model hub."""
    architectures: tuple[str, ...]
    """As in the target's ``config.json``."""
    draft_tokens: int
    """Draft tokens per verify step."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredDraft:
    """A draft as a folder stores it."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ReadDraft:
    """A draft in the names and conventions of a version."""

    layout: Layout
    shape: DraftShape
    tensors: Mapping[str, Tensor]
    """Of a version; without ``HEAD`` where the folder uses the target's."""
    embeddings_VH: Tensor | None
    """Token embeddings in the folder, which must be the target's."""


def to_layout(shape: DraftShape, tensors: Mapping[str, Tensor], layout: Layout, verifier: Verifier) -> StoredDraft:
    """Return a version's draft as a project loads it.

    Args:
        shape: Of the draft.
        tensors: Of the version.
        layout: The project.
        verifier: Named in a folder for speculators.

    Raises:
        CheckpointError: the project cannot compute this draft.
    """
    vllm_layers = [layer + 1 for layer in shape.capture_layers]
    # A model over the whole vocabulary has no tables in vLLM and speculators.
    left_out = _TABLES if shape.draft_vocab_size == shape.vocab_size else ()
    kept = {name: value for name, value in tensors.items() if name not in left_out}
    if layout == "speculators":
        renamed = {name.replace(_OURS, _THEIRS): value for name, value in kept.items()}
        return StoredDraft(_to_speculators_config(shape, vllm_layers, verifier), renamed)
    if layout == "vllm":
        return StoredDraft(to_config(shape) | {LAYERS: vllm_layers}, kept)
    if shape.norm_before_residual:
        raise CheckpointError("the draft has norm_before_residual, which SGLang ignores; choose vllm or speculators")
    return StoredDraft(to_config(shape), dict(tensors))


def _to_speculators_config(shape: DraftShape, layers: list[int], verifier: Verifier) -> dict[str, Any]:
    own = ("architectures", "draft_vocab_size", "target_hidden_size", "eagle_config", "fc_norm", "norm_output")
    layer = {key: value for key, value in to_config(shape).items() if key not in (*own, "norm_before_residual")}
    proposal = {"proposal_type": "greedy", "speculative_tokens": verifier.draft_tokens}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "transformer_layer_config": layer,
        "draft_vocab_size": shape.draft_vocab_size,
        "target_hidden_size": shape.hidden_size,
        "norm_before_residual": shape.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": shape.is_normed,
        "norm_output": shape.is_normed,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        LAYERS: layers,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier.path, "architectures": list(verifier.architectures)},
        },
        "torch_dtype": "bfloat16",
    }


def from_layout(stored: StoredDraft, target: Mapping[str, Any], layout: Layout | None = None) -> ReadDraft:
    """Return a stored draft in the names and conventions of a version.

    Args:
        stored: The draft.
        target: The ``config.json`` of its target.
        layout: The project that wrote it; None derives it from the keys.

    Raises:
        CheckpointError: the draft network does not support the draft, or the draft does not fit the target.
    """
    config = stored.config
    layout = layout or detect_layout(config, target)
    tensors = rename_tensors(stored.tensors)
    embeddings_VH = tensors.pop(EMBEDDINGS, None)
    _check_architecture(config)
    shape = _read_shape(config, target, layout)
    split = split_tensors(tensors, shape)
    _check_parts(split)
    return ReadDraft(layout, shape, _read_vocabulary(split, shape), embeddings_VH)


def detect_layout(config: Mapping[str, Any], target: Mapping[str, Any]) -> Layout:
    """Return the project whose keys a configuration has.

    Raises:
        CheckpointError: the layer numbers in ``eagle_config`` are those that vLLM captures by default: they may be
            numbered in either way.
    """
    if "speculators_model_type" in config:
        return "speculators"
    if config.get(LAYERS):
        return "vllm"
    layers = (config.get("eagle_config") or {}).get(LAYERS)
    if layers and list(layers) == [layer + 1 for layer in default_capture_layers(target["num_hidden_layers"])]:
        raise CheckpointError(
            f"{CONFIG}: eagle_config has the layers {list(layers)}, which are the usual ones if counted as vLLM counts "
            "them; SGLang and SpecForge count one less: give --format vllm or --format sglang"
        )
    return "sglang"


def rename_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names in a version, fused ones by the name of the fused one.

    Raises:
        CheckpointError: two tensors have the same name then.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        bare = _PREFIX.sub("", name)
        bare = _RENAMED.get(bare, bare)
        bare = _OURS + bare.removeprefix(_THEIRS) if bare.startswith(_THEIRS) else bare
        if _OF_THE_TARGET.fullmatch(bare):
            continue
        if bare in renamed:
            raise CheckpointError(f"tensor {name}: another tensor also has the name {bare}")
        renamed[bare] = value
    return renamed


def fuse_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a version, without its vocabulary tables, as a rank of SGLang's and vLLM's server holds them.

    Both name them alike, and fuse the same ones.

    Args:
        tensors: Of a version, or from ``shard_tensors``.
    """
    found = {name.replace(_OURS, _THEIRS): value for name, value in tensors.items()}
    for fused, parts in _FUSED:
        found[_THEIRS + fused] = torch.cat([found.pop(_THEIRS + part) for part in parts])
    return {name if name.startswith("lm_head") else f"model.{name}": value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of each tensor a tensor-parallel rank of a server holds."""

    rank: int = 0
    ranks: int = 1


def shard_tensors(tensors: Mapping[str, Tensor], key_heads: int, shard: Shard) -> dict[str, Tensor]:
    """Return the parts of a version's tensors that a rank of SGLang's or vLLM's server holds, before they are fused.

    Both divide queries, keys, values and the halves of the MLP by rows, the matrices behind these by columns, and the
    head by rows, to which they add rows of zeros up to a multiple of 64, or of 64 times the ranks if these do not
    divide it. With more ranks than key heads, ranks share a key head.

    Args:
        tensors: Of a version.
        key_heads: Heads of keys and values.
        shard: Of one rank.

    Raises:
        ValueError: a tensor cannot be divided so.
    """
    return {name: _part_of(name, value, key_heads, shard).contiguous() for name, value in tensors.items()}


def _part_of(name: str, value: Tensor, key_heads: int, shard: Shard) -> Tensor:
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if module in ("k_proj", "v_proj"):
        parts = min(shard.ranks, key_heads)
        return _divide(name, value, 0, Shard(shard.rank * parts // shard.ranks, parts))
    if module in ("q_proj", "gate_proj", "up_proj"):
        return _divide(name, value, 0, shard)
    if module in ("o_proj", "down_proj"):
        return _divide(name, value, 1, shard)
    if name == HEAD:
        rows = len(value) + -len(value) % _HEAD_ROWS
        rows += -rows % (_HEAD_ROWS * shard.ranks) if rows % shard.ranks else 0
        return _divide(name, functional.pad(value, (0, 0, 0, rows - len(value))), 0, shard)
    return value


def _divide(name: str, value: Tensor, dim: int, shard: Shard) -> Tensor:
    size, rest = divmod(value.shape[dim], shard.ranks)
    if rest:
        raise ValueError(f"{name}: {value.shape[dim]} rows or columns cannot be divided by {shard.ranks} ranks")
    return value.narrow(dim, shard.rank * size, size)


def split_tensors(tensors: Mapping[str, Tensor], shape: DraftShape) -> dict[str, Tensor]:
    """Return tensors with the fused ones split; names are those of ``rename_tensors``.

    Raises:
        CheckpointError: a fused tensor has another number of rows than its parts.
    """
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    rows = ([query, key, key], [shape.intermediate_size] * 2)
    found = dict(tensors)
    for (fused, parts), sizes in zip(_FUSED, rows, strict=True):
        value = found.pop(_OURS + fused, None)
        if value is None:
            continue
        if len(value) != sum(sizes):
            raise CheckpointError(f"{_OURS}{fused}: {len(value)} rows, expected {sum(sizes)}")
        found |= {_OURS + part: piece.clone() for part, piece in zip(parts, value.split_with_sizes(sizes), strict=True)}
    return found


def _check_architecture(config: Mapping[str, Any]) -> None:
    inner = config.get("transformer_layer_config") or config
    if config.get("speculators_model_type", "eagle3") != "eagle3":
        raise CheckpointError(f"{CONFIG}: speculators_model_type {config['speculators_model_type']!r}, expected eagle3")
    names = config.get("architectures") or []
    if names and not any("eagle3" in name.lower() for name in names):
        raise CheckpointError(f"{CONFIG}: architectures {names} are no EAGLE-3 draft")
    if inner.get("num_hidden_layers", 1) != 1:
        raise CheckpointError(f"{CONFIG}: num_hidden_layers {inner['num_hidden_layers']}; a draft has one layer")
    if inner.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{CONFIG}: hidden_act {inner['hidden_act']!r}; the draft network computes silu")
    if "sliding_attention" in (inner.get("layer_types") or ()):
        raise CheckpointError(f"{CONFIG}: layer_types has sliding_attention; the draft network attends to all tokens")
    if config.get("norm_before_fc") or (config.get("eagle_config") or {}).get("norm_before_fc"):
        raise CheckpointError(f"{CONFIG}: the draft network does not support norm_before_fc")


def _read_shape(config: Mapping[str, Any], target: Mapping[str, Any], layout: Layout) -> DraftShape:
    inner = {**_LLAMA_DEFAULTS, **(config.get("transformer_layer_config") or config)}
    normed = [bool(config.get("fc_norm") or config.get("use_aux_norm")), bool(config.get("norm_output"))]
    if normed[0] != normed[1]:
        raise CheckpointError(f"{CONFIG}: fc_norm and norm_output are of EAGLE-3.1, which has both; found one of them")
    hidden, heads = inner["hidden_size"], inner["num_attention_heads"]
    rope = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    try:
        scaling = rotary.parse_scaling({"max_position_embeddings": target["max_position_embeddings"], **inner})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error
    _check_sizes(config, inner, target)
    return DraftShape(
        hidden_size=hidden,
        intermediate_size=inner["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=inner.get("num_key_value_heads") or heads,
        head_dim=inner.get("head_dim") or hidden // heads,
        vocab_size=target["vocab_size"],
        draft_vocab_size=config.get("draft_vocab_size") or target["vocab_size"],
        rms_norm_eps=inner["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or inner.get("rope_theta") or 10_000.0),
        # It limits no computation of the draft, which follows its target.
        max_position_embeddings=target["max_position_embeddings"],
        capture_layers=_read_layers(config, target, layout),
        variant="eagle3.1" if all(normed) else "eagle3",
        rope_scaling=scaling,
        norm_before_residual=_read_residual(config, layout),
    )


def _check_sizes(config: Mapping[str, Any], inner: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    of_draft = {
        "hidden_size": inner["hidden_size"],
        "target_hidden_size": config.get("target_hidden_size") or inner["hidden_size"],
        "vocab_size": inner.get("vocab_size", target["vocab_size"]),
    }
    for name, value in of_draft.items():
        expected = target[name.removeprefix("target_")]
        if value != expected:
            raise CheckpointError(f"{CONFIG}: {name} {value}, but the target's is {expected}; see target.path")


def _read_layers(config: Mapping[str, Any], target: Mapping[str, Any], layout: Layout) -> tuple[int, ...]:
    """Return the captured layers, numbered by their outputs from 0; without the key, those of all projects."""
    count = target["num_hidden_layers"]
    layers = config.get(LAYERS) or (config.get("eagle_config") or {}).get(LAYERS)
    if layout == "sglang":
        layers = (config.get("eagle_config") or {}).get(LAYERS) or config.get(LAYERS)
    if not layers:
        return default_capture_layers(count)
    found = tuple(layer if layout == "sglang" else layer - 1 for layer in layers)
    if not 0 <= min(found) <= max(found) < count or list(found) != sorted(set(found)):
        raise CheckpointError(f"{CONFIG}: {LAYERS} {list(layers)} are not ascending layers of a target with {count}")
    return found


def _read_residual(config: Mapping[str, Any], layout: Layout) -> bool:
    if layout == "speculators" and "norm_before_residual" not in config:
        raise CheckpointError(
            f"{CONFIG}: norm_before_residual is missing, and vLLM and speculators assume different values; add the one "
            "that the draft was trained with"
        )
    return bool(config.get("norm_before_residual", False))


def _check_parts(tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        for pattern, part in _FOREIGN_PARTS:
            if re.fullmatch(pattern, name):
                raise CheckpointError(f"tensor {name}: the draft network does not support {part}")


def _read_vocabulary(tensors: Mapping[str, Tensor], shape: DraftShape) -> dict[str, Tensor]:
    """Return the tensors with the head's rows ordered by target token, as d2t and t2d of a version state it.

    Without tables the draft vocabulary is the target's. The mask shows whether a table has offsets or token ids.
    """
    found, size = dict(tensors), shape.draft_vocab_size
    given_D, mask_V = found.pop("d2t", None), found.pop("t2d", None)
    if given_D is None and mask_V is None and size != shape.vocab_size:
        raise CheckpointError(f"no tensor d2t, although {size} of {shape.vocab_size} tokens are drafted")
    lowest_D = torch.arange(size)
    if given_D is not None and len(given_D) != size:
        raise CheckpointError(f"d2t: {len(given_D)} tokens, but draft_vocab_size in {CONFIG} is {size}")
    if mask_V is not None and (mask_V.shape != (shape.vocab_size,) or int(mask_V.bool().sum()) != size):
        raise CheckpointError(f"t2d: expected a mask of {shape.vocab_size} tokens with {size} of them")
    if given_D is None:
        kept_D = lowest_D if mask_V is None else mask_V.bool().nonzero().flatten()
    else:
        kept_D = lowest_D + given_D.long()
        if mask_V is not None and not _equals_mask(kept_D, mask_V) and _equals_mask(given_D.long(), mask_V):
            kept_D = given_D.long()
    order_D = kept_D.argsort()
    kept_D = kept_D[order_D]
    if int(kept_D[0]) < 0 or int(kept_D[-1]) >= shape.vocab_size or bool((kept_D[1:] == kept_D[:-1]).any()):
        raise CheckpointError(f"d2t: i + d2t[i] must be {size} different tokens below {shape.vocab_size}")
    if mask_V is not None and not _equals_mask(kept_D, mask_V):
        raise CheckpointError("t2d: the mask and d2t contain different tokens")
    if HEAD in found and len(found[HEAD]) == size:
        found[HEAD] = found[HEAD][order_D]
    kept_V = torch.zeros(shape.vocab_size, dtype=torch.bool)
    kept_V[kept_D] = True
    return found | {"d2t": kept_D - lowest_D, "t2d": kept_V}


def _equals_mask(ids_D: Tensor, mask_V: Tensor) -> bool:
    return torch.equal(ids_D.sort().values, mask_V.bool().nonzero().flatten())
