"""Which weights a draft of a new line receives from another line's draft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from tiny_draft import SHAPE

from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import line_name
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from trainer.data.target import Target
from trainer.loop.warm_start import copy_weights, load_initial_draft
from trainer.release.registry import SpeculatorRegistry

V = SHAPE.vocab_size


def draft_of(kept: list[int], seed: int, **changes: int) -> EagleDraft:
    """Return a random draft with the given target tokens as its vocabulary."""
    draft = random_draft(replace(SHAPE, draft_vocab_size=len(kept), **changes), seed)
    ids = torch.tensor(kept)
    draft.d2t.copy_(ids - torch.arange(len(kept)))
    draft.t2d.zero_()
    draft.t2d[ids] = True
    with torch.no_grad():
        draft.norm.weight.fill_(1.0 + seed)
    return draft


def parameters(draft: EagleDraft) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in draft.named_parameters()}


def test_a_draft_of_the_same_shape_and_vocabulary_is_copied_whole() -> None:
    old, new = draft_of(list(range(16)), 1), draft_of(list(range(16)), 2)
    copied = copy_weights(old, new)
    assert set(copied.parameters) == set(dict(new.named_parameters()))
    assert (copied.unchanged, copied.tokens) == ((), 16)
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name


@pytest.mark.parametrize("kept", [[1, 3, 5, 7, 11, 30, 31], [0, 2, 3, *range(10, 32)]])
def test_with_another_draft_vocabulary_rows_of_the_head_follow_their_target_tokens(kept: list[int]) -> None:
    first = [0, 3, 4, 5, 9, 11, 12, 31]
    old, new = draft_of(first, 1), draft_of(kept, 2)
    before, head = parameters(new), new.lm_head.weight
    d2t, t2d = new.d2t.clone(), new.t2d.clone()
    copied = copy_weights(old, new)
    for row, token in enumerate(kept):
        wanted = old.lm_head.weight[first.index(token)] if token in first else before["lm_head.weight"][row]
        assert torch.equal(head[row], wanted), token
        assert int(new.to_target_ids(torch.tensor(row))) == token
    assert copied.tokens == len(set(first) & set(kept))
    assert copied.unchanged == ()
    assert torch.equal(new.fc.weight, old.fc.weight)
    assert torch.equal(new.d2t, d2t)
    assert torch.equal(new.t2d, t2d)


def test_vocabularies_without_a_common_token_leave_the_head_unchanged() -> None:
    old, new = draft_of([0, 1, 2], 1), draft_of([5, 6, 7, 8], 2)
    before = parameters(new)
    copied = copy_weights(old, new)
    assert (copied.unchanged, copied.tokens) == (("lm_head.weight",), 0)
    assert torch.equal(new.lm_head.weight, before["lm_head.weight"])
    assert torch.equal(new.norm.weight, old.norm.weight)


def test_ids_of_another_vocabulary_are_not_matched() -> None:
    old, new = draft_of(list(range(16)), 1), draft_of(list(range(16)), 2, vocab_size=V + 8)
    before = parameters(new)
    copied = copy_weights(old, new)
    assert (copied.unchanged, copied.tokens) == (("lm_head.weight",), 0)
    assert torch.equal(new.lm_head.weight, before["lm_head.weight"])
    assert torch.equal(new.midlayer.self_attn.q_proj.weight, old.midlayer.self_attn.q_proj.weight)


def test_only_parameters_of_another_shape_stay_at_day_0() -> None:
    old, new = draft_of(list(range(16)), 1), draft_of(list(range(16)), 2, intermediate_size=24)
    before = parameters(new)
    copied = copy_weights(old, new)
    assert set(copied.unchanged) == {f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    for name in copied.unchanged:
        assert torch.equal(dict(new.named_parameters())[name], before[name])
    assert str(copied).startswith("10 of 13 tensors, 16 draft tokens; unchanged: midlayer.mlp.gate_proj")


def test_fusion_weights_are_not_copied_between_raw_and_normed_states() -> None:
    old = draft_of(list(range(16)), 1)
    new = random_draft(replace(SHAPE, variant="eagle3.1"), 2)
    before = parameters(new)
    copied = copy_weights(old, new)
    assert set(copied.unchanged) == {"fc.weight", *(f"fc_norm.{i}.weight" for i in range(3))}
    assert all(torch.equal(dict(new.named_parameters())[name], before[name]) for name in copied.unchanged)
    assert torch.equal(new.midlayer.self_attn.q_proj.weight, old.midlayer.self_attn.q_proj.weight)


def test_between_targets_of_different_width_nothing_fits() -> None:
    other = DraftShape(12, 20, 3, 3, 4, V + 1, 16, 1e-5, 100.0, 64, (1, 3, 5))
    old, new = draft_of(list(range(16)), 1), random_draft(other, 2)
    before = parameters(new)
    copied = copy_weights(old, new)
    assert (copied.parameters, copied.tokens, str(copied)) == ((), 0, "nothing fits")
    assert all(torch.equal(value, before[name]) for name, value in new.named_parameters())


def test_the_old_draft_is_not_modified_and_shares_nothing() -> None:
    old, new = draft_of(list(range(16)), 1), draft_of(list(range(8)), 2)
    before = parameters(old)
    copy_weights(old, new)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in old.named_parameters())


OLD_TARGET, NEW_TARGET = "a" * 32, "b" * 32


class ChampionRegistry:
    """A registry that keeps champions by line in memory."""

    def __init__(self) -> None:
        self.champions: dict[str, tuple[str, str, EagleDraft]] = {}

    def promote(self, target: str, version: str, draft: EagleDraft) -> str:
        line = line_name(target, draft.shape, draft.d2t)
        self.champions[line] = version, target, draft
        return line

    def aliases(self, line: str) -> dict[str, str]:
        return {"champion": self.champions[line][0]} if line in self.champions else {}

    def download(self, line: str, version: str, folder: Path) -> Path:
        champion, target, draft = self.champions[line]
        assert version == champion
        checkpoint.write_checkpoint(draft, folder / "version", target, torch.float32)
        return folder / "version"


def day_0_draft(registry: ChampionRegistry, day_0: EagleDraft, parent_line: str) -> tuple[str, EagleDraft]:
    line = line_name(NEW_TARGET, day_0.shape, day_0.d2t)
    target = Target(NEW_TARGET, line, torch.zeros(V, SHAPE.hidden_size), day_0)
    settings: Settings = load(environ={}, flags={"train.parent_line": parent_line})
    return load_initial_draft(settings, target, cast(SpeculatorRegistry, registry))


def test_a_new_line_starts_with_the_champion_of_its_parent_line() -> None:
    registry, old, day_0 = ChampionRegistry(), draft_of(list(range(16)), 1), draft_of(list(range(8, 32)), 2)
    before = parameters(day_0)
    parent_line = registry.promote(OLD_TARGET, "7", old)
    version, draft = day_0_draft(registry, day_0, parent_line)
    assert version == f"{parent_line}/7"
    assert torch.equal(draft.lm_head.weight[:8], old.lm_head.weight[8:])
    assert torch.equal(draft.lm_head.weight[8:], day_0.lm_head.weight[8:])
    assert torch.equal(draft.fc.weight, old.fc.weight)
    assert torch.equal(draft.d2t, day_0.d2t)
    assert all(torch.equal(value, before[name]) for name, value in day_0.named_parameters()), (
        "the draft of day 0 is not modified"
    )


def test_a_line_with_a_champion_starts_with_it() -> None:
    registry, own = ChampionRegistry(), draft_of(list(range(16)), 3)
    parent_line = registry.promote(OLD_TARGET, "7", draft_of(list(range(16)), 1))
    registry.promote(NEW_TARGET, "2", own)
    version, draft = day_0_draft(registry, draft_of(list(range(16)), 2), parent_line)
    assert version == "2"
    assert torch.equal(draft.fc.weight, own.fc.weight)


@pytest.mark.parametrize("case", ["none set", "unknown", "nothing fits"])
def test_without_a_fitting_parent_a_new_line_starts_at_day_0(case: str) -> None:
    registry, day_0 = ChampionRegistry(), draft_of(list(range(16)), 2)
    other = random_draft(DraftShape(12, 20, 3, 3, 4, V + 1, 16, 1e-5, 100.0, 64, (1, 3, 5)), 1)
    parent_line = registry.promote(OLD_TARGET, "7", other)
    named = {"none set": "", "unknown": "no-such-line", "nothing fits": parent_line}[case]
    version, draft = day_0_draft(registry, day_0, named)
    assert version == "day-0-head-0"
    assert all(torch.equal(value, dict(day_0.named_parameters())[name]) for name, value in draft.named_parameters())
