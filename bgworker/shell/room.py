"""Room for one more process: where there is none left, a command waits until another one ends.

Descriptors, processes and memory run out (EMFILE, ENFILE, EAGAIN, ENOMEM); what holds them here are
commands of this process, and each that ends gives some back. When none of ours runs, others may
still end; `PATIENCE` later the shortage is taken to be for good.
"""

from __future__ import annotations

import errno
import os
import threading

from ..model.clock import monotonic
from ..model.forks import in_child
from ..model.latch import Latch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM))

PATIENCE = 2.0
"""Seconds that a command waits for room when no other one of ours runs."""

START = 8
"""Descriptors that are open while a process is started."""

SPARES = 8
"""Descriptors that commands leave to others."""

LOOK = 0.25
"""Seconds between two tries, if no command ends meanwhile: what is not ours may end, and the task
may be cancelled."""


class _Room:
    def __init__(self) -> None:
        # guards all below; a command may also run outside of a task, where Ctrl-C strikes
        self._lock = threading.RLock()
        self._waiting: list[Latch] = []
        self._running = 0
        self._idle_since = monotonic()

    def enter(self) -> None:
        """A command has started: there may be room for one more."""
        with self._lock:
            self._running += 1
            self._wake_one()

    def keep_spares(self, descriptor: int) -> None:
        """Raise EMFILE where a command would take the last descriptors, which sinks and imports
        need as well.

        Args:
            descriptor: one that was just opened, hence the lowest that was free.
        """
        if resource is not None and self._running:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if limit != resource.RLIM_INFINITY and descriptor + START + SPARES > limit:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def leave(self) -> None:
        """A command has ended."""
        with self._lock:
            self._running -= 1
            self._idle_since = monotonic()
            self._wake_one()

    def wait(self, since: float) -> bool:
        """Wait for a moment in which there may be room; False when that has become hopeless.

        Args:
            since: when there was none first, on the monotonic clock.
        """
        with self._lock:
            if not self._running and monotonic() - max(since, self._idle_since) >= PATIENCE:
                return False
            news = Latch()
            self._waiting.append(news)
        try:
            news.wait(LOOK)
        finally:
            with self._lock:
                if news in self._waiting:
                    self._waiting.remove(news)
        return True

    def _wake_one(self) -> None:
        if self._waiting:
            self._waiting.pop(0).set()


room = _Room()


@in_child
def _renew() -> None:
    """In a forked child: the commands are the parent's, and the lock may be held by a thread that
    is not here."""
    room.__init__()  # type: ignore[misc]
