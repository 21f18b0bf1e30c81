"""A serving node: engine, trace publisher, registry puller and HTTP API in one process."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

import structlog
import torch
import uvicorn
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from schemas.settings import Settings
from schemas.telemetry import logs, spans
from schemas.telemetry.metrics import register_process_metrics
from serving.engines.builtin.engine import BuiltinEngine
from serving.http import admin as control
from serving.http import routes, status, webhook
from serving.http.address import bind
from serving.http.drain import Drain, DrainingServer
from serving.http.generation import RequestFigures
from serving.traces.chunks import Origin
from serving.traces.publisher import TracePublisher
from serving.versions.poller import Puller
from serving.versions.registry import MlflowRegistry

log = structlog.get_logger()

_HANG_UP_S = 2
"""For the last words to requests that outlast the drain."""
_FLUSH_S = 4.0
"""For the last traces. With the default of ``serve.drain_timeout``, all is below the 15 s that supervisors wait."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then answer what runs, for ``serve.drain_timeout``, and publish the last traces.

    Raises:
        SettingsError: the address is taken, the target cannot be served, or a Kafka option is unknown.
    """
    logs.configure("serve")
    spans.configure("serve", settings.telemetry)
    disable_progress_bar()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    torch.set_num_threads(settings.serve.num_threads)
    with ExitStack() as undo:
        undo.callback(spans.close)
        server_socket = undo.enter_context(bind(settings.serve.host, settings.serve.port))
        publisher = TracePublisher(settings.kafka, settings.traces) if settings.traces.enabled else None
        engine = BuiltinEngine(settings, publisher)
        if publisher:
            publisher.start(Origin(settings.serve.node, engine.target, engine.line, engine.vocabulary))
            undo.callback(_close, publisher)
        engine.start()
        undo.callback(engine.stop)
        puller = _puller(settings, engine)
        if puller:
            puller.start()
            undo.callback(puller.stop)
        _serve(settings, engine, publisher, puller, server_socket)


def _serve(
    settings: Settings,
    engine: BuiltinEngine,
    publisher: TracePublisher | None,
    puller: Puller | None,
    server_socket: socket.socket,
) -> None:
    metrics = CollectorRegistry()
    register_process_metrics(metrics)
    figures = RequestFigures(metrics)
    tokenizer = AutoTokenizer.from_pretrained(settings.target.path, local_files_only=True)
    drain = Drain()
    traced = publisher.wants if publisher else _never
    app = routes.create(engine, tokenizer, settings.target.served_model_name, figures, drain, settings.serve, traced)
    status.add(app, settings.serve.node, engine, figures, metrics, publisher, puller, drain)
    control.add(app, settings.serve, engine, puller)
    webhook.add(app, settings.serve.webhook_secret, engine.line, puller)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=_HANG_UP_S
    )
    host, port = server_socket.getsockname()[:2]
    log.info("serving", host=host, port=port, target=engine.target, line=engine.line)
    DrainingServer(config, drain, settings.serve.drain_timeout, engine.stop).run(sockets=[server_socket])


def _puller(settings: Settings, engine: BuiltinEngine) -> Puller | None:
    """Without speculation nothing that could be pulled would be used."""
    if not settings.serve.speculate:
        return None
    registry = MlflowRegistry(settings.registry, engine.line)
    return Puller(registry, engine, settings)


def _close(publisher: TracePublisher) -> None:
    counts = publisher.close(_FLUSH_S)
    log.info(
        "traces_closed",
        captured=counts.captured,
        published=counts.published,
        shed=counts.shed,
        sampled_out=counts.sampled_out,
    )


def _never(_request: str) -> bool:
    """Without a publisher nothing is traced, and the engine need not write verify steps down."""
    return False


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    """A clean end before it serves, and after it."""
    raise SystemExit(0)
