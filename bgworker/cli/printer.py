"""What ``bgworker run`` shows: events become lines and rows of a table, on the thread of the printer's courier."""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from datetime import datetime, timezone

from ..events import LifecycleEvent, LossEvent, StreamType, TaskStatus
from .screen import ERR, OUT, OWN, Screen, TaskTable, counted, cut, escaped, painted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from ..delivery.options import SinkHealth
    from ..events import Event, TaskSnapshot
    from .run import Run
    from .screen import Line


class Printer:
    """The sink that shows events on the screen. Called on its courier's thread, `finish` after that has ended."""

    preferred_batch = 10_000

    def __init__(self, run: Run, screen: Screen, table: TaskTable, *, quiet: bool) -> None:
        self.notices: deque[str] = deque()
        """Messages of our own that wait to be shown; whoever has one does not wait for the screen."""
        self._run = run
        self._screen = screen
        self._table = table
        self._quiet = quiet
        self._is_single = len(run.commands) == 1

    def write(self, events: Sequence[Event]) -> None:
        """Show the lines of these events, and redraw the table. Blocks as long as the reader of our output does."""
        if self._run.output_error is None:
            with self._screen.lock:
                lines = [line for event in events for line in self._lines_of(event)]
                self._table.forget_ended(datetime.now(timezone.utc))
            self._guarded(lambda: self._screen.show([*lines, *self._notices()]))

    def close(self) -> None:
        """Take the table off the terminal."""
        self._guarded(self._screen.close)

    def tick(self) -> None:
        """Show what does not wait for events: the time, and notices. The ticker's thread."""
        notices = self._notices()
        self._guarded(lambda: self._screen.show(notices) if notices else self._screen.refresh())

    def finish(self, health: SinkHealth, sinks: Any, seconds: float) -> None:
        """Show the summary, and what was not shown or recorded. Nothing when nobody reads it."""
        lost = [f"{health.dropped} events could not be shown"] if health.dropped and not self._run.output_error else []
        lost += [f"sink {name!r} lost {each.dropped} events; {each.last_error or 'it did not take them in time'}"
                 for name, each in sinks.items() if each.dropped]
        lines = [*self._notices(), *((OWN, f"bgworker run: {escaped(each)}") for each in lost)]
        error = self._run.output_error
        if isinstance(error, BrokenPipeError):
            return
        if error is not None:
            lines.append((OWN, f"bgworker run: error: cannot write the output: {error.strerror or error}"))
        if not self._is_single:
            counts = self._run.counts()
            how = counted(counts, (TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED))
            lines.append((OWN, f"{len(self._run.commands)} commands: {counts[TaskStatus.COMPLETED]} completed"
                               f"{', ' if how else ''}{how} in {seconds:.1f} s"))
        self._guarded(lambda: self._screen.show(lines), even_if_lost=True)

    def _guarded(self, show: Callable[[], object], *, even_if_lost: bool = False) -> None:
        if self._run.output_error is None or even_if_lost:
            try:
                show()
            except OSError as error:
                self._run.lose_output(error)

    def _notices(self) -> list[Line]:
        return [(OWN, escaped(self.notices.popleft())) for _ in range(len(self.notices))]

    def _lines_of(self, event: Event) -> Iterator[Line]:
        if isinstance(event, LossEvent):
            return  # `finish` has the whole account
        row = self._table.apply(event)
        label = "" if self._is_single else f"[{row.number}] "
        if isinstance(event, LifecycleEvent):
            outcome = self._outcome(event.task, row.number)
            if outcome:
                yield OWN, ("bgworker run: " if self._is_single else label) + outcome
        elif event.stream_type is not StreamType.PROGRESS:
            yield OUT if event.stream_type is StreamType.OUTPUT else ERR, label + event.payload

    def _outcome(self, task: TaskSnapshot, number: int) -> str:
        """Return how the task ended, in words; nothing if that needs no line of its own."""
        status, text = task.status, self._run.commands[number - 1].text
        if not status.is_final or status is TaskStatus.COMPLETED and (self._is_single or self._quiet):
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


def why(task: TaskSnapshot) -> str:
    """Return in a few words why a task failed or was cancelled."""
    message = " ".join((task.failure_message or "").split())
    if task.failure_type == "subprocess.CalledProcessError":
        if found := re.search(r" exit status (\d+)\.$", message):
            return f"exit code {found[1]}"
        if found := re.search(r" died with (?:<Signals\.(\w+): \d+>|unknown signal (\d+))\.$", message):
            return found[1] or f"signal {found[2]}"
    elif task.failure_type and not message.startswith(("[Errno ", "[WinError ")):
        message = f"{task.failure_type}: {message}"
    return cut(message.partition("] ")[2] if message.startswith("[") else message, 500, "...") or task.status.value


class Ticker:
    """A thread that calls `Printer.tick` once a second; apart from the main thread, because it may block."""

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bgworker-ticker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(1.0):
            self._printer.tick()

    def stop(self, *, wait: bool = True) -> None:
        """End the thread, and wait for it."""
        self._stopped.set()
        if wait:
            self._thread.join()


class Notices(logging.Handler):
    """While active, what bgworker logs becomes notices on the screen, rather than text amid the table."""

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
