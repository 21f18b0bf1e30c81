"""The verify steps that serving would run along known tokens: their number, and how many draft tokens they accept.

Where a verify step starts depends on what the steps before it accepted, so serving's accepted tokens per step is not a
mean over all positions. For a greedy request the steps follow from the tokens. For a sampled one each draft token is
accepted with a probability: then all possible steps count with their probability, and the figures are expectations
*given the tokens*.

Shapes: R positions at which a verify step may start, K longest draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.objective.simulated_acceptance import F64, expect_starts


@dataclass(frozen=True, slots=True)
class ExpectedSteps:
    """The expected verify steps of a request; whole numbers for a greedy one."""

    verify_steps: float
    accepted: float
    possible_K: tuple[float, ...]
    """By depth from 1, verify steps that could accept a token of that depth."""
    accepted_K: tuple[float, ...]
    """By depth from 1, verify steps that did."""
    all_positions_accepted: float
    """Accepted tokens of the same chains from all positions with K later tokens."""
    all_positions: int


def expect_steps(probs_RK: F64) -> ExpectedSteps:
    """Walk from the first position to the end of the request.

    The request's last token is the bonus of its last verify step, so a step accepts at most one token less than remain.

    Args:
        probs_RK: Probability that the draft token of depth 1, 2, .. is accepted, given that the ones before it are,
            from the root at each position but the last; 0 past the end. The first root is the first answer token.
    """
    positions, longest = probs_RK.shape
    reach_RK = probs_RK.cumprod(axis=1)
    inside_RK = np.arange(positions)[:, None] + np.arange(1, longest + 1) < positions
    starts_R = expect_starts(reach_RK * inside_RK)
    accepted_K = starts_R @ (reach_RK * inside_RK)
    all_positions = max(positions - longest + 1, 0)
    return ExpectedSteps(
        verify_steps=float(starts_R.sum()),
        accepted=float(accepted_K.sum()),
        possible_K=tuple((starts_R @ inside_RK).tolist()),
        accepted_K=tuple(accepted_K.tolist()),
        all_positions_accepted=float(reach_RK[:all_positions].sum()),
        all_positions=all_positions,
    )
