"""``aurora replay evaluate`` returns the verify steps of a live engine, request by request."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from tiny_target import VOCABULARY, write_tiny_target
from typer.testing import CliRunner

from ops.cli.main import app
from pipeline.batches import Record, build
from pipeline.delta import DeltaLog
from schemas.settings import Settings, load, to_environ
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from schemas.trace.record import CONTENT_TYPE, SCHEMA_ID, Chunk, VerifyStep, encode
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin import packed_draft
from serving.engines.builtin.engine import BuiltinEngine
from serving.traces.chunks import ChunkBuilder, ChunkSize, FeatureTransport, Origin
from trainer.data.batch import collate
from trainer.data.samples import read_sample
from trainer.data.target import read_target
from trainer.loop.learner import Learner

DRAFTED = 4
CHUNK_BYTES = 12_000


@pytest.fixture(autouse=True)
def _exact_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft with the weights as registered: rounded to 8 bits, a tiny draft has near-ties."""
    monkeypatch.setattr(packed_draft, "fastest_dtype", lambda _device: "float32")


class Recorder:
    def __init__(self) -> None:
        self.verify_steps: dict[str, list[VerifyStep]] = {}
        self.ended: dict[str, tuple[Request, Finish]] = {}

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.verify_steps.setdefault(request.id, []).extend(verify_steps)
        if finish is not None:
            self.ended[request.id] = request, finish


def settings_for(folder: Path, **flags: object) -> Settings:
    return load(
        environ={},
        flags={
            "target.path": str(folder / "target"),
            "speculator.draft_vocab_size": VOCABULARY,
            "serve.max_model_len": 200,
            "serve.max_num_seqs": 4,
            "serve.num_speculative_tokens": DRAFTED,
            "serve.adaptive_drafting": False,
            "serve.drafter": "eagle",
            "registry.tracking_uri": "http://127.0.0.1:9",
            "train.learning_rate": 1e-2,
            **flags,
        },
    )


def learned(settings: Settings) -> EagleDraft:
    """A draft overfitted to the stored outputs, with weights that survive the checkpoint's precision."""
    target, log = read_target(settings), DeltaLog(settings.tables)
    windows = [read_sample(row, []) for row in log.read("accepted").sort_by("offset").to_pylist()]
    learner = Learner(target.new_draft(), target.embeddings_VH, settings.train)
    for _ in range(60):
        learner.step(collate(windows))
    draft = learner.export_draft()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return draft


def some_requests() -> list[Request]:
    generator = random.Random(0)
    return [
        Request(
            f"request-{i}",
            tuple(generator.randrange(1, VOCABULARY) for _ in range(generator.randint(1, 30))),
            max_tokens=generator.choice([1, 2, 7, 40, 60]),
            stop_ids=frozenset([generator.randrange(1, VOCABULARY)]) if i % 3 == 0 else frozenset(),
            label=("a", "b")[i % 2],
        )
        for i in range(24)
    ]


def served(engine: BuiltinEngine, requests: Sequence[Request]) -> dict[str, Output]:
    """Return the last output of each request."""
    queues: dict[str, SimpleQueue[Output]] = {request.id: SimpleQueue() for request in requests}
    for request in requests:
        engine.submit(request, queues[request.id].put)
    last = {}
    for name, queue in queues.items():
        while (output := queue.get(timeout=60)).finish is None:
            pass
        last[name] = output
    return last


def store(settings: Settings, engine: BuiltinEngine, recorder: Recorder) -> int:
    """Write the rows of all requests, chunked as by a node and built as by a stream worker; return the chunk count."""
    made: list[Chunk | None] = []
    for name, (request, finish) in recorder.ended.items():
        builder = ChunkBuilder(
            request, Origin("node", engine.target, engine.line), FeatureTransport("inline", ChunkSize(CHUNK_BYTES))
        )
        made += [builder.add(done) for done in recorder.verify_steps[name]]
        made.append(builder.end(finish))
    chunks = [chunk for chunk in made if chunk is not None]
    headers = {"content-type": CONTENT_TYPE, "schema": SCHEMA_ID}
    records = []
    for offset, chunk in enumerate(chunks):
        result = {**headers, "rows": str(len(chunk.verify_steps))}
        named = tuple((key, text.encode()) for key, text in result.items())
        records.append(Record("t", 0, offset, 1, chunk.envelope.request.encode(), encode(chunk), named))
    built = build(records, 32)
    assert not built.dead_letters
    tables = DeltaLog(settings.tables)
    tables.create()
    for name in ("rejected", "traces", "accepted"):
        tables.append(name, built.rows[name])
    return len(chunks)


def assert_replay_is_as_live(settings: Settings, live: Mapping[str, Output], *options: str) -> int:
    """Return the accepted tokens; the command must print the same output twice."""
    arguments = ["replay", "evaluate", *options, "--json", "--requests"]
    result, again = (CliRunner().invoke(app, arguments, env=to_environ(settings)) for _ in range(2))
    assert result.exit_code == 0, result.output
    assert again.stdout == result.stdout
    found = json.loads(result.stdout)
    figures = {name: output.stats for name, output in live.items() if output.stats}
    replayed = {one["request"]: (one["verify_steps"][0], one["accepted"][0]) for one in found["requests"]}
    assert replayed == {name: (one.verify_steps, one.accepted_tokens) for name, one in figures.items()}
    accepted = sum(one.accepted_tokens for one in figures.values())
    groups = found["groups"]
    assert groups["all"]["versions"][0]["accepted"] == accepted
    assert sum(groups[f"label {label}"]["versions"][0]["accepted"] for label in "ab") == accepted
    return accepted


def test_greedy_requests_have_the_verify_steps_and_accepted_tokens_of_the_live_engine(
    tmp_path: Path,
) -> None:
    write_tiny_target(tmp_path / "target")
    first, second = (settings_for(tmp_path, **{"tables.uri": str(tmp_path / name)}) for name in ("first", "second"))
    recorder, requests = Recorder(), some_requests()
    engine = BuiltinEngine(first, recorder)
    engine.start()
    try:
        live = served(engine, requests)
        assert store(first, engine, recorder) > len(requests), "some requests travel in several chunks"
        assert assert_replay_is_as_live(first, live, "--versions", "day-0") < 40
        checkpoint.write_checkpoint(learned(first), tmp_path / "version", engine.target)
        engine.swap(checkpoint.read_checkpoint(tmp_path / "version", engine.line), "1")
        recorder.verify_steps.clear()
        live = served(engine, requests)
        store(second, engine, recorder)
        assert assert_replay_is_as_live(second, live, "--versions", str(tmp_path / "version")) > 60
    finally:
        engine.stop()


def served_in_turn(engine: BuiltinEngine, requests: Sequence[Request]) -> dict[str, Output]:
    return {name: output for request in requests for name, output in served(engine, [request]).items()}


def repeated_requests() -> list[Request]:
    """Return requests of which some repeat an earlier one, under its label or another one."""
    asked = [replace(one, max_tokens=40, stop_ids=frozenset(), ignore_eos=True) for one in some_requests()[:8]]
    again = [replace(one, id=f"{one.id}-again", max_tokens=30) for one in asked]
    elsewhere = [replace(one, id=f"{one.id}-elsewhere", label="b") for one in asked[:4]]
    return [*asked, *again, *elsewhere]


@pytest.mark.parametrize(
    ("scope", "temperature"), [("request", 0.0), ("label", 0.0), ("node", 0.0), ("fleet", 0.0), ("fleet", 0.8)]
)
def test_the_suffix_drafter_is_replayed_as_it_drafted_live(tmp_path: Path, scope: str, temperature: float) -> None:
    write_tiny_target(tmp_path / "target")
    flags = {"serve.drafter": "suffix", "serve.suffix_scope": scope, "serve.draft_tree_nodes": 128}
    settings = settings_for(tmp_path, **flags, **{"tables.uri": str(tmp_path / "tables")})
    recorder = Recorder()
    engine = BuiltinEngine(settings, recorder)
    engine.start()
    try:
        asked = [replace(one, temperature=temperature, seed=i) for i, one in enumerate(repeated_requests())]
        live = served_in_turn(engine, asked)
    finally:
        engine.stop()
    store(settings, engine, recorder)
    accepted = assert_replay_is_as_live(settings, live, "--drafter", "suffix")
    assert accepted > (0 if scope == "request" or temperature else 200)


def test_the_hybrid_drafter_is_replayed_as_it_drafted_live(tmp_path: Path) -> None:
    write_tiny_target(tmp_path / "target")
    flags = {"serve.drafter": "hybrid", "serve.suffix_scope": "label", "serve.draft_tree_nodes": 128}
    first, second = (
        settings_for(tmp_path, **flags, **{"tables.uri": str(tmp_path / name)}) for name in ("first", "second")
    )
    version = str(tmp_path / "version")
    recorder = Recorder()
    engine = BuiltinEngine(first, recorder)
    engine.start()
    try:
        served(engine, some_requests())
        store(first, engine, recorder)
        checkpoint.write_checkpoint(learned(first), tmp_path / "version", engine.target)
    finally:
        engine.stop()
    recorder = Recorder()
    engine = BuiltinEngine(second, recorder)
    engine.start()
    try:
        engine.swap(checkpoint.read_checkpoint(tmp_path / "version", engine.line), "1")
        live = served_in_turn(engine, repeated_requests())
    finally:
        engine.stop()
    store(second, engine, recorder)
    traces = DeltaLog(second.tables).read("traces", ["speculator", "draft_sources"]).to_pylist()
    mixed = [set(row["draft_sources"]) for row in traces if row["speculator"] and row["draft_sources"]]
    assert set().union(*mixed) == {1, 2, 3}, "of the version, of the suffix drafter, and of both"
    hybrid = assert_replay_is_as_live(second, live, "--versions", version, "--drafter", "hybrid")
    options = ["replay", "evaluate", "--versions", version, "--drafter", "eagle,suffix,hybrid"]
    found = json.loads(CliRunner().invoke(app, [*options, "--json"], env=to_environ(second)).stdout)
    accepted = {one["name"]: one["accepted"] for one in found["groups"]["all"]["versions"]}
    assert accepted.keys() == {version, "suffix", f"{version}+suffix"}
    assert accepted[f"{version}+suffix"] == hybrid >= max(accepted.values())
    assert "suffix drafts: scope label" in CliRunner().invoke(app, options, env=to_environ(second)).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drafter", "suffix", "--versions", "day-0"], "suffix alone with none"),
        (["--drafter", "eagle,suffix"], "at least one version"),
        ([], "at least one version"),
        (["--drafter", "ngram"], "'ngram' is none of eagle, suffix and hybrid"),
        (["--drafter", "suffix,suffix"], "--drafter: give each name only once"),
        (["--versions", "day-0,day-0"], "--versions: give each name only once"),
    ],
)
def test_drafters_and_versions_that_do_not_fit_are_rejected(tmp_path: Path, options: list[str], message: str) -> None:
    write_tiny_target(tmp_path / "target")
    settings = settings_for(tmp_path, **{"tables.uri": str(tmp_path / "tables")})
    DeltaLog(settings.tables).create()
    result = CliRunner().invoke(app, ["replay", "evaluate", *options], env=to_environ(settings))
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("drafter", "top_p"), [("eagle", 0.95), ("hybrid", 0.2)])
def test_the_expected_acceptance_of_sampled_requests_matches_the_live_engine(
    tmp_path: Path, drafter: str, top_p: float
) -> None:
    write_tiny_target(tmp_path / "target", scale=0.12)
    flags = {"serve.drafter": drafter, "serve.suffix_scope": "fleet", "serve.draft_tree_nodes": 128}
    settings = settings_for(tmp_path, **flags, **{"tables.uri": str(tmp_path / "tables"), "traces.top_k": VOCABULARY})
    recorder = Recorder()
    requests = [
        replace(one, max_tokens=40, temperature=0.8, top_p=top_p, seed=i, stop_ids=frozenset(), ignore_eos=True)
        for i, one in enumerate(repeated_requests())
    ]
    engine = BuiltinEngine(settings, recorder)
    engine.start()
    try:
        live = served_in_turn(engine, requests)
    finally:
        engine.stop()
    store(settings, engine, recorder)
    options = ["--versions", "day-0", "--drafter", drafter, "--json"]
    result = CliRunner().invoke(app, ["replay", "evaluate", *options], env=to_environ(settings))
    (expected,) = json.loads(result.stdout)["groups"]["all"]["versions"]
    figures = [output.stats for output in live.values() if output.stats]
    accepted, verify_steps = sum(one.accepted_tokens for one in figures), sum(one.verify_steps for one in figures)
    assert accepted > 100
    by_suffix = sum(one.suffix_accepted_tokens for one in figures)
    assert by_suffix > 50 if drafter == "hybrid" else by_suffix == 0
    assert expected["accepted"] == pytest.approx(accepted, abs=3 * accepted**0.5), (accepted, verify_steps)
    assert expected["accepted"] + expected["verify_steps"] == pytest.approx(accepted + verify_steps, abs=0.01)
