"""Builds the columns of the tables from valid verify steps, for many chunks at a time.

``schemas.trace.record`` defines how tokens are laid out in verify steps, ``schemas.batches`` how they are laid out in
the tables. Every list column of a table is a selection of entries from one column of the verify steps. This module
computes these selections.

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
from schemas.trace.decoder import Array, Bools, Ints, ListColumn, VerifyStepColumns, concat_ranges
from schemas.trace.record import I32, INT32_MAX, U16

Columns = Mapping[str, pa.Array]


def gather_features(steps: VerifyStepColumns, claimed: Mapping[int, U16]) -> ListColumn:
    """Return [R] the bf16 bit patterns of the tokens of each verify step, end to end; empty for recompute.

    Args:
        steps: Verify steps with valid lengths.
        claimed: [tokens, width] by chunk, for chunks whose features are in a claim check.
    """
    inline = ListColumn(steps.features.entries.view("<u2"), (steps.features.offsets - steps.features.offsets[0]) // 2)
    if not claimed:
        return inline
    edges = inline.offsets[steps.bounds]
    parts = [
        claimed[chunk].ravel() if chunk in claimed else inline.values[start:end]
        for chunk, (start, end) in enumerate(pairwise(edges.tolist()))
    ]
    is_claimed = np.isin(steps.chunk, list(claimed))
    lengths = np.where(is_claimed, steps.tokens.lengths * steps.feature_width, inline.lengths)
    return ListColumn(np.concatenate(parts), _offsets(lengths))


def build_tables(
    steps: VerifyStepColumns, features: ListColumn, chunk_columns: Columns, context_tokens: int
) -> dict[str, pa.Table]:
    """Build the rows of ``accepted``, ``rejected`` and ``traces``; of chunks with dropped features only ``traces``.

    Args:
        steps: Valid verify steps, at least one for each chunk.
        features: [R] as ``gather_features`` returns them.
        chunk_columns: [C] columns with one value for each chunk.
        context_tokens: Tokens kept before the root of a rejected branch.
    """
    end_times = steps.batch.column("time").take(pa.array(steps.bounds[1:] - 1))
    lineage = {**chunk_columns, "speculator": _last_speculator(steps), "time": end_times}
    samples = _build_samples(steps)
    is_trained = np.array([envelope.features != "dropped" for envelope in steps.envelopes], np.bool_)
    accepted = _build_accepted(steps, features, lineage, samples)
    return {
        "accepted": accepted if is_trained.all() else accepted.filter(pa.array(is_trained)),
        "rejected": _build_rejected(steps, lineage, samples, context_tokens, is_trained),
        "traces": _build_traces(steps, chunk_columns),
    }


class _Samples(NamedTuple):
    tokens: ListColumn
    """[C] tokens of each chunk, after the tokens that its envelope carries."""
    roots: Ints
    """[R] index of the first token of each verify step in ``tokens.values``."""


def _build_samples(steps: VerifyStepColumns) -> _Samples:
    tokens, bounds = steps.tokens, steps.bounds
    edges = tokens.offsets[bounds]
    before = np.array([len(envelope.preceding_tokens) for envelope in steps.envelopes], np.int64)
    roots = tokens.starts - edges[0] + np.cumsum(before)[steps.chunk]
    values = tokens.entries
    if before.any():
        parts = zip(steps.envelopes, np.split(values, (edges - edges[0])[1:-1]), strict=True)
        values = np.concatenate([part for envelope, own in parts for part in (envelope.preceding_tokens, own)])
    return _Samples(ListColumn(values.astype(np.int32, copy=False), _offsets(np.diff(edges) + before)), roots)


def _build_accepted(steps: VerifyStepColumns, features: ListColumn, lineage: Columns, samples: _Samples) -> pa.Table:
    first, last = steps.bounds[:-1], steps.bounds[1:] - 1
    before = samples.roots[first] - samples.tokens.starts
    step, node, edges = _teacher_rows(steps)
    return _table(
        ACCEPTED,
        {
            **lineage,
            "position": _numbers(steps.position[first] - before),
            "tokens": _lists(samples.tokens),
            "next_token": steps.batch.column("bonus").take(pa.array(last)),
            "features": _binary(features.entries, features.offsets[steps.bounds] - features.offsets[0]),
            "loss_mask": _lists(ListColumn(_loss_mask(steps, samples), samples.tokens.offsets)),
            "teacher_ids": _lists(_select_teacher(steps, steps.top_ids, step, node, edges)),
            "teacher_logprobs": _lists(_select_teacher(steps, steps.top_logprobs, step, node, edges)),
        },
    )


def _loss_mask(steps: VerifyStepColumns, samples: _Samples) -> Array:
    """Return for every token of the samples whether the target's choice after it is known."""
    mask = np.zeros(len(samples.tokens.values), np.bool_)
    n, decoded = steps.tokens.lengths, steps.number > 0
    mask[concat_ranges(samples.roots[decoded], n[decoded])] = True
    prompt_ends = ~decoded & steps.has_bonus
    mask[samples.roots[prompt_ends] + n[prompt_ends] - 1] = True
    return mask


def _teacher_rows(steps: VerifyStepColumns) -> tuple[Ints, Ints, Ints]:
    """Return the teacher rows after the committed tokens: the verify step and the row in it of each, and the number of
    rows before each chunk [C + 1]. Row 0 is the root's. Inside a prompt nothing is verified."""
    counts = np.where(steps.has_bonus, 1 + steps.accepted.lengths, 0)
    edges = _offsets(counts)
    nodes = np.zeros(edges[-1], np.int64)
    nodes[edges[steps.accepted.entry_rows] + 1 + steps.accepted.entry_indices] = 1 + steps.accepted.entries.astype(
        np.int64
    )
    return np.repeat(np.arange(len(steps)), counts), nodes, edges[steps.bounds]


def _select_teacher(steps: VerifyStepColumns, top: ListColumn, step: Ints, node: Ints, edges: Ints) -> ListColumn:
    """Return row ``node[i]`` of verify step ``step[i]`` from ``top_ids`` or ``top_logprobs``, split at ``edges``."""
    k = steps.top_k[step]
    return ListColumn(top.values[concat_ranges(top.starts[step] + node * k, k)], _offsets(k)[edges])


class _Branches(NamedTuple):
    steps: Ints
    """[B] verify step of each branch."""
    nodes: ListColumn
    """[B] drafted nodes of each branch, from the root's child to the leaf."""


def _find_branches(steps: VerifyStepColumns, is_trained: Bools) -> _Branches:
    """Return the rejected branches of some chunks [C] in the order of the verify steps. A chain has at most one: the
    whole chain."""
    parents, drafted = steps.draft_parents, steps.draft_tokens.lengths * is_trained[steps.chunk]
    is_tree = parents.rows_with(parents.entries != parents.entry_indices - 1) & (drafted > 0)
    chains = np.flatnonzero(~is_tree & (steps.accepted.lengths < drafted))
    lengths = drafted[chains]
    nodes = concat_ranges(np.zeros(len(chains), np.int64), lengths)
    trees = np.flatnonzero(is_tree)
    if not len(trees):
        return _Branches(chains, ListColumn(nodes, _offsets(lengths)))
    paths = [
        (row, path) for row in trees.tolist() for path in rejected_branches(parents.row(row), steps.accepted.row(row))
    ]
    step = np.concatenate([chains, np.array([row for row, _ in paths], np.int64)])
    lengths = np.concatenate([lengths, np.array([len(path) for _, path in paths], np.int64)])
    nodes = np.concatenate([nodes, np.array([node for _, path in paths for node in path], np.int64)])
    order = np.argsort(step, kind="stable")
    starts = np.cumsum(lengths) - lengths
    return _Branches(
        step[order], ListColumn(nodes[concat_ranges(starts[order], lengths[order])], _offsets(lengths[order]))
    )


def _build_rejected(
    steps: VerifyStepColumns, lineage: Columns, samples: _Samples, context_tokens: int, is_trained: Bools
) -> pa.Table:
    branch_step, nodes = _find_branches(steps, is_trained)
    branch_chunk, node_step = steps.chunk[branch_step], branch_step[nodes.entry_rows]
    drafted = steps.draft_tokens.starts[node_step] + nodes.values
    is_accepted = np.zeros(len(steps.draft_tokens.values) + 1, np.bool_)
    is_accepted[steps.draft_tokens.starts[steps.accepted.entry_rows] + steps.accepted.entries] = True
    logprobs = steps.draft_logprobs.starts[node_step] + nodes.values
    teacher = node_step, 1 + nodes.values, nodes.offsets
    roots = samples.roots[branch_step]
    begins = np.maximum(samples.tokens.starts[branch_chunk], roots - context_tokens)
    lengths = roots + 1 - begins
    return _table(
        REJECTED,
        {
            **{name: column.take(pa.array(branch_chunk)) for name, column in lineage.items() if name in REJECTED.names},
            "verify_step": _numbers(steps.number[branch_step]),
            "root_position": _numbers(steps.position[branch_step]),
            "context": _lists(ListColumn(samples.tokens.values[concat_ranges(begins, lengths)], _offsets(lengths))),
            "branch": _lists(ListColumn(steps.draft_tokens.values[drafted], nodes.offsets)),
            "accepted_prefix": _numbers(np.add.reduceat(is_accepted[drafted], nodes.starts, dtype=np.int64)),
            "draft_logprobs": _lists(ListColumn(steps.draft_logprobs.values[logprobs], nodes.offsets)),
            "teacher_ids": _lists(_select_teacher(steps, steps.top_ids, *teacher)),
            "teacher_logprobs": _lists(_select_teacher(steps, steps.top_logprobs, *teacher)),
            "draft_sources": _lists(_select_sources(steps, node_step, nodes), ~steps.has_sources[branch_step]),
        },
    )


def _select_sources(steps: VerifyStepColumns, node_step: Ints, nodes: ListColumn) -> ListColumn:
    """Return the sources of the nodes of branches; nothing for branches whose verify step has none."""
    known = steps.has_sources[node_step]
    values = steps.draft_sources.values[(steps.draft_sources.starts[node_step] + nodes.values)[known]]
    return ListColumn(values, np.concatenate([[0], np.cumsum(known)])[nodes.offsets])


def _build_traces(steps: VerifyStepColumns, chunk_columns: Columns) -> pa.Table:
    step_columns = dict(zip(steps.batch.schema.names, steps.batch.columns, strict=True))
    chunk = pa.array(steps.chunk)
    return _table(TRACES, {**{name: column.take(chunk) for name, column in chunk_columns.items()}, **step_columns})


def _last_speculator(steps: VerifyStepColumns) -> pa.Array:
    """Return [C] the last version that each chunk names; empty if it names none."""
    versions = steps.batch.column("speculator")
    named = pc.binary_length(versions).to_numpy() > 0
    last = np.maximum.reduceat(np.where(named, np.arange(len(steps)), -1), steps.bounds[:-1])
    return versions.take(pa.array(last, mask=last < 0)).fill_null("")


def _table(schema: pa.Schema, columns: Columns) -> pa.Table:
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _offsets(lengths: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)])


def _numbers(values: Ints) -> pa.Array:
    return pa.array(values.astype(np.int32))


def _lists(lists: ListColumn, null: Bools | None = None) -> pa.Array:
    values, mask = pa.array(lists.values), None if null is None else pa.array(null)
    offsets = pa.array(_int32_offsets(lists.offsets))
    return pa.ListArray.from_arrays(offsets, values, type=pa.list_(values.type), mask=mask)


def _binary(bits: Array, offsets: Ints) -> pa.Array:
    """Return runs of 16-bit numbers as little-endian bytes, without a copy."""
    data = pa.py_buffer(np.ascontiguousarray(bits))
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(_int32_offsets(2 * offsets)), data])


def _int32_offsets(offsets: Ints) -> I32:
    """Return offsets as Arrow arrays have them.

    Raises:
        OverflowError: a column is longer than 2 GiB. Build fewer chunks at a time.
    """
    if offsets[-1] > INT32_MAX:
        raise OverflowError(f"a column of {offsets[-1]} entries does not fit into an array")
    return offsets.astype(np.int32)
