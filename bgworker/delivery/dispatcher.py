"""The one thread that numbers: it drains the intake, gives each event its ``seq``, and fans out to every courier.

Guarantees. Per task, ``seq`` is 1, 2, 3 ... in the order of the intake, without a gap; the terminal event is the last, what
comes after it is counted as late. Every courier is handed the same records in the same order. No user code runs here and
no sink is waited for: a courier's `put` appends to a queue, dropping what does not fit.

Because one thread numbers and enqueues, there is no race between "take a number" and "enqueue".
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from itertools import count
from time import monotonic

from ..errors import ConfigurationError, ShutdownError, SinkError
from ..records import COMPLETED, CREATED, PROGRESS, SCHEDULED
from ..text import sanitise
from .backlog import RECORD_COST, Chunk, cost
from .courier import Courier, Mark, close_all
from .intake import LIMIT, MOST_TAKEN, Intake
from .options import FlushReport, SinkHealth, SinkOptions, event_types, kinds_of
from .subscription import Subscription

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any, TypeVar

    from ..events import Event, EventType
    from ..records import Record, TaskState
    from ..sinks.base import Sink
    from .intake import Emitted

    T = TypeVar("T")

GATHER = 0.05
"""Seconds that the dispatcher lets events come in before it works: one wake-up for many events keeps the GIL with the
tasks (measured: p99.9 of an emit at 20 us pace is 1.6 us so, 14 us at 2 ms)."""

BACKSTOP = 60.0
"""Seconds after which the dispatcher looks around unasked; the doorbell loses no wake-up, so this is for the unforeseen."""

TAIL_BYTES = 65_536
"""Most bytes of stream events that stay in memory per task, an event counting `TAIL_RECORD_COST` beside its text."""
TAIL_RECORD_COST = 64

logger = logging.getLogger(__name__.partition(".")[0])


class Dispatcher:
    """Numbers and fans out; the scheduler's way to its sinks.

    Args:
        name: of the scheduler; threads are named after it.
        on_ended: called on the dispatcher's thread with the tasks whose terminal event was just fanned out.
        close_timeout: seconds that all sinks together get to finish.
    """

    def __init__(self, name: str, on_ended: Callable[[list[TaskState]], object], close_timeout: float) -> None:
        self.intake = Intake()
        self.closed = threading.Event()
        """Set when everything is delivered or counted as lost, and the sinks are closed."""
        self._name = name
        self._on_ended = on_ended
        self.close_timeout = close_timeout
        self._couriers: tuple[Courier, ...] = ()  # those that get events; the dispatcher's thread alone sets it
        self._subscriptions: tuple[Subscription, ...] = ()  # likewise
        self._subscribed = count(1).__next__
        self._refused_before: dict[tuple[int, str], int] = {}
        self._is_finishing = False
        self._has_drained = False  # what is in the intake now, stays there
        self._lock = threading.Lock()  # guards the start of the thread and the names of the sinks
        self._sinks: dict[str, Courier] = {}
        self._inherited: list[Courier] = []  # in a forked child: those that wait for its first task
        self._thread: threading.Thread | None = None

    @property
    def has_started(self) -> bool:
        """True once there is a thread that drains the intake."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread if it does not run yet; never again after `finish`."""
        with self._lock:
            if self._thread is None and not self.closed.is_set():
                inherited, self._inherited = self._inherited, []
                for courier in inherited:
                    courier.start_inherited()
                self._set_couriers(tuple(inherited))
                thread = threading.Thread(target=self._run, name=f"{self._name}-dispatcher", daemon=True)
                thread.start()
                self._thread = thread

    def start_afresh(self) -> None:
        """In a forked child, which has no thread but its own: empty queues, sinks that open on first use.

        The intake of the parent's tasks is closed, so that those say nothing here; their record is the parent's.
        """
        self.intake.close()
        if self.closed.is_set():
            return
        self.closed = threading.Event()
        self.intake = Intake()
        self._lock = threading.Lock()
        self._thread = None
        self._refused_before = {}
        self._couriers = ()
        self._subscriptions = ()
        self._sinks = {name: courier.twin() for name, courier in self._sinks.items() if courier.is_open}
        self._inherited = list(self._sinks.values())

    # -- sinks; any thread --

    def register(self, sink: Sink | str, name: str | None, options: SinkOptions | None, config: dict[str, Any]) -> str:
        """Open a sink and let it have all that is emitted from now on; return its name.

        Raises:
            SinkError: the specification is wrong, or the sink refuses to open.
            ConfigurationError: the name is taken, or an option is none.
        """
        sink, kind = _open_spec(sink, config)
        if options is not None and not isinstance(options, SinkOptions):
            raise ConfigurationError(f"options: expected a SinkOptions or None, got {options!r}")
        self.start()
        with self._lock:
            if name is None:
                name = next(each for n in count(1) if (each := kind if n == 1 else f"{kind}-{n}") not in self._sinks)
            elif name in self._sinks and self._sinks[name].is_open:
                raise ConfigurationError(f"name: a sink called {name!r} is registered already; choose another name, "
                                         "or unregister it first")
            courier = Courier(name, sink, options or SinkOptions(), f"{self._name}-sink-{name}")
            self._sinks[name] = courier
        try:
            courier.start(self.close_timeout)
            # waited for: what the intake refuses from now on is this sink's too, and is passed to who is attached
            if not self.call(lambda: self._attach(courier)):
                raise ShutdownError(f"cannot register sink {name!r} after shutdown")
        except BaseException:
            courier.close()
            with self._lock:
                del self._sinks[name]
            raise
        return name

    def register_of_environment(self) -> None:
        """Register the sinks that the environment variable BGWORKER_SINKS names, and tell where a wrong one stands."""
        if not os.environ.get("BGWORKER_SINKS"):
            return
        from ..sinks.base import sinks_from_environ

        for spec in sinks_from_environ():
            try:
                self.register(spec, None, None, {})
            except SinkError as error:
                raise SinkError(f"the environment variable BGWORKER_SINKS asks for it: {error}") from error

    def unregister(self, name: str, timeout: float) -> SinkHealth:
        """Let a sink finish what it has been given, close it and return its final account, by ``timeout`` at the latest.

        Raises:
            KeyError: no sink has that name.
        """
        deadline = monotonic() + timeout
        with self._lock:
            courier = self._sinks[name]
        self.call(lambda: self._set_couriers(tuple(each for each in self._couriers if each is not courier)))
        close_all([courier], deadline)
        with self._lock:
            self._sinks.pop(name, None)
        return courier.health()

    def subscribe(self, callback: Callable[[Event], object] | None, state: TaskState | None,
                  types: Collection[EventType | str] | None, maxsize: int) -> Subscription:
        """Return a subscription to what is emitted from now on; one to a task begins with what is in memory of it."""
        kinds = None if types is None else kinds_of(event_types(types))
        subscription = Subscription(f"{self._name}-subscription-{self._subscribed()}", state, kinds, maxsize,
                                    self._unsubscribe)

        def attach() -> None:
            self._pass_refusals()
            subscription.begin()
            if self._is_finishing:
                subscription.end()
            elif not subscription.is_closed:
                self._subscriptions += (subscription,)

        self.call(attach)
        if callback is not None:
            subscription.call(callback)
        return subscription

    def _unsubscribe(self, subscription: Subscription) -> None:
        def detach() -> None:
            self._subscriptions = tuple(each for each in self._subscriptions if each is not subscription)

        self.call(detach)

    def health(self) -> dict[str, SinkHealth]:
        """Return the account and the condition of every sink, by name; after `finish` the final ones."""
        with self._lock:
            couriers = list(self._sinks.values())
        return {courier.name: courier.health() for courier in couriers}

    def flush(self, timeout: float | None) -> FlushReport:
        """Have all that was emitted before the call delivered, and the sinks flushed."""
        deadline = None if timeout is None else monotonic() + timeout
        marks = self.call(self._mark)
        done = True
        for _, mark in marks:
            done &= mark.wait(None if deadline is None else max(0.0, deadline - monotonic()))
        left = {courier.name: mark.left for courier, mark in marks}  # what comes during the flush does not count
        health = self.health()
        return FlushReport(pending={name: min(each.pending, left.get(name, 0)) for name, each in health.items()},
                           lost={name: each.dropped + each.parked for name, each in health.items()}, done=done)

    def _mark(self) -> list[tuple[Courier, Mark]]:
        self._pass_refusals()  # what was refused before the flush is lost before the flush
        return [(courier, courier.mark()) for courier in self._couriers]

    def _attach(self, courier: Courier) -> bool:
        if self._is_finishing or self.closed.is_set():
            return False
        self._set_couriers((*self._couriers, courier))
        return True

    def _set_couriers(self, couriers: tuple[Courier, ...]) -> None:
        self._pass_refusals()
        self._couriers = couriers
        self.intake.calm = min([LIMIT, *(courier.queue_size for courier in couriers)]) // 8

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` between two events on the dispatcher's thread, after all that was emitted before the call.

        Any thread; when the dispatcher has ended, on the caller's. ``function`` is our own, and does not block.
        """
        done = threading.Event()
        results: list[T] = []

        def run() -> None:
            try:
                results.append(function())
            finally:
                done.set()

        if self.has_started and self._thread is not threading.current_thread() and self.intake.post(run):
            # `post` may find the intake open and append after the last look at it: then nobody will run the action
            while not done.wait(0.05) and not self._has_drained:
                pass
        return results[0] if results else function()

    def sync(self) -> None:
        """Have all that was emitted before the call numbered and fanned out."""
        self.call(lambda: None)

    def finish(self) -> None:
        """Refuse what is emitted from now on, deliver the rest within the close timeout, and end. Returns at once."""
        if self._thread is None:
            self.intake.close()
            self.closed.set()
        else:
            self.intake.post(self._close_intake)

    # -- the dispatcher's thread --

    def _close_intake(self) -> None:
        self._is_finishing = True
        self.intake.close()

    def _run(self) -> None:
        intake = self.intake
        while not self._is_finishing:
            intake.wait(BACKSTOP)
            intake.gather(GATHER)
            self._drain()
        self._drain()  # what slipped in between the last look and the close
        self._has_drained = True
        deadline = monotonic() + self.close_timeout
        for subscription in self._subscriptions:
            subscription.end()
        close_all(self._couriers, deadline)
        for subscription in self._subscriptions:
            if not subscription.join(deadline):
                logger.error("the callback of %s did not finish in time and is left to itself", subscription.name)
        self.closed.set()

    def _drain(self) -> None:
        try:
            while len(emitted := self.intake.take()) == MOST_TAKEN:
                self._dispatch(emitted)
            self._dispatch(emitted)
            self._pass_refusals()
            self.intake.congested = any(courier.is_crowded for courier in self._couriers)
        except Exception:  # the thread's boundary: a defect in here must not silence every task after it
            logger.exception("bgworker's dispatcher failed on a batch of events; please report this")

    def _dispatch(self, emitted: Sequence[Emitted]) -> None:
        """Number records and fan them out; where the intake holds a posted action, run it between its neighbours."""
        while emitted:
            records: list[Record] = []
            ended: list[TaskState] = []
            done, chunk = self._number(emitted, records, ended)
            if records:
                for outlet in self._outlets():
                    outlet.put(chunk)
            if ended:
                self._on_ended(ended)
            if done == len(emitted):
                return
            try:
                emitted[done][3]()
            except Exception:  # a defect in one action must not swallow what stands behind it
                logger.exception("an action of bgworker's dispatcher failed; please report this")
            emitted = emitted[done + 1:]

    def _number(self, emitted: Sequence[Emitted], records: list[Record], ended: list[TaskState]) -> tuple[int, Chunk]:
        """Number records up to the first posted action; return how many and the chunk for the couriers."""
        append = records.append
        progress = lifecycle = size = 0
        count = -1
        for count, (state, kind, ns, data) in enumerate(emitted):
            if state is None:
                count -= 1
                break
            if state.ended:
                self.intake.late.add()
                continue
            seq = state.seq = state.seq + 1
            if kind > PROGRESS:
                if data.__class__ is str:
                    if data.isascii():
                        length = len(data)
                        if "\0" in data:
                            data = sanitise(data)
                            length *= 4  # it is ASCII no more, and counts as in `cost`
                    else:
                        data = sanitise(data)
                        length = 4 * len(data)
                else:
                    length = len(data[0]) if data[0].isascii() else 4 * len(data[0])
                size += length
                append(_keep(state, (state, seq, kind, ns, data), length))
            elif kind == PROGRESS:
                state.recorded_percent, state.recorded_message = data
                length = len(data[1]) if data[1].isascii() else 4 * len(data[1])
                size += length
                progress += 1
                append(_keep(state, (state, seq, kind, ns, data), length))
            else:
                lifecycle += 1
                if kind == CREATED:  # one record for two events: a task is queued as it is made
                    append((state, 1, CREATED, ns, None))
                    state.seq = seq = 2
                    kind = SCHEDULED
                    lifecycle += 1
                elif kind >= COMPLETED:
                    state.ended = True
                    ended.append(state)
                append((state, seq, kind, ns, None))
        streams = len(records) - lifecycle
        return count + 1, Chunk(records, streams, progress, size + streams * RECORD_COST)

    def _outlets(self) -> tuple[Courier | Subscription, ...]:
        return (*self._couriers, *self._subscriptions)

    def _pass_refusals(self) -> None:
        """Tell every courier what the intake refused since the last time."""
        for kind, reason, total in self.intake.take_refusals():
            news = total - self._refused_before.get((kind, reason), 0)
            self._refused_before[kind, reason] = total
            if news:
                for outlet in self._outlets():
                    outlet.refuse(kind, reason, news)


def _keep(state: TaskState, record: Record, length: int) -> Record:
    """Keep a record in its task's bounded tail; a quarter of a full one goes at once, so that few calls trim."""
    tail = state.tail
    if tail is None:
        tail = state.tail = deque()
    tail.append(record)
    state.tail_bytes += length + TAIL_RECORD_COST
    if state.tail_bytes > TAIL_BYTES:
        while len(tail) > 1 and state.tail_bytes > TAIL_BYTES * 3 // 4:
            state.tail_bytes -= cost(tail.popleft()) - RECORD_COST + TAIL_RECORD_COST
    return record


def _open_spec(sink: Sink | str, config: dict[str, Any]) -> tuple[Sink, str]:
    """Return the sink that ``sink`` is or specifies, and what to call it."""
    if isinstance(sink, str):
        from ..sinks.base import open_sink

        return open_sink(sink, **config), sink.partition(":")[0]
    if config:
        raise ConfigurationError(f"{', '.join(config)}: settings go with a specification such as 'jsonl:PATH'; "
                                 f"give them to the constructor of {type(sink).__name__} instead")
    if not callable(getattr(sink, "write", None)) or not callable(getattr(sink, "close", None)) or isinstance(sink, type):
        raise ConfigurationError(f"sink: expected an object with write(events) and close(), or a specification such as "
                                 f"'jsonl:PATH', got {sink!r}")
    return sink, type(sink).__name__.lower().removesuffix("sink") or "sink"
