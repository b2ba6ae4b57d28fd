"""What a type checker makes of bgworker: checked by ``mypy --strict``, never run.

This folder must stay without an ``__init__.py``: as a package it would hide the standard library's
``typing``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import bgworker
from bgworker import (
    Event,
    History,
    HookSink,
    JsonlSink,
    LifecycleEvent,
    Resumed,
    RetryPolicy,
    Scheduler,
    SchedulerHealth,
    Sink,
    SinkHealth,
    SinkOptions,
    StreamEvent,
    StuckThread,
    Task,
    TaskSnapshot,
    TaskStatus,
    WebhookSink,
    checkpoint,
    current_task,
    open_sink,
    resumable,
    shell,
)
from bgworker.webhook import new_secret, verify

if sys.version_info >= (3, 11):
    from typing import assert_type
else:
    T = TypeVar("T")

    def assert_type(value: T, kind: object, /) -> T:
        return value


def load(path: Path, *, limit: int = 10) -> list[str]:
    return path.read_text().splitlines()[:limit]


def submitting(pool: Scheduler) -> None:
    length: Task[int] = pool.submit(len, "x")
    assert_type(pool.submit(len, "x"), Task[int])
    assert_type(length.result(timeout=1.5), int)
    assert_type(pool.submit(load, Path("a"), limit=3), Task[list[str]])
    assert_type(pool.options(timeout=3).submit(load, Path("a")), Task[list[str]])
    assert_type(
        pool.options(name="load", timeout=None, metadata={"tries": [1, 2]})
        .submit(len, "x")
        .result(),
        int,
    )
    assert_type(pool.map(len, ["a", "bb"]), Iterator[int])
    assert_type(pool.options(timeout=3).map(len, ["a", "bb"]), Iterator[int])
    pool.submit(shell(["ls", "-l"], cwd="/", env={"A": "b"}))
    pool.submit(shell("ls | wc"))


async def fetch(url: str, *, tries: int = 3) -> bytes:
    await asyncio.sleep(0)
    return url.encode()


class Fetcher:
    async def __call__(self, url: str) -> bytes:
        return await fetch(url)

    async def method(self, url: str) -> bytes:
        return await self(url)


def submitting_coroutines(pool: Scheduler) -> None:
    assert_type(pool.submit(fetch, "a", tries=2), Task[bytes])
    assert_type(pool.options(timeout=3).submit(fetch, "a").result(), bytes)
    assert_type(pool.submit(Fetcher(), "a"), Task[bytes])
    assert_type(pool.submit(Fetcher().method, "a"), Task[bytes])
    assert_type(pool.submit(functools.partial(fetch, "a", tries=2)), Task[bytes])
    assert_type(pool.map(fetch, ["a", "b"]), Iterator[bytes])
    assert_type(pool.options(timeout=3).map(fetch, ["a", "b"]), Iterator[bytes])


def as_an_executor(executor: concurrent.futures.Executor) -> concurrent.futures.Future[int]:
    return executor.submit(len, "x")


def waiting(pool: Scheduler) -> None:
    as_an_executor(pool)
    tasks = [pool.submit(len, "a"), pool.submit(len, "b")]
    for done in concurrent.futures.as_completed(tasks, timeout=3):
        assert_type(done.result(), int)
    finished, unfinished = concurrent.futures.wait(tasks)
    assert_type(tasks[0].wait(timeout=2), bool)
    assert_type(tasks[0].cancel("no longer needed"), bool)
    tasks[0].add_done_callback(lambda task: print(task.result() + 1))


async def in_a_loop(pool: Scheduler) -> int:
    return await asyncio.wrap_future(pool.submit(len, "x"))


def inspecting(pool: Scheduler, task: Task[int]) -> None:
    assert_type(task.id, str)
    assert_type(task.name, str)
    assert_type(task.status, TaskStatus)
    assert_type(task.cancel_requested, bool)
    assert_type(task.snapshot(), TaskSnapshot)
    assert_type(task.snapshot().duration, "float | None")
    assert_type(task.streams(since=3), list[StreamEvent])
    assert_type(pool.tasks(status=TaskStatus.RUNNING), list[TaskSnapshot])
    assert_type(pool.get(task.id), TaskSnapshot)
    assert_type(pool.sinks, Mapping[str, SinkHealth])
    health = pool.health()
    assert_type(health, SchedulerHealth)
    assert_type(health.stuck, tuple[StuckThread, ...])
    assert_type(health.stuck[0].stack, str)
    assert_type(task.snapshot().result, "str | None")
    assert_type([each.since_utc.isoformat() for each in health.stuck], list[str])
    pool.resize(4)
    pool.listen("history.db")
    if pool.flush(timeout=2):
        pool.shutdown(wait=True, cancel_futures=True, timeout=10)


def inside_a_task() -> str:
    task = current_task()
    task.progress(3)
    task.progress(3, total=None, message="three")
    task.output("text")
    task.warning({"any": ["JSON", 1, None]})
    task.checkpoint()
    checkpoint()
    task.sleep(0.5)
    assert_type(task.time_remaining, "float | None")
    return task.id


class Counting:
    """A sink needs no base class."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, events: Sequence[Event]) -> None:
        self.count += len(events)

    def close(self) -> None:
        pass


class Posting:
    """A sink may write in a coroutine."""

    async def write(self, events: Sequence[Event]) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        pass


def receiving(headers: Mapping[str, str], body: bytes) -> None:
    assert_type(verify("whsec_", headers, body, tolerance=60), str)


class Printing(HookSink):
    def on_task_started(self, event: LifecycleEvent) -> None:
        print(event.task.name)

    def on_task_output(self, event: StreamEvent) -> None:
        print(event.payload)

    async def on_task_failed(self, event: LifecycleEvent) -> None:
        await asyncio.sleep(0)


def registering(health: SinkHealth) -> None:
    a_sink: Sink = Counting()
    with Scheduler(
        4,
        name="jobs",
        sinks=[a_sink, Posting(), Printing(), "jsonl:debug.jsonl"],
        keep_finished=None,
        record_result=True,
    ) as pool:
        assert_type(pool.options(record_result=None).submit(len, "x"), Task[int])
        options = SinkOptions(queue_size=10, overflow="drop_newest", retry=RetryPolicy(attempts=3))
        assert_type(pool.register_sink(Posting(), name="posting", options=options), str)
        assert_type(pool.register_sink("my.module:factory", colour="red"), str)
        assert_type(pool.unregister_sink("posting", timeout=1), SinkHealth)
        pool.register_sink(
            JsonlSink(Path("a.jsonl"), max_bytes=1 << 20, compress=True, durability="power")
        )
        pool.register_sink(
            WebhookSink("https://example.com", secret=[new_secret()], headers={"X-Team": "blue"})
        )
        pool.register_sink(open_sink("jsonl:debug.jsonl"))
    assert_type(
        health.delivered + health.coalesced + health.dropped + health.parked + health.pending, int
    )


@resumable("fetching", version=2)
def fetching(url: str, *, retries: int = 3) -> bytes:
    return url.encode()


def resuming(pool: Scheduler) -> None:
    assert_type(fetching("x"), bytes)
    assert_type(pool.submit(fetching, "x", retries=1), Task[bytes])
    resumed = pool.resume(Path("history.db"), attempts=5, also=["failed", TaskStatus.TIMED_OUT])
    assert_type(resumed, Resumed)
    assert_type([each.reason for each in resumed.skipped], list[str])
    assert_type(resumed.tasks[0].id, str)
    assert_type(resumed.left, int)


def telling_events_apart(event: Event) -> str:
    if isinstance(event, LifecycleEvent):
        return event.task.name
    if isinstance(event, StreamEvent):
        return event.payload
    assert_type(event, bgworker.LossEvent)
    return event.reason


def reading(path: Path) -> None:
    with History(path) as history:
        assert_type(
            history.tasks(
                status=TaskStatus.FAILED, name="load*", since=timedelta(days=1), limit=None
            ),
            list[TaskSnapshot],
        )
        assert_type(history.tasks(status="failed"), list[TaskSnapshot])
        assert_type(history.task("last"), TaskSnapshot)
        assert_type(
            history.streams("last", since=3, types=["error"], limit=10, newest=True),
            list[StreamEvent],
        )
        assert_type(history.follow("last"), Iterator[StreamEvent])
        assert_type(history.events(), Iterator[Event])
        assert_type(history.stats().counts, Mapping[TaskStatus, int])
        assert_type(history.stats().durations[0].p95, float)
        assert_type(history.runs()[0].is_alive, bool | None)
