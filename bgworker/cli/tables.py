"""Tables in front of people: pure functions from values to lines that fit a `Surface`.

A table takes texts as tasks said them, which are untrusted, and makes each of them one line without
anything that could steer a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.events import TaskStatus
from ..words import STATUSES, ago, duration_of, message_of, took, word_for
from .text import width_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from ..model.events import TaskSnapshot
    from .text import Surface

MOST_OF_A_NAME, MOST_OF_A_MESSAGE = 200, 500
"""Columns shown where there is no terminal either."""

FAILED = (TaskStatus.FAILED, TaskStatus.TIMED_OUT)
UNHAPPY = (*FAILED, TaskStatus.CANCELLED)


def counted(counts: Mapping[TaskStatus, int], statuses: Iterable[TaskStatus] = STATUSES) -> str:
    """Return "180 completed, 19 failed": the counts that are not zero, in the order of
    ``statuses``."""
    return ", ".join(
        f"{counts[status]} {word_for(status)}" for status in statuses if counts.get(status)
    )


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    heading: str
    side: str = "<"
    """Where the texts begin (<) or end (>)."""
    rank: int = 0
    """Where room is scarce, those with the greatest go first."""
    least: int = 0
    """Where room is scarce, texts are cut to so many columns; 0 is never."""
    most: int = MOST_OF_A_NAME
    """Columns that a text may have, however much room there is."""
    share: int = 1
    """Where room is left, columns that were cut get of it in this proportion."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[str | TaskStatus]],
          surface: Surface) -> list[str]:
    """Return a heading and a line per row, none wider than the surface.

    On a terminal a column without any text is left out, and where room is scarce long texts are
    cut, then whole columns left out.

    Args:
        rows: as many cells as there are columns; a status is shown in words and in its colour.
    """
    texts = [[column.heading for column in columns]]
    for row in rows:
        words = (word_for(cell) if isinstance(cell, TaskStatus) else cell for cell in row)
        texts.append([surface.cell(text, column.most) for text, column in zip(words, columns)])
    widths = _widths(columns, texts, surface)
    lines = []
    for line, row in zip(texts, [[""] * len(columns), *rows]):
        cells = []
        for text, cell, column, width in zip(line, row, columns, widths):
            if width:
                text = surface.cut(text, width)
                space = " " * (width - width_of(text))
                text = (surface.painted(text, cell) if isinstance(cell, TaskStatus)
                        else surface.closed(text))
                cells.append(space + text if column.side == ">" else text + space)
        lines.append("  ".join(cells).rstrip())
    return lines


def _widths(columns: Sequence[Column], texts: Sequence[Sequence[str]],
            surface: Surface) -> list[int]:
    """Return how wide each column is; 0 for one that is left out."""
    room = surface.columns
    wanted = [max(map(width_of, cells)) for cells in zip(*texts)]
    if surface.is_for_people and texts[1:]:
        wanted = [width if set(cells[1:]) - {"", "-"} else 0
                  for width, cells in zip(wanted, zip(*texts))]
    widths = [0] * len(columns)
    left = room + 2  # between two columns there are two blanks, behind the last one none
    for at in sorted(range(len(columns)), key=lambda at: columns[at].rank):
        width = min(wanted[at], columns[at].least or wanted[at])
        if left > room + 1:  # the first one is there in any case
            width = min(width, room)
        if width > left - 2:
            break
        if width:
            widths[at] = width
            left -= width + 2
    # those that need less than their share leave the rest to the others
    cut = sorted([at for at, width in enumerate(widths) if 0 < width < wanted[at]],
                 key=lambda at: (wanted[at] - widths[at]) / columns[at].share)
    for number, at in enumerate(cut):
        shares = sum([columns[each].share for each in cut[number:]])
        more = min(wanted[at] - widths[at], left * columns[at].share // shares)
        widths[at] += more
        left -= more
    return widths


MESSAGE = Column("MESSAGE", rank=3, least=12, most=MOST_OF_A_MESSAGE, share=3)
"""Names are known, or differ at their beginning; what is new stands in the message."""

TASK_COLUMNS = (
    Column("ID", rank=1),
    Column("NAME", rank=2, least=10),
    Column("STATUS"),
    Column("PROGRESS", ">", rank=4),
    Column("STARTED", ">", rank=6),
    Column("DURATION", rank=5),
    MESSAGE,
)


def task_table(tasks: Sequence[TaskSnapshot], ids: Sequence[str], now: datetime,
               surface: Surface) -> list[str]:
    """Return a `table` of tasks, each with what names it."""
    return table(TASK_COLUMNS, [
        (
            task_id,
            task.name,
            task.status,
            "" if task.last_progress_percent is None else f"{task.last_progress_percent:.0f}%",
            ago(task.started_utc, now),
            took(duration_of(task, now)),
            message_of(task),
        )
        for task_id, task in zip(ids, tasks)
    ], surface)

