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


class Worker:
    """One thread of a pool: what it runs, the outermost task first, and what it waits for."""

    __slots__ = ("thread", "first", "running", "waits_for")

    def __init__(self, first: Callable[[], object] | None) -> None:
        self.thread: threading.Thread
        self.first = first
        """To be called before anything else. Not an argument of the thread, which would keep it until the end."""
        self.running: list[Task[Any]] = []
        self.waits_for: Task[Any] | None = None


class Waits:
    """Knows which worker of a pool waits for which task.

    Args:
        on_taken: called after a queued task was run by who waited for it, not from the queue.
    """

    def __init__(self, on_taken: Callable[[], object]) -> None:
        self._on_taken = on_taken
        self._local = threading.local()  # .worker, in the threads of the pool
        self._lock = threading.Lock()  # guards _workers and their waits_for
        self._workers: list[Worker] = []

    @property
    def worker(self) -> Worker | None:
        """The worker whose thread this is; None in a thread that is not the pool's."""
        return getattr(self._local, "worker", None)

    def enter(self, worker: Worker) -> None:
        """Know this thread as a worker's."""
        self._local.worker = worker
        with self._lock:
            self._workers.append(worker)

    def leave(self, worker: Worker) -> None:
        """Forget it; it ends."""
        with self._lock:
            if worker in self._workers:  # not in a forked child
                self._workers.remove(worker)

    def begin(self, task: Task[Any]) -> bool:
        """Prepare to wait for ``task`` without a timeout: run it here if it is still queued.

        Returns: True if this is a thread of the pool, which then calls `end` after its wait.

        Raises:
            PoolDeadlock: the wait would never end.
        """
        worker = self.worker
        if worker is None or not worker.running:
            return False
        waiting = worker.running[-1].name
        if not task.has_begun:
            if len(worker.running) >= MOST_NESTED:
                raise PoolDeadlock(f"task {waiting!r} waits for task {task.name!r}, {MOST_NESTED} waits deep on one thread; "
                                   "collect the results outside of the tasks, or wait with a timeout")
            self._run_here(worker, task)
        with self._lock:
            if any(each in worker.running for each in self._chain(task)):
                raise PoolDeadlock(f"task {waiting!r} waits for task {task.name!r}, which waits for it, directly or through "
                                   "others; none of them would ever end")
            worker.waits_for = task
        return True

    def _run_here(self, worker: Worker, task: Task[Any]) -> None:
        worker.running.append(task)
        try:
            if task.run():
                self._on_taken()
        finally:
            worker.running.pop()
            del task  # as in Task.run: a traceback that leads back here must not hold it

    def end(self) -> None:
        """Note that the wait is over."""
        worker = self.worker
        if worker is not None:
            with self._lock:
                worker.waits_for = None

    def _chain(self, task: Task[Any] | None) -> Iterator[Task[Any]]:
        """Yield a task, the one that the thread running it waits for, and so on."""
        while task is not None and not task.done():
            yield task
            runner = next((each for each in self._workers if task in each.running), None)
            task = runner.waits_for if runner is not None else None
