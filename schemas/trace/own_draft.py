"""The own draft of a version in a verify step: the draft tokens that count for the version.

A draft token belongs to the own draft if the version proposed it and every draft token before it. The own draft is the
tree that would have been verified if nothing else had drafted, as far as the version proposed it:

- A token that the version and the suffix drafter both proposed belongs to it.
- A token that follows one of the suffix drafter alone does not, although the version may have proposed it there.
- Its accepted tokens are the first ones of the accepted path, as many as belong to it.

A version without the suffix drafter would have had the same tokens accepted: no draft changes the output.

Shapes: R verify steps, N draft tokens of all of them, end to end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.trace.decoder import Bools, Ints, read_lists
from schemas.trace.record import ROOT, DraftSource

COLUMNS = ("speculator", "draft_parents", "accepted", "draft_sources")
"""Columns of the table ``traces`` that own drafts are found from."""


class OwnDrafts(NamedTuple):
    """[R] the own draft of the version that each verify step names."""

    draft_tokens: Ints
    """0 if the verify step does not count for a version."""
    depth: Ints
    """Tokens on the longest path."""
    accepted_tokens: Ints
    first_accepted: Bools
    """Whether the first token was accepted."""


def find_own_drafts(verify_steps: pa.Table) -> OwnDrafts:
    """Return the own drafts in valid rows with ``COLUMNS``."""
    parents, accepted = (read_lists(verify_steps[name].combine_chunks()) for name in ("draft_parents", "accepted"))
    row_N, starts_R = parents.entry_rows, parents.starts - parents.offsets[0]
    parent_N = np.where(parents.entries == ROOT, ROOT, starts_R[row_N] + parents.entries)
    own_N, depth_N = _walk_to_root(_find_proposed(verify_steps, row_N), parent_N)
    rows = len(starts_R)
    depth_R = np.zeros(rows, np.int64)
    np.maximum.at(depth_R, row_N[own_N], depth_N[own_N])
    path = starts_R[accepted.entry_rows] + accepted.entries
    is_first_N = np.zeros(len(row_N), np.bool_)
    is_first_N[np.flatnonzero(own_N)[np.unique(row_N[own_N], return_index=True)[1]]] = True
    first_accepted_R = np.zeros(rows, np.bool_)
    first_accepted_R[accepted.entry_rows[is_first_N[path]]] = True
    return OwnDrafts(
        draft_tokens=np.bincount(row_N[own_N], minlength=rows),
        depth=depth_R,
        accepted_tokens=np.bincount(accepted.entry_rows[own_N[path]], minlength=rows),
        first_accepted=first_accepted_R,
    )


def _find_proposed(verify_steps: pa.Table, row_N: Ints) -> Bools:
    """Return [N] whether the version proposed the draft token."""
    proposed_N: Bools = pc.not_equal(verify_steps["speculator"], "").to_numpy()[row_N]
    sources = verify_steps["draft_sources"].combine_chunks()
    known_N = sources.is_valid().to_numpy(zero_copy_only=False)[row_N]
    proposed_N[known_N] &= (sources.flatten().to_numpy() & DraftSource.SPECULATOR) != 0
    return proposed_N


def _walk_to_root(proposed_N: Bools, parent_N: Ints) -> tuple[Bools, Ints]:
    """Return [N] whether a token and all tokens before it were proposed, and its depth."""
    own_N, depth_N, at_N = proposed_N.copy(), np.ones(len(parent_N), np.int64), parent_N
    while (below_N := at_N != ROOT).any():
        own_N &= proposed_N[at_N] | ~below_N
        depth_N += below_N
        at_N = np.where(below_N, parent_N[at_N], ROOT)
    return own_N, depth_N
