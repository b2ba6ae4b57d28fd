"""CPython's own tests of executors, run over `Scheduler` in the place of ``ThreadPoolExecutor``.

Every test class of ``test.test_concurrent_futures`` that is about thread pools is subclassed here with another executor
type; what is not about thread pools (process pools, interpreter pools, ``Future`` by itself) is not ours. All tests run as
CPython wrote them, but for these, and nothing else:

* `LEFT_OUT` names the tests that are not run, each with its reason. They show as skipped.
* `Adapted` holds the tests that run in another wording, each with its reason.
* `ThreadPoolExecutor` below answers, from the outside, what the tests look at inside a pool (``_threads``, ``_broken``).
* Scripts for a child interpreter import `Scheduler` under the name of the executor; see `assert_python_ok`.

Needs the standard library's ``test`` package, which some distributions leave out.
"""

from __future__ import annotations

import _thread
import gc
import importlib
import itertools
import multiprocessing.util
import os
import re
import sys
import threading
import time
import types
import unittest
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest

import bgworker
from bgworker import Scheduler

PACKAGE = "test.test_concurrent_futures"
ROOT = str(Path(bgworker.__file__).parents[1])

try:
    importlib.import_module(PACKAGE)
except ModuleNotFoundError as error:
    if error.name not in ("test", PACKAGE):
        raise
    pytest.skip("this interpreter comes without the standard library's own tests", allow_module_level=True)

from test import support  # noqa: E402
from test.support import script_helper  # noqa: E402

LEFT_OUT = {
    "test_thread_names_default": "wants the class name 'ThreadPoolExecutor' in the names of threads",
}
"""Test -> why it is not run. `Scheduler` calls its threads ``bgworker_0`` and so on, as documented."""

SLOW = {"test_map_timeout", "test_timeout", "test_hang_global_shutdown_lock"}
"""Tests that take 5 seconds or more, most of them by sleeping."""

pytestmark = pytest.mark.filterwarnings(  # test_hang_global_shutdown_lock forks beside threads, which is its point
    "ignore:.*multi-threaded, use of fork:DeprecationWarning")

_numbers = itertools.count()


class ThreadPoolExecutor(Scheduler):
    """`Scheduler` with the constructor of ``ThreadPoolExecutor``, and with what the tests look at inside of one."""

    def __init__(self, max_workers: int | None = None, thread_name_prefix: str = "", initializer: Any = None,
                 initargs: tuple[Any, ...] = ()) -> None:
        self._prefix = thread_name_prefix or f"conformance-{next(_numbers)}"
        self._max_workers = max_workers  # as given: what None comes to is seen in the number of threads alone
        super().__init__(max_workers, name=self._prefix, initializer=initializer, initargs=initargs)

    @property
    def _threads(self) -> set[threading.Thread]:
        """The workers that live, by their documented names."""
        name = re.compile(re.escape(self._prefix) + r"_\d+")
        return {thread for thread in threading.enumerate() if name.fullmatch(thread.name)}

    @property
    def _broken(self) -> bool:
        """Whether the pool refuses work because its initializer failed."""
        try:
            self.submit(int)
        except futures.BrokenExecutor:
            return True
        return False


def assert_python_ok(*args: str, **env_vars: str) -> tuple[int, bytes, bytes]:
    """Run a script of CPython's tests, in which `Scheduler` goes by the name of the executor that it imports."""
    *options, script = args
    script, count = re.subn(r"from concurrent\.futures import (\w+)",
                            f"import sys; sys.path.insert(0, {ROOT!r}); from bgworker import Scheduler as \\1", script)
    assert count == 1, f"expected a script that imports one executor, got {script}"
    code, out, err = script_helper.assert_python_ok(*options, script, **env_vars)
    # A ShutdownError is a RuntimeError, as which the scripts catch it; a traceback shows its own name only.
    return code, out, err.replace(b"bgworker.model.errors.ShutdownError: ", b"RuntimeError: ")


class Adapted:
    """What the tests of one class have in common here, and the tests that need another wording. First of its bases."""

    module: types.ModuleType
    """Where CPython defines the class: its tests find ``futures`` and ``assert_python_ok`` there."""
    executor_type = ThreadPoolExecutor

    def setUp(self) -> None:
        _wait_for_dying_threads()
        self._put_in_place(futures, "ThreadPoolExecutor", ThreadPoolExecutor)  # several tests name it themselves
        if hasattr(self.module, "assert_python_ok"):
            self._put_in_place(self.module, "assert_python_ok", assert_python_ok)
        super().setUp()  # type: ignore[misc]

    def _put_in_place(self, owner: types.ModuleType, name: str, value: object) -> None:
        self.addCleanup(setattr, owner, name, getattr(owner, name))  # type: ignore[attr-defined]
        setattr(owner, name, value)

    def _assert_logged(self: Any, message: str) -> Any:
        """A failing initializer is logged on our logger, not on ``concurrent.futures``."""
        return _Logged(self, message)


def _wait_for_dying_threads() -> None:
    """Let what the last test left end, in C too: CPython 3.10 takes it for a leak if there are fewer threads afterwards.

    It then waits, and collects garbage, a hundred times.
    """
    gc.collect()
    deadline = time.monotonic() + support.SHORT_TIMEOUT
    while _thread._count() >= threading.active_count() and time.monotonic() < deadline:  # the main thread is not in it
        time.sleep(0.001)


class _Logged:
    """Checks that a critical record of logger ``bgworker`` has a text in its message or its traceback."""

    def __init__(self, case: unittest.TestCase, message: str) -> None:
        self._message = message
        self._logs = case.assertLogs("bgworker", "CRITICAL")

    def __enter__(self) -> None:
        self._logs.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._logs.__exit__(*error)
        assert any(self._message in line for line in self._logs.watcher.output), self._logs.watcher.output


def test_max_workers_negative(self: Any) -> None:
    """The same refusal, in our words: a ValueError that names the argument, the bound and the value."""
    for number in (0, -1):
        with self.assertRaisesRegex(ValueError, f"max_workers: expected a whole number >= 1, got {number}"):
            self.executor_type(max_workers=number)


def test_default_workers(self: Any) -> None:
    """The same default, seen in the number of threads that more than enough blocked tasks start."""
    cpu_count = getattr(os, "process_cpu_count", os.cpu_count)
    expected = min(32, (cpu_count() or 1) + 4)
    executor = self.executor_type()
    gate = threading.Event()
    for _ in range(2 * expected):
        executor.submit(gate.wait, support.SHORT_TIMEOUT)
    count = len(executor._threads)
    gate.set()
    executor.shutdown()
    self.assertEqual(count, expected)


def test_cancel_futures_wait_false(self: Any) -> None:
    """The same script, in the wording of CPython 3.13: the cancel may come before a worker takes the task (gh-116682)."""
    _, out, err = assert_python_ok("-c", f"""if True:
        from concurrent.futures import ThreadPoolExecutor
        from {self.module.__name__} import sleep_and_print
        if __name__ == "__main__":
            t = ThreadPoolExecutor()
            t.submit(sleep_and_print, .1, "apple")
            t.shutdown(wait=False, cancel_futures=True)
        """)
    self.assertFalse(err)
    self.assertIn(out.strip(), [b"apple", b""])


REWORDED = {function.__name__: function for function in (test_max_workers_negative, test_default_workers,
                                                         test_cancel_futures_wait_false)}
del test_max_workers_negative, test_default_workers, test_cancel_futures_wait_false  # no tests by themselves


def thread_pool_cases() -> Iterator[tuple[types.ModuleType, type[unittest.TestCase]]]:
    """Return CPython's test classes about thread pools, each with the module that defines it."""
    package = importlib.import_module(PACKAGE)
    modules = [package]
    for folder in getattr(package, "__path__", ()):  # a package since 3.12
        modules += [importlib.import_module(f"{PACKAGE}.{path.stem}") for path in sorted(Path(folder).glob("test_*.py"))]
    for module in modules:
        for value in list(vars(module).values()):
            if isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == module.__name__ \
                    and getattr(value, "executor_type", None) is REAL:
                yield module, value


def our_own(module: types.ModuleType, case: type[unittest.TestCase]) -> type[unittest.TestCase]:
    """Derive from one of CPython's test classes, with `Scheduler` as its executor."""
    changes: dict[str, Any] = {"module": module, "__module__": __name__, "__test__": True}
    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        if name in LEFT_OUT:
            changes[name] = unittest.skip(LEFT_OUT[name])(getattr(case, name))
        elif name in REWORDED:
            changes[name] = REWORDED[name]
        elif name in SLOW:
            changes[name] = pytest.mark.slow(_forward(name))
    return type(case.__name__.replace("ThreadPool", "Scheduler"), (Adapted, case), changes)


def _forward(name: str) -> Any:
    """A test of our own that a mark can be put on: CPython's function is shared with its own classes."""
    def test(self: Any) -> None:
        getattr(super(type(self), self), name)()

    test.__name__ = name
    return test


REAL = futures.ThreadPoolExecutor
CASES = [our_own(module, case) for module, case in thread_pool_cases()]
globals().update({case.__name__: case for case in CASES})


def setUpModule() -> None:
    gc.freeze()  # the tests collect garbage often; what was there before them needs no look each time


def tearDownModule() -> None:
    gc.unfreeze()
    multiprocessing.util._cleanup_tests()  # ends the helpers of the process pools that one test forks


def test_none_of_CPythons_classes_about_thread_pools_is_missed() -> None:
    found = {case.__name__ for case in CASES}
    assert found >= {"SchedulerExecutorTest", "SchedulerShutdownTest", "SchedulerWaitTests", "SchedulerAsCompletedTest",
                     "SchedulerInitializerTest", "SchedulerFailingInitializerTest"}
    names = {name for case in CASES for name in unittest.defaultTestLoader.getTestCaseNames(case)}
    assert names >= {*LEFT_OUT, *REWORDED, *SLOW}
    assert len(names) >= 40


def test_a_script_of_CPythons_tests_runs_over_the_scheduler() -> None:
    _, out, _ = assert_python_ok("-c", "from concurrent.futures import ThreadPoolExecutor; print(ThreadPoolExecutor)")
    assert out.strip() == b"<class 'bgworker.running.scheduler.Scheduler'>"
