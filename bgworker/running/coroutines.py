"""Tasks whose function is a coroutine function: they run on an event loop of their worker's thread.

A worker makes its loop for its first coroutine and closes it at its end. A coroutine has the worker
for itself until it returns, as a function has. Asyncio tasks that it started and did not await are
cancelled then, as `asyncio.run` does. A coroutine that is asked to stop, by ``cancel`` or by its
deadline, gets ``asyncio.CancelledError`` where it awaits.

`asyncio` is dear to import: this module is loaded with the first coroutine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from functools import partial
from types import CoroutineType, GeneratorType

from ..model.clock import monotonic
from ..model.errors import PoolDeadlock, TaskCancelled
from ..model.reports import report
from ..model.text import describe
from .workers import current_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, Tuple

    from .context import TaskContext

    Outcome = Tuple[Any, "BaseException | None"]

CLEAN_UP = 5.0
"""Seconds that a cancelled coroutine is given to clean up. One that still runs then has swallowed
its cancellation, and a shutdown waits for it no more."""


def run_coroutine(coroutine: Coroutine[Any, Any, Any], context: TaskContext) -> Outcome:
    """Run a coroutine to its end as the task of ``context``; return its result and what it raised.

    Called with the context variables that the coroutine is to have.
    """
    if asyncio._get_running_loop() is not None:
        # loops do not nest; only where no thread can be had does `waits` run the task here
        coroutine.close()
        return None, PoolDeadlock(
            f"a coroutine waits for task {context.name!r}, and no thread can be started to run that"
        )
    worker = current_worker()
    if worker is None:  # a thread of somebody's, in another process: see `remote`
        own = WorkerLoop()
        try:
            return own.run(coroutine, context)
        finally:
            own.close()
    if worker.loop is None:
        worker.loop = WorkerLoop()
    try:
        return worker.loop.run(coroutine, context)
    finally:
        worker.waits.forget_all_of(worker)


class WorkerLoop:
    """An event loop that runs one coroutine after the other, on one thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._main: asyncio.Task[Any] | None = None

    @property
    def is_in_main(self) -> bool:
        """True when the caller is the coroutine itself, rather than something that it started on
        the loop."""
        return self._main is not None and asyncio.current_task(self._loop) is self._main

    def run(self, coroutine: Coroutine[Any, Any, Any], context: TaskContext) -> Outcome:
        """See `run_coroutine`."""
        loop = self._loop
        main = self._main = loop.create_task(coroutine)
        error: BaseException | None = None
        try:
            where = partial(_stack_of, main, coroutine, threading.get_ident())
            with context._woken_by(_canceller(loop, main, context),
                                   (WorkerLoop.run.__code__, where)):
                try:
                    self._run_until_done(main)
                except BaseException as raised:
                    # SystemExit or KeyboardInterrupt, which no asyncio task keeps for itself
                    error = raised
                self._cancel_rest()
            return _outcome(main, error, context)
        finally:
            self._main = None
            del main, error, where  # see _run_until_done

    def _run_until_done(self, future: asyncio.Future[Any]) -> None:
        """As ``run_until_complete``, but leave the future's exception in it, and go on when
        something else stops the loop."""
        future.add_done_callback(lambda _: self._loop.stop())
        try:
            while not future.done():
                self._loop.run_forever()
        finally:
            # from 3.12 on the frame of a coroutine that raises leads back to this one: it would
            # hold the exception
            del future

    def _cancel_rest(self) -> None:
        """Cancel the tasks that still run on the loop and wait for them; report what they raise as
        asyncio does."""
        rest = asyncio.all_tasks(self._loop)
        if not rest:
            return
        for each in rest:
            each.cancel()
        self._run_until_done(asyncio.gather(*rest, return_exceptions=True))
        for each in rest - {self._main}:
            if not each.cancelled() and each.exception() is not None:
                self._loop.call_exception_handler(
                    {
                        "message": "unhandled exception during the end of a bgworker task",
                        "exception": each.exception(),
                        "task": each,
                    }
                )

    def close(self) -> None:
        """Close the loop, after its asynchronous generators and the threads of its executor."""
        if os.getpid() != self._process:
            return  # forked: closing our copy would deregister the parent's sockets
        try:
            self._run_until_done(self._loop.create_task(self._loop.shutdown_asyncgens()))
            self._run_until_done(self._loop.create_task(self._loop.shutdown_default_executor()))
        except Exception as error:  # third parties' generators
            report(
                logging.ERROR,
                "the event loop of %s could not be closed properly: %s",
                threading.current_thread().name,
                describe(error),
            )
        finally:
            self._loop.close()


MOST_LINKS = 100
"""Coroutines, generators and tasks that await one another, as far as a stack is told."""


def _stack_of(main: asyncio.Task[Any], coroutine: Any, thread: int) -> str:
    """Return the stack of a coroutine from its own frame inward: of the thread if it runs there
    now, else through what it awaits. Any thread; may raise."""
    from .stacks import frames_of, place_of, text_of

    frames, own = frames_of(thread), coroutine.cr_frame
    here = [number for number, frame in enumerate(frames) if frame is own]
    places = [place_of(frame) for frame in frames[here[0]:]] if here else []
    del frames, own
    link, task = coroutine, main
    for _ in range(0 if places else MOST_LINKS):
        parts = _parts_of(link)
        if parts is not None:
            frame, link = parts
            if frame is not None:
                places.append(place_of(frame))
            del frame
        elif (following := _awaited_by(task)) is not None:
            task, link = following, following.get_coro()
        else:
            break
    return text_of(places)


def _parts_of(link: Any) -> tuple[Any, Any] | None:
    """Return the frame of a coroutine or generator, and what it awaits; None for another thing,
    which may be somebody's."""
    kind = type(link)
    if kind is CoroutineType:
        return link.cr_frame, link.cr_await
    if kind is GeneratorType:
        return link.gi_frame, link.gi_yieldfrom
    return None


def _awaited_by(task: Any) -> asyncio.Task[Any] | None:
    """Return the asyncio task that another one awaits, of several that were gathered the first that
    is left."""
    awaited = getattr(task, "_fut_waiter", None)
    for each in (awaited, *getattr(awaited, "_children", ())):
        if issubclass(type(each), asyncio.Task) and not each.done():
            found: asyncio.Task[Any] = each
            return found
    return None


def _canceller(
    loop: asyncio.AbstractEventLoop, main: asyncio.Task[Any], context: TaskContext
) -> Callable[[], None]:
    asked: list[str | None] = []

    def cancel() -> None:
        context._reacts_until = min(context._reacts_until, monotonic() + CLEAN_UP)
        try:
            loop.call_soon_threadsafe(cancel_once)
        except RuntimeError:
            pass  # the loop was closed meanwhile: the coroutine has ended

    def cancel_once() -> None:
        if not asked:  # a second time would strike its cleaning up
            asked.append(context.cancel_reason)
            main.cancel(context.cancel_reason)

    return cancel


def _outcome(main: asyncio.Task[Any], error: BaseException | None, context: TaskContext) -> Outcome:
    if main.cancelled():
        return None, error or TaskCancelled(context.cancel_reason)
    error = main.exception() or error
    return (None, error) if error is not None else (main.result(), None)
