"""The executors that a Scheduler is tested on, what each of them cannot do, and what they leave.

Each has two workers. No test is in here.
"""

from __future__ import annotations

import concurrent.futures
import copyreg
import gc
import multiprocessing
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from bgworker import Scheduler
from tests.remote import functions
from tests.support import ROOT, SOON, environment, until

WORKERS = 2

THREADS = "threads"
"""A Scheduler without an executor: all that holds for the others holds for it, too."""

PROCESS_POOLS = ("fork", "spawn", "forkserver")
INTERPRETERS = "interpreters"
LOKY = "loky"
DASK = "dask"
NAMES = (THREADS, *PROCESS_POOLS, INTERPRETERS, LOKY, DASK)

ELSEWHERE = tuple(name for name in NAMES if name != THREADS)
PROCESSES = tuple(name for name in ELSEWHERE if name != INTERPRETERS)
"""Those whose workers are processes, which can be killed."""


def _table(**rows: Mapping[str, str]) -> Mapping[str, Mapping[str, str]]:
    return MappingProxyType({what: MappingProxyType(row) for what, row in rows.items()})


_PICKLED = dict.fromkeys((*PROCESS_POOLS, INTERPRETERS),
                         "the task fails with pickle's error, unless cloudpickle is loaded")

LIMITS = _table(
    lambdas=_PICKLED,
    objects=dict.fromkeys(ELSEWHERE, "what nothing can pickle: the task fails with that error"),
    context_variables=dict.fromkeys(ELSEWHERE, "they stay here: bodies see their defaults"),
    nested=dict.fromkeys(ELSEWHERE, "a Scheduler cannot be sent: the task fails with that error"),
    workers=dict.fromkeys(
        ELSEWHERE, "max_workers, initializer and resize are the executor's: refused"),
    cancels_prefetched={
        **dict.fromkeys((*PROCESS_POOLS, LOKY),
                        "an executor hands its workers some tasks early: such a one is asked to "
                        "stop, and ends as cancelled in its turn, or where it looks"),
    },
    deadline_frees_worker=dict.fromkeys(
        ELSEWHERE, "the worker is busy until the body ends; health().abandoned tells which"),
    forks={INTERPRETERS: "CPython crashes in a child that is forked beside subinterpreters"},
    outlives_worker={
        **dict.fromkeys(PROCESS_POOLS, "a dead worker breaks the executor for all of its tasks"),
        LOKY: "a dead worker breaks the executor for all of its tasks",
        INTERPRETERS: "a crash is this process's",
    },
)
"""What an executor cannot do, and what one sees then. Who is not named in a row can."""


def can(name: str, what: str) -> bool:
    """Tell whether an executor can do something that is a row of `LIMITS`."""
    return name not in LIMITS[what]


def executor(name: str, cluster: str = "") -> Executor | None:
    """Return a new executor; None for threads.

    Args:
        cluster: the file that tells where dask's scheduler is.
    """
    if name in PROCESS_POOLS:
        return ProcessPoolExecutor(WORKERS, multiprocessing.get_context(name))
    if name == INTERPRETERS:
        # their path is not that of the interpreter that makes them
        made: Executor = concurrent.futures.InterpreterPoolExecutor(  # type: ignore[attr-defined]
            WORKERS, initializer=site.addsitedir, initargs=(str(ROOT),))
        return made
    if name == LOKY:
        import loky

        return loky.ProcessPoolExecutor(WORKERS)  # type: ignore[no-any-return]
    if name == DASK:
        import distributed

        client = distributed.Client(  # type: ignore[no-untyped-call]
            scheduler_file=cluster, set_as_default=False, timeout=SOON)
        client.wait_for_workers(WORKERS, timeout=SOON)
        return client.get_executor(pure=False)  # type: ignore[no-any-return]
    return None


class Engine:
    """An executor, and how it is made and ended.

    Args:
        name: one of `NAMES`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._others = set(descendants())
        self.cluster = Cluster() if name == DASK else None
        self.executor = executor(name, self.cluster.file if self.cluster else "")
        self._warm_up()

    def _warm_up(self) -> None:
        """Have the threads and workers started that the executor starts when it needs them."""
        if self.executor is None:
            return
        found: set[object] = set()
        deadline = time.monotonic() + SOON
        while len(found) < WORKERS and time.monotonic() < deadline:
            futures = [self.executor.submit(functions.place) for _ in range(4 * WORKERS)]
            found |= {future.result(SOON) for future in futures}
        if self.cluster is not None:  # there large messages have a thread of their own
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # and a warning
                self.executor.submit(functions.length, bytes(50_000_000)).result(SOON)

    def scheduler(self, **settings: Any) -> Scheduler:
        """Return a new Scheduler that runs tasks here."""
        if self.executor is None:
            return Scheduler(WORKERS, **settings)
        return Scheduler(executor=self.executor, **settings)

    def pids(self) -> list[int]:
        """Return the processes of the workers; none where they are none."""
        if self.cluster is not None:
            return [worker.pid for worker in self.cluster.workers]
        processes = getattr(self.executor, "_processes", None)
        return list(processes or ())

    def kill(self) -> None:
        """Kill every worker."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End it all, and fail if a process of it is left."""
        if self.cluster is not None:
            self.executor._client.close(timeout=2)  # type: ignore[union-attr]
            self.cluster.close()
        elif self.name == LOKY:
            self.executor.shutdown(kill_workers=True)  # type: ignore[union-attr, call-arg]
        elif self.executor is not None:
            # without a wait for processes: when one was killed at its queue that may never end
            self.executor.shutdown(wait=self.name == INTERPRETERS, cancel_futures=True)
        try:
            until(lambda: not self._left(), SOON)
        finally:
            for pid in self._left():
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> set[int]:
        return set(descendants()) - self._others


class Cluster:
    """A real cluster of dask on this machine: a scheduler and two workers, each a process."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="bgworker-dask-")
        self.file = os.path.join(self._folder, "scheduler.json")
        self.workers: list[subprocess.Popen[bytes]] = []
        try:
            self.scheduler = self._start(
                "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-show",
                "--scheduler-file", self.file)
            for _ in range(WORKERS):
                self.add_worker()
        except BaseException:
            self.close()
            raise

    def add_worker(self) -> subprocess.Popen[bytes]:
        """Start one more worker, of one thread."""
        # without a nanny, which would start a killed one again
        self.workers.append(self._start(
            "dask_worker", "--scheduler-file", self.file, "--no-nanny", "--nthreads", "1",
            "--host", "127.0.0.1", "--memory-limit", "0", "--death-timeout", str(SOON)))
        return self.workers[-1]

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = os.path.join(self._folder, f"{program}.log")
        with open(log, "ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{program}", "--no-dashboard", *arguments],
                env=environment(PYTHONWARNINGS="ignore",
                                DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1",
                                # should these tests be killed
                                DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT="300s"),
                cwd=self._folder,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def close(self) -> None:
        # at once: a worker that is asked to end may wait for what it runs
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait(SOON)
        shutil.rmtree(self._folder, ignore_errors=True)


def missing(name: str) -> str | None:
    """Return why an executor cannot be had here; None if it can."""
    if name == INTERPRETERS and not hasattr(concurrent.futures, "InterpreterPoolExecutor"):
        return "InterpreterPoolExecutor came with Python 3.14"
    if name in PROCESS_POOLS and name not in multiprocessing.get_all_start_methods():
        return f"this system starts no process by {name}"
    package = {LOKY: "loky", DASK: "distributed"}.get(name)
    if package is not None:
        # dask looks at all exceptions that there are; the hostile ones of other tests are garbage
        gc.collect()
        try:
            __import__(package)
        except ImportError as error:
            return f"needs {package}; the extra 'integration' installs it ({error})"
        # dask has all exceptions that there are made loadable; here they are to be what they are
        for each in [each for each in copyreg.dispatch_table if issubclass(each, BaseException)]:
            del copyreg.dispatch_table[each]
    return None


def made(name: str) -> Iterator[Engine]:
    """Make an engine for a fixture; skip the test if it cannot be had."""
    problem = missing(name)
    if problem is not None:
        pytest.skip(problem)
    engine = Engine(name)
    try:
        yield engine
    finally:
        engine.close()


# -- what must not be left --


def descendants() -> list[int]:
    """Return the processes that this one has started, and those that they have; but for helpers
    that Python keeps until its end. None where there is no /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" or int(fields[1]) != os.getpid():
            parents[int(entry.parent.name)] = int(fields[1])
    found: list[int] = []
    for pid in parents:
        above: int | None = pid
        while above is not None and above != os.getpid():
            above = parents.get(above)
        if above is not None and pid != os.getpid() and not is_helper(pid, parents[pid]):
            found.append(pid)
    return found


def is_helper(pid: int, parent: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return False
    return "resource_tracker" in command or (
        "multiprocessing.forkserver import main" in command and parent == os.getpid())


def channels() -> list[str]:
    """Return the sockets of channels that this process has open, by their names."""
    found = []
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    except OSError:
        return []
    ours = open_sockets()
    for line in lines:
        fields = line.split()
        if len(fields) > 7 and "bgworker-" in fields[7] and fields[6] in ours:
            found.append(fields[7])
    return found


def open_sockets() -> set[str]:
    """Return the numbers of all sockets that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found

