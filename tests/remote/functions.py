"""The functions that the tests run elsewhere: a worker process imports them from here by name."""

from __future__ import annotations

import asyncio
import copyreg
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from bgworker import TaskCancelled, checkpoint, current_task

LONG = 30.0
"""Seconds after which a body gives up waiting for its test."""


def echo(*args: object, **kwargs: object) -> tuple[tuple[object, ...], dict[str, object]]:
    return args, kwargs


def double(number: int) -> int:
    return 2 * number


def nothing() -> None:
    pass


def place() -> tuple[int, int]:
    """Return in which process and thread it runs, after a moment in which others may run."""
    time.sleep(0.01)
    return os.getpid(), threading.get_ident()


def interpreter() -> int:
    """Return which interpreter of its process it runs in; 0 is the first."""
    if sys.version_info < (3, 14):
        return 0
    from concurrent import interpreters

    return interpreters.get_current().id


def resources() -> tuple[int, int]:
    """Return how many threads and descriptors its process has."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


# -- what waits for its test --


def hold(path: str, result: object = None, looks: bool = False) -> object:
    """Tell that it runs, in the file ``path``.entered, and wait for the file ``path``.open.

    Args:
        looks: whether it looks meanwhile if it is to stop.
    """
    enter(path)
    deadline = time.monotonic() + LONG
    while not os.path.exists(f"{path}.open"):
        if time.monotonic() > deadline:
            raise RuntimeError("nobody opened")
        if looks:
            checkpoint()
        time.sleep(0.002)
    return result


def enter(path: str) -> None:
    """Tell that a body runs: a line with its process for each time that it is begun."""
    with open(f"{path}.entered", "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")


def talk_and_hold(path: str, *said: object) -> str:
    for each in said:
        current_task().output(each)
    hold(path)
    return "let go"


def hold_and_talk(path: str) -> str:
    """Be held until long after the deadline, then say something that comes too late."""
    current_task().output("in time")
    hold(path)
    current_task().output("too late")
    current_task().error("too late")
    return "late"


def sleep(path: str, seconds: float = LONG) -> None:
    enter(path)
    current_task().sleep(seconds)


def say_why(path: str) -> str:
    """Wait to be asked to stop; tell why it was, and go on."""
    try:
        hold(path, looks=True)
    except TaskCancelled as error:
        current_task().output([str(error), current_task().cancel_reason,
                               current_task().cancel_requested])
    return "went on"


def time_left(path: str) -> tuple[float | None, float | None]:
    before = current_task().time_remaining
    current_task().sleep(0.05)
    return before, current_task().time_remaining


# -- what speaks --


def who() -> dict[str, Any]:
    """Return what a body knows of its task."""
    task = current_task()
    return {
        "id": task.id, "name": task.name, "metadata": dict(task.metadata),
        "cancel_requested": task.cancel_requested, "cancel_reason": task.cancel_reason,
        "time_remaining": task.time_remaining,
    }


def speak(*words: tuple[str, object]) -> int:
    """Say each of the pairs of stream and value."""
    for stream, value in words:
        getattr(current_task(), stream)(value)
    return len(words)


def recite(lines: int, width: int = 60, pause: float = 0.0) -> int:
    task = current_task()
    for number in range(lines):
        task.output(f"{number} {'x' * width}")
        if pause:
            time.sleep(pause)
    return lines


def count_up(steps: int, pause: float = 0.0) -> int:
    for step in range(1, steps + 1):
        current_task().progress(step, steps, f"{step} of {steps}")
        time.sleep(pause)
    return steps


def print_and_log() -> None:
    print("printed")
    print("to stderr", file=sys.stderr)
    logging.getLogger("functions").warning("logged %d", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # it is an error in the tests
        warnings.warn("warned", UserWarning, stacklevel=1)
    print("no newline", end="")


def speak_then(act: str, path: str) -> None:
    """Say something, tell the test when that is old enough to have been sent, and then die."""
    current_task().output("before the end")
    current_task().progress(50)
    hold(path)
    die(act)


def die(act: str) -> None:
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "exit":
        os._exit(3)
    elif act == "segfault":
        import faulthandler

        faulthandler.disable()  # it would write to the terminal of the tests
        faulthandler._sigsegv()  # type: ignore[attr-defined]


def die_the_first_time(first: str, second: str) -> str:
    """Be held twice; have the process killed after the first."""
    is_first = not os.path.exists(f"{first}.entered")
    current_task().output("first" if is_first else "second")
    hold(first if is_first else second)
    if is_first:
        die("kill")
    return "done"


# -- what fails --


class Stateful(Exception):
    """An exception with more than its arguments."""

    def __init__(self, code: int, where: str = "here") -> None:
        super().__init__(code)
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        return Stateful, (self.args[0], self.where)


class Unloadable(Exception):
    """An exception that pickle can write and cannot read: it lacks an argument then."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class Unpicklable(Exception):
    """An exception that holds something that cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Closed(Exception):
    """An exception whose attributes cannot be set."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class Abort(BaseException):
    """Nothing that ``except Exception`` catches."""


def boom(kind: str = "ValueError") -> None:
    current_task().output("about to fail")
    if kind == "ValueError":
        raise ValueError("boom", 5)
    if kind == "cause":
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    if kind == "notes":
        problem = ValueError("noted")
        problem.add_note("a note of there")  # type: ignore[attr-defined]
        raise problem
    if kind == "Stateful":
        raise Stateful(7, "there")
    if kind == "Unloadable":
        copyreg.dispatch_table.pop(Unloadable, None)  # dask makes all exceptions loadable
        raise Unloadable(7, "cannot be loaded")
    if kind == "Unpicklable":
        raise Unpicklable("cannot be pickled")
    if kind == "Closed":
        raise Closed("closed")
    if kind == "Abort":
        raise Abort("abort")
    if kind == "SystemExit":
        sys.exit(4)
    if kind == "KeyboardInterrupt":
        raise KeyboardInterrupt("struck")
    if kind == "TimeoutError":
        raise TimeoutError("of the body")
    if kind == "TaskCancelled":
        raise TaskCancelled("of its own")
    if kind == "recursion":
        boom("recursion")


def make(what: str) -> Any:
    """Return something that is no plain value."""
    if what == "lock":
        return threading.Lock()
    if what == "generator":
        return (each for each in range(3))
    if what == "lambda":
        return lambda: 1
    if what == "nested":
        return nested(100_000)
    if what == "text":
        return "x" * 100_000
    if what == "large":
        return bytes(50_000_000)
    if what == "loads badly":
        return LoadsBadly()
    raise AssertionError(what)


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


class LoadsBadly:
    """Something that cannot be made again from its pickle where it comes back."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return refuse_to_load, ("not here",)


def refuse_to_load(text: str) -> object:
    raise ZeroDivisionError(text)


def length(data: bytes) -> int:
    return len(data)


def submit_to(pool: Any) -> Any:
    return pool.submit(double, 4)


# -- coroutines --


async def chat(number: int) -> int:
    current_task().output(f"before {number}")
    await asyncio.sleep(0.01)
    current_task().output(f"after {number}")
    return 2 * number


async def doze(path: str) -> None:
    enter(path)
    await asyncio.sleep(LONG)


# -- work for the processor --


def burn(loops: int, reports: int = 10) -> int:
    """Keep a processor busy and tell how far it is."""
    total = 0
    for step in range(reports):
        for each in range(loops // reports):
            total += each * each % 7
        current_task().progress(step + 1, reports)
        current_task().output(f"step {step}")
    return total


# -- what is killed at random --


def recite_and_note(path: str, lines: int, pause: float) -> int:
    """Say numbers, and note each in a file with the time at which it was said."""
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        for number in range(lines):
            current_task().output(number)
            file.write(f"{number} {time.time()}\n")
            time.sleep(pause)
    return lines


def serve(folder: str, looks: bool) -> None:
    """Go on for as long as one is let, and note what was said."""
    task = current_task()
    path = os.path.join(folder, f"body-{task.id}")
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        for number in range(10_000):
            task.output(number)
            file.write(f"{task.id} {number} {time.time()}\n")
            task.sleep(0.01) if looks else time.sleep(0.01)


def other_version() -> None:
    """Make this worker process one that has another version of bgworker."""
    from bgworker.remote import messages

    messages.FORMAT += 1


def fork_and_speak() -> int:
    """Speak from a forked child too, which is silent, and then from here."""
    pid = os.fork()
    if pid == 0:
        current_task().output("from a child")
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.1)
    current_task().output("from the body")
    return pid
