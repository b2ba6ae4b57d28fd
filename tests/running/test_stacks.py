"""Where a task was at its deadline: in its record, and in the health of its pool."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import linecache
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bgworker import History, Scheduler, Task, TaskTimedOut, current_task, shell
from bgworker.running import stacks
from tests.support import SOON, until

SHORT = 0.1

pytestmark = pytest.mark.skipif(not stacks.HAS_GIL, reason="frames of others are not looked at")
posix = pytest.mark.skipif(os.name == "nt", reason="the commands are POSIX commands")


class Site:
    """A Scheduler, and an event that ends whatever is stuck in its tasks."""

    def __init__(self, **settings: Any) -> None:
        self.go = threading.Event()
        self.pool = Scheduler(2, name="site", **settings)

    def timed_out(self, work: Callable[..., object], *args: Any, **settings: Any) -> Task[Any]:
        """Return a task that was past its deadline."""
        task = self.pool.options(timeout=SHORT, **settings).submit(work, *args)
        assert isinstance(task.exception(SOON), TaskTimedOut)
        return task

    def told(self, work: Callable[..., object], *args: Any, **settings: Any) -> str:
        """Return where it was."""
        return self.timed_out(work, *args, **settings).snapshot().invocation_info or ""


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    try:
        yield made
    finally:
        made.go.set()
        made.pool.shutdown()


def functions(text: str) -> list[str]:
    """Return the names of the functions of a stack, the outermost first."""
    return [line.rpartition(", in ")[2] for line in text.splitlines() if line.startswith("  File")]


BARE = "bgworker.model.errors.TaskTimedOut: ran longer than its timeout of 0.1 s\n"


def outer(site: Site) -> None:
    inner(site)


def inner(site: Site) -> None:
    site.go.wait(SOON)  # here it is stuck


def test_the_record_of_a_timed_out_task_shows_where_it_was(site: Site) -> None:
    text = site.told(outer, site)
    assert text.startswith("Stack (most recent call last):\n")
    assert functions(text)[:2] == ["outer", "inner"] and "wait" in functions(text)
    assert "\n    site.go.wait(SOON)  # here it is stuck\n" in text
    assert f'File "{__file__}", line {inner.__code__.co_firstlineno + 1}, in inner' in text
    assert "bgworker" + os.sep not in text.replace(os.path.dirname(__file__), "")
    assert text.endswith("\n") and "\n\n" not in text


def test_what_ends_in_time_has_no_stack_and_what_fails_has_its_traceback(site: Site) -> None:
    quick = site.pool.options(timeout=SOON)
    done, failed = quick.submit(len, "x"), quick.submit(outer, None)
    assert done.wait(SOON) and failed.wait(SOON)
    assert done.snapshot().invocation_info is None
    assert (failed.snapshot().invocation_info or "").startswith("Traceback")


def test_the_stack_is_that_of_the_deadline_not_of_what_the_cancel_woke(site: Site) -> None:
    def work() -> None:
        try:
            sleeping()
        finally:
            site.go.wait(SOON)

    def sleeping() -> None:
        current_task().sleep(SOON)

    text = site.told(work)
    assert functions(text) == ["work", "sleeping"]


def test_the_health_of_the_pool_shows_it_too(site: Site) -> None:
    task = site.timed_out(outer, site, name="nightly")
    until(lambda: site.pool.health().stuck)
    [stuck] = site.pool.health().stuck
    assert (stuck.task_name, stuck.stack) == ("nightly", task.snapshot().invocation_info)
    assert functions(stuck.stack)[:2] == ["outer", "inner"]


def test_a_thread_given_up_at_shutdown_shows_where_it_was() -> None:
    site = Site()
    task = site.pool.submit(outer, site)
    until(task.running)
    site.pool.shutdown(timeout=0.2)
    [stuck] = site.pool.health().stuck
    assert stuck.task_id == task.id and functions(stuck.stack)[:2] == ["outer", "inner"]
    site.go.set()
    assert task.wait(SOON)


@pytest.mark.parametrize("captures", [False, True])
def test_capture_adds_nothing_to_the_stack(site: Site, captures: bool) -> None:
    assert functions(site.told(outer, site, capture_output=captures))[:2] == ["outer", "inner"]


# ---------------------------------------------------------------- tasks inside one another

def waits(site: Site, timeout: float | None) -> None:
    """Run `outer` inside this task, on the same thread."""
    with contextlib.suppress(TaskTimedOut):
        site.pool.options(name="inside", timeout=timeout).submit(outer, site).result()
    site.go.wait(SOON)


def test_of_tasks_on_one_thread_each_has_its_own_stack_inward() -> None:
    site = Site()
    site.pool.resize(1)
    try:
        around = site.pool.options(timeout=3 * SHORT).submit(waits, site, SHORT)
        assert isinstance(around.exception(SOON), TaskTimedOut)
        [inside] = [each for each in site.pool.tasks() if each.name == "inside"]
        assert functions(inside.invocation_info or "")[:2] == ["outer", "inner"]
        assert functions(around.snapshot().invocation_info or "")[:3] == [
            "waits", "outer", "inner"], "the thread is still in it"
        [stuck] = [each for each in site.pool.health().stuck if each.task_name == "inside"]
        assert functions(stuck.stack)[0] == "waits", "of the latest that passed its deadline"
    finally:
        site.go.set()
        site.pool.shutdown()


# ---------------------------------------------------------------- coroutines

async def outer_coroutine(site: Site, how: str) -> None:
    await inner_coroutine(site, how)


async def inner_coroutine(site: Site, how: str) -> None:
    if how == "sleep":
        await asyncio.sleep(SOON)
    elif how == "task":
        await asyncio.create_task(leaf())
    elif how == "gather":
        await asyncio.gather(asyncio.sleep(0), leaf())
    elif how == "generator":
        await awaits()
    elif how == "blocks":
        await asyncio.sleep(0)
        inner(site)


async def leaf() -> None:
    await asyncio.sleep(SOON)


@types.coroutine
def awaits() -> Any:
    yield from asyncio.sleep(SOON)


@pytest.mark.parametrize("how, names", [
    ("sleep", ["sleep"]), ("task", ["leaf", "sleep"]), ("gather", ["leaf", "sleep"]),
    ("generator", ["awaits", "sleep"])])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_of_a_coroutine_its_own_frames_are_told_through_what_it_awaits(
        site: Site, how: str, names: list[str]) -> None:
    text = site.told(outer_coroutine, site, how)
    assert functions(text) == ["outer_coroutine", "inner_coroutine", *names], text
    assert "base_events" not in text and "    await inner_coroutine(site, how)\n" in text


def test_of_a_coroutine_that_blocks_its_loop_the_thread_is_told_from_its_frame_on(
        site: Site) -> None:
    text = site.told(outer_coroutine, site, "blocks")
    assert functions(text)[:3] == ["outer_coroutine", "inner_coroutine", "inner"]
    assert "run_forever" not in text


def test_an_awaitable_of_somebodys_own_is_not_asked(site: Site) -> None:
    asked = []

    class Odd:
        def __await__(self) -> Any:
            return Steps()

    class Steps:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return asyncio.get_running_loop().create_future().__await__().__next__()

        def __getattr__(self, name: str) -> Any:
            if threading.current_thread().name.endswith("deadlines"):
                asked.append(name)
            raise AttributeError(name)

    async def work() -> None:
        await Odd()

    assert functions(site.told(work)) == ["work"] and not asked


# ---------------------------------------------------------------- commands

@posix
def test_of_a_command_its_processes_are_told(site: Site) -> None:
    text = site.told(shell("sleep 30; true"))
    assert text.startswith("processes of the command: ") and text.endswith("\n")
    assert "File" not in text
    first = text.split(": ")[1].split()[0].rstrip(",\n")
    assert int(first) > 1
    if os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        assert "(sleep)" in text


@posix
def test_of_a_function_that_runs_a_command_both_are_told(site: Site) -> None:
    def work() -> None:
        shell(["sleep", "30"])()

    text = site.told(work)
    assert functions(text) == ["work"]
    assert text.splitlines()[-1].startswith("processes of the command: ")


# ---------------------------------------------------------------- bounds, and what may go wrong

def recurse(site: Site, depth: int) -> None:
    if depth:
        recurse(site, depth - 1)
    else:
        inner(site)


@pytest.mark.parametrize("most", [64, 300, 5000, 65536])
@pytest.mark.parametrize("depth", [3, 150, 600])
def test_a_stack_is_bounded_and_keeps_its_innermost_frames(depth: int, most: int) -> None:
    site = Site(max_payload=most)
    try:
        text = site.told(recurse, site, depth)
        assert len(text.encode()) <= most
        if most >= 5000:
            assert "inner" in functions(text)
            assert functions(text)[0] == "recurse" or most == 5000
        if most == 65536:
            left_out = [line for line in text.splitlines() if line.endswith("are left out]")]
            assert len(left_out) == (depth == 600)
    finally:
        site.go.set()
        site.pool.shutdown()


def module_of(path: Path, padding: int) -> Callable[..., object]:
    path.write_text("def stuck(site):\n    site.go.wait(30)  # a line of a file\n"
                    + "#" * padding + "\n")
    names: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    found: Callable[..., object] = names["stuck"]
    return found


@pytest.mark.parametrize("padding", [10, 2**20])
def test_no_source_is_read_from_a_file_that_is_huge(
        site: Site, tmp_path: Path, padding: int) -> None:
    path = tmp_path / "a_module.py"
    stuck = module_of(path, padding)
    text = site.told(lambda: stuck(site))  # of the task's own function the source is read
    assert f'File "{path}", line 2, in stuck\n' in text
    is_huge = padding > 1000
    assert ("# a line of a file" in text) != is_huge
    assert (str(path) in linecache.cache) != is_huge


def test_a_file_that_has_gone_and_one_that_is_no_file_have_no_lines(
        site: Site, tmp_path: Path) -> None:
    path = tmp_path / "gone.py"
    function = module_of(path, 10)
    path.unlink()
    assert f'"{path}", line 2, in stuck\n' in site.told(function, site)
    os.mkdir(path)
    assert f'"{path}", line 2, in stuck\n' in site.told(function, site)


def test_no_loader_of_somebodys_is_asked(site: Site) -> None:
    asked = []

    class Loader:
        def get_source(self, name: str) -> str:
            asked.append(name)
            return "x\n" * 9

    names: dict[str, Any] = {"__name__": "odd", "__loader__": Loader()}
    exec(compile("def stuck(site):\n    site.go.wait(30)\n", "<odd file>", "exec"), names)
    linecache.lazycache("<odd file>", names)
    text = site.told(names["stuck"], site)
    linecache.cache.pop("<odd file>", None)
    assert 'File "<odd file>", line 2, in stuck\n' in text and not asked


def test_no_frame_and_nothing_in_one_is_kept(site: Site) -> None:
    class Local:
        pass

    followed: list[Any] = []

    def work() -> None:
        local = Local()
        followed.append(weakref.ref(local))
        site.go.wait(SOON)
        del local

    task = site.timed_out(work)
    until(lambda: site.pool.health().stuck)
    site.go.set()
    until(lambda: not site.pool.health().stuck)
    gc.collect()
    assert followed[0]() is None and task.snapshot().invocation_info


@pytest.mark.parametrize("kind", [ValueError, MemoryError, KeyboardInterrupt, SystemExit])
def test_whatever_goes_wrong_with_a_stack_the_task_times_out(
        site: Site, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise kind("no")

    monkeypatch.setattr(sys, "_current_frames", fail)
    task = site.timed_out(outer, site)
    assert (task.status, task.snapshot().invocation_info) == ("timed_out", BARE)


def test_without_the_gil_no_stack_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "HAS_GIL", False)
    assert site.told(outer, site) == BARE


def test_threads_that_run_on_meanwhile_disturb_nobody(site: Site) -> None:
    """A stack is read while its thread calls and returns as fast as it can."""
    def flicker(task: Any, depth: int) -> None:
        while depth and not task.cancel_requested:
            flicker(task, depth - 1)
            if depth < 5:
                return

    def work() -> None:
        flicker(current_task(), 5)

    tasks = [site.pool.options(timeout=0.01).submit(work) for _ in range(60)]
    for task in tasks:
        assert isinstance(task.exception(SOON), TaskTimedOut)
        found = functions(task.snapshot().invocation_info or "")
        assert found == ["work", *["flicker"] * (len(found) - 1)] and 1 <= len(found) <= 7


def test_the_history_and_the_wire_have_it(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    site = Site(sinks=[f"sqlite:{path}"])
    try:
        text = site.told(outer, site, name="slow")
        assert site.pool.flush(SOON)
        with History(path) as history:
            assert history.task("slow").invocation_info == text
    finally:
        site.go.set()
        site.pool.shutdown()
