"""Checksums equal those of SGLang's server: on a CPU, and on a GPU as its kernel computed them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_draft import SHAPE
from version_registry import DRAFTS

from schemas.speculator.layouts import Shard, fuse_tensors
from schemas.speculator.network import EagleDraft, random_draft
from serving.engines.sglang.node import weights
from serving.engines.sglang.node.weights import ExpectedChecksums, RankChecksums

# Results of the kernel of SGLang 0.5.21 for these bytes on an H200.
GPU_CHECKSUMS = {
    4: "70ac04b21c46fd41",
    1000: "e042c0fd70ae9e36",
    32768: "d13c37d75d6938a3",
    32772: "da5af1ff27b2993e",
    98312: "4a31f2a3e14242ef",
    65536008: "7c33357c1d8e4ce6",
}


@pytest.mark.parametrize(("length", "checksum"), GPU_CHECKSUMS.items())
def test_gpu_checksums_equal_the_kernels(length: int, checksum: str) -> None:
    assert weights.checksum_gpu((torch.arange(length) * 2654435761 % 251).byte()) == checksum


def test_incomplete_words_are_padded_and_an_empty_tensor_is_zero() -> None:
    assert weights.checksum_gpu(torch.tensor([1, 2, 3]).byte()) == weights.checksum_gpu(
        torch.tensor([1, 2, 3, 0]).byte()
    )
    assert weights.checksum_gpu(torch.empty(0)) == "0" * 16


def test_a_cpu_checksum_is_the_start_of_a_sha_256() -> None:
    assert weights.checksum_cpu(torch.tensor([97, 98, 99]).byte()) == "ba7816bf8f01cfea"


def test_server_tensors_are_fused_and_omit_the_line_tensors() -> None:
    draft, tensors = DRAFTS["1"], fuse_tensors(weights.draft_tensors(DRAFTS["1"]))
    assert not [name for name in tensors if "d2t" in name or "t2d" in name or "midlayer" in name]
    attention = draft.midlayer.self_attn
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).bfloat16()
    assert tensors["model.layers.0.self_attn.qkv_proj.weight"].equal(fused)
    assert tensors["lm_head.weight"].equal(draft.lm_head.weight.bfloat16())


def expected_of(draft: EagleDraft) -> ExpectedChecksums:
    return ExpectedChecksums(weights.draft_tensors(draft), draft.shape.num_key_value_heads)


def reported_by(draft: EagleDraft, ranks: int = 1, scheme: weights.ChecksumScheme = weights.SCHEMES[0]) -> list[Any]:
    """Return the checksums of a server with so many ranks that holds a draft."""
    shards = [Shard(rank, ranks) for rank in range(ranks)]
    found = [expected_of(draft).compute(scheme, shard) for shard in shards]
    return [
        RankChecksums({weights.DRAFT + name: value for name, value in checksums.items()}, shard)
        for checksums, shard in zip(found, shards, strict=True)
    ]


def differing(ranks: list[Any], draft: EagleDraft) -> set[str]:
    return set(weights.compare_checksums(ranks, expected_of(draft)).names)


@pytest.mark.parametrize("scheme", weights.SCHEMES)
def test_a_draft_is_recognized_in_any_dtype_and_a_changed_tensor_is_named(scheme: weights.ChecksumScheme) -> None:
    (reported,) = reported_by(DRAFTS["1"], scheme=scheme)
    assert weights.compare_checksums([reported], expected_of(DRAFTS["1"])) == weights.ChecksumDifference((), scheme)
    down = "model.layers.0.mlp.down_proj.weight"
    changed = replace(reported, checksums={**reported.checksums, weights.DRAFT + down: "0" * 16})
    assert differing([changed], DRAFTS["1"]) == {down}
    assert "model.fc.weight" in differing([changed], DRAFTS["2"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_is_compared_with_its_part(ranks: int) -> None:
    draft, layer = random_draft(SHAPE, seed=5), "model.layers.0"
    torch.nn.init.normal_(draft.midlayer.self_attn.o_proj.weight)
    reported = reported_by(draft, ranks)
    assert differing(reported, draft) == set()
    exchanged = [replace(rank, shard=other.shard) for rank, other in zip(reported, reversed(reported), strict=True)]
    assert differing(exchanged, draft) == {
        "lm_head.weight",
        *(f"{layer}.self_attn.{name}.weight" for name in ("qkv_proj", "o_proj")),
        *(f"{layer}.mlp.{name}.weight" for name in ("gate_up_proj", "down_proj")),
    }
    qkv = f"{layer}.self_attn.qkv_proj.weight"
    last = replace(reported[-1], checksums={**reported[-1].checksums, weights.DRAFT + qkv: "0" * 16})
    assert differing([*reported[:-1], last], draft) == {qkv}


def test_a_number_of_ranks_that_cannot_hold_the_draft_is_named() -> None:
    rank = RankChecksums({}, Shard(0, 5))
    with pytest.raises(ValueError, match="cannot be divided by 5 ranks"):
        weights.compare_checksums([rank], expected_of(DRAFTS["1"]))


def test_a_server_without_ranks_differs() -> None:
    assert weights.compare_checksums([], expected_of(DRAFTS["1"])).names
