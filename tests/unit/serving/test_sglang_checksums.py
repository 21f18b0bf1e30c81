"""Sums are those that SGLang's server says: of known tensors on a CPU and, as its kernel gave them, on a GPU."""

from __future__ import annotations

import pytest
import torch
from version_registry import DRAFTS

from schemas.speculator.network import EagleDraft
from serving.engines.sglang.node import weights

# What the mixing of SGLang 0.5.21's kernel gave for such bytes on an H200.
ON_A_GPU = {
    4: "70ac04b21c46fd41",
    1000: "e042c0fd70ae9e36",
    32768: "d13c37d75d6938a3",
    32772: "da5af1ff27b2993e",
    98312: "4a31f2a3e14242ef",
    65536008: "7c33357c1d8e4ce6",
}


@pytest.mark.parametrize(("length", "told"), ON_A_GPU.items())
def test_on_a_gpu_a_sum_is_what_its_kernel_gives(length: int, told: str) -> None:
    assert weights.checksum_gpu((torch.arange(length) * 2654435761 % 251).byte()) == told


def test_bytes_that_fill_no_word_are_filled_up_and_nothing_is_zero() -> None:
    assert weights.checksum_gpu(torch.tensor([1, 2, 3]).byte()) == weights.checksum_gpu(
        torch.tensor([1, 2, 3, 0]).byte()
    )
    assert weights.checksum_gpu(torch.empty(0)) == "0" * 16


def test_on_a_cpu_a_sum_is_the_start_of_a_sha_256() -> None:
    assert weights.checksum_cpu(torch.tensor([97, 98, 99]).byte()) == "ba7816bf8f01cfea"


def test_a_server_joins_what_it_computes_together_and_leaves_out_what_it_has_read_once() -> None:
    draft, held = DRAFTS["1"], weights.server_tensors(weights.draft_tensors(DRAFTS["1"]))
    assert not [name for name in held if "d2t" in name or "t2d" in name or "midlayer" in name]
    attention = draft.midlayer.self_attn
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).bfloat16()
    assert held["model.layers.0.self_attn.qkv_proj.weight"].equal(fused)
    assert held["lm_head.weight"].equal(draft.lm_head.weight.bfloat16())


def differing(ranks: list[dict[str, str]], draft: EagleDraft) -> set[str]:
    return set(weights.compare_checksums(ranks, weights.ExpectedChecksums(weights.draft_tensors(draft))).names)


@pytest.mark.parametrize("scheme", weights.SCHEMES)
def test_a_draft_is_known_in_any_type_and_a_changed_tensor_is_named(scheme: weights.ChecksumScheme) -> None:
    expected = weights.ExpectedChecksums(weights.draft_tensors(DRAFTS["1"]))
    told = {weights.DRAFT + name: value for name, value in expected.compute(scheme).items()}
    assert weights.compare_checksums([told], expected) == weights.ChecksumDifference((), scheme)
    told["draft.model.layers.0.mlp.down_proj.weight"] = "0" * 16
    assert differing([told], DRAFTS["1"]) == {"model.layers.0.mlp.down_proj.weight"}
    assert "model.fc.weight" in differing([told], DRAFTS["2"])


def test_of_several_ranks_what_is_whole_on_each_is_compared() -> None:
    expected = weights.ExpectedChecksums(weights.draft_tensors(DRAFTS["1"])).compute(weights.SCHEMES[0])
    cut = {weights.DRAFT + name: value if weights.is_replicated(name) else "cut" for name, value in expected.items()}
    assert differing([cut, cut], DRAFTS["1"]) == set()
    assert differing([cut, cut | {"draft.model.fc.weight": "old"}], DRAFTS["1"]) == {"model.fc.weight"}


def test_a_server_that_says_nothing_holds_nothing() -> None:
    assert weights.compare_checksums([], weights.ExpectedChecksums(weights.draft_tensors(DRAFTS["1"]))).names
