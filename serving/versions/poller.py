"""Keeps the engine on the version that a node is to serve, on threads of its own.

What is to be served follows from what the registry says (``serving.versions.alias_policy``): the version of the
alias, or by turns
that of ``canary``. A version is downloaded, checked against the checkpoint contract, smoke-drafted and swapped in
between two verify steps (``serving.versions.cache``); whatever goes wrong, the draft that is there goes on. A
version that
is itself
at fault is refused for good. A registry that cannot be reached is asked again, less and less often.

While a canary is served by turns, both versions are at hand, and a thread that never waits for the registry swaps them
where one slice of time ends and the next begins.

An operator can pin a version: it goes the same way, and then stays whatever the aliases name, until it is unpinned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.errors import UserError
from schemas.settings import Settings
from serving.engines.base import HotSwapEngine
from serving.versions.active import PINNED, Seat, Swap
from serving.versions.alias_policy import CANARY, CHAMPION, Following, Named, hear, held, serves_canary, slice_at
from serving.versions.cache import Refusal, RefusedError, Registry, RegistryError, Shelf, UnknownVersionError
from serving.versions.update_policy import Reading, SyncPolicy

log = structlog.get_logger()

LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Order:
    """What an operator wants: a version to pin, or None to follow the alias again."""

    version: str | None
    done: Future[None]


def wait_after(failures: int, poll_s: float) -> float:
    """Seconds until the registry is asked again, after so many failures in a row."""
    return max(poll_s, min(poll_s * 2.0 ** min(failures, 16), LONGEST_WAIT_S))


class Puller:
    """Polls the registry and keeps the engine on the version whose turn it is."""

    def __init__(
        self,
        registry: Registry,
        engine: HotSwapEngine,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._serve, self._canary = settings.serve, settings.canary
        self._trials = self._canary.share > 0 and self.alias == CHAMPION
        self._clock, self._ticks = clock, ticks
        self._policy = SyncPolicy(settings.update, self._serve.node)
        self._shelf, self._seat = Shelf(registry, engine), Seat(engine)

        self._following = Following()
        self._main: str | None = None
        self._behind_since: float | None = None
        self._pinned: str | None = None

        self._named: str | None = None
        self._held: str | None = None
        self._unreadable: str | None = None
        self._old = False
        self._error: str | None = None
        self._failures = 0
        self._failed = self._stale = self._malformed = 0

        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._stopping, self._woken = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._run, name="puller", daemon=True)]
        if self._trials:
            self._threads.append(threading.Thread(target=self._take_turns, name="slices", daemon=True))

    def start(self) -> None:
        """Begin to poll."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the polling; a download that hangs is left to die with the process."""
        self._stopping.set()
        self._orders.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)

    def pin(self, version: str) -> Future[None]:
        """Serve this version until ``unpin``, whatever the alias names. Done when it serves, on the puller's thread.

        The future's errors: ``UnknownVersionError``, ``RefusedError``, ``RegistryError``, or that of an engine which
        has stopped. After an error all is as it was.
        """
        return self._order(version)

    def unpin(self) -> Future[None]:
        """Follow the alias again. Done after a first look at it."""
        return self._order(None)

    def wake(self) -> None:
        """Ask the registry now; called from any thread. Of several calls before that, one counts."""
        if not self._woken.is_set():
            self._woken.set()
            self._orders.put(None)

    @property
    def alias(self) -> str:
        """The alias that is followed."""
        return self._serve.alias

    @property
    def named(self) -> str | None:
        """The version that the alias named in the registry's last answer that was not old."""
        return self._named

    @property
    def canary(self) -> str | None:
        """The version that is served by turns with the alias's, if any."""
        return self._following.canary.version if self._on_trial() else None

    @property
    def role(self) -> str | None:
        """By what the version that serves came to it: the alias, ``canary`` or ``pinned``; None with day 0's draft."""
        return self._seat.role

    @property
    def pinned(self) -> str | None:
        """The version that stays whatever the alias names, if any."""
        return self._pinned

    @property
    def waiting(self) -> str | None:
        """A newer version that is taken over later (``sync``)."""
        version = self._following.main.version
        waits = self._behind_since is not None and version is not None and not self._shelf.refuses(version)
        return version if waits and self._pinned is None else None

    @property
    def interval_s(self) -> float:
        """The least time between two takeovers of the moment."""
        return self._policy.interval_s

    @property
    def swaps(self) -> tuple[Swap, ...]:
        """The newest swaps, oldest first; the last one says what is served since when."""
        return self._seat.swaps

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Versions that this node will not serve."""
        return self._shelf.refused

    @property
    def held(self) -> str | None:
        """Why a version that the registry names is not followed, or the record of moves is not used; None mostly."""
        return self._held or self._unreadable

    @property
    def stale(self) -> int:
        """Old answers of the registry, which were passed over."""
        return self._stale

    @property
    def error(self) -> str | None:
        """Why the last poll failed, if it did."""
        return self._error

    def poll(self) -> None:
        """Ask once, and follow what the registry says if nothing is pinned."""
        try:
            self._hear(self._registry.named())
            if self._pinned is None:
                self._follow()
        except Exception as error:
            # A full disk, a stopped engine, a client library at fault: none may end the polling, all are tried again.
            if self._error is None:
                known = isinstance(error, RegistryError | UserError)
                log.warning("pull_failed", error=str(error), exc_info=not known)
            self._failures += 1
            self._failed += 1
            self._error = str(error) or type(error).__name__
        else:
            if self._error is not None:
                log.info("pull_recovered")
            self._failures, self._error = 0, None

    def collect(self) -> Iterator[Metric]:
        """Metrics, read at scrape time."""
        yield CounterMetricFamily("aurora_serve_swaps", "Speculator versions swapped in.", value=self._seat.swapped)
        yield CounterMetricFamily("aurora_serve_refused", "Speculator versions refused.", value=len(self.refused))
        yield CounterMetricFamily("aurora_serve_registry_failures", "Polls that failed.", value=self._failed)
        yield CounterMetricFamily("aurora_serve_registry_stale", "Old answers passed over.", value=self._stale)
        yield CounterMetricFamily(
            "aurora_serve_registry_malformed", "Answers whose audit could not be read.", value=self._malformed
        )
        yield GaugeMetricFamily(
            "aurora_serve_sync_interval_seconds", "Least time between two takeovers.", value=self.interval_s
        )
        serving = int(self.role == CANARY)
        yield GaugeMetricFamily("aurora_serve_canary", "1 while the canary's version serves.", value=serving)

    def _hear(self, named: Named) -> None:
        if named.unreadable is not None:
            self._malformed += 1
            if named.unreadable != self._unreadable:
                log.warning("audit_unreadable", why=named.unreadable)
        self._unreadable = named.unreadable
        heard = hear(self._following, named, self.alias, canary=self._trials)
        if heard is None:
            self._stale += 1
            if not self._old:
                moves = named.audited.moves if named.audited else 0
                log.warning("registry_answered_old", moves=moves, moves_seen=self._following.moves)
            self._old = True
            return
        self._old = False
        self._named = named.aliases.get(self.alias)
        self._held = held(heard.main, named, self.alias)
        with self._seat.turning:
            self._following = heard

    def _follow(self) -> None:
        with self._seat.turning:
            self._policy.read(self._reading())
        main = self._following.main.version
        try:
            if main is not None and main != self._main:
                self._consider(main)
            else:
                self._behind_since = None
            if self._main is not None and self._main != self._seat.version and not self._on_trial():
                self._brought(self._main)
        finally:
            # Whatever the registry does not give now, a canary that is over ends.
            self._settle()
        if self._on_trial():
            self._prepare()
            self._settle()
        with self._seat.turning:
            self._shelf.keep((self._main, self._following.canary.version) if self._on_trial() else ())

    def _consider(self, version: str) -> None:
        """Take another version over; a newer one when it is due."""
        newer = self._main is not None and int(version) > int(self._main)
        if newer and not self._due(version):
            return
        begun = self._reading()
        if self._brought(version):
            brought = self._reading()
            with self._seat.turning:
                self._main = version
                self._settle()
                if newer:
                    self._policy.taken(begun, brought, self._seat.swaps[-1].pause_ms / 1e3)
        self._behind_since = None

    def _due(self, version: str) -> bool:
        """A version at hand was the canary here: it costs nothing more, and waiting would be a step back from it."""
        if self._shelf.has(version):
            return True
        if self._behind_since is None:
            self._behind_since = self._ticks()
        return self._ticks() >= self._policy.due_at(version, self._behind_since)

    def _reading(self) -> Reading:
        health = self._engine.health()
        return Reading(self._ticks(), health.verify_steps, health.accepted_tokens, health.output_tokens)

    def _prepare(self) -> None:
        """See that both versions of a trial are at hand."""
        for version in (self._main, self._following.canary.version):
            if version is not None:
                self._brought(version)

    def _brought(self, version: str) -> bool:
        try:
            self._shelf.bring(version)
        except RefusedError:
            return False
        return True

    def _on_trial(self) -> bool:
        canary = self._following.canary.version
        return self._main is not None and canary not in (None, self._main) and not self._shelf.refuses(canary)

    def _turn(self) -> tuple[str | None, str]:
        """The version whose turn it is, and by what."""
        if self._pinned is not None:
            return self._pinned, PINNED
        canary = self._following.canary.version
        at_hand = self._shelf.has(self._main) and self._shelf.has(canary)
        number = slice_at(self._clock(), self._canary.slice_duration)
        if self._on_trial() and at_hand and serves_canary(self._serve.node, number, self._canary.share):
            return canary, CANARY
        return self._main, self.alias

    def _settle(self) -> None:
        """Swap to the version whose turn it is, if it is at hand."""
        with self._seat.turning:
            version, role = self._turn()
            if version is not None and (version == self._seat.version or self._shelf.has(version)):
                self._take(version, role)

    def _take(self, version: str, role: str) -> None:
        if version == self._seat.version:
            self._seat.role = role
        else:
            self._seat.take(version, self._shelf.draft(version), role)
            self._policy.swapped()

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
            known = isinstance(error, RegistryError | RefusedError | UserError)
            log.warning("pin_failed", version=order.version, error=str(error), exc_info=not known)
            order.done.set_exception(error)
        else:
            order.done.set_result(None)

    def _pin(self, version: str) -> None:
        if version != self._seat.version:
            if not self._shelf.refuses(version) and not self._registry.has(version):
                raise UnknownVersionError(f"line {self._engine.line} has no version {version!r}")
            self._shelf.bring(version)
        with self._seat.turning:
            self._take(version, PINNED)
            self._pinned, self._behind_since = version, None
            self._shelf.keep(())
        log.info("pinned", version=version)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            self.poll()
            try:
                order = self._orders.get(timeout=self._wait_s())
            except Empty:
                continue
            if order is not None:
                self._obey(order)

    def _wait_s(self) -> float:
        """Until the next poll."""
        wait_s, waiting = wait_after(self._failures, self._serve.poll_interval), self.waiting
        if waiting is None or self._behind_since is None or self._failures:
            return wait_s
        return min(max(self._policy.due_at(waiting, self._behind_since) - self._ticks(), 0.0), wait_s)

    def _take_turns(self) -> None:
        slice_s = self._canary.slice_duration
        while True:
            now = self._clock()
            if self._stopping.wait((slice_at(now, slice_s) + 1) * slice_s - now):
                return
            try:
                self._settle()
            except Exception as error:
                # An engine that has stopped says so by its own means; what came to nothing is done at the next border.
                log.warning("turn_failed", error=str(error), exc_info=True)
