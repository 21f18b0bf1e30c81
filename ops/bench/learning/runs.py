"""Trials, each one run once: what came of it is kept under the hash of all that it depends on but the code."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ops.bench.learning import prequential, traffic
from ops.bench.learning.prequential import Learned
from ops.bench.learning.traffic import Traffic
from ops.bench.learning.variants import Trial, values_of
from ops.replay.worker_processes import side_by_side
from schemas.settings import Settings
from trainer.replay.learning_curve import final, length

Say = Callable[[str], None]


def folder_of(settings: Settings) -> Path:
    """Where runs are kept."""
    return Path(settings.stack.data_dir) / "bench" / "learning"


def file_of(settings: Settings, trial: Trial, digest: str) -> Path:
    """Where the run of a trial over the traffic of that digest is kept."""
    variant = trial.variant
    depends_on = {
        "settings": values_of(settings, variant),
        "lookahead": variant.lookahead,
        "branch_nodes": variant.branch_nodes,
        "order": trial.order,
        "seed": trial.seed,
        "traffic": digest,
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    return folder_of(settings) / f"{key}.json"


def run(
    settings: Settings, trials: Sequence[Trial], tokens: int | None, processes: int, say: Say
) -> tuple[Traffic, dict[Trial, Learned]]:
    """What came of every trial; those that were run before are only read.

    Args:
        settings: Name the target, the recordings, and what variants do not change.
        trials: In the order in which they are begun.
        tokens: The first so many of the recorded traffic; all where None.
        processes: So many run at a time.
        say: Told before and after each run.

    Raises:
        UserError: no traffic is recorded, or from another target.
    """
    read = traffic.read(settings, tokens)
    files = {trial: file_of(settings, trial, read.digest) for trial in trials}
    # Variants that come to the same are run once.
    missing = list({file: trial for trial, file in files.items() if not file.exists()}.values())
    say(f"{len(read.asked)} requests, {read.tokens} tokens of traffic; {len(missing)} of {len(trials)} runs are new")
    began = time.monotonic()
    for number, (trial, learned) in enumerate(_each(settings, missing, read, tokens, processes), start=1):
        _write(files[trial], learned)
        say(
            f"{number} of {len(missing)}, {time.monotonic() - began:.0f} s: {learned.name}, {learned.order}, "
            f"seed {learned.seed}: accepted tokens per step {length(learned.points):.3f} over all, "
            f"{final(learned.points):.3f} at the end"
        )
    return read, {trial: Learned.model_validate_json(file.read_text()) for trial, file in files.items()}


def _each(
    settings: Settings, missing: Sequence[Trial], read: Traffic, tokens: int | None, processes: int
) -> Iterator[tuple[Trial, Learned]]:
    if processes == 1 or len(missing) < 2:
        yield from ((trial, prequential.learn(settings, read, trial)) for trial in missing)
        return
    yield from side_by_side(_Worker.learn, missing, processes, _Worker.begin, (settings, tokens))


class _Worker:
    """A process that reads the traffic once and runs one trial after the other."""

    settings: Settings
    read: Traffic

    @classmethod
    def begin(cls, settings: Settings, tokens: int | None) -> None:
        cls.settings, cls.read = settings, traffic.read(settings, tokens)

    @classmethod
    def learn(cls, trial: Trial) -> Learned:
        return prequential.learn(cls.settings, cls.read, trial)


def _write(file: Path, learned: Learned) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(learned.model_dump_json() + "\n")
    unfinished.replace(file)
