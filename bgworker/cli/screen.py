"""Where text goes, and what stands below it: `Channel` is stdout or stderr, `Picture` redraws lines
in place, `Screen` puts scrolling lines on both channels and the live table below them.

What a task says is untrusted: on a terminal its control characters are shown, never sent. The
cursor is hidden only inside one write, so that no way of dying leaves it hidden.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from itertools import groupby

from ..words import said
from .live import draw
from .text import width_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, TextIO, Tuple

    from .live import Size, TaskTable

    Line = Tuple[int, str]

OUT, ERR, OWN = range(3)
"""Kinds of lines: a task's to stdout, a task's to stderr, and our own to stderr, which may hold
colours."""


class Channel:
    """Where text goes: stdout or stderr, written past Python's buffers. `write` blocks until the
    text is gone.

    Nothing is kept in a buffer that could be lost, or that the interpreter would wait for at exit.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        buffer = getattr(stream, "buffer", None)
        self._raw: Any = getattr(buffer, "raw", buffer)
        self.is_terminal = stream is not None and stream.isatty()
        self.encoding = (stream is not None and self.is_terminal and stream.encoding) or "utf-8"
        if stream is not None:
            stream.flush()

    def write(self, text: str) -> None:
        """Write all of it; nothing, where the process was started without this stream.

        Raises:
            OSError: nobody reads it any more (`BrokenPipeError`), the disk is full ...
        """
        if self._raw is None:
            if self._stream is not None:
                self._stream.write(text)
            return
        left = memoryview(text.encode(self.encoding, "backslashreplace"))
        while left:
            written = self._raw.write(left)
            if written is None:  # another process that shares it has made it non-blocking
                self._wait()
            else:
                left = left[written:]

    def is_foreground(self) -> bool:
        """Tell whether we are the job that the terminal's user works with; True where that cannot
        be known."""
        try:
            return os.tcgetpgrp(self._raw.fileno()) == os.getpgrp()
        except (OSError, ValueError, AttributeError):
            # it is not the terminal that started us; Windows
            return True

    def _wait(self) -> None:
        import select
        select.select((), (self._raw.fileno(),), (), 1.0)

    def size(self) -> Size:
        """Return columns and lines of the terminal."""
        try:
            found = os.get_terminal_size(self._raw.fileno())
        except (OSError, ValueError, AttributeError):  # no terminal after all
            found = shutil.get_terminal_size()
        if min(found) <= 0:  # a pseudo-terminal that was told no size
            found = shutil.get_terminal_size()
        return found.columns, found.lines


class Picture:
    """Lines at the bottom of a terminal that are drawn again and again in the same place."""

    def __init__(self) -> None:
        self._widths: list[int] = []

    def drawn(self, lines: Sequence[str]) -> str:
        """Return what draws harmless lines, at the beginning of a line of the terminal."""
        self._widths = [width_of(said(line)) for line in lines]
        return "\x1b[?25l" + "\n".join(lines) + "\x1b[?25h"

    def erasure(self, columns: int) -> str:
        """Return what takes the lines off again. The terminal may have become narrower, and have
        wrapped them."""
        rows = sum(max(1, -(-width // max(1, columns))) for width in self._widths)
        self._widths = []
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J" if rows else ""


class Screen:
    """Puts lines on stdout and stderr in their order, and the table below them. Any thread; one at
    a time.

    Args:
        table: drawn at the bottom of stderr; None shows lines only. Guarded by `lock`.
        size: columns and lines of the terminal.
        now: the time of day.
        clock: monotonic seconds.
        colour: whether the table and our own lines are coloured.
    """

    def __init__(
        self,
        out: Channel,
        err: Channel,
        table: TaskTable | None,
        *,
        clock: Callable[[], float],
        size: Callable[[], Size] | None = None,
        now: Callable[[], datetime] | None = None,
        colour: bool = False,
    ) -> None:
        self.lock = threading.Lock()
        self.colour = colour
        self._channels = (out, err, err)
        self._table = table
        self._size = size or err.size
        self._now = now or (lambda: datetime.now(timezone.utc))
        self._clock = clock
        self._started = self._drawn_at = clock()
        self._picture = Picture()

    def show(self, lines: Sequence[Line]) -> None:
        """Write lines, below them the table as it now is. Blocks as long as their reader does.

        Raises:
            OSError: from `Channel.write`.
        """
        with self.lock:
            parts = [(ERR, self._erasure()), *self._grouped(lines), (ERR, self._drawing())]
            self._write(parts)

    def refresh(self) -> None:
        """Redraw the table if a second has passed since it was drawn. Raises OSError, as `show`."""
        with self.lock:
            if self._table is not None and self._clock() - self._drawn_at >= 0.99:
                self._write([(ERR, self._erasure()), (ERR, self._drawing())])

    def close(self) -> None:
        """Take the table off the terminal and draw it no more. Raises OSError, as `show`."""
        with self.lock:
            self._table = None
            self._write([(ERR, self._erasure())])

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """Have the table off the terminal, if that can be done at once, and nothing drawn
        meanwhile."""
        is_ours = self.lock.acquire(timeout=0.1)
        try:
            if is_ours:
                with suppress(OSError):  # nobody looks
                    self._write([(ERR, self._erasure())])
            yield
        finally:
            if is_ours:
                self.lock.release()

    def _grouped(self, lines: Sequence[Line]) -> Iterator[tuple[int, str]]:
        for kind, text in lines:
            if kind != OWN and self._channels[kind].is_terminal:
                text = "\n".join(map(said, text.split("\n")))
            yield kind, text + "\n"

    def _write(self, parts: Iterable[tuple[int, str]]) -> None:
        filled = (part for part in parts if part[1])
        for channel, group in groupby(filled, key=lambda part: self._channels[part[0]]):
            channel.write("".join([text for _, text in group]))

    def _drawing(self) -> str:
        if self._table is None or not self._channels[ERR].is_foreground():
            return ""  # another job redraws the same lines: a shell's prompt, or one more of us
        now, self._drawn_at = self._now(), self._clock()
        self._table.forget_ended(now)
        return self._picture.drawn(draw(
            self._table,
            self._size(),
            now,
            self._drawn_at - self._started,
            colour=self.colour,
            encoding=self._channels[ERR].encoding,
        ))

    def _erasure(self) -> str:
        return self._picture.erasure(self._size()[0])


def can_redraw(channel: Channel) -> bool:
    """Tell whether the channel leads to a terminal that understands ANSI sequences; on Windows,
    switch that on."""
    if not channel.is_terminal or os.environ.get("TERM") == "dumb":
        return False
    return sys.platform != "win32" or _switch_on_ansi()


def _switch_on_ansi() -> bool:
    """Have the console behind stderr process ANSI sequences. Source: "Console Virtual Terminal
    Sequences", Microsoft."""
    try:
        import ctypes
        kernel32: Any = getattr(ctypes, "WinDLL")("kernel32", use_last_error=True)  # Windows alone
        kernel32.GetStdHandle.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel32.GetStdHandle(-12))
        mode = ctypes.c_uint32()
        return bool(kernel32.GetConsoleMode(handle, ctypes.byref(mode))
                    and kernel32.SetConsoleMode(handle, mode.value | 0x0004))
    except (ImportError, AttributeError, OSError):
        return False
