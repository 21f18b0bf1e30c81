"""``aurora bench loop``: what the whole loop is worth, driven for real through two domains of traffic.

Broker, node, stream, tables, trainer, registry and promoter run as processes of their own, as in ``aurora up``. Traffic
of one domain comes until its time is over, then that of another. After each the trainer is stopped, and prompts that
were never traffic are answered in turn by what the loop has come to, by no speculation, and after the shift by the
version that was champion when it came: what a draft trained once is worth.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

from pydantic import SecretStr

from ops.bench import prompts
from ops.bench.embedded_kafka import free_port
from ops.bench.harness import Report, Session
from ops.bench.loop_course import Course, Size
from ops.bench.loop_figures import figures, told
from ops.bench.loop_page import page
from ops.demo.run import wipe_data
from ops.local.stack import Say, running_stack
from ops.report.page import write_page
from schemas.errors import UserError
from schemas.settings import Kafka, Registry, Settings

LEAST_MINUTES = 0.5

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    domains: str = "code,math"
    minutes: str | None = None
    quick: bool = False
    concurrency: int = 4
    max_tokens: int = 128
    fresh: bool = False
    html: Path | None = None

    @property
    def size(self) -> Size:
        """How long and how much."""
        usual = "2" if self.quick else "10"
        minutes = both(usual if self.minutes is None else self.minutes)
        if self.quick:
            return Size(minutes, self.concurrency, self.max_tokens, alone=4, loaded=3, training=3)
        return Size(minutes, self.concurrency, self.max_tokens, alone=12, loaded=6, training=6)


def run(settings: Settings, options: Options, say: Say) -> Report:
    """Drive the loop, and stop all of it."""
    domains, size = pair(options.domains), options.size
    if options.html:
        write_page("--html", options.html, "")
    session = Session(settings.serve.num_threads)
    here = own(settings)
    with running_stack(here, say, restart=False) as stack:
        if options.fresh:
            wipe_data(here)
        record = Course(stack, domains, size, say).run()
    report = session.report(
        title=f"the loop through {' and '.join(domains)} prompts",
        about={"domains": domains, **asdict(size), **told(record), "logs": f"{here.stack.data_dir}/logs"},
        figures=figures(record),
    )
    if options.html:
        write_page("--html", options.html, page(record, report))
    return report


def pair(domains: str) -> tuple[str, str]:
    """The two domains that a flag names."""
    match [name.strip() for name in domains.split(",")]:
        case [first, second] if first != second and {first, second} <= set(prompts.DOMAINS):
            return first, second
    raise UserError(f"--domains {domains}: name two of {', '.join(prompts.DOMAINS)}, as in code,math")


def both(minutes: str) -> tuple[float, float]:
    """Minutes of learning in each of the two domains, as a flag says them: once for both, or one after the other."""
    try:
        given = [float(part) for part in minutes.split(",")]
    except ValueError:
        given = []
    if len(given) in {1, 2} and all(LEAST_MINUTES <= each < inf for each in given):
        return given[0], given[-1]
    raise UserError(f"--minutes {minutes}: say {LEAST_MINUTES:g} or more, for both domains or as in 30,10 for each")


def own(settings: Settings) -> Settings:
    """The settings with folders, ports and services of the benchmark's own; how to learn and to serve stays."""
    folder = Path(settings.stack.data_dir) / "bench" / "loop"
    serve = {"host": _LOOPBACK, "port": free_port(), "admin_token": SecretStr(secrets.token_urlsafe())}
    stack = {
        "data_dir": str(folder),
        **{f"{name}_port": free_port() for name in ("kafka", "kafka_controller", "mlflow")},
    }
    changed: dict[str, dict[str, object]] = {
        "kafka": {"bootstrap_servers": Kafka().bootstrap_servers, "client_options": {}},
        "tables": {"uri": str(folder / "tables"), "storage_options": {}},
        "serve": serve,
        "traces": {"claim_check_uri": str(folder / "claims"), "claim_check_options": {}},
        "stream": {"host": _LOOPBACK, "port": free_port(), "data_dir": str(folder / "stream")},
        "train": {"host": _LOOPBACK, "port": free_port(), "checkpoint_dir": str(folder / "train")},
        "promoter": {"host": _LOOPBACK, "port": free_port()},
        "stack": stack,
        "registry": {"tracking_uri": Registry().tracking_uri},
    }
    sections = {name: getattr(settings, name).model_copy(update=values) for name, values in changed.items()}
    return settings.model_copy(update=sections)
