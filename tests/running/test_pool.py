"""The pool's own promises: few threads, none lost, no task lost with them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import pytest

import bgworker.model.threads
import bgworker.running.pool
import bgworker.running.task
from bgworker import (
    LifecycleEvent,
    PoolStuck,
    Scheduler,
    ShutdownError,
    StreamEvent,
    Task,
    TaskStatus,
    TaskTimedOut,
    current_task,
)
from bgworker.model.reports import wait_for_reports
from bgworker.testing import MemorySink
from tests.interrupts import (
    AtStep, Interrupt, alarm, interrupt, interrupt_late, needs_signals, one_step_at_a_time, traced)
from tests.support import Gate, until

LONG = 30.0


def workers_of(pool: Scheduler) -> int:
    return len(pool._pool._workers)


def test_no_thread_is_started_before_the_first_task() -> None:
    before = threading.active_count()
    pool = Scheduler(8)
    assert threading.active_count() == before
    pool.shutdown()


def test_an_idle_worker_is_used_again_before_another_is_started() -> None:
    with Scheduler(8) as pool:
        for _ in range(20):
            pool.submit(len, "").result(LONG)
            until(lambda: pool._pool.idle == workers_of(pool))
        assert workers_of(pool) == 1


def test_workers_are_started_as_tasks_need_them_and_never_more_than_allowed() -> None:
    with Scheduler(3) as pool:
        barrier = threading.Barrier(3)
        tasks = [pool.submit(barrier.wait, LONG) for _ in range(9)]
        assert (
            sorted(each.result(LONG) for each in tasks) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
            and workers_of(pool) == 3
        )


def test_tasks_start_in_the_order_in_which_they_were_submitted() -> None:
    ran: list[int] = []
    with Scheduler(1) as pool:
        for number in range(500):
            pool.submit(ran.append, number)
    assert ran == list(range(500))


def test_worker_threads_are_daemons_with_the_pools_name() -> None:
    with Scheduler(1, name="loader") as pool:
        thread = pool.submit(threading.current_thread).result(LONG)
        assert thread.daemon and thread.name == "loader_0"


def test_idle_workers_after_a_resize_to_less_end() -> None:
    with Scheduler(4) as pool:
        barrier = threading.Barrier(4)
        for task in [pool.submit(barrier.wait, LONG) for _ in range(4)]:
            task.result(LONG)
        threads = [each.thread for each in pool._pool._workers]
        pool.resize(1)
        until(lambda: sum(each.is_alive() for each in threads) == 1)
        assert pool.submit(len, "abc").result(LONG) == 3 and workers_of(pool) == 1


def test_submits_of_many_threads_are_all_run() -> None:
    ran: list[int] = []
    with Scheduler(3) as pool:
        threads = [
            threading.Thread(target=lambda: [pool.submit(ran.append, 1) for _ in range(500)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
    assert len(ran) == 2000


def test_many_pools_end_and_leave_no_thread() -> None:
    before = threading.active_count()
    for _ in range(30):
        with Scheduler(3) as pool:
            pool.options(timeout=LONG).submit(len, "")
    until(lambda: threading.active_count() <= before)


@contextlib.contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The system has no more threads to give."""
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def test_submit_is_refused_when_no_first_thread_can_be_started_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Scheduler(2) as pool:
        pool._dispatcher.start()
        with no_threads(monkeypatch):
            for options in ({}, {"timeout": 5.0}):
                with pytest.raises(ShutdownError, match="no thread can be started"):
                    pool.options(**options).submit(len, "")  # type: ignore[arg-type]
        assert pool.tasks() == [] and workers_of(pool) == 0
        assert pool.submit(len, "abc").result(LONG) == 3


def test_without_threads_the_workers_that_are_there_do_it_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Scheduler(4) as pool:
        gate = threading.Event()
        first = pool.submit(gate.wait, LONG)
        with no_threads(monkeypatch):
            tasks = [pool.submit(len, "abc") for _ in range(5)]
            gate.set()
            assert [each.result(LONG) for each in tasks] == [3] * 5
        assert first.result(LONG)


def test_a_worker_that_cannot_be_replaced_at_a_deadline_goes_on_when_its_task_returns(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with Scheduler(1) as pool:
        gate = threading.Event()
        task = pool.options(timeout=0.1).submit(gate.wait, LONG)
        waiting = pool.submit(len, "abc")
        until(task.running)
        with no_threads(monkeypatch):
            assert isinstance(task.exception(LONG), TaskTimedOut)
            until(lambda: "no thread can be started" in caplog.text)
            gate.set()
            assert waiting.result(LONG) == 3
    assert caplog.records[0].levelno == logging.ERROR


def test_what_waits_is_cancelled_when_a_closed_pools_last_worker_is_stuck_and_irreplaceable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Scheduler(1)
    gate = threading.Event()
    task = pool.options(timeout=0.2).submit(gate.wait, LONG)
    waiting = pool.submit(len, "abc")
    until(task.running)
    with no_threads(monkeypatch):
        pool.shutdown(wait=False)
        assert isinstance(task.exception(LONG), TaskTimedOut)
        assert waiting.wait(LONG) and waiting.cancelled()
        assert pool._dispatcher.closed.wait(LONG)
    gate.set()


def test_a_pool_whose_initializer_fails_fails_all_that_waits_and_takes_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Odd(Exception):
        def __repr__(self) -> str:
            raise ValueError("not even this")

    def initializer() -> None:
        raise Odd("no database")

    with Scheduler(2, initializer=initializer) as pool:
        tasks: list[Any] = []
        with pytest.raises(ShutdownError, match=r"initializer failed.*\(Odd: no database\)"):
            for _ in range(1_000_000):
                tasks.append(pool.submit(len, ""))
        assert tasks and all("Odd: no database" in str(each.exception(LONG)) for each in tasks)
    assert "exception in the pool's initializer" in caplog.text


def test_a_log_that_fails_keeps_the_news_of_a_failed_initializer_from_nobody() -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise SystemExit("from a filter of the log")

    log = logging.getLogger("concurrent.futures")
    log.addFilter(refuse)
    try:
        with Scheduler(1, initializer=divmod, initargs=(1, 0)) as pool:
            with pytest.raises(ShutdownError, match="initializer failed.*ZeroDivisionError"):
                pool.submit(len, "").result(LONG)
    finally:
        log.removeFilter(refuse)


# -- threads that are stuck --


class Stuck:
    """Makes tasks that do not look whether they are to stop, and lets them go at the end."""

    def __init__(self, pool: Scheduler) -> None:
        self.go = threading.Event()
        self.pool = pool

    def submit(self, number: int) -> list[Task[bool]]:
        submit = self.pool.options(timeout=0.05).submit
        return [submit(self.go.wait, LONG) for _ in range(number)]


@contextlib.contextmanager
def stuck(pool: Scheduler) -> Iterator[Stuck]:
    tasks = Stuck(pool)
    try:
        with pool:
            yield tasks
            tasks.go.set()
    finally:
        tasks.go.set()


def threads_of(pool: Scheduler) -> int:
    return len([each for each in threading.enumerate() if each.name.startswith("stuckpool_")])


class Keeper:
    """A callable that keeps its task's time, and gives it a moment more."""

    keeps_time = True

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    def __call__(self) -> str:
        context = current_task()
        context._keep_time(time.monotonic() + LONG, LONG)
        time.sleep(0.3)
        if self._error is not None:
            context._overdue_at = ""
            raise self._error
        return "done"


def test_a_callable_that_keeps_its_time_is_left_alone_until_it_says_that_it_is_over() -> None:
    with Scheduler(1) as pool:
        timed = pool.options(timeout=0.1)
        assert timed.submit(Keeper()).result(LONG) == "done"
        assert not pool._pool.deadlines.has_started, "it needs no thread for that"
        late = timed.submit(Keeper(TaskTimedOut("ran too long")))
        assert isinstance(late.exception(LONG), TaskTimedOut)
        assert (late.status, late.snapshot().timeout) == ("timed_out", LONG)
        other = timed.submit(Keeper(ValueError("x")))
        assert isinstance(other.exception(LONG), ValueError) and other.status == "failed"


def test_a_callable_that_only_seems_to_keep_its_time_has_a_deadline() -> None:
    class Proxy:
        def __getattr__(self, name: str) -> object:
            return True

        def __call__(self) -> None:
            current_task().sleep(LONG)

    def plain() -> None:
        raise TaskTimedOut("somebody else's")

    with Scheduler(1) as pool:
        task = pool.options(timeout=0.1).submit(Proxy())
        assert isinstance(task.exception(LONG), TaskTimedOut) and task.status == "timed_out"
        task = pool.submit(plain)
        assert isinstance(task.exception(LONG), TaskTimedOut) and task.status == "failed"


def test_a_hundred_tasks_that_never_look_cost_a_hundred_quick_ones_nothing() -> None:
    sink = MemorySink()
    with stuck(Scheduler(4, sinks=[sink])) as sleepers:
        slow = sleepers.submit(100)
        quick = [sleepers.pool.submit(len, "abc") for _ in range(100)]
        assert [each.result(LONG) for each in quick] == [3] * 100
        assert not sleepers.go.is_set() and all(
            isinstance(each.exception(LONG), TaskTimedOut) for each in slow
        )
        # a task has its end a moment before its thread has its successor
        until(lambda: sleepers.pool.health().replaced == 100)
        health = sleepers.pool.health()
        assert len(health.stuck) == 100 and health.workers <= 4
    by_task: dict[str, list[Any]] = {}
    for each in sink.events:
        by_task.setdefault(each.task_id, []).append(each)
    assert set(by_task) == {each.id for each in (*slow, *quick)}
    for task in (*slow, *quick):
        end = "TaskTimedOut" if task in slow else "TaskCompleted"
        assert [each.type.value for each in by_task[task.id]] == [
            "TaskCreated",
            "TaskScheduled",
            "TaskStarted",
            end,
        ]
        assert [each.seq for each in by_task[task.id]] == [1, 2, 3, 4]


def test_without_replacing_the_stuck_the_quick_ones_would_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        bgworker.running.pool.Pool, "_expire", lambda pool, task, thread: task._time_out("")
    )
    with stuck(Scheduler(4)) as sleepers:
        slow = sleepers.submit(4)
        quick = sleepers.pool.submit(len, "abc")
        assert all(isinstance(each.exception(LONG), TaskTimedOut) for each in slow)
        assert not quick.wait(0.3)


def test_there_are_never_more_threads_than_workers_and_stuck_ones_allowed() -> None:
    with stuck(Scheduler(3, name="stuckpool", max_stuck=5)) as sleepers:
        slow = sleepers.submit(20)
        until(lambda: len(sleepers.pool.health().stuck) == 8)
        assert threads_of(sleepers.pool) == 8
        assert sum(each.done() for each in slow) == 8, "each of these has timed out all the same"


def test_beyond_the_bound_the_workers_that_are_left_go_on(caplog: pytest.LogCaptureFixture) -> None:
    with stuck(Scheduler(2, max_stuck=0)) as sleepers:
        both = threading.Barrier(2)
        for task in [sleepers.pool.submit(both.wait, LONG) for _ in range(2)]:
            task.result(LONG)
        [slow] = sleepers.submit(1)
        assert isinstance(slow.exception(LONG), TaskTimedOut)
        until(lambda: sleepers.pool.health().stuck)
        assert [sleepers.pool.submit(len, "abc").result(LONG) for _ in range(10)] == [3] * 10
        health = sleepers.pool.health()
        assert (health.workers, health.replaced, len(health.stuck)) == (1, 0, 1)
    wait_for_reports(time.monotonic() + LONG)
    assert (
        f"task {slow.id} past its deadline cannot be replaced" in caplog.text
        and "max_stuck=0" in caplog.text
    )


def test_when_all_are_stuck_what_waits_fails_and_submit_is_refused_until_one_comes_back(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bgworker.running.pool, "STANDSTILL", 0.2)
    sink = MemorySink()
    with stuck(Scheduler(2, max_stuck=1, sinks=[sink])) as sleepers:
        pool = sleepers.pool
        slow = sleepers.submit(5)
        errors = [each.exception(LONG) for each in slow]
        assert [type(each) for each in errors] == [TaskTimedOut] * 3 + [PoolStuck] * 2
        assert "stuck in tasks past their deadline: 3, and max_stuck=1 allows no other" in str(
            errors[-1]
        )
        with pytest.raises(PoolStuck, match="Scheduler.health\\(\\) names the tasks"):
            pool.submit(len, "")
        assert isinstance(PoolStuck(""), RuntimeError), "as what a broken executor raises"
        assert len(pool.health().stuck) == 3 and pool.health().pending == 0
        sleepers.go.set()
        until(lambda: len(pool.health().stuck) < 3)
        assert [pool.submit(len, "abc").result(LONG) for _ in range(5)] == [3] * 5
    ends = {each.task_id: each.type.value for each in sink.events}  # of each task the last
    assert [ends[each.id] for each in slow] == ["TaskTimedOut"] * 3 + ["TaskFailed"] * 2
    assert all(each.status is TaskStatus.FAILED for each in slow[3:])


def test_one_that_comes_back_soon_takes_up_what_waits() -> None:
    with stuck(Scheduler(1, max_stuck=0)) as sleepers:
        [slow] = sleepers.submit(1)
        assert isinstance(slow.exception(LONG), TaskTimedOut)
        until(lambda: sleepers.pool.health().workers == 0)
        waiting = sleepers.pool.submit(lambda: threading.current_thread().name)
        assert not waiting.wait(0.1)
        sleepers.go.set()
        assert waiting.result(LONG) == "bgworker_0"
        until(lambda: sleepers.pool.health().workers == 1 and not sleepers.pool.health().stuck)


def test_a_shutdown_while_all_are_stuck_cancels_what_waits_and_ends() -> None:
    pool = Scheduler(1, max_stuck=0)
    sleepers = Stuck(pool)
    [slow] = sleepers.submit(1)
    assert isinstance(slow.exception(LONG), TaskTimedOut)
    until(lambda: pool.health().workers == 0)
    waiting = pool.submit(len, "")
    pool.shutdown()
    assert (
        waiting.cancelled()
        and waiting.cancel_reason == "shutdown"
        and pool._dispatcher.closed.is_set()
    )
    sleepers.go.set()


def test_a_resize_holds_also_where_no_thread_can_be_had_for_it_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stuck(Scheduler(1)) as sleepers:
        pool = sleepers.pool
        [slow] = sleepers.submit(1)
        waiting = pool.submit(len, "abc")
        until(slow.running)
        with no_threads(monkeypatch):
            assert isinstance(slow.exception(LONG), TaskTimedOut)
            until(lambda: not pool.health().workers)
            pool.resize(3)
            assert pool.health().max_workers == 3 and not waiting.done()
        assert pool.submit(len, "").result(LONG) == 0 and waiting.result(LONG) == 3


def test_a_pool_does_not_end_between_a_deadline_and_the_callbacks_of_its_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time_out = bgworker.Task._time_out

    def resolve_and_let_the_thread_leave(
            task: bgworker.Task[Any], stack: str) -> Callable[[], object] | None:
        left = time_out(task, stack)
        # gone, after its look
        until(lambda: not [each for each in threading.enumerate() if each.name == "leaving_0"])
        return left

    monkeypatch.setattr(bgworker.Task, "_time_out", resolve_and_let_the_thread_leave)
    told = threading.Event()
    pool = Scheduler(1, name="leaving")
    task = pool.options(timeout=0.05).submit(lambda: current_task().sleep(LONG))
    task.add_done_callback(lambda _: told.set())
    pool.shutdown()
    assert told.is_set() and not pool._pool._roster.active()


def test_workers_that_are_started_ahead_wait_for_tasks_and_are_the_only_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Scheduler(1) as pool:
        gates = [Gate(), Gate()]
        first = pool.submit(gates[0])
        assert gates[0].entered.wait(LONG) and workers_of(pool) == 1
        assert pool._pool.grow(2) and workers_of(pool) == 2
        until(lambda: pool._pool.idle == 1)
        with no_threads(monkeypatch):
            assert not pool._pool.grow(3)
            second = pool.submit(gates[1])
            assert gates[1].entered.wait(LONG), "the one that was started ahead takes it"
        assert workers_of(pool) == 2 and pool.health().max_workers == 2
        for gate in gates:
            gate.open()
        wait([first, second], LONG)
    assert not pool._pool.grow(3) and workers_of(pool) == 0


def test_a_resize_after_the_end_starts_nothing() -> None:
    pool = Scheduler(1)
    pool.submit(len, "").result(LONG)
    pool.shutdown()
    pool.resize(3)
    assert workers_of(pool) == 0


def test_a_pool_that_got_no_thread_for_a_while_goes_on_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bgworker.running.pool, "STANDSTILL", 0.3)
    with stuck(Scheduler(1)) as sleepers:
        [slow] = sleepers.submit(1)
        waiting = sleepers.pool.submit(len, "abc")
        until(slow.running)
        with no_threads(monkeypatch):
            assert isinstance(slow.exception(LONG), TaskTimedOut)
        assert waiting.result(LONG) == 3


def test_without_a_bound_all_are_replaced() -> None:
    with stuck(Scheduler(1, max_stuck=None)) as sleepers:
        slow = sleepers.submit(20)
        assert all(isinstance(each.exception(LONG), TaskTimedOut) for each in slow)
        assert sleepers.pool.submit(len, "abc").result(LONG) == 3


def test_a_worker_that_finds_a_task_which_another_has_begun_is_not_taken_for_its_runner() -> None:
    """The task stands in the queue still, and is past its deadline in the hands of who waits for
    it."""
    with stuck(Scheduler(2)) as sleepers:
        pool = sleepers.pool
        gate = threading.Event()
        both = threading.Barrier(3)

        def outer() -> None:
            both.wait(LONG)
            sleepers.pool.options(timeout=0.2, name="inner").submit(sleepers.go.wait, LONG).result()

        def busy() -> None:
            both.wait(LONG)
            gate.wait(LONG)

        tasks = [pool.submit(outer), pool.submit(busy)]
        both.wait(LONG)
        until(lambda: pool.health().running == 3)
        gate.set()  # that worker finds the inner one in the queue
        until(lambda: pool.health().stuck)
        [thread] = pool.health().stuck
        assert thread.task_name == "inner" and not tasks[0].done() and tasks[1].wait(LONG)
        assert pool.submit(len, "abc").result(LONG) == 3


# -- the figures --


def test_health_tells_what_runs_what_waits_and_what_is_stuck_on_what_since_when() -> None:
    before = datetime.datetime.now(datetime.timezone.utc)
    with stuck(Scheduler(2)) as sleepers:
        pool = sleepers.pool
        assert pool.health() == dataclasses.replace(
            pool.health(),
            max_workers=2,
            workers=0,
            idle=0,
            running=0,
            pending=0,
            stuck=(),
            replaced=0,
            late_events=0,
        )
        gate = threading.Event()
        busy = [pool.submit(gate.wait, LONG) for _ in range(2)]
        until(lambda: all(each.running() for each in busy))
        waiting = [pool.submit(len, "") for _ in range(3)]
        waiting[0].cancel()
        health = pool.health()
        assert (health.workers, health.idle, health.running, health.pending) == (2, 0, 2, 2)
        gate.set()
        [task] = pool.options(timeout=0.05, name="nightly").submit(sleepers.go.wait, LONG),
        assert isinstance(task.exception(LONG), TaskTimedOut)
        until(lambda: pool.health().idle == pool.health().workers)
        health = pool.health()
        [thread] = health.stuck
        assert (thread.task_id, thread.task_name, thread.thread[:9]) == (
            task.id,
            "nightly",
            "bgworker_",
        )
        assert before < thread.since_utc < datetime.datetime.now(datetime.timezone.utc)
        assert (health.running, health.pending, health.replaced) == (0, 0, 1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            health.running = 3  # type: ignore[misc]
        sleepers.go.set()
        until(lambda: pool.health().stuck == ())
    assert (pool.health().workers, pool.health().replaced) == (
        0,
        1,
    ), "it answers after the shutdown, too"


def test_health_counts_late_events_whoever_asks_at_once() -> None:
    with stuck(Scheduler(1)) as sleepers:
        said = threading.Event()

        def chatty() -> None:
            task = current_task()
            sleepers.go.wait(LONG)
            for _ in range(50):
                task.output("late")
            said.set()

        assert isinstance(
            sleepers.pool.options(timeout=0.05).submit(chatty).exception(LONG), TaskTimedOut
        )
        assert sleepers.pool.health().late_events == 0
        sleepers.go.set()
        assert said.wait(LONG)
        figures: list[int] = []
        askers = [
            threading.Thread(
                target=lambda: figures.extend(sleepers.pool.health().late_events for _ in range(50))
            )
            for _ in range(4)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(LONG)
            assert not asker.is_alive()
        assert figures == [50] * 200


def test_a_task_given_up_at_shutdown_is_told_of_as_stuck() -> None:
    go = threading.Event()
    pool = Scheduler(1)
    task = pool.options(name="endless").submit(go.wait, LONG)
    until(task.running)
    pool.shutdown(timeout=0.2)
    health = pool.health()
    assert [each.task_name for each in health.stuck] == ["endless"] and (
        health.workers,
        health.running,
    ) == (0, 1)
    go.set()
    until(lambda: pool.health().stuck == ())


def test_a_task_that_shrinks_the_pool_and_waits_for_another_is_helped() -> None:
    with Scheduler(4) as pool:
        together = threading.Barrier(4)
        for task in [pool.submit(together.wait, LONG) for _ in range(4)]:
            task.result(LONG)

        def shrink_and_wait() -> int:
            pool.resize(1)
            return len(wait([pool.submit(len, "abc")]).done)

        assert pool.submit(shrink_and_wait).result(LONG) == 1


def test_the_queue_keeps_no_result_of_what_was_run_by_who_waited_for_it() -> None:
    class Result:
        pass

    results: list[weakref.ref[Result]] = []

    def make() -> Result:
        result = Result()
        results.append(weakref.ref(result))
        return result

    with Scheduler(1, keep_finished=0) as pool:
        def wait_for_many() -> int:
            for _ in range(1000):
                pool.submit(make).result()
            gc.collect()
            return sum(result() is not None for result in results)

        assert pool.submit(wait_for_many).result(LONG) < 100
    assert len(results) == 1000


def test_no_result_is_let_go_under_the_lock_of_the_pool() -> None:
    asked: list[bool] = []

    class Result:
        def __del__(self) -> None:
            asking = threading.Thread(target=pool.health)
            asking.start()
            asking.join(LONG if all(asked) else 0)
            asked.append(not asking.is_alive())

    def wait_for_many() -> None:
        for _ in range(200):
            pool.submit(Result).result()

    with Scheduler(1, keep_finished=0) as pool:
        pool.submit(wait_for_many).result(LONG)
    assert len(asked) == 200 and all(asked)


# -- what ends is a task, not a thread --


ENDS = {"TaskCompleted", "TaskFailed", "TaskCancelled", "TaskTimedOut"}


def ends_of(sink: MemorySink) -> dict[str, list[str]]:
    """Return the terminal events of each task that has begun."""
    ends: dict[str, list[str]] = {}
    for event in sink.events:
        if event.type.value == "TaskStarted":
            ends.setdefault(event.task_id, [])
        elif event.type.value in ENDS:
            ends.setdefault(event.task_id, []).append(event.type.value)
    return ends


@pytest.mark.parametrize("late", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2), ()])
def test_of_tasks_inside_one_another_each_that_is_not_past_its_own_deadline_is_waited_for(
    late: tuple[int, ...],
) -> None:
    """Those of depth in ``late`` have a deadline that passes while the innermost runs."""
    sink = MemorySink()
    pool = Scheduler(1, sinks=[sink], max_stuck=2)
    tasks: dict[int, Task[Any]] = {}
    are_late, innermost = threading.Event(), threading.Event()

    def nest(depth: int) -> None:
        if depth == 2:
            innermost.set()
            assert are_late.wait(LONG)
        else:
            tasks[depth + 1] = options(depth + 1).submit(nest, depth + 1)
            with contextlib.suppress(TaskTimedOut):
                tasks[depth + 1].result()
        time.sleep(0.05)  # an end that comes later than all of the pool's looks
        current_task().output(f"the end of {depth}")

    def options(depth: int) -> Any:
        return pool.options(timeout=0.2 if depth in late else None)

    tasks[0] = options(0).submit(nest, 0)
    assert innermost.wait(LONG)
    closing = threading.Thread(target=pool.shutdown)
    closing.start()
    for depth in late:
        assert tasks[depth].wait(LONG)
    are_late.set()
    closing.join(LONG)
    assert not closing.is_alive()
    said = {(each.task_id, each.payload) for each in sink.events if isinstance(each, StreamEvent)}
    for depth, task in tasks.items():
        expected = TaskStatus.TIMED_OUT if depth in late else TaskStatus.COMPLETED
        assert task.done() and task.status is expected
        assert ends_of(sink)[task.id] == ["TaskTimedOut" if depth in late else "TaskCompleted"]
        assert ((task.id, f"the end of {depth}") in said) == (depth not in late)


def test_what_a_shutdown_cancels_has_its_end_on_record_also_where_the_last_worker_is_stuck() -> (
    None
):
    for _ in range(20):
        sink = MemorySink()
        pool = Scheduler(1, max_stuck=0, sinks=[sink])
        go = threading.Event()
        slow = pool.options(timeout=0.01).submit(go.wait, LONG)
        waiting = [pool.submit(len, "") for _ in range(100)]
        until(lambda: slow.running() or slow.done())
        pool.shutdown(cancel_futures=True)
        go.set()
        ends = ends_of(sink)
        assert ends[slow.id] == ["TaskTimedOut"] and all(
            ends[each.id] == ["TaskCancelled"] for each in waiting
        )


# -- interrupts, and whoever comes between two steps --


def joined(pool: Scheduler, **how: Any) -> bool:
    """Shut down on another thread, and tell whether that came to an end."""
    closing = threading.Thread(target=pool.shutdown, kwargs=how, daemon=True)
    closing.start()
    closing.join(LONG / 3)
    return not closing.is_alive()


def interrupted_shutdown(sink: MemorySink) -> Callable[[], bool]:
    """Strike a shutdown that waits for a running task; return a function that lets this end, and
    tells whether a second shutdown waited for it."""
    gate = Gate()
    pool = Scheduler(1, sinks=[sink])
    task = pool.submit(gate)
    assert gate.entered.wait(LONG)
    with pytest.raises(Interrupt), alarm(0.02):
        pool.shutdown()

    def finish() -> bool:
        opening = threading.Timer(0.05, gate.open)
        opening.start()
        pool.shutdown()
        was_waited_for = task.done()
        opening.join()
        assert task.wait(LONG)
        return was_waited_for

    return finish


@needs_signals
def test_ctrl_c_in_a_shutdown_costs_the_running_task_neither_its_time_nor_its_end() -> None:
    sink = MemorySink()
    assert interrupted_shutdown(sink)()
    assert [each.type.value for each in sink.events][-1:] == ["TaskCompleted"]


@needs_signals
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="3.13 has mended it")
def test_with_pythons_own_threads_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bgworker.model.threads, "_Thread", threading.Thread)
    sink = MemorySink()
    assert not interrupted_shutdown(sink)()
    assert [each.type.value for each in sink.events][-1:] == ["TaskStarted"]


@one_step_at_a_time
@pytest.mark.parametrize("when", [interrupt, interrupt_late])
@pytest.mark.parametrize("timeout", [None, LONG])
def test_wherever_an_interrupt_strikes_a_submit_the_pool_ends_and_what_it_took_has_one_end(
    timeout: float | None, when: Callable[[], object]
) -> None:
    number = 0
    while True:
        sink = MemorySink()
        pool = Scheduler(2, sinks=[sink])
        options = pool.options(timeout=timeout)
        steps = AtStep(number, when)
        try:
            with traced(steps):
                for _ in range(2):
                    options.submit(time.sleep, 0.02 if when is interrupt_late else 0)
        except Interrupt:
            pass
        assert joined(pool), f"step {number}, in {steps.struck}"
        for task_id in {event.task_id for event in sink.events}:  # type: ignore[union-attr]
            events: list[Any] = sink.events
            names = [each.type.value for each in events if each.task_id == task_id]
            assert names[:2] == ["TaskCreated", "TaskScheduled"] and [
                name in ENDS for name in names
            ] == [*[False] * (len(names) - 1), True], f"step {number}, in {steps.struck}"
        if not steps.struck:
            break
        number += 1
    assert number > 20


@one_step_at_a_time
def test_wherever_an_interrupt_strikes_a_flush_nobody_waits_for_what_it_held() -> None:
    number = 0
    while True:
        sink = MemorySink()
        pool = Scheduler(1, sinks=[sink])
        pool.submit(time.sleep, 0.001)
        steps = AtStep(number, interrupt, everywhere=True)
        with contextlib.suppress(Interrupt), traced(steps):
            pool.flush(LONG)
        where = f"step {number}, in {steps.struck}"
        again = threading.Thread(target=pool.flush, daemon=True)
        again.start()
        again.join(LONG / 3)
        assert not again.is_alive() and joined(pool), where
        assert [each.type.value for each in sink.events][-1:] == ["TaskCompleted"], where
        if not steps.struck:
            break
        number += 1
    assert number > 3


@one_step_at_a_time
# one that strikes a thread's end
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("timeout", [None, LONG])
@pytest.mark.parametrize("function", [len, lambda text: text.nothing])
def test_wherever_an_interrupt_strikes_a_run_the_task_and_the_pool_end(
    function: Callable[[str], Any], timeout: float | None
) -> None:
    number = 0
    while True:
        sink = MemorySink()
        steps = AtStep(
            number,
            interrupt,
            inside=(
                "_run",
                "_end",
                "_record_end",
                "_resolve",
                "_tell",
                "emit_lifecycle",
                "watch",
                "forget",
                "verdict",
                "_run_tasks",
                "_next",
            ),
        )
        pool = Scheduler(1, sinks=[sink], initializer=sys.settrace, initargs=(steps,))
        tasks = [pool.options(timeout=timeout).submit(function, "text") for _ in range(2)]
        for task in tasks:
            assert task.wait(LONG), f"step {number}, in {steps.struck}"
        assert joined(pool), f"step {number}, in {steps.struck}"
        for task in tasks:
            [end] = [
                event.task.status
                for event in sink.events
                if isinstance(event, LifecycleEvent)
                and event.type.value in ENDS
                and event.task_id == task.id
            ]
            assert end is task.status, f"step {number}, in {steps.struck}"
        if not steps.struck:
            break
        number += 1
    assert number > 10


@one_step_at_a_time
def test_at_whatever_step_of_a_shutdown_a_stuck_thread_comes_back_nothing_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bgworker.running.pool, "JOIN_SLICE", 0.02)
    number = 0
    while True:
        go = threading.Event()
        threads: list[threading.Thread] = []

        def come_back() -> None:
            go.set()
            # where the shutdown holds the lock that this needs, it has to go on without
            threads[0].join(0.01)

        def work() -> None:
            threads.append(threading.current_thread())
            with current_task()._woken_by(int):
                go.wait(LONG)

        pool = Scheduler(1)
        task = pool.options(timeout=0.01).submit(work)
        assert isinstance(task.exception(LONG), TaskTimedOut)
        until(lambda: pool.health().stuck)
        steps = AtStep(number, come_back, inside=("join", "reacts", "_reacts_to_cancel"))
        threading.Timer(1.0, go.set).start() if number > 200 else None
        with traced(steps):
            pool.shutdown(timeout=0.06)
        go.set()
        if not steps.struck:
            break
        number += 1
    assert number > 3


@one_step_at_a_time
@pytest.mark.parametrize("way", ["cancel", "cancel_futures", "broken"])
def test_at_whatever_step_of_a_cancel_the_last_worker_leaves_the_end_is_in_the_record(
    way: str,
) -> None:
    number = 0
    while True:
        sink = MemorySink()
        go = threading.Event()
        pool = Scheduler(1, sinks=[sink])
        first = pool.submit(go.wait, LONG)
        until(first.running)
        waiting = [pool.submit(len, "") for _ in range(2)]
        [worker] = [each.thread for each in pool._pool._workers]
        dispatcher = pool._dispatcher

        def leave() -> None:
            go.set()
            worker.join(0.05)  # it may need what is held here
            if not worker.is_alive():
                dispatcher.closed.wait(0.05)

        steps = AtStep(
            number,
            leave,
            inside=(
                "cancel",
                "cancel_pending",
                "_cancel_quietly",
                "_end_before_begun",
                "_end",
                "_record_end",
                "_take_all",
                "_fail",
            ),
        )
        with traced(steps):
            if way == "cancel":
                pool.shutdown(wait=False)
                for task in waiting:
                    task.cancel()
            elif way == "cancel_futures":
                pool.shutdown(wait=False, cancel_futures=True)
            else:
                pool.shutdown(wait=False)
                for task in waiting:
                    task._fail(ShutdownError("cannot run"))
        go.set()
        assert joined(pool)
        ends = ends_of(sink)
        for task in waiting:
            assert task.wait(LONG) and len(ends[task.id]) == 1, f"step {number}, in {steps.struck}"
            assert ends[task.id] == [{"cancelled": "TaskCancelled", "failed": "TaskFailed",
                                      "completed": "TaskCompleted"}[task.status.value]]
        if not steps.struck:
            break
        number += 1
    assert number > 5


def test_a_task_that_waits_for_another_near_the_recursion_limit_costs_neither_its_end() -> None:
    with Scheduler(1) as pool:
        def deep(left: int) -> str:
            if left:
                return deep(left - 1)
            inner.append(pool.submit(len, "abc"))
            inner[-1].result()
            return "waited"

        def outer(depth: int) -> str:
            try:
                return deep(depth)
            except RecursionError:
                return "no room"

        seen = set()
        for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit(), 2):
            inner: list[Task[int]] = []
            seen.add(pool.submit(outer, depth).result(LONG))
            for task in inner:
                assert task.wait(LONG), f"depth {depth}"
        assert seen == {"waited", "no room"}


# -- threads that die without a word --


@pytest.mark.parametrize("deaths", [1, 2, 1000])
def test_threads_that_die_before_their_first_task_are_replaced_or_what_waits_fails(
    deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bgworker.running.task, "LOOK_AGAIN", 0.05)
    left = [deaths]
    run = threading.Thread.run

    def die(thread: threading.Thread) -> None:
        if thread.name.startswith("mortal_") and left[0] > 0:
            left[0] -= 1  # as where there is no memory for the first frame
        else:
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", die)
    pool = Scheduler(1, name="mortal")
    task = pool.submit(len, "abc")
    if deaths < 3:
        assert task.result() == 3
    else:
        assert isinstance(
            task.exception(), ShutdownError
        ) and "died before their first task" in str(task.exception())
    waiting = pool.submit(len, "abc")
    assert joined(pool) and waiting.done()


def test_a_callback_of_a_task_that_runs_inside_another_does_not_raise_in_that(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def leave(task: object) -> None:
        raise SystemExit("from a callback")

    with Scheduler(1) as pool:
        def outer() -> int:
            inner = pool.submit(len, "abc")
            inner.add_done_callback(leave)
            inner.add_done_callback(lambda each: told.set())
            return inner.result()

        told = threading.Event()
        assert pool.submit(outer).result(LONG) == 3 and told.wait(LONG)


def test_a_callback_on_a_thread_of_the_pool_may_shut_it_down() -> None:
    for options in ({}, {"timeout": 0.05}):
        ended = threading.Event()
        go = threading.Event()
        pool = Scheduler(1, max_stuck=0)
        task = pool.options(**options).submit(go.wait, LONG)  # type: ignore[arg-type]
        task.add_done_callback(lambda each: (pool.shutdown(), ended.set()))
        if options:
            assert isinstance(task.exception(LONG), TaskTimedOut)
        else:
            go.set()
        assert ended.wait(LONG)
        go.set()
        assert joined(pool)


def test_a_thread_that_has_come_back_does_not_take_the_work_of_who_helps_in_its_place() -> None:
    """A helper is stuck, another gets its inbox; when the first comes back it is a worker like any
    other."""
    made = bgworker.running.pool.Worker(None, bgworker.running.pool.Worker(None))
    made.inbox = object()  # type: ignore[assignment]
    roster = bgworker.running.pool.Roster(1, 1)
    roster.retired.add(made)
    roster.reinstate(made)
    assert made.inbox is None and made.helps is None and roster.workers == {made}


def test_a_new_thread_begins_with_a_task_even_if_a_shutdown_that_cancels_follows_at_once() -> None:
    gate = threading.Event()
    ran = 0
    for _ in range(10):
        pool = Scheduler(2)
        tasks = [pool.submit(gate.wait, 0.001) for _ in range(20)]
        pool.shutdown(cancel_futures=True)
        ran += sum(not task.cancelled() for task in tasks)
    assert ran >= 5, "as with ThreadPoolExecutor, those that found a free worker run"
