"""The sections of the settings. The docstring of a setting is its entry in the reference."""

from __future__ import annotations

from contextlib import suppress
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from schemas.settings.types import (
    Duration,
    LocalPath,
    Location,
    Options,
    Secret,
    Section,
    parse_duration,
    strip_listener,
)

Device = Literal["auto", "cpu", "cuda"]
PrefixScope = Literal["request", "label", "node"]
ToolCallParserName = Literal["auto", "hermes", "llama3_json"]
SuffixScope = Literal["request", "label", "node", "fleet"]
Objective = Literal["kl", "reverse-kl", "tv", "lk"]

DAY_0 = "day-0"
"""Prefix of the version strings of day-0 drafts, which are not in the registry."""


class Kafka(Section):
    """The Kafka broker and its topics."""

    bootstrap_servers: Annotated[str, AfterValidator(strip_listener)] = "127.0.0.1:19092"
    """Addresses of brokers, ``host:port``, separated by commas."""
    traces_topic: str = "aurora.traces.v1"
    """Topic of the trace records."""
    speculators_topic: str = "aurora.speculators.v1"
    """Compacted topic of the alias moves."""
    answers_topic: str = "aurora.answers.v1"
    """Topic of the answers that nodes draft from."""
    drift_topic: str = "aurora.drift.v1"
    """Topic of the drift events."""
    lag_topic: str = "aurora.lag.v1"
    """Topic by which a lagging trainer asks the nodes for fewer traces."""
    partitions: int = Field(2, ge=1)
    """Partitions of the traces topic, the maximum number of stream workers that share it."""
    replication_factor: int = Field(1, ge=1)
    """Replicas of every topic. With 3 or more, more than half of them must acknowledge a record."""
    retention: Duration = Field(72 * 3600, gt=0)
    """Time for which all topics but ``speculators_topic`` keep a record, and a node the answers that it drafts from."""
    max_message_bytes: int = Field(1_000_000, ge=10_000)
    """Maximum size of a trace message. A longer request is split into several chunks."""
    client_options: Options = Field(default_factory=dict)
    """Options passed unchanged to every Kafka client, by their librdkafka names. Use them for SASL and TLS."""


def _refuse_unsafe(options: dict[str, str]) -> dict[str, str]:
    for name, value in options.items():
        key, set_to = name.lower(), value.strip().lower()
        if (key.endswith("allow_unsafe_rename") and set_to not in {"false", "0", "no", "off", ""}) or (
            key.endswith("conditional_put") and set_to == "disabled"
        ):
            raise ValueError(
                f"{name} = {value!r} lets two commits replace each other, so that rows are lost; remove it, and use a "
                f"store with conditional writes"
            )
    return options


class Tables(Section):
    """The Delta tables."""

    uri: Location = ".aurora/tables"
    """Folder or object-store prefix of the Delta tables."""
    storage_options: Annotated[Options, AfterValidator(_refuse_unsafe)] = Field(default_factory=dict)
    """Object-store options of the Delta library, such as endpoint, keys and timeouts. Options with which commits can
    replace each other are refused."""
    maintenance_interval: Duration = Field(600, gt=0)
    """Interval between two maintenance runs of the stream worker: compaction, retention and vacuum."""
    target_file_size_mb: int = Field(128, ge=1)
    """Approximate size of the files that compaction writes, in MiB."""
    batches_retention: Duration = Field(14 * 86_400, ge=86_400)
    """Retention of ``accepted`` and ``rejected``, by the time of their Kafka records. Whole days are deleted."""
    traces_retention: Duration = Field(90 * 86_400, ge=86_400)
    """Retention of ``traces``, by the time of their Kafka records. Whole days are deleted."""
    dead_letters_retention: Duration = Field(90 * 86_400, ge=86_400)
    """Retention of ``dead_letters``, by the time of their Kafka records. Whole days are deleted."""
    vacuum_retention: Duration = Field(24 * 3600, ge=2 * 3600, le=336 * 3600)
    """Time for which vacuum keeps files that compaction or retention removed, for time travel and running queries."""
    reader_lease: Duration = Field(72 * 3600, ge=3600, le=336 * 3600)
    """Time for which vacuum keeps files that a reader has not read yet, counted from the reader's last announcement and
    from the addition of the files."""


class Registry(Section):
    """The MLflow registry of speculator versions."""

    tracking_uri: str = "http://127.0.0.1:15000"
    """Address of the MLflow server."""
    username: str = ""
    """Username of this process, for a server with basic authentication."""
    password: Secret = SecretStr("")
    """Password of this process, for a server with basic authentication."""
    timeout: Duration = Field(10, gt=0)
    """Timeout of one request to the server, rounded up to whole seconds."""


class Target(Section):
    """The target model."""

    path: LocalPath = ".aurora/models/smollm2-135m-instruct"
    """Folder of the target in Hugging Face format: ``config.json``, safetensors and tokenizer."""
    served_model_name: str = "smollm2-135m-instruct"
    """Name of the model in the HTTP API."""
    fingerprint_cache: LocalPath = ".aurora/target-fingerprints.json"
    """File with the hashes of the target's files, so that a process does not read the whole target at each start.
    Processes of several machines may share it next to a shared target; empty keeps no hashes."""


class Speculator(Section):
    """The day-0 draft. Together with the target it determines the speculator line."""

    draft_vocab_size: int = Field(8192, ge=16)
    """Size of the draft vocabulary. The day-0 draft uses the lowest token ids, which byte-pair tokenizers order by
    frequency."""
    draft_vocab_file: LocalPath = ""
    """File with the token ids of the draft vocabulary, as ``aurora vocabulary`` writes it. It overrides
    ``draft_vocab_size``."""
    intermediate_size: int = Field(0, ge=0)
    """Width of the draft's MLP; 0 uses the target's."""
    num_key_value_heads: int = Field(0, ge=0)
    """Key and value heads of the draft; 0 uses the target's number."""
    variant: Literal["eagle3", "eagle3.1"] = "eagle3.1"
    """Architecture. ``eagle3.1`` also normalizes the target's hidden states and the hidden state that is passed from
    one drafting step to the next."""
    init: Literal["head", "random"] = "head"
    """Weights of the day-0 draft. ``head`` starts near the target's output: with the target's output layer, and with
    the highest captured layer passed through to it. ``random`` uses random weights only."""
    seed: int = 0
    """Seed of the random weights. Nodes and trainer must use the same seed."""
    day_0_folder: str = ""
    """Folder of a trained EAGLE-3 draft, as SGLang, SpecForge, vLLM or speculators load it, with which the line begins.
    It overrides the other settings of this section. Nodes and trainer must use the same files."""

    @property
    def day_0(self) -> str:
        """Version string of the day-0 draft, such as ``day-0-head-0``; within a line it identifies the weights."""
        named = PurePath(self.day_0_folder).name
        return f"{DAY_0}-{named}" if named else f"{DAY_0}-{self.init}-{self.seed}"


class Serve(Section):
    """The serving node."""

    host: str = "127.0.0.1"
    """Address on which the HTTP API listens."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of the HTTP API; 0 selects a free port."""
    node: str = "node-0"
    """Name of the node, unique within the fleet."""
    engine: Literal["builtin", "sglang", "vllm"] = "builtin"
    """Inference engine: the built-in engine, or SGLang's or vLLM's own server, which ``aurora serve`` starts."""
    speculate: bool = True
    """Whether the node decodes speculatively. False serves the target alone."""
    drafter: Literal["hybrid", "eagle", "suffix"] = "hybrid"
    """Drafters of the node. ``eagle`` is the speculator. ``suffix`` needs no training and uses no version: it continues
    the longest match of a request's last tokens in the request itself and in recent traced answers, which
    ``suffix_scope`` selects. ``hybrid`` uses each where its tokens are worth their time, and merges both drafts of a
    request into one tree; with SGLang and vLLM, which have no ``suffix``, it takes the better chain."""
    suffix_scope: SuffixScope = "label"
    """Answers that the suffix drafter continues for a request, in addition to the request's own tokens: ``request``
    none, ``label`` those to requests with the same label, ``node`` all of this node, ``fleet`` all of all nodes. With
    ``label``, requests without a label have their own tokens alone. Clients can measure what others were answered:
    see the security page."""
    suffix_corpus_bytes: int = Field(32 << 20, ge=1 << 16)
    """Maximum size of the suffix drafter's earlier answers in memory, over all labels: 73 bytes per token. The oldest
    answers are overwritten."""
    suffix_start_answers: int = Field(20_000, ge=0)
    """Number of newest answers that a node reads from the answers topic at start."""
    prefix_cache_bytes: int = Field(256 << 20, ge=0)
    """Maximum size of the built-in engine's prefix cache, in which a request finds the beginning of its prompt if an
    earlier request had it; 0 turns it off. A token takes the size of its keys and values, and of its features in bf16.
    The blocks that were used least recently are evicted. Memory is used as it fills; on a GPU from the start."""
    prefix_scope: PrefixScope = "label"
    """Requests that share cached prefixes, beside the choices of one request: ``request`` none, ``label`` those with
    the same label and ``cache_salt``, of which at least one is set, ``node`` all of this node with the same
    ``cache_salt``. Clients can find out what a prompt in their scope began with: see the security page."""
    num_speculative_tokens: int = Field(6, ge=1, le=16)
    """Maximum depth of a speculator's draft: draft tokens in sequence per verify step."""
    draft_tree_width: int = Field(1, ge=1, le=8)
    """Nodes that the speculator continues at each depth of a draft tree. With adaptive drafting up to three tokens
    after a node are verified where each is worth it, also if one is continued; without it, 1 drafts chains."""
    draft_tree_nodes: int = Field(16, ge=1, le=128)
    """Maximum draft tokens of one request that the target verifies in one step."""
    device: Device = "auto"
    """Device of the built-in engine. ``auto`` uses a GPU if there is one."""
    adaptive_drafting: bool = True
    """Whether the node drafts and verifies the tokens with the highest expected output rate, which may be none. False
    drafts to ``num_speculative_tokens`` with every drafter and verifies all."""
    weight_dtype: Literal["auto", "float32", "float16", "int8"] = "auto"
    """Data type of the target's weights in the matrix kernels. ``auto`` times the kernels that reproduce the target
    exactly, at start, and uses the fastest."""
    max_num_seqs: int = Field(8, ge=1)
    """Maximum sequences decoded together. Further sequences wait."""
    max_prefill_stall: Duration = Field(0.06, gt=0)
    """Maximum time that prompt tokens may add to a step while other requests decode. Target and speculator share it:
    the node splits what they read of prompts accordingly, from the measured cost of a token."""
    max_model_len: int = Field(1024, ge=16)
    """Maximum tokens of a request, prompt and output together."""
    max_waiting_requests: int = Field(256, ge=1)
    """Maximum requests that wait for decoding. Further requests are rejected with status 429."""
    max_choices: int = Field(32, ge=1)
    """Maximum choices of one request: its prompts times ``n``."""
    tool_call_parser: ToolCallParserName = "auto"
    """How the target writes tool calls: as Hermes and Qwen do (``hermes``), as Llama 3 does (``llama3_json``), or as
    its chat template shows (``auto``)."""
    max_body_bytes: int = Field(4 << 20, ge=1024)
    """Maximum size of a request body. A larger body is rejected before it is read."""
    drain_delay: Duration = Field(0, ge=0)
    """Time after SIGTERM in which ``/ready`` returns 503 and new requests are still accepted: as long as load balancers
    need to notice. After it new requests are rejected."""
    drain_timeout: Duration = Field(8, ge=0)
    """Time for running requests to finish, after ``drain_delay``. Requests that still run then end with an error."""
    api_keys_file: LocalPath = ""
    """File with the API keys of ``/v1``, one per line; empty accepts requests without a key. The node reads it at each
    request, so keys can be rotated without a restart."""
    admin_host: str = "127.0.0.1"
    """Address on which the admin API listens if it has its own port."""
    admin_port: int = Field(0, ge=0, le=65535)
    """Port of the admin API; 0 serves it on ``port``."""
    admin_token: Secret = SecretStr("")
    """Bearer token of the admin API. Without a token the admin API is closed."""
    admin_tokens_file: LocalPath = ""
    """File with further tokens of the admin API, one per line. The node reads it at each call, so tokens can be rotated
    without a restart."""
    webhook_secret: Secret = SecretStr("")
    """Secret with which the registry signs its webhooks. Without it ``/webhooks/registry`` is closed."""
    num_threads: int = Field(1, ge=1)
    """CPU threads of torch."""
    poll_interval: Duration = Field(2, gt=0)
    """Interval between two requests to the registry for the version of the alias."""
    alias: str = "champion"
    """Alias whose version the node serves."""


class Traces(Section):
    """The trace records that a node publishes."""

    enabled: bool = True
    """Whether the node publishes traces."""
    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Ratio of requests that are traced. The request id decides, and a request is traced completely or not at all."""
    max_bytes_per_second: int = Field(0, ge=0)
    """Maximum trace bytes that a node publishes per second; 0 sets no limit. Beyond it the node drops the features of
    the chunks with the highest ratio of accepted draft tokens, and no verify step."""
    features: Literal["inline", "claim-check", "recompute"] = "inline"
    """How the target's hidden states reach the trainer: in the records, in files of an object store, or not at all.
    With ``recompute`` the trainer runs the target itself."""
    claim_check_uri: Location = ".aurora/claims"
    """Folder or object-store prefix of claim-check files. Nodes and stream workers must use the same."""
    claim_check_options: Options = Field(default_factory=dict)
    """Options of Arrow's S3 file system for an ``s3://`` URI, such as region, endpoint_override, access_key and
    secret_key."""
    claim_check_max_bytes: int = Field(8 << 20, ge=1 << 16)
    """Maximum size of a claim-check file. A longer request is split into several chunks."""
    top_k: int = Field(8, ge=1)
    """Target tokens recorded per position, with their log-probabilities."""
    max_queue_bytes: int = Field(64 << 20, ge=1 << 20)
    """Maximum size of the traces that wait for the broker. Beyond it the node drops and counts new traces."""
    circuit_breaker_failures: int = Field(5, ge=1)
    """Consecutive failed deliveries that open the circuit breaker."""
    circuit_breaker_probe_interval: Duration = Field(5, gt=0)
    """Interval between two probes, of one chunk each, while the circuit breaker is open."""


class Sglang(Section):
    """SGLang's server with Aurora's plugin, and the node beside it."""

    python: LocalPath = ""
    """Python interpreter of the environment with SGLang; empty uses the node's."""
    url: str = ""
    """Address of a running server whose versions the node manages; empty starts a server."""
    api_key: Secret = SecretStr("")
    """SGLang's ``--admin-api-key``, or its ``--api-key`` if it has no other. The node sends it as
    ``Authorization: Bearer``."""
    draft_dir: LocalPath = ".aurora/sglang"
    """Folder for the draft and the configuration with which SGLang starts. On a shared file system each node needs its
    own."""
    adaptive: bool = True
    """Let SGLang draft less, down to nothing, while the draft is not accepted (``--speculative-adaptive``). It does so
    for chains; trees (``serve.draft_tree_width`` above 1) have a fixed size."""
    timeout: Duration = Field(120, gt=0)
    """Timeout of one step of a weight update. After it the node restores the previous version."""
    max_capture_ratio: float = Field(0.05, gt=0, le=1)
    """Maximum ratio of step time that capturing traces may take. Beyond it the plugin traces fewer new requests."""


class Vllm(Section):
    """vLLM's server with Aurora's plugin, and the node beside it."""

    python: LocalPath = ""
    """Python interpreter of the environment with vLLM; empty uses the node's."""
    url: str = ""
    """Address of a running server with Aurora's extension whose versions the node manages; empty starts a server."""
    api_key: Secret = SecretStr("")
    """Key that vLLM's development endpoints require, by which the node swaps versions; empty makes a new one at each
    start. It is not the key of the API, which is vLLM's ``--api-key``."""
    draft_dir: LocalPath = ".aurora/vllm"
    """Folder for the draft with which vLLM starts, for newer versions on their way, and for metrics. On a shared file
    system each node needs its own."""
    timeout: Duration = Field(120, gt=0)
    """Timeout of a weight update."""
    max_capture_ratio: float = Field(0.05, gt=0, le=1)
    """Maximum ratio of step time that capturing traces may take. Beyond it the plugin traces fewer new requests."""


class Stream(Section):
    """The stream worker."""

    host: str = "127.0.0.1"
    """Address on which ``/status`` and ``/metrics`` listen."""
    port: int = Field(16066, ge=0, le=65535)
    """Port of ``/status`` and ``/metrics``."""
    group_id: str = "aurora-stream"
    """Kafka consumer group."""
    flush_bytes: int = Field(16 << 20, ge=1 << 10)
    """Bytes of buffered records that trigger a commit. A worker reads up to four times as many meanwhile, and the rows
    of a commit take several times this in memory."""
    flush_interval: Duration = Field(0, ge=0)
    """Age of the oldest buffered record that triggers a commit. 0 stands for 1 s with tables in a folder, and for 10 s
    in an object store, where a commit takes some 20 requests."""
    flush_records: int = Field(1024, ge=1)
    """Buffered records that trigger a commit, however small they are. After a crash as many are written one by one."""
    data_dir: LocalPath = ".aurora/stream"
    """Folder for Faust's local state."""
    context_tokens: int = Field(32, ge=1)
    """Tokens stored before the root of a rejected branch."""
    duplicate_window: int = Field(10_000, ge=0)
    """Records of a partition for which a chunk is remembered. A repeated chunk becomes a dead letter; 0 disables the
    check."""
    session_timeout: Duration = Field(10, ge=6)
    """Time after which the partitions of a killed worker are assigned to another one. Brokers reject less than 6 s."""
    static_member: str = ""
    """Name with which the worker is a static member of its group (Kafka's ``group.instance.id``), unique among workers.
    If it is back within ``session_timeout``, it takes its partitions again, and the others do not pause for that; the
    partitions of a worker that ends wait that long. Empty is a dynamic member, whose partitions are assigned when it
    ends."""


class Drift(Section):
    """Detection of changes in a speculator's acceptance."""

    delta: float = Field(1e-4, gt=0, lt=1)
    """Confidence parameter of the detector (ADWIN). A lower value gives fewer false alarms and later detection."""
    window_records: int = Field(5_000, ge=100)
    """Minimum number of recent records of a partition behind the figures; the maximum is twice as many."""
    min_requests: int = Field(30, ge=5)
    """Minimum number of requests before and after a change for a drift event."""


class Train(Section):
    """The trainer."""

    host: str = "127.0.0.1"
    """Address on which ``/status`` and ``/metrics`` listen."""
    port: int = Field(16067, ge=0, le=65535)
    """Port of ``/status`` and ``/metrics``; 0 selects a free port."""
    checkpoint_dir: LocalPath = ".aurora/train"
    """Folder of the trainer's checkpoints, on a file system that all processes of ``torchrun`` share."""
    warm_start: str = "alias"
    """Initial weights of a trainer without a checkpoint: ``alias`` uses the champion, or the day-0 draft if there is
    no champion; ``day-0`` uses the day-0 draft; a number is a version of the line; any other text is a folder."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer of the hidden layer's matrices. AdamW always updates vocabulary matrices and norms."""
    learning_rate: float = Field(1.5e-3, gt=0)
    """Learning rate of AdamW."""
    warm_start_learning_rate: float = Field(0.0, ge=0)
    """Learning rate in place of ``learning_rate`` for a trainer that began with a trained draft, not with the day-0
    draft; 0 uses ``learning_rate``. A lower rate keeps more of what the draft knows and follows the traffic later.
    Muon's learning rate changes in proportion."""
    adamw_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the mean gradient: it averages over about 1 / (1 - beta) training steps."""
    adamw_beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the mean squared gradient. A higher value averages over more training steps, and adapts later to
    gradients of another size."""
    muon_learning_rate: float = Field(0.0, ge=0)
    """Learning rate of Muon; 0 uses ``learning_rate``, for which updates are scaled to the size of AdamW's."""
    newton_schulz_steps: int = Field(5, ge=1, le=20)
    """Newton-Schulz iterations with which Muon orthogonalizes an update. Fewer are cheaper, and keep directions with
    small gradients small."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices; norms have none."""
    warmup_steps: int = Field(20, ge=0)
    """Training steps over which the learning rate rises from zero."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum norm of the gradient; larger gradients are clipped."""
    ema_decay: float = Field(0.98, ge=0, lt=1)
    """Decay of the exponential moving average (EMA) of the weights. The average is evaluated and registered; 0 uses the
    weights themselves."""
    device: Device = "auto"
    """Device for training and evaluation. Processes started by ``torchrun`` use one GPU each."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of matrix products; weights, EMA and optimizer state are always float32. ``auto`` uses bfloat16 on a
    CPU with native support (AMX, AVX-512 BF16), where it is nearly twice as fast, and float32 otherwise."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How ``torchrun`` processes hold the draft: a full replica each (``ddp``), or a shard each (``fsdp2``)."""
    ttt_steps: int = Field(3, ge=1, le=16)
    """Steps of the training-time test (TTT), one for each token of a drafted chain."""
    ttt_decay: float = Field(0.8, gt=0, le=1)
    """Factor on the loss weight from one TTT step to the next."""
    objective: Objective = "kl"
    """Divergence that is minimized at accepted positions; see ``trainer.objective.divergences``."""
    rejected_weight: float = Field(0.1, ge=0)
    """Weight of the loss over rejected branches."""
    rejected_objective: Objective = "kl"
    """Divergence that is minimized on rejected branches."""
    rejected_min_prob: float = Field(0.1, ge=0, le=1)
    """Minimum probability that the draft gave the first rejected token of a branch; other branches are not trained
    on."""
    rejection_weight: float = Field(0.0, ge=0)
    """Additional weight of positions where the serving draft was rejected and the trained draft still would be."""
    suffix_predicted_weight: float = Field(1.0, ge=0)
    """Weight of positions that the suffix drafter predicts from the request's own tokens, relative to the others; 0
    leaves them out."""
    policy_weight: float = Field(0.0, ge=0)
    """Weight of a policy gradient on the accepted tokens per step."""
    batch_size: int = Field(4, ge=1)
    """Samples per training step."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Parts into which a batch is split. More parts need less memory; the gradient stays the same."""
    replay_batch_size: int = Field(3, ge=0)
    """Samples of a batch that come from the replay buffer while new samples are available. Must be below
    ``batch_size``."""
    catch_up_steps: int = Field(8, ge=0)
    """Backlog, in training steps of new samples, beyond which fewer samples are replayed; 0 always replays the same
    number and lags."""
    max_lag: Duration = Field(3600, ge=0)
    """Age of the oldest unread commit beyond which the trainer skips requests, those without rejected branches first,
    and asks the nodes to publish fewer; 0 always trains on all."""
    replay_buffer_size: int = Field(2048, ge=1)
    """Maximum samples in the replay buffer."""
    replay_buffer_bytes: int = Field(8 << 30, ge=1024)
    """Maximum size of the replay buffer, in memory and on disk together. Beyond it, the oldest samples are removed."""
    replay_memory_bytes: int = Field(2 << 30, ge=1024)
    """Maximum size of the replay buffer in memory. Beyond it, the features of the oldest samples are in files."""
    spill_dir: LocalPath = ""
    """Folder on a local disk for these files; empty uses ``checkpoint_dir``. The trainer deletes them when it starts
    and when it ends."""
    replay_half_life: float = Field(0.0, ge=0)
    """Age, in samples, at which the replay probability of a sample halves; 0 replays all samples with equal
    probability."""
    label_balance: float = Field(0.0, ge=0, le=1)
    """Balance between traffic labels: 0 uses labels as often as they arrive, 1 uses all labels equally."""
    staleness_half_life: float = Field(16.0, ge=0)
    """Age, in versions of the draft, at which the weight of a rejected branch halves; 0 weights all branches
    equally."""
    max_epochs: int = Field(8, ge=1)
    """Maximum epochs over a sample. A trainer without new samples then waits."""
    self_generation: Duration = Field(600, ge=0)
    """Time for which the target generates prompts and answers to train on, before the first traffic and in each pause
    of it. One thread of the trainer generates beside the training; traffic ends both. 0 disables it."""
    self_generation_idle: Duration = Field(60, ge=0)
    """Time without new samples of traffic and without anything left to train on, after which the target answers past
    prompts again."""
    self_generation_share: float = Field(1.0, gt=0, le=1)
    """Share of that time for which the target generates, and for which generated samples are trained on; both rest in
    between."""
    self_generation_target_bytes: int = Field(1 << 30, ge=0)
    """Maximum size of the target's weight files for it. The trainer holds the whole target in memory, in float32."""
    max_sample_tokens: int = Field(512, ge=2)
    """Maximum tokens of a sample that are learned from. Longer requests become several samples."""
    context_tokens: int = Field(1024, ge=0)
    """Tokens of the request before those of a sample that the draft attends to. On nodes of the built-in engine the
    draft reads as many tokens before the end of a prompt; other engines let it read the whole prompt."""
    join_timeout: Duration = Field(120, gt=0)
    """Time without a new chunk after which a request is trained on without its last chunk."""
    join_bytes: int = Field(256 << 20, ge=0)
    """Maximum bytes of features of requests whose last chunk is not read yet. Beyond it, the oldest ones are trained
    on without it."""
    held_out_ratio: float = Field(0.15, gt=0, lt=1)
    """Ratio of prompts that are drawn for the held-out set, on which the offline gate evaluates versions."""
    held_out_samples: int = Field(32, ge=1)
    """Maximum samples in the held-out set, which labels share equally. In the gate, the weight of a label is its share
    of four times as many samples, the newest of all traffic. Samples that leave the set are trained on."""
    held_out_bytes: int = Field(4 << 30, ge=1024)
    """Maximum size of the held-out set, which is kept in memory beside the replay buffer. Beyond it, prompts leave the
    set as if it held too many samples."""
    draft_vocab_min_coverage: float = Field(0.95, ge=0, lt=1)
    """Share of the traffic's output tokens within the draft vocabulary below which the trainer changes it, if as many
    tokens chosen by counts cover at least 0.02 more; 0 never changes it. It is not changed either if ``serve.engine``
    is not ``builtin``: other servers read the draft vocabulary at their start only."""
    draft_vocab_min_tokens: int = Field(20_000, ge=1)
    """Output tokens that the trainer counts before it changes the draft vocabulary."""
    divergence_threshold: float = Field(0.5, ge=0, lt=1)
    """The divergence guard restores the last good checkpoint when, on the same held-out set, the accepted tokens per
    step fall below this ratio of the champion's, or the loss exceeds the champion's divided by it; 0 disables the
    guard."""
    registration_interval: Duration = Field(30, gt=0)
    """Interval between two evaluations on the held-out set, after which a better version is registered."""
    parent_line: str = ""
    """Line whose champion initializes a line without a champion, as far as the shapes match; empty uses the initial
    draft."""
    checkpoint_interval: Duration = Field(60, gt=0)
    """Interval between two checkpoints."""
    metrics_interval: Duration = Field(10, gt=0)
    """Time span that one point of a training curve in MLflow represents."""
    poll_interval: Duration = Field(1.0, gt=0)
    """Interval between two reads of the tables while there are no new samples."""
    num_threads: int = Field(1, ge=1)
    """CPU threads of torch."""
    seed: int = 0
    """Seed of the sampler."""


class Promoter(Section):
    """The promoter, which moves aliases."""

    host: str = "127.0.0.1"
    """Address on which the loop's page, ``/status`` and ``/metrics`` listen."""
    port: int = Field(16068, ge=0, le=65535)
    """Port of the loop's page, ``/status`` and ``/metrics``; 0 selects a free port."""
    admin_token: Secret = SecretStr("")
    """Token with which the loop's page promotes and rolls back. Without it the page is read-only."""
    poll_interval: Duration = Field(2.0, gt=0)
    """Interval between two checks of the registry and the tables."""
    gate_margin: float = 0.0
    """Offline gate: gain over the champion, in accepted tokens per step on the held-out set, that the lower bound of a
    candidate's gain must exceed. The trainer registers no version below it."""
    gate_error: float = Field(0.05, gt=0, le=0.5)
    """Offline gate: probability that the lower bound exceeds the true gain, so that a candidate without a gain passes.
    A lower value needs more held-out prompts. On a label, probability that a candidate without a loss loses."""
    gate_min_samples: int = Field(4, ge=1)
    """Offline gate: minimum held-out samples for a comparison."""
    gate_label_margin: float = Field(0.05, ge=0)
    """Offline gate: maximum regression of a candidate on any label, in accepted tokens per step. A larger one counts
    where the upper bound of the candidate's gain on that label is negative."""
    gate_label_min_samples: int = Field(4, ge=1)
    """Offline gate: minimum held-out samples of a label for a separate comparison. Labels with fewer are pooled."""
    canary_margin: float = Field(0.05, gt=0, lt=1)
    """Canary analysis: ratio by which a canary may be slower than the champion and still be promoted."""
    canary_error: float = Field(0.05, gt=0, lt=1)
    """Canary analysis: probability of promoting a canary that is slower by the margin, and of rolling back a canary
    that is not slower."""
    canary_min_requests: int = Field(200, ge=1)
    """Canary analysis: minimum requests of the canary and of the champion before a decision."""
    canary_timeout: Duration = Field(86_400, gt=0)
    """Canary analysis: maximum duration without a decision."""
    canary_on_timeout: Literal["rollback", "estimate"] = "rollback"
    """Canary analysis: decision after ``canary_timeout``. ``rollback`` removes the canary without quarantine.
    ``estimate`` promotes it if no estimate, overall or on a label, is below the margin; ``canary_error`` does not hold
    then."""
    watch_duration: Duration = Field(86_400, ge=0)
    """Post-promotion watch: maximum time, from the first promotion after the anchor, for which the promoted versions
    are compared with it; 0 disables automatic rollback."""
    watch_min_ratio: float = Field(0.95, gt=0, lt=1)
    """Post-promotion watch: ratio of the anchor's speed that the promoted versions must be shown to exceed together.
    Then the champion becomes the next anchor."""
    watch_min_requests: int = Field(50, ge=1)
    """Post-promotion watch: minimum requests of the anchor and of the promoted versions before a decision."""
    cooldown: Duration = Field(3600, ge=0)
    """Time without automatic promotion after an automatic rollback. Each further rollback within ``cooldown_window``
    doubles it."""
    cooldown_window: Duration = Field(86_400, ge=0)
    """Time for which a rollback counts towards the cooldown of later ones."""
    keep_versions: int = Field(100, ge=0)
    """Number of newest versions of each line to keep; 0 keeps all. Older ones are deleted with their files, but none
    that an alias names, that was an anchor, that a node has served within ``keep_served``, or that is a parent of a
    kept one."""
    keep_served: Duration = Field(7 * 86_400, ge=0)
    """Time for which the traces of a version keep it from being deleted."""


class Canary(Section):
    """Two or three versions served in turn, for canary analysis and post-promotion watch; read by nodes and
    promoter."""

    share: float = Field(0.0, ge=0, le=1)
    """Ratio of time for which a node serves the version of the alias ``canary``: 1 makes it a canary node, 0 keeps it
    on the champion. A promoter with 0 runs no canary analysis."""
    anchor_share: float = Field(0.1, ge=0, le=1)
    """Ratio of time for which a node serves the anchor, the version of the alias ``previous``, during a post-promotion
    watch. A slice of a canary remains one. A promoter with 0 watches no promotion."""
    slice_duration: Duration = Field(30, gt=0)
    """Time for which a node serves one of the versions before it draws again. The draw is seeded by the node's name."""
    burn_in: Duration = Field(5, ge=0)
    """Time after a swap, and after the start of each time slice, in which requests that begin count for no version. It
    must be below ``slice_duration``."""


def _parse_interval(value: Any) -> Any:
    """Validate before the union does, whose members would report one error each."""
    with suppress(TypeError, ValueError):
        if value == "auto" or float(parse_duration(value)) >= 0:
            return value
    raise ValueError("neither a duration nor 'auto'")


class Update(Section):
    """When a node updates to a newer version. Rollbacks, canaries and the end of a canary are never delayed."""

    min_interval: Annotated[Duration | Literal["auto"], BeforeValidator(_parse_interval)] = 0.0
    """Minimum time between two updates; 0 updates immediately, ``auto`` weighs the cost of an update against its
    benefit."""
    jitter: float = Field(0.1, ge=0, le=1)
    """Maximum ratio of the interval that is added at random for each node and version, so that nodes do not download at
    the same time."""
    max_staleness: Duration = Field(900, gt=0)
    """Time after which a node updates to the newest version in any case."""


class Telemetry(Section):
    """Logs and traces of the processes (OpenTelemetry)."""

    log_spans: bool = True
    """Whether every span is also logged: requests, published chunks, commits, registrations, alias moves and swaps."""
    endpoint: str = ""
    """OpenTelemetry collector for OTLP over HTTP, such as ``http://collector:4318``; empty exports no spans."""
    headers: Options = Field(default_factory=dict)
    """HTTP headers of every export, for a collector with authentication."""
    export_interval: Duration = Field(5, gt=0)
    """Interval between two exports."""
    timeout: Duration = Field(10, gt=0)
    """Timeout of one export."""


class Stack(Section):
    """The embedded stack of ``aurora up`` and ``aurora demo``."""

    data_dir: LocalPath = ".aurora"
    """Folder for data and logs of all processes."""
    kafka_port: int = Field(19092, ge=1, le=65535)
    """Port of the embedded Kafka broker."""
    kafka_controller_port: int = Field(19093, ge=1, le=65535)
    """Port of the embedded Kafka controller."""
    mlflow_port: int = Field(15000, ge=1, le=65535)
    """Port of the embedded MLflow server."""


_SERVERS = {"sglang": "SGLang", "vllm": "vLLM"}
"""Engines that are another project's server, with its name."""


class Settings(Section):
    """All settings, by section."""

    kafka: Kafka = Kafka()
    tables: Tables = Tables()
    registry: Registry = Registry()
    target: Target = Target()
    speculator: Speculator = Speculator()
    serve: Serve = Serve()
    traces: Traces = Traces()
    sglang: Sglang = Sglang()
    vllm: Vllm = Vllm()
    stream: Stream = Stream()
    drift: Drift = Drift()
    train: Train = Train()
    promoter: Promoter = Promoter()
    canary: Canary = Canary()
    update: Update = Update()
    telemetry: Telemetry = Telemetry()
    stack: Stack = Stack()

    @model_validator(mode="after")
    def _check_engine(self) -> Settings:
        # A child process gets every setting as a variable, where a default looks like a value that was set.
        drafter = self.serve.drafter
        server = _SERVERS.get(self.serve.engine)
        if server is None:
            return self
        if drafter not in ("eagle", Serve.model_fields["drafter"].default):
            raise ValueError(
                f"serve.drafter = {drafter!r} needs serve.engine = 'builtin'; with {server} the suffix drafter only "
                "drafts next to the speculator (serve.drafter = 'hybrid')"
            )
        if self.serve.api_keys_file:
            raise ValueError(
                f"serve.api_keys_file needs serve.engine = 'builtin'; {server} serves the API itself: pass its "
                "--api-key"
            )
        if self.serve.engine == "vllm" and self.serve.draft_tree_width > 1:
            raise ValueError(
                f"serve.draft_tree_width = {self.serve.draft_tree_width} needs serve.engine = 'builtin' or 'sglang'; "
                "vLLM verifies chains only (serve.draft_tree_width = 1)"
            )
        return self

    @model_validator(mode="after")
    def _check_burn_in(self) -> Settings:
        if self.canary.burn_in >= self.canary.slice_duration:
            raise ValueError("canary.burn_in must be below canary.slice_duration; otherwise no request is compared")
        return self

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> Settings:
        if self.train.replay_batch_size >= self.train.batch_size:
            raise ValueError("train.replay_batch_size must be below train.batch_size; otherwise no new sample is used")
        return self
