"""Command line: options, and one-line errors with exit code 2."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ops.cli.main import app
from ops.cli.terminal import parse_time
from schemas.errors import UserError
from schemas.settings import Settings


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def aurora(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_set_options_override_settings() -> None:
    result = aurora(
        "config", "show", "--json", "--set", "serve.port=9000", "--set", "kafka.bootstrap_servers=kafka:9092"
    )
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert (values["serve"]["port"], values["kafka"]["bootstrap_servers"]) == (9000, "kafka:9092")


def test_printed_settings_are_a_valid_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "again.toml"
    file.write_text(aurora("config", "show", "--set", "serve.node=here").stdout)
    result = aurora("config", "show", "--json", "--config", str(file))
    assert json.loads(result.stdout)["serve"]["node"] == "here"


def test_printed_client_options_are_a_valid_settings_file(tmp_path: Path) -> None:
    options = '{"security.protocol": "SSL", "ssl.ca.location": "/ca"}'
    file = tmp_path / "again.toml"
    file.write_text(aurora("config", "show", "--set", f"kafka.client_options={options}").stdout)
    result = aurora("config", "show", "--json", "--config", str(file))
    assert json.loads(result.stdout)["kafka"]["client_options"] == json.loads(options)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_printed_settings_mask_secrets(flags: list[str]) -> None:
    secrets = ["--set", "serve.admin_token=geheim", "--set", 'kafka.client_options={"sasl.password": "geheim"}']
    secrets += ["--set", "registry.password=geheim", "--set", 'telemetry.headers={"Authorization": "Bearer geheim"}']
    result = aurora("config", "show", *secrets, *flags)
    assert result.exit_code == 0
    assert "admin_token" in result.stdout
    assert "sasl.password" in result.stdout
    assert "geheim" not in result.output


@pytest.mark.parametrize(
    "command", ["serve", "stream", "train", "promoter", "up", "down", "status", "drift", "demo", "config show"]
)
def test_an_unknown_setting_is_an_error_with_exit_code_2(command: str) -> None:
    result = aurora(*command.split(), "--set", "kafka.botstrap=x")
    assert result.exit_code == 2
    assert result.stderr == "aurora: kafka.botstrap: unknown setting; did you mean 'kafka.bootstrap_servers'?\n"


def test_a_set_option_without_a_value_is_an_error() -> None:
    result = aurora("config", "show", "--set", "serve.port")
    assert (result.exit_code, result.stderr) == (2, "aurora: --set serve.port: expected SECTION.KEY=VALUE\n")


def test_an_unknown_engine_lists_the_known_ones() -> None:
    result = aurora("serve", "--engine", "tgi")
    assert result.exit_code == 2
    assert "serve.engine: Input should be 'builtin', 'sglang' or 'vllm'" in result.stderr


def test_sglang_flags_need_the_sglang_engine() -> None:
    result = aurora("serve", "--", "--tp-size", "2")
    assert (result.exit_code, result.stderr) == (
        2, "aurora: --tp-size: flags are for another server: --engine sglang or vllm\n"
    )  # fmt: skip
    result = aurora("serve", "--engine", "sglang", "--", "--weight-version", "3")
    assert (result.exit_code, result.stderr) == (
        2, "aurora: --weight-version: the node names the version that SGLang starts with; omit the flag\n"
    )  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604_800)])
def test_a_time_ago_is_counted_from_now(text: str, seconds: int) -> None:
    assert datetime.now(UTC) - parse_time(text) == pytest.approx(timedelta(seconds=seconds), abs=timedelta(seconds=30))


def test_a_time_without_a_zone_is_utc() -> None:
    assert (
        parse_time("2026-11-23T14:00") == parse_time("2026-11-23T15:00+01:00") == datetime(2026, 11, 23, 14, tzinfo=UTC)
    )


@pytest.mark.parametrize("text", ["", "2 h", "h", "-1h", "1w", "noon"])
def test_an_invalid_time_shows_the_formats(text: str) -> None:
    with pytest.raises(UserError, match="write 90s, 30m, 2h, 7d"):
        parse_time(text)


@pytest.mark.parametrize("arguments", [[], ["0/1", "--all"], ["--all", "--reason", "corrupt"]])
def test_a_dead_letter_replay_needs_exactly_one_selection(arguments: list[str]) -> None:
    result = aurora("dlq", "replay", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("aurora: choose dead letters by ids")


def test_status_without_processes_exits_1(free_port: object) -> None:
    ports = [f"--set={part}.port={free_port()}" for part in ("serve", "stream", "train", "promoter")]  # type: ignore[operator]
    result = aurora("status", *ports)
    assert result.exit_code == 1
    assert "nothing runs here" in result.stderr


def test_a_command_that_ctrl_c_ends_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_settings: Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.train.run", interrupted)
    assert CliRunner().invoke(app, ["train"]).exit_code == 130


def test_down_without_a_stack_prints_a_line() -> None:
    assert aurora("down").stdout == "nothing runs here\n"


def test_a_state_file_of_an_ended_process_is_ignored(tmp_path: Path) -> None:
    folder = tmp_path / ".aurora"
    folder.mkdir()
    state = {"pid": 1, "created": 0.0, "ready": True, "environ": {}, "parts": {}}
    (folder / "up.json").write_text(json.dumps(state))
    assert aurora("down").stdout == "nothing runs here\n"


def test_a_missing_target_is_an_error() -> None:
    result = aurora("up", "--set", "target.path=nowhere", "--set", "target.served_model_name=mine")
    assert result.exit_code == 2
    assert "target.path: no model in nowhere" in result.stderr


def test_fresh_deletes_nothing_outside_the_data_folder(tmp_path: Path) -> None:
    from ops.demo.run import wipe_data
    from schemas.settings import load

    precious = tmp_path / "precious"
    precious.mkdir()
    for value in (str(precious), "s3://bucket/tables", ".aurora"):
        with pytest.raises(UserError, match=r"tables\.uri"):
            wipe_data(load(environ={}, flags={"tables.uri": value}))
    assert precious.exists()


def test_fresh_deletes_data_and_keeps_the_model(tmp_path: Path) -> None:
    from ops.demo.run import wipe_data
    from schemas.settings import load

    for name in ("models", "broker", "registry", "tables", "train", "stream", "demo"):
        (tmp_path / ".aurora" / name).mkdir(parents=True)
    wipe_data(load(environ={}))
    assert [folder.name for folder in (tmp_path / ".aurora").iterdir()] == ["models"]
