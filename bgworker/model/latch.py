"""What threads wait for where an interrupt may strike: a flag that is set once, and news that come
again and again.

A `Latch` does what `threading.Event` does, `News` what `threading.Condition` does, and an interrupt
cannot break them. Ctrl-C strikes the main thread between any two steps of Python code, in
`threading` too. Struck right after an ``Event`` or a ``Condition`` has taken its inner lock, that
lock is never released: whoever sets the event, or asks for it, waits for ever. Here no step leaves
a lock behind that another thread needs.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Latch:
    """Any thread, any signal handler and any finaliser may call the methods."""

    __slots__ = ("_is_set", "_sleepers")

    def __init__(self) -> None:
        self._is_set = False
        self._sleepers: list[Any] = []
        """Locks, each of a thread that sleeps until somebody releases it. One that was interrupted
        leaves its own here."""

    def is_set(self) -> bool:
        """Tell whether it was set."""
        return self._is_set

    def set(self) -> None:
        """Let all go on who wait, and all who are going to."""
        # written before the look at the sleepers; they add themselves before they look at this
        self._is_set = True
        for sleeper in self._sleepers.copy():
            try:
                sleeper.release()
            except RuntimeError:
                pass  # woken already

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; False when ``timeout`` seconds passed first. None is for ever."""
        seconds = -1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
        sleeper = allocate_lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        try:
            if not self._is_set:
                sleeper.acquire(True, seconds)
            return self._is_set
        finally:
            self._sleepers.remove(sleeper)


class News:
    """Something that comes again and again, to something that a lock of the owner guards.

    Whoever waits for it takes `following` under that lock, after he has looked and before he lets
    go of it, and then waits for that latch.
    """

    __slots__ = ("following",)

    def __init__(self) -> None:
        self.following = Latch()
        """Set when the next news come."""

    def tell(self) -> None:
        """Let all go on who wait; under the lock."""
        told, self.following = self.following, Latch()
        told.set()
