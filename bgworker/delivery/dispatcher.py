"""The one thread that numbers: it drains the intake, gives each event its ``seq``, and fans out to
every courier.

Guarantees. Per task, ``seq`` is 1, 2, 3 ... in the order of the intake, without a gap; the terminal
event is the last, what comes after it is counted as late. Every courier is handed the same records
in the same order. No user code runs here and no sink is waited for: a courier's `put` appends to a
queue, dropping what does not fit.

Because one thread numbers and enqueues, there is no race between "take a number" and "enqueue".
"""

from __future__ import annotations

import logging
import threading
from itertools import count, repeat

from ..model.clock import monotonic
from ..model.failure import describe_failure
from ..model.latch import Latch
from ..model.records import COMPLETED, CREATED, PROGRESS, SCHEDULED
from ..model.reports import report
from ..model.text import sanitise
from ..model.threads import own_thread
from .backlog import END_COST, Chunk, text_of_task
from .intake import BACKSTOP, LIMIT, RECORD_COST, SLOT, Intake, cost, cost_of_lines, costs
from .tails import MOST_KEPT, Tails

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol, TypeVar

    from ..model.records import Record, TaskState
    from .consumer import Consumer
    from .intake import Emitted

    T = TypeVar("T")

    class Sinks(Protocol):
        """What the registry of the consumers does at the turns of a dispatcher's life."""

        def start_inherited(self) -> tuple[Consumer, ...]: ...
        def start_afresh(self, consumers: Sequence[Consumer]) -> None: ...
        def close_all(self, deadline: float) -> None: ...

    class Memory(Protocol):
        """What keeps the tasks that have ended."""

        def retire(self, ended: list[TaskState]) -> None: ...
        def note(self, state: TaskState) -> None: ...

GATHER = 0.05
"""Seconds that the dispatcher lets events come in before it works: one wake-up for many events
keeps the GIL with the tasks (measured: p99.9 of an emit at 20 us pace is 1.6 us so, 14 us at 2
ms)."""



class Dispatcher:
    """Numbers and fans out.

    Args:
        name: of the scheduler; threads are named after it.
        memory: told on the dispatcher's thread of the tasks whose terminal event was just fanned
            out, and on any thread of those that `end_unheard`.
        close_timeout: seconds that all sinks together get to finish.
    """

    def __init__(
        self, name: str, memory: Memory, close_timeout: float
    ) -> None:
        self.intake = Intake()
        self.closed = Latch()
        """Set when everything is delivered or counted as lost, and the sinks are closed."""
        self._name = name
        self._memory = memory
        self.close_timeout = close_timeout
        self._tails = Tails()  # the dispatcher's thread alone uses it
        # those that get events; the dispatcher's thread alone sets it
        self._consumers: tuple[Consumer, ...] = ()
        self._refused_before: dict[tuple[int, str], int] = {}
        self._is_finishing = False
        self._has_drained = False  # what is in the intake now, stays there
        self.lock = threading.RLock()
        """Guards the start of the thread, the setting of ``sinks``, and the reading of a tally.
        Re-entrant: the garbage collector may run a finaliser in here that comes back."""
        self.sinks: Sinks | None = None
        """Set by whoever makes a registry, under ``lock``."""
        self._thread: threading.Thread | None = None
        self.has_started = False
        """True once there is a thread that drains the intake; no property, because each `submit`
        asks."""

    def start(self) -> None:
        """Start the thread if it does not run yet; never again after `finish`."""
        with self.lock:
            if self._thread is None and not self.closed.is_set():
                if self.sinks is not None:
                    self.set_consumers(self.sinks.start_inherited())
                thread = own_thread(f"{self._name}-dispatcher", self._begin)
                try:
                    self._thread = thread
                    thread.start()
                    self.has_started = True
                except BaseException:
                    # an interrupt, too: should it start after all, it finds that it is not wanted
                    self._thread = None
                    self.has_started = False
                    raise

    def start_afresh(self) -> None:
        """In a forked child, which has no thread but its own: empty queues, sinks that open on
        first use.

        The intake of the parent's tasks is closed, so that those say nothing here; their record is
        the parent's.
        """
        self.intake.close()
        if self.closed.is_set():
            return
        self.closed = Latch()
        self.intake = Intake()
        self.lock = threading.RLock()
        self._thread = None
        self._tails = Tails()
        self.has_started = False
        self._refused_before = {}
        consumers, self._consumers = self._consumers, ()
        if self.sinks is not None:
            self.sinks.start_afresh(consumers)

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        """Those that get events. The dispatcher's thread."""
        return self._consumers

    def set_consumers(self, consumers: tuple[Consumer, ...]) -> bool:
        """Hand events to these from now on; False when there will be none any more. The
        dispatcher's thread."""
        self.pass_refusals()
        if self._is_finishing or self.closed.is_set():
            return False
        self._consumers = consumers
        self.intake.crowded_above = min([LIMIT, *[each.most_waiting for each in consumers]]) // 8
        self.intake.is_heard = bool(consumers)
        return True

    @property
    def is_this_thread(self) -> bool:
        """True when the caller is the dispatcher."""
        return self._thread is threading.current_thread()

    def waits_for_caller(self) -> bool:
        """True when the caller is one of those that delivery ends with: the dispatcher, a sink, the
        callback of a subscription, or a finaliser in the midst of one of them. To wait there for
        the end is to wait for oneself."""
        return self.is_this_thread or any([each.is_this_thread for each in self._consumers])

    def call(self, function: Callable[[], T]) -> T | None:
        """Run ``function`` between two events on the dispatcher's thread, after all that was
        emitted before the call.

        Any thread; when the dispatcher has ended, on the caller's. ``function`` is our own, and
        does not block. A finaliser in the midst of a consumer, for which the dispatcher may wait,
        gets None at once; ``function`` is run later.
        """
        done = Latch()
        results: list[T] = []

        def run() -> None:
            try:
                results.append(function())
            finally:
                done.set()

        if (
            self.has_started
            and self._thread is not threading.current_thread()
            and self.intake.post(run)
        ):
            # `post` may find the intake open and append after the last look at it: then nobody will
            # run the action
            if any([each.is_interrupted for each in self._consumers]):
                return None
            while not done.wait(0.05) and not self._has_drained:
                pass
        return results[0] if results else function()

    def end_unheard(self, state: TaskState, kind: int) -> None:
        """Do with the end of a task what this thread would do with its record, on the caller's
        thread: the intake holds no record of the task, and nobody listens.

        Whoever begins to listen meanwhile says so (``is_heard``) and *then* looks at
        ``state.ended``; this writes that and *then* looks whether somebody listens. Whichever comes
        second sees the other.
        """
        state.seq += 1
        state.ended = kind
        self._memory.note(state)
        if self.intake.is_heard:
            self.intake.post(lambda: self._tell_the_end(state))

    def _tell_the_end(self, state: TaskState) -> None:
        chunk = Chunk.of([(state, state.seq, state.ended, state.completed_ns, None)])
        for consumer in self._consumers:
            if not consumer.is_closed:
                consumer.put(chunk)

    def sync(self) -> None:
        """Have all that was emitted before the call numbered and fanned out."""
        self.call(lambda: None)

    def late_events(self) -> int:
        """Return how many events were discarded so far because they came after their task's end.
        Any thread."""
        self.sync()
        with self.lock:  # a tally has one reader at a time
            return self.intake.late.read()

    def finish(self) -> None:
        """Refuse what is emitted from now on, deliver the rest within the close timeout, and end.
        Returns at once."""
        with self.lock:
            if self._thread is None:
                self.intake.close()
                self.closed.set()
                return
        self.intake.post(self._close_intake)

    # -- the dispatcher's thread --

    def _close_intake(self) -> None:
        self._is_finishing = True
        self.intake.close()

    def _begin(self) -> None:
        # not before `start` has made up its mind: of two threads each would number
        with self.lock:
            is_wanted = self._thread is threading.current_thread()
        if is_wanted:
            self._run()

    def _run(self) -> None:
        intake = self.intake
        # while something comes at each turn, the thread does not declare itself asleep: it wakes
        # once a turn instead of twice, and no emitter rings
        is_flowing = False
        while not self._is_finishing:
            if not is_flowing:
                intake.wait(BACKSTOP)
            intake.gather(GATHER)
            is_flowing = self._drain()
        self._drain()  # what slipped in between the last look and the close
        self._has_drained = True
        try:
            if self.sinks is not None:
                self.sinks.close_all(monotonic() + self.close_timeout)
        except Exception as error:  # the thread's boundary
            _report_defect("at its end", error)
        finally:  # whatever happens, nobody waits for us for ever
            self.closed.set()

    def _drain(self) -> bool:
        """Dispatch what is there; True if there was something."""
        was_something = False
        try:
            for _ in range(self.intake.turns):
                if emitted := self.intake.take():
                    was_something = True
                    self._dispatch(emitted)
                self._allow()
            self.pass_refusals()
            if any([each.has_ended for each in self._consumers]):
                self.set_consumers(tuple(each for each in self._consumers if not each.has_ended))
            self.intake.congested = any([each.is_crowded for each in self._consumers])
        except Exception as error:
            # the thread's boundary: a defect in here must not silence every task after it
            _report_defect("on a batch of events", error)
        return was_something

    def _allow(self) -> None:
        """Let the intake hold as much as the queues have room for; all that it can where there is
        no queue."""
        consumers = self._consumers
        self.intake.allow(sum([each.room for each in consumers]) if consumers else LIMIT * SLOT)

    def _dispatch(self, emitted: Sequence[Emitted]) -> None:
        """Number records and fan them out; where the intake holds a posted action, run it between
        its neighbours."""
        while emitted:
            records: list[Record] = []
            ended: list[TaskState] = []
            done, chunk = self._number(emitted, records, ended)
            if records:
                for consumer in self._consumers:
                    consumer.put(chunk)
            if ended:
                self._memory.retire(ended)
            if done == len(emitted):
                return
            try:
                emitted[done][3]()
            except Exception as error:
                # a defect in one action must not swallow what stands behind it
                _report_defect("in an action", error)
            emitted = emitted[done + 1:]

    def _number(
        self, emitted: Sequence[Emitted], records: list[Record], ended: list[TaskState]
    ) -> tuple[int, Chunk]:
        """Number records up to the first posted action; return how many and the chunk for the
        couriers."""
        append = records.append
        progress = 0
        # stream records and their weights by task: a tail is extended once a batch, and no text is
        # measured twice
        kept: dict[TaskState, tuple[list[Record], list[int]]] = {}
        last = None
        keep: Callable[[Record], object]
        weigh: Callable[[int], object]
        # else life-cycle records are only numbered: nobody gets them, no tail keeps them
        is_heard = bool(self._consumers)
        streams = size = unseen = 0
        done = -1
        for done, (state, kind, ns, data) in enumerate(emitted):
            if state is None:
                done -= 1
                break
            if state.ended:
                for _ in data if data.__class__ is list else (data,):
                    self.intake.late.add()
                continue
            seq = state.seq = state.seq + 1
            if kind < PROGRESS and not is_heard:
                if kind == CREATED:
                    state.seq = 2
                elif kind >= COMPLETED:
                    state.ended = kind
                    ended.append(state)
            elif kind >= PROGRESS:
                if state is not last:
                    last = state
                    fresh, weights = kept.setdefault(state, ([], []))
                    keep, weigh = fresh.append, weights.append
                if data.__class__ is str:
                    if data.isascii() and "\0" not in data:
                        weigh(RECORD_COST + len(data))
                    else:
                        data = sanitise(data)
                        weigh(RECORD_COST + 4 * len(data))  # as in `cost`
                    record = (state, seq, kind, ns, data)
                elif data.__class__ is list:  # a block of lines: see `Intake.emit_lines`
                    lines = list(zip(repeat(state), count(seq), repeat(kind), repeat(ns), data))
                    state.seq += len(lines) - 1
                    records += lines
                    # a tail holds no more, and to weigh each line takes most of the time
                    last_weights = costs(data[-MOST_KEPT:])
                    fresh += lines[-MOST_KEPT:]
                    weights += last_weights
                    streams += len(lines) - len(last_weights)
                    size += cost_of_lines(data) - sum(last_weights)
                    continue
                else:
                    record = (state, seq, kind, ns, data)
                    weigh(cost(kind, data))
                    if kind == PROGRESS:
                        state.recorded_percent, state.recorded_message = data
                        progress += 1
                append(record)
                keep(record)
            else:
                if kind == CREATED:  # one record for two events: a task is queued as it is made
                    append((state, 1, CREATED, ns, None))
                    state.seq = seq = 2
                    kind = SCHEDULED
                elif kind >= COMPLETED:
                    state.ended = kind
                    ended.append(state)
                    # an interrupt struck `submit` before it returned the task: nobody has it
                    if seq == 1:
                        unseen += 1
                        continue
                    if (kind > COMPLETED or state.arguments or state.metadata_json
                            or state.result):
                        size += text_of_task(state)
                append((state, seq, kind, ns, None))
        for state, (fresh, weights) in kept.items():
            streams += len(weights)
            size += sum(weights)
            self._tails.extend(state, fresh, weights)
        self._tails.trim()
        text = size - streams * RECORD_COST
        size += (len(records) - streams) * RECORD_COST + (len(ended) - unseen) * (
            END_COST - RECORD_COST
        )
        return done + 1, Chunk(records, streams, progress, size, text)

    def pass_refusals(self) -> None:
        """Tell every courier what the intake refused since the last time."""
        for kind, reason, total in self.intake.take_refusals():
            news = total - self._refused_before.get((kind, reason), 0)
            self._refused_before[kind, reason] = total
            if news:
                for consumer in self._consumers:
                    consumer.refuse(kind, reason, news)


def _report_defect(where: str, error: Exception) -> None:
    report(logging.ERROR, "bgworker's dispatcher failed %s; please report this\n%s", where,
           describe_failure(error, 8192)[2] or "")
