"""A task: the future that its submitter holds.

`Task` is a `concurrent.futures.Future`; whatever waits on futures waits on tasks. Who resolves a task is settled by two
claims, each won by exactly one thread: who *starts* it (a worker, or ``cancel``) takes its call out of a dict, and who
*ends* it (the worker that ran it, or the deadline) takes it out of the deadlines.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, TimeoutError

from ..model.failure import describe_failure, reason_of, without_frames
from ..model.enums import StreamType, TaskStatus
from ..model.errors import PoolDeadlock, TaskCancelled, TaskTimedOut
from ..model.records import CANCELLED, COMPLETED, CREATED, FAILED, STARTED, STREAMS, TIMED_OUT, TaskState, event, keep_attributes_in_place
from ..model.text import clean
from .context import Limits, TaskContext, checkpoint, current_task, finished, run_as
from .future import CANCELLED_AND_NOTIFIED, FINISHED, RUNNING, LightFuture
from .waits import current_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from concurrent.futures import Future
    from contextvars import Context
    from typing import Any, Protocol, Tuple, TypeVar

    from ..delivery.dispatcher import Dispatcher
    from ..model.events import StreamEvent, TaskSnapshot
    from .deadlines import Deadlines
    from .waits import Waits

    T = TypeVar("T")
    Call = Tuple[Callable[..., Any], Tuple[Any, ...], dict[str, Any], Context]

    class Runner(Protocol):
        """What a task needs of the pool that runs it."""

        calls: dict[Task[Any], Call]
        """Of the tasks that nobody has begun."""
        deadlines: Deadlines
        """Of the tasks that run and have a timeout."""

        @property
        def waits(self) -> Waits: ...

__all__ = ["Task", "TaskContext", "checkpoint", "current_task"]

_STATUS = {COMPLETED: TaskStatus.COMPLETED, FAILED: TaskStatus.FAILED, CANCELLED: TaskStatus.CANCELLED,
           TIMED_OUT: TaskStatus.TIMED_OUT}


class Task(LightFuture["T"]):
    """One call on its way through a `Scheduler`. Made by ``submit``; all methods may be called from any thread.

    ``result()`` raises what the callable raised, ``concurrent.futures.CancelledError`` after a cancel, and
    `TaskTimedOut` after a run timeout; a ``TimeoutError`` from ``result(timeout)`` means only that the wait ran out.
    """

    # What most tasks leave as it is has its default here: setting it costs a third of making a task.
    _context: TaskContext | None = None  # while it runs
    _stop_reason: str | None = None
    has_timeout = False
    """True when its run will have a deadline."""
    captures_output = False
    """Whether what its code prints, logs and warns goes to its streams too; set before it is queued."""

    def __init__(self, state: TaskState, runner: Runner, dispatcher: Dispatcher, limits: Limits,
                 metadata: Mapping[str, Any]) -> None:
        super().__init__()
        self._task_state = state
        self._runner = runner
        self._dispatcher = dispatcher
        self._limits = limits
        self._metadata = metadata
        if state.timeout is not None:
            self.has_timeout = True

    def _notice_waiter(self) -> None:
        if current_worker() is not None:
            self._runner.waits.notice(self)

    @property
    def id(self) -> str:
        """32 hex digits; ids sort by creation time."""
        return self._task_state.id

    @property
    def name(self) -> str:
        """The name given in ``options(name=...)``, else the callable's qualified name."""
        return self._task_state.name

    @property
    def status(self) -> TaskStatus:
        """Where the task is in its life."""
        return self._task_state.status

    @property
    def cancel_requested(self) -> bool:
        """True once the task was asked to stop; it may still run."""
        return self._stop_reason is not None

    @property
    def cancel_reason(self) -> str | None:
        """Why it was asked to stop."""
        return self._stop_reason

    def snapshot(self) -> TaskSnapshot:
        """Return what is known of the task now."""
        return self._task_state.snapshot_now()

    def streams(self, *, since: int = 0, types: Collection[StreamType | str] | None = None) -> list[StreamEvent]:
        """Return the newest of the task's stream events that are still in memory, in order.

        Args:
            since: only events with a greater ``seq``.
            types: only these streams.
        """
        wanted = None if types is None else {StreamType(each) for each in types}
        tail = self._dispatcher.call(lambda: list(self._task_state.tail or ()))
        return [event(record) for record in tail  # type: ignore[misc]
                if record[1] > since and (wanted is None or STREAMS[record[2]] in wanted)]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the task has ended; False when ``timeout`` seconds passed first. Raises nothing.

        From inside a task of the same scheduler, a wait that could never end returns False at once.
        """
        if timeout is None:
            try:
                self._wait_for_ever()
            except PoolDeadlock:
                return self.done()
            return True
        return self.done() or self._sleep(timeout)

    def _wait_for_ever(self) -> None:
        """Wait without a timeout; a worker of the same pool does the task's work itself if nobody has begun it."""
        if self.done():
            return
        is_inside = current_worker() is not None and self._runner.waits.begin(self)
        try:
            self._sleep(None)
        finally:
            if is_inside:
                self._runner.waits.end(self)

    def cancel(self, reason: str = "user") -> bool:
        """Cancel the task if it has not started, at once; ask it to stop if it has.

        Returns: True only if it will never run (`Future`'s contract). A running task is asked to stop and False comes
            back: it ends at its next ``checkpoint()``, or not at all if it never looks.
        """
        if self.done():
            return self.cancelled()
        reason = clean(reason, self._limits.max_payload)
        self._ask_to_stop(reason)
        if self._runner.calls.pop(self, None) is not None:
            self._end(CANCELLED, cancel_reason=reason)
            return True
        return self.cancelled()

    def _ask_to_stop(self, reason: str) -> None:
        """The first reason stays. Written before the look at the context; `run` makes that before it looks for a reason."""
        if self._stop_reason is None:
            self._stop_reason = reason
        if (context := self._context) is not None:
            context.request_stop(self._stop_reason)

    # -- the runner's side --

    @property
    def state(self) -> TaskState:
        """The record of the task, without its function, arguments, result and exception."""
        return self._task_state

    def announce(self) -> None:
        """Have the record begin: the task is created, and waits; one record, which the dispatcher makes two events of."""
        state = self._task_state
        self._dispatcher.intake.emit_lifecycle(state, CREATED, state.created_ns)

    def run(self) -> bool:
        """Run the task and return when it has ended; False if somebody else has started or cancelled it."""
        call = self._runner.calls.pop(self, None)  # one atomic step: who gets the call starts the task
        if call is None:
            return False
        state = self._task_state
        self._state = RUNNING
        intake = self._dispatcher.intake
        context = self._context = TaskContext(state, intake, self._limits, self._metadata)
        if self._stop_reason is not None:
            context.request_stop(self._stop_reason)
        if self.captures_output:
            context.captures_output = True
        state.started_ns = now = time.time_ns()
        state.status = TaskStatus.RUNNING
        started = time.monotonic_ns()
        intake.emit_lifecycle(state, STARTED, now)
        deadlines = None
        if state.timeout is not None:
            context.deadline = started / 1e9 + state.timeout
            deadlines = self._runner.deadlines  # these also at the end: a child that the task forks gets new ones
            deadlines.watch(self, context.deadline)
        kind, result, error = COMPLETED, None, None
        function, args, kwargs, variables = call
        try:
            result = variables.run(run_as, context, function, args, kwargs)
        except BaseException as raised:  # the thread's boundary: it all goes to who waits for the result
            # our own frames would hold this task in a cycle, and tell nobody anything
            kind, error = FAILED, without_frames(raised, _OURS)
            del raised
        duration = (time.monotonic_ns() - started) / 1e9  # in whole nanoseconds: a float with few digits is text in half the time
        del call, function, args, kwargs, variables
        if deadlines is None or deadlines.forget(self):
            if error is not None and issubclass(type(error), TaskCancelled):
                self._end(CANCELLED, duration, cancel_reason=reason_of(error, self._limits.max_payload))
            else:
                self._end(kind, duration, result, error)
        self._context = None
        del self, result, error  # the traceback's frames lead back to this one, which would hold the exception
        return True

    def time_out(self) -> None:
        """End a running task because its time is over. The supervisor's thread, which took it out of the deadlines."""
        timeout = self._task_state.timeout
        try:
            self._ask_to_stop("timeout")
        finally:  # whatever a cancel callback raises
            self._record_end(TIMED_OUT, timeout, error=TaskTimedOut(f"ran longer than its timeout of {timeout:g} s"))

    def publish(self) -> None:
        """Resolve the future after `time_out`. Apart, because callbacks may take long and the supervisor may not."""
        self._resolve(FINISHED)

    @property
    def has_begun(self) -> bool:
        """True once the task was started or cancelled, by whomever."""
        return self not in self._runner.calls

    @property
    def reacts_to_cancel(self) -> bool:
        """True while the running code has asked to be called when it is to stop."""
        return self._context is not None and self._context.reacts_to_cancel

    def fail(self, error: BaseException) -> None:
        """End a task that has not started because it never can."""
        if self._runner.calls.pop(self, None) is not None:
            self._end(FAILED, error=error)

    def _end(self, kind: int, duration: float | None = None, result: Any = None, error: BaseException | None = None,
             cancel_reason: str | None = None) -> None:
        """Record the end, then resolve the future: who sees the result can count on the event being on its way."""
        self._record_end(kind, duration, result, error, cancel_reason)
        self._resolve(CANCELLED_AND_NOTIFIED if kind == CANCELLED else FINISHED)

    def _record_end(self, kind: int, duration: float | None, result: Any = None, error: BaseException | None = None,
                    cancel_reason: str | None = None) -> None:
        state, context = self._task_state, self._context
        if context is not None and context.holds_back:
            context.say_last()
        if error is not None:
            state.failure_type, state.failure_message, state.invocation_info = describe_failure(
                error, self._limits.max_payload)
        elif cancel_reason is not None:
            state.failure_message = cancel_reason
        state.duration = duration
        state.completed_ns = now = time.time_ns()
        state.status = _STATUS[kind]
        intake = self._dispatcher.intake if context is None else context.intake
        intake.emit_lifecycle(state, kind, now)
        self._result = result
        self._exception = error

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Have ``fn`` called with the task when it has ended, as in `Future`.

        Raises:
            PoolDeadlock: a coroutine of the same scheduler is about to await the task, and the wait could never end.
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

        From inside a task of the same scheduler, without a timeout, a task that is still queued runs here and now.
        """
        try:
            error = self.exception(timeout)
            if error is not None:
                raise error
            return self._result  # type: ignore[no-any-return]
        finally:
            error = None
            del self  # the traceback holds this frame, which would hold the exception

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the callable raised, or None; waits and raises as `result` does."""
        if self._state != FINISHED:
            if timeout is None:
                self._wait_for_ever()
            elif not self.done() and not self._sleep(timeout):
                raise TimeoutError()
            if self._state != FINISHED:
                raise CancelledError()
        return self._exception

    def __repr__(self) -> str:
        return f"<Task {self.name!r} {self.id} {self.status}>"


keep_attributes_in_place(Task.__new__(Task))


_OURS = Task.run.__code__, run_as.__code__, finished.__code__
