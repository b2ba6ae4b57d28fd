"""The words of the record: what status a task has, what an event tells, which stream it belongs
to."""

from __future__ import annotations

from enum import Enum


class _Text(str, Enum):
    """An enum whose members are, print and format as their wire value (as 3.11's StrEnum, on 3.10
    too)."""

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
        return self in (
            EventType.TASK_PROGRESS,
            EventType.TASK_OUTPUT,
            EventType.TASK_ERROR,
            EventType.TASK_WARNING,
            EventType.TASK_VERBOSE,
        )


class StreamType(_Text):
    """The streams of a task."""

    OUTPUT = "output"
    ERROR = "error"
    WARNING = "warning"
    VERBOSE = "verbose"
    PROGRESS = "progress"
