"""The padded, gathered training-time test against plain references for one sample, one position and one chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from schemas.settings import Objective, Train
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from schemas.suffix_corpus import MAX_LINKS, MAX_MATCH, MIN_MATCH
from trainer.data.batch import collate
from trainer.data.samples import Branch, Sample, Teacher, mark_suffix_predictions, split_sample
from trainer.objective.divergences import DIVERGENCES, LK_RATE, TAIL_MASS, forward_kl, total_variation
from trainer.objective.losses import CLIP, ttt_loss
from trainer.objective.simulated_acceptance import (
    SimulatedAcceptance,
    simulate_acceptance,
    simulate_each,
    walk_requests,
)
from trainer.objective.training_time_test import DraftUnroll, build_draft_trees
from trainer.replay.prequential import simulate_positions

VOCABULARY = 24
KEPT = [0, 1, 2, 4, 5, 7, 9, 10, 13, 14, 17, 20]
SHAPE = DraftShape(
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=VOCABULARY,
    draft_vocab_size=len(KEPT),
    rms_norm_eps=1e-6,
    rope_theta=100.0,
    max_position_embeddings=64,
    capture_layers=(1, 2, 3),
)


def tiny_draft(dtype: torch.dtype = torch.float64) -> EagleDraft:
    draft = random_draft(SHAPE, seed=1)
    draft.d2t.copy_(torch.tensor(KEPT) - torch.arange(len(KEPT)))
    draft.t2d.zero_()
    draft.t2d[KEPT] = True
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15)
    return draft.to(dtype)


def teacher(rows: int, g: torch.Generator, k: int = 5) -> Teacher:
    ids = torch.rand(rows, VOCABULARY, generator=g).argsort(dim=-1)[:, :k]
    logits = 2 * torch.randn(rows, VOCABULARY, generator=g)
    return Teacher(ids, logits.log_softmax(-1).gather(-1, ids))


def sample(n: int, first_known: int, seed: int, *, branches: Sequence[tuple[int, int, int]] = (), k: int = 5) -> Sample:
    """Return a random sample; ``branches`` are (root, nodes, accepted prefix)."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (n,), generator=g)
    grown = []
    for root, nodes, prefix in branches:
        inside = tokens[root + 1 : root + 1 + prefix].tolist()
        drafted = [KEPT[i] for i in torch.randint(0, len(KEPT), (nodes - len(inside),), generator=g).tolist()]
        grown.append(Branch(root, (*inside, *drafted), prefix, (-0.5,) * nodes, teacher(nodes, g, k)))
    return Sample(
        request=f"r{seed}",
        tokens=tokens,
        next_token=3,
        features=torch.randn(n, SHAPE.feature_width, generator=g).to(torch.bfloat16),
        known=torch.arange(n) >= first_known,
        teacher=teacher(n - first_known, g, k),
        branches=tuple(grown),
    )


def certain_sample(seed: int) -> Sample:
    """Return six tokens with one-hot teachers of the draft vocabulary, and a branch of two nodes."""
    g = torch.Generator().manual_seed(seed)
    said = torch.tensor(KEPT)[torch.randint(0, len(KEPT), (6, 1), generator=g)]
    w = sample(6, 2, seed)
    branch = Branch(3, (1, 2), 0, (-0.5, -0.5), Teacher(said[4:], torch.zeros(2, 1)))
    return Sample(w.request, w.tokens, 3, w.features, w.known, Teacher(said[:4], torch.zeros(4, 1)), (branch,))


def embeddings(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(VOCABULARY, SHAPE.hidden_size, generator=torch.Generator().manual_seed(9)).to(dtype)


def within_vocabulary(w: Sample) -> Sample:
    """Return the sample with tokens and teachers inside the draft vocabulary."""
    g = torch.Generator().manual_seed(17)

    def inside(said: Teacher) -> Teacher:
        order = torch.rand(len(said.ids), len(KEPT), generator=g).argsort(dim=-1)
        return Teacher(torch.tensor(KEPT)[order[:, : said.ids.shape[1]]], said.logprobs.log_softmax(-1))

    tokens = torch.tensor(KEPT)[w.tokens % len(KEPT)]
    branches = [
        replace(
            b,
            tokens=(*tokens[b.root + 1 : b.root + 1 + b.accepted_prefix].tolist(), *b.tokens[b.accepted_prefix :]),
            teacher=inside(b.teacher),
        )
        for b in w.branches
    ]
    return replace(w, tokens=tokens, teacher=inside(w.teacher), branches=tuple(branches))


def certain(said: Teacher) -> Teacher:
    """Return a one-hot teacher of the draft vocabulary at each position."""
    return Teacher(torch.full((len(said.ids), 1), KEPT[3]), torch.zeros(len(said.ids), 1))


def forked(w: Sample, root: int, *drafts: tuple[int, Sequence[int]], seed: int = 11) -> Sample:
    """Return the sample with branches below one root that share prefixes; each is (accepted prefix, tokens)."""
    g = torch.Generator().manual_seed(seed)
    known: dict[tuple[int, ...], Teacher] = {}
    branches = []
    for prefix, tokens in drafts:
        paths = [tuple(tokens[: i + 1]) for i in range(len(tokens))]
        rows = [known.setdefault(path, teacher(1, g, w.teacher.ids.shape[-1])) for path in paths]
        logprobs = tuple(-0.2 - 0.1 * i for i in range(len(tokens)))
        said = Teacher(torch.cat([r.ids for r in rows]), torch.cat([r.logprobs for r in rows]))
        branches.append(Branch(root, tuple(tokens), prefix, logprobs, said, weight=0.5))
    return replace(w, branches=(*w.branches, *branches))


def tree_sample() -> Sample:
    """Return eight tokens and a tree of eight nodes below token 3, two of them accepted: five rejected branches."""
    w = sample(8, 2, 21, branches=[(5, 2, 1)])
    a, b = w.tokens[4:6].tolist()
    c, d, e = [token for token in KEPT if token not in w.tokens[4:7].tolist()][:3]
    return replace(
        forked(w, 3, (1, [a, c, d]), (1, [a, c, e]), (2, [a, b, c]), (0, [d, e, c]), (0, [d, e, d])), weight=0.25
    )


SAMPLES = [
    sample(9, 3, 0, branches=[(3, 3, 0), (4, 3, 1), (6, 2, 0), (7, 1, 0)]),
    sample(5, 0, 1, branches=[(1, 4, 2)]),
    sample(12, 7, 2, k=3),
    sample(3, 2, 3, branches=[(2, 3, 0)]),
    tree_sample(),
]


def settings(steps: int, decay: float, weight: float, **others: object) -> Train:
    defaults = {"ttt_steps": steps, "ttt_decay": decay, "rejected_weight": weight, "rejected_min_prob": 0.0}
    return Train.model_validate(defaults | others)


def served_chain(
    draft: EagleDraft, table_VH: Tensor, w: Sample, row: int, drafted: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return hidden state and logits after each step of serving: its cache grows by one token at a time."""
    dtype = draft.fc.weight.dtype
    keys: list[Tensor] = []
    values: list[Tensor] = []
    repeat = SHAPE.num_attention_heads // SHAPE.num_key_value_heads

    def step(token: int, hidden_H: Tensor, position: int) -> Tensor:
        p = draft.project(table_VH[token][None, None], hidden_H[None, None], torch.tensor([[position]]))
        keys.append(p.k_BMTE[0, :, 0].repeat_interleave(repeat, 0))
        values.append(p.v_BMTE[0, :, 0].repeat_interleave(repeat, 0))
        attended = []
        for head in range(SHAPE.num_attention_heads):
            scores = torch.stack([p.q_BNTE[0, head, 0] @ k[head] / math.sqrt(SHAPE.head_dim) for k in keys])
            attended.append(sum(a * v[head] for a, v in zip(scores.softmax(0), values, strict=True)))
        return draft.finish(hidden_H[None, None], torch.stack(attended)[None, :, None])[0, 0]

    for t in range(row + 1):
        hidden = step(int(w.tokens[t + 1]), draft.fuse(w.features[t].to(dtype)), t)
    outputs = [(hidden, draft.logits(hidden))]
    for k, token in enumerate(drafted, start=1):
        hidden = step(token, hidden, row + k)
        outputs.append((hidden, draft.logits(hidden)))
    return outputs


def plain_divergence(logits_D: Tensor, ids: Tensor, logprobs: Tensor, objective: str) -> Tensor | None:
    if int(ids[0]) not in KEPT:
        return None
    kept = {KEPT.index(i): math.exp(lp) for i, lp in zip(ids.tolist(), logprobs.tolist(), strict=True) if i in KEPT}
    mass = sum(kept.values())
    q = logits_D.log_softmax(0)
    if objective == "kl":
        terms = [p / mass * (math.log(p / mass) - q[i]) for i, p in kept.items()]
    elif objective == "reverse-kl":
        smooth = {i: (1 - TAIL_MASS) * kept.get(i, 0) / mass + TAIL_MASS / len(KEPT) for i in range(len(KEPT))}
        terms = [q[i].exp() * (q[i] - math.log(p)) for i, p in smooth.items()]
    else:
        terms = [torch.ones(()).to(q), *(-torch.minimum(q[i].exp(), torch.tensor(p / mass)) for i, p in kept.items())]
    return sum(terms, torch.zeros((), dtype=q.dtype))


def plain_loss(draft: EagleDraft, table_VH: Tensor, samples: Sequence[Sample], train: Train) -> tuple[Tensor, int, int]:
    """Compute the definition branch by branch and term by term; a shared node counts at its first branch."""
    steps, decay = train.ttt_steps, train.ttt_decay
    accepted: list[list[Tensor]] = [[] for _ in range(steps)]
    counts: list[list[float]] = [[] for _ in range(steps)]
    rejected: list[Tensor] = []
    for w in samples:
        place = {int(i): j for j, i in enumerate(w.known.nonzero())}
        for row in range(len(w) - 1):
            outputs = served_chain(draft, table_VH, w, row, w.tokens[row + 2 : row + 1 + steps].tolist())
            for k, (_, scores) in enumerate(outputs):
                if (j := place.get(row + 1 + k)) is not None:
                    kl = plain_divergence(scores, w.teacher.ids[j], w.teacher.logprobs[j], train.objective)
                    count = 1.0
                    if w.suffix_predicted is not None and bool(w.suffix_predicted[row + 1 : row + 2 + k].all()):
                        count = train.suffix_predicted_weight
                    accepted[k] += [] if kl is None else [count * w.weight * kl]
                    counts[k] += [] if kl is None else [count]
        seen = set()
        for b in w.branches:
            outputs = served_chain(draft, table_VH, w, b.root - 1, b.tokens[: steps - 1])
            for k in range(b.accepted_prefix + 1, len(outputs)):
                if (path := (b.root, b.tokens[:k])) in seen or b.rejected_prob < train.rejected_min_prob:
                    continue
                seen.add(path)
                said = b.teacher.ids[k - 1], b.teacher.logprobs[k - 1]
                kl = plain_divergence(outputs[k][1], *said, train.rejected_objective)
                rejected += [] if kl is None else [w.weight * b.weight * decay**k * kl]
    total = sum(decay**k * torch.stack(kls).sum() / sum(counts[k]) for k, kls in enumerate(accepted) if kls)
    if rejected and train.rejected_weight:
        total = total + train.rejected_weight * torch.stack(rejected).mean()
    return total, sum(map(len, accepted)), len(rejected)


def assert_same_gradients(draft: EagleDraft, found: Tensor, wanted: Tensor) -> None:
    names, parameters = zip(*draft.named_parameters(), strict=True)
    pairs = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_loss_and_gradients_over_trees_equal_those_branch_by_branch(steps: int, weight: float) -> None:
    draft, table, train = tiny_draft(), embeddings(), settings(steps, 0.8, weight)
    loss = ttt_loss(draft, table, collate(SAMPLES), train)
    expected, positions, nodes = plain_loss(draft, table, SAMPLES, train)
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-8)
    assert loss.positions == positions
    assert loss.nodes == (nodes if weight else 0)
    assert len(loss.accepted_K) == steps
    assert loss.accepted == pytest.approx(sum(0.8**k * mean for k, mean in enumerate(loss.accepted_K)))
    assert_same_gradients(draft, loss.total, expected)


def suffix_predicted(w: Sample, seed: int) -> Sample:
    predicted = torch.rand(len(w), generator=torch.Generator().manual_seed(seed)) < 0.6
    return replace(w, suffix_predicted=predicted & w.known)


@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_positions_that_the_suffix_drafter_predicts_count_by_their_weight(weight: float) -> None:
    draft, table, train = tiny_draft(), embeddings(), settings(3, 0.8, 0.5, suffix_predicted_weight=weight)
    samples = [*(suffix_predicted(w, i) for i, w in enumerate(SAMPLES[:3])), *SAMPLES[3:]]
    loss = ttt_loss(draft, table, collate(samples), train)
    expected, positions, _ = plain_loss(draft, table, samples, train)
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-8)
    assert loss.positions == positions
    assert_same_gradients(draft, loss.total, expected)
    everywhere = plain_loss(draft, table, SAMPLES, train)[0]
    assert not torch.isclose(loss.total, everywhere, rtol=1e-4), "the weight matters"


def test_a_batch_that_the_suffix_drafter_predicts_as_a_whole_may_have_no_weight() -> None:
    draft, table, train = tiny_draft(), embeddings(), settings(3, 0.8, 0.0, suffix_predicted_weight=0.0)
    w = replace(SAMPLES[2], suffix_predicted=torch.ones_like(SAMPLES[2].known))
    assert float(ttt_loss(draft, table, collate([w]), train).total.detach()) == 0


@pytest.mark.parametrize("objective", ["reverse-kl", "tv"])
def test_loss_and_gradients_of_every_objective_equal_its_definition(objective: str) -> None:
    draft, table = tiny_draft(), embeddings()
    train = settings(3, 0.8, 0.5, objective=objective, rejected_objective=objective)
    loss = ttt_loss(draft, table, collate(SAMPLES), train)
    expected, _, _ = plain_loss(draft, table, SAMPLES, train)
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-8)
    assert_same_gradients(draft, loss.total, expected)


def test_only_nodes_after_a_likely_choice_have_a_loss() -> None:
    draft, table, train = tiny_draft(), embeddings(), settings(4, 0.8, 1.0, rejected_min_prob=0.75)
    loss = ttt_loss(draft, table, collate(SAMPLES), train)
    expected, _, nodes = plain_loss(draft, table, SAMPLES, train)
    _, _, all_nodes = plain_loss(draft, table, SAMPLES, settings(4, 0.8, 1.0))
    assert loss.nodes == nodes
    assert 0 < nodes < all_nodes
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-8)


def test_nodes_that_branches_share_are_computed_once() -> None:
    w = tree_sample()
    w = replace(w, branches=tuple(replace(b, teacher=certain(b.teacher)) for b in w.branches))
    trees = build_draft_trees(tiny_draft(), collate([w]), 4, 0.0)
    drafted = [len(step.parent_A) - step.committed for step in trees.levels]
    # Below token 3: d; c, e; d e under a c, c under a b, c d under d e. Below token 5: one after an accepted node.
    assert drafted == [0, 1, 3, 5]


def test_losses_of_parts_add_up_to_the_loss_of_the_whole() -> None:
    draft, table, train = tiny_draft(), embeddings(), settings(3, 0.8, 0.5)
    counts: list[Tensor] = []
    whole = ttt_loss(draft, table, collate(SAMPLES), train, lambda own: counts.append(own) or own)
    parts = [ttt_loss(draft, table, collate(part), train, lambda _: counts[0]) for part in (SAMPLES[:2], SAMPLES[2:])]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    assert parts[0].positions + parts[1].positions == whole.positions


def test_gradients_equal_finite_differences() -> None:
    draft, table, batch = tiny_draft(), embeddings(), collate(SAMPLES)
    loss = ttt_loss(draft, table, batch, settings(4, 0.8, 0.5)).total
    g = torch.Generator().manual_seed(4)
    for parameter, slope in zip(draft.parameters(), torch.autograd.grad(loss, list(draft.parameters())), strict=True):
        direction = torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
                ends.append(ttt_loss(draft, table, batch, settings(4, 0.8, 0.5)).total)
                parameter.add_(direction, alpha=-sign * 1e-5)
        assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float((slope * direction).sum()), rel=1e-4, abs=1e-6)


def test_the_unroll_equals_drafting_token_by_token() -> None:
    draft, table, batch = tiny_draft(), embeddings(), collate(SAMPLES)
    chains = [(0, 2, [5, 9, 1]), (0, 2, [5, 0, 0]), (0, 7, [2, 2, 2]), (2, 0, [1, 2, 4]), (3, 1, [7, 9, 20])]
    unroll = DraftUnroll(draft, table, batch.tokens_BT, batch.features_BTF)
    hidden = unroll.first(torch.tensor([b for b, _, _ in chains]), torch.tensor([row for _, row, _ in chains]))
    served = [served_chain(draft, table, SAMPLES[b], row, tokens) for b, row, tokens in chains]
    torch.testing.assert_close(hidden, torch.stack([s[0][0] for s in served]))
    for k in range(3):
        hidden = unroll.advance(torch.arange(len(chains)), torch.tensor([tokens[k] for _, _, tokens in chains]))
        torch.testing.assert_close(hidden, torch.stack([s[k + 1][0] for s in served]))


def test_a_tree_equals_each_of_its_branches_alone() -> None:
    draft, table, batch = tiny_draft(), embeddings(), collate(SAMPLES)
    unroll = DraftUnroll(draft, table, batch.tokens_BT, batch.features_BTF)
    unroll.first(torch.tensor([0, 0, 1]), torch.tensor([2, 3, 1]))
    unroll.advance(torch.tensor([1, 1, 2]), torch.tensor([4, 7, 5]))
    hidden = unroll.advance(torch.tensor([2, 1, 0, 1]), torch.tensor([1, 2, 9, 5]))
    for node, (b, row, tokens) in enumerate([(1, 1, [5, 1]), (0, 3, [7, 2]), (0, 3, [4, 9]), (0, 3, [7, 5])]):
        torch.testing.assert_close(hidden[node], served_chain(draft, table, SAMPLES[b], row, tokens)[2][0])


def test_padding_and_other_samples_do_not_change_the_loss_of_a_sample() -> None:
    draft, table = tiny_draft(), embeddings()
    alone = ttt_loss(draft, table, collate(SAMPLES[:1]), settings(3, 1.0, 0.0))
    silent = sample(14, 14, 7)
    together = ttt_loss(draft, table, collate([silent, SAMPLES[0]]), settings(3, 1.0, 0.0))
    torch.testing.assert_close(alone.total, together.total)


def test_a_batch_without_a_teacher_has_no_loss() -> None:
    loss = ttt_loss(tiny_draft(), embeddings(), collate([sample(6, 6, 0)]), settings(3, 0.8, 0.1))
    assert (float(loss.total), loss.positions, loss.nodes) == (0.0, 0, 0)


def test_a_second_choice_is_not_taught_where_the_first_one_is_outside_the_draft_vocabulary() -> None:
    draft, table = tiny_draft(), embeddings()
    outside = next(i for i in range(VOCABULARY) if i not in KEPT)
    probs = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]])
    w = Sample("r", torch.tensor([1, 2, 4]), None, torch.ones(3, 24).bfloat16(), torch.tensor([False, True, True]),
               Teacher(torch.tensor([[outside, 1, 2], [1, outside, 2]]), probs.log()))  # fmt: skip
    loss = ttt_loss(draft, table, collate([w]), settings(1, 1.0, 0.0))
    scores = served_chain(draft, table, w, 1, [])[0][1].log_softmax(0)
    expected = sum(p * (math.log(p) - scores[i]) for p, i in [(0.5 / 0.6, 1), (0.1 / 0.6, 2)])
    assert loss.positions == 1
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_every_divergence_is_zero_where_the_draft_agrees(objective: Objective) -> None:
    probs, ids = torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]])
    agreeing, divergence = torch.full((1, 4), math.log(TAIL_MASS / 4)), DIVERGENCES[objective]
    agreeing[0, 2], agreeing[0, 0] = math.log(0.7), math.log(0.3)
    assert float(divergence(agreeing, ids, probs)) == pytest.approx(0, abs=0.02)
    assert float(divergence(torch.zeros(1, 4), ids, probs)) > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_forward_kl_equals_autograd(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    logits = (30 * torch.randn(6, 40, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    ids = torch.randint(0, 40, (6, 5), generator=g)
    ids[0, 1], ids[1] = ids[0, 0], 0
    probs = torch.rand(6, 5, generator=g, dtype=torch.float64).to(dtype)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    weights = torch.randn(6, generator=g, dtype=torch.float64).to(dtype)
    expected = logits.logsumexp(-1) - (probs * logits.gather(-1, ids)).sum(-1) - torch.special.entr(probs).sum(-1)
    found = forward_kl(logits, ids, probs)
    torch.testing.assert_close(found, expected)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), logits)
    (given,) = torch.autograd.grad((weights * found).sum(), logits)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-7)
    if dtype is torch.float64:
        assert torch.autograd.gradcheck(lambda x: forward_kl(x, ids, probs), logits)


@pytest.mark.parametrize("objective", DIVERGENCES)
@pytest.mark.parametrize("rejected_objective", DIVERGENCES)
def test_both_terms_equal_those_of_either_alone(objective: Objective, rejected_objective: Objective) -> None:
    draft, table = tiny_draft(), embeddings()
    w = within_vocabulary(sample(9, 1, 32, branches=[(2, 3, 2), (6, 2, 0)]))
    train = settings(3, 0.8, 0.5, objective=objective, rejected_objective=rejected_objective)
    both = ttt_loss(draft, table, collate([w]), train)
    assert both.nodes
    alone = ttt_loss(draft, table, collate([w]), train.model_copy(update={"rejected_weight": 0.0}))
    assert both.accepted_K == pytest.approx(alone.accepted_K)
    other = next(name for name in DIVERGENCES if name != rejected_objective)
    apart = ttt_loss(draft, table, collate([w]), train.model_copy(update={"objective": other}))
    assert both.rejected == pytest.approx(apart.rejected)


def test_the_hybrid_moves_from_kl_to_acceptance_as_the_draft_improves() -> None:
    probs, ids = torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]])
    far, near = torch.tensor([[0.0, 9.0, 0.0, 9.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    for logits in (far, near):
        acceptance = 1 - float(total_variation(logits, ids, probs))
        w = math.exp(-LK_RATE * acceptance)
        mixed = w * float(forward_kl(logits, ids, probs)) + (1 - w) * (1 - acceptance)
        assert float(DIVERGENCES["lk"](logits, ids, probs)) == pytest.approx(mixed)


def test_a_rejected_position_counts_more_while_the_draft_would_still_be_wrong() -> None:
    draft, table, r = tiny_draft(), embeddings(), 2.0
    w = within_vocabulary(sample(7, 2, 31, branches=[(3, 2, 1)]))
    (branch,) = w.branches
    train = settings(3, 1.0, 0.0)
    plain = [float(x) for x in ttt_loss(draft, table, collate([w]), train).accepted_K]
    weighted = ttt_loss(draft, table, collate([w]), train.model_copy(update={"rejection_weight": r})).accepted_K
    place = {int(i): j for j, i in enumerate(w.known.nonzero())}
    (_, scores) = served_chain(draft, table, w, 2, w.tokens[4:5].tolist())[1]
    ratio = math.exp(float(scores.detach().log_softmax(0)[KEPT.index(branch.tokens[1])]) - branch.draft_logprobs[1])
    there = plain_divergence(scores, w.teacher.ids[place[4]], w.teacher.logprobs[place[4]], "kl")
    assert there is not None
    n = sum(1 for row in range(6) if row + 2 in place)
    extra = r * min(1.0, ratio)
    assert weighted[0] == pytest.approx(plain[0])
    assert weighted[1] == pytest.approx((n * plain[1] + extra * float(there.detach())) / (n + extra), rel=1e-5)


def test_a_branch_of_unknown_probability_has_a_loss_and_is_no_choice() -> None:
    known = within_vocabulary(sample(9, 1, 32, branches=[(2, 3, 2), (6, 2, 0)]))
    unknown = replace(known, branches=tuple(replace(b, draft_logprobs=(math.nan,) * 3) for b in known.branches))
    draft, table = tiny_draft(), embeddings()
    assert len(collate([known]).choices) > len(collate([unknown]).choices) == 0
    train = settings(3, 1.0, 1.0, rejected_min_prob=0.5)
    assert float(ttt_loss(draft, table, collate([unknown]), train).rejected) == pytest.approx(
        float(ttt_loss(draft, table, collate([known]), train).rejected)
    )


def test_the_policy_term_raises_accepted_choices_and_lowers_rejected_ones() -> None:
    draft, table = tiny_draft(), embeddings()
    w = within_vocabulary(sample(9, 1, 32, branches=[(2, 3, 2), (6, 2, 0)]))
    train = settings(3, 1.0, 0.0, policy_weight=1.0)
    loss = ttt_loss(draft, table, collate([w]), train)
    terms = []
    # Step 0 of both verify steps: two tokens were accepted from the first choice on, none from the other.
    for branch, advantage in zip(w.branches, (1.0, -1.0), strict=True):
        scores = served_chain(draft, table, w, branch.root - 1, [])[0][1].log_softmax(0)
        ratio = (scores[KEPT.index(branch.tokens[0])] - branch.draft_logprobs[0]).exp()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage))
    # The later choices are alone at their steps, so their rewards are the mean: no advantage.
    assert loss.policy == pytest.approx(float(sum(terms).detach()) / 4)


def test_a_choice_outside_the_draft_vocabulary_has_a_loss_and_is_no_choice() -> None:
    draft, table = tiny_draft(), embeddings()
    inside = within_vocabulary(sample(9, 1, 32, branches=[(2, 3, 2), (6, 2, 0)]))
    first, second = inside.branches
    # A draft with another vocabulary proposed the second branch.
    outside = replace(inside, branches=(first, replace(second, tokens=(3, 6))))
    train = settings(3, 1.0, 1.0, policy_weight=1.0, rejection_weight=2.0, rejected_min_prob=0.0)
    loss = ttt_loss(draft, table, collate([outside]), train)
    unknown = replace(outside, branches=(first, replace(second, tokens=(3, 6), draft_logprobs=(math.nan,) * 2)))
    expected = ttt_loss(draft, table, collate([unknown]), train)
    assert loss.policy == pytest.approx(expected.policy)
    assert loss.accepted == pytest.approx(expected.accepted)
    assert loss.nodes == ttt_loss(draft, table, collate([inside]), train).nodes > 0


def test_training_overfits_one_small_batch_past_its_rejections() -> None:
    draft, table, w = tiny_draft(torch.float32), embeddings(torch.float32), certain_sample(5)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        loss = ttt_loss(draft, table, collate([w]), settings(3, 0.8, 1.0))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.accepted < 0.02
    assert loss.rejected < 0.02
    branch = w.branches[0]
    said = served_chain(draft, table, w, branch.root - 1, branch.tokens)
    for node in range(2):
        assert KEPT[int(said[node + 1][1].argmax())] == int(branch.teacher.ids[node, 0])


def plain_prediction(tokens: list[int]) -> int | None:
    """Return the token that most often followed the longest earlier match of the end; of several the newest."""
    for length in range(min(MAX_MATCH, len(tokens) - 1), MIN_MATCH - 1, -1):
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if ends:
            following = [tokens[end] for end in reversed(ends[-MAX_LINKS:])]
            return max(following, key=following.count)
    return None


@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.integers(0, 6), st.booleans())
def test_predicted_positions_are_those_whose_next_token_followed_the_longest_match(
    tokens: list[int], first_known: int, ends_with_next: bool
) -> None:
    n = len(tokens) - ends_with_next
    w = replace(
        sample(n, min(first_known, n), 0),
        tokens=torch.tensor(tokens[:n]),
        next_token=tokens[n] if ends_with_next else None,
    )
    found = mark_suffix_predictions(w).suffix_predicted
    assert found is not None
    following = [*tokens[1:], None][:n]
    expected = [
        bool(known) and following[i] is not None and plain_prediction(tokens[: i + 1]) == following[i]
        for i, known in enumerate(w.known)
    ]
    assert found.tolist() == expected


def test_parts_of_a_sample_have_the_predicted_positions_of_the_whole() -> None:
    w = replace(sample(16, 6, 6), tokens=torch.tensor([1, 2, 3, 4, 5, 9] * 2 + [1, 2, 3, 4]))
    whole = mark_suffix_predictions(w).suffix_predicted
    assert whole is not None
    assert whole.tolist() == [False] * 7 + [True] * 8 + [False]
    for parts in (split_sample(mark_suffix_predictions(w), 5, 2), map(mark_suffix_predictions, split_sample(w, 5, 2))):
        for part in parts:
            assert part.suffix_predicted is not None
            assert torch.equal(part.suffix_predicted, whole[part.position : part.position + len(part)])


def count_matches(draft: EagleDraft, table: Tensor, w: Sample, root: int, length: int) -> int:
    """Draft a chain token by token, and count how many of its first tokens are committed."""
    chain: list[int] = []
    while len(chain) < length:
        chain.append(KEPT[int(served_chain(draft, table, w, root - 1, chain)[-1][1].argmax())])
    while w.committed_tokens()[root + 1 : root + 1 + len(chain)] != chain:
        chain.pop()
    return len(chain)


def plain_positions(draft: EagleDraft, table: Tensor, w: Sample, lookahead: int) -> tuple[float, int]:
    roots = [root for root in range(1, len(w)) if w.known[root] and root + lookahead < w.committed]
    return sum(count_matches(draft, table, w, root, lookahead) for root in roots), len(roots)


def plain_verify_steps(draft: EagleDraft, table: Tensor, w: Sample, lookahead: int) -> SimulatedAcceptance:
    """Serve the answer: its first token is chosen in prefill, and the last token of each step is a bonus token."""
    root, last = int(w.known.nonzero()[0]) + 1, w.committed - 1
    accepted = verify_steps = 0
    while root < last:
        kept = count_matches(draft, table, w, root, min(lookahead, last - root - 1))
        accepted, verify_steps, root = accepted + kept, verify_steps + 1, root + kept + 1
    return SimulatedAcceptance(accepted, verify_steps)


def test_simulated_acceptance_equals_drafting_token_by_token() -> None:
    table = embeddings(torch.float32)
    w = sample(10, 4, 5)
    tokens = torch.tensor(KEPT)[w.tokens % len(KEPT)]
    # The teacher is certain of the next committed token: chains become right partly, then completely.
    certain = Teacher(torch.cat([tokens[5:], torch.tensor([4])])[:, None], torch.zeros(6, 1))
    w = Sample(w.request, tokens, 4, w.features, w.known, certain)
    draft = tiny_draft(torch.float32)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    seen = set()
    for step in range(60):
        if step % 6 == 0:
            positions = [plain_positions(draft, table, one, 3) for one in (w, SAMPLES[2])]
            found = simulate_positions(draft, table, collate([SAMPLES[2], w]), 3)
            assert found == tuple(map(sum, zip(*positions, strict=True)))
            served = [plain_verify_steps(draft, table, one, 3) for one in (w, SAMPLES[2])]
            assert walk_requests([w, SAMPLES[2]], simulate_each(draft, table, [w, SAMPLES[2]], 3)) == served
            seen.add(served[0].tokens)
        loss = ttt_loss(draft, table, collate([w]), settings(3, 0.8, 0.0))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert len(seen) > 2
    assert max(seen) > 2


def test_a_committed_token_outside_the_draft_vocabulary_is_a_miss() -> None:
    draft, table = tiny_draft(torch.float32), embeddings(torch.float32)
    w = sample(6, 2, 5)
    outside = next(i for i in range(VOCABULARY) if i not in KEPT)
    w = Sample(w.request, torch.full_like(w.tokens, outside), outside, w.features, w.known, w.teacher)
    assert simulate_acceptance(draft, table, [w], 2) == SimulatedAcceptance(0, 3)


def test_an_answer_of_one_token_has_no_verify_step() -> None:
    found = simulate_acceptance(tiny_draft(torch.float32), embeddings(torch.float32), [sample(3, 2, 3)], 5)
    assert found == SimulatedAcceptance(0, 0)
    assert found.accepted_per_step == 0.0
