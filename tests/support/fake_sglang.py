"""A fake of SGLang's server in this process: the part of its interface that updates weights, with injected faults."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from torch import Tensor

from schemas.speculator.layouts import Shard, fuse_tensors, shard_tensors
from schemas.speculator.network import EagleDraft
from serving.engines.sglang.node import weights

KEY = "sesame"
METRICS = """\
sglang:num_requests_total{is_streaming="false"} 2.0
sglang:num_requests_total{is_streaming="true"} 1.0
sglang:spec_verify_calls_total 40.0
sglang:generation_tokens_total{is_streaming="false"} 103.0
aurora_sglang_draft_tokens_total 90.0
aurora_serve_trace_rows_captured_total 50.0
aurora_serve_trace_rows_published_total 40.0
aurora_serve_trace_rows_dropped_total{reason="too_large"} 3.0
aurora_serve_trace_rows_dropped_total{reason="queue_full"} 4.0
aurora_sglang_trace_circuit_breaker_open 1.0
"""

Answer = tuple[int, Any]


class FakeSglang:
    """State of the server, and the calls that it received."""

    def __init__(self, draft: EagleDraft, version: str, *, ranks: int = 1) -> None:
        self.tensors: dict[str, Tensor] = weights.draft_tensors(draft)
        self.version, self.ranks, self.replicas = version, ranks, 1
        self.key_heads = draft.shape.num_key_value_heads
        self.checksum: Callable[[Tensor], str] = weights.checksum_cpu
        self.paused = self.open = False
        self.calls: list[str] = []
        self.faults: dict[str, list[Answer | None]] = {}
        """Responses by path in place of the real ones, once each; None handles the call, then closes the connection."""
        self.spoiled: set[str] = set()
        """Tensors that an update does not change."""
        self.received = 0
        """Bytes of the last update, for one rank."""
        self.url = ""
        self.draft, self.release = "", "0.5.21"

    def holds(self, draft: EagleDraft) -> bool:
        expected = weights.draft_tensors(draft)
        return all(self.tensors[name].equal(value) for name, value in expected.items())

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        about: dict[str, Any] = {
            "/health": {},
            "/server_info": {
                "version": self.release,
                "speculative_draft_model_path": self.draft,
                "tp_size": self.ranks,
                "dp_size": self.replicas,
                "speculative_num_steps": 3,
                "speculative_algorithm": "EAGLE3",
            },
            "/model_info": {"weight_version": self.version},
            "/v1/loads": {"loads": [{"num_running_reqs": 2, "num_waiting_reqs": 1}]},
            "/metrics": METRICS,
            "/weights_checker": {"success": True, "ranks": [self.rank(number) for number in range(self.ranks)]},
        }
        if path in about:
            return 200, about[path]
        match path:
            case "/pause_generation":
                assert body == {"mode": "in_place"}
                self.paused = True
            case "/continue_generation":
                self.paused = False
            case "/update_weight_version":
                assert body["abort_all_requests"] is False
                self.version = body["new_version"]
            case _:
                return self.change(path, body)
        return 200, {"status": "ok"}

    def change(self, path: str, body: dict[str, Any]) -> Answer:
        assert self.paused, f"{path} waits for every running request"
        match path, self.open:
            case "/begin_weight_update", False:
                assert body == {"selector": "draft"}
                self.open = True
            case "/end_weight_update", True:
                self.open = False
            case "/update_weights_from_tensor", True:
                self.take(body)
            case _:
                return 400, {"success": False, "message": "no weight-update session is open"}
        return 200, {"success": True, "message": "Success"}

    def take(self, body: dict[str, Any]) -> None:
        assert (body["selector"], body["flush_cache"], body["abort_all_requests"]) == ("draft", False, False)
        assert len(body["serialized_named_tensors"]) == self.ranks
        contents = [base64.b64decode(text) for text in body["serialized_named_tensors"]]
        self.received = len(contents[0])
        named, *_ = [dict(pickle.loads(content)) for content in contents]
        assert not {"d2t", "t2d"} & named.keys()
        assert named.keys() == self.tensors.keys()
        self.tensors |= {name: value for name, value in named.items() if name not in self.spoiled}
        self.version = body["weight_version"]

    def rank(self, number: int) -> dict[str, Any]:
        """Return the checksums of a rank; besides the draft's own also one of another tensor."""
        parts = fuse_tensors(shard_tensors(self.tensors, self.key_heads, Shard(number, self.ranks)))
        checksums = {f"draft.{name}": self.checksum(value.float()) for name, value in parts.items()}
        models = [{"role": "draft", "tp_rank": number, "tp_size": self.ranks}]
        return {"checksums": checksums | {"draft.model.other": "0"}, "parallelism_info": models}


@contextmanager
def served(fake: FakeSglang, port: int = 0) -> Iterator[FakeSglang]:
    """Serve it on a port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            fake.calls.append(self.path)
            if self.headers.get("authorization") != f"Bearer {KEY}" and self.path != "/health":
                self.reply(401, {"error": "Unauthorized"})
                return
            ordered = fake.faults.get(self.path)
            if not ordered:
                self.reply(*fake.answer(self.path, body))
                return
            fault = ordered.pop(0)
            if fault is not None:
                self.reply(*fault)
            else:
                fake.answer(self.path, body)

        do_POST = do_GET

        def reply(self, status: int, content: Any) -> None:
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
