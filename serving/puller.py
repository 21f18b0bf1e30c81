"""Brings the speculator version that an alias names into the engine, on a thread of its own.

The alias is the truth: whatever version it names is wanted, newer or older than the one that is served. A version is
downloaded, checked against the checkpoint contract, smoke-drafted and swapped in between two rounds; whatever goes
wrong, the draft that is there goes on. A version that is itself at fault is refused for good. A registry that cannot be
reached is asked again, less and less often.

An operator can pin a version: it goes the same way, and then stays whatever the alias names, until it is unpinned.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

import structlog
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily

from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from serving.engine import Engine, Swapped

log = structlog.get_logger()

LONGEST_WAIT_S = 60.0
_SWAPS_KEPT = 1000


class RegistryError(RuntimeError):
    """The registry cannot be reached, or does not give what it should; another try may go well."""


class UnknownVersionError(RegistryError):
    """The line has no such version."""


class RefusedError(RuntimeError):
    """The version is at fault, and this node will not serve it."""


class Registry(Protocol):
    """Where versions come from."""

    def named(self, alias: str) -> str | None:
        """The version that an alias names; None where there is no such model or alias.

        Raises:
            RegistryError: no answer.
        """

    def has(self, version: str) -> bool:
        """Whether the line has this version.

        Raises:
            RegistryError: no answer.
        """

    def download(self, version: str, folder: Path) -> Path:
        """The version's files, in a folder below the given one.

        Raises:
            RegistryError: not everything could be fetched.
        """


@dataclass(frozen=True, slots=True)
class Swap:
    """A version that began to serve."""

    version: str
    time: float
    in_flight: int
    pause_ms: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """A version that is not served, and why."""

    version: str
    time: float
    why: str


@dataclass(frozen=True, slots=True)
class _Order:
    """What an operator wants: a version to pin, or None to follow the alias again."""

    version: str | None
    done: Future[None]


def wanted(named: str | None, pinned: str | None, served: str | None, refused: Container[str]) -> str | None:
    """The version to fetch now, if any: the pinned one, else what the alias names. With neither, the draft stays."""
    version = named if pinned is None else pinned
    return version if version is not None and version != served and version not in refused else None


def wait_after(failures: int, poll_s: float) -> float:
    """Seconds until the registry is asked again, after so many failures in a row."""
    return max(poll_s, min(poll_s * 2.0 ** min(failures, 16), LONGEST_WAIT_S))


class Puller:
    """Polls the alias and keeps the engine on the version that it names."""

    def __init__(self, registry: Registry, engine: Engine, alias: str, poll_s: float) -> None:
        self._registry = registry
        self._engine = engine
        self._alias = alias
        self._poll_s = poll_s
        self._served: str | None = None
        self._named: str | None = None
        self._pinned: str | None = None
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._failures = 0
        self._failed = 0
        self._error: str | None = None
        self._swaps: deque[Swap] = deque(maxlen=_SWAPS_KEPT)
        self._swapped = 0
        self._refused: dict[str, Refusal] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="puller", daemon=True)

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def stop(self) -> None:
        """End the polling; a download that hangs is left to die with the process."""
        self._stopping = True
        self._orders.put(None)
        self._thread.join(timeout=1.0)

    def pin(self, version: str) -> Future[None]:
        """Serve this version until ``unpin``, whatever the alias names. Done when it serves, on the puller's thread.

        The future's errors: ``UnknownVersionError``, ``RefusedError``, ``RegistryError``, or that of an engine which
        has stopped. After an error all is as it was.
        """
        return self._order(version)

    def unpin(self) -> Future[None]:
        """Follow the alias again. Done after a first look at it."""
        return self._order(None)

    @property
    def alias(self) -> str:
        """The alias that is followed."""
        return self._alias

    @property
    def named(self) -> str | None:
        """The version that the alias named when the registry was asked last."""
        return self._named

    @property
    def pinned(self) -> str | None:
        """The version that stays whatever the alias names, if any."""
        return self._pinned

    @property
    def swaps(self) -> tuple[Swap, ...]:
        """The newest swaps, oldest first; the last one says what is served since when."""
        return tuple(self._swaps.copy())

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Versions that this node will not serve."""
        return tuple(self._refused.copy().values())

    @property
    def error(self) -> str | None:
        """Why the last poll failed, if it did."""
        return self._error

    def poll(self) -> None:
        """Ask once, and follow the alias if it names something new and nothing is pinned."""
        try:
            self._named = self._registry.named(self._alias)
            version = wanted(self._named, self._pinned, self._served, self._refused)
            if version is not None:
                self._bring(version)
        except Exception as error:
            # A full disk, a stopped engine, a client library at fault: none may end the polling, all are tried again.
            if self._error is None:
                log.warning("pull_failed", error=str(error), exc_info=not isinstance(error, RegistryError))
            self._failures += 1
            self._failed += 1
            self._error = str(error) or type(error).__name__
        else:
            if self._error is not None:
                log.info("pull_recovered")
            self._failures, self._error = 0, None

    def collect(self) -> Iterator[Metric]:
        """Metrics, read at scrape time."""
        yield CounterMetricFamily("aurora_serve_swaps", "Speculator versions swapped in.", value=self._swapped)
        yield CounterMetricFamily("aurora_serve_refused", "Speculator versions refused.", value=len(self._refused))
        yield CounterMetricFamily("aurora_serve_registry_failures", "Polls that failed.", value=self._failed)

    def _bring(self, version: str) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="aurora-version-") as folder:
                draft = checkpoint.read(self._registry.download(version, Path(folder)), self._engine.line)
            self._engine.check(draft)
        except CheckpointError as error:
            log.warning("version_refused", version=version, why=str(error))
            self._refused[version] = Refusal(version, time.time(), str(error))
            return
        self._swapped_in(self._engine.swap(draft, version))

    def _swapped_in(self, swapped: Swapped) -> None:
        log.info("swapped", version=swapped.version, in_flight=swapped.in_flight, pause_ms=swapped.pause_ms)
        self._served = swapped.version
        self._swapped += 1
        self._swaps.append(Swap(swapped.version, time.time(), swapped.in_flight, swapped.pause_ms))

    def _order(self, version: str | None) -> Future[None]:
        order = _Order(version, Future())
        self._orders.put(order)
        return order.done

    def _obey(self, order: _Order) -> None:
        try:
            if order.version is not None:
                self._pin(order.version)
            else:
                self._pinned = None
                log.info("unpinned")
                self.poll()
        except Exception as error:
            # Whatever went wrong, as in `poll`: it is the operator's to know, and the polling goes on.
            known = isinstance(error, RegistryError | RefusedError)
            log.warning("pin_failed", version=order.version, error=str(error), exc_info=not known)
            order.done.set_exception(error)
        else:
            order.done.set_result(None)

    def _pin(self, version: str) -> None:
        if version != self._served:
            if version not in self._refused:
                if not self._registry.has(version):
                    raise UnknownVersionError(f"line {self._engine.line} has no version {version!r}")
                self._bring(version)
            if version in self._refused:
                raise RefusedError(f"version {version} is refused: {self._refused[version].why}")
        self._pinned = version
        log.info("pinned", version=version)

    def _run(self) -> None:
        while not self._stopping:
            self.poll()
            try:
                order = self._orders.get(timeout=wait_after(self._failures, self._poll_s))
            except Empty:
                continue
            if order is not None:
                self._obey(order)
