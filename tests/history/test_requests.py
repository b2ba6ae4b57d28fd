"""Requests to cancel tasks: who may ask, who hears it and when, and that no request outlives its
task. (From another process, and by the command line: tests/cli/test_cancel.)"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bgworker import (ConfigurationError, History, HistoryError, Scheduler, ShutdownError, Task,
                      TaskStatus, checkpoint, current_task)
from bgworker.history import requests, schema
from bgworker.history.requests import ask, withdraw
from bgworker.history.retention import prune
from bgworker.history.sink import SqliteSink
from bgworker.model.ids import new_id
from bgworker.running.pool import Pool
from tests.histories import Recorder, rows_of
from tests.support import SOON, Gate, exit_code, forked, joined, needs_fork, started, until

OUTLIVED = """SELECT task_id, status FROM zz_requests LEFT JOIN tasks ON id = task_id
WHERE status IS NULL OR status NOT IN ('created', 'scheduled', 'running')"""
REQUESTS = "SELECT task_id, reason, seen_utc IS NOT NULL FROM zz_requests"


@pytest.fixture
def pool(path: str) -> Iterator[Scheduler]:
    """A Scheduler of two workers that records, and listens to, the history."""
    with Scheduler(2, name="asked", sinks=[SqliteSink(path)]) as made:
        made.listen(path)
        yield made
        made.shutdown(cancel_futures=True, timeout=SOON)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look far more often than usual."""
    monkeypatch.setattr(requests, "LOOK_INTERVAL", 0.01)


def asleep() -> None:
    current_task().sleep(1000)


def recorded(pool: Scheduler, *tasks: Task[Any]) -> list[str]:
    """Return the ids of tasks that are in the history now."""
    assert pool.flush(SOON)
    return [task.id for task in tasks]


def ended(pool: Scheduler, path: str, task: Task[Any]) -> tuple[Any, ...]:
    """Return how a task has ended, by its record; and that its request has gone."""
    assert task.wait(SOON) and pool.flush(SOON)
    assert task.id not in [row[0] for row in rows_of(path, REQUESTS)]
    return rows_of(path, f"SELECT status, failure_message FROM tasks WHERE id = '{task.id}'")[0]


# ---------------------------------------------------------------- what a request does

async def awaiting() -> None:
    await asyncio.sleep(1000)


def at_its_checkpoint() -> None:
    while True:
        time.sleep(0.001)
        checkpoint()


@pytest.mark.parametrize("function", [asleep, at_its_checkpoint, awaiting])
def test_a_request_stops_what_runs_and_its_reason_is_recorded(
        pool: Scheduler, path: str, function: Callable[[], Any]) -> None:
    task = pool.submit(function)
    until(task.running)
    ask(path, recorded(pool, task), "the disk is full")
    assert ended(pool, path, task) == ("cancelled", "the disk is full")


def test_requests_for_all_cancel_what_waits_before_a_worker_becomes_free_for_it(
        pool: Scheduler, path: str) -> None:
    running = [pool.submit(asleep) for _ in range(2)]
    waiting = [pool.submit(asleep) for _ in range(50)]
    for task in waiting:
        task.add_done_callback(lambda _: time.sleep(0.002))  # time for a worker to begin another
    ask(path, recorded(pool, *running, *waiting), "all")
    assert all(task.wait(SOON) for task in waiting)
    assert all(task.snapshot().started_utc is None for task in waiting)
    assert {ended(pool, path, task) for task in running + waiting} == {("cancelled", "all")}


def test_the_first_reason_stays(path: str, record: Recorder) -> None:
    task = record.task(status="running", run_id=record.run())
    ask(path, [task], "first")
    ask(path, [task], "second")
    assert rows_of(path, REQUESTS) == [(task, "first", 0)]


def test_a_long_reason_is_cut(pool: Scheduler, path: str) -> None:
    task = pool.submit(asleep)
    ask(path, recorded(pool, task), "x" * 100_000)
    assert ended(pool, path, task) == ("cancelled", "x" * requests.MOST_REASON)


@pytest.mark.parametrize("reason", [b"\xff\xfe", 7, 2.5])
def test_a_reason_that_is_no_text_harms_nobody(pool: Scheduler, path: str, reason: object) -> None:
    task = pool.submit(asleep)
    (task_id,) = recorded(pool, task)
    with sqlite3.connect(path) as stranger:
        stranger.execute("INSERT INTO zz_requests VALUES (?, ?, '', NULL)", (task_id, reason))
    stranger.close()
    assert ended(pool, path, task)[0] == "cancelled"


# ---------------------------------------------------------------- for whom there is a request

def test_only_what_has_not_ended_can_get_a_request(path: str, record: Recorder) -> None:
    run = record.run()
    tasks = {status.value: record.task(status=status.value, run_id=run) for status in TaskStatus}
    ask(path, [*tasks.values(), "0" * 32, "nothing"], "enough")
    found = {row[0] for row in rows_of(path, REQUESTS)}
    assert found == {tasks["created"], tasks["scheduled"], tasks["running"]}


def test_what_was_not_claimed_is_withdrawn_and_what_was_stays(path: str, record: Recorder) -> None:
    run = record.run()
    claimed, unclaimed = [record.task(status="running", run_id=run) for _ in range(2)]
    ask(path, [claimed, unclaimed], "enough")
    record.connection.execute("UPDATE zz_requests SET seen_utc = 'x' WHERE task_id = ?", (claimed,))
    withdraw(path, [claimed, unclaimed])
    assert rows_of(path, REQUESTS) == [(claimed, "enough", 1)]


def test_a_listener_claims_no_request_of_another_run(pool: Scheduler, path: str) -> None:
    with Scheduler(1, sinks=[SqliteSink(path)]) as deaf:
        gate = Gate()
        theirs, ours = deaf.submit(gate), pool.submit(asleep)
        ask(path, [*recorded(deaf, theirs), *recorded(pool, ours)], "enough")
        assert ended(pool, path, ours) == ("cancelled", "enough")
        assert rows_of(path, REQUESTS) == [(theirs.id, "enough", 0)]
        assert not theirs.cancel_requested
        gate.open()
        assert ended(deaf, path, theirs)[0] == "completed"


def test_a_request_that_stood_before_the_listening_began_is_heard(path: str) -> None:
    with Scheduler(1, sinks=[SqliteSink(path)]) as pool:
        task = pool.submit(asleep)
        ask(path, recorded(pool, task), "early")
        assert not task.wait(2 * requests.LOOK_INTERVAL)
        pool.listen(path)
        assert ended(pool, path, task) == ("cancelled", "early")


def test_nobody_is_asked_by_a_history_of_an_older_version(path: str) -> None:
    with sqlite3.connect(path) as old:
        for statement in schema.MADE[requests.FIRST_VERSION - 2]:
            old.execute(statement)
        old.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        old.execute(f"PRAGMA user_version = {requests.FIRST_VERSION - 1}")
    old.close()
    with pytest.raises(HistoryError, match="has version 2: whatever writes to it is an older"):
        ask(path, ["x"], "enough")
    assert rows_of(path, "PRAGMA user_version") == [(2,)]  # who writes to it knows no other


def test_no_history_is_made_just_to_ask(path: str) -> None:
    for act in (lambda: ask(path, ["x"], "y"), lambda: withdraw(path, ["x"])):
        with pytest.raises(HistoryError, match="there is no history"):
            act()
    assert not os.path.exists(path)


# ---------------------------------------------------------------- a request goes with its task

@pytest.mark.parametrize("seed", range(6))
def test_no_request_outlives_its_task_whenever_that_ends(
        path: str, hurried: None, seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.choice((0, 0.001, 0.01, 0.05)) for _ in range(300)]
    heeding = [chance.random() < 0.5 for _ in lengths]

    def run(length: float, heeds: bool) -> None:
        end = time.monotonic() + length
        while time.monotonic() < end:
            time.sleep(0.0005)
            if heeds:
                checkpoint()

    with Scheduler(4, sinks=[SqliteSink(path)], keep_finished=None) as pool:
        pool.listen(path)
        tasks = list(map(lambda *how: pool.submit(run, *how), lengths, heeding))

        def ask_now_and_then(number: int) -> None:
            own_chance = random.Random(f"{seed} {number}")
            while not all(task.done() for task in tasks):
                chosen = [task.id for task in own_chance.sample(tasks, 5)]
                ask(path, chosen, f"canceller {number}")
                if own_chance.random() < 0.2:
                    withdraw(path, chosen)

        outlived: list[Any] = []

        def watch() -> None:
            while not all(task.done() for task in tasks):
                outlived.extend(rows_of(path, OUTLIVED))

        joined(started(watch), *[started(partial(ask_now_and_then, number)) for number in range(3)])
        assert pool.flush(SOON) and outlived == []
        assert rows_of(path, REQUESTS) == []
        found = dict(rows_of(path, "SELECT id, status FROM tasks"))
        assert found == {task.id: task.status.value for task in tasks}
        assert set(found.values()) == {"completed", "cancelled"}, "no race was run"
        # whoever was cancelled was asked to, and says by whom
        reasons = {reason for reason, in rows_of(
            path, "SELECT DISTINCT failure_message FROM tasks WHERE status = 'cancelled'")}
        assert reasons <= {f"canceller {number}" for number in range(3)}


def test_a_request_for_the_id_of_nothing_is_gone_with_the_next_tasks(
        pool: Scheduler, path: str) -> None:
    with sqlite3.connect(path) as stranger:
        stranger.executemany("INSERT INTO zz_requests VALUES (?, 'x', '', NULL)",
                             [("f" * 32,), ("",), (b"\xff",), (new_id(1),)])
    stranger.close()
    assert len(rows_of(path, REQUESTS)) == 4
    pool.submit(len, "x").result(SOON)
    assert pool.flush(SOON)
    assert rows_of(path, REQUESTS) == []


KILLED = """
import os, signal, sys
from bgworker import Scheduler
from bgworker.history.requests import ask
pool = Scheduler(1, sinks=["sqlite:" + sys.argv[1]])
import threading
task = pool.submit(threading.Event().wait)
assert pool.flush(30)
ask(sys.argv[1], [task.id], "too late")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("write", [lambda path: SqliteSink(path), lambda path: prune(path)],
                         ids=["sink", "prune"])
def test_a_request_for_a_task_of_a_dead_process_goes_with_the_next_writer(
        path: str, write: Callable[[str], Any]) -> None:
    from tests.support import ROOT
    done = subprocess.run([sys.executable, "-c", KILLED, path], timeout=60, cwd=ROOT)
    assert done.returncode == -9 and len(rows_of(path, REQUESTS)) == 1
    sink = write(path)
    if isinstance(sink, SqliteSink):
        sink.open()
        sink.close()
    assert rows_of(path, REQUESTS) == []
    assert rows_of(path, "SELECT status FROM tasks") == [("interrupted",)]


# ---------------------------------------------------------------- what listening costs

class Looks:
    """Counts the looks of listeners at their history, by what SQLite executes for them; and how
    often they ask whether there is a task."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at_version = 0
        self.at_requests = 0
        self.wakes = 0

        def connect(path: str, patience: float = 0) -> sqlite3.Connection:
            connection = schema.connect_to_read(path, patience)
            connection.set_trace_callback(self._count)
            return connection

        is_busy = Pool.is_busy

        def counted(pool: Pool) -> bool:
            self.wakes += 1
            return is_busy(pool)

        monkeypatch.setattr(requests, "connect_to_read", connect)
        monkeypatch.setattr(Pool, "is_busy", counted)

    def _count(self, statement: str) -> None:
        self.at_version += "data_version" in statement
        self.at_requests += "zz_requests" in statement and "SELECT task_id" in statement


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def test_it_looks_twice_a_second_while_a_task_runs_and_sleeps_while_none_does(
        path: str, looks: Looks) -> None:
    with Scheduler(1, name="frugal", sinks=[SqliteSink(path)]) as pool:
        pool.listen(path)
        assert "frugal-requests" not in [thread.name for thread in threading.enumerate()]
        begun = time.monotonic()
        gate = Gate()
        task = pool.submit(gate)
        until(lambda: looks.at_version >= 3)
        lasted = time.monotonic() - begun
        assert lasted >= 3 * requests.LOOK_INTERVAL - 0.01
        # the record of the start is one change, and since then nobody has written
        assert looks.at_requests <= 3
        gate.open()
        assert task.wait(SOON) and pool.flush(SOON)
        listener: Any = pool._listener
        until(lambda: listener.is_asleep)
        before = looks.at_version, looks.wakes
        time.sleep(3 * requests.LOOK_INTERVAL)
        assert (looks.at_version, looks.wakes) == before
        assert listener.is_asleep and listener._thread.is_alive()
        pool.submit(len, "x").result(SOON)  # it has not fallen asleep for ever
        until(lambda: looks.at_version > before[0])


def test_many_short_tasks_wake_it_no_more_often_than_a_long_one(path: str, looks: Looks) -> None:
    with Scheduler(2, sinks=[SqliteSink(path)]) as pool:
        pool.listen(path)
        begun = time.monotonic()
        while time.monotonic() - begun < 3 * requests.LOOK_INTERVAL:
            pool.submit(len, "x").result(SOON)
        most = (time.monotonic() - begun) / requests.LOOK_INTERVAL + 1
        assert 2 <= looks.at_version <= most and looks.wakes <= most + 2


def test_who_does_not_listen_has_no_thread_for_it_and_hears_nothing(
        path: str, looks: Looks) -> None:
    with Scheduler(1, sinks=[SqliteSink(path)]) as pool:
        gate = Gate()
        task = pool.submit(gate)
        ask(path, recorded(pool, task), "enough")
        assert not [each for each in threading.enumerate() if "requests" in each.name]
        assert not task.wait(2 * requests.LOOK_INTERVAL) and looks.at_version == 0
        gate.open()
        assert ended(pool, path, task)[0] == "completed"


# ---------------------------------------------------------------- a listener's life

def test_listening_is_refused_where_it_would_hear_nothing(tmp_path: Path, path: str) -> None:
    other, garbage = str(tmp_path / "other.db"), tmp_path / "garbage"
    garbage.write_text("no database, whatever its length may be" * 100)
    with Scheduler(1, sinks=[SqliteSink(path), SqliteSink(other)]) as pool:
        with pytest.raises(HistoryError, match="there is no history at"):
            pool.listen(tmp_path / "missing.db")
        with pytest.raises(HistoryError, match="is not a history"):
            pool.listen(garbage)
        pool.listen(path)
        pool.listen(Path(path))  # once more is no harm
        with pytest.raises(ConfigurationError, match="listens to .*history.db.* already, got"):
            pool.listen(other)
    with Scheduler(1, sinks=[SqliteSink(path)]) as closed:
        closed.shutdown()
        with pytest.raises(ShutdownError, match="cannot listen after shutdown"):
            closed.listen(path)


def listening() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "asked-requests"]


def test_it_is_known_who_listens_from_the_first_task_to_the_end(pool: Scheduler, path: str) -> None:
    run = pool.run_id
    assert not requests.is_listened_for(path, run)
    pool.submit(len, "x").result(SOON)
    until(lambda: requests.is_listened_for(path, run))
    with Scheduler(1, sinks=[SqliteSink(path)]) as deaf:
        deaf.submit(len, "x").result(SOON)
        assert deaf.flush(SOON)
        assert requests.is_recorded_here(path, deaf.run_id)
        assert not requests.is_listened_for(path, deaf.run_id)
    (thread,) = listening()
    pool.shutdown()
    joined(thread)
    assert not requests.is_listened_for(path, run)
    assert not requests.is_listened_for(path, "no run")


def test_shutdown_ends_the_listening_whether_it_sleeps_or_waits(pool: Scheduler) -> None:
    pool.submit(len, "x").result(SOON)
    (thread,) = listening()
    pool.shutdown()
    joined(thread)


def test_the_listening_of_a_scheduler_that_was_forgotten_ends(path: str) -> None:
    forgotten = Scheduler(1, name="asked", sinks=[SqliteSink(path)])
    forgotten.listen(path)
    forgotten.submit(len, "x").result(SOON)
    (thread,) = listening()
    del forgotten
    gc.collect()
    joined(thread)


def test_a_callback_of_a_cancelled_task_that_shuts_down_waits_for_no_listener(
        pool: Scheduler, path: str) -> None:
    gates = [Gate(), Gate()]
    blockers = [pool.submit(gate) for gate in gates]
    waiting = pool.submit(asleep)
    seen: list[str] = []

    def shut_down(task: Any) -> None:
        for gate in gates:
            gate.open()
        pool.shutdown()
        seen.append(threading.current_thread().name)

    waiting.add_done_callback(shut_down)
    ask(path, recorded(pool, *blockers, waiting)[-1:], "enough")
    until(lambda: seen == ["asked-requests"])


@needs_fork
def test_a_forked_child_hears_requests_for_its_own_tasks(pool: Scheduler, path: str) -> None:
    parents = pool.submit(asleep)
    assert recorded(pool, parents)

    def child() -> None:
        task = pool.options(name="of the child").submit(asleep)
        assert task.wait(SOON), "nobody asked"
        pool.shutdown()
        assert task.cancelled() and not parents.cancel_requested

    pid = forked(child)
    until(lambda: rows_of(path, "SELECT 1 FROM tasks WHERE name = 'of the child'"))
    ((task_id,),) = rows_of(path, "SELECT id FROM tasks WHERE name = 'of the child'")
    ask(path, [task_id], "from the parent")
    assert exit_code(pid) == 0
    assert rows_of(path, "SELECT failure_message FROM tasks WHERE name = 'of the child'") == [
        ("from the parent",)]
    assert not parents.done()
    ask(path, [parents.id], "and the parent hears as before")
    assert ended(pool, path, parents)[0] == "cancelled"


# ---------------------------------------------------------------- trouble

def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "cannot hear" in each.getMessage()]


def damage(path: str) -> None:
    Path(path).write_bytes(b"garbage" * 1000)


def replace(path: str) -> None:
    os.rename(path, path + ".aside")
    damage(path)


def delete(path: str) -> None:
    os.unlink(path)


@pytest.mark.parametrize("harm", [damage, replace, delete])
def test_a_file_that_is_lost_is_told_once_and_costs_no_task_its_end(
        path: str, hurried: None, caplog: pytest.LogCaptureFixture,
        harm: Callable[[str], None]) -> None:
    # recorded elsewhere: the listener alone is in trouble
    sink = SqliteSink(path)
    sink.open()
    sink.close()
    with Scheduler(2) as pool:
        pool.listen(path)
        gate = Gate()
        task = pool.submit(gate)
        listener: Any = pool._listener
        until(lambda: listener._changes is not None)
        harm(path)
        until(lambda: lines_of(caplog))
        until(lambda: listener._interval > 4 * requests.LOOK_INTERVAL)  # it looks less often
        assert pool.submit(len, "abc").result(SOON) == 3
        gate.open()
        assert task.wait(SOON) and task.status is TaskStatus.COMPLETED
    (line,) = lines_of(caplog)
    assert "goes on without until it can" in line and repr(path) in line


def test_a_file_that_is_made_anew_is_listened_to_again(path: str, hurried: None) -> None:
    with Scheduler(2, sinks=[SqliteSink(path)]) as pool:
        pool.listen(path)
        first = pool.submit(asleep)
        recorded(pool, first)
        for ending in ("", "-wal", "-shm"):
            os.unlink(path + ending)
        second = pool.submit(asleep)
        ask(path, recorded(pool, second), "in the new file")
        assert ended(pool, path, second) == ("cancelled", "in the new file")
        first.cancel()


def test_what_a_stranger_has_locked_is_told_and_heard_when_he_is_gone(
        path: str, hurried: None, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(path: str) -> sqlite3.Connection:
        connection = schema.connect_to_write(path)
        connection.execute("PRAGMA busy_timeout = 50")
        return connection

    monkeypatch.setattr(requests, "connect_to_write", connect)
    with Scheduler(1, sinks=[SqliteSink(path)]) as pool:
        task = pool.submit(asleep)
        ask(path, recorded(pool, task), "patience")
        stranger = sqlite3.connect(path, isolation_level=None)
        stranger.execute("BEGIN IMMEDIATE")
        pool.listen(path)
        until(lambda: lines_of(caplog))
        # it is not cancelled before the request is claimed, which may be withdrawn until then
        assert "locked" in lines_of(caplog)[0] and not task.cancel_requested
        stranger.execute("COMMIT")
        stranger.close()
        assert ended(pool, path, task) == ("cancelled", "patience")


def test_where_no_thread_can_be_had_tasks_run_all_the_same(
        pool: Scheduler, path: str, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if "requests" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert pool.submit(len, "abc").result(SOON) == 3
    assert pool.submit(len, "abcd").result(SOON) == 4
    until(lambda: lines_of(caplog))
    assert len(lines_of(caplog)) == 1 and "can't start new thread" in lines_of(caplog)[0]
    monkeypatch.undo()
    task = pool.submit(asleep)
    ask(path, recorded(pool, task), "later")
    assert ended(pool, path, task)[0] == "cancelled"


def test_the_history_tells_of_each_task_whether_its_request_was_heard(
        path: str, record: Recorder, history: History) -> None:
    run = record.run()
    claimed, asked, other = [record.task(status="running", run_id=run) for _ in range(3)]
    done = record.task(run_id=run)
    dead = record.task(status="running", run_id=record.run("e" * 32, ended=record.now))
    ask(path, [claimed, asked, done], "enough")
    record.connection.execute("UPDATE zz_requests SET seen_utc = 'x' WHERE task_id = ?", (claimed,))
    assert history.cancelling([claimed, asked, other, done, dead, "nothing"]) == {
        claimed: (TaskStatus.RUNNING, True), asked: (TaskStatus.RUNNING, False),
        other: (TaskStatus.RUNNING, False), done: (TaskStatus.COMPLETED, False),
        dead: (TaskStatus.INTERRUPTED, False)}


@pytest.fixture(autouse=True)
def log_of_bgworker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="bgworker")
