"""Makes the next step ready while the current one runs: reads tables, recomputes features, puts batches together.

All of it runs on one thread, which alone touches the feed and does one thing after the other: windows come in the order
in which the feed alone would give them. One step is made ready ahead and no more, so memory is bounded. Where the feed
stands is where it stood before that step was chosen: a restart chooses it again, and it is learned from once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from trainer.data.feed import Feed, FeedState, Mark
from trainer.data.samples import Window

Ready = TypeVar("Ready")
T = TypeVar("T")


class Ahead(Generic[Ready]):
    """A feed that runs one step ahead; its methods are called from one thread."""

    def __init__(self, feed: Feed, prepare: Callable[[list[Window]], Ready]) -> None:
        """Take over the feed.

        Args:
            feed: Nobody else calls it from now on.
            prepare: What a step learns from, of its windows.
        """
        self._feed = feed
        self._prepare = prepare
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._coming: Future[Ready | None] | None = None
        self._chosen_at: Mark | None = None

    @property
    def held_out(self) -> list[Window]:
        """The newest windows of requests that are not trained on, oldest first."""
        return self._ask(lambda: self._feed.held_out)

    @property
    def tables_read(self) -> dict[str, int]:
        """Version of each table up to which rows were read; those of a step that is to come may be among them."""
        return self._ask(lambda: self._feed.tables_read)

    @property
    def cursor(self) -> int:
        """Version of ``accepted`` up to which rows were read."""
        return self._feed.cursor

    @property
    def table_version(self) -> int:
        """Newest version of ``accepted``, when it was last looked at."""
        return self._feed.table_version

    @property
    def waiting(self) -> int:
        """New windows that were read and not chosen yet."""
        return self._feed.waiting

    @property
    def counts(self) -> dict[str, int]:
        """Rows and branches by what became of them."""
        return dict(self._feed.counts)

    def next(self) -> Ready | None:
        """What the next step learns from; None while there is nothing to learn from.

        Raises:
            TableError: the tables cannot be read; nothing was taken, and the next call tries again.
            FeedError: the tables are not those that the feed began with.
        """
        was_early = self._coming is not None
        ready = self._come()
        if ready is None and was_early:
            # What was not there when the last step began may be there at its end.
            ready = self._come()
        if ready is not None:
            self._coming = self._thread.submit(self._choose)
        return ready

    def state(self) -> FeedState:
        """Where the feed stands: before all that ``next`` has not given yet."""
        return self._mark().state()

    @property
    def passed(self) -> int:
        """Version of ``accepted`` whose windows, and all before, ``next`` has given or the feed holds back."""
        return self._mark().passed

    def _mark(self) -> Mark:
        if self._coming is None:
            return self._ask(self._feed.mark)
        self._coming.exception()
        return self._chosen_at or self._ask(self._feed.mark)

    def restore(self, state: FeedState) -> None:
        """Stand where a feed of the same tables stood.

        Raises:
            TableError: the tables cannot be read.
        """
        self._coming = None
        self._ask(lambda: self._feed.restore(state))

    def close(self) -> None:
        """End the thread, after what it does just now."""
        self._thread.shutdown(cancel_futures=True)

    def _come(self) -> Ready | None:
        coming, self._coming = self._coming or self._thread.submit(self._choose), None
        return coming.result()

    def _choose(self) -> Ready | None:
        self._chosen_at = None
        self._feed.poll()
        self._chosen_at = self._feed.mark()
        windows = self._feed.next()
        return self._prepare(windows) if windows else None

    def _ask(self, question: Callable[[], T]) -> T:
        return self._thread.submit(question).result()
