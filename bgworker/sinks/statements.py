"""The statements that put rows into a history file, so made that each can be repeated without changing anything.

Rows go in by hundreds and thousands per statement. Python's module gives up the GIL at every step of a statement;
beside one CPU-bound thread getting it back may take 5 ms, so that `executemany`, which steps once a row, falls to
2,000 rows/s where
4,096 rows a statement keep 100,000 to 250,000. And each column of a row costs 0.3 us, NULL or not: the usual task is
written with few of them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from typing import Any

CHUNKS = (4096, 2048, 512, 64, 8, 1)
"""Rows per statement. Few sizes, so that SQLite compiles few statements; a rest that nearly fills one is padded with
its last row, which changes nothing."""


class ManyRows:
    """An INSERT of any number of rows, as few statements of few different lengths. Immutable but for the texts it has
    made."""

    def __init__(self, verb: str, table: str, columns: Sequence[str], conflict: str = "") -> None:
        self._head = f"{verb} INTO {table} ({', '.join(columns)}) VALUES "
        self._row = f"({', '.join('?' * len(columns))})"
        self._tail = conflict
        self._width = len(columns)
        self._texts: dict[int, str] = {}

    def run(self, connection: sqlite3.Connection, values: list[Any], most_values: int) -> None:
        """Insert rows, whose values stand one after the other in ``values``, at most ``most_values`` a statement."""
        start, width = 0, self._width
        sizes = [size for size in CHUNKS if size * width <= most_values]
        while (left := (len(values) - start) // width) > 0:
            size = next((size for size in sizes if size <= left * 4 // 3), 1)
            part = values[start:start + size * width] if start or size < left else values
            if size > left:
                part = part + part[-width:] * (size - left)
            connection.execute(self._text(size), part)
            start += size * width

    def _text(self, size: int) -> str:
        text = self._texts.get(size)
        if text is None:
            text = self._texts[size] = self._head + ", ".join([self._row] * size) + self._tail
        return text


_SPOKEN = ("task", "seq", "stream", "created_us", "payload")
INSERT_STREAMS = ManyRows("INSERT OR IGNORE", "stream_rows", _SPOKEN)
INSERT_WIDE_STREAMS = ManyRows("INSERT OR IGNORE", "stream_rows", (*_SPOKEN, "percent", "original_bytes", "is_json"))


def _insert_tasks(constant: Sequence[str], varying: Sequence[str], progress: Sequence[str] = ()) -> ManyRows:
    """Rows of tasks, which advance those that are there already.

    Only the varying columns are set then: to set a column costs a write to its index, changed or not. Progress stays
    as it is unless the new row tells of some.
    """
    advance = [f"{column} = excluded.{column}" for column in varying]
    advance += [f"{column} = CASE WHEN excluded.last_progress_msg IS NULL THEN tasks.{column} "
                f"ELSE excluded.{column} END" for column in progress]
    conflict = f" ON CONFLICT(id) DO UPDATE SET {', '.join(advance)} WHERE excluded.last_seq >= tasks.last_seq"
    return ManyRows("INSERT", "tasks", (*constant, *varying, *progress), conflict)


_NAMED = ("id", "run_id", "name", "created_utc", "script_id", "script_hash")
_WAITING = ("status", "scheduled_utc", "last_seq")
_RUN = (*_WAITING, "started_utc", "completed_utc", "duration_sec")

INSERT_WAITING_TASKS = _insert_tasks(_NAMED, _WAITING)
INSERT_USUAL_TASKS = _insert_tasks(_NAMED, _RUN)
INSERT_TASKS = _insert_tasks((*_NAMED, "timeout_sec", "arg_json", "metadata_json"),
                             (*_RUN, "failure_type", "failure_message", "invocation_info"),
                             ("last_progress_pct", "last_progress_msg"))

INSERT_PLACEHOLDER = """INSERT OR IGNORE INTO tasks (id, name, status, created_utc, last_seq)
VALUES (?, '', 'running', ?, 0)"""
"""For a task that is not known yet, though something that it said is. Any snapshot completes it."""
IS_ANY_PLACEHOLDER = "SELECT EXISTS (SELECT 1 FROM tasks WHERE run_id IS NULL)"
COMPLETE_PLACEHOLDER = """UPDATE tasks SET run_id = ?, name = ?, created_utc = ?, script_id = ?, script_hash = ?,
timeout_sec = ?, arg_json = ?, metadata_json = ? WHERE id = ? AND run_id IS NULL"""
ADVANCE_PROGRESS = """UPDATE tasks SET last_progress_pct = ?, last_progress_msg = ?,
last_seq = CASE last_seq WHEN 0 THEN 0 ELSE ? END WHERE id = ? AND last_seq <= ?"""

INSERT_LOSS = "INSERT OR IGNORE INTO losses (created_utc, sink, reason, count, by_type) VALUES (?, ?, ?, ?, ?)"
INSERT_RUN = "INSERT OR IGNORE INTO runs (run_id) VALUES (?)"
INSERT_OWN_RUN = """INSERT INTO runs (run_id, host, pid, started_utc, python, version) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT(run_id) DO UPDATE SET host = excluded.host, pid = excluded.pid, started_utc = excluded.started_utc,
ended_utc = NULL, python = excluded.python, version = excluded.version
WHERE runs.ended_utc IS NOT NULL OR runs.host IS NULL"""
INSERT_SCRIPT = """INSERT INTO scripts (hash, script_id, text) VALUES (?, ?, ?)
ON CONFLICT(hash) DO UPDATE SET text = excluded.text WHERE scripts.text IS NULL AND excluded.text IS NOT NULL"""

FIND_KEYS = "SELECT json_group_object(id, key) FROM tasks WHERE id IN (SELECT value FROM json_each(?))"
"""All of them in one row, and so in one step."""
