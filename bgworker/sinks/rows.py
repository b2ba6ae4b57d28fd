"""A batch of events as rows of a history file, and the few statements that put them there. Runs on the sink's thread.

Guarantees. Storing a batch again, or after later ones, changes nothing: stream rows are known by (task, seq), a task's row never
goes back to an earlier event, losses are known by all that they say.

Rows go in by hundreds and thousands per statement. SQLite's module gives up the GIL at every step of a statement; beside one
CPU-bound thread getting it back may take 5 ms, so that `executemany`, which steps once a row, falls to 2,000 rows/s where
4,096 rows a statement keep 250,000.
"""

from __future__ import annotations

import json
import platform
import sqlite3
from datetime import datetime, timedelta, timezone

from .. import __version__
from ..events import EventType, LifecycleEvent, LossEvent, StreamEvent
from ..ids import is_own_run
from ..records import COMPLETED, LOST, PROGRESS, SCHEDULED, STARTED, STATUSES, STREAMS, TYPES, Batch
from ..schema import STREAM_CODES, this_host
from ..text import json_text
from ..wire import ns_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from ..events import Event, TaskSnapshot
    from ..records import Record, Source, TaskState

CHUNKS = (4096, 512, 64, 8, 1)
"""Rows per statement. Few sizes, so that SQLite compiles few statements; a rest that nearly fills one is padded with its last
row, which changes nothing."""

_STREAM_COLUMNS = ("task", "seq", "stream", "created_us", "payload")
_WIDE_COLUMNS = (*_STREAM_COLUMNS, "percent", "original_bytes", "is_json")
_CONSTANT_COLUMNS = ("run_id", "name", "created_utc", "timeout_sec", "script_id", "script_hash", "arg_json", "metadata_json")
_VARYING_COLUMNS = ("status", "scheduled_utc", "started_utc", "completed_utc", "duration_sec", "failure_type",
                    "failure_message", "invocation_info", "last_seq")
_PROGRESS_COLUMNS = ("last_progress_pct", "last_progress_msg")
_TASK_COLUMNS = ("id", *_CONSTANT_COLUMNS, *_VARYING_COLUMNS, *_PROGRESS_COLUMNS)

_CODES = [STREAM_CODES.get(STREAMS.get(kind), -1) for kind in range(len(TYPES))]  # type: ignore[arg-type]
_STATUS_TEXTS = [status.value for status in STATUSES]
_KINDS = {type_: kind for kind, type_ in enumerate(TYPES)}
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


def _upsert(*columns: str) -> str:
    """What happens to a task that is there already. An index whose columns stand here is written to, hence the two forms."""
    assignments = [f"{column} = excluded.{column}" for column in columns]
    assignments += [f"{column} = CASE WHEN excluded.last_progress_msg IS NULL THEN tasks.{column} "
                    f"ELSE excluded.{column} END" for column in _PROGRESS_COLUMNS]
    return f" ON CONFLICT(id) DO UPDATE SET {', '.join(assignments)} WHERE excluded.last_seq >= tasks.last_seq"


class _ManyRows:
    """An INSERT of any number of rows, as few statements of few different lengths."""

    def __init__(self, verb: str, table: str, columns: Sequence[str], conflict: str = "") -> None:
        self._head = f"{verb} INTO {table} ({', '.join(columns)}) VALUES "
        self._row = f"({', '.join('?' * len(columns))})"
        self._tail = conflict
        self._width = len(columns)
        self._texts: dict[int, str] = {}

    def run(self, connection: sqlite3.Connection, values: list[Any], most_values: int) -> None:
        """Insert rows whose values stand one after the other in ``values``."""
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


_INSERT_STREAMS = _ManyRows("INSERT OR IGNORE", "stream_rows", _STREAM_COLUMNS)
_INSERT_WIDE_STREAMS = _ManyRows("INSERT OR IGNORE", "stream_rows", _WIDE_COLUMNS)
_INSERT_TASKS = _ManyRows("INSERT", "tasks", _TASK_COLUMNS, _upsert(*_VARYING_COLUMNS))
_COMPLETE_TASKS = _ManyRows("INSERT", "tasks", _TASK_COLUMNS, _upsert(*_CONSTANT_COLUMNS, *_VARYING_COLUMNS))
_INSERT_LOSSES = "INSERT OR IGNORE INTO losses (created_utc, sink, reason, count, by_type) VALUES (?, ?, ?, ?, ?)"
_INSERT_RUN = "INSERT OR IGNORE INTO runs (run_id) VALUES (?)"
_INSERT_OWN_RUN = """INSERT INTO runs (run_id, host, pid, started_utc, python, version) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT(run_id) DO UPDATE SET host = excluded.host, pid = excluded.pid, started_utc = excluded.started_utc, ended_utc = NULL,
python = excluded.python, version = excluded.version WHERE runs.ended_utc IS NOT NULL OR runs.host IS NULL"""
_INSERT_SCRIPT = """INSERT INTO scripts (hash, script_id, text) VALUES (?, ?, ?)
ON CONFLICT(hash) DO UPDATE SET text = excluded.text WHERE scripts.text IS NULL AND excluded.text IS NOT NULL"""
_FIND_KEYS = "SELECT json_group_object(id, key) FROM tasks WHERE id IN (SELECT value FROM json_each(?))"  # in one step
_IS_ANY_UNKNOWN = "SELECT EXISTS (SELECT 1 FROM tasks WHERE run_id IS NULL)"
_ADVANCE = """UPDATE tasks SET last_progress_pct = ?1, last_progress_msg = ?2,
last_seq = CASE last_seq WHEN 0 THEN 0 ELSE ?3 END WHERE id = ?4 AND last_seq <= ?3"""


class _Told:
    """Stands for the `TaskState` of a task of which only DTOs are known; of those the latest snapshot counts."""

    __slots__ = ("id", "snapshot", "created_ns")

    def __init__(self, id: str, created_ns: int) -> None:
        self.id = id
        self.snapshot: TaskSnapshot | None = None
        self.created_ns = created_ns  # of its first event here, for want of better


class Rows:
    """The rows of a batch: made by the constructor, put into a file by `store`, within the caller's transaction."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._streams: dict[Any, list[Record]] = {}
        """By task, a `TaskState` or a `_Told`, in the order of their numbers."""
        self._lifecycle: dict[Any, Record] = {}
        """The latest of each task."""
        self._progress: dict[Any, Record] = {}
        self._losses: list[tuple[Any, ...]] = []
        self._sort(events.records if isinstance(events, Batch) else _records_of(events))
        self._tasks: list[Any] = []
        """Values of task rows, one after the other."""
        self._told_progress: list[tuple[Any, ...]] = []
        self._scripts: dict[str, tuple[str | None, str | None]] = {}
        self.runs: set[str] = set()
        """Ids of the runs that the tasks belong to."""
        self._source: tuple[Source | None, str | None, str | None] = None, None, None
        for state in {**self._lifecycle, **self._progress}:
            self._add_task(state)

    def store(self, connection: sqlite3.Connection, most_values: int) -> None:
        """Put the rows into the file; within a transaction."""
        self._store_tasks(connection, most_values)
        if self._streams:
            self._store_streams(connection, self._keys(connection, most_values), most_values)
        if self._losses:
            connection.executemany(_INSERT_LOSSES, self._losses)

    # -- sorting a batch --

    def _sort(self, records: Iterable[Record]) -> None:
        streams, last, append = self._streams, None, None
        for record in records:
            state, _, kind, _, _ = record
            if kind < PROGRESS:
                self._lifecycle[state] = record
            elif kind == LOST:
                sink, reason, count, by_type = record[4]
                self._losses.append((ns_text(record[3]), sink, reason, count, json_text(dict(by_type))))
            else:
                if state is not last or append is None:
                    last, append = state, streams.setdefault(state, []).append
                append(record)
                if kind == PROGRESS:
                    self._progress[state] = record

    def _add_task(self, state: Any) -> None:
        lifecycle, progress = self._lifecycle.get(state), self._progress.get(state)
        if lifecycle is not None and lifecycle[2] >= COMPLETED:
            progress = None  # the snapshot at the end has it
        if isinstance(state, _Told):
            if lifecycle is not None and state.snapshot is not None:
                self._add_snapshot(state.snapshot, lifecycle, progress)
            elif progress is not None:
                self._told_progress.append((*progress[4], progress[1], state.id))
        elif lifecycle is not None:
            self._add_state(state, lifecycle[2], max(lifecycle[1], progress[1] if progress else 0), progress)
        elif progress is not None:
            self._add_state(state, STARTED, progress[1], progress)

    def _add_state(self, state: TaskState, kind: int, seq: int, progress: Record | None = None) -> None:
        """Add the row of a task as of its life-cycle event ``kind``."""
        created = ns_text(state.created_ns)
        if state.source is not self._source[0] or state.record_source:
            self._source = self._describe(state)
        _, script_id, script_hash = self._source
        percent, message = progress[4] if progress else (None, None)
        completed = failure_type = failure_message = invocation_info = None
        if kind >= COMPLETED:
            completed = ns_text(state.completed_ns) if state.completed_ns else None
            failure_type, failure_message, invocation_info = (state.failure_type, state.failure_message,
                                                              state.invocation_info)
            percent, message = state.recorded_percent, state.recorded_message
        if state.run_id:
            self.runs.add(state.run_id)
        self._tasks += (
            state.id, state.run_id or None, state.name, created, state.timeout, script_id, script_hash, state.arguments,
            state.metadata_json or None,
            _STATUS_TEXTS[kind], created if kind >= SCHEDULED else None,
            ns_text(state.started_ns) if kind >= STARTED and state.started_ns else None, completed,
            state.duration if kind >= COMPLETED else None, failure_type, failure_message, invocation_info, seq,
            percent, message)

    def _describe(self, state: TaskState) -> tuple[Source | None, str | None, str | None]:
        source = state.source
        if source is None:
            return None, None, None
        script_id, hash_ = source.script_id, source.script_hash
        self._add_script(hash_, script_id, source.script_text if state.record_source else None)
        return source, script_id, hash_

    def _add_script(self, hash_: str, script_id: str | None, text: str | None) -> None:
        if text is not None or hash_ not in self._scripts:
            self._scripts[hash_] = script_id, text

    def _add_snapshot(self, task: TaskSnapshot, lifecycle: Record, progress: Record | None) -> None:
        if task.run_id:
            self.runs.add(task.run_id)
        if task.script_hash:
            self._add_script(task.script_hash, task.script_id, task.script_text)
        completed = _time_text(task.completed_utc)
        if completed is None and lifecycle[2] >= COMPLETED:
            completed = ns_text(lifecycle[3])
        percent, message = task.last_progress_percent, task.last_progress_message
        if progress is not None:
            percent, message = progress[4]
        elif percent is not None and message is None:
            message = ""
        self._tasks += (
            task.task_id, task.run_id or None, task.name, _time_text(task.created_utc), task.timeout, task.script_id,
            task.script_hash or None, task.arguments, json_text(dict(task.metadata)) if task.metadata else None,
            task.status.value, _time_text(task.scheduled_utc), _time_text(task.started_utc), completed, task.duration,
            task.failure_type, task.failure_message, task.invocation_info,
            max(lifecycle[1], progress[1] if progress else 0), percent, message)

    # -- putting it into the file --

    def _store_tasks(self, connection: sqlite3.Connection, most_values: int) -> None:
        if self.runs:
            own = [run_id for run_id in self.runs if is_own_run(run_id)]
            if own:
                connection.executemany(_INSERT_OWN_RUN, map(_own_run, own))
            if len(own) < len(self.runs):
                connection.executemany(_INSERT_RUN, [(run_id,) for run_id in self.runs.difference(own)])
        if self._scripts:
            connection.executemany(_INSERT_SCRIPT, [(hash_, *rest) for hash_, rest in self._scripts.items()])
        if self._tasks:
            (is_any_unknown,) = connection.execute(_IS_ANY_UNKNOWN).fetchone()
            (_COMPLETE_TASKS if is_any_unknown else _INSERT_TASKS).run(connection, self._tasks, most_values)
        if self._told_progress:
            self._keys(connection, most_values)  # makes those that are not there yet
            connection.executemany(_ADVANCE, self._told_progress)

    def _keys(self, connection: sqlite3.Connection, most_values: int) -> dict[str, int]:
        """Return the keys of the tasks that said something; one that the file does not know gets a row first.

        Looked up each time: in this transaction nobody can remove a task between the look and the use.
        """
        wanted = json.dumps([state.id for state in self._streams])
        keys: dict[str, int] = json.loads(connection.execute(_FIND_KEYS, (wanted,)).fetchone()[0])
        if len(keys) < len(self._streams):
            missing = [state for state in self._streams if state.id not in keys]
            known = Rows([])
            for state in missing:
                if isinstance(state, _Told):
                    known._tasks += (state.id, None, "", ns_text(state.created_ns), *[None] * 5, "running", *[None] * 7, 0,
                                     None, None)
                else:
                    known._add_state(state, STARTED, 0)
            known._store_tasks(connection, most_values)
            keys = json.loads(connection.execute(_FIND_KEYS, (wanted,)).fetchone()[0])
        return keys

    def _store_streams(self, connection: sqlite3.Connection, keys: dict[str, int], most_values: int) -> None:
        """Insert in the order of the table, which else has to look for each row's place."""
        values: list[Any] = []
        wide: list[Any] = []
        codes = _CODES
        for key, records in sorted([(keys[state.id], records) for state, records in self._streams.items()],
                                   key=lambda each: each[0]):
            before = len(values)
            values += [value for _, seq, kind, ns, data in records if data.__class__ is str
                       for value in (key, seq, codes[kind], ns // 1000, data)]
            if len(values) - before < 5 * len(records):
                for record in records:
                    if record[4].__class__ is not str:
                        wide += (key, *_wide_row(record))
        _INSERT_STREAMS.run(connection, values, most_values)
        _INSERT_WIDE_STREAMS.run(connection, wide, most_values)


def _wide_row(record: Record) -> tuple[Any, ...]:
    _, seq, kind, ns, data = record
    if kind == PROGRESS:
        percent, message = data
        return seq, _CODES[kind], ns // 1000, message, percent, None, None
    payload, format_, is_truncated, original_bytes = data
    return (seq, _CODES[kind], ns // 1000, payload, None, original_bytes if is_truncated else None,
            1 if format_ == "json" else None)


def _own_run(run_id: str) -> tuple[Any, ...]:
    import os

    started = ns_text(int(run_id[:12], 16) * 1_000_000)  # an id begins with its time
    return run_id, this_host(), os.getpid(), started, platform.python_version(), __version__


def _records_of(events: Iterable[Event]) -> Iterator[Record]:
    """Return DTOs as the records that they could have been built from."""
    tasks: dict[str, _Told] = {}
    for event in events:
        ns = (event.created_utc - _EPOCH) // _MICROSECOND * 1000
        kind = _KINDS[EventType(event.type)]
        if isinstance(event, LossEvent):
            yield None, 0, LOST, ns, (event.sink, event.reason, event.count, event.by_type)
            continue
        task: Any = tasks.get(event.task_id)
        if task is None:
            task = tasks[event.task_id] = _Told(event.task_id, ns)
        yield task, event.seq, kind, ns, _data_of(event, task, kind)


def _data_of(event: LifecycleEvent | StreamEvent, task: _Told, kind: int) -> Any:
    if isinstance(event, LifecycleEvent):
        task.snapshot = event.task
        return None
    if kind == PROGRESS:
        return event.percent, event.message or event.payload
    if event.format == "text" and not event.truncated:
        return event.payload
    return event.payload, event.format, event.truncated, event.original_bytes


def _time_text(time: datetime | None) -> str | None:
    return None if time is None else ns_text((time - _EPOCH) // _MICROSECOND * 1000)
