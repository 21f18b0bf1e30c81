"""SGLang's server as a child: its output is the node's, and it does not outlive it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_POLL_S = 0.05


class Child:
    """One command in a group of its own, so that Ctrl-C in a terminal reaches it once, through ``signal``.

    On Linux the kernel ends it when the thread dies that started it.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        parent = os.getpid()

        def before_exec() -> None:
            if _LIBC is not None:
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:  # it died before the signal was asked for
                    os._exit(1)

        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environ},
            start_new_session=True,
            preexec_fn=before_exec,  # noqa: PLW1509  # prctl allocates nothing and takes no lock
        )
        self._ended = False

    @property
    def pid(self) -> int:
        """Process id, also the id of its group."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code as a shell tells it, 128 and more for a signal; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if not self._ended:
            # What it started must not live on without it.
            self.signal(signal.SIGKILL)
            self._ended = True
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Send a signal: SIGKILL to all that it started, others to itself alone, which knows what to do about them."""
        if self._ended:  # its number may be another program's by now
            return
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None where it still runs after so long a time."""
        deadline = time.monotonic() + timeout_s
        while (code := self.code) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return code
