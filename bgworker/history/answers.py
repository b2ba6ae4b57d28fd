"""What a history answers with: rows of its tables become the DTOs of `events`, or the small records
below.

Any program may have put any value anywhere in the file. This module alone reads values, each as the
type that it must have. A value of another type becomes a text that says so, or nothing; or its row
is left out, and counted.

Where SQL stands here, it names the columns in the order in which the function beside it reads them.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from ..model.events import (EventType, LifecycleEvent, LossEvent, StreamEvent, StreamType,
                            TaskSnapshot, TaskStatus)
from ..model.records import STATUSES as KIND_STATUSES
from ..model.records import STREAM_CODES, STREAMS, TYPES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal, Tuple

    Row = Tuple[Any, ...]


@dataclass(frozen=True)
class Run:
    """One Scheduler in one process, as far as the history knows it."""

    run_id: str
    host: str | None
    """The machine; None for a run that was copied here from another file."""
    pid: int | None
    started_utc: datetime | None
    ended_utc: datetime | None
    """When its record was closed; None while it lasts. If its process was killed, the last start or
    end of a task of it, as soon as somebody writes to the file again."""
    python: str | None
    version: str | None
    """Of bgworker."""
    is_alive: bool | None
    """Whether its process still records it; None where that cannot be told: another machine, or a
    copy."""


@dataclass(frozen=True)
class Failures:
    """The tasks that failed or timed out with an exception of one type; commands that ended with
    one code."""

    failure_type: str | None
    count: int
    latest_utc: datetime | None
    latest_task_id: str
    latest_message: str | None
    program: str | None = None
    """That these commands ran; None unless there is an exit code."""
    exit_code: int | None = None
    """Of these commands, below 0 the signal that ended them; None for what is no such command."""
    latest_name: str = ""
    """Of the latest task."""


@dataclass(frozen=True)
class Durations:
    """How long the tasks of one name ran, those that did not complete included."""

    name: str
    count: int
    p50: float
    """Seconds that half of them took at most (nearest rank)."""
    p95: float
    max: float
    total: float
    """Seconds that all of them took together."""
    slowest_task_id: str
    """Of the task that took longest."""


@dataclass(frozen=True)
class Attempts:
    """What became of the tasks of one source."""

    completed: int
    """How many of them completed."""
    left: tuple[str, ...]
    """Ids of those that ended otherwise, and that no other one ran again; the newest first."""


@dataclass(frozen=True)
class Losses:
    """What one sink lost for one reason."""

    sink: str
    reason: str
    count: int
    latest_utc: datetime


@dataclass(frozen=True)
class Stats:
    """What `History.stats` returns; the sequences have the most frequent first, at most 1,000.

    Texts are cut to their first 1,000 characters.
    """

    counts: Mapping[TaskStatus, int]
    """Tasks by status, without those of which there are none."""
    failures: tuple[Failures, ...]
    durations: tuple[Durations, ...]
    losses: tuple[Losses, ...]


# ---------------------------------------------------------------- times

def time_text(time: datetime) -> str:
    """Return a time as the tables spell it, which sorts."""
    return time.astimezone(timezone.utc).isoformat(timespec="microseconds")[:-6] + "Z"


if sys.version_info >= (3, 11):
    _parsed = datetime.fromisoformat
else:
    def _parsed(text: str) -> datetime:
        return datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)


def time_of(value: object) -> datetime | None:
    """Return the time that a table spells, in UTC; None for what spells none."""
    if not isinstance(value, str):
        return None
    try:
        time = _parsed(value)
        if time.tzinfo is timezone.utc:
            return time
        return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
"""Stands for a time that must be there, and is not."""


def _time_of_us(us: int) -> datetime:
    """Return the time that lies so many microseconds after the epoch; the epoch for too many."""
    try:
        return EPOCH + timedelta(microseconds=us)
    except OverflowError:
        return EPOCH


# ---------------------------------------------------------------- values

MOST_JSON = 2**20
"""Characters of the longest JSON text that is parsed: its objects take twenty times as much."""

_DEEPEST = 200  # a deeper value may be too deep for the encoder that it meets next
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)


def text_of(value: object) -> str | None:
    """Return a text, or what stands for a value that is none."""
    if value is None or isinstance(value, str):
        return value
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else f"<{value}>"


def number_of(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def whole_of(value: object) -> int:
    """Return a whole number from 0 on, 0 for anything else."""
    return value if isinstance(value, int) and value > 0 else 0


def object_of(value: object) -> dict[str, Any]:
    """Return the JSON object of a text, or one that says what stands there."""
    if not value:
        return {}
    found = _json_of(value)
    return found if isinstance(found, dict) else {"damaged": (text_of(value) or "")[:200]}


def _json_of(value: object) -> Any:
    """Return the JSON value of a text; `ValueError` where there is none, or too much of it."""
    if not isinstance(value, str) or len(value) > MOST_JSON:
        return ValueError
    if value.count("[") + value.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        return ValueError
    try:
        return _DECODER.decode(value)
    except ValueError:
        return ValueError


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        depth += 1 if found[1] else -1 if found[2] else 0
        deepest = max(deepest, depth)
    return deepest


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


# ---------------------------------------------------------------- tasks

OPEN = (TaskStatus.CREATED, TaskStatus.SCHEDULED, TaskStatus.RUNNING)
"""The statuses in the tables that may mean "interrupted"."""

STATUSES = {status.value: status for status in TaskStatus}

SEEN = f"""CASE WHEN t.status IN ({", ".join(repr(status.value) for status in OPEN)})
  AND (r.ended_utc IS NOT NULL OR is_dead(CAST(t.run_id AS BLOB)))
  THEN 'interrupted' ELSE t.status END"""
"""The status of a task ``t`` of a run ``r``: interrupted if it has not ended though its run has."""

TASK_COLUMNS = (
    "t.key", "t.id", SEEN, "t.run_id", "t.created_utc", "t.scheduled_utc", "t.started_utc",
    "t.completed_utc", "t.duration_sec", "t.timeout_sec", "t.last_progress_pct", "t.script_id",
    "t.script_hash", "t.last_seq", "t.name", "t.last_progress_msg", "t.failure_type",
    "t.failure_message", "s.text", "t.arg_json", "t.metadata_json", "t.invocation_info",
    "t.result_json")
"""What is read of a task ``t`` of a run ``r`` with a script ``s``, in the order in which
`Reading.task` takes it; a reader of another store spells some of it in its own way."""
_SHOWN = ("t.id", "t.run_id", "t.script_id", "t.script_hash", "t.name", "t.last_progress_msg",
          "t.failure_type", "t.failure_message")
_NOT_SHOWN = ("s.text", "t.arg_json", "t.metadata_json", "t.invocation_info", "t.result_json")

MOST_CHARACTERS = 1000
"""Characters of a text in a table, which shows fewer."""


def brief(column: str) -> str:
    """Return the SQL of a text that is cut to what a table needs."""
    return f"substr({column}, 1, {MOST_CHARACTERS})"


_FROM = ("\nFROM json_each(?) LEFT JOIN tasks t ON t.key = value "
         "LEFT JOIN scripts s ON s.hash = t.script_hash LEFT JOIN runs r ON r.run_id = t.run_id")
SELECT_TASKS = f"SELECT {', '.join(TASK_COLUMNS)}{_FROM}"
"""The tasks of a list of keys in its order; of one that is not there a row without a key."""
SELECT_BRIEF_TASKS = "SELECT " + ", ".join(
    brief(column) if column in _SHOWN else "NULL" if column in _NOT_SHOWN else column
    for column in TASK_COLUMNS) + _FROM
SELECT_EACH_VALUE = tuple(f"SELECT {column}{_FROM}" for column in TASK_COLUMNS)
"""What `SELECT_TASKS` reads, one by one: where some values are too long, the others can be had."""

TOO_LONG = "<too long to be read>"


LAST_SIGN = """max(coalesce(r.ended_utc, t.started_utc, t.created_utc), coalesce((
  SELECT strftime('%Y-%m-%dT%H:%M:%fZ', created_us / 1e6, 'unixepoch')
  FROM stream_rows WHERE task = t.key ORDER BY seq DESC LIMIT 1), ''))"""
"""When an interrupted task was last known to be alive: its start, what it said last, or the end of
its run."""


# ---------------------------------------------------------------- streams

STREAM_COLUMNS = "seq, stream, created_us, payload, percent, original_bytes, is_json"
SELECT_STREAMS = f"SELECT {STREAM_COLUMNS} FROM stream_rows "
SELECT_BARE_STREAMS = (f"SELECT seq, stream, created_us, '{TOO_LONG}', NULL, NULL, NULL "
                       "FROM stream_rows ")
"""For a row whose text is too long."""

_STREAMS = {STREAM_CODES[kind]: (TYPES[kind], stream) for kind, stream in STREAMS.items()}


def _stream_event_of(task_id: str, row: Row) -> StreamEvent | None:
    seq, code, created_us, payload, percent, original_bytes, is_json = row
    found = _STREAMS.get(code) if isinstance(code, int) else None
    if found is None or not isinstance(seq, int):
        return None
    type_, stream = found
    created = _time_of_us(created_us) if isinstance(created_us, int) else EPOCH
    text = text_of(payload) or ""
    if stream is StreamType.PROGRESS:
        return StreamEvent(type_, task_id, seq, created, stream,
                           percent=number_of(percent), message=text)
    format_: Literal["text", "json"] = "text"
    if is_json and _json_of(payload) is not ValueError:
        format_ = "json"
    return StreamEvent(type_, task_id, seq, created, stream, text, format_,
                       original_bytes is not None, whole_of(original_bytes))


# ---------------------------------------------------------------- losses and runs

SELECT_LOSSES = "SELECT rowid, created_utc, sink, count, reason, by_type FROM losses "
SELECT_RUNS = """SELECT run_id, host, pid, started_utc, ended_utc, python, version,
  CASE WHEN ended_utc IS NOT NULL OR is_dead(CAST(run_id AS BLOB)) THEN 0 WHEN host = ? THEN 1 END
FROM runs """
"""Judged on the machine of which the first parameter is the name."""


def loss_of(row: Row) -> LossEvent:
    """Return the event of a row of `SELECT_LOSSES`."""
    _, created, sink, count, reason, by_type = row
    counts = {name: each for name, each in object_of(by_type).items() if isinstance(each, int)}
    return LossEvent(EventType.EVENTS_LOST, time_of(created) or EPOCH, text_of(sink) or "",
                     whole_of(count), text_of(reason) or "", counts)


def run_of(row: Row) -> Run:
    """Return the run of a row of `SELECT_RUNS`."""
    run_id, host, pid, started, ended, python, version, is_alive = row
    return Run(text_of(run_id) or "", text_of(host), None if pid is None else whole_of(pid),
               time_of(started), time_of(ended), text_of(python), text_of(version),
               None if is_alive is None else bool(is_alive))


_LAST_TYPES = {
    **dict(zip(KIND_STATUSES, TYPES)),
    TaskStatus.INTERRUPTED: EventType.TASK_STARTED,  # the last that it told
}


def last_event_of(task: TaskSnapshot) -> LifecycleEvent:
    """Return the life-cycle event that a history keeps of a task: the last one."""
    time = task.completed_utc or task.started_utc or task.created_utc
    return LifecycleEvent(_LAST_TYPES[task.status], task.task_id, task.last_seq, time, task)


# ---------------------------------------------------------------- rows that may be left out

class Reading:
    """Makes tasks and events of rows, and counts the rows of which none can be made."""

    def __init__(self) -> None:
        self.left_out = 0

    def task(self, row: Row) -> TaskSnapshot | None:
        """Return the task of a row of `SELECT_TASKS`; None if it is not there, or has no id or no
        status."""
        (key, task_id, status, run_id, created, scheduled, started, completed, duration, timeout,
         percent, script_id, script_hash, last_seq, name, message, failure_type, failure_message,
         script_text, arguments, metadata, invocation_info, result) = row
        if not isinstance(task_id, str) or status not in STATUSES:
            self.left_out += key is not None
            return None
        return TaskSnapshot(
            task_id, text_of(name) or "", STATUSES[status], text_of(run_id) or "",
            time_of(created) or beginning_of(task_id), time_of(scheduled),
            time_of(started), time_of(completed), number_of(duration), number_of(timeout),
            number_of(percent), text_of(message), text_of(script_id), text_of(script_hash),
            text_of(script_text), text_of(arguments), text_of(failure_type),
            text_of(failure_message), text_of(invocation_info), text_of(result),
            object_of(metadata), whole_of(last_seq))

    def events(self, task_id: str, rows: Sequence[Row]) -> list[StreamEvent]:
        """Return the events of rows of `SELECT_STREAMS` that have a number and a stream."""
        found = [event for row in rows if (event := _stream_event_of(task_id, row)) is not None]
        self.left_out += len(rows) - len(found)
        return found


def beginning_of(task_id: str) -> datetime:
    """Return the time with which an id begins, or the epoch."""
    is_hex = re.fullmatch("[0-9a-f]{12}", task_id[:12])
    return _time_of_us(int(task_id[:12], 16) * 1000) if is_hex else EPOCH
