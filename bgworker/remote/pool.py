"""The pool of a Scheduler that has an executor: it hands each call on, and ends each task.

The executor only ever gets `perform` and bytes. What the code says there comes over the channel
(`Hub`), on a thread per process that runs some; the rest comes with the result. Either may tell
first that a task has begun, or what it has said; records are numbered, so each counts once.

Two lanes keep strangers off each other. One ends the tasks, in the order in which the executor
says so: that takes the executor's thread no time, on which its whole work may hang. The other calls
the callbacks of the tasks, which may take as long as they like.

A task is ended by one thread. One that has not begun ends as in any pool: by whoever takes it out
of ``calls``. Whoever takes it out because it has begun puts it among those that run; it ends by
whoever claims it there under the pool's lock: the lane of the ends, the thread that hears that it
is past its deadline, or the deadlines' thread.

Guarantees. Every task that was put ends once, as soon as the executor says how, or at its deadline.
No task has a thread here. An executor is never shut down: it belongs to whoever made it.

An interrupt (Ctrl-C in `put`, in `look`) may strike between any two steps. A task that `put` does
not return ends as cancelled, though the executor may have got it; an end of the pool that was
interrupted happens when somebody next calls `look`, as `close` and `join` do.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import CancelledError, Future
from functools import partial
from weakref import WeakKeyDictionary

from ..model.clock import monotonic
from ..model.errors import ConfigurationError, PendingFull, RemoteError, ShutdownError
from ..model.failure import describe_failure
from ..model.health import AbandonedTask, SchedulerHealth
from ..model.latch import Latch
from ..model.records import CANCELLED, COMPLETED, FAILED, STARTED, TIMED_OUT, WARNING, utc
from ..model.reports import report
from ..model.text import ask, describe, name_of, show
from ..model.threads import own_thread
from ..running.deadlines import Deadlines, keeps_time
from ..running.pool import weakly
from ..running.waits import Waits
from ..running.workers import start
from .hub import Hub
from .messages import Order, decode_report, dumps, encode_order, outcome_of, tell_where
from .task import RemoteTask
from .worker import perform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor
    from typing import Any

    from ..delivery.dispatcher import Dispatcher
    from ..running.pool import Listener
    from ..running.task import Call, Task
    from .hub import Peer
    from .messages import Losses, Records, Report

LATE = 0.25
"""Seconds that a process which runs a task gets to say where the task is at its deadline."""

DRAIN = 1.0
"""Seconds that the last words of a process get on their way when its tasks have ended without a
report."""

CROWDED = 1.0
"""Seconds that records wait at once for the sinks of here before they are taken, or refused and
counted."""

SHARE = 0.1
"""Part of all time that goes into such waits at most: sinks that never keep up are not to hold up
the ends and the deadlines of tasks."""

MOST_LOSERS = 1000
"""Processes whose losses are remembered: those that have told of some last."""


class Lane:
    """A thread that does one thing after the other. Whoever hands it something does not wait."""

    def __init__(self, name: str) -> None:
        self._actions: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._is_stopped = False
        self.thread = own_thread(name, self._run)

    def put(self, action: Callable[[], object]) -> None:
        """Have something done; here and now after `stop`. Any thread."""
        self._actions.put(action)
        if self._is_stopped:  # after the other step: the thread may have had its last look before
            self._do_the_rest()

    def stop(self) -> None:
        """End the thread when it has done what it was handed."""
        self._is_stopped = True
        self._actions.put(_do_nothing)  # wakes it

    def _run(self) -> None:
        while not self._is_stopped:
            self._do(self._actions.get())
        self._do_the_rest()

    def _do_the_rest(self) -> None:
        try:
            while True:
                self._do(self._actions.get_nowait())
        except queue.Empty:
            if self.thread is not threading.current_thread():
                self._actions.put(_do_nothing)  # the thread may still wait for what wakes it

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:  # the thread's boundary: there is more to do
            report(logging.ERROR, "%s: %s", self.thread.name,
                   describe_failure(error, 8192)[2] or "")


class RemotePool:
    """Runs tasks on an executor. It has the methods of `running.pool.Pool` that a Scheduler uses.

    Args:
        executor: has ``submit(function, data)``, which returns a ``concurrent.futures.Future``.
        name: prefix of the names of the threads here.
        channel: "HOST:PORT" where its processes reach this one; None is for those of this machine.
        max_pending: most tasks that wait while every worker has one; None is no bound.
        dispatcher: takes what the tasks say. It is to finish when the pool is closed and its last
            task has ended.

    Raises:
        ConfigurationError: that is no executor, or nothing can listen at ``channel``.
    """

    task_class = RemoteTask
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    idle = 0

    def __init__(self, executor: Executor, name: str, channel: str | None,
                 max_pending: int | None, dispatcher: Dispatcher) -> None:
        if isinstance(executor, type) or not callable(ask(getattr, executor, "submit", None)):
            raise ConfigurationError(
                f"executor: expected an executor, as ProcessPoolExecutor() is one, got "
                f"{show(executor)}"
            )
        self._executor = executor
        self._label = name_of(type(executor))
        self._name = name
        self._max_pending = max_pending
        self._dispatcher = dispatcher
        # those of Python itself have the same `__main__` as this process, or import it
        self._by_value = not type(executor).__module__.startswith("concurrent.futures.")
        self.is_closed = False
        self.refusal: ShutdownError | None = None  # why nothing can run
        self._listener: Listener | None = None
        self._hub = Hub(name, channel, self)
        self._begin_empty()

    def _begin_empty(self) -> None:
        # guards the claims, and `_lost`; a signal handler or a finaliser may come back into it
        self._lock = threading.RLock()
        self.calls: dict[Task[Any], bool] = {}
        """The tasks that nobody has begun."""
        self.ends: list[Task[Any]] = []
        self.awaits_ends = False
        self.deadlines = Deadlines(weakly(self._expire), f"{self._name}-deadlines")
        self.waits = Waits(_do_nothing, _do_nothing)  # nothing of this pool waits for a thread here
        self._running: set[RemoteTask[Any]] = set()
        """Those that have begun and not ended, and those whose callbacks are being called."""
        self._handed: dict[str, RemoteTask[Any]] = {}
        """By id: the tasks of which the executor has not said how they ended."""
        self._lost: dict[str, Losses] = {}
        """By process: what it could not send, as far as that is counted here."""
        self._last_words: WeakKeyDictionary[Peer, float] = WeakKeyDictionary()
        """Until when the end of a connection is waited for."""
        self._waited = 0.0
        """Seconds that records have waited for the sinks, less `SHARE` of the time since ..."""
        self._looked_at = 0.0
        """... up to this moment (monotonic)."""
        self._has_given_up = False
        self._has_started = False
        self.has_ended = False
        """True when it is closed and its last task has ended."""
        self._end = Latch()
        self._ends = Lane(f"{self._name}-ends")
        self._callbacks = Lane(f"{self._name}-callbacks")

    def start_afresh(self) -> None:
        """In a forked child: the executor, its tasks and the channel are the parent's."""
        self._hub.discard()
        self._begin_empty()
        self.refusal = ShutdownError(
            "cannot schedule new futures in a forked child: the executor is its parent's; make a "
            "Scheduler there"
        )

    @property
    def max_workers(self) -> int:
        """How many workers the executor says to have at most, else how many are known."""
        most = ask(getattr, self._executor, "_max_workers", None)
        return most if type(most) is int else len(self._hub.workers())

    @property
    def pending(self) -> int:
        """How many tasks wait."""
        return len(self.calls)

    @property
    def threads(self) -> set[threading.Thread]:
        """Those that run tasks: none."""
        return set()

    def put(self, task: Any, call: Call) -> None:
        """Announce a task and hand it to the executor.

        Raises:
            ShutdownError: the pool is closed, or the executor takes nothing more.
            PendingFull: ``max_pending`` tasks wait already.
        """
        self._look_for_room(0)  # before the pickling, which may take long
        # without the lock: it is the code of whoever made the arguments
        order, problem = self._order(task, call)
        is_announced = False
        try:
            with self._lock:
                # first: a signal handler that closes the pool in here finds that it has a task
                self.calls[task] = True
                self._look_for_room(1)
                if task._task_state.timeout is not None and not keeps_time(call[0]):
                    task._has_deadline = True
                    if not self.deadlines.has_started:
                        self.deadlines.start()
                self._start()
                is_announced = True
                task._announce()
            if problem is None:
                self._hand_on(task, order)
            else:
                task._fail(problem)
                # its frames lead to the Scheduler, which whoever keeps the task would keep
                tell_where(problem, task._task_state.invocation_info or "")
                self.look()
        except BaseException as error:
            problem = None  # its frames lead back to this one, which would hold the Scheduler
            if is_announced:
                self._take_back(task, error)
            else:
                self.calls.pop(task, None)
            self.look()
            raise
        if self._listener is not None and self._listener.is_asleep:
            self._listener.wake()

    def _hand_on(self, task: RemoteTask[Any], order: bytes) -> None:
        """Hand a task to the executor."""
        task._hearing = threading.RLock()
        self._handed[task.id] = task
        try:
            future = task._future = self._executor.submit(perform, order)
            future.add_done_callback(partial(self.say_done, task))
        except Exception as error:
            raise ShutdownError(
                f"cannot schedule new futures: {self._label} takes none "
                f"({describe(error)})") from error
        if (reason := task.cancel_reason) is not None:  # it was asked before there was a future
            task.cancel(reason)

    def _take_back(self, task: RemoteTask[Any], error: BaseException) -> None:
        """End a task that its submitter does not get, and so cannot want to run. After an interrupt
        the executor may have it all the same."""
        self._handed.pop(task.id, None)
        reason = f"{self._label} took no task"
        if not isinstance(error, Exception):
            reason = "interrupted"
            self._hub.stop(task.id, reason)
        if task._future is not None:
            task._future.cancel()
        if not task._end_unbegun(reason) and self._claim(task):
            self.deadlines.forget(task)
            task._end_begun(CANCELLED, None, None, None, (None, reason, None), None)
            self._release(task)

    def _order(self, task: RemoteTask[Any], call: Call) -> tuple[bytes, Exception | None]:
        """Return what the executor gets, or why there can be nothing."""
        function, args, kwargs, _ = call
        state, limits = task._task_state, task._limits
        try:
            payload = dumps((function, args, kwargs), self._by_value)
        except Exception as error:  # whatever pickling runs; RecursionError too
            return b"", error
        return encode_order(Order(
            task.id, task.name, state.run_id, state.timeout, task._captures_output,
            task._records_result,
            (limits.max_payload, limits.oversize, limits.progress_interval, limits.progress_step),
            state.metadata_json, self._hub.ticket, payload)), None

    def _look_for_room(self, own: int) -> None:
        """Raise unless one more task may be put; ``own`` is 1 if that is among ``calls``
        already."""
        if self.refusal is not None:
            raise ShutdownError(*self.refusal.args)
        if self.is_closed:
            raise ShutdownError(f"cannot schedule new futures after {self._closed_by}")
        most, waiting = self._max_pending, len(self.calls) - own
        if most is None or waiting < most:
            return
        if waiting >= most + max(0, self.max_workers - self._count_running()):
            raise PendingFull(
                f"max_pending: {most} tasks are waiting already; wait for some of them")

    def _count_running(self) -> int:
        """Return how many tasks have begun and not ended."""
        with self._lock:
            return sum([not task.done() for task in self._running])

    def _start(self) -> None:
        """Start the threads of the pool, with its first task; under the lock."""
        if not self._has_started:
            for lane in self._ends, self._callbacks:
                if lane.thread.ident is None:
                    start(lane.thread)
            try:
                self._hub.start()
            except RuntimeError as error:
                raise ShutdownError(
                    f"cannot schedule new futures: no thread can be started ({error})") from error
            self._has_started = True

    def resize(self, max_workers: int) -> None:
        """Refuse: the workers are the executor's."""
        raise ConfigurationError(
            f"max_workers: {self._label} has its own workers, got {max_workers}; resize that")

    def grow(self, max_workers: int) -> bool:
        """Return False: how many workers there are is the executor's business."""
        return False

    def close(self, closed_by: str = "shutdown") -> None:
        """Take no more tasks; those that were put still run. Returns at once."""
        with self._lock:
            if not self.is_closed:
                self._closed_by, self.is_closed = closed_by, True
        self.look()

    def cancel_pending(self, reason: str) -> None:
        """Cancel every task that waits, where the executor does; ask the others to stop when they
        begin."""
        tasks = list(self.calls)
        for task in reversed(tasks):  # none is to begin in the place of one before
            task._ask_to_stop(reason)
        for task in [task for task in reversed(tasks) if task._cancel_quietly(reason)]:
            task._tell()

    def stop_running(self, reason: str) -> None:
        """Ask every running task to stop."""
        with self._lock:
            tasks = [task for task in self._running if not task.done()]
        for task in tasks:
            task._ask_to_stop(reason)

    def ask_there(self, task: RemoteTask[Any]) -> None:
        """Have the process that runs a task asked to stop it, or the one that is going to."""
        if task.id in self._handed:
            self._hub.stop(task.id, task.cancel_reason or "")

    def give_up(self) -> None:
        """Leave the tasks that still run to themselves: `join` waits for them no more."""
        with self._lock:
            self._has_given_up = True
        self.look()

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
            return bool(self.calls or self._count_running())

    def is_inside(self) -> bool:
        """Tell whether the caller is on a thread of the pool, which cannot wait for the pool's
        end."""
        thread = threading.current_thread()
        return (thread in (self._ends.thread, self._callbacks.thread)
                or self.deadlines.is_mine(thread) or self._hub.is_mine(thread))

    def join(self, timeout: float | None) -> list[str]:
        """Wait up to ``timeout`` seconds for the tasks to end; return where those are that have
        not."""
        self.look()
        if self.is_inside() or self._end.wait(timeout):
            return []
        with self._lock:
            return [self._label] if self.calls or self._running else []

    def look(self) -> None:
        """End the pool if it is closed and nothing of it is left. Any thread, as often as you
        like."""
        try:
            with self._lock:
                if not self.is_closed or self.has_ended or (
                        (self.calls or self._running) and not self._has_given_up):
                    return
                # before the look: a thread that ends one looks at this afterwards
                self.awaits_ends = True
                if any([not task.done() for task in self.ends.copy()]):
                    return
                self.has_ended = True
            self.deadlines.stop()
            self._ends.stop()
            self._callbacks.stop()
            self._hub.close()
            if self._listener is not None:
                self._listener.stop()
            self._dispatcher.finish()
            self._end.set()
        except BaseException:  # an interrupt: all of it can be done again
            self.has_ended = False
            raise

    def health(self, late_events: int) -> SchedulerHealth:
        """Return the figures of this moment; ``late_events`` is what somebody else has counted."""
        with self._lock:
            handed, running = list(self._handed.values()), self._count_running()
            pending = len(self.calls)
        abandoned = [task for task in handed if task.done() and task._peer is not None]
        workers = len(self._hub.workers())
        return SchedulerHealth(
            max_workers=self.max_workers, workers=workers,
            idle=max(0, workers - running - len(abandoned)), running=running, pending=pending,
            stuck=(), replaced=0, late_events=late_events,
            abandoned=tuple(AbandonedTask(task_id=task.id, task_name=task.name,
                                          where=str(task._peer),
                                          since_utc=utc(task._task_state.completed_ns))
                            for task in sorted(abandoned,
                                               key=lambda task: task._task_state.completed_ns)))

    # -- what the processes say: the threads of the hub, and the lane of the ends --

    def said(self, peer: Peer | None, task_id: str, attempt: str, first: int,
             records: Records) -> None:
        """Take the records of a task, those that have not come before."""
        task = self._handed.get(task_id)
        if task is None:
            return  # it has ended: all this came with its result
        self._let_sinks_catch_up()
        intake = self._dispatcher.intake
        with task._hearing:
            attempts = task._attempts = {} if task._attempts is None else task._attempts
            known = attempts.get(attempt, 0)
            attempts[attempt] = max(known, first + len(records) - 1)
            for kind, ns, data in records[max(0, known + 1 - first):]:
                if kind == STARTED:
                    self._note_begin(task, peer, ns, len(attempts))
                elif task._is_claimed or task.done():
                    for _ in data if type(data) is list else (data,):
                        intake.late.add()
                elif type(data) is list:
                    self._emit_lines(task, kind, data, ns)
                else:
                    intake.emit_weighed(task._task_state, kind, data, ns)

    def _emit_lines(self, task: RemoteTask[Any], kind: int, lines: list[str], ns: int) -> None:
        """Emit what a command has said, no faster than the sinks keep up: its process is told no
        sooner that this has come, and reads the pipes no faster. See `TaskContext._wait_for_room`,
        which does that for a command on a thread."""
        intake, start = self._dispatcher.intake, 0
        while start < len(lines):
            while intake.is_crowded and task._has_time_to_wait and not self.has_ended:
                intake.hurry()
                time.sleep(0.005)
            room = len(lines)
            if task._has_time_to_wait:
                room = intake.room_for(max(map(len, lines)))
            intake.emit_lines(task._task_state, kind, lines[start:start + room], ns)
            start += room

    def _let_sinks_catch_up(self) -> None:
        """Wait until there is room for records, or as long as that may be waited for. Two threads
        that change the figures at once lose a step: one waits a little longer."""
        intake = self._dispatcher.intake
        while intake.is_crowded:
            now = monotonic()
            self._waited = max(0.0, self._waited - SHARE * (now - self._looked_at))
            self._looked_at = now
            if self._waited >= CROWDED:
                return
            intake.hurry()
            time.sleep(0.005)
            self._waited += monotonic() - now

    def _note_begin(self, task: RemoteTask[Any], peer: Peer | None, ns: int, attempt: int) -> None:
        """Take note that a process has begun a task; maybe one that another had begun before."""
        state = task._task_state
        with self._lock:
            task._peer = peer or task._peer
            runs = task in self._running
            self._running.add(task)  # before it waits no more: the pool must not end in between
            is_first = self.calls.pop(task, None) is not None
            if is_first:
                task._begin(ns)
                if task._has_deadline and state.timeout is not None:
                    self.deadlines.watch(task, monotonic() + state.timeout + LATE)
            elif not runs:  # somebody has just ended it, or is about to
                self._running.discard(task)
            is_again = runs and not task._is_claimed
        if is_again:
            self._dispatcher.intake.emit_weighed(
                state, WARNING,
                f"begun again by {self._label}: attempt {attempt}, in {peer or 'a process'}", ns)
        if state.stop_reason is not None:
            self.ask_there(task)

    def losses(self, worker: str, totals: Losses) -> None:
        """Count what a process could not send; ``totals`` are those since it began."""
        if not totals:
            return
        with self._lock:
            known = self._lost[worker] = self._lost.pop(worker, {})  # now the last
            if len(self._lost) > MOST_LOSERS:
                del self._lost[next(iter(self._lost))]
            news = {each: total - known.get(each, 0) for each, total in totals.items()}
            known.update({each: totals[each] for each, more in news.items() if more > 0})
        for (kind, reason), more in news.items():
            for _ in range(more):
                if reason == "late":
                    self._dispatcher.intake.late.add()
                else:
                    self._dispatcher.intake.refuse(kind, reason)

    def overdue(self, peer: Peer, task_id: str, attempt: str, stack: str) -> None:
        """End a task at its deadline; the process that runs it says where it is."""
        task = self._handed.get(task_id)
        if task is not None and self.deadlines.forget(task):
            self._end_late(task, stack)

    def gone(self, peer: Peer) -> None:
        """Do nothing: whoever waits for the end of a connection looks at ``peer.ended``."""

    # -- the end of a task --

    def say_done(self, task: RemoteTask[Any], future: Future[bytes]) -> None:
        """Have a task ended whose body the executor has ended: on any thread, at once."""
        self._ends.put(partial(self._finish, task, future))

    def _finish(self, task: RemoteTask[Any], future: Future[bytes]) -> None:
        """End a task as its executor says. The lane of the ends."""
        task._has_reported = True
        found, error = _answer(future)
        try:
            if found is not None:
                self.losses(found.worker, found.losses)
                if found.records:
                    self.said(None, task.id, found.attempt, found.first, found.records)
            elif task._peer is not None and not task.done():
                self._wait_for_last_words(task._peer)
        finally:
            # before its end can be seen: it is not abandoned
            self._handed.pop(task.id, None)
            task._future = None
            if found is not None or error is not None or not self._by_value:
                # else it may still begin: dask says that it has cancelled one, and runs it
                self._hub.forget(task.id)
            try:
                if found is not None and found.kind != CANCELLED and task in self.calls:
                    # what its process said of that was not noted
                    self._note_begin(task, None, time.time_ns() - int(found.duration * 1e9), 1)
                if not self._end_unbegun(task, error) and self._claim(task):
                    self.deadlines.forget(task)
                    self._end_begun(task, found, error)
            finally:
                self.look()

    def _end_unbegun(self, task: RemoteTask[Any], error: BaseException | None) -> bool:
        """End a task of which no process has ever said that it began it; False if one has, or if
        somebody else has ended it."""
        if task not in self.calls:
            return False
        kind, failure, reason = FAILED, task._describe(error), None
        if error is None:
            kind, reason = CANCELLED, task.cancel_reason or f"{self._label} cancelled it"
            failure = None, reason, None
        with self._lock:
            if not task._end_before_begun(kind, error, failure, reason):
                return False
            task._is_claimed = True  # before it is among those that somebody may claim ...
            self._running.add(task)  # ... until its callbacks were called
        self._release(task)
        return True

    def _end_begun(self, task: RemoteTask[Any], found: Report | None,
                   error: BaseException | None) -> None:
        """End a task that has begun, and that the caller has claimed."""
        kind, result, failure, duration, result_json = FAILED, None, None, None, None
        if found is not None:
            kind, failure, duration = found.kind, found.failure, found.duration
            result, error = outcome_of(found)
            if error is not None and kind == COMPLETED:
                kind = FAILED  # what came back cannot be loaded
            elif kind == COMPLETED:
                result_json = found.result_json
        elif error is None:
            kind = CANCELLED
            failure = None, task.cancel_reason or f"{self._label} cancelled it", None
        timeout = task._task_state.timeout
        try:
            if not task._has_deadline or (duration or 0.0) <= (timeout or 0.0):
                task._end_begun(kind, duration, result, error, failure, result_json)
            else:  # it has timed out, whether or not its process could tell at that time
                stack = failure[2] if failure is not None and kind == TIMED_OUT else None
                task._time_out(stack or "")
        finally:
            self._release(task)

    def _claim(self, task: RemoteTask[Any]) -> bool:
        """Tell whether it is the caller who ends a task that has begun."""
        with self._lock:
            is_mine = task in self._running and not task._is_claimed
            task._is_claimed = task._is_claimed or is_mine
            return is_mine

    def _release(self, task: RemoteTask[Any]) -> None:
        """Let the pool end without a task that is resolved, once its callbacks were called."""
        if task._done_callbacks:
            self._callbacks.put(partial(self._tell, task))
        else:
            self._let_go(task)

    def _tell(self, task: RemoteTask[Any]) -> None:
        try:
            task._tell()
        finally:
            self._let_go(task)

    def _let_go(self, task: RemoteTask[Any]) -> None:
        with self._lock:
            self._running.discard(task)
        self.look()

    def _expire(self, task: RemoteTask[Any], thread: int) -> None:
        """End a task whose process has not said where it is at its deadline. The deadlines'
        thread."""
        self._end_late(task, "")

    def _end_late(self, task: RemoteTask[Any], stack: str) -> None:
        if self._claim(task):
            try:
                task._time_out(f"{stack}The task may still run in {task._peer}, which was asked to "
                               "stop it.\n")
            finally:
                self._release(task)

    def _wait_for_last_words(self, peer: Peer) -> None:
        """Wait for what a process has said before its tasks ended without a report: a moment for
        all of them together."""
        for latest in self._hub.workers():  # it may have connected again
            if latest.worker == peer.worker:
                until = self._last_words.setdefault(latest, monotonic() + DRAIN)
                latest.ended.wait(max(0.0, until - monotonic()))

    def settle(self, task: Task[Any], error: BaseException) -> None:
        """Have a task end whose end was struck by an interrupt before it had begun."""
        report(logging.CRITICAL, "task %s was interrupted between two steps of its end: %s",
               task.id, describe(error))
        if task._fail(error) or task.done():
            return
        with self._lock:
            has_begun = task in self._running
        if not has_begun:
            task._end_interrupted(error)


def _answer(future: Future[bytes]) -> tuple[Report | None, BaseException | None]:
    """Return what an executor's future has brought: a report, or an error, or neither if it was
    cancelled."""
    try:
        error = future.exception()  # not raised: a traceback would hold the frames of here
        if error is None:
            return decode_report(future.result()), None
    except BaseException as raised:
        error = raised.with_traceback(None)
    return None, None if isinstance(error, CancelledError) else error


def _do_nothing(*args: object) -> None:
    """Stand in for what only a pool of threads can do."""
