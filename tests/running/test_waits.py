"""Tasks that wait for tasks of their own pool."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

import pytest

from bgworker import PoolDeadlock, Scheduler, ShutdownError, Task, TaskTimedOut, current_task
from bgworker.model.events import LifecycleEvent
from bgworker.running.waits import MOST_NESTED
from bgworker.running.workers import Roster, Worker

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
            return 1 + sum(
                each.result() for each in [pool.submit(count, depth - 1) for _ in range(3)]
            )

        assert pool.submit(count, 6).result(LONG) == sum(3 ** level for level in range(7))
        tasks = {each.task_id for each in pool.tasks()}
    by_task: dict[str, list[str]] = {}
    for each in events.got:
        by_task.setdefault(each.task_id, []).append(each.type.value)
    assert set(by_task) == tasks and len(tasks) == 1093
    assert all(
        types == ["TaskCreated", "TaskScheduled", "TaskStarted", "TaskCompleted"]
        for types in by_task.values()
    )


def test_a_shutdown_inside_a_task_does_not_wait_for_those_that_wait_for_that_task() -> None:
    pool = Scheduler(4)
    begun, awaited = threading.Event(), threading.Event()

    def shuts_down() -> str:
        begun.set()
        assert awaited.wait(LONG)
        pool.shutdown()
        return "shut down"

    inner = pool.submit(shuts_down)
    assert begun.wait(LONG)
    middle = pool.submit(lambda: inner.result())
    outer = pool.submit(lambda: middle.result())
    deadline = time.monotonic() + LONG
    while sum(len(each.waits_for) for each in pool._pool._workers) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    awaited.set()
    assert outer.result(LONG) == middle.result(LONG) == inner.result(LONG) == "shut down"
    pool.shutdown()


@pytest.mark.parametrize(
    "wait_for",
    [lambda task: wait([task]),
     lambda task: list(concurrent.futures.as_completed([task])),
     lambda task: wait([task], return_when=FIRST_COMPLETED)],
    ids=["wait", "as_completed", "first"],
)
def test_nor_for_those_that_wait_for_that_task_and_for_others_at_once(
    wait_for: Callable[[Any], object],
) -> None:
    pool = Scheduler(4)
    awaited = threading.Event()

    def shuts_down() -> str:
        assert awaited.wait(LONG)
        pool.shutdown()
        return "shut down"

    def waits() -> str:
        wait_for(inner)
        return inner.result(0)

    inner = pool.submit(shuts_down)
    outer = pool.submit(waits)
    deadline = time.monotonic() + LONG
    while not inner._told:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    awaited.set()
    assert outer.result(LONG) == "shut down"
    pool.shutdown()


def test_nor_for_a_coroutine_that_awaits_what_awaits_that_task() -> None:
    pool = Scheduler(4)
    awaited = threading.Event()

    def shuts_down() -> str:
        assert awaited.wait(LONG)
        pool.shutdown()
        return "shut down"

    async def waits() -> str:
        async def step() -> str:
            future = asyncio.wrap_future(inner)
            awaited.set()
            return await future

        return await asyncio.create_task(step())

    inner = pool.submit(shuts_down)
    outer = pool.submit(waits)
    assert outer.result(LONG) == "shut down"
    pool.shutdown()


def test_a_shutdown_inside_a_task_waits_for_one_that_has_ceased_to_wait_for_that_task() -> None:
    pool = Scheduler(4)
    tired, go_on = threading.Event(), threading.Event()

    def shuts_down() -> bool:
        assert tired.wait(LONG)
        threading.Timer(0.2, go_on.set).start()
        pool.shutdown()
        return outer.done()

    def waits() -> None:
        wait([inner], timeout=0.01)
        tired.set()
        assert go_on.wait(LONG)

    inner = pool.submit(shuts_down)
    outer = pool.submit(waits)
    assert inner.result(LONG)
    pool.shutdown()


def test_without_running_them_inline_the_same_fan_out_would_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        assert (
            queued is not None and queued.id == inner.task_id and queued._run()
        )  # somebody has to
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
    names = {
        each.task_id: each.task.name for each in events.got if isinstance(each, LifecycleEvent)
    }
    said = {
        names[each.task_id]: each.payload
        for each in events.got
        if not isinstance(each, LifecycleEvent)
    }
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
        assert all(
            isinstance(each, PoolDeadlock) for each in errors
        ), "the second fails because the first did"


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


# -- waits for several at once, and those of event loops: a helper runs what waits --


def as_completed(pool: Scheduler, depth: int) -> int:
    tasks = [pool.submit(as_completed, pool, depth - 1) for _ in range(3 if depth else 0)]
    return 1 + sum(each.result() for each in concurrent.futures.as_completed(tasks))


def wait_for_all(pool: Scheduler, depth: int) -> int:
    tasks = [pool.submit(wait_for_all, pool, depth - 1) for _ in range(3 if depth else 0)]
    return 1 + sum(each.result(0) for each in concurrent.futures.wait(tasks).done)


async def awaiting(pool: Scheduler, depth: int) -> int:
    tasks = [pool.submit(awaiting, pool, depth - 1) for _ in range(3 if depth else 0)]
    return 1 + sum(await asyncio.gather(*map(asyncio.wrap_future, tasks)))


async def in_executor(pool: Scheduler, depth: int) -> int:
    def run_another_loop() -> int:
        return asyncio.run(in_executor(pool, depth - 1))

    loop = asyncio.get_running_loop()
    return 1 + sum(
        [await loop.run_in_executor(pool, run_another_loop) for _ in range(2 if depth else 0)]
    )


async def blocking_the_loop(pool: Scheduler, depth: int) -> int:
    tasks = [pool.submit(blocking_the_loop, pool, depth - 1) for _ in range(2 if depth else 0)]
    return 1 + sum(each.result() for each in tasks)


async def blocking_for_a_loop(pool: Scheduler, depth: int) -> int:
    def run_another_loop() -> int:
        return asyncio.run(blocking_for_a_loop(pool, depth - 1))

    return 1 + sum(
        each.result() for each in [pool.submit(run_another_loop) for _ in range(2 if depth else 0)]
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("function, depth, expected", [
    (as_completed, 6, 1093), (wait_for_all, 6, 1093), (awaiting, 6, 1093), (in_executor, 4, 31),
    (blocking_the_loop, 4, 31), (blocking_for_a_loop, 4, 31)])
def test_a_fan_out_completes_however_the_tasks_wait(
    function: Callable[..., Any], depth: int, expected: int, workers: int
) -> None:
    with Scheduler(workers, keep_finished=None) as pool:
        assert pool.submit(function, pool, depth).result(LONG) == expected
        assert {each.status.value for each in pool.tasks()} == {"completed"}
        health = pool.health()
        assert (health.running, health.pending, health.workers) == (0, 0, health.workers)


@pytest.mark.parametrize("function", [as_completed, wait_for_all, awaiting])
def test_without_helpers_the_same_would_hang(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(1) as pool:
        asked = threading.Event()
        monkeypatch.setattr(pool._pool.waits, "_lend", lambda worker, task: asked.set())
        outer = pool.submit(function, pool, 1)
        assert asked.wait(LONG) and not outer.wait(0.3), "it waits for tasks that have no worker"
        pool.resize(2)  # somebody has to run them
        assert outer.result(LONG) == 4


def test_a_helper_is_initialized_serves_its_worker_as_long_as_its_task_runs_and_ends() -> None:
    local, seen = threading.local(), []

    def initializer() -> None:
        local.is_ready = True
        seen.append(threading.current_thread())

    async def outer(count: int) -> set[str]:
        loop = asyncio.get_running_loop()
        return {await loop.run_in_executor(pool, inner) for _ in range(count)}

    def inner() -> str:
        assert local.is_ready
        return threading.current_thread().name

    with Scheduler(1, initializer=initializer) as pool:
        assert (
            len(pool.submit(outer, 50).result(LONG)) == 1 and len(seen) == 2
        ), "one helper did it all"
        seen[1].join(LONG)
        assert not seen[1].is_alive() and seen[0].is_alive()
        assert len(pool.submit(outer, 2).result(LONG)) == 1 and len(seen) == 3


def test_while_a_worker_is_idle_no_helper_is_started() -> None:
    with Scheduler(3) as pool:
        both = threading.Barrier(3)
        for task in [pool.submit(both.wait, LONG) for _ in range(3)]:
            task.result(LONG)

        # else the last may take what was promised to one that waits, which is then counted no more
        deadline = time.monotonic() + LONG
        while pool._pool.idle < 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)

        async def outer() -> str:
            return await asyncio.get_running_loop().run_in_executor(
                pool, lambda: threading.current_thread().name
            )

        assert pool.submit(outer).result(LONG) in {"bgworker_0", "bgworker_1", "bgworker_2"}
        assert pool._pool._started == 3


def test_a_callback_that_is_no_wait_lets_nothing_run_beside_a_plain_task() -> None:
    """One worker is often meant as a lock."""
    told: list[Any] = []
    with Scheduler(1) as pool:
        def outer() -> str:
            inner = pool.submit(len, "x")
            inner.add_done_callback(told.append)
            time.sleep(0.1)
            return inner.status.value

        assert pool.submit(outer).result(LONG) == "scheduled"
        pool.submit(len, "").result(LONG)
        assert len(told) == 1


def test_a_task_run_by_a_helper_that_never_looks_is_timed_out_and_the_helper_replaced() -> None:
    go_on = threading.Event()

    async def outer() -> list[Any]:
        slow = pool.options(timeout=0.1, name="slow").submit(go_on.wait, LONG)
        quick = pool.submit(len, "four")
        return await asyncio.gather(
            asyncio.wrap_future(slow), asyncio.wrap_future(quick), return_exceptions=True
        )

    with Scheduler(1) as pool:
        try:
            first, second = pool.submit(outer).result(LONG)
            assert isinstance(first, TaskTimedOut) and second == 4
            assert [each.task_name for each in pool.health().stuck] == [
                "slow"
            ] and pool.health().replaced == 1
            assert pool.submit(len, "ab").result(LONG) == 2
        finally:
            go_on.set()


def test_where_no_thread_can_be_had_a_loop_runs_the_task_itself_and_a_wait_for_several_is_refused(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise ShutdownError("no thread can be started")

    async def outer() -> str:
        return await asyncio.get_running_loop().run_in_executor(
            pool, lambda: threading.current_thread().name
        )

    with Scheduler(1) as pool:
        pool.submit(len, "").result(LONG)
        monkeypatch.setattr(pool._pool, "_start_helper", refuse)
        assert pool.submit(outer).result(LONG) == "bgworker_0"
        with pytest.raises(
            PoolDeadlock, match="which has no thread to run on: no thread can be started"
        ):
            pool.submit(as_completed, pool, 1).result(LONG)
        with pytest.raises(PoolDeadlock, match="no thread can be started to run that"):
            pool.submit(blocking_the_loop, pool, 1).result(LONG)


def test_a_coroutine_that_awaits_itself_gets_an_error() -> None:
    box: list[Task[Any]] = []
    there = threading.Event()

    async def narcissus() -> None:
        assert there.wait(LONG)
        await asyncio.wrap_future(box[0])

    def waits_for_itself() -> None:
        assert there.wait(LONG)
        concurrent.futures.wait(box)

    with Scheduler(1) as pool:
        for function in (narcissus, waits_for_itself):
            there.clear()
            box[:] = [pool.submit(function)]  # type: ignore[arg-type]
            there.set()
            assert isinstance(box[0].exception(LONG), PoolDeadlock)


def test_coroutines_and_functions_that_wait_for_each_other_get_an_error_instead_of_hanging() -> (
    None
):
    box: dict[str, Task[Any]] = {}

    async def awaits(name: str, both: threading.Barrier) -> None:
        await asyncio.to_thread(both.wait, LONG)
        await asyncio.gather(asyncio.wrap_future(box[name]))

    def waits(name: str, both: threading.Barrier) -> None:
        both.wait(LONG)
        box[name].result()

    with Scheduler(2) as pool:
        for one, other in [(awaits, awaits), (awaits, waits), (waits, awaits)]:
            both = threading.Barrier(3)
            box["a"] = pool.submit(one, "b", both)  # type: ignore[arg-type]
            box["b"] = pool.submit(other, "a", both)  # type: ignore[arg-type]
            both.wait(LONG)
            errors = [box[name].exception(LONG) for name in "ab"]
            assert all(isinstance(each, PoolDeadlock) for each in errors), errors


def test_a_coroutine_that_only_watches_another_does_not_wait_for_it() -> None:
    box: dict[str, Task[Any]] = {}
    both = threading.Barrier(3)

    async def watches() -> str:
        await asyncio.to_thread(both.wait, LONG)
        watcher = asyncio.create_task(watch())
        await asyncio.sleep(0.05)
        watcher.cancel()
        return "did not wait"

    async def watch() -> None:
        await asyncio.wrap_future(box["b"])

    async def awaits() -> Any:
        await asyncio.to_thread(both.wait, LONG)
        await asyncio.sleep(0.02)
        return await asyncio.shield(asyncio.wrap_future(box["a"]))

    with Scheduler(2) as pool:
        box["a"], box["b"] = pool.submit(watches), pool.submit(awaits)
        both.wait(LONG)
        assert box["a"].result(LONG) == "did not wait"


def test_the_depth_of_helpers_is_bounded_with_a_clear_error() -> None:
    async def deeper(depth: int) -> int:
        return 1 + await asyncio.wrap_future(pool.submit(deeper, depth + 1))

    with Scheduler(1) as pool:
        with pytest.raises(PoolDeadlock, match=f"{MOST_NESTED} waits deep"):
            pool.submit(deeper, 1).result(LONG)
        assert pool.submit(len, "ab").result(LONG) == 2


def test_a_task_run_by_a_helper_may_shut_the_scheduler_down() -> None:
    ended = threading.Event()

    def inner() -> None:
        pool.shutdown()
        ended.set()

    async def outer() -> None:
        await asyncio.wrap_future(pool.submit(inner))

    pool = Scheduler(1)
    pool.submit(outer).result(LONG)
    assert ended.is_set()
    pool.shutdown()


def test_what_a_coroutine_awaited_is_not_kept_by_its_worker() -> None:
    seen: list[int] = []

    async def outer() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(100):
            await loop.run_in_executor(pool, len, "x")
        [worker] = pool._pool._workers
        while worker.waits_for:  # the callback that forgets the last one may still be on its way
            await asyncio.sleep(0.001)
        seen.append(len(worker.waits_for))

    with Scheduler(1) as pool:
        pool.submit(outer).result(LONG)
    assert seen == [0]


def test_a_coroutine_that_ends_before_it_waits_leaves_no_helper_behind() -> None:
    gate, box = threading.Event(), []

    async def outer() -> None:
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:  # what it asks for comes up only when its loop is closed
            asyncio.get_running_loop().call_soon(lambda: box.append(asyncio.wrap_future(waiting)))

    with Scheduler(1) as pool:
        timed_out = pool.options(timeout=0.1).submit(outer)
        busy, waiting = pool.submit(gate.wait, LONG), pool.submit(len, "x")
        try:
            assert isinstance(timed_out.exception(LONG), TaskTimedOut)
            deadline = time.monotonic() + LONG
            while pool.health().stuck or not box:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            [worker] = [each.thread for each in pool._pool._workers]
            for thread in threading.enumerate():
                if thread.name.startswith("bgworker_") and thread is not worker:
                    thread.join(5.0)
                    assert not thread.is_alive(), "nobody lets the helper go"
            assert not waiting.done()
        finally:
            gate.set()
            for each in pool._pool._roster.helpers:
                each.inbox.put(None)  # type: ignore[union-attr]
        assert busy.result(LONG) and waiting.result(LONG) == 1


def test_a_helper_that_is_retired_as_its_late_task_ends_takes_no_sign_from_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host_of, found = Roster.host_of, []

    def remembered(roster: Roster, task: Any, thread: int) -> Worker | None:
        found.append(host_of(roster, task, thread))
        return found[-1]

    def just_before(roster: Roster, task: Any, thread: int) -> Worker | None:
        """Answer as if asked a moment before the thread left its task, and then let it go on to
        where it waits."""
        (worker,) = found
        while worker.running:
            time.sleep(0.001)
        time.sleep(0.1)
        return worker

    monkeypatch.setattr(Roster, "host_of", remembered)
    monkeypatch.setattr(Roster, "runner_of", just_before)
    pool = Scheduler(1)
    can_end = threading.Event()

    def waits() -> None:
        wait([pool.options(timeout=0.05).submit(lambda: current_task().sleep(LONG))])
        can_end.wait(LONG)

    task = pool.submit(waits)
    while pool.health().replaced == 0:
        time.sleep(0.01)
    can_end.set()
    task.result(LONG)
    pool.shutdown(timeout=10)
    assert not pool._pool._roster.everybody(), "a helper waits for a sign that another has taken"
