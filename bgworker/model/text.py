"""Untrusted values made fit for every sink: clean text, bounded text, and JSON text of whatever there is.

All of it runs on the task's thread or the dispatcher's, before any sink sees an event; `wire` hands the names on.
Pure functions; nothing here raises an `Exception`, whatever the value's own code does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as _quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SURROGATES = "[\ud800-\udfff]"
_ESCAPES = r"\\(?:u(?:d[89ab]..\\ud[c-f]..|(d[89a-f]..|0000)|....)|.)"  # group 1: NUL, half a pair
_NUMBERLIKE_KEY = r'[{,]"(?:-?[0-9][^"]*|true|false|null)":'
MOST_DESCRIBED = 1000
"""Most characters that an exception is described in, wherever it is shown."""
_MAX_DEPTH = 100  # of a value that needed cleaning: well inside every interpreter's recursion limit, for readers too


def sanitise(text: str) -> str:
    """Return the text with U+FFFD for each NUL and each surrogate; clean text comes back as it is.

    SQLite tools cut text at a NUL, and no surrogate can be written as UTF-8.
    """
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if text.isascii():
        return text
    try:
        text.encode()  # many times as fast as a regular expression at finding nothing
    except UnicodeEncodeError:
        return re.sub(_SURROGATES, "\ufffd", text)
    return text


def fit(text: str, max_bytes: int) -> tuple[str, int]:
    """Sanitise the text and cut it to at most ``max_bytes`` of UTF-8, between two characters.

    Returns:
        The text and 0 if it fits; else what is left and the bytes of the whole sanitised text.
    """
    text, max_bytes = sanitise(text), max(max_bytes, 0)
    if len(text) * 4 <= max_bytes:  # no character takes more than 4 bytes
        return text, 0
    if text.isascii():
        return (text, 0) if len(text) <= max_bytes else (text[:max_bytes], len(text))
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text, 0
    return encoded[:max_bytes].decode(errors="ignore"), len(encoded)


def json_text(value: object) -> str:
    """Return any value as compact JSON text, ASCII, on one line. Never raises an `Exception`.

    As ``json.dumps``, and: NaN and infinities are null; strings are sanitised; mappings are objects, sets are arrays,
    bytes are read as UTF-8, other objects are their ``str()``; integers too long to be read back are hexadecimal
    strings; of keys that come to the same text the last one wins. What cannot be had (a circular part, an exploding
    ``__str__``, what is nested too deep) becomes a string that says so. Reading the text and calling this again gives
    the same text.
    """
    try:
        text = ENCODE(value)
        # Left to look for: NUL, half a surrogate pair (a whole one is a character), and keys such as 1 beside "1".
        has_bad_text = ("\\ud" in text or "\\u0000" in text) and any(bad[1] for bad in re.finditer(_ESCAPES, text))
        if not has_bad_text and not re.search(_NUMBERLIKE_KEY, text):
            return text
    except Exception:  # the value's own code may have run, and raised whatever it likes
        pass  # the careful way finds out what is wrong, and where
    try:
        return ENCODE(_cleaned(value, ()))
    except Exception:  # a RecursionError, if the caller has left no room
        return _quote(_unprintable(value))


def _cleaned(value: Any, parents: tuple[int, ...]) -> Any:
    """A value that JSON can hold, copied from one that it may not. ``parents``: ids of the containers around it."""
    try:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return sanitise(value)
        if isinstance(value, int):
            return _cleaned_int(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
            return sanitise(text_of(value))
        if id(value) in parents or len(parents) == _MAX_DEPTH:
            return _unprintable(value)
        parents = (*parents, id(value))
        if isinstance(value, Mapping):
            return {_cleaned_key(key): _cleaned(item, parents) for key, item in value.items()}
        return [_cleaned(item, parents) for item in value]
    except Exception:  # again the value's own code
        return _unprintable(value)


def _cleaned_int(value: int) -> int | str:
    try:
        int.__repr__(value)
    except ValueError:  # longer than sys.get_int_max_str_digits(), which a reader could not parse either
        return hex(value)
    return value


def _cleaned_key(key: object) -> str:
    if key is None or isinstance(key, (int, float)):  # as json.dumps spells them
        cleaned = _cleaned(key, ())
        return cleaned if isinstance(cleaned, str) else ENCODE(cleaned)
    return sanitise(key if isinstance(key, str) else text_of(key))


def text_of(value: object) -> str:
    """Return ``str(value)`` as an exact `str`, bytes read as UTF-8, or a stand-in where there is none."""
    try:
        return str.__str__(value.decode(errors="replace") if isinstance(value, (bytes, bytearray)) else str(value))
    except Exception:
        return _unprintable(value)


def _unprintable(value: object) -> str:
    try:
        return sanitise(f"<unprintable {type(value).__name__} object>")
    except Exception:  # a metaclass can make even the name explode
        return "<unprintable object>"


def _default(value: object) -> object:
    """What the encoder asks for when it meets something that is not JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (set, frozenset)) else text_of(value)


# The checks for cycles stay on: without them a cycle is found by running out of stack.
ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_default).encode


def describe(error: BaseException) -> str:
    """Return an exception's type and text on one line of clean text, at most `MOST_DESCRIBED` characters.

    This runs the exception's own code. What that raises is caught, ``SystemExit`` too; but it may take its time, or call
    back, so never call this under a lock of ours, nor while anybody but the caller waits.
    """
    try:
        text = str.__str__(str(error))  # exactly a `str`: a subclass could answer in `split`
    except BaseException:  # the exception's own code
        text = "(its text cannot be had)"
    text = " ".join(text[:4 * MOST_DESCRIBED].split())
    name: str = type.__dict__["__name__"].__get__(type(error))  # not what a metaclass says it is
    text = sanitise(f"{name}: {text}" if text else name)
    return text if len(text) <= MOST_DESCRIBED else text[:MOST_DESCRIBED - 1] + "\u2026"
