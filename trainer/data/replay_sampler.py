"""Which windows a step is made of, and how much of what was drafted counts: pure functions over a given generator.

A window's odds to be drawn for replay are ::

    2 ^ (-age / half_life)  *  count ^ -balance

with age the windows that were first learned from after it, and count the windows of its label that can be drawn. At
balance 0 labels come as often as traffic has them, at 1 each is as likely as any other; between the two a label with
a share s of the windows comes in proportion to s ^ (1 - balance). Windows without a label are one label. As age counts
beside, a label that traffic has left fades as everything old does.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence

LEAST_STALE = 1 / 16
"""Weight below which no staleness brings a branch."""


def log_odds(
    ages: Sequence[int], labels: Sequence[str | None], half_life: float = 0.0, balance: float = 0.0
) -> list[float]:
    """Logarithm of each window's odds, up to a constant.

    Args:
        ages: Windows that are newer than each.
        labels: The label of each.
        half_life: Age at which the odds are half of those of a new window; 0 lets nothing age.
        balance: From 0, as traffic comes, to 1, all labels alike.
    """
    counts = Counter(labels)
    decay = math.log(2) / half_life if half_life else 0.0
    return [-decay * age - balance * math.log(counts[label]) for age, label in zip(ages, labels, strict=True)]


def draw(generator: random.Random, odds: Sequence[float], number: int) -> list[int]:
    """Indices of so many draws without replacement, each in proportion to the odds of those that are left.

    An exponential race: the smallest of E_i / w_i, with E_i exponential, is i with probability w_i / sum w, and the
    next ones are what drawing on would give (Efraimidis and Spirakis, "Weighted random sampling with a reservoir",
    2006). In logarithms no odds underflow.

    Args:
        generator: Asked once for each of the odds, whatever is drawn.
        odds: Their logarithms.
        number: At most as many as there are odds.
    """
    waits = [math.log(max(generator.expovariate(1.0), sys.float_info.min)) - w for w in odds]
    return heapq.nsmallest(number, range(len(waits)), key=waits.__getitem__)


def staleness(behind: int, half_life: float) -> float:
    """Weight in [``LEAST_STALE``, 1] of what a draft proposed that was so many versions behind.

    For rejected branches alone. The teacher is the target's distribution behind whatever words were drafted, so no
    branch is ever wrong, and accepted windows are what the target says under any draft. But a branch was chosen by the
    draft that served then: what it taught is of use where the draft of today would go astray the same way, and that
    becomes rarer with every version.

    Args:
        behind: Versions; 0 or less is no staleness.
        half_life: Versions after which a branch counts half; 0 turns this off.
    """
    if not half_life:
        return 1.0
    return max(math.exp2(-max(behind, 0) / half_life), LEAST_STALE)


def version_number(speculator: str) -> int:
    """Number of a registered version; 0 for the draft of day 0, and for none."""
    return int(speculator) if speculator.isdecimal() else 0
