"""A random Llama, small enough that a test runs hundreds of verify steps a second."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61
EOS = 0


def write_tiny_target(
    folder: Path, *, seed: int = 0, scale: float = 0.35, vocabulary: int = VOCABULARY, hidden: int = 32
) -> Path:
    """Save a model whose weights are fp16 numbers and whose next token depends on more than the last one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, scale)
            parameter.copy_(parameter.half().float())
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder
