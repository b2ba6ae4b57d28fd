"""bgworker runs Python callables and shell commands on background threads and keeps a faithful
record of what they did.

    from bgworker import Scheduler

    with Scheduler(sinks=["jsonl:debug.jsonl"]) as pool:
        print(pool.submit(len, "hello").result())

What is dear to import (the DTOs, sinks, retries' details, the shell) is loaded when it is first
used.
"""

from __future__ import annotations

from .model.enums import EventType, StreamType, TaskStatus
from .model.errors import (
    BgworkerError,
    ConfigurationError,
    HistoryError,
    MissingPart,
    PendingFull,
    PermanentSinkError,
    PoolDeadlock,
    PoolStuck,
    RemoteError,
    ShutdownError,
    SinkError,
    TaskCancelled,
    TaskTimedOut,
    TemporarySinkError,
    UnknownTask,
    WireError,
)
from .running.options import TaskOptions
from .running.scheduler import Scheduler
from .running.task import Task, TaskContext, checkpoint, current_task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .delivery.options import SinkOptions
    from .delivery.retry import RetryPolicy
    from .delivery.subscription import Subscription
    from .history.reader import History
    from .history.sink import SqliteSink
    from .model.events import Event, LifecycleEvent, LossEvent, StreamEvent, TaskSnapshot
    from .model.health import (
        AbandonedTask,
        FlushReport,
        SchedulerHealth,
        SinkHealth,
        StuckThread,
    )
    from .remote.resumable import resumable
    from .remote.resume import Resumed, SkippedTask
    from .shell.command import shell
    from .sinks import open_sink
    from .sinks.base import HookSink, Sink
    from .sinks.jsonl import JsonlSink
    from .webhook.sink import WebhookSink

__version__ = "0.1.0"

_LEFT_OUT: tuple[str, ...] = ()
"""Parts that this copy lacks: `tools/vendor.py --without` writes their names here."""

_LAZY = {
    "Event": "model.events",
    "LifecycleEvent": "model.events",
    "LossEvent": "model.events",
    "StreamEvent": "model.events",
    "TaskSnapshot": "model.events",
    "AbandonedTask": "model.health",
    "FlushReport": "model.health",
    "SchedulerHealth": "model.health",
    "SinkHealth": "model.health",
    "StuckThread": "model.health",
    "HookSink": "sinks.base",
    "Sink": "sinks.base",
    "open_sink": "sinks",
    "JsonlSink": "sinks.jsonl",
    "SinkOptions": "delivery.options",
    "RetryPolicy": "delivery.retry",
    "Subscription": "delivery.subscription",
    "shell": "shell.command",
    "History": "history.reader",
    "SqliteSink": "history.sink",
    "WebhookSink": "webhook.sink",
    "Resumed": "remote.resume",
    "SkippedTask": "remote.resume",
    "resumable": "remote.resumable",
}

__all__ = [
    "AbandonedTask",
    "BgworkerError",
    "ConfigurationError",
    "Event",
    "EventType",
    "FlushReport",
    "History",
    "HistoryError",
    "HookSink",
    "JsonlSink",
    "LifecycleEvent",
    "LossEvent",
    "MissingPart",
    "PendingFull",
    "PermanentSinkError",
    "PoolDeadlock",
    "PoolStuck",
    "RemoteError",
    "Resumed",
    "RetryPolicy",
    "Scheduler",
    "SchedulerHealth",
    "ShutdownError",
    "Sink",
    "SinkError",
    "SinkHealth",
    "SinkOptions",
    "SkippedTask",
    "SqliteSink",
    "StreamEvent",
    "StreamType",
    "StuckThread",
    "Subscription",
    "Task",
    "TaskCancelled",
    "TaskContext",
    "TaskOptions",
    "TaskSnapshot",
    "TaskStatus",
    "TaskTimedOut",
    "TemporarySinkError",
    "UnknownTask",
    "WebhookSink",
    "WireError",
    "checkpoint",
    "current_task",
    "open_sink",
    "resumable",
    "shell",
]


for _name in [name for name, module in _LAZY.items() if module.partition(".")[0] in _LEFT_OUT]:
    __all__.remove(_name)


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    part = _LAZY[name].partition(".")[0]
    if part in _LEFT_OUT:
        raise MissingPart(part)
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
