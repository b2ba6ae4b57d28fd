"""What pruning may not do to others: hold up a fork or a batch, or miscount."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing

import pytest
from tests.histories import RUN, Recorder, rows_of

from bgworker import History
from bgworker.history import connections, presence, retention, schema
from bgworker.history.connections import Database
from bgworker.history.presencelock import PresenceLock
from bgworker.model.ids import new_id
from bgworker.history.retention import Pruned, Retention, prune
from bgworker.model.errors import HistoryError
from tests.support import needs_fork

WAIT = 60.0
# ---------------------------------------------------------------- forks

def fork_while_asked(path: str, ask: Callable[[], object], asking: threading.Event) -> bool:
    """Fork with the lock held, as a writer holds it that waits for the fork; tell whether the child
    kept the file."""
    lock = PresenceLock.share(schema.lock_path(path))
    thread = threading.Thread(target=ask)
    try:
        with lock:
            thread.start()
            assert asking.wait(WAIT)
            child = os.fork()
            if not child:
                os._exit(os.path.realpath(path) in connections._lost)
            _, code = os.waitpid(child, 0)
        thread.join(WAIT)
        assert not thread.is_alive()
    finally:
        lock.leave()
    return code == 0


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a thread is about to ask the lock file whether a run is alive."""
    asks, is_alive = threading.Event(), presence.is_alive

    def tell(run_id: str, lock: PresenceLock) -> bool:
        asks.set()
        return is_alive(run_id, lock)

    monkeypatch.setattr("bgworker.history.reader.is_alive", tell)
    monkeypatch.setattr("bgworker.history.presence.is_alive", tell)
    return asks


@pytest.fixture
def unended(record: Recorder) -> None:
    record.task("job", "running", run_id=record.run(RUN, host=schema.this_host()))
    record.close()


@needs_fork
def test_a_history_that_is_asked_keeps_no_fork_waiting_for_the_lock_file(
    path: str, unended: None, asking: threading.Event
) -> None:
    with History(path) as history:
        asking.clear()
        assert fork_while_asked(path, history.counts, asking)


@needs_fork
def test_a_look_at_what_is_to_be_pruned_keeps_no_fork_waiting_for_the_lock_file(
    path: str, unended: None, asking: threading.Event
) -> None:
    database = Database(path, lambda: schema.connect_to_read(path))
    lock = PresenceLock.share(schema.lock_path(path))
    try:
        assert fork_while_asked(path, lambda: Retention(max_tasks=1).look(database, lock), asking)
    finally:
        database.close()
        lock.leave()


@needs_fork
def test_the_harness_would_notice_who_asks_the_lock_file_with_the_connection_in_use(
        path: str, unended: None, asking: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.05)
    database = Database(path, lambda: schema.connect_to_read(path))
    lock = PresenceLock.share(schema.lock_path(path))

    def ask() -> None:
        with database:
            presence.is_alive(RUN, lock)

    try:
        assert not fork_while_asked(path, ask, asking)
    finally:
        database.close()
        lock.leave()


# ---------------------------------------------------------------- steps

def steps_of(path: str, **bounds: int) -> list[int]:
    """Prune to these bounds; return how many rows each step removed."""
    bounded, connection, found = Retention(**bounds), schema.connect_to_write(path), []
    database, lock = Database(path, lambda: schema.connect_to_write(path)), PresenceLock.share(
        schema.lock_path(path)
    )
    try:
        bounded.look(database, lock)
        while bounded.step(connection):
            found.append(bounded.removed_rows - sum(found))
    finally:
        connection.close()
        database.close()
        lock.leave()
    return [rows for rows in found if rows]


def test_a_step_removes_fewer_rows_when_they_are_long(record: Recorder, path: str) -> None:
    for number in range(2):
        task_id = record.task(f"{number}")
        record.connection.execute("BEGIN")
        for seq in range(4, 104):
            record.said(task_id, "x" * 60_000, seq=seq)
        record.connection.execute("COMMIT")
    steps = steps_of(path, max_tasks=0)
    assert sum(steps) == 200 and max(steps) == 18, "a MiB, and a rest of one row"
    assert rows_of(path, "SELECT count(*) FROM tasks") == [(0,)]


def test_a_step_removes_many_rows_of_many_tasks_when_they_are_short(
    record: Recorder, path: str
) -> None:
    for number in range(3):
        record.many_said(record.task(f"{number}"), 1500)
    assert steps_of(path, max_tasks=1) == [2000, 1000]
    assert rows_of(path, "SELECT count(*) FROM zz_stream_rows") == [(1500,)]
    assert rows_of(path, "SELECT count(*) FROM tasks") == [(1,)]


def test_a_row_longer_than_a_step_goes_alone(record: Recorder, path: str) -> None:
    task_id = record.task("talks")
    for seq in (4, 5):
        record.said(task_id, "x" * (2 * retention.MOST_CHARACTERS), seq=seq)
    assert steps_of(path, max_tasks=0) == [1, 1]


# ---------------------------------------------------------------- dead tasks in great number

def many_tasks(record: Recorder, count: int, run_id: str, status: str = "running") -> None:
    record.connection.execute("BEGIN")
    for number in range(count):
        record.task(str(number), status, run_id=run_id, created=record.ago(days=2))
    record.connection.execute("COMMIT")


def test_a_trial_counts_all_tasks_of_dead_runs(record: Recorder, path: str) -> None:
    for number in (1, 2):
        many_tasks(
            record, retention.MOST_LOOKED_AT + 200, record.run(new_id(number), ended=record.now)
        )
    would = prune(path, max_age=60.0, is_trial=True)
    does = prune(path, max_age=60.0)
    assert (would.tasks, does.tasks) == (2 * retention.MOST_LOOKED_AT + 400,) * 2
    assert rows_of(path, "SELECT count(*) FROM tasks") == [(0,)]


def test_dead_tasks_behind_many_live_ones_are_found_by_hand_at_once_and_by_a_sink_look_by_look(
        record: Recorder, path: str) -> None:
    # it may be alive
    many_tasks(
        record, 2 * retention.MOST_LOOKED_AT, record.run(new_id(1), host="elsewhere.example")
    )
    many_tasks(record, 3, record.run(new_id(2), ended=record.now))
    assert prune(path, max_age=60.0, is_trial=True).tasks == 3
    database, lock = Database(path, lambda: schema.connect_to_write(path)), PresenceLock.share(
        schema.lock_path(path)
    )
    bounded, removed = Retention(max_age=60.0), []
    try:
        for _ in range(4):
            bounded.look(database, lock)
            with lock, database as connection:
                while bounded.step(connection):
                    pass
            removed.append(bounded.removed_tasks)
    finally:
        database.close()
        lock.leave()
    assert removed == [0, 0, 3, 3]
    assert rows_of(path, "SELECT count(*) FROM tasks") == [(2 * retention.MOST_LOOKED_AT,)]


def test_tasks_that_others_removed_since_the_look_keep_nobody_from_going_on(
    record: Recorder, path: str
) -> None:
    many_tasks(record, 2 * retention.MOST_TASKS, record.run(RUN, ended=record.now))
    database, lock = Database(path, lambda: schema.connect_to_write(path)), PresenceLock.share(
        schema.lock_path(path)
    )
    bounded = Retention(max_age=60.0)
    try:
        bounded.look(database, lock)
        record.connection.execute("DELETE FROM tasks WHERE key <= ?", (retention.MOST_TASKS,))
        with lock, database as connection:
            while bounded.step(connection):
                pass
    finally:
        database.close()
        lock.leave()
    assert rows_of(path, "SELECT count(*) FROM tasks") == [(0,)]


# ---------------------------------------------------------------- damage

def pruned(path: str, **bounds: int) -> Pruned | str:
    """Prune; return what was, or what was said of the damage."""
    try:
        return prune(path, **bounds)
    except HistoryError as error:
        return str(error)


def test_rows_that_an_index_names_though_they_are_gone_end_a_prune(
    record: Recorder, path: str
) -> None:
    for number in range(600):
        record.task(f"task {number}")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        index = connection.execute(
            "SELECT * FROM sqlite_master WHERE name = 'tasks_status'"
        ).fetchone()
        connection.execute("DELETE FROM sqlite_master WHERE name = 'tasks_status'")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM tasks WHERE key < 500")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", index)
    record.close()
    assert "is damaged (tasks such as that with key 1 cannot be removed); move it aside" in str(
        pruned(path, max_tasks=0))


def test_a_file_that_cannot_shrink_ends_a_prune(record: Recorder, path: str) -> None:
    """A history that was restored from a dump has no map of its pages, and keeps those that are
    free."""
    record.many_said(record.task("chatty"), 40_000)
    record.connection.execute("PRAGMA journal_mode = DELETE")
    record.connection.execute("PRAGMA auto_vacuum = NONE")
    record.connection.execute("VACUUM")
    record.close()
    found = pruned(path, max_tasks=0)
    assert isinstance(found, Pruned) and (found.tasks, found.stream_rows) == (1, 40_000)


@pytest.mark.parametrize("seed", range(12))
def test_a_prune_of_a_file_with_flipped_bits_ends(record: Recorder, path: str, seed: int) -> None:
    for number in range(100):
        record.many_said(record.task(f"task {number}", created=record.ago(minutes=number)), 20)
    record.close()
    chance = random.Random(seed)
    with open(path, "r+b") as file:
        for _ in range(5):
            file.seek(at := chance.randrange(100, os.path.getsize(path)))
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    found = pruned(path, max_tasks=10)
    assert isinstance(found, Pruned) or "could" in found or "damaged" in found
