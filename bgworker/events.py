"""What happened to a task, as frozen data: the DTOs that sinks, subscriptions and the history hand out.

No live object sits in a DTO: no exception, frame, argument or result. Times are aware UTC datetimes with
microseconds; ids are 32 hex digits that sort by creation time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

TYPE_CHECKING = False  # `typing` itself would cost a fifth of `import bgworker`; type checkers know this name
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, Literal, Union


class _Text(str, Enum):
    """An enum whose members are, print and format as their wire value (as 3.11's StrEnum, on 3.10 too)."""

    __str__ = str.__str__

    def __format__(self, spec: str) -> str:
        return str.__format__(self, spec)


class TaskStatus(_Text):
    """Where a task is in its life: created -> scheduled -> running -> one of the final five."""

    CREATED = "created"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    INTERRUPTED = "interrupted"
    """Only ever shown by a reader of the history: the task's process died before the task ended."""

    @property
    def is_final(self) -> bool:
        """True when nothing more will happen to the task."""
        return self not in (TaskStatus.CREATED, TaskStatus.SCHEDULED, TaskStatus.RUNNING)


class EventType(_Text):
    """What an event tells; the values are the wire names."""

    TASK_CREATED = "TaskCreated"
    TASK_SCHEDULED = "TaskScheduled"
    TASK_STARTED = "TaskStarted"
    TASK_PROGRESS = "TaskProgress"
    TASK_OUTPUT = "TaskOutput"
    TASK_ERROR = "TaskError"
    TASK_WARNING = "TaskWarning"
    TASK_VERBOSE = "TaskVerbose"
    TASK_COMPLETED = "TaskCompleted"
    TASK_FAILED = "TaskFailed"
    TASK_CANCELLED = "TaskCancelled"
    TASK_TIMED_OUT = "TaskTimedOut"
    EVENTS_LOST = "EventsLost"

    @property
    def is_terminal(self) -> bool:
        """True for the last event of a task."""
        return self in (EventType.TASK_COMPLETED, EventType.TASK_FAILED, EventType.TASK_CANCELLED,
                        EventType.TASK_TIMED_OUT)

    @property
    def is_stream(self) -> bool:
        """True for what the task's own code says: output, error, warning, verbose and progress."""
        return self in (EventType.TASK_PROGRESS, EventType.TASK_OUTPUT, EventType.TASK_ERROR, EventType.TASK_WARNING,
                        EventType.TASK_VERBOSE)


class StreamType(_Text):
    """The streams of a task."""

    OUTPUT = "output"
    ERROR = "error"
    WARNING = "warning"
    VERBOSE = "verbose"
    PROGRESS = "progress"


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
    """Seconds from start to end on the monotonic clock; None until the end, and for a task that never ran."""
    timeout: float | None = None
    """Seconds that the task may run; None is no limit."""
    last_progress_percent: float | None = None
    """0..100; None when unknown."""
    last_progress_message: str | None = None
    script_id: str | None = None
    """``module:qualname`` of the callable, or the program's name for a shell task."""
    script_hash: str | None = None
    """sha256 of the source, 64 hex digits; of the name where there is no source (builtins, shell tasks)."""
    script_text: str | None = None
    """The source itself, only with ``record_source``."""
    arguments: str | None = None
    """JSON text ``{"args": [...], "kwargs": {...}}``, only with ``record_arguments``."""
    failure_type: str | None = None
    """Class name of the exception of a failed task, with its module unless that is ``builtins``."""
    failure_message: str | None = None
    """The exception's text; why it was cancelled, for a cancelled task."""
    invocation_info: str | None = None
    """Traceback text of a failed task."""
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
    """1, 2, 3 ... per task over all of its events, streams included; the terminal event has the greatest."""
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
    """True when ``payload`` was cut at the scheduler's ``max_payload``."""
    original_bytes: int = 0
    """UTF-8 bytes before the cut; 0 when nothing was cut."""
    percent: float | None = None
    """0..100 for progress with a known total; else None."""
    message: str = ""
    """The message of a progress event."""


@dataclass(frozen=True, slots=True)
class LossEvent:
    """Events that one sink did not get. The first thing that the sink is told when it works again."""

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
