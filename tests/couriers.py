"""A courier on its own, for tests of what it does with a sink. No test is in here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bgworker.delivery.backlog import Chunk
from bgworker.delivery.courier import Courier, close_all, options_for
from bgworker.delivery.options import SinkOptions
from bgworker.delivery.retry import RetryPolicy
from bgworker.model.events import Event, EventType, LossEvent, StreamEvent
from bgworker.model.health import SinkHealth
from bgworker.model.records import OUTPUT, TaskState
from bgworker.model.reports import wait_for_reports
from tests.support import SOON, balanced

if TYPE_CHECKING:
    from bgworker.model.records import Record

FAST = RetryPolicy(attempts=3, base=0.001, cap=0.01)


class Line:
    """A courier and the records that go into it."""

    def __init__(self, sink: Any, **options: Any) -> None:
        self.courier = Courier(
            "it", sink, options_for(sink, SinkOptions(**{"retry": FAST, **options})), "test"
        )
        self._state = TaskState("1" * 32, "task", "r" * 32, 0)
        self._seq = 0

    def record(self, kind: int, data: object = None) -> Record:
        self._seq += 1
        return self._state, self._seq, kind, time.time_ns(), data

    def say(self, *texts: str) -> None:
        self.courier.put(Chunk.of([self.record(OUTPUT, text) for text in texts]))

    def put(self, *records: Record) -> None:
        self.courier.put(Chunk.of(records))

    def flush(self) -> bool:
        return self.courier.mark().wait(SOON)

    def close(self, seconds: float = SOON) -> SinkHealth:
        """Close, which is bounded by a deadline whatever the sink does."""
        close_all([self.courier], time.monotonic() + seconds)
        return self.health()

    def health(self) -> SinkHealth:
        health = self.courier.health()
        assert balanced(health), health
        return health


@contextmanager
def line(sink: Any, **options: Any) -> Iterator[Line]:
    made = Line(sink, **options)
    made.courier.start(SOON)
    try:
        yield made
    finally:
        close_all([made.courier], time.monotonic() + 10)
        wait_for_reports(time.monotonic() + SOON)


def payloads(events: Sequence[Event]) -> list[str]:
    return [
        event.payload
        for event in events
        if isinstance(event, StreamEvent) and event.type == EventType.TASK_OUTPUT
    ]


def losses(events: Sequence[Event]) -> list[tuple[str, int]]:
    return [(event.reason, event.count) for event in events if isinstance(event, LossEvent)]
