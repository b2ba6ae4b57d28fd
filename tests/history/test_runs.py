"""Runs: what names one and its commands, what is left of it, and what is asked of it alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder, kill_runs
from tests.history.plans import plans, scans

from bgworker.history import schema
from bgworker.history.reader import History
from bgworker.model.errors import ConfigurationError, UnknownTask
from bgworker.model.events import LifecycleEvent, LossEvent, TaskSnapshot
from bgworker.model.ids import new_id

RUNS = tuple([new_id(1_764_000_000_000_000_000 + hour * 3_600_000_000_000) for hour in range(3)])
"""The oldest first."""


@pytest.fixture
def numbered(record: Recorder) -> list[dict[int, str]]:
    """Three runs of commands; return the ids of each one's tasks by number."""
    ids: list[dict[int, str]] = []
    for hours, run in zip((3, 2, 1), RUNS):
        record.run(run, ended=record.now)
        ids.append({number: record.task(f"echo {number}", run_id=run,
                                        created=record.ago(hours=hours, seconds=-number),
                                        metadata={"number": number, "cwd": "/264"})
                    for number in range(1, 31)})
    return ids


def names(tasks: Sequence[TaskSnapshot]) -> list[str]:
    return [task.name for task in tasks]


# ---------------------------------------------------------------- names of runs

def test_a_run_is_named_by_last_and_by_how_many_came_after_it(record: Recorder,
                                                              history: History) -> None:
    for run in RUNS:
        record.run(run, ended=record.now)
    assert [history.run_id(word) for word in ("last", "last~0", "last~1", "last~2")] == [
        RUNS[2], RUNS[2], RUNS[1], RUNS[0]]
    assert history.run_id(RUNS[1]) == history.run_id(RUNS[1][-8:].upper()) == RUNS[1]


@pytest.mark.parametrize("word", ["last~3", "last~", "last~-1", "last~x", "latest", "~1",
                                  "last~9999999999", "last ", "é"])
def test_a_run_that_is_not_there_is_refused_with_those_that_are(
        record: Recorder, history: History, word: str) -> None:
    for run in RUNS:
        record.run(run, ended=record.now)
    newest = ", ".join(run[-8:] for run in RUNS[::-1])
    with pytest.raises(ConfigurationError, match="^run: expected the id of a run.* got '.*', "
                                                 f"which no run has; the newest are {newest}$"):
        history.run_id(word)


def test_the_beginning_that_several_runs_have_is_refused(record: Recorder,
                                                         history: History) -> None:
    for run in RUNS:
        record.run(run, ended=record.now)
    with pytest.raises(ConfigurationError, match="which several runs have; the newest are "):
        history.run_id(RUNS[0][:4])


def test_a_history_without_runs_says_so(history: History) -> None:
    for word in ("last", "last~1", "01"):
        with pytest.raises(ConfigurationError, match="which no run has; it has none$"):
            history.tasks(run=word)


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("form", ["{}", "[{}]"])
def test_a_number_names_a_command_of_the_newest_run_or_of_the_one_that_is_named(
        history: History, numbered: list[dict[int, str]], form: str) -> None:
    for number in (1, 2, 17, 26, 30):
        word = form.format(number)
        assert history.task(word).task_id == numbered[2][number]
        assert history.task(word, run="last~1").task_id == numbered[1][number]
        assert history.task(word, run=RUNS[0]).task_id == numbered[0][number]


@pytest.mark.parametrize("word", ["31", "[31]", "264", "[0]", "[]", "[01]", "[1", "1]", "-1",
                                  "[99999999999999999999]", "99999999"])
def test_a_number_that_no_command_has_is_refused(history: History, numbered: object,
                                                 word: str) -> None:
    for run in (None, "last~1"):
        with pytest.raises(UnknownTask, match="^there is no task "):
            history.task(word, run=run)


def test_the_refusal_of_a_number_says_in_which_run_it_was_looked_for(
        history: History, numbered: object) -> None:
    newest = f"; a number is one of the newest run, {RUNS[2][-8:]}, unless another run is named"
    with pytest.raises(UnknownTask, match=newest):
        history.task("[31]")
    with pytest.raises(UnknownTask, match=f"^there is no task '31' in the run {RUNS[0][-8:]};"):
        history.task("31", run="last~2")


def test_what_pruning_and_other_tasks_leave_keeps_its_number(
        record: Recorder, history: History, numbered: list[dict[int, str]]) -> None:
    record.connection.execute(f"DELETE FROM tasks WHERE id = '{numbered[2][5]}'")
    record.task("of Python", run_id=RUNS[2], metadata={"number": "7"})
    record.task("newest", run_id=RUNS[0], created=record.now)
    assert history.task("4").name == "echo 4" and history.task("7").name == "echo 7"
    with pytest.raises(UnknownTask):
        history.task("5")


def test_a_name_goes_before_a_number_and_a_number_before_the_beginning_of_an_id(
        record: Recorder, history: History, numbered: list[dict[int, str]]) -> None:
    other = record.task(id="12".ljust(32, "a"), created=record.ago(days=1))
    assert history.task("12").task_id == numbered[2][12]
    assert history.task("12a").task_id == other
    named = record.task("12", created=record.ago(days=2))
    bracketed = record.task("[3]", created=record.ago(days=2))
    assert history.task("12").task_id == named
    assert history.task("[12]").task_id == numbered[2][12]
    assert history.task("[3]").task_id == bracketed
    digits = numbered[0][1][-8:]
    assert history.task(digits).task_id == numbered[0][1]


def test_of_a_run_all_names_are_its_own(record: Recorder, history: History,
                                        numbered: list[dict[int, str]]) -> None:
    assert history.task("echo 9", run="last~1").task_id == numbered[1][9]
    assert history.task("last", run=RUNS[0]).task_id == numbered[0][30]
    assert history.task(numbered[0][3][-8:], run=RUNS[0]).task_id == numbered[0][3]
    for word in (numbered[0][3], numbered[0][3][-8:]):
        assert history.task(word).task_id == numbered[0][3]
        with pytest.raises(UnknownTask, match=f"in the run {RUNS[1][-8:]}"):
            history.task(word, run=RUNS[1])


# ---------------------------------------------------------------- one run, and what is left

@pytest.fixture
def again(record: Recorder) -> None:
    """A run of which some was run again, with what became of that."""
    for run in RUNS:
        record.run(run, ended=None if run == RUNS[2] else record.now)
    times = iter(range(100, 0, -1))

    def task(name: str, status: str, run: int, rerun_of: str | None = None) -> str:
        return record.task(name, status, run_id=RUNS[run], rerun_of=rerun_of,
                           created=record.ago(minutes=next(times)))

    task("good", "completed", 0)
    mended, failed, twice = [task(name, "failed", 0) for name in ("mended", "failed", "twice")]
    late, open_ = task("late", "timed_out", 0), task("open", "running", 0)
    stopped = task("stopped", "cancelled", 0)
    task("mended again", "completed", 1, mended)
    second = task("twice again", "failed", 1, twice)
    task("late again", "cancelled", 1, late)
    task("twice and again", "failed", 2, second)
    task("runs", "running", 2, stopped)
    task("waits", "scheduled", 2)
    assert failed and open_


def test_left_is_what_did_not_complete_and_was_not_run_again(history: History,
                                                             again: object) -> None:
    left = ["waits", "runs", "twice and again", "late again", "open", "failed"]
    assert names(history.tasks(left=True)) == left
    assert names(history.tasks(left=True, limit=2)) == left[:2]
    assert names(history.tasks(left=True, name="*again")) == ["twice and again", "late again"]
    assert names(history.tasks(left=True, status="failed")) == ["twice and again", "failed"]
    assert names(history.tasks(left=True, status="interrupted")) == ["open"]
    assert names(history.tasks(left=True, run="last~2")) == ["open", "failed"]
    assert names(history.tasks(left=True, run="last")) == left[:3]
    assert names(history.tasks(left=True, status="failed", run="last~1")) == []
    assert names(history.tasks(left=True, since=timedelta(minutes=93, seconds=30))) == [
        name for name in left if name != "failed"], "the end of its run is its last sign"
    assert [(each.run.run_id, each.left) for each in history.run_counts()] == [
        (RUNS[2], 3), (RUNS[1], 1), (RUNS[0], 2)]


def test_a_run_alone_is_asked_for_with_all_other_filters(history: History, again: object) -> None:
    assert names(history.tasks(run="last")) == ["waits", "runs", "twice and again"]
    assert names(history.tasks(run="last~1", status="failed")) == ["twice again"]
    assert names(history.tasks(run=RUNS[0], status="failed", name="t*")) == ["twice"]
    assert names(history.tasks(run=RUNS[0], status="interrupted")) == ["open"]
    assert names(history.tasks(run=RUNS[0], since=timedelta(minutes=96, seconds=30))) == [
        "stopped", "open", "late"]
    assert names(history.tasks(run=RUNS[0], limit=1)) == ["stopped"]
    assert [*history.task_keys(run="last", limit=None)] == [11, 12, 13][::-1]


def test_the_events_of_a_run_are_its_tasks_without_losses(record: Recorder, history: History,
                                                          again: object) -> None:
    record.lost(3)
    record.said(history.task("mended again").task_id, "hello")
    every = list(history.events())
    of_runs = [list(history.events(run=run)) for run in RUNS]
    assert sum(of_runs, []) == [event for event in every if not isinstance(event, LossEvent)]
    assert isinstance(every[-1], LossEvent)
    assert [event.task.name for event in of_runs[1] if isinstance(event, LifecycleEvent)] == [
        "mended again", "twice again", "late again"]


def test_runs_can_be_asked_for_since_a_time_and_one_by_one(record: Recorder,
                                                           history: History) -> None:
    record.run(RUNS[0], ended=record.ago(days=3))
    record.run(RUNS[1], ended=record.ago(hours=1))
    record.run(RUNS[2], host="elsewhere")

    def found(**how: Any) -> list[int]:
        return [RUNS.index(each.run.run_id) for each in history.run_counts(**how)]

    assert found() == [2, 1, 0]
    assert found(since=timedelta(days=1)) == [2, 1]
    assert found(since=record.ago(minutes=5)) == [2]
    assert found(run="last~2") == [0]
    assert found(run=RUNS[1][-8:]) == [1]


def test_a_run_that_was_killed_counts_from_its_start(record: Recorder, history: History) -> None:
    for run, started in zip(RUNS, (record.ago(days=3), record.ago(hours=1))):
        record.run(run, host=schema.this_host())
        record.connection.execute(f"UPDATE runs SET started_utc = '{started.isoformat()}' "
                                  f"WHERE run_id = '{run}'")
    alive = [(run, True) for run in (RUNS[1], RUNS[0])]
    for is_alive in (True, False):
        found = history.run_counts(since=timedelta(days=1))
        assert [(each.run.run_id, each.run.is_alive) for each in found] == (
            alive if is_alive else [(RUNS[1], False)])
        kill_runs(record.path, *RUNS[:2])


# ---------------------------------------------------------------- how they are answered

def test_no_question_about_a_run_reads_a_table(record: Recorder, history: History) -> None:
    record.run(RUNS[0], ended=record.now)
    for how in ({"left": True}, {"left": True, "run": "last"}, {"run": "last"},
                {"run": "last", "status": "failed"}, {"run": "last", "since": timedelta(1)},
                {"run": "last", "status": "interrupted", "name": "x*"}):
        found = plans(history, lambda: history.tasks(**how))  # type: ignore[arg-type]
        assert found and scans(found) == [], how
        if "run" in how:
            assert any("tasks_run" in plan for plan in found), how
    found = plans(history, lambda: list(history.events(run="last")))
    found += plans(history, lambda: history.run_counts(since=timedelta(1)))
    for word in ("12", "[12]", "last", "name", "0" * 8):
        def ask() -> None:
            with pytest.raises(UnknownTask):
                history.task(word, run="last")
        found += plans(history, ask)
    assert found and scans(found) == []


@pytest.mark.parametrize("version", range(1, schema.VERSION))
def test_in_an_older_file_nothing_was_run_again(tmp_path: Path, version: int) -> None:
    path = tmp_path / "h.db"
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in schema.MADE[version - 1]:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.execute("INSERT INTO runs (run_id, ended_utc) VALUES (?, '2026')", (RUNS[0],))
    connection.executemany(
        "INSERT INTO tasks (id, run_id, name, status, created_utc, metadata_json, last_seq) "
        "VALUES (?, ?, 'x', ?, '2026', ?, 1)",
        [(new_id(number), RUNS[0], status, f'{{"number":{number}}}')
         for number, status in enumerate(["completed", "failed", "running"], 1)])
    connection.close()
    with History(path) as history:
        assert [each.status for each in history.tasks(left=True)] == ["interrupted", "failed"]
        assert history.run_counts()[0].left == 2
        assert history.task("2", run="last").status == "failed"
