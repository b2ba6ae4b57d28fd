"""Random control: whatever is done to a pool in whatever order, from however many threads, every
task that began has exactly one terminal event, that of its future, and the process ends.

The tests are a short smoke of what ``tools/stress.py control`` does for minutes. A child process of
its own, which is told to stop by SIGINT somewhere, runs the same.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import faulthandler
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bgworker.running.pool
import bgworker.running.task
from bgworker import (
    BgworkerError, PoolStuck, Scheduler, ShutdownError, Task, TaskCancelled, current_task)
from bgworker.testing import MemorySink
from tests.support import ROOT

LONG = 60.0

REASONABLE = (
    BgworkerError,
    TaskCancelled,
    concurrent.futures.CancelledError,
    asyncio.CancelledError,
    concurrent.futures.TimeoutError,
    asyncio.TimeoutError,
    ValueError,
)
"""What a wait may raise here: the other was cancelled, timed out, failed, or could not be run."""

ENDS = {"TaskCompleted": "completed", "TaskFailed": "failed", "TaskCancelled": "cancelled",
        "TaskTimedOut": "timed_out"}


class Hostile(ValueError):
    """An exception that takes its time to be shown, and raises then."""

    def __str__(self) -> str:
        time.sleep(0.002)
        raise SystemExit("not to be shown")


class Control:
    """One pool and all that is done to it, as a seed has it.

    Args:
        seed: of everything that is left to chance.
        sinks: of the pool.
    """

    def __init__(self, seed: int, sinks: Any) -> None:
        self.random = random.Random(seed)
        choose = self.random.choice
        self.pool = Scheduler(
            choose([1, 1, 2, 4]),
            sinks=sinks,
            keep_finished=choose([0, 10, None]),
            max_stuck=choose([0, 0, 1, 2, 256]),
            close_timeout=LONG,
        )
        self.tasks: list[Task[Any]] = []
        self.is_over = False
        self.kinds: list[Callable[[int], Any]] = [
            self.returns,
            self.returns,
            self.raises,
            self.is_hostile,
            self.talks,
            self.sleeps,
            self.never_looks,
            self.reacts,
            self.waits,
            self.waits,
            self.waits_a_little,
            self.waits_for_all,
            self.takes_as_completed,
            self.awaits,
            self.awaits,
            self.awaits_and_waits,
            self.cancels_itself,
            self.controls,
        ]

    # -- what tasks do --

    def returns(self, depth: int) -> int:
        return depth

    def raises(self, depth: int) -> None:
        raise self.random.choice(
            [ValueError("own"), SystemExit(3), TaskCancelled("own"), KeyboardInterrupt()]
        )

    def is_hostile(self, depth: int) -> None:
        raise Hostile

    def talks(self, depth: int) -> None:
        print("captured, maybe", file=sys.stdout if depth % 2 else sys.stderr)
        for number in range(20):
            current_task().output("talking")
            current_task().progress(number)

    def sleeps(self, depth: int) -> None:
        current_task().sleep(self.random.choice([0, 0.002, 0.02]))

    def never_looks(self, depth: int) -> None:
        time.sleep(self.random.choice([0, 0.001, 0.01, 0.05]))

    def reacts(self, depth: int) -> None:
        woken = threading.Event()
        with current_task()._woken_by(woken.set):
            woken.wait(0.03)
        current_task().checkpoint()

    def waits(self, depth: int) -> None:
        for task in self.several(depth):
            self.result_of(task)
        if self.random.random() < 0.3:
            time.sleep(0.005)
            current_task().output("after the wait")

    def waits_a_little(self, depth: int) -> None:
        for task in self.several(depth):
            self.result_of(task, self.random.choice([0, 0.001, 0.01]))

    def waits_for_all(self, depth: int) -> None:
        with contextlib.suppress(*REASONABLE):
            concurrent.futures.wait(self.several(depth))

    def takes_as_completed(self, depth: int) -> None:
        with contextlib.suppress(*REASONABLE):
            for task in concurrent.futures.as_completed(self.several(depth)):
                assert task.done()

    async def awaits(self, depth: int) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, self.several(depth)), return_exceptions=True)
        await asyncio.sleep(self.random.choice([0, 0.01]))

    async def awaits_and_waits(self, depth: int) -> None:
        for task in self.several(depth):
            if self.random.random() < 0.5:
                self.result_of(task)
            else:
                with contextlib.suppress(*REASONABLE):
                    await asyncio.wait_for(
                        asyncio.wrap_future(task), self.random.choice([0.001, LONG])
                    )

    def cancels_itself(self, depth: int) -> None:
        for task in self.tasks[-5:]:
            task.cancel(self.random.choice([None, "from inside", ""]))  # type: ignore[arg-type]
        current_task().checkpoint()

    def controls(self, depth: int) -> None:
        self.act()

    def result_of(self, task: Task[Any], timeout: float | None = None) -> None:
        with contextlib.suppress(*REASONABLE, SystemExit, KeyboardInterrupt):
            task.result(timeout)

    # -- what is done to the pool --

    def submit(self, depth: int) -> Task[Any] | None:
        choose = self.random.choice
        options = self.pool.options(timeout=choose([None, None, None, 0.001, 0.01, 0.03, LONG]),
                                    capture_output=self.random.random() < 0.1)
        try:
            task = options.submit(choose(self.kinds), depth - 1)
        except (PoolStuck, ShutdownError):
            return None
        self.tasks.append(task)
        if self.random.random() < 0.1:
            with contextlib.suppress(SystemExit):
                # of one that is called at once, for the task has ended
                task.add_done_callback(
                    choose([self.exits, self.raises_in_a_callback, self.submits_another])
                )
        return task

    def exits(self, task: object) -> None:
        raise SystemExit("from a callback")

    def raises_in_a_callback(self, task: object) -> None:
        raise ValueError("from a callback")

    def submits_another(self, task: object) -> None:
        self.submit(0)

    def several(self, depth: int) -> list[Task[Any]]:
        tasks = [
            self.submit(depth) for _ in range(self.random.choice([1, 2, 3]) if depth > 0 else 0)
        ]
        return [task for task in tasks if task is not None]

    def act(self) -> None:
        action = self.random.random()
        if action < 0.3 and self.tasks:
            self.random.choice(self.tasks).cancel()
        elif action < 0.4:
            self.pool.resize(self.random.choice([1, 2, 3, 5]))
        elif action < 0.5:
            self.pool.health()
        elif action < 0.55:
            self.pool.flush(0.001)
        elif action < 0.6:
            time.sleep(0.003)
        else:
            self.submit(self.random.choice([0, 1, 2, 3]))

    def drive(self, steps: int) -> None:
        """Do this and that to the pool. Any number of threads at once."""
        for _ in range(steps):
            if self.is_over:
                return
            self.act()

    def end(self) -> bool:
        """Shut the pool down in some way; False where that may leave tasks to themselves."""
        self.is_over = True
        way = self.random.randrange(6)
        if way == 0:
            self.pool.shutdown(timeout=self.random.choice([0.0, 0.01, 0.1]))
            self.pool.shutdown()
            return False
        if way == 1:
            self.pool.shutdown(wait=False, cancel_futures=self.random.random() < 0.5)
        self.pool.shutdown(cancel_futures=way in (2, 3, 4))
        return True


@contextlib.contextmanager
def short_patience() -> Iterator[None]:
    """Have the pool lose its patience soon, and nobody see what is said."""
    before = bgworker.running.pool.STANDSTILL, sys.getswitchinterval()
    bgworker.running.pool.STANDSTILL = 0.05
    loggers = [logging.getLogger(name) for name in ("bgworker", "concurrent.futures", "asyncio")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        bgworker.running.pool.STANDSTILL = before[0]
        sys.setswitchinterval(before[1])
        for each, level in zip(loggers, levels):
            each.setLevel(level)


def run_one(seed: int) -> collections.Counter[str]:
    """One pool's life. Return how its tasks ended."""
    sink = MemorySink()
    sys.setswitchinterval(random.Random(seed).choice([0.005, 0.005, 1e-4, 1e-6]))
    control = Control(seed, [sink])
    drivers = [
        threading.Thread(target=control.drive, args=(40,), name=f"driver-{n}") for n in range(2)
    ]
    for driver in drivers:
        driver.start()
    control.drive(control.random.choice([0, 5, 20, 40]))
    has_all = control.end()
    for driver in drivers:
        driver.join(LONG)
        assert not driver.is_alive(), f"seed {seed}: a driver hangs"
    return check(seed, control.tasks, sink.events, has_all)


def check(
    seed: int, tasks: list[Task[Any]], events: list[Any], has_all: bool
) -> collections.Counter[str]:
    """Check what was promised of all tasks."""
    by_task: dict[str, list[Any]] = {}
    for event in events:
        by_task.setdefault(event.task_id, []).append(event)
    for task in tasks:
        of_task = by_task.get(task.id, [])
        names = [each.type.value for each in of_task]
        said = f"seed {seed}: {task}, {names}, {'waited for' if has_all else 'given up'}"
        assert [each.seq for each in of_task] == list(range(1, len(names) + 1)), said
        ends = [each for each in names if each in ENDS]
        if not ends and not has_all:
            continue  # left to itself
        # the thread of one that was given up may stand between the record of its end and the end
        assert task.done() if has_all else task.wait(LONG), said
        assert len(ends) == 1 and names[-1] == ends[0] and ENDS[ends[0]] == task.status.value, said
    return collections.Counter(task.status.value for task in tasks)


def run_for(seconds: float, seed: int) -> tuple[int, collections.Counter[str]]:
    """Live one pool's life after the other; dump all threads and exit when one does not end."""
    total: collections.Counter[str] = collections.Counter()
    until, rounds = time.monotonic() + seconds, 0
    with short_patience():
        while time.monotonic() < until:
            faulthandler.dump_traceback_later(2 * LONG, exit=True, file=sys.__stderr__)
            total += run_one(seed + rounds)
            rounds += 1
            faulthandler.cancel_dump_traceback_later()
    return rounds, total


# -- interrupted --


def in_child(seed: int, path: str) -> None:
    """Do this and that until SIGINT comes, then end as programs end."""
    faulthandler.dump_traceback_later(2 * LONG, exit=True)
    chance = random.Random(seed)
    sys.setswitchinterval(chance.choice([0.005, 1e-5]))
    logging.disable(logging.CRITICAL)
    way = chance.choice(["with", "with", "exit", "now"])
    parent, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        if way == "with":
            with Scheduler(4, sinks=[f"jsonl:{path}"], keep_finished=0) as pool:
                pool.submit(int)
                print("ready", file=parent, flush=True)
                while True:
                    pool.submit(int)
        control = Control(seed, [f"jsonl:{path}"])
        control.drive(10)
        print("ready", file=parent, flush=True)
        while True:
            control.tasks.clear()
            control.drive(100)
            if way == "now":
                control.pool.shutdown()
                control = Control(seed, [f"jsonl:{path}"])
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted", file=parent, flush=True)


def struck(child: subprocess.Popen[str], errors: Path) -> str:
    """Interrupt a child, and return what it says until its end.

    Python drops an interrupt that strikes in a finaliser or in the callback of a weak reference; it
    says so, and needs another.
    """
    until, dropped = time.monotonic() + LONG, 0
    child.send_signal(signal.SIGINT)
    while True:
        try:
            return child.communicate(timeout=1.0)[0]
        except subprocess.TimeoutExpired:
            assert time.monotonic() < until, "it does not end"
        told = errors.read_text("utf-8", "replace").count("KeyboardInterrupt")
        if told > dropped:
            dropped = told
            child.send_signal(signal.SIGINT)


def interrupt_one(seed: int, folder: Path) -> int:
    """Let a child run, and interrupt it; return how many tasks it has recorded."""
    path = folder / f"{seed}.jsonl"
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
              f"import {__name__} as control; control.in_child({seed}, {str(path)!r})")
    chance = random.Random(seed)
    errors = folder / f"{seed}.err"
    with errors.open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(chance.choice([0.0, 0.01, 0.02, 0.05]) + chance.random() * 0.01)
        said = struck(child, errors)
    finally:
        child.kill()
        child.wait(LONG)
        child.stdout.close() if child.stdout is not None else None
        complaints = errors.read_text("utf-8", "replace")
    # an interrupt inside of `exec` (a dataclass is being made) is the exit code, although it was
    # caught
    assert child.returncode in (0, -signal.SIGINT) and "interrupted" in said, (
        f"seed {seed}: {child.returncode} {said} {complaints[-5000:]}")
    began: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        event = json.loads(line)
        assert (
            began.get(event["task_id"], "") not in ENDS
        ), f"seed {seed}: {line} comes after the end"
        began[event["task_id"]] = event["type"]
    open_ended = {task: last for task, last in began.items() if last not in ENDS}
    assert not open_ended, f"seed {seed}: {open_ended}\n{complaints[-3000:]}"
    path.unlink(missing_ok=True)
    return len(began)


@pytest.mark.parametrize("start", range(0, 60, 15))
def test_whatever_is_done_to_a_pool_each_task_ends_once_and_as_its_future_says(start: int) -> None:
    with short_patience():
        for seed in range(start, start + 15):
            run_one(seed)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process there")
def test_wherever_an_interrupt_strikes_the_process_ends_and_each_task_of_its_record_has_its_end(
    tmp_path: Path,
) -> None:
    assert sum(interrupt_one(seed, tmp_path) for seed in range(6)) > 0


DROPS = """
import sys
class Late:
    def __del__(self):
        print("ready", flush=True)
        while True:
            pass
Late()
print("went on", flush=True)
try:
    while True:
        pass
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process there")
def test_a_child_that_python_keeps_an_interrupt_from_is_interrupted_again(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", DROPS], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        assert struck(child, tmp_path / "errors") == "went on\ninterrupted\n"
    finally:
        child.kill()
        child.wait(LONG)


def test_the_check_sees_a_task_without_its_end_and_one_that_ended_otherwise() -> None:
    sink = MemorySink()
    with Scheduler(1, sinks=[sink]) as pool:
        task = pool.submit(len, "")
        task.result(LONG)
    with pytest.raises(AssertionError):
        check(0, [task], sink.events[:-1], True)
    task._task_state.status = bgworker.TaskStatus.FAILED
    with pytest.raises(AssertionError):
        check(0, [task], sink.events, True)
