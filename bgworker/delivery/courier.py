"""One sink's queue, thread and account.

Guarantees. Every call into the sink comes from this courier's one thread. Whatever the sink does, `put` returns at once,
`close` by its deadline, and at every quiet moment ``emitted == delivered + coalesced + dropped + parked + pending``:
each step of an event from one of these to another happens under the courier's lock, which is never held while the sink runs.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from time import monotonic, time_ns

from ..errors import PermanentSinkError, SinkError, TemporarySinkError
from ..events import EventType
from ..records import LOST, TYPES, Batch
from .backlog import MARK, Backlog, Chunk
from .options import SinkHealth

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Iterable, Iterator, Sequence

    from ..records import Record
    from ..sinks.base import Sink
    from .options import SinkOptions

DEFAULT_BATCH = 500
CROWDED = 0.5
"""A queue fuller than this asks those who can wait to wait."""

logger = logging.getLogger(__name__.partition(".")[0])


class Mark:
    """A place in a courier's queue that somebody waits for. Set once, by the courier's thread or by who gives up."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reached = False

    def settle(self, reached: bool) -> None:
        """Wake the waiter; ``reached`` tells whether all before the place is settled and the sink has flushed."""
        if not self._event.is_set():
            self.reached = reached
            self._event.set()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the place; True when it was reached."""
        self._event.wait(timeout)
        return self.reached


class Courier:
    """Carries events to one sink.

    Args:
        name: of the sink, as registered.
        sink: opened, written to and closed on the courier's thread.
        options: bounds and policies.
        thread_name: of the thread.
    """

    def __init__(self, name: str, sink: Sink, options: SinkOptions, thread_name: str) -> None:
        self.name = name
        self._sink = sink
        self._options = options
        self._batch_size = options.batch_size or getattr(sink, "preferred_batch", None) or DEFAULT_BATCH
        self._kinds = None if options.types is None else frozenset(
            kind for kind, type_ in enumerate(TYPES) if type_ in options.types)
        self._lock = threading.Lock()  # guards all below
        self._news = threading.Condition(self._lock)  # the thread waits on it: records, a mark, the close
        self._backlog = Backlog(options.queue_size, options.queue_bytes, options.overflow == "drop_oldest")
        self._in_flight: Sequence[Record] = ()
        self._emitted = self._delivered = self._coalesced = self._parked = self._retries = 0
        self._dropped: Counter[str] = Counter()
        self._losses: dict[str, Counter[str]] = {}  # reason -> type -> count, not yet announced to the sink
        self._state = "ok"
        self._last_error: str | None = None
        self._is_idle = False
        self._closing = False
        self._abandoned = False
        self._opened = Mark()
        self._open_error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=thread_name, daemon=True)

    # -- any thread --

    def start(self, timeout: float) -> None:
        """Start the thread and wait up to ``timeout`` seconds for the sink to open.

        Raises:
            SinkError: the sink refused to open for good; it is of no use.
        """
        self._thread.start()
        self._opened.wait(timeout)
        if self._open_error is not None:
            error = self._open_error
            if isinstance(error, SinkError):
                raise error
            raise SinkError(f"sink {self.name!r} does not open: {_describe(error)}") from error

    def health(self) -> SinkHealth:
        """Return the account and the condition of the sink at this moment."""
        with self._lock:
            oldest = self._in_flight[0][3] if self._in_flight else self._backlog.oldest_ns
            return SinkHealth(
                emitted=self._emitted, delivered=self._delivered, coalesced=self._coalesced,
                dropped=sum(self._dropped.values()), parked=self._parked,
                pending=len(self._backlog) + len(self._in_flight), dropped_by_reason=dict(self._dropped),
                state=self._state,  # type: ignore[arg-type]
                lag=max(0.0, (time_ns() - oldest) / 1e9) if oldest is not None else 0.0,
                retries=self._retries, last_error=self._last_error)

    @property
    def is_open(self) -> bool:
        """True until the sink is closed or given up."""
        return self._state != "closed"

    @property
    def is_crowded(self) -> bool:
        """True when a sink that works has its queue more than half full: who can wait for it should."""
        return self._state == "ok" and self._backlog.fill > CROWDED

    def close(self) -> None:
        """Let the thread deliver what waits, close the sink and end. Returns at once."""
        with self._lock:
            self._closing = True
            self._news.notify()

    def join(self, deadline: float) -> bool:
        """Wait for the thread's end until ``deadline`` (monotonic). Past it, what still waits is dropped and counted,
        the sink is left to itself, and False comes back."""
        self._thread.join(max(0.0, deadline - monotonic()))
        if not self._thread.is_alive():
            return True
        with self._lock:
            self._abandoned = True
            left = [*self._in_flight, *self._backlog.clear()]
            self._in_flight = ()
            self._drop(left, "closed")
            self._state = "closed"
            self._news.notify()
        lost = sum(record[2] != MARK for record in left)
        logger.error("sink %r did not finish in time; its thread %s is left behind and %d events are lost",
                     self.name, self._thread.name, lost)
        return False

    # -- the dispatcher's thread --

    def put(self, chunk: Chunk) -> None:
        """Queue numbered records; what does not fit is coalesced or dropped, and counted."""
        if self._kinds is not None:
            chunk = Chunk.of(record for record in chunk.records if record[2] in self._kinds)
            if not chunk.records:
                return
        with self._lock:
            self._emitted += len(chunk.records)
            if self._abandoned or self._state == "closed":
                self._drop(chunk.records, "closed")
                return
            coalesced, dropped = self._backlog.extend(chunk)
            self._coalesced += len(coalesced)
            if dropped:
                self._drop(dropped, "overflow")
            if self._is_idle:
                self._news.notify()

    def refuse(self, kind: int, reason: str, count: int) -> None:
        """Count events that never got a number, because the intake was full or the event too large."""
        if self._kinds is None or kind in self._kinds:
            with self._lock:
                self._emitted += count
                self._dropped[reason] += count
                self._losses.setdefault(reason, Counter())[TYPES[kind].value] += count
                self._news.notify()

    def mark(self) -> Mark:
        """Return a mark that is settled once all that was put before is settled and the sink has flushed."""
        mark = Mark()
        with self._lock:
            if self._abandoned or self._state == "closed":
                mark.settle(False)
            else:
                self._backlog.mark((None, 0, MARK, time_ns(), mark))
                self._news.notify()
        return mark

    # -- the courier's thread --

    def _run(self) -> None:
        try:
            if self._open():
                while (batch := self._next_batch()) is not None:
                    for part in _parts(batch):
                        if isinstance(part, Mark):
                            self._flush(part)
                        else:
                            self._settle(part)
                    if not batch and (error := self._announce()):
                        self._trouble(error)
                self._call_logged("close", self._sink.close)
        finally:
            with self._lock:
                self._drop([*self._in_flight, *self._backlog.clear()], "failed")
                self._in_flight = ()
                self._state = "closed"
            self._opened.settle(False)
            if self._loop is not None:
                self._loop.close()

    def _open(self) -> bool:
        try:
            opener = getattr(self._sink, "open", None)
            if opener is not None:
                self._await(opener())
        except TemporarySinkError as error:
            self._trouble(error)
        except BaseException as error:  # a third party's code on our thread: reported to who registered it
            self._open_error = error
            return False
        self._opened.settle(True)
        return True

    def _next_batch(self) -> list[Record] | None:
        """Wait for records and take a batch; an empty one is a loss to announce, None the end."""
        with self._lock:
            self._in_flight = ()
            while not self._abandoned and not len(self._backlog) and not self._backlog.has_marks:
                if self._losses and self._state == "ok":
                    return []
                if self._closing:
                    return None
                self._wait(None)
            self._linger()
            if self._abandoned:
                return None
            batch = self._backlog.take(self._batch_size)
            self._in_flight = [record for record in batch if record[2] != MARK]
            return batch

    def _linger(self) -> None:
        """Wait for a full batch as long as the options say, unless somebody waits for us."""
        until = monotonic() + self._options.linger
        while len(self._backlog) < self._batch_size and not (self._closing or self._abandoned
                                                              or self._backlog.has_marks):
            if (left := until - monotonic()) <= 0:
                return
            self._wait(left)

    def _wait(self, timeout: float | None) -> None:
        self._is_idle = True
        self._news.wait(timeout)
        self._is_idle = False

    def _settle(self, records: Sequence[Record]) -> None:
        """Deliver records, or account for them otherwise."""
        error = self._announce() or self._write(records)
        with self._lock:
            if self._abandoned:
                return  # who abandoned us has settled the account
            self._in_flight = self._in_flight[len(records):]
            if error is None:
                self._delivered += len(records)
            else:
                self._drop(records, "failed")
        if error is None:
            self._recovered()
        else:
            self._trouble(error, lost=len(records))

    def _announce(self) -> BaseException | None:
        """Tell the sink what it did not get; return the error if it does not take it."""
        if not self._losses or self._kinds is not None and LOST not in self._kinds:
            return None
        with self._lock:
            losses, self._losses = self._losses, {}
        now = time_ns()
        error = self._write([(None, 0, LOST, now, (self.name, reason, sum(by_type.values()), dict(by_type)))
                             for reason, by_type in losses.items()])
        if error is not None:
            with self._lock:
                for reason, by_type in losses.items():
                    self._losses.setdefault(reason, Counter()).update(by_type)
        return error

    def _write(self, records: Sequence[Record]) -> BaseException | None:
        try:
            self._await(self._sink.write(Batch(records)))
        except BaseException as error:  # a third party's code on our thread: delivery decides
            return error
        return None

    def _flush(self, mark: Mark) -> None:
        flush = getattr(self._sink, "flush", None)
        mark.settle(flush is None or self._call_logged("flush", flush))

    def _call_logged(self, what: str, function: object) -> bool:
        try:
            self._await(function())  # type: ignore[operator]
        except BaseException as error:  # as in _write
            self._trouble(error)
            logger.error("sink %r failed to %s: %s", self.name, what, _describe(error))
            return False
        return True

    def _await(self, result: Awaitable[None] | None) -> None:
        """Run what an async sink returned on an event loop of this thread."""
        if result is None:
            return
        import asyncio

        async def finish() -> None:
            await result

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(finish())

    def _drop(self, records: Iterable[Record], reason: str) -> None:
        """Count records as dropped, to be announced; under the lock."""
        by_type: Counter[str] = Counter()
        for record in records:
            if record[2] == MARK:
                record[4].settle(False)
            else:
                by_type[TYPES[record[2]].value] += 1
        if by_type:
            self._dropped[reason] += sum(by_type.values())
            self._losses.setdefault(reason, Counter()).update(by_type)

    def _trouble(self, error: BaseException, lost: int = 0) -> None:
        first = self._state == "ok"
        self._last_error = _describe(error)
        self._state = "retrying"
        if lost or first:
            logger.warning("sink %r failed: %s (%d events lost)", self.name, self._last_error, lost)

    def _recovered(self) -> None:
        if self._state != "ok":
            self._state = "ok"
            logger.warning("sink %r works again", self.name)


def _parts(batch: Sequence[Record]) -> Iterator[list[Record] | Mark]:
    """Split a batch at its marks."""
    part: list[Record] = []
    for record in batch:
        if record[2] != MARK:
            part.append(record)
            continue
        if part:
            yield part
            part = []
        yield record[4]
    if part:
        yield part


def _describe(error: BaseException) -> str:
    """Return the exception's type and text on one line, however odd."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text cannot be had)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
