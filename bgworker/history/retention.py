"""How a history is kept within bounds: what goes, and how it goes without anybody having to wait
for it.

Tasks go whole, those that ended first going first, with their streams and requests, and with the
runs and scripts that no other task refers to. Only tasks that have ended go: in one of the final
statuses, or with a run whose process is dead. They go in transactions of a few milliseconds, so a
task with many stream rows goes in several, oldest rows first. The file then shrinks page by page.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from contextlib import nullcontext
from dataclasses import dataclass
from heapq import merge
from itertools import chain
from time import sleep, time_ns

from ..model.checks import number
from ..model.wire import ns_text
from .connections import Database
from .presence import dead_runs, settle
from .presencelock import PresenceLock
from .schema import (bounded, connect_to_read, connect_to_write, damage_told, lock_path,
                     transaction)
from .statements import DELETE_REQUESTS, GIVEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Any

MOST_TASKS = 200
"""Tasks that go in one transaction ..."""
MOST_ROWS = 2000
"""... and stream rows ..."""
MOST_CHARACTERS = 2**20
"""... and what those rows say, but for the last of them: 5 to 10 ms."""
MOST_PAGES = 256
"""Pages by which the file shrinks in one transaction."""

PAUSE = 0.002
"""Seconds that `prune` leaves the lock alone between two transactions: a waiting writer needs less
to wake up and take it."""

_FOREVER = "9"
_FINAL = ("completed", "failed", "cancelled", "timed_out")
# These have no time of their end; the time of their creation stands for it.
_UNENDED = ("created", "scheduled", "running", "interrupted")
MOST_LOOKED_AT = 1000
"""Tasks of each status without an end that one look of a sink takes in; the next look begins where
it ended."""
MOST_BY_HAND = 50_000
"""Those that `prune` takes in at a time, and that a trial looks at."""

_LOOK = [f"""SELECT * FROM (SELECT key, run_id, created_utc, status, id FROM tasks
WHERE status = '{status}' AND completed_utc IS NULL AND key > :start ORDER BY key LIMIT :most)"""
         for status in _UNENDED]
_ENDED = [
    f"""SELECT * FROM (SELECT completed_utc AS ended, key FROM tasks
WHERE status = '{status}' AND completed_utc < :before ORDER BY completed_utc LIMIT :most)"""
    for status in _FINAL
]
_CANDIDATES = f"SELECT ended, key FROM ({' UNION ALL '.join(_ENDED)}) ORDER BY ended LIMIT :most"
"""Ends and keys of the ``most`` tasks that ended first, before a time."""

_IS_STILL = "SELECT 1 FROM tasks WHERE key = ? AND id = ?"
_REFERENCES = f"SELECT DISTINCT run_id, script_hash FROM tasks WHERE key {GIVEN}"
_DELETE_TASKS = f"""DELETE FROM tasks WHERE key {GIVEN}
AND NOT EXISTS (SELECT 1 FROM zz_stream_rows WHERE task = tasks.key)"""
_DELETE_RUNS = f"""DELETE FROM runs WHERE run_id {GIVEN}
AND NOT EXISTS (SELECT 1 FROM tasks WHERE tasks.run_id = runs.run_id)"""
_DELETE_SCRIPTS = f"""DELETE FROM scripts WHERE hash {GIVEN}
AND NOT EXISTS (SELECT 1 FROM tasks WHERE tasks.script_hash = scripts.hash)"""


class Retention:
    """The bounds of one history, and what has been found out about it. One thread at a time.

    Args:
        max_age: seconds that a task stays after its end; None is for ever.
        max_tasks: most tasks, counting those that have not ended; None is no bound.
        max_bytes: most bytes of the file; None is no bound. The log beside it, some MiB, comes on
            top.
    """

    def __init__(
        self,
        max_age: float | None = None,
        max_tasks: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self._max_age = number("max_age", max_age, above=0, optional=True)
        self._max_tasks = number("max_tasks", max_tasks, least=0, whole=True, optional=True)
        self._max_bytes = number("max_bytes", max_bytes, least=1, whole=True, optional=True)
        # when tasks of dead runs were created, their keys and ids; sorted
        self._dead: list[tuple[str, int, Any]] = []
        self._look_from = 0
        self._surplus = 0
        self._before = ""
        self._is_too_large = False
        self.removed_tasks = 0
        self.removed_rows = 0

    @property
    def is_bounded(self) -> bool:
        """False when everything is kept for ever."""
        return not self._max_age is self._max_tasks is self._max_bytes is None

    def look(self, database: Database, lock: PresenceLock, most: int = MOST_LOOKED_AT) -> None:
        """Find out which tasks are too old or too many: some milliseconds of reading. The caller
        holds neither the lock nor the connection.

        Args:
            most: tasks of each status without an end that are looked at, from where the last look
                ended; -1 is all.
        """
        self._find_dead(database, lock, most)
        if self._max_age is not None:
            self._before = ns_text(time_ns() - int(self._max_age * 1e9))
        if self._max_tasks is not None:
            with database as connection:
                # a count(*) would be one step for SQLite, which Ctrl-C does not end
                (count,) = connection.execute("SELECT total(1) FROM tasks").fetchone()
            self._surplus = max(0, int(count) - self._max_tasks)

    @property
    def has_seen_all(self) -> bool:
        """False if the next look takes in further tasks without an end."""
        return not self._look_from

    def _find_dead(self, database: Database, lock: PresenceLock, most: int) -> None:
        with database as connection:
            looks = [
                connection.execute(look, {"start": self._look_from, "most": most}).fetchall()
                for look in _LOOK
            ]
        rows = list(chain.from_iterable(looks))
        dead = dead_runs(database, lock, {row[1] for row in rows if isinstance(row[1], str)})
        self._dead = sorted((created if isinstance(created, str) else "", key, id_)
                            for key, run_id, created, status, id_ in rows
                            if status == "interrupted" or run_id is None or run_id in dead)
        self._look_from = min((look[-1][0] for look in looks if len(look) == most), default=0)

    def step(self, connection: sqlite3.Connection) -> int:
        """Remove some of it, in one transaction; return how many tasks and rows went, 0 when there
        is no more to do.

        Takes 5 to 10 ms. The caller holds the lock.

        Raises:
            ValueError: the file is damaged: it lists tasks that cannot be removed.
        """
        with transaction(connection):
            keys = self._candidates(connection)
            if keys:
                return self._remove(connection, keys)
            if self._max_age is not None:
                connection.execute("DELETE FROM losses WHERE created_utc < ?", (self._before,))
        return self._shrink(connection)

    def _candidates(self, connection: sqlite3.Connection) -> list[int]:
        if self._max_bytes is not None:
            pages, free, page_size = _pages(connection)
            # from the bound down to a little below it, rather than a few pages with every batch
            mark = self._max_bytes * (0.95 if self._is_too_large else 1)
            self._is_too_large = (pages - free) * page_size > mark
        most = MOST_TASKS if self._is_too_large else min(self._surplus, MOST_TASKS)
        if most:
            return self._oldest(connection, _FOREVER, most)
        return (
            self._oldest(connection, self._before, MOST_TASKS) if self._max_age is not None else []
        )

    def totals(self, connection: sqlite3.Connection) -> tuple[int, int]:
        """Return how many tasks are too many or too old, as of the last `look`, and how many rows
        they have."""
        tasks = rows = 0
        ended = connection.execute(_CANDIDATES, {"before": _FOREVER, "most": -1})
        for end, key, *_ in merge(ended, self._dead):
            if tasks >= self._surplus and end >= self._before:
                break  # both are the first ones in this order
            (count,) = connection.execute(
                "SELECT total(1) FROM stream_rows WHERE task = ?", (key,)
            ).fetchone()
            tasks, rows = tasks + 1, rows + int(count)
        return tasks, rows

    def _oldest(self, connection: sqlite3.Connection, before: str, most: int) -> list[int]:
        found = connection.execute(_CANDIDATES, {"before": before, "most": most}).fetchall()
        enough = len(found) + most
        for each in self._dead[:bisect_left(self._dead, (before,))]:
            created, key, id_ = each
            # since the look somebody may have removed it, and its key may be another's
            if connection.execute(_IS_STILL, (key, id_)).fetchone():
                found.append((created, key))
                if len(found) == enough:
                    break
            else:
                self._dead.remove(each)
        return [key for _, key in sorted(found)[:most]]

    def _remove(self, connection: sqlite3.Connection, keys: list[int]) -> int:
        chosen = json.dumps(keys)
        rows = _delete_rows(connection, keys)
        references = connection.execute(_REFERENCES, (chosen,)).fetchall()
        tasks = connection.execute(_DELETE_TASKS, (chosen,)).rowcount
        left = {
            key
            for key, in connection.execute(f"SELECT key FROM tasks WHERE key {GIVEN}", (chosen,))
        }
        gone, were_dead = set(keys) - left, len(self._dead)
        self._dead = [each for each in self._dead if each[1] not in gone]
        if not rows and not tasks and were_dead == len(self._dead):
            raise ValueError(f"tasks such as that with key {keys[0]} cannot be removed")
        self._surplus = max(0, self._surplus - tasks)
        self.removed_tasks += tasks
        self.removed_rows += rows
        for statement, names in ((_DELETE_RUNS, {run for run, _ in references}),
                                 (_DELETE_SCRIPTS, {script for _, script in references})):
            connection.execute(
                statement, (json.dumps([name for name in names if isinstance(name, str)]),)
            )
        connection.execute(DELETE_REQUESTS)
        # others may have removed what the last look found; there may be more
        return rows + tasks or 1

    def _shrink(self, connection: sqlite3.Connection) -> int:
        """Give pages back that are free, up to a reserve that spares a growing file the work of
        growing again."""
        pages, free, page_size = _pages(connection)
        reserve = max(MOST_PAGES, pages // 8)
        if self._max_bytes is not None:
            reserve = min(reserve, max(0, self._max_bytes // page_size - (pages - free)))
        surplus = min(free - reserve, MOST_PAGES)
        return _give_back(connection, surplus) if surplus > 0 else 0


def _delete_rows(connection: sqlite3.Connection, keys: list[int]) -> int:
    """Delete stream rows of these tasks, one task after the other, as many as fit into one
    transaction."""
    rows = characters = gone = 0
    for key in keys:
        last = None
        found = connection.execute(
            "SELECT seq, length(payload) FROM zz_stream_rows WHERE task = ? ORDER BY seq", (key,)
        )
        while rows < MOST_ROWS and characters < MOST_CHARACTERS and (row := found.fetchone()):
            last, rows, characters = row[0], rows + 1, characters + row[1]
        found.close()  # an open cursor would stand on rows that are now deleted
        if last is None:
            continue
        gone += connection.execute(
            "DELETE FROM zz_stream_rows WHERE task = ? AND seq <= ?", (key, last)
        ).rowcount
    return gone


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed, or would remove."""

    tasks: int
    stream_rows: int
    bytes_before: int
    """Of the file, its log not counted."""
    bytes_after: int | None
    """None for a trial. Others who have the file open may shrink it further later."""


def prune(
    path: str, *, max_age: float | None = None, max_tasks: int | None = None, is_trial: bool = False
) -> Pruned:
    """Remove from the history at ``path`` what is too old or too much, and give its room back. Any
    thread.

    Others may write to the file meanwhile: like them it holds the lock for a transaction of a few
    milliseconds at a time, and between two leaves it to them.

    Args:
        max_age: seconds that tasks stay after their end; None is for ever.
        max_tasks: how many tasks stay, counting those that have not ended; None is all.
        is_trial: change nothing, and tell what would go.

    Raises:
        HistoryError: the file is not a history, or so damaged that tasks cannot be removed.
        sqlite3.Error, OSError: it cannot be written to; what went until then is gone.
    """
    retention, before = Retention(max_age, max_tasks), os.stat(path).st_size
    lock = PresenceLock.share(lock_path(path))
    database = Database(path, lambda: connect_to_read(path) if is_trial else connect_to_write(path))
    try:
        with damage_told(path):
            if is_trial:
                retention.look(database, lock, MOST_BY_HAND)
                with database as connection, bounded(connection, path):
                    tasks, rows = retention.totals(connection)
                return Pruned(tasks, rows, before, None)
            with lock, database:
                pass  # opens it, which may lead an old file to the newest version
            settle(database, lock)
            is_more = True
            while is_more:
                retention.look(database, lock, MOST_BY_HAND)
                while is_more:
                    with lock, database as connection, bounded(connection, path):
                        # At the end the reserve goes as well: a user who prunes wants the room.
                        is_more = retention.step(connection) > 0 or (
                            retention.has_seen_all and _give_back(connection, MOST_PAGES) > 0)
                    sleep(PAUSE)
                is_more = not retention.has_seen_all
    finally:
        with lock if not is_trial else nullcontext():
            database.close()
        lock.leave()
    return Pruned(retention.removed_tasks, retention.removed_rows, before, os.stat(path).st_size)


def _give_back(connection: sqlite3.Connection, pages: int) -> int:
    """Let the file shrink by some free pages; return by how many it did, 0 also where it cannot."""
    before, *_ = _pages(connection)
    # a step a page, the GIL not taken in between
    connection.executescript(f"PRAGMA incremental_vacuum({pages})")
    after, *_ = _pages(connection)
    return before - after


def _pages(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Return how many pages the file has, how many of them are free, and the bytes of one."""
    pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0]
                         for name in ("page_count", "freelist_count", "page_size"))
    return pages, free, size
