"""One sink's queue, thread and account.

Guarantees. Every call into the sink comes from this courier's one thread. Whatever the sink does, `put` returns at once,
`close` by its deadline, and at every quiet moment ``emitted == delivered + coalesced + dropped + parked + pending``:
each step of an event from one of these to another happens under the courier's lock, which is never held while the sink runs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from time import time_ns

from ..model.checks import number
from ..model.clock import monotonic
from ..model.errors import MissingPart, PermanentSinkError, SinkError, TemporarySinkError
from ..model.records import LOST, TYPES, Batch
from ..model.text import describe
from ..model.threads import own_thread
from .backlog import MARK, Backlog, Chunk
from .intake import MOST_TAKEN
from .loop import SinkLoop
from .options import SinkHealth, kinds_of
from .patience import Patience
from .retry import Breaker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence

    from ..model.records import Record
    from ..park.park import Park
    from ..sinks.base import Sink
    from .options import SinkOptions

DEFAULT_BATCH = 500
CROWDED = 0.25
"""A queue fuller than this asks those who can wait to wait. The rest is for what is under way: an eighth of a queue in
the intake, another in the dispatcher's hands, and what each reader emits before it looks again."""

REPORT_INTERVAL = 60.0
"""Seconds between two log lines about events of one sink that did not fit; the first and the last come at once."""

logger = logging.getLogger(__name__.partition(".")[0])


class Mark:
    """A place in a courier's queue that somebody waits for. Set once, by the courier's thread or by who gives up."""

    def __init__(self, left: int = 0) -> None:
        self._event = threading.Event()
        self.left = left
        """Events before the place that are neither with the sink nor given up, as last counted."""
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
        self._batch_size = options.batch_size or number(
            "preferred_batch", getattr(sink, "preferred_batch", None), least=1, whole=True, optional=True) or DEFAULT_BATCH
        self._kinds = None if options.types is None else kinds_of(options.types)
        self._announces = self._kinds is None or LOST in self._kinds
        self._breaker = Breaker(options.retry)  # the courier's thread alone decides
        self._patience = Patience()  # the dispatcher's thread alone asks
        self._park = None if options.park is None else _new_park(options, name, self._count_parked)
        self._lock = threading.Lock()  # guards all below
        self._news = threading.Condition(self._lock)  # the thread waits on it: records, a mark, the close
        self._backlog = Backlog(options.queue_size, options.queue_bytes, options.overflow == "drop_oldest")
        self._in_flight: Sequence[Record] = ()
        self._marks_in_flight: Sequence[Record] = ()
        self._emitted = self._delivered = self._coalesced = self._parked = self._retries = 0
        self._parking = 0  # given to the park, which has not answered yet
        self._dropped: Counter[str] = Counter()
        self._losses: dict[str, Counter[str]] = {}  # reason -> type -> count, not yet announced to the sink
        self._announcing: tuple[dict[str, Counter[str]], list[Record]] = {}, []  # losses that it was not told, and how
        self._announces_alone = True  # False: losses wait until events are tried, and are tried with them
        self._unreported: Counter[str] = Counter()  # reason -> count of what was lost unsaid, not yet in the log
        self._next_report = 0.0
        self._state = "ok"
        self._last_error: str | None = None
        self._is_idle = False
        self._closing = False
        self._last_call = False  # closing, and the attempt that a failing sink still gets was announced
        self._end: PermanentSinkError | None = None  # why the sink takes nothing any more
        self._abandoned = False
        self._is_awaited = False  # somebody waits in `start` and is told of an open that fails
        self._opened = Mark()
        self._open_error: BaseException | None = None
        self._loop = SinkLoop()
        self._thread = own_thread(thread_name, self._run)

    # -- any thread --

    def start(self, timeout: float) -> None:
        """Start the thread and wait up to ``timeout`` seconds for the sink to open.

        Raises:
            SinkError: the sink refused to open for good; it is of no use.
        """
        if self._park is not None:
            try:
                self._park.open()
            except OSError as error:
                raise SinkError(f"the park file of sink {self.name!r} cannot be used: {describe(error)}") from error
        self._is_awaited = True
        self._thread.start()
        self._opened.wait(timeout)
        with self._lock:
            refusal = self._open_error
            self._is_awaited = False
        if refusal is not None:
            if isinstance(refusal, SinkError):
                raise refusal
            raise SinkError(f"sink {self.name!r} does not open: {describe(refusal)}") from refusal

    def twin(self) -> Courier:
        """Return a courier to the same sink with an empty queue and account: a forked child's own."""
        return Courier(self.name, self._sink, self._options, self._thread.name)

    def start_inherited(self) -> None:
        """Start in a forked child, which nobody asked: an error of ``open`` is for the log."""
        self._thread.start()

    def health(self) -> SinkHealth:
        """Return the account and the condition of the sink at this moment."""
        with self._lock:
            oldest = self._in_flight[0][3] if self._in_flight else self._backlog.oldest_ns
            return SinkHealth(
                emitted=self._emitted, delivered=self._delivered, coalesced=self._coalesced,
                dropped=sum(self._dropped.values()), parked=self._parked,
                pending=self._pending(), dropped_by_reason=dict(self._dropped),
                state=self._state,  # type: ignore[arg-type]
                lag=max(0.0, (time_ns() - oldest) / 1e9) if oldest is not None else 0.0,
                retries=self._retries, last_error=self._last_error)

    def _pending(self) -> int:
        """Count what waits, is being written or is on its way to the park file; under the lock."""
        return len(self._backlog) + len(self._in_flight) + self._parking

    @property
    def is_open(self) -> bool:
        """True until the sink is closed or given up."""
        return self._state != "closed"

    @property
    def is_this_thread(self) -> bool:
        """True when the caller is the sink itself."""
        return self._thread is threading.current_thread()

    @property
    def queue_size(self) -> int:
        """The bound of the queue, by count."""
        return self._options.queue_size

    @property
    def queue_bytes(self) -> int:
        """The bound of the queue, by memory."""
        return self._options.queue_bytes

    @property
    def has_ended(self) -> bool:
        """False: also what comes after its close is counted."""
        return False

    @property
    def is_crowded(self) -> bool:
        """True when the queue of a healthy sink is getting full: who can wait for it should. The dispatcher's thread.

        Healthy is a sink whose latest ``write`` did not fail and that has not used up the `Patience` with it: one that
        hangs, or takes next to nothing, is waited for some seconds and then no more until it works again.
        """
        is_full = self._backlog.fill > CROWDED
        lasts = self._patience.lasts(is_full, self._delivered, monotonic())
        return is_full and lasts and self._state == "ok"

    def close(self) -> None:
        """Let the thread deliver what waits, close the sink and end. Returns at once."""
        with self._lock:
            self._closing = True
            self._news.notify()

    @property
    def has_park(self) -> bool:
        """True when there is a park file to write."""
        return self._park is not None

    def join(self, deadline: float) -> None:
        """Wait for the thread's end until ``deadline`` (monotonic). If it does not come, the sink is left to itself, and
        what still waits is parked or dropped and counted."""
        self._thread.join(max(0.0, deadline - monotonic()))
        if self._thread.is_alive():
            self._abandon()

    def close_park(self, deadline: float) -> None:
        """Wait for the park file until ``deadline`` (monotonic); what it has not got by then is counted as dropped."""
        if self._park is not None and not self._park.close(deadline):
            with self._lock:
                self._dropped["park"] += self._parking
                self._parking = 0
            logger.error("sink %r: the park file is too slow; its thread is left behind", self.name)

    def _abandon(self) -> None:
        with self._lock:
            if self._state == "closed":
                return  # it ended just now
            self._abandoned = True
            left = [*self._in_flight, *self._marks_in_flight, *self._backlog.clear()]
            self._in_flight = ()
            self._give_up(left, "closed")
            self._state = "closed"
            self._news.notify()
        logger.error("sink %r did not finish in time and is left to itself, in thread %s; %d events %s", self.name,
                     self._thread.name, sum(record[2] != MARK for record in left),
                     "are lost" if self._park is None else "go to the park file")

    # -- the dispatcher's thread --

    def put(self, chunk: Chunk) -> None:
        """Queue numbered records; what does not fit is coalesced or dropped, and counted."""
        if self._kinds is not None:
            chunk = Chunk.of(record for record in chunk.records if record[2] in self._kinds)
            if not chunk.records:
                return
        with self._lock:
            self._emitted += len(chunk.records)
            if self._state == "closed":
                self._drop(chunk.records, "closed")
                return
            coalesced, dropped = self._backlog.extend(chunk)
            self._coalesced += len(coalesced)
            if dropped:
                self._give_up(dropped, "overflow")
                self._unreported["overflow"] += len(dropped)
            if self._is_idle:
                self._news.notify()

    def refuse(self, kind: int, reason: str, count: int) -> None:
        """Count events that never got a number, because the intake was full or the event too large."""
        if self._kinds is None or kind in self._kinds:
            with self._lock:
                self._emitted += count
                self._dropped[reason] += count
                self._unreported[reason] += count
                self._losses.setdefault(reason, Counter())[TYPES[kind].value] += count
                self._news.notify()

    def mark(self) -> Mark:
        """Return a mark that is settled once all that was put before is settled and the sink has flushed."""
        with self._lock:
            mark = Mark(self._pending())
            if self._state == "closed":
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
                    for part in _parts(batch) if self._marks_in_flight else (batch,):
                        if isinstance(part, Mark):
                            self._flush(part)
                        else:
                            self._settle(part)
                if self._end is None:
                    self._call_sink("close", self._sink.close)
        finally:
            with self._lock:
                self._give_up([*self._in_flight, *self._backlog.clear()], "failed")
                self._in_flight = ()
                self._state = "closed"
            self._opened.settle(False)
            self._report_losses(is_last=True)
            self._loop.close()

    def _open(self) -> bool:
        opener = getattr(self._sink, "open", None)
        while opener is not None:
            try:
                self._loop.finish(opener())
                self._breaker.succeeded()
                self._note_recovery()
                break
            except TemporarySinkError as error:  # it may come to work: the registration stands, and we keep trying
                self._opened.settle(True)
                self._note_trouble(error)
                decision = self._breaker.failed(error, 0)
                if not self._pause(decision.wait):
                    break  # closing: `write` is the last attempt
            except BaseException as error:  # a third party's code on our thread: reported to who registered it
                with self._lock:
                    self._open_error = error
                    self._last_error = describe(error)
                    is_awaited = self._is_awaited
                logger.log(logging.DEBUG if is_awaited else logging.ERROR, "sink %r does not open: %s", self.name,
                           self._last_error)
                return False
        self._opened.settle(True)
        return True

    def _next_batch(self) -> list[Record] | None:
        """Wait for records and take a batch; an empty one is a loss to announce, None the end."""
        with self._lock:
            self._in_flight = self._marks_in_flight = ()
            while not self._abandoned and not len(self._backlog) and not self._backlog.has_marks:
                if (self._losses and self._announces and self._announces_alone
                        and (self._state == "ok" or not self._closing)):
                    return []  # also the probe of a sink that failed, when nothing else waits to be tried
                if self._closing:
                    return None
                self._wait(None)
            self._linger()
            if self._abandoned:
                return None
            has_marks = self._backlog.has_marks
            batch = self._backlog.take(self._batch_size)
            self._in_flight = [record for record in batch if record[2] != MARK] if has_marks else batch
            self._marks_in_flight = [record for record in batch if record[2] == MARK] if has_marks else ()
            return batch

    def _linger(self) -> None:
        """Wait for a full batch as long as the options say, unless somebody waits for us."""
        until = monotonic() + self._options.linger
        while len(self._backlog) < self._batch_size and not (self._closing or self._abandoned
                                                              or self._backlog.has_marks or self._backlog.fill > CROWDED):
            if (left := until - monotonic()) <= 0:
                return
            self._wait(left)

    def _wait(self, timeout: float | None) -> None:
        self._is_idle = True
        self._news.wait(timeout)
        self._is_idle = False

    def _settle(self, records: Sequence[Record]) -> None:
        """Deliver records, or account for them otherwise: retry, halve what is refused for good, park or drop."""
        pieces = [records]  # what is left, the oldest last
        attempts = 0
        while pieces and not self._abandoned:
            piece = pieces.pop()
            error: BaseException | None = self._end
            if error is None:
                error = self._attempt(piece)
                attempts += 1
            if error is None:
                self._settled(piece)
                attempts = 0
                continue
            decision = self._breaker.failed(error, len(piece))
            if decision.action == "split":
                middle = len(piece) // 2
                pieces += [piece[middle:], piece[:middle]]
            elif decision.action == "retry" and self._pause(decision.wait):
                pieces.append(piece)
            else:  # given up; or the sink is being closed, and had its last attempt
                if decision.action == "end" and isinstance(error, PermanentSinkError):
                    self._end_with(error)
                self._settled(piece, error, attempts)
                attempts = 0

    def _attempt(self, piece: Sequence[Record]) -> BaseException | None:
        """Write what the sink is to know first, then the records; return the error if it did not take them."""
        error = self._announce() or (self._write(piece) if piece else None)
        if error is None:
            self._breaker.succeeded()
            self._note_recovery()
        else:
            self._note_trouble(error)
        self._report_losses()
        return error

    def _settled(self, piece: Sequence[Record], error: BaseException | None = None, attempts: int = 1) -> None:
        """Move records in flight to where they ended up."""
        with self._lock:
            if self._abandoned:
                return  # who abandoned us has settled the account
            self._in_flight = self._in_flight[len(piece):]
            if error is None:
                self._delivered += len(piece)
            else:
                if self._end is None and self._breaker.is_open:
                    self._state = "open"
                reason = ("failed" if not isinstance(error, PermanentSinkError) else
                          "refused" if self._end is None else "closed")
                self._give_up(piece, reason, error, attempts)
                if self._end is not None:
                    self._unreported[reason] += len(piece)
        if self._end is not None:
            self._report_losses()
        elif error is not None and piece:
            logger.error("sink %r: %d events %s: %s", self.name, len(piece),
                         "dropped" if self._park is None else "go to the park file", describe(error))

    def _end_with(self, error: PermanentSinkError) -> None:
        """Close the sink, which takes nothing any more; what it still has and gets is given up."""
        if self._end is not None:
            return
        with self._lock:
            self._end = error
            self._announces = False
            if not self._abandoned:
                self._state = "failed"
        logger.error("sink %r takes nothing any more, and is closed: %s; what waits and comes %s", self.name,
                     describe(error), "is lost" if self._park is None else "goes to the park file")
        self._call_sink("close", self._sink.close)

    def _pause(self, seconds: float) -> bool:
        """Wait before a retry; False when the sink is being closed, and the attempt just made was the last."""
        until = monotonic() + seconds
        with self._lock:
            if self._abandoned:
                return False
            self._state = "open" if self._breaker.is_open else "retrying"
            if self._closing and self._last_call:
                return False
            while not self._closing and not self._abandoned and (left := until - monotonic()) > 0:
                self._news.wait(left)
            if self._closing:
                self._last_call = True  # one more attempt for what is in our hands, then one for each that waits
            self._retries += 1
            return True

    def _announce(self) -> BaseException | None:
        """Tell the sink what it did not get; return the error if it does not take it."""
        with self._lock:
            if not self._losses or not self._announces:
                return None
            losses, self._losses = self._losses, {}
        if losses != self._announcing[0]:  # else it is tried again as it was: who did take it knows it again
            now = time_ns()
            self._announcing = losses, [(None, 0, LOST, now, (self.name, reason, sum(by_type.values()), dict(by_type)))
                                       for reason, by_type in losses.items()]
        error = self._write(self._announcing[1])
        if error is None:
            self._announcing = {}, []
            self._announces_alone = True
        elif not isinstance(error, PermanentSinkError) or error.concerns != "event":
            self._announces_alone = not isinstance(error, PermanentSinkError)  # else it were asked again at once
            with self._lock:
                for reason, by_type in losses.items():
                    self._losses.setdefault(reason, Counter()).update(by_type)
            return error
        else:  # it takes no such events; its own are not to suffer for it
            self._announces = False
            logger.warning("sink %r refuses EventsLost events and gets none any more: %s", self.name, describe(error))
        return None

    def _write(self, records: Sequence[Record]) -> BaseException | None:
        try:
            self._loop.finish(self._sink.write(Batch(records)))
        except BaseException as error:  # a third party's code on our thread: delivery decides
            return error
        return None

    def _flush(self, mark: Mark) -> None:
        flush = getattr(self._sink, "flush", None)
        reached = self._end is None and (flush is None or self._call_sink("flush", flush))
        with self._lock:
            mark.left = self._parking
        mark.settle(reached)

    def _call_sink(self, what: str, function: Callable[[], Awaitable[None] | None]) -> bool:
        try:
            self._loop.finish(function())
        except BaseException as error:  # as in _write
            self._last_error = describe(error)
            logger.error("sink %r failed to %s: %s", self.name, what, self._last_error)
            return False
        return True

    def _give_up(self, records: Iterable[Record], reason: str, error: BaseException | None = None,
                 attempts: int = 0) -> None:
        """Park records, or count them as dropped; under the lock."""
        left: list[Record] = []
        for record in records:
            if record[2] == MARK:
                record[4].settle(False)
            else:
                left.append(record)
        if self._park is None or not left:
            self._drop(left, reason)
            return
        parking = self._park.put(left, describe(error) if error else reason, attempts)
        self._parking += parking
        self._drop(left[parking:], "park")

    def _drop(self, records: Sequence[Record], reason: str) -> None:
        """Count records as dropped, to be announced; under the lock."""
        if records:
            self._dropped[reason] += len(records)
            self._losses.setdefault(reason, Counter()).update(TYPES[record[2]].value for record in records)

    def _count_parked(self, records: Sequence[Record], error: BaseException | None) -> None:
        """Count what the park file took, or did not; the park's thread."""
        with self._lock:
            if not self._parking:
                return  # too late: `join` has counted them as lost
            self._parking -= len(records)
            if error is None:
                self._parked += len(records)
            else:
                self._drop(records, "park")
            self._news.notify()
        if error is not None:
            logger.error("sink %r: %d events lost, the park file does not take them: %s", self.name, len(records),
                         describe(error))

    def _report_losses(self, *, is_last: bool = False) -> None:
        """Tell the log what was lost unsaid. On the courier's thread: a slow handler must not hold up the dispatcher."""
        now = monotonic()
        with self._lock:
            if not self._unreported or (now < self._next_report and not is_last):
                return
            lost, self._unreported = self._unreported, Counter()
            self._next_report = now + REPORT_INTERVAL
        logger.warning("sink %r: %d events %s and %s (%s)", self.name, sum(lost.values()),
                       "did not fit" if self._end is None else "were not taken",
                       "are lost" if self._park is None else "go to the park file, or are lost",
                       ", ".join(f"{reason}: {count}" for reason, count in lost.items()))

    def _note_trouble(self, error: BaseException) -> None:
        is_first = self._state == "ok"
        with self._lock:
            self._last_error = describe(error)
            if not isinstance(error, PermanentSinkError) and not self._abandoned:
                self._state = "open" if self._breaker.is_open else "retrying"
        if is_first and not isinstance(error, PermanentSinkError):
            logger.warning("sink %r failed, and is tried again: %s", self.name, self._last_error)

    def _note_recovery(self) -> None:
        with self._lock:
            if self._state == "ok" or self._abandoned:
                return
            self._state = "ok"
        logger.warning("sink %r works again", self.name)


def close_all(couriers: Collection[Courier], deadline: float) -> None:
    """Close couriers side by side; all are done with by ``deadline`` (monotonic)."""
    for courier in couriers:
        courier.close()
    now = monotonic()
    for courier in couriers:
        if courier.has_park:
            courier.join(now + (deadline - now) * 0.9)  # a tenth of the time is the disk's
    for courier in couriers:
        if not courier.has_park:
            courier.join(deadline)
    for courier in couriers:
        courier.close_park(deadline)


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


def _new_park(options: SinkOptions, name: str, done: Callable[..., None]) -> Park:
    assert options.park is not None
    try:
        from ..park.park import Park
    except ModuleNotFoundError as error:
        raise SinkError(f"SinkOptions(park={os.fspath(options.park)!r}): {MissingPart('park')}") from error
    # an overflow sheds up to MOST_TAKEN records at once, however small the queue is
    most_waiting = max(options.queue_size, MOST_TAKEN)
    return Park(options.park, options.park_bytes, most_waiting, options.queue_bytes, name, done, options.park_mode)
