"""One run of a command: its process is started, followed, ended and reaped on the task's thread.

However a run ends (exit, failure, cancel, timeout, an exception in this thread), when `Child.run` returns the child is
reaped, its process group is gone and every pipe is closed. A process that left the group (`setsid`) lives on, but
does not keep the task waiting (on Windows, if it inherited the pipes, it keeps the threads that read them).

The thread sleeps in one place, the pump's `wait`, and wakes there for output, for the child's exit, for a cancel and
for the next deadline; and it waits at the `Gate` for sinks that are behind. A cancel ends either wait.

The group is signalled only while its leader has not been reaped: as long as the leader is a zombie the kernel gives
its id to no other process or group, so a signal cannot reach strangers. Hence nothing here calls `Popen.poll`
or `Popen.wait` on POSIX before the last signal is sent.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from math import inf

from ..model.records import ERROR, OUTPUT
from .pipes import Gate, Lines, open_pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen

    from ..running.context import TaskContext

KILL_AFTER = 5.0
"""Seconds from SIGTERM to SIGKILL, for a command that was asked to stop."""
LINGER = 0.25
"""Seconds that the rest of a group may go on writing when its leader has exited: `cmd > >(tee log)` loses nothing."""
STRAGGLERS_AFTER = 1.0
"""Seconds from SIGTERM to SIGKILL for what the leader left behind."""
GIVE_UP_AFTER = 5.0
"""Seconds after SIGKILL when a process that still is there (uninterruptible, another user's) is left behind."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two looks where nothing wakes the thread; doubled while nothing happens."""


class Child:
    """One run of a command, on the task's thread.

    Args:
        argv: a string for the shell, or the program and its arguments.
        cwd: the directory to run in; None is this process's own.
        env: the environment; None is this process's own.
        context: of the task, which gets the lines and may be asked to stop.
    """

    def __init__(self, argv: str | list[str], cwd: str | None, env: dict[str, str] | None, context: TaskContext) -> None:
        self._argv, self._cwd, self._env = argv, cwd, env
        self._context = context
        self._gate = Gate(context)
        most = context._limits.max_payload
        self._out = Lines(partial(self._say, OUTPUT), most)
        self._err = Lines(partial(self._say, ERROR), most)
        self._pump = open_pump()
        self._proc: Popen[bytes] | None = None
        self._exited = False
        self._lost = False     # somebody else reaped the leader: its id may be a stranger's
        self._cancelled = False
        self._gave_up = False
        self._signals = 0      # how many were sent: none, SIGTERM, SIGKILL
        self._due = inf        # when the next one is to be sent, by the gate's clock

    def run(self) -> int:
        """Run the command to its end; see `ShellCommand.__call__`. Once."""
        import subprocess
        try:
            self._context.on_cancel(self._pump.ring)
            self._context.checkpoint()  # asked to stop already: no child
            try:
                self._proc = self._start()
                self._pump.attach(self._proc, self._out, self._err)
                self._follow(self._proc)
            except BaseException:
                if self._proc is not None:
                    self._abandon(self._proc)
                raise
        finally:
            self._close()
            self._context.on_cancel(None)
        if self._cancelled:
            self._context.checkpoint()
        if self._proc.returncode != 0:
            raise subprocess.CalledProcessError(self._proc.returncode, self._argv)
        return 0

    def _say(self, kind: int, lines: list[str]) -> None:
        self._gate.emit(partial(self._context._emit_lines, kind), lines)

    def _start(self) -> Popen[bytes]:
        import subprocess
        try:
            return subprocess.Popen(
                self._argv, shell=isinstance(self._argv, str), cwd=self._cwd, env=self._env, bufsize=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=os.name != "nt", creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise _explained(error, self._argv, self._cwd) from error

    def _follow(self, proc: Popen[bytes]) -> None:
        """Read until the leader has exited and its group is gone; see to it when that is due."""
        pause = SHORTEST_PAUSE
        has_exited = _exit_probe(proc)
        while not self._is_over(proc, has_exited):
            now = self._gate.now()
            self._escalate(proc, now)
            timeout = max(self._due - now, 0.0)
            if not self._pump.sees_exit:
                timeout = min(timeout, pause)
            happened = self._pump.wait(None if timeout == inf else timeout)
            pause = SHORTEST_PAUSE if happened else min(2 * pause, LONGEST_PAUSE)
        self._pump.drain()  # all that the group wrote is in the pipes by now; only who left it can still hold them open
        self._out.finish()
        self._err.finish()

    def _is_over(self, proc: Popen[bytes], has_exited: Callable[[], bool]) -> bool:
        if not self._exited:
            try:
                self._exited = has_exited()
            except ChildProcessError:  # SIGCHLD is ignored in this process, or somebody waits for any child
                self._exited = self._lost = True
        return self._gave_up or self._exited and (self._lost or not _group_is_alive(proc.pid))

    def _escalate(self, proc: Popen[bytes], now: float) -> None:
        """Send what is due: SIGTERM on a cancel or to what the leader left behind, SIGKILL when that was no use."""
        if self._due == inf:
            if self._exited:
                self._due = now + LINGER
            elif self._context.cancel_requested:
                self._cancelled, self._due = True, now
        if self._exited and self._signals == 0 and not self._pump.open:
            self._due = now  # whoever is left does not write for the task
        if now < self._due:
            return
        if self._signals == 0:
            self._due = now + (KILL_AFTER if self._cancelled else min(KILL_AFTER, STRAGGLERS_AFTER))
        elif self._signals == 1:
            self._due = now + GIVE_UP_AFTER
        else:
            self._gave_up = True
            self._say(ERROR, [f"bgworker: process group {proc.pid} is still there after SIGKILL and is left behind"])
        self._signals += 1
        self._signal(proc, kill=self._signals > 1)

    def _signal(self, proc: Popen[bytes], *, kill: bool) -> None:
        """Signal the group. Its leader is not reaped yet: only `_close` reaps, after the last signal."""
        import signal
        if self._lost or proc.returncode is not None:
            return
        try:
            if sys.platform != "win32":
                os.killpg(proc.pid, signal.SIGKILL if kill else signal.SIGTERM)
            elif kill:
                proc.kill()
            else:
                proc.send_signal(signal.CTRL_BREAK_EVENT)
        except OSError:
            return  # nobody is left (EPERM on macOS), another user's process, or no console to send Ctrl-Break through

    def _abandon(self, proc: Popen[bytes]) -> None:
        """End the child after an exception in this thread: as on a cancel, in less time, and nobody listens."""
        self._gate.discards = True
        if self._signals == 0:
            self._due = self._gate.now()
        self._follow(proc)

    def _close(self) -> None:
        """Leave nothing behind, also when `_follow` was interrupted twice."""
        import subprocess
        try:
            if self._proc is not None:
                self._signal(self._proc, kill=True)  # also for what was forked while `_group_is_alive` looked
                self._proc.wait(0 if self._gave_up else GIVE_UP_AFTER)
        except subprocess.TimeoutExpired:
            self._gave_up = True  # `Popen` reaps it later
        finally:
            self._pump.close()


def _exit_probe(proc: Popen[bytes]) -> Callable[[], bool]:
    """Return a function that tells whether the child has exited, and does not reap it."""
    pid = proc.pid
    if hasattr(os, "waitid"):
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return lambda: os.waitid(os.P_PID, pid, flags) is not None
    if sys.platform == "darwin":  # os.waitid came to macOS with 3.13
        import select
        events = select.kqueue()
        try:
            events.control([select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)], 0)
        except ProcessLookupError:  # a zombie already
            return lambda: True
        return lambda: bool(events.control(None, 1, 0))
    return lambda: proc.poll() is not None  # Windows: the open handle keeps the id; else `signal` sees `returncode`


def _group_is_alive(leader: int) -> bool:
    """Tell whether anyone but the exited, not yet reaped leader is in its group; False where that cannot be known."""
    if sys.platform == "darwin":
        try:
            os.killpg(leader, 0)  # does not count zombies there
        except OSError:
            return False
        return True
    if sys.platform != "linux":
        return False
    # killpg(leader, 0) counts zombies here: the leader, and orphans in a container whose first process reaps nobody.
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        try:
            if name.isdecimal() and int(name) != leader and os.getpgid(int(name)) == leader:
                with open(f"/proc/{name}/stat", "rb") as file:
                    if file.read().rpartition(b") ")[2][:1] not in b"ZX":  # zombie, dead
                        return True
        except (ProcessLookupError, FileNotFoundError):
            continue  # it ended meanwhile
    return False


def _explained(error: OSError, argv: str | list[str], cwd: str | None) -> OSError:
    """Return the same kind of error with a message that tells the program from the directory, and what to do."""
    program = "/bin/sh" if isinstance(argv, str) else argv[0]
    if cwd is not None and not (os.path.isdir(cwd) and os.access(cwd, os.X_OK)):
        return OSError(error.errno, "the working directory is gone or may not be entered", cwd)
    if isinstance(error, PermissionError):
        return OSError(error.errno, "the program may not be executed; check its mode (chmod +x)", program)
    if os.path.isfile(os.path.join(cwd or "", program)):
        return OSError(error.errno, "the interpreter in the program's first line does not exist", program)
    return OSError(error.errno, "there is no such program; check the name, or give its full path", program)
