"""The threads that run tasks: a queue, workers that are started as they are needed, and who is to stop.

Workers hold the pool, never the `Scheduler`, so that a forgotten Scheduler is collected and its pool winds down: what is
queued still runs. Workers are daemon threads that the exit hook joins, because a thread that ignores its cancellation
must not keep the interpreter alive.

A thread whose task is past its deadline is retired (see `roster`). Where another may not take its place, the pool goes on
with fewer workers; when the last one is stuck, what waits fails with `PoolStuck`. A retired thread that comes back after
all goes on if its place is vacant.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import BrokenExecutor
from time import monotonic
from weakref import ref

from ..model.errors import PendingFull, PoolStuck, ShutdownError
from ..model.text import text_of
from .deadlines import Deadlines
from .roster import Roster
from .waits import Waits, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any
    from weakref import ReferenceType

    from ..model.health import SchedulerHealth
    from .task import Call, Task

    Inbox = queue.SimpleQueue[ReferenceType[Task[Any]] | None]

logger = logging.getLogger(__name__.partition(".")[0])

JOIN_SLICE = 0.1
"""Seconds after which `Pool.join` looks again whom it has to wait for."""

STANDSTILL = 5.0
"""Seconds after which what waits fails if every thread is stuck; a command that is being killed takes as long."""


MOST_STALE = 64
"""Tasks in the queue that were begun by others than a worker, beyond which they are taken out."""


class BrokenPool(ShutdownError, BrokenExecutor):
    """The pool's initializer failed: the scheduler runs nothing any more."""


class Pool:
    """Runs tasks in the order in which they were put.

    Args:
        max_workers: most threads that take tasks.
        name: prefix of the threads' names.
        initializer: called with ``initargs`` in each thread before its first task; if it raises, the pool is broken.
        max_pending: most tasks that wait; None is no bound.
        max_stuck: most threads past their task's deadline that are replaced; None is no bound.
        on_ended: called once, when the pool is closed and its last task has ended.
    """

    def __init__(self, max_workers: int, name: str, initializer: Callable[..., object] | None,
                 initargs: tuple[Any, ...], max_pending: int | None, max_stuck: int | None,
                 on_ended: Callable[[], object]) -> None:
        self._name = name
        self._initializer = initializer
        self._initargs = initargs
        self._max_pending = max_pending
        self._max_stuck = max_stuck
        self._on_ended = on_ended
        self._max_workers = max_workers
        self._is_closed = False
        self._has_ended = False
        self._refusal: ShutdownError | PoolStuck | None = None  # why nothing can run
        self.start_afresh()

    def start_afresh(self) -> None:
        """Begin with no thread and an empty queue; also in a forked child, where the parent's threads are not."""
        self._queue: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self.deadlines = Deadlines(self._expire, f"{self._name}-deadlines")
        self.calls: dict[Task[Any], Call] = {}  # of the tasks that wait: who begins one takes it out
        self.waits = Waits(self._lend)
        if isinstance(self._refusal, PoolStuck):
            self._refusal = None
        self._lock = threading.Lock()  # guards all below, and the flags above
        self._roster = Roster(self._max_workers, self._max_stuck)
        self._workers = self._roster.workers
        self._idle = 0  # workers that wait for a task and have not been promised one
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
            PoolStuck: every thread is stuck past its task's deadline.
            PendingFull: ``max_pending`` tasks wait already.
        """
        with self._lock:
            if self._refusal is not None:
                raise _again(self._refusal)
            if self._is_closed:
                raise ShutdownError("cannot schedule new futures after shutdown")
            if self._max_pending is not None and len(self.calls) >= self._max_pending:
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
            if self._queue.qsize() > MOST_STALE + 2 * len(self.calls):
                self._drop_stale()

    def resize(self, max_workers: int) -> None:
        """Change the number of workers. New ones start as they are needed, surplus ones end after their task."""
        with self._lock:
            self._max_workers = self._roster.max_workers = max_workers
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
            self._end()

    def cancel_pending(self, reason: str) -> None:
        """Cancel every task that waits."""
        for task in self._take_all():
            task.cancel(reason)

    def stop_running(self, reason: str) -> None:
        """Ask every running task to stop."""
        with self._lock:
            tasks = [task for worker in self._roster.active() for task in worker.running]
        for task in tasks:
            task.cancel(reason)

    def give_up(self) -> None:
        """Leave the tasks that still run to themselves: `join` waits for them no more unless they react, as for those past
        their deadline."""
        with self._lock:
            for worker in self._roster.active():
                self._roster.retire(worker)
            ended = self._look_whether_ended()
        if ended:
            self._end()

    def is_mine(self, thread: threading.Thread) -> bool:
        """Tell whether a thread is one of the pool's workers."""
        with self._lock:
            return self._roster.is_mine(thread)

    def join(self, timeout: float | None) -> list[str]:
        """Wait up to ``timeout`` seconds for the workers to end; return the names of those that did not.

        A worker whose task is past its deadline is waited for only if the task reacts to its cancellation.
        """
        until = None if timeout is None else monotonic() + timeout
        ours = {threading.current_thread()}  # and those that wait for us
        worker = self.waits.worker
        while worker is not None:
            ours.add(worker.thread)
            worker = worker.helps
        while True:
            with self._lock:
                awaited = [*self._roster.active(), *filter(_reacts, self._roster.retired)]
            left = [each.thread for each in awaited if each.thread not in ours]
            if not left:
                return []
            # in slices, because the task of the one we wait for may pass its deadline meanwhile and never end
            left[0].join(JOIN_SLICE if until is None else max(0.0, min(JOIN_SLICE, until - monotonic())))
            if until is not None and monotonic() >= until:
                return [thread.name for thread in left if thread.is_alive()]

    def health(self, late_events: int) -> SchedulerHealth:
        """Return the figures of this moment; ``late_events`` is what somebody else has counted."""
        with self._lock:
            return self._roster.health(len(self.calls), late_events)

    # -- inside --

    def _start_worker(self) -> None:
        """Start one more worker, under the lock. Where there can be none, the others have to do."""
        try:
            self._start(Worker(None), self._workers)
        except ShutdownError:
            # with too many stuck, what waits fails some time after the last worker was retired, unless one comes back
            if not self._workers and not self._roster.is_full:
                raise

    def _start(self, worker: Worker, group: set[Worker]) -> None:
        """Start a thread, under the lock. `ShutdownError` if there can be none."""
        if self._roster.is_full if group is self._workers else not self._roster.may_have_helpers:
            raise ShutdownError(self._roster.standstill())
        worker.thread = threading.Thread(target=self._work, args=(worker,), daemon=True,
                                         name=f"{self._name}_{self._started}")
        group.add(worker)
        try:
            worker.thread.start()
        except RuntimeError as error:  # the interpreter is exiting, or the system has no more threads
            group.discard(worker)
            raise ShutdownError(f"cannot schedule new futures: no thread can be started ({error})") from error
        self._started += 1

    def _work(self, worker: Worker) -> None:
        self.waits.enter(worker)
        try:
            if worker.first is not None:
                _publish(worker.first)
                worker.first = None
            if self._initialize():
                self._run_tasks(worker)
            if worker.loop is not None:
                worker.loop.close()
        finally:
            self.waits.leave(worker)
            with self._lock:
                self._roster.forget(worker)
                self._fill_the_gap()
                ended = self._look_whether_ended()
            if ended:
                self._end()

    def _fill_the_gap(self) -> None:
        """Start a worker where there may be one again, now that a thread has ended, and something waits; under the lock."""
        if isinstance(self._refusal, PoolStuck):
            self._refusal = None
        if self.calls and not self._workers and not self._has_ended and self._refusal is None:
            try:
                self._start(Worker(None), self._workers)
            except ShutdownError as error:
                logger.error("%d tasks wait, and no thread runs them: %s", len(self.calls), error)

    def _run_tasks(self, worker: Worker) -> None:
        running = worker.running
        following = self._next if worker.helps is None else self._next_lent
        while (task := following(worker)) is not None:
            running.append(task)
            try:
                task.run()
            except BaseException:  # a done callback raised what `Future` does not catch: that costs no worker
                logger.critical("exception in worker", exc_info=True)
            running.pop()
            del task  # hold nothing while waiting for the next
            if worker.helper is not None:
                with self._lock:
                    worker.dismiss_helper()

    def _initialize(self) -> bool:
        if self._initializer is None:
            return True
        try:
            self._initializer(*self._initargs)
        except BaseException as error:
            logger.critical("exception in the pool's initializer", exc_info=True)
            broken = BrokenPool(f"the pool's initializer failed ({type(error).__name__}: {text_of(error)}); "
                                "it can run nothing any more")
            with self._lock:
                self._refusal = broken
            self._fail_pending(broken)
            return False
        return True

    def _fail_pending(self, error: ShutdownError | PoolStuck) -> None:
        """Fail what waits: there is no worker for it."""
        for task in self._take_all():
            task.fail(_again(error))

    def _drop_stale(self) -> None:
        """Take out what was run by who waited for it, or cancelled: the queue must not hold its results. Under the lock."""
        kept = []
        while True:
            try:
                task = self._queue.get_nowait()
            except queue.Empty:
                break
            if task is None or not task.has_begun:
                kept.append(task)
        for task in kept:
            self._queue.put(task)

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
            if worker not in self._workers and not self._takes_its_place(worker):  # retired while it ran its task
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
                        self._roster.leave(worker)
                        return None
            else:
                return task

    def _leave_surplus(self, worker: Worker) -> bool:
        """Take a worker out if there are too many after a `resize`; False when another has gone already."""
        with self._lock:
            is_surplus = len(self._workers) > self._max_workers
            if is_surplus:
                self._roster.leave(worker)
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

    def _look_whether_ended(self) -> bool:
        """Tell, once, that the pool is closed and has nobody left to run anything; under the lock."""
        if self._is_closed and not self._has_ended and not self._roster.active():
            self._has_ended = True
            self.deadlines.forget(self)
            self.deadlines.stop()
            return True
        return False

    def _end(self) -> None:
        """Announce the end. Something waits even so if the threads to run it are stuck and cannot be replaced."""
        self.cancel_pending("shutdown")
        self._on_ended()

    # -- helpers --

    def _lend(self, worker: Worker, task: Task[Any]) -> None:
        """Have a helper run a queued task that one of ``worker`` waits for, unless there is an idle worker for it.

        Raises:
            ShutdownError: there can be no more threads.
        """
        with self._lock:
            # one that is idle and not promised, nor about to leave after a `resize`: so every task in the queue is, to a
            # worker that is about to take it
            if self._idle and len(self._workers) <= self._max_workers:
                return
            if worker.helper is None:
                self._start_helper(worker, None, queue.SimpleQueue())
            assert worker.helper is not None and worker.helper.inbox is not None
            worker.helper.inbox.put(ref(task))

    def _start_helper(self, worker: Worker, first: Callable[[], object] | None, inbox: Inbox) -> None:
        helper = Worker(first, worker)
        helper.inbox = inbox
        self._start(helper, self._roster.helpers)
        worker.helper = helper

    def _next_lent(self, helper: Worker) -> Task[Any] | None:
        """Return the next task for a helper to run, or None when it is to end."""
        while helper in self._roster.helpers and helper.inbox is not None:
            reference = helper.inbox.get()
            if reference is None:
                return None
            task = reference()
            if task is not None and not task.has_begun:
                return task
            del task
        return self._next(helper)  # retired while it ran its task: it is like any worker now

    # -- what is past its deadline --

    def _expire(self, due: Any, thread: int) -> None:
        """End a task whose time is over, and replace the thread that runs it. The deadlines' thread."""
        if due is self:
            self._look_whether_stuck()
            return
        try:
            due.time_out()
        except BaseException:  # its cancel callback's; its end is recorded, and remains to be told
            logger.exception("the cancel callback of task %s failed", due.id)
        orphans: list[Task[Any]] = []
        with self._lock:
            stuck = self._roster.runner_of(due, thread)
            try:
                self._replace(stuck, due.publish)
                return
            except ShutdownError as error:
                if stuck is not None:
                    logger.error("the thread that runs task %s past its deadline cannot be replaced: %s", due.id, error)
                if stuck is not None and stuck.inbox is not None:
                    orphans = _drain(stuck.inbox)
            if not self._workers and not self._is_closed:
                self.deadlines.watch(self, monotonic() + STANDSTILL)
            ended = self._look_whether_ended()
        due.publish()
        for task in orphans:
            task.fail(PoolStuck(self._roster.standstill()))
        if ended:
            self._end()

    def _replace(self, stuck: Worker | None, publish: Callable[[], object]) -> None:
        """Retire a thread and start another in its place, which publishes first: the callbacks of the task that is past
        its deadline may take long. Under the lock.

        Raises:
            ShutdownError: there can be no more threads.
        """
        helped = None
        if stuck is not None:
            self._roster.retire(stuck)
            helped = stuck.helps if stuck.helps is not None and stuck.helps.helper is stuck else None
        if helped is None or stuck is None or stuck.inbox is None:
            self._start(Worker(publish), self._workers)
        else:
            try:
                self._start_helper(helped, publish, stuck.inbox)
            except ShutdownError:
                helped.helper = None  # not before: its thread looks at it without the lock when its task has ended
                raise
        self._roster.replaced += stuck is not None

    def _takes_its_place(self, worker: Worker) -> bool:
        """Let a retired thread that has come back go on if its place is vacant and somebody waits for it."""
        with self._lock:
            if isinstance(self._refusal, PoolStuck):
                self._refusal = None
            is_wanted = (worker in self._roster.retired and bool(self.calls) and not self._has_ended
                         and len(self._workers) < self._max_workers)
            if is_wanted:
                self._roster.reinstate(worker)
            return is_wanted

    def _look_whether_stuck(self) -> None:
        """Fail what waits if there is still no worker. The deadlines' thread, a while after the last one was retired."""
        with self._lock:
            if self._workers or self._is_closed:
                return
            try:
                self._start(Worker(None), self._workers)
                return
            except ShutdownError:
                self._refusal = PoolStuck(self._roster.standstill())
        self._fail_pending(self._refusal)


def _again(error: ShutdownError | PoolStuck) -> ShutdownError | PoolStuck:
    return type(error)(*error.args)  # each raise adds to an exception's traceback


def _drain(inbox: Inbox) -> list[Task[Any]]:
    tasks = []
    while not inbox.empty():
        reference = inbox.get()
        task = reference() if reference is not None else None
        if task is not None:
            tasks.append(task)
    return tasks


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
