"""A node with an echo engine, on a real socket in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn
from echo_engine import EchoEngine, byte_tokenizer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from schemas.settings import Serve
from serving.http import admin, routes, status, webhook
from serving.http.detokenizer import Tokenizer
from serving.http.generation import RequestMetrics
from serving.http.server import Drain, DrainingServer
from serving.versions.poller import VersionPoller

MODEL = "echo-1"
_DEFAULTS = Serve()


@dataclass
class Node:
    engine: EchoEngine
    server: DrainingServer
    url: str
    client: openai.OpenAI
    drain: Drain

    def ask(self, content: str = "hello", **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=MODEL, messages=messages, **options)

    def complete(self, prompt: Any = "hello", **options: Any) -> Any:
        return self.client.completions.create(model=MODEL, prompt=prompt, **options)

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        about = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": "hello"}
        return httpx.post(self.url + path, json={"model": MODEL} | about | body, timeout=10)

    def metric(self, name: str, **labels: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return next((s.value for s in samples if s.name == name and s.labels == labels), 0.0)


@contextmanager
def running_node(
    serve: Serve = _DEFAULTS,
    engine: EchoEngine | None = None,
    poller: VersionPoller | None = None,
    is_traced: Callable[[str], bool] = lambda _: True,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Node]:
    engine, metrics, drain = engine or EchoEngine(), CollectorRegistry(), Drain(serve.drain_delay)
    request_metrics = RequestMetrics(metrics)
    app = routes.create_app(engine, tokenizer or byte_tokenizer(), MODEL, request_metrics, drain, serve, is_traced)
    status.add_routes(app, "node-a", engine, request_metrics, metrics, status.Reports(poller=poller), drain)
    admin.add_routes(app, serve, engine, poller)
    webhook.add_route(app, serve.webhook_secret, engine.line, poller)
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1)
    server = DrainingServer(config, drain, serve.drain_timeout, engine)
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            yield Node(engine, server, url, client, drain)
    finally:
        engine.stop()
        server.should_exit = True
        thread.join()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
