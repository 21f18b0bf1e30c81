"""Which target and which speculator line a server serves: named as the built-in engine names them."""

from __future__ import annotations

from pathlib import Path

from schemas.speculator.checkpoint import CheckpointError, read_manifest, read_shape, target_fingerprint
from serving.traces.chunks import Origin


def origin_of(node: str, model: str, draft: str, width: int) -> Origin:
    """Where the verify steps of this server come from. Reads the whole target once: its fingerprint is over every byte.

    Args:
        node: Name of the node.
        model: SGLang's ``--model-path``.
        draft: Its ``--speculative-draft-model-path``.
        width: F: values that a token's captured states have.

    Raises:
        CheckpointError: a draft that is no version of ours, or of another target.
    """
    folder = _folder(draft)
    manifest, shape = read_manifest(folder), read_shape(folder)
    if width != 3 * shape.hidden_size:
        raise CheckpointError(f"{folder}: is for states of {3 * shape.hidden_size} values, the server has {width}")
    target = target_fingerprint(_folder(model))
    if manifest.target != target:
        raise CheckpointError(f"{folder}: is a draft for target {manifest.target}, the server runs {target}")
    return Origin(node, target, manifest.line, shape.vocab_size)


def _folder(path: str) -> Path:
    """A folder as it is, a name on the hub as it lies in its cache: the server has loaded it from there."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{path}: neither a folder nor in the hub's cache") from error
