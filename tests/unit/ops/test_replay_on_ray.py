"""Variants on a Ray cluster, as far as it goes without one: what a user is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from ops.replay import on_ray
from schemas.errors import UserError


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"aurora-stream\[ray\]"):
        next(on_ray.learn([], "auto"))


def test_a_cluster_that_is_not_there_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}"):
        with pytest.raises(UserError, match=r"no cluster there: .*`ray start --head`"):
            next(on_ray.learn([], form.format(free_port())))
