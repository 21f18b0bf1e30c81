"""Requests with one prompt are held out together: its choices, its retries, and the turns of its conversation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from api_node import Node, running_node
from data_loader_world import RATIO, MemoryLog, World, drain, names
from deltalake import DeltaTable
from recorded import LINE, TARGET, conversation

from pipeline.delta import TABLE_PROPERTIES
from schemas.batches import ACCEPTED, PARTITIONED_BY
from serving.engines.base import Request
from serving.engines.plugin.trace_options import TraceOptions
from serving.engines.sglang.plugin.trace_request import to_request
from serving.traces.chunks import ChunkBuilder, ChunkSize, FeatureTransport, Origin
from trainer.data.held_out import is_held_out

CONVERSATIONS = 24
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def chat(node: Node, *messages: tuple[str, object], **options: object) -> list[Request]:
    """Return the requests that the engine gets for a chat."""
    before = len(node.engine.requests)
    named = [{"role": role, "content": content} for role, content in messages]
    node.post(messages=named, max_tokens=2, **options).raise_for_status()
    return node.engine.requests[before:]


def traced_key(request: Request) -> str | None:
    """Return the prompt key in the chunks of a request."""
    builder = ChunkBuilder(request, Origin("node-0", TARGET, LINE), FeatureTransport("inline", ChunkSize(1 << 20)))
    builder.add(conversation(range(9), 4)[0])
    chunk = builder.end("stop")
    assert chunk is not None
    return chunk.envelope.prompt_key


def split(requests: Mapping[str, str | None]) -> tuple[set[str], set[str]]:
    """Return the ids of requests that a data loader trains on, and those that it holds out, by their prompt keys."""
    world = World(MemoryLog())
    for key in dict.fromkeys(requests.values()):
        world.commit([request for request, of in requests.items() if of == key], prompt_key=key)
    loader = world.data_loader(batch_size=1, replay_batch_size=0, max_epochs=1, held_out_samples=len(requests))
    trained = {name for step in drain(loader) for name in step}
    return trained, set(names(loader.held_out))


def test_choices_retries_and_turns_of_a_conversation_are_held_out_together(node: Node) -> None:
    conversations: dict[str, list[Request]] = defaultdict(list)
    for number in range(CONVERSATIONS):
        first = "user", f"Question {number}?"
        conversations[first[1]] += chat(node, first, n=3)
        conversations[first[1]] += chat(node, ("system", SYSTEM), first)
        conversations[first[1]] += chat(node, ("user", [{"type": "text", "text": first[1]}]))
        later = ("assistant", f"Answer {number}."), ("user", "And why?")
        conversations[first[1]] += chat(node, ("system", f"It is {number} o'clock."), first, *later)
    keys = {request.id: traced_key(request) for requests in conversations.values() for request in requests}
    assert len(set(keys.values())) == CONVERSATIONS
    trained, held_out = split(keys)
    sides = [{request.id in held_out for request in requests} for requests in conversations.values()]
    assert all(len(side) == 1 for side in sides)
    assert len(trained) + len(held_out) == len(keys) == 6 * CONVERSATIONS
    assert trained
    assert held_out


def test_prompts_with_one_system_prompt_are_split_by_the_configured_ratio(node: Node) -> None:
    keys = [chat(node, ("system", SYSTEM), ("user", f"Question {n}?"))[0].prompt_key for n in range(200)]
    assert len(set(keys)) == 200
    held_out = sum(is_held_out(key, RATIO) for key in keys if key is not None)
    # 50 on average, with a standard deviation of 6.
    assert 25 < held_out < 75


class SglangRequest:
    """What the plugin reads of SGLang's request."""

    class sampling_params:  # noqa: N801 - SGLang's name
        top_k, top_p, temperature, max_new_tokens, sampling_seed = 1, 1.0, 1.0, 4, None

    def __init__(self, rid: str, origin_input_ids: Sequence[int]) -> None:
        self.rid, self.origin_input_ids = rid, origin_input_ids


def test_where_only_token_ids_are_known_equal_prompts_are_held_out_together(node: Node) -> None:
    before = len(node.engine.requests)
    node.complete(["one", "two"], n=2)
    node.complete("one")
    of_text = {request.id: traced_key(request) for request in node.engine.requests[before:]}
    assert len(set(of_text.values())) == 2
    tokens = node.engine.requests[-1].prompt
    of_sglang = [to_request(SglangRequest(name, tokens), TraceOptions()) for name in ("first", "retry")]
    assert {traced_key(request) for request in of_sglang} == {traced_key(node.engine.requests[-1])}
    assert traced_key(replace(of_sglang[0], prompt=(*tokens, 1))) not in set(of_text.values())


def test_a_chat_without_a_user_message_is_split_by_its_token_ids(node: Node) -> None:
    first, second, other = (chat(node, ("system", text))[0] for text in ("Say hello.", "Say hello.", "Say more."))
    assert first.prompt_key is None
    assert traced_key(first) == traced_key(second) != traced_key(other)


def test_requests_of_older_nodes_and_tables_are_split_by_their_id(tmp_path: Path) -> None:
    folder = f"{tmp_path}/accepted"
    older = [field for field in ACCEPTED if field.name != "prompt_key"]
    DeltaTable.create(
        folder, pa.schema(older), partition_by=list(PARTITIONED_BY["accepted"]), configuration=TABLE_PROPERTIES
    )
    ids = [f"request-{number}" for number in range(12)]
    world = World.on_disk(tmp_path)
    world.commit(ids[:6])
    world.commit(ids[6:], prompt_key=next(key for key in "abcdefgh" if is_held_out(key, RATIO)))
    loader = world.data_loader(batch_size=1, replay_batch_size=0, max_epochs=1, held_out_samples=96)
    trained = {name for step in drain(loader) for name in step}
    expected = {name for name in ids[:6] if is_held_out(name, RATIO)}
    assert trained == set(ids[:6]) - expected
    assert set(names(loader.held_out)) == expected | set(ids[6:])
    assert expected
