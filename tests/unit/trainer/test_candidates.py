"""What a version is registered with: figures of the held-out set, each computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from tiny_draft import SHAPE
from torch import Tensor

from schemas.settings import load
from schemas.speculator.checkpoint import line_of
from schemas.speculator.network import EagleDraft, random_draft
from trainer.data.samples import Teacher, Window
from trainer.data.target import Target
from trainer.objective.simulated_acceptance import Accepted, accepted_per_step, by_window
from trainer.release import registration
from trainer.release.gate import HeldOut
from trainer.release.registration import Candidates
from trainer.release.registry import SpeculatorRegistry

TARGET = "a" * 32
V = SHAPE.vocab_size
LOOKAHEAD = 2
EMBEDDINGS_VH = torch.randn(V, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))


class Registry:
    """Versions of one line, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.named: dict[str, str] = {}
        self.told: dict[str, Mapping[str, str]] = {}

    def aliases(self, _line: str) -> dict[str, str]:
        return self.named

    def tags(self, _line: str, version: str) -> Mapping[str, str]:
        return self.told[version]

    def register(
        self, _line: str, folder: Path, tags: Mapping[str, str], _figures: Mapping[str, float], _card: str
    ) -> str:
        version = str(len(self.told) + 1)
        self.told[version] = tags
        folder.rename(self.folder / version)
        folder.mkdir()
        return version

    def point(self, _line: str, alias: str, version: str) -> None:
        self.named[alias] = version

    def download(self, _line: str, version: str, _folder: Path) -> Path:
        return self.folder / version


def window(seed: int, label: str) -> Window:
    g = torch.Generator().manual_seed(seed)
    said = torch.randint(0, SHAPE.draft_vocab_size, (12, 1), generator=g)
    return Window(
        request=str(seed),
        tokens=torch.randint(0, SHAPE.draft_vocab_size, (12,), generator=g),
        next_token=3,
        features=torch.randn(12, SHAPE.feature_width, generator=g).to(torch.bfloat16),
        known=torch.arange(12) >= 0,
        teacher=Teacher(said, torch.zeros(12, 1)),
        label=label,
    )


WINDOWS = [window(seed, "code" if seed % 2 else "math") for seed in range(10)]


def draft_of(seed: int) -> EagleDraft:
    """A draft that is wrong in a way of its own: weights as large as these make it sure of what it says."""
    draft = random_draft(SHAPE, seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15)
    return draft


def best_first() -> list[EagleDraft]:
    """The best and the worst of some drafts: far enough apart that any part of the windows tells which is which."""
    drafts = [draft_of(seed) for seed in range(12)]
    drafts.sort(key=lambda draft: -accepted_per_step(draft, EMBEDDINGS_VH, WINDOWS, LOOKAHEAD).tokens)
    return [drafts[0], drafts[-1]]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


@pytest.fixture
def made(registry: Registry) -> Candidates:
    day_0 = best_first()[1]
    target = Target(TARGET, line_of(TARGET, day_0.shape, day_0.d2t), EMBEDDINGS_VH, day_0)
    flags = {"serve.num_speculative_tokens": LOOKAHEAD, "train.dtype": "float32", "promoter.gate_label_min_samples": 3}
    return Candidates(load(environ={}, flags=flags), target, cast(SpeculatorRegistry, registry))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows were scored, by call that had some."""
    calls: list[int] = []

    def counting(draft: EagleDraft, table: Tensor, windows: Sequence[Window], lookahead: int) -> list[Accepted]:
        if windows:
            calls.append(len(windows))
        return by_window(draft, table, windows, lookahead)

    monkeypatch.setattr(registration, "by_window", counting)
    return calls


def test_a_version_is_registered_with_figures_of_both_drafts_on_the_slice_and_on_each_label(
    made: Candidates, registry: Registry
) -> None:
    better, day_0 = best_first()
    assert made.offer(better, made.examine(better, WINDOWS), {}, {}) == "1"
    told = HeldOut.of(registry.told["1"])
    assert told.champion == "day-0-head-0"
    for label, figures in [("code", told.labels[1]), ("math", told.labels[0]), (None, told)]:
        chosen = [w for w in WINDOWS if label in {None, w.label}]
        assert figures.windows == len(chosen)
        assert figures.accepted_per_step == accepted_per_step(better, EMBEDDINGS_VH, chosen, LOOKAHEAD).length
        assert figures.champion_accepted_per_step == accepted_per_step(day_0, EMBEDDINGS_VH, chosen, LOOKAHEAD).length
    assert [label.label for label in told.labels] == ["math", "code"]
    assert told.accepted_per_step > told.champion_accepted_per_step


def test_a_champion_is_scored_once_on_each_window_however_often_it_is_compared_with(
    made: Candidates, registry: Registry, scored: list[int]
) -> None:
    better = best_first()[0]
    made.offer(better, made.examine(better, WINDOWS[:8]), {}, {})
    assert scored == [8, 8], "the draft and day 0"
    registry.named["champion"] = "1"
    scored.clear()
    made.offer(better, made.examine(better, WINDOWS[:8]), {}, {})
    assert scored == [8, 8], "the draft and the new champion, which is candidate too"
    scored.clear()
    made.offer(better, made.examine(better, WINDOWS[2:]), {}, {})
    assert scored == [8, 2]


def test_windows_that_have_left_the_slice_are_forgotten(
    made: Candidates, registry: Registry, scored: list[int]
) -> None:
    better = best_first()[0]
    for chosen, expected in [(WINDOWS[:5], [5]), (WINDOWS[5:], [5]), (WINDOWS[:5], [5]), (WINDOWS[:5], [])]:
        scored.clear()
        registry.named.clear()
        made.offer(better, made.examine(better, chosen), {}, {})
        assert scored == [5, *expected], "the draft, and what is new to day 0"
