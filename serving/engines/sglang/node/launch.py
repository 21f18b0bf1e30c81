"""A node whose engine is SGLang's own server, started here as a child process or running already.

The server answers the API on its own address, with our plugin in its process. The sidecar in this process swaps its
versions and answers the operator's endpoints on ``serve.host:serve.port``. This process ends when the server does, with
the same exit code.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog

from schemas.settings import Settings, SettingsError, to_environ
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.day_0_draft import SpeculatorLine
from schemas.telemetry import logs
from serving.engines.node.child_process import POLL_S, ChildProcess, record_signals, supervise
from serving.engines.node.command_line import Flags
from serving.engines.node.server_client import ServerError
from serving.engines.node.sidecar import Sidecar, read_target_line, write_first_draft
from serving.engines.sglang.node import flags
from serving.engines.sglang.node.client import SglangServer
from serving.engines.sglang.node.remote_engine import RemoteEngine, ServedDraft
from serving.engines.sglang.node.weights import compare_checksums
from serving.engines.sglang.plugin import compatibility
from serving.versions.cache import MlflowRegistry

log = structlog.get_logger()

_QUERY_ENVIRONMENT = (
    "import importlib.metadata as m, json;"
    "print(json.dumps([m.version('sglang'),"
    "any(e.name == 'aurora' for e in m.entry_points(group='sglang.srt.plugins'))]))"
)


def run(settings: Settings, arguments: Sequence[str]) -> int:
    """Serve until the server ends, or on SIGTERM or SIGINT; return the exit code.

    Args:
        settings: Settings of the node.
        arguments: Flags of SGLang.

    Raises:
        SettingsError: settings or flags are invalid.
        ServerError: the server at ``sglang.url`` is not supported.
    """
    logs.configure("serve")
    # httpx logs every request, and the server is read every second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    given = Flags(tuple(arguments))
    flags.check(given, settings)
    with record_signals() as signals:
        if settings.sglang.url:
            if arguments:
                raise SettingsError("sglang.url names a running server: flags have no effect on it; omit them")
            return _attach(settings, signals)
        _check_environment(settings)
        return _start(settings, given, signals)


def _start(settings: Settings, given: Flags, signals: list[int]) -> int:
    """Start a server, and wait until it ends."""
    line = _read_line(settings)
    registry = MlflowRegistry(settings.registry, line.name)
    folder, served = None, None
    if settings.serve.speculate:
        folder, draft = write_first_draft(settings, line, registry, settings.sglang.draft_dir)
        served = ServedDraft(folder.version, draft)
    with ExitStack() as stack:
        sidecar: Sidecar | None = None
        url = given.url(flags.PORT)
        # The other machines of a server answer no requests, and get their weights from the first.
        if flags.node_rank(given) == 0:
            server = SglangServer(url, flags.key_of(given, settings), settings.sglang.timeout)
            engine = RemoteEngine(server, line.target, line.name, served, shares_memory=flags.is_single_machine(given))
            sidecar = Sidecar(settings, server, engine, registry)
            stack.callback(sidecar.close)
        arguments = flags.build_arguments(given, settings, folder, _write_start_files(given, settings))
        child = ChildProcess([_python(settings), "-m", "sglang.launch_server", *arguments], to_environ(settings))
        stack.callback(child.signal, signal.SIGKILL)
        log.info("server_started", pid=child.pid, url=url, line=line.name)
        return supervise(child, signals, settings.serve, sidecar.drain.start if sidecar else None)


def _read_line(settings: Settings) -> SpeculatorLine:
    line = read_target_line(settings)
    if line.day_0_draft.shape.norm_before_residual:
        raise SettingsError(
            "speculator.day_0_folder: the draft has norm_before_residual, which SGLang ignores; choose the engine "
            "builtin or vllm (serve.engine)"
        )
    return line


def _write_start_files(given: Flags, settings: Settings) -> dict[str, Path]:
    """Write the files with which the server starts, readable to this user alone; return their paths by flag.

    Raises:
        SettingsError: one cannot be written.
    """
    folder, paths = Path(settings.sglang.draft_dir).absolute(), {}
    for flag, (name, content) in flags.start_files(given, settings).items():
        path = paths[flag] = folder / f"{settings.serve.node}-{name}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.touch(mode=0o600)
            path.write_text(content)
        except OSError as error:
            raise SettingsError(f"sglang.draft_dir {folder}: {name} cannot be written: {error}") from error
    return paths


def _attach(settings: Settings, signals: list[int]) -> int:
    """Run the sidecar of a server that another process has started, until a signal arrives."""
    line = _read_line(settings)
    with ExitStack() as stack:
        server = SglangServer(settings.sglang.url, settings.sglang.api_key, settings.sglang.timeout)
        registry = MlflowRegistry(settings.registry, line.name)
        engine = RemoteEngine(server, line.target, line.name, read_served_draft(server, line))
        sidecar = Sidecar(settings, server, engine, registry)
        stack.callback(sidecar.close)
        while not signals:
            time.sleep(POLL_S)
        sidecar.drain.start()
        return 0


def read_served_draft(server: SglangServer, line: SpeculatorLine) -> ServedDraft | None:
    """Return the draft of a running server, if it is still the one that the server started with.

    Raises:
        ServerError: the server is unreachable, or its draft is of another line: it must never get weights of this one.
    """
    info = server.info()
    if info.version not in compatibility.SIGNATURES:
        supported = ", ".join(compatibility.SIGNATURES)
        raise ServerError(f"{server.url}: SGLang {info.version} is not supported; supported: {supported}")
    folder = Path(info.draft or "")
    try:
        served_line = checkpoint.read_manifest(folder).line
        if served_line != line.name:
            message = f"drafts for line {served_line}; target.path and [speculator] give {line.name}"
            raise ServerError(f"{server.url}: {message}")
        served = ServedDraft(info.weight_version, checkpoint.read_checkpoint(folder, line.name))
    except CheckpointError as error:
        message = f"--speculative-draft-model-path is no version of Aurora: {error}"
        raise ServerError(f"{server.url}: {message}") from error
    try:
        return None if compare_checksums(server.checksums(), served.checksums).names else served
    except ValueError as error:
        raise ServerError(f"{server.url}: the weights cannot be compared: {error}") from error


def _python(settings: Settings) -> str:
    return settings.sglang.python or sys.executable


def _check_environment(settings: Settings) -> None:
    """Check that SGLang is installed in a supported version, with our plugin.

    Raises:
        SettingsError: something is missing; the message names the package to install.
    """
    name = f"sglang.python {_python(settings)}"
    try:
        query = subprocess.run(
            [_python(settings), "-c", _QUERY_ENVIRONMENT], capture_output=True, text=True, timeout=60, check=True
        )
        version, has_plugin = json.loads(query.stdout.strip().rsplit("\n", 1)[-1])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SettingsError(f"{name}: SGLang is not installed there: docs/guides/sglang.md") from error
    if version not in compatibility.SIGNATURES:
        supported = ", ".join(compatibility.SIGNATURES)
        raise SettingsError(f"{name}: SGLang {version} is not supported; supported: {supported}")
    if not has_plugin:
        raise SettingsError(f'{name}: our plugin is not installed there: pip install "aurora-stream[sglang]"')
