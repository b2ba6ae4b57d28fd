"""CPython's own tests of executors, run over `Scheduler` in the place of ``ThreadPoolExecutor``.

Every test class of ``test.test_concurrent_futures`` that is about thread pools is subclassed here
with another executor type; what is not about thread pools (process pools, interpreter pools,
``Future`` by itself) is not ours. All tests run as CPython wrote them, but for these, and nothing
else:

* `LEFT_OUT` names the tests that are not run, each with its reason. They show as skipped.
* `Adapted` holds the tests that run in another wording, each with its reason.
* `ThreadPoolExecutor` below answers, from the outside, what the tests look at inside a pool
    (``_threads``, ``_broken``).
* Scripts for a child interpreter import `Scheduler` under the name of the executor; see
    `assert_python_ok`.

Needs the standard library's ``test`` package, which some distributions leave out.
"""

from __future__ import annotations

import _thread
import gc
import importlib
import itertools
import multiprocessing.util
import operator
import re
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
    pytest.skip(
        "this interpreter comes without the standard library's own tests", allow_module_level=True
    )

from test import support  # noqa: E402
from test.support import script_helper  # noqa: E402

LEFT_OUT = {
    "test_thread_names_default": "wants the class name 'ThreadPoolExecutor' in the names of threads"
}
"""Test -> why it is not run. `Scheduler` calls its threads ``bgworker_0`` and so on, as
documented."""

SLOW = {"test_map_timeout", "test_timeout", "test_hang_global_shutdown_lock"}
"""Tests that take 5 seconds or more, most of them by sleeping."""

_numbers = itertools.count()


def assert_python_ok(*args: str, **env_vars: str) -> tuple[int, bytes, bytes]:
    """Run a script of CPython's tests, in which `Scheduler` goes by the name of the executor that
    it imports."""
    *options, script = args
    script, count = re.subn(
        r"from concurrent\.futures import (\w+)",
        f"import sys; sys.path.insert(0, {ROOT!r}); from bgworker import Scheduler as \\1",
        script,
    )
    assert count == 1, f"expected a script that imports one executor, got {script}"
    code, out, err = script_helper.assert_python_ok(*options, script, **env_vars)
    # A ShutdownError is a RuntimeError, as which the scripts catch it; a traceback shows its own
    # name only.
    return code, out, err.replace(b"bgworker.model.errors.ShutdownError: ", b"RuntimeError: ")


class Adapted:
    """What the tests of one class have in common here, and the tests that need another wording.
    First of its bases."""

    module: types.ModuleType
    """Where CPython defines the class: its tests find ``futures`` and ``assert_python_ok``
    there."""
    executor_type = Scheduler

    def setUp(self) -> None:
        _wait_for_dying_threads()
        # several tests name it themselves
        self._put_in_place(futures, "ThreadPoolExecutor", Scheduler)
        if hasattr(self.module, "assert_python_ok"):
            self._put_in_place(self.module, "assert_python_ok", assert_python_ok)
        super().setUp()  # type: ignore[misc]

    def _put_in_place(self, owner: types.ModuleType, name: str, value: object) -> None:
        self.addCleanup(setattr, owner, name, getattr(owner, name))  # type: ignore[attr-defined]
        setattr(owner, name, value)


def _wait_for_dying_threads() -> None:
    """Let what the last test left end, in C too: CPython 3.10 takes it for a leak if there are
    fewer threads afterwards.

    It then waits, and collects garbage, a hundred times.
    """
    gc.collect()
    deadline = time.monotonic() + support.SHORT_TIMEOUT
    while _thread._count() >= threading.active_count() and time.monotonic() < deadline:
        # the main thread is not in it
        time.sleep(0.001)


def test_cancel_futures_wait_false(self: Any) -> None:
    """The same script, in the wording of CPython 3.13: the cancel may come before a worker takes
    the task (gh-116682)."""
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


def test_idle_thread_reuse(self: Any) -> None:
    """The same, but waiting until the thread is idle: a result is there before that, for
    CPython's pool as well, and on a busy machine the next task comes before it, too."""
    executor = self.executor_type()
    for numbers in ((21, 2), (6, 7), (3, 14)):
        self.assertEqual(executor.submit(operator.mul, *numbers).result(), 42)
        deadline = time.monotonic() + support.SHORT_TIMEOUT
        while not executor._idle_semaphore._value and time.monotonic() < deadline:
            time.sleep(0.001)
    self.assertEqual(len(executor._threads), 1)
    executor.shutdown(wait=True)


REWORDED = {"test_cancel_futures_wait_false": test_cancel_futures_wait_false,
            "test_idle_thread_reuse": test_idle_thread_reuse}
del test_cancel_futures_wait_false, test_idle_thread_reuse  # no tests by themselves


def thread_pool_cases() -> Iterator[tuple[types.ModuleType, type[unittest.TestCase]]]:
    """Return CPython's test classes about thread pools, each with the module that defines it."""
    package = importlib.import_module(PACKAGE)
    modules = [package]
    for folder in getattr(package, "__path__", ()):  # a package since 3.12
        modules += [
            importlib.import_module(f"{PACKAGE}.{path.stem}")
            for path in sorted(Path(folder).glob("test_*.py"))
        ]
    for module in modules:
        for value in list(vars(module).values()):
            if (
                isinstance(value, type)
                and issubclass(value, unittest.TestCase)
                and value.__module__ == module.__name__
                and getattr(value, "executor_type", None) is REAL
            ):
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
    """A test of our own that a mark can be put on: CPython's function is shared with its own
    classes."""
    def test(self: Any) -> None:
        getattr(super(type(self), self), name)()

    test.__name__ = name
    return test


REAL = futures.ThreadPoolExecutor
CASES = [our_own(module, case) for module, case in thread_pool_cases()]
globals().update({case.__name__: case for case in CASES})


def tearDownModule() -> None:
    # ends the helpers of the process pools that one test forks
    multiprocessing.util._cleanup_tests()


def test_none_of_CPythons_classes_about_thread_pools_is_missed() -> None:
    found = {case.__name__ for case in CASES}
    assert found >= {
        "SchedulerExecutorTest",
        "SchedulerShutdownTest",
        "SchedulerWaitTests",
        "SchedulerAsCompletedTest",
        "SchedulerInitializerTest",
        "SchedulerFailingInitializerTest",
    }
    names = {name for case in CASES for name in unittest.defaultTestLoader.getTestCaseNames(case)}
    assert names >= {*LEFT_OUT, *REWORDED, *SLOW}
    assert len(names) >= 40


def test_a_script_of_CPythons_tests_runs_over_the_scheduler() -> None:
    _, out, _ = assert_python_ok(
        "-c", "from concurrent.futures import ThreadPoolExecutor; print(ThreadPoolExecutor)"
    )
    assert out.strip() == b"<class 'bgworker.running.scheduler.Scheduler'>"
