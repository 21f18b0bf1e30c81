"""The suffix drafter inside vLLM's own server, next to an untrained draft; one server for all tests of this file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Producer
from pydantic import SecretStr
from serving_node import eventually
from traced_chunks import chunks_of, count_accepted_by_source, every_chunk, rows_of
from traced_drafts import loop_flags
from vllm_node import KEY, PYTHON, WHOLE, VllmNode

from pipeline import topics
from schemas.answers import Answer, cut_answer, encode
from schemas.settings import load
from schemas.trace.record import Chunk
from serving.engines.node.sidecar import read_target_line
from serving.engines.vllm.node.vllm_client import VllmClient

TOKENS = 40


@pytest.fixture(scope="module")
def hybrid_node(
    smollm2: Any, broker: str, registry: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[VllmNode]:
    folder = tmp_path_factory.mktemp("vllm-hybrid")
    flags = loop_flags(smollm2, broker, registry, folder, free_port) | {
        "kafka.answers_topic": f"answers-{folder.name}",
        "serve.engine": "vllm",
        "serve.node": "vllm-hybrid",
        "vllm.python": str(PYTHON),
        "vllm.draft_dir": str(folder / "vllm"),
        "vllm.api_key": KEY,
        "vllm.max_capture_ratio": 1.0,
    }
    settings = load(environ={}, flags=flags)
    topics.create(settings.kafka)
    running = VllmNode(settings, free_port(), folder / "node.log", ["--max-model-len", "512", "--max-num-seqs", "8"])
    try:
        running.start()
        yield running
    finally:
        running.close()


def metric(node: VllmNode, name: str) -> float:
    """Return the sum of a metric's series, 0 without one."""
    lines = node.client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def test_repeated_answers_are_drafted_from_the_corpus_and_stay_the_targets(
    hybrid_node: VllmNode, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    client = VllmClient(hybrid_node.url, SecretStr(KEY), 60)

    def acceptance_length() -> float:
        before = client.look()[1]
        answers = hybrid_node.complete_all(prompts, TOKENS, "asked", **WHOLE)
        assert answers == [tokens[:TOKENS] for tokens in target_outputs]
        after = client.look()[1]
        return 1 + (after.accepted_tokens - before.accepted_tokens) / (after.verify_steps - before.verify_steps)

    first = acceptance_length()
    for number in range(len(prompts)):
        chunks_of(hybrid_node.settings.kafka, f"asked-{number}")  # they have ended for the recorder, too
    hybrid_node.complete_all(prompts, 4, "between", **WHOLE)
    again = acceptance_length()
    client.close()
    print(f"acceptance length {first:.2f}, and {again:.2f} with earlier answers")
    assert again > 2.5
    assert again > first + 0.5
    assert metric(hybrid_node, "aurora_serve_suffix_accepted_tokens_total") > TOKENS
    assert metric(hybrid_node, "aurora_serve_corpus_tokens") >= TOKENS * len(prompts)
    assert metric(hybrid_node, "aurora_serve_drafter_failures_total") == 0


def test_answers_of_other_nodes_are_continued(
    hybrid_node: VllmNode, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    settings, label = hybrid_node.settings, "foreign"
    count, tokens = cut_answer(prompts[0], target_outputs[0][:TOKENS])
    line = read_target_line(settings).name
    answer = Answer(line, "another", "r", label, time.time_ns() // 1000, count, tokens)
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    producer.produce(settings.kafka.answers_topic, encode(answer))
    assert producer.flush(20) == 0

    def is_consumed() -> bool:
        hybrid_node.complete(prompts[1], 4, "idle", **WHOLE)  # the corpus and the metrics change while steps run
        return metric(hybrid_node, "aurora_serve_answers_consumed_total") >= 1

    eventually(is_consumed)
    before = metric(hybrid_node, "aurora_serve_suffix_accepted_tokens_total")
    assert hybrid_node.complete(prompts[0], TOKENS, label, **WHOLE) == target_outputs[0][:TOKENS]
    assert metric(hybrid_node, "aurora_serve_suffix_accepted_tokens_total") > before + TOKENS / 2


def test_the_traces_name_the_source_of_each_token(hybrid_node: VllmNode, prompts: list[list[int]]) -> None:
    kafka = hybrid_node.settings.kafka

    def asked() -> list[Chunk]:
        return [chunk for chunk in every_chunk(kafka) if (chunk.envelope.label or "").startswith("asked-")]

    eventually(lambda: sum(chunk.envelope.last for chunk in asked()) == 2 * len(prompts))
    accepted = count_accepted_by_source(asked(), "day-0-head-0")
    assert accepted["suffix"] > TOKENS
    assert accepted["version"] <= 3, "an untrained draft is not accepted"
    rows = rows_of(kafka)
    assert rows["dead_letters"] == 0
    assert min(rows["accepted"], rows["rejected"], rows["traces"]) > 0
