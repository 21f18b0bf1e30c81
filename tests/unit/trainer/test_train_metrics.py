"""The trainer's Prometheus metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from trainer.data.table_reader import DROPPED_BRANCHES
from trainer.loop.metrics import TrainMetrics


def test_dropped_branches_are_counted_by_reason_from_zero_on() -> None:
    registry = CollectorRegistry()
    metrics = TrainMetrics(registry)

    def dropped() -> dict[str, float | None]:
        name = "aurora_train_branches_dropped_total"
        return {reason: registry.get_sample_value(name, {"reason": reason}) for reason in DROPPED_BRANCHES}

    assert dropped() == dict.fromkeys(DROPPED_BRANCHES, 0)
    for count in (3, 3, 5):
        counts = {"branches": 9, "branches_without_root": count}
        loader: Any = SimpleNamespace(
            cursor=1, table_version=1, lag_s=0.0, share=1.0, waiting=0, counts=counts, replay_bytes={"memory": 0}
        )
        metrics.update_data_loader(loader)
        assert dropped() == dict.fromkeys(DROPPED_BRANCHES, 0) | {"no_root": count}
    assert registry.get_sample_value("aurora_train_rows", {"kind": "branches"}) == 9
    assert registry.get_sample_value("aurora_train_rows", {"kind": "branches_without_root"}) is None
