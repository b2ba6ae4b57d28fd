"""A body in a worker process: it runs as on a thread, and its report tells how it ended, whatever
it does."""

from __future__ import annotations

import concurrent.futures
import gc
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tests.remote import bodies
from tests.remote.receiving import Receiver, hub, order, ordered
from tests.support import SOON, in_time, until

from bgworker import RemoteError, TaskTimedOut, current_task, shell
from bgworker.model.records import (
    CANCELLED,
    COMPLETED,
    ERROR,
    FAILED,
    OUTPUT,
    PROGRESS,
    STARTED,
    TIMED_OUT,
    WARNING,
)
from bgworker.remote import messages
from bgworker.remote.messages import Report, decode_report, encode_order, outcome_of
from bgworker.remote.worker import perform


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as made:
        made.submit(bodies.nothing).result(SOON)  # its threads run before any test
        yield made


def done(function: Any, *args: object, **settings: Any) -> Report:
    """Run a body in this process, and return its report."""
    return decode_report(perform(ordered(function, *args, **settings)))


def said(report: Report) -> list[tuple[int, Any]]:
    return [(kind, data) for kind, _, data in Receiver().whole(report)]


def test_a_result_comes_back_with_what_was_said(engine: ProcessPoolExecutor) -> None:
    before = time.time_ns()
    report = decode_report(engine.submit(perform, ordered(bodies.talk, 3)).result(SOON))
    assert outcome_of(report) == (3, None)
    assert (report.kind, report.failure, report.result_json) == (COMPLETED, None, None)
    assert said(report) == [(STARTED, None), (OUTPUT, "0"), (OUTPUT, "1"), (OUTPUT, "2")]
    assert report.first == 1 and report.losses == {} and report.attempt.startswith(report.worker)
    assert before < report.records[0][1] <= report.records[-1][1] < time.time_ns()
    assert 0 < report.duration < SOON


def tell_all() -> Any:
    task = current_task()
    left = task.time_remaining
    task.output({"left": left is not None and 0 < left <= 50})
    task.warning("careful")
    task.error("bad")
    return task.id, task.name, dict(task.metadata), task.cancel_requested


def test_the_context_is_that_of_a_task() -> None:
    report = done(tell_all, task_id="abc", name="named", metadata_json='{"a": [1]}', timeout=50.0)
    assert outcome_of(report) == (("abc", "named", {"a": [1]}, False), None)
    assert said(report)[1:] == [
        (OUTPUT, ('{"left":true}', "json", False, 0)), (WARNING, "careful"), (ERROR, "bad")]
    assert current_task().id == ""  # outside of it there is none


def test_what_is_printed_is_captured_where_that_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = done(bodies.forty_two_bytes_of_code, captures_output=True)
    assert said(report)[1:] == [(OUTPUT, "printed"), (ERROR, "told")]
    assert said(done(bodies.forty_two_bytes_of_code)) == [(STARTED, None)]
    assert capsys.readouterr().out == "printed\nprinted\n"  # and it is passed on


@pytest.mark.parametrize("captures", [False, True])
def test_a_coroutine_runs_to_its_end(captures: bool) -> None:
    report = done(bodies.count_slowly, 3, captures_output=captures)
    assert outcome_of(report) == (3, None)
    assert len(said(report)) == 4


def progress() -> None:
    for percent in range(101):
        current_task().progress(percent / 200, message=str(percent))


def test_the_latest_progress_is_said_before_the_end() -> None:
    messages = [data for kind, data in said(done(progress)) if kind == PROGRESS]
    assert messages[0] == (0.0, "0") and messages[-1] == (0.5, "100")
    assert len(messages) < 20  # the others are held back


def test_a_result_is_recorded_where_that_was_asked_for() -> None:
    assert done(bodies.give, "x", records_result=True).result_json == '"x"'
    assert done(bodies.give, "x").result_json is None


# -- what goes wrong --


def give_much() -> str:
    return "x" * 1001


def test_a_result_that_is_too_large_to_be_carried_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_PAYLOAD", 1000)
    _, error = outcome_of(done(give_much))
    assert type(error) is RemoteError and "1,000 bytes" in str(error) and "a file" in str(error)


def test_an_exception_comes_back_with_the_traceback_of_its_own_code_alone() -> None:
    report = done(bodies.give, "plain")
    _, error = outcome_of(report)
    assert type(error) is LookupError and error.args == ("no such thing",)
    assert report.kind == FAILED and report.failure is not None
    name, message, trace = report.failure
    assert (name, message) == ("LookupError", "no such thing") and trace is not None
    assert "bodies.py" in trace and "worker.py" not in trace
    assert trace in str(error.__cause__)


@pytest.mark.parametrize("what, kind, names", [
    ("lock", FAILED, ["result", "lock", "pickle"]),
    ("lambda", FAILED, ["result", "function"]),
    ("deep", FAILED, ["result", "RecursionError"]),
    ("unpicklable", FAILED, ["CannotBePickled", "held by a lock"]),
    ("unloadable", FAILED, ["1 and 2"]),
])
def test_what_cannot_be_carried_is_the_failure_of_one_task(
    engine: ProcessPoolExecutor, what: str, kind: int, names: list[str]
) -> None:
    report = decode_report(engine.submit(perform, ordered(bodies.give, what)).result(SOON))
    result, error = outcome_of(report)
    assert report.kind == kind and result is None and type(error) is RemoteError
    assert all(name in str(error) for name in names), str(error)
    assert engine.submit(bodies.give, "still here").result(SOON) == "still here"


def test_the_texts_of_a_failure_are_those_of_the_exception_that_cannot_be_carried() -> None:
    failure = done(bodies.give, "unpicklable").failure
    assert failure is not None and failure[2] is not None
    assert failure[:2] == ("tests.remote.bodies.CannotBePickled", "held by a lock")
    assert "bodies.py" in failure[2]


@pytest.mark.parametrize("what, expected", [("exit", SystemExit), ("interrupt", KeyboardInterrupt)])
def test_no_exception_of_the_body_ends_the_worker_process(
    engine: ProcessPoolExecutor, what: str, expected: type[BaseException]
) -> None:
    report = decode_report(engine.submit(perform, ordered(bodies.give, what)).result(SOON))
    assert report.kind == FAILED and type(outcome_of(report)[1]) is expected
    exits = decode_report(engine.submit(perform, ordered(bodies.give_exits)).result(SOON))
    assert type(outcome_of(exits)[1]) is SystemExit


def test_a_body_that_cancels_itself_is_cancelled_with_its_reason() -> None:
    report = done(bodies.give, "cancelled")
    assert (report.kind, report.failure) == (CANCELLED, (None, "had enough", None))
    assert outcome_of(report) == (None, None)


def test_a_function_that_cannot_be_imported_there_is_the_failure_of_its_task(
    engine: ProcessPoolExecutor,
) -> None:
    payload = pickle.dumps((bodies.nothing, (), {})).replace(b"nothing", b"gone_by")
    report = decode_report(engine.submit(
        perform, ordered(bodies.nothing, payload=payload)).result(SOON))
    _, error = outcome_of(report)
    assert type(error) is RemoteError and "gone_by" in str(error) and "import" in str(error)
    assert [kind for kind, _ in said(report)] == [STARTED]


def test_what_is_no_order_is_refused() -> None:
    with pytest.raises(RemoteError, match="order"):
        perform(b"something else")
    with pytest.raises(RemoteError, match="order"):
        perform(encode_order(order(bodies.nothing))[:-5])


def test_a_command_is_ended_when_its_time_is_over_though_nobody_can_be_asked() -> None:
    report = done(shell("sleep 30"), timeout=0.3)
    assert report.kind == TIMED_OUT and type(outcome_of(report)[1]) is TaskTimedOut
    assert report.failure is not None and "(sleep)" in str(report.failure[2])
    assert 0.3 <= report.duration < 20


def test_a_body_that_does_not_look_at_its_deadline_has_timed_out_all_the_same() -> None:
    report = done(bodies.stay, 0.5, timeout=0.1, records_result=True)
    assert (report.kind, report.result_json) == (TIMED_OUT, None) and report.duration >= 0.5
    _, error = outcome_of(report)
    assert type(error) is TaskTimedOut and "0.1 s" in str(error)
    assert report.failure is not None
    name, message, info = report.failure
    assert (name, message) == ("TaskTimedOut", str(error))
    assert str(info).startswith("Stack (most recent call last):\n") and "in stay" in str(info)
    assert "worker.py" not in str(info)


def test_a_body_that_ends_in_time_has_not_timed_out() -> None:
    assert outcome_of(done(bodies.stay, 0.1, timeout=30.0)) == (0.1, None)


class KeepsItsTime:
    keeps_time = True

    def __call__(self) -> tuple[float | None, bool]:
        time.sleep(0.3)
        return current_task().time_remaining, current_task().cancel_requested


def test_who_keeps_his_own_time_is_left_alone() -> None:
    assert outcome_of(done(KeepsItsTime(), timeout=0.1)) == ((None, False), None)


def test_the_lines_of_a_command_come_back_in_order() -> None:
    report = done(shell("seq 1000; echo oops >&2"))
    lines: list[Any] = []
    for kind, data in said(report):
        if kind == OUTPUT:
            lines += data if isinstance(data, list) else [data]
    assert lines == [str(number) for number in range(1, 1001)]
    assert (ERROR, "oops") in said(report) or (ERROR, ["oops"]) in said(report)


class Thing:
    """May be referred to weakly."""


_seen: list[weakref.ref[Thing]] = []


def make_a_thing(fails: bool) -> object:
    thing = Thing()
    _seen.append(weakref.ref(thing))
    if fails:
        raise LookupError(thing)
    return thing


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_body_is_kept_in_the_process(fails: bool) -> None:
    gc.disable()
    try:
        done(make_a_thing, fails)
        assert _seen.pop()() is None
    finally:
        gc.enable()


def test_bodies_on_several_threads_do_not_get_one_another_s_records(tmp_path: Path) -> None:
    reports: list[Report] = []

    def run(count: int) -> None:
        reports.append(done(bodies.talk, count, 0.001))

    threads = [threading.Thread(target=run, args=(count,)) for count in range(20, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        in_time(thread.join)
    for report in reports:
        count, _ = outcome_of(report)
        assert Receiver().outputs(report) == [str(number) for number in range(count)]
    assert len({report.attempt for report in reports}) == len(reports) == 20


@pytest.mark.skipif(sys.version_info < (3, 14), reason="needs InterpreterPoolExecutor")
def test_bodies_run_in_subinterpreters_whose_threads_end_with_them() -> None:
    before = threading.active_count()
    with hub() as (made, receiver):
        with concurrent.futures.InterpreterPoolExecutor(2) as pool:
            running = [
                pool.submit(perform, ordered(bodies.talk, 50, 0.01, ticket=ticket, timeout=20.0))
                for ticket in (made.ticket, made.ticket, None)]
            reports = [decode_report(each.result(SOON)) for each in running]
            assert 1 <= len(made.workers()) <= 2
        until(lambda: not made.workers())
        assert receiver.came
        for report in reports:
            assert receiver.outputs(report) == [str(number) for number in range(50)]
    assert threading.active_count() == before
