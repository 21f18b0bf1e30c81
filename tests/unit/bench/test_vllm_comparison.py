"""The node beside vLLM, with a stand-in for vLLM's server: the figures, and the prompts that all arms get."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from zlib import crc32

import pytest
from echo_engine import byte_tokenizer
from tiny_target import VOCABULARY, write_tiny_target

from ops.bench import prompts, speculator
from ops.bench.engines import EnginePool
from ops.bench.harness import Figure
from ops.bench.serving import vllm_comparison, vllm_server
from ops.bench.serving.vllm_comparison import BATCHES, FIGURE_NAMES, VllmComparison, VllmMode, VllmPlan
from schemas.errors import UserError
from schemas.settings import load
from schemas.speculator import checkpoint

PLAN = VllmPlan(trials=2, modes=(VllmMode("float32"), VllmMode("bfloat16", compiled=True)), draft_tokens=3)


class StandIn:
    """Answers with nothing, and counts as many tokens as its type is to be fast."""

    started: list[StandIn]
    status = 200

    def __init__(self, _target: Path, port: int, _log: Path, arguments: Sequence[str], threads: int = 1) -> None:
        self.url, self.arguments, self.threads = f"http://127.0.0.1:{port}", arguments, threads
        self.asked: list[tuple[int, ...]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.asked.append(tuple(body["prompt"]))
                tokens = 100_000 if "bfloat16" in arguments else 1
                answer = {"choices": [{"text": ""}], "usage": {"completion_tokens": tokens}}
                content = json.dumps(answer).encode()
                self.send_response(server.status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)

    def start(self) -> None:
        Thread(target=self._http.serve_forever, daemon=True).start()
        self.started.append(self)

    def wait_ready(self) -> None:
        pass

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def processor_s(self) -> float:
        return 0.0


def tokenize(_tokenizer: object, texts: Sequence[str]) -> list[tuple[int, ...]]:
    return [tuple(1 + crc32(f"{i}{text}".encode()) % (VOCABULARY - 1) for i in range(6)) for text in texts]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EnginePool]:
    monkeypatch.setattr(prompts, "load_tokenizer", lambda _: byte_tokenizer())
    monkeypatch.setattr(prompts, "tokenize", tokenize)
    monkeypatch.setattr(vllm_comparison, "VllmServer", StandIn)
    monkeypatch.setattr(vllm_comparison, "find_version", lambda: "1.2.3")
    monkeypatch.setattr(StandIn, "started", [], raising=False)
    flags = {
        "target.path": str(write_tiny_target(tmp_path / "target")),
        "speculator.draft_vocab_size": VOCABULARY,
        "stack.data_dir": str(tmp_path),
        "serve.max_model_len": 64,
    }
    pool = EnginePool(load(environ={}, flags=flags), "math", "math", 5, lambda _: None)
    target = speculator.read_target(pool.settings)
    checkpoint.write_checkpoint(target.day_0, speculator.cache_folder(pool.settings, "math"), target.fingerprint)
    yield pool
    pool.stop()


def measure(pool: EnginePool, prefix: str = "") -> dict[str, Figure]:
    found = VllmComparison(pool, PLAN, lambda name: name.startswith(prefix)).measure()
    return {figure.name: figure for figure in found}


def test_every_figure_is_over_the_faster_way_to_run_vllm(pool: EnginePool) -> None:
    figures = measure(pool)
    assert tuple(figures) == FIGURE_NAMES
    for figure in figures.values():
        detail = figure.detail
        assert detail["vllm"] == {"version": "1.2.3", "fastest": "vllm bfloat16 compiled", "draft_tokens": 3}
        assert set(detail["over_each"]) == {"vllm float32", "vllm bfloat16 compiled"}
        assert figure.value == pytest.approx(detail["over_each"]["vllm bfloat16 compiled"]["clock"], abs=1e-4)
        assert figure.value is not None
        assert figure.value < detail["over_each"]["vllm float32"]["clock"]


def test_all_servers_get_the_same_prompts_and_none_twice(pool: EnginePool) -> None:
    measure(pool, "ours_vs_vllm_plain")
    one, other = StandIn.started
    assert sorted(one.asked) == sorted(other.asked)
    assert len(set(one.asked)) == len(one.asked) == (PLAN.trials + 1) * sum(BATCHES)
    assert set(one.asked) <= set(pool.prompts)


def test_only_eagle_3_has_a_draft_and_it_is_the_nodes(pool: EnginePool) -> None:
    measure(pool, "ours_vs_vllm_plain_b1")
    measure(pool, "ours_vs_vllm_eagle3_b1")
    plain, compiled, drafting, _ = (server.arguments for server in StandIn.started)
    assert "--speculative-config" not in plain
    assert ("--enforce-eager" in plain, "--enforce-eager" in compiled) == (True, False)
    drafted = json.loads(drafting[drafting.index("--speculative-config") + 1])
    assert (drafted["method"], drafted["num_speculative_tokens"]) == ("eagle3", 3)


def test_a_failing_server_ends_the_benchmark(pool: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "status", 500)
    with pytest.raises(UserError, match="answered 500"):
        measure(pool, "ours_vs_vllm_plain_b1")


def test_without_the_environment_the_figures_say_how_to_build_it(
    pool: EnginePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "ENVIRONMENT", tmp_path / "none")
    monkeypatch.setattr(vllm_comparison, "find_version", vllm_server.find_version)
    figures = measure(pool)
    assert tuple(figures) == FIGURE_NAMES
    assert {str(figure.detail["why"]) for figure in figures.values()} == {
        "vLLM's environment is missing; `make vllm-peer` builds it"
    }
    assert StandIn.started == []
