"""Text measured in the columns of a terminal, and the `Surface` that it is fitted to. Pure
functions.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile

from ..model.events import TaskStatus
from ..words import said

ANY_WIDTH = 1_000_000
"""Columns where there is no terminal: nothing is left out, a program may be reading."""

# Terminals disagree about the width of what these join, choose or colour; without them they agree.
_OF_NO_CERTAIN_WIDTH = re.compile("[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")

_LEFTWARD = ("R", "AL", "AN")  # Source: Unicode Standard Annex 9, "Unicode Bidirectional Algorithm"

_COLOURS = {
    TaskStatus.RUNNING: "36",
    TaskStatus.COMPLETED: "32",
    TaskStatus.FAILED: "31",
    TaskStatus.TIMED_OUT: "31",
    TaskStatus.CANCELLED: "33",
}


@dataclass(frozen=True)
class Surface:
    """What text is put on: a terminal as it now is, or what is none."""

    columns: int = ANY_WIDTH
    height: int = 24
    encoding: str = "utf-8"
    has_colour: bool = False

    @property
    def is_for_people(self) -> bool:
        """Whether lines are fitted to a width; else a program may be reading."""
        return self.columns < ANY_WIDTH

    def cut(self, text: str, columns: int | None = None) -> str:
        """Return harmless text, or as much of its beginning as fits the columns with an ellipsis
        behind it.

        Args:
            columns: None stands for all that there are.
        """
        room = self.columns if columns is None else columns
        if len(text) * 2 <= room or width_of(text) <= room:
            return text
        ellipsis = "…" if self._showable("…") == "…" else "..."
        room -= len(ellipsis)
        if room < 0:
            return ""
        ends = accumulate(map(_columns, text))  # the column behind each character
        return text[:sum(1 for _ in takewhile(lambda end: end <= room, ends))] + ellipsis

    def cell(self, text: str, columns: int) -> str:
        """Return text of a task as part of a line: harmless, and cut to the columns.

        No more of it is looked at than could be shown if most of it were colours.
        """
        return self.cut(self._showable(said(text[:16 * columns + 16])), columns)

    def painted(self, text: str, status: TaskStatus) -> str:
        """Return the text in the colour of a status, if there are colours."""
        code = _COLOURS.get(status)
        return f"\x1b[{code}m{text}\x1b[0m" if code and self.has_colour else text

    def _showable(self, text: str) -> str:
        """Return the text with escapes for the characters that the encoding lacks."""
        if text.isascii():
            return text
        if self.is_for_people:
            text = _OF_NO_CERTAIN_WIDTH.sub("", text)
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding, "replace")

    def closed(self, text: str) -> str:
        """Return the text with a mark behind it if any of it runs from right to left: terminals
        that reorder text then leave what stands behind it in its place."""
        if text.isascii() or not self.is_for_people:
            return text
        runs_left = any(unicodedata.bidirectional(each) in _LEFTWARD for each in text)
        return f"{text}\u200e" if runs_left else text


def width_of(text: str) -> int:
    """Return how many columns a terminal needs for text without control characters."""
    return len(text) if text.replace("…", "").isascii() else sum(map(_columns, text))


@lru_cache(4096)
def _columns(character: str) -> int:
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    if unicodedata.category(character) in ("Mn", "Me", "Cf") or "\u1160" <= character <= "\u11ff":
        return 0
    return 1
