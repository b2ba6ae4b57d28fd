"""What `emit` touches: one deque, one doorbell, one bound.

Guarantees. `Intake.emit` appends one tuple and returns. It takes no lock, does no I/O, calls no
user code, never blocks and never raises, whatever the sinks do, and may be called from any thread,
from a signal handler, from ``__del__`` during garbage collection, and from inside a sink. What it
refuses is counted, exactly.

The length of the deque is the account of memory: a slot stands for `SLOT` bytes. A record with more
text than goes into one slot is followed by as many empty slots (None) as its text takes, in one
atomic ``extend``; `take` leaves them out. So one comparison bounds the intake by bytes, without a
counter that two threads could both change.

This rests on three properties of CPython: ``deque.append``, ``deque.extend`` of a `repeat`,
``deque.popleft`` and ``next(itertools.count())`` are each one atomic step; several threads see
reads and writes of attributes in program order; and to release a raw lock takes no other lock
(``queue.Queue``, ``Event`` and ``Condition`` do, and deadlock when a signal handler or a finaliser
interrupts their owner).

The doorbell is rung only when the dispatcher has declared itself asleep. No wake-up is lost: the
dispatcher sets ``_asleep`` and *then* looks at the deque; an emitter appends and *then* looks at
``_asleep``. Whichever comes second sees the other. Without the GIL only a full fence would keep
that order, and an emit has none: there the dispatcher looks around unasked, see `BACKSTOP`.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock
from collections import deque
from itertools import count, repeat
from time import time_ns

from ..model.records import LOST, OUTPUT, PROGRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Tuple

    from ..model.records import TaskState

    Emitted = Tuple[TaskState | None, int, int, Any]

RECORD_COST = 256
"""Bytes of memory that a waiting event is taken to cost beside its text; measured are 232."""

TUPLE_COST = 112
"""Bytes that an event costs besides when its data is not just a text."""

SLOT = RECORD_COST
"""Bytes that a slot of the intake stands for: an event with a short text, or as many more bytes of
a long one."""

LIMIT = 100_000
"""Most slots that wait for the dispatcher; then stream records are refused and counted."""

RESERVED = 8_192
"""Slots that may wait (2 MiB) though all queues are full. How many more may wait depends on the
room in the queues."""

MOST_SLOTS = RESERVED // 2
"""Most slots that one record takes: a text larger than the bound would never come through."""

UNWEIGHED = 25_000
"""Records that may wait before `Intake.emit` weighs those that follow; it takes short ones only.
From here on emits ask the dispatcher to hurry: a burst gathers no more memory than need be."""

SHORT = 256
"""Most characters of a text that is short."""

MOST_TAKEN = 4_096
"""Most slots that `Intake.take` empties: bounds the memory between the intake and the sinks'
queues."""

BACKSTOP = 60.0 if getattr(sys, "_is_gil_enabled", lambda: True)() else 0.75
"""Seconds after which the dispatcher looks around unasked: with the GIL for the unforeseen, without
it for a ring that was lost because two processors saw a store and a load in different orders."""


class Tally:
    """A counter that any thread and any signal handler may raise and loses no step, without a lock.

    ``x += 1`` is three steps and loses some; ``next(count())`` is one.
    """

    __slots__ = ("add", "_peeked")

    def __init__(self) -> None:
        self.add: Callable[[], int] = count().__next__
        self._peeked = 0

    def read(self) -> int:
        """Return how often `add` was called by others. One reader at a time."""
        value = self.add() - self._peeked
        self._peeked += 1  # looking is a step too
        return value


class Intake:
    """The one way in. Emitters call `emit`; the dispatcher's thread alone calls `wait`, `gather`,
    `take` and `allow`.

    Args:
        limit: slots that may wait, life-cycle records apart: those are never refused, their number
            is bounded by the tasks'.
    """

    __slots__ = ("_records", "_unweighed", "_most", "_limit", "_bell", "_asleep", "_urgent",
                 "_closed", "_refusals", "_has_refused",
                 "late", "congested", "crowded_above", "is_heard")

    def __init__(self, limit: int = LIMIT) -> None:
        self._records: deque[Emitted | None] = deque()
        self._most = self._limit = limit
        self._unweighed = min(UNWEIGHED, limit // 4)
        self._bell = allocate_lock()
        self._bell.acquire()
        self._asleep = False
        self._urgent = False
        self._closed = False
        self._refusals: dict[str, list[Tally]] = {reason: [Tally() for _ in range(LOST)]
                                                  for reason in ("intake", "oversize")}
        self._has_refused = False
        self.late = Tally()
        """Records that came after their task's terminal event, or after `close`."""
        self.congested = False
        """Written by the dispatcher: a healthy sink's queue is getting full."""
        self.is_heard = False
        """Written by the dispatcher: somebody gets life-cycle records. If not, they are only
        counted, in ``TaskState.seq``, and the thread that would emit one may count it."""
        self.crowded_above = limit // 8
        """With more waiting slots than this the intake is crowded; the dispatcher fits the number
        to the smallest queue."""

    def emit(self, state: TaskState, kind: int, data: object) -> None:
        """Append one stream record of at most `SHORT` characters, with the one clock reading that
        it gets. Any thread; see the module's guarantees."""
        records = self._records
        if len(records) < self._unweighed:
            records.append((state, kind, time_ns(), data))
            if self._asleep:
                self._ring()
        else:
            self.emit_weighed(state, kind, data)

    def emit_weighed(self, state: TaskState, kind: int, data: Any, ns: int = 0) -> None:
        """Append one stream record with as many slots as its text takes, or refuse it. As safe as
        `emit`. It is of now, or of the time ``ns``."""
        if self._closed:
            self.late.add()
            return
        if data.__class__ is str:
            slots = 1 + (len(data) if data.isascii() else 4 * len(data)) // SLOT
        else:
            slots = cost(kind, data) // SLOT
        if slots > MOST_SLOTS:
            slots = MOST_SLOTS
        records = self._records
        waiting = len(records)
        if waiting + slots > self._limit:
            self.refuse(kind, "intake")
        else:
            records.append((state, kind, ns or time_ns(), data))
            if slots > 1:
                records.extend(repeat(None, slots - 1))
        if waiting >= self._unweighed and not self._urgent:
            self.hurry()
        elif self._asleep:
            self._ring()

    def emit_lines(self, state: TaskState, kind: int, lines: list[str], ns: int = 0) -> None:
        """Append lines of clean text that came at the same moment (now, or at ``ns``), as one
        block. The caller has waited for room.

        One record for a thousand lines makes a chatty command three times as fast.
        """
        slots = cost_of_lines(lines) // SLOT
        if self._closed:
            for _ in lines:
                self.late.add()
        elif len(self._records) + slots > self._limit:
            for _ in lines:
                self.refuse(kind, "intake")
        else:
            self._records.extend(
                ((state, kind, ns or time_ns(), lines), *repeat(None, slots - 1)))
            if self._asleep:
                self._ring()

    def emit_lifecycle(self, state: TaskState, kind: int, ns: int) -> None:
        """Append a life-cycle record of the time ``ns``; refused only after `close`. As safe as
        `emit`."""
        if self._closed:
            self.late.add()
            return
        self._records.append((state, kind, ns, None))
        if self._asleep:
            self._ring()

    def refuse(self, kind: int, reason: str) -> None:
        """Count an event that is not taken; ``reason`` is "intake" or "oversize". As safe as
        `emit`."""
        self._refusals[reason][kind].add()
        self._has_refused = True
        if self._asleep:
            self._ring()

    def post(self, action: Callable[[], object]) -> bool:
        """Have the dispatcher's thread run ``action`` after everything emitted so far; False when
        closed."""
        if self._closed:
            return False
        self._records.append((None, 0, 0, action))
        self.hurry()
        return True

    def hurry(self) -> None:
        """End the dispatcher's sleep or gathering now. Any thread, safe as `emit`."""
        self._urgent = True
        self._ring()

    def _ring(self) -> None:
        self._asleep = False
        try:
            self._bell.release()
        except RuntimeError:
            pass  # another emitter rang between our look and our release: one ring wakes for both

    def room_for(self, size: int) -> int:
        """Return how many records with ``size`` bytes of text may be emitted before the next look
        at `is_crowded`."""
        return max(1, self.crowded_above // (8 * ((RECORD_COST + size) // SLOT)))

    @property
    def is_crowded(self) -> bool:
        """True when a healthy sink's queue is getting full, or much waits here: a caller that can
        wait, such as the reader of a pipe, should."""
        return not self._closed and (self.congested or len(self._records) > self.crowded_above)

    def close(self) -> None:
        """Refuse what comes from now on, counting it as late."""
        self._closed = True
        self._unweighed = -1

    # -- the dispatcher's side --

    def allow(self, bytes: int) -> None:
        """Bound what waits here: the queues of all sinks have room for so many ``bytes``."""
        if not self._closed:
            self._limit = min(self._most, RESERVED + bytes // SLOT)
            self._unweighed = min(UNWEIGHED, self._limit // 4)

    def wait(self, backstop: float) -> None:
        """Sleep until something is there, or ``backstop`` seconds have passed."""
        self._asleep = True
        if not self._records and not self._has_refused:
            self._bell.acquire(True, backstop)
        self._asleep = False

    def gather(self, seconds: float) -> None:
        """Let more come in for ``seconds``, unless somebody is in a hurry. Emitters don't ring
        meanwhile."""
        if not self._urgent:
            self._bell.acquire(True, seconds)

    def take(self) -> list[Emitted]:
        """Return and remove the oldest records; empties at most `MOST_TAKEN` slots."""
        self._urgent = False
        popleft = self._records.popleft
        return list(filter(None, [popleft() for _ in range(min(len(self._records), MOST_TAKEN))]))

    @property
    def turns(self) -> int:
        """How often `take` has to be called for all that waits now."""
        return len(self._records) // MOST_TAKEN + 1

    def take_refusals(self) -> list[tuple[int, str, int]]:
        """Return ``(kind, reason, total)`` of all refusals so far, or nothing when there is no
        news."""
        if not self._has_refused:
            return []
        self._has_refused = False  # before reading: what comes during the reading raises it again
        return [(kind, reason, total) for reason, tallies in self._refusals.items()
                for kind, tally in enumerate(tallies) if (total := tally.read())]


def cost(kind: int, data: Any) -> int:
    """Return the bytes of memory that a waiting stream record is estimated at."""
    if data.__class__ is str:
        return RECORD_COST + (len(data) if data.isascii() else 4 * len(data))
    text = data[1] if kind == PROGRESS else data[0]
    return RECORD_COST + TUPLE_COST + (len(text) if text.isascii() else 4 * len(text))


def costs(lines: list[str]) -> list[int]:
    """Return what `cost` estimates for each of many lines of text, in half the time."""
    if all(map(str.isascii, lines)):
        return [RECORD_COST + length for length in map(len, lines)]
    return [cost(OUTPUT, line) for line in lines]


def cost_of_lines(lines: list[str]) -> int:
    """Return the sum of `costs`; of ASCII text, by looking at all of it at once, in an eighth of
    the time."""
    text = "".join(lines)
    return RECORD_COST * len(lines) + len(text) if text.isascii() else sum(costs(lines))
