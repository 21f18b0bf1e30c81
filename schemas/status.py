"""What each process answers on ``GET /status``: plain JSON for ``aurora status``, the demo, and scripts.

Prometheus metrics for dashboards are beside it on ``/metrics``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.events import Accepted, DriftEvent


class _Status(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SwapStatus(_Status):
    """A version that a node began to serve."""

    version: str
    time: float
    in_flight: int
    pause_ms: float


class RefusedStatus(_Status):
    """A version that a node would not serve, and why."""

    version: str
    time: float
    why: str


class ServeStatus(_Status):
    """A serving node. Token and verify step counters run from its start."""

    node: str
    target: str
    line: str
    alive: bool
    draining: bool
    """Told to end: what runs is answered, new requests are refused."""
    speculator: str
    speculating: bool
    """False while an operator has switched speculation off."""
    draft_depth: int
    """Tokens that are drafted a request, one after the other; 0 while drafting does not pay."""
    expected_rates: list[float]
    """Output tokens per second that the node expects with 0, 1, .. drafted tokens a request."""
    role: str | None
    """By what the version came to serve: the followed alias, ``canary`` or ``pinned``; None with the draft of day 0."""
    pinned: str | None
    """The version that an operator has pinned; None while the alias is followed."""
    running: int
    waiting: int
    finished: int
    failed: int
    verify_steps: int
    drafted: int
    accepted: int
    output_tokens: int
    rows_captured: int
    """Verify steps handed to the publisher; each ends as published or shed."""
    rows_published: int
    """Verify steps that the broker acknowledged."""
    rows_shed: int
    rows_pending: int
    breaker: str
    registry_error: str | None
    registry_stale: int
    """Old answers of the registry, which the node passed over."""
    swaps: list[SwapStatus]
    refused: list[RefusedStatus]


class SpeculatorStatus(_Status):
    """What a node drafts with, and what decides it; the answer of ``GET /admin/speculator``."""

    line: str
    version: str
    """The version that serves; empty on a node without speculation."""
    alias: str
    alias_version: str | None
    """The version that the alias named in the registry's last answer that was not old."""
    canary_version: str | None
    """The version that is served by turns with the alias's."""
    role: str | None
    """By what ``version`` came to serve: the alias, ``canary`` or ``pinned``; None with the draft of day 0."""
    held: str | None
    """Why a version that the registry names is not followed."""
    waiting: str | None
    """A newer version that is taken over later (``sync``)."""
    sync_interval_s: float
    """The least time between two takeovers of the moment."""
    pinned: str | None
    """The version that stays whatever the alias names."""
    speculating: bool
    registry_error: str | None
    swaps: list[SwapStatus]
    """The newest ones, oldest first."""
    refused: list[RefusedStatus]


class PartitionStatus(_Status):
    """How far the table has come in one source partition."""

    partition: int
    wanted: int
    """Next offset that the table wants."""
    end: int
    """Offset after the newest record on the broker."""
    lag: int
    """Records that the table lacks."""
    waiting_s: float
    """For how long records have waited on the broker while none of them arrived."""


class TrafficStatus(_Status):
    """How much of what a version drafted for the traffic of a label was accepted since its last drift."""

    line: str
    speculator: str
    label: str | None
    accepted: Accepted


class DriftStatus(_Status):
    """What a stream worker sees of acceptance, over the partitions it owns."""

    seen: int
    """Events since the start of the worker; those of its first records may be repetitions."""
    unsent: int
    """Events that the broker did not take."""
    failed: int
    """Commits that could not be looked at; what they hold is looked at with the next one."""
    newest: list[DriftEvent]
    """Oldest first."""
    traffic: list[TrafficStatus]
    """The most frequent ones, by falling number of requests."""


class StreamStatus(_Status):
    """A stream worker and the partitions it owns."""

    partitions: list[PartitionStatus]
    rows_written: int
    bytes_taken: int
    dead_letters: dict[str, int]
    """Records that could not be used, by reason."""
    gaps: int
    """Chunks whose one before is not known."""
    skipped_behind: int
    left_out: int
    """Records that came ahead of their turn, or from a partition that was given away; they come again."""
    seeks_back: int
    commits: int
    last_commit_age_s: float | None
    """None before the first one."""
    fenced: int
    """Commits that were refused because another worker had written."""
    table_errors: int
    lost: int
    """Records that the log no longer held when the table wanted them."""
    held_bytes: int
    """Records that were read and wait for the tables."""
    not_live: list[str]
    """Why the worker makes no progress although it should; empty when all is well."""
    not_ready: list[str]
    """Why the next record would not reach the tables."""
    drift: DriftStatus
    maintained: dict[str, int]
    """Files of the tables by what maintenance did to them, and how often it failed."""
    error: str | None


class TrainStatus(_Status):
    """The trainer. ``accepted_per_step`` is simulated on the held-out set, bonus excluded."""

    step: int
    loss: float | None
    loss_accepted: float | None
    loss_rejected: float | None
    loss_by_step: list[float]
    """Mean divergence of each step of the training-time test."""
    learning_rate: float | None
    gradient_norm: float | None
    """Before clipping."""
    tokens_per_s: float | None
    """Over the last minute, replay and waiting included."""
    newest_window_age_s: float | None
    """Age of the newest window of the last step, when it was taken."""
    tokens_seen: int
    table_version: int
    """Newest version of ``accepted`` on the table."""
    cursor: int
    """Version of ``accepted`` up to which the feed has read."""
    accepted_per_step: float | None
    registered: list[str]
    unfit_steps: int
    """Steps that were not taken, because loss or gradient was not finite."""
    rollbacks: int
    """How often training went back to its last good state."""
    went_back: str | None
    """Why it did so last."""
    curves: str | None
    """The run in MLflow that has the curves of this trainer."""
    error: str | None


class ComparedStatus(_Status):
    """One figure of two versions on live traffic."""

    figure: str
    label: str | None
    """None over all labels."""
    new: float
    before: float
    difference: float
    """Share by which the new version is better."""
    low: float
    high: float
    """The difference lies within, however often one looks, but for a small chance."""


class TrialStatus(_Status):
    """A version beside another one, on live traffic: a canary beside the champion, or a new champion beside the last.

    Times are Unix seconds."""

    kind: Literal["trial", "watch"]
    version: str
    against: str
    since: float
    until: float
    requests: int
    requests_against: int
    """On labels that both have served enough."""
    figures: list[ComparedStatus]


class PromoterStatus(_Status):
    """The promoter: the line that changed last."""

    champion: str | None
    candidate: str | None
    previous: str | None
    canary: str | None
    moves: int
    verdict: str | None
    """What was decided last, and on which figures."""
    trials: list[TrialStatus]
    """What is compared on live traffic."""
    taken_back: str | None
    """Why a version was taken back last, as canary or champion, without a person's hand."""
    cooling_until: float | None
    """Nothing is promoted before that Unix time, after versions were taken back."""
    error: str | None
