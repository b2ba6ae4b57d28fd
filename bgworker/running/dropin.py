"""What makes the Scheduler a ``ThreadPoolExecutor``: the class, and what others read of one beside
its methods.

Libraries, and CPython's own tests, look at attributes of ``ThreadPoolExecutor`` that no page
documents. Each is answered here from the pool, at the moment when it is read.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool

from ..model.checks import number
from ..model.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Pending(Protocol):
        """What counts waiting tasks."""

        @property
        def pending(self) -> int: ...


class WaitingTasks:
    """What `DropIn._work_queue` is: as many items as tasks wait. Nothing can be taken out or put
    in."""

    def __init__(self, pool: Pending) -> None:
        self._pool = pool

    def qsize(self) -> int:
        """Return how many tasks wait."""
        return self._pool.pending

    def empty(self) -> bool:
        """Tell whether no task waits."""
        return not self._pool.pending


class DropIn(ThreadPoolExecutor):
    """A ``ThreadPoolExecutor`` by type and by attributes. Its ``__init__`` is not for us, and never
    runs."""

    if not TYPE_CHECKING:  # properties in the place of attributes, which type checkers refuse
        @property
        def _max_workers(self) -> int:
            return self._pool.max_workers

        @_max_workers.setter
        def _max_workers(self, max_workers: int) -> None:
            self.resize(max_workers)

        @property
        def _threads(self) -> set[threading.Thread]:
            return self._pool.threads

        @property
        def _shutdown(self) -> bool:
            return self._pool.is_closed

        @property
        def _broken(self) -> bool | str:
            refusal = self._pool.refusal
            return str(refusal) if isinstance(refusal, BrokenThreadPool) else False

        @property
        def _work_queue(self) -> WaitingTasks:
            return WaitingTasks(self._pool)

        @property
        def _idle_semaphore(self) -> threading.Semaphore:
            return threading.Semaphore(self._pool.idle)

        @property
        def _shutdown_lock(self) -> threading.Lock:
            # guards nothing: what it would guard has a lock that is nobody else's
            return threading.Lock()

        @property
        def _thread_name_prefix(self) -> str:
            return self._name

        @property
        def _initializer(self) -> Callable[..., object] | None:
            return self._pool.initializer

        @property
        def _initargs(self) -> tuple[Any, ...]:
            return self._pool.initargs

    def _adjust_thread_count(self) -> None:
        """Do nothing: ``submit`` starts the threads that are needed, and ``_max_workers = n`` those
        that wait."""


def default_workers() -> int:
    """Return as many workers as ``ThreadPoolExecutor`` has when nothing is said."""
    count: Callable[[], int | None] = getattr(os, "process_cpu_count", os.cpu_count)  # since 3.13
    return min(32, (count() or 1) + 4)


def number_of_workers(value: Any) -> int:
    """Return ``max_workers``, or refuse it; too few in the words of ``ThreadPoolExecutor``."""
    exact: int = number("max_workers", value, whole=True)
    if exact < 1:
        raise ConfigurationError(f"max_workers must be greater than 0, got {exact}")
    return exact
