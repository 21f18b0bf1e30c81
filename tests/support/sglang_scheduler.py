"""SGLang's scheduler as the plugin sees it: steps of given requests, drafts and choices of the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from recording_publisher import Answers, Publisher
from unread_corpus import UnreadCorpus

from schemas.settings import Settings
from serving.engines.plugin.capture import HostTransfer
from serving.engines.plugin.metrics import CaptureLimit, SuffixMetrics
from serving.engines.plugin.recorder import Recorder, ReportedCorpus
from serving.engines.plugin.row_drafter import RowDrafter
from serving.engines.sglang.plugin.chain_hooks import ChainHooks
from serving.engines.sglang.plugin.hooks import Hooks, SglangMetrics
from serving.engines.sglang.plugin.plugin import InstalledHooks, Plugin
from serving.traces.chunks import Origin

F, V = 4, 50
PROMPT = [3, 4, 5]


class Server:
    """Calls the plugin in SGLang's order.

    Args:
        settings: Settings of the plugin.
        origin: Returns the origin of the traces.
        depth: Maximum number of draft tokens with the hybrid drafter; 0 lets the speculator draft alone.
    """

    def __init__(self, settings: Settings, origin: Callable[[], Origin], depth: int = 0) -> None:
        self.publisher, self.answers, self.registry = Publisher(), Answers(), CollectorRegistry()
        metrics, limit = SglangMetrics(self.registry), CaptureLimit(0.5)
        transfer, corpus, self.suffix, self.version = HostTransfer(torch.device("cpu")), None, None, "7"
        if depth:
            self.shared = UnreadCorpus(settings, V)
            corpus = ReportedCorpus(self.shared, SuffixMetrics("sglang", self.registry))
            self.drafter = RowDrafter(self.shared.corpus, depth, V)
            self.suffix = ChainHooks(self.drafter, transfer, corpus.metrics, lambda: self.version)
        recorder: Any = Recorder(self.publisher, origin, limit, metrics, self.answers, corpus)  # type: ignore[arg-type]
        self.recorder = recorder
        verified = self.suffix.verified_draft if self.suffix else None
        self.hooks = Hooks(settings, recorder, transfer, limit, metrics, lambda: self.version, verified)
        self.plugin = Plugin(settings, InstalledHooks(self.hooks, self.suffix))

    def prefill(
        self, reqs: Sequence[Any], starts: Sequence[int], lengths: Sequence[int], chosen: Sequence[int]
    ) -> None:
        """Run a prefill step. The hidden states of a token are its position."""
        positions = [p for start, n in zip(starts, lengths, strict=True) for p in range(start, start + n)]
        output = SimpleNamespace(next_token_logits=scores(chosen), hidden_states=states(positions))
        self.plugin.step(None)
        self.plugin.sample(SimpleNamespace(is_draft_worker=False), output)
        output.next_token_logits.zero_()  # as the sampler does
        batch = SimpleNamespace(forward_mode=MODE, reqs=reqs, prefix_lens=list(starts), extend_lens=list(lengths))
        result = SimpleNamespace(logits_output=output, next_token_ids=torch.tensor(chosen))
        self.plugin.prefill(result, None, batch)

    def verify(
        self,
        reqs: Sequence[Any],
        positions: Sequence[int],
        drafts: Sequence[list[int]],
        chosen: Sequence[list[int]],
        draft_probs: Any = None,
    ) -> list[list[int]]:
        """Run a verify step; return the chains that the target has verified.

        Args:
            reqs: Requests of the batch.
            positions: Of their roots.
            drafts: Root and draft tokens of each request.
            chosen: The target's choice at each node.
            draft_probs: The speculator's probabilities, where the sampler compares with them.
        """
        nodes = len(drafts[0])
        order_n = torch.arange(nodes)
        children = [*range(1, nodes), -1]
        verify_input = SimpleNamespace(
            draft_token=torch.tensor(drafts).flatten(),
            draft_token_num=nodes,
            draft_probs=draft_probs,
            retrieve_next_token=torch.tensor([children] * len(reqs)),
            retrieve_next_sibling=torch.full((len(reqs), nodes), -1),
        )
        batch = SimpleNamespace(forward_mode=MODE, reqs=reqs, seq_lens=torch.tensor(positions), spec_info=verify_input)
        self.plugin.step(None)
        self.plugin.verify(None, batch)
        verified: list[list[int]] = verify_input.draft_token.view(-1, nodes).tolist()
        counts = [
            1 + next((i for i, token in enumerate(draft[1:]) if token != row[i]), nodes - 1)
            for draft, row in zip(verified, chosen, strict=True)
        ]
        kept = order_n < torch.tensor(counts)[:, None]
        accepted = torch.where(kept, torch.arange(len(reqs))[:, None] * nodes + order_n, -1)
        predicted = torch.tensor(chosen).flatten().int()
        at = [p + i for p in positions for i in range(nodes)]
        output = SimpleNamespace(next_token_logits=scores(predicted.tolist()), hidden_states=states(at))
        self.plugin.accept(lambda *_: (predicted, torch.tensor(counts), accepted), verify_input, batch, output)
        return verified

    def end(self, req: Any, kind: str | None = "length") -> None:
        """Release a request; ``kind`` None stands for one that is retracted."""
        req.finished_reason = kind and SimpleNamespace(to_json=lambda: {"type": kind})
        self.plugin.release(req)

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def close(self) -> Publisher:
        self.recorder.close()
        return self.publisher


MODE = SimpleNamespace(is_idle=lambda: False)


def scores(chosen: Sequence[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(chosen), V).float() * 5


def states(positions: Sequence[int]) -> torch.Tensor:
    return torch.tensor(positions)[:, None].expand(-1, F).float()


def request(name: str, *chosen: int, custom: dict[str, Any] | None = None, **changed: Any) -> Any:
    """Return SGLang's request with the committed part of its answer."""
    sampling = SimpleNamespace(
        custom_params=custom, top_k=1, top_p=1.0, temperature=1.0, sampling_seed=None, max_new_tokens=9
    )
    req = SimpleNamespace(
        rid=name, origin_input_ids=list(PROMPT), output_ids=list(chosen), sampling_params=sampling, lora_id=None,
        multimodal_inputs=None, finished_reason=None, **changed,
    )  # fmt: skip
    req.finished = lambda: req.finished_reason is not None
    req.output_ids_through_stop = req.output_ids
    return req
