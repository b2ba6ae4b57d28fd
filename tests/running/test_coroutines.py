"""Coroutine functions as tasks: on a loop of their worker, cancelled for real, and with nothing
left behind."""

from __future__ import annotations

import asyncio
import collections.abc
import concurrent.futures
import contextvars
import functools
import gc
import logging
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import bgworker.running.coroutines
from bgworker import (
    Scheduler,
    Task,
    TaskCancelled,
    TaskStatus,
    TaskTimedOut,
    checkpoint,
    current_task,
)
from tests.free_threading import runs_on
from tests.support import ROOT, until
from bgworker.testing import MemorySink

LONG = 30.0
@pytest.fixture
def pool() -> Iterator[Scheduler]:
    with Scheduler(2) as scheduler:
        yield scheduler


class Waiting:
    """A coroutine function that waits until it is cancelled, and tells what happened to it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.left = threading.Event()
        self.seen: list[Any] = []

    async def __call__(self) -> None:
        try:
            self.entered.set()
            await asyncio.sleep(LONG)
        except asyncio.CancelledError as error:
            self.seen.append(error)
            raise
        finally:
            await asyncio.sleep(0)  # to clean up may take a while
            self.left.set()


def entered(task: Task[Any], waiting: Waiting) -> Task[Any]:
    assert waiting.entered.wait(LONG), "the coroutine did not start"
    return task


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


# -- what is taken for a coroutine function --


class Adder:
    async def __call__(self, a: int, b: int) -> int:
        return await add(a, b)

    async def method(self, a: int, b: int) -> int:
        return await add(a, b)

    @classmethod
    async def of_class(cls, a: int, b: int) -> int:
        return await add(a, b)

    @staticmethod
    async def static(a: int, b: int) -> int:
        return await add(a, b)


@functools.wraps(add)
def wrapping(*args: Any) -> Any:
    return add(*args)


@pytest.mark.parametrize(
    "function",
    [
        add,
        functools.partial(add),
        functools.partial(functools.partial(Adder().method)),
        Adder(),
        Adder().method,
        Adder.of_class,
        Adder.static,
        wrapping,
        lambda a, b: add(a, b),
    ],
)
def test_whatever_returns_a_coroutine_has_it_run_and_its_result_is_the_tasks(
    pool: Scheduler, function: Any
) -> None:
    assert (
        pool.submit(function, 1, b=2).result(LONG) == 3
        if function is not wrapping
        else pool.submit(function, 1, 2).result(LONG) == 3
    )


def test_map_and_options_take_coroutine_functions(pool: Scheduler) -> None:
    assert list(pool.map(add, range(5), range(5))) == [0, 2, 4, 6, 8]
    assert list(pool.options(timeout=LONG).map(add, range(3), range(3))) == [0, 2, 4]
    task = pool.options(name="sum", timeout=LONG).submit(add, 1, 2)
    assert (task.result(LONG), task.name, task.status) == (3, "sum", TaskStatus.COMPLETED)
    assert pool.submit(add, 1, 2).name == "add"


def test_what_is_no_coroutine_is_a_result_like_any_other(pool: Scheduler) -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    def generator() -> Iterator[int]:
        yield 1

    class Awaitable:
        def __await__(self) -> Iterator[Any]:
            return iter(())

    assert hasattr(pool.submit(numbers).result(LONG), "__anext__")
    assert list(pool.submit(generator).result(LONG)) == [1]
    assert isinstance(pool.submit(Awaitable).result(LONG), Awaitable)
    assert pool.submit(lambda: add).result(LONG) is add


# -- inside --


def test_a_coroutine_is_a_task_with_events_streams_progress_and_its_context_variables() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    sink = MemorySink()

    async def child() -> None:
        await asyncio.sleep(0)
        current_task().warning(variable.get())

    async def work() -> str:
        task = current_task()
        task.output(task.name)
        await asyncio.sleep(0)
        current_task().progress(50)
        await asyncio.gather(
            child(), asyncio.to_thread(lambda: current_task().verbose("from a thread"))
        )
        checkpoint()
        return task.id

    with Scheduler(1, sinks=[sink]) as pool:
        variable.set("as at submit")
        task = pool.options(name="work", timeout=LONG).submit(work)
        variable.set("changed")
        assert task.result(LONG) == task.id
    assert [each.type.value for each in sink.events[:3]] == [
        "TaskCreated",
        "TaskScheduled",
        "TaskStarted",
    ]
    said = [(each.type.value, getattr(each, "payload", "")) for each in sink.events[3:]]
    assert said[:2] == [("TaskOutput", "work"), ("TaskProgress", "")] and said[-1] == (
        "TaskCompleted",
        "",
    )
    assert sorted(said[2:-1]) == [("TaskVerbose", "from a thread"), ("TaskWarning", "as at submit")]


def test_what_it_prints_logs_and_warns_is_captured_and_that_of_its_own_asyncio_tasks_too(
        capsys: pytest.CaptureFixture[str]) -> None:
    async def child() -> None:
        print("child")
        await asyncio.sleep(0)

    async def work() -> None:
        print("one")
        await asyncio.create_task(child())
        logging.getLogger("somebody").error("logged")
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            warnings.warn("warned", stacklevel=1)

    with Scheduler(2) as pool:
        captured = pool.options(capture_output=True).submit(work)
        captured.result(LONG)
        plain = pool.submit(work)
        plain.result(LONG)
        payloads = [
            (str(each.stream_type), each.payload.rpartition(" ")[2]) for each in captured.streams()
        ]
        assert plain.streams() == []
    assert payloads == [
        ("output", "one"),
        ("output", "child"),
        ("error", "logged"),
        ("warning", "warned"),
    ]
    assert capsys.readouterr().out.split() == ["one", "child"] * 2


def test_what_it_raises_is_the_tasks_failure_with_a_traceback_that_begins_in_it(
    pool: Scheduler,
) -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise KeyError("missing")

    task = pool.submit(work)
    with pytest.raises(KeyError) as caught:
        task.result(LONG)
    assert task.exception(0) is caught.value
    told = task.snapshot().invocation_info or ""
    assert (
        told.count("File ") == 1
        and "in work" in told
        and task.snapshot().failure_type == "KeyError"
    )


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), TaskCancelled("enough")]
)
def test_an_exception_that_is_none_costs_neither_the_worker_nor_its_loop(
    error: BaseException,
) -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise error

    async def child() -> None:
        asyncio.create_task(work())
        await asyncio.sleep(LONG)

    with Scheduler(1) as pool:
        task = pool.submit(work)
        if isinstance(error, TaskCancelled):
            assert (
                task.wait(LONG) and task.cancelled() and task.snapshot().failure_message == "enough"
            )
        else:
            assert task.exception(LONG) is error
        assert pool.submit(add, 1, 2).result(LONG) == 3
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            # these end a loop, whichever of its tasks raises them
            assert pool.submit(child).exception(LONG) is error
            assert pool.submit(add, 1, 2).result(LONG) == 3
        assert pool.health().workers == 1


# -- to be stopped is to be cancelled --


def test_cancel_raises_cancelled_error_inside_at_once_and_lets_the_coroutine_clean_up(
    pool: Scheduler,
) -> None:
    waiting = Waiting()
    task = entered(pool.submit(waiting), waiting)
    assert task.cancel("no longer needed") is False, "it has started"
    with pytest.raises(concurrent.futures.CancelledError):
        task.result(LONG)
    assert waiting.left.is_set() and waiting.seen[0].args == ("no longer needed",)
    assert (
        task.status is TaskStatus.CANCELLED
        and task.snapshot().failure_message == "no longer needed"
    )


def test_a_timeout_raises_cancelled_error_inside_and_what_it_says_then_is_late() -> None:
    sink, cleaned = MemorySink(), threading.Event()
    box: list[Task[Any]] = []

    async def work() -> None:
        try:
            current_task().output("in time")
            await asyncio.sleep(LONG)
        finally:
            while not box[0].done():  # it is asked to stop a moment before its end is recorded
                await asyncio.sleep(0.001)
            current_task().output(f"late: {current_task().cancel_reason}")
            cleaned.set()

    with Scheduler(1, sinks=[sink]) as pool:
        task = pool.options(timeout=0.05).submit(work)
        box.append(task)
        assert isinstance(task.exception(LONG), TaskTimedOut)
        assert cleaned.wait(LONG)
        until(lambda: not pool.health().stuck)
        assert pool.submit(add, 1, 2).result(LONG) == 3
        health = pool.health()
        assert (health.replaced, health.late_events, health.workers) == (1, 1, 1)
    assert [each.payload for each in sink.events if hasattr(each, "payload")] == ["in time"]


def test_a_coroutine_that_swallows_its_cancellation_completes(pool: Scheduler) -> None:
    inside = threading.Event()

    async def work() -> str:
        try:
            inside.set()
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return "went on"
        return "was not cancelled"

    task = pool.submit(work)
    assert inside.wait(LONG)
    task.cancel()
    assert (
        task.result(LONG) == "went on"
        and task.status is TaskStatus.COMPLETED
        and task.cancel_requested
    )


class Swallowing:
    """Never ends before it is let go, whatever is asked of it."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.left = threading.Event()

    async def __call__(self) -> None:
        while not self.go.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass
        self.left.set()


def test_a_coroutine_that_swallows_its_timeout_is_like_a_thread_that_never_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bgworker.running.coroutines, "CLEAN_UP", 0.1)
    swallowing = Swallowing()
    with Scheduler(1) as pool:
        task = pool.options(timeout=0.05, name="greedy").submit(swallowing)
        assert isinstance(task.exception(LONG), TaskTimedOut)
        assert pool.submit(add, 1, 2).result(LONG) == 3, "the worker was replaced"
        assert [each.task_name for each in pool.health().stuck] == ["greedy"]
    assert not swallowing.left.is_set(), "the shutdown did not wait for it"
    swallowing.go.set()
    assert swallowing.left.wait(LONG)


def test_shutdown_waits_for_a_coroutine_that_cleans_up_after_its_timeout() -> None:
    cleaned = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            while not pool._pool.is_closed:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            cleaned.set()

    with Scheduler(1) as pool:
        task = pool.options(timeout=0.05).submit(work)
        assert isinstance(task.exception(LONG), TaskTimedOut) and not cleaned.is_set()
    assert cleaned.is_set()


def test_a_shutdown_that_runs_out_of_time_cancels_it() -> None:
    waiting = Waiting()
    pool = Scheduler(1)
    task = entered(pool.submit(waiting), waiting)
    pool.shutdown(timeout=0.5)
    assert waiting.left.is_set() and task.cancelled() and task.cancel_reason == "shutdown"


def test_a_cancel_while_it_computes_takes_effect_where_it_awaits_next_and_checkpoint_tells_before(
    pool: Scheduler,
) -> None:
    computing, go, seen = threading.Event(), threading.Event(), []

    async def work() -> None:
        computing.set()
        assert go.wait(LONG)
        try:
            checkpoint()
        except TaskCancelled as error:
            seen.append(error.reason)
        seen.append("before")
        await asyncio.sleep(0)
        seen.append("after")

    task = pool.submit(work)
    assert computing.wait(LONG)
    task.cancel("mid-way")
    go.set()
    assert task.wait(LONG) and task.cancelled() and seen == ["mid-way", "before"]


def test_a_coroutine_may_cancel_its_own_task_and_the_reason_is_kept(pool: Scheduler) -> None:
    box: list[Task[Any]] = []
    there = threading.Event()

    async def work() -> None:
        assert there.wait(LONG)
        box[0].cancel("myself")
        await asyncio.sleep(LONG)

    box.append(pool.submit(work))
    there.set()
    assert (
        box[0].wait(LONG) and box[0].cancelled() and box[0].snapshot().failure_message == "myself"
    )


def test_a_cancelled_error_of_its_own_cancels_the_task(pool: Scheduler) -> None:
    async def work() -> None:
        inner = asyncio.create_task(asyncio.sleep(LONG))
        await asyncio.sleep(0)
        inner.cancel()
        await inner

    task = pool.submit(work)
    assert task.wait(LONG) and task.cancelled() and not task.cancel_requested
    assert task.snapshot().failure_message == "task"


def test_asyncio_timeouts_inside_are_the_coroutines_own(pool: Scheduler) -> None:
    async def work() -> str:
        try:
            await asyncio.wait_for(asyncio.sleep(LONG), 0.02)
        except asyncio.TimeoutError:
            return "timed out inside"
        return "not at all"

    task = pool.options(timeout=LONG).submit(work)
    assert task.result(LONG) == "timed out inside" and task.status is TaskStatus.COMPLETED


def test_what_else_waits_in_a_coroutine_is_woken_too(pool: Scheduler) -> None:
    waiting, told = Waiting(), []

    async def work() -> None:
        with current_task()._woken_by(lambda: told.append("told")):
            await waiting()

    task = entered(pool.submit(work), waiting)
    task.cancel()
    assert task.wait(LONG) and task.cancelled() and waiting.left.is_set() and told == ["told"]


# -- from a loop outside --


def test_a_wrapped_task_that_is_cancelled_from_its_loop_stops_at_its_next_checkpoint(
    pool: Scheduler,
) -> None:
    running, stopped = threading.Event(), threading.Event()

    def work() -> None:
        running.set()
        try:
            while True:
                checkpoint()
                time.sleep(0.001)
        except TaskCancelled:
            stopped.set()
            raise

    task = pool.submit(work)

    async def main() -> None:
        awaiting = asyncio.ensure_future(asyncio.wrap_future(task))
        while not running.is_set():
            await asyncio.sleep(0.001)
        awaiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaiting

    asyncio.run(main())
    assert stopped.wait(LONG) and task.wait(LONG) and task.status is TaskStatus.CANCELLED


def test_a_wrapped_task_that_is_let_alone_gives_its_result_to_the_loop(pool: Scheduler) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return [
            await asyncio.wrap_future(pool.submit(len, "four")),
            await asyncio.wrap_future(pool.submit(add, 1, 2)),
            await loop.run_in_executor(pool, len, "xy"),
        ]

    assert asyncio.run(main()) == [4, 3, 2]


# -- the loop --


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_a_worker_has_one_loop_which_is_closed_when_it_ends() -> None:
    with Scheduler(1) as pool:
        loops = {pool.submit(running_loop).result(LONG) for _ in range(5)}
        assert len(loops) == 1 and not next(iter(loops)).is_closed()
        assert pool.submit(threading.active_count).result(LONG) > 0, "plain tasks in between"
        assert {pool.submit(running_loop).result(LONG)} == loops
    assert next(iter(loops)).is_closed()


def test_each_worker_has_a_loop_of_its_own() -> None:
    both = threading.Barrier(2)

    async def work() -> asyncio.AbstractEventLoop:
        await asyncio.to_thread(both.wait, LONG)
        return asyncio.get_running_loop()

    with Scheduler(2) as pool:
        loops = {task.result(LONG) for task in [pool.submit(work) for _ in range(2)]}
    assert len(loops) == 2 and all(loop.is_closed() for loop in loops)


def test_a_worker_that_leaves_after_a_resize_or_a_timeout_closes_its_loop(pool: Scheduler) -> None:
    both = threading.Barrier(2)

    async def work() -> asyncio.AbstractEventLoop:
        await asyncio.to_thread(both.wait, LONG)
        return asyncio.get_running_loop()

    loops = [task.result(LONG) for task in [pool.submit(work) for _ in range(2)]]
    pool.resize(1)
    until(lambda: sum(loop.is_closed() for loop in loops) == 1)
    seen: list[asyncio.AbstractEventLoop] = []
    is_replaced = threading.Event()  # one that came back before that would go on working

    async def slow() -> None:
        seen.append(asyncio.get_running_loop())
        try:
            await asyncio.sleep(LONG)
        finally:
            is_replaced.wait(LONG)

    assert isinstance(pool.options(timeout=0.05).submit(slow).exception(LONG), TaskTimedOut)
    is_replaced.set()
    until(lambda: seen[0].is_closed())


def test_closing_the_loop_ends_its_generators_and_its_threads() -> None:
    ended, threads = threading.Event(), []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            ended.set()

    kept = numbers()

    async def work() -> int:
        threads.append(await asyncio.to_thread(threading.current_thread))
        return await kept.__anext__()

    with Scheduler(1) as pool:
        assert pool.submit(work).result(LONG) == 1 and threads[0].is_alive() and not ended.is_set()
    assert ended.is_set()
    assert not threads[0].is_alive()


def test_what_a_coroutine_starts_and_does_not_await_is_cancelled_when_it_returns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []

    async def stray(name: str) -> None:
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            seen.append(name)
            if name == "bad":
                raise ValueError("in the clean-up") from None
            raise

    async def work() -> str:
        kept.extend(asyncio.create_task(stray(name)) for name in ("good", "bad"))
        await asyncio.sleep(0)
        return "done"

    kept: list[Any] = []
    with Scheduler(1) as pool:
        task = pool.submit(work)
        assert task.result(LONG) == "done" and sorted(seen) == ["bad", "good"]
        assert "in the clean-up" in caplog.text
        assert pool.submit(add, 1, 2).result(LONG) == 3


def test_a_loop_that_is_stopped_from_inside_goes_on(pool: Scheduler) -> None:
    async def work() -> int:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return 5

    assert pool.submit(work).result(LONG) == 5


def test_a_plain_task_beside_coroutines_may_run_a_loop_of_its_own() -> None:
    with Scheduler(1) as pool:
        pool.submit(add, 1, 2).result(LONG)
        assert pool.submit(lambda: asyncio.run(add(3, 4))).result(LONG) == 7
        assert pool.submit(add, 5, 6).result(LONG) == 11


def test_the_loop_keeps_nothing_of_a_coroutine_that_has_ended() -> None:
    class Thing:
        pass

    class Odd(Exception):
        pass

    async def work(given: Thing) -> Thing:
        await asyncio.sleep(0)
        return Thing()

    async def fail(given: Thing) -> None:
        await asyncio.sleep(0)
        local = given
        raise Odd(local)

    with Scheduler(1) as pool:
        gc.disable()
        try:
            thing = Thing()
            given = weakref.ref(thing)
            task: Task[Any] = pool.submit(work, thing)
            result = weakref.ref(task.result(LONG))
            failed = pool.submit(fail, thing)
            error = weakref.ref(failed.exception(LONG))  # type: ignore[arg-type]
            pool.submit(add, 1, 2).result(LONG)
            del thing, task, failed
            until(
                lambda: runs_on(pool) and result() is None and error() is None and given() is None
            )
        finally:
            gc.enable()


def test_asyncio_is_loaded_with_the_first_coroutine_and_not_before() -> None:
    code = """if True:
        import sys
        from bgworker import Scheduler
        async def nothing():
            pass
        with Scheduler(1) as pool:
            tasks = [pool.submit(len, "") for _ in range(3)]
            for task in tasks:
                task.add_done_callback(repr)
                task.result()
            print("asyncio" in sys.modules)
            pool.submit(nothing).result()
            print("asyncio" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")


FORKS = """if True:
    import asyncio, os, sys, threading, time
    import bgworker.running.coroutines
    from bgworker import Scheduler

    if "unguarded" in sys.argv:
        bgworker.running.coroutines.os = type("os", (), {"getpid": staticmethod(lambda: 0)})

    async def nothing():
        pass

    def forks():
        pid = os.fork()
        if pid == 0:
            return  # the thread goes on to its end, and the child with it
        os.waitpid(pid, 0)

    entered = threading.Event()

    async def waits():
        entered.set()
        await asyncio.sleep(60)

    pool = Scheduler(1)
    pool.submit(nothing).result()
    pool.submit(forks).result()
    task = pool.submit(waits)
    entered.wait(30)
    time.sleep(0.1)  # the loop sleeps
    task.cancel()
    print(task.wait(2), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="epoll shares its registrations with a forked child",
)
@pytest.mark.parametrize("how, reaches", [("guarded", "True"), ("unguarded", "False")])
def test_a_forked_child_leaves_its_parents_loop_alone(how: str, reaches: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, how], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == reaches, done.stderr


def test_coroutines_on_many_workers_cancelled_at_random_each_end_once() -> None:
    sink = MemorySink()

    async def work(number: int) -> int:
        for _ in range(number % 5):
            await asyncio.sleep(0.0005 * (number % 3))
        return number

    with Scheduler(4, sinks=[sink]) as pool:
        tasks = [
            pool.options(timeout=0.001 if number % 7 == 0 else LONG).submit(work, number)
            for number in range(400)
        ]
        for task in tasks[::3]:
            task.cancel()
        for task in tasks:
            assert task.wait(LONG), "a task never ended"
        until(lambda: not pool.health().stuck)
        assert pool.submit(add, 1, 2).result(LONG) == 3
    by_task: dict[str, list[Any]] = {}
    for each in sink.events:
        by_task.setdefault(each.task_id, []).append(each)
    for task in tasks:
        events = by_task[task.id]
        assert [each.seq for each in events] == list(range(1, len(events) + 1))
        assert [each.type.value for each in events if each.task.status.is_final] == [
            events[-1].type.value
        ]
        assert events[-1].task.status is task.status


class Compiled(collections.abc.Coroutine):  # type: ignore[type-arg]
    """A coroutine that is none of Python's own, as compilers make them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def send(self, value: Any) -> Any:
        return self.inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self.inner.throw(*error)

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()


class Lookalike:
    """The same without the base class."""

    __init__, send, throw, close, __await__ = (  # type: ignore[misc]
        Compiled.__init__, Compiled.send, Compiled.throw, Compiled.close, Compiled.__await__)


@pytest.mark.parametrize("kind", [Compiled, Lookalike])
@pytest.mark.parametrize("capture_output", [False, True])
def test_a_coroutine_of_a_compilers_is_run_and_can_be_cancelled(
    kind: Any, capture_output: bool
) -> None:
    async def work(seconds: float) -> int:
        await asyncio.sleep(seconds)
        return 5

    with Scheduler(1, capture_output=capture_output) as pool:
        assert pool.submit(lambda: kind(work(0.01))).result(LONG) == 5
        task = pool.submit(lambda: kind(work(LONG)))
        until(task.running)
        task.cancel()
        assert task.wait(LONG) and task.cancelled()


def test_a_result_whose_class_lies_and_raises_is_a_result_like_any_other() -> None:
    class Meta(type):
        def __hash__(cls) -> int:
            raise ValueError("no hash")

        def __subclasscheck__(cls, other: type) -> bool:
            raise SystemExit("no check")

    class Odd(metaclass=Meta):
        @property
        def __class__(self) -> Any:  # type: ignore[override]
            raise SystemExit("no class")

    with Scheduler(1) as pool:
        assert type(pool.submit(Odd).result(LONG)) is Odd
