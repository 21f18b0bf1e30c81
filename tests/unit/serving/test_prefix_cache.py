"""The prefix cache gives a sequence the blocks of an equal prefix, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from engine_outputs import Recorder, collect, submit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_target import VOCABULARY, write_tiny_target

from pipeline.batches import Record, build
from schemas.settings import SettingsError, load
from schemas.speculator.network import random_draft
from schemas.telemetry.trace_context import TraceContext
from schemas.trace.record import VerifyStep, encode
from serving.engines.base import Output, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.kv_cache import KVCache
from serving.engines.builtin.prefix_cache import BLOCK_TOKENS, PrefixCache
from serving.engines.builtin.sequence import Sequence
from serving.traces.chunks import ChunkBuilder, ChunkSize, FeatureTransport, Origin, message_headers

WIDTH, POSITIONS = 3, 160
BLOCK_BYTES = 2 * 2 * 1 * BLOCK_TOKENS * 4 * 4 + BLOCK_TOKENS * WIDTH * 2


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(1 + (seed + i * i) % (VOCABULARY - 1) for i in range(length))


@dataclass
class World:
    """A prefix cache over a KV cache whose entries tell which tokens they were computed from."""

    slots: KVCache
    cache: PrefixCache

    @classmethod
    def create(cls, blocks: int, scope: str = "node") -> "World":
        slots = KVCache(2, 3, 1, POSITIONS, 4)
        slots.clear(slice(None))
        return cls(slots, PrefixCache(slots, WIDTH, blocks * BLOCK_BYTES, scope))  # type: ignore[arg-type]

    def start(self, tokens: tuple[int, ...], slot: int = 0, **options: object) -> Sequence:
        request = Request("r", tokens, 8, **options)  # type: ignore[arg-type]
        return Sequence(
            request, lambda _: None, len(tokens) + 8, 0, list(tokens), slot=slot, root=self.cache.choose_root(request)
        )

    def read(self, seq: Sequence, limit: int | None = None) -> int:
        """Prefill a sequence, up to ``limit`` computed tokens; return the number of tokens from the cache."""
        before = seq.num_prefix_tokens
        self.cache.load(seq)
        end = len(seq.request.prompt) if limit is None else min(seq.num_cached_tokens + limit, len(seq.request.prompt))
        for at in range(seq.num_cached_tokens, end):
            for values in (self.slots._keys, self.slots._values):
                values[:, seq.slot, :, at] = fingerprint(seq.tokens[: at + 1])
        features = [features_of(seq.tokens[: at + 1]) for at in range(seq.num_cached_tokens, end)]
        if features:
            seq.commit(torch.stack(features), [], 0, [])
        self.cache.store(seq)
        return seq.num_prefix_tokens - before

    def assert_holds(self, seq: Sequence) -> None:
        """Assert that slot and features are those of the sequence's own tokens."""
        for at in range(seq.num_cached_tokens):
            expected = fingerprint(seq.tokens[: at + 1])
            for values in (self.slots._keys, self.slots._values):
                assert (values[:, seq.slot, :, at] == expected).all(), at
        found = torch.cat(seq.unseen_features)
        assert torch.equal(found, torch.stack([features_of(seq.tokens[: n + 1]) for n in range(len(found))]))


def fingerprint(tokens: list[int]) -> float:
    return float(hash(tuple(tokens)) % (1 << 20))


def features_of(tokens: list[int]) -> torch.Tensor:
    """Exact in bf16."""
    return torch.full((WIDTH,), float(hash(tuple(tokens)) % 256))


def reuse_of_endless_cache(earlier: list[tuple[int, ...]], tokens: tuple[int, ...]) -> int:
    """Tokens that a cache without a bound must supply: whole blocks of the longest common prefix."""
    longest = 0
    for other in earlier:
        common = next((i for i, (a, b) in enumerate(zip(other, tokens, strict=False)) if a != b), None)
        longest = max(longest, min(len(other), len(tokens)) if common is None else common)
    return min(longest, len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


pieces = st.lists(st.sampled_from([(1,) * 16, (2,) * 16, (1,) * 15 + (2,), (3,) * 5, (4,)]), min_size=1, max_size=8)
prompts = pieces.map(lambda parts: tuple(token for part in parts for token in part))


@settings(deadline=None, max_examples=200)
@given(st.lists(prompts, min_size=1, max_size=12))
def test_whole_blocks_of_the_longest_common_prefix_are_reused(sent: list[tuple[int, ...]]) -> None:
    world = World.create(blocks=200)
    for number, tokens in enumerate(sent):
        seq = world.start(tokens, slot=number % 3)
        assert world.read(seq) == reuse_of_endless_cache(sent[:number], tokens)
        world.assert_holds(seq)


@settings(deadline=None, max_examples=200)
@given(blocks=st.integers(1, 6), sent=st.lists(st.tuples(prompts, st.integers(1, 40)), min_size=1, max_size=20))
def test_a_bounded_cache_evicts_and_never_supplies_other_tokens(
    blocks: int, sent: list[tuple[tuple[int, ...], int]]
) -> None:
    world = World.create(blocks)
    for number, (tokens, limit) in enumerate(sent):
        seq = world.start(tokens, slot=number % 3)
        earlier = [other for other, _ in sent[:number]]
        assert world.read(seq, limit) <= reuse_of_endless_cache(earlier, tokens)
        while seq.is_prefilling:
            world.read(seq, limit)
        world.assert_holds(seq)
        assert world.cache.nbytes <= blocks * BLOCK_BYTES
        # A block is reachable from its root, so none takes space in vain.
        numbers = {block.number for block in world.cache._blocks.values()}
        assert all(key.parent in numbers for key in world.cache._blocks if isinstance(key.parent, int))
        assert len(world.cache._blocks) + len(world.cache._free_rows) == blocks


def test_the_block_used_least_recently_is_evicted() -> None:
    world = World.create(blocks=2)
    first, second, third = ((token,) * 17 for token in (1, 2, 3))
    for tokens in (first, second, first, third):
        world.read(world.start(tokens))
    assert world.cache.evictions == 1
    assert [world.read(world.start(tokens)) for tokens in (first, third, second)] == [16, 16, 0]


def test_equal_hashes_of_different_blocks_are_not_confused() -> None:
    # In CPython -1 and -2 have the same hash, and so have tuples of them.
    assert hash((-1,) * 16) == hash((-2,) * 16)
    world = World.create(blocks=8)
    world.read(world.start((-1,) * 33))
    assert world.read(world.start((-2,) * 33)) == 0
    assert world.read(world.start((-1,) * 33)) == 32


@pytest.mark.parametrize(
    ("scope", "first", "second", "shared"),
    [
        ("node", {}, {}, True),
        ("node", {"label": "a"}, {"label": "b"}, True),
        ("node", {"cache_salt": "x"}, {}, False),
        ("label", {}, {}, False),
        ("label", {"label": "a"}, {"label": "a"}, True),
        ("label", {"label": "a"}, {"label": "b"}, False),
        ("label", {"label": "a"}, {"label": "a", "cache_salt": "x"}, False),
        ("label", {"cache_salt": "x"}, {"cache_salt": "x"}, True),
        ("label", {"cache_salt": "x"}, {"label": "x"}, False),
        ("label", {"group": "g"}, {"group": "g"}, True),
        ("label", {"group": "g"}, {"cache_salt": "g"}, False),
        ("request", {"label": "a"}, {"label": "a"}, False),
        ("request", {"cache_salt": "x"}, {"cache_salt": "x"}, False),
        ("request", {"group": "g"}, {"group": "g"}, True),
        ("request", {"group": "g"}, {"group": "h"}, False),
    ],
)
def test_only_requests_of_one_scope_share_prefixes(
    scope: str, first: dict[str, str], second: dict[str, str], shared: bool
) -> None:
    world = World.create(blocks=8, scope=scope)
    world.read(world.start(prompt_of(40), **first))
    assert (world.read(world.start(prompt_of(40), **second)) > 0) is shared


def test_an_answer_is_cached_for_the_next_turn_unless_only_choices_share() -> None:
    for options, expected in (({"label": "a"}, 48), ({"group": "g"}, 16)):
        world = World.create(blocks=8, scope="label")
        seq = world.start(prompt_of(20), **options)
        world.read(seq)
        answer = prompt_of(30, seed=7)
        for token in answer:
            seq.commit(features_of([token])[None], [token], 0, [])
            world.cache.store(seq)
        again = world.start((*prompt_of(20), *answer, 5), **options)
        assert world.read(again) == expected


def test_a_request_for_prompt_logprobs_reads_its_whole_prompt() -> None:
    world = World.create(blocks=8)
    world.read(world.start(prompt_of(40)))
    assert world.read(world.start(prompt_of(40), prompt_logprobs=0)) == 0


def test_a_bound_below_one_block_is_rejected_and_zero_caches_nothing() -> None:
    with pytest.raises(SettingsError, match=r"serve\.prefix_cache_bytes is 100, but 16 tokens"):
        PrefixCache(KVCache(2, 3, 1, POSITIONS, 4), WIDTH, 100, "node")
    world = World.create(blocks=0)
    assert world.cache.choose_root(Request("r", (1,), 1, group="g")) is None
    assert not world.cache.is_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


def create_engine(folder: Path, recorder: Recorder | None = None, **flags: object) -> BuiltinEngine:
    ours: dict[str, object] = {
        "target.path": str(folder),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.weight_dtype": "float32",
        "serve.prefix_scope": "node",
        "serve.max_model_len": 240,
        "serve.max_num_seqs": 4,
        "serve.adaptive_drafting": False,
    }
    named = {name.replace("__", "."): value for name, value in flags.items()}
    engine = BuiltinEngine(load(environ={}, flags=ours | named), recorder)
    engine.start()
    return engine


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def engine(folder: Path, recorder: Recorder) -> Iterator[BuiltinEngine]:
    engine = create_engine(folder, recorder)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[BuiltinEngine]:
    """The same engine without a prefix cache."""
    engine = create_engine(folder, serve__prefix_cache_bytes=0)
    yield engine
    engine.stop()


def generate(engine: BuiltinEngine, name: str, prompt: tuple[int, ...], length: int = 20) -> tuple[list[int], Output]:
    return collect(submit(engine, Request(name, prompt, length, ignore_eos=True)))


def cached(last: Output) -> int:
    assert last.stats is not None
    return last.stats.cached_tokens


def test_the_second_turn_prefills_only_what_is_new(engine: BuiltinEngine, plain: BuiltinEngine) -> None:
    first = prompt_of(90)
    answer, last = generate(engine, "first", first, 40)
    assert cached(last) == 0
    second = (*first, *answer, *prompt_of(10, seed=3))
    again, last = generate(engine, "second", second)
    # The target has not consumed the last token of the answer.
    assert cached(last) == (90 + 39) // BLOCK_TOKENS * BLOCK_TOKENS
    assert again == generate(plain, "plain", second)[0]


def test_choices_prefill_their_prompt_once(engine: BuiltinEngine, plain: BuiltinEngine) -> None:
    prompt = prompt_of(200, seed=11)
    requests = [Request(f"n-{i}", prompt, 10, ignore_eos=True, group="n") for i in range(4)]
    ends = [collect(outputs) for outputs in [submit(engine, request) for request in requests]]
    assert [cached(last) for _, last in ends] == [0, 192, 192, 192]
    assert [tokens for tokens, _ in ends] == [generate(plain, "plain", prompt, 10)[0]] * 4


def test_the_second_choice_continues_where_a_cancelled_one_stopped(folder: Path, plain: BuiltinEngine) -> None:
    engine = create_engine(folder)
    prompt, ended = prompt_of(220, seed=13), SimpleQueue[Output]()
    forward, calls = engine._target.forward, 0

    def cancel_after_first(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            engine.cancel("first")
        return forward(*args)  # type: ignore[arg-type]

    engine._target.forward = cancel_after_first  # type: ignore[method-assign]
    engine.submit(Request("first", prompt, 10, group="g"), ended.put)
    tokens, last = generate(engine, "second", prompt, 10)
    assert ended.get(timeout=60).finish == "cancelled"
    assert cached(last) == 128
    assert tokens == generate(plain, "plain", prompt, 10)[0]
    engine.stop()


requests_sent = st.lists(
    st.tuples(prompts.filter(lambda p: len(p) < 200), st.integers(1, 12), st.integers(-3, 3)), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=requests_sent, blocks=st.sampled_from([1, 3, 8, 300]))
def test_greedy_output_is_the_same_with_and_without_a_cache_under_swaps_and_cancels(
    folder: Path, plain: BuiltinEngine, sent: list[tuple[tuple[int, ...], int, int]], blocks: int
) -> None:
    if blocks not in SHARED:
        SHARED[blocks] = create_engine(folder, serve__prefix_cache_bytes=blocks * plain.prefix_cache._block_bytes)
    engine, waiting = SHARED[blocks], []
    for number, (prompt, length, change) in enumerate(sent):
        waiting.append(submit(engine, Request(f"r{number}", prompt, length, ignore_eos=True)))
        if change > 0:
            engine.swap(random_draft(engine._target.shape, change), str(change))
        elif change == -3:
            engine.cancel(f"r{number}")
    for (prompt, length, change), outputs in zip(sent, waiting, strict=True):
        tokens, last = collect(outputs)
        expected, _ = generate(plain, "plain", prompt, length)
        assert tokens == expected[: len(tokens)]
        assert len(tokens) == length or (change == -3 and last.finish == "cancelled")
    assert engine.prefix_cache.failures == 0


SHARED: dict[int, BuiltinEngine] = {}
"""Engines by number of blocks; they live as long as the process."""


def test_the_speculator_drafts_the_same_after_cached_tokens(engine: BuiltinEngine, plain: BuiltinEngine) -> None:
    prompt = prompt_of(100, seed=5)
    generate(engine, "first", prompt, 2)
    _, last = generate(engine, "second", prompt, 60)
    _, alone = generate(plain, "plain", prompt, 60)
    assert cached(last) == 96
    assert last.stats is not None
    assert alone.stats is not None
    assert last.stats.draft_tokens > 0
    # The features of cached tokens are rounded to bf16, which the draft's weights are as well.
    assert abs(last.stats.accepted_tokens - alone.stats.accepted_tokens) <= 2


def test_a_trace_has_the_features_of_cached_tokens(engine: BuiltinEngine, recorder: Recorder) -> None:
    prompt = prompt_of(100, seed=17)
    for name in ("computed", "cached"):
        generate(engine, name, prompt)
    computed, found = (recorder.verify_steps[name] for name in ("computed", "cached"))
    assert [(step.position, len(step.tokens), step.bonus is None) for step in found[:2]] == [
        (0, 96, True),
        (96, 4, False),
    ]
    samples = [accepted_sample(name, prompt, steps) for name, steps in (("a", computed), ("b", found))]
    assert samples[0]["tokens"] == samples[1]["tokens"]
    first, second = (torch.frombuffer(bytearray(s["features"]), dtype=torch.bfloat16).float() for s in samples)
    torch.testing.assert_close(second, first, rtol=2e-2, atol=2e-2)


def accepted_sample(name: str, prompt: tuple[int, ...], steps: list[VerifyStep]) -> dict[str, object]:
    """The row that the stream worker builds from a trace."""
    transport = FeatureTransport("inline", ChunkSize(1 << 20, 1 << 20))
    builder = ChunkBuilder(Request(name, prompt, 20), Origin("node", "target", "line", VOCABULARY), transport)
    assert all(builder.add(step) is None for step in steps)
    chunk = builder.end("length")
    assert chunk is not None
    assert chunk.envelope.chunk == 0
    context = TraceContext("1" * 32, "2" * 16)
    headers: Any = tuple(message_headers(chunk, context))
    built = build([Record("traces", 0, 0, 0, name.encode(), encode(chunk), headers)], 32)
    assert not built.dead_letters
    assert built.chunk_gaps == 0
    (row,) = built.rows["accepted"].to_pylist()
    return row


def test_a_failing_cache_is_turned_off_and_every_request_is_answered(
    engine: BuiltinEngine, plain: BuiltinEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(100, seed=19)
    expected, _ = generate(plain, "plain", prompt)
    generate(engine, "first", prompt)

    def boom(*_args: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(engine._target.cache, "copy_in", boom)
    tokens, last = generate(engine, "failing", prompt)
    assert (tokens, last.finish, cached(last)) == (expected, "length", 0)
    assert (engine.prefix_cache.failures, engine.prefix_cache.is_on, engine.prefix_cache.nbytes) == (1, False, 0)
    assert generate(engine, "after", prompt)[0] == expected
    assert engine.health().alive


def test_the_blocks_of_a_failed_sequence_are_removed(engine: BuiltinEngine) -> None:
    def fail(_output: Output) -> None:
        raise RuntimeError("boom")

    prompt = prompt_of(60, seed=23)
    engine.submit(Request("failing", prompt, 4), fail)
    _, last = generate(engine, "after", prompt_of(5), 2)
    assert last.finish == "length"
    _, last = generate(engine, "again", prompt)
    assert cached(last) == 0


def test_metrics_start_at_zero(engine: BuiltinEngine) -> None:
    values = {s.name: s.value for metric in engine.prefix_cache.collect() for s in metric.samples}
    assert len(values) == 5
    assert set(values.values()) == {0}
