"""How the workers of a scheduler fare at one moment: frozen figures, without a live object."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StuckThread:
    """A thread that is still in the code of a task that is over: past its deadline, or given up at
    shutdown."""

    thread: str
    """The thread's name, as debuggers and ``threading.enumerate()`` show it."""
    task_id: str
    """The task whose code the thread is in; of tasks that run inside one another, the innermost."""
    task_name: str
    """That task's name."""
    since_utc: datetime
    """When the thread was left to itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerHealth:
    """The workers of one scheduler at one moment, from `Scheduler.health`."""

    max_workers: int
    """Most threads that take tasks from the queue, as set at the start or by ``resize``."""
    workers: int
    """Threads that take tasks from the queue; they are started as they are needed. Stuck ones are
    none of them."""
    idle: int
    """Those of them that have no task."""
    running: int
    """Tasks that run. Tasks that wait for others of the pool count, and so do those others."""
    pending: int
    """Tasks that wait for a worker."""
    stuck: tuple[StuckThread, ...]
    """The threads that are stuck, the longest first. ``max_stuck`` of them are replaced."""
    replaced: int
    """How often a thread took the place of a stuck one since the start."""
    late_events: int
    """Events discarded since the start because they came after their task's end."""
