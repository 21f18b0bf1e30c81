"""The HTTP API with the real engine and model, and the admin API with a real registry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_node import MODEL, Node
from transformers import AutoTokenizer

from schemas.settings import load
from schemas.speculator import checkpoint
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.network import random_draft
from trainer.release.registry import SpeculatorRegistry

TOKEN = "geheim"
_TALE = "Tell me a tale."
_UNDRAFTED = {"x-aurora-speculate": "off"}


@pytest.fixture(scope="module")
def node(
    smollm2: Path, registry: str, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    flags = {
        "target.path": str(smollm2),
        "traces.enabled": False,
        "registry.tracking_uri": registry,
        "serve.port": free_port(),
        "serve.max_model_len": 256,
        "serve.poll_interval": 0.2,
        "serve.admin_token": TOKEN,
    }
    node = Node(load(environ={}, flags=flags), tmp_path_factory.mktemp("node"))
    try:
        node.wait_ready()
        yield node
    finally:
        node.close()


def complete(node: Node, prompt: Any, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 8} | options
    return node.client.completions.create(model=MODEL, prompt=prompt, **options)


def admin(node: Node, method: str, path: str, **body: Any) -> httpx.Response:
    url = f"{node.url}/admin/speculator{path}"
    return httpx.request(method, url, headers={"authorization": f"Bearer {TOKEN}"}, json=body or None, timeout=60)


def test_every_token_of_a_greedy_answer_is_the_likeliest(node: Node) -> None:
    answer = node.ask("What is the capital of France?", logprobs=True, top_logprobs=5)
    (choice,) = answer.choices
    tokens = choice.logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
        logprobs = [other.logprob for other in token.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert len(logprobs) == 5
        assert all(logprob <= 0 for logprob in logprobs)
    assert bytes(b for t in tokens for b in t.bytes or []).decode() == choice.message.content
    assert (tokens[-1].token, tokens[-1].bytes) == ("<|im_end|>", None)


def test_streamed_log_probabilities_are_those_of_the_whole_answer(node: Node) -> None:
    def fields_of(content: list[Any]) -> list[Any]:
        return [(t.token, pytest.approx(t.logprob, abs=1e-3), len(t.top_logprobs)) for t in content]

    options = {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = node.ask(_TALE, **options).choices[0].logprobs.content
    chunks = [c.choices[0].logprobs for c in node.ask(_TALE, stream=True, **options)]
    assert fields_of([t for logprobs in chunks if logprobs for t in logprobs.content]) == fields_of(whole)


def test_choices_differ_and_are_reproducible_by_their_seed(node: Node) -> None:
    def texts(n: int, seed: int) -> list[str]:
        options: dict[str, Any] = {"temperature": 1, "max_tokens": 10, "extra_headers": _UNDRAFTED}
        return [choice.message.content for choice in node.ask(_TALE, n=n, seed=seed, **options).choices]

    first, second = texts(2, seed=7)
    assert first != second
    assert texts(2, seed=7) == [first, second]
    assert texts(1, seed=8) == [second]


def test_an_answers_message_object_continues_the_conversation(node: Node) -> None:
    def ask(messages: list[Any], **options: Any) -> Any:
        options = {"model": MODEL, "temperature": 0, "max_tokens": 8} | options
        return node.client.chat.completions.create(messages=messages, **options)

    first = {"role": "user", "content": "Say hello."}
    said = ask([first]).choices[0].message
    parts = [{"type": "text", "text": "Again,"}, {"type": "text", "text": "please."}]
    third = {"role": "user", "content": parts}
    answers = [
        ask([first, said, third]),
        ask([first, said.model_dump(), third], temperature=1e-40),
        ask([first, {"role": "assistant", "content": said.content}, {"role": "user", "content": "Again,\nplease."}]),
    ]
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_a_call_and_its_result_are_part_of_the_prompt(node: Node, smollm2: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    answer = node.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, temperature=0)
    turns = [("system", "Be brief."), ("user", "What time is it?"), ("assistant", ""), ("tool", "12:00")]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    assert answer.usage.prompt_tokens == len(tokenizer.encode(text))


def test_half_a_surrogate_pair_and_an_unknown_token_are_rejected(node: Node) -> None:
    def rejected(path: str, **body: Any) -> tuple[int, str]:
        content = json.dumps({"model": MODEL, "max_tokens": 2} | body)
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{node.url}/v1/{path}", content=content, headers=headers)
        return answer.status_code, answer.json()["error"]["param"]

    messages = [{"role": "user", "content": "cut \ud83d off"}]
    assert rejected("chat/completions", messages=messages) == (400, "messages.0.content")
    assert rejected("completions", prompt=[1, 49152]) == (400, "prompt")
    assert rejected("completions", prompt="Hi", stop_token_ids=[49152]) == (400, "stop_token_ids")


def test_a_text_and_its_token_ids_get_the_same_completion(node: Node, smollm2: Path) -> None:
    prompt = "The capital of France is"
    ids = AutoTokenizer.from_pretrained(smollm2, local_files_only=True).encode(prompt)
    answer = complete(node, [prompt, ids], logprobs=1)
    first, second = answer.choices
    assert first.text == second.text
    assert first.text.startswith(" Paris")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 * len(ids), 16)
    placed = zip(first.logprobs.text_offset, first.logprobs.tokens, strict=True)
    assert all(first.text[offset:].startswith(token) for offset, token in placed)
    assert "".join(first.logprobs.tokens) == first.text


def test_stop_strings_and_stop_tokens_are_counted_and_cut_out(node: Node, smollm2: Path) -> None:
    prompt = "The capital of France is"
    (dot,) = AutoTokenizer.from_pretrained(smollm2, local_files_only=True).encode(".")
    for answer in (complete(node, prompt, stop="."), complete(node, prompt, extra_body={"stop_token_ids": [dot]})):
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" Paris", "stop")
        assert answer.usage.completion_tokens == 2


def test_a_pinned_version_serves_until_it_is_unpinned(node: Node, smollm2: Path, tmp_path: Path) -> None:
    status = node.status()
    shape = create_day_0_draft(smollm2, node.settings.speculator).shape
    trainer = SpeculatorRegistry(node.settings.registry)
    versions = []
    for seed in (8, 9):
        checkpoint.write_checkpoint(random_draft(shape, seed=seed), tmp_path / str(seed), status.target)
        versions.append(trainer.register(status.line, tmp_path / str(seed), {}, {}))
    named, other = versions
    trainer.set_alias(status.line, "champion", named)

    pinned = admin(node, "POST", "/pin", version=other).json()
    assert (pinned["version"], pinned["pinned"]) == (other, other)
    raw = node.client.completions.with_raw_response.create(model=MODEL, prompt="Hi", max_tokens=2)
    assert raw.headers["x-aurora-speculator"] == other
    missing = admin(node, "POST", "/pin", version="99")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "version_not_found")
    assert admin(node, "GET", "").json()["pinned"] == other
    unpinned = admin(node, "POST", "/unpin").json()
    assert (unpinned["version"], unpinned["pinned"], unpinned["alias_version"]) == (named, None, named)
    assert not admin(node, "POST", "/off").json()["speculating"]
    assert node.ask("Hi", max_tokens=4).aurora["speculators"] == []
    assert admin(node, "POST", "/on").json()["speculating"]
