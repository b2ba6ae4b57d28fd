"""What a Scheduler makes of executors that break, lie, or go away, and of a channel that is cut."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.remote import breaking, functions
from tests.remote.conftest import Hold, Holds
from tests.remote.engines import (
    DASK,
    INTERPRETERS,
    LOKY,
    PROCESS_POOLS,
    THREADS,
    WORKERS,
    Engine,
    channels,
    descendants,
    made,
    missing,
    open_sockets,
)
from tests.support import SOON, RecordingSink, balanced, needs_fork, until

from bgworker import Scheduler, ShutdownError, Task, TaskStatus, TaskTimedOut

START = ["TaskCreated", "TaskScheduled", "TaskStarted"]

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/net/unix"), reason="reads /proc")


@pytest.fixture(params=[*PROCESS_POOLS, LOKY])
def breakable(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A new executor of processes of any kind, which a test may break."""
    yield from made(request.param)


@pytest.fixture
def forked() -> Iterator[Engine]:
    """A new executor of forked processes, which are there in no time."""
    yield from made("fork")


@pytest.fixture(scope="module")
def dask() -> Iterator[Engine]:
    """A cluster whose workers a test may kill."""
    yield from made(DASK)


# -- workers that die --


def test_a_worker_that_dies_fails_its_tasks_with_the_executors_error(
        breakable: Engine, recorder: RecordingSink, holds: Holds) -> None:
    with breakable.scheduler(sinks=[recorder]) as pool:
        done = pool.submit(functions.recite, 3)
        done.result(SOON)
        hold = holds()
        task = pool.submit(functions.speak_then, "kill", hold.path)
        until(lambda: len(recorder.said(task)) == 2)
        waiting = [pool.submit(functions.double, n) for n in range(20)]
        hold.open()
        error = task.exception(SOON)
        assert isinstance(error, BrokenExecutor) and not isinstance(error, ShutdownError)
        for each in waiting:
            assert each.wait(SOON)
            assert each.status in ("completed", "failed")
        with pytest.raises(ShutdownError, match="takes none") as caught:
            pool.submit(functions.nothing)
        assert isinstance(caught.value.__cause__, BrokenExecutor)
    assert recorder.types(task) == [*START, "TaskOutput", "TaskProgress", "TaskFailed"]
    end = recorder.of(task)[-1].task
    assert "Broken" in end.failure_type or "Terminated" in end.failure_type
    assert end.failure_message == str(error) and end.last_progress_percent == 50
    for each in [*waiting, done]:
        types = recorder.types(each)
        assert sum(each in ("TaskCompleted", "TaskFailed") for each in types) == 1
    health = pool.sinks["recording"]
    assert balanced(health) and health.delivered == len(recorder.events)


def test_what_was_said_just_before_a_worker_was_killed_is_in_the_record(
        forked: Engine, recorder: RecordingSink, hold: Hold) -> None:
    with forked.scheduler(sinks=[recorder]) as pool:
        task = pool.submit(functions.talk_and_hold, hold.path, *range(50))
        hold.wait()
        time.sleep(0.3)  # it is on its way for as long as the sender gathers
        forked.kill()
        assert isinstance(task.exception(SOON), BrokenExecutor)
    assert [payload for _, payload in recorder.said(task)] == [str(n) for n in range(50)]
    assert recorder.types(task)[-1] == "TaskFailed"


def test_a_deadline_still_counts_when_the_worker_was_killed_after_it(
        forked: Engine, recorder: RecordingSink, hold: Hold) -> None:
    with forked.scheduler(sinks=[recorder]) as pool:
        task = pool.options(timeout=0.2).submit(functions.hold, hold.path)
        assert isinstance(task.exception(SOON), TaskTimedOut)
        assert len(pool.health().abandoned) == 1
        forked.kill()
        until(lambda: pool.health().abandoned == ())
    assert recorder.types(task) == [*START, "TaskTimedOut"]


@pytest.mark.parametrize("act", ["exit", "segfault"])
def test_a_worker_that_ends_itself_is_one_that_dies(forked: Engine, recorder: RecordingSink,
                                                    hold: Hold, act: str) -> None:
    hold.open()
    with forked.scheduler(sinks=[recorder]) as pool:
        task = pool.submit(functions.speak_then, act, hold.path)
        assert isinstance(task.exception(SOON), BrokenExecutor)
    assert recorder.types(task)[-1] == "TaskFailed"


@pytest.mark.slow
def test_dask_runs_a_task_again_whose_worker_was_killed(dask: Engine, recorder: RecordingSink,
                                                        holds: Holds) -> None:
    first, second = holds(), holds()
    assert dask.cluster is not None
    with dask.scheduler(sinks=[recorder]) as pool:
        task = pool.submit(functions.die_the_first_time, first.path, second.path)
        until(lambda: recorder.said(task) == [("output", "first")])
        first.open()
        process = second.wait()
        until(lambda: len(recorder.said(task)) == 3)
        assert task.status is TaskStatus.RUNNING
        second.open()
        assert task.result(SOON) == "done"
        assert pool.flush(SOON)
    dask.cluster.add_worker()
    (stream, warning), second_time = recorder.said(task)[1:]
    assert second_time == ("output", "second") and stream == "warning"
    assert "again" in warning and "attempt 2" in warning and str(process) in warning
    assert recorder.types(task)[:3] == START and recorder.types(task)[-1] == "TaskCompleted"
    assert [each.seq for each in recorder.of(task)] == list(range(1, len(recorder.of(task)) + 1))


@pytest.mark.slow
def test_dask_gives_a_task_up_that_kills_each_worker(dask: Engine, recorder: RecordingSink,
                                                     hold: Hold) -> None:
    hold.open()
    assert dask.cluster is not None
    dask.cluster.add_worker()
    with dask.scheduler(sinks=[recorder]) as pool:
        task = pool.submit(functions.speak_then, "kill", hold.path)
        error = task.exception(SOON)
        assert type(error).__name__ == "KilledWorker"
        assert pool.submit(functions.double, 4).result(SOON) == 8, "the third worker goes on"
    assert recorder.types(task)[-1] == "TaskFailed"
    assert recorder.of(task)[-1].task.failure_type.endswith("KilledWorker")


@pytest.mark.slow
def test_a_dask_whose_scheduler_is_killed_leaves_no_task_open(recorder: RecordingSink,
                                                              holds: Holds) -> None:
    for cluster in made(DASK):
        assert cluster.cluster is not None
        with cluster.scheduler(sinks=[recorder]) as pool:
            hold = holds()
            tasks = [pool.submit(functions.talk_and_hold, hold.path, "said before")]
            until(lambda: recorder.said(tasks[0]) == [("output", "said before")])
            tasks += [pool.submit(functions.double, n) for n in range(4)]
            cluster.cluster.scheduler.kill()
            hold.open()
            for task in tasks:
                assert task.wait(SOON), f"{task} never ends"
            assert tasks[0].status in ("failed", "cancelled")
        assert recorder.types(tasks[0])[3:-1] == ["TaskOutput"]
        assert balanced(pool.sinks["recording"])


# -- executors that go away --


@pytest.mark.parametrize("name", ["fork", LOKY])
@pytest.mark.parametrize("how", ["cancel", "finish"])
def test_an_executor_that_is_shut_down_under_a_scheduler_leaves_no_task_open(
        name: str, recorder: RecordingSink, holds: Holds, how: str) -> None:
    for engine in made(name):
        shut_down_under(engine, recorder, holds, how)


def shut_down_under(engine: Engine, recorder: RecordingSink, holds: Holds, how: str) -> None:
    executor = engine.executor
    assert executor is not None
    with engine.scheduler(sinks=[recorder]) as pool:
        places = [holds() for _ in range(WORKERS)]
        held = [pool.submit(functions.hold, each.path, 5) for each in places]
        for each in places:
            each.wait()
        waiting = [pool.submit(functions.double, n) for n in range(10)]
        if how == "finish":
            executor.shutdown(wait=False)
        elif engine.name == LOKY:
            executor.shutdown(wait=False, kill_workers=True)  # type: ignore[call-arg]
        else:
            executor.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(ShutdownError, match="takes none") as caught:
            pool.submit(functions.nothing)
        assert isinstance(caught.value.__cause__, RuntimeError)
        holds.open()
        for task in [*held, *waiting]:
            assert task.wait(SOON)
        if how == "finish":
            assert [task.result(0) for task in held] == [5] * WORKERS
            assert [task.result(0) for task in waiting] == [2 * n for n in range(10)]
        elif engine.name != LOKY:
            assert [task.result(0) for task in held] == [5] * WORKERS
            assert waiting[-1].cancelled()
            assert waiting[-1].snapshot().failure_message == (
                "ProcessPoolExecutor cancelled it")
        else:
            assert all(task.status == "failed" for task in [*held, *waiting])
    assert balanced(pool.sinks["recording"])
    for task in [*held, *waiting]:
        assert recorder.types(task)[-1] == f"Task{task.status.value.capitalize()}"


def test_an_initializer_that_fails_breaks_the_executor_and_fails_its_tasks(
        recorder: RecordingSink) -> None:
    with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), functions.refuse_to_load, ("no database",)
    ) as executor, Scheduler(executor=executor, sinks=[recorder]) as pool:
        task = pool.submit(functions.nothing)
        assert isinstance(task.exception(SOON), BrokenExecutor)
    assert recorder.types(task) == ["TaskCreated", "TaskScheduled", "TaskFailed"]


@needs_fork
@pytest.mark.parametrize("when", ["while it runs", "after its end"])
def test_a_child_that_is_forked_beside_a_scheduler_can_exit(when: str, holds: Holds) -> None:
    with ThreadPoolExecutor(1) as executor:
        pool = Scheduler(executor=executor)
        task = pool.submit(functions.hold, holds().path)
        if when == "after its end":
            holds.open()
            pool.shutdown()
        child = multiprocessing.get_context("fork").Process(target=functions.nothing)
        child.start()
        child.join(SOON)
        try:
            assert child.exitcode == 0, "it waits for the tasks of its parent"
        finally:
            child.kill()
            child.join()
            holds.open()
        assert task.wait(SOON)
        pool.shutdown()


# -- executors that lie --


class Odd(Executor):
    """An executor that does with a call what a test likes.

    Args:
        act: gets the future of a call, and the call without arguments.
    """

    def __init__(self, act: Callable[[Future[Any], Callable[[], Any]], object]) -> None:
        self._act = act

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._act(future, lambda: fn(*args, **kwargs))
        return future


def on_odd(act: Callable[[Future[Any], Callable[[], Any]], object],
           recorder: RecordingSink) -> Task[Any]:
    with Scheduler(executor=Odd(act), sinks=[recorder]) as pool:
        task = pool.submit(functions.recite, 2)
        assert task.wait(SOON)
    assert balanced(pool.sinks["recording"])
    return task


def test_an_executor_may_run_a_task_before_submit_returns(recorder: RecordingSink) -> None:
    task = on_odd(lambda future, call: future.set_result(call()), recorder)
    assert task.result(0) == 2
    assert recorder.types(task) == [*START, "TaskOutput", "TaskOutput", "TaskCompleted"]


def test_an_executor_of_threads_of_this_process_will_do(recorder: RecordingSink,
                                                        holds: Holds) -> None:
    with ThreadPoolExecutor(2) as executor, \
            Scheduler(executor=executor, sinks=[recorder]) as pool:
        hold = holds()
        task = pool.submit(functions.talk_and_hold, hold.path, "hello")
        until(lambda: recorder.said(task) == [("output", "hello")])
        asleep = pool.submit(functions.sleep, holds().path)
        until(lambda: asleep.status is TaskStatus.RUNNING)
        assert asleep.cancel() is False
        hold.open()
        assert task.result(SOON) == "let go" and asleep.wait(SOON) and asleep.cancelled()
        late = pool.options(timeout=0.1).submit(functions.sleep, holds().path)
        assert isinstance(late.exception(SOON), TaskTimedOut)


@pytest.mark.parametrize("answer", [None, 5, b"", b"nonsense", "text", [b"x"]])
def test_an_answer_that_is_no_report_fails_its_task_and_says_so(recorder: RecordingSink,
                                                                answer: object) -> None:
    task = on_odd(lambda future, call: future.set_result(answer), recorder)
    error = task.exception(0)
    assert type(error).__name__ == "RemoteError" and "report" in str(error)
    assert recorder.types(task) == ["TaskCreated", "TaskScheduled", "TaskFailed"]


@pytest.mark.parametrize("error", [MemoryError("full"), OSError(28, "no space"),
                                   KeyboardInterrupt("struck"), functions.Abort("of the executor")],
                         ids=lambda error: type(error).__name__)
def test_any_error_of_an_executor_is_that_of_the_task(recorder: RecordingSink,
                                                      error: BaseException) -> None:
    task = on_odd(lambda future, call: future.set_exception(error), recorder)
    assert task.exception(0) is error
    assert recorder.of(task)[-1].task.failure_type.rpartition(".")[2] == type(error).__name__


def test_a_task_that_the_executor_cancels_is_cancelled_and_says_by_whom(
        recorder: RecordingSink) -> None:
    task = on_odd(lambda future, call: (future.cancel(), future.set_running_or_notify_cancel()),
                  recorder)
    assert task.cancelled() and task.snapshot().failure_message == "Odd cancelled it"
    with pytest.raises(CancelledError):
        task.result(0)


def test_an_executor_that_takes_nothing_leaves_no_task_behind(recorder: RecordingSink) -> None:
    def refuse(future: Future[Any], call: Callable[[], Any]) -> None:
        raise OSError("no more processes")

    with Scheduler(executor=Odd(refuse), sinks=[recorder]) as pool:
        with pytest.raises(ShutdownError, match="Odd takes none.*no more processes") as caught:
            pool.submit(functions.nothing)
        assert isinstance(caught.value.__cause__, OSError)
        assert pool.tasks(status="scheduled") == [] and pool.health().pending == 0


def test_a_worker_with_another_version_of_bgworker_is_told_apart(recorder: RecordingSink) -> None:
    with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), functions.other_version
    ) as executor, Scheduler(executor=executor, sinks=[recorder]) as pool:
        error = pool.submit(functions.nothing).exception(SOON)
        assert type(error).__name__ == "RemoteError"
        assert "version of bgworker" in str(error) and "format" in str(error)


# -- a channel that is cut --


@needs_proc
def test_a_channel_that_is_cut_loses_nothing() -> None:
    breaking.run_cuts(5, "fork", seed=random.randrange(10 ** 6))


@needs_proc
def test_a_request_to_stop_reaches_a_body_whose_connection_was_cut(
        forked: Engine, recorder: RecordingSink, holds: Holds) -> None:
    with forked.scheduler(sinks=[recorder]) as pool:
        task = pool.submit(functions.sleep, holds().path)
        until(lambda: task.status is TaskStatus.RUNNING)
        until(lambda: breaking.cut_connections() > 0)
        assert task.cancel() is False
        assert task.wait(SOON) and task.cancelled()


@needs_proc
def test_a_stranger_who_connects_learns_nothing_and_hurts_nobody(
        forked: Engine, recorder: RecordingSink, holds: Holds) -> None:
    import socket

    with forked.scheduler(sinks=[recorder], channel="127.0.0.1:0") as pool:
        (host, port), *_ = pool._pool._hub.ticket  # type: ignore[union-attr]
        strangers = []
        for said in (b"", b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000):
            strangers.append(socket.create_connection((host, port), SOON))
            strangers[-1].sendall(said)
        task = pool.submit(functions.recite, 20)
        assert task.result(SOON) == 20
        for each in strangers:
            each.settimeout(0.2)
            try:
                heard = each.recv(4096)
            except (TimeoutError, ConnectionError):
                heard = b""
            assert b"said" not in heard and len(heard) < 200
            each.close()
        assert pool.flush(SOON) and len(recorder.said(task)) == 20


@needs_fork
def test_a_child_that_a_body_forks_is_silent(forked: Engine, recorder: RecordingSink) -> None:
    with forked.scheduler(sinks=[recorder]) as pool:
        task = pool.submit(functions.fork_and_speak)
        assert task.result(SOON) > 0
        assert pool.flush(SOON)
    assert recorder.said(task) == [("output", "from the body")]


# -- at random --


@needs_proc
def test_workers_that_are_killed_at_random_leave_an_exact_record() -> None:
    breaking.run_kills(2, "fork", seed=random.randrange(10 ** 6))


@needs_proc
def test_the_workers_of_a_program_that_is_killed_end_and_its_record_has_what_they_said() -> None:
    breaking.run_orphans(1, "fork", seed=random.randrange(10 ** 6))


@needs_proc
def test_tasks_that_are_controlled_at_random_end_once_and_as_their_record_says() -> None:
    breaking.run_control(2.0, "fork", seed=random.randrange(10 ** 6))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", [THREADS, *PROCESS_POOLS, INTERPRETERS, LOKY, DASK])
def test_tasks_of_all_kinds_are_controlled_at_random(name: str) -> None:
    if problem := missing(name):
        pytest.skip(problem)
    breaking.run_control(5.0, name, seed=random.randrange(10 ** 6))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", [*PROCESS_POOLS, LOKY])
def test_workers_of_all_kinds_end_with_their_program(name: str) -> None:
    if problem := missing(name):
        pytest.skip(problem)
    breaking.run_orphans(2, name, seed=random.randrange(10 ** 6))
    breaking.run_orphans(1, name, seed=random.randrange(10 ** 6), looks=False)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", [*PROCESS_POOLS[1:], LOKY])
def test_workers_of_all_kinds_are_killed_and_cut_off_at_random(name: str) -> None:
    if problem := missing(name):
        pytest.skip(problem)
    breaking.run_kills(3, name, seed=random.randrange(10 ** 6))
    breaking.run_cuts(10, name, seed=random.randrange(10 ** 6))


# -- what is left --


@needs_proc
@pytest.mark.parametrize("name", [THREADS, *PROCESS_POOLS, INTERPRETERS, LOKY])
def test_nothing_is_left_of_a_scheduler_and_its_executor(name: str, holds: Holds) -> None:
    if problem := missing(name):
        pytest.skip(problem)
    before = set(descendants()), open_sockets(), len(os.listdir("/proc/self/fd"))
    threads = set(threading.enumerate())
    engine = Engine(name)
    with engine.scheduler() as pool:
        assert pool.submit(functions.double, 4).result(SOON) == 8
        hold = holds()
        late = pool.options(timeout=0.1).submit(functions.hold, hold.path)
        assert isinstance(late.exception(SOON), TaskTimedOut)
        # the same check sees what is there meanwhile
        assert (set(threading.enumerate()) > threads) and (
            name == THREADS or channels() and open_sockets() > before[1])
        hold.open()
    engine.close()
    until(lambda: set(descendants()) <= before[0] and open_sockets() <= before[1])
    until(lambda: set(threading.enumerate()) <= threads)


@needs_proc
def test_a_worker_keeps_nothing_of_schedulers_that_have_ended(forked: Engine) -> None:
    def used() -> tuple[int, int]:
        assert forked.executor is not None
        found = [forked.executor.submit(functions.resources) for _ in range(8 * WORKERS)]
        return max(each.result(SOON) for each in found)

    with forked.scheduler() as pool:
        pool.submit(functions.recite, 3).result(SOON)
    until(lambda: used()[0] == 1)  # a channel stays for a moment
    before = used()
    for _ in range(20):
        with forked.scheduler() as pool:
            tasks = [pool.submit(functions.recite, 3) for _ in range(2 * WORKERS)]
            assert [task.result(SOON) for task in tasks] == [3] * 2 * WORKERS
    until(lambda: used() <= before)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="came with Python 3.11")
def test_workers_that_are_replaced_after_each_task_lose_nothing(recorder: RecordingSink) -> None:
    with concurrent.futures.ProcessPoolExecutor(  # type: ignore[call-overload]
            WORKERS, multiprocessing.get_context("forkserver"), max_tasks_per_child=1
    ) as executor, Scheduler(executor=executor, sinks=[recorder]) as pool:
        tasks = [pool.submit(functions.recite, 40, n) for n in range(4)]
        assert [task.result(SOON) for task in tasks] == [40] * 4
    for number, task in enumerate(tasks):
        assert recorder.said(task) == [
            ("output", f"{line} {'x' * number}") for line in range(40)]
        assert recorder.types(task)[-1] == "TaskCompleted"


@needs_proc
def test_a_program_that_ends_without_shutdown_leaves_no_process(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from bgworker import Scheduler
        from tests.remote import functions
        from tests.remote.engines import executor
        pool = Scheduler(executor=executor("fork"))
        pool.submit(functions.double, 4).result(30)
        held = pool.options(timeout=0.1).submit(functions.serve, sys.argv[1], True)
        held.exception(30)
        raise SystemExit(3)
    """
    done = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True,
                            env=breaking.environment())
    assert done.wait(SOON) == 3
    until(lambda: breaking.members(done.pid) == [])
