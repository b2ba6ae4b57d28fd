"""Events as a history in an SQLite file, to be queried while it is written and long after. Runs on
the sink's thread.

What `write` has returned from survives the death of the process, and with ``durability="power"``
that of the machine. Any number of sinks and processes may write to one file, and any number read it
meanwhile; see `schema` for what is in it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
from contextlib import contextmanager
from time import time_ns

from ..model import checks
from ..model.clock import monotonic
from ..model.errors import HistoryError, PermanentSinkError, TemporarySinkError
from ..model.ids import is_own_run
from ..model.reports import report
from ..model.text import describe
from ..model.wire import ns_text
from ..sinks.opening import CURABLE, HOPELESS, absolute, checked_mode, create, shown, trouble
from . import schema
from .connections import Database
from .presence import byte_of, settle
from .presencelock import PresenceLock
from .retention import Retention
from .rows import Rows
from .statements import GIVEN, most_values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Literal

    from ..model.events import Event

PRUNE_SECONDS = 0.02
"""Seconds of pruning after a batch of up to `PRUNE_BATCH` events, longer after a larger one: enough
for more rows than it brings, and nobody notices."""
PRUNE_BATCH = 5000
CLOSE_PRUNE_SECONDS = 0.5
LOOK_INTERVAL = 0.2
"""Seconds between two looks for tasks to prune, unless such a look takes more than a twentieth of
that."""

_LOG_BYTES = 16 * 2**20
"""What a log that grew because a reader held up its checkpoints is cut back to."""

_REMEDIES = {
    "disk is full": CURABLE[errno.ENOSPC],
    "is locked": "another program holds it locked; end its transaction",
    "readonly database": HOPELESS[errno.EACCES],
    "disk I/O error": "look after its disk, the room on it, and limits for file sizes",
    "unable to open": "look for its directory, and for the limit for open files",
    "malformed": "move it aside and recover what is in it with the .recover command of the sqlite3 "
    "shell",
}
"""Part of a message of SQLite's -> what mends it."""

_REFUSALS = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    TypeError,
    ValueError,
)
"""What SQLite and its module say to values that will never fit: too long, too large, of a strange
type, not Unicode."""


class SqliteSink:
    """Records tasks and what they say in an SQLite file: tables ``tasks`` and ``losses``, a view
    ``task_streams``.

    Delivery is at least once, the rows are exactly once: a stream row is known by its task and
    number, and a task's row never goes back to an earlier event. Every ``write`` is one
    transaction.

    Beside the file appear ``PATH-wal`` and ``PATH-shm``, which belong to it as long as they are
    there, and ``PATH.lock``. A file that is deleted meanwhile is made anew.

    Args:
        path: made absolute at once.
        max_age: seconds that a task stays after its end; None is for ever.
        max_tasks: most tasks that are kept, counting those that have not ended; None is no bound.
        max_bytes: most bytes of the file, its log not counted; None is no bound. All three remove
            only tasks that have ended, those first that ended first. They work while the sink is
            written to and when it is closed, some milliseconds at a time, so that for a while there
            may be more.
        durability: "process": what was written survives the death of the process. "power": it
            survives a power failure too, at the price of an fsync per batch.
        mode: permissions of a file that is created, and of those beside it, such as ``0o600`` for
            what others may not read; None leaves them to the umask.

    Raises:
        ConfigurationError: an argument cannot be used.
    """

    preferred_batch = 16_384
    """A task that begins and ends in one batch is written once, at half the price; and beside busy
    threads each waits some 0.1 s for the GIL."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_age: float | None = None,
        max_tasks: int | None = None,
        max_bytes: int | None = None,
        durability: Literal["process", "power"] = "process",
        mode: int | None = None,
    ) -> None:
        checks.choice("durability", durability, ("process", "power"))
        self._retention = Retention(max_age, max_tasks, max_bytes)
        self._is_power_safe = durability == "power"
        self._mode = checked_mode(mode)
        self.path = absolute(path)
        self._database = Database(self.path, self._connect)
        self._lock: PresenceLock | None = None
        self._runs: set[str] = set()  # of this process, whose presence we hold
        self._most_values = 0
        self._next_look = 0.0
        self._has_more_to_prune = False

    def __repr__(self) -> str:
        return f"SqliteSink({self.path!r})"

    def open(self) -> None:
        """Open or make the file; again after a fork.

        Tasks that a process left behind which has died are recorded as interrupted.

        Raises:
            PermanentSinkError: the file is damaged or not a history that we know, and was left as
                it is; or the path cannot be used.
            TemporarySinkError: it may work later.
        """
        with self._explained("open"):
            try:
                with self._locked(), self._database:
                    pass
                settle(self._database, self._locked())
            except OSError as error:
                if error.errno not in HOPELESS:
                    raise
                raise PermanentSinkError(trouble("open", self.path, error, HOPELESS)) from error
            except sqlite3.Error as error:
                if not os.path.exists(self.path) or os.access(self.path, os.R_OK | os.W_OK):
                    raise
                raise PermanentSinkError(
                    f"cannot open {shown(self.path)}: {error}; {HOPELESS[errno.EACCES]}"
                ) from error

    def write(self, events: Sequence[Event]) -> None:
        """Store the events, as one transaction; open the file first if need be. Then prune for a
        moment if that is due.

        Raises:
            TemporarySinkError: the system or SQLite refused (disk full, locked by another program);
                nothing was stored.
            PermanentSinkError: an event can never be stored, or the file is not a history any more.
        """
        try:
            rows = Rows(events)
        except Exception as error:
            # The courier halves the batch then, until the event that is no row stands alone.
            raise PermanentSinkError(
                f"cannot store an event in {shown(self.path)}: {describe(error)}"
            ) from error
        with self._explained("write to"):
            self.show_presence(rows.runs)
            with self._locked(), self._database as connection:
                try:
                    rows.store(connection, self._most_values)
                except _REFUSALS as error:
                    raise PermanentSinkError(
                        f"cannot store an event in {shown(self.path)}: {error}"
                    ) from error
        if self._retention.is_bounded:
            self._prune(PRUNE_SECONDS * max(1.0, len(events) / PRUNE_BATCH))

    def flush(self) -> None:
        """Do nothing: what ``write`` has returned from is as safe as ``durability`` says."""

    def close(self) -> None:
        """Note the end of this process's runs and close the file; harmless if it is closed, and in
        a forked child.

        A later ``write`` opens it again.
        """
        is_noted = False
        try:
            runs = [run_id for run_id in self._runs if is_own_run(run_id)]
            if runs:
                with (
                    self._locked(),
                    self._database as connection,
                    schema.transaction(connection),
                ):
                    connection.execute(
                        f"UPDATE runs SET ended_utc = ? WHERE run_id {GIVEN}",
                        (ns_text(time_ns()), json.dumps(runs)),
                    )
                is_noted = True
            if self._retention.is_bounded and self._database.is_open:
                self._next_look = 0.0
                self._prune(CLOSE_PRUNE_SECONDS)
        finally:
            self._let_go(is_noted)

    def _let_go(self, is_noted: bool) -> None:
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if self._database.is_open:
                with lock:
                    self._database.close()
        finally:
            self._database.close()
            runs, self._runs = self._runs, set()
            try:
                for run_id in runs:
                    offset = byte_of(run_id)
                    if offset is not None:
                        lock.release(offset, forget=is_noted)
            finally:
                lock.leave()

    # -- the file --

    def _locked(self) -> PresenceLock:
        if self._lock is None:
            schema.check_kind(self.path, is_written=True)
            self._lock = PresenceLock.share(schema.lock_path(self.path), self._mode)
        return self._lock

    def _connect(self) -> sqlite3.Connection:
        target = os.path.realpath(self.path)
        if self._mode is not None and not os.path.exists(target):
            # SQLite gives what it creates beside it the same
            os.close(create(target, os.O_RDWR, self._mode))
        connection = schema.connect_to_write(self.path)
        connection.execute(f"PRAGMA synchronous = {'FULL' if self._is_power_safe else 'NORMAL'}")
        # fsync alone leaves it in the drive's cache on macOS
        connection.execute(f"PRAGMA fullfsync = {int(self._is_power_safe)}")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        self._most_values = most_values(connection)
        return connection

    def show_presence(self, runs: set[str]) -> None:
        """Hold the bytes of this process's runs before anybody can find a task of theirs. Any
        thread, while the sink is open.

        Raises:
            OSError: the lock file cannot be used.
        """
        for run_id in runs.difference(self._runs):
            offset = byte_of(run_id)
            if offset is not None and is_own_run(run_id):
                self._locked().hold(offset)
                self._runs.add(run_id)

    # -- pruning --

    def _prune(self, seconds: float) -> None:
        """Remove what is too much, for about so many seconds. Errors are only reported: by now the
        batch is stored."""
        begun = monotonic()
        lock = self._locked()
        try:
            with schema.damage_told(self.path):
                if begun >= self._next_look:
                    self._retention.look(self._database, lock)
                    now = monotonic()
                    self._next_look = now + max(LOOK_INTERVAL, 20 * (now - begun))
                    self._has_more_to_prune = True
                while self._has_more_to_prune and monotonic() - begun < seconds:
                    with lock, self._database as connection:
                        self._has_more_to_prune = self._retention.step(connection) > 0
        except (sqlite3.Error, OSError, HistoryError) as error:
            self._next_look = monotonic() + 60
            self._has_more_to_prune = False
            report(
                logging.WARNING,
                "the history %r could not be pruned, which is tried again in a minute: %s",
                self.path,
                str(error),
            )

    # -- what went wrong --

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Raise the errors of the file as those of a sink, which say whether to try again."""
        try:
            yield
        except OSError as error:
            raise TemporarySinkError(trouble(what, self.path, error, CURABLE)) from error
        except HistoryError as error:
            raise PermanentSinkError(str(error)) from error
        except sqlite3.Error as error:
            remedies = [f"; {remedy}" for part, remedy in _REMEDIES.items() if part in str(error)]
            raise TemporarySinkError(
                f"cannot {what} {shown(self.path)}: {error}{''.join(remedies)}"
            ) from error
