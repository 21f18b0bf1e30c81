"""The node beside vLLM on the same target: the same prompts through the same HTTP client, greedily.

The node is its HTTP API and its engine in this process, as in ``aurora serve``. vLLM is its own server, once for each
way to run it that may be the fastest on this machine; the faster one counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry

from ops.bench import prompts
from ops.bench.embedded_kafka import free_port
from ops.bench.engines import EnginePool, RequestMode
from ops.bench.harness import BY_PROCESSOR_TIME, Figure, Goal, Rates, Selection, compare_arms, run_alternating
from ops.bench.serving.single_stream import common_prefix
from ops.bench.serving.vllm_server import MODEL, VllmServer, draft_arguments, find_version, is_answering, mode_arguments
from schemas.errors import UserError
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Verifier
from serving.engines.builtin.engine import BuiltinEngine
from serving.http import routes
from serving.http.generation import RequestMetrics
from serving.http.server import BackgroundServer, Drain, bind

BATCHES = (1, 8)
KINDS = ("plain", "eagle3")
OURS = "ours"

_GOAL = Goal(1.0, at_least=True)
_TIMEOUT_S = 600.0
_POLL_S = 0.05
_HEADERS = {"x-aurora-trace": "off"}
"""The suffix drafter then learns no answer. vLLM ignores the header."""


@dataclass(frozen=True, slots=True)
class VllmMode:
    """One way to run vLLM."""

    dtype: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name of the arm."""
        return f"vllm {self.dtype}{' compiled' if self.compiled else ''}"


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """How much is measured."""

    trials: int
    modes: tuple[VllmMode, ...]
    draft_tokens: int
    """In a row, in vLLM; the node's number is adaptive."""


def figure_name(kind: str, batch: int) -> str:
    """Return the name of a figure."""
    return f"ours_vs_vllm_{kind}_b{batch}"


FIGURE_NAMES = tuple(figure_name(kind, batch) for kind in KINDS for batch in BATCHES)


class VllmComparison:
    """Starts the servers that the selected figures need, and compares."""

    def __init__(self, pool: EnginePool, plan: VllmPlan, selected: Selection) -> None:
        self._pool, self._plan, self._selected = pool, plan, selected
        self._client = httpx.Client(timeout=_TIMEOUT_S)

    def measure(self) -> Iterator[Figure]:
        """Yield the selected figures, without a value where the environment is missing."""
        version = find_version()
        for kind in KINDS:
            batches = [batch for batch in BATCHES if self._selected(figure_name(kind, batch))]
            if batches and version is None:
                why = "vLLM's environment is missing; `make vllm-peer` builds it"
                yield from (Figure(figure_name(kind, b), None, goal=_GOAL, detail={"why": why}) for b in batches)
            elif batches:
                with self._servers(kind) as servers:
                    for batch in batches:
                        yield self._compare(kind, batch, servers, str(version))

    @contextmanager
    def _servers(self, kind: str) -> Iterator[dict[str, VllmServer]]:
        """Run vLLM in each mode; an idle server takes no processor time."""
        folder = Path(self._pool.settings.stack.data_dir).absolute() / "bench" / "vllm"
        with ExitStack() as stack:
            # A fixed path: what vLLM has compiled for a draft is cached by it.
            draft = None
            if kind == "eagle3":
                draft = folder / "draft"
                verifier = Verifier(self._pool.settings.target.path, (), self._plan.draft_tokens)
                write_draft_folder(self._pool.trained, draft, "vllm", verifier)
            serve, servers = self._pool.settings.serve, {}
            limits = ["--max-model-len", str(serve.max_model_len), "--max-num-seqs", str(max(BATCHES))]
            for mode in self._plan.modes:
                log = folder / f"{mode.name} {kind}.log".replace(" ", "-")
                log.unlink(missing_ok=True)
                arguments = mode_arguments(mode.dtype, compiled=mode.compiled) + limits
                if draft is not None:
                    arguments += draft_arguments(draft, self._plan.draft_tokens)
                server = VllmServer(self._pool.folder, free_port(), log, arguments, serve.num_threads)
                stack.callback(server.stop)
                server.start()
                # One after the other: compiling all at once takes the memory and the cores of several.
                server.wait_ready()
                servers[mode.name] = server
            yield servers

    def _engine(self, kind: str) -> BuiltinEngine:
        """Return the engine: for EAGLE-3 with the speculator alone, as vLLM drafts."""
        return self._pool.engine(drafter="eagle" if kind == "eagle3" else None)

    def _compare(self, kind: str, batch: int, servers: dict[str, VllmServer], version: str) -> Figure:
        engine = self._engine(kind)
        self._pool.warm_up(engine, RequestMode(batch, speculate=kind == "eagle3"))
        texts: dict[str, list[str]] = {}
        with self._node(engine) as url:
            name = self._pool.settings.target.served_model_name
            headers = _HEADERS if kind == "eagle3" else _HEADERS | {"x-aurora-speculate": "off"}
            arms = {OURS: partial(self._run_trial, url, name, headers, texts.setdefault(OURS, []), batch)}
            for arm, server in servers.items():
                arms[arm] = partial(self._run_trial, server.url, MODEL, {}, texts.setdefault(arm, []), batch)
            for run_trial in arms.values():
                run_trial(-1)
            rates = run_alternating(arms, self._plan.trials, processor_s=lambda: _processor_s(servers.values()))
        fastest = max(servers, key=lambda arm: rates[arm].clock.median)
        detail = {
            "vllm": {"version": version, "fastest": fastest, "draft_tokens": self._plan.draft_tokens},
            "over_each": {arm: _ratio(rates, arm) for arm in servers},
            "kernel": self._pool.kernel,
            "same_text": {arm: round(_agreement(texts[OURS], texts[arm]), 4) for arm in servers},
        }
        return compare_arms(figure_name(kind, batch), rates, OURS, fastest, goal=_GOAL, detail=detail)

    @contextmanager
    def _node(self, engine: BuiltinEngine) -> Iterator[str]:
        """Serve an engine by the node's HTTP API."""
        settings = self._pool.settings
        metrics = RequestMetrics(CollectorRegistry())
        app = routes.create_app(
            engine,
            prompts.load_tokenizer(self._pool.folder),
            settings.target.served_model_name,
            metrics,
            Drain(),
            settings.serve,
            lambda _: False,
        )
        with bind("127.0.0.1", port := free_port()) as server_socket:
            server = BackgroundServer(app, server_socket, "bench-http")
            try:
                url = f"http://127.0.0.1:{port}"
                while not is_answering(f"{url}/v1/models"):
                    time.sleep(_POLL_S)
                yield url
            finally:
                server.close()

    def _run_trial(
        self, url: str, model: str, headers: dict[str, str], texts: list[str], batch: int, trial: int
    ) -> int:
        """Send a batch of prompts at once; return the number of output tokens.

        No prompt is sent twice to a server with the same batch size or another, so no cached prompt is measured.
        """
        first = sum(b * (self._plan.trials + 1) for b in BATCHES if b < batch) + (trial + 1) * batch
        sent = [self._pool.prompts[(first + i) % len(self._pool.prompts)] for i in range(batch)]

        def complete(prompt: Sequence[int]) -> tuple[str, int]:
            body = {"model": model, "prompt": list(prompt), "max_tokens": self._pool.max_tokens, "temperature": 0}
            response = self._client.post(f"{url}/v1/completions", json=body, headers=headers)
            if response.status_code != httpx.codes.OK:
                raise UserError(f"{url} answered {response.status_code}: {response.text[:300]}")
            answer = response.json()
            return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

        with ThreadPoolExecutor(batch) as executor:
            answers = list(executor.map(complete, sent))
        texts += [text for text, _ in answers]
        return sum(tokens for _, tokens in answers)


def _processor_s(servers: Iterable[VllmServer]) -> float:
    """Return the processor seconds of all arms: only one works at a time."""
    return time.process_time() + sum(server.processor_s() for server in servers)


def _ratio(rates: dict[str, Rates], arm: str) -> dict[str, float]:
    ours, other = rates[OURS], rates[arm]
    return {
        "clock": round(ours.clock.over(other.clock).median, 4),
        BY_PROCESSOR_TIME: round(ours.processor.over(other.processor).median, 4),
    }


def _agreement(ours: Sequence[str], others: Sequence[str]) -> float:
    """Return the share of the characters before the first difference of two answers to a prompt."""
    pairs = list(zip(ours, others, strict=True))
    same = sum(common_prefix(*pair) for pair in pairs)
    return same / max(sum(min(map(len, pair)) for pair in pairs), 1)
