"""The verify steps that serving would run along tokens that are known: how many, and what of their drafts is kept.

Where a verify step begins depends on what the verify steps before it kept, so the accepted tokens per step of
serving is no mean over all
positions. For a greedy request the verify steps follow from the tokens. For a sampled one each drafted token was
kept with a
chance: then the verify steps are all that may have been, each with its probability, and the figures are what is
expected
*given the tokens*: the chance that a verify step begins at a position is the sum, over the positions before, of the
chance
that a verify step began there and ended here.

Shapes: R positions from which a verify step may begin, K longest draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class VerifySteps:
    """What the verify steps of a request come to; whole numbers where nothing was left to chance."""

    verify_steps: float
    accepted: float
    tried_K: tuple[float, ...]
    """By depth from 1, verify steps whose draft could be kept so deep."""
    kept_K: tuple[float, ...]
    """Of those, the ones in which it was."""
    everywhere_accepted: float
    """The same chains from all positions that have K tokens behind them, as
    ``trainer.objective.simulated_acceptance`` looks at them.
    """
    everywhere: int


def run(chance_RK: F64) -> VerifySteps:
    """Walk from the first position to the end of the request.

    The request's last token ends its last verify step as the bonus, so a verify step keeps one token less than are
    left at most.

    Args:
        chance_RK: From the root at each position but the last, the first one that of the first token of the answer:
            the chance that a draft's token of depth 1, 2, .. is kept, given that those before it are; 0 past the end.
    """
    positions, longest = chance_RK.shape
    reach_RK = chance_RK.cumprod(axis=1)
    begins = np.zeros(positions + 1)
    begins[0] = 1.0
    kept, tried = np.zeros(longest), np.zeros(longest)
    for root in range(positions):
        if not begins[root]:
            continue
        most = min(longest, positions - 1 - root)
        reach = reach_RK[root, :most]
        tried[:most] += begins[root]
        kept[:most] += begins[root] * reach
        # The chance of 0, 1, .. most tokens and no more.
        exactly = np.append(1.0, reach) - np.append(reach, 0.0)
        begins[root + 1 : root + 2 + most] += begins[root] * exactly
    everywhere = max(positions - longest + 1, 0)
    return VerifySteps(
        verify_steps=float(begins[:positions].sum()),
        accepted=float(kept.sum()),
        tried_K=tuple(tried.tolist()),
        kept_K=tuple(kept.tolist()),
        everywhere_accepted=float(reach_RK[:everywhere].sum()),
        everywhere=everywhere,
    )
