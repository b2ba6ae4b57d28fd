"""History files for tests, with exactly the rows that a test wants. Real ones, by a Scheduler, are made where they are tested."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from bgworker import schema
from bgworker.events import StreamType, TaskStatus
from bgworker.ids import new_id

RUN = new_id(1_764_000_000_000_000_000)


def text_of(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(timezone.utc).isoformat(timespec="microseconds")[:-6] + "Z"


class Recorder:
    """Writes rows through a connection of its own, each method in a transaction of its own."""

    def __init__(self, path: str | os.PathLike[str], now: datetime | None = None) -> None:
        self.path = str(path)
        self.now = now or datetime.now(timezone.utc)
        self.connection = schema.connect_to_write(self.path)

    def close(self) -> None:
        self.connection.close()

    def ago(self, **length: float) -> datetime:
        return self.now - timedelta(**length)

    def insert(self, table: str, **columns: Any) -> None:
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        self.connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(columns.values()))

    def run(self, run_id: str = RUN, *, host: str | None = None, ended: datetime | None = None) -> str:
        """A run that nobody judges, unless it has a host or an end."""
        self.insert("runs", run_id=run_id, host=host, pid=4711, started_utc=text_of(self.now), ended_utc=text_of(ended),
                    python="3.11.7", version="0.1.0")
        return run_id

    def task(self, name: str = "load", status: str = "completed", *, created: datetime | None = None, took: float | None = 1.5,
             id: str | None = None, run_id: str | None = None, metadata: Mapping[str, Any] | None = None, **columns: Any) -> str:
        """A task, created an hour ago unless told otherwise, that started at once; return its id."""
        created = created or self.ago(hours=1)
        id = id or new_id(int(created.timestamp() * 1e9))
        started = None if status in ("created", "scheduled") else created
        final = TaskStatus(status).is_final and status != "interrupted"
        ended = created + timedelta(seconds=took or 0.0) if final else None
        self.insert("tasks", **{
            "id": id, "run_id": run_id, "name": name, "status": status, "created_utc": text_of(created),
            "scheduled_utc": text_of(created), "started_utc": text_of(started), "completed_utc": text_of(ended),
            "duration_sec": took if final else None, "metadata_json": json.dumps(metadata) if metadata else None, "last_seq": 4,
            **columns})
        return id

    def said(self, task_id: str, payload: str, stream: str = "output", *, seq: int | None = None, percent: float | None = None,
             original_bytes: int | None = None, is_json: bool = False) -> int:
        """Something that a task said; return its number."""
        (key,) = self.connection.execute("SELECT key FROM tasks WHERE id = ?", (task_id,)).fetchone()
        if seq is None:
            (seq,) = self.connection.execute("SELECT coalesce(max(seq), 3) + 1 FROM stream_rows WHERE task = ?", (key,)).fetchone()
        assert seq is not None
        self.insert("stream_rows", task=key, seq=seq, stream=schema.STREAM_CODES[StreamType(stream)],
                    created_us=int(self.now.timestamp() * 1e6), payload=payload, percent=percent, original_bytes=original_bytes,
                    is_json=is_json or None)
        return seq

    def many_said(self, task_id: str, count: int) -> None:
        (key,) = self.connection.execute("SELECT key FROM tasks WHERE id = ?", (task_id,)).fetchone()
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany("INSERT INTO stream_rows (task, seq, stream, created_us, payload) VALUES (?, ?, 0, 0, ?)",
                                    [(key, seq, f"line {seq}") for seq in range(4, 4 + count)])
        self.connection.execute("COMMIT")

    def end(self, task_id: str, status: str = "completed") -> None:
        self.connection.execute("UPDATE tasks SET status = ?, completed_utc = ?, duration_sec = 1.0 WHERE id = ?",
                                (status, text_of(self.now), task_id))

    def lost(self, count: int, *, sink: str = "hook", reason: str = "overflow", at: datetime | None = None) -> None:
        self.insert("losses", sink=sink, reason=reason, count=count, by_type=json.dumps({"TaskOutput": count}),
                    created_utc=text_of(at or self.now))


def files_beside(path: str | os.PathLike[str]) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of the file and its log, without SQLite's index of that log, which readers share."""
    found = {}
    for name in (str(path), f"{path}-wal"):
        if os.path.exists(name):
            found[name] = (Path(name).read_bytes(), os.stat(name).st_mtime_ns)
    return found


def rows_of(path: str | os.PathLike[str], sql: str) -> list[tuple[Any, ...]]:
    """Return what the sqlite3 shell would print."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()
