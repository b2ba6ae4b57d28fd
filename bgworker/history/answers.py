"""What a history answers with: rows of its tables become the DTOs of `events`, or the small records below.

Pure functions; where SQL stands here, it names the columns in the order in which the function beside it reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone

from ..model.events import EventType, LossEvent, StreamEvent, StreamType, TaskSnapshot, TaskStatus
from ..model.records import utc
from .schema import STREAM_CODES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Any


@dataclass(frozen=True)
class Run:
    """One Scheduler in one process, as far as the history knows it."""

    run_id: str
    host: str | None
    """The machine; None for a run that was copied here from another file."""
    pid: int | None
    started_utc: datetime | None
    ended_utc: datetime | None
    """When its record was closed; None while it lasts, and for ever if its process was killed."""
    python: str | None
    version: str | None
    """Of bgworker."""
    is_alive: bool | None
    """Whether its process still records it; None where that cannot be told: another machine, or a copy."""


@dataclass(frozen=True)
class Failures:
    """The failed tasks whose exception was of one type."""

    failure_type: str | None
    count: int
    latest_utc: datetime | None
    latest_task_id: str
    latest_message: str | None


@dataclass(frozen=True)
class Durations:
    """How long the tasks of one name ran, those that did not complete included."""

    name: str
    count: int
    p50: float
    """Seconds that half of them took at most (nearest rank)."""
    p95: float
    max: float


@dataclass(frozen=True)
class Losses:
    """What one sink lost for one reason."""

    sink: str
    reason: str
    count: int
    latest_utc: datetime


@dataclass(frozen=True)
class Stats:
    """What `History.stats` returns; the sequences have the most frequent first."""

    counts: Mapping[TaskStatus, int]
    """Tasks by status, without those of which there are none."""
    failures: tuple[Failures, ...]
    durations: tuple[Durations, ...]
    losses: tuple[Losses, ...]


# ---------------------------------------------------------------- times

def time_text(time: datetime) -> str:
    """Return a time as the tables spell it, which sorts."""
    return time.astimezone(timezone.utc).isoformat(timespec="microseconds")[:-6] + "Z"


def time_of(text: str) -> datetime:
    """Return the time that a table spells."""
    return datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)


def _time(text: str | None) -> datetime | None:
    return None if text is None else time_of(text)


# ---------------------------------------------------------------- tasks

OPEN = (TaskStatus.CREATED, TaskStatus.SCHEDULED, TaskStatus.RUNNING)
"""The statuses in the tables that may mean "interrupted"."""

SELECT_TASKS = """\
SELECT t.id, t.name, t.status, t.run_id, t.created_utc, t.scheduled_utc, t.started_utc, t.completed_utc,
  t.duration_sec, t.timeout_sec, t.last_progress_pct, t.last_progress_msg, t.script_id, t.script_hash, s.text,
  t.arg_json, t.failure_type, t.failure_message, t.invocation_info, t.metadata_json, t.last_seq, r.ended_utc
FROM tasks t LEFT JOIN scripts s ON s.hash = t.script_hash LEFT JOIN runs r ON r.run_id = t.run_id
"""


def snapshot_of(row: tuple[Any, ...], dead: Collection[str]) -> TaskSnapshot:
    """Return the task of a row of `SELECT_TASKS`.

    Args:
        dead: runs of which nothing more will come, though their record was not closed.
    """
    (task_id, name, status, run_id, created, scheduled, started, completed, duration, timeout, percent, message,
     script_id, script_hash, script_text, arguments, failure_type, failure_message, invocation_info, metadata, last_seq,
     run_ended) = row
    return TaskSnapshot(
        task_id, name, judged(TaskStatus(status), run_id, run_ended, dead), run_id or "", time_of(created),
        _time(scheduled), _time(started), _time(completed), duration, timeout, percent, message, script_id, script_hash,
        script_text, arguments, failure_type, failure_message, invocation_info,
        json.loads(metadata) if metadata else {}, last_seq)


def judged(status: TaskStatus, run_id: str | None, run_ended: str | None, dead: Collection[str]) -> TaskStatus:
    """Return "interrupted" for a task that has not ended though its run has, else the status."""
    return TaskStatus.INTERRUPTED if status in OPEN and (run_ended is not None or run_id in dead) else status


LAST_SIGN = """max(coalesce(r.ended_utc, t.started_utc, t.created_utc), coalesce((
  SELECT strftime('%Y-%m-%dT%H:%M:%fZ', created_us / 1e6, 'unixepoch')
  FROM stream_rows WHERE task = t.key ORDER BY seq DESC LIMIT 1), ''))"""
"""When an interrupted task was last known to be alive: its start, what it said last, or the end of its run."""


# ---------------------------------------------------------------- streams

SELECT_STREAMS = "SELECT seq, stream, created_us, payload, percent, original_bytes, is_json FROM stream_rows "

_STREAMS = {code: stream for stream, code in STREAM_CODES.items()}
_TYPES = {StreamType.OUTPUT: EventType.TASK_OUTPUT, StreamType.ERROR: EventType.TASK_ERROR,
          StreamType.WARNING: EventType.TASK_WARNING, StreamType.VERBOSE: EventType.TASK_VERBOSE,
          StreamType.PROGRESS: EventType.TASK_PROGRESS}


def stream_event_of(task_id: str, row: tuple[Any, ...]) -> StreamEvent:
    """Return the event of a row of `SELECT_STREAMS`."""
    seq, code, created_us, payload, percent, original_bytes, is_json = row
    stream = _STREAMS[code]
    if stream is StreamType.PROGRESS:
        return StreamEvent(_TYPES[stream], task_id, seq, utc(created_us * 1000), stream, percent=percent,
                           message=payload)
    return StreamEvent(_TYPES[stream], task_id, seq, utc(created_us * 1000), stream, payload,
                       "json" if is_json else "text", original_bytes is not None, original_bytes or 0)


# ---------------------------------------------------------------- losses and runs

SELECT_LOSSES = "SELECT created_utc, sink, count, reason, by_type FROM losses "
SELECT_RUNS = "SELECT run_id, host, pid, started_utc, ended_utc, python, version FROM runs "


def loss_of(row: tuple[Any, ...]) -> LossEvent:
    """Return the event of a row of `SELECT_LOSSES`."""
    created, sink, count, reason, by_type = row
    return LossEvent(EventType.EVENTS_LOST, time_of(created), sink, count, reason, json.loads(by_type))


def run_of(row: tuple[Any, ...], host: str, dead: Collection[str]) -> Run:
    """Return the run of a row of `SELECT_RUNS`, judged on the machine ``host``."""
    run_id, where, pid, started, ended, python, version = row
    is_alive = False if ended is not None or run_id in dead else True if where == host else None
    return Run(run_id, where, pid, _time(started), _time(ended), python, version, is_alive)
