"""Events by hand, and in an order in which two histories can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

from bgworker import (
    Event,
    EventType,
    LifecycleEvent,
    LossEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)

NOW = datetime(2026, 11, 23, 14, 46, 0, 123456, tzinfo=timezone.utc)
RUN = "r" * 32


def said(task_id: str, seq: int, text: str = "hello", **more: Any) -> StreamEvent:
    return StreamEvent(EventType.TASK_OUTPUT, task_id, seq, NOW, StreamType.OUTPUT, text, **more)


def ended(task_id: str, seq: int, status: TaskStatus = TaskStatus.COMPLETED,
          **more: Any) -> LifecycleEvent:
    type_ = {"completed": EventType.TASK_COMPLETED, "failed": EventType.TASK_FAILED,
             "running": EventType.TASK_STARTED}[status.value]
    done = None if status is TaskStatus.RUNNING else NOW
    values = {"completed_utc": done, "created_utc": NOW, "run_id": RUN, **more}
    return LifecycleEvent(type_, task_id, seq, NOW, TaskSnapshot(
        task_id=task_id, name="job", status=status, last_seq=seq, **values))


def in_order(events: Iterable[Event]) -> list[Event]:
    """Return the events task by task, and losses at the end."""
    return sorted(events, key=lambda event: ("~", 0) if isinstance(event, LossEvent)
                  else (event.task_id, event.seq))
