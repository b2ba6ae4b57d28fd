"""Claims: tasks that were left undone are run again, each by one process alone.

The claim of a task is the row of the new task that runs it again, whose ``rerun_of`` names it. That
row is put in by the process that will run the new task, before it does, in one transaction with the
look that no other row names the old one. From then on the sink writes on in that row. A process
that dies after its claim leaves a task that was interrupted, as any other: the next one claims that
one. Nothing of a claim must be cleared away.

Runs on the thread of the caller, which holds the file's lock for some milliseconds at a time.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import contextmanager

from ..model.enums import TaskStatus
from ..model.errors import HistoryError
from ..model.records import SCHEDULED
from ..sinks.opening import shown
from . import presence
from .answers import number_of, object_of, text_of
from .connections import Database
from .presencelock import PresenceLock
from .rows import store_tasks
from .schema import bounded, connect_to_write, damage_told, lock_path, transaction
from .statements import DELETE_REQUESTS, GIVEN, most_values
from .taskrows import TaskRows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from typing import Any

    from ..model.records import TaskState

MOST_CLAIMED = 200
"""Tasks that are claimed in one transaction: some milliseconds."""

_IS_FREE = "NOT EXISTS (SELECT 1 FROM tasks AS later WHERE later.rerun_of = tasks.id)"
_IS_LEFT = f"""status IN (SELECT value FROM json_each(:statuses)) AND {_IS_FREE}
AND id < x'' AND EXISTS (SELECT 1 FROM runs WHERE runs.run_id = tasks.run_id
  AND (ended_utc IS NOT NULL OR host IS NULL))"""
_LEFT = f"""SELECT key FROM tasks WHERE {_IS_LEFT} AND instr(metadata_json, :word)
ORDER BY key"""
_TASKS = f"""SELECT key, id, name, script_hash, arg_json, metadata_json, timeout_sec
FROM tasks WHERE key {GIVEN} AND id < x'' ORDER BY key"""
# a task may name any as the one that it runs again, itself included
_CHAINS = f"""WITH RECURSIVE chain(task, earlier, was_begun, length) AS (
  SELECT key, rerun_of, started_utc IS NOT NULL, 1 FROM tasks WHERE key {GIVEN}
  UNION ALL
  SELECT task, rerun_of, started_utc IS NOT NULL, length + 1
  FROM chain JOIN tasks ON id = earlier WHERE length < ?)
SELECT task, count(*), total(was_begun) FROM chain GROUP BY task"""
_STILL_LEFT = f"SELECT id FROM tasks WHERE id {GIVEN.replace('?', ':ids')} AND {_IS_LEFT}"
_GIVE_BACK = f"""DELETE FROM tasks WHERE id {GIVEN} AND status = '{TaskStatus.SCHEDULED.value}'
AND started_utc IS NULL"""
# not deleted: the sink has its end yet to write, or is about to, and would put in the claim anew;
# of a row that is there it leaves these columns as they are
_FREE = f"""UPDATE tasks SET rerun_of = NULL, status = '{TaskStatus.CANCELLED.value}',
  metadata_json = json_remove(metadata_json, '$.rerun_of') WHERE id {GIVEN}"""


class LeftTask:
    """A task that was left undone, as the file has it."""

    __slots__ = ("key", "task_id", "name", "script_hash", "arguments", "metadata", "timeout",
                 "begun", "made")

    def __init__(self, row: tuple[Any, ...], made: int, begun: int) -> None:
        self.key: int = row[0]
        self.task_id: str = row[1]
        self.name = text_of(row[2]) or ""
        self.script_hash = text_of(row[3])
        self.arguments: object = row[4]
        self.metadata: Mapping[str, Any] = object_of(row[5])
        self.timeout = number_of(row[6])
        self.made = made
        """It and the earlier ones of its chain, each of which the next one ran again ..."""
        self.begun = begun
        """... and those of them of which the file knows that they were begun."""


class Claims:
    """Looks for such tasks in one history, and claims them. One thread at a time; a context manager
    that closes the file at the end.

    Args:
        path: of the history.
        statuses: of the tasks that count as left undone.
        word: what stands in the metadata of those that are meant.

    Raises:
        HistoryError: from any method: the file is no history, or damaged, or cannot be written to.
    """

    def __init__(self, path: str, statuses: Collection[TaskStatus], word: str) -> None:
        self._path = path
        self._which = {"statuses": json.dumps([status.value for status in statuses]), "word": word}
        self._lock = PresenceLock.share(lock_path(path))
        self._database = Database(path, lambda: _connect(path))

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            with self._explained(), self._lock:
                self._database.close()  # it may run a checkpoint
        finally:
            self._lock.leave()

    def left(self) -> list[int]:
        """Return the keys of the tasks that are left undone, in the order of their creation: those
        of runs that are over, and that nobody has claimed. All tasks of these statuses are read."""
        with self._explained():
            with self._lock, self._database:
                pass  # opens it, which may lead an old file to the newest version
            presence.settle(self._database, self._lock)
            with self._database as connection, bounded(connection, self._path):
                return [key for key, in connection.execute(_LEFT, self._which)]

    def tasks(self, keys: Collection[int], longest: int) -> list[LeftTask]:
        """Return these tasks, those of them that are still there, in the order of their keys.

        Args:
            longest: tasks of a chain that are counted.
        """
        given = json.dumps(list(keys))
        with self._explained(), self._database as connection, bounded(connection, self._path):
            chains = {key: counts for key, *counts in
                      connection.execute(_CHAINS, (given, longest))}
            return [LeftTask(row, int(chains[row[0]][0]), int(chains[row[0]][1]))
                    for row in connection.execute(_TASKS, (given,)) if row[0] in chains]

    def claim(self, states: Mapping[str, TaskState]) -> set[str]:
        """Claim tasks in one transaction; return the ids of those that are ours now.

        Args:
            states: by the id of the task, the new one that runs it again. Its record is then in the
                file as its sink will write it first.
        """
        with self._explained(), self._lock, self._database as connection:
            with bounded(connection, self._path), transaction(connection):
                which = {**self._which, "ids": json.dumps(list(states))}
                ours = {task_id for task_id, in connection.execute(_STILL_LEFT, which)}
                rows = TaskRows()
                for task_id, state in states.items():
                    if task_id in ours:
                        rows.add((state, 2, SCHEDULED, state.created_ns, None))
                store_tasks(connection, rows, most_values(connection))
        return ours

    def give_back(self, states: Collection[TaskState]) -> None:
        """Undo claims whose tasks could not be queued after all. Nothing of them stays, but for
        one that was announced and then cancelled: the history has it, and it runs nothing again.

        Args:
            states: what is known of the new tasks now. One that has begun keeps its claim.
        """
        unbegun = [state for state in states if state.started_ns is None]
        with self._explained(), self._lock, self._database as connection:
            with transaction(connection):
                cancelled = json.dumps([state.id for state in unbegun if state.completed_ns])
                connection.execute(_FREE, (cancelled,))
                connection.execute(_GIVE_BACK, (json.dumps([state.id for state in unbegun]),))
                connection.execute(DELETE_REQUESTS)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with damage_told(self._path):
                yield
        except (sqlite3.Error, OSError) as error:
            raise HistoryError(
                f"cannot claim tasks of the history {shown(self._path)}: {error}; see whether this "
                "user may write to it, and its disk has room, or who keeps it locked") from error


def _connect(path: str) -> sqlite3.Connection:
    if not os.path.exists(path):
        raise HistoryError(f"there is no history at {shown(path)} any more")
    connection = connect_to_write(path)
    connection.execute("PRAGMA synchronous = NORMAL")  # as the sink: the process may die, not more
    return connection
