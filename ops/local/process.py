"""Child process in its own process group, with a log file, that ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import UserError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
"""Several processes share the cores: each uses one thread, and an idle one does not spin."""


class StartError(UserError):
    """A process failed to start; the message names its log."""


@dataclass
class Process:
    """One command; ``stop`` ends it with all of its children.

    On Linux the kernel sends SIGTERM to the command when the thread that started it ends, so start it from a thread
    that lives as long as the program.
    """

    name: str
    command: Sequence[str]
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables added to those of the current process."""
    nice: int = 0
    _child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command; append its output to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()

        def before_exec() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the mask survives exec and would block SIGTERM
            if _LIBC is not None:
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:  # it ended before the signal was requested
                    os._exit(1)
            if self.nice:
                os.nice(self.nice)

        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD, **self.environ},
                start_new_session=True,
                preexec_fn=before_exec,  # noqa: PLW1509  # prctl and nice allocate nothing and take no lock
            )

    @property
    def pid(self) -> int | None:
        """Process id and group id; None before the start."""
        return self._child.pid if self._child else None

    @property
    def alive(self) -> bool:
        """True while the command runs."""
        return self._child is not None and self._poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs or before the start."""
        return self._poll() if self._child else None

    def stop(self, grace_s: float = 15) -> None:
        """Send SIGTERM to the group, wait, then kill the rest; do nothing before the start."""
        if self._child is None or not self.alive:
            return
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.alive:
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(0.02)

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Block until ``ready`` returns true.

        Raises:
            StartError: the command ended or was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.alive:
                raise StartError(f"{self.name} ended with code {self.exit_code} while starting; read {self.log}")
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} was not ready after {timeout_s:.0f} s; read {self.log}")
            time.sleep(0.1)

    def _poll(self) -> int | None:
        """Return the exit code; kill the rest of the group when the exit is first seen.

        The kill must be immediate: the id of an empty group may be assigned to another program.
        """
        assert self._child is not None
        known = self._child.returncode
        code = self._child.poll()
        if known is None and code is not None:
            self._signal(signal.SIGKILL)
        return code

    def _signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)
