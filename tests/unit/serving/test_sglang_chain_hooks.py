"""The suffix drafter in SGLang's scheduler: whose tokens are verified, what the trace says of them, and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sglang_scheduler import Server, V, request

from schemas.settings import load
from schemas.trace.record import DraftSource
from serving.engines.sglang.plugin import compatibility
from serving.traces.chunks import Origin

SPECULATOR, SUFFIX = int(DraftSource.SPECULATOR), int(DraftSource.SUFFIX)
DEPTH = 3
WRONG = [41, 42, 43]
"""Of the speculator: no answer has them."""


def new_server() -> Server:
    return Server(load(environ={}, flags={"traces.top_k": 2}), lambda: Origin("n", "t", "line", V), DEPTH)


@pytest.fixture
def server() -> Iterator[Server]:
    running = new_server()
    yield running
    running.recorder.close()


def begin(server: Server, name: str = "a", **options: Any) -> Any:
    """Read the prompt and two tokens of the answer, which then repeats the prompt's end."""
    req = request(name, **options)
    server.prefill([req], [0], [3], [10])
    server.verify([req], [3], [[10, *WRONG]], [[4, 0, 0, 0]])
    return req


def step(server: Server, req: Any, position: int, root: int, *chosen: int) -> list[int]:
    """Run a verify step in which the speculator is wrong; return the draft tokens that were verified."""
    (verified,) = server.verify([req], [position], [[root, *WRONG]], [[*chosen, 0, 0, 0][: DEPTH + 1]])
    assert verified[0] == root
    return verified[1:]


def test_a_match_takes_the_place_of_the_speculators_tokens(server: Server) -> None:
    req = begin(server)
    assert step(server, req, 4, 4, 5) == WRONG, "a single token is no match"
    assert step(server, req, 5, 5, 10, 4, 5, 10) == [10, 4, 5]
    server.end(req)
    assert server.count("aurora_sglang_suffix_rows_total") == 1


def test_the_trace_names_the_drafter_of_each_token(server: Server) -> None:
    req = begin(server)
    step(server, req, 4, 4, 5)
    step(server, req, 5, 5, 10, 4, 9)
    req.output_ids += [10, 4, 5, 10, 4, 9]
    server.end(req)
    *before, mixed = server.close().verify_steps["a"][1:]
    assert [(r.speculator, r.draft_sources) for r in before] == [("7", None)] * 2
    assert (mixed.draft_tokens, mixed.accepted, mixed.bonus) == ((10, 4, 5), (0, 1), 9)
    assert (mixed.speculator, mixed.draft_sources, mixed.active_since_us) == ("", (SUFFIX,) * 3, None)


def test_the_drafter_learns_from_the_output_of_each_step(server: Server) -> None:
    req = begin(server)
    step(server, req, 4, 4, 5)
    step(server, req, 5, 5, 10, 4, 9)
    step(server, req, 8, 9, 1)
    step(server, req, 9, 1, 1)
    assert server.drafter._sequences["a"].tokens == [3, 4, 5, 10, 4, 5, 10, 4, 9, 1]
    assert server.count("aurora_serve_suffix_draft_tokens_total") == 3
    assert server.count("aurora_serve_suffix_accepted_tokens_total") == 2


def test_rows_of_a_batch_are_overwritten_on_their_own(server: Server) -> None:
    reqs = [request("a"), request("b")]
    server.prefill(reqs, [0, 0], [3, 3], [4, 20])
    server.verify(reqs, [3, 3], [[4, *WRONG], [20, *WRONG]], [[5, 0, 0, 0], [21, 0, 0, 0]])
    verified = server.verify(reqs, [4, 4], [[5, *WRONG], [21, *WRONG]], [[4, 0, 0, 0], [22, 0, 0, 0]])
    assert verified == [[5, 4, 5, 43], [21, *WRONG]], "a match of one token before the end is two tokens long"


def test_a_draft_that_adapts_has_chains_of_its_length(server: Server) -> None:
    req = begin(server)
    assert server.verify([req], [4], [[4]], [[5]]) == [[4]]
    assert server.verify([req], [5], [[5, 41]], [[10, 0]]) == [[5, 10]]
    assert step(server, req, 7, 0, 0) == WRONG
    assert server.drafter._sequences["a"].tokens == [3, 4, 5, 10, 4, 5, 10, 0]


def test_probabilities_of_the_speculator_keep_its_tokens(server: Server) -> None:
    req = begin(server)
    step(server, req, 4, 4, 5)
    draft = [[5, *WRONG]]
    assert server.verify([req], [5], draft, [[10, 0, 0, 0]], draft_probs=object()) == draft
    assert server.drafter._sequences["a"].tokens[-1] == 5
    assert step(server, req, 6, 10, 4) == [4, 5, 10]


def test_a_retracted_request_is_drafted_again(server: Server) -> None:
    req = begin(server)
    server.end(req, None)
    assert server.drafter._sequences == {}
    req.output_ids, req.finished_reason = [10, 4], None
    server.prefill([req], [0], [2], [0])
    assert server.drafter._sequences == {}, "the prompt is not read to its end"
    server.prefill([req], [2], [3], [5])
    assert step(server, req, 5, 5, 10) == [10, 4, 5]


def test_an_answer_is_continued_for_later_requests_with_its_label() -> None:
    server, label = new_server(), {"aurora_label": "sql"}
    for name, first, options in (("shared", 20, {}), ("untraced", 30, {"aurora_trace": "off"})):
        req = request(name, custom=label | options)
        server.prefill([req], [0], [3], [first])
        req.output_ids += range(first, first + 5)
        server.end(req)
    server.close()
    drafts = {}
    for name, first in (("a", 20), ("b", 30)):
        req = request(name, custom=label)
        server.prefill([req], [0], [3], [first])
        server.verify([req], [3], [[first, *WRONG]], [[first + 1, 0, 0, 0]])
        drafts[name] = step(server, req, 4, first + 1, 0)
    assert drafts == {"a": [22, 23, 24], "b": WRONG}
    assert server.shared.started == "line"


@pytest.mark.parametrize("failing", ["observe", "draft", "begin", "end"])
def test_a_failing_suffix_drafter_turns_itself_off_and_the_speculator_drafts_on(
    server: Server, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(server.drafter, failing, fail)
    server.end(request("before"))
    req = begin(server)
    step(server, req, 4, 4, 5)
    assert step(server, req, 5, 5, 10) == WRONG
    req.output_ids += [10, 4, 5, 10]
    server.end(req)
    assert [r.draft_sources for r in server.close().verify_steps["a"]] == [None] * 4
    assert server.count("aurora_serve_drafter_failures_total") == 1
    assert server.count("aurora_sglang_hook_errors_total", hook="on_accepted") == 0


@pytest.mark.parametrize(
    ("ranks", "width", "compares", "why"),
    [
        (1, 1, False, None),
        (2, 1, False, "tensor-parallel"),
        (1, 2, False, "--speculative-eagle-topk 1"),
        (1, 1, True, "--speculative-use-rejection-sampling"),
    ],
)
def test_the_speculator_drafts_alone_where_no_row_may_be_overwritten(
    ranks: int, width: int, compares: bool, why: str | None
) -> None:
    found = compatibility.check_suffix_drafter(ranks, width, compares_probabilities=compares)
    assert found is None if why is None else why in (found or "")
