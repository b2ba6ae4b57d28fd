"""One sink's queue, thread and account.

Guarantees. Every call into the sink comes from this courier's one thread, through `Courier._call`,
and what it raises comes back as a `Trouble`: plain values. Whatever the sink does, `put` returns at
once, `close_all` by its deadline, and at every quiet moment ``emitted == delivered + coalesced +
dropped + parked + pending``: each step of an event from one of these to another happens under the
courier's lock, which is never held while code runs that is not ours.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from dataclasses import replace
from time import time_ns

from ..model.checks import number
from ..model.clock import monotonic
from ..model.errors import ConfigurationError, MissingPart, SinkError, TemporarySinkError
from ..model.health import SinkHealth
from ..model.records import LOST, TYPES, Batch
from ..model.reports import report, wait_for_reports
from ..model.text import describe, name_of
from ..model.threads import own_thread
from .backlog import Backlog, Chunk
from .intake import MOST_TAKEN
from .loop import SinkLoop
from .options import kinds_of
from .patience import CROWDED, Patience
from .retry import Breaker, Trouble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ..model.records import Record
    from ..park.park import Park
    from ..sinks.base import Sink
    from .options import SinkOptions

DEFAULT_BATCH = 500
LOG_GRACE = 0.5
"""Seconds that the log gets at most for the lines about a sink's end: its handlers may block for
ever."""

REPORT_INTERVAL = 60.0
"""Seconds between two log lines about events of one sink that did not fit; the first and the last
come at once."""

_carried: dict[int, Courier] = {}
"""Who calls which sink, by the sink's id: never more than one courier. Each step on it is
atomic."""


class Mark:
    """A place in a courier's queue that somebody waits for. Set once, by the courier's thread or by
    whoever gives the sink up."""

    def __init__(self, place: int = 0, left: int = 0) -> None:
        self._event = threading.Event()
        self.place = place
        """Events that have been taken from the queue once all before the place are among them."""
        self.left = left
        """Events before the place that are neither with the sink nor given up, as last counted."""
        self.reached = False

    def settle(self, reached: bool) -> None:
        """Wake the waiter; ``reached`` tells whether all before the place is settled and the sink
        has flushed."""
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
        options: bounds and policies, as `options_for` returns them.
        scheduler: its name, which the thread is named after.
    """

    has_ended = False
    """Also what comes after its close is counted."""

    def __init__(self, name: str, sink: Sink, options: SinkOptions, scheduler: str) -> None:
        self.name = name
        self._scheduler = scheduler
        self._sink = sink
        self._options = options
        self._batch_size = options.batch_size or DEFAULT_BATCH
        self._kinds = None if options.types is None else kinds_of(options.types)
        self._announces = self._kinds is None or LOST in self._kinds
        self._breaker = Breaker(options.retry)  # the courier's thread alone decides
        self._patience = Patience()  # the dispatcher's thread alone asks
        self._park = None if options.park is None else _new_park(options, name, self._count_parked)
        # Guards all below. Re-entrant: the garbage collector may run a finaliser right here, which
        # looks at our health.
        self._lock = threading.RLock()
        # the thread waits on it: records, a mark, the close
        self._news = threading.Condition(self._lock)
        self._backlog = Backlog(options.queue_size, options.queue_bytes,
                                options.overflow == "drop_oldest")
        self._in_flight: Sequence[Record] = ()  # events in the sink's hands: no losses
        self._taken = 0  # events that the queue has handed out so far
        self._marks: list[Mark] = []  # in the order of their places
        self._emitted = self._delivered = self._coalesced = self._parked = self._retries = 0
        self._parking = 0  # given to the park, which has not answered yet
        self._dropped: Counter[str] = Counter()
        # reason -> type -> count, not yet announced to the sink
        self._losses: dict[str, Counter[str]] = {}
        # False: losses wait for the next events, since they alone were given up
        self._announces_alone = True
        # reason -> count of what was lost unsaid, not yet in the log
        self._unreported: Counter[str] = Counter()
        self._next_report = 0.0
        self._is_said_to_fail = False  # in the log
        self._failing_since: float | None = None  # monotonic; None: its latest call went well
        self._state = "ok"
        self._last_error: str | None = None
        self._closing = False
        self._closes_itself = False  # the sink asked for it: nobody else closes the park file
        self._retries_until = 0.0  # monotonic; while closing
        self._retry_time = 0.0  # seconds from the close until then
        self._last_call = False  # closing, and there is no time left for another wait
        self._end: Trouble | None = None  # why the sink takes nothing any more
        self._abandoned = False
        self._is_awaited = False  # somebody waits in `start` and is told of an open that fails
        self._opened = Mark()
        self._refusal: BaseException | None = None
        self._loop = SinkLoop()
        self.thread = own_thread(f"{scheduler}-sink-{name}", self._run)

    # -- any thread --

    def start(self, timeout: float) -> None:
        """Start the thread and wait up to ``timeout`` seconds for the sink to open.

        Raises:
            ConfigurationError: the sink is another courier's already.
            SinkError: the sink refused to open for good, it is of no use; or no thread can be
                started.
        """
        other = _carried.setdefault(id(self._sink), self)
        if other is not self:
            raise ConfigurationError(
                f"sink: this {name_of(type(self._sink))} is registered already, as {other.name!r}; "
                "two threads would call it at once. Make another one, or unregister it first")
        try:
            if self._park is not None:
                self._park.open()
            self._is_awaited = True
            self.thread.start()
        except BaseException as error:
            del _carried[id(self._sink)]
            if issubclass(type(error), OSError):
                raise SinkError(f"the park file of sink {self.name!r} cannot be used: "
                                f"{describe(error)}") from error
            if issubclass(type(error), RuntimeError):
                raise SinkError(f"sink {self.name!r} cannot be opened: no thread can be started "
                                f"({error})") from error
            raise
        self._opened.wait(timeout)
        with self._lock:
            refusal, self._refusal = self._refusal, None
            self._is_awaited = False
        if refusal is not None:
            if issubclass(type(refusal), SinkError):
                raise refusal
            raise SinkError(f"sink {self.name!r} does not open: {self._last_error}") from refusal

    def twin(self) -> Courier:
        """Return a courier to the same sink with an empty queue and account: a forked child's
        own."""
        twin = Courier(self.name, self._sink, self._options, self._scheduler)
        _carried[id(self._sink)] = twin
        return twin

    def start_inherited(self) -> None:
        """Start in a forked child, which nobody asked: an error of ``open`` is for the log."""
        self.thread.start()

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
        return self.thread is threading.current_thread()

    @property
    def most_waiting(self) -> int:
        """Short records that the queue holds when it is full."""
        return self._backlog.most_waiting

    @property
    def room(self) -> int:
        """Bytes that the queue has room for."""
        return self._backlog.room

    @property
    def is_crowded(self) -> bool:
        """True when the queue of a healthy sink is getting full: those who can wait for it should.
        The dispatcher's thread.

        A sink is healthy if its latest ``write`` did not fail and the `Patience` with it is not
        used up. Nobody waits for more than some seconds for a sink that hangs, or takes next to
        nothing, until it works again.
        """
        is_due = self._patience.is_due(self._backlog.fill, self._delivered, monotonic())
        return is_due and self._state == "ok"

    def close(self, retries_until: float) -> None:
        """Let the thread deliver what waits, close the sink and end. Returns at once.

        Args:
            retries_until: when the last retry may begin (monotonic). What fails then gets one more
                attempt, and so does each batch behind it. Of this time a sink that fails already
                has used up as much as it has been failing for, unless it says when to come back.
        """
        with self._lock:
            self._closing = True
            self._closes_itself = self.is_this_thread
            self._retries_until = retries_until
            self._retry_time = retries_until - monotonic()
            self._news.notify()

    @property
    def has_park(self) -> bool:
        """True when there is a park file to write."""
        return self._park is not None

    def join(self, deadline: float) -> None:
        """Wait for the thread's end until ``deadline`` (monotonic). If it does not come, the sink
        is left to itself, and what still waits is parked or dropped and counted."""
        if self.thread.ident is not None:  # else it never began
            self.thread.join(max(0.0, deadline - monotonic()))
        if self.thread.is_alive():
            self._abandon()

    def close_park(self, deadline: float) -> None:
        """Wait for the park file until ``deadline`` (monotonic); what it has not got by then is
        counted as dropped."""
        if self._park is not None and not self._park.close(deadline):
            with self._lock:
                self._dropped["park"] += self._parking
                self._parking = 0
            report(logging.ERROR, "sink %r: the park file is too slow; its thread is left behind",
                   self.name)

    def _abandon(self) -> None:
        with self._lock:
            if self._state == "closed":
                return  # it ended just now
            self._abandoned = True
            left = self._give_up_all("closed")
            self._news.notify()
        report(
            logging.ERROR,
            "sink %r did not finish in time and is left to itself, in thread %s; %d events %s",
            self.name,
            self.thread.name,
            left,
            "are lost" if self._park is None else "go to the park file",
        )

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
            self._news.notify()

    def refuse(self, kind: int, reason: str, count: int) -> None:
        """Count events that never got a number, because the intake was full or the event too
        large."""
        if self._kinds is None or kind in self._kinds:
            with self._lock:
                self._emitted += count
                self._dropped[reason] += count
                self._unreported[reason] += count
                self._losses.setdefault(reason, Counter())[TYPES[kind].value] += count
                self._news.notify()

    def mark(self) -> Mark:
        """Return a mark that is settled once all that was put before is settled and the sink has
        flushed."""
        with self._lock:
            mark = Mark(self._taken + len(self._backlog), self._pending())
            if self._state == "closed":
                mark.settle(False)
            else:
                self._marks.append(mark)
                self._news.notify()
        return mark

    # -- the courier's thread --

    def _run(self) -> None:
        try:
            if self._open():
                while (batch := self._next_batch()) is not None:
                    if batch:
                        self._settle(batch)
                    else:
                        self._flush()
                if self._end is None:
                    self._say_if_failed("close", self._call("close"))
        finally:
            with self._lock:
                self._give_up_all("failed")
            self._report_losses(is_last=True)
            self._say_if_failed("end its event loop", self._loop_closed())
            if self._closes_itself:
                self.close_park(self._retries_until)
            _carried.pop(id(self._sink), None)
            self._opened.settle(False)  # last: whoever is refused may register the sink again

    def _call(self, method: str, *arguments: object) -> Trouble | None:
        """Call a method of the sink, if it has that one. The only door to the sink's code."""
        try:
            self._loop.call(self._sink, method, *arguments)
        except BaseException as error:  # a third party's code on our thread: delivery decides
            return Trouble.of(error)
        return None

    def _loop_closed(self) -> Trouble | None:
        try:
            self._loop.close()
        except BaseException as error:  # the sink's own generators, which end with their loop
            return Trouble.of(error)
        return None

    def _open(self) -> bool:
        while True:
            try:
                self._loop.call(self._sink, "open")
                self._breaker.succeeded()
                self._note_success()
                break
            except BaseException as error:
                # as in `_call`, but whoever registers the sink gets the error itself
                trouble = Trouble.of(error)
                if not issubclass(type(error), TemporarySinkError):
                    with self._lock:
                        self._last_error = trouble.text
                        is_awaited = self._is_awaited
                        self._refusal = error if is_awaited else None
                    if not is_awaited:
                        report(logging.ERROR, "sink %r does not open: %s", self.name, trouble.text)
                    return False
            # it may come to work: the registration stands, and we keep trying
            self._opened.settle(True)
            self._note_trouble(trouble)
            if not self._pause(self._breaker.failed(trouble, 0).wait, trouble):
                break  # closing: `write` is the last attempt
        self._opened.settle(True)
        return True

    def _next_batch(self) -> Sequence[Record] | None:
        """Wait for records and take a batch, which begins with the losses that the sink was not
        told of; it is empty when the sink is to flush, and None at the end.

        A batch ends before the first mark. What overflow drops before a mark is not told from what
        it drops behind it: then a flush waits for as many events more, or for an empty queue.
        """
        with self._lock:
            self._in_flight = ()
            self._backlog.forget_taken()
            while not self._abandoned and not len(self._backlog) and not self._marks:
                if self._losses and self._announces and self._announces_alone and (
                        self._state == "ok" or not self._closing):
                    # also the probe of a sink that failed, when nothing else waits to be tried
                    break
                if self._closing:
                    return None
                self._news.wait(None)
            if len(self._backlog):
                self._linger()
            if self._abandoned:
                return None
            most = min(self._batch_size, len(self._backlog))
            if self._marks:
                most = min(most, self._marks[0].place - self._taken)
            losses: list[Record] = []
            # what was given up alone goes beside an event, or after one that was taken
            if self._announces_alone or (most > 0 and self._batch_size > len(self._losses)):
                losses = self._announce()
            self._in_flight = self._backlog.take(
                max(0, min(most, self._batch_size - len(losses))))
            self._taken += len(self._in_flight)
            return (*losses, *self._in_flight)

    def _linger(self) -> None:
        """Wait for a full batch as long as the options say, unless somebody waits for us."""
        until = monotonic() + self._options.linger
        while len(self._backlog) < self._batch_size and not (
            self._closing
            or self._abandoned
            or self._marks
            or self._backlog.fill > CROWDED
        ):
            if (left := until - monotonic()) <= 0:
                return
            self._news.wait(left)

    def _settle(self, records: Sequence[Record]) -> None:
        """Deliver records, or account for them otherwise: retry, halve what is refused for good,
        park or drop."""
        pieces = [records]  # what is left, the oldest last
        attempts = 0
        while pieces and not self._abandoned:
            piece = pieces.pop()
            trouble = self._end
            if trouble is None:
                trouble = self._attempt(piece)
                attempts += 1
            if trouble is None:
                self._settled(piece)
                attempts = 0
                continue
            decision = self._breaker.failed(trouble, len(piece))
            if decision.action == "split":
                middle = len(piece) // 2
                pieces += [piece[middle:], piece[:middle]]
                if not trouble.is_permanent:
                    with self._lock:
                        self._retries += 1
            elif decision.action == "retry" and self._pause(decision.wait, trouble):
                pieces.append(piece)
            else:  # given up; or the sink is being closed, and had its last attempt
                if decision.action == "end":
                    self._end_with(trouble)
                self._settled(piece, trouble, attempts)
                attempts = 0

    def _attempt(self, piece: Sequence[Record]) -> Trouble | None:
        """Write records; return what kept the sink from taking them."""
        trouble = self._write(piece)
        if trouble is None:
            self._breaker.succeeded()
            self._note_success(piece)
        else:
            self._note_trouble(trouble)
        self._report_losses()
        return trouble

    def _write(self, records: Sequence[Record]) -> Trouble | None:
        # a tuple: nothing that the sink could change is ours
        return self._call("write", Batch(tuple(records)))

    def _settled(self, piece: Sequence[Record], trouble: Trouble | None = None,
                 attempts: int = 1) -> None:
        """Move records in flight to where they ended up."""
        losses = [record for record in piece if record[2] == LOST]
        events = piece[len(losses):]
        with self._lock:
            if self._abandoned:
                return  # `_abandon` has settled the account
            self._in_flight = self._in_flight[len(events):]
            if trouble is None:
                self._delivered += len(events)
                self._announces_alone = True
                return
            if self._end is None and self._breaker.is_open:
                self._state = "open"
            reason = ("failed" if not trouble.is_permanent else
                      "refused" if self._end is None else "closed")
            self._give_up(events, reason, trouble.text, attempts)
            if self._end is not None:
                self._unreported[reason] += len(events)
            elif losses:
                self._take_back(losses, trouble)
        if self._end is not None:
            self._report_losses()
        elif events:
            report(logging.ERROR, "sink %r: %d events %s: %s", self.name, len(events),
                   "dropped" if self._park is None else "go to the park file", trouble.text)
        elif not self._announces:
            report(logging.WARNING, "sink %r refuses EventsLost events and gets none any more: %s",
                   self.name, trouble.text)

    def _end_with(self, trouble: Trouble) -> None:
        """Close the sink, which takes nothing any more; what it still has and gets is given up."""
        with self._lock:
            if self._end is not None:
                return
            self._end = trouble
            self._announces = False
            if not self._abandoned:
                self._state = "failed"
        report(
            logging.ERROR,
            "sink %r takes nothing any more, and is closed: %s; what waits and comes " "%s",
            self.name,
            trouble.text,
            "is lost" if self._park is None else "goes to the park file",
        )
        self._say_if_failed("close", self._call("close"))

    def _pause(self, seconds: float, trouble: Trouble) -> bool:
        """Wait before a retry; False when the sink is being closed, and the attempt just made was
        the last."""
        until = monotonic() + seconds
        with self._lock:
            if not self._abandoned:
                self._state = "open" if self._breaker.is_open else "retrying"
            while not self._abandoned:
                if self._closing and until > self._retries_end(trouble):
                    if self._last_call:
                        return False
                    # one more attempt for what is in our hands, then one for each that waits
                    self._last_call = True
                    break
                if (left := until - monotonic()) <= 0:
                    break
                self._news.wait(left)
            self._retries += 1
            return not self._abandoned

    def _retries_end(self, trouble: Trouble) -> float:
        """Return when the last retry may begin, while closing; under the lock.

        A program whose receiver has been down for long is not kept from its end by it.
        """
        if self._failing_since is None or trouble.retry_after is not None:
            return self._retries_until
        return min(self._retries_until, self._failing_since + self._retry_time)

    def _announce(self) -> list[Record]:
        """Return what the sink is to be told before the next events: the losses so far; under the
        lock."""
        if not self._losses or not self._announces:
            return []
        losses, self._losses = self._losses, {}
        now = time_ns()
        return [(None, 0, LOST, now, (self.name, reason, sum(by_type.values()), dict(by_type)))
                for reason, by_type in losses.items()]

    def _take_back(self, losses: Sequence[Record], trouble: Trouble) -> None:
        """Keep announcements that were given up for the next events; under the lock."""
        if len(losses) == 1 and trouble.concerns == "event":
            self._announces = False  # it takes no such events, and its own must not suffer for it
            return
        self._announces_alone = False  # else they would be tried again at once
        for record in losses:
            _, reason, _, by_type = record[4]
            self._losses.setdefault(reason, Counter()).update(by_type)

    def _flush(self) -> None:
        """Have the sink flush for all marks that are reached."""
        with self._lock:
            due = [mark for mark in self._marks
                   if mark.place <= self._taken or not len(self._backlog)]
        reached = self._end is None and self._say_if_failed("flush", self._call("flush"))
        with self._lock:
            for mark in due:
                mark.left = self._parking
                mark.settle(reached)
            del self._marks[:len(due)]

    def _say_if_failed(self, what: str, trouble: Trouble | None) -> bool:
        """Report what kept the sink from something that is not tried again; True when nothing
        did."""
        if trouble is not None:
            self._last_error = trouble.text
            report(logging.ERROR, "sink %r failed to %s: %s", self.name, what, trouble.text)
        return trouble is None

    def _give_up_all(self, reason: str) -> int:
        """Give up what waits and what is under way, and wake all who wait for it: the account is
        closed. Return how many events it was; under the lock."""
        left = [*self._in_flight, *self._backlog.clear()]
        self._in_flight = ()
        self._give_up(left, reason)
        for mark in self._marks:
            mark.settle(False)
        self._marks.clear()
        self._state = "closed"
        return len(left)

    def _give_up(self, records: Sequence[Record], reason: str, error: str = "",
                 attempts: int = 0) -> None:
        """Park records, or count them as dropped; under the lock."""
        if self._park is None or not records:
            self._drop(records, reason)
            return
        parking = self._park.put(records, error or reason, attempts)
        self._parking += parking
        self._drop(records[parking:], "park")

    def _drop(self, records: Sequence[Record], reason: str) -> None:
        """Count records as dropped, to be announced; under the lock."""
        if records:
            self._dropped[reason] += len(records)
            self._losses.setdefault(reason, Counter()).update(
                TYPES[record[2]].value for record in records)

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
            report(logging.ERROR, "sink %r: %d events lost, the park file does not take them: %s",
                   self.name, len(records), describe(error))

    def _report_losses(self, *, is_last: bool = False) -> None:
        """Tell the log what was lost unsaid. On the courier's thread: a slow handler must not hold
        up the dispatcher."""
        now = monotonic()
        with self._lock:
            if not self._unreported or (now < self._next_report and not is_last):
                return
            lost, self._unreported = self._unreported, Counter()
            self._next_report = now + REPORT_INTERVAL
        report(logging.WARNING, "sink %r: %d events %s and %s (%s)", self.name, sum(lost.values()),
               "did not fit" if self._end is None else "were not taken",
               "are lost" if self._park is None else "go to the park file, or are lost",
               ", ".join(f"{reason}: {count}" for reason, count in lost.items()))

    def _note_trouble(self, trouble: Trouble) -> None:
        with self._lock:
            self._last_error = trouble.text
            if trouble.is_permanent or self._abandoned:
                return
            if self._failing_since is None:
                self._failing_since = monotonic()
            self._state = "open" if self._breaker.is_open else "retrying"
        if not self._is_said_to_fail:
            self._is_said_to_fail = True
            report(logging.WARNING, "sink %r failed, and is tried again: %s", self.name,
                   trouble.text)

    def _note_success(self, piece: Sequence[Record] = ()) -> None:
        with self._lock:
            self._failing_since = None
            if not self._abandoned:
                self._state = "ok"
        # a loss is small: it may fit where no event does
        if self._is_said_to_fail and piece and piece[-1][2] != LOST:
            self._is_said_to_fail = False
            report(logging.WARNING, "sink %r works again", self.name)


def options_for(sink: Sink, options: SinkOptions) -> SinkOptions:
    """Return the options with the batches that the sink wishes, unless they name a size. Asks the
    sink: under no lock."""
    if options.batch_size is None:
        wish = getattr(sink, "preferred_batch", None)
        return replace(options, batch_size=number("preferred_batch", wish, least=1, whole=True,
                                                  optional=True))
    return options


def close_all(couriers: Collection[Courier], deadline: float) -> None:
    """Close couriers side by side; all are done with by ``deadline`` (monotonic). Their retries get
    the time until then, less what it takes to give up the rest; of one that is called by its own
    sink nobody waits for the end."""
    now = monotonic()
    for courier in couriers:
        courier.close(now + (deadline - now) * 0.8)
    others = [courier for courier in couriers if not courier.is_this_thread]
    for courier in others:
        if courier.has_park:
            courier.join(now + (deadline - now) * 0.9)  # a tenth of the time is the disk's
    for courier in others:
        if not courier.has_park:
            courier.join(deadline)
    for courier in others:
        courier.close_park(deadline)
    wait_for_reports(monotonic() + LOG_GRACE)


def _new_park(options: SinkOptions, name: str, done: Callable[..., None]) -> Park:
    assert options.park is not None
    try:
        from ..park.park import Park
    except ModuleNotFoundError as error:
        raise SinkError(
            f"SinkOptions(park={os.fspath(options.park)!r}): {MissingPart('park')}"
        ) from error
    # an overflow sheds up to MOST_TAKEN records at once, however small the queue is, and again
    # before the disk is done
    most_waiting = max(options.queue_size, 4 * MOST_TAKEN)
    return Park(
        options.park,
        options.park_bytes,
        most_waiting,
        options.queue_bytes,
        name,
        done,
        options.park_mode,
    )
