"""The figures of a run of the loop, from small records whose answers are known, and its settings."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ops.bench.harness import Figure, Rates, Report, TrialValues
from ops.bench.loop import Options, both, own, pair
from ops.bench.loop_arms import Arm, Measured
from ops.bench.loop_course import ADAPTIVE, NONE, STATIC, Record, arms, followed, static
from ops.bench.loop_figures import asked_before, figures, told
from ops.bench.loop_page import page
from ops.bench.loop_served import Waits
from ops.demo.record import DemoRun, Swap, VersionRecord
from ops.loadgen.load import Response
from ops.report.theme import PALETTE
from schemas.errors import UserError
from schemas.settings import Settings, load, to_environ


def measured(at_once: int = 1, **rates: float) -> Measured:
    return Measured(
        at_once,
        {name: Rates(TrialValues((rate, rate)), TrialValues((rate, rate))) for name, rate in rates.items()},
        dict.fromkeys(rates, 1.0),
        {name: (name,) for name in rates},
        same_answers=1.0,
    )


def answered(number: int) -> Response:
    domain, accepted = ("code", 2) if number < 40 else ("math", 0)
    speed = 10 if number < 40 else 20
    return Response(str(number), domain, number, number + 1.0, "p", "t", 9, speed, 4, 8, accepted, ("1",))


RECORD = Record(
    domains=("code", "math"),
    run=DemoRun(
        started=0,
        ended=100,
        requests=tuple(map(answered, range(80))),
        swaps=(Swap("1", 20, 2, 0.5), Swap("2", 60, 2, 0.5)),
        versions=(VersionRecord("1", 15, 17, 20, 0.4, 0.1), VersionRecord("2", 55, 57, 60, 0.5, 0.4)),
    ),
    training=measured(4, adaptive=22, none=20),
    first=(measured(adaptive=45, none=30), measured(4, adaptive=90, none=100)),
    second=(
        measured(adaptive=40, static=32, none=20),
        measured(4, adaptive=90, static=90, none=100),
    ),
    at_shift="1",
    waits=Waits((10.0, 50.0, 30.0, 200.0), unserved=1, young=2),
)
REPORT = Report("the loop", {"processor": "a <fast> one", "cores": 2}, "abc", {}, figures(RECORD))


def by_name(record: Record) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(record)}


def test_speeds_are_over_no_speculation_on_the_first_domain_and_over_the_static_draft_after_the_shift() -> None:
    found = by_name(RECORD)
    assert (found["day0_speedup"].value, found["day0_speedup"].met) == (1.5, True)
    assert found["day0_speedup_while_training"].value == pytest.approx(1.1)
    assert (found["shift_speedup"].value, found["shift_speedup"].met) == (1.25, True)
    assert found["shift_over_none"].value == 2


def test_goals_are_for_one_request_at_a_time() -> None:
    found = by_name(RECORD)
    assert found["day0_speedup_loaded"].value == 0.9
    assert (found["day0_speedup_loaded"].met, found["shift_speedup_loaded"].met) == (None, None)
    assert found["day0_speedup_loaded"].summary()["at_once"] == 4
    assert "day0_speedup_loaded" not in by_name(replace(RECORD, first=RECORD.first[:1]))


def test_waits_are_told_with_what_they_leave_out() -> None:
    found = by_name(RECORD)
    assert (found["trace_to_served_p50_s"].value, found["trace_to_served_p50_s"].met) == (50, True)
    assert found["trace_to_served_p99_s"].value == 200
    assert found["trace_to_served_p50_s"].summary()["unserved"] == 1
    nothing = by_name(replace(RECORD, waits=Waits((), 0, 7)))["trace_to_served_p50_s"]
    assert (nothing.value, nothing.met) == (None, None)


def test_each_domain_has_its_accepted_per_step_and_its_speed_beside_the_trainer() -> None:
    found = by_name(RECORD)
    assert (found["accepted_per_step_code"].value, found["accepted_per_step_math"].value) == (0.5, 0)
    assert found["accepted_per_step_code"].summary()["requests"] == 20
    speeds = told(RECORD)["with_trainer_running_tokens_per_s"]
    assert speeds == {"code": pytest.approx(10), "math": pytest.approx(20)}


def test_requests_whose_prompt_came_before_are_told_beside_the_accepted_per_step_they_had() -> None:
    asked = [replace(answered(number), prompt=f"p{number % 30}") for number in range(40)]
    found = by_name(replace(RECORD, run=replace(RECORD.run, requests=tuple(asked))))
    assert found["accepted_per_step_code"].summary()["asked_before"] == 10
    assert asked_before(asked) == [False] * 30 + [True] * 10


def test_a_failed_request_is_a_miss() -> None:
    broken = replace(RECORD.run, requests=(*RECORD.run.requests, replace(answered(3), error="503")))
    assert by_name(RECORD)["failed_requests"].met
    assert not by_name(replace(RECORD, run=broken))["failed_requests"].met


def test_the_static_draft_is_the_version_of_the_shift_or_no_speculation_where_there_was_none() -> None:
    assert arms("3") == {ADAPTIVE: Arm(speculate=True, version="3"), NONE: Arm(speculate=False)}
    assert static("3", "1") == {STATIC: Arm(speculate=True, version="1")}
    assert static("3", None) == {STATIC: Arm(speculate=False)}


def test_a_draft_that_nothing_took_the_place_of_has_gained_nothing() -> None:
    assert static("1", "1") == {}
    same = replace(RECORD, second=(measured(adaptive=40, none=20),))
    assert (by_name(same)["shift_speedup"].value, by_name(same)["shift_speedup"].met) == (1, False)
    assert by_name(same)["shift_over_none"].value == 2


def test_pinned_versions_are_no_boundaries_of_the_traffic() -> None:
    swaps = [Swap(str(time), time, 0, 0) for time in (5, 15, 25)]
    assert [swap.version for swap in followed(swaps, [(10, 20)])] == ["5", "25"]


def test_the_page_shows_the_curve_the_boundaries_and_every_figure() -> None:
    html = page(RECORD, REPORT)
    assert "code prompts" in html
    assert "math prompts" in html
    assert ">v2<" in html
    assert all(name in html for name in by_name(RECORD))
    assert "a &lt;fast&gt; one" in html
    assert not re.findall(r"\$[a-z]+", html)
    assert all(f"{variable.removeprefix('var(').removesuffix(')')}:" in html for variable in PALETTE.values())


def test_two_domains_are_named_in_the_order_of_the_traffic() -> None:
    assert pair("sql, chat") == ("sql", "chat")


@pytest.mark.parametrize("domains", ["code", "code,code", "code,math,sql", "code,poems", ""])
def test_anything_but_two_domains_is_refused(domains: str) -> None:
    with pytest.raises(UserError, match="name two of code, math, sql, chat"):
        pair(domains)


def test_a_quick_run_learns_for_two_minutes_unless_it_is_told_for_how_long() -> None:
    assert [Options(quick=quick).size.minutes for quick in (False, True)] == [(10, 10), (2, 2)]
    assert Options(quick=True, minutes="5").size.minutes == (5, 5)
    assert Options(minutes="30, 7.5").size.minutes == (30, 7.5)


def test_minutes_left_empty_are_refused_and_not_taken_for_the_usual_ones() -> None:
    with pytest.raises(UserError, match="--minutes"):
        assert Options(minutes="").size


@pytest.mark.parametrize("minutes", ["", "ten", "0.4", "-1", "nan", "inf", "10,", "10,0", "10,nan", "10,10,10"])
def test_minutes_that_are_none_are_refused_with_the_flag(minutes: str) -> None:
    with pytest.raises(UserError, match=r"--minutes .*: say 0\.5 or more, .* as in 30,10"):
        both(minutes)


def test_a_run_keeps_to_folders_ports_and_services_of_its_own_and_learns_as_it_is_told() -> None:
    flags = {"train.learning_rate": 0.5, "kafka.bootstrap_servers": "kafka:9092", "tables.uri": "s3://bucket/tables"}
    here = own(load(environ={}, flags=flags))
    assert here.train.learning_rate == 0.5
    assert here.kafka.bootstrap_servers == Settings().kafka.bootstrap_servers
    assert here.registry == Settings().registry
    folders = [
        here.stack.data_dir,
        here.tables.uri,
        here.traces.claim_check_uri,
        here.stream.data_dir,
        here.train.checkpoint_dir,
    ]
    assert all(Path(folder).is_relative_to(".aurora/bench/loop") for folder in folders)
    assert here.serve.admin_token.get_secret_value()
    ports = [getattr(here, part).port for part in ("serve", "stream", "train", "promoter")]
    ports += [here.stack.kafka_port, here.stack.kafka_controller_port, here.stack.mlflow_port]
    assert len(set(ports)) == 7
    assert load(environ=to_environ(here)) == here
