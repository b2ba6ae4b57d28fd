"""A task whose code runs elsewhere. Its future, its claims and its record are here."""

from __future__ import annotations

import time

from ..model.enums import TaskStatus
from ..model.failure import describe_failure
from ..model.records import CANCELLED, STARTED
from ..running.future import CANCELLED_AND_NOTIFIED, FINISHED, RUNNING
from ..running.task import Task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Any, Protocol, TypeVar

    from ..running.task import Failure, Runner
    from .hub import Peer

    T = TypeVar("T")

    class RemoteRunner(Runner, Protocol):
        """What it needs of its pool."""

        def ask_there(self, task: RemoteTask[Any]) -> None: ...
        def say_done(self, task: RemoteTask[Any], future: Future[bytes]) -> None: ...


class Elsewhere:
    """Stands in for the `TaskContext` of a task that runs: that one is in another process. It says
    nothing and holds nothing back."""

    _unshown = _flush = _where = None
    _reacts_to_cancel = False

    def _wake(self) -> None:
        """Do nothing: whoever asks the task to stop asks the other process."""


class RemoteTask(Task["T"]):
    """One call on its way through a `Scheduler` that has an executor."""

    _runner: RemoteRunner
    _future: Future[bytes] | None = None
    """The executor's. None until the executor has taken the call."""
    _peer: Peer | None = None
    """The process that has begun it, the latest one if the executor begins it again."""
    _hearing: Any
    """Guards the next, so that each record counts once, and in order; see `RemotePool.said`."""
    _attempts: dict[str, int] | None = None
    """By attempt to run it: how many of its records have come."""
    _has_reported = False
    """True once the executor has said that it is over."""
    _has_deadline = False
    """Whether its time is watched here."""
    _is_claimed = False
    """True once a thread is about to end it after it has begun; guarded by the pool's lock."""

    def _ask_to_stop(self, reason: str) -> None:
        super()._ask_to_stop(reason)
        self._runner.ask_there(self)

    def _cancel_quietly(self, reason: str) -> bool:
        # Not one that has begun: an executor may say that it has cancelled it, and run it on. Of
        # one that the executor is just getting, `RemotePool.put` looks whether it was cancelled.
        future = self._future  # once: the lane of the ends sets it to None
        if self._has_begun or future is None:
            return False
        try:
            return future.cancel() and self._end_unbegun(reason)
        except BaseException:  # an interrupt: the pool may not have been told
            if future.cancelled():
                self._runner.say_done(self, future)
            raise

    def _end_unbegun(self, reason: str) -> bool:
        """Cancel a task that the executor will not run, and call no callback yet."""
        return super()._cancel_quietly(reason)

    @property
    def _has_time_to_wait(self) -> bool:
        """Whether what its command says may wait for the sinks: not while its end waits for that,
        nor when it is to stop or half of its time is over."""
        state = self._task_state
        if self._has_reported or self._is_claimed or state.stop_reason is not None:
            return False
        ran = (time.time_ns() - (state.started_ns or 0)) / 1e9
        return state.timeout is None or ran < state.timeout / 2

    def _describe(self, error: BaseException | None) -> Failure:
        """Return what the record is to have of an error; runs the code of its author."""
        if error is None:
            return None, None, None
        return describe_failure(error, self._limits.max_payload)

    def _begin(self, ns: int) -> None:
        """Have the record say that the task runs since ``ns``. Under the pool's lock."""
        state, intake = self._task_state, self._dispatcher.intake
        state.context = Elsewhere()
        state.speaks_to = intake, self._limits, self._metadata
        state.started_ns = ns
        state.status = TaskStatus.RUNNING
        self._state = RUNNING
        intake.emit_lifecycle(state, STARTED, ns)

    def _end_begun(self, kind: int, duration: float | None, result: Any,
                   error: BaseException | None, failure: Failure | None,
                   result_json: str | None) -> None:
        """End a task that has begun, and call no callback yet. The caller has claimed it."""
        state = self._task_state
        if error is not None and failure is None:
            failure = self._describe(error)
        state.result = result_json
        try:
            self._record_end(kind, duration, result, error, failure)
        finally:
            self._resolve(CANCELLED_AND_NOTIFIED if kind == CANCELLED else FINISHED)
            state.context = None
