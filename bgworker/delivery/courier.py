"""One sink's queue, its thread, and the account of what became of its events.

Guarantees. Every call into the sink comes from this courier's one thread, through `Courier._call`,
and what it raises comes back as a `Trouble`: plain values. Whatever the sink does, `put` returns at
once, `close_all` by its deadline, and the account is exact (see `consumer`): the courier's lock is
never held while code runs that is not ours.

*States.* "ok"; "retrying" and "open" while the sink fails, as the `Breaker` says; "failed" when it
has said that it takes nothing any more; "closed" at the end, which is final: the thread has ended,
or the sink did not finish in time and is left to itself in it.

*One turn of the thread.* It waits until there is something to do, takes a batch, and settles it: in
the end each event of it has been delivered, parked or dropped. A batch begins with the losses that
the sink has not been told of. One without events and losses is a flush.

*After a failed attempt* events come again as they were, after a wait, or in halves, or they are
given up: then they go to the park file, or are dropped and announced. Which of these, the `Breaker`
decides. The park file is a sink too, with a courier of its own.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from time import time_ns

from ..model.checks import number
from ..model.clock import monotonic
from ..model.errors import ConfigurationError, MissingPart, SinkError, TemporarySinkError
from ..model.health import SinkHealth
from ..model.latch import Latch
from ..model.records import LOST, Batch
from ..model.reports import report
from ..model.text import ask, name_of, show
from ..model.threads import own_thread
from .backlog import BATCH_TEXT, Backlog, Chunk
from .consumer import Consumer, kinds_in
from .intake import MOST_TAKEN
from .loop import SinkLoop, prepare
from .losses import Losses
from .options import SinkOptions, kinds_of
from .patience import CROWDED
from .retry import Breaker, Trouble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from ..model.records import Record
    from ..sinks.base import Sink

DEFAULT_BATCH = 500
_carried: dict[int, Courier] = {}
"""Who calls which sink, by the sink's id: never more than one courier. Each step on it is
atomic."""


class Mark:
    """A place in a courier's queue that somebody waits for. Set once, by the courier's thread or by
    whoever gives the sink up."""

    def __init__(self, place: int, left: int) -> None:
        self._settled = Latch()
        self.place = place
        """Events that have been taken from the queue once all before the place are among them."""
        self.left = left
        """Events before the place that are neither with the sink nor given up, as last counted."""
        self.reached = False

    def settle(self, reached: bool) -> None:
        """Wake the waiter; ``reached`` tells whether all before the place is settled and the sink
        has flushed."""
        self.reached = reached
        self._settled.set()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the place; True when it was reached."""
        self._settled.wait(timeout)
        return self.reached


class Courier(Consumer):
    """Carries events to one sink.

    Args:
        name: of the sink, as registered.
        sink: opened, written to and closed on the courier's thread.
        options: bounds and policies, as `options_for` returns them.
        scheduler: its name, which the thread is named after.
        tell_loss: of the courier of a park file: called on its thread, under no lock, when the file
            did not take something. It then belongs to a courier that announces this to its own
            sink.
    """

    def __init__(self, name: str, sink: Sink, options: SinkOptions, scheduler: str,
                 tell_loss: Callable[[], object] | None = None) -> None:
        kinds = None if options.types is None else kinds_of(options.types)
        super().__init__(name, kinds, Backlog(options.queue_size, options.queue_bytes,
                                              options.overflow == "drop_oldest"), True)
        self._title = f"sink {name!r}" if tell_loss is None else f"the park file of sink {name!r}"
        self._scheduler = scheduler
        self.sink = sink
        self._options = options
        self._batch_size = options.batch_size or DEFAULT_BATCH
        self._tell_loss = tell_loss
        self._breaker = Breaker(options.retry)  # the courier's thread alone decides
        self._loop = SinkLoop()
        self._opened = Latch()  # the sink, or it never will be
        self._is_said_to_fail = False  # in the log
        # only our own thread waits for it, and no interrupt strikes there
        self._news = threading.Condition(self._lock)
        # The lock guards all below.
        self.park = None if options.park is None else _park_courier(options, name, scheduler,
                                                                    self._wake)
        self._fate = "are lost" if self.park is None else "are parked, if possible"
        self._in_flight: Sequence[Record] = ()  # events in the sink's hands: no losses
        self._taken = 0  # events that the queue has handed out so far
        self._marks: list[Mark] = []  # in the order of their places
        self._losses = Losses(name)
        # "alone": losses are announced as soon as there are any; "beside": with the next events,
        # since the sink did not take them alone
        self._announces = "alone"
        if tell_loss is not None or kinds is not None and LOST not in kinds:
            self._announces = "never"
        self._retries = 0
        self._last_error: str | None = None
        self._failing_since: float | None = None  # monotonic; None: its latest call went well
        self._failure: Trouble | None = None  # why it takes nothing any more
        self._closing: tuple[float, float] | None = None  # since when; when the last retry begins
        self._had_last_call = False  # closing, and there is no time left for another wait
        self._is_awaited = False  # somebody waits in `start` and is told of an open that fails
        self._refusal: BaseException | None = None
        self.thread = self._thread = own_thread(
            f"{scheduler}-sink-{name}{'' if tell_loss is None else '-park'}", self._run)

    # -- any thread: the coming and going --

    def start(self, timeout: float) -> None:
        """Start the thread and wait up to ``timeout`` seconds for the sink to open.

        Raises:
            ConfigurationError: the sink is another courier's already.
            SinkError: the sink refused to open for good, it is of no use; or its park file did; or
                no thread can be started.
        """
        other = _carried.setdefault(id(self.sink), self)
        if other is not self:
            raise ConfigurationError(
                f"sink: this {name_of(type(self.sink))} is registered already, as {other.name!r}; "
                "two threads would call it at once. Make another one, or unregister it first")
        try:
            if self.park is not None:
                self.park.start(timeout)
            self._is_awaited = True
            self.thread.start()
        except BaseException as error:
            del _carried[id(self.sink)]
            if issubclass(type(error), RuntimeError):
                raise SinkError(f"{self._title} cannot be opened: no thread can be started "
                                f"({error})") from error
            raise
        self._opened.wait(timeout)
        with self._lock:
            refusal, self._refusal = self._refusal, None
            self._is_awaited = False
        if refusal is not None:
            if issubclass(type(refusal), SinkError):
                raise refusal
            raise SinkError(f"{self._title} does not open: {self._last_error}") from refusal

    def twin(self) -> Courier:
        """Return a courier to the same sink with an empty queue and account: a forked child's
        own."""
        twin = Courier(self.name, self.sink, self._options, self._scheduler)
        _carried[id(self.sink)] = twin
        return twin

    def start_inherited(self) -> None:
        """Start in a forked child, which nobody asked: an error of ``open`` is for the log."""
        if self.park is not None:
            self.park.start_inherited()
        self.thread.start()

    def close(self, retries_until: float) -> None:
        """Let the thread deliver what waits, close the sink and end. Returns at once.

        Args:
            retries_until: when the last retry may begin (monotonic). A batch that fails then gets
                one more attempt, and so does each behind it. A sink that has been failing for a
                while has used up as much of this time, unless it says when to come back.
        """
        with self._lock:
            self._closing = monotonic(), retries_until
            self._news.notify_all()

    def join(self, deadline: float) -> None:
        """Wait for the thread's end until ``deadline`` (monotonic). If it does not come, the sink
        is left to itself, and what still waits is parked or dropped and counted."""
        has_begun = self.thread.ident is not None
        if has_begun:
            self.thread.join(max(0.0, deadline - monotonic()))
        with self._lock:
            if self.is_closed:
                return
            left = self._end("closed")
        self._close_park()
        if has_begun:
            report(logging.ERROR, "%s did not finish in time and is left to itself, in thread %s; "
                   "%d events %s", self._title, self.thread.name, left, self._fate)

    # -- any thread: the account --

    def _health(self) -> SinkHealth:
        own = super()._health()
        parked = SinkHealth() if self.park is None else self.park.health()
        by_reason = dict(own.dropped_by_reason)
        if parked.dropped:
            by_reason["park"] = parked.dropped
        oldest = self._in_flight[0][3] if self._in_flight else self._backlog.oldest_ns
        return replace(
            own, coalesced=own.coalesced + parked.coalesced,
            dropped=own.dropped + parked.dropped, parked=parked.delivered,
            pending=own.pending + len(self._in_flight) + parked.pending,
            dropped_by_reason=by_reason,
            lag=max(0.0, (time_ns() - oldest) / 1e9) if oldest is not None else 0.0,
            retries=self._retries, last_error=self._last_error)

    @property
    def is_interrupted(self) -> bool:
        """As of every consumer; the park file is a part of us."""
        return super().is_interrupted or self.park is not None and self.park.is_interrupted

    def mark(self) -> Mark:
        """Return a mark that is settled once all that was put before is settled and the sink has
        flushed."""
        with self._lock:
            mark = Mark(self._taken + len(self._backlog), self.health().pending)
            if self.is_closed:
                mark.settle(False)
            else:
                self._marks.append(mark)
                self._news.notify_all()
        return mark

    # -- the courier's thread: its turns --

    def _run(self) -> None:
        try:
            if self._open():
                while (batch := self._next_batch()) is not None:
                    if batch:
                        self._settle(batch)
                    else:
                        self._flush()
                    self._log_losses()
                if self._failure is None:
                    self._call_once(self.sink, "close")
        finally:
            with self._lock:
                self._end("failed")
            self._log_losses(is_last=True)
            self._call_once(self._loop, "close")
            self._close_park()
            _carried.pop(id(self.sink), None)
            self._opened.set()  # last: whoever is refused may register the sink again

    def _open(self) -> bool:
        """Open the sink, however long it takes; False if it refuses for good."""
        while True:
            try:
                self._loop.call(self.sink, "open")
            except BaseException as error:
                # as in `_guarded`, but whoever registers the sink gets the error itself
                trouble = Trouble.of(error)
                if not issubclass(type(error), TemporarySinkError):
                    self._refuse_registration(error, trouble)
                    return False
            else:
                self._note_success()
                break
            self._opened.set()  # it may come to work: the registration stands, and we keep trying
            wait = self._breaker.failed(trouble, 0).wait
            self._note_trouble(trouble)
            if not self._pause(wait, trouble):
                break  # closing: `write` is the last attempt
        self._opened.set()
        return True

    def _refuse_registration(self, error: BaseException, trouble: Trouble) -> None:
        with self._lock:
            self._last_error = trouble.text
            is_awaited = self._is_awaited
            self._refusal = error if is_awaited else None
        if not is_awaited:
            report(logging.ERROR, "%s does not open: %s", self._title, trouble.text)

    def _next_batch(self) -> Sequence[Record] | None:
        """Wait for something to do and take a batch; it is empty when the sink is to flush, and
        None at the end.

        A batch ends before the first mark. Nobody can tell whether the events that overflow drops
        stood before a mark or behind it: then a flush waits for as many events more, or for an
        empty queue.
        """
        with self._lock:
            self._in_flight = ()
            self._backlog.forget_taken()
            while not self._has_work():
                if self._closing is not None:
                    return None
                self._news.wait(None)
            if len(self._backlog):
                self._linger()
            if self.is_closed:
                return None
            most = min(self._batch_size, len(self._backlog))
            if self._marks:
                most = max(0, min(most, self._marks[0].place - self._taken))
            losses = self._announcements(most)
            self._in_flight = self._backlog.take(min(most, self._batch_size - len(losses)))
            self._taken += len(self._in_flight)
            return (*losses, *self._in_flight)

    def _has_work(self) -> bool:
        """Tell whether the next turn is due; under the lock."""
        if self.park is not None:
            self.park.move_losses(self._losses)
        if self.is_closed or len(self._backlog) or self._marks:
            return True
        # an announcement alone is also the probe of a sink that failed
        return self._announces == "alone" and len(self._losses) > 0 and (
            self._state == "ok" or self._closing is None)

    def _linger(self) -> None:
        """Wait for a full batch as long as the options say, unless somebody waits for us."""
        until = monotonic() + self._options.linger
        while len(self._backlog) < self._batch_size and not (
                self._closing or self.is_closed or self._marks or self._backlog.fill > CROWDED):
            if (left := until - monotonic()) <= 0:
                return
            self._news.wait(left)

    def _flush(self) -> None:
        """Have the sink flush for all marks that are reached."""
        with self._lock:
            due = [mark for mark in self._marks
                   if mark.place <= self._taken or not len(self._backlog)]
        reached = self._failure is None and self._call_once(self.sink, "flush")
        with self._lock:
            for mark in due:
                mark.left = self.health().pending - len(self._backlog)
                mark.settle(reached)
            del self._marks[:len(due)]

    # -- the courier's thread: a batch --

    def _settle(self, batch: Sequence[Record]) -> None:
        """Deliver records, or account for them otherwise."""
        pieces = [batch]  # what is left, the oldest last
        attempts = 0
        while pieces and not self.is_closed:
            piece = pieces.pop()
            trouble = self._failure
            if trouble is None:
                trouble = self._write(piece)
                attempts += 1
            if trouble is None:
                self._note_success(piece)
                attempts = 0
                continue
            decision = self._breaker.failed(trouble, len(piece))
            self._note_trouble(trouble)
            if decision.action == "split":
                middle = len(piece) // 2
                pieces += [piece[middle:], piece[:middle]]
                self._retries += not trouble.is_permanent
            elif decision.action == "retry" and self._pause(decision.wait, trouble):
                pieces.append(piece)
            else:  # given up; or the sink is being closed, and had its last attempt
                if decision.action == "end":
                    self._fail(trouble)
                self._give_up_piece(piece, trouble, attempts)
                attempts = 0

    def _write(self, records: Sequence[Record]) -> Trouble | None:
        # a tuple: nothing that the sink could change is ours
        return self._call(self.sink, "write", Batch(tuple(records)))

    def _note_success(self, piece: Sequence[Record] = ()) -> None:
        """Note that the sink has opened, or taken records."""
        self._breaker.succeeded()
        losses, events = _parted(piece)
        with self._lock:
            self._failing_since = None
            if self.is_closed:
                return  # `_end` has settled the account
            self._state = "ok"
            self._in_flight = self._in_flight[len(events):]
            self._delivered += len(events)
            self._losses.announced(losses)
            if piece and self._announces == "beside":
                self._announces = "alone"
        # a loss is small: it may fit where no event does
        if self._is_said_to_fail and events:
            self._is_said_to_fail = False
            report(logging.WARNING, "%s works again", self._title)

    def _note_trouble(self, trouble: Trouble) -> None:
        """Note that the sink did not do what it was asked for. If it only refuses some events, it
        works."""
        with self._lock:
            self._last_error = trouble.text
            if trouble.is_permanent or self.is_closed:
                return
            if self._failing_since is None:
                self._failing_since = monotonic()
            self._state = "open" if self._breaker.is_open else "retrying"
        if not self._is_said_to_fail:
            self._is_said_to_fail = True
            report(logging.WARNING, "%s failed, and is tried again: %s", self._title, trouble.text)

    def _pause(self, seconds: float, trouble: Trouble) -> bool:
        """Wait before a retry; False when the sink is being closed, and the attempt just made was
        the last."""
        until = monotonic() + seconds
        with self._lock:
            while not self.is_closed:
                if self._closing is not None and until > self._last_retry(*self._closing, trouble):
                    if self._had_last_call:
                        return False
                    # one more attempt for what is in our hands, then one for each that waits
                    self._had_last_call = True
                    break
                if (left := until - monotonic()) <= 0:
                    break
                self._news.wait(left)
            self._retries += 1
            return not self.is_closed

    def _last_retry(self, since: float, until: float, trouble: Trouble) -> float:
        """Return when the last retry may begin, while closing; under the lock.

        A program whose receiver has been down for long is not kept from its end by it.
        """
        if self._failing_since is None or trouble.retry_after is not None:
            return until
        return min(until, self._failing_since + until - since)

    def _fail(self, trouble: Trouble) -> None:
        """Close the sink, which takes nothing any more; what it still has and gets is given up."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = trouble
            self._announces = "never"
            if not self.is_closed:
                self._state = "failed"
        report(logging.ERROR, "%s takes nothing any more, and is closed: %s; the events that wait "
               "and come %s", self._title, trouble.text, self._fate)
        self._call_once(self.sink, "close")

    def _give_up_piece(self, piece: Sequence[Record], trouble: Trouble, attempts: int) -> None:
        """Account for records that the sink did not take and will not get again."""
        losses, events = _parted(piece)
        with self._lock:
            if self.is_closed:
                return  # `_end` has settled the account
            self._in_flight = self._in_flight[len(events):]
            self._give_up(events, trouble.reason, trouble.text, attempts)
            if self._failure is not None:
                self._losses.log_later(trouble.reason, len(events))
                return
            if losses:
                # A sink that refuses such events gets none any more: its other events must not
                # suffer for them. Any other gets them with its next events, not at once again.
                self._announces = "never" if trouble.concerns == "event" else "beside"
        if events:
            report(logging.ERROR, "%s: %d events %s: %s", self._title, len(events), self._fate,
                   trouble.text)
        elif self._announces == "never":
            report(logging.WARNING, "%s refuses EventsLost events and gets none any more: %s",
                   self._title, trouble.text)
        if self._tell_loss is not None:
            self._tell_loss()

    # -- the courier's thread: the sink --

    def _call(self, whom: object, method: str, *arguments: object) -> Trouble | None:
        """Call a method of the sink or its loop, if it has that one. The only door to the sink's
        code."""
        try:
            self._loop.call(whom, method, *arguments)
        except BaseException as error:  # a third party's code on our thread: delivery decides
            return Trouble.of(error)
        return None

    def _call_once(self, whom: object, method: str) -> bool:
        """Call a method that is not tried again; True when nothing went wrong."""
        trouble = self._call(whom, method)
        if trouble is not None:
            self._last_error = trouble.text
            report(logging.ERROR, "%s failed to %s: %s", self._title, method, trouble.text)
        return trouble is None

    # -- what is lost --

    def _shed(self, records: Sequence[Record]) -> None:
        self._give_up(records, "overflow")
        self._losses.log_later("overflow", len(records))

    def refuse(self, kind: int, reason: str, count: int) -> None:
        """As of every consumer; and the sink and the log are told."""
        with self._lock:
            before = self._dropped[reason]
            super().refuse(kind, reason, count)
            self._losses.log_later(reason, self._dropped[reason] - before)

    def _give_up(self, records: Sequence[Record], reason: str, error: str = "",
                 attempts: int = 0) -> None:
        """Park records, or count them as dropped; under the lock."""
        if self.park is None:
            self._drop(reason, kinds_in(records))
        elif records:
            why = error or reason, attempts
            # the file's courier alone looks at a sixth field
            self.park.put(Chunk.of([(*record, why) for record in records]))  # type: ignore[misc]

    def _drop(self, reason: str, kinds: Mapping[int, int]) -> None:
        if kinds:
            super()._drop(reason, kinds)
            self._losses.add(reason, kinds)

    def _announcements(self, events: int) -> list[Record]:
        """Return what a batch of so many ``events`` begins with; under the lock."""
        if self._announces == "alone":
            return self._losses.announcements(self._batch_size)
        if self._announces == "beside" and events:
            return self._losses.announcements(self._batch_size - 1)
        return []

    def move_losses(self, to: Losses) -> None:
        """Of a park file: hand over what is to be announced to the sink."""
        with self._lock:
            to.move_from(self._losses, "park")

    def _wake(self) -> None:
        with self._lock:
            self._news.notify_all()

    def _log_losses(self, *, is_last: bool = False) -> None:
        """Tell the log what was lost unsaid. On the courier's thread: a slow handler must not hold
        up the dispatcher."""
        with self._lock:
            lost = self._losses.due_for_log(is_last=is_last)
        if lost:
            report(logging.WARNING, "%s: %d events %s and %s (%s)", self._title,
                   sum(lost.values()),
                   "did not fit" if self._failure is None else "were not taken",
                   self._fate, ", ".join(f"{reason}: {count}" for reason, count in lost.items()))

    # -- the end --

    def _end(self, reason: str) -> int:
        """Give up what waits and what is under way, and wake all who wait for it: the account is
        closed. Return how many events it was; under the lock."""
        left = [*self._in_flight, *self._backlog.clear()]
        self._in_flight = ()
        self._give_up(left, reason)
        for mark in self._marks:
            mark.settle(False)
        self._marks.clear()
        self._state = "closed"
        self._news.notify_all()
        return len(left)

    def _close_park(self) -> None:
        if self.park is not None:
            self.park.close(monotonic())


def _parted(piece: Sequence[Record]) -> tuple[Sequence[Record], Sequence[Record]]:
    """Return the announcements that a piece begins with, and its events."""
    losses = [record for record in piece if record[2] == LOST]
    return losses, piece[len(losses):]


def options_for(sink: Sink, options: SinkOptions) -> SinkOptions:
    """Return the options with the batches that the sink wishes, unless they name a size. Asks the
    sink: under no lock."""
    ask(prepare, sink)
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
    parks = [courier.park for courier in others if courier.park is not None]
    for courier in others:
        if courier.park is not None:
            courier.join(now + (deadline - now) * 0.9)  # a tenth of the time is the disk's
    for courier in [*parks, *(each for each in others if each.park is None)]:
        courier.join(deadline)


def _park_courier(options: SinkOptions, name: str, scheduler: str,
                  tell_loss: Callable[[], object]) -> Courier:
    """Return the courier to the park file that a sink's options name. It takes what it is given
    until its queue is full, and then nothing more."""
    try:
        from ..park.park import ParkFile
    except ModuleNotFoundError as error:
        raise SinkError(f"SinkOptions(park={show(options.park)}): {MissingPart('park')}") from error
    assert options.park is not None
    file = ParkFile(options.park, options.park_bytes, name, options.park_mode)
    # An overflow sheds up to MOST_TAKEN records at once, however small the queue is, and again
    # before the disk is done. An event that is too large for the sink's queue fits into this one.
    bounds = SinkOptions(queue_size=max(options.queue_size, 4 * MOST_TAKEN),
                         queue_bytes=max(options.queue_bytes, BATCH_TEXT), overflow="drop_newest")
    return Courier(name, file, bounds, scheduler, tell_loss)
