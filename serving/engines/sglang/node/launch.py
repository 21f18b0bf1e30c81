"""A node whose engine is SGLang's own server, started here as a child process or running already.

The server answers the API on its own address, with our plugin in its process. The sidecar in this process swaps its
versions and answers the operator's endpoints on ``serve.host:serve.port``. This process ends when the server does, with
the same exit code.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

import structlog

from schemas.settings import Settings, SettingsError, to_environ
from schemas.telemetry import logs
from serving.engines.sglang.node import flags
from serving.engines.sglang.node.client import SglangServer
from serving.engines.sglang.node.flags import Flags
from serving.engines.sglang.node.remote_engine import RemoteEngine
from serving.engines.sglang.node.sidecar import Sidecar, read_served_draft, read_target_line, write_first_draft
from serving.engines.sglang.plugin import compatibility
from serving.versions.cache import MlflowRegistry

log = structlog.get_logger()

_POLL_S = 0.2
_CHILD_POLL_S = 0.05
_GRACE_S = 10.0
"""Added to ``serve.drain_timeout``: SGLang checks every five seconds whether all requests have ended."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
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
        SglangError: the server at ``sglang.url`` is not supported.
    """
    logs.configure("serve")
    # httpx logs every request, and the server is read every second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    given = Flags(tuple(arguments))
    flags.check(given, settings)
    with _record_signals() as signals:
        if settings.sglang.url:
            if arguments:
                raise SettingsError("sglang.url names a running server: flags have no effect on it; omit them")
            return _attach(settings, signals)
        _check_environment(settings)
        return _supervise(settings, given, signals)


@contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Record SIGTERM and SIGINT in their order. The list is polled: a signal handler must not take a lock."""
    received: list[int] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(settings: Settings, given: Flags, signals: list[int]) -> int:
    """Start a server, and wait until it ends."""
    line = read_target_line(settings)
    registry = MlflowRegistry(settings.registry, line.name)
    draft, served = write_first_draft(settings, line, registry) if settings.serve.speculate else (None, None)
    with ExitStack() as stack:
        sidecar: Sidecar | None = None
        # The other machines of a server answer no requests, and get their weights from the first.
        if given.node_rank == 0:
            server = SglangServer(given.url, given.key(settings), settings.sglang.timeout)
            engine = RemoteEngine(server, line.target, line.name, served, shares_memory=given.is_single_machine)
            sidecar = Sidecar(settings, server, engine, registry)
            stack.callback(sidecar.close)
        arguments = flags.build_arguments(given, settings, draft)
        child = ChildProcess([_python(settings), "-m", "sglang.launch_server", *arguments], to_environ(settings))
        stack.callback(child.signal, signal.SIGKILL)
        log.info("sglang_started", pid=child.pid, url=given.url, line=line.name)
        while child.code is None and not signals:
            time.sleep(_POLL_S)
        if sidecar:
            sidecar.drain.start()
            _wait_delay(child, signals, settings.serve.drain_delay)
        return _stop(child, signals, settings.serve.drain_timeout)


def _wait_delay(child: ChildProcess, signals: list[int], drain_delay: float) -> None:
    """Let the server accept requests until load balancers have seen ``/ready``; a second signal ends the wait."""
    deadline = time.monotonic() + drain_delay
    while child.code is None and len(signals) == 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _stop(child: ChildProcess, signals: list[int], drain_timeout: float) -> int:
    """Forward every signal until the server has ended; return its exit code, 0 if a forwarded signal ended it."""
    forwarded, deadline = 0, time.monotonic() + drain_timeout + _GRACE_S
    while child.code is None:
        for number in signals[forwarded:]:
            log.info("sglang_signaled", signal=signal.Signals(number).name)
            child.signal(number)
            forwarded += 1
        if time.monotonic() > deadline:
            log.warning("sglang_killed", why="it did not end within serve.drain_timeout")
            child.signal(signal.SIGKILL)
        child.wait(_POLL_S)
    code = child.code
    log.info("sglang_ended", code=code)
    return 0 if code in {128 + number for number in signals[:forwarded]} else code


def _attach(settings: Settings, signals: list[int]) -> int:
    """Run the sidecar of a server that another process has started, until a signal arrives."""
    line = read_target_line(settings)
    with ExitStack() as stack:
        server = SglangServer(settings.sglang.url, settings.sglang.api_key, settings.sglang.timeout)
        registry = MlflowRegistry(settings.registry, line.name)
        engine = RemoteEngine(server, line.target, line.name, read_served_draft(server, line))
        sidecar = Sidecar(settings, server, engine, registry)
        stack.callback(sidecar.close)
        while not signals:
            time.sleep(_POLL_S)
        sidecar.drain.start()
        return 0


class ChildProcess:
    """A command in a process group of its own, so that Ctrl-C in a terminal reaches it once, through ``signal``.

    It inherits this process's output. On Linux the kernel ends it when the thread that started it dies.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        parent = os.getpid()

        def before_exec() -> None:
            if _LIBC is not None:
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:  # the parent died before prctl took effect
                    os._exit(1)

        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environ},
            start_new_session=True,
            preexec_fn=before_exec,  # noqa: PLW1509  # prctl allocates nothing and takes no lock
        )
        self._has_ended = False

    @property
    def pid(self) -> int:
        """Process id, also the id of its group."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code as in a shell, 128 plus the number of a signal; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if not self._has_ended:
            # Its own child processes must not outlive it.
            self.signal(signal.SIGKILL)
            self._has_ended = True
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Send SIGKILL to the whole group, or another signal to the process, which handles its own children."""
        if self._has_ended:  # its id may belong to another process by now
            return
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code; None if the process still runs after the timeout."""
        deadline = time.monotonic() + timeout_s
        while (code := self.code) is None and time.monotonic() < deadline:
            time.sleep(_CHILD_POLL_S)
        return code


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
    if version not in compatibility.VERSIONS:
        supported = ", ".join(compatibility.VERSIONS)
        raise SettingsError(f"{name}: SGLang {version} is not supported; supported: {supported}")
    if not has_plugin:
        raise SettingsError(f'{name}: our plugin is not installed there: pip install "aurora-stream[sglang]"')
