"""One run of a command: its process is started, followed, ended and reaped on the task's thread.

However a run ends (exit, failure, cancel, timeout, an exception in this thread), when `Child.run`
returns the child is reaped, the processes that `processes` counts to it are gone, and every pipe is
closed. A daemon, which left them, lives on, but does not keep the task waiting (on Windows, if it
inherited the pipes, it keeps the threads that read them).

The thread sleeps in one place, the pump's `wait`, and wakes there for output, for the child's exit,
for a cancel and for the next deadline. It waits in two more: at the `Gate` for sinks that are
behind, and for `room` to start in.

Nothing is signalled by the leader's number once the leader has been reaped: as long as it is a
zombie the kernel gives its number to no other process, group or session, so a signal cannot reach
strangers. Hence nothing here calls `Popen.poll` or `Popen.wait` on POSIX before the last signal is
sent. What somebody else reaps is `_lost`.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from functools import partial
from math import inf

from ..model.clock import monotonic
from ..model.errors import TaskTimedOut
from ..model.records import ERROR, OUTPUT
from .pipes import Gate, Lines, open_pump
from .processes import Family
from .room import REMEDY, SHORTAGES, room

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from ..running.context import TaskContext
    from .pipes import PolledPump, ThreadedPump

KILL_AFTER = 5.0
"""Seconds from SIGTERM to SIGKILL, for a command that was asked to stop."""
LINGER = 0.25
"""Seconds that the rest of a session may go on writing when its leader has exited: `cmd > >(tee
log)` loses nothing."""
STRAGGLERS_AFTER = 1.0
"""Seconds from SIGTERM to SIGKILL for what the leader left behind."""
GIVE_UP_AFTER = 5.0
"""Seconds after SIGKILL when a process that still is there (uninterruptible, another user's) is
left behind."""
LOOK_FOR_LIMIT = 1.0
"""Seconds between two questions for a limit that is not known yet."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two looks where nothing wakes the thread; doubled while nothing happens."""


class Child:
    """One run of a command, on the task's thread.

    Args:
        argv: a string for the shell, or the program and its arguments.
        cwd: the directory to run in; None is this process's own.
        env: the environment; None is this process's own.
        context: of the task, which gets the lines and may be asked to stop.
        on_start: called when the process was started.
        limit: tells for how many seconds the process may run; None as long as that is not known.
    """

    def __init__(
        self, argv: str | list[str], cwd: str | None, env: dict[str, str] | None,
        context: TaskContext, on_start: Callable[[], object] | None = None,
        limit: Callable[[], float | None] | None = None,
    ) -> None:
        self._argv, self._cwd, self._env = argv, cwd, env
        self._pump: PolledPump | ThreadedPump  # as soon as there is one
        self._on_start = on_start
        self._limit = limit
        self._context = context
        self._gate = Gate(context)
        most = context._limits.max_payload
        self._out = Lines(partial(self._say, OUTPUT), most)
        self._err = Lines(partial(self._say, ERROR), most)
        self._exited = False
        self._is_alone = False  # the leader has exited, and no other process of the command is left
        self._lost = False     # somebody else reaped the leader: its number may be a stranger's
        self._was_asked = False  # to end, while it ran: because of a cancel, or its time was over
        self._cancelled = False
        self._seconds: float | None = None  # that it may run
        self._overdue: float | None = None  # the same, when it ran longer
        self._place = ""       # what was to be told of it then
        self._gave_up = False
        self._signals = 0      # how many were sent: none, SIGTERM, SIGKILL
        self._told_strays = False
        self._due = inf        # when the next one is to be sent, by the gate's clock

    def run(self) -> int:
        """Run the command to its end; see `ShellCommand.__call__`. Once."""
        with self._context._woken_by(self._wake, (Child.run.__code__, self._told)):
            self._start()
            try:
                try:
                    self._pump.attach(self._proc, self._out, self._err)
                    if self._on_start is not None:
                        self._on_start()
                    self._follow()
                except BaseException:
                    self._abandon()
                    raise
            finally:
                code = self._close()
        if self._overdue is not None:
            self._context._overdue_at = self._place
            raise TaskTimedOut(f"ran longer than its timeout of {self._overdue:g} s")
        if self._cancelled:
            self._context.checkpoint()
        if code is None:
            raise ChildProcessError(
                errno.ECHILD,
                "how the command ended is not known: this process ignores SIGCHLD, or something in "
                "it waits for any child; set SIGCHLD to SIG_DFL, and wait for children by their "
                "numbers",
            )
        if code != 0:
            raise subprocess.CalledProcessError(code, self._argv)
        return 0

    def _wake(self) -> None:
        """Wake the thread where it waits for the child; while it starts one, it looks by itself."""
        pump = getattr(self, "_pump", None)
        if pump is not None:
            pump.ring()

    def _told(self) -> str:
        """Return what is to be told of the command when its time is over. Any thread."""
        family = getattr(self, "_family", None)
        if family is None:
            return "the command was not started: it waited for room for one more process\n"
        return f"processes of the command: {family.described()}\n"

    def _say(self, kind: int, lines: list[str]) -> None:
        self._gate.emit(partial(self._context._emit_lines, kind), lines)

    def _start(self) -> None:
        """Start the process, as soon as the system has room for it."""
        while True:
            self._context.checkpoint()  # asked to stop already: no child
            try:
                self._pump = open_pump()
                try:
                    room.keep_spares(self._pump.descriptor)
                    self._proc = self._popen()
                except BaseException:
                    self._pump.close()
                    raise
                break
            except OSError as error:
                if error.errno not in SHORTAGES:
                    raise _explained(error, self._argv, self._cwd) from error
                if not room.wait(error):
                    raise _no_room(error) from error
        self._family = Family(self._proc.pid)
        self._started = monotonic()
        room.enter()

    def _popen(self) -> subprocess.Popen[bytes]:
        # pipes of ours: where descriptors run out, `Popen` of 3.10 leaves open those that it had
        # made (gh-87474)
        read_ends: list[IO[bytes]] = []
        write_ends: list[int] = []
        try:
            for _ in range(2):
                read_end, write_end = os.pipe()
                write_ends.append(write_end)
                read_ends.append(open(read_end, "rb", buffering=0))
            proc = subprocess.Popen(
                self._argv, shell=isinstance(self._argv, str), cwd=self._cwd, env=self._env,
                stdin=subprocess.DEVNULL, stdout=write_ends[0], stderr=write_ends[1],
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))
        except BaseException:
            for pipe in read_ends:
                pipe.close()
            raise
        finally:
            for write_end in write_ends:
                os.close(write_end)
        proc.stdout, proc.stderr = read_ends
        return proc

    def _follow(self) -> None:
        """Read until the leader has exited and its session is gone; see to it when that is due."""
        pause = SHORTEST_PAUSE
        has_exited = _exit_probe(self._proc)
        while not self._is_over(has_exited):
            now = self._gate.now()
            self._escalate(now)
            timeout = max(self._time_left() if self._due == inf else self._due - now, 0.0)
            if not self._pump.sees_exit:
                timeout = min(timeout, pause)
            happened = self._pump.wait(None if timeout == inf else timeout)
            pause = SHORTEST_PAUSE if happened else min(2 * pause, LONGEST_PAUSE)
        # the pipes hold all that the session wrote; only processes that left it keep them open
        self._pump.drain()
        self._out.finish()
        self._err.finish()

    def _is_over(self, has_exited: Callable[[], bool]) -> bool:
        if not self._exited:
            try:
                self._exited = has_exited()
            except ChildProcessError:
                # SIGCHLD is ignored in this process, or somebody waits for any child
                self._exited = self._lost = True
        if self._exited and not self._lost:
            self._is_alone = not self._family.is_alive()
        return self._gave_up or self._lost or self._is_alone

    def _time_left(self) -> float:
        """Return the seconds until its time is over, or until its limit is to be asked for."""
        if self._limit is None:
            return inf
        if self._seconds is None:
            self._seconds = self._limit()
            if self._seconds is None:
                return LOOK_FOR_LIMIT
            self._context._keep_time(self._started + self._seconds, self._seconds)
        return self._started + self._seconds - monotonic()

    def _escalate(self, now: float) -> None:
        """Send the signal that is due: SIGTERM on a cancel, when the time is over, or to processes
        that the leader left behind; SIGKILL when that was no use."""
        if self._due == inf:
            if self._exited:
                self._due = now + LINGER
            elif self._context.cancel_requested:
                self._was_asked = self._cancelled = True
                self._due = now
            elif self._time_left() <= 0:
                self._was_asked, self._overdue = True, self._seconds
                self._place = self._told()
                self._due = now
        if self._exited and self._signals == 0 and not self._pump.open:
            self._due = now  # the processes that are left do not write for the task
        if self._exited and self._signals:
            self._pursue()
        if now < self._due:
            return
        if self._signals == 0:
            self._due = now + (KILL_AFTER if self._was_asked else min(KILL_AFTER, STRAGGLERS_AFTER))
        elif self._signals == 1:
            self._due = now + GIVE_UP_AFTER
        else:
            self._gave_up = True
            self._say(ERROR, [f"bgworker: processes of session {self._proc.pid} are still there "
                              "after SIGKILL and are left behind"])
        self._signals += 1
        self._signal(kill=self._signals > 1)

    def _pursue(self) -> None:
        """Signal the processes that the last signal did not reach: those whose parents were to end
        them, and those forked meanwhile."""
        if self._signals > 1:
            self._signal(kill=True)
        elif not self._told_strays and not self._family.is_session_alive():
            self._told_strays = True
            self._family.signal(signal.SIGTERM, strays=True)

    def _signal(self, *, kill: bool) -> None:
        """Signal what belongs to the command. Its leader is not reaped yet: only `_close` reaps,
        after the last one."""
        if self._lost:
            return
        if sys.platform != "win32":
            self._family.signal(signal.SIGKILL if kill else signal.SIGTERM, strays=kill)
        elif self._proc.poll() is None:
            try:
                self._proc.kill() if kill else self._proc.send_signal(signal.CTRL_BREAK_EVENT)
            except OSError:
                return  # it has ended meanwhile, or there is no console to send Ctrl-Break through

    def _abandon(self) -> None:
        """End the child after an exception in this thread: as on a cancel, in less time, and nobody
        listens."""
        self._gate.discards = True
        if self._signals == 0:
            self._due = self._gate.now()
        self._follow()

    def _close(self) -> int | None:
        """Leave nothing behind, also when `_follow` was interrupted twice. Return the exit code,
        None if none is known."""
        try:
            if not self._is_alone:
                self._signal(kill=True)
            if self._exited and sys.platform != "win32":
                return self._reap()
            return self._proc.wait(0 if self._gave_up else GIVE_UP_AFTER)
        except subprocess.TimeoutExpired:
            return None  # `Popen` reaps it later
        finally:
            self._pump.close()
            room.leave()

    def _reap(self) -> int | None:
        """Reap the leader. `Popen.wait` would take it for a success if somebody else had."""
        if not self._lost:
            self._family.kill_group()  # also for what was forked while `is_alive` looked
        if self._proc.returncode is not None:
            return self._proc.returncode
        try:
            _, status = os.waitpid(self._proc.pid, 0)
        except ChildProcessError:
            self._proc.returncode = 0  # so that `Popen` does not look for it
            return None
        self._proc.returncode = os.waitstatus_to_exitcode(status)
        return self._proc.returncode


def _exit_probe(proc: subprocess.Popen[bytes]) -> Callable[[], bool]:
    """Return a function that tells whether the child has exited, and does not reap it."""
    pid = proc.pid
    if hasattr(os, "waitid"):
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return lambda: os.waitid(os.P_PID, pid, flags) is not None
    if sys.platform == "darwin":  # os.waitid came to macOS with 3.13
        import select
        events = select.kqueue()
        try:
            events.control(
                [select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)],
                0,
            )
        except ProcessLookupError:  # a zombie already
            return lambda: True
        return lambda: bool(events.control(None, 1, 0))
    # Windows: the open handle keeps the id; else `signal` sees `returncode`
    return lambda: proc.poll() is not None


def _explained(error: OSError, argv: str | list[str], cwd: str | None) -> OSError:
    """Return the same kind of error with a message that tells the program from the directory, and
    what to do."""
    program = "/bin/sh" if isinstance(argv, str) else argv[0]
    if cwd is not None and not (os.path.isdir(cwd) and os.access(cwd, os.X_OK)):
        return OSError(error.errno, "the working directory is gone or may not be entered", cwd)
    if isinstance(error, PermissionError):
        return OSError(
            error.errno, "the program may not be executed; check its mode (chmod +x)", program
        )
    if error.errno == errno.E2BIG:
        return OSError(
            error.errno, "the command and its environment are too long (see getconf ARG_MAX; Linux "
            "takes 128 KiB in one word); write arguments to a file", program
        )
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return OSError(error.errno, f"it cannot be started: {error.strerror}", program)
    if os.path.isfile(os.path.join(cwd or "", program)):
        return OSError(
            error.errno, "the interpreter in the program's first line does not exist", program
        )
    return OSError(
        error.errno, "there is no such program; check the name, or give its full path", program
    )


def _no_room(error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"there is no room for a process ({error.strerror}), and no command runs that could "
        f"end; {REMEDY}",
    )
