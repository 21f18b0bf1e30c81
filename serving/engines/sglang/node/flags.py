"""Command line of SGLang's server: the user's flags, and the flags that the node adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from schemas.settings import Settings, SettingsError
from serving.engines.node.command_line import DraftFolder, Flags

PORT = 30000
"""SGLang's own default."""

_NODE_FLAGS = {
    "--speculative-draft-model-path": "the node writes the draft that SGLang starts with",
    "--speculative-draft-model": "the node writes the draft that SGLang starts with",
    "--weight-version": "the node names the version that SGLang starts with",
    "--speculative-token-map": "the draft holds the tokens that it can propose",
    "--speculative-draft-model-quantization": "versions are served in the dtype of their training",
}
_ALGORITHM = "EAGLE3"


def is_single_machine(flags: Flags) -> bool:
    """Return whether one machine runs the whole server."""
    return int(flags.value("--nnodes") or 1) == 1


def node_rank(flags: Flags) -> int:
    """Return the rank of this machine among the machines of one server; requests go to the first."""
    return int(flags.value("--node-rank") or 0)


def key_of(flags: Flags, settings: Settings) -> SecretStr:
    """Return the key that the server requires for weight updates."""
    given = flags.value("--admin-api-key") or flags.value("--api-key")
    return settings.sglang.api_key if given is None else SecretStr(given)


def check(flags: Flags, settings: Settings) -> None:
    """Check that the flags agree with the settings.

    Raises:
        SettingsError: a flag belongs to the node, or contradicts a setting.
    """
    for name, why in _NODE_FLAGS.items():
        if flags.has(name):
            raise SettingsError(f"{name}: {why}; omit the flag")
    model = flags.value("--model-path", "--model")
    if model is not None and Path(model).absolute() != Path(settings.target.path).absolute():
        raise SettingsError(f"--model-path {model}: target.path is {settings.target.path}; omit the flag")
    algorithm = flags.value("--speculative-algorithm")
    if algorithm is not None and (algorithm.upper() != _ALGORITHM or not settings.serve.speculate):
        served = _ALGORITHM if settings.serve.speculate else "none (serve.speculate)"
        raise SettingsError(f"--speculative-algorithm {algorithm}: this node serves drafts of {served}")
    if (flags.value("--dp-size", "--dp", "--data-parallel-size") or "1") != "1":
        raise SettingsError("--dp-size: updates reach one replica only; start one node per replica")
    if flags.has("--config") and _hidden_key(flags, settings):
        raise SettingsError(
            "--config: SGLang reads one such file, and the node writes it for sglang.api_key; omit the flag"
        )
    for name in ("--node-rank", "--nnodes"):
        if not (flags.value(name) or "0").isdecimal():
            raise SettingsError(f"{name}: must be a number")


def start_files(flags: Flags, settings: Settings) -> dict[str, tuple[str, str]]:
    """Return the files with which the server starts: name and content, by the flag that names the file.

    A secret is in a file, because every user of the machine can read a command line. JSON is also YAML, which SGLang
    expects.
    """
    files = {}
    if key := _hidden_key(flags, settings):
        files["--config"] = ("server.yaml", json.dumps({"admin-api-key": key}))
    if _is_adaptive(flags, settings):
        steps = sorted({0, 1, int(_steps(flags, settings))})
        files["--speculative-adaptive-config"] = ("adaptive.json", json.dumps({"1": {"candidate_steps": steps}}))
    return files


def build_arguments(
    flags: Flags, settings: Settings, draft: DraftFolder | None, files: Mapping[str, Path]
) -> list[str]:
    """Return the arguments of SGLang's server, the user's flags last.

    Args:
        flags: Checked flags of the user.
        settings: Settings of the node.
        draft: The draft to start with; None on a node without speculation.
        files: Where ``start_files`` were written.
    """
    added: dict[str, str | None] = {
        "--model-path": settings.target.path,
        "--served-model-name": settings.target.served_model_name,
        "--enable-metrics": None,
    }
    if draft is not None:
        added |= _draft_size(flags, settings) | {
            "--speculative-algorithm": _ALGORITHM,
            "--speculative-draft-model-path": str(draft.folder),
            "--weight-version": draft.version,
        }
        if _is_adaptive(flags, settings):
            added["--speculative-adaptive"] = None
    added |= {name: str(path) for name, path in files.items()}
    if flags.has("--model"):
        del added["--model-path"]
    kept = {name: value for name, value in added.items() if not flags.has(name)}
    return [part for name, value in kept.items() for part in (name, value) if part is not None] + list(flags.given)


def _hidden_key(flags: Flags, settings: Settings) -> str:
    """Return the key of the settings, unless the flags have one."""
    return "" if flags.has("--api-key", "--admin-api-key") else settings.sglang.api_key.get_secret_value()


def _is_adaptive(flags: Flags, settings: Settings) -> bool:
    chosen = flags.has("--speculative-adaptive", "--speculative-adaptive-config")
    return settings.serve.speculate and settings.sglang.adaptive and not chosen and _width(flags, settings) == "1"


def _width(flags: Flags, settings: Settings) -> str:
    return flags.value("--speculative-eagle-topk") or str(settings.serve.draft_tree_width)


def _steps(flags: Flags, settings: Settings) -> str:
    return flags.value("--speculative-num-steps") or str(settings.serve.num_speculative_tokens)


def _draft_size(flags: Flags, settings: Settings) -> dict[str, str | None]:
    """Return the flags for the number of draft tokens; SGLang's number includes the root, that of the settings not."""
    steps, width = _steps(flags, settings), _width(flags, settings)
    nodes = steps if width == "1" else str(settings.serve.draft_tree_nodes)
    return {
        "--speculative-num-steps": steps,
        "--speculative-eagle-topk": width,
        "--speculative-num-draft-tokens": str(int(nodes) + 1),
    }
