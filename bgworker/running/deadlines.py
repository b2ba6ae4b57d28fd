"""One thread that notices when the time of a running task is over.

Only running tasks have deadlines, hardly more than there are workers. So a dict does what a heap
would: the thread looks through it at each wake-up, and a task that ends in time takes itself out.
The thread starts with the first task that has a timeout and sleeps until the earliest deadline;
only an earlier one wakes it sooner.
"""

from __future__ import annotations

import logging
import sys
import threading
from _thread import allocate_lock, get_ident
from math import inf

from ..model.clock import monotonic
from ..model.reports import report
from ..model.text import describe
from ..model.threads import own_thread
from .workers import start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
BACKSTOP = 1.0
"""Seconds after which the thread looks again unasked. No ring is lost by design; this is for the
unforeseen."""


class Deadlines:
    """Watches deadlines and calls ``expire(task, thread)`` on its own thread for each that passes.

    ``thread`` is the identifier of the thread that called `watch`, which runs the task. Any thread
    may call `watch` and `forget`. To put into a dict and to take out of it are one atomic step
    each; so exactly one thread takes a task out, and that one ends it.

    The doorbell: the thread announces until when it sleeps, and then looks at the dict; `watch`
    puts the deadline into the dict, and then looks at the announcement. Between its two steps each
    takes the lock, or has held the GIL. So at least one sees the other's first step, also on a
    processor that lets a load overtake a store.
    """

    def __init__(self, expire: Callable[[Any, int], object], name: str) -> None:
        self._expire = expire
        self._name = name
        self._watched: dict[Any, tuple[float, int]] = {}
        self._sleeps_until = -inf  # nobody sleeps, nobody needs to ring
        self._bell = allocate_lock()
        self._bell.acquire()
        self._is_stopped = False
        # Guards the start of the thread and orders what the doorbell needs. A signal handler may
        # start it in the midst of that: one of the two threads finds that it is not the one.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    @property
    def has_started(self) -> bool:
        """True once there is a thread that watches."""
        return self._thread is not None

    def is_mine(self, thread: threading.Thread) -> bool:
        """Tell whether it is the thread that watches."""
        return self._thread is thread

    def watch(self, task: object, deadline: float) -> None:
        """Have ``task`` expire at ``deadline`` (monotonic) unless `forget` comes first."""
        self._watched[task] = deadline, get_ident()
        if not HAS_GIL:
            with self._lock:
                pass
        if deadline < self._sleeps_until:
            self._ring()

    def forget(self, task: object) -> bool:
        """Watch ``task`` no more; return False if its deadline came first, and another thread ends
        it."""
        came_first = self._watched.pop(task, None) is not None
        if self._is_stopped:
            self._ring()
        return came_first

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # rung already: one ring is enough

    def start(self) -> None:
        """Start the thread unless there is one.

        Called when a task with a timeout is queued. Once the task runs it may be too late: an
        interpreter that exits starts no thread.

        Raises:
            ShutdownError: there can be no more threads.
        """
        with self._lock:
            if self._thread is None:
                thread = own_thread(self._name, self._run)
                try:
                    self._thread = thread
                    start(thread)
                except BaseException:
                    # also after an interrupt: a thread that starts after all finds this, and ends
                    self._thread = None
                    raise

    def stop(self) -> None:
        """End the thread as soon as it watches nothing. Tasks that were given up keep their
        deadlines."""
        self._is_stopped = True
        self._ring()

    def _run(self) -> None:
        with self._lock:  # not before `start` has made up its mind
            if self._thread is not threading.current_thread():
                return
        while self._watched or not self._is_stopped:
            self._announce(inf)  # from here on every new deadline rings
            earliest = self._expire_due()
            self._announce(earliest)
            self._bell.acquire(True, max(0.0, min(earliest - monotonic(), BACKSTOP)))

    def _announce(self, sleeps_until: float) -> None:
        with self._lock:
            self._sleeps_until = sleeps_until

    def _expire_due(self) -> float:
        """Expire what is due and return the next deadline."""
        earliest = inf
        now = monotonic()
        for task, (deadline, thread) in self._watched.copy().items():  # copy() is one atomic step
            if deadline > now:
                earliest = min(earliest, deadline)
            elif self._watched.pop(task, None) is not None:
                self._expire_safely(task, thread)
        return earliest

    def _expire_safely(self, task: object, thread: int) -> None:
        try:
            self._expire(task, thread)
        except BaseException as error:  # the thread's boundary: it has other deadlines to watch
            report(
                logging.ERROR,
                "%s could not be ended at its deadline: %s",
                repr(task),
                describe(error),
            )


def keeps_time(function: object) -> bool:
    """Tell whether a callable sees to its task's timeout itself: that of a command begins when its
    process has started."""
    return getattr(type(function), "keeps_time", None) is True
