"""The vendored prompts: their number, and the split into training and held-out prompts."""

from __future__ import annotations

import json

import pytest

from ops.bench import prompts
from ops.bench.prompts import SAMPLED, training_requests
from schemas.errors import UserError


@pytest.mark.parametrize("domain", prompts.ALL_DOMAINS)
def test_the_prompts_of_a_domain_are_many_short_and_distinct(domain: str) -> None:
    texts = prompts.read_prompts(domain)
    least, longest = (200, 1000) if domain in prompts.REPETITIVE else (400, 400)
    assert len(texts) >= least
    assert len(set(texts)) == len(texts)
    assert all(10 < len(text) < longest for text in texts)


def test_every_edit_is_of_another_function() -> None:
    sources = [text.partition("```python\n")[2] for text in prompts.read_prompts("edits")]
    assert all(source.startswith("def ") and source.endswith("```") for source in sources)
    assert len(set(sources)) == len(sources)


def test_every_tool_prompt_begins_with_the_functions_to_call() -> None:
    for text in prompts.read_prompts("tools"):
        function = json.loads(text.partition("\n")[0])
        assert {"name", "description", "parameters"} <= set(function)


@pytest.mark.parametrize("domain", prompts.ALL_DOMAINS)
def test_no_held_out_prompt_is_trained_on(domain: str) -> None:
    training, held_out = prompts.training_prompts(domain), prompts.held_out_prompts(domain)
    assert len(held_out) == prompts.HELD_OUT
    assert not set(training) & set(held_out)


def test_an_unknown_domain_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="--domain poems: there are prompts of code, math, sql, chat, edits, tools"):
        prompts.held_out_prompts("poems")


def test_prompts_are_sent_greedily_first_and_sampled_afterwards() -> None:
    ids = [(3, 7, 11, 13), (5, 2, 9), (8, 8, 21, 4, 6)]
    requests = training_requests("math", ids, 7, max_tokens=12)
    assert [request.prompt for request in requests] == [*ids, *ids, ids[0]]
    assert [request.temperature for request in requests] == [0.0] * 3 + [SAMPLED] * 4
    assert len({request.seed for request in requests}) == 7
    assert len({request.id for request in requests}) == 7
