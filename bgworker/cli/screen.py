"""What people see of running tasks: lines that scroll, and on a terminal a live table below them.

Three parts that know nothing of where events come from: `TaskTable` turns events into rows, `draw`
turns rows into lines of text for a terminal of some size, `Screen` puts lines and the table on
stdout and stderr.

What a task says is untrusted: on a terminal its control characters are shown, never sent. The
cursor is hidden only inside one write, so that no way of dying leaves it hidden.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import unicodedata
from collections import Counter, deque
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import lru_cache

from ..model.events import LifecycleEvent, StreamEvent, StreamType, TaskStatus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, TextIO, Tuple

    Line = Tuple[int, str]
    Size = Tuple[int, int]

OUT, ERR, OWN = range(3)
"""Kinds of lines: a task's to stdout, a task's to stderr, and our own to stderr, which may hold
colours."""

JUST_ENDED = 2.0
"""Seconds that a task stays in the table after its end."""

_WORDS = {TaskStatus.TIMED_OUT: "timed out", TaskStatus.SCHEDULED: "waiting"}
_COLOURS = {
    TaskStatus.RUNNING: "36",
    TaskStatus.COMPLETED: "32",
    TaskStatus.FAILED: "31",
    TaskStatus.TIMED_OUT: "31",
    TaskStatus.CANCELLED: "33",
}
_COLOUR = re.compile("\x1b\\[[0-9]+m")
_FINAL = (
    TaskStatus.COMPLETED,
    TaskStatus.FAILED,
    TaskStatus.TIMED_OUT,
    TaskStatus.CANCELLED,
    TaskStatus.INTERRUPTED,
)


# ---------------------------------------------------------------- text

# Controls but the tab, marks and controls of text direction, line separators, annotations, tags,
# halves of characters.
_UNSHOWABLE = re.compile(
    "[\0-\x08\n-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str) -> str:
    """Return the text with everything that could steer a terminal, or reorder a line, shown as an
    escape."""
    return _UNSHOWABLE.sub(lambda found: ascii(found[0])[1:-1], text.expandtabs(8))


# Source: ECMA-48, SGR and EL; \x1b(B is part of `tput sgr0`
_COLOURING = re.compile("\x1b(?:\\[[0-9;:]*[mK]|\\(B)")


def said(text: str) -> str:
    """Return what a task said as `escaped`, without the sequences that only colour it."""
    return escaped(_COLOURING.sub("", text) if "\x1b" in text else text)


MOST_OF_A_LINE = 2**19
"""Characters of a line that are shown as one: tabs and escapes may make eight of each."""


def escaped_lines(text: str, shown: Callable[[str], str] = escaped) -> Iterator[str]:
    """Yield the lines of a text, `escaped` or `said`; a very long one comes as several."""
    start = 0
    while start >= 0:
        end = text.find("\n", start)
        stop = len(text) if end < 0 else end
        while stop - start > MOST_OF_A_LINE:
            yield shown(text[start:start + MOST_OF_A_LINE])
            start += MOST_OF_A_LINE
        yield shown(text[start:stop])
        start = end + 1 if end >= 0 else -1


def width_of(text: str) -> int:
    """Return how many columns a terminal needs for text without control characters."""
    return len(text) if text.replace("…", "").isascii() else sum(map(_columns, text))


@lru_cache(4096)
def _columns(character: str) -> int:
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return (
        0
        if unicodedata.category(character) in ("Mn", "Me", "Cf")
        or "\u1160" <= character <= "\u11ff"
        else 1
    )


def cut(text: str, columns: int, ellipsis: str = "…") -> str:
    """Return the text, or as much of its beginning as fits the columns with an ellipsis behind
    it."""
    if len(text) * 2 <= columns or width_of(text) <= columns:
        return text
    room = columns - len(ellipsis)
    if room < 0:
        return ""
    end = used = 0
    for character in text:
        used += _columns(character)
        if used > room:
            break
        end += 1
    return text[:end] + ellipsis


def _padded(text: str, columns: int) -> str:
    return text + " " * (columns - width_of(text))


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def word_for(status: TaskStatus) -> str:
    """Return what to call a status in front of people."""
    return _WORDS.get(status, status.value)


def counted(counts: Counter[TaskStatus], statuses: Iterable[TaskStatus]) -> str:
    """Return "180 completed, 19 failed": the counts that are not zero, in the order of
    ``statuses``."""
    return ", ".join(
        f"{counts[status]} {word_for(status)}" for status in statuses if counts[status]
    )


# ---------------------------------------------------------------- events -> rows

class Row:
    """One task, as far as the events told."""

    __slots__ = ("number", "name", "status", "started", "ended", "duration", "percent", "message")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        """1, 2, 3 ... in the order of creation."""
        self.name = name
        self.status = TaskStatus.CREATED
        self.started: datetime | None = None
        self.ended: datetime | None = None
        self.duration: float | None = None
        self.percent: float | None = None
        self.message = ""
        """Its last line, or the message of its progress."""


class TaskTable:
    """The tasks that wait, run, or have just ended, and how many there are of each status. Not
    locked."""

    def __init__(self) -> None:
        self.counts: Counter[TaskStatus] = Counter()
        self._rows: dict[str, Row] = {}
        self._running: dict[str, Row] = {}
        self._ended: deque[tuple[str, Row]] = deque()  # oldest first
        self._seen = 0

    def apply(self, event: LifecycleEvent | StreamEvent) -> Row:
        """Take an event in; return the row of its task."""
        row = self._rows.get(event.task_id)
        if row is None:
            self._seen += 1
            name = event.task.name if isinstance(event, LifecycleEvent) else event.task_id
            row = self._rows[event.task_id] = Row(self._seen, name)
            self.counts[row.status] += 1
        if isinstance(event, LifecycleEvent):
            self._move(event, row)
        elif event.stream_type is StreamType.PROGRESS:
            row.percent = event.percent
            row.message = event.message or row.message
        else:
            row.message = event.payload or row.message
        return row

    def _move(self, event: LifecycleEvent, row: Row) -> None:
        task = event.task
        self.counts[row.status] -= 1
        self.counts[task.status] += 1
        row.status = task.status
        row.started, row.ended, row.duration = task.started_utc, task.completed_utc, task.duration
        if task.status is TaskStatus.RUNNING:
            self._running[event.task_id] = row
        elif task.status.is_final:
            self._ended.append((event.task_id, row))
            if self._running.pop(event.task_id, None) is None:
                row.started = None

    def forget_ended(self, now: datetime) -> None:
        """Drop the rows of tasks that ended a while ago; nothing more is said of them."""
        while self._ended:
            task_id, row = self._ended[0]
            if row.ended is not None and 0 <= (now - row.ended).total_seconds() < JUST_ENDED:
                return
            del self._rows[task_id]
            self._ended.popleft()

    def rows(self) -> list[Row]:
        """Return those that run, the longest first, then those that have just ended, the latest
        first."""
        return [
            *self._running.values(),
            *(row for _, row in reversed(self._ended) if row.started is not None),
        ]


# ---------------------------------------------------------------- rows -> lines

def draw(table: TaskTable, size: Size, now: datetime, elapsed: float, *, colour: bool = False,
         encoding: str = "utf-8") -> list[str]:
    """Return the lines of the table: a row per task and a summary, narrower than the terminal and
    two thirds as high.

    Args:
        size: columns and lines of the terminal.
        now: for how long the tasks have been running.
        elapsed: seconds of the whole run.
        encoding: what the terminal can show; other characters are escaped.
    """
    # the last column would wrap
    columns, height = size[0] - 1, max(1, min(max(2, size[1] * 2 // 3), size[1] - 1))
    ellipsis = "…" if _showable("…", encoding) == "…" else "..."
    rows = table.rows()
    shown = rows if len(rows) < height else rows[:max(0, height - 2)]
    lines = list(_row_lines(shown, columns, now, colour, encoding, ellipsis))
    if len(shown) < len(rows) and height > 1:
        lines.append(cut(f"{ellipsis} and {len(rows) - len(shown)} more", columns, ellipsis))
    summary = (
        counted(table.counts, (TaskStatus.RUNNING, TaskStatus.SCHEDULED, *_FINAL)) or "starting"
    )
    return [*lines, cut(f"{summary}, {_clock(elapsed)}", columns, ellipsis)]


def _row_lines(rows: Sequence[Row], columns: int, now: datetime, colour: bool, encoding: str,
               ellipsis: str) -> Iterator[str]:
    def cell(text: str, most: int) -> str:
        return cut(_showable(escaped(text[:4 * columns + 4]), encoding), most, ellipsis)

    names = [cell(row.name, max(8, columns // 3)) for row in rows]
    name_columns = max(map(width_of, names), default=0)
    label_columns = max((len(str(row.number)) + 2 for row in rows), default=0)
    has_percent = any(row.percent is not None for row in rows)
    for row, name in zip(rows, names):
        word = word_for(row.status)
        seconds = row.duration
        if seconds is None:
            seconds = (
                0.0 if row.started is None else ((row.ended or now) - row.started).total_seconds()
            )
        percent = (
            "" if not has_percent else " " * 6 if row.percent is None else f"{row.percent:4.0f}% "
        )
        label = f"[{row.number}]".rjust(label_columns) + " "
        rest = f"{word:<9} {_clock(seconds):>7} {percent} {_padded(name, name_columns)}"
        line = cut(label + rest, columns, ellipsis)
        if row.message and (room := columns - width_of(line) - 2) > 0:
            line += "  " + cell(_COLOURING.sub("", row.message[:8 * columns]), room)
        yield painted(line.rstrip(), row.status, label + word) if colour else line.rstrip()


def painted(line: str, status: TaskStatus, head: str) -> str:
    """Return the line with its status, which ends ``head``, in colour. A line cut within it stays
    as it is."""
    word, code = word_for(status), _COLOURS.get(status)
    if code is None or not line.startswith(head) or not head.endswith(word):
        return line
    return f"{head[:-len(word)]}\x1b[{code}m{word}\x1b[0m{line[len(head):]}"


def _showable(text: str, encoding: str) -> str:
    return (
        text
        if text.isascii()
        else text.encode(encoding, "backslashreplace").decode(encoding, "replace")
    )


# ---------------------------------------------------------------- lines -> stdout and stderr

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
            if written is None:  # somebody who shares it has made it non-blocking
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
        self._widths: list[int] = []  # of the table's lines on the terminal

    def show(self, lines: Sequence[Line]) -> None:
        """Write lines, below them the table as it now is. Blocks as long as their reader does.

        Raises:
            OSError: from `Channel.write`.
        """
        with self.lock:
            parts = [(ERR, self._erasure()), *self._grouped(lines), (ERR, self._picture())]
            self._write(parts)

    def refresh(self) -> None:
        """Redraw the table if a second has passed since it was drawn. Raises OSError, as `show`."""
        with self.lock:
            if self._table is not None and self._clock() - self._drawn_at >= 0.99:
                self._write([(ERR, self._erasure()), (ERR, self._picture())])

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
        channel, texts = self._channels[ERR], list[str]()
        for kind, text in parts:
            if self._channels[kind] is not channel and text:
                if texts:
                    channel.write("".join(texts))
                channel, texts = self._channels[kind], []
            if text:
                texts.append(text)
        if texts:
            channel.write("".join(texts))

    def _picture(self) -> str:
        if self._table is None or not self._channels[ERR].is_foreground():
            return ""  # another job redraws the same lines: a shell's prompt, or one more of us
        now, size, encoding = self._now(), self._size(), self._channels[ERR].encoding
        self._drawn_at = self._clock()
        self._table.forget_ended(now)
        lines = draw(
            self._table,
            size,
            now,
            self._drawn_at - self._started,
            colour=self.colour,
            encoding=encoding,
        )
        self._widths = [width_of(_COLOUR.sub("", line)) for line in lines]
        return "\x1b[?25l" + "\n".join(lines) + "\x1b[?25h"

    def _erasure(self) -> str:
        if not self._widths:
            return ""
        # the terminal may have become narrower, and have wrapped our lines
        columns = max(1, self._size()[0])
        rows = sum(max(1, -(-width // columns)) for width in self._widths)
        self._widths = []
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"


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
        kernel32: Any = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
        kernel32.GetStdHandle.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel32.GetStdHandle(-12))
        mode = ctypes.c_uint32()
        return bool(kernel32.GetConsoleMode(handle, ctypes.byref(mode))
                    and kernel32.SetConsoleMode(handle, mode.value | 0x0004))
    except (ImportError, AttributeError, OSError):
        return False
