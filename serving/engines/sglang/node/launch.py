"""A node whose engine is SGLang's own server, started here as a child, or running already.

The server answers the API on its own address, with our plugin in it. Beside it this process looks after its versions
and answers what an operator asks of any node, on ``serve.host:serve.port``. It ends when the server does, with the same
exit code.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from schemas.settings import Settings, SettingsError, to_environ
from schemas.speculator.checkpoint import CheckpointError, read, read_manifest
from schemas.speculator.initial_draft import Line
from schemas.telemetry import logs
from schemas.telemetry.metrics import register_process_metrics
from serving.engines.sglang.node import flags
from serving.engines.sglang.node.checksums import compare
from serving.engines.sglang.node.child import Child
from serving.engines.sglang.node.client import SglangError, SglangServer
from serving.engines.sglang.node.flags import Flags
from serving.engines.sglang.node.initial_version import begin, line_of
from serving.engines.sglang.node.remote_engine import Known, RemoteEngine
from serving.engines.sglang.node.weights import sent
from serving.engines.sglang.plugin import compatibility
from serving.http import admin as control
from serving.http import status, webhook
from serving.http.address import bind
from serving.http.drain import Drain
from serving.http.routes import explain_errors
from serving.versions.cache import Registry
from serving.versions.poller import Puller
from serving.versions.registry import MlflowRegistry

log = structlog.get_logger()

_LOOK_S = 0.2
_END_S = 10.0
"""Beside ``serve.drain_timeout``: SGLang looks every five seconds whether all requests have ended."""
_ASK_PYTHON = (
    "import importlib.metadata as m, json;"
    "print(json.dumps([m.version('sglang'),"
    "any(e.name == 'aurora' for e in m.entry_points(group='sglang.srt.plugins'))]))"
)


def run(settings: Settings, given: Sequence[str]) -> int:
    """Serve until the server ends, or SIGTERM or SIGINT comes; returns the exit code.

    Args:
        settings: Of the node.
        given: Flags of SGLang.

    Raises:
        SettingsError: settings or flags that cannot be used.
        SglangError: the server that ``sglang.url`` names cannot be looked after.
    """
    logs.configure("serve")
    # It tells of every request, and the server is looked at every second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asked = flags.of(given)
    flags.check(asked, settings)
    with _signals() as signals:
        if settings.sglang.url:
            if given:
                raise SettingsError("sglang.url names a server that runs: flags would change nothing; leave them out")
            return _look_after(settings, signals)
        _check_python(_python(settings))
        return _supervise(settings, asked, signals)


class _Signals:
    """Those that came, in their order. Looked at, not waited for: a handler must take no lock."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def take(self, number: int, _frame: FrameType | None) -> None:
        """Handler of a signal."""
        self.numbers.append(number)


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals.take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(settings: Settings, asked: Flags, signals: _Signals) -> int:
    """Start a server and stay until it ends."""
    line = line_of(settings)
    registry = MlflowRegistry(settings.registry, line.name)
    start, known = begin(settings, line, registry) if settings.serve.speculate else (None, None)
    with ExitStack() as undo:
        beside: _Beside | None = None
        # Further machines of a server answer nothing, and get their weights from the first.
        if asked.rank == 0:
            server = SglangServer(flags.url(asked), flags.key(asked, settings), settings.sglang.timeout)
            engine = RemoteEngine(server, line.target, line.name, known, shares=asked.is_alone)
            beside = _Beside(settings, server, engine, registry)
            undo.callback(beside.close)
        command = [_python(settings), "-m", "sglang.launch_server", *flags.arguments(asked, settings, start)]
        child = Child(command, to_environ(settings))
        undo.callback(child.signal, signal.SIGKILL)
        log.info("sglang_started", pid=child.pid, url=flags.url(asked), line=line.name)
        while child.code is None and not signals.numbers:
            time.sleep(_LOOK_S)
        if beside:
            beside.drain.begin()
        return _ended(child, signals, settings.serve.drain_timeout)


def _ended(child: Child, signals: _Signals, drain_s: float) -> int:
    """Hand on every signal until the server has ended; its exit code, 0 where a signal that it was handed ended it."""
    handed, deadline = 0, time.monotonic() + drain_s + _END_S
    while child.code is None:
        for number in signals.numbers[handed:]:
            log.info("sglang_told_to_end", signal=signal.Signals(number).name)
            child.signal(number)
            handed += 1
        if time.monotonic() > deadline:
            log.warning("sglang_killed", why="it did not end by itself within serve.drain_timeout")
            child.signal(signal.SIGKILL)
        child.wait(_LOOK_S)
    code = child.code
    log.info("sglang_ended", code=code)
    return 0 if code in {128 + number for number in signals.numbers[:handed]} else code


def _look_after(settings: Settings, signals: _Signals) -> int:
    """Follow the versions for a server that somebody else has started, until a signal comes."""
    line = line_of(settings)
    with ExitStack() as undo:
        server = SglangServer(settings.sglang.url, settings.sglang.api_key, settings.sglang.timeout)
        registry = MlflowRegistry(settings.registry, line.name)
        engine = RemoteEngine(server, line.target, line.name, _known(server, line))
        beside = _Beside(settings, server, engine, registry)
        undo.callback(beside.close)
        while not signals.numbers:
            time.sleep(_LOOK_S)
        beside.drain.begin()
        return 0


class _Beside:
    """What a node does beside the server: it follows versions, and answers an operator on a thread.

    Raises:
        SettingsError: the address is taken.
    """

    def __init__(self, settings: Settings, server: SglangServer, engine: RemoteEngine, registry: Registry) -> None:
        serve = settings.serve
        self._socket, self._server, self._engine = bind(serve.host, serve.port), server, engine
        self._puller = Puller(registry, self._engine, settings) if serve.speculate else None
        self._stopping, self._follows = threading.Event(), False
        self.drain = Drain()
        app = FastAPI(title="Aurora Stream", docs_url=None, redoc_url=None)
        metrics, published = CollectorRegistry(), self._engine.published
        register_process_metrics(metrics)
        status.add(app, serve.node, self._engine, self._engine, metrics, published, self._puller, self.drain)
        control.add(app, serve, self._engine, self._puller)
        webhook.add(app, serve.webhook_secret, engine.line, self._puller)
        explain_errors(app, lambda: None)
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        self._side = uvicorn.Server(config)
        answering = {"sockets": [self._socket]}
        self._threads = [
            threading.Thread(target=self._side.run, kwargs=answering, name="side", daemon=True),
            threading.Thread(target=self._begin, name="begin", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _begin(self) -> None:
        """Wait until the server answers, then follow versions. A server that hangs keeps no signal waiting here."""
        why = ""
        while not self._stopping.wait(_LOOK_S):
            if not self._server.healthy():
                continue
            try:
                self._engine.start()
            except SglangError as error:
                # The server serves, whatever hinders this: it is tried again, and said once.
                if str(error) != why:
                    log.warning("sglang_not_followed", why=str(error))
                why = str(error)
                continue
            if self._puller:
                self._puller.start()
                self._follows = True
            log.info("sglang_ready")
            return

    def close(self) -> None:
        """End all of it; what hangs is left to die with the process."""
        self._stopping.set()
        self._side.should_exit = True
        for thread in self._threads:
            thread.join(2.0)
        if self._puller and self._follows:
            self._puller.stop()
        self._engine.stop()
        self._socket.close()
        self._server.close()


def _known(server: SglangServer, line: Line) -> Known | None:
    """What a running server drafts with, where that is still the draft of its start.

    Raises:
        SglangError: it does not answer, or its draft is of another line: such weights must never be sent to it.
    """
    about = server.about()
    if about.version not in compatibility.VERSIONS:
        raise SglangError(f"{server.url}: SGLang {about.version}; known: {', '.join(compatibility.VERSIONS)}")
    folder = Path(about.draft or "")
    try:
        served = read_manifest(folder).line
        if served != line.name:
            raise SglangError(f"{server.url}: drafts for line {served}; target.path and [speculator] give {line.name}")
        known = Known(about.weight_version, sent(read(folder, line.name)))
    except CheckpointError as error:
        raise SglangError(f"{server.url}: --speculative-draft-model-path is no version of ours: {error}") from error
    return None if compare(server.sums(), known.expected).names else known


def _python(settings: Settings) -> str:
    return settings.sglang.python or sys.executable


def _check_python(python: str) -> None:
    """See that SGLang is there as it is known, with our plugin.

    Raises:
        SettingsError: it is not; the message says what to install.
    """
    named = f"sglang.python {python}"
    try:
        asked = subprocess.run([python, "-c", _ASK_PYTHON], capture_output=True, text=True, timeout=60, check=True)
        version, recorded = json.loads(asked.stdout.strip().rsplit("\n", 1)[-1])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SettingsError(f"{named}: SGLang is not installed there: docs/guides/sglang.md") from error
    if version not in compatibility.VERSIONS:
        raise SettingsError(f"{named}: SGLang {version} is not known; known: {', '.join(compatibility.VERSIONS)}")
    if not recorded:
        raise SettingsError(f'{named}: our plugin is not installed there: pip install "aurora-stream[sglang]"')
