"""The command's manners: one clear line and exit code 2 for what a user can put right."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ops.cli.main import app
from ops.cli.terminal import parse_time
from schemas.errors import UserError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def aurora(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_flags_reach_the_settings() -> None:
    told = aurora("config", "show", "--json", "--set", "serve.port=9000", "--set", "kafka.bootstrap_servers=kafka:9092")
    assert told.exit_code == 0
    values = json.loads(told.stdout)
    assert (values["serve"]["port"], values["kafka"]["bootstrap_servers"]) == (9000, "kafka:9092")


def test_the_printed_settings_are_a_settings_file_again(tmp_path: Path) -> None:
    file = tmp_path / "again.toml"
    file.write_text(aurora("config", "show", "--set", "serve.node=here").stdout)
    told = aurora("config", "show", "--json", "--config", str(file))
    assert json.loads(told.stdout)["serve"]["node"] == "here"


def test_printed_options_are_a_settings_file_again(tmp_path: Path) -> None:
    options = '{"security.protocol": "SSL", "ssl.ca.location": "/ca"}'
    file = tmp_path / "again.toml"
    file.write_text(aurora("config", "show", "--set", f"kafka.client_options={options}").stdout)
    told = aurora("config", "show", "--json", "--config", str(file))
    assert json.loads(told.stdout)["kafka"]["client_options"] == json.loads(options)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_printed_settings_hold_no_secret(flags: list[str]) -> None:
    secrets = ["--set", "serve.admin_token=geheim", "--set", 'kafka.client_options={"sasl.password": "geheim"}']
    secrets += ["--set", "registry.password=geheim", "--set", 'telemetry.headers={"Authorization": "Bearer geheim"}']
    told = aurora("config", "show", *secrets, *flags)
    assert told.exit_code == 0
    assert "admin_token" in told.stdout
    assert "sasl.password" in told.stdout
    assert "geheim" not in told.output


@pytest.mark.parametrize(
    "command", ["serve", "stream", "train", "promoter", "up", "down", "status", "drift", "demo", "config show"]
)
def test_an_unknown_setting_is_one_line_and_exit_code_2(command: str) -> None:
    told = aurora(*command.split(), "--set", "kafka.botstrap=x")
    assert told.exit_code == 2
    assert told.stderr == "aurora: kafka.botstrap: unknown setting; did you mean 'kafka.bootstrap_servers'?\n"


def test_a_flag_without_a_value_is_explained() -> None:
    told = aurora("config", "show", "--set", "serve.port")
    assert (told.exit_code, told.stderr) == (2, "aurora: --set serve.port: expected SECTION.KEY=VALUE\n")


def test_an_engine_that_there_is_not_is_told_those_that_there_are() -> None:
    told = aurora("serve", "--engine", "vllm")
    assert told.exit_code == 2
    assert "serve.engine: Input should be 'builtin' or 'sglang'" in told.stderr


def test_flags_of_sglang_are_for_sglang_and_are_read_as_they_stand() -> None:
    told = aurora("serve", "--", "--tp-size", "2")
    assert (told.exit_code, told.stderr) == (
        2, "aurora: --tp-size: flags are for SGLang's server: --engine sglang\n"
    )  # fmt: skip
    told = aurora("serve", "--engine", "sglang", "--", "--weight-version", "3")
    assert (told.exit_code, told.stderr) == (
        2, "aurora: --weight-version: the node names the version that SGLang starts with; leave it out\n"
    )  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604_800)])
def test_a_time_ago_is_counted_from_now(text: str, seconds: int) -> None:
    assert datetime.now(UTC) - parse_time(text) == pytest.approx(timedelta(seconds=seconds), abs=timedelta(seconds=30))


def test_a_time_without_a_zone_is_utc() -> None:
    assert (
        parse_time("2026-11-23T14:00") == parse_time("2026-11-23T15:00+01:00") == datetime(2026, 11, 23, 14, tzinfo=UTC)
    )


@pytest.mark.parametrize("text", ["", "2 h", "h", "-1h", "1w", "noon"])
def test_what_is_no_time_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(UserError, match="write 90s, 30m, 2h, 7d"):
        parse_time(text)


@pytest.mark.parametrize("arguments", [[], ["0/1", "--all"], ["--all", "--reason", "corrupt"]])
def test_a_replay_wants_to_be_told_which_letters_in_one_way(arguments: list[str]) -> None:
    told = aurora("dlq", "replay", *arguments)
    assert told.exit_code == 2
    assert told.stderr.startswith("aurora: choose dead letters by ids")


def test_status_with_nothing_running_exits_1(free_port: object) -> None:
    ports = [f"--set={part}.port={free_port()}" for part in ("serve", "stream", "train", "promoter")]  # type: ignore[operator]
    told = aurora("status", *ports)
    assert told.exit_code == 1
    assert "nothing runs here" in told.stderr


def test_down_with_nothing_running_says_so() -> None:
    assert aurora("down").stdout == "nothing runs here\n"


def test_a_state_file_of_a_process_that_is_gone_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / ".aurora"
    folder.mkdir()
    state = {"pid": 1, "created": 0.0, "ready": True, "environ": {}, "parts": {}}
    (folder / "up.json").write_text(json.dumps(state))
    assert aurora("down").stdout == "nothing runs here\n"


def test_a_target_that_is_missing_is_named() -> None:
    told = aurora("up", "--set", "target.path=nowhere", "--set", "target.served_model_name=mine")
    assert told.exit_code == 2
    assert "target.path: no model in nowhere" in told.stderr


def test_fresh_wipes_nothing_outside_the_stacks_folder(tmp_path: Path) -> None:
    from ops.demo.run import wipe_data
    from schemas.settings import load

    precious = tmp_path / "precious"
    precious.mkdir()
    for value in (str(precious), "s3://bucket/tables", ".aurora"):
        with pytest.raises(UserError, match=r"tables\.uri"):
            wipe_data(load(environ={}, flags={"tables.uri": value}))
    assert precious.exists()


def test_fresh_forgets_data_and_keeps_the_model(tmp_path: Path) -> None:
    from ops.demo.run import wipe_data
    from schemas.settings import load

    for name in ("models", "broker", "registry", "tables", "train", "stream", "demo"):
        (tmp_path / ".aurora" / name).mkdir(parents=True)
    wipe_data(load(environ={}))
    assert [folder.name for folder in (tmp_path / ".aurora").iterdir()] == ["models"]
