"""The sections of the settings, and what each setting means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from schemas.settings.masking import Options, Secret, masked

Device = Literal["auto", "cpu", "cuda"]
"""Where a process computes; ``auto`` is a GPU where there is one."""


_UNITS = {"": 1, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    """Seconds of a text such as ``30s``; anything but text is left to pydantic."""
    if not isinstance(value, str):
        return value
    number, unit = re.fullmatch(r"\s*(.*?)\s*(ms|s|m|h|d|)\s*", value, re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        return float(number) * _UNITS[unit]
    except ValueError:
        raise ValueError(
            "not a duration: write seconds, or a number with a unit as in 500ms, 30s, 5m, 2h, 14d"
        ) from None


Duration = Annotated[float, BeforeValidator(_seconds)]
"""A time span: seconds in code; a file or flag may also give a unit, as in ``500ms``, ``30s`` or ``14d``."""

DAY_0 = "day-0"
"""Version strings of drafts of day 0 begin with it: they are in no registry."""


class Section(BaseModel):
    """A part of the file; frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the section; unlike pydantic's own, refuse keys that it does not have."""
        if unknown := (update or {}).keys() - type(self).model_fields.keys():
            raise KeyError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        return super().model_copy(update=update, deep=deep)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, masked(value) if isinstance(value, dict) else value


class Kafka(Section):
    """The broker and its topics."""

    bootstrap_servers: str = "127.0.0.1:19092"
    traces_topic: str = "aurora.traces.v1"
    speculators_topic: str = "aurora.speculators.v1"
    drift_topic: str = "aurora.drift.v1"
    partitions: int = Field(2, ge=1)
    """Partitions of the traces topic: so many stream workers can share it."""
    replication_factor: int = Field(1, ge=1)
    """Copies of every topic. From 3 on a record is acknowledged when more than half of them have it."""
    retention: Duration = Field(72 * 3600, gt=0)
    """How long the traces and drift topics keep a record."""
    max_message_bytes: int = Field(1_000_000, ge=10_000)
    """Largest trace message; longer requests are cut into chunks below it."""
    client_options: Options = Field(default_factory=dict)
    """Passed to every Kafka client as it is (librdkafka names), for SASL and TLS."""


class Tables(Section):
    """Where the Delta tables are."""

    uri: str = ".aurora/tables"
    """Folder or object-store prefix that holds the Delta tables."""
    storage_options: Options = Field(default_factory=dict)
    """Options of the Delta library for an object store: its address, keys and timeouts."""
    maintenance_interval: Duration = Field(600, gt=0)
    """How often the stream merges small files, lets old days go, and deletes the files that nobody needs any more."""
    target_file_size_mb: int = Field(128, ge=1)
    """Files are merged up to about this size."""
    batches_retention: Duration = Field(14 * 86_400, ge=86_400)
    """Days for which ``accepted`` and ``rejected`` are kept, by the time of their Kafka records."""
    traces_retention: Duration = Field(90 * 86_400, ge=86_400)
    dead_letters_retention: Duration = Field(90 * 86_400, ge=86_400)
    vacuum_retention: Duration = Field(24 * 3600, ge=2 * 3600, le=336 * 3600)
    """Files that were merged or let go stay for so long: for earlier states, and for queries that run."""
    reader_lease: Duration = Field(72 * 3600, ge=3600, le=336 * 3600)
    """Files that a reader has not come to stay for so long after it was last heard of, and after they were added."""


class Registry(Section):
    """Where speculator versions are registered."""

    tracking_uri: str = "http://127.0.0.1:15000"
    """Address of the MLflow server."""
    username: str = ""
    """Of this process, where the server wants basic auth."""
    password: Secret = SecretStr("")
    timeout: Duration = Field(10, gt=0)


class Target(Section):
    """The model that is served."""

    path: str = ".aurora/models/smollm2-135m-instruct"
    """Folder with the target in Hugging Face format (config.json, safetensors, tokenizer)."""
    served_model_name: str = "smollm2-135m-instruct"
    """Name under which the API serves it."""


class Speculator(Section):
    """The draft of day 0, which with the target fixes the speculator line."""

    draft_vocab_size: int = Field(8192, ge=16)
    """D: tokens the draft can propose; day 0 takes the lowest ids, which a byte-pair tokenizer orders by frequency."""
    draft_vocab_file: str = ""
    """File with the ids that the draft can propose, as ``aurora vocabulary`` writes it: then D is their number."""
    intermediate_size: int = Field(0, ge=0)
    """Width of the draft's MLP; 0 takes the target's."""
    num_key_value_heads: int = Field(0, ge=0)
    """Heads of the draft's keys and values; 0 takes the target's."""
    variant: Literal["eagle3", "eagle3.1"] = "eagle3.1"
    """``eagle3.1`` norms the target's states, and the hidden state that goes from one drafting step to the next."""
    init: Literal["head", "random"] = "head"
    """Where the draft of day 0 begins: near the target's output (its own head, with the highest captured layer going
    through to it), or with random weights alone."""
    seed: int = 0
    """Seed of the random weights of day 0: nodes and trainer start from the same ones."""

    @property
    def day_0(self) -> str:
        """Version string of the draft of day 0, such as ``day-0-head-0``: within its line it names the weights."""
        return f"{DAY_0}-{self.init}-{self.seed}"


class Serve(Section):
    """The serving node."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    node: str = "node-0"
    engine: Literal["builtin", "sglang"] = "builtin"
    """What decodes: the built-in engine, or SGLang's own server, which ``aurora serve`` then starts."""
    speculate: bool = True
    num_speculative_tokens: int = Field(6, ge=1, le=16)
    """Tokens that are drafted at most, one after the other."""
    draft_tree_width: int = Field(1, ge=1, le=8)
    """1 drafts chains; more drafts trees that go on from so many tokens at each depth."""
    draft_tree_nodes: int = Field(16, ge=1, le=128)
    """Drafted tokens of one request that the target verifies at most in a verify step."""
    device: Device = "auto"
    adaptive_drafting: bool = True
    """Draft what is expected to give the most tokens per second, none included; false always drafts all it may."""
    weight_dtype: Literal["auto", "float32", "float16", "int8"] = "auto"
    """Kernel of the target's matrices; auto times at start those that compute the target exactly as it is."""
    max_num_seqs: int = Field(8, ge=1)
    """Requests decoded together; further ones wait."""
    max_prefill_stall: Duration = Field(0.06, gt=0)
    """How much longer a verify step may take for the prompts that it reads while other requests decode: the pieces
    are cut by
    what a row has proved to cost."""
    max_model_len: int = Field(1024, ge=16)
    """Longest request, prompt and answer together."""
    max_waiting_requests: int = Field(256, ge=1)
    """Requests that wait for a place in the batch; further ones are refused with 429."""
    max_choices: int = Field(32, ge=1)
    """Answers that one request may ask for: its prompts times ``n``."""
    max_body_bytes: int = Field(4 << 20, ge=1024)
    """Longest body of a request; a longer one is refused before it is read."""
    drain_timeout: Duration = Field(8, ge=0)
    """After SIGTERM, time for the requests that run; what still runs then is ended with an error."""
    admin_token: Secret = SecretStr("")
    """Bearer token of the admin endpoints; without one they are closed."""
    admin_tokens_file: str = ""
    """File with more of them, one a line, read at every call: tokens change while the node runs."""
    webhook_secret: Secret = SecretStr("")
    """What the registry signs its webhooks with; without one ``/webhooks/registry`` is closed."""
    num_threads: int = Field(1, ge=1)
    poll_interval: Duration = Field(2, gt=0)
    """How often the registry is asked which version the alias names."""
    alias: str = "champion"


class Traces(Section):
    """What a node publishes of its verify steps."""

    enabled: bool = True
    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of the requests that are traced, drawn by their ids: a request is traced whole or not at all."""
    max_bytes_per_second: int = Field(0, ge=0)
    """Bytes of traces that a node publishes in a second at most; 0 sets no bound. Beyond it the easiest are shed."""
    features: Literal["inline", "claim-check", "recompute"] = "inline"
    """How the target's states travel: in the records, in files of an object store, or not at all: the trainer then runs
    the target itself."""
    claim_check_uri: str = ".aurora/claims"
    """Folder or object-store prefix for claim-check files; the same for nodes and stream workers."""
    claim_check_options: Options = Field(default_factory=dict)
    """For an s3:// address: options of Arrow's S3 file system, as region, endpoint_override, access_key, secret_key."""
    claim_check_max_bytes: int = Field(8 << 20, ge=1 << 16)
    """Largest claim-check file; longer requests are cut into chunks below it."""
    top_k: int = Field(8, ge=1)
    max_queue_bytes: int = Field(64 << 20, ge=1 << 20)
    """Bound on traces waiting for the broker; beyond it the newest are shed and counted."""
    circuit_breaker_failures: int = Field(5, ge=1)
    """Failed deliveries in a row that open the breaker."""
    circuit_breaker_probe_interval: Duration = Field(5, gt=0)
    """While the breaker is open, one chunk is tried this often."""


class Sglang(Section):
    """SGLang's own server: the plugin in it, and the node beside it."""

    python: str = ""
    """Python of the environment that SGLang is installed in; empty is that of the node."""
    url: str = ""
    """Address of a server that runs already, whose versions the node is to look after; empty starts one."""
    api_key: Secret = SecretStr("")
    """SGLang's ``--admin-api-key``, or its ``--api-key`` where it has no other; sent as ``Authorization: Bearer``."""
    draft_dir: str = ".aurora/sglang"
    """Where the draft is written that SGLang starts with; of a path that several machines see, one for each node."""
    timeout: Duration = Field(120, gt=0)
    """For one step of an update of the weights. After it the node puts back what served before."""
    max_capture_ratio: float = Field(0.05, gt=0, le=1)
    """Share of the time of the server's steps that recording them may take; beyond it fewer new requests are traced."""


class Stream(Section):
    """The stream processor."""

    host: str = "127.0.0.1"
    port: int = Field(16066, ge=0, le=65535)
    group_id: str = "aurora-stream"
    flush_records: int = Field(256, ge=1)
    flush_interval: Duration = Field(1.0, gt=0)
    """A batch is committed when it holds ``flush_records`` records or is this old."""
    data_dir: str = ".aurora/stream"
    context_tokens: int = Field(32, ge=1)
    """Tokens kept before the root of a rejected branch."""
    duplicate_window: int = Field(10_000, ge=0)
    """Records of a partition for which a chunk is remembered: one that repeats it is a dead letter; 0 turns it off."""
    session_timeout: Duration = Field(10, ge=6)
    """A killed worker's partitions are given to another one after this long; brokers refuse less than 6 s."""


class Drift(Section):
    """When a stream worker says that a speculator is accepted more or less often than before."""

    delta: float = Field(1e-4, gt=0, lt=1)
    """Confidence of the detector (ADWIN): lower gives fewer false alarms and later true ones."""
    window_records: int = Field(5_000, ge=100)
    """Records of a partition that figures look back on at least, and at most twice as many."""
    min_requests: int = Field(30, ge=5)
    """Requests before and after a change that it takes to be told."""


Objective = Literal["kl", "reverse-kl", "tv", "lk"]


class Train(Section):
    """The trainer."""

    host: str = "127.0.0.1"
    port: int = Field(16067, ge=0, le=65535)
    checkpoint_dir: str = ".aurora/train"
    warm_start: str = "alias"
    """What a trainer without a checkpoint of its own begins with: ``alias`` is the champion (the draft of day 0 while
    there is none), ``day-0`` that draft in any case, a number a version of the line, anything else a folder."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """What moves the matrices of the hidden layer; vocabulary and norms are AdamW's in any case."""
    learning_rate: float = Field(1.5e-3, gt=0)
    muon_learning_rate: float = Field(0.0, ge=0)
    """Muon's; 0 takes ``learning_rate``, for which its updates are scaled to the size of AdamW's."""
    newton_schulz_steps: int = Field(5, ge=1, le=20)
    """By which Muon orthogonalises an update: fewer are cheaper, and leave directions of small gradients small."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; norms have none."""
    warmup_steps: int = Field(20, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    ema_decay: float = Field(0.98, ge=0, lt=1)
    """Decay of a moving average of the weights, which is then what is compared and registered; 0 keeps none."""
    device: Device = "auto"
    """Where the draft is trained and scored. Of processes that ``torchrun`` starts each takes a GPU of its own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products in a pass; weights, their average and the optimizer's state are float32 in any case. ``auto`` is
    bfloat16 on a processor that multiplies it natively (AMX, AVX-512 BF16), where it is nearly twice as fast, and
    float32 elsewhere."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """What each of the processes that ``torchrun`` starts holds: the whole draft, or a share of it."""
    ttt_steps: int = Field(3, ge=1)
    """K: steps of the training-time test; one for each token of the drafted chain."""
    ttt_decay: float = Field(0.8, gt=0, le=1)
    objective: Objective = "kl"
    """What accepted positions teach: see ``trainer.objective.divergences``."""
    rejected_weight: float = Field(0.1, ge=0)
    """Lambda: weight of the loss over rejected branches."""
    rejected_objective: Objective = "kl"
    rejected_min_prob: float = Field(0.1, ge=0, le=1)
    """Only branches whose first rejected token the draft gave at least this probability are learned from."""
    rejection_weight: float = Field(0.0, ge=0)
    """How many times more a position counts where the draft that served was rejected, and still would be."""
    policy_weight: float = Field(0.0, ge=0)
    """Weight of a policy gradient on the accepted tokens per step."""
    batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Parts that a step's windows are passed over in, one after the other: memory falls, the gradient stays."""
    replay_batch_size: int = Field(3, ge=0)
    """Windows of a step that are drawn from history while new ones are there."""
    catch_up_steps: int = Field(8, ge=0)
    """Fewer windows are replayed where more new ones wait than so many steps would take; 0 replays as many and lags."""
    replay_buffer_size: int = Field(2048, ge=1)
    """Windows kept in memory for replay."""
    replay_half_life: float = Field(0.0, ge=0)
    """Windows after which one is half as likely to be replayed as a new one; 0 replays all alike."""
    label_balance: float = Field(0.0, ge=0, le=1)
    """0 takes labels of traffic as often as they come, 1 all alike."""
    staleness_half_life: float = Field(16.0, ge=0)
    """Versions after which a rejected branch counts half: the draft that proposed it is gone. 0 counts all alike."""
    max_epochs: int = Field(8, ge=1)
    """Passes over a window at most; after them a trainer without new windows waits."""
    max_sample_tokens: int = Field(512, ge=2)
    """Longer windows are cut into pieces of this many tokens."""
    held_out_ratio: float = Field(0.15, gt=0, lt=1)
    """Share of requests never trained on: the offline gate scores versions on the newest of them."""
    held_out_samples: int = Field(32, ge=1)
    divergence_threshold: float = Field(0.5, ge=0, lt=1)
    """Training goes back to its last good state when on the same held-out windows its accepted tokens per step is
    below this
    share of that state's, or its loss above that state's divided by it; 0 turns this off."""
    registration_interval: Duration = Field(30, gt=0)
    parent_line: str = ""
    """Line whose champion a line without one begins with, as far as shapes allow; empty begins at day 0."""
    checkpoint_interval: Duration = Field(60, gt=0)
    metrics_interval: Duration = Field(10, gt=0)
    """A point of each curve in MLflow stands for so long a time."""
    poll_interval: Duration = Field(1.0, gt=0)
    num_threads: int = Field(1, ge=1)
    seed: int = 0


class Promoter(Section):
    """The process that moves aliases."""

    host: str = "127.0.0.1"
    port: int = Field(16068, ge=0, le=65535)
    poll_interval: Duration = Field(2.0, gt=0)
    gate_margin: float = 0.0
    """A candidate must beat the champion's accepted tokens per step on the held-out set by more than this."""
    gate_min_samples: int = Field(4, ge=1)
    """Held-back windows that a comparison needs."""
    gate_label_margin: float = Field(0.05, ge=0)
    """On no label may a candidate's accepted tokens per step be lower than the champion's by more than this."""
    gate_label_min_samples: int = Field(4, ge=1)
    """Held-back windows that a label needs to be compared for itself; those with fewer are taken together."""
    canary_margin: float = Field(0.05, gt=0, lt=1)
    """Share by which a canary may be slower than the champion and still become champion."""
    canary_error: float = Field(0.05, gt=0, lt=1)
    """Chance that a trial promotes a canary that is slower by the margin, and that it takes back one that is not slower
    at all."""
    canary_min_requests: int = Field(200, ge=1)
    """Requests of canary and of champion that a trial waits for at least."""
    canary_timeout: Duration = Field(86_400, gt=0)
    """A trial that has not decided after this long ends."""
    canary_on_timeout: Literal["rollback", "estimate"] = "rollback"
    """Then the canary is taken back, without quarantine; or it is promoted where neither over all nor on a label its
    estimates are below the margin, which keeps ``canary_error`` no more."""
    watch_duration: Duration = Field(3600, ge=0)
    """A new champion is watched for so long; 0 never goes back by itself."""
    watch_min_ratio: float = Field(0.8, ge=0, lt=1)
    """It is taken back where its tokens per second or per verify step fall below this share of the champion's before
    it, on
    the labels that both have served."""
    watch_min_requests: int = Field(50, ge=1)
    """Requests of both, on such labels, that this takes."""
    cooldown: Duration = Field(3600, ge=0)
    """After an automatic rollback nothing is promoted automatically for so long; each further one within
    ``cooldown_window`` doubles it."""
    cooldown_window: Duration = Field(86_400, ge=0)


class Canary(Section):
    """The trial of a candidate on live traffic before it becomes champion; read by nodes and promoter alike."""

    share: float = Field(0.0, ge=0, le=1)
    """Share of a node's time in which it serves the version that ``canary`` names: 1 makes it a canary node, 0 keeps it
    on the champion. A promoter with 0 holds no trials."""
    slice_duration: Duration = Field(30, gt=0)
    """A node serves one of the two for so long before chance, seeded by its name, decides anew."""


def _seconds_or_auto(value: Any) -> Any:
    """Told here, because of a union each part would tell its own error."""
    with suppress(TypeError, ValueError):
        if value == "auto" or float(_seconds(value)) >= 0:
            return value
    raise ValueError("neither a duration nor 'auto'")


class Update(Section):
    """When a node takes over a newer version. Steps back, canaries and their ends are never delayed."""

    min_interval: Annotated[Duration | Literal["auto"], BeforeValidator(_seconds_or_auto)] = 0.0
    """Least time between two takeovers; 0 follows at once, ``auto`` weighs what they cost against what they bring."""
    jitter: float = Field(0.1, ge=0, le=1)
    """Up to this share of the interval is added, another one for each node and version: not all fetch at once."""
    max_staleness: Duration = Field(900, gt=0)
    """A node that has been behind for so long takes the newest version over in any case."""


class Telemetry(Section):
    """What every process tells of its work (``schemas.telemetry.spans``)."""

    log_spans: bool = True
    """A line in the log for each request, chunk, commit, version, move and swap, with its trace id."""
    endpoint: str = ""
    """OpenTelemetry collector that spans are sent to by OTLP over HTTP, as http://collector:4318; empty sends none."""
    headers: Options = Field(default_factory=dict)
    """Sent with every batch of spans, as a collector behind a login wants them."""
    export_interval: Duration = Field(5, gt=0)
    """Spans wait so long for others to be sent with."""
    timeout: Duration = Field(10, gt=0)


class Stack(Section):
    """The embedded stack of ``aurora up`` and ``aurora demo``."""

    data_dir: str = ".aurora"
    kafka_port: int = Field(19092, ge=1, le=65535)
    kafka_controller_port: int = Field(19093, ge=1, le=65535)
    mlflow_port: int = Field(15000, ge=1, le=65535)


class Settings(Section):
    """Everything that can be set, by section."""

    kafka: Kafka = Kafka()
    tables: Tables = Tables()
    registry: Registry = Registry()
    target: Target = Target()
    speculator: Speculator = Speculator()
    serve: Serve = Serve()
    traces: Traces = Traces()
    sglang: Sglang = Sglang()
    stream: Stream = Stream()
    drift: Drift = Drift()
    train: Train = Train()
    promoter: Promoter = Promoter()
    canary: Canary = Canary()
    update: Update = Update()
    telemetry: Telemetry = Telemetry()
    stack: Stack = Stack()

    @model_validator(mode="after")
    def _held_together(self) -> Settings:
        if self.train.replay_batch_size >= self.train.batch_size:
            raise ValueError("train.replay_batch_size must be below train.batch_size, or nothing new is learned")
        return self
