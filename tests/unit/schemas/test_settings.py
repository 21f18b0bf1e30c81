"""Settings: where they come from, which source wins, and what a typing error is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.settings import Settings, SettingsError, load, to_environ


def test_without_any_source_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(environ={}) == Settings()


def test_flags_win_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text('[serve]\nport = 1\nnode = "file"\nnum_speculative_tokens = 5\n')
    settings = load(file, {"AURORA_SERVE__PORT": "2", "AURORA_SERVE__NODE": "variable"}, {"serve.port": 3})
    assert (settings.serve.port, settings.serve.node, settings.serve.num_speculative_tokens) == (3, "variable", 5)


def test_the_file_of_the_working_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aurora.toml").write_text('[kafka]\nbootstrap_servers = "kafka:9092"\n')
    monkeypatch.chdir(tmp_path)
    assert load(environ={}).kafka.bootstrap_servers == "kafka:9092"


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    assert load(environ={}, flags={"serve.port": None}).serve.port == Settings().serve.port


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("AURORA_KAFKA__BOTSTRAP", "kafka.bootstrap_servers"),
        ("AURORA_SERVE__NUM_SPECULATIVE_TOKEN", "serve.num_speculative_tokens"),
        ("AURORA_TRAINN__SEED", "train"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_known_one(name: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=f"did you mean '{nearest}'"):
        load(environ={name: "1"})


def test_a_key_like_no_other_is_told_all_known_ones() -> None:
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
    ("name", "value", "told"),
    [
        ("AURORA_SERVE__PORT", "many", "serve.port"),
        ("AURORA_SERVE__PORT", "70000", "serve.port"),
        ("AURORA_TRAIN__HELD_OUT_RATIO", "1.5", "train.held_out_ratio"),
        ("AURORA_PORT", "1", "SECTION__KEY"),
        ("AURORA_KAFKA__CLIENT__DEEP__ER", "1", "kafka.client_options"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(name: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load(environ={name: value})


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(SettingsError, match=r"serve.port.*; .*train.seed|train.seed.*; .*serve.port"):
        load(environ={"AURORA_SERVE__PORT": "x", "AURORA_TRAIN__SEED": "x"})


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such settings file"):
        load(tmp_path / "missing.toml", {})


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text("[serve\n")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load(file, {})


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"train.replay_batch_size must be below"):
        load(environ={"AURORA_TRAIN__REPLAY_BATCH_SIZE": "4", "AURORA_TRAIN__BATCH_SIZE": "4"})


def test_client_options_keep_their_dots() -> None:
    value = '{"security.protocol": "SSL", "ssl.ca.location": "/ca"}'
    assert load(environ={"AURORA_KAFKA__CLIENT_OPTIONS": value}).kafka.client_options["ssl.ca.location"] == "/ca"


def test_a_secret_is_shown_by_nothing_but_the_way_to_a_child() -> None:
    settings = load(environ={"AURORA_SERVE__ADMIN_TOKEN": "geheim"})
    assert settings.serve.admin_token.get_secret_value() == "geheim"
    assert "geheim" not in f"{settings} {settings!r} {settings.model_dump_json()}"
    assert to_environ(settings)["AURORA_SERVE__ADMIN_TOKEN"] == "geheim"


SECRETS = {
    "kafka.client_options": {"sasl.username": "offen", "sasl.password": "geheim", "ssl.key.password": "geheim"},
    "tables.storage_options": {"AWS_REGION": "offen", "AWS_SECRET_ACCESS_KEY": "geheim", "AWS_SESSION_TOKEN": "geheim"},
    "traces.claim_check_options": {"region": "offen", "secret_key": "geheim"},
}


def test_secrets_among_options_are_shown_by_nothing_but_the_way_to_a_child() -> None:
    settings = load(environ={}, flags=SECRETS)
    assert settings.kafka.client_options == SECRETS["kafka.client_options"]
    for shown in (f"{settings}", f"{settings!r}", f"{settings.kafka!r}", settings.model_dump_json()):
        assert "offen" in shown
        assert "geheim" not in shown
    assert load(environ=to_environ(settings)) == settings


@pytest.mark.parametrize("name", SECRETS)
def test_options_that_cannot_be_read_are_refused_without_being_shown(name: str) -> None:
    variable = f"AURORA_{name.replace('.', '__')}".upper()
    for value in ('{"password": "geheim"', '{"password": ["geheim"]}'):
        with pytest.raises(SettingsError, match=name) as raised:
            load(environ={variable: value})
        assert "geheim" not in str(raised.value)


def test_the_mask_of_an_option_never_becomes_its_secret() -> None:
    with pytest.raises(SettingsError, match=r"kafka\.client_options: .*sasl\.password.*aurora settings"):
        load(environ={}, flags={"kafka.client_options": {"sasl.password": "**********"}})


def test_a_secret_of_the_wrong_kind_is_refused_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / "aurora.toml"
    file.write_text("[serve]\nadmin_token = 123456\n")
    with pytest.raises(SettingsError, match=r"serve\.admin_token: ") as raised:
        load(file, {})
    assert "123456" not in str(raised.value)


def test_the_mask_of_a_secret_never_becomes_the_secret() -> None:
    with pytest.raises(SettingsError, match=r"serve\.admin_token: .*aurora settings"):
        load(environ={"AURORA_SERVE__ADMIN_TOKEN": "**********"})


@given(
    port=st.integers(0, 65535),
    rate=st.floats(1e-9, 1e3),
    node=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1),
    client=st.dictionaries(st.text(min_size=1), st.text(st.characters(blacklist_characters="*"))),
    speculate=st.booleans(),
    token=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0*")),
)
def test_a_child_reads_exactly_what_its_parent_read(
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
def test_an_interval_that_is_neither_seconds_nor_auto_is_told_once(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^update\.min_interval: [^;]*neither a duration nor 'auto'"):
        load(environ={"AURORA_UPDATE__MIN_INTERVAL": value})
    kept = [load(environ={"AURORA_UPDATE__MIN_INTERVAL": text}).update.min_interval for text in ("auto", "2.5")]
    assert kept == ["auto", 2.5]
