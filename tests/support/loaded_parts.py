"""Compares the parts of tensors that we expect of a rank with those that a server's own layers load.

Run it with the server's Python: ``python loaded_parts.py vllm|sglang``. The layers are the server's; only the rank is
given. No process group is needed, because nothing is computed.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from schemas.speculator.layouts import Shard, fuse_tensors, shard_tensors

HEADS, KEY_HEADS, WIDTH, INNER, HIDDEN, VOCABULARY = 8, 2, 4, 24, 12, 70
LAYER, THEIRS = "midlayer", "model.layers.0"
SHAPES = {
    "self_attn.q_proj": (HEADS * WIDTH, 2 * HIDDEN),
    "self_attn.k_proj": (KEY_HEADS * WIDTH, 2 * HIDDEN),
    "self_attn.v_proj": (KEY_HEADS * WIDTH, 2 * HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def load(package: str, shard: Shard, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return what the server's layers of one rank hold, by the server's names."""
    linear, vocabulary = (import_module(f"{package}.{name}") for name in ("linear", "vocab_parallel_embedding"))
    qkv = linear.QKVParallelLinear(2 * HIDDEN, WIDTH, HEADS, KEY_HEADS, bias=False)
    gate_up = linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False)
    output = linear.RowParallelLinear(HEADS * WIDTH, HIDDEN, bias=False)
    down = linear.RowParallelLinear(INNER, HIDDEN, bias=False)
    head = vocabulary.ParallelLMHead(VOCABULARY, HIDDEN)

    def read(layer: Any, name: str, *part: Any) -> None:
        layer.weight.weight_loader(layer.weight, tensors[name], *part)

    for part in "qkv":
        read(qkv, f"{LAYER}.self_attn.{part}_proj.weight", part)
    for number, part in enumerate(("gate", "up")):
        read(gate_up, f"{LAYER}.mlp.{part}_proj.weight", number)
    read(output, f"{LAYER}.self_attn.o_proj.weight")
    read(down, f"{LAYER}.mlp.down_proj.weight")
    read(head, "lm_head.weight")
    layers = {"self_attn.qkv_proj": qkv, "mlp.gate_up_proj": gate_up, "self_attn.o_proj": output, "mlp.down_proj": down}
    held = {f"{THEIRS}.{name}.weight": layer.weight for name, layer in layers.items()}
    return held | {"lm_head.weight": head.weight}


def place(undo: ExitStack, server: str, shard: Shard) -> str:
    """Let the server's layers see one rank; return their package."""
    if server == "vllm":
        from vllm.config import VllmConfig, set_current_vllm_config

        undo.enter_context(set_current_vllm_config(VllmConfig()))
        package = "vllm.model_executor"
        for module in ("layers.linear", "layers.vocab_parallel_embedding", "parameter"):
            for name, value in (("rank", shard.rank), ("world_size", shard.ranks)):
                target = f"{package}.{module}.get_tensor_model_parallel_{name}"
                undo.enter_context(patch(target, lambda value=value: value))
        return f"{package}.layers"
    group = SimpleNamespace(rank_in_group=shard.rank, world_size=shard.ranks)
    parallel = SimpleNamespace(tp_rank=shard.rank, tp_size=shard.ranks, tp_group=group)
    for module in ("linear", "vocab_parallel_embedding"):
        undo.enter_context(patch(f"sglang.srt.layers.{module}.get_parallel", lambda: parallel))
    return "sglang.srt.layers"


def main(server: str) -> None:
    torch.manual_seed(0)
    tensors = {f"{LAYER}.{name}.weight": torch.rand(shape) for name, shape in SHAPES.items()}
    tensors["lm_head.weight"] = torch.rand(VOCABULARY, HIDDEN)
    for ranks in (1, 2, 4, 8):
        for rank in range(ranks):
            shard = Shard(rank, ranks)
            with ExitStack() as undo:
                held = load(place(undo, server, shard), shard, tensors)
            expected = fuse_tensors(shard_tensors(tensors, KEY_HEADS, shard))
            wrong = [name for name, value in held.items() if not value.data.equal(expected[name])]
            assert not wrong, f"{shard}: {wrong}"
            assert held.keys() == expected.keys()
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
