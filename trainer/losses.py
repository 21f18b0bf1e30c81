"""The EAGLE-3 training-time test with Aurora's second term, accepted and rejected branches in one pass.

Row t of a window reads feature g_t and token x_{t+1}, and its teacher is the target's distribution after consuming
x_{t+1}::

    tokens      x0  x1  x2  x3  x4
    features    g0  g1  g2  g3  g4
    row t=1:    g1 + emb(x2)  ->  predicts x3,  teacher after x2

Step k reads x_{t+1+k} and is taught by the distribution after it; where that is unknown, as behind the last row, there
is no loss. A rejected branch d_1, d_2, .. behind root x_p leaves row p - 1 from step 1 on: it shares that row's
step 0 and is taught by the target's distribution after each d_k from the first rejected node on.

    loss = sum_k decay^k mean_k KL(target || draft)  +  lambda * sum over branch nodes of decay^k KL / number of nodes

Both means run over valid positions only. The teacher is the recorded top k, restricted to the draft vocabulary and
renormalised; the unrecorded tail is ignored. Where less than ``MIN_KEPT_MASS`` of the target's probability is left, the
position is masked: renormalising would blow tokens that the target hardly considers up to certainty.

Shapes: B windows, T tokens, R chains, A accepted ones, K steps, k teacher width, D and V draft and target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.speculator.network import EagleDraft
from trainer.unroll import Unroll
from trainer.windows import Batch, Teacher

MIN_KEPT_MASS = 0.1


class Loss(NamedTuple):
    """The loss of one batch; ``total`` carries the gradient."""

    total: Tensor
    accepted: float
    rejected: float
    """Before lambda."""
    positions: int
    """Teacher distributions learned from, over all steps of the accepted term."""
    nodes: int
    """The same of the rejected term."""


class Target(NamedTuple):
    """Teacher distributions over the draft vocabulary: ids and probabilities [.., k], and where they can be used."""

    ids: Tensor
    probs: Tensor
    usable: Tensor


class Chains(NamedTuple):
    """What each chain reads and is taught at each step; accepted chains first."""

    window_R: Tensor
    row_R: Tensor
    origin_R: Tensor
    """Accepted chain that shares the chain's step 0."""
    tokens_RK: Tensor
    ids_RKk: Tensor
    probs_RKk: Tensor
    learned_RK: Tensor
    accepted: int


def ttt_loss(
    draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, steps: int, decay: float, rejected_weight: float
) -> Loss:
    """Training-time test over a batch.

    Args:
        draft: The network to train.
        embeddings_VH: The target's frozen token embeddings, of any float type.
        batch: Windows with their rejected branches.
        steps: K, at least 1; branches are learned from at steps 1..K-1.
        decay: Weight of each step relative to the one before.
        rejected_weight: Lambda; at 0 the branches are not computed.

    Returns:
        A loss of zero without a gradient where the batch holds nothing to learn from.
    """
    chains = chains_of(draft, batch, steps, with_branches=rejected_weight > 0)
    positions_K = chains.learned_RK[: chains.accepted].sum(0)
    nodes = int(chains.learned_RK[chains.accepted :].sum())
    accepted = rejected = embeddings_VH.new_zeros((), dtype=draft.fc.weight.dtype)
    if len(chains.window_R):
        for k, (rows, kl) in enumerate(_divergences(draft, embeddings_VH, batch, chains)):
            main = rows < chains.accepted
            accepted = accepted + decay**k * kl[main].sum() / positions_K[k].clamp_min(1)
            rejected = rejected + decay**k * kl[~main].sum() / max(nodes, 1)
    return Loss(
        total=accepted + rejected_weight * rejected,
        accepted=float(accepted.detach()),
        rejected=float(rejected.detach()),
        positions=int(positions_K.sum()),
        nodes=nodes,
    )


def chains_of(draft: EagleDraft, batch: Batch, steps: int, *, with_branches: bool) -> Chains:
    """All chains of a batch that have something to learn at any step."""
    teacher_BT = restrict(draft, batch.teacher_BT)
    usable_BT = batch.known_BT & teacher_BT.usable
    length = usable_BT.shape[1]
    learned_BTK = F.pad(usable_BT, (0, steps)).unfold(1, steps, 1)[:, 1:]
    branches = batch.branches
    target_RL = restrict(draft, branches.teacher_RL)
    within = (branches.learned_RL & target_RL.usable)[:, : steps - 1]
    taken = within.any(dim=1) if with_branches else torch.zeros_like(branches.root_R, dtype=torch.bool)
    window_R, row_R = branches.window_R[taken], branches.root_R[taken] - 1

    needed_BT = learned_BTK.any(dim=-1).index_put((window_R, row_R), torch.ones_like(row_R, dtype=torch.bool))
    window_A, row_A = needed_BT.nonzero(as_tuple=True)
    origin_R = (needed_BT.flatten().cumsum(0) - 1)[window_R * length + row_R]
    at = window_A[:, None], (row_A[:, None] + 1 + torch.arange(steps)).clamp_max(length - 1)

    def join(accepted_AK: Tensor, branch_RL: Tensor) -> Tensor:
        """Accepted chains above branches; a branch has nothing at step 0, and no more than it has nodes."""
        branch_RK = branch_RL.new_zeros(len(window_R), *accepted_AK.shape[1:])
        nodes = branch_RL[taken, : steps - 1]
        branch_RK[:, 1 : 1 + nodes.shape[1]] = nodes
        return torch.cat([accepted_AK, branch_RK])

    return Chains(
        window_R=torch.cat([window_A, window_R]),
        row_R=torch.cat([row_A, row_R]),
        origin_R=torch.cat([torch.arange(len(window_A)), origin_R]),
        tokens_RK=join(batch.tokens_BT[at], branches.tokens_RL),
        ids_RKk=join(teacher_BT.ids[at], target_RL.ids),
        probs_RKk=join(teacher_BT.probs[at], target_RL.probs),
        learned_RK=join(learned_BTK[window_A, row_A], within),
        accepted=len(window_A),
    )


def restrict(draft: EagleDraft, teacher: Teacher) -> Target:
    """The teacher over the draft vocabulary: what it keeps of the top k, renormalised."""
    kept = draft.t2d[teacher.ids]
    probs = torch.where(kept, teacher.logprobs.exp(), 0)
    mass = probs.sum(dim=-1, keepdim=True)
    ids = torch.where(kept, (draft.t2d.cumsum(0) - 1)[teacher.ids], 0)
    return Target(ids, probs / mass.clamp_min(MIN_KEPT_MASS), mass.squeeze(-1) >= MIN_KEPT_MASS)


def divergence(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """KL(target || draft) of each row [A], where the target is zero outside the given ids."""
    expected = (probs_Ak * logits_AD.gather(-1, ids_Ak)).sum(dim=-1)
    entropy: Tensor = torch.special.entr(probs_Ak).sum(dim=-1)
    return logits_AD.logsumexp(dim=-1) - expected - entropy


def _divergences(
    draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, chains: Chains
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step the chains that learn in it, and their divergences."""
    unroll = Unroll(draft, embeddings_VH, batch.tokens_BT, batch.features_BTF, chains.window_R, chains.row_R)
    alive = torch.arange(chains.accepted)
    hidden = unroll.first(alive)
    for k in range(chains.learned_RK.shape[1]):
        if k == 1:
            alive, hidden = torch.arange(len(chains.origin_R)), hidden[chains.origin_R]
        if k > 0:
            onward = chains.learned_RK[alive, k:].any(dim=1)
            alive, hidden = alive[onward], hidden[onward]
            hidden = unroll.advance(alive, chains.tokens_RK[alive, k], hidden)
        learning = chains.learned_RK[alive, k]
        rows = alive[learning]
        probs = chains.probs_RKk[rows, k].to(hidden.dtype)
        yield rows, divergence(draft.logits(hidden[learning]), chains.ids_RKk[rows, k], probs)
