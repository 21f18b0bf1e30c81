"""A server as a child process: signals are forwarded to it, and this process ends when it does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import structlog

from schemas.settings import Serve

log = structlog.get_logger()

POLL_S = 0.2
_CHILD_POLL_S = 0.05
_GRACE_S = 10.0
"""Added to ``serve.drain_timeout``: SGLang checks every five seconds whether all requests have ended."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def record_signals() -> Iterator[list[int]]:
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


def supervise(child: ChildProcess, signals: list[int], serve: Serve, start_drain: Callable[[], None] | None) -> int:
    """Wait until the server ends, or end it on a signal; return its exit code, 0 if a forwarded signal ended it.

    Args:
        child: The server.
        signals: From ``record_signals``.
        serve: Settings of the drain.
        start_drain: Makes ``/ready`` answer 503; None where load balancers do not ask.
    """
    while child.code is None and not signals:
        time.sleep(POLL_S)
    if start_drain:
        start_drain()
        _wait_delay(child, signals, serve.drain_delay)
    return _stop(child, signals, serve.drain_timeout)


def _wait_delay(child: ChildProcess, signals: list[int], drain_delay: float) -> None:
    """Let the server accept requests until load balancers have seen ``/ready``; a second signal ends the wait."""
    deadline = time.monotonic() + drain_delay
    while child.code is None and len(signals) == 1 and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _stop(child: ChildProcess, signals: list[int], drain_timeout: float) -> int:
    """Forward every signal until the server has ended; return its exit code, 0 if a forwarded signal ended it."""
    forwarded, deadline = 0, time.monotonic() + drain_timeout + _GRACE_S
    while child.code is None:
        for number in signals[forwarded:]:
            log.info("server_signaled", signal=signal.Signals(number).name)
            child.signal(number)
            forwarded += 1
        if time.monotonic() > deadline:
            log.warning("server_killed", why="it did not end within serve.drain_timeout")
            child.signal(signal.SIGKILL)
        child.wait(POLL_S)
    code = child.code
    log.info("server_ended", code=code)
    return 0 if code in {128 + number for number in signals[:forwarded]} else code
