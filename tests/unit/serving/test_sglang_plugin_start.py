"""What the plugin starts in SGLang's scheduler, by its settings and the server's configuration."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from schemas.settings import Settings, load
from serving.engines.plugin import metrics
from serving.engines.plugin.metrics import SuffixMetrics
from serving.engines.sglang.plugin import plugin
from serving.engines.sglang.plugin.chain_hooks import ChainHooks

STEPS = 3


@pytest.fixture(autouse=True)
def _server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of SGLang's module with the configuration of a process."""
    context: Any = ModuleType("sglang.srt.runtime_context")
    context.get_parallel = lambda: SimpleNamespace(attn_tp_rank=0, pp_size=1)
    context.get_serving = lambda: SimpleNamespace(weight_version="7")
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, context.__name__, context)
    monkeypatch.setattr(metrics, "SuffixMetrics", lambda server: SuffixMetrics(server, CollectorRegistry()))


def settings_of(**flags: Any) -> Settings:
    """Return settings without traces, which would need a broker."""
    names = {name.replace("__", "."): value for name, value in flags.items()}
    return load(environ={}, flags={"traces.enabled": False, "serve.suffix_scope": "request"} | names)


def worker(adaptive: list[int] | None = None, **changed: Any) -> Any:
    values = {"tp_size": 1, "topk": 1, "speculative_use_rejection_sampling": False} | changed
    return SimpleNamespace(
        device="cpu",
        speculative_algorithm=SimpleNamespace(is_eagle3=lambda: True),
        server_args=SimpleNamespace(**values),
        topk=values["topk"],
        speculative_num_steps=STEPS,
        adaptive_controller=SimpleNamespace(candidate_steps=adaptive) if adaptive else None,
        target_worker=SimpleNamespace(model_runner=SimpleNamespace(model_config=SimpleNamespace(vocab_size=50))),
    )


@pytest.mark.parametrize(("adaptive", "depth"), [(None, STEPS), ([0, 1, 5], 5)])
def test_the_suffix_drafter_drafts_next_to_the_speculator(adaptive: list[int] | None, depth: int) -> None:
    started = plugin._start(settings_of(), worker(adaptive))
    assert started.recording is None
    assert isinstance(started.suffix, ChainHooks)
    assert (started.suffix._drafter._planner._depth, started.suffix._version()) == (depth, "7")


@pytest.mark.parametrize(
    "changed",
    [{"tp_size": 2}, {"topk": 2}, {"speculative_use_rejection_sampling": True}],
    ids=lambda one: next(iter(one)),
)
def test_the_speculator_drafts_alone_on_a_server_whose_rows_must_stay(
    changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plugin._start(settings_of(), worker(**changed)) == plugin.InstalledHooks()
    assert "aurora_suffix_drafter_off" in capsys.readouterr().out


def test_the_setting_leaves_the_drafts_to_the_speculator() -> None:
    assert plugin._start(settings_of(serve__drafter="eagle"), worker()) == plugin.InstalledHooks()


def test_an_error_at_the_start_leaves_the_server_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert plugin._start(settings_of(), object()) == plugin.InstalledHooks()
    assert "aurora_recording_disabled" in capsys.readouterr().out
