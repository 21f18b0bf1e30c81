"""A version as vLLM loads it.

vLLM numbers hidden states by the layer that reads them, a version by the layer that writes them, as SGLang does. Loaded
as it is, a version would get the states of one layer below each captured one, and still accept some draft tokens. vLLM
prefers a key on the top level of ``config.json`` to the one in ``eagle_config``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from schemas.speculator.checkpoint import CONFIG, WEIGHTS, read_shape

LAYERS = "eagle_aux_hidden_state_layer_ids"


def write_vllm_draft(version: Path, folder: Path) -> Path:
    """Write the files of a version for vLLM to a new folder; return it.

    Raises:
        CheckpointError: the version's configuration is missing or invalid.
        OSError: the folder cannot be written.
    """
    layers = [layer + 1 for layer in read_shape(version).capture_layers]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.loads((version / CONFIG).read_text()) | {LAYERS: layers}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(version / WEIGHTS, folder / WEIGHTS)
    return folder
