"""A batch of events as rows of a history file. Runs on the sink's thread.

Guarantees. Storing a batch again, or after later ones, changes nothing: stream rows are known by
(task, seq), a task's row never goes back to an earlier event, losses are known by all that they
say.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import nullcontext
from operator import itemgetter

from ..model.ids import is_own_run
from ..model.records import LOST, PROGRESS, STREAM_CODES, STREAMS
from ..model.text import json_text
from ..model.told import Told, records_of
from ..model.wire import ns_text
from . import statements as sql
from .schema import transaction
from .taskrows import TaskRows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..model.events import Event
    from ..model.records import Record, TaskState
    from ..model.told import Known

_STATE, _KIND = itemgetter(0), itemgetter(2)
_SPEECH = frozenset(kind for kind in STREAMS if kind != PROGRESS)


class Rows:
    """The rows of a batch: made by the constructor, put into a file by `store`."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._records = records_of(events)
        self._tasks = TaskRows()
        self._streams: Sequence[Record] = ()
        self._speakers: list[Known] = []
        self._losses: list[tuple[Any, ...]] = []
        self._speech = _speech_of(self._records)
        if self._speech is None:
            self._sort()
        else:
            self._tasks.runs.add(self._speech[0].run_id)

    @property
    def runs(self) -> set[str]:
        """Ids of the runs that the tasks belong to."""
        return self._tasks.runs

    def store(self, connection: sqlite3.Connection, most_values: int) -> None:
        """Put the rows into the file, as one transaction, and with at most ``most_values``
        parameters a statement."""
        if self._speech is not None:
            if _store_speech(connection, *self._speech, most_values):
                return
            self._sort()
        with transaction(connection):
            self._tasks.store(connection, most_values)
            if self._streams:
                self._store_streams(connection, self._keys(connection, most_values), most_values)
            self._tasks.store_progress(connection)
            if self._losses:
                connection.executemany(sql.INSERT_LOSS, self._losses)

    def _sort(self) -> None:
        self._sort_by_kind(self._records)
        self._speakers = list(dict.fromkeys(map(_STATE, self._streams)))
        # A task that only talks shows that its run lives. Without this the run would count as over
        # once one of its sinks was closed.
        self._tasks.runs.update(state.run_id for state in self._speakers
                                if not isinstance(state, Told) and is_own_run(state.run_id))

    def _sort_by_kind(self, records: Sequence[Record]) -> None:
        kinds = set(map(_KIND, records))
        if _SPEECH.issuperset(kinds):
            # the usual batch of tasks that talk much, in a third of the time
            self._streams = records
            return
        if kinds.isdisjoint(STREAMS) and LOST not in kinds:  # and of those that do not
            for record in dict(zip(map(_STATE, records), records)).values():
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
        """Return the keys of the tasks that said something; one that the file does not know gets a
        row first.

        Looked up each time: in this transaction nobody can remove a task between the look and the
        use.
        """
        keys = self._find_keys(connection)
        if len(keys) < len(self._speakers):
            unknown = TaskRows()
            for state in self._speakers:
                if state not in keys:
                    unknown.add_unknown(state)
            unknown.store(connection, most_values)
            keys = self._find_keys(connection)
        return keys

    def _find_keys(self, connection: sqlite3.Connection) -> dict[Known, int]:
        wanted = json.dumps([state.id for state in self._speakers])
        found: dict[str, int] = json.loads(
            connection.execute(sql.FIND_KEYS, (wanted,)).fetchone()[0]
        )
        return {state: found[state.id] for state in self._speakers if state.id in found}

    def _store_streams(
        self, connection: sqlite3.Connection, keys: dict[Known, int], most_values: int
    ) -> None:
        """Insert in the order of the table: in any other SQLite looks for each row's place."""
        streams = self._streams
        if len(keys) > 1:
            streams = sorted(streams, key=lambda record: keys[record[0]])
        values: list[Any] = []
        wide: list[Any] = []
        extend, codes, last, key = values.extend, STREAM_CODES, None, 0
        for state, seq, kind, ns, data in streams:
            if state is not last:
                last, key = state, keys[state]
            if data.__class__ is str:
                extend((key, seq, codes[kind], ns // 1000, data))
            else:
                wide += (key, seq, codes[kind], ns // 1000, *_wide_values(kind, data))
        sql.INSERT_STREAMS.run(connection, values, most_values)
        sql.INSERT_WIDE_STREAMS.run(connection, wide, most_values)


def _speech_of(records: Sequence[Record]) -> tuple[TaskState, int, list[Any]] | None:
    """Return task, stream and values of a batch that one task of this process said on one stream,
    in plain text."""
    speaker, _, spoken, _, _ = records[0] if records else (None, 0, LOST, 0, None)
    if (
        spoken not in _SPEECH
        or speaker is None
        or isinstance(speaker, Told)
        or not is_own_run(speaker.run_id)
    ):
        return None
    if min(records[0][3], records[-1][3]) < 0:
        return None  # before 1970 SQLite does not round as we do
    values: list[Any] = []
    extend = values.extend
    for state, seq, kind, ns, data in records:
        if state is not speaker or kind != spoken or data.__class__ is not str:
            return None
        extend((seq, ns, data))
    return speaker, STREAM_CODES[spoken], values


def _store_speech(
    connection: sqlite3.Connection,
    speaker: TaskState,
    stream: int,
    values: list[Any],
    most_values: int,
) -> bool:
    """Store what one task said on one stream; False, and nothing is stored, if its run or it has to
    be stored first.

    Usually that is one statement, and so one transaction: beside a busy thread each statement may
    wait 5 ms for the GIL.
    """
    is_one = sql.INSERT_SPEECH.is_one_statement(values, most_values)
    try:
        with nullcontext() if is_one else transaction(connection):
            sql.INSERT_SPEECH.run(connection, values, most_values, (speaker.id, stream))
    except sqlite3.IntegrityError:
        return False
    return True


def _wide_values(kind: int, data: Any) -> tuple[str, float | None, int | None, int | None]:
    if kind == PROGRESS:
        return data[1], data[0], None, None
    payload, format_, is_truncated, original_bytes = data[:4]
    return payload, None, original_bytes if is_truncated else None, 1 if format_ == "json" else None
