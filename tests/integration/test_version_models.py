"""A registered version is a model of a real MLflow server, which names the tables that it was trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import mlflow
import mlflow.pyfunc
import pytest
from deltalake import DeltaTable
from mlflow.models import Model
from trainer_world import World, offline, write_target

from schemas.registry_client import connect, model_name
from schemas.speculator.checkpoint import read_checkpoint
from trainer.data.batch import collate
from trainer.data.samples import Sample
from trainer.data.table_reader import TableReader
from trainer.loop.learner import Learner
from trainer.release.evaluation import Evaluation, HeldOutEvaluator
from trainer.release.registration import Registrar
from trainer.release.registry import Version

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "import-export.md"


class Registered:
    """A version that learned from the rows of the tables, with the trainer's evaluation of it on the same rows."""

    def __init__(self, registry: str, folder: Path) -> None:
        write_target(folder / "target")
        settings = offline(folder)
        section = settings.registry.model_copy(update={"tracking_uri": registry, "timeout": 30.0})
        # Any draft passes: what matters here is how it is registered.
        gate = settings.promoter.model_copy(update={"gate_margin": -99.0})
        self.settings = settings.model_copy(update={"registry": section, "promoter": gate})
        self.world = World(self.settings)
        self.world.serve(40)
        samples = self._read_samples()
        learner = Learner(self.world.target.new_draft(), self.world.target.embeddings_VH, self.settings.train)
        for _ in range(30):
            learner.step(collate(samples))
        target, versions = self.world.target, self.world.registry
        evaluator = HeldOutEvaluator(self.settings, target, versions)
        self.evaluation: Evaluation = evaluator.evaluate(learner.draft, dict.fromkeys(samples, 1.0))
        read = {name: self.world.tables.version(name) for name in ("accepted", "rejected")}
        registrar = Registrar(self.settings, target, versions, evaluator)
        number = registrar.register_if_better(learner.draft, self.evaluation, {"tables": json.dumps(read)}, {})
        assert number is not None
        self.name, self.number = model_name(target.line), number

    @property
    def version(self) -> Version:
        found = self.world.registry.version(self.world.target.line, self.number)
        assert found is not None
        return found

    def rows(self) -> Any:
        return self.world.tables.read("accepted").to_pandas()

    def load(self, **config: Any) -> Any:
        return mlflow.pyfunc.load_model(f"models:/{self.name}/{self.number}", model_config=config or None)

    def _read_samples(self) -> list[Sample]:
        target, tables = self.world.target, self.world.tables
        reader = TableReader(tables, target.fingerprint, target.line, self.settings.train, Counter())
        entries = [*reader.read(tables.version("accepted"), tables.version("rejected")), *reader.take_open()]
        return [entry.sample for entry in entries]


@pytest.fixture
def registered(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registered:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    return Registered(registry, tmp_path)


def test_mlflow_loads_a_version_and_scores_rows_as_the_trainer_does(registered: Registered) -> None:
    model = registered.load()
    assert list(model.predict(model.input_example)["request"]) == ["example"]
    scores = model.predict(registered.rows().sample(frac=1, random_state=0))
    found = scores["accepted_tokens"].sum() / scores["verify_steps"].sum()
    assert found == pytest.approx(registered.evaluation.score.accepted_per_step)
    assert found > 0.3
    assert len(scores) == 40


def test_a_version_holds_no_code_and_nodes_accept_its_files(registered: Registered, tmp_path: Path) -> None:
    line = registered.world.target.line
    folder = registered.world.registry.download(line, registered.number, tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "manifest.json", "model.safetensors"),
        *("MLmodel", "README.md", "input_example.json", "python_env.yaml", "requirements.txt"),
    }
    assert (folder / "README.md").read_text() == registered.version.card
    read_checkpoint(folder, line)


def test_the_pages_of_mlflow_show_schema_and_flavour(registered: Registered, registry: str, tmp_path: Path) -> None:
    page = httpx.get(
        f"{registry}/model-versions/get-artifact",
        params={"name": registered.name, "version": registered.number, "path": "MLmodel"},
    )
    (tmp_path / "MLmodel").write_bytes(page.raise_for_status().content)
    model = Model.load(str(tmp_path))
    assert "features" in model.signature.inputs.required_input_names()
    assert model.signature.outputs.input_names()[-1] == "acceptance_length"
    tags = connect(registered.settings.registry).get_run(registered.version.run).data.tags
    (logged,) = json.loads(tags["mlflow.log-model.history"])
    assert logged["flavors"].keys() == model.flavors.keys() == {"python_function"}


def test_the_run_of_a_version_names_the_tables_that_it_was_trained_on(registered: Registered) -> None:
    inputs = connect(registered.settings.registry).get_run(registered.version.run).inputs.dataset_inputs
    sources = {one.dataset.name: mlflow.data.get_source(one) for one in inputs}
    assert sources.keys() == {"accepted", "rejected"}
    assert all(tag.value == "training" for one in inputs for tag in one.tags)
    accepted = sources["accepted"]
    registered.world.serve(3)
    table = DeltaTable(accepted.path, version=accepted.delta_table_version)
    assert table.to_pyarrow_table(columns=["request"]).num_rows == 40


def test_a_version_does_not_score_with_another_target(registered: Registered, tmp_path: Path) -> None:
    write_target(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the version is of target .* model_config"):
        registered.load(target={"path": str(tmp_path / "other")})
    (tmp_path / "target").rename(tmp_path / "moved")
    moved = registered.load(target={"path": str(tmp_path / "moved")})
    rows = registered.rows()
    assert len(moved.predict(rows.head(2))) == 2
    with pytest.raises(ValueError, match="request request-0: of target other"):
        moved.predict(rows.assign(target="other"))


def test_the_code_of_the_guide_scores_the_champion(
    registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = registered.world.target.line
    registered.world.registry.set_alias(line, "champion", registered.number)
    (day,) = set(registered.rows()["day"])
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / ".aurora").mkdir()
    (tmp_path / ".aurora" / "tables").symlink_to(tmp_path / "tables")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("LINE", line).replace("2026, 1, 31", f"{day:%Y}, {day.month}, {day.day}"), {})
    length = 1 + registered.evaluation.score.accepted_per_step
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(length)
