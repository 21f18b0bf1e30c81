"""Checks of the running processes: reachable, healthy, and of the configured line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from ops.observe.doctor.checks import CheckContext, Finding, ok, problem, warning
from ops.observe.status import Overview, StatusClient

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_processes(context: CheckContext) -> Iterator[Finding]:
    """Check the status of all four processes. A process that does not run is a warning: it may be intended."""
    with closing(StatusClient(context.settings)) as client:
        overview = client.fetch()
    for name in ("serve", "stream", "train", "promoter"):
        if getattr(overview, name) is not None:
            continue
        silent = overview.silent[name]
        if silent.startswith("something else"):
            yield problem(name, silent, f"end the program that listens there, or set {name}.port")
        else:
            yield warning(name, silent, f"start it with `aurora {name}`, or all with `aurora up`")
    yield from _check_node(context, overview)
    yield from _check_others(overview)


def _check_node(context: CheckContext, overview: Overview) -> Iterator[Finding]:
    node = overview.serve
    if node is None:
        return
    model = context.model
    if model and node.target != model.target:
        found = f"node {node.node} serves target {node.target}, target.path holds {model.target}"
        yield problem("serve", found, "restart the node, or set target.path to the model that it serves")
    elif model and node.line != model.line:
        found = f"node {node.node} is of line {node.line}, the settings give {model.line}"
        yield problem("serve", found, "give node and trainer the same [speculator] section, and restart the node")
    if not node.engine_up:
        yield problem("serve", f"the engine of node {node.node} does not run", "read its log; restart it")
    if node.registry_error:
        yield problem("serve", f"node {node.node}: {node.registry_error}", "set registry.tracking_uri for the node")
    if node.circuit_breaker != "closed":
        found = f"node {node.node} cannot publish traces (circuit breaker {node.circuit_breaker})"
        yield problem("serve", found, "check kafka.bootstrap_servers and kafka.client_options of the node")
    for rejected in node.versions_rejected:
        yield warning(
            "serve", f"node {node.node} rejected version {rejected.version}: {rejected.why}", "promote another"
        )
    yield ok("serve", f"node {node.node}, version {node.speculator or 'none'}, {node.requests_failed} failed requests")


def _check_others(overview: Overview) -> Iterator[Finding]:
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


def check_exposure(context: CheckContext) -> Iterator[Finding]:
    """Report addresses that are open to other machines without a password."""
    settings = context.settings
    for name in ("serve", "stream", "train", "promoter"):
        host = getattr(settings, name).host
        if host in LOOPBACK:
            continue
        pages = "the API and status pages" if name == "serve" else "status pages"
        fix = f"put {name}.host behind a proxy or a network policy, or set it to 127.0.0.1"
        yield warning("exposure", f"{name}.host is {host}: {pages} are open to every machine that can reach it", fix)
