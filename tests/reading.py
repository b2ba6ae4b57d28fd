"""Reads history files back into events, for tests of what writes them; by SQL alone, and so a
second opinion on `History`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Any

from bgworker.model.events import (
    Event,
    EventType,
    LifecycleEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)

ENDS = {
    TaskStatus.COMPLETED: EventType.TASK_COMPLETED,
    TaskStatus.FAILED: EventType.TASK_FAILED,
    TaskStatus.CANCELLED: EventType.TASK_CANCELLED,
    TaskStatus.TIMED_OUT: EventType.TASK_TIMED_OUT,
}
STREAMS = {StreamType.OUTPUT: EventType.TASK_OUTPUT, StreamType.ERROR: EventType.TASK_ERROR,
           StreamType.WARNING: EventType.TASK_WARNING, StreamType.VERBOSE: EventType.TASK_VERBOSE,
           StreamType.PROGRESS: EventType.TASK_PROGRESS}


def query(path: Any, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Ask a history as a stranger would, who knows nothing of its locks."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as connection:
        return connection.execute(sql, values).fetchall()


def value_of(path: Any, sql: str, *values: Any) -> Any:
    return query(path, sql, *values)[0][0]


def events_of(path: Any) -> list[Event]:
    """Return the events of a history in which none is missing: the gaps between a task's streams
    are its life cycle."""
    rows = {
        row["id"]: row
        for row in dicts(
            path, "SELECT tasks.*, text FROM tasks LEFT JOIN scripts ON hash = script_hash"
        )
    }
    streams: dict[str, dict[int, Event]] = {task_id: {} for task_id in rows}
    for row in dicts(path, "SELECT * FROM task_streams ORDER BY task_id, seq"):
        streams[row["task_id"]][row["seq"]] = stream_event(row)
    return [
        event
        for task_id, row in rows.items()
        for event in in_order(snapshot(row), streams[task_id])
    ]


def dicts(path: Any, sql: str) -> Iterator[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as connection:
        found = connection.execute(sql)
        names = [column[0] for column in found.description]
        yield from [dict(zip(names, row)) for row in found]


def in_order(task: TaskSnapshot, streams: dict[int, Event]) -> Iterator[Event]:
    types = [EventType.TASK_CREATED, EventType.TASK_SCHEDULED, EventType.TASK_STARTED]
    for seq in (
        range(1, max(task.last_seq, *streams, 0) + 1) if streams else range(1, task.last_seq + 1)
    ):
        if seq in streams:
            yield streams[seq]
        elif task.status in ENDS and seq == task.last_seq:
            yield LifecycleEvent(
                ENDS[task.status], task.task_id, seq, task.completed_utc or task.created_utc, task
            )
        else:
            assert types, f"task {task.task_id} lacks the row of event {seq}"
            yield LifecycleEvent(types.pop(0), task.task_id, seq, task.created_utc, task)


def stream_event(row: dict[str, Any]) -> StreamEvent:
    stream = StreamType(row["stream_type"])
    is_progress = stream is StreamType.PROGRESS
    return StreamEvent(
        STREAMS[stream],
        row["task_id"],
        row["seq"],
        time_of(row["created_utc"]),
        stream,
        "" if is_progress else row["payload"],
        row["format"],
        bool(row["truncated"]),
        row["original_bytes"] or 0,
        row["percent"],
        row["payload"] if is_progress else "",
    )


def snapshot(row: dict[str, Any]) -> TaskSnapshot:
    times = {name: row[name] and time_of(row[name])
             for name in ("created_utc", "scheduled_utc", "started_utc", "completed_utc")}
    return TaskSnapshot(
        task_id=row["id"],
        name=row["name"],
        status=TaskStatus(row["status"]),
        run_id=row["run_id"] or "",
        duration=row["duration_sec"],
        timeout=row["timeout_sec"],
        last_progress_percent=row["last_progress_pct"],
        last_progress_message=row["last_progress_msg"],
        script_id=row["script_id"],
        script_hash=row["script_hash"],
        script_text=row["text"],
        arguments=row["arg_json"],
        failure_type=row["failure_type"],
        failure_message=row["failure_message"],
        invocation_info=row["invocation_info"],
        result=row["result_json"],
        metadata=json.loads(row["metadata_json"] or "{}"),
        last_seq=row["last_seq"],
        **times,
    )


def time_of(text: str) -> datetime:
    assert len(text) == 27 and text.endswith("Z"), text
    seconds, _, micros = text[:-1].partition(".")
    return datetime.fromisoformat(seconds).replace(tzinfo=timezone.utc) + timedelta(
        microseconds=int(micros)
    )


def check_whole(path: Any) -> None:
    """The file is sound, and nothing in it refers to what is not there."""
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    assert query(path, "PRAGMA foreign_key_check") == []
