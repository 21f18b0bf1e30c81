"""Requests are sampled whole, no verify step is dropped for the budget, and the budget for features goes to the most
informative chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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
from trainer.data.held_out import is_held_out

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
def fast_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the publisher read its queue more often, so that no test waits for it."""
    monkeypatch.setattr("serving.traces.publisher._PAUSE_S", 0.002)


def answer(accepted: list[int]) -> tuple[VerifyStep, ...]:
    """Return a prefill and one verify step per number of accepted tokens."""
    verify_steps, at = [verify_step_of(0, 0, (1, 2, 3), 4)], 3
    for number, kept in enumerate(accepted, start=1):
        draft = range(5, 5 + DRAFTED)
        verify_steps.append(verify_step_of(number, at, (4, *draft[:kept]), 4, draft))
        at += 1 + kept
    return tuple(verify_steps)


def chunk_of(accepted: list[int], request: str = "r") -> Chunk:
    return Chunk(replace(ENVELOPE, request=request), answer(accepted))


def test_requests_are_sampled_independently_of_the_held_out_set() -> None:
    ids = [f"chatcmpl-{i}" for i in range(4000)]
    sampled = [i for i in ids if is_sampled(i, 0.25)]
    assert len(sampled) == pytest.approx(1000, abs=110)
    assert [i for i in ids if is_sampled(i, 0.25)] == sampled
    assert set(sampled) <= {i for i in ids if is_sampled(i, 0.5)}
    assert (any(is_sampled(i, 0.0) for i in ids), all(is_sampled(i, 1.0) for i in ids)) == (False, True)
    # With one hash for both, all sampled requests would be held out and none trained on.
    assert sum(is_held_out(i, 0.25) for i in sampled) == pytest.approx(250, abs=60)


@pytest.mark.parametrize(
    ("accepted", "share"),
    [([0, 0], 0.0), ([3, 3], 0.75), ([1, 0], 1 / 3), ([], 1.0)],
)
def test_the_predicted_share_is_the_accepted_share_of_the_answer(accepted: list[int], share: float) -> None:
    assert predicted_share(chunk_of(accepted)) == pytest.approx(share)


def test_verify_steps_without_a_draft_count_as_not_predicted() -> None:
    undrafted = (verify_step_of(0, 0, (1, 2, 3), 4), verify_step_of(1, 3, (4,), 5))
    assert predicted_share(Chunk(ENVELOPE, undrafted)) == 0.0


@settings(deadline=None)
@given(
    rate=st.floats(0, 1000),
    burst=st.floats(1, 5000),
    payments=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 6000), st.booleans()), max_size=40),
)
def test_no_window_exceeds_the_rate_and_two_bursts_by_more_than_is_returned(
    rate: float, burst: float, payments: list[tuple[float, int, bool]]
) -> None:
    bucket, paid = TokenBucket(rate, burst), []
    for now, (_, size, is_owed) in zip(accumulate(passes for passes, *_ in payments), payments, strict=True):
        if bucket.affords(size, now) or is_owed:
            paid.append((now, size - bucket.pay(size)))
    for i, (begin, _) in enumerate(paid):
        for j in range(i, len(paid)):
            assert sum(size for _, size in paid[i : j + 1]) <= rate * (paid[j][0] - begin) + 2 * burst + 1e-6


def test_owed_bytes_are_repaid_before_the_bucket_affords_more() -> None:
    bucket = TokenBucket(10, 100)
    assert bucket.affords(100, 0.0)
    assert (bucket.pay(150), bucket.pay(70)) == (0, 20)
    assert [bucket.affords(1, now) for now in (9.9, 10.2)] == [False, True]


def test_an_empty_bucket_without_a_rate_affords_nothing() -> None:
    assert not TokenBucket(0, 0).affords(1, 1e9)


def test_a_size_above_the_burst_needs_a_full_bucket() -> None:
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
def test_the_queue_evicts_the_most_predicted_chunks_and_pops_the_least_predicted(
    chunks: list[list[int]], sizes: list[int], limit: int, level: int
) -> None:
    queue = BudgetQueue(TokenBucket(0, level), limit)
    queued: dict[str, tuple[float, int]] = {}
    for i, accepted in enumerate(chunks):
        chunk = chunk_of(accepted, str(i))
        queue.push(chunk, sizes[i], 0.0)
        queued[str(i)] = (predicted_share(chunk), sizes[i])
    for evicted in queue.evict(1.0):
        assert sum(size for _, size in queued.values()) > limit
        assert predicted_share(evicted) == max(share for share, _ in queued.values())
        del queued[evicted.envelope.request]
    assert sum(size for _, size in queued.values()) <= limit
    spent = 0
    while popped := queue.pop(2.0):
        share, size = queued.pop(popped.envelope.request)
        assert all(share <= other for other, _ in queued.values())
        queue.pay(size)
        spent += size
        assert spent <= level
    remaining = sorted((share, int(name)) for name, (share, _) in queued.items())
    assert [int(c.envelope.request) for c in queue.clear()] == [name for _, name in remaining]


def test_chunks_that_waited_too_long_are_evicted() -> None:
    queue = BudgetQueue(TokenBucket(0, 0), 10**6)
    queue.push(chunk_of([0], "hard"), 10, 0.0)
    queue.push(chunk_of([3], "easy"), 10, 1.0)
    assert queue.evict(MAX_WAIT_S - 0.1) == []
    assert [c.envelope.request for c in queue.evict(MAX_WAIT_S)] == ["hard"]
    assert [c.envelope.request for c in queue.evict(MAX_WAIT_S + 1)] == ["easy"]
    assert queue.pop(MAX_WAIT_S + 2) is None


def send(bench: Bench, accepted: list[int]) -> str:
    bench.sent += 1
    request = Request(f"chatcmpl-{bench.sent}", (1, 2, 3), 64)
    for r in (verify_steps := answer(accepted)):
        bench.publisher.record(request, (r,), "stop" if r is verify_steps[-1] else None)
    return request.id


def weight(bench: Bench, number: int) -> int:
    key = bench.producer.delivered[number].envelope.request.encode()
    return message_bytes(bench.producer.values[number], key, bench.producer.headers[number])


def is_balanced(bench: Bench) -> bool:
    counts = bench.publisher.counts()
    return counts.captured == counts.published + counts.rows_dropped + counts.pending


def has_features(chunk: Chunk) -> bool:
    return chunk.envelope.features == "inline"


def accepted_tokens(verify_steps: Iterable[VerifyStep]) -> list[int]:
    """Return the accepted tokens of each verify step with a draft, in any order."""
    return sorted(len(step.accepted) for step in verify_steps if step.draft_tokens)


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_a_binding_budget_keeps_every_verify_step_and_the_features_of_unpredicted_chunks(rate: int) -> None:
    bench, rng = Bench(max_bytes_per_second=rate), np.random.default_rng(0)
    captured, hard = Counter[bool](), set()
    sent: list[int] = []
    sent_at: list[float] = []
    for _ in range(60):
        for _ in range(4):
            difficult = bool(rng.integers(0, 2))
            accepted = [int(k) for k in rng.integers(0, 2 if difficult else 4, 8)]
            sent += accepted
            request = send(bench, accepted)
            captured[difficult] += 9
            hard |= {request} if difficult else set()
        bench.settle()
        assert is_balanced(bench)
        sent_at += [bench.now] * (len(bench.producer.delivered) - len(sent_at))
        bench.now += 0.5
    burst, beyond = max(2 * rate, 20_000), bench.publisher.counts().bytes_over_budget
    weights = [weight(bench, i) for i in range(len(sent_at))]
    for i, begin in enumerate(sent_at):
        for j in range(i, len(sent_at)):
            assert sum(weights[i : j + 1]) <= rate * (sent_at[j] - begin) + 2 * burst + beyond
    with_features = Counter[bool]()
    for chunk in bench.producer.delivered[: len(sent_at)]:
        with_features[chunk.envelope.request in hard] += len(chunk.verify_steps) * has_features(chunk)
    counts = bench.publisher.close(1)
    assert (counts.published, counts.dropped, counts.pending) == (captured.total(), {}, 0)
    delivered = bench.producer.delivered
    assert counts.without_features == sum(len(chunk.verify_steps) for chunk in delivered if not has_features(chunk))
    assert accepted_tokens(step for chunk in delivered for step in chunk.verify_steps) == sorted(sent)
    shares = {kind: with_features[kind] / captured[kind] for kind in (True, False)}
    assert 1 > shares[True] > 2 * shares[False], shares


def test_a_sufficient_budget_drops_nothing() -> None:
    bench = Bench(max_bytes_per_second=10**7)
    for accepted in ([0], [3], [1]):
        send(bench, accepted)
    counts = bench.publisher.close(1)
    assert (counts.published, counts.dropped, counts.without_features) == (6, {}, 0)


def test_verify_steps_that_exceed_the_budget_by_themselves_are_published_and_their_bytes_counted() -> None:
    bench = Bench(max_bytes_per_second=1)
    bench.publisher._budget = BudgetQueue(TokenBucket(0, 0), 1 << 20)
    for _ in range(5):
        send(bench, [1, 1])
    bench.settle()
    assert (bench.publisher.counts().pending, bench.producer.delivered) == (15, [])
    bench.now += MAX_WAIT_S
    eventually(lambda: bench.publisher.counts().published == 15)
    send(bench, [1, 1])
    counts = bench.publisher.close(1)
    assert (counts.captured, counts.published, counts.dropped, counts.pending_bytes) == (18, 18, {}, 0)
    assert counts.without_features == 18
    assert not any(map(has_features, bench.producer.delivered))
    assert counts.bytes_over_budget == sum(weight(bench, i) for i in range(6))
    metrics = {s.name: s.value for metric in bench.publisher.collect() for s in metric.samples}
    assert metrics["aurora_serve_trace_rows_without_features_total"] == 18
    assert metrics["aurora_serve_trace_over_budget_bytes_total"] == counts.bytes_over_budget


def test_a_full_queue_drops_the_features_of_predicted_chunks_although_they_are_newer() -> None:
    bench = Bench(max_bytes_per_second=1, max_queue_bytes=1 << 20)
    bench.publisher._budget = BudgetQueue(TokenBucket(0, 0), 30_000)
    hard = send(bench, [0] * 8)
    bench.settle()
    for _ in range(5):
        send(bench, [3] * 8)
    bench.settle()
    assert bench.producer.delivered
    assert hard not in {chunk.envelope.request for chunk in bench.producer.delivered}
    assert bench.publisher._budget.clear()[0].envelope.request == hard


def test_only_unsampled_requests_are_counted_as_unsampled() -> None:
    bench = Bench(sample_ratio=0.5)
    sampled = [bench.publisher.sample(f"chatcmpl-{i}") for i in range(200)]
    counts = bench.publisher.close(1)
    assert sampled == [is_sampled(f"chatcmpl-{i}", 0.5) for i in range(200)]
    assert (counts.unsampled, counts.sampled, counts.captured) == (sampled.count(False), sampled.count(True), 0)
    metrics = {s.name: s.value for metric in bench.publisher.collect() for s in metric.samples}
    assert metrics["aurora_serve_trace_requests_unsampled_total"] == sampled.count(False)


def test_a_node_traces_sampled_requests_except_opt_outs() -> None:
    checked: list[str] = []

    def is_traced(request: str) -> bool:
        checked.append(request)
        return len(checked) % 2 == 0

    with running_node(is_traced=is_traced) as node:
        node.ask(n=4)
        node.ask(extra_headers={"x-aurora-trace": "off"})
        assert [request.trace for request in node.engine.requests] == [False, True, False, True, False]
        assert checked == [request.id for request in node.engine.requests[:4]]
