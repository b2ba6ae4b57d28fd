"""``bgworker run``: run commands as tasks, show what they say, and end with an exit code that tells
how it went.

Who does what. The main thread submits and then only waits: for the end, or for a signal. A worker
thread runs each command. The printer's thread turns the events of a subscription into lines; while
it is blocked (by a pager, say) the subscription's queue fills, and then the commands' pipes are
read no further. So whatever blocks, a signal is answered.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from _thread import allocate_lock
from collections import Counter
from itertools import count
from threading import Event
from time import monotonic

from ..model.errors import BgworkerError, ShutdownError, TaskTimedOut
from ..model.events import TaskStatus
from ..running.scheduler import Scheduler
from . import reading
from .commands import Command, commands_of, left_of, sinks_of
from .printer import Notices, Printer
from .screen import Channel, Screen, TaskTable, can_redraw
from .signals import Killed, Signals, kill_children, leave_at_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence
    from concurrent.futures import Future
    from typing import Any

    from ..running.task import Task
    from ..sinks.base import Sink

FOR_EVER = 1e6
"""Seconds, eleven days: as long as a pager may keep the last lines waiting. (`Thread.join` takes no
infinity.)"""

LAST_MOMENT = 2.0
"""Seconds that the sinks get when a second signal ends it all."""

REDRAW = 0.1
"""Seconds that lines and news are gathered for, where each time the table is redrawn."""

DESCRIPTION = """\
Run one command, or many at a time, each as a task: with its own exit code,
time limit, and record.

What the commands say is shown line by line as it comes, their output on
stdout and their errors on stderr; of many commands each line begins with the
command's number, such as [12]. Our own lines go to stderr. On a terminal a
live table shows what many commands are doing, and control characters in what
they say are shown, not obeyed. Commands read no input: their stdin is empty.
"""

EPILOG = """\
the history:
  Everything is recorded in an SQLite file; bgworker tasks, show, tail, stats
  and watch read it, while the commands run and afterwards.

  --resume knows a command by its text and its directory, whatever its name,
  and skips it as often as it has completed before. What failed, was cancelled
  or was interrupted runs again.

sinks:
  jsonl:PATH, sqlite:PATH, webhook:URL or package.module:factory. Options may
  follow the path: jsonl:events.jsonl?max_bytes=10M. What signs the requests of
  a webhook is in $BGWORKER_WEBHOOK_SECRET.
  Those in $BGWORKER_SINKS, separated by commas, are added.

exit codes:
  one command   its own; 128+N if signal N ended it; 127 there is no such
                program; 126 it cannot be executed; 124 it ran longer than
                --timeout
  many          0 all completed; 1 some failed; 124 none failed, but some ran
                longer than --timeout
  either        2 the command line, the file of commands or a sink cannot be
                used, and nothing was started; 128+N signal N ended it, such
                as 130 for Ctrl-C, 143 for SIGTERM, 129 for a terminal that is
                gone (SIGHUP); 141 nobody reads our output any more (as in
                ... | head -1); 1 our output cannot be written, for another
                reason, or the system has no thread for us

  The first Ctrl-C, or any other signal, asks the commands to stop (SIGTERM,
  and SIGKILL 5 seconds later) and records how they end; a second one, or
  Ctrl-\\, kills them at once. Ctrl-Z stops them until we go on, though not the
  clock of --timeout.

examples:
  bgworker run --timeout 60 -- gzip -t backup.gz
  bgworker run -j 4 --db nightly.db --resume -f commands.txt
  bgworker run -j 4 --no-db --jsonl events.jsonl -f commands.txt
  seq 20 | sed 's/.*/.\\/simulate --seed &/' | bgworker run --fail-fast -f -

  Lines are shell commands: make none from names that you have not chosen. A
  name with a blank is two words, and one such as a;b runs b.
"""


# ---------------------------------------------------------------- the command line

def add_parser(verbs: Any) -> None:
    """Describe the verb to the parser of the whole command line."""
    parser = verbs.add_parser(
        "run",
        help="run one command, or a file of commands",
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="%(prog)s [options] -- COMMAND [ARGUMENT ...]\n" "       %(prog)s [options] -f FILE",
    )
    parser.add_argument("command", nargs="...", metavar="COMMAND ...",
                        help="the program and its arguments, run directly, without a shell")
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="run each line of FILE by the shell, - is stdin; blank lines and lines that begin with # are "
        "skipped",
    )
    parser.add_argument(
        "-j",
        "--jobs",
        metavar="N",
        type=_jobs,
        default=_cpus(),
        help="how many commands run at a time (default: the number of CPUs, here %(default)s)",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=_seconds, help="seconds that each command may run"
    )
    parser.add_argument("--name", metavar="N", type=_name,
                        help="name of the task; of many, N-1, N-2 and so on (default: the command)")
    reading.add_db(parser, "record what happens in this history")
    parser.add_argument(
        "--no-db", dest="db", action="store_const", const=None, help="record no history"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip the commands that completed in an earlier run of the history, in the same directory",
    )
    parser.add_argument(
        "--jsonl", metavar="PATH", help="append all events to this file, one JSON object a line"
    )
    parser.add_argument(
        "--sink",
        metavar="SPEC",
        action="append",
        default=[],
        help="send all events to this sink too; may be given several times, see below",
    )
    parser.add_argument("--fail-fast", action="store_true",
                        help="when a command fails or runs out of time, cancel all others")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no line for each command that completed"
    )
    parser.set_defaults(act=act, parser=parser)


def _cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # what this process may use of them
    return os.cpu_count() or 1


def _jobs(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise _wrong(
            f"expected a whole number >= 1, got {text!r}; leave it out for one command per CPU"
        )
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):  # False for nan, too
        raise _wrong(f"expected a number of seconds > 0, got {text!r}; leave it out for no limit")
    return value


def _name(text: str) -> str:
    if not text.strip():
        raise _wrong(
            f"expected a name, got {text!r}; leave it out to name tasks after their commands"
        )
    return text


def _wrong(message: str) -> Exception:
    from argparse import ArgumentTypeError
    return ArgumentTypeError(message)


# ---------------------------------------------------------------- the run

def act(options: Namespace) -> int:
    """Run the commands and return the exit code."""
    try:
        commands = commands_of(options)
        count = len(commands)
        if options.resume:
            commands = left_of(commands, options)
        sinks = sinks_of(options)
    except BgworkerError as error:
        options.parser.error(str(error))
    if len(commands) < count:
        print(
            f"bgworker run: {count - len(commands)} of {count} commands completed before, {len(commands)} are left",
            file=sys.stderr,
        )
    if not commands:
        return 0
    out, err = Channel(sys.stdout), Channel(sys.stderr)
    table = TaskTable()
    is_live = len(commands) > 1 and can_redraw(err)
    screen = Screen(out, err, table if is_live else None, clock=monotonic,
                    colour=can_redraw(err) and not os.environ.get("NO_COLOR"))
    run = Run(commands, screen, fail_fast=options.fail_fast)
    printer = Printer(run, screen, table, quiet=options.quiet)
    with Notices(printer.notices), Signals(run, screen):
        try:
            scheduler = _scheduler(sinks)
        except BgworkerError as error:
            options.parser.error(str(error))
        try:
            subscription = scheduler.subscribe(
                maxsize=100_000 + 4 * len(commands), back_pressure=True
            )
            printer.follow(subscription, REDRAW if is_live else 0.0)
            run.submit(scheduler, options.jobs, options.timeout)
            run.wait()
            subscription.close()
            printer.join(FOR_EVER)  # all is shown, however slowly it is read
            scheduler.shutdown()  # waits for commands that are past their deadline to be gone
            printer.finish(
                subscription.health().dropped, scheduler.sinks, monotonic() - run.started
            )
        except BaseException as error:
            # `Killed`, or a defect: in no case may commands go on unseen
            kill_children()
            run.stop("killed")
            scheduler.shutdown(timeout=LAST_MOMENT)
            if isinstance(error, Killed):
                leave_at_once(run, screen)
            if isinstance(error, (ShutdownError, RuntimeError)) and "thread" in str(error):
                print(
                    f"bgworker run: error: {error}; raise the limit of processes (ulimit -u, the container's)",
                    file=sys.stderr,
                )
                return 1
            raise
    return run.exit_code()


def _scheduler(sinks: Sequence[Sink]) -> Scheduler:
    scheduler = Scheduler(1, keep_finished=0)  # `Run` lets it grow
    try:
        for sink in sinks:
            scheduler.register_sink(sink)
    except BaseException:
        scheduler.shutdown()
        raise
    return scheduler


class Run:
    """The commands as tasks, from the first submit to the exit code."""

    def __init__(self, commands: Sequence[Command], screen: Screen, *, fail_fast: bool) -> None:
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
            for command in self.commands:
                command.call.on_start = self._grow
                options = scheduler.options(
                    name=command.name, timeout=timeout, metadata=command.metadata
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
