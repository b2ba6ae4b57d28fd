"""Tasks that wait for tasks of their own pool.

A pool of any size finishes a recursive fan-out. When a task waits for a queued one by ``result()``,
``exception()`` or ``wait()`` without a timeout, its worker runs that one itself, there and then,
with its own context, deadline and events. Some waits leave the thread no room for that: those of
an event loop (``asyncio.wrap_future``) and those for several tasks at once
(``concurrent.futures.wait``, ``as_completed``). Then the worker's place in the pool is lent to a
*helper*, one more thread, which runs the tasks that are waited for.

A wait whose chain leads back to the waiting task could never end: it raises `PoolDeadlock`. A
``result(timeout)`` ends by itself, so nothing of this concerns it. Nobody can tell whether a wait
for several has a timeout, or is content with one of them: a circle of those is not found, and
stands still as in a ``ThreadPoolExecutor``.

All of it runs on the thread that waits, except where a docstring says otherwise.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from weakref import ref

from ..model.errors import PoolDeadlock, ShutdownError
from .future import LightFuture
from .workers import current_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from weakref import ReferenceType

    from .workers import Work, Worker

MOST_NESTED = 50
"""Most tasks that run inside one another. On one thread each takes about ten of the thousand Python
frames."""


class Waits:
    """Knows which worker of a pool waits for which task.

    Args:
        lend: has a helper of a worker run a queued task, for which the worker's own task is about
            to wait. Raises `ShutdownError` if no thread can be had.
        run: runs a task on a worker's thread, which is the caller's, there and then.
    """

    def __init__(
        self,
        lend: Callable[[Worker, Work], object],
        run: Callable[[Worker, Work], object],
    ) -> None:
        self._lend = lend
        self._run = run
        # guards all `waits_for`, and the set of the workers that have some; a signal handler may
        # cancel meanwhile
        self._lock = threading.RLock()
        self._waiting: set[Worker] = set()

    @property
    def worker(self) -> Worker | None:
        """The worker whose thread this is; None in a thread that is not the pool's."""
        worker = current_worker()
        return worker if worker is not None and worker.waits is self else None

    # -- waits without a timeout --

    def begin(self, task: Work) -> bool:
        """Prepare to wait for ``task`` without a timeout: if it is still queued, run it here, or
        have it run.

        Returns: True if this is a thread of the pool, which then calls `end` after its wait.

        Raises:
            PoolDeadlock: the wait would never end.
        """
        worker = self.worker
        if worker is None or not worker.running:
            return False
        if not task._has_begun:
            _refuse_depth(worker, task)
            if _running_loop() is None:
                _look_for_room()
                self._run(worker, task)
            else:  # it may want to run a loop of its own, and loops do not nest
                self._have_run(worker, task)
            if task.done():
                return False
        self._note(worker, task)
        return True

    def end(self, task: Work) -> None:
        """Note that the wait is over."""
        worker = self.worker
        if worker is not None:
            self._forget(worker, task)

    # -- waits for several at once, and those of event loops --

    def notice(self, task: Work) -> None:
        """Have a helper run ``task`` if it is queued, because this thread is about to wait for it
        and for others. The caller holds the future's lock.

        Raises:
            PoolDeadlock: the wait would never end.
        """
        worker = self.worker
        if worker is None or not worker.running or task.done():
            return
        if task in worker.running:
            raise _circle(worker, task)
        task._note_watcher()
        if not task._has_begun:
            _refuse_depth(worker, task)
            try:
                self._lend(worker, task)
            except ShutdownError as error:
                raise PoolDeadlock(
                    f"task {worker.running[-1].name!r} waits for task {task.name!r}, which has no "
                    f"thread to run on: {error}"
                ) from error

    def notice_callback(self, task: Work, callback: Callable[..., object]) -> None:
        """Have a helper run ``task`` if it is queued and an event loop runs on this thread: loops
        wait by a callback.

        Raises:
            PoolDeadlock: the wait would never end.
        """
        worker = self.worker
        if worker is None or not worker.running or task.done() or (loop := _running_loop()) is None:
            return
        # only the callback of wrap_future is known to stand for a wait
        is_asyncios = getattr(callback, "__module__", None) == "asyncio.futures"
        if is_asyncios and worker.loop is not None and worker.loop.is_in_main:
            self._note(worker, task)
            forget = partial(self._forget, worker)
            LightFuture.add_done_callback(task, forget)  # type: ignore[arg-type]
        elif is_asyncios:  # of something that the coroutine has started, and may await
            task._note_watcher()
        if not task._has_begun:
            _refuse_depth(worker, task)
            # later, when the coroutine waits
            loop.call_soon(self._have_run_later, worker, worker.running[-1], ref(task))

    def _have_run_later(
        self, worker: Worker, waiting: Work, reference: ReferenceType[Work]
    ) -> None:
        task = reference()
        if waiting in worker.running and task is not None and not task._has_begun:
            # the loop may outlive the task that was to wait
            self._have_run(worker, task)

    def _have_run(self, worker: Worker, task: Work) -> None:
        try:
            self._lend(worker, task)
            return
        except ShutdownError:
            pass  # there are no more threads
        self._run(worker, task)  # the loop stands still meanwhile: else it would for ever

    # -- the chains of waits --

    def _note(self, worker: Worker, task: Work) -> None:
        with self._lock:
            if self._leads_back(worker, task):
                raise _circle(worker, task)
            waiting = worker.running[-1]
            self._waiting.add(worker)
            worker.waits_for[waiting] = (*worker.waits_for.get(waiting, ()), task)

    def _forget(self, worker: Worker, task: Work) -> None:
        with self._lock:
            for waiting, others in list(worker.waits_for.items()):
                worker.waits_for[waiting] = tuple(each for each in others if each is not task)
                if not worker.waits_for[waiting]:
                    self._drop(worker, waiting)

    def forget_all_of(self, worker: Worker) -> None:
        """Forget the waits of a worker's innermost task, which has ended."""
        with self._lock:
            self._drop(worker, worker.running[-1])

    def _drop(self, worker: Worker, waiting: Work) -> None:
        worker.waits_for.pop(waiting, None)
        if not worker.waits_for:
            self._waiting.discard(worker)

    def threads_held_up(self, everybody: Iterable[Worker]) -> set[threading.Thread]:
        """Return the threads, of these workers, whose tasks cannot go on before one that runs on
        the caller's thread has ended."""
        held_up: list[Worker] = [] if self.worker is None else [self.worker]
        with self._lock:
            for each in held_up:  # grows meanwhile
                held_up += [
                    other
                    for other in everybody
                    if other not in held_up
                    and (other is each.helps or self._waits_for(other, each))
                ]
        return {each.thread for each in held_up}

    def _waits_for(self, waiting: Worker, worker: Worker) -> bool:
        awaited = {task for tasks in waiting.waits_for.values() for task in tasks}
        return any([
            not task.done()
            and (task in awaited or task._is_watched_by(waiting.thread.ident))
            for task in worker.running.copy()
        ])

    def _leads_back(self, worker: Worker, task: Work) -> bool:
        """Tell whether ``task`` waits for one that runs on the worker's thread, directly or through
        others."""
        seen, ahead = set(), [task]
        while ahead:
            each = ahead.pop()
            if each in seen or each.done():
                continue
            if each in worker.running:
                return True
            seen.add(each)
            for runner in self._waiting:
                stack = runner.running.copy()
                if each in stack:  # it cannot go on before those that run inside it
                    ahead += [
                        far
                        for near in stack[stack.index(each) :]
                        for far in runner.waits_for.get(near, ())
                    ]
        return False


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop that runs in this thread; nothing is loaded for that."""
    events = sys.modules.get("asyncio.events")
    return None if events is None else events._get_running_loop()


def _refuse_depth(worker: Worker, task: Work) -> None:
    if worker.depth >= MOST_NESTED:
        raise PoolDeadlock(
            f"task {worker.running[-1].name!r} waits for task {task.name!r}, {MOST_NESTED} waits "
            "deep; collect the results outside of the tasks, or wait with a timeout"
        )


def _look_for_room(frames: int = 50) -> None:
    """Raise `RecursionError` now if there are too few frames for a task to begin and end: one that
    had begun could not be ended."""
    if frames:
        _look_for_room(frames - 1)


def _circle(worker: Worker, task: Work) -> PoolDeadlock:
    return PoolDeadlock(
        f"task {worker.running[-1].name!r} waits for task {task.name!r}, which waits for it, "
        "directly or through others; none of them would ever end"
    )
