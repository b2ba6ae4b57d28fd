"""The pool: a queue of tasks, and the workers that run them, started as they are needed.

Guarantees. Every task that was put is begun once, or fails, or is cancelled. At most
``max_workers`` threads take tasks from the queue; threads that are stuck past their task's
deadline, and helpers of waiting tasks (see `waits`), do not count. Any thread may call any method
without an underscore.

Workers hold the pool, never the `Scheduler`, so that a forgotten Scheduler is collected and its
pool winds down: what is queued still runs. Workers are daemon threads that the exit hook joins,
because a thread that ignores its cancellation must not keep the interpreter alive.

A thread whose task is past its deadline is retired (see `workers`). Where another may not take its
place, the pool goes on with fewer workers; when the last one is stuck, what waits fails with
`PoolStuck`. A retired thread that comes back after all goes on if its place is vacant.

The pool ends when it is closed, no thread of it runs a task that has not ended, and no thread is
about to end one. Each thread that may have been the last calls `look`.

An interrupt (Ctrl-C in `put`, no memory in a thread) may strike between any two steps. It can leave
a count of idle workers that is too low, which costs a thread; a task in ``calls`` that is not in
the queue, which the last worker finds; and a worker without a thread, which `look` and `join` find.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures.thread import BrokenThreadPool
from contextvars import copy_context
from weakref import WeakMethod, ref

from ..model.clock import monotonic
from ..model.errors import PendingFull, PoolStuck, ShutdownError
from ..model.reports import report
from ..model.text import ask, describe
from ..model.threads import own_thread
from .deadlines import Deadlines, keeps_time
from .future import LOGGER
from .task import Task
from .waits import Waits
from .workers import Roster, Worker, is_here, start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from ..model.health import SchedulerHealth
    from .task import Call
    from .workers import Inbox, Work

    class Listener(Protocol):
        """What a pool needs of the one who hears requests to cancel its tasks."""

        is_asleep: bool
        def wake(self) -> None: ...
        def stop(self) -> None: ...

JOIN_SLICE = 0.1
"""Seconds after which `Pool.join` looks again whom it has to wait for."""

STANDSTILL = 5.0
"""Seconds after which what waits fails if every thread is stuck; a command that is being killed
takes as long."""


MOST_STILLBORN = 3
"""Threads in a row that may die before their first task until what waits fails."""

MOST_STALE = 64
"""Tasks in the queue that were begun by others than a worker, beyond which they are taken out."""


class BrokenPool(ShutdownError, BrokenThreadPool):
    """The pool's initializer failed: the scheduler runs nothing any more."""


class Pool:
    """Runs tasks in the order in which they were put.

    Args:
        max_workers: most threads that take tasks.
        name: prefix of the threads' names.
        initializer: called with ``initargs`` in each thread before its first task; if it raises,
            the pool is broken.
        max_pending: most tasks that wait while every worker has one; None is no bound.
        max_stuck: most threads past their task's deadline that are replaced; None is no bound.
        on_ended: called once, when the pool is closed and its last task has ended.
    """

    task_class = Task
    """What a Scheduler makes for it."""

    def __init__(self, max_workers: int, name: str, initializer: Callable[..., object] | None,
                 initargs: tuple[Any, ...], max_pending: int | None, max_stuck: int | None,
                 on_ended: Callable[[], object]) -> None:
        self._name = name
        self.initializer = initializer
        self.initargs = initargs
        self._max_pending = max_pending
        self._max_stuck = max_stuck
        self._on_ended = on_ended
        self.max_workers = max_workers
        self.is_closed = False
        self.has_ended = False
        """True when it is closed and its last task has ended."""
        self.refusal: ShutdownError | PoolStuck | None = None  # why nothing can run
        self._listener: Listener | None = None
        self.start_afresh()

    def start_afresh(self) -> None:
        """Begin with no thread and an empty queue; also in a forked child, where the parent's
        threads are not."""
        self._queue: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self.deadlines = Deadlines(weakly(self._expire), f"{self._name}-deadlines")
        # of the tasks that wait; a thread that begins one takes it out
        self.calls: dict[Task[Any], Call] = {}
        self.ends: list[Task[Any]] = []
        self.awaits_ends = False
        self._is_expiring = False  # written by the deadlines' thread alone
        self.waits = Waits(weakly(self._lend), weakly(self._run_inside))
        if isinstance(self.refusal, PoolStuck):
            self.refusal = None
        # guards all below, and the flags above; a signal handler may shut down meanwhile
        self._lock = threading.RLock()
        self._roster = Roster(self.max_workers, self._max_stuck)
        self._workers = self._roster.workers
        self.idle = 0  # workers that wait for a task and have not been promised one
        self._started = 0
        self._stillborn = 0  # threads in a row that died before their first task
        self._signs = 0  # None in the queue: signs to stop, which are no tasks

    @property
    def pending(self) -> int:
        """How many tasks wait."""
        return len(self.calls)

    @property
    def threads(self) -> set[threading.Thread]:
        """Those that take tasks now."""
        with self._lock:
            return {worker.thread for worker in self._workers}

    def put(self, task: Task[Any], call: Call) -> None:
        """Queue a task and announce it, in one step: nobody sees it run before its announcement.

        Raises:
            ShutdownError: the pool is closed or broken.
            PoolStuck: every thread is stuck past its task's deadline.
            PendingFull: ``max_pending`` tasks wait already.
        """
        with self._lock:
            if self.refusal is not None:
                raise _again(self.refusal)
            if self.is_closed:
                raise ShutdownError(f"cannot schedule new futures after {self._closed_by}")
            if (
                self._max_pending is not None
                and len(self.calls) >= self._max_pending  # first, for it mostly decides
                and len(self.calls) >= self._max_pending + self._free_workers()
            ):
                raise PendingFull(
                    f"max_pending: {self._max_pending} tasks are waiting already; "
                    "wait for some of them"
                )
            if (
                task._task_state.timeout is not None
                and not self.deadlines.has_started
                and not keeps_time(call[0])
            ):
                self.deadlines.start()
            is_promised = self.idle > 0
            if is_promised:
                self.idle -= 1
            try:
                self.calls[task] = call
                task._announce()
                self._queue.put(task)
                # last, as `ThreadPoolExecutor`: a new thread begins with the task, whatever the
                # caller does next
                if not is_promised and len(self._workers) < self.max_workers:
                    self._start_worker()
                if self._listener is not None and self._listener.is_asleep:
                    self._listener.wake()
            except BaseException as error:
                # also after an interrupt: a caller that gets no task cannot want it to run
                task.cancel("no thread" if isinstance(error, ShutdownError) else "interrupted")
                raise
        if self._queue.qsize() > MOST_STALE + 2 * len(self.calls):
            self._drop_stale()

    def resize(self, max_workers: int) -> None:
        """Change the number of workers. New ones start as they are needed, surplus ones end after
        their task. Where no thread can be had now, the next tasks see to it."""
        problem = None
        with self._lock:
            self.max_workers = self._roster.max_workers = max_workers
            for _ in range(len(self._workers) - max_workers):
                self._put_sign()  # wakes those that are idle
            try:
                for _ in range(min(max_workers - len(self._workers), len(self.calls))):
                    self._start_worker()
            except ShutdownError as error:
                problem = error
        if problem is not None:
            report(logging.WARNING, "%s has no worker now: %s", self._name, str(problem))

    def grow(self, max_workers: int) -> bool:
        """Raise the number of workers, and start the new ones now, though nothing waits for them.
        False, and nothing changes, where the system has no thread for one, or the pool is
        closed."""
        with self._lock:
            if self.is_closed:
                return False
            before = self.max_workers
            self.max_workers = self._roster.max_workers = max_workers
            try:
                while len(self._workers) < max_workers:
                    self._start(Worker(None), self._workers)
            except ShutdownError:
                self.max_workers = self._roster.max_workers = max(before, len(self._workers))
                return False
            return True

    def close(self, closed_by: str = "shutdown") -> None:
        """Take no more tasks; what is queued still runs. Returns at once."""
        with self._lock:
            if not self.is_closed:
                self.is_closed, self._closed_by = True, closed_by
            self._put_sign()
        self.look()

    def cancel_pending(self, reason: str) -> None:
        """Cancel every task that waits."""
        tasks = [task for task in list(self.calls) if task._cancel_quietly(reason)]
        self._drop_stale()
        for task in tasks:
            task._tell()

    def stop_running(self, reason: str) -> None:
        """Ask every running task to stop."""
        with self._lock:
            tasks = [
                task
                for each in self._roster.everybody()
                for task in each.running.copy()
                if not task.done()
            ]
        for task in tasks:
            task._ask_to_stop(reason)

    def give_up(self) -> None:
        """Leave the tasks that still run to themselves: `join` waits for them no more unless they
        react, as for those past their deadline."""
        with self._lock:
            self._roster.has_given_up = True
            left = self._roster.active()
            for worker in left:
                self._roster.retire(worker)
        self.look()
        for worker in left:
            for task in worker.running[:1]:
                worker.stack = task._stack(worker)

    def listen(self, listener: Listener) -> None:
        """Have somebody woken whenever a task is queued while he sleeps, and stopped when the pool
        ends.

        Raises:
            ShutdownError: the pool is closed.
        """
        with self._lock:
            if self.is_closed:
                raise ShutdownError(f"cannot listen after {self._closed_by}")
            self._listener = listener
        if self.is_busy():
            listener.wake()

    def is_busy(self) -> bool:
        """Tell whether a task waits or runs that has not ended."""
        with self._lock:
            # in this order: a task that is begun is among those that run before it ceases to wait
            return bool(self.calls) or any(
                [each.runs_something() for each in self._roster.everybody()])

    def is_inside(self) -> bool:
        """Tell whether the caller is on a thread of the pool, which cannot wait for the pool's
        end."""
        return self.waits.worker is not None or self.deadlines.is_mine(threading.current_thread())

    def join(self, timeout: float | None) -> list[str]:
        """Wait up to ``timeout`` seconds for the tasks and the workers to end; return the names of
        the threads that did not.

        A thread that runs nothing but what is past its deadline is waited for only if that reacts
        to its cancellation.
        """
        until = None if timeout is None else monotonic() + timeout
        while True:
            self.look()
            with self._lock:
                everybody = self._roster.everybody()
            # those that wait for the caller cannot end before
            ours = {threading.current_thread(), *self.waits.threads_held_up(everybody)}
            with self._lock:
                awaited = {
                    *self._roster.busy(),
                    *[each for each in self._roster.retired if each.reacts()],
                }
            left = [each.thread for each in awaited if each.thread not in ours]
            if not left:
                return []
            # in slices, because the task of the one we wait for may pass its deadline meanwhile and
            # never end
            left[0].join(
                JOIN_SLICE if until is None else max(0.0, min(JOIN_SLICE, until - monotonic()))
            )
            if until is not None and monotonic() >= until:
                return [thread.name for thread in left if thread.is_alive()]

    def look(self) -> None:
        """End the pool if it is closed and nothing of it is left. Any thread, without the lock, as
        often as you like."""
        while True:
            with self._lock:
                died = self._roster.forget_the_dead()
                error = self._fill_the_gap(died) if died else None
                if error is None and (not self.is_closed or self._roster.busy()):
                    return
                if error is None and self._is_expiring:
                    return  # a thread may still be started; `_expire` looks again
                if error is None and not self.calls:
                    # before the look: a thread that ends one looks at this afterwards
                    self.awaits_ends = True
                    if any([not task.done() for task in self.ends.copy()]):
                        return
                    self.has_ended = True
                    break
            if error is None:
                # something waits even so if the threads to run it are stuck and cannot be replaced
                self.cancel_pending("shutdown")
            else:
                self._fail_pending(error)
        self.deadlines.forget(self)
        self.deadlines.stop()
        if self._listener is not None:
            self._listener.stop()
        self._on_ended()  # maybe again: an interrupt can come between the decision and this

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
            # with too many stuck, the waiting tasks fail some time after the last worker was
            # retired, unless one comes back
            if not self._workers and not self._roster.is_full:
                raise

    def _start(self, worker: Worker, group: set[Worker]) -> None:
        """Start a thread, under the lock. `ShutdownError` if there can be none."""
        if self._roster.is_full if group is self._workers else not self._roster.may_have_helpers:
            raise ShutdownError(self._roster.standstill())
        worker.thread = own_thread(f"{self._name}_{self._started}", self._work, worker)
        try:
            group.add(worker)
            start(worker.thread)
        except BaseException:
            # an interrupt, too: should it start after all, it finds that nobody knows it
            group.discard(worker)
            raise
        self._started += 1

    def _work(self, worker: Worker) -> None:
        # its starter holds the lock until it is decided whether this thread is one of the pool's
        with self._lock:
            if not self._roster.knows(worker):
                return
        died = True
        try:
            worker.waits = self.waits
            is_here(worker)
            first, worker.first = worker.first, None
            if first is not None:
                first()
            del first
            if self._initialize(worker):
                self._run_tasks(worker)
            if worker.loop is not None:
                worker.loop.close()
            died = False
        except BaseException as error:
            report(logging.CRITICAL, "a thread of the pool has died: %s", describe(error))
        finally:
            self._leave(worker, died)

    def _leave(self, worker: Worker, died: bool) -> None:
        with self._lock:
            self._roster.forget(worker)
            if died:
                # it may have been one of them; too few are counted rather than too many
                self.idle = 0
                self._put_again()
            error = self._fill_the_gap(died and not worker.has_served)
            waiting = len(self.calls)
        if error is not None and died:
            self._fail_pending(error)
        elif error is not None:
            report(logging.ERROR, "%d tasks wait, and no thread runs them: %s", waiting, str(error))
        self.look()

    def _fill_the_gap(self, stillborn: int) -> ShutdownError | None:
        """Start a worker if there is none and something waits; under the lock. Return why that
        cannot be.

        Args:
            stillborn: how many threads have just died before their first task.
        """
        if isinstance(self.refusal, PoolStuck):
            self.refusal = None
        if self._workers or not self.calls or self.has_ended or self.refusal is not None:
            return None
        if self._queue.qsize() <= self._signs:
            self._put_again()
        self._stillborn = self._stillborn + stillborn if stillborn else 0
        if self._stillborn >= MOST_STILLBORN:
            self._stillborn = 0
            return ShutdownError(
                f"{MOST_STILLBORN} threads in a row have died before their first task; see the log"
            )
        try:
            self._start(Worker(None), self._workers)
        except ShutdownError as error:
            if self.deadlines.has_started:
                self.deadlines.watch(self, monotonic() + STANDSTILL)
            return error
        return None

    def _put_again(self) -> None:
        """Queue every task that waits: a thread that died may have taken one out, or an interrupt
        may have kept one from being put. Under the lock. A task may stand in the queue twice: it is
        begun once."""
        for task in list(self.calls):
            self._queue.put(task)

    def _run_tasks(self, worker: Worker) -> None:
        running = worker.running
        following = self._next if worker.helps is None else self._next_lent
        while (task := following(worker)) is not None:
            worker.has_served = True
            running.append(task)
            try:
                task._run()
                running.pop()
            except BaseException as error:
                # not the task's own: an interrupt between two steps of its run
                running.pop()
                self.settle(task, error)
            del task  # hold nothing while waiting for the next
            if worker.helper is not None:
                with self._lock:
                    worker.dismiss_helper()

    def _run_inside(self, worker: Worker, task: Task[Any]) -> None:
        """Run a task inside the one that runs on this thread, which waits for it."""
        worker.running.append(task)
        try:
            task._run()
            worker.running.pop()
        except BaseException as error:  # as above
            worker.running.pop()
            self.settle(task, error)
        del task  # as in Task._run: a traceback that leads back here must not hold it
        if self.is_closed:
            # the others on this thread may be past their deadlines, and nobody else may be left
            self.look()

    def settle(self, task: Work, error: BaseException) -> None:
        """Have a task end whose runner was struck by an interrupt, unless somebody else has it in
        hand."""
        report(
            logging.CRITICAL,
            "task %s was interrupted between two steps of its run: %s",
            task.id,
            describe(error),
        )
        if task._fail(error) or task.done():
            return
        with self._lock:
            has_runner = any([task in each.running.copy() for each in self._roster.everybody()])
        if not has_runner:
            task._end_interrupted(error)

    def _initialize(self, worker: Worker) -> bool:
        if self.initializer is None:
            return True
        try:
            self.initializer(*self.initargs)
            worker.variables = tuple(copy_context().items())
        except BaseException as error:
            # First, as in ThreadPoolExecutor: a caller that gets the error finds the cause in the
            # log. Guarded: a handler that raises must not keep the tasks from failing.
            ask(lambda: LOGGER.critical("exception in the pool's initializer", exc_info=True))
            broken = BrokenPool(
                "A thread initializer failed, the thread pool is not usable anymore "
                f"({describe(error)})"
            )
            with self._lock:
                self.refusal = broken
            self._fail_pending(broken)
            return False
        return True

    def _fail_pending(self, error: ShutdownError | PoolStuck) -> None:
        """Fail the tasks that wait: there is no worker for them."""
        for task in list(self.calls):
            task._fail(_again(error))
        self._drop_stale()

    def _do_apart(self, action: Callable[[], object]) -> None:
        """Have a new thread do something that may block; do it here if there can be none."""
        try:
            with self._lock:
                self._start(Worker(action), self._workers)
        except ShutdownError:
            action()

    def _drop_stale(self) -> None:
        """Take the tasks out of the queue that are cancelled, or that a waiting task has run: their
        results must not stay. The caller does not hold the lock: no ``__del__`` may run under
        it."""
        kept: list[Task[Any] | None] = []
        stale: list[Task[Any]] = []
        with self._lock:
            while True:
                try:
                    task = self._queue.get_nowait()
                except queue.Empty:
                    break
                if task is None or not task._has_begun:
                    kept.append(task)
                else:
                    stale.append(task)
            for task in kept:
                self._queue.put(task)

    def _next(self, worker: Worker) -> Task[Any] | None:
        """Return the next task to run, or None when this worker is to end."""
        waiting = self._queue
        while True:
            if worker not in self._workers and not self._takes_its_place(worker):
                # retired while it ran its task
                return None
            if len(self._workers) > self.max_workers and self._leave_surplus(worker):
                return None
            waited = waiting.empty()  # asked first: an exception takes longer than the rest
            if waited:
                with self._lock:
                    if not waiting.empty() or worker not in self._workers:
                        # put between our look and the lock: it counted on no idle worker; or
                        # retired after all, though its late task had just come to its end
                        continue
                    self.idle += 1
                task = waiting.get()
            else:
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    continue
            if task is None:
                with self._lock:
                    self._signs -= 1
                    if waited:
                        # unlike a task, a sign to stop is promised to nobody
                        self.idle = max(0, self.idle - 1)
                    # `resize` leaves signs too, which tasks may stand behind; behind that of
                    # `close` there is none
                    if self.is_closed and self._queue.qsize() <= self._signs:
                        self._put_sign()  # for the next worker
                        self._roster.leave(worker)
                        return None
            else:
                return task

    def _leave_surplus(self, worker: Worker) -> bool:
        """Take a worker out if there are too many after a `resize`; False when another has gone
        already."""
        with self._lock:
            is_surplus = len(self._workers) > self.max_workers
            if is_surplus:
                self._roster.leave(worker)
            return is_surplus

    def _put_sign(self) -> None:
        """Wake a worker with something that is no task; under the lock."""
        self._signs += 1
        self._queue.put(None)

    def _free_workers(self) -> int:
        """Return how many tasks wait for nothing but their worker's getting there, among them one
        whose worker is yet to be started; under the lock."""
        busy = sum(
            any([task not in self.calls and not task.done() for task in each.running.copy()])
            for each in self._workers
        )
        return max(0, min(len(self._workers) + 1, self.max_workers) - busy)

    # -- helpers --

    def _lend(self, worker: Worker, task: Task[Any]) -> None:
        """Have a helper run a queued task that one of ``worker`` waits for, unless there is an idle
        worker for it.

        Raises:
            ShutdownError: there can be no more threads.
        """
        with self._lock:
            # one that is idle and not promised, nor about to leave after a `resize`: so every task
            # in the queue is, to a worker that is about to take it
            if self.idle and len(self._workers) <= self.max_workers:
                return
            if worker.helper is None:
                self._start_helper(worker, None, queue.SimpleQueue())
            assert worker.helper is not None and worker.helper.inbox is not None
            worker.helper.inbox.put(ref(task))

    def _start_helper(
        self, worker: Worker, first: Callable[[], object] | None, inbox: Inbox
    ) -> None:
        helper = Worker(first, worker)
        helper.inbox = inbox
        self._start(helper, self._roster.helpers)
        worker.helper = helper

    def _next_lent(self, helper: Worker) -> Work | None:
        """Return the next task for a helper to run, or None when it is to end."""
        while helper.inbox is not None:
            # A look under the lock, and after its task left ``running``: whoever is about to retire
            # it has either done so, or finds no late task here. Else two would wait at one inbox,
            # and the sign to end might come to the wrong one.
            with self._lock:
                if helper not in self._roster.helpers:
                    break
            reference = helper.inbox.get()
            if reference is None:
                return None
            task = reference()
            if task is not None and not task._has_begun:
                return task
            del task
        return self._next(helper)  # retired while it ran its task: it is like any worker now

    # -- what is past its deadline --

    def _expire(self, due: Any, thread: int) -> None:
        """End a task whose time is over, and replace the thread that runs it. The deadlines'
        thread."""
        if due is self:
            self._look_whether_stuck()
            return
        self._is_expiring = True  # before the task is resolved: its thread may be the last
        try:
            self._end_late(due, thread)
        finally:
            self._is_expiring = False
            self.look()

    def _end_late(self, due: Task[Any], thread: int) -> None:
        with self._lock:
            host = self._roster.host_of(due, thread)
        stack = ""
        if host is not None:  # before the task is asked to stop
            stack = host.stack = due._stack(host)
        left = due._time_out(stack)
        orphans: list[Work] = []
        problem: ShutdownError | None = None
        with self._lock:
            stuck = self._roster.runner_of(due, thread)
            try:
                if stuck is not None:
                    self._replace(stuck, left)
                    left = None
            except ShutdownError as error:
                problem = error
                orphans = (
                    _drain(stuck.inbox) if stuck is not None and stuck.inbox is not None else []
                )
            if not self._workers:
                self.deadlines.watch(self, monotonic() + STANDSTILL)
        if problem is not None:
            report(
                logging.ERROR,
                "the thread that runs task %s past its deadline cannot be replaced: %s",
                due.id,
                str(problem),
            )
        if left is not None:
            self._do_apart(left)
        for task in orphans:
            task._fail(PoolStuck(self._roster.standstill()))

    def _replace(self, stuck: Worker, first: Callable[[], object] | None) -> None:
        """Retire a thread and start another in its place, which does ``first`` first. Under the
        lock.

        Raises:
            ShutdownError: there can be no more threads.
        """
        self._roster.retire(stuck)
        helped = stuck.helps if stuck.helps is not None and stuck.helps.helper is stuck else None
        if helped is None or stuck.inbox is None:
            self._start(Worker(first), self._workers)
        else:
            try:
                self._start_helper(helped, first, stuck.inbox)
            except ShutdownError:
                # not before: its thread looks at it without the lock when its task has ended
                helped.helper = None
                raise
        self._roster.replaced += 1

    def _takes_its_place(self, worker: Worker) -> bool:
        """Let a retired thread that has come back go on if its place is vacant and somebody waits
        for it."""
        with self._lock:
            if isinstance(self.refusal, PoolStuck):
                self.refusal = None
            is_wanted = (worker in self._roster.retired and bool(self.calls) and not self.has_ended
                         and len(self._workers) < self.max_workers)
            if is_wanted:
                self._roster.reinstate(worker)
            return is_wanted

    def _look_whether_stuck(self) -> None:
        """Fail what waits if there is still no worker. The deadlines' thread, a while after the
        last one was retired."""
        with self._lock:
            if self._workers or self.has_ended:
                return
            try:
                self._start(Worker(None), self._workers)
                return
            except ShutdownError:
                self.refusal = PoolStuck(self._roster.standstill())
        self._fail_pending(self.refusal)


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a method of an object that somebody else keeps: a pool that has
    ended leaves no cycle for the garbage collector."""
    reference = WeakMethod(method)

    def call(*args: Any) -> Any:
        found = reference()
        return None if found is None else found(*args)

    return call


def _again(error: ShutdownError | PoolStuck) -> ShutdownError | PoolStuck:
    return type(error)(*error.args)  # each raise adds to an exception's traceback


def _drain(inbox: Inbox) -> list[Work]:
    tasks = []
    while not inbox.empty():
        reference = inbox.get()
        task = reference() if reference is not None else None
        if task is not None:
            tasks.append(task)
    return tasks
