"""Hooks around vLLM's runner: prompts and drafts in one batch, the end of requests, swaps, and errors in a hook."""

from __future__ import annotations

from typing import Any

import pytest
from bfloat16 import from_bf16
from vllm_runner import END, H, Server, request


@pytest.fixture
def server() -> Server:
    return Server()


def test_prompts_and_drafts_of_one_batch_are_told_apart(server: Server) -> None:
    server.step({"a": (0, [3, 4], [], [0])}, new=[request("a")])
    server.step({"a": (2, [5], [], [10]), "b": (0, [3, 4, 5], [], [20])}, new=[request("b")])
    server.step({"b": (3, [20], [], [21]), "a": (3, [10], [11, 12, 13], [11, 12, 9, 9])})
    server.step({"a": (6, [9], [8], [8, 7]), "b": (4, [21], [22, 23], [22, 1, 1])})
    server.step({}, ended=["a", "b"])
    found = server.close().verify_steps
    assert [(r.verify_step, r.position, r.tokens, r.draft_tokens, r.accepted, r.bonus) for r in found["a"]] == [
        (0, 0, (3, 4), (), (), None),
        (0, 2, (5,), (), (), 10),
        (1, 3, (10, 11, 12), (11, 12, 13), (0, 1), 9),
        (2, 6, (9, 8), (8,), (0,), 7),
    ]
    assert [(r.position, r.tokens, r.draft_tokens, r.bonus) for r in found["b"]] == [
        (0, (3, 4, 5), (), 20),
        (3, (20,), (), 21),
        (4, (21, 22), (22, 23), 1),
    ]
    assert [from_bf16(r.features)[:, 0].tolist() for r in found["a"]] == [[0, 1], [2], [3, 4, 5], [6, 7]]
    assert from_bf16(found["a"][1].features).tolist() == [[2, 2, 102, 102, 202, 202]]
    assert [r.top_ids[:, 0].tolist() for r in found["a"]] == [[], [10], [11, 12, 9, 9], [8, 7]]
    assert [r.top_ids[:, 0].tolist() for r in found["b"]] == [[20], [21], [22, 1, 1]]
    assert [r.speculator for r in found["a"]] == ["", "", "7", "7"]


def test_a_trace_ends_where_the_server_cuts_the_answer(server: Server) -> None:
    requests = {
        "stop": request("stop"),
        "length": request("length", max_tokens=3),
        "string": request("string", stop=["x"]),
    }
    server.step({name: (0, [3, 4, 5], [], [10]) for name in requests}, new=list(requests.values()))
    server.step({name: (3, [10], [11, END], [11, END, 1]) for name in requests})
    # With asynchronous scheduling one more step begins before the end is known.
    server.step({name: (6, [1], [2, 2], [3, 3, 3]) for name in requests})
    server.step({}, ended=list(requests))
    publisher = server.close()
    for name in requests:
        assert [(r.tokens, r.accepted, r.bonus) for r in publisher.verify_steps[name]] == [
            ((3, 4, 5), (), 10),
            ((10, 11), (0,), END),
        ]
    assert publisher.finished == {"stop": "stop", "length": "stop", "string": "stop"}
    assert server.answers.outputs == dict.fromkeys(requests, (10, 11, END))


def test_the_maximum_length_ends_a_trace(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [10])}, new=[request("a", max_tokens=2, eos_token_id=None)])
    server.step({"a": (3, [10], [11, 12], [11, 12, 13])})
    server.step({}, ended=["a"])
    publisher = server.close()
    assert [(r.tokens, r.bonus) for r in publisher.verify_steps["a"]] == [((3, 4, 5), 10), ((10,), 11)]
    assert publisher.finished == {"a": "length"}


def test_an_aborted_request_keeps_its_steps_and_is_no_answer(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [10])}, new=[request("a")])
    server.step({"a": (3, [10], [11, 12], [11, 9, 9])})
    server.step({}, ended=["a"])
    publisher = server.close()
    assert [(r.tokens, r.bonus) for r in publisher.verify_steps["a"]] == [((3, 4, 5), 10), ((10, 11), 9)]
    assert (publisher.finished, server.answers.outputs) == ({"a": "cancelled"}, {})


def test_a_draft_is_attributed_to_the_version_that_made_it(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [10]), "b": (0, [3, 4, 5], [], [10])}, new=[request("a"), request("b")])
    server.version = "8"
    server.step({"a": (3, [10], [11], [11, 12])})
    server.step({"a": (5, [12], [13], [13, 14]), "b": (3, [10], [11], [11, 12])})
    server.step({}, ended=["a", "b"])
    found = server.close().verify_steps
    assert [r.speculator for r in found["a"]] == ["", "7", "8"]
    assert [r.speculator for r in found["b"]] == ["", "7"]


def test_a_prompt_from_the_prefix_cache_is_recorded_from_its_first_computed_token(server: Server) -> None:
    server.step({"a": (2, [5], [], [10])}, new=[request("a", cached=2, fields={"aurora_label": "sql"})])
    server.step({}, ended=["a"])
    publisher = server.close()
    assert [(r.position, r.tokens, r.bonus) for r in publisher.verify_steps["a"]] == [(2, (5,), 10)]
    assert publisher.requests["a"].label == "sql"
    assert server.count("aurora_vllm_prompt_tokens_cached_total") == 2


def test_a_request_that_is_read_again_adds_nothing_to_its_trace(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [10])}, new=[request("a")])
    server.step({"a": (0, [3, 4, 5, 10], [], [11])}, resumed=["a"])
    server.step({}, ended=["a"])
    assert [r.tokens for r in server.close().verify_steps["a"]] == [(3, 4, 5)]
    assert server.count("aurora_vllm_requests_untraced_total", reason="retracted") == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lora_request": object()}, "lora"),
        ({"mm_features": [object()]}, "multimodal"),
        ({"prompt_embeds": object()}, "no_tokens"),
        ({"num_computed_tokens": 3}, "retracted"),
    ],
)
def test_requests_that_cannot_be_traced_are_counted_by_reason(
    server: Server, changed: dict[str, Any], reason: str
) -> None:
    new = request("a")
    vars(new).update(changed)
    server.step({"a": (0, [3, 4, 5], [], [10])}, new=[new, request("b", fields={"aurora_trace": "off"})])
    assert not server.close().verify_steps
    assert server.count("aurora_vllm_requests_untraced_total", reason=reason) == 1
    assert server.count("aurora_vllm_requests_untraced_total", reason="opt_out") == 1


def test_an_error_in_a_hook_is_suppressed_and_counted(server: Server) -> None:
    server.step({"a": (0, [3, 4, 5], [], [10])}, new=[request("a")])
    server.runner.input_ids = None  # type: ignore[assignment]
    server.hooks.on_scheduled(None)
    assert server.count("aurora_vllm_hook_errors_total", hook="on_scheduled") == 1


def test_without_features_verify_steps_have_the_feature_width() -> None:
    server = Server(**{"traces.features": "recompute"})
    server.step({"a": (0, [3, 4, 5], [], [10])}, new=[request("a")])
    server.step({"a": (3, [10], [11], [11, 12])})
    server.step({}, ended=["a"])
    assert [r.features.shape for r in server.close().verify_steps["a"]] == [(0, 3 * H)] * 2
