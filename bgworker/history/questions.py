"""What a history is asked, in SQL: which tasks, which streams, how many, how long.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each
is answered by an index or by reading no more rows than it returns, unless it says otherwise. The
indexes: tasks(id), tasks(status, completed_utc), tasks(name, duration_sec), stream_rows(task, seq).
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from array import array
from datetime import datetime, timedelta, timezone
from itertools import islice

from ..model import checks
from ..model.errors import AmbiguousTask, ConfigurationError, UnknownTask
from ..model.events import StreamType, TaskStatus
from ..model.ids import SHORT
from ..model.records import STREAM_CODES, STREAMS
from ..model.text import sanitise
from .answers import (EPOCH, LAST_SIGN, MOST_CHARACTERS, OPEN, SEEN, SELECT_BARE_STREAMS,
                      SELECT_BRIEF_TASKS, SELECT_EACH_VALUE, SELECT_LOSSES, SELECT_STREAMS,
                      SELECT_TASKS, STATUSES, TOO_LONG, Attempts, Durations, Failures, Losses,
                      brief, number_of, object_of, text_of, time_of, time_text)
from .schema import COMMAND_FAILED, MOST_TEXT, code_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from typing import Any, Tuple

    Row = Tuple[Any, ...]

ALL = -1
"""SQLite's word for no limit."""

MOST_NAMES = 1000
"""Names, types of failures, and losses that are told of: the most frequent ones."""

MOST_ROWS = 1000 if sys.version_info >= (3, 11) else 100
"""Stream rows, and losses, that are read together, ..."""
MOST_TASKS = 50
"""... and tasks, ..."""
_USUAL = 2**14
_USUAL_OF_A_TASK = 2**16
"""... as far as no value of theirs has more bytes than these."""

ABOVE_ALL = float(2**63)
"""Numbers of rows are below it, texts and BLOBs are above."""

_TEXT_ONLY = "id < x''"  # all text sorts before the first BLOB
TOO_LARGE = (sqlite3.DataError, MemoryError)
"""What too long a value raises: Python before 3.11 cannot set the limit, and memory may end."""
UNUSUAL = (*TOO_LARGE, sqlite3.OperationalError)  # the last for bytes that are no UTF-8

LONGEST_ID = 64
"""Digits of an id that are shown; ours have half of that."""

MOST_CANDIDATES = 10
"""Tasks that an `AmbiguousTask` names."""

ENDED = tuple(
    status for status in TaskStatus if status.is_final and status is not TaskStatus.INTERRUPTED
)
FAILED = (TaskStatus.FAILED, TaskStatus.TIMED_OUT)
"""Statuses of the tasks that are grouped as failures."""
NOT_ENDED = (*OPEN, TaskStatus.INTERRUPTED)  # which stands in the table itself after a replay
NOT_COMPLETED = tuple(status for status in TaskStatus if status is not TaskStatus.COMPLETED)


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


LEFT = f"""(t.status != '{TaskStatus.COMPLETED.value}' AND t.id NOT IN (
  SELECT rerun_of FROM tasks WHERE rerun_of IS NOT NULL))"""
"""What is left to do: a task ``t`` that did not complete, and that no other one ran again."""


def id_of(time: datetime) -> str:
    """Return what the ids of tasks that are created at this time begin with."""
    return f"{max(0, int(time.timestamp() * 1000)):012x}"


def prepare(connection: sqlite3.Connection, dead: set[bytes]) -> None:
    """Give a connection the functions that the questions call.

    Args:
        dead: runs of which nothing more will come, though their record was not closed; now and
            later.
    """
    connection.create_function("is_dead", 1, dead.__contains__)
    connection.create_function("exit_code", 1, code_in)
    connection.create_aggregate("percentiles", 1, _Percentiles)  # type: ignore[arg-type]


def _group(connection: sqlite3.Connection, most: int, sql: str, values: tuple[object, ...],
           one: Callable[[], list[Row]]) -> list[Row]:
    """Return rows up to the first that has a value of more than so many bytes, or a text that is
    none; if that is the first of all, what ``one`` finds for it.

    So no call of Python is needed for each text.
    """
    rows: list[Row] = []
    factory = connection.text_factory
    connection.text_factory = str
    _limit(connection, most)
    try:
        for row in connection.execute(sql, values):
            rows.append(row)
        return rows
    except UNUSUAL as error:
        if str(error) == "interrupted":
            raise
    finally:
        connection.text_factory = factory
        _limit(connection, MOST_TEXT)
    return rows or one()


# ---------------------------------------------------------------- one task

def find(connection: sqlite3.Connection, task: str, run: str | None = None) -> tuple[int, str]:
    """Return key and id of the task that is meant by an id, a name, ``last``, the number that its
    run gave a command, or the beginning or the end of an id, in this order.

    A name that only old tasks have costs a look at all newer ones, a number and whatever is asked
    of a run one at all tasks of the run, the end of an id one at all ids: 0.3 s for a million.

    Args:
        run: what `find_run` takes; None is any run, and for a number the newest.

    Raises:
        UnknownTask, AmbiguousTask: none is, or several may be.
        ConfigurationError: of the run.
    """
    if not isinstance(task, str):
        raise ConfigurationError(f"task: expected an id, a name, or 'last', got {task!r}")
    task = sanitise(task)  # as names are in the file; SQLite takes no surrogates
    run_id = find_run(connection, run)
    scope = _TEXT_ONLY if run_id is None else f"+{_TEXT_ONLY} AND run_id = ?"
    of_run = () if run_id is None else (run_id,)

    def first(where: str, *values: str) -> tuple[int, str] | None:
        found: tuple[int, str] | None = connection.execute(
            f"SELECT key, id FROM tasks WHERE {scope} {where}", (*of_run, *values)).fetchone()
        return found

    found = first("AND id = ?", task)
    if found is None and first("AND name = ? LIMIT 1", task):
        found = first("AND +name = ? ORDER BY id DESC LIMIT 1", task)
    if found is None and task == "last":
        found = first("ORDER BY id DESC LIMIT 1")
    number = _NUMBER.fullmatch(task)
    if number is not None:
        run_id = run_id or newest_run(connection)
        found = found or _numbered(connection, int(number[1] or number[2]), run_id)
    if found is None and task:
        where, values = part_of_id("id", task)
        rows = connection.execute(
            f"SELECT key, id, substr(name, 1, 80), status FROM tasks WHERE {scope} AND {where} "
            "ORDER BY id DESC LIMIT ?", (*of_run, *values, MOST_CANDIDATES + 1)).fetchall()
        if len(rows) > 1:
            count = len(rows) if len(rows) <= MOST_CANDIDATES else f"more than {MOST_CANDIDATES}"
            raise AmbiguousTask(
                f"{count} tasks have ids that begin or end with {task[:80]!r}; give more digits",
                [
                    f"{task_id[:80]} {text_of(name)} ({text_of(status)})"
                    for _, task_id, name, status in rows[:MOST_CANDIDATES]
                ],
            )
        if rows:
            found = rows[0][:2]
    if found is None and task == "last":
        raise UnknownTask("there is no task in this history yet; run something into it")
    if found is None:
        place = "this history" if run is None else f"the run {short(run_id)}"
        remedy = ""
        if number is not None and run is None and run_id is not None:
            remedy = (f"; a number is one of the newest run, {short(run_id)}, unless another run "
                      "is named with it")
        raise UnknownTask(
            f"there is no task {task[:80]!r} in {place}; expected an id, the beginning of one or "
            f"its last {SHORT} digits, a name, last, or the number of a command{remedy}"
        )
    return found


_NUMBER = re.compile(r"\[([1-9][0-9]{0,17})\]|([1-9][0-9]{0,6})")
"""The number of a command. What has no brackets and 8 digits is the end of an id; what begins with
a 0, as ids do until the year 2527, is the beginning of one."""


def _numbered(connection: sqlite3.Connection, number: int,
              run_id: str | None) -> tuple[int, str] | None:
    """Return the command of a run to which it gave this number."""
    rows = connection.execute(
        f"SELECT key, id, metadata_json FROM tasks WHERE run_id = ? AND +{_TEXT_ONLY} "
        "AND metadata_json LIKE ?", (run_id, f'%"number":%{number}%'))
    return next(((key, task_id) for key, task_id, metadata in rows
                 if object_of(metadata).get("number") == number), None)


def short(run_id: str | None) -> str:
    """Return what people are shown of an id, of which nobody knows who wrote it."""
    return (run_id or "")[-SHORT:]


def part_of_id(column: str, text: str) -> tuple[str, tuple[str, ...]]:
    """Return the condition that an id begins with a text, or ends with it if that may be what we
    have shown of it; and its values. What has fewer digits may be a number or a word."""
    part = text.lower()
    where, values = f"({column} >= ? AND {column} < ?", (part, part + "\U0010ffff")
    if re.fullmatch(f"[0-9a-f]{{{SHORT},{LONGEST_ID}}}", part):
        return f"{where} OR substr({column}, -{len(part)}) = ?)", (*values, part)
    return f"{where})", values


def id_length(connection: sqlite3.Connection, task_ids: Collection[str]) -> int:
    """Return how many of their last digits tell these ids from one another, and from those next to
    them in the history.

    Ids that were made by earlier versions end with digits that a whole process has in common.
    """
    ids = set(task_ids)
    for task_id in task_ids:
        for sql in ("SELECT max(id) FROM tasks WHERE id < ?",
                    "SELECT min(id) FROM tasks WHERE id > ?"):
            (beside,) = connection.execute(sql, (task_id,)).fetchone()
            if isinstance(beside, str):
                ids.add(beside)
    lengths = (SHORT, 2 * SHORT, LONGEST_ID)
    return next((each for each in lengths if len({id_[-each:] for id_ in ids}) == len(ids)),
                LONGEST_ID)


def task_rows(connection: sqlite3.Connection, keys: Sequence[int], *,
              is_brief: bool = False) -> list[Row]:
    """Return what `Reading.task` makes the first of these tasks of, at least one, in their order.

    Args:
        is_brief: texts are cut to what a table shows, or left out.
    """
    select = SELECT_BRIEF_TASKS if is_brief else SELECT_TASKS
    return _group(connection, _USUAL_OF_A_TASK, select, (str([*keys[:MOST_TASKS]]),),
                  lambda: [tuple(_values(connection, keys[0], is_brief))])


def _values(connection: sqlite3.Connection, key: int, is_brief: bool) -> Iterator[object]:
    """Yield the values of a task one by one, as far as they are not too long, also together."""
    room = MOST_TEXT
    try:
        for select in SELECT_EACH_VALUE:
            _limit(connection, max(room, MOST_CHARACTERS))
            try:
                (value,) = connection.execute(select, (f"[{key}]",)).fetchone()
            except TOO_LARGE:
                value = TOO_LONG
            if isinstance(value, (str, bytes)):
                room -= len(value)
                value = value[:MOST_CHARACTERS] if is_brief else value
            yield value
    finally:
        _limit(connection, MOST_TEXT)


def _limit(connection: sqlite3.Connection, most: int) -> None:
    """Let SQLite refuse longer values, if Python can make it."""
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, most)


def end_of(connection: sqlite3.Connection, task_id: str) -> tuple[int | None, bool]:
    """Return the key of a task, None if it is no longer there, and whether nothing more will come
    of it."""
    row = connection.execute(
        f"SELECT t.key, {SEEN} FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
        "WHERE t.id = ?", (task_id,)).fetchone()
    if row is None:
        return None, True
    status = STATUSES.get(row[1])
    return row[0], status is None or status.is_final


def which_streams(types: Collection[StreamType | str] | None) -> str:
    """Return the condition that a row is of one of these streams."""
    if types is None:
        return ""
    wanted = checks.members("types", StreamType, types)
    codes = [STREAM_CODES[kind] for kind, stream in STREAMS.items() if stream in wanted]
    return f" AND stream IN ({', '.join(map(str, codes))})"


def stream_groups(connection: sqlite3.Connection, key: int, since: float, which: str,
                  limit: int = ALL, *, before: float = ABOVE_ALL,
                  is_newest_first: bool = False) -> Iterator[list[Row]]:
    """Yield rows of a task's streams in the order of their numbers, some at a time; too long ones
    without text."""
    after: float = max(since, 0)
    where = (f"WHERE task = ? AND seq > ? AND seq < ?{which} "
             f"ORDER BY seq {'DESC' * is_newest_first} LIMIT ?")

    def one() -> list[Row]:
        values = key, after, before, 1
        try:
            return connection.execute(SELECT_STREAMS + where, values).fetchall()
        except TOO_LARGE:
            return connection.execute(SELECT_BARE_STREAMS + where, values).fetchall()

    while limit and after < before:
        most = MOST_ROWS if limit < 0 else min(limit, MOST_ROWS)
        rows = _group(connection, _USUAL, SELECT_STREAMS + where, (key, after, before, most), one)
        if not rows:
            return
        numbers = [row[0] for row in rows]
        order = [before, *numbers, after] if is_newest_first else [after, *numbers, before]
        if order != sorted({*order}, reverse=is_newest_first):
            raise ValueError("rows of its streams are out of order")
        yield rows
        limit -= len(rows)
        after, before = (after, numbers[-1]) if is_newest_first else (numbers[-1], before)


def key_after(connection: sqlite3.Connection, key: int | None,
              run: str | None = None) -> int | None:
    """Return the key of the next task, of a run if one is named."""
    of_run = () if run is None else (run,)
    row = connection.execute(
        f"SELECT key FROM tasks WHERE key > ?{' AND run_id = ?' * len(of_run)} "
        "ORDER BY key LIMIT 1", (-2**63 if key is None else key, *of_run)).fetchone()
    if row is not None and key is not None and row[0] <= key:
        raise ValueError("rows of tasks are out of order")
    return None if row is None else int(row[0])


def loss_rows(connection: sqlite3.Connection, last: int) -> list[Row]:
    """Return some losses in the order in which they were noted, from behind one of them."""
    def asked(most: int) -> tuple[str, tuple[int, ...]]:
        return f"{SELECT_LOSSES}WHERE rowid > ? ORDER BY rowid LIMIT ?", (last, most)

    rows = _group(connection, _USUAL, *asked(MOST_ROWS),
                  lambda: connection.execute(*asked(1)).fetchall())
    if rows and rows[-1][0] <= last:
        raise ValueError("rows of losses are out of order")
    return rows


def before_newest(connection: sqlite3.Connection, key: int, which: str, count: int) -> int:
    """Return the number after which the newest rows of a task's streams come, so many."""
    (seq,) = connection.execute(
        "SELECT min(seq) FROM (SELECT seq FROM stream_rows WHERE task = ? AND seq >= 1 "
        f"AND seq < ''{which} ORDER BY seq DESC LIMIT ?)", (key, count)).fetchone()
    return 2**63 - 1 if seq is None else int(seq) - 1


# ---------------------------------------------------------------- many tasks

def search(connection: sqlite3.Connection, status: TaskStatus | None, name: str | None,
           since: datetime | None, limit: int | None, run: str | None = None,
           is_left: bool = False) -> Iterator[int]:
    """Yield the keys of the tasks that `History.tasks` is asked for: of a final status the latest
    ended first, else the latest created.

    Args:
        status: None is any.
        name: a pattern. It is matched row by row: a name that few tasks have costs a look at all of
            them.
        since: the earliest time.
        limit: most tasks.
        run: the id of a run, all tasks of which are read; None is any.
        is_left: only what is `LEFT`, of which all is read.
    """
    after, first = ("", "") if since is None else (time_text(since), id_of(since))
    order = "t.id DESC"
    parts: list[tuple[str, tuple[str, ...]]]
    ended_since = ("(t.completed_utc IS NULL OR +t.completed_utc >= ?)", (after,))
    if status in ENDED:
        parts = [("{}t.status = ? AND {}t.completed_utc >= ?", (status, after))]
        order = "t.completed_utc DESC, t.key DESC"
    elif status is not None:
        possible = NOT_ENDED if status is TaskStatus.INTERRUPTED else (status,)
        parts = [(status_in("{}t.status", possible), ())]
    elif run is not None:
        parts = [ended_since]
    elif is_left:
        parts = [(f"{status_in('t.status', NOT_COMPLETED)} AND {ended_since[0]}", (after,))]
    elif since is None:
        parts = [("1", ())]
    else:
        # What was created after ``since`` is found by its id. The others that count are older, and
        # either have not ended or ended after it: few, for those that ended after it and are not
        # older were not enough to reach the limit.
        parts = [
            ("t.id >= ? AND (t.completed_utc IS NULL OR t.completed_utc >= ?)", (first, after)),
            (f"t.key IN (SELECT key FROM tasks WHERE {status_in('status', NOT_ENDED)} UNION ALL "
             f"SELECT key FROM tasks WHERE {status_in('status', ENDED)} AND completed_utc >= ?) "
             "AND +t.id < ?", (after, first))]
    more, of_more = "", []
    if is_left:
        more += f" AND {LEFT}"
    if run is not None:
        more, of_more = f"{more} AND t.run_id = ?", [run]
    if name is not None:
        # The + keeps SQLite from an index on names, which would have all tasks of a frequent name
        # sorted.
        more, of_more = f"{more} AND +t.name GLOB ?", [*of_more, sanitise(name)]
    plus = "+" if run is not None else ""  # the index of runs is to lead
    found = (key for where, values in parts for key in seen_keys(
        connection, status, after, where.format(plus, plus) + more, (*values, *of_more), order))
    return islice(found, limit)


def seen_keys(connection: sqlite3.Connection, status: TaskStatus | None, since: str, where: str,
              values: Sequence[Any], order: str) -> Iterator[int]:
    """Yield the keys of tasks that meet a condition and are seen with a status, but for what was
    interrupted before ``since``.

    The query begins with the first, and reads no more of a task than it needs: nothing but an index
    where the condition alone tells.
    """
    if status not in ENDED:
        if status is not None:
            where, values = f"{where} AND {SEEN} = ?", (*values, status)
        if since:
            where, values = f"{where} AND {_IS_SEEN_SINCE}", (*values, since)
    for key, in connection.execute(
            "SELECT t.key FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
            f"WHERE {where} ORDER BY {order}", values):
        yield key


_IS_SEEN_SINCE = f"({SEEN} != 'interrupted' OR {LAST_SIGN} >= ?)"


# ---------------------------------------------------------------- counts


def counts(connection: sqlite3.Connection, since: str,
           run: str | None = None) -> dict[TaskStatus, int]:
    """Return how many tasks there are of each status. Reads all tasks of the run, if one is
    named."""
    if run is None:  # a status at a time: faster than any GROUP BY
        ended = " UNION ALL ".join(
            f"SELECT '{status.value}', count(*) FROM tasks t WHERE t.status = '{status.value}' "
            "AND t.completed_utc >= :since" for status in ENDED)
    else:
        ended = (f"SELECT t.status, count(*) FROM tasks t WHERE {_which(ENDED, run)} "
                 "AND t.completed_utc >= :since GROUP BY t.status")
    since_then = f" AND {_IS_SEEN_SINCE.replace('?', ':since')}" if since else ""
    others = (f"SELECT {SEEN}, count(*) FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
              f"WHERE {_which(NOT_ENDED, run)}{since_then} GROUP BY 1")
    found: dict[str, int] = {}
    for sql in (ended, others):
        found.update(connection.execute(sql, {"since": since, "run": run}))
    return {status: found[status.value] for status in TaskStatus if found.get(status.value)}


def _which(statuses: Collection[TaskStatus], run: str | None) -> str:
    """Return the condition that a task ``t`` has one of these statuses, and is of the ``:run`` if
    there is one. The + then has the run's index answer, not that of statuses."""
    if run is None:
        return status_in("t.status", statuses)
    return f"t.run_id = :run AND {status_in('+t.status', statuses)}"


def find_run(connection: sqlite3.Connection, run: str | None) -> str | None:
    """Return the id of the run that is meant by an id, the beginning or the end of one, ``last``,
    or ``last~N``, the Nth before it; None for None.

    Raises:
        ConfigurationError: none is, or several are.
    """
    if run is None:
        return None
    if not isinstance(run, str):
        raise ConfigurationError(f"run: expected the id of a run, or its beginning, got {run!r}")
    if counted := _LAST.fullmatch(run):
        found = _run_ids(connection, f"{_NEWEST} LIMIT 1 OFFSET ?", int(counted[1] or 0))
    else:
        where, values = part_of_id("run_id", sanitise(run))
        found = _run_ids(connection, "run_id = ?", *values[:1])
        if not found and run:
            found = _run_ids(connection, f"{where} LIMIT 2", *values)
    if len(found) != 1:
        newest = _run_ids(connection, f"{_NEWEST} LIMIT ?", MOST_CANDIDATES)
        exist = f"the newest are {', '.join(map(short, newest))}" if newest else "it has none"
        raise ConfigurationError(
            "run: expected the id of a run of this history, the beginning of one or its last "
            f"{SHORT} digits, last, or last~1 for the one before it, got {run[:80]!r}, which "
            f"{'several runs have' if found[1:] else 'no run has'}; {exist}")
    return found[0]


_LAST = re.compile("last(?:~([0-9]{1,9}))?")
_NEWEST = "1 ORDER BY run_id DESC"


def newest_run(connection: sqlite3.Connection) -> str | None:
    """Return the id of the newest run; None if there is none."""
    return next(iter(_run_ids(connection, f"{_NEWEST} LIMIT 1")), None)


def _run_ids(connection: sqlite3.Connection, where: str, *values: str | int) -> list[str]:
    return [run_id for run_id, in connection.execute(
        f"SELECT run_id FROM runs WHERE run_id < x'' AND {where}", values)]


def run_again(connection: sqlite3.Connection) -> set[object]:
    """Return the ids of the tasks that others ran again."""
    return {task_id for task_id, in connection.execute(
        "SELECT rerun_of FROM tasks WHERE rerun_of IS NOT NULL")}


def attempts(connection: sqlite3.Connection, script_hash: str, metadata: Mapping[str, object],
             again: Collection[object]) -> Attempts:
    """Return what became of the tasks of one source that had all of this metadata. Reads all tasks
    of the source.

    Args:
        again: what `run_again` returns.
    """
    completed = 0
    left = []
    for task_id, status, text in connection.execute(
            f"SELECT t.id, {SEEN}, t.metadata_json FROM tasks t "
            "LEFT JOIN runs r ON r.run_id = t.run_id WHERE t.script_hash = ? "
            f"AND t.{_TEXT_ONLY} ORDER BY t.id DESC", (script_hash,)):
        seen = STATUSES.get(status)
        if seen is None or not seen.is_final or not metadata.items() <= object_of(text).items():
            continue
        if seen is TaskStatus.COMPLETED:
            completed += 1
        elif task_id not in again:
            left.append(task_id)
    return Attempts(completed, tuple(left))


EXIT_CODE = f"""CASE t.failure_type WHEN '{COMMAND_FAILED}'
  THEN exit_code(CAST(substr(t.failure_message, -100) AS BLOB)) END"""
"""The exit code of a command ``t`` that failed; NULL of other tasks."""


LATEST = 9
"""Tasks of one source that tell how long it usually runs."""


def usual_seconds(
    connection: sqlite3.Connection, script_hash: str, *, completed_only: bool = False
) -> float | None:
    """Return the median of how long the latest tasks of one source ran that completed; of those
    that failed or timed out, if none of them did."""
    rows = connection.execute(
        "SELECT t.status = 'completed', t.duration_sec FROM tasks t WHERE t.script_hash = ? "
        f"AND {status_in('+t.status', (TaskStatus.COMPLETED, *FAILED))} AND {_TIMED} "
        "ORDER BY t.key DESC LIMIT ?", (script_hash, LATEST)).fetchall()
    took = sorted([seconds for is_completed, seconds in rows if is_completed]
                  or [seconds for _, seconds in rows if not completed_only])
    return took[len(took) // 2] if took else None


def failures(connection: sqlite3.Connection, since: str,
             run: str | None = None) -> tuple[Failures, ...]:
    """Return the tasks that failed or timed out by the type of their exception, commands by
    program and exit code. Reads all of them, or of the run."""
    # SQLite takes the other columns from the row that has the max():
    # https://sqlite.org/lang_select.html#bareagg
    rows = connection.execute(
        f"SELECT {brief('failure_type')}, count(*), max(completed_utc), {brief('id')}, "
        f"{brief('failure_message')}, CASE WHEN code IS NOT NULL THEN {brief('script_id')} END "
        f"AS program, code, {brief('name')} FROM (SELECT *, {EXIT_CODE} AS code FROM tasks t "
        f"WHERE {_which(FAILED, run)} AND completed_utc >= :since) "
        "GROUP BY failure_type, code, program ORDER BY 2 DESC, failure_type, program, code "
        f"LIMIT {MOST_NAMES}", {"since": since, "run": run})
    return tuple(Failures(text_of(kind), count, time_of(latest), text_of(task_id) or "",
                          text_of(message), text_of(program), code, text_of(name) or "")
                 for kind, count, latest, task_id, message, program, code, name in rows)


_TIMED = "t.duration_sec > -9e999 AND t.duration_sec < 9e999"  # neither infinite nor text
_DURATIONS = f"""
SELECT {brief("t.name")}, count(*), total(t.duration_sec), {{}}
FROM tasks t WHERE {_TIMED}{{}} GROUP BY t.name ORDER BY 2 DESC, t.name LIMIT {MOST_NAMES}"""


def durations(connection: sqlite3.Connection, since: str,
              run: str | None = None) -> tuple[Durations, ...]:
    """Return how long the tasks of each name ran. Reads all tasks since a time, or of a run;
    without these, an index."""
    found = []
    if since or run is not None:
        sql = _DURATIONS.format(
            f"percentiles(t.duration_sec), max(t.duration_sec), {brief('t.id')}",
            f" AND {_which(ENDED, run)} AND t.completed_utc >= :since")
        for name, count, total, shares, most, task_id in connection.execute(
                sql, {"since": since, "run": run}):
            p50, p95 = json.loads(shares)
            found.append(Durations(text_of(name) or "", count, p50, p95, most, total,
                                   text_of(task_id) or ""))
    else:
        rows = connection.execute(_DURATIONS.format("t.key", "")).fetchall()
        for name, count, total, key in rows:
            (p50, _), (p95, _), (most, task_id) = [
                _ranked(connection, key, count, percent) for percent in (50, 95, 100)]
            found.append(Durations(text_of(name) or "", count, p50, p95, most, total, task_id))
    return tuple(found)


class _Percentiles:
    """The SQL function ``percentiles``: a JSON list of what 50 and 95 % of some numbers are at
    most."""

    def __init__(self) -> None:
        numbers = array("d")
        self.step = numbers.append  # no call of Python's a row
        self._numbers = numbers

    def finalize(self) -> str:
        ordered = sorted(self._numbers)
        return json.dumps([ordered[_rank(len(ordered), percent)] for percent in (50, 95)])


def _ranked(connection: sqlite3.Connection, key: int, count: int,
            percent: int) -> tuple[float, str]:
    """Return what so many percent took at most, by steps along the index from the nearer end, and
    the id of a task that took this.

    Args:
        key: of a task of the name.
        count: how many have it.
    """
    rank = _rank(count, percent)
    order, steps = ("ASC", rank) if rank < count // 2 else ("DESC", count - 1 - rank)
    row = connection.execute(f"SELECT t.duration_sec, {brief('t.id')} FROM tasks t "
                             f"WHERE t.name = (SELECT name FROM tasks WHERE key = ?) AND {_TIMED} "
                             f"ORDER BY t.duration_sec {order} LIMIT 1 OFFSET ?",
                             (key, steps)).fetchone()
    if row is None:
        raise ValueError("an index lacks rows of tasks")
    return float(row[0]), text_of(row[1]) or ""


def _rank(count: int, percent: int) -> int:
    """Return the place of the nearest rank, from 0."""
    return -(-count * percent // 100) - 1


def losses(connection: sqlite3.Connection, since: str) -> tuple[Losses, ...]:
    """Return what was lost, by sink and reason."""
    rows = connection.execute(
        f"SELECT {brief('sink')}, {brief('reason')}, total(count), max(created_utc) FROM losses "
        "WHERE created_utc >= ? GROUP BY sink, reason ORDER BY 3 DESC, sink, reason LIMIT ?",
        (since, MOST_NAMES))
    return tuple(Losses(text_of(sink) or "", text_of(reason) or "", int(number_of(count) or 0),
                        time_of(latest) or EPOCH) for sink, reason, count, latest in rows)
