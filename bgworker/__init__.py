"""bgworker runs Python callables and shell commands on background threads and keeps a faithful record of what they did.

    from bgworker import Scheduler

    with Scheduler(sinks=["jsonl:debug.jsonl"]) as pool:
        print(pool.submit(len, "hello").result())

What is dear to import (sinks, retries' details, the shell) is loaded when it is first used.
"""

from __future__ import annotations

from .errors import (BgworkerError, ConfigurationError, PendingFull, PermanentSinkError, PoolDeadlock, ShutdownError, SinkError,
                     TaskCancelled, TaskTimedOut, TemporarySinkError, WireError)
from .events import (Event, EventType, LifecycleEvent, LossEvent, StreamEvent, StreamType, TaskSnapshot, TaskStatus)
from .scheduler import Scheduler, TaskOptions
from .task import Task, TaskContext, checkpoint, current_task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .command import shell
    from .delivery.options import FlushReport, SinkHealth, SinkOptions
    from .delivery.retry import RetryPolicy
    from .delivery.subscription import Subscription
    from .sinks import open_sink
    from .sinks.base import HookSink, Sink
    from .sinks.jsonl import JsonlSink
    from .sinks.webhook import WebhookSink

__version__ = "0.1.0"

_LAZY = {
    "FlushReport": "delivery.options", "SinkHealth": "delivery.options", "SinkOptions": "delivery.options",
    "RetryPolicy": "delivery.retry", "Subscription": "delivery.subscription", "shell": "command", "HookSink": "sinks.base", "Sink": "sinks.base",
    "open_sink": "sinks", "JsonlSink": "sinks.jsonl",
    "WebhookSink": "sinks.webhook",
}

__all__ = [
    "BgworkerError", "ConfigurationError", "Event", "EventType", "FlushReport", "HookSink", "JsonlSink",
    "LifecycleEvent", "LossEvent", "PendingFull", "PermanentSinkError", "PoolDeadlock", "RetryPolicy", "Scheduler", "ShutdownError", "Sink",
    "SinkError", "SinkHealth", "SinkOptions", "StreamEvent", "StreamType", "Subscription", "Task", "TaskCancelled", "TaskContext",
    "TaskOptions", "TaskSnapshot", "TaskStatus", "TaskTimedOut", "TemporarySinkError", "WebhookSink", "WireError", "checkpoint",
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
