"""A training step computes what those of ``speculators`` and SpecForge do, from the same weights and the same batch.

Each peer runs as ``aurora bench trainer`` runs it. Where definitions differ, the difference is applied to ours here;
``docs/benchmarks/methods.md`` names each of them.

Shapes: S sequences of n tokens, V and D target and draft vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_draft import SHAPE
from torch import Tensor
from torch.nn import functional as F

from ops.bench.trainer import synthetic_data
from ops.bench.trainer.our_worker import AuroraTrainer
from ops.bench.trainer.peer_worker import CONFIG, DECAY, MAX_GRAD_NORM, WEIGHTS
from schemas.settings import Train
from schemas.speculator.network import DraftShape, random_draft
from trainer.data.batch import collate
from trainer.objective.losses import SumCounts, ttt_loss

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "support" / "peer_training_step.py"
TTT_STEPS, SEQUENCES, LENGTH = 4, 3, 12
ROWS = LENGTH - 1
VOCABULARY, DRAFT_VOCABULARY = 64, 40
WIDE = replace(
    SHAPE,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=VOCABULARY,
    draft_vocab_size=DRAFT_VOCABULARY,
)
FOLDERS = {"eagle3": replace(WIDE, variant="eagle3"), "eagle3.1": replace(WIDE, variant="eagle3.1")}
STEPS = (
    "speculators eagle3 inside one by one float32",
    "speculators eagle3.1 inside one by one float32",
    "specforge eagle3 inside at once float32",
    "specforge eagle3 outside at once float32",
    "specforge eagle3 outside compact float32",
)
"""Inside and outside are batches: the target's likeliest token is in the draft vocabulary everywhere, or only often."""
PACKED = "speculators eagle3 inside packed float32"


@dataclass(frozen=True)
class Step:
    """What a training step computed."""

    logits: list[Tensor]
    """[rows with a loss, D] of each TTT step."""
    losses: list[float]
    gradients: dict[str, Tensor]
    """Clipped."""


@pytest.fixture(scope="module")
def folder(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and batches, and what the peers' steps compute from them."""
    made = tmp_path_factory.mktemp("peers")
    for name, shape in FOLDERS.items():
        (made / name).mkdir()
        write_data(made / name, shape)
    command = [peers_python, "-P", WORKER, made, str(TTT_STEPS)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    steps = "\n".join([*STEPS, PACKED])
    done = subprocess.run(command, input=steps, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def write_data(folder: Path, shape: DraftShape) -> None:
    """Write a draft with gaps in its vocabulary and no weight at its initial value, and both batches."""
    generator = torch.Generator().manual_seed(7)
    kept_D = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    draft = random_draft(shape, 0, kept_D)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + float(weight.dim() == 1))
    embeddings_VH = torch.randn(VOCABULARY, shape.hidden_size, generator=generator) * 0.05
    synthetic_data.write_weights(folder, draft, embeddings_VH)
    batch = dict(synthetic_data.random_sequences(shape, 4 * SEQUENCES, LENGTH, seed=1))
    last_AH = batch["last"].flatten(0, 1)
    inside_AH = last_AH[draft.t2d[(last_AH @ embeddings_VH.T).argmax(dim=-1)]]
    tokens_Sn = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    for name, last in ("inside", inside_AH), ("outside", last_AH):
        last_SnH = last[: tokens_Sn.numel()].unflatten(0, tokens_Sn.shape)
        torch.save({"tokens": tokens_Sn, "features": batch["features"][:SEQUENCES], "last": last_SnH}, folder / name)


class Ours:
    """Our step, from the files of a peer's step."""

    def __init__(self, folder: Path, step: str) -> None:
        _, weights, batch, _ = step.split(maxsplit=3)
        self._weights = torch.load(folder / weights / WEIGHTS, weights_only=True)
        self._config = json.loads((folder / weights / CONFIG).read_text())
        self._sequences = torch.load(folder / weights / batch, weights_only=True)
        self.embeddings_VH = self._weights["embed_tokens.weight"]
        self.target_SnV = (self._sequences["last"] @ self.embeddings_VH.T).log_softmax(dim=-1)
        self.kept_V = self._weights["t2d"]

    def has_loss(self, k: int) -> Tensor:
        """[S, n - 1] rows that TTT step k learns from: a token follows, and the draft can propose the likeliest one."""
        taught_Sn = self.kept_V[self.target_SnV.argmax(dim=-1)]
        return F.pad(taught_Sn[:, 1 + k :], (0, k))

    def compute(self, top_k: int, sum_counts: SumCounts = lambda counts: counts) -> Step:
        """Train on the recorded top k."""
        draft = AuroraTrainer(self._weights, self._config).draft
        logits: list[Tensor] = []
        draft.lm_head.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
        rows = zip(*(self._sequences[name] for name in ("tokens", "features", "last")), strict=True)
        samples = [synthetic_data.build_sample(*row, self.embeddings_VH, top_k) for row in rows]
        train = Train(ttt_steps=TTT_STEPS, ttt_decay=DECAY, objective="kl", rejected_weight=0)
        loss = ttt_loss(draft, self.embeddings_VH, collate(samples), train, sum_counts)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), MAX_GRAD_NORM)
        gradients = {name: parameter.grad for name, parameter in draft.named_parameters()}
        return Step(logits, list(loss.accepted_K), gradients)


def read_step(folder: Path, step: str, ours: Ours) -> Step:
    """Return a peer's step, its logits at the rows with a loss."""
    found = load_file(folder / step)
    logits = [found.pop(f"logits {k}").unflatten(0, (SEQUENCES, ROWS))[ours.has_loss(k)] for k in range(TTT_STEPS)]
    losses = [float(found.pop(f"loss {k}")) for k in range(TTT_STEPS)]
    return Step(logits, losses, found)


def as_specforge(ours: Ours) -> Step:
    """Return our step by SpecForge's definition: cross-entropy, its mean over all rows of the batch."""
    step = ours.compute(VOCABULARY, lambda counts: torch.full_like(counts, SEQUENCES * ROWS))
    target_SnD = ours.target_SnV[..., ours.kept_V].log_softmax(dim=-1)
    entropy_Sn = -(target_SnD.exp() * target_SnD).sum(dim=-1)
    means = [
        float(entropy_Sn[:, 1 + k :][ours.has_loss(k)[:, : ROWS - k]].sum()) / (SEQUENCES * ROWS)
        for k in range(TTT_STEPS)
    ]
    return replace(step, losses=[kl + mean for kl, mean in zip(step.losses, means, strict=True)])


@pytest.mark.parametrize("step", [*STEPS, PACKED])
def test_every_ttt_step_has_the_logits_of_other_trainers(folder: Path, step: str) -> None:
    ours = Ours(folder, step)
    for found, expected in zip(ours.compute(8).logits, read_step(folder, step, ours).logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_every_ttt_step_has_the_loss_of_other_trainers_where_all_of_the_target_is_recorded(
    folder: Path, step: str
) -> None:
    ours = Ours(folder, step)
    found = as_specforge(ours) if step.startswith("specforge") else ours.compute(VOCABULARY)
    expected = read_step(folder, step, ours)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name], rtol=1e-3, atol=1e-6, msg=name)
