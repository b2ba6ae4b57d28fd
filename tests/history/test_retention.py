"""How a history is kept within bounds: what goes, what stays whatever happens, and that nobody has
to wait for it."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder
from hypothesis import given, settings, strategies as st
from tests.reading import check_whole, query, value_of

from bgworker import Scheduler, current_task
from bgworker.history import presence, retention, schema
from bgworker.history.connections import Database
from bgworker.model.errors import ConfigurationError
from bgworker.history.presencelock import PresenceLock
from bgworker.model.ids import new_id, new_run_id
from bgworker.model.reports import wait_for_reports
from bgworker.model.records import COMPLETED, CREATED, OUTPUT, SCHEDULED, STARTED, Batch, TaskState
from bgworker.history.presence import dead_runs
from bgworker.history.retention import MOST_ROWS, MOST_TASKS, Retention, prune
from bgworker.history.sink import PRUNE_BATCH, PRUNE_SECONDS, SqliteSink
from tests.support import environment

SOON = 30.0


def fill(record: Recorder, tasks: int, rows: int = 1, text: str = "x" * 20, **ago: float) -> None:
    """Record tasks that have ended, one a second, all in one transaction."""
    record.connection.execute("BEGIN IMMEDIATE")
    for number in range(tasks):
        created = record.ago(seconds=tasks - number + 60, **ago)
        task_id = record.task(f"{number}", created=created, took=0.5)
        for _ in range(rows):
            record.said(task_id, text)
    record.connection.execute("COMMIT")


def names(path: str) -> list[str]:
    return [name for name, in query(path, "SELECT name FROM tasks ORDER BY created_utc")]


def look(path: str, keeping: Retention, lock: PresenceLock) -> None:
    database = Database(path, lambda: schema.connect_to_read(path))
    keeping.look(database, lock)
    database.close()


def dead(path: str, lock: PresenceLock, run_id: str) -> set[str]:
    database = Database(path, lambda: schema.connect_to_read(path))
    found = dead_runs(database, lock, [run_id])
    database.close()
    return found


def steps_of(path: str, record: Recorder, **bounds: Any) -> list[int]:
    """Prune to the end, as one who alone has the file; return how much went with each step."""
    keeping, lock = Retention(**bounds), PresenceLock.share(schema.lock_path(path))
    look(path, keeping, lock)
    steps = []
    with lock:
        while step := keeping.step(record.connection):
            steps.append(step)
    lock.leave()
    check_whole(path)
    return steps


# -- what goes --


def test_by_age_goes_what_ended_longer_ago_with_all_that_belongs_to_it(
    path: str, record: Recorder
) -> None:
    for name, days in (("old", 3), ("older", 9), ("new", 1)):
        run = record.run(new_id(days))
        record.insert("scripts", hash=f"script of {name}")
        task_id = record.task(
            name, created=record.ago(days=days), run_id=run, script_hash=f"script of {name}"
        )
        record.said(task_id, name)
        record.insert("zz_requests", task_id=task_id, reason="user", created_utc="2026")
    running = record.task("running", "running")
    record.insert("zz_requests", task_id=running, reason="user", created_utc="2026")
    record.lost(3, at=record.ago(days=3))
    record.lost(1, at=record.ago(days=1))
    steps_of(path, record, max_age=2 * 86400.0)
    assert names(path) == ["new", "running"]
    assert query(path, "SELECT task_id FROM zz_requests") == [(running,)]
    assert query(path, "SELECT payload FROM task_streams") == [("new",)]
    assert query(path, "SELECT hash FROM scripts") == [("script of new",)]
    assert query(path, "SELECT run_id FROM runs") == query(
        path, "SELECT run_id FROM tasks WHERE name = 'new'")
    assert query(path, "SELECT count FROM losses") == [(1,)]


def test_age_is_counted_from_the_end_not_from_the_beginning(path: str, record: Recorder) -> None:
    record.task("long", created=record.ago(days=9), took=8.5 * 86400)
    record.task("short", created=record.ago(days=3), took=1.0)
    steps_of(path, record, max_age=86400.0)
    assert names(path) == ["long"]


def test_by_number_those_go_first_that_ended_first(path: str, record: Recorder) -> None:
    record.task("began first, ended last", created=record.ago(days=9), took=9 * 86400.0 - 60)
    fill(record, 10, hours=1)
    steps_of(path, record, max_tasks=4)
    assert names(path) == ["began first, ended last", "7", "8", "9"]
    steps_of(path, record, max_tasks=0)
    assert names(path) == []
    assert value_of(path, "SELECT count(*) FROM zz_stream_rows") == 0


def test_by_bytes_the_oldest_go_until_what_is_left_fits_and_the_file_shrinks_to_it(
    path: str, record: Recorder
) -> None:
    fill(record, 900, rows=20, text="x" * 200)
    before = value_of(path, "PRAGMA page_count") * value_of(path, "PRAGMA page_size")
    assert before > 4_000_000
    steps_of(path, record, max_bytes=2_000_000)
    pages, size = value_of(path, "PRAGMA page_count"), value_of(path, "PRAGMA page_size")
    assert pages * size <= 2_000_000
    kept = [int(name) for name in names(path)]
    assert kept == list(range(900 - len(kept), 900)), "the newest"
    assert pages * size > 1_000_000, "no more went than had to"
    record.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert os.path.getsize(path) <= 2_000_000


def test_the_room_of_what_went_is_given_back_but_for_a_reserve(path: str, record: Recorder) -> None:
    fill(record, 1000, rows=20, text="x" * 200)
    before = value_of(path, "PRAGMA page_count")
    steps_of(path, record, max_tasks=10)
    after, free = value_of(path, "PRAGMA page_count"), value_of(path, "PRAGMA freelist_count")
    assert (
        before > 1000
        and after < before / 3
        and free <= max(retention.MOST_PAGES, after // 8 + retention.MOST_PAGES)
    )


def test_a_script_and_a_run_stay_as_long_as_one_task_refers_to_them(
    path: str, record: Recorder
) -> None:
    run = record.run()
    record.insert("scripts", hash="shared", text="def load(): ...")
    for days in (1, 2, 3):
        record.task(f"{days} days", created=record.ago(days=days), run_id=run, script_hash="shared")
    steps_of(path, record, max_tasks=1)
    assert (
        names(path),
        query(path, "SELECT hash FROM scripts"),
        query(path, "SELECT run_id FROM runs"),
    ) == (["1 days"], [("shared",)], [(run,)])
    steps_of(path, record, max_tasks=0)
    assert query(path, "SELECT hash FROM scripts UNION SELECT run_id FROM runs") == []


def test_without_a_bound_nothing_goes(path: str, record: Recorder) -> None:
    fill(record, 10, days=9999)
    assert not Retention().is_bounded
    assert [
        Retention(**{name: 1}).is_bounded for name in ("max_age", "max_tasks", "max_bytes")
    ] == [True] * 3
    assert steps_of(path, record) == []
    assert len(names(path)) == 10


# -- what stays --


UNENDED = ["created", "scheduled", "running"]


@pytest.mark.parametrize("bounds", [{"max_age": 1.0}, {"max_tasks": 0}, {"max_bytes": 1}], ids=str)
def test_a_task_that_has_not_ended_stays_whatever_the_bound(
        path: str, record: Recorder, bounds: dict[str, Any]) -> None:
    run = record.run(new_run_id(1), host=schema.this_host())
    other = record.run(new_id(2), host="elsewhere.example")
    lock = PresenceLock.share(schema.lock_path(path))
    lock.hold(presence.byte_of(run) or 0)  # what a sink of this process does
    for number, status in enumerate(UNENDED):
        here = record.task(
            f"here {status}", status, created=record.ago(days=9, hours=-number), run_id=run
        )
        record.said(here, "x" * 9000)
        record.task(
            f"there {status}", status, created=record.ago(days=8, hours=-number), run_id=other
        )
    record.task("ended", created=record.ago(days=7), run_id=run)
    steps_of(path, record, **bounds)
    lock.leave()
    assert names(path) == [
        *(f"here {status}" for status in UNENDED),
        *(f"there {status}" for status in UNENDED),
    ]
    assert value_of(path, "SELECT count(*) FROM zz_stream_rows") == len(UNENDED)


@contextmanager
def holder(path: str, run: str) -> Iterator[None]:
    """A process that shows that a run lives, and is killed at the end."""
    program = (
        "import sys\nfrom bgworker.history import presence, schema\nfrom "
        "bgworker.history.presencelock import PresenceLock\n"
        "lock = PresenceLock.share(schema.lock_path(sys.argv[1]))\n"
        "lock.hold(presence.byte_of(sys.argv[2]))\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path, run],
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield
        finally:
            process.kill()
            process.communicate(timeout=SOON)


@pytest.mark.parametrize("status", UNENDED)
def test_a_task_whose_process_is_dead_goes_like_one_that_has_ended(
    path: str, record: Recorder, status: str
) -> None:
    dead = record.run(new_id(1), host=schema.this_host())
    with holder(path, dead):
        pass
    closed = record.run(new_id(2), host="elsewhere.example", ended=record.now)
    copied = record.run(new_id(3))
    for run in (dead, closed, copied):
        record.task("dead", status, created=record.ago(days=9), run_id=run)
    record.task("interrupted", "interrupted", created=record.ago(days=9))
    record.task("of no run", status, created=record.ago(days=9))
    steps_of(path, record, max_age=60.0)
    assert names(path) == []
    assert query(path, "SELECT run_id FROM runs") == []


def test_a_run_is_dead_once_the_process_that_held_its_byte_is(path: str, record: Recorder) -> None:
    run = record.run(new_id(1), host=schema.this_host())
    record.task("runs", "running", run_id=run)
    lock = PresenceLock.share(schema.lock_path(path))
    with holder(path, run):
        assert dead(path, lock, run) == set()
    assert dead(path, lock, run) == {run}
    lock.leave()


def test_a_task_that_has_the_key_of_one_that_was_found_dead_stays(
    path: str, record: Recorder
) -> None:
    """Between a look and a step another process may prune, and a new task get the key."""
    record.task("dead", "interrupted", created=record.ago(days=9))
    last = record.task("dead too", "interrupted", created=record.ago(days=8))
    keeping, lock = Retention(max_age=60.0), PresenceLock.share(schema.lock_path(path))
    look(path, keeping, lock)
    record.connection.execute("DELETE FROM tasks WHERE id = ?", (last,))
    run = record.run(new_id(1), host="elsewhere.example")
    record.task("alive", "running", created=record.ago(days=8), run_id=run)
    assert query(path, "SELECT key FROM tasks WHERE name = 'alive'") == [(2,)]
    with lock:
        while keeping.step(record.connection):
            pass
    lock.leave()
    assert names(path) == ["alive"]


# -- by small steps --


def test_no_step_removes_more_than_its_share_however_much_there_is(
    path: str, record: Recorder
) -> None:
    fill(record, 3 * MOST_TASKS + 1, rows=2)
    big = record.task("big", created=record.ago(days=9))
    record.many_said(big, 3 * MOST_ROWS)
    changes, transactions = [record.connection.total_changes], []
    record.connection.set_trace_callback(
        lambda sql: transactions.append(sql) if sql.startswith("COMMIT") else None
    )
    keeping, lock = Retention(max_tasks=0), PresenceLock.share(schema.lock_path(path))
    look(path, keeping, lock)
    while keeping.step(record.connection):
        changes.append(record.connection.total_changes)
    record.connection.set_trace_callback(None)
    lock.leave()
    assert names(path) == []
    parts = [after - before for before, after in zip(changes, changes[1:])]
    assert max(parts) <= MOST_TASKS + MOST_ROWS
    assert len(transactions) > 3, "3 would be enough for the big one alone"
    assert keeping.removed_tasks == 3 * MOST_TASKS + 2
    assert keeping.removed_rows == 3 * MOST_ROWS + 2 * (3 * MOST_TASKS + 1)
    check_whole(path)


def test_no_step_removes_more_text_than_its_share_but_for_one_row(
    path: str, record: Recorder
) -> None:
    text = "x" * (retention.MOST_CHARACTERS // 4 + 1)
    fill(record, 3, rows=4, text=text)
    fill(record, 1, rows=1, text=text * 8, days=1)
    steps = steps_of(path, record, max_tasks=0)
    assert names(path) == []
    assert steps[:4] == [2, 5, 5, 5], "with its rows each time a task, and never two"


def test_between_two_steps_of_a_prune_a_batch_is_stored(path: str, record: Recorder) -> None:
    fill(record, 5 * MOST_TASKS)
    sink, keeping, lock = (
        SqliteSink(path),
        Retention(max_tasks=0),
        PresenceLock.share(schema.lock_path(path)),
    )
    look(path, keeping, lock)
    steps = 0
    for number in range(100):
        with lock:
            if not keeping.step(record.connection):
                break
        steps += 1
        state = TaskState(f"{number:032}", "meanwhile", "b" * 32, 10**18)
        sink.write(Batch([(state, 1, CREATED, 10**18, None), (state, 2, OUTPUT, 10**18, "x")]))
    lock.leave()
    sink.close()
    assert steps >= 5
    assert names(path) == ["meanwhile"] * steps
    check_whole(path)


def test_wherever_a_prune_is_left_off_no_reference_dangles(path: str, record: Recorder) -> None:
    run = record.run()
    record.insert("scripts", hash="h")
    record.many_said(
        record.task("big", created=record.ago(days=9), run_id=run, script_hash="h"),
        2 * MOST_ROWS + 5,
    )
    fill(record, MOST_TASKS + 5)
    keeping, lock = Retention(max_tasks=1), PresenceLock.share(schema.lock_path(path))
    look(path, keeping, lock)
    seen = 0
    while keeping.step(record.connection):
        check_whole(path)
        seen += 1
    lock.leave()
    assert seen >= 3 and len(names(path)) == 1


def test_the_harness_would_notice_a_dangling_reference(path: str, record: Recorder) -> None:
    record.said(record.task("left"), "behind")
    record.connection.execute("DELETE FROM tasks")
    with pytest.raises(AssertionError):
        check_whole(path)


# -- by the sink, and by hand --


def states(numbers: range) -> Batch:
    records: list[Any] = []
    for number in numbers:
        state = TaskState(f"{number:032}", f"{number}", "b" * 32, 10**18 + number)
        state.started_ns, state.completed_ns, state.duration = (
            10**18 + number,
            10**18 + number * 1000,
            0.5,
        )
        kinds = (CREATED, None), (STARTED, None), (OUTPUT, "x" * 100), (COMPLETED, None)
        records += [(state, seq, kind, 10**18, data) for seq, (kind, data) in enumerate(kinds, 1)]
    return Batch(records)


def test_a_sink_keeps_its_newest_tasks_when_it_is_closed(path: str) -> None:
    sink = SqliteSink(path, max_tasks=7)
    for start in range(0, 300, 50):
        sink.write(states(range(start, start + 50)))
    sink.close()
    assert names(path) == [str(number) for number in range(293, 300)]
    assert value_of(path, "SELECT count(*) FROM zz_stream_rows") == 7
    check_whole(path)


def test_a_sink_prunes_while_it_is_written_to(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgworker.history.sink.LOOK_INTERVAL", 0.0)
    monkeypatch.setattr("bgworker.history.sink.PRUNE_SECONDS", SOON)
    sink = SqliteSink(path, max_age=60.0)  # all of them ended in 2001
    sink.write(states(range(500)))
    assert names(path) == [], "though it is open"
    sink.close()


def test_a_large_batch_is_followed_by_as_much_more_pruning(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, seconds = SqliteSink(path, max_tasks=7), []
    monkeypatch.setattr(sink, "_prune", seconds.append)
    for count in (1, PRUNE_BATCH // 2, 2 * PRUNE_BATCH):
        batch = states(range(count))
        sink.write(Batch(batch.records[:count]))
    assert seconds == [PRUNE_SECONDS, PRUNE_SECONDS, 2 * PRUNE_SECONDS]
    monkeypatch.undo()
    sink.close()


def test_trouble_with_pruning_is_no_trouble_of_the_batch(
        path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fail_to_prune(path, monkeypatch)
    wait_for_reports(time.monotonic() + SOON)
    assert (
        f"the history {path!r} could not be pruned, which is tried again in a minute: no such table"
        in caplog.text
    )


@pytest.mark.parametrize("does", ["raises", "blocks"])
def test_nor_is_a_handler_of_the_log_that(
        path: str, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    called, go_on, gone_on = threading.Event(), threading.Event(), threading.Event()

    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            called.set()
            if does == "raises":
                raise SystemExit
            go_on.wait(SOON)
            gone_on.set()
            return True

    handler = Handler()
    logging.getLogger("bgworker").addHandler(handler)
    try:
        fail_to_prune(path, monkeypatch)
        assert called.wait(SOON) and not gone_on.is_set()
    finally:
        go_on.set()
        wait_for_reports(time.monotonic() + SOON)
        logging.getLogger("bgworker").removeHandler(handler)


def fail_to_prune(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a batch through a sink that then fails to prune."""
    def step(self: Retention, connection: sqlite3.Connection) -> int:
        connection.execute("DELETE FROM no_such_table")
        return 0

    monkeypatch.setattr(Retention, "step", step)
    sink = SqliteSink(path, max_tasks=1)
    sink.write(states(range(5)))
    sink.close()
    assert len(names(path)) == 5


def test_a_running_task_of_a_real_scheduler_is_never_pruned(path: str) -> None:
    with Scheduler(1, sinks=[SqliteSink(path, max_tasks=0, max_age=0.001)]) as pool:
        def run() -> int:
            current_task().output("still here")
            assert pool.flush(SOON)
            return prune(path, max_tasks=0).tasks

        task = pool.submit(run)
        assert task.result(SOON) == 0
        task = pool.submit(lambda: [pool.flush(SOON), names(path)][1])
        assert len(task.result(SOON)) >= 1
    assert names(path) == []
    assert query(path, "SELECT run_id FROM runs") == []


def test_a_running_task_whose_sink_was_closed_is_alive_again_once_a_sink_hears_of_it(
    path: str,
) -> None:
    state = TaskState("a" * 32, "runs", new_run_id(10**18), 10**18)
    before = Batch(
        [
            (state, seq, kind, 10**18, None)
            for seq, kind in enumerate((CREATED, SCHEDULED, STARTED), 1)
        ]
    )
    first, second = SqliteSink(path), SqliteSink(path, max_age=1.0)
    first.write(before)
    first.close()
    second.write(Batch([(state, 4, OUTPUT, 10**18, "still here")]))
    assert prune(path, max_tasks=0).tasks == 0
    assert query(path, "SELECT name, ended_utc FROM tasks JOIN runs USING (run_id)") == [
        ("runs", None)
    ]
    second.close()
    assert value_of(path, "SELECT count(*) FROM runs WHERE ended_utc IS NULL") == 0
    check_whole(path)


def test_by_hand_the_file_shrinks_without_a_reserve_and_what_went_is_told(
    path: str, record: Recorder
) -> None:
    fill(record, 600, rows=10, text="x" * 200)
    record.close()
    told = prune(path, max_tasks=5)
    assert (told.tasks, told.stream_rows, told.bytes_after) == (595, 5950, os.path.getsize(path))
    assert told.bytes_before > 1_000_000 > 200_000 > os.path.getsize(path)
    assert value_of(path, "PRAGMA freelist_count") == 0
    check_whole(path)


def test_a_trial_tells_the_same_and_changes_nothing(path: str, record: Recorder) -> None:
    fill(record, 50, rows=2, days=2)
    fill(record, 5, rows=1)
    record.close()
    before = Path(path).read_bytes()
    trials = [prune(path, max_age=86400.0, is_trial=True), prune(path, max_tasks=20, is_trial=True)]
    assert Path(path).read_bytes() == before
    told = [(trial.tasks, trial.stream_rows, trial.bytes_after) for trial in trials]
    assert told == [(50, 100, None), (35, 70, None)]
    done = prune(path, max_age=86400.0)
    assert (done.tasks, done.stream_rows) == (50, 100)


STATUSES = ["completed", "failed", "cancelled", "timed_out", "interrupted", "running"]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(STATUSES),
            st.integers(1, 100),
            st.integers(0, 3),
            st.sampled_from("ab"),
            st.sampled_from("xyz"),
        ),
        max_size=12,
    ),
    st.none() | st.integers(1, 100),
    st.none() | st.integers(0, 12),
)
def test_what_is_left_is_what_a_plain_filter_leaves(
    tmp_path_factory: pytest.TempPathFactory,
    tasks: list[Any],
    max_hours: int | None,
    most: int | None,
) -> None:
    path = str(tmp_path_factory.mktemp("plain") / "history.db")
    record = Recorder(path)
    runs = {
        letter: record.run(new_id(number), host="elsewhere.example")
        for number, letter in enumerate("ab", 1)
    }
    for letter in "xyz":
        record.insert("scripts", hash=letter)
    rows = []
    for number, (status, hours, said, run, script) in enumerate(tasks):
        created = record.ago(hours=hours - 0.5, seconds=-number)
        task_id = record.task(
            str(number), status, created=created, took=1.0, run_id=runs[run], script_hash=script
        )
        for _ in range(said):
            record.said(task_id, "x")
        rows.append((status == "running", record.now - created, number))
    steps_of(
        path, record, max_tasks=most, max_age=None if max_hours is None else max_hours * 3600.0
    )
    record.close()
    ended = sorted((age, number) for runs_on, age, number in rows if not runs_on)  # newest first
    running = [number for runs_on, _, number in rows if runs_on]
    if max_hours is not None:
        ended = [(age, number) for age, number in ended if age.total_seconds() < max_hours * 3600.0]
    if most is not None:
        ended = ended[:max(0, most - len(running))]
    expected = {*running, *(number for _, number in ended)}
    assert {int(name) for name in names(path)} == expected
    assert value_of(path, "SELECT count(*) FROM zz_stream_rows") == sum(
        tasks[number][2] for number in expected
    )
    gone = {number for number in range(len(tasks))} - expected
    unused = {tasks[number][4] for number in gone} - {tasks[number][4] for number in expected}
    assert {hash_ for hash_, in query(path, "SELECT hash FROM scripts")} == set("xyz") - unused


@pytest.mark.parametrize(("bounds", "said"), [
    ({"max_age": 0}, "max_age: expected a number > 0 or None, got 0"),
    ({"max_tasks": -1}, "max_tasks: expected a whole number >= 0 or None, got -1"),
    ({"max_bytes": 0.5}, r"max_bytes: expected a whole number >= 1 or None, got 0\.5"),
])
def test_a_bound_that_means_nothing_is_refused(bounds: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{said}$"):
        Retention(**bounds)
