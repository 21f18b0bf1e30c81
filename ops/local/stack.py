"""Run the whole stack on one machine: ``aurora up`` and ``aurora down``."""

from __future__ import annotations

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
from filelock import FileLock, Timeout

from ops.local import demo_model
from ops.local.parts import StackPlan, check_ports, log_path, plan_stack
from ops.local.supervisor import Supervisor
from schemas.atomic_file import atomic_write
from schemas.errors import UserError
from schemas.settings import Settings, Target, load, to_environ

_STOP_S = 150.0
Say = Callable[[str], None]


class StackError(UserError):
    """The stack cannot start or stop; the message says what to do."""


@dataclass(frozen=True)
class StackState:
    """State file of a running stack."""

    pid: int
    created: float
    """Start time of the process: the pid alone may have been reused."""
    ready: bool
    environ: dict[str, str]
    """Settings of the stack, which another shell may have started with other flags."""
    parts: dict[str, str]


class Stack:
    """Stack of ``running_stack``."""

    def __init__(self, planned: StackPlan, supervisor: Supervisor) -> None:
        self.settings = planned.settings
        self.supervisor = supervisor
        self._file = _state_file(planned.settings)
        self._written = ""

    def tick(self) -> None:
        """Supervise the parts and write the state file. Raises what ``Supervisor.tick`` raises."""
        self.supervisor.tick()
        self.write_state()

    def start(self) -> None:
        """Start all parts and wait until they are ready. Raises what ``Supervisor.start`` raises."""
        self.write_state()
        self.supervisor.start()
        self.write_state()

    def write_state(self) -> None:
        """Replace the state file if the state has changed."""
        state = json.dumps(
            {
                "pid": os.getpid(),
                "created": psutil.Process().create_time(),
                "ready": self.supervisor.ready,
                "environ": to_environ(self.settings),
                "parts": {name: str(part.state) for name, part in self.supervisor.parts.items()},
            }
        )
        if state == self._written:
            return
        atomic_write(self._file, state, mode=0o600)  # the settings may contain the password of a broker
        self._written = state


@contextmanager
def running_stack(settings: Settings, say: Say, *, restart: bool = True) -> Iterator[Stack]:
    """Yield the stack of these settings before its start; stop all parts at the end of the context.

    SIGTERM ends the context like Ctrl-C.

    Raises:
        StackError: another stack runs in this folder, or the target is missing.
        PortInUseError: a port is in use.
        JarsError, ModelError: the jars or the demo model cannot be fetched.
    """
    folder = Path(settings.stack.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(folder):
        provide_target(settings.target, say)
        planned = plan_stack(settings)
        check_ports(planned.parts)
        for part in planned.parts:
            _rotate_log(part.process.log)
        supervisor = Supervisor(planned.parts, say, restart=restart)
        stack = Stack(planned, supervisor)
        with _sigterm_as_interrupt():
            try:
                yield stack
            finally:
                # A second signal must not interrupt the stop and leave a part running.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                supervisor.stop()
                _state_file(settings).unlink(missing_ok=True)


def up(settings: Settings, say: Say, show: Callable[[Stack], None]) -> None:
    """Start the stack and keep it running until SIGTERM or Ctrl-C; call ``show`` twice a second.

    Raises what ``running_stack`` and ``Stack.start`` raise.
    """
    with running_stack(settings, say) as stack:
        stack.start()
        say(f"the stack is ready; {page_address(settings)} shows it, Ctrl-C or `aurora down` stops it")
        while True:
            stack.tick()
            show(stack)
            time.sleep(0.5)


def page_address(settings: Settings) -> str:
    """Return the address of the loop's page on this machine."""
    return f"http://{settings.promoter.host}:{settings.promoter.port}/"


def up_detached(settings: Settings, say: Say, timeout_s: float = 600) -> None:
    """Start the stack in a separate process and return when all parts are ready.

    Raises:
        StackError: a stack already runs, or this one did not start.
    """
    if read_state(settings):
        raise StackError(_already_running(Path(settings.stack.data_dir)))
    log = log_path(settings, "up").absolute()
    _rotate_log(log)
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
    while not ((state := read_state(settings)) and state.ready):
        if child.poll() is not None:
            raise StackError(f"the stack did not start: {_last_line(log)}")
        if time.monotonic() > deadline:
            child.terminate()
            raise StackError(f"the stack was not ready after {timeout_s:.0f} s and was stopped; read {log}")
        time.sleep(0.3)


def down(settings: Settings) -> bool:
    """Stop the stack of this folder and wait for its end; return False if none runs.

    Raises:
        StackError: it did not stop in time.
    """
    state = read_state(settings)
    if state is None:
        return False
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while _is_alive(state.pid, state.created):
        if time.monotonic() > deadline:
            raise StackError(f"process {state.pid} has not stopped after {_STOP_S:.0f} s; read its logs")
        time.sleep(0.2)
    return True


def read_state(settings: Settings) -> StackState | None:
    """Return the state of the stack that runs in this folder; None if the process that wrote it has ended."""
    with suppress(OSError, ValueError, TypeError):
        state = StackState(**json.loads(_state_file(settings).read_text()))
        if _is_alive(state.pid, state.created):
            return state
    return None


def running_settings(settings: Settings) -> Settings:
    """Return the settings of the stack that runs in this folder, or the given ones if none runs."""
    state = read_state(settings)
    return load(environ=state.environ) if state else settings


def provide_target(target: Target, say: Say) -> None:
    """Check that the target exists; fetch the default one.

    Raises:
        StackError: the folder of a custom target is missing.
        ModelError: the default target cannot be fetched.
    """
    folder = Path(target.path)
    if (folder / "config.json").exists():
        return
    if target.path != Target().path and target.served_model_name != demo_model.NAME:
        raise StackError(f"target.path: no model in {folder} (config.json is missing)")
    demo_model.ensure(folder, say)


def _is_alive(pid: int, created: float) -> bool:
    """Return whether the process that started at ``created`` still runs."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    return False


def _already_running(folder: Path) -> str:
    return f"a stack already runs in {folder}; `aurora status` shows it, `aurora down` stops it"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C; restore the handlers of both afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "up.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StackError(_already_running(folder)) from error
    with lock:
        lock.release()
        yield


def _state_file(settings: Settings) -> Path:
    return Path(settings.stack.data_dir) / "up.json"


def _rotate_log(log: Path) -> None:
    """Move the log of the previous run, so that the current one holds one run."""
    with suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"read {log}"


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
