"""The extension leaves an unsupported vLLM alone, and reports the reason."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from released_server import function, install_fakes

from serving.engines.vllm.plugin import installation

CAPTURED = (1, 2, 3)


@pytest.fixture(params=[*installation.VERSIONS, "0.32.0+cpu"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fake of vLLM as released."""
    monkeypatch.setattr(installation, "version", lambda _: request.param)
    install_fakes(monkeypatch, installation.SIGNATURES, installation.FIELDS)
    return str(request.param)


def test_a_released_server_is_supported(version: str) -> None:
    assert installation.check_installation() is None, version


def test_another_version_is_rejected_with_the_supported_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "version", lambda _: "0.34.0")
    supported = f"this plugin supports vLLM {', '.join(installation.VERSIONS)}"
    assert installation.check_installation() == f"vLLM 0.34.0 is not supported: {supported}"


def test_a_changed_signature_or_record_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = sys.modules["vllm.v1.worker.gpu_model_runner"].GPUModelRunner
    monkeypatch.setattr(runner, "_sample", function(("self", "logits")))
    output = sys.modules["vllm.v1.core.sched.output"]
    monkeypatch.setattr(output, "SchedulerOutput", dataclasses.make_dataclass("Record", ["finished_req_ids"]))
    why = installation.check_installation() or ""
    assert f"vLLM {version} differs from its release" in why
    assert "GPUModelRunner._sample takes self, logits" in why
    assert "SchedulerOutput has no scheduled_new_reqs" in why


def worker(**changed: Any) -> Any:
    """Return vLLM's worker with a supported configuration, but for the named values."""
    values = {
        "use_v2_model_runner": False, "method": "eagle3", "draft_sample_method": "greedy",
        "rejection_sample_method": "standard", "pipeline_parallel_size": 1, "data_parallel_size": 1,
        "uses_mrope": False, "device": "cpu", "read": tuple(layer + 1 for layer in CAPTURED),
    } | changed  # fmt: skip
    return SimpleNamespace(
        use_v2_model_runner=values["use_v2_model_runner"],
        speculative_config=values["method"] and SimpleNamespace(**values),
        parallel_config=SimpleNamespace(**values),
        model_runner=SimpleNamespace(
            uses_mrope=values["uses_mrope"], _get_eagle3_aux_layers_from_config=lambda: values["read"]
        ),
        device=SimpleNamespace(type=values["device"]),
    )


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"rejection_sample_method": "block"}, None),
        ({"rejection_sample_method": "fly"}, "rejection_sample_method standard or block"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"method": None}, "eagle3"),
        ({"method": "medusa"}, "eagle3"),
        ({"draft_sample_method": "gumbel"}, "draft_sample_method greedy"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        ({"data_parallel_size": 2}, "--data-parallel-size 1"),
        ({"uses_mrope": True}, "multimodal positions"),
        ({"device": "xpu"}, "only cpu and cuda"),
        ({"read": (4, 5, 6)}, "the server gives those before (4, 5, 6)"),
    ],
)
def test_an_unsupported_configuration_is_named(changed: dict[str, Any], why: str | None) -> None:
    found = installation.check_configuration(worker(**changed), CAPTURED)
    assert found is None if why is None else why in (found or "")
