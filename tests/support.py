"""What the tests of several rooms use: waits that end, gates, a sink that records, child processes.

No test is in here.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bgworker import SinkHealth, StreamEvent, Task
from bgworker.testing import MemorySink

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the repository, in which `bgworker` and `tests` can be imported."""

SOON = 30.0
"""Seconds after which what should have happened long ago counts as hanging."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# -- waits and threads --


def until(condition: Callable[[], object], seconds: float = SOON) -> None:
    """Wait for what no event tells of; fail when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


class Gate:
    """A callable that tells when it runs, and returns ``result`` when it is let go."""

    def __init__(self, result: object = None) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.result = result

    def __call__(self) -> object:
        self.entered.set()
        assert self.opened.wait(SOON), "nobody opened the gate"
        return self.result

    def open(self) -> None:
        self.opened.set()


def started(function: Callable[[], object]) -> threading.Thread:
    """Run the function on another thread."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def joined(*threads: threading.Thread, seconds: float = SOON) -> None:
    """Wait for the ends of threads; fail when one does not end in time."""
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), f"{thread.name} does not end"


def in_time(function: Callable[[], T], seconds: float = SOON) -> T:
    """Call something that must return by itself on another thread, so that a hang fails the test
    and does not end the run."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    joined(started(call), seconds=seconds)
    if errors:
        raise errors[0]
    return results[0]


# -- tasks, sinks, accounts --


def fail(error: BaseException) -> None:
    raise error


class RecordingSink(MemorySink):
    """A `MemorySink` that tells what it has of one task, and when it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()

    def close(self) -> None:
        super().close()
        self.closed.set()

    def of(self, task: Task[Any]) -> list[Any]:
        """Return the task's events."""
        return [each for each in self.events if getattr(each, "task_id", None) == task.id]

    def types(self, task: Task[Any]) -> list[str]:
        """Return the types of the task's events."""
        return [each.type.value for each in self.of(task)]

    def said(self, task: Task[Any]) -> list[tuple[str, str]]:
        """Return what the task said, as pairs of stream and payload."""
        return [(each.stream_type.value, each.payload) for each in self.of(task)
                if isinstance(each, StreamEvent)]


def balanced(health: SinkHealth) -> bool:
    """Tell whether each event that was given to a sink is in exactly one column of its account."""
    assert health.dropped == sum(health.dropped_by_reason.values())
    return health.emitted == (
        health.delivered + health.coalesced + health.dropped + health.parked + health.pending
    )


# -- other processes --


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, in which a Python finds the package wherever it is."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def forked(run: Callable[[], object]) -> int:
    """Run something in a forked child; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_code(pid: int) -> int:
    """Wait for the end of a child, and return its exit code; that of signal 9 is -9."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(act: Callable[[], object], *, as_nobody: bool = False) -> str:
    """Return the text of what ``act`` returns in a forked child, or of what it raises there.

    Args:
        as_nobody: the child may do no more to files than their permissions say, even if this
            process is root's.
    """
    reading, writing = os.pipe()

    def run() -> None:
        try:
            if as_nobody and os.geteuid() == 0:
                os.setresgid(65534, 65534, 0)
                os.setresuid(65534, 65534, 0)
            answer = str(act())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())

    pid = forked(run)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    assert exit_code(pid) == 0
    return answer
