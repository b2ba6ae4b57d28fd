"""A task: the future that its submitter holds.

`Task` is a `concurrent.futures.Future`; whatever waits on futures waits on tasks. Who resolves a
task is settled by two claims, each won by exactly one thread: who *starts* it (a worker, or
``cancel``) takes its call out of a dict, and who *ends* it (the worker that ran it, or the
deadline) takes it out of the deadlines.

To end is three steps: the terminal event is recorded, then the future is resolved, then its
callbacks are called. No code of the user's runs before the third: what describes a failure runs
before the end, in the task's own time. A thread that has begun a task leaves it only after the
second step, and the pool ends only when all have.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError, TimeoutError
from types import CoroutineType

from ..model.checks import members, number
from ..model.clock import monotonic
from ..model.enums import StreamType, TaskStatus
from ..model.errors import PoolDeadlock, TaskCancelled, TaskTimedOut
from ..model.failure import describe_failure, without_frames
from ..model.records import (
    CANCELLED,
    COMPLETED,
    CREATED,
    FAILED,
    STARTED,
    STATUSES,
    STREAMS,
    TIMED_OUT,
    TaskState,
    event,
)
from ..model.text import ask, clean, fit, fit_json, json_text, name_of
from .context import (
    CURRENT,
    Identity,
    Limits,
    TaskContext,
    ask_to_stop,
    checkpoint,
    context_of,
    current_task,
)
from .deadlines import keeps_time
from .future import CANCELLED_AND_NOTIFIED, FINISHED, RUNNING, LightFuture
from .workers import current_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from concurrent.futures import Future
    from contextvars import Context
    from types import CodeType
    from typing import Any, Protocol, Tuple, TypeVar

    from ..delivery.dispatcher import Dispatcher
    from ..model.events import StreamEvent, TaskSnapshot
    from .deadlines import Deadlines
    from .waits import Waits
    from .workers import Worker

    T = TypeVar("T")
    Failure = Tuple["str | None", "str | None", "str | None"]  # type, message, traceback
    """What a task's state holds of it: type, message, and more about it."""
    Call = Tuple[Callable[..., Any], Tuple[Any, ...], dict[str, Any], Context]

    class Runner(Protocol):
        """What a task needs of the pool that runs it."""

        calls: dict[Task[Any], Any]
        """Of the tasks that nobody has begun."""
        ends: list[Task[Any]]
        """Those that are being ended before anybody has begun them, by whatever thread. A task may
        be here twice."""
        awaits_ends: bool
        """True when the pool would have ended but for these: the thread that ends one then has the
        pool `look`."""

        deadlines: Deadlines
        """Of the tasks that run and have a timeout."""

        initializer: Callable[..., object] | None
        """What the threads that run tasks have called first."""

        @property
        def waits(self) -> Waits: ...
        def look(self) -> None: ...
        def settle(self, task: Task[Any], error: BaseException) -> None: ...

LOOK_AGAIN = 2.0
"""Seconds after which a thread that waits for a task looks whether a worker is left to run it."""

__all__ = ["Task", "TaskContext", "checkpoint", "current_task"]

_RUNNING = TaskStatus.RUNNING  # up to 3.11 a member of an enum is slow to find


class Task(Identity, LightFuture["T"]):
    """One call on its way through a `Scheduler`. Made by ``submit``; all methods may be called from
    any thread.

    ``result()`` raises what the callable raised, ``concurrent.futures.CancelledError`` after a
    cancel, and `TaskTimedOut` after a run timeout; a ``TimeoutError`` from ``result(timeout)``
    means only that the wait ran out.
    """

    def __init__(self, state: TaskState, runner: Runner, dispatcher: Dispatcher, limits: Limits,
                 metadata: Mapping[str, Any]) -> None:
        LightFuture.__init__(self)  # up to 3.11 ``super()`` takes twice as long
        self._task_state = state
        self._runner = runner
        self._dispatcher = dispatcher
        self._limits = limits
        self._metadata = metadata
        self._captures_output = False
        """Whether what its code prints, logs and warns goes to its streams too; set before it is
        queued, as is the next."""
        self._records_result = False
        """Whether the record holds what its code returns."""

    def _notice_waiter(self) -> None:
        if current_worker() is not None:
            self._runner.waits.notice(self)

    @property
    def status(self) -> TaskStatus:
        """Where the task is in its life."""
        return self._task_state.status

    def snapshot(self) -> TaskSnapshot:
        """Return what is known of the task now."""
        return self._task_state.snapshot_now()

    def streams(
        self, *, since: int = 0, types: Collection[StreamType | str] | None = None
    ) -> list[StreamEvent]:
        """Return the newest of the task's stream events that are still in memory, in order.

        Args:
            since: only events with a greater ``seq``.
            types: only these streams.
        """
        wanted = None if types is None else members("types", StreamType, types)
        since = number("since", since, whole=True)
        tail = self._dispatcher.call(lambda: list(self._task_state.tail or ())) or ()
        return [event(record) for record in tail  # type: ignore[misc]
                if record[1] > since and (wanted is None or STREAMS[record[2]] in wanted)]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the task has ended; False when ``timeout`` seconds passed first. Raises
        nothing.

        From inside a task of the same scheduler, a wait that could never end returns False at once.
        """
        if timeout is None:
            try:
                self._wait_for_ever()
            except PoolDeadlock:
                return self.done()
            return True
        return self._ends_within(timeout)

    def _wait_for_ever(self) -> None:
        """Wait without a timeout; a worker of the same pool does the task's work itself if nobody
        has begun it."""
        if self.done():
            return
        is_inside = current_worker() is not None and self._runner.waits.begin(self)
        try:
            while not self._sleep(LOOK_AGAIN):
                self._runner.look()  # the thread that was to run it may have died without a word
        finally:
            if is_inside:
                self._runner.waits.end(self)

    def cancel(self, reason: str = "user") -> bool:
        """Cancel the task if it has not started, at once; ask it to stop if it has.

        Returns: True only if it will never run (`Future`'s contract). A running task is asked to
            stop and False comes back: it ends at its next ``checkpoint()``, or not at all if it
            never looks.
        """
        if self.done():
            return self.cancelled()
        reason = "user" if reason is None else clean(reason, self._limits.max_payload)
        self._ask_to_stop(reason)
        if self._cancel_quietly(reason):
            self._tell()
            return True
        # somebody else may have been first, or it ran, and has just ended because it was asked to
        return self.cancelled() and self._task_state.started_ns is None

    # -- the runner's side --

    def _announce(self) -> None:
        """Have the record begin: the task is created, and waits; one record, which the dispatcher
        makes two events of."""
        state, intake = self._task_state, self._dispatcher.intake
        if intake.is_heard:
            intake.emit_lifecycle(state, CREATED, state.created_ns)
        else:
            state.seq = 2

    def _run(self) -> bool:
        """Run the task and return when it has ended; False if somebody else has started or
        cancelled it."""
        # one atomic step: the thread that gets the call starts the task
        call = self._runner.calls.pop(self, None)
        if call is None:
            return False
        state = self._task_state
        self._state = RUNNING
        intake = self._dispatcher.intake
        state.speaks_to = intake, self._limits, self._metadata
        state.started_ns = now = time.time_ns()
        state.status = _RUNNING
        started = time.monotonic_ns()
        if state.seq == 2 and not intake.is_heard:  # the dispatcher has no record of it
            state.seq = 3
        else:
            intake.emit_lifecycle(state, STARTED, now)
        function, args, kwargs, variables = call
        deadlines = None
        if state.timeout is not None and not keeps_time(function):
            due = context_of(state)._deadline = monotonic() + state.timeout
            # these also at the end: a child that the task forks gets new ones
            deadlines = self._runner.deadlines
            deadlines.watch(self, due)
        kind, final_state, result, error, failure = COMPLETED, FINISHED, None, None, None
        try:
            if self._runner.initializer is not None and (worker := current_worker()) is not None:
                for variable, value in worker.variables:
                    variables.run(variable.set, value)
            variables.run(CURRENT.set, state)
            if self._captures_output:
                result = variables.run(run_captured, context_of(state), function, args, kwargs)
            else:
                result = variables.run(function, *args, **kwargs)
                # what was returned tells, whatever was called: a partial, a method, an object, a
                # function that wraps another
                if result is not None and is_coroutine(result):
                    result = variables.run(finished, result, context_of(state))
        except BaseException as raised:
            # the thread's boundary: all of it is raised by `result`
            error = raised
            del raised
        # in whole nanoseconds: a float with few digits is text in half the time
        duration = (time.monotonic_ns() - started) / 1e9
        recorded = None
        if error is not None:  # looks at the user's exception, in the task's own time
            kind, failure = verdict(
                error, state.context, self._limits.max_payload, Task._run.__code__
            )
            if kind == CANCELLED:
                final_state, error = CANCELLED_AND_NOTIFIED, None
        elif self._records_result:  # so it looks at the result; nobody can have changed it yet
            recorded = fit_json(variables.run(json_text, result), self._limits.max_payload)[0]
        del call, function, args, kwargs, variables
        if deadlines is None or deadlines.forget(self):
            if recorded is not None:
                state.result = recorded
            self._record_end(kind, duration, result, error, failure)
            self._resolve(final_state)
            if self._done_callbacks:
                self._tell()
        else:  # its time is over: another thread is about to end it, and this one waits for that
            self._sleep(-1)
        state.context = None
        # the traceback's frames lead back to this one, which would hold the exception
        del self, result, error
        return True

    def _stack(self, worker: Worker) -> str:
        """Return where the task is that runs on a worker's thread: its stack from its own function
        inward, or what tells more than that. Text of whole lines, as much as fits; none where
        nothing can be told. Any thread, without a lock: it may read files.
        """
        from . import stacks

        return ask(lambda: stacks.of_context(
            self._task_state.context, worker.thread.ident or 0, Task._run.__code__,
            worker.running.index(self), self._limits.max_payload)) or ""

    def _time_out(self, stack: str) -> Callable[[], object] | None:
        """End a running task because its time is over. The deadlines' thread, which took it out
        of the deadlines.

        Args:
            stack: where it was.

        Returns: what is left to do, which is the user's code and may take long. None if nothing is.
        """
        timeout = self._task_state.timeout
        error = TaskTimedOut(f"ran longer than its timeout of {timeout:g} s")
        kind, message, info = describe_failure(error, self._limits.max_payload)
        failure = kind, message, stack or info
        try:
            self._ask_to_stop("timeout")
            self._record_end(TIMED_OUT, timeout, None, error, failure)
        finally:  # the task's own thread waits for this
            self._resolve(FINISHED)
        return self._tell if self._done_callbacks else None

    @property
    def _has_begun(self) -> bool:
        """True once the task was started or cancelled, by whomever."""
        return self not in self._runner.calls

    @property
    def _reacts_to_cancel(self) -> bool:
        """True while the running code will end soon after it was asked to stop."""
        context = self._task_state.context  # once: the task's own thread sets it to None
        return context is not None and context._reacts_to_cancel

    def _ask_to_stop(self, reason: str) -> None:
        """Ask the running code to stop; the first reason stays."""
        ask_to_stop(self._task_state, reason)

    def _cancel_quietly(self, reason: str) -> bool:
        """Cancel the task if nobody has begun it, and call no callback yet."""
        return self._end_before_begun(CANCELLED, None, (None, reason, None), reason)

    def _fail(self, error: BaseException) -> bool:
        """End a task that has not started because it never can; False if somebody has started or
        cancelled it."""
        if self._end_before_begun(FAILED, error, describe_failure(error, self._limits.max_payload)):
            self._tell()
            return True
        return False

    def _end_before_begun(self, kind: int, error: BaseException | None, failure: Failure,
                          reason: str | None = None) -> bool:
        runner = self._runner
        # before the claim: the pool does not end while a task is in nobody's hands
        runner.ends.append(self)
        try:
            if runner.calls.pop(self, None) is None:
                return False
            if self._task_state.stop_reason is None:
                self._task_state.stop_reason = reason
            self._end(kind, None, None, error, failure)
        except BaseException as interrupt:
            runner.settle(self, interrupt)
            raise
        finally:
            runner.ends.remove(self)
            if runner.awaits_ends:
                self._dispatcher.intake.post(runner.look)
        return True

    def _end_interrupted(self, error: BaseException) -> None:
        """End a task whose runner was interrupted between two of its steps. The caller knows that
        no other thread has it in hand."""
        self._runner.deadlines.forget(self)
        state = self._task_state
        if not state.completed_ns:
            name = name_of(type(error))
            self._end(
                FAILED,
                None,
                None,
                error,
                (name, f"interrupted by {name} between two steps of its run", None),
            )
        elif not self.done():
            # its end was decided, and may be recorded: of two records the second is dropped
            kind = (
                FAILED if state.failure_type else CANCELLED if state.failure_message else COMPLETED
            )
            self._end(kind, state.duration, self._result, self._exception, None)
        self._tell()

    def _end(self, kind: int, duration: float | None, result: Any, error: BaseException | None,
             failure: Failure | None) -> None:
        """Record the end, then resolve the future: when the result can be seen, the event is on its
        way."""
        self._record_end(kind, duration, result, error, failure)
        self._resolve(CANCELLED_AND_NOTIFIED if kind == CANCELLED else FINISHED)

    def _record_end(
        self,
        kind: int,
        duration: float | None,
        result: Any,
        error: BaseException | None,
        failure: Failure | None,
    ) -> None:
        state, dispatcher = self._task_state, self._dispatcher
        # of a task that has begun, the one of then: a child that the task forks has another, and
        # in there the task is silent
        context, intake = state.context, (state.speaks_to or (dispatcher.intake,))[0]
        if context is not None and (context._unshown is not None or context._flush is not None):
            context._say_last()
        if failure is not None:
            state.failure_type, state.failure_message, state.invocation_info = failure
        self._result = result
        self._exception = error
        state.duration = duration
        state.completed_ns = now = time.time_ns()
        if (
            state.seq == 3
            and context is None
            and not intake.is_heard
            and intake is dispatcher.intake
        ):
            dispatcher.end_unheard(state, kind)  # it has said nothing, and no record of it waits
        else:
            intake.emit_lifecycle(state, kind, now)
        state.status = STATUSES[kind]  # last: when the end can be seen, its event is on its way

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Have ``fn`` called with the task when it has ended, as in `Future`.

        Raises:
            PoolDeadlock: a coroutine of the same scheduler is about to await the task, and the wait
                could never end.
        """
        if current_worker() is not None:
            self._runner.waits.notice_callback(self, fn)
        super().add_done_callback(fn)

    def result(self, timeout: float | None = None) -> T:
        """Return what the callable returned, waiting up to ``timeout`` seconds for it.

        Raises:
            TimeoutError: the wait ran out (``concurrent.futures.TimeoutError``); the task goes on.
            CancelledError: the task was cancelled (``concurrent.futures.CancelledError``).
            TaskTimedOut: the task ran longer than its own timeout.
            PoolDeadlock: called from a task of the same scheduler, and the wait could never end.
            BaseException: what the callable raised.

        From inside a task of the same scheduler, without a timeout, a task that is still queued
        runs here and now.
        """
        try:
            if self._state != FINISHED:
                self._await_result(timeout)
            if self._exception is None:
                return self._result  # type: ignore[no-any-return]
            raise self._exception
        finally:
            del self  # the traceback holds this frame, which would hold the exception

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the callable raised, or None; waits and raises as `result` does."""
        if self._state != FINISHED:
            self._await_result(timeout)
        return self._exception

    def _await_result(self, timeout: float | None) -> None:
        if timeout is None:
            self._wait_for_ever()
        elif not self._ends_within(timeout):
            raise TimeoutError()
        if self._state != FINISHED:
            raise CancelledError()

    def __repr__(self) -> str:
        return f"<Task {self.name!r} {self.id} {self.status}>"


def run_captured(
    context: TaskContext,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call ``function``, and have what it prints, logs and warns go to the streams of its task.
    To be run inside the context variables of that."""
    from .capture import Capture

    context._captures_output = True

    with Capture(context):
        result = function(*args, **kwargs)
        return finished(result, context) if is_coroutine(result) else result


def is_coroutine(result: object) -> bool:
    """Tell whether it is one of Python's own coroutines, or of a compiler's (Cython, mypyc)."""
    kind = type(result)
    if kind is CoroutineType:
        return True
    try:
        return kind not in _PLAIN and issubclass(kind, Coroutine)
    except BaseException:  # a metaclass of the user's
        return False


_PLAIN = frozenset((bool, int, float, str, bytes, list, tuple, dict, set))


def finished(coroutine: Coroutine[Any, Any, Any], context: TaskContext) -> Any:
    """Run a coroutine, which the function of a task has returned, to its end."""
    from .coroutines import run_coroutine  # it loads asyncio

    result, error = run_coroutine(coroutine, context)
    if error is None:
        return result
    try:
        raise error
    finally:
        del error  # the traceback holds this frame, which would hold the exception


_OURS = run_captured.__code__, finished.__code__


def verdict(
    error: BaseException, context: TaskContext | None, max_bytes: int, *runners: CodeType
) -> tuple[int, Failure]:
    """Return how a task ends whose code has raised, and what is recorded of that; ``runners``
    are the functions of ours that have run it."""
    # these frames would hold the task in a cycle, and tell nobody anything
    without_frames(error, (*runners, *_OURS))
    place = None if context is None else context._overdue_at
    if place is not None and type(error) is TaskTimedOut:
        error.__traceback__ = None  # it tells where a clock was looked at
        name, message, info = describe_failure(error, max_bytes)
        return TIMED_OUT, (name, message, fit(place, max_bytes)[0] or info)
    kind = CANCELLED if issubclass(type(error), TaskCancelled) else FAILED
    return kind, describe_failure(error, max_bytes)
