"""``aurora bench soak``: the real processes under load for a long time, with the faults of production.

A node as a process of its own, a registry and a broker; requests with and without grammars, tools and penalties, of
which some clients disconnect early; the alias moved to another version every few seconds; the broker stopped and
started twice. Afterwards no request may have failed, memory may not have grown, and every captured trace row must be
accounted for: in the topic, or counted as dropped.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import count, cycle
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import psutil

from ops.bench import prompts, speculator
from ops.bench.embedded_kafka import consume_all, free_port, open_consumer, running_broker, use_broker
from ops.bench.harness import Figure, Goal, Report, Say, Session
from ops.loadgen.load import Load, Prompt, Request, chat_request, read_api_key
from ops.local.kafka import Broker
from ops.local.mlflow_server import RegistryServer
from ops.local.parts import is_answering
from ops.local.process import Process
from ops.local.stack import provide_target
from schemas.errors import UserError
from schemas.settings import Kafka, Registry, Settings, to_environ
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from schemas.status import ServeStatus
from serving.http.tools import choose_format
from trainer.data.target import Target, read_target
from trainer.release.registry import SpeculatorRegistry

_OUTAGES = (0.3, 0.6)
"""When the broker is stopped, as shares of the time."""
_MAX_OUTAGE_S = 30.0
_OUTAGE_SHARE = 0.1
_MEMORY_INTERVAL_S = 2.0
_WARM_UP_SHARE = 1 / 3
"""Of the time: memory counts after it, when every cache has been filled once."""
_READY_S = 120.0
_SETTLE_S = 120.0
_TICK_S = 0.2
_PROGRESS_INTERVAL_S = 60.0
_RESPONSE_TIMEOUT_S = 300.0
_MIN_TOKENS, _MAX_TOKENS = 8, 96
_OBJECT = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 40}}, "required": ["answer"]}
_TOOL = {"type": "function", "function": {"name": "answer", "description": "Answers the user.", "parameters": _OBJECT}}
OPTIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"seed": 7},
    {"n": 2},
    {"top_p": 0.9, "top_k": 40, "min_p": 0.05},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"logit_bias": {"42": -100}, "min_tokens": 4},
    {"logprobs": True, "top_logprobs": 3},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": _OBJECT}}},
    {"structured_outputs": {"regex": "(yes|no), because [a-z ]{5,30}"}},
    {"tools": [_TOOL]},
    {"tools": [_TOOL], "tool_choice": "required"},
)
"""Further fields of requests, of which each request draws one set."""
_TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
"""Chat template with tools, for targets whose own one has none, as that of the demo's model."""
_MAX_EVENTS = 24
"""Events after which a client disconnects early, at most."""


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """How long, and how hard."""

    minutes: float
    concurrency: int
    swap_every_s: float
    leaving: float
    """Share of the clients that disconnect early."""
    speculator: str


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Resident bytes of the node, and the seconds since the load started."""

    seconds: float
    resident: int


@dataclass(frozen=True, slots=True)
class SoakResult:
    """Everything that the figures are made from."""

    load: Load
    status: ServeStatus
    rows_in_topic: int
    memory: tuple[MemorySample, ...]
    exit_code: int


def run(settings: Settings, options: SoakOptions, say: Say) -> Report:
    """Load a node, inject the faults, let it settle, stop it, and count."""
    session = Session(settings.serve.num_threads)
    provide_target(settings.target, say)
    target = read_target(settings)
    trained = speculator.load_speculator(settings, options.speculator, target.line)
    folder = Path(settings.stack.data_dir) / "bench" / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = provide_tools(Path(settings.target.path), folder / "target")
    settings = settings.model_copy(update={"target": settings.target.model_copy(update={"path": str(path)})})
    with _running_processes(settings, folder, say) as (node, broker, here):
        registry = SpeculatorRegistry(here.registry)
        versions = cycle(_register(registry, target, trained))
        requests = random_requests(here.target.served_model_name, options.leaving)
        key = read_api_key(here.serve)
        load = Load(_node_url(here), requests, options.concurrency, timeout_s=_RESPONSE_TIMEOUT_S, api_key=key)
        load.start()

        def swap() -> None:
            registry.set_alias(target.line, "champion", next(versions))

        memory = _inject_faults(node, broker, load, options, swap, say)
        say("no further requests; waiting for the last outputs and traces")
        load.stop()
        load.wait()
        status = _wait_settled(here)
        node.stop()
        assert node.exit_code is not None, "a stopped process has an exit code"
        result = SoakResult(load, status, count_topic_rows(here.kafka), tuple(memory), node.exit_code)
    about = {"options": asdict(options), "logs": str(folder)}
    return session.report(f"soak of {options.minutes:g} minutes", about, judge(result, options))


def provide_tools(target: Path, folder: Path) -> Path:
    """Return a target's folder whose chat template takes tools: its own, or a new one that links to its files."""
    tokenizer = prompts.load_tokenizer(target)
    if choose_format(tokenizer.chat_template, "auto") is not None:
        return target
    folder.mkdir()
    for file in target.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    template = folder / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.write_text(_TEMPLATE)
    return folder


def _inject_faults(
    node: Process, broker: Broker, load: Load, options: SoakOptions, swap: Callable[[], None], say: Say
) -> list[MemorySample]:
    """Move the alias and stop and start the broker when it is due; return samples of the node's memory."""
    seconds, started, stopped_at = options.minutes * 60, time.monotonic(), None
    outages, outage_s = [share * seconds for share in _OUTAGES], min(_MAX_OUTAGE_S, _OUTAGE_SHARE * seconds)
    swap_at = sample_at = 0.0
    progress_at = _PROGRESS_INTERVAL_S
    memory: list[MemorySample] = []
    process = psutil.Process(node.pid)
    while (now := time.monotonic() - started) < seconds:
        if not node.alive:
            raise UserError(f"the node ended with code {node.exit_code}; read {node.log}")
        if now >= swap_at:
            swap()
            swap_at = now + options.swap_every_s
        if now >= sample_at:
            memory.append(MemorySample(now, process.memory_info().rss))
            sample_at = now + _MEMORY_INTERVAL_S
        if stopped_at is None and outages and now >= outages[0]:
            say(f"stopping the broker for {outage_s:.0f} s")
            broker.stop()
            outages.pop(0)
            stopped_at = now
        if stopped_at is not None and now >= stopped_at + outage_s:
            broker.start()
            stopped_at = None
            say("the broker is back")
        if now >= progress_at:
            errors = len(load.errors)
            say(
                f"{now / 60:.0f} min: {len(load.responses) - errors} answered, {load.disconnected} disconnected, "
                f"{errors} errors, {memory[-1].resident / 2**20:.0f} MiB"
            )
            progress_at = now + _PROGRESS_INTERVAL_S
        time.sleep(_TICK_S)
    if stopped_at is not None:
        broker.start()
    return memory


def _wait_settled(settings: Settings) -> ServeStatus:
    """Return the node's status when no request runs and no trace row is pending."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        with urllib.request.urlopen(f"{_node_url(settings)}/status", timeout=30) as response:  # noqa: S310
            status = ServeStatus.model_validate_json(response.read())
        busy = status.requests_running or status.requests_waiting or status.rows_pending
        if not busy or time.monotonic() > deadline:
            return status
        time.sleep(_TICK_S)


def random_requests(model: str, leaving: float, seed: int = 0) -> Iterator[Request]:
    """Yield requests with prompts of all domains, with and without grammars, tools and penalties.

    A share of the clients disconnects early.
    """
    texts = [Prompt(domain, text) for domain in prompts.DOMAINS for text in prompts.read_prompts(domain)]
    random.Random(seed).shuffle(texts)  # noqa: S311
    for number, prompt in zip(count(), cycle(texts), strict=False):
        rng = random.Random(f"{seed}/{number}")  # noqa: S311
        max_tokens, temperature = rng.randint(_MIN_TOKENS, _MAX_TOKENS), rng.choice((0.0, prompts.SAMPLED))
        events, options = rng.randint(1, _MAX_EVENTS) if rng.random() < leaving else None, rng.choice(OPTIONS)
        yield chat_request(model, prompt, max_tokens, temperature=temperature, disconnect_after=events, options=options)


def judge(result: SoakResult, options: SoakOptions) -> list[Figure]:
    """Return the figures of a soak, with their goals."""
    load, status = result.load, result.status
    slope, growth = fit_growth(result.memory)
    zero = Goal(0, at_least=False)
    lost = status.rows_captured - status.rows_published - status.rows_dropped - status.rows_pending
    published, in_topic = status.rows_published, result.rows_in_topic
    resident_mib = [round(m.resident / 2**20) for m in result.memory[:: max(len(result.memory) // 30, 1)]]
    errors, tokens = load.errors, sum(response.output_tokens for response in load.responses)
    answered = {"answered": len(load.responses) - len(errors), "left": load.disconnected, "errors": errors[:10]}
    pauses_ms = [swap.pause_ms for swap in status.swaps]
    swaps_goal = Goal(round(options.minutes * 60 / options.swap_every_s / 2), at_least=True)
    return [
        Figure("errors", len(errors), goal=zero, detail=answered),
        Figure("node_exit_code", abs(result.exit_code), goal=zero),
        Figure("rows_unaccounted", abs(lost), goal=zero, detail={"captured": status.rows_captured}),
        Figure("rows_pending", status.rows_pending, goal=zero),
        Figure(
            "rows_not_as_in_topic",
            abs(published - in_topic),
            goal=zero,
            detail={"published": published, "in_topic": in_topic, "dropped": status.rows_dropped},
        ),
        Figure(
            "memory_growth",
            growth,
            goal=Goal(0.05, at_least=False),
            detail={"mib_per_minute": round(slope * 60 / 2**20, 3), "resident_mib": resident_mib},
        ),
        Figure(
            "swaps",
            len(status.swaps),
            goal=swaps_goal,
            detail={"rejected": len(status.versions_rejected), "pause_max_ms": max(pauses_ms, default=0)},
        ),
        Figure("tokens_per_s", tokens / (options.minutes * 60)),
    ]


def fit_growth(memory: Sequence[MemorySample]) -> tuple[float, float]:
    """Return the growth of memory after the warm-up: bytes per second, and the share over the whole time."""
    settled = memory[int(len(memory) * _WARM_UP_SHARE) :]
    times, resident = [m.seconds for m in settled], [m.resident for m in settled]
    slope: float = linear_regression(times, resident).slope
    return slope, slope * (times[-1] - times[0]) / median(resident)


def count_topic_rows(kafka: Kafka) -> int:
    """Add up the row counts in the headers of all messages of the traces topic."""
    with open_consumer(kafka) as consumer:
        return sum(int(dict(message.headers() or [])["rows"] or 0) for message in consume_all(consumer))


def _node_url(settings: Settings) -> str:
    return f"http://{settings.serve.host}:{settings.serve.port}"


@contextmanager
def _running_processes(settings: Settings, folder: Path, say: Say) -> Iterator[tuple[Process, Broker, Settings]]:
    """Run a node, a broker and a registry, each as a process; the settings hold their addresses."""
    with ExitStack() as undo:
        say("starting broker, registry and node")
        broker = undo.enter_context(running_broker(folder / "broker"))
        registry = RegistryServer(folder / "registry", free_port(), (folder / "registry.log").absolute())
        registry.start()
        undo.callback(registry.stop)
        here = use_broker(settings, broker.bootstrap)
        serve = here.serve.model_copy(update={"host": "127.0.0.1", "port": free_port(), "poll_interval": 1.0})
        here = here.model_copy(update={"serve": serve, "registry": Registry(tracking_uri=registry.uri)})
        log = (folder / "serve.log").absolute()
        node = Process("serve", [sys.executable, "-m", "ops.cli.main", "serve"], log, to_environ(here))
        node.start()
        undo.callback(node.stop)
        node.wait_ready(lambda: is_answering(f"{_node_url(here)}/ready"), _READY_S)
        yield node, broker, here


def _register(registry: SpeculatorRegistry, target: Target, trained: EagleDraft) -> list[str]:
    """Register the trained draft and the draft of day 0; return their versions."""
    versions = []
    for draft in (trained, target.day_0):
        # MLflow's client prints to stdout, which belongs to the report.
        with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
            checkpoint.write_checkpoint(draft, Path(scratch), target.fingerprint)
            versions.append(registry.register(target.line, Path(scratch), {"line": target.line}, {}))
    return versions
