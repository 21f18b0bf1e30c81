"""The scorer that MLflow loads joins rows as the trainer does, and rejects rows that a version cannot draft from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from recorded import record_of, tables_of
from trainer_world import HIDDEN, offline, request_of, write_target

from schemas.settings import Settings
from schemas.speculator.checkpoint import CheckpointError, round_weights, write_checkpoint
from trainer.data.batch import collate
from trainer.data.samples import read_sample
from trainer.data.target import Target, read_target
from trainer.loop.learner import Learner
from trainer.release.scoring_model import DraftScorer, _load_pyfunc, write_model_files

STEPS = request_of(3)


class Desk:
    """A draft that has learned a request, and rows of it."""

    def __init__(self, folder: Path) -> None:
        write_target(folder / "target")
        self.settings: Settings = offline(folder, dtype="float32")
        self.target: Target = read_target(self.settings)
        learner = Learner(self.target.new_draft(), self.target.embeddings_VH, self.settings.train)
        (row,) = self.table().to_pylist()
        batch = collate([read_sample(row, ())])
        for _ in range(120):
            learner.step(batch)
        self.draft = round_weights(learner.draft)
        self.scorer = DraftScorer(self.draft, self.target.fingerprint, self.settings)

    def rows(self, *cuts: int, request: str = "one") -> Any:
        return self.table(*cuts, request=request).to_pandas()

    def table(self, *cuts: int, request: str = "one") -> pa.Table:
        """Return the rows of a request whose chunks begin at these verify steps."""
        records = []
        for chunk, (begin, end) in enumerate(zip((0, *cuts), (*cuts, len(STEPS)), strict=True)):
            steps = STEPS[begin:end]
            records.append(
                record_of(
                    request,
                    steps,
                    chunk,
                    chunk=chunk,
                    last=end == len(STEPS),
                    target=self.target.fingerprint,
                    line=self.target.line,
                    feature_width=3 * HIDDEN,
                    top_k=2,
                )
            )
        return tables_of(*records)["accepted"]

    def score(self, rows: Any) -> dict[str, Any]:
        (found,) = self.scorer.predict(rows).to_dict("records")
        return dict(found)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_a_request_has_one_score_however_it_was_cut_into_rows(desk: Desk) -> None:
    whole, cut = desk.score(desk.rows()), desk.rows(3, 6)
    assert whole["accepted_tokens"] > 0
    assert whole["acceptance_length"] == 1 + whole["accepted_tokens"] / whole["verify_steps"]
    assert desk.score(cut) == desk.score(cut.iloc[::-1]) == whole


def test_a_missing_row_begins_another_stretch_of_verify_steps(desk: Desk) -> None:
    rows = desk.rows(3, 6)
    parts = [desk.score(rows.iloc[[number]]) for number in (0, 2)]
    found = desk.score(rows.iloc[[0, 2]])
    assert found["verify_steps"] == sum(part["verify_steps"] for part in parts) > 0


def test_requests_are_scored_in_the_order_of_their_first_rows(desk: Desk) -> None:
    rows = pa.concat_tables([desk.table(4, request="b"), desk.table(4, request="a")]).to_pandas()
    assert list(desk.scorer.predict(rows)["request"]) == ["b", "a"]
    assert list(desk.scorer.predict(rows.head(0)).columns) == list(desk.scorer.predict(rows).columns)


def test_a_request_without_a_verify_step_has_no_acceptance_length(desk: Desk) -> None:
    found = desk.score(desk.rows(1).head(1))
    assert found["verify_steps"] == 0
    assert math.isnan(found["acceptance_length"])


def test_sampled_requests_are_scored_as_sampled_ones(desk: Desk) -> None:
    sampled = desk.rows().assign(temperature=1.0, top_p=0.9, sampling_top_k=float("nan"))
    sampled["sampling_top_k"] = 0.0
    assert desk.score(sampled)["accepted_tokens"] != round(desk.score(sampled)["accepted_tokens"])
    unknown = desk.rows().assign(temperature=float("nan"), top_p=float("nan"), sampling_top_k=float("nan"))
    assert desk.score(unknown) == desk.score(desk.rows())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"target": "other"}, "of target other"),
        ({"feature_width": 5}, "feature_width 5, the version reads 48 values"),
        ({"features": b"", "position": 7}, "position 7: no features"),
    ],
)
def test_a_row_that_the_draft_cannot_read_is_an_error(desk: Desk, changed: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=f"request one.*{why}"):
        desk.scorer.predict(desk.rows().assign(**changed))


def test_a_version_loads_with_the_settings_of_its_registration_and_checks_its_files(desk: Desk, tmp_path: Path) -> None:
    folder, line = tmp_path / "version", desk.target.line
    manifest = write_checkpoint(desk.draft, folder, desk.target.fingerprint, line=line)
    write_model_files(folder, desk.settings, manifest, "card", torch.device("cpu"))
    model = json.loads((folder / "MLmodel").read_text())
    config = model["flavors"]["python_function"]["config"]
    loaded = _load_pyfunc(str(folder), config)
    assert loaded.predict(desk.rows()).equals(desk.scorer.predict(desk.rows()))
    shorter = loaded.predict(desk.rows())["verify_steps"]
    config["serve"]["num_speculative_tokens"] = 1
    assert (_load_pyfunc(str(folder), config).predict(desk.rows())["verify_steps"] > shorter).all()
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: SHA-256"):
        _load_pyfunc(str(folder), config)
