"""What `emit` touches: one deque, one doorbell, one bound.

Guarantees. `Intake.emit` appends one tuple and returns. It takes no lock, does no I/O, calls no user code, never blocks
and never raises, whatever the sinks do, and may be called from any thread, from a signal handler, from ``__del__`` during
garbage collection, and from inside a sink. What it refuses is counted, exactly.

This rests on three properties of CPython: ``deque.append``, ``deque.popleft`` and ``next(itertools.count())`` are each one
atomic step; reads and writes of attributes by several threads are seen in program order; and releasing a raw lock takes no
other lock (``queue.Queue``, ``Event`` and ``Condition`` do, and deadlock when a signal handler or a finaliser
interrupts their owner).

The doorbell is rung only when the consumer has declared itself asleep. No wake-up is lost: the consumer sets ``_asleep`` and
*then* looks at the deque; an emitter appends and *then* looks at ``_asleep``. Whichever comes second sees the other.
"""

from __future__ import annotations

from _thread import allocate_lock
from collections import deque
from itertools import count
from time import time_ns

from ..model.records import LOST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Tuple

    from ..model.records import TaskState

    Emitted = Tuple[TaskState | None, int, int, Any]

LIMIT = 100_000
"""Most records that wait for the dispatcher; then stream records are refused and counted."""

MOST_TAKEN = 16_384
"""Most records that `Intake.take` returns: bounds the memory between the intake and the sinks' queues."""


RECORD_COST = 256
"""Bytes that a waiting event is taken to cost beside its text."""

CALM_BYTES = 8 * 1024 * 1024
"""Bytes of records that wait here, beyond which who can wait does, though no sink has so small a queue."""


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
    """The one way in. Emitters call `emit`; the dispatcher's thread alone calls `wait`, `gather` and `take`.

    Args:
        limit: records that may wait, life-cycle records apart: those are never refused, their number is bounded by the
            tasks'.
    """

    __slots__ = ("_records", "_crowd", "_limit", "_bell", "_asleep", "_urgent", "_closed", "_refusals", "_has_refused",
                 "late", "congested", "calm", "calm_bytes", "_lines", "_lines_lock")

    def __init__(self, limit: int = LIMIT) -> None:
        self._records: deque[Emitted] = deque()
        self._limit = limit
        self._crowd = limit // 4  # from here on emits ask the dispatcher to hurry: a burst gathers no more memory than need be
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
        self.calm = limit // 8
        """Records that may wait here before who can wait should; the dispatcher fits it to the smallest queue."""
        self.calm_bytes = CALM_BYTES
        """Likewise the bytes that they may take."""
        self._lines = 0  # in the blocks that wait here
        self._lines_lock = allocate_lock()  # guards it; only readers of pipes and the dispatcher take it

    def emit(self, state: TaskState, kind: int, data: object) -> None:
        """Append one stream record, with the one clock reading that it gets. Any thread; see the module's guarantees."""
        records = self._records
        if len(records) < self._crowd:
            records.append((state, kind, time_ns(), data))
            if self._asleep:
                self._ring()
        else:
            self._emit_crowded(state, kind, data)

    def emit_lines(self, state: TaskState, kind: int, lines: list[str]) -> None:
        """Append lines of clean text that came at the same moment, as one block: for who has waited for room.

        One record for a thousand lines makes a chatty command three times as fast. Takes a lock: not for signal handlers.
        """
        if self._closed:
            for _ in lines:
                self.late.add()
            return
        if len(self._records) + self._lines >= self._limit:
            for _ in lines:
                self.refuse(kind, "intake")
            return
        with self._lines_lock:
            self._lines += len(lines)
        self._records.append((state, kind, time_ns(), lines))
        if self._asleep:
            self._ring()

    def emit_lifecycle(self, state: TaskState, kind: int, ns: int) -> None:
        """Append a life-cycle record of the time ``ns``; refused only after `close`. As safe as `emit`."""
        if self._closed:
            self.late.add()
            return
        self._records.append((state, kind, ns, None))
        if self._asleep:
            self._ring()

    def _emit_crowded(self, state: TaskState, kind: int, data: object) -> None:
        if self._closed:
            self.late.add()
        elif len(self._records) < self._limit:
            self._records.append((state, kind, time_ns(), data))
            if not self._urgent:
                self.hurry()
        else:
            self.refuse(kind, "intake")
            if not self._urgent:
                self.hurry()

    def refuse(self, kind: int, reason: str) -> None:
        """Count an event that is not taken; ``reason`` is "intake" or "oversize". As safe as `emit`."""
        self._refusals[reason][kind].add()
        self._has_refused = True
        if self._asleep:
            self._ring()

    def post(self, action: Callable[[], object]) -> bool:
        """Have the dispatcher's thread run ``action`` after everything emitted so far; False when closed."""
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

    def calm_for(self, size: int) -> int:
        """Return how many records with ``size`` bytes of text may wait here before who can wait should."""
        return max(1, min(self.calm, self.calm_bytes // (size + RECORD_COST)))

    def is_crowded(self, calm: int) -> bool:
        """True when who can wait (a pipe's reader) should: a healthy sink's queue is getting full, or more than ``calm``
        records wait here."""
        return not self._closed and (self.congested or len(self._records) + self._lines > calm)

    def close(self) -> None:
        """Refuse what comes from now on, counting it as late."""
        self._closed = True
        self._crowd = -1

    # -- the dispatcher's side --

    def wait(self, backstop: float) -> None:
        """Sleep until something is there, or ``backstop`` seconds have passed."""
        self._asleep = True
        if not self._records and not self._has_refused:
            self._bell.acquire(True, backstop)
        self._asleep = False

    def gather(self, seconds: float) -> None:
        """Let more come in for ``seconds``, unless somebody is in a hurry. Emitters don't ring meanwhile."""
        if not self._urgent:
            self._bell.acquire(True, seconds)

    def take(self) -> list[Emitted]:
        """Return and remove the oldest records, at most `MOST_TAKEN` with the lines of blocks; one block at least."""
        self._urgent = False
        popleft = self._records.popleft
        count = len(self._records)  # first: the lines of a block are counted before it is appended
        if self._lines:
            return self._take_blocks(count)
        return [popleft() for _ in range(min(count, MOST_TAKEN))]

    def _take_blocks(self, count: int) -> list[Emitted]:
        taken: list[Emitted] = []
        lines = 0
        while len(taken) < count and len(taken) + lines < MOST_TAKEN:
            record = self._records.popleft()
            taken.append(record)
            if record[3].__class__ is list:
                lines += len(record[3])
        with self._lines_lock:
            self._lines -= lines
        return taken

    def take_refusals(self) -> list[tuple[int, str, int]]:
        """Return ``(kind, reason, total)`` of all refusals so far, or nothing when there is no news."""
        if not self._has_refused:
            return []
        self._has_refused = False  # before reading: what comes during the reading raises it again
        return [(kind, reason, total) for reason, tallies in self._refusals.items()
                for kind, tally in enumerate(tallies) if (total := tally.read())]
