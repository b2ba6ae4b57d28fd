"""Rows of tasks, and of the runs and scripts that these refer to. Runs on the sink's thread, for
`rows`."""

from __future__ import annotations

import json
import os
import platform

from .. import __version__
from ..model.ids import is_own_run
from ..model.records import COMPLETED, SCHEDULED, STARTED, STATUSES
from ..model.text import json_text
from ..model.told import Told, ns_of
from ..model.wire import ns_text
from . import statements as sql
from .schema import exit_code_of, this_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping
    from datetime import datetime
    from typing import Any

    from ..model.events import TaskSnapshot
    from ..model.records import Record, Source, TaskState
    from ..model.told import Known

_STATUS_TEXTS = [status.value for status in STATUSES]


class TaskRows:
    """Rows of tasks, and of the runs and scripts that these refer to. Values stand one after the
    other."""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self._scripts: dict[str, tuple[str | None, str | None]] = {}
        self._waiting: list[Any] = []
        self._usual: list[Any] = []
        self._full: list[Any] = []
        self._placeholders: list[tuple[str, str]] = []
        self._progress: list[tuple[Any, ...]] = []
        self._source: tuple[Source | None, str | None, str | None] = None, None, None
        self._is_command = False  # of the source

    def add(self, record: Record, progress: Record | None = None) -> None:
        """Add the row of a task as of a life-cycle event, and of progress that may have come after
        it."""
        state, seq, kind, ns, snapshot = record
        if snapshot is not None:
            self._add_snapshot(snapshot, seq, kind, ns, progress)
        else:
            self._add_state(state, seq, kind, progress)

    def add_progress(self, record: Record) -> None:
        """Add the row of a task whose only events in this batch are progress."""
        state = record[0]
        if isinstance(state, Told):
            self._progress.append((*record[4][:2], record[1], state.id, record[1]))
        else:
            self._add_state(state, record[1], STARTED, record)

    def add_unknown(self, state: Known) -> None:
        """Add the row of a task that the file does not know, though it says something."""
        if isinstance(state, Told):
            self._placeholders.append((state.id, ns_text(state.first_ns)))
        else:
            self._add_state(state, 0, STARTED)

    def _add_state(
        self, state: TaskState, seq: int, kind: int, progress: Record | None = None
    ) -> None:
        created = ns_text(state.created_ns)
        if state.source is not self._source[0] or state.record_source:
            self._describe(state)
        run_id = state.run_id or None
        if run_id is not None:
            self.runs.add(run_id)
        named = state.id, run_id, state.name, created, self._source[1], self._source[2]
        scheduled = created if kind >= SCHEDULED else None
        started = completed = duration = None
        if kind >= STARTED and state.started_ns is not None:
            started = ns_text(state.started_ns)
        if kind >= COMPLETED:
            completed = (
                started if state.completed_ns == state.started_ns else ns_text(state.completed_ns)
            )
            duration = state.duration
        if (
            state.timeout is not None
            or state.arguments is not None
            or state.metadata_json
            or progress is not None
            or kind == COMPLETED
            and self._is_command
            or kind >= COMPLETED
            and (
                state.failure_message is not None
                or state.result is not None
                or state.failure_type is not None
                or state.recorded_message is not None
            )
        ):
            metadata = state.metadata_json
            constant = (state.timeout, state.arguments, metadata or None,
                        _rerun_of(json.loads(metadata)) if '"rerun_of"' in metadata else None)
            failure: tuple[Any, ...] = None, None, None, None, None
            latest = progress[4][:2] if progress is not None else (None, None)
            if kind >= COMPLETED:
                failure = (
                    state.failure_type, state.failure_message, state.invocation_info,
                    exit_code_of(_STATUS_TEXTS[kind], named[4], state.failure_type,
                                 state.failure_message), state.result)
                latest = state.recorded_percent, state.recorded_message
            elif progress is not None:
                seq = max(seq, progress[1])
            self._full += (
                *named,
                *constant,
                _STATUS_TEXTS[kind],
                scheduled,
                seq,
                started,
                completed,
                duration,
                *failure,
                *latest,
            )
        elif kind < STARTED:
            self._waiting += (*named, _STATUS_TEXTS[kind], scheduled, seq)
        else:
            self._usual += (
                *named,
                _STATUS_TEXTS[kind],
                scheduled,
                seq,
                started,
                completed,
                duration,
            )

    def _describe(self, state: TaskState) -> None:
        source = state.source
        if source is None:
            self._source, self._is_command = (None, None, None), False
            return
        self._source = source, source.script_id, source.script_hash
        self._is_command = exit_code_of("completed", source.script_id, None, None) == 0
        self._add_script(source.script_hash, source.script_id, state.script_text)

    def _add_script(self, hash_: str, script_id: str | None, text: str | None) -> None:
        if text is not None or hash_ not in self._scripts:
            self._scripts[hash_] = script_id, text

    def _add_snapshot(
        self, task: TaskSnapshot, seq: int, kind: int, ns: int, progress: Record | None
    ) -> None:
        if task.run_id:
            self.runs.add(task.run_id)
        if task.script_hash:
            self._add_script(task.script_hash, task.script_id, task.script_text)
        completed = _time_text(task.completed_utc)
        if completed is None and kind >= COMPLETED:
            completed = ns_text(ns)
        percent, message = task.last_progress_percent, task.last_progress_message
        if progress is not None and kind < COMPLETED:
            (percent, message), seq = progress[4][:2], max(seq, progress[1])
        constant = (
            task.task_id,
            task.run_id or None,
            task.name,
            _time_text(task.created_utc),
            task.script_id,
            task.script_hash or None,
            task.timeout,
            task.arguments,
            json_text(dict(task.metadata)) if task.metadata else None,
            _rerun_of(task.metadata),
        )
        self._full += (
            *constant,
            task.status.value,
            _time_text(task.scheduled_utc),
            seq,
            _time_text(task.started_utc),
            completed,
            task.duration,
            task.failure_type,
            task.failure_message,
            task.invocation_info,
            exit_code_of(task.status.value, task.script_id, task.failure_type,
                         task.failure_message),
            task.result,
            percent,
            "" if message is None and percent is not None else message,
        )

    def store(self, connection: sqlite3.Connection, most_values: int) -> None:
        """Put the rows into the file, but for the progress of tasks of which nothing else was
        told."""
        if self.runs:
            own = [run_id for run_id in self.runs if is_own_run(run_id)]
            connection.executemany(sql.INSERT_OWN_RUN, map(_own_run, own))
            if len(own) < len(self.runs):
                connection.executemany(
                    sql.INSERT_RUN, [(run_id,) for run_id in self.runs.difference(own)]
                )
        if self._scripts:
            connection.executemany(
                sql.INSERT_SCRIPT, [(hash_, *rest) for hash_, rest in self._scripts.items()]
            )
        if self._waiting or self._usual or self._full:
            is_any, has_requests = connection.execute(sql.IS_ANY).fetchone()
            sql.INSERT_WAITING_TASKS[is_any].run(connection, self._waiting, most_values)
            sql.INSERT_USUAL_TASKS[is_any].run(connection, self._usual, most_values)
            sql.INSERT_TASKS[is_any].run(connection, self._full, most_values)
            if has_requests:
                connection.execute(sql.DELETE_REQUESTS)
        if self._placeholders:
            connection.executemany(sql.INSERT_PLACEHOLDER, self._placeholders)

    def store_progress(self, connection: sqlite3.Connection) -> None:
        """Advance tasks, which the file knows by now, to the progress that `add_progress` got."""
        if self._progress:
            connection.executemany(sql.ADVANCE_PROGRESS, self._progress)


def _own_run(run_id: str) -> tuple[Any, ...]:
    started = ns_text(int(run_id[:12], 16) * 1_000_000)  # an id begins with its time
    return run_id, this_host(), os.getpid(), started, platform.python_version(), __version__


def _rerun_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the id of the task that one with this metadata runs again."""
    found = metadata.get("rerun_of")
    return found if isinstance(found, str) else None


def _time_text(time: datetime | None) -> str | None:
    return None if time is None else ns_text(ns_of(time))
