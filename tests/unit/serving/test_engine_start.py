"""Settings at the corners of the draft caches, and targets that the built-in engine cannot serve."""

import json
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from engine_outputs import collect, submit
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from tiny_target import VOCABULARY, write_tiny_target
from transformers import MistralConfig, MistralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from schemas.settings import SettingsError, load
from serving.engines.base import Output, Request
from serving.engines.builtin.engine import BuiltinEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


def create_engine(folder: Path, **flags: Any) -> BuiltinEngine:
    ours = {"target.path": str(folder), "speculator.draft_vocab_size": VOCABULARY, "serve.max_model_len": 32}
    return BuiltinEngine(load(environ={}, flags=ours | {name.replace("__", "."): v for name, v in flags.items()}))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.sampled_from([1, 2, 8]),
    tokens=st.sampled_from([1, 2, 16]),
    nodes=st.sampled_from([1, 4, 16, 128]),
    drafter=st.sampled_from(["eagle", "suffix", "hybrid"]),
    max_len=st.sampled_from([16, 33]),
    adaptive=st.booleans(),
)
@example(width=8, tokens=16, nodes=4, drafter="eagle", max_len=16, adaptive=False)
@example(width=8, tokens=16, nodes=4, drafter="hybrid", max_len=33, adaptive=False)
@example(width=8, tokens=16, nodes=128, drafter="hybrid", max_len=33, adaptive=False)
@example(width=8, tokens=1, nodes=1, drafter="hybrid", max_len=16, adaptive=True)
@example(width=1, tokens=16, nodes=1, drafter="hybrid", max_len=16, adaptive=False)
def test_every_size_of_drafts_answers_requests_up_to_the_length_limit(
    folder: Path, width: int, tokens: int, nodes: int, drafter: str, max_len: int, adaptive: bool
) -> None:
    engine = create_engine(
        folder,
        serve__draft_tree_width=width,
        serve__num_speculative_tokens=tokens,
        serve__draft_tree_nodes=nodes,
        serve__drafter=drafter,
        serve__max_model_len=max_len,
        serve__adaptive_drafting=adaptive,
        serve__suffix_scope="node",
        serve__max_num_seqs=2,
    )
    engine.start()
    outputs: list[tuple[int, SimpleQueue[Output]]] = []
    for length in (1, 6, max_len - 2, max_len - 1):
        for temperature in (0.0, 1.0):
            queue: SimpleQueue[Output] = SimpleQueue()
            prompt = tuple(1 + i % 3 for i in range(length))
            request = Request(f"{length} {temperature}", prompt, max_len, temperature, seed=3, ignore_eos=True)
            engine.submit(request, queue.put)
            outputs.append((max_len - length, queue))
    for expected, queue in outputs:
        count, last = 0, Output(())
        while last.finish is None:
            last = queue.get(timeout=60)
            count += len(last.tokens)
        assert (last.finish, last.error, count) == ("length", None, expected)
    health = engine.health()
    engine.stop()
    assert (health.error, health.drafter_failures, health.speculating) == (None, 0, True)


CUSTOM_CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}


def change_config(folder: Path, **changes: Any) -> None:
    """Change the configuration; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_config(folder: Path, **changes: Any) -> Path:
    write_tiny_target(folder)
    change_config(folder, **changes)
    return folder


@pytest.mark.parametrize(
    "architecture",
    [
        "CohereForCausalLM",
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
    ],
)
def test_an_unsupported_architecture_is_an_error_that_names_it_and_the_supported_ones(
    tmp_path: Path, architecture: str
) -> None:
    folder = write_config(tmp_path, architectures=[architecture], rms_norm_eps=None)
    with pytest.raises(SettingsError) as raised:
        create_engine(folder)
    message = str(raised.value)
    assert message.startswith(f"target.path {folder}: ")
    assert f"the architecture {architecture}, only ArceeForCausalLM, " in message
    assert "\n" not in message


def test_quantized_weights_are_an_error(tmp_path: Path) -> None:
    folder = write_config(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(SettingsError, match=r"^target\.path .*: the weights are quantized \(awq\)"):
        create_engine(folder)


def remove_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tensor, "its weights lack 1 tensors, among them model.layers.3.mlp.down_proj.weight"),
        (truncate_weights, "model.safetensors: not readable as safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no tensor lm_head.weight in its safetensors files"),
        (
            lambda folder: change_config(folder, intermediate_size=64),
            r"but its configuration asks for \[.*64",
        ),
        (lambda folder: change_config(folder, num_key_value_heads=3), "3 key and value heads do not divide its 4"),
        (lambda folder: change_config(folder, hidden_act="unheard"), "cannot load the model: KeyError: 'unheard'"),
        (lambda folder: change_config(folder, **CUSTOM_CODE), "cannot load the model: .*contains custom code"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: a list, not an object"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json' is not a valid"),
    ],
)
def test_a_broken_folder_is_an_error_of_one_line(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = write_tiny_target(tmp_path)
    damage(folder)
    with pytest.raises(SettingsError, match=rf"^target\.path {folder}: .*{message}") as raised:
        create_engine(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rotary_parameter_that_transformers_does_not_know_is_ignored(tmp_path: Path, key: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    without = create_engine(write_config(tmp_path / "without", rope_parameters=yarn))
    folder = write_config(tmp_path / "with", **{"rope_parameters": None, key: yarn | {"attn_factor": 0.878}})
    with capture_logs() as logs:
        engine = create_engine(folder)
    assert {"event": "rope_parameter_ignored", "parameter": "attn_factor", "log_level": "warning"} in logs
    assert engine.line.partition("-")[2] == without.line.partition("-")[2], "the same draft"


def test_a_mixture_of_experts_gives_the_answers_of_the_model_itself(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config).half().eval()
    model.save_pretrained(tmp_path)
    prompt = (3, 14, 15, 9)
    expected = model.float().generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 4:].tolist()
    engine = create_engine(tmp_path, serve__adaptive_drafting=False)
    engine.start()
    found, last = collect(submit(engine, Request("experts", prompt, 20)))
    engine.stop()
    assert (found, last.error) == (expected, None)


def test_a_target_with_too_few_layers_is_an_error(tmp_path: Path) -> None:
    folder = write_config(tmp_path, num_hidden_layers=6)
    with pytest.raises(SettingsError, match=r"^target\.path .*: the target has 6 layers; .* at least 7$"):
        create_engine(folder)


def test_a_window_is_an_error_only_if_sequences_can_be_longer(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
        max_position_embeddings=256,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    assert create_engine(tmp_path, serve__max_model_len=47).max_tokens == 47
    message = r"^target\.path .*: MistralForCausalLM attends to a window of 64 tokens.*; lower serve\.max_model_len$"
    with pytest.raises(SettingsError, match=message):
        create_engine(tmp_path, serve__max_model_len=48)
