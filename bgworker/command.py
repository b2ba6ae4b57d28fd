"""A callable that runs a child process as a task: its lines become the task's streams, and nothing of it stays behind.

However a run ends (exit, failure, cancel, timeout, an exception in this thread), when the call returns the child is
reaped, its process group is gone and every pipe is closed. A process that left the group (`setsid`) lives on, but
does not keep the task waiting. Everything runs on the task's own thread, which sleeps in one place, `_Child.follow`,
and wakes there for output, for the child's exit, for a cancel and for the next deadline; on Windows, where pipes
cannot be waited for, two threads read them (a process that inherited them and outlives the child keeps its reader).

The group is signalled only while its leader has not been reaped: as long as the leader is a zombie the kernel gives
its id to no other process or group, so a signal cannot reach strangers. Hence nothing here calls `Popen.poll`
or `Popen.wait` on POSIX before the last signal is sent.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from .errors import ConfigurationError
from .records import Source
from .task import current_task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from queue import SimpleQueue
    from subprocess import Popen
    from typing import IO

    from .task import TaskContext

KILL_AFTER = 5.0
"""Seconds from SIGTERM to SIGKILL, for a command that was asked to stop."""
_LINGER = 0.25
"""Seconds that the rest of a group may go on writing when its leader has exited: `cmd > >(tee log)` loses nothing."""
_STRAGGLERS_AFTER = 1.0
"""Seconds from SIGTERM to SIGKILL for what the leader left behind."""
_GIVE_UP_AFTER = 5.0
"""Seconds after SIGKILL when a process that still is there (uninterruptible, another user's) is left behind."""
_POLL = (0.001, 0.05)
"""Shortest and longest pause between two looks where nothing wakes the thread; doubled while nothing happens."""
_CHUNK = 65536
_PIECE = 65536
"""Most UTF-8 bytes of one line; a longer one is emitted in pieces."""
_DRAIN_ROUNDS = 64
"""Most reads after the end. Sixteen empty the largest pipe; a process that left the group may write without end."""


def shell(argv_or_command: str | Sequence[str | os.PathLike[str]], *, cwd: str | os.PathLike[str] | None = None,
          env: Mapping[str, str] | None = None) -> ShellCommand:
    """Make a callable that runs a command as a task: ``scheduler.submit(shell("make -j4"))``.

    Args:
        argv_or_command: a string is run by the shell (``/bin/sh -c``, ``ComSpec`` on Windows); a sequence, program
            first, is run directly and needs no quoting.
        cwd: an existing directory to run in; None is the process's own when the task runs.
        env: replaces the environment, as in `subprocess`; None inherits it.
    Raises:
        ConfigurationError: for a command, directory or environment that cannot be run.
    """
    return ShellCommand(_checked_argv(argv_or_command), _checked_cwd(cwd), _checked_env(env))


class ShellCommand:
    """A command, ready to run any number of times, on any thread. Made by `shell`."""

    __slots__ = ("__name__", "__qualname__", "argv", "cwd", "env")

    def __init__(self, argv: str | list[str], cwd: str | None, env: dict[str, str] | None) -> None:
        self.argv = argv
        """A string for the shell, or the program and its arguments."""
        self.cwd = cwd
        self.env = env
        self.__name__ = self.__qualname__ = _program_name(argv)

    def __call__(self) -> int:
        """Run the command to its end; each line of it goes to the current task's output or error stream at once.

        Lines end at a newline; of a line that was overwritten by carriage returns the last state counts, bytes that
        are not UTF-8 become U+FFFD, and lines over 64 KiB come in pieces.

        Returns: 0.
        Raises:
            subprocess.CalledProcessError: it exited with another code, or by a signal (a negative code).
            FileNotFoundError, PermissionError: the program or the directory is missing, or may not be used.
            TaskCancelled: the task was asked to stop; the group got SIGTERM, after `KILL_AFTER` seconds SIGKILL.
        """
        return _Child(self, current_task()).run()

    @property
    def source(self) -> Source:
        """The command's text, as the task's source."""
        return _CommandSource(self.__name__, self.argv)

    def __repr__(self) -> str:
        return f"shell({self.argv!r}{'' if self.cwd is None else f', cwd={self.cwd!r}'})"  # env may hold secrets


class _CommandSource(Source):
    """Outlives the command in the records of its tasks, hence without the environment."""

    __slots__ = ("_name", "_argv")

    def __init__(self, name: str, argv: str | list[str]) -> None:
        self._name = name
        self._argv = argv

    @property
    def script_id(self) -> str:
        return self._name

    @property
    def script_hash(self) -> str:
        import hashlib
        return hashlib.sha256(self.script_text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def script_text(self) -> str:
        import shlex
        return self._argv if isinstance(self._argv, str) else shlex.join(self._argv)


class _Child:
    """One run of a command, on the task's thread."""

    def __init__(self, command: ShellCommand, context: TaskContext) -> None:
        self.command = command
        self.context = context
        self.out, self.err = _Lines(context.output), _Lines(context.error)
        self.pump = _make_pump()
        self.proc: Popen[bytes] | None = None
        self.exited = False
        self.lost = False        # somebody else reaped the leader: its id may be a stranger's
        self.cancelled = False
        self.gave_up = False
        self.signals = 0         # how many were sent: none, SIGTERM, SIGKILL
        self.due = float("inf")  # when the next one is to be sent

    def run(self) -> int:
        import subprocess
        try:
            self.context.on_cancel(self.pump.ring)
            self.context.checkpoint()  # asked to stop already: no child
            try:
                self.proc = self.start()
                self.pump.attach(self.proc, self.out, self.err)
                self.follow(self.proc)
            except BaseException:
                if self.proc is not None:
                    self.abandon(self.proc)
                raise
        finally:
            self.close()
            self.context.on_cancel(None)
        if self.cancelled:
            self.context.checkpoint()
        if self.proc.returncode != 0:
            raise subprocess.CalledProcessError(self.proc.returncode, self.command.argv)
        return 0

    def start(self) -> Popen[bytes]:
        import subprocess
        command = self.command
        try:
            return subprocess.Popen(
                command.argv, shell=isinstance(command.argv, str), cwd=command.cwd, env=command.env, bufsize=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=os.name != "nt", creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise _explained(error, command) from error

    def follow(self, proc: Popen[bytes]) -> None:
        """Read until the leader has exited and its group is gone; see to it when that is due."""
        pause = _POLL[0]
        has_exited = _exit_probe(proc)
        while not self.is_over(proc, has_exited):
            now = time.monotonic()
            self.escalate(proc, now)
            timeout = max(self.due - now, 0.0)
            if not self.pump.sees_exit:
                timeout = min(timeout, pause)
            happened = self.read(None if timeout == float("inf") else timeout)
            pause = _POLL[0] if happened else min(2 * pause, _POLL[1])
        # All that the group wrote is in the pipes by now; only who left the group can still hold them open.
        end = time.monotonic() + self.pump.settle
        for _ in range(_DRAIN_ROUNDS):
            if not self.pump.open or not self.read(max(end - time.monotonic(), 0.0)):
                break
        self.out.finish()
        self.err.finish()

    def read(self, timeout: float | None) -> bool:
        """Wait and read: the one place where the child can be made to wait for its readers."""
        return self.pump.wait(timeout)

    def is_over(self, proc: Popen[bytes], has_exited: Callable[[], bool]) -> bool:
        if not self.exited:
            try:
                self.exited = has_exited()
            except ChildProcessError:  # SIGCHLD is ignored in this process, or somebody waits for any child
                self.exited = self.lost = True
        return self.gave_up or self.exited and (self.lost or not _group_is_alive(proc.pid))

    def escalate(self, proc: Popen[bytes], now: float) -> None:
        """Send what is due: SIGTERM on a cancel or to what the leader left behind, SIGKILL when that was no use."""
        if self.due == float("inf"):
            if self.exited:
                self.due = now + _LINGER
            elif self.context.cancel_requested:
                self.cancelled, self.due = True, now
        if self.exited and self.signals == 0 and not self.pump.open:
            self.due = now  # whoever is left does not write for the task
        if now < self.due:
            return
        if self.signals == 0:
            self.due = now + (KILL_AFTER if self.cancelled else min(KILL_AFTER, _STRAGGLERS_AFTER))
        elif self.signals == 1:
            self.due = now + _GIVE_UP_AFTER
        else:
            self.gave_up = True
            self.err.emit(f"bgworker: process group {proc.pid} is still there after SIGKILL and is left behind")
        self.signals += 1
        self.signal(proc, kill=self.signals > 1)

    def signal(self, proc: Popen[bytes], *, kill: bool) -> None:
        """Signal the group. Its leader is not reaped yet: only `close` reaps, after the last signal."""
        import signal
        if self.lost or proc.returncode is not None:
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

    def abandon(self, proc: Popen[bytes]) -> None:
        """End the child after an exception in this thread: as on a cancel, in less time, and nobody listens."""
        self.out.emit = self.err.emit = _discard
        if self.signals == 0:
            self.due = time.monotonic()
        self.follow(proc)

    def close(self) -> None:
        """Leave nothing behind, also when `follow` was interrupted twice."""
        import subprocess
        try:
            if self.proc is not None:
                self.signal(self.proc, kill=True)  # also for what was forked while `_group_is_alive` looked
                self.proc.wait(0 if self.gave_up else _GIVE_UP_AFTER)
        except subprocess.TimeoutExpired:
            self.gave_up = True  # `Popen` reaps it later
        finally:
            self.pump.close()


class _Lines:
    """Cuts bytes into lines of text; holds less than one line, and never more than 64 KiB and a chunk."""

    __slots__ = ("emit", "_rest")

    def __init__(self, emit: Callable[[str], None]) -> None:
        self.emit = emit
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        # A newline byte is never part of a UTF-8 character, so cutting there and decoding whole blocks is exact.
        block, newline, rest = (self._rest + chunk).rpartition(b"\n")
        if b"\r" in rest:  # a progress bar: forget what was overwritten, but keep a return that may belong to \r\n
            shown = rest.rstrip(b"\r")
            rest = shown[shown.rfind(b"\r") + 1:] + rest[len(shown):][:1]
        self._rest = rest
        if newline:
            self._emit(block)
        while len(self._rest) > _PIECE:
            cut = _boundary(self._rest)
            piece, self._rest = self._rest[:cut], self._rest[cut:]
            self._emit(piece)

    def finish(self) -> None:
        """Emit a last line that has no newline."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        if rest:
            self._emit(rest)

    def _emit(self, block: bytes) -> None:
        text = block.decode("utf-8", "replace")
        lines = text.split("\n")  # not splitlines(), which also cuts at form feeds and U+2028
        if "\r" in text:
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
        if max(map(len, lines)) > _PIECE // 4:  # a character takes four bytes at most
            lines = [piece for line in lines for piece in _pieces(line)]
        emit = self.emit
        for line in lines:
            emit(line)


def _pieces(line: str) -> Iterator[str]:
    data = line.encode()  # cannot fail: it was decoded from UTF-8
    while len(data) > _PIECE:
        cut = _boundary(data)
        yield data[:cut].decode()
        data = data[cut:]
    yield data.decode()


def _boundary(data: bytes) -> int:
    """Return the last place up to `_PIECE` that is not inside a character."""
    for cut in range(_PIECE, _PIECE - 4, -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return _PIECE  # not UTF-8


def _discard(line: str) -> None:
    """Take a line that nobody wants any more."""


class _PolledPump:
    """POSIX: both pipes, the child's exit and the call to stop in one selector; no thread, no busy waiting."""

    settle = 0.0
    """Seconds to wait for what was written before the end: it is in the pipe already."""

    def __init__(self) -> None:
        import selectors
        self.open = 0
        """How many pipes have not ended."""
        self.sees_exit = False
        """True while `wait` wakes up for the child's exit."""
        self._lock = threading.Lock()  # guards the rope's descriptor; taken for good by `close`
        self._pipes: tuple[IO[bytes], ...] = ()
        self._pidfd = -1
        self._selector = selectors.PollSelector()
        self._bell, self._rope = os.pipe()
        self._selector.register(self._bell, selectors.EVENT_READ)

    def ring(self) -> None:
        """Wake `wait`. Any thread, also in a signal handler; never blocks."""
        if self._lock.acquire(blocking=False):  # else it is being rung, or closed: either way nothing is to be done
            try:
                os.write(self._rope, b"!")
            finally:
                self._lock.release()

    def attach(self, proc: Popen[bytes], out: _Lines, err: _Lines) -> None:
        import selectors
        assert proc.stdout is not None and proc.stderr is not None
        self._pipes = (proc.stdout, proc.stderr)
        for pipe, lines in zip(self._pipes, (out, err)):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, (pipe, lines))
            self.open += 1
        try:
            self._pidfd = os.pidfd_open(proc.pid)
            self._selector.register(self._pidfd, selectors.EVENT_READ)
            self.sees_exit = True
        except (AttributeError, OSError):  # not Linux, before Linux 5.3, or forbidden by a sandbox: `follow` polls
            self.sees_exit = False

    def wait(self, timeout: float | None) -> bool:
        """Sleep until something happens, and take it in; False when nothing did."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            if key.data is not None:
                self._read(*key.data)
            else:  # the bell or the exit: both stay readable, once is enough
                self._selector.unregister(key.fd)
                self.sees_exit = self.sees_exit and key.fd != self._pidfd
        return bool(ready)

    def _read(self, pipe: IO[bytes], lines: _Lines) -> None:
        try:
            chunk = os.read(pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return
        if chunk:
            lines.feed(chunk)
            return
        self._selector.unregister(pipe)
        pipe.close()
        self.open -= 1
        lines.finish()

    def close(self) -> None:
        self._lock.acquire()  # a late cancel must not write to a descriptor that is somebody else's by then
        self._selector.close()
        for pipe in self._pipes:
            pipe.close()
        for descriptor in (self._bell, self._rope, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)


class _ThreadedPump:
    """Windows: a thread per pipe reads it and hands the chunks over, at most eight ahead."""

    settle = 0.25
    sees_exit = False

    def __init__(self) -> None:
        from queue import SimpleQueue
        self.open = 0
        self._chunks: SimpleQueue[tuple[_Lines, bytes] | None] = SimpleQueue()
        self._room = threading.Semaphore(8)
        self._closed = False
        self._readers: list[threading.Thread] = []

    def ring(self) -> None:
        self._chunks.put(None)  # re-entrant, and unbounded

    def attach(self, proc: Popen[bytes], out: _Lines, err: _Lines) -> None:
        for pipe, lines in ((proc.stdout, out), (proc.stderr, err)):
            name = f"bgworker-pipe-{proc.pid}"
            reader = threading.Thread(target=self._read, args=(pipe, lines), name=name, daemon=True)
            reader.start()
            self._readers.append(reader)
            self.open += 1

    def _read(self, pipe: IO[bytes], lines: _Lines) -> None:
        with pipe:  # closed by the thread that reads it: a descriptor must not change hands under a blocked read
            chunk = b"?"
            while chunk and not self._closed:
                chunk = os.read(pipe.fileno(), _CHUNK)
                self._room.acquire()
                self._chunks.put((lines, chunk))

    def wait(self, timeout: float | None) -> bool:
        from queue import Empty
        try:
            item = self._chunks.get(timeout=timeout)
        except Empty:
            return False
        if item is not None:
            lines, chunk = item
            self._room.release()
            if chunk:
                lines.feed(chunk)
            else:
                self.open -= 1
                lines.finish()
        return True

    def close(self) -> None:
        self._closed = True
        self._room.release(2)
        for reader in self._readers:
            reader.join(self.settle)


def _make_pump() -> _PolledPump | _ThreadedPump:
    return _ThreadedPump() if os.name == "nt" else _PolledPump()


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


def _explained(error: OSError, command: ShellCommand) -> OSError:
    """Return the same kind of error with a message that tells the program from the directory, and what to do."""
    program, cwd = "/bin/sh" if isinstance(command.argv, str) else command.argv[0], command.cwd
    if cwd is not None and not (os.path.isdir(cwd) and os.access(cwd, os.X_OK)):
        return OSError(error.errno, "the working directory is gone or may not be entered", cwd)
    if isinstance(error, PermissionError):
        return OSError(error.errno, "the program may not be executed; check its mode (chmod +x)", program)
    if os.path.isfile(os.path.join(cwd or "", program)):
        return OSError(error.errno, "the interpreter in the program's first line does not exist", program)
    return OSError(error.errno, "there is no such program; check the name, or give its full path", program)


def _program_name(argv: str | list[str]) -> str:
    if isinstance(argv, list):
        return os.path.basename(argv[0].rstrip("/")) or argv[0]
    import re
    found = re.match(r"""\s*(?:\w+=\S*\s+)*(?:"([^"]+)"|'([^']+)'|([^\s;&|<>(){}"'`$#]+))""", argv)  # skips VAR=value
    return os.path.basename(found[found.lastindex or 0]) or "sh" if found else "sh"


def _checked_argv(given: object) -> str | list[str]:
    if not isinstance(given, (str, Sequence)) or isinstance(given, (bytes, bytearray, memoryview)):
        raise ConfigurationError(f"expected a command line (str) or a sequence of arguments, got {given!r}; "
                                 "write shell('make test') or shell(['make', 'test'])")
    words = [given] if isinstance(given, str) else list(given)
    words = [os.fspath(word) if isinstance(word, os.PathLike) else word for word in words]
    for word in words:
        if not isinstance(word, str):
            raise ConfigurationError(f"expected arguments of type str or os.PathLike, got {word!r}; use str() on it")
        if "\0" in word:
            raise ConfigurationError(f"expected no NUL character in a command, got {word!r}; write such data to a file")
    if not words or not words[0].strip():
        raise ConfigurationError(f"expected a command, got {given!r}; name the program to run first")
    return words[0] if isinstance(given, str) else words


def _checked_cwd(cwd: object) -> str | None:
    if cwd is None:
        return None
    if not isinstance(cwd, (str, os.PathLike)) or not os.path.isdir(cwd):  # False for a path with NUL, too
        raise ConfigurationError(f"expected cwd to be an existing directory, got {cwd!r}; create it, or pass None")
    return os.path.abspath(os.fsdecode(cwd))


def _checked_env(env: object) -> dict[str, str] | None:
    if env is None:
        return None
    if not isinstance(env, Mapping) or not all(isinstance(text, str) for pair in env.items() for text in pair):
        raise ConfigurationError(f"expected env to map str to str, got a {type(env).__name__}; "  # values may be secret
                                 "pass a dict such as {**os.environ, 'LANG': 'C'}")
    for name in env:
        if not name or "=" in name or "\0" in name + env[name]:
            raise ConfigurationError(f"expected env[{name!r}] to have a name without '=', and no NUL; correct it")
    return dict(env)
