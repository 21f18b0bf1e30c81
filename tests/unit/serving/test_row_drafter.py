"""The suffix drafter of a server with rows of a fixed length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.plugin.capture import PendingTensors
from serving.engines.plugin.row_drafter import RowDraft, RowDrafter

V, DEPTH = 100, 3
ANSWER = [20, 21, 22, 23, 24, 25, 26]


def drafter_of(clock: Callable[[], float] = lambda: 0.0) -> RowDrafter:
    return RowDrafter(ScopedCorpus("label", 1 << 20, 3600), DEPTH, V, clock)


def draft(drafter: RowDrafter, names: Sequence[str | None], version: str = "1") -> dict[str, RowDraft]:
    tokens = torch.full((len(names), DEPTH), 99)
    return drafter.draft(names, PendingTensors({"tokens": tokens}, None), version)


def test_a_request_is_drafted_from_its_own_tokens() -> None:
    drafter = drafter_of()
    drafter.begin("a", [1, 2, 3, 4, 5, 1], None, greedy=True)
    assert draft(drafter, ["a"])["a"].chain.tokens == ()
    drafter.observe({"a": [2]}, {})
    found = draft(drafter, ["a"])["a"]
    assert (found.chain.tokens, found.is_preferred) == ((3, 4, 5), True)
    assert found.sources() == (2, 2, 2)


def test_a_request_is_drafted_from_answers_with_its_label_alone() -> None:
    drafter = drafter_of()
    drafter._corpus.offer([("sql", torch.tensor(ANSWER, dtype=torch.int32).numpy())])
    for name, label in (("same", "sql"), ("other", "chat"), ("none", None)):
        drafter.begin(name, [7, 20, 21], label, greedy=True)
    draft(drafter, [])
    found = draft(drafter, ["same", "other", "none"])
    assert {name: one.chain.tokens for name, one in found.items()} == {"same": (22, 23, 24), "other": (), "none": ()}


def test_many_waiting_answers_are_added_over_several_steps() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.0006
        return now[0]

    drafter = drafter_of(clock)
    answer = torch.arange(10, 90, dtype=torch.int32).numpy()
    drafter._corpus.offer(("sql", answer) for _ in range(8))
    sizes = []
    for _ in range(6):
        draft(drafter, [])
        sizes.append(drafter._corpus.num_tokens)
    assert sizes == sorted(sizes)
    assert (sizes[0] < sizes[-1], sizes[-1]) == (True, 8 * len(answer))


def test_a_speculator_that_is_right_keeps_its_rows() -> None:
    drafter, tokens, right = drafter_of(), [1, 2, 3, 4, 5, 1, 2], [97, 98, 99]
    drafter.begin("a", tokens, None, greedy=True)
    preferred = []
    for _ in range(20):
        drafter.restart("a", tokens)
        drafts = drafter.draft(["a"], PendingTensors({"tokens": torch.tensor([right])}, None), "1")
        preferred.append(drafts["a"].is_preferred)
        drafter.observe({"a": [*right, 96]}, drafts)
    assert preferred[0]
    assert not any(preferred[-5:])


def test_accepted_tokens_of_the_suffix_drafter_are_counted() -> None:
    drafter = drafter_of()
    drafter.begin("a", [1, 2, 3, 4, 5, 1, 2], None, greedy=True)
    drafts = draft(drafter, ["a"])
    drafter.observe({"a": [3, 4, 9]}, drafts)
    counts = drafter.counts
    assert (counts.rows, counts.draft_tokens, counts.accepted_tokens) == (1, 3, 2)
    assert drafter._sequences["a"].tokens == [1, 2, 3, 4, 5, 1, 2, 3, 4, 9]


def test_a_request_that_continues_after_a_pause_has_the_servers_tokens() -> None:
    drafter = drafter_of()
    drafter.begin("a", [1, 2, 3, 4, 5, 1, 2], None, greedy=True)
    draft(drafter, ["a"])
    drafter.observe({"a": [9, 9]}, {})
    drafter.restart("a", [1, 2, 3, 4, 5, 1, 2])
    assert draft(drafter, ["a"])["a"].chain.tokens == (3, 4, 5)
    drafter.end("a")
    drafter.restart("a", [1])
    assert draft(drafter, ["a", None, "unknown"]) == {}


def test_lookups_take_a_share_of_the_steps_time_and_go_round_the_rows() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.0006  # a lookup takes so long; a step at least a millisecond
        return now[0]

    drafter, names = drafter_of(clock), ["a", "b", "c", "d"]
    for name in names:
        drafter.begin(name, [1, 2, 3, 4, 5, 1, 2], None, greedy=True)
    looked_up = [{name for name, one in draft(drafter, names).items() if one.chain.tokens} for _ in range(4)]
    assert all(0 < len(found) < len(names) for found in looked_up)
    assert set.union(*looked_up) == set(names)
    assert drafter.counts.rows_without_lookup == 4 * len(names) - sum(map(len, looked_up))
