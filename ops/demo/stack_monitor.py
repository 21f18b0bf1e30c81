"""Monitor a running stack: supervise its parts, sample its status, and read its versions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ops.demo.record import StackSample, Swap, VersionRecord
from ops.local.stack import Stack
from ops.observe.status import Overview, StatusClient
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.events import AliasMoved
    from trainer.release.registry import Version

_TICK_S = 0.25
_SAMPLE_INTERVAL_S = 1.0
_RATE_WINDOW_S = 10.0


@dataclass
class StackMonitor:
    """Newest status of a stack and the samples taken so far."""

    stack: Stack
    on_sample: Callable[[], None]
    """Called after every sample."""
    overview: Overview = field(default_factory=Overview)
    samples: list[StackSample] = field(default_factory=list)
    _sampled: float = 0.0
    _client: StatusClient = field(init=False)

    def __post_init__(self) -> None:
        self._client = StatusClient(self.stack.settings)

    def run_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Supervise the stack and sample it every second until ``done`` or the timeout; return whether it was done.

        ``done`` is called four times a second, and at least once.

        Raises what ``Stack.tick`` raises.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.stack.tick()
            if time.monotonic() - self._sampled >= _SAMPLE_INTERVAL_S:
                self.sample()
            if done():
                return True
            time.sleep(_TICK_S)
        return False

    def sample(self) -> None:
        """Take a sample now."""
        self._sampled = time.monotonic()
        overview = self._client.fetch()
        # A process too busy to answer in time keeps its last status.
        self.overview = overview.model_copy(
            update={name: getattr(self.overview, name) for name in overview.silent if name != "tables"}
        )
        if serve := self.overview.serve:
            train = self.overview.train
            self.samples.append(
                StackSample(
                    time=time.time(),
                    output_tokens=serve.output_tokens,
                    trace_lag=self.overview.trace_lag,
                    step=train.step if train else 0,
                    loss=train.loss if train else None,
                )
            )
        self.on_sample()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def newest_rate(samples: Sequence[StackSample]) -> float | None:
    """Return output tokens per second over the last ten seconds."""
    if len(samples) < 2:
        return None
    recent = [sample for sample in samples if sample.time >= samples[-1].time - _RATE_WINDOW_S]
    first, last = recent[0], recent[-1]
    return (last.output_tokens - first.output_tokens) / (last.time - first.time) if last.time > first.time else None


def read_versions(settings: Settings, line: str) -> tuple[list[Version], list[AliasMoved]]:
    """Return the registered versions of a line and the moves of ``champion``, oldest first.

    Raises:
        RegistryError: the registry does not answer.
        TableError: the table ``promotions`` cannot be read.
    """
    from pipeline.delta import DeltaLog
    from trainer.release.audit import read_moves
    from trainer.release.registry import SpeculatorRegistry

    moves = read_moves(DeltaLog(settings.tables))
    promoted = [move for move in moves if move.line == line and move.alias == "champion" and move.to_version]
    return SpeculatorRegistry(settings.registry).versions(line), promoted


def build_version_records(
    start: float, registered: Sequence[Version], promoted: Sequence[AliasMoved], swaps: Sequence[Swap]
) -> tuple[VersionRecord, ...]:
    """Return the versions registered after ``start`` with the times of their first promotion and first swap."""
    first_promoted = {move.to_version: move.time.timestamp() for move in reversed(promoted)}
    first_served = {swap.version: swap.time for swap in reversed(swaps)}
    return tuple(
        VersionRecord(
            version=version.number,
            registered=version.registered.timestamp(),
            promoted=first_promoted.get(version.number),
            served=first_served.get(version.number),
            **_held_out_figures(version.tags),
        )
        for version in registered
        if version.registered.timestamp() >= start
    )


def _held_out_figures(tags: Mapping[str, str]) -> dict[str, float | None]:
    try:
        figures = json.loads(tags.get("held_out", "{}"))
    except ValueError:
        figures = {}
    return {
        "held_out": figures.get("accepted_per_step"),
        "champion_held_out": figures.get("champion_accepted_per_step"),
    }
