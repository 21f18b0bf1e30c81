"""Draft vocabulary: chosen from recorded outputs, written to a file, and read by nodes and trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recorded import TARGET, record_of, tables_of, verify_step_of
from tiny_target import EOS, VOCABULARY, write_tiny_target
from typer.testing import CliRunner

from ops.cli import versions, vocabulary
from ops.cli.main import app
from pipeline.delta import DeltaLog
from schemas.errors import UserError
from schemas.settings import Settings, SettingsError, Speculator, Tables, load
from schemas.speculator.checkpoint import write_checkpoint
from schemas.speculator.day_0_draft import create_day_0_draft, read_draft_vocabulary
from schemas.speculator.target_fingerprint import target_fingerprint
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.target import read_target


def answered(tables: DeltaLog, request: str, prompt: list[int], answer: list[int], target: str) -> None:
    """Commit a request that was decoded token by token."""
    verify_steps = [verify_step_of(0, 0, prompt, answer[0])]
    for number, token in enumerate(answer[:-1]):
        verify_steps.append(verify_step_of(number + 1, len(prompt) + number, [token], answer[number + 1]))
    tables.append("accepted", tables_of(record_of(request, verify_steps, 0, target=target))["accepted"])


def test_output_tokens_of_the_target_are_counted_without_prompts(tmp_path: Path) -> None:
    tables = DeltaLog(Tables(uri=str(tmp_path)))
    answered(tables, "one", [3, 3, 3], [7, 8, 7], TARGET)
    answered(tables, "two", [4], [7, 9], TARGET)
    answered(tables, "three", [5], [11, 11], "o" * 32)
    one, other = vocabulary.count_tokens(tables, TARGET)
    counted = {token: one.get(token, 0) + other.get(token, 0) for token in one.keys() | other.keys()}
    assert counted == {7: 3, 8: 1, 9: 1}
    with pytest.raises(UserError, match="no outputs of target"):
        vocabulary.count_tokens(tables, "x" * 32)


def test_a_request_is_in_one_half_only(tmp_path: Path) -> None:
    tables = DeltaLog(Tables(uri=str(tmp_path)))
    for i in range(8):
        answered(tables, f"request-{i}", [1], [10 + i, 10 + i], TARGET)
    one, other = vocabulary.count_tokens(tables, TARGET)
    assert one
    assert other
    assert one.keys().isdisjoint(other)
    assert set((one | other).values()) == {2}


def settings_of(folder: Path, file: Path, **flags: object) -> Settings:
    flags |= {"target.path": str(folder), "speculator.draft_vocab_file": str(file)}
    return load(environ={}, flags={**flags, "serve.max_model_len": 32, "serve.max_num_seqs": 1})


def test_the_file_defines_the_same_line_for_nodes_and_trainer(tmp_path: Path) -> None:
    folder, file = write_tiny_target(tmp_path / "target"), tmp_path / "new" / "vocabulary.json"
    tables = DeltaLog(Tables(uri=str(tmp_path / "tables")))
    answered(tables, "one", [1, 2, 3], [*range(30, 45), 60], target_fingerprint(folder))
    flags = [f"target.path={folder}", f"speculator.draft_vocab_file={file}", f"tables.uri={tmp_path / 'tables'}"]
    command = ["vocabulary", "--size", "20", *(part for flag in flags for part in ("--set", flag))]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    kept = [EOS, 1, 2, 3, *range(30, 45), 60]
    assert json.loads(file.read_text()) == kept
    figures = json.loads(result.stdout)
    assert (figures["ids"], figures["tokens"], figures["chosen"], figures["lowest"]) == (20, 16, 1.0, 0.0)

    again = CliRunner().invoke(app, command)
    assert (again.exit_code, "--overwrite" in again.stderr) == (2, True)

    settings = settings_of(folder, file)
    target, engine = read_target(settings), BuiltinEngine(settings)
    assert target.line == engine.line
    assert target.line != read_target(settings.model_copy(update={"speculator": Speculator(draft_vocab_size=20)})).line
    assert target.day_0.shape.draft_vocab_size == 20
    assert target.day_0.t2d.nonzero().flatten().tolist() == kept


def test_the_command_needs_the_file_setting() -> None:
    result = CliRunner().invoke(app, ["vocabulary"])
    assert (result.exit_code, "set speculator.draft_vocab_file" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file; `aurora vocabulary` writes it"),
        ("[1, 2", "not readable as JSON"),
        ('{"ids": [1, 2]}', "must be a list of token ids"),
        ("[1]", "must be a list of token ids"),
        ("[1, 2.0, 3]", "must be a list of token ids"),
        ("[true, 2, 3]", "must be a list of token ids"),
        ("[1, 3, 3]", "ascending, and 3"),
        ("[-1, 3]", "0 to 60, the target's; found -1 to 3"),
        ("[1, 61]", "0 to 60, the target's; found 1 to 61"),
    ],
)
def test_an_unusable_file_is_an_error_that_names_the_setting(content: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=rf"speculator\.draft_vocab_file .*vocabulary\.json: .*{says}"):
        read_draft_vocabulary(file, VOCABULARY)


def test_node_and_trainer_do_not_start_without_the_file(tmp_path: Path) -> None:
    settings = settings_of(write_tiny_target(tmp_path), tmp_path / "missing.json")
    for start in (BuiltinEngine, read_target):
        with pytest.raises(SettingsError, match=r"^speculator\.draft_vocab_file"):
            start(settings)


def test_versions_with_different_vocabularies_are_compared_on_the_tokens_of_both(tmp_path: Path) -> None:
    folder = write_tiny_target(tmp_path / "target")
    old = create_day_0_draft(folder, Speculator(draft_vocab_size=16))
    new = create_day_0_draft(folder, Speculator(draft_vocab_size=16), torch.arange(10, 26))
    line = write_checkpoint(old, tmp_path / "old", TARGET).line
    write_checkpoint(new, tmp_path / "new", TARGET, line=line)
    changes = versions._relative_changes([tmp_path / "old", tmp_path / "new"], line)
    assert set(changes.values()) == {0.0}, "every token has the target's own row"


def test_without_a_file_day_0_uses_the_lowest_ids(tmp_path: Path) -> None:
    draft = create_day_0_draft(write_tiny_target(tmp_path), Speculator(draft_vocab_size=16))
    assert draft.t2d.nonzero().flatten().tolist() == list(range(16))
    assert draft.d2t.tolist() == [0] * 16
