"""The processes that run: whether they are ours, well, and of the line that the settings give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from ops.observe.doctor.finding import Finding, Patient, ok, problem, warning
from ops.observe.status import Gatherer, Overview
from schemas.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def look_at_processes(patient: Patient) -> Iterator[Finding]:
    """Ask all four; one that does not run is told, and may be meant."""
    with closing(Gatherer(patient.settings)) as gatherer:
        overview = gatherer.gather()
    for name in ("serve", "stream", "train", "promoter"):
        if getattr(overview, name) is not None:
            continue
        silent = overview.silent[name]
        if silent.startswith("something else"):
            yield problem(name, silent, f"end the program that listens there, or set {name}.port")
        else:
            yield warning(name, silent, f"start it with `aurora {name}`, or all with `aurora up`")
    yield from _node(patient, overview)
    yield from _learning(overview)


def _node(patient: Patient, overview: Overview) -> Iterator[Finding]:
    node = overview.serve
    if node is None:
        return
    model = patient.model
    if model and node.target != model.target:
        found = f"node {node.node} serves target {node.target}, target.path holds {model.target}"
        yield problem("serve", found, "restart the node, or set target.path to the model that it serves")
    elif model and node.line != model.line:
        found = f"node {node.node} is of line {node.line}, the settings give {model.line}"
        yield problem("serve", found, "give node and trainer the same [speculator] section, and restart the node")
    if not node.engine_up:
        yield problem("serve", f"the engine of node {node.node} does not run", "its log says why; restart it")
    if node.registry_error:
        yield problem("serve", f"node {node.node}: {node.registry_error}", "set registry.tracking_uri for the node")
    if node.circuit_breaker != "closed":
        found = f"node {node.node} cannot publish traces (breaker {node.circuit_breaker})"
        yield problem("serve", found, "check kafka.bootstrap_servers and kafka.client_options of the node")
    for refused in node.versions_rejected:
        yield warning("serve", f"node {node.node} refuses version {refused.version}: {refused.why}", "promote another")
    yield ok("serve", f"node {node.node}, version {node.speculator or 'none'}, {node.requests_failed} failed requests")


def _learning(overview: Overview) -> Iterator[Finding]:
    if stream := overview.stream:
        for why in dict.fromkeys([*stream.not_live, *stream.not_ready]):
            yield problem("stream", why, "docs/guides/services.md, 'Stream workers'")
        yield ok("stream", f"{stream.rows_written:,} rows written, {overview.trace_lag or 0:,} records behind")
    if train := overview.train:
        if train.error:
            yield problem("train", train.error, "its log has more")
        yield ok("train", f"step {train.step:,}")
    if promoter := overview.promoter:
        if promoter.error:
            yield problem("promoter", promoter.error, "its log has more")
        yield ok("promoter", f"champion {promoter.champion or 'none'}")


def look_at_exposure(patient: Patient) -> Iterator[Finding]:
    """Which addresses are open to other machines, and what stands there without a password."""
    settings = patient.settings
    for name, host in _hosts(settings).items():
        if host in LOOPBACK:
            continue
        what = "the API and status pages" if name == "serve" else "status pages"
        fix = f"put {name}.host behind a proxy or a network policy, or set it to 127.0.0.1"
        yield warning("exposure", f"{name}.host is {host}: {what} are open to whoever reaches it", fix)


def _hosts(settings: Settings) -> dict[str, str]:
    return {name: getattr(settings, name).host for name in ("serve", "stream", "train", "promoter")}
