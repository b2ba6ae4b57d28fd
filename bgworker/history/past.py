"""How other tasks of the same name, or the same command, ended: what a task is judged by.

Every function gets a connection inside a read transaction, and runs on the thread that asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from ..model.events import TaskStatus
from .answers import SEEN, STATUSES, number_of, text_of, time_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from datetime import datetime

    from .questions import Row

MOST = 5_000
"""Tasks that are read, the latest; of a name that more have, the others are looked through for
them."""

LATEST = 5
LONGEST_CHAIN = 100
"""Tasks, each of which runs the one before again, that are followed."""


@dataclass(frozen=True)
class Other:
    """Another task, and how it ended."""

    task_id: str
    status: TaskStatus
    created_utc: datetime | None
    completed_utc: datetime | None


@dataclass(frozen=True)
class Past:
    """The tasks that a task is like: they have its name, or are the same command."""

    earlier: int
    """Tasks that were created before it and have ended; at most 5,000."""
    completed: int
    """Those of them that completed."""
    median: float | None
    """Seconds that half of those that completed took at most."""
    latest: tuple[TaskStatus, ...]
    """How the last of them ended, the latest created first; at most 5."""
    last_completed: Other | None
    """Of them the last that completed."""
    later: Other | None
    """The newest that was created after it."""
    rerun: Other | None
    """The task that ran it again, or ran that one again, and so on: it supersedes this one."""


def past_of(connection: sqlite3.Connection, key: int) -> Past:
    """Return what is known of tasks that are like one. A name that many have costs a look at all
    tasks, 0.5 s for a million."""
    same = ("SELECT key FROM tasks WHERE name = (SELECT name FROM tasks WHERE key = :key) "
            "UNION SELECT key FROM tasks WHERE script_hash = (SELECT script_hash FROM tasks "
            "WHERE key = :key AND instr(script_id, ':') = 0)")
    values = {"key": key, "most": MOST + 1}
    (count,) = connection.execute(f"SELECT count(*) FROM ({same} LIMIT :most)", values).fetchone()
    where = f"t.key IN ({same})"
    if count > MOST:  # the order of ids leads then: the + keeps SQLite from the other indexes
        where = ("(+t.name = (SELECT name FROM tasks WHERE key = :key) OR +t.script_hash = "
                 "(SELECT script_hash FROM tasks WHERE key = :key AND instr(script_id, ':') = 0))")
    this = "(SELECT id FROM tasks WHERE key = :key)"
    rows = [row for row in connection.execute(
        f"{_SELECT} WHERE {where} AND t.id < {this} ORDER BY t.id DESC LIMIT {MOST}", values)
        if (status := STATUSES.get(row[1])) is not None and status.is_final]
    completed = [row for row in rows if row[1] == TaskStatus.COMPLETED]
    seconds = [number for row in completed if (number := number_of(row[4])) is not None]
    later = connection.execute(
        f"{_SELECT} WHERE {where} AND t.id > {this} AND t.id < x'' ORDER BY t.id DESC LIMIT 1",
        values).fetchone()
    return Past(
        len(rows), len(completed), median(seconds) if seconds else None,
        tuple([STATUSES[row[1]] for row in rows[:LATEST]]),
        _other(completed[0]) if completed else None, _other(later), later_of(connection, key))


_SELECT = (f"SELECT t.id, {SEEN}, t.created_utc, t.completed_utc, t.duration_sec "
           "FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id")


def _other(row: Row | None) -> Other | None:
    if row is None or row[1] not in STATUSES:
        return None
    return Other(text_of(row[0]) or "", STATUSES[row[1]], time_of(row[2]), time_of(row[3]))


def later_of(connection: sqlite3.Connection, key: int) -> Other | None:
    """Return the last task of the chain of those that ran a task again."""
    (task_id,) = connection.execute("SELECT id FROM tasks WHERE key = ?", (key,)).fetchone()
    found = None
    for _ in range(LONGEST_CHAIN):
        row = connection.execute(f"{_SELECT} WHERE t.rerun_of = ? AND t.id > ? "
                                 "ORDER BY t.id DESC LIMIT 1", (task_id, task_id)).fetchone()
        if row is None:
            break
        task_id, found = row[0], _other(row)
    return found
