"""Of any number of processes that claim a task, one has it, and the file tells which."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from bgworker import HistoryError, TaskStatus
from bgworker.history import claims
from bgworker.history.claims import Claims
from bgworker.history.schema import this_host
from bgworker.model.ids import id_of, new_id, new_run_id, next_number, process_in
from bgworker.model.records import TaskState
from tests.histories import Recorder, kill_runs, rows_of
from tests.support import SOON, joined, started

DEAD = new_id(1_764_000_000_000_000_000)
OURS = new_run_id(1_764_000_000_000_000_000)
MARKED = {"mark": True}


@pytest.fixture
def path(tmp_path: object) -> str:
    return f"{tmp_path}/history.db"


@pytest.fixture
def recorder(path: str) -> Iterator[Recorder]:
    made = Recorder(path)
    made.run(DEAD, host=this_host())
    kill_runs(path, DEAD)
    yield made
    made.close()


def claims_of(path: str) -> Claims:
    return Claims(path, [TaskStatus.INTERRUPTED], '"mark"')


def again(task_id: str) -> TaskState:
    """A new task that runs that one again."""
    number, created = next_number(), 1_764_000_000_000_000_000
    new = id_of(created, number, process_in(OURS))
    state = TaskState(new, "again", OURS, created, None, number)
    state.metadata_json = f'{{"mark":true,"rerun_of":"{task_id}"}}'
    return state


def test_a_claim_is_the_row_of_the_new_task_and_of_its_run(path: str, recorder: Recorder) -> None:
    old = recorder.task(status="running", run_id=DEAD, metadata=MARKED)
    with claims_of(path) as found:
        (key,) = found.left()
        (task,) = found.tasks([key], 10)
        assert (task.task_id, task.name, task.metadata) == (old, "load", MARKED)
        state = again(old)
        assert found.claim({old: state}) == {old}
        assert found.left() == [], "nobody claims it again"
    assert rows_of(path, "SELECT id, name, status, run_id, rerun_of, last_seq FROM tasks "
                   "ORDER BY key DESC LIMIT 1") == [
        (state.id, "again", "scheduled", OURS, old, 2)]
    assert rows_of(path, f"SELECT host, ended_utc FROM runs WHERE run_id = '{OURS}'") == [
        (this_host(), None)]


def test_of_many_that_claim_the_same_at_once_one_has_each(path: str, recorder: Recorder) -> None:
    ids = [recorder.task(status="scheduled", run_id=DEAD, metadata=MARKED) for _ in range(300)]
    with claims_of(path) as first:
        assert len(first.left()) == 300
    ours: list[set[str]] = []
    barrier = threading.Barrier(4)

    def claim() -> None:
        with claims_of(path) as found:
            barrier.wait(SOON)
            for start in range(0, 300, 50):
                ours.append(found.claim({each: again(each) for each in ids[start:start + 50]}))

    joined(*[started(claim) for _ in range(4)])
    assert sorted(each for some in ours for each in some) == sorted(ids)
    assert rows_of(path, "SELECT count(*), count(DISTINCT rerun_of) FROM tasks "
                   "WHERE rerun_of IS NOT NULL") == [(300, 300)]


def test_a_claim_that_is_given_back_leaves_nothing_and_the_next_one_has_it(
    path: str, recorder: Recorder
) -> None:
    first, second = [recorder.task(status="scheduled", run_id=DEAD, metadata=MARKED)
                     for _ in range(2)]
    with claims_of(path) as found:
        found.left()
        states = {first: again(first), second: again(second)}
        assert found.claim(states) == {first, second}
        recorder.connection.execute("UPDATE tasks SET status = 'running', started_utc = '2026' "
                                    "WHERE id = ?", (states[second].id,))
        found.give_back(list(states.values()))
        assert found.claim({first: again(first), second: again(second)}) == {first}, (
            "what has begun is not given back")


def test_a_claim_that_fails_claims_nothing(path: str, recorder: Recorder) -> None:
    old = recorder.task(status="scheduled", run_id=DEAD, metadata=MARKED)
    with claims_of(path) as found:
        found.left()
        with found._database as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
        state = again(old)
        state.arguments = "x" * 1_000_000
        with pytest.raises(HistoryError, match="cannot claim tasks of the history .* full; see"):
            found.claim({old: state})
        assert found.claim({old: again(old)}) == {old}
    assert rows_of(path, "SELECT count(*) FROM tasks WHERE rerun_of IS NOT NULL") == [(1,)]


def test_the_lock_is_free_between_two_claims_and_after_the_last(
    path: str, recorder: Recorder
) -> None:
    old = recorder.task(status="scheduled", run_id=DEAD, metadata=MARKED)
    with claims_of(path) as found:
        found.left()
        held = threading.Event()
        release = threading.Event()

        def hold() -> None:
            with found._lock:
                held.set()
                assert release.wait(SOON)

        holder = started(hold)
        assert held.wait(SOON)
        ours: list[set[str]] = []
        claimer = started(lambda: ours.append(found.claim({old: again(old)})))
        assert len(found.tasks([1], 10)) == 1, "to look takes no lock"
        claimer.join(0.2)  # without the lock it takes some milliseconds
        assert not ours, "to claim does"
        release.set()
        joined(holder, claimer)
        assert ours == [{old}]
        with found._lock:
            pass


def test_what_is_left_is_found_by_its_status_however_many_have_ended(
    path: str, recorder: Recorder
) -> None:
    with claims_of(path) as found:
        found.left()
    with closing(sqlite3.connect(path)) as connection:
        for sql, index in ((claims._LEFT, "tasks_status (status=?)"),
                           (claims._STILL_LEFT, "sqlite_autoindex_tasks_1 (id=?)")):
            plan = [row[3] for row in connection.execute(
                f"EXPLAIN QUERY PLAN {sql}", {"statuses": "[]", "word": "", "ids": "[]"})]
            assert f"SEARCH tasks USING INDEX {index}" in plan, plan
            assert any("tasks_rerun (rerun_of=?)" in line for line in plan), plan
            assert not [line for line in plan
                        if line.startswith("SCAN") and "json_each" not in line], plan


def test_a_history_that_is_gone_is_told_and_none_is_made(path: str, recorder: Recorder) -> None:
    with claims_of(path) as found:
        os.unlink(path)
        with pytest.raises(HistoryError, match="there is no history at .* any more"):
            found.left()
    assert not os.path.exists(path)
