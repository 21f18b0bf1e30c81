"""Compatibility: the versions of SGLang that this plugin supports, and the interface that its hooks rely on.

SGLang guarantees nothing about the hooked functions. On a server with another version or other signatures the plugin
records nothing: the server runs unchanged, and its log says so once.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from serving.engines.plugin.signatures import changed_signatures, missing_fields

OTHER_WORKER = "this draft is served by an unsupported worker: only drafts of a single layer are supported"
DEVICES = ("cpu", "cuda")

WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
STEP = f"{WORKER}.forward_batch_generation"
PREFILL = f"{WORKER}._forward_prefill_batch"
VERIFY = f"{WORKER}.verify"
ACCEPT = "sglang.srt.speculative.eagle_utils.eagle_sample"
SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
RELEASE = "sglang.srt.mem_cache.common.release_kv_cache"

Signatures = Mapping[str, tuple[str, ...]]
"""Parameters by function."""

_ACCEPT_0_5_21 = ("verify_input", "batch", "logits_output", "grammar_mask", "uno_target_max_top_k")
_COMMON: Signatures = {
    STEP: ("self", "batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
    PREFILL: ("self", "batch", "on_publish", "pp_proxy_tensors", "coordination_plan"),
    VERIFY: ("self", "batch", "pp_proxy_tensors", "grammar_barrier"),
    SAMPLE: ("self", "logits_output", "forward_batch"),
}
_FROM_0_5_22: Signatures = {
    **_COMMON,
    ACCEPT: (*_ACCEPT_0_5_21, "watermark_state", "watermark_full_mask"),
    RELEASE: ("req", "tree_cache", "checkpoint"),
}
SIGNATURES: Mapping[str, Signatures] = {
    "0.5.21": {**_COMMON, ACCEPT: _ACCEPT_0_5_21, RELEASE: ("req", "tree_cache", "is_insert")},
    "0.5.22": _FROM_0_5_22,
    "0.5.23": _FROM_0_5_22,
}
"""Parameters of every hooked function, by supported version; the tests in ``tests/sglang`` run the first and the last.
The hooks use the parameters that all versions share."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "sglang.srt.speculative.eagle_info.EagleVerifyInput": (
        "draft_token", "retrieve_next_token", "retrieve_next_sibling", "draft_token_num", "draft_probs",
    ),
    "sglang.srt.layers.logits_processor.LogitsProcessorOutput": ("next_token_logits", "hidden_states"),
}  # fmt: skip
"""Fields that the hooks read."""


def check_installation() -> str | None:
    """Return why the installed SGLang cannot be recorded; None if it can."""
    installed = version("sglang")
    supported = f"this plugin supports SGLang {', '.join(SIGNATURES)}"
    if installed not in SIGNATURES:
        return f"SGLang {installed} is not supported: {supported}"
    if changed := [*changed_signatures(SIGNATURES[installed]), *missing_fields(FIELDS)]:
        return f"SGLang {installed} differs from its release: {'; '.join(changed)}; {supported}"
    return None


def check_server(device: str, stages: int, *, is_eagle3: bool) -> str | None:
    """Return why a server cannot be recorded with its configuration; None if it can.

    Args:
        device: Kind of its device.
        stages: Pipeline-parallel stages.
        is_eagle3: Whether it drafts from the target's hidden states.
    """
    if not is_eagle3:
        return "only EAGLE3 drafts from hidden states that a draft can learn from: --speculative-algorithm EAGLE3"
    if stages != 1:
        return f"a pipeline of {stages} stages is not supported: --pp-size 1"
    if device not in DEVICES:
        return f"device {device} is not supported: only {' and '.join(DEVICES)}"
    return None


def check_suffix_drafter(ranks: int, width: int, *, compares_probabilities: bool) -> str | None:
    """Return why the suffix drafter cannot draft in a server with its configuration; None if it can.

    Args:
        ranks: Tensor-parallel processes.
        width: Nodes that the speculator continues at each depth.
        compares_probabilities: Whether the sampler compares the target's probabilities with the speculator's.
    """
    if ranks != 1:
        return "the ranks of a tensor-parallel group must draft the same tokens; each has a corpus of its own"
    if width != 1:
        return "only chains are overwritten: --speculative-eagle-topk 1 (serve.draft_tree_width = 1)"
    if compares_probabilities:
        return "--speculative-use-rejection-sampling expects tokens that the speculator has sampled"
    return None
