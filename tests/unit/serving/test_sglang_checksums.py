"""Checksums equal those of SGLang's server: on a CPU, and on a GPU as its kernel computed them."""

from __future__ import annotations

import pytest
import torch
from version_registry import DRAFTS

from schemas.speculator.layouts import fuse_tensors
from schemas.speculator.network import EagleDraft
from serving.engines.sglang.node import weights

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


def differing(ranks: list[dict[str, str]], draft: EagleDraft) -> set[str]:
    return set(weights.compare_checksums(ranks, weights.ExpectedChecksums(weights.draft_tensors(draft))).names)


@pytest.mark.parametrize("scheme", weights.SCHEMES)
def test_a_draft_is_recognized_in_any_dtype_and_a_changed_tensor_is_named(scheme: weights.ChecksumScheme) -> None:
    expected = weights.ExpectedChecksums(weights.draft_tensors(DRAFTS["1"]))
    reported = {weights.DRAFT + name: value for name, value in expected.compute(scheme).items()}
    assert weights.compare_checksums([reported], expected) == weights.ChecksumDifference((), scheme)
    reported["draft.model.layers.0.mlp.down_proj.weight"] = "0" * 16
    assert differing([reported], DRAFTS["1"]) == {"model.layers.0.mlp.down_proj.weight"}
    assert "model.fc.weight" in differing([reported], DRAFTS["2"])


def test_only_replicated_tensors_of_several_ranks_are_compared() -> None:
    expected = weights.ExpectedChecksums(weights.draft_tensors(DRAFTS["1"])).compute(weights.SCHEMES[0])
    sharded = {
        weights.DRAFT + name: value if weights.is_replicated(name) else "shard" for name, value in expected.items()
    }
    assert differing([sharded, sharded], DRAFTS["1"]) == set()
    assert differing([sharded, sharded | {"draft.model.fc.weight": "old"}], DRAFTS["1"]) == {"model.fc.weight"}


def test_a_server_without_ranks_differs() -> None:
    assert weights.compare_checksums([], weights.ExpectedChecksums(weights.draft_tensors(DRAFTS["1"]))).names
