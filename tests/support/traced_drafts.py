"""Fixtures of the tests that run another project's server: prompts, a random draft and a trained one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built_in import train, verify_steps_of

from schemas.settings import Speculator
from schemas.speculator import checkpoint
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.target_fingerprint import target_fingerprint


@pytest.fixture(scope="session")
def prompts(smollm2: Path) -> list[list[int]]:
    """Token ids of some prompts."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    texts = ("Write a short story about a cat.", "What is the capital of France?", "Count from one to twenty.")
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]


@pytest.fixture(scope="session")
def random_draft(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The day-0 draft as a version folder."""
    folder = tmp_path_factory.mktemp("draft") / "version"
    checkpoint.write_checkpoint(create_day_0_draft(smollm2, Speculator()), folder, target_fingerprint(smollm2))
    return folder


@pytest.fixture(scope="session")
def trained_draft(
    smollm2: Path, random_draft: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A draft that is overfitted to the target's answers to ``prompts``, except for their ends."""
    folder = tmp_path_factory.mktemp("trained") / "version"
    requests = {f"learn-{number}": prompt for number, prompt in enumerate(prompts)}
    train(smollm2, random_draft, folder, verify_steps_of(smollm2, random_draft, requests, 40, steps=1), steps=15)
    return folder


def loop_flags(target: Path, broker: str, registry: str, folder: Path, free_port: Callable[[], int]) -> dict[str, Any]:
    """Settings of the whole loop around a server that learns three prompts within a minute."""
    return {
        "target.path": str(target),
        "kafka.bootstrap_servers": broker,
        "kafka.traces_topic": f"traces-{folder.name}",
        "kafka.speculators_topic": f"speculators-{folder.name}",
        "kafka.drift_topic": f"drift-{folder.name}",
        "registry.tracking_uri": registry,
        "tables.uri": str(folder / "tables"),
        "serve.port": free_port(),
        "serve.num_speculative_tokens": 3,
        "serve.poll_interval": 0.5,
        "stream.port": free_port(),
        "stream.group_id": f"group-{folder.name}",
        "stream.data_dir": str(folder / "stream"),
        "stream.flush_interval": 0.5,
        "train.checkpoint_dir": str(folder / "train"),
        "train.port": free_port(),
        "train.learning_rate": 3e-3,
        "train.warmup_steps": 1,
        "train.batch_size": 3,
        "train.replay_batch_size": 2,
        "train.max_epochs": 60,
        "train.held_out_ratio": 0.25,
        "train.registration_interval": 15,
        "train.poll_interval": 0.2,
        "train.self_generation": 0,
        "promoter.port": free_port(),
        "promoter.poll_interval": 0.5,
        "promoter.gate_min_samples": 1,
        "promoter.gate_error": 0.5,
        "canary.anchor_share": 0,
    }
