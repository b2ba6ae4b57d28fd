"""A Scheduler with an executor: what its pool alone sees to."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from tests.remote import bodies
from tests.support import SOON

from bgworker import (
    ConfigurationError, Scheduler, ShutdownError, StreamEvent, TaskStatus, TaskTimedOut, shell)
from bgworker.remote.worker import perform

FEW = 2.0
"""Seconds that a body takes which is over long before."""


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as made:
        made.submit(bodies.nothing).result(SOON)  # its threads run before any test
        yield made


class Keeps(Executor):
    """Never runs what it gets, and says so."""

    def __init__(self) -> None:
        self.got: list[Future[Any]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert function is perform and not kwargs and [type(each) for each in args] == [bytes]
        self.got.append(Future())
        return self.got[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="holds the interpreter lock by usleep of C")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_body_that_lets_no_other_thread_run_begins_and_ends_at_its_deadline(
    is_first: bool,
) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes,
        Scheduler(executor=processes) as pool,
    ):
        if not is_first:
            pool.submit(bodies.nothing).result(SOON)
        task = pool.options(timeout=0.2).submit(bodies.hold_the_lock, FEW)
        with pytest.raises(TaskTimedOut):
            task.result(SOON)
        (left,) = pool.health().abandoned
        assert left.task_id == task.id and left.where.startswith("process ")
        assert left.where in (task.snapshot().invocation_info or "")


@pytest.mark.parametrize("executor", [ProcessPoolExecutor, 7, "processes", object()])
def test_what_is_no_executor_is_refused(executor: Any) -> None:
    with pytest.raises(ConfigurationError, match="executor: expected an executor"):
        Scheduler(executor=executor)


@pytest.mark.parametrize("setting", [
    {"max_workers": 3}, {"initializer": print}, {"initargs": (1,)}])
def test_settings_of_threads_are_refused_beside_an_executor(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{[*setting][0]}: belongs to the executor"):
        Scheduler(executor=Keeps(), **setting)


def test_a_channel_without_an_executor_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="channel: .*without an executor"):
        Scheduler(channel="localhost:0")


def test_its_workers_are_not_this_schedulers_to_resize() -> None:
    with Scheduler(executor=Keeps()) as pool, pytest.raises(ConfigurationError, match="Keeps"):
        pool.resize(3)


def test_an_executor_that_takes_nothing_has_submit_raise_and_the_task_cancelled() -> None:
    class Refuses(Keeps):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            raise RuntimeError("no more")

    with Scheduler(executor=Refuses()) as pool:
        with pytest.raises(ShutdownError, match="Refuses takes none .*no more"):
            pool.submit(bodies.nothing)
        assert pool.health().pending == 0


def test_what_the_executor_cancels_is_cancelled_and_says_who_did_it() -> None:
    engine = Keeps()
    with Scheduler(executor=engine) as pool:
        task = pool.submit(bodies.nothing)
        assert engine.got[0].cancel()
        assert task.wait(SOON) and task.status is TaskStatus.CANCELLED
        assert task.snapshot().failure_message == "Keeps cancelled it"


@pytest.mark.parametrize("answer", [b"", b"\0", 7, None, "report"])
def test_an_executor_that_returns_something_else_fails_the_task(answer: Any) -> None:
    engine = Keeps()
    with Scheduler(executor=engine) as pool:
        task = pool.submit(bodies.nothing)
        engine.got[0].set_result(answer)
        assert "expected the report of a task" in str(task.exception(SOON))


def test_a_thousand_tasks_wait_without_a_thread_for_each() -> None:
    engine = Keeps()
    with Scheduler(executor=engine) as pool:
        before = threading.active_count()
        tasks = [pool.submit(bodies.nothing) for _ in range(1000)]
        assert threading.active_count() < before + 10 and pool.health().pending == 1000
        assert all(task.cancel() for task in tasks)


def test_a_callback_that_takes_its_time_holds_up_no_end_of_another_task(
    processes: ProcessPoolExecutor,
) -> None:
    can_end = threading.Event()
    with Scheduler(executor=processes) as pool:
        slow = pool.submit(bodies.nothing)
        slow.add_done_callback(lambda task: can_end.wait(SOON))
        try:
            assert pool.submit(bodies.nothing).result(SOON) is None
        finally:
            can_end.set()


def test_a_command_says_no_more_than_a_reader_keeps_up_with(
    processes: ProcessPoolExecutor,
) -> None:
    lines = 20_000
    with Scheduler(executor=processes) as pool:
        task = pool.submit(shell(
            f"sleep 0.2; '{sys.executable}' -c 'for n in range({lines}): print(n)'"))
        reader = pool.subscribe(
            task=task, back_pressure=True, maxsize=1000, types=["TaskOutput", "TaskCompleted"])
        seen = []
        for event in reader:
            if isinstance(event, StreamEvent):
                seen.append(int(event.payload))
                if len(seen) % 1000 == 0:
                    time.sleep(0.02)
        assert seen == list(range(lines)) and reader.health().dropped == 0


def test_a_command_whose_reader_never_comes_ends_in_its_time(
    processes: ProcessPoolExecutor,
) -> None:
    with Scheduler(executor=processes) as pool:
        reader = pool.subscribe(back_pressure=True, maxsize=100)
        task = pool.options(timeout=2.0).submit(shell("seq 50000"))
        assert task.wait(SOON) and task.status is TaskStatus.COMPLETED
        pool.flush(SOON)
        health = reader.health()
        assert health.emitted == 50_000 + 4 == health.dropped + health.pending
        reader.close()
