"""Text that a terminal can show, measured in columns. Pure functions."""

from __future__ import annotations

import unicodedata
from functools import lru_cache


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


def showable(text: str, encoding: str) -> str:
    """Return the text with escapes for the characters that the encoding lacks."""
    if text.isascii():
        return text
    return text.encode(encoding, "backslashreplace").decode(encoding, "replace")


def ellipsis_in(encoding: str) -> str:
    """Return the sign that something was cut off, as a terminal of this encoding can show it."""
    return "…" if showable("…", encoding) == "…" else "..."
