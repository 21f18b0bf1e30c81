"""The suffix drafter in vLLM's runner: whose tokens are verified, what the trace says of them, and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm_runner import Server, request

from schemas.trace.record import DraftSource

SPECULATOR, SUFFIX = int(DraftSource.SPECULATOR), int(DraftSource.SUFFIX)
BOTH = SPECULATOR | SUFFIX
DEPTH = 3
WRONG = [41, 42, 43]
"""Of the speculator: no answer has them."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(DEPTH)
    running.runner.drafts = torch.tensor([WRONG])
    yield running
    running.recorder.close()


def rows_of(drafts: torch.Tensor) -> list[list[int]]:
    found: list[list[int]] = drafts.tolist()
    return found


def begin(server: Server, name: str = "a", **options: Any) -> Any:
    """Read the prompt and four tokens of the answer, which then repeats the prompt's end; return the draft."""
    server.step({name: (0, [3, 4, 5], [], [10])}, new=[request(name, **options)])
    server.step({name: (3, [10], WRONG, [4, 0, 0, 0])})
    return server.step({name: (4, [4], WRONG, [5, 0, 0, 0])})


def test_a_match_takes_the_place_of_the_speculators_tokens(server: Server) -> None:
    first = server.step({"a": (0, [3, 4, 5], [], [10])}, new=[request("a")])
    assert rows_of(first) == [WRONG]
    assert rows_of(server.step({"a": (3, [10], WRONG, [4, 0, 0, 0])})) == [WRONG]
    drafts = server.step({"a": (4, [4], WRONG, [5, 0, 0, 0])})
    assert rows_of(drafts) == [[10, 4, 5]]
    assert (drafts.dtype, rows_of(server.runner.drafts)) == (torch.int64, [WRONG])


def test_the_trace_names_the_drafter_of_each_token(server: Server) -> None:
    begin(server)
    server.step({"a": (5, [5], [10, 4, 5], [10, 4, 9, 0])})
    server.step({}, ended=["a"])
    *before, mixed = server.close().verify_steps["a"][1:]
    assert [(r.speculator, r.draft_sources) for r in before] == [("7", None)] * 2
    assert (mixed.draft_tokens, mixed.accepted, mixed.bonus) == ((10, 4, 5), (0, 1), 9)
    assert (mixed.speculator, mixed.draft_sources, mixed.active_since_us) == ("", (SUFFIX,) * 3, None)
    assert server.count("aurora_serve_suffix_draft_tokens_total") == 3
    assert server.count("aurora_serve_suffix_accepted_tokens_total") == 2


def test_a_token_of_both_drafters_counts_for_the_version(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [10])}, new=[request("a")])
    server.step({"a": (3, [10], WRONG, [4, 0, 0, 0])})
    server.runner.drafts = torch.tensor([[10, 44, 45]])
    assert rows_of(server.step({"a": (4, [4], WRONG, [5, 0, 0, 0])})) == [[10, 4, 5]]
    server.step({"a": (5, [5], [10, 4, 5], [10, 4, 9, 0])})
    server.step({}, ended=["a"])
    mixed = server.close().verify_steps["a"][-1]
    assert (mixed.speculator, mixed.draft_sources) == ("7", (BOTH, SUFFIX, SUFFIX))


def test_tokens_behind_a_shorter_chain_are_no_proposals(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [4])}, new=[request("a")])
    # The only match is one token before the end.
    drafts = server.step({"a": (3, [4], WRONG, [5, 0, 0, 0])})
    assert rows_of(drafts) == [[4, 5, 43]]
    server.step({"a": (4, [5], [4, 5, 43], [7, 0, 0, 0])})
    server.step({}, ended=["a"])
    last = server.close().verify_steps["a"][-1]
    assert (last.draft_tokens, last.draft_sources, last.top_ids.shape) == ((4, 5), (SUFFIX, SUFFIX), (3, 2))


def test_an_accepted_token_behind_a_shorter_chain_counts_for_no_version(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [4])}, new=[request("a")])
    server.step({"a": (3, [4], WRONG, [5, 0, 0, 0])})
    server.step({"a": (4, [5], [4, 5, 43], [4, 5, 43, 8])})
    server.step({}, ended=["a"])
    last = server.close().verify_steps["a"][-1]
    assert (last.draft_tokens, last.accepted, last.bonus) == ((4, 5, 43), (0, 1, 2), 8)
    assert (last.speculator, last.draft_sources) == ("", (SUFFIX,) * 3)


def test_an_answer_is_continued_for_later_requests_with_its_label() -> None:
    server = Server(DEPTH)
    server.runner.drafts = torch.tensor([WRONG])
    label = {"aurora_label": "sql"}
    answers = {
        "shared": request("shared", fields=label, max_tokens=5),
        "untraced": request("untraced", fields=label | {"aurora_trace": "off"}, max_tokens=5),
    }
    for first, (name, new) in zip((20, 30), answers.items(), strict=True):
        server.step({name: (0, [3, 4, 5], [], [first])}, new=[new])
        server.step({name: (3, [first], WRONG, [first + 1, 0, 0, 0])})
        for at in range(2, 5):
            server.step({name: (2 + at, [first + at - 1], WRONG, [first + at, 0, 0, 0])})
        server.step({}, ended=[name])
    server.close()
    drafts = {}
    for name, start in (("a", 20), ("b", 30)):
        server.step({name: (0, [3, 4, 5], [], [start])}, new=[request(name, fields=label)])
        drafts[name] = rows_of(server.step({name: (3, [start], WRONG, [start + 1, 0, 0, 0])}))
    assert drafts == {"a": [[22, 23, 24]], "b": [WRONG]}
    assert server.shared.started == "line"
    assert server.count("aurora_serve_corpus_bytes") > 0


def test_a_prompt_that_is_not_read_to_its_end_has_no_draft(server: Server) -> None:
    server.step({"a": (0, [3, 4], [], [0])}, new=[request("a")])
    assert server.drafter._sequences["a"].tokens == [3, 4, 5]
    server.step({"a": (2, [5], [], [10])})
    assert server.drafter._sequences["a"].tokens == [3, 4, 5, 10]


def test_a_preempted_request_is_drafted_again(server: Server) -> None:
    begin(server)
    tokens = [3, 4, 5, 10, 4]
    drafts = server.step({"a": (0, tokens, [], [5])}, resumed=["a"], continued={"a": tokens})
    assert rows_of(drafts) == [[10, 4, 5]]


def test_the_answers_of_requests_that_end_are_forgotten(server: Server) -> None:
    begin(server)
    server.step({}, ended=["a"])
    assert (server.drafter._sequences, server.hybrid and server.hybrid._drafts) == ({}, {})


@pytest.mark.parametrize("failing", ["observe", "draft", "begin"])
def test_a_failing_suffix_drafter_turns_itself_off_and_the_speculator_drafts_on(
    server: Server, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(server.drafter, failing, fail)
    drafts = begin(server)
    assert rows_of(drafts) == [WRONG]
    server.step({"a": (5, [5], WRONG, [10, 0, 0, 0])})
    server.step({}, ended=["a"])
    steps = server.close().verify_steps["a"]
    assert [r.draft_sources for r in steps] == [None] * 4
    assert server.count("aurora_serve_drafter_failures_total") == 1
    assert server.count("aurora_vllm_hook_errors_total", hook="on_sampled") == 0
