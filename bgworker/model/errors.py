"""The exceptions that bgworker raises; all but ``TaskCancelled`` share one root.

Configuration errors are also ``ValueError``, life-cycle errors also ``RuntimeError``, so that code
which already catches the standard exceptions keeps working.
"""

from __future__ import annotations

import queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal


class BgworkerError(Exception):
    """Root of bgworker's own exceptions."""


class ConfigurationError(BgworkerError, ValueError):
    """A setting has a value that cannot be used. The message names the value, the expectation and
    the remedy."""


class UnknownTask(BgworkerError, KeyError):
    """No task of a history is meant by an id, the beginning of one, or a name."""

    candidates: tuple[str, ...] = ()
    """Tasks that may be meant, each in a line."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError's own would put quotes around it


class AmbiguousTask(UnknownTask):
    """Several tasks of a history may be meant."""

    def __init__(self, message: str, candidates: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.candidates = tuple(candidates)


class ShutdownError(BgworkerError, RuntimeError):
    """The scheduler takes no more tasks: it was shut down, its interpreter is exiting, or its pool
    is broken."""


class PendingFull(BgworkerError, queue.Full):
    """``max_pending`` tasks are waiting already; nothing was queued. Wait for some of them, or
    raise the bound."""


class PoolStuck(BgworkerError, RuntimeError):
    """Every thread of the pool is stuck in a task past its deadline, and ``max_stuck`` allows no
    more of them.

    Raised by ``submit``, and by the tasks that were waiting. The scheduler takes tasks again when a
    thread comes back.
    """


class PoolDeadlock(BgworkerError, RuntimeError):
    """A task waits for a task of the same pool, and the wait could never end. Raised where it
    waits."""


class RemoteError(BgworkerError, RuntimeError):
    """Raised by ``result()`` in the place of something that could not be brought here from the
    process that ran the task; the message says what and why."""


class WireError(BgworkerError, ValueError):
    """A line or an object is not a wire object that this version of bgworker can read."""


class HistoryError(BgworkerError):
    """A file cannot be used as a history: it is missing, damaged, of another program, or of a newer
    bgworker."""


class TookTooLong(HistoryError):
    """A question to a history took longer than its ``patience``."""


class TaskCancelled(BaseException):
    """Raised inside a task that was asked to stop, by ``checkpoint()`` and ``sleep()``.

    It derives from ``BaseException`` so that a task's own ``except Exception`` does not swallow it;
    let it pass. ``result()`` of the task then raises ``concurrent.futures.CancelledError``.
    """

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or "cancelled"


class TaskTimedOut(BgworkerError):
    """The task ran longer than its ``timeout``; raised by ``result()``.

    Not a ``TimeoutError`` on purpose: that one means that the *wait* in ``result(timeout)`` ran
    out, the task goes on.
    """


class MissingPart(BgworkerError, ImportError):
    """This vendored copy was made without the part of bgworker that was asked for."""

    def __init__(self, part: str) -> None:
        super().__init__(
            f"this copy of bgworker was made without its part {part!r}: make it again with that "
            "part (tools/vendor.py, --without)",
            name=part,
        )


class SinkError(BgworkerError):
    """A sink cannot be built, opened or used."""


class TemporarySinkError(SinkError):
    """Raised by a sink whose ``write`` may succeed if tried again.

    Args:
        retry_after: seconds to wait before the next attempt, as told by the other side; None leaves
            it to the sink's ``RetryPolicy``.
        hold: it is not about these events: none will be taken before somebody mends the sink or its
            other side (a password, a quota). They are held, without using up attempts, and tried
            again now and then.
    """

    retry_after: float | None = None  # in the class too: a subclass may have an __init__ of its own
    hold: bool = False

    def __init__(
        self, message: str = "", *, retry_after: float | None = None, hold: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.hold = hold


class PermanentSinkError(SinkError):
    """Raised by a sink for what it will never accept, however often it is tried.

    Args:
        concerns: what that is. "event": one of the events or several, so that the others may be
            taken without them; "batch": all of them, whatever is in them; "sink": these and any
            others, now and later.
    """

    concerns: Literal["event", "batch", "sink"] = "event"  # in the class too, as above

    def __init__(
        self, message: str = "", *, concerns: Literal["event", "batch", "sink"] = "event"
    ) -> None:
        super().__init__(message)
        self.concerns = concerns
