"""The inside of a running task: what its own code says and asks.

Any thread may call any method, and each costs one append, whatever the sinks do; nothing here
blocks but `sleep`.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from ..delivery.intake import SHORT, Intake
from ..model.clock import monotonic
from ..model.errors import TaskCancelled
from ..model.forks import in_child
from ..model.latch import Latch
from ..model.records import ERROR, OUTPUT, PROGRESS, VERBOSE, WARNING, TaskState
from ..model.text import clean, fit, fit_json, json_text, number_of, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import CodeType
    from typing import Any, Literal, NoReturn, Tuple

    Where = Tuple[CodeType, Callable[[], str]]

LONG = 4096
"""Characters up to which a payload's bytes are not counted: so few fit in any case."""

_JSON_TYPES = (dict, list, tuple, int, float, type(None))


class Limits:
    """What a scheduler allows its tasks to say; shared by all of them."""

    __slots__ = ("max_payload", "oversize", "progress_interval", "progress_step", "fits", "short")

    def __init__(
        self,
        max_payload: int,
        oversize: Literal["truncate", "reject"],
        progress_interval: float,
        progress_step: float,
    ) -> None:
        self.max_payload = max_payload
        self.oversize = oversize
        self.progress_interval = progress_interval
        self.progress_step = progress_step
        # characters that fit whatever they are: UTF-8 takes at most 4 bytes
        self.fits = min(LONG, max_payload // 4)
        self.short = min(SHORT, self.fits)


class Identity:
    """What both sides of a task tell: the `Task` that its submitter holds, and its `TaskContext`.
    Any thread."""

    _task_state: TaskState

    @property
    def id(self) -> str:
        """32 hex digits; ids sort by creation time. Empty outside a task."""
        return self._task_state.id

    @property
    def name(self) -> str:
        """The name given in ``options(name=...)``, else the callable's qualified name. Empty
        outside a task."""
        return self._task_state.name

    @property
    def cancel_requested(self) -> bool:
        """True once the task was asked to stop, by a cancel or by its deadline; it may still
        run."""
        return self._task_state.stop_reason is not None

    @property
    def cancel_reason(self) -> str | None:
        """Why it was asked to stop: "user", "timeout", "shutdown" or what ``cancel`` was given."""
        return self._task_state.stop_reason

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it belongs to its process; give its id, "
            "its result, or what is needed of it"
        )


class TaskContext(Identity):
    """The inside of a running task, from `current_task()`. Any thread may use it; nothing in it
    blocks but `sleep`."""

    _deadline: float | None = None  # on the monotonic clock
    _was_woken = False  # those who sleep and wait here, because it was asked to stop
    _stop_event: Latch | None = None  # for threads that `sleep`
    _wakers: tuple[Callable[[], object], ...] = ()
    _where: Where | None = None
    """What tells where the task is while code of ours waits in it; see `_woken_by`."""
    _reacts_until = math.inf
    """When a task that was woken is no longer expected to end, on the monotonic clock."""
    _overdue_at: str | None = None
    """Where it was, maybe empty, when its own code found that its time is over. It then raises
    `TaskTimedOut`."""
    _captures_output = False
    """True when what the task prints, logs and warns goes to its streams too."""
    _flush: Callable[[], object] | None = None
    """Emits the captured lines that are not finished; called before the terminal event, maybe
    while the task still runs."""
    _shown_percent: float | None = None
    _shown_at: float | None = None  # monotonic; None until the first progress event
    _unshown: tuple[float | None, str] | None = None

    def __init__(
        self, state: TaskState, intake: Intake, limits: Limits, metadata: Mapping[str, Any]
    ) -> None:
        self._task_state = state
        self._intake = intake
        self._limits = limits
        self._short = limits.short
        self._metadata = metadata

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What ``options(metadata=...)`` was given, read-only."""
        return self._metadata

    @property
    def time_remaining(self) -> float | None:
        """Seconds until the task's timeout, at least 0; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())

    def output(self, value: object) -> None:
        """Emit to the output stream: a `str` as text, any JSON value as JSON, anything else as its
        ``str()``."""
        if type(value) is str and len(value) <= self._short:
            # not `__class__`, which a stand-in may fake
            self._intake.emit(self._task_state, OUTPUT, value)
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

    def progress(self, completed: float, total: float | None = 100, message: str = "") -> None:
        """Tell how far the task is.

        Args:
            completed: how much is done, in the unit of ``total``.
            total: how much there is; None when unknown, then only the message counts.
            message: one line for people.

        At most one event per ``progress_interval`` seconds goes out, unless it moved by
        ``progress_step`` percent; the first always does, and the latest does before the task ends.
        """
        percent = _percent(completed, total)
        fitted = (
            message
            if type(message) is str and not message
            else clean(message, self._limits.max_payload)
        )
        now = monotonic()
        if (
            self._shown_at is None
            or now - self._shown_at >= self._limits.progress_interval
            or _moved(self._shown_percent, percent, self._limits.progress_step)
        ):
            self._shown_at = now
            self._shown_percent = percent
            self._unshown = None
            self._emit_progress((percent, fitted))
        else:
            self._unshown = (percent, fitted)

    def checkpoint(self) -> None:
        """Return if the task may go on.

        Raises:
            TaskCancelled: the task was asked to stop. Let it pass.
        """
        reason = self._task_state.stop_reason
        if reason is not None:
            raise TaskCancelled(reason)

    def sleep(self, seconds: float) -> None:
        """Sleep, but wake at once when asked to stop. In a coroutine, which this would block, await
        ``asyncio.sleep``.

        Raises:
            TaskCancelled: as `checkpoint`.
        """
        with _stop_lock:
            if self._stop_event is None:
                self._stop_event = Latch()
        self.checkpoint()
        self._stop_event.wait(seconds)
        self.checkpoint()

    def __repr__(self) -> str:
        return f"<TaskContext {self._task_state.name or 'outside a task'}>"

    # -- what the runner, capture and commands need --

    def _keep_time(self, deadline: float, timeout: float) -> None:
        """Note until when the task may run (monotonic), for one whose own code sees to that; and
        for how long, which is recorded. On the task's own thread."""
        self._overdue_at = None
        self._deadline = deadline
        self._task_state.timeout = timeout

    def _emit_lines(self, kind: int, lines: list[str]) -> None:
        """Emit lines of clean text of at most ``max_payload`` bytes each, at once; see
        `Intake.emit_lines`."""
        self._intake.emit_lines(self._task_state, kind, lines)

    def _emit_value(self, kind: int, value: object) -> None:
        """Emit any value. It becomes text here and now, because it may change right after."""
        format_: Literal["text", "json"] = "text"
        if type(value) is str:
            text: str = value
        elif issubclass(type(value), _JSON_TYPES):
            text, format_ = json_text(value), "json"
        else:
            text = text_of(value)
        if len(text) <= self._limits.fits:
            emit = self._intake.emit if len(text) <= SHORT else self._intake.emit_weighed
            emit(self._task_state, kind, text if format_ == "text" else (text, format_, False, 0))
            return
        fitted, original_bytes = (fit if format_ == "text" else fit_json)(
            text, self._limits.max_payload
        )
        if original_bytes and self._limits.oversize == "reject":
            self._intake.refuse(kind, "oversize")
        else:
            self._intake.emit_weighed(
                self._task_state, kind, (fitted, format_, original_bytes > 0, original_bytes)
            )

    def _emit_progress(self, progress: tuple[float | None, str]) -> None:
        emit = self._intake.emit if len(progress[1]) <= SHORT else self._intake.emit_weighed
        emit(self._task_state, PROGRESS, progress)

    def _say_last(self) -> None:
        """Emit what was held back: captured lines that are not finished, and the progress that the
        rate limit kept."""
        # read once: the task's thread may take it back while the deadlines' thread is here
        if (flush := self._flush) is not None:
            flush()
        if (unshown := self._unshown) is not None:
            self._unshown = None
            self._emit_progress(unshown)

    def _wake(self) -> None:
        """Wake whoever sleeps or waits in the task, which was asked to stop. Any thread."""
        if self._was_woken:
            return
        with _stop_lock:
            stop_event, wakers = self._stop_event, self._wakers
        if stop_event is not None:
            stop_event.set()
        for wake in wakers:
            wake()
        # last: where an interrupt strikes a cancel, the next one does all of it
        self._was_woken = True

    @contextmanager
    def _woken_by(self, wake: Callable[[], object], where: Where | None = None) -> Iterator[None]:
        """Have ``wake`` called when the task is asked to stop, at once if it was.

        For code of ours that waits for something else than `sleep`, and ends the task soon after
        that. ``wake`` runs on the thread that cancels: it blocks nowhere and raises nothing. Where
        two cancel at once it may be called twice.

        Args:
            where: the function that waits, and what tells more than the thread's stack from there
                on: text of whole lines. Called at the task's deadline, on the deadlines' thread,
                where it may raise, but not block.
        """
        before = self._where
        with _stop_lock:
            self._wakers += (wake,)
            was_asked = self._task_state.stop_reason is not None
        self._where = where or before
        try:
            if was_asked:
                wake()
            yield
        finally:
            self._where = before
            with _stop_lock:
                self._wakers = tuple(each for each in self._wakers if each is not wake)

    @property
    def _reacts_to_cancel(self) -> bool:
        """True while something wakes the task when it is asked to stop: it will end soon then, and
        shutdown waits for that."""
        return bool(self._wakers) and monotonic() < self._reacts_until

    def _wait_for_room(self, size: int) -> int:
        """Wait until the healthy sinks keep up, the task is asked to stop, or half of its time is
        over: a slow sink may cost lines, which are counted, but no task its end.

        For code that reads from a pipe: it loses nothing by reading later. Functions never wait.
        The queues are looked at every few milliseconds, and only while one is crowded.

        Args:
            size: bytes of memory that each of the next texts takes.

        Returns: how many of them may be emitted before the next call; no healthy sink loses any
            while the waiting goes on.
        """
        intake, state = self._intake, self._task_state
        while intake.is_crowded and state.stop_reason is None and self._has_time_to_wait:
            intake.hurry()
            time.sleep(0.005)
        return intake.room_for(size)

    @property
    def _has_time_to_wait(self) -> bool:
        timeout, remaining = self._task_state.timeout, self.time_remaining
        return timeout is None or remaining is None or remaining > timeout / 2


# guards each context's event and wakers against one another; held for moments, and re-entrant
# because a signal handler may cancel
_stop_lock = threading.RLock()


@in_child
def _renew_lock() -> None:
    """In a forked child: the lock may be held by a thread that is not here."""
    global _stop_lock
    _stop_lock = threading.RLock()


class _Bare(TaskContext):
    """Stands in for a task where code runs outside of any: it emits nothing and is never
    cancelled."""

    def __init__(self) -> None:
        silent = Intake()
        silent.close()
        super().__init__(
            TaskState("", "", "", 0),
            silent,
            Limits(65536, "truncate", 0.1, 1.0),
            MappingProxyType({}),
        )

    def _emit_value(self, kind: int, value: object) -> None:
        """Do nothing: the text would reach nobody."""


_NO_TASK = TaskState("", "", "", 0)
_NO_TASK.context = _Bare()
CURRENT: ContextVar[TaskState] = ContextVar("bgworker_task", default=_NO_TASK)
"""Whose task runs. `Task` sets it among the context variables of its run."""


def context_of(state: TaskState) -> TaskContext:
    """Return the context of a task that runs. Made when somebody first asks for it: a task that
    nobody asks for has said nothing, and its end is cheaper."""
    context: TaskContext | None
    with _stop_lock:
        context = state.context
        if context is None:
            assert state.speaks_to is not None  # it has begun
            context = state.context = TaskContext(state, *state.speaks_to)
    return context


def ask_to_stop(state: TaskState, reason: str) -> None:
    """Ask the running code of a task to stop; the first reason stays. Any thread.

    Written before the look at the context: whoever begins to wait in it makes that known before he
    looks for a reason.
    """
    if state.stop_reason is None:
        state.stop_reason = reason
    context = state.context
    if context is not None:
        context._wake()


def current_task() -> TaskContext:
    """Return the running task's context; outside a task a do-nothing twin, so that a function also
    runs bare."""
    state = CURRENT.get()
    context: TaskContext | None = state.context
    return context_of(state) if context is None else context


def checkpoint() -> None:
    """Raise `TaskCancelled` when the running task was asked to stop. Outside a task, do nothing."""
    current_task().checkpoint()


def _percent(completed: float, total: float | None) -> float | None:
    """Return completed/total in 0..100, None where that is unknown."""
    if total is None:
        return None
    done: Any = completed if type(completed) is int else number_of(completed)
    whole: Any = total if type(total) is int else number_of(total)
    try:
        percent: float = 100.0 * done / whole
    except (ZeroDivisionError, OverflowError, TypeError):  # telemetry fails no task
        return None
    return min(100.0, max(0.0, percent)) if percent == percent else None


def _moved(shown: float | None, percent: float | None, step: float) -> bool:
    if shown is None or percent is None:
        return shown is not percent
    return abs(percent - shown) >= step
