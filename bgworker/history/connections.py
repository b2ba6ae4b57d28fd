"""SQLite connections that survive a fork, and the loss of their file, without harm to any file.

While the process forks, none of our connections is open and no thread of ours is inside SQLite. Any
thread may use a `Database`; the hooks run on the thread that forks.

SQLite keeps what it has locked in memory, per file and process, and a forked child inherits that
memory but not the locks. Even a connection that the child opens itself then believes in locks that
the kernel does not know of, so that another process may take itself for the last one and delete the
log under it; and closing an inherited connection can do the same to the parent. The child may also
find a mutex of SQLite's locked for ever. (https://sqlite.org/howtocorrupt.html, "Carrying an open
database connection across a fork()"; seen in /proc/locks with SQLite 3.40.) So a hook waits for
whoever uses a connection, closes it, and lets nobody open one until the fork is over. Both sides
open theirs again at the next use.

A connection whose file was deleted or replaced is not closed but left behind: the close deletes the
log by its name, which may by now be the log of another file, in use by others.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from contextlib import suppress

from ..model.clock import monotonic
from ..model.errors import HistoryError
from ..sinks.opening import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

PATIENCE = 2.0
"""Seconds that a fork waits for all users of connections together. Then it goes on, and the child
may not use those files: a disk that hangs must not stop the thread that forks."""


class Database:
    """A connection to one file, opened when it is first used; a context manager that lends it to
    one thread at a time.

    Args:
        path: of the file.
        connect: opens it, with ``check_same_thread=False``: a fork closes it on the thread that
            forks.
    """

    def __init__(self, path: str, connect: Callable[[], sqlite3.Connection]) -> None:
        self._path = os.path.realpath(path)
        self._connect = connect
        # Guards all below, and is held while the connection is used. It knows its holder, so that
        # an interrupt cannot leave it taken.
        self._lock = threading.RLock()
        self._lent = self._lock  # the one that is held; a fork gives the child another
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None  # of the file that the connection is to
        with _guard:
            _databases.add(self)

    def __enter__(self) -> sqlite3.Connection:
        """Lend the connection. What was begun on it must be over at the end; not reentrant.

        Raises:
            HistoryError: this process was forked while its parent was using the file.
            Exception: what ``connect`` raises.
        """
        lock = self._lock
        try:
            lock.acquire()  # inside, since an interrupt may strike right after it
            self._lent = lock
            if self._connection is None or self._identity_now() != self._identity:
                self._close()
                if self._path in _lost:
                    raise HistoryError(
                        f"{shown(self._path)} cannot be used in this process: it was forked while "
                        "its parent was using the file, which took too long to wait for; name "
                        "another path here"
                    )
                self._connection = self._connect()
                self._identity = self._identity_now()
            return self._connection
        except BaseException:
            with suppress(RuntimeError):  # it was never ours
                lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        self._lent.release()

    @property
    def is_open(self) -> bool:
        """True from the first use until `close` or a fork."""
        return self._connection is not None

    def close(self) -> None:
        """Close the connection; harmless if there is none. The next use opens another."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._identity_now() == self._identity:
                connection.close()
            else:
                _leave_behind(connection)

    def _identity_now(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _start_afresh(self, is_ours: bool) -> None:
        """In a forked child, whose copy of the lock may be held by a thread that is not here."""
        self._lock = threading.RLock()
        if not is_ours:  # the parent's thread is using the connection, or just opening it
            _lost.add(self._path)
            connection, self._connection = self._connection, None
            if connection is not None:
                _leave_behind(connection)


def _leave_behind(connection: sqlite3.Connection) -> None:
    """Never close a connection, not even when this interpreter takes itself down."""
    if not _left_behind:
        atexit.register(_keep_what_is_left_behind)
    _left_behind.append(connection)


def _keep_what_is_left_behind() -> None:
    import ctypes

    for connection in _left_behind:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_guard = threading.Lock()  # guards _databases; held during a fork
# by thread: whether it holds _guard, and the databases it holds
_forking: dict[int, tuple[bool, list[Database]]] = {}
_lost: set[str] = set()
_left_behind: list[sqlite3.Connection] = []


def _before_fork() -> None:
    deadline = monotonic() + PATIENCE
    is_guarded = _guard.acquire(timeout=PATIENCE)
    held: list[Database] = []
    _forking[threading.get_ident()] = is_guarded, held
    for database in list(_databases):
        is_inside = database._lock._is_owned()  # type: ignore[attr-defined]
        if not is_inside and database._lock.acquire(timeout=max(0.0, deadline - monotonic())):
            held.append(database)
            database._close()


def _after_fork_in_parent() -> None:
    is_guarded, held = _forking.pop(threading.get_ident(), (False, []))
    for database in held:
        database._lock.release()
    if is_guarded:
        _guard.release()


def _after_fork_in_child() -> None:
    global _guard
    _guard = threading.Lock()
    _, held = _forking.pop(threading.get_ident(), (False, []))
    _forking.clear()
    for database in list(_databases):
        database._start_afresh(database in held)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
