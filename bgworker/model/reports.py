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

from .clock import monotonic
from .forks import in_child
from .threads import own_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Tuple

    Line = Tuple[int, str, Tuple[object, ...]]

MOST_LINES = 1000

logger = logging.getLogger(__name__.partition(".")[0])

_lines: deque[Line] = deque()
_writing = allocate_lock()
"""Held by the one thread that empties `_lines`. Nobody waits for it but `wait_for_reports`."""


def report(level: int, message: str, *args: str | int) -> None:
    """Have a line written to bgworker's logger. Any thread; never blocks, never raises."""
    if len(_lines) < MOST_LINES:
        _lines.append((level, message, args))
    _have_written()


def wait_for_reports(deadline: float) -> None:
    """Wait until all lines are with the handlers, or until ``deadline`` (monotonic): one of them
    may block for ever."""
    while (_lines or _writing.locked()) and (left := deadline - monotonic()) > 0:
        if _writing.acquire(True, left):
            _writing.release()
            _have_written()


def _have_written() -> None:
    """Start the thread if lines wait and there is none."""
    if _lines and _writing.acquire(False):
        try:
            own_thread("bgworker-log", _write).start()
        except (RuntimeError, MemoryError):
            # none to be had: the interpreter exits (3.12), or the system has no more
            _write()


def _write() -> None:
    try:
        while _lines:
            level, message, args = _lines.popleft()
            try:
                logger.log(level, message, *args)
            except BaseException:  # a handler's own code. There is no other log to tell of it
                continue
    finally:
        _writing.release()
    # for a line that came between the last look and the release: its thread found the lock taken
    _have_written()


@in_child
def _start_afresh_in_child() -> None:
    """In a forked child: the lines are the parent's, and so was the thread that held the lock."""
    global _writing
    _lines.clear()
    _writing = allocate_lock()
