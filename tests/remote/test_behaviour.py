"""What a Scheduler promises, on each of the executors: threads first, which show what is meant."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import itertools
import json
import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import CancelledError
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.remote import functions
from tests.remote.conftest import Hold, Holds
from tests.remote.engines import (
    DASK,
    ELSEWHERE,
    INTERPRETERS,
    LIMITS,
    PROCESSES,
    WORKERS,
    Engine,
    can,
)
from tests.support import (
    SOON,
    RecordingSink,
    balanced,
    environment,
    in_child,
    needs_fork,
    started,
    until,
)

from bgworker import (
    BgworkerError,
    ConfigurationError,
    LifecycleEvent,
    PendingFull,
    Scheduler,
    ShutdownError,
    StreamEvent,
    Task,
    TaskStatus,
    TaskTimedOut,
    shell,
)
from bgworker.history import requests

START = ["TaskCreated", "TaskScheduled", "TaskStarted"]


def is_elsewhere(engine: Engine) -> bool:
    return engine.name in ELSEWHERE


def ended(task: Task[Any]) -> Task[Any]:
    assert task.wait(SOON), f"{task} does not end"
    return task


def played(pool: Scheduler, function: Any, *args: Any, **options: Any) -> Task[Any]:
    """Run something to its end, and have all of its events delivered."""
    task = ended(pool.options(**options).submit(function, *args))
    assert pool.flush(SOON)
    return task


def running(task: Task[Any]) -> Task[Any]:
    until(lambda: task.status is TaskStatus.RUNNING)
    return task


def occupied(pool: Scheduler, holds: Holds) -> list[tuple[Task[Any], Hold]]:
    """Give every worker a task that is held."""
    places = [holds() for _ in range(WORKERS)]
    tasks = [pool.options(name="occupier").submit(functions.hold, each.path) for each in places]
    for task, each in zip(tasks, places):
        each.wait()
        running(task)
    return list(zip(tasks, places))


# -- results --


def test_every_argument_reaches_the_function_whatever_its_name(pool: Scheduler) -> None:
    names = ("name", "timeout", "metadata", "fn", "self", "function", "args", "kwargs", "key",
             "pure", "workers", "resources", "retries", "priority", "allow_other_workers", "actor",
             "order", "task", "executor", "callback")
    kwargs: dict[str, Any] = {name: number for number, name in enumerate(names)}
    assert pool.submit(functions.echo, 1, None, **kwargs).result(SOON) == ((1, None), kwargs)
    task = pool.options(name="given").submit(functions.echo, [], **kwargs)
    assert task.result(SOON) == (([],), kwargs) and task.name == "given"


def test_functions_run_where_the_executor_runs_them(engine: Engine, pool: Scheduler) -> None:
    places = {pool.submit(functions.place).result(SOON)[0] for _ in range(8)}
    if engine.name in PROCESSES:
        assert os.getpid() not in places and places <= set(engine.pids())
    else:
        assert places == {os.getpid()}
    assert (pool.submit(functions.interpreter).result(SOON) != 0) == (engine.name == INTERPRETERS)


@pytest.mark.filterwarnings("ignore:Sending large graph")
def test_large_arguments_and_results_arrive_whole(pool: Scheduler) -> None:
    assert pool.submit(functions.make, "large").result(SOON) == bytes(50_000_000)
    assert pool.submit(functions.length, bytes(50_000_000)).result(SOON) == 50_000_000


def test_a_body_knows_its_task(pool: Scheduler) -> None:
    metadata = {"a": [1, {"b": None}], "snow": "\u2603"}
    task = pool.options(name="known", metadata=metadata).submit(functions.who)
    assert task.result(SOON) == {
        "id": task.id, "name": "known", "metadata": metadata, "cancel_requested": False,
        "cancel_reason": None, "time_remaining": None}
    assert pool.submit(functions.who).result(SOON)["name"] == "who"


def test_a_coroutine_runs_to_its_end(pool: Scheduler, recorder: RecordingSink) -> None:
    task = played(pool, functions.chat, 21)
    assert task.result(0) == 42
    assert recorder.said(task) == [("output", "before 21"), ("output", "after 21")]


def test_a_command_runs_as_a_body(pool: Scheduler, recorder: RecordingSink) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    task = played(pool, shell([sys.executable, "-c", code]))
    assert task.result(0) == 0
    assert sorted(recorder.said(task)) == [("error", "err"), ("output", "out")]
    failed = played(pool, shell([sys.executable, "-c", "raise SystemExit(3)"]))
    error = failed.exception(0)
    assert isinstance(error, subprocess.CalledProcessError) and error.returncode == 3


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_commands_processes_are_killed_at_its_deadline(pool: Scheduler, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    task = ended(pool.options(timeout=0.5).submit(shell(f"echo $$ >{file}; sleep 60")))
    assert isinstance(task.exception(0), TaskTimedOut)
    until(lambda: not Path(f"/proc/{file.read_text().strip()}").exists())


# -- errors --


def test_what_a_function_raises_is_raised_here_with_its_arguments(engine: Engine,
                                                                  pool: Scheduler) -> None:
    error = ended(pool.submit(functions.boom)).exception(0)
    assert type(error) is ValueError and error.args == ("boom", 5)
    if is_elsewhere(engine):
        assert "in boom" in str(error.__cause__) and "ValueError" in str(error.__cause__)
    stateful = ended(pool.submit(functions.boom, "Stateful")).exception(0)
    assert type(stateful) is functions.Stateful
    assert (stateful.args, stateful.where) == ((7,), "there")


def test_a_failed_tasks_record_tells_what_it_raised_and_where(pool: Scheduler,
                                                              recorder: RecordingSink) -> None:
    task = played(pool, functions.boom, "cause")
    assert recorder.types(task) == [*START, "TaskOutput", "TaskFailed"]
    end = recorder.of(task)[-1].task
    assert (end.status, end.failure_type, end.failure_message) == (
        TaskStatus.FAILED, "ValueError", "second")
    info = end.invocation_info
    assert info.startswith("Traceback (most recent call last):")
    assert "KeyError: 'first'" in info and "direct cause" in info
    assert info.rstrip().endswith("ValueError: second")
    ours = [line for line in info.splitlines() if re.search(r"bgworker[/\\]", line)]
    assert ours == [], "it begins with the function"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_the_notes_of_an_exception_come_along(pool: Scheduler, recorder: RecordingSink) -> None:
    task = played(pool, functions.boom, "notes")
    assert task.exception(0).__notes__ == ["a note of there"]  # type: ignore[union-attr]
    assert "a note of there" in recorder.of(task)[-1].task.invocation_info


@pytest.mark.parametrize("kind", ["Unloadable", "Unpicklable"])
def test_an_exception_that_cannot_come_here_is_told_and_its_text_kept(
        engine: Engine, pool: Scheduler, recorder: RecordingSink, kind: str) -> None:
    task = played(pool, functions.boom, kind)
    end = recorder.of(task)[-1].task
    assert end.failure_type == f"tests.remote.functions.{kind}"
    assert "cannot be" in end.failure_message
    assert "in boom" in end.invocation_info
    error = task.exception(0)
    if is_elsewhere(engine):
        assert type(error).__name__ == "RemoteError"
        assert isinstance(error, (BgworkerError, RuntimeError))
        assert kind in str(error) and "pickle" in str(error)
        assert "in boom" in str(error.__cause__)
    else:
        assert type(error).__name__ == kind
    assert pool.submit(functions.double, 2).result(SOON) == 4, "the others go on"


@pytest.mark.parametrize("what", ["lock", "generator", "nested"])
def test_a_result_that_cannot_be_pickled_fails_its_task_and_no_other(
        engine: Engine, pool: Scheduler, recorder: RecordingSink, what: str) -> None:
    task = played(pool, functions.make, what)
    if is_elsewhere(engine):
        assert task.status is TaskStatus.FAILED and recorder.types(task)[-1] == "TaskFailed"
        error = task.exception(0)
        assert type(error).__name__ == "RemoteError" and "result" in str(error)
        end = recorder.of(task)[-1].task
        assert end.failure_type == "RemoteError" and end.failure_message
    else:
        assert task.exception(0) is None
    assert pool.submit(functions.double, 2).result(SOON) == 4


def test_a_result_that_cannot_be_loaded_here_fails_its_task_and_no_other(
        engine: Engine, pool: Scheduler) -> None:
    task = ended(pool.submit(functions.make, "loads badly"))
    if is_elsewhere(engine):
        error = task.exception(0)
        assert type(error).__name__ == "RemoteError" and "ZeroDivisionError" in str(error)
        assert task.status is TaskStatus.FAILED
    else:
        assert task.exception(0) is None
    assert pool.submit(functions.double, 2).result(SOON) == 4


def test_arguments_that_nothing_can_pickle_fail_their_task_and_no_other(
        engine: Engine, pool: Scheduler, recorder: RecordingSink) -> None:
    task = played(pool, functions.echo, threading.Lock())
    if can(engine.name, "objects"):
        assert task.exception(0) is None
    else:
        assert isinstance(task.exception(0), TypeError) and "lock" in str(task.exception(0))
        assert recorder.types(task) == ["TaskCreated", "TaskScheduled", "TaskFailed"]
    assert pool.submit(functions.double, 2).result(SOON) == 4


def test_a_lambda_runs_where_it_can_be_pickled(engine: Engine, pool: Scheduler,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    if not can(engine.name, "lambdas"):
        monkeypatch.delitem(sys.modules, "cloudpickle", raising=False)
        error = ended(pool.submit(lambda: 6 * 7)).exception(0)
        assert isinstance(error, (pickle.PicklingError, AttributeError)) and "lambda" in str(error)
    else:
        seven = 7
        assert pool.submit(lambda: 6 * seven).result(SOON) == 42


class Gone:
    """A callable of a module that the workers cannot import."""

    def __call__(self) -> None:
        raise AssertionError("it cannot be loaded")


def test_a_function_that_a_worker_cannot_import_fails_its_task_and_no_other(
        engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_elsewhere(engine):
        pytest.skip("threads import nothing")
    # named as what a child cannot have, whether it was forked before or is a new one
    module = type(sys)("only_in_the_parent")
    module.Gone = Gone  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "only_in_the_parent", module)
    monkeypatch.setattr(Gone, "__module__", "only_in_the_parent")
    with engine.scheduler() as pool:
        error = ended(pool.submit(Gone())).exception(0)
        assert "only_in_the_parent" in str(error)
        assert pool.submit(functions.double, 2).result(SOON) == 4


@pytest.mark.parametrize("kind", ["Abort", "SystemExit", "KeyboardInterrupt", "TimeoutError"])
def test_an_exception_of_any_kind_fails_its_task_and_ends_no_worker(
        engine: Engine, pool: Scheduler, recorder: RecordingSink, kind: str) -> None:
    task = played(pool, functions.boom, kind)
    error = task.exception(0)
    assert type(error).__name__ == kind
    assert recorder.types(task)[-1] == "TaskFailed"
    assert recorder.of(task)[-1].task.failure_type.rpartition(".")[2] == kind
    assert [pool.submit(functions.double, 2).result(SOON) for _ in range(2 * WORKERS)] == [4] * 4


def test_a_body_that_cancels_itself_is_cancelled(pool: Scheduler, recorder: RecordingSink) -> None:
    task = played(pool, functions.boom, "TaskCancelled")
    assert task.cancelled() and recorder.types(task)[-1] == "TaskCancelled"
    end = recorder.of(task)[-1].task
    assert end.duration is not None and (end.failure_type, end.failure_message) == (
        None, "of its own")
    with pytest.raises(CancelledError):
        task.result(0)


def test_an_exception_whose_class_refuses_attributes_comes_here_too(pool: Scheduler) -> None:
    error = ended(pool.submit(functions.boom, "Closed")).exception(0)
    assert type(error) is functions.Closed and error.args == ("closed",)
    assert pool.submit(functions.double, 2).result(SOON) == 4


def test_endless_recursion_fails_its_task_and_ends_no_worker(pool: Scheduler) -> None:
    assert isinstance(ended(pool.submit(functions.boom, "recursion")).exception(0), RecursionError)
    assert pool.submit(functions.double, 2).result(SOON) == 4


# -- the record --


def test_a_completed_tasks_events_are_exactly_these(pool: Scheduler,
                                                    recorder: RecordingSink) -> None:
    task = played(pool, functions.speak, ("output", "a"), ("progress", 50), ("error", "b"))
    assert recorder.types(task) == [
        *START, "TaskOutput", "TaskProgress", "TaskError", "TaskCompleted"]
    assert [each.seq for each in recorder.of(task)] == list(range(1, 8))
    assert len(recorder.events) == 7


def test_a_snapshot_knows_nothing_that_happened_later(pool: Scheduler,
                                                      recorder: RecordingSink) -> None:
    task = played(pool, functions.count_up, 4, timeout=60.0, metadata={"a": [1]})
    created, scheduled, begun, end = (
        each.task for each in recorder.of(task) if isinstance(each, LifecycleEvent))
    assert [each.status for each in (created, scheduled, begun, end)] == [
        "created", "scheduled", "running", "completed"]
    assert [each.last_seq for each in (created, scheduled, begun)] == [1, 2, 3]
    assert [each.started_utc is None for each in (created, scheduled, begun, end)] == [
        True, True, False, False]
    for early in (created, scheduled, begun):
        assert (early.completed_utc, early.duration, early.last_progress_percent,
                early.failure_type) == (None,) * 4
    assert (end.last_progress_percent, end.last_progress_message) == (100, "4 of 4")
    for each in (created, scheduled, begun, end):
        assert (each.timeout, each.metadata, each.task_id, each.name, each.run_id) == (
            60.0, {"a": [1]}, task.id, "count_up", pool.run_id)
    assert end == task.snapshot() == pool.get(task.id)


def test_times_are_aware_ascend_and_tell_how_long_the_body_ran(pool: Scheduler,
                                                               recorder: RecordingSink) -> None:
    task = played(pool, time.sleep, 0.05)
    end = recorder.of(task)[-1].task
    assert (end.created_utc <= end.started_utc <= end.completed_utc
            and end.started_utc.utcoffset() == timedelta(0))
    assert recorder.of(task)[2].created_utc == end.started_utc
    assert end.duration >= 0.045
    assert (end.completed_utc - end.started_utc).total_seconds() >= 0.045


KINDS = ["output", "error", "warning", "verbose"]
VALUES: list[object] = [
    "short", "", "two\nlines", "\u2603 snow", "nul \0 and \ud800", "x" * 60, "y" * 2_000,
    "z" * 5_000, "\u2603" * 20_000, "w" * 60_000, 5, 2.5, None, True, [1, [2]],
    {"a": {"b": [1, None]}}, ["v" * 40_000], {3}, b"bytes"]


def test_what_a_body_says_arrives_in_order_whatever_its_kind_and_size(
        pool: Scheduler, recorder: RecordingSink) -> None:
    words = [(stream, value) for value in VALUES for stream in KINDS]
    task = played(pool, functions.speak, *words)
    with Scheduler(1, sinks=[twin := RecordingSink()]) as threads:
        same = played(threads, functions.speak, *words)
    assert task.result(0) == len(words)

    def told(sink: RecordingSink, of: Task[Any]) -> list[tuple[object, ...]]:
        return [(each.seq, each.stream_type, each.payload, each.format, each.truncated,
                 each.original_bytes) for each in sink.of(of) if isinstance(each, StreamEvent)]

    assert told(recorder, task) == told(twin, same)
    assert len(told(recorder, task)) == len(words)


@pytest.mark.parametrize("oversize", ["truncate", "reject"])
def test_what_is_too_large_is_cut_or_counted_as_the_scheduler_was_told(
        engine: Engine, recorder: RecordingSink, oversize: Any) -> None:
    with engine.scheduler(sinks=[recorder], max_payload=100, oversize=oversize) as pool:
        task = ended(pool.submit(functions.speak, ("output", "x" * 101), ("error", ["y" * 200]),
                                 ("output", "z" * 100)))
        pool.flush(SOON)
    health = pool.sinks["recording"]
    assert balanced(health)
    said = [(each.stream_type, each.payload, each.truncated, each.original_bytes)
            for each in recorder.of(task) if isinstance(each, StreamEvent)]
    if oversize == "reject":
        assert said == [("output", "z" * 100, False, 0)]
        assert dict(health.dropped_by_reason) == {"oversize": 2}
    else:
        assert said[0] == ("output", "x" * 100, True, 101)
        assert said[1][2:] == (True, 204) and json.loads(said[1][1])["truncated"] == 204
        assert said[2] == ("output", "z" * 100, False, 0) and health.dropped == 0


def test_progress_is_thinned_out_where_it_is_told_and_its_last_word_always_comes(
        engine: Engine, recorder: RecordingSink) -> None:
    with engine.scheduler(sinks=[recorder], progress_interval=60.0, progress_step=25.0) as pool:
        task = played(pool, functions.count_up, 203)
    told = [each for each in recorder.of(task) if isinstance(each, StreamEvent)]
    assert 4 <= len(told) <= 8, "the first, every 25 percent, and the last"
    assert (told[0].message, told[-1].message) == ("1 of 203", "203 of 203")
    assert told[-1].percent == 100
    assert [each.percent for each in told] == sorted(each.percent for each in told)


def test_a_task_tells_its_progress_while_it_runs(engine: Engine, pool: Scheduler,
                                                 hold: Hold) -> None:
    task = pool.submit(functions.speak_then, "nothing", hold.path)
    until(lambda: task.snapshot().last_progress_percent == 50)
    assert not task.done()
    assert [each.payload for each in task.streams(types=["output"])] == ["before the end"]
    assert task.streams(since=4, types=["output"]) == []
    hold.open()
    assert task.result(SOON) is None


def test_an_event_reaches_a_subscriber_while_the_body_runs(pool: Scheduler, hold: Hold) -> None:
    with pool.subscribe() as events:
        task = pool.submit(functions.talk_and_hold, hold.path, "hello", {"a": 1})
        found = list(itertools.islice(events, 5))
        assert not task.done() and not Path(f"{hold.path}.open").exists()
        assert [each.type.value for each in found] == [*START, "TaskOutput", "TaskOutput"]
        assert [each.payload for each in found[3:]] == ["hello", '{"a":1}']
        hold.open()
        assert next(iter(events)).type.value == "TaskCompleted"


def test_a_subscription_to_a_task_ends_with_it(pool: Scheduler) -> None:
    task = pool.submit(functions.recite, 5)
    with pool.subscribe(task=task) as events:
        types = [each.type.value for each in events]
    assert types[-6:] == ["TaskOutput"] * 5 + ["TaskCompleted"]


def test_what_is_printed_logged_and_warned_goes_to_the_streams(pool: Scheduler,
                                                               recorder: RecordingSink) -> None:
    with warnings.catch_warnings(record=True):  # it is told to the terminal, too
        task = played(pool, functions.print_and_log, capture_output=True)
    said = recorder.said(task)
    assert ("output", "printed") in said and ("output", "no newline") in said
    assert ("error", "to stderr") in said
    assert any(stream == "warning" and "logged 5" in text for stream, text in said)
    assert any(stream == "warning" and "warned" in text for stream, text in said)
    with warnings.catch_warnings(record=True):
        silent = played(pool, functions.print_and_log)
    assert recorder.said(silent) == []


def test_arguments_results_and_sources_are_recorded_as_with_threads(
        pool: Scheduler, recorder: RecordingSink) -> None:
    on = played(pool, functions.echo, 1, {"a": (2,)}, record_arguments=True, record_result=True,
                record_source=True)
    end = recorder.of(on)[-1].task
    assert json.loads(end.arguments) == {"args": [1, {"a": [2]}], "kwargs": {}}
    assert json.loads(end.result) == [[1, {"a": [2]}], {}]
    assert end.script_text.startswith("def echo(")
    assert end.script_id == "tests.remote.functions:echo"
    off = played(pool, functions.echo, 1)
    end = recorder.of(off)[-1].task
    assert (end.arguments, end.result, end.script_text) == (None, None, None)
    assert end.script_hash == recorder.of(on)[0].task.script_hash
    large = played(pool, functions.make, "text", record_result=True)
    text = recorder.of(large)[-1].task.result
    assert len(text) <= 65536 and json.loads(text)["truncated"] == 100_002


def test_jsonl_and_sqlite_have_all_and_their_accounts_are_exact(engine: Engine,
                                                                tmp_path: Path) -> None:
    lines, history = tmp_path / "debug.jsonl", tmp_path / "history.db"
    with engine.scheduler(sinks=[f"jsonl:{lines}", f"sqlite:{history}"]) as pool:
        tasks = [pool.submit(functions.recite, 50, n) for n in range(12)]
        tasks.append(pool.submit(functions.boom))
        concurrent.futures.wait(tasks, SOON)
        assert pool.flush(SOON)
    for health in pool.sinks.values():
        assert balanced(health) and (health.delivered, health.dropped) == (12 * 54 + 5, 0)
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    with closing(sqlite3.connect(history)) as connection:
        for number, task in enumerate(tasks[:-1]):
            said = [f"{line} {'x' * number}" for line in range(50)]
            mine = [line for line in found if line["task_id"] == task.id]
            assert [line["payload"] for line in mine if "payload" in line] == said
            assert [line["seq"] for line in mine] == list(range(1, 55))
            rows = connection.execute(
                "SELECT payload FROM task_streams WHERE task_id = ? ORDER BY seq", (task.id,))
            assert [payload for payload, in rows] == said
        statuses = dict(connection.execute(
            "SELECT status, count(*) FROM tasks GROUP BY status").fetchall())
    assert statuses == {"completed": 12, "failed": 1}


def test_every_sink_sees_the_same_events_in_the_same_order(engine: Engine) -> None:
    recorders = [RecordingSink() for _ in range(3)]
    with engine.scheduler(sinks=recorders) as pool:
        tasks = [pool.submit(functions.recite, 20) for _ in range(10)]
        concurrent.futures.wait(tasks, SOON)
    keys = [[(each.task_id, each.seq) for each in recorder.events] for recorder in recorders]
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) == 10 * 24


def test_a_chatty_body_loses_nothing_that_is_not_counted(engine: Engine,
                                                         recorder: RecordingSink) -> None:
    with engine.scheduler(sinks=[recorder]) as pool:
        task = ended(pool.submit(functions.recite, 15_000))
        pool.flush(SOON)
    health = pool.sinks["recording"]
    assert balanced(health) and health.emitted == 15_004
    numbers = [int(payload.split()[0]) for _, payload in recorder.said(task)]
    assert numbers == sorted(set(numbers)) and len(numbers) + health.dropped == 15_000
    assert recorder.types(task)[-1] == "TaskCompleted"


# -- deadlines --


def test_a_deadline_ends_the_task_though_its_body_goes_on(
        engine: Engine, pool: Scheduler, recorder: RecordingSink, hold: Hold) -> None:
    task = pool.options(timeout=0.3).submit(functions.hold_and_talk, hold.path)
    error = ended(task).exception(0)
    assert isinstance(error, TaskTimedOut) and not isinstance(error, TimeoutError)
    assert "0.3 s" in str(error) and task.cancel_reason == "timeout"
    pid = hold.wait()
    if is_elsewhere(engine):
        abandoned, = pool.health().abandoned
        assert (abandoned.task_id, abandoned.task_name) == (task.id, "hold_and_talk")
        assert str(pid) in abandoned.where
    hold.open()
    until(lambda: pool.health().abandoned == () and pool.health().stuck == ())
    until(lambda: pool.health().late_events == 2)
    assert pool.flush(SOON)
    assert recorder.types(task) == [*START, "TaskOutput", "TaskTimedOut"]
    end = recorder.of(task)[-1].task
    assert (end.status, end.duration, end.timeout, end.failure_type) == (
        TaskStatus.TIMED_OUT, 0.3, 0.3, "TaskTimedOut")
    assert "in hold" in end.invocation_info, "the stack of there at the deadline"
    if is_elsewhere(engine):
        assert "may still run" in end.invocation_info and str(pid) in end.invocation_info
    assert task.status is TaskStatus.TIMED_OUT and isinstance(task.exception(0), TaskTimedOut)


def test_a_body_that_sleeps_is_stopped_at_its_deadline(pool: Scheduler, hold: Hold) -> None:
    task = ended(pool.options(timeout=0.2).submit(functions.sleep, hold.path))
    assert isinstance(task.exception(0), TaskTimedOut)
    until(lambda: pool.health().abandoned == ())  # long before its sleep would have ended


def test_a_body_knows_how_much_time_is_left(pool: Scheduler, hold: Hold) -> None:
    before, after = pool.options(timeout=20.0).submit(functions.time_left, hold.path).result(SOON)
    assert 15 < after < before <= 20 and before - after >= 0.04


def test_a_deadline_counts_from_the_start_of_the_body(pool: Scheduler, holds: Holds) -> None:
    places = occupied(pool, holds)
    task = pool.options(timeout=0.25).submit(functions.double, 4)
    assert not task.wait(0.3)
    for _, hold in places:
        hold.open()
    assert task.result(SOON) == 8


def test_the_end_and_the_deadline_race_and_exactly_one_of_them_counts(
        engine: Engine, recorder: RecordingSink) -> None:
    with engine.scheduler(sinks=[recorder]) as pool:
        tasks = [pool.options(timeout=0.02).submit(time.sleep, 0.013 + n % 10 / 1000)
                 for n in range(40)]
        concurrent.futures.wait(tasks, SOON)
        assert pool.flush(SOON)
    for task in tasks:
        late = isinstance(task.exception(0), TaskTimedOut)
        assert recorder.types(task) == [*START, "TaskTimedOut" if late else "TaskCompleted"]
        assert task.status == ("timed_out" if late else "completed")


# -- cancel --


def test_a_task_that_waits_is_cancelled_at_once_and_never_runs(
        engine: Engine, pool: Scheduler, recorder: RecordingSink, holds: Holds) -> None:
    places = occupied(pool, holds)
    never = holds()
    waiting = [pool.submit(functions.hold, never.path, None, True) for _ in range(8)]
    last = waiting[-1]
    assert last.cancel("changed my mind") and last.cancelled() and last.done()
    with pytest.raises(CancelledError):
        last.result(0)
    for task in waiting[:-1]:
        task.cancel("all of them")
    for _, hold in places:
        hold.open()
    for task in waiting:
        assert ended(task).cancelled()
    assert pool.flush(SOON)
    begun = [task for task in waiting if "TaskStarted" in recorder.types(task)]
    # one that a worker had already may begin before it is told, and stops where it looks
    assert len(begun) <= (0 if can(engine.name, "cancels_prefetched") else WORKERS + 1)
    assert last not in begun and len(never.begun()) <= len(begun)
    for task in waiting:
        if task not in begun:
            assert recorder.types(task) == ["TaskCreated", "TaskScheduled", "TaskCancelled"]
            end = recorder.of(task)[-1].task
            assert (end.started_utc, end.failure_type) == (None, None)
    assert last.snapshot().failure_message == "changed my mind" == last.cancel_reason
    assert waiting[0].snapshot().failure_message == "all of them"


@pytest.mark.parametrize("how", ["sleep", "checkpoint", "coroutine"])
def test_a_running_task_stops_where_it_looks(pool: Scheduler, recorder: RecordingSink, hold: Hold,
                                             how: str) -> None:
    if how == "sleep":
        task = pool.submit(functions.sleep, hold.path)
    elif how == "checkpoint":
        task = pool.submit(functions.hold, hold.path, None, True)
    else:
        task = pool.submit(functions.doze, hold.path)
    hold.wait()
    running(task)
    assert task.cancel("enough") is False and task.cancel_requested
    assert ended(task).cancelled() and task.cancel_reason == "enough"
    with pytest.raises(CancelledError):
        task.result(0)
    assert pool.flush(SOON)
    assert recorder.types(task) == [*START, "TaskCancelled"]
    end = recorder.of(task)[-1].task
    assert end.duration is not None and (end.failure_type, end.failure_message) == (None, "enough")


def test_a_task_that_has_just_begun_somewhere_stops_too(pool: Scheduler, holds: Holds) -> None:
    for _ in range(5):
        hold = holds()
        task = pool.submit(functions.sleep, hold.path)
        hold.wait()
        task.cancel()
        assert ended(task).cancelled()
    # all workers are free again, long before those sleeps would have ended
    assert pool.submit(functions.double, 4).result(SOON) == 8


def test_a_body_that_never_looks_completes_in_spite_of_a_cancel(pool: Scheduler,
                                                                hold: Hold) -> None:
    task = pool.submit(functions.hold, hold.path, "done all the same")
    hold.wait()
    running(task)
    assert task.cancel() is False and not task.wait(0.1)
    hold.open()
    assert task.result(SOON) == "done all the same" and task.status is TaskStatus.COMPLETED
    assert task.cancel_requested and not task.cancelled()


def test_a_body_knows_why_it_is_to_stop_and_may_go_on(pool: Scheduler, recorder: RecordingSink,
                                                      hold: Hold) -> None:
    task = pool.submit(functions.say_why, hold.path)
    hold.wait()
    running(task)
    task.cancel("lunch \u2603")
    task.cancel("the first reason stays")
    assert task.result(SOON) == "went on"
    assert pool.flush(SOON)
    assert json.loads(recorder.said(task)[0][1]) == ["lunch \u2603", "lunch \u2603", True]
    assert task.cancel() is False and task.cancel_reason == "lunch \u2603"


def test_another_process_cancels_through_the_history(engine: Engine, tmp_path: Path,
                                                     holds: Holds) -> None:
    history = tmp_path / "history.db"
    with engine.scheduler(sinks=[f"sqlite:{history}"]) as pool:
        pool.listen(history)
        hold = holds()
        task = pool.submit(functions.hold, hold.path, None, True)
        hold.wait()
        running(task)
        assert pool.flush(SOON)
        requests.ask(str(history), [task.id], "from outside")
        assert ended(task).cancelled() and task.cancel_reason == "from outside"


# -- what the standard library does with futures --


def test_map_keeps_the_order_and_names_its_tasks(pool: Scheduler) -> None:
    assert list(pool.map(pow, range(5), [2] * 5)) == [0, 1, 4, 9, 16]
    assert list(pool.options(name="squares", timeout=SOON).map(
        pow, range(5), [2] * 5, timeout=SOON, chunksize=2)) == [0, 1, 4, 9, 16]
    assert [each.name for each in pool.tasks()].count("squares") >= 3
    with pytest.raises(ValueError, match="boom"):
        list(pool.map(functions.boom, ["ValueError", "Stateful"]))


def test_map_cancels_the_rest_when_its_time_runs_out(pool: Scheduler, holds: Holds) -> None:
    places = [holds() for _ in range(12)]
    results = pool.map(functions.hold, [each.path for each in places], timeout=0.3)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    holds.open()
    pool.shutdown()
    cancelled = pool.tasks(status="cancelled")
    assert cancelled and {each.failure_message for each in cancelled} <= {"user", "map"}
    assert len([each for each in places if each.begun()]) + len(cancelled) >= 12


def test_map_takes_no_more_from_its_input_than_buffersize_allows(pool: Scheduler) -> None:
    taken: list[int] = []

    def numbers() -> Any:
        for number in range(20):
            taken.append(number)
            yield number

    results = pool.map(functions.double, numbers(), buffersize=3)
    assert len(taken) == 3
    assert next(results) == 0 and len(taken) == 4
    assert list(results) == [2 * n for n in range(1, 20)]


def test_futures_are_waited_for_and_called_back(pool: Scheduler) -> None:
    told: list[tuple[Any, str]] = []
    tasks = [pool.submit(functions.double, n) for n in range(6)]
    for task in tasks:
        task.add_done_callback(
            lambda each: told.append((each.result(0), threading.current_thread().name)))
    assert {each.result(0) for each in concurrent.futures.as_completed(tasks, SOON)} == {
        0, 2, 4, 6, 8, 10}
    done, left = concurrent.futures.wait(tasks, SOON)
    assert len(done) == 6 and not left
    until(lambda: sorted(result for result, _ in told) == [0, 2, 4, 6, 8, 10])
    here: list[str] = []
    tasks[0].add_done_callback(lambda each: here.append(threading.current_thread().name))
    assert here == [threading.current_thread().name], "at once if it has ended"


def test_a_callback_that_raises_or_takes_long_hurts_no_other_task(
        pool: Scheduler, hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
    let_go = threading.Event()
    first, second = (pool.submit(functions.hold, hold.path, n) for n in range(2))
    first.add_done_callback(lambda each: functions.refuse_to_load("of a callback"))
    second.add_done_callback(lambda each: let_go.wait(SOON))
    hold.open()
    assert (first.result(SOON), second.result(SOON)) == (0, 1)
    assert [pool.submit(functions.double, n).result(SOON) for n in range(4)] == [0, 2, 4, 6]
    let_go.set()
    until(lambda: "of a callback" in caplog.text)


def test_a_waiter_is_woken_by_its_timeout_alone(pool: Scheduler, hold: Hold) -> None:
    task = pool.submit(functions.hold, hold.path, 5)
    with pytest.raises(concurrent.futures.TimeoutError) as caught:
        task.result(0.05)
    assert not isinstance(caught.value, TaskTimedOut) and not task.wait(0)
    hold.open()
    assert task.result(SOON) == 5


def test_asyncio_awaits_tasks_and_cancels_them(pool: Scheduler, hold: Hold) -> None:
    async def main() -> list[int]:
        doubles = [asyncio.wrap_future(pool.submit(functions.double, n)) for n in range(4)]
        task = pool.submit(functions.sleep, hold.path)
        while task.status is not TaskStatus.RUNNING:
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(task), 0.05)
        assert await asyncio.get_running_loop().run_in_executor(None, task.wait, SOON)
        assert task.cancelled()
        return await asyncio.gather(*doubles)

    assert asyncio.run(main()) == [0, 2, 4, 6]


# -- what a scheduler knows and allows --


def test_tasks_are_found_by_id_and_by_status(pool: Scheduler, holds: Holds) -> None:
    done = ended(pool.submit(functions.double, 1))
    failed = ended(pool.submit(functions.boom))
    (held, hold), *_ = occupied(pool, holds)
    waiting = pool.submit(functions.nothing)
    assert [each.task_id for each in pool.tasks(status="completed")] == [done.id]
    assert [each.task_id for each in pool.tasks(status="failed")] == [failed.id]
    assert held.id in [each.task_id for each in pool.tasks(status="running")]
    assert [each.task_id for each in pool.tasks(status="scheduled")] == [waiting.id]
    assert pool.task(held.id) is held and pool.get(waiting.id).status == "scheduled"
    health = pool.health()
    assert (health.running, health.pending) == (WORKERS, 1)
    with pytest.raises(KeyError):
        pool.get("0" * 32)


@pytest.mark.parametrize(("keep", "left"), [(None, 9), (0, 0), (4, 4)])
def test_the_newest_finished_tasks_are_kept(engine: Engine, keep: int | None, left: int) -> None:
    with engine.scheduler(keep_finished=keep, keep_seconds=None) as pool:
        tasks = [ended(pool.submit(functions.double, n)) for n in range(9)]
        assert [each.task_id for each in pool.tasks()] == [each.id for each in tasks[9 - left:]]
        assert tasks[0].snapshot().status == "completed"


def test_a_finished_tasks_result_is_its_holders_alone(pool: Scheduler) -> None:
    error = ended(pool.submit(functions.boom, "Stateful")).exception(0)
    followed = weakref.ref(error)
    del error

    def is_gone() -> bool:
        gc.collect()
        return followed() is None

    until(is_gone)


def test_whoever_keeps_a_failed_task_keeps_no_scheduler(engine: Engine, holds: Holds) -> None:
    gc.collect()
    gc.disable()
    try:
        pool = engine.scheduler(max_pending=1)
        tasks = [ended(pool.submit(functions.boom)),
                 ended(pool.submit(functions.echo, threading.Lock()))]
        occupied(pool, holds)
        tasks.append(pool.submit(functions.nothing))
        with pytest.raises(PendingFull):
            pool.submit(functions.echo, threading.Lock())
        followed = weakref.ref(pool)
        del pool
        until(lambda: followed() is None)
        holds.open()
        assert all(task.wait(SOON) for task in tasks)
    finally:
        gc.enable()


def test_submit_refuses_what_max_pending_has_no_room_for(engine: Engine, holds: Holds) -> None:
    with engine.scheduler(max_pending=3) as pool:
        occupied(pool, holds)
        waiting = [pool.submit(functions.double, n) for n in range(3)]
        with pytest.raises(PendingFull, match="max_pending: 3 tasks are waiting"):
            pool.submit(functions.nothing)
        assert len(pool.tasks()) == WORKERS + 3
        holds.open()
        assert [each.result(SOON) for each in waiting] == [0, 2, 4]
        assert pool.submit(functions.double, 7).result(SOON) == 14


@pytest.mark.parametrize("settings", [
    {"max_workers": 3}, {"initializer": functions.nothing}, {"initargs": (1,)}],
    ids=lambda settings: next(iter(settings)))
def test_what_belongs_to_the_executor_is_refused_by_name(settings: dict[str, Any]) -> None:
    (name, value), = settings.items()
    with idle_processes() as executor:
        with pytest.raises(ConfigurationError, match=f"^{name}: .*executor") as caught:
            Scheduler(executor=executor, **settings)
        assert getattr(value, "__name__", repr(value)) in str(caught.value)


def idle_processes() -> concurrent.futures.Executor:
    """Return an executor that gets no work."""
    return concurrent.futures.ProcessPoolExecutor(1)


def test_the_workers_are_the_executors(elsewhere: Engine, pool: Scheduler) -> None:
    with pytest.raises(ConfigurationError, match="max_workers: .*own workers.*got 3"):
        pool.resize(3)
    assert pool.submit(functions.double, 1).result(SOON) == 2
    assert pool.health().stuck == () and pool.health().replaced == 0


@pytest.mark.parametrize("wrong", [5, "fork", concurrent.futures.ProcessPoolExecutor, object()])
def test_an_executor_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="executor: expected an executor"):
        Scheduler(executor=wrong)


@pytest.mark.parametrize("channel", ["nonsense", "localhost", "localhost:port", 5,
                                     "127.0.0.1:99999", ":"])
def test_a_channel_that_is_none_is_refused(channel: Any) -> None:
    with idle_processes() as executor:
        with pytest.raises(ConfigurationError, match="channel.*'HOST:PORT'") as caught:
            Scheduler(executor=executor, channel=channel)
        assert repr(channel) in str(caught.value)


def test_a_channel_over_tcp_carries_the_same(elsewhere: Engine, recorder: RecordingSink,
                                             holds: Holds) -> None:
    hold = holds()
    with elsewhere.scheduler(sinks=[recorder], channel="127.0.0.1:0") as pool:
        task = pool.submit(functions.talk_and_hold, hold.path, "over TCP")
        until(lambda: recorder.said(task) == [("output", "over TCP")])
        assert not task.done()
        asleep = holds()
        other = pool.submit(functions.sleep, asleep.path)
        asleep.wait()
        running(other)
        other.cancel()
        assert ended(other).cancelled()
        hold.open()
        assert task.result(SOON) == "let go"


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")


def variable() -> str:
    return VARIABLE.get()


def test_context_variables_travel_where_they_can(engine: Engine, pool: Scheduler) -> None:
    token = VARIABLE.set("set here")
    try:
        travels = can(engine.name, "context_variables")
        assert pool.submit(variable).result(SOON) == ("set here" if travels else "default")
    finally:
        VARIABLE.reset(token)


def test_a_scheduler_and_its_tasks_are_not_sent_to_a_worker(engine: Engine,
                                                            pool: Scheduler) -> None:
    task = ended(pool.submit(functions.submit_to, pool))
    other = ended(pool.submit(functions.echo, task))
    if can(engine.name, "nested"):
        assert task.result(0).result(SOON) == 8 and other.result(0) == ((task,), {})
    else:
        for each, what in ((task, "a Scheduler"), (other, f"a {type(task).__name__}")):
            error = each.exception(0)
            assert isinstance(error, TypeError) and what in str(error)
            assert "belongs to its process" in str(error)


@needs_fork
def test_a_forked_child_is_told_that_the_executor_is_its_parents(elsewhere: Engine,
                                                                 pool: Scheduler) -> None:
    if not can(elsewhere.name, "forks"):
        pytest.skip(LIMITS["forks"][elsewhere.name])
    assert pool.submit(functions.double, 1).result(SOON) == 2
    answer = in_child(lambda: pool.submit(functions.double, 1))
    assert answer.startswith("ShutdownError: ") and "parent" in answer
    assert pool.submit(functions.double, 2).result(SOON) == 4


# -- the end --


def test_the_with_statement_waits_for_the_tasks_and_leaves_the_executor_alone(
        engine: Engine, recorder: RecordingSink) -> None:
    with engine.scheduler(sinks=[recorder]) as pool:
        tasks = [pool.submit(time.sleep, 0.01) for _ in range(6)]
    assert all(each.done() for each in tasks) and recorder.closed.is_set()
    assert pool.sinks["recording"].delivered == len(recorder.events) == 24
    with engine.scheduler() as following:
        assert following.submit(functions.double, 4).result(SOON) == 8
    with pytest.raises(ShutdownError, match="after shutdown"):
        pool.submit(functions.nothing)
    assert len(pool.tasks()) == 6


def test_shutdown_can_cancel_what_waits_and_lets_finish_what_runs(
        engine: Engine, recorder: RecordingSink, holds: Holds) -> None:
    pool = engine.scheduler(sinks=[recorder])
    places = occupied(pool, holds)
    never = holds()
    waiting = [pool.submit(functions.hold, never.path, None, True) for _ in range(8)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert waiting[-1].cancelled() and waiting[-1].cancel_reason == "shutdown"
    for _, hold in places:
        hold.open()
    pool.shutdown()
    assert all(each.cancelled() and each.cancel_reason == "shutdown" for each in waiting)
    assert [task.status for task, _ in places] == ["completed"] * WORKERS
    assert len(never.begun()) <= (0 if can(engine.name, "cancels_prefetched") else WORKERS + 1)
    assert recorder.closed.is_set()
    assert [recorder.types(each)[-1] for each in waiting] == ["TaskCancelled"] * 8


def test_shutdown_without_waiting_returns_while_the_tasks_run_on(
        engine: Engine, recorder: RecordingSink, holds: Holds) -> None:
    pool = engine.scheduler(sinks=[recorder])
    occupied(pool, holds)
    waiting = pool.submit(functions.double, 4)
    pool.shutdown(wait=False)
    assert not waiting.done() and not recorder.closed.is_set()
    holds.open()
    assert waiting.result(SOON) == 8 and recorder.closed.wait(SOON)
    assert recorder.types(waiting)[-1] == "TaskCompleted"
    pool.shutdown()


def test_shutdown_with_a_timeout_leaves_a_stuck_body_to_itself_and_still_delivers(
        engine: Engine, recorder: RecordingSink, holds: Holds) -> None:
    pool = engine.scheduler(sinks=[recorder])
    done = ended(pool.submit(functions.double, 4))
    hold = holds()
    stuck = running(pool.submit(functions.hold, hold.path, 5))
    asleep = running(pool.submit(functions.sleep, holds().path))
    pool.shutdown(timeout=1.0)
    assert recorder.closed.wait(SOON) and recorder.types(done)[-1] == "TaskCompleted"
    assert recorder.types(stuck) == START and not stuck.done()
    assert stuck.cancel_requested and stuck.cancel_reason == "shutdown"
    assert asleep.cancelled() and recorder.types(asleep)[-1] == "TaskCancelled"
    hold.open()
    assert stuck.result(SOON) == 5, "it is resolved even so, when it ends"


def test_a_forgotten_scheduler_runs_what_waits_and_closes_its_sinks(
        engine: Engine, recorder: RecordingSink, holds: Holds) -> None:
    pool = engine.scheduler(sinks=[recorder])
    occupied(pool, holds)
    waiting = [pool.submit(functions.double, n) for n in range(5)]
    followed = weakref.ref(pool)
    del pool
    gc.collect()
    until(lambda: followed() is None)
    assert not recorder.closed.is_set()
    holds.open()
    assert [each.result(SOON) for each in waiting] == [0, 2, 4, 6, 8]
    assert recorder.closed.wait(SOON)
    assert [recorder.types(each)[-1] for each in waiting] == ["TaskCompleted"] * 5


EXIT = """if True:
    import sys

    if __name__ == "__main__":
        from bgworker import Scheduler
        from tests.remote import functions
        from tests.remote.engines import executor

        name, path, cluster = sys.argv[1:]
        settings = {"executor": executor(name, cluster)} if name != "threads" else {}
        pool = Scheduler(sinks=[f"jsonl:{path}"], **settings)
        tasks = [pool.submit(functions.recite, 3, 5, 0.01) for _ in range(12)]
        print("end", flush=True)
"""


def test_the_exit_of_the_interpreter_waits_for_what_is_queued(engine: Engine,
                                                              tmp_path: Path) -> None:
    script, lines = tmp_path / "program.py", tmp_path / "debug.jsonl"
    script.write_text(EXIT)
    cluster = engine.cluster.file if engine.cluster is not None else ""
    done = subprocess.run([sys.executable, str(script), engine.name, str(lines), cluster],
                          env=environment(), timeout=SOON, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    types = [json.loads(line)["type"] for line in lines.read_text().splitlines()]
    assert types.count("TaskCompleted") == 12 and types.count("TaskOutput") == 36
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")
def test_a_thousand_tasks_in_flight_have_no_thread_each(engine: Engine, holds: Holds) -> None:
    number = 200 if engine.name == DASK else 1000  # a cluster takes 5 ms for each
    with engine.scheduler(keep_finished=None) as pool:
        ended(pool.submit(functions.nothing))
        before = threading.active_count()
        places = occupied(pool, holds)
        tasks = [pool.submit(functions.double, n) for n in range(number)]
        assert pool.health().pending == number
        assert threading.active_count() <= before + WORKERS
        for _, hold in places:
            hold.open()
        assert [each.result(SOON) for each in tasks] == [2 * n for n in range(number)]
        assert threading.active_count() <= before + WORKERS


def test_several_schedulers_share_an_executor(engine: Engine) -> None:
    sinks = [RecordingSink() for _ in range(3)]
    pools = [engine.scheduler(sinks=[sink]) for sink in sinks]
    tasks = [[pool.submit(functions.recite, 5, n) for n in range(6)] for pool in pools]
    threads = [started(pool.shutdown) for pool in pools]
    for thread in threads:
        thread.join(SOON)
    for sink, mine in zip(sinks, tasks):
        assert len(sink.events) == 6 * 9
        assert {each.task_id for each in sink.events} == {each.id for each in mine}
