"""What a crash has interrupted goes on: each task once at a time, and only as what it was."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from bgworker import (ConfigurationError, EventType, History, HistoryError, Resumed, Scheduler,
                      ShutdownError, SinkOptions, TaskStatus, current_task, resumable)
from bgworker.history import claims, sink
from bgworker.history.schema import this_host
from bgworker.history.sink import SqliteSink
from bgworker.model.ids import new_id, new_run_id
from bgworker.running.source import source_of
from tests.histories import Recorder, kill_runs, rows_of, run_cli
from tests.remote import crashing
from tests.support import SOON, Gate, exit_code, forked, in_time, needs_fork, until

DEAD = new_id(1_764_000_000_000_000_000)


@resumable("echo", version=2)
def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs, dict(current_task().metadata)


GATE = Gate()


@resumable("gated")
def gated(number: int) -> int:
    GATE()
    return number


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "history.db")


@pytest.fixture
def recorder(path: str) -> Iterator[Recorder]:
    """A history of a run whose process is dead."""
    made = Recorder(path)
    made.run(DEAD, host=this_host())
    kill_runs(path, DEAD)
    yield made
    made.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    global GATE
    GATE = Gate()
    yield GATE
    GATE.open()


def lost(recorder: Recorder, *args: Any, function: Callable[..., Any] = echo, name: str = "echo",
         version: Any = 2, status: str = "scheduled", metadata: Any = None, **columns: Any) -> str:
    """Record a task of the dead run; return its id."""
    source = source_of(function)
    return recorder.task(**{
        "name": "lost", "status": status, "run_id": DEAD, "script_id": source.script_id,
        "script_hash": source.script_hash,
        "metadata": {**(metadata or {}), "resumable": {"name": name, "version": version}},
        "arg_json": json.dumps({"args": args, "kwargs": {}}),
        "rerun_of": (metadata or {}).get("rerun_of"), **columns,
    })


def resumed(path: str, **how: Any) -> tuple[Resumed, Scheduler]:
    """Resume in a Scheduler of its own, and wait for the tasks."""
    with Scheduler(2, sinks=[f"sqlite:{path}"]) as pool:
        return pool.resume(path, **how), pool


def reasons(found: Resumed) -> dict[str, str]:
    return {each.task_id: each.reason for each in found.skipped}


# -- what goes on, and how --


@pytest.mark.parametrize("status", ["created", "scheduled", "running", "interrupted"])
def test_a_task_of_a_dead_run_goes_on_as_a_new_task_that_names_it(
    path: str, recorder: Recorder, status: str
) -> None:
    old = lost(recorder, 1, ["a", None], status=status, metadata={"ticket": 7}, timeout_sec=20.0)
    found, pool = resumed(path)
    task, = found.tasks
    metadata = {"ticket": 7, "resumable": {"name": "echo", "version": 2}, "rerun_of": old}
    assert task.result(SOON) == ((1, ["a", None]), {}, metadata)
    assert (task.name, task.snapshot().timeout) == ("lost", 20.0)
    assert found.skipped == () and found.left == 0
    with History(path) as history:
        recorded = history.task(task.id)
        assert recorded.status is TaskStatus.COMPLETED and recorded.metadata == metadata
        assert recorded.run_id == pool.run_id
        assert json.loads(recorded.arguments or "") == {"args": [1, ["a", None]], "kwargs": {}}
        assert history.task(old).status is TaskStatus.INTERRUPTED
        later = history.later_of(old)
        assert later is not None and later.task_id == task.id


def test_tasks_go_on_in_the_order_of_then_with_the_settings_of_now(
    path: str, recorder: Recorder
) -> None:
    for number in range(450):  # more than are claimed at a time
        lost(recorder, number)
    with Scheduler(1, sinks=[f"sqlite:{path}"], record_result=True, max_pending=500) as pool:
        found = pool.resume(path)
    assert [task.result()[0] for task in found.tasks] == [(number,) for number in range(450)]
    assert (found.tasks[-1].snapshot().result or "").startswith("[[449],{}")
    assert resumed(path)[0] == Resumed()


def test_the_claim_is_the_row_that_the_sink_goes_on_with(
    path: str, recorder: Recorder, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(recorder, 1, function=gated, name="gated", version=1, timeout_sec=100.0,
         metadata={"ticket": [1]})
    rows: list[Any] = []
    claim = claims.Claims.claim

    def spied(self: claims.Claims, states: Any) -> set[str]:
        ours = claim(self, states)
        rows.extend(rows_of(path, "SELECT * FROM tasks ORDER BY key"))
        return ours

    monkeypatch.setattr(claims.Claims, "claim", spied)
    with Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        blocker = pool.submit(gate)
        assert gate.entered.wait(SOON)
        found = pool.resume(path)
        assert pool.flush(SOON)
        (claimed,) = [row for row in rows if row[1] == found.tasks[0].id]
        (written,) = rows_of(path, f"SELECT * FROM tasks WHERE id = '{found.tasks[0].id}'")
        assert claimed == written, "as the sink writes what waits"
        assert pool.get(found.tasks[0].id).task_id == found.tasks[0].id
        gate.open()
        blocker.result(SOON)
    assert rows_of(path, f"SELECT status, key FROM tasks WHERE id = '{found.tasks[0].id}'") == [
        ("completed", claimed[0])]


def test_a_function_is_called_with_exactly_what_it_was_submitted_with(tmp_path: Path) -> None:
    values = [None, True, 1, 1.0, -0.0, 10**30, "\u20ac\n", [[]], {"": {"a": [1]}}]
    path = str(tmp_path / "history.db")
    with Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        before = pool.submit(echo, *values, key=values).result(SOON)
    rows = Recorder(path)
    rows.connection.execute("UPDATE tasks SET status = 'interrupted'")
    rows.close()
    (task,) = resumed(path)[0].tasks
    assert repr(task.result()[:2]) == repr(before[:2])


# -- what does not --


@pytest.mark.parametrize(("how", "told"), [
    ({"name": "nobody's"}, "no function is registered as \"nobody's\" in this process; import"),
    ({"version": 1}, "it was submitted to version 1 of 'echo', and tests.remote.test_resume.echo "
                     "has version 2; submit it anew"),
    ({"version": "2"}, "its record does not tell its function"),
    ({"version": True}, "its record does not tell its function"),
    ({"name": None}, "its record does not tell its function"),
    ({"function": gated}, "the source of tests.remote.test_resume.echo is another than when it"),
    ({"script_hash": None}, "the source of tests.remote.test_resume.echo is another"),
    ({"arg_json": None}, "its arguments are not recorded as those of a resumable task are"),
    ({"arg_json": '{"truncated":9,"head":"["}'}, "its arguments are not recorded"),
    ({"arg_json": '{"args":[1'}, "its arguments are not recorded"),
    ({"arg_json": '{"args":[NaN],"kwargs":{}}'}, "its arguments are not recorded"),
    ({"arg_json": '{"args":{},"kwargs":{}}'}, "its arguments are not recorded"),
    ({"arg_json": '{"args":[],"kwargs":[]}'}, "its arguments are not recorded"),
    ({"arg_json": '{"args":[],"kwargs":{},"more":1}'}, "its arguments are not recorded"),
    ({"arg_json": "[" * 100_000}, "its arguments are not recorded"),
    ({"arg_json": b"\x80\x04."}, "its arguments are not recorded"),
    ({"arg_json": json.dumps({"args": ["\0"], "kwargs": {}})}, "has a NUL"),
    ({"arg_json": json.dumps({"args": ["x" * 70_000], "kwargs": {}})}, "max_payload is 65536"),
    ({"timeout_sec": -1.0}, "its arguments are not recorded"),
    ({"metadata_json": '{"resumable"'}, "its record does not tell its function"),
    ({"metadata_json": '{"resumable": 7}'}, "its record does not tell its function"),
])
def test_a_task_that_cannot_be_run_as_what_it_was_is_skipped_with_its_reason(
    path: str, recorder: Recorder, how: dict[str, Any], told: str
) -> None:
    fine = lost(recorder, "fine")
    odd = lost(recorder, "odd", **how)
    found, _ = resumed(path)
    assert [task.result()[0] for task in found.tasks] == [("fine",)]
    assert list(reasons(found)) == [odd] and told in reasons(found)[odd]
    assert found.skipped[0].name == "lost"
    assert rows_of(path, "SELECT rerun_of FROM tasks WHERE rerun_of IS NOT NULL") == [(fine,)]
    assert list(reasons(resumed(path)[0])) == [odd], "it stays, and is told again"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "timed_out"])
def test_what_has_ended_is_not_run_again(path: str, recorder: Recorder, status: str) -> None:
    lost(recorder, 1, status=status)
    assert resumed(path)[0] == Resumed()


def test_what_failed_or_timed_out_is_run_again_when_asked_for(
    path: str, recorder: Recorder
) -> None:
    for status in ("completed", "failed", "cancelled", "timed_out", "interrupted"):
        lost(recorder, status, status=status)

    def run_again(*also: str) -> set[str]:
        copy = f"{path}.{len(also)}"
        copied = Recorder(path)
        copied.connection.execute("VACUUM INTO ?", (copy,))
        copied.close()
        kill_runs(copy, DEAD)
        return {task.result()[0][0] for task in resumed(copy, also=also)[0].tasks}

    assert run_again() == {"interrupted"}
    assert run_again("failed") == {"failed", "interrupted"}
    assert run_again("failed", "timed_out") == {"failed", "timed_out", "interrupted"}


def test_what_failed_in_a_run_that_goes_on_is_left_to_it(path: str) -> None:
    @resumable("fails")
    def fails() -> None:
        raise ValueError

    with Scheduler(1, sinks=[f"sqlite:{path}"]) as first:
        first.submit(fails).exception(SOON)
        assert first.flush(SOON)
        with Scheduler(1, sinks=[f"sqlite:{path}"]) as second:
            assert second.resume(path, also=["failed"]) == Resumed()
            assert first.resume(path, also=["failed"]) == Resumed()


@pytest.mark.parametrize("which", ["this process", "another machine", "of no run"])
def test_tasks_of_a_run_that_may_go_on_are_left_to_it(
    path: str, recorder: Recorder, which: str
) -> None:
    run = new_run_id(time.time_ns()) if which == "this process" else new_id(time.time_ns())
    recorder.run(run, host=this_host() if which == "this process" else "elsewhere")
    lost(recorder, 1, run_id=None if which == "of no run" else run)
    assert resumed(path)[0] == Resumed()


def test_a_task_that_was_copied_here_as_interrupted_goes_on(path: str, recorder: Recorder) -> None:
    recorder.run(run := new_id(time.time_ns()), host=None)
    lost(recorder, "copied", run_id=run, status="interrupted")
    lost(recorder, "may run elsewhere", run_id=run, status="running")
    assert [task.result()[0] for task in resumed(path)[0].tasks] == [("copied",)]


def test_a_task_that_somebody_has_run_again_is_not(path: str, recorder: Recorder) -> None:
    old = lost(recorder, 1)
    lost(recorder, 1, metadata={"rerun_of": old}, status="completed")
    assert resumed(path)[0] == Resumed()


def test_what_a_dead_resumer_had_claimed_is_the_next_attempt(
    path: str, recorder: Recorder
) -> None:
    first = lost(recorder, 1, status="running")
    claimed = lost(recorder, 1, metadata={"rerun_of": first})
    (task,) = resumed(path)[0].tasks
    assert task.snapshot().metadata["rerun_of"] == claimed


# -- attempts --


def chain(recorder: Recorder, *statuses: str) -> str:
    """Record a task and those that ran it again; return the id of the last."""
    last = ""
    for status in statuses:
        last = lost(recorder, 1, status=status, metadata={"rerun_of": last} if last else {})
    return last


def test_a_task_is_begun_three_times_and_what_only_waited_ten_times_as_often(
    path: str, recorder: Recorder
) -> None:
    fine = [chain(recorder, "running", "scheduled", "interrupted"),
            chain(recorder, *["scheduled"] * 29)]
    begun = chain(recorder, "running", "scheduled", "running", "interrupted", "scheduled")
    waited = chain(recorder, *["scheduled"] * 30)
    found, _ = resumed(path)
    assert [task.snapshot().metadata["rerun_of"] for task in found.tasks] == fine
    assert reasons(found) == {
        begun: "it was begun 3 times without coming to an end, and attempts is 3; see what it says "
               "before it is interrupted, or raise attempts",
        waited: "it was queued 30 times without coming to an end, and attempts is 3; see why its "
                "process ends each time, or raise attempts"}
    found, _ = resumed(path, attempts=4)
    assert {task.snapshot().metadata["rerun_of"] for task in found.tasks} == {begun, waited}


def test_a_failure_is_an_attempt(path: str, recorder: Recorder) -> None:
    last = chain(recorder, "interrupted", "failed", "failed")
    found, _ = resumed(path, also={TaskStatus.FAILED})
    assert list(reasons(found)) == [last]


@pytest.mark.parametrize("circle", ["itself", "two"])
def test_a_chain_that_leads_back_to_itself_ends(
    path: str, recorder: Recorder, circle: str
) -> None:
    first = lost(recorder, 1, status="scheduled")
    second = first
    if circle == "two":
        second = lost(recorder, 1, rerun_of=first, status="completed")
    recorder.connection.execute("UPDATE tasks SET rerun_of = ? WHERE id = ?", (second, first))
    tail = lost(recorder, 1, rerun_of="nobody", status="scheduled")
    found, _ = in_time(lambda: resumed(path))
    assert [task.snapshot().metadata["rerun_of"] for task in found.tasks] == [tail]


def test_a_task_that_kills_its_process_does_so_three_times(tmp_path: Path) -> None:
    crashing.run(tmp_path, "deadly", 0.3)
    for _ in range(2):
        crashing.run(tmp_path, "resume")
    assert crashing.run(tmp_path, "resume").split() == ["0", "1", "0"]
    assert (tmp_path / "log").read_text().count("deadly") == 3


# -- room, and what goes wrong on the way --


def test_what_the_queue_has_no_room_for_is_left_and_nobody_has_claimed_it(
    path: str, recorder: Recorder, gate: Gate
) -> None:
    for number in range(5):
        lost(recorder, number, function=gated, name="gated", version=1)
    with Scheduler(1, sinks=[f"sqlite:{path}"], max_pending=2) as pool:
        found = pool.resume(path)
        assert (len(found.tasks), found.left) == (3, 2)
        assert pool.resume(path) == Resumed(left=2)
        claimed = rows_of(path, "SELECT count(*) FROM tasks WHERE rerun_of IS NOT NULL")
        assert claimed == [(3,)]
        gate.open()
        until(lambda: not pool.health().pending)
        again = pool.resume(path)
    assert [task.result() for task in (*found.tasks, *again.tasks)] == [0, 1, 2, 3, 4]


def test_a_scheduler_that_does_not_record_there_is_refused(path: str, tmp_path: Path) -> None:
    with Scheduler(1, sinks=[f"sqlite:{path}"]):
        pass
    for sinks in ([], [f"sqlite:{path}.other"], [f"jsonl:{tmp_path}/x.jsonl"]):
        with Scheduler(1, sinks=sinks) as pool:
            with pytest.raises(ConfigurationError) as caught:
                pool.resume(path)
            assert f"sinks=['sqlite:{path}']" in str(caught.value)
    with Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        pool.unregister_sink("sqlite")
        with pytest.raises(ConfigurationError, match="does not record its tasks into"):
            pool.resume(path)
        for types, is_all in ((["TaskCompleted"], False), (list(EventType), True)):
            name = pool.register_sink(f"sqlite:{path}", options=SinkOptions(types=types))
            if is_all:
                assert pool.resume(path) == Resumed()
            else:
                with pytest.raises(ConfigurationError, match="or not all of their life cycle"):
                    pool.resume(path)
            pool.unregister_sink(name)


def test_the_history_may_be_named_by_another_path_to_it(
    path: str, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(recorder, 1)
    os.symlink(path, tmp_path / "link.db")
    monkeypatch.chdir(tmp_path)
    with Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        assert len(pool.resume("link.db").tasks) == 1
        assert pool.resume(Path("history.db")) == Resumed()


@pytest.mark.parametrize(("how", "told"), [
    ({"attempts": 0}, "attempts: expected a whole number >= 1, got 0"),
    ({"attempts": 1001}, "attempts: expected at most 1000, got 1001"),
    ({"attempts": None}, "attempts: expected"),
    ({"also": "failed"}, "also: expected a collection of TaskStatus, got 'failed'"),
    ({"also": ["cancelled"]}, "also: expected some of failed, timed_out, got 'cancelled'; what was "
                              "interrupted is resumed in any case, what was cancelled never"),
    ({"also": ["late"]}, "also: expected one of"),
])
def test_a_setting_that_cannot_be_is_refused(path: str, how: dict[str, Any], told: str) -> None:
    with Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        with pytest.raises(ConfigurationError) as caught:
            pool.resume(path, **how)
    assert told in str(caught.value)


def test_after_shutdown_nothing_is_resumed(path: str, recorder: Recorder) -> None:
    lost(recorder, 1)
    pool = Scheduler(1, sinks=[f"sqlite:{path}"])
    pool.shutdown()
    with pytest.raises(ShutdownError, match="cannot resume after shutdown"):
        pool.resume(path)
    assert rows_of(path, "SELECT count(*) FROM tasks") == [(1,)]


def test_a_scheduler_that_shuts_down_meanwhile_gives_its_claims_back(
    path: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(recorder, 1)
    claim = claims.Claims.claim
    pool = Scheduler(1, sinks=[f"sqlite:{path}"])
    monkeypatch.setattr(claims.Claims, "claim", lambda self, states: (
        claim(self, states), pool.shutdown(wait=False))[0])
    with pytest.raises(ShutdownError):
        pool.resume(path)
    pool.shutdown()
    monkeypatch.undo()
    assert rows_of(path, "SELECT count(*) FROM tasks") == [(1,)]
    assert len(resumed(path)[0].tasks) == 1


class Breaking(Executor):
    """Takes some calls, and then none."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.taken: list[Future[Any]] = []

    def submit(self, *call: Any, **more: Any) -> Any:
        if not self.left:
            raise BrokenExecutor("no worker is left")
        self.left -= 1
        self.taken.append(Future())
        return self.taken[-1]


def test_what_is_left_goes_on_in_the_processes_of_an_executor(
    path: str, recorder: Recorder
) -> None:
    olds = [lost(recorder, number) for number in range(3)]
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes,
        Scheduler(executor=processes, sinks=[f"sqlite:{path}"]) as pool,
    ):
        found = pool.resume(path)
        results = [task.result(SOON) for task in found.tasks]
    assert [(args, more["rerun_of"]) for args, _, more in results] == [
        ((number,), old) for number, old in enumerate(olds)]
    assert rows_of(path, "SELECT status, rerun_of FROM tasks WHERE rerun_of > '' ORDER BY id") == [
        ("completed", old) for old in olds]
    assert resumed(path)[0].tasks == ()


def test_a_claim_is_free_again_if_its_executor_breaks_at_the_submit(
    path: str, recorder: Recorder
) -> None:
    olds = [lost(recorder, number) for number in range(3)]
    for late in False, True:
        with Scheduler(executor=Breaking(0), sinks=[f"sqlite:{path}"]) as pool:
            with pytest.raises(ShutdownError, match="no worker is left"):
                pool.resume(path)
            if late:
                pool.flush()
            assert rows_of(path, "SELECT count(*) FROM tasks WHERE rerun_of IS NOT NULL") == [(0,)]
    assert rows_of(path, "SELECT status, rerun_of, json_extract(metadata_json, '$.rerun_of'), "
                   f"completed_utc > '' FROM tasks WHERE run_id <> '{DEAD}'") == [
        ("cancelled", None, None, 1)] * 2
    found = resumed(path)[0]
    assert [task.result()[2]["rerun_of"] for task in found.tasks] == olds


@pytest.mark.parametrize(("error", "told"), [
    (RuntimeError("can't start new thread"), ShutdownError),
    (KeyboardInterrupt(), KeyboardInterrupt),
])
def test_a_claim_is_free_again_if_no_thread_can_be_started_for_it(
    path: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, error: BaseException,
    told: type[BaseException],
) -> None:
    olds = [lost(recorder, number) for number in range(3)]
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("bgworker_"):
            raise error
        start(thread)

    with Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(told):
                pool.resume(path)
        pool.flush()
        found = pool.resume(path)
        assert [task.result(SOON)[2]["rerun_of"] for task in found.tasks] == olds


def test_an_error_midway_tells_what_was_queued_until_then(
    path: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = lost(recorder, 0, version=1)
    olds = [lost(recorder, number) for number in range(3)]

    def refuse(self: claims.Claims, states: Any) -> None:
        raise HistoryError("the disk is full")

    executor = Breaking(2)
    with Scheduler(executor=executor, sinks=[f"sqlite:{path}"]) as pool:
        with pytest.raises(ShutdownError) as caught:
            pool.resume(path)
        monkeypatch.setattr(claims.Claims, "give_back", refuse)
        with pytest.raises(HistoryError, match="the disk is full") as refused:
            pool.resume(path)
        for future in executor.taken:
            future.set_exception(BrokenExecutor())
    found: Resumed = caught.value.resumed  # type: ignore[attr-defined]
    assert [task.snapshot().metadata["rerun_of"] for task in found.tasks] == olds[:2]
    assert [each.task_id for each in found.skipped] == [odd]
    assert refused.value.resumed.tasks == ()  # type: ignore[attr-defined]


def test_what_the_sink_was_about_to_write_is_no_claim_either(
    path: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = lost(recorder, 1)
    encoded, given_back = threading.Event(), threading.Event()
    rows, give_back = sink.Rows, claims.Claims.give_back

    def late(events: Any) -> Any:
        made = rows(events)
        encoded.set()
        assert given_back.wait(SOON)
        return made

    def spied(self: claims.Claims, states: Any) -> None:
        assert encoded.wait(SOON)
        give_back(self, states)
        given_back.set()

    monkeypatch.setattr(sink, "Rows", late)
    monkeypatch.setattr(claims.Claims, "give_back", spied)
    with Scheduler(executor=Breaking(0), sinks=[f"sqlite:{path}"]) as pool:
        with pytest.raises(ShutdownError):
            pool.resume(path)
    monkeypatch.undo()
    task, = resumed(path)[0].tasks
    assert task.result()[2]["rerun_of"] == old


def test_a_history_that_cannot_be_written_to_is_told(
    path: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(recorder, 1)
    with Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        recorder.connection.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr("bgworker.history.schema.BUSY_SECONDS", 0.05)
        with pytest.raises(HistoryError, match="cannot claim tasks of the history .*locked"):
            pool.resume(path)
        recorder.connection.execute("ROLLBACK")
        assert len(pool.resume(path).tasks) == 1


# -- beside others --


def test_nobody_takes_the_claims_of_a_process_that_lives_for_interrupted(
    path: str, recorder: Recorder, gate: Gate
) -> None:
    lost(recorder, 1, function=gated, name="gated", version=1)
    with Scheduler(1, sinks=[f"sqlite:{path}?max_tasks=0"]) as pool:
        blocker = pool.submit(gate)
        assert gate.entered.wait(SOON)
        (task,) = pool.resume(path).tasks
        seen = run_cli("tasks", "--json", "--db", path, cwd=os.path.dirname(path))
        statuses = {each["task_id"]: each["status"] for each in json.loads(seen.stdout)["tasks"]}
        assert statuses[task.id] == "scheduled"
        with claims.Claims(path, [TaskStatus.INTERRUPTED], "resumable") as others:
            assert others.left() == []
        assert pool.flush(SOON)
        assert (task.id,) in rows_of(path, "SELECT id FROM tasks"), "it was not pruned"
        gate.open()
        blocker.result(SOON)


def test_two_schedulers_of_one_process_share_what_is_left(path: str, recorder: Recorder) -> None:
    for number in range(1000):
        lost(recorder, number)
    with (Scheduler(1, sinks=[SqliteSink(path)]) as first,
          Scheduler(1, sinks=[SqliteSink(path)]) as second):
        found: list[Resumed] = []
        threads = [threading.Thread(target=lambda pool=pool: found.append(pool.resume(path)))
                   for pool in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    numbers = [task.result()[0][0] for each in found for task in each.tasks]
    assert sorted(numbers) == list(range(1000))
    assert not any(each.skipped or each.left for each in found)


@needs_fork
def test_a_forked_child_resumes_as_a_run_of_its_own(path: str, recorder: Recorder) -> None:
    lost(recorder, 1)
    pool = Scheduler(1, sinks=[f"sqlite:{path}"])

    def resume() -> None:
        assert len(pool.resume(path).tasks) == 1
        pool.shutdown()

    assert exit_code(forked(resume)) == 0
    assert pool.resume(path) == Resumed()
    pool.shutdown()
    (run,) = rows_of(path, "SELECT run_id FROM tasks WHERE status = 'completed'")[0]
    assert run != pool.run_id


# -- processes that are killed --


@needs_fork
@pytest.mark.parametrize("where", ["before the claim", "inside the claim", "after the claim"])
def test_a_resumer_that_is_killed_on_the_way_leaves_all_to_the_next(
    path: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    old = [lost(recorder, number) for number in range(3)]

    def resume() -> None:
        claim = claims.Claims.claim

        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def claim_and_die(self: claims.Claims, states: Any) -> set[str]:
            claim(self, states)
            return set(die() or ())

        name, act = {"before the claim": ("claim", die), "inside the claim": ("", die),
                     "after the claim": ("claim", claim_and_die)}[where]
        if name:
            monkeypatch.setattr(claims.Claims, name, act)
        else:  # its rows are in, and not yet committed
            store = claims.store_tasks
            monkeypatch.setattr(claims, "store_tasks", lambda *given: (store(*given), die()))
        Scheduler(1, sinks=[f"sqlite:{path}"]).resume(path)

    assert exit_code(forked(resume)) == -signal.SIGKILL
    found, _ = resumed(path)
    assert [task.result()[0] for task in found.tasks] == [(0,), (1,), (2,)]
    earlier = [task.snapshot().metadata["rerun_of"] for task in found.tasks]
    assert (earlier == old) == (where != "after the claim"), "what was claimed is a link of a chain"
    with History(path) as history:
        assert [history.later_of(each).task_id for each in old] == [  # type: ignore[union-attr]
            task.id for task in found.tasks]


def test_what_processes_leave_that_are_killed_again_and_again_is_done_in_the_end(
    tmp_path: Path
) -> None:
    crashing.run_kills(tmp_path, 60, 3, lambda: random.uniform(0.0, 0.3))


@pytest.mark.slow
def test_five_hundred_tasks_outlive_twenty_kills(tmp_path: Path) -> None:
    begun, broken = crashing.run_kills(tmp_path, 500, 20, lambda: random.uniform(0.0, 0.3))
    assert broken, "the kills interrupted nothing"


def test_the_checks_notice_claims_that_do_not_look_first(tmp_path: Path) -> None:
    crashing.crash(tmp_path, 0.0, "submit", 400, "held")
    with pytest.raises(AssertionError, match="tasks were claimed twice"):
        for _ in range(5):  # two that begin at the same moment mostly do so at once
            crashing.crash(tmp_path, 0.4, "resume", "held", "unguarded", processes=2)
            crashing.check(tmp_path)
