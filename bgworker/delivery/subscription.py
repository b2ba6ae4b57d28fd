"""Events for a program that looks at them itself: a live view, a progress bar, a test.

A subscription is fed like a courier, from the dispatcher's thread, into a bounded queue. A reader
that is slow, or does not read at all, slows nobody: what does not fit is coalesced or dropped, and
counted. A subscription has no thread; its reader brings one. Only with ``back_pressure`` does a
command wait for the reader, as it waits for a sink.
"""

from __future__ import annotations

import logging
import threading

from ..model.clock import monotonic
from ..model.errors import ShutdownError
from ..model.failure import describe_failure
from ..model.latch import News
from ..model.records import Batch, TaskState
from ..model.reports import report
from ..model.threads import own_thread
from .backlog import Backlog, Chunk
from .consumer import Consumer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from ..model.events import Event

MAX_BYTES = 64 * 1024 * 1024
"""Most memory that waiting stream events take, as estimated: text plus 256 bytes an event."""


class Subscription(Consumer):
    """The events from now on, or those of one task: an iterator, a context manager, and something
    to poll.

    Iterating waits for the next event. It ends with the terminal event when the subscription is
    bound to one task, else when the subscription is closed or the scheduler shut down. Any number
    of threads may read; each event goes to one of them.

    Args:
        name: for the account.
        state: the task that it is bound to; None for all.
        kinds: the kinds of records that it gets; None for all.
        maxsize: most stream events that wait; as many life-cycle events have room of their own.
        back_pressure: whether a command waits for the reader, as it waits for a sink that works.
        detach: takes it off the dispatcher.
    """

    def __init__(
        self,
        name: str,
        state: TaskState | None,
        kinds: frozenset[int] | None,
        maxsize: int,
        back_pressure: bool,
        detach: Callable[[Subscription], object],
    ) -> None:
        super().__init__(name, kinds, Backlog(maxsize, MAX_BYTES), back_pressure)
        self._news = News()  # guarded by the lock
        self._task = state
        self._detach = detach

    # -- the reader's side --

    def poll(self, most: int | None = None) -> list[Event]:
        """Return the events that wait, the oldest first, without waiting; for the timer of a user
        interface.

        Args:
            most: most events to return; None is all.
        """
        return list(self.batch(most, 0.0))

    def batch(self, most: int | None = None, timeout: float | None = None) -> Batch:
        """As `poll`, in the form that sinks get: an event is built when it is looked at. Waits for
        the first one.

        Args:
            timeout: seconds to wait; None waits until there is one, or there will be no more.
        """
        until = None if timeout is None else monotonic() + timeout
        while True:
            left = None if until is None else until - monotonic()
            with self._lock:
                if len(self._backlog) or self.is_closed or left is not None and left <= 0:
                    records = self._backlog.take(len(self._backlog) if most is None else most)
                    self._delivered += len(records)
                    break
                following = self._news.following
            following.wait(left)
        return Batch(records)

    def get(self, timeout: float | None = None) -> Event | None:
        """Wait for the next event; None when ``timeout`` seconds passed, or when there will be no
        more."""
        batch = self.batch(1, timeout)
        return batch[0] if batch else None

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        following = self.get()
        if following is None:
            raise StopIteration
        return following

    def close(self) -> None:
        """Take no more events. What was emitted before the call can still be read."""
        self._detach(self)
        self.end()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    # -- the callback form --

    def call(self, callback: Callable[[Event], object]) -> None:
        """Start a thread that calls ``callback`` with each event until there are no more. An
        exception is logged, and the next event follows.

        Raises:
            ShutdownError: no thread can be started.
        """
        thread = own_thread(self.name, self._run, callback)
        try:
            thread.start()
        except RuntimeError as error:
            raise ShutdownError(
                f"no thread can be started for the callback ({error}); "
                "read the subscription instead"
            ) from error
        self._thread = thread

    def _run(self, callback: Callable[[Event], object]) -> None:
        for each in self:
            try:
                callback(each)
            except BaseException as error:
                # a third party's code on our thread; asyncio's CancelledError is no Exception
                report(
                    logging.ERROR,
                    "the callback of %s failed on %s\n%s",
                    self.name,
                    each.type.value,
                    describe_failure(error, 8192)[2] or "",
                )

    def join(self, deadline: float) -> bool:
        """Wait until ``deadline`` (monotonic) for the callback to have had all; False if it has
        not."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(max(0.0, deadline - monotonic()))
        return not thread.is_alive()

    # -- the dispatcher's thread --

    def begin(self) -> None:
        """For a task that has begun already: start with what is still in memory of it, and with its
        end if it has ended."""
        state = self._task
        if state is None:
            return
        records = list(state.tail or ())
        if state.ended:
            records.append((state, state.seq, state.ended, state.completed_ns, None))
        self.put(Chunk.of(records))

    def put(self, chunk: Chunk) -> None:
        """As of every consumer; nothing follows the end of the one task, which `types` may have
        filtered out."""
        super().put(chunk)
        if self._task is not None and self._task.ended:
            self.end()

    def _wanted(self, chunk: Chunk) -> Chunk:
        if self._task is not None:
            chunk = Chunk.of([record for record in chunk.records if record[0] is self._task])
        return super()._wanted(chunk)

    def refuse(self, kind: int, reason: str, count: int) -> None:
        """Count events that never got a number. Whose they were is not known: one task's
        subscription cannot count them."""
        if self._task is None:
            super().refuse(kind, reason, count)

    @property
    def has_ended(self) -> bool:  # type: ignore[override]
        """True when there is nothing more to do for it: it is closed, and its callback, if it has
        one, has had all."""
        return self.is_closed and (self._thread is None or not self._thread.is_alive())

    def end_in_child(self) -> None:
        """In a forked child: be closed. The lock may be held by a thread that is not here."""
        self._lock = threading.RLock()
        self._news = News()
        self._state = "closed"

    def end(self) -> None:
        """Wake the readers: there will be no more."""
        with self._lock:
            self._state = "closed"
            self._wake()

    def _wake(self) -> None:
        self._news.tell()
