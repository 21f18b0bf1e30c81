"""The environment of a trainer in tests: a target, tables with synthetic requests, and processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from recorded import record_of, tables_of, verify_step_of
from safetensors.torch import save_file

from pipeline.delta import DeltaLog
from schemas.settings import Settings, load, to_environ
from schemas.status import TrainStatus
from schemas.trace.record import VerifyStep
from trainer.data.target import Target, read_target
from trainer.release.registry import SpeculatorRegistry

VOCABULARY, HIDDEN = 40, 16
RUN_TRAINER = ("-c", "from schemas.settings import load; from trainer.train import run; run(load())")
RUN_PROMOTER = ("-c", "from schemas.settings import load; from trainer.release.promoter import run; run(load())")


def write_target(folder: Path) -> None:
    """Write the parts of a target that the trainer reads; random, so that every test has its own line."""
    folder.mkdir()
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 8,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "name": uuid.uuid4().hex,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN),
        "lm_head.weight": 0.02 * torch.randn(VOCABULARY, HIDDEN),
    }
    save_file(tensors, folder / "model.safetensors")


def after(token: int) -> int:
    return (token * 7 + 3) % 30


def feature_table() -> np.ndarray:
    """Return the states that the target captures after each token."""
    return np.random.default_rng(0).standard_normal((VOCABULARY, 3 * HIDDEN)).astype(np.float32)


def request_of(first: int) -> list[VerifyStep]:
    """Return a request whose tokens follow from each other; every draft has a right and a wrong token."""
    tokens = [first]
    while len(tokens) < 24:
        tokens.append(after(tokens[-1]))
    features = feature_table()

    def said(*consumed: int) -> np.ndarray:
        return np.array([[after(token), 35] for token in consumed])

    verify_steps = [verify_step_of(0, 0, tokens[:4], tokens[4], features=features[tokens[:4]], said=said(tokens[3]))]
    for at in range(4, 20, 2):
        pair, wrong = tokens[at : at + 2], (tokens[at + 2] + 1) % 30
        verify_steps.append(
            verify_step_of(
                len(verify_steps),
                at,
                pair,
                tokens[at + 2],
                [pair[1], wrong],
                features=features[pair],
                said=said(*pair, wrong),
            )
        )
    return verify_steps


def offline(folder: Path, **train: object) -> Settings:
    """Return settings of a trainer with tables, but without a registry."""
    flags = {
        "target.path": str(folder / "target"),
        "speculator.draft_vocab_size": 32,
        "registry.tracking_uri": "http://127.0.0.1:9",
        "registry.timeout": 1,
        "tables.uri": str(folder / "tables"),
        "train.checkpoint_dir": str(folder / "train"),
        "train.warm_start": "day-0",
        "train.learning_rate": 5e-3,
        "train.held_out_ratio": 0.25,
        "train.max_epochs": 60,
        "train.registration_interval": 1e6,
        "train.poll_interval": 0.1,
        "train.self_generation": 0,
        "promoter.gate_min_samples": 4,
    }
    return load(environ={}, flags=flags | {f"train.{name}": value for name, value in train.items()})


class World:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.target: Target = read_target(settings)
        self.registry = SpeculatorRegistry(settings.registry)
        self.tables = DeltaLog(settings.tables)
        self.tables.create()
        self.offset = 0

    def serve(self, requests: int, firsts: Sequence[int] = range(30)) -> None:
        """Commit rows of new requests, which begin with these tokens in turn, as the stream does."""
        records = []
        for _ in range(requests):
            verify_steps = request_of(firsts[self.offset % len(firsts)])
            lineage = {"target": self.target.fingerprint, "line": self.target.line}
            records.append(
                record_of(
                    f"request-{self.offset}", verify_steps, self.offset, feature_width=3 * HIDDEN, top_k=2, **lineage
                )
            )
            self.offset += 1
        rows = tables_of(*records)
        for name in ("rejected", "traces", "accepted"):
            self.tables.append(name, rows[name])


def until(holds: Callable[[], object], what: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"not in {timeout_s} s: {what}"
        time.sleep(0.1)


@contextmanager
def process(settings: Settings, arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = {**os.environ, **to_environ(settings), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("ab") as file:
        started = subprocess.Popen([sys.executable, *arguments], env=environ, stdout=file, stderr=file)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        body: bytes = answer.read()
    return body


def train_status(settings: Settings) -> TrainStatus | None:
    with suppress(OSError):
        return TrainStatus.model_validate_json(get(settings.train.port, "/status"))
    return None


def step_of(settings: Settings) -> int:
    status = train_status(settings)
    return status.step if status else 0


def end(running: subprocess.Popen[bytes]) -> int:
    running.send_signal(signal.SIGTERM)
    return running.wait(60)
