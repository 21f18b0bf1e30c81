"""The command line of SGLang's server: what the user gave, and what the node adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import SecretStr

from schemas.settings import Settings, SettingsError

PORT = 30000
"""SGLang's own default."""
_EVERYWHERE = ("0.0.0.0", "::", "[::]")  # noqa: S104 - compared with, never bound

_OURS = {
    "--speculative-draft-model-path": "the node writes the draft that SGLang starts with",
    "--speculative-draft-model": "the node writes the draft that SGLang starts with",
    "--weight-version": "the node names the version that SGLang starts with",
    "--speculative-token-map": "the tokens that a draft can propose are in the draft",
    "--speculative-draft-model-quantization": "versions are served in the type that they are trained in",
}
_ALGORITHM = "EAGLE3"


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags as they were given, as ``--name value`` or ``--name=value``."""

    given: tuple[str, ...]

    def has(self, *names: str) -> bool:
        """Whether one of the names is among them."""
        return any(flag.partition("=")[0] in names for flag in self.given)

    def value(self, *names: str) -> str | None:
        """The value of the last one with one of the names; None where there is none."""
        found = None
        for flag, after in pairwise([*self.given, ""]):
            name, equals, value = flag.partition("=")
            if name in names:
                found = value if equals else after
        return found

    @property
    def is_alone(self) -> bool:
        """Whether one machine runs all of the server."""
        return int(self.value("--nnodes") or 1) == 1

    @property
    def rank(self) -> int:
        """Of this machine among those that share one server; requests come to the first."""
        return int(self.value("--node-rank") or 0)


@dataclass(frozen=True, slots=True)
class Start:
    """The draft that SGLang starts with; its folder is there."""

    folder: Path
    version: str


def check(flags: Flags, settings: Settings) -> None:
    """See that flags and settings say the same.

    Raises:
        SettingsError: a flag says what is the node's to say, or otherwise than a setting.
    """
    for name, why in _OURS.items():
        if flags.has(name):
            raise SettingsError(f"{name}: {why}; leave it out")
    model = flags.value("--model-path", "--model")
    if model is not None and Path(model).absolute() != Path(settings.target.path).absolute():
        raise SettingsError(f"--model-path {model}: target.path is {settings.target.path}; leave the flag out")
    algorithm = flags.value("--speculative-algorithm")
    if algorithm is not None and (algorithm.upper() != _ALGORITHM or not settings.serve.speculate):
        wanted = _ALGORITHM if settings.serve.speculate else "none (serve.speculate)"
        raise SettingsError(f"--speculative-algorithm {algorithm}: this node serves drafts of {wanted}")
    if (flags.value("--dp-size", "--dp", "--data-parallel-size") or "1") != "1":
        raise SettingsError("--dp-size: updates reach one replica alone; start one node for each")
    for name in ("--node-rank", "--nnodes"):
        if not (flags.value(name) or "0").isdecimal():
            raise SettingsError(f"{name}: must be a number")


def arguments(flags: Flags, settings: Settings, start: Start | None) -> list[str]:
    """What SGLang's server is started with, the user's flags last.

    Args:
        flags: Checked.
        settings: Of the node.
        start: The draft; None on a node without speculation.
    """
    added = {
        "--model-path": settings.target.path,
        "--served-model-name": settings.target.served_model_name,
        "--enable-metrics": None,
    }
    if start is not None:
        added |= _speculative(flags, settings) | {
            "--speculative-algorithm": _ALGORITHM,
            "--speculative-draft-model-path": str(start.folder),
            "--weight-version": start.version,
        }
    key = settings.sglang.api_key.get_secret_value()
    if key and not flags.has("--api-key", "--admin-api-key"):
        added["--admin-api-key"] = key
    if flags.has("--model"):
        del added["--model-path"]
    kept = {name: value for name, value in added.items() if not flags.has(name)}
    return [part for name, value in kept.items() for part in (name, value) if part is not None] + list(flags.given)


def url(flags: Flags) -> str:
    """Where the server will be reached from this machine."""
    host = flags.value("--host") or "127.0.0.1"
    if host in _EVERYWHERE:
        host = "127.0.0.1"
    scheme = "https" if flags.has("--ssl-certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{flags.value('--port') or PORT}"


def key(flags: Flags, settings: Settings) -> SecretStr:
    """What the server wants to see before it changes weights."""
    given = flags.value("--admin-api-key") or flags.value("--api-key")
    return settings.sglang.api_key if given is None else SecretStr(given)


def _speculative(flags: Flags, settings: Settings) -> dict[str, str | None]:
    """How much is drafted: SGLang counts the root among the tokens that are verified, the settings do not."""
    serve = settings.serve
    steps = flags.value("--speculative-num-steps") or str(serve.num_speculative_tokens)
    width = flags.value("--speculative-eagle-topk") or str(serve.draft_tree_width)
    nodes = steps if width == "1" else str(serve.draft_tree_nodes)
    return {
        "--speculative-num-steps": steps,
        "--speculative-eagle-topk": width,
        "--speculative-num-draft-tokens": str(int(nodes) + 1),
    }


def of(given: Sequence[str]) -> Flags:
    """Flags as they stand on a command line."""
    return Flags(tuple(given))
