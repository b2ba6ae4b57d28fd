"""What a history is asked, in SQL: which tasks, which streams, how many, how long.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each is answered by an
index or by reading no more rows than it returns, unless it says otherwise. The indexes: tasks(id),
tasks(status, completed_utc), tasks(name, duration_sec), stream_rows(task, seq).
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from itertools import chain, islice

from ..model import checks
from ..model.errors import AmbiguousTask, ConfigurationError, UnknownTask
from ..model.events import StreamType, TaskStatus
from ..model.text import sanitise
from .answers import (LAST_SIGN, OPEN, SELECT_TASKS, Durations, Failures, Losses, judged, snapshot_of, time_of,
                      time_text)
from .schema import STREAM_CODES

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterator, Mapping
    from typing import Any

    from ..model.events import TaskSnapshot

ALL = -1
"""SQLite's word for no limit."""

MOST_NAMES = 1000
"""Names of which `durations` tells: the most frequent ones."""

MOST_CANDIDATES = 10
"""Tasks that an `AmbiguousTask` names."""

_ENDED = tuple(status for status in TaskStatus if status.is_final and status is not TaskStatus.INTERRUPTED)
_NOT_ENDED = (*OPEN, TaskStatus.INTERRUPTED)  # which stands in the table itself after a replay


def _in(column: str, statuses: Collection[TaskStatus]) -> str:
    return f"{column} IN ({', '.join(repr(status.value) for status in statuses)})"


def moment(since: datetime | timedelta) -> datetime:
    """Return the time that is meant by a time, or by how long ago it is."""
    if isinstance(since, timedelta):
        try:
            return datetime.now(timezone.utc) - since
        except OverflowError:
            return datetime.min.replace(tzinfo=timezone.utc)
    if isinstance(since, datetime) and since.utcoffset() is not None:
        return since
    raise ConfigurationError(f"since: expected an aware datetime or a timedelta, got {since!r}; "
                             "make one with datetime.now(timezone.utc)")


# ---------------------------------------------------------------- one task

def find(connection: sqlite3.Connection, task: str) -> tuple[int, str]:
    """Return key and id of the task that is meant by an id, a name, ``last``, or the beginning of an id, in this order.

    A name that only old tasks have costs a look at all newer ones.

    Raises:
        UnknownTask, AmbiguousTask: none is, or several may be.
    """
    def first(where: str, *values: str) -> tuple[int, str] | None:
        found: tuple[int, str] | None = connection.execute(f"SELECT key, id FROM tasks {where}", values).fetchone()
        return found

    if not isinstance(task, str):
        raise ConfigurationError(f"task: expected an id, a name, or 'last', got {task!r}")
    task = sanitise(task)  # as names are in the file; SQLite takes no surrogates
    found = first("WHERE id = ?", task)
    if found is None and first("WHERE name = ? LIMIT 1", task):
        found = first("WHERE +name = ? ORDER BY id DESC LIMIT 1", task)
    if found is None and task == "last":
        found = first("ORDER BY id DESC LIMIT 1")
    if found is None and task:
        beginning = task.lower()
        rows = connection.execute(
            "SELECT key, id, name, status FROM tasks WHERE id >= ? AND id < ? ORDER BY id DESC LIMIT ?",
            (beginning, beginning + "\U0010ffff", MOST_CANDIDATES + 1)).fetchall()
        if len(rows) > 1:
            count = len(rows) if len(rows) <= MOST_CANDIDATES else f"more than {MOST_CANDIDATES}"
            raise AmbiguousTask(f"{count} tasks have ids that begin with {task[:80]!r}; give more digits",
                                [f"{task_id} {name[:80]} ({status})"
                                 for _, task_id, name, status in rows[:MOST_CANDIDATES]])
        if rows:
            found = rows[0][:2]
    if found is None:
        raise UnknownTask(f"there is no task {task[:80]!r} in this history; expected an id, the beginning of one, "
                          "a name, or last")
    return found


def neighbours(connection: sqlite3.Connection, task_id: str) -> Iterator[str]:
    """Yield the ids before and after an id, as far as there are any."""
    for sql in ("SELECT max(id) FROM tasks WHERE id < ?", "SELECT min(id) FROM tasks WHERE id > ?"):
        (found,) = connection.execute(sql, (task_id,)).fetchone()
        if found is not None:
            yield found


def end_of(connection: sqlite3.Connection, task_id: str, dead: Collection[str]) -> tuple[int | None, bool]:
    """Return the key of a task, None if it is no longer there, and whether nothing more will come of it."""
    row = connection.execute("SELECT t.key, t.status, t.run_id, r.ended_utc FROM tasks t "
                             "LEFT JOIN runs r ON r.run_id = t.run_id WHERE t.id = ?", (task_id,)).fetchone()
    return (None, True) if row is None else (row[0], judged(TaskStatus(row[1]), row[2], row[3], dead).is_final)


def which_streams(types: Collection[StreamType | str] | None) -> str:
    """Return the condition that a row is of one of these streams."""
    if types is None:
        return ""
    codes = [STREAM_CODES[checks.member("types", StreamType, each)] for each in types]
    return f" AND stream IN ({', '.join(map(str, codes))})"


# ---------------------------------------------------------------- many tasks

class Search:
    """Finds the tasks that `History.tasks` is asked for.

    Args:
        dead: runs of which nothing more will come.
        name: a pattern. It is matched row by row: a name that few tasks have costs a look at all of them.
        since: the earliest time.
        limit: most tasks.
    """

    def __init__(self, connection: sqlite3.Connection, dead: Collection[str], name: str | None, since: datetime | None,
                 limit: int | None) -> None:
        self._connection = connection
        self._dead = dead
        # The + keeps SQLite from an index on names, which would have all tasks of a frequent name sorted.
        self._named = "" if name is None else " AND +t.name GLOB ?"
        self._pattern = () if name is None else (sanitise(name),)
        self._since = "" if since is None else time_text(since)
        self._first_id = "" if since is None else f"{max(0, int(since.timestamp() * 1000)):012x}"
        self._limit = limit

    def of_status(self, status: TaskStatus) -> list[TaskSnapshot]:
        """Return those of one status: of a final one the latest ended first, else the latest created."""
        if status is TaskStatus.INTERRUPTED:
            found = self._interrupted()
        elif status in _ENDED:
            found = self._snapshots("t.status = ? AND t.completed_utc >= ?", (status.value, self._since),
                                    "t.completed_utc DESC, t.key DESC")
        else:
            found = (task for task in self._snapshots("t.status = ?", (status.value,), "t.id DESC")
                     if task.status is status)
        return list(islice(found, self._limit))

    def of_any_status(self) -> list[TaskSnapshot]:
        """Return those of all statuses, the latest created first.

        What was created after ``since`` is found by its id. The others that count are older, and either have not ended
        or ended after it: few, for those that ended after it and are not older were not enough to reach the limit.
        """
        found = self._snapshots("t.id >= ? AND (t.completed_utc IS NULL OR t.completed_utc >= ?)",
                                (self._first_id, self._since), "t.id DESC")
        if self._since:
            older = (f"t.key IN (SELECT key FROM tasks WHERE {_in('status', _NOT_ENDED)} UNION ALL "
                     f"SELECT key FROM tasks WHERE {_in('status', _ENDED)} AND completed_utc >= ?) AND +t.id < ?")
            found = chain(found, self._snapshots(older, (self._since, self._first_id), "t.id DESC"))
        return list(islice(found, self._limit))

    def _interrupted(self) -> Iterator[TaskSnapshot]:
        """Judge all that has not ended, which may be a long queue, before any of it is read in full."""
        rows = self._connection.execute(
            f"SELECT t.key, t.status, t.run_id, r.ended_utc FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
            f"WHERE {_in('t.status', _NOT_ENDED)}{self._named} ORDER BY t.id DESC", self._pattern)
        for key, status, run_id, ended in rows:
            if judged(TaskStatus(status), run_id, ended, self._dead) is TaskStatus.INTERRUPTED:
                yield from self._snapshots("t.key = ?", (key,), "t.key")

    def _snapshots(self, where: str, values: tuple[str | int, ...], order: str) -> Iterator[TaskSnapshot]:
        """Yield tasks, but for those that were interrupted before ``since``. The query begins with the first."""
        rows = self._connection.execute(f"{SELECT_TASKS}WHERE {where}{self._named} ORDER BY {order}",
                                        (*values, *self._pattern))
        for row in rows:
            task = snapshot_of(row, self._dead)
            is_judged = self._since and task.status is TaskStatus.INTERRUPTED
            if not is_judged or self._last_sign(task.task_id) >= self._since:
                yield task

    def _last_sign(self, task_id: str) -> str:
        (sign,) = self._connection.execute(f"SELECT {LAST_SIGN} FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
                                           "WHERE t.id = ?", (task_id,)).fetchone()
        return str(sign)


# ---------------------------------------------------------------- counts

def counts(connection: sqlite3.Connection, dead: Collection[str], since: str) -> dict[TaskStatus, int]:
    """Return how many tasks there are of each status."""
    rows = connection.execute(f"SELECT status, count(*) FROM tasks WHERE {_in('status', _ENDED)} "
                              "AND completed_utc >= ? GROUP BY status", (since,)).fetchall()
    found = {TaskStatus(status): count for status, count in rows}
    recent = f"total({LAST_SIGN} >= ?)" if since else "count(?)"
    for status, run_id, ended, count, recent in connection.execute(
            f"SELECT t.status, t.run_id, r.ended_utc, count(*), {recent} FROM tasks t "
            f"LEFT JOIN runs r ON r.run_id = t.run_id WHERE {_in('t.status', _NOT_ENDED)} GROUP BY t.status, t.run_id",
            (since,)):
        seen = judged(TaskStatus(status), run_id, ended, dead)
        found[seen] = found.get(seen, 0) + int(recent if seen is TaskStatus.INTERRUPTED else count)
    return {status: found[status] for status in TaskStatus if found.get(status)}


def completed(connection: sqlite3.Connection, script_hash: str, metadata: Mapping[str, object]) -> int:
    """Return how many tasks of one source completed that had all of this metadata. Reads all tasks of the source."""
    rows = connection.execute("SELECT metadata_json FROM tasks WHERE script_hash = ? AND +status = 'completed'",
                              (script_hash,))
    return sum(metadata.items() <= json.loads(text or "{}").items() for text, in rows)


def failures(connection: sqlite3.Connection, since: str) -> tuple[Failures, ...]:
    """Return the failed tasks by the type of their exception. Reads all of them."""
    # SQLite takes the other columns from the row that has the max(): https://sqlite.org/lang_select.html#bareagg
    rows = connection.execute(
        "SELECT failure_type, count(*), max(completed_utc), id, failure_message FROM tasks "
        "WHERE status = 'failed' AND completed_utc >= ? GROUP BY failure_type ORDER BY 2 DESC, 1", (since,))
    return tuple(Failures(kind, count, None if latest is None else time_of(latest), task_id, message)
                 for kind, count, latest, task_id, message in rows)


def durations(connection: sqlite3.Connection, since: str) -> tuple[Durations, ...]:
    """Return how long the tasks of each name ran. Reads all tasks since a time; without one, an index."""
    if since:
        by_name: dict[str, list[float]] = {}
        for name, seconds in connection.execute(
                f"SELECT name, duration_sec FROM tasks WHERE {_in('status', _ENDED)} AND completed_utc >= ? "
                "AND duration_sec IS NOT NULL", (since,)):
            by_name.setdefault(name, []).append(seconds)
        ranked = sorted(by_name.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_NAMES]
        return tuple(_durations_of(name, len(seconds), sorted(seconds).__getitem__) for name, seconds in ranked)
    names = connection.execute("SELECT name, count(duration_sec) FROM tasks GROUP BY name HAVING count(duration_sec) "
                               "ORDER BY 2 DESC, 1 LIMIT ?", (MOST_NAMES,)).fetchall()
    return tuple(_durations_of(name, count, lambda rank: _ranked(connection, name, count, rank))
                 for name, count in names)


def _durations_of(name: str, count: int, at: Any) -> Durations:
    return Durations(name, count, *(at(-(-count * percent // 100) - 1) for percent in (50, 95, 100)))


def _ranked(connection: sqlite3.Connection, name: str, count: int, rank: int) -> float:
    """Return the duration with this many shorter ones, by steps along the index from the nearer end."""
    order, steps = ("ASC", rank) if rank < count // 2 else ("DESC", count - 1 - rank)
    (seconds,) = connection.execute("SELECT duration_sec FROM tasks WHERE name = ? AND duration_sec IS NOT NULL "
                                    f"ORDER BY duration_sec {order} LIMIT 1 OFFSET ?", (name, steps)).fetchone()
    return float(seconds)


def losses(connection: sqlite3.Connection, since: str) -> tuple[Losses, ...]:
    """Return what was lost, by sink and reason."""
    rows = connection.execute("SELECT sink, reason, sum(count), max(created_utc) FROM losses WHERE created_utc >= ? "
                              "GROUP BY sink, reason ORDER BY 3 DESC, 1, 2", (since,))
    return tuple(Losses(sink, reason, count, time_of(latest)) for sink, reason, count, latest in rows)
