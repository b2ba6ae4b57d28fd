"""bgworker runs Python callables and shell commands on background threads and keeps a faithful record of what they did.

    from bgworker import Scheduler

    with Scheduler(sinks=["jsonl:debug.jsonl"]) as pool:
        print(pool.submit(len, "hello").result())

What is dear to import (the DTOs, sinks, retries' details, the shell) is loaded when it is first used.
"""

from __future__ import annotations

from .enums import EventType, StreamType, TaskStatus
from .errors import (BgworkerError, ConfigurationError, HistoryError, PendingFull, PermanentSinkError, PoolDeadlock, PoolStuck,
                     ShutdownError, SinkError, TaskCancelled, TaskTimedOut, TemporarySinkError, UnknownTask, WireError)
from .scheduler import Scheduler, TaskOptions
from .task import Task, TaskContext, checkpoint, current_task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .command import shell
    from .delivery.options import FlushReport, SinkHealth, SinkOptions
    from .delivery.retry import RetryPolicy
    from .delivery.subscription import Subscription
    from .events import Event, LifecycleEvent, LossEvent, StreamEvent, TaskSnapshot
    from .health import SchedulerHealth, StuckThread
    from .history import History
    from .sinks import open_sink
    from .sinks.base import HookSink, Sink
    from .sinks.jsonl import JsonlSink
    from .sinks.sqlite import SqliteSink
    from .sinks.webhook import WebhookSink

__version__ = "0.1.0"

_LAZY = {
    "Event": "events", "LifecycleEvent": "events", "LossEvent": "events", "StreamEvent": "events", "TaskSnapshot": "events",
    "FlushReport": "delivery.options", "SinkHealth": "delivery.options", "SinkOptions": "delivery.options",
    "RetryPolicy": "delivery.retry", "Subscription": "delivery.subscription",
    "SchedulerHealth": "health", "StuckThread": "health", "shell": "command",
    "HookSink": "sinks.base", "Sink": "sinks.base", "open_sink": "sinks",
    "JsonlSink": "sinks.jsonl", "SqliteSink": "sinks.sqlite", "WebhookSink": "sinks.webhook",
    "History": "history",
}

__all__ = [
    "BgworkerError", "ConfigurationError", "Event", "EventType", "FlushReport", "History", "HistoryError", "HookSink", "JsonlSink",
    "LifecycleEvent", "LossEvent", "PendingFull", "PermanentSinkError", "PoolDeadlock", "PoolStuck", "RetryPolicy",
    "Scheduler", "SchedulerHealth", "ShutdownError", "Sink", "SinkError", "SinkHealth", "SinkOptions", "SqliteSink",
    "StreamEvent", "StreamType", "StuckThread", "Subscription", "Task", "TaskCancelled", "TaskContext", "TaskOptions",
    "TaskSnapshot", "TaskStatus", "TaskTimedOut", "TemporarySinkError", "UnknownTask", "WebhookSink", "WireError", "checkpoint",
    "current_task", "open_sink", "shell",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
