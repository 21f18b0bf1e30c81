"""The sampled share is exact by request, the budget is never exceeded, and what it pays for is what teaches most."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from api_node import running_node
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import LINE, TARGET, TOP_K, WIDTH, verify_step_of
from trace_bench import Bench, eventually

from schemas.trace.record import Chunk, Envelope, VerifyStep
from serving.engines.base import Request
from serving.traces.chunks import message_bytes
from serving.traces.sampling import MAX_WAIT_S, BudgetQueue, TokenBucket, is_sampled, predicted_share
from trainer.data.data_loader import is_held_out

ENVELOPE = Envelope(
    request="r",
    chunk=0,
    last=True,
    node="node-0",
    target=TARGET,
    line=LINE,
    features="inline",
    feature_width=WIDTH,
    top_k=TOP_K,
    temperature=0.0,
    top_p=1.0,
)
DRAFTED = 3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher looks for verify steps more often, so that no test waits for it."""
    monkeypatch.setattr("serving.traces.publisher._PAUSE_S", 0.002)


def answer(accepted: list[int]) -> tuple[VerifyStep, ...]:
    """A prompt and a verify step for each number of accepted tokens."""
    verify_steps, at = [verify_step_of(0, 0, (1, 2, 3), 4)], 3
    for number, kept in enumerate(accepted, start=1):
        draft = range(5, 5 + DRAFTED)
        verify_steps.append(verify_step_of(number, at, (4, *draft[:kept]), 4, draft))
        at += 1 + kept
    return tuple(verify_steps)


def chunk_of(accepted: list[int], request: str = "r") -> Chunk:
    return Chunk(replace(ENVELOPE, request=request), answer(accepted))


def test_the_share_is_taken_by_request_and_independently_of_what_the_trainer_holds_back() -> None:
    ids = [f"chatcmpl-{i}" for i in range(4000)]
    sampled = [i for i in ids if is_sampled(i, 0.25)]
    assert len(sampled) == pytest.approx(1000, abs=110)
    assert [i for i in ids if is_sampled(i, 0.25)] == sampled
    assert set(sampled) <= {i for i in ids if is_sampled(i, 0.5)}
    assert (any(is_sampled(i, 0.0) for i in ids), all(is_sampled(i, 1.0) for i in ids)) == (False, True)
    # By one hash for both, a trainer that holds back a quarter would get nothing to learn from this node.
    assert sum(is_held_out(i, 0.25) for i in sampled) == pytest.approx(250, abs=60)


@pytest.mark.parametrize(
    ("accepted", "share"),
    [([0, 0], 0.0), ([3, 3], 0.75), ([1, 0], 1 / 3), ([], 1.0)],
)
def test_what_was_foreseen_is_the_accepted_share_of_the_answer(accepted: list[int], share: float) -> None:
    assert predicted_share(chunk_of(accepted)) == pytest.approx(share)


def test_verify_steps_that_were_not_drafted_for_count_as_unforeseen() -> None:
    undrafted = (verify_step_of(0, 0, (1, 2, 3), 4), verify_step_of(1, 3, (4,), 5))
    assert predicted_share(Chunk(ENVELOPE, undrafted)) == 0.0


@settings(deadline=None)
@given(
    rate=st.floats(0, 1000),
    burst=st.floats(1, 5000),
    asked=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 6000)), max_size=40),
)
def test_over_no_window_more_is_paid_than_the_rate_and_one_burst(
    rate: float, burst: float, asked: list[tuple[float, int]]
) -> None:
    bucket, paid = TokenBucket(rate, burst), []
    for now, size in zip(accumulate(passes for passes, _ in asked), (size for _, size in asked), strict=True):
        if size <= burst and bucket.affords(size, now):
            bucket.pay(size)
            paid.append((now, size))
    for i, (begin, _) in enumerate(paid):
        for j in range(i, len(paid)):
            assert sum(size for _, size in paid[i : j + 1]) <= rate * (paid[j][0] - begin) + burst + 1e-6


def test_a_bucket_that_earns_nothing_and_begins_empty_pays_nothing() -> None:
    assert not TokenBucket(0, 0).affords(1, 1e9)


def test_what_is_larger_than_the_burst_waits_for_a_full_bucket_only() -> None:
    bucket = TokenBucket(10, 100)
    assert bucket.affords(10**6, 0)
    bucket.pay(50)
    assert [bucket.affords(10**6, now) for now in (4.9, 5.1)] == [False, True]


@settings(deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(0, DRAFTED), max_size=4), max_size=12),
    sizes=st.lists(st.integers(1, 100), min_size=12, max_size=12),
    limit=st.integers(0, 600),
    level=st.integers(100, 600),
)
def test_the_room_lets_in_whom_it_can_and_out_whom_the_budget_pays_hardest_first(
    chunks: list[list[int]], sizes: list[int], limit: int, level: int
) -> None:
    room = BudgetQueue(TokenBucket(0, level), limit)
    inside: dict[str, tuple[float, int]] = {}
    for i, accepted in enumerate(chunks):
        chunk = chunk_of(accepted, str(i))
        room.push(chunk, sizes[i], 0.0)
        inside[str(i)] = (predicted_share(chunk), sizes[i])
    for gone in room.evict(1.0):
        assert sum(size for _, size in inside.values()) > limit
        assert predicted_share(gone) == max(share for share, _ in inside.values())
        del inside[gone.envelope.request]
    assert sum(size for _, size in inside.values()) <= limit
    spent = 0
    while chunk_out := room.pop(2.0):
        share, size = inside.pop(chunk_out.envelope.request)
        assert all(share <= other for other, _ in inside.values())
        room.pay(size)
        spent += size
        assert spent <= level
    waiting = sorted((share, int(name)) for name, (share, _) in inside.items())
    assert [int(c.envelope.request) for c in room.clear()] == [name for _, name in waiting]


def test_who_waited_too_long_is_let_out_whatever_it_teaches() -> None:
    room = BudgetQueue(TokenBucket(0, 0), 10**6)
    room.push(chunk_of([0], "hard"), 10, 0.0)
    room.push(chunk_of([3], "easy"), 10, 1.0)
    assert room.evict(MAX_WAIT_S - 0.1) == []
    assert [c.envelope.request for c in room.evict(MAX_WAIT_S)] == ["hard"]
    assert [c.envelope.request for c in room.evict(MAX_WAIT_S + 1)] == ["easy"]
    assert room.pop(MAX_WAIT_S + 2) is None


def send(bench: Bench, accepted: list[int]) -> str:
    bench.sent += 1
    request = Request(f"chatcmpl-{bench.sent}", (1, 2, 3), 64)
    for r in (verify_steps := answer(accepted)):
        bench.publisher.record(request, (r,), "stop" if r is verify_steps[-1] else None)
    return request.id


def weight(bench: Bench, number: int) -> int:
    key = bench.producer.delivered[number].envelope.request.encode()
    return message_bytes(bench.producer.values[number], key, bench.producer.headers[number])


def balanced(bench: Bench) -> bool:
    counts = bench.publisher.counts()
    return counts.captured == counts.published + counts.rows_dropped + counts.pending


@pytest.mark.parametrize("rate", [4_000, 8_000])
def test_a_binding_budget_is_kept_and_prefers_what_was_not_foreseen(rate: int) -> None:
    bench, rng = Bench(max_bytes_per_second=rate), np.random.default_rng(0)
    captured, hard = Counter[bool](), set()
    sent_at: list[float] = []
    for _ in range(60):
        for _ in range(4):
            difficult = bool(rng.integers(0, 2))
            request = send(bench, [int(k) for k in rng.integers(0, 2 if difficult else 4, 8)])
            captured[difficult] += 9
            hard |= {request} if difficult else set()
        bench.settle()
        assert balanced(bench)
        sent_at += [bench.now] * (len(bench.producer.delivered) - len(sent_at))
        bench.now += 0.5
    burst = max(2 * rate, 20_000)
    weights = [weight(bench, i) for i in range(len(sent_at))]
    for i, begin in enumerate(sent_at):
        for j in range(i, len(sent_at)):
            assert sum(weights[i : j + 1]) <= rate * (sent_at[j] - begin) + burst
    published = Counter[bool]()
    for chunk in bench.producer.delivered:
        published[chunk.envelope.request in hard] += len(chunk.verify_steps)
    counts = bench.publisher.close(1)
    assert counts.dropped["budget"] > 0
    assert (counts.pending, balanced(bench)) == (0, True)
    shares = {kind: published[kind] / captured[kind] for kind in (True, False)}
    assert shares[True] > 2 * shares[False], shares


def test_a_budget_that_does_not_bind_sheds_nothing() -> None:
    bench = Bench(max_bytes_per_second=10**7)
    for accepted in ([0], [3], [1]):
        send(bench, accepted)
    counts = bench.publisher.close(1)
    assert (counts.published, counts.dropped) == (6, {})


def test_without_any_budget_nothing_is_published_and_everything_is_counted() -> None:
    bench = Bench(max_bytes_per_second=1)
    bench.publisher._budget = BudgetQueue(TokenBucket(0, 0), 1 << 20)
    for _ in range(5):
        send(bench, [1, 1])
    bench.settle()
    assert (bench.publisher.counts().pending, bench.producer.delivered) == (15, [])
    bench.now += MAX_WAIT_S
    eventually(lambda: bench.publisher.counts().dropped == {"budget": 15})
    send(bench, [1, 1])
    counts = bench.publisher.close(1)
    assert (counts.captured, counts.published, counts.dropped, counts.pending) == (18, 0, {"budget": 18}, 0)


def test_while_too_much_waits_the_easiest_go_although_new_ones_come() -> None:
    bench = Bench(max_bytes_per_second=1, max_queue_bytes=1 << 20)
    bench.publisher._budget = BudgetQueue(TokenBucket(0, 0), 30_000)
    hard = send(bench, [0] * 8)
    bench.settle()
    for _ in range(5):
        send(bench, [3] * 8)
    bench.settle()
    assert bench.publisher.counts().dropped["budget"] > 0
    assert bench.publisher._budget.clear()[0].envelope.request == hard


def test_requests_outside_the_share_are_counted_and_the_others_are_not() -> None:
    bench = Bench(sample_ratio=0.5)
    wanted = [bench.publisher.sample(f"chatcmpl-{i}") for i in range(200)]
    counts = bench.publisher.close(1)
    assert wanted == [is_sampled(f"chatcmpl-{i}", 0.5) for i in range(200)]
    assert (counts.unsampled, counts.captured) == (wanted.count(False), 0)
    metrics = {s.name: s.value for metric in bench.publisher.collect() for s in metric.samples}
    assert metrics["aurora_serve_trace_requests_unsampled_total"] == wanted.count(False)


def test_a_node_traces_the_sampled_requests_and_none_whose_client_said_off() -> None:
    asked: list[str] = []

    def traced(request: str) -> bool:
        asked.append(request)
        return len(asked) % 2 == 0

    with running_node(traced=traced) as node:
        node.ask(n=4)
        node.ask(extra_headers={"x-aurora-trace": "off"})
        assert [request.trace for request in node.engine.requests] == [False, True, False, True, False]
        assert asked == [request.id for request in node.engine.requests[:4]]
