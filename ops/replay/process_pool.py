"""Run long computations in parallel processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def run_in_processes(
    work: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    processes: int,
    initialize: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[tuple[Job, Outcome]]:
    """Yield every job with its result in order of completion.

    Running jobs end with the caller, also after Ctrl-C, an exception or SIGKILL.

    Args:
        work: Function that other processes can import.
        jobs: In start order.
        processes: Number of parallel processes.
        initialize: Called first in every process.
        arguments: Arguments of ``initialize``.

    Raises:
        BrokenProcessPool: a process was killed.
    """
    # A forked process would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _initialize, (initialize, arguments)) as pool:
        try:
            running = {pool.submit(work, job): job for job in jobs}
            yield from ((running[done], done.result()) for done in as_completed(running))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _initialize(initialize: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches all processes of a terminal: the parent handles it and ends the children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initialize:
        initialize(*arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a child only"
    parent.join()
    os._exit(1)
