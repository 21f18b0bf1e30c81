"""The decoders equal Hugging Face's own models for every supported architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    ArceeConfig,
    AttentionInterface,
    Gemma2Config,
    GemmaConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from schemas.speculator.checkpoint import CheckpointError
from serving.engines.builtin.decoder import (
    ARCHITECTURES,
    ATTENTION,
    Decoder,
    FusedDecoder,
    TransformersDecoder,
    build_decoder,
)
from serving.engines.builtin.kv_cache import KVCache, RaggedBatch, Segment, TreeLayout

LAYERS, VOCABULARY, POSITIONS, CAPTURE = 4, 97, 48, (0, 1, 2)

Build = Callable[..., PreTrainedConfig]

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def build(config: Build, **more: Any) -> Any:
    """A tiny model with weights far from zero, so that an error changes its output."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **more,
    }
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config(**sizes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.requires_grad_(requires_grad=False)


def served(model: Any) -> tuple[Decoder, KVCache]:
    model.set_attn_implementation(ATTENTION)
    decoder = build_decoder(model, "float32", CAPTURE, POSITIONS)
    return decoder, KVCache(LAYERS, 3, 2, POSITIONS, 8)


@pytest.mark.parametrize(
    ("config", "more", "kind"),
    [
        (LlamaConfig, {}, FusedDecoder),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}, FusedDecoder),
        (MistralConfig, {"sliding_window": None}, FusedDecoder),
        (Qwen2Config, {}, FusedDecoder),
        (Qwen3Config, {}, FusedDecoder),
        (ArceeConfig, {}, TransformersDecoder),
        (GemmaConfig, {}, TransformersDecoder),
        (Glm4Config, {}, TransformersDecoder),
        (MistralConfig, {"sliding_window": POSITIONS}, TransformersDecoder),
        (MixtralConfig, {"num_local_experts": 4}, TransformersDecoder),
        (Olmo2Config, {}, TransformersDecoder),
        (Olmo3Config, {}, TransformersDecoder),
        (Phi3Config, {}, TransformersDecoder),
        (Qwen2MoeConfig, EXPERTS | {"shared_expert_intermediate_size": 24}, TransformersDecoder),
        (Qwen3MoeConfig, EXPERTS, TransformersDecoder),
        (SeedOssConfig, {}, TransformersDecoder),
        (SmolLM3Config, {}, TransformersDecoder),
    ],
)
def test_hidden_states_equal_those_of_the_model_itself(
    config: Build, more: dict[str, Any], kind: type[Decoder]
) -> None:
    model = build(config, **more)
    tokens_T = torch.randint(1, VOCABULARY, (20,), generator=torch.Generator().manual_seed(1))
    assert type(model).__name__ in ARCHITECTURES
    output = model(tokens_T[None], output_hidden_states=True)
    truth = output.hidden_states
    decoder, cache = served(model)
    assert isinstance(decoder, kind)
    first = decoder(tokens_T[:13], RaggedBatch([Segment(1, 0, 13)]), cache)
    rest = decoder(tokens_T[13:], RaggedBatch([Segment(1, 13, 7)]), cache)
    features_TF = torch.cat([first.features_TF, rest.features_TF])
    expected_TF = torch.cat([truth[layer + 1][0] for layer in CAPTURE], dim=-1)
    torch.testing.assert_close(features_TF, expected_TF, rtol=1e-4, atol=1e-4)
    last_TH = torch.cat([first.last_TH, rest.last_TH])
    torch.testing.assert_close(last_TH, truth[-1][0], rtol=1e-4, atol=1e-4)
    logits_TV = model.get_output_embeddings()(last_TH)
    torch.testing.assert_close(logits_TV, output.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [LlamaConfig, Olmo2Config])
def test_hidden_states_of_a_tree_equal_those_of_its_branches_alone(config: Build) -> None:
    parents = (-1, 0, -1, 1, 1, 2)
    branches = [(0, 1, 3), (0, 1, 4), (2, 5)]
    generator = torch.Generator().manual_seed(2)
    prefix, root, nodes = (torch.randint(1, VOCABULARY, (n,), generator=generator) for n in (9, 1, len(parents)))
    decoder, cache = served(build(config))
    decoder(prefix, RaggedBatch([Segment(0, 0, 9)]), cache)
    sees = torch.zeros(7, 7, dtype=torch.bool)
    sees[:, 0] = True
    for branch in branches:
        for depth, node in enumerate(branch):
            sees[1 + node, [1 + ancestor for ancestor in branch[: depth + 1]]] = True
    positions = (9, 10, 11, 10, 12, 12, 11)
    tree = Segment(0, 9, 7, TreeLayout(9, sees.numpy(), positions))
    other = Segment(2, 0, 9)
    found = decoder(torch.cat([root, nodes, prefix]), RaggedBatch([tree, other]), cache).last_TH
    for branch in branches:
        alone = torch.cat([root, nodes[list(branch)]])
        decoder(prefix, RaggedBatch([Segment(1, 0, 9)]), cache)
        expected = decoder(alone, RaggedBatch([Segment(1, 9, len(alone))]), cache).last_TH
        rows = [0, *(1 + node for node in branch)]
        torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-4)


def test_decoding_continues_after_an_accepted_path() -> None:
    generator = torch.Generator().manual_seed(4)
    prefix, root, nodes, after = (torch.randint(1, VOCABULARY, (n,), generator=generator) for n in (5, 1, 4, 3))
    decoder, cache = served(build(LlamaConfig))
    decoder(prefix, RaggedBatch([Segment(0, 0, 5)]), cache)
    # Nodes 1 and 3 are children of nodes 0 and 2; the target accepts the path 2, 3.
    sees = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    tree = Segment(0, 5, 5, TreeLayout(5, sees.numpy(), (5, 6, 7, 6, 7)))
    decoder(torch.cat([root, nodes]), RaggedBatch([tree]), cache)
    cache.keep_path(0, 6, (2, 3))
    found = decoder(after, RaggedBatch([Segment(0, 8, 3)]), cache).last_TH
    whole = torch.cat([prefix, root, nodes[[2, 3]], after])
    expected = decoder(whole, RaggedBatch([Segment(1, 0, len(whole))]), cache).last_TH[-3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_unsupported_attention_is_rejected() -> None:
    assert ATTENTION in AttentionInterface().valid_keys()
    decoder, cache = served(build(Gemma2Config))
    with pytest.raises(CheckpointError, match=r"target\.path"):
        decoder(torch.tensor([1, 2]), RaggedBatch([Segment(0, 0, 2)]), cache)
