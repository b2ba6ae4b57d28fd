"""Connections to SQLite that neither a fork nor the loss of their file can harm."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bgworker.history import connections
from bgworker.history.connections import Database
from tests.support import in_child, needs_fork

SOON = 30.0
@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "some.db")


class Opened:
    """Opens connections to a file in write-ahead mode, and keeps them to be looked at."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.all: list[sqlite3.Connection] = []

    def __call__(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS lines (text)")
        self.all.append(connection)
        return connection

    def alive(self) -> list[bool]:
        """Whether each of them is still open."""
        found = []
        for connection in self.all:
            try:
                connection.execute("SELECT 1")
            except sqlite3.ProgrammingError:
                found.append(False)
            else:
                found.append(True)
        return found


@pytest.fixture
def opened(path: str) -> Opened:
    return Opened(path)


@pytest.fixture
def database(path: str, opened: Opened) -> Iterator[Database]:
    database = Database(path, opened)
    yield database
    database.close()


def add(database: Database, text: str) -> None:
    with database as connection:
        connection.execute("INSERT INTO lines VALUES (?)", (text,))


def lines(database: Database) -> list[str]:
    with database as connection:
        return [text for text, in connection.execute("SELECT text FROM lines ORDER BY text")]


# -- one connection --


def test_a_connection_is_opened_by_its_first_use_and_kept(
    database: Database, opened: Opened
) -> None:
    assert (database.is_open, opened.all) == (False, [])
    add(database, "one")
    assert lines(database) == ["one"]
    assert (database.is_open, len(opened.all)) == (True, 1)


def test_after_a_close_the_next_use_opens_another_and_closing_twice_is_harmless(
        database: Database, opened: Opened) -> None:
    database.close()
    add(database, "one")
    database.close()
    database.close()
    assert (database.is_open, opened.alive()) == (False, [False])
    assert lines(database) == ["one"]
    assert opened.alive() == [False, True]


def test_what_hinders_the_opening_reaches_the_user_and_the_next_use_tries_again(
    path: str, opened: Opened
) -> None:
    troubles = [sqlite3.OperationalError("not now")]

    def connect() -> sqlite3.Connection:
        if troubles:
            raise troubles.pop()
        return opened()

    database = Database(path, connect)
    with pytest.raises(sqlite3.OperationalError, match="not now"):
        lines(database)
    assert not database.is_open
    assert lines(database) == []
    database.close()


def test_an_error_in_a_use_gives_the_connection_back(database: Database, opened: Opened) -> None:
    with (
        pytest.raises(sqlite3.OperationalError, match="no such table"),
        database as connection,
    ):
        connection.execute("SELECT * FROM nowhere")
    assert lines(database) == []
    assert len(opened.all) == 1


def test_one_thread_at_a_time_has_the_connection(database: Database) -> None:
    inside, most = 0, 0

    def use() -> None:
        nonlocal inside, most
        for _ in range(200):
            with database as connection:
                inside += 1
                most = max(most, inside)
                connection.execute("INSERT INTO lines VALUES ('x')")
                inside -= 1

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert (most, len(lines(database))) == (1, 600)


# -- a file that goes away --


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be deleted there")
def test_a_file_that_was_deleted_is_made_anew_and_the_old_connection_stays_open(
        path: str, database: Database, opened: Opened) -> None:
    add(database, "gone")
    for name in (path, f"{path}-wal", f"{path}-shm"):
        os.remove(name)
    assert lines(database) == []
    assert opened.alive() == [
        True,
        True,
    ], "closing the first would delete the log of the second by its name"
    add(database, "new")
    assert lines(database) == ["new"]


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced there")
def test_a_file_that_was_replaced_is_opened_and_the_log_of_the_new_one_left_alone(
        path: str, database: Database, opened: Opened) -> None:
    add(database, "old")
    for name in (path, f"{path}-wal", f"{path}-shm"):
        os.remove(name)
    other = Opened(path)()
    other.execute("INSERT INTO lines VALUES ('of the other')")
    assert lines(database) == ["of the other"]
    database.close()
    assert opened.alive() == [True, False]
    assert os.path.exists(f"{path}-wal"), "the other has it open"
    other.close()


# -- a fork --


@needs_fork
def test_no_connection_is_open_while_the_process_forks_and_both_sides_open_theirs_again(
        database: Database, opened: Opened) -> None:
    add(database, "before")
    assert in_child(
        lambda: (database.is_open, opened.alive(), lines(database), add(database, "child"))
    ) == ("(False, [False], ['before'], None)")
    assert opened.alive() == [False]
    add(database, "parent")
    assert lines(database) == ["before", "child", "parent"]


@needs_fork
def test_a_fork_waits_for_who_is_using_a_connection(database: Database) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def use() -> None:
        with database as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO lines VALUES ('whole')")
            inside.set()
            assert go_on.wait(SOON)
            connection.execute("COMMIT")

    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(SOON)
    monotonic = connections.monotonic

    def begun() -> float:  # the hook has asked for the time: it is about to wait
        go_on.set()
        return monotonic()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "monotonic", begun)
        patch.setattr(connections, "PATIENCE", SOON)
        answer = in_child(lambda: lines(database))
    thread.join(SOON)
    assert not thread.is_alive()
    assert answer == "['whole']", "the child may use the file, so nobody was inside SQLite"


@needs_fork
def test_past_its_patience_a_fork_goes_on_and_the_child_may_not_use_that_file(
    path: str, database: Database, opened: Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.05)
    inside, go_on = threading.Event(), threading.Event()

    def use() -> None:
        with database as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO lines VALUES ('late')")
            inside.set()
            assert go_on.wait(SOON)
            connection.execute("COMMIT")

    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(SOON)
    elsewhere = str(tmp_path / "elsewhere.db")
    other = Database(elsewhere, Opened(elsewhere))
    try:
        assert in_child(lambda: lines(database)) == (
            f"HistoryError: {os.path.realpath(path)!r} cannot be used in this process: it was "
            "forked while its parent "
            "was using the file, which took too long to wait for; name another path here"
        )
        again = Database(path, opened)
        assert in_child(lambda: lines(again)).startswith(
            "HistoryError: "
        ), "nor through another holder"
        assert in_child(lambda: lines(other)) == "[]", "other files it may use"
    finally:
        go_on.set()
        thread.join(SOON)
        other.close()
    assert not thread.is_alive()
    assert lines(database) == ["late"], "the parent goes on as if nothing had been"
    assert opened.alive() == [True]


@needs_fork
def test_a_fork_of_a_fork_may_use_the_file_too(database: Database) -> None:
    add(database, "first")
    assert in_child(
        lambda: (
            add(database, "second"),
            in_child(lambda: (add(database, "third"), lines(database))),
        )
    ) == ("(None, \"(None, ['first', 'second', 'third'])\")")
    assert lines(database) == ["first", "second", "third"]


def test_a_holder_that_is_forgotten_is_not_kept(path: str, opened: Opened) -> None:
    before = len(connections._databases)
    database = Database(path, opened)
    assert len(connections._databases) == before + 1
    database.close()
    del database
    assert len(connections._databases) == before
