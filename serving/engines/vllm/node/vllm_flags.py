"""Command line of vLLM's server: the user's flags, and what the node adds."""

from __future__ import annotations

import json
from pathlib import Path

from schemas.settings import Settings, SettingsError
from serving.engines.node.command_line import Flags

DEFAULT_PORT = 8001
"""vLLM's own default, 8000, is that of ``serve.port``."""
EXTENSION = "serving.engines.vllm.plugin.worker_extension.WorkerExtension"
MIDDLEWARE = "serving.engines.vllm.plugin.developer_endpoints.DeveloperEndpoints"

_NODE_FLAGS = {
    "--speculative-config": "the node writes the draft that vLLM starts with, and names it",
    "-sc": "the node writes the draft that vLLM starts with, and names it",
    "--worker-extension-cls": "the node adds its own extension",
}
_SINGLE = {
    "--data-parallel-size": "-dp",
    "--pipeline-parallel-size": "-pp",
    "--nnodes": "-n",
}


def check_flags(flags: Flags, settings: Settings) -> None:
    """Check that the flags agree with the settings.

    Raises:
        SettingsError: a flag belongs to the node, contradicts a setting, or asks for what is not supported.
    """
    for name, why in _NODE_FLAGS.items():
        if any(flag.replace("_", "-").partition("=")[0].partition(".")[0] == name for flag in flags.given):
            raise SettingsError(f"{name}: {why}; omit the flag")
    model = flags.value("--model")
    if flags.given and not flags.given[0].startswith("-"):
        model = flags.given[0]
    if model is not None:
        raise SettingsError(f"{model}: target.path names the model ({settings.target.path}); omit it")
    for name, short in _SINGLE.items():
        if (flags.value(name, short) or "1") != "1":
            raise SettingsError(f"{name}: updates reach one replica on one machine; start one node per replica")


def build_vllm_arguments(flags: Flags, settings: Settings, draft: Path | None) -> list[str]:
    """Return the arguments of ``vllm serve``, the user's flags last.

    Args:
        flags: Checked flags of the user.
        settings: Settings of the node.
        draft: The draft to start with, from ``write_draft_folder``; None on a node without speculation.
    """
    added = {
        "--served-model-name": settings.target.served_model_name,
        # Without this flag vLLM listens on every address.
        "--host": "127.0.0.1",
        "--port": str(DEFAULT_PORT),
        "--shutdown-timeout": str(int(settings.serve.drain_timeout)),
    }
    found = [part for name, value in added.items() if not flags.has(name) for part in (name, value)]
    if draft is not None:
        speculative = {
            "method": "eagle3",
            "model": str(draft),
            "num_speculative_tokens": settings.serve.num_speculative_tokens,
        }
        found += ["--speculative-config", json.dumps(speculative)]
        found += ["--worker-extension-cls", EXTENSION, "--middleware", MIDDLEWARE]
    return [str(Path(settings.target.path).absolute()), *found, *flags.given]
