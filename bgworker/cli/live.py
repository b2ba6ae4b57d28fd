"""The live picture of ``bgworker run``: which commands run, what each said last, how many have
ended, and how long the others may take. It knows no terminal.
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from time import monotonic, time_ns

from ..model.events import TaskStatus
from ..words import took
from .estimate import Estimate
from .tables import MOST_OF_A_MESSAGE, UNHAPPY, Column, counted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from ..model.records import TaskState
    from .text import Surface

COLUMNS = (Column("ID"), Column("TIME", ">"), Column("NAME", rank=1, least=12),
           Column("MESSAGE", rank=2, least=12, most=MOST_OF_A_MESSAGE))

BAR = 24
"""Columns of the bar that shows how many commands have ended."""

SOON = 3.0
"""Seconds after which the time left is told: what is over sooner needs no estimate, and looks into
no history for it."""

PAUSE = 1.0
"""Seconds between two estimates: the number is to be read, not to flicker."""


class Live:
    """What the commands of a run do, as far as their records told. One thread uses it.

    Args:
        total: how many commands there are; None as long as that is not known.
        jobs: how many run at a time.
        usual_seconds: asked from time to time, with what tells a command from others, how long
            commands ran before; leaves out those that are not known.
    """

    def __init__(self, total: int | None, jobs: int = 1, usual_seconds: Callable[
            [Collection[str]], Mapping[str, float]] = lambda script_hashes: {}) -> None:
        self.total = total
        self._usual_seconds = usual_seconds
        self._started = monotonic()
        self._estimate = Estimate(jobs)
        self._left: float | None = None
        self._next_estimate = self._started + SOON
        self._unasked: dict[int, TaskState] = {}  # those whose earlier runs nobody has asked for
        self._next_number = count(1).__next__
        self._numbers: dict[TaskState, int] = {}  # of those that have not ended
        self._last_lines: dict[TaskState, str] = {}  # of those that run, the longest first
        self._ended: Counter[TaskStatus] = Counter()

    def number(self, state: TaskState) -> int:
        """Return a command's number: 1, 2, 3 ... in the order of creation."""
        number = self._numbers.get(state)
        if number is None:
            number = self._numbers[state] = self._next_number()
            self._unasked[number] = state
            self._estimate.wait(number)
        return number

    def move(self, state: TaskState, status: TaskStatus) -> None:
        """Note that a command has begun to run, or has ended: nothing more comes of it."""
        number = self.number(state)
        if status is TaskStatus.RUNNING:
            self._last_lines[state] = ""
            self._estimate.begin(number, (state.started_ns or time_ns()) / 1e9)
        elif status.is_final:
            self._last_lines.pop(state, None)
            self._numbers.pop(state)
            self._unasked.pop(number, None)
            self._estimate.end(number, state.duration)
            self._ended[status] += 1

    def say(self, state: TaskState, line: str) -> None:
        """Note what a command said last."""
        if line and state in self._last_lines:
            self._last_lines[state] = line

    @property
    def ended(self) -> int:
        """How many commands have ended."""
        return sum(self._ended.values())

    def summary(self) -> str:
        """Return how many commands have ended, how, and how long the others may take."""
        counts = {**self._ended, TaskStatus.RUNNING: len(self._last_lines)}
        return ", ".join(filter(None, (
            f"{self.ended} ended" if self.total is None else f"{self.ended} of {self.total}",
            took(monotonic() - self._started),
            _in_words(self._time_left()), counted(counts, (TaskStatus.RUNNING, *UNHAPPY)))))

    def _time_left(self) -> float | None:
        """Return the seconds that the rest may take, as of a moment ago; None if nobody knows."""
        now = monotonic()
        if now >= self._next_estimate:
            self._next_estimate = now + PAUSE
            unasked, self._unasked = self._unasked, {}
            hashes = {number: state.source.script_hash
                      for number, state in unasked.items() if state.source is not None}
            known = self._usual_seconds(set(hashes.values())) if hashes else {}
            for number, script_hash in hashes.items():
                if script_hash in known:
                    self._estimate.learn(number, known[script_hash])
            self._left = None
            if self.total is not None:
                self._left = self._estimate.left(self.total, time_ns() / 1e9)
        return None if self.ended == self.total else self._left

    def lines(self, surface: Surface) -> list[str]:
        """Return a heading and a line per command that runs, as many as two thirds of the surface's
        height take, and a summary."""
        running = list(self._last_lines.items())
        room = min(max(3, surface.height * 2 // 3), surface.height - 1) - 2
        if room < 1 or not running:
            return [self._bar(surface)]
        shown = running if len(running) <= room else running[:room - 1]
        at = time_ns()
        lines = table(COLUMNS, [
            (f"[{self._numbers[state]}]", took((at - (state.started_ns or at)) / 1e9), state.name,
             line) for state, line in shown], surface)
        if len(shown) < len(running):
            lines.append(surface.cut(f"... and {len(running) - len(shown)} more"))
        return [*lines, self._bar(surface)]

    def _bar(self, surface: Surface) -> str:
        """Return the summary, with a bar before it if there is room."""
        text = self.summary()
        width = min(BAR, surface.columns - len(text) - 3)
        if width < BAR // 3 or not self.total:
            return surface.cut(text)
        done = f"{'=' * (width * self.ended // self.total)}>"[:width]
        return f"[{done:<{width}}] {text}"


def _in_words(seconds: float | None) -> str:
    """Return "about 40s left"; nothing where that is not known, or any moment now."""
    if seconds is None or seconds < 0.5:
        return ""
    return f"about {took(seconds) if seconds >= 59.5 else f'{seconds:.0f}s'} left"
