"""Where events go: one transport per module. A concrete sink is imported when something first asks
for it."""

from __future__ import annotations

from .base import HookSink, Sink
from .specs import SinkSpecError, open_sink, sinks_from_environ

__all__ = ["HookSink", "Sink", "SinkSpecError", "open_sink", "sinks_from_environ"]
