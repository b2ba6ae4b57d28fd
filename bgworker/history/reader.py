"""The read side of a history file: what tasks there were, what they said, how they ended.

A `History` never writes, never checkpoints, and never keeps the writer waiting: each question is one short read
transaction, and its answer is complete before it is given out. Any thread may ask; they take turns.

A task that has not ended though its process is gone shows as ``interrupted``. That is judged by a lock that the kernel
frees when a process dies, not by age, and only for processes of this machine: of a history that another machine writes,
or that was copied, only what is recorded is known.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from time import sleep

from ..model import checks
from ..model.errors import BgworkerError, HistoryError
from ..model.events import EventType, LifecycleEvent, TaskStatus
from ..sinks.lockfile import LockFile
from ..sinks.opening import absolute
from . import questions
from .answers import (SELECT_LOSSES, SELECT_RUNS, SELECT_STREAMS, SELECT_TASKS, Run, Stats, loss_of, run_of,
                      snapshot_of, stream_event_of, time_text)
from .connections import Database
from .retention import is_alive
from .schema import bounded, connect_to_read, damaged, lock_path, roll_back, this_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from datetime import datetime, timedelta
    from types import TracebackType
    from typing import Any, Tuple

    from ..model.events import Event, LossEvent, StreamEvent, StreamType, TaskSnapshot

    Version = Tuple[int, int]

_CHUNK = 1000  # rows that one read transaction gives to an iterator

_EVENT_TYPES = {TaskStatus.CREATED: EventType.TASK_CREATED, TaskStatus.SCHEDULED: EventType.TASK_SCHEDULED,
                TaskStatus.RUNNING: EventType.TASK_STARTED, TaskStatus.INTERRUPTED: EventType.TASK_STARTED,
                TaskStatus.COMPLETED: EventType.TASK_COMPLETED, TaskStatus.FAILED: EventType.TASK_FAILED,
                TaskStatus.CANCELLED: EventType.TASK_CANCELLED, TaskStatus.TIMED_OUT: EventType.TASK_TIMED_OUT}


class History:
    """A history file, opened for reading; a context manager.

    It may be asked while others write the file, in a directory that cannot be written to, and long after its writer is
    gone. A file that is deleted and made anew is noticed. Every method may be called from any thread, raises
    `HistoryError` when the file cannot be read (any more), and blocks no longer than its own question takes.

    Args:
        path: the file of a `SqliteSink`.

    Raises:
        HistoryError: the file is missing, damaged, of another program, or of a newer bgworker.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute(path)
        self._database = Database(self.path, self._connect)  # lent to one thread at a time, which guards all below
        self._lock_file = LockFile.share(lock_path(self.path))
        self._dead: set[str] = set()  # runs; what has died stays so
        self._opened = 0
        self._still: tuple[int, ...] | None = None  # what the file was, if it was taken for one that does not change
        self._is_closed = False
        self._host = this_host()
        try:
            with self._asking():
                pass
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; any later question raises `HistoryError`. Harmless if it is closed."""
        if not self._is_closed:
            self._is_closed = True
            self._database.close()
            self._lock_file.leave()

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"History({self.path!r})"

    # -- tasks --

    def tasks(self, *, status: TaskStatus | str | None = None, name: str | None = None,
              since: datetime | timedelta | None = None, limit: int | None = 50) -> list[TaskSnapshot]:
        """Return tasks, the newest first: the latest created, or of a final status the latest ended.

        Args:
            status: only tasks of this status.
            name: only tasks whose name matches this pattern, case and all: ``*``, ``?`` and ``[...]`` are wild.
            since: only tasks that have not ended or ended after this time (aware), or less than this long ago. Of an
                interrupted one the last sign of life counts.
            limit: most tasks that are returned; None is all.
        """
        wanted = None if status is None else checks.member("status", TaskStatus, status)
        after = None if since is None else questions.moment(since)
        checks.number("limit", limit, least=0, whole=True, optional=True)
        with self._asking() as connection:
            search = questions.Search(connection, self._dead, name, after, limit)
            return search.of_any_status() if wanted is None else search.of_status(wanted)

    def task(self, task: str) -> TaskSnapshot:
        """Return the task that is meant by an id, a name (its newest task), ``last``, or the beginning of an id.

        Raises:
            UnknownTask: there is none.
            AmbiguousTask: several ids begin so; the error names some of them.
        """
        with self._asking() as connection:
            key, _ = questions.find(connection, task)
            return snapshot_of(connection.execute(SELECT_TASKS + "WHERE t.key = ?", (key,)).fetchone(), self._dead)

    def id_length(self, task_ids: Collection[str], *, least: int = 8) -> int:
        """Return how many digits of these ids are needed to tell each of them from all others of the history."""
        needed = least
        with self._asking() as connection:
            for task_id in task_ids:
                for other in questions.neighbours(connection, task_id):
                    while needed < len(task_id) and other.startswith(task_id[:needed]):
                        needed += 1
        return needed

    # -- streams --

    def streams(self, task: str, *, since: int = 0, types: Collection[StreamType | str] | None = None,
                limit: int | None = None, newest: bool = False) -> list[StreamEvent]:
        """Return what a task said and its progress, in order. A million events take about a gigabyte: use ``limit``.

        Args:
            task: what `task` takes, with the same errors.
            since: only events with a greater ``seq``.
            types: only these streams.
            limit: most events that are returned; None is all.
            newest: the last ``limit`` events, not the first.
        """
        checks.number("since", since, whole=True)
        checks.number("limit", limit, least=0, whole=True, optional=True)
        which = questions.which_streams(types)
        with self._asking() as connection:
            key, task_id = questions.find(connection, task)
            rows = connection.execute(
                f"{SELECT_STREAMS}WHERE task = ? AND seq > ?{which} ORDER BY seq {'DESC' * newest} LIMIT ?",
                (key, since, questions.ALL if limit is None else limit)).fetchall()
        return self._stream_events(task_id, rows[::-1] if newest else rows)

    def follow(self, task: str, *, since: int = 0, types: Collection[StreamType | str] | None = None,
               interval: float = 0.1, wait: Callable[[float], object] = sleep) -> Iterator[StreamEvent]:
        """Yield what a task said and says, until it has ended or was interrupted, or is no longer in the history.

        Args:
            task: what `task` takes, with the same errors, which come when the first event is asked for.
            since: only events with a greater ``seq``.
            types: only these streams.
            interval: seconds between two looks at the file. One that finds nothing new costs microseconds.
            wait: called with the interval between two looks.
        """
        which = questions.which_streams(types)
        with self._asking() as connection:
            _, task_id = questions.find(connection, task)
        seen: Version | None = None
        while True:
            version = self.version()  # before we look: what is written meanwhile changes it once more
            with self._asking() as connection:
                key, is_over = questions.end_of(connection, task_id, self._dead)
                rows = [] if key is None or version == seen and not is_over else connection.execute(
                    f"{SELECT_STREAMS}WHERE task = ? AND seq > ?{which} ORDER BY seq LIMIT {_CHUNK}",
                    (key, since)).fetchall()
            yield from self._stream_events(task_id, rows)
            since = rows[-1][0] if rows else since
            if len(rows) == _CHUNK:
                continue
            if is_over:
                return
            seen = version
            wait(interval)

    def version(self) -> Version:
        """Return what is different, once somebody has written to the file, from what was returned before."""
        with self._connected() as connection:
            (changes,) = connection.execute("PRAGMA data_version").fetchone()
            return self._opened, changes

    def _stream_events(self, task_id: str, rows: list[Any]) -> list[StreamEvent]:
        with self._errors():
            return [stream_event_of(task_id, row) for row in rows]

    # -- all of it --

    def stats(self, *, since: datetime | timedelta | None = None) -> Stats:
        """Return counts by status, failures by type, durations by name (of the 1,000 most frequent), and losses.

        Args:
            since: as for `tasks`; losses that were noted after it.
        """
        after = "" if since is None else time_text(questions.moment(since))
        with self._asking() as connection:
            return Stats(questions.counts(connection, self._dead, after), questions.failures(connection, after),
                         questions.durations(connection, after), questions.losses(connection, after))

    def counts(self) -> dict[TaskStatus, int]:
        """Return how many tasks there are of each status, without those of which there are none."""
        with self._asking() as connection:
            return questions.counts(connection, self._dead, "")

    def completed(self, script_hashes: Iterable[str], metadata: Mapping[str, object]) -> dict[str, int]:
        """Return how often tasks of each of these sources completed that had all of this metadata."""
        with self._asking() as connection:
            return {each: questions.completed(connection, each, metadata) for each in script_hashes}

    def losses(self) -> list[LossEvent]:
        """Return what sinks of this file did not get, in the order of time."""
        with self._asking() as connection:
            return [loss_of(row) for row in connection.execute(SELECT_LOSSES + "ORDER BY created_utc, rowid")]

    def runs(self) -> list[Run]:
        """Return the Schedulers that wrote to this file, the newest first."""
        with self._asking() as connection:
            rows = connection.execute(SELECT_RUNS + "ORDER BY run_id DESC")
            return [run_of(row, self._host, self._dead) for row in rows]

    def events(self) -> Iterator[Event]:
        """Yield all that is recorded, as events from which a sink makes an equal history.

        A task's events come one after the other, its last life-cycle event after what it said; of the earlier ones no
        more is known than that one tells. An interrupted task comes as started, with the status "interrupted". Runs do
        not come: only their ids are part of an event. What is written meanwhile may be missing.
        """
        key: int | None = 0
        while key is not None:
            with self._asking() as connection:
                (key,) = connection.execute("SELECT min(key) FROM tasks WHERE key > ?", (key,)).fetchone()
                rows = connection.execute(SELECT_TASKS + "WHERE t.key = ?", (key,)).fetchall()
            with self._errors():
                tasks = [snapshot_of(row, self._dead) for row in rows]
            for task in tasks:
                yield from self._events_of(key, task)
        yield from self.losses()

    def _events_of(self, key: int | None, task: TaskSnapshot) -> Iterator[Event]:
        seq, more = 0, True
        while more:
            with self._asking() as connection:
                rows = connection.execute(f"{SELECT_STREAMS}WHERE task = ? AND seq > ? ORDER BY seq LIMIT {_CHUNK}",
                                          (key, seq)).fetchall()
            yield from self._stream_events(task.task_id, rows)
            seq, more = rows[-1][0] if rows else seq, len(rows) == _CHUNK
        yield LifecycleEvent(_EVENT_TYPES[task.status], task.task_id, task.last_seq,
                             task.completed_utc or task.started_utc or task.created_utc, task)

    # -- the file --

    @contextmanager
    def _asking(self) -> Iterator[sqlite3.Connection]:
        """Give one view of the file. Which runs are dead is found out before: all that they wrote is then in it."""
        dead = self._newly_dead()
        with self._connected() as connection:
            self._dead |= dead
            connection.execute("BEGIN")
            try:
                with bounded(connection, self.path):
                    yield connection
            finally:
                roll_back(connection)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._still is not None and self._still != _state(self.path):
            self._database.close()  # it does change after all
        with self._errors(), self._database.use() as connection:
            if self._is_closed:
                raise HistoryError(f"{self!r} is closed; open another")
            yield connection

    def _connect(self) -> sqlite3.Connection:
        if self._is_closed:
            raise HistoryError(f"{self!r} is closed; open another")
        state = _state(self.path)
        connection = connect_to_read(self.path)
        is_still = connection.execute("PRAGMA journal_mode").fetchone() != ("wal",)
        self._still = state if is_still else None
        self._opened += 1
        return connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise HistoryError(f"the history {self.path!r} cannot be read: {error}; try again, and if that does not "
                               "help, see whether this user may read the file, and its disk is well") from error
        except BgworkerError:
            raise
        except (sqlite3.DatabaseError, ValueError, LookupError, OverflowError,
                MemoryError) as error:
            raise damaged(self.path, error) from error

    def _newly_dead(self) -> set[str]:
        """Find out with the connection given back: who has the lock file may wait for a fork, and that for us."""
        with self._connected() as connection, bounded(connection, self.path):
            sql = "SELECT run_id FROM runs WHERE ended_utc IS NULL AND host = ?"
            runs = {run_id for run_id, in connection.execute(sql, (self._host,))} - self._dead
        return {run_id for run_id in runs if not is_alive(run_id, self._lock_file)}


def _state(path: str) -> tuple[int, ...]:
    """What tells a file, with its log, from what it was before somebody wrote to it."""
    found: list[int] = []
    for name in (path, os.path.realpath(path) + "-wal"):
        try:
            status = os.stat(name)
            found += (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        except FileNotFoundError:
            found.append(0)
    return tuple(found)
