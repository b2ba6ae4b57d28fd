"""The format of a history file: its tables, the checks by which we know our own files, and the
steps from one version to the next.

Beside ``PATH`` lie SQLite's ``PATH-wal`` and ``PATH-shm``, and ``PATH.lock`` (`PresenceLock`).
A writer holds that lock from before a transaction until after its commit or its checkpoint:
SQLite before 3.51.3 can lose commits when one connection commits while another begins a checkpoint
(https://sqlite.org/wal.html#walresetbug). Readers need no lock.

No file that is not ours, or not as we know it, is changed. A file that others can write is
hostile: before the first question `check` sees to it that the tables are those that bgworker
makes, so that nothing of the file's own runs (views, triggers, generated columns, expressions),
and `bounded` ends what a damaged tree of pages would make endless.

Functions here are for the thread that owns the connection.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import sys
from contextlib import closing, contextmanager
from functools import lru_cache

from ..model.clock import monotonic
from ..model.errors import BgworkerError, HistoryError, TookTooLong
from ..model.records import PROGRESS, STREAM_CODES, STREAMS
from ..sinks.opening import check_file, followed, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Dict, Tuple

    Objects = Dict[str, Tuple[str, str]]

# "bgwk"; SQLite keeps it in the file's header for programs to know their files by
APPLICATION_ID = 0x6267776B

BUSY_SECONDS = 10.0
"""How long a statement waits for a lock that others hold: a stranger's program, or the close of a
last writer."""

_STREAM_NAMES = " ".join(
    f"WHEN {code} THEN '{stream.value}'"
    for code, stream in sorted((STREAM_CODES[kind], stream) for kind, stream in STREAMS.items())
)
"""How ``stream_rows.stream`` spells a stream; 0 and 1 take no room in a row."""

MOST_TEXT = 4 * 2**20
"""Bytes of the longest value that is read: decoded and encoded again it takes ten times as much."""

COMMAND_FAILED = "subprocess.CalledProcessError"
"""The type of the failure of a command that ran, and ended with another code than 0."""

_EXIT = re.compile(rb" (?:returned non-zero exit status (\d{1,10})|"
                   rb"died with (?:<Signals\.\w+: (\d{1,3})>|unknown signal (\d{1,3})))\.$")


def exit_code_of(status: str, script_id: str | None, failure_type: str | None,
                 failure_message: str | None) -> int | None:
    """Return the exit code of a command, below 0 the signal that ended it; None for a Python
    function, whose ``script_id`` has a colon, and where nobody knows."""
    if failure_type == COMMAND_FAILED and failure_message is not None:
        return code_in(failure_message.encode())
    return 0 if status == "completed" and script_id is not None and ":" not in script_id else None


def code_in(message: bytes | None) -> int | None:
    """Return the exit code that the message of a `COMMAND_FAILED` tells, below 0 a signal; None if
    it tells none."""
    found = _EXIT.search(message or b"")
    if found is None:
        return None
    code, *signals = found.groups()
    return int(code) if code else -int(signals[0] or signals[1])


_RUNS = """CREATE TABLE runs (
  run_id TEXT PRIMARY KEY NOT NULL,
  host TEXT,         -- where it ran; NULL for a run that was copied here from elsewhere
  pid INTEGER,
  started_utc TEXT,
  ended_utc TEXT,    -- when its record was closed; NULL while it lasts, and for ever if its \
process was killed
  python TEXT,
  version TEXT
)"""
_SCRIPTS = """CREATE TABLE scripts (
  hash TEXT PRIMARY KEY NOT NULL,
  script_id TEXT,
  text TEXT          -- NULL unless record_source was on
)"""
_TASKS = """CREATE TABLE tasks (
  key INTEGER PRIMARY KEY{},
  id TEXT NOT NULL UNIQUE,
  run_id TEXT REFERENCES runs(run_id),
  name TEXT NOT NULL,
  status TEXT NOT NULL,
  created_utc TEXT NOT NULL,
  scheduled_utc TEXT,
  started_utc TEXT,
  completed_utc TEXT,
  duration_sec REAL,
  timeout_sec REAL,
  last_progress_pct REAL,
  last_progress_msg TEXT,
  script_id TEXT,
  script_hash TEXT REFERENCES scripts(hash),
  arg_json TEXT,
  metadata_json TEXT,{}
  failure_type TEXT,
  failure_message TEXT,
  invocation_info TEXT,{}
  last_seq INTEGER NOT NULL  -- of the event that the row was last made from
)"""
_STREAM_ROWS = """CREATE TABLE {} (
  task INTEGER NOT NULL REFERENCES tasks(key),
  seq INTEGER NOT NULL,
  stream INTEGER NOT NULL,
  created_us INTEGER NOT NULL,  -- microseconds since the epoch
  payload TEXT NOT NULL,        -- for progress its message
  percent REAL,
  original_bytes INTEGER,       -- NULL unless truncated
  is_json INTEGER,              -- 1 or NULL
  PRIMARY KEY (task, seq)
) WITHOUT ROWID"""
_TASK_STREAMS = f"""CREATE VIEW task_streams AS
SELECT tasks.id AS task_id, seq, CASE stream {_STREAM_NAMES} END AS stream_type, payload,
  CASE WHEN is_json THEN 'json' ELSE 'text' END AS format,
  original_bytes IS NOT NULL AS truncated,
  strftime('%Y-%m-%dT%H:%M:%S', created_us / 1000000, 'unixepoch') || \
printf('.%06dZ', created_us % 1000000)
    AS created_utc,
  percent, original_bytes
FROM {{0}} JOIN tasks ON tasks.key = {{0}}.task"""
_LOSSES = """CREATE TABLE losses (
  sink TEXT NOT NULL,
  reason TEXT NOT NULL,
  count INTEGER NOT NULL,
  by_type TEXT NOT NULL,
  created_utc TEXT NOT NULL,
  UNIQUE (created_utc, sink, reason, count, by_type)
)"""
_INDEXES = (
    "CREATE INDEX tasks_status ON tasks(status, completed_utc)",
    "CREATE INDEX tasks_name ON tasks(name, duration_sec)",
    "CREATE INDEX tasks_run ON tasks(run_id)",
    "CREATE INDEX tasks_script ON tasks(script_hash)",
)

_EXIT_CODE = """
  exit_code INTEGER,  -- of a command: 0, or of its failure; below 0 the signal that ended it"""
_TASKS_2 = _TASKS.format("", "", _EXIT_CODE)
_VIEWS_2 = (
    _TASK_STREAMS.format("zz_stream_rows"),
    """CREATE VIEW tasks_readable AS
SELECT name, status, datetime(started_utc) AS started, round(duration_sec, 3) AS seconds,
  substr(CASE
    WHEN exit_code > 0 THEN 'exit code ' || exit_code
    WHEN exit_code < 0 THEN 'signal ' || -exit_code
    ELSE coalesce(coalesce(failure_type || ': ', '') || failure_message, last_progress_msg, '')
  END, 1, 200) AS message,
  substr(id, 1, 16) AS id, substr(run_id, 1, 16) AS run
FROM tasks ORDER BY tasks.id DESC""",
    f"""CREATE VIEW output AS
SELECT strftime('%Y-%m-%d %H:%M:%f', created_us / 1e6, 'unixepoch') AS time, tasks.name AS task,
  CASE stream {_STREAM_NAMES} END AS stream, substr(payload, 1, 200) AS line,
  substr(tasks.id, 1, 16) AS id
FROM zz_stream_rows JOIN tasks ON tasks.key = zz_stream_rows.task
WHERE stream != {STREAM_CODES[PROGRESS]}""",
    """CREATE VIEW runs_summary AS
SELECT substr(run_id, 1, 16) AS run, datetime(runs.started_utc) AS started,
  round((julianday(coalesce(runs.ended_utc, max(completed_utc)))
    - julianday(runs.started_utc)) * 86400, 3) AS seconds,
  count(key) AS tasks,
  count(CASE status WHEN 'completed' THEN 1 END) AS completed,
  count(CASE status WHEN 'failed' THEN 1 END) AS failed,
  count(CASE status WHEN 'timed_out' THEN 1 END) AS timed_out,
  count(CASE status WHEN 'cancelled' THEN 1 END) AS cancelled,
  count(CASE status WHEN 'interrupted' THEN 1 END) AS interrupted,
  round(total(duration_sec), 3) AS task_seconds, host
FROM runs LEFT JOIN tasks USING (run_id) GROUP BY run_id ORDER BY run_id DESC""",
)

_TASKS_3 = _TASKS.format("", """
  result_json TEXT,   -- NULL unless record_result was on
  rerun_of TEXT,      -- id of the task that this one ran again, as its metadata say""", _EXIT_CODE)
_REQUESTS = """CREATE TABLE zz_requests (
  task_id TEXT PRIMARY KEY NOT NULL,  -- of a task that somebody wants to be cancelled
  reason TEXT NOT NULL,
  created_utc TEXT NOT NULL,
  seen_utc TEXT       -- when the process that runs the task has seen it
)"""
# what people are shown of an id; those of earlier versions end with digits of their process
_SHORT_ID = ("CASE substr({0}, 25) WHEN substr(run_id, 25) THEN substr({0}, -16) "
             "ELSE substr({0}, -8) END")
_VIEWS_3 = tuple([
    sql.replace("substr(id, 1, 16)", _SHORT_ID.format("id"))
    .replace("substr(tasks.id, 1, 16)", _SHORT_ID.format("tasks.id"))
    .replace("substr(run_id, 1, 16)", "substr(run_id, -8)")
    # DuckDB takes a view with a function that it lacks for one of texts alone, seconds too
    .replace("datetime(started_utc)", "replace(substr(started_utc, 1, 19), 'T', ' ')")
    for sql in _VIEWS_2])
_NEW_IN_3 = (
    _REQUESTS,
    # of the few that have one: a row without costs the index nothing
    "CREATE INDEX tasks_rerun ON tasks(rerun_of) WHERE rerun_of IS NOT NULL",
)

MADE = (
    (_RUNS, _SCRIPTS, _TASKS.format(" AUTOINCREMENT", "", ""), _STREAM_ROWS.format("stream_rows"),
     _TASK_STREAMS.format("stream_rows"), _LOSSES, *_INDEXES),
    (_RUNS, _SCRIPTS, _TASKS_2, _STREAM_ROWS.format('"zz_stream_rows"'), _LOSSES, *_INDEXES,
     *_VIEWS_2),
    (_RUNS, _SCRIPTS, _TASKS_3, _STREAM_ROWS.format('"zz_stream_rows"'), _LOSSES, *_INDEXES,
     *_NEW_IN_3, *_VIEWS_3),
)
"""What makes a file of version 1, 2, ... A released one never changes."""

_KEPT = ", ".join(re.findall(r"^  (\w+) ", _TASKS, re.MULTILINE))  # columns of tasks in version 1
# without it SQLite would have other tables refer to the old one
_SET_ASIDE = ("PRAGMA legacy_alter_table = ON", "ALTER TABLE tasks RENAME TO zz_old_tasks")
STEPS = (
    (
        "DROP VIEW task_streams",
        *_SET_ASIDE,
        _TASKS_2,
        f"""INSERT INTO tasks ({_KEPT}, exit_code) SELECT {_KEPT},
  CASE WHEN failure_type = '{COMMAND_FAILED}' THEN exit_code(CAST(failure_message AS BLOB))
    WHEN status = 'completed' AND instr(script_id, ':') = 0 THEN 0 END
FROM zz_old_tasks ORDER BY key""",
        "DROP TABLE zz_old_tasks",
        "ALTER TABLE stream_rows RENAME TO zz_stream_rows",
        "PRAGMA legacy_alter_table = OFF",
        *_INDEXES,
        *_VIEWS_2,
    ),
    (
        *[f"DROP VIEW {name}"
          for name in ("task_streams", "tasks_readable", "output", "runs_summary")],
        *_SET_ASIDE,
        _TASKS_3,
        f"""INSERT INTO tasks ({_KEPT}, exit_code) SELECT {_KEPT}, exit_code
FROM zz_old_tasks ORDER BY key""",
        "DROP TABLE zz_old_tasks",
        "PRAGMA legacy_alter_table = OFF",
        *_INDEXES,
        *_NEW_IN_3,
        *_VIEWS_3,
    ),
)
"""What leads a file from version 1 to 2, ..., each as one transaction, to the very objects of a new
one."""

_TASKS_BEFORE_3 = "tasks AS SELECT *, NULL AS result_json, NULL AS rerun_of FROM main.tasks"
_NO_REQUESTS = ("zz_requests AS SELECT '' AS task_id, '' AS reason, '' AS created_utc, "
                "'' AS seen_utc WHERE 0")
_NEW_NAME = "stream_rows AS SELECT * FROM zz_stream_rows"
_SEEN_AS = (
    (_TASKS_BEFORE_3, _NO_REQUESTS), (_NEW_NAME, _TASKS_BEFORE_3, _NO_REQUESTS), (_NEW_NAME,))
"""By version, the views that let questions be the same for all of them."""

VERSION = len(MADE)
"""The version that is written, and the greatest one that is read; ``PRAGMA user_version`` of the
file."""

_PLAIN_INDEX = re.compile(r'CREATE INDEX [\w\s".]+\([\w\s,"]+\)')
"""An index of columns alone, which somebody may have added for questions of his own."""

_VM_STEPS = 100_000
"""Steps of SQLite's machine between two looks at whether a question goes on for too long."""
_STEPS_AT_LEAST, _STEPS_A_BYTE = 50_000_000, 10
"""Steps that a question may take: several times what the dearest needs for the smallest rows."""


def lock_path(path: str) -> str:
    """Return the path of the lock file of a history."""
    return os.path.realpath(path) + ".lock"


def this_host() -> str:
    """Return the name of this machine as ``runs.host`` has it."""
    import platform

    return platform.node()


def connect_to_read(path: str, patience: float | None = None) -> sqlite3.Connection:
    """Open a history that is there, to read only; it does no checkpoint, and may be used by one
    thread at a time.

    Args:
        patience: seconds that a question waits for a lock that a stranger's program holds.

    Raises:
        HistoryError: the file is missing or empty, damaged, of another program, or of a newer
        bgworker. sqlite3.OperationalError: the system does not let us read it now.

    In a directory that cannot be written to, a file that nobody has open is taken for one that does
    not change (``PRAGMA journal_mode`` is not "wal" then); the caller opens it again when it does.
    """
    if not os.path.exists(path):
        raise HistoryError(f"there is no history at {shown(path)}; name the file of a SqliteSink, "
                           "or record one with bgworker run")
    check_kind(path)
    try:
        return _connect_to_read(path, "ro", patience)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise  # somebody writes
        # SQLite wants PATH-shm beside the file even for reading, and may not be able to create it
        # in that directory.
        log = os.path.realpath(path) + "-wal"
        if os.path.exists(log) and os.path.getsize(log):
            if os.access(
                os.path.dirname(log), os.W_OK, effective_ids=os.access in os.supports_effective_ids
            ):
                raise
            raise HistoryError(
                f"the newest part of the history {shown(path)} is in {shown(log)}, which SQLite "
                "cannot read where no file can be created beside it; copy both to a directory that "
                "you may write to"
            ) from error
    # all there is stands in the file itself, and nobody writes
    return _connect_to_read(path, "ro&immutable=1", patience)


def _connect_to_read(path: str, mode: str, patience: float | None) -> sqlite3.Connection:
    connection = _connect(path, mode, patience)
    try:
        version = check(connection, path)
        if not version:
            raise HistoryError(
                f"{shown(path)} is empty; name the file of a SqliteSink that has been opened"
            )
        for view in _SEEN_AS[version - 1]:
            connection.execute(f"CREATE TEMP VIEW {view}")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_write(path: str) -> sqlite3.Connection:
    """Open a history, making it if need be, and bring it to the newest version. The caller holds
    its lock.

    Raises:
        HistoryError: the file is damaged, of another program, or of a newer bgworker, and was not
            touched; or a history cannot be kept in that place.
        sqlite3.OperationalError: the system does not let us write it now.
    """
    check_kind(path, is_written=True)
    _judge(path)
    connection = _connect(path, "rwc")
    try:
        version = check(connection, path)
        if not version:
            # only before the first page is written
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise HistoryError(
                f"no history can be kept at {shown(path)}: its file system lacks the shared memory "
                "that SQLite's write-ahead log needs; name a path on a local disk"
            )
        migrate(connection, path, version)
        if not os.access(path, os.W_OK):
            # SQLite then reads without a word, and refuses the first write
            connection.execute("BEGIN")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            roll_back(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection, path: str, version: int) -> None:
    """Lead a file of a version to the newest, each step as one transaction.

    Raises:
        HistoryError: something of the user's own has a name that the newest version needs.
    """
    connection.create_function("exit_code", 1, code_in)
    for number in range(version + 1, VERSION + 1) if version else (VERSION,):
        with transaction(connection):
            # also of the versions after it: none is half way for a stranger's sake
            for name in _made_by(VERSION).keys() - _made_by(number - 1 if version else 0):
                if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ? COLLATE NOCASE",
                                      (name,)).fetchone():
                    raise HistoryError(
                        f"the history {shown(path)} has something named {name!r} that is not "
                        "bgworker's, which needs the name now; rename it in the sqlite3 shell")
            # of the user's own: they go with the table when that is made anew
            indexes = [sql for name, (kind, sql) in _objects(connection, _made_by(version)).items()
                       if kind == "index" and name not in _made_by(number - 1)]
            for statement in (*STEPS[number - 2], *indexes) if version else MADE[-1]:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {number}")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write as one transaction, which is rolled back if anything is raised inside. The caller holds
    the file's lock."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        roll_back(connection)
        raise


def roll_back(connection: sqlite3.Connection) -> None:
    """End a transaction that failed; SQLite may have done so by itself. What led here tells more
    than an error here."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        return


# ---------------------------------------------------------------- the check

def check_kind(path: str, *, is_written: bool = False) -> None:
    """See that a history, and what lies beside it, are regular files, or not there.

    Opening a FIFO may block, and a link or a second name may lead to a file of somebody else's. A
    file that is only read may belong to anybody.

    Raises:
        HistoryError: they are not.
    """
    ending = ""
    owners: tuple[int, ...] = ()
    try:
        target = followed(path)
        for ending in ("", "-wal", "-shm", "-journal"):
            try:
                status = os.lstat(target + ending)
            except OSError:
                continue  # it is not there; or opening it says what is wrong
            if not ending and not is_written and stat.S_ISREG(status.st_mode):
                owners = (status.st_uid,)
            else:
                check_file(target + ending, status, *owners)
    except FileExistsError as error:
        raise HistoryError(f"cannot use {shown(path + ending)}: {error.strerror}") from error


def check(connection: sqlite3.Connection, path: str) -> int:
    """Return the version of the history in an open file; 0 when there is nothing in it yet.

    Raises:
        HistoryError: it is not a database, damaged, of another program, of a newer version, or not
            as bgworker makes it.
    """
    with damage_told(path):
        # one view of it all, though another process may just be making the file
        connection.execute("BEGIN")
        try:
            with bounded(connection, path):
                return _check(connection, path)
        finally:
            roll_back(connection)


@contextmanager
def damage_told(path: str) -> Iterator[None]:
    """Raise `HistoryError` for what a damaged file makes SQLite raise, or us; other trouble
    passes."""
    try:
        yield
    except (BgworkerError, sqlite3.OperationalError):
        raise
    except (sqlite3.DatabaseError, ValueError, LookupError, TypeError, OverflowError,
            MemoryError) as error:
        if "not a database" in str(error):
            raise _no_database(path) from error
        raise damaged(path, error) from error


def damaged(path: str, what: object) -> HistoryError:
    """Return the error for a file with something in it that cannot be."""
    return HistoryError(
        f"the history {shown(path)} is damaged ({what or 'a value is too large'}); move "
        "it aside, and recover what is in it with the .recover command of the "
        "sqlite3 shell"
    )


def _check(connection: sqlite3.Connection, path: str) -> int:
    size = os.path.getsize(path)
    connection.execute("PRAGMA cache_size = -2000")  # KiB, as by default; the file may ask for more
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    is_empty = connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
    if is_empty and not (application_id or version):
        if size and connection.execute("PRAGMA page_count").fetchone() == (0,):
            # SQLite takes a file of a few bytes for an empty one, and writes over it
            raise _no_database(path)
        return 0
    if application_id != APPLICATION_ID:
        remedy = "name another path"
        for number in range(1, VERSION + 1):
            expected = _made_by(number)
            if _objects(connection, expected) == expected:
                remedy = ("if it is a history that was restored from a dump, mark it as one in the "
                          f"sqlite3 shell: PRAGMA application_id = {APPLICATION_ID}; "
                          f"PRAGMA user_version = {number};")
        raise HistoryError(
            f"{shown(path)} belongs to another program: its application_id is {application_id}, "
            f"that of a history {APPLICATION_ID}; {remedy}"
        )
    if version > VERSION:
        raise HistoryError(
            f"the history {shown(path)} has version {version}, and this bgworker knows versions up "
            f"to {VERSION}; upgrade bgworker, or name another path"
        )
    expected = _made_by(max(version, 0))
    found = _objects(connection, expected)
    ours = [name for name, (kind, _) in expected.items() if kind != "index"]
    missing = [name for name in ours if name not in found]
    if missing or version < 1:
        raise HistoryError(
            f"the history {shown(path)} is damaged: it lacks "
            f"{', '.join(missing) or 'its version'}; move it aside"
        )
    for name, (kind, sql) in found.items():
        if (kind, sql) != expected.get(name):
            _refuse_stranger(path, name, kind, sql, expected)
    for name in ours:
        if expected[name][0] == "table":  # a look at its first page
            connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone()
    return int(version)


def _objects(connection: sqlite3.Connection, expected: Objects) -> Objects:
    """Return type and text, by name, of our objects and of those that may act on them.

    Args:
        expected: what is ours.
    """
    ours = ", ".join([f"'{name}'" for name, (kind, _) in expected.items() if kind != "index"])
    return {name: (kind, sql) for name, kind, sql in connection.execute(
        "SELECT name, type, sql FROM sqlite_master WHERE sql IS NOT NULL "
        f"AND (type = 'trigger' OR tbl_name COLLATE NOCASE IN ({ours}))")}


def _refuse_stranger(path: str, name: str, kind: str, sql: str, expected: Objects) -> None:
    """Refuse what could make SQLite run what somebody else wrote; an index of columns does not."""
    if name in expected:
        raise HistoryError(
            f"the history {shown(path)} could do harm: its {kind} {name!r} is not the "
            f"{expected[name][0]} that bgworker makes; move it aside"
        )
    if kind != "index" or not _PLAIN_INDEX.fullmatch(sql):
        raise HistoryError(
            f"the history {shown(path)} could do harm: its {kind} {name[:80]!r} is not "
            "bgworker's; look at it in the sqlite3 shell, and remove it with "
            f"DROP {kind.upper()}"
        )


@lru_cache
def _made_by(version: int) -> Objects:
    """Return the objects of a file of a version, type and text by name; none for 0."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in MADE[version - 1] if version else ():
            connection.execute(statement)
        return {name: (kind, sql) for name, kind, sql in connection.execute(
            "SELECT name, type, sql FROM sqlite_master "
            "WHERE sql IS NOT NULL AND name != 'sqlite_sequence'")}


def _no_database(path: str) -> HistoryError:
    return HistoryError(
        f"{shown(path)} is not a history: it is no SQLite file, or an encrypted one; name another "
        "path"
    )


def _judge(path: str) -> None:
    """Look at a file through a connection that cannot change it: closing one that could might run a
    checkpoint."""
    if not os.path.exists(path):
        return
    try:
        with closing(_connect(path, "ro")) as connection:
            check(connection, path)
    except sqlite3.OperationalError:
        # A killed process has left work that only a writer can finish. For any other reason the
        # connection that writes will fail, too.
        return


# ---------------------------------------------------------------- connections

@contextmanager
def bounded(connection: sqlite3.Connection, path: str,
            patience: float | None = None) -> Iterator[None]:
    """Bound what the questions inside cost by the size of the file, and let Ctrl-C end them.

    In a damaged tree each page may lead to the next many times, and what it holds seems endless.

    Args:
        patience: seconds that they may take; None is no bound.

    Raises:
        HistoryError: they took more steps than they can need for all rows of such a file.
        TookTooLong: they took longer.
    """
    left: int | None = None  # calls of the handler; most questions never make the first
    deadline = None if patience is None else monotonic() + patience
    is_late = False

    def goes_on_for_too_long() -> bool:
        nonlocal left, is_late
        if left is None:
            left = (_STEPS_AT_LEAST + _STEPS_A_BYTE * _size(path)) // _VM_STEPS
        left -= 1
        is_late = deadline is not None and monotonic() > deadline
        return left < 0 or is_late

    connection.set_progress_handler(goes_on_for_too_long, _VM_STEPS)
    try:
        yield
    except sqlite3.OperationalError as error:
        if str(error) != "interrupted":
            raise
        if is_late:
            raise TookTooLong(
                f"a question to the history {shown(path)} took longer than {patience:g} s; ask for "
                "a shorter time, one run, or less at once") from error
        if left is None or left >= 0:
            raise KeyboardInterrupt from None  # it was raised in the handler, and lost there
        raise damaged(path, "a question takes longer than any can in such a file") from error
    finally:
        connection.set_progress_handler(None, 0)


def _size(path: str) -> int:
    """Return the bytes of the file and its log."""
    names = path, os.path.realpath(path) + "-wal"
    return sum(os.path.getsize(name) for name in names if os.path.exists(name))


def _connect(path: str, mode: str, patience: float | None = None) -> sqlite3.Connection:
    # a path may hold ? and #; urllib.parse alone does not load urllib.request, which is slow
    from urllib.parse import quote

    absolute = os.path.abspath(path).replace(os.sep, "/")
    uri = "file://" + ("" if absolute.startswith("/") else "/") + quote(os.fsencode(absolute))
    connection = sqlite3.connect(f"{uri}?mode={mode}", isolation_level=None,
                                 timeout=BUSY_SECONDS if patience is None else patience,
                                 check_same_thread=False, uri=True)
    connection.text_factory = _text
    connection.execute("PRAGMA trusted_schema = OFF")
    if sys.version_info >= (3, 12):  # after the check, too, somebody may add a trigger
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, False)
    if sys.version_info >= (3, 11) and mode.startswith("ro"):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_TEXT)
    return connection


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")  # SQLite takes any bytes for text
