"""Version poller: keeps the engine on the version that this node must serve, on threads of its own.

``serving.versions.alias_policy`` selects the version from the registry's answers: the one of the followed alias or, in
their time slices, the canary or the anchor of a post-promotion watch. The cache downloads, checks and smoke-drafts it
(``serving.versions.cache``); the active version is then swapped between two verify steps. Whatever fails, the engine
keeps its draft. A defective version is rejected for good, a version whose swap fails is tried again less and less
often, and a registry that is unreachable is polled less and less often.

While there is a canary or an anchor, all versions of the slices are cached, and a thread that never waits for the
registry swaps them where one time slice ends and the next begins.

An operator can pin a version: it takes the same path, and stays active whatever the aliases name, until it is unpinned.
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
from schemas.status import RejectedVersionStatus, SwapStatus
from serving.engines.base import HotSwapEngine
from serving.versions.active_version import PINNED, ActiveVersion
from serving.versions.alias_policy import (
    CANARY,
    CHAMPION,
    PREVIOUS,
    FollowedAlias,
    FollowedAliases,
    RegistryAnswer,
    apply_answer,
    explain_unfollowed,
    is_anchor_slice,
    is_canary_slice,
    slice_number,
)
from serving.versions.cache import (
    MlflowRegistry,
    RegistryError,
    RejectedVersionError,
    UnknownVersionError,
    VersionCache,
)
from serving.versions.update_policy import CounterReading, UpdatePolicy

log = structlog.get_logger()

MAX_POLL_DELAY_S = 60.0


@dataclass(frozen=True, slots=True)
class _PinRequest:
    """An operator's request: a version to pin, or None to unpin."""

    version: str | None
    done: Future[None]


def poll_delay(failures: int, interval_s: float) -> float:
    """Return the seconds until the next poll, after this number of failures in a row."""
    return max(interval_s, min(interval_s * 2.0 ** min(failures, 16), MAX_POLL_DELAY_S))


class VersionPoller:
    """Polls the registry and activates the selected version."""

    def __init__(
        self,
        registry: MlflowRegistry,
        engine: HotSwapEngine,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._serve, self._canary_settings = settings.serve, settings.canary
        self.alias = self._serve.alias
        """The followed alias."""
        self._serves_canaries = settings.canary.share > 0 and self.alias == CHAMPION
        self._serves_anchors = settings.canary.anchor_share > 0 and self.alias == CHAMPION
        self._clock, self._monotonic = clock, monotonic
        self._policy = UpdatePolicy(settings.update, self._serve.node)
        self._cache = VersionCache(registry, engine)
        self._active = ActiveVersion(engine, self._serve.poll_interval, monotonic)

        self._followed = FollowedAliases()
        self._main: str | None = None
        """The version of the followed alias that this node has updated to."""
        self._behind_since: float | None = None
        self.pinned: str | None = None
        """The version that an operator has pinned; None while the alias is followed."""

        self.alias_version: str | None = None
        """The version that the alias named in the last answer that was not stale."""
        self._unfollowed: str | None = None
        self._unreadable: str | None = None
        self._is_stale = False
        self.error: str | None = None
        """Why the last poll failed; None if it did not."""
        self._failures = 0
        self._error_count = self._malformed_count = 0
        self.stale_count = 0
        """Stale answers of the registry."""

        self._requests: SimpleQueue[_PinRequest | None] = SimpleQueue()
        self._stopping, self._woken = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._run_polls, name="version-poller", daemon=True)]
        if self._serves_canaries or self._serves_anchors:
            self._threads.append(threading.Thread(target=self._run_slices, name="version-slices", daemon=True))

    def start(self) -> None:
        """Start to poll."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop polling; a download that hangs ends with the process."""
        self._stopping.set()
        self._requests.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)

    def pin(self, version: str) -> Future[None]:
        """Pin a version until ``unpin``. The poller's thread completes the future when the version is active.

        The future's errors: ``UnknownVersionError``, ``RejectedVersionError``, ``RegistryError``, or the error of a
        stopped engine. An error changes nothing.
        """
        return self._enqueue(version)

    def unpin(self) -> Future[None]:
        """Follow the alias again. The future is done after the first poll."""
        return self._enqueue(None)

    def wake(self) -> None:
        """Poll now, from any thread. Several calls before the poll count as one."""
        if not self._woken.is_set():
            self._woken.set()
            self._requests.put(None)

    @property
    def canary(self) -> str | None:
        """The version that is served in canary slices, if any."""
        return self._find_other(self._followed.canary)

    @property
    def anchor(self) -> str | None:
        """The version that is served in the slices of the anchor, if any."""
        return self._find_other(self._followed.anchor)

    @property
    def role(self) -> str | None:
        """What selected the active version: the alias, ``canary``, ``previous`` or ``pinned``; None with the day-0
        draft."""
        return self._active.role

    @property
    def pending_version(self) -> str | None:
        """A newer version whose update is delayed (section ``update``)."""
        version = self._followed.main.version
        is_pending = self._behind_since is not None and version is not None and not self._cache.is_rejected(version)
        return version if is_pending and self.pinned is None else None

    @property
    def update_interval_s(self) -> float:
        """Current minimum time between two updates."""
        return self._policy.interval_s

    @property
    def swaps(self) -> tuple[SwapStatus, ...]:
        """The newest swaps, oldest first; the last one is the swap to the active version."""
        return self._active.swaps

    @property
    def rejected(self) -> tuple[RejectedVersionStatus, ...]:
        """Versions that this node does not serve."""
        return self._cache.rejected

    @property
    def update_blocked(self) -> str | None:
        """Why the version that the alias names is not active, or why the audit state is not used; usually None."""
        failed = self._active.failed
        return self._unfollowed or self._unreadable or (failed.why if failed else None)

    def poll(self) -> None:
        """Read the aliases once, and serve what they select unless a version is pinned."""
        try:
            self._read_aliases()
            if self.pinned is None:
                self._follow()
        except Exception as error:
            # A full disk, a stopped engine, a bug in a client library: none may end the polling, the next poll retries.
            if self.error is None:
                is_known = isinstance(error, RegistryError | UserError)
                log.warning("poll_failed", error=str(error), exc_info=not is_known)
            self._failures += 1
            self._error_count += 1
            self.error = str(error) or type(error).__name__
        else:
            if self.error is not None:
                log.info("poll_recovered")
            self._failures, self.error = 0, None

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        for name, text, value in (
            ("aurora_serve_version_swaps", "Swaps of the active version.", self._active.swap_count),
            ("aurora_serve_version_swap_failures", "Swaps that failed.", self._active.failure_count),
            ("aurora_serve_versions_rejected", "Versions rejected as defective.", len(self.rejected)),
            ("aurora_serve_registry_errors", "Registry polls that failed.", self._error_count),
            (
                "aurora_serve_registry_stale_responses",
                "Stale registry responses, which changed nothing.",
                self.stale_count,
            ),
            (
                "aurora_serve_registry_malformed_responses",
                "Responses with an unreadable audit state.",
                self._malformed_count,
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield GaugeMetricFamily(
            "aurora_serve_update_interval_seconds", "Minimum time between two updates.", value=self.update_interval_s
        )
        is_canary = int(self.role == CANARY)
        yield GaugeMetricFamily("aurora_serve_canary_active", "1 while the canary is active.", value=is_canary)

    def _read_aliases(self) -> None:
        answer = self._registry.read_aliases()
        self._check_audit(answer)
        followed = apply_answer(
            self._followed, answer, self.alias, canary=self._serves_canaries, anchor=self._serves_anchors
        )
        if followed is None:
            self.stale_count += 1
            if not self._is_stale:
                moves = answer.audit.moves if answer.audit else 0
                log.warning("stale_answer_ignored", moves=moves, moves_seen=self._followed.moves)
            self._is_stale = True
            return
        self._is_stale = False
        self.alias_version = answer.aliases.get(self.alias)
        self._unfollowed = explain_unfollowed(followed.main, answer, self.alias)
        with self._active.lock:
            self._followed = followed

    def _check_audit(self, answer: RegistryAnswer) -> None:
        if answer.unreadable is not None:
            self._malformed_count += 1
            if answer.unreadable != self._unreadable:
                log.warning("audit_state_unreadable", why=answer.unreadable)
        self._unreadable = answer.unreadable

    def _follow(self) -> None:
        with self._active.lock:
            self._policy.record_reading(self._read_counters())
        main = self._followed.main.version
        try:
            if main is not None and main != self._main:
                self._update_to(main)
            else:
                self._behind_since = None
            is_behind = self._main is not None and self._main != self._active.version
            if self._main is not None and is_behind and not (self._in_slices or self._active.is_delayed(self._main)):
                self._fetch(self._main)
        finally:
            # A canary or an anchor that has ended stops serving, also while the registry is unreachable.
            self._activate_selected()
        if versions := self._in_slices:
            for version in versions:
                self._fetch(version)
            self._activate_selected()
        with self._active.lock:
            self._cache.retain(self._in_slices)

    def _update_to(self, version: str) -> None:
        """Fetch and activate another version of the alias; a newer one when its update is due."""
        is_newer = self._main is not None and int(version) > int(self._main)
        if is_newer and not self._is_due(version):
            return
        started = self._read_counters()
        if self._fetch(version):
            fetched = self._read_counters()
            with self._active.lock:
                self._main = version
                self._activate_selected()
                if is_newer and self._active.version == version:
                    self._policy.record_update(started, fetched, self._active.swaps[-1].pause_ms / 1e3)
        self._behind_since = None

    def _is_due(self, version: str) -> bool:
        """A cached version was the canary here: its update costs nothing, and a delay would be a step back from it."""
        if self._cache.is_cached(version):
            return True
        if self._behind_since is None:
            self._behind_since = self._monotonic()
        return self._monotonic() >= self._policy.due_at(version, self._behind_since)

    def _read_counters(self) -> CounterReading:
        health = self._engine.health()
        return CounterReading(self._monotonic(), health.verify_steps, health.accepted_tokens, health.output_tokens)

    def _fetch(self, version: str) -> bool:
        try:
            self._cache.fetch(version)
        except RejectedVersionError:
            return False
        return True

    def _find_other(self, followed: FollowedAlias) -> str | None:
        """Return the version of another alias that is served in slices of its own, beside the followed one."""
        version = followed.version
        if self._main is None or version is None or version == self._main or self._cache.is_rejected(version):
            return None
        return version

    @property
    def _in_slices(self) -> tuple[str, ...]:
        """The versions that are served in turn; empty where one version is served all the time."""
        others = tuple(version for version in (self.canary, self.anchor) if version is not None)
        return (self._main, *others) if others and self._main is not None else ()

    def _select(self) -> tuple[str | None, str]:
        """Return the version to serve now, and its role."""
        if self.pinned is not None:
            return self.pinned, PINNED
        settings, node = self._canary_settings, self._serve.node
        number = slice_number(self._clock(), settings.slice_duration)
        if self._is_ready(self.canary) and is_canary_slice(node, number, settings.share):
            return self.canary, CANARY
        if self._is_ready(self.anchor) and is_anchor_slice(node, number, settings.anchor_share):
            return self.anchor, PREVIOUS
        return self._main, self.alias

    def _is_ready(self, other: str | None) -> bool:
        """Return whether a version can be swapped in for a slice, and the followed one after it."""
        return other is not None and self._cache.is_cached(other) and self._cache.is_cached(self._main)

    def _activate_selected(self) -> None:
        """Activate the selected version, if it is cached. A swap that fails is tried again later."""
        with self._active.lock:
            version, role = self._select()
            if version is None:
                return
            if version == self._active.version:
                self._active.role = role
            elif self._cache.is_cached(version) and self._active.try_swap(version, self._cache.draft(version), role):
                self._policy.record_swap()

    def _enqueue(self, version: str | None) -> Future[None]:
        request = _PinRequest(version, Future())
        self._requests.put(request)
        return request.done

    def _handle(self, request: _PinRequest) -> None:
        try:
            if request.version is not None:
                self._pin(request.version)
            else:
                self.pinned = None
                log.info("version_unpinned")
                self.poll()
        except Exception as error:
            # The future reports any error to the operator, and the polling continues, as in `poll`.
            is_known = isinstance(error, RegistryError | RejectedVersionError | UserError)
            log.warning("pin_failed", version=request.version, error=str(error), exc_info=not is_known)
            request.done.set_exception(error)
        else:
            request.done.set_result(None)

    def _pin(self, version: str) -> None:
        if version != self._active.version:
            if not self._cache.is_rejected(version) and not self._registry.has_version(version):
                raise UnknownVersionError(f"line {self._engine.line} has no version {version!r}")
            self._cache.fetch(version)
        with self._active.lock:
            if version == self._active.version:
                self._active.role = PINNED
            else:
                self._active.swap(version, self._cache.draft(version), PINNED)
                self._policy.record_swap()
            self.pinned, self._behind_since = version, None
            self._cache.retain(())
        log.info("version_pinned", version=version)

    def _run_polls(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            self.poll()
            try:
                request = self._requests.get(timeout=self._next_poll_s())
            except Empty:
                continue
            if request is not None:
                self._handle(request)

    def _next_poll_s(self) -> float:
        """Return the seconds until the next poll."""
        delay_s, pending = poll_delay(self._failures, self._serve.poll_interval), self.pending_version
        if pending is None or self._behind_since is None or self._failures:
            return delay_s
        return min(max(self._policy.due_at(pending, self._behind_since) - self._monotonic(), 0.0), delay_s)

    def _run_slices(self) -> None:
        slice_s = self._canary_settings.slice_duration
        while True:
            now = self._clock()
            if self._stopping.wait((slice_number(now, slice_s) + 1) * slice_s - now):
                return
            try:
                self._activate_selected()
            except Exception as error:
                # A stopped engine reports itself; the next slice border retries.
                log.warning("slice_swap_failed", error=str(error), exc_info=True)
