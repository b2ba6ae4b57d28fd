"""A batch of events as rows of a history file. Runs on the sink's thread.

Guarantees. Storing a batch again, or after later ones, changes nothing: stream rows are known by (task, seq), a task's
row never goes back to an earlier event, losses are known by all that they say.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from itertools import chain
from operator import itemgetter

from .. import __version__
from ..events import EventType, LifecycleEvent, LossEvent
from ..ids import is_own_run
from ..records import COMPLETED, LOST, PROGRESS, SCHEDULED, STARTED, STATUSES, STREAMS, TYPES, Batch
from ..schema import STREAM_CODES, this_host, transaction
from ..text import json_text
from ..wire import ns_text
from . import statements as sql

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any, Union

    from ..events import Event, StreamEvent, TaskSnapshot
    from ..records import Record, Source, TaskState

    Known = Union[TaskState, "Told"]

_CODES = [STREAM_CODES.get(STREAMS.get(kind), -1) for kind in range(len(TYPES))]  # type: ignore[arg-type]
_STATUS_TEXTS = [status.value for status in STATUSES]
_STATE, _KIND, _DATA = itemgetter(0), itemgetter(2), itemgetter(4)
_SAID = itemgetter(1, 3, 4)
_SPEECH = frozenset(kind for kind in STREAMS if kind != PROGRESS)
_KINDS = {type_: kind for kind, type_ in enumerate(TYPES)}
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


class Rows:
    """The rows of a batch: made by the constructor, put into a file by `store`."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._tasks = _TaskRows()
        self._streams: Sequence[Record] = ()
        self._losses: list[tuple[Any, ...]] = []
        records = events.records if isinstance(events, Batch) else list(_records_of(events))
        self._sort(records)
        self._speakers: list[Known] = list(dict.fromkeys(map(_STATE, self._streams)))
        # a task that only talks shows that its run lives, which else counts as over once a sink of it was closed
        living = [state for state in self._speakers if not isinstance(state, Told) and is_own_run(state.run_id)]
        self._tasks.runs.update([state.run_id for state in living])
        self._speech: tuple[str, int] | None = None
        """Id and stream, if all that there is was said by one task of this process on one stream, in plain text."""
        if len(living) == len(self._speakers) == 1 and self._streams is records:
            kind, *others = set(map(_KIND, records))
            if not others and set(map(type, map(_DATA, records))) == {str}:
                self._speech = living[0].id, _CODES[kind]

    @property
    def runs(self) -> set[str]:
        """Ids of the runs that the tasks belong to."""
        return self._tasks.runs

    def store(self, connection: sqlite3.Connection, most_values: int) -> None:
        """Put the rows into the file, as one transaction, and with at most ``most_values`` parameters a statement."""
        if self._speech is not None and self._store_speech(connection, *self._speech, most_values):
            return
        with transaction(connection):
            self._tasks.store(connection, most_values)
            if self._streams:
                self._store_streams(connection, self._keys(connection, most_values), most_values)
            self._tasks.store_progress(connection)
            if self._losses:
                connection.executemany(sql.INSERT_LOSS, self._losses)

    def _store_speech(self, connection: sqlite3.Connection, task_id: str, stream: int, most_values: int) -> bool:
        """Store what one task said on one stream; False, and nothing is stored, if its run or it has to be stored first.

        Usually that is one statement, and so one transaction: beside a busy thread each statement may wait 5 ms for the GIL.
        """
        values = list(chain.from_iterable(map(_SAID, self._streams)))
        is_one = sql.INSERT_SPEECH.is_one_statement(values, most_values)
        try:
            with nullcontext() if is_one else transaction(connection):
                sql.INSERT_SPEECH.run(connection, (task_id, stream), values, most_values)
        except sqlite3.IntegrityError:
            return False
        return True

    def _sort(self, records: Sequence[Record]) -> None:
        kinds = set(map(_KIND, records))
        if _SPEECH.issuperset(kinds):
            self._streams = records  # the usual batch of a task that talks much, in a third of the time
            return
        if kinds.isdisjoint(STREAMS) and LOST not in kinds:
            for state, record in dict(zip(map(_STATE, records), records)).items():  # the usual batch of tasks that do not
                self._tasks.add(record)
            return
        streams: list[Record] = []
        latest: dict[Any, Record] = {}
        progress: dict[Any, Record] = {}
        for record in records:
            state, _, kind, ns, data = record
            if kind < PROGRESS:
                latest[state] = record
            elif kind == LOST:
                sink, reason, count, by_type = data
                self._losses.append((ns_text(ns), sink, reason, count, json_text(dict(by_type))))
            else:
                streams.append(record)
                if kind == PROGRESS:
                    progress[state] = record
        self._streams = streams
        for state, record in latest.items():
            self._tasks.add(record, progress.pop(state, None) if progress else None)
        for record in progress.values():
            self._tasks.add_progress(record)

    def _keys(self, connection: sqlite3.Connection, most_values: int) -> dict[Known, int]:
        """Return the keys of the tasks that said something; one that the file does not know gets a row first.

        Looked up each time: in this transaction nobody can remove a task between the look and the use.
        """
        keys = self._find_keys(connection)
        if len(keys) < len(self._speakers):
            unknown = _TaskRows()
            for state in self._speakers:
                if state not in keys:
                    unknown.add_unknown(state)
            unknown.store(connection, most_values)
            keys = self._find_keys(connection)
        return keys

    def _find_keys(self, connection: sqlite3.Connection) -> dict[Known, int]:
        wanted = json.dumps([state.id for state in self._speakers])
        found: dict[str, int] = json.loads(connection.execute(sql.FIND_KEYS, (wanted,)).fetchone()[0])
        return {state: found[state.id] for state in self._speakers if state.id in found}

    def _store_streams(self, connection: sqlite3.Connection, keys: dict[Known, int], most_values: int) -> None:
        """Insert in the order of the table, which else has to look for each row's place."""
        streams = self._streams
        if len(keys) > 1:
            streams = sorted(streams, key=lambda record: keys[record[0]])  # type: ignore[index]
        values: list[Any] = []
        wide: list[Any] = []
        extend, codes, last, key = values.extend, _CODES, None, 0
        for state, seq, kind, ns, data in streams:
            if state is not last:
                last, key = state, keys[state]  # type: ignore[index]
            if data.__class__ is str:
                extend((key, seq, codes[kind], ns // 1000, data))
            else:
                wide += (key, seq, codes[kind], ns // 1000, *_wide_values(kind, data))
        sql.INSERT_STREAMS.run(connection, (), values, most_values)
        sql.INSERT_WIDE_STREAMS.run(connection, (), wide, most_values)


def _wide_values(kind: int, data: Any) -> tuple[str, float | None, int | None, int | None]:
    if kind == PROGRESS:
        percent, message = data
        return message, percent, None, None
    payload, format_, is_truncated, original_bytes = data
    return payload, None, original_bytes if is_truncated else None, 1 if format_ == "json" else None


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
    def shared(self) -> tuple[str | None, ...]:
        script = (None, None) if self.source is None else (self.source.script_id, self.source.script_hash)
        return self.run_id or None, self.name, *script


def _text_of(state: TaskState, seq: int, kind: int) -> str | None:
    """Return what `statements` wants to know of a usual task, but for the quote at the end; None for another one."""
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


class _TaskRows:
    """Rows of tasks, and of the runs and scripts that these refer to."""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self._scripts: dict[str, tuple[str | None, str | None]] = {}
        self._kin: dict[tuple[str, str, Source | None], _Kin] = {}
        self._latest = _NOBODY
        self._second = 0
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
            second = str(self._second), ns_text(self._second * 1_000_000_000)[:20]
            for kin in self._kin.values():
                for kind, texts in kin.texts.items():
                    statement = sql.INSERT_OPEN_TASKS if kind <= STARTED else sql.INSERT_ENDED_TASKS
                    array = '[' + '",'.join(texts) + '"]'
                    connection.execute(statement, (*kin.shared, _STATUS_TEXTS[kind], *second, array))
            sql.INSERT_TASKS.run(connection, (), self._full, most_values)
            if connection.execute(sql.IS_ANY_PLACEHOLDER).fetchone()[0]:
                self._complete_placeholders(connection)
        if self._placeholders:
            connection.executemany(sql.INSERT_PLACEHOLDER, self._placeholders)

    def _complete_placeholders(self, connection: sqlite3.Connection) -> None:
        for kin in self._kin.values():
            run_id, name, *script = kin.shared
            connection.executemany(sql.COMPLETE_PLACEHOLDER, [
                (run_id, name, ns_text(int(text[33:52])), *script, None, None, None, text[1:33])
                for texts in kin.texts.values() for text in texts])
        connection.executemany(sql.COMPLETE_PLACEHOLDER, self._constants)

    def store_progress(self, connection: sqlite3.Connection) -> None:
        """Let tasks, which the file knows by now, advance to the progress that was told of them alone."""
        if self._progress:
            connection.executemany(sql.ADVANCE_PROGRESS, self._progress)


def _own_run(run_id: str) -> tuple[Any, ...]:
    started = ns_text(int(run_id[:12], 16) * 1_000_000)  # an id begins with its time
    return run_id, this_host(), os.getpid(), started, platform.python_version(), __version__


def _records_of(events: Iterable[Event]) -> Iterator[Record]:
    """Return DTOs as the records that they could have been built from."""
    tasks: dict[str, Told] = {}
    for event in events:
        ns = (event.created_utc - _EPOCH) // _MICROSECOND * 1000
        kind = _KINDS[EventType(event.type)]
        if isinstance(event, LossEvent):
            yield None, 0, LOST, ns, (event.sink, event.reason, event.count, event.by_type)
            continue
        task: Any = tasks.get(event.task_id)
        if task is None:
            task = tasks[event.task_id] = Told(event.task_id, ns)
        yield task, event.seq, kind, ns, _data_of(event, task, kind)


def _data_of(event: LifecycleEvent | StreamEvent, task: Told, kind: int) -> Any:
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
