"""From sound verify steps to the columns of the tables, those of many chunks at a time.

``schemas.trace.record`` says how tokens lie in verify steps, ``schemas.batches`` what becomes of them. Every list
column
of a table
is a selection of entries of one column of the verify steps: here are the selections.

Shapes: C chunks, R verify steps, B rejected branches; k as in the verify steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import ACCEPTED, REJECTED, TRACES
from schemas.draft_tree import rejected_branches
from schemas.trace.decoder import Array, Ints, Lists, VerifySteps, spans
from schemas.trace.record import I32, INT32_MAX, U16

Columns = Mapping[str, pa.Array]


def features_of(verify_steps: VerifySteps, claimed: Mapping[int, U16]) -> Lists:
    """[R] the bf16 bit patterns of each row's tokens, end to end; none where they are to be recomputed.

    Args:
        verify steps: Of which the rows are well-formed.
        claimed: [tokens, width] by number of the chunk, where they did not travel in it.
    """
    inline = Lists(
        verify_steps.features.entries.view("<u2"),
        (verify_steps.features.offsets - verify_steps.features.offsets[0]) // 2,
    )
    if not claimed:
        return inline
    edges = inline.offsets[verify_steps.bounds]
    parts = [
        claimed[chunk].ravel() if chunk in claimed else inline.values[start:end]
        for chunk, (start, end) in enumerate(pairwise(edges.tolist()))
    ]
    is_claimed = np.isin(verify_steps.chunk, list(claimed))
    lengths = np.where(is_claimed, verify_steps.tokens.lengths * verify_steps.feature_width, inline.lengths)
    return Lists(np.concatenate(parts), _offsets(lengths))


def tables(verify_steps: VerifySteps, features: Lists, of_chunks: Columns, context_tokens: int) -> dict[str, pa.Table]:
    """Rows of ``accepted``, ``rejected`` and ``traces``.

    Args:
        verify steps: Sound, and at least one in every chunk.
        features: [R] as ``features_of`` gives them.
        of_chunks: [C] what the tables say of a chunk or its record.
        context_tokens: Tokens kept before the root of a rejected branch.
    """
    ends = verify_steps.batch.column("time").take(pa.array(verify_steps.bounds[1:] - 1))
    of_windows = {**of_chunks, "speculator": _drafted_last(verify_steps), "time": ends}
    windows = _windows(verify_steps)
    return {
        "accepted": _accepted(verify_steps, features, of_windows, windows),
        "rejected": _rejected(verify_steps, of_windows, windows, context_tokens),
        "traces": _traces(verify_steps, of_chunks),
    }


class _Windows(NamedTuple):
    tokens: Lists
    """[C] the tokens of a chunk, and before them those that its envelope brought."""
    roots: Ints
    """[R] where the first token of a verify step stands among them."""


def _windows(verify_steps: VerifySteps) -> _Windows:
    tokens, bounds = verify_steps.tokens, verify_steps.bounds
    edges = tokens.offsets[bounds]
    before = np.array([len(envelope.before) for envelope in verify_steps.envelopes], np.int64)
    roots = tokens.starts - edges[0] + np.cumsum(before)[verify_steps.chunk]
    values = tokens.entries
    if before.any():
        parts = zip(verify_steps.envelopes, np.split(values, (edges - edges[0])[1:-1]), strict=True)
        values = np.concatenate([part for envelope, own in parts for part in (envelope.before, own)])
    return _Windows(Lists(values.astype(np.int32, copy=False), _offsets(np.diff(edges) + before)), roots)


def _accepted(verify_steps: VerifySteps, features: Lists, lineage: Columns, windows: _Windows) -> pa.Table:
    first, last = verify_steps.bounds[:-1], verify_steps.bounds[1:] - 1
    before = windows.roots[first] - windows.tokens.starts
    of_verify_step, nodes, edges = _taught(verify_steps)
    return _table(
        ACCEPTED,
        {
            **lineage,
            "position": _numbers(verify_steps.position[first] - before),
            "tokens": _lists(windows.tokens),
            "next_token": verify_steps.batch.column("bonus").take(pa.array(last)),
            "features": _binary(features.entries, features.offsets[verify_steps.bounds] - features.offsets[0]),
            "loss_mask": _lists(Lists(_loss_mask(verify_steps, windows), windows.tokens.offsets)),
            "teacher_ids": _lists(_teacher(verify_steps, verify_steps.top_ids, of_verify_step, nodes, edges)),
            "teacher_logprobs": _lists(_teacher(verify_steps, verify_steps.top_logprobs, of_verify_step, nodes, edges)),
        },
    )


def _loss_mask(verify_steps: VerifySteps, windows: _Windows) -> Array:
    """For every token of the windows whether the target after it is known."""
    mask = np.zeros(len(windows.tokens.values), np.bool_)
    n, decoded = verify_steps.tokens.lengths, verify_steps.number > 0
    mask[spans(windows.roots[decoded], n[decoded])] = True
    prompt_ends = ~decoded & verify_steps.has_bonus
    mask[windows.roots[prompt_ends] + n[prompt_ends] - 1] = True
    return mask


def _taught(verify_steps: VerifySteps) -> tuple[Ints, Ints, Ints]:
    """The verified nodes that committed tokens lead to: the verify step and the row of its teacher that each has,
    and how
    many there are before each chunk [C + 1]. Row 0 is the root's; inside a prompt nothing is verified."""
    counts = np.where(verify_steps.has_bonus, 1 + verify_steps.accepted.lengths, 0)
    edges = _offsets(counts)
    nodes = np.zeros(edges[-1], np.int64)
    nodes[edges[verify_steps.accepted.rows] + 1 + verify_steps.accepted.numbers] = (
        1 + verify_steps.accepted.entries.astype(np.int64)
    )
    return np.repeat(np.arange(len(verify_steps)), counts), nodes, edges[verify_steps.bounds]


def _teacher(verify_steps: VerifySteps, top: Lists, of_verify_step: Ints, nodes: Ints, edges: Ints) -> Lists:
    """Of ``top_ids`` or ``top_logprobs`` row ``nodes[i]`` of verify step ``of_verify_step[i]``, cut into lists at
    ``edges``.
    """
    k = verify_steps.top_k[of_verify_step]
    return Lists(top.values[spans(top.starts[of_verify_step] + nodes * k, k)], _offsets(k)[edges])


class _Branches(NamedTuple):
    verify_steps: Ints
    """[B]."""
    nodes: Lists
    """[B] the drafted nodes of each, from the root's child to the leaf."""


def _branches(verify_steps: VerifySteps) -> _Branches:
    """The rejected branches, in the order of the verify steps. A chain has at most one: all of it."""
    parents, drafted = verify_steps.draft_parents, verify_steps.draft_tokens.lengths
    forked = parents.any(parents.entries != parents.numbers - 1)
    chains = np.flatnonzero(~forked & (verify_steps.accepted.lengths < drafted))
    lengths = drafted[chains]
    nodes = spans(np.zeros(len(chains), np.int64), lengths)
    trees = np.flatnonzero(forked)
    if not len(trees):
        return _Branches(chains, Lists(nodes, _offsets(lengths)))
    paths = [
        (row, path)
        for row in trees.tolist()
        for path in rejected_branches(parents.of(row), verify_steps.accepted.of(row))
    ]
    of_verify_step = np.concatenate([chains, np.array([row for row, _ in paths], np.int64)])
    lengths = np.concatenate([lengths, np.array([len(path) for _, path in paths], np.int64)])
    nodes = np.concatenate([nodes, np.array([node for _, path in paths for node in path], np.int64)])
    order = np.argsort(of_verify_step, kind="stable")
    starts = np.cumsum(lengths) - lengths
    return _Branches(
        of_verify_step[order], Lists(nodes[spans(starts[order], lengths[order])], _offsets(lengths[order]))
    )


def _rejected(verify_steps: VerifySteps, lineage: Columns, windows: _Windows, context_tokens: int) -> pa.Table:
    of_verify_step, nodes = _branches(verify_steps)
    of_chunk, verify_step_of_node = verify_steps.chunk[of_verify_step], of_verify_step[nodes.rows]
    drafted = verify_steps.draft_tokens.starts[verify_step_of_node] + nodes.values
    kept = np.zeros(len(verify_steps.draft_tokens.values) + 1, np.bool_)
    kept[verify_steps.draft_tokens.starts[verify_steps.accepted.rows] + verify_steps.accepted.entries] = True
    logprobs = verify_steps.draft_logprobs.starts[verify_step_of_node] + nodes.values
    verified = verify_step_of_node, 1 + nodes.values, nodes.offsets
    roots = windows.roots[of_verify_step]
    begins = np.maximum(windows.tokens.starts[of_chunk], roots - context_tokens)
    return _table(
        REJECTED,
        {
            **{name: column.take(pa.array(of_chunk)) for name, column in lineage.items() if name in REJECTED.names},
            "verify_step": _numbers(verify_steps.number[of_verify_step]),
            "root_position": _numbers(verify_steps.position[of_verify_step]),
            "context": _lists(
                Lists(windows.tokens.values[spans(begins, roots + 1 - begins)], _offsets(roots + 1 - begins))
            ),
            "branch": _lists(Lists(verify_steps.draft_tokens.values[drafted], nodes.offsets)),
            "accepted_prefix": _numbers(np.add.reduceat(kept[drafted], nodes.starts, dtype=np.int64)),
            "draft_logprobs": _lists(Lists(verify_steps.draft_logprobs.values[logprobs], nodes.offsets)),
            "teacher_ids": _lists(_teacher(verify_steps, verify_steps.top_ids, *verified)),
            "teacher_logprobs": _lists(_teacher(verify_steps, verify_steps.top_logprobs, *verified)),
        },
    )


def _traces(verify_steps: VerifySteps, of_chunks: Columns) -> pa.Table:
    of_verify_steps = dict(zip(verify_steps.batch.schema.names, verify_steps.batch.columns, strict=True))
    chunk = pa.array(verify_steps.chunk)
    return _table(TRACES, {**{name: column.take(chunk) for name, column in of_chunks.items()}, **of_verify_steps})


def _drafted_last(verify_steps: VerifySteps) -> pa.Array:
    """[C] the last version that drafted in each chunk; empty where none did."""
    versions = verify_steps.batch.column("speculator")
    named = pc.binary_length(versions).to_numpy() > 0
    last = np.maximum.reduceat(np.where(named, np.arange(len(verify_steps)), -1), verify_steps.bounds[:-1])
    return versions.take(pa.array(last, mask=last < 0)).fill_null("")


def _table(schema: pa.Schema, columns: Columns) -> pa.Table:
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _offsets(lengths: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)])


def _numbers(values: Ints) -> pa.Array:
    return pa.array(values.astype(np.int32))


def _lists(lists: Lists) -> pa.Array:
    values = pa.array(lists.values)
    return pa.ListArray.from_arrays(pa.array(_ends(lists.offsets)), values, type=pa.list_(values.type))


def _binary(bits: Array, offsets: Ints) -> pa.Array:
    """Runs of 16-bit numbers as bytes, little-endian as they are."""
    data = pa.py_buffer(np.ascontiguousarray(bits))
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(_ends(2 * offsets)), data])


def _ends(offsets: Ints) -> I32:
    """Offsets as Arrow's arrays have them.

    Raises:
        OverflowError: a column is longer than 2 GiB; fewer chunks at a time are shorter.
    """
    if offsets[-1] > INT32_MAX:
        raise OverflowError(f"a column of {offsets[-1]} entries does not fit into an array")
    return offsets.astype(np.int32)
