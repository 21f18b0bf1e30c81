"""Tests of batches: rows of the worked example in ``schemas.trace.record``, and the dead letters of invalid records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bfloat16 import from_bf16, to_bf16
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import Record, build
from pipeline.deduplication import DeduplicationWindow
from pipeline.validation import find_invalid
from schemas.batches import TABLES
from schemas.trace import record as trace
from schemas.trace.decoder import ListColumn, VerifyStepColumns
from schemas.trace.record import ROOT, Chunk, DraftSource, Envelope, TraceError, VerifyStep, encode

A, B, C, D, E, F, G, X, Y, Z = range(10, 20)
WIDTH = 3
TOP_K = 2


def features(*tokens: int) -> trace.U16:
    """Features that identify their token, so that a shifted row is detected."""
    return to_bf16(np.array([[token, token + 0.5, -token] for token in tokens], dtype=np.float32))


def teacher(*names: int) -> tuple[trace.I32, trace.F32]:
    ids = np.array([[name, name + 1] for name in names], dtype=np.int32).reshape(-1, TOP_K)
    return ids, -ids.astype(np.float32) / 8


def verify_step_(
    number: int, position: int, tokens: tuple[int, ...], bonus: int | None, teaches: tuple[int, ...], **draft: object
) -> VerifyStep:
    ids, logprobs = teacher(*teaches)
    fields = {
        "draft_tokens": (),
        "draft_parents": (),
        "draft_logprobs": (),
        "accepted": (),
        "speculator": "",
    } | draft
    return VerifyStep(
        verify_step=number,
        position=position,
        tokens=tokens,
        features=features(*tokens),
        bonus=bonus,
        top_ids=ids,
        top_logprobs=logprobs,
        draft_us=1,
        verify_us=2,
        time_us=1_000_000 + number,
        **fields,  # type: ignore[arg-type]
    )


PREFILL = verify_step_(0, 0, (A, B, C), D, (100,))
FIRST = verify_step_(
    1, 3, (D, E), F, (110, 111, 112), draft_tokens=(E, X), draft_parents=(ROOT, 0), draft_logprobs=(-0.5, -1.5),
    accepted=(0,), speculator="1",
)  # fmt: skip
SECOND = verify_step_(
    2, 5, (F,), G, (120, 121, 122), draft_tokens=(Y, Z), draft_parents=(ROOT, 0), draft_logprobs=(-2.0, -3.0),
    speculator="2",
)  # fmt: skip
ENVELOPE = Envelope(
    request="req",
    chunk=0,
    last=True,
    node="node-0",
    target="target",
    line="line",
    features="inline",
    feature_width=WIDTH,
    top_k=TOP_K,
    temperature=0.0,
    top_p=1.0,
    label="ünï",
    finish="stop",
)
EXAMPLE = Chunk(ENVELOPE, (PREFILL, FIRST, SECOND))


def record(chunk: Chunk = EXAMPLE, offset: int = 7, **changed: object) -> Record:
    headers = {
        "content-type": trace.CONTENT_TYPE.encode(),
        "schema": trace.SCHEMA_ID.encode(),
        "rows": str(len(chunk.verify_steps)).encode(),
    }
    made = Record("traces", 1, offset, 5_000, b"req", encode(chunk), tuple(headers.items()))
    return replace(made, **changed)  # type: ignore[arg-type]


def only_row(table: pa.Table) -> dict[str, object]:
    (row,) = table.to_pylist()
    return row


def reason(made: Record) -> str:
    built = build([made], 32)
    assert {name: rows.num_rows for name, rows in built.rows.items()} == {
        "dead_letters": 1, "rejected": 0, "traces": 0, "accepted": 0,
    }  # fmt: skip
    row = only_row(built.rows["dead_letters"])
    assert (row["value"], row["key"], row["offset"]) == (made.value, made.key, made.offset)
    assert built.dead_letters == {row["reason"]: 1}
    return str(row["reason"])


def test_accepted_row_is_the_sample_of_the_worked_example() -> None:
    row = only_row(build([record()], 32).rows["accepted"])
    assert row["tokens"] == [A, B, C, D, E, F]
    assert row["loss_mask"] == [False, False, True, True, True, True]
    assert row["next_token"] == G
    assert row["position"] == 0
    bits = np.frombuffer(row["features"], dtype="<u2").reshape(6, WIDTH)  # type: ignore[call-overload]
    assert from_bf16(bits)[:, 0].tolist() == [A, B, C, D, E, F]
    # after c: verify step 0; after D: root of verify step 1; after E: its node 0; after F: root of verify step 2
    assert np.reshape(row["teacher_ids"], (4, TOP_K))[:, 0].tolist() == [100, 110, 111, 120]  # type: ignore[arg-type]
    assert np.reshape(row["teacher_logprobs"], (4, TOP_K))[:, 0].tolist() == [-12.5, -13.75, -13.875, -15.0]  # type: ignore[arg-type]


def test_rejected_rows_are_the_branches_of_the_worked_example() -> None:
    first, second = build([record()], 32).rows["rejected"].to_pylist()
    assert (first["branch"], first["accepted_prefix"], first["context"]) == ([E, X], 1, [A, B, C, D])
    assert (second["branch"], second["accepted_prefix"], second["context"]) == ([Y, Z], 0, [A, B, C, D, E, F])
    assert (first["verify_step"], first["root_position"], second["root_position"]) == (1, 3, 5)
    assert first["draft_logprobs"] == [-0.5, -1.5]
    assert first["teacher_ids"][::TOP_K] == [111, 112]
    assert second["teacher_ids"][::TOP_K] == [121, 122]


def test_traces_row_has_version_and_time_of_its_verify_step() -> None:
    rows = build([record()], 32).rows["traces"].to_pylist()
    assert [row["verify_step"] for row in rows] == [0, 1, 2]
    assert [row["speculator"] for row in rows] == ["", "1", "2"]
    assert [row["tokens"] for row in rows] == [[A, B, C], [D, E], [F]]
    assert [row["top_ids"][::TOP_K] for row in rows] == [[100], [110, 111, 112], [120, 121, 122]]
    assert all(row["label"] == "ünï" and row["offset"] == 7 and row["last_chunk"] for row in rows)


def test_rows_name_the_last_version_that_drafted() -> None:
    plain = replace(SECOND, draft_tokens=(), draft_parents=(), draft_logprobs=(), speculator="",
                    top_ids=SECOND.top_ids[:1], top_logprobs=SECOND.top_logprobs[:1])  # fmt: skip
    built = build([record(Chunk(ENVELOPE, (PREFILL, FIRST, plain)))], 32)
    assert only_row(built.rows["accepted"])["speculator"] == "1"
    assert built.rows["rejected"].num_rows == 1


def test_split_prompt_has_a_teacher_only_at_its_end() -> None:
    head = verify_step_(0, 0, (A, B), None, ())
    tail = verify_step_(0, 2, (C,), D, (100,))
    whole = only_row(build([record()], 32).rows["accepted"])
    cut = only_row(build([record(Chunk(ENVELOPE, (head, tail, FIRST, SECOND)))], 32).rows["accepted"])
    assert cut == whole

    inside = only_row(build([record(Chunk(ENVELOPE, (head,)))], 32).rows["accepted"])
    assert inside["loss_mask"] == [False, False]
    assert inside["teacher_ids"] == []
    assert inside["next_token"] is None


def test_later_chunk_has_no_tokens_before_its_first_root() -> None:
    built = build([record(Chunk(replace(ENVELOPE, chunk=1), (FIRST, SECOND)))], 32)
    first, second = built.rows["rejected"].to_pylist()
    assert (first["context"], second["context"]) == ([D], [D, E, F])
    accepted = only_row(built.rows["accepted"])
    assert (accepted["position"], accepted["loss_mask"]) == (3, [True, True, True])


def test_recompute_chunk_gives_the_sample_from_the_start_of_the_request_without_features() -> None:
    bare = [replace(r, features=r.features[:0]) for r in (FIRST, SECOND)]
    envelope = replace(ENVELOPE, chunk=1, features="recompute", preceding_tokens=(A, B, C))
    built = build([record(Chunk(envelope, tuple(bare)))], 32)
    whole = only_row(build([record()], 32).rows["accepted"])
    row = only_row(built.rows["accepted"])
    assert (row["position"], row["tokens"], row["features"]) == (0, whole["tokens"], b"")
    assert row["loss_mask"] == [False, False, False, True, True, True]
    assert row["teacher_ids"] == whole["teacher_ids"][TOP_K:]  # type: ignore[index]
    first, second = built.rows["rejected"].to_pylist()
    assert (first["context"], second["context"]) == ([A, B, C, D], [A, B, C, D, E, F])
    assert first["root_position"] == 3


def test_chunk_with_dropped_features_has_verify_steps_and_nothing_to_train_on() -> None:
    bare = Chunk(
        replace(ENVELOPE, features="dropped"), tuple(replace(r, features=r.features[:0]) for r in EXAMPLE.verify_steps)
    )
    whole, built = build([record(offset=8)], 32).rows, build([record(bare, 7), record(offset=8)], 32)
    assert built.dead_letters == {}
    for name in ("accepted", "rejected"):
        assert built.rows[name].equals(whole[name])
    of_record = {offset: built.rows["traces"].filter(pc.field("offset") == offset) for offset in (7, 8)}
    assert of_record[7].num_rows == 3
    assert of_record[7].drop_columns("offset").equals(of_record[8].drop_columns("offset"))


def test_context_is_limited_to_context_tokens_before_the_root() -> None:
    rows = build([record()], 2).rows["rejected"].to_pylist()
    assert [row["context"] for row in rows] == [[B, C, D], [D, E, F]]


def test_each_rejected_branch_of_a_tree_is_a_row() -> None:
    tree = verify_step_(
        1, 3, (D, E), F, (110, 111, 112, 113), draft_tokens=(E, X, Y), draft_parents=(ROOT, ROOT, 0),
        draft_logprobs=(-1.0, -2.0, -3.0), accepted=(0,), speculator="1",
    )  # fmt: skip
    rows = build([record(Chunk(ENVELOPE, (PREFILL, tree)))], 32).rows["rejected"].to_pylist()
    assert [(row["branch"], row["accepted_prefix"]) for row in rows] == [([X], 0), ([E, Y], 1)]
    assert [row["teacher_ids"][::TOP_K] for row in rows] == [[112], [111, 113]]


def test_rows_do_not_depend_on_delivery_or_on_other_records() -> None:
    again = build([record()], 32).rows
    together = build([record(offset=6), record(offset=7)], 32).rows
    for name, rows in again.items():
        assert rows.schema == TABLES[name]
        assert together[name].slice(rows.num_rows).equals(rows)


def test_chunk_without_verify_steps_adds_no_row_and_no_dead_letter() -> None:
    built = build([record(Chunk(ENVELOPE, ()))], 32)
    assert sum(rows.num_rows for rows in built.rows.values()) == 0


def test_sources_are_stored_with_the_verify_step_and_with_its_rejected_branch() -> None:
    sources = (int(DraftSource.SPECULATOR | DraftSource.SUFFIX), int(DraftSource.SUFFIX))
    built = build([record(Chunk(ENVELOPE, (PREFILL, replace(FIRST, draft_sources=sources), SECOND)))], 32)
    assert built.rows["traces"]["draft_sources"].to_pylist() == [None, [3, 2], None]
    assert built.rows["rejected"]["draft_sources"].to_pylist() == [[3, 2], None]


def test_verify_steps_of_the_suffix_drafter_alone_name_no_version() -> None:
    suffix = replace(SECOND, draft_sources=(2, 2), speculator="")
    built = build([record(Chunk(ENVELOPE, (PREFILL, FIRST, suffix)))], 32)
    assert built.rows["traces"]["speculator"].to_pylist() == ["", "1", ""]
    assert built.rows["accepted"]["speculator"].to_pylist() == ["1"], "the last version that drafted in the chunk"


def test_unknown_draft_logprobs_are_nan_in_the_row() -> None:
    unknown = replace(FIRST, draft_logprobs=(float("nan"),) * 2)
    built = build([record(Chunk(ENVELOPE, (PREFILL, unknown, SECOND)))], 32)
    assert not built.dead_letters
    assert np.isnan(built.rows["rejected"].to_pylist()[0]["draft_logprobs"]).all()


def nan_features() -> VerifyStep:
    bits = SECOND.features.copy()
    bits[0, 1] = 0x7FC0
    return replace(SECOND, features=bits)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        pytest.param(nan_features(), "bad_number", id="nan in the features"),
        pytest.param(replace(SECOND, draft_logprobs=(float("-inf"), 0.0)), "bad_number", id="infinite log-probability"),
        pytest.param(replace(SECOND, top_ids=-SECOND.top_ids), "bad_token", id="negative teacher token"),
        pytest.param(replace(SECOND, draft_sources=(1, 8)), "contradiction", id="unknown source"),
        pytest.param(replace(SECOND, draft_sources=(1, 0)), "contradiction", id="node that nothing proposed"),
        pytest.param(replace(SECOND, draft_sources=(2, 2)), "contradiction", id="version that proposed nothing"),
        pytest.param(
            replace(SECOND, draft_sources=(2, 3), speculator=""), "contradiction", id="proposed by an unnamed version"
        ),
        pytest.param(replace(SECOND, active_since_us=2**60), "bad_number", id="swap after the year 10000"),
        pytest.param(replace(SECOND, bonus=-3), "bad_token", id="negative bonus"),
        pytest.param(replace(SECOND, position=9), "contradiction", id="hole between positions"),
        pytest.param(replace(SECOND, verify_step=4), "contradiction", id="missing verify step"),
        pytest.param(replace(SECOND, tokens=(E,)), "contradiction", id="root that the target did not choose"),
        pytest.param(
            replace(SECOND, bonus=None, top_ids=SECOND.top_ids[:0], top_logprobs=SECOND.top_logprobs[:0]),
            "contradiction",
            id="answer without a bonus",
        ),
    ],
)
def test_contradictory_chunk_is_a_dead_letter(bad: VerifyStep, code: str) -> None:
    assert reason(record(Chunk(ENVELOPE, (PREFILL, FIRST, bad)))) == code


def test_draft_inside_the_prompt_is_a_dead_letter() -> None:
    assert reason(record(Chunk(ENVELOPE, (replace(FIRST, verify_step=0),)))) == "contradiction"


@pytest.mark.parametrize("schema", [b"b536faa160ee1a9e", b"of-a-newer-node", None])
def test_a_record_of_another_release_of_the_format_is_read(schema: bytes | None) -> None:
    newer = record()
    with pa.ipc.open_stream(newer.value[: -trace.CHECKSUM_BYTES]) as reader:
        older = reader.read_all().drop_columns(list(trace.ADDED_COLUMNS))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, older.schema) as writer:
        writer.write_table(older)
    value = sink.getvalue().to_pybytes()
    headers = tuple((name, schema if name == "schema" else text) for name, text in newer.headers)
    built = build([replace(newer, value=value + trace.checksum(value), headers=headers)], 32)
    assert not built.dead_letters
    for name, rows in build([newer], 32).rows.items():
        assert built.rows[name].equals(rows)


@pytest.mark.parametrize(
    ("header", "value", "code"),
    [
        ("content-type", b"text/plain", "foreign_content"),
        ("rows", b"4", "wrong_count"),
        ("rows", None, "wrong_count"),
        ("rows", b"\xff", "wrong_count"),
    ],
)
def test_wrong_header_is_a_dead_letter(header: str, value: bytes | None, code: str) -> None:
    headers = tuple((name, value if name == header else old) for name, old in record().headers)
    assert reason(record(headers=headers)) == code


def test_number_too_large_for_its_column_is_a_dead_letter() -> None:
    assert reason(record(Chunk(replace(ENVELOPE, seed=2**63), EXAMPLE.verify_steps))) == "too_large"
    assert reason(record(Chunk(replace(ENVELOPE, sampling_top_k=2**31), EXAMPLE.verify_steps))) == "too_large"
    assert reason(record(Chunk(replace(ENVELOPE, temperature=float("nan")), EXAMPLE.verify_steps))) in (
        "bad_number", "bad_envelope",
    )  # fmt: skip


@pytest.mark.parametrize("line", ["", "l" * 129, "a/b", "a line", "zeile-ä"])
def test_line_that_is_no_folder_name_is_a_dead_letter(line: str) -> None:
    assert reason(record(Chunk(replace(ENVELOPE, line=line), EXAMPLE.verify_steps))) == "bad_line"


def test_day_comes_from_the_record_and_not_from_the_clock_of_the_node() -> None:
    late = replace(record(), time_us=1_700_006_400_000_000)  # 2023-11-15T00:00:00Z
    built = build([replace(late, time_us=late.time_us - 1), late, replace(late, value=None)], 32)
    days = {name: {day.day for day in rows["day"].to_pylist()} for name, rows in built.rows.items()}
    assert days == {"accepted": {14, 15}, "rejected": {14, 15}, "traces": {14, 15}, "dead_letters": {15}}


@pytest.mark.parametrize("time_us", [-(2**63), -1, 2**62, 2**63 - 1])
def test_record_time_out_of_range_is_clamped_to_the_nearest_day(time_us: int) -> None:
    built = build([replace(record(), time_us=time_us), replace(record(), time_us=time_us, value=None)], 32)
    for name in ("accepted", "dead_letters"):
        (day,) = built.rows[name]["day"].to_pylist()
        assert day.year in (1970, 9999)


def test_verify_step_time_out_of_range_is_a_dead_letter() -> None:
    for time_us in (-1, 2**62):
        assert reason(record(Chunk(ENVELOPE, (replace(PREFILL, time_us=time_us), FIRST, SECOND)))) == "bad_number"


@pytest.mark.parametrize("header", ["target", "node"])
def test_header_that_contradicts_the_envelope_is_a_dead_letter(header: str) -> None:
    announced = getattr(ENVELOPE, header).encode()
    assert not build([record(headers=(*record().headers, (header, announced)))], 32).dead_letters
    assert reason(record(headers=(*record().headers, (header, b"another")))) == "header_mismatch"


@pytest.mark.parametrize(
    "bad",
    [
        replace(SECOND, bonus=123),
        replace(SECOND, draft_tokens=(Y, 123)),
        replace(SECOND, top_ids=SECOND.top_ids + 2),
        replace(PREFILL, tokens=(A, 123, C)),
    ],
)
def test_token_outside_a_known_vocabulary_is_a_dead_letter(bad: VerifyStep) -> None:
    verify_steps = tuple(bad if bad.verify_step == r.verify_step else r for r in EXAMPLE.verify_steps)
    known = replace(ENVELOPE, vocab_size=124)
    assert not build(
        [record(Chunk(known, EXAMPLE.verify_steps)), record(Chunk(ENVELOPE, verify_steps))], 32
    ).dead_letters
    assert reason(record(Chunk(replace(ENVELOPE, vocab_size=123), verify_steps))) == "bad_token"


def test_detail_names_the_token_outside_the_vocabulary() -> None:
    built = build([record(Chunk(replace(ENVELOPE, vocab_size=123), (replace(PREFILL, tokens=(A, 123, C)),)))], 32)
    (detail,) = built.rows["dead_letters"]["detail"].to_pylist()
    assert detail == "verify step 0: token id 123 in tokens, expected 0 to 122"


def test_token_outside_the_vocabulary_before_the_chunk_is_a_dead_letter() -> None:
    bare = tuple(replace(r, features=r.features[:0]) for r in (FIRST, SECOND))
    envelope = replace(ENVELOPE, chunk=1, features="recompute", preceding_tokens=(A, 999, C), vocab_size=200)
    assert reason(record(Chunk(envelope, bare))) == "bad_token"


def test_record_without_a_value_is_a_dead_letter() -> None:
    assert reason(record(value=None)) == "empty"


def test_dead_letter_keeps_headers_and_row_count() -> None:
    row = only_row(build([record(value=b"junk")], 32).rows["dead_letters"])
    assert row["rows"] == 3
    assert row["headers"][1] == {"name": "schema", "value": trace.SCHEMA_ID.encode()}  # type: ignore[index]
    for claimed in (b"-1", b"9" * 5000, "٣".encode(), b""):
        built = build([record(value=b"junk", headers=(("rows", claimed),))], 32)
        assert only_row(built.rows["dead_letters"])["rows"] is None


def test_header_whose_name_is_not_utf8_makes_a_dead_letter_that_shows_its_bytes() -> None:
    headers = ((b"n\xff\xc3\xb6".decode(errors="surrogateescape"), b"1"), *record().headers)
    assert reason(record(headers=headers)) == "bad_header"
    row = only_row(build([record(headers=headers)], 32).rows["dead_letters"])
    assert row["headers"][0] == {"name": "n\\xffö", "value": b"1"}  # type: ignore[index]


@given(cut=st.integers(0, 2_000), flip=st.integers(0, 7), junk=st.binary(max_size=40))
def test_altered_bytes_are_one_dead_letter_and_never_an_error(cut: int, flip: int, junk: bytes) -> None:
    value = encode(EXAMPLE)
    at = cut % len(value)
    flipped = value[:at] + bytes([value[at] ^ (1 << flip)]) + value[at + 1 :]
    for altered in (value[:at], flipped, junk):
        assert reason(record(value=altered)) in ("corrupt", "truncated")


def test_unexpected_error_makes_only_its_own_record_a_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(verify_steps: VerifyStepColumns, features: ListColumn) -> dict[int, TraceError]:
        if any(envelope.request == "odd" for envelope in verify_steps.envelopes):
            raise IndexError("unexpected")
        return find_invalid(verify_steps, features)

    monkeypatch.setattr("pipeline.batches.find_invalid", fragile)
    odd = Chunk(replace(ENVELOPE, request="odd"), EXAMPLE.verify_steps)
    sent = [record(offset=1), record(odd, offset=2), record(offset=3), record(offset=4, value=b"junk")]
    built = build(sent, 32, window=DeduplicationWindow(1))
    assert built.rows["accepted"]["offset"].to_pylist() == [1, 3]
    letters = built.rows["dead_letters"].select(["offset", "reason", "detail"]).to_pylist()
    assert letters[0] == {"offset": 2, "reason": "unreadable", "detail": "IndexError: unexpected"}
    assert [letter["offset"] for letter in letters] == [2, 4]
    assert [one.offset for one in built.written] == [1, 3]


def test_result_does_not_depend_on_the_size_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [record(offset=1), record(offset=2, value=b"junk" * 9), record(offset=3), record(offset=4)]
    together = build(sent, 32, window=DeduplicationWindow(2))
    monkeypatch.setattr("pipeline.batches.RUN_BYTES", 1)
    alone = build(sent, 32, window=DeduplicationWindow(2))
    assert (alone.dead_letters, alone.written, alone.chunk_gaps) == (
        together.dead_letters,
        together.written,
        together.chunk_gaps,
    )
    assert all(alone.rows[name].equals(rows) for name, rows in together.rows.items())
    assert together.dead_letters == {"corrupt": 1, "duplicate": 1}


def test_invalid_record_does_not_affect_its_neighbours() -> None:
    built = build([record(offset=1), record(offset=2, value=b"junk" * 9), record(offset=3)], 32)
    assert built.rows["accepted"]["offset"].to_pylist() == [1, 3]
    assert built.rows["dead_letters"]["offset"].to_pylist() == [2]
    assert built.dead_letters == {"corrupt": 1}
