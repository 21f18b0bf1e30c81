"""Settings: sources, precedence, durations, secrets and error messages."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.settings import Settings, SettingsError, load, sections, to_environ


def test_defaults_apply_without_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(environ={}) == Settings()


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text('[serve]\nport = 1\nnode = "file"\nnum_speculative_tokens = 5\n')
    settings = load(file, {"AURORA_SERVE__PORT": "2", "AURORA_SERVE__NODE": "variable"}, {"serve.port": 3})
    assert (settings.serve.port, settings.serve.node, settings.serve.num_speculative_tokens) == (3, "variable", 5)


def test_the_file_of_the_working_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aurora.toml").write_text('[kafka]\nbootstrap_servers = "kafka:9092"\n')
    monkeypatch.chdir(tmp_path)
    assert load(environ={}).kafka.bootstrap_servers == "kafka:9092"


def test_a_flag_without_a_value_is_ignored() -> None:
    assert load(environ={}, flags={"serve.port": None}).serve.port == Settings().serve.port


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("AURORA_KAFKA__BOTSTRAP", "kafka.bootstrap_servers"),
        ("AURORA_SERVE__NUM_SPECULATIVE_TOKEN", "serve.num_speculative_tokens"),
        ("AURORA_TRAINN__SEED", "train"),
    ],
)
def test_the_error_for_an_unknown_key_names_the_nearest_known_key(name: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=f"did you mean '{nearest}'"):
        load(environ={name: "1"})


def test_the_error_for_a_misspelled_variable_names_the_nearest_variable() -> None:
    with pytest.raises(SettingsError, match="did you mean 'AURORA_KAFKA__BOOTSTRAP_SERVERS'"):
        load(environ={"AURORA_KAFKA_BOOTSTRAP_SERVERS": "kafka:9092"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AURORA_SERVICE_HOST", "10.0.0.1"),
        ("AURORA_SERVE_PORT", "tcp://10.0.0.1:8000"),
        ("AURORA_SERVE_SERVICE_PORT_HTTP", "8000"),
        ("AURORA_SERVE_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("AURORA_KAFKA_BOOTSTRAP_SERVICE_HOST", "10.0.0.2"),
        ("AURORA_POSTGRES_URL", "postgres://of-another-program"),
    ],
)
def test_variables_that_cannot_be_settings_are_ignored(name: str, value: str) -> None:
    assert load(environ={name: value}) == load(environ={})


def test_a_variable_that_nearly_names_a_setting_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"AURORA_SERVE_PORT: .* did you mean 'AURORA_SERVE__PORT'"):
        load(environ={"AURORA_SERVE_PORT": "8001"})


def test_the_error_for_a_key_without_a_near_match_lists_the_known_keys() -> None:
    with pytest.raises(SettingsError, match=r"known keys: .*bootstrap"):
        load(environ={"AURORA_KAFKA__XQZW": "1"})


def test_an_unknown_key_in_the_file_is_an_error_too(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text("[stream]\nflush_recrods = 1\n")
    with pytest.raises(
        SettingsError, match=r"stream.flush_recrods: unknown setting; did you mean 'stream.flush_records'"
    ):
        load(file, {})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("AURORA_SERVE__PORT", "many", "serve.port"),
        ("AURORA_SERVE__PORT", "70000", "serve.port"),
        ("AURORA_TRAIN__HELD_OUT_RATIO", "1.5", "train.held_out_ratio"),
        ("AURORA_PROMOTER__WATCH_MIN_RATIO", "0", "promoter.watch_min_ratio"),
        ("AURORA_KAFKA__CLIENT_OPTIONS__DEEP__ER", "1", "kafka.client_options"),
    ],
)
def test_the_error_for_an_invalid_value_names_the_setting(name: str, value: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        load(environ={name: value})


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(SettingsError, match=r"serve.port.*; .*train.seed|train.seed.*; .*serve.port"):
        load(environ={"AURORA_SERVE__PORT": "x", "AURORA_TRAIN__SEED": "x"})


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such settings file"):
        load(tmp_path / "missing.toml", {})


TEXT = '[target]\nserved_model_name = "größer"\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_in_a_unicode_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "aurora.toml"
    file.write_bytes(TEXT.encode(encoding))
    assert load(file, {}).target.served_model_name == "größer"


def test_a_file_in_another_encoding_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_bytes(TEXT.encode("latin-1"))
    with pytest.raises(SettingsError, match=r"aurora\.toml: not UTF-8 \(.* at byte 32\): save it as UTF-8"):
        load(file, {})


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not a readable settings file: Is a directory"):
        load(tmp_path, {})


def test_addresses_of_brokers_may_name_the_plaintext_protocol() -> None:
    servers = load(
        environ={"AURORA_KAFKA__BOOTSTRAP_SERVERS": "PLAINTEXT://one:9092, two:9092"}
    ).kafka.bootstrap_servers
    assert servers == "one:9092,two:9092"
    with pytest.raises(SettingsError, match=r"write one:9093, and the protocol as security\.protocol"):
        load(environ={"AURORA_KAFKA__BOOTSTRAP_SERVERS": "SASL_SSL://one:9093"})


@pytest.mark.parametrize("name", ["tables.uri", "traces.claim_check_uri"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/tables", "/home/me/tables"),
        ("file:///data/my%20tables", "/data/my tables"),
        ("file:/data", "/data"),
        ("s3://bucket/tables", "s3://bucket/tables"),
        ("data", "data"),
    ],
)
def test_a_location_is_a_folder_or_an_address(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    section, key = name.split(".")
    assert getattr(getattr(load(environ={}, flags={name: given}), section), key) == expected


@pytest.mark.parametrize("folder", ["a|b", "[x]", "a^b", "a%20b", "file:///a%7Cb", "a\tb"])
def test_a_folder_that_the_delta_library_cannot_open_is_rejected(folder: str) -> None:
    with pytest.raises(SettingsError, match=r"tables\.uri: .*cannot open a folder with"):
        load(environ={}, flags={"tables.uri": folder})


@pytest.mark.parametrize("name", ["target.path", "train.checkpoint_dir", "stack.data_dir", "sglang.draft_dir"])
def test_a_path_may_begin_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    section, key = name.split(".")
    assert getattr(getattr(load(environ={}, flags={name: "~/x"}), section), key) == "/home/me/x"


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text("[serve\n")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load(file, {})


def test_contradicting_settings_are_rejected() -> None:
    with pytest.raises(SettingsError, match=r"canary.burn_in must be below canary.slice_duration"):
        load(environ={"AURORA_CANARY__SLICE_DURATION": "5s"})
    with pytest.raises(SettingsError, match=r"train.replay_batch_size must be below"):
        load(environ={"AURORA_TRAIN__REPLAY_BATCH_SIZE": "4", "AURORA_TRAIN__BATCH_SIZE": "4"})


def test_a_drafter_that_sglang_cannot_host_is_rejected_by_both_names() -> None:
    with pytest.raises(SettingsError, match=r"serve\.drafter = 'suffix' needs serve\.engine = 'builtin'"):
        load(environ={}, flags={"serve.engine": "sglang", "serve.drafter": "suffix"})
    for drafter in (None, "eagle", "hybrid"):
        settings = load(environ={}, flags={"serve.engine": "sglang", "serve.drafter": drafter})
        assert load(environ=to_environ(settings)) == settings


def test_client_options_keep_their_dots() -> None:
    value = '{"security.protocol": "SSL", "ssl.ca.location": "/ca"}'
    assert load(environ={"AURORA_KAFKA__CLIENT_OPTIONS": value}).kafka.client_options["ssl.ca.location"] == "/ca"


def test_a_variable_of_one_option_is_inserted_into_those_of_the_file_and_of_a_parent(tmp_path: Path) -> None:
    single = {"AURORA_KAFKA__CLIENT_OPTIONS__SASL.PASSWORD": "geheim"}
    file = tmp_path / "aurora.toml"
    file.write_text('[kafka.client_options]\n"sasl.username" = "offen"\n')
    settings = load(file, single)
    assert settings.kafka.client_options == {"sasl.username": "offen", "sasl.password": "geheim"}
    assert load(environ={**single, **to_environ(settings)}) == settings, "a child has the variable, too"
    with pytest.raises(SettingsError, match="'port' is a value, not a section"):
        load(environ={"AURORA_SERVE__PORT": "80", "AURORA_SERVE__PORT__X": "1"})


def test_a_secret_appears_only_in_the_environment_of_a_child() -> None:
    settings = load(environ={"AURORA_SERVE__ADMIN_TOKEN": "geheim"})
    assert settings.serve.admin_token.get_secret_value() == "geheim"
    assert "geheim" not in f"{settings} {settings!r} {settings.model_dump_json()}"
    assert to_environ(settings)["AURORA_SERVE__ADMIN_TOKEN"] == "geheim"


SECRETS = {
    "kafka.client_options": {"sasl.username": "offen", "sasl.password": "geheim", "ssl.key.password": "geheim"},
    "tables.storage_options": {"AWS_REGION": "offen", "AWS_SECRET_ACCESS_KEY": "geheim", "AWS_SESSION_TOKEN": "geheim"},
    "traces.claim_check_options": {"region": "offen", "secret_key": "geheim"},
}


def test_secrets_among_options_appear_only_in_the_environment_of_a_child() -> None:
    settings = load(environ={}, flags=SECRETS)
    assert settings.kafka.client_options == SECRETS["kafka.client_options"]
    for shown in (f"{settings}", f"{settings!r}", f"{settings.kafka!r}", settings.model_dump_json()):
        assert "offen" in shown
        assert "geheim" not in shown
    assert load(environ=to_environ(settings)) == settings


@pytest.mark.parametrize("name", SECRETS)
def test_invalid_options_are_rejected_without_being_shown(name: str) -> None:
    variable = f"AURORA_{name.replace('.', '__')}".upper()
    for value in ('{"password": "geheim"', '{"password": ["geheim"]}'):
        with pytest.raises(SettingsError, match=name) as raised:
            load(environ={variable: value})
        assert "geheim" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_S3_ALLOW_UNSAFE_RENAME", "true"),
        ("allow_unsafe_rename", "1"),
        ("mount_allow_unsafe_rename", "True"),
        ("aws_conditional_put", "disabled"),
        ("conditional_put", " Disabled"),
    ],
)
def test_store_options_with_which_commits_can_replace_each_other_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"tables\.storage_options: .*{name}.* lets two commits replace each other"
    ):
        load(environ={}, flags={"tables.storage_options": {name: value}})


@pytest.mark.parametrize(("name", "value"), [("AWS_S3_ALLOW_UNSAFE_RENAME", "false"), ("conditional_put", "etag")])
def test_store_options_that_keep_commits_apart_are_accepted(name: str, value: str) -> None:
    assert load(environ={}, flags={"tables.storage_options": {name: value}}).tables.storage_options == {name: value}


def test_the_mask_of_an_option_is_rejected_as_a_value() -> None:
    with pytest.raises(SettingsError, match=r"kafka\.client_options: .*sasl\.password.*aurora config show"):
        load(environ={}, flags={"kafka.client_options": {"sasl.password": "**********"}})


def test_a_secret_of_the_wrong_type_is_rejected_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text("[serve]\nadmin_token = 123456\n")
    with pytest.raises(SettingsError, match=r"serve\.admin_token: ") as raised:
        load(file, {})
    assert "123456" not in str(raised.value)


def test_the_mask_of_a_secret_is_rejected_as_a_value() -> None:
    with pytest.raises(SettingsError, match=r"serve\.admin_token: .*aurora config show"):
        load(environ={"AURORA_SERVE__ADMIN_TOKEN": "**********"})


@given(
    port=st.integers(0, 65535),
    rate=st.floats(1e-9, 1e3),
    node=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1),
    client=st.dictionaries(st.text(min_size=1), st.text(st.characters(blacklist_characters="*"))),
    speculate=st.booleans(),
    token=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0*")),
)
def test_a_child_loads_the_settings_of_its_parent(
    *, port: int, rate: float, node: str, client: dict[str, str], speculate: bool, token: str
) -> None:
    flags = {
        "serve.port": port,
        "train.learning_rate": rate,
        "serve.node": node,
        "kafka.client_options": client,
        "serve.speculate": speculate,
        "serve.admin_token": token,
    }
    settings = load(environ={}, flags=flags)
    assert load(environ=to_environ(settings)) == settings


@pytest.mark.parametrize("value", ["often", "-1", "", "nan"])
def test_an_interval_that_is_neither_a_duration_nor_auto_is_reported_once(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^update\.min_interval: [^;]*neither a duration nor 'auto'"):
        load(environ={"AURORA_UPDATE__MIN_INTERVAL": value})
    kept = [load(environ={"AURORA_UPDATE__MIN_INTERVAL": text}).update.min_interval for text in ("auto", "2.5")]
    assert kept == ["auto", 2.5]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("1.5 m", 90), ("2h", 7200), ("14d", 14 * 86_400), ("7", 7), ("1e-05", 1e-5)],
)
def test_a_duration_is_a_number_of_seconds_or_has_a_unit(text: str, seconds: float) -> None:
    assert load(environ={"AURORA_SERVE__POLL_INTERVAL": text}).serve.poll_interval == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["3x", "s", "-1s", "1.2.3s", "inf", "nan", ""])
def test_the_error_for_an_invalid_duration_names_the_forms(value: str) -> None:
    with pytest.raises(SettingsError, match=r"serve\.poll_interval: .*500ms, 30s, 5m, 2h or 14d"):
        load(environ={"AURORA_SERVE__POLL_INTERVAL": value})


def test_a_duration_in_the_file_may_be_a_number(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text('[serve]\npoll_interval = 3\ndrain_timeout = "1m"\n')
    settings = load(file, {})
    assert (settings.serve.poll_interval, settings.serve.drain_timeout) == (3.0, 60.0)


@given(seconds=st.floats(1e-9, 1e9))
def test_a_child_loads_any_duration_of_its_parent(seconds: float) -> None:
    settings = load(environ={}, flags={"serve.poll_interval": seconds})
    assert load(environ=to_environ(settings)) == settings


def test_every_setting_has_a_docstring() -> None:
    source = ast.parse(Path(sections.__file__).read_text())
    missing = [
        f"{section.name}.{ast.unparse(field.target)}"
        for section in source.body
        if isinstance(section, ast.ClassDef) and section.name != "Settings"
        for field, following in itertools.pairwise([*section.body, None])
        if isinstance(field, ast.AnnAssign)
        if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
    ]
    assert not missing
