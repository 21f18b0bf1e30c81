"""The page of the loop shows every part, moves aliases for a token only, and is legible in a browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, brightness, browser, measure
from loop_states import HOSTILE, LINE, NOW, full_state, silent_state, version
from promoter_world import LINE as MOVED_LINE
from promoter_world import World, figures

from ops.web import loop_page
from ops.web.line_chart import ChartLine, ChartMark, draw_lines
from ops.web.loop_page import LoopPage, render_loop
from ops.web.loop_reader import LoopState, Reading, RegisteredLine
from trainer.release import manual_moves
from trainer.release.registry import Line
from trainer.status import MAX_FORM_BYTES, StatusServer

TOKEN = "geheim ü"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


def render(state: LoopState) -> str:
    return render_loop(state, NOW.timestamp(), None, may_move=True)


def test_the_page_shows_the_whole_loop() -> None:
    page = render(full_state())
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for text in (
        LINE,
        "1.43x",
        "1.5 h",
        "decoding time saved",
        "node node-0",
        "6 (champion)",
        "rows written 411,870",
        "step 12,480",
        "canary 7 of champion 6: neither worse nor shown to be as good yet",
        "Canary analysis of version 7 against 6",
        "+3.4% -1.6% to +8.4%",
        "quarantine: rolled back: worse on label sql",
        "+0.030 to +0.110",
        "is accepted less often since 19:44 UTC",
        "2 corrupt",
        "1 duplicate",
        "aurora.traces.v1/1/20394",
        "2026-11-30 20:00:00 UTC",
    ):
        assert text in shown, text


def test_the_page_shows_what_is_unreachable_as_such() -> None:
    page = render(silent_state())
    for text in (
        "no status from 127.0.0.1:8000 (serve.port)",
        "no status from 127.0.0.1:16067 (train.port)",
        "registry.tracking_uri http://127.0.0.1:15000: no answer",
        "table promotions: tables.uri does not answer; this is 5 min old",
        "table dead_letters: tables.uri does not answer",
        "no traffic yet",
    ):
        assert text in page, text


def test_text_of_clients_and_people_is_escaped() -> None:
    page = render(full_state())
    assert HOSTILE not in page
    assert "look at it first &lt;script&gt;" in page


def test_versions_with_an_alias_are_shown_however_old_they_are() -> None:
    line = Line(LINE, {"champion": "40", "previous": "5"})
    of = RegisteredLine(line, tuple(version(number, 41.0 - number, 0.1) for number in range(1, 41)))
    page = render(LoopState(lines=Reading((of,), NOW.timestamp())))
    shown = re.findall(r"<tr>\n<td>(\d+)</td>", page)
    assert shown == [*(str(number) for number in range(40, 28, -1)), "5"]
    assert '<span class="alias previous">previous</span>' in page


def test_a_chart_is_interrupted_where_no_values_came_and_names_only_marks_that_fit() -> None:
    points = [(0.0, 1.0), (5.0, 2.0), (60.0, 3.0), (65.0, 4.0)]
    marks = [ChartMark(30.0, "v10"), ChartMark(31.0, "v11"), ChartMark(50.0, "v12")]
    chart = draw_lines([ChartLine(points, "--series")], marks, 100.0, 100.0, "a <chart>")
    assert chart.count('stroke="var(--series)"') == 2
    assert chart.count('stroke-dasharray="2 3"') == 3
    assert ("v10" in chart, "v11" in chart, "v12" in chart) == (True, False, True)
    assert 'aria-label="a &lt;chart&gt;"' in chart


@dataclass
class Served:
    """The page of a promoter, with a registry in memory."""

    url: str
    world: World

    def post(self, headers: dict[str, str] | None = None, **form: str) -> httpx.Response:
        return httpx.post(f"{self.url}/move", data=form, headers=headers)

    def promote(self, version: str, token: str = TOKEN, **form: str) -> httpx.Response:
        champion = self.world.registry.named.get("champion", "")
        sent = {"action": "champion", "line": MOVED_LINE, "version": version, "champion": champion, "token": token}
        return self.post(**sent | form)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    servers: list[StatusServer] = []

    def start(token: str = TOKEN, state: LoopState | None = None) -> Served:
        world = World(tmp_path, **{"tables.uri": str(tmp_path), "promoter.admin_token": token})
        world.registry.register("1", {})
        world.registry.named |= {"champion": "1", "previous": "1"}
        world.promoter.poll()
        world.registry.register("2", figures(1.2, "1", 1.0))
        monkeypatch.setattr(loop_page, "SpeculatorRegistry", lambda _: world.registry)
        monkeypatch.setattr(manual_moves, "KafkaEvents", lambda _: world.topic)
        page = LoopPage(world.settings)
        line = world.registry.lines()[0]
        versions = tuple(world.registry.versions(MOVED_LINE))
        shown = state or LoopState(lines=Reading((RegisteredLine(line, versions),), NOW.timestamp()))
        monkeypatch.setattr(page._reader, "state", lambda: shown)
        server = StatusServer("promoter", "127.0.0.1", 0, world.promoter.status, world.promoter.metrics, page)
        server.__enter__()
        servers.append(server)
        return Served(f"http://127.0.0.1:{server.port}", world)

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def test_the_page_needs_no_token_and_lies_beside_status_and_metrics(serve: Callable[..., Served]) -> None:
    served = serve("", full_state())
    page = httpx.get(served.url)
    assert page.status_code == 200
    assert LINE in page.text
    assert "/move" not in page.text
    assert page.headers["Refresh"] == "5"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert httpx.get(f"{served.url}/status").json()["champion"] == "1"
    assert "aurora_promoter_ready 1.0" in httpx.get(f"{served.url}/metrics").text
    assert httpx.get(f"{served.url}/elsewhere").status_code == 404


def test_without_a_token_in_the_settings_nothing_moves(serve: Callable[..., Served]) -> None:
    served = serve("")
    for token in ("", TOKEN):
        answer = served.promote("2", token)
        assert answer.status_code == 403
        assert "set promoter.admin_token" in answer.text
    assert "<form" not in httpx.get(f"{served.url}/move").text
    assert served.world.registry.named["champion"] == "1"


@pytest.mark.parametrize("token", ["", "geheim", TOKEN + "x", "\x00"])
def test_a_wrong_token_moves_nothing(serve: Callable[..., Served], token: str) -> None:
    served = serve()
    answer = served.promote("2", token)
    assert answer.status_code == 401
    assert served.world.registry.named["champion"] == "1"


def test_a_token_in_the_url_moves_nothing(serve: Callable[..., Served]) -> None:
    served = serve()
    form = {"action": "champion", "line": MOVED_LINE, "version": "2", "champion": "1"}
    assert httpx.post(f"{served.url}/move", params={"token": TOKEN}, data=form).status_code == 401
    assert httpx.get(f"{served.url}/move", params=form | {"token": TOKEN}).status_code == 200
    assert served.world.registry.named["champion"] == "1"


def test_a_form_of_another_site_moves_nothing(serve: Callable[..., Served]) -> None:
    served = serve()
    form = {"action": "champion", "line": MOVED_LINE, "version": "2", "champion": "1", "token": TOKEN}
    for site in ("cross-site", "same-site"):
        assert served.post({"Sec-Fetch-Site": site}, **form).status_code == 403
    assert served.world.registry.named["champion"] == "1"
    assert served.post({"Sec-Fetch-Site": "same-origin"}, **form).status_code == 303


def test_a_token_promotes_and_the_record_names_the_page(serve: Callable[..., Served]) -> None:
    served = serve()
    answer = served.promote("2", why="faster on sql")
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/?line={MOVED_LINE}")
    assert served.world.registry.named["champion"] == "2"
    rows = served.world.tables.read_in_order("promotions").to_pylist()
    assert [(r["to_version"], r["actor"], r["why"]) for r in rows if r["alias"] == "champion"][-1] == (
        "2",
        "web page",
        "promote: faster on sql",
    )


def test_the_authorization_header_is_a_token_too(serve: Callable[..., Served]) -> None:
    served = serve("plain")
    form = {"action": "champion", "line": MOVED_LINE, "version": "2", "champion": "1"}
    assert served.post({"Authorization": "Basic plain"}, **form).status_code == 401
    assert served.post({"Authorization": "Bearer plain"}, **form).status_code == 303


def test_a_rollback_that_is_sent_twice_rolls_back_once(serve: Callable[..., Served]) -> None:
    served = serve()
    assert served.promote("2").status_code == 303
    form = {"action": "rollback", "line": MOVED_LINE, "champion": "2", "token": TOKEN}
    assert served.post(**form).status_code == 303
    assert served.world.registry.named["champion"] == "1"
    assert served.world.registry.tags(MOVED_LINE, "2")["aurora.quarantined"] == "rolled back: manual"
    again = served.post(**form)
    assert again.status_code == 409
    assert "champion is version 1, not 2 as the form says" in again.text
    assert served.world.registry.named["champion"] == "1"


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"version": "9"}, "has no version"),
        ({"version": "x'; --"}, "has no version"),
        ({"version": "1"}, "version 1 is already champion"),
        ({"version": "2", "line": "other"}, "no line"),
        ({"version": "2", "action": "drop"}, "has no version"),
    ],
)
def test_a_move_that_must_not_be_made_is_explained_on_the_form(
    serve: Callable[..., Served], form: dict[str, str], why: str
) -> None:
    served = serve()
    answer = served.promote(**form)
    assert answer.status_code == 409
    assert why in answer.text
    assert TOKEN not in answer.text
    assert served.world.registry.named["champion"] == "1"


def test_the_gate_is_overridden_by_the_box_alone(serve: Callable[..., Served]) -> None:
    served = serve()
    served.world.registry.registered["2"] = {}
    rejected = served.promote("2")
    assert rejected.status_code == 409
    assert "the box &#34;despite the gate or a quarantine&#34; promotes it anyway" in rejected.text
    assert served.promote("2", force="on").status_code == 303
    assert served.world.registry.named["champion"] == "2"


def test_other_bodies_than_forms_are_rejected(serve: Callable[..., Served]) -> None:
    served = serve()
    assert httpx.post(f"{served.url}/move", json={"token": TOKEN}).status_code == 415
    assert served.promote("2", why="x" * MAX_FORM_BYTES).status_code == 413
    many = {f"field{i}": "x" for i in range(50)}
    assert served.promote("2", **many).status_code == 401, "a form with too many fields has none"
    assert served.world.registry.named["champion"] == "1"


@needs_chromium
@pytest.mark.parametrize("width", [1400, 900, 500])
def test_the_page_fits_its_window_in_a_browser(tmp_path: Path, width: int) -> None:
    measured = measure(tmp_path, render(full_state()), width)
    assert measured["width"] <= measured["window"]
    assert measured["charts"] == 2
    assert measured["on"] == []
    assert measured["outside"] == []
    assert measured["smallest"] >= 9
    assert measured["fetched"] == []
    assert {"v5", "v6", "now"} <= set(measured["texts"])


@needs_chromium
def test_the_page_follows_the_dark_mode_of_the_browser(tmp_path: Path) -> None:
    page = render(full_state())
    light, dark = measure(tmp_path, page, 900), measure(tmp_path, page, 900, "--force-dark-mode")
    assert (brightness(light["paper"]), brightness(dark["paper"])) == ("light", "dark")
    assert (brightness(light["ink"]), brightness(dark["ink"])) == ("dark", "light")


@needs_chromium
def test_a_browser_shows_the_served_page_under_its_security_policy(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(TOKEN, full_state())
    shown = browser(tmp_path, "--window-size=1400,2000", f"--screenshot={tmp_path / 'page.png'}", served.url)
    assert "CONSOLE" not in shown.stderr
    from matplotlib.image import imread

    pixels = (imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int)
    # Line of the throughput: --series of style.css, which the policy lets the page have.
    assert (pixels == [0x00, 0x72, 0xB2]).all(axis=-1).sum() > 500
