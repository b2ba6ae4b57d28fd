"""A task is a `concurrent.futures.Future`: whatever waits on futures waits on tasks, and no waiter
is lost or told twice."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import bgworker
from bgworker import (
    Scheduler,
    StreamType,
    Task,
    TaskCancelled,
    TaskStatus,
    TaskTimedOut,
    checkpoint,
    current_task,
)
from tests.free_threading import runs_on

from bgworker.testing import MemorySink
from tests.support import Gate, fail, until

LONG = 30.0
"""Seconds after which a wait that ought to succeed has failed."""

INSIDE = str(Path(bgworker.__file__).parent)


def entered(task: Task[Any], gate: Gate) -> Task[Any]:
    assert gate.entered.wait(LONG), "the task did not start"
    return task


# -- Future's questions --


def test_a_task_that_returns_is_done_and_has_a_result_and_no_exception(pool: Scheduler) -> None:
    task = pool.submit(divmod, 7, 2)
    assert task.result(LONG) == (3, 1)
    assert task.exception(LONG) is None
    assert (task.done(), task.running(), task.cancelled(), task.status) == (
        True,
        False,
        False,
        TaskStatus.COMPLETED,
    )
    assert isinstance(task, Future) and task.wait(0)


def test_a_task_that_raises_has_that_very_exception(pool: Scheduler) -> None:
    error = ValueError("no")
    task = pool.submit(fail, error)
    assert task.exception(LONG) is error
    with pytest.raises(ValueError) as caught:
        task.result(LONG)
    assert caught.value is error and task.status is TaskStatus.FAILED and not task.cancelled()


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1)]
)
def test_what_is_no_ordinary_exception_reaches_the_waiter_too_and_the_worker_lives_on(
    error: BaseException,
) -> None:
    with Scheduler(1) as pool:
        task = pool.submit(fail, error)
        assert task.exception(LONG) is error
        assert pool.submit(len, "ab").result(LONG) == 2


def test_a_running_task_says_so_and_is_not_done(pool: Scheduler) -> None:
    gate = Gate("late")
    task = entered(pool.submit(gate), gate)
    assert (task.running(), task.done(), task.status) == (True, False, TaskStatus.RUNNING)
    gate.open()
    assert task.result(LONG) == "late"


def test_the_wait_that_runs_out_raises_timeout_error_and_the_task_goes_on(pool: Scheduler) -> None:
    gate = Gate("fine")
    task = entered(pool.submit(gate), gate)
    for ask in (task.result, task.exception):
        with pytest.raises(concurrent.futures.TimeoutError) as caught:
            ask(0.01)
        assert not isinstance(caught.value, TaskTimedOut)
    assert task.wait(0.01) is False
    gate.open()
    assert task.result(LONG) == "fine"


def test_the_end_of_a_tasks_own_time_is_no_timeout_error(pool: Scheduler) -> None:
    gate = Gate()
    task = pool.options(timeout=0.05).submit(gate)
    with pytest.raises(TaskTimedOut, match=r"0\.05 s") as caught:
        task.result(LONG)
    assert not isinstance(caught.value, (TimeoutError, concurrent.futures.TimeoutError))
    assert (task.status, task.done(), task.cancelled(), task.running()) == (
        TaskStatus.TIMED_OUT,
        True,
        False,
        False,
    )
    assert (task.cancel_requested, task.cancel_reason) == (True, "timeout")
    gate.open()


def test_a_timeout_error_that_the_task_raises_itself_is_its_failure(pool: Scheduler) -> None:
    task = pool.submit(fail, TimeoutError("socket"))
    with pytest.raises(TimeoutError, match="socket"):
        task.result(LONG)
    assert task.done() and task.status is TaskStatus.FAILED


def test_cancelling_a_queued_task_ends_it_at_once_and_its_function_never_runs() -> None:
    with Scheduler(1) as pool:
        gate, ran = Gate(), threading.Event()
        first = entered(pool.submit(gate), gate)
        task = pool.submit(ran.set)
        assert task.cancel("not needed") is True
        assert (task.cancelled(), task.done(), task.status) == (True, True, TaskStatus.CANCELLED)
        for ask in (task.result, task.exception):
            with pytest.raises(CancelledError):
                ask(LONG)
        assert task.cancel() is True, "Future's contract: true again for what will never run"
        assert (
            task.cancel_reason == "not needed" and task.snapshot().failure_message == "not needed"
        )
        gate.open()
        first.result(LONG)
    assert not ran.is_set()


def test_cancelling_a_running_task_asks_it_and_returns_false(pool: Scheduler) -> None:
    reached = threading.Event()

    def loop() -> None:
        reached.set()
        while True:
            checkpoint()
            time.sleep(0.001)

    task = pool.submit(loop)
    assert reached.wait(LONG)
    assert task.cancel("enough") is False
    with pytest.raises(CancelledError):
        task.result(LONG)
    assert task.cancelled() and task.cancel_reason == "enough" and task.cancel() is True


def test_cancelling_returns_false_though_the_running_task_ends_before_it_returns(
    pool: Scheduler,
) -> None:
    begun = threading.Event()

    def work() -> None:
        with current_task()._woken_by(lambda: task.wait(LONG)):  # on the thread that cancels
            begun.set()
            current_task().sleep(LONG)

    task = pool.submit(work)
    assert begun.wait(LONG)
    assert task.cancel() is False
    assert task.status is TaskStatus.CANCELLED


def test_a_task_that_ignores_its_cancellation_completes_and_only_the_first_reason_counts(
    pool: Scheduler,
) -> None:
    gate = Gate(5)
    task = entered(pool.submit(gate), gate)
    assert (task.cancel("first"), task.cancel("second")) == (False, False)
    assert task.cancel_requested and task.cancel_reason == "first"
    gate.open()
    assert task.result(LONG) == 5 and task.status is TaskStatus.COMPLETED
    assert task.cancel() is False, "what has completed cannot be cancelled"


def test_a_task_that_fails_while_it_is_being_cancelled_has_failed(pool: Scheduler) -> None:
    gate = Gate()

    def clean_up() -> None:
        gate()
        try:
            checkpoint()
        except TaskCancelled:
            raise OSError("disk full") from None

    task = entered(pool.submit(clean_up), gate)
    task.cancel()
    gate.open()
    assert isinstance(task.exception(LONG), OSError) and task.status is TaskStatus.FAILED


def test_a_task_may_cancel_itself(pool: Scheduler) -> None:
    task = pool.submit(fail, TaskCancelled("nothing to do"))
    with pytest.raises(CancelledError):
        task.result(LONG)
    assert task.snapshot().failure_message == "nothing to do"


def test_except_exception_does_not_swallow_a_cancellation(pool: Scheduler) -> None:
    gate = Gate()

    def stubborn() -> str:
        gate()
        try:
            checkpoint()
        except Exception:
            return "swallowed"
        return "not asked"

    task = entered(pool.submit(stubborn), gate)
    task.cancel()
    gate.open()
    assert task.wait(LONG) and task.cancelled()


# -- callbacks --


def test_callbacks_added_before_during_and_after_the_run_are_called_once_each_in_order() -> None:
    with Scheduler(1) as pool:
        called: list[tuple[str, object]] = []
        blocker, gate = Gate(), Gate()
        entered(pool.submit(blocker), blocker)
        task = pool.submit(gate)
        task.add_done_callback(lambda each: called.append(("before", each)))
        blocker.open()
        entered(task, gate)
        task.add_done_callback(lambda each: called.append(("during", each)))
        gate.open()
        task.result(LONG)
        until(lambda: len(called) == 2)
        task.add_done_callback(lambda each: called.append(("after", each)))
    assert called == [("before", task), ("during", task), ("after", task)]


def test_a_callback_that_raises_is_logged_and_the_others_are_called(
    pool: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    gate, last = Gate(), threading.Event()
    task = entered(pool.submit(gate), gate)
    task.add_done_callback(lambda each: fail(ValueError("callback's own")))
    task.add_done_callback(lambda each: last.set())
    with caplog.at_level(logging.ERROR, logger="concurrent.futures"):
        gate.open()
        assert last.wait(LONG)
        task.add_done_callback(lambda each: fail(ValueError("late one")))
    assert "callback's own" in caplog.text and "late one" in caplog.text
    assert task.result(LONG) is None


def test_a_callback_that_exits_costs_no_worker_and_no_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Scheduler(1) as pool:
        gate = Gate()
        task = entered(pool.submit(gate), gate)
        task.add_done_callback(lambda each: fail(SystemExit(1)))
        after = pool.submit(len, "abc")
        gate.open()
        assert after.result(LONG) == 3
    assert "exception in worker" in caplog.text


def test_a_log_that_fails_keeps_no_callback_from_being_called(pool: Scheduler) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise SystemExit("from a filter of the log")

    log, gate, called = logging.getLogger("concurrent.futures"), Gate(), threading.Event()
    log.addFilter(refuse)
    try:
        task = entered(pool.submit(gate), gate)
        task.add_done_callback(lambda each: fail(ValueError("own")))
        task.add_done_callback(lambda each: called.set())
        gate.open()
        assert called.wait(LONG)
    finally:
        log.removeFilter(refuse)


def test_callbacks_of_a_timed_out_task_are_called_while_its_thread_is_still_stuck(
    pool: Scheduler,
) -> None:
    gate, called = Gate(), threading.Event()
    task = pool.options(timeout=0.05).submit(gate)
    task.add_done_callback(lambda each: called.set())
    assert called.wait(LONG)
    gate.open()


# -- those who wait for many --


def test_as_completed_yields_every_task_once_as_they_end(pool: Scheduler) -> None:
    gate = Gate("last")
    tasks = [pool.submit(gate), *(pool.submit(abs, -n) for n in range(50))]
    seen = []
    for task in concurrent.futures.as_completed(tasks, timeout=LONG):
        seen.append(task)
        if len(seen) == 50:
            gate.open()
    assert len(seen) == 51 and set(seen) == set(tasks) and seen[-1] is tasks[0]


@pytest.mark.parametrize(
    "return_when",
    [
        concurrent.futures.FIRST_COMPLETED,
        concurrent.futures.FIRST_EXCEPTION,
        concurrent.futures.ALL_COMPLETED,
    ],
)
def test_wait_returns_when_it_was_asked_to(pool: Scheduler, return_when: str) -> None:
    bad, stuck = Gate(), Gate()
    tasks = {pool.submit(lambda: (bad(), fail(ValueError()))), pool.submit(stuck)}
    bad.open()
    if return_when == concurrent.futures.ALL_COMPLETED:
        stuck.open()
    done, not_done = concurrent.futures.wait(tasks, timeout=LONG, return_when=return_when)
    assert len(done) == (2 if return_when == concurrent.futures.ALL_COMPLETED else 1)
    assert done | not_done == tasks
    stuck.open()


def test_wait_mixes_tasks_with_other_peoples_futures(pool: Scheduler) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as stock:
        both: list[Future[int]] = [pool.submit(len, "a"), stock.submit(len, "bc")]
        done, not_done = concurrent.futures.wait(both, timeout=LONG)
    assert not not_done and sorted(each.result() for each in done) == [1, 2]


def test_wait_and_as_completed_see_cancelled_and_timed_out_tasks() -> None:
    with Scheduler(1) as pool:
        gate = Gate()
        slow = pool.options(timeout=0.05).submit(gate)
        blocker = Gate()
        running = pool.submit(blocker)
        queued = pool.submit(len, "x")
        threading.Timer(0.1, queued.cancel).start()
        seen = set(concurrent.futures.as_completed([slow, queued], timeout=LONG))
        assert seen == {slow, queued}
        blocker.open()
        gate.open()
        assert concurrent.futures.wait([slow, running, queued], timeout=LONG).not_done == set()


def test_an_event_loop_awaits_tasks_and_sees_their_results_exceptions_and_cancellations(
    pool: Scheduler,
) -> None:
    async def main() -> None:
        assert await asyncio.wait_for(asyncio.wrap_future(pool.submit(len, "abc")), LONG) == 3
        with pytest.raises(ValueError, match="no"):
            await asyncio.wait_for(asyncio.wrap_future(pool.submit(fail, ValueError("no"))), LONG)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wrap_future(pool.submit(fail, TaskCancelled("own")))
        assert await asyncio.get_running_loop().run_in_executor(pool, abs, -4) == 4

    asyncio.run(main())


def test_cancelling_on_the_event_loop_reaches_the_running_task_at_its_next_checkpoint(
    pool: Scheduler,
) -> None:
    reached = threading.Event()

    def sleep() -> None:
        reached.set()
        current_task().sleep(1000)

    task = pool.submit(sleep)

    async def main() -> None:
        wrapped = asyncio.wrap_future(task)
        await asyncio.get_running_loop().run_in_executor(None, reached.wait, LONG)
        wrapped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wrapped

    asyncio.run(main())
    assert task.wait(LONG) and task.cancelled() and task.status is TaskStatus.CANCELLED


def test_a_loops_wait_for_that_runs_out_stops_the_task(pool: Scheduler) -> None:
    task = pool.submit(lambda: current_task().sleep(1000))

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(task), 0.05)

    asyncio.run(main())
    assert task.wait(LONG) and task.cancelled()


def test_cancelling_races_with_starting_and_exactly_one_of_them_wins(hasty_switching: None) -> None:
    with Scheduler(2) as pool:
        for _ in range(200):
            ran: list[int] = []
            task = pool.submit(ran.append, 1)
            never_ran = task.cancel()
            assert task.wait(LONG)
            assert (never_ran, task.cancelled(), ran) in ((True, True, []), (False, False, [1]))


# -- exceptions and references --


def frames_of(traceback: TracebackType | None) -> list[str]:
    files = []
    while traceback is not None:
        files.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return files


def test_a_failed_task_keeps_the_users_traceback_and_none_of_bgworkers_frames(
    pool: Scheduler,
) -> None:
    task = pool.submit(fail, ValueError("no"))
    error = task.exception(LONG)
    assert error is not None and frames_of(error.__traceback__) == [
        fail.__code__.co_filename
    ]
    info = task.snapshot().invocation_info
    assert (
        info is not None
        and info.startswith("Traceback")
        and INSIDE not in info
        and "raise error" in info
    )


def test_a_call_with_the_wrong_arguments_fails_with_no_frame_at_all(pool: Scheduler) -> None:
    task = pool.submit(Gate, 1, 2, 3)
    error = task.exception(LONG)
    assert isinstance(error, TypeError) and not [
        each for each in frames_of(error.__traceback__) if INSIDE in each
    ]
    assert pool.submit(None).exception(LONG).__class__ is TypeError  # type: ignore[arg-type]


class Big:
    """Something that a weak reference can follow."""

    def __call__(self, *args: object, **kwargs: object) -> Big:
        return Big()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only counting references frees anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_task_lets_go_of_its_function_and_arguments_when_it_ends_and_dies_with_its_last_reference(
        no_collector: None) -> None:
    with Scheduler(1) as pool:
        function, argument, keyword = Big(), Big(), Big()
        task = pool.submit(function, argument, key=keyword)
        result = weakref.ref(task.result(LONG))
        inputs = [weakref.ref(each) for each in (function, argument, keyword)]
        del function, argument, keyword
        until(lambda: [ref() for ref in inputs] == [None] * 3)
        assert result() is not None
        ended = weakref.ref(task)
        del task
        until(lambda: runs_on(pool) and ended() is None and result() is None)


def test_the_exception_of_a_failed_task_dies_with_the_task_even_after_waiting_for_the_result(
    no_collector: None,
) -> None:
    class Failure(Exception):
        pass

    def boom() -> None:
        raise Failure

    with Scheduler(1) as pool:
        gate = Gate()
        for wait_first in (True, False):
            entered(pool.submit(gate), gate)
            task = pool.submit(boom)
            if wait_first:
                threading.Timer(0.05, gate.open).start()
            else:
                gate.open()
                assert task.wait(LONG)
            try:
                task.result(LONG)
            except Failure as raised:
                error, ended = weakref.ref(raised), weakref.ref(task)
            del task
            until(lambda: runs_on(pool) and error() is None and ended() is None)


def test_a_cancelled_queued_task_lets_go_of_its_function_at_once(no_collector: None) -> None:
    with Scheduler(1) as pool:
        gate = Gate()
        entered(pool.submit(gate), gate)
        function = Big()
        task = pool.submit(function)
        followed = weakref.ref(function)
        del function
        assert task.cancel() and followed() is None
        gate.open()


def test_a_timed_out_task_is_not_kept_alive_by_the_worker_that_replaced_its_own(
    no_collector: None,
) -> None:
    with Scheduler(1) as pool:
        gate = Gate()
        task = pool.options(timeout=0.05).submit(gate)
        assert isinstance(task.exception(LONG), TaskTimedOut)
        gate.open()
        ended = weakref.ref(task)
        del task
        until(lambda: ended() is None)


# -- what else a task tells --


def test_a_task_has_an_id_a_name_and_a_readable_repr(pool: Scheduler) -> None:
    task = pool.options(name="load").submit(len, "x")
    task.result(LONG)
    assert len(task.id) == 32 and int(task.id, 16) and task.name == "load"
    assert repr(task) == f"<Task 'load' {task.id} completed>"
    assert pool.submit(len, "x").name == "len"


def test_streams_are_there_at_once_and_can_be_asked_for_by_number_and_type(pool: Scheduler) -> None:
    def talk() -> None:
        current = current_task()
        current.output("one")
        current.error("two")
        current.output("three")
        current.progress(50)

    task = pool.submit(talk)
    task.result(LONG)
    assert [(each.stream_type, each.payload) for each in task.streams()] == [
        (StreamType.OUTPUT, "one"),
        (StreamType.ERROR, "two"),
        (StreamType.OUTPUT, "three"),
        (StreamType.PROGRESS, ""),
    ]
    assert [each.payload for each in task.streams(types=["output"])] == ["one", "three"]
    first = task.streams()[0]
    assert [each.seq for each in task.streams(since=first.seq)] == [
        first.seq + 1,
        first.seq + 2,
        first.seq + 3,
    ]
    assert task.streams(types=[StreamType.VERBOSE]) == []
    with pytest.raises(ValueError):
        task.streams(types=["stdout"])


def test_streams_hold_a_bounded_tail_whose_end_is_the_newest(pool: Scheduler) -> None:
    def talk() -> None:
        for number in range(3000):
            current_task().output(f"{number:04}" + "x" * 96)

    task = pool.submit(talk)
    task.result(LONG)
    numbers = [int(each.payload[:4]) for each in task.streams()]
    assert 100 < len(numbers) < 1000 and numbers == list(range(3000 - len(numbers), 3000))


def test_streams_still_answer_after_the_shutdown() -> None:
    with Scheduler(1) as pool:
        task = pool.submit(lambda: current_task().output("kept"))
    assert [each.payload for each in task.streams()] == ["kept"]


class Explosive(Exception):
    def __str__(self) -> str:
        raise SystemExit("boom")


class Obscure(Exception):
    def __str__(self) -> str:
        raise ValueError("boom")


@pytest.mark.parametrize("kind", [Explosive, Obscure])
def test_an_exception_that_cannot_be_shown_still_ends_its_task(
    pool: Scheduler, kind: type[Exception]
) -> None:
    task = pool.submit(fail, kind())
    assert isinstance(task.exception(LONG), kind)
    snapshot = task.snapshot()
    assert snapshot.failure_type == f"{__name__}.{kind.__name__}" and snapshot.failure_message
    assert snapshot.failure_message.startswith("<unprintable") and snapshot.invocation_info


def test_a_failures_text_is_cut_at_max_payload_and_cleaned() -> None:
    with Scheduler(1, max_payload=64) as pool:
        task = pool.submit(fail, ValueError("\0" + "é" * 100))
        task.wait(LONG)
    snapshot = task.snapshot()
    assert snapshot.failure_type == "ValueError" and snapshot.failure_message == "\ufffd" + "é" * 30
    assert snapshot.invocation_info is not None and len(snapshot.invocation_info.encode()) <= 64


def test_a_cancel_reason_that_is_no_text_reaches_the_record_as_text(tmp_path: Any) -> None:
    path = tmp_path / "events.jsonl"
    with Scheduler(1, sinks=[f"jsonl:{path}"]) as pool:
        gate = threading.Event()
        pool.submit(gate.wait, LONG)
        queued = pool.submit(len, "x")
        assert queued.cancel(5)  # type: ignore[arg-type]
        gate.set()
    assert queued.snapshot().failure_message == "5"
    assert pool.sinks["jsonl"].dropped == 0


@pytest.mark.parametrize("reason, shown", [(None, "user"), ("", ""), ("no more", "no more")])
def test_a_running_task_can_be_cancelled_with_any_reason_and_with_none(
    pool: Scheduler, reason: Any, shown: str
) -> None:
    gate = threading.Event()

    def work() -> None:
        gate.wait(LONG)
        current_task().checkpoint()

    task = pool.submit(work)
    until(task.running)
    assert not task.cancel(reason) and task.cancel_requested and task.cancel_reason == shown
    gate.set()
    assert task.wait(LONG) and task.cancelled()


def test_an_exception_that_takes_for_ever_to_be_shown_does_so_in_its_tasks_own_time(
    pool: Scheduler,
) -> None:
    go = threading.Event()

    class Slow(Exception):
        def __str__(self) -> str:
            go.wait(LONG)
            return "at last"

    task = pool.options(timeout=0.1).submit(fail, Slow())
    try:
        assert (
            isinstance(task.exception(LONG), TaskTimedOut) and task.status is TaskStatus.TIMED_OUT
        )
    finally:
        go.set()


def test_who_sees_the_end_of_a_task_can_count_on_its_event() -> None:
    """At whatever step of the end somebody looks: where the end shows, a flush has the event."""
    for step in range(1, 60):
        sink = MemorySink()
        stopped, go_on = threading.Event(), threading.Event()
        seen: list[int] = []

        def trace(frame: Any, event: str, arg: Any, step: int = step, seen: list[int] = seen,
                  stopped: threading.Event = stopped, go_on: threading.Event = go_on) -> Any:
            if frame.f_code.co_name not in ("_end", "_record_end", "_resolve", "emit_lifecycle"):
                return None
            if event == "line":
                seen.append(frame.f_lineno)
                if len(seen) == step:
                    stopped.set()
                    go_on.wait(LONG)
            return trace

        with Scheduler(1, sinks=[sink], initializer=sys.settrace, initargs=(trace,)) as pool:
            task = pool.submit(len, "")
            until(lambda: stopped.is_set() or task.done())
            if task.status.is_final or task.done():
                assert pool.flush(LONG)
                assert [each.type.value for each in sink.events][
                    -1
                ] == "TaskCompleted", f"line {seen[-1]}"
            go_on.set()
            task.result(LONG)
        if len(seen) < step:
            break
    assert step > 5
