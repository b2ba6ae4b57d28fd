"""What a history is asked, in SQL: which tasks, which streams, how many, how long.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each
is answered by an index or by reading no more rows than it returns, unless it says otherwise. The
indexes: tasks(id), tasks(status, completed_utc), tasks(name, duration_sec), stream_rows(task, seq).
"""

from __future__ import annotations

import sqlite3
import sys
from datetime import datetime, timedelta, timezone
from itertools import chain, islice

from ..model import checks
from ..model.errors import AmbiguousTask, ConfigurationError, UnknownTask
from ..model.events import StreamType, TaskStatus
from ..model.records import STREAM_CODES, STREAMS
from ..model.text import sanitise
from .answers import (EPOCH, LAST_SIGN, MOST_CHARACTERS, OPEN, SELECT_BARE_STREAMS,
                      SELECT_BRIEF_TASK, SELECT_EACH_VALUE, SELECT_LOSSES, SELECT_STREAMS,
                      SELECT_TASK, STATUSES, TOO_LONG, Durations, Failures, Losses, brief, judged,
                      number_of, object_of, text_of, time_of, time_text)
from .schema import MOST_TEXT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Tuple

    Row = Tuple[Any, ...]

ALL = -1
"""SQLite's word for no limit."""

MOST_NAMES = 1000
"""Names, types of failures, and losses that are told of: the most frequent ones."""

MOST_OF_A_TASK = 2**19
"""Bytes of the longest value of a task, unless together they have no more than `MOST_TEXT`."""

ABOVE_ALL = float(2**63)
"""Numbers of rows are below it, texts and BLOBs are above."""

_TEXT_ONLY = "id < x''"  # all text sorts before the first BLOB
TOO_LARGE = (sqlite3.DataError, MemoryError)
"""What too long a value raises: Python before 3.11 cannot set the limit, and memory may end."""

MOST_CANDIDATES = 10
"""Tasks that an `AmbiguousTask` names."""

ENDED = tuple(
    status for status in TaskStatus if status.is_final and status is not TaskStatus.INTERRUPTED
)
NOT_ENDED = (*OPEN, TaskStatus.INTERRUPTED)  # which stands in the table itself after a replay


def status_in(column: str, statuses: Collection[TaskStatus]) -> str:
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


def time_since(since: datetime | timedelta | None) -> str:
    """Return a time as the tables spell it; empty, which sorts before all, for None."""
    return "" if since is None else time_text(moment(since))


def id_of(time: datetime) -> str:
    """Return what the ids of tasks that are created at this time begin with."""
    return f"{max(0, int(time.timestamp() * 1000)):012x}"


# ---------------------------------------------------------------- one task

def find(connection: sqlite3.Connection, task: str) -> tuple[int, str]:
    """Return key and id of the task that is meant by an id, a name, ``last``, or the beginning of
    an id, in this order.

    A name that only old tasks have costs a look at all newer ones.

    Raises:
        UnknownTask, AmbiguousTask: none is, or several may be.
    """
    def first(where: str, *values: str) -> tuple[int, str] | None:
        found: tuple[int, str] | None = connection.execute(
            f"SELECT key, id FROM tasks WHERE {_TEXT_ONLY} {where}", values).fetchone()
        return found

    if not isinstance(task, str):
        raise ConfigurationError(f"task: expected an id, a name, or 'last', got {task!r}")
    task = sanitise(task)  # as names are in the file; SQLite takes no surrogates
    found = first("AND id = ?", task)
    if found is None and first("AND name = ? LIMIT 1", task):
        found = first("AND +name = ? ORDER BY id DESC LIMIT 1", task)
    if found is None and task == "last":
        found = first("ORDER BY id DESC LIMIT 1")
    if found is None and task:
        beginning = task.lower()
        rows = connection.execute(
            "SELECT key, id, substr(name, 1, 80), status FROM tasks WHERE id >= ? AND id < ? "
            "ORDER BY id DESC LIMIT ?",
            (beginning, beginning + "\U0010ffff", MOST_CANDIDATES + 1)).fetchall()
        if len(rows) > 1:
            count = len(rows) if len(rows) <= MOST_CANDIDATES else f"more than {MOST_CANDIDATES}"
            raise AmbiguousTask(
                f"{count} tasks have ids that begin with {task[:80]!r}; give more digits",
                [
                    f"{task_id[:80]} {text_of(name)} ({text_of(status)})"
                    for _, task_id, name, status in rows[:MOST_CANDIDATES]
                ],
            )
        if rows:
            found = rows[0][:2]
    if found is None:
        raise UnknownTask(
            f"there is no task {task[:80]!r} in this history; expected an id, the beginning of "
            "one, a name, or last"
        )
    return found


def neighbours(connection: sqlite3.Connection, task_id: str) -> Iterator[str]:
    """Yield the ids before and after an id, as far as there are any."""
    for sql in ("SELECT max(id) FROM tasks WHERE id < ?", "SELECT min(id) FROM tasks WHERE id > ?"):
        (found,) = connection.execute(sql, (task_id,)).fetchone()
        if isinstance(found, str):
            yield found


def task_row(connection: sqlite3.Connection, key: int, *, is_brief: bool = False) -> Row | None:
    """Return what `Reading.task` makes a task of; None if it is no longer there.

    Args:
        is_brief: texts are cut to what a table shows, or left out.
    """
    _limit(connection, MOST_OF_A_TASK)
    try:
        select = SELECT_BRIEF_TASK if is_brief else SELECT_TASK
        row: Row | None = connection.execute(select, (key,)).fetchone()
        return row
    except TOO_LARGE:
        row = tuple(_values(connection, key))
    finally:
        _limit(connection, MOST_TEXT)
    if is_brief:
        row = tuple(value[:MOST_CHARACTERS] if isinstance(value, (str, bytes)) else value
                    for value in row)
    return row


def _values(connection: sqlite3.Connection, key: int) -> Iterator[object]:
    """Yield the values of a task one by one, as far as they are not too long, also together."""
    room = MOST_TEXT
    for select in SELECT_EACH_VALUE:
        _limit(connection, max(room, MOST_CHARACTERS))
        try:
            row = connection.execute(select, (key,)).fetchone()
        except TOO_LARGE:
            yield TOO_LONG
            continue
        value = row[0] if row else None
        room -= len(value) if isinstance(value, (str, bytes)) else 0
        yield value


def _limit(connection: sqlite3.Connection, most: int) -> None:
    """Let SQLite refuse longer values, if Python can make it."""
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, most)


def end_of(
    connection: sqlite3.Connection, task_id: str, dead: Collection[str]
) -> tuple[int | None, bool]:
    """Return the key of a task, None if it is no longer there, and whether nothing more will come
    of it."""
    row = connection.execute(
        "SELECT t.key, t.status, t.run_id, r.ended_utc FROM tasks t "
        "LEFT JOIN runs r ON r.run_id = t.run_id WHERE t.id = ?",
        (task_id,),
    ).fetchone()
    if row is None:
        return None, True
    status = STATUSES.get(row[1])
    return row[0], status is None or judged(status, row[2], row[3], dead).is_final


def which_streams(types: Collection[StreamType | str] | None) -> str:
    """Return the condition that a row is of one of these streams."""
    if types is None:
        return ""
    wanted = checks.members("types", StreamType, types)
    codes = [STREAM_CODES[kind] for kind, stream in STREAMS.items() if stream in wanted]
    return f" AND stream IN ({', '.join(map(str, codes))})"


def stream_rows(connection: sqlite3.Connection, key: int, since: float, which: str,
                limit: int = ALL, *, before: float = ABOVE_ALL,
                is_newest_first: bool = False) -> Iterator[Row]:
    """Yield rows of a task's streams in the order of their numbers; too long ones without text."""
    after: float = max(since, 0)
    where = (f"WHERE task = ? AND seq > ? AND seq < ?{which} "
             f"ORDER BY seq {'DESC' * is_newest_first} LIMIT ?")

    def asked(select: str, most: int) -> sqlite3.Cursor:
        return connection.execute(select + where, (key, after, before, most))

    def one() -> Row | None:
        try:
            row: Row | None = asked(SELECT_STREAMS, 1).fetchone()
        except TOO_LARGE:
            row = asked(SELECT_BARE_STREAMS, 1).fetchone()
        return row

    rows = None
    while limit and after < before:
        try:
            rows = rows or asked(SELECT_STREAMS, limit)
            row = next(rows, None)
        except TOO_LARGE:  # of this row or the next one, for a cursor is a step ahead
            rows, row = None, one()
        if row is None:
            return
        if not after < row[0] < before:
            raise ValueError("rows of its streams are out of order")
        after, before = (after, row[0]) if is_newest_first else (row[0], before)
        limit -= 1
        yield row


def key_after(connection: sqlite3.Connection, key: int | None) -> int | None:
    """Return the key of the next task."""
    row = connection.execute("SELECT key FROM tasks WHERE key > ? ORDER BY key LIMIT 1",
                             (-2**63 if key is None else key,)).fetchone()
    if row is not None and key is not None and row[0] <= key:
        raise ValueError("rows of tasks are out of order")
    return None if row is None else int(row[0])


def loss_rows(connection: sqlite3.Connection, last: int) -> Iterator[Row]:
    """Yield rows of losses in the order in which they were noted, from behind one of them."""
    for row in connection.execute(f"{SELECT_LOSSES}WHERE rowid > ? ORDER BY rowid", (last,)):
        if row[0] <= last:
            raise ValueError("rows of losses are out of order")
        last = row[0]
        yield row


def before_newest(connection: sqlite3.Connection, key: int, which: str, count: int) -> int:
    """Return the number after which the newest rows of a task's streams come, so many."""
    (seq,) = connection.execute(
        "SELECT min(seq) FROM (SELECT seq FROM stream_rows WHERE task = ? AND seq >= 1 "
        f"AND seq < ''{which} ORDER BY seq DESC LIMIT ?)", (key, count)).fetchone()
    return 2**63 - 1 if seq is None else int(seq) - 1


PAGE = 1000
"""Rows that one read transaction gives to an iterator, unless they have as much text as ..."""
PAGE_TEXT = 2**20


def first_page(rows: Iterable[Any]) -> tuple[list[Any], bool]:
    """Return the first rows, as many as one transaction gives, and whether there may be more."""
    page, room = [], PAGE_TEXT
    for row in rows:
        page.append(row)
        room -= text_in(row)
        if room <= 0 or len(page) == PAGE:
            return page, True
    return page, False


def text_in(row: Row) -> int:
    """Return the characters and bytes of a row."""
    return sum([len(value) for value in row if isinstance(value, (str, bytes))])


# ---------------------------------------------------------------- many tasks

class Search:
    """Finds the keys of the tasks that `History.tasks` is asked for.

    Args:
        dead: runs of which nothing more will come.
        name: a pattern. It is matched row by row: a name that few tasks have costs a look at all of
            them.
        since: the earliest time.
        limit: most tasks.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        dead: Collection[str],
        name: str | None,
        since: datetime | None,
        limit: int | None,
    ) -> None:
        self._connection = connection
        self._dead = dead
        # The + keeps SQLite from an index on names, which would have all tasks of a frequent name
        # sorted.
        self._named = "" if name is None else " AND +t.name GLOB ?"
        self._pattern = () if name is None else (sanitise(name),)
        self._since = "" if since is None else time_text(since)
        self._first_id = "" if since is None else id_of(since)
        self._limit = limit

    def of_status(self, status: TaskStatus) -> Iterator[int]:
        """Yield those of one status: the latest ended first, of no final one the latest created."""
        if status in ENDED:
            found = self._judged("t.status = ? AND t.completed_utc >= ?",
                                 (status.value, self._since), "t.completed_utc DESC, t.key DESC")
        elif status is TaskStatus.INTERRUPTED:
            found = self._judged(status_in("t.status", NOT_ENDED), (), "t.id DESC")
        else:
            found = self._judged("t.status = ?", (status.value,), "t.id DESC")
        return islice((key for key, seen in found if seen is status), self._limit)

    def of_any_status(self) -> Iterator[int]:
        """Yield those of all statuses, the latest created first.

        What was created after ``since`` is found by its id. The others that count are older, and
        either have not ended or ended after it: few, for those that ended after it and are not
        older were not enough to reach the limit.
        """
        found = self._judged("t.id >= ? AND (t.completed_utc IS NULL OR t.completed_utc >= ?)",
                             (self._first_id, self._since), "t.id DESC")
        if self._since:
            older = (
                f"t.key IN (SELECT key FROM tasks WHERE {status_in('status', NOT_ENDED)} UNION ALL "
                f"SELECT key FROM tasks WHERE {status_in('status', ENDED)} AND completed_utc >= ?) "
                "AND +t.id < ?"
            )
            found = chain(found, self._judged(older, (self._since, self._first_id), "t.id DESC"))
        return islice((key for key, _ in found), self._limit)

    def _judged(self, where: str, values: tuple[str, ...],
                order: str) -> Iterator[tuple[int, TaskStatus | None]]:
        return judged_keys(self._connection, self._dead, self._since, f"{where}{self._named}",
                           (*values, *self._pattern), order)


def judged_keys(connection: sqlite3.Connection, dead: Collection[str], since: str, where: str,
                values: Sequence[Any], order: str) -> Iterator[tuple[int, TaskStatus | None]]:
    """Yield keys and statuses, but for what was interrupted before ``since``.

    The query begins with the first, and reads no more of a task than it needs.
    """
    rows = connection.execute(
        "SELECT t.key, t.status, t.run_id, r.ended_utc "
        "FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
        f"WHERE {where} ORDER BY {order}", values)
    for key, status, run_id, ended in rows:
        known = STATUSES.get(status)
        seen = None if known is None else judged(known, run_id, ended, dead)
        is_judged = since and seen is TaskStatus.INTERRUPTED
        if not is_judged or _last_sign(connection, key) >= since:
            yield key, seen


def _last_sign(connection: sqlite3.Connection, key: int) -> str:
    (sign,) = connection.execute(
        f"SELECT {LAST_SIGN} FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
        "WHERE t.key = ?",
        (key,),
    ).fetchone()
    return str(sign)


# ---------------------------------------------------------------- counts


def counts(connection: sqlite3.Connection, dead: Collection[str], since: str,
           run: str | None = None) -> dict[TaskStatus, int]:
    """Return how many tasks there are of each status. Reads all tasks of the run, if one is
    named."""
    which, values = _which(ENDED, run)
    rows = connection.execute(f"SELECT t.status, count(*) FROM tasks t WHERE {which} "
                              "AND t.completed_utc >= ? GROUP BY t.status", (*values, since))
    found = {STATUSES[status]: count for status, count in rows}
    recent = f"total({LAST_SIGN} >= ?)" if since else "count(?)"
    which, values = _which(NOT_ENDED, run)
    for status, run_id, ended, count, recent in connection.execute(
        f"SELECT t.status, t.run_id, r.ended_utc, count(*), {recent} FROM tasks t "
        f"LEFT JOIN runs r ON r.run_id = t.run_id WHERE {which} GROUP BY t.status, t.run_id",
        (since, *values),
    ):
        seen = judged(STATUSES[status], run_id, ended, dead)
        found[seen] = found.get(seen, 0) + int(recent if seen is TaskStatus.INTERRUPTED else count)
    return {status: found[status] for status in TaskStatus if found.get(status)}


def _which(statuses: Collection[TaskStatus], run: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the condition that a task ``t`` has one of these statuses, and is of a run if one is
    named, with its values. The + then has the run's index answer, not that of statuses."""
    if run is None:
        return status_in("t.status", statuses), ()
    return f"t.run_id = ? AND {status_in('+t.status', statuses)}", (run,)


def find_run(connection: sqlite3.Connection, run: str | None) -> str | None:
    """Return the id of the run that is meant by an id or the beginning of one; None for None.

    Raises:
        ConfigurationError: none is, or several are.
    """
    if run is None:
        return None
    if not isinstance(run, str):
        raise ConfigurationError(f"run: expected the id of a run, or its beginning, got {run!r}")
    beginning = sanitise(run).lower()
    found = connection.execute(
        "SELECT run_id FROM runs WHERE run_id >= ? AND run_id < ? ORDER BY run_id LIMIT 2",
        (beginning, beginning + "\U0010ffff")).fetchall()
    if not beginning or not found or len(found) > 1 and found[0][0] != beginning:
        raise ConfigurationError(
            f"run: expected the id of a run of this history, or the beginning of one, got "
            f"{run[:80]!r}, which {'several runs have' if found else 'no run has'}; the page of "
            "runs, and --json of any task, show the ids")
    return str(found[0][0])


def completed(
    connection: sqlite3.Connection, script_hash: str, metadata: Mapping[str, object]
) -> int:
    """Return how many tasks of one source completed that had all of this metadata. Reads all tasks
    of the source."""
    rows = connection.execute(
        "SELECT metadata_json FROM tasks WHERE script_hash = ? AND +status = 'completed'",
        (script_hash,),
    )
    return sum(metadata.items() <= object_of(text).items() for text, in rows)


def failures(connection: sqlite3.Connection, since: str,
             run: str | None = None) -> tuple[Failures, ...]:
    """Return the failed tasks by the type of their exception. Reads all of them, or of the run."""
    which, values = _which((TaskStatus.FAILED,), run)
    # SQLite takes the other columns from the row that has the max():
    # https://sqlite.org/lang_select.html#bareagg
    rows = connection.execute(
        f"SELECT {brief('failure_type')}, count(*), max(completed_utc), {brief('id')}, "
        f"{brief('failure_message')} FROM tasks t WHERE {which} AND completed_utc >= ? "
        "GROUP BY failure_type ORDER BY 2 DESC, failure_type LIMIT ?",
        (*values, since, MOST_NAMES))
    return tuple(Failures(text_of(kind), count, time_of(latest), text_of(task_id) or "",
                          text_of(message))
                 for kind, count, latest, task_id, message in rows)


_TIMED = "duration_sec > -9e999 AND duration_sec < 9e999"  # neither infinite nor text
_SOME = f"""
SELECT {brief("name")}, number, max(duration_sec) FILTER (WHERE place <= (number * 50 + 99) / 100),
  max(duration_sec) FILTER (WHERE place <= (number * 95 + 99) / 100), max(duration_sec),
  total(duration_sec), max(id) FILTER (WHERE place = number)
FROM (SELECT name, {brief("id")} AS id, duration_sec, count(*) OVER (PARTITION BY name) AS number,
    row_number() OVER (PARTITION BY name ORDER BY duration_sec) AS place
  FROM tasks t WHERE {{}} AND completed_utc >= ? AND {_TIMED})
GROUP BY name ORDER BY number DESC, name LIMIT {MOST_NAMES}"""
_NAMES = f"""
SELECT {brief("name")}, count(*), total(duration_sec), key FROM tasks WHERE {_TIMED}
GROUP BY name ORDER BY 2 DESC, name LIMIT {MOST_NAMES}"""


def durations(connection: sqlite3.Connection, since: str,
              run: str | None = None) -> tuple[Durations, ...]:
    """Return how long the tasks of each name ran. Reads all tasks since a time, or of a run;
    without these, an index."""
    if since or run is not None:
        which, values = _which(ENDED, run)
        rows = connection.execute(_SOME.format(which), (*values, since))
        return tuple(Durations(text_of(name) or "", count, p50, p95, most, total,
                               text_of(task_id) or "")
                     for name, count, p50, p95, most, total, task_id in rows)
    found = []
    for name, count, total, key in connection.execute(_NAMES).fetchall():
        (p50, _), (p95, _), (most, task_id) = [
            _ranked(connection, key, count, percent) for percent in (50, 95, 100)]
        found.append(Durations(text_of(name) or "", count, p50, p95, most, total, task_id))
    return tuple(found)


def _ranked(connection: sqlite3.Connection, key: int, count: int,
            percent: int) -> tuple[float, str]:
    """Return what so many percent took at most, by steps along the index from the nearer end, and
    the id of a task that took this.

    Args:
        key: of a task of the name.
        count: how many have it.
    """
    rank = -(-count * percent // 100) - 1
    order, steps = ("ASC", rank) if rank < count // 2 else ("DESC", count - 1 - rank)
    row = connection.execute(f"SELECT duration_sec, {brief('id')} FROM tasks "
                             f"WHERE name = (SELECT name FROM tasks WHERE key = ?) AND {_TIMED} "
                             f"ORDER BY duration_sec {order} LIMIT 1 OFFSET ?",
                             (key, steps)).fetchone()
    if row is None:
        raise ValueError("an index lacks rows of tasks")
    return float(row[0]), text_of(row[1]) or ""


def losses(connection: sqlite3.Connection, since: str) -> tuple[Losses, ...]:
    """Return what was lost, by sink and reason."""
    rows = connection.execute(
        f"SELECT {brief('sink')}, {brief('reason')}, total(count), max(created_utc) FROM losses "
        "WHERE created_utc >= ? GROUP BY sink, reason ORDER BY 3 DESC, sink, reason LIMIT ?",
        (since, MOST_NAMES))
    return tuple(Losses(text_of(sink) or "", text_of(reason) or "", int(number_of(count) or 0),
                        time_of(latest) or EPOCH) for sink, reason, count, latest in rows)
