"""A stream worker that is started again whenever it ends, as its supervisor would."""

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
PATIENCE_S = 120.0
"""For anything that a worker is waited for, on the slowest machine."""
NOTHING: Mapping[str, str] = MappingProxyType({})
COUNTED = ("records_deferred", "seeks", "commits_fenced", "records_skipped")


class Worker:
    """One life after the other, from its creation until ``end``.

    ``counts`` sums what the lives said of themselves. They are asked every 0.2 s: what a killed one counted in the
    moment before its death is missing.
    """

    def __init__(self, settings: Settings, log: Path, variables: Mapping[str, str] = NOTHING) -> None:
        self.log = log
        self.counts: Counter[str] = Counter()
        self.status: StreamStatus | None = None
        """What the process that runs said last."""
        self._settings, self._variables = settings, variables
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = self._over = False
        self._thread = threading.Thread(target=self._live, name="worker")
        self._thread.start()

    def await_status(self, what: Callable[[StreamStatus], bool]) -> None:
        """Block until the worker says so of itself."""

        def said() -> bool:
            status = self.status
            return status is not None and what(status)

        assert wait_until(said, PATIENCE_S), f"{self.status}\n{self.log.read_text()[-5_000:]}"

    def await_commit(self) -> None:
        """Block until the process that runs has written something."""
        self.await_status(lambda status: status.commits > 0)

    def await_progress(self) -> None:
        """Block until something more was written, by the process that runs or by one after it."""
        life, before = self.counts["lives"], self.status.commits if self.status else 0
        self.await_status(lambda status: status.commits > (before if self.counts["lives"] == life else 0))

    def signal(self, number: Signals) -> bool:
        """Signal the process that runs, if one does; when it ends by that, another is started."""
        process = self._process
        if process is None or process.poll() is not None:
            return False
        self._asked |= number in (SIGKILL, SIGTERM)
        process.send_signal(number)
        if number == SIGKILL:
            process.wait()
            self.status = None
        return True

    def end(self, number: Signals) -> None:
        """End it for good; nothing happens when it was ended before."""
        self._over = True
        self.signal(number)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"no end after {number.name}\n{self.log.read_text()[-5_000:]}"

    def _live(self) -> None:
        while not self._over:
            self.status, self._asked = None, False
            self.counts["lives"] += 1
            last: StreamStatus | None = None
            with worker(self._settings, self.log, self._variables) as self._process:
                while self._process.poll() is None:
                    last = self.status = self._ask() or last
                    time.sleep(POLL_S)
            self.counts["ended by themselves"] += not self._asked
            for name in COUNTED:
                self.counts[name] += getattr(last, name) if last else 0

    def _ask(self) -> StreamStatus | None:
        address = f"http://127.0.0.1:{self._settings.stream.port}/status"
        with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            return StreamStatus.model_validate_json(answer.read())
        return None
