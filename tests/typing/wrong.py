"""Mistakes that a type checker must find: checked by ``mypy --strict``, never run.

Each ``type: ignore`` names the error that it expects; one that has nothing to ignore fails the
check.
"""

from __future__ import annotations

from collections.abc import Sequence

from bgworker import (Event, HookSink, Scheduler, SinkOptions, StreamEvent, Task, current_task,
                      resumable)


class Deaf:
    def close(self) -> None:
        pass


class Misled:
    def write(self, events: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass


async def fetch(url: str) -> bytes:
    return url.encode()


class Unlike(HookSink):
    def on_task_output(self, event: int) -> None:  # type: ignore[override]
        pass


def wrong(pool: Scheduler, event: Event, said: StreamEvent) -> None:
    pool.submit(len, 3)  # type: ignore[call-overload]
    pool.submit(len)  # type: ignore[call-overload]
    pool.submit(len, "x", timeout=3)  # type: ignore[call-arg, arg-type]
    pool.submit("len", "x")  # type: ignore[call-overload]
    pool.options(timeout="3")  # type: ignore[arg-type]
    pool.options(timeout=3).submit(len, 3)  # type: ignore[call-overload]
    pool.options(retries=3)  # type: ignore[call-arg]
    pool.map(len, 3)  # type: ignore[call-overload]
    lengths: list[str] = list(pool.map(len, ["a"]))  # type: ignore[arg-type]
    text: Task[str] = pool.submit(len, "x")  # type: ignore[call-overload]
    pool.submit(fetch, "x").result().close()  # type: ignore[attr-defined]
    pool.submit(fetch, 3)  # type: ignore[call-overload]
    pool.submit(fetch("x"))  # type: ignore[call-overload]
    pool.submit(resumable("x")(fetch), 3)  # type: ignore[call-overload]
    resumable(fetch)  # type: ignore[arg-type]
    pool.resume("x.db", 3)  # type: ignore[call-arg]
    pool.health().running = 3  # type: ignore[misc]
    current_task().progress("half")  # type: ignore[arg-type]
    pool.register_sink(Deaf())  # type: ignore[arg-type]
    pool.register_sink(Misled())  # type: ignore[arg-type]
    SinkOptions(overflow="drop_some")  # type: ignore[arg-type]
    SinkOptions(10)  # type: ignore[call-arg]
    said.payload = "changed"  # type: ignore[misc]
    event.payload  # type: ignore[union-attr]
