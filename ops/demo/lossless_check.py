"""Compare served tokens with greedy decoding by the target alone.

The check rebuilds finished greedy requests from the table ``traces`` and runs the target on them with plain
transformers in fp32, without code of this project. One forward over prompt and output returns at every position the
token that the target chooses after the tokens before it. If that is the served token at every position, then by
induction greedy decoding with the target alone produces the whole output.

fp32 sums differ in their last bits with the number of rows in a matrix product, so two tokens with nearly equal logits
can change places. A served token whose logit is within ``NEAR_TIE`` of the best one counts as a near tie, not as a
mismatch. The result reports both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ops.demo.record import LosslessResult, Swap
from ops.loadgen.load import Response

if TYPE_CHECKING:
    import pyarrow as pa

NEAR_TIE = 1e-3
DEFAULT_COUNT = 24
COLUMNS = ("request", "verify_step", "position", "tokens", "bonus", "temperature", "finish")


@dataclass(frozen=True, slots=True)
class RebuiltRequest:
    """Tokens of a request from its traces."""

    request: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """Comparison of one output with the target's choices."""

    mismatches: int
    near_ties: int
    first: int | None = None
    """Output position of the first mismatch."""


def choose_requests(requests: Sequence[Response], swaps: Sequence[Swap], count: int = DEFAULT_COUNT) -> list[Response]:
    """Return drafted requests to check: up to half that ran during a swap, then an even selection of the others."""
    drafted = [request for request in requests if request.error is None and request.draft_tokens]
    during_swap = [r for r in drafted if any(r.started < swap.time < r.ended for swap in swaps)]
    chosen = _select_evenly(during_swap, count // 2)
    rest = [request for request in drafted if request not in chosen]
    return [*chosen, *_select_evenly(rest, count - len(chosen))]


def rebuild_request(rows: Sequence[Mapping[str, Any]]) -> RebuiltRequest | None:
    """Prompt and answer of one request from its verify steps; None while its end is missing.

    ``tokens`` of all verify steps one after the other, then the last bonus, are the whole request; those of verify
    step 0 are its
    prompt.
    """
    ordered = sorted(rows, key=lambda row: (row["verify_step"], row["position"]))
    whole = [token for row in ordered for token in row["tokens"]]
    gaps = sum(len(row["tokens"]) for row in ordered) != ordered[-1]["position"] + len(ordered[-1]["tokens"])
    if gaps or ordered[-1]["finish"] is None or ordered[-1]["bonus"] is None:
        return None
    prompt = sum(len(row["tokens"]) for row in ordered if row["verify_step"] == 0)
    return RebuiltRequest(ordered[0]["request"], tuple(whole[:prompt]), (*whole[prompt:], ordered[-1]["bonus"]))


def compare_tokens(logits: npt.NDArray[np.float32], served: Sequence[int]) -> TokenComparison:
    """Compare the served tokens with the target's logits [len(served), V] at their positions."""
    best = logits.max(axis=1)
    behind = best - logits[np.arange(len(served)), list(served)]
    wrong = np.flatnonzero(behind > NEAR_TIE)
    ties = np.count_nonzero((behind <= NEAR_TIE) & (logits.argmax(axis=1) != np.asarray(served)))
    return TokenComparison(len(wrong), int(ties), int(wrong[0]) if len(wrong) else None)


def check_requests(chosen: Sequence[Response], traces: pa.Table, target: Path, threads: int) -> LosslessResult:
    """Decode the chosen requests again and compare tokens and text.

    The text that the client received is compared with the text of the rebuilt tokens. ``checked`` excludes requests
    that are incomplete in the table.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    checked = tokens = mismatches = ties = 0
    examples: list[str] = []
    for response, rows in _group_rows(chosen, traces):
        rebuilt = rebuild_request(rows) if rows else None
        if rebuilt is None:
            continue
        ids = torch.tensor([[*rebuilt.prompt, *rebuilt.output[:-1]]])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=len(rebuilt.output)).logits[0]
        compared = compare_tokens(logits.numpy(), rebuilt.output)
        text = tokenizer.decode(rebuilt.output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        checked, tokens = checked + 1, tokens + len(rebuilt.output)
        mismatches, ties = mismatches + compared.mismatches, ties + compared.near_ties
        if compared.first is not None:
            examples.append(f"{response.id}: output token {compared.first} is not the target's choice")
        if text != response.text:
            mismatches += 1
            examples.append(f"{response.id}: the received text differs from that of the traced tokens")
    return LosslessResult(checked, tokens, mismatches, ties, tuple(examples[:10]))


def _group_rows(chosen: Sequence[Response], traces: pa.Table) -> list[tuple[Response, list[dict[str, Any]]]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pc.is_in(traces["request"], value_set=pa.array([response.id for response in chosen], pa.string()))
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in traces.filter(wanted).to_pylist():
        rows.setdefault(row["request"], []).append(row)
    return [(response, rows.get(response.id, [])) for response in chosen]


def _select_evenly(requests: Sequence[Response], count: int) -> list[Response]:
    """Return ``count`` requests at even distances, including the first and the last."""
    if len(requests) <= count or count < 2:
        return list(requests[:count])
    return [requests[round(i * (len(requests) - 1) / (count - 1))] for i in range(count)]
