"""What waits for one sink: a queue bounded by count and by bytes, and the order in which things go
when it is full.

A newer progress event replaces the older ones of its task; then stream events go, the oldest or the
newest first; life-cycle events have room of their own, as many as ``size``, and only the oldest of
those beyond it go. No thread and no lock: the courier that owns it guards it.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate

from ..model.records import COMPLETED, PROGRESS
from .intake import RECORD_COST, cost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..model.records import Record, TaskState


END_COST = RECORD_COST + 640
"""Bytes that a terminal event is taken to cost, with the task that it keeps in memory."""

BATCH_TEXT = 2 ** 20
"""Most bytes of text that are taken at once: a sink makes as much again of them, and more, to write
them."""


def weight(record: Record) -> int:
    """Return the bytes of memory that a waiting record is estimated at; the dispatcher counts
    alike."""
    state, kind, data = record[0], record[2], record[4]
    if kind >= PROGRESS:
        return cost(kind, data)
    return RECORD_COST if kind < COMPLETED or state is None else END_COST + text_of_task(state)


def text_of_task(state: TaskState) -> int:
    """Return the bytes of the texts that a task which has ended holds in memory: its arguments, its
    metadata, and those of its failure. Its terminal event stands for them."""
    size = 0
    for text in (state.metadata_json, state.arguments, state.failure_message,
                 state.invocation_info):
        if text:
            size += len(text) if text.isascii() else 4 * len(text)
    return size


class Chunk:
    """Numbered records on their way into every backlog, with what a backlog needs to know of them,
    counted once."""

    __slots__ = ("records", "streams", "progress", "bytes")

    def __init__(self, records: Sequence[Record], streams: int, progress: int, bytes: int) -> None:
        self.records = records
        self.streams = streams
        self.progress = progress
        self.bytes = bytes

    @classmethod
    def of(cls, records: Iterable[Record]) -> Chunk:
        """Count them the slow way."""
        kept = list(records)
        return cls(kept, sum([record[2] >= PROGRESS for record in kept]),
                   sum([record[2] == PROGRESS for record in kept]), sum(map(weight, kept)))


class Backlog:
    """The records that one sink has still to get, oldest first.

    Args:
        size: most stream records, and most life-cycle records.
        max_bytes: most bytes of all records together, those that were taken last included.
        keep_newest: what overflow drops is the oldest (True) or the newest (False).
    """

    def __init__(self, size: int, max_bytes: int, keep_newest: bool = True) -> None:
        self._size = size
        self._max_bytes = max_bytes
        self._keep_newest = keep_newest
        # life-cycle records older than all in _queue: overflow passed them by
        self._spared: deque[Record] = deque()
        self._queue: deque[Record] = deque()
        self._streams = 0
        self._bytes = 0
        self._taken = 0  # bytes of what `take` has returned last
        self._progress = 0  # at least the number of progress records in _queue

    def __len__(self) -> int:
        return len(self._spared) + len(self._queue)

    @property
    def fill(self) -> float:
        """How full it is, by the bound that is nearest: 0 empty, 1 full."""
        return max(self._streams / self._size, (self._bytes + self._taken) / self._max_bytes)

    @property
    def most_waiting(self) -> int:
        """Records with a short text that it holds when it is full."""
        return min(self._size, self._max_bytes // RECORD_COST)

    @property
    def room(self) -> int:
        """Bytes that fit in."""
        return max(0, self._max_bytes - self._bytes - self._taken)

    @property
    def oldest_ns(self) -> int | None:
        """Wall-clock time of the oldest record."""
        first = self._spared or self._queue
        return first[0][3] if first else None

    def extend(self, chunk: Chunk) -> tuple[list[Record], list[Record]]:
        """Append; return what had to go instead: the progress records that newer ones replace, and
        the dropped ones.

        Shedding is amortised: its cost is that of the records shed, save where progress coalesces.
        """
        self._queue.extend(chunk.records)
        self._streams += chunk.streams
        self._bytes += chunk.bytes
        self._progress += chunk.progress
        coalesced: list[Record] = []
        dropped: list[Record] = []
        if self._is_over() and self._progress:
            coalesced = self._coalesce()
        if self._is_over():
            dropped = self._drop_oldest() if self._keep_newest else self._drop_newest()
        if len(self) - self._streams > self._size or self._is_over():
            dropped += self._drop_lifecycle()
        return coalesced, dropped

    def take(self, most: int) -> list[Record]:
        """Remove and return the oldest records, no more than a sink can write at once without much
        memory. What was taken before is done with."""
        self._taken = 0
        waiting, most_bytes = len(self), self._max_bytes // 8
        size = self._bytes
        if waiting <= most and size <= most_bytes and size - waiting * RECORD_COST <= BATCH_TEXT:
            taken = self.clear()
            self._taken = size
            return taken
        taken = []
        for source in (self._spared, self._queue):
            popleft = source.popleft
            taken += [popleft() for _ in range(min(most - len(taken), len(source)))]
        weights = self._forget(taken)
        size = sum(weights)
        if size > most_bytes or size - len(taken) * RECORD_COST > BATCH_TEXT:
            fitting = max(1, sum([size <= most_bytes and size - count * RECORD_COST <= BATCH_TEXT
                                  for count, size in enumerate(accumulate(weights), 1)]))
            self._give_back(taken[fitting:], weights[fitting:])
            del taken[fitting:]
            size = sum(weights[:fitting])
        self._taken = size
        return taken

    def clear(self) -> list[Record]:
        """Remove and return everything."""
        everything = [*self._spared, *self._queue]
        self._spared.clear()
        self._queue.clear()
        self._streams = self._bytes = self._taken = self._progress = 0
        return everything

    def forget_taken(self) -> None:
        """Have done with what was taken last: its bytes count no more."""
        self._taken = 0

    def _give_back(self, records: Sequence[Record], weights: Sequence[int]) -> None:
        # if any is still spared, all that was taken were
        (self._spared or self._queue).extendleft(reversed(records))
        self._bytes += sum(weights)
        self._streams += sum(record[2] >= PROGRESS for record in records)

    def _is_over(self) -> bool:
        return self._streams > self._size or self._bytes + self._taken > self._max_bytes

    def _forget(self, records: Sequence[Record]) -> list[int]:
        """Take records out of the account; return their weights."""
        # a call for the odd ones only: half the time
        weights = [RECORD_COST + len(data)
                   if (data := record[4]).__class__ is str and data.isascii() else weight(record)
                   for record in records]
        self._bytes -= sum(weights)
        self._streams -= sum([record[2] >= PROGRESS for record in records])
        return weights

    def _coalesce(self) -> list[Record]:
        """Remove the progress records that are not their task's newest in the queue."""
        newest: set[object] = set()
        kept: list[Record] = []
        gone: list[Record] = []
        for record in reversed(self._queue):
            if record[2] != PROGRESS:
                kept.append(record)
            elif record[0] in newest:
                gone.append(record)
            else:
                newest.add(record[0])
                kept.append(record)
        self._queue = deque(reversed(kept))
        self._progress = len(newest)
        self._forget(gone)
        return gone

    def _drop_oldest(self) -> list[Record]:
        gone: list[Record] = []
        while self._streams and self._is_over():
            record = self._queue.popleft()
            if record[2] < PROGRESS:
                self._spared.append(record)
            else:
                gone.append(record)
                self._forget((record,))
        return gone

    def _drop_newest(self) -> list[Record]:
        # a task's newest progress record has just replaced its elders: it goes after all other
        # streams
        return self._pop_newest(lambda kind: kind > PROGRESS) + self._pop_newest(
            lambda kind: kind == PROGRESS
        )

    def _pop_newest(self, may_go: Callable[[int], bool]) -> list[Record]:
        gone: list[Record] = []
        spared: list[Record] = []
        while self._streams and self._is_over() and self._queue:
            record = self._queue.pop()
            if may_go(record[2]):
                gone.append(record)
                self._forget((record,))
            else:
                spared.append(record)
        self._queue.extend(reversed(spared))
        return gone

    def _drop_lifecycle(self) -> list[Record]:
        """Drop the oldest life-cycle records: there are more than ``size``, or they alone take more
        than the bytes."""
        excess = len(self) - self._streams - self._size
        too_much = self._bytes + self._taken - self._max_bytes
        gone: list[Record] = []
        kept: list[Record] = []
        for record in (*self._spared, *self._queue):
            if record[2] < PROGRESS and (len(gone) < excess or too_much > 0):
                gone.append(record)
                too_much -= weight(record)
            else:
                kept.append(record)
        self._forget(gone)
        self._spared.clear()
        self._queue = deque(kept)
        return gone
