"""What a trainer does that is too far behind: it reads a share of the requests until it has caught up.

Which requests belong to a share follows from a hash of their ids. It is the same on nodes, which then publish no
others (``schemas.events.TrainerLag``).
"""

from __future__ import annotations

from collections.abc import Mapping

from schemas.events import MIN_SHARE
from schemas.hash_sampling import is_in_share


def next_share(share: float, lag: float, previous_lag: float, max_lag: float) -> float:
    """Return the share of the requests to read, after the lag was measured.

    The share halves at each measurement while the lag exceeds its maximum and does not fall. It doubles while the lag
    is below half of the maximum. In between it stays, so that it does not alternate.

    Args:
        share: Current share, at most 1.
        lag: Age of the oldest unread commit in seconds.
        previous_lag: The same at the measurement before.
        max_lag: Maximum lag in seconds; 0 reads all.
    """
    if not max_lag:
        return 1.0
    if lag <= max_lag / 2:
        return min(1.0, 2 * share)
    if lag > max_lag and lag >= previous_lag:
        return max(MIN_SHARE, share / 2)
    return share


def select_requests(rejected_branches: Mapping[str, int], share: float) -> set[str]:
    """Return which requests of one read to keep; requests with rejected branches have precedence.

    Args:
        rejected_branches: Rejected branches of each request.
        share: Share of the requests to keep; requests without a rejected branch are kept as far as the others do not
            fill it.
    """
    with_branches = sum(count > 0 for count in rejected_branches.values())
    without = len(rejected_branches) - with_branches
    room = share * len(rejected_branches)
    # Of requests that all belong to the share already, because nodes publish no others, the first class is kept whole.
    first = min(1.0, room / with_branches) if with_branches else 1.0
    rest = max(0.0, room - with_branches) / without if without else 1.0
    return {request for request, count in rejected_branches.items() if is_in_share(request, first if count else rest)}
