"""The pool's own promises: few threads, none lost, no task lost with them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bgworker import Scheduler, ShutdownError, TaskTimedOut

LONG = 30.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


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
            until(lambda: pool._pool._idle == workers_of(pool))
        assert workers_of(pool) == 1


def test_workers_are_started_as_tasks_need_them_and_never_more_than_allowed() -> None:
    with Scheduler(3) as pool:
        barrier = threading.Barrier(3)
        tasks = [pool.submit(barrier.wait, LONG) for _ in range(9)]
        assert sorted(each.result(LONG) for each in tasks) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and workers_of(pool) == 3


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
        threads = [threading.Thread(target=lambda: [pool.submit(ran.append, 1) for _ in range(500)]) for _ in range(4)]
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


def test_submit_is_refused_when_no_first_thread_can_be_started_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scheduler(2) as pool:
        pool._dispatcher.start()
        with no_threads(monkeypatch):
            for options in ({}, {"timeout": 5.0}):
                with pytest.raises(ShutdownError, match="no thread can be started"):
                    pool.options(**options).submit(len, "")  # type: ignore[arg-type]
        assert pool.tasks() == [] and workers_of(pool) == 0
        assert pool.submit(len, "abc").result(LONG) == 3


def test_without_threads_the_workers_that_are_there_do_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_waits_is_cancelled_when_the_last_worker_is_stuck_in_a_closed_pool_and_cannot_be_replaced(
        monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_pool_whose_initializer_fails_fails_all_that_waits_and_takes_no_more(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Exception):
        def __repr__(self) -> str:
            raise ValueError("not even this")

    def initializer() -> None:
        raise Odd("no database")

    with Scheduler(2, initializer=initializer) as pool:
        tasks: list[Any] = []
        with pytest.raises(ShutdownError, match=r"initializer failed \(Odd: no database\)"):
            for _ in range(1_000_000):
                tasks.append(pool.submit(len, ""))
        assert tasks and all("Odd: no database" in str(each.exception(LONG)) for each in tasks)
    assert "exception in the pool's initializer" in caplog.text
