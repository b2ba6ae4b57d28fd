"""The newest stream events of each task, kept in memory within two bounds: one for each task, one
for all together."""

from __future__ import annotations

from collections import deque

from .backlog import weight
from .intake import RECORD_COST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model.records import Record, TaskState

TAIL_BYTES = 65_536
"""Most bytes of memory that the tail of one task takes; its newest event is there in any case."""

MOST_KEPT = TAIL_BYTES // RECORD_COST
"""Events that a tail holds at most."""

ALL_BYTES = 8 * 1024 * 1024
"""Most bytes of memory that the tails of all tasks together take."""

TAIL_COST = 1024
"""Bytes that a tail is taken to cost beside its events: an empty deque, and the task that it keeps
in memory."""


class Tails:
    """Which tasks have a tail, those that spoke last at the end. One thread alone extends and
    trims."""

    def __init__(self) -> None:
        self._spoken: dict[TaskState, None] = {}
        self._bytes = 0

    def extend(self, state: TaskState, fresh: list[Record], weights: list[int]) -> None:
        """Extend a task's tail; a quarter of a full one goes at once, so that few calls trim.

        Args:
            weights: the bytes of memory of each record.
        """
        tail = state.tail
        before = 0 if tail is None else state.tail_bytes + TAIL_COST
        if tail is None:
            tail = state.tail = deque()
        size = state.tail_bytes + sum(weights)
        # it fills the tail alone: no need to append what goes again
        if size - state.tail_bytes > TAIL_BYTES:
            most = TAIL_BYTES // min(weights)
            size -= sum(weights[:-most])
            fresh = fresh[-most:]
        tail.extend(fresh)
        if size > TAIL_BYTES:
            while len(tail) > 1 and size > TAIL_BYTES * 3 // 4:
                # measured again: to keep the weights too would take half as much memory
                size -= weight(tail.popleft())
        state.tail_bytes = size
        self._bytes += size + TAIL_COST - before
        self._spoken.pop(state, None)
        self._spoken[state] = None

    def trim(self) -> None:
        """Take the tails of those that spoke longest ago, while all together are too large; the
        last one stays."""
        spoken = self._spoken
        while self._bytes > ALL_BYTES and len(spoken) > 1:
            state = next(iter(spoken))
            del spoken[state]
            self._bytes -= state.tail_bytes + TAIL_COST
            state.tail, state.tail_bytes = None, 0
