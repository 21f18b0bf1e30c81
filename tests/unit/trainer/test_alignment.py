"""Alignment of features, tokens and teachers: row t reads g_t and x_{t+1}; its teacher is the target after x_{t+1}."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import LINE, TARGET, WIDTH, record_of, tables_of, verify_step_of
from tiny_target import VOCABULARY, write_tiny_target

from schemas.settings import Train, load
from schemas.speculator.day_0_draft import read_embeddings
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin import packed_draft
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.batch import Batch, collate
from trainer.data.data_loader import DataLoader
from trainer.data.samples import Sample, Teacher, drop_rootless_branches, read_sample
from trainer.data.target import FrozenTarget, read_target
from trainer.objective.training_time_test import DraftUnroll, TreeLevel, build_draft_trees

SHAPE = DraftShape(8, 8, 2, 1, 4, 32, 32, 1e-6, 100.0, 64, (1, 2, 3))


class Probe(EagleDraft):
    """A draft that records which feature, token and position each row reads."""

    def __init__(self) -> None:
        super().__init__(SHAPE)
        self.load_state_dict(random_draft(SHAPE, 0).state_dict())
        self.read: list[tuple[list[float], list[int]]] = []

    def fuse(self, features_BTF: torch.Tensor) -> torch.Tensor:
        self.features = features_BTF[0, :, 0].tolist()
        return super().fuse(features_BTF)

    def project(self, embeddings_BTH, hidden_BTH, positions_BT):  # type: ignore[no-untyped-def]
        self.read.append((embeddings_BTH[0, :, 0].tolist(), positions_BT[0].tolist()))
        return super().project(embeddings_BTH, hidden_BTH, positions_BT)


NUMBERED = torch.arange(32.0)[:, None].expand(32, 8)
"""Embeddings whose value is the token id."""


def find_targets(batch: Batch, draft: EagleDraft, steps: int) -> set[tuple[int, int, int]]:
    """Return row, step and the teacher's likeliest token of every loss on committed tokens."""
    found = set()
    for k, step in enumerate(build_draft_trees(draft, batch, steps, None).levels):
        for row, node in enumerate(step.index_BT[0].tolist()):
            if node >= 0 and step.learned_A[node]:
                found.add((row, k, int(step.ids_Ak[node, 0])))
    return found


def test_a_row_reads_its_feature_and_next_token_as_in_the_worked_example() -> None:
    features = torch.arange(5.0)[:, None].expand(5, SHAPE.feature_width).bfloat16()
    after = Teacher(torch.tensor([[20 + t] for t in range(5)]), torch.zeros(5, 1))
    tokens = torch.tensor([10, 11, 12, 13, 14])
    batch = collate([Sample("r", tokens, None, features, torch.ones(5, dtype=torch.bool), after)])
    draft = Probe()
    unroll = DraftUnroll(draft, NUMBERED, batch.tokens_BT, batch.features_BTF)
    row = 1
    embeddings, positions = draft.read[0]
    assert (draft.features[row], embeddings[row], positions[row]) == (1.0, 12.0, 1)
    # The teacher of row 1 is the target after x2; the last row has no next token and no teacher.
    assert find_targets(batch, draft, 1) == {(0, 0, 21), (1, 0, 22), (2, 0, 23), (3, 0, 24)}
    # One step later, tokens, teacher and mask are shifted left by one, and the same row has the next position.
    assert find_targets(batch, draft, 2) - find_targets(batch, draft, 1) == {(0, 1, 22), (1, 1, 23), (2, 1, 24)}
    unroll.first(torch.tensor([0]), torch.tensor([row]))
    unroll.advance(torch.tensor([0]), batch.tokens_BT[0, [row + 2]])
    assert draft.read[1] == ([13.0], [row + 1])


def test_the_first_position_after_the_prompt_has_a_loss() -> None:
    mask = torch.tensor([False, False, True, True, True])
    after = Teacher(torch.tensor([[22], [23], [24]]), torch.zeros(3, 1))
    batch = collate([Sample("r", torch.arange(5), 5, torch.zeros(5, SHAPE.feature_width).bfloat16(), mask, after)])
    # The prompt is x0 x1 x2. With the mask of x_t instead of x_{t+1}, row 1 would be missing.
    assert find_targets(batch, random_draft(SHAPE, 0), 1) == {(1, 0, 22), (2, 0, 23), (3, 0, 24)}


def test_a_trace_becomes_the_rows_that_serving_drafted_from() -> None:
    a, b, c, d, e, f, g, x, y, z = range(1, 11)
    verify_steps = [
        verify_step_of(0, 0, [a, b, c], d, said=np.array([[13]])),
        verify_step_of(1, 3, [d, e], f, [e, x], said=np.array([[14], [15], [16]])),
        verify_step_of(2, 5, [f], g, [y, z], said=np.array([[17], [18], [19]])),
    ]
    rows = tables_of(record_of("r", verify_steps, 0, top_k=1))
    (accepted,), rejected = rows["accepted"].to_pylist(), rows["rejected"].to_pylist()
    sample = read_sample(accepted, rejected)
    assert drop_rootless_branches(sample).branches == sample.branches
    assert sample.tokens.tolist() == [a, b, c, d, e, f]
    assert sample.next_token == g
    assert sample.known.tolist() == [False, False, True, True, True, True]
    assert sample.features[:, 0].tolist() == [t / 8 for t in range(6)]
    draft = random_draft(SHAPE, 0)
    batch = collate([sample])
    # After c 13, after D 14, after E (node 0) 15, after F 17.
    assert find_targets(batch, draft, 1) == {(1, 0, 13), (2, 0, 14), (3, 0, 15), (4, 0, 17)}

    # Below D: the accepted E, which is the row's own next token, and X, whose teacher is the target after X.
    # Below F: both drafted tokens.
    one, two = build_draft_trees(draft, batch, 3, 0.0).levels[1:]
    assert find_drafted(one) == [(y, 18, True)]
    assert find_drafted(two) == [(x, 16, True), (z, 19, True)]
    assert [one.tokens_A[parent].item() for parent in two.parent_A[two.committed :]] == [e, y]


def find_drafted(step: TreeLevel) -> list[tuple[int, int, bool]]:
    """Return token, likeliest teacher token, and whether there is a loss, of the nodes that are not committed."""
    own = slice(step.committed, None)
    columns = step.tokens_A[own], step.ids_Ak[own, 0], step.learned_A[own]
    return list(zip(*(column.tolist() for column in columns), strict=True))


class Recorder:
    def __init__(self) -> None:
        self.verify_steps: list[VerifyStep] = []

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.verify_steps.extend(verify_steps)


@pytest.fixture(scope="module", params=["eagle3", "eagle3.1"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[VerifyStep], EagleDraft]:
    """Return target folder, verify steps of a real greedy engine, and the draft that proposed their tokens."""
    folder = write_tiny_target(tmp_path_factory.mktemp("target"))
    flags = {
        "target.path": str(folder),
        "speculator.draft_vocab_size": VOCABULARY - 9,
        "speculator.init": "random",
        "speculator.variant": request.param,
        "serve.num_speculative_tokens": 4,
        "serve.adaptive_drafting": False,
        "serve.max_model_len": 128,
    }
    settings = load(environ={}, flags=flags)
    recorder, done = Recorder(), threading.Event()
    engine = BuiltinEngine(settings, recorder)
    target = read_target(settings)
    draft = target.new_draft()
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    assert engine.line == target.line
    engine.start()

    def on_output(output: Output) -> None:
        if output.finish is not None:
            done.set()

    try:
        with pytest.MonkeyPatch.context() as patch:
            # Rounded weights would draft other tokens than the trainer's.
            patch.setattr(packed_draft, "fastest_dtype", lambda _device: "float32")
            engine.swap(draft, "7")
        engine.submit(Request("r", tuple(range(3, 17)), 40), on_output)
        assert done.wait(60)
    finally:
        engine.stop()
    # The engine copied the draft without gradients; this one is the trainer's.
    return folder, recorder.verify_steps, draft


def test_the_unroll_reproduces_the_drafts_of_a_real_engine(
    served: tuple[Path, list[VerifyStep], EagleDraft],
) -> None:
    folder, verify_steps, draft = served
    width = verify_steps[0].features.shape[1]
    record = record_of("r", verify_steps, 0, feature_width=width, top_k=verify_steps[0].top_ids.shape[1])
    rows = tables_of(record)
    sample = read_sample(rows["accepted"].to_pylist()[0], [])
    batch = collate([sample])
    drafting = [r for r in verify_steps if len(r.draft_tokens) == 4]
    assert len(drafting) > 5
    roots = torch.tensor([r.position for r in drafting])
    unroll = DraftUnroll(draft, read_embeddings(folder), batch.tokens_BT, batch.features_BTF)
    with torch.no_grad():
        hidden = unroll.first(roots * 0, roots - 1)
        for k in range(4):
            scores = draft.logits(hidden).log_softmax(-1)
            drafted = torch.tensor([r.draft_tokens[k] for r in drafting])
            logprobs = torch.tensor([r.draft_logprobs[k] for r in drafting])
            # Published features are bf16, the node drafted from float32: near-ties may differ.
            same = draft.to_target_ids(scores.argmax(-1)) == drafted
            assert same.float().mean() > 0.9
            torch.testing.assert_close(scores.max(-1).values, logprobs, rtol=0.02, atol=0.02)
            hidden = unroll.advance(torch.arange(len(roots)), drafted) if k < 3 else hidden


def test_the_data_loader_returns_the_rows_of_a_record_unchanged(tmp_path: Path) -> None:
    from pipeline.delta import DeltaLog
    from schemas.settings import Tables

    tables = DeltaLog(Tables(uri=str(tmp_path)))
    rows = tables_of(record_of("r", [verify_step_of(0, 0, [1, 2, 3], 4), verify_step_of(1, 3, [4], 5, [9, 8])], 0))
    for name in ("rejected", "accepted"):
        tables.append(name, rows[name])
    states = FrozenTarget(tmp_path, (), torch.device("cpu")).compute_states
    loader = DataLoader(tables, Train(batch_size=1, held_out_ratio=1e-9), TARGET, LINE, states)
    loader.poll()
    (sample,) = loader.next_samples()
    assert sample.features.shape == (4, WIDTH)
    assert [(branch.root, branch.tokens) for branch in sample.branches] == [(3, (9, 8))]
