"""Room for one more process: where there is none left, a command waits until another one ends.

Descriptors, processes and memory run out (EMFILE, ENFILE, EAGAIN, ENOMEM); what holds them here are
commands of this process, and each that ends gives some back. When none of ours runs, nobody else
can give back descriptors of this process, and after `PATIENCE` that shortage is taken to be for
good. Processes and memory may come back from other programs: that takes `LONG_PATIENCE`, and is
told meanwhile. What was for good for one command is for good for all, until one starts.
"""

from __future__ import annotations

import errno
import logging
import os
import threading

from ..model.clock import monotonic
from ..model.forks import in_child
from ..model.latch import Latch
from ..model.reports import report

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM))

REMEDY = "raise the limit (ulimit -n, ulimit -u, or that of the container)"

PATIENCE = 2.0
"""Seconds that a command waits for descriptors when no other one of ours runs, and that it waits
for anything until that is told."""

LONG_PATIENCE = 60.0
"""Seconds that it waits then for what other programs hold, too."""

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
        # when there was no room first, since a command started
        self._missed_at: float | None = None
        self._looked_at = 0.0  # when there was none last
        self._is_told = False  # that there is none, since `_missed_at`

    def enter(self) -> None:
        """A command has started: there may be room for one more."""
        with self._lock:
            self._running += 1
            self._missed_at = None
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

    def wait(self, error: OSError) -> bool:
        """Wait for a moment in which there may be room; False when that has become hopeless.

        Args:
            error: tells what there was no room for.
        """
        now = monotonic()
        with self._lock:
            if self._missed_at is None or now - self._looked_at > PATIENCE:
                self._missed_at, self._is_told = now, False
            self._looked_at = now
            waited = 0.0 if self._running else now - max(self._missed_at, self._idle_since)
            if waited >= (PATIENCE if error.errno == errno.EMFILE else LONG_PATIENCE):
                return False
            is_news = waited >= PATIENCE and not self._is_told
            self._is_told = self._is_told or is_news
            news = Latch()
            self._waiting.append(news)
        if is_news:
            report(logging.WARNING, "there is no room for a process (%s): waiting until other "
                   "programs end; %s", error.strerror or "", REMEDY)
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
