"""What versions do on live traffic, from the verify steps in the table ``traces``: sums by node, slice of time and
label.

A slice is the time in which a node does not change between champion and canary (``canary.slice_duration``,
counted from 1970 by the node's clock, which also stamps its verify steps). Each verify step counts for the version
that drafted
it, so a request
that a swap cut in two counts on both sides. A verify step in which nothing was drafted names no version, and a
version that
drafts badly drafts seldom: it counts for the version that drafted most of what its node drafted in that slice.
Verify steps
of slices in which nothing was drafted at all count for nobody.

Seconds are those that a request spends in its verify steps, draft and verification together, as the engine measured
them: a verify step takes as long for each request that is in it. They are the time a user waits from token to token;
prompts
and queues are not in them. The sum over requests is no machine's time, but for two versions under the same load their
ratio is that of their machines' rates. Nothing here is kept that the table does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.delta import GoneError, Moment, escaped
from trainer.release.sequential_test import I64, Served

COLUMNS = ("line", "speculator", "label", "node", "time", "verify_step", "accepted", "bonus", "draft_us", "verify_us")
CATCH_UP = 500
"""Commits that are read one by one; after a longer absence the rows are asked for instead."""
_KEYS = ["speculator", "label", "node", "slice"]
_SUMS = ["requests", "tokens", "verify_steps", "us"]
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64() if name == "slice" else pa.string()) for name in _KEYS),
        *(pa.field(name, pa.int64()) for name in _SUMS),
    ]
)


class Tables(Protocol):
    """The part of the Delta log that is used here."""

    def version(self, name: str) -> int:
        """Newest version of a table."""

    def read_added(
        self, name: str, after_version: int, up_to_version: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows that commits added, in their order."""

    def query(self, sql: str, at: Mapping[str, Moment] | None = None) -> pa.RecordBatchReader:
        """Answer SQL over the tables."""


class Span(NamedTuple):
    """A version, and the time of its service that is looked at; Unix seconds."""

    version: str
    since: float
    until: float = math.inf


@dataclass(slots=True)
class _Held:
    """Sums of one line over all slices since a time, up to a version of the table."""

    since: float
    cursor: int
    sums: pa.Table


class LiveFigures:
    """Sums over verify steps, brought up to date by what was committed since the last look."""

    def __init__(self, tables: Tables, slice_s: float) -> None:
        self._tables = tables
        self._slice_s = slice_s
        self._lines: dict[str, _Held] = {}

    def pair(
        self, line: str, new: Span, old: Span, since: float | None = None
    ) -> tuple[dict[str, Served], dict[str, Served]]:
        """What two versions did, by label in the order in which labels came; slices that lie wholly in their spans.

        Both have all labels; on those that one did not serve it has no groups.

        Where nodes served both, those that served one only are left out: they may be other machines.

        Args:
            line: Whose versions.
            new: One version.
            old: The other.
            since: Unix time from which sums are kept for other pairs of the line, if that is earlier than both.

        Raises:
            TableError: the table cannot be read.
        """
        earliest = min(new.since, old.since)
        sums = self._refreshed(line, earliest if since is None else min(since, earliest))
        verify_steps = _VerifySteps(sums)
        chosen = [verify_steps.of(span.version) & self._within(verify_steps.slice, span) for span in (new, old)]
        labels = dict.fromkeys(map(str, verify_steps.label[chosen[0] | chosen[1]].tolist()))
        nodes = [set(verify_steps.node[side].tolist()) for side in chosen]
        if both := nodes[0] & nodes[1]:
            on_both = np.isin(verify_steps.node, list(both))
            chosen = [side & on_both for side in chosen]
        served_new, served_old = ({label: verify_steps.sums(side, label) for label in labels} for side in chosen)
        return served_new, served_old

    def forget(self, line: str) -> None:
        """Let go of what was read of a line of which nothing is asked any more."""
        self._lines.pop(line, None)

    def _within(self, slices: I64, span: Span) -> npt.NDArray[np.bool_]:
        first = math.ceil(span.since / self._slice_s)
        within: npt.NDArray[np.bool_] = slices >= first
        if span.until < math.inf:
            within &= slices < math.floor(span.until / self._slice_s)
        return within

    def _refreshed(self, line: str, since: float) -> pa.Table:
        held, newest = self._lines.get(line), self._tables.version("traces")
        if held is None or held.since > since or not held.cursor <= newest <= held.cursor + CATCH_UP:
            held = self._asked(line, since, newest)
        elif newest > held.cursor:
            try:
                added = self._tables.read_added("traces", held.cursor, newest, COLUMNS)
            except GoneError:
                held = self._asked(line, since, newest)
            else:
                rows = added.filter(pc.and_(pc.equal(added["line"], line), pc.greater(added["verify_step"], 0)))
                held = _Held(since, newest, _added([held.sums, self._summed(rows)]))
        held.sums = held.sums.filter(pc.greater_equal(held.sums["slice"], math.floor(since / self._slice_s)))
        self._lines[line] = _Held(since, held.cursor, held.sums)
        return held.sums

    def _asked(self, line: str, since: float, version: int) -> _Held:
        moment = datetime.fromtimestamp(since, UTC)
        quoted = ", ".join(f'"{column}"' for column in COLUMNS)
        # The day is the broker's, which may differ from the node's by a little.
        batches = self._tables.query(
            f"SELECT {quoted} FROM traces WHERE line = '{escaped(line)}' AND verify_step > 0 "  # noqa: S608 - names of columns
            f"AND day >= '{(moment - timedelta(days=1)).date()}' "
            f"AND time >= to_timestamp_micros({round(since * 1e6)})",
            {"traces": version},
        )
        return _Held(since, version, _added(self._summed(pa.Table.from_batches([batch])) for batch in batches))

    def _summed(self, rows: pa.Table) -> pa.Table:
        """Sums over rows of verify steps."""
        kept = pc.list_value_length(rows["accepted"])
        seconds = pc.divide(pc.cast(pc.cast(rows["time"], pa.int64()), pa.float64()), 1e6 * self._slice_s)
        columns = {
            "speculator": rows["speculator"],
            "label": pc.fill_null(rows["label"], ""),
            "node": rows["node"],
            "slice": pc.cast(pc.floor(seconds), pa.int64()),
            "requests": pc.cast(pc.equal(rows["verify_step"], 1), pa.int64()),
            "tokens": pc.if_else(pc.is_valid(rows["bonus"]), pc.add(pc.cast(kept, pa.int64()), 1), 0),
            "verify_steps": pc.cast(pc.is_valid(rows["bonus"]), pa.int64()),
            "us": pc.add(pc.cast(rows["draft_us"], pa.int64()), pc.cast(rows["verify_us"], pa.int64())),
        }
        return _added([pa.table(columns).select(_SCHEMA.names).cast(_SCHEMA)])


class _VerifySteps:
    """Sums as arrays, with a version for each."""

    def __init__(self, sums: pa.Table) -> None:
        ordered = sums.sort_by([("slice", "ascending"), ("label", "ascending")])
        arrays = {name: ordered[name].to_numpy() for name in ordered.column_names}
        self.node, self.slice, self.label = arrays["node"], arrays["slice"], arrays["label"]
        self._arrays = arrays
        _, nodes = np.unique(self.node.astype(str), return_inverse=True)
        first = int(self.slice.min()) if len(self.slice) else 0
        slices = self.slice - first
        _, self.group = np.unique(nodes * (int(slices.max(initial=0)) + 1) + slices, return_inverse=True)
        self._version = self._attributed(arrays["speculator"].astype(str), arrays["verify_steps"])

    def of(self, version: str) -> npt.NDArray[np.bool_]:
        """Which sums are a version's."""
        return np.asarray(self._version == version)

    def sums(self, chosen: npt.NDArray[np.bool_], label: str) -> Served:
        """Of chosen rows on a label, by group."""
        at = chosen & (self.label == label)
        groups, where = np.unique(self.group[at], return_inverse=True)
        sums = [np.bincount(where, self._arrays[name][at], len(groups)).astype(np.float64) for name in _SUMS]
        return Served(groups.astype(np.int64), sums[0].astype(np.int64), sums[1], sums[2], sums[3] / 1e6)

    def _attributed(self, drafted_by: npt.NDArray[np.str_], verify_steps: I64) -> npt.NDArray[np.str_]:
        """The version of each row; rows of verify steps without a draft get the one that drafted most in their
        group.
        """
        versions, index = np.unique(drafted_by, return_inverse=True)
        by_group = np.zeros((int(self.group.max(initial=-1)) + 1, len(versions)), np.int64)
        np.add.at(by_group, (self.group, index), np.where(drafted_by == "", 0, verify_steps))
        if not by_group.size:
            return drafted_by
        most = versions[by_group.argmax(axis=1)]
        most = np.where(by_group.max(axis=1) > 0, most, "")
        attributed: npt.NDArray[np.str_] = np.where(drafted_by == "", most[self.group], drafted_by)
        return attributed


def _added(parts: Iterable[pa.Table]) -> pa.Table:
    """Sums of the same node, slice, label and version as one."""
    together = pa.concat_tables([_SCHEMA.empty_table(), *parts])
    summed = together.group_by(_KEYS).aggregate([(name, "sum") for name in _SUMS])
    return summed.rename_columns({f"{name}_sum": name for name in _SUMS}).select(_SCHEMA.names).cast(_SCHEMA)
