"""What holds for every test: no thread outlives it, no setting of the caller's shell reaches it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from bgworker import RetryPolicy, Scheduler, SinkOptions, TemporarySinkError, current_task
from bgworker.testing import FlakySink, fail
from tests.support import SOON

GRACE = 5.0
"""Seconds that threads which are ending anyway get, all together, before a test counts as
leaking."""

settings.register_profile(
    "default",
    settings.get_profile("default"),
    deadline=None,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; left out by `tools/check.py --fast`")
    config.addinivalue_line(
        "markers", "leaks_threads(reason): threads may outlive this test, for the given reason"
    )
    # A shell starts what it leaves in the background with these ignored, and our children inherit
    # it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGQUIT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Many tests fork beside threads, which is what they are about, or which others have left. From
    # 3.12 on Python warns of it, and from 3.15 on an error comes of that.
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(
            "ignore:This process .* is multi-threaded:DeprecationWarning"))


def pytest_collection_finish() -> None:
    # Many tests collect garbage, some of them often. What is there before the first, thousands of
    # tests and their modules, is none, and to look through it takes a tenth of a second each time.
    gc.collect()
    gc.freeze()
    gc.collect()  # Python collects what is old by itself once a quarter as much is new


@pytest.fixture(autouse=True)
def no_leaked_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves threads behind which were not there before it and its wider
    fixtures."""
    before = set(threading.enumerate())
    yield
    marker = request.node.get_closest_marker("leaks_threads")
    if marker is not None:
        if not marker.args and not marker.kwargs.get("reason"):
            pytest.fail("leaks_threads wants a reason")
        return
    leaked = still_alive(set(threading.enumerate()) - before, time.monotonic() + GRACE)
    if leaked:
        pytest.fail(f"threads outlive the test: {', '.join(leaked)}", pytrace=False)


def still_alive(threads: set[threading.Thread], deadline: float) -> list[str]:
    """Join the threads until the deadline; return the names of those that run on."""
    # A dummy thread stands for one that Python did not start (and cannot join); it may stay listed
    # for ever.
    threads = {thread for thread in threads if not isinstance(thread, threading._DummyThread)}
    for thread in threads:
        # one that another thread is starting is listed before it can be joined
        if thread._started.wait(max(0.0, deadline - time.monotonic())):
            thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in threads if thread.is_alive())


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the BGWORKER_ variables of the shell that started pytest."""
    for name in [name for name in os.environ if name.startswith("BGWORKER_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def parked_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The park file that a sink without a receiver has left: 3 + 20 + 1 events of one task."""
    path = tmp_path_factory.mktemp("parked") / "park.jsonl"

    def talk() -> None:
        for number in range(20):
            current_task().output(f"line {number}")

    dead = FlakySink(fail(None, TemporarySinkError("nobody there")))
    with Scheduler(1, close_timeout=5.0) as pool:
        pool.register_sink(dead, name="dead", options=SinkOptions(
            park=path, batch_size=7, retry=RetryPolicy(attempts=2, base=0.001, cap=0.002)))
        pool.submit(talk).result(SOON)
    health = pool.sinks["dead"]
    assert (health.parked, health.dropped, health.emitted) == (24, 0, 24)
    return path


@pytest.fixture
def parked(parked_once: Path, tmp_path: Path) -> Path:
    """A copy of that park file, to do with what a test likes."""
    return Path(shutil.copy(parked_once, tmp_path))
