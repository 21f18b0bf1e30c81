"""The packed draft and its batched steps against the network itself, one row and one sequence at a time."""

import gc
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import DraftShape, EagleDraft, Variant, random_draft
from schemas.speculator.rotary import Llama3, Scaling, Yarn
from schemas.trace.record import ROOT
from serving.engines.builtin.chain_rows import ChainRows
from serving.engines.builtin.drafter import DraftTree
from serving.engines.builtin.eagle_drafter import EagleDrafter, synthetic_sequence
from serving.engines.builtin.kernels import WeightDtype
from serving.engines.builtin.kv_cache import KVCache, RaggedBatch, Segment
from serving.engines.builtin.packed_draft import PackedDraft
from serving.planner.acceptance_model import AcceptanceModel
from serving.planner.planner import DraftBudget

HIDDEN, VOCABULARY, DRAFT_VOCABULARY, POSITIONS, SLOTS = 48, 40, 24, 200, 6
CPU = torch.device("cpu")
ACCEPTANCE = {True: AcceptanceModel()}


def make_draft(variant: Variant, seed: int = 0, scaling: Scaling | None = None) -> EagleDraft:
    """Return a draft whose every weight and gain matters, over a draft vocabulary with gaps."""
    heads = (4, 2, 8)
    shape = DraftShape(HIDDEN, 40, *heads, VOCABULARY, DRAFT_VOCABULARY, 1e-5, 100.0, POSITIONS, (1, 2, 3), variant)
    kept_D = torch.arange(VOCABULARY)[torch.arange(VOCABULARY) % 5 < 3][:DRAFT_VOCABULARY]
    draft = random_draft(replace(shape, rope_scaling=scaling), seed, kept_D)
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 2.0, generator=generator)
        else:
            parameter.data.normal_(0.0, 0.14, generator=generator)
    return draft.requires_grad_(requires_grad=False)


DRAFTS: dict[Variant, EagleDraft] = {"eagle3": make_draft("eagle3"), "eagle3.1": make_draft("eagle3.1")}
EMBEDDINGS_VH = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(9))


def make_features(draft: EagleDraft, rows: int, seed: int) -> Tensor:
    return torch.randn(rows, draft.shape.feature_width, generator=torch.Generator().manual_seed(seed)) * 3


class PlainSequence:
    """One sequence through the network, row by row, with all keys and values in plain lists."""

    def __init__(self, draft: EagleDraft, skipped: int = 0) -> None:
        self._draft, self._skipped = draft, skipped
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def step(self, token: int, hidden_H: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return the hidden state and the log-probabilities [D] after a row; rows from ``position`` on are replaced."""
        hidden = hidden_H.view(1, 1, -1)
        q, k, v = self._draft.project(EMBEDDINGS_VH[token].view(1, 1, -1), hidden, torch.tensor([[position]]))
        row = position - self._skipped
        self._keys[row:], self._values[row:] = [k], [v]
        sharing = q.shape[1] // k.shape[1]
        keys, values = (torch.cat(x, dim=2).repeat_interleave(sharing, 1) for x in (self._keys, self._values))
        hidden = self._draft.finish(hidden, F.scaled_dot_product_attention(q, keys, values))
        return hidden.flatten(), self._draft.logits(hidden).flatten().log_softmax(-1)

    def read(self, tokens: Sequence[int], features_TF: Tensor) -> tuple[Tensor, Tensor]:
        """Run committed rows; return what ``step`` returns after the last one."""
        for row, features_F in list(enumerate(features_TF))[self._skipped :]:
            result = self.step(tokens[row + 1], self._draft.fuse(features_F.view(1, 1, -1)).flatten(), row)
        return result

    def check(self, tree: DraftTree, tokens: Sequence[int], features_TF: Tensor, tolerance: float) -> None:
        """Assert that every node has the network's log-probability, and that siblings are the likeliest tokens."""
        for node in range(len(tree.nodes)):
            path, above = [node], tree.nodes[node].parent
            while above != ROOT:
                path.insert(0, above)
                above = tree.nodes[above].parent
            hidden_H, logprobs_D = self.read(tokens, features_TF)
            for depth, ancestor in enumerate(path[:-1]):
                hidden_H, logprobs_D = self.step(tree.nodes[ancestor].token, hidden_H, len(features_TF) + depth)
            drafted = int((self._draft.t2d.nonzero().flatten() == tree.nodes[node].token).nonzero())
            assert tree.nodes[node].logprob == pytest.approx(float(logprobs_D[drafted]), abs=tolerance)
            siblings = sum(sibling.parent == tree.nodes[node].parent for sibling in tree.nodes)
            assert logprobs_D[drafted] >= logprobs_D.topk(siblings).values[-1] - tolerance


def check_siblings(tree: DraftTree, width: int, sibling_threshold: float) -> None:
    """Assert that each level continues ``width`` nodes, and holds further choices that are worth a row."""
    parents = [node.parent for node in tree.nodes]
    for depth in range(max(node.depth for node in tree.nodes)):
        continued = [i for i in set(parents) if (0 if i == ROOT else tree.nodes[i].depth) == depth]
        assert len(continued) == (1 if depth == 0 else width)
        for parent in continued:
            siblings = [node for node in tree.nodes if node.parent == parent]
            assert width <= len(siblings) <= 3
            assert all(node.chance >= sibling_threshold for node in siblings[width:])
            assert sibling_threshold > 0 or len(siblings) == 3


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    variant=st.sampled_from(["eagle3", "eagle3.1"]),
    lengths=st.lists(st.sampled_from([1, 2, 3, 7, 20, 150]), min_size=1, max_size=SLOTS),
    slots=st.permutations(range(SLOTS)),
    width=st.integers(1, 3),
    depth=st.integers(1, 4),
    reads=st.tuples(st.lists(st.integers(1, 60), max_size=4), st.integers(1, 3), st.sampled_from([0, 2, 19])),
    sibling_threshold=st.sampled_from([0.0, 0.02, math.inf]),
)
@torch.inference_mode()
def test_drafted_trees_have_the_networks_probabilities(
    seed: int,
    variant: Variant,
    lengths: list[int],
    slots: list[int],
    width: int,
    depth: int,
    reads: tuple[list[int], int, int],
    sibling_threshold: float,
) -> None:
    pieces, catch_up, skipped = reads
    draft, budget = DRAFTS[variant], DraftBudget(depth, sibling_threshold=sibling_threshold)
    drafter = EagleDrafter(
        draft, "1", EMBEDDINGS_VH, SLOTS, POSITIONS, width=width, depth=depth, weight_dtype="float32"
    )
    total = [length + catch_up for length in lengths]
    features = [make_features(draft, rows, seed + i) for i, rows in enumerate(total)]
    tokens = torch.randint(VOCABULARY, (len(lengths), max(total) + 1), generator=torch.Generator().manual_seed(seed))
    sequences = [
        synthetic_sequence(row[: length + 1], features_TF[:length], slot=slot, room=catch_up + depth + 1)
        for row, length, features_TF, slot in zip(tokens.tolist(), lengths, features, slots, strict=False)
    ]
    for sequence in sequences:
        sequence.num_draft_skipped_tokens = min(skipped, len(sequence.tokens) - 2)
        sequence.take_features(sequence.num_draft_skipped_tokens)
    for count in pieces:
        for sequence in sequences:
            if count < len(sequence.tokens) - 1 - sequence.num_draft_seen_tokens:
                drafter.read(sequence, count)
    drafter.draft(sequences, budget, ACCEPTANCE)
    for sequence, row, features_TF in zip(sequences, tokens.tolist(), features, strict=True):
        seen = len(sequence.tokens) - 1
        sequence.tokens += row[seen + 1 : seen + 1 + catch_up]
        sequence.unseen_features.append(features_TF[seen : seen + catch_up])
    trees, _ = drafter.draft(sequences, budget, ACCEPTANCE)
    for tree, sequence, features_TF in zip(trees, sequences, features, strict=True):
        assert max(node.depth for node in tree.nodes) == depth
        check_siblings(tree, width, sibling_threshold)
        plain = PlainSequence(draft, sequence.num_draft_skipped_tokens)
        plain.check(tree, sequence.tokens, features_TF, 1e-3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("int8", 4e-2)], ids=["float32", "float16", "int8"]
)
@pytest.mark.parametrize("variant", list(DRAFTS))
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize(
    "scaling", [None, Llama3(8.0, 1.0, 4.0, 32), Yarn(4.0, 32)], ids=["unscaled", "llama3", "yarn"]
)
@torch.inference_mode()
def test_a_packed_step_equals_the_networks(
    dtype: WeightDtype, tolerance: float, variant: Variant, rows: int, scaling: Scaling | None
) -> None:
    draft = make_draft(variant, scaling=scaling)
    packed = PackedDraft(draft, POSITIONS, CPU, dtype)
    features_TF, positions_T = make_features(draft, rows, seed=3), torch.arange(rows) * 17
    embeddings_TH = EMBEDDINGS_VH[:rows]
    wanted_TH = draft.fuse(features_TF[None])
    q, k, v = draft.project(embeddings_TH[None], wanted_TH, positions_T[None])
    wanted_TH = draft.finish(wanted_TH, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    hidden_TH = packed.fuse(features_TF)
    q, k, v = (x.transpose(0, 1)[None] for x in packed.project(embeddings_TH, hidden_TH, positions_T))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    hidden_TH = packed.finish(hidden_TH, attended)
    for found, wanted in ((hidden_TH, wanted_TH[0]), (packed.logits(hidden_TH), draft.logits(wanted_TH)[0])):
        assert (found - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("variant", list(DRAFTS))
@torch.inference_mode()
def test_fc_and_values_of_an_int8_draft_are_not_rounded_to_8_bits(variant: Variant) -> None:
    draft = make_draft(variant)
    packed = PackedDraft(draft, POSITIONS, CPU, "int8")
    features_TF, positions_T = make_features(draft, 9, seed=3), torch.arange(9)
    hidden_TH = draft.fuse(features_TF[None])[0]
    *_, wanted_TME = draft.project(EMBEDDINGS_VH[None, :9], hidden_TH[None], positions_T[None])
    *_, found_TME = packed.project(EMBEDDINGS_VH[:9], hidden_TH, positions_T)
    for found, wanted in ((packed.fuse(features_TF), hidden_TH), (found_TME.transpose(0, 1), wanted_TME[0])):
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    places=st.dictionaries(st.integers(0, 8), st.one_of(st.integers(0, 40), st.integers(0, 399)), min_size=1),
)
@torch.inference_mode()
def test_rows_of_chains_attend_like_a_ragged_batch(seed: int, places: dict[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = sorted(places.items())
    cache = KVCache(1, 9, 2, 400, 8)
    for slot, entry in rows:
        for cached in (cache._keys, cache._values):
            cached[:, slot, :, :entry] = torch.randn(1, 2, entry, 8, generator=generator)
    q_TNE, k_TME, v_TME = (torch.randn(len(rows), heads, 8, generator=generator) for heads in (6, 2, 2))
    batch = RaggedBatch([Segment(slot, entry, 1) for slot, entry in rows])
    found = cache.attend(0, ChainRows(rows), q_TNE, k_TME, v_TME)
    torch.testing.assert_close(found, cache.attend(0, batch, q_TNE, k_TME, v_TME), rtol=1e-4, atol=1e-5)


def test_a_draft_is_packed_once_and_forgotten_with_its_weights() -> None:
    drafter = EagleDrafter(DRAFTS["eagle3"], "1", EMBEDDINGS_VH, SLOTS, POSITIONS)
    draft = make_draft("eagle3", seed=1)
    drafter.check(draft)
    packed = drafter.pack(draft)
    assert packed is drafter.pack(draft)
    drafter.swap(packed, "2")
    del draft, packed
    gc.collect()
    assert not drafter._packed


def test_a_draft_of_another_line_is_not_packed() -> None:
    drafter = EagleDrafter(DRAFTS["eagle3"], "1", EMBEDDINGS_VH, SLOTS, POSITIONS)
    with pytest.raises(CheckpointError, match="not that of this node's line"):
        drafter.pack(DRAFTS["eagle3.1"])
