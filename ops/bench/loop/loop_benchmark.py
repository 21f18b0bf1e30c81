"""The run of ``aurora bench loop``: its options, its own stack, and its page.

Broker, node, stream, tables, trainer, registry and promoter run as processes of their own, as in ``aurora up``. The
traffic has one domain, then another. After each domain the trainer is stopped, and held-out prompts are run in turn
with the newest champion, without speculation, and after the shift with the version that was champion at the shift: the
value of a draft that was trained once.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict
from math import inf
from pathlib import Path

from pydantic import SecretStr

from ops.bench import prompts
from ops.bench.embedded_kafka import free_port
from ops.bench.harness import Report, Say, Session
from ops.bench.loop.loop_figures import judge, summarize
from ops.bench.loop.two_domain_run import LoopSize, TwoDomainRun
from ops.demo.run import wipe_data
from ops.local.stack import running_stack
from ops.report.page import write_page
from schemas.errors import UserError
from schemas.settings import Kafka, Registry, Settings

MIN_MINUTES = 0.5

_LOOPBACK = "127.0.0.1"


def run(settings: Settings, say: Say, *, domains: str, size: LoopSize, fresh: bool, html: Path | None) -> Report:
    """Run the loop, and stop all of it."""
    pair = parse_domains(domains)
    if html:
        write_page("--html", html, "")
    session, here = Session(settings.serve.num_threads), own_settings(settings)
    with running_stack(here, say, restart=False) as stack:
        if fresh:
            wipe_data(here)
        record = TwoDomainRun(stack, pair, size, say).run()
    about = {"domains": pair, **asdict(size), **summarize(record), "logs": f"{here.stack.data_dir}/logs"}
    report = session.report(f"the loop through {' and '.join(pair)} prompts", about, judge(record))
    if html:
        from ops.bench.loop.loop_page import render_loop_page

        write_page("--html", html, render_loop_page(record, report))
    return report


def loop_size(*, quick: bool, minutes: str | None, concurrency: int, max_tokens: int) -> LoopSize:
    """Return the size that the flags name. Raises ``UserError`` for wrong ``minutes``."""
    default = "2" if quick else "10"
    each = parse_minutes(default if minutes is None else minutes)
    if quick:
        return LoopSize(each, concurrency, max_tokens, alone=4, loaded=3, training=3)
    return LoopSize(each, concurrency, max_tokens, alone=12, loaded=6, training=6)


def parse_domains(text: str) -> tuple[str, str]:
    """Return the two domains that a flag names."""
    match [name.strip() for name in text.split(",")]:
        case [first, second] if first != second and {first, second} <= set(prompts.DOMAINS):
            return first, second
    raise UserError(f"--domains {text}: name two of {', '.join(prompts.DOMAINS)}, as in code,math")


def parse_minutes(text: str) -> tuple[float, float]:
    """Return the minutes of learning in each domain: one number for both, or one for each."""
    try:
        minutes = [float(part) for part in text.split(",")]
    except ValueError:
        minutes = []
    if len(minutes) in {1, 2} and all(MIN_MINUTES <= each < inf for each in minutes):
        return minutes[0], minutes[-1]
    raise UserError(f"--minutes {text}: give {MIN_MINUTES:g} or more, for both domains or as in 30,10 for each")


def own_settings(settings: Settings) -> Settings:
    """Return the settings with folders, ports and services of this benchmark; how to learn and serve stays."""
    folder = Path(settings.stack.data_dir) / "bench" / "loop"
    ports = {f"{name}_port": free_port() for name in ("kafka", "kafka_controller", "mlflow")}
    changed: dict[str, dict[str, object]] = {
        "kafka": {"bootstrap_servers": Kafka().bootstrap_servers, "client_options": {}},
        "tables": {"uri": str(folder / "tables"), "storage_options": {}},
        "serve": {"host": _LOOPBACK, "port": free_port(), "admin_token": SecretStr(secrets.token_urlsafe())},
        "traces": {"claim_check_uri": str(folder / "claims"), "claim_check_options": {}},
        "stream": {"host": _LOOPBACK, "port": free_port(), "data_dir": str(folder / "stream")},
        "train": {"host": _LOOPBACK, "port": free_port(), "checkpoint_dir": str(folder / "train")},
        "promoter": {"host": _LOOPBACK, "port": free_port()},
        "stack": {"data_dir": str(folder), **ports},
        "registry": {"tracking_uri": Registry().tracking_uri},
    }
    sections = {name: getattr(settings, name).model_copy(update=values) for name, values in changed.items()}
    return settings.model_copy(update=sections)
