"""Events as a history in PostgreSQL, which any number of processes and machines write to at once.
Runs on the sink's thread.

What `write` has returned from is committed. Every batch is one transaction, of a handful of
statements however many events it has. See `tables` for what is in it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import closing, contextmanager
from zlib import crc32

from ..history.batch import LOSS_COLUMNS, wide_values
from ..history.taskrows import COLUMNS, RUN_COLUMNS
from ..model.errors import (
    ConfigurationError,
    PermanentSinkError,
    SinkError,
    TemporarySinkError,
)
from ..model.records import STREAM_CODES
from ..model.reports import report
from ..model.text import describe, show
from . import tables as sql
from .store import READ_ROWS, READ_TASKS, Store, kinds_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, TypeVar

    from ..history.batch import SortedBatch
    from ..history.taskrows import TaskRows

    T = TypeVar("T")

PACKAGES = {"psycopg": '"psycopg[binary]"', "psycopg2": "psycopg2-binary"}
"""Module -> what installs it together with the library of PostgreSQL that it needs."""
MOST_TASKS = 500
"""Tasks that are pruned in one transaction, ..."""
MOST_ROWS = 20_000
"""... and stream rows."""

_REFUSED = ("21", "22", "23", "54")
"""Classes of SQLSTATE that blame the values: of two rows of one batch, too long, not Unicode."""
_RACES = ("23503", "40001", "40P01")
"""What a row refers to was pruned meanwhile, or another transaction came between: the same again is
likely to do."""
MOST_RACES = 4
"""Attempts that are made at once, before the sink's own pause."""
_GONE = ("42P01", "3F000")
"""Somebody has dropped the tables: the next attempt makes them, unless the version is still
there."""
_HELD = {
    "25006": "the server only reads, as a standby does; have `connect` find the one that writes",
    "28": "correct the user or the password that `connect` uses",
    "3D": "create that database, or have `connect` name another",
    "42501": "let the role use the schema: GRANT USAGE ON SCHEMA {0} TO role; GRANT SELECT, "
             "INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {0} TO role; and CREATE on it, or on "
             "the database, if bgworker is to make the tables",
    "42": "somebody has changed the tables; put them back, or name another schema",
    "53100": "make room on the server's disk, or raise the quota",
}
"""Beginning of SQLSTATE -> what mends it. Nothing is taken before, so the events are held."""


class PostgresSink(Store):
    """Records tasks and what they say in a schema of a PostgreSQL database: tables ``tasks``,
    ``runs``, ``scripts``, ``losses``, and a view ``task_streams``.

    Delivery is at least once, the rows are exactly once: a stream row is known by its task and
    number, and a task's row never goes back to an earlier event. The tables are made, and brought
    to the newest version, by the first sink that connects. Sinks of an older bgworker that are
    connected then finish the batch under way, and take nothing any more.

    ``runs.last_seen`` is set with each batch, whatever is in it; see the package for what that
    proves.

    A server that cannot be reached costs no event but for those that do not fit into the sink's
    queue. How long an attempt may take is for ``connect`` to say: without ``connect_timeout`` and
    ``tcp_user_timeout`` the system may take minutes to notice that a network is gone.

    Args:
        connect: returns a new connection of the DB-API to the database. It is called on the sink's
            thread, again after every trouble, and in a forked child. Tested with psycopg 3
            and psycopg2, on PostgreSQL 15.
        schema: name of the schema, which is made if it is missing.
        max_age: seconds that a task stays after its end; None is for ever.
        max_tasks: most tasks that are kept, counting those that have not ended; None is no bound.
            Both remove only tasks that have ended, those first that ended first; with ``max_age``
            also those whose run has not been seen for as long. Every sink with bounds prunes, one
            at a time, while it is written to.

    Raises:
        ConfigurationError: an argument cannot be used.
    """

    preferred_batch = 8192

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        schema: str = "bgworker",
        max_age: float | None = None,
        max_tasks: int | None = None,
    ) -> None:
        if not callable(connect):
            raise ConfigurationError(
                "connect: expected a function that returns a connection, such as "
                f"lambda: psycopg.connect('dbname=jobs'), got {show(connect)}")
        if not isinstance(schema, str) or not re.fullmatch(r"[A-Za-z_]\w{0,62}", schema, re.ASCII):
            raise ConfigurationError(
                "schema: expected a letter or underscore, and up to 62 letters, digits or "
                f"underscores, got {show(schema)}")
        super().__init__(f"the schema {schema!r} of PostgreSQL", "schema", max_age, max_tasks)
        self._connect = connect
        self.schema = schema
        self._connection: Any = None
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"PostgresSink(schema={self.schema!r})"

    def open(self) -> None:
        """Connect, and make the tables or bring them to the newest version; again after a fork.

        Raises:
            PermanentSinkError: ``connect`` is wrong, or the schema is not one that we know.
            TemporarySinkError: it may work later.
        """
        with self._transaction("open"):
            pass

    def _do(self, what: str, act: Callable[..., T], *arguments: Any) -> T:
        attempts = 0
        while True:
            attempts += 1
            try:
                with self._transaction(what) as cursor:
                    return act(cursor, *arguments)
            except TemporarySinkError as error:
                if attempts == MOST_RACES or _state(error.__cause__) not in _RACES:
                    raise

    def _end(self, at: Any, runs: list[str]) -> None:
        self._ask(at, sql.END_RUNS, _texts(runs))

    # -- rows --

    def _store(self, at: Any, batch: SortedBatch) -> None:
        cursor = at
        self._store_tasks(cursor, batch.tasks)
        if batch.streams:
            self._store_streams(cursor, batch)
        if batch.tasks.progress:
            columns = "percent", "message", "seq", "task"
            self._execute(cursor, sql.ADVANCE_PROGRESS, _objects(columns, batch.tasks.progress))
        if batch.losses:
            self._execute(cursor, sql.INSERT_LOSSES, _objects(LOSS_COLUMNS, batch.losses))

    def _store_tasks(self, cursor: Any, tasks: TaskRows) -> None:
        rows = list(tasks.rows())
        changed = [row[:1] for row in rows] + [row[-1:] for row in tasks.progress]
        self._ask(cursor, sql.SEE_RUNS, _objects(
            RUN_COLUMNS, [*tasks.own_runs, *((run,) for run in tasks.other_runs)]))
        for statement, columns, values in (
            (sql.INSERT_SCRIPTS, ("hash", "script_id", "text"),
             [(hash_, *rest) for hash_, rest in tasks.scripts.items()]),
            (sql.LOCK_TASKS, ("id",), changed if tasks.progress else []),
            (sql.INSERT_TASKS, COLUMNS, rows),
            (sql.INSERT_PLACEHOLDERS, ("id", "created_utc"), tasks.placeholders),
        ):
            if values:
                self._execute(cursor, statement, _objects(columns, values))

    def _store_streams(self, cursor: Any, batch: SortedBatch) -> None:
        keys = self._keys(cursor, batch)
        if len(keys) < len(batch.speakers):
            self._store_tasks(cursor, batch.unknown(keys))
            keys = self._keys(cursor, batch)
        plain: list[tuple[Any, ...]] = []
        wide: list[tuple[Any, ...]] = []
        last, key = None, 0
        for state, seq, kind, ns, data in batch.streams:
            if state is not last:
                last, key = state, keys[state.id]
            if data.__class__ is str:
                plain.append((key, seq, STREAM_CODES[kind], ns // 1000, data))
            else:
                wide.append((key, seq, STREAM_CODES[kind], ns // 1000, *wide_values(kind, data)))
        for statement, rows in ((sql.INSERT_STREAMS, plain), (sql.INSERT_WIDE_STREAMS, wide)):
            if rows:
                # in the order of the table
                rows.sort(key=lambda row: row[:2])
                task, seqs, streams, times, payloads, *more = zip(*rows)
                self._execute(cursor, statement, _numbers(task), _numbers(seqs), _numbers(streams),
                              _numbers(times), _texts(payloads), *map(_numbers, more))

    def _keys(self, cursor: Any, batch: SortedBatch) -> dict[str, int]:
        return dict(self._rows(cursor, sql.FIND_KEYS,
                               _texts([state.id for state in batch.speakers])))

    # -- the connection --

    def _execute(self, cursor: Any, statement: str, *values: Any) -> None:
        cursor.execute(statement.replace("{s}", f'"{self.schema}"'), values)

    def _rows(self, cursor: Any, statement: str, *values: Any) -> list[Any]:
        self._execute(cursor, statement, *values)
        found: list[Any] = cursor.fetchall()
        return found

    def _ask(self, cursor: Any, statement: str, *values: Any) -> Any:
        """Execute a statement that tells the version of the history; return what else it tells.
        Nobody changes the version before our transaction has ended."""
        ((version, *more),) = self._rows(cursor, statement, *values)
        version = version or 0
        self._check_version(version, len(sql.STEPS))
        if version < len(sql.STEPS):
            # on a new connection we prepare the schema
            raise self._failed("use", "somebody has taken its version out of schema_version")
        return more

    @contextmanager
    def _transaction(self, what: str) -> Iterator[Any]:
        """Give a cursor, and commit what was done with it. What goes wrong is raised as the error
        of a sink, and undone; unless the values are to blame, the next transaction gets a new
        connection."""
        try:
            with closing(self._connected(what).cursor()) as cursor:
                yield cursor
            self._connection.commit()
        except Exception as error:
            told = self._explained(what, error)
            if self._connection is not None and told.__class__ is PermanentSinkError:
                try:
                    self._connection.rollback()
                except Exception:
                    self._disconnect()  # what led here tells more
            else:
                self._disconnect()
            raise told from error
        except BaseException:
            self._disconnect()
            raise
        self._failures = 0

    def _connected(self, what: str) -> Any:
        if self._pid != os.getpid():
            self._disconnect()
            self._pid = os.getpid()
            self._runs.clear()
        if self._connection is None:
            try:
                connection = self._connect()
            except Exception as error:
                if what == "open" and not (_state(error) or _is_unreachable(error)):
                    raise PermanentSinkError(
                        "connect does not connect: " + "; ".join(filter(None, (
                            _harmless(error), _missing_package(error)))),
                        concerns="sink") from error
                raise
            try:
                connection.autocommit = False
                self._connection = connection
                self._prepare(connection)
            except BaseException:
                self._connection = None
                connection.close()
                raise
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if self._pid != os.getpid():
            # The parent goes on with it: to close it here would end it there.
            _inherited.append(connection)
        elif connection is not None:
            try:
                connection.close()
            except Exception as error:  # a driver's; the connection is of no use in any case
                report(logging.DEBUG, "a connection could not be closed: %s", _harmless(error))

    def _prepare(self, connection: Any) -> None:
        """Bring the schema to the newest version, in one transaction, unless it has it."""
        with closing(connection.cursor()) as cursor:
            if self._found(cursor) != (True, len(sql.STEPS)):
                connection.commit()  # who waits for the lock below must not hold one
                self._execute(cursor, sql.LOCK, *self._lock)
                is_there, version = self._found(cursor)
                if not is_there:
                    self._execute(cursor, sql.MAKE_SCHEMA)
                self._execute(cursor, sql.LOCK_VERSIONS if version else sql.MAKE_VERSIONS)
                for number in range(version + 1, len(sql.STEPS) + 1):
                    for statement in sql.STEPS[number - 1]:
                        self._execute(cursor, statement)
                    self._execute(cursor, sql.NOTE_VERSION, number)
        connection.commit()

    def _found(self, cursor: Any) -> tuple[bool, int]:
        """Return whether the schema is there, and the version of the history in it; 0 for none."""
        ((is_there, is_known),) = self._rows(cursor, sql.FIND_SCHEMA, self.schema)
        version = self._rows(cursor, sql.FIND_VERSION)[0][0] or 0 if is_known else 0
        self._check_version(version, len(sql.STEPS))
        return bool(is_there), version

    @property
    def _lock(self) -> tuple[int, int]:
        """The two numbers of the advisory lock under which tables are made and pruned."""
        return 0x6267776B, crc32(self.schema.encode()) - 2**31  # "bgwk"

    def _explained(self, what: str, error: Exception) -> SinkError:
        """Return what an error means for the sink's events."""
        if isinstance(error, SinkError):
            return error
        state, text = _state(error), _harmless(error)
        if state == "42P07":
            return self._foreign(text)
        # After a failure the connection is new: the version was found, and yet a table is missing.
        is_passing = state in _RACES or state in _GONE and not self._failures
        if not is_passing and (state[:2] in _REFUSED or not state
                               and isinstance(error, (TypeError, ValueError))
                               and not _is_unreachable(error)):
            return PermanentSinkError(f"PostgreSQL cannot store an event: {text}")
        held = max((known for known in _HELD if state.startswith(known)), key=len, default="")
        if held and not is_passing:
            return self._failed(what, text, remedy=_HELD[held].format(f'"{self.schema}"'))
        is_away = state.startswith(("08", "57P")) or not state and _is_unreachable(error)
        return self._failed(what, text, remedy=_missing_package(error), is_away=is_away)

    # -- pruning --

    def _prune_some(self, at: Any) -> bool:
        """Remove some of what is too much; True if there may be more. One sink does it at a time,
        or all would remove as much."""
        cursor = at
        (is_ours,) = self._ask(cursor, sql.TRY_LOCK, *self._lock)
        if not is_ours:
            return False
        keys: list[int] = []
        if self._max_tasks is not None:
            surplus = self._rows(cursor, sql.COUNT_TASKS)[0][0] - self._max_tasks
            if surplus > 0:
                keys = self._ended(cursor, "infinity", "-infinity", min(surplus, MOST_TASKS))
        if self._max_age is not None and not keys:
            ((before,),) = self._rows(cursor, sql.SINCE, min(self._max_age, 1e10))
            keys = self._ended(cursor, before, before, MOST_TASKS)
            if not keys:
                self._execute(cursor, sql.DELETE_LOSSES, before)
        if not keys:
            return False
        self._execute(cursor, sql.DELETE_STREAMS, _numbers(keys), MOST_ROWS)
        if cursor.rowcount < MOST_ROWS:
            tasks = self._rows(cursor, sql.DELETE_TASKS, _numbers(keys))
            for column, lock, delete in ((0, sql.LOCK_RUNS, sql.DELETE_RUNS),
                                         (1, sql.LOCK_SCRIPTS, sql.DELETE_SCRIPTS)):
                names = self._rows(cursor, lock, _texts({task[column] for task in tasks} - {None}))
                # a statement of its own, which sees what was committed before the lock
                self._execute(cursor, delete, _texts([name for name, in names]))
        return True

    def _ended(self, cursor: Any, before: Any, seen: Any, most: int) -> list[int]:
        return [key for key, in self._rows(cursor, sql.FIND_OVER, before, seen, most)]

    # -- reading --

    def _reader(self) -> PostgresSink:
        return PostgresSink(self._connect, schema=self.schema)

    def _tasks_after(self, at: Any, last_id: str) -> list[Any]:
        return self._rows(at, sql.SELECT_TASKS, last_id, READ_TASKS)

    def _streams_after(self, at: Any, task: Any, seq: int) -> list[Any]:
        return self._rows(at, sql.SELECT_STREAMS, task[0], seq, READ_ROWS)

    def _losses_after(self, at: Any, key: Any) -> list[Any]:
        return self._rows(at, sql.SELECT_LOSSES, key, READ_ROWS)


_inherited: list[Any] = []
"""Connections of the parent, in a forked child: nobody closes them there, no garbage collector
either."""


# -- values as texts, which every driver sends as they are --


def _objects(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return json.dumps([dict(zip(columns, row)) for row in rows])


def _numbers(values: Iterable[float | None]) -> str:
    return "{" + ",".join(["NULL" if value is None else repr(value) for value in values]) + "}"


def _texts(values: Iterable[str]) -> str:
    """Return an array of texts. Escaped as one, which costs a tenth of doing so one by one."""
    each = list(values)
    joined = "\0".join(each)
    if joined.count("\0") != max(len(each) - 1, 0):
        raise ValueError("a text holds a NUL, which PostgreSQL does not take")
    joined = joined.replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + joined.replace("\0", '","') + '"}' if each else "{}"


# -- what a driver's error says; its classes are not ours to import --


def _state(error: BaseException | None) -> str:
    """Return the SQLSTATE: where psycopg 3 has it, or psycopg2. Empty if the server said none."""
    found = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return found if isinstance(found, str) else ""


def _is_unreachable(error: Exception) -> bool:
    return isinstance(error, OSError) or not kinds_of(error).isdisjoint(
        ("OperationalError", "InterfaceError"))


def _missing_package(error: Exception) -> str:
    """Return what installs the package that an error says is missing; empty if it does not. A
    driver that does not find PostgreSQL's library says no name."""
    if not isinstance(error, ImportError):
        return ""
    module = (error.name or "psycopg").partition(".")[0]
    return ("install the package that is missing: python -m pip install "
            f"{PACKAGES.get(module, module)}")


def _harmless(error: Exception) -> str:
    """Return its type and text, without a password that a connection string may hold."""
    return re.sub(r"(?i)(://[^\s:/@]*:|password\s*=\s*)('[^']*'|[^\s@]+)", r"\1...",
                  describe(error))
