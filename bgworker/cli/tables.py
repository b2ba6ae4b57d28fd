"""Times, durations and tables in front of people: pure functions from values to text that fits a
terminal.

Whatever comes from a task is untrusted: `cell` makes it one line without anything that could steer
a terminal.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

from ..model.errors import ConfigurationError
from ..model.events import TaskStatus
from .printer import why
from .screen import cut, escaped, painted, width_of, word_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..model.events import TaskSnapshot

ANY_WIDTH = 1_000_000
"""Columns where there is no terminal: nothing is left out, a program may be reading."""

MOST_OF_A_NAME, MOST_OF_A_MESSAGE = 200, 500
"""Characters shown where there is no terminal either."""

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


def message_of(task: TaskSnapshot) -> str:
    """Return what is most worth knowing of a task in a line: why it failed, else the latest
    progress message."""
    if task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED) and (
        task.failure_type or task.failure_message
    ):
        return why(task)
    return task.last_progress_message or task.failure_message or ""


# ---------------------------------------------------------------- tables

def cell(text: str, columns: int) -> str:
    """Return text of a task as part of a line: harmless, and cut to the columns."""
    return cut(escaped(text[:4 * columns + 4]), columns)


TASK_HEADINGS = ("ID", "NAME", "STATUS", "PROGRESS", "STARTED", "DURATION", "MESSAGE")


def task_lines(tasks: Sequence[TaskSnapshot], now: datetime, columns: int, *, id_length: int = 32,
               colour: bool = False) -> list[str]:
    """Return a heading and a line per task, none wider than the columns.

    Args:
        id_length: digits of the ids that are shown: enough to tell them apart.
    """
    of_name, of_message = min(MOST_OF_A_NAME, max(8, columns // 4)), min(MOST_OF_A_MESSAGE, columns)
    rows = [
        (
            cell(task.task_id[:id_length], id_length),
            cell(task.name, of_name),
            word_for(task.status),
            "" if task.last_progress_percent is None else f"{task.last_progress_percent:.0f}%",
            ago(task.started_utc, now),
            took(duration_of(task, now)),
            cell(message_of(task), of_message),
        )
        for task in tasks
    ]
    lines = aligned([TASK_HEADINGS, *rows], "<<<>><<", columns)
    if colour:
        at = sum(
            max(width_of(row[column]) for row in [TASK_HEADINGS, *rows]) + 2 for column in (0, 1)
        )
        lines[1:] = [_coloured(line, task.status, at) for line, task in zip(lines[1:], tasks)]
    return lines


def _coloured(line: str, status: TaskStatus, at: int) -> str:
    """Colour the status word that begins in column ``at``."""
    used = end = 0
    for character in line:
        if used >= at:
            break
        used += width_of(character)
        end += 1
    return painted(line, status, line[:end] + word_for(status))


def aligned(rows: Sequence[Sequence[str]], sides: str, columns: int) -> list[str]:
    """Return the rows as lines of aligned columns, each cut to ``columns``.

    Args:
        sides: "<" or ">" for each column: where its text begins or ends. The last one is not
            padded.
    """
    widths = [max(map(width_of, column)) for column in zip(*rows)]
    lines = [
        "  ".join(_filled(text, width, side) for text, width, side in zip(row, widths, sides))
        for row in rows
    ]
    return [cut(line.rstrip(), columns) for line in lines]


def _filled(text: str, width: int, side: str) -> str:
    space = " " * (width - width_of(text))
    return space + text if side == ">" else text + space


def fields(pairs: Iterable[tuple[str, str]], columns: int) -> Iterator[str]:
    """Yield "name  value" lines with the values below one another."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        yield cut(f"{name:<{width}}  {value}", columns)
