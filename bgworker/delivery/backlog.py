"""What waits for one sink: a queue bounded by count and by bytes, and the order in which things go
when it is full.

A newer progress event replaces the older ones of its task; then stream events go, the oldest or the
newest first; life-cycle events have room of their own, as many as ``size``, and only the oldest of
those beyond it go. No thread and no lock: the courier that owns it guards it.
"""

from __future__ import annotations

from collections import deque
from itertools import chain

from ..model.records import COMPLETED, LOST, PROGRESS
from .intake import RECORD_COST, cost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..model.records import Record, TaskState


END_COST = RECORD_COST + 640
"""Bytes that a terminal event is taken to cost, with the task that it keeps in memory."""

BATCH_TEXT = 2 ** 20
"""Most bytes of text that are taken at once: a sink makes as much again of them, and more, to write
them."""

ENOUGH = 2_000
"""Records that are a good batch: no chunk is parted for more."""


def weight(record: Record) -> int:
    """Return the bytes of memory that a waiting record is estimated at; the dispatcher counts
    alike."""
    state, kind, data = record[0], record[2], record[4]
    if kind >= PROGRESS:
        return cost(kind, data)
    return RECORD_COST if kind < COMPLETED or state is None else END_COST + text_of_task(state)


def text_of_task(state: TaskState) -> int:
    """Return the bytes of the texts that a task which has ended holds in memory: its arguments, its
    metadata, and those of its result or failure. Its terminal event stands for them."""
    size = 0
    for text in (state.metadata_json, state.arguments, state.failure_message,
                 state.invocation_info, state.result):
        if text:
            size += len(text) if text.isascii() else 4 * len(text)
    return size


class Chunk:
    """Numbered records on their way into every backlog, with what a backlog needs to know of them,
    counted once. All backlogs share it: nobody changes it."""

    __slots__ = ("records", "streams", "progress", "bytes", "text")

    def __init__(
        self, records: Sequence[Record], streams: int, progress: int, bytes: int, text: int
    ) -> None:
        self.records = records
        self.streams = streams
        self.progress = progress
        self.bytes = bytes
        self.text = text
        """Bytes of the texts, which are among ``bytes``."""

    @classmethod
    def of(cls, records: Sequence[Record]) -> Chunk:
        """Count them the slow way."""
        kinds = [record[2] for record in records]
        # a call for the odd ones only: half the time
        bytes = sum([RECORD_COST + len(data)
                     if (data := record[4]).__class__ is str and data.isascii() else weight(record)
                     for record in records])
        return cls(records, sum([kind >= PROGRESS for kind in kinds]), kinds.count(PROGRESS), bytes,
                   bytes - sum([_COSTS[kind] for kind in kinds]))

    def head(self, most: int, most_bytes: int, most_text: int) -> Chunk:
        """Return the oldest of the records, as many as fit."""
        if len(self.records) <= most and self.bytes <= most_bytes and self.text <= most_text:
            return self
        head = Chunk.of(self.records[:most])
        if head.bytes > most_bytes or head.text > most_text:
            fitting = size = text = 0
            for record in head.records:
                size += weight(record)
                text += weight(record) - _COSTS[record[2]]
                if size > most_bytes or text > most_text:
                    break
                fitting += 1
            head = Chunk.of(self.records[:fitting])
        return head

    def without(self, head: Chunk) -> Chunk:
        """Return what is behind a `head`."""
        return Chunk(self.records[len(head.records):], self.streams - head.streams,
                     self.progress - head.progress, self.bytes - head.bytes, self.text - head.text)


_COSTS = [END_COST if COMPLETED <= kind < PROGRESS else RECORD_COST for kind in range(LOST + 1)]
"""By kind, the weight of a record without text."""


class Backlog:
    """The records that one sink has still to get, oldest first.

    They wait in the chunks that they came in, and mostly leave in whole chunks: that costs the same
    however many they are. (One by one they took a seventh of the time that tasks have.)

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
        self._spared: list[Record] = []
        self._queue: deque[Chunk] = deque()  # none of them empty
        self._count = 0
        self._streams = 0
        self._bytes = 0
        self._taken = 0  # bytes of what `take` has returned last
        self._progress = 0  # at least the number of progress records in _queue

    def __len__(self) -> int:
        return self._count

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
        if self._spared:
            return self._spared[0][3]
        return self._queue[0].records[0][3] if self._queue else None

    def extend(self, chunk: Chunk) -> tuple[list[Record], list[Record]]:
        """Append; return what had to go instead: the progress records that newer ones replace, and
        the dropped ones.

        Shedding is amortised: its cost is that of the chunks that it sheds from, save where
        progress coalesces.
        """
        if chunk.records:
            self._queue.append(chunk)
        self._count += len(chunk.records)
        self._streams += chunk.streams
        self._bytes += chunk.bytes
        self._progress += chunk.progress
        coalesced: list[Record] = []
        dropped: list[Record] = []
        if self._is_over() and self._progress:
            coalesced = self._coalesce()
        if self._is_over():
            dropped = self._drop_oldest() if self._keep_newest else self._drop_newest()
        if self._has_too_much_life() or self._is_over():
            dropped += self._drop_lifecycle()
        return coalesced, dropped

    def take(self, most: int) -> list[Record]:
        """Remove and return the oldest records, no more than a sink can write at once without much
        memory. What was taken before is done with.

        At least one, if there is any; not always ``most`` where `ENOUGH` are whole chunks.
        """
        self._queue_spared()
        taken: list[Record] = []
        size = text = 0
        while self._queue and len(taken) < most:
            chunk = self._queue[0]
            head = chunk.head(most - len(taken), self._max_bytes // 8 - size, BATCH_TEXT - text)
            if not head.records and not taken:
                head = chunk.head(1, chunk.bytes, chunk.text)
            if head is chunk:
                self._queue.popleft()
            elif not head.records or len(taken) >= ENOUGH:
                break
            else:
                self._queue[0] = chunk.without(head)
            taken += head.records
            size += head.bytes
            text += head.text
            self._streams -= head.streams
            self._progress -= head.progress
            if head is not chunk:
                break
        self._count -= len(taken)
        self._bytes -= size
        self._taken = size
        return taken

    def clear(self) -> list[Record]:
        """Remove and return everything."""
        everything = [*self._spared, *chain.from_iterable([each.records for each in self._queue])]
        self._spared.clear()
        self._queue.clear()
        self._count = self._streams = self._bytes = self._taken = self._progress = 0
        return everything

    def forget_taken(self) -> None:
        """Have done with what was taken last: its bytes count no more."""
        self._taken = 0

    def _queue_spared(self) -> None:
        if self._spared:
            self._queue.appendleft(Chunk.of(self._spared))
            self._spared = []

    def _is_over(self) -> bool:
        return self._streams > self._size or self._bytes + self._taken > self._max_bytes

    def _has_too_much_life(self) -> bool:
        return self._count - self._streams > self._size

    def _forget(self, record: Record) -> None:
        """Take a record out of the account."""
        self._count -= 1
        self._bytes -= weight(record)
        self._streams -= record[2] >= PROGRESS

    def _coalesce(self) -> list[Record]:
        """Remove the progress records that are not their task's newest in the queue."""
        newest: set[object] = set()
        kept: list[Record] = []
        gone: list[Record] = []
        for chunk in reversed(self._queue):
            for record in reversed(chunk.records):
                if record[2] != PROGRESS:
                    kept.append(record)
                elif record[0] in newest:
                    gone.append(record)
                    self._forget(record)
                else:
                    newest.add(record[0])
                    kept.append(record)
        self._queue = deque([Chunk.of(kept[::-1])] if kept else ())
        self._progress = len(newest)
        return gone

    def _drop_oldest(self) -> list[Record]:
        gone: list[Record] = []
        while self._streams and self._is_over():
            chunk = self._queue.popleft()
            for place, record in enumerate(chunk.records):
                if record[2] < PROGRESS:
                    self._spared.append(record)
                elif self._is_over():
                    gone.append(record)
                    self._forget(record)
                else:
                    self._queue.appendleft(Chunk.of(chunk.records[place:]))
                    break
        return gone

    def _drop_newest(self) -> list[Record]:
        # a task's newest progress record has just replaced its elders: it goes after all other
        # streams
        return self._pop_newest(lambda kind: kind > PROGRESS) + self._pop_newest(
            lambda kind: kind == PROGRESS
        )

    def _pop_newest(self, may_go: Callable[[int], bool]) -> list[Record]:
        gone: list[Record] = []
        seen: list[Chunk] = []
        while self._streams and self._is_over() and self._queue:
            kept: list[Record] = []
            for record in reversed(self._queue.pop().records):
                if may_go(record[2]) and self._is_over():
                    gone.append(record)
                    self._forget(record)
                else:
                    kept.append(record)
            if kept:
                seen.append(Chunk.of(kept[::-1]))
        self._queue.extend(reversed(seen))
        return gone

    def _drop_lifecycle(self) -> list[Record]:
        """Drop the oldest life-cycle records: there are more than ``size``, or they alone take more
        than the bytes."""
        self._queue_spared()
        gone: list[Record] = []
        seen: list[Chunk] = []
        while self._queue and (self._has_too_much_life() or self._is_over()):
            kept: list[Record] = []
            for record in self._queue.popleft().records:
                if record[2] < PROGRESS and (self._has_too_much_life() or self._is_over()):
                    gone.append(record)
                    self._forget(record)
                else:
                    kept.append(record)
            if kept:
                seen.append(Chunk.of(kept))
        self._queue.extendleft(reversed(seen))
        return gone
