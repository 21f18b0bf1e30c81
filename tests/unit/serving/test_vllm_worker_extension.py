"""What the extension answers to a node that has started the server, and to one that attaches."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from released_server import install_fakes
from tiny_target import write_tiny_target

from schemas.settings import Speculator, load
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import MANIFEST, hash_file
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Verifier
from schemas.speculator.network import EagleDraft
from schemas.speculator.target_fingerprint import target_fingerprint
from serving.engines.vllm.plugin import installation, worker_extension
from serving.engines.vllm.plugin.worker_extension import WorkerExtension

DEPTH = 4


class Worker(WorkerExtension):
    """vLLM's worker, which has loaded a draft from a folder."""

    def __init__(self, target: Path, own: Path, capture_layers: tuple[int, ...]) -> None:
        self.use_v2_model_runner, self.rank, self.device = False, 0, SimpleNamespace(type="cpu")
        self.parallel_config = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1)
        self.speculative_config = SimpleNamespace(
            method="eagle3", draft_sample_method="greedy", rejection_sample_method="standard",
            num_speculative_tokens=DEPTH, draft_model_config=SimpleNamespace(model=str(own)),
        )  # fmt: skip
        self.model_config = SimpleNamespace(model=str(target))
        self.model_runner = SimpleNamespace(
            uses_mrope=False,
            _get_eagle3_aux_layers_from_config=lambda: tuple(layer + 1 for layer in capture_layers),
            drafter=SimpleNamespace(model=SimpleNamespace(named_parameters=list)),
        )


@pytest.fixture(autouse=True)
def _server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of vLLM as released, and settings without traces and hybrid drafter, which would need more of it."""
    monkeypatch.setattr(installation, "version", lambda _: installation.VERSIONS[0])
    monkeypatch.setattr(worker_extension, "HostTransfer", lambda _: None)
    install_fakes(monkeypatch, installation.SIGNATURES, installation.FIELDS)
    settings = load(environ={}, flags={"traces.enabled": False, "serve.drafter": "eagle"})
    monkeypatch.setattr(worker_extension, "load", lambda: settings)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


def draft_of(target: Path, seed: int) -> EagleDraft:
    draft = create_day_0_draft(target, Speculator(draft_vocab_size=16, seed=seed))
    draft.norm.weight.data += seed
    return draft


@pytest.fixture
def first(target: Path, tmp_path: Path) -> Path:
    """Folder of the version that the node names."""
    checkpoint.write_checkpoint(draft_of(target, 1), tmp_path / "first", target_fingerprint(target))
    return tmp_path / "first"


def worker_of(target: Path, own: EagleDraft, folder: Path) -> Worker:
    write_draft_folder(own, folder, "vllm", Verifier("target", (), DEPTH))
    return Worker(target, folder, own.shape.capture_layers)


def test_a_node_that_starts_the_server_names_its_draft_once(target: Path, first: Path, tmp_path: Path) -> None:
    worker = worker_of(target, draft_of(target, 1), tmp_path / "own")
    assert worker.aurora_start(str(first), "7") == {"version": "7"}
    assert worker.aurora_start(str(first), "8") == {"version": "7"}
    assert worker.aurora_attach(str(first), "8") == {"version": "7", "depth": DEPTH}


def test_a_node_that_attaches_finds_the_servers_own_draft_and_swaps_it(
    target: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(worker_extension, "reload_layerwise", lambda _, tensors: loaded.append(tensors))
    worker = worker_of(target, draft_of(target, 2), tmp_path / "own")
    assert worker.aurora_attach(str(first), "7") == {"version": "attached", "depth": DEPTH}
    deadline = time.monotonic() + 20
    while worker.aurora_read(str(first), hash_file(first / MANIFEST)) == {"is_read": False}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert worker.aurora_load("7").keys() == {"seconds"}
    assert loaded[0]["norm.weight"].equal(draft_of(target, 1).norm.weight.data.bfloat16())
    assert worker.aurora_attach(str(first), "7")["version"] == "7"


def test_a_server_with_the_weights_of_the_version_has_its_name(target: Path, first: Path, tmp_path: Path) -> None:
    worker = worker_of(target, draft_of(target, 1), tmp_path / "own")
    assert worker.aurora_attach(str(first), "7")["version"] == "7"


def test_a_reason_against_it_is_answered_and_nothing_is_raised(target: Path, first: Path, tmp_path: Path) -> None:
    worker = worker_of(target, draft_of(target, 1), tmp_path / "own")
    assert worker.aurora_load("7") == {"why": "aurora_start has not been called"}
    worker.speculative_config.rejection_sample_method = "synthetic"
    assert "only lossless verification" in worker.aurora_attach(str(first), "7")["why"]
    worker.speculative_config.rejection_sample_method = "block"
    worker.speculative_config.draft_model_config.model = "no/such-draft"
    assert "no/such-draft" in worker.aurora_attach(str(first), "7")["why"]
