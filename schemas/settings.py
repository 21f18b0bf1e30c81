"""Settings of every process: ``aurora.toml``, then ``AURORA_*`` variables, then flags; nothing else reads them.

One file serves all processes, each reads its sections, and every section is checked whichever process starts, so that
a typing error is found at once::

    [kafka]                                      AURORA_KAFKA__BOOTSTRAP=kafka:9092
    bootstrap = "kafka:9092"

An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    model_validator,
)

PREFIX = "AURORA_"
FILE = Path("aurora.toml")
MASK = "**********"
_SECRETS = ("serve.admin_token", "kafka.client", "tables.storage_options", "traces.claim_options")
"""Settings whose values no message shows."""
_SECRET_WORDS = ("secret", "password", "key", "token")


class SettingsError(ValueError):
    """A setting that cannot be used; the message says which, where it was read, and what to write instead."""


def _from_json(value: Any) -> Any:
    """Variables carry tables as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


def _no_mask(secret: SecretStr) -> SecretStr:
    """What is printed in a secret's place must never become the secret."""
    if set(secret.get_secret_value()) == {"*"}:
        raise ValueError("this is what `aurora settings` prints in place of a secret; write the secret itself")
    return secret


def _no_masks(options: dict[str, str]) -> dict[str, str]:
    if masked := [name for name, value in options.items() if _is_secret(name) and value and set(value) == {"*"}]:
        raise ValueError(f"{masked[0]} is what `aurora settings` prints in place of a secret; write the secret itself")
    return options


def _is_secret(option: str) -> bool:
    """Whether the value of an option of a client or a store is to be hidden, judged by the option's name."""
    return any(word in option.lower() for word in _SECRET_WORDS)


def _masked(options: Mapping[str, str]) -> dict[str, str]:
    return {name: MASK if _is_secret(name) and value else value for name, value in options.items()}


Secret = Annotated[SecretStr, AfterValidator(_no_mask)]
Options = Annotated[
    dict[str, str],
    BeforeValidator(_from_json),
    AfterValidator(_no_masks),
    PlainSerializer(_masked, when_used="json"),
]
"""Options of a client or a store; passwords and keys among them are masked wherever they are shown."""


class Section(BaseModel):
    """A part of the file; frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, _masked(value) if isinstance(value, dict) else value


class Kafka(Section):
    """The broker and its topics."""

    bootstrap: str = "127.0.0.1:19092"
    traces_topic: str = "aurora.traces.v1"
    speculators_topic: str = "aurora.speculators.v1"
    drift_topic: str = "aurora.drift.v1"
    partitions: int = Field(2, ge=1)
    """Partitions of the traces topic: so many stream workers can share it."""
    replication: int = Field(1, ge=1)
    """Copies of every topic. From 3 on a record is acknowledged when more than half of them have it."""
    retention_hours: float = Field(72, gt=0)
    """How long the traces and drift topics keep a record."""
    max_message_bytes: int = Field(1_000_000, ge=10_000)
    """Largest trace message; longer requests are cut into chunks below it."""
    client: Options = Field(default_factory=dict)
    """Passed to every Kafka client as it is (librdkafka names), for SASL and TLS."""


class Tables(Section):
    """Where the Delta tables are."""

    uri: str = ".aurora/tables"
    """Folder or object-store prefix that holds the Delta tables."""
    storage_options: Options = Field(default_factory=dict)
    """Options of the Delta library for an object store: its address, keys and timeouts."""
    maintain_every_s: float = Field(600, gt=0)
    """How often the stream merges small files, lets old days go, and deletes the files that nobody needs any more."""
    target_file_mb: int = Field(128, ge=1)
    """Files are merged up to about this size."""
    retention_days: int = Field(14, ge=1)
    """Days for which ``accepted`` and ``rejected`` are kept, by the time of their Kafka records."""
    traces_retention_days: int = Field(90, ge=1)
    dead_letters_retention_days: int = Field(90, ge=1)
    vacuum_hours: int = Field(24, ge=2, le=336)
    """Files that were merged or let go stay for so long: for earlier states, and for queries that run."""
    reader_lease_hours: int = Field(72, ge=1, le=336)
    """Files that a reader has not come to stay for so long after it was last heard of, and after they were added."""


class Registry(Section):
    """Where speculator versions are registered."""

    uri: str = "http://127.0.0.1:15000"
    """Address of the MLflow server."""
    timeout_s: float = Field(10, gt=0)


class Target(Section):
    """The model that is served."""

    path: str = ".aurora/models/smollm2-135m-instruct"
    """Folder with the target in Hugging Face format (config.json, safetensors, tokenizer)."""
    name: str = "smollm2-135m-instruct"
    """Name under which the API serves it."""


class Speculator(Section):
    """The draft of day 0, which with the target fixes the speculator line."""

    draft_vocabulary: int = Field(8192, ge=16)
    """D: tokens the draft can propose; day 0 takes the lowest ids, which a byte-pair tokenizer orders by frequency."""
    seed: int = 0
    """Seed of the random draft of day 0: nodes and trainer start from the same one."""


class Serve(Section):
    """The serving node."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    node: str = "node-0"
    speculate: bool = True
    draft_tokens: int = Field(6, ge=1, le=16)
    """Tokens that are drafted at most, one after the other."""
    draft_width: int = Field(1, ge=1, le=8)
    """1 drafts chains; more drafts trees that go on from so many tokens at each depth."""
    draft_nodes: int = Field(16, ge=1, le=128)
    """Drafted tokens of one request that the target verifies at most in a round."""
    adaptive: bool = True
    """Draft what is expected to give the most tokens per second, none included; false always drafts all it may."""
    weights: Literal["auto", "float32", "float16", "int8"] = "auto"
    """Kernel of the target's matrices; auto times at start those that compute the target exactly as it is."""
    max_batch: int = Field(8, ge=1)
    """Requests decoded together; further ones wait."""
    max_tokens: int = Field(1024, ge=16)
    """Longest request, prompt and answer together."""
    max_waiting: int = Field(256, ge=1)
    """Requests that wait for a place in the batch; further ones are refused with 429."""
    max_choices: int = Field(32, ge=1)
    """Answers that one request may ask for: its prompts times ``n``."""
    max_body_bytes: int = Field(4 << 20, ge=1024)
    """Longest body of a request; a longer one is refused before it is read."""
    drain_s: float = Field(8, ge=0)
    """After SIGTERM, time for the requests that run; what still runs then is ended with an error."""
    admin_token: Secret = SecretStr("")
    """Bearer token of the admin endpoints; without one they are closed."""
    threads: int = Field(1, ge=1)
    poll_s: float = Field(2, gt=0)
    """How often the registry is asked which version the alias names."""
    alias: str = "champion"


class Traces(Section):
    """What a node publishes of its verify rounds."""

    enabled: bool = True
    sample: float = Field(1.0, ge=0, le=1)
    """Share of the requests that are traced, drawn by their ids: a request is traced whole or not at all."""
    bytes_per_s: int = Field(0, ge=0)
    """Bytes of traces that a node publishes in a second at most; 0 sets no bound. Beyond it the easiest are shed."""
    features: Literal["inline", "claim-check", "recompute"] = "inline"
    """How the target's states travel: in the records, in files of an object store, or not at all: the trainer then runs
    the target itself."""
    claim_uri: str = ".aurora/claims"
    """Folder or object-store prefix for claim-check files; the same for nodes and stream workers."""
    claim_options: Options = Field(default_factory=dict)
    """For an s3:// address: options of Arrow's S3 file system, as region, endpoint_override, access_key, secret_key."""
    claim_bytes: int = Field(8 << 20, ge=1 << 16)
    """Largest claim-check file; longer requests are cut into chunks below it."""
    top_k: int = Field(8, ge=1)
    queue_bytes: int = Field(64 << 20, ge=1 << 20)
    """Bound on traces waiting for the broker; beyond it the newest are shed and counted."""
    breaker_after: int = Field(5, ge=1)
    """Failed deliveries in a row that open the breaker."""
    breaker_probe_s: float = Field(5, gt=0)
    """While the breaker is open, one chunk is tried this often."""


class Stream(Section):
    """The stream processor."""

    host: str = "127.0.0.1"
    port: int = Field(16066, ge=0, le=65535)
    group: str = "aurora-stream"
    flush_records: int = Field(256, ge=1)
    flush_s: float = Field(1.0, gt=0)
    """A batch is committed when it holds ``flush_records`` records or is this old."""
    data_dir: str = ".aurora/stream"
    context_tokens: int = Field(32, ge=1)
    """Tokens kept before the root of a rejected branch."""
    duplicate_window: int = Field(10_000, ge=0)
    """Records of a partition for which a chunk is remembered: one that repeats it is a dead letter; 0 turns it off."""
    session_s: float = Field(10, ge=6)
    """A killed worker's partitions are given to another one after this long; brokers refuse less than 6 s."""


class Drift(Section):
    """When a stream worker says that a speculator is accepted more or less often than before."""

    delta: float = Field(1e-4, gt=0, lt=1)
    """Confidence of the detector (ADWIN): lower gives fewer false alarms and later true ones."""
    window: int = Field(5_000, ge=100)
    """Records of a partition that figures look back on at least, and at most twice as many."""
    min_requests: int = Field(30, ge=5)
    """Requests before and after a change that it takes to be told."""


class Train(Section):
    """The trainer."""

    host: str = "127.0.0.1"
    port: int = Field(16067, ge=0, le=65535)
    dir: str = ".aurora/train"
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    clip: float = Field(1.0, gt=0)
    ttt_steps: int = Field(3, ge=1)
    """K: steps of the training-time test; one for each token of the drafted chain."""
    ttt_decay: float = Field(0.8, gt=0, le=1)
    rejected_weight: float = Field(0.1, ge=0)
    """Lambda: weight of the loss over rejected branches."""
    rejected_min_prob: float = Field(0.1, ge=0, le=1)
    """Only branches whose first rejected token the draft gave at least this probability are learned from."""
    windows_per_step: int = Field(4, ge=1)
    replay_per_step: int = Field(2, ge=0)
    """Windows of a step that are drawn from history while new ones are there."""
    history_windows: int = Field(2048, ge=1)
    """Windows kept in memory for replay."""
    max_passes: int = Field(8, ge=1)
    """Passes over a window at most; after them a trainer without new windows waits."""
    max_window_tokens: int = Field(512, ge=2)
    """Longer windows are cut into pieces of this many tokens."""
    held_back_share: float = Field(0.15, gt=0, lt=1)
    """Share of requests never trained on: the offline gate scores versions on the newest of them."""
    held_back_windows: int = Field(32, ge=1)
    register_every_s: float = Field(30, gt=0)
    checkpoint_every_s: float = Field(60, gt=0)
    poll_s: float = Field(1.0, gt=0)
    threads: int = Field(1, ge=1)
    seed: int = 0


class Promoter(Section):
    """The process that moves aliases."""

    host: str = "127.0.0.1"
    port: int = Field(16068, ge=0, le=65535)
    poll_s: float = Field(2.0, gt=0)
    margin: float = 0.0
    """A candidate must beat the champion's accept length on the held-back slice by more than this."""
    min_windows: int = Field(4, ge=1)
    """Held-back windows that a comparison needs."""


class Stack(Section):
    """The embedded stack of ``aurora up`` and ``aurora demo``."""

    dir: str = ".aurora"
    broker_port: int = Field(19092, ge=1, le=65535)
    controller_port: int = Field(19093, ge=1, le=65535)
    registry_port: int = Field(15000, ge=1, le=65535)


class Settings(Section):
    """Everything that can be set, by section."""

    kafka: Kafka = Kafka()
    tables: Tables = Tables()
    registry: Registry = Registry()
    target: Target = Target()
    speculator: Speculator = Speculator()
    serve: Serve = Serve()
    traces: Traces = Traces()
    stream: Stream = Stream()
    drift: Drift = Drift()
    train: Train = Train()
    promoter: Promoter = Promoter()
    stack: Stack = Stack()

    @model_validator(mode="after")
    def _held_together(self) -> Settings:
        if self.train.replay_per_step >= self.train.windows_per_step:
            raise ValueError("train.replay_per_step must be below train.windows_per_step, or nothing new is learned")
        return self


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from the file, the environment and the flags, the later ones first in rank.

    Args:
        file: ``aurora.toml`` of the working folder where None; a named file must exist.
        environ: The process's environment where None.
        flags: Dotted names to values; None values are flags that were not given.

    Raises:
        SettingsError: unreadable file, unknown key, or a value of the wrong kind.
    """
    merged = _read_file(file)
    for name, value in (os.environ if environ is None else environ).items():
        if name.startswith(PREFIX):
            _put(merged, name.removeprefix(PREFIX).lower().split("__"), value, name)
    for name, value in (flags or {}).items():
        if value is not None:
            _put(merged, name.split("."), value, f"flag {name}")
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(e) for e in error.errors())) from error


def to_environ(settings: Settings) -> dict[str, str]:
    """The settings as ``AURORA_*`` variables, so that a started process reads exactly what its parent read."""
    return {
        f"{PREFIX}{section}__{key}".upper(): _to_text(value)
        for section, values in settings.model_dump().items()
        for key, value in values.items()
    }


def _to_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None and not FILE.exists():
        return {}
    path = file or FILE
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such settings file") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error


def _put(tree: dict[str, Any], path: list[str], value: Any, source: str) -> None:
    if len(path) < 2 or not all(path):
        raise SettingsError(f"{source}: a setting is named SECTION__KEY, as in {PREFIX}KAFKA__BOOTSTRAP")
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"{source}: {part!r} is a value, not a section")
    tree[path[-1]] = value


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "settings"
    if error["type"] != "extra_forbidden":
        found = "" if name.startswith(_SECRETS) else f" (found {error['input']!r})"
        return f"{name}: {error['msg']}{found}" if path else str(error["msg"])
    known = _known_keys(path[:-1])
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*path[:-1], nearest[0]])!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{name}: unknown setting; {hint}"


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
