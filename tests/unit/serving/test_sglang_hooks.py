"""The plugin's hooks: the order of SGLang's calls, the end of requests, and errors in a hook."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from bfloat16 import from_bf16
from sglang_scheduler import F, Server, V, request

from schemas.settings import load
from schemas.speculator.checkpoint import CheckpointError
from serving.engines.plugin.recorder import MAX_QUEUED_STEPS
from serving.engines.sglang.plugin.plugin import Plugin
from serving.traces.chunks import Origin


@pytest.fixture
def server() -> Server:
    return Server(load(environ={}, flags={"traces.top_k": 2}), lambda: Origin("n", "t", "line", V))


def test_verify_steps_are_cut_at_the_end_of_the_request(server: Server) -> None:
    req = request("a")
    server.prefill([req], [0], [2], [0])
    server.prefill([req], [2], [1], [10])
    server.verify([req], [3], [[10, 11, 12]], [[11, 12, 13]])  # the overlap scheduler has not looked at token 10 yet
    req.output_ids += [10]
    server.verify([req], [6], [[13, 14, 15]], [[14, 0, 0]])
    req.output_ids += [11, 12, 13]
    server.verify([req], [8], [[0, 1, 2]], [[9, 9, 9]])  # one step beyond the end of the request
    req.output_ids += [14]
    server.end(req)
    verify_steps = server.close().verify_steps["a"]
    assert [(r.verify_step, r.position, r.tokens, r.bonus) for r in verify_steps] == [
        (0, 0, (3, 4), None),
        (0, 2, (5,), 10),
        (1, 3, (10, 11, 12), 13),
        (2, 6, (13,), 14),
    ]
    assert [r.accepted for r in verify_steps] == [(), (), (0, 1), ()]
    assert [from_bf16(r.features)[:, 0].tolist() for r in verify_steps] == [[0, 1], [2], [3, 4, 5], [6]]
    assert [r.top_ids[:, 0].tolist() for r in verify_steps] == [[], [10], [11, 12, 13], [14, 0, 0]]
    assert [r.speculator for r in verify_steps] == ["", "", "7", "7"]
    assert server.publisher.finished == {"a": "length"}
    assert server.publisher.requests["a"].temperature == 0.0


def test_only_traced_requests_of_a_batch_are_recorded(server: Server) -> None:
    off, on = request("off", custom={"aurora_trace": "off"}), request("on", custom={"aurora_label": "sql"})
    server.prefill([off, on], [0, 1], [3, 2], [20, 10])
    server.verify([off, on], [3, 3], [[20, 21, 22], [10, 11, 12]], [[21, 22, 23], [11, 9, 9]])
    on.output_ids += [10, 11, 9]
    for req in (off, on):
        server.end(req, "stop")
    publisher = server.close()
    read, verified = publisher.verify_steps["on"]
    assert (read.position, read.tokens, read.bonus) == (1, (4, 5), 10)
    assert from_bf16(read.features)[:, 0].tolist() == [1, 2]
    assert (verified.tokens, verified.bonus, from_bf16(verified.features)[:, 0].tolist()) == ((10, 11), 9, [3, 4])
    assert list(publisher.verify_steps) == ["on"]
    assert publisher.requests["on"].label == "sql"
    assert server.count("aurora_sglang_requests_untraced_total", reason="opt_out") == 1
    assert server.count("aurora_sglang_prompt_tokens_cached_total") == 1
    assert server.count("aurora_sglang_draft_tokens_total") == 4


def test_complete_answers_of_traced_requests_are_published(server: Server) -> None:
    reqs = [request("off", custom={"aurora_trace": "off"}), request("on"), request("aborted"), request("retracted")]
    server.prefill(reqs, [0] * 4, [3] * 4, [10] * 4)
    for req, kind in zip(reqs, ["stop", "length", "abort", None], strict=True):
        req.output_ids += [10, 11]
        server.end(req, kind)
    server.close()
    assert server.answers.started == ("n", "line")
    assert server.answers.outputs == {"on": (10, 11)}
    assert server.count("aurora_serve_answers_published_total") == 1
    assert server.count("aurora_serve_answers_not_published_total", reason="queue_full") == 3


def test_a_retracted_request_adds_nothing_to_its_trace(server: Server) -> None:
    req = request("a")
    server.prefill([req], [0], [3], [10])
    req.output_ids += [10]
    server.end(req, None)
    server.prefill([req], [0], [4], [11])
    server.verify([req], [4], [[11, 1, 2]], [[9, 9, 9]])
    req.output_ids += [11, 9]
    server.end(req)
    assert [r.verify_step for r in server.close().verify_steps["a"]] == [0]
    assert server.count("aurora_sglang_requests_untraced_total", reason="retracted") == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lora_id": "x"}, "lora"),
        ({"multimodal_inputs": object()}, "multimodal"),
        ({"rid": "HEALTH_CHECK_1"}, "health"),
    ],
)
def test_requests_that_cannot_be_traced_are_counted_by_reason(
    server: Server, changed: dict[str, Any], reason: str
) -> None:
    req = request("a")
    vars(req).update(changed)
    server.prefill([req], [0], [3], [10])
    assert not server.close().verify_steps
    assert server.count("aurora_sglang_requests_untraced_total", reason=reason) == 1


def test_an_error_in_a_hook_is_suppressed_and_counted(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert server.hooks.on_verify_logits(None, None, None) is None
    assert server.count("aurora_sglang_hook_errors_total", hook="on_verify_logits") == 2
    assert capsys.readouterr().out.count("aurora_hook_failed") == 1


def test_without_features_verify_steps_have_the_feature_width() -> None:
    server = Server(load(environ={}, flags={"traces.features": "recompute"}), lambda: Origin("n", "t", "line", V))
    req = request("a")
    server.prefill([req], [0], [3], [10])
    server.verify([req], [3], [[10, 11, 12]], [[11, 12, 13]])
    req.output_ids += [10, 11, 12, 13]
    server.end(req)
    assert [r.features.shape for r in server.close().verify_steps["a"]] == [(0, F), (0, F)]


def test_steps_above_the_queue_limit_are_dropped_and_counted() -> None:
    prefilled = threading.Event()

    def read_late() -> Origin:
        prefilled.wait()
        return Origin("n", "t", "line", V)

    server = Server(load(environ={}), read_late)
    for number in range(MAX_QUEUED_STEPS + 3):
        server.prefill([request(f"r{number}")], [0], [3], [10])
    prefilled.set()
    assert server.count("aurora_sglang_verify_steps_dropped_total", reason="queue_full") == 3


def test_a_server_with_other_models_is_not_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    def foreign() -> Origin:
        raise CheckpointError("is a draft for another target")

    server = Server(load(environ={}), foreign)
    server.prefill([early := request("early")], [0], [3], [10])
    server.recorder.close()
    server.end(early)
    server.prefill([request("late")], [0], [3], [10])
    assert not server.publisher.verify_steps
    assert not server.recorder.is_full()
    assert "another target" in capsys.readouterr().out


def test_the_server_accepts_once_whatever_arguments_a_hook_gets() -> None:
    plugin, decided = Plugin(load(environ={})), []

    def original(*args: Any, **kwargs: Any) -> str:
        decided.append((args, kwargs))
        return "decided"

    plugin.step(object())  # a worker of another kind
    plugin.sample(object(), None)
    plugin.prefill(None, None, None)
    plugin.release(None)
    assert plugin.accept(original, 1, mask=2) == "decided"
    assert decided == [((1,), {"mask": 2})]
