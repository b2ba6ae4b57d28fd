"""From a child's pipes to its task's streams: a pump reads chunks of bytes, `Lines` cuts them, a
`Gate` lets them through.

Everything here runs on the task's own thread, which sleeps in the pump's `wait` or at the gate; on
Windows, where pipes cannot be waited for, two more threads read them. Nothing is held but one
chunk, and less than one line, of each pipe: a child that says more than the sinks can take finds
its pipe full and waits in its writes.
"""

from __future__ import annotations

import os
import selectors
import threading
from codecs import getincrementaldecoder
from queue import Empty, SimpleQueue

from ..model.clock import monotonic
from ..model.text import last_state, pieces, sanitise
from ..model.threads import own_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen
    from typing import IO

    from ..running.context import TaskContext

_CHUNK = 65536
"""Most bytes of one read: what a pipe holds."""
_MOST_CHUNKS = 64
"""Most chunks that are taken in after the end: more than the largest pipe holds."""
_PIECE = 65536
"""Most characters of a line that has not ended yet; a longer one is emitted in pieces."""


class Gate:
    """Lets lines into the task's streams no faster than the healthy sinks keep up, on a clock that
    stops meanwhile.

    Once the task is asked to stop nothing waits here any more, so that its end comes promptly; what
    does not fit into the sinks' queues then is lost, and counted.
    """

    __slots__ = ("discards", "_context", "_waited")

    def __init__(self, context: TaskContext) -> None:
        self.discards = False
        """Set when nobody wants the lines any more."""
        self._context = context
        self._waited = 0.0

    def emit(self, send: Callable[[list[str]], object], lines: list[str]) -> None:
        """Emit lines, a few at a time; before each few wait for room."""
        text = "".join(lines)  # looked at as one: half as many calls as lines are saved
        size = len(text) * (1 if text.isascii() else 4) // len(lines)
        start = 0
        while start < len(lines) and not self.discards:
            arrived = monotonic()
            room = self._context._wait_for_room(size)
            self._waited += monotonic() - arrived
            send(lines[start:start + room])
            start += room

    def now(self) -> float:
        """Return the time on the monotonic clock less the time that was spent waiting: what a child
        is given to do something in must not run out while it cannot write."""
        return monotonic() - self._waited


class Lines:
    """Cuts bytes into lines of text; holds less than one line, and at most 64 Ki characters.

    Args:
        emit: gets the lines that a chunk has completed, at least one: clean text, no line of it
            over ``most`` bytes.
        most: UTF-8 bytes of a line, as it will be recorded; a longer one is emitted in pieces.
    """

    __slots__ = ("_emit", "_most", "_decode", "_rest")

    def __init__(self, emit: Callable[[list[str]], object], most: int = _PIECE) -> None:
        self._emit = emit
        self._most = max(4, min(most, _PIECE))  # a character takes four bytes at most
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""

    def feed(self, chunk: bytes, *, is_last: bool = False) -> None:
        """Take in bytes and emit the lines that they complete."""
        text = self._rest + sanitise(self._decode(chunk, is_last))
        lines = text.split("\n")  # not splitlines(), which also cuts at form feeds
        rest = lines.pop()
        if "\r" in text:
            lines = list(map(last_state, lines))
            # a progress bar: forget what was overwritten, but keep a return that may belong to \r\n
            rest = last_state(rest) + "\r" * rest.endswith("\r")
        if len(rest) > _PIECE:
            *early, rest = pieces(rest, self._most)
            lines += early
        self._rest = rest
        if lines:
            if max(map(len, lines)) > self._most // 4:
                lines = [piece for line in lines for piece in pieces(line, self._most)]
            self._emit(lines)

    def finish(self) -> None:
        """Emit a last line that has no newline."""
        self.feed(b"", is_last=True)
        if last_state(self._rest):
            self.feed(b"\n")
        self._rest = ""


class PolledPump:
    """POSIX: both pipes, the child's exit and the call to stop in one selector; no thread, no busy
    waiting."""

    def __init__(self) -> None:
        self.open = 0
        """How many pipes have not ended."""
        self.sees_exit = False
        """True while `wait` wakes up for the child's exit."""
        # guards the rope's descriptor; re-entrant, since a signal handler may ring
        self._lock = threading.RLock()
        self._pipes: list[tuple[IO[bytes], Lines]] = []
        self._pidfd = -1
        self._selector = selectors.PollSelector()
        self._bell, self._rope = os.pipe()
        self.descriptor = self._bell
        self._selector.register(self._bell, selectors.EVENT_READ)

    def ring(self) -> None:
        """Wake `wait`. Any thread, also in a signal handler; never blocks."""
        with self._lock:
            if self._rope >= 0:
                os.write(self._rope, b"!")

    def attach(self, proc: Popen[bytes], out: Lines, err: Lines) -> None:
        """Begin to read the child's pipes."""
        assert proc.stdout is not None and proc.stderr is not None
        self._pipes = [(proc.stdout, out), (proc.stderr, err)]
        for pipe, lines in self._pipes:
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, (pipe, lines))
            self.open += 1
        try:
            self._pidfd = os.pidfd_open(proc.pid)
            self._selector.register(self._pidfd, selectors.EVENT_READ)
            self.sees_exit = True
        except (AttributeError, OSError):  # not Linux, before Linux 5.3, or forbidden by a sandbox
            self.sees_exit = False

    def wait(self, timeout: float | None) -> bool:
        """Sleep until something happens, and take it in; False when nothing did. May wait at the
        gate, too."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            if key.data is not None:
                self._read(*key.data)
            else:  # the bell or the exit: both stay readable, once is enough
                self._selector.unregister(key.fd)
                self.sees_exit = self.sees_exit and key.fd != self._pidfd
        return bool(ready)

    def _read(self, pipe: IO[bytes], lines: Lines) -> bool:
        """Take in a chunk, or the end; False when neither is there."""
        try:
            chunk = os.read(pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        if chunk:
            lines.feed(chunk)
        else:
            self._selector.unregister(pipe)
            pipe.close()
            self.open -= 1
            lines.finish()
        return True

    def drain(self) -> None:
        """Take in all that the pipes hold, and little more: a process that left the session may
        hold them open, and write without end."""
        for pipe, lines in self._pipes:
            for _ in range(_MOST_CHUNKS):
                if pipe.closed or not self._read(pipe, lines):
                    break

    def close(self) -> None:
        """Close every descriptor; `ring` does nothing from now on."""
        with self._lock:
            # a late cancel must not write to a descriptor that is somebody else's by then
            rope, self._rope = self._rope, -1
        self._selector.close()
        for pipe, _ in self._pipes:
            pipe.close()
        for descriptor in (self._bell, rope, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)


class ThreadedPump:
    """Windows: a thread per pipe reads it and hands the chunks over, at most eight ahead. See
    `PolledPump`."""

    sees_exit = False
    descriptor = 0

    _SETTLE = 0.25
    """Seconds without a chunk after which all that was written before the end has been handed
    over."""

    def __init__(self) -> None:
        self.open = 0
        self._chunks: SimpleQueue[tuple[Lines, bytes] | None] = SimpleQueue()
        self._room = threading.Semaphore(8)
        self._closed = False
        self._readers: list[threading.Thread] = []

    def ring(self) -> None:
        self._chunks.put(None)  # re-entrant, and unbounded

    def attach(self, proc: Popen[bytes], out: Lines, err: Lines) -> None:
        for pipe, lines in ((proc.stdout, out), (proc.stderr, err)):
            name = f"bgworker-pipe-{proc.pid}"
            reader = own_thread(name, self._read, pipe, lines)
            reader.start()
            self._readers.append(reader)
            self.open += 1

    def _read(self, pipe: IO[bytes], lines: Lines) -> None:
        with pipe:
            # closed by the thread that reads it: a descriptor must not change hands under a blocked
            # read
            chunk = b"?"
            while chunk and not self._closed:
                chunk = os.read(pipe.fileno(), _CHUNK)
                self._room.acquire()
                self._chunks.put((lines, chunk))

    def wait(self, timeout: float | None) -> bool:
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

    def drain(self) -> None:
        for _ in range(_MOST_CHUNKS):
            if not self.open or not self.wait(self._SETTLE):
                return

    def close(self) -> None:
        self._closed = True
        self._room.release(2)
        for reader in self._readers:
            reader.join(self._SETTLE)


def open_pump() -> PolledPump | ThreadedPump:
    """Return the pump for this system; `close` it."""
    return ThreadedPump() if os.name == "nt" else PolledPump()
