"""Shows ``bgworker run``: a subscription's events become lines and rows of a table, on a thread of
their own.

This is how a user interface lives on a subscription: one thread, which waits for the next event or
the next tick of its clock, takes what else has come meanwhile, and shows it all at once.
"""

from __future__ import annotations

import logging
from collections import deque
from datetime import datetime, timezone
from time import monotonic, sleep

from ..model.events import LifecycleEvent, LossEvent, StreamType, TaskStatus
from ..model.records import event
from ..model.threads import own_thread
from ..words import escaped, why
from .live import TaskTable
from .screen import ERR, OUT, OWN, Screen
from .tables import counted, painted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from threading import Thread

    from ..delivery.subscription import Subscription
    from ..model.events import TaskSnapshot
    from ..model.health import SinkHealth
    from ..model.records import Record
    from .jobs import Run
    from .screen import Line


AT_ONCE = 10_000
"""Most events that are shown together."""

UNHAPPY = (TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED)

TICK = 1.0
"""Seconds without an event after which the clock of the table is drawn again."""


class Printer:
    """Shows the events of a subscription on the screen, on its own thread, and at the end the
    account."""

    def __init__(self, run: Run, screen: Screen, table: TaskTable, *, quiet: bool) -> None:
        self.notices: deque[str] = deque()
        """Messages of our own that wait to be shown. Any thread appends one, and does not wait for
        the screen."""
        self._run = run
        self._screen = screen
        self._table = table
        self._quiet = quiet
        self._is_single = len(run.commands) == 1
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
            if batch:
                self._show(batch.records)
                if len(batch) < AT_ONCE:
                    sleep(pause)
            elif is_last_look:
                break
            else:
                self._tick()
        self._guarded(self._screen.close)

    def _show(self, records: Sequence[Record]) -> None:
        """Show what these tell, and redraw the table. Blocks as long as the reader of our output
        does."""
        if self._run.output_error is None:
            with self._screen.lock:
                lines = [line for group in _grouped(records) for line in self._lines_of(group)]
                self._table.forget_ended(datetime.now(timezone.utc))
            self._guarded(lambda: self._screen.show([*lines, *self._notices()]))

    def _tick(self) -> None:
        """Show what does not wait for events: the time, and notices."""
        notices = self._notices()
        self._guarded(lambda: self._screen.show(notices) if notices else self._screen.refresh())

    def finish(self, dropped: int, sinks: Mapping[str, SinkHealth]) -> None:
        """Show the summary, and what was not shown or recorded. Nothing when nobody reads it."""
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
        lines = [*self._notices(), *((OWN, f"bgworker run: {escaped(each)}") for each in lost)]
        if not self._is_single:
            counts = run.counts()
            ended = [f"{counts[TaskStatus.COMPLETED]} completed"]
            if others := counted(counts, UNHAPPY):
                ended.append(others)
            lines.append((OWN, f"{len(run.commands)} commands: {', '.join(ended)} "
                               f"in {monotonic() - run.started:.1f} s"))
        self._guarded(lambda: self._screen.show(lines), even_if_lost=True)

    def _guarded(self, show: Callable[[], object], *, even_if_lost: bool = False) -> None:
        if self._run.output_error is None or even_if_lost:
            try:
                show()
            except OSError as error:
                self._run.lose_output(error)

    def _notices(self) -> list[Line]:
        return [(OWN, escaped(self.notices.popleft())) for _ in range(len(self.notices))]

    def _lines_of(self, group: list[Record]) -> Iterator[Line]:
        """Yield the lines of records of one task and kind. Only one of them becomes an event: a
        chatty command says a million lines a second."""
        latest = event(next((record for record in reversed(group) if record[4]), group[-1]))
        if isinstance(latest, LossEvent):
            return  # `finish` has the whole account
        row = self._table.apply(latest)
        label = "" if self._is_single else f"[{row.number}] "
        if isinstance(latest, LifecycleEvent):
            outcome = self._outcome(latest.task, row.number)
            if outcome:
                yield OWN, ("bgworker run: " if self._is_single else label) + outcome
        elif latest.stream_type is not StreamType.PROGRESS:
            kind = OUT if latest.stream_type is StreamType.OUTPUT else ERR
            yield kind, label + f"\n{label}".join([record[4] for record in group])

    def _outcome(self, task: TaskSnapshot, number: int) -> str:
        """Return how the task ended, in words; nothing if that needs no line of its own."""
        status, text = task.status, self._run.commands[number - 1].text
        if (
            not status.is_final
            or status is TaskStatus.COMPLETED
            and (self._is_single or self._quiet)
        ):
            return ""
        if status is TaskStatus.CANCELLED and task.started_utc is None and not self._is_single:
            return ""  # the summary counts it
        after = "" if task.duration is None else f" after {task.duration:.1f} s"
        if status is TaskStatus.COMPLETED:
            word, line = "completed", f"completed in {task.duration or 0.0:.1f} s: {text}"
        elif status is TaskStatus.TIMED_OUT:
            word, line = "timed out", f"timed out{after}: {text}"
        else:
            word, line = status.value, f"{status.value} ({escaped(why(task))}){after}: {text}"
        return painted(line, status, word) if self._screen.colour else line


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
    table."""

    def __init__(self, notices: deque[str]) -> None:
        super().__init__(logging.WARNING)
        self._notices = notices
        self._logger = logging.getLogger(__name__.partition(".")[0])

    def emit(self, record: logging.LogRecord) -> None:
        self._notices.append(f"bgworker run: {record.getMessage()}")

    def __enter__(self) -> None:
        self._logger.addHandler(self)

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
