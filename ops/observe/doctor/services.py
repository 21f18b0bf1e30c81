"""What the processes need of others: broker and topics, registry, tables, the store of claim checks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx

from ops.observe.doctor.finding import Finding, Patient, ok, problem, warning
from ops.observe.doctor.machine import is_local
from schemas.errors import UserError
from schemas.settings import SettingsError

_BROKER_S = 6.0
_COLLECTOR_S = 5.0
_FIX_BROKER = (
    "start it (`aurora up` brings one), or set kafka.bootstrap_servers and, for TLS and SASL, kafka.client_options"
)
_FIX_TOPICS = "`aurora topics apply` makes it so"


def look_at_broker(patient: Patient) -> Iterator[Finding]:
    """Whether the broker answers, and whether its topics are as they are declared."""
    from pipeline import topics
    from pipeline.broker import connect

    kafka = patient.settings.kafka
    try:
        members = len(connect(kafka, _BROKER_S).list_topics(timeout=_BROKER_S).brokers)
        changes = topics.compare(kafka)
    except (UserError, SettingsError) as error:
        yield problem("broker", str(error), _FIX_BROKER)
        return
    yield ok("broker", f"{kafka.bootstrap_servers} answers, {members} in the cluster")
    if kafka.replication_factor > members:
        found = f"kafka.replication_factor is {kafka.replication_factor}, the cluster has {members}"
        yield problem("topics", found, f"set kafka.replication_factor to {members} or less, or add brokers")
    missing = sorted({change.topic for change in changes if change.found is None})
    for name in missing:
        yield warning("topics", f"{name} does not exist", f"{_FIX_TOPICS}; so does the first stream worker")
    for change in changes:
        if change.found is not None:
            found = f"{change.topic}: {change.property} is {change.found}, the settings want {change.declared}"
            yield problem("topics", found, change.rejected or _FIX_TOPICS)
    if not changes:
        yield ok("topics", "as they are declared")


def look_at_registry(patient: Patient) -> Iterator[Finding]:
    """Whether the registry answers, is MLflow, lets us in, and knows the speculator line."""
    settings = patient.settings.registry
    uri = settings.tracking_uri
    fix = "start it (`aurora up` brings one), or set registry.tracking_uri to your MLflow server"
    try:
        account = (settings.username, settings.password.get_secret_value()) if settings.username else None
        answer = httpx.get(f"{uri.rstrip('/')}/version", auth=account, timeout=settings.timeout)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield problem("registry", f"{uri}: {error}", fix)
        return
    if date := answer.headers.get("date"):
        # The header is cut to whole seconds.
        patient.clocks["registry"] = parsedate_to_datetime(date).timestamp() + 0.5 - time.time()
    if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        user = "set registry.username and registry.password, or MLflow's own MLFLOW_TRACKING_TOKEN"
        yield problem("registry", f"{uri} answers {answer.status_code}: it does not let us in", user)
        return
    if answer.status_code != HTTPStatus.OK or not answer.text[:1].isdigit():
        found = f"something else than MLflow answers at {uri} ({answer.status_code} for /version)"
        yield problem("registry", found, "set registry.tracking_uri to your MLflow server, without a path behind it")
        return
    yield ok("registry", f"{uri}, MLflow {answer.text.strip()}")
    yield from _line_in_registry(patient)


def _line_in_registry(patient: Patient) -> Iterator[Finding]:
    from trainer.release.registry import RegistryError, SpeculatorRegistry

    if patient.model is None:
        return
    line = patient.model.line
    try:
        lines = {one.name: one.aliases for one in SpeculatorRegistry(patient.settings.registry).lines()}
    except RegistryError as error:
        yield problem("registry", str(error), "check the rights of the user there, and registry.timeout")
        return
    if line in lines:
        named = ", ".join(f"{alias} is version {version}" for alias, version in sorted(lines[line].items()))
        yield ok("registry", f"line {line}: {named or 'no alias yet'}")
    elif lines:
        found = f"no version of line {line}, but of {', '.join(sorted(lines))}"
        yield warning(
            "registry",
            found,
            "a new line begins at day 0; if that is not meant, set target.path, speculator.variant, "
            "draft_vocabulary, vocabulary, intermediate_size and key_value_heads to what the old one was trained with",
        )
    else:
        yield ok("registry", "no versions yet: day 0")


def look_at_tables(patient: Patient) -> Iterator[Finding]:
    """Whether the tables can be read, and hold rows of our line; says nothing of tables that are not there yet."""
    from deltalake import DeltaTable

    from pipeline.delta import DeltaLog, TableError, translate_errors

    settings = patient.settings.tables
    try:
        with translate_errors(f"tables at {settings.uri}"):
            there = DeltaTable.is_deltatable(f"{settings.uri.rstrip('/')}/traces", settings.storage_options or None)
        if not there:
            yield ok("tables", f"none at {settings.uri} yet; a stream worker makes them")
            return
        log = DeltaLog(settings)
        if not is_local(settings.uri):
            patient.clocks["table store"] = log.store_clock().timestamp() - time.time()
        counted = "select line, count(*) as rows from accepted group by line order by rows desc"
        rows = {row["line"]: row["rows"] for row in log.query(counted).read_all().to_pylist()}
        dead = log.row_count("dead_letters")
    except TableError as error:
        yield problem("tables", str(error), "set tables.uri and tables.storage_options")
        return
    told = ", ".join(f"{count:,} of line {line}" for line, count in rows.items())
    if rows and patient.model and patient.model.line not in rows:
        fix = "the trainer learns from its own line only: set target and speculator as the nodes have them"
        yield warning("tables", f"no windows of line {patient.model.line}, but {told}", fix)
    else:
        yield ok("tables", f"{settings.uri}, windows: {told or 'none yet'}")
    if dead:
        yield warning("tables", f"{dead:,} dead letters", "`aurora dead list` says why")


def look_at_collector(patient: Patient) -> Iterator[Finding]:
    """Whether spans can be made, and whether a collector takes them."""
    endpoint = patient.settings.telemetry.endpoint
    if not endpoint:
        return
    if not _can_send_spans():
        yield problem("tracing", "OpenTelemetry is not installed", "install the extra `telemetry`, or unset it")
        return
    headers = {"content-type": "application/x-protobuf", **patient.settings.telemetry.headers}
    try:
        answer = httpx.post(f"{endpoint.rstrip('/')}/v1/traces", headers=headers, timeout=_COLLECTOR_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield warning("tracing", f"{endpoint}: {error}", "start the collector, or set telemetry.endpoint")
        return
    if answer.status_code == HTTPStatus.OK:
        yield ok("tracing", f"{endpoint} takes spans")
    else:
        found = f"{endpoint} answers {answer.status_code} to no spans"
        yield warning("tracing", found, "set telemetry.endpoint to OTLP over HTTP (port 4318 mostly), and its headers")


def _can_send_spans() -> bool:
    """Looked for and not imported: it takes a while."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def look_at_claims(patient: Patient) -> Iterator[Finding]:
    """Whether the store of claim checks takes and returns a file."""
    from schemas.claim_store import ClaimStore, ClaimStoreError

    traces = patient.settings.traces
    if traces.features != "claim-check":
        return
    try:
        ClaimStore(traces).probe()
    except (ClaimStoreError, SettingsError) as error:
        yield problem("claims", str(error), "set traces.claim_check_uri and traces.claim_check_options")
    else:
        yield ok("claims", f"{traces.claim_check_uri} takes files")


def look_at_sharing(patient: Patient) -> Iterator[Finding]:
    """Whether processes that are spread over machines would look into folders that only this one has."""
    settings = patient.settings
    hosts = {urlsplit(f"//{address.strip()}").hostname for address in settings.kafka.bootstrap_servers.split(",")}
    hosts.add(urlsplit(settings.registry.tracking_uri).hostname)
    away = sorted(host for host in hosts if host and host not in ("127.0.0.1", "localhost", "::1"))
    if not away:
        return
    folders = {"tables.uri": settings.tables.uri}
    if settings.traces.features == "claim-check":
        folders["traces.claim_check_uri"] = settings.traces.claim_check_uri
    for setting, uri in folders.items():
        if is_local(uri):
            found = f"{setting} is the folder {uri} of this machine, while {', '.join(away)} serves others too"
            fix = f"unless that is a shared volume, set {setting} to an object store"
            yield warning("tables" if setting == "tables.uri" else "claims", found, fix)
