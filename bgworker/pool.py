"""The threads that run tasks: a queue, workers that are started as they are needed, and who is to stop.

Workers hold the pool, never the `Scheduler`, so that a forgotten Scheduler is collected and its pool winds down: what is
queued still runs. Workers are daemon threads that the exit hook joins, because a thread that ignores its cancellation
must not keep the interpreter alive.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import BrokenExecutor
from time import monotonic

from .deadlines import Deadlines
from .delivery.intake import Tally
from .errors import PendingFull, ShutdownError
from .text import text_of
from .waits import Waits, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .task import Call, Task

logger = logging.getLogger(__name__.partition(".")[0])

JOIN_SLICE = 0.1
"""Seconds after which `Pool.join` looks again whom it has to wait for."""


class BrokenPool(ShutdownError, BrokenExecutor):
    """The pool's initializer failed: the scheduler runs nothing any more."""


class Pool:
    """Runs tasks in the order in which they were put.

    Args:
        max_workers: most threads that take tasks.
        name: prefix of the threads' names.
        initializer: called with ``initargs`` in each thread before its first task; if it raises, the pool is broken.
        max_pending: most tasks that wait; None is no bound.
        on_ended: called once, when the pool is closed and its last task has ended.
    """

    def __init__(self, max_workers: int, name: str, initializer: Callable[..., object] | None,
                 initargs: tuple[Any, ...], max_pending: int | None, on_ended: Callable[[], object]) -> None:
        self._name = name
        self._initializer = initializer
        self._initargs = initargs
        self._max_pending = max_pending
        self._on_ended = on_ended
        self._max_workers = max_workers
        self._is_closed = False
        self._has_ended = False
        self._broken: str | None = None  # what the initializer raised, in words
        self.start_afresh()

    def start_afresh(self) -> None:
        """Begin with no thread and an empty queue; also in a forked child, where the parent's threads are not."""
        self._queue: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self.deadlines = Deadlines(self._expire, f"{self._name}-deadlines")
        self.calls: dict[Task[Any], Call] = {}
        self.firsts: dict[Task[Any], Any] = {}
        self.waits = Waits(self.discarded)
        self._lock = threading.Lock()  # guards all below, and the flags above
        self._workers: set[Worker] = set()
        self._retired: set[Worker] = set()  # threads whose task is past its deadline: replaced, and left to themselves
        self._idle = 0  # workers that wait for a task and have not been promised one
        self._cancelled = Tally()  # tasks that were cancelled in the queue, or run by who waits for them ...
        self._collected = 0  # ... and those of them that have been taken out of it
        self._started = 0
        self._signs = 0  # None in the queue: signs to stop, which are no tasks

    @property
    def has_ended(self) -> bool:
        """True when it is closed and its last task has ended."""
        return self._has_ended

    def put(self, task: Task[Any], call: Call) -> None:
        """Queue a task and announce it, in one step: who sees it run has heard of it.

        Raises:
            ShutdownError: the pool is closed or broken.
            PendingFull: ``max_pending`` tasks wait already.
        """
        with self._lock:
            if self._broken is not None:
                raise BrokenPool(f"the pool's initializer failed ({self._broken}); it can run nothing any more")
            if self._is_closed:
                raise ShutdownError("cannot schedule new futures after shutdown")
            if self._max_pending is not None and self._waiting() >= self._max_pending:
                raise PendingFull(f"max_pending: {self._max_pending} tasks are waiting already; wait for some of them")
            if task.has_timeout and not self.deadlines.has_started:
                self._start_deadlines()
            if self._idle:
                self._idle -= 1
            elif len(self._workers) < self._max_workers:
                self._start_worker()
            self.calls[task] = call
            task.announce()
            self._queue.put(task)

    def resize(self, max_workers: int) -> None:
        """Change the number of workers. New ones start as they are needed, surplus ones end after their task."""
        with self._lock:
            self._max_workers = max_workers
            for _ in range(len(self._workers) - max_workers):
                self._put_sign()  # wakes those that are idle
            for _ in range(min(max_workers - len(self._workers), self._queue.qsize())):
                self._start_worker()

    def close(self) -> None:
        """Take no more tasks; what is queued still runs. Returns at once."""
        with self._lock:
            self._is_closed = True
            self._put_sign()
            ended = self._look_whether_ended()
        if ended:
            self._on_ended()

    def cancel_pending(self, reason: str) -> None:
        """Cancel every task that waits."""
        for task in self._take_all():
            task.cancel(reason)

    def stop_running(self, reason: str) -> None:
        """Ask every running task to stop."""
        with self._lock:
            tasks = [task for worker in self._workers for task in worker.running]
        for task in tasks:
            task.cancel(reason)

    def give_up(self) -> None:
        """Leave the tasks that still run to themselves: `join` waits for them no more unless they react, as for those past
        their deadline."""
        with self._lock:
            self._retired |= self._workers
            self._workers.clear()
            ended = self._look_whether_ended()
        if ended:
            self._on_ended()

    def is_mine(self, thread: threading.Thread) -> bool:
        """Tell whether a thread is one of the pool's workers."""
        with self._lock:
            return any(each.thread is thread for each in (*self._workers, *self._retired))

    def join(self, timeout: float | None) -> list[str]:
        """Wait up to ``timeout`` seconds for the workers to end; return the names of those that did not.

        A worker whose task is past its deadline is waited for only if the task reacts to its cancellation.
        """
        until = None if timeout is None else monotonic() + timeout
        current = threading.current_thread()
        while True:
            with self._lock:
                left = [each.thread for each in (*self._workers, *self._retired)
                        if each.thread is not current and (each in self._workers or _reacts(each))]
            if not left:
                return []
            # in slices, because the task of the one we wait for may pass its deadline meanwhile and never end
            left[0].join(JOIN_SLICE if until is None else max(0.0, min(JOIN_SLICE, until - monotonic())))
            if until is not None and monotonic() >= until:
                return [thread.name for thread in left if thread.is_alive()]

    # -- what a task tells --

    def discarded(self) -> None:
        """Note that a queued task will not be run from the queue: it makes room before it is taken out. Takes no lock."""
        self._cancelled.add()

    # -- inside --

    def _start_worker(self, first: Callable[[], object] | None = None) -> None:
        """Start one more worker, under the lock. It runs ``first`` before any task."""
        worker = Worker(first)
        worker.thread = threading.Thread(target=self._work, args=(worker,), daemon=True,
                                         name=f"{self._name}_{self._started}")
        self._workers.add(worker)
        try:
            worker.thread.start()
        except RuntimeError as error:  # the interpreter is exiting, or the system has no more threads
            self._workers.discard(worker)
            if not self._workers or first is not None:
                raise ShutdownError(f"cannot schedule new futures: no thread can be started ({error})") from error
        else:
            self._started += 1

    def _work(self, worker: Worker) -> None:
        self.waits.enter(worker)
        running = worker.running
        try:
            if worker.first is not None:
                _publish(worker.first)
                worker.first = None
            if self._initialize():
                while (task := self._next(worker)) is not None:
                    running.append(task)
                    try:
                        if not task.run():  # it was cancelled in the queue, or run by who waited for it
                            with self._lock:
                                self._collected += 1
                    except BaseException:  # a done callback raised what `Future` does not catch: that costs no worker
                        logger.critical("exception in worker", exc_info=True)
                    running.pop()
                    del task  # hold nothing while waiting for the next
        finally:
            self.waits.leave(worker)
            with self._lock:
                self._workers.discard(worker)
                self._retired.discard(worker)
                ended = self._look_whether_ended()
            if ended:
                self._on_ended()

    def _initialize(self) -> bool:
        if self._initializer is None:
            return True
        try:
            self._initializer(*self._initargs)
        except BaseException as error:
            logger.critical("exception in the pool's initializer", exc_info=True)
            self._break(f"{type(error).__name__}: {text_of(error)}")
            return False
        return True

    def _break(self, error: str) -> None:
        """Fail what waits: there will never be a worker for it."""
        with self._lock:
            self._broken = error
        for task in self._take_all():
            task.fail(BrokenPool(f"the pool's initializer failed ({error})"))

    def _take_all(self) -> list[Task[Any]]:
        """Take out every task that waits."""
        tasks = []
        with self._lock:
            while True:
                try:
                    task = self._queue.get_nowait()
                except queue.Empty:
                    break
                if task is None:
                    self._signs -= 1
                else:
                    tasks.append(task)
            if self._is_closed:
                self._put_sign()
        return tasks

    def _next(self, worker: Worker) -> Task[Any] | None:
        """Return the next task to run, or None when this worker is to end."""
        while True:
            if worker not in self._workers:  # retired while it ran its task
                return None
            if len(self._workers) > self._max_workers and self._leave_surplus(worker):
                return None
            try:
                task = self._queue.get_nowait()
                waited = False
            except queue.Empty:
                with self._lock:
                    if not self._queue.empty():  # put between our look and the lock: it counted on no idle worker
                        continue
                    self._idle += 1
                task = self._queue.get()
                waited = True
            if task is None:
                with self._lock:
                    self._signs -= 1
                    if waited:
                        self._idle = max(0, self._idle - 1)  # unlike a task, a sign to stop is promised to nobody
                    # `resize` leaves signs too, which tasks may stand behind; behind that of `close` there is none
                    if self._is_closed and self._queue.qsize() <= self._signs:
                        self._put_sign()  # for the next worker
                        self._workers.discard(worker)
                        return None
            else:
                return task

    def _leave_surplus(self, worker: Worker) -> bool:
        """Take a worker out if there are too many after a `resize`; False when another has gone already."""
        with self._lock:
            is_surplus = len(self._workers) > self._max_workers
            if is_surplus:
                self._workers.discard(worker)
            return is_surplus

    def _put_sign(self) -> None:
        """Wake a worker with something that is no task; under the lock."""
        self._signs += 1
        self._queue.put(None)

    def _start_deadlines(self) -> None:
        try:
            self.deadlines.start()
        except RuntimeError as error:  # as in _start_worker
            raise ShutdownError(f"cannot schedule new futures: no thread can be started ({error})") from error

    def _waiting(self) -> int:
        """Count the tasks that wait; under the lock."""
        return self._queue.qsize() - self._signs - (self._cancelled.read() - self._collected)

    def _look_whether_ended(self) -> bool:
        """Tell, once, that the pool is closed and has nothing to run any more; under the lock."""
        if self._is_closed and not self._workers and not self._has_ended:
            self._has_ended = True
            self.deadlines.stop()
            return True
        return False

    def _expire(self, task: Task[Any]) -> None:
        """End a task whose time is over, and replace its worker. The deadlines' thread."""
        task.time_out()
        with self._lock:
            retired = {each for each in self._workers if task in each.running}  # empty if it was given up already
            self._workers -= retired
            self._retired |= retired
            try:
                self._start_worker(task.publish)
                return
            except ShutdownError:
                logger.error("no thread can be started in place of the one that runs task %s past its deadline", task.id)
            if not self._is_closed:  # it is still better than none, should it come back
                self._workers |= retired
                self._retired -= retired
            ended = self._look_whether_ended()
        task.publish()
        if ended:  # the interpreter is exiting, and nobody is left to run what waits
            self.cancel_pending("shutdown")
            self._on_ended()


def _reacts(worker: Worker) -> bool:
    running = worker.running
    return bool(running) and running[0].reacts_to_cancel


def _publish(function: Callable[[], object]) -> None:
    try:
        function()
    except BaseException:  # as in Pool._work
        logger.critical("exception in worker", exc_info=True)
    finally:
        del function  # as in Task.run: a traceback that leads back here must not hold the task
