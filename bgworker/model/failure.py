"""How an exception becomes the texts of a failed task's record: type, message, traceback.

An exception is its author's code: its text, its notes and the loader of its module may raise, lie
or take for ever. So this runs on the task's thread before the task's end, and asks all of them
through the guarded door; what Python itself keeps of an exception (type, traceback, cause) is read
where no subclass can hide it. However large an exception is and whatever led to it, no more is made
of it than fits.
"""

from __future__ import annotations

import builtins
from contextvars import copy_context
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from zipimport import zipimporter

from .errors import TaskCancelled, TaskTimedOut
from .text import ask, clean, fit, sanitise
from .threads import own_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from types import CodeType
    from typing import Any, Tuple

    Texts = Tuple["str | None", "str | None", "str | None"]

PATIENCE = 3.0
"""Seconds for the code of an exception's author."""
MOST_SHOWN = 50
"""Exceptions in one traceback: the latest of a chain, the first of a group."""
MOST_FRAMES = 200
"""Frames of each, the latest."""
MOST_NOTES = 20
"""Notes of each."""

_BECAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"

# As Python keeps them: no subclass and no metaclass stands before these.
_QUALNAME, _MODULE = [type.__dict__[name].__get__ for name in ("__qualname__", "__module__")]
_MRO, _NAMES = [type.__dict__[name].__get__ for name in ("__mro__", "__dict__")]
_TRACEBACK, _CAUSE, _CONTEXT, _IS_ALONE, _ARGS, _DICT = [
    BaseException.__dict__[name].__get__
    for name in (
        "__traceback__",
        "__cause__",
        "__context__",
        "__suppress_context__",
        "args",
        "__dict__",
    )
]
_OS_PARTS = [
    OSError.__dict__[name].__get__ for name in ("errno", "strerror", "filename", "filename2")
]
_SOUGHT = AttributeError.__dict__["obj"].__get__
_PLAIN = (str, int, float, bool, bytes, type(None))
# a type: the loaders of built-in and frozen modules
_LOADERS = (SourceFileLoader, SourcelessFileLoader, zipimporter, type)
_GROUP: Any = getattr(builtins, "BaseExceptionGroup", None)  # from 3.11 on


def without_frames(error: BaseException, codes: Collection[CodeType]) -> BaseException:
    """Take the outermost frames, those that run one of ``codes``, out of an exception's traceback,
    and return it.
    """
    trace = _TRACEBACK(error)
    while trace is not None and any(trace.tb_frame.f_code is code for code in codes):
        trace = trace.tb_next
    return BaseException.with_traceback(error, trace)


def describe_failure(error: BaseException, max_bytes: int) -> Texts:
    """Return type, message and traceback of an exception, each clean text of at most ``max_bytes``;
    of a `TaskCancelled` only its reason, as the message.

    Where that runs code of the exception's author, it runs on a thread of its own, and is waited
    for `PATIENCE` seconds.
    """
    found: list[str] = []
    if _is_plain(error):
        _describe(error, max_bytes, found)
    else:
        describing = own_thread(
            "bgworker-failure", copy_context().run, _describe, error, max_bytes, found
        )
        try:
            describing.start()
            describing.join(PATIENCE)
        except (RuntimeError, MemoryError):
            # there is no thread to be had: 3.12 gives none at its exit
            _describe(error, max_bytes, found)
    message = found[0] if found else "(its text takes too long)"
    if issubclass(type(error), TaskCancelled):
        return None, message, None
    trace = found[1] if len(found) == 2 else _bare_text(error, message)
    return fit(_type_text(type(error)), max_bytes)[0], message, fit(trace, max_bytes)[0]


def _describe(error: BaseException, max_bytes: int, found: list[str]) -> None:
    """Add the message to ``found``, then the traceback."""
    if issubclass(type(error), TaskCancelled):
        reason = ask(getattr, error, "reason")
        found.append((clean(reason, max_bytes) if reason is not None else "") or "task")
    else:
        found.append(clean(error, max_bytes))
        found.append(_chain_text(error, found[0], set(), max_bytes))


def _is_plain(error: BaseException) -> bool:
    """Tell whether no code but Python's own runs when an exception is shown. Most are like that."""
    if type(error) is TaskCancelled:  # only its reason is shown
        return _is_one_of(type(_DICT(error).get("reason")), _PLAIN)
    links = [error]
    for link in links:
        shows_it = next(kind for kind in _MRO(type(link)) if "__str__" in _NAMES(kind))
        parts = [*_ARGS(link), *[part(link) for part in _OS_PARTS if shows_it is OSError]]
        if (
            not _is_one_of(shows_it, (BaseException, KeyError, OSError))
            or "__notes__" in _DICT(link)
            or not all([_is_one_of(type(part), _PLAIN) for part in parts])
            or _has_hint(link)
        ):
            return False
        trace = _TRACEBACK(link)
        while trace is not None:
            if not _is_one_of(type(dict.get(trace.tb_frame.f_globals, "__loader__")), _LOADERS):
                return False
            trace = trace.tb_next
        for earlier in (_CAUSE(link), _CONTEXT(link)):
            if earlier is not None and not any([earlier is each for each in links]):
                links.append(earlier)
        if len(links) > MOST_SHOWN:
            return False
    return True


def _has_hint(error: BaseException) -> bool:
    """Tell whether Python asks others' objects for names, to say which one may have been meant."""
    kind = type(error)
    if issubclass(kind, AttributeError):
        return not _is_one_of(type(_SOUGHT(error)), _PLAIN)
    return issubclass(kind, (NameError, ImportError))


def _is_one_of(kind: type, kinds: tuple[type, ...]) -> bool:
    return any([kind is each for each in kinds])  # ``in`` would ask a metaclass


def _type_text(kind: type) -> str:
    """Return the name of a class, with its module unless that is ``builtins`` or that of bgworker's
    exceptions.
    """
    module, name = _MODULE(kind), sanitise(_QUALNAME(kind))
    module = sanitise(module) if issubclass(type(module), str) else "?"
    return name if module in ("builtins", TaskTimedOut.__module__) else f"{module}.{name}"


def _chain_text(error: BaseException, message: str, shown: set[int], most: int) -> str:
    """Return the text of an exception and of what led to it, as Python orders them: the latest
    last.

    Args:
        shown: ids of the exceptions that were shown already.
        most: bytes; where that is too little the earliest are left out.
    """
    parts = []
    joint = ""
    while True:
        shown.add(id(error))
        part = fit(_text_of_one(error, message, shown, most) + joint, most)[0]
        parts.append(part)
        most -= len(part.encode())
        cause = _CAUSE(error)
        earlier = cause if cause is not None or _IS_ALONE(error) else _CONTEXT(error)
        if earlier is None or id(earlier) in shown or len(shown) >= MOST_SHOWN or most <= 0:
            return "".join(reversed(parts))
        error, joint, message = (
            earlier,
            _DURING if cause is None else _BECAUSE,
            clean(earlier, most),
        )


def _text_of_one(error: BaseException, message: str, shown: set[int], most: int) -> str:
    text = ask(_python_text, error, most) or _bare_text(error, message)
    for number, each in enumerate(_members_of(error), 1):
        if id(each) in shown or len(shown) >= MOST_SHOWN:
            return f"{text}  +---------------- and more\n"
        inner = _chain_text(each, clean(each, most), shown, most)
        text += f"  +---------------- {number} ----------------\n"
        text += "".join([f"    | {line}" for line in inner.splitlines(keepends=True)])
    return text


def _python_text(error: BaseException, most: int) -> str:
    """Return what Python prints of an exception alone, with its hints ("Did you mean ...") and, of
    a `SyntaxError`, the line and its caret."""
    from traceback import TracebackException

    trace, text = _TRACEBACK(error), ""
    # Given ``_seen`` it leaves out the causes of this exception, and the members of a group: there
    # may be no end of them. Neither it nor ``_str`` is documented: where they fail, the caller has
    # another text.
    one: Any = TracebackException(type(error), error, trace, limit=-MOST_FRAMES, _seen=set())
    one._str, one.exceptions = fit(one._str, most)[0], None
    notes: Any = getattr(one, "__notes__", None)  # from 3.11 on
    is_list = type(notes) in (list, tuple)
    one.__notes__ = [clean(note, most // 8) for note in notes[:MOST_NOTES]] if is_list else None
    if trace is not None:
        frames = fit("".join(one.stack.format()), most // 2)[0].rstrip()
        text = f"Traceback (most recent call last):\n{frames}\n"
    return text + "".join(one.format_exception_only())


def _bare_text(error: BaseException, message: str) -> str:
    """Return what can be told of an exception without running anybody's code."""
    trace = _TRACEBACK(error)
    frames = []
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f'"{sanitise(code.co_filename)}", line {trace.tb_lineno}'
        frames.append(f"  File {where}, in {sanitise(code.co_name)}\n")
        trace = trace.tb_next
    head = "Traceback (most recent call last):\n" if frames else ""
    name = _type_text(type(error))
    last = f"{name}: {message}\n" if message else f"{name}\n"
    return "".join([head, *frames[-MOST_FRAMES:], last])


def _members_of(error: BaseException) -> tuple[BaseException, ...]:
    if _GROUP is None or not issubclass(type(error), _GROUP):
        return ()
    return _GROUP.__dict__["exceptions"].__get__(error)  # type: ignore[no-any-return]
