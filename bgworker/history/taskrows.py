"""Rows of tasks, and of the runs and scripts that these refer to, for any store. Runs on the sink's
thread.

A store that takes these rows keeps the guarantees of `batch` if it holds to three rules. A row
advances one that is there only if its ``last_seq`` is not less. It then sets the columns of
`VARYING`; those of `PROGRESS` if it tells of some; those of `CONSTANT` if the row that is there has
no run, and so is the placeholder of a task that nobody had told of. And a run whose end was noted
is open again once this process tells of it: another sink of the process was closed before.
"""

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
from .schema import exit_code_of, this_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime
    from typing import Any

    from ..model.events import TaskSnapshot
    from ..model.records import Record, Source, TaskState
    from ..model.told import Known

_STATUS_TEXTS = [status.value for status in STATUSES]

NAMED = ("id", "run_id", "name", "created_utc", "script_id", "script_hash")
WAITING = ("status", "scheduled_utc", "last_seq")
RUN = (*WAITING, "started_utc", "completed_utc", "duration_sec")
CONSTANT = (*NAMED, "arg_json", "metadata_json", "rerun_of")
VARYING = (*RUN, "failure_type", "failure_message", "invocation_info", "exit_code", "result_json",
           "timeout_sec")  # a command may get its limit when it runs
PROGRESS = ("last_progress_pct", "last_progress_msg")
COLUMNS = (*CONSTANT, *VARYING, *PROGRESS)
"""Of a task, all of them; times are texts."""
RUN_COLUMNS = ("run_id", "host", "pid", "started_utc", "python", "version")


class TaskRows:
    """Rows of tasks, and of the runs and scripts that these refer to.

    Those of tasks stand in three lists, value after value: ``waiting`` (`NAMED` and `WAITING`),
    ``usual`` (`NAMED` and `RUN`) and ``full`` (`COLUMNS`). A usual task is NULL in two thirds of
    its columns, and each value costs SQLite.
    """

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self.scripts: dict[str, tuple[str | None, str | None]] = {}
        """By hash, the script's id and its text."""
        self.waiting: list[Any] = []
        self.usual: list[Any] = []
        self.full: list[Any] = []
        self.placeholders: list[tuple[str, str]] = []
        """Id and time of tasks that say something though nobody has told of them."""
        self.progress: list[tuple[float | None, str, int, str]] = []
        """Percent, message, seq and id of tasks of which only this is told."""
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
            self.progress.append((*record[4][:2], record[1], state.id))
        else:
            self._add_state(state, record[1], STARTED, record)

    def add_unknown(self, state: Known) -> None:
        """Add the row of a task that the file does not know, though it says something."""
        if isinstance(state, Told):
            self.placeholders.append((state.id, ns_text(state.first_ns)))
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
            constant = (state.arguments, metadata or None,
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
            self.full += (
                *named,
                *constant,
                _STATUS_TEXTS[kind],
                scheduled,
                seq,
                started,
                completed,
                duration,
                *failure,
                state.timeout,
                *latest,
            )
        elif kind < STARTED:
            self.waiting += (*named, _STATUS_TEXTS[kind], scheduled, seq)
        else:
            self.usual += (
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
        if text is not None or hash_ not in self.scripts:
            self.scripts[hash_] = script_id, text

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
            task.arguments,
            json_text(dict(task.metadata)) if task.metadata else None,
            _rerun_of(task.metadata),
        )
        self.full += (
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
            task.timeout,
            percent,
            "" if message is None and percent is not None else message,
        )

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of all tasks, each with all of `COLUMNS`."""
        some, more = len(NAMED), len(CONSTANT)
        for values, width in ((self.waiting, some + len(WAITING)), (self.usual, some + len(RUN))):
            left = (None,) * (len(COLUMNS) - more - (width - some))
            for start in range(0, len(values), width):
                row = values[start:start + width]
                yield (*row[:some], *(None,) * (more - some), *row[some:], *left)
        for start in range(0, len(self.full), len(COLUMNS)):
            yield tuple(self.full[start:start + len(COLUMNS)])

    @property
    def own_runs(self) -> list[tuple[Any, ...]]:
        """Rows with `RUN_COLUMNS` of the runs of this process."""
        return [_own_run(run_id) for run_id in self.runs if is_own_run(run_id)]

    @property
    def other_runs(self) -> list[str]:
        """Ids of the runs that are only told of: nothing else is known of them."""
        return [run_id for run_id in self.runs if not is_own_run(run_id)]


def _own_run(run_id: str) -> tuple[Any, ...]:
    started = ns_text(int(run_id[:12], 16) * 1_000_000)  # an id begins with its time
    return run_id, this_host(), os.getpid(), started, platform.python_version(), __version__


def _rerun_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the id of the task that one with this metadata runs again."""
    found = metadata.get("rerun_of")
    return found if isinstance(found, str) else None


def _time_text(time: datetime | None) -> str | None:
    return None if time is None else ns_text(ns_of(time))
