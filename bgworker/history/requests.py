"""Requests to cancel tasks of other processes, which the history file carries.

Whoever wants a task to be cancelled `ask`s for it: a row that only a task which has not ended can
get. The process that runs the task looks for such rows (`Listener`), and claims one before it acts;
what nobody has claimed can be withdrawn. To ask, to claim and to withdraw are one transaction each,
under the lock of all writers: a request is either acted on or withdrawn, never both. The row goes
in the transaction that records the end of its task, or that finds its process dead. As long as
somebody listens, a byte of the lock file says so.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from _thread import allocate_lock
from contextlib import closing, contextmanager
from time import time_ns

from ..model.errors import HistoryError
from ..model.failure import describe_failure
from ..model.latch import Latch
from ..model.reports import report
from ..model.threads import own_thread
from ..model.wire import ns_text
from ..sinks.opening import absolute, shown
from .answers import OPEN, SEEN, STATUSES, text_of
from .connections import Database
from .presence import byte_of, listening_byte_of
from .presencelock import PresenceLock
from .schema import (bounded, connect_to_read, connect_to_write, damage_told, lock_path,
                     transaction)
from .statements import GIVEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import Any, Protocol

    from ..model.events import TaskStatus

    class Cancellable(Protocol):
        """What a listener needs of a `Task`."""

        def cancel(self, reason: str) -> bool: ...

LOOK_INTERVAL = 0.5
"""Seconds between two looks for requests while tasks wait or run."""
LONGEST_INTERVAL = 30.0
"""Seconds between two looks at a file that cannot be read, after some attempts."""
PATIENCE = 2.0
"""Seconds that a look waits for a program that has locked the file for itself."""

MOST_REASON = 1000
"""Characters of a reason that are read."""
MOST_REQUESTS = 10_000
"""Requests that are claimed in one transaction."""

FIRST_VERSION = 3
"""Of the histories that carry requests."""

_ASK = f"""INSERT OR IGNORE INTO zz_requests (task_id, reason, created_utc)
SELECT id, ?, ? FROM tasks WHERE id {GIVEN}
AND status IN ({", ".join(repr(status.value) for status in OPEN)})"""
_WITHDRAW = f"DELETE FROM zz_requests WHERE seen_utc IS NULL AND task_id {GIVEN}"
# CROSS: the requests first, of which there mostly is none
_UNSEEN = f"""SELECT task_id, substr(reason, 1, {MOST_REASON})
FROM zz_requests CROSS JOIN tasks ON id = task_id
WHERE seen_utc IS NULL AND run_id = ? LIMIT {MOST_REQUESTS}"""
_CLAIM = f"UPDATE zz_requests SET seen_utc = ? WHERE task_id {GIVEN}"
_STATES = f"""SELECT t.id, {SEEN}, q.seen_utc IS NOT NULL
FROM json_each(?) JOIN tasks t ON t.id = value LEFT JOIN runs r ON r.run_id = t.run_id
LEFT JOIN zz_requests q ON q.task_id = t.id"""


# ---------------------------------------------------------------- those who ask

def ask(path: str, task_ids: Collection[str], reason: str) -> None:
    """Request that tasks be cancelled, those of them that have not ended. Who asked for one first,
    gave the reason.

    Raises:
        HistoryError: it is no history, or one that only an older bgworker writes to.
        sqlite3.Error, OSError: it cannot be written to.
    """
    with closing(connect_to_read(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < FIRST_VERSION:
        raise HistoryError(
            f"the history {shown(path)} has version {version}: whatever writes to it is an older "
            "bgworker, which cannot be asked; end its process, or use a newer bgworker there")
    with _written(path) as connection:
        connection.execute(_ASK, (reason, ns_text(time_ns()), json.dumps(list(task_ids))))


def withdraw(path: str, task_ids: Collection[str]) -> None:
    """Take back the requests for these tasks that their process has not claimed.

    Raises:
        HistoryError, sqlite3.Error, OSError: as `ask`.
    """
    with _written(path) as connection:
        connection.execute(_WITHDRAW, (json.dumps(list(task_ids)),))


def states(connection: sqlite3.Connection,
           task_ids: Collection[str]) -> dict[str, tuple[TaskStatus, bool]]:
    """Return of each of these tasks that is still there its status, and whether its process has
    claimed a request to cancel it."""
    return {task_id: (STATUSES[status], bool(is_claimed)) for task_id, status, is_claimed
            in connection.execute(_STATES, (json.dumps(list(task_ids)),)) if status in STATUSES}


def is_recorded_here(path: str, run_id: str) -> bool:
    """Tell whether a process of this machine, whatever its name is now, records a run. False where
    that cannot be found out."""
    return _is_held(path, byte_of(run_id))


def is_listened_for(path: str, run_id: str) -> bool:
    """Tell whether a process of this machine hears requests for the tasks of a run."""
    return _is_held(path, listening_byte_of(run_id))


def _is_held(path: str, offset: int | None) -> bool:
    lock = PresenceLock.share(lock_path(path))
    try:
        return offset is not None and lock.is_held(offset)
    except OSError:
        return False
    finally:
        lock.leave()


@contextmanager
def _written(path: str) -> Iterator[sqlite3.Connection]:
    """Write to the file in one transaction, under its lock, by a connection for this alone."""
    lock = PresenceLock.share(lock_path(path))
    database = Database(path, lambda: _connect_to_write(path))
    try:
        with lock:
            try:
                with damage_told(path), database as connection, transaction(connection):
                    yield connection
            finally:
                database.close()
    finally:
        lock.leave()


def _connect_to_write(path: str) -> sqlite3.Connection:
    if not os.path.exists(path):  # none is made just to ask
        raise HistoryError(f"there is no history at {shown(path)} any more")
    connection = connect_to_write(path)
    connection.execute("PRAGMA synchronous = NORMAL")  # as the sink; nobody waits for the disk
    return connection


# ---------------------------------------------------------------- the process that is asked

class Listener:
    """Cancels the tasks of one Scheduler that others ask it to.

    A thread of its own looks at the file twice a second while tasks wait or run: it asks whether
    anybody has written to it, and if so whether there is a request. While there is no task, the
    thread sleeps; it is started when the first task is queued. Trouble with the file is told on the
    log, once until it is over, and harms no task.

    The doorbell: the thread announces that it sleeps, and then asks whether there is a task; the
    pool queues a task, and then looks at the announcement. In between each takes the pool's lock.
    So at least one sees the other's first step.

    Args:
        path: the history.
        name: of the Scheduler; the thread is named after it.
        run_id: of the Scheduler.
        find: returns the task with an id; None for one that has ended. Any thread.
        is_busy: tells whether a task waits or runs. Any thread.

    Raises:
        HistoryError: there is no history at that path, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], name: str, run_id: str,
                 find: Callable[[str], Cancellable | None], is_busy: Callable[[], Any]) -> None:
        self.path = absolute(path)
        try:  # what is wrong with it is said now
            connect_to_read(self.path).close()
        except sqlite3.OperationalError as error:
            raise HistoryError(f"the history {shown(self.path)} cannot be read: {error}; see "
                               "whether this user may read it") from error
        self._name = name
        self._find = find
        self._is_busy = is_busy
        self._database = Database(self.path, self._connect)
        self._changes: int | None = None  # as of the last look through this connection
        self.start_afresh(run_id)

    def start_afresh(self, run_id: str) -> None:
        """Listen for the tasks of this run; also in a forked child, where the thread is not."""
        self._run_id = run_id
        self._held: int | None = None  # the byte that says that somebody listens
        self._interval = LOOK_INTERVAL
        self._has_trouble = False
        self._guard = threading.Lock()  # guards the start of the thread
        self._thread: threading.Thread | None = None
        self._bell = allocate_lock()
        self._bell.acquire()
        self._ended = Latch()
        self.is_asleep = True
        """True while a task that is queued has to `wake` it. Also True before the first."""

    def wake(self) -> None:
        """Look from now on. Any thread; blocks for no more than the start of a thread."""
        self.is_asleep = False
        if self._thread is None:
            self._start()
        self._ring()

    def stop(self) -> None:
        """End the thread. Any thread; returns at once, and may be called again."""
        self._ended.set()
        self._ring()

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # rung already: one ring is enough

    def _start(self) -> None:
        with self._guard:
            if self._thread is not None:
                return
            thread = own_thread(f"{self._name}-requests", self._run)
            try:
                self._thread = thread
                thread.start()
            except BaseException as error:
                # also after an interrupt: a thread that starts after all finds this, and ends
                self._thread = None
                self.is_asleep = True
                if not isinstance(error, (RuntimeError, MemoryError)):
                    raise
                self._tell(f"no thread can be started ({error})")

    # -- the thread --

    def _run(self) -> None:
        with self._guard:  # not before `_start` has made up its mind
            if self._thread is not threading.current_thread():
                return
        lock = PresenceLock.share(lock_path(self.path))
        try:
            self._safely(lambda: self._show(lock))
            while True:
                self.is_asleep = True
                if not self._is_busy():
                    self._bell.acquire()
                self.is_asleep = False
                # before the look: most tasks have ended until then, and nobody asks for them
                if self._ended.wait(self._interval):
                    return
                self._safely(lambda: self._look(lock))
        finally:
            self._database.close()
            self._safely(lambda: self._leave(lock))

    def _safely(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (sqlite3.Error, OSError, HistoryError) as error:
            self._tell(str(error))
        except Exception as error:  # the thread's boundary: there will be other requests
            self._tell(describe_failure(error, 8192)[2] or "")
        else:
            self._interval, self._has_trouble = LOOK_INTERVAL, False

    def _show(self, lock: PresenceLock) -> None:
        """Let those who ask know that somebody listens."""
        offset = listening_byte_of(self._run_id)
        if self._held is None and offset is not None:
            lock.hold(offset)
            self._held = offset

    def _leave(self, lock: PresenceLock) -> None:
        try:
            if self._held is not None:
                lock.release(self._held, forget=True)
        finally:
            lock.leave()

    def _tell(self, trouble: str) -> None:
        self._interval = min(2 * self._interval, LONGEST_INTERVAL)
        if not self._has_trouble:
            self._has_trouble = True
            report(logging.WARNING, "%s cannot hear requests to cancel tasks in %s, and goes on "
                   "without until it can: %s", self._name, shown(self.path), trouble)

    def _look(self, lock: PresenceLock) -> None:
        self._show(lock)  # if that failed before
        with damage_told(self.path), self._database as connection:
            (changes,) = connection.execute("PRAGMA data_version").fetchone()
            if changes == self._changes:
                return
            with bounded(connection, self.path, PATIENCE):
                is_asked = connection.execute(_UNSEEN, (self._run_id,)).fetchone() is not None
        if is_asked:
            self._claim()
        self._changes = changes

    def _claim(self) -> None:
        with _written(self.path) as connection:
            found = {task_id: text_of(reason) or ""
                     for task_id, reason in connection.execute(_UNSEEN, (self._run_id,))}
            connection.execute(_CLAIM, (ns_text(time_ns()), json.dumps(list(found))))
        # the latest first, which mostly wait: no thread is to begin one in the place of another
        for task_id in sorted(found, reverse=True):
            task = self._find(task_id)
            if task is not None:
                task.cancel(found[task_id])

    def _connect(self) -> sqlite3.Connection:
        self._changes = None
        return connect_to_read(self.path, PATIENCE)
