"""The suffix drafter continues what a sequence, or an earlier answer, has said before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_target import VOCABULARY, write_tiny_target

from schemas.settings import load
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import random_draft
from schemas.suffix_corpus import BYTES_PER_TOKEN, MAX_MATCH, Match
from schemas.trace.record import ROOT, DraftSource, VerifyStep
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin.drafter import DraftTree
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.sequence import Sequence
from serving.engines.builtin.suffix_drafter import SuffixDrafter, grow_tree
from serving.planner.acceptance_model import AcceptanceModel, DraftOutcome

DEPTH = 4
CORPUS_BYTES = 1000 * BYTES_PER_TOKEN


def sequence(tokens: list[int], *, prompt: int = 1, room: int = 20, slot: int = 0, trace: bool = True) -> Sequence:
    request = Request("r", tuple(tokens[:prompt]), 100, trace=trace)
    return Sequence(request, lambda _: None, len(tokens) + room, 0, list(tokens), slot)


@pytest.fixture
def drafter() -> SuffixDrafter:
    return SuffixDrafter(ScopedCorpus("fleet", CORPUS_BYTES, retention=3600))


def draft(
    drafter: SuffixDrafter,
    *sequences: Sequence,
    acceptance: AcceptanceModel | None = None,
    depth: int = DEPTH,
    threshold: float = 0.0,
    nodes: int = 16,
) -> list[DraftTree]:
    measured = acceptance or AcceptanceModel()
    return [drafter.draft(seq, measured, depth=depth, max_nodes=nodes, min_chance=threshold) for seq in sequences]


def test_a_repeat_in_the_sequence_is_continued(drafter: SuffixDrafter) -> None:
    [tree] = draft(drafter, sequence([5, 6, 7, 8, 9, 5, 6]))
    assert (tree.tokens, tree.parents, tree.version) == ([7, 8, 9, 5], [-1, 0, 1, 2], "")
    assert [node.depth for node in tree.nodes] == [1, 2, 3, 4]
    assert [node.match_length for node in tree.nodes] == [2, 3, 4, 5], "an accepted token extends the match"
    assert {node.source for node in tree.nodes} == {DraftSource.SUFFIX}
    assert tree.nodes[0].logprob == pytest.approx(math.log(1 / 2))


def test_without_a_match_nothing_is_drafted(drafter: SuffixDrafter) -> None:
    [tree] = draft(drafter, sequence([5, 6, 7, 8]))
    assert tree.nodes == ()


def test_a_finished_answer_is_continued_from_the_end_of_its_prompt_on(drafter: SuffixDrafter) -> None:
    drafter.finish(sequence([1, 2, *range(10, 10 + MAX_MATCH), 40, 41, 42], prompt=2 + MAX_MATCH))
    end, after, early = draft(drafter, *(sequence(tokens) for tokens in ([9, 16, 17], [9, 17, 40], [9, 1, 2])), depth=2)
    assert (end.tokens, after.tokens, early.tokens) == ([40, 41], [41, 42], [])


def test_an_answer_that_may_not_be_traced_is_not_used_for_others(drafter: SuffixDrafter) -> None:
    drafter.finish(sequence([1, 40, 41, 42], trace=False))
    [tree] = draft(drafter, sequence([9, 40, 41]))
    assert tree.tokens == []


def test_the_longer_match_wins_and_equal_matches_count_together(drafter: SuffixDrafter) -> None:
    drafter.finish(sequence([5, 6, 7, 30]))
    [longer] = draft(drafter, sequence([6, 7, 20, 5, 6, 7]), depth=1)
    assert longer.tokens == [30]
    drafter.finish(sequence([9, 6, 7, 20]))
    [joined] = draft(drafter, sequence([6, 7, 20, 8, 6, 7]), depth=1)
    assert joined.tokens == [20, 30], "the more frequent token goes first"
    shares = [math.exp(node.logprob) for node in joined.nodes]
    assert shares == pytest.approx([2 / 4, 1 / 4]), "two of three occurrences, and one"


def test_a_draft_branches_where_continuations_differ(drafter: SuffixDrafter) -> None:
    for answer in ([1, 2, 3, 10, 11], [1, 2, 3, 10, 12], [1, 2, 3, 20, 21]):
        drafter.finish(sequence(answer))
    [tree] = draft(drafter, sequence([9, 1, 2, 3]), depth=2)
    paths = {tuple(tree.nodes[i].token for i in path) for path in paths_of(tree)}
    assert paths == {(10,), (10, 11), (10, 12), (20,), (20, 21)}
    [narrow] = draft(drafter, sequence([9, 1, 2, 3]), depth=2, nodes=2)
    assert narrow.tokens == [10, 20], "two of three continuations, then one of three before half of the two"


def paths_of(tree: DraftTree) -> list[list[int]]:
    """The nodes from the root to each node."""
    paths: list[list[int]] = []
    for i, node in enumerate(tree.nodes):
        paths.append([*([] if node.parent == ROOT else paths[node.parent]), i])
    return paths


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8),
    st.integers(1, 10),
    st.sampled_from([0.0, 0.1, 0.3]),
)
def test_a_tree_holds_the_likeliest_prefixes_of_the_continuations_before_less_likely_ones(
    continuations: list[list[int]], max_nodes: int, min_chance: float
) -> None:
    tree = grow_tree(Match(3, continuations), AcceptanceModel(), max_nodes, min_chance)
    assert len(tree.nodes) <= max_nodes
    prefixes = {tuple(tokens[:length]) for tokens in continuations for length in range(1, len(tokens) + 1)}
    paths = [tuple(tree.nodes[i].token for i in path) for path in paths_of(tree)]
    assert len(set(paths)) == len(paths)
    assert set(paths) <= prefixes
    chances = [node.chance for node in tree.nodes]
    assert chances == sorted(chances, reverse=True), "a parent is at least as likely as its children"
    for node in tree.nodes:
        if node.parent != ROOT:
            assert tree.nodes[node.parent].chance >= min_chance, "an unlikely token is not continued"


@pytest.mark.parametrize(("depth", "room", "length"), [(2, 20, 2), (4, 3, 2), (4, 2, 1), (4, 20, 4)])
def test_depth_and_room_bound_the_draft(drafter: SuffixDrafter, depth: int, room: int, length: int) -> None:
    [tree] = draft(drafter, sequence([5, 6, 7, 8, 9, 5, 6], room=room), depth=depth)
    assert len(tree.nodes) == length


def test_a_draft_ends_with_the_first_token_that_is_not_worth_a_row(drafter: SuffixDrafter) -> None:
    """Its outcome is learned from, although it is not verified."""
    [tree] = draft(drafter, sequence([5, 6, 7, 8, 9, 5, 6]), threshold=0.3)
    assert tree.tokens == [7, 8]
    [tree] = draft(drafter, sequence([5, 6, 7, 8, 9, 5, 6]), threshold=0.6)
    assert tree.tokens == [7]


def test_measured_acceptance_replaces_the_estimated_probability(drafter: SuffixDrafter) -> None:
    acceptance = AcceptanceModel()
    for _ in range(100):
        for length in range(2, 6):
            acceptance.update(DraftOutcome(DraftSource.SUFFIX, greedy=True, siblings=((1 / 2, length),), accepted=0))
    [tree] = draft(drafter, sequence([5, 6, 7, 8, 9, 5, 6]), acceptance=acceptance, threshold=0.8)
    assert [node.chance > 0.8 for node in tree.nodes] == [True] * DEPTH


def test_a_sequence_grows_between_drafts(drafter: SuffixDrafter) -> None:
    seq = sequence([5, 6, 7, 8])
    draft(drafter, seq)
    seq.tokens += [9, 5, 6]
    assert draft(drafter, seq)[0].tokens == [7, 8, 9, 5]


class Recorder:
    """A trace sink that keeps all verify steps."""

    def __init__(self) -> None:
        self.verify_steps: list[VerifyStep] = []

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.verify_steps += verify_steps


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def engine(tmp_path: Path, recorder: Recorder) -> Iterator[BuiltinEngine]:
    flags = {
        "target.path": str(write_tiny_target(tmp_path)),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.drafter": "suffix",
        "serve.suffix_scope": "fleet",
        "serve.adaptive_drafting": False,
        "serve.max_model_len": 100,
    }
    engine = BuiltinEngine(load(environ={}, flags=flags), recorder)
    engine.start()
    yield engine
    engine.stop()


def generate(engine: BuiltinEngine, request: Request) -> Output:
    outputs: SimpleQueue[Output] = SimpleQueue()
    engine.submit(request, outputs.put)
    while (output := outputs.get(timeout=60)).finish is None:
        pass
    return output


def test_an_answer_is_drafted_from_the_same_answer_before(engine: BuiltinEngine, recorder: Recorder) -> None:
    generate(engine, Request("a", (3, 14, 15, 9), 40, ignore_eos=True))
    again = generate(engine, Request("b", (3, 14, 15, 9), 40, ignore_eos=True)).stats
    assert again is not None
    assert again.accepted_tokens >= 30, "each draft is accepted completely"
    assert again.speculators == ()
    assert {step.speculator for step in recorder.verify_steps} == {""}
    drafted = [step for step in recorder.verify_steps if step.draft_tokens]
    assert drafted
    assert all(step.draft_sources == (DraftSource.SUFFIX,) * len(step.draft_tokens) for step in drafted)


def test_no_version_is_active_and_none_can_be_swapped_in(engine: BuiltinEngine) -> None:
    draft = random_draft(engine._target.shape, 1)
    assert engine.health().speculator == ""
    for reject in (lambda: engine.check(draft), lambda: engine.swap(draft, "1")):
        with pytest.raises(CheckpointError, match=r"serve\.drafter"):
            reject()


def test_features_that_no_drafter_reads_are_not_kept(engine: BuiltinEngine) -> None:
    seqs: list[Sequence] = []
    finish = engine._drafter.finish
    engine._drafter.finish = lambda seq: (seqs.append(seq), finish(seq))[1]  # type: ignore[method-assign]
    generate(engine, Request("a", (3, 14, 15, 9), 20))
    assert [seq.unseen_features for seq in seqs] == [[]]
