"""How every thread of ours begins and how its end is told: as a daemon, with an empty context, and
whatever an interrupt does to those who wait for it.

Where threads inherit their starter's context (``-X thread_inherit_context``, the default of
free-threaded 3.14), one that a task happens to start would take the task's context variables for
its own: a sink's ``print`` would land in that task's streams.
"""

from __future__ import annotations

import sys
import threading
from contextvars import Context

from .clock import monotonic
from .latch import Latch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LOOK = 1.0
"""Seconds after which `_Thread.join` looks whether the thread is still there: one that found no
memory for its first step has told nobody of its end."""


class _Thread(threading.Thread):
    """A thread that nobody takes for dead while it runs.

    Up to CPython 3.12, an interrupt (Ctrl-C) in `threading.Thread.join` or ``is_alive`` marks the
    thread as dead for good (gh-90882): the task that runs on it, or the sink, would be given up.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._is_leaving = Latch()

    def run(self) -> None:
        """Call the target, then let go on whoever waits for the end."""
        try:
            super().run()
        finally:
            self._is_leaving.set()

    def is_alive(self) -> bool:
        """Tell whether it was started and has not ended. Any thread, without a lock."""
        # Not before it says that it has begun: an interrupt in ``start`` may keep it from that for
        # ever. The other two in this order: a thread enters the last before it leaves the first.
        return self._started.is_set() and (  # type: ignore[attr-defined]
            self in threading._limbo  # type: ignore[attr-defined]
            or threading._active.get(self.ident) is self  # type: ignore[attr-defined]
        )

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, as in `threading.Thread`."""
        until = None if timeout is None else monotonic() + timeout
        while self is not threading.current_thread() and self.is_alive():
            left = LOOK if until is None else min(LOOK, until - monotonic())
            if left <= 0:
                return
            if self._is_leaving.wait(left):
                break
        # It refuses whom it has to refuse; else it waits for the last steps, and what an interrupt
        # does to it then is nearly true.
        super().join(None if until is None else max(0.0, until - monotonic()))


if sys.version_info >= (3, 13):
    _Thread = threading.Thread  # type: ignore[misc,assignment]


def own_thread(name: str, target: Callable[..., object], *args: object) -> threading.Thread:
    """Return a daemon thread, not started, that calls ``target(*args)`` with no context variable
    set."""
    run = Context().run
    try:
        return _Thread(target=run, args=(target, *args), name=name, daemon=True)
    except RuntimeError:
        # an isolated subinterpreter (3.12) has no daemons; it waits for its threads at its end
        return _Thread(target=run, args=(target, *args), name=name, daemon=False)
