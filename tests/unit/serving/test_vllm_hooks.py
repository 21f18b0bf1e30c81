"""Hooks around vLLM's runner: prompts and drafts in one batch, the end of requests, swaps, and errors in a hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bfloat16 import from_bf16
from prometheus_client import CollectorRegistry
from recording_publisher import Answers, Publisher

from schemas.settings import load
from serving.engines.plugin.capture import HostTransfer
from serving.engines.plugin.metrics import CaptureLimit, PluginMetrics
from serving.engines.plugin.recorder import Recorder
from serving.engines.vllm.plugin.runner_hooks import RunnerHooks
from serving.traces.chunks import Origin

H, V, END = 2, 50, 40
PROMPT = [3, 4, 5]


class Runner:
    """vLLM's runner as the hooks see it. The hidden states of a token are its position."""

    max_model_len = 20
    execute_model_state: Any = None

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=[])
        self.positions = torch.zeros(64, dtype=torch.int64)
        self.input_ids = SimpleNamespace(gpu=torch.zeros(64, dtype=torch.int32))
        self.rows: list[tuple[int, list[int], list[int], list[int]]] = []

    def execute_model(self, scheduled: Any) -> None:
        self.input_batch.req_ids = list(scheduled.num_scheduled_tokens)
        positions, ids, logits = [], [], []
        for position, tokens, drafted, chosen in self.rows:
            positions += range(position, position + len(tokens) + len(drafted))
            ids += [*tokens, *drafted]
            logits += chosen
        self.positions[: len(positions)] = torch.tensor(positions)
        self.input_ids.gpu[: len(ids)] = torch.tensor(ids)
        states = torch.tensor(positions)[:, None].expand(-1, H).float()
        self.execute_model_state = SimpleNamespace(
            logits=torch.nn.functional.one_hot(torch.tensor(logits), V).float() * 5,
            aux_hidden_states=[states, states + 100, states + 200],
        )

    def _sample(self, logits: torch.Tensor, metadata: Any) -> Any:
        logits.zero_()  # as the sampler does
        longest = max(len(drafted) for _, _, drafted, _ in self.rows) + 1
        sampled = torch.full((len(self.rows), longest), -1, dtype=torch.int32)
        for row, (_, _, drafted, chosen) in enumerate(self.rows):
            for at, token in enumerate(chosen):
                sampled[row, at] = token
                if at < len(drafted) and drafted[at] != token:
                    break
        return SimpleNamespace(sampled_token_ids=sampled)

    def propose_draft_token_ids(self, *_: Any) -> str:
        return "drafts"


class Server:
    """Runs steps through the hooks."""

    def __init__(self, **flags: Any) -> None:
        self.publisher, self.answers, self.registry = Publisher(), Answers(), CollectorRegistry()
        metrics, limit = PluginMetrics("vllm", self.registry), CaptureLimit(0.9)
        recorder: Any = Recorder(
            self.publisher,  # type: ignore[arg-type]
            lambda: Origin("n", "t", "line", V),
            limit,
            metrics,
            self.answers,  # type: ignore[arg-type]
        )
        self.recorder, self.runner, self.version = recorder, Runner(), "7"
        settings, transfer = load(environ={}, flags={"traces.top_k": 2} | flags), HostTransfer(torch.device("cpu"))
        self.hooks = RunnerHooks(self.runner, settings, recorder, transfer, limit, metrics, lambda: self.version)
        self.hooks.install()

    def step(
        self,
        rows: Mapping[str, tuple[int, list[int], list[int], list[int]]],
        *,
        new: Sequence[Any] = (),
        ended: Sequence[str] = (),
        resumed: Sequence[str] = (),
    ) -> None:
        """Run a step.

        Args:
            rows: By request: position and tokens that are read, draft tokens, and the target's choice after the last
                token and after each draft token.
            new: Requests that begin.
            ended: Requests that have ended before.
            resumed: Requests that are read again.
        """
        scheduled = SimpleNamespace(
            num_scheduled_tokens={name: len(row[1]) + len(row[2]) for name, row in rows.items()},
            finished_req_ids=set(ended),
            scheduled_new_reqs=list(new),
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
        )
        self.runner.rows = list(rows.values())
        if not rows:
            self.hooks.on_scheduled(scheduled)
            return
        self.runner.execute_model(scheduled)
        state, self.runner.execute_model_state = self.runner.execute_model_state, None
        drafted = [len(row[2]) for row in rows.values()]
        metadata = SimpleNamespace(num_draft_tokens=drafted) if any(drafted) else None
        self.runner._sample(state.logits, metadata)
        assert self.runner.propose_draft_token_ids() == "drafts"

    def close(self) -> Publisher:
        self.recorder.close()
        return self.publisher

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def request(name: str, *, cached: int = 0, fields: dict[str, Any] | None = None, **sampling: Any) -> Any:
    """Return what vLLM's scheduler sends of a new request."""
    given = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": None, "max_tokens": 9} | sampling
    given = {"stop": [], "stop_token_ids": [], "eos_token_id": END, "extra_args": fields} | given
    return SimpleNamespace(
        req_id=name, prompt_token_ids=list(PROMPT), mm_features=[], sampling_params=SimpleNamespace(**given),
        num_computed_tokens=cached, lora_request=None, prompt_embeds=None,
    )  # fmt: skip


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
