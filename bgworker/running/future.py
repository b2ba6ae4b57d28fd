"""What stands between `Future` and `Task`: a future that costs little until somebody waits for it.

All that touches the inside of `concurrent.futures.Future` is here. It rests on these properties of
CPython, 3.10 to 3.15:

- ``Future.__init__`` sets the six attributes in `_KNOWN` and nothing else. Where it sets more, it
  is called; here their defaults are in the class, and a lock does for the condition.
- What others do with a future (``wait``, ``as_completed``), they do with its ``_condition`` held:
  they look at ``_state`` and then add to ``_waiters``. A thread that writes the final state with
  ``_condition`` held, and then tells everyone in the lists, misses nobody and tells nobody twice.
- Its own methods that resolve it end with a call of ``_invoke_callbacks``.
- They only ever lock the ``_condition``. Waiting on it is `Future.result`'s way, which is not used
  here.
- A ``_thread.RLock`` is made in a tenth of the time that a `threading.Condition` takes; a subclass
  without attributes of its own costs no more, and the garbage collector never looks at it.
"""

from __future__ import annotations

import threading
from _thread import RLock, allocate_lock, get_ident
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, LOGGER, PENDING, RUNNING

from ..model.text import ask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

__all__ = ["CANCELLED_AND_NOTIFIED", "FINISHED", "LOGGER", "RUNNING", "LightFuture"]

_KNOWN = {"_condition", "_state", "_result", "_exception", "_waiters", "_done_callbacks"}
_needs_more = vars(Future()).keys() != _KNOWN


class _Condition(RLock):  # type: ignore[misc]  # final only for type checkers
    """The ``_condition`` of a future: a lock that also has what `Future.set_result` calls."""

    __slots__ = ()

    def notify_all(self) -> None:
        """Do nothing: those who wait for the future are in ``_waiters``."""


class LightFuture(Future["T"]):
    """A `Future` that is asked for its state without a lock, and whose lists are made when
    needed."""

    def __init__(self) -> None:
        if _needs_more:
            super().__init__()
        self._condition: Any = _Condition()
        # each is read several times: from the class, which knows it too, that takes ten times as
        # long
        self._state = PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._told: list[Any] | None = None
        """Those to be told of the end."""
        self._sleepers: list[Any] | None = None
        """Locks, each of a thread that sleeps until somebody releases it."""
        self._done_callbacks: Any = ()
        self._watchers: tuple[int, ...] = ()

    if not TYPE_CHECKING:  # a property in the place of an attribute, which type checkers refuse
        @property
        def _waiters(self) -> list[Any]:
            """Those to be told of the end. ``wait`` and ``as_completed`` look at it before they
            wait, with the lock held."""
            self._notice_waiter()
            if self._told is None:
                self._told = []
            return self._told

        @_waiters.setter
        def _waiters(self, told: list[Any]) -> None:
            self._told = told

    def _note_watcher(self) -> None:
        """Note that the caller's thread waits for this future in a way whose end nobody tells: for
        others at once, or by a callback."""
        with self._condition:
            if get_ident() not in self._watchers:
                self._watchers += (get_ident(),)

    def _is_watched_by(self, thread: int | None) -> bool:
        """Tell whether a thread, by its identifier, may still wait so."""
        return thread in self._watchers and bool(self._told or self._done_callbacks)

    def _notice_waiter(self) -> None:
        """Called when somebody is about to wait for this future and others at once."""

    def _resolve(self, final_state: str) -> None:
        """Write the final state and wake all threads that wait for it. The caller then calls
        `_tell`."""
        with self._condition:  # not `acquire` and `try`: an interrupt may strike between the two
            self._state = final_state
            if self._sleepers is not None:
                self._wake_sleepers()
            if self._told is None:
                return
            for waiter in self._told:
                if final_state == CANCELLED_AND_NOTIFIED:
                    waiter.add_cancelled(self)
                elif self._exception is not None:
                    waiter.add_exception(self)
                else:
                    waiter.add_result(self)

    def _tell(self) -> None:
        """Call the callbacks of a future that was resolved, once. Whatever one raises, or the
        handlers of the log do when that is told, the next is called."""
        callbacks, self._done_callbacks = self._done_callbacks, ()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                ask(LOGGER.exception, "exception calling callback for %r", self)
            except BaseException:  # it costs no worker, and no other task
                ask(LOGGER.exception, "exception in worker, calling a callback of %r", self)

    def _ends_within(self, timeout: float) -> bool:
        """Wait until the future has ended; False when ``timeout`` seconds passed first."""
        return self.done() or self._sleep(min(max(timeout, 0.0), threading.TIMEOUT_MAX))

    def _sleep(self, seconds: float) -> bool:
        """As `_ends_within`; -1 is for ever."""
        sleeper = allocate_lock()
        sleeper.acquire()
        with self._condition:
            if self._state == FINISHED or self._state == CANCELLED_AND_NOTIFIED:
                return True
            if self._sleepers is None:
                self._sleepers = [sleeper]
            else:
                self._sleepers.append(sleeper)
        if sleeper.acquire(True, seconds):
            return True
        with self._condition:
            if self._sleepers is not None:
                self._sleepers.remove(sleeper)
            return self.done()

    def _wake_sleepers(self) -> None:
        """Let the threads go on that wait in `_sleep`; with ``_condition`` held."""
        sleepers, self._sleepers = self._sleepers or (), None
        for sleeper in sleepers:
            sleeper.release()

    def _invoke_callbacks(self) -> None:
        """Called by `Future` when a stranger has set the result."""
        with self._condition:
            self._wake_sleepers()
        super()._invoke_callbacks()  # type: ignore[misc]

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Have ``fn`` called with the future when it has ended, as in `Future`."""
        with self._condition:
            if self._state != FINISHED and self._state != CANCELLED_AND_NOTIFIED:
                if self._done_callbacks:
                    self._done_callbacks.append(fn)
                else:
                    self._done_callbacks = [fn]
                return
        super().add_done_callback(fn)

    def done(self) -> bool:
        """True when the task has ended, in whatever way."""
        return self._state == FINISHED or self._state == CANCELLED_AND_NOTIFIED

    def cancelled(self) -> bool:
        """True when the task ended by a cancel."""
        return self._state == CANCELLED_AND_NOTIFIED

    def running(self) -> bool:
        """True while the task runs."""
        return self._state == RUNNING
