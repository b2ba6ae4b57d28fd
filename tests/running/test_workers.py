"""Who is in a pool: pure bookkeeping, without a thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from bgworker.running.workers import Roster, Worker


class FakeTask:
    """Stands for a task: something with an identity."""

    id = name = "fake"

    def running(self) -> bool:
        return True


def worker(*running: Any, helps: Worker | None = None) -> Worker:
    made = Worker(None, helps)
    made.thread = threading.Thread(name="never-started")
    made.running += running
    return made


def roster(workers: int, retired: int, max_workers: int = 2, max_stuck: int | None = 3) -> Roster:
    made = Roster(max_workers, max_stuck)
    made.workers.update(worker() for _ in range(workers))
    for _ in range(retired):
        made.retire(worker(FakeTask()))
    return made


@pytest.mark.parametrize(
    "workers, retired, is_full, may_have_helpers",
    [
        (0, 0, False, True),
        (2, 0, False, True),
        (2, 2, False, True),
        (1, 3, False, True),
        (2, 3, True, True),
        (1, 4, True, False),
        (0, 4, False, False),
        (0, 5, True, False),
    ],
)
def test_there_may_be_max_stuck_threads_beyond_the_workers(
    workers: int, retired: int, is_full: bool, may_have_helpers: bool
) -> None:
    made = roster(workers, retired)
    assert (made.is_full, made.may_have_helpers) == (is_full, may_have_helpers)


def test_without_a_bound_there_is_always_room() -> None:
    made = roster(2, 1000, max_stuck=None)
    assert not made.is_full and made.may_have_helpers


def test_the_runner_of_a_task_is_who_began_it_not_who_found_it_in_the_queue_later() -> None:
    made, outer = roster(0, 0), FakeTask()
    task: Any = FakeTask()
    finder, runner = worker(task), worker(outer, task)
    finder.thread._ident, runner.thread._ident = 1, 2  # type: ignore[attr-defined]
    made.workers.update([finder, worker(), runner])
    assert made.runner_of(task, 2) is runner and made.runner_of(task, 3) is None
    runner.running.pop()
    assert made.runner_of(task, 2) is None, "it has come back"
    runner.running.append(task)
    made.retire(runner)
    assert made.runner_of(task, 2) is None, "it was given up before"
    assert made.host_of(task, 2) is runner, "it still runs there"


def test_a_thread_is_in_one_group_at_a_time() -> None:
    made, one = roster(0, 0), worker()
    made.workers.add(one)
    made.leave(one)
    assert made.active() == (one,) and not made.workers and made.knows(one)
    made.retire(one)
    assert made.active() == () and made.retired == {one} and made.knows(one)
    made.reinstate(one)
    assert made.active() == (one,) and made.workers == {one} and not made.retired
    made.forget(one)
    assert made.active() == () and not made.knows(one)


def test_a_stuck_thread_that_has_just_come_back_is_not_told_of() -> None:
    made = roster(1, 2)
    back = next(iter(made.retired))
    assert len(made.health(0, 0).stuck) == 2
    back.running.clear()
    health = made.health(7, 9)
    assert len(health.stuck) == 1 and (health.pending, health.late_events, health.idle) == (7, 9, 1)
