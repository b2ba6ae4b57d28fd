"""The commands of ``bgworker run`` as tasks, from the first submit to the exit code.

The main thread submits and then only waits, for the end or for a signal. It is at most `AHEAD`
commands ahead: those are in the record whatever becomes of this process, and a million more cost no
memory. Nothing here knows how the tasks are shown.
"""

from __future__ import annotations

import signal
import subprocess
from _thread import allocate_lock
from collections import Counter
from functools import partial
from time import monotonic

from ..model.errors import TaskTimedOut
from ..model.events import TaskStatus
from ..running.task import Task
from .attempts import Attempts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from ..running.scheduler import Scheduler
    from .attempts import TimeLimit
    from .commands import Commands
    from .halt import Halt

AHEAD = 10_000
"""Commands, at most, that are tasks and have not ended."""

MOST_UNSHOWN = 50_000
"""Events that may wait to be shown when the next command is submitted; each has several."""

GLANCE = 64
"""Commands after which it is asked how many events wait."""


class Run:
    """The commands as tasks, from the first submit to the exit code.

    Args:
        halt: when to end before all have run; None is never.
        retries: how often a command is run at most until it completes; 0 is any number.
        limit: how long each attempt may take.
    """

    def __init__(self, commands: Commands, *, halt: Halt | None, retries: int,
                 limit: TimeLimit) -> None:
        self.commands = commands
        self.started = monotonic()
        self.signal = 0
        """The first signal that came."""
        self.output_error: OSError | None = None
        """Why nothing can be shown any more."""
        self._halt = halt
        self._retries = retries
        self._limit = limit
        self._growth = allocate_lock()  # guards the number of workers
        self._workers = 1
        self._lock = allocate_lock()  # guards the counts, and whether a halt was met
        self._counts: Counter[TaskStatus] = Counter()
        self._is_halted = False
        self._tasks: dict[int, Task[int]] = {}  # by number, those that have not ended
        self.tags: dict[int, str] = {}
        """By number, the arguments that commands were made for. The printer's thread takes those of
        commands that have ended."""
        self.submitted = 0
        """Commands that are tasks, or were."""
        self._stop_reason: str | None = None
        self._stops_running = False  # and not only what waits
        self._last_code = 0
        # rung by whatever the main thread has to look at; a signal handler may, too
        self._bell = allocate_lock()
        self._bell.acquire()

    # -- the main thread --

    def submit(self, scheduler: Scheduler, jobs: int, unshown: Callable[[], int]) -> None:
        """Queue all commands, to run ``jobs`` at a time; wait where many wait already.

        Args:
            unshown: tells how many events wait to be shown.
        """
        self._pool, self._jobs = scheduler._pool, jobs
        for number, command in enumerate(self.commands.each(self._is_wanted), 1):
            if command.tag:
                self.tags[number] = command.tag
            seconds = self._limit.beforehand(command.call.source)
            if not self._limit.is_any:
                seconds = command.timeout
            options = scheduler.options(name=command.name, timeout=seconds,
                                        metadata={"number": number, **command.metadata})
            task = options.submit(Attempts(command.call, seconds, self._retries, self._limit,
                                           self._grow))
            self.submitted = number
            self._tasks[number] = task
            task.add_done_callback(partial(self._ended, number))
            if self._stop_reason is not None:  # `stop` has seen this task, or we see the reason
                self._cancel(task, self._stop_reason)
            while len(self._tasks) >= AHEAD or not number % GLANCE and unshown() > MOST_UNSHOWN:
                self._sleep()

    def wait(self) -> None:
        """Wait until all have ended, and stop them when a signal says so."""
        while self._tasks:
            self._sleep()

    def _sleep(self) -> None:
        # In slices: on Windows no signal wakes the waiter for a lock, and elsewhere not the second
        # of two at once, which the system gives to another thread.
        self._bell.acquire(True, 0.2)
        self._look_for_signal()

    def _is_wanted(self) -> bool:
        self._look_for_signal()
        return self._stop_reason is None

    def _look_for_signal(self) -> None:
        if self.signal and not self._stops_running:
            words = {int(signal.SIGINT): "interrupted", int(signal.SIGTERM): "terminated"}
            self.stop(words.get(self.signal, f"signal {self.signal}"))

    def exit_code(self) -> int:
        """Return what the epilog of ``run --help`` promises."""
        if self.signal:
            return 128 + self.signal
        if self.output_error is not None:
            return 141 if isinstance(self.output_error, BrokenPipeError) else 1
        if self.commands.error:
            return 1
        if self.submitted == 1:
            return self._last_code
        if self._is_halted and self._halt is not None and self._halt.pardons(self._counts):
            return 0
        if self._counts[TaskStatus.COMPLETED] == self.submitted:
            return 0
        only_late = self._counts[TaskStatus.TIMED_OUT] and not self._counts[TaskStatus.FAILED]
        return 124 if only_late else 1

    # -- any thread --

    @property
    def total(self) -> int | None:
        """How many commands there are; None as long as that is not known."""
        return self.commands.total

    def counts(self) -> Counter[TaskStatus]:
        """Return how many commands have ended, by status."""
        with self._lock:
            return self._counts.copy()

    def stop(self, reason: str, *, running: bool = True) -> None:
        """Cancel what waits, ask what runs to stop unless ``running`` is False; submit nothing
        more."""
        if self._stop_reason is None or running and not self._stops_running:
            # two at once do it twice, which is harmless
            self._stop_reason = self._stop_reason or reason
            self._stops_running = self._stops_running or running
            # the last first: those that wait, so that no worker takes them meanwhile
            for task in list(self._tasks.copy().values())[::-1]:
                self._cancel(task, reason)
            self.ring()

    def _cancel(self, task: Task[int], reason: str) -> None:
        if self._stops_running:
            task.cancel(reason)
        elif task._cancel_quietly(reason):
            task._tell()

    def lose_output(self, error: OSError) -> None:
        """Note that nothing can be shown any more, and stop."""
        if self.output_error is None:
            self.output_error = error
            self.stop("nobody reads the output")

    def ring(self) -> None:
        """Make the main thread look around. Takes no lock: safe in a signal handler."""
        try:
            self._bell.release()
        except RuntimeError:
            pass  # rung already: one ring is enough

    def _grow(self) -> None:
        """Let one more command run, now that one has started.

        Where processes are few, threads must not take them all. The command that has just started
        is not reaped before this returns: it holds a place that no thread takes, so that there
        always is one for a command. Hence a thread is only started here, even if nothing waits for
        it yet.
        """
        if self._workers < self._jobs:
            with self._growth:
                if self._workers < self._jobs and self._pool.grow(self._workers + 1):
                    self._workers += 1

    def _ended(self, number: int, task: Future[int]) -> None:
        assert isinstance(task, Task)
        code = _code_of(task)
        with self._lock:
            self._counts[task.status] += 1
            self._last_code = code
            halt = self._halt
            if halt is not None and (self._is_halted or not halt.is_met(self._counts, self.total)):
                halt = None
            self._is_halted = self._is_halted or halt is not None
        if halt is not None:
            self.stop(halt.reason, running=halt.is_now)
        del self._tasks[number]  # last: whoever waits for the end finds all of it noted
        if not self._tasks:
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
