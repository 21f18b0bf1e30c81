"""What a step of SGLang gave, as tensors of our own on its device.

Letters: R recorded requests, n nodes of a request's draft (0 is the root), k teacher width, F feature width, V
vocabulary, d longest path. Everything here is a fixed amount of work on the current stream: nothing waits for a value,
and nothing that is given back shares memory with the server's buffers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Top(NamedTuple):
    """The target's likeliest tokens, before penalties, masks and temperature."""

    ids: Tensor
    """[.., k] int32, best first."""
    logprobs: Tensor
    """[.., k] float32."""


def likeliest(logits: Tensor, k: int) -> Top:
    """Of [.., V] scores the k best, with their log-probabilities."""
    scores = logits.float()
    best = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return Top(best.indices.int(), best.values - scores.logsumexp(dim=-1, keepdim=True))


def nodes_of(verify_input: Any, logits: Tensor, rows_R: Tensor | None, k: int) -> Top:
    """[R, n, k] the target at every node; to be asked before sampling, which changes the scores where they lie."""
    logits_BnV = logits.view(-1, verify_input.draft_token_num, logits.shape[-1])
    return likeliest(_of(logits_BnV, rows_R), k)


def verified(
    verify_input: Any, batch: Any, hidden: Tensor | None, result: Any, rows_R: Tensor | None, top: Top
) -> dict[str, Tensor]:
    """A verify step: the draft as it was linked, what was accepted, and the states at what was accepted.

    Args:
        verify_input: SGLang's ``EagleVerifyInput``.
        batch: Its ``ScheduleBatch``.
        hidden: [B * n, F] captured states of all nodes; None where they are not wanted.
        result: What ``eagle_sample`` gave.
        rows_R: Of the batch, those that are recorded; None for all.
        top: From ``nodes_of``.
    """
    predict, accept_lens, accept_index = result
    nodes = verify_input.draft_token_num
    linked = verify_input.retrieve_next_token
    accepted_Rd = _of(accept_index, rows_R)
    first_R1 = _of(torch.arange(0, len(linked) * nodes, nodes, device=linked.device), rows_R)[:, None]
    found = {
        "position": _of(batch.seq_lens, rows_R),
        "drafted": _of(verify_input.draft_token.view(-1, nodes), rows_R),
        "first_child": _of(linked, rows_R),
        "next_sibling": _of(verify_input.retrieve_next_sibling, rows_R),
        "said": _of(predict.view(-1, nodes), rows_R),
        "accepted": accepted_Rd - first_R1,
        "count": _of(accept_lens, rows_R),
    }
    found = {name: value.to(torch.int32, copy=True) for name, value in found.items()}
    found |= {"top_ids": top.ids, "top_logprobs": top.logprobs}
    if hidden is not None:
        found["features"] = _bits(hidden[accepted_Rd.clamp(min=0).long()])
    return found


def _of(values: Tensor, rows_R: Tensor | None) -> Tensor:
    return values if rows_R is None else values.index_select(0, rows_R)


def prefilled(
    hidden: Tensor | None, next_tokens: Tensor, top: Top, rows_R: Tensor, spans: list[slice]
) -> dict[str, Tensor]:
    """A piece of some prompts: states of every token, and what the target says after the last.

    Args:
        hidden: [T, F] captured states of all tokens of the batch; None where they are not wanted.
        next_tokens: [B] what was chosen after each piece.
        top: [B, k] at each piece's end.
        rows_R: Of the batch, those that are recorded.
        spans: [R] where their tokens lie in ``hidden``.
    """
    found = {
        "said": next_tokens.index_select(0, rows_R).to(torch.int32, copy=True),
        "top_ids": top.ids.index_select(0, rows_R),
        "top_logprobs": top.logprobs.index_select(0, rows_R),
    }
    if hidden is not None:
        found["features"] = _bits(torch.cat([hidden[span] for span in spans]))
    return found


def _bits(states: Tensor) -> Tensor:
    """bf16 bit patterns, in memory of their own where ``states`` is a fresh tensor."""
    return states.to(torch.bfloat16).view(torch.int16)
