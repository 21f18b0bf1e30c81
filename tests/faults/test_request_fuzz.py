"""Random requests at and beyond the bounds of every parameter: no death, no hang, and no rejection without a name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx
import pytest
from sampling_requests import check_answer, random_request, running_tiny_node

_CLIENTS = 8


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("drafter", ["eagle", "suffix", "hybrid"])
def test_random_requests_are_answered_or_rejected_by_name(tmp_path: Path, drafter: str, full: bool) -> None:
    count = 5000 if full else 150
    drawn = Random(drafter)
    with running_tiny_node(tmp_path, serve__drafter=drafter, serve__draft_tree_width=2) as node:
        with ThreadPoolExecutor(_CLIENTS) as clients:
            requests = [random_request(drawn) for _ in range(count)]
            list(clients.map(lambda request: check_answer(node, *request), requests))
        rejected = sum(bool(invalid) for _, invalid in requests)
        assert 0.3 < rejected / count < 0.7
        assert node.metric("aurora_serve_requests_total", outcome="rejected") == rejected
        assert node.metric("aurora_serve_requests_total", outcome="failed") == 0
        status = httpx.get(f"{node.url}/status").json()
        assert (status["requests_running"], status["requests_waiting"]) == (0, 0)
