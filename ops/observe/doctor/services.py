"""Checks of external services: broker and topics, registry, tables, claim-check store, span collector."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx

from ops.observe.doctor.checks import CheckContext, Finding, ok, problem, warning
from ops.observe.doctor.host import is_local
from schemas.errors import UserError
from schemas.settings import SettingsError

_BROKER_S = 6.0
_COLLECTOR_S = 5.0
_FIX_BROKER = (
    "start it (`aurora up` brings one), or set kafka.bootstrap_servers and, for TLS and SASL, kafka.client_options"
)
_FIX_TOPICS = "run `aurora topics apply`"


def check_broker(context: CheckContext) -> Iterator[Finding]:
    """Check that the broker answers and that its topics match their declaration."""
    from pipeline import topics
    from pipeline.broker import connect

    kafka = context.settings.kafka
    try:
        members = len(connect(kafka, _BROKER_S).list_topics(timeout=_BROKER_S).brokers)
        changes = topics.compare(kafka)
    except (UserError, SettingsError) as error:
        yield problem("broker", str(error), _FIX_BROKER)
        return
    yield ok("broker", f"{kafka.bootstrap_servers} answers, {members} brokers in the cluster")
    if kafka.replication_factor > members:
        found = f"kafka.replication_factor is {kafka.replication_factor}, the cluster has {members}"
        yield problem("topics", found, f"set kafka.replication_factor to {members} or less, or add brokers")
    missing = sorted({change.topic for change in changes if change.found is None})
    for name in missing:
        yield warning("topics", f"{name} does not exist", f"{_FIX_TOPICS}; the first stream worker also creates it")
    for change in changes:
        if change.found is not None:
            found = f"{change.topic}: {change.property} is {change.found}, the settings want {change.declared}"
            yield problem("topics", found, change.rejected or _FIX_TOPICS)
    if not changes:
        yield ok("topics", "as declared")


def check_registry(context: CheckContext) -> Iterator[Finding]:
    """Check that the registry answers, is MLflow, accepts the credentials, and has the speculator line."""
    settings = context.settings.registry
    uri = settings.tracking_uri
    fix = "start it (`aurora up` brings one), or set registry.tracking_uri to your MLflow server"
    try:
        account = (settings.username, settings.password.get_secret_value()) if settings.username else None
        answer = httpx.get(f"{uri.rstrip('/')}/version", auth=account, timeout=settings.timeout)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield problem("registry", f"{uri}: {error}", fix)
        return
    if date := answer.headers.get("date"):
        # The header has whole seconds only.
        context.clocks["registry"] = parsedate_to_datetime(date).timestamp() + 0.5 - time.time()
    if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        fix_login = "set registry.username and registry.password, or MLflow's own MLFLOW_TRACKING_TOKEN"
        yield problem("registry", f"{uri} answers {answer.status_code}: the credentials are rejected", fix_login)
        return
    if answer.status_code != HTTPStatus.OK or not answer.text[:1].isdigit():
        found = f"something else than MLflow answers at {uri} ({answer.status_code} for /version)"
        yield problem("registry", found, "set registry.tracking_uri to your MLflow server, without a path behind it")
        return
    yield ok("registry", f"{uri}, MLflow {answer.text.strip()}")
    yield from _check_line(context)


def _check_line(context: CheckContext) -> Iterator[Finding]:
    from trainer.release.registry import RegistryError, SpeculatorRegistry

    if context.model is None:
        return
    line = context.model.line
    try:
        lines = {one.name: one.aliases for one in SpeculatorRegistry(context.settings.registry).lines()}
    except RegistryError as error:
        yield problem("registry", str(error), "check the permissions of the user, and registry.timeout")
        return
    if line in lines:
        named = ", ".join(f"{alias} is version {version}" for alias, version in sorted(lines[line].items()))
        yield ok("registry", f"line {line}: {named or 'no alias yet'}")
    elif lines:
        found = f"no version of line {line}, but of {', '.join(sorted(lines))}"
        yield warning(
            "registry",
            found,
            "a new line starts from day 0; if that is not intended, set target.path, speculator.variant, "
            "draft_vocab_size, draft_vocab_file, intermediate_size, num_key_value_heads and day_0_folder as for the "
            "old line",
        )
    else:
        yield ok("registry", "no versions yet: day 0")


def check_tables(context: CheckContext) -> Iterator[Finding]:
    """Check that the tables can be read and hold rows of the line; missing tables are no fault."""
    from deltalake import DeltaTable

    from pipeline.delta import DeltaLog, TableError, translate_errors
    from pipeline.store_probe import UnsafeStoreError, check_store

    settings = context.settings.tables
    try:
        with translate_errors(f"tables at {settings.uri}"):
            there = DeltaTable.is_deltatable(f"{settings.uri.rstrip('/')}/traces", settings.storage_options or None)
        if not there:
            yield ok("tables", f"none at {settings.uri} yet; a stream worker creates them")
            return
        log = DeltaLog(settings)
        try:
            check_store(settings)
            if not is_local(settings.uri):
                context.clocks["table store"] = log.store_clock().timestamp() - time.time()
        except UnsafeStoreError as error:
            yield problem("tables", str(error), "set tables.uri to a store with conditional writes")
        except TableError as error:
            found = f"the store was not probed, because it could not be written: {error}"
            yield warning("tables", found, "run `aurora doctor` with the credentials of a stream worker")
        counted = "select line, count(*) as rows from accepted group by line order by rows desc"
        rows = {row["line"]: row["rows"] for row in log.query(counted).read_all().to_pylist()}
        dead = log.row_count("dead_letters")
    except TableError as error:
        yield problem("tables", str(error), "set tables.uri and tables.storage_options")
        return
    counts = ", ".join(f"{count:,} of line {line}" for line, count in rows.items())
    if rows and context.model and context.model.line not in rows:
        fix = "the trainer trains on its own line only: set target and speculator as on the nodes"
        yield warning("tables", f"no samples of line {context.model.line}, but {counts}", fix)
    else:
        yield ok("tables", f"{settings.uri}, samples: {counts or 'none yet'}")
    if dead:
        yield warning("tables", f"{dead:,} dead letters", "`aurora dlq list` shows the reasons")


def check_collector(context: CheckContext) -> Iterator[Finding]:
    """Check that spans can be exported and that the collector accepts them."""
    endpoint = context.settings.telemetry.endpoint
    if not endpoint:
        return
    if not _has_span_exporter():
        yield problem("tracing", "OpenTelemetry is not installed", "install the extra `telemetry`, or unset it")
        return
    headers = {"content-type": "application/x-protobuf", **context.settings.telemetry.headers}
    try:
        answer = httpx.post(f"{endpoint.rstrip('/')}/v1/traces", headers=headers, timeout=_COLLECTOR_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield warning("tracing", f"{endpoint}: {error}", "start the collector, or set telemetry.endpoint")
        return
    if answer.status_code == HTTPStatus.OK:
        yield ok("tracing", f"{endpoint} accepts spans")
    else:
        found = f"{endpoint} answers {answer.status_code} to an empty export"
        yield warning("tracing", found, "set telemetry.endpoint to OTLP over HTTP (usually port 4318), and its headers")


def _has_span_exporter() -> bool:
    """Return whether the OTLP exporter is installed, without importing it: the import is slow."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def check_claim_store(context: CheckContext) -> Iterator[Finding]:
    """Check that the claim-check store stores and returns a file."""
    from schemas.claim_store import ClaimStore, ClaimStoreError

    traces = context.settings.traces
    if traces.features != "claim-check":
        return
    try:
        ClaimStore(traces).probe()
    except (ClaimStoreError, SettingsError) as error:
        yield problem("claims", str(error), "set traces.claim_check_uri and traces.claim_check_options")
    else:
        yield ok("claims", f"{traces.claim_check_uri} stores files")


def check_shared_folders(context: CheckContext) -> Iterator[Finding]:
    """Check that processes on several machines do not share data through a local folder."""
    settings = context.settings
    hosts = {urlsplit(f"//{address.strip()}").hostname for address in settings.kafka.bootstrap_servers.split(",")}
    hosts.add(urlsplit(settings.registry.tracking_uri).hostname)
    remote = sorted(host for host in hosts if host and host not in ("127.0.0.1", "localhost", "::1"))
    if not remote:
        return
    folders = {"tables.uri": settings.tables.uri}
    if settings.traces.features == "claim-check":
        folders["traces.claim_check_uri"] = settings.traces.claim_check_uri
    for setting, uri in folders.items():
        if is_local(uri):
            found = f"{setting} is the local folder {uri}, but {', '.join(remote)} serves other machines"
            fix = f"unless it is a shared volume, set {setting} to an object store"
            yield warning("tables" if setting == "tables.uri" else "claims", found, fix)
