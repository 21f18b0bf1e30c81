"""``aurora top`` in a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from answering import answering, status_of_node


def test_top_draws_a_screen_and_ends_on_ctrl_c(tmp_path: Path, free_port: Callable[[], int]) -> None:
    ports = [f"{name}.port={free_port()}" for name in ("stream", "train", "promoter")]
    with answering(200, status_of_node("a-target", "a-line").encode()) as uri:
        flags = [f"serve.port={uri.rpartition(':')[2]}", f"stack.data_dir={tmp_path}", *ports]
        screen, code = drawn([part for flag in flags for part in ("--set", flag)], until="node node-0")
    assert "node node-0" in screen
    assert "silent" in screen
    assert code == 130


def drawn(flags: list[str], until: str, timeout_s: float = 30) -> tuple[str, int]:
    """Return the terminal output up to a text, and the exit code after Ctrl-C."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}
    command = [sys.executable, "-m", "ops.cli.main", "top", "--every", "0.3", *flags]
    running = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True)
    os.close(theirs)
    sent, deadline = "", time.monotonic() + timeout_s
    while until not in sent:
        assert time.monotonic() < deadline, sent
        if select.select([ours], [], [], 0.2)[0]:
            sent += os.read(ours, 65536).decode(errors="replace")
    running.send_signal(signal.SIGINT)
    try:
        return sent, running.wait(20)
    finally:
        os.close(ours)
