"""Noise that decides sampled tokens: a function of seed, position and token, so that it needs no state.

The token with the largest p / E, where E has the exponential distribution, is x with probability p(x) (the Gumbel-max
trick). Target and speculator use the same noise, so they choose the same token more often than two draws would, and a
seed gives the same tokens whatever was drafted.

The numbers are those of SplitMix64 (Steele et al., OOPSLA 2014), whose n-th number is a function of state and n: the
state belongs to seed and position, and n is the token.

Shape suffixes: V tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_U64 = NDArray[np.uint64]
_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def exponential_noise(seed: int, position: int, tokens_V: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return an exponential variate [V] above 0 for each token.

    Args:
        seed: Any integer; its lowest 64 bits count.
        position: Index of the token to choose in its sequence, at least 0.
        tokens_V: Token ids.
    """
    stream = _mix(_mix(np.array([seed & _MASK], np.uint64)) + np.uint64(position * _GAMMA & _MASK))
    numbers_V = tokens_V.astype(np.uint64)
    numbers_V += np.uint64(1)
    numbers_V *= np.uint64(_GAMMA)
    numbers_V += stream
    numbers_V = _mix(numbers_V)
    numbers_V >>= np.uint64(12)
    # 52 bits and a half: 0 and 1 are no values, and the smallest variate is 2^-53.
    uniform_V = numbers_V.astype(np.float64)
    uniform_V += 0.5
    uniform_V *= 2.0**-52
    np.log(uniform_V, out=uniform_V)
    return np.negative(uniform_V, out=uniform_V)


def choose_token(probs_V: Tensor, seed: int, position: int) -> int:
    """Return the token that the noise chooses from a distribution; a token without mass is never chosen.

    Raises:
        FloatingPointError: the probabilities are not finite.
    """
    p_V = probs_V.numpy()
    tokens = np.flatnonzero(p_V != 0)  # NumPy counts booleans four times as fast as numbers
    scores = p_V[tokens] / exponential_noise(seed, position, tokens)
    best = int(scores.argmax()) if len(scores) else -1
    if best < 0 or not np.isfinite(scores[best]):
        raise FloatingPointError("the sampling probabilities are not finite: the model's logits are invalid")
    return int(tokens[best])


def _mix(state_V: _U64) -> _U64:
    """Return the output function of SplitMix64."""
    x_V = state_V >> np.uint64(30)
    x_V ^= state_V
    x_V *= np.uint64(0xBF58476D1CE4E5B9)
    shifted_V = x_V >> np.uint64(27)
    x_V ^= shifted_V
    x_V *= np.uint64(0x94D049BB133111EB)
    x_V ^= np.right_shift(x_V, np.uint64(31), out=shifted_V)
    return x_V
