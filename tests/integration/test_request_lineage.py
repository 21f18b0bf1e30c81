"""One trace id leads from a request to the version trained on it, across all four processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from span_collector import Collector, collecting

from schemas.hash_sampling import prompt_key
from schemas.settings import Settings, load, to_environ
from schemas.telemetry import trace_context
from schemas.telemetry.trace_context import TraceContext
from trainer.data.held_out import is_held_out

PROCESSES = ("serve", "stream", "train", "promoter")
REQUESTS = 12


@dataclass
class Loop:
    """The four processes, their logs, and a span collector."""

    settings: Settings
    folder: Path
    collector: Collector
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        for name in PROCESSES:
            with (self.folder / f"{name}.log").open("wb") as log:
                self.running[name] = subprocess.Popen(
                    self.command(name), env=self.environ, cwd=self.folder, stdout=log, stderr=log
                )
        self.until(self._ready, "a node that is ready")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ops.cli.main", *arguments]

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, **to_environ(self.settings), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def ask(self, prompt: list[int], context: TraceContext) -> str:
        body = {"model": self.settings.target.served_model_name, "prompt": prompt, "max_tokens": 24}
        answer = httpx.post(
            f"http://127.0.0.1:{self.settings.serve.port}/v1/completions",
            json={**body, "temperature": 0},
            headers={trace_context.TRACEPARENT: context.to_traceparent()},
            timeout=120,
        )
        answer.raise_for_status()
        return str(answer.json()["id"])

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{name}.log").read_text().splitlines() if line[:1] == "{"]

    def until(self, holds: Callable[[], object], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            for name, process in self.running.items():
                assert process.poll() is None, (name, (self.folder / f"{name}.log").read_text()[-4000:])
            assert time.monotonic() < deadline, (what, [(one.process, one.name) for one in self.collector.seen])
            time.sleep(0.3)

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait(60)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.settings.serve.port}/ready").status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture
def loop(broker: str, registry: str, smollm2: Path, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Loop]:
    with collecting() as collector:
        flags: dict[str, object] = {f"{name}.port": free_port() for name in PROCESSES}
        flags |= {
            "telemetry.endpoint": collector.url,
            "telemetry.export_interval": 0.5,
            "kafka.bootstrap_servers": broker,
            "kafka.traces_topic": f"traces-{uuid.uuid4().hex[:8]}",
            "kafka.speculators_topic": f"speculators-{uuid.uuid4().hex[:8]}",
            "kafka.drift_topic": f"drift-{uuid.uuid4().hex[:8]}",
            "registry.tracking_uri": registry,
            "tables.uri": str(tmp_path / "tables"),
            "target.path": str(smollm2),
            # A line of its own, beside those of other tests with this model.
            "speculator.draft_vocab_size": 1024,
            "speculator.intermediate_size": 64,
            "serve.adaptive_drafting": False,
            "serve.num_speculative_tokens": 3,
            "serve.poll_interval": 0.3,
            "stream.flush_interval": 0.3,
            "stream.data_dir": str(tmp_path / "stream"),
            "train.checkpoint_dir": str(tmp_path / "train"),
            "train.held_out_ratio": 0.4,
            "train.batch_size": 2,
            "train.replay_batch_size": 1,
            "train.max_epochs": 60,
            "train.registration_interval": 3,
            "train.poll_interval": 0.2,
            "train.self_generation": 0,
            "promoter.gate_error": 0.5,
            "promoter.poll_interval": 0.3,
        }
        loop = Loop(load(environ={}, flags=flags), tmp_path, collector)
        yield loop
        for process in loop.running.values():
            process.kill()
            process.wait()


@pytest.mark.timeout(600)
def test_one_trace_id_leads_from_a_request_to_the_version_trained_on_it(loop: Loop) -> None:
    loop.start()
    context = trace_context.new_trace()
    share = loop.settings.train.held_out_ratio
    asked: dict[bool, list[tuple[str, TraceContext]]] = {False: [], True: []}
    while len(asked[False]) + len(asked[True]) < REQUESTS or len(asked[True]) < 4 or not asked[False]:
        prompt = list(range(sum(map(len, asked.values())) + 1, 40))
        asked[is_held_out(prompt_key(prompt), share)].append((loop.ask(prompt, context), context))
        context = trace_context.new_trace()
    request, context = asked[False][0]
    kept_back, _ = asked[True][0]
    seen = loop.collector
    loop.until(lambda: seen.spans("train version", context.trace_id), "a version that learned from it")
    (learned, *_) = seen.spans("train version", context.trace_id)
    version = learned.attributes["aurora.version"]
    of_version = learned.trace_id
    loop.until(lambda: seen.spans("move alias"), "a promotion; an immediately better version may precede it")
    loop.until(lambda: seen.spans("swap version"), "a swap")
    answer = read_lineage(loop, request)
    loop.end()

    (answered,) = seen.spans("text_completion", context.trace_id)
    assert (answered.process, answered.trace_id, answered.parent) == ("aurora-serve", context.trace_id, context.span_id)
    assert answered.attributes["gen_ai.response.id"] == request
    assert answered.attributes["aurora.verify_steps"] > 0
    published = seen.spans("send", context.trace_id)
    assert {one.parent for one in published} == {answered.span_id}
    (committed,) = seen.spans("process", context.trace_id)
    assert committed.process == "aurora-stream"
    assert committed.attributes["aurora.version_of_accepted"] >= 1
    (registered,) = [
        one for one in seen.spans("register version", of_version) if one.attributes["aurora.version"] == version
    ]
    assert (registered.process, learned.parent) == ("aurora-train", registered.span_id)
    for one in [*seen.spans("move alias"), *seen.spans("swap version")]:
        there = trace_context.version_context(one.attributes["aurora.line"], one.attributes["aurora.version"])
        assert (one.trace_id, one.parent) == (there.trace_id, there.span_id)
        assert one.process == {"move alias": "aurora-promoter", "swap version": "aurora-serve"}[one.name]
    assert not seen.spans("train version", trace_context.request_context(kept_back).trace_id), "it is only compared on"

    check_answer(answer, request, context, version)
    check_logs(loop, context, of_version)
    raw = read_lineage(loop, context.to_traceparent())
    assert [one["request"] for one in raw["requests"]] == [request]
    (compared_on,) = read_lineage(loop, kept_back)["requests"]
    assert {one["trained_on"] for one in compared_on["versions"]} == {"held out"}
    shown = command(loop, "lineage", request).stdout
    assert f"request {request}, trace {context.trace_id}" in shown
    assert re.search(r"first version trained on it: \d|no version is trained on all of it", shown), shown
    assert "no rows of 'cmpl-nobody'" in command(loop, "lineage", "cmpl-nobody", code=2).stderr


def check_answer(answer: dict[str, Any], request: str, context: TraceContext, version: str) -> None:
    (result,) = answer["requests"]
    assert (result["request"], result["trace"]) == (request, context.trace_id)
    tables = {rows["table"]: rows for rows in result["rows"]}
    assert tables.keys() >= {"traces", "accepted"}
    assert all(rows["last_version"] >= rows["first_version"] >= 1 for rows in tables.values())
    by_version = {one["version"]: one["trained_on"] for one in result["versions"]}
    # What was read with it may still have waited: then the tags of this version are careful, and a later one is sure.
    assert by_version[version] in ("yes", "partly")
    assert result["first"] == next((one for one, answer in by_version.items() if answer == "yes"), None)
    assert any(move["alias"] == "champion" for one in result["versions"] for move in one["moves"])


def check_logs(loop: Loop, context: TraceContext, of_version: str) -> None:
    """Check that all log lines have one schema and contain the trace id."""
    for name in PROCESSES:
        text = (loop.folder / f"{name}.log").read_text()
        assert not [line for line in text.splitlines() if not line.startswith("{")]
        for line in loop.lines(name):
            assert {"event", "level", "timestamp", "process"} <= line.keys(), line
    result: dict[str, set[str]] = {}
    for name in PROCESSES:
        ours = [line for line in loop.lines(name) if context.trace_id in (line.get("trace_id"), *line.get("links", []))]
        result[name] = {line["event"] for line in ours}
    assert result == {
        "serve": {"request_finished", "chunk_published"},
        "stream": {"batch_committed"},
        "train": {"requests_trained_on"},
        "promoter": set(),
    }
    of_registration = {line["event"] for line in loop.lines("train") if line.get("trace_id") == of_version}
    assert {"version_registered", "version_trained", "requests_trained_on"} <= of_registration


def read_lineage(loop: Loop, named: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(command(loop, "lineage", named, "--json").stdout)
    return answer


def command(loop: Loop, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        loop.command(*arguments), env=loop.environ, cwd=loop.folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == code, run.stderr
    return run
