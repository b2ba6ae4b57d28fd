"""Shows ``bgworker run``: a subscription's events become lines and rows of a table, on a thread of
their own.

This is how a user interface lives on a subscription: one thread, which waits for the next event or
the next tick of its clock, takes what else has come meanwhile, and shows it all at once.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from dataclasses import replace
from enum import Enum
from itertools import chain
from time import monotonic, sleep

from ..model.events import TaskStatus
from ..model.records import COMPLETED, OUTPUT, PROGRESS, STATUSES
from ..model.threads import own_thread
from ..words import ending, escaped, now, took, word_for
from .estimate import Rhythm
from .screen import ERR, OUT, OWN
from .tables import FAILED, UNHAPPY, counted, task_table
from .text import Surface, width_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from threading import Thread

    from ..delivery.subscription import Subscription
    from ..model.events import TaskSnapshot
    from ..model.health import SinkHealth
    from ..model.records import Record, TaskState
    from .jobs import Run
    from .live import Live
    from .order import Order
    from .screen import Channel, Line, Screen

LEAST_OF_A_COMMAND, MOST_OF_A_COMMAND = 20, 200
"""Columns of a command in the line that tells how it ended. On a terminal it is cut to what room
there is between these: one line for each command is easier to read than four."""

AT_ONCE = 10_000
"""Most events that are shown together."""

MOST_FAILED, MOST_COLUMNS = 10, 200
"""Commands that failed, and columns for them, that are shown once more at the end."""

MOST_TEXT = 2**20
"""Characters after which no more is shown in the same step."""

TICK = 1.0
"""Seconds without an event after which the clock of the table is drawn again."""


class Prefix(Enum):
    """What stands before each line of a command, to tell whose it is."""

    NUMBER = 1
    """Its number, if there are others: ``[12]``."""
    TAG = 2
    """The command, and a tab."""
    NONE = 3


class Printer:
    """Shows the events of a subscription on the screen, on its own thread, and at the end the
    account.

    Args:
        err: where lines of our own go, which are fitted to it.
        quiet: whether a command that completed gets no line.
        program: that its own lines are from.
        typed: returns what to type for a verb and its words; None if nothing is recorded.
        has_picture: whether the screen shows how far the run is. If not, lines tell it now and
            then.
        order: holds back what commands say; None shows it at once.
        prefix: what stands before each line of a command.
    """

    def __init__(self, run: Run, screen: Screen, live: Live, err: Channel, *, quiet: bool,
                 program: str, typed: Callable[[str], str] | None, has_picture: bool,
                 order: Order | None, prefix: Prefix) -> None:
        self.notices: deque[str] = deque()
        """Messages of our own that wait to be shown. Any thread appends one, and does not wait for
        the screen."""
        self._run = run
        self._screen = screen
        self._live = live
        self._err = err
        self._quiet = quiet
        self._program = program
        self._typed = typed
        self._failed: dict[int, TaskSnapshot] = {}  # by number, those that are shown at the end
        self._is_single = run.commands.is_single
        self._rhythm = None if has_picture or self._is_single else Rhythm(monotonic())
        self._order = order
        self._prefix = Prefix.NONE if prefix is Prefix.NUMBER and self._is_single else prefix
        self._labels: dict[TaskState, str] = {}  # of those that have not ended
        self._thread: Thread | None = None

    def follow(self, subscription: Subscription, pause: float) -> None:
        """Start the thread. It lets events gather for ``pause`` seconds after it showed some; it
        ends with the subscription."""
        self._thread = own_thread("bgworker-printer", self._follow, subscription, pause)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread: all is shown then."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _follow(self, subscription: Subscription, pause: float) -> None:
        while True:
            is_last_look = subscription.is_closed  # asked first: nothing comes after it
            batch = subscription.batch(AT_ONCE, TICK)
            if is_last_look and not batch:
                break
            self._show(batch.records)
            if 0 < len(batch) < AT_ONCE:
                sleep(pause)
        if self._order is not None:
            self._show_all(self._order.rest())
            self._order.close()
        self._guarded(self._screen.close)

    def _show(self, records: Sequence[Record]) -> None:
        """Show what these tell, and redraw the table. Blocks as long as the reader of our output
        does."""
        if self._run.output_error is None:
            told = (line for group in _grouped(records) for line in self._lines_of(group))
            self._live.total = self._run.total
            self._show_all(chain(told, self._notices(), self._news()))

    def _show_all(self, lines: Iterable[Line]) -> None:
        """Show lines, and hold no more than some of them at a time: a command that was held back
        may have said gigabytes."""
        def show() -> None:
            shown: list[Line] = []
            size = 0
            for line in lines:
                shown.append(line)
                size += len(line[1])
                if size > MOST_TEXT:
                    self._screen.show(shown)
                    shown, size = [], 0
            self._screen.show(shown)

        self._guarded(show)

    def finish(self, dropped: int, sinks: Mapping[str, SinkHealth]) -> None:
        """Show what failed, what was not shown or recorded, and the summary. Nothing when nobody
        reads it."""
        run = self._run
        if isinstance(run.output_error, BrokenPipeError):
            return
        lost = [
            f"sink {name!r} lost {each.dropped} events; "
            f"{each.last_error or 'it did not take them in time'}"
            for name, each in sinks.items() if each.dropped
        ]
        if run.output_error is not None:
            reason = run.output_error.strerror or run.output_error
            lost.append(f"error: cannot write the output: {reason}")
        elif dropped:
            lost.insert(0, f"{dropped} events could not be shown")
        lines = [*self._notices(), *((OWN, f"{self._program}: {escaped(each)}") for each in lost)]
        if not self._is_single:
            counts = run.counts()
            ended = [f"{counts[TaskStatus.COMPLETED]} completed"]
            if others := counted(counts, UNHAPPY):
                ended.append(others)
            lines += [(OWN, line) for line in self._failures(counts)]
            lines.append((OWN, f"{run.submitted} command{'s' * (run.submitted != 1)}: "
                               f"{', '.join(ended)} in {took(monotonic() - run.started)}"))
        self._guarded(lambda: self._screen.show(lines), even_if_lost=True)

    def _failures(self, counts: Mapping[TaskStatus, int]) -> Iterator[str]:
        """Yield a table of what failed first, and what to type to see more of it."""
        if not self._failed:
            return
        numbers = sorted(self._failed)
        # for people, in a log too
        surface = self._err.surface()
        surface = replace(surface, columns=min(surface.columns, MOST_COLUMNS))
        yield ""
        yield from task_table([self._failed[number] for number in numbers],
                              [f"[{number}]" for number in numbers], now(), surface)
        left = sum(counts[status] for status in FAILED) - len(numbers)
        if left > 0:
            yield f"... and {left} more"
        if self._typed is not None:
            yield f"To see more: {self._typed(f'show {numbers[0]}')}"
            yield f"To run again what did not complete: {self._typed('rerun --failed')}"

    def _guarded(self, show: Callable[[], object], *, even_if_lost: bool = False) -> None:
        if self._run.output_error is None or even_if_lost:
            try:
                show()
            except OSError as error:
                self._run.lose_output(error)

    def _notices(self) -> Iterator[Line]:
        for _ in range(len(self.notices)):
            yield OWN, escaped(self.notices.popleft())

    def _news(self) -> Iterator[Line]:
        """Yield how far the run is, if a line that tells it is due."""
        live, rhythm = self._live, self._rhythm
        if rhythm and live.total and rhythm.is_due(live.ended, live.total, monotonic()):
            yield OWN, f"{self._program}: {live.summary()}"

    def _lines_of(self, group: list[Record]) -> Iterator[Line]:
        """Yield the lines to show after records of one task and kind."""
        state, _, kind, _, _ = group[-1]
        if state is None:
            return  # a loss: `finish` has the whole account
        number = self._live.number(state)
        has_ended = COMPLETED <= kind < PROGRESS
        line: Line | None = None
        if kind > PROGRESS:
            lines = [record[4] for record in group]
            self._live.say(state, next(filter(None, reversed(lines)), ""))
            label = self._label(state, number)
            line = OUT if kind == OUTPUT else ERR, label + f"\n{label}".join(lines)
        elif kind < PROGRESS:
            self._live.move(state, STATUSES[kind])
            if has_ended and (outcome := self._outcome(state, number)):
                line = OWN, outcome
        if line is not None:
            yield from [line] if self._order is None else self._order.take(number, line)
        if has_ended:
            self._labels.pop(state, None)
            self._run.tags.pop(number, None)
            if self._order is not None:
                yield from self._order.end(number)

    def _label(self, state: TaskState, number: int) -> str:
        """Return what stands before each line of a command."""
        if self._prefix is Prefix.NONE:
            return ""
        if self._prefix is Prefix.NUMBER:
            return f"[{number}] "
        label = self._labels.get(state)
        if label is None:
            tag = os.fsencode(self._run.tags.get(number, "")).decode(errors="replace")
            label = self._labels[state] = f"{_short(tag or _text_of(state), MOST_OF_A_COMMAND)}\t"
        return label

    def _outcome(self, state: TaskState, number: int) -> str:
        """Return the line that tells how the task ended; nothing if that needs none."""
        status = state.status
        if status is TaskStatus.COMPLETED and (self._is_single or self._quiet):
            return ""
        task = state.snapshot_now()
        if status in FAILED and len(self._failed) < MOST_FAILED:
            self._failed[number] = replace(task, started_utc=None)  # its duration tells more
        elif status is TaskStatus.CANCELLED and not self._is_single and task.duration is None:
            return ""  # it never ran, and the summary counts it
        word = word_for(status)
        label = f"{self._program}: " if self._is_single else f"[{number}] "
        rest = f"{escaped(ending(task)[len(word):])}: "
        surface = self._err.surface()
        room = surface.columns - width_of(f"{label}{word}{rest}")
        command = _short(_text_of(state), min(max(room, LEAST_OF_A_COMMAND), MOST_OF_A_COMMAND))
        return f"{label}{surface.painted(word, status)}{rest}{command}"


def _text_of(state: TaskState) -> str:
    """Return the command of a task."""
    return (state.source and state.source.script_text) or state.name


def _short(text: str, columns: int) -> str:
    """Return text for a line of our own: harmless, and cut to the columns."""
    return Surface().cut(escaped(text[:2 * MOST_OF_A_COMMAND]), columns)


def _grouped(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the records in their order, those together that are of one task and one kind.
    `itertools.groupby` takes almost twice as long, on a path of a million lines a second."""
    state, kind = None, -1
    group: list[Record] = []
    for record in records:
        if record[0] is not state or record[2] != kind:
            if group:
                yield group
            state, kind, group = record[0], record[2], []
        group.append(record)
    if group:
        yield group


class Notices(logging.Handler):
    """While active, what bgworker logs becomes notices on the screen, rather than text amid the
    table.

    Args:
        program: that they are from.
    """

    def __init__(self, notices: deque[str], program: str) -> None:
        super().__init__(logging.WARNING)
        self._notices = notices
        self._program = program
        self._logger = logging.getLogger(__name__.partition(".")[0])

    def emit(self, record: logging.LogRecord) -> None:
        self._notices.append(f"{self._program}: {record.getMessage()}")

    def __enter__(self) -> None:
        self._logger.addHandler(self)

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
