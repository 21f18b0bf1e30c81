"""The EAGLE-3 training-time test with Aurora's second term, accepted and rejected tokens in one pass over their trees.

    loss = sum_k decay^k mean_k D(target, draft)  +  lambda * mean over rejected nodes of decay^k D(target, draft)

with D one of ``trainer.objective.divergences``, k the step of the training-time test (EAGLE-3, arXiv 2503.01840,
section 3.1) and
lambda the weight of the discarded tokens (Aurora, arXiv 2602.06932). Means run over the nodes that have a teacher
(``trainer.objective.draft_trees``), and each node counts once however many branches it is on. A window's weight
scales its part and
not the number it is divided by: what is weighted down moves the draft less.

What the rejected term can teach. Where a chain was rejected the accepted rows hold the target's distribution already,
so nothing about the token that was wrong is new: the rejected nodes add distributions after words that the target did
not say there. A greedy target never says them there; the same words come up in trees, where a branch that lost may win
at the next request, and for sampled targets, which may say them the next time.

Two more terms use what the draft that served chose, and whether it was kept. Both are off by default.

- ``rejection_weight`` r: a position where the served draft was rejected counts 1 + r min(1, q(d) / q_served(d)) times,
  d being the token that was wrong. The importance weight is bounded, and fades as the draft stops proposing d.
- ``policy_weight``: a clipped policy gradient on the accepted tokens per step (PPO's surrogate, arXiv 1707.06347).
The reward of
  a choice is how many tokens were kept from it on, less the mean over the choices of its step; the ratio of the draft's
  probability to the served one's corrects for a draft that has moved on. Verify steps that were kept whole leave no
  branch
  and are not among the choices, so this sees fewer successes than there were.

Shapes: A nodes of one step, K steps, P choices, k teacher width, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.settings import Train
from schemas.speculator.network import EagleDraft
from trainer.data.samples import Batch, Choices
from trainer.objective.divergences import DIVERGENCES, OF_EACH_ALONE
from trainer.objective.draft_trees import Forest, Step, grow
from trainer.objective.unroll import Unroll

CLIP = 0.2
"""Change of a choice's probability, as a share, beyond which the policy term pushes no further."""

Totals = Callable[[Tensor], Tensor]
"""From the denominators of this batch's means [K + 2] to those of all batches that make up the step."""


class Loss(NamedTuple):
    """The loss of one batch; ``total`` carries the gradient."""

    total: Tensor
    accepted: float
    accepted_K: tuple[float, ...]
    """Mean divergence of each step of the training-time test; ``accepted`` is their decayed sum."""
    rejected: float
    """Before lambda."""
    policy: float
    """Before its weight."""
    positions: int
    """Teacher distributions learned from, over all steps of the accepted term."""
    nodes: int
    """The same of the rejected term."""


class _Sums(NamedTuple):
    """Sums over the nodes of one step, and what they are to be divided by."""

    accepted: Tensor
    rejected: Tensor
    policy: Tensor
    weights: Tensor
    nodes: int
    choices: int


def ttt_loss(
    draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, train: Train, totals: Totals = lambda own: own
) -> Loss:
    """Training-time test over a batch.

    Args:
        draft: The network to train.
        embeddings_VH: The target's frozen token embeddings, of any float type.
        batch: Windows with what was drafted beside them.
        train: Steps, decay, objectives and weights.
        totals: Makes this batch a part of a larger one: the losses of the parts then add up to that of the whole.

    Returns:
        A loss of zero without a gradient where the batch holds nothing to learn from.
    """
    forest = grow(draft, batch, train.ttt_steps, train.rejected_min_prob if train.rejected_weight else None)
    sums = _sums(draft, embeddings_VH, batch, forest, train)
    steps = len(forest.steps)
    nodes, choices = sum(s.nodes for s in sums), sum(s.choices for s in sums)
    weights_K = torch.stack([s.weights for s in sums])
    own = torch.cat([weights_K, weights_K.new_tensor([nodes, choices])])
    over = totals(own).clamp_min(torch.finfo(own.dtype).tiny)
    accepted_K = torch.stack([s.accepted for s in sums]) / over[:steps]
    decay_K = train.ttt_decay ** torch.arange(steps, device=own.device)
    accepted = (decay_K * accepted_K).sum()
    rejected = (decay_K * torch.stack([s.rejected for s in sums])).sum() / over[steps]
    policy = torch.stack([s.policy for s in sums]).sum() / over[steps + 1]
    return Loss(
        total=accepted + train.rejected_weight * rejected + train.policy_weight * policy,
        accepted=float(accepted.detach()),
        accepted_K=tuple(accepted_K.detach().tolist()),
        rejected=float(rejected.detach()),
        policy=float(policy.detach()),
        positions=sum(int(step.learned_A[: step.committed].sum()) for step in forest.steps),
        nodes=nodes,
    )


def _sums(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, forest: Forest, train: Train) -> list[_Sums]:
    """The sums of every step."""
    if not len(forest.row_A):
        return [_nothing(draft.fc.weight)] * len(forest.steps)
    unroll = Unroll(draft, embeddings_VH, batch.tokens_BT, batch.features_BTF)
    sums: list[_Sums] = []
    for k, step in enumerate(forest.steps):
        if not len(step.parent_A):
            sums.append(_nothing(sums[0].accepted))
            continue
        hidden_AH = unroll.advance(step.parent_A, step.tokens_A) if k else unroll.first(forest.window_A, forest.row_A)
        logits_AD = draft.logits(hidden_AH[step.learned_A])
        if logits_AD.dtype is not torch.float64:
            logits_AD = logits_AD.float()
        sums.append(_sums_of(draft, logits_AD, step, k, batch.choices, train))
    return sums


def _nothing(like: Tensor) -> _Sums:
    zero = like.detach().new_zeros(())
    return _Sums(zero, zero, zero, zero, 0, 0)


def _sums_of(draft: EagleDraft, logits_AD: Tensor, step: Step, k: int, choices: Choices, train: Train) -> _Sums:
    """The sums of one step from the scores of the nodes that are learned from."""
    learned_A = step.learned_A
    ids_Ak, probs_Ak = step.ids_Ak[learned_A], step.probs_Ak[learned_A].to(logits_AD.dtype)
    weight_A = step.weight_A[learned_A].to(logits_AD.dtype)
    committed = int(learned_A[: step.committed].sum())
    counted_A = logits_AD.new_ones(committed)
    policy = logits_AD.new_zeros(())
    chosen = _chosen(step, k, choices) if train.rejection_weight or train.policy_weight else None
    if chosen is not None and len(chosen.choice_P):
        ratio_P = _ratio(draft, logits_AD, chosen, choices)
        gain_P = choices.gain_P[chosen.choice_P].to(logits_AD.dtype)
        if train.rejection_weight:
            wrong_P = (gain_P == 0) * ratio_P.detach().clamp_max(1)
            counted_A = counted_A.index_add(0, chosen.node_P, train.rejection_weight * wrong_P)
        policy = _surrogate(ratio_P, gain_P - gain_P.mean(), weight_A[chosen.node_P])
    accepted_A, rejected_A = _divergences(train, committed, logits_AD, ids_Ak, probs_Ak)
    return _Sums(
        accepted=(weight_A[:committed] * counted_A * accepted_A).sum(),
        rejected=(weight_A[committed:] * rejected_A).sum(),
        policy=policy,
        weights=counted_A.sum(),
        nodes=len(rejected_A),
        choices=0 if chosen is None else len(chosen.choice_P),
    )


def _divergences(train: Train, committed: int, *of: Tensor) -> Sequence[Tensor]:
    """Of the committed tokens, and of the rejected nodes behind them; in one where that is the same."""
    if train.objective == train.rejected_objective and train.objective in OF_EACH_ALONE:
        return DIVERGENCES[train.objective](*of).tensor_split([committed])
    # Two slices of the scores would each have a gradient of the size of all of them.
    accepted, rejected = zip(*(torch.split(x, [committed, len(x) - committed]) for x in of), strict=True)
    return DIVERGENCES[train.objective](*accepted), DIVERGENCES[train.rejected_objective](*rejected)


class _Chosen(NamedTuple):
    """Choices that one step predicts at nodes that are learned from: their numbers, and those of the nodes."""

    choice_P: Tensor
    node_P: Tensor


def _chosen(step: Step, k: int, choices: Choices) -> _Chosen:
    (at_step_P,) = (choices.step_P == k).nonzero(as_tuple=True)
    place_P = step.place_BT[choices.window_P[at_step_P], choices.row_P[at_step_P]]
    there_P = (place_P >= 0) & step.learned_A[place_P]
    return _Chosen(at_step_P[there_P], (step.learned_A.cumsum(0) - 1)[place_P[there_P]])


def _ratio(draft: EagleDraft, logits_AD: Tensor, chosen: _Chosen, choices: Choices) -> Tensor:
    """[P] by how much likelier the draft is to choose the token than the one that served was."""
    token_P = (draft.t2d.cumsum(0) - 1)[choices.token_P[chosen.choice_P]]
    logits_PD = logits_AD[chosen.node_P]
    logq_P = logits_PD.gather(-1, token_P[:, None]).squeeze(-1) - logits_PD.logsumexp(dim=-1)
    return (logq_P - choices.logprob_P[chosen.choice_P].to(logq_P.dtype)).exp()


def _surrogate(ratio_P: Tensor, advantage_P: Tensor, weight_P: Tensor) -> Tensor:
    """PPO's clipped surrogate, to be minimised, summed."""
    clipped_P = ratio_P.clamp(1 - CLIP, 1 + CLIP)
    return -(weight_P * torch.minimum(ratio_P * advantage_P, clipped_P * advantage_P)).sum()
