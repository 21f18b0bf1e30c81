"""The EAGLE-3 training-time test with Aurora's second term: accepted and rejected tokens in one pass over their trees.

    loss = sum_k decay^k mean_k D(target, draft)  +  lambda * mean over rejected nodes of decay^k D(target, draft)

where D is one of ``trainer.objective.divergences``, k the step of the training-time test (EAGLE-3, arXiv 2503.01840,
section 3.1) and lambda the weight of the rejected tokens (Aurora, arXiv 2602.06932). Means run over the nodes that have
a teacher (``trainer.objective.training_time_test``); a node counts once, however many branches contain it. A sample's
weight scales its part but not the denominator: samples with small weights move the draft less.

What the rejected term can teach: where a chain was rejected, the accepted rows hold the target's distribution already,
so they cover the wrong token itself. The rejected nodes add distributions after tokens that the target did not generate
there. A greedy target never generates them there, but the same tokens recur in trees, where a branch that lost may win
at the next request; a sampled target may generate them the next time.

Three more settings use what was drafted, and whether it was accepted. All are off by default.

- ``rejection_weight`` r: a position where the serving draft was rejected counts 1 + r min(1, q(d) / q_served(d)) times,
  where d is the wrong token. The importance weight is bounded, and fades as the draft stops proposing d.
- ``suffix_predicted_weight`` w: a position counts w times if the suffix draft from the same root is right up to the
  token that the position predicts. There the suffix drafter gains what the draft would; past its first wrong token the
  whole chain is the draft's, so all of it counts once.
- ``policy_weight``: a clipped policy gradient on the accepted tokens per step (PPO's surrogate, arXiv 1707.06347). The
  reward of a choice is the number of tokens accepted from it on, minus the mean over the choices of its step; the ratio
  of the draft's probability to the serving draft's corrects for a draft that has changed since. Verify steps that
  accepted everything leave no branch and are not among the choices, so this term sees fewer successes than there were.

Shapes: A nodes of one level, K TTT steps, P choices, k teacher width, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.settings import Train
from schemas.speculator.network import EagleDraft
from trainer.data.batch import Batch, DraftChoices
from trainer.objective.divergences import DIVERGENCES, POSITIONWISE
from trainer.objective.training_time_test import DraftTrees, DraftUnroll, TreeLevel, build_draft_trees

CLIP = 0.2
"""Relative change of a choice's probability beyond which the policy term has no gradient."""

SumCounts = Callable[[Tensor], Tensor]
"""From the denominators of this batch's means [K + 2] to those of all batches of the step."""


class Loss(NamedTuple):
    """The loss of one batch; ``total`` carries the gradient."""

    total: Tensor
    accepted: float
    accepted_K: tuple[float, ...]
    """Mean divergence of each TTT step; ``accepted`` is their decayed sum."""
    rejected: float
    """Before lambda."""
    policy: float
    """Before its weight."""
    positions: int
    """Teacher distributions of the accepted term, over all TTT steps."""
    nodes: int
    """Teacher distributions of the rejected term."""


class _StepSums(NamedTuple):
    """Sums over the nodes of one TTT step, and their denominators."""

    accepted: Tensor
    rejected: Tensor
    policy: Tensor
    weights: Tensor
    nodes: int
    choices: int


def ttt_loss(
    draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, train: Train, sum_counts: SumCounts = lambda counts: counts
) -> Loss:
    """Compute the training-time test loss of a batch.

    Args:
        draft: The network to train.
        embeddings_VH: The target's frozen token embeddings, of any float type.
        batch: Samples with the drafted tokens.
        train: Number of TTT steps, decay, objectives and weights.
        sum_counts: Makes this batch a part of a larger one: the losses of the parts add up to the loss of the whole.

    Returns:
        A loss of zero without a gradient if the batch has no teacher.
    """
    trees = build_draft_trees(draft, batch, train.ttt_steps, train.rejected_min_prob if train.rejected_weight else None)
    sums = _sum_levels(draft, embeddings_VH, batch, trees, train)
    steps = len(trees.levels)
    nodes, choices = sum(s.nodes for s in sums), sum(s.choices for s in sums)
    weights_K = torch.stack([s.weights for s in sums])
    counts = torch.cat([weights_K, weights_K.new_tensor([nodes, choices])])
    denominators = sum_counts(counts).clamp_min(torch.finfo(counts.dtype).tiny)
    accepted_K = torch.stack([s.accepted for s in sums]) / denominators[:steps]
    decay_K = train.ttt_decay ** torch.arange(steps, device=counts.device)
    accepted = (decay_K * accepted_K).sum()
    rejected = (decay_K * torch.stack([s.rejected for s in sums])).sum() / denominators[steps]
    policy = torch.stack([s.policy for s in sums]).sum() / denominators[steps + 1]
    return Loss(
        total=accepted + train.rejected_weight * rejected + train.policy_weight * policy,
        accepted=float(accepted.detach()),
        accepted_K=tuple(accepted_K.detach().tolist()),
        rejected=float(rejected.detach()),
        policy=float(policy.detach()),
        positions=sum(int(level.learned_A[: level.committed].sum()) for level in trees.levels),
        nodes=nodes,
    )


def _sum_levels(
    draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, trees: DraftTrees, train: Train
) -> list[_StepSums]:
    if not len(trees.row_A):
        return [_empty_sums(draft.fc.weight)] * len(trees.levels)
    unroll = DraftUnroll(draft, embeddings_VH, batch.tokens_BT, batch.features_BTF, batch.position_B)
    sums: list[_StepSums] = []
    for k, level in enumerate(trees.levels):
        if not len(level.parent_A):
            sums.append(_empty_sums(sums[0].accepted))
            continue
        hidden_AH = unroll.advance(level.parent_A, level.tokens_A) if k else unroll.first(trees.sample_A, trees.row_A)
        logits_AD = draft.logits(hidden_AH[level.learned_A])
        if logits_AD.dtype is not torch.float64:
            logits_AD = logits_AD.float()
        sums.append(_sum_level(draft, logits_AD, level, k, batch.choices, train))
    return sums


def _empty_sums(like: Tensor) -> _StepSums:
    zero = like.detach().new_zeros(())
    return _StepSums(zero, zero, zero, zero, 0, 0)


def _sum_level(
    draft: EagleDraft, logits_AD: Tensor, level: TreeLevel, k: int, choices: DraftChoices, train: Train
) -> _StepSums:
    """Return the sums of TTT step k from the logits of the nodes that are learned from."""
    learned_A = level.learned_A
    ids_Ak, probs_Ak = level.ids_Ak[learned_A], level.probs_Ak[learned_A].to(logits_AD.dtype)
    weight_A = level.weight_A[learned_A].to(logits_AD.dtype)
    committed = int(learned_A[: level.committed].sum())
    suffix_predicted_A = level.suffix_predicted_A[learned_A[: level.committed]]
    count_A = torch.where(suffix_predicted_A, train.suffix_predicted_weight, logits_AD.new_ones(committed))
    policy = logits_AD.new_zeros(())
    chosen = _find_choices(draft, level, k, choices) if train.rejection_weight or train.policy_weight else None
    if chosen is not None and len(chosen.choice_P):
        ratio_P = _probability_ratio(draft, logits_AD, chosen, choices)
        gain_P = choices.gain_P[chosen.choice_P].to(logits_AD.dtype)
        if train.rejection_weight:
            wrong_P = (gain_P == 0) * ratio_P.detach().clamp_max(1)
            count_A *= torch.ones_like(count_A).index_add(0, chosen.node_P, train.rejection_weight * wrong_P)
        policy = _clipped_surrogate(ratio_P, gain_P - gain_P.mean(), weight_A[chosen.node_P])
    accepted_A, rejected_A = _divergences(train, committed, logits_AD, ids_Ak, probs_Ak)
    return _StepSums(
        accepted=(weight_A[:committed] * count_A * accepted_A).sum(),
        rejected=(weight_A[committed:] * rejected_A).sum(),
        policy=policy,
        weights=count_A.sum(),
        nodes=len(rejected_A),
        choices=0 if chosen is None else len(chosen.choice_P),
    )


def _divergences(train: Train, committed: int, *tensors: Tensor) -> Sequence[Tensor]:
    """Return the divergences of the committed nodes and of the rejected ones; in one call if the result is the same."""
    if train.objective == train.rejected_objective and train.objective in POSITIONWISE:
        return DIVERGENCES[train.objective](*tensors).tensor_split([committed])
    # Two slices of the logits would each have a gradient of the size of all logits.
    accepted, rejected = zip(*(torch.split(x, [committed, len(x) - committed]) for x in tensors), strict=True)
    return DIVERGENCES[train.objective](*accepted), DIVERGENCES[train.rejected_objective](*rejected)


class _LevelChoices(NamedTuple):
    """Choices that one TTT step predicts: their index, and the index of their node among the learned ones.

    A choice outside the draft vocabulary is excluded: a draft with another one made it, and this one never does.
    """

    choice_P: Tensor
    node_P: Tensor


def _find_choices(draft: EagleDraft, level: TreeLevel, k: int, choices: DraftChoices) -> _LevelChoices:
    (choice_P,) = ((choices.step_P == k) & draft.t2d[choices.token_P]).nonzero(as_tuple=True)
    index_P = level.index_BT[choices.sample_P[choice_P], choices.row_P[choice_P]]
    learned_P = (index_P >= 0) & level.learned_A[index_P]
    return _LevelChoices(choice_P[learned_P], (level.learned_A.cumsum(0) - 1)[index_P[learned_P]])


def _probability_ratio(draft: EagleDraft, logits_AD: Tensor, chosen: _LevelChoices, choices: DraftChoices) -> Tensor:
    """Return [P]: the draft's probability of each chosen token over the serving draft's."""
    token_P = (draft.t2d.cumsum(0) - 1)[choices.token_P[chosen.choice_P]]
    logits_PD = logits_AD[chosen.node_P]
    logq_P = logits_PD.gather(-1, token_P[:, None]).squeeze(-1) - logits_PD.logsumexp(dim=-1)
    return (logq_P - choices.logprob_P[chosen.choice_P].to(logq_P.dtype)).exp()


def _clipped_surrogate(ratio_P: Tensor, advantage_P: Tensor, weight_P: Tensor) -> Tensor:
    """Return the sum of PPO's clipped surrogate, to be minimised."""
    clipped_P = ratio_P.clamp(1 - CLIP, 1 + CLIP)
    return -(weight_P * torch.minimum(ratio_P * advantage_P, clipped_P * advantage_P)).sum()
