"""Events for a program that looks at them itself: a live view, a progress bar, a test.

A subscription is fed like a courier, from the dispatcher's thread, into a bounded queue. A reader
that is slow, or does not read at all, slows nobody: what does not fit is coalesced or dropped, and
counted. A subscription has no thread; its reader brings one. Only with ``back_pressure`` does a
command wait for the reader, as it waits for a sink.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter

from ..model.clock import monotonic
from ..model.errors import ShutdownError
from ..model.failure import describe_failure
from ..model.health import SinkHealth
from ..model.records import Batch, TaskState
from ..model.reports import report
from ..model.threads import own_thread
from .backlog import Backlog, Chunk
from .patience import Patience

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from ..model.events import Event
    from ..model.records import Record

MAX_BYTES = 64 * 1024 * 1024
"""Most memory that waiting stream events take, as estimated: text plus 256 bytes an event."""


class Subscription:
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
        self.name = name
        self._state = state
        self._kinds = kinds
        self._patience = Patience() if back_pressure else None  # the dispatcher's thread alone asks
        self._detach = detach
        self._lock = threading.RLock()  # guards all below; re-entrant as a courier's
        self._news = threading.Condition(self._lock)
        self._backlog = Backlog(maxsize, MAX_BYTES)
        self._emitted = self._delivered = self._coalesced = 0
        self._dropped: Counter[str] = Counter()
        self._is_closed = False
        self._thread: threading.Thread | None = None

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
        with self._lock:
            while not len(self._backlog) and not self._is_closed:
                left = None if until is None else until - monotonic()
                if left is not None and left <= 0:
                    break
                self._news.wait(left)
            records = self._backlog.take(len(self._backlog) if most is None else most)
            self._delivered += len(records)
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

    @property
    def is_closed(self) -> bool:
        """True when nothing more will come; what waits can still be read."""
        return self._is_closed

    def health(self) -> SinkHealth:
        """Return the account: ``emitted == delivered + coalesced + dropped + pending``, where
        delivered means read."""
        with self._lock:
            return SinkHealth(
                emitted=self._emitted,
                delivered=self._delivered,
                coalesced=self._coalesced,
                dropped=sum(self._dropped.values()),
                pending=len(self._backlog),
                dropped_by_reason={reason: n for reason, n in self._dropped.items() if n},
                state="closed" if self._is_closed else "ok",
            )

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
        state = self._state
        if state is None:
            return
        records = list(state.tail or ())
        if state.ended:
            records.append((state, state.seq, state.ended, state.completed_ns, None))
        self.put(Chunk.of(records))

    def put(self, chunk: Chunk) -> None:
        """Queue what it is to get of these records."""
        if self._is_closed:
            return
        if self._state is not None or self._kinds is not None:
            chunk = Chunk.of(record for record in chunk.records if self._wants(record))
        with self._lock:
            if self._is_closed:
                return
            self._emitted += len(chunk.records)
            coalesced, dropped = self._backlog.extend(chunk)
            self._coalesced += len(coalesced)
            self._dropped["overflow"] += len(dropped)
            if self._state is not None and self._state.ended:
                # nothing follows a terminal event, which `types` may have filtered out
                self._is_closed = True
            self._news.notify_all()

    def _wants(self, record: Record) -> bool:
        return (self._state is None or record[0] is self._state) and (
            self._kinds is None or record[2] in self._kinds
        )

    @property
    def has_ended(self) -> bool:
        """True when there is nothing more to do for it: it is closed, and its callback, if it has
        one, has had all."""
        return self._is_closed and (self._thread is None or not self._thread.is_alive())

    @property
    def is_crowded(self) -> bool:
        """True when a command should wait. The dispatcher's thread; see `Courier.is_crowded`."""
        return self._patience is not None and self._patience.is_due(
            self._backlog.fill, self._delivered, monotonic())

    @property
    def most_waiting(self) -> int:
        """As `Courier.most_waiting`; more than anything where nobody waits for the reader."""
        return sys.maxsize if self._patience is None else self._backlog.most_waiting

    @property
    def is_this_thread(self) -> bool:
        """True when the caller is the callback."""
        return self._thread is threading.current_thread()

    @property
    def room(self) -> int:
        """Bytes that the queue has room for."""
        return self._backlog.room

    def refuse(self, kind: int, reason: str, count: int) -> None:
        """Count events that never got a number. Whose they were is not known: one task's
        subscription cannot count them."""
        if self._state is None and (self._kinds is None or kind in self._kinds):
            with self._lock:
                self._emitted += count
                self._dropped[reason] += count

    def end_in_child(self) -> None:
        """In a forked child: be closed. The lock may be held by a thread that is not here."""
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._is_closed = True

    def end(self) -> None:
        """Wake the readers: there will be no more."""
        with self._lock:
            self._is_closed = True
            self._news.notify_all()
