"""The tasks that a scheduler still knows: those that have not ended, and the newest that have."""

from __future__ import annotations

import threading
from collections import deque

from ..model.checks import key
from ..model.clock import monotonic
from ..model.records import TaskState


class Memory:
    """The tasks by id. Any thread may add and read, each by one atomic step on the dict; a lock
    lets one thread at a time retire tasks.

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
        self._states: dict[str, TaskState] = {}
        # with the time of the end, oldest first
        self._finished: deque[tuple[float, TaskState]] = deque()
        # guards _finished: after the dispatcher's end, any thread retires
        self._lock = threading.Lock()

    def add(self, state: TaskState) -> None:
        """Know a new task."""
        self._states[state.id] = state

    def forget(self, state: TaskState) -> None:
        """Forget a task that could not be queued."""
        self._states.pop(state.id, None)

    def retire(self, ended: list[TaskState]) -> None:
        """Keep tasks that have ended as long as the settings say. The dispatcher's thread, while
        there is one."""
        with self._lock:
            now, finished, keep_seconds = monotonic(), self._finished, self._keep_seconds
            finished.extend([(now, state) for state in ended])
            surplus = 0 if self._keep_finished is None else len(finished) - self._keep_finished
            while finished and (
                surplus > 0 or keep_seconds is not None and now - finished[0][0] > keep_seconds
            ):
                _, state = finished.popleft()
                self._states.pop(state.id, None)
                surplus -= 1

    def states(self) -> list[TaskState]:
        """Return all known tasks in the order of their creation."""
        return list(self._states.copy().values())

    def state(self, task_id: str) -> TaskState:
        """Return one task; KeyError when it is not known."""
        return self._states[key(task_id)]
