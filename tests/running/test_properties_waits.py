"""Tasks of every kind that wait for one another in every way, in pools too small for them: each
ends, and once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import bgworker.running.pool
from bgworker import BgworkerError, PoolStuck, Scheduler, Task, TaskStatus, current_task
from bgworker.testing import MemorySink

LONG = 60.0

REASONABLE = (
    BgworkerError,
    asyncio.TimeoutError,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
)
"""What a wait may raise here: the other was cancelled, timed out, or could not be run."""


class Forest:
    """Trees of tasks: each submits some others and waits for them, in a way of its own."""

    def __init__(self, seed: int, pool: Scheduler) -> None:
        self.random = random.Random(seed)
        self.pool = pool
        self.tasks: list[Task[Any]] = []
        self.kinds: list[Callable[[int], Any]] = [
            self.waits,
            self.waits_for_all,
            self.takes_as_completed,
            self.awaits,
            self.awaits,
            self.blocks_or_awaits,
            self.runs_a_loop,
            self.looks,
            self.looks_in_a_loop,
            self.never_looks,
        ]

    def submit(self, depth: int) -> Task[Any]:
        options = self.pool.options(
            timeout=self.random.choice([None, None, None, 0.01, 0.05, LONG]),
            capture_output=self.random.random() < 0.1,
        )
        kind = self.random.choice(self.kinds)
        while True:
            try:
                task = options.submit(kind, depth - 1)
            except PoolStuck:
                time.sleep(0.01)
            else:
                self.tasks.append(task)
                return task

    def several(self, depth: int) -> list[Task[Any]]:
        return [
            self.submit(depth) for _ in range(self.random.choice([1, 2, 3]) if depth > 0 else 0)
        ]

    def waits(self, depth: int) -> None:
        for task in self.several(depth):
            self.result_of(task)

    def result_of(self, task: Task[Any]) -> None:
        try:
            task.result()
        except REASONABLE:
            pass

    def waits_for_all(self, depth: int) -> None:
        concurrent.futures.wait(self.several(depth))

    def takes_as_completed(self, depth: int) -> None:
        for task in concurrent.futures.as_completed(self.several(depth)):
            assert task.done()

    async def awaits(self, depth: int) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, self.several(depth)), return_exceptions=True)
        await asyncio.sleep(0)

    async def blocks_or_awaits(self, depth: int) -> None:
        for task in self.several(depth):
            if self.random.random() < 0.5:
                self.result_of(task)
            else:
                try:
                    await asyncio.wait_for(
                        asyncio.wrap_future(task), self.random.choice([0.001, LONG])
                    )
                except REASONABLE:
                    pass

    def runs_a_loop(self, depth: int) -> None:
        coroutine = self.awaits(depth)
        try:
            asyncio.run(coroutine)
        finally:
            coroutine.close()  # where no thread is left for a second loop, it has not begun

    def looks(self, depth: int) -> None:
        current_task().output("looking")
        current_task().checkpoint()

    async def looks_in_a_loop(self, depth: int) -> None:
        await asyncio.sleep(self.random.choice([0, 0, 0.002]))
        current_task().output("looking")

    def never_looks(self, depth: int) -> None:
        time.sleep(self.random.choice([0, 0.001, 0.03]))


def grow(seed: int, max_stuck: int) -> Forest:
    sink = MemorySink()
    workers = random.Random(seed).choice([1, 1, 2, 3])
    with Scheduler(workers, sinks=[sink], keep_finished=None, max_stuck=max_stuck) as pool:
        forest = Forest(seed, pool)
        roots = [forest.submit(3) for _ in range(6)]
        for task in roots[::3]:
            time.sleep(forest.random.random() * 0.01)
            task.cancel()
        for task in roots:
            assert task.wait(LONG), f"seed {seed}: {task} never ended"
        for task in forest.tasks:  # also those that a task which was cancelled left behind
            assert task.wait(LONG), f"seed {seed}: {task} never ended"
    by_task: dict[str, list[Any]] = {}
    for event in sink.events:
        by_task.setdefault(event.task_id, []).append(event)
    for task in forest.tasks:
        events = by_task[task.id]
        assert [each.seq for each in events] == list(range(1, len(events) + 1)), f"seed {seed}"
        ends = [
            each
            for each in events
            if getattr(each, "task", None) is not None and each.task.status.is_final
        ]
        assert ends == events[-1:] and ends[0].task.status is task.status, f"seed {seed}"
    assert not [
        each
        for each in threading.enumerate()
        if each in {w.thread for w in pool._pool._roster.active()}
    ]
    return forest


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_all_tasks_of_a_forest_end_and_none_fails(start: int) -> None:
    for seed in range(start, start + 25):
        failed = [each for each in grow(seed, 256).tasks if each.status is TaskStatus.FAILED]
        assert not failed, f"seed {seed}: {failed[0].snapshot().invocation_info}"


def test_all_tasks_of_a_forest_end_also_where_too_many_threads_are_stuck(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bgworker.running.pool, "STANDSTILL", 0.02)
    caplog.set_level(logging.CRITICAL, "bgworker")
    for seed in range(40):
        grow(seed, seed % 2)
