"""The Scheduler is a ``ThreadPoolExecutor``: by type, by constructor, by what others read, and by
what tasks see."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import decimal
import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

import pytest

import bgworker
from bgworker import Scheduler, TaskOptions
from tests.free_threading import IS_FREE
from tests.support import until

LONG = 30.0
"""Seconds after which a wait that ought to succeed has failed."""

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def pool() -> Iterator[Scheduler]:
    with Scheduler(2) as scheduler:
        yield scheduler


def name_of_thread() -> str:
    return threading.current_thread().name


# -- the type and the constructor --


def test_a_scheduler_is_a_thread_pool_executor(pool: Scheduler) -> None:
    assert isinstance(pool, ThreadPoolExecutor)
    assert set(vars(ThreadPoolExecutor(1))) - {
        "_create_worker_context",
        "_resolve_work_item_task",
    } <= set(dir(pool))


@pytest.mark.parametrize(
    "arguments, keywords",
    [
        ((2, "io", variable.set, ("ready",)), {}),
        ((2, "io"), {"initializer": variable.set, "initargs": ("ready",)}),
        (
            (),
            {
                "max_workers": 2,
                "thread_name_prefix": "io",
                "initializer": variable.set,
                "initargs": ("ready",),
            },
        ),
    ],
)
def test_it_takes_what_the_standard_library_takes_in_its_order(
    arguments: Any, keywords: Any
) -> None:
    with Scheduler(*arguments, **keywords) as pool:
        assert re.fullmatch(r"io_\d+", pool.submit(name_of_thread).result(LONG))
        assert pool.submit(variable.get).result(LONG) == "ready"
        assert pool._max_workers == 2


def test_an_empty_prefix_is_none_as_in_the_standard_library() -> None:
    with Scheduler(1, "") as pool:
        assert pool.submit(name_of_thread).result(LONG) == "bgworker_0"


def test_an_event_loop_takes_it_as_its_default_executor_and_shuts_it_down() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(pool)
        return await loop.run_in_executor(None, name_of_thread)

    pool = Scheduler(1, "mine")
    assert asyncio.run(main()) == "mine_0"
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(int)


@pytest.mark.skipif(
    not hasattr(os, "process_cpu_count"),
    reason="before 3.13 the standard library counts all processors",
)
def test_the_default_counts_the_processors_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3)
    with Scheduler() as pool, ThreadPoolExecutor() as standard:
        assert pool._max_workers == standard._max_workers == 7


# -- the messages --


@pytest.mark.parametrize("number", [0, -1])
def test_too_few_workers_are_refused_in_the_words_of_the_standard_library(number: int) -> None:
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        Scheduler(number)


def test_a_pool_whose_initializer_failed_is_broken_as_in_the_standard_library() -> None:
    def fail() -> None:
        raise ValueError("no")

    with Scheduler(1, initializer=fail) as pool:
        assert pool._broken is False
        with pytest.raises(
            BrokenThreadPool,
            match="A thread initializer failed, the thread pool is not usable anymore",
        ):
            pool.submit(int).result(LONG)
        with pytest.raises(BrokenExecutor):
            pool.submit(int)
        assert "not usable" in str(pool._broken)


# -- what others read --


def test_its_attributes_answer_as_those_of_the_standard_library(pool: Scheduler) -> None:
    gate, entered = threading.Event(), threading.Barrier(3)
    for _ in range(2):
        pool.submit(lambda: (entered.wait(LONG), gate.wait(LONG)))
    waiting = [pool.submit(int) for _ in range(5)]
    entered.wait(LONG)
    assert pool._work_queue.qsize() == 5 and not pool._work_queue.empty()
    assert {thread.name for thread in pool._threads} == {"bgworker_0", "bgworker_1"}
    assert all(thread.is_alive() for thread in pool._threads)
    assert pool._idle_semaphore._value == 0
    assert pool._shutdown is False and pool._broken is False
    assert (pool._thread_name_prefix, pool._initializer, pool._initargs) == ("bgworker", None, ())
    with pool._shutdown_lock:
        waiting.append(pool.submit(int))
    gate.set()
    assert not concurrent.futures.wait(waiting, LONG).not_done
    assert pool._work_queue.empty()
    pool.shutdown()
    assert pool._shutdown is True


def test_more_workers_come_when_somebody_sets_max_workers(pool: Scheduler) -> None:
    pool._max_workers = 5
    pool._adjust_thread_count()
    together = threading.Barrier(5)
    assert (
        len({task.result(LONG) for task in [pool.submit(together.wait, LONG) for _ in range(5)]})
        == 5
    )


# -- map --


@pytest.fixture(params=["scheduler", "options"])
def mapper(request: pytest.FixtureRequest, pool: Scheduler) -> Scheduler | TaskOptions:
    return pool if request.param == "scheduler" else pool.options(name="mapped")


def test_map_takes_no_more_than_the_buffer_holds(mapper: Scheduler | TaskOptions) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    results = mapper.map(str, items(), buffersize=3)
    assert taken == [0, 1, 2]
    assert next(results) == "0" and taken == [0, 1, 2, 3]
    assert list(results) == [str(number) for number in range(1, 10)]


@pytest.mark.parametrize(
    "buffersize, error", [(0, ValueError), (-3, ValueError), ("foo", TypeError), (2.0, TypeError)]
)
def test_map_refuses_a_wrong_buffer(
    mapper: Scheduler | TaskOptions, buffersize: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="buffersize must be"):
        mapper.map(str, range(3), buffersize=buffersize)


def test_map_has_one_deadline_for_all_results(mapper: Scheduler | TaskOptions) -> None:
    gate = threading.Event()
    results = mapper.map(gate.wait, [LONG], timeout=0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    gate.set()


def test_the_iterator_of_options_that_nobody_else_holds_goes_on() -> None:
    with Scheduler(2) as pool:
        results = pool.options(name="mapped").map(str, range(20), buffersize=2)
        gc.collect()
        assert list(results) == [str(number) for number in range(20)]


def test_the_iterator_of_map_does_not_keep_the_scheduler() -> None:
    pool = Scheduler(2)
    results = pool.map(str, range(20), buffersize=2)
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None
    assert list(results) == ["0", "1"]


def test_map_holds_no_result_that_it_has_handed_out(pool: Scheduler) -> None:
    class Result:
        pass

    for result in pool.map(lambda _: Result(), range(3)):
        gone = weakref.ref(result)
        del result
        assert IS_FREE or gone() is None  # without the GIL an idle worker counts later


def test_map_goes_through_the_submit_of_a_subclass() -> None:
    class Counting(Scheduler):
        count = 0

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return super().submit(fn, *args, **kwargs)

    with Counting(2) as pool:
        assert list(pool.map(str, range(4))) == ["0", "1", "2", "3"]
        assert pool.count == 4


# -- what a task sees --


def test_what_the_initializer_sets_wins_over_what_the_submitter_had_set() -> None:
    variable.set("submitter's")
    with Scheduler(1, initializer=variable.set, initargs=("initializer's",)) as pool:
        assert pool.submit(variable.get).result(LONG) == "initializer's"
        assert variable.get() == "submitter's"
    with Scheduler(1) as pool:
        assert pool.submit(variable.get).result(LONG) == "submitter's"


def test_a_task_that_runs_inside_another_sees_what_the_initializer_has_set() -> None:
    with Scheduler(1, initializer=variable.set, initargs=("initializer's",)) as pool:
        assert (
            pool.submit(lambda: pool.submit(variable.get).result()).result(LONG) == "initializer's"
        )


def test_a_coroutine_sees_what_the_initializer_has_set() -> None:
    async def main() -> str:
        return variable.get()

    with Scheduler(1, initializer=variable.set, initargs=("initializer's",)) as pool:
        assert pool.submit(main).result(LONG) == "initializer's"


def set_precision(digits: int) -> None:
    decimal.getcontext().prec = digits


def precision() -> int:
    return decimal.getcontext().prec


def test_a_tasks_decimal_precision_is_its_own() -> None:
    with Scheduler(1) as pool, decimal.localcontext() as context:
        context.prec = 11
        assert pool.submit(set_precision, 5).result(LONG) is None
        assert precision() == 11
        assert pool.submit(precision).result(LONG) == 11, "the task before, or the default"


def test_a_task_has_the_decimal_precision_of_its_submit() -> None:
    gate = threading.Event()
    with Scheduler(1) as pool, decimal.localcontext() as context:
        pool.submit(gate.wait, LONG)
        context.prec = 11
        task = pool.submit(precision)
        context.prec = 12
        gate.set()
        assert task.result(LONG) == 11


def test_the_decimal_precision_that_the_initializer_sets_is_every_tasks() -> None:
    with Scheduler(1, initializer=set_precision, initargs=(7,)) as pool:
        assert pool.submit(precision).result(LONG) == 7


def test_thread_locals_are_those_of_the_worker() -> None:
    local = threading.local()

    def count() -> int:
        local.count = getattr(local, "count", 0) + 1
        return local.count  # type: ignore[no-any-return]

    with Scheduler(1) as pool:
        assert [pool.submit(count).result(LONG) for _ in range(3)] == [1, 2, 3]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="typeshed knows it from 3.14 on")
def test_the_class_of_a_broken_pool_is_told() -> None:
    assert getattr(Scheduler, "BROKEN") is BrokenThreadPool


# -- a frozen clock --


def test_waits_end_where_a_test_freezes_the_clock() -> None:
    script = """
import sys, threading, time
import bgworker

pool = bgworker.Scheduler(1)
gate = threading.Event()
pool.submit(gate.wait, 30)
subscription = pool.subscribe()
pool.flush(30)

now = time.monotonic()
frozen = {id(time.monotonic): lambda: now, id(time.monotonic_ns): lambda: int(now * 1e9)}
# what freezegun does; it leaves the standard library's waits alone
for name, module in list(sys.modules.items()):
    if name == "time" or name.startswith("bgworker"):
        for attribute, value in list(vars(module).items()):
            if id(value) in frozen:
                setattr(module, attribute, frozen[id(value)])
assert time.monotonic() == time.monotonic()

while subscription.get(0.05) is not None:
    pass
pool.shutdown(timeout=0.2)
gate.set()
"""
    root = os.path.dirname(os.path.dirname(bgworker.__file__))
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=2 * LONG)


# -- what an executor leaves behind --


def test_a_scheduler_that_was_shut_down_leaves_no_cycle_of_references() -> None:
    gc.collect()
    gc.disable()
    try:
        scheduler = Scheduler(2)
        assert (
            scheduler.options(timeout=LONG)
            .submit(lambda: scheduler.submit(int).result())
            .result(LONG)
            == 0
        )
        scheduler.shutdown()
        gone = [
            weakref.ref(scheduler),
            weakref.ref(scheduler._pool),
            weakref.ref(scheduler._dispatcher),
        ]
        del scheduler
        # or else something waits for the garbage collector
        until(lambda: all(each() is None for each in gone))
    finally:
        gc.enable()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="isolated subinterpreters came with 3.12")
def test_it_runs_in_an_isolated_subinterpreter_which_has_no_daemon_threads() -> None:
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(bgworker.__file__))!r})
from bgworker import Scheduler
pool = Scheduler(2)
assert pool.options(timeout=20).submit(int, "7").result(20) == 7
never_shut_down = Scheduler(1).submit(int)
pool.shutdown()
print("ran", flush=True)
"""
    runner = """
try:
    import _interpreters
    name = _interpreters.create("isolated")
    run = _interpreters.exec
except ImportError:
    import _xxsubinterpreters as _interpreters
    name = _interpreters.create(isolated=True)
    run = _interpreters.run_string
failure = run(name, %r)
assert failure is None, failure
_interpreters.destroy(name)
print("destroyed")
"""
    done = subprocess.run([sys.executable, "-c", runner % script], check=True, timeout=2 * LONG,
                          stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["ran", "destroyed"]
