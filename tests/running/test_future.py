"""A task behaves under `concurrent.futures` as any future does, although it makes nothing before
somebody waits."""

from __future__ import annotations

import concurrent.futures
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bgworker
from bgworker import Scheduler, Task, TaskStatus
from tests.support import joined, started, until

LONG = 30.0
"""Seconds after which a wait that ought to succeed has failed."""


def running(pool: Scheduler) -> tuple[Task[Any], threading.Event]:
    """Return a task that runs until the event is set."""
    entered, gate = threading.Event(), threading.Event()
    task = pool.submit(lambda: (entered.set(), gate.wait(LONG)))
    assert entered.wait(LONG), "the task did not start"
    return task, gate


class TellsTwice(Task[Any]):
    """What a future must not do: write the state first, without the lock, and look for waiters
    second."""

    has_shown: threading.Event
    go_on: threading.Event

    def _resolve(self, final_state: str) -> None:
        self._state = final_state
        self.has_shown.set()
        assert self.go_on.wait(LONG)
        super()._resolve(final_state)


def test_a_task_that_shows_its_state_without_the_lock_makes_the_wait_for_all_return_too_early(
        pool: Scheduler) -> None:
    other, let_other_go = running(pool)
    task: Any
    task, let_go = running(pool)
    task.has_shown, task.go_on = threading.Event(), threading.Event()
    task.__class__ = TellsTwice
    let_go.set()
    assert task.has_shown.wait(LONG)
    found: list[Any] = []
    waiter = started(lambda: found.append(concurrent.futures.wait([task, other], timeout=LONG)))
    until(lambda: other._waiters)
    task.go_on.set()
    joined(waiter)
    assert found[0].not_done == {other}, "the harness does not see what it is there to see"
    let_other_go.set()


def test_a_wait_that_ran_out_leaves_no_waiter_behind(pool: Scheduler) -> None:
    task, gate = running(pool)
    for _ in range(3):
        with pytest.raises(concurrent.futures.TimeoutError):
            task.result(0.001)
        assert not task.wait(0)
    assert concurrent.futures.wait([task], timeout=0.001).not_done == {task}
    assert not task._waiters and not task._sleepers
    gate.set()


def test_whoever_waits_is_told_as_well_when_a_stranger_sets_the_result(pool: Scheduler) -> None:
    task, gate = running(pool)
    found: list[object] = []
    waiter = started(lambda: found.append(task.result(LONG)))
    until(lambda: task._sleepers)
    concurrent.futures.Future.set_result(task, "a stranger's")
    joined(waiter)
    assert found == ["a stranger's"]
    gate.set()


def test_two_that_wait_for_ended_and_running_tasks_in_any_order_do_not_block_one_another(
        pool: Scheduler) -> None:
    other = concurrent.futures.Future[None]()
    ended = [pool.submit(int) for _ in range(200)]
    assert not concurrent.futures.wait(ended, timeout=LONG).not_done
    unended = [running(pool) for _ in range(3)]
    everything = [*ended, other, *(task for task, _ in unended)]

    def wait_often() -> None:
        for _ in range(50):
            assert concurrent.futures.wait(everything, timeout=0).not_done

    joined(*[started(wait_often) for _ in range(8)])
    for _, gate in unended:
        gate.set()


def test_where_futures_have_further_attributes_tasks_have_them_too() -> None:
    script = """
import concurrent.futures, threading
before = concurrent.futures.Future.__init__
def init(self):
    before(self)
    self._new = "attribute"
concurrent.futures.Future.__init__ = init
import bgworker
with bgworker.Scheduler(2) as pool:
    gate = threading.Event()
    tasks = [pool.submit(gate.wait, 30) for _ in range(20)]
    called = []
    tasks[0].add_done_callback(called.append)
    gate.set()
    assert {task.result(30) for task in tasks} == {True}
    assert len(list(concurrent.futures.as_completed(tasks, 30))) == 20
    assert not concurrent.futures.wait(tasks, 30).not_done
    assert {task._new for task in tasks} == {"attribute"} and called == tasks[:1]
"""
    root = str(Path(bgworker.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=root, check=True, timeout=2 * LONG
    )


def test_a_waiter_that_holds_the_lock_does_not_see_the_task_end_under_its_hands(
    pool: Scheduler,
) -> None:
    task, gate = running(pool)
    with task._condition:
        gate.set()
        until(lambda: task.status is TaskStatus.COMPLETED)
        time.sleep(0.02)
        assert not task.done()
    assert task.wait(LONG) and task.done()


def test_no_waiter_and_no_callback_is_lost_however_they_race_with_the_end(
    pool: Scheduler, hasty_switching: None
) -> None:
    rounds, problems = 150, []
    for number in range(rounds):
        start = threading.Barrier(7)
        called: list[object] = []
        task: Task[int] = pool.submit(lambda: (start.wait(LONG), number)[1])
        other = pool.submit(start.wait, LONG)

        def check(ask: Callable[[], object]) -> None:
            start.wait(LONG)
            if not ask():
                problems.append(number)

        threads = [started(lambda ask=ask: check(ask)) for ask in (  # type: ignore[misc]
            lambda: task.result(LONG) == number,
            lambda: task.wait(LONG),
            lambda: concurrent.futures.wait([task, other], timeout=LONG).not_done == set(),
            lambda: len(list(concurrent.futures.as_completed([task, other], timeout=LONG))) == 2,
            lambda: [task.add_done_callback(called.append) for _ in range(5)])]
        joined(*threads)
        until(lambda: len(called) == 5)
    assert not problems


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before 3.11 every instance has a dict")
@pytest.mark.parametrize("options", [{}, {"record_result": True, "metadata": {"a": 1}}])
def test_a_task_of_a_burst_keeps_its_attributes_in_place(options: Any) -> None:
    with Scheduler(1) as pool:
        blocker, gate = running(pool)
        tasks = [pool.options(**options).submit(int) for _ in range(100)]
        gate.set()
        assert tasks[-1].result(LONG) == 0 and blocker.done()
        for owner in (tasks[50], tasks[50]._task_state):
            assert not any(
                type(held) is dict for held in gc.get_referents(owner)
            ), "it has a dict of its own"
