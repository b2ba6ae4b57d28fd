"""A batch of events as rows of a history file. Runs on the sink's thread."""

from __future__ import annotations

import json
import sqlite3
from contextlib import nullcontext

from ..model.ids import is_own_run
from ..model.records import LOST, STREAM_CODES
from ..model.told import Told, records_of
from . import statements as sql
from .batch import SPEECH, SortedBatch, wide_values
from .schema import transaction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..model.events import Event
    from ..model.records import Record, TaskState
    from .taskrows import TaskRows


class Rows:
    """The rows of a batch: made by the constructor, put into a file by `store`."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._records = records_of(events)
        self._speech = _speech_of(self._records)
        self._batch: SortedBatch | None = None
        self.runs: set[str]
        """Ids of the runs that the tasks belong to."""
        if self._speech is None:
            self._batch = SortedBatch(self._records)
            self.runs = self._batch.tasks.runs
        else:
            self.runs = {self._speech[0].run_id}

    def store(self, connection: sqlite3.Connection, most_values: int) -> None:
        """Put the rows into the file, as one transaction, and with at most ``most_values``
        parameters a statement."""
        if self._speech is not None and _store_speech(connection, *self._speech, most_values):
            return
        batch = self._batch or SortedBatch(self._records)
        with transaction(connection):
            store_tasks(connection, batch.tasks, most_values)
            if batch.streams:
                _store_streams(connection, batch, most_values)
            if batch.tasks.progress:
                connection.executemany(sql.ADVANCE_PROGRESS, batch.tasks.progress)
            if batch.losses:
                connection.executemany(sql.INSERT_LOSS, batch.losses)


def store_tasks(connection: sqlite3.Connection, tasks: TaskRows, most_values: int) -> None:
    """Put in tasks and what they refer to, but for the progress of those that the file may not know
    yet."""
    if tasks.runs:
        connection.executemany(sql.INSERT_OWN_RUN, tasks.own_runs)
        connection.executemany(sql.INSERT_RUN, [(run_id,) for run_id in tasks.other_runs])
    if tasks.scripts:
        connection.executemany(
            sql.INSERT_SCRIPT, [(hash_, *rest) for hash_, rest in tasks.scripts.items()]
        )
    if tasks.waiting or tasks.usual or tasks.full:
        is_any, has_requests = connection.execute(sql.IS_ANY).fetchone()
        sql.INSERT_WAITING_TASKS[is_any].run(connection, tasks.waiting, most_values)
        sql.INSERT_USUAL_TASKS[is_any].run(connection, tasks.usual, most_values)
        sql.INSERT_TASKS[is_any].run(connection, tasks.full, most_values)
        if has_requests:
            connection.execute(sql.DELETE_REQUESTS)
    if tasks.placeholders:
        connection.executemany(sql.INSERT_PLACEHOLDER, tasks.placeholders)


def _keys(connection: sqlite3.Connection, batch: SortedBatch, most_values: int) -> dict[str, int]:
    """Return the keys, by id, of the tasks that said something; one that the file does not know
    gets a row first.

    Looked up each time: in this transaction nobody can remove a task between the look and the use.
    """
    wanted = json.dumps([state.id for state in batch.speakers])
    keys: dict[str, int] = json.loads(connection.execute(sql.FIND_KEYS, (wanted,)).fetchone()[0])
    if len(keys) < len(batch.speakers):
        store_tasks(connection, batch.unknown(keys), most_values)
        keys = json.loads(connection.execute(sql.FIND_KEYS, (wanted,)).fetchone()[0])
    return keys


def _store_streams(connection: sqlite3.Connection, batch: SortedBatch, most_values: int) -> None:
    """Insert in the order of the table: in any other SQLite looks for each row's place."""
    found = _keys(connection, batch, most_values)
    keys = {state: found[state.id] for state in batch.speakers}
    streams = batch.streams
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
            wide += (key, seq, codes[kind], ns // 1000, *wide_values(kind, data))
    sql.INSERT_STREAMS.run(connection, values, most_values)
    sql.INSERT_WIDE_STREAMS.run(connection, wide, most_values)


def _speech_of(records: Sequence[Record]) -> tuple[TaskState, int, list[Any]] | None:
    """Return task, stream and values of a batch that one task of this process said on one stream,
    in plain text."""
    speaker, _, spoken, _, _ = records[0] if records else (None, 0, LOST, 0, None)
    if (
        spoken not in SPEECH
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
