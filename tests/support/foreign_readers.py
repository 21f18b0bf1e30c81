"""Other projects' own classes read a version: run by the Python of ``make trainer-peers``, with nothing of ours in it.

    python -P foreign_readers.py READER VERSION OUT

writes what each of the reader's parameters and vocabulary tables holds then to OUT (safetensors). A parameter that the
reader makes and no tensor of the version reaches is NaN. Two readers write a folder of their own beside the version:
``speculators`` what it converts to ``converted``, ``specforge`` what it saves to ``saved``. ``exported`` reads the
folder of that name beside the version, which is in the layout of speculators.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


def speculators(version: Path, target: Path) -> dict[str, Tensor]:
    """Its converter of EAGLE-3 checkpoints, and the model that it trains and vLLM serves."""
    from speculators import SpeculatorModel
    from speculators.convert.entrypoints import convert_model

    converted = version.parent / "converted"
    # Aurora's layers are numbered by their outputs, speculators' by how many layers have run.
    layers = [i + 1 for i in AutoConfig.from_pretrained(version).eagle_config["eagle_aux_hidden_state_layer_ids"]]
    convert_model(str(version), str(target), "eagle3", str(converted), eagle_aux_hidden_state_layer_ids=layers)
    return _read_speculators(SpeculatorModel, converted)


def exported(version: Path, target: Path) -> dict[str, Tensor]:
    """The model that speculators trains, from a folder that was exported for it."""
    from speculators import SpeculatorModel

    folder = version.parent / "exported"
    config = json.loads((folder / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(target)
    (folder / "config.json").write_text(json.dumps(config))
    return _read_speculators(SpeculatorModel, folder)


def _read_speculators(model: Any, folder: Path) -> dict[str, Tensor]:
    written = set(load_file(folder / "model.safetensors"))
    held = dict(model.from_pretrained(str(folder)).state_dict())
    return {name: value if name in written else torch.full_like(value, torch.nan) for name, value in held.items()}


def specforge(version: Path, _target: Path) -> dict[str, Tensor]:
    """The model that it trains."""
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3

    model = blank(LlamaForCausalLMEagle3(AutoConfig.from_pretrained(version)))
    model.load_state_dict(load_file(version / "model.safetensors"), strict=False)
    read = {name: value.clone() for name, value in model.state_dict().items()}
    torch.nn.init.ones_(model.embed_tokens.weight)  # a trainer takes the target's
    model.save_pretrained(version.parent / "saved")
    return read


def sglang(version: Path, _target: Path) -> dict[str, Tensor]:
    """The model that its server runs, built and loaded as the server does it, in a group of one process."""
    # Without a GPU the rotary embedding looks for a kernel there; loading calls none.
    kernels: Any = ModuleType("vllm._custom_ops")
    kernels.rotary_embedding = None
    sys.modules |= {"vllm": ModuleType("vllm"), "vllm._custom_ops": kernels}
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
    from sglang.srt.runtime_context import get_context, get_parallel

    with tempfile.TemporaryDirectory() as folder, get_context().override_server_args(device="cpu"):
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{folder}/store", backend="gloo"
        )
        initialize_model_parallel(backend="gloo")
        get_parallel().override_permanently(tp_rank=0, pp_rank=0, attn_tp_rank=0)
        model = blank(LlamaForCausalLMEagle3(AutoConfig.from_pretrained(version)))
        model.load_weights(load_file(version / "model.safetensors").items())
        torch.distributed.destroy_process_group()
    return {**dict(model.named_parameters()), "hot_token_id": model.get_hot_token_id()}


def blank(model: Any) -> Any:
    """The model with every parameter NaN."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


READERS: dict[str, Callable[[Path, Path], dict[str, Tensor]]] = {
    "speculators": speculators,
    "exported": exported,
    "specforge": specforge,
    "sglang": sglang,
}


def write_target(folder: Path, version: Path) -> None:
    """A target of random weights for the draft: speculators takes embeddings, head and norm from it."""
    config = AutoConfig.from_pretrained(version)
    config.architectures, config.num_hidden_layers = ["LlamaForCausalLM"], 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main(reader: str, version: Path, out: Path) -> None:
    """Read and write down."""
    with tempfile.TemporaryDirectory() as target:
        write_target(Path(target), version)
        found = READERS[reader](version, Path(target))
    save_file({name: value.detach().contiguous().clone() for name, value in found.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
