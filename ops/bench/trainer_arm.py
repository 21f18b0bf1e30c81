"""Trainers that run in processes of their own, each with the Python that it is installed in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ops.bench import trainer_worker
from ops.bench.trainer_worker import Done
from schemas.errors import UserError

OURS = "ours"
_ENDS_WITHIN_S = 30.0


class Arm:
    """A worker: it holds still until it is asked for steps, so that trials can alternate."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        # Compiling costs a minute for each shape on a CPU, which a short comparison would be about.
        quiet = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": "1"}
        self._name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **quiet},
        )
        self.about = self._answer()
        """Version and torch, or why it is ``absent``."""

    def warm(self, case: str, ttt_steps: int) -> Done:
        """Let it find its fastest way for this case."""
        return self._done(case, ttt_steps, 0)

    def steps(self, case: str, ttt_steps: int, number: int) -> Done:
        """So many training steps."""
        return self._done(case, ttt_steps, number)

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _done(self, case: str, ttt_steps: int, number: int) -> Done:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"case": case, "ttt_steps": ttt_steps, "number": number}) + "\n")
        self._process.stdin.flush()
        return Done(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._name} failed with code {self._process.wait()}: run its worker by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def started(
    stack: ExitStack, peers: Sequence[str], environment: Path, data: Path, threads: int, types: Sequence[str]
) -> tuple[dict[str, Arm], dict[str, str]]:
    """Our trainer and every peer that is installed, and why the others are not among them.

    Raises:
        UserError: a trainer failed.
    """
    how = [str(data), str(threads), ",".join(types)]
    ours = [sys.executable, "-m", "ops.bench.trainer_ours", *how]
    arms, absent = {OURS: Arm(OURS, ours, threads)}, {}
    stack.callback(arms[OURS].stop)
    python = environment / "bin" / "python"
    for peer in peers:
        if not python.exists():
            absent[peer] = f"no environment in {environment}; `make trainer-peers` builds it"
            continue
        arm = Arm(peer, [str(python), "-P", trainer_worker.__file__, peer, *how], threads)
        stack.callback(arm.stop)
        if "absent" in arm.about:
            absent[peer] = arm.about["absent"]
        else:
            arms[peer] = arm
    return arms, absent
