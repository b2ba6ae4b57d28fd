"""The threads of a pool: those that run tasks, those that help them, those that leave, and those
that are stuck.

The roster has no thread and no lock of its own: its pool guards it. A thread whose task is past its
deadline is *retired*, and another takes its place. Other tasks may run on the same thread, around
the late one or inside it: as long as one of them does, the pool waits for the thread. Beyond the
workers there are at most ``max_stuck`` threads, helpers not counted.
"""

from __future__ import annotations

import threading
from time import time_ns

from ..model.errors import ShutdownError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import ContextVar
    from queue import SimpleQueue
    from typing import Any, Protocol, Union
    from weakref import ReferenceType

    from ..model.health import SchedulerHealth

    class Work(Protocol):
        """What the threads of a pool need of a `Task`."""

        @property
        def id(self) -> str: ...
        @property
        def name(self) -> str: ...
        @property
        def _has_begun(self) -> bool: ...
        @property
        def _reacts_to_cancel(self) -> bool: ...
        def done(self) -> bool: ...
        def running(self) -> bool: ...
        def _note_watcher(self) -> None: ...
        def _is_watched_by(self, thread: int | None) -> bool: ...
        def _run(self) -> bool: ...
        def _fail(self, error: BaseException) -> bool: ...
        def _end_interrupted(self, error: BaseException) -> None: ...
        def _ask_to_stop(self, reason: str) -> None: ...
        def _stack(self, worker: Worker) -> str: ...

    class Loop(Protocol):
        """What they need of the event loop of one."""

        @property
        def is_in_main(self) -> bool: ...
        def run(self, coroutine: Any, context: Any) -> tuple[Any, BaseException | None]: ...
        def close(self) -> None: ...

    class Notes(Protocol):
        """What they need of the `Waits` of their pool."""

        def forget_all_of(self, worker: Worker) -> None: ...

    Inbox = SimpleQueue[Union[ReferenceType[Work], None]]


class _Here(threading.local):
    worker: Worker | None = None


_here = _Here()  # in the threads of all pools: whose thread it is


class Worker:
    """One thread of a pool, the tasks that it runs, and the tasks that those wait for."""

    __slots__ = (
        "thread",
        "first",
        "running",
        "waits_for",
        "waits",
        "helps",
        "helper",
        "inbox",
        "loop",
        "stuck_since",
        "stack",
        "has_served",
        "variables",
    )

    def __init__(self, first: Callable[[], object] | None, helps: Worker | None = None) -> None:
        self.thread: threading.Thread
        self.first = first
        """Called before anything else. Not an argument of the thread, which would hold it until
        its end."""
        self.running: list[Work] = []
        """The outermost task first. A task is added before anybody can know that it has begun, and
        leaves after its end."""
        self.waits_for: dict[Work, tuple[Work, ...]] = {}
        """The tasks for which each task here waits. Guarded by the lock of `waits`."""
        self.waits: Notes
        self.helps = helps
        """Of a helper: the worker whose tasks wait for the tasks that run here."""
        self.helper: Worker | None = None
        """The thread that helps this one."""
        self.inbox: Inbox | None = None
        """Of a helper: the tasks that it is to run; None is the sign to end."""
        self.loop: Loop | None = None
        """The event loop for coroutines, made for the first of them."""
        self.variables: tuple[tuple[ContextVar[Any], Any], ...] = ()
        """The context variables that the initializer has set, with their values."""
        self.stuck_since = 0
        """When it was retired, in nanoseconds since the epoch; 0 if it was not."""
        self.stack = ""
        """Where it was then."""
        self.has_served = False
        """True once it has taken a task."""

    @property
    def depth(self) -> int:
        """How many tasks wait inside one another, on this thread and those that it helps."""
        helped = self.helps  # once: that worker's own thread may set it to None
        return len(self.running) + (0 if helped is None else helped.depth)

    def runs_something(self) -> bool:
        """Tell whether a task runs here that has not ended; any thread."""
        return any([not task.done() for task in self.running.copy()])

    def reacts(self) -> bool:
        """Tell whether a task that runs here is expected to end when it is asked to stop."""
        return any([task._reacts_to_cancel for task in self.running.copy()])

    def dismiss_helper(self) -> None:
        """Let the helper end, because the task that needed it has ended or was given up. Under the
        pool's lock."""
        helper, self.helper = self.helper, None
        if helper is not None and helper.inbox is not None:
            helper.inbox.put(None)


def is_here(worker: Worker) -> None:
    """Make the caller's thread known as a worker's."""
    _here.worker = worker


def current_worker() -> Worker | None:
    """Return the worker whose thread this is, of whatever pool."""
    return _here.worker


def start(thread: threading.Thread) -> None:
    """Start a thread of a pool.

    Raises:
        ShutdownError: there can be none, since the interpreter exits or the system has no more.
    """
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        raise ShutdownError(
            f"cannot schedule new futures: no thread can be started ({error})"
        ) from error


class Roster:
    """The threads of one pool, by what they do.

    Args:
        max_workers: most workers.
        max_stuck: most threads past their task's deadline that are replaced; None is no bound.
    """

    def __init__(self, max_workers: int, max_stuck: int | None) -> None:
        self.max_workers = max_workers
        self._max_stuck = max_stuck
        self.workers: set[Worker] = set()
        """Those that take tasks from the queue."""
        self.helpers: set[Worker] = set()
        """Each runs what the tasks of one other thread wait for."""
        self._leaving: set[Worker] = set()  # those that run no task more, and close their loop
        self.retired: set[Worker] = set()
        """Those that a late task holds, or that a shutdown gave up, and that have not come back."""
        self.has_given_up = False
        """True when tasks that still run are left to themselves."""
        self.replaced = 0
        """How many retired threads were replaced."""

    def active(self) -> tuple[Worker, ...]:
        """Return the threads that are neither retired nor at their end."""
        return (*self.workers, *self.helpers, *self._leaving)

    def everybody(self) -> tuple[Worker, ...]:
        """Return all threads."""
        return (*self.active(), *self.retired)

    def busy(self) -> tuple[Worker, ...]:
        """Return the threads for which the pool's end has to wait: the active ones and, unless the
        pool gave up, the retired ones that run a task which has not ended."""
        if self.has_given_up:
            return self.active()
        return (*self.active(), *[each for each in self.retired if each.runs_something()])

    def knows(self, worker: Worker) -> bool:
        """Tell whether a thread is one of them."""
        return worker in self.everybody()

    def host_of(self, task: Work, thread: int) -> Worker | None:
        """Return the worker that runs a task on the thread with that identifier; None if it has
        just ended the task."""
        return next(
            (
                each
                for each in self.everybody()
                if each.thread.ident == thread and task in each.running
            ),
            None,
        )

    def runner_of(self, task: Work, thread: int) -> Worker | None:
        """As `host_of`; None also if the worker is retired."""
        host = self.host_of(task, thread)
        return None if host in self.retired else host

    # -- coming and going --

    def leave(self, worker: Worker) -> None:
        """Note that a worker takes no more tasks: it ends."""
        self.workers.discard(worker)
        self._leaving.add(worker)

    def retire(self, worker: Worker) -> None:
        """Leave a thread to itself."""
        self.forget(worker)
        worker.stuck_since = time_ns()
        worker.dismiss_helper()
        self.retired.add(worker)

    def reinstate(self, worker: Worker) -> None:
        """Make a retired thread that has come back a worker again."""
        self.retired.discard(worker)
        self.workers.add(worker)
        worker.helps = worker.inbox = None  # another helps in its place, and has the inbox

    def forget(self, worker: Worker) -> None:
        """Strike a thread off."""
        for group in (self.workers, self.helpers, self._leaving, self.retired):
            group.discard(worker)

    def forget_the_dead(self) -> int:
        """Strike off the threads that died without a word or were never started; return how
        many."""
        dead = [each for each in self.everybody() if not each.thread.is_alive()]
        for each in dead:
            self.forget(each)
        return len(dead)

    # -- the bound --

    @property
    def is_full(self) -> bool:
        """True when there may be no further worker."""
        return (self._max_stuck is not None
                and len(self.workers) + len(self.retired) >= self.max_workers + self._max_stuck)

    @property
    def may_have_helpers(self) -> bool:
        """False when more threads are stuck than are replaced."""
        return self._max_stuck is None or len(self.retired) <= self._max_stuck

    def standstill(self) -> str:
        """Say why there are no more threads, and what to do."""
        bound = (
            f"max_stuck={self._max_stuck} allows"
            if self.is_full or not self.may_have_helpers
            else "the system has"
        )
        return (
            f"threads stuck in tasks past their deadline: {len(self.retired)}, and {bound} no "
            "other to replace them; Scheduler.health() names the tasks: have them call "
            "checkpoint(), or end what they wait for"
        )

    # -- the figures --

    def health(self, pending: int, late_events: int) -> SchedulerHealth:
        """Return the figures of this moment; two of them others have counted."""
        from ..model.health import SchedulerHealth, StuckThread
        from ..model.records import utc

        running = {
            task for each in self.everybody() for task in each.running.copy() if task.running()
        }
        stuck = [(each, stack[-1]) for each in self.retired if (stack := each.running.copy())]
        return SchedulerHealth(
            max_workers=self.max_workers,
            workers=len(self.workers),
            idle=sum(not each.running for each in self.workers),
            running=len(running),
            pending=pending,
            stuck=tuple(
                StuckThread(
                    thread=each.thread.name,
                    task_id=task.id,
                    task_name=task.name,
                    since_utc=utc(each.stuck_since),
                    stack=each.stack,
                )
                for each, task in sorted(stuck, key=lambda pair: pair[0].stuck_since)
            ),
            replaced=self.replaced,
            late_events=late_events,
        )
