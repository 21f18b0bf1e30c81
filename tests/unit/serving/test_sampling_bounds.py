"""Sampling parameters at their bounds and beyond: every rejection names its parameter, and the engine survives."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from api_node import Node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_requests import INVALID, VALID, check_answer, random_request, running_tiny_node

assert INVALID.keys() == VALID.keys()
DRAFTERS = {
    "tree": {"serve__drafter": "eagle", "serve__draft_tree_width": 3},
    "suffix": {"serve__drafter": "suffix"},
    "hybrid": {"serve__drafter": "hybrid", "serve__draft_tree_width": 2},
}


@pytest.fixture(scope="module", params=DRAFTERS)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running_tiny_node(tmp_path_factory.mktemp("target"), **DRAFTERS[request.param]) as node:
        yield node


@pytest.mark.parametrize("name", VALID)
def test_each_value_beyond_a_bound_is_rejected_by_its_parameter_and_each_value_within_is_served(
    node: Node, name: str
) -> None:
    others = {"prompt": [1], "max_tokens": 2, "temperature": 1}
    for value in VALID[name]:
        check_answer(node, others | {name: value}, set())
    for value in INVALID[name]:
        check_answer(node, others | {name: value}, {name})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random=st.randoms(use_true_random=False))
def test_no_combination_ends_the_engine_or_hangs(node: Node, random: Random) -> None:
    check_answer(node, *random_request(random))
