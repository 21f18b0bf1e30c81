"""The scheduler decides which sequences run, which draft, and how many prompt tokens a verify step reads."""

import pytest
import torch

from serving.engines.base import EngineFullError, Request
from serving.engines.builtin.drafter import DraftNode, DraftTree
from serving.engines.builtin.scheduler import MAX_PREFILL_TOKENS, Scheduler
from serving.engines.builtin.sequence import Sequence
from serving.planner.latency_model import LatencyCurve, LatencyModel
from serving.planner.planner import Planner

TREE = DraftTree((DraftNode(7, -1, 1, -0.1, 0.9, 0.9), DraftNode(8, 0, 2, -0.1, 0.9, 0.8)))


def scheduler_for(slots: int) -> Scheduler:
    """A scheduler on a machine where a row takes 1 ms, and half of it to catch up, with a stall of 4 ms for prompts."""
    rows = LatencyCurve({1: 1e-3, 101: 101e-3})
    model = LatencyModel(rows, LatencyCurve({1: 0.0}), rows, rows, catch_up_row=0.5e-3)
    return Scheduler(slots, max_waiting=5, planner=Planner(model, 3, max_prefill_stall=4.5e-3))


def sequence(name: str, prompt: int = 2, *, speculate: bool = True) -> Sequence:
    request = Request(name, tuple(range(1, prompt + 1)), 50, speculate=speculate)
    return Sequence(request, lambda _: None, prompt + 50, 0, list(request.prompt))


def decode(seq: Sequence) -> None:
    """Advance a sequence past its prompt."""
    seq.commit(torch.zeros(len(seq.request.prompt), 3), [5], 0, [])


def test_sequences_wait_for_a_slot_in_order() -> None:
    scheduler = scheduler_for(2)
    first, second, third = (sequence(name) for name in "abc")
    for seq in (first, second, third):
        scheduler.add(seq)
    scheduler.admit()
    assert ([seq.slot for seq in scheduler.running], list(scheduler.waiting)) == ([0, 1], [third])
    scheduler.release(first)
    scheduler.admit()
    assert (scheduler.running, third.slot) == ([second, third], 0)


def test_a_sequence_knows_how_long_it_waited_for_its_slot() -> None:
    scheduler, waiting = scheduler_for(1), sequence("a")
    waiting.submitted -= 7
    scheduler.add(waiting)
    assert waiting.stats.queue_s is None
    scheduler.admit()
    assert waiting.stats.queue_s is not None
    assert waiting.stats.queue_s >= 7


def test_a_full_queue_rejects_and_cancelled_sequences_leave_it() -> None:
    scheduler = scheduler_for(1)
    for name in "abcde":
        scheduler.add(sequence(name))
    with pytest.raises(EngineFullError, match=r"serve\.max_waiting_requests"):
        scheduler.add(sequence("f"))
    assert [seq.request.id for seq in scheduler.cancel_waiting({"b", "x"})] == ["b"]
    assert [seq.request.id for seq in scheduler.waiting] == ["a", "c", "d", "e"]


def test_only_speculating_sequences_past_their_prefill_with_room_draft() -> None:
    scheduler = scheduler_for(4)
    drafting, plain, full, prefilling = sequence("a"), sequence("b", speculate=False), sequence("c"), sequence("d")
    for seq in (drafting, plain, full, prefilling):
        scheduler.add(seq)
    scheduler.admit()
    for seq in (drafting, plain, full):
        decode(seq)
    full.max_len = len(full.tokens) + 1
    assert scheduler.schedule_drafts() == [drafting]
    assert scheduler.decoding == [drafting, plain, full]


def test_prompts_share_the_prefill_budget_in_order() -> None:
    scheduler = scheduler_for(3)
    for name, prompt in (("a", 100), ("b", 60), ("c", 10)):
        scheduler.add(sequence(name, prompt))
    scheduler.admit()
    scheduled = scheduler.schedule({})
    assert [(s.sequence.request.id, len(s.tokens), s.logit_rows) for s in scheduled] == [
        ("a", 100, 1),
        ("b", MAX_PREFILL_TOKENS - 100, 0),
    ]


def test_decoding_sequences_feed_root_and_draft_and_limit_the_prompt() -> None:
    scheduler = scheduler_for(2)
    decoding, prefilling = sequence("a"), sequence("b", prompt=30)
    for seq in (decoding, prefilling):
        scheduler.add(seq)
    scheduler.admit()
    decode(decoding)
    scheduled = scheduler.schedule({decoding.slot: TREE})
    assert [(s.tokens, s.logit_rows) for s in scheduled] == [([5, 7, 8], 3), ([1, 2, 3, 4], 0)]
    assert [len(s.tokens) for s in scheduler.schedule({}, catch_up=2)] == [1, 3], "the speculator took 1 ms of it"
    assert [len(s.tokens) for s in scheduler.schedule({}, catch_up=99)] == [1, 1]
