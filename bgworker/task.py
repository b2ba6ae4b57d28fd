"""A task: the future that its submitter holds, and the context that its own code talks to.

`Task` is a `concurrent.futures.Future`; whatever waits on futures waits on tasks. `TaskContext` belongs to the code that
runs; every method of it may be called from any thread of the task and costs one append, whatever the sinks do.

Who resolves a task is settled by two claims, each won by exactly one thread: who *starts* it (a worker, a waiting
task, or ``cancel``), and who *ends* it (the worker that ran it, or the deadline).
"""

from __future__ import annotations

import threading
import time
from _thread import allocate_lock
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from contextvars import ContextVar
from types import MappingProxyType

from . import wire
from .delivery.intake import Intake
from .errors import TaskCancelled, TaskTimedOut
from .events import StreamType, TaskSnapshot, TaskStatus
from .records import (CANCELLED, COMPLETED, ERROR, FAILED, OUTPUT, PROGRESS, STARTED, STREAMS, TIMED_OUT, VERBOSE,
                      WARNING, TaskState, event)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from contextvars import Context
    from types import TracebackType
    from typing import Any, Literal, Protocol, Tuple, TypeVar

    from .delivery.dispatcher import Dispatcher
    from .events import EventType, StreamEvent

    T = TypeVar("T")
    Call = Tuple[Callable[..., Any], Tuple[Any, ...], dict[str, Any], Context]

    class Runner(Protocol):
        """What a task needs of the pool that runs it."""

        def started(self, task: Task[Any]) -> None: ...
        def ended(self, task: Task[Any]) -> None: ...
        def discarded(self) -> None: ...

LONG = 4096
"""Characters from which a payload is looked at more closely, on the task's thread."""

_STATUS = {COMPLETED: TaskStatus.COMPLETED, FAILED: TaskStatus.FAILED, CANCELLED: TaskStatus.CANCELLED,
           TIMED_OUT: TaskStatus.TIMED_OUT}
_JSON_TYPES = (dict, list, tuple, int, float, type(None))


class Limits:
    """What a scheduler allows its tasks to say; shared by all of them."""

    __slots__ = ("max_payload", "oversize", "progress_interval", "progress_step", "short")

    def __init__(self, max_payload: int, oversize: Literal["truncate", "reject"], progress_interval: float,
                 progress_step: float) -> None:
        self.max_payload = max_payload
        self.oversize = oversize
        self.progress_interval = progress_interval
        self.progress_step = progress_step
        self.short = min(LONG, max_payload // 4)  # characters that fit whatever they are: UTF-8 takes at most 4 bytes


class TaskContext:
    """The inside of a running task, from `current_task()`. Any thread may use it; nothing in it blocks but `sleep`."""

    __slots__ = ("_state", "_intake", "_emit", "_limits", "_short", "_metadata", "_deadline", "_stop_reason",
                 "_stop_event", "_on_cancel", "_shown_percent", "_shown_at", "_unshown")

    def __init__(self, state: TaskState, intake: Intake, limits: Limits, metadata: Mapping[str, Any]) -> None:
        self._state = state
        self._intake = intake
        self._emit = intake.emit
        self._limits = limits
        self._short = limits.short
        self._metadata = metadata
        self._deadline: float | None = None
        self._stop_reason: str | None = None
        self._stop_event: threading.Event | None = None
        self._on_cancel: Callable[[], object] | None = None
        self._shown_percent: float | None = None
        self._shown_at: float | None = None  # monotonic; None until the first progress event
        self._unshown: tuple[float | None, str] | None = None

    @property
    def id(self) -> str:
        """The task's id; empty outside a task."""
        return self._state.id

    @property
    def name(self) -> str:
        """The task's name; empty outside a task."""
        return self._state.name

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What ``options(metadata=...)`` was given, read-only."""
        return self._metadata

    @property
    def cancel_requested(self) -> bool:
        """True once the task was asked to stop, by a cancel or by its deadline."""
        return self._stop_reason is not None

    @property
    def cancel_reason(self) -> str | None:
        """Why it was asked to stop: "user", "timeout", "shutdown" or what ``cancel`` was given."""
        return self._stop_reason

    @property
    def time_remaining(self) -> float | None:
        """Seconds until the task's timeout, at least 0; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def output(self, value: object) -> None:
        """Emit to the output stream: a `str` as text, any JSON value as JSON, anything else as its ``str()``."""
        if value.__class__ is str and len(value) <= self._short:
            self._emit(self._state, OUTPUT, value)
        else:
            self._emit_value(OUTPUT, value)

    def error(self, value: object) -> None:
        """Emit to the error stream; see `output`."""
        self._emit_value(ERROR, value)

    def warning(self, value: object) -> None:
        """Emit to the warning stream; see `output`."""
        self._emit_value(WARNING, value)

    def verbose(self, value: object) -> None:
        """Emit to the verbose stream; see `output`."""
        self._emit_value(VERBOSE, value)

    def _emit_value(self, kind: int, value: object) -> None:
        """Emit what is not plain short text. It is turned into text here and now: the value may change right after."""
        format_: Literal["text", "json"] = "text"
        if value.__class__ is str:
            text: str = value
        elif isinstance(value, _JSON_TYPES):
            text, format_ = wire.json_text(value), "json"
        else:
            text = _text_of(value)
        if len(text) <= self._short:
            self._emit(self._state, kind, text if format_ == "text" else (text, format_, False, 0))
            return
        fitted, original_bytes = wire.fit(text, self._limits.max_payload)
        if not original_bytes:
            self._emit(self._state, kind, (fitted, format_, False, 0))
        elif self._limits.oversize == "reject":
            self._intake.refuse(kind, "oversize")
        else:  # what was JSON is none any more
            self._emit(self._state, kind, (fitted, "text", True, original_bytes))
        self._intake.hurry()  # the intake is bounded by count: large payloads must not gather there

    def progress(self, completed: float, total: float | None = 100, message: str = "") -> None:
        """Tell how far the task is.

        Args:
            completed: how much is done, in the unit of ``total``.
            total: how much there is; None when unknown, then only the message counts.
            message: one line for people.

        At most one event per ``progress_interval`` seconds goes out, unless it moved by ``progress_step`` percent; the
        first always does, and the latest does before the task ends.
        """
        percent = _percent(completed, total)
        fitted = message if message.__class__ is str and not message else \
            wire.fit(_text_of(message), self._limits.max_payload)[0]
        now = time.monotonic()
        if self._shown_at is None or now - self._shown_at >= self._limits.progress_interval or _moved(
                self._shown_percent, percent, self._limits.progress_step):
            self._shown_at = now
            self._shown_percent = percent
            self._unshown = None
            self._emit(self._state, PROGRESS, (percent, fitted))
        else:
            self._unshown = (percent, fitted)

    # -- the task's side --

    @property
    def deadline(self) -> float | None:
        """When the task times out, on the monotonic clock; None before the start and without a timeout."""
        return self._deadline

    @property
    def limits(self) -> Limits:
        """What the scheduler allows its tasks to say."""
        return self._limits

    def begin(self, now: float) -> None:
        """Note the start, at ``now`` on the monotonic clock, and emit it."""
        if self._state.timeout is not None:
            self._deadline = now + self._state.timeout
        self._intake.emit_lifecycle(self._state, STARTED, self._state.started_ns)

    def end(self, kind: int) -> None:
        """Emit the terminal event."""
        self._intake.emit_lifecycle(self._state, kind, self._state.completed_ns)

    def show_latest_progress(self) -> None:
        """Emit the progress that the rate limit held back, if any."""
        unshown, self._unshown = self._unshown, None
        if unshown is not None:
            self._emit(self._state, PROGRESS, unshown)

    def checkpoint(self) -> None:
        """Return if the task may go on.

        Raises:
            TaskCancelled: the task was asked to stop. Let it pass.
        """
        if self._stop_reason is not None:
            raise TaskCancelled(self._stop_reason)

    def sleep(self, seconds: float) -> None:
        """Sleep, but wake at once when asked to stop.

        Raises:
            TaskCancelled: as `checkpoint`.
        """
        with _stop_lock:
            if self._stop_event is None:
                self._stop_event = threading.Event()
        self.checkpoint()
        self._stop_event.wait(seconds)
        self.checkpoint()

    def on_cancel(self, callback: Callable[[], object] | None) -> None:
        """Have ``callback`` called once when the task is asked to stop, at once if it was; None takes it back.

        For code that waits for something else than `sleep`. The callback runs on the thread that cancels and must be
        quick. There is one; setting another replaces it.
        """
        with _stop_lock:
            if self._stop_reason is None or callback is None:
                self._on_cancel = callback
                return
        callback()

    def request_stop(self, reason: str) -> None:
        """Ask the task to stop; the first reason stays. Any thread."""
        with _stop_lock:
            if self._stop_reason is not None:
                return
            self._stop_reason = reason
            callback, self._on_cancel = self._on_cancel, None
            stop_event = self._stop_event
        if stop_event is not None:
            stop_event.set()
        if callback is not None:
            callback()

    @property
    def reacts_to_cancel(self) -> bool:
        """True while a callback of `on_cancel` is in place: the task will end soon after a cancel."""
        return self._on_cancel is not None

    def __repr__(self) -> str:
        return f"<TaskContext {self._state.name or 'outside a task'}>"


_stop_lock = allocate_lock()  # guards each context's stop reason, event and callback against one another; held for moments


class _Bare(TaskContext):
    """The twin for code that runs outside a task: says nothing, is never cancelled."""

    __slots__ = ()

    def __init__(self) -> None:
        silent = Intake()
        silent.close()
        super().__init__(TaskState("", "", "", 0), silent, Limits(65536, "truncate", 0.1, 1.0), MappingProxyType({}))

    def _emit_value(self, kind: int, value: object) -> None:
        """Turn nothing into text for nobody."""


_current: ContextVar[TaskContext] = ContextVar("bgworker_task", default=_Bare())


def current_task() -> TaskContext:
    """Return the running task's context; outside a task a do-nothing twin, so that a function also runs bare."""
    return _current.get()


def checkpoint() -> None:
    """Raise `TaskCancelled` when the running task was asked to stop. Outside a task, do nothing."""
    _current.get().checkpoint()


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
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        """The lock and condition of `Future`, made when somebody first looks.

        Whoever resolves the task sets ``_state`` first and looks for a condition second; whoever waits makes the condition
        first and looks at ``_state`` second. So either the waiter sees the final state, or the resolver sees the waiter.
        """
        made: threading.Condition | None = self.__dict__.get("_made_condition")
        return made or self.__dict__.setdefault("_made_condition", threading.Condition())  # one atomic step

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
            result = call[3].run(_enter, context, call)
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


def _enter(context: TaskContext, call: Call) -> Any:
    """Run the call as the task of ``context``; this frame is inside the context variables captured at submit."""
    _current.set(context)
    return call[0](*call[1], **call[2])


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
    state.failure_message = wire.fit(_text_of(error), max_bytes)[0]
    state.invocation_info = wire.fit(info, max_bytes)[0]


def _text_of(value: object) -> str:
    """Return ``str(value)`` as an exact `str`, or a stand-in when it has none."""
    try:
        return str.__str__(str(value))
    except Exception:
        return f"<unprintable {type(value).__qualname__} object>"


def _percent(completed: float, total: float | None) -> float | None:
    """Return completed/total in 0..100, None where that is unknown."""
    try:
        if total is None:
            return None
        percent = 100.0 * completed / total
    except ZeroDivisionError:
        return None
    return min(100.0, max(0.0, percent)) if percent == percent else None


def _moved(shown: float | None, percent: float | None, step: float) -> bool:
    if shown is None or percent is None:
        return shown is not percent
    return abs(percent - shown) >= step
