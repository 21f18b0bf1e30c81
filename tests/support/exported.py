"""What the processes export, read from their own collectors and application without starting them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from echo_engine import EchoEngine, byte_tokenizer
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from pipeline.metrics import StreamCollector, StreamTimes
from schemas.settings import Settings, Traces
from schemas.status import DriftStatus, StreamStatus
from schemas.telemetry.metrics import register_process_metrics
from serving.answers.answer_consumer import AnswerConsumer
from serving.answers.answer_publisher import AnswerPublisher
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.builtin.kv_cache import KVCache
from serving.engines.builtin.prefix_cache import PrefixCache
from serving.engines.plugin.metrics import PluginMetrics, SuffixMetrics
from serving.engines.sglang.plugin.hooks import SglangMetrics
from serving.http import admin, routes, status, webhook
from serving.http.generation import RequestMetrics
from serving.http.server import Drain
from serving.traces.publisher import TracePublisher
from serving.versions.poller import VersionPoller
from trainer import train
from trainer.loop.metrics import TrainMetrics
from trainer.release import promoter
from trainer.release.promoter import PromoterMetrics
from trainer.status import ErrorTracker


class ExportedMetric(NamedTuple):
    """One metric of ``GET /metrics``."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


def node_application(registry: CollectorRegistry) -> FastAPI:
    """The application of a serving node, with every collector registered; nothing runs."""
    settings, engine, drain = Settings(traces=Traces(features="claim-check")), EchoEngine(), Drain()
    publisher = TracePublisher(settings.kafka, settings.traces)
    poller = VersionPoller(cast("Any", None), engine, settings)
    metrics = RequestMetrics(registry)
    app = routes.create_app(engine, byte_tokenizer(), "m", metrics, drain, settings.serve, lambda _: True)
    corpus = status.CorpusReport(
        settings.serve.suffix_scope,
        ScopedCorpus(settings.serve.suffix_scope, settings.serve.suffix_corpus_bytes, settings.kafka.retention),
        AnswerPublisher(settings.kafka, settings.serve.suffix_scope),
        AnswerConsumer(settings.kafka, settings.serve, lambda _: None),
    )
    prefix_cache = status.PrefixCacheReport(PrefixCache(KVCache(1, 1, 1, 1, 1), 1, 0, settings.serve.prefix_scope))
    reports = status.Reports(publisher, poller, corpus, prefix_cache)
    status.add_routes(app, "node-0", engine, metrics, registry, reports, drain)
    admin.add_routes(app, settings.serve, engine, poller)
    webhook.add_route(app, settings.serve.webhook_secret, engine.line, poller)
    return app


def registries() -> dict[str, CollectorRegistry]:
    """A registry per process, with all that it exports."""
    found = {
        process: CollectorRegistry()
        for process in ("every process", "serve", "SGLang plugin", "vLLM plugin", "stream", "train", "promoter")
    }
    register_process_metrics(found["every process"])
    node_application(found["serve"])
    SglangMetrics(found["SGLang plugin"])
    SuffixMetrics("sglang", found["SGLang plugin"])
    PluginMetrics("vllm", found["vLLM plugin"])
    SuffixMetrics("vllm", found["vLLM plugin"])
    drift = DriftStatus.model_construct(detected=0, dropped=0, traffic=[])
    counts = dict.fromkeys(StreamStatus.model_fields, 0)
    lists = {
        "partitions": [],
        "not_live": [],
        "not_ready": [],
        "dead_letters": {},
        "maintenance_files": {},
        "drift": drift,
    }
    stream = StreamStatus.model_construct(**counts | lists)
    found["stream"].register(StreamCollector(lambda: stream))
    found["stream"].register(StreamTimes().registry)
    TrainMetrics(found["train"])
    ErrorTracker("train", train.PARTS, found["train"])
    PromoterMetrics(found["promoter"])
    ErrorTracker("promoter", promoter.PARTS, found["promoter"])
    return found


def exported_metrics(registry: CollectorRegistry) -> list[ExportedMetric]:
    """The metrics of a registry, by name."""
    metrics = []
    for collector in list(registry._collector_to_names):
        labels = getattr(collector, "_labelnames", None)
        for family in collector.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            own = labels if labels is not None else getattr(family, "_labelnames", ())
            metrics.append(ExportedMetric(name, family.type, tuple(own), family.documentation))
    return sorted(metrics)
