"""Trace records of a server's steps: links, accepted paths, and the end of a request."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from schemas.trace.decoder import decode
from schemas.trace.record import ROOT, Chunk, Envelope, VerifyStep, encode
from serving.engines.plugin.verify_steps import (
    ActiveSpeculator,
    OutputLimit,
    PrefillOutput,
    StepTimes,
    VerifyOutput,
    build_prefill,
    build_verify_step,
    cut_at_end,
    find_end,
    new_tokens,
)

TIMES = StepTimes(draft_us=3, verify_us=5, time_us=7)
F, K = 6, 2


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def verified(**changed: object) -> VerifyOutput:
    """Root 10 with children 11 and 12; 12 with child 13; 12 and 13 are accepted."""
    found = VerifyOutput(
        position=4,
        draft_tokens=ints(10, 11, 12, 13),
        first_child=ints(1, -1, 3, -1),
        next_sibling=ints(-1, 2, -1, -1),
        accepted=[0, 2, 3],
        chosen=ints(12, 0, 13, 99),
        features=np.arange(3 * F, dtype=np.uint16).reshape(3, F),
        top_ids=np.arange(4 * K, dtype=np.int32).reshape(4, K),
        top_logprobs=-np.arange(4 * K, dtype=np.float32).reshape(4, K),
    )
    return replace(found, **changed)  # type: ignore[arg-type]


def verify_step_of(**changed: object) -> VerifyStep:
    return build_verify_step(verified(**changed), 1, ActiveSpeculator("7", 2), TIMES)


def test_links_become_parents_and_the_path_becomes_tokens() -> None:
    r = verify_step_of()
    assert (r.draft_tokens, r.draft_parents) == ((11, 12, 13), (ROOT, ROOT, 1))
    assert (r.tokens, r.accepted, r.bonus) == ((10, 12, 13), (1, 2), 99)
    assert (len(r.features), r.top_ids.shape, r.speculator) == (3, (4, K), "7")
    assert (r.draft_us, r.verify_us, r.time_us, r.active_since_us) == (3, 5, 7, 2)
    assert all(math.isnan(logprob) for logprob in r.draft_logprobs)


def test_unlinked_nodes_and_their_children_are_left_out() -> None:
    r = verify_step_of(
        draft_tokens=ints(10, 11, 12, 13), first_child=ints(3, 2, -1, -1), next_sibling=ints(-1, -1, -1, -1),
        accepted=[0, 3], chosen=ints(13, 0, 0, 99),
    )  # fmt: skip
    assert (r.draft_tokens, r.draft_parents, r.accepted) == ((13,), (ROOT,), (0,))
    assert r.top_ids[:, 0].tolist() == [0, 6]


def test_a_verify_step_without_a_draft_names_the_active_version() -> None:
    r = verify_step_of(
        draft_tokens=ints(10), first_child=ints(-1), next_sibling=ints(-1), accepted=[0], chosen=ints(99)
    )
    assert (r.tokens, r.bonus, r.speculator, r.draft_us) == ((10,), 99, "7", 0)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"accepted": [0, 3]}, id="a path that leaves a node out"),
        pytest.param({"accepted": [2, 3]}, id="a path without the root"),
        pytest.param({"first_child": ints(1, -1, 1, -1)}, id="a node with two parents"),
        pytest.param({"first_child": ints(1, -1, 0, -1)}, id="a node before its parent"),
    ],
)
def test_links_that_form_no_tree_are_rejected(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no path|cannot follow"):
        verify_step_of(**changed)


def prompt(position: int, n: int, chosen: int | None) -> VerifyStep:
    top = np.zeros(K, np.int32), np.zeros(K, np.float32)
    return build_prefill(PrefillOutput(position, range(n), np.zeros((n, F), np.uint16), chosen, *top), TIMES)


def test_only_the_end_of_a_prompt_has_a_bonus_token() -> None:
    inside, end = prompt(0, 3, None), prompt(3, 1, 10)
    assert (inside.bonus, inside.top_ids.shape) == (None, (0, K))
    assert (end.bonus, end.top_ids.shape) == (10, (1, K))


@pytest.mark.parametrize(
    ("total", "tokens", "accepted", "bonus"),
    [
        pytest.param(8, (10, 12, 13), (1, 2), 99, id="all of it"),
        pytest.param(7, (10, 12), (1,), 13, id="the last accepted token ends it"),
        pytest.param(6, (10,), (), 12, id="the first accepted token ends it"),
    ],
)
def test_the_last_token_of_a_request_is_the_bonus_of_its_last_verify_step(
    total: int, tokens: tuple[int, ...], accepted: tuple[int, ...], bonus: int
) -> None:
    first, last = cut_at_end([prompt(0, 4, 10), verify_step_of()], total)
    assert (last.tokens, last.accepted, last.bonus, len(last.features)) == (tokens, accepted, bonus, len(tokens))
    assert first.bonus == 10


def test_verify_steps_beyond_the_end_are_dropped() -> None:
    assert [r.verify_step for r in cut_at_end([prompt(0, 4, 10), verify_step_of()], total=5)] == [0]
    (read,) = cut_at_end([prompt(0, 4, 10)], total=4)
    assert (read.bonus, len(read.top_ids)) == (None, 0)


def test_the_records_can_be_encoded() -> None:
    envelope = Envelope(
        "r",
        0,
        last=True,
        node="n",
        target="t" * 32,
        line="line",
        features="inline",
        feature_width=F,
        top_k=K,
        temperature=0.0,
        top_p=1.0,
    )
    verify_steps = (prompt(0, 4, 10), verify_step_of())
    assert [r.tokens for r in decode(encode(Chunk(envelope, verify_steps))).verify_steps] == [
        r.tokens for r in verify_steps
    ]


@pytest.mark.parametrize(
    ("stop_ids", "maximum", "end"),
    [
        pytest.param((), 9, None, id="the request continues"),
        pytest.param((10,), 9, None, id="the root was committed before"),
        pytest.param((12,), 9, (6, "stop"), id="an accepted token ends it"),
        pytest.param((13, 99), 9, (7, "stop"), id="the first of two"),
        pytest.param((99,), 8, (8, "stop"), id="the bonus token ends it, although it is the last one in any case"),
        pytest.param((99,), 7, (7, "length"), id="the limit comes first"),
    ],
)
def test_the_end_of_a_request_is_found_in_its_output(
    stop_ids: tuple[int, ...], maximum: int, end: tuple[int, str] | None
) -> None:
    assert new_tokens(verify_step_of()) == (12, 13, 99)
    assert find_end(verify_step_of(), OutputLimit(maximum, frozenset(stop_ids))) == end


def test_a_prompt_adds_the_first_token_of_the_answer() -> None:
    limit = OutputLimit(9, frozenset({3, 10}))
    assert (new_tokens(prompt(0, 3, None)), find_end(prompt(0, 3, None), limit)) == ((), None)
    assert (new_tokens(prompt(3, 1, 10)), find_end(prompt(3, 1, 10), limit)) == ((10,), (5, "stop"))
