"""Where text goes, and what stands below it: `Channel` is stdout or stderr, `Screen` puts scrolling
lines on both and a picture below them.

What a task says is untrusted: on a terminal its control characters are shown, never sent. The
cursor is hidden only inside one write, so that no way of dying leaves it hidden.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from time import sleep

from ..words import said, uncoloured
from .text import ANY_WIDTH, Surface, width_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, TextIO, Tuple

    Drawing = Callable[[Surface], Sequence[str]]
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
        self.can_redraw = self.is_terminal and _understands_ansi()
        """Whether it leads to a terminal that understands ANSI sequences."""
        self._encoding = (stream is not None and self.is_terminal and stream.encoding) or "utf-8"
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
        left = memoryview(text.encode(self._encoding, "backslashreplace"))
        while left:
            written = self._raw.write(left)
            if written is None:  # another process that shares it has made it non-blocking
                sleep(0.01)
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

    def surface(self) -> Surface:
        """Return what text is fitted to: the terminal as it now is. Elsewhere lines are as wide as
        $COLUMNS says, or of any width."""
        if self.is_terminal:
            columns, height = self._size()
        else:
            given = os.environ.get("COLUMNS", "")
            is_number = given.isdecimal() and len(given) < 7
            columns, height = is_number and int(given) or ANY_WIDTH, 24
        has_colour = self.can_redraw and not os.environ.get("NO_COLOR")
        return Surface(columns, height, self._encoding, has_colour)

    def _size(self) -> tuple[int, int]:
        found = (0, 0)
        with suppress(OSError, ValueError, AttributeError):  # no terminal after all
            found = os.get_terminal_size(self._raw.fileno())
        # a pseudo-terminal may have been told no size
        return found if min(found) > 0 else shutil.get_terminal_size()


class Screen:
    """Puts lines on stdout and stderr in their order, and below them a picture that is drawn again
    and again in the same place. Any thread; one at a time.

    Args:
        drawing: returns the lines of the picture, which are harmless, at the bottom of stderr; None
            shows none.
    """

    def __init__(self, out: Channel, err: Channel, drawing: Drawing | None) -> None:
        self._channels = (out, err, err)
        self._err = err
        self._drawing = drawing
        self._widths: list[int] = []  # of the picture's lines, as long as it is there
        self._lock = threading.Lock()  # held while something is written

    def show(self, lines: Sequence[Line]) -> None:
        """Write lines, below them the picture as it now is. Blocks as long as their reader does.

        Raises:
            OSError: from `Channel.write`.
        """
        with self._lock:
            parts = [(ERR, self._erasure()), *self._harmless(lines), (ERR, self._picture())]
            # as few writes as can be: a terminal may show what it has got between two
            for channel, group in groupby(parts, key=lambda part: self._channels[part[0]]):
                channel.write("".join([text for _, text in group]))

    def close(self) -> None:
        """Take the picture off the terminal and draw it no more. Raises OSError, as `show`."""
        self._drawing = None
        self.show([])

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """Have the picture off the terminal, if that can be done at once, and nothing drawn
        meanwhile."""
        is_ours = self._lock.acquire(timeout=0.1)
        try:
            if is_ours:
                with suppress(OSError):  # nobody looks
                    self._err.write(self._erasure())
            yield
        finally:
            if is_ours:
                self._lock.release()

    def _picture(self) -> str:
        if self._drawing is None or not self._err.is_foreground():
            return ""  # another job redraws the same lines: a shell's prompt, or one more of us
        surface = self._err.surface()
        # text in the last column would wrap
        lines = self._drawing(replace(surface, columns=max(1, surface.columns - 1)))
        self._widths = [width_of(uncoloured(line)) for line in lines]
        return "\x1b[?25l" + "\n".join(lines) + "\x1b[?25h"

    def _erasure(self) -> str:
        """Return what takes the picture off again. The terminal may have become narrower, and have
        wrapped its lines."""
        columns = self._err.surface().columns
        rows = sum(max(1, -(-width // columns)) for width in self._widths)
        self._widths = []
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J" if rows else ""

    def _harmless(self, lines: Sequence[Line]) -> Iterator[Line]:
        for kind, text in lines:
            if kind != OWN and self._channels[kind].is_terminal:
                # what is printable is harmless; many lines are looked at as one
                if not text.replace("\n", "").isprintable():
                    text = "\n".join(map(said, text.split("\n")))
            yield kind, text + "\n"


def _understands_ansi() -> bool:
    """Tell whether a terminal does."""
    if sys.platform == "win32":
        os.system("")  # has the console process them from now on
    return os.environ.get("TERM") != "dumb"
