"""``aurora versions import`` and ``export`` with a real MLflow server and tables; the commands of the guide."""

from __future__ import annotations

import json
import re
import shlex
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_world import World, offline, write_target
from typer.testing import CliRunner, Result

from ops.cli.main import app
from schemas.registry_client import connect
from schemas.speculator.checkpoint import read_checkpoint
from schemas.speculator.day_0_draft import read_line
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import LAYERS, LAYOUTS, Layout, Verifier
from schemas.speculator.network import EagleDraft, random_draft

VERIFIER = Verifier("target", ("LlamaForCausalLM",), 4)
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "import-export.md"


class Desk:
    """A target of its own, tables, and the commands on them."""

    def __init__(self, registry: str, folder: Path) -> None:
        self.folder = folder
        write_target(folder / "target")
        settings = offline(folder, held_out_ratio=0.5)
        uri = settings.registry.model_copy(update={"tracking_uri": registry, "timeout": 30.0})
        self.settings = settings.model_copy(update={"registry": uri})

    def run(self, *arguments: str, code: int = 0, flags: tuple[str, ...] = ()) -> Result:
        given = {
            "target.path": self.settings.target.path,
            "speculator.draft_vocab_size": 32,
            "registry.tracking_uri": self.settings.registry.tracking_uri,
            "tables.uri": self.settings.tables.uri,
            "train.held_out_ratio": 0.5,
            "promoter.gate_min_samples": 4,
        }
        sets = [f"--set={name}={value}" for name, value in given.items()]
        result = CliRunner().invoke(app, ["versions", *arguments, *sets, *flags])
        assert result.exit_code == code, result.output
        return result

    def asked(self, *arguments: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(*arguments, "--json", flags=flags).stdout)
        return found

    def day_0(self) -> EagleDraft:
        return read_line(self.settings.target, self.settings.speculator).day_0_draft

    def write(self, draft: EagleDraft, layout: Layout, name: str = "draft") -> str:
        write_draft_folder(draft, self.folder / name, layout, VERIFIER)
        return str(self.folder / name)


@pytest.fixture
def desk(registry: str, tmp_path: Path) -> Desk:
    return Desk(registry, tmp_path)


def weights(draft: EagleDraft) -> dict[str, torch.Tensor]:
    state = draft.state_dict()
    return {name: value.bfloat16().float() if value.is_floating_point() else value for name, value in state.items()}


def register_theirs(desk: Desk, name: str, folder: str) -> None:
    """Register a folder as another team's model, with the alias ``best``."""
    client = connect(desk.settings.registry)
    client.create_registered_model(name)
    run = client.create_run(client.create_experiment(name)).info.run_id
    client.log_artifacts(run, folder, "draft")
    client.create_model_version(name, f"runs:/{run}/draft", run)
    client.set_registered_model_alias(name, "best", "1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_is_imported_served_by_its_line_and_exported_again(desk: Desk, layout: Layout) -> None:
    kept = torch.arange(32) + 8 * (torch.arange(32) > 10)
    draft = random_draft(desk.day_0().shape, 7, kept)
    source = desk.write(draft, layout)
    named = ("--format", layout)
    planned = desk.asked("import", source, *named, "--dry-run")
    line = read_line(desk.settings.target, desk.settings.speculator).name
    assert (planned["line"], planned["line_of_settings"], planned["version"]) == (line, True, None)
    assert "no tables in" in planned["unscored"]
    desk.run("list", f"--line={line}", code=2)
    done = desk.asked("import", source, *named)
    assert (done["version"], done["candidate"], done["format"]) == ("1", False, layout)
    assert done["next"] == "`aurora versions promote 1 --force` serves it"
    shown = desk.asked("show", "1", f"--line={line}")
    assert (shown["tags"]["imported_from"], shown["tags"]["imported_format"]) == (source, layout)
    assert f"`{source}`" in shown["card"]
    exported = desk.asked("export", "1", f"--line={line}", *named, "--to", str(desk.folder / "out"))
    assert exported["files"] == ["README.md", "config.json", "model.safetensors"]
    back, own = (load_file(Path(folder) / "model.safetensors") for folder in (desk.folder / "out", source))
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], value) for name, value in own.items())
    card = (desk.folder / "out" / "README.md").read_text()
    for fact in (line, f"imported from {source}", "It was not scored", exported["serve"], "32 of 40"):
        assert fact in card


def test_an_imported_draft_is_scored_like_a_candidate(desk: Desk) -> None:
    World(desk.settings).serve(40)
    day_0 = desk.asked("import", desk.write(desk.day_0(), "vllm"))
    held_out = day_0["held_out"]
    assert day_0["unscored"] is None
    assert held_out["samples"] >= 4
    assert held_out["champion"] == "day-0-head-0"
    assert held_out["accepted_per_step"] == pytest.approx(held_out["champion_accepted_per_step"], abs=0.1)
    assert day_0["candidate"] is False
    listed = desk.asked("list", f"--line={day_0['line']}")["versions"]
    assert listed[0]["acceptance_length"] == pytest.approx(1 + held_out["accepted_per_step"])
    length = f"acceptance length {1 + held_out['accepted_per_step']:.3f} on"
    shown = " ".join(desk.run("import", str(desk.folder / "draft"), "--dry-run").stdout.split())
    assert length in shown
    assert "of day-0-head-0, gain" in shown


def test_a_draft_of_another_line_is_scored_on_the_features_that_it_reads(desk: Desk) -> None:
    World(desk.settings).serve(40)
    shape = replace(desk.day_0().shape, rope_theta=777.0)
    other = desk.asked("import", desk.write(random_draft(shape, 3), "vllm"))
    assert (other["line_of_settings"], other["unscored"]) == (False, None)
    assert other["held_out"]["samples"] >= 4
    card = desk.asked("show", "1", f"--line={other['line']}")["card"]
    assert f"**{1 + other['held_out']['accepted_per_step']:.3f}** (bonus token included)." in card
    unread = desk.asked("import", desk.write(random_draft(replace(shape, capture_layers=(0, 2, 6)), 3), "vllm"))
    assert "holds no held-out requests of this target and line" in unread["unscored"]


def test_a_draft_of_another_shape_begins_a_line_that_the_setting_follows(desk: Desk) -> None:
    shape = replace(
        desk.day_0().shape,
        rope_theta=777.0,
        intermediate_size=24,
        capture_layers=(0, 2, 6),
        variant="eagle3",
        norm_before_residual=True,
    )
    draft = random_draft(shape, 3, torch.arange(32) + 5)
    source = desk.write(draft, "speculators")
    done = desk.asked("import", source)
    assert (done["line_of_settings"], done["version"]) == (False, "1")
    assert done["shape"]["capture_layers"] == [0, 2, 6]
    assert f"aurora versions export 1 --line {done['line']} --format vllm --to DIR" in done["next"]
    assert "SGLang ignores" in desk.run("export", "1", f"--line={done['line']}", "--to=x", code=2).stderr
    out = str(desk.folder / "out")
    desk.run("export", "1", f"--line={done['line']}", "--format=vllm", "--to", out)
    speculator = desk.settings.speculator.model_copy(update={"day_0_folder": out})
    line = read_line(desk.settings.target, speculator)
    assert line.name == done["line"]
    assert all(torch.equal(line.day_0_draft.state_dict()[name], value) for name, value in weights(draft).items())
    assert speculator.day_0 == "day-0-out"
    again = desk.asked("import", source, "--dry-run", flags=(f"--set=speculator.day_0_folder={out}",))
    assert (again["line"], again["line_of_settings"]) == (done["line"], True)


def test_a_model_in_mlflow_is_imported_by_its_alias(desk: Desk) -> None:
    name = f"their-draft-{uuid.uuid4().hex}"
    register_theirs(desk, name, desk.write(desk.day_0(), "sglang"))
    done = desk.asked("import", f"models:/{name}@best")
    assert done["version"] == "1"
    assert desk.asked("show", "1", f"--line={done['line']}")["tags"]["imported_from"] == f"models:/{name}@best"
    assert desk.asked("import", f"models:/{name}/1", "--dry-run")["line"] == done["line"]
    assert "their-draft" in desk.run("import", f"models:/{name}@worst", code=2).stderr
    assert "expected models:/NAME@ALIAS" in desk.run("import", f"models:/{name}", code=2).stderr


def test_errors_name_what_is_wrong_where_and_what_to_do(desk: Desk) -> None:
    assert "no such folder" in desk.run("import", "nowhere", code=2).stderr
    source = Path(desk.write(desk.day_0(), "sglang"))
    assert "expected sglang, vllm, speculators" in desk.run("import", str(source), "--format=hf", code=2).stderr
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": 99}))
    wrong = desk.run("import", str(source), code=2).stderr
    assert f"{source}: config.json: hidden_size 99, but the target's is 16; see target.path" in wrong
    (source / "config.json").write_text(json.dumps(config | {"eagle_config": {LAYERS: [2, 4, 5]}}))
    assert "--format vllm or --format sglang" in desk.run("import", str(source), code=2).stderr
    assert "not an empty folder" in desk.run("export", "1", "--to", str(source), code=2).stderr


def test_the_commands_of_the_guide_work_in_their_order(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.folder)
    register_theirs(desk, "their-draft", desk.write(random_draft(desk.day_0().shape, 7), "sglang", "my-draft"))
    commands = [
        shlex.split(line, comments=True)
        for block in re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if line.startswith("aurora versions ")
    ]
    assert [command[2] for command in commands] == ["import"] * 4 + ["export"]
    assert sum(word.startswith("models:/") for command in commands for word in command) == 2
    for command in commands:
        desk.run(*command[2:])
    folder = commands[-1][commands[-1].index("--to") + 1]
    line = read_line(desk.settings.target, desk.settings.speculator)
    assert (desk.folder / folder / "config.json").exists()
    registry_files = World(desk.settings).registry.download(line.name, "1", desk.folder)
    read_checkpoint(registry_files, line.name)
