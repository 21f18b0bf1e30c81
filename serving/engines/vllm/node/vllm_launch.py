"""A node whose engine is vLLM's own server, started here as a child process or running already.

The server answers the API on its own address, with our extension in its workers. The sidecar in this process swaps its
versions and answers the operator's endpoints on ``serve.host:serve.port``. This process ends when the server does, with
the same exit code.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog
from pydantic import SecretStr

from schemas.settings import Settings, SettingsError, to_environ
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Verifier
from schemas.telemetry import logs
from serving.engines.node.child_process import POLL_S, ChildProcess, record_signals, supervise
from serving.engines.node.command_line import Flags
from serving.engines.node.sidecar import Sidecar, read_target_line, write_first_draft
from serving.engines.vllm.node import vllm_flags
from serving.engines.vllm.node.vllm_client import VllmClient
from serving.engines.vllm.node.vllm_engine import VllmEngine
from serving.engines.vllm.plugin import installation
from serving.versions.cache import MlflowRegistry

log = structlog.get_logger()

_QUERY_ENVIRONMENT = (
    "import importlib.metadata as m, importlib.util as u, json;"
    "print(json.dumps([m.version('vllm'), bool(u.find_spec('serving')) and bool(u.find_spec('confluent_kafka'))]))"
)


def run(settings: Settings, arguments: Sequence[str]) -> int:
    """Serve until the server ends, or on SIGTERM or SIGINT; return the exit code.

    Args:
        settings: Settings of the node.
        arguments: Flags of vLLM.

    Raises:
        SettingsError: settings or flags are invalid.
    """
    logs.configure("serve")
    # httpx logs every request, and the server is read every second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    given = Flags(tuple(arguments))
    vllm_flags.check_flags(given, settings)
    with record_signals() as signals:
        if settings.vllm.url:
            if arguments:
                raise SettingsError("vllm.url names a running server: flags have no effect on it; omit them")
            return _attach(settings, signals)
        _check_environment(settings)
        return _start(settings, given, signals)


def _attach(settings: Settings, signals: list[int]) -> int:
    """Run the sidecar of a server that another process has started, until a signal arrives.

    Raises:
        SettingsError: ``vllm.api_key`` is missing, or the draft cannot be written.
    """
    if not settings.vllm.api_key.get_secret_value():
        raise SettingsError("vllm.api_key: the server at vllm.url was started with one; set the same")
    line = read_target_line(settings)
    registry = MlflowRegistry(settings.registry, line.name)
    folder = Path(settings.vllm.draft_dir).absolute()
    draft, _ = write_first_draft(settings, line, registry, settings.vllm.draft_dir)
    with ExitStack() as stack:
        server = VllmClient(settings.vllm.url, settings.vllm.api_key, settings.vllm.timeout)
        incoming, depth = folder / f"{settings.serve.node}-incoming", settings.serve.num_speculative_tokens
        timeout = settings.vllm.timeout
        engine = VllmEngine(server, line.target, line.name, draft, depth, incoming, timeout, is_own=False)
        sidecar = Sidecar(settings, server, engine, registry)
        stack.callback(sidecar.close)
        while not signals:
            time.sleep(POLL_S)
        sidecar.drain.start()
        return 0


def _start(settings: Settings, given: Flags, signals: list[int]) -> int:
    """Start a server, and wait until it ends."""
    serve, line = settings.serve, read_target_line(settings)
    registry = MlflowRegistry(settings.registry, line.name)
    folder = Path(settings.vllm.draft_dir).absolute()
    draft = loaded = None
    if serve.speculate:
        draft, weights = write_first_draft(settings, line, registry, settings.vllm.draft_dir)
        loaded = folder / f"{serve.node}-loaded"
        write_draft_folder(weights, loaded, "vllm", Verifier(settings.target.path, (), serve.num_speculative_tokens))
    key = settings.vllm.api_key.get_secret_value() or secrets.token_urlsafe(32)
    url = given.url(vllm_flags.DEFAULT_PORT)
    with ExitStack() as stack:
        server = VllmClient(url, SecretStr(key), settings.vllm.timeout)
        incoming = folder / f"{serve.node}-incoming"
        depth = serve.num_speculative_tokens if draft else 0
        engine = VllmEngine(server, line.target, line.name, draft, depth, incoming, settings.vllm.timeout)
        sidecar = Sidecar(settings, server, engine, registry)
        stack.callback(sidecar.close)
        arguments = vllm_flags.build_vllm_arguments(given, settings, loaded)
        command = [_python(settings), "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
        secret = settings.model_copy(update={"vllm": settings.vllm.model_copy(update={"api_key": SecretStr(key)})})
        metrics = _empty(folder / f"{serve.node}-metrics")
        child = ChildProcess(command, to_environ(secret) | _environ(metrics, speculates=draft is not None))
        stack.callback(child.signal, signal.SIGKILL)
        log.info("server_started", pid=child.pid, url=url, line=line.name)
        return supervise(child, signals, serve, sidecar.drain.start)


def _environ(metrics: Path, *, speculates: bool) -> dict[str, str]:
    # Its processes write metrics to files of this folder, and one of them exports those of all, our plugin's included.
    found = {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    if speculates:
        # The endpoint that calls the workers is one of the development endpoints; the plugin's middleware closes them.
        found |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    return found


def _empty(folder: Path) -> Path:
    """Create a folder without files of an earlier start.

    Raises:
        SettingsError: it cannot be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"vllm.draft_dir: {folder} cannot be created: {error}") from error
    return folder


def _python(settings: Settings) -> str:
    return settings.vllm.python or sys.executable


def _check_environment(settings: Settings) -> None:
    """Check that vLLM is installed in a supported version, with our plugin.

    Raises:
        SettingsError: something is missing; the message names the package to install.
    """
    name = f"vllm.python {_python(settings)}"
    try:
        query = subprocess.run(
            [_python(settings), "-c", _QUERY_ENVIRONMENT], capture_output=True, text=True, timeout=60, check=True
        )
        version, has_plugin = json.loads(query.stdout.strip().rsplit("\n", 1)[-1])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SettingsError(f"{name}: vLLM is not installed there: docs/guides/vllm.md") from error
    if version.partition("+")[0] not in installation.VERSIONS:
        supported = ", ".join(installation.VERSIONS)
        raise SettingsError(f"{name}: vLLM {version} is not supported; supported: {supported}")
    if not has_plugin:
        raise SettingsError(f'{name}: our plugin is not installed there: pip install "aurora-stream[vllm]"')
