"""Which versions of vLLM this plugin supports, and the interface that it relies on.

vLLM guarantees nothing about the hooked functions. A server with another version, other signatures or an unsupported
configuration is neither recorded nor updated, and its node reports the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from serving.engines.plugin.signatures import changed_signatures, missing_fields

VERSIONS = ("0.32.0", "0.33.0")
"""Supported versions. The tests in ``tests/vllm_cpu`` run the first. The source of the second was read: what this
plugin calls, wraps and reads of it equals the first."""

_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
_RELOAD = "vllm.model_executor.model_loader.reload"

SIGNATURES: Mapping[str, tuple[str, ...]] = {
    f"{_RUNNER}.execute_model": ("self", "scheduler_output", "intermediate_tensors"),
    f"{_RUNNER}._get_eagle3_aux_layers_from_config": ("self",),
    f"{_RUNNER}._sample": ("self", "logits", "spec_decode_metadata"),
    f"{_RUNNER}.propose_draft_token_ids": (
        "self", "scheduler_output", "sampled_token_ids", "sampling_metadata", "hidden_states", "sample_hidden_states",
        "aux_hidden_states", "spec_decode_metadata", "common_attn_metadata", "slot_mappings",
    ),
    f"{_RELOAD}.initialize_layerwise_reload": ("model",),
    f"{_RELOAD}.finalize_layerwise_processing": ("model", "model_config"),
}  # fmt: skip
"""Parameters of every hooked or called function."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner.ExecuteModelState": ("logits", "spec_decode_metadata", "aux_hidden_states"),
    "vllm.v1.spec_decode.metadata.SpecDecodeMetadata": ("num_draft_tokens",),
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "finished_req_ids",
    ),
    "vllm.v1.core.sched.output.NewRequestData": (
        "req_id", "prompt_token_ids", "mm_features", "sampling_params", "num_computed_tokens", "lora_request",
        "prompt_embeds",
    ),
    "vllm.v1.core.sched.output.CachedRequestData": ("resumed_req_ids", "all_token_ids"),
}  # fmt: skip
"""Fields that the hooks read."""

SECOND_RUNNER = "vLLM's second model runner is not supported: set VLLM_USE_V2_MODEL_RUNNER=0"
METHOD = "eagle3"
LOSSLESS = ("standard", "block")
"""Values of ``rejection_sample_method`` with which the output keeps the target's distribution."""


def check_installation() -> str | None:
    """Return why the installed vLLM is not supported; None if it is. The release counts, not the build (``+cpu``)."""
    installed = version("vllm")
    supported = f"this plugin supports vLLM {', '.join(VERSIONS)}"
    if installed.partition("+")[0] not in VERSIONS:
        return f"vLLM {installed} is not supported: {supported}"
    if changed := [*changed_signatures(SIGNATURES), *missing_fields(FIELDS)]:
        return f"vLLM {installed} differs from its release: {'; '.join(changed)}; {supported}"
    return None


def check_configuration(worker: Any, capture_layers: Sequence[int]) -> str | None:
    """Return why a worker with its configuration is not supported; None if it is.

    Args:
        worker: vLLM's ``Worker``.
        capture_layers: Layers whose output the draft reads.
    """
    parallel, speculative, runner = worker.parallel_config, worker.speculative_config, worker.model_runner
    if worker.use_v2_model_runner:
        return SECOND_RUNNER
    if speculative is None or speculative.method != METHOD:
        return f"only drafts of the method {METHOD} are supported"
    # vLLM numbers hidden states by the layer that reads them.
    read = tuple(runner._get_eagle3_aux_layers_from_config() or ())
    reasons = {
        "pipeline and data parallelism are not supported: --pipeline-parallel-size 1 --data-parallel-size 1": (
            parallel.pipeline_parallel_size != 1 or parallel.data_parallel_size != 1
        ),
        "a target with multimodal positions is not supported": runner.uses_mrope,
        "only drafts of the likeliest tokens are supported (draft_sample_method greedy)": (
            speculative.draft_sample_method != "greedy"
        ),
        f"only lossless verification is supported (rejection_sample_method {' or '.join(LOSSLESS)})": (
            speculative.rejection_sample_method not in LOSSLESS
        ),
        f"device {worker.device.type} is not supported: only cpu and cuda": worker.device.type not in ("cpu", "cuda"),
        f"the draft reads the states after layers {tuple(capture_layers)}, the server gives those before {read}": (
            read != tuple(layer + 1 for layer in capture_layers)
        ),
    }
    return next((why for why, applies in reasons.items() if applies), None)


def check_suffix_drafter(worker: Any) -> str | None:
    """Return why the suffix drafter cannot draft in a worker; None if it can."""
    if worker.parallel_config.tensor_parallel_size != 1:
        return "the ranks of a tensor-parallel group must draft the same tokens; each has a corpus of its own"
    return None
