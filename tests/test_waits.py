"""Tasks that wait for tasks of their own pool."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from bgworker import PoolDeadlock, Scheduler, TaskTimedOut, current_task
from bgworker.events import LifecycleEvent
from bgworker.waits import MOST_NESTED

LONG = 60.0


class Events:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def write(self, events: Any) -> None:
        self.got += events

    def close(self) -> None:
        pass


def test_a_recursive_fan_out_completes_on_two_workers() -> None:
    events = Events()
    with Scheduler(2, sinks=[events], keep_finished=None) as pool:
        def count(depth: int) -> int:
            if depth == 0:
                return 1
            return 1 + sum(each.result() for each in [pool.submit(count, depth - 1) for _ in range(3)])

        assert pool.submit(count, 6).result(LONG) == sum(3 ** level for level in range(7))
        tasks = {each.task_id for each in pool.tasks()}
    by_task: dict[str, list[str]] = {}
    for each in events.got:
        by_task.setdefault(each.task_id, []).append(each.type.value)
    assert set(by_task) == tasks and len(tasks) == 1093
    assert all(types == ["TaskCreated", "TaskScheduled", "TaskStarted", "TaskCompleted"] for types in by_task.values())


def test_without_running_them_inline_the_same_fan_out_would_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scheduler(1) as pool:
        monkeypatch.setattr(pool._pool.waits, "begin", lambda task: False)
        asked = threading.Event()

        def outer() -> Any:
            inner = pool.submit(len, "x")
            asked.set()
            return inner.exception() or inner.result()

        outer_task = pool.submit(outer)
        assert asked.wait(LONG)
        assert not outer_task.wait(0.3), "it waits for a task that has no worker"
        assert len(pool.tasks(status="scheduled")) == 1
        [inner] = pool.tasks(status="scheduled")
        queued = pool._pool._queue.get(timeout=LONG)
        assert queued is not None and queued.id == inner.task_id and queued.run()  # somebody has to
        assert outer_task.result(LONG) == 1


def test_an_inline_task_has_its_own_context_events_and_name() -> None:
    events = Events()
    with Scheduler(1, sinks=[events]) as pool:
        def inner() -> str:
            current_task().output("from inside")
            return current_task().name

        def outer() -> tuple[str, str]:
            name = pool.options(name="inner").submit(inner).result()
            current_task().output("from outside")
            return name, current_task().name

        assert pool.options(name="outer").submit(outer).result(LONG) == ("inner", "outer")
    names = {each.task_id: each.task.name for each in events.got if isinstance(each, LifecycleEvent)}
    said = {names[each.task_id]: each.payload for each in events.got if not isinstance(each, LifecycleEvent)}
    assert said == {"inner": "from inside", "outer": "from outside"}


def test_an_inline_task_that_runs_out_of_time_is_timed_out_and_the_pool_goes_on() -> None:
    go_on = threading.Event()
    with Scheduler(1) as pool:
        def outer() -> None:
            pool.options(timeout=0.1).submit(go_on.wait, LONG).result()

        task = pool.submit(outer)
        try:
            assert pool.submit(len, "xy").result(LONG) == 2, "the worker was replaced"
        finally:
            go_on.set()
        with pytest.raises(TaskTimedOut):
            task.result(LONG)


def test_a_task_that_waits_for_itself_gets_an_error() -> None:
    with Scheduler(2) as pool:
        started, box = threading.Event(), []

        def narcissus() -> None:
            assert started.wait(LONG)
            assert box[0].wait() is False, "wait never raises"
            box[0].result()

        box.append(pool.submit(narcissus))
        started.set()
        with pytest.raises(PoolDeadlock, match="waits for task '.*narcissus', which waits for it"):
            box[0].result(LONG)


def test_two_tasks_that_wait_for_each_other_get_an_error_instead_of_hanging() -> None:
    with Scheduler(2) as pool:
        both, box = threading.Barrier(2), {}
        there = threading.Event()

        def wait_for(other: str) -> None:
            both.wait(LONG)
            assert there.wait(LONG)
            box[other].result()

        box["a"], box["b"] = pool.submit(wait_for, "b"), pool.submit(wait_for, "a")
        there.set()
        errors = [box[name].exception(LONG) for name in "ab"]
        assert all(isinstance(each, PoolDeadlock) for each in errors), "the second fails because the first did"


def test_the_depth_of_inline_runs_is_bounded_with_a_clear_error() -> None:
    with Scheduler(1) as pool:
        def deeper(depth: int) -> int:
            return 1 + pool.submit(deeper, depth + 1).result()

        with pytest.raises(PoolDeadlock, match=f"{MOST_NESTED} waits deep"):
            pool.submit(deeper, 1).result(LONG)


def test_a_wait_with_a_timeout_runs_nothing_inline() -> None:
    with Scheduler(1) as pool:
        def outer() -> str:
            inner = pool.submit(len, "x")
            try:
                inner.result(0.05)
            except Exception as error:
                return f"{type(error).__name__} {inner.status}"
            return "it ran"

        assert pool.submit(outer).result(LONG) == "TimeoutError scheduled"


def test_tasks_of_another_pool_are_just_waited_for() -> None:
    with Scheduler(1) as one, Scheduler(1) as two:
        def outer() -> str:
            return two.submit(lambda: threading.current_thread().name).result()

        assert one.submit(outer).result(LONG) != ""
        assert one.submit(lambda: two.submit(lambda: 5).result()).result(LONG) == 5


def test_inline_runs_leave_the_count_of_waiting_tasks_right() -> None:
    with Scheduler(1, max_pending=2) as pool:
        def outer() -> int:
            return sum(pool.submit(len, "xx").result() for _ in range(20))

        assert pool.submit(outer).result(LONG) == 40
        assert pool.submit(outer).result(LONG) == 40
