"""Long computations side by side, in processes that end as soon as nobody waits for them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    processes: int,
    begin: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[tuple[Job, Result]]:
    """Every job with its result, as they come to be done.

    However the caller ends, by Ctrl-C, by an exception or killed, what is under way ends with it.

    Args:
        work: Done in another process; a function that can be imported there.
        jobs: In the order in which they are begun.
        processes: So many at a time.
        begin: Called first in every process.
        arguments: What it is called with.

    Raises:
        BrokenProcessPool: a process was killed.
    """
    # A forked process would inherit torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (begin, arguments)) as pool:
        try:
            running = {pool.submit(work, job): job for job in jobs}
            yield from ((running[done], done.result()) for done in as_completed(running))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches all processes of a terminal: the parent answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin:
        begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only called in a child"
    parent.join()
    os._exit(1)
