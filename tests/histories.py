"""History files for tests, with exactly the rows that a test wants or by a real Scheduler; and the
command line."""

from __future__ import annotations

import concurrent.futures
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from bgworker import Scheduler, current_task
from bgworker.history import schema
from bgworker.model.events import TaskStatus
from bgworker.model.ids import new_id
from bgworker.model.records import STREAM_CODES, STREAMS
from bgworker.history.sink import SqliteSink
from tests.support import environment

RUN = new_id(1_764_000_000_000_000_000)


def text_of(time: datetime | None) -> str | None:
    return (
        None
        if time is None
        else time.astimezone(timezone.utc).isoformat(timespec="microseconds")[:-6] + "Z"
    )


class Recorder:
    """Writes rows through a connection of its own, each method in a transaction of its own."""

    def __init__(self, path: str | os.PathLike[str], now: datetime | None = None) -> None:
        self.path = str(path)
        self.now = now or datetime.now(timezone.utc)
        self.connection = schema.connect_to_write(self.path)
        # only a machine that loses its power could tell the difference
        self.connection.execute("PRAGMA synchronous = OFF")

    def close(self) -> None:
        self.connection.close()

    def ago(self, **length: float) -> datetime:
        return self.now - timedelta(**length)

    def insert(self, table: str, **columns: Any) -> None:
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        self.connection.execute(
            f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(columns.values())
        )

    def run(
        self, run_id: str = RUN, *, host: str | None = None, ended: datetime | None = None
    ) -> str:
        """A run that nobody judges, unless it has a host or an end."""
        self.insert(
            "runs",
            run_id=run_id,
            host=host,
            pid=4711,
            started_utc=text_of(self.now),
            ended_utc=text_of(ended),
            python="3.11.7",
            version="0.1.0",
        )
        return run_id

    def task(
        self,
        name: str = "load",
        status: str = "completed",
        *,
        created: datetime | None = None,
        took: float | None = 1.5,
        id: str | None = None,
        run_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> str:
        """A task, created an hour ago unless told otherwise, that started at once; return its
        id."""
        created = created or self.ago(hours=1)
        id = id or new_id(int(created.timestamp() * 1e9))
        started = None if status in ("created", "scheduled") else created
        final = TaskStatus(status).is_final and status != "interrupted"
        ended = created + timedelta(seconds=took or 0.0) if final else None
        self.insert(
            "tasks",
            **{
                "id": id,
                "run_id": run_id,
                "name": name,
                "status": status,
                "created_utc": text_of(created),
                "scheduled_utc": text_of(created),
                "started_utc": text_of(started),
                "completed_utc": text_of(ended),
                "duration_sec": took if final else None,
                "metadata_json": json.dumps(metadata) if metadata else None,
                "last_seq": 4,
                **columns,
            },
        )
        return id

    def said(self, task_id: str, payload: str, stream: str = "output", *, seq: int | None = None,
             percent: float | None = None,
             original_bytes: int | None = None, is_json: bool = False) -> int:
        """Something that a task said; return its number."""
        (key,) = self.connection.execute(
            "SELECT key FROM tasks WHERE id = ?", (task_id,)
        ).fetchone()
        if seq is None:
            (seq,) = self.connection.execute(
                "SELECT coalesce(max(seq), 3) + 1 FROM zz_stream_rows WHERE task = ?", (key,)
            ).fetchone()
        assert seq is not None
        self.insert(
            "zz_stream_rows",
            task=key,
            seq=seq,
            stream=next(STREAM_CODES[kind] for kind in STREAMS if STREAMS[kind] == stream),
            created_us=int(self.now.timestamp() * 1e6),
            payload=payload,
            percent=percent,
            original_bytes=original_bytes,
            is_json=is_json or None,
        )
        return seq

    def many_said(self, task_id: str, count: int) -> None:
        (key,) = self.connection.execute(
            "SELECT key FROM tasks WHERE id = ?", (task_id,)
        ).fetchone()
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(
            "INSERT INTO zz_stream_rows (task, seq, stream, created_us, payload) "
            "VALUES (?, ?, 0, 0, ?)",
            [(key, seq, f"line {seq}") for seq in range(4, 4 + count)],
        )
        self.connection.execute("COMMIT")

    def end(self, task_id: str, status: str = "completed") -> None:
        self.connection.execute(
            "UPDATE tasks SET status = ?, completed_utc = ?, duration_sec = 1.0 WHERE id = ?",
            (status, text_of(self.now), task_id),
        )

    def lost(
        self,
        count: int,
        *,
        sink: str = "hook",
        reason: str = "overflow",
        at: datetime | None = None,
    ) -> None:
        self.insert(
            "losses",
            sink=sink,
            reason=reason,
            count=count,
            by_type=json.dumps({"TaskOutput": count}),
            created_utc=text_of(at or self.now),
        )


_PRESENT = """
from bgworker.history import presence, schema
from bgworker.history.presencelock import PresenceLock
lock = PresenceLock.share(schema.lock_path({path!r}))
for run in {runs!r}:
    lock.hold(presence.byte_of(run))
"""


def kill_runs(path: str | os.PathLike[str], *runs: str) -> None:
    """Have a process record these runs, as far as its lock tells, and die."""
    code = _PRESENT.format(path=str(path), runs=runs) + "import os; os.kill(os.getpid(), 9)"
    died = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60)
    assert died.returncode == -9


def files_beside(path: str | os.PathLike[str]) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of the file and its log; SQLite's index of that log is
    shared by readers."""
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


# ---------------------------------------------------------------- a real one

def load(rows: int, *, fail: bool = False) -> int:
    """What the tasks of `make_nightly` do."""
    task = current_task()
    for row in range(1, rows + 1):
        task.progress(row, rows, f"row {row}")
        task.output(f"loaded row {row}")
    task.error("one row was odd")
    task.warning({"odd": [3, None]})
    if fail:
        raise ValueError(f"row {rows} is bad\nand so is the next")
    return rows


def make_nightly(path: str | os.PathLike[str]) -> dict[str, str]:
    """Record five tasks, one for each way to end and one of twenty lines, by a real Scheduler;
    return ids by name."""
    release = threading.Event()
    with Scheduler(1, sinks=[SqliteSink(path)], record_source=True, record_arguments=True,
                   record_result=True, progress_interval=0.0) as pool:
        slow = pool.options(name="slow", timeout=0.05).submit(lambda: current_task().sleep(60))
        tasks = [
            slow,
            pool.options(name="load users", metadata={"ticket": 7, "tags": ["a", "b"]}).submit(
                load, 5
            ),
            pool.options(name="load orders").submit(load, 2, fail=True),
        ]
        concurrent.futures.wait(tasks, timeout=30)
        blocker = pool.options(name="load items").submit(lambda: (load(20), release.wait(30)))
        queued = pool.options(name="cleanup").submit(len, "x")
        queued.cancel("not tonight")
        release.set()
        tasks += [blocker, queued]
        concurrent.futures.wait(tasks, timeout=30)
        assert pool.flush(30)
    return {task.name: task.id for task in tasks}


class Nightly:
    """A history of five tasks, made by `make_nightly`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.ids = make_nightly(path)
        """Task ids by name."""


def run_cli(
    *words: object, cwd: str | os.PathLike[str], **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "bgworker", *map(str, words)],
        cwd=cwd,
        env=environment(PYTHONWARNINGS="error", **how.pop("env", {})),
        encoding="utf-8",
        timeout=60,
        **{
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **how,
        },
    )
