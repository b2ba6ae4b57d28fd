"""Tables in front of people: pure functions from values to text that fits a terminal.

Whatever comes from a task is untrusted: `cell` makes it one line without anything that could steer
a terminal.
"""

from __future__ import annotations

from itertools import zip_longest

from ..model.events import TaskStatus
from ..words import STATUSES, ago, duration_of, message_of, said, took, word_for
from .text import cut, ellipsis_in, showable, width_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

    from ..model.events import TaskSnapshot

ANY_WIDTH = 1_000_000
"""Columns where there is no terminal: nothing is left out, a program may be reading."""

MOST_OF_A_NAME, MOST_OF_A_MESSAGE = 200, 500
"""Characters shown where there is no terminal either."""

_COLOURS = {
    TaskStatus.RUNNING: "36",
    TaskStatus.COMPLETED: "32",
    TaskStatus.FAILED: "31",
    TaskStatus.TIMED_OUT: "31",
    TaskStatus.CANCELLED: "33",
}


def counted(counts: Counter[TaskStatus], statuses: Iterable[TaskStatus] = STATUSES) -> str:
    """Return "180 completed, 19 failed": the counts that are not zero, in the order of
    ``statuses``."""
    return ", ".join(
        f"{counts[status]} {word_for(status)}" for status in statuses if counts[status]
    )


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
