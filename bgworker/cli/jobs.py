"""The commands of ``bgworker run`` as tasks, from the first submit to the exit code.

The main thread submits and then only waits, for the end or for a signal. Nothing here knows how
the tasks are shown.
"""

from __future__ import annotations

import signal
import subprocess
from _thread import allocate_lock
from collections import Counter
from itertools import count
from threading import Event
from time import monotonic

from ..model.errors import ShutdownError, TaskTimedOut
from ..model.events import TaskStatus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from ..running.scheduler import Scheduler
    from ..running.task import Task
    from .commands import Command


class Run:
    """The commands as tasks, from the first submit to the exit code."""

    def __init__(self, commands: Sequence[Command], *, fail_fast: bool) -> None:
        self.commands = commands
        self.started = monotonic()
        self.signal = 0
        """The first signal that came."""
        self.output_error: OSError | None = None
        """Why nothing can be shown any more."""
        self._fail_fast = fail_fast
        self._tasks: list[Task[int]] = []
        self._workers = 1
        self._growth = allocate_lock()  # guards the number of workers
        self._submitted = Event()
        self._stop_reason: str | None = None
        self._is_over = False
        self._next_ended = count(1).__next__  # one atomic step, from any thread
        # rung by whatever `wait` has to look at; a signal handler may, too
        self._bell = allocate_lock()
        self._bell.acquire()

    # -- the main thread --

    def submit(self, scheduler: Scheduler, jobs: int, timeout: float | None) -> None:
        """Queue all commands, to run ``jobs`` at a time."""
        self._scheduler, self._jobs = scheduler, jobs
        try:
            for number, command in enumerate(self.commands, 1):
                command.call.on_start = self._grow
                options = scheduler.options(
                    name=command.name, timeout=timeout,
                    metadata={"number": number, **command.metadata},
                )
                task = options.submit(command.call)
                self._tasks.append(task)
                task.add_done_callback(self._ended)
                self._look_for_signal()
                if self._stop_reason is not None:  # `stop` has seen this task, or we see the reason
                    task.cancel(self._stop_reason)
        finally:
            self._submitted.set()

    def wait(self) -> None:
        """Wait until all have ended, and stop them when a signal says so."""
        while not self._is_over:
            # In slices: on Windows no signal wakes the waiter for a lock, and elsewhere not the
            # second of two at once, which the system gives to another thread.
            self._bell.acquire(True, 0.2)
            self._look_for_signal()

    def _look_for_signal(self) -> None:
        if self.signal and self._stop_reason is None:
            words = {int(signal.SIGINT): "interrupted", int(signal.SIGTERM): "terminated"}
            self.stop(words.get(self.signal, f"signal {self.signal}"))

    def exit_code(self) -> int:
        """Return what the epilog of ``run --help`` promises."""
        if self.signal:
            return 128 + self.signal
        if self.output_error is not None:
            return 141 if isinstance(self.output_error, BrokenPipeError) else 1
        if len(self.commands) == 1:
            return _code_of(self._tasks[0])
        counts = self.counts()
        if counts[TaskStatus.COMPLETED] == len(self.commands):
            return 0
        return 124 if counts[TaskStatus.TIMED_OUT] and not counts[TaskStatus.FAILED] else 1

    def counts(self) -> Counter[TaskStatus]:
        """Return how many commands there are of each status."""
        return Counter(task.status for task in self._tasks)

    # -- any thread --

    def stop(self, reason: str) -> None:
        """Cancel what waits, ask what runs to stop; later calls do nothing."""
        if self._stop_reason is None:  # two at once do it twice, which is harmless
            self._stop_reason = reason
            for task in self._tasks[::-1]:
                # those that wait first, so that no worker takes them meanwhile
                task.cancel(reason)

    def lose_output(self, error: OSError) -> None:
        """Note that nothing can be shown any more, and stop."""
        if self.output_error is None:
            self.output_error = error
            self.stop("nobody reads the output")

    def ring(self) -> None:
        """Make `wait` look around. Takes no lock: safe in a signal handler."""
        try:
            self._bell.release()
        except RuntimeError:
            pass  # rung already: one ring is enough

    def _grow(self) -> None:
        """Let one more command run, now that one has started.

        Where processes are few, threads must not take them all. The command that has just started
        is not reaped before this returns: it holds a place that no thread takes, so that there
        always is one for a command.
        """
        self._submitted.wait()  # from then on no thread is started but here
        with self._growth:
            if self._workers < self._jobs:
                try:
                    self._scheduler.resize(self._workers + 1)
                    self._workers += 1
                except ShutdownError:  # there is no room for another thread
                    self._jobs = self._workers
                    self._scheduler.resize(self._workers)

    def _ended(self, task: Future[int]) -> None:
        if self._fail_fast and not task.cancelled() and task.exception() is not None:
            self.stop("another command failed")
        if self._next_ended() == len(self.commands):
            self._is_over = True
            self.ring()


def _code_of(task: Task[int]) -> int:
    """Return the exit code for the one command there was."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, TaskTimedOut):
        return 124
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode if error.returncode >= 0 else 128 - error.returncode
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return 127
    if isinstance(error, OSError):
        return 126
    return 0 if task.status is TaskStatus.COMPLETED else 1
