"""Arguments that the node adds to vLLM's command line, and flags that it rejects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from schemas.settings import Settings, SettingsError, load
from serving.engines.node.command_line import Flags
from serving.engines.vllm.node import vllm_flags, vllm_launch

DRAFT = Path("/drafts/node-0-loaded")


def arguments(given: list[str], draft: Path | None = DRAFT, **settings: object) -> list[str]:
    flags = {"target.path": "/models/m", "target.served_model_name": "m", "serve.num_speculative_tokens": 3}
    given_flags, loaded = Flags(tuple(given)), load(environ={}, flags=flags | settings)
    vllm_flags.check_flags(given_flags, loaded)
    return vllm_flags.build_vllm_arguments(given_flags, loaded, draft)


def test_the_arguments_name_the_target_the_draft_and_our_extension() -> None:
    model, *found = arguments([])
    flags = Flags(tuple(found))
    assert (model, flags.value("--served-model-name")) == ("/models/m", "m")
    assert json.loads(flags.value("--speculative-config") or "") == {
        "method": "eagle3", "model": "/drafts/node-0-loaded", "num_speculative_tokens": 3,
    }  # fmt: skip
    assert flags.value("--worker-extension-cls") == vllm_flags.EXTENSION
    assert flags.value("--middleware") == vllm_flags.MIDDLEWARE
    assert (flags.value("--host"), flags.value("--port")) == ("127.0.0.1", "8001")


def test_the_users_flags_come_last_and_replace_added_ones() -> None:
    found = arguments(["--host", "10.0.0.7", "--port=9000", "--dtype", "float32"])
    assert found[-5:] == ["--host", "10.0.0.7", "--port=9000", "--dtype", "float32"]
    assert found.count("--host") == 1
    assert "--port" not in found


def test_a_node_without_speculation_adds_neither_draft_nor_extension() -> None:
    found = arguments([], None)
    assert not {"--speculative-config", "--worker-extension-cls", "--middleware"} & set(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--speculative-config", "{}"], "the node writes the draft"),
        (["--speculative_config.method=ngram"], "the node writes the draft"),
        (["-sc", "{}"], "the node writes the draft"),
        (["--worker-extension-cls", "x.Y"], "its own extension"),
        (["--model", "/models/other"], r"target\.path names the model"),
        (["/models/m", "--dtype", "float32"], r"target\.path names the model"),
        (["-dp", "2"], "start one node per replica"),
        (["--pipeline-parallel-size=2"], "start one node per replica"),
    ],
)
def test_a_flag_that_contradicts_the_node_is_an_error(given: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        vllm_flags.check_flags(Flags(tuple(given)), Settings())


def test_draft_trees_are_rejected_since_vllm_verifies_chains() -> None:
    with pytest.raises(SettingsError, match="vLLM verifies chains only"):
        load(environ={}, flags={"serve.engine": "vllm", "serve.draft_tree_width": 2})
    load(environ={}, flags={"serve.engine": "sglang", "serve.draft_tree_width": 2})


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        (["--port", "9"], "sesame", r"vllm\.url names a running server: flags have no effect"),
        ([], "", r"vllm\.api_key: the server at vllm\.url was started with one"),
    ],
)
def test_a_running_server_takes_no_flags_and_needs_its_key(given: list[str], key: str, message: str) -> None:
    settings = load(environ={}, flags={"vllm.url": "http://127.0.0.1:1", "vllm.api_key": key})
    with pytest.raises(SettingsError, match=message):
        vllm_launch.run(settings, given)
