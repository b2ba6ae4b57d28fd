"""The guarded door to the log.

Guarantees. `report` never blocks and never raises, whatever the handlers of the log do: a thread of
its own hands the lines to `logging`. It is started for the first line and ends with the last; while
a handler blocks, up to `MOST_LINES` lines wait, and further ones are dropped. Its lines hold clean
text and numbers, never an object of somebody else's.
"""

from __future__ import annotations

import logging
from _thread import allocate_lock
from collections import deque
from time import sleep

from .clock import monotonic
from .forks import in_child
from .threads import own_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from threading import Thread
    from typing import Tuple

    Line = Tuple[int, str, Tuple[object, ...]]

MOST_LINES = 1000

logger = logging.getLogger(__name__.partition(".")[0])

_lines: deque[Line] = deque()
_writer: Thread | None = None
"""Who was started last to empty `_lines`. An interrupt may leave one here that never starts."""
_writing = allocate_lock()
"""Held by the one thread that empties `_lines`. Only such threads wait for it."""


def report(level: int, message: str, *args: str | int) -> None:
    """Have a line written to bgworker's logger. Any thread; never blocks, never raises."""
    if len(_lines) < MOST_LINES:
        _lines.append((level, message, args))
    _have_written()


def wait_for_reports(deadline: float) -> None:
    """Wait until all lines are with the handlers, or until ``deadline`` (monotonic): one of them
    may block for ever."""
    while (_lines or _writing.locked()) and monotonic() < deadline:
        _have_written()
        sleep(0.002)


def _have_written() -> None:
    """Start the thread if lines wait and there is none. Of two that start one at the same time
    each may: the second finds nothing to do."""
    global _writer
    writer = _writer
    if _lines and (writer is None or not writer.is_alive()):
        thread = _writer = own_thread("bgworker-log", _write)
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            # none to be had: the interpreter exits (3.12), or the system has no more
            if not _writing.locked():
                _write()


def _write() -> None:
    global _writer
    with _writing:
        while _lines:
            level, message, args = _lines.popleft()
            try:
                logger.log(level, message, *args)
            except BaseException:  # a handler's own code. There is no other log to tell of it
                continue
    # A line may have come after the last look, and its reporter may have seen us still alive. He
    # looked at the writer after he had added the line; so we say first that there is none.
    _writer = None
    _have_written()


@in_child
def _start_afresh_in_child() -> None:
    """In a forked child: the lines are the parent's, and so was the thread that held the lock."""
    global _writer, _writing
    _lines.clear()
    _writer = None
    _writing = allocate_lock()
