"""Was every served token the one that the target alone would have chosen?

Finished greedy requests are rebuilt from the ``traces`` table and decoded again by the target alone: plain
transformers in fp32, no code of ours. One forward pass over prompt and answer gives, at every position, the token that
the target would choose after exactly the tokens before it. If that is the served token at every position of the
answer, then by induction greedy decoding by the target alone gives the whole answer: its first token is the same, and
after the same tokens the next one is the same.

fp32 sums differ in their last bits with the number of rows in a matrix product, so two tokens with all but the same
logit can change places. A served token whose logit is within ``NEAR`` of the best one counts as a near tie, not as a
mismatch; both are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ops.demo.record import Answered, Lossless, Swap

if TYPE_CHECKING:
    import pyarrow as pa

NEAR = 1e-3
CHECKED = 24
COLUMNS = ("request", "verify_step", "position", "tokens", "bonus", "temperature", "finish")


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A request as the traces tell it."""

    request: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the served tokens of one answer compare with the target's choices."""

    mismatches: int
    near_ties: int
    first: int | None = None
    """Position in the answer of the first mismatch."""


def choose(requests: Sequence[Answered], swaps: Sequence[Swap], count: int = CHECKED) -> list[Answered]:
    """Requests to check: those that ran through a swap first, up to half, then the others spread evenly."""
    drafted = [
        request for request in requests if request.error is None and request.verify_steps and request.speculators
    ]
    through = [r for r in drafted if any(r.started < swap.time < r.ended for swap in swaps)]
    chosen = _spread(through, count // 2)
    rest = [request for request in drafted if request not in chosen]
    return [*chosen, *_spread(rest, count - len(chosen))]


def rebuild(rows: Sequence[Mapping[str, Any]]) -> Rebuilt | None:
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
    return Rebuilt(ordered[0]["request"], tuple(whole[:prompt]), (*whole[prompt:], ordered[-1]["bonus"]))


def judge(logits: npt.NDArray[np.float32], served: Sequence[int]) -> Verdict:
    """Compare the served tokens with the target's logits [len(served), V] at their positions."""
    best = logits.max(axis=1)
    behind = best - logits[np.arange(len(served)), list(served)]
    wrong = np.flatnonzero(behind > NEAR)
    ties = np.count_nonzero((behind <= NEAR) & (logits.argmax(axis=1) != np.asarray(served)))
    return Verdict(len(wrong), int(ties), int(wrong[0]) if len(wrong) else None)


def check(chosen: Sequence[Answered], traces: pa.Table, target: Path, threads: int) -> Lossless:
    """Decode the chosen requests again and compare.

    Besides the tokens, the text that the client received is compared with the rebuilt tokens' text. Requests that the
    table does not hold whole are left out of ``checked``.
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
    for answered, rows in _grouped(chosen, traces):
        rebuilt = rebuild(rows) if rows else None
        if rebuilt is None:
            continue
        ids = torch.tensor([[*rebuilt.prompt, *rebuilt.output[:-1]]])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=len(rebuilt.output)).logits[0]
        verdict = judge(logits.numpy(), rebuilt.output)
        told = tokenizer.decode(rebuilt.output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        checked, tokens = checked + 1, tokens + len(rebuilt.output)
        mismatches, ties = mismatches + verdict.mismatches, ties + verdict.near_ties
        if verdict.first is not None:
            examples.append(f"{answered.id}: answer token {verdict.first} is not the target's choice")
        if told != answered.text:
            mismatches += 1
            examples.append(f"{answered.id}: the text received is not that of the traced tokens")
    return Lossless(checked, tokens, mismatches, ties, tuple(examples[:10]))


def _grouped(chosen: Sequence[Answered], traces: pa.Table) -> list[tuple[Answered, list[dict[str, Any]]]]:
    import pyarrow.compute as pc

    wanted = pc.is_in(traces["request"], value_set=_strings([answered.id for answered in chosen]))
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in traces.filter(wanted).to_pylist():
        rows.setdefault(row["request"], []).append(row)
    return [(answered, rows.get(answered.id, [])) for answered in chosen]


def _strings(values: list[str]) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.string())


def _spread(requests: Sequence[Answered], count: int) -> list[Answered]:
    """``count`` of them at even distances, the first and the last included."""
    if len(requests) <= count or count < 2:
        return list(requests[:count])
    return [requests[round(i * (len(requests) - 1) / (count - 1))] for i in range(count)]
