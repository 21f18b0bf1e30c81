"""A draft survives the way into each project's layout and back, and a draft that cannot be imported says why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from schemas.speculator.checkpoint import (
    WEIGHTS,
    CheckpointError,
    build_draft,
    read_checkpoint,
    shape_for_target,
    write_checkpoint,
)
from schemas.speculator.draft_folder import read_draft_folder, write_draft_folder
from schemas.speculator.layouts import (
    HEAD,
    LAYERS,
    LAYOUTS,
    Layout,
    ReadDraft,
    Shard,
    StoredDraft,
    Verifier,
    from_layout,
    fuse_tensors,
    rename_tensors,
    shard_tensors,
    split_tensors,
    to_layout,
)
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from schemas.speculator.rotary import Llama3

TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "vocab_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "num_hidden_layers": 9,
    "rope_theta": 500.0,
}
VERIFIER = Verifier("org/target", ("LlamaForCausalLM",), 5)
SHAPE = shape_for_target(TARGET, 10)


@st.composite
def drafts(draw: st.DrawFn) -> EagleDraft:
    """A draft with any supported shape, vocabulary and captured layers, in numbers that bf16 holds exactly."""
    heads = draw(st.sampled_from([1, 2, 4]))
    kept = sorted(draw(st.sets(st.integers(0, 23), min_size=2, max_size=24)))
    shape = DraftShape(
        hidden_size=8,
        intermediate_size=draw(st.integers(1, 12)),
        num_attention_heads=heads * draw(st.sampled_from([1, 2])),
        num_key_value_heads=heads,
        head_dim=draw(st.sampled_from([2, 4])),
        vocab_size=24,
        draft_vocab_size=len(kept),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([10_000.0, 500.0])),
        max_position_embeddings=64,
        capture_layers=tuple(sorted(draw(st.sets(st.integers(0, 8), min_size=3, max_size=3)))),
        variant=draw(st.sampled_from(["eagle3", "eagle3.1"])),
        rope_scaling=draw(st.sampled_from([None, Llama3(8.0, 1.0, 4.0, 32)])),
        norm_before_residual=draw(st.booleans()),
    )
    draft = random_draft(shape, draw(st.integers(0, 9)), torch.tensor(kept))
    for parameter in draft.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return draft


def export(draft: EagleDraft, layout: Layout) -> StoredDraft:
    return to_layout(draft.shape, draft.state_dict(), layout, VERIFIER)


def same(found: EagleDraft, draft: EagleDraft) -> None:
    assert found.shape == draft.shape
    for name, value in draft.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@settings(max_examples=60, deadline=None)
@given(draft=drafts(), layout=st.sampled_from(LAYOUTS))
def test_a_draft_survives_the_way_there_and_back(draft: EagleDraft, layout: Layout) -> None:
    if draft.shape.norm_before_residual and layout == "sglang":
        with pytest.raises(CheckpointError, match="norm_before_residual"):
            export(draft, layout)
        return
    stored = json.loads(json.dumps(export(draft, layout).config))
    # Layer numbers in ``eagle_config`` alone may be numbered either way if they are vLLM's usual ones.
    named = layout if layout == "sglang" else None
    found = from_layout(StoredDraft(stored, export(draft, layout).tensors), TARGET, named)
    assert found.layout == layout
    same(build_draft(found.shape, found.tensors), draft)


@settings(max_examples=30, deadline=None)
@given(draft=drafts(), prefix=st.sampled_from(["", "model.", "module.model.", "draft_model."]))
def test_fused_and_prefixed_tensors_of_a_server_are_split_and_renamed(draft: EagleDraft, prefix: str) -> None:
    tensors = {name: value for name, value in draft.state_dict().items() if name not in ("d2t", "t2d")}
    held = {prefix + name.removeprefix("model."): value for name, value in fuse_tensors(tensors).items()}
    found = split_tensors(rename_tensors(held), draft.shape)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def wide_draft() -> EagleDraft:
    """Return a draft of eight heads, two of keys, with a head of 70 rows."""
    shape = dataclasses.replace(
        SHAPE, num_attention_heads=8, num_key_value_heads=2, intermediate_size=24, vocab_size=100, draft_vocab_size=70
    )
    return random_draft(shape, 3, torch.arange(70))


def test_ranks_hold_parts_that_make_up_the_draft() -> None:
    draft = wide_draft()
    tensors = {name: value for name, value in draft.state_dict().items() if name not in ("d2t", "t2d")}
    parts = [shard_tensors(tensors, 2, Shard(rank, 4)) for rank in range(4)]
    columns = ("o_proj.weight", "down_proj.weight")
    for name, value in tensors.items():
        held = [part[name] for part in parts]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            assert torch.equal(torch.cat(held[::2]), value), "two ranks share a head of keys"
            assert torch.equal(torch.cat(held[1::2]), value)
        elif name == "lm_head.weight":
            assert torch.equal(torch.cat(held)[:70], value)
            assert [len(part) for part in held] == [32] * 4
            assert not torch.cat(held)[70:].any()
        elif held[0].shape != value.shape:
            assert torch.equal(torch.cat(held, dim=1 if name.endswith(columns) else 0), value)
        else:
            assert all(torch.equal(part, value) for part in held)
            assert name.startswith(("fc", "norm")) or "norm" in name


def test_a_head_is_padded_to_rows_that_the_ranks_divide() -> None:
    head = {"lm_head.weight": torch.ones(100, 2)}
    assert [len(shard_tensors(head, 1, Shard(0, ranks))["lm_head.weight"]) for ranks in (1, 2, 3)] == [128, 64, 64]


def test_tensors_that_ranks_cannot_share_are_named() -> None:
    with pytest.raises(ValueError, match=r"q_proj.weight: 9 rows or columns cannot be divided by 2 ranks"):
        shard_tensors({"midlayer.self_attn.q_proj.weight": torch.zeros(9, 4)}, 1, Shard(0, 2))


def draft_of(shape: DraftShape = SHAPE) -> EagleDraft:
    return random_draft(shape, 3, torch.tensor([0, 1, 3, 4, 7, 8, 9, 15, 20, 23]))


def changed(
    edit: Callable[[dict[str, Tensor]], object] = lambda _: None, without: str = "", **keys: Any
) -> StoredDraft:
    stored = export(draft_of(), "sglang")
    tensors = dict(stored.tensors)
    edit(tensors)
    return StoredDraft({k: v for k, v in {**stored.config, **keys}.items() if k != without}, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_project_gets_the_layers_by_its_own_numbers(layout: Layout) -> None:
    config = export(draft_of(), layout).config
    assert SHAPE.capture_layers == (1, 3, 5)
    if layout == "sglang":
        assert (config["eagle_config"][LAYERS], LAYERS in config) == ([1, 3, 5], False)
    else:
        assert config[LAYERS] == [2, 4, 6]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_the_names_and_values_that_its_project_reads(layout: Layout) -> None:
    adds_normed = layout != "sglang"
    draft = draft_of(dataclasses.replace(SHAPE, norm_before_residual=adds_normed))
    stored = export(draft, layout)
    layer = "layers.0." if layout == "speculators" else "midlayer."
    assert stored.tensors["d2t"].tolist() == [0, 0, 1, 1, 3, 3, 3, 8, 12, 14]
    assert stored.tensors["t2d"].nonzero().flatten().tolist() == [0, 1, 3, 4, 7, 8, 9, 15, 20, 23]
    assert torch.equal(stored.tensors["fc.weight"], draft.fc.weight)
    assert torch.equal(stored.tensors[HEAD], draft.lm_head.weight)
    assert torch.equal(stored.tensors[f"{layer}self_attn.k_proj.weight"], draft.midlayer.self_attn.k_proj.weight)
    assert bool(stored.config.get("norm_before_residual")) is adds_normed


def test_a_server_holds_queries_before_keys_before_values_and_the_gate_first() -> None:
    tensors = {name: value for name, value in draft_of().state_dict().items() if name not in ("d2t", "t2d")}
    fused, layer = fuse_tensors(tensors), draft_of().midlayer
    attention = layer.self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(fused["model.layers.0.self_attn.qkv_proj.weight"], torch.cat(parts))
    assert torch.equal(
        fused["model.layers.0.mlp.gate_up_proj.weight"],
        torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
    )


def test_norms_of_captured_layers_are_read_by_the_names_of_low_middle_and_high() -> None:
    draft = draft_of(dataclasses.replace(SHAPE, variant="eagle3.1"))
    stored = export(draft, "sglang")
    norms = {f"fc_norm.{i}.weight": torch.full((8,), float(i)) for i in range(3)}
    names = {f"fc_norm.{i}.weight": f"aux_norm_{name}.weight" for i, name in enumerate(("low", "mid", "high"))}
    tensors = {names.get(name, name): value for name, value in {**stored.tensors, **norms}.items()}
    config = {**stored.config, "use_aux_norm": True, "fc_norm": None}
    found = from_layout(StoredDraft(config, tensors), TARGET)
    assert found.shape == draft.shape
    assert all(torch.equal(found.tensors[name], value) for name, value in norms.items())


def test_a_folder_with_a_tensor_more_or_less_is_not_imported(target: Path, tmp_path: Path) -> None:
    write_draft_folder(draft_of(), tmp_path / "draft", "sglang", VERIFIER)
    tensors = load_file(tmp_path / "draft" / WEIGHTS)
    without = {name: value for name, value in tensors.items() if name != "midlayer.mlp.up_proj.weight"}
    for changed_to, says in (
        (without, "missing tensors: midlayer.mlp.up_proj.weight"),
        (tensors | {"midlayer.extra.weight": torch.ones(1)}, "unknown tensors: midlayer.extra.weight"),
        (
            tensors | {"fc.weight": tensors["fc.weight"].T.contiguous()},
            r"fc.weight: shape \[24, 8\], expected \[8, 24\]",
        ),
    ):
        save_file(changed_to, tmp_path / "draft" / WEIGHTS)
        with pytest.raises(CheckpointError, match=says):
            read_draft_folder(tmp_path / "draft", target, TARGET)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"eagle_config": {LAYERS: [0, 4, 7]}}, (0, 4, 7)),
        ({"eagle_config": {}}, (1, 3, 5)),
        ({"eagle_config": None}, (1, 3, 5)),
        ({LAYERS: [3, 5, 9]}, (2, 4, 8)),
    ],
)
def test_layer_numbers_are_read_as_the_project_counts(keys: Mapping[str, Any], layers: tuple[int, ...]) -> None:
    assert from_layout(changed(**keys), TARGET).shape.capture_layers == layers


def test_layer_numbers_that_may_be_counted_either_way_need_the_format() -> None:
    stored = changed(eagle_config={LAYERS: [2, 4, 6]})
    with pytest.raises(CheckpointError, match=r"\[2, 4, 6\].*--format vllm or --format sglang"):
        from_layout(stored, TARGET)
    assert from_layout(stored, TARGET, "vllm").shape.capture_layers == (1, 3, 5)
    assert from_layout(stored, TARGET, "sglang").shape.capture_layers == (2, 4, 6)


def kept(read: ReadDraft) -> list[int]:
    return (read.tensors["d2t"] + torch.arange(10)).tolist()


def absolute(tensors: dict[str, Tensor]) -> None:
    tensors["d2t"] = tensors["d2t"] + torch.arange(10)


def shuffled(tensors: dict[str, Tensor]) -> None:
    order = torch.arange(9, -1, -1)
    tensors["d2t"] = (tensors["d2t"] + torch.arange(10))[order] - torch.arange(10)
    tensors[HEAD] = tensors[HEAD][order]


@pytest.mark.parametrize(
    "edit",
    [
        absolute,
        shuffled,
        lambda t: t.pop("t2d"),
        lambda t: t.pop("d2t"),
        lambda t: t.update(d2t=t["d2t"].int(), t2d=t["t2d"].to(torch.uint8)),
        lambda t: t.update(draft_id_to_target_id=t.pop("d2t")),
    ],
    ids=["ids", "unordered", "no mask", "mask only", "types", "vLLM's name"],
)
def test_every_way_to_state_the_vocabulary_gives_the_same_draft(edit: Callable[[dict[str, Tensor]], object]) -> None:
    found = from_layout(changed(edit), TARGET)
    draft = draft_of()
    assert kept(found) == [0, 1, 3, 4, 7, 8, 9, 15, 20, 23]
    same(build_draft(found.shape, found.tensors), draft)


def test_a_draft_without_tables_drafts_from_all_tokens() -> None:
    shape = dataclasses.replace(SHAPE, draft_vocab_size=24)
    stored = export(random_draft(shape, 1), "sglang")
    tensors = {name: value for name, value in stored.tensors.items() if name not in ("d2t", "t2d")}
    found = from_layout(StoredDraft({**stored.config, "draft_vocab_size": None}, tensors), TARGET)
    assert found.shape == shape
    assert found.tensors["t2d"].all()


def put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.update({name.replace("__", "."): value for name, value in tensors.items()})


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (changed(hidden_size=16), "hidden_size 16, but the target's is 8; see target.path"),
        (changed(target_hidden_size=16), "target_hidden_size 16, but the target's is 8"),
        (changed(vocab_size=32), "vocab_size 32, but the target's is 24"),
        (changed(num_hidden_layers=2), "num_hidden_layers 2; a draft has one layer"),
        (changed(put(layers__1__mlp__up_proj__weight=ONE)), "more than one decoder layer"),
        (changed(put(midlayer__self_attn__q_norm__weight=ONE)), "norms of queries and keys"),
        (changed(put(fc__bias=ONE)), "fc.bias: the draft network does not support biases"),
        (changed(put(input_norm__weight=ONE)), "norm_before_fc"),
        (changed(norm_before_fc=True), "norm_before_fc"),
        (changed(put(mask_hidden=ONE)), "parallel drafting"),
        (changed(put(model__norm__weight=ONE)), "another tensor also has the name norm.weight"),
        (changed(fc_norm=True), "has both; found one"),
        (changed(norm_output=True), "has both; found one"),
        (changed(hidden_act="gelu"), "'gelu'"),
        (changed(layer_types=["sliding_attention"]), "sliding_attention"),
        (changed(architectures=["LlamaForCausalLM"]), "no EAGLE-3 draft"),
        (changed(speculators_model_type="dflash"), "'dflash', expected eagle3"),
        (changed(rope_parameters={"rope_type": "longrope"}), "longrope"),
        (changed(eagle_config={LAYERS: [1, 3, 9]}), r"\[1, 3, 9\] are not ascending layers of a target with 9"),
        (changed(eagle_config={LAYERS: [3, 1, 5]}), "ascending"),
        (changed(lambda t: (t.pop("d2t"), t.pop("t2d"))), "no tensor d2t, although 10 of 24"),
        (changed(put(d2t=torch.zeros(9).long())), "d2t: 9 tokens, but draft_vocab_size"),
        (changed(put(d2t=torch.arange(10) + 10)), "d2t: i \\+ d2t"),
        (changed(put(t2d=torch.ones(24).bool())), "t2d: expected a mask of 24 tokens with 10"),
        (changed(put(t2d=torch.arange(24) < 10)), "t2d: the mask and d2t contain different"),
    ],
)
def test_a_draft_that_cannot_be_imported_says_why(stored: StoredDraft, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        from_layout(stored, TARGET)


def test_a_speculators_folder_must_say_what_its_residual_is() -> None:
    stored = export(draft_of(), "speculators")
    config = {key: value for key, value in stored.config.items() if key != "norm_before_residual"}
    with pytest.raises(CheckpointError, match="norm_before_residual is missing"):
        from_layout(StoredDraft(config, stored.tensors), TARGET)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(24, 8, generator=generator) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_read_as_written(layout: Layout, target: Path, tmp_path: Path) -> None:
    draft = draft_of()
    write_draft_folder(draft, tmp_path / "draft", layout, VERIFIER)
    (tmp_path / "draft" / "README.md").write_text("---\n")
    found = read_draft_folder(tmp_path / "draft", target, TARGET)
    assert found.layout == layout
    assert torch.equal(found.draft.fc.weight, draft.fc.weight.bfloat16().float())


def test_embeddings_in_a_folder_must_be_the_targets(target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    write_draft_folder(draft_of(), folder, "sglang", VERIFIER)
    tensors = load_file(folder / WEIGHTS)
    own = load_file(target / WEIGHTS)["model.embed_tokens.weight"]
    save_file({**tensors, "embed_tokens.weight": own.bfloat16()}, folder / WEIGHTS)
    read_draft_folder(folder, target, TARGET)
    save_file({**tensors, "embed_tokens.weight": own * 1.1}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="token embeddings of its own"):
        read_draft_folder(folder, target, TARGET)


def test_a_head_that_is_missing_is_the_targets_where_all_tokens_are_drafted(target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    draft = random_draft(dataclasses.replace(SHAPE, draft_vocab_size=24), 1)
    write_draft_folder(draft, folder, "sglang", VERIFIER)
    tensors = {name: value for name, value in load_file(folder / WEIGHTS).items() if name != HEAD}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"missing tensors: {HEAD}"):
        read_draft_folder(folder, target, TARGET)
    config = json.loads((folder / "config.json").read_text()) | {"draft_vocab_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    found = read_draft_folder(folder, target, TARGET)
    assert torch.equal(found.draft.lm_head.weight, load_file(target / WEIGHTS)[HEAD])


def test_pickled_weights_are_not_opened(target: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin may hold code: convert it to safetensors"):
        read_draft_folder(tmp_path, target, TARGET)


def test_a_shard_that_is_cut_is_named(target: Path, tmp_path: Path) -> None:
    write_draft_folder(draft_of(), tmp_path / "draft", "vllm", VERIFIER)
    path = tmp_path / "draft" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable"):
        read_draft_folder(tmp_path / "draft", target, TARGET)


@pytest.mark.parametrize("added", ["README.md", ".gitattributes", "registered_model_meta", "LICENSE", "MLmodel"])
def test_files_that_a_registry_or_hub_adds_do_not_make_a_version_invalid(added: str, tmp_path: Path) -> None:
    draft = draft_of()
    line = write_checkpoint(draft, tmp_path, "ab" * 16).line
    (tmp_path / added).write_text("added")
    read_checkpoint(tmp_path, line)
