"""The padded, gathered training-time test against plain references that know one window, one position, one chain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from trainer.lookahead import Accepted, simulated_accept_length
from trainer.losses import MIN_KEPT_MASS, divergence, ttt_loss
from trainer.unroll import Unroll
from trainer.windows import Branch, Teacher, Window, collate, cut

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


def window(n: int, first_known: int, seed: int, *, branches: Sequence[tuple[int, int, int]] = (), k: int = 5) -> Window:
    """Random window; ``branches`` are (root, nodes, accepted prefix)."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (n,), generator=g)
    grown = []
    for root, nodes, prefix in branches:
        inside = tokens[root + 1 : root + 1 + prefix].tolist()
        drafted = [KEPT[i] for i in torch.randint(0, len(KEPT), (nodes - len(inside),), generator=g).tolist()]
        grown.append(Branch(root, (*inside, *drafted), prefix, teacher(nodes, g, k)))
    return Window(
        request=f"r{seed}",
        tokens=tokens,
        next_token=3,
        features=torch.randn(n, SHAPE.feature_width, generator=g).to(torch.bfloat16),
        known=torch.arange(n) >= first_known,
        teacher=teacher(n - first_known, g, k),
        branches=tuple(grown),
    )


def certain_window(seed: int) -> Window:
    """Six tokens, teachers that each name one token of the draft vocabulary, and a branch of two nodes."""
    g = torch.Generator().manual_seed(seed)
    said = torch.tensor(KEPT)[torch.randint(0, len(KEPT), (6, 1), generator=g)]
    w = window(6, 2, seed)
    branch = Branch(3, (1, 2), 0, Teacher(said[4:], torch.zeros(2, 1)))
    return Window(w.request, w.tokens, 3, w.features, w.known, Teacher(said[:4], torch.zeros(4, 1)), (branch,))


def embeddings(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(VOCABULARY, SHAPE.hidden_size, generator=torch.Generator().manual_seed(9)).to(dtype)


WINDOWS = [
    window(9, 3, 0, branches=[(3, 3, 0), (4, 3, 1), (6, 2, 0), (7, 1, 0)]),
    window(5, 0, 1, branches=[(1, 4, 2)]),
    window(12, 7, 2, k=3),
    window(3, 2, 3, branches=[(2, 3, 0)]),
]


def served_chain(
    draft: EagleDraft, table_VH: Tensor, w: Window, row: int, drafted: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Hidden state and scores after each step, as a node drafts: a cache that grows by one token at a time."""
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


def plain_divergence(logits_D: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor | None:
    kept = {KEPT.index(i): math.exp(lp) for i, lp in zip(ids.tolist(), logprobs.tolist(), strict=True) if i in KEPT}
    mass = sum(kept.values())
    if mass < MIN_KEPT_MASS:
        return None
    q = logits_D.log_softmax(0)
    return sum((p / mass * (math.log(p / mass) - q[i]) for i, p in kept.items()), torch.zeros((), dtype=q.dtype))


def plain_loss(
    draft: EagleDraft, table_VH: Tensor, windows: Sequence[Window], steps: int, decay: float, weight: float
) -> tuple[Tensor, int, int]:
    """The definition, one term after the other."""
    accepted: list[list[Tensor]] = [[] for _ in range(steps)]
    rejected: list[Tensor] = []
    for w in windows:
        place = {int(i): j for j, i in enumerate(w.known.nonzero())}
        for row in range(len(w) - 1):
            outputs = served_chain(draft, table_VH, w, row, w.tokens[row + 2 : row + 1 + steps].tolist())
            for k, (_, scores) in enumerate(outputs):
                if (j := place.get(row + 1 + k)) is not None:
                    kl = plain_divergence(scores, w.teacher.ids[j], w.teacher.logprobs[j])
                    accepted[k] += [] if kl is None else [kl]
        for b in w.branches:
            outputs = served_chain(draft, table_VH, w, b.root - 1, b.tokens[: steps - 1])
            for k in range(b.accepted_prefix + 1, len(outputs)):
                kl = plain_divergence(outputs[k][1], b.teacher.ids[k - 1], b.teacher.logprobs[k - 1])
                rejected += [] if kl is None else [decay**k * kl]
    total = sum(decay**k * torch.stack(kls).mean() for k, kls in enumerate(accepted) if kls)
    if rejected and weight:
        total = total + weight * torch.stack(rejected).mean()
    return total, sum(map(len, accepted)), len(rejected)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_loss_and_gradients_are_those_of_the_plain_definition(steps: int, weight: float) -> None:
    draft, table = tiny_draft(), embeddings()
    loss = ttt_loss(draft, table, collate(WINDOWS), steps, 0.8, weight)
    expected, positions, nodes = plain_loss(draft, table, WINDOWS, steps, 0.8, weight)
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-8)
    assert loss.positions == positions
    assert loss.nodes == (nodes if weight else 0)
    names, parameters = zip(*draft.named_parameters(), strict=True)
    found = torch.autograd.grad(loss.total, parameters)
    wanted = torch.autograd.grad(expected, parameters)
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_are_those_of_finite_differences() -> None:
    draft, table, batch = tiny_draft(), embeddings(), collate(WINDOWS)
    loss = ttt_loss(draft, table, batch, 4, 0.8, 0.5).total
    g = torch.Generator().manual_seed(4)
    for parameter, slope in zip(draft.parameters(), torch.autograd.grad(loss, list(draft.parameters())), strict=True):
        direction = torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
                ends.append(ttt_loss(draft, table, batch, 4, 0.8, 0.5).total)
                parameter.add_(direction, alpha=-sign * 1e-5)
        assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float((slope * direction).sum()), rel=1e-4, abs=1e-6)


def test_the_recursion_is_what_serving_drafts_token_by_token() -> None:
    draft, table, batch = tiny_draft(), embeddings(), collate(WINDOWS)
    chains = [(0, 2, [5, 9, 1]), (0, 2, [5, 0, 0]), (0, 7, [2, 2, 2]), (2, 0, [1, 2, 4]), (3, 1, [7, 9, 20])]
    unroll = Unroll(
        draft,
        table,
        batch.tokens_BT,
        batch.features_BTF,
        torch.tensor([b for b, _, _ in chains]),
        torch.tensor([row for _, row, _ in chains]),
    )
    everyone = torch.arange(len(chains))
    hidden = unroll.first(everyone)
    served = [served_chain(draft, table, WINDOWS[b], row, tokens) for b, row, tokens in chains]
    torch.testing.assert_close(hidden, torch.stack([s[0][0] for s in served]))
    for k in range(3):
        hidden = unroll.advance(everyone, torch.tensor([tokens[k] for _, _, tokens in chains]), hidden)
        torch.testing.assert_close(hidden, torch.stack([s[k + 1][0] for s in served]))


def test_a_chain_that_ends_early_leaves_the_others_as_they_are() -> None:
    draft, table, batch = tiny_draft(), embeddings(), collate(WINDOWS)
    unroll = Unroll(draft, table, batch.tokens_BT, batch.features_BTF, torch.tensor([0, 0, 1]), torch.tensor([2, 3, 1]))
    hidden = unroll.first(torch.arange(3))
    onward = torch.tensor([1, 2])
    hidden = unroll.advance(onward, torch.tensor([4, 5]), hidden[onward])
    torch.testing.assert_close(hidden[0], served_chain(draft, table, WINDOWS[0], 3, [4])[1][0])
    torch.testing.assert_close(hidden[1], served_chain(draft, table, WINDOWS[1], 1, [5])[1][0])


def test_padding_and_company_do_not_change_a_windows_loss() -> None:
    draft, table = tiny_draft(), embeddings()
    alone = ttt_loss(draft, table, collate(WINDOWS[:1]), 3, 1.0, 0.0)
    silent = window(14, 14, 7)
    together = ttt_loss(draft, table, collate([silent, WINDOWS[0]]), 3, 1.0, 0.0)
    torch.testing.assert_close(alone.total, together.total)


def test_a_batch_without_a_teacher_has_no_loss() -> None:
    loss = ttt_loss(tiny_draft(), embeddings(), collate([window(6, 6, 0)]), 3, 0.8, 0.1)
    assert (float(loss.total), loss.positions, loss.nodes) == (0.0, 0, 0)


def test_a_position_whose_teacher_is_almost_outside_the_draft_vocabulary_is_masked() -> None:
    draft, table = tiny_draft(), embeddings()
    outside = next(i for i in range(VOCABULARY) if i not in KEPT)
    probs = torch.tensor([[0.93, 0.05, 0.02], [0.5, 0.4, 0.1]])
    w = Window("r", torch.tensor([1, 2, 4]), None, torch.ones(3, 24).bfloat16(), torch.tensor([False, True, True]),
               Teacher(torch.tensor([[outside, 1, 2]] * 2), probs.log()))  # fmt: skip
    loss = ttt_loss(draft, table, collate([w]), 1, 1.0, 0.0)
    scores = served_chain(draft, table, w, 1, [])[0][1].log_softmax(0)
    expected = sum(p * (math.log(p) - scores[i]) for p, i in [(0.8, 1), (0.2, 2)])
    assert loss.positions == 1
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-6)


def test_divergence_is_zero_only_where_the_draft_agrees() -> None:
    probs = torch.tensor([[0.7, 0.3]])
    ids = torch.tensor([[2, 0]])
    agreeing = torch.full((1, 4), -60.0)
    agreeing[0, 2], agreeing[0, 0] = math.log(0.7), math.log(0.3)
    assert float(divergence(agreeing, ids, probs)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(torch.zeros(1, 4), ids, probs)) > 0.5


def test_one_tiny_batch_can_be_learned_by_heart_past_its_rejections() -> None:
    draft, table, w = tiny_draft(torch.float32), embeddings(torch.float32), certain_window(5)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        loss = ttt_loss(draft, table, collate([w]), 3, 0.8, 1.0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.accepted < 0.02
    assert loss.rejected < 0.02
    branch = w.branches[0]
    said = served_chain(draft, table, w, branch.root - 1, branch.tokens)
    for node in range(2):
        assert KEPT[int(said[node + 1][1].argmax())] == int(branch.teacher.ids[node, 0])


def test_a_window_is_cut_into_pieces_that_keep_every_teacher_and_reachable_branch() -> None:
    w = window(11, 5, 6, branches=[(5, 2, 0), (8, 2, 0), (9, 2, 0)])
    pieces = cut(w, 4)
    assert [p.tokens.tolist() for p in pieces] == [w.tokens[4:8].tolist(), w.tokens[8:11].tolist()]
    assert [p.next_token for p in pieces] == [int(w.tokens[8]), 3]
    assert torch.equal(torch.cat([p.teacher.ids for p in pieces]), w.teacher.ids)
    assert [[b.root for b in p.branches] for p in pieces] == [[1], [1]]
    assert [len(p) for p in cut(w, 11)] == [11]


def plain_accept_length(draft: EagleDraft, table: Tensor, w: Window, lookahead: int) -> Accepted:
    tokens = [*w.tokens.tolist(), *([] if w.next_token is None else [w.next_token])]
    kept = positions = 0
    for root in range(1, len(w)):
        if not w.known[root] or root + lookahead >= len(tokens):
            continue
        positions += 1
        chain: list[int] = []
        while len(chain) < lookahead:
            chain.append(KEPT[int(served_chain(draft, table, w, root - 1, chain)[-1][1].argmax())])
        while chain and tokens[root + 1 : root + 1 + len(chain)] != chain:
            chain.pop()
        kept += len(chain)
    return Accepted(kept, positions)


def test_simulated_accept_length_is_that_of_drafting_token_by_token() -> None:
    table = embeddings(torch.float32)
    w = window(10, 4, 5)
    tokens = torch.tensor(KEPT)[w.tokens % len(KEPT)]
    # A teacher that is certain of the next committed token: chains become right in part, then as a whole.
    certain = Teacher(torch.cat([tokens[5:], torch.tensor([4])])[:, None], torch.zeros(6, 1))
    w = Window(w.request, tokens, 4, w.features, w.known, certain)
    draft = tiny_draft(torch.float32)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    seen = set()
    for step in range(60):
        if step % 6 == 0:
            found = simulated_accept_length(draft, table, collate([WINDOWS[2], w]), 3)
            alone, other = plain_accept_length(draft, table, w, 3), plain_accept_length(draft, table, WINDOWS[2], 3)
            assert found == (alone.tokens + other.tokens, alone.positions + other.positions)
            seen.add(found.tokens)
        loss = ttt_loss(draft, table, collate([w]), 3, 0.8, 0.0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert len(seen) > 3
    assert max(seen) > 6


def test_a_committed_token_outside_the_draft_vocabulary_is_a_miss_and_not_left_out() -> None:
    draft, table = tiny_draft(torch.float32), embeddings(torch.float32)
    w = window(6, 2, 5)
    outside = next(i for i in range(VOCABULARY) if i not in KEPT)
    w = Window(w.request, torch.full_like(w.tokens, outside), outside, w.features, w.known, w.teacher)
    assert simulated_accept_length(draft, table, collate([w]), 2) == Accepted(0, 3)


def test_windows_too_short_for_the_lookahead_count_no_position() -> None:
    found = simulated_accept_length(tiny_draft(torch.float32), embeddings(torch.float32), collate([window(3, 2, 3)]), 5)
    assert found == Accepted(0, 0)
    assert found.length == 0.0
