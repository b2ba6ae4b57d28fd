"""The statements that put rows into a history file, so made that each can be repeated without
changing anything.

Rows go in by hundreds and thousands per statement. Python's module gives up the GIL at every step
of a statement; beside one CPU-bound thread getting it back may take 5 ms, so that `executemany`,
which steps once a row, falls to 2,000 rows/s where 1,024 rows a statement keep 100,000.

And each value takes Python 0.1 us, and the GIL, NULL or not: the usual task is written with few of
them, and what all rows of one task share is bound once a statement.
"""

from __future__ import annotations

import sqlite3
import sys

from .taskrows import CONSTANT, NAMED, PROGRESS, RUN, RUN_COLUMNS, VARYING, WAITING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

GIVEN = "IN (SELECT value FROM json_each(?))"
"""The condition that a value is one of a JSON array."""

CHUNKS: tuple[int, ...] = tuple(1 << power for power in range(10, -1, -1))
"""Rows per statement. Of 8,192 twice as many go in per second beside a busy task, but keep the GIL
from it for 3 ms at a time, which slows it by a fifth rather than a twelfth. Few sizes, so that
SQLite compiles few statements; a rest that fills two thirds of one is padded with its last row,
which changes nothing."""
FEW = 128
"""Rows up to which they are padded to one statement: a second one may wait for the GIL."""


def most_values(connection: sqlite3.Connection) -> int:
    """Return how many parameters one statement may have."""
    if sys.version_info >= (3, 11):
        return min(32_766, connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER))
    return 32_766 if sqlite3.sqlite_version_info >= (3, 32) else 999


class ManyRows:
    """An INSERT of any number of rows, as few statements of few different lengths. Immutable but
    for the texts it has made.

    Args:
        head, tail: what stands before and after the rows.
        width: values of a row: ``column1``, ``column2`` ... in the head.
        shared: values of all rows together, parameters in the head.
    """

    def __init__(self, head: str, width: int, tail: str = "", shared: int = 0) -> None:
        self._head = head
        self._row = f"({', '.join('?' * width)})"
        self._tail = tail
        self._width = width
        self._shared = shared
        self._texts: dict[int, str] = {}

    def run(
        self,
        connection: sqlite3.Connection,
        values: list[Any],
        most_values: int,
        shared: Sequence[Any] = (),
    ) -> None:
        """Insert rows, whose values stand one after the other in ``values``, at most
        ``most_values`` a statement."""
        start, width = 0, self._width
        while (left := (len(values) - start) // width) > 0:
            size = self._size(left, most_values)
            part = values[start:start + size * width] if start or size < left else values
            if size > left:
                part = part + part[-width:] * (size - left)
            connection.execute(self._text(size), [*shared, *part] if shared else part)
            start += size * width

    def is_one_statement(self, values: list[Any], most_values: int) -> bool:
        """Tell whether `run` executes no more than one."""
        rows = len(values) // self._width
        return rows <= self._size(rows, most_values)

    def _size(self, left: int, most_values: int) -> int:
        padded = 2 * left - 1 if left <= FEW else left * 3 // 2
        most = min(padded, (most_values - self._shared) // self._width)
        return max(size for size in CHUNKS if size <= most)

    def _text(self, size: int) -> str:
        text = self._texts.get(size)
        if text is None:
            text = self._texts[size] = (
                f"{self._head}VALUES {', '.join([self._row] * size)}{self._tail}"
            )
        return text


INSERT_STREAMS = ManyRows(
    "INSERT OR IGNORE INTO zz_stream_rows (task, seq, stream, created_us, payload) ", 5
)
INSERT_WIDE_STREAMS = ManyRows(
    "INSERT OR IGNORE INTO zz_stream_rows (task, seq, stream, created_us, payload, percent, "
    "original_bytes, is_json) ",
    8,
)
INSERT_SPEECH = ManyRows(
    "INSERT INTO zz_stream_rows (task, seq, stream, created_us, payload) SELECT "
    "(SELECT key FROM tasks JOIN runs USING (run_id) "
    "WHERE id = ? AND ended_utc IS NULL AND host IS NOT NULL), "
    "column1, ?, column2 / 1000, column3 FROM (SELECT * FROM (",
    3,
    ") LIMIT -1) WHERE true ON CONFLICT DO NOTHING",
    2,
)
"""Texts of one task on one stream: id and stream; number, nanoseconds and text of each. Fails if
the file does not know the task, or its run as one that lives: no look beforehand has to tell, and
one statement may be the whole transaction. The LIMIT keeps SQLite from compiling the SELECT once a
row (seen in 3.40: 160 ms for 8,192)."""


def _insert_tasks(
    constant: Sequence[str], varying: Sequence[str], progress: Sequence[str] = ()
) -> tuple[ManyRows, ManyRows]:
    """Return two statements for rows of tasks, which advance those that are there already.

    The first sets only the varying columns then: to set a column costs a write to its index,
    changed or not. The second completes placeholders as well. Progress stays as it is unless the
    new row tells of some.
    """
    columns = (*constant, *varying, *progress)
    advance = [f"{column} = excluded.{column}" for column in varying]
    advance += [_set_if("excluded.last_progress_msg IS NOT NULL", column) for column in progress]
    complete = [_set_if("tasks.run_id IS NULL", column) for column in constant if column != "id"]
    usual, completing = [
        ManyRows(
            f"INSERT INTO tasks ({', '.join(columns)}) ",
            len(columns),
            f" ON CONFLICT(id) DO UPDATE SET {', '.join(assignments)} "
            "WHERE excluded.last_seq >= tasks.last_seq",
        )
        for assignments in (advance, advance + complete)
    ]
    return usual, completing


def _set_if(condition: str, column: str) -> str:
    return f"{column} = CASE WHEN {condition} THEN excluded.{column} ELSE tasks.{column} END"


INSERT_WAITING_TASKS = _insert_tasks(NAMED, WAITING)
INSERT_USUAL_TASKS = _insert_tasks(NAMED, RUN)
INSERT_TASKS = _insert_tasks(CONSTANT, VARYING, PROGRESS)

INSERT_PLACEHOLDER = """INSERT OR IGNORE INTO tasks (id, name, status, created_utc, last_seq)
VALUES (?, '', 'running', ?, 0)"""
"""For a task that is not known yet, though something that it said is. Any snapshot completes it."""
IS_ANY = """SELECT EXISTS (SELECT 1 FROM tasks WHERE run_id IS NULL),
EXISTS (SELECT 1 FROM zz_requests)"""
"""Whether there is a placeholder, and a request to cancel a task: one step for both."""
DELETE_REQUESTS = """DELETE FROM zz_requests WHERE NOT EXISTS (SELECT 1 FROM tasks
WHERE id = task_id AND status IN ('created', 'scheduled', 'running'))"""
"""Those whose task has ended, was interrupted, or is gone: a request never outlives its task."""
ADVANCE_PROGRESS = """UPDATE tasks SET last_progress_pct = ?1, last_progress_msg = ?2,
last_seq = CASE last_seq WHEN 0 THEN 0 ELSE ?3 END WHERE id = ?4 AND last_seq <= ?3"""

INSERT_LOSS = """INSERT OR IGNORE INTO losses (created_utc, sink, reason, count, by_type)
VALUES (?, ?, ?, ?, ?)"""
INSERT_RUN = "INSERT OR IGNORE INTO runs (run_id) VALUES (?)"
INSERT_OWN_RUN = f"""INSERT INTO runs ({', '.join(RUN_COLUMNS)})
VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT(run_id) DO UPDATE SET host = excluded.host, pid = excluded.pid,
started_utc = excluded.started_utc, ended_utc = NULL, python = excluded.python,
version = excluded.version
WHERE runs.ended_utc IS NOT NULL OR runs.host IS NULL"""
INSERT_SCRIPT = """INSERT INTO scripts (hash, script_id, text) VALUES (?, ?, ?)
ON CONFLICT(hash) DO UPDATE SET text = excluded.text
WHERE scripts.text IS NULL AND excluded.text IS NOT NULL"""

FIND_KEYS = f"SELECT json_group_object(id, key) FROM tasks WHERE id {GIVEN}"
"""All of them in one row, and so in one step."""
