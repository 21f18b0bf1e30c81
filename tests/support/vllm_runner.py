"""vLLM's runner as the hooks see it, and its scheduler: steps of given requests, tokens and drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from recording_publisher import Answers, Publisher
from unread_corpus import UnreadCorpus

from schemas.settings import load
from serving.engines.plugin.capture import HostTransfer
from serving.engines.plugin.metrics import CaptureLimit, PluginMetrics, SuffixMetrics
from serving.engines.plugin.recorder import Recorder, ReportedCorpus
from serving.engines.plugin.row_drafter import RowDrafter
from serving.engines.vllm.plugin.hybrid_hooks import HybridHooks
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
        self.discard_request_mask = SimpleNamespace(np=[False] * 8)
        self.drafts: Any = "drafts"
        self.rows: list[tuple[int, list[int], list[int], list[int]]] = []

    def execute_model(self, scheduled: Any) -> None:
        self.input_batch.req_ids = list(scheduled.num_scheduled_tokens)
        positions, ids, logits = [], [], []
        for position, tokens, drafted, chosen in self.rows:
            positions += range(position, position + len(tokens) + len(drafted))
            ids += [*tokens, *drafted]
            logits += chosen
        self.discard_request_mask.np = [position + len(tokens) < len(PROMPT) for position, tokens, _, _ in self.rows]
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

    def propose_draft_token_ids(self, *_: Any) -> Any:
        return self.drafts


class Server:
    """Runs steps through the hooks.

    Args:
        depth: Draft tokens of a row with the hybrid drafter; 0 lets the speculator draft alone.
        flags: Settings.
    """

    def __init__(self, depth: int = 0, **flags: Any) -> None:
        self.publisher, self.answers, self.registry = Publisher(), Answers(), CollectorRegistry()
        metrics, limit = PluginMetrics("vllm", self.registry), CaptureLimit(0.9)
        settings, transfer = load(environ={}, flags={"traces.top_k": 2} | flags), HostTransfer(torch.device("cpu"))
        self.runner, self.version = Runner(), "7"
        self.hybrid, corpus = None, None
        if depth:
            self.shared = UnreadCorpus(settings, V)
            corpus = ReportedCorpus(self.shared, SuffixMetrics("vllm", self.registry))
            self.drafter = RowDrafter(self.shared.corpus, depth, V)
            self.hybrid = HybridHooks(self.runner, self.drafter, transfer, corpus.metrics, lambda: self.version)
            self.hybrid.install()
        recorder: Any = Recorder(
            self.publisher,  # type: ignore[arg-type]
            lambda: Origin("n", "t", "line", V),
            limit,
            metrics,
            self.answers,  # type: ignore[arg-type]
            corpus,
        )
        self.recorder = recorder
        verified = self.hybrid.verified_draft if self.hybrid else None
        self.hooks = RunnerHooks(
            self.runner, settings, recorder, transfer, limit, metrics, lambda: self.version, verified
        )
        self.hooks.install()

    def step(
        self,
        rows: Mapping[str, tuple[int, list[int], list[int], list[int]]],
        *,
        new: Sequence[Any] = (),
        ended: Sequence[str] = (),
        resumed: Sequence[str] = (),
        continued: Mapping[str, list[int]] | None = None,
    ) -> Any:
        """Run a step; return the draft.

        Args:
            rows: By request: position and tokens that are read, draft tokens, and the target's choice after the last
                token and after each draft token.
            new: Requests that begin.
            ended: Requests that have ended before.
            resumed: Requests that are read again.
            continued: Tokens of requests that the last step left out.
        """
        scheduled = SimpleNamespace(
            num_scheduled_tokens={name: len(row[1]) + len(row[2]) for name, row in rows.items()},
            finished_req_ids=set(ended),
            scheduled_new_reqs=list(new),
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed), all_token_ids=continued or {}),
        )
        self.runner.rows = list(rows.values())
        if not rows:
            self.hooks.on_scheduled(scheduled)
            if self.hybrid:
                self.hybrid.on_scheduled(scheduled)
            return None
        self.runner.execute_model(scheduled)
        state, self.runner.execute_model_state = self.runner.execute_model_state, None
        drafted = [len(row[2]) for row in rows.values()]
        metadata = SimpleNamespace(num_draft_tokens=drafted) if any(drafted) else None
        self.runner._sample(state.logits, metadata)
        return self.runner.propose_draft_token_ids()

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
