"""vLLM reads the configuration of a folder that was exported in the layout of speculators."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tiny_draft import SHAPE

from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import LAYERS, Verifier
from schemas.speculator.network import random_draft

READ = """
import json, sys
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig
folder = sys.argv[1]
config, written = SpeculatorsConfig.from_pretrained(folder), json.load(open(folder + "/config.json"))
found = {name: getattr(config, name) for name in sys.argv[2:]}
print(json.dumps([found, SpeculatorsConfig.extract_vllm_speculative_config(written)]))
"""


def test_vllm_reads_an_exported_folder(run_client: Callable[[Sequence[str]], str], tmp_path: Path) -> None:
    shape = replace(SHAPE, variant="eagle3.1", norm_before_residual=True)
    write_draft_folder(random_draft(shape, 1), tmp_path / "out", "speculators", Verifier("org/target", ("Llama",), 4))
    expected = {
        "architectures": ["Eagle3LlamaForCausalLM"],
        LAYERS: [layer + 1 for layer in shape.capture_layers],
        "draft_vocab_size": shape.draft_vocab_size,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "hidden_size": shape.hidden_size,
    }
    output = run_client(["python", "-c", READ, str(tmp_path / "out"), *expected])
    found, speculative = json.loads(output.splitlines()[-1])
    assert found == expected
    assert speculative == {"method": "eagle3", "num_speculative_tokens": 4}
