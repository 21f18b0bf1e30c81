"""Flags that the node adds to SGLang's command line, and flags that it rejects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from schemas.settings import Settings, SettingsError, load
from serving.engines.node.command_line import DraftFolder, Flags
from serving.engines.sglang.node import flags

DRAFT = DraftFolder(Path("/drafts/node-0"), "7")
FOLDER = Path("/drafts")


def settings_of(**values: object) -> Settings:
    return load(environ={}, flags={name.replace("__", "."): value for name, value in values.items()})


def added(given: list[str], settings: Settings, draft: DraftFolder | None = DRAFT) -> Flags:
    given_flags = Flags(tuple(given))
    flags.check(given_flags, settings)
    files = {flag: FOLDER / name for flag, (name, _) in flags.start_files(given_flags, settings).items()}
    whole = flags.build_arguments(given_flags, settings, draft, files)
    assert whole[len(whole) - len(given) :] == given
    return Flags(tuple(whole[: len(whole) - len(given)]))


def test_the_default_flags_name_the_target_the_draft_and_its_version() -> None:
    found = added(
        [], settings_of(target__path="/models/m", target__served_model_name="m", serve__num_speculative_tokens=3)
    )
    assert found.value("--model-path") == "/models/m"
    assert found.value("--served-model-name") == "m"
    assert found.value("--speculative-algorithm") == "EAGLE3"
    assert found.value("--speculative-draft-model-path") == "/drafts/node-0"
    assert found.value("--weight-version") == "7"
    steps = "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens"
    assert [found.value(name) for name in steps] == ["3", "1", "4"]
    assert found.has("--enable-metrics")
    assert not found.has("--admin-api-key")


def test_the_number_of_draft_tokens_includes_the_root() -> None:
    found = added(
        [], settings_of(serve__draft_tree_width=4, serve__draft_tree_nodes=20, serve__num_speculative_tokens=5)
    )
    steps = "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens"
    assert [found.value(name) for name in steps] == ["5", "4", "21"]


def test_the_users_flags_are_kept_and_determine_the_added_ones() -> None:
    given = ["--speculative-num-steps=2", "--model-path", "/models/m", "--enable-metrics", "--tp", "2"]
    found = added(given, settings_of(target__path="/models/m"))
    assert not found.has("--speculative-num-steps", "--model-path", "--enable-metrics")
    assert found.value("--speculative-num-draft-tokens") == "3"


def test_a_node_without_speculation_adds_no_draft() -> None:
    found = added([], settings_of(serve__speculate=False), None)
    assert not [flag for flag in found.given if "speculative" in flag or "weight-version" in flag]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--speculative-draft-model-path", "/d"], "the node writes the draft"),
        (["--speculative-draft-model-path=/d"], "the node writes the draft"),
        (["--weight-version", "3"], "the node names the version"),
        (["--speculative-algorithm", "NGRAM"], r"NGRAM: this node serves drafts of EAGLE3"),
        (["--model", "/models/other"], r"target\.path is "),
        (["--dp-size", "2"], "start one node per replica"),
        (["--node-rank", "x"], "must be a number"),
    ],
)
def test_a_flag_that_contradicts_the_node_is_an_error_that_names_it(given: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        flags.check(Flags(tuple(given)), Settings())
    assert given[0].partition("=")[0].removesuffix("-path") in str(error.value)


def test_an_algorithm_contradicts_a_node_without_speculation() -> None:
    flags.check(Flags(("--speculative-algorithm", "eagle3")), Settings())
    with pytest.raises(SettingsError, match=r"none \(serve\.speculate\)"):
        flags.check(Flags(("--speculative-algorithm", "EAGLE3")), settings_of(serve__speculate=False))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ([], "http://127.0.0.1:30000"),
        (["--host", "0.0.0.0", "--port=8080"], "http://127.0.0.1:8080"),
        (["--host", "10.0.0.7", "--ssl-certfile", "c"], "https://10.0.0.7:30000"),
        (["--host", "fd00::1"], "http://[fd00::1]:30000"),
        (["--host", "::"], "http://127.0.0.1:30000"),
    ],
)
def test_the_url_follows_from_the_flags(given: list[str], url: str) -> None:
    assert Flags(tuple(given)).url(flags.PORT) == url


def test_the_key_of_the_settings_is_added_unless_the_flags_have_one() -> None:
    secret = settings_of(sglang__api_key="s")
    assert added([], secret).value("--config") == "/drafts/server.yaml"
    assert yaml.safe_load(flags.start_files(Flags(()), secret)["--config"][1]) == {"admin-api-key": "s"}
    assert flags.key_of(Flags(()), secret) == SecretStr("s")
    given = ["--api-key", "users"]
    assert not added(given, secret).has("--config")
    assert flags.key_of(Flags(tuple(given)), secret) == SecretStr("users")
    assert flags.key_of(Flags((*given, "--admin-api-key", "admins")), secret) == SecretStr("admins")


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_no_key_is_on_the_command_line(key: str) -> None:
    settings = settings_of(sglang__api_key=key, target__path="/models/m")
    name, content = flags.start_files(Flags(()), settings)["--config"]
    assert yaml.safe_load(content) == {"admin-api-key": key}
    without = Flags(added([], settings_of(target__path="/models/m")).given)
    assert [flag for flag in added([], settings).given if flag not in without.given] == ["--config", f"/drafts/{name}"]


def test_a_configuration_file_of_the_user_and_a_key_of_the_settings_exclude_each_other() -> None:
    flags.check(Flags(("--config", "mine.yaml")), Settings())
    with pytest.raises(SettingsError, match=r"--config: SGLang reads one such file"):
        flags.check(Flags(("--config", "mine.yaml")), settings_of(sglang__api_key="s"))


def test_chains_adapt_between_no_draft_and_the_longest() -> None:
    settings = settings_of(serve__num_speculative_tokens=4)
    found = added([], settings)
    assert found.has("--speculative-adaptive")
    assert found.value("--speculative-adaptive-config") == "/drafts/adaptive.json"
    given = Flags(("--speculative-num-steps=2",))
    for flags_given, steps in ((Flags(()), [0, 1, 4]), (given, [0, 1, 2])):
        content = flags.start_files(flags_given, settings)["--speculative-adaptive-config"][1]
        assert json.loads(content) == {"1": {"candidate_steps": steps}}


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ([], {"sglang__adaptive": False}),
        ([], {"serve__draft_tree_width": 2}),
        (["--speculative-eagle-topk", "2"], {}),
        (["--speculative-adaptive"], {}),
        (["--speculative-adaptive-config", "mine.json"], {}),
    ],
)
def test_trees_and_choices_of_the_user_keep_their_size(given: list[str], values: dict[str, object]) -> None:
    assert not added(given, settings_of(**values)).has("--speculative-adaptive", "--speculative-adaptive-config")


@given(st.lists(st.sampled_from(["--a", "--b=1", "--b", "2", "--c", ""])))
def test_the_last_value_of_a_flag_counts(given: list[str]) -> None:
    given_flags = Flags((*given, "--b", "last"))
    assert given_flags.value("--b") == "last"
    assert given_flags.has("--b")
    assert given_flags.value("--nowhere") is None
