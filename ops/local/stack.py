"""The whole stack on one machine: ``aurora up`` and ``aurora down``."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from ops.local import demo_model
from ops.local.parts import Plan, check_ports, log_path, plan
from ops.local.supervisor import Supervisor
from schemas.errors import UserError
from schemas.settings import Settings, Target, load, to_environ

_STOP_S = 150.0
Say = Callable[[str], None]


class StackError(UserError):
    """The stack cannot be started or stopped as asked; the message says what to do."""


@dataclass(frozen=True)
class Running:
    """A stack that runs in some process, as its state file tells."""

    pid: int
    created: float
    """When the process began: a pid alone may have gone to another one."""
    ready: bool
    environ: dict[str, str]
    """Its settings: another shell may have started it with flags of its own."""
    parts: dict[str, str]


class Stack:
    """A started stack; made by ``running_stack``."""

    def __init__(self, planned: Plan, supervisor: Supervisor) -> None:
        self.settings = planned.settings
        self.supervisor = supervisor
        self._file = _state_file(planned.settings)
        self._written = ""

    def tick(self) -> None:
        """Look after the parts, and write down how they are. Raises what ``Supervisor.tick`` raises."""
        self.supervisor.tick()
        self.write_state()

    def start(self) -> None:
        """Start every part and wait until all are ready. Raises what ``Supervisor.start`` raises."""
        self.write_state()
        self.supervisor.start()
        self.write_state()

    def write_state(self) -> None:
        """Replace the state file when something changed."""
        state = json.dumps(
            {
                "pid": os.getpid(),
                "created": psutil.Process().create_time(),
                "ready": self.supervisor.ready,
                "environ": to_environ(self.settings),
                "parts": {name: str(watched.state) for name, watched in self.supervisor.watched.items()},
            }
        )
        if state == self._written:
            return
        fresh = self._file.with_suffix(".new")
        fresh.touch(mode=0o600)  # the settings may hold the password of a broker
        fresh.write_text(state)
        fresh.replace(self._file)
        self._written = state


@contextmanager
def running_stack(settings: Settings, say: Say, *, restart: bool = True) -> Iterator[Stack]:
    """The stack of these settings, not yet started; all of it has ended when the context is left.

    SIGTERM ends the context like Ctrl-C does.

    Raises:
        StackError: another stack runs in this folder, or there is no target to serve.
        PortInUseError: a port is taken.
        JarsError, ModelError: something to be fetched cannot be had.
    """
    folder = Path(settings.stack.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        provide_target(settings.target, say)
        planned = plan(settings)
        check_ports(planned.parts)
        for part in planned.parts:
            _put_aside(part.process.log)
        supervisor = Supervisor(planned.parts, say, restart=restart)
        stack = Stack(planned, supervisor)
        with _ended_by_sigterm():
            try:
                yield stack
            finally:
                # From here on nothing may cut the stop short and leave a part behind.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                supervisor.stop()
                _state_file(settings).unlink(missing_ok=True)


def up(settings: Settings, say: Say, show: Callable[[Stack], None]) -> None:
    """Start the stack and keep it running until SIGTERM or Ctrl-C; ``show`` is called twice a second.

    Raises what ``running_stack`` and ``Stack.start`` raise.
    """
    with running_stack(settings, say) as stack:
        stack.start()
        say("all is ready; Ctrl-C or `aurora down` stops everything")
        while True:
            stack.tick()
            show(stack)
            time.sleep(0.5)


def up_detached(settings: Settings, say: Say, timeout_s: float = 600) -> None:
    """Start the stack in a process of its own and return once all is ready.

    Raises:
        StackError: one runs already, or this one did not come up.
    """
    if running(settings):
        raise StackError(_already(Path(settings.stack.data_dir)))
    log = log_path(settings, "up").absolute()
    _put_aside(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "ops.cli.main", "up"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **to_environ(settings)},
            start_new_session=True,
        )
    say(f"starting; progress is in {log}")
    deadline = time.monotonic() + timeout_s
    while not ((state := running(settings)) and state.ready):
        if child.poll() is not None:
            raise StackError(f"the stack did not start: {_last_line(log)}")
        if time.monotonic() > deadline:
            child.terminate()
            raise StackError(f"the stack was not ready after {timeout_s:.0f} s and was stopped; read {log}")
        time.sleep(0.3)


def down(settings: Settings) -> bool:
    """Stop the stack of this folder and wait until it has ended; False when none runs.

    Raises:
        StackError: it did not end in time.
    """
    state = running(settings)
    if state is None:
        return False
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while _lives(state.pid, state.created):
        if time.monotonic() > deadline:
            raise StackError(f"process {state.pid} has not stopped after {_STOP_S:.0f} s; read the logs beside it")
        time.sleep(0.2)
    return True


def running(settings: Settings) -> Running | None:
    """The stack that runs in this folder, if the process of its state file is really the one that wrote it."""
    with suppress(OSError, ValueError, TypeError):
        state = Running(**json.loads(_state_file(settings).read_text()))
        if _lives(state.pid, state.created):
            return state
    return None


def settings_here(settings: Settings) -> Settings:
    """Those of the stack that runs in this folder, for it may have other flags; where none runs, the given ones."""
    state = running(settings)
    return load(environ=state.environ) if state else settings


def provide_target(target: Target, say: Say) -> None:
    """See that there is a model to serve; the default one is fetched.

    Raises:
        StackError: the folder of another model is missing.
        ModelError: the default model cannot be fetched.
    """
    folder = Path(target.path)
    if (folder / "config.json").exists():
        return
    if target.path != Target().path and target.served_model_name != demo_model.NAME:
        raise StackError(f"target.path: no model in {folder} (config.json is missing)")
    demo_model.ensure(folder, say)


def _lives(pid: int, created: float) -> bool:
    """Whether the process that began at ``created`` has not ended yet."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    return False


def _already(folder: Path) -> str:
    return f"a stack runs already in {folder}; `aurora status` shows it, `aurora down` stops it"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C inside; both are as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    with (folder / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(_already(folder)) from error
        yield


def _state_file(settings: Settings) -> Path:
    return Path(settings.stack.data_dir) / "up.json"


def _put_aside(log: Path) -> None:
    """Keep the log of the run before, so that the one to read holds this run alone."""
    with suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"read {log}"


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
