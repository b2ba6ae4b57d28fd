"""What happens at the same moment in the pool of a Scheduler with an executor: an interrupt, a
signal handler, or another thread strikes at each step of what is going on."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from tests.interrupts import AtStep, Interrupt, each_step, traced
from tests.remote import bodies
from tests.remote.engines import channels
from tests.support import SOON, RecordingSink, until

import bgworker.remote.pool as module
from bgworker import BgworkerError, LifecycleEvent, Scheduler, ShutdownError, Task, TaskStatus
from bgworker.model.records import COMPLETED, OUTPUT, PROGRESS, STARTED, TIMED_OUT, WARNING
from bgworker.remote.messages import Report, decode_order, dumps, encode_report
from bgworker.remote.pool import CROWDED, SHARE, Lane, RemotePool

CREATED = "TaskCreated"
ENDS = {"TaskCompleted", "TaskFailed", "TaskCancelled", "TaskTimedOut"}


def report(
    kind: int = COMPLETED, payload: bytes = dumps(None), failure: Any = None,
    duration: float = 0.1, records: Any = ((STARTED, 1, None),),
) -> bytes:
    """Return what a worker process answers of a body that has begun."""
    return encode_report(Report(
        kind, payload, failure, None, duration, "w-1", 1, list(records), {}, "w"))


class Waits(Executor):
    """Ends what it got when it is told to."""

    def __init__(self) -> None:
        self.got: list[Future[Any]] = []
        self.ids: list[str] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.ids.append(decode_order(args[0]).task_id)
        self.got.append(Future())
        return self.got[-1]

    def end(self) -> None:
        for future in self.got:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_result(report())


class Case:
    """A Scheduler with one task that waits, and what may happen to it."""

    def __init__(self) -> None:
        self.engine, self.recorder = Waits(), RecordingSink()
        self.scheduler = Scheduler(executor=self.engine, sinks=[self.recorder])
        self.tasks: list[Task[Any]] = [self.scheduler.submit(bodies.nothing)]
        assert isinstance(self.scheduler._pool, RemotePool)
        self.pool = self.scheduler._pool

    def submit(self) -> None:
        with contextlib.suppress(BgworkerError):
            self.tasks.append(self.scheduler.options(timeout=30.0).submit(bodies.nothing))

    def cancel(self) -> None:
        self.tasks[0].cancel()

    def shutdown(self) -> None:
        self.scheduler.shutdown(wait=False)

    def cancel_all(self) -> None:
        self.scheduler.shutdown(wait=False, cancel_futures=True)

    def give_up(self) -> None:
        self.scheduler.shutdown(timeout=0)

    def interrupt(self) -> None:
        raise Interrupt

    def begin(self) -> None:
        self.pool.said(None, self.engine.ids[0], "w-1", 1, [(STARTED, time.time_ns(), None)])

    def fail(self) -> None:
        """Have the executor say that it failed, which another thread hears."""
        if not self.engine.got[0].done():
            self.engine.got[0].set_exception(OSError("a worker has died"))
            self.tasks[0].wait(0.02)  # that one may wait for this one

    def end_here(self) -> None:
        """Hear on this thread that the executor failed."""
        failed: Future[Any] = Future()
        failed.set_exception(OSError("a worker has died"))
        self.pool._finish(self.tasks[0], failed)  # type: ignore[arg-type]

    def check(self, is_whole: bool, has_repeats: bool = False) -> None:
        """End it; fail if a task does not end, or ends twice.

        Args:
            is_whole: no task is left to itself.
            has_repeats: an end that is struck may be told again; such a record is dropped.
        """
        self.engine.end()
        self.scheduler.shutdown(timeout=3.0)
        assert not is_whole or not self.pool._has_given_up, "a task has not ended"
        assert self.scheduler._dispatcher.closed.wait(SOON) and not self.pool.is_busy()
        assert all([task.wait(SOON) for task in self.tasks])
        kinds = Counter((event.task_id, event.type.value in ENDS)
                        for event in self.recorder.events
                        if isinstance(event, LifecycleEvent)
                        and event.type.value in {*ENDS, CREATED})
        assert set(kinds.values()) == {1}, "something is recorded twice"
        if is_whole and not has_repeats:
            assert self.scheduler._dispatcher.intake.late.read() == 0, "an end is told twice"
        created = {task_id for task_id, is_end in kinds if not is_end}
        ended = {task_id for task_id, is_end in kinds if is_end}
        assert ended <= created and (ended == created or not is_whole)
        assert {task.id for task in self.tasks} <= created or not is_whole


def _all_steps(act: Callable[[Case], object], strikes: Callable[[Case], object]) -> None:
    number = 0
    while True:
        case = Case()
        steps = AtStep(number, lambda: strikes(case))
        with contextlib.suppress(Interrupt), traced(steps):
            act(case)
        try:
            case.check(Case.give_up not in (act, strikes), strikes is Case.interrupt)
        except AssertionError as error:
            raise AssertionError(f"step {number}, in {steps.struck}: {error}") from error
        if not steps.struck:
            break
        number += 1
    assert number > 3, "nothing was struck"


@each_step
@pytest.mark.filterwarnings(  # a socket that was struck between its making and its first use
    "ignore:unclosed <socket:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("act, strikes", [
    *product([Case.submit, Case.cancel],
             [Case.interrupt, Case.submit, Case.cancel, Case.shutdown, Case.cancel_all,
              Case.give_up]),
    *product([Case.shutdown, Case.cancel_all, Case.give_up],
             [Case.interrupt, Case.submit, Case.give_up]),
], ids=lambda each: each.__name__)
def test_an_interrupt_or_a_signal_handler_at_any_step_leaves_no_task_open(
    act: Callable[[Case], None], strikes: Callable[[Case], None],
) -> None:
    _all_steps(act, strikes)


@each_step
@pytest.mark.parametrize("act, strikes", [
    (Case.begin, Case.fail), (Case.begin, Case.cancel), (Case.begin, Case.cancel_all),
    (Case.begin, Case.give_up), (Case.end_here, Case.begin), (Case.end_here, Case.cancel),
    (Case.end_here, Case.fail), (Case.cancel, Case.begin), (Case.cancel, Case.end_here),
], ids=lambda each: each.__name__)
def test_of_a_beginning_and_two_ends_at_the_same_moment_one_end_counts(
    act: Callable[[Case], None], strikes: Callable[[Case], None],
) -> None:
    _all_steps(act, strikes)


@each_step
def test_a_lane_does_what_it_is_handed_while_it_is_stopped() -> None:
    number, struck = 0, "yes"
    while struck:
        lane, done = Lane("test"), threading.Event()
        lane.thread.start()

        def stop(lane: Lane = lane) -> None:
            lane.stop()
            lane.thread.join(SOON)

        steps = AtStep(number, stop)
        with traced(steps):
            lane.put(done.set)
        struck = steps.struck
        lane.stop()
        assert done.wait(1.0), f"step {number}, in {struck}"
        lane.thread.join(SOON)
        assert not lane.thread.is_alive()
        number += 1
    assert number > 1, "nothing was struck"


def test_what_was_cancelled_before_it_began_ends_once_and_its_record_does_not_change() -> None:
    case = Case()
    assert case.tasks[0].cancel()
    ended = case.tasks[0].snapshot()
    case.scheduler.shutdown()
    assert case.tasks[0].snapshot().completed_utc == ended.completed_utc
    assert case.scheduler._dispatcher.intake.late.read() == 0


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_result_that_exits_when_it_is_loaded_fails_its_task(has_begun: bool) -> None:
    case = Case()
    if has_begun:
        case.begin()
    case.engine.got[0].set_result(report(payload=dumps(bodies.Exits())))
    assert case.tasks[0].wait(SOON) and case.tasks[0].status is TaskStatus.FAILED
    assert "cannot be loaded here" in str(case.tasks[0].exception())
    case.scheduler.shutdown()


def test_a_result_counts_though_nobody_has_heard_that_its_body_began() -> None:
    case = Case()
    case.engine.got[0].set_result(report(payload=dumps(7), records=()))
    assert case.tasks[0].result(SOON) == 7
    case.check(is_whole=True)
    kinds = [event.type.value for event in case.recorder.events]
    assert kinds == [CREATED, "TaskScheduled", "TaskStarted", "TaskCompleted"]


def test_the_callback_of_a_task_that_never_began_holds_up_no_other_end() -> None:
    case = Case()
    case.submit()
    can_end, called = threading.Event(), threading.Event()

    def wait(task: object) -> None:
        can_end.wait(SOON)
        called.set()

    case.tasks[0].add_done_callback(wait)
    for future in case.engine.got:
        future.set_exception(OSError("the executor is broken"))
    try:
        assert case.tasks[1].wait(SOON / 2)
        assert case.pool.join(0.05), "the pool has ended before a callback of its tasks"
    finally:
        can_end.set()
    case.scheduler.shutdown()
    assert called.is_set()


def test_where_a_body_was_at_its_deadline_is_told_though_its_report_comes_first() -> None:
    case = Case()
    task = case.scheduler.options(timeout=0.1).submit(bodies.nothing)
    failure = "TaskTimedOut", "late", "Stack: here\n"
    case.engine.got[1].set_result(report(TIMED_OUT, dumps(OSError()), failure, duration=0.2))
    assert task.wait(SOON) and task.status is TaskStatus.TIMED_OUT
    assert "Stack: here" in (task.snapshot().invocation_info or "")
    assert task.cancel_reason == "timeout"
    case.engine.end()
    case.scheduler.shutdown()


def test_a_task_that_has_ended_is_not_listed_as_abandoned_nor_as_running() -> None:
    case = Case()
    peer: Any = SimpleNamespace(worker="w")  # stands for a process; nobody is connected
    seen = []
    for _ in range(50):
        task = case.scheduler.submit(bodies.nothing)
        case.pool.said(peer, task.id, "w-1", 1, [(STARTED, time.time_ns(), None)])
        assert case.scheduler.health().running == 1
        case.engine.got[-1].set_result(report())
        assert task.wait(SOON)
        health = case.scheduler.health()
        seen.append((health.running, health.abandoned))
    assert set(seen) == {(0, ())}
    case.engine.end()
    case.scheduler.shutdown()


def test_an_executor_that_refuses_a_task_after_the_close_lets_the_pool_end() -> None:
    class Refuses(Waits):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            pool.shutdown(wait=False)
            raise RuntimeError("no more")

    pool = Scheduler(executor=Refuses())
    with pytest.raises(ShutdownError):
        pool.submit(bodies.nothing)
    assert pool._dispatcher.closed.wait(SOON)


def test_arguments_that_cannot_be_pickled_let_the_pool_end_that_is_closed_meanwhile() -> None:
    class Closes:
        def __reduce__(self) -> Any:
            pool.shutdown(wait=False)
            raise TypeError("not this one")

    pool = Scheduler(executor=Waits())
    with contextlib.suppress(ShutdownError):
        pool.submit(len, Closes())  # type: ignore[call-overload]
    pool.shutdown(wait=False)
    assert pool._dispatcher.closed.wait(SOON)


def test_a_scheduler_that_was_never_used_leaves_no_socket() -> None:
    before = channels()
    Scheduler(executor=Waits())
    gc.collect()
    assert channels() == before


def test_sinks_that_never_keep_up_take_a_share_of_the_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case()
    now = 1000.0
    slept = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now, slept
        now += seconds
        slept += seconds

    monkeypatch.setattr(module, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    intake = case.scheduler._dispatcher.intake
    monkeypatch.setattr(type(intake), "is_crowded", True)
    for _ in range(1000):
        case.pool.said(None, case.tasks[0].id, "w-1", 2, [])
        now += 0.1
    assert CROWDED / 2 < slept <= 1.1 * (CROWDED + SHARE * (now - 1000.0))
    monkeypatch.undo()
    case.engine.end()
    case.scheduler.shutdown()


def test_losses_are_counted_once_and_those_of_old_processes_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_LOSERS", 3)
    case = Case()
    for number in range(10):
        for total in (2, 2, 1, 3):  # what is older may come later
            case.pool.losses(f"w{number}", {(OUTPUT, "late"): total, (WARNING, "late"): 1})
        case.pool.losses("lives", {(PROGRESS, "late"): number + 1})
    assert case.scheduler.health().late_events == 10 * 4 + 10
    assert len(case.pool._lost) == 3 and "lives" in case.pool._lost
    case.engine.end()
    case.scheduler.shutdown()


def test_nothing_of_a_task_is_left_in_the_pool() -> None:
    case = Case()
    case.begin()
    assert not case.tasks[0].cancel()
    case.submit()
    assert case.tasks[1].cancel()
    case.engine.end()
    assert case.tasks[0].wait(SOON)
    until(lambda: not case.pool._handed)
    assert not case.pool.calls and not case.pool._running and not case.pool.ends
    case.scheduler.shutdown()
