"""The process around the schedulers: its exit, its forks, and what happens to a scheduler that is
forgotten.

At the exit, on the main thread, the tasks of every scheduler finish, as those of a
``ThreadPoolExecutor`` do, and its sinks within their timeouts. In a forked child, whose only thread
is the one that forked, every scheduler begins anew. A scheduler that is forgotten winds down.
"""

from __future__ import annotations

import atexit
import threading
import weakref

from ..model.forks import in_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from ..delivery.dispatcher import Dispatcher

    class Restarts(Protocol):
        """What a fork needs of a `Scheduler`."""

        def _start_afresh(self) -> None: ...

    class Pool(Protocol):
        """What the process needs of the pool of one, of threads or of an executor."""

        has_ended: bool
        def close(self, closed_by: str = ...) -> None: ...
        def join(self, timeout: float | None) -> list[str]: ...
        def start_afresh(self) -> None: ...

# A pool and its dispatcher outlive a Scheduler that is forgotten: its tasks still run.
_live: weakref.WeakKeyDictionary[Pool, Dispatcher] = weakref.WeakKeyDictionary()
_schedulers: weakref.WeakSet[Restarts] = weakref.WeakSet()
_is_exiting = False


def is_exiting() -> bool:
    """Tell whether the interpreter has begun to exit."""
    return _is_exiting


def enter(scheduler: Restarts, pool: Pool, dispatcher: Dispatcher) -> None:
    """Have a new scheduler ended, or begun anew, with the process."""
    _live[pool] = dispatcher
    _schedulers.add(scheduler)
    weakref.finalize(scheduler, _wind_down, dispatcher, pool).atexit = False


def _wind_down(dispatcher: Dispatcher, pool: Pool) -> None:
    """Close the pool of a Scheduler that was forgotten; takes no lock.

    That is done on the dispatcher's thread: the garbage collector may run right inside the pool,
    which holds its lock.
    """
    if dispatcher.has_started:  # else there is no task, no sink, and nobody to close the pool
        dispatcher.intake.post(pool.close)


def _finish_all() -> None:
    """At interpreter exit: let the tasks finish, and the sinks within their timeouts.

    Runs before `threading` joins the other threads, while new ones may mostly still start (not on
    3.12).
    """
    global _is_exiting
    _is_exiting = True
    live = list(_live.items())
    for pool, _ in live:
        pool.close("interpreter shutdown")
    for pool, dispatcher in live:
        pool.join(None)
        dispatcher.closed.wait()


def _register_at_exit() -> None:
    # The hook that concurrent.futures.thread uses. `atexit` itself runs after the joining of
    # non-daemon threads, which may wait for our tasks for ever.
    register = getattr(threading, "_register_atexit", None)
    try:
        if register is not None:
            register(_finish_all)
            return
    except RuntimeError:
        pass  # imported while the interpreter exits: nothing will be submitted any more
    atexit.register(_finish_all)


@in_child
def _start_afresh() -> None:
    """The threads are the parent's, and so is the record of its tasks."""
    for pool, dispatcher in list(_live.items()):
        pool.start_afresh()
        dispatcher.start_afresh()
        if pool.has_ended:  # the parent was closing its sinks: here there is nothing to close
            dispatcher.finish()
    for scheduler in list(_schedulers):
        scheduler._start_afresh()


_register_at_exit()
