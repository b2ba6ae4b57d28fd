"""Bodies of tasks for worker processes, which find them by name."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bgworker import TaskCancelled, current_task


def nothing() -> None:
    pass


def talk(count: int, pause: float = 0.0, every: int = 1) -> int:
    """Put out ``count`` numbers, with a pause after each ``every`` of them."""
    task = current_task()
    for number in range(count):
        task.output(str(number))
        if pause and number % every == 0:
            time.sleep(pause)
    return count


def process() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def wait_to_be_stopped(begun: str | None = None) -> None:
    if begun is not None:
        Path(begun).touch()
    current_task().output(str(os.getpid()))
    while True:
        current_task().sleep(0.5)


def stay(seconds: float, begun: str | None = None) -> float:
    """Look at no request to stop."""
    current_task().output(str(os.getpid()))
    if begun is not None:
        Path(begun).touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
    return seconds


def leave_a_thread(path: str) -> None:
    """Leave a thread behind that goes on to speak until there is a file."""
    task = current_task()

    def speak() -> None:
        while not os.path.exists(path):
            task.output("late")
            time.sleep(0.001)

    threading.Thread(target=speak, daemon=True).start()


def fork_a_child(seconds: float) -> int:
    """Fork a child that says something and stays for a while; return its process id."""
    task = current_task()
    task.output("parent")
    time.sleep(0.3)  # the channel is connected by now
    pid = os.fork()
    if pid == 0:
        for _ in range(100):
            task.output("child")
        time.sleep(seconds)
        os._exit(0)
    task.output("parent again")
    return pid


async def count_slowly(count: int) -> int:
    for number in range(count):
        current_task().output(number)
        await asyncio.sleep(0.01)
    return count


def forty_two_bytes_of_code() -> str:
    print("printed")
    print("told", file=sys.stderr)
    return "done"


class CannotBePickled(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class CannotBeLoaded(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


def give(what: str) -> Any:
    """Return or raise something that is trouble for whoever carries it."""
    if what == "lock":
        return threading.Lock()
    if what == "lambda":
        return lambda: 1
    if what == "unpicklable":
        raise CannotBePickled("held by a lock")
    if what == "unloadable":
        raise CannotBeLoaded(1, 2)
    if what == "exit":
        raise SystemExit(3)
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "cancelled":
        raise TaskCancelled("had enough")
    if what == "plain":
        raise LookupError("no such thing")
    if what == "deep":
        value: Any = []
        for _ in range(100_000):
            value = [value]
        return value
    return what


class Exits:
    """Exits when it is pickled or loaded: its author's code may do anything."""

    def __reduce__(self) -> Any:
        return (sys.exit, (4,))


class ExitsAtOnce:
    def __reduce__(self) -> Any:
        sys.exit(5)


def give_exits(*_: object) -> object:
    return ExitsAtOnce()


def hold_the_lock(seconds: float) -> None:
    """Let no other thread of the process run meanwhile, as one long call in C does."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
