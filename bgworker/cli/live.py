"""The live picture of ``bgworker run``: which commands run, what each said last, and how many have
ended. It knows no terminal.
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from time import monotonic, time_ns

from ..model.events import TaskStatus
from ..words import took
from .tables import MOST_OF_A_MESSAGE, UNHAPPY, Column, counted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model.records import TaskState
    from .text import Surface

COLUMNS = (Column("ID"), Column("TIME", ">"), Column("NAME", rank=1, least=12),
           Column("MESSAGE", rank=2, least=12, most=MOST_OF_A_MESSAGE))

BAR = 24
"""Columns of the bar that shows how many commands have ended."""


class Live:
    """What the commands of a run do, as far as their records told. One thread uses it.

    Args:
        total: how many commands there are.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = monotonic()
        self._next_number = count(1).__next__
        self._numbers: dict[TaskState, int] = {}  # of those that have not ended
        self._last_lines: dict[TaskState, str] = {}  # of those that run, the longest first
        self._ended: Counter[TaskStatus] = Counter()

    def number(self, state: TaskState) -> int:
        """Return a command's number: 1, 2, 3 ... in the order of creation."""
        return self._numbers.get(state) or self._numbers.setdefault(state, self._next_number())

    def move(self, state: TaskState, status: TaskStatus) -> None:
        """Note that a command has begun to run, or has ended: nothing more comes of it."""
        if status is TaskStatus.RUNNING:
            self._last_lines[state] = ""
        elif status.is_final:
            self._last_lines.pop(state, None)
            self._numbers.pop(state, None)
            self._ended[status] += 1

    def say(self, state: TaskState, line: str) -> None:
        """Note what a command said last."""
        if line and state in self._last_lines:
            self._last_lines[state] = line

    def lines(self, surface: Surface) -> list[str]:
        """Return a heading and a line per command that runs, as many as two thirds of the surface's
        height take, and a summary."""
        running = list(self._last_lines.items())
        room = min(max(3, surface.height * 2 // 3), surface.height - 1) - 2
        if room < 1 or not running:
            return [self._summary(surface)]
        shown = running if len(running) <= room else running[:room - 1]
        at = time_ns()
        lines = table(COLUMNS, [
            (f"[{self._numbers[state]}]", took((at - (state.started_ns or at)) / 1e9), state.name,
             line) for state, line in shown], surface)
        if len(shown) < len(running):
            lines.append(surface.cut(f"... and {len(running) - len(shown)} more"))
        return [*lines, self._summary(surface)]

    def _summary(self, surface: Surface) -> str:
        """Return how many commands have ended, with a bar if there is room, and how."""
        ended = sum(self._ended.values())
        counts = {**self._ended, TaskStatus.RUNNING: len(self._last_lines)}
        words = (f"{ended} of {self._total}", took(monotonic() - self._started),
                 counted(counts, (TaskStatus.RUNNING, *UNHAPPY)))
        text = ", ".join(filter(None, words))
        width = min(BAR, surface.columns - len(text) - 3)
        if width < BAR // 3:
            return surface.cut(text)
        done = f"{'=' * (width * ended // self._total)}>"[:width]
        return f"[{done:<{width}}] {text}"
