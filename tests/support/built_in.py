"""The built-in engine as the reference: same draft, same requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import patch

import torch
from bfloat16 import from_bf16
from safetensors import safe_open

from schemas.settings import Train, load
from schemas.speculator import checkpoint
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin import packed_draft
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.batch import collate
from trainer.data.samples import Sample, Teacher
from trainer.loop.learner import Learner

TOP_K = 8


class _RecordingSink:
    """A trace sink that keeps all verify steps."""

    def __init__(self) -> None:
        self.verify_steps: dict[str, list[VerifyStep]] = {}

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.verify_steps.setdefault(request.id, []).extend(verify_steps)


def verify_steps_of(
    target: Path, draft: Path, prompts: Mapping[str, Sequence[int]], tokens: int, steps: int
) -> dict[str, list[VerifyStep]]:
    """Return the verify steps of the built-in engine, in float32 as in SGLang."""
    flags = {
        "target.path": str(target),
        "serve.drafter": "eagle", "serve.adaptive_drafting": False, "serve.num_speculative_tokens": steps,
        "serve.weight_dtype": "float32",
        "traces.top_k": TOP_K,
    }  # fmt: skip
    sink = _RecordingSink()
    # SGLang does not round the draft's weights to 8 bits.
    with patch.object(packed_draft, "fastest_dtype", lambda _device: "float32"):
        engine = BuiltinEngine(load(environ={}, flags=flags), sink)
        engine.start()
        engine.swap(checkpoint.read_checkpoint(draft, engine.line), "1")
    outputs: SimpleQueue[Output] = SimpleQueue()
    for name, prompt in prompts.items():
        engine.submit(Request(name, tuple(prompt), tokens, ignore_eos=True), outputs.put)
        # One after the other: a prompt next to a decoding request is read in pieces, as fast as the machine is.
        while outputs.get(timeout=120).finish is None:
            pass
    engine.stop()
    return sink.verify_steps


def train(target: Path, draft: Path, into: Path, answers: Mapping[str, Sequence[VerifyStep]], steps: int) -> None:
    """Write a version that is overfitted to these answers, so that its draft tokens are accepted."""
    manifest = checkpoint.read_manifest(draft)
    learner = Learner(
        checkpoint.read_checkpoint(draft, manifest.line),
        embeddings_of(target),
        Train(ttt_steps=3, learning_rate=3e-3, warmup_steps=1),
    )
    batch = collate([sample_of(name, verify_steps) for name, verify_steps in answers.items()])
    for _ in range(steps):
        learner.step(batch)
    checkpoint.write_checkpoint(learner.draft, into, manifest.target)


def sample_of(request: str, verify_steps: Sequence[VerifyStep]) -> Sample:
    """Return the committed tokens of a request as a training sample."""
    prompt = sum(len(r.tokens) for r in verify_steps if r.verify_step == 0)
    tokens = [token for r in verify_steps for token in r.tokens]
    decided = [r for r in verify_steps if r.bonus is not None]
    rows = [[0, *(1 + node for node in r.accepted)] for r in decided]
    ids = torch.cat([torch.tensor(r.top_ids[at]) for r, at in zip(decided, rows, strict=True)])
    logprobs = torch.cat([torch.tensor(r.top_logprobs[at]) for r, at in zip(decided, rows, strict=True)])
    features = torch.cat([torch.tensor(from_bf16(r.features)) for r in verify_steps])
    known = torch.arange(len(tokens)) >= prompt - 1
    return Sample(
        request, torch.tensor(tokens), verify_steps[-1].bonus, features.bfloat16(), known, Teacher(ids.long(), logprobs)
    )


def embeddings_of(target: Path) -> torch.Tensor:
    """[V, H] in float32."""
    with safe_open(target / "model.safetensors", "pt") as file:
        return file.get_tensor("model.embed_tokens.weight").float()


def eos_of(target: Path) -> int:
    """Return the EOS token."""
    found: int = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    return found
