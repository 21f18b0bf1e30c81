"""Responses of ``GET /status``, one model per process: JSON for ``aurora status``, the demo and scripts.

``GET /metrics`` on the same port serves Prometheus metrics for dashboards. Processes of a newer release may answer with
further fields, which readers ignore.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.events import AcceptanceStats, DriftEvent
from schemas.settings.sections import PrefixScope, SuffixScope


class _Status(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SwapStatus(_Status):
    """A hot swap to a version."""

    version: str
    time: float
    """Unix time in seconds."""
    in_flight: int
    """Requests that were being decoded."""
    pause_ms: float
    """Time for which decoding paused."""


class RejectedVersionStatus(_Status):
    """A version that the node rejected."""

    version: str
    time: float
    """Unix time in seconds."""
    why: str


class CorpusStatus(_Status):
    """The answers that a node drafts from. Counters start at zero with the process."""

    scope: SuffixScope
    tokens: int
    bytes: int
    """Bytes of the corpus, and of the answers that wait for the engine."""
    answers_published: int
    """Answers that the broker acknowledged."""
    answers_not_published: dict[str, int]
    """Answers that the broker did not get, by reason."""
    answers_consumed: int
    """Answers read from the topic for the engine."""
    answers_not_consumed: dict[str, int]
    """Answers read from the topic and not used, by reason."""
    answers_lag: int
    """Answers that are not yet read from the topic."""
    answers_error: str | None
    """Why no answers arrive."""


class PrefixCacheStatus(_Status):
    """The prefix cache of a node. Counters start at zero with the process."""

    scope: PrefixScope
    is_on: bool
    """False if it was turned off by its size, or by a failure."""
    bytes: int
    hits: int
    """Choices that began with cached tokens."""
    cached_tokens: int
    """Prompt tokens from the cache."""
    evictions: int
    """Blocks that newer ones replaced."""
    failures: int


class ServeStatus(_Status):
    """A serving node. Counters start at zero with the process."""

    node: str
    target: str
    line: str
    engine_up: bool
    draining: bool
    """Whether the node is shutting down: it finishes running requests, and rejects new ones after
    ``serve.drain_delay``."""
    speculator: str
    """The active version."""
    speculating: bool
    """False while an operator has switched speculation off."""
    draft_depth: int
    """Draft tokens per request and verify step along the deepest path; 0 while drafting does not pay."""
    expected_tokens_per_second: list[float]
    """Expected output rate: entry 0 without drafts, entry n with drafts of the speculator up to depth n."""
    speedup: float | None = None
    """Recent output rate of decoding over the rate that the planner expects without drafts; None before the first
    verify step, and with SGLang and vLLM."""
    saved_s: float = 0.0
    """Seconds of decoding that drafts have saved, as the planner expects; negative if they have cost time."""
    role: str | None
    """Why the version is active: the name of the alias, ``canary``, ``previous`` or ``pinned``; None with the day-0
    draft."""
    pinned: str | None
    """Version pinned by an operator; None while the node follows the alias."""
    requests_running: int
    requests_waiting: int
    requests_finished: int
    requests_failed: int
    verify_steps: int
    draft_tokens: int
    accepted_tokens: int
    suffix_accepted_tokens: int
    """Accepted draft tokens that only the suffix drafter proposed."""
    output_tokens: int
    acceptance_length: float | None
    """1 + accepted tokens per verify step (bonus token included) since the start; None before the first verify step."""
    rows_captured: int
    """Trace rows handed to the publisher; each is later counted as published or dropped."""
    rows_published: int
    """Trace rows acknowledged by the broker."""
    rows_dropped: int
    rows_pending: int
    circuit_breaker: str
    """State of the circuit breaker in front of the broker."""
    registry_error: str | None
    registry_stale_responses: int
    """Registry responses ignored because they were older than an earlier one."""
    swaps: list[SwapStatus]
    """Newest swaps, oldest first."""
    versions_rejected: list[RejectedVersionStatus]
    corpus: CorpusStatus | None = None
    """None with SGLang and vLLM, whose plugins export their counts."""
    prefix_cache: PrefixCacheStatus | None = None
    """None with SGLang and vLLM."""


class SpeculatorStatus(_Status):
    """The active version and the reason for it; response of ``GET /admin/speculator``."""

    line: str
    version: str
    """The active version; empty on a node without speculation."""
    alias: str
    alias_version: str | None
    """Version named by the alias in the latest registry response that was not stale."""
    canary_version: str | None
    """Canary that alternates with the alias's version."""
    anchor_version: str | None
    """Anchor of a post-promotion watch that alternates with the alias's version."""
    role: str | None
    """Why ``version`` is active: the name of the alias, ``canary``, ``previous`` or ``pinned``; None with the day-0
    draft."""
    update_blocked: str | None
    """Why the node does not follow the version named by the registry."""
    pending_version: str | None
    """Newer version that the update policy (``update``) defers."""
    update_interval_s: float
    """Current minimum time between two updates."""
    pinned: str | None
    """Version that stays active whatever the alias names."""
    speculating: bool
    registry_error: str | None
    swaps: list[SwapStatus]
    """Newest swaps, oldest first."""
    versions_rejected: list[RejectedVersionStatus]


class PartitionStatus(_Status):
    """Progress of the tables in one partition of the traces topic."""

    partition: int
    next_offset: int
    """Offset of the next record to commit to the tables."""
    end_offset: int
    """Offset after the newest record on the broker."""
    lag: int
    """Records on the broker that the tables do not contain."""
    stalled_s: float
    """Time for which records have waited on the broker and the next offset has not moved."""
    transaction_s: float = 0.0
    """Time for which records have waited for a producer's open transaction."""
    oldest_unread_time: float | None = None
    """Unix time at which the broker received the oldest record that the tables do not contain; None if they contain
    all, or while it is unknown."""
    paused_by: str | None = None
    """Trace format of the next record, if the worker cannot read it: another major version."""

    @property
    def is_paused(self) -> bool:
        """Whether the worker cannot read the next record."""
        return self.paused_by is not None


class TrafficStatus(_Status):
    """Acceptance of one version on the traffic of one label, since the last drift."""

    line: str
    speculator: str
    label: str | None
    acceptance: AcceptanceStats


class DriftStatus(_Status):
    """Acceptance drift over the partitions of a stream worker."""

    detected: int
    """Drift events since the start of the worker; events of its first records may be repetitions."""
    dropped: int
    """Events that the broker did not accept."""
    failed: int
    """Commits that could not be evaluated; their rows are evaluated with the next commit."""
    newest: list[DriftEvent]
    """Oldest first."""
    traffic: list[TrafficStatus]
    """The labels with the most requests, in descending order."""


class StreamStatus(_Status):
    """A stream worker and its partitions."""

    topic_log: int = 1
    """Number of the topic's log that is read: one more for each time the topic was created anew."""
    partitions: list[PartitionStatus]
    rows_written: int
    consumed_bytes: int
    dead_letters: dict[str, int]
    """Records that could not be used, by reason."""
    chunk_gaps: int
    """Chunks whose predecessor is unknown."""
    records_skipped: int
    """Records that the tables already contained."""
    records_deferred: int
    """Records that arrived ahead of the next offset or from a revoked partition; the broker delivers them again."""
    seeks: int
    """Seeks back to the next offset."""
    commits: int
    last_commit_time: float | None
    """Unix time in seconds; None before the first commit."""
    commits_fenced: int
    """Commits rejected because another worker had written."""
    table_errors: int
    records_lost: int
    """Records that retention deleted before they were read."""
    hole_offsets: int = 0
    """Offsets at which no consumer receives a record: ends of transactions, and records of aborted ones."""
    buffer_bytes: int
    """Size of the records that were read and are not yet in the tables."""
    not_live: list[str]
    """Reasons why the worker makes no progress although it should; empty while it is live."""
    not_ready: list[str]
    """Reasons why the next record would not reach the tables; empty while the worker is ready."""
    drift: DriftStatus
    maintenance_files: dict[str, int]
    """Table files by maintenance action, and the failed maintenance runs."""
    last_maintenance_time: float | None = None
    """Unix time of the last maintenance run without an error, or at which this worker was to begin with them; None on a
    worker that runs none."""
    maintenance_interval_s: float = 0.0
    """``tables.maintenance_interval``."""
    retention_s: float = 0.0
    """``kafka.retention``."""
    error: str | None


class TrainStatus(_Status):
    """The trainer."""

    step: int
    loss: float | None
    loss_accepted: float | None
    loss_rejected: float | None
    loss_by_ttt_step: list[float]
    """Mean divergence at each step of the training-time test."""
    learning_rate: float | None
    gradient_norm: float | None
    """Before clipping."""
    tokens_per_second: float | None
    """Over the last minute, replay and waiting included."""
    newest_sample_age_s: float | None
    """Age of the newest sample of the last training step, when the step ran."""
    tokens_seen: int
    table_version_latest: int
    """Newest version of the table ``accepted``."""
    table_version_read: int
    """Version of ``accepted`` up to which the data loader has read."""
    acceptance_length: float | None
    """Simulated on the held-out set, bonus token included."""
    draft_vocab_coverage: float | None
    """Share of the traffic's output tokens within the draft vocabulary in training."""
    registered: list[str]
    """Versions registered since the start."""
    evaluations_since_registration: int
    """Evaluations on the held-out set since the last registration or the start."""
    steps_skipped: int
    """Training steps skipped because the loss or the gradient was not finite."""
    rollbacks: int
    """Times that the divergence guard restored the last good checkpoint."""
    last_rollback: str | None
    """Reason of the newest rollback."""
    mlflow_run: str | None
    """MLflow run with the training curves."""
    error: str | None


class ComparedStatus(_Status):
    """One figure of two versions on live traffic."""

    figure: str
    label: str | None
    """Traffic label; None for the mean over all labels."""
    new: float
    before: float
    difference: float
    """Ratio by which the new version is better."""
    low: float
    """Lower bound of ``difference``, valid at any time of the analysis with the configured error probability."""
    high: float
    """Upper bound of ``difference``."""


class ComparisonStatus(_Status):
    """Comparison on live traffic: of a canary with the champion, or of the versions of a watch with the anchor."""

    kind: Literal["canary", "watch"]
    version: str
    """The canary, or the champion, which is the last of the versions of a watch."""
    baseline: str
    """The champion, or the anchor."""
    start_time: float
    """Unix time in seconds."""
    end_time: float
    """Unix time in seconds at which the comparison ends at the latest."""
    requests: int
    baseline_requests: int
    """Requests on labels that both sides have served enough."""
    figures: list[ComparedStatus]


class PromoterStatus(_Status):
    """The promoter: aliases and last decision of the line that changed last."""

    champion: str | None
    candidate: str | None
    previous: str | None
    canary: str | None
    alias_moves: int
    verdict: str | None
    """The last decision and the figures behind it."""
    comparisons: list[ComparisonStatus]
    """Running comparisons on live traffic."""
    last_rollback: str | None
    """Why the promoter last rolled back a canary or a champion."""
    cooldown_until: float | None
    """Unix time in seconds before which nothing is promoted, after a rollback."""
    error: str | None
