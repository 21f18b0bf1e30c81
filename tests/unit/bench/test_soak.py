"""The load, the memory growth and the figures of ``aurora bench soak``."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo_engine import byte_tokenizer
from transformers import AutoTokenizer

from ops.bench.soak import OPTIONS as REQUEST_OPTIONS
from ops.bench.soak import MemorySample, SoakOptions, SoakResult, fit_growth, judge, provide_tools, random_requests
from ops.loadgen.load import Load, Response
from serving.http.requests import ChatRequest

MIB = 1 << 20
OPTIONS = SoakOptions(minutes=1, concurrency=2, swap_every_s=10, leaving=0.1, speculator="math")


def test_growth_before_the_warm_up_does_not_count() -> None:
    filling = [MemorySample(float(s), (100 + 30 * s) * MIB) for s in range(10)]
    flat = [MemorySample(float(s), (400 + s % 2) * MIB) for s in range(10, 40)]
    _, growth = fit_growth([*filling, *flat])
    assert abs(growth) < 0.005


def test_a_leak_is_growth() -> None:
    slope, growth = fit_growth([MemorySample(float(s), 400 * MIB + s * MIB) for s in range(60)])
    assert slope == pytest.approx(MIB)
    assert growth == pytest.approx(39 / 440, rel=0.05)


def test_requests_are_reproducible_and_a_share_disconnects_early() -> None:
    first, again = (list(islice(random_requests("model", leaving=0.3), 400)) for _ in range(2))
    assert first == again
    leaving = [request.disconnect_after for request in first if request.disconnect_after is not None]
    assert 0.2 < len(leaving) / len(first) < 0.4
    assert {request.domain for request in first} == {"code", "math", "sql", "chat"}
    assert {request.body["temperature"] for request in first} == {0.0, 0.8}


def test_the_requests_are_valid_and_have_each_set_of_options() -> None:
    requests = list(islice(random_requests("model", leaving=0.3), 400))
    for request in requests:
        ChatRequest.model_validate(request.body)
    assert all(any(options.items() <= request.body.items() for request in requests) for options in REQUEST_OPTIONS)


def test_a_target_without_tools_gets_a_template_with_tools_and_keeps_its_files(tmp_path: Path) -> None:
    target, tokenizer = tmp_path / "target", byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(target)
    (target / "model.safetensors").write_text("weights")
    folder = provide_tools(target, tmp_path / "with_tools")
    assert (folder / "model.safetensors").read_text() == "weights"
    assert "tools" not in AutoTokenizer.from_pretrained(target).chat_template
    chat = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hello"}], tools=REQUEST_OPTIONS[-1]["tools"], tokenize=False
    )
    assert '"name": "answer"' in chat
    assert "hello" in chat
    assert provide_tools(folder, tmp_path / "again") == folder


def result(**changed: Any) -> SoakResult:
    load = Load("http://node", [], 2)
    load.responses.append(Response("1", "math", 0.0, 1.0, output_tokens=120))
    swaps = [SimpleNamespace(pause_ms=0.5)] * 3
    status = {"rows_captured": 10, "rows_published": 9, "rows_dropped": 1, "rows_pending": 0, "swaps": swaps}
    memory = tuple(MemorySample(float(s), 400 * MIB) for s in range(30))
    fields: Any = SimpleNamespace(**status | {"versions_rejected": []} | changed)
    return SoakResult(load, fields, rows_in_topic=9, memory=memory, exit_code=0)


def test_a_soak_that_accounts_for_every_row_passes() -> None:
    figures = {figure.name: figure for figure in judge(result(), OPTIONS)}
    assert all(figure.met is not False for figure in figures.values())
    assert figures["tokens_per_s"].value == 2


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"rows_dropped": 0}, {"rows_unaccounted"}),
        ({"rows_published": 8, "rows_dropped": 2}, {"rows_not_as_in_topic"}),
        ({"rows_pending": 1, "rows_dropped": 0}, {"rows_pending"}),
        ({"swaps": []}, {"swaps"}),
    ],
)
def test_a_fault_misses_its_goal(changed: dict[str, Any], missed: set[str]) -> None:
    assert {figure.name for figure in judge(result(**changed), OPTIONS) if figure.met is False} == missed
