"""Which SGLang this plugin knows, and what of it the hooks rest on.

SGLang promises nothing about what is hooked here. A server whose version or signatures are others is left alone: it
serves without being recorded, and says so once.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from collections.abc import Mapping
from importlib.metadata import version

VERSIONS = ("0.5.21",)
"""Versions that the tests in ``tests/sglang`` run."""

OTHER_WORKER = "this draft is served by a worker that is not known: only drafts of a single layer are"
DEVICES = ("cpu", "cuda")

WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
STEP = f"{WORKER}.forward_batch_generation"
PREFILL = f"{WORKER}._forward_prefill_batch"
VERIFY = f"{WORKER}.verify"
JUDGE = "sglang.srt.speculative.eagle_utils.eagle_sample"
SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
RELEASE = "sglang.srt.mem_cache.common.release_kv_cache"

SIGNATURES: Mapping[str, tuple[str, ...]] = {
    STEP: ("self", "batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
    PREFILL: ("self", "batch", "on_publish", "pp_proxy_tensors", "coordination_plan"),
    VERIFY: ("self", "batch", "pp_proxy_tensors", "grammar_barrier"),
    JUDGE: ("verify_input", "batch", "logits_output", "grammar_mask", "uno_target_max_top_k"),
    SAMPLE: ("self", "logits_output", "forward_batch"),
    RELEASE: ("req", "tree_cache", "is_insert"),
}
"""Parameters of every hooked function."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "sglang.srt.speculative.eagle_info.EagleVerifyInput": (
        "draft_token", "retrieve_next_token", "retrieve_next_sibling", "draft_token_num",
    ),
    "sglang.srt.layers.logits_processor.LogitsProcessorOutput": ("next_token_logits", "hidden_states"),
}  # fmt: skip
"""Fields of records that hooks read."""


def refusal() -> str | None:
    """Why this SGLang cannot be recorded; None where it can."""
    installed = version("sglang")
    known = f"this plugin knows SGLang {', '.join(VERSIONS)}"
    if installed not in VERSIONS:
        return f"SGLang {installed} is not known: {known}"
    if changed := [*_other_signatures(), *_missing_fields()]:
        return f"SGLang {installed} is not as released: {'; '.join(changed)}; {known}"
    return None


def unsuitable(device: str, stages: int, *, is_eagle3: bool) -> str | None:
    """Why a server as it was started cannot be recorded; None where it can.

    Args:
        device: Kind of device that it runs on.
        stages: Of a pipeline of processes.
        is_eagle3: Whether it drafts from the target's states.
    """
    if not is_eagle3:
        return "only EAGLE3 drafts from states that a draft can learn from: --speculative-algorithm EAGLE3"
    if stages != 1:
        return f"a pipeline of {stages} stages is not known: --pp-size 1"
    if device not in DEVICES:
        return f"device {device} is not known: only {' and '.join(DEVICES)}"
    return None


def _other_signatures() -> list[str]:
    found = []
    for target, expected in SIGNATURES.items():
        try:
            parameters = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (AttributeError, ImportError) as error:
            found.append(f"{target}: {error}")
        else:
            if parameters != expected:
                found.append(f"{target} takes {', '.join(parameters)}")
    return found


def _missing_fields() -> list[str]:
    found = []
    for target, expected in FIELDS.items():
        fields = {field.name for field in dataclasses.fields(pkgutil.resolve_name(target))}
        if missing := [name for name in expected if name not in fields]:
            found.append(f"{target} has no {', '.join(missing)}")
    return found
