"""What the dispatcher hands events to: a bounded queue, and the account of what became of them.

Guarantees. Nothing that the dispatcher calls here waits for whoever takes the events from the
queue, nor runs code that is not ours. At every quiet moment ``emitted == delivered + coalesced +
dropped + parked + pending``: each step of an event from one of these to another happens under the
consumer's lock.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter

from ..model.clock import monotonic
from ..model.health import SinkHealth
from .backlog import Backlog, Chunk
from .patience import Patience

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..model.records import Record


LONG_HELD = 1.0
"""Seconds after which `Consumer.health` reads the account without its lock. A finaliser that asks
in the midst of another consumer holds that one's lock, and the holder of ours may be such a
finaliser, too: then each waits for the other."""


class Consumer:
    """A courier or a subscription.

    Args:
        name: for the account.
        kinds: the kinds of records that it gets; None for all.
        backlog: its queue, empty.
        back_pressure: whether those who can wait for it, such as the reader of a command's pipe,
            are to wait while it works and its queue is getting full.
    """

    has_ended = False
    """True when the dispatcher may forget it: there is nothing more to do for it, or to count."""

    def __init__(self, name: str, kinds: frozenset[int] | None, backlog: Backlog,
                 back_pressure: bool) -> None:
        self.name = name
        self._kinds = kinds
        self._patience = Patience() if back_pressure else None  # the dispatcher's thread alone asks
        self._thread: threading.Thread | None = None
        # Guards all below. Re-entrant: the garbage collector may run a finaliser right here, which
        # looks at our health.
        self._lock = threading.RLock()
        self._backlog = backlog
        self._emitted = self._delivered = self._coalesced = 0
        self._dropped: Counter[str] = Counter()  # by reason
        self._state = "ok"

    # -- any thread --

    def health(self) -> SinkHealth:
        """Return the account and the condition at this moment."""
        if self.is_interrupted:
            return self._health()
        try:
            # inside, since an interrupt may strike right after it
            self._lock.acquire(timeout=LONG_HELD)
            health = self._health()
        finally:
            try:
                self._lock.release()
            except RuntimeError:
                pass  # it was never ours
        return health

    def _health(self) -> SinkHealth:
        return SinkHealth(
            emitted=self._emitted, delivered=self._delivered, coalesced=self._coalesced,
            dropped=sum(self._dropped.values()), pending=len(self._backlog),
            dropped_by_reason=dict(self._dropped), state=self._state)  # type: ignore[arg-type]

    @property
    def is_closed(self) -> bool:
        """True when it takes nothing any more; what comes all the same is dropped as "closed"."""
        return self._state == "closed"

    @property
    def is_interrupted(self) -> bool:
        """True when the caller is a finaliser that the garbage collector runs in the midst of us:
        on the thread that holds our lock. If it waits for a thread that waits for us, neither goes
        on."""
        return self._lock._is_owned()  # type: ignore[attr-defined,no-any-return]

    @property
    def is_this_thread(self) -> bool:
        """True when the caller is the sink, or the callback of the subscription, or interrupts
        us."""
        return self._thread is threading.current_thread() or self.is_interrupted

    # -- the dispatcher's thread --

    def put(self, chunk: Chunk) -> None:
        """Queue numbered records; what does not fit is coalesced or given up, and counted."""
        chunk = self._wanted(chunk)
        if not chunk.records:
            return
        with self._lock:
            self._emitted += len(chunk.records)
            if self.is_closed:
                self._drop("closed", kinds_in(chunk.records))
            else:
                coalesced, overflow = self._backlog.extend(chunk)
                self._coalesced += len(coalesced)
                if overflow:
                    self._shed(overflow)
            self._wake()

    def refuse(self, kind: int, reason: str, count: int) -> None:
        """Count events that never got a number, because the intake was full or the event too
        large."""
        if self._kinds is None or kind in self._kinds:
            with self._lock:
                self._emitted += count
                self._drop(reason, {kind: count})
                self._wake()

    def takes(self, kinds: Iterable[int]) -> bool:
        """Tell whether it gets the records of all these kinds."""
        return self._kinds is None or self._kinds.issuperset(kinds)

    @property
    def is_crowded(self) -> bool:
        """True when those who can wait should: the queue is getting full, though it is being
        emptied. Nobody waits for more than some seconds for a sink that fails, hangs, or takes next
        to nothing, until it works again; see `Patience`."""
        return self._patience is not None and self._patience.is_due(
            self._backlog.fill, self._delivered, monotonic()) and self._state == "ok"

    @property
    def most_waiting(self) -> int:
        """Short records that the queue holds when it is full; more than anything where nobody waits
        for that."""
        return sys.maxsize if self._patience is None else self._backlog.most_waiting

    @property
    def room(self) -> int:
        """Bytes that the queue has room for."""
        return self._backlog.room

    # -- for those that derive from this --

    def _wake(self) -> None:
        """Let go on whoever waits for something to do; with the lock held."""
        raise NotImplementedError

    def _wanted(self, chunk: Chunk) -> Chunk:
        """Return what it is to get of a chunk."""
        kinds = self._kinds
        if kinds is None:
            return chunk
        return Chunk.of([record for record in chunk.records if record[2] in kinds])

    def _shed(self, records: Sequence[Record]) -> None:
        """Give up what does not fit; under the lock."""
        self._drop("overflow", kinds_in(records))

    def _drop(self, reason: str, kinds: Mapping[int, int]) -> None:
        """Count events as dropped, by the kinds of their records; under the lock."""
        self._dropped[reason] += sum(kinds.values())


def kinds_in(records: Iterable[Record]) -> Counter[int]:
    """Return how many records there are of each kind."""
    return Counter([record[2] for record in records])
