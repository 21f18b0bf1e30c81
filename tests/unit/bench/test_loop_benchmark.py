"""The figures, the page, the options and the settings of ``aurora bench loop``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ops.bench.harness import Figure, Rates, Report, TrialValues
from ops.bench.loop.imported_draft import find_draft
from ops.bench.loop.learning_delay import Delays
from ops.bench.loop.loop_benchmark import (
    figure_names,
    find_repeated,
    judge,
    loop_size,
    own_settings,
    parse_domains,
    parse_minutes,
    render_loop_page,
    summarize,
)
from ops.bench.loop.node_comparison import ComparisonResult, NodeArm
from ops.bench.loop.two_domain_run import ADAPTIVE, NONE, STATIC, LoopRecord, champion_arms, exclude_pinned, static_arm
from ops.demo.record import DemoRun, Swap, VersionRecord
from ops.loadgen.load import Response
from ops.report.theme import PALETTE
from schemas.errors import UserError
from schemas.settings import Settings, load, to_environ


def measured(at_once: int = 1, **rates: float) -> ComparisonResult:
    return ComparisonResult(
        at_once,
        {name: Rates(TrialValues((rate, rate)), TrialValues((rate, rate))) for name, rate in rates.items()},
        dict.fromkeys(rates, 1.0),
        {name: (name,) for name in rates},
        same_answers=1.0,
    )


def answered(number: int) -> Response:
    domain, accepted = ("code", 2) if number < 40 else ("math", 0)
    speed = 10 if number < 40 else 20
    return Response(str(number), domain, number, number + 1.0, "p", "t", 9, speed, 4, 8, accepted, speculators=("1",))


RECORD = LoopRecord(
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
    delays=Delays((10.0, 50.0, 30.0, 200.0), unserved=1, young=2),
)
REPORT = Report("the loop", {"processor": "a <fast> one", "cores": 2}, "abc", {}, judge(RECORD))


def by_name(record: LoopRecord) -> dict[str, Figure]:
    return {figure.name: figure for figure in judge(record)}


def test_speedups_are_over_no_speculation_and_after_the_shift_over_the_static_draft() -> None:
    found = by_name(RECORD)
    assert (found["day0_speedup"].value, found["day0_speedup"].met) == (1.5, False)
    assert found["day0_speedup_while_training"].value == pytest.approx(1.1)
    assert (found["shift_speedup"].value, found["shift_speedup"].met) == (1.25, True)
    assert found["shift_over_none"].value == 2


def test_every_measured_figure_is_in_the_list_of_names() -> None:
    assert [figure.name for figure in judge(RECORD)] == figure_names(RECORD.domains)


def test_goals_follow_the_domain_and_the_concurrency() -> None:
    found = by_name(RECORD)
    goals = {name: str(figure.goal) for name, figure in found.items() if figure.goal}
    assert (goals["day0_speedup"], goals["day0_speedup_loaded"]) == (">= 1.6", ">= 1.5")
    assert str(by_name(replace(RECORD, domains=("math", "code")))["day0_speedup"].goal) == ">= 1.8"
    assert (goals["shift_speedup"], goals["shift_over_none_loaded"]) == (">= 1.25", ">= 1.4")
    assert not {"shift_speedup_loaded", "shift_over_none"} & set(goals)
    assert found["day0_speedup_loaded"].value == 0.9
    assert found["day0_speedup_loaded"].summary()["at_once"] == 4
    assert "day0_speedup_loaded" not in by_name(replace(RECORD, first=RECORD.first[:1]))


def test_delays_report_the_steps_that_they_leave_out() -> None:
    found = by_name(RECORD)
    assert (found["trace_to_served_p50_s"].value, found["trace_to_served_p50_s"].met) == (50, True)
    assert found["trace_to_served_p99_s"].value == 200
    assert found["trace_to_served_p50_s"].summary()["unserved"] == 1
    nothing = by_name(replace(RECORD, delays=Delays((), 0, 7)))["trace_to_served_p50_s"]
    assert (nothing.value, nothing.met) == (None, None)


def test_each_domain_has_its_acceptance_and_its_speed_beside_the_trainer() -> None:
    found = by_name(RECORD)
    assert (found["accepted_per_step_code"].value, found["accepted_per_step_math"].value) == (0.5, 0)
    assert found["accepted_per_step_code"].summary()["requests"] == 20
    speeds = summarize(RECORD)["with_trainer_running_tokens_per_s"]
    assert speeds == {"code": pytest.approx(10), "math": pytest.approx(20)}


def test_repeated_prompts_are_counted_beside_the_acceptance() -> None:
    asked = [replace(answered(number), prompt=f"p{number % 30}") for number in range(40)]
    found = by_name(replace(RECORD, run=replace(RECORD.run, requests=tuple(asked))))
    assert found["accepted_per_step_code"].summary()["asked_before"] == 10
    assert find_repeated(asked) == [False] * 30 + [True] * 10


def test_a_failed_request_misses_the_goal() -> None:
    broken = replace(RECORD.run, requests=(*RECORD.run.requests, replace(answered(3), error="503")))
    assert by_name(RECORD)["failed_requests"].met
    assert not by_name(replace(RECORD, run=broken))["failed_requests"].met


def test_the_static_arm_is_the_version_of_the_shift_or_no_speculation() -> None:
    assert champion_arms("3") == {ADAPTIVE: NodeArm(speculate=True, version="3"), NONE: NodeArm(speculate=False)}
    assert static_arm("3", "1") == {STATIC: NodeArm(speculate=True, version="1")}
    assert static_arm("3", None) == {STATIC: NodeArm(speculate=False)}


def test_without_a_newer_champion_the_shift_speedup_is_1() -> None:
    assert static_arm("1", "1") == {}
    same = replace(RECORD, second=(measured(adaptive=40, none=20),))
    assert (by_name(same)["shift_speedup"].value, by_name(same)["shift_speedup"].met) == (1, False)
    assert by_name(same)["shift_over_none"].value == 2


IMPORTED = replace(RECORD, training=None, run=replace(RECORD.run, requests=tuple(map(answered, range(40, 80)))))


def test_an_imported_draft_is_compared_with_itself_frozen() -> None:
    found = by_name(IMPORTED)
    assert list(found) == figure_names(IMPORTED.domains, imported=True)
    assert (found["import_shift_speedup"].value, found["import_shift_speedup"].met) == (1.25, True)
    assert found["import_shift_speedup"].summary()["at_shift"] == "1"
    assert (found["imported_speedup"].value, found["import_shift_over_none"].value) == (1.5, 2)
    assert {name for name, figure in found.items() if figure.goal} == {
        *("import_shift_speedup", "trace_to_served_p50_s", "failed_requests")
    }
    assert summarize(IMPORTED)["with_trainer_running_tokens_per_s"] == {"math": pytest.approx(20)}
    html = render_loop_page(IMPORTED, replace(REPORT, figures=judge(IMPORTED)))
    assert "requests with math prompts" in html
    assert "the imported draft itself" in html


def test_a_draft_is_found_by_the_name_of_its_cache_or_by_its_folder(tmp_path: Path) -> None:
    here = load(environ={}, flags={"stack.data_dir": str(tmp_path)})
    cached, other = tmp_path / "bench" / "speculators" / "code", tmp_path / "other"
    for folder in (cached, other):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert find_draft(here, "code") == cached
    assert find_draft(here, str(other)) == other
    with pytest.raises(UserError, match=r"--import math: no draft in .*aurora bench speculator"):
        find_draft(here, "math")


def test_swaps_to_pinned_versions_are_excluded() -> None:
    swaps = [Swap(str(time), time, 0, 0) for time in (5, 15, 25)]
    assert [swap.version for swap in exclude_pinned(swaps, [(10, 20)])] == ["5", "25"]


def test_the_page_shows_the_curve_the_swaps_and_every_figure() -> None:
    html = render_loop_page(RECORD, REPORT)
    assert "code prompts" in html
    assert "math prompts" in html
    assert ">v2<" in html
    assert all(name in html for name in by_name(RECORD))
    assert "a &lt;fast&gt; one" in html
    assert not re.findall(r"\{[{%]", html)
    assert all(f"{variable.removeprefix('var(').removesuffix(')')}:" in html for variable in PALETTE.values())


def minutes_of(minutes: str | None = None, *, quick: bool = False) -> tuple[float, float]:
    return loop_size(quick=quick, minutes=minutes, concurrency=4, max_tokens=128).minutes


def test_two_domains_are_named_in_the_order_of_the_traffic() -> None:
    assert parse_domains("sql, chat") == ("sql", "chat")


@pytest.mark.parametrize("domains", ["code", "code,code", "code,math,sql", "code,poems", ""])
def test_anything_but_two_domains_is_rejected(domains: str) -> None:
    with pytest.raises(UserError, match="name two of code, math, sql, chat"):
        parse_domains(domains)


def test_a_quick_run_learns_for_two_minutes_by_default() -> None:
    assert [minutes_of(quick=quick) for quick in (False, True)] == [(10, 10), (2, 2)]
    assert minutes_of("5", quick=True) == (5, 5)
    assert minutes_of("30, 7.5") == (30, 7.5)


def test_empty_minutes_are_rejected() -> None:
    with pytest.raises(UserError, match="--minutes"):
        minutes_of("")


@pytest.mark.parametrize("minutes", ["", "ten", "0.4", "-1", "nan", "inf", "10,", "10,0", "10,nan", "10,10,10"])
def test_wrong_minutes_are_rejected(minutes: str) -> None:
    with pytest.raises(UserError, match=r"--minutes .*: give 0\.5 or more, .* as in 30,10"):
        parse_minutes(minutes)


def test_a_run_has_its_own_folders_ports_and_services_and_keeps_the_training_settings() -> None:
    flags = {"train.learning_rate": 0.5, "kafka.bootstrap_servers": "kafka:9092", "tables.uri": "s3://bucket/tables"}
    here = own_settings(load(environ={}, flags=flags))
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
