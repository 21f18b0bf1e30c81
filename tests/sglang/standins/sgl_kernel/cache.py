"""Book-keeping of the paged cache: ``req_to_token[r, i]`` is the place of token i of request r."""

import ctypes

import torch


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write new places, of all requests end to end, into the table."""
    taken = 0
    for request, start, end in _spans(req_pool_indices, start_offset, end_offset):
        req_to_token[request, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Read places out of the table, of all requests end to end."""
    taken = 0
    for request, start, end in _spans(req_pool_indices, start_offset, end_offset):
        out_cache_loc[taken : taken + end - start] = req_to_token[request, start:end].to(out_cache_loc.dtype)
        taken += end - start


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """Read the places after each request's tokens: those that its drafted branches write to."""
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    """The places of accepted nodes, moved to the front."""
    accepted = accept_index[accept_index >= 0].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Copy cache entries from place to place in every layer's buffer; a place may be both source and goal."""
    for pointer, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        read = [ctypes.string_at(pointer + place * size, size) for place in src_loc.tolist()]
        for place, entry in zip(tgt_loc.tolist(), read, strict=True):
            ctypes.memmove(pointer + place * size, entry, size)


def _spans(*columns: torch.Tensor):
    return zip(*(column.tolist() for column in columns), strict=True)
