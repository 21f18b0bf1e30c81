"""Command line of SGLang's server: the user's flags, and the flags that the node adds."""

from __future__ import annotations

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
    for name in ("--node-rank", "--nnodes"):
        if not (flags.value(name) or "0").isdecimal():
            raise SettingsError(f"{name}: must be a number")


def build_arguments(flags: Flags, settings: Settings, draft: DraftFolder | None) -> list[str]:
    """Return the arguments of SGLang's server, the user's flags last.

    Args:
        flags: Checked flags of the user.
        settings: Settings of the node.
        draft: The draft to start with; None on a node without speculation.
    """
    added = {
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
    key = settings.sglang.api_key.get_secret_value()
    if key and not flags.has("--api-key", "--admin-api-key"):
        added["--admin-api-key"] = key
    if flags.has("--model"):
        del added["--model-path"]
    kept = {name: value for name, value in added.items() if not flags.has(name)}
    return [part for name, value in kept.items() for part in (name, value) if part is not None] + list(flags.given)


def _draft_size(flags: Flags, settings: Settings) -> dict[str, str | None]:
    """Return the flags for the number of draft tokens; SGLang's number includes the root, that of the settings not."""
    serve = settings.serve
    steps = flags.value("--speculative-num-steps") or str(serve.num_speculative_tokens)
    width = flags.value("--speculative-eagle-topk") or str(serve.draft_tree_width)
    nodes = steps if width == "1" else str(serve.draft_tree_nodes)
    return {
        "--speculative-num-steps": steps,
        "--speculative-eagle-topk": width,
        "--speculative-num-draft-tokens": str(int(nodes) + 1),
    }
