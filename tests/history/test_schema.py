"""The history file: made, known again, refused when it is something else, and led from one version
to the next."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.histories import rows_of

from bgworker import History, LifecycleEvent, Scheduler, current_task
from bgworker.history import presence, schema
from bgworker.history.sink import SqliteSink
from bgworker.model.errors import HistoryError, PermanentSinkError
from tests.support import exit_code, forked, needs_fork


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "h?is%20t#\u00f6ry.db")


def make(path: str) -> None:
    """Make a history with a run, a task and two rows of its streams."""
    connection = schema.connect_to_write(path)
    connection.execute("INSERT INTO runs (run_id) VALUES ('r')")
    connection.execute("INSERT INTO tasks (id, run_id, name, status, created_utc, last_seq) "
                       "VALUES ('t', 'r', 'load', 'running', '2026-11-23T14:46:00.000000Z', 3)")
    connection.execute(
        "INSERT INTO zz_stream_rows VALUES (1, 4, 0, 1795445160123456, 'hello', NULL, NULL, NULL), "
        "(1, 5, 4, 1795445160000007, 'half', 50.0, NULL, NULL), "
        "(1, 6, 1, 1795445161000000, '[1]', NULL, 9, 1)"
    )
    connection.close()


def make_old(path: str, version: int = 1) -> None:
    """Make a history of an old version, as bgworker left it then."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        for statement in schema.MADE[version - 1]:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("INSERT INTO runs (run_id) VALUES ('r')")
        connection.executemany(
            "INSERT INTO tasks (key, id, run_id, name, status, script_id, failure_type, "
            "failure_message, created_utc, completed_utc, last_seq) "
            "VALUES (?, ?, 'r', ?, ?, ?, ?, ?, '2026-11-23', '2026-11-23', 3)", OLD)
        if version >= 2:
            connection.executemany("UPDATE tasks SET exit_code = ? WHERE key = ?",
                                   zip(OLD_CODES, [row[0] for row in OLD]))
        connection.execute(
            f"INSERT INTO {STREAMS_OF[version]} "
            "VALUES (7, 4, 0, 1795445160123456, 'hello', NULL, NULL, NULL)")


FAILED_COMMAND = "failed", "sh", "subprocess.CalledProcessError"
OLD: list[tuple[Any, ...]] = [
    (2, "a", "load", "completed", "mod:load", None, None),
    (3, "b", "true", "completed", "true", None, None),
    (5, "c", "one", *FAILED_COMMAND, "Command '['sh']' returned non-zero exit status 3."),
    (7, "d", "two", *FAILED_COMMAND, "Command 'sh' died with <Signals.SIGKILL: 9>."),
    (8, "e", "three", *FAILED_COMMAND, b"Command \xff died with unknown signal 60."),
    (9, "f", "four", *FAILED_COMMAND, "exit status 3. was what it did not say"),
    (11, "g", "five", "failed", "sh", "OSError", "a returned non-zero exit status 3."),
    (12, "h", "six", "running", "sleep", None, None)]
OLD_CODES = [None, 0, 3, -9, -60, None, None, None]
STREAMS_OF = {1: "stream_rows", 2: "zz_stream_rows"}
in_each_old_version = pytest.mark.parametrize("version", range(1, schema.VERSION))


def version_of(path: str) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


def fingerprint(path: str) -> tuple[bytes, int]:
    return Path(path).read_bytes(), os.stat(path).st_mtime_ns


# -- a file of ours --


def test_the_texts_of_a_released_version_never_change() -> None:
    """Objects whose text is another are taken for somebody else's: existing files would be
    refused."""
    released = ["ad83987928c71c469f1586fcf8f317d380d5e7ccaee75feb84f628704f0e114a",
                "a2dc2da30b8a989a72c942e56f1f8d01baa9d14d072d8242c823251b2388a1ac",
                "8ff994d1ed66808eeb30d2a1086c5e557638a032aed041b0dd473b60576d1ac9"]
    assert [hashlib.sha256(repr(made).encode()).hexdigest() for made in schema.MADE] == released


def test_a_new_file_is_known_by_its_ids_and_shrinks_on_demand(path: str) -> None:
    schema.connect_to_write(path).close()
    connection = schema.connect_to_read(path)
    assert connection.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)
    assert connection.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
    assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_an_empty_file_becomes_a_history(path: str) -> None:
    Path(path).touch()
    schema.connect_to_write(path).close()
    assert version_of(path) == schema.VERSION


def test_opening_again_keeps_what_is_there(path: str) -> None:
    make(path)
    connection = schema.connect_to_write(path)
    assert connection.execute("SELECT name FROM tasks").fetchall() == [("load",)]
    connection.close()


def test_the_view_of_the_streams_reads_well_and_finds_a_task_by_its_id(path: str) -> None:
    make(path)
    connection = schema.connect_to_read(path)
    found = connection.execute("SELECT * FROM task_streams WHERE task_id = 't'")
    assert [column[0] for column in found.description] == [
        "task_id",
        "seq",
        "stream_type",
        "payload",
        "format",
        "truncated",
        "created_utc",
        "percent",
        "original_bytes",
    ]
    assert found.fetchall() == [
        ("t", 4, "output", "hello", "text", 0, "2026-11-23T14:46:00.123456Z", None, None),
        ("t", 5, "progress", "half", "text", 0, "2026-11-23T14:46:00.000007Z", 50.0, None),
        ("t", 6, "error", "[1]", "json", 1, "2026-11-23T14:46:01.000000Z", None, 9)]
    plan = " ".join(
        row[3]
        for row in connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM task_streams WHERE task_id = 't'"
        )
    )
    assert "SCAN" not in plan, plan
    connection.close()


def test_the_views_for_people_read_well(path: str) -> None:
    make(path)
    with closing(schema.connect_to_write(path)) as connection:
        connection.execute(
            "UPDATE tasks SET id = '01a21fe34af37cb080e7418d5258d925', duration_sec = 1.23456, "
            "started_utc = '2026-11-23T14:46:00.500000Z', last_progress_msg = 'half'")
        connection.execute("UPDATE runs SET started_utc = '2026-11-23T14:45:59.000000Z', "
                           "ended_utc = '2026-11-23T14:46:02.250000Z', host = 'here'")
        connection.execute("UPDATE zz_stream_rows SET payload = printf('%.300c', 'x') "
                           "WHERE seq = 6")

        def told() -> tuple[Any, ...]:
            ((_, *rest),) = connection.execute(
                "SELECT name, status, started, seconds, message, id, run FROM tasks_readable")
            return tuple(rest)

        start = "2026-11-23 14:46:00"
        assert told() == ("running", start, 1.235, "half", "5258d925", "r")
        for change, message in (
            ("exit_code = 3, failure_type = 'E', failure_message = 'long'", "exit code 3"),
            ("exit_code = -9", "signal 9"), ("exit_code = NULL", "E: long"),
            ("failure_type = NULL, failure_message = 'not needed'", "not needed"),
            ("failure_message = printf('%.300c', 'x')", 200 * "x"),
            ("failure_message = NULL, last_progress_msg = NULL", "")):
            connection.execute(f"UPDATE tasks SET {change}")
            assert told()[3] == message
        assert connection.execute("SELECT time, task, stream, line, id FROM output").fetchall() == [
            (f"{start}.123", "load", "output", "hello", "5258d925"),
            ("2026-11-23 14:46:01.000", "load", "error", 200 * "x", "5258d925")]
        found = connection.execute("SELECT * FROM runs_summary")
        assert dict(zip([column[0] for column in found.description], found.fetchone())) == {
            "run": "r", "started": "2026-11-23 14:45:59", "seconds": 3.25, "tasks": 1,
            "completed": 0, "failed": 0, "timed_out": 0, "cancelled": 0, "interrupted": 0,
            "task_seconds": 1.235, "host": "here"}
        connection.execute("UPDATE runs SET run_id = '01a21fe34af30000f59e12225258d925'")
        connection.execute("UPDATE tasks SET run_id = (SELECT run_id FROM runs)")
        assert told()[4:] == ("80e7418d5258d925", "5258d925"), "the end is that of the process"
        plan = " ".join(row[3] for row in connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM tasks_readable LIMIT 50"))
        assert "TEMP B-TREE" not in plan, plan


def test_the_view_of_tasks_calls_nothing_that_sqlite_alone_has(path: str) -> None:
    """Otherwise DuckDB, which reads the texts of views, makes texts of their numbers."""
    make(path)
    with closing(schema.connect_to_write(path)) as connection:
        ((text,),) = connection.execute(
            "SELECT sql FROM sqlite_master WHERE name = 'tasks_readable'")
    assert set(re.findall(r"(\w+)\(", text)) == {"replace", "substr", "round", "coalesce"}


def test_every_reference_is_declared_and_checked_by_sqlite(path: str) -> None:
    make(path)
    connection = schema.connect_to_write(path)
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.execute("DELETE FROM tasks")
    assert {(row[0], row[2]) for row in connection.execute("PRAGMA foreign_key_check")} == {
        ("zz_stream_rows", "tasks")
    }
    connection.close()


def test_keys_have_no_gaps_however_often_a_row_is_written(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    with Scheduler(2, sinks=[SqliteSink(path)]) as pool:
        for _ in range(5):
            pool.submit(current_task().sleep, 0.0).result()
            assert pool.flush(30)
    assert rows_of(path, "SELECT key FROM tasks ORDER BY id") == [(key,) for key in range(1, 6)]
    tables = [name for name, in rows_of(path, "SELECT name FROM sqlite_master WHERE type = 'table' "
                                              "ORDER BY name")]
    assert tables == ["losses", "runs", "scripts", "tasks", "zz_requests", "zz_stream_rows"]


def test_a_reader_cannot_write_and_leaves_the_file_as_it_is(path: str) -> None:
    make(path)
    before = fingerprint(path)
    connection = schema.connect_to_read(path)
    connection.execute("SELECT * FROM tasks").fetchall()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM tasks")
    connection.close()
    assert fingerprint(path) == before


def test_a_reader_sees_what_a_writer_has_only_in_its_log(path: str) -> None:
    make(path)
    writer = schema.connect_to_write(path)
    writer.execute("UPDATE tasks SET name = 'new'")
    reader = schema.connect_to_read(path)
    assert reader.execute("SELECT name FROM tasks").fetchone() == ("new",)
    reader.close()
    writer.close()


# -- a file that is not ours --


def foreign_database(path: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA application_id = 1196444487")  # GeoPackage's
    connection.execute("CREATE TABLE tasks (id)")
    connection.commit()
    connection.close()


def nameless_database(path: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE tasks (id)")
    connection.commit()
    connection.close()


def database_without_tables(path: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA application_id = 7")
    connection.close()


def newer_history(path: str) -> None:
    make(path)
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.execute("DROP VIEW task_streams")
    connection.commit()
    connection.close()


def text_file(path: str) -> None:
    Path(path).write_text("these are my notes\n" * 100)


def short_file(path: str) -> None:
    Path(path).write_bytes(b"x")


def truncated_history(path: str) -> None:
    make(path)
    os.truncate(path, os.path.getsize(path) // 2)


def scrambled_history(path: str) -> None:
    make(path)
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * 2000)


def history_without_a_table(path: str) -> None:
    make(path)
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE losses")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            foreign_database,
            "belongs to another program: its application_id is 1196444487.*name another path",
        ),
        (
            nameless_database,
            "belongs to another program: its application_id is 0.*name another path",
        ),
        (database_without_tables, "belongs to another program: its application_id is 7"),
        (
            newer_history,
            rf"has version {schema.VERSION + 1}, and this bgworker knows versions up to "
            rf"{schema.VERSION}; upgrade",
        ),
        (text_file, "is no SQLite file"),
        (short_file, "is no SQLite file"),
        (truncated_history, "is damaged.*move it aside"),
        (scrambled_history, "is damaged.*move it aside"),
        (history_without_a_table, "is damaged: it lacks losses; move it aside"),
    ],
)
@pytest.mark.parametrize("connect", [schema.connect_to_read, schema.connect_to_write])
def test_a_file_that_cannot_be_used_is_refused_with_its_reason_and_left_as_it_is(
    path: str, spoil: Callable[[str], None], said: str, connect: Callable[[str], sqlite3.Connection]
) -> None:
    spoil(path)
    before = fingerprint(path)
    with pytest.raises(HistoryError, match=said) as caught:
        connect(path)
    assert path in str(caught.value)
    assert fingerprint(path) == before


def test_a_foreign_file_whose_log_is_not_yet_checkpointed_is_left_as_it_is(path: str) -> None:
    program = (
        "import os, sqlite3, sys\nc = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA journal_mode = WAL')\nc.execute('CREATE TABLE t (a)')\nos._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=60)
    before = fingerprint(path), fingerprint(f"{path}-wal")
    assert before[1][0], "there is a log"
    with pytest.raises(HistoryError, match="another program"):
        schema.connect_to_write(path)
    assert (fingerprint(path), fingerprint(f"{path}-wal")) == before


@pytest.mark.parametrize("spoil", [None, lambda path: Path(path).touch()])
def test_there_is_nothing_to_read_where_no_history_has_been_made(
    path: str, spoil: Callable[[str], None] | None
) -> None:
    if spoil is not None:
        spoil(path)
    with pytest.raises(HistoryError, match="is empty" if spoil else "there is no history"):
        schema.connect_to_read(path)


def test_a_path_that_cannot_be_opened_is_an_error_of_sqlite(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        schema.connect_to_write(str(tmp_path / "missing" / "h.db"))
    assert os.listdir(tmp_path) == []


def bind_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)


@needs_fork
@pytest.mark.parametrize(("make_it", "kind"), [
    (os.mkdir, "a directory"), (lambda path: os.mkfifo(path), "a FIFO"), (bind_socket, "a socket"),
    (lambda path: os.symlink("/dev/zero", path), "a device")])
@pytest.mark.parametrize("beside", ["", "-wal", "-shm"])
def test_what_is_no_regular_file_is_refused_without_being_opened(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_it: Callable[[str], None], kind: str,
        beside: str) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    if beside:
        make("h.db")
    make_it("h.db" + beside)
    there = sorted(os.listdir())
    kind = "a symbolic link" if beside and os.path.islink("h.db" + beside) else kind
    said = f"h.db{beside}': it is {kind}.*regular file; name another"
    for use in (schema.connect_to_read, schema.connect_to_write, History,
                lambda path: SqliteSink(path).open()):
        with pytest.raises((HistoryError, PermanentSinkError), match=said):
            use("h.db")
    assert sorted(os.listdir()) == there


# -- what could make SQLite run what somebody else wrote --

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
LONG = "printf('%.*c', 90, 'x')"  # as well a gigabyte


def view_instead(path: str, table: str) -> str:
    fields = ", ".join(f"i AS {row[1]}" for row in rows_of(path, f"PRAGMA table_info({table})"))
    return f"ALTER TABLE {table} RENAME TO old; CREATE VIEW {table} AS {ENDLESS.format(fields)}"


def declared_anew(old: str, new: str) -> str:
    new = new.replace("'", "''")
    return f"UPDATE sqlite_master SET sql = replace(sql, '{old}', '{new}') WHERE name = 'tasks'"


HARMFUL: dict[str, str] = {
    "trigger on a table": "CREATE TRIGGER evil AFTER DELETE ON tasks BEGIN SELECT 1; END",
    "trigger on a table spelt otherwise": "CREATE TRIGGER evil DELETE ON TASKS BEGIN SELECT 1; END",
    "trigger on the view":
        "CREATE TRIGGER evil INSTEAD OF INSERT ON task_streams BEGIN SELECT 1; END",
    "trigger on a table of others":
        "CREATE TABLE other (a); CREATE TRIGGER evil INSERT ON other BEGIN SELECT 1; END",
    "another view of the tasks":
        f"DROP VIEW tasks_readable; CREATE VIEW tasks_readable AS {ENDLESS.format('i')}",
    "another view of the streams":
        f"DROP VIEW task_streams; CREATE VIEW task_streams AS {ENDLESS.format('i')}",
    "index of an expression": f"CREATE INDEX evil ON tasks(length({LONG}))",
    "partial index": f"CREATE INDEX evil ON tasks(name) WHERE length({LONG}) > length(name)",
    "index that refuses": "CREATE UNIQUE INDEX evil ON tasks(name)",
    "another collation": declared_anew("name TEXT", "name TEXT COLLATE strange"),
    "a check": declared_anew("name TEXT", f"name TEXT CHECK (length({LONG}) > 1)"),
    "a default": declared_anew("name TEXT", "name TEXT DEFAULT (abs(-9223372036854775808))"),
    "a generated column": f"ALTER TABLE tasks ADD COLUMN evil AS ({LONG})",
    "a virtual table":
        "ALTER TABLE losses RENAME TO old; CREATE VIRTUAL TABLE losses USING fts5(sink, reason)",
    "trigger on the requests":
        "CREATE TRIGGER evil AFTER INSERT ON zz_requests BEGIN DELETE FROM tasks; END",
    "another index of what was run again":
        f"DROP INDEX tasks_rerun; CREATE INDEX tasks_rerun ON tasks(name) WHERE {LONG} > 1",
    **dict.fromkeys(
        ("runs", "tasks", "zz_stream_rows", "losses", "scripts", "zz_requests"), "view"),
}


def spoil(path: str, sql: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(f"PRAGMA legacy_alter_table = ON; PRAGMA writable_schema = ON; {sql}; "
                             "PRAGMA writable_schema = OFF")
    connection.close()


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("connect", [schema.connect_to_read, schema.connect_to_write])
def test_a_history_whose_tables_are_not_ours_is_refused_before_anything_of_it_runs(
        path: str, name: str, connect: Callable[[str], sqlite3.Connection]) -> None:
    make(path)
    spoil(path, HARMFUL[name] if HARMFUL[name] != "view" else view_instead(path, name))
    before = fingerprint(path)
    with pytest.raises(HistoryError, match="could do harm: its [a-z]+ .+;") as caught:
        connect(path)
    assert re.search("move it aside|remove it with DROP (TRIGGER|INDEX)$", str(caught.value))
    assert fingerprint(path) == before


def test_what_others_added_that_runs_nothing_is_left_alone(path: str) -> None:
    make(path)
    spoil(path, 'CREATE INDEX mine ON tasks(failure_type, "name"); CREATE TABLE notes (a); '
          f"CREATE VIEW endless AS {ENDLESS.format('i')}; DROP INDEX tasks_name")
    for connect in (schema.connect_to_read, schema.connect_to_write):
        with closing(connect(path)) as connection:
            assert connection.execute("SELECT name FROM tasks").fetchall() == [("load",)]


def test_a_trigger_that_comes_later_does_not_run_where_python_can_keep_it(path: str) -> None:
    make(path)
    with closing(schema.connect_to_write(path)) as connection:
        spoil(
            path, "CREATE TRIGGER evil AFTER UPDATE ON tasks BEGIN DELETE FROM zz_stream_rows; END"
        )
        connection.execute("UPDATE tasks SET name = 'new'")
        (rows,) = connection.execute("SELECT count(*) FROM zz_stream_rows").fetchone()
        assert rows == (3 if sys.version_info >= (3, 12) else 0)


def test_a_history_that_was_restored_from_a_dump_is_told_how_to_become_one_again(path: str) -> None:
    make(path)
    spoil(path, "CREATE TABLE notes (a)")
    with closing(sqlite3.connect(f"{path}.new")) as target:
        target.executescript("\n".join(dump(path)))
    said = "restored from a dump, mark it as one in the sqlite3 shell: "
    with pytest.raises(HistoryError, match=said) as caught:
        schema.connect_to_read(f"{path}.new")
    spoil(f"{path}.new", str(caught.value).partition("shell: ")[2])
    schema.connect_to_write(f"{path}.new").close()
    with History(f"{path}.new") as history:
        assert [task.name for task in history.tasks()] == ["load"]


# -- what seems endless --

def endless_history(path: str) -> None:
    """Make a tree of eight levels of pages, each of which names the next one a hundred times."""
    make(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("VACUUM")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master "
                                     "WHERE name = 'runs'").fetchone()
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        leaf = data[(root - 1) * 4096:root * 4096]
        first = len(data) // 4096 + 1
        for page in [root, *range(first, first + 7)]:
            child = first if page == root else page + 1
            cells = b"".join(struct.pack(">IB", child, number + 1) for number in range(100))
            head = struct.pack(">BHHHBI", 5, 0, 100, 4096 - len(cells), 0, child)
            where = struct.pack(">100H", *range(4096 - len(cells), 4096, 5))
            made = (head + where).ljust(4096 - len(cells), b"\0") + cells
            data[(page - 1) * 4096:page * 4096] = made
        data[(first + 7 - 1) * 4096:] = leaf
        struct.pack_into(">I", data, 28, len(data) // 4096)
        file.seek(0)
        file.write(data)


def test_a_question_that_would_never_end_is_ended_as_damage(path: str) -> None:
    endless_history(path)
    with closing(schema.connect_to_read(path)) as connection:
        with pytest.raises(HistoryError, match="is damaged .a question takes longer than any"):
            with schema.bounded(connection, path):
                connection.execute("SELECT host FROM runs WHERE host IS NOT NULL").fetchall()


@needs_fork
def test_ctrl_c_ends_a_question(path: str) -> None:
    endless_history(path)
    os.truncate(path, 2**40)  # a hole; a question about a file of this size may take hours
    asked = threading.Event()

    def interrupt() -> None:
        assert asked.wait(60)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with closing(schema.connect_to_read(path)) as connection:
        connection.set_trace_callback(lambda sql: asked.set() if "host" in sql else None)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt), schema.bounded(connection, path):
            connection.execute("SELECT host FROM runs WHERE host IS NOT NULL").fetchall()
        thread.join(60)
        assert not thread.is_alive()


def test_the_cache_is_as_large_as_we_say_whatever_the_file_asks_for(path: str) -> None:
    make(path)
    spoil(path, "PRAGMA default_cache_size = 1000000")
    for connect in (schema.connect_to_read, schema.connect_to_write):
        with closing(connect(path)) as connection:
            assert connection.execute("PRAGMA cache_size").fetchone() == (-2000,)


# -- from one version to the next --


@in_each_old_version
def test_an_old_file_becomes_the_same_as_a_new_one_and_keeps_what_is_in_it(
        path: str, version: int) -> None:
    make_old(path, version)
    kept = schema._KEPT
    before = (rows_of(path, f"SELECT {kept} FROM tasks"),
              rows_of(path, f"SELECT * FROM {STREAMS_OF[version]}"))
    schema.connect_to_write(path).close()
    schema.connect_to_write(f"{path}.new").close()
    objects = ("SELECT type, name, tbl_name, sql FROM sqlite_master "
               "WHERE name != 'sqlite_sequence' ORDER BY name")
    assert rows_of(path, objects) == rows_of(f"{path}.new", objects)
    assert version_of(path) == schema.VERSION
    assert before == (rows_of(path, f"SELECT {kept} FROM tasks"),
                      rows_of(path, "SELECT * FROM zz_stream_rows"))
    assert rows_of(path, "SELECT exit_code, result_json, rerun_of FROM tasks ORDER BY key") == [
        (code, None, None) for code in OLD_CODES]
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows_of(path, "PRAGMA foreign_key_check") == []
    for view in ("tasks_readable", "output", "runs_summary", "task_streams"):
        assert rows_of(path, f"SELECT * FROM {view}"), view


@in_each_old_version
def test_an_index_of_the_users_own_outlives_the_step_to_the_next_version(
        path: str, version: int) -> None:
    make_old(path, version)
    mine = 'CREATE INDEX mine ON tasks(failure_type, "name")'
    spoil(path, f"{mine}; DROP INDEX tasks_name")
    schema.connect_to_write(path).close()
    indexes = dict(rows_of(path, "SELECT name, sql FROM sqlite_master WHERE type = 'index'"))
    assert indexes["mine"] == mine and "tasks_name" in indexes


@in_each_old_version
def test_an_old_file_is_read_as_it_is(path: str, version: int) -> None:
    make_old(path, version)
    before = fingerprint(path)
    with History(path) as history:
        with history._asking() as connection:
            assert connection.execute("SELECT result_json, rerun_of FROM tasks").fetchall() == [
                (None, None)] * len(OLD)
            assert connection.execute("SELECT task_id, reason, created_utc, seen_utc "
                                      "FROM zz_requests").fetchall() == []
            (plan,) = connection.execute(
                "EXPLAIN QUERY PLAN SELECT name FROM tasks WHERE id = 'a'").fetchall()
            assert "SEARCH" in plan[3], "as fast as in a new one"
        assert [event.payload for event in history.streams("two")] == ["hello"]
        assert [task.name for task in history.tasks(limit=2)] == ["six", "five"]
        assert sum(history.counts().values()) == len(OLD) == len(
            [event for event in history.events() if isinstance(event, LifecycleEvent)])
    assert fingerprint(path) == before


@in_each_old_version
def test_a_reader_of_an_old_version_goes_on_after_the_file_was_led_to_the_next(
        path: str, version: int) -> None:
    make_old(path, version)
    with History(path) as history:
        assert [event.payload for event in history.streams("two")] == ["hello"]
        schema.connect_to_write(path).close()
        if version == 1:
            with pytest.raises(HistoryError, match="no such table.*try again"):
                history.streams("two")
        assert [event.payload for event in history.streams("two")] == ["hello"]


@pytest.mark.parametrize("version, name", [
    (1, "output"), (1, "TASKS_READABLE"), (1, "zz_requests"), (2, "ZZ_requests"),
    (2, "tasks_rerun")])
def test_what_has_a_name_that_the_next_version_needs_is_told_of_and_left_alone(
        path: str, version: int, name: str) -> None:
    make_old(path, version)
    spoil(path, f"CREATE TABLE {name} (mine)")
    before = dump(path)
    with History(path) as history:
        assert len(history.tasks()) == len(OLD)
    with pytest.raises(PermanentSinkError, match=f"named '{name.lower()}' that is not bgworker's"):
        SqliteSink(path).open()
    assert (version_of(path), dump(path)) == (version, before)


@pytest.mark.parametrize("version, point", [
    (version, point) for version, step in enumerate(schema.STEPS, 1)
    for point in range(len(step) + 1)])
def test_a_step_that_fails_half_way_leaves_the_version_before_it(
        path: str, version: int, point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old(path, version)
    before = dump(path)
    broken = (*schema.STEPS[version - 1][:point], "SELECT no_such_column FROM runs")
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS[:version - 1], broken))
    with pytest.raises(sqlite3.OperationalError, match="no_such_column"):
        schema.connect_to_write(path)
    assert (version_of(path), dump(path)) == (version, before)


def dump(path: str) -> list[str]:
    connection = sqlite3.connect(path)
    lines = list(connection.iterdump())
    connection.close()
    return lines


def upgrade(path: str, killed_at: int, version: int = 0) -> None:
    """Lead a file of a version to the newest, or make it so, in a process that is killed as SQLite
    begins the statement of that number."""
    connection = schema._connect(path, "rw" if version else "rwc")
    left = killed_at

    def count(statement: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    connection.set_trace_callback(count)
    if not version:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
    schema.migrate(connection, path, version)


@needs_fork
@in_each_old_version
def test_wherever_an_upgrade_is_killed_the_file_has_an_old_version_whole_or_the_new_one(
        path: str, version: int) -> None:
    make_old(path, version)
    dumps = {version: dump(path)}
    found = []
    for point in range(1, 200):
        code = exit_code(forked(lambda: upgrade(path, point, version)))
        found.append(version_of(path))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert dump(path) == dumps.setdefault(found[-1], dump(path))
        if found[-1] != version:  # it got to a version between; from the old one once more
            assert found[-1] > version
            os.remove(path)
            make_old(path, version)
    assert sorted(found) == found and {*found} == {*range(version, schema.VERSION + 1)}
    # more than the statements: some begin others of SQLite's own
    assert len(found) > sum(map(len, schema.STEPS[version - 1:])) + 4
    with closing(schema.connect_to_write(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert rows_of(path, "SELECT exit_code FROM tasks WHERE key = 5") == [(3,)]


@needs_fork
def test_a_file_whose_making_was_killed_at_any_statement_is_made_anew(path: str) -> None:
    for point in range(1, 100):
        here = f"{path}{point}"
        code = exit_code(forked(lambda: upgrade(here, point)))
        make(here if code else f"{here}.new")
        assert version_of(here) == schema.VERSION
        if code == 0:
            assert point > 15
            return
        assert code == -signal.SIGKILL
    raise AssertionError("it never came to an end")


# -- presence --


def test_the_byte_of_a_run_fits_a_lock_and_what_is_no_run_id_has_none() -> None:
    assert 1 <= (presence.byte_of("0" * 32) or 0) != presence.byte_of("f" * 32) <= 2**42
    assert [
        presence.byte_of(text) for text in ("", "-1", "0" * 31, "0" * 33, "G" * 32, "F" * 32)
    ] == [None] * 6
    assert presence.byte_of(b"0" * 32) is presence.byte_of(7) is None


@pytest.mark.skipif(not os.path.exists("/etc/machine-id"), reason="this machine has no id")
def test_the_byte_of_a_run_stays_the_same_when_the_name_of_the_machine_changes(
        monkeypatch: pytest.MonkeyPatch) -> None:
    before = presence.byte_of("0" * 32)
    monkeypatch.setattr("platform.node", lambda: "elsewhere.example")
    presence._machine.cache_clear()
    try:
        assert presence.byte_of("0" * 32) == before
    finally:
        presence._machine.cache_clear()
