"""The suffix drafter inside SGLang's own server, next to an untrained draft; one server, as a user starts it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from serving_node import eventually
from sglang_server import HERE, PYTHON, Server
from traced_chunks import count_accepted_by_source, every_chunk, rows_of
from traced_drafts import loop_flags

from pipeline import topics
from schemas.answers import Answer, cut_answer, encode
from schemas.settings import Settings, load
from schemas.trace.record import Chunk
from serving.engines.node.sidecar import read_target_line

TOKENS = 40
WHOLE = {"ignore_eos": True}


@pytest.fixture(scope="module")
def settings(
    smollm2: Path, broker: str, registry: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Settings:
    folder = tmp_path_factory.mktemp("sglang-hybrid")
    flags = loop_flags(smollm2, broker, registry, folder, free_port) | {
        "kafka.answers_topic": f"answers-{folder.name}",
        "serve.engine": "sglang",
        "serve.node": "sglang-hybrid",
        "sglang.python": str(PYTHON),
        "sglang.draft_dir": str(folder / "sglang"),
        "sglang.max_capture_ratio": 1.0,
    }
    found = load(environ={}, flags=flags)
    topics.create(found.kafka)
    return found


@pytest.fixture(scope="module")
def server(serving: Any, settings: Settings) -> Iterator[Server]:
    """A server that drafts up to three tokens, by what was accepted; a second plugin breaks the suffix drafter."""
    with serving(settings=settings, launched=True, path=[HERE / "faulty"]) as running:
        yield running


def ask(server: Server, prompts: list[list[int]], label: str) -> list[Any]:
    """Return the answers to all prompts, decoded concurrently."""

    def one(number: int) -> Any:
        parameters = WHOLE | {"custom_params": {"aurora_label": label}}
        return server.generate(prompts[number], TOKENS, rid=f"{label}-{number}-{time.time_ns()}", sampling=parameters)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(len(prompts))))


def acceptance_length(answers: list[Any]) -> float:
    return statistics.mean(answer["meta_info"]["spec_accept_length"] for answer in answers)


def output_ids(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def asked(settings: Settings) -> list[Chunk]:
    return [chunk for chunk in every_chunk(settings.kafka) if chunk.envelope.label == "asked"]


def test_repeated_answers_are_drafted_from_the_corpus_and_stay_the_targets(
    server: Server, settings: Settings, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    first = ask(server, prompts, "asked")
    eventually(lambda: sum(chunk.envelope.last for chunk in asked(settings)) == len(prompts))
    # SGLang drafts one token in half of the steps by now, and more once its tokens are accepted.
    again = [ask(server, prompts, "asked") for _ in range(3)]
    for answers in (first, *again):
        assert output_ids(answers) == target_outputs
    lengths = [round(acceptance_length(answers), 2) for answers in (first, *again)]
    print(f"acceptance length {lengths[0]}, and {lengths[1:]} with earlier answers")
    assert lengths[0] < 1.6
    assert lengths[-1] > 2.5
    assert server.metric("aurora_sglang_suffix_rows_total") > 10
    assert server.metric("aurora_serve_suffix_accepted_tokens_total") > TOKENS
    assert server.metric("aurora_serve_corpus_tokens") >= TOKENS * len(prompts)
    assert server.metric("aurora_serve_drafter_failures_total") == 0


def test_the_traces_name_the_source_of_each_token(server: Server, settings: Settings, prompts: list[list[int]]) -> None:
    eventually(lambda: sum(chunk.envelope.last for chunk in asked(settings)) == 4 * len(prompts))
    accepted = count_accepted_by_source(asked(settings), "day-0-head-0")
    assert accepted["suffix"] > TOKENS
    assert accepted["version"] <= 3, "an untrained draft is not accepted"
    rows = rows_of(settings.kafka)
    assert rows["dead_letters"] == 0
    assert min(rows["accepted"], rows["rejected"], rows["traces"]) > 0


def test_answers_of_other_nodes_are_continued(
    server: Server, settings: Settings, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    label, line = "foreign", read_target_line(settings).name
    count, tokens = cut_answer(prompts[0], target_outputs[0])
    answer = Answer(line, "another", "r", label, time.time_ns() // 1000, count, tokens)
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    producer.produce(settings.kafka.answers_topic, encode(answer))
    assert producer.flush(20) == 0

    def is_consumed() -> bool:
        server.generate(prompts[1], 4, sampling=WHOLE)  # the corpus and the metrics change while steps run
        return server.metric("aurora_serve_answers_consumed_total") >= 1

    eventually(is_consumed)
    before = server.metric("aurora_serve_suffix_accepted_tokens_total")
    assert output_ids(ask(server, prompts[:1], label)) == target_outputs[:1]
    assert server.metric("aurora_serve_suffix_accepted_tokens_total") > before + 5


def test_a_suffix_drafter_that_fails_leaves_the_drafts_of_the_speculator(
    server: Server, settings: Settings, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    broken = {"custom_params": {"faulty": True, "aurora_trace": "off"}}
    server.generate(prompts[0], 4, sampling=WHOLE | broken)
    answers = ask(server, prompts, "asked")
    assert output_ids(answers) == target_outputs
    eventually(lambda: sum(chunk.envelope.last for chunk in asked(settings)) == 5 * len(prompts))
    last = {chunk.envelope.request: chunk for chunk in asked(settings)}
    steps = [step for answer in answers for step in last[answer["meta_info"]["id"]].verify_steps]
    assert not any(step.draft_sources for step in steps)
    assert server.metric("aurora_serve_drafter_failures_total") == 1
    assert server.process.log.read_text().count("aurora_suffix_drafter_failed") == 1
