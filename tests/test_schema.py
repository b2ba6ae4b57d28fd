"""The history file: made, known again, refused when it is something else, and led from one version to the next."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bgworker.history import schema
from bgworker.model.errors import HistoryError

ROOT = Path(schema.__file__).parents[2]
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")

SECOND_STEP = ("ALTER TABLE runs ADD COLUMN cwd TEXT", "UPDATE runs SET cwd = '?'", "CREATE INDEX runs_cwd ON runs(cwd)")
STEPS = (*schema.STEPS, SECOND_STEP)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "h?is%20t#\u00f6ry.db")


def make(path: str) -> None:
    """Make a history with a run, a task and two rows of its streams."""
    connection = schema.connect_to_write(path)
    connection.execute("INSERT INTO runs (run_id) VALUES ('r')")
    connection.execute("INSERT INTO tasks (id, run_id, name, status, created_utc, last_seq) "
                       "VALUES ('t', 'r', 'load', 'running', '2026-11-23T14:46:00.000000Z', 3)")
    connection.execute("INSERT INTO stream_rows VALUES (1, 4, 0, 1795445160123456, 'hello', NULL, NULL, NULL), "
                       "(1, 5, 4, 1795445160000007, 'half', 50.0, NULL, NULL), "
                       "(1, 6, 1, 1795445161000000, '[1]', NULL, 9, 1)")
    connection.close()


def version_of(path: str) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


def fingerprint(path: str) -> tuple[bytes, int]:
    return Path(path).read_bytes(), os.stat(path).st_mtime_ns


# -- a file of ours --


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
        "task_id", "seq", "stream_type", "payload", "format", "truncated", "created_utc", "percent", "original_bytes"]
    assert found.fetchall() == [
        ("t", 4, "output", "hello", "text", 0, "2026-11-23T14:46:00.123456Z", None, None),
        ("t", 5, "progress", "half", "text", 0, "2026-11-23T14:46:00.000007Z", 50.0, None),
        ("t", 6, "error", "[1]", "json", 1, "2026-11-23T14:46:01.000000Z", None, 9)]
    plan = " ".join(row[3] for row in connection.execute("EXPLAIN QUERY PLAN SELECT * FROM task_streams WHERE task_id = 't'"))
    assert "SCAN" not in plan, plan
    connection.close()


def test_every_reference_is_declared_and_checked_by_sqlite(path: str) -> None:
    make(path)
    connection = schema.connect_to_write(path)
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.execute("DELETE FROM tasks")
    assert {(row[0], row[2]) for row in connection.execute("PRAGMA foreign_key_check")} == {("stream_rows", "tasks")}
    connection.close()


def test_the_key_of_a_removed_task_is_not_given_to_another(path: str) -> None:
    make(path)
    connection = schema.connect_to_write(path)
    connection.execute("DELETE FROM stream_rows")
    connection.execute("DELETE FROM tasks")
    connection.execute("INSERT INTO tasks (id, name, status, created_utc, last_seq) VALUES ('u', '', 'running', '', 0)")
    assert connection.execute("SELECT key FROM tasks").fetchall() == [(2,)]
    connection.close()


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


@pytest.mark.parametrize(("spoil", "said"), [
    (foreign_database, "belongs to another program: its application_id is 1196444487.*name another path"),
    (nameless_database, "belongs to another program: its application_id is 0.*name another path"),
    (database_without_tables, "belongs to another program: its application_id is 7"),
    (newer_history, rf"has version {schema.VERSION + 1}, and this bgworker knows versions up to {schema.VERSION}; upgrade"),
    (text_file, "is no SQLite file"),
    (short_file, "is no SQLite file"),
    (truncated_history, "is damaged.*move it aside"),
    (scrambled_history, "is damaged.*move it aside"),
    (history_without_a_table, "is damaged: it lacks losses; move it aside"),
])
@pytest.mark.parametrize("connect", [schema.connect_to_read, schema.connect_to_write])
def test_a_file_that_cannot_be_used_is_refused_with_its_reason_and_left_as_it_is(
        path: str, spoil: Callable[[str], None], said: str, connect: Callable[[str], sqlite3.Connection]) -> None:
    spoil(path)
    before = fingerprint(path)
    with pytest.raises(HistoryError, match=said) as caught:
        connect(path)
    assert path in str(caught.value)
    assert fingerprint(path) == before


def test_a_foreign_file_whose_log_is_not_yet_checkpointed_is_left_as_it_is(path: str) -> None:
    program = ("import os, sqlite3, sys\nc = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
               "c.execute('PRAGMA journal_mode = WAL')\nc.execute('CREATE TABLE t (a)')\nos._exit(0)")
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=60)
    before = fingerprint(path), fingerprint(f"{path}-wal")
    assert before[1][0], "there is a log"
    with pytest.raises(HistoryError, match="another program"):
        schema.connect_to_write(path)
    assert (fingerprint(path), fingerprint(f"{path}-wal")) == before


@pytest.mark.parametrize("spoil", [None, lambda path: Path(path).touch()])
def test_there_is_nothing_to_read_where_no_history_has_been_made(path: str, spoil: Callable[[str], None] | None) -> None:
    if spoil is not None:
        spoil(path)
    with pytest.raises(HistoryError, match="is empty" if spoil else "there is no history"):
        schema.connect_to_read(path)


def test_a_path_that_cannot_be_opened_is_an_error_of_sqlite(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "h.db"):
        with pytest.raises(sqlite3.OperationalError, match="unable to open"):
            schema.connect_to_write(str(path))
    assert os.listdir(tmp_path) == []


# -- from one version to the next --


def test_a_file_of_version_1_is_led_to_the_next_and_keeps_what_is_in_it(path: str) -> None:
    make(path)
    connection = schema.connect_to_write(path, STEPS)
    assert connection.execute("SELECT run_id, cwd FROM runs").fetchall() == [("r", "?")]
    assert connection.execute("SELECT name FROM tasks").fetchall() == [("load",)]
    connection.close()
    assert version_of(path) == 2
    with pytest.raises(HistoryError, match="has version 2, and this bgworker knows versions up to 1; upgrade"):
        schema.connect_to_write(path)


@pytest.mark.parametrize("point", range(4))
def test_a_step_that_fails_half_way_leaves_the_version_before_it(path: str, point: int) -> None:
    make(path)
    before = dump(path)
    broken = (*schema.STEPS, (*SECOND_STEP[:point], "SELECT no_such_column FROM runs"))
    with pytest.raises(sqlite3.OperationalError, match="no_such_column"):
        schema.connect_to_write(path, broken)
    assert (version_of(path), dump(path)) == (1, before)


def dump(path: str) -> list[str]:
    connection = sqlite3.connect(path)
    lines = list(connection.iterdump())
    connection.close()
    return lines


UPGRADE = """
import os, signal, sys
from bgworker.history import schema
import test_schema
connection = schema._connect(sys.argv[1], "rw")
left = int(sys.argv[2])
def die(statement):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
connection.set_trace_callback(die)
schema.migrate(connection, int(sys.argv[3]), test_schema.STEPS)
"""




@posix
def test_wherever_an_upgrade_is_killed_the_file_has_the_old_version_whole_or_the_new_one(path: str) -> None:
    make(path)
    before = dump(path)
    found = []
    for point in range(1, 100):
        done = subprocess.run([sys.executable, "-c", UPGRADE, path, str(point), "1"], timeout=60, env={
            **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
        found.append(version_of(path))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert (found[-1], dump(path)) == (1, before)
    assert found == [1] * 7 + [2], "BEGIN, three statements, two ids, COMMIT: each of them was a place to be killed"
    connection = schema.connect_to_write(path, STEPS)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT cwd FROM runs").fetchall() == [("?",)]
    connection.close()


@posix
def test_a_file_whose_making_was_killed_at_any_statement_is_made_anew(path: str) -> None:
    program = UPGRADE.replace('schema._connect(sys.argv[1], "rw")', 'schema._connect(sys.argv[1], "rwc")').replace(
        "schema.migrate", 'connection.execute("PRAGMA auto_vacuum = INCREMENTAL"); '
        'connection.execute("PRAGMA journal_mode = WAL"); schema.migrate')
    for point in range(1, 100):
        here = f"{path}{point}"
        done = subprocess.run([sys.executable, "-c", program, here, str(point), "0"], timeout=60, env={
            **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
        make(here if done.returncode else f"{here}.new")
        assert version_of(here) == (1 if done.returncode else 2)
        if done.returncode == 0:
            assert point > 15
            return
    raise AssertionError("it never came to an end")


# -- presence --


def test_the_byte_of_a_run_fits_a_lock_and_what_is_no_run_id_has_none() -> None:
    assert schema.presence("0" * 32) == 1
    assert schema.presence("f" * 32) == 2**60
    assert [schema.presence(text) for text in ("", "-1", "0" * 31, "0" * 33, "G" * 32, "F" * 32)] == [None] * 6
