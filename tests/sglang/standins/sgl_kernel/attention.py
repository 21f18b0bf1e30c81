"""Attention over the paged cache. Letters: T tokens, S cached tokens, H query and K cache heads, D head size."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def decode_attention_cpu(
    query, k_cache, v_cache, k_scale, v_scale, output, key, value, loc, attn_logits,
    req_to_token, req_pool_indices, seq_lens, sm_scale, logit_cap, is_cross_attn, sliding_window, encoder_lens, sinks,
):  # fmt: skip
    """One new token a request; its key and value enter the cache first."""
    _plain(logit_cap, is_cross_attn, sinks)
    if key is not None:
        k_cache[loc] = key.view(-1, *k_cache.shape[1:])
        v_cache[loc] = value.view(-1, *v_cache.shape[1:])
    for row, (request, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        first = max(0, length - sliding_window) if sliding_window > 0 else 0
        seen = req_to_token[request, first:length].long()
        output[row : row + 1] = _attend(query[row : row + 1], k_cache[seen], v_cache[seen], None, sm_scale)


def extend_attention_cpu(
    q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, k_scale, v_scale,
    req_to_token, req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc, max_len_extend, sm_scale, logit_cap,
    is_cross_attn, sliding_window, encoder_lens, sinks, tree_mask, is_causal,
):  # fmt: skip
    """Several new tokens a request, whose keys and values are in the cache already.

    ``tree_mask`` has the [n, n] masks of all requests end to end: which of its new tokens each of them sees.
    """
    _plain(logit_cap, is_cross_attn, sinks)
    taken = 0
    requests = zip(*(x.tolist() for x in (req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc)), strict=True)
    for request, length, new, start in requests:
        sees = torch.ones(new, length, dtype=torch.bool)
        if tree_mask is not None:
            sees[:, length - new :] = tree_mask[taken : taken + new * new].view(new, new)
            taken += new * new
        elif is_causal:
            sees = sees.tril(length - new)
        if sliding_window > 0:
            sees &= sees.new_ones(new, length).triu(length - new - sliding_window + 1)
        cached, rows = req_to_token[request, :length].long(), slice(start, start + new)
        o_extend[rows] = _attend(q_extend[rows], k_buffer[cached], v_buffer[cached], sees, sm_scale)


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    """[requests * topk, pool_len] the cache places that each drafting branch sees: the request's, then its own."""
    places = req_to_token.new_zeros(len(req_pool_indices) * topk, pool_len)
    for row, (request, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        whole = req_to_token[request]
        for branch in range(topk):
            own = length + branch * num_steps
            seen = torch.cat([whole[:length], whole[own : own + num_steps]])
            places[row * topk + branch, : len(seen)] = seen
    return places


def _attend(query_THD: Tensor, key_SKD: Tensor, value_SKD: Tensor, sees_TS: Tensor | None, scale: float) -> Tensor:
    heads_first = [x.transpose(0, 1).to(query_THD.dtype)[None] for x in (query_THD, key_SKD, value_SKD)]
    mixed = scaled_dot_product_attention(*heads_first, attn_mask=sees_TS, scale=scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _plain(logit_cap: float, is_cross_attn: bool, sinks: Tensor | None) -> None:
    if logit_cap > 0 or is_cross_attn or sinks is not None:
        raise NotImplementedError("the stand-in has no capped logits, cross attention or sinks")
