"""The condition of workers and sinks at one moment: frozen figures, without a live object.

Loaded when somebody first asks for one, as the events are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Literal


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
    stack: str
    """Where it was then: the stack from the function of the task that was past its deadline inward,
    as in a traceback; of a command its processes. Empty where that cannot be told, as without the
    GIL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonedTask:
    """A task that is over here, past its deadline, and whose code may still run on the executor."""

    task_id: str
    """The task."""
    task_name: str
    """Its name."""
    where: str
    """The process that runs it, as in "process 4711 on host"."""
    since_utc: datetime
    """When it was over here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerHealth:
    """The workers of one scheduler at one moment, from `Scheduler.health`."""

    max_workers: int
    """Most threads that take tasks from the queue, as set at the start or by ``resize``. With an
    executor: how many workers it says to have at most, else those that are known."""
    workers: int
    """Threads that take tasks from the queue; they are started as they are needed. Stuck ones are
    none of them. With an executor: the processes that have run a task and are connected."""
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
    abandoned: tuple[AbandonedTask, ...] = ()
    """With an executor: the tasks that are over here while it may still run them, the longest
    first. They go from here when the executor says that they have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkHealth:
    """The account and the condition of one sink at one moment.

    At every quiet moment ``emitted == delivered + coalesced + dropped + parked + pending``.
    """

    emitted: int = 0
    """Events meant for this sink, those refused on the way included."""
    delivered: int = 0
    """Events that a ``write`` of the sink took without raising."""
    coalesced: int = 0
    """Progress events of which a newer one took the place in a full queue."""
    dropped: int = 0
    """Events given up; the reasons stand in ``dropped_by_reason``."""
    parked: int = 0
    """Events written to the park file instead."""
    pending: int = 0
    """Events that wait in the queue or are being written."""
    dropped_by_reason: Mapping[str, int] = field(default_factory=dict)
    """"overflow", "intake", "oversize", "refused", "failed", "closed", ... -> events; adds up to
    ``dropped``."""
    state: Literal["ok", "retrying", "open", "failed", "closed"] = "ok"
    """"open" is the circuit breaker's: too many failures in a row, or the sink has its events held
    until somebody mends it; one probe now and then. "failed": the sink takes nothing any more;
    until it is unregistered, what comes is parked, or dropped as "closed"."""
    lag: float = 0.0
    """Age in seconds of the oldest pending event."""
    retries: int = 0
    """Attempts after a first one that failed."""
    last_error: str | None = None
    """Type and text of the sink's latest failure; stays after a recovery."""


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What `flush` achieved; truthy when all that was emitted before the call is delivered."""

    pending: Mapping[str, int]
    """Sink name -> events emitted before the call that were still waiting when it returned (0 when
    done)."""
    lost: Mapping[str, int]
    """Sink name -> events that it never got since its registration: dropped or parked, not
    coalesced."""
    done: bool
    """False when the timeout ended the flush."""

    def __bool__(self) -> bool:
        return self.done and not any(self.pending.values()) and not any(self.lost.values())
