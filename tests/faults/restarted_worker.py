"""A stream worker process that is restarted whenever it ends, as by a supervisor."""

from __future__ import annotations

import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from types import MappingProxyType

from stream_worker import wait_until, worker

from schemas.settings import Settings
from schemas.status import StreamStatus

POLL_S = 0.2
TIMEOUT_S = 120.0
"""Timeout for every wait for a worker, on the slowest machine."""
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})
COUNTED = ("records_deferred", "seeks", "commits_fenced", "records_skipped")


class RestartedWorker:
    """Runs one process after the other, from its creation until ``end``.

    ``counts`` sums the counters of all processes. They are polled every 0.2 s, so counts of the last moments before a
    kill are missing.
    """

    def __init__(
        self, settings: Settings, log: Path, variables: Mapping[str, str] = NO_VARIABLES, before: str = ""
    ) -> None:
        self.log = log
        self.counts: Counter[str] = Counter()
        self.status: StreamStatus | None = None
        """Last status of the running process."""
        self._settings, self._variables, self._before = settings, variables, before
        self._process: subprocess.Popen[bytes] | None = None
        self._signalled = self._ended = False
        self._thread = threading.Thread(target=self._run, name="worker")
        self._thread.start()

    def await_status(self, condition: Callable[[StreamStatus], bool]) -> None:
        """Block until ``condition`` is true for the status of the worker."""

        def is_true() -> bool:
            status = self.status
            return status is not None and condition(status)

        assert wait_until(is_true, TIMEOUT_S), f"{self.status}\n{self.log.read_text()[-5_000:]}"

    def await_commit(self) -> None:
        """Block until the running process has committed a batch."""
        self.await_status(lambda status: status.commits > 0)

    def await_progress(self) -> None:
        """Block until another batch is committed, by the running process or a later one."""
        start, before = self.counts["starts"], self.status.commits if self.status else 0
        self.await_status(lambda status: status.commits > (before if self.counts["starts"] == start else 0))

    def signal(self, number: Signals) -> bool:
        """Send a signal to the running process, if there is one. A process that it ends is restarted."""
        process = self._process
        if process is None or process.poll() is not None:
            return False
        self._signalled |= number in (SIGKILL, SIGTERM)
        process.send_signal(number)
        if number == SIGKILL:
            process.wait()
            self.status = None
        return True

    def end(self, number: Signals) -> None:
        """End the worker without a restart. Has no effect if it has ended."""
        self._ended = True
        self.signal(number)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), f"still running after {number.name}\n{self.log.read_text()[-5_000:]}"

    def _run(self) -> None:
        while not self._ended:
            self.status, self._signalled = None, False
            self.counts["starts"] += 1
            last: StreamStatus | None = None
            with worker(self._settings, self.log, self._variables, before=self._before) as self._process:
                while self._process.poll() is None:
                    last = self.status = self._read_status() or last
                    time.sleep(POLL_S)
            self.counts["unexpected exits"] += not self._signalled
            for name in COUNTED:
                self.counts[name] += getattr(last, name) if last else 0

    def _read_status(self) -> StreamStatus | None:
        address = f"http://127.0.0.1:{self._settings.stream.port}/status"
        with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            return StreamStatus.model_validate_json(answer.read())
        return None
