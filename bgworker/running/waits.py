"""Tasks that wait for tasks of their own pool: have run what is still queued, refuse what would
wait for ever.

A worker whose task waits for a queued one, by ``result()``, ``exception()`` or ``wait()`` without a
timeout, runs that one itself, there and then, with its own context, deadline and events. Where that
cannot be, because the thread is an event loop's or waits for several at once
(``asyncio.wrap_future``, ``concurrent.futures.wait``, ``as_completed``), the worker's place in the
pool is lent to a *helper*: one more thread, which runs what the worker's task waits for. So a pool
of any size finishes a recursive fan-out.

A wait that can never end, because the chain of waits leads back to the waiting task, raises
`PoolDeadlock` instead of hanging. A ``result(timeout)`` ends by itself, so it does none of this.
"""

from __future__ import annotations

import sys
import threading
from weakref import ref

from ..model.errors import PoolDeadlock, ShutdownError
from .future import LightFuture

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import ContextVar
    from queue import SimpleQueue
    from typing import Any, Protocol, Union
    from weakref import ReferenceType

    class Work(Protocol):
        """What the threads of a pool need of a `Task`."""

        @property
        def id(self) -> str: ...
        @property
        def name(self) -> str: ...
        @property
        def _has_begun(self) -> bool: ...
        @property
        def _reacts_to_cancel(self) -> bool: ...
        def done(self) -> bool: ...
        def running(self) -> bool: ...
        def _run(self) -> bool: ...
        def _fail(self, error: BaseException) -> bool: ...
        def _end_interrupted(self, error: BaseException) -> None: ...
        def _ask_to_stop(self, reason: str) -> None: ...

    class Loop(Protocol):
        """What they need of the event loop of one."""

        @property
        def is_in_main(self) -> bool: ...
        def run(self, coroutine: Any, context: Any) -> tuple[Any, BaseException | None]: ...
        def close(self) -> None: ...

    Inbox = SimpleQueue[Union[ReferenceType[Work], None]]


MOST_NESTED = 50
"""Most tasks that run inside one another: on one thread that is about ten Python frames each, of a
thousand."""



class _Here(threading.local):
    worker: Worker | None = None


_here = _Here()  # in the threads of all pools: whose thread it is


class Worker:
    """One thread of a pool: what it runs, the outermost task first, and what these tasks wait
    for."""

    __slots__ = (
        "thread",
        "first",
        "running",
        "waits_for",
        "waits",
        "helps",
        "helper",
        "inbox",
        "loop",
        "stuck_since",
        "has_served",
        "variables",
    )

    def __init__(self, first: Callable[[], object] | None, helps: Worker | None = None) -> None:
        self.thread: threading.Thread
        self.first = first
        """To be called before anything else. Not an argument of the thread, which would keep it
        until the end."""
        self.running: list[Work] = []
        """A task is here before anybody else can know that it has begun, and until it has ended."""
        self.waits_for: dict[Work, tuple[Work, ...]] = {}
        """Of the tasks that run here: for which others they wait. Guarded by the lock of
        `waits`."""
        self.waits: Waits
        self.helps = helps
        """The worker whose tasks wait for what this one runs; None for one that runs what is
        queued."""
        self.helper: Worker | None = None
        """The one that helps this one."""
        self.inbox: Inbox | None = None
        """Of a helper: what it is to run; None is the sign to end."""
        self.loop: Loop | None = None
        """Of the coroutines that run here; made for the first of them."""
        self.variables: tuple[tuple[ContextVar[Any], Any], ...] = ()
        """The context variables that the initializer has set, with their values."""
        self.stuck_since = 0
        """Nanoseconds since the epoch: when its task passed its deadline; 0 unless it did."""
        self.has_served = False
        """True once it has got as far as a task."""

    @property
    def depth(self) -> int:
        """How many tasks wait inside one another, on this thread and those that it helps."""
        helped = self.helps  # once: that worker's own thread may set it to None
        return len(self.running) + (0 if helped is None else helped.depth)

    def runs_something(self) -> bool:
        """Tell whether a task runs here that has not ended; any thread."""
        return any([not task.done() for task in self.running.copy()])

    def reacts(self) -> bool:
        """Tell whether code that runs here has asked to be called when it is to stop, and can be
        expected to end."""
        return any([task._reacts_to_cancel for task in self.running.copy()])

    def dismiss_helper(self) -> None:
        """Let the helper end: the task that needed it has ended, or is given up. Under the pool's
        lock."""
        helper, self.helper = self.helper, None
        if helper is not None and helper.inbox is not None:
            helper.inbox.put(None)


def current_worker() -> Worker | None:
    """Return the worker whose thread this is, of whatever pool."""
    return _here.worker


class Waits:
    """Knows which worker of a pool waits for which task.

    Args:
        lend: called with a worker and a queued task that its task is about to wait for, to have a
            helper run it. Raises `ShutdownError` if no thread can be had.
        run: called with a worker and a task, on the worker's thread, to run it there and then.
    """

    def __init__(
        self,
        lend: Callable[[Worker, Work], object],
        run: Callable[[Worker, Work], object],
    ) -> None:
        self._lend = lend
        self._run = run
        # guards _workers and their waits_for; a signal handler may cancel meanwhile
        self._lock = threading.RLock()
        self._workers: list[Worker] = []

    @property
    def worker(self) -> Worker | None:
        """The worker whose thread this is; None in a thread that is not the pool's."""
        worker = current_worker()
        return worker if worker is not None and worker.waits is self else None

    def enter(self, worker: Worker) -> None:
        """Know this thread as a worker's."""
        worker.waits = self
        _here.worker = worker
        with self._lock:
            self._workers.append(worker)

    def leave(self, worker: Worker) -> None:
        """Forget it; it ends."""
        with self._lock:
            if worker in self._workers:  # not in a forked child
                self._workers.remove(worker)

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
        """Have a helper run ``task`` if it is queued: somebody on this thread is about to wait for
        it and others.

        Raises:
            PoolDeadlock: the wait would never end.
        """
        worker = self.worker
        if worker is None or not worker.running or task.done():
            return
        if task in worker.running:
            raise _circle(worker, task)
        if not task._has_begun:
            _refuse_depth(worker, task)
            try:
                self._lend(worker, task)
            except ShutdownError as error:
                raise PoolDeadlock(
                    f"task {worker.running[-1].name!r} waits for task {task.name!r}, which has no thread to "
                    f"run on: {error}"
                ) from error

    def notice_callback(self, task: Work, callback: Callable[..., object]) -> None:
        """Have a helper run ``task`` if it is queued and this is a loop's thread: a callback is how
        loops wait.

        Raises:
            PoolDeadlock: the wait would never end.
        """
        worker = self.worker
        if worker is None or not worker.running or task.done() or (loop := _running_loop()) is None:
            return
        # wrap_future's: others may not wait
        is_asyncios = getattr(callback, "__module__", None) == "asyncio.futures"
        if is_asyncios and worker.loop is not None and worker.loop.is_in_main:
            self._note(worker, task)
            LightFuture.add_done_callback(task, lambda done: self._forget(worker, done))  # type: ignore[arg-type]
        if not task._has_begun:
            _refuse_depth(worker, task)
            # not before the coroutine waits
            loop.call_soon(self._have_run_later, worker, worker.running[-1], ref(task))

    def _have_run_later(
        self, worker: Worker, waiting: Work, reference: ReferenceType[Work]
    ) -> None:
        task = reference()
        if waiting in worker.running and task is not None and not task._has_begun:
            # a loop may outlive who was to wait
            self._have_run(worker, task)

    def _have_run(self, worker: Worker, task: Work) -> None:
        try:
            self._lend(worker, task)
            return
        except ShutdownError:
            pass  # there are no more threads
        self._run(worker, task)  # the loop stands still meanwhile, which is better than for ever

    # -- who waits for whom --

    def _note(self, worker: Worker, task: Work) -> None:
        with self._lock:
            if self._leads_back(worker, task):
                raise _circle(worker, task)
            waiting = worker.running[-1]
            worker.waits_for[waiting] = (*worker.waits_for.get(waiting, ()), task)

    def _forget(self, worker: Worker, task: Work) -> None:
        with self._lock:
            for waiting, others in list(worker.waits_for.items()):
                left = tuple(each for each in others if each is not task)
                if left:
                    worker.waits_for[waiting] = left
                else:
                    del worker.waits_for[waiting]

    def forget_all_of(self, worker: Worker) -> None:
        """Forget what the innermost task of a worker waits for: it has ended."""
        with self._lock:
            worker.waits_for.pop(worker.running[-1], None)

    def threads_held_up(self) -> set[threading.Thread]:
        """Return the threads whose tasks cannot go on before one that runs on the caller's thread
        has ended."""
        held_up: list[Worker] = [] if self.worker is None else [self.worker]
        with self._lock:
            for each in held_up:  # grows meanwhile
                held_up += [
                    other
                    for other in self._workers
                    if other not in held_up
                    and (other is each.helps or self._waits_for(other, each))
                ]
        return {each.thread for each in held_up}

    def _waits_for(self, waiting: Worker, worker: Worker) -> bool:
        return any(
            task in worker.running and not task.done()
            for tasks in waiting.waits_for.values()
            for task in tasks
        )

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
            for runner in self._workers:
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
            f"task {worker.running[-1].name!r} waits for task {task.name!r}, {MOST_NESTED} waits deep; "
            "collect the results outside of the tasks, or wait with a timeout"
        )


def _look_for_room(frames: int = 50) -> None:
    """Raise `RecursionError` now if a task that ran here could not even begin and end: nobody could
    end it then."""
    if frames:
        _look_for_room(frames - 1)


def _circle(worker: Worker, task: Work) -> PoolDeadlock:
    return PoolDeadlock(
        f"task {worker.running[-1].name!r} waits for task {task.name!r}, which waits for it, directly or "
        "through others; none of them would ever end"
    )
