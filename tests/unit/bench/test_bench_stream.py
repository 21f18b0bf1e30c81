"""The published messages of the stream benchmark, and the figures of its trials."""

from __future__ import annotations

import numpy as np
import pytest
from recorded import WIDTH, verify_step_of

from ops.bench.stream import store_commits
from ops.bench.stream.recorded_messages import DRAFT_TOKENS, OUTPUTS_JOINED, build_messages, simulate_drafts
from ops.bench.stream.stream_benchmark import FULL, QUICK, SIZES, DrainTrials, StreamSize, figure_names, judge
from ops.bench.stream.topic_drain import DrainCost
from pipeline.batches import Record, build
from schemas.settings import Stream
from schemas.trace.record import Chunk, Envelope, VerifyStep


def answer_of(tokens: list[int], position: int) -> list[VerifyStep]:
    """Verify steps of a token each, as a node decodes without a draft."""
    return [verify_step_of(i + 1, position + i, [token], tokens[i + 1]) for i, token in enumerate(tokens[:-1])]


def as_bytes(header: str | bytes | None) -> bytes:
    assert isinstance(header, bytes)
    return header


def recorded_request(number: int) -> Chunk:
    envelope = Envelope(
        request=f"recorded-{number}",
        chunk=0,
        last=True,
        node="bench",
        target="target",
        line="line",
        features="inline",
        feature_width=WIDTH,
        top_k=3,
        temperature=0.0,
        top_p=1.0,
    )
    answer = [int(token) for token in np.random.default_rng(number).integers(0, 20, 30)]
    return Chunk(envelope, (verify_step_of(0, 0, [1, 2, 3], answer[0]), *answer_of(answer, 3)))


def test_simulated_drafts_do_not_change_the_output() -> None:
    tokens = list(range(40))
    made = list(simulate_drafts([verify_step_of(0, 0, [7, 8], 0)], answer_of(tokens, 2), np.random.default_rng(0)))
    kept = [token for r in made for token in r.tokens]
    assert kept == [7, 8, *tokens[: len(kept) - 2]]
    assert {len(r.accepted) for r in made[1:]} == set(range(DRAFT_TOKENS + 1))
    assert all(len(r.draft_tokens) == DRAFT_TOKENS and r.top_ids.shape == (1 + DRAFT_TOKENS, 3) for r in made[1:])


def test_the_stream_accepts_every_message() -> None:
    made = build_messages([recorded_request(i) for i in range(OUTPUTS_JOINED)], largest=12_000, size=60_000)
    records = [
        Record("traces", 0, i, 1_700_000_000_000_000, m.key, m.value, tuple((k, as_bytes(v)) for k, v in m.headers))
        for i, m in enumerate(made)
    ]
    built = build(records, 32)
    assert not built.dead_letters
    assert built.rows["traces"].num_rows == sum(m.verify_steps for m in made)
    assert sum(map(len, built.rows["accepted"]["tokens"].to_pylist())) == sum(m.tokens for m in made)
    assert sum(len(m.value) for m in made) >= 60_000


def test_a_ratio_is_the_median_of_the_ratios_by_trial() -> None:
    trials = DrainTrials(messages=10, verify_steps=100, tokens=200, size=4_000_000, feature_width=10)
    trials.costs = {
        "reading": [DrainCost(1, 1), DrainCost(1, 1)],
        "bare": [DrainCost(2, 2), DrainCost(4, 4)],
        "one": [DrainCost(4, 8), DrainCost(4, 8)],
        "two": [DrainCost(2, 8), DrainCost(4, 8)],
    }
    trials.peak_rss, trials.table_bytes = [1_000_000, 3_000_000], {"accepted": 3_000, "traces": 1_000}
    figures = {figure.name: figure for figure in judge("64k", trials)}
    assert figures["ratio_to_bare_loop_64k"].value == 0.75
    assert figures["ratio_to_bare_loop_64k"].met
    assert (figures["ratio_to_bare_loop_64k"].detail or {})["by_processor_time"] == 0.375
    assert (figures["ratio_to_bare_loop_64k"].detail or {})["mb_per_s"]["reading"] == 4.0
    assert figures["scaling_two_workers_64k"].value == 1.5
    assert figures["peak_rss_mb_64k"].value == 3.0
    assert figures["table_bytes_per_token_64k"].value == 20
    assert (figures["table_bytes_per_token_64k"].detail or {})["raw_bf16"] == 20


def test_every_measured_figure_is_in_the_list_of_names() -> None:
    trials = DrainTrials(1, 1, 1, 1, feature_width=1)
    trials.costs = {way: [DrainCost(1, 1)] for way in trials.costs}
    measured = [figure.name for size in SIZES for figure in judge(size, trials)]
    visible = ["publish_to_visible_p50_s", "publish_to_visible_p99_s"]
    assert [*measured, *visible, *store_commits.FIGURE_NAMES] == figure_names()


@pytest.mark.parametrize("size", [QUICK, FULL])
def test_a_trial_has_enough_messages_for_several_commits(size: StreamSize) -> None:
    assert size.mib << 20 >= 4 * Stream().flush_bytes
