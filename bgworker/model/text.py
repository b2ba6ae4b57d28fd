"""The one guarded door: what a user hands over becomes clean text, JSON text or a number here, and
nothing else goes on.

All of it runs on the user's own thread (or the dispatcher's, which only cleans text), before any
sink sees an event.

Guarantees. Nothing here raises, whatever the value's own code does: what that raises, `SystemExit`,
`TaskCancelled` and `KeyboardInterrupt` included, is the value's affair and ends nothing. The one
exception is a `KeyboardInterrupt` in the main thread: there it is somebody's Ctrl-C. A value's type
is what ``type()`` says, never what it claims by ``__class__``; text that comes out is an exact
`str` that every encoder takes, a number is an exact `float`.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from itertools import islice
from json.encoder import encode_basestring_ascii as _quote
from threading import get_ident, main_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, TypeVar

    T = TypeVar("T")

_SURROGATES = "[\ud800-\udfff]"
_ESCAPES = r"\\(?:u(?:d[89ab]..\\ud[c-f]..|(d[89a-f]..|0000)|....)|.)"  # group 1: NUL, half a pair
_MAX_DEPTH = 100
"""Most containers inside one another: well inside every interpreter's recursion limit, for readers
too.
"""

_MOST_ITEMS = 1_000_000
"""Most items of all containers that are looked into one by one: a class of somebody's may go on for
ever, and what holds the same thing twice, sixty levels deep, is as good as without end.
"""

_CONTAINERS = (Mapping, list, tuple, set, frozenset)
_SCALARS = frozenset((str, int, float, bool, type(None)))
_KEYS = frozenset((str,))

SHOWN = 200
"""Characters of a value that a message shows at most."""

MOST_DESCRIBED = 1000
"""Most characters that an exception is described in, wherever it is shown."""


def ask(function: Callable[..., T], *args: Any) -> T | None:
    """Call what may be, or run, somebody else's code; None if that raises anything."""
    try:
        return function(*args)
    except BaseException as error:
        _raise_ctrl_c(error)
        return None


def _raise_ctrl_c(error: BaseException) -> None:
    if issubclass(type(error), KeyboardInterrupt) and get_ident() == main_thread().ident:
        raise error


def listed(values: Any, most: int) -> list[Any] | None:
    """Return what an iterable gives; None if it raises, or gives more than ``most``: it may give
    for ever.
    """
    found: list[Any] | None = ask(lambda: list(islice(values, most + 1)))
    return found if found is not None and len(found) <= most else None


# ---------------------------------------------------------------- text

def text_of(value: object) -> str:
    """Return ``str(value)`` as an exact `str`, bytes read as UTF-8, or a stand-in where there is
    none.
    """
    kind = type(value)
    if kind is str:
        return value  # type: ignore[return-value]
    text = ask(_decoded if issubclass(kind, (bytes, bytearray)) else str, value)
    return _unprintable(value) if text is None else str.__str__(text)


def _decoded(value: Any) -> str:
    return (bytes if issubclass(type(value), bytes) else bytearray).decode(value, errors="replace")


def sanitise(text: str) -> str:
    """Return the text with U+FFFD for each NUL and each surrogate; clean text comes back as it is.

    SQLite tools cut text at a NUL, and no surrogate can be written as UTF-8.
    """
    if type(text) is not str:  # a subclass may lie about all that is asked below
        text = str.__str__(text)
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if text.isascii():
        return text
    try:
        text.encode()  # many times as fast as a regular expression at finding nothing
    except UnicodeEncodeError:
        return re.sub(_SURROGATES, "\ufffd", text)
    return text


def last_state(line: str) -> str:
    """Return what a terminal shows of a line: what comes after its last carriage return."""
    return line.rstrip("\r").rpartition("\r")[2]


def fit(text: str, max_bytes: int) -> tuple[str, int]:
    """Sanitise the text and cut it to at most ``max_bytes`` of UTF-8, between two characters.

    Returns:
        The text and 0 if it fits; else what is left and the bytes of the whole sanitised text.
    """
    if type(text) is not str:
        text = str.__str__(text)
    max_bytes = max(max_bytes, 0)
    # a character takes at least a byte: no more is looked at, nor copied
    head = sanitise(text[:max_bytes])
    if len(text) * 4 <= max_bytes:  # and at most 4
        return head, 0
    if head.isascii():
        return (head, 0) if len(text) <= max_bytes else (head, _size(text))
    encoded = head.encode()
    if len(encoded) <= max_bytes and len(text) <= max_bytes:
        return head, 0
    return encoded[:max_bytes].decode(errors="ignore"), _size(text)


def pieces(text: str, max_bytes: int) -> Iterator[str]:
    """Yield the sanitised text in parts of at most ``max_bytes`` of UTF-8, 4 or more, cut between
    characters; an empty text is one part."""
    start = 0
    while start < len(text) or not start:
        piece, _ = fit(text[start:start + max_bytes], max_bytes)
        yield piece
        start += len(piece) or 1


def clean(value: object, max_bytes: int) -> str:
    """Return any value's text, sanitised and cut to at most ``max_bytes``."""
    return fit(text_of(value), max_bytes)[0]


def _size(text: str) -> int:
    """Return the bytes of the sanitised text, without a second copy of a long one."""
    if text.isascii():
        size = len(text)
    else:  # what stands in for a surrogate takes as much as the surrogate
        size = sum(len(text[start:start + 65536].encode(errors="surrogatepass"))
                   for start in range(0, len(text), 65536))
    return size + 2 * text.count("\0") if "\0" in text else size


def show(value: object) -> str:
    """Return a value as an error message shows it: its repr, never long."""
    if type(value) in (bytes, bytearray):
        value = value[:100]  # type: ignore[index]
    shown = ask(_SHOWN.repr, value)
    if shown is None:  # for one, an integer longer than sys.get_int_max_str_digits()
        return _unprintable(value)
    shown = sanitise(shown)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def describe(error: BaseException) -> str:
    """Return an exception's type and text on one line of clean text, at most `MOST_DESCRIBED`
    characters.

    The exception's own code may take its time, or call back: never call this under a lock of ours,
    nor while anybody but the caller waits.
    """
    text = ask(str, error)
    text = "(its text cannot be had)" if text is None else str.__str__(text)
    text = " ".join(text[:4 * MOST_DESCRIBED].split())
    name = name_of(type(error))
    text = f"{name}: {sanitise(text)}" if text else name
    return text if len(text) <= MOST_DESCRIBED else text[:MOST_DESCRIBED - 1] + "\u2026"


def name_of(kind: type) -> str:
    """Return the name of a class; not what its metaclass says it is."""
    return sanitise(type.__dict__["__name__"].__get__(kind))


def _unprintable(value: object) -> str:
    name = ask(lambda: type(value).__name__)
    return sanitise(f"<unprintable {name} object>") if type(name) is str else "<unprintable object>"


# ---------------------------------------------------------------- numbers

def number_of(value: object) -> float | None:
    """Return a number of any type (numpy's, `Decimal`, `Fraction`, ...) as an exact `float`; None
    for all else.
    """
    if type(value) is float:
        return value
    # float() would read text
    return None if issubclass(type(value), (str, bytes, bytearray)) else ask(float, value)


# ---------------------------------------------------------------- JSON

def json_text(value: object) -> str:
    """Return any value as compact JSON text, ASCII, on one line.

    As ``json.dumps``, and: NaN and infinities are null; strings are sanitised; mappings are
    objects, sets are arrays, bytes are read as UTF-8, other objects are their ``str()``; integers
    too long to be read back are hexadecimal strings; of keys that come to the same text the last
    one wins. What cannot be had (a circular part, an exploding ``__str__``, what is nested too
    deep) becomes a string that says so. Reading the text and calling this again gives the same
    text.
    """
    try:  # as `ask` does, which is worth a tenth of the time here
        text = ENCODE(value) if _is_plain(value, _MAX_DEPTH, iter(range(_MOST_ITEMS))) else None
    except BaseException as error:
        _raise_ctrl_c(error)
        text = None
    # left to look for: NUL, and half a surrogate pair (a whole one is a character)
    if text is not None and not (
        ("\\ud" in text or "\\u0000" in text)
        and any(bad[1] for bad in re.finditer(_ESCAPES, text))
    ):
        return text
    cleaned = ask(lambda: ENCODE(_cleaned(value, (), iter(range(_MOST_ITEMS)))))
    # a RecursionError, if the caller has left no room
    return _quote(_unprintable(value)) if cleaned is None else cleaned


def fit_json(text: str, max_bytes: int) -> tuple[str, int]:
    """Return JSON text of `json_text`, or the object that stands for it where it is too large:
    never half of it.

    Returns:
        The text and 0 if it fits; else ``{"truncated": <bytes of the whole>, "head": "<its
        beginning>"}``, of at most ``max_bytes`` (of which there are at least 64), and the bytes of
        the whole.
    """
    if len(text) <= max_bytes:
        return text, 0
    start = f'{{"truncated":{len(text)},"head":"'
    head = _quote(text[:max_bytes])[1:max(1, max_bytes - len(start) - 1)]
    if (len(head) - len(head.rstrip("\\"))) % 2:  # half an escape
        head = head[:-1]
    return f'{start}{head}"}}', len(text)


def _is_plain(value: Any, depth: int, budget: Iterator[int]) -> bool:
    """Tell whether a value holds nothing but JSON's own types, exactly these, in at most ``depth``
    containers inside one another: then nobody's code runs while it is encoded.

    Args:
        budget: gives as many values as containers may be looked into.
    """
    kind = type(value)
    if kind is dict:
        if not _KEYS.issuperset(map(type, value)):
            return False
        items = value.values()
    elif kind is list or kind is tuple:
        items = value
    else:
        return kind in _SCALARS
    if not depth or next(budget, None) is None:
        return False
    if _SCALARS.issuperset(map(type, items)):
        return True
    # of a copy, since another thread may change it meanwhile; and no more after the first that is
    # not plain, since what leads back to itself has no end
    return all(_is_plain(item, depth - 1, budget) for item in list(items))


def _cleaned(value: Any, parents: tuple[int, ...], budget: Iterator[int]) -> Any:
    """Return a value that JSON can hold, copied from one that it may not.

    Args:
        parents: ids of the containers around it.
        budget: gives as many values as items may be copied.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if issubclass(kind, str):
        return sanitise(value)
    if issubclass(kind, int):
        return _cleaned_int(int.__int__(value))
    if issubclass(kind, float):
        value = float.__float__(value)
        return value if math.isfinite(value) else None
    if not issubclass(kind, _CONTAINERS):
        # by its ``__class__``
        is_honest = ask(isinstance, value, (str, int, float, *_CONTAINERS)) is False
        return sanitise(text_of(value)) if is_honest else _unprintable(value)
    if id(value) in parents or len(parents) == _MAX_DEPTH:
        return _unprintable(value)
    copy = ask(_cleaned_items, value, (*parents, id(value)), budget)
    return _unprintable(value) if copy is None else copy


def _cleaned_items(value: Any, parents: tuple[int, ...], budget: Iterator[int]) -> Any:
    if issubclass(type(value), Mapping):
        return {
            _cleaned_key(key): _cleaned(item, parents, budget)
            for key, item in _bounded(value.items(), budget)
        }
    return [_cleaned(item, parents, budget) for item in _bounded(value, budget)]


def _bounded(items: Iterable[T], budget: Iterator[int]) -> Iterator[T]:
    """Give what there is, and raise where there is more than the budget allows."""
    for item in items:
        if next(budget, None) is None:
            raise OverflowError
        yield item


def _cleaned_int(value: int) -> int | str:
    try:
        int.__repr__(value)
    except ValueError:
        # longer than sys.get_int_max_str_digits(), which a reader could not parse either
        return hex(value)
    return value


def _cleaned_key(key: object) -> str:
    if key is None or issubclass(type(key), (int, float)):  # as json.dumps spells them
        cleaned = _cleaned(key, (), iter(()))
        return cleaned if type(cleaned) is str else ENCODE(cleaned)
    return sanitise(key if issubclass(type(key), str) else text_of(key))  # type: ignore[arg-type]


# The checks for cycles stay on: without them a cycle is found by running out of stack.
ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
