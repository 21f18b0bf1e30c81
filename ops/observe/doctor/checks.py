"""Run all checks of ``aurora doctor`` and collect their findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.markup import escape
from rich.table import Table

from ops.cli.terminal import new_table
from schemas.settings import Settings

Level = Literal["ok", "warning", "problem"]
_SIGNS = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "problem": ("fix", "red")}


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check."""

    about: str
    """Subject: broker, topics, registry, .."""
    level: Level
    """A ``problem`` prevents something from working; a ``warning`` may be intended."""
    found: str
    fix: str = ""
    """What to change, and where; empty if nothing needs a change."""


def ok(about: str, found: str) -> Finding:
    """Return a finding without a fault."""
    return Finding(about, "ok", found)


def warning(about: str, found: str, fix: str) -> Finding:
    """Return a finding that may be intended."""
    return Finding(about, "warning", found, fix)


def problem(about: str, found: str, fix: str) -> Finding:
    """Return a finding that prevents something from working."""
    return Finding(about, "problem", found, fix)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Target fingerprint and speculator line that the settings produce; all processes must agree on them."""

    target: str
    line: str


@dataclass(slots=True)
class CheckContext:
    """Settings under check, and results of earlier checks for later ones."""

    settings: Settings
    model: ModelIdentity | None = None
    """None until the target is read, and if it cannot be read."""
    clocks: dict[str, float] = field(default_factory=dict)
    """Seconds by which the clock of another machine is ahead of the local one, by machine name."""


Check = Callable[[CheckContext], Iterable[Finding]]


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Yield the findings of all checks; leave nothing behind."""
    from ops.observe.doctor import host, processes, services

    checks: Sequence[Check] = (
        host.check_target,
        host.check_folders,
        host.check_processors,
        services.check_broker,
        services.check_registry,
        services.check_tables,
        services.check_claim_store,
        services.check_collector,
        services.check_shared_folders,
        processes.check_processes,
        processes.check_exposure,
        host.check_clocks,
    )
    context = CheckContext(settings)
    for check in checks:
        yield from check(context)


def build_findings_table(findings: Sequence[Finding]) -> Table:
    """Return a terminal table; problems are last, next to the prompt."""
    table = new_table("", "subject", "found", "fix")
    for finding in sorted(findings, key=lambda one: list(_SIGNS).index(one.level)):
        sign, color = _SIGNS[finding.level]
        table.add_row(f"[{color}]{sign}[/]", finding.about, escape(finding.found), escape(finding.fix))
    return table
