"""Rows of tasks, and of the runs and scripts that these refer to. Runs on the sink's thread, for `rows`."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timedelta, timezone

from .. import __version__
from ..ids import is_own_run
from ..records import COMPLETED, SCHEDULED, STARTED, STATUSES
from ..schema import this_host
from ..text import json_text
from ..wire import ns_text
from . import statements as sql

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Any, Union

    from ..events import TaskSnapshot
    from ..records import Record, Source, TaskState

    Known = Union[TaskState, "Told"]

_STATUS_TEXTS = [status.value for status in STATUSES]
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)

MOST_KIN = 8
"""Kinds of tasks in a batch that have statements of their own, each as dear as ten tasks; others go the common way."""

_OF_19_DIGITS = 10**18
"""Nanoseconds from 2001 to 2286; a clock that says something else goes the common way."""
_NEVER = "-" * 19


class Told:
    """Stands for the `TaskState` of a task of which only DTOs are known; of those the latest snapshot counts."""

    __slots__ = ("id", "snapshot", "first_ns")

    def __init__(self, id: str, first_ns: int) -> None:
        self.id = id
        self.snapshot: TaskSnapshot | None = None
        self.first_ns = first_ns  # of its first event here


class _Kin:
    """Usual tasks of one run, name and source."""

    __slots__ = ("run_id", "name", "source", "has_statement", "texts")

    def __init__(self, run_id: str | None, name: str, source: Source | None, has_statement: bool) -> None:
        self.run_id = run_id
        self.name = name
        self.source = source
        self.has_statement = has_statement
        self.texts: dict[int, list[str]] = {}
        """By kind, as `statements` wants them but for the quote at the end: digits and blanks, nothing to be escaped."""

    @property
    def script(self) -> tuple[str | None, str | None]:
        """Its id and hash."""
        return (None, None) if self.source is None else (self.source.script_id, self.source.script_hash)


def _text_of(state: TaskState, seq: int, kind: int) -> str | None:
    """Return what `statements` wants to know of a usual task, but for the quote at the end; None for another one.

    A duration is in whole nanoseconds, divided by 1e9: so it is again what SQLite makes of them.
    """
    task_id, created = state.id, state.created_ns
    if (state.timeout is not None or state.arguments is not None or state.metadata_json or created < _OF_19_DIGITS
            or len(task_id) != 32):
        return None
    if kind < STARTED:
        return f'"{task_id}{created}{_NEVER} {seq}'
    started = state.started_ns
    if started < _OF_19_DIGITS:
        return None
    if kind == STARTED:
        return f'"{task_id}{created}{started} {seq}'
    completed, duration = state.completed_ns, state.duration
    if (duration is None or completed < _OF_19_DIGITS or state.failure_message is not None
            or state.failure_type is not None or state.recorded_message is not None):
        return None
    return f'"{task_id}{created}{started}{completed}{int(duration * 1e9 + 0.5)} {seq}'


_NOBODY = _Kin(None, "", None, False)


class TaskRows:
    """Rows of tasks, and of the runs and scripts that these refer to."""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self._scripts: dict[str, tuple[str | None, str | None]] = {}
        self._kin: dict[tuple[str, str, Source | None], _Kin] = {}
        self._latest = _NOBODY
        self._second = 0
        """In which the times of `_Kin` probably lie, since the epoch."""
        self._full: list[Any] = []
        self._placeholders: list[tuple[str, str]] = []
        self._constants: list[tuple[Any, ...]] = []
        """What completes a placeholder, of the full rows; the others have it all."""
        self._progress: list[tuple[Any, ...]] = []

    def add(self, record: Record, progress: Record | None = None) -> None:
        """Add the row of a task as of a life-cycle event, and of progress that may have come after it."""
        state: Any = record[0]
        _, seq, kind, ns, _ = record
        if isinstance(state, Told):
            assert state.snapshot is not None
            self._add_snapshot(state.snapshot, seq, kind, ns, progress)
        else:
            self._add_state(state, seq, kind, progress)

    def add_progress(self, record: Record) -> None:
        """Add the row of a task of which only progress is told."""
        state: Any = record[0]
        if isinstance(state, Told):
            self._progress.append((*record[4], record[1], state.id, record[1]))
        else:
            self._add_state(state, record[1], STARTED, record)

    def add_unknown(self, state: Known) -> None:
        """Add the row of a task that the file does not know, though it says something."""
        if isinstance(state, Told):
            self._placeholders.append((state.id, ns_text(state.first_ns)))
        else:
            self._add_state(state, 0, STARTED)

    def _add_state(self, state: TaskState, seq: int, kind: int, progress: Record | None = None) -> None:
        source, name, run_id = state.source, state.name, state.run_id
        kin = self._latest
        if name is not kin.name or source is not kin.source or run_id is not kin.run_id:
            kin = self._latest = self._kin_of(run_id, name, source)
        if source is not None and state.record_source:
            self._add_script(source.script_hash, source.script_id, source.script_text)
        text = _text_of(state, seq, kind) if progress is None and kin.has_statement else None
        if text is None:
            self._add_full(state, seq, kind, progress)
            return
        texts = kin.texts.get(kind)
        if texts is None:
            texts = kin.texts[kind] = []
            self._second = self._second or state.created_ns // 1_000_000_000
        texts.append(text)

    def _kin_of(self, run_id: str, name: str, source: Source | None) -> _Kin:
        kin = self._kin.get((run_id, name, source))
        if kin is None:
            kin = self._kin[run_id, name, source] = _Kin(run_id, name, source, len(self._kin) < MOST_KIN)
            if run_id:
                self.runs.add(run_id)
            if source is not None:
                self._add_script(source.script_hash, source.script_id, None)
        return kin

    def _add_full(self, state: TaskState, seq: int, kind: int, progress: Record | None) -> None:
        source = state.source
        created = ns_text(state.created_ns)
        constant = (state.run_id or None, state.name, created, source.script_id if source else None,
                    source.script_hash if source else None, state.timeout, state.arguments, state.metadata_json or None)
        completed = duration = None
        failure: tuple[Any, ...] = None, None, None
        latest = progress[4] if progress is not None else (None, None)
        if kind >= COMPLETED:
            completed, duration = ns_text(state.completed_ns), state.duration
            failure = state.failure_type, state.failure_message, state.invocation_info
            latest = state.recorded_percent, state.recorded_message
        elif progress is not None:
            seq = max(seq, progress[1])
        self._constants.append((*constant, state.id))
        self._full += (state.id, *constant, _STATUS_TEXTS[kind], created if kind >= SCHEDULED else None, seq,
                       ns_text(state.started_ns) if kind >= STARTED and state.started_ns else None, completed, duration,
                       *failure, *latest)

    def _add_script(self, hash_: str, script_id: str | None, text: str | None) -> None:
        if text is not None or hash_ not in self._scripts:
            self._scripts[hash_] = script_id, text

    def _add_snapshot(self, task: TaskSnapshot, seq: int, kind: int, ns: int, progress: Record | None) -> None:
        if task.run_id:
            self.runs.add(task.run_id)
        if task.script_hash:
            self._add_script(task.script_hash, task.script_id, task.script_text)
        completed = _time_text(task.completed_utc)
        if completed is None and kind >= COMPLETED:
            completed = ns_text(ns)
        percent, message = task.last_progress_percent, task.last_progress_message
        if progress is not None and kind < COMPLETED:
            (percent, message), seq = progress[4], max(seq, progress[1])
        constant = (task.task_id, task.run_id or None, task.name, _time_text(task.created_utc), task.script_id,
                    task.script_hash or None, task.timeout, task.arguments,
                    json_text(dict(task.metadata)) if task.metadata else None)
        self._constants.append((*constant[1:], task.task_id))
        self._full += (*constant, task.status.value, _time_text(task.scheduled_utc), seq, _time_text(task.started_utc),
                       completed, task.duration, task.failure_type, task.failure_message, task.invocation_info,
                       percent, "" if message is None and percent is not None else message)

    def store(self, connection: sqlite3.Connection, most_values: int) -> None:
        """Put the rows into the file, but for the progress of tasks of which nothing else was told."""
        if self.runs:
            own = [run_id for run_id in self.runs if is_own_run(run_id)]
            connection.executemany(sql.INSERT_OWN_RUN, map(_own_run, own))
            if len(own) < len(self.runs):
                connection.executemany(sql.INSERT_RUN, [(run_id,) for run_id in self.runs.difference(own)])
        if self._scripts:
            connection.executemany(sql.INSERT_SCRIPT, [(hash_, *rest) for hash_, rest in self._scripts.items()])
        if self._kin or self._full:
            for kin in self._kin.values():
                self._store_kin(connection, kin)
            sql.INSERT_TASKS.run(connection, (), self._full, most_values)
            if connection.execute(sql.IS_ANY_PLACEHOLDER).fetchone()[0]:
                self._complete_placeholders(connection)
        if self._placeholders:
            connection.executemany(sql.INSERT_PLACEHOLDER, self._placeholders)

    def _store_kin(self, connection: sqlite3.Connection, kin: _Kin) -> None:
        script_id, script_hash = kin.script
        shared = {"run": kin.run_id or None, "name": kin.name, "script_id": script_id, "script_hash": script_hash,
                  "second": str(self._second), "second_text": ns_text(self._second * 1_000_000_000)[:20]}
        for kind, texts in kin.texts.items():
            connection.execute(sql.INSERT_OPEN_TASKS if kind <= STARTED else sql.INSERT_ENDED_TASKS,
                               {**shared, "status": _STATUS_TEXTS[kind], "texts": f"""[{'",'.join(texts)}"]"""})

    def _complete_placeholders(self, connection: sqlite3.Connection) -> None:
        for kin in self._kin.values():
            connection.executemany(sql.COMPLETE_PLACEHOLDER, [
                (kin.run_id or None, kin.name, ns_text(int(text[33:52])), *kin.script, None, None, None, text[1:33])
                for texts in kin.texts.values() for text in texts])
        connection.executemany(sql.COMPLETE_PLACEHOLDER, self._constants)

    def store_progress(self, connection: sqlite3.Connection) -> None:
        """Let tasks, which the file knows by now, advance to the progress that was told of them alone."""
        if self._progress:
            connection.executemany(sql.ADVANCE_PROGRESS, self._progress)


def _own_run(run_id: str) -> tuple[Any, ...]:
    started = ns_text(int(run_id[:12], 16) * 1_000_000)  # an id begins with its time
    return run_id, this_host(), os.getpid(), started, platform.python_version(), __version__


def ns_of(time: datetime) -> int:
    """Return a time as nanoseconds since the epoch."""
    return (time - _EPOCH) // _MICROSECOND * 1000


def _time_text(time: datetime | None) -> str | None:
    return None if time is None else ns_text(ns_of(time))
