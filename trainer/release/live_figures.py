"""Sum the live traffic of versions by node, slice of time and label, from the verify steps in the table ``traces``.

A slice is the time in which a node does not change between champion, canary and anchor (``canary.slice_duration``,
counted from 1970 by the node's clock, which also timestamps its verify steps). Each verify step counts for the version
that it names. A bad version drafts seldom, but a verify step without a draft names the active version and counts for
it. Steps that only other sources drafted count for no version.

After a swap the draft's cache has keys of the version before, and the planner knows nothing of the new one. A request
therefore counts only if it began at least ``canary.burn_in`` after the swap and after the start of a slice, and only in
that slice. The second condition treats slices alike whether they begin with a swap or not: otherwise the version that
serves several slices in a row would count with the late steps of its requests, and the other one without them.

Tokens are the bonus tokens and the accepted tokens of the version's own drafts (``schemas.trace.own_draft``); accepted
tokens that only the suffix drafter proposed count for no version.

Seconds are the time that a request spends in its verify steps, draft and verification together, as the engine measured
them: a step takes the same time for each request in it. This is the time that a user waits from token to token; prompts
and queues are not included. The sum over requests is not machine time, but for two versions under the same load its
ratio is the ratio of their machines' rates. The state kept here can always be rebuilt from the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.delta import DeltaLog, HistoryExpiredError, escape_sql
from schemas.settings import Canary
from schemas.trace import own_draft
from schemas.trace.own_draft import find_own_drafts
from trainer.release.sequential_test import I64, ServedTraffic

COLUMNS = (
    *("line", "label", "node", "time", "start_time", "active_since", "verify_step", "bonus", "draft_us", "verify_us"),
    *own_draft.COLUMNS,
)
MAX_COMMITS_BEHIND = 500
"""Commits that are read one by one; after a longer absence a query reads the rows instead."""
_KEYS = ["speculator", "label", "node", "slice"]
_SUMS = ["requests", "tokens", "verify_steps", "us"]
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64() if name == "slice" else pa.string()) for name in _KEYS),
        *(pa.field(name, pa.int64()) for name in _SUMS),
    ]
)


class ServingPeriod(NamedTuple):
    """A version and the part of its service that is compared; Unix seconds."""

    version: str
    since: float
    until: float = math.inf


@dataclass(slots=True)
class _LineSums:
    """Sums of one line over all slices since a time, up to a version of the table."""

    since: float
    table_version: int
    sums: pa.Table


class LiveFigures:
    """Sums over verify steps by line, updated with the commits since the last call."""

    def __init__(self, tables: DeltaLog, settings: Canary) -> None:
        self._tables = tables
        self._slice_duration = settings.slice_duration
        self._burn_in = settings.burn_in
        self._lines: dict[str, _LineSums] = {}

    def read_traffic(
        self,
        line: str,
        new: Sequence[ServingPeriod],
        old: Sequence[ServingPeriod],
        since: float | None = None,
    ) -> tuple[dict[str, ServedTraffic], dict[str, ServedTraffic]]:
        """Return the traffic of two sides by label, in the order in which labels first appeared.

        Only slices that lie wholly in a version's period count. Both results have all labels; a label that a side did
        not serve has no groups there. If some nodes served both sides, nodes that served only one are ignored: they may
        be other machines.

        Args:
            line: Of all versions.
            new: One side: versions that are taken together.
            old: The other side.
            since: Unix time from which sums are kept for other comparisons of the line, if earlier than all periods.

        Raises:
            TableError: the table cannot be read.
        """
        earliest = min(period.since for period in (*new, *old))
        sums = self._refresh(line, earliest if since is None else min(since, earliest))
        steps = _SummedSteps(sums)
        selected = [
            np.any([(steps.version == one.version) & self._is_within(steps.slice, one) for one in side], axis=0)
            for side in (new, old)
        ]
        labels = dict.fromkeys(map(str, steps.label[selected[0] | selected[1]].tolist()))
        nodes = [set(steps.node[side].tolist()) for side in selected]
        if both := nodes[0] & nodes[1]:
            on_both = np.isin(steps.node, list(both))
            selected = [side & on_both for side in selected]
        served_new, served_old = ({label: steps.group(side, label) for label in labels} for side in selected)
        return served_new, served_old

    def forget(self, line: str) -> None:
        """Drop the sums of a line without a running comparison."""
        self._lines.pop(line, None)

    def _is_within(self, slices: I64, period: ServingPeriod) -> npt.NDArray[np.bool_]:
        within: npt.NDArray[np.bool_] = slices >= math.ceil(period.since / self._slice_duration)
        if period.until < math.inf:
            within &= slices < math.floor(period.until / self._slice_duration)
        return within

    def _refresh(self, line: str, since: float) -> pa.Table:
        known, newest = self._lines.get(line), self._tables.version("traces")
        if (
            known is None
            or known.since > since
            or not known.table_version <= newest <= known.table_version + MAX_COMMITS_BEHIND
        ):
            sums = self._query(line, since, newest)
        elif newest == known.table_version:
            sums = known.sums
        else:
            try:
                added = self._tables.read_added("traces", known.table_version, newest, COLUMNS)
            except HistoryExpiredError:
                sums = self._query(line, since, newest)
            else:
                rows = added.filter(pc.and_(pc.equal(added["line"], line), pc.greater(added["verify_step"], 0)))
                sums = _merge([known.sums, self._sum_rows(rows)])
        sums = sums.filter(pc.greater_equal(sums["slice"], math.floor(since / self._slice_duration)))
        self._lines[line] = _LineSums(since, newest, sums)
        return sums

    def _query(self, line: str, since: float, table_version: int) -> pa.Table:
        moment = datetime.fromtimestamp(since, UTC)
        quoted = ", ".join(f'"{column}"' for column in COLUMNS)
        # The day is the broker's, which may differ slightly from the node's.
        batches = self._tables.query(
            f"SELECT {quoted} FROM traces WHERE line = '{escape_sql(line)}' AND verify_step > 0 "  # noqa: S608 - names of columns
            f"AND day >= '{(moment - timedelta(days=1)).date()}' "
            f"AND time >= to_timestamp_micros({round(since * 1e6)})",
            {"traces": table_version},
        )
        return _merge(self._sum_rows(pa.Table.from_batches([batch])) for batch in batches)

    def _sum_rows(self, rows: pa.Table) -> pa.Table:
        """Return the sums over rows of verify steps that count for a version."""
        own = find_own_drafts(rows)
        rows = rows.append_column("own_accepted", pa.array(own.accepted_tokens))
        undrafted = pc.equal(pc.list_value_length(rows["draft_parents"]), 0)
        slices = pc.floor(pc.divide(_to_seconds(rows["time"]), self._slice_duration))
        warm = pc.max_element_wise(
            pc.multiply(slices, self._slice_duration), _to_seconds(rows["active_since"]), skip_nulls=False
        )
        is_warm = pc.greater_equal(_to_seconds(rows["start_time"]), pc.add(warm, self._burn_in))
        rows = rows.append_column("slice", pc.cast(slices, pa.int64()))
        rows = rows.filter(pc.and_(is_warm, pc.or_(pa.array(own.draft_tokens > 0), undrafted)))
        columns = {
            "speculator": rows["speculator"],
            "label": pc.fill_null(rows["label"], ""),
            "node": rows["node"],
            "slice": rows["slice"],
            "requests": pc.cast(pc.equal(rows["verify_step"], 1), pa.int64()),
            "tokens": pc.if_else(pc.is_valid(rows["bonus"]), pc.add(rows["own_accepted"], 1), 0),
            "verify_steps": pc.cast(pc.is_valid(rows["bonus"]), pa.int64()),
            "us": pc.add(pc.cast(rows["draft_us"], pa.int64()), pc.cast(rows["verify_us"], pa.int64())),
        }
        return _merge([pa.table(columns).select(_SCHEMA.names).cast(_SCHEMA)])


class _SummedSteps:
    """Sums as arrays."""

    def __init__(self, sums: pa.Table) -> None:
        ordered = sums.sort_by([("slice", "ascending"), ("label", "ascending")])
        arrays = {name: ordered[name].to_numpy() for name in ordered.column_names}
        self.version, self.node = arrays["speculator"], arrays["node"]
        self.slice, self.label = arrays["slice"], arrays["label"]
        self._arrays = arrays
        _, nodes = np.unique(self.node.astype(str), return_inverse=True)
        first = int(self.slice.min()) if len(self.slice) else 0
        slices = self.slice - first
        _, self._group = np.unique(nodes * (int(slices.max(initial=0)) + 1) + slices, return_inverse=True)

    def group(self, selected: npt.NDArray[np.bool_], label: str) -> ServedTraffic:
        """Return the selected sums on a label, by group."""
        at = selected & (self.label == label)
        groups, where = np.unique(self._group[at], return_inverse=True)
        sums = [np.bincount(where, self._arrays[name][at], len(groups)).astype(np.float64) for name in _SUMS]
        return ServedTraffic(groups.astype(np.int64), sums[0].astype(np.int64), sums[1], sums[2], sums[3] / 1e6)


def _to_seconds(times: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return Unix seconds."""
    return pc.divide(pc.cast(pc.cast(times, pa.int64()), pa.float64()), 1e6)


def _merge(parts: Iterable[pa.Table]) -> pa.Table:
    """Sum rows of the same node, slice, label and version."""
    together = pa.concat_tables([_SCHEMA.empty_table(), *parts])
    summed = together.group_by(_KEYS).aggregate([(name, "sum") for name in _SUMS])
    return summed.rename_columns({f"{name}_sum": name for name in _SUMS}).select(_SCHEMA.names).cast(_SCHEMA)
