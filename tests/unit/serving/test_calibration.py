"""Calibration measures forwards by rows and sequences, and drafts by sequences and depth, in processor time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.engines.builtin import calibration
from serving.engines.builtin.kv_cache import KVCache


def test_forwards_and_drafts_cost_the_processor_time_that_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = [0.0]

    def verify(_target: Any, sequences: int, rows: int) -> None:
        spent[0] += 10 + rows + 2 * (sequences - 1)

    def draft(_target: Any, _speculator: Any, sequences: int, depth: int, catch_up: int = 0) -> None:
        spent[0] += sequences * (2 + depth) + catch_up / 4

    monkeypatch.setattr(calibration, "_verify", verify)
    monkeypatch.setattr(calibration, "_draft", draft)
    monkeypatch.setattr(calibration.time, "thread_time", lambda: spent[0])
    cache = KVCache(1, 8, 1, 100, 1)
    target: Any = SimpleNamespace(cache=cache, device=torch.device("cpu"))
    speculator: Any = SimpleNamespace(positions=1000)
    latency = calibration.calibrate(target, speculator, 8)
    for sequences in (1, 2, 4, 8):
        for rows in (sequences, 2 * sequences, 4 * sequences):
            assert latency.predict_verify(sequences, rows) == pytest.approx(10 + rows + 2 * (sequences - 1))
        for depth in (1, 2, 3, 6):
            assert latency.predict_draft(sequences, depth) == pytest.approx(sequences * (2 + depth))
    assert latency.catch_up_row == pytest.approx(1 / 4)
    without = calibration.calibrate(target, None, 8)
    assert (without.predict_draft(4, 2), without.catch_up_row) == (0.0, 0.0)
