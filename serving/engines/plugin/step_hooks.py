"""What the hooks of all servers share: errors, cost, and which requests are recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import structlog
from torch import Tensor

from schemas.settings import Traces
from serving.engines.plugin.capture import HostTransfer
from serving.engines.plugin.metrics import CaptureLimit, PluginMetrics
from serving.engines.plugin.recorder import (
    CapturedStep,
    Duration,
    PromptPart,
    RecordedRequest,
    Recorder,
    VerifiedRequest,
)
from serving.engines.plugin.trace_options import TraceOptions, Untraced
from serving.engines.plugin.verify_steps import ActiveSpeculator
from serving.traces.sampling import is_sampled

log = structlog.get_logger()

Hook = TypeVar("Hook", bound=Callable[..., Any])


def guard(hook: Hook) -> Hook:
    """Count a hook's error instead of raising it, which would end the server; count the hook's time."""

    @wraps(hook)
    def run(self: StepHooks, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a fault of ours, of any kind, would end the server and every request with it
            self.count_error(hook.__name__, error)
            return None
        finally:
            self.add_cost(time.perf_counter() - start)

    return run  # type: ignore[return-value]


class StepHooks:
    """State of the process that runs the steps.

    Args:
        traces: Settings of traces.
        recorder: Takes the captured steps.
        transfer: Copies tensors to the host.
        limit: Limits the recorded requests.
        metrics: Counters.
    """

    def __init__(
        self,
        traces: Traces,
        recorder: Recorder,
        transfer: HostTransfer,
        limit: CaptureLimit,
        metrics: PluginMetrics,
    ) -> None:
        self._traces = traces
        self._recorder, self._transfer, self._limit, self._metrics = recorder, transfer, limit, metrics
        self._speculator = ActiveSpeculator("", 0)
        self._failed_hooks: set[str] = set()
        for name in dir(self):
            if name.startswith("on_"):
                metrics.hook_errors.labels(name)
        self._cost_s = 0.0

    def count_error(self, hook: str, error: Exception) -> None:
        """Count a hook's error, and log the hook's first one."""
        self._metrics.hook_errors.labels(hook).inc()
        if hook not in self._failed_hooks:
            self._failed_hooks.add(hook)
            log.error("aurora_hook_failed", hook=hook, exc_info=error)

    def add_cost(self, seconds: float) -> None:
        """Count time that a hook took from the step."""
        self._cost_s += seconds
        self._limit.add_cost(seconds)

    def _start_step(self) -> None:
        self._metrics.hook_duration.observe(self._cost_s)
        self._cost_s = 0.0
        self._limit.start_step(time.monotonic())

    def _active(self, version: str) -> ActiveSpeculator:
        """Return the version that drafts, with the time of its first step."""
        if version != self._speculator.version:
            self._speculator = ActiveSpeculator(version, time.time_ns() // 1000)
        return self._speculator

    def _admit(self, request: str, options: TraceOptions, cached: int) -> bool:
        """Decide once whether a request is recorded; ``cached`` tokens of its prompt are in the prefix cache."""
        if options.untraced:
            self._metrics.untraced.labels(options.untraced).inc()
            return False
        if not self._recorder.sample(request):
            return False
        if not is_sampled(request, self._traces.sample_ratio * self._limit.request_ratio):
            self._metrics.untraced.labels("capture_limit").inc()
            return False
        self._metrics.cached.inc(cached)
        return True

    def _stop(self, recorded: RecordedRequest, reason: Untraced) -> None:
        """Record no further step of a request."""
        if not recorded.is_stopped:
            recorded.is_stopped = True
            self._metrics.untraced.labels(reason).inc()

    def _put(
        self,
        members: tuple[PromptPart | VerifiedRequest, ...],
        found: dict[str, Tensor],
        width: int,
        drafting: Duration,
        verification: Duration,
    ) -> None:
        if self._recorder.is_full():
            self._metrics.steps_dropped.labels("queue_full").inc(len(members))
            return
        pending, time_us = self._transfer.copy(found), time.time_ns() // 1000
        self._recorder.put(CapturedStep(members, pending, drafting, verification, time_us, width))
