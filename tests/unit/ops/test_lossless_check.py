"""Lossless check: choice of requests, rebuilding, mismatches, and detection of altered tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ops.demo.lossless_check import NEAR_TIE, check_requests, choose_requests, compare_tokens, rebuild_request
from ops.demo.record import Response, Swap

VOCABULARY = 40


def row(
    number: int, position: int, tokens: list[int], bonus: int | None, finish: str | None = "stop"
) -> dict[str, Any]:
    return {
        "request": "r",
        "verify_step": number,
        "position": position,
        "tokens": tokens,
        "bonus": bonus,
        "temperature": 0.0,
        "finish": finish,
    }


WORKED = [row(0, 0, [1, 2, 3], 4), row(1, 3, [4, 5], 6), row(2, 5, [6], 7)]
"""Example of schemas.trace.record: prompt a b c, output D E F G."""


def test_a_request_is_rebuilt_from_its_verify_steps_in_any_order() -> None:
    rebuilt = rebuild_request(WORKED[::-1])
    assert rebuilt is not None
    assert (rebuilt.prompt, rebuilt.output) == ((1, 2, 3), (4, 5, 6, 7))


def test_a_long_prompt_spans_several_rows_of_verify_step_0() -> None:
    rebuilt = rebuild_request([row(0, 0, [1, 2], None), row(0, 2, [3], 4)])
    assert rebuilt is not None
    assert (rebuilt.prompt, rebuilt.output) == ((1, 2, 3), (4,))


def test_a_request_with_a_gap_or_without_its_end_is_not_rebuilt() -> None:
    assert rebuild_request([WORKED[0], WORKED[2]]) is None
    assert rebuild_request([row(0, 0, [1], 2, finish=None)]) is None
    assert rebuild_request([row(0, 0, [1], None)]) is None


def test_only_a_token_other_than_the_targets_choice_is_a_mismatch() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert compare_tokens(logits, [0, 1, 2, 3]).mismatches == 0
    verdict = compare_tokens(logits, [0, 1, 3, 3])
    assert (verdict.mismatches, verdict.near_ties, verdict.first) == (1, 0, 2)


def test_a_token_with_nearly_the_best_logit_is_a_near_tie() -> None:
    logits = np.array([[1.0, 1.0 - NEAR_TIE / 2, 1.0 - NEAR_TIE * 2]], dtype=np.float32)
    assert (compare_tokens(logits, [1]).mismatches, compare_tokens(logits, [1]).near_ties) == (0, 1)
    assert (compare_tokens(logits, [2]).mismatches, compare_tokens(logits, [2]).near_ties) == (1, 0)


def answered(number: int, **changes: Any) -> Response:
    values: dict[str, Any] = {"draft_tokens": 3, "started": float(number), "ended": number + 2.0}
    return Response(id=f"r{number}", domain="math", **(values | changes))


def test_requests_during_a_swap_are_chosen_first_and_others_evenly() -> None:
    requests = [answered(n) for n in range(100)]
    chosen = choose_requests(requests, [Swap("1", 50.5, 4, 1.0)], count=10)
    numbers = [int(request.id[1:]) for request in chosen]
    assert len(set(numbers)) == 10
    assert {49, 50} <= set(numbers)
    assert {0, 99} <= set(numbers)
    assert max(b - a for a, b in zip(sorted(numbers), sorted(numbers)[1:], strict=False)) < 25


def test_failed_requests_and_those_without_a_draft_are_not_chosen() -> None:
    assert not choose_requests([answered(0, error="x"), answered(1, draft_tokens=0)], [])


def test_the_choice_is_at_most_all_requests() -> None:
    assert len(choose_requests([answered(n) for n in range(3)], [Swap("1", 1.5, 1, 1.0)], count=24)) == 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def greedy(target: Path) -> tuple[list[int], str]:
    """Six output tokens for the prompt 1 2 3 from ``transformers.generate``, and their text."""
    model = LlamaForCausalLM.from_pretrained(target)
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 3:]
    text = PreTrainedTokenizerFast.from_pretrained(target).decode(ids, skip_special_tokens=True)
    return ids.tolist(), text


def traces(output: list[int]) -> pa.Table:
    rows = [row(0, 0, [1, 2, 3], output[0]), row(1, 3, output[:3], output[3]), row(2, 6, output[3:5], output[5])]
    return pa.Table.from_pylist(rows)


def test_the_targets_own_output_passes(target: Path, greedy: tuple[list[int], str]) -> None:
    output, text = greedy
    result = check_requests([Response("r", "math", 0, 1, text=text)], traces(output), target, threads=1)
    assert (result.checked, result.tokens, result.mismatches) == (1, 6, 0)


@pytest.mark.parametrize("position", [0, 2, 5])
def test_one_altered_token_anywhere_is_found(target: Path, greedy: tuple[list[int], str], position: int) -> None:
    output = list(greedy[0])
    output[position] = (output[position] + 1) % VOCABULARY
    result = check_requests([Response("r", "math", 0, 1, text="")], traces(output), target, threads=1)
    assert result.mismatches >= 1
    assert any(f"output token {position} " in example for example in result.examples)


def test_a_text_that_differs_from_the_traced_tokens_is_found(target: Path, greedy: tuple[list[int], str]) -> None:
    result = check_requests([Response("r", "math", 0, 1, text=greedy[1] + "x")], traces(greedy[0]), target, threads=1)
    assert result.mismatches == 1


def test_a_request_missing_from_the_table_is_not_counted(target: Path) -> None:
    result = check_requests([Response("other", "math", 0, 1)], traces([4, 5, 6, 7, 8, 9]), target, threads=1)
    assert result.checked == 0
