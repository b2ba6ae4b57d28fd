"""What happened to a task, as frozen data: the DTOs that sinks, subscriptions and the history hand
out.

No live object sits in a DTO: no exception, frame, argument or result. Times are aware UTC datetimes
with microseconds; ids are 32 hex digits that sort by creation time.

Tasks run without this module: `dataclasses` alone costs as much to import as all that a scheduler
needs. It is loaded when somebody first asks for a DTO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .enums import EventType, StreamType, TaskStatus

# `typing` itself would cost a fifth of `import bgworker`; type checkers know this name
TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, Literal, Union

__all__ = [
    "Event",
    "EventType",
    "LifecycleEvent",
    "LossEvent",
    "StreamEvent",
    "StreamType",
    "TaskSnapshot",
    "TaskStatus",
]


@dataclass(frozen=True, slots=True)
class TaskSnapshot:
    """One task at one moment."""

    task_id: str
    """32 hex digits, sorting by creation time."""
    name: str
    """The name given in ``options(name=...)``, else the callable's qualified name."""
    status: TaskStatus
    run_id: str
    """The Scheduler, in one process, that ran the task; same form as ``task_id``."""
    created_utc: datetime
    scheduled_utc: datetime | None = None
    """When it entered the queue."""
    started_utc: datetime | None = None
    """None as long as it has not run."""
    completed_utc: datetime | None = None
    """When it reached its final status."""
    duration: float | None = None
    """Seconds from start to end on the monotonic clock; None until the end, and for a task that
    never ran."""
    timeout: float | None = None
    """Seconds that the task may run; None is no limit."""
    last_progress_percent: float | None = None
    """0..100; None when unknown."""
    last_progress_message: str | None = None
    script_id: str | None = None
    """``module:qualname`` of the callable, or the program's name for a shell task."""
    script_hash: str | None = None
    """sha256 of the source, 64 hex digits; of the name where there is no source (builtins, shell
    tasks)."""
    script_text: str | None = None
    """The source itself, only with ``record_source``."""
    arguments: str | None = None
    """JSON text ``{"args": [...], "kwargs": {...}}``, only with ``record_arguments``; see
    ``max_payload``."""
    failure_type: str | None = None
    """Class name of the exception of a failed task, with its module unless that is ``builtins``."""
    failure_message: str | None = None
    """The exception's text; why it was cancelled, for a cancelled task."""
    invocation_info: str | None = None
    """Traceback text of a failed task."""
    result: str | None = None
    """JSON text of what a completed task returned, only with ``record_result``; see
    ``max_payload``."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What ``options(metadata=...)`` was given, as JSON values; a copy of the snapshot's own."""
    last_seq: int = 0
    """The number of the task's latest event that the snapshot knows of."""


@dataclass(frozen=True, slots=True)
class LifecycleEvent:
    """A task changed its status."""

    type: EventType
    task_id: str
    seq: int
    """1, 2, 3 ... per task over all of its events, streams included; the terminal event has the
    greatest."""
    created_utc: datetime
    task: TaskSnapshot
    """The task as of this event."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A task said something, or reported progress."""

    type: EventType
    task_id: str
    seq: int
    created_utc: datetime
    stream_type: StreamType
    payload: str = ""
    """Text; JSON text when ``format`` is "json"; empty for progress."""
    format: Literal["text", "json"] = "text"
    truncated: bool = False
    """True when ``payload`` is less than was said: text was cut at the scheduler's ``max_payload``,
    JSON gave way to an object with its beginning."""
    original_bytes: int = 0
    """UTF-8 bytes before the cut; 0 when nothing was cut."""
    percent: float | None = None
    """0..100 for progress with a known total; else None."""
    message: str = ""
    """The message of a progress event."""


@dataclass(frozen=True, slots=True)
class LossEvent:
    """Events that one sink did not get. The first thing that the sink is told when it works
    again."""

    type: EventType
    """Always ``EventType.EVENTS_LOST``."""
    created_utc: datetime
    sink: str
    """The name under which the sink is registered."""
    count: int
    reason: str
    """"overflow", "oversize", "intake", "failed", "closed", ..."""
    by_type: Mapping[str, int] = field(default_factory=dict)
    """Wire name of the event type -> how many of them; the values add up to ``count``."""


if TYPE_CHECKING:
    Event = Union[LifecycleEvent, StreamEvent, LossEvent]
else:
    Event = LifecycleEvent | StreamEvent | LossEvent
