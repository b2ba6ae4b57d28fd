"""Statuses, times, failures and tables in front of people: pure functions from values to text that
fits a terminal.

Whatever comes from a task is untrusted: `cell` makes it one line without anything that could steer
a terminal.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from itertools import zip_longest

from ..model.errors import ConfigurationError
from ..model.events import TaskStatus
from .text import cut, ellipsis_in, said, showable, width_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator, Sequence

    from ..model.events import TaskSnapshot

ANY_WIDTH = 1_000_000
"""Columns where there is no terminal: nothing is left out, a program may be reading."""

MOST_OF_A_NAME, MOST_OF_A_MESSAGE = 200, 500
"""Characters shown where there is no terminal either."""

_WORDS = {TaskStatus.TIMED_OUT: "timed out", TaskStatus.SCHEDULED: "waiting"}
_COLOURS = {
    TaskStatus.RUNNING: "36",
    TaskStatus.COMPLETED: "32",
    TaskStatus.FAILED: "31",
    TaskStatus.TIMED_OUT: "31",
    TaskStatus.CANCELLED: "33",
}
STATUSES = (
    TaskStatus.RUNNING,
    TaskStatus.SCHEDULED,
    TaskStatus.CREATED,
    *(status for status in TaskStatus if status.is_final),
)
"""In the order in which their counts are told."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?[smhdw])+")
_PART = re.compile(r"([0-9.]+)([smhdw])")
_LONGEST = 36_500
"""Days: what is longer than a hundred years leads out of the calendar."""


# ---------------------------------------------------------------- words to values

def duration(text: str) -> timedelta:
    """Return what "90s", "15m", "2h", "7d", "1w" or "1h30m" means.

    Raises:
        ConfigurationError: it means nothing, or more than a hundred years.
    """
    if _DURATION.fullmatch(text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
        if seconds <= _LONGEST * _UNITS["d"]:
            return timedelta(seconds=seconds)
    raise ConfigurationError(
        f"expected a duration such as 90s, 15m, 2h, 7d or 1h30m, up to {_LONGEST}d, "
        f"got {text[:80]!r}"
    )


# ---------------------------------------------------------------- values to words

def word_for(status: TaskStatus) -> str:
    """Return what to call a status in front of people."""
    return _WORDS.get(status, status.value)


def counted(counts: Counter[TaskStatus], statuses: Iterable[TaskStatus] = STATUSES) -> str:
    """Return "180 completed, 19 failed": the counts that are not zero, in the order of
    ``statuses``."""
    return ", ".join(
        f"{counts[status]} {word_for(status)}" for status in statuses if counts[status]
    )


def ago(then: datetime | None, now: datetime) -> str:
    """Return "12s ago", "5m ago", "7h ago", "3d ago", or the date of what is longer ago than two
    weeks."""
    if then is None:
        return "-"
    seconds = (now - then).total_seconds()
    if seconds < 1:
        return "now"  # or by another clock, which is ahead of ours
    for unit, limit in (("s", 60), ("m", 3600), ("h", 48 * 3600), ("d", 14 * 86_400)):
        if seconds < limit:
            return f"{int(seconds / _UNITS[unit])}{unit} ago"
    return then.strftime("%Y-%m-%d")


def took(seconds: float | None) -> str:
    """Return "3ms", "3.4s", "5m12s", "3h07m" or "2d04h"; "-" for what has not ended."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{max(seconds, 0.0) * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (
        f"{days}d{hour:02}h"
        if days
        else f"{hours}h{minute:02}m" if hours else f"{minutes}m{second:02}s"
    )


def duration_of(task: TaskSnapshot, now: datetime) -> float | None:
    """Return the seconds that a task ran, or has been running; None if it never started, or nobody
    knows its end."""
    if (
        task.duration is not None
        or task.started_utc is None
        or task.status is not TaskStatus.RUNNING
    ):
        return task.duration
    return max(0.0, (now - task.started_utc).total_seconds())


def stamp(time: datetime | None) -> str:
    """Return "2026-11-23 14:46:00 UTC"; "-" for none."""
    return "-" if time is None else time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def why(task: TaskSnapshot) -> str:
    """Return in a few words why a task failed or was cancelled."""
    message = " ".join((task.failure_message or "").split())
    if task.failure_type == "subprocess.CalledProcessError":
        if found := re.search(r" exit status (\d+)\.$", message):
            return f"exit code {found[1]}"
        if found := re.search(
            r" died with (?:<Signals\.(\w+): \d+>|unknown signal (\d+))\.$", message
        ):
            return found[1] or f"signal {found[2]}"
    elif task.failure_type and not message.startswith(("[Errno ", "[WinError ")):
        message = f"{task.failure_type}: {message}"
    return (
        cut(message.partition("] ")[2] if message.startswith("[") else message, 500, "...")
        or task.status.value
    )


def message_of(task: TaskSnapshot) -> str:
    """Return the most useful line about a task: why it failed, else its latest progress
    message."""
    if task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED) and (
        task.failure_type or task.failure_message
    ):
        return why(task)
    return task.last_progress_message or task.failure_message or ""


# ---------------------------------------------------------------- tables

def cell(text: str, columns: int, encoding: str = "utf-8") -> str:
    """Return text of a task as part of a line: harmless, and cut to the columns.

    Args:
        encoding: of the terminal, which shows no other characters.
    """
    harmless = showable(said(text[:4 * columns + 4]), encoding)
    return cut(harmless, columns, ellipsis_in(encoding))


def task_lines(tasks: Sequence[TaskSnapshot], now: datetime, columns: int, *, id_length: int = 32,
               colour: bool = False, encoding: str = "utf-8") -> list[str]:
    """Return a heading and a line per task, none wider than the columns. On a terminal the column
    PROGRESS is left out where no task has any: the message needs the room.

    Args:
        id_length: digits of the ids that are shown: enough to tell them apart.
        encoding: as of `cell`.
    """
    of_name, of_message = min(MOST_OF_A_NAME, max(8, columns // 4)), min(MOST_OF_A_MESSAGE, columns)
    rows = [
        (
            cell(task.task_id[:id_length], id_length),
            cell(task.name, of_name, encoding),
            word_for(task.status),
            "" if task.last_progress_percent is None else f"{task.last_progress_percent:.0f}%",
            ago(task.started_utc, now),
            took(duration_of(task, now)),
            cell(message_of(task), of_message, encoding),
        )
        for task in tasks
    ]
    progress = "PROGRESS" if columns >= ANY_WIDTH or any(row[3] for row in rows) else ""
    headings = ("ID", "NAME", "STATUS", progress, "STARTED", "DURATION", "MESSAGE")
    statuses = [None, *(task.status for task in tasks)] if colour else ()
    return aligned([headings, *rows], "<<<>><<", columns, encoding=encoding,
                   statuses=statuses, status_column=2)


def aligned(
    rows: Sequence[Sequence[str]],
    sides: str,
    columns: int,
    *,
    encoding: str = "utf-8",
    statuses: Iterable[TaskStatus | None] = (),
    status_column: int = 0,
) -> list[str]:
    """Return the rows as lines of aligned columns, each cut to ``columns``. A column without any
    text is left out.

    Args:
        sides: "<" or ">" for each column: where its text begins or ends. The last one is not
            padded.
        encoding: as of `cell`.
        statuses: one for each row whose status is to be coloured, else None.
        status_column: the number of the column that ends with the status.
    """
    widths = [max(map(width_of, column)) for column in zip(*rows)]
    ellipsis, lines = ellipsis_in(encoding), []
    for row, status in zip_longest(rows, statuses):
        cells = [_filled(*each) for each in zip(row, widths, sides) if each[1]]
        line = cut("  ".join(cells).rstrip(), columns, ellipsis)
        if status is not None:
            line = painted(line, status, "  ".join(cells[:status_column + 1]).rstrip())
        lines.append(line)
    return lines


def _filled(text: str, width: int, side: str) -> str:
    space = " " * (width - width_of(text))
    return space + text if side == ">" else text + space


def painted(line: str, status: TaskStatus, head: str) -> str:
    """Return the line with its status, which ends ``head``, in colour. A line cut within it stays
    as it is."""
    word, code = word_for(status), _COLOURS.get(status)
    if code is None or not line.startswith(head) or not head.endswith(word):
        return line
    return f"{head[:-len(word)]}\x1b[{code}m{word}\x1b[0m{line[len(head):]}"


def fields(pairs: Iterable[tuple[str, str]], columns: int) -> Iterator[str]:
    """Yield "name  value" lines with the values below one another."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        yield cut(f"{name:<{width}}  {value}", columns)
