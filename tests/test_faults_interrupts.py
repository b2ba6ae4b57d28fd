"""Wherever Ctrl-C strikes the main thread in our code, whoever comes next waits for nothing that
the interrupt has left behind.

Each case is something that a main thread does, and what must still work after it was interrupted at
any step. A pool's `submit`, `flush` and runs have such tests of their own, in
``running/test_pool.py``.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from bgworker import Scheduler, Task, current_task, shell
from bgworker.history.connections import Database
from bgworker.model.records import TaskState
from bgworker.model.reports import report, wait_for_reports
from bgworker.running.finished import Memory
from bgworker.shell.room import _Room
from bgworker.sinks.lockfile import LockFile
from bgworker.testing import FlakySink, Hang, MemorySink
from bgworker.web.connections import BoundedServer
from tests.interrupts import Interrupt, alarm, each_step, every_step, needs_signals
from tests.support import SOON, in_time, until

Case = Iterator["tuple[Callable[[], object], Callable[[], object]]"]
"""Yields, for each step anew, what is interrupted and what must work afterwards."""


def log() -> Case:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("bgworker")
    logger.addHandler(handler)

    def act() -> None:
        report(logging.WARNING, "struck")
        wait_for_reports(time.monotonic() + SOON)

    def check() -> None:
        report(logging.WARNING, "next")
        wait_for_reports(time.monotonic() + SOON)
        assert said[-1] == "next"

    try:
        while True:
            yield act, check
    finally:
        logger.removeHandler(handler)


def memory() -> Case:
    known = Memory(2, None)

    def act() -> None:
        for number in range(3):
            state = TaskState("", "load", "0" * 32, 0, number=number)
            known.add(state)
            known.retire([state])

    def check() -> None:
        known.retire([])
        assert len(known._finished) <= 2

    while True:
        yield act, check


def subscription() -> Case:
    with Scheduler(1) as pool:
        while True:
            with pool.subscribe() as following:

                def check() -> None:
                    assert pool.submit(int).result() == 0
                    while (event := following.get(SOON)) is not None:
                        if event.type.value == "TaskCompleted":
                            return
                    raise AssertionError("the end of the task has not come")

                yield lambda: following.get(0.001), check


def cancel(function: Callable[[], object]) -> Case:
    with Scheduler(1) as pool:
        while True:
            task = pool.submit(function)
            # it waits: only then is there somebody to wake
            until(lambda: has_waiter(task))

            def check() -> None:
                task.cancel()
                assert task.wait(SOON) and task.cancelled()

            yield task.cancel, check


def has_waiter(task: Task[Any]) -> bool:
    context = task._task_state.context
    event = getattr(context, "_stop_event", None)
    return bool(getattr(context, "_wakers", ()) or event is not None and event._sleepers)


def cancel_of_a_sleep() -> Case:
    return cancel(lambda: current_task().sleep(2 * SOON))


def cancel_of_a_command() -> Case:
    return cancel(shell(["sleep", str(2 * SOON)]))


def cancel_of_a_coroutine() -> Case:
    async def work() -> None:
        await asyncio.sleep(2 * SOON)

    return cancel(work)  # type: ignore[arg-type]


def room_for_commands() -> Case:
    # not as an attribute of bgworker.shell, which is the function once somebody has asked for it
    module = importlib.import_module("bgworker.shell.room")
    room = _Room()
    room.enter()
    look, module.LOOK = module.LOOK, 0.001  # type: ignore[attr-defined]
    shortage = OSError(errno.EAGAIN, "no process is left")

    def act() -> None:
        room.enter()
        room.wait(shortage)
        room.leave()

    def check() -> None:
        room.enter()
        room.leave()
        room.leave()
        assert room.wait(shortage)

    try:
        while True:
            yield act, check
    finally:
        module.LOOK = look  # type: ignore[attr-defined]


def memory_sink() -> Case:
    while True:
        sink = MemorySink()

        def act() -> None:
            sink.wait_for(0)
            with pytest.raises(AssertionError):
                sink.wait_for(1, timeout=0.001)

        def check() -> None:
            sink.write(())
            assert sink.batches

        yield act, check


def hang() -> Case:
    while True:
        step = Hang()

        def check() -> None:
            assert not step.entered.is_set()
            step.release()
            step.act((), lambda events: None)

        yield lambda: (step.entered.wait(0.001), step.release()), check


def database() -> Case:
    lent = Database(":memory:", lambda: sqlite3.connect(":memory:", check_same_thread=False))

    def use() -> None:
        with lent as connection:
            connection.execute("SELECT 1")

    try:
        while True:
            yield use, use
    finally:
        lent.close()


def lock_file() -> Case:
    lock = LockFile.share(f"/tmp/bgworker-test-{os.getpid()}.lock")

    def use() -> None:
        with lock:
            pass

    try:
        while True:
            yield use, use
    finally:
        lock.leave()
        os.unlink(lock.path)


def connection() -> Case:
    class Answer(BaseHTTPRequestHandler):
        def handle(self) -> None:
            pass

    while True:
        server = BoundedServer("127.0.0.1", 0, Answer)
        ours, theirs = socket.socketpair()

        def act() -> None:
            server.process_request(ours, ("127.0.0.1", 0))

        def check() -> None:
            server.server_close()
            until(lambda: not server._clients)
            ours.close()
            theirs.close()

        yield act, check


STARTING = (log, connection)
"""Those that start threads, which Python itself makes no promise for: struck in ``Thread.start``,
the new thread never begins."""

CASES = [log, memory, subscription, cancel_of_a_sleep, cancel_of_a_command, cancel_of_a_coroutine,
         room_for_commands, memory_sink, hang, database, lock_file, connection]


def run_case(case: Callable[[], Case]) -> None:
    """Interrupt what the case does at each of its steps, and see to what must work then."""
    rounds = case()
    try:
        act, check = next(rounds)
        for where in every_step(lambda: act(), everywhere=case not in STARTING):
            try:
                in_time(check)
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            act, check = next(rounds)
        in_time(check)
    finally:
        rounds.close()  # type: ignore[attr-defined]


@each_step
@pytest.mark.parametrize("case", CASES)
def test_nobody_waits_for_what_an_interrupt_has_left_behind(case: Callable[[], Case]) -> None:
    run_case(case)


@each_step
def test_the_harness_notices_a_lock_that_is_left_behind() -> None:
    news = threading.Condition()

    def case() -> Case:
        def use() -> None:
            with news:
                pass

        while True:
            yield use, lambda: in_time(use, 0.5)

    with pytest.raises(AssertionError, match="__enter__.* does not end"):
        run_case(case)
    news.release()


@needs_signals
def test_ctrl_c_in_the_end_of_a_sink_costs_it_no_event() -> None:
    hang = Hang()
    sink = FlakySink(hang)
    with Scheduler(1) as pool:
        name = pool.register_sink(sink)
        pool.submit(int).result(SOON)
        assert hang.entered.wait(SOON)
        with pytest.raises(Interrupt), alarm(0.02):
            pool.unregister_sink(name, timeout=SOON)
        opening = threading.Timer(0.05, hang.release)
        opening.start()
        account = pool.unregister_sink(name, timeout=SOON)
        opening.join()
    assert (account.delivered, account.dropped) == (4, 0) and len(sink.sink.events) == 4
