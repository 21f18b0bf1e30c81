"""A serving node: engine, trace publisher, version poller and HTTP API in one process."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

import structlog
import torch
import uvicorn
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from schemas.errors import describe_error
from schemas.settings import Settings, SettingsError
from schemas.telemetry import logs, spans
from schemas.telemetry.metrics import register_process_metrics
from serving.answers.answer_consumer import AnswerConsumer
from serving.answers.answer_publisher import AnswerPublisher
from serving.engines.builtin.engine import BuiltinEngine
from serving.http import admin, routes, status, webhook
from serving.http.detokenizer import Tokenizer
from serving.http.generation import RequestMetrics
from serving.http.server import BackgroundServer, Drain, DrainingServer, bind
from serving.traces.chunks import Origin
from serving.traces.lag_consumer import LagConsumer
from serving.traces.publisher import TracePublisher
from serving.versions.cache import MlflowRegistry
from serving.versions.poller import VersionPoller

log = structlog.get_logger()

_SHUTDOWN_S = 2
"""Time for the error responses to requests that outlast the drain."""
_FLUSH_S = 4.0
"""Time for the last traces. With the default drain timeout, all is below the 15 s that supervisors commonly wait."""
_ANSWERS_FLUSH_S = 1.0
"""Time for the last answers."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then drain, and publish the last traces.

    Raises:
        SettingsError: an address is taken, the target cannot be served, or a Kafka option is unknown.
        SystemExit: the engine failed. The code is not 0, so that a supervisor starts the node again.
    """
    logs.configure("serve")
    spans.configure("serve", settings.telemetry)
    disable_progress_bar()
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    torch.set_num_threads(settings.serve.num_threads)
    with ExitStack() as stack:
        stack.callback(spans.close)
        serve = settings.serve
        server_socket = stack.enter_context(bind(serve.host, serve.port))
        admin_socket = None
        if serve.admin_port:
            admin_socket = stack.enter_context(bind(serve.admin_host, serve.admin_port, "serve.admin_"))
        tokenizer = load_tokenizer(settings.target.path)
        publisher = None
        if settings.traces.enabled:
            publisher = TracePublisher(settings.kafka, settings.traces, lag=LagConsumer(settings.kafka))
        answers = None
        if settings.traces.enabled and serve.suffix_scope != "request":
            answers = AnswerPublisher(settings.kafka, serve.suffix_scope)
        engine = BuiltinEngine(settings, publisher, answers)
        if publisher:
            publisher.start(Origin(settings.serve.node, engine.target, engine.line, engine.vocabulary))
            stack.callback(_close, publisher)
        if answers:
            answers.start(serve.node, engine.line)
            stack.callback(answers.close, _ANSWERS_FLUSH_S)
        engine.start()
        stack.callback(engine.stop)
        poller = None
        if settings.serve.speculate and settings.serve.drafter != "suffix":  # otherwise no version would be used
            poller = VersionPoller(MlflowRegistry(settings.registry, engine.line), engine, settings)
            poller.start()
            stack.callback(poller.stop)
        corpus = status.CorpusReport(
            serve.suffix_scope, engine.corpus, answers, _start_consumer(settings, engine, stack)
        )
        is_traced = publisher.sample if publisher else lambda _request: False
        reports = status.Reports(publisher, poller, corpus, status.PrefixCacheReport(engine.prefix_cache))
        _serve(settings, engine, tokenizer, is_traced, reports, server_socket, admin_socket)
        if error := engine.health().error:
            log.error("node_failed", error=error)
            raise SystemExit(1)


def _serve(
    settings: Settings,
    engine: BuiltinEngine,
    tokenizer: Tokenizer,
    is_traced: Callable[[str], bool],
    reports: status.Reports,
    server_socket: socket.socket,
    admin_socket: socket.socket | None,
) -> None:
    serve, registry = settings.serve, CollectorRegistry()
    register_process_metrics(registry)
    metrics, drain = RequestMetrics(registry), Drain(serve.drain_delay)
    app = routes.create_app(engine, tokenizer, settings.target.served_model_name, metrics, drain, serve, is_traced)
    status.add_routes(app, serve.node, engine, metrics, registry, reports, drain)
    admin_app = app if admin_socket is None else admin.create_app(serve)
    admin.add_routes(admin_app, serve, engine, reports.poller)
    webhook.add_route(app, serve.webhook_secret, engine.line, reports.poller)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S
    )
    host, port = server_socket.getsockname()[:2]
    log.info("node_started", host=host, port=port, target=engine.target, line=engine.line)
    with ExitStack() as stack:
        if admin_socket is not None:
            stack.callback(BackgroundServer(admin_app, admin_socket, "admin-http").close)
        DrainingServer(config, drain, serve.drain_timeout, engine).run(sockets=[server_socket])


def load_tokenizer(path: str) -> Tokenizer:
    """Return the target's tokenizer, without running code of its folder.

    Raises:
        SettingsError: the folder has none that transformers can load.
    """
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # What transformers raises depends on what is missing or broken.
        raise SettingsError(f"target.path {path}: no usable tokenizer: {describe_error(error)}") from error
    return tokenizer


def _start_consumer(settings: Settings, engine: BuiltinEngine, stack: ExitStack) -> AnswerConsumer | None:
    """Start to read the answers of other nodes, if the engine drafts from them; ``stack`` ends it."""
    serve = settings.serve
    if not serve.speculate or serve.drafter == "eagle" or serve.suffix_scope == "request":
        return None
    consumer = AnswerConsumer(settings.kafka, serve, engine.learn)
    consumer.start(engine.line, engine.vocabulary)
    stack.callback(consumer.stop)
    return consumer


def _close(publisher: TracePublisher) -> None:
    counts = publisher.close(_FLUSH_S)
    log.info(
        "traces_closed",
        captured=counts.captured,
        published=counts.published,
        dropped=counts.dropped,
        unsampled=counts.unsampled,
    )


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Exit cleanly, before the server runs and after it."""
    raise SystemExit(0)
