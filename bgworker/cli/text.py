"""Text that a terminal may show: harmless, and measured in columns.

What a task says is untrusted. Whatever could steer a terminal or reorder a line becomes a visible
escape before it is shown. Pure functions.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
