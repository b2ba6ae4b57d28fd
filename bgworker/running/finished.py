"""The tasks that a scheduler still knows: those that have not ended, and the newest that have."""

from __future__ import annotations

import threading
from collections import deque

from ..model.checks import key
from ..model.clock import monotonic
from ..model.ids import number_in
from ..model.records import TaskState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SURPLUS = 256
"""Ended tasks after which `Memory.note` prunes."""


class Memory:
    """The tasks by the numbers of their ids. Any thread may add, note and read, each by one atomic
    step; a lock lets one thread at a time prune.

    Args:
        keep_finished: newest ended tasks that are kept; None keeps all.
        keep_seconds: for how long; None is for ever.
    """

    def __init__(self, keep_finished: int | None, keep_seconds: float | None) -> None:
        self._keep_finished = keep_finished
        self._keep_seconds = keep_seconds
        self.start_afresh()

    def start_afresh(self) -> None:
        """Know no task; also in a forked child, which has none of its parent's."""
        self._states: dict[int | None, TaskState] = {}
        # with the time of the end, oldest first
        self._finished: deque[tuple[float, TaskState]] = deque()
        # held while old ones are taken out of _finished; nobody waits for it, since a finaliser may
        # interrupt its owner, and then does the same: re-entrant
        self._lock = threading.RLock()

    def add(self, state: TaskState) -> None:
        """Know a new task."""
        self._states[state.number] = state

    def forget(self, state: TaskState) -> None:
        """Forget a task that could not be queued."""
        self._states.pop(state.number, None)

    def note(self, state: TaskState) -> None:
        """Know that a task has ended. Prunes now and then: there may be `SURPLUS` too many."""
        self._finished.append((monotonic(), state))
        if not len(self._finished) % SURPLUS:
            self.retire([])

    def retire(self, ended: list[TaskState]) -> None:
        """Keep tasks that have ended as long as the settings say."""
        now = monotonic()
        self._finished.extend([(now, state) for state in ended])
        try:
            # inside, since an interrupt may strike right after it
            if self._lock.acquire(blocking=False):
                self._prune(now)
        finally:
            try:
                self._lock.release()
            except RuntimeError:
                pass  # it was never ours

    def _prune(self, now: float) -> None:
        most, keep_seconds, finished = self._keep_finished, self._keep_seconds, self._finished
        try:
            while (most is not None and len(finished) > most
                   or keep_seconds is not None and now - finished[0][0] > keep_seconds):
                self.forget(finished[0][1])  # first: of what was forgotten already nothing is lost
                finished.popleft()
        except IndexError:
            pass  # there are no more

    def states(self) -> list[TaskState]:
        """Return all known tasks in the order of their creation."""
        return list(self._states.copy().values())

    def state(self, task_id: str) -> TaskState:
        """Return one task; KeyError when it is not known."""
        task_id = key(task_id)
        try:
            state = self._states[number_in(task_id)]
        except ValueError:
            raise KeyError(task_id) from None
        if state.id != task_id:
            raise KeyError(task_id)
        return state

    def task(self, task_id: str) -> Any:
        """Return the `Task` with that id; None when it is not known, or has ended and nobody holds
        it."""
        try:
            handle = self.state(task_id).handle
        except KeyError:
            return None
        return None if handle is None else handle()
