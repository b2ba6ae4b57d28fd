"""Tasks that wait for tasks of their own pool: run what is still queued, refuse what would wait for ever.

A worker whose task waits for a queued one runs that one itself, there and then, with its own context, deadline and
events; so a pool of any size finishes a recursive fan-out. A wait that can never end, because the chain of waits leads
back to the waiting thread, raises `PoolDeadlock` instead of hanging. Only ``result()``, ``exception()`` and ``wait()`` without
a timeout do this: a wait with a timeout ends by itself, and running a task inside it could outlast it.
"""

from __future__ import annotations

import threading

from .errors import PoolDeadlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .task import Task

MOST_NESTED = 50
"""Most tasks that run inside one another on one thread: about ten Python frames each, of a thousand."""


class _Thread:
    """What one worker thread runs, the outermost first, and what it waits for."""

    __slots__ = ("running", "waits_for")

    def __init__(self) -> None:
        self.running: list[Task[Any]] = []
        self.waits_for: Task[Any] | None = None


class Waits:
    """Knows which thread of a pool runs what, and which task it waits for.

    Args:
        on_taken: called after a queued task was run by who waited for it, not from the queue.
    """

    def __init__(self, on_taken: Callable[[], object]) -> None:
        self._on_taken = on_taken
        self._local = threading.local()  # .thread, in the threads that run tasks
        self._lock = threading.Lock()  # guards _threads and their waits_for
        self._threads: list[_Thread] = []

    def run(self, task: Task[Any]) -> bool:
        """Run a task on this thread; False if somebody else has begun it."""
        thread = self._mine()
        if thread is None:
            thread = self._local.thread = _Thread()
            with self._lock:
                self._threads.append(thread)
        thread.running.append(task)
        try:
            return task.run()
        finally:
            thread.running.pop()
            del task  # as in Task.run: a traceback that leads back here must not hold it

    def leave(self) -> None:
        """Forget this thread, which ends."""
        thread = self._mine()
        if thread is not None:
            with self._lock:
                self._threads.remove(thread)

    def begin(self, task: Task[Any]) -> bool:
        """Prepare to wait for ``task`` without a timeout: run it here if it is still queued.

        Returns: True if this is a thread of the pool, which then calls `end` after its wait.

        Raises:
            PoolDeadlock: the wait would never end.
        """
        thread = self._mine()
        if thread is None or not thread.running:
            return False
        if not task.has_begun:
            if len(thread.running) >= MOST_NESTED:
                raise PoolDeadlock(f"task {thread.running[-1].name!r} waits for task {task.name!r}, {MOST_NESTED} waits deep on "
                                   "one thread; collect the results outside of the tasks, or wait with a timeout")
            if self.run(task):
                self._on_taken()
        with self._lock:
            if any(each in thread.running for each in self._chain(task)):
                raise PoolDeadlock(f"task {thread.running[-1].name!r} waits for task {task.name!r}, which waits for it, directly "
                                   "or through others; none of them would ever end")
            thread.waits_for = task
        return True

    def end(self) -> None:
        """Note that the wait is over."""
        thread = self._mine()
        if thread is not None:
            with self._lock:
                thread.waits_for = None

    def _mine(self) -> _Thread | None:
        return getattr(self._local, "thread", None)

    def _chain(self, task: Task[Any] | None) -> Iterator[Task[Any]]:
        """Yield a task, the one that the thread running it waits for, and so on."""
        while task is not None and not task.done():
            yield task
            runner = next((each for each in self._threads if task in each.running), None)
            task = runner.waits_for if runner is not None else None
