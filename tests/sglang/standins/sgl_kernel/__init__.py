"""Stand-ins, in plain PyTorch, for the CPU operators that SGLang 0.5.21 to 0.5.23 call while it decodes with EAGLE-3.

The real ones are compiled from SGLang's sources and are on no package index. What each must do was read from the Triton
kernel that does it on a GPU (``sglang/kernels/ops``) and from the place that calls it. They follow signatures that are
private to these versions, and are slow: what runs on them shows the server's control path, and nothing about its
kernels or its speed.
"""

import torch

from sgl_kernel.attention import build_draft_decode_metadata_cpu, decode_attention_cpu, extend_attention_cpu
from sgl_kernel.cache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
)
from sgl_kernel.tree import (
    build_tree_kernel_efficient_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "decode_attention_cpu",
    "extend_attention_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]

for _operator in (decode_attention_cpu, extend_attention_cpu):  # these two are looked up as compiled operators
    setattr(torch.ops.sgl_kernel, _operator.__name__, _operator)

if not torch.cuda.is_available():
    # A sum over weights asks for the GPU by name, whatever the server runs on.
    torch.cuda.synchronize = lambda *_: None
