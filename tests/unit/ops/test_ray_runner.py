"""Error messages of the Ray runner without a cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from ops.replay.ray_runner import run_on_ray
from schemas.errors import UserError


def test_a_missing_ray_installation_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"aurora-stream\[ray\]"):
        next(run_on_ray([], "auto"))


def test_an_unreachable_cluster_fails_at_once(monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}"):
        with pytest.raises(UserError, match=r"no cluster there: .*`ray start --head`"):
            next(run_on_ray([], form.format(free_port())))
