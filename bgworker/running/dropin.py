"""What makes the Scheduler a ``ThreadPoolExecutor``: the class, and what others read of one beside
its methods.

Libraries, and CPython's own tests, look at attributes of ``ThreadPoolExecutor`` that no page
documents. Each is answered here from the pool, at the moment when it is read.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from itertools import islice

from ..model.checks import number
from ..model.clock import monotonic
from ..model.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Protocol

    from .pool import Pool

    class Submits(Protocol):
        def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]: ...


class WaitingTasks:
    """What `DropIn._work_queue` is: as many items as tasks wait. Nothing can be taken out or put
    in."""

    def __init__(self, pool: Pool) -> None:
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


def map_calls(
    find: Callable[[], Submits | None],
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    timeout: float | None,
    buffersize: int | None,
) -> Iterator[Any]:
    """Submit a call for each item, and return an iterator over the results, as `Executor.map` does
    since 3.14.

    Args:
        find: returns what submits. A weak reference to a scheduler, since one that is forgotten
            winds down; then nothing more is submitted.
    """
    if buffersize is not None and not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")
    until = None if timeout is None else monotonic() + timeout
    items = zip(*iterables)
    tasks: deque[Future[Any]] = deque()

    def submit(most: int | None) -> None:
        if (submitter := find()) is not None:
            tasks.extend(submitter.submit(fn, *args) for args in islice(items, most))

    def results() -> Iterator[Any]:
        try:
            while tasks:
                if buffersize is not None:
                    submit(1)
                # not by a name, which would hold the task while its result is elsewhere
                yield _result_or_cancel(tasks.popleft(), until)
        finally:
            for task in tasks:
                task.cancel()

    submit(buffersize)
    return results()


def _result_or_cancel(task: Future[Any], until: float | None) -> Any:
    try:
        return task.result(None if until is None else until - monotonic())
    finally:
        task.cancel()
        del task  # the traceback holds this frame, which would hold the task
