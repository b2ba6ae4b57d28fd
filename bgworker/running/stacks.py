"""Where a task is, as text: the stack of its thread, taken from outside while it runs.

Any thread may ask. No frame outlives the question; no code but Python's own runs for it: a line of
source comes from a file of ordinary size, or from what `linecache` holds, and never from somebody's
loader. Nothing here is guarded: the caller asks through `model.text.ask`.

Without the GIL a frame that runs elsewhere cannot be read safely; then no stack is told.

Loaded with the first task that is past its deadline.
"""

from __future__ import annotations

import linecache
import os
import stat
import sys
from traceback import FrameSummary, StackSummary

from ..model.text import ask, sanitise
from .deadlines import HAS_GIL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, FrameType
    from typing import List, Tuple

    from .context import TaskContext

    Place = Tuple[CodeType, int]
    """A function, and the line of its file where it is."""
    Places = List[Place]

FIRST, LAST = 20, 180
"""Most frames that are told of a stack: the outermost and the innermost."""

_HEAD = "Stack (most recent call last):\n"  # as `logging` has it

_PACKAGE = __file__[:-len(os.path.join("running", os.path.basename(__file__)))]
"""How the names of bgworker's own files begin."""

MOST_SOURCE = 2**20
"""Bytes of a file beyond which no line is read from it: all of it would be."""


def frames_of(thread: int) -> list[FrameType]:
    """Return the frames of a thread, by its identifier, the outermost first; none of one that has
    ended. The caller lets them go at once."""
    frame = sys._current_frames().get(thread) if HAS_GIL else None
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def place_of(frame: FrameType) -> Place:
    """Return where a frame is."""
    return frame.f_code, frame.f_lineno or frame.f_code.co_firstlineno


def of_context(
    context: TaskContext | None, thread: int, runner: CodeType, depth: int, max_bytes: int
) -> str:
    """Return where a task is, from its own function inward: `of_task`, or what its context knows
    that tells more. Text of whole lines, at most ``max_bytes``."""
    until, where = (context and context._where) or (None, None)
    text = of_task(thread, runner, depth, until)
    if where is not None:
        text += ask(where) or ""
    if text.startswith("  File"):
        text = f"{_HEAD}{text}"
    return innermost(text, max_bytes)


def of_task(thread: int, runner: CodeType, depth: int, until: CodeType | None) -> str:
    """Return the stack of a task from its own function inward, without what is bgworker's in it.

    Args:
        thread: the identifier of the thread that runs it.
        runner: what runs a task there, ...
        depth: ... and how many of these are around the one of this task.
        until: the function of bgworker from which on it is told in another way.
    """
    places = [place_of(frame) for frame in frames_of(thread)]
    runners = [number for number, (code, _) in enumerate(places) if code is runner]
    if depth >= len(runners):
        return ""  # it has not come so far, or is about to leave
    places = places[runners[depth] + 1:]
    end = next((number for number, (code, _) in enumerate(places) if code is until), len(places))
    return text_of([place for place in places[:end]
                    if not place[0].co_filename.startswith(_PACKAGE)])


def text_of(places: Places) -> str:
    """Return places as Python shows them in a traceback, the outermost first."""
    left_out = len(places) - FIRST - LAST
    if left_out <= 0:
        return _formatted(places)
    return (f"{_formatted(places[:FIRST])}  [{left_out} frames are left out]\n"
            f"{_formatted(places[-LAST:])}")


def innermost(text: str, max_bytes: int) -> str:
    """Return the text of a stack without as many of its first lines as are too many."""
    kept: list[str] = []
    for line in reversed(text.splitlines(keepends=True)):
        max_bytes -= len(line.encode())
        if max_bytes < 0:
            break
        kept.append(line)
    return "".join(reversed(kept))


def _formatted(places: Places) -> str:
    paths = {code.co_filename for code, _ in places}
    lines = {path: linecache.getlines(path) if _is_cheap(path) else [] for path in paths}
    return "".join(StackSummary.from_list([
        FrameSummary(sanitise(code.co_filename), line, sanitise(code.co_name), lookup_line=False,
                     line=sanitise("".join(lines[code.co_filename][line - 1:line]).strip()))
        for code, line in places]).format())


def _is_cheap(path: str) -> bool:
    """Tell whether the lines of a file can be had without much ado."""
    if len(linecache.cache.get(path, ())) == 1:
        return False  # not lines, but a loader that is to be asked for them
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return path in linecache.cache  # a notebook's cell is in there, and no file
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_SOURCE:
        return False
    linecache.checkcache(path)
    return True
