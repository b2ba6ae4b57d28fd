"""The live table of ``bgworker run``: `TaskTable` keeps a row per task from events, `draw` makes
lines of the rows for a terminal of some size. Neither knows a terminal.
"""

from __future__ import annotations

from collections import Counter, deque

from ..model.events import LifecycleEvent, StreamType, TaskSnapshot, TaskStatus
from ..words import duration_of, word_for
from .tables import aligned, cell, counted
from .text import cut, ellipsis_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Tuple

    from ..model.events import StreamEvent

    Size = Tuple[int, int]

JUST_ENDED = 2.0
"""Seconds that a task stays in the table after its end."""


class Row:
    """One task, as far as the events told."""

    __slots__ = ("number", "task", "percent", "message")

    def __init__(self, number: int, task: TaskSnapshot) -> None:
        self.number = number
        """1, 2, 3 ... in the order of creation."""
        self.task = task
        self.percent: float | None = None
        self.message = ""
        """Its last line, or the message of its progress."""


class TaskTable:
    """The tasks that wait, run, or have just ended, and how many there are of each status. Not
    locked."""

    def __init__(self) -> None:
        self.counts: Counter[TaskStatus] = Counter()
        self._rows: dict[str, Row] = {}
        self._running: dict[str, Row] = {}
        self._ended: deque[Row] = deque()  # oldest first
        self._seen = 0

    def apply(self, event: LifecycleEvent | StreamEvent) -> Row:
        """Take an event in; return the row of its task."""
        row = self._rows.get(event.task_id) or self._new_row(event)
        if isinstance(event, LifecycleEvent):
            self._move(row, event.task)
        elif event.stream_type is StreamType.PROGRESS:
            row.percent = event.percent
            row.message = event.message or row.message
        else:
            row.message = event.payload or row.message
        return row

    def _new_row(self, event: LifecycleEvent | StreamEvent) -> Row:
        if isinstance(event, LifecycleEvent):
            task = event.task
        else:  # what told of its creation was lost
            task = TaskSnapshot(event.task_id, event.task_id, TaskStatus.CREATED, "",
                                event.created_utc)
        self._seen += 1
        row = self._rows[event.task_id] = Row(self._seen, task)
        self.counts[task.status] += 1
        return row

    def _move(self, row: Row, task: TaskSnapshot) -> None:
        self.counts[row.task.status] -= 1
        self.counts[task.status] += 1
        row.task = task
        if task.status is TaskStatus.RUNNING:
            self._running[task.task_id] = row
        elif task.status.is_final:
            self._running.pop(task.task_id, None)
            self._ended.append(row)

    def forget_ended(self, now: datetime) -> None:
        """Drop the rows of tasks that ended a while ago; nothing more is said of them."""
        while self._ended:
            task = self._ended[0].task
            ended = task.completed_utc
            if ended is not None and 0 <= (now - ended).total_seconds() < JUST_ENDED:
                return
            del self._rows[task.task_id]
            self._ended.popleft()

    def rows(self) -> list[Row]:
        """Return those that run, the longest first, then those that have just ended, the latest
        first."""
        ended = [row for row in reversed(self._ended) if row.task.started_utc is not None]
        return [*self._running.values(), *ended]


def draw(table: TaskTable, size: Size, now: datetime, elapsed: float, *, colour: bool = False,
         encoding: str = "utf-8") -> list[str]:
    """Return the lines of the table: a row per task and a summary, narrower than the terminal and
    two thirds as high.

    Args:
        size: columns and lines of the terminal.
        now: for how long the tasks have been running.
        elapsed: seconds of the whole run.
        encoding: what the terminal can show; other characters are escaped.
    """
    # the last column would wrap
    columns, height = size[0] - 1, max(1, min(max(2, size[1] * 2 // 3), size[1] - 1))
    rows, ellipsis = table.rows(), ellipsis_in(encoding)
    shown = rows if len(rows) < height else rows[:max(0, height - 2)]
    label_columns = max((len(f"[{row.number}]") for row in shown), default=0)
    lines = aligned(
        [(f"{f'[{row.number}]':>{label_columns}} {word_for(row.task.status):<9}",
          f"{_clock(duration_of(row.task, now) or 0.0):>7}",
          "" if row.percent is None else f"{row.percent:3.0f}%",
          cell(row.task.name, max(8, columns // 3), encoding),
          cell(row.message, columns, encoding)) for row in shown],
        "<>><<",
        columns,
        encoding=encoding,
        statuses=[row.task.status for row in shown] if colour else (),
    )
    if len(shown) < len(rows) and height > 1:
        lines.append(cut(f"{ellipsis} and {len(rows) - len(shown)} more", columns, ellipsis))
    summary = counted(table.counts) or "starting"
    return [*lines, cut(f"{summary}, {_clock(elapsed)}", columns, ellipsis)]


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
