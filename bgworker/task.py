"""A task: the future that its submitter holds.

`Task` is a `concurrent.futures.Future`; whatever waits on futures waits on tasks. Who resolves a task is settled by two
claims, each won by exactly one thread: who *starts* it (a worker, or ``cancel``), and who *ends* it (the worker that ran
it, or the deadline).
"""

from __future__ import annotations

import threading
import time
from _thread import allocate_lock
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING

from .context import TaskContext, checkpoint, current_task, run_as
from .errors import TaskCancelled, TaskTimedOut
from .events import StreamType, TaskSnapshot, TaskStatus
from .records import CANCELLED, COMPLETED, FAILED, STREAMS, TIMED_OUT, TaskState, event
from .text import fit, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextvars import Context
    from types import TracebackType
    from typing import Any, Protocol, Tuple, TypeVar

    from .delivery.dispatcher import Dispatcher
    from .events import StreamEvent

    T = TypeVar("T")
    Call = Tuple[Callable[..., Any], Tuple[Any, ...], dict[str, Any], Context]

    class Runner(Protocol):
        """What a task needs of the pool that runs it."""

        def started(self, task: Task[Any]) -> None: ...
        def ended(self, task: Task[Any]) -> None: ...
        def discarded(self) -> None: ...

__all__ = ["Task", "TaskContext", "checkpoint", "current_task"]

_STATUS = {COMPLETED: TaskStatus.COMPLETED, FAILED: TaskStatus.FAILED, CANCELLED: TaskStatus.CANCELLED,
           TIMED_OUT: TaskStatus.TIMED_OUT}


class Task(Future["T"]):
    """One call on its way through a `Scheduler`. Made by ``submit``; all methods may be called from any thread.

    ``result()`` raises what the callable raised, ``concurrent.futures.CancelledError`` after a cancel, and
    `TaskTimedOut` after a run timeout; a ``TimeoutError`` from ``result(timeout)`` means only that the wait ran out.
    """

    def __init__(self, state: TaskState, context: TaskContext, call: Call, runner: Runner,
                 dispatcher: Dispatcher) -> None:
        # Not Future.__init__: its Condition is a third of the cost of a task, and most tasks are done before anybody
        # waits for them. `_condition` below makes it when first looked at.
        self._state = PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters = []
        self._done_callbacks: list[Callable[[Future[T]], object]] = []
        self._task_state = state
        self._context = context
        self._call: Call | None = call
        self._runner = runner
        self._dispatcher = dispatcher
        self._start_claim = allocate_lock()  # the first to acquire it starts the task or cancels it; never released
        self._end_claim = allocate_lock() if state.timeout is not None else None  # likewise: who ends a running one

    @property
    def _lazy_condition(self) -> threading.Condition:
        """The lock and condition of `Future`, made when somebody first looks.

        Whoever resolves the task sets ``_state`` first and looks for a condition second; whoever waits makes the condition
        first and looks at ``_state`` second. So either the waiter sees the final state, or the resolver sees the waiter.
        """
        made: threading.Condition | None = self.__dict__.get("_made_condition")
        return made or self.__dict__.setdefault("_made_condition", threading.Condition())  # one atomic step

    if not TYPE_CHECKING:  # a property in the place of an attribute, which type checkers refuse
        _condition = _lazy_condition

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
        return self._context.cancel_requested

    @property
    def cancel_reason(self) -> str | None:
        """Why it was asked to stop."""
        return self._context.cancel_reason

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
        """Wait until the task has ended; False when ``timeout`` seconds passed first. Raises nothing."""
        with self._condition:
            return self._condition.wait_for(self.done, timeout)

    def cancel(self, reason: str = "user") -> bool:
        """Cancel the task if it has not started, at once; ask it to stop if it has.

        Returns: True only if it will never run (`Future`'s contract). A running task is asked to stop and False comes
            back: it ends at its next ``checkpoint()``, or not at all if it never looks.
        """
        if self.done():
            return self.cancelled()
        self._context.request_stop(reason)
        if self._start_claim.acquire(False):
            self._call = None
            self._end(CANCELLED, cancel_reason=reason)
            self._runner.discarded()
            return True
        return self.cancelled()

    # -- the runner's side --

    def run(self) -> None:
        """Run the task unless somebody else has started or cancelled it. Returns when it has ended."""
        if not self._start_claim.acquire(False):
            return
        call, self._call = self._call, None
        assert call is not None  # who wins the claim finds the call
        state, context = self._task_state, self._context
        self._state = RUNNING
        state.started_ns = time.time_ns()
        state.status = TaskStatus.RUNNING
        started = time.monotonic()
        context.begin(started)
        self._runner.started(self)
        kind, result, error = COMPLETED, None, None
        try:
            result = call[3].run(run_as, context, *call[:3])
        except BaseException as raised:  # the thread's boundary: it all goes to who waits for the result
            # our own two frames would hold this task in a cycle, and tell nobody anything
            kind, error = FAILED, raised.with_traceback(_beyond(raised.__traceback__, 2))
            del raised
        duration = time.monotonic() - started
        del call
        if self._end_claim is None or self._end_claim.acquire(False):
            if error is not None and isinstance(error, TaskCancelled):
                self._end(CANCELLED, duration, cancel_reason=error.reason or "task")
            else:
                self._end(kind, duration, result, error)
        self._runner.ended(self)

    def time_out(self) -> bool:
        """End a running task because its time is over; False when it has ended already. The supervisor's thread."""
        if self._end_claim is None or not self._end_claim.acquire(False):
            return False
        timeout = self._task_state.timeout
        self._context.request_stop("timeout")
        self._record_end(TIMED_OUT, timeout, error=TaskTimedOut(f"ran longer than its timeout of {timeout:g} s"))
        return True

    def publish(self) -> None:
        """Resolve the future after `time_out`. Apart, because callbacks may take long and the supervisor may not."""
        self._state = FINISHED
        self._resolve()

    @property
    def deadline(self) -> float | None:
        """When a running task times out, on the monotonic clock; None without a timeout."""
        return self._context.deadline

    @property
    def reacts_to_cancel(self) -> bool:
        """True while the running code has asked to be called when it is to stop."""
        return self._context.reacts_to_cancel

    def fail(self, error: BaseException) -> None:
        """End a task that has not started because it never can."""
        if self._start_claim.acquire(False):
            self._call = None
            self._end(FAILED, error=error)

    def _end(self, kind: int, duration: float | None = None, result: Any = None, error: BaseException | None = None,
             cancel_reason: str | None = None) -> None:
        """Record the end, then resolve the future: who sees the result can count on the event being on its way."""
        self._record_end(kind, duration, result, error, cancel_reason)
        self._state = CANCELLED_AND_NOTIFIED if kind == CANCELLED else FINISHED
        self._resolve()

    def _record_end(self, kind: int, duration: float | None, result: Any = None, error: BaseException | None = None,
                    cancel_reason: str | None = None) -> None:
        state = self._task_state
        self._context.show_latest_progress()
        if error is not None:
            _describe_failure(state, error, self._context.limits.max_payload)
        elif cancel_reason is not None:
            state.failure_message = cancel_reason
        state.duration = duration
        state.completed_ns = time.time_ns()
        state.status = _STATUS[kind]
        self._context.end(kind)
        self._result = result
        self._exception = error

    def _resolve(self) -> None:
        """Wake who waits for the future and run its callbacks; see `_condition` for why none is missed."""
        condition = self.__dict__.get("_made_condition")
        if condition is not None:
            with condition:
                for waiter in self._waiters:
                    if self._state == CANCELLED_AND_NOTIFIED:
                        waiter.add_cancelled(self)
                    elif self._exception is not None:
                        waiter.add_exception(self)
                    else:
                        waiter.add_result(self)
                condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]

    # -- Future's questions, answered without its lock --

    def done(self) -> bool:
        """True when the task has ended, in whatever way."""
        return self._state == FINISHED or self._state == CANCELLED_AND_NOTIFIED

    def cancelled(self) -> bool:
        """True when the task ended by a cancel."""
        return self._state == CANCELLED_AND_NOTIFIED

    def running(self) -> bool:
        """True while the task runs."""
        return self._state == RUNNING

    def result(self, timeout: float | None = None) -> T:
        """Return what the callable returned, waiting up to ``timeout`` seconds for it.

        Raises:
            TimeoutError: the wait ran out (``concurrent.futures.TimeoutError``); the task goes on.
            CancelledError: the task was cancelled (``concurrent.futures.CancelledError``).
            TaskTimedOut: the task ran longer than its own timeout.
            BaseException: what the callable raised.
        """
        if self._state != FINISHED:
            return super().result(timeout)
        if self._exception is None:
            return self._result  # type: ignore[no-any-return]
        try:
            raise self._exception
        finally:
            del self  # the traceback holds this frame, which would hold the exception

    def __repr__(self) -> str:
        return f"<Task {self.name!r} {self.id} {self.status}>"


def _beyond(traceback: TracebackType | None, frames: int) -> TracebackType | None:
    for _ in range(frames):
        traceback = traceback and traceback.tb_next
    return traceback


def _describe_failure(state: TaskState, error: BaseException, max_bytes: int) -> None:
    import traceback

    kind = type(error)
    module = "" if kind.__module__ in ("builtins", __name__, TaskTimedOut.__module__) else f"{kind.__module__}."
    try:
        info = "".join(traceback.format_exception(kind, error, error.__traceback__))
    except Exception as odd:  # a third party's exception that cannot be shown
        info = f"{kind.__qualname__}: its traceback cannot be formatted ({type(odd).__name__})"
    state.failure_type = module + kind.__qualname__
    state.failure_message = fit(text_of(error), max_bytes)[0]
    state.invocation_info = fit(info, max_bytes)[0]
