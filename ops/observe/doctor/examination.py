"""All looks, in an order in which the later ones know what the earlier ones found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from ops.observe.doctor.finding import Finding, Look, Patient
from ops.observe.doctor.machine import look_at_clocks, look_at_folders, look_at_processors, look_at_target
from ops.observe.doctor.processes import look_at_exposure, look_at_processes
from ops.observe.doctor.services import (
    look_at_broker,
    look_at_claims,
    look_at_collector,
    look_at_registry,
    look_at_sharing,
    look_at_tables,
)
from schemas.settings import Settings

LOOKS: Sequence[Look] = (
    look_at_target,
    look_at_folders,
    look_at_processors,
    look_at_broker,
    look_at_registry,
    look_at_tables,
    look_at_claims,
    look_at_collector,
    look_at_sharing,
    look_at_processes,
    look_at_exposure,
    look_at_clocks,
)
_SIGNS = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "problem": ("fix", "red")}


def examine(settings: Settings) -> Iterator[Finding]:
    """Everything that is found, as it is found; nothing is changed."""
    patient = Patient(settings)
    for look in LOOKS:
        yield from look(patient)


def as_table(findings: Sequence[Finding]) -> Table:
    """A table for a terminal: what is to be fixed stands last, where the eye is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "about", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in sorted(findings, key=lambda one: list(_SIGNS).index(one.level)):
        sign, colour = _SIGNS[finding.level]
        table.add_row(f"[{colour}]{sign}[/]", finding.about, escape(finding.found), escape(finding.fix))
    return table
